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
    clock::{Clock, SystemClock},
    model::{
        Epoch, Key, Owner, SlotId, SnapshotRef, TenantId, WorkloadId,
        spec::{Layout, Persist, Volume, VolumeMode, Volumes},
    },
    state::{
        Base, Encryption, Error, Fill, FillFrom, Filled, Save, SaveTree, Saved, SlotFiles,
        fence::Author,
        host::{HostDirs, HostFiles},
    },
    store::{self, Creation, Listed, Parts, SharedStore, Store, Versioning},
};
use bytes::Bytes;
use futures_util::StreamExt as _;

pub(crate) const RUN_AS: Owner = Owner { uid: 12_345, gid: 12_346 };

/// The system's clock, some hours on: nothing in the store is too new to be removed.
pub(crate) struct Later;

impl Clock for Later {
    fn unix_ms(&self) -> u64 {
        SystemClock.unix_ms() + 3 * 60 * 60 * 1_000
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        SystemClock.fill_random(bytes);
    }
}

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

/// A store in memory that may fail at its n-th call. Over another store it passes
/// everything on.
#[derive(Default)]
pub(crate) struct MemoryStore {
    back: Option<SharedStore>,
    /// The largest body that was read.
    pub(crate) largest: Mutex<usize>,
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
    pub(crate) fn over(back: SharedStore) -> Self {
        Self { back: Some(back), ..Self::default() }
    }

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

    fn note_size(&self, bytes: usize) {
        let mut largest = self.largest.lock().unwrap();
        *largest = bytes.max(*largest);
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
        if let Some(back) = &self.back {
            return back.get(key).await;
        }
        let garbles = self.garbles.lock().unwrap().is_some_and(|part| key.contains(part));
        self.read(key, || {
            let body = self.objects.lock().unwrap().get(key).cloned()?;
            let body = if garbles { Bytes::from([&body[..], b"!"].concat()) } else { body };
            self.note_size(body.len());
            Some(body)
        })
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<(), store::Error> {
        if let Some(back) = &self.back {
            return back.put(key, body).await;
        }
        // A real store takes its time; others get a turn.
        tokio::task::yield_now().await;
        self.write(key, || {
            if !self.forgets(key) {
                self.objects.lock().unwrap().insert(key.to_owned(), body);
            }
        })
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Creation, store::Error> {
        if let Some(back) = &self.back {
            return back.create(key, body).await;
        }
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
        if let Some(back) = &self.back {
            return back.list(prefix, after, limit).await;
        }
        self.read(prefix, || {
            if self.hides.lock().unwrap().is_some_and(|part| prefix.contains(part)) {
                return Vec::new();
            }
            let objects = self.objects.lock().unwrap();
            let found = objects.iter().filter(|(key, _)| key.starts_with(prefix));
            let found = found.filter(|(key, _)| after.is_none_or(|after| key.as_str() > after));
            found
                .take(limit)
                .map(|(key, body)| Listed { key: key.clone(), bytes: body.len() as u64, modified_ms: 0 })
                .collect()
        })
    }

    async fn delete(&self, key: &str) -> Result<(), store::Error> {
        if let Some(back) = &self.back {
            return back.delete(key).await;
        }
        self.write(key, || {
            self.objects.lock().unwrap().remove(key);
        })
    }

    async fn copy(&self, from: &str, to: &str) -> Result<bool, store::Error> {
        if let Some(back) = &self.back {
            return back.copy(from, to).await;
        }
        self.write(to, || {
            let mut objects = self.objects.lock().unwrap();
            let Some(body) = objects.get(from).cloned() else { return false };
            if !self.forgets(to) {
                objects.insert(to.to_owned(), body);
            }
            true
        })
    }

    async fn get_range(&self, key: &str, offset: u64, bytes: u64) -> Result<Option<Bytes>, store::Error> {
        if let Some(back) = &self.back {
            return back.get_range(key, offset, bytes).await;
        }
        let garbles = self.garbles.lock().unwrap().is_some_and(|part| key.contains(part));
        self.read(key, || {
            let body = self.objects.lock().unwrap().get(key).cloned()?;
            let body = if garbles { Bytes::from([&body[..], b"!"].concat()) } else { body };
            let start = usize::try_from(offset).unwrap().min(body.len());
            let end = usize::try_from(offset + bytes).unwrap().min(body.len());
            self.note_size(end - start);
            Some(body.slice(start..end))
        })
    }

    async fn put_parts(&self, key: &str, mut parts: Parts) -> Result<(), store::Error> {
        if let Some(back) = &self.back {
            return back.put_parts(key, parts).await;
        }
        let mut body = Vec::new();
        while let Some(part) = parts.next().await {
            let part = part.map_err(|error| store::Error::Unavailable {
                operation: "put_parts",
                key: key.to_owned(),
                reason: error.to_string(),
            })?;
            body.extend_from_slice(&part);
        }
        self.put(key, body.into()).await
    }

    async fn versioning(&self) -> Result<Versioning, store::Error> {
        if let Some(back) = &self.back {
            return back.versioning().await;
        }
        self.read("", || Versioning::Off)
    }

    async fn abort_uploads(&self, before_ms: u64) -> Result<u64, store::Error> {
        if let Some(back) = &self.back {
            return back.abort_uploads(before_ms).await;
        }
        self.read("", || 0)
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
        Self::with_encryption(store, Encryption::off(Arc::new(SystemClock)))
    }

    /// As [`Node::new`], on a file system in memory.
    pub(crate) fn in_memory(store: &Arc<MemoryStore>) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let files = open(dir.path(), store).unwrap();
        Self { files, store: Arc::clone(store), dir }
    }

    pub(crate) fn with_encryption(store: &Arc<MemoryStore>, encryption: Encryption) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests need root: they make trees of other owners"
        );
        let dir = tempfile::tempdir().unwrap();
        let files = open_encrypted(dir.path(), store, encryption).unwrap();
        Self { files, store: Arc::clone(store), dir }
    }

    /// The server ends and starts again.
    pub(crate) fn restart(self) -> Self {
        let Self { files, store, dir } = self;
        drop(files);
        let files = open(dir.path(), &store).unwrap();
        Self { files, store, dir }
    }

    /// The host lost its power and starts again.
    pub(crate) fn after_power_loss(self) -> Self {
        let Self { files, store, dir } = self;
        drop(files);
        let clock: boilerhouse::clock::SharedClock = Arc::new(SystemClock);
        let encryption = Encryption::off(Arc::clone(&clock));
        let (dirs, shared) = (dirs(dir.path()), Arc::<MemoryStore>::clone(&store));
        let files = HostFiles::open_in_boot(dirs, shared, clock, encryption, "another");
        Self { files: files.unwrap(), store, dir }
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

fn dirs(dir: &Path) -> HostDirs {
    HostDirs {
        state_dir: dir.join("state"),
        secrets_dir: dir.join("secrets"),
        socket_dir: dir.join("sockets"),
    }
}

pub(crate) fn open(dir: &Path, store: &Arc<MemoryStore>) -> Result<HostFiles, Error> {
    open_encrypted(dir, store, Encryption::off(Arc::new(SystemClock)))
}

fn open_encrypted(dir: &Path, store: &Arc<MemoryStore>, encryption: Encryption) -> Result<HostFiles, Error> {
    let (store, clock) = (Arc::<MemoryStore>::clone(store), Arc::new(SystemClock));
    HostFiles::open_encrypted(dirs(dir), store, clock, encryption)
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
        author: Author { server: "node".to_owned(), term: None },
        is_last: true,
        persist: Persist {
            on_release: true,
            every_ms: 0,
            exclude: Vec::new(),
            keep_last: 10,
            keep_days: 0,
            max_pause_ms: 1_000,
            layout: Layout::Snapshot,
        },
        max_bytes: None,
        base: Base::Any,
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
    pub(crate) attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path, in order, that is the same file.
    pub(crate) same_as: Option<Vec<u8>>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { mode, owner, modified, content, attributes, same_as } = self;
        let start = content[..content.len().min(40)].escape_ascii();
        write!(f, "{mode:o} {owner:?} {modified:?} {} bytes \"{start}\"", content.len())?;
        write!(f, " {attributes:?} {same_as:?}")
    }
}

/// A tree by path, the root under the empty path.
pub(crate) type Tree = BTreeMap<Vec<u8>, Entry>;

/// Reads a tree by plain paths, unlike the code under test.
pub(crate) fn tree(root: &Path) -> Tree {
    let mut found = Tree::new();
    let mut numbers = Vec::new();
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
            attributes: attributes(&full),
            same_as: None,
        };
        numbers.push(((meta.dev(), meta.ino()), path.as_os_str().as_bytes().to_vec(), meta.is_dir()));
        found.insert(path.as_os_str().as_bytes().to_vec(), entry);
    }
    numbers.sort();
    for same in numbers.chunk_by(|one, next| one.0 == next.0).filter(|same| !same[0].2) {
        for (_, path, _) in &same[1..] {
            found.get_mut(path).unwrap().same_as = Some(same[0].1.clone());
        }
    }
    found
}

/// Reads every attribute that a program could have set.
fn attributes(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length].split(|byte| *byte == 0);
    let names = names.filter(|name| name.starts_with(b"user.") || name.starts_with(b"system.posix_acl"));
    let value = |name: &[u8]| {
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value[..length].to_vec()
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

/// What a tree is after a restore from the store: set-id bits of files are gone.
pub(crate) fn without_set_id(mut tree: Tree) -> Tree {
    for entry in tree.values_mut().filter(|entry| entry.mode & 0o170000 == 0o100000) {
        entry.mode &= !0o6000;
    }
    tree
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
