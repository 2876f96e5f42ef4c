//! What tenancy knows in memory: claims that are not over, trees, tenants.
//!
//! The journal has the same on disk; a change is journaled first.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::wire::ClaimAnswer;
use crate::{
    journal::{ClaimRow, Op},
    model::{Epoch, SlotId, SnapshotRef},
    pool::Made,
    script::Workload,
};

/// Everything about one (tenant, workload) that is not at rest.
#[derive(Default)]
pub(super) struct Entry {
    /// Held by whoever changes the claim: one claim or release at a time (P1).
    pub(super) guard: Arc<tokio::sync::Mutex<()>>,
    /// Whether whoever holds the guard fetches the state that a claim would need.
    pub(super) is_fetching: AtomicBool,
    state: Mutex<EntryState>,
}

#[derive(Default)]
struct EntryState {
    live: Option<Arc<Live>>,
    unsaved: BTreeMap<Epoch, Arc<Unsaved>>,
}

/// A claim that has a slot.
pub(super) struct Live {
    row: Mutex<ClaimRow>,
    /// The revision it runs to its end.
    pub(super) workload: Arc<Workload>,
    /// Its slot.
    pub(super) slot: SlotId,
    /// Its container.
    pub(super) made: Made,
    answer: Mutex<Option<ClaimAnswer>>,
    active_ms: AtomicU64,
    journaled_ms: AtomicU64,
    synced_ms: AtomicU64,
    /// Held while a checkpoint is made and saved.
    pub(super) sync: tokio::sync::Mutex<()>,
    /// Ends a checkpoint's save, because the claim's own save follows.
    pub(super) cancel_sync: CancellationToken,
    /// Held while the row is changed, so that the journal gets the changes in the
    /// order in which they are made: a checkpoint and a sign of use write without the guard.
    pub(super) writer: tokio::sync::Mutex<()>,
    /// What the journal may not have taken of its beginning; goes with the next change of state.
    owed: Mutex<Vec<Op>>,
}

/// A released claim whose state is not in the store.
pub(super) struct Unsaved {
    row: Mutex<ClaimRow>,
    /// The revision it ran.
    pub(super) workload: Arc<Workload>,
    /// Ends the save, because a later claim takes the tree.
    pub(super) cancel: CancellationToken,
    /// How the save stands; closed when it has ended.
    pub(super) outcome: watch::Sender<SaveOutcome>,
}

/// How a save stands.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum SaveOutcome {
    /// Under way for the first time.
    Saving,
    /// Failed so far, goes on.
    Retrying(String),
    /// In the store.
    Saved(SnapshotRef),
    /// Fenced; goes on never.
    Conflict(String),
    /// A later claim has the tree, or the server stops.
    Ended,
}

/// What the journal keeps of a claim in [`ClaimRow::detail`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Detail {
    /// What the request asked for.
    pub(super) asked: Asked,
    /// The metadata that hooks see.
    pub(super) metadata: serde_json::Map<String, serde_json::Value>,
    /// What hooks added to the answer, without secrets.
    pub(super) outputs: BTreeMap<String, serde_json::Value>,
    /// Secret outputs, sealed, as hexadecimal.
    pub(super) sealed_outputs: BTreeMap<String, String>,
    /// Files of the snapshot it began with.
    pub(super) files: u64,
    /// Their bytes.
    pub(super) bytes: u64,
}

/// Keyed digests of what a claim's request gave; absent: not given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asked {
    pub(super) env: Option<String>,
    pub(super) secrets: Option<String>,
    pub(super) metadata: Option<String>,
}

// === impl Entry ===

impl Entry {
    pub(super) fn live(&self) -> Option<Arc<Live>> {
        lock(&self.state).live.clone()
    }

    pub(super) fn set_live(&self, live: Option<Arc<Live>>) {
        lock(&self.state).live = live;
    }

    /// Returns released claims whose state is not saved, oldest first.
    pub(super) fn unsaved(&self) -> Vec<Arc<Unsaved>> {
        lock(&self.state).unsaved.values().cloned().collect()
    }

    /// Returns those of them that have a tree to save, oldest first.
    pub(super) fn owed_trees(&self) -> Vec<Arc<Unsaved>> {
        self.unsaved().into_iter().filter(|unsaved| !unsaved.row().close).collect()
    }

    pub(super) fn add_unsaved(&self, unsaved: Arc<Unsaved>) {
        let epoch = unsaved.row().epoch;
        lock(&self.state).unsaved.insert(epoch, unsaved);
    }

    /// Forgets released claims up to `epoch`; returns their epochs.
    pub(super) fn settle(&self, epoch: Epoch) -> Vec<Epoch> {
        let mut state = lock(&self.state);
        let later = state.unsaved.split_off(&epoch.next());
        std::mem::replace(&mut state.unsaved, later).into_keys().collect()
    }

    pub(super) fn is_at_rest(&self) -> bool {
        let state = lock(&self.state);
        state.live.is_none() && state.unsaved.is_empty()
    }
}

// === impl Live ===

impl Live {
    pub(super) fn new(row: ClaimRow, workload: Arc<Workload>, slot: SlotId, made: Made, now_ms: u64) -> Self {
        Self {
            active_ms: AtomicU64::new(row.active_ms),
            journaled_ms: AtomicU64::new(row.active_ms),
            synced_ms: AtomicU64::new(now_ms),
            row: Mutex::new(row),
            workload,
            slot,
            made,
            answer: Mutex::default(),
            sync: tokio::sync::Mutex::default(),
            cancel_sync: CancellationToken::new(),
            writer: tokio::sync::Mutex::default(),
            owed: Mutex::default(),
        }
    }

    /// Notes operations whose commit has no known outcome.
    pub(super) fn owe(&self, ops: Vec<Op>) {
        *lock(&self.owed) = ops;
    }

    pub(super) fn owed(&self) -> Vec<Op> {
        lock(&self.owed).clone()
    }

    pub(super) fn row(&self) -> ClaimRow {
        let mut row = lock(&self.row).clone();
        row.active_ms = self.active_ms();
        row
    }

    pub(super) fn epoch(&self) -> Epoch {
        lock(&self.row).epoch
    }

    pub(super) fn set_row(&self, row: ClaimRow) {
        *lock(&self.row) = row;
    }

    pub(super) fn answer(&self) -> Option<ClaimAnswer> {
        lock(&self.answer).clone()
    }

    pub(super) fn set_answer(&self, answer: ClaimAnswer) {
        *lock(&self.answer) = Some(answer);
    }

    pub(super) fn active_ms(&self) -> u64 {
        self.active_ms.load(Ordering::Relaxed)
    }

    /// Notes a sign of use; returns whether it is time to journal it: `step_ms`
    /// after the last one that was.
    pub(super) fn touch(&self, now_ms: u64, step_ms: u64) -> bool {
        self.active_ms.fetch_max(now_ms, Ordering::Relaxed);
        let journaled = self.journaled_ms.load(Ordering::Relaxed);
        if now_ms.saturating_sub(journaled) < step_ms {
            return false;
        }
        self.journaled_ms.store(now_ms, Ordering::Relaxed);
        true
    }

    pub(super) fn synced_ms(&self) -> u64 {
        self.synced_ms.load(Ordering::Relaxed)
    }

    pub(super) fn set_synced(&self, now_ms: u64) {
        self.synced_ms.store(now_ms, Ordering::Relaxed);
    }
}

// === impl Unsaved ===

impl Unsaved {
    pub(super) fn new(row: ClaimRow, workload: Arc<Workload>, outcome: SaveOutcome) -> Self {
        Self {
            row: Mutex::new(row),
            workload,
            cancel: CancellationToken::new(),
            outcome: watch::Sender::new(outcome),
        }
    }

    pub(super) fn row(&self) -> ClaimRow {
        lock(&self.row).clone()
    }

    pub(super) fn set_row(&self, row: ClaimRow) {
        *lock(&self.row) = row;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
