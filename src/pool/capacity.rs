//! The containers that all pools together may have.
//!
//! A container counts from its reservation, before the engine is asked, until
//! the engine says that it is gone. Claims that wait go before refill.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Shares a number of containers between pools.
#[derive(Debug, Clone)]
pub struct Capacity {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    max: u32,
    counts: Mutex<Counts>,
    freed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Counts {
    used: u32,
    unmet: std::collections::BTreeMap<usize, u32>,
}

/// One container's place; freed when dropped.
#[derive(Debug)]
pub struct Place {
    inner: Arc<Inner>,
}

// === impl Capacity ===

impl Capacity {
    /// Creates a capacity of `max` containers.
    pub fn new(max: u32) -> Self {
        Self { inner: Arc::new(Inner { max, counts: Mutex::default(), freed: watch::Sender::new(()) }) }
    }

    /// Reserves a place, if there is one. Refill leaves the last places to
    /// claims that wait in any pool.
    pub fn reserve(&self, demand: bool) -> Option<Place> {
        let mut counts = self.inner.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = if demand { 0 } else { counts.unmet.values().sum() };
        if counts.used + kept >= self.inner.max {
            return None;
        }
        counts.used += 1;
        Some(Place { inner: Arc::clone(&self.inner) })
    }

    /// Reserves a place for a container that exists already, above the maximum if need be.
    pub fn adopt(&self) -> Place {
        self.inner.counts.lock().unwrap_or_else(PoisonError::into_inner).used += 1;
        Place { inner: Arc::clone(&self.inner) }
    }

    /// Says how many claims of the pool `pool` wait without a slot under way.
    pub fn set_unmet(&self, pool: usize, unmet: u32) {
        let mut counts = self.inner.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if unmet == 0 { counts.unmet.remove(&pool) } else { counts.unmet.insert(pool, unmet) };
        drop(counts);
        if before.unwrap_or(0) > unmet {
            self.inner.freed.send_replace(());
        }
    }

    /// Returns the places in use.
    pub fn used(&self) -> u32 {
        self.inner.counts.lock().unwrap_or_else(PoisonError::into_inner).used
    }

    /// Returns the places there are.
    pub fn max(&self) -> u32 {
        self.inner.max
    }

    /// Returns a receiver that changes whenever a place may have become free.
    pub fn freed(&self) -> watch::Receiver<()> {
        self.inner.freed.subscribe()
    }
}

// === impl Place ===

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.counts.lock().unwrap_or_else(PoisonError::into_inner).used -= 1;
        self.inner.freed.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maximum_holds_and_a_dropped_place_is_free_again() {
        let capacity = Capacity::new(2);
        let first = capacity.reserve(false).unwrap();
        let _second = capacity.reserve(true).unwrap();
        assert!(capacity.reserve(true).is_none());
        drop(first);
        assert!(capacity.reserve(false).is_some());
    }

    #[test]
    fn refill_leaves_the_last_places_to_waiting_claims() {
        let capacity = Capacity::new(2);
        capacity.set_unmet(7, 1);
        let _one = capacity.reserve(false).unwrap();
        assert!(capacity.reserve(false).is_none());
        assert!(capacity.reserve(true).is_some());
        capacity.set_unmet(7, 0);
        assert!(capacity.reserve(false).is_some());
    }

    #[test]
    fn adopted_containers_count_even_above_the_maximum() {
        let capacity = Capacity::new(1);
        let places = [capacity.adopt(), capacity.adopt()];
        assert_eq!(capacity.used(), 2);
        drop(places);
        assert_eq!(capacity.used(), 0);
    }
}
