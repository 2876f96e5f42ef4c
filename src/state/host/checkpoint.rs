//! Copies of live trees, frozen under a short pause.
//!
//! The first pass copies while the program runs; the second, under pause, stats
//! everything again and copies what differs. A stat alone is not enough:
//!
//! - *Racily clean*: a file changed twice within the clock's tick has the same
//!   times. What changed after the first pass began, or so little before that the
//!   clock may not tell (see `index`), is copied again.
//! - *Dirty mmap pages move no time stamp*: the kernel sets it when a page becomes
//!   dirty, not at each store. So the file system is synced before the first pass,
//!   which makes the pages clean: any store after that is seen by the second
//!   stat, and any that came between is racily clean. A sync within the pause adds
//!   nothing. On a tmpfs no time stamp follows a store to a mapped page, and on a
//!   file system that cannot be synced nothing is known: there every file is
//!   copied again under pause.
//!
//! What the index vouches for is as the newest snapshot has it, and not copied at
//! all: the copy holds what changed since. The stats under pause become the next
//! index; what changed after the sync is not in it, for its pages are dirty.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use globset::GlobSet;
use rustix::io::Errno;

use crate::{
    disk::{self, Dir, Entry, Kind, Limits, Missing, Optional, Stat, Time},
    model::{Key, SlotId},
    state::CheckpointId,
};

use super::{
    Error, HostFiles, Inner, Lane,
    collect::{Walk, is_excluded},
    fill::{SHELL, TREE},
    index::{Index, racy_since},
    slot::{OwnerNote, STATE},
    staging::Staging,
};

/// A copy leaves this much of the disk to others.
const SPARE_BYTES: u64 = 64 * 1024 * 1024;

/// The checkpoints that have been begun and not dropped.
#[derive(Default)]
pub(super) struct Checkpoints(Mutex<HashMap<String, Arc<Checkpoint>>>);

struct Checkpoint {
    slot: SlotId,
    key: Key,
    is_cancelled: Arc<AtomicBool>,
    copy: Mutex<Copy>,
    staging: Staging,
}

/// What the copy holds.
struct Copy {
    /// Entries as they were in the first pass.
    seen: HashMap<Vec<u8>, Stat>,
    /// Files that are not in the copy, for the newest snapshot has them as they are.
    vouched: HashSet<Vec<u8>>,
    /// The manifest of that snapshot.
    rests_on: Option<String>,
    /// Times from then on say nothing; `None`: no time does.
    racy_since: Option<Time>,
    frozen: Option<Arc<Frozen>>,
}

/// A frozen tree: what it was, and copies of those files that the newest snapshot
/// does not have.
pub(super) struct Frozen {
    /// The copies.
    pub(super) tree: Dir,
    /// Where the live tree's index is.
    pub(super) holder: Dir,
    /// Times from then on are not recorded in the index.
    pub(super) since: Option<Time>,
    root: Stat,
    entries: Vec<Entry>,
    vouched: HashSet<Vec<u8>>,
    rests_on: Option<String>,
}

/// Stops a copy whose caller has gone away.
struct CancelOnDrop(Option<Arc<AtomicBool>>);

// === impl HostFiles ===

impl HostFiles {
    /// First pass; see [`crate::state::SlotFiles::copy_live`].
    pub(super) async fn begin_checkpoint(&self, slot: &SlotId, key: &Key) -> Result<CheckpointId, Error> {
        let is_cancelled = Arc::new(AtomicBool::new(false));
        let cancel = CancelOnDrop(Some(Arc::clone(&is_cancelled)));
        let (slot, key) = (slot.clone(), key.clone());
        let begun =
            self.run(Lane::Copy, move |inner| Checkpoint::begin(inner, slot, key, is_cancelled)).await?;
        cancel.disarm();
        let id = begun.staging.name().to_owned();
        let mut checkpoints = self.checkpoints.0.lock().unwrap_or_else(PoisonError::into_inner);
        checkpoints.insert(id.clone(), Arc::new(begun));
        Ok(CheckpointId(id))
    }

    /// Second pass; see [`crate::state::SlotFiles::copy_paused`]. Dropped, it stops
    /// soon, and the checkpoint is good for nothing any more.
    pub(super) async fn freeze_checkpoint(&self, id: &CheckpointId) -> Result<(), Error> {
        let checkpoint = self.checkpoint(id)?;
        let cancel = CancelOnDrop(Some(Arc::clone(&checkpoint.is_cancelled)));
        let result = self.run(Lane::Paused, move |inner| checkpoint.freeze(inner)).await;
        if result.is_ok() {
            cancel.disarm();
        }
        result
    }

    /// Throws a checkpoint away, and a copying that is under way with it.
    pub(super) async fn end_checkpoint(&self, id: &CheckpointId) -> Result<(), Error> {
        let removed = self.checkpoints.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&id.0);
        let Some(checkpoint) = removed else { return Ok(()) };
        checkpoint.is_cancelled.store(true, Ordering::Relaxed);
        self.run(Lane::Bulk, move |_| {
            // Held while a copy is being made.
            let _copy = checkpoint.copy.lock().unwrap_or_else(PoisonError::into_inner);
            checkpoint.staging.remove()
        })
        .await
    }

    /// Returns a frozen tree.
    pub(super) fn frozen(&self, id: &CheckpointId, key: &Key) -> Result<Arc<Frozen>, Error> {
        let checkpoint = self.checkpoint(id)?;
        let copy = checkpoint.copy.lock().unwrap_or_else(PoisonError::into_inner);
        match &copy.frozen {
            Some(frozen) if checkpoint.key == *key => Ok(Arc::clone(frozen)),
            _ => Err(refused(id, "it is no frozen copy of this state")),
        }
    }

    fn checkpoint(&self, id: &CheckpointId) -> Result<Arc<Checkpoint>, Error> {
        let checkpoints = self.checkpoints.0.lock().unwrap_or_else(PoisonError::into_inner);
        checkpoints.get(&id.0).map(Arc::clone).ok_or_else(|| refused(id, "there is no such checkpoint"))
    }
}

fn refused(id: &CheckpointId, reason: &'static str) -> Error {
    disk::Error::new("open checkpoint", &id.0, std::io::Error::other(reason)).into()
}

// === impl Checkpoint ===

impl Checkpoint {
    fn begin(
        inner: &Arc<Inner>,
        slot: SlotId,
        key: Key,
        is_cancelled: Arc<AtomicBool>,
    ) -> Result<Self, Error> {
        let state = live_tree(inner, &slot, &key)?;
        let staging = Staging::make(inner, "checkpoint")?;
        let dir = staging.dir()?;
        let tree = dir.ensure_dir(TREE)?;
        // The file system's own clock, which is the one that stamps the files.
        let now = dir.stat()?.changed;
        let is_trusted = !state.is_in_memory()?
            && state
                .sync_file_system()
                .inspect_err(
                    |error| tracing::warn!(%error, cause = %error.source, "every file is copied under pause"),
                )
                .is_ok();
        let racy_since = if is_trusted { racy_since(inner.times, now, true) } else { None };
        // A first claim's slot has no shell yet.
        let holder = inner.slot_dir(&slot)?.ensure_dir(SHELL)?;
        let index = if is_trusted { inner.index_of(&holder) } else { None };
        let chains = inner.moves.of(&key.digest());
        let is_vouched = |entry: &Entry| {
            let vouches = |index: &Index| index.vouches(&entry.path, &entry.stat, &chains);
            entry.stat.kind == Kind::File && index.as_ref().is_some_and(vouches)
        };
        let entries = disk::list(&state, &Limits::TREE, Missing::Skip, |_, _| !is_set(&is_cancelled))
            .map_err(|error| Error::of_list(&key, error))?;
        let (mut seen, mut vouched) = (HashMap::new(), HashSet::new());
        for entry in entries {
            if is_vouched(&entry) {
                vouched.insert(entry.path.clone());
                seen.insert(entry.path, entry.stat);
            } else if let Some(stat) = copy_entry(&state, &tree, &entry, Missing::Skip, &is_cancelled)? {
                seen.insert(entry.path, stat);
            }
        }
        let rests_on = index.map(|index| index.manifest);
        let copy = Copy { seen, vouched, rests_on, racy_since, frozen: None };
        Ok(Self { slot, key, is_cancelled, copy: Mutex::new(copy), staging })
    }

    fn freeze(&self, inner: &Inner) -> Result<(), Error> {
        let mut copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
        let state = live_tree(inner, &self.slot, &self.key)?;
        let tree = self.staging.dir()?.open_dir(TREE)?;
        let entries = disk::list(&state, &Limits::TREE, Missing::Error, |_, _| !is_set(&self.is_cancelled))
            .map_err(|error| Error::of_list(&self.key, error))?;
        let mut seen = std::mem::take(&mut copy.seen);
        let mut vouched = std::mem::take(&mut copy.vouched);
        for entry in &entries {
            let before = seen.remove(&entry.path);
            if is_unchanged(before.as_ref(), &entry.stat, copy.racy_since) {
                continue;
            }
            if before.is_some() && !vouched.remove(&entry.path) {
                remove_path(&tree, &entry.path)?;
            }
            copy_entry(&state, &tree, entry, Missing::Error, &self.is_cancelled)?;
        }
        for path in seen.keys() {
            vouched.remove(path);
            remove_path(&tree, path)?;
        }
        // Last, for copying changes the times of directories.
        for entry in entries.iter().filter(|entry| entry.stat.kind == Kind::Directory) {
            let copied = tree.open_dir(&entry.path)?;
            state.open_dir(&entry.path)?.copy_attributes_to(&copied)?;
            set_dir(&copied, &entry.stat)?;
        }
        let root = state.stat()?;
        state.copy_attributes_to(&tree)?;
        set_dir(&tree, &root)?;
        if is_set(&self.is_cancelled) {
            return Err(cancelled(&tree));
        }
        let holder = inner.slot_dir(&self.slot)?.open_dir(SHELL)?;
        // Where no time is trusted, none is later than the first.
        let since = Some(copy.racy_since.unwrap_or(Time { seconds: i64::MIN, nanoseconds: 0 }));
        let rests_on = copy.rests_on.clone();
        copy.frozen = Some(Arc::new(Frozen { tree, holder, since, root, entries, vouched, rests_on }));
        Ok(())
    }
}

// === impl Frozen ===

impl Frozen {
    /// Returns whether what is not in the copy is in the snapshot with this manifest.
    pub(super) fn rests_on(&self, manifest: Option<&str>) -> bool {
        self.vouched.is_empty() || (manifest.is_some() && self.rests_on.as_deref() == manifest)
    }

    /// Returns whether a file is as the newest snapshot has it, and not in the copy.
    pub(super) fn is_vouched(&self, path: &[u8]) -> bool {
        self.vouched.contains(path)
    }

    /// Returns the tree as it was under pause, without what is excluded.
    pub(super) fn walk(&self, exclude: &GlobSet) -> Walk {
        let mut excluded: HashSet<&[u8]> = HashSet::new();
        let mut kept = Vec::new();
        for entry in &self.entries {
            let (parent, _) = disk::split_last(&entry.path);
            if excluded.contains(parent) || is_excluded(exclude, &entry.path) {
                excluded.insert(&entry.path);
            } else {
                kept.push(entry.clone());
            }
        }
        Walk { root: self.root, entries: kept, is_copy: true }
    }
}

/// Decides whether the first pass's copy of an entry still holds. A directory is
/// its entries, which are judged one by one, and metadata, which is set anyway.
fn is_unchanged(before: Option<&Stat>, now: &Stat, racy_since: Option<Time>) -> bool {
    let Some(before) = before else { return false };
    if now.kind == Kind::Directory {
        return before.kind == Kind::Directory;
    }
    let is_racy = racy_since.is_none_or(|since| now.modified >= since || now.changed >= since);
    before == now && !is_racy
}

/// Copies one entry with its metadata; answers what it was when the copying began.
fn copy_entry(
    from: &Dir,
    to: &Dir,
    entry: &Entry,
    missing: Missing,
    is_cancelled: &AtomicBool,
) -> Result<Option<Stat>, Error> {
    if is_set(is_cancelled) {
        return Err(cancelled(to));
    }
    let (parent, name) = disk::split_last(&entry.path);
    // A parent that is not in the copy was no directory any more, or was gone.
    let Some(to) = to.open_dir(parent).optional()? else { return Ok(None) };
    match entry.stat.kind {
        Kind::Other => Ok(Some(entry.stat)),
        Kind::Directory => {
            to.make_dir(name)?;
            Ok(Some(entry.stat))
        }
        Kind::Symlink => {
            to.make_symlink(name, entry.target.as_deref().unwrap_or_default())?;
            to.set_owner_of(name, entry.stat.uid, entry.stat.gid)?;
            to.set_modified_of(name, entry.stat.modified)?;
            Ok(Some(entry.stat))
        }
        Kind::File => {
            let opened = from.open_dir(parent).and_then(|from| from.open_file(name));
            let (file, stat) = match opened {
                Ok(opened) => opened,
                Err(error) if missing == Missing::Skip && is_other_now(&error) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            copy_file(&file, &stat, &to, name, is_cancelled)?;
            Ok(Some(stat))
        }
    }
}

fn copy_file(
    from: &File,
    stat: &Stat,
    to: &Dir,
    name: &[u8],
    is_cancelled: &AtomicBool,
) -> Result<(), Error> {
    let failed = |operation| move |error| disk::Error::new(operation, to.label(name), error);
    let file = to.create_file(name)?;
    let has_room = || to.free_bytes().is_ok_and(|free| free >= SPARE_BYTES);
    let copied = if has_room() {
        disk::copy_contents(from, &file, || !is_set(is_cancelled) && has_room())
    } else {
        Err(Errno::NOSPC.into())
    };
    let copied = copied.and_then(|()| disk::copy_attributes(from, &file));
    copied
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::Interrupted if !is_set(is_cancelled) => Errno::NOSPC.into(),
            _ => error,
        })
        .map_err(failed("copy"))?;
    disk::set_file_metadata(&file, (stat.uid, stat.gid), stat.mode, stat.modified)
        .map_err(failed("set metadata of"))?;
    Ok(())
}

/// Removes a path from the copy; what is above it may be gone or something else already.
fn remove_path(tree: &Dir, path: &[u8]) -> Result<(), Error> {
    let (parent, name) = disk::split_last(path);
    match tree.open_dir(parent) {
        Ok(parent) => Ok(disk::remove(&parent, name)?),
        Err(error) if is_other_now(&error) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Gone, or no longer of the kind it was.
fn is_other_now(error: &disk::Error) -> bool {
    error.is_missing()
        || [Errno::LOOP, Errno::NOTDIR, Errno::ISDIR, Errno::INVAL].iter().any(|e| error.is(*e))
}

fn live_tree(inner: &Inner, slot: &SlotId, key: &Key) -> Result<Dir, Error> {
    let slot_dir = inner.slot_dir(slot)?;
    let state = slot_dir.open_dir(STATE)?;
    if OwnerNote::read(&slot_dir)?.is_some_and(|note| note.is_of(key)) {
        Ok(state)
    } else {
        Err(Error::NotEmpty { slot: slot.clone() })
    }
}

fn set_dir(dir: &Dir, stat: &Stat) -> Result<(), Error> {
    dir.set_owner(stat.uid, stat.gid)?;
    dir.set_mode(stat.mode)?;
    Ok(dir.set_modified(stat.modified)?)
}

fn is_set(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

fn cancelled(tree: &Dir) -> Error {
    disk::Error::new("copy", tree.label(b""), std::io::Error::from(std::io::ErrorKind::Interrupted)).into()
}

// === impl CancelOnDrop ===

impl CancelOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(flag) = &self.0 {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Stat = Stat {
        kind: Kind::File,
        mode: 0o600,
        uid: 1,
        gid: 1,
        bytes: 5,
        modified: Time { seconds: 100, nanoseconds: 0 },
        changed: Time { seconds: 100, nanoseconds: 0 },
        device: 1,
        inode: 1,
    };

    #[test]
    fn a_copy_holds_only_when_nothing_can_have_changed() {
        let since = Some(Time { seconds: 200, nanoseconds: 0 });
        let at = |seconds| Time { seconds, nanoseconds: 0 };
        assert!(is_unchanged(Some(&OLD), &OLD, since));
        assert!(!is_unchanged(None, &OLD, since), "it was not copied");
        assert!(!is_unchanged(Some(&OLD), &OLD, None), "stats are not trusted here");
        for (now, why) in [
            (Stat { bytes: 6, ..OLD }, "size"),
            (Stat { inode: 2, ..OLD }, "another file of that name"),
            (Stat { modified: at(101), ..OLD }, "mtime"),
            (Stat { changed: at(101), ..OLD }, "ctime, though the mtime was set back"),
            (Stat { mode: 0o644, ..OLD }, "mode"),
            (Stat { kind: Kind::Symlink, ..OLD }, "kind"),
        ] {
            assert!(!is_unchanged(Some(&OLD), &now, since), "{why}");
        }
        let racy = Stat { changed: at(200), ..OLD };
        assert!(!is_unchanged(Some(&racy), &racy, since), "it may have changed again in the same tick");
        let dir = Stat { kind: Kind::Directory, ..racy };
        assert!(is_unchanged(Some(&dir), &Stat { changed: at(300), ..dir }, since));
    }
}
