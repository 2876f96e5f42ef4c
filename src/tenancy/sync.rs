//! Checkpoints: a claimed tenant's state saved while its program runs.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Error, GUARD_WAIT, Inner, RETRY_AFTER_MS, SyncAnswer, answer, registry::Live, save::max_bytes};
use crate::{
    clock::random_hex,
    crash_point,
    journal::{ClaimRow, Durability, Op, TreeRow},
    model::{ClaimState, ContainerId, Key},
    retry::Backoff,
    runtime::{ContainerStatus, SharedRuntime},
    state::{Base, CheckpointId, Save, SaveTree},
};

/// Checkpoints that upkeep makes at once.
pub(super) const SYNCS_AT_ONCE: usize = 4;
const UNPAUSE: Backoff = Backoff { base_ms: 100, cap_ms: 5_000 };

/// Lets a paused container go on, even if whoever paused it panics.
struct Paused {
    inner: Arc<Inner>,
    container: ContainerId,
    armed: bool,
}

// === impl Inner ===

impl Inner {
    pub(super) async fn sync(self: &Arc<Self>, key: &Key, live: &Arc<Live>) -> Result<SyncAnswer, Error> {
        let workload = &live.workload;
        if workload.spec.volumes.state.is_none() {
            let problem = format!("workload {} has no `volumes.state` to save", key.workload);
            return Err(Error::Invalid { field: "workload".to_owned(), problem });
        }
        self.ownership.term().await?;
        let _sync = tokio::time::timeout(GUARD_WAIT, live.sync.lock())
            .await
            .map_err(|_| Error::Busy { retry_after_ms: RETRY_AFTER_MS })?;
        if live.row().state != ClaimState::Active {
            return Err(Error::NotClaimed { tenant: key.tenant.clone(), workload: key.workload.clone() });
        }
        live.set_synced(self.now_ms());
        let checkpoint = self.parts.files.copy_live(&live.slot, key).await;
        let checkpoint = checkpoint.map_err(|error| self.state_error(key, &error))?;
        let outcome = self.sync_checkpoint(key, live, &checkpoint).await;
        if let Err(error) = self.parts.files.drop_checkpoint(&checkpoint).await {
            warn!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "checkpoint's copy stays until the next start");
        }
        outcome
    }

    async fn sync_checkpoint(
        self: &Arc<Self>,
        key: &Key,
        live: &Arc<Live>,
        checkpoint: &CheckpointId,
    ) -> Result<SyncAnswer, Error> {
        let paused_ms = self.freeze(key, live, checkpoint).await?;
        let nonce = random_hex(&*self.parts.clock, 16);
        let attempt = |row: &mut ClaimRow| {
            row.nonce = Some(nonce.clone());
            Ok((row.state == ClaimState::Active).then(Vec::new))
        };
        if !self.write_row(live, Durability::Soft, attempt).await? {
            return Err(Error::NotClaimed { tenant: key.tenant.clone(), workload: key.workload.clone() });
        }
        let save = Save {
            key: key.clone(),
            epoch: live.epoch(),
            nonce,
            tree: SaveTree::Checkpoint(checkpoint.clone()),
            run_as: live.made.run_as,
            failed_claim: false,
            author: self.ownership.author(live.row().term),
            is_last: false,
            persist: live.workload.spec.persist.clone(),
            max_bytes: max_bytes(&live.workload),
            base: if self.has_chain(key, &live.row()) { Base::Chain } else { Base::Any },
        };
        let began = Instant::now();
        let saved = tokio::select! {
            biased;
            () = live.cancel_sync.cancelled() => return Err(Error::Busy { retry_after_ms: RETRY_AFTER_MS }),
            saved = self.parts.files.save(&save) => saved,
        };
        let saved = match saved {
            Ok(saved) => saved,
            Err(error) => {
                self.parts.metrics.save("failed", began.elapsed());
                return Err(self.state_error(key, &error));
            }
        };
        self.parts.metrics.save("ok", began.elapsed());
        self.published();
        crash_point!(self.parts.crash, "sync.saved");
        let tree = TreeRow {
            key: key.clone(),
            epoch: live.epoch(),
            cached: true,
            saved: Some(saved.snapshot.clone()),
            owner: Some(live.made.run_as),
            opened: self.trees.get(key).and_then(|tree| tree.opened),
        };
        let note = |row: &mut ClaimRow| {
            row.snapshot = Some(saved.snapshot.clone());
            Ok(Some(vec![Op::PutTree(tree.clone())]))
        };
        self.write_row(live, Durability::Soft, note).await?;
        self.trees.insert(key.clone(), tree);
        info!(tenant = %key.tenant, workload = %key.workload, epoch = live.epoch().0, snapshot = saved.snapshot.number, paused_ms, "state synced");
        Ok(SyncAnswer {
            tenant: key.tenant.clone(),
            workload: key.workload.clone(),
            epoch: live.epoch(),
            snapshot: saved.snapshot.number,
            paused_ms,
            sent_bytes: saved.sent_bytes,
        })
    }

    /// Copies what changed since the live copy, under a pause that covers nothing else.
    async fn freeze(
        self: &Arc<Self>,
        key: &Key,
        live: &Live,
        checkpoint: &CheckpointId,
    ) -> Result<f64, Error> {
        let max_pause = Duration::from_millis(live.workload.spec.persist.max_pause_ms);
        let mut paused =
            Paused { inner: Arc::clone(self), container: live.made.container.clone(), armed: true };
        // Armed before the call: a pause whose outcome is unknown is undone as well (P8).
        if let Err(error) = self.parts.runtime.pause(&live.made.container).await {
            paused.undo().await;
            return Err(self.runtime_error("pause", &error));
        }
        let began = Instant::now();
        crash_point!(self.parts.crash, "sync.paused");
        let copied = tokio::time::timeout(max_pause, self.parts.files.copy_paused(checkpoint)).await;
        paused.undo().await;
        let paused_ms = answer::ms(began.elapsed());
        match copied {
            Ok(Ok(())) => Ok(paused_ms),
            Ok(Err(error)) => Err(self.state_error(key, &error)),
            Err(_) => Err(Error::Invalid {
                field: "persist.max_pause_ms".to_owned(),
                problem: format!(
                    "the state changes too fast to be copied within {} ms of pause; raise it, or save at release only",
                    max_pause.as_millis()
                ),
            }),
        }
    }

    pub(super) async fn sync_due(self: &Arc<Self>) {
        for (key, live) in self.live_claims() {
            let every_ms = live.workload.spec.persist.every_ms;
            let now_ms = self.now_ms();
            let stateless = live.workload.spec.volumes.state.is_none();
            if every_ms == 0 || stateless || now_ms.saturating_sub(live.synced_ms()) < every_ms {
                continue;
            }
            live.set_synced(now_ms);
            let inner = Arc::clone(self);
            self.parts.tasks.spawn("periodic sync", async move {
                let Ok(_permit) = inner.syncs.acquire().await else { return };
                if let Err(error) = inner.sync(&key, &live).await {
                    warn!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "periodic sync failed; the next one is tried at its time");
                }
            });
        }
    }
}

/// Lets a container go on, for as long as it takes, unless it is gone.
pub(super) async fn unpause(
    runtime: &SharedRuntime,
    container: &ContainerId,
    clock: &dyn crate::clock::Clock,
) {
    let mut attempt = 0;
    while let Err(error) = runtime.unpause(container).await {
        if let Ok(observed) = runtime.inspect(&container.0).await
            && observed.is_none_or(|observed| observed.status != ContainerStatus::Paused)
        {
            return;
        }
        error!(container = %container, error = &error as &dyn std::error::Error, "container is still paused");
        tokio::time::sleep(UNPAUSE.wait(attempt, clock)).await;
        attempt += 1;
    }
}

// === impl Paused ===

impl Paused {
    async fn undo(&mut self) {
        unpause(&self.inner.parts.runtime, &self.container, &*self.inner.parts.clock).await;
        self.armed = false;
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let (inner, container) = (Arc::clone(&self.inner), self.container.clone());
        self.inner.parts.tasks.spawn("unpause", async move {
            unpause(&inner.parts.runtime, &container, &*inner.parts.clock).await;
        });
    }
}
