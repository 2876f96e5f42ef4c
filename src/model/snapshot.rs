//! A reference to one saved version of a state directory.

use serde::{Deserialize, Serialize};

use super::id::Epoch;

/// Names one snapshot in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRef {
    /// The number of its record; rising for ever per key.
    pub number: u64,
    /// The claim that wrote it.
    pub epoch: Epoch,
    /// The attempt that wrote it.
    pub nonce: String,
    /// The object that holds its manifest.
    pub manifest: String,
    /// When it was saved, milliseconds since the epoch.
    pub created_ms: u64,
    /// Regular files in it.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}
