//! Claims: the binding of a tenant to a slot, from request to release.
//!
//! ```text
//! api, upkeep ── Tenancy ── one tracked task a request ── Entry.guard (P1)
//!                   ├ claim    before_claim → slot → CLAIMING → fill → on_claim → activate → ACTIVE
//!                   ├ release  RELEASING → before_release → stop → capture → DIRTY → after_release
//!                   ├ save     data → record → read back → CLEAN, for as long as it takes
//!                   ├ prefetch store → cache, before a claim asks for it
//!                   ├ resolve  an operator decides what a save could not
//!                   ├ sync     copy → pause → copy what changed → unpause → save
//!                   └ adopt    what survived a restart is finished or undone
//! ```
//!
//! # Invariants
//! - Whoever changes a claim holds its entry's guard; a save holds none, because
//!   the next claim may take its tree.
//! - No claim begins before this server is known to hold the store, and none without a
//!   record in the store of which another server would know.
//! - The journal is written before the act it announces: CLAIMING before the
//!   fill, DIRTY before the slot is retired.
//! - A failed claim goes the way of a release: its slot is captured and retired.

mod adopt;
mod answer;
mod cache;
mod claim;
mod history;
mod host;
mod opening;
mod ownership;
mod prefetch;
mod registry;
mod release;
mod resolve;
mod save;
mod secrets;
mod sync;
mod wire;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use dashmap::{DashMap, DashSet};

use self::{
    cache::Cache,
    ownership::Ownership,
    registry::{Entry, Live},
};
pub use self::{
    cache::{CacheLimits, CacheSize},
    history::*,
    prefetch::PrefetchAnswer,
    resolve::*,
    wire::*,
};
use crate::{
    clock::{SharedClock, random_hex},
    journal::{self, ClaimRow, Durability, Journal, Op, TreeRow},
    lifecycle::{CrashPoints, Tasks},
    model::{ClaimState, Key, Secret, SlotId, TenantId, WorkloadId},
    pool::Pools,
    runtime::SharedRuntime,
    script::{Hook, HookError, Runner, Set, Verdict, Workload},
    seal::MasterKey,
    state::{Encryption, SharedFiles, fence::Mode, history::History},
    store::SharedStore,
    telemetry::Metrics,
};

/// How long a request waits for another one of the same claim.
const GUARD_WAIT: Duration = Duration::from_secs(30);
/// How long a claim waits for a slot when it does not say.
const DEFAULT_WAIT_MS: u64 = 10_000;
/// The longest a claim may ask to wait.
const MAX_WAIT_MS: u64 = 300_000;
/// How long a release waits for its state to be durable before it answers `pending`.
const RELEASE_WAIT: Duration = Duration::from_secs(30);
/// How long a claim waits for one answer of the store.
const STORE_WAIT: Duration = Duration::from_secs(10);
/// When to try again after a passing fault.
const RETRY_AFTER_MS: u64 = 1_000;
/// A sign of use is journaled when it is this much later than the one before.
const ACTIVITY_STEP_MS: u64 = 5_000;

/// What tenancy works with.
pub struct Parts {
    /// Time and randomness.
    pub clock: SharedClock,
    /// The container engine.
    pub runtime: SharedRuntime,
    /// The slots' directories and the store behind them.
    pub files: SharedFiles,
    /// The object store, for what needs no slot.
    pub store: SharedStore,
    /// The durable record.
    pub journal: Journal,
    /// Runs hooks.
    pub runner: Runner,
    /// The workloads in force.
    pub scripts: Arc<ArcSwap<Set>>,
    /// The warm pools.
    pub pools: Pools,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Where tasks are spawned.
    pub tasks: Tasks,
    /// Where a test may stop the node.
    pub crash: CrashPoints,
    /// Seals stored secrets; none: they are refused.
    pub master_key: Option<MasterKey>,
    /// Opens and seals state, as `files` does.
    pub encryption: Encryption,
    /// This installation's identity.
    pub instance: String,
    /// Whether other servers use the store, too.
    pub mode: Mode,
    /// What bounds the node's cache.
    pub cache: CacheLimits,
}

/// Carries out claims and releases, and answers what there is; clones share one state.
#[derive(Clone)]
pub struct Tenancy {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    entries: DashMap<Key, Arc<Entry>>,
    trees: DashMap<Key, TreeRow>,
    tenants: DashMap<TenantId, serde_json::Map<String, serde_json::Value>>,
    with_secrets: DashSet<TenantId>,
    erasing: DashSet<TenantId>,
    history: History,
    cache: Cache,
    slot_owners: DashMap<SlotId, Key>,
    digest_key: [u8; 32],
    started: AtomicBool,
    health: Mutex<BTreeMap<&'static str, String>>,
    ownership: Ownership,
    syncs: tokio::sync::Semaphore,
}

// === impl Tenancy ===

impl Tenancy {
    /// Claims a slot for a tenant. The claim goes on when the call is dropped.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn claim(&self, tenant: TenantId, request: ClaimRequest) -> Result<ClaimAnswer, Error> {
        self.inner.check_open()?;
        let workload = self.inner.workload(request.workload.as_ref())?;
        claim::check(&request, &workload)?;
        let key = Key::new(tenant, workload.spec.id.clone());
        let inner = Arc::clone(&self.inner);
        let task = self.inner.parts.tasks.spawn("claim", {
            let key = key.clone();
            async move { inner.claim(&key, &workload, request).await }
        });
        match task.await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(Error::ShuttingDown),
            Err(panic) => {
                let error = self.inner.internal(&panic, "a claim panicked");
                let inner = Arc::clone(&self.inner);
                self.inner.parts.tasks.spawn("undo claim", async move { inner.undo_half_claim(&key).await });
                Err(error)
            }
        }
    }

    /// Releases a tenant's claim. The release goes on when the call is dropped.
    ///
    /// # Errors
    /// [`Error::StaleEpoch`] for another epoch than the current claim's, and the
    /// errors of finding the workload.
    pub async fn release(&self, tenant: TenantId, request: ReleaseRequest) -> Result<ReleaseAnswer, Error> {
        self.inner.check_open()?;
        let key = self.inner.key(tenant, request.workload.as_ref())?;
        let outcome = self.inner.release(&key, request.epoch, request.wait).await;
        let told = outcome.as_ref().map_or_else(Error::code, |answer| answer.state.as_str());
        self.inner.parts.metrics.release(key.workload.as_str(), told);
        outcome
    }

    /// Returns the tenant's claims and newest snapshots.
    ///
    /// # Errors
    /// [`Error::Starting`]: claims that survived are not known yet, and "no claim"
    /// would be a guess.
    pub async fn status(&self, tenant: TenantId) -> Result<TenantStatus, Error> {
        self.inner.check_started()?;
        Ok(self.inner.status(tenant))
    }

    /// Resets the idle clock of a claim.
    ///
    /// # Errors
    /// [`Error::NotClaimed`], and the errors of finding the workload.
    pub async fn touch(&self, tenant: TenantId, workload: Option<WorkloadId>) -> Result<(), Error> {
        self.inner.check_open()?;
        let key = self.inner.key(tenant, workload.as_ref())?;
        let live = self.inner.active(&key)?;
        self.inner.note_activity(&live, self.inner.now_ms()).await;
        Ok(())
    }

    /// Saves a claimed tenant's state while its program runs.
    ///
    /// # Errors
    /// [`Error::NotClaimed`], [`Error::StoreUnavailable`], [`Error::StateConflict`] and others.
    pub async fn sync(&self, tenant: TenantId, workload: Option<WorkloadId>) -> Result<SyncAnswer, Error> {
        self.inner.check_open()?;
        let key = self.inner.key(tenant, workload.as_ref())?;
        let live = self.inner.active(&key)?;
        let inner = Arc::clone(&self.inner);
        let task = self.inner.parts.tasks.spawn("sync", async move { inner.sync(&key, &live).await });
        match task.await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(Error::ShuttingDown),
            Err(panic) => Err(self.inner.internal(&panic, "a sync panicked")),
        }
    }

    /// Replaces a tenant's metadata.
    ///
    /// # Errors
    /// [`Error::Internal`] when it cannot be journaled.
    pub async fn put_tenant(
        &self,
        tenant: TenantId,
        metadata: serde_json::Map<String, serde_json::Value>,
    ) -> Result<(), Error> {
        self.inner.not_being_erased(&tenant)?;
        self.inner.commit(vec![Op::PutTenant(tenant.clone(), metadata.clone())], Durability::Hard).await?;
        self.inner.tenants.insert(tenant, metadata);
        Ok(())
    }

    /// Stores a tenant's secret, sealed; claims from now on get it as a file.
    ///
    /// # Errors
    /// [`Error::NoMasterKey`]; [`Error::Invalid`] for a bad name.
    pub async fn put_secret(&self, tenant: TenantId, name: &str, secret: Secret) -> Result<(), Error> {
        self.inner.put_secret(&tenant, name, &secret).await
    }

    /// Lists the names of a tenant's stored secrets.
    ///
    /// # Errors
    /// [`Error::Internal`] when the journal cannot be read.
    pub async fn secret_names(&self, tenant: TenantId) -> Result<Vec<String>, Error> {
        self.inner.secret_names(&tenant)
    }

    /// Removes a tenant's stored secret.
    ///
    /// # Errors
    /// [`Error::UnknownSecret`].
    pub async fn delete_secret(&self, tenant: TenantId, name: &str) -> Result<(), Error> {
        self.inner.delete_secret(&tenant, name).await
    }

    /// Returns the workloads in force.
    pub fn workloads(&self) -> Vec<WorkloadStatus> {
        self.inner.parts.scripts.load().iter().map(answer::workload_status).collect()
    }

    /// Returns every pool's status.
    pub fn pools(&self) -> Vec<PoolStatus> {
        self.inner.parts.pools.status()
    }

    /// Returns every slot.
    pub fn slots(&self) -> Vec<SlotStatus> {
        self.inner.parts.pools.slots()
    }

    /// Returns whether requests can be served, and what does not work.
    pub fn readiness(&self) -> Readiness {
        let health = self.inner.health.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reasons: Vec<_> = health.iter().map(|(part, reason)| format!("{part}: {reason}")).collect();
        if !self.inner.started.load(Ordering::Acquire) {
            reasons.insert(0, "taking over what survived the last stop".to_owned());
            return Readiness { status: "starting", reasons };
        }
        Readiness { status: if reasons.is_empty() { "ready" } else { "degraded" }, reasons }
    }

    /// Notes that a part of the server works (`None`) or does not, for [`Tenancy::readiness`].
    pub fn set_health(&self, part: &'static str, reason: Option<String>) {
        self.inner.set_part(part, reason);
    }

    /// Says that a container does not run any more: a claimed slot's state is
    /// captured and saved, a ready slot is replaced.
    pub async fn container_died(&self, slot: &SlotId) {
        self.inner.container_died(slot).await;
    }

    /// Takes up what a task that ended abnormally has left: claims that are neither
    /// up nor on their way to an end, and saves that nobody goes on with.
    pub fn finish_abandoned(&self) {
        self.inner.finish_abandoned();
    }

    /// Releases claims without a sign of use for `idle_ms`.
    pub async fn release_idle(&self, idle_ms: u64) {
        self.inner.release_idle(idle_ms).await;
    }

    /// Saves claims whose `persist.every_ms` has passed.
    pub async fn sync_due(&self) {
        self.inner.sync_due().await;
    }
}

// === impl Inner ===

impl Inner {
    fn set_part(&self, part: &'static str, reason: Option<String>) {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match reason {
            Some(reason) => health.insert(part, reason),
            None => health.remove(part),
        };
    }

    fn check_open(&self) -> Result<(), Error> {
        if self.parts.tasks.draining().is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        self.check_started()
    }

    fn check_started(&self) -> Result<(), Error> {
        if !self.started.load(Ordering::Acquire) {
            return Err(Error::Starting { retry_after_ms: RETRY_AFTER_MS });
        }
        Ok(())
    }

    /// Finds the workload a new claim is for.
    fn workload(&self, asked: Option<&WorkloadId>) -> Result<Arc<Workload>, Error> {
        let set = self.parts.scripts.load();
        match asked {
            Some(id) => set
                .get(id)
                .cloned()
                .ok_or_else(|| Error::UnknownWorkload { given: id.to_string(), known: known(&set) }),
            None => set.only().cloned().ok_or_else(|| Error::WorkloadRequired { known: known(&set) }),
        }
    }

    /// Finds what a request about an existing claim is about: a claim outlives
    /// its workload's file.
    fn key(&self, tenant: TenantId, asked: Option<&WorkloadId>) -> Result<Key, Error> {
        if let Some(id) = asked {
            let key = Key::new(tenant, id.clone());
            if self.entries.contains_key(&key) {
                return Ok(key);
            }
            return self.workload(asked).map(|workload| Key::new(key.tenant, workload.spec.id.clone()));
        }
        self.workload(None).map(|workload| Key::new(tenant, workload.spec.id.clone()))
    }

    fn entry(&self, key: &Key) -> Arc<Entry> {
        Arc::clone(&self.entries.entry(key.clone()).or_default())
    }

    /// Forgets an entry that has nothing to say; whoever still waits for its guard keeps it.
    fn tidy(&self, key: &Key, entry: Arc<Entry>) {
        drop(entry);
        let removed =
            self.entries.remove_if(key, |_, entry| Arc::strong_count(entry) == 1 && entry.is_at_rest());
        if removed.is_some() {
            self.cache.look_soon();
        }
    }

    fn active(&self, key: &Key) -> Result<Arc<Live>, Error> {
        self.entries
            .get(key)
            .and_then(|entry| entry.live())
            .filter(|live| live.row().state == ClaimState::Active)
            .ok_or_else(|| Error::NotClaimed { tenant: key.tenant.clone(), workload: key.workload.clone() })
    }

    async fn lock<'a>(&self, entry: &'a Entry) -> Result<tokio::sync::MutexGuard<'a, ()>, Error> {
        loop {
            match tokio::time::timeout(GUARD_WAIT, entry.guard.lock()).await {
                Ok(guard) => return Ok(guard),
                // What is waited for would have to be fetched anyway.
                Err(_) if entry.is_fetching.load(Ordering::Acquire) => {}
                Err(_) => return Err(Error::Busy { retry_after_ms: RETRY_AFTER_MS }),
            }
        }
    }

    async fn note_activity(&self, live: &Live, now_ms: u64) {
        if live.touch(now_ms, ACTIVITY_STEP_MS) {
            let active = |row: &mut ClaimRow| Ok((row.state == ClaimState::Active).then(Vec::new));
            let _ = self.write_row(live, Durability::Soft, active).await;
        }
    }

    /// Changes a claim's row in the journal and then in memory, one change at a time:
    /// a checkpoint must not bring back the state that a release has just ended.
    /// `change` answers what else is committed with it, or `None` to change nothing.
    async fn write_row(
        &self,
        live: &Live,
        durability: Durability,
        change: impl FnOnce(&mut ClaimRow) -> Result<Option<Vec<Op>>, Error>,
    ) -> Result<bool, Error> {
        let _writer = live.writer.lock().await;
        let mut row = live.row();
        let Some(mut ops) = change(&mut row)? else { return Ok(false) };
        ops.push(Op::PutClaim(Box::new(row.clone())));
        self.commit(ops, durability).await?;
        live.set_row(row);
        Ok(true)
    }

    async fn commit(&self, ops: Vec<Op>, durability: Durability) -> Result<(), Error> {
        self.parts.journal.commit(ops, durability).await.map_err(|error| self.journal_failed(&error))
    }

    fn journal_failed(&self, error: &journal::Error) -> Error {
        self.internal(error, "the journal could not be written")
    }

    /// Logs an error that no client can do anything about, under an id.
    fn internal(&self, error: &(dyn std::error::Error + 'static), what: &'static str) -> Error {
        let id = random_hex(&*self.parts.clock, 6);
        tracing::error!(id, error, what);
        Error::Internal { id }
    }

    async fn hook(
        &self,
        workload: &Arc<Workload>,
        hook: Hook,
        facts: crate::script::Facts,
        host: Option<crate::script::SharedHost>,
    ) -> Result<Verdict, HookError> {
        if !workload.has(hook) {
            return Ok(Verdict::Default);
        }
        let began = tokio::time::Instant::now();
        let outcome = self.parts.runner.run(workload, hook, facts, host).await;
        self.parts.metrics.hook(hook.name(), began.elapsed(), outcome.is_err());
        outcome
    }

    /// Logs a failed hook under an id and turns it into the claim's error.
    fn hook_failed(&self, key: &Key, hook: Hook, error: &HookError) -> Error {
        let id = random_hex(&*self.parts.clock, 6);
        tracing::warn!(
            id,
            tenant = %key.tenant,
            workload = %key.workload,
            hook = hook.name(),
            error = error as &dyn std::error::Error,
            "hook failed"
        );
        Error::HookFailed { hook: hook.name(), id }
    }

    fn now_ms(&self) -> u64 {
        self.parts.clock.unix_ms()
    }
}

fn known(set: &Set) -> Vec<WorkloadId> {
    set.iter().map(|workload| workload.spec.id.clone()).collect()
}
