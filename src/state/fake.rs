//! Slots in memory, with faults on demand: for tests and benchmarks of what stands above.
//!
//! [`FakeFiles`] keeps every rule of the port that its callers can see (absence is
//! proven, fences hold, nothing of another tenant's is mixed in) and forgets what
//! they cannot: modes, times, packs. Nothing waits; a call is one short lock.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;

use crate::{
    clock::SharedClock,
    disk,
    model::{
        Epoch, Key, Owner, Secret, SlotId, SnapshotRef, TenantId,
        spec::{Volume, VolumeMode, Volumes},
    },
    runtime::plan::Mount,
    store,
};

use super::{
    Base, Captured, CheckpointId, Close, Error, FileAction, FileAnswer, Fill, FillFrom, Filled, Head, Open,
    Prefetched, Save, SaveTree, Saved, SlotFiles, Survey,
    fence::{self, Closing, Link, Standing},
    host::is_secret_name,
};

/// Files by their path; directories are what paths imply.
pub type FakeTree = BTreeMap<String, Vec<u8>>;

/// Whether a fault strikes before or after the call has had its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAt {
    /// Nothing was done.
    Before,
    /// It was done, and the caller does not know.
    After,
}

/// Keeps slots, cache and store in memory. Clones share everything.
#[derive(Clone)]
pub struct FakeFiles {
    node: Arc<Mutex<Node>>,
    store: Arc<Mutex<FakeStore>>,
    clock: SharedClock,
}

#[derive(Default)]
struct Node {
    slots: BTreeMap<SlotId, FakeSlot>,
    cache: HashMap<Key, FakeTree>,
    checkpoints: HashMap<String, (SlotId, Key, Option<FakeTree>)>,
    set_aside: BTreeMap<String, FakeTree>,
    next: u64,
    faults: Vec<Fault>,
    calls: BTreeMap<&'static str, u64>,
}

#[derive(Default)]
struct FakeSlot {
    volumes: Volumes,
    owner: Option<(Key, Epoch)>,
    run_as: Option<Owner>,
    tree: FakeTree,
    secrets: BTreeMap<String, Secret>,
    changed_ms: u64,
}

#[derive(Default)]
struct FakeStore {
    snapshots: HashMap<Key, Vec<(SnapshotRef, FakeTree)>>,
    /// The newest record of each key, and its number.
    heads: HashMap<Key, (u64, Link)>,
    is_down: bool,
}

struct Fault {
    operation: &'static str,
    calls_left: u64,
    at: FaultAt,
    error: Error,
}

// === impl FakeFiles: for tests ===

impl FakeFiles {
    /// Begins with nothing.
    pub fn new(clock: SharedClock) -> Self {
        Self { node: Arc::default(), store: Arc::default(), clock }
    }

    /// Returns another node with an empty disk and the same store.
    #[must_use]
    pub fn another_node(&self) -> Self {
        Self { node: Arc::default(), store: Arc::clone(&self.store), clock: Arc::clone(&self.clock) }
    }

    /// Lets every call that needs the store fail, or work again.
    pub fn set_store_down(&self, is_down: bool) {
        self.store().is_down = is_down;
    }

    /// Lets the `nth` next call (1 is the next) of `operation`, a method's name, fail once.
    pub fn fail(&self, operation: &'static str, nth: u64, at: FaultAt, error: Error) {
        self.node().faults.push(Fault { operation, calls_left: nth, at, error });
    }

    /// Returns how often a method was called.
    pub fn calls(&self, operation: &str) -> u64 {
        self.node().calls.get(operation).copied().unwrap_or(0)
    }

    /// Writes a file as the program in the container would; `false` when it may
    /// not: the slot is not handed over to anyone.
    pub fn write(&self, slot: &SlotId, path: &str, content: &[u8]) -> bool {
        let now = self.clock.unix_ms();
        match self.node().slots.get_mut(slot) {
            Some(slot) if slot.run_as.is_some() => {
                slot.tree.insert(path.to_owned(), content.to_vec());
                slot.changed_ms = now;
                true
            }
            _ => false,
        }
    }

    /// Returns what a slot's state directory holds; `None` when there is no such slot.
    pub fn tree(&self, slot: &SlotId) -> Option<FakeTree> {
        self.node().slots.get(slot).map(|slot| slot.tree.clone())
    }

    /// Returns a slot's secrets.
    pub fn secrets(&self, slot: &SlotId) -> BTreeMap<String, Secret> {
        self.node().slots.get(slot).map(|slot| slot.secrets.clone()).unwrap_or_default()
    }

    /// Returns a key's tree in the cache.
    pub fn cached(&self, key: &Key) -> Option<FakeTree> {
        self.node().cache.get(key).cloned()
    }

    /// Returns the slots that have directories.
    pub fn slots(&self) -> Vec<SlotId> {
        self.node().slots.keys().cloned().collect()
    }

    /// Returns how many checkpoints have not been dropped.
    pub fn checkpoints(&self) -> usize {
        self.node().checkpoints.len()
    }

    /// Returns a key's snapshots with their trees, oldest first.
    pub fn snapshots(&self, key: &Key) -> Vec<(SnapshotRef, FakeTree)> {
        self.store().snapshots.get(key).cloned().unwrap_or_default()
    }
}

// === impl FakeFiles ===

impl FakeFiles {
    fn node(&self) -> MutexGuard<'_, Node> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self) -> MutexGuard<'_, FakeStore> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, does it, and lets a fault strike before or after.
    fn call<T>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&mut Node) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut node = self.node();
        *node.calls.entry(operation).or_default() += 1;
        let mut struck = None;
        node.faults.retain_mut(|fault| {
            if fault.operation != operation || struck.is_some() {
                return true;
            }
            fault.calls_left = fault.calls_left.saturating_sub(1);
            if fault.calls_left > 0 {
                return true;
            }
            struck = Some((fault.at, fault.error.clone()));
            false
        });
        match struck {
            Some((FaultAt::Before, error)) => Err(error),
            Some((FaultAt::After, error)) => work(&mut node).and(Err(error)),
            None => work(&mut node),
        }
    }

    fn must_be_up(&self, key: &Key, operation: &'static str) -> Result<MutexGuard<'_, FakeStore>, Error> {
        let store = self.store();
        if store.is_down {
            let reason = "it was told to be down".to_owned();
            let source = store::Error::Unavailable { operation, key: format!("t/{}", key.digest()), reason };
            return Err(Error::Store { key: key.clone(), source });
        }
        Ok(store)
    }
}

#[async_trait]
impl SlotFiles for FakeFiles {
    async fn prepare(&self, slot: &SlotId, volumes: &Volumes) -> Result<Vec<Mount>, Error> {
        self.call("prepare", |node| {
            node.slots.entry(slot.clone()).or_default().volumes = volumes.clone();
            let mount = |name: &str, volume: &Option<Volume>| {
                let volume = volume.as_ref()?;
                let source = format!("/fake/slots/{slot}/{name}");
                let read_only = volume.mode == VolumeMode::Ro;
                Some(Mount { source, target: volume.container_path.clone(), read_only })
            };
            let all = [("state", &volumes.state), ("secrets", &volumes.secrets), ("comm", &volumes.comm)];
            Ok(all.into_iter().filter_map(|(name, volume)| mount(name, volume)).collect())
        })
    }

    async fn newest(&self, key: &Key) -> Result<Option<SnapshotRef>, Error> {
        self.call("newest", |_| Ok(self.must_be_up(key, "list")?.newest(key)))
    }

    async fn head(&self, key: &Key) -> Result<Option<Head>, Error> {
        self.call("head", |_| {
            let store = self.must_be_up(key, "list")?;
            let head = store.heads.get(key).cloned();
            Ok(head.map(|(number, link)| Head { number, link, snapshot: store.newest(key) }))
        })
    }

    async fn open(&self, open: &Open) -> Result<(), Error> {
        self.call("open", |_| {
            let mut store = self.must_be_up(&open.key, "create")?;
            let server = &open.author.server;
            let (number, newest) = store.heads.get(&open.key).cloned().unzip();
            let is_own = newest.as_ref().is_some_and(|link| {
                link.server.as_ref() == Some(server)
                    && link.epoch < open.epoch
                    && (link.tree == open.tree || open.saving.as_ref() == Some(&link.nonce))
            });
            if newest.as_ref().is_some_and(|link| link.nonce == open.nonce) {
                return Ok(());
            }
            if number.unwrap_or(0) != open.on_top_of && !is_own {
                let newest = newest.map_or(Epoch(0), |link| link.epoch);
                return Err(Error::Fenced { key: open.key.clone(), own: open.epoch, newest });
            }
            let link = Link {
                epoch: open.epoch,
                nonce: open.nonce.clone(),
                server: Some(server.clone()),
                term: open.author.term,
                holder: Some((server.clone(), open.epoch)),
                tree: newest.and_then(|link| link.tree),
            };
            store.heads.insert(open.key.clone(), (number.unwrap_or(0) + 1, link));
            Ok(())
        })
    }

    async fn close(&self, close: &Close) -> Result<(), Error> {
        self.call("close", |_| {
            let mut store = self.must_be_up(&close.key, "create")?;
            let (number, newest) = store.heads.get(&close.key).cloned().unzip();
            if fence::close(newest.as_ref(), &close.author.server, close.epoch) == Closing::Done {
                return Ok(());
            }
            let link = Link {
                epoch: close.epoch,
                nonce: close.nonce.clone(),
                server: Some(close.author.server.clone()),
                term: close.author.term,
                holder: None,
                tree: newest.and_then(|link| link.tree),
            };
            store.heads.insert(close.key.clone(), (number.unwrap_or(0) + 1, link));
            Ok(())
        })
    }

    async fn fetch(&self, _fill: &Fill) -> Result<u64, Error> {
        Ok(0)
    }

    async fn fill(&self, fill: &Fill) -> Result<Filled, Error> {
        let now = self.clock.unix_ms();
        self.call("fill", |node| {
            let slot = node.slot(&fill.slot)?;
            let is_same = slot.owner.as_ref() == Some(&(fill.key.clone(), fill.epoch));
            let is_of_key = slot.owner.as_ref().is_some_and(|(key, _)| *key == fill.key);
            if !slot.tree.is_empty() && !is_of_key {
                return Err(Error::NotEmpty { slot: fill.slot.clone() });
            }
            let mut filled = Filled::default();
            let has_state = slot.volumes.state.is_some();
            let is_begun = is_same && slot.run_as.is_some();
            let moved = match &fill.from {
                _ if !has_state || is_begun => None,
                FillFrom::Empty => node.cache.remove(&fill.key),
                FillFrom::Cache => {
                    let cached = node.cache.remove(&fill.key);
                    Some(cached.ok_or_else(|| missing("open", format!("cache of {}", fill.key)))?)
                }
                FillFrom::Snapshot(snapshot) => {
                    let tree = self.must_be_up(&fill.key, "get")?.tree(&fill.key, snapshot)?;
                    filled = Filled { files: snapshot.files, bytes: snapshot.bytes, ..filled };
                    filled.fetched_bytes = snapshot.bytes;
                    Some(tree)
                }
            };
            let slot = node.slot(&fill.slot)?;
            if let Some(tree) = moved {
                filled.entries = top_level(&tree);
                slot.tree.extend(tree);
            }
            slot.owner = Some((fill.key.clone(), fill.epoch));
            slot.run_as = Some(fill.run_as);
            slot.changed_ms = now;
            Ok(filled)
        })
    }

    async fn put_secrets(
        &self,
        slot: &SlotId,
        _run_as: Owner,
        files: &BTreeMap<String, Secret>,
    ) -> Result<(), Error> {
        self.call("put_secrets", |node| {
            if let Some(name) = files.keys().find(|name| !is_secret_name(name)) {
                return Err(file_error(name, "is no secret's name"));
            }
            let slot = node.slot(slot)?;
            match (files.keys().next(), &slot.volumes.secrets) {
                (Some(first), None) => Err(file_error(first, "the workload has no secrets volume")),
                _ => {
                    slot.secrets.extend(files.clone());
                    Ok(())
                }
            }
        })
    }

    async fn capture(&self, slot: &SlotId, key: &Key) -> Result<Captured, Error> {
        self.call("capture", |node| {
            let is_cached = node.cache.contains_key(key);
            let found = node.slot(slot)?;
            if found.volumes.state.is_none() {
                return Ok(Captured { handed_over: false, is_cached });
            }
            if found.owner.as_ref().is_none_or(|(owner, _)| owner != key) {
                return if found.tree.is_empty() {
                    Ok(Captured { handed_over: false, is_cached })
                } else {
                    Err(Error::NotEmpty { slot: slot.clone() })
                };
            }
            if found.run_as.take().is_some() {
                let tree = std::mem::take(&mut found.tree);
                node.cache.entry(key.clone()).or_default().extend(tree);
            }
            // A fill of this fake is one step: it has ended or not begun.
            Ok(Captured { handed_over: true, is_cached: node.cache.contains_key(key) })
        })
    }

    async fn copy_live(&self, slot: &SlotId, key: &Key) -> Result<CheckpointId, Error> {
        self.call("copy_live", |node| {
            if node.slot(slot)?.owner.as_ref().is_none_or(|(owner, _)| owner != key) {
                return Err(Error::NotEmpty { slot: slot.clone() });
            }
            node.next += 1;
            let id = format!("checkpoint-{}", node.next);
            node.checkpoints.insert(id.clone(), (slot.clone(), key.clone(), None));
            Ok(CheckpointId(id))
        })
    }

    async fn copy_paused(&self, checkpoint: &CheckpointId) -> Result<(), Error> {
        self.call("copy_paused", |node| {
            let (slot, ..) = node.checkpoint(checkpoint)?.clone();
            let tree = node.slot(&slot)?.tree.clone();
            node.checkpoint(checkpoint)?.2 = Some(tree);
            Ok(())
        })
    }

    async fn drop_checkpoint(&self, checkpoint: &CheckpointId) -> Result<(), Error> {
        self.call("drop_checkpoint", |node| {
            node.checkpoints.remove(&checkpoint.0);
            Ok(())
        })
    }

    async fn save(&self, save: &Save) -> Result<Saved, Error> {
        let created_ms = self.clock.unix_ms();
        self.call("save", |node| {
            let mut store = self.must_be_up(&save.key, "create")?;
            let newest = store.newest(&save.key);
            let (head, link) = store.heads.get(&save.key).cloned().unzip();
            if link.is_none() && save.base == Base::Chain {
                let reason = "the store has no record of it any more".to_owned();
                return Err(Error::Damaged { key: save.key.clone(), reason });
            }
            let standing = match save.base {
                Base::Decided(after) => fence::standing_after(head.zip(link.as_ref()), after, &save.nonce),
                Base::Any | Base::Chain => {
                    fence::standing(link.as_ref(), &save.author.server, save.epoch, &save.nonce)
                }
            };
            match (standing, &newest) {
                (Standing::Committed, Some(snapshot)) => {
                    return Ok(Saved { snapshot: snapshot.clone(), sent_bytes: 0, skipped: 0 });
                }
                (Standing::Fenced(newest), _) => {
                    return Err(Error::Fenced { key: save.key.clone(), own: save.epoch, newest });
                }
                (Standing::Open | Standing::Committed, _) => {}
            }
            let tree = match &save.tree {
                SaveTree::Cache => node.cache.get(&save.key).cloned(),
                SaveTree::Checkpoint(id) => node.checkpoint(id)?.2.clone(),
            };
            let tree = tree.ok_or_else(|| missing("open", format!("tree of {}", save.key)))?;
            let bytes = tree.values().map(|content| content.len() as u64).sum();
            if save.max_bytes.is_some_and(|most| bytes > most) {
                let reason = format!("the files have {bytes} bytes together");
                return Err(Error::Limit { key: save.key.clone(), reason });
            }
            let number = head.unwrap_or(0) + 1;
            let next = Link {
                epoch: save.epoch,
                nonce: save.nonce.clone(),
                server: Some(save.author.server.clone()),
                term: save.author.term,
                holder: link.and_then(|link| link.holder).filter(|_| !save.is_last),
                tree: Some(save.nonce.clone()),
            };
            store.heads.insert(save.key.clone(), (number, next));
            let snapshot = SnapshotRef {
                number,
                epoch: save.epoch,
                nonce: save.nonce.clone(),
                manifest: format!("t/{}/m/{number}", save.key.digest()),
                created_ms,
                files: tree.len() as u64,
                bytes,
            };
            store.snapshots.entry(save.key.clone()).or_default().push((snapshot.clone(), tree));
            Ok(Saved { snapshot, sent_bytes: bytes, skipped: 0 })
        })
    }

    async fn prefetch(&self, key: &Key, snapshot: &SnapshotRef) -> Result<Prefetched, Error> {
        self.call("prefetch", |node| {
            let tree = self.must_be_up(key, "get")?.tree(key, snapshot)?;
            node.cache.insert(key.clone(), tree);
            // This fake forgets whose files they are.
            Ok(Prefetched { fetched_bytes: snapshot.bytes, owner: Owner { uid: 0, gid: 0 } })
        })
    }

    async fn evict(&self, key: &Key) -> Result<(), Error> {
        self.call("evict", |node| {
            node.cache.remove(key);
            Ok(())
        })
    }

    async fn remove_evicted(&self) -> Result<(), Error> {
        self.call("remove_evicted", |_| Ok(()))
    }

    async fn cached_bytes(&self, key: &Key) -> Result<Option<u64>, Error> {
        self.call("cached_bytes", |node| {
            let bytes = |tree: &FakeTree| tree.values().map(|content| content.len() as u64).sum();
            Ok(node.cache.get(key).map(bytes))
        })
    }

    fn free_bytes(&self) -> Result<u64, Error> {
        self.call("free_bytes", |_| Ok(u64::MAX))
    }

    async fn discard(&self, key: &Key) -> Result<(), Error> {
        self.call("discard", |node| {
            node.cache.remove(key);
            Ok(())
        })
    }

    async fn wipe(&self, slot: &SlotId) -> Result<(), Error> {
        self.call("wipe", |node| match node.slots.get(slot) {
            Some(found) if !found.tree.is_empty() => Err(Error::NotEmpty { slot: slot.clone() }),
            _ => {
                node.slots.remove(slot);
                Ok(())
            }
        })
    }

    async fn discard_slot_state(&self, slot: &SlotId) -> Result<(), Error> {
        self.call("discard_slot_state", |node| {
            if let Some(slot) = node.slots.get_mut(slot) {
                slot.tree.clear();
                slot.run_as = None;
            }
            Ok(())
        })
    }

    async fn set_aside_cached(&self, digest: &str, _reason: &str) -> Result<String, Error> {
        let now = self.clock.unix_ms();
        self.call("set_aside_cached", |node| {
            let key = node.cache.keys().find(|key| key.digest() == digest).cloned();
            let tree = key.and_then(|key| node.cache.remove(&key));
            let tree = tree.ok_or_else(|| missing("set aside", format!("cache of {digest}")))?;
            let path = format!("/fake/set_aside/{digest}.{now}");
            node.set_aside.insert(path.clone(), tree);
            Ok(path)
        })
    }

    async fn remove_set_aside(&self, _tenant: &TenantId, keys: &[Key]) -> Result<Vec<String>, Error> {
        let prefixes: Vec<String> =
            keys.iter().map(|key| format!("/fake/set_aside/{}.", key.digest())).collect();
        self.call("remove_set_aside", |node| {
            let theirs = |path: &&String| prefixes.iter().any(|prefix| path.starts_with(prefix));
            let removed: Vec<String> = node.set_aside.keys().filter(theirs).cloned().collect();
            node.set_aside.retain(|path, _| !removed.contains(path));
            Ok(removed)
        })
    }

    async fn set_aside(&self, slot: &SlotId, _reason: &str) -> Result<String, Error> {
        let now = self.clock.unix_ms();
        self.call("set_aside", |node| {
            let tree =
                node.slots.get_mut(slot).map(|slot| std::mem::take(&mut slot.tree)).unwrap_or_default();
            let prefix = format!("/fake/set_aside/{slot}.");
            if tree.is_empty() {
                let earlier = node.set_aside.keys().rfind(|path| path.starts_with(&prefix));
                return earlier.cloned().ok_or_else(|| missing("set aside", format!("state of {slot}")));
            }
            let path = format!("{prefix}{now}");
            node.set_aside.insert(path.clone(), tree);
            Ok(path)
        })
    }

    async fn survey(&self) -> Result<Survey, Error> {
        self.call("survey", |node| {
            let slots = node.slots.iter().map(|(id, slot)| (id.clone(), !slot.tree.is_empty())).collect();
            let mut cached: Vec<String> = node.cache.keys().map(Key::digest).collect();
            cached.sort_unstable();
            Ok(Survey { slots, cached })
        })
    }

    async fn last_change_ms(&self, slot: &SlotId) -> Result<Option<u64>, Error> {
        self.call("last_change_ms", |node| {
            let slot = node.slots.get(slot).filter(|slot| slot.volumes.state.is_some());
            Ok(slot.map(|slot| slot.changed_ms))
        })
    }

    async fn state_file(
        &self,
        slot: &SlotId,
        _run_as: Owner,
        action: FileAction,
    ) -> Result<FileAnswer, Error> {
        let now = self.clock.unix_ms();
        self.call("state_file", |node| {
            let slot = node.slot(slot)?;
            slot.changed_ms = now;
            act(&mut slot.tree, action)
        })
    }

    fn comm_path(&self, slot: &SlotId) -> Option<String> {
        let node = self.node();
        node.slots.get(slot)?.volumes.comm.as_ref().map(|_| format!("/fake/slots/{slot}/comm"))
    }
}

fn act(tree: &mut FakeTree, action: FileAction) -> Result<FileAnswer, Error> {
    let check = |path: &str| match disk::relative_path(path.as_bytes()) {
        Ok(_) => Ok(()),
        Err(problem) => Err(file_error(path, &problem.to_string())),
    };
    let below = |path: &str| if matches!(path, "" | ".") { String::new() } else { format!("{path}/") };
    match action {
        FileAction::Read(path, most) => {
            check(&path)?;
            match tree.get(&path) {
                None => Err(file_error(&path, "is not there")),
                Some(content) if content.len() > most => Err(file_error(&path, "is too large")),
                Some(content) => Ok(FileAnswer::Bytes(content.clone())),
            }
        }
        FileAction::Write(path, content) => {
            check(&path)?;
            tree.insert(path, content.expose().to_vec());
            Ok(FileAnswer::Done)
        }
        FileAction::List(path) => {
            let prefix = below(&path);
            let inside = tree.keys().filter_map(|name| name.strip_prefix(&prefix));
            let names: BTreeSet<String> =
                inside.map(|rest| rest.split('/').next().unwrap_or(rest).to_owned()).collect();
            if names.is_empty() && !prefix.is_empty() {
                return Err(file_error(&path, "is not there"));
            }
            Ok(FileAnswer::Names(names.into_iter().collect()))
        }
        FileAction::Exists(path) => {
            check(&path)?;
            let inside = below(&path);
            Ok(FileAnswer::There(tree.keys().any(|name| *name == path || name.starts_with(&inside))))
        }
        FileAction::Remove(path) => {
            check(&path)?;
            let inside = below(&path);
            tree.retain(|name, _| *name != path && !name.starts_with(&inside));
            Ok(FileAnswer::Done)
        }
    }
}

fn top_level(tree: &FakeTree) -> u64 {
    let names: BTreeSet<&str> = tree.keys().map(|path| path.split('/').next().unwrap_or(path)).collect();
    names.len() as u64
}

fn missing(operation: &'static str, path: String) -> Error {
    let source = Arc::new(std::io::Error::from(std::io::ErrorKind::NotFound));
    Error::Disk { operation, path, source }
}

fn file_error(path: &str, reason: &str) -> Error {
    Error::File { path: path.to_owned(), reason: reason.to_owned() }
}

// === impl Node ===

impl Node {
    fn slot(&mut self, slot: &SlotId) -> Result<&mut FakeSlot, Error> {
        self.slots.get_mut(slot).ok_or_else(|| missing("open", format!("slot {slot}")))
    }

    fn checkpoint(&mut self, id: &CheckpointId) -> Result<&mut (SlotId, Key, Option<FakeTree>), Error> {
        self.checkpoints.get_mut(&id.0).ok_or_else(|| missing("open", id.0.clone()))
    }
}

// === impl FakeStore ===

impl FakeStore {
    fn newest(&self, key: &Key) -> Option<SnapshotRef> {
        Some(self.snapshots.get(key)?.last()?.0.clone())
    }

    fn tree(&self, key: &Key, snapshot: &SnapshotRef) -> Result<FakeTree, Error> {
        let all = self.snapshots.get(key).map(Vec::as_slice).unwrap_or_default();
        let found = all.iter().find(|(known, _)| known == snapshot);
        found.map(|(_, tree)| tree.clone()).ok_or_else(|| Error::Damaged {
            key: key.clone(),
            reason: format!("{} is not there", snapshot.manifest),
        })
    }
}
