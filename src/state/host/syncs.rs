//! Trees that are noted to be on disk once they are.
//!
//! Neither a restore nor a save waits for the disk. What the disk has is written down
//! beside the tree afterwards (`index::note_synced`): without the note a power loss
//! makes the tree one that must be compared with the store (see `mend`), and what a
//! program did to it meanwhile one that an operator must judge.
//!
//! One sync of the file system does for all trees that wait. After a restore it begins
//! at once; after a save it waits a little for others, for the disk is busy then.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::disk::Dir;

use super::index;

/// How long a saved tree waits for others.
const SAVED_WAIT: Duration = Duration::from_secs(5);
/// Trees that may wait; what is beyond has no note.
const WAITING: usize = 1_024;

/// Trees that wait for a sync. It knows nothing of the node, so that what is under way
/// does not keep the state directory locked.
#[derive(Debug, Default)]
pub(super) struct Syncs(Mutex<State>);

/// Keeps notes from being written while it lives.
pub(super) struct NoNotes<'a> {
    _state: MutexGuard<'a, State>,
}

/// One tree: the directory beside it, and the snapshot that it is.
#[derive(Debug)]
struct Waiting {
    key_digest: String,
    holder: Dir,
    manifest: String,
    is_urgent: bool,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Waiting>,
    /// Those that the sync under way is for.
    syncing: Vec<Waiting>,
    is_running: bool,
    is_scheduled: bool,
}

// === impl Syncs ===

impl Syncs {
    /// Notes a restored tree as soon as it is on disk.
    pub(super) fn restored(self: &Arc<Self>, key_digest: &str, holder: Dir, manifest: String) {
        self.add(Waiting { key_digest: key_digest.to_owned(), holder, manifest, is_urgent: true });
    }

    /// Notes a saved tree when it is on disk.
    pub(super) fn saved(self: &Arc<Self>, key_digest: &str, holder: Dir, manifest: String) {
        if !index::is_synced(&holder, &manifest) {
            self.add(Waiting { key_digest: key_digest.to_owned(), holder, manifest, is_urgent: false });
        }
    }

    /// Forgets a key's tree, which goes: no note is written beside it any more.
    pub(super) fn forget(&self, key_digest: &str) {
        let mut state = self.lock();
        state.waiting.retain(|tree| tree.key_digest != key_digest);
        state.syncing.retain(|tree| tree.key_digest != key_digest);
    }

    /// Keeps notes from being written: a directory that is removed must stay empty.
    pub(super) fn hold(&self) -> NoNotes<'_> {
        NoNotes { _state: self.lock() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(self: &Arc<Self>, tree: Waiting) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let mut state = self.lock();
        state.waiting.retain(|waiting| waiting.key_digest != tree.key_digest);
        if state.waiting.len() >= WAITING {
            return;
        }
        let is_urgent = tree.is_urgent;
        state.waiting.push(tree);
        if !is_urgent {
            self.schedule(&mut state, &runtime);
        } else if !state.is_running {
            self.start(&mut state, &runtime);
        }
    }

    /// Begins a sync when some time has passed. Untracked, as the sync itself: a tree
    /// without its note only counts as unsynced.
    fn schedule(self: &Arc<Self>, state: &mut State, runtime: &tokio::runtime::Handle) {
        if state.is_scheduled {
            return;
        }
        state.is_scheduled = true;
        let syncs = Arc::clone(self);
        drop(runtime.spawn(async move {
            tokio::time::sleep(SAVED_WAIT).await;
            let mut state = syncs.lock();
            state.is_scheduled = false;
            if !state.is_running && !state.waiting.is_empty() {
                syncs.start(&mut state, &tokio::runtime::Handle::current());
            }
        }));
    }

    fn start(self: &Arc<Self>, state: &mut State, runtime: &tokio::runtime::Handle) {
        state.is_running = true;
        let (syncs, at_end) = (Arc::clone(self), runtime.clone());
        drop(runtime.spawn_blocking(move || syncs.run(&at_end)));
    }

    /// Syncs for those that wait, and again while any waits that is urgent.
    fn run(self: &Arc<Self>, runtime: &tokio::runtime::Handle) {
        let mut is_first = true;
        loop {
            let of_all = {
                let mut state = self.lock();
                if !is_first && !state.waiting.iter().any(|tree| tree.is_urgent) {
                    state.is_running = false;
                    if !state.waiting.is_empty() {
                        self.schedule(&mut state, runtime);
                    }
                    return;
                }
                is_first = false;
                state.syncing = std::mem::take(&mut state.waiting);
                // All are on one file system.
                state.syncing.first().map(|tree| tree.holder.open_dir(b""))
            };
            let synced = match of_all {
                Some(holder) => holder.and_then(|holder| holder.sync_file_system()),
                None => Ok(()),
            };
            // Noted under the lock, which `hold` and `forget` take.
            let mut state = self.lock();
            for tree in std::mem::take(&mut state.syncing) {
                let noted = match &synced {
                    Ok(()) => index::note_synced(&tree.holder, &tree.manifest),
                    Err(error) => Err(error.clone().into()),
                };
                match noted {
                    Err(error) if !is_gone(&error) => {
                        tracing::warn!(manifest = tree.manifest, %error, "a tree is not known to be on disk");
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Says whether the tree was removed meanwhile.
fn is_gone(error: &super::Error) -> bool {
    matches!(error, super::Error::Disk { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}
