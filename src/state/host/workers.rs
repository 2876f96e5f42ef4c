//! Few blocking threads for file work, in lanes that do not wait for each other.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::Error;

/// What a piece of work competes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// Moves of entries; renames of one file system do not run in parallel anyway.
    Move,
    /// Restores: a claim waits for them.
    Restore,
    /// Reading for saves. Each may hold an open pack.
    Save,
    /// Copies for checkpoints.
    Copy,
    /// The second copy, under pause: never waits behind a long one.
    Paused,
    /// Removal and walks.
    Bulk,
}

/// Runs file work, at most so many at a time in each lane.
#[derive(Debug)]
pub(super) struct Workers {
    move_: Arc<Semaphore>,
    restore: Arc<Semaphore>,
    save: Arc<Semaphore>,
    copy: Arc<Semaphore>,
    paused: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
}

// === impl Workers ===

impl Workers {
    /// Starts no thread yet.
    pub(super) fn new() -> Self {
        let lane = |permits| Arc::new(Semaphore::new(permits));
        Self {
            move_: lane(2),
            restore: lane(4),
            save: lane(4),
            copy: lane(2),
            paused: lane(4),
            bulk: lane(2),
        }
    }

    /// Runs `work` on a blocking thread when the lane has room.
    ///
    /// # Cancel safety
    /// Work that has begun goes on to its end and keeps its place in the lane.
    ///
    /// # Errors
    /// Those of `work`; a panic in it is [`Error::Disk`].
    pub(super) async fn run<T: Send + 'static>(
        &self,
        lane: Lane,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let lane = match lane {
            Lane::Move => &self.move_,
            Lane::Restore => &self.restore,
            Lane::Save => &self.save,
            Lane::Copy => &self.copy,
            Lane::Paused => &self.paused,
            Lane::Bulk => &self.bulk,
        };
        let place = Arc::clone(lane).acquire_owned().await.expect("the semaphores are never closed");
        let done = tokio::task::spawn_blocking(move || {
            let _place = place;
            work()
        });
        match done.await {
            Ok(result) => result,
            Err(error) => Err(Error::Disk {
                operation: "run",
                path: "file work".into(),
                source: Arc::new(std::io::Error::other(error)),
            }),
        }
    }
}
