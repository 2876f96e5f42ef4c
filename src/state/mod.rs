//! State of tenants: how it gets into a slot, out of it, and into the store.
//!
//! [`SlotFiles`] is a port, because a slot is not always a directory of this
//! host: here [`host::HostFiles`] moves trees between slot directories, the
//! node's cache and the store; in a Pod a sidecar would do the same.
//!
//! One tree of one [`Key`] is at any time the union of its entries in the cache
//! and in at most one slot. Fill and capture move entries one way each and may
//! be repeated after a crash until they are done.
//!
//! # Guarantees
//! - P3: [`SlotFiles::newest`] answers `None` only when the store proved it.
//! - P2: nothing here deletes a tree that [`SlotFiles::save`] has not reported saved,
//!   except [`SlotFiles::discard`], whose caller vouches for it.
//! - P12: every walk is confined below its directory; links are data.

pub mod fake;
pub mod fence;
pub mod history;
pub mod host;
mod mirror;
mod snapshot;
pub mod transfer;

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;

use crate::{
    model::{
        Epoch, Key, Owner, Secret, SlotId, SnapshotRef, TenantId,
        spec::{Persist, Volumes},
    },
    runtime::plan::Mount,
    store,
};

pub use snapshot::Encryption;

/// Shares the port between components.
pub type SharedFiles = Arc<dyn SlotFiles>;

/// Carries state and secrets into slots and out of them.
#[async_trait]
pub trait SlotFiles: Send + Sync + 'static {
    /// Makes the slot's empty directories, one for each volume that the spec has; says
    /// what to mount where. May be repeated. Without a state volume, fill and capture
    /// leave the cache as it is.
    async fn prepare(&self, slot: &SlotId, volumes: &Volumes) -> Result<Vec<Mount>, Error>;

    /// Asks the store for the newest snapshot; `None` is proof that there is none.
    async fn newest(&self, key: &Key) -> Result<Option<SnapshotRef>, Error>;

    /// Reads the newest record of a key's chain; `None` is proof that there is none.
    async fn head(&self, key: &Key) -> Result<Option<Head>, Error>;

    /// Writes that a claim began, as the very next record, and reads it back. The same
    /// nonce may be tried again. [`Error::Fenced`]: anybody was faster; nothing of this
    /// claim may run.
    async fn open(&self, open: &Open) -> Result<(), Error>;

    /// Writes that a claim ended and left nothing to save. A claim that is fenced, or of
    /// which nothing is open, has ended.
    async fn close(&self, close: &Close) -> Result<(), Error>;

    /// Brings what a fill needs from the store to this node, without touching the slot;
    /// [`SlotFiles::fill`] finds it. Answers how many bytes came.
    async fn fetch(&self, fill: &Fill) -> Result<u64, Error>;

    /// Puts a tree into a slot and, last of all, hands the directories to `run_as`: no
    /// program can write there before everything is in place.
    async fn fill(&self, fill: &Fill) -> Result<Filled, Error>;

    /// Writes secrets into a slot, one file each, 0400 of `run_as`; a file that is
    /// there already is replaced atomically.
    async fn put_secrets(
        &self,
        slot: &SlotId,
        run_as: Owner,
        files: &BTreeMap<String, Secret>,
    ) -> Result<(), Error>;

    /// Moves the slot's tree into the node's cache. The container must be gone or
    /// paused. May be repeated after a crash, with the same answer.
    async fn capture(&self, slot: &SlotId, key: &Key) -> Result<Captured, Error>;

    /// First half of a checkpoint: copies the live tree aside; the container runs.
    async fn copy_live(&self, slot: &SlotId, key: &Key) -> Result<CheckpointId, Error>;

    /// Second half: copies what changed since. The container is paused; no store call.
    async fn copy_paused(&self, checkpoint: &CheckpointId) -> Result<(), Error>;

    /// Throws a checkpoint's copy away. Gone is success.
    async fn drop_checkpoint(&self, checkpoint: &CheckpointId) -> Result<(), Error>;

    /// Saves a tree as the newest snapshot: data first, then the record, read back.
    /// Repeating a call with the same nonce commits at most once; a nonce stands for
    /// one version of a tree. Cancel-safe: a dropped call has either committed or
    /// not, and a repetition finds out.
    async fn save(&self, save: &Save) -> Result<Saved, Error>;

    /// Removes a cached tree; the caller knows that the store has it or that it is not wanted.
    async fn discard(&self, key: &Key) -> Result<(), Error>;

    /// Brings a snapshot from the store into the cache, verified, ahead of any claim; the
    /// next [`SlotFiles::fill`] takes it from there. Its files stay the owner's that saved
    /// them, and that owner is answered.
    ///
    /// # Cancel safety
    /// Dropped, the tree is in the cache, whole, or it is not: the caller discards it.
    async fn prefetch(&self, key: &Key, snapshot: &SnapshotRef) -> Result<Prefetched, Error>;

    /// Takes a tree out of the cache, whose room [`SlotFiles::remove_evicted`] gives back;
    /// the caller knows that the store has it. Takes no longer for a large tree. Absent is
    /// success; after an error the tree is still there.
    async fn evict(&self, key: &Key) -> Result<(), Error>;

    /// Removes what was evicted; what a crash leaves of it goes with the next survey.
    async fn remove_evicted(&self) -> Result<(), Error>;

    /// Adds up what a cached tree takes on this node; `None` when there is none. Walks it.
    async fn cached_bytes(&self, key: &Key) -> Result<Option<u64>, Error>;

    /// Returns the room that is left where cached trees are, in bytes.
    fn free_bytes(&self) -> Result<u64, Error>;

    /// Removes a slot's directories with its secrets and comm files. Refuses with
    /// [`Error::NotEmpty`] while the state directory holds anything.
    async fn wipe(&self, slot: &SlotId) -> Result<(), Error>;

    /// Empties a slot's state directory on purpose (`persist.on_release: false`).
    async fn discard_slot_state(&self, slot: &SlotId) -> Result<(), Error>;

    /// Moves a slot's non-empty state directory out of the way, with a note of
    /// whose it is as far as known; answers where it is now.
    async fn set_aside(&self, slot: &SlotId, reason: &str) -> Result<String, Error>;

    /// Moves a cached tree that no row knows out of the way; answers where it is now.
    async fn set_aside_cached(&self, digest: &str, reason: &str) -> Result<String, Error>;

    /// Removes a tenant's copies that were set aside, from slots by their notes and from
    /// the cache by these keys; answers where they were. May be repeated.
    async fn remove_set_aside(&self, tenant: &TenantId, keys: &[Key]) -> Result<Vec<String>, Error>;

    /// Lists what is there, for adopting after a restart; removes left-over staging.
    async fn survey(&self) -> Result<Survey, Error>;

    /// Returns when anything below the slot's state directory last changed, in
    /// milliseconds since the epoch, as far as a bounded walk can tell; `None` when
    /// it has no state directory.
    async fn last_change_ms(&self, slot: &SlotId) -> Result<Option<u64>, Error>;

    /// Acts on one file of a slot's state directory, for scripts; confined.
    async fn state_file(&self, slot: &SlotId, run_as: Owner, action: FileAction)
    -> Result<FileAnswer, Error>;

    /// Returns where the slot's comm directory is on this host, for clients beside us.
    fn comm_path(&self, slot: &SlotId) -> Option<String>;
}

/// The newest record of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its number.
    pub number: u64,
    /// Who wrote it, and whose claim is open.
    pub link: fence::Link,
    /// The newest tree; none: there is none yet.
    pub snapshot: Option<SnapshotRef>,
}

/// A claim that begins.
#[derive(Debug, Clone)]
pub struct Open {
    /// Whose.
    pub key: Key,
    /// The claim.
    pub epoch: Epoch,
    /// Names this attempt for ever; journaled by the caller before the first call.
    pub nonce: String,
    /// Who claims.
    pub author: fence::Author,
    /// The newest record's number when the claim was decided; 0: there was none.
    pub on_top_of: u64,
    /// The attempt that wrote the newest tree when the claim was decided.
    pub tree: Option<String>,
    /// The attempt to save this node's own tree that may end meanwhile.
    pub saving: Option<String>,
}

/// A claim that ended with nothing to save.
#[derive(Debug, Clone)]
pub struct Close {
    /// Whose.
    pub key: Key,
    /// The claim.
    pub epoch: Epoch,
    /// Names this attempt for ever; journaled by the caller before the first call.
    pub nonce: String,
    /// Who claimed.
    pub author: fence::Author,
    /// Whether the store had a record of this key: when it has none any more, nothing is open.
    pub has_chain: bool,
}

/// What to put into a slot.
#[derive(Debug, Clone)]
pub struct Fill {
    /// The slot.
    pub slot: SlotId,
    /// Whose state.
    pub key: Key,
    /// The claim; goes into the slot's `owner.json`.
    pub epoch: Epoch,
    /// Where from.
    pub from: FillFrom,
    /// Who the program runs as.
    pub run_as: Owner,
    /// Who it ran as when the tree was last on this node: entries of that owner become `run_as`'s.
    pub previous_owner: Option<Owner>,
}

/// Where a tree comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FillFrom {
    /// It is proven that there is none.
    Empty,
    /// The node's cache.
    Cache,
    /// The store.
    Snapshot(SnapshotRef),
}

/// What a fill did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filled {
    /// Top-level entries moved in.
    pub entries: u64,
    /// Bytes fetched from the store.
    pub fetched_bytes: u64,
    /// Regular files, when known without a walk.
    pub files: u64,
    /// Their bytes, when known without a walk.
    pub bytes: u64,
}

/// What a capture found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Captured {
    /// Whether the slot's fill had come to its end: only then the tree is whole, and
    /// only then a program can have written to it. Says nothing for a tree that was
    /// filled from the cache, which is whole in any case.
    pub handed_over: bool,
    /// Whether the tenant's tree is in the cache now. It is not when there was none to
    /// capture, or when somebody removed it from the disk.
    pub is_cached: bool,
}

/// What a prefetch did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetched {
    /// Bytes fetched from the store.
    pub fetched_bytes: u64,
    /// Who the program ran as that saved the tree.
    pub owner: Owner,
}

/// Names the copy of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointId(pub String);

/// What to save.
#[derive(Debug, Clone)]
pub struct Save {
    /// Whose state.
    pub key: Key,
    /// The claim; a store that knows a later one fences this save.
    pub epoch: Epoch,
    /// Names this attempt for ever; journaled by the caller before the first call.
    pub nonce: String,
    /// Which tree.
    pub tree: SaveTree,
    /// Who the program ran as.
    pub run_as: Owner,
    /// Whether the claim that left the tree failed.
    pub failed_claim: bool,
    /// Who claimed.
    pub author: fence::Author,
    /// Whether the claim has ended: nobody holds the key after this.
    pub is_last: bool,
    /// Excludes and retention.
    pub persist: Persist,
    /// The most bytes of files allowed.
    pub max_bytes: Option<u64>,
    /// What it may come after.
    pub base: Base,
}

/// What a save may come after.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Base {
    /// Whatever the fence allows, also nothing.
    #[default]
    Any,
    /// Whatever the fence allows. The store had a record of this key: when it has none any
    /// more it lost the key's history, and a new one would hide that.
    Chain,
    /// The record of this number and no other, whoever wrote it; 0: none. An operator has
    /// decided that this tree replaces that one's, as it is: a tree that a power loss may
    /// have torn is not compared with the store.
    Decided(u64),
}

/// Which tree is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SaveTree {
    /// The cached one, after a capture.
    Cache,
    /// A checkpoint's copy.
    Checkpoint(CheckpointId),
}

/// What a save did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The snapshot, in the store and read back.
    pub snapshot: SnapshotRef,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Sockets, FIFOs and devices that were skipped.
    pub skipped: u64,
}

/// What is on this node's disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Slot directories, and whether their state directory holds anything.
    pub slots: Vec<(SlotId, bool)>,
    /// [`Key::digest`]s of cached trees.
    pub cached: Vec<String>,
}

/// An action on one file of a state directory; paths are relative to it.
#[derive(Debug, Clone)]
pub enum FileAction {
    /// Reads a regular file of at most this many bytes.
    Read(String, usize),
    /// Writes a file, making its parent directories.
    Write(String, Secret),
    /// Lists a directory's names, sorted, at most 10 000.
    List(String),
    /// Asks whether something is there (a link counts, followed or not).
    Exists(String),
    /// Removes a file, a link or a directory with what is in it. Absent is success.
    Remove(String),
}

/// The answer to a [`FileAction`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileAnswer {
    /// Of `Read`.
    Bytes(Vec<u8>),
    /// Of `List`; names that are not UTF-8 are shown with replacement characters.
    Names(Vec<String>),
    /// Of `Exists`.
    There(bool),
    /// Of `Write` and `Remove`.
    Done,
}

/// Says what to do about a call that did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The store could not do it now: keep the data, try again.
    #[error("state of {key} cannot be exchanged with the store")]
    Store {
        /// Whose state.
        key: Key,
        /// Why.
        #[source]
        source: store::Error,
    },
    /// The store has a later epoch: never try again; the tree is kept.
    #[error("state of {key} is fenced: the store is at epoch {newest}, this claim is {own}")]
    Fenced {
        /// Whose state.
        key: Key,
        /// The claim that wanted to save.
        own: Epoch,
        /// The newest record's.
        newest: Epoch,
    },
    /// What the store holds is damaged or not ours; an operator must act.
    #[error("snapshot of {key} is damaged: {reason}")]
    Damaged {
        /// Whose state.
        key: Key,
        /// Which object and how.
        reason: String,
    },
    /// What the store holds is sealed with a master key that is not here; an operator must act.
    #[error("state of {key} cannot be opened: {reason}")]
    Sealed {
        /// Whose state.
        key: Key,
        /// Which object, which key it needs and which is here.
        reason: String,
    },
    /// A power loss took content of files that their program had changed, too: nothing here
    /// tells what they should be. Never try again; the tree is kept, and an operator decides.
    #[error("state of {key} was torn by a power loss: {reason}")]
    Torn {
        /// Whose state.
        key: Key,
        /// Which file.
        reason: String,
    },
    /// The tree breaks a limit; it is kept, and saved when the limit is raised or the tree shrinks.
    #[error("state of {key} is over a limit: {reason}")]
    Limit {
        /// Whose state.
        key: Key,
        /// Which limit, and what the tree has.
        reason: String,
    },
    /// The state directory is not empty, and was about to be removed.
    #[error("state directory of slot {slot} is not empty")]
    NotEmpty {
        /// The slot.
        slot: SlotId,
    },
    /// A script asked for a path that is not allowed, absent, too large or not of the kind it needs.
    #[error("{path:?}: {reason}")]
    File {
        /// The path, as the script gave it.
        path: String,
        /// Why.
        reason: String,
    },
    /// The host's disk does not do it.
    #[error("{operation} {path}")]
    Disk {
        /// The operation.
        operation: &'static str,
        /// Where.
        path: String,
        /// Why.
        #[source]
        source: Arc<std::io::Error>,
    },
}
