//! How much of objects is in memory, whatever the number and the size of the states.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::snapshot::{Encoding, ManifestObject};

/// Budgets are counted in units of so many bytes.
const UNIT_BYTES: u64 = 64 << 10;

/// Bytes that may be in memory at a time. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    units: Arc<Semaphore>,
    whole: u32,
}

/// Bytes that count until the drop.
#[derive(Debug)]
pub(super) struct Held(OwnedSemaphorePermit);

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

// === impl Budget ===

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        let whole = units(bytes);
        Self { units: Arc::new(Semaphore::new(whole as usize)), whole }
    }

    /// Waits for room; what is larger than all of it has it alone.
    pub(super) async fn hold(&self, bytes: u64) -> Held {
        let wanted = units(bytes).min(self.whole);
        let permit = Arc::clone(&self.units).acquire_many_owned(wanted).await;
        Held(permit.expect("the semaphore is never closed"))
    }

    /// The same on a thread that may block.
    pub(super) fn hold_blocking(&self, bytes: u64) -> Held {
        tokio::runtime::Handle::current().block_on(self.hold(bytes))
    }
}

// === impl Held ===

impl Held {
    /// Gives back what is not needed any more.
    pub(super) fn shrink(&mut self, bytes: u64) {
        let more = self.0.num_permits().saturating_sub(units(bytes) as usize);
        drop(self.0.split(more));
    }
}

/// Returns what an object takes in memory until its content is on the disk.
pub(super) fn bytes_of(object: &ManifestObject) -> u64 {
    match object.encoding() {
        Encoding::Plain => object.bytes,
        // As stored and as it was, of which the former is smaller.
        Encoding::Zstd => object.bytes.saturating_mul(2),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn what_is_held_counts_until_it_is_given_back() {
        let budget = Budget::new(10 * UNIT_BYTES);
        let mut first = budget.hold(8 * UNIT_BYTES - 1).now_or_never().unwrap();
        assert!(budget.hold(3 * UNIT_BYTES).now_or_never().is_none());
        first.shrink(7 * UNIT_BYTES);
        let second = budget.hold(3 * UNIT_BYTES).now_or_never().unwrap();
        assert!(budget.hold(1).now_or_never().is_none());
        first.shrink(9 * UNIT_BYTES);
        drop((first, second));
        assert!(budget.hold(u64::MAX).now_or_never().is_some(), "alone");
    }
}
