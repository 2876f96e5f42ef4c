//! Turns: how many requests are under way at a time, and how many bytes.
//!
//! Small and large bodies have lanes of their own, so that a record never waits
//! behind chunks. Each lane's window grows by one for each window of successes
//! that made use of it, and is cut when the server is overloaded (halved) or
//! answers much later than it did (by an eighth), once for each round trip. The
//! bytes of large bodies are counted against one budget, whatever the window.
//!
//! A turn that ends goes to the request that waits longest.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

/// A body up to this size is small, in bytes.
pub(super) const SMALL_BYTES: u64 = 256 << 10;

/// The most bytes of large bodies that are under way at a time.
const LARGE_BUDGET_BYTES: u64 = 160 << 20;

/// The most bytes that are held of objects which are written by parts. Apart
/// from the budget above: their sources may read from this very store.
const PARTS_BUDGET_BYTES: u64 = 64 << 20;

/// Budgets are counted in units of so many bytes.
const UNIT_BYTES: u64 = 64 << 10;

/// So many large answers may wait for their turn with their connection open.
const MAX_WAITING: usize = 64;

/// Answers are late when they take this many times the least, and a bit.
const LATE_FACTOR: u32 = 4;
const LATE_MORE: Duration = Duration::from_millis(100);

/// Which window a request goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    Small,
    /// To be told by the answer: small until then.
    Unknown,
    /// Of so many bytes.
    Large(u64),
    /// Large, its bytes being reserved already.
    Reserved,
}

/// What an attempt said about the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sign {
    /// It answered.
    Answered,
    /// It asked for less, failed, or did not answer in time.
    Overloaded,
    /// Nothing.
    None,
}

/// Gives turns.
pub(super) struct Gate {
    small: Arc<Lane>,
    large: Arc<Lane>,
    large_bytes: Arc<Semaphore>,
    parts_bytes: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    gauge: Arc<Gauge>,
}

/// A turn; it ends with its drop.
pub(super) struct Turn {
    lane: Arc<Lane>,
    permit: Option<OwnedSemaphorePermit>,
    _bytes: Option<Bytes>,
}

/// Bytes that count against a budget until the drop.
pub(super) struct Bytes {
    bytes: u64,
    gauge: Arc<Gauge>,
    _permit: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Gauge {
    now: AtomicU64,
    peak: AtomicU64,
}

struct Lane {
    permits: Arc<Semaphore>,
    window: Mutex<Window>,
}

/// How many requests may be under way, decided without waiting for anything.
#[derive(Debug, Clone)]
struct Window {
    limit: usize,
    max: usize,
    /// Successes since the limit last changed.
    credit: usize,
    /// Permits that are to be taken back as their turns end.
    debt: usize,
    /// Requests that began before this have nothing new to say.
    cut_at: Option<Instant>,
    least: Option<Duration>,
    smooth: Duration,
}

// === impl Gauge ===

impl Gauge {
    fn add(&self, bytes: u64) {
        let now = self.now.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.peak.fetch_max(now, Ordering::SeqCst);
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        self.gauge.now.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

// === impl Window ===

impl Window {
    fn new(limit: usize, max: usize) -> Self {
        let max = max.max(1);
        let limit = limit.clamp(1, max);
        Self { limit, max, credit: 0, debt: 0, cut_at: None, least: None, smooth: Duration::ZERO }
    }

    /// Takes in a success; `latency` only where it compares.
    fn succeed(&mut self, began: Instant, now: Instant, latency: Option<Duration>, is_used: bool) {
        if let Some(latency) = latency {
            // The least forgets slowly, or one lucky answer would be the measure for ever.
            let least = self.least.map_or(latency, |least| (least + least / 256).min(latency));
            self.least = Some(least);
            self.smooth = if self.smooth.is_zero() { latency } else { (self.smooth * 7 + latency) / 8 };
            if self.smooth > least * LATE_FACTOR + LATE_MORE {
                self.cut(began, now, self.limit - self.limit.div_ceil(8));
                return;
            }
        }
        if is_used {
            self.credit += 1;
        }
        if self.credit >= self.limit && self.limit < self.max {
            (self.limit, self.credit) = (self.limit + 1, 0);
        }
    }

    fn overload(&mut self, began: Instant, now: Instant) {
        self.cut(began, now, self.limit / 2);
    }

    fn cut(&mut self, began: Instant, now: Instant, limit: usize) {
        if self.cut_at.is_some_and(|cut| began <= cut) {
            return;
        }
        (self.limit, self.credit, self.cut_at) = (limit.max(1), 0, Some(now));
    }
}

// === impl Lane ===

impl Lane {
    fn new(limit: usize, max: usize) -> Arc<Self> {
        let window = Window::new(limit, max);
        Arc::new(Self { permits: Arc::new(Semaphore::new(window.limit)), window: Mutex::new(window) })
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the window, and the permits with it.
    fn change(&self, change: impl FnOnce(&mut Window)) {
        let mut window = self.window();
        let before = window.limit;
        change(&mut window);
        if window.limit > before {
            let more = window.limit - before;
            let paid = more.min(window.debt);
            window.debt -= paid;
            self.permits.add_permits(more - paid);
        } else {
            let less = before - window.limit;
            window.debt += less - self.permits.forget_permits(less);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut window = self.lane.window();
        if window.debt > 0
            && let Some(permit) = self.permit.take()
        {
            window.debt -= 1;
            permit.forget();
        }
    }
}

// === impl Gate ===

impl Gate {
    /// Makes a gate for at most `requests` requests at a time in each lane.
    pub(super) fn new(requests: usize) -> Self {
        let budget = |bytes: u64| Arc::new(Semaphore::new((bytes / UNIT_BYTES) as usize));
        Self {
            small: Lane::new(requests.min(32), requests),
            large: Lane::new(requests.min(8), requests.min(32)),
            large_bytes: budget(LARGE_BUDGET_BYTES),
            parts_bytes: budget(PARTS_BUDGET_BYTES),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            gauge: Arc::default(),
        }
    }

    /// Waits for a turn.
    pub(super) async fn enter(&self, size: Size) -> Turn {
        let bytes = match size {
            Size::Small | Size::Unknown | Size::Reserved => None,
            Size::Large(bytes) => Some(self.take(&self.large_bytes, bytes, LARGE_BUDGET_BYTES).await),
        };
        let lane = self.lane(size);
        let permit = Arc::clone(&lane.permits).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        Turn { lane: Arc::clone(lane), permit: Some(permit), _bytes: bytes }
    }

    /// Exchanges the turn of a request, of which nothing but the beginning of
    /// its answer is here, for one of a large body. None: too many wait already.
    pub(super) async fn enlarge(&self, turn: Turn, bytes: u64) -> Option<Turn> {
        let _waiting = Arc::clone(&self.waiting).try_acquire_owned().ok()?;
        drop(turn);
        Some(self.enter(Size::Large(bytes)).await)
    }

    /// Waits for room for one part of an object that is written by parts.
    pub(super) async fn reserve_part(&self, bytes: u64) -> Bytes {
        self.take(&self.parts_bytes, bytes, PARTS_BUDGET_BYTES).await
    }

    /// Takes in what an attempt said.
    pub(super) fn note(&self, size: Size, began: Instant, sign: Sign) {
        let (lane, now) = (self.lane(size), Instant::now());
        match sign {
            Sign::Answered => {
                // Large bodies take the time of their size.
                let latency = (size == Size::Small).then(|| now.duration_since(began));
                let free = lane.permits.available_permits();
                lane.change(|window| window.succeed(began, now, latency, free <= window.limit / 2));
            }
            Sign::Overloaded => lane.change(|window| window.overload(began, now)),
            Sign::None => {}
        }
    }

    /// Returns how many requests each lane lets through now, small and large.
    pub(super) fn limits(&self) -> (usize, usize) {
        (self.small.window().limit, self.large.window().limit)
    }

    /// Returns the bytes of large bodies and parts that are under way, and the
    /// most there ever were.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.gauge.now.load(Ordering::SeqCst), self.gauge.peak.load(Ordering::SeqCst))
    }

    fn lane(&self, size: Size) -> &Arc<Lane> {
        match size {
            Size::Small | Size::Unknown => &self.small,
            Size::Large(_) | Size::Reserved => &self.large,
        }
    }

    async fn take(&self, budget: &Arc<Semaphore>, bytes: u64, whole: u64) -> Bytes {
        let bytes = bytes.min(whole);
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
        let permit = Arc::clone(budget).acquire_many_owned(units).await;
        let permit = permit.expect("the semaphore is never closed");
        self.gauge.add(bytes);
        Bytes { bytes, gauge: Arc::clone(&self.gauge), _permit: permit }
    }
}

/// Says which lane a body of this size takes.
pub(super) fn size_of(bytes: u64) -> Size {
    if bytes <= SMALL_BYTES { Size::Small } else { Size::Large(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[tokio::test]
    async fn a_window_grows_by_one_for_each_window_of_successes_and_is_halved_once_a_round_trip() {
        let start = Instant::now();
        let mut window = Window::new(8, 10);
        for n in 0..8 {
            assert_eq!(window.limit, 8, "after {n}");
            window.succeed(start, at(start, n), None, true);
        }
        assert_eq!(window.limit, 9);
        for _ in 0..100 {
            window.succeed(start, at(start, 10), None, true);
        }
        assert_eq!(window.limit, 10, "never above the most");
        // Ten requests of one round trip fail: one cut.
        for _ in 0..10 {
            window.overload(at(start, 11), at(start, 20));
        }
        assert_eq!(window.limit, 5);
        for round in 2..10 {
            window.overload(at(start, round * 20), at(start, round * 20 + 1));
        }
        assert_eq!(window.limit, 1, "never nothing");
    }

    #[tokio::test]
    async fn a_window_that_is_not_used_does_not_grow() {
        let start = Instant::now();
        let mut window = Window::new(4, 100);
        for n in 0..1_000 {
            window.succeed(start, at(start, n), None, false);
        }
        assert_eq!(window.limit, 4);
    }

    #[tokio::test]
    async fn a_window_shrinks_when_answers_take_much_longer() {
        let start = Instant::now();
        let mut window = Window::new(16, 16);
        let ms = Duration::from_millis;
        for n in 0..50 {
            window.succeed(at(start, n), at(start, n), Some(ms(10)), true);
        }
        assert_eq!(window.limit, 16);
        for n in 50..70 {
            window.succeed(at(start, n * 1_000), at(start, n * 1_000 + 500), Some(ms(500)), true);
        }
        assert!(window.limit < 8, "{window:?}");
    }

    #[tokio::test]
    async fn permits_follow_the_window_also_while_turns_are_taken() {
        let gate = Gate::new(128);
        let turns: Vec<_> = futures_util::future::join_all((0..8).map(|_| gate.enter(Size::Reserved))).await;
        gate.note(Size::Reserved, Instant::now(), Sign::Overloaded);
        assert_eq!((gate.limits().1, gate.large.permits.available_permits()), (4, 0));
        drop(turns);
        assert_eq!(gate.large.permits.available_permits(), 4, "the debt is paid by the turns that end");
    }

    #[tokio::test(start_paused = true)]
    async fn large_bodies_stay_within_their_budget_and_never_hold_up_small_ones() {
        let gate = Arc::new(Gate::new(128));
        let mut large = Vec::new();
        for _ in 0..2 {
            large.push(gate.enter(Size::Large(64 << 20)).await);
        }
        let waiting = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.enter(Size::Large(64 << 20)).await }
        });
        for _ in 0..32 {
            drop(gate.enter(Size::Small).await);
        }
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(!waiting.is_finished() && gate.bytes().0 == 128 << 20);
        drop(large);
        drop(waiting.await);
        assert_eq!(gate.bytes(), (0, 128 << 20));
    }
}
