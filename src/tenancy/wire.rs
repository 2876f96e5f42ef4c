//! What goes in and out of tenancy; `api` serialises it as it is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use crate::pool::{PoolStatus, SlotStatus};
use crate::{
    model::{
        ClaimSource, ClaimState, Epoch, Revision, Secret, SlotId, SnapshotRef, StateSource, TenantId,
        WorkloadId,
    },
    script::Output,
};

/// The body of `POST /tenants/{tenant}/claim`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimRequest {
    /// Which workload; the only one there is when left out.
    #[serde(default)]
    pub workload: Option<WorkloadId>,
    /// Laid over the tenant's own metadata.
    #[serde(default)]
    pub metadata: Option<serde_json::Map<String, serde_json::Value>>,
    /// Environment for the program; needs an activation that can carry it.
    #[serde(default)]
    pub env: Option<BTreeMap<String, String>>,
    /// Secret files, by name.
    #[serde(default)]
    pub secrets: Option<BTreeMap<String, Secret>>,
    /// How long to wait for a slot, in milliseconds; the server's default when left out.
    #[serde(default)]
    pub wait_ms: Option<u64>,
}

/// The body of `POST /tenants/{tenant}/release`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRequest {
    /// Which workload; the only one there is when left out.
    #[serde(default)]
    pub workload: Option<WorkloadId>,
    /// Only this claim; another epoch's is never ended.
    #[serde(default)]
    pub epoch: Option<Epoch>,
    /// What to wait for.
    #[serde(default)]
    pub wait: ReleaseWait,
}

/// What a release waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseWait {
    /// The state is in the store and was read back (or the save is known to be delayed).
    #[default]
    Durable,
    /// The release is journaled.
    Accepted,
}

/// A claim, as answered.
#[derive(Debug, Clone, Serialize)]
pub struct ClaimAnswer {
    /// Whose it is.
    pub tenant: TenantId,
    /// The workload.
    pub workload: WorkloadId,
    /// Its number.
    pub epoch: Epoch,
    /// Where the slot came from.
    pub source: ClaimSource,
    /// The slot.
    pub slot: SlotId,
    /// The revision it runs to its end.
    pub revision: Revision,
    /// The container.
    pub container: ContainerAnswer,
    /// How to reach it.
    pub endpoints: Endpoints,
    /// Its state.
    pub state: StateAnswer,
    /// What the workload's hooks set; may hold secrets they chose to show.
    pub outputs: BTreeMap<String, OutputAnswer>,
    /// Milliseconds of each step, by name, and `total`.
    pub timings_ms: BTreeMap<&'static str, f64>,
}

/// The container of a claim.
#[derive(Debug, Clone, Serialize)]
pub struct ContainerAnswer {
    /// The engine's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its address on its network, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// How a claimed container is reached.
#[derive(Debug, Clone, Serialize)]
pub struct Endpoints {
    /// The comm directory on the server's host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comm: Option<String>,
    /// Named ports, as `address:port` where there is an address.
    pub ports: BTreeMap<String, String>,
}

/// The state of a claim when it began.
#[derive(Debug, Clone, Serialize)]
pub struct StateAnswer {
    /// Where it came from.
    pub source: StateSource,
    /// The snapshot it equals, when there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<u64>,
    /// Bytes of its files, as the snapshot says.
    pub bytes: u64,
    /// Regular files, as the snapshot says.
    pub files: u64,
}

/// An output; serialises as the value. `Debug` never shows a secret.
#[derive(Debug, Clone)]
pub struct OutputAnswer(pub Output);

/// The answer to a release.
#[derive(Debug, Clone, Serialize)]
pub struct ReleaseAnswer {
    /// Whose claim.
    pub tenant: TenantId,
    /// The workload.
    pub workload: WorkloadId,
    /// What became of the state.
    pub state: ReleaseState,
    /// The claim that was ended; none when there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// The snapshot, when durable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<u64>,
    /// Why it is not durable yet, when it should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What became of the state of a released claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseState {
    /// In the store, read back.
    Durable,
    /// Kept on this node; saved as soon as the store allows.
    Pending,
    /// Thrown away, because the spec says `persist.on_release: false`.
    Discarded,
    /// There was nothing to release.
    NotClaimed,
}

/// The answer to `GET /tenants/{tenant}/status`.
#[derive(Debug, Clone, Serialize)]
pub struct TenantStatus {
    /// The tenant.
    pub tenant: TenantId,
    /// Claims that are not over, and those whose state is not saved.
    pub claims: Vec<ClaimStatus>,
    /// The newest snapshot this node knows of, by workload.
    pub snapshots: BTreeMap<WorkloadId, SnapshotRef>,
}

/// One claim in a tenant's status.
#[derive(Debug, Clone, Serialize)]
pub struct ClaimStatus {
    /// The workload.
    pub workload: WorkloadId,
    /// Its number.
    pub epoch: Epoch,
    /// Where it stands.
    pub state: ClaimState,
    /// The slot, while it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<SlotId>,
    /// Where the slot came from.
    pub source: ClaimSource,
    /// When it began, milliseconds since the epoch.
    pub created_ms: u64,
    /// Last sign of use, milliseconds since the epoch.
    pub active_ms: u64,
    /// Whether the claim itself failed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub failed: bool,
    /// The later claim that took over this one's unsaved state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub superseded_by: Option<Epoch>,
    /// Why its state is not saved yet, when a save has failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// The answer to `POST /tenants/{tenant}/sync`.
#[derive(Debug, Clone, Serialize)]
pub struct SyncAnswer {
    /// Whose state.
    pub tenant: TenantId,
    /// The workload.
    pub workload: WorkloadId,
    /// The claim.
    pub epoch: Epoch,
    /// The snapshot that was made.
    pub snapshot: u64,
    /// How long the container was paused, in milliseconds.
    pub paused_ms: f64,
    /// Bytes sent to the store.
    pub sent_bytes: u64,
}

/// One workload in `GET /workloads`.
#[derive(Debug, Clone, Serialize)]
pub struct WorkloadStatus {
    /// Its id.
    pub id: WorkloadId,
    /// Its name.
    pub name: String,
    /// The revision that new claims get.
    pub revision: Revision,
    /// The hash that selects its slots.
    pub spec_hash: String,
    /// The hooks its script has.
    pub hooks: Vec<&'static str>,
    /// Its spec as in force, with every default filled in.
    pub spec: serde_json::Value,
}

/// The answer to `GET /readyz`: 200 unless `starting`, `degraded` says what does not work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// `ready`, `degraded` or `starting`.
    pub status: &'static str,
    /// What is not as it should be.
    pub reasons: Vec<String>,
}

/// Says why a request to tenancy was not carried out; `api` maps each to one status.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// 404 `unknown_workload`
    #[error("there is no workload {given:?}")]
    UnknownWorkload {
        /// What was asked for.
        given: String,
        /// What there is.
        known: Vec<WorkloadId>,
    },
    /// 422 `workload_required`
    #[error("workload is required, there is more than one")]
    WorkloadRequired {
        /// What there is.
        known: Vec<WorkloadId>,
    },
    /// 409 `claim_differs`
    #[error("the tenant's claim was made with other {what}")]
    ClaimDiffers {
        /// `env`, `secrets` or `metadata`.
        what: &'static str,
    },
    /// 404 `not_claimed`
    #[error("tenant {tenant} has no claim of workload {workload}")]
    NotClaimed {
        /// The tenant.
        tenant: TenantId,
        /// The workload.
        workload: WorkloadId,
    },
    /// 409 `stale_epoch`
    #[error("epoch {given} is not the current claim's, which is {current}")]
    StaleEpoch {
        /// What was asked for.
        given: Epoch,
        /// What there is.
        current: Epoch,
    },
    /// 409 `state_conflict`
    #[error("state of {tenant} in {workload} is in conflict with the store: {reason}")]
    StateConflict {
        /// The tenant.
        tenant: TenantId,
        /// The workload.
        workload: WorkloadId,
        /// How.
        reason: String,
    },
    /// 409 `not_in_conflict`
    #[error("state of {tenant} in {workload} is in no conflict with the store: there is nothing to decide")]
    NotInConflict {
        /// The tenant.
        tenant: TenantId,
        /// The workload.
        workload: WorkloadId,
    },
    /// 409 `claimed`
    #[error("tenant {tenant} has a claim of workload {workload}: release it first")]
    Claimed {
        /// The tenant.
        tenant: TenantId,
        /// The workload.
        workload: WorkloadId,
    },
    /// 409 `claimed_elsewhere`
    #[error("tenant {tenant} has a claim of workload {workload} on server {server}")]
    ClaimedElsewhere {
        /// The tenant.
        tenant: TenantId,
        /// The workload.
        workload: WorkloadId,
        /// The other server's identity.
        server: String,
    },
    /// 409 `state_not_saved`
    #[error(
        "state of {tenant} in {workload} is not saved yet ({reason}); it is tried again and again: wait until \
         `status` shows no claim"
    )]
    StateNotSaved {
        /// The tenant.
        tenant: TenantId,
        /// The workload.
        workload: WorkloadId,
        /// Why.
        reason: String,
        /// When to try again.
        retry_after_ms: u64,
    },
    /// 409 `state_exists`
    #[error("tenant {tenant} has state of workload {workload} already: only a new tenant can be a fork")]
    StateExists {
        /// The tenant.
        tenant: TenantId,
        /// The workload.
        workload: WorkloadId,
    },
    /// 404 `unknown_snapshot`
    #[error("{problem}")]
    UnknownSnapshot {
        /// Which snapshots there are.
        problem: String,
    },
    /// 409 `being_erased`
    #[error("tenant {tenant} is being erased")]
    BeingErased {
        /// The tenant.
        tenant: TenantId,
        /// When to try again.
        retry_after_ms: u64,
    },
    /// 422 `invalid_field`
    #[error("{field}: {problem}")]
    Invalid {
        /// The field's path in the body.
        field: String,
        /// What is wrong, and what is allowed.
        problem: String,
    },
    /// 403, with the script's code
    #[error("rejected: {message}")]
    Rejected {
        /// The script's code.
        code: String,
        /// The script's words.
        message: String,
    },
    /// 429 `retry_after`
    #[error("the workload asks to try again later")]
    RetryAfter {
        /// How long.
        ms: u64,
    },
    /// 500 `hook_failed`
    #[error("hook {hook} failed ({id})")]
    HookFailed {
        /// The hook.
        hook: &'static str,
        /// Under which the log has the details.
        id: String,
    },
    /// 503 `pool_exhausted`
    #[error("no slot of workload {workload} is free: {reason}")]
    PoolExhausted {
        /// The workload.
        workload: WorkloadId,
        /// Why: at capacity, or what keeps new slots from being made.
        reason: String,
        /// When to try again.
        retry_after_ms: u64,
    },
    /// 503 `store_unavailable`
    #[error("the store cannot be asked for the tenant's state: {reason}")]
    StoreUnavailable {
        /// Why.
        reason: String,
        /// When to try again.
        retry_after_ms: u64,
    },
    /// 503 `store_owned_elsewhere`
    #[error("this server may not use the store: {reason}")]
    StoreOwnedElsewhere {
        /// Whose it is, since when, and what to do.
        reason: String,
        /// When to try again.
        retry_after_ms: u64,
    },
    /// 422 `state_over_limit`
    #[error("the tenant's state is not saved: {reason}")]
    StateOverLimit {
        /// Which limit of the workload, and what the state has.
        reason: String,
    },
    /// 500 `state_damaged`
    #[error("the tenant's state cannot be used: {reason}")]
    StateDamaged {
        /// Why.
        reason: String,
    },
    /// 500 `state_sealed`
    #[error("the tenant's state cannot be opened: {reason}")]
    StateSealed {
        /// Which key it needs.
        reason: String,
    },
    /// 503 `runtime_unavailable`
    #[error("the container engine failed: {reason}")]
    Runtime {
        /// Why.
        reason: String,
        /// When to try again.
        retry_after_ms: u64,
    },
    /// 422 `no_master_key`
    #[error("stored secrets need a master key: set BOILERHOUSE_MASTER_KEY_FILE")]
    NoMasterKey,
    /// 404 `unknown_secret`
    #[error("the tenant has no secret {name:?}")]
    UnknownSecret {
        /// The name asked for.
        name: String,
    },
    /// 500 `activation_failed`
    #[error("the workload could not be activated: {reason}")]
    ActivationFailed {
        /// Why.
        reason: String,
    },
    /// 503 `busy`
    #[error("another request for this tenant and workload is being carried out")]
    Busy {
        /// When to try again.
        retry_after_ms: u64,
    },
    /// 503 `starting`
    #[error("the server is still taking over what survived its restart")]
    Starting {
        /// When to try again.
        retry_after_ms: u64,
    },
    /// 503 `shutting_down`
    #[error("the server is shutting down")]
    ShuttingDown,
    /// 500 `internal`
    #[error("internal error ({id})")]
    Internal {
        /// Under which the log has the details.
        id: String,
    },
}

// === impl ReleaseState ===

impl ReleaseState {
    /// Returns the name used in JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Durable => "durable",
            Self::Pending => "pending",
            Self::Discarded => "discarded",
            Self::NotClaimed => "not_claimed",
        }
    }
}

// === impl OutputAnswer ===

impl Serialize for OutputAnswer {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Output::Plain(value) => value.serialize(serializer),
            Output::Secret(secret) => serializer.serialize_str(&String::from_utf8_lossy(secret.expose())),
        }
    }
}
