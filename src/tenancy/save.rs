//! Saves what a release left on this node, for as long as it takes.

use std::sync::Arc;

use tracing::{error, info, warn};

use super::{
    Inner, answer,
    registry::{Entry, SaveOutcome, Unsaved},
};
use crate::{
    crash_point,
    journal::{ClaimRow, Durability, Op, TreeRow},
    model::{ClaimState, Key, SnapshotRef},
    retry::Backoff,
    script::Workload,
    state::{self, Save, SaveTree},
};

const SAVE: Backoff = Backoff { base_ms: 500, cap_ms: 60_000 };
/// While something must change before a save can succeed, it is tried this rarely.
const STUCK: Backoff = Backoff { base_ms: 60_000, cap_ms: 600_000 };

// === impl Inner ===

impl Inner {
    /// Starts the save of a released claim.
    pub(super) fn start_save(self: &Arc<Self>, key: &Key, unsaved: Arc<Unsaved>) {
        let (inner, key) = (Arc::clone(self), key.clone());
        self.parts.tasks.spawn("save", async move {
            // Whatever ends this task, nobody waits for its outcome for ever.
            let ended = EndedOnDrop(Arc::clone(&unsaved));
            inner.save_until_done(&key, &unsaved).await;
            drop(ended);
            let entry = inner.entry(&key);
            inner.tidy(&key, entry);
        });
    }

    /// Goes on with a save that was ended for a claim which then did not take its tree.
    /// Under the guard.
    pub(super) fn resume_saves(self: &Arc<Self>, key: &Key, entry: &Entry) {
        for before in entry.unsaved() {
            let row = before.row();
            if row.superseded_by.is_some() || *before.outcome.borrow() != SaveOutcome::Ended {
                continue;
            }
            info!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, "save goes on");
            let unsaved = Arc::new(Unsaved::new(row, Arc::clone(&before.workload), SaveOutcome::Saving));
            entry.add_unsaved(Arc::clone(&unsaved));
            self.start_save(key, unsaved);
        }
    }

    async fn save_until_done(&self, key: &Key, unsaved: &Unsaved) {
        let draining = self.parts.tasks.draining();
        let mut failures = 0;
        loop {
            let row = unsaved.row();
            let save = claim_save(key, &row, &unsaved.workload);
            let began = tokio::time::Instant::now();
            // Biased: a later claim waits for this task to let go of the tree.
            let outcome = tokio::select! {
                biased;
                () = unsaved.cancel.cancelled() => return,
                outcome = self.parts.files.save(&save) => outcome,
            };
            let wait = match outcome {
                Ok(saved) => {
                    crash_point!(self.parts.crash, "save.saved");
                    self.parts.metrics.save("ok", began.elapsed());
                    self.journal_clean(key, unsaved, row, saved.snapshot).await;
                    return;
                }
                Err(error @ state::Error::Fenced { .. }) => {
                    self.parts.metrics.save("conflict", began.elapsed());
                    self.journal_conflict(key, unsaved, row, &error).await;
                    return;
                }
                Err(error) => {
                    self.parts.metrics.save("failed", began.elapsed());
                    let reason = answer::chain(&error);
                    let wait = if matches!(error, state::Error::Store { .. }) {
                        warn!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, failures, error = &error as &dyn std::error::Error, "state is not saved yet");
                        SAVE.wait(failures, &*self.parts.clock)
                    } else {
                        error!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, error = &error as &dyn std::error::Error, "state cannot be saved; it is kept on this node");
                        STUCK.wait(failures, &*self.parts.clock)
                    };
                    unsaved.outcome.send_replace(SaveOutcome::Retrying(reason));
                    failures += 1;
                    wait
                }
            };
            // A stopping server has tried; the next start goes on.
            tokio::select! {
                biased;
                () = unsaved.cancel.cancelled() => return,
                () = draining.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn journal_clean(&self, key: &Key, unsaved: &Unsaved, mut row: ClaimRow, snapshot: SnapshotRef) {
        row.state = ClaimState::Clean;
        row.snapshot = Some(snapshot.clone());
        row.nonce = None;
        // Nobody changes the tree's row meanwhile: a claim that takes it waits for this save's end.
        let owner = self.trees.get(key).and_then(|tree| tree.owner);
        let tree = TreeRow {
            key: key.clone(),
            epoch: row.epoch,
            cached: true,
            saved: Some(snapshot.clone()),
            owner,
        };
        let entry = self.entry(key);
        let mut ops = vec![Op::PutClaim(Box::new(row.clone())), Op::PutTree(tree.clone())];
        ops.extend(
            entry
                .unsaved()
                .iter()
                .map(|before| before.row().epoch)
                .filter(|epoch| *epoch < row.epoch)
                .map(|epoch| Op::DropClaim(key.clone(), epoch)),
        );
        if let Err(error) = self.parts.journal.commit(ops, Durability::Soft).await {
            // The store has it; after a restart the save is repeated and finds its own record.
            error!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "saved state is not journaled as clean");
        }
        info!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, snapshot = snapshot.number, bytes = snapshot.bytes, "state saved");
        self.trees.insert(key.clone(), tree);
        unsaved.set_row(row.clone());
        entry.settle(row.epoch);
        unsaved.outcome.send_replace(SaveOutcome::Saved(snapshot));
    }

    async fn journal_conflict(&self, key: &Key, unsaved: &Unsaved, mut row: ClaimRow, fenced: &state::Error) {
        row.state = ClaimState::Conflict;
        error!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, error = fenced as &dyn std::error::Error, "state is in conflict; this node's tree is kept until an operator decides");
        if let Err(error) =
            self.parts.journal.commit(vec![Op::PutClaim(Box::new(row.clone()))], Durability::Hard).await
        {
            error!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "conflict is not journaled; a restart finds it again");
        }
        unsaved.set_row(row);
        unsaved.outcome.send_replace(SaveOutcome::Conflict(answer::chain(fenced)));
    }
}

fn claim_save(key: &Key, row: &ClaimRow, workload: &Workload) -> Save {
    Save {
        key: key.clone(),
        epoch: row.epoch,
        nonce: row.nonce.clone().unwrap_or_default(),
        tree: SaveTree::Cache,
        run_as: row.run_as,
        failed_claim: row.failed,
        persist: workload.spec.persist.clone(),
        max_bytes: max_bytes(workload),
    }
}

/// Returns the most bytes a workload's state may have.
pub(super) fn max_bytes(workload: &Workload) -> Option<u64> {
    workload.spec.resources.state_max_mb.map(|mb| mb.saturating_mul(1 << 20))
}

/// Marks a save as ended when its task is, unless it has another outcome by then.
struct EndedOnDrop(Arc<Unsaved>);

impl Drop for EndedOnDrop {
    fn drop(&mut self) {
        self.0.outcome.send_if_modified(|outcome| {
            let open = matches!(outcome, SaveOutcome::Saving | SaveOutcome::Retrying(_));
            if open {
                *outcome = SaveOutcome::Ended;
            }
            open
        });
    }
}
