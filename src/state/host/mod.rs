//! Slots as directories of this host.
//!
//! ```text
//! state_dir/slots/<slot>/state/      bound into the container
//!           slots/<slot>/owner.json  whose tree it is, written before the tree
//!           slots/<slot>/shell/      the tree's directory of the cache, empty, while it is here
//!           cache/<digest>/tree/     a tree at rest; its root has the recorded mode, owner and time
//!           cache/<digest>/index     its entries' stats as of the newest snapshot; goes along in the shell
//!           cache/<digest>/synced    the snapshot that is known to be on disk, too
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

mod budget;
mod cache;
mod checkpoint;
mod collect;
mod fill;
mod index;
mod layout;
mod mend;
mod restore;
mod save;
mod script_file;
mod secrets;
mod slot;
mod staging;
mod syncs;
mod workers;

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use crate::{
    clock::{SharedClock, random_hex},
    disk,
    model::{Key, Owner, Secret, SlotId, SnapshotRef, TenantId, spec::Volumes},
    runtime::plan::Mount,
    store::SharedStore,
};
use async_trait::async_trait;

use super::{
    Captured, CheckpointId, Close, Encryption, Error, FileAction, FileAnswer, Fill, FillFrom, Filled, Head,
    Open, Prefetched, Save, Saved, SlotFiles, Survey, snapshot,
};
pub(super) use secrets::is_secret_name;

use budget::Budget;
use checkpoint::Checkpoints;
use fill::Length;
use index::{Moves, Times};
use layout::Layout;
use staging::LiveStaging;
use syncs::Syncs;
use workers::{Lane, Workers};

/// Owns the directories of slots that are not claimed; no container may run as it.
pub const UNCLAIMED: Owner = Owner { uid: 900_000, gid: 900_000 };

/// What objects of all saves may take in memory. More than the open packs of every save
/// that runs and one chunk, so that none waits for another's pack.
const SAVING_BYTES: u64 = 104 << 20;
/// What objects of all restores may take in memory.
const FETCHING_BYTES: u64 = 72 << 20;
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
    encryption: Encryption,
    workers: Workers,
    live_staging: LiveStaging,
    /// What the times of this file system are worth.
    times: Times,
    /// Entries whose ctime our own renames have set.
    moves: Moves,
    /// Trees that are not known to be on disk yet.
    syncs: Arc<Syncs>,
    /// The boot of this host.
    boot: String,
    /// Digests of trees that were in the cache at start.
    left_over: Mutex<HashSet<String>>,
    /// What was taken out of the cache and is not removed yet, by its names in staging.
    evicted: Mutex<Vec<String>>,
    /// Room for objects of saves, of all together.
    saving: Budget,
    /// Room for objects of restores, of all together.
    fetching: Budget,
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
        let encryption = Encryption::off(Arc::clone(&clock));
        Self::open_encrypted(dirs, store, clock, encryption)
    }

    /// As [`HostFiles::open`], with the keys that what the store holds is sealed with.
    ///
    /// # Errors
    /// As there.
    pub fn open_encrypted(
        dirs: HostDirs,
        store: SharedStore,
        clock: SharedClock,
        encryption: Encryption,
    ) -> Result<Self, Error> {
        Self::open_in_boot(dirs, store, clock, encryption, &current_boot()?)
    }

    /// As [`HostFiles::open_encrypted`], in a boot of the host that has this id: a tree
    /// that another boot left unsynced is not trusted before it is compared with the store.
    ///
    /// # Errors
    /// As [`HostFiles::open`].
    pub fn open_in_boot(
        dirs: HostDirs,
        store: SharedStore,
        clock: SharedClock,
        encryption: Encryption,
        boot: &str,
    ) -> Result<Self, Error> {
        let layout = Layout::open(&dirs, clock.as_ref())?;
        let probe = format!(".times-{}", random_hex(clock.as_ref(), 8));
        let cached = layout.cache.names(usize::MAX)?;
        let inner = Inner {
            left_over: Mutex::new(
                cached.into_iter().filter_map(|name| String::from_utf8(name).ok()).collect(),
            ),
            times: Times::of(&layout.staging, probe.as_bytes())?,
            moves: Moves::default(),
            syncs: Arc::default(),
            boot: boot.to_owned(),
            layout,
            store,
            clock,
            encryption,
            workers: Workers::new(),
            live_staging: LiveStaging::default(),
            evicted: Mutex::default(),
            saving: Budget::new(SAVING_BYTES),
            fetching: Budget::new(FETCHING_BYTES),
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

/// Returns the id that the kernel gave to this boot.
fn current_boot() -> Result<String, Error> {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    let read = std::fs::read_to_string(BOOT_ID).map_err(|error| disk::Error::new("read", BOOT_ID, error));
    Ok(read?.trim().to_owned())
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
        Ok(newest.and_then(|record| record.snapshot(&key_digest)))
    }

    async fn head(&self, key: &Key) -> Result<Option<Head>, Error> {
        let key_digest = key.digest();
        let newest = snapshot::newest_record(self.inner.store.as_ref(), key, &key_digest).await?;
        Ok(newest.map(|record| Head {
            number: record.number,
            link: record.link(),
            snapshot: record.snapshot(&key_digest),
        }))
    }

    async fn open(&self, open: &Open) -> Result<(), Error> {
        let turn = snapshot::Turn {
            key: &open.key,
            key_digest: &open.key.digest(),
            epoch: open.epoch,
            nonce: &open.nonce,
            author: &open.author,
            created_ms: self.inner.clock.unix_ms(),
        };
        let trees = (open.tree.as_deref(), open.saving.as_deref());
        snapshot::open(self.inner.store.as_ref(), &turn, open.on_top_of, trees).await.map(|_| ())
    }

    async fn close(&self, close: &Close) -> Result<(), Error> {
        let turn = snapshot::Turn {
            key: &close.key,
            key_digest: &close.key.digest(),
            epoch: close.epoch,
            nonce: &close.nonce,
            author: &close.author,
            created_ms: self.inner.clock.unix_ms(),
        };
        snapshot::close(self.inner.store.as_ref(), &turn, close.has_chain).await
    }

    async fn fetch(&self, fill: &Fill) -> Result<u64, Error> {
        match &fill.from {
            FillFrom::Snapshot(snapshot) if !self.inner.is_restored(fill, snapshot)? => {
                self.restore(fill, snapshot).await
            }
            _ => Ok(0),
        }
    }

    async fn fill(&self, fill: &Fill) -> Result<Filled, Error> {
        self.mend_left_over(fill).await?;
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

    async fn prefetch(&self, key: &Key, snapshot: &SnapshotRef) -> Result<Prefetched, Error> {
        self.restore_ahead(key, snapshot).await
    }

    async fn evict(&self, key: &Key) -> Result<(), Error> {
        self.inner.evict(key)
    }

    async fn remove_evicted(&self) -> Result<(), Error> {
        if !self.inner.has_evicted() {
            return Ok(());
        }
        self.run(Lane::Bulk, |inner| inner.remove_evicted()).await
    }

    async fn cached_bytes(&self, key: &Key) -> Result<Option<u64>, Error> {
        let key = key.clone();
        self.run(Lane::Bulk, move |inner| inner.cached_bytes(&key)).await
    }

    fn free_bytes(&self) -> Result<u64, Error> {
        Ok(self.inner.layout.cache.free_bytes()?)
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

    async fn remove_set_aside(&self, tenant: &TenantId, keys: &[Key]) -> Result<Vec<String>, Error> {
        let (tenant, digests) = (tenant.clone(), keys.iter().map(Key::digest).collect::<Vec<_>>());
        self.run(Lane::Bulk, move |inner| inner.remove_set_aside(&tenant, &digests)).await
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
