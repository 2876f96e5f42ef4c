//! The node's cache: how much of it stays, and what goes first.
//!
//! A released tenant's tree stays on this node, so that its next claim moves no bytes.
//! When trees take more than they may, or the disk gets full, those that were used
//! longest ago go, and their claims take them from the store again.
//!
//! # Invariants
//! - P2: only what the newest of the store's snapshots has is evicted, by this node's
//!   rows and by the store itself: one that does not answer evicts nothing.
//! - Only what nobody works on is evicted: under its guard, or not at all.
//! - First the tree goes, then its row: a row without a tree is what a start expects
//!   after a crash, a tree without a row is set aside.
//! - A claim does nothing for the cache: a tree counts as used when it comes to rest.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use dashmap::DashMap;
use futures_util::{StreamExt as _, stream};
use tokio::sync::Semaphore;
use tracing::{error, info, warn};

use super::{Inner, STORE_WAIT, Tenancy, registry::Entry};
use crate::{
    crash_point,
    journal::{Durability, TreeRow},
    model::{Epoch, Key, SnapshotRef},
};

/// Evictions under way together: most of one is the store's answer.
const EVICTIONS_AT_ONCE: usize = 8;
/// Trees that are measured in one look.
const MEASURED_AT_ONCE: usize = 256;
/// After a look that the store's silence ended, the next one is so much later.
const STORE_PAUSE_MS: u64 = 10_000;
/// What is counted for a file beside its bytes, until a tree is measured.
const FILE_BYTES: u64 = 4_096;
/// Prefetches under way together, and those that may wait for them.
pub(super) const PREFETCHES_AT_ONCE: usize = 4;
pub(super) const PREFETCHES_WAITING: usize = 64;

/// What bounds the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheLimits {
    /// What trees of tenants who are not claimed may take, in bytes; none: any.
    pub max_bytes: Option<u64>,
    /// What is to stay free where they are, in bytes; 0: nothing.
    pub min_free_bytes: u64,
}

/// What the cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheSize {
    /// Trees at rest.
    pub trees: u64,
    /// What they take, as far as it is known without looking.
    pub bytes: u64,
}

/// What is known of cached trees beside their rows; gone with the process.
pub(super) struct Cache {
    pub(super) limits: CacheLimits,
    notes: DashMap<Key, Note>,
    /// A key came to rest since the last look.
    is_due: AtomicBool,
    not_before_ms: AtomicU64,
    has_warned: AtomicBool,
    /// Places of prefetches, those that wait included.
    pub(super) places: Semaphore,
    /// Places of those that are under way.
    pub(super) turns: Semaphore,
}

#[derive(Debug, Clone, Copy)]
struct Note {
    used_ms: u64,
    /// What the tree took, as of this epoch.
    measured: Option<(Epoch, u64)>,
}

/// A tree that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    row: TreeRow,
    used_ms: u64,
    bytes: u64,
    is_measured: bool,
}

/// Why trees go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pressure {
    Size,
    Disk,
}

/// What became of an eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Evicted(u64),
    /// Somebody works on it, or it is not what it was.
    Kept,
    /// The store did not say whether it has it.
    Unasked,
}

/// Says how many bytes are to go, and why: down to nine tenths of a bound that is passed,
/// so that the next tree does not pass it again.
fn excess(total: u64, free: u64, limits: &CacheLimits) -> Option<(Pressure, u64)> {
    let over = limits.max_bytes.filter(|max| total > *max).map(|max| total - max / 10 * 9);
    let least = limits.min_free_bytes;
    let short = (free < least).then(|| least + least / 10 - free);
    match (over, short) {
        (None, None) => None,
        (Some(over), short) if short.is_none_or(|short| over >= short) => Some((Pressure::Size, over)),
        (_, short) => short.map(|short| (Pressure::Disk, short)),
    }
}

/// Chooses what goes: what was used longest ago, until it is enough.
fn choose(mut candidates: Vec<Candidate>, excess: u64) -> Vec<Candidate> {
    candidates.sort_unstable_by(|a, b| (a.used_ms, &a.row.key).cmp(&(b.used_ms, &b.row.key)));
    let mut chosen = 0;
    candidates
        .into_iter()
        .take_while(|candidate| {
            let is_wanted = chosen < excess;
            chosen += candidate.bytes;
            is_wanted
        })
        .collect()
}

/// Returns what a snapshot's tree takes, about.
pub(super) fn size_of(snapshot: &SnapshotRef) -> u64 {
    snapshot.bytes.saturating_add(snapshot.files.saturating_add(1).saturating_mul(FILE_BYTES))
}

// === impl Cache ===

impl Cache {
    pub(super) fn new(limits: CacheLimits) -> Self {
        Self {
            limits,
            notes: DashMap::new(),
            // What an earlier run left may be too much for this one's limits.
            is_due: AtomicBool::new(true),
            not_before_ms: AtomicU64::new(0),
            has_warned: AtomicBool::new(false),
            places: Semaphore::new(PREFETCHES_AT_ONCE + PREFETCHES_WAITING),
            turns: Semaphore::new(PREFETCHES_AT_ONCE),
        }
    }

    /// Notes that a tree was used.
    pub(super) fn note_use(&self, key: &Key, now_ms: u64) {
        self.notes.insert(key.clone(), Note { used_ms: now_ms, measured: None });
    }

    /// Asks for a look, because nobody works on a key any more.
    pub(super) fn look_soon(&self) {
        self.is_due.store(true, Ordering::Release);
    }

    /// Forgets a tree.
    pub(super) fn forget(&self, key: &Key) {
        self.notes.remove(key);
    }

    fn candidate(&self, row: &TreeRow) -> Option<Candidate> {
        let saved = row.saved.as_ref().filter(|_| row.cached)?;
        let note = self.notes.get(&row.key).map(|note| *note);
        let measured = note.and_then(|note| note.measured).filter(|(epoch, _)| *epoch == row.epoch);
        Some(Candidate {
            // After a start, a tree was last used when it was last saved.
            used_ms: note.map_or(saved.created_ms, |note| note.used_ms),
            bytes: measured.map_or_else(|| size_of(saved), |(_, bytes)| bytes),
            is_measured: measured.is_some(),
            row: row.clone(),
        })
    }

    fn note_measured(&self, candidate: &mut Candidate, bytes: u64) {
        candidate.bytes = bytes;
        let measured = Some((candidate.row.epoch, bytes));
        let used_ms = candidate.used_ms;
        self.notes.entry(candidate.row.key.clone()).or_insert(Note { used_ms, measured }).measured = measured;
    }
}

// === impl Tenancy ===

impl Tenancy {
    /// Takes trees out of the cache while it is over its bounds; a short look when nothing
    /// came into it and the disk has room.
    pub async fn trim_cache(&self) {
        if self.inner.check_open().is_ok() {
            self.inner.trim_cache().await;
        }
    }

    /// Returns what the cache holds.
    pub fn cache_size(&self) -> CacheSize {
        let mut size = CacheSize::default();
        for candidate in self.inner.at_rest() {
            size.trees += 1;
            size.bytes += candidate.bytes;
        }
        size
    }
}

// === impl Inner ===

impl Inner {
    /// Returns the cached trees that nobody works on and the store has.
    fn at_rest(&self) -> Vec<Candidate> {
        let candidates = self.trees.iter().filter_map(|row| self.cache.candidate(&row));
        let candidates: Vec<Candidate> = candidates.collect();
        // Afterwards: no map is asked while another is held.
        let is_at_rest = |candidate: &Candidate| {
            let key = &candidate.row.key;
            !self.entries.contains_key(key) && !self.erasing.contains(&key.tenant)
        };
        candidates.into_iter().filter(is_at_rest).collect()
    }

    async fn trim_cache(self: &Arc<Self>) {
        let (cache, limits) = (&self.cache, &self.cache.limits);
        if self.now_ms() < cache.not_before_ms.load(Ordering::Relaxed) {
            return;
        }
        // Of a look that was broken off.
        self.remove_evicted().await;
        let free = match self.parts.files.free_bytes() {
            Ok(free) => free,
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "the room on the disk is not known");
                u64::MAX
            }
        };
        let is_due = cache.is_due.swap(false, Ordering::AcqRel) && limits.max_bytes.is_some();
        if !is_due && free >= limits.min_free_bytes {
            cache.has_warned.store(false, Ordering::Relaxed);
            return;
        }
        let mut candidates = self.at_rest();
        if limits.max_bytes.is_some() {
            self.measure(&mut candidates).await;
        }
        let total = candidates.iter().map(|candidate| candidate.bytes).sum();
        let Some((pressure, wanted)) = excess(total, free, limits) else { return };
        let chosen = choose(candidates, wanted);
        let (mut freed, mut evicted, mut is_unasked) = (0, 0_u64, false);
        let mut evictions =
            stream::iter(chosen).map(|candidate| self.evict(candidate)).buffer_unordered(EVICTIONS_AT_ONCE);
        while let Some(outcome) = evictions.next().await {
            match outcome {
                Outcome::Evicted(bytes) => {
                    freed += bytes;
                    evicted += 1;
                    let reason = if pressure == Pressure::Size { "size" } else { "disk" };
                    self.parts.metrics.cache_eviction(reason);
                }
                Outcome::Kept => {}
                Outcome::Unasked => is_unasked = true,
            }
            if is_unasked || self.parts.tasks.draining().is_cancelled() {
                break;
            }
        }
        drop(evictions);
        if evicted > 0 {
            info!(evicted, freed, total, free, ?pressure, "trees were taken out of the cache");
            self.remove_evicted().await;
        }
        if is_unasked {
            cache.is_due.store(true, Ordering::Release);
            cache.not_before_ms.store(self.now_ms() + STORE_PAUSE_MS, Ordering::Relaxed);
        }
        if freed < wanted && pressure == Pressure::Disk && !cache.has_warned.swap(true, Ordering::Relaxed) {
            warn!(free, freed, wanted, "the disk gets full, and no more of the cache can go");
        }
    }

    async fn remove_evicted(&self) {
        if let Err(error) = self.parts.files.remove_evicted().await {
            warn!(error = &error as &dyn std::error::Error, "evicted trees stay until the next start");
        }
    }

    /// Measures trees of which only their snapshots' sizes are known: what is excluded from
    /// those is on the disk nevertheless, and a hole is not.
    async fn measure(&self, candidates: &mut [Candidate]) {
        let mut left = MEASURED_AT_ONCE;
        for candidate in candidates.iter_mut().filter(|candidate| !candidate.is_measured) {
            if left == 0 {
                self.cache.is_due.store(true, Ordering::Release);
                return;
            }
            left -= 1;
            let key = &candidate.row.key;
            // Without its guard: a walk that a claim's moves disturb says nothing, at worst.
            let measured = self.parts.files.cached_bytes(key).await;
            let is_same = self.trees.get(key).is_some_and(|row| *row == candidate.row)
                && !self.entries.contains_key(key);
            if let Ok(Some(bytes)) = measured
                && is_same
            {
                self.cache.note_measured(candidate, bytes);
            }
        }
    }

    async fn evict(&self, candidate: Candidate) -> Outcome {
        let (row, key) = (&candidate.row, &candidate.row.key);
        let Some(saved) = &row.saved else { return Outcome::Kept };
        // Before the guard is taken: a claim waits for no store on account of this.
        match tokio::time::timeout(STORE_WAIT, self.parts.files.newest(key)).await {
            Ok(Ok(Some(newest))) if newest.nonce == saved.nonce || newest.number > saved.number => {}
            Ok(Ok(_)) => {
                error!(tenant = %key.tenant, workload = %key.workload, snapshot = saved.number, "the store has not what was saved there; this node's tree stays");
                return Outcome::Kept;
            }
            Ok(Err(error)) => {
                warn!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "nothing is evicted that the store cannot be asked about");
                return Outcome::Unasked;
            }
            Err(_) => return Outcome::Unasked,
        }
        let entry = self.entry(key);
        let outcome = match entry.guard.try_lock() {
            Ok(_guard) => self.evict_guarded(&candidate, &entry).await,
            Err(_) => Outcome::Kept,
        };
        self.tidy(key, entry);
        outcome
    }

    async fn evict_guarded(&self, candidate: &Candidate, entry: &Entry) -> Outcome {
        let (row, key) = (&candidate.row, &candidate.row.key);
        let is_same = self.trees.get(key).is_some_and(|now| *now == *row);
        if !is_same
            || self.must_be_at_rest(key, entry).is_err()
            || self.not_being_erased(&key.tenant).is_err()
        {
            return Outcome::Kept;
        }
        crash_point!(self.parts.crash, "evict.begun");
        if let Err(error) = self.parts.files.evict(key).await {
            warn!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "cached tree cannot be taken out of the cache");
            return Outcome::Kept;
        }
        crash_point!(self.parts.crash, "evict.moved");
        // Not journaled, the next start finds the tree missing, and the store has it.
        let _ = self.put_tree(TreeRow { cached: false, owner: None, ..row.clone() }, Durability::Soft).await;
        self.cache.forget(key);
        crash_point!(self.parts.crash, "evict.journaled");
        Outcome::Evicted(candidate.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{TenantId, WorkloadId};

    fn candidate(tenant: &str, used_ms: u64, bytes: u64) -> Candidate {
        let key = Key::new(TenantId::new(tenant).unwrap(), WorkloadId::new("w").unwrap());
        let row = TreeRow { key, epoch: Epoch(1), cached: true, saved: None, owner: None, opened: None };
        Candidate { row, used_ms, bytes, is_measured: true }
    }

    #[test]
    fn what_is_over_a_bound_goes_down_to_nine_tenths_of_it() {
        let limits = |max_bytes, min_free_bytes| CacheLimits { max_bytes, min_free_bytes };
        for (total, free, limits, expected) in [
            (100, 0, limits(None, 0), None),
            (100, 50, limits(Some(100), 50), None),
            (101, 50, limits(Some(100), 50), Some((Pressure::Size, 11))),
            (100, 49, limits(Some(100), 50), Some((Pressure::Disk, 6))),
            (100, 49, limits(None, 50), Some((Pressure::Disk, 6))),
            (101, 49, limits(Some(100), 50), Some((Pressure::Size, 11))),
            (101, 20, limits(Some(100), 50), Some((Pressure::Disk, 35))),
            (1, 1, limits(Some(0), 0), Some((Pressure::Size, 1))),
            (0, 1, limits(Some(0), 0), None),
        ] {
            assert_eq!(excess(total, free, &limits), expected, "{total} cached, {free} free, {limits:?}");
        }
    }

    #[test]
    fn what_was_used_longest_ago_goes_first_and_no_more_than_is_needed() {
        let all = vec![
            candidate("c", 30, 10),
            candidate("a", 10, 5),
            candidate("d", 40, 10),
            candidate("b", 20, 10),
            candidate("b2", 20, 10),
        ];
        for (wanted, expected) in [
            (0, vec![]),
            (1, vec!["a"]),
            (5, vec!["a"]),
            (6, vec!["a", "b"]),
            (16, vec!["a", "b", "b2"]),
            (1_000, vec!["a", "b", "b2", "c", "d"]),
        ] {
            let chosen = choose(all.clone(), wanted);
            let names: Vec<_> = chosen.iter().map(|candidate| candidate.row.key.tenant.as_str()).collect();
            assert_eq!(names, expected, "{wanted} bytes");
        }
    }
}
