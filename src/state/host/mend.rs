//! After a power loss: a tree that was not on disk yet is compared with the store.
//!
//! Neither a restore nor a save waits for the disk. What the power takes then is
//! content that was not written back, of files whose names, sizes and times may be
//! there: such a file has zeros, or ends early. It must never become the newest
//! snapshot. So a tree that another boot of this host left, and that was not
//! known to be on disk, is compared with the newest snapshot before it is saved or
//! given to a program: each file that is in both. What the program did not change
//! is put back from the store; what it changed is kept; where that cannot be told,
//! the tree is kept and not published, and an operator decides.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, PoisonError},
};

use crate::{
    disk::{self, Dir, Kind, Limits, Missing, Optional, Stat, Time},
    model::{Key, Owner, SnapshotRef},
};

use super::{
    Error, Fill, FillFrom, HostFiles, Inner, Lane,
    fill::TREE,
    index::{self, Index},
    restore::{Parents, Whom},
    snapshot::newest_record,
    staging::Staging,
};

/// Content is lost in pages; file systems write at least this much.
const BLOCK_BYTES: usize = 512;

/// What a difference between a file and the newest snapshot's shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Difference {
    /// Zeros where the snapshot has something.
    has_lost: bool,
    /// Something else than the snapshot has, and than zeros.
    has_other: bool,
}

/// What is to be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is as it should be.
    Keep,
    /// It lost content, and the program had not changed it.
    PutBack,
    /// It lost content, and may have some that only it has.
    Unclear,
}

/// Decides about a file that the newest snapshot has, too.
/// `was` and `is` are its size and mtime there and here.
fn judge(was: (u64, Time), is: (u64, Time), difference: Difference) -> Verdict {
    let is_shorter = is.0 < was.0;
    if !difference.has_lost && !is_shorter {
        return Verdict::Keep;
    }
    // Whoever writes or truncates moves the time; only who then sets it back leaves
    // something else behind.
    if was.1 == is.1 && !difference.has_other && is.0 <= was.0 {
        return Verdict::PutBack;
    }
    Verdict::Unclear
}

/// Compares block by block what both files have.
fn compare(here: &File, there: &File, bytes: u64) -> std::io::Result<Difference> {
    let mut difference = Difference::default();
    let (mut own, mut other) = (vec![0; 1024 * 1024], vec![0; 1024 * 1024]);
    let mut at = 0;
    while at < bytes {
        let length = usize::try_from(bytes - at).unwrap_or(usize::MAX).min(own.len());
        let (own, other) = (&mut own[..length], &mut other[..length]);
        here.read_exact_at(own, at)?;
        there.read_exact_at(other, at)?;
        for (own, other) in own.chunks(BLOCK_BYTES).zip(other.chunks(BLOCK_BYTES)) {
            if own == other {
                continue;
            }
            let is_zero = own.iter().all(|byte| *byte == 0);
            difference.has_lost |= is_zero;
            difference.has_other |= !is_zero;
        }
        at += length as u64;
    }
    Ok(difference)
}

// === impl HostFiles ===

impl HostFiles {
    /// Puts a cached tree back in order after a power loss may have torn it; see the
    /// module. `newest` is the newest snapshot.
    ///
    /// # Errors
    /// [`Error::Torn`] when what is to be done cannot be told; those of a restore.
    pub(super) async fn mend(&self, key: &Key, run_as: Owner, newest: &SnapshotRef) -> Result<(), Error> {
        tracing::warn!(%key, "the power was lost before this tree was known to be on disk; it is compared with the store");
        let (whole, _) = self.restore_aside(key, Whom::For(run_as, None), newest).await?;
        let (key, name) = (key.clone(), newest.manifest.clone());
        let mended = self.run(Lane::Restore, move |inner| {
            inner.put_back(&key, whole.tree())?;
            inner.note_mended(&key, &name)
        });
        mended.await
    }

    /// Mends a cached tree that was there when this server started, before a program
    /// gets it. Asks the store only after a power loss.
    ///
    /// # Errors
    /// As [`HostFiles::mend`].
    pub(super) async fn mend_left_over(&self, fill: &Fill) -> Result<(), Error> {
        let (key, key_digest) = (&fill.key, fill.key.digest());
        if fill.from != FillFrom::Cache || !self.inner.is_left_over(&key_digest) {
            return Ok(());
        }
        let Some(holder) = self.inner.layout.cache.open_dir(key_digest.as_bytes()).optional()? else {
            return Ok(());
        };
        if !self.inner.may_be_torn(&holder, None)? {
            self.inner.note_looked_at(&key_digest);
            return Ok(());
        }
        let newest = newest_record(self.inner.store.as_ref(), key, &key_digest).await?;
        let snapshot = newest.and_then(|record| record.snapshot(&key_digest));
        let Some(snapshot) = snapshot else { return Ok(()) };
        self.mend(key, fill.previous_owner.unwrap_or(fill.run_as), &snapshot).await
    }
}

// === impl Inner ===

impl Inner {
    /// Returns whether a power loss may have torn the tree beside `holder`: another
    /// boot left it, and it was not known to be on disk. Beside a restored or saved
    /// tree lies always an index; what the power left of it may be no whole one. Without
    /// `manifest` the tree is the snapshot that the index says.
    pub(super) fn may_be_torn(&self, holder: &Dir, manifest: Option<&str>) -> Result<bool, Error> {
        let has_index = holder.stat_of(index::INDEX).optional()?.is_some();
        if !has_index || holder.is_in_memory()? {
            return Ok(false);
        }
        let index = Index::read(holder);
        let own = index.as_ref().map(|index| index.manifest.as_str()).filter(|own| !own.is_empty());
        if manifest.or(own).is_some_and(|manifest| index::is_synced(holder, manifest)) {
            return Ok(false);
        }
        Ok(index.is_none_or(|index| index.boot != self.boot))
    }

    /// Notes that a tree was compared with the store in this boot.
    fn note_mended(&self, key: &Key, manifest: &str) -> Result<(), Error> {
        let holder = self.layout.cache.open_dir(key.digest().as_bytes())?;
        let nothing = || Index::of(manifest.to_owned(), String::new(), std::iter::empty(), None);
        let mut index = Index::read(&holder).unwrap_or_else(nothing);
        index.boot.clone_from(&self.boot);
        index.write(&holder)?;
        self.note_looked_at(&key.digest());
        Ok(())
    }

    /// Notes that a tree of the last run needs no second look.
    fn note_looked_at(&self, key_digest: &str) {
        self.left_over.lock().unwrap_or_else(PoisonError::into_inner).remove(key_digest);
    }

    /// Returns whether a key's tree was in the cache when this server started, and
    /// has not been looked at since.
    pub(super) fn is_left_over(&self, key_digest: &str) -> bool {
        let left_over = self.left_over.lock().unwrap_or_else(PoisonError::into_inner);
        left_over.contains(key_digest)
    }

    /// Compares every file that a cached tree and the restored one both have; judges
    /// first all, then puts back.
    fn put_back(self: &Arc<Self>, key: &Key, whole: &Dir) -> Result<(), Error> {
        let tree = self.layout.cache.open_dir(key.digest().as_bytes())?.open_dir(TREE)?;
        let list = |dir: &Dir| {
            let listed = disk::list(dir, &Limits::TREE, Missing::Error, |_, _| true);
            listed.map_err(|error| Error::of_list(key, error))
        };
        let (entries, restored) = (list(&tree)?, list(whole)?);
        let (mut own, mut others) = (Parents::new(&tree), Parents::new(whole));
        let mut lost = Vec::new();
        for there in restored.iter().filter(|entry| entry.stat.kind == Kind::File) {
            let found = entries.binary_search_by(|entry| entry.path.cmp(&there.path));
            let here = found.ok().and_then(|at| entries.get(at));
            let Some(here) = here.filter(|entry| entry.stat.kind == Kind::File) else { continue };
            let (parent, name) = own.of(&here.path)?;
            let (other_parent, _) = others.of(&here.path)?;
            let ((file, is), (other, was)) = (parent.open_file(name)?, other_parent.open_file(name)?);
            let difference = compare(&file, &other, is.bytes.min(was.bytes))
                .map_err(|error| disk::Error::new("read", parent.label(name), error))?;
            match judge((was.bytes, was.modified), (is.bytes, is.modified), difference) {
                Verdict::Keep => {}
                Verdict::PutBack => lost.push((&here.path, is)),
                Verdict::Unclear => {
                    let reason = format!(
                        "content of {} is gone, and its program had changed it",
                        disk::shown(&here.path)
                    );
                    return Err(Error::Torn { key: key.clone(), reason });
                }
            }
        }
        for (path, stat) in lost {
            self.put_back_file(&tree, whole, path, &stat)?;
            tracing::warn!(%key, path = disk::shown(path), "a file that a power loss had torn is put back from the store");
        }
        Ok(())
    }

    /// Puts one file back: aside, then by a rename, so that a crash leaves no half of it.
    fn put_back_file(
        self: &Arc<Self>,
        tree: &Dir,
        whole: &Dir,
        path: &[u8],
        stat: &Stat,
    ) -> Result<(), Error> {
        let (parent, name) = disk::split_last(path);
        let (to, (from, _)) = (tree.open_dir(parent)?, whole.open_dir(parent)?.open_file(name)?);
        let staging = Staging::reserve(self, "mend");
        let staged = staging.name().as_bytes();
        let failed =
            |operation| move |error| disk::Error::new(operation, self.layout.staging.label(staged), error);
        let file = self.layout.staging.create_file(staged)?;
        disk::copy_contents(&from, &file, || true).map_err(failed("copy"))?;
        disk::set_file_metadata(&file, (stat.uid, stat.gid), stat.mode, stat.modified)
            .map_err(failed("set metadata of"))?;
        file.sync_all().map_err(failed("sync"))?;
        let times = to.stat()?.modified;
        self.layout.staging.replace(staged, &to, name)?;
        Ok(to.set_modified(times)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_program_did_not_change_is_put_back_and_what_it_did_is_kept() {
        const SAME: Difference = Difference { has_lost: false, has_other: false };
        const LOST: Difference = Difference { has_lost: true, has_other: false };
        const OTHER: Difference = Difference { has_lost: false, has_other: true };
        const BOTH: Difference = Difference { has_lost: true, has_other: true };
        let at = |seconds| Time { seconds, nanoseconds: 0 };
        let was = (5_000, at(100));
        for (bytes, seconds, difference, expected, why) in [
            (5_000, 100, LOST, Verdict::PutBack, "zeros, and the time says nobody wrote"),
            (0, 100, SAME, Verdict::PutBack, "empty, and the time says nobody wrote"),
            (4_096, 100, SAME, Verdict::PutBack, "cut off"),
            (4_096, 100, LOST, Verdict::PutBack, "cut off, with zeros"),
            (5_000, 100, OTHER, Verdict::Keep, "written, and the time set back"),
            (5_000, 100, BOTH, Verdict::Unclear, "written, the time set back, and zeros"),
            (6_000, 100, LOST, Verdict::Unclear, "longer"),
            (5_000, 200, OTHER, Verdict::Keep, "written"),
            (9_000, 200, SAME, Verdict::Keep, "appended to"),
            (5_000, 200, LOST, Verdict::Unclear, "zeros, by the program or not"),
            (5_000, 200, BOTH, Verdict::Unclear, "written, and zeros"),
            (0, 200, SAME, Verdict::Unclear, "emptied, by the program or not"),
            (4_000, 200, OTHER, Verdict::Unclear, "shorter, by the program or not"),
        ] {
            assert_eq!(judge(was, (bytes, at(seconds)), difference), expected, "{why}");
        }
    }

    #[test]
    fn zeros_are_told_from_other_content() {
        let file = |content: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(content, 0).unwrap();
            file
        };
        let whole = vec![7; 2_000_000];
        let with = |at: usize, content: &[u8]| {
            let mut other = whole.clone();
            other[at..at + content.len()].copy_from_slice(content);
            compare(&file(&other), &file(&whole), 2_000_000).unwrap()
        };
        assert_eq!(with(0, &[]), Difference::default());
        assert_eq!(with(1_500_160, &[0; 512]), Difference { has_lost: true, has_other: false });
        assert_eq!(with(1_500_160, &[0; 100]), Difference { has_lost: false, has_other: true });
        assert_eq!(with(1_999_999, &[8]), Difference { has_lost: false, has_other: true });
    }
}
