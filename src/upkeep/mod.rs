//! Work that time asks for. Jobs only *request*: tenancy and the pools carry out.
//!
//! | job | every | asks for |
//! |---|---|---|
//! | idle | 1–15 s | release of claims without a sign of use |
//! | sync | 1 s | checkpoints whose `persist.every_ms` has passed |
//! | cache | 1 s | trees to go that the node's cache has no room for |
//! | health | 15 s | a look at engine and store, for `/readyz` |
//! | erasures | 60 s | going on with erasures that were begun and did not end |
//! | collection | 1 h | removal of objects that no kept snapshot needs |
//! | dangling | 30 s | removal of containers that no slot knows, notice of dead ones |
//!
//! Beside them runs one task that listens to the engine's events, so that a
//! death is noticed at once and not after half a minute.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};
use tracing::{debug, info, warn};

use crate::{
    clock::SharedClock,
    lifecycle::Tasks,
    model::SlotId,
    pool::Pools,
    retry::Backoff,
    runtime::{ContainerStatus, EventKind, SharedRuntime},
    store::SharedStore,
    telemetry::chain,
    tenancy::{CollectRequest, Tenancy},
};

const HEALTH_EVERY: Duration = Duration::from_secs(15);
const DANGLING_EVERY: Duration = Duration::from_secs(30);
const SYNC_EVERY: Duration = Duration::from_secs(1);
const CACHE_EVERY: Duration = Duration::from_secs(1);
const ERASURES_EVERY: Duration = Duration::from_secs(60);
const COLLECT_EVERY: Duration = Duration::from_secs(60 * 60);
const LISTEN: Backoff = Backoff { base_ms: 500, cap_ms: 15_000 };

/// What upkeep works with.
#[derive(Clone)]
pub struct Upkeep {
    /// Claims.
    pub tenancy: Tenancy,
    /// Pools.
    pub pools: Pools,
    /// The container engine.
    pub runtime: SharedRuntime,
    /// The object store.
    pub store: SharedStore,
    /// Time and randomness.
    pub clock: SharedClock,
    /// Where tasks are spawned.
    pub tasks: Tasks,
    /// This installation's identity.
    pub instance: String,
    /// `BOILERHOUSE_IDLE_TIMEOUT_MS`; 0: never.
    pub idle_timeout_ms: u64,
}

// === impl Upkeep ===

impl Upkeep {
    /// Starts the jobs; they end when the tasks drain.
    ///
    /// # Errors
    /// The scheduler's, when it cannot be set up.
    pub async fn start(self) -> Result<(), JobSchedulerError> {
        let scheduler = JobScheduler::new().await?;
        if self.idle_timeout_ms > 0 {
            let every = Duration::from_millis((self.idle_timeout_ms / 4).clamp(1_000, 15_000));
            self.add(&scheduler, every, |upkeep| async move {
                upkeep.tenancy.release_idle(upkeep.idle_timeout_ms).await;
            })
            .await?;
        }
        self.add(&scheduler, SYNC_EVERY, |upkeep| async move { upkeep.tenancy.sync_due().await }).await?;
        self.add(&scheduler, CACHE_EVERY, |upkeep| async move { upkeep.tenancy.trim_cache().await }).await?;
        self.add(&scheduler, HEALTH_EVERY, |upkeep| async move { upkeep.look_at_health().await }).await?;
        self.add(&scheduler, ERASURES_EVERY, |upkeep| async move { upkeep.tenancy.finish_erasures().await })
            .await?;
        self.add(&scheduler, COLLECT_EVERY, |upkeep| async move { upkeep.collect().await }).await?;
        self.add(&scheduler, DANGLING_EVERY, |upkeep| async move { upkeep.reconcile().await }).await?;
        scheduler.start().await?;
        let upkeep = self.clone();
        self.tasks.spawn("engine events", async move { upkeep.listen().await });
        let draining = self.tasks.draining();
        self.tasks.spawn("scheduler", async move {
            draining.cancelled().await;
            let mut scheduler = scheduler;
            if let Err(error) = scheduler.shutdown().await {
                debug!(error = &error as &dyn std::error::Error, "scheduler did not shut down");
            }
        });
        Ok(())
    }

    /// Has what no kept snapshot needs removed from the store.
    pub async fn collect(&self) {
        match self.tenancy.collect(CollectRequest::default()).await {
            Ok(collected) => debug!(?collected, "collected"),
            Err(error) => debug!(error = &error as &dyn std::error::Error, "nothing is collected"),
        }
    }

    /// Compares the engine's containers with the pools' slots.
    ///
    /// A container is dangling when no slot knows it, before and after the list was
    /// made: one that is being created is in its pool's ledger before the engine is asked.
    pub async fn reconcile(&self) {
        let observed = match self.runtime.list(&self.instance).await {
            Ok(observed) => observed,
            Err(error) => {
                debug!(error = &error as &dyn std::error::Error, "engine cannot be listed");
                return;
            }
        };
        if self.tenancy.readiness().status == "starting" {
            return;
        }
        let mut seen: Vec<SlotId> = Vec::new();
        for container in &observed {
            let Some(labels) = &container.labels else { continue };
            if !self.pools.has_slot(&labels.slot) {
                info!(container = container.name, "removing a container that no slot knows");
                if let Err(error) = self.runtime.remove(&container.id.0).await {
                    warn!(
                        container = container.name,
                        error = &error as &dyn std::error::Error,
                        "dangling container is not removed yet"
                    );
                }
                continue;
            }
            if matches!(container.status, ContainerStatus::Exited { .. } | ContainerStatus::Dead) {
                self.tenancy.container_died(&labels.slot).await;
            }
            seen.push(labels.slot.clone());
        }
        for slot in self.pools.slots() {
            if matches!(slot.phase, "ready" | "claimed")
                && let Ok(id) = SlotId::new(slot.slot)
                && !seen.contains(&id)
                && matches!(self.runtime.inspect(&slot.container).await, Ok(None))
            {
                self.tenancy.container_died(&id).await;
            }
        }
        self.tenancy.finish_abandoned();
    }

    /// Looks whether engine and store answer, and says so to `/readyz`.
    pub async fn look_at_health(&self) {
        let engine = self.runtime.probe().await;
        self.tenancy.set_health("engine", engine.err().map(|error| chain(&error)));
        let store = self.store.list("t/", None, 1).await;
        self.tenancy.set_health("store", store.err().map(|error| chain(&error)));
    }

    async fn listen(&self) {
        let draining = self.tasks.draining();
        let mut attempt = 0;
        loop {
            match self.runtime.events(&self.instance).await {
                Ok(mut events) => {
                    attempt = 0;
                    // What happened between two streams is found by comparing.
                    self.reconcile().await;
                    loop {
                        let event = tokio::select! {
                            biased;
                            () = draining.cancelled() => return,
                            event = events.next() => event,
                        };
                        let Some(event) = event else { break };
                        let Some(slot) = event.slot else { continue };
                        match event.kind {
                            EventKind::Died | EventKind::Removed => self.tenancy.container_died(&slot).await,
                        }
                    }
                }
                Err(error) => debug!(error = &error as &dyn std::error::Error, "engine events cannot be had"),
            }
            tokio::select! {
                biased;
                () = draining.cancelled() => return,
                () = tokio::time::sleep(LISTEN.wait(attempt, &*self.clock)) => attempt += 1,
            }
        }
    }

    /// Adds a job that is skipped while its last run goes on.
    async fn add<F, Fut>(
        &self,
        scheduler: &JobScheduler,
        every: Duration,
        run: F,
    ) -> Result<(), JobSchedulerError>
    where
        F: Fn(Upkeep) -> Fut + Send + Sync + Clone + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (upkeep, busy) = (self.clone(), Arc::new(tokio::sync::Mutex::new(())));
        let job = Job::new_repeated_async(every, move |_, _| {
            let (upkeep, busy, run) = (upkeep.clone(), Arc::clone(&busy), run.clone());
            Box::pin(async move {
                let Ok(_only) = busy.try_lock() else { return };
                if upkeep.tasks.draining().is_cancelled() {
                    return;
                }
                let tasks = upkeep.tasks.clone();
                // Tracked, so that a shutdown waits for it.
                let _ = tasks.spawn("upkeep", run(upkeep)).await;
            })
        })?;
        scheduler.add(job).await.map(|_| ())
    }
}
