//! The pure vocabulary: ids, specs, slot phases, claim states, manifests.
//!
//! Nothing here does I/O. What a type holds has been checked when it was made.

pub mod claim;
pub mod id;
pub mod secret;
pub mod slot;
pub mod snapshot;
pub mod spec;
pub mod suggest;

pub use claim::{ClaimSource, ClaimState, StateSource};
pub use id::{ContainerId, Epoch, Key, Owner, Revision, SlotId, SpecHash, TenantId, WorkloadId};
pub use secret::Secret;
pub use slot::SlotPhase;
pub use snapshot::SnapshotRef;
pub use spec::{Violation, WorkloadSpec};
