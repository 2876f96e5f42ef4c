//! Saves what a release left on this node, for as long as it takes.

use std::{sync::Arc, time::Duration};

use tracing::{error, info, warn};

use super::{
    Inner, STORE_WAIT, answer,
    registry::{Entry, SaveOutcome, Unsaved},
};
use crate::{
    crash_point,
    journal::{ClaimRow, Durability, Op, TreeRow},
    model::{ClaimState, Key, SnapshotRef},
    retry::Backoff,
    script::Workload,
    state::{
        self, Base, Save, SaveTree,
        fence::{self, Author, Standing},
    },
};

const SAVE: Backoff = Backoff { base_ms: 500, cap_ms: 60_000 };
/// While something must change before a save can succeed, it is tried this rarely.
const STUCK: Backoff = Backoff { base_ms: 60_000, cap_ms: 600_000 };
/// How often a server that has lost its store looks whether its saves are overtaken.
const OVERTAKEN_EVERY: Duration = Duration::from_secs(15);

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
        // Right after a start this takes a moment, and is no failure of the save.
        tokio::select! {
            biased;
            () = unsaved.cancel.cancelled() => return,
            () = draining.cancelled() => return,
            () = self.ownership.asked() => {}
        }
        loop {
            let row = unsaved.row();
            if let Some(reason) = self.ownership.obstacle() {
                unsaved.outcome.send_replace(SaveOutcome::Retrying(reason));
                tokio::select! {
                    biased;
                    () = unsaved.cancel.cancelled() => return,
                    () = draining.cancelled() => return,
                    () = self.ownership.changed() => continue,
                    fenced = self.overtaken(key, &row) => {
                        self.journal_conflict(key, unsaved, row, &fenced).await;
                        return;
                    }
                }
            }
            if row.close {
                let wait = tokio::select! {
                    biased;
                    () = unsaved.cancel.cancelled() => return,
                    wait = self.close_once(key, unsaved, failures) => wait,
                };
                let Some(wait) = wait else { return };
                failures += 1;
                tokio::select! {
                    biased;
                    () = unsaved.cancel.cancelled() => return,
                    () = draining.cancelled() => return,
                    () = tokio::time::sleep(wait) => continue,
                }
            }
            let save = Save {
                author: self.ownership.author(row.term),
                base: self.base(key, &row),
                ..claim_save(key, &row, &unsaved.workload)
            };
            let began = tokio::time::Instant::now();
            // Biased: a later claim waits for this task to let go of the tree.
            let outcome = tokio::select! {
                biased;
                () = unsaved.cancel.cancelled() => return,
                outcome = self.parts.files.save(&save) => outcome,
            };
            let wait = match outcome {
                Ok(saved) => {
                    self.published();
                    crash_point!(self.parts.crash, "save.saved");
                    self.parts.metrics.save("ok", began.elapsed());
                    self.journal_clean(key, unsaved, row, saved.snapshot).await;
                    return;
                }
                Err(error @ (state::Error::Fenced { .. } | state::Error::Torn { .. })) => {
                    self.parts.metrics.save("conflict", began.elapsed());
                    self.journal_conflict(key, unsaved, row, &error).await;
                    // Whoever is fenced may have lost the store as well.
                    self.ownership.look_soon();
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

    /// Tries once to bring the save of a tree to its end that nothing has changed since;
    /// returns whether that is done. Under the guard.
    pub(super) async fn finish_owed(&self, key: &Key, entry: &Entry) -> bool {
        let Some(unsaved) = entry.owed_trees().pop() else { return false };
        if self.ownership.obstacle().is_some() {
            return false;
        }
        let row = unsaved.row();
        let save = Save {
            author: self.ownership.author(row.term),
            base: self.base(key, &row),
            ..claim_save(key, &row, &unsaved.workload)
        };
        let Ok(Ok(saved)) = tokio::time::timeout(STORE_WAIT, self.parts.files.save(&save)).await else {
            return false;
        };
        self.journal_clean(key, &unsaved, row, saved.snapshot).await;
        true
    }

    /// Waits until a claim of another server has overtaken what is to be saved. Reads only:
    /// the store is not ours to write to.
    async fn overtaken(&self, key: &Key, row: &ClaimRow) -> state::Error {
        let nonce = row.nonce.as_deref().unwrap_or_default();
        loop {
            // A claim without a tree has nothing that could be in conflict.
            if self.ownership.is_elsewhere()
                && !row.close
                && let Ok(Some(head)) = self.parts.files.head(key).await
                && let Standing::Fenced(newest) =
                    fence::standing(Some(&head.link), &self.parts.instance, row.epoch, nonce)
            {
                return state::Error::Fenced { key: key.clone(), own: row.epoch, newest };
            }
            tokio::time::sleep(OVERTAKEN_EVERY).await;
        }
    }

    /// Tries once to write the end of a claim; answers when to try again.
    async fn close_once(&self, key: &Key, unsaved: &Unsaved, failures: u32) -> Option<Duration> {
        if let Err(error) = self.close_claim(key, unsaved).await {
            warn!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "end of a claim is not in the store yet");
            unsaved.outcome.send_replace(SaveOutcome::Retrying(answer::chain(&error)));
            return Some(SAVE.wait(failures, &*self.parts.clock));
        }
        crash_point!(self.parts.crash, "close.closed");
        let epoch = unsaved.row().epoch;
        if let Err(error) =
            self.parts.journal.commit(vec![Op::DropClaim(key.clone(), epoch)], Durability::Soft).await
        {
            // After a restart it is tried again, and finds nothing to close.
            error!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "closed claim is not journaled");
        }
        self.entry(key).settle(epoch);
        None
    }

    async fn journal_clean(&self, key: &Key, unsaved: &Unsaved, mut row: ClaimRow, snapshot: SnapshotRef) {
        row.state = ClaimState::Clean;
        row.snapshot = Some(snapshot.clone());
        row.nonce = None;
        row.decided_on = None;
        // Nobody changes the tree's row meanwhile: a claim that takes it waits for this save's end.
        let owner = self.trees.get(key).and_then(|tree| tree.owner);
        let tree = TreeRow {
            key: key.clone(),
            epoch: row.epoch,
            cached: true,
            saved: Some(snapshot.clone()),
            owner,
            opened: self.trees.get(key).and_then(|tree| tree.opened),
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
        self.cache.note_use(key, self.now_ms());
        unsaved.set_row(row.clone());
        entry.settle(row.epoch);
        unsaved.outcome.send_replace(SaveOutcome::Saved(snapshot));
    }

    /// Says what the save of a claim may come after.
    fn base(&self, key: &Key, row: &ClaimRow) -> Base {
        match row.decided_on {
            Some(record) => Base::Decided(record),
            None if self.has_chain(key, row) => Base::Chain,
            None => Base::Any,
        }
    }

    /// Returns whether this node knows that the store had a record of a key.
    pub(super) fn has_chain(&self, key: &Key, row: &ClaimRow) -> bool {
        let knows = |tree: &TreeRow| tree.opened.is_some() || tree.saved.is_some();
        row.opened || self.trees.get(key).is_some_and(|tree| knows(&tree))
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
        author: Author::default(),
        is_last: true,
        persist: workload.spec.persist.clone(),
        max_bytes: max_bytes(workload),
        base: Base::Any,
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
