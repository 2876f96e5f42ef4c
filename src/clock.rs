//! Time and randomness, as a port: the core runs on virtual time under a seed.
//!
//! Waiting is done with `tokio::time`, which a test pauses; this module gives
//! what `tokio` does not, the wall clock and random bytes.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

/// Gives wall-clock time and random bytes.
pub trait Clock: Send + Sync + 'static {
    /// Returns milliseconds since the Unix epoch.
    fn unix_ms(&self) -> u64;

    /// Fills `bytes` with random bytes, unpredictable in production.
    fn fill_random(&self, bytes: &mut [u8]);
}

/// Shares a clock between components.
pub type SharedClock = Arc<dyn Clock>;

/// Reads the operating system's clock and random source.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

/// Runs on `tokio`'s (pausable) time from a fixed start and a seeded generator.
#[derive(Debug)]
pub struct SeededClock {
    start_unix_ms: u64,
    start: tokio::time::Instant,
    state: Mutex<u64>,
    skew_ms: AtomicU64,
}

/// Returns `n` random bytes as lower-case hexadecimal (`2 n` characters).
pub fn random_hex(clock: &dyn Clock, n: usize) -> String {
    let mut bytes = vec![0; n];
    clock.fill_random(&mut bytes);
    hex::encode(bytes)
}

/// Returns a random number below `bound` (0 when `bound` is 0).
pub fn random_below(clock: &dyn Clock, bound: u64) -> u64 {
    let mut bytes = [0; 8];
    clock.fill_random(&mut bytes);
    u64::from_le_bytes(bytes).checked_rem(bound).unwrap_or(0)
}

/// Writes a time, milliseconds since the Unix epoch, as `2026-01-31 23:59:59 UTC`.
pub fn utc(unix_ms: u64) -> String {
    let seconds = i64::try_from(unix_ms / 1_000).ok();
    let Some(time) = seconds.and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok())
    else {
        return format!("{unix_ms} ms after 1970");
    };
    let ((year, month, day), (hour, minute, second)) = (time.to_calendar_date(), time.to_hms());
    format!("{year:04}-{:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC", u8::from(month))
}

// === impl SystemClock ===

impl Clock for SystemClock {
    fn unix_ms(&self) -> u64 {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the kernel's random source answers after boot");
    }
}

// === impl SeededClock ===

impl SeededClock {
    /// Creates a clock at 2026-01-01T00:00:00Z whose randomness follows `seed`.
    ///
    /// Must be called inside a `tokio` runtime.
    pub fn new(seed: u64) -> Self {
        Self {
            start_unix_ms: 1_767_225_600_000,
            start: tokio::time::Instant::now(),
            state: Mutex::new(seed),
            skew_ms: AtomicU64::new(0),
        }
    }

    /// Moves the wall clock forward without moving `tokio`'s time.
    pub fn skip_ms(&self, ms: u64) {
        self.skew_ms.fetch_add(ms, Ordering::Relaxed);
    }
}

impl Clock for SeededClock {
    fn unix_ms(&self) -> u64 {
        let elapsed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.start_unix_ms + elapsed + self.skew_ms.load(Ordering::Relaxed)
    }

    // SplitMix64: small, seeded, good enough to spread ids and jitter.
    fn fill_random(&self, bytes: &mut [u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for chunk in bytes.chunks_mut(8) {
            *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = *state;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^= word >> 31;
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_for_people() {
        for (ms, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_827_696_999, "2000-02-29 12:34:56 UTC"),
            (u64::MAX, "18446744073709551615 ms after 1970"),
        ] {
            assert_eq!(utc(ms), text);
        }
    }

    #[tokio::test]
    async fn one_seed_gives_one_sequence() {
        let (a, b, c) = (SeededClock::new(7), SeededClock::new(7), SeededClock::new(8));
        let first = random_hex(&a, 16);
        assert_eq!(first, random_hex(&b, 16));
        assert_ne!(first, random_hex(&c, 16));
        assert_ne!(first, random_hex(&a, 16));
    }
}
