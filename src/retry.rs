//! Backoff with full jitter, for loops that go on until they succeed or are
//! cancelled.

use std::time::Duration;

use crate::clock::{Clock, random_below};

/// Describes an exponential backoff.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// The longest first wait, in milliseconds.
    pub base_ms: u64,
    /// No wait is longer, in milliseconds.
    pub cap_ms: u64,
}

impl Backoff {
    /// Returns the wait before attempt `attempt + 1` (the first failure is 0):
    /// between half of and the whole of `base_ms * 2^attempt`, capped.
    ///
    /// Full jitter would allow a wait of nothing; half keeps a floor under a
    /// store or engine that is down.
    pub fn wait(&self, attempt: u32, clock: &dyn Clock) -> Duration {
        let whole = self.base_ms.saturating_mul(1_u64 << attempt.min(20)).min(self.cap_ms);
        Duration::from_millis(whole / 2 + random_below(clock, whole / 2 + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SeededClock;

    #[tokio::test]
    async fn waits_grow_and_stop_at_the_cap() {
        let clock = SeededClock::new(1);
        let backoff = Backoff { base_ms: 100, cap_ms: 1_000 };
        for (attempt, least, most) in
            [(0, 50, 100), (1, 100, 200), (3, 400, 800), (9, 500, 1_000), (99, 500, 1_000)]
        {
            let wait = backoff.wait(attempt, &clock).as_millis();
            assert!((least..=most).contains(&wait), "attempt {attempt} waited {wait} ms");
        }
    }
}
