//! Shutdown, tracked tasks and named crash points.
//!
//! Nothing in this crate is spawned bare: a task has a name, is counted, and is
//! waited for at shutdown. The first signal *drains* (no new work, what runs
//! may end), the second *aborts*.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

/// Spawns and tracks named tasks; clones share one set.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    tracker: TaskTracker,
    drain: CancellationToken,
    abort: CancellationToken,
    next: AtomicU64,
    live: Mutex<BTreeMap<u64, &'static str>>,
}

/// Removes a task's name when it ends, however it ends.
struct Named {
    inner: Arc<Inner>,
    id: u64,
}

// === impl Tasks ===

impl Tasks {
    /// Creates an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Spawns `future` under `name`. [`Tasks::abort`] ends it at its next await.
    ///
    /// The handle yields `None` when the task was aborted and a join error when
    /// it panicked; dropping the handle leaves the task running.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> JoinHandle<Option<F::Output>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let id = self.inner.next.fetch_add(1, Ordering::Relaxed);
        self.inner.live.lock().unwrap_or_else(PoisonError::into_inner).insert(id, name);
        let named = Named { inner: Arc::clone(&self.inner), id };
        let abort = self.inner.abort.clone();
        // In the caller's span: what a request sets off is logged under its id.
        let tracked = async move {
            let _named = named;
            abort.run_until_cancelled(future).await
        };
        self.inner.tracker.spawn(tracked.in_current_span())
    }

    /// Returns the token that is cancelled when no new work should begin.
    pub fn draining(&self) -> CancellationToken {
        self.inner.drain.clone()
    }

    /// Says that no new work should begin.
    pub fn drain(&self) {
        self.inner.drain.cancel();
    }

    /// Ends every task at its next await.
    pub fn abort(&self) {
        self.inner.drain.cancel();
        self.inner.abort.cancel();
    }

    /// Waits until every task has ended, at most `limit`; returns the names of
    /// those that have not.
    pub async fn wait(&self, limit: Duration) -> Vec<&'static str> {
        self.inner.tracker.close();
        let _ = tokio::time::timeout(limit, self.inner.tracker.wait()).await;
        self.live()
    }

    /// Returns the names of the tasks that run now.
    pub fn live(&self) -> Vec<&'static str> {
        self.inner.live.lock().unwrap_or_else(PoisonError::into_inner).values().copied().collect()
    }
}

// === impl Named ===

impl Drop for Named {
    fn drop(&mut self) {
        self.inner.live.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// The set of crash points a node may be told to stop at.
///
/// A *crash point* is a named boundary between two steps of claim, release,
/// refill or adopt. Reaching an armed one ends the node there: in process the
/// task stops for ever and [`CrashPoints::crashed`] wakes the test, which drops
/// the node; in a real server (`BOILERHOUSE_CRASH_POINT` in builds with the
/// feature `crash_points`) the process kills itself with SIGKILL.
#[derive(Debug, Clone, Default)]
pub struct CrashPoints {
    #[cfg(feature = "crash_points")]
    inner: Arc<armed::Armed>,
}

/// Stops the node here if the crash point is armed; nothing without the feature
/// `crash_points`. Must be used where `.await` is allowed.
#[macro_export]
macro_rules! crash_point {
    ($points:expr, $name:literal) => {
        #[cfg(feature = "crash_points")]
        $points.reach($name).await;
    };
}

#[cfg(feature = "crash_points")]
mod armed {
    use std::{
        collections::BTreeMap,
        sync::{Mutex, PoisonError},
    };

    use tokio_util::sync::CancellationToken;

    /// What an armed point does.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum CrashAction {
        /// Stops the task for ever and marks the node as crashed.
        Halt,
        /// Kills the process with SIGKILL.
        Kill,
    }

    #[derive(Debug, Default)]
    pub(super) struct Armed {
        armed: Mutex<BTreeMap<String, (u32, CrashAction)>>,
        hits: Mutex<BTreeMap<&'static str, u32>>,
        crashed: CancellationToken,
    }

    impl super::CrashPoints {
        /// Arms `name`: its `nth` passage (1 is the next) does `action`.
        pub fn arm(&self, name: &str, nth: u32, action: CrashAction) {
            let mut armed = self.inner.armed.lock().unwrap_or_else(PoisonError::into_inner);
            armed.insert(name.to_owned(), (nth, action));
        }

        /// Waits until an armed point has halted the node.
        pub async fn crashed(&self) {
            self.inner.crashed.cancelled().await;
        }

        /// Returns how often each point was passed.
        pub fn hits(&self) -> BTreeMap<&'static str, u32> {
            self.inner.hits.lock().unwrap_or_else(PoisonError::into_inner).clone()
        }

        /// Passes the point `name`; see [`crate::crash_point`].
        pub async fn reach(&self, name: &'static str) {
            *self.inner.hits.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
            if self.inner.crashed.is_cancelled() {
                std::future::pending::<()>().await;
            }
            let action = {
                let mut armed = self.inner.armed.lock().unwrap_or_else(PoisonError::into_inner);
                match armed.get_mut(name) {
                    Some((left, action)) if *left <= 1 => {
                        let action = *action;
                        armed.remove(name);
                        Some(action)
                    }
                    Some((left, _)) => {
                        *left -= 1;
                        None
                    }
                    None => None,
                }
            };
            match action {
                None => {}
                Some(CrashAction::Halt) => {
                    self.inner.crashed.cancel();
                    std::future::pending::<()>().await;
                }
                Some(CrashAction::Kill) => {
                    let _ = rustix::process::kill_process(
                        rustix::process::getpid(),
                        rustix::process::Signal::KILL,
                    );
                    std::future::pending::<()>().await;
                }
            }
        }
    }
}

#[cfg(feature = "crash_points")]
pub use armed::CrashAction;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panicking_task_is_counted_out_and_others_go_on() {
        let tasks = Tasks::new();
        let bad = tasks.spawn("bad", async { panic!("on purpose") });
        let good = tasks.spawn("good", async { 7 });
        assert!(bad.await.unwrap_err().is_panic());
        assert_eq!(good.await.unwrap(), Some(7));
        assert_eq!(tasks.wait(Duration::from_secs(5)).await, Vec::<&str>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_task_is_named_and_an_abort_ends_it() {
        let tasks = Tasks::new();
        let late = tasks.spawn("late", std::future::pending::<()>());
        assert_eq!(tasks.wait(Duration::from_millis(10)).await, vec!["late"]);
        tasks.abort();
        assert_eq!(late.await.unwrap(), None);
        assert_eq!(tasks.wait(Duration::from_secs(1)).await, Vec::<&str>::new());
    }

    #[cfg(feature = "crash_points")]
    #[tokio::test]
    async fn an_armed_point_halts_at_its_nth_passage_and_for_everyone_after() {
        let points = CrashPoints::default();
        points.arm("here", 2, CrashAction::Halt);
        crash_point!(points, "here");
        let tasks = Tasks::new();
        let inside = points.clone();
        tasks.spawn("halts", async move {
            crash_point!(inside, "here");
        });
        points.crashed().await;
        assert_eq!(points.hits()["here"], 2);
        assert_eq!(tasks.live(), vec!["halts"]);
        tasks.abort();
    }
}
