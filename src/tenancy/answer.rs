//! Builds what requests are answered with.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    ClaimAnswer, ClaimStatus, ContainerAnswer, Endpoints, Error, Inner, OutputAnswer, ReleaseAnswer,
    ReleaseState, StateAnswer, TenantStatus, WorkloadStatus,
    registry::{Detail, Live, SaveOutcome},
};
pub(super) use crate::telemetry::chain;
use crate::{
    journal::ClaimRow,
    model::{ClaimSource, Epoch, Key, Secret, StateSource, TenantId},
    script::{Hook, Output, Workload},
};

/// Returns a duration in milliseconds, to the microsecond.
pub(super) fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

pub(super) fn source_name(source: ClaimSource) -> &'static str {
    match source {
        ClaimSource::Existing => "existing",
        ClaimSource::Parked => "parked",
        ClaimSource::Warm => "warm",
        ClaimSource::Cold => "cold",
    }
}

pub(super) fn state_source_name(source: StateSource) -> &'static str {
    match source {
        StateSource::None => "none",
        StateSource::Cache => "cache",
        StateSource::Store => "store",
    }
}

pub(super) fn release(key: &Key, epoch: Option<Epoch>, reason: Option<String>) -> ReleaseAnswer {
    ReleaseAnswer {
        tenant: key.tenant.clone(),
        workload: key.workload.clone(),
        state: ReleaseState::Pending,
        epoch,
        snapshot: None,
        reason,
    }
}

pub(super) fn workload_status(workload: &Arc<Workload>) -> WorkloadStatus {
    WorkloadStatus {
        id: workload.spec.id.clone(),
        name: workload.spec.name.clone(),
        revision: workload.revision.clone(),
        spec_hash: workload.spec_hash.to_string(),
        hooks: workload.hooks().map(Hook::name).collect(),
        spec: serde_json::to_value(&*workload.spec).expect("a spec has only text keys"),
    }
}

// === impl Inner ===

impl Inner {
    pub(super) fn answer(
        &self,
        live: &Live,
        detail: &Detail,
        outputs: BTreeMap<String, Output>,
    ) -> ClaimAnswer {
        let row = live.row();
        let spec = &live.workload.spec;
        let ports = spec.ports.iter().map(|(name, port)| {
            let place =
                live.made.address.as_ref().map_or_else(|| port.to_string(), |host| format!("{host}:{port}"));
            (name.clone(), place)
        });
        ClaimAnswer {
            tenant: row.key.tenant,
            workload: row.key.workload,
            epoch: row.epoch,
            source: row.source,
            slot: live.slot.clone(),
            revision: row.revision,
            container: ContainerAnswer {
                id: live.made.container.to_string(),
                name: live.made.name.clone(),
                address: live.made.address.clone(),
            },
            endpoints: Endpoints {
                comm: spec.volumes.comm.as_ref().and_then(|_| self.parts.files.comm_path(&live.slot)),
                ports: ports.collect(),
            },
            state: StateAnswer {
                source: row.state_source,
                snapshot: row.snapshot.map(|snapshot| snapshot.number),
                bytes: detail.bytes,
                files: detail.files,
            },
            outputs: outputs.into_iter().map(|(name, output)| (name, OutputAnswer(output))).collect(),
            timings_ms: BTreeMap::new(),
        }
    }

    /// Answers for a claim that was adopted after a restart.
    pub(super) fn rebuilt_answer(&self, live: &Live) -> ClaimAnswer {
        let detail: Detail = serde_json::from_value(live.row().detail).unwrap_or_default();
        let mut outputs: BTreeMap<_, _> =
            detail.outputs.iter().map(|(name, value)| (name.clone(), Output::Plain(value.clone()))).collect();
        for (name, sealed) in &detail.sealed_outputs {
            if let Some(secret) = self.open_output(&live.row().key, name, sealed) {
                outputs.insert(name.clone(), Output::Secret(secret));
            }
        }
        let answer = self.answer(live, &detail, outputs);
        live.set_answer(answer.clone());
        answer
    }

    /// Puts a claim's outputs into its journaled detail: secrets sealed, or left out
    /// when there is no master key (they are then gone after a restart).
    pub(super) fn keep_outputs(&self, key: &Key, detail: &mut Detail, outputs: &BTreeMap<String, Output>) {
        for (name, output) in outputs {
            match output {
                Output::Plain(value) => {
                    detail.outputs.insert(name.clone(), value.clone());
                }
                Output::Secret(secret) => {
                    if let Some(sealed) = self.seal_output(key, name, secret) {
                        detail.sealed_outputs.insert(name.clone(), sealed);
                    }
                }
            }
        }
    }

    fn seal_output(&self, key: &Key, name: &str, secret: &Secret) -> Option<String> {
        let master = self.parts.master_key.as_ref()?;
        Some(hex::encode(master.seal(&output_context(key, name), secret, &*self.parts.clock)))
    }

    fn open_output(&self, key: &Key, name: &str, sealed: &str) -> Option<Secret> {
        let master = self.parts.master_key.as_ref()?;
        master.open(&output_context(key, name), &hex::decode(sealed).ok()?).ok()
    }

    pub(super) fn status(&self, tenant: TenantId) -> TenantStatus {
        let mut claims = Vec::new();
        for entry in self.entries.iter().filter(|entry| entry.key().tenant == tenant) {
            if let Some(live) = entry.live() {
                claims.push(claim_status(live.row(), None));
            }
            for unsaved in entry.unsaved() {
                let last_error = match &*unsaved.outcome.borrow() {
                    SaveOutcome::Retrying(reason) | SaveOutcome::Conflict(reason) => Some(reason.clone()),
                    SaveOutcome::Saving | SaveOutcome::Saved(_) | SaveOutcome::Ended => None,
                };
                claims.push(claim_status(unsaved.row(), last_error));
            }
        }
        claims.sort_by(|a, b| (&a.workload, a.epoch).cmp(&(&b.workload, b.epoch)));
        let snapshots = self
            .trees
            .iter()
            .filter(|tree| tree.key().tenant == tenant)
            .filter_map(|tree| Some((tree.key().workload.clone(), tree.saved.clone()?)))
            .collect();
        TenantStatus { tenant, claims, snapshots }
    }
}

fn output_context(key: &Key, name: &str) -> Vec<u8> {
    format!("output\0{}\0{}\0{name}", key.tenant, key.workload).into_bytes()
}

fn claim_status(row: ClaimRow, last_error: Option<String>) -> ClaimStatus {
    ClaimStatus {
        workload: row.key.workload,
        epoch: row.epoch,
        state: row.state,
        slot: row.slot,
        source: row.source,
        created_ms: row.created_ms,
        active_ms: row.active_ms,
        failed: row.failed,
        superseded_by: row.superseded_by,
        last_error,
    }
}

// === impl Error ===

impl Error {
    /// Returns the stable code of the error, as in the API's answer; a script's own
    /// code counts as `rejected`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownWorkload { .. } => "unknown_workload",
            Self::WorkloadRequired { .. } => "workload_required",
            Self::ClaimDiffers { .. } => "claim_differs",
            Self::NotClaimed { .. } => "not_claimed",
            Self::StaleEpoch { .. } => "stale_epoch",
            Self::StateConflict { .. } => "state_conflict",
            Self::NotInConflict { .. } => "not_in_conflict",
            Self::Claimed { .. } => "claimed",
            Self::ClaimedElsewhere { .. } => "claimed_elsewhere",
            Self::StateNotSaved { .. } => "state_not_saved",
            Self::StateExists { .. } => "state_exists",
            Self::UnknownSnapshot { .. } => "unknown_snapshot",
            Self::BeingErased { .. } => "being_erased",
            Self::Invalid { .. } => "invalid_field",
            Self::Rejected { .. } => "rejected",
            Self::RetryAfter { .. } => "retry_after",
            Self::HookFailed { .. } => "hook_failed",
            Self::PoolExhausted { .. } => "pool_exhausted",
            Self::StoreUnavailable { .. } => "store_unavailable",
            Self::StoreOwnedElsewhere { .. } => "store_owned_elsewhere",
            Self::StateOverLimit { .. } => "state_over_limit",
            Self::StateDamaged { .. } => "state_damaged",
            Self::StateSealed { .. } => "state_sealed",
            Self::Runtime { .. } => "runtime_unavailable",
            Self::NoMasterKey => "no_master_key",
            Self::UnknownSecret { .. } => "unknown_secret",
            Self::ActivationFailed { .. } => "activation_failed",
            Self::Busy { .. } => "busy",
            Self::Starting { .. } => "starting",
            Self::ShuttingDown => "shutting_down",
            Self::Internal { .. } => "internal",
        }
    }
}
