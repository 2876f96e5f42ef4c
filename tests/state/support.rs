//! A node on temporary directories, a store in memory, and trees to compare.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use boilerhouse::{
    clock::SystemClock,
    model::{
        Epoch, Key, Owner, SlotId, SnapshotRef, TenantId, WorkloadId,
        spec::{Persist, Volume, VolumeMode, Volumes},
    },
    state::{
        Error, Fill, FillFrom, Filled, Save, SaveTree, Saved, SlotFiles,
        host::{HostDirs, HostFiles},
    },
    store::{self, Creation, Listed, Store},
};
use bytes::Bytes;

pub(crate) const RUN_AS: Owner = Owner { uid: 12_345, gid: 12_346 };

/// What happens to a call of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strike {
    /// Not done, and known not to be.
    Unavailable,
    /// Done, and the caller does not know.
    UnknownDone,
    /// Not done, and the caller does not know.
    UnknownNotDone,
}

/// A store in memory that may fail at its n-th call.
#[derive(Default)]
pub(crate) struct MemoryStore {
    pub(crate) objects: Mutex<BTreeMap<String, Bytes>>,
    calls: Mutex<u64>,
    strike: Mutex<Option<(u64, Strike)>>,
    /// GETs of keys with this in them answer other bytes.
    pub(crate) garbles: Mutex<Option<&'static str>>,
    /// Listings of prefixes with this in them are empty.
    pub(crate) hides: Mutex<Option<&'static str>>,
    /// What a put or create with this in its key says it did, and did not.
    pub(crate) forgets: Mutex<Option<&'static str>>,
}

impl MemoryStore {
    /// The `nth` call from now (1 is the next) is struck.
    pub(crate) fn strike(&self, nth: u64, strike: Strike) {
        *self.strike.lock().unwrap() = Some((*self.calls.lock().unwrap() + nth, strike));
    }

    /// Ends the strike; answers whether it has happened.
    pub(crate) fn has_struck(&self) -> bool {
        let last = self.strike.lock().unwrap().take();
        last.is_some_and(|(at, _)| *self.calls.lock().unwrap() >= at)
    }

    pub(crate) fn names(&self, part: &str) -> Vec<String> {
        self.objects.lock().unwrap().keys().filter(|name| name.contains(part)).cloned().collect()
    }

    fn next(&self) -> Option<Strike> {
        let mut calls = self.calls.lock().unwrap();
        *calls += 1;
        let strike = *self.strike.lock().unwrap();
        strike.filter(|(at, _)| *at == *calls).map(|(_, strike)| strike)
    }

    fn read<T>(&self, key: &str, done: impl FnOnce() -> T) -> Result<T, store::Error> {
        match self.next() {
            None => Ok(done()),
            Some(_) => Err(store::Error::Unavailable {
                operation: "read",
                key: key.to_owned(),
                reason: "struck".into(),
            }),
        }
    }

    fn write<T>(&self, key: &str, done: impl FnOnce() -> T) -> Result<T, store::Error> {
        let (operation, key, reason) = ("write", key.to_owned(), "struck".to_owned());
        match self.next() {
            None => Ok(done()),
            Some(Strike::Unavailable) => Err(store::Error::Unavailable { operation, key, reason }),
            Some(Strike::UnknownNotDone) => Err(store::Error::Unknown { operation, key, reason }),
            Some(Strike::UnknownDone) => {
                done();
                Err(store::Error::Unknown { operation, key, reason })
            }
        }
    }

    fn forgets(&self, key: &str) -> bool {
        self.forgets.lock().unwrap().is_some_and(|part| key.contains(part))
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn probe(&self) -> Result<(), store::Error> {
        Ok(())
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, store::Error> {
        let garbles = self.garbles.lock().unwrap().is_some_and(|part| key.contains(part));
        self.read(key, || {
            let body = self.objects.lock().unwrap().get(key).cloned()?;
            Some(if garbles { Bytes::from([&body[..], b"!"].concat()) } else { body })
        })
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<(), store::Error> {
        // A real store takes its time; others get a turn.
        tokio::task::yield_now().await;
        self.write(key, || {
            if !self.forgets(key) {
                self.objects.lock().unwrap().insert(key.to_owned(), body);
            }
        })
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Creation, store::Error> {
        self.write(key, || {
            let mut objects = self.objects.lock().unwrap();
            if objects.contains_key(key) {
                return Creation::Exists;
            }
            if !self.forgets(key) {
                objects.insert(key.to_owned(), body);
            }
            Creation::Created
        })
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, store::Error> {
        self.read(prefix, || {
            if self.hides.lock().unwrap().is_some_and(|part| prefix.contains(part)) {
                return Vec::new();
            }
            let objects = self.objects.lock().unwrap();
            let found = objects.iter().filter(|(key, _)| key.starts_with(prefix));
            let found = found.filter(|(key, _)| after.is_none_or(|after| key.as_str() > after));
            found
                .take(limit)
                .map(|(key, body)| Listed { key: key.clone(), bytes: body.len() as u64 })
                .collect()
        })
    }

    async fn delete(&self, key: &str) -> Result<(), store::Error> {
        self.write(key, || {
            self.objects.lock().unwrap().remove(key);
        })
    }
}

/// A node: `HostFiles` in a directory of its own.
pub(crate) struct Node {
    pub(crate) files: HostFiles,
    pub(crate) store: Arc<MemoryStore>,
    // Dropped last.
    pub(crate) dir: tempfile::TempDir,
}

impl Node {
    pub(crate) fn new(store: &Arc<MemoryStore>) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests need root: they make trees of other owners"
        );
        let dir = tempfile::tempdir().unwrap();
        let files = open(dir.path(), store).unwrap();
        Self { files, store: Arc::clone(store), dir }
    }

    /// The server ends and starts again.
    pub(crate) fn restart(self) -> Self {
        let Self { files, store, dir } = self;
        drop(files);
        let files = open(dir.path(), &store).unwrap();
        Self { files, store, dir }
    }

    pub(crate) fn state_path(&self, slot: &SlotId) -> PathBuf {
        self.dir.path().join("state/slots").join(slot.as_str()).join("state")
    }

    pub(crate) fn cache_path(&self, key: &Key) -> PathBuf {
        self.dir.path().join("state/cache").join(key.digest())
    }

    pub(crate) fn secrets_path(&self, slot: &SlotId) -> PathBuf {
        self.dir.path().join("secrets").join(slot.as_str())
    }

    pub(crate) fn comm_path(&self, slot: &SlotId) -> PathBuf {
        self.dir.path().join("sockets").join(slot.as_str())
    }

    pub(crate) fn staging(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join("state/staging")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    pub(crate) async fn prepare(&self, slot: &SlotId) {
        self.files.prepare(slot, &volumes()).await.unwrap();
    }

    /// Prepares a slot and fills it.
    pub(crate) async fn claim(
        &self,
        slot: &SlotId,
        key: &Key,
        epoch: u64,
        from: FillFrom,
    ) -> Result<Filled, Error> {
        self.prepare(slot).await;
        self.files.fill(&fill(slot, key, epoch, from)).await
    }

    /// Captures, saves with `nonce`, and wipes the slot; the tree stays in the cache.
    pub(crate) async fn release(&self, slot: &SlotId, key: &Key, epoch: u64, nonce: &str) -> Saved {
        self.files.capture(slot, key).await.unwrap();
        let saved = self.files.save(&save(key, epoch, nonce)).await.unwrap();
        self.files.wipe(slot).await.unwrap();
        saved
    }

    /// Restores the newest snapshot on this node and answers the tree.
    pub(crate) async fn restored(&self, slot: &SlotId, key: &Key, epoch: u64) -> Tree {
        let newest = self.files.newest(key).await.unwrap().unwrap();
        self.claim(slot, key, epoch, FillFrom::Snapshot(newest)).await.unwrap();
        tree(&self.state_path(slot))
    }
}

pub(crate) fn open(dir: &Path, store: &Arc<MemoryStore>) -> Result<HostFiles, Error> {
    let dirs = HostDirs {
        state_dir: dir.join("state"),
        secrets_dir: dir.join("secrets"),
        socket_dir: dir.join("sockets"),
    };
    HostFiles::open(dirs, Arc::<MemoryStore>::clone(store), Arc::new(SystemClock))
}

pub(crate) fn key(tenant: &str) -> Key {
    Key::new(TenantId::new(tenant).unwrap(), WorkloadId::new("work").unwrap())
}

pub(crate) fn slot(name: &str) -> SlotId {
    SlotId::new(name).unwrap()
}

pub(crate) fn volumes() -> Volumes {
    let volume = |path: &str, mode| Some(Volume { container_path: path.into(), mode });
    Volumes {
        state: volume("/data", VolumeMode::Rw),
        secrets: volume("/secrets", VolumeMode::Ro),
        comm: volume("/comm", VolumeMode::Rw),
    }
}

pub(crate) fn fill(slot: &SlotId, key: &Key, epoch: u64, from: FillFrom) -> Fill {
    let (slot, key) = (slot.clone(), key.clone());
    Fill { slot, key, epoch: Epoch(epoch), from, run_as: RUN_AS, previous_owner: None }
}

pub(crate) fn save(key: &Key, epoch: u64, nonce: &str) -> Save {
    Save {
        key: key.clone(),
        epoch: Epoch(epoch),
        nonce: nonce.into(),
        tree: SaveTree::Cache,
        run_as: RUN_AS,
        failed_claim: false,
        persist: Persist {
            on_release: true,
            every_ms: 0,
            exclude: Vec::new(),
            keep_last: 10,
            max_pause_ms: 1_000,
        },
        max_bytes: None,
    }
}

pub(crate) async fn newest(node: &Node, key: &Key) -> SnapshotRef {
    node.files.newest(key).await.unwrap().unwrap()
}

/// Everything of one entry that must come back.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) modified: (i64, i64),
    pub(crate) content: Vec<u8>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { mode, owner, modified, content } = self;
        let start = content[..content.len().min(40)].escape_ascii();
        write!(f, "{mode:o} {owner:?} {modified:?} {} bytes \"{start}\"", content.len())
    }
}

/// A tree by path, the root under the empty path.
pub(crate) type Tree = BTreeMap<Vec<u8>, Entry>;

/// Reads a tree by plain paths, unlike the code under test.
pub(crate) fn tree(root: &Path) -> Tree {
    let mut found = Tree::new();
    let mut open = vec![PathBuf::new()];
    while let Some(path) = open.pop() {
        let full = if path.as_os_str().is_empty() { root.to_owned() } else { root.join(&path) };
        let meta = full.symlink_metadata().unwrap();
        let content = if meta.is_file() {
            std::fs::read(&full).unwrap()
        } else if meta.is_symlink() {
            full.read_link().unwrap().as_os_str().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        if meta.is_dir() {
            open.extend(std::fs::read_dir(&full).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
        }
        let entry = Entry {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            modified: (meta.mtime(), meta.mtime_nsec()),
            content,
        };
        found.insert(path.as_os_str().as_bytes().to_vec(), entry);
    }
    found
}

/// Leaves the root's time out, which a crash in the middle of a move may change.
pub(crate) fn without_root_time(mut tree: Tree) -> Tree {
    tree.get_mut(&b""[..]).unwrap().modified = (0, 0);
    tree
}

/// Writes a file with parents, as the tenant.
pub(crate) fn write(root: &Path, path: &str, content: &[u8]) {
    let full = root.join(OsStr::new(path));
    std::fs::create_dir_all(full.parent().unwrap()).unwrap();
    std::fs::write(&full, content).unwrap();
    std::os::unix::fs::chown(&full, Some(RUN_AS.uid), Some(RUN_AS.gid)).unwrap();
}

pub(crate) fn mode_and_owner(path: &Path) -> (u32, u32, u32) {
    let meta = path.symlink_metadata().unwrap();
    (meta.permissions().mode() & 0o7777, meta.uid(), meta.gid())
}

/// A small tree with something of everything.
pub(crate) fn some_tree(root: &Path) {
    write(root, "a.txt", b"alpha");
    write(root, "dir/b.txt", b"beta");
    write(root, "dir/deep/c.bin", &[7; 5_000]);
    write(root, "big.bin", &(0..600_000_u32).flat_map(|n| (n as u16).to_le_bytes()).collect::<Vec<_>>());
    std::fs::create_dir(root.join("empty")).unwrap();
    std::os::unix::fs::symlink("dir/b.txt", root.join("link")).unwrap();
    std::fs::set_permissions(root.join("dir"), PermissionsExt::from_mode(0o2750)).unwrap();
    std::fs::set_permissions(root, PermissionsExt::from_mode(0o751)).unwrap();
}
