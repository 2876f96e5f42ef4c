//! The durable record: SQLite in WAL mode, one writer with group commit.
//!
//! The journal is the truth of *intent*; the engine's labels and the disk are
//! observed truth, and `tenancy` makes them meet at start. Rows are written as
//! they change and read once, at start: no claim waits for a read, except of
//! stored secrets ([`Journal::secrets`]) of a tenant that has some.
//!
//! # Durability
//! A batch with a [`Durability::Hard`] operation is committed with
//! `synchronous=FULL`; a batch of only soft ones with `NORMAL`, which survives
//! kill -9 of the server but not a power loss.

use serde::{Deserialize, Serialize};

use crate::model::{
    ClaimSource, ClaimState, ContainerId, Epoch, Key, Owner, Revision, SlotId, SlotPhase, SnapshotRef,
    SpecHash, StateSource, TenantId, WorkloadId,
};

/// How surely a commit must be on disk before it is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Survives kill -9.
    Soft,
    /// Survives a power loss.
    Hard,
}

/// One change. Operations given together are committed together or not at all.
#[derive(Debug, Clone)]
pub enum Op {
    /// Writes a slot's row.
    PutSlot(SlotRow),
    /// Removes a slot's row.
    DropSlot(SlotId),
    /// Writes a claim's row.
    PutClaim(Box<ClaimRow>),
    /// Removes a claim that never had a side effect.
    DropClaim(Key, Epoch),
    /// Writes what is known of a key's tree.
    PutTree(TreeRow),
    /// Forgets a key's tree (the epoch is kept).
    DropTree(Key),
    /// Writes a tenant's metadata.
    PutTenant(TenantId, serde_json::Map<String, serde_json::Value>),
    /// Writes a sealed secret of a tenant.
    PutSecret(TenantId, String, Vec<u8>),
    /// Removes a secret of a tenant.
    DropSecret(TenantId, String),
    /// Keeps the spec and sources of a revision, as JSON, for claims that outlive a restart.
    PutRevision(Revision, String),
    /// Forgets a revision that no slot or claim refers to.
    DropRevision(Revision),
    /// Writes a fact of the installation, e.g. `boot_id`.
    PutFact(&'static str, String),
}

/// A slot as the journal knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRow {
    /// The slot.
    pub slot: SlotId,
    /// Its pool.
    pub workload: WorkloadId,
    /// The spec it was made from.
    pub spec_hash: SpecHash,
    /// The revision whose spec it was made from.
    pub revision: Revision,
    /// Where it stands.
    pub phase: SlotPhase,
    /// The engine's id, once created.
    pub container: Option<ContainerId>,
    /// The container's name.
    pub name: String,
    /// Its address, if it has one.
    pub address: Option<String>,
    /// Who its program runs as, once created.
    pub run_as: Option<Owner>,
    /// When it was made, milliseconds since the epoch.
    pub created_ms: u64,
}

/// A claim as the journal knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClaimRow {
    /// Whose it is.
    pub key: Key,
    /// Its number.
    pub epoch: Epoch,
    /// Where it stands.
    pub state: ClaimState,
    /// The slot; gone once the claim is dirty or later.
    pub slot: Option<SlotId>,
    /// The revision it runs to its end.
    pub revision: Revision,
    /// Who the program runs as.
    pub run_as: Owner,
    /// Where the slot came from.
    pub source: ClaimSource,
    /// Where the state came from.
    pub state_source: StateSource,
    /// The snapshot it began with, or the newest it has saved.
    pub snapshot: Option<SnapshotRef>,
    /// The nonce of a save that may be under way.
    pub nonce: Option<String>,
    /// Whether the claim failed after the tenant's code may have run.
    pub failed: bool,
    /// The later claim that took over this one's unsaved tree.
    pub superseded_by: Option<Epoch>,
    /// What the request asked for and what it was answered, as JSON of `tenancy`'s own.
    pub detail: serde_json::Value,
    /// When it began, milliseconds since the epoch.
    pub created_ms: u64,
    /// Last sign of use, milliseconds since the epoch.
    pub active_ms: u64,
}

/// What is known of a key's tree on this node. At most one a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeRow {
    /// Whose tree.
    pub key: Key,
    /// The last epoch given out for this key.
    pub epoch: Epoch,
    /// Whether the cache holds a tree (or, while claimed, the slot does).
    pub cached: bool,
    /// The snapshot that equals the cached tree; `None`: the tree is the only copy.
    pub saved: Option<SnapshotRef>,
    /// Who the program ran as.
    pub owner: Option<Owner>,
}

/// Everything that was in the journal at start.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Slots.
    pub slots: Vec<SlotRow>,
    /// Claims that are not clean and superseded ones that are not settled; of clean
    /// ones the newest per key.
    pub claims: Vec<ClaimRow>,
    /// Trees.
    pub trees: Vec<TreeRow>,
    /// Tenants' metadata.
    pub tenants: Vec<(TenantId, serde_json::Map<String, serde_json::Value>)>,
    /// Tenants that have stored secrets.
    pub with_secrets: Vec<TenantId>,
    /// Revisions kept: the revision and its JSON.
    pub revisions: Vec<(Revision, String)>,
    /// Facts of the installation.
    pub facts: std::collections::BTreeMap<String, String>,
}
