//! The limits of one hook call: wall clock, cancellation, work done.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

/// The clock is looked at once in so many operations; one takes about a microsecond
/// at most, so a deadline is seen well within a millisecond.
const CHECK_EVERY: u64 = 64;
/// The most operations of one call, closures called by native functions included
/// (which the engine's own limit forgets).
const MAX_OPERATIONS: u64 = 100_000_000;

/// Why a call was ended from outside; no script can catch it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stop {
    /// Its deadline passed.
    Deadline,
    /// Nobody waits for it any more.
    Cancelled,
    /// It did more work than any hook has reason to.
    Operations,
    /// The server's own code panicked under it.
    Panicked,
}

/// Watches over one call.
#[derive(Debug)]
pub(super) struct Guard {
    deadline: Instant,
    /// The same moment in the runtime's time, which a test may pause.
    pub(super) timer: tokio::time::Instant,
    pub(super) cancel: CancellationToken,
    operations: AtomicU64,
    is_stopped: AtomicBool,
    stop: OnceLock<Stop>,
}

// === impl Guard ===

impl Guard {
    /// Starts the clock.
    pub(super) fn new(limit: Duration, cancel: CancellationToken) -> Self {
        Self {
            deadline: Instant::now() + limit,
            timer: tokio::time::Instant::now() + limit,
            cancel,
            operations: AtomicU64::new(0),
            is_stopped: AtomicBool::new(false),
            stop: OnceLock::new(),
        }
    }

    /// Counts one operation; returns why the script must end, if it must.
    ///
    /// It counts by itself because the count that the engine passes starts anew in
    /// each closure that a native function calls: an `array.map` of short closures
    /// would never be looked at. Once stopped it says so at every operation, since
    /// `sort` swallows the error of its comparison and goes on.
    pub(super) fn tick(&self) -> Option<Stop> {
        if !self.is_stopped.load(Ordering::Relaxed) {
            let count = self.operations.fetch_add(1, Ordering::Relaxed);
            if !count.is_multiple_of(CHECK_EVERY) {
                return None;
            }
            if count >= MAX_OPERATIONS {
                self.stop(Stop::Operations);
            } else if Instant::now() >= self.deadline {
                self.stop(Stop::Deadline);
            } else if self.cancel.is_cancelled() {
                self.stop(Stop::Cancelled);
            }
        }
        self.stop.get().cloned()
    }

    /// Ends the script at its next operation; the first reason stays.
    pub(super) fn stop(&self, why: Stop) {
        let _ = self.stop.set(why);
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Returns why it was stopped.
    pub(super) fn stopped(&self) -> Option<Stop> {
        self.stop.get().cloned()
    }

    /// Returns how long the script may still compute.
    pub(super) fn wall_remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Returns how long the call may still take, in the runtime's time.
    pub(super) fn remaining(&self) -> Duration {
        self.timer.saturating_duration_since(tokio::time::Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_guard_says_so_at_every_operation() {
        let guard = Guard::new(Duration::ZERO, CancellationToken::new());
        assert_eq!(guard.tick(), Some(Stop::Deadline));
        guard.stop(Stop::Cancelled);
        for _ in 0..3 {
            assert_eq!(guard.tick(), Some(Stop::Deadline), "the first reason stays");
        }
    }

    #[test]
    fn cancelling_is_seen_within_a_few_operations() {
        let guard = Guard::new(Duration::from_secs(3600), CancellationToken::new());
        assert_eq!(guard.tick(), None);
        guard.cancel.cancel();
        let seen = (0..=CHECK_EVERY).find_map(|_| guard.tick());
        assert_eq!(seen, Some(Stop::Cancelled));
    }
}
