//! Slots as directories of this host.
//!
//! ```text
//! state_dir/slots/<slot>/state/      bound into the container
//!           slots/<slot>/owner.json  whose tree it is, written before the tree
//!           slots/<slot>/shell/      the tree's directory of the cache, empty, while it is here
//!           cache/<digest>/tree/     a tree at rest; its root has the recorded mode, owner and time
//!           cache/<digest>/from.json the snapshot it was restored from, until a program may have changed it
//!           staging/                 restores, checkpoints and removals under way
//!           set_aside/               what nobody could account for
//! secrets_dir/<slot>/   socket_dir/<slot>/
//! ```
//! A tree is in the cache *or* moves, entry by entry, between the cache and one
//! slot: `rename(2)`, no bytes, same inodes. When a fill is done its cache
//! directory goes along, so that an absent tree is never taken for an empty one.
//!
//! # Invariants
//! - Unclaimed directories belong to [`UNCLAIMED`], which no container runs as.
//! - The owner of a slot's state directory says where a fill or capture stands:
//!   handing over is a fill's last step and taking back is a capture's last.
//! - Of what a crash in the middle of a move may change, there is only the
//!   modification time of the root directory itself.
//!
//! File work runs on few blocking threads (`workers`); a move of at most eight
//! entries is done where it is asked for, for it is faster
//! than handing it over.

mod checkpoint;
mod collect;
mod fill;
mod layout;
mod restore;
mod save;
mod script_file;
mod secrets;
mod slot;
mod staging;
mod workers;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use tokio::sync::Semaphore;

use crate::{
    clock::SharedClock,
    disk,
    model::{Key, Owner, Secret, SlotId, SnapshotRef, spec::Volumes},
    runtime::plan::Mount,
    store::SharedStore,
};

use super::{
    Captured, CheckpointId, Error, FileAction, FileAnswer, Fill, FillFrom, Filled, Save, Saved, SlotFiles,
    Survey, snapshot,
};
pub(super) use secrets::is_secret_name;

use checkpoint::Checkpoints;
use fill::Length;
use layout::Layout;
use staging::LiveStaging;
use workers::{Lane, Workers};

/// Owns the directories of slots that are not claimed; no container may run as it.
pub const UNCLAIMED: Owner = Owner { uid: 900_000, gid: 900_000 };

/// Each object is at most 16 MiB as stored, and 9 MiB more decompressed.
const FETCHES: usize = 16;
/// Moves of at most this many entries do not change threads.
const INLINE_ENTRIES: usize = 8;

/// Where everything is on this host. Each is made when absent.
#[derive(Debug, Clone)]
pub struct HostDirs {
    /// Slots' state, the cache, staging and what is set aside: one file system.
    pub state_dir: PathBuf,
    /// Slots' secrets; better a tmpfs.
    pub secrets_dir: PathBuf,
    /// Slots' comm directories.
    pub socket_dir: PathBuf,
}

/// Carries state and secrets through directories of this host. Clones share one.
#[derive(Clone)]
pub struct HostFiles {
    inner: Arc<Inner>,
    // Not in `Inner`, which each checkpoint's directory refers to.
    checkpoints: Arc<Checkpoints>,
}

struct Inner {
    layout: Layout,
    store: SharedStore,
    clock: SharedClock,
    workers: Workers,
    live_staging: LiveStaging,
    /// Objects of restores in memory, of all claims together.
    fetches: Arc<Semaphore>,
}

// === impl HostFiles ===

impl HostFiles {
    /// Makes the layout, locks the state directory against a second server, and
    /// proves what the rest relies on: one file system, `openat2`, and the right
    /// to give files away. Waits up to two seconds for the lock. Nothing of the
    /// store is asked here.
    ///
    /// # Errors
    /// [`Error::Disk`] names the directory and what it cannot do.
    pub fn open(dirs: HostDirs, store: SharedStore, clock: SharedClock) -> Result<Self, Error> {
        let layout = Layout::open(&dirs, clock.as_ref())?;
        let inner = Inner {
            layout,
            store,
            clock,
            workers: Workers::new(),
            live_staging: LiveStaging::default(),
            fetches: Arc::new(Semaphore::new(FETCHES)),
        };
        Ok(Self { inner: Arc::new(inner), checkpoints: Arc::default() })
    }

    /// Returns what works but should be better, for the log: secrets that could come
    /// to lie on a disk.
    pub fn warnings(&self) -> Vec<String> {
        self.inner.layout.warnings()
    }

    /// Runs file work on a blocking thread of `lane`.
    async fn run<T: Send + 'static>(
        &self,
        lane: Lane,
        work: impl FnOnce(&Arc<Inner>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.inner);
        self.inner.workers.run(lane, move || work(&inner)).await
    }
}

impl std::fmt::Debug for HostFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostFiles").field("layout", &self.inner.layout).finish_non_exhaustive()
    }
}

#[async_trait]
impl SlotFiles for HostFiles {
    async fn prepare(&self, slot: &SlotId, volumes: &Volumes) -> Result<Vec<Mount>, Error> {
        self.inner.prepare(slot, volumes)
    }

    async fn newest(&self, key: &Key) -> Result<Option<SnapshotRef>, Error> {
        let key_digest = key.digest();
        let newest = snapshot::newest_record(self.inner.store.as_ref(), key, &key_digest).await?;
        Ok(newest.map(|record| record.snapshot(&key_digest)))
    }

    async fn fill(&self, fill: &Fill) -> Result<Filled, Error> {
        let mut filled = Filled::default();
        if let FillFrom::Snapshot(snapshot) = &fill.from {
            filled = Filled { files: snapshot.files, bytes: snapshot.bytes, ..filled };
            if !self.inner.is_restored(fill, snapshot)? {
                filled.fetched_bytes = self.restore(fill, snapshot).await?;
            }
        }
        filled.entries = match self.inner.length_of_fill(fill)? {
            Length::Short => self.inner.fill(fill)?,
            length => {
                let (lane, fill) = (length.lane(), fill.clone());
                self.run(lane, move |inner| inner.fill(&fill)).await?
            }
        };
        Ok(filled)
    }

    async fn put_secrets(
        &self,
        slot: &SlotId,
        run_as: Owner,
        files: &BTreeMap<String, Secret>,
    ) -> Result<(), Error> {
        self.inner.put_secrets(slot, run_as, files)
    }

    async fn capture(&self, slot: &SlotId, key: &Key) -> Result<Captured, Error> {
        if self.inner.is_short_capture(slot)? {
            return self.inner.capture(slot, key);
        }
        let (slot, key) = (slot.clone(), key.clone());
        self.run(Lane::Move, move |inner| inner.capture(&slot, &key)).await
    }

    async fn copy_live(&self, slot: &SlotId, key: &Key) -> Result<CheckpointId, Error> {
        self.begin_checkpoint(slot, key).await
    }

    async fn copy_paused(&self, checkpoint: &CheckpointId) -> Result<(), Error> {
        self.freeze_checkpoint(checkpoint).await
    }

    async fn drop_checkpoint(&self, checkpoint: &CheckpointId) -> Result<(), Error> {
        self.end_checkpoint(checkpoint).await
    }

    async fn save(&self, save: &Save) -> Result<Saved, Error> {
        self.save_tree(save).await
    }

    async fn discard(&self, key: &Key) -> Result<(), Error> {
        let key = key.clone();
        self.run(Lane::Bulk, move |inner| inner.discard(&key)).await
    }

    async fn wipe(&self, slot: &SlotId) -> Result<(), Error> {
        let slot = slot.clone();
        self.run(Lane::Bulk, move |inner| inner.wipe(&slot)).await
    }

    async fn discard_slot_state(&self, slot: &SlotId) -> Result<(), Error> {
        let slot = slot.clone();
        self.run(Lane::Bulk, move |inner| inner.discard_slot_state(&slot)).await
    }

    async fn set_aside_cached(&self, digest: &str, reason: &str) -> Result<String, Error> {
        self.inner.set_cached_aside(digest, reason)
    }

    async fn set_aside(&self, slot: &SlotId, reason: &str) -> Result<String, Error> {
        self.inner.set_aside(slot, reason)
    }

    async fn survey(&self) -> Result<Survey, Error> {
        self.run(Lane::Bulk, Inner::survey).await
    }

    async fn last_change_ms(&self, slot: &SlotId) -> Result<Option<u64>, Error> {
        let slot = slot.clone();
        self.run(Lane::Bulk, move |inner| inner.last_change_ms(&slot)).await
    }

    async fn state_file(
        &self,
        slot: &SlotId,
        run_as: Owner,
        action: FileAction,
    ) -> Result<FileAnswer, Error> {
        let slot = slot.clone();
        let lane = if matches!(action, FileAction::Remove(_)) { Lane::Bulk } else { Lane::Move };
        self.run(lane, move |inner| inner.state_file(&slot, run_as, action)).await
    }

    fn comm_path(&self, slot: &SlotId) -> Option<String> {
        self.inner.layout.comm_path(slot)
    }
}

// === impl Error ===

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Self {
        Self::Disk { operation: error.operation, path: error.path, source: error.source }
    }
}

impl Error {
    /// Names what a listing broke: the disk, or a limit of this key's tree.
    fn of_list(key: &Key, error: disk::ListError) -> Self {
        match error {
            disk::ListError::Disk(error) => error.into(),
            disk::ListError::Limit(reason) => Self::Limit { key: key.clone(), reason },
        }
    }
}
