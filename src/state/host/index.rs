//! What is known of a tree's entries without reading them: the index.
//!
//! Beside a tree (`cache/<digest>/index`, and in the slot's shell while it is
//! claimed) lies what each entry's stat was when the newest snapshot was taken.
//! An entry whose stat is the same still has the content that the snapshot's
//! manifest says. The index is worth something only with that very manifest and
//! only while it has the bytes of its own digest; without it everything is read.
//!
//! A stat that is the same proves that nothing changed, except where a change can
//! leave it as it was. Each such case is decided here, in pure functions:
//!
//! - *Racily clean.* Two changes within one tick of the file system's clock give
//!   the same times. Since Linux 6.13 the common file systems give a change after
//!   a stat a time of its own ([`Times::Exact`], found out by trying). Elsewhere
//!   what changed less than [`RACY_SECONDS`] before the recording is not recorded.
//! - *Mapped files.* A page that is dirty already takes further stores without a
//!   new time. A tree at rest is mapped by nobody, and the first store through a
//!   new mapping sets the times. Of a live tree, which is synced first, only what
//!   is older than the sync is recorded.
//! - *tmpfs.* A page that was read through a writable mapping takes stores without
//!   any time at all, so no stat is trusted there, not even at rest.
//! - *Set back.* Anyone may set an mtime back; the ctime tells. Another file of the
//!   same name, size and times has another inode. A clock that steps back makes
//!   times differ, and what lies in the future of the recording is racy.
//! - *Moves.* Renaming an entry sets its ctime, and fill and capture rename every
//!   top-level entry. Each is stat before and after ([`Moves`]): what differs in
//!   the ctime alone is the same still. A write between rename and stat is told by
//!   its mtime. Where times are not exact, a write soon after a fill's moves could
//!   hide, and they are not followed.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::disk::{self, Dir, Entry, Kind, Optional, Stat, Time};

use super::{
    Error,
    snapshot::{Digest, Item, Manifest, Node},
};

/// In a key's directory of the cache.
pub(super) const INDEX: &[u8] = b"index";
const INDEX_NEW: &[u8] = b"index.new";
/// Beside it: the snapshot whose restored or saved tree is known to be on disk.
const SYNCED: &[u8] = b"synced";
const SYNCED_NEW: &[u8] = b"synced.new";

/// Where times are not exact. Some file systems count in two seconds.
const RACY_SECONDS: i64 = 2;
const MAGIC: &[u8] = b"boilerhouse index 1\n";
const DIGEST_BYTES: usize = 32;
/// A million entries with paths of 128 MiB together, and their stamps.
const INDEX_BYTES: u64 = 256 * 1024 * 1024;
/// Moved entries that are remembered, of all trees together.
const MOVED_ENTRIES: usize = 100_000;
/// Moves of one entry that are remembered.
const MOVES: usize = 4;

/// What the times of this file system are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Times {
    /// A change after a stat always has another time.
    Exact,
    /// Changes within one tick have the same time.
    Coarse,
    /// Content changes without any.
    Untrusted,
}

/// What of a stat tells one version of an entry from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    bytes: u64,
    modified: Time,
    changed: Time,
    device: u64,
    inode: u64,
}

/// The stamps of the entries of one snapshot's tree.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Index {
    /// The manifest, as the store names it.
    pub(super) manifest: String,
    /// The boot of this host in which it was recorded.
    pub(super) boot: String,
    stamps: HashMap<Vec<u8>, Stamp>,
}

/// Top-level entries that were moved, and their stamps before and after.
#[derive(Debug, Default)]
pub(super) struct Moves(Mutex<Moved>);

#[derive(Debug, Default)]
struct Moved {
    entries: usize,
    keys: HashMap<String, Chains>,
}

/// Stamps of one and the same content, by the entry's name, oldest first.
pub(super) type Chains = HashMap<Vec<u8>, Vec<Stamp>>;

/// The entries of a tree that need not be read, with what the manifest says of them.
#[derive(Debug, Default)]
pub(super) struct Known {
    manifest: Option<Arc<Manifest>>,
    items: HashMap<Vec<u8>, usize>,
}

// === Decisions ===

/// Says whether a later change of an entry with this stat is sure to show in its
/// stat. `since`: times from then on may be had twice; `None`: none may.
pub(super) fn is_settled(stat: &Stat, since: Option<Time>) -> bool {
    since.is_none_or(|since| stat.modified < since && stat.changed < since)
}

/// Says whether an entry is as the index has it, now or before it was moved.
fn is_same(recorded: &Stamp, now: &Stamp, moves: Option<&Vec<Stamp>>) -> bool {
    recorded == now || moves.is_some_and(|moves| moves.last() == Some(now) && moves.contains(recorded))
}

/// Adds one move to what is known of an entry; `None`: nothing is known any more.
fn follow(before: Option<Vec<Stamp>>, from: &Stat, to: &Stat) -> Option<Vec<Stamp>> {
    let is_moved_only = *to == Stat { changed: to.changed, ..*from };
    if !is_moved_only {
        return None;
    }
    let (from, to) = (Stamp::from(from), Stamp::from(to));
    let mut moves = before.filter(|moves| moves.last() == Some(&from)).unwrap_or_else(|| vec![from]);
    moves.push(to);
    if moves.len() > MOVES {
        moves.remove(0);
    }
    Some(moves)
}

/// Answers from which time on a recording at `now` trusts no stamp. `is_live`: the
/// tree was synced after `now`, and a program writes to it.
pub(super) fn racy_since(times: Times, now: Time, is_live: bool) -> Option<Time> {
    match (times, is_live) {
        (Times::Exact, false) => None,
        (Times::Exact, true) => Some(now),
        (Times::Coarse | Times::Untrusted, _) => Some(now.earlier(RACY_SECONDS)),
    }
}

// === impl Times ===

impl Times {
    /// Finds out what the times of `dir`'s file system are worth, with a file of
    /// its own there.
    ///
    /// # Errors
    /// [`Error::Disk`]
    pub(super) fn of(dir: &Dir, name: &[u8]) -> Result<Self, Error> {
        if dir.is_in_memory()? {
            return Ok(Self::Untrusted);
        }
        let file = dir.create_file(name)?;
        let tried = Self::try_out(&file).map_err(|error| disk::Error::new("stat", dir.label(name), error));
        dir.remove_file(name)?;
        Ok(tried?)
    }

    /// Changes a file several times, much faster than any clock ticks.
    fn try_out(file: &File) -> std::io::Result<Self> {
        const CHANGES: u32 = 8;
        const ATTEMPTS: u32 = 50;
        const TICK: Duration = Duration::from_millis(1);
        for _ in 0..ATTEMPTS {
            let began = Instant::now();
            let mut last = Stat::of_file(file)?.changed;
            let mut is_exact = true;
            for change in 0..CHANGES {
                file.set_permissions(std::fs::Permissions::from_mode(0o600 | (change % 2) << 6))?;
                let now = Stat::of_file(file)?.changed;
                is_exact &= now > last;
                last = now;
            }
            if !is_exact {
                return Ok(Self::Coarse);
            }
            if began.elapsed() < TICK {
                return Ok(Self::Exact);
            }
        }
        Ok(Self::Coarse)
    }
}

// === impl Stamp ===

impl From<&Stat> for Stamp {
    fn from(stat: &Stat) -> Self {
        Self {
            bytes: stat.bytes,
            modified: stat.modified,
            changed: stat.changed,
            device: stat.device,
            inode: stat.inode,
        }
    }
}

// === impl Index ===

impl Index {
    /// Records the tree of the snapshot with this manifest: of `entries`, those
    /// whose later change is sure to show.
    pub(super) fn of<'a>(
        manifest: String,
        boot: String,
        entries: impl Iterator<Item = (&'a [u8], &'a Stat)>,
        since: Option<Time>,
    ) -> Self {
        let settled = entries.filter(|(_, stat)| is_settled(stat, since));
        let stamps = settled.map(|(path, stat)| (path.to_vec(), Stamp::from(stat))).collect();
        Self { manifest, boot, stamps }
    }

    /// Returns whether an entry still has the content that it had in the snapshot.
    pub(super) fn vouches(&self, path: &[u8], stat: &Stat, chains: &Chains) -> bool {
        let Some(recorded) = self.stamps.get(path) else { return false };
        is_same(recorded, &Stamp::from(stat), chains.get(path))
    }

    /// Reads the index in a key's directory; `None` when there is none that is whole.
    pub(super) fn read(holder: &Dir) -> Option<Self> {
        let (file, stat) = holder.open_file(INDEX).ok()?;
        if stat.bytes > INDEX_BYTES {
            return None;
        }
        let mut body = Vec::with_capacity(usize::try_from(stat.bytes).unwrap_or(0));
        file.take(INDEX_BYTES).read_to_end(&mut body).ok()?;
        let index = Self::decode(&body);
        if index.is_none() {
            tracing::debug!(path = holder.label(INDEX), "an index is damaged; the tree is read");
        }
        index
    }

    /// Writes the index into a key's directory, in place of the one there.
    ///
    /// # Errors
    /// [`Error::Disk`]; then the one before is there, or none.
    pub(super) fn write(&self, holder: &Dir) -> Result<(), Error> {
        replace(holder, INDEX_NEW, INDEX, &self.encode())
    }

    /// Removes the index and what is beside it from a key's directory.
    ///
    /// # Errors
    /// [`Error::Disk`]
    pub(super) fn remove(holder: &Dir) -> Result<(), Error> {
        for name in [INDEX, INDEX_NEW, SYNCED, SYNCED_NEW] {
            holder.remove_file(name).optional()?;
        }
        Ok(())
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = MAGIC.to_vec();
        put_bytes(&mut body, self.manifest.as_bytes());
        put_bytes(&mut body, self.boot.as_bytes());
        body.extend_from_slice(&(self.stamps.len() as u64).to_le_bytes());
        for (path, stamp) in &self.stamps {
            put_bytes(&mut body, path);
            for number in [stamp.bytes, stamp.device, stamp.inode] {
                body.extend_from_slice(&number.to_le_bytes());
            }
            for time in [stamp.modified, stamp.changed] {
                body.extend_from_slice(&time.seconds.to_le_bytes());
                body.extend_from_slice(&time.nanoseconds.to_le_bytes());
            }
        }
        let digest = Digest::of(&body);
        body.extend_from_slice(&digest.0);
        body
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let (content, digest) = body.split_at_checked(body.len().checked_sub(DIGEST_BYTES)?)?;
        if Digest::of(content).0 != digest {
            return None;
        }
        let mut rest = content.strip_prefix(MAGIC)?;
        let manifest = String::from_utf8(take_bytes(&mut rest)?.to_vec()).ok()?;
        let boot = String::from_utf8(take_bytes(&mut rest)?.to_vec()).ok()?;
        let count = u64::from_le_bytes(take(&mut rest)?);
        let mut stamps = HashMap::new();
        for _ in 0..count {
            let path = take_bytes(&mut rest)?.to_vec();
            let mut number = || take(&mut rest).map(u64::from_le_bytes);
            let (bytes, device, inode) = (number()?, number()?, number()?);
            let mut time = || {
                let seconds = i64::from_le_bytes(take(&mut rest)?);
                Some(Time { seconds, nanoseconds: u32::from_le_bytes(take(&mut rest)?) })
            };
            let (modified, changed) = (time()?, time()?);
            stamps.insert(path, Stamp { bytes, modified, changed, device, inode });
        }
        rest.is_empty().then_some(Self { manifest, boot, stamps })
    }
}

fn put_bytes(body: &mut Vec<u8>, bytes: &[u8]) {
    body.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    body.extend_from_slice(bytes);
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(*taken)
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(u64::from_le_bytes(take(rest)?)).ok()?;
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

/// Notes that the tree of this snapshot is on disk, as far as no program has changed it.
///
/// # Errors
/// [`Error::Disk`]
pub(super) fn note_synced(holder: &Dir, manifest: &str) -> Result<(), Error> {
    replace(holder, SYNCED_NEW, SYNCED, manifest.as_bytes())
}

/// Returns whether the tree of this snapshot is known to be on disk.
pub(super) fn is_synced(holder: &Dir, manifest: &str) -> bool {
    let Ok((file, _)) = holder.open_file(SYNCED) else { return false };
    let mut text = String::new();
    file.take(4_096).read_to_string(&mut text).is_ok() && text == manifest
}

fn replace(holder: &Dir, new: &[u8], name: &[u8], content: &[u8]) -> Result<(), Error> {
    holder.remove_file(new).optional()?;
    let mut file = holder.create_file(new)?;
    file.write_all(content).map_err(|error| disk::Error::new("write", holder.label(new), error))?;
    Ok(holder.replace(new, holder, name)?)
}

// === impl Moves ===

impl Moves {
    /// Remembers that an entry of a key's tree was moved.
    pub(super) fn add(&self, key_digest: &str, moved: &[(Vec<u8>, Stat, Stat)]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut chains = all.keys.remove(key_digest).unwrap_or_default();
        all.entries -= chains.len();
        for (name, from, to) in moved {
            let before = chains.remove(name);
            if let Some(moves) = follow(before, from, to) {
                chains.insert(name.clone(), moves);
            }
        }
        // What is not remembered is read again.
        if !chains.is_empty() && all.entries + chains.len() <= MOVED_ENTRIES {
            all.entries += chains.len();
            all.keys.insert(key_digest.to_owned(), chains);
        }
    }

    /// Returns what is remembered of a key's tree.
    pub(super) fn of(&self, key_digest: &str) -> Chains {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.keys.get(key_digest).cloned().unwrap_or_default()
    }

    /// Forgets what `index`, which was just written, has by its newest stamp.
    pub(super) fn settle(&self, key_digest: &str, index: &Index) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut chains) = all.keys.remove(key_digest) else { return };
        all.entries -= chains.len();
        chains.retain(|name, moves| moves.last() != index.stamps.get(name.as_slice()));
        if !chains.is_empty() {
            all.entries += chains.len();
            all.keys.insert(key_digest.to_owned(), chains);
        }
    }

    /// Forgets a key's tree.
    pub(super) fn forget(&self, key_digest: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(chains) = all.keys.remove(key_digest) {
            all.entries -= chains.len();
        }
    }
}

// === impl Known ===

impl Known {
    /// Takes those of `entries` for known that `is_vouched` says are as in the
    /// manifest, and that are there of the same kind. Both are sorted by path.
    pub(super) fn of(
        manifest: Option<Arc<Manifest>>,
        entries: &[Entry],
        is_vouched: impl Fn(&Entry) -> bool,
    ) -> Self {
        let mut known = Self { manifest, items: HashMap::new() };
        let Some(manifest) = &known.manifest else { return known };
        let mut number = 0;
        for entry in entries {
            while manifest.items.get(number).is_some_and(|item| item.path.0 < entry.path) {
                number += 1;
            }
            let item = manifest.items.get(number).filter(|item| item.path.0 == entry.path);
            if item.is_some_and(|item| is_alike(item, entry)) && is_vouched(entry) {
                known.items.insert(entry.path.clone(), number);
            }
        }
        known
    }

    /// Returns what the manifest says of an entry that need not be read.
    pub(super) fn item(&self, path: &[u8]) -> Option<&Item> {
        let number = *self.items.get(path)?;
        self.manifest.as_ref()?.items.get(number)
    }
}

fn is_alike(item: &Item, entry: &Entry) -> bool {
    match &item.node {
        Node::Directory => entry.stat.kind == Kind::Directory,
        Node::File { bytes, .. } => entry.stat.kind == Kind::File && *bytes == entry.stat.bytes,
        Node::Symlink { target } => entry.target.as_ref() == Some(&target.0),
        // What the first of its names has is taken over; should that be another now, it is read.
        Node::HardLink { .. } => false,
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

    fn at(seconds: i64) -> Time {
        Time { seconds, nanoseconds: 0 }
    }

    #[test]
    fn a_stamp_is_the_same_only_when_nothing_can_have_changed() {
        let index = Index::of("m".into(), "b".into(), [(&b"f"[..], &OLD)].into_iter(), None);
        assert!(index.vouches(b"f", &OLD, &Chains::new()));
        for (now, why) in [
            (Stat { bytes: 6, ..OLD }, "size"),
            (Stat { inode: 2, ..OLD }, "another file of that name"),
            (Stat { device: 2, ..OLD }, "another file system"),
            (Stat { modified: at(101), ..OLD }, "mtime"),
            (Stat { changed: at(101), ..OLD }, "ctime, though the mtime was set back"),
            (Stat { changed: at(99), ..OLD }, "the clock stepped back"),
        ] {
            assert!(!index.vouches(b"f", &now, &Chains::new()), "{why}");
        }
        assert!(!index.vouches(b"g", &OLD, &Chains::new()), "another name");
    }

    #[test]
    fn what_may_change_again_with_the_same_times_is_not_recorded() {
        for (times, is_live, seconds, is_recorded) in [
            (Times::Exact, false, 200, true),
            (Times::Exact, false, 900, true),
            (Times::Exact, true, 199, true),
            (Times::Exact, true, 200, false),
            (Times::Exact, true, 900, false),
            (Times::Coarse, false, 197, true),
            (Times::Coarse, false, 198, false),
            (Times::Coarse, true, 199, false),
            (Times::Coarse, false, 900, false),
        ] {
            let since = racy_since(times, at(200), is_live);
            for stat in [Stat { modified: at(seconds), ..OLD }, Stat { changed: at(seconds), ..OLD }] {
                assert_eq!(is_settled(&stat, since), is_recorded, "{times:?} live {is_live} at {seconds}");
            }
        }
    }

    #[test]
    fn moves_are_followed_only_while_nothing_else_happens() {
        let moved = |seconds| Stat { changed: at(seconds), ..OLD };
        let index = Index::of("m".into(), "b".into(), [(&b"f"[..], &OLD)].into_iter(), None);
        let moves = Moves::default();
        moves.add("k", &[(b"f".to_vec(), OLD, moved(200))]);
        moves.add("k", &[(b"f".to_vec(), moved(200), moved(300))]);
        assert!(index.vouches(b"f", &moved(300), &moves.of("k")));
        assert!(!index.vouches(b"f", &moved(200), &moves.of("k")), "it is not where it was");
        assert!(!index.vouches(b"f", &moved(301), &moves.of("k")), "changed after the last move");
        assert!(!index.vouches(b"f", &moved(300), &moves.of("other")));
        moves.add("k", &[(b"f".to_vec(), moved(301), moved(400))]);
        assert!(!index.vouches(b"f", &moved(400), &moves.of("k")), "changed between two moves");
        for (to, why) in [
            (Stat { modified: at(200), ..moved(200) }, "written"),
            (Stat { mode: 0o644, ..moved(200) }, "its mode changed"),
            (Stat { inode: 2, ..moved(200) }, "replaced"),
        ] {
            assert_eq!(follow(None, &OLD, &to), None, "{why} while it was moved");
        }
        // A newer index with the newest stamp needs no moves; what is forgotten is read.
        let newer = Index::of("m".into(), "b".into(), [(&b"f"[..], &moved(400))].into_iter(), None);
        moves.settle("k", &index);
        assert!(!moves.of("k").is_empty());
        moves.settle("k", &newer);
        assert!(moves.of("k").is_empty());
        moves.add("k", &[(b"f".to_vec(), OLD, moved(200))]);
        moves.forget("k");
        assert!(!index.vouches(b"f", &moved(200), &moves.of("k")));
        assert_eq!(moves.0.lock().unwrap().entries, 0);
    }

    #[test]
    fn memory_of_moves_is_bounded() {
        let moves = Moves::default();
        let many: Vec<_> = (0..MOVED_ENTRIES)
            .map(|n| (n.to_string().into_bytes(), OLD, Stat { changed: at(200), ..OLD }))
            .collect();
        moves.add("a", &many);
        moves.add("b", &many[..1]);
        assert!(moves.of("b").is_empty() && moves.of("a").len() == MOVED_ENTRIES);
        moves.forget("a");
        moves.add("b", &many[..1]);
        assert_eq!(moves.of("b").len(), 1);
    }

    #[test]
    fn an_index_is_read_as_it_was_written_or_not_at_all() {
        let strange = Stat { modified: Time { seconds: i64::MIN, nanoseconds: 999_999_999 }, ..OLD };
        let entries = [(&b"a/\xff"[..], &strange), (&b"b"[..], &OLD)];
        let index = Index::of("t/d/m/1".into(), "boot".into(), entries.into_iter(), None);
        let body = index.encode();
        assert_eq!(Index::decode(&body), Some(index));
        for at in 0..body.len() {
            assert_eq!(Index::decode(&body[..at]), None, "cut at {at}");
            let mut other = body.clone();
            other[at] ^= 1;
            assert_eq!(Index::decode(&other), None, "another byte at {at}");
        }
    }

    #[test]
    fn what_times_are_worth_is_found_out() {
        let in_memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = Dir::open(in_memory.path()).unwrap();
        assert_eq!(Times::of(&dir, b"probe").unwrap(), Times::Untrusted);
        let on_disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let dir = Dir::open(on_disk.path()).unwrap();
        // Which of the two depends on the kernel; that it is one of them, and that nothing is left, does not.
        assert_ne!(Times::of(&dir, b"probe").unwrap(), Times::Untrusted);
        assert!(dir.is_empty().unwrap());
    }
}
