//! Entries move: cache → slot at a claim, slot → cache at a release.

use crate::{
    disk::{self, Dir, Kind, Limits, Missing, Optional, Stat},
    model::{Key, Owner, SlotId, SnapshotRef},
};

use super::{
    Captured, Error, Fill, FillFrom, INLINE_ENTRIES, Inner, Lane, UNCLAIMED,
    index::{Index, Times},
    restore::FROM_NOTE,
    slot::{OwnerNote, STATE, close},
};

/// The tree in its directory of the cache.
pub(super) const TREE: &[u8] = b"tree";
/// In a slot's directory: its tree's directory of the cache, emptied.
pub(super) const SHELL: &[u8] = b"shell";
/// The mode of a state directory that never had one recorded.
const FIRST_MODE: u32 = 0o700;
/// Names are read this many at a time.
const BATCH: usize = 1_024;

/// What a slot holds, as far as a fill is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// Nothing: it is blank.
    No,
    /// This very fill has begun, and perhaps ended.
    Same,
    /// The same tenant's tree, of another fill: parked, or captured half.
    OtherEpoch,
}

/// Who moves a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mover {
    /// Into a slot, where a program may wait for it.
    Fill,
    /// Out of a slot whose program is gone.
    Capture,
}

/// How long moving a tree keeps its thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Length {
    /// So little that changing threads costs more.
    Short,
    /// Many moves.
    Moves,
    /// A walk of the whole tree, too.
    Walk,
}

// === impl Length ===

impl Length {
    /// Returns where work of this length belongs: no claim's moves wait for a walk.
    pub(super) fn lane(self) -> Lane {
        match self {
            Self::Short | Self::Moves => Lane::Move,
            Self::Walk => Lane::Bulk,
        }
    }
}

// === impl Inner: fill ===

impl Inner {
    /// Moves the cached tree into the slot and hands the directories over. May be
    /// repeated after a crash at any point.
    ///
    /// # Errors
    /// [`Error::NotEmpty`] when the slot holds something that is not this key's;
    /// [`Error::Disk`] when the cache should have a tree and has none (P3).
    pub(super) fn fill(&self, fill: &Fill) -> Result<u64, Error> {
        let slot_dir = self.slot_dir(&fill.slot)?;
        let state = slot_dir.open_dir(STATE).optional()?;
        let begun = self.begun(fill, &slot_dir, state.as_ref())?;
        let Some(state) = state else {
            self.write_note(fill, &slot_dir)?;
            self.hand_over_beside(fill)?;
            return Ok(0);
        };
        let cached = self.cached_tree(&fill.key)?;
        let root = state.stat()?;
        if cached.is_none() && begun != Begun::Same && fill.from != FillFrom::Empty {
            let path = self.layout.cache.label(fill.key.digest().as_bytes());
            return Err(disk::Error::new("open", path, rustix::io::Errno::NOENT).into());
        }
        if let (Some(tree), Some(previous)) = (&cached, owner_to_replace(fill)) {
            self.change_owner(&fill.key, tree, previous, fill.run_as)?;
        }
        // The note first: from the first entry on, it is known whose they are.
        if begun != Begun::Same {
            self.write_note(fill, &slot_dir)?;
        }
        let mut entries = 0;
        if let Some(tree) = &cached {
            let of_tree = tree.stat()?;
            entries = self.move_tree(&fill.key, tree, &state, Mover::Fill)?;
            tree.copy_attributes_to(&state)?;
            state.set_modified(of_tree.modified)?;
            hand_over(&state, fill.run_as, of_tree.mode)?;
        } else if !is_handed_over(&root) {
            hand_over(&state, fill.run_as, FIRST_MODE)?;
        }
        self.hand_over_beside(fill)?;
        self.keep_shell(&fill.key, &slot_dir)?;
        Ok(entries)
    }

    /// Returns how long a fill will keep its thread.
    pub(super) fn length_of_fill(&self, fill: &Fill) -> Result<Length, Error> {
        let Some(tree) = self.cached_tree(&fill.key)? else { return Ok(Length::Short) };
        if owner_to_replace(fill).is_some() {
            return Ok(Length::Walk);
        }
        let is_short = tree.names(INLINE_ENTRIES + 1)?.len() <= INLINE_ENTRIES;
        Ok(if is_short { Length::Short } else { Length::Moves })
    }

    /// Returns whether the tree of `snapshot` is in the cache, the slot, or both,
    /// from a fill that did not end.
    pub(super) fn is_restored(&self, fill: &Fill, snapshot: &SnapshotRef) -> Result<bool, Error> {
        let slot_dir = self.slot_dir(&fill.slot)?;
        let Some(state) = slot_dir.open_dir(STATE).optional()? else { return Ok(true) };
        if self.begun(fill, &slot_dir, Some(&state))? == Begun::Same {
            return Ok(true);
        }
        let Some(cached) = self.layout.cache.open_dir(fill.key.digest().as_bytes()).optional()? else {
            return Ok(false);
        };
        Ok(super::restore::restored_from(&cached)?.as_deref() == Some(&snapshot.manifest))
    }

    fn begun(&self, fill: &Fill, slot_dir: &Dir, state: Option<&Dir>) -> Result<Begun, Error> {
        let Some(state) = state else { return Ok(Begun::No) };
        let is_empty = state.is_empty()?;
        let note = OwnerNote::read(slot_dir)?;
        let manifest = manifest_of(fill);
        match note {
            Some(note) if note.is_of(&fill.key) && note.epoch == fill.epoch && note.manifest == manifest => {
                Ok(Begun::Same)
            }
            Some(note) if note.is_of(&fill.key) && !is_empty => Ok(Begun::OtherEpoch),
            _ if is_empty => Ok(Begun::No),
            _ => Err(Error::NotEmpty { slot: fill.slot.clone() }),
        }
    }

    fn write_note(&self, fill: &Fill, slot_dir: &Dir) -> Result<(), Error> {
        let note = OwnerNote {
            tenant: fill.key.tenant.clone(),
            workload: fill.key.workload.clone(),
            epoch: fill.epoch,
            manifest: manifest_of(fill),
        };
        note.write(slot_dir)
    }

    /// Hands over secrets and comm, as far as the slot has them.
    fn hand_over_beside(&self, fill: &Fill) -> Result<(), Error> {
        let name = fill.slot.as_str().as_bytes();
        if let Some(secrets) = self.layout.secrets.open_dir(name).optional()? {
            hand_over(&secrets, fill.run_as, 0o500)?;
        }
        if let Some(comm) = self.layout.sockets.open_dir(name).optional()? {
            hand_over(&comm, fill.run_as, 0o700)?;
        }
        Ok(())
    }

    /// Opens a key's tree in the cache.
    pub(super) fn cached_tree(&self, key: &Key) -> Result<Option<Dir>, Error> {
        match self.layout.cache.open_dir(key.digest().as_bytes()).optional()? {
            None => Ok(None),
            Some(dir) => Ok(dir.open_dir(TREE).optional()?),
        }
    }

    /// Keeps the emptied directory of a key in the slot, until its tree comes back:
    /// what is not in the cache is never taken for a tree without entries. A rename,
    /// because making and removing directories costs several times as much.
    fn keep_shell(&self, key: &Key, slot_dir: &Dir) -> Result<(), Error> {
        let key_digest = key.digest();
        let Some(dir) = self.layout.cache.open_dir(key_digest.as_bytes()).optional()? else { return Ok(()) };
        dir.remove_file(FROM_NOTE).optional()?;
        let _no_notes = self.syncs.hold();
        remove_shell(slot_dir)?;
        Ok(self.layout.cache.move_to(key_digest.as_bytes(), slot_dir, SHELL)?)
    }

    /// Opens the key's directory in the cache: the one there, the slot's shell, or a new one.
    fn take_shell(&self, key: &Key, slot_dir: &Dir) -> Result<Dir, Error> {
        let key_digest = key.digest();
        match slot_dir.move_to(SHELL, &self.layout.cache, key_digest.as_bytes()).optional() {
            Ok(_) => {}
            // A fill crashed between handing over and keeping the shell; an older one is left.
            Err(error) if error.is(rustix::io::Errno::EXIST) => {
                let _no_notes = self.syncs.hold();
                remove_shell(slot_dir)?;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(self.layout.cache.ensure_dir(key_digest.as_bytes())?)
    }

    /// Gives what was `previous`'s to `run_as`: a root without capabilities cannot
    /// even read another user's private files. Done before the first move, so a
    /// repetition finds the whole tree in one place.
    fn change_owner(&self, key: &Key, tree: &Dir, previous: Owner, run_as: Owner) -> Result<(), Error> {
        let entries = disk::list(tree, &Limits::TREE, Missing::Error, |_, _| true)
            .map_err(|error| Error::of_list(key, error))?;
        let map = |of: &Dir, name: Option<&[u8]>| change_access_lists(of, name, previous, run_as);
        map(tree, None)?;
        for entry in entries {
            if matches!(entry.stat.kind, Kind::File | Kind::Directory) {
                let (parent, name) = disk::split_last(&entry.path);
                match entry.stat.kind {
                    Kind::Directory => map(&tree.open_dir(&entry.path)?, None)?,
                    _ => map(&tree.open_dir(parent)?, Some(name))?,
                }
            }
            let (uid, gid) = map_owner((entry.stat.uid, entry.stat.gid), previous, run_as);
            if (uid, gid) == (entry.stat.uid, entry.stat.gid) {
                continue;
            }
            let (parent, name) = disk::split_last(&entry.path);
            let parent = tree.open_dir(parent)?;
            parent.set_owner_of(name, uid, gid)?;
            // The kernel takes the set-id bits of a file whose owner changes.
            if entry.stat.kind == Kind::File && entry.stat.mode & 0o6000 != 0 {
                let (file, _) = parent.open_file(name)?;
                rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(entry.stat.mode))
                    .map_err(|errno| disk::Error::new("chmod", parent.label(name), errno))?;
            }
        }
        Ok(())
    }
}

// === impl Inner: capture ===

impl Inner {
    /// Moves the slot's tree into the cache and closes the state directory. May be
    /// repeated after a crash at any point.
    ///
    /// # Errors
    /// [`Error::NotEmpty`] when the slot holds something that is not this key's.
    pub(super) fn capture(&self, slot: &SlotId, key: &Key) -> Result<Captured, Error> {
        let slot_dir = self.slot_dir(slot)?;
        let Some(state) = slot_dir.open_dir(STATE).optional()? else {
            return Ok(Captured { handed_over: false, is_cached: self.cached_tree(key)?.is_some() });
        };
        // A power loss may leave the note's name and not its content. The caller's journal
        // says whose the slot was, and a slot never holds two tenants' trees (P4).
        let is_theirs = match OwnerNote::read(&slot_dir)? {
            Some(note) => note.is_of(key),
            None => OwnerNote::is_torn(&slot_dir)?,
        };
        if !is_theirs {
            // Never filled for this key, or for nobody: there is nothing of it here.
            return if state.is_empty()? {
                Ok(Captured { handed_over: false, is_cached: self.cached_tree(key)?.is_some() })
            } else {
                Err(Error::NotEmpty { slot: slot.clone() })
            };
        }
        let root = state.stat()?;
        if !is_handed_over(&root) {
            // A capture that had ended, or a fill that had not: then the cache still
            // has the tree's root and what is known of it.
            if let Some(tree) = self.cached_tree(key)? {
                let modified = tree.stat()?.modified;
                self.move_tree(key, &state, &tree, Mover::Capture)?;
                tree.set_modified(modified)?;
            } else if !state.is_empty()? {
                return Err(Error::NotEmpty { slot: slot.clone() });
            }
            close(&state)?;
            // Only a fill that did not end leaves the note of where its tree came from.
            let cached = self.layout.cache.open_dir(key.digest().as_bytes()).optional()?;
            let handed_over = match &cached {
                Some(dir) => super::restore::restored_from(dir)?.is_none(),
                None => false,
            };
            return Ok(Captured { handed_over, is_cached: self.cached_tree(key)?.is_some() });
        }
        let dir = self.take_shell(key, &slot_dir)?;
        let tree = dir.ensure_dir(TREE)?;
        // A program may have changed the tree: it is no snapshot's any more.
        dir.remove_file(FROM_NOTE).optional()?;
        tree.set_owner(root.uid, root.gid)?;
        tree.set_mode(root.mode)?;
        state.copy_attributes_to(&tree)?;
        self.move_tree(key, &state, &tree, Mover::Capture)?;
        tree.set_modified(root.modified)?;
        close(&state)?;
        Ok(Captured { handed_over: true, is_cached: true })
    }

    /// Moves every top-level entry and remembers the stats of before and after, as far
    /// as nothing can hide between them; answers how many there were.
    fn move_tree(&self, key: &Key, from: &Dir, to: &Dir, mover: Mover) -> Result<u64, Error> {
        let is_followed = match (self.times, mover) {
            (Times::Exact, _) | (Times::Coarse, Mover::Capture) => true,
            (Times::Coarse, Mover::Fill) | (Times::Untrusted, _) => false,
        };
        let mut moved = Vec::new();
        let entries = move_entries(from, to, is_followed.then_some(&mut moved))?;
        if is_followed {
            self.moves.add(&key.digest(), &moved);
        }
        Ok(entries)
    }

    /// Returns whether a capture moves so little that changing threads costs more.
    pub(super) fn is_short_capture(&self, slot: &SlotId) -> Result<bool, Error> {
        match self.state_of(slot)? {
            None => Ok(true),
            Some(state) => Ok(state.names(INLINE_ENTRIES + 1)?.len() <= INLINE_ENTRIES),
        }
    }
}

/// Removes a slot's shell, which is empty.
///
/// # Errors
/// [`Error::Disk`] with `ENOTEMPTY` should it hold anything after all.
pub(super) fn remove_shell(slot_dir: &Dir) -> Result<(), Error> {
    let Some(shell) = slot_dir.open_dir(SHELL).optional()? else { return Ok(()) };
    shell.remove_file(FROM_NOTE).optional()?;
    Index::remove(&shell)?;
    shell.remove_dir(TREE).optional()?;
    slot_dir.remove_dir(SHELL).optional()?;
    Ok(())
}

/// Says who owns an entry when the program's user changes.
pub(super) fn map_owner((uid, gid): (u32, u32), previous: Owner, run_as: Owner) -> (u32, u32) {
    (if uid == previous.uid { run_as.uid } else { uid }, if gid == previous.gid { run_as.gid } else { gid })
}

/// Says what an access list is when the program's user changes: entries that name the
/// old user or its group name the new one. `None`: it is no list, or stays as it is.
pub(super) fn map_access_list(name: &[u8], list: &[u8], previous: Owner, run_as: Owner) -> Option<Vec<u8>> {
    // As the kernel gives it: version 2, then entries of tag, permissions and id.
    const VERSION: [u8; 4] = [2, 0, 0, 0];
    const USER: u8 = 2;
    const GROUP: u8 = 8;
    if !disk::is_access_list(name) || !list.starts_with(&VERSION) {
        return None;
    }
    let mut mapped = list.to_vec();
    let (entries, _) = mapped[VERSION.len()..].as_chunks_mut::<8>();
    for [tag, high, _, _, id @ ..] in entries {
        let named = u32::from_le_bytes(*id);
        let (uid, gid) = map_owner((named, named), previous, run_as);
        match (*tag, *high) {
            (USER, 0) => *id = uid.to_le_bytes(),
            (GROUP, 0) => *id = gid.to_le_bytes(),
            _ => {}
        }
    }
    (mapped != list).then_some(mapped)
}

/// Maps the access lists of a directory, or of a file in it.
fn change_access_lists(dir: &Dir, file: Option<&[u8]>, previous: Owner, run_as: Owner) -> Result<(), Error> {
    let file = match file {
        Some(name) => Some((dir.open_file(name)?.0, name)),
        None => None,
    };
    let attributes = match &file {
        Some((file, name)) => {
            disk::attributes(file).map_err(|error| disk::Error::new("listxattr", dir.label(name), error))?
        }
        None => dir.attributes()?,
    };
    for (attribute, value) in attributes {
        let Some(mapped) = map_access_list(&attribute, &value, previous, run_as) else { continue };
        match &file {
            Some((file, name)) => disk::set_attribute(file, &attribute, &mapped)
                .map_err(|error| disk::Error::new("setxattr", dir.label(name), error))?,
            None => dir.set_attribute(&attribute, &mapped)?,
        }
    }
    Ok(())
}

/// Answers whose entries must change hands. A restore has seen to it already.
fn owner_to_replace(fill: &Fill) -> Option<Owner> {
    let is_restored = matches!(fill.from, FillFrom::Snapshot(_));
    fill.previous_owner.filter(|previous| *previous != fill.run_as && !is_restored)
}

fn manifest_of(fill: &Fill) -> Option<String> {
    match &fill.from {
        FillFrom::Snapshot(snapshot) => Some(snapshot.manifest.clone()),
        FillFrom::Empty | FillFrom::Cache => None,
    }
}

fn is_handed_over(root: &Stat) -> bool {
    root.uid != UNCLAIMED.uid
}

fn hand_over(dir: &Dir, run_as: Owner, mode: u32) -> Result<(), Error> {
    dir.set_owner(run_as.uid, run_as.gid)?;
    Ok(dir.set_mode(mode)?)
}

/// Moves every top-level entry; answers how many there were.
fn move_entries(
    from: &Dir,
    to: &Dir,
    mut moved: Option<&mut Vec<(Vec<u8>, Stat, Stat)>>,
) -> Result<u64, Error> {
    let mut count = 0;
    loop {
        let names = from.names(BATCH)?;
        if names.is_empty() {
            return Ok(count);
        }
        for name in names {
            count += 1;
            let Some(moved) = &mut moved else {
                from.move_to(&name, to, &name)?;
                continue;
            };
            let before = from.stat_of(&name)?;
            from.move_to(&name, to, &name)?;
            // A program that watches the slot may have it removed already.
            if let Some(after) = to.stat_of(&name).optional()? {
                moved.push((name, before, after));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_previous_owner_is_replaced() {
        let (previous, run_as) = (Owner { uid: 1_000, gid: 100 }, Owner { uid: 2_000, gid: 200 });
        for (before, after) in
            [((1_000, 100), (2_000, 200)), ((1_000, 0), (2_000, 0)), ((0, 100), (0, 200)), ((7, 8), (7, 8))]
        {
            assert_eq!(map_owner(before, previous, run_as), after);
        }
    }

    #[test]
    fn an_access_list_names_the_new_user() {
        const ACCESS: &[u8] = b"system.posix_acl_access";
        let (previous, run_as) = (Owner { uid: 1_000, gid: 100 }, Owner { uid: 2_000, gid: 200 });
        let list = |entries: &[(u8, u32)]| {
            let entries = entries
                .iter()
                .flat_map(|(tag, id)| [vec![*tag, 0, 7, 0], id.to_le_bytes().to_vec()].concat());
            [2, 0, 0, 0].into_iter().chain(entries).collect::<Vec<u8>>()
        };
        // Owner, user, group, named group, mask: ids mean something in named ones only.
        let before = list(&[(1, 1_000), (2, 1_000), (2, 100), (4, 100), (8, 100), (8, 1_000), (16, 1_000)]);
        let after = list(&[(1, 1_000), (2, 2_000), (2, 100), (4, 100), (8, 200), (8, 1_000), (16, 1_000)]);
        assert_eq!(map_access_list(ACCESS, &before, previous, run_as), Some(after.clone()));
        assert_eq!(map_access_list(ACCESS, &after, previous, run_as), None, "nothing is left to do");
        assert_eq!(map_access_list(b"user.x", &before, previous, run_as), None);
        for no_list in [&b""[..], b"\x02\0\0", b"\x03\0\0\0\x02\0\x07\0\xe8\x03\0\0"] {
            assert_eq!(map_access_list(ACCESS, no_list, previous, run_as), None);
        }
    }
}
