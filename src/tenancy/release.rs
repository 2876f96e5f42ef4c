//! The end of a claim: released, failed, or its container lost.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::{
    Error, Inner, RELEASE_WAIT, ReleaseAnswer, ReleaseState, ReleaseWait, answer,
    claim::live_facts,
    host::ClaimHost,
    registry::{Entry, Live, SaveOutcome, Unsaved},
};
use crate::{
    clock::random_hex,
    crash_point,
    journal::{ClaimRow, Durability, Op, TreeRow},
    model::{ClaimState, Epoch, Key, SlotPhase, StateSource},
    retry::Backoff,
    runtime::{self, ContainerStatus},
    script::Hook,
};

const STOP: Backoff = Backoff { base_ms: 200, cap_ms: 10_000 };
const CAPTURE: Backoff = Backoff { base_ms: 200, cap_ms: 30_000 };

/// Why a claim ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Somebody asked, or it was idle.
    Released,
    /// The claim did not come up.
    Failed,
    /// Its container does not run any more.
    Lost,
}

/// What a release has done when its local part is over.
struct Local {
    epoch: Epoch,
    /// The save that follows; none when the state is not to be saved.
    unsaved: Option<Arc<Unsaved>>,
}

// === impl Ending ===

impl Ending {
    /// Returns the name used in logs.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Failed => "failed",
            Self::Lost => "lost",
        }
    }
}

// === impl Inner ===

impl Inner {
    pub(super) async fn release(
        self: &Arc<Self>,
        key: &Key,
        epoch: Option<Epoch>,
        wait: ReleaseWait,
    ) -> Result<ReleaseAnswer, Error> {
        let (accepted, journaled) = oneshot::channel();
        let (inner, task_key) = (Arc::clone(self), key.clone());
        let mut task = self.parts.tasks.spawn("release", async move {
            inner.release_task(&task_key, epoch, Ending::Released, Some(accepted)).await
        });
        let pending = |epoch, reason| ReleaseAnswer {
            state: ReleaseState::Pending,
            ..answer::release(key, epoch, Some(reason))
        };
        let late = tokio::time::sleep(RELEASE_WAIT);
        tokio::pin!(late);
        // Biased: an outcome that is there is better than an earlier milestone.
        let local = tokio::select! {
            biased;
            joined = &mut task => match joined {
                Ok(Some(outcome)) => outcome?,
                Ok(None) => return Err(Error::ShuttingDown),
                Err(panic) => return Err(self.internal(&panic, "a release panicked")),
            },
            Ok(epoch) = journaled, if wait == ReleaseWait::Accepted => {
                return Ok(pending(Some(epoch), "accepted".to_owned()));
            }
            () = &mut late => return Ok(pending(None, "the container is not stopped or its state not taken out yet".to_owned())),
        };
        let Some(Local { epoch, unsaved }) = local else {
            return Ok(ReleaseAnswer { state: ReleaseState::NotClaimed, ..answer::release(key, None, None) });
        };
        let Some(unsaved) = unsaved else {
            return Ok(ReleaseAnswer {
                state: ReleaseState::Discarded,
                ..answer::release(key, Some(epoch), None)
            });
        };
        if wait == ReleaseWait::Accepted {
            return Ok(pending(Some(epoch), "accepted".to_owned()));
        }
        let mut outcome = unsaved.outcome.subscribe();
        let settled = tokio::select! {
            biased;
            settled = outcome.wait_for(|outcome| *outcome != SaveOutcome::Saving) => {
                settled.map_or(SaveOutcome::Ended, |outcome| outcome.clone())
            }
            () = &mut late => SaveOutcome::Retrying("the save takes long".to_owned()),
        };
        match settled {
            SaveOutcome::Saved(snapshot) => Ok(ReleaseAnswer {
                state: ReleaseState::Durable,
                snapshot: Some(snapshot.number),
                ..answer::release(key, Some(epoch), None)
            }),
            SaveOutcome::Retrying(reason) => Ok(pending(Some(epoch), reason)),
            SaveOutcome::Conflict(reason) => {
                let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
                Err(Error::StateConflict { tenant, workload, reason })
            }
            SaveOutcome::Saving | SaveOutcome::Ended => Ok(pending(
                Some(epoch),
                "a later claim has taken the state over, or the server stops".to_owned(),
            )),
        }
    }

    /// Ends a claim under its guard. `accepted` hears when the end is journaled.
    async fn release_task(
        self: &Arc<Self>,
        key: &Key,
        epoch: Option<Epoch>,
        ending: Ending,
        accepted: Option<oneshot::Sender<Epoch>>,
    ) -> Result<Option<Local>, Error> {
        let entry = self.entry(key);
        let outcome = match self.lock(&entry).await {
            Ok(_guard) => self.release_guarded(key, epoch, ending, accepted, &entry).await,
            Err(error) => Err(error),
        };
        self.tidy(key, entry);
        outcome
    }

    async fn release_guarded(
        self: &Arc<Self>,
        key: &Key,
        epoch: Option<Epoch>,
        ending: Ending,
        accepted: Option<oneshot::Sender<Epoch>>,
        entry: &Arc<Entry>,
    ) -> Result<Option<Local>, Error> {
        let Some(live) = entry.live() else {
            // A repeated release waits for the save of the first.
            let last = entry.owed_trees().pop();
            return Ok(last
                .filter(|last| epoch.is_none_or(|epoch| epoch == last.row().epoch))
                .map(|last| Local { epoch: last.row().epoch, unsaved: Some(last) }));
        };
        let current = live.epoch();
        if let Some(given) = epoch.filter(|given| *given != current) {
            return Err(Error::StaleEpoch { given, current });
        }
        let row = live.row();
        let never_active = row.state == ClaimState::Claiming || row.failed;
        let ending = if never_active { Ending::Failed } else { ending };
        self.journal_end(&live, ending).await?;
        if let Some(accepted) = accepted {
            let _ = accepted.send(current);
        }
        let unsaved = self.end(key, entry, &live, ending).await;
        // A claim that did not come up and left nothing was none: nothing was thrown away.
        Ok((!never_active || unsaved.is_some()).then_some(Local { epoch: current, unsaved }))
    }

    async fn journal_end(&self, live: &Live, ending: Ending) -> Result<(), Error> {
        if live.row().state == ClaimState::Releasing {
            return Ok(());
        }
        // A checkpoint that runs has the container paused, so that no hook could act in
        // it. After this none begins. The claim's own save follows: this one may as well
        // be given up.
        live.cancel_sync.cancel();
        let _syncing = live.sync.lock().await;
        let owed = live.owed();
        let durability = if owed.is_empty() { Durability::Soft } else { Durability::Hard };
        let end = |row: &mut ClaimRow| {
            if row.state == ClaimState::Releasing {
                return Ok(None);
            }
            row.state =
                row.state.step(ClaimState::Releasing).map_err(|error| self.internal(&error, "claim step"))?;
            row.failed |= ending == Ending::Failed;
            Ok(Some(owed))
        };
        self.write_row(live, durability, end).await?;
        live.owe(Vec::new());
        Ok(())
    }

    /// Takes a claim from wherever it stands to its saved end; returns the save, if
    /// there is something to save. Goes on for as long as it takes; under the guard.
    pub(super) async fn end(
        self: &Arc<Self>,
        key: &Key,
        entry: &Arc<Entry>,
        live: &Arc<Live>,
        ending: Ending,
    ) -> Option<Arc<Unsaved>> {
        let row = live.row();
        let never_active = row.state == ClaimState::Claiming || row.failed;
        let phase = if ending == Ending::Lost { SlotPhase::Lost } else { SlotPhase::Releasing };
        self.step_slot(key, live, phase).await;
        self.keep_trying("claim end is not journaled yet", key, || self.journal_end(live, ending)).await;
        crash_point!(self.parts.crash, "release.releasing");
        if ending == Ending::Released {
            self.act(key, live, Hook::BeforeRelease).await;
        }
        self.stop(live, ending).await;
        crash_point!(self.parts.crash, "release.stopped");
        if ending == Ending::Lost {
            self.step_slot(key, live, SlotPhase::Releasing).await;
        }
        let unsaved = self.take_out(key, entry, live, never_active).await;
        crash_point!(self.parts.crash, "release.captured");
        if ending == Ending::Released {
            self.act(key, live, Hook::AfterRelease).await;
        }
        self.slot_owners.remove(&live.slot);
        entry.set_live(None);
        if let Some(pool) = self.parts.pools.get(&key.workload) {
            pool.retire(&live.slot).await;
        }
        info!(tenant = %key.tenant, workload = %key.workload, epoch = live.epoch().0, slot = %live.slot, ending = ending.name(), "claim ended");
        if let Some(unsaved) = &unsaved {
            self.start_save(key, Arc::clone(unsaved));
        }
        unsaved
    }

    /// Takes the state out of a slot whose container is gone, and journals what is to be done with it.
    async fn take_out(
        self: &Arc<Self>,
        key: &Key,
        entry: &Arc<Entry>,
        live: &Arc<Live>,
        never_active: bool,
    ) -> Option<Arc<Unsaved>> {
        let spec = &live.workload.spec;
        let row = live.row();
        // What an earlier claim owes to the store is not this spec's to throw away.
        if spec.volumes.state.is_none() || (!spec.persist.on_release && entry.owed_trees().is_empty()) {
            self.keep_trying("state is not thrown away yet", key, || {
                self.parts.files.discard_slot_state(&live.slot)
            })
            .await;
            if spec.volumes.state.is_some() {
                // The rest of a fill that did not end must not pass for a whole tree.
                self.keep_trying("half a fill is not removed yet", key, || self.parts.files.discard(key))
                    .await;
            }
            self.settle_without_save(key, entry, live, row, false).await;
            return None;
        }
        let mut attempt = 0;
        let captured = loop {
            match self.parts.files.capture(&live.slot, key).await {
                Ok(captured) => break captured,
                Err(error) => {
                    if attempt == 0 {
                        self.step_slot(key, live, SlotPhase::Stranded).await;
                    }
                    error!(tenant = %key.tenant, workload = %key.workload, slot = %live.slot, error = &error as &dyn std::error::Error, "state cannot be taken out of its slot; it is kept there");
                    tokio::time::sleep(CAPTURE.wait(attempt, &*self.parts.clock)).await;
                    attempt += 1;
                }
            }
        };
        if attempt > 0 {
            self.step_slot(key, live, SlotPhase::Releasing).await;
        }
        crash_point!(self.parts.crash, "release.moved");
        let whole = !never_active || captured.handed_over;
        let never_opened = row.nonce.is_some() && !row.opened;
        // No program of it ran: the tree is what an earlier claim has left.
        let as_it_was = !whole && never_opened && captured.is_cached;
        if as_it_was && self.is_saved(key, entry) {
            self.settle_without_save(key, entry, live, row, true).await;
            return None;
        }
        if !whole && row.state_source != StateSource::Cache {
            // What is there is at most a part of what the store has: it must not become
            // the newest snapshot, and nothing is lost with it.
            self.keep_trying("half a fill is not removed yet", key, || self.parts.files.discard(key)).await;
            self.settle_without_save(key, entry, live, row, false).await;
            return None;
        }
        if !whole && !captured.is_cached && self.is_saved(key, entry) {
            // Somebody removed the cached tree; the store has just what it was. Without
            // this the tenant would for ever be saving a tree that is not there.
            error!(tenant = %key.tenant, workload = %key.workload, "cached tree is gone from disk; the next claim takes the store's snapshot");
            self.settle_without_save(key, entry, live, row, false).await;
            return None;
        }
        // The same version of a tree is saved by the same attempt: it may have done it, and let
        // another server in.
        let before = entry.owed_trees().pop().filter(|_| as_it_was).and_then(|owed| owed.row().nonce);
        let nonce = before.unwrap_or_else(|| random_hex(&*self.parts.clock, 16));
        Some(self.journal_dirty(key, entry, live, ClaimRow { nonce: Some(nonce), ..row }).await)
    }

    /// Returns whether the store has a tenant's state as this node last had it.
    fn is_saved(&self, key: &Key, entry: &Entry) -> bool {
        entry.owed_trees().is_empty() && self.trees.get(key).is_some_and(|tree| tree.saved.is_some())
    }

    /// Journals DIRTY, hard: from now on this node has the only copy.
    async fn journal_dirty(
        &self,
        key: &Key,
        entry: &Arc<Entry>,
        live: &Live,
        mut row: ClaimRow,
    ) -> Arc<Unsaved> {
        row.state = row.state.step(ClaimState::Dirty).unwrap_or(ClaimState::Dirty);
        row.slot = None;
        let saved = self.trees.get(key).and_then(|tree| tree.saved.clone());
        let tree = TreeRow {
            key: key.clone(),
            epoch: row.epoch,
            cached: true,
            saved,
            owner: Some(live.made.run_as),
            opened: self.trees.get(key).and_then(|tree| tree.opened),
        };
        self.keep_trying("captured state is not journaled yet", key, || {
            let ops = vec![Op::PutClaim(Box::new(row.clone())), Op::PutTree(tree.clone())];
            self.commit(ops, Durability::Hard)
        })
        .await;
        self.trees.insert(key.clone(), tree);
        live.set_row(row.clone());
        let unsaved = Arc::new(Unsaved::new(row, Arc::clone(&live.workload), SaveOutcome::Saving));
        entry.add_unsaved(Arc::clone(&unsaved));
        unsaved
    }

    /// Ends a claim that leaves nothing behind that the store does not have.
    /// Its end is written to the store where the store may take it for open: a duty of its own.
    async fn settle_without_save(
        self: &Arc<Self>,
        key: &Key,
        entry: &Arc<Entry>,
        live: &Live,
        mut row: ClaimRow,
        cached: bool,
    ) {
        let known = self.trees.get(key).map(|tree| tree.clone());
        let saved = known.as_ref().and_then(|tree| tree.saved.clone());
        // A tree that came from the store was given to this claim's program.
        let owner = known.as_ref().and_then(|tree| tree.owner).or(Some(row.run_as)).filter(|_| cached);
        let opened = known.and_then(|tree| tree.opened);
        let tree = TreeRow { key: key.clone(), epoch: row.epoch, cached, saved, owner, opened };
        let closes = Self::needs_close(&row);
        if closes {
            row.state = row.state.step(ClaimState::Dirty).unwrap_or(ClaimState::Dirty);
            row.slot = None;
            row.close = true;
            row.nonce = Some(random_hex(&*self.parts.clock, 16));
        }
        self.keep_trying("ended claim is not journaled yet", key, || {
            let claim = if closes {
                Op::PutClaim(Box::new(row.clone()))
            } else {
                Op::DropClaim(key.clone(), row.epoch)
            };
            let mut ops = vec![claim, Op::PutTree(tree.clone())];
            ops.extend(entry.unsaved().iter().map(|before| Op::DropClaim(key.clone(), before.row().epoch)));
            self.commit(ops, Durability::Hard)
        })
        .await;
        entry.settle(row.epoch);
        self.trees.insert(key.clone(), tree);
        if cached {
            self.cache.note_use(key, self.now_ms());
        }
        if closes {
            crash_point!(self.parts.crash, "close.journaled");
            live.set_row(row.clone());
            let unsaved = Arc::new(Unsaved::new(row, Arc::clone(&live.workload), SaveOutcome::Saving));
            entry.add_unsaved(Arc::clone(&unsaved));
            self.start_save(key, unsaved);
        }
    }

    /// Stops the container, for as long as it takes (P8: looked up, never assumed).
    async fn stop(&self, live: &Live, ending: Ending) {
        let grace = match ending {
            Ending::Released => Duration::from_millis(live.workload.spec.stop_grace_ms),
            Ending::Failed | Ending::Lost => Duration::ZERO,
        };
        let mut attempt = 0;
        loop {
            let stopped = self
                .parts
                .runtime
                .stop(&live.made.container, live.workload.spec.stop_signal.as_deref(), grace)
                .await;
            match stopped {
                Ok(()) => return,
                Err(error) => {
                    if matches!(error, runtime::Error::Unknown { .. } | runtime::Error::Conflict { .. })
                        && self.is_stopped(live).await
                    {
                        return;
                    }
                    warn!(slot = %live.slot, error = &error as &dyn std::error::Error, "container is not stopped yet");
                }
            }
            tokio::time::sleep(STOP.wait(attempt, &*self.parts.clock)).await;
            attempt += 1;
        }
    }

    async fn is_stopped(&self, live: &Live) -> bool {
        match self.parts.runtime.inspect(&live.made.container.0).await {
            Ok(None) => true,
            Ok(Some(observed)) => {
                !matches!(observed.status, ContainerStatus::Running | ContainerStatus::Paused)
            }
            Err(_) => false,
        }
    }

    /// Runs a hook whose failure changes nothing.
    async fn act(self: &Arc<Self>, key: &Key, live: &Arc<Live>, hook: Hook) {
        if !live.workload.has(hook) {
            return;
        }
        let host = ClaimHost::new(Arc::clone(self), key.clone(), Arc::clone(live));
        let host: Option<crate::script::SharedHost> =
            if hook == Hook::BeforeRelease { Some(Arc::new(host)) } else { None };
        if let Err(error) = self.hook(&live.workload, hook, live_facts(key, live), host).await {
            self.hook_failed(key, hook, &error);
        }
    }

    async fn step_slot(&self, key: &Key, live: &Live, phase: SlotPhase) {
        if let Some(pool) = self.parts.pools.get(&key.workload) {
            pool.step(&live.slot, phase).await;
        }
    }

    /// Repeats what must succeed before anything else may happen, with backoff.
    pub(super) async fn keep_trying<F, Fut, E>(&self, what: &'static str, key: &Key, mut attempt: F)
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<(), E>>,
        E: std::error::Error + 'static,
    {
        let mut failures = 0;
        while let Err(error) = attempt().await {
            error!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, what);
            tokio::time::sleep(CAPTURE.wait(failures, &*self.parts.clock)).await;
            failures += 1;
        }
    }

    pub(super) async fn container_died(self: &Arc<Self>, slot: &crate::model::SlotId) {
        let Some(key) = self.slot_owners.get(slot).map(|key| key.clone()) else {
            self.parts.pools.died(slot).await;
            return;
        };
        let live = self.entries.get(&key).and_then(|entry| entry.live());
        let Some(live) = live.filter(|live| live.slot == *slot && live.row().state == ClaimState::Active)
        else {
            return;
        };
        // An activation or a hook may have restarted it: only what the engine says now counts (P8).
        if !self.is_stopped(&live).await {
            return;
        }
        warn!(tenant = %key.tenant, workload = %key.workload, slot = %slot, "container of a claim died; its state is saved");
        let inner = Arc::clone(self);
        let epoch = live.epoch();
        self.parts.tasks.spawn("lost claim", async move {
            let outcome = inner.release_task(&key, Some(epoch), Ending::Lost, None).await;
            if let Err(error) = outcome {
                warn!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "lost claim is not ended yet");
            }
        });
    }

    pub(super) async fn release_idle(self: &Arc<Self>, idle_ms: u64) {
        for (key, live) in self.live_claims() {
            let now_ms = self.now_ms();
            if now_ms.saturating_sub(live.active_ms()) < idle_ms {
                continue;
            }
            match self.parts.files.last_change_ms(&live.slot).await {
                Ok(Some(changed_ms)) if now_ms.saturating_sub(changed_ms) < idle_ms => {
                    self.note_activity(&live, changed_ms).await;
                    continue;
                }
                Ok(_) => {}
                Err(error) => {
                    warn!(slot = %live.slot, error = &error as &dyn std::error::Error, "activity cannot be seen; the claim stays");
                    continue;
                }
            }
            info!(tenant = %key.tenant, workload = %key.workload, idle_ms = now_ms.saturating_sub(live.active_ms()), "claim is idle");
            let inner = Arc::clone(self);
            let epoch = live.epoch();
            self.parts.tasks.spawn("idle release", async move {
                if let Err(error) = inner.release_if_idle(&key, epoch, idle_ms).await {
                    warn!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "idle claim is not released");
                }
            });
        }
    }

    /// Releases a claim unless it was used while this release waited for its turn.
    async fn release_if_idle(self: &Arc<Self>, key: &Key, epoch: Epoch, idle_ms: u64) -> Result<(), Error> {
        let entry = self.entry(key);
        let outcome = match self.lock(&entry).await {
            Ok(_guard) => {
                let idle = |live: &Live| self.now_ms().saturating_sub(live.active_ms()) >= idle_ms;
                if entry.live().is_some_and(|live| live.epoch() == epoch && idle(&live)) {
                    self.release_guarded(key, Some(epoch), Ending::Released, None, &entry).await.map(|_| ())
                } else {
                    Ok(())
                }
            }
            Err(error) => Err(error),
        };
        self.tidy(key, entry);
        outcome
    }

    /// Takes up claims and saves that no task goes on with: whoever holds a guard is at
    /// work, so what is unfinished behind a free one was left by a task that panicked.
    pub(super) fn finish_abandoned(self: &Arc<Self>) {
        let entries: Vec<_> =
            self.entries.iter().map(|entry| (entry.key().clone(), Arc::clone(&entry))).collect();
        for (key, entry) in entries {
            let Ok(held) = Arc::clone(&entry.guard).try_lock_owned() else {
                self.tidy(&key, entry);
                continue;
            };
            let Some(live) = entry.live().filter(|live| live.row().state != ClaimState::Active) else {
                self.resume_saves(&key, &entry);
                drop(held);
                self.tidy(&key, entry);
                continue;
            };
            let row = live.row();
            let released = row.state == ClaimState::Releasing && !row.failed;
            let ending = if released { Ending::Released } else { Ending::Failed };
            warn!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, slot = %live.slot, ending = ?ending, "unfinished claim goes to its end");
            let inner = Arc::clone(self);
            self.parts.tasks.spawn("end claim", async move {
                inner.end(&key, &entry, &live, ending).await;
                drop(held);
                inner.tidy(&key, entry);
            });
        }
    }

    /// Returns the claims that are active now.
    pub(super) fn live_claims(&self) -> Vec<(Key, Arc<Live>)> {
        self.entries
            .iter()
            .filter_map(|entry| entry.live().map(|live| (entry.key().clone(), live)))
            .filter(|(_, live)| live.row().state == ClaimState::Active)
            .collect()
    }
}
