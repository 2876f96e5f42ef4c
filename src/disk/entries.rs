//! From a tree to a plain list of what is in it.

use std::{collections::VecDeque, ops::ControlFlow};

use rustix::io::Errno;

use super::{Dir, Error, Kind, Stat, shown};

/// One entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is, relative to the root, names joined by slashes; any bytes but zero.
    pub path: Vec<u8>,
    /// What it is.
    pub stat: Stat,
    /// Of a symbolic link: where it says it leads.
    pub target: Option<Vec<u8>>,
}

/// What a tree may have at most; a list is made by somebody who does not trust it.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Entries.
    pub entries: usize,
    /// Names in one path.
    pub depth: usize,
    /// Bytes of one path.
    pub path_bytes: usize,
    /// Bytes of all paths and targets together.
    pub total_bytes: usize,
}

/// What it means that an entry is gone when it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// The tree is at rest: an error.
    Error,
    /// The tree is live: it is left out.
    Skip,
}

/// Says why a tree cannot be listed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ListError {
    /// The disk refuses.
    #[error(transparent)]
    Disk(#[from] Error),
    /// It has more than allowed.
    #[error("{0}")]
    Limit(String),
}

// === impl Limits ===

impl Limits {
    /// What a saved tree may have: a path may be eight times `PATH_MAX`, and a list
    /// of the largest tree takes some 300 MiB of memory.
    pub const TREE: Self =
        Self { entries: 1_000_000, depth: 2_000, path_bytes: 32 * 1024, total_bytes: 128 * 1024 * 1024 };
}

/// Lists what is below `root` (not the root itself), sorted by path, so that a
/// directory comes before what is in it.
///
/// `keep` decides by path and stat; what it refuses is left out with all below it.
/// Directories are opened again by their path from the root, so depth costs
/// neither stack nor descriptors, and a directory swapped for a link is an error
/// (or left out), never a way out.
///
/// # Errors
/// [`ListError::Limit`] names the limit and the path that broke it.
pub fn list(
    root: &Dir,
    limits: &Limits,
    missing: Missing,
    mut keep: impl FnMut(&[u8], &Stat) -> bool,
) -> Result<Vec<Entry>, ListError> {
    let mut found: Vec<Entry> = Vec::new();
    let mut total_bytes = 0_usize;
    let mut open: VecDeque<(Vec<u8>, usize)> = VecDeque::from([(Vec::new(), 1)]);
    while let Some((parent, depth)) = open.pop_back() {
        let dir = match root.open_dir(&parent) {
            Ok(dir) => dir,
            Err(error) if missing == Missing::Skip && is_gone(&error) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut failed: Option<ListError> = None;
        let read = dir.each_name(|name| {
            let step = look(&dir, &parent, name, missing).and_then(|entry| {
                let Some(entry) = entry else { return Ok(()) };
                if !keep(&entry.path, &entry.stat) {
                    return Ok(());
                }
                total_bytes += entry.path.len() + entry.target.as_ref().map_or(0, Vec::len);
                check(limits, found.len() + 1, depth, total_bytes, &entry)?;
                if entry.stat.kind == Kind::Directory {
                    open.push_back((entry.path.clone(), depth + 1));
                }
                found.push(entry);
                Ok(())
            });
            match step {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        });
        match read {
            Ok(()) => {}
            // A directory that was removed while it was open cannot be read.
            Err(error) if missing == Missing::Skip && is_gone(&error) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(error) = failed {
            return Err(error);
        }
    }
    found.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn look(dir: &Dir, parent: &[u8], name: &[u8], missing: Missing) -> Result<Option<Entry>, ListError> {
    let looked = dir.stat_of(name).and_then(|stat| {
        let target = (stat.kind == Kind::Symlink).then(|| dir.read_link(name)).transpose()?;
        Ok((stat, target))
    });
    let (stat, target) = match looked {
        Ok(looked) => looked,
        Err(error) if missing == Missing::Skip && is_gone(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut path = Vec::with_capacity(parent.len() + 1 + name.len());
    if !parent.is_empty() {
        path.extend_from_slice(parent);
        path.push(b'/');
    }
    path.extend_from_slice(name);
    Ok(Some(Entry { path, stat, target }))
}

/// Gone, or no longer what the listing said: a live tree may change at any time.
fn is_gone(error: &Error) -> bool {
    error.is_missing() || error.is(Errno::LOOP) || error.is(Errno::NOTDIR) || error.is(Errno::INVAL)
}

fn check(
    limits: &Limits,
    entries: usize,
    depth: usize,
    total_bytes: usize,
    entry: &Entry,
) -> Result<(), ListError> {
    let broken = [
        (entries > limits.entries, "entries", limits.entries),
        (depth > limits.depth, "names in one path", limits.depth),
        (entry.path.len() > limits.path_bytes, "bytes in one path", limits.path_bytes),
        (total_bytes > limits.total_bytes, "bytes of all paths together", limits.total_bytes),
    ];
    match broken.into_iter().find(|(broken, ..)| *broken) {
        None => Ok(()),
        Some((_, what, most)) => {
            let start = &entry.path[..entry.path.len().min(120)];
            Err(ListError::Limit(format!("more than {most} {what}, at {}", shown(start))))
        }
    }
}
