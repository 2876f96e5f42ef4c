//! What is done to a tenant's history while nothing of it is claimed: rollback, fork,
//! collection, erasure.
//!
//! Each holds the guard of its key, so that no claim begins meanwhile. A save holds no
//! guard; therefore what is not saved yet is refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use super::{Error, Inner, RETRY_AFTER_MS, Tenancy, answer, registry::Entry, registry::SaveOutcome};
use crate::{
    clock::random_hex,
    crash_point,
    journal::{Durability, Op, TreeRow},
    model::{Epoch, Key, TenantId, WorkloadId},
    state::history::{self, Collected, Erased, Fork, Keep, Proof, Rollback},
};

/// Snapshots in one answer when the request does not say.
const PAGE: usize = 100;
/// Snapshots in one answer at most.
pub const MAX_PAGE: usize = 1_000;

/// The answer to `GET /tenants/{tenant}/snapshots`.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotsAnswer {
    /// Whose.
    pub tenant: TenantId,
    /// The workload.
    pub workload: WorkloadId,
    /// Newest first.
    pub snapshots: Vec<history::Entry>,
    /// There are more: ask again with `before` this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_before: Option<u64>,
}

/// The body of `POST /tenants/{tenant}/restore`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// Which workload; the only one there is when left out.
    #[serde(default)]
    pub workload: Option<WorkloadId>,
    /// The snapshot that becomes the newest state again.
    pub snapshot: u64,
}

/// The body of `POST /tenants/{tenant}/fork`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// Whose state.
    pub from: TenantId,
    /// Which workload; the only one there is when left out.
    #[serde(default)]
    pub workload: Option<WorkloadId>,
    /// Which snapshot; the newest when left out.
    #[serde(default)]
    pub snapshot: Option<u64>,
}

/// The answer to a restore and to a fork.
#[derive(Debug, Clone, Serialize)]
pub struct RestoredAnswer {
    /// Whose state.
    pub tenant: TenantId,
    /// The workload.
    pub workload: WorkloadId,
    /// The snapshot that the next claim begins with.
    pub snapshot: u64,
    /// The tenant that it came from, when it is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<TenantId>,
    /// The snapshot that it came from.
    pub restored_from: u64,
    /// Regular files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The answer to `DELETE /tenants/{tenant}`.
#[derive(Debug, Clone, Serialize)]
pub struct ErasedAnswer {
    /// Who was erased.
    pub tenant: TenantId,
    /// The workloads that the store had state of.
    pub workloads: Vec<WorkloadId>,
    /// Objects removed from the store.
    pub objects: u64,
    /// Copies that were set aside on this node, and are gone.
    pub set_aside: Vec<String>,
    /// What shows that nothing is left in the store.
    pub proof: Proof,
}

/// The body of `POST /state/gc`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollectRequest {
    /// Only this tenant's state.
    #[serde(default)]
    pub tenant: Option<TenantId>,
    /// Only of this workload.
    #[serde(default)]
    pub workload: Option<WorkloadId>,
}

/// The answer to `POST /state/gc`.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct CollectedAnswer {
    /// Tenants' states that were looked at.
    pub keys: u64,
    /// Left out: they are claimed or being saved, and collected with their save.
    pub busy: u64,
    /// Left out: the store did not answer, or what it answered cannot be relied on.
    pub failed: u64,
    /// Records removed.
    pub records: u64,
    /// Objects removed.
    pub objects: u64,
    /// Their bytes as stored.
    pub bytes: u64,
    /// Uploads in parts that were given up.
    pub uploads: u64,
}

// === impl Tenancy ===

impl Tenancy {
    /// Lists a tenant's snapshots, newest first.
    ///
    /// # Errors
    /// [`Error::StoreUnavailable`], [`Error::Invalid`] and those of finding the workload.
    pub async fn snapshots(
        &self,
        tenant: TenantId,
        workload: Option<WorkloadId>,
        before: Option<u64>,
        limit: Option<usize>,
    ) -> Result<SnapshotsAnswer, Error> {
        self.inner.check_started()?;
        let limit = limit.unwrap_or(PAGE);
        if limit == 0 || limit > MAX_PAGE {
            let problem = format!("{limit} is out of range; allowed: 1 to {MAX_PAGE}");
            return Err(Error::Invalid { field: "limit".to_owned(), problem });
        }
        let key = self.inner.stored_key(tenant, workload.as_ref())?;
        let page = self.inner.history.list(&key, before, limit).await;
        let page = page.map_err(|error| self.inner.history_error(&key, &error))?;
        let Key { tenant, workload } = key;
        Ok(SnapshotsAnswer { tenant, workload, snapshots: page.snapshots, next_before: page.next })
    }

    /// Makes an old snapshot the newest state. Goes on when the call is dropped.
    ///
    /// # Errors
    /// [`Error::Claimed`], [`Error::StateNotSaved`], [`Error::UnknownSnapshot`] and others.
    pub async fn restore(&self, tenant: TenantId, request: RestoreRequest) -> Result<RestoredAnswer, Error> {
        self.inner.check_open()?;
        let key = self.inner.stored_key(tenant, request.workload.as_ref())?;
        let inner = Arc::clone(&self.inner);
        self.run("restore", async move {
            let entry = inner.entry(&key);
            let outcome = match inner.lock(&entry).await {
                Ok(_guard) => inner.restore_guarded(&key, &entry, request.snapshot).await,
                Err(error) => Err(error),
            };
            inner.tidy(&key, entry);
            outcome
        })
        .await
    }

    /// Gives a tenant without state a copy of another's. Goes on when the call is dropped.
    ///
    /// # Errors
    /// [`Error::Claimed`], [`Error::StateExists`], [`Error::UnknownSnapshot`] and others.
    pub async fn fork(&self, tenant: TenantId, request: ForkRequest) -> Result<RestoredAnswer, Error> {
        self.inner.check_open()?;
        let from = self.inner.stored_key(request.from, request.workload.as_ref())?;
        let key = Key::new(tenant, from.workload.clone());
        if key == from {
            let problem = "a tenant cannot be forked from itself; `restore` goes back".to_owned();
            return Err(Error::Invalid { field: "from".to_owned(), problem });
        }
        let inner = Arc::clone(&self.inner);
        self.run("fork", async move {
            let entry = inner.entry(&key);
            let outcome = match inner.lock(&entry).await {
                Ok(_guard) => inner.fork_guarded(&from, &key, &entry, request.snapshot).await,
                Err(error) => Err(error),
            };
            inner.tidy(&key, entry);
            outcome
        })
        .await
    }

    /// Removes everything of a tenant, everywhere. Goes on when the call is dropped,
    /// and after a crash: until it is done, claims of the tenant are refused.
    ///
    /// # Errors
    /// [`Error::Claimed`], [`Error::ClaimedElsewhere`], [`Error::StateNotSaved`]: it is not
    /// begun. [`Error::StoreUnavailable`]: it may be begun, and then goes on by itself or with
    /// the next call.
    pub async fn erase(&self, tenant: TenantId) -> Result<ErasedAnswer, Error> {
        self.inner.check_open()?;
        let inner = Arc::clone(&self.inner);
        self.run("erase", async move { inner.erase(&tenant).await }).await
    }

    /// Goes on with erasures that were begun and did not end.
    pub async fn finish_erasures(&self) {
        if self.inner.check_open().is_err() {
            return;
        }
        let tenants: Vec<TenantId> = self.inner.erasing.iter().map(|tenant| tenant.clone()).collect();
        for tenant in tenants {
            match self.erase(tenant.clone()).await {
                Ok(erased) => info!(%tenant, objects = erased.objects, "erasure is finished"),
                Err(error) => {
                    warn!(%tenant, error = &error as &dyn std::error::Error, "erasure is not finished yet");
                }
            }
        }
    }

    /// Removes from the store what no kept snapshot needs.
    ///
    /// # Errors
    /// [`Error::ShuttingDown`], [`Error::Starting`], and those of a store that is not
    /// ours; a key that fails is counted.
    pub async fn collect(&self, request: CollectRequest) -> Result<CollectedAnswer, Error> {
        self.inner.check_open()?;
        self.inner.ownership.term().await?;
        let inner = Arc::clone(&self.inner);
        self.run("collect", async move { Ok(inner.collect(&request).await) }).await
    }

    /// Carries out work in a tracked task, so that a client that hangs up ends nothing.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        match self.inner.parts.tasks.spawn(name, work).await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(Error::ShuttingDown),
            Err(panic) => Err(self.inner.internal(&panic, "a task on a history panicked")),
        }
    }
}

// === impl Inner ===

impl Inner {
    /// Finds what a request about stored state is about: the state outlives its
    /// workload's file.
    pub(super) fn stored_key(&self, tenant: TenantId, asked: Option<&WorkloadId>) -> Result<Key, Error> {
        if let Some(id) = asked {
            let key = Key::new(tenant, id.clone());
            if self.trees.contains_key(&key) {
                return Ok(key);
            }
            return self.key(key.tenant, asked);
        }
        self.key(tenant, None)
    }

    /// Refuses what must not begin while a tenant is being erased.
    pub(super) fn not_being_erased(&self, tenant: &TenantId) -> Result<(), Error> {
        if self.erasing.contains(tenant) {
            let tenant = tenant.clone();
            return Err(Error::BeingErased { tenant, retry_after_ms: RETRY_AFTER_MS });
        }
        Ok(())
    }

    /// Refuses while a key is claimed or this node has what the store has not; under the guard.
    pub(super) fn must_be_at_rest(&self, key: &Key, entry: &Entry) -> Result<(), Error> {
        let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
        if entry.live().is_some() {
            return Err(Error::Claimed { tenant, workload });
        }
        if let Some(unsaved) = entry.unsaved().first() {
            let reason = match &*unsaved.outcome.borrow() {
                SaveOutcome::Conflict(reason) => {
                    return Err(Error::StateConflict { tenant, workload, reason: reason.clone() });
                }
                SaveOutcome::Retrying(reason) => reason.clone(),
                _ => "it is being saved".to_owned(),
            };
            return Err(Error::StateNotSaved { tenant, workload, reason, retry_after_ms: RETRY_AFTER_MS });
        }
        if self.trees.get(key).is_some_and(|tree| tree.cached && tree.saved.is_none()) {
            let reason = "this node has the only copy".to_owned();
            return Err(Error::StateNotSaved { tenant, workload, reason, retry_after_ms: RETRY_AFTER_MS });
        }
        Ok(())
    }

    async fn restore_guarded(
        &self,
        key: &Key,
        entry: &Entry,
        snapshot: u64,
    ) -> Result<RestoredAnswer, Error> {
        self.not_being_erased(&key.tenant)?;
        self.must_be_at_rest(key, entry)?;
        self.ownership.term().await?;
        let failed = |error: history::Error| self.history_error(key, &error);
        self.history.check(key, snapshot).await.map_err(failed)?;
        let known = self.trees.get(key).map(|tree| tree.clone());
        if let Some(tree) = known.as_ref().filter(|tree| tree.cached) {
            // The store has it. Gone first: from here on a claim asks the store what is
            // newest, whether or not the rollback comes to its end.
            self.parts.files.discard(key).await.map_err(|error| self.state_error(key, &error))?;
            self.put_tree(TreeRow { cached: false, ..tree.clone() }, Durability::Soft).await?;
        }
        crash_point!(self.parts.crash, "restore.discarded");
        let rollback = Rollback {
            key: key.clone(),
            snapshot,
            epoch: known.map_or(Epoch(0), |tree| tree.epoch).next(),
            nonce: random_hex(&*self.parts.clock, 16),
        };
        let restored = self.history.restore(&rollback).await.map_err(failed)?;
        crash_point!(self.parts.crash, "restore.committed");
        let saved = Some(restored.snapshot.clone());
        let tree = TreeRow {
            key: key.clone(),
            epoch: restored.epoch,
            cached: false,
            saved,
            owner: None,
            opened: None,
        };
        self.put_tree(tree, Durability::Hard).await?;
        info!(tenant = %key.tenant, workload = %key.workload, epoch = restored.epoch.0, snapshot, now = restored.snapshot.number, "state restored");
        Ok(restored_answer(key, None, &restored))
    }

    async fn fork_guarded(
        &self,
        from: &Key,
        key: &Key,
        entry: &Entry,
        snapshot: Option<u64>,
    ) -> Result<RestoredAnswer, Error> {
        self.not_being_erased(&key.tenant)?;
        self.not_being_erased(&from.tenant)?;
        self.must_be_at_rest(key, entry)?;
        self.ownership.term().await?;
        let known = self.trees.get(key).map(|tree| tree.clone());
        if known.as_ref().is_some_and(|tree| tree.cached || tree.saved.is_some()) {
            return Err(Error::StateExists { tenant: key.tenant.clone(), workload: key.workload.clone() });
        }
        let nonce = random_hex(&*self.parts.clock, 16);
        let fork = Fork { from: from.clone(), to: key.clone(), snapshot, nonce };
        let forked = self.history.fork(&fork).await;
        let forked = forked.map_err(|error| self.history_error(key, &error))?;
        crash_point!(self.parts.crash, "fork.committed");
        let epoch = known.map_or(Epoch(0), |tree| tree.epoch).max(forked.epoch);
        let saved = Some(forked.snapshot.clone());
        let tree = TreeRow { key: key.clone(), epoch, cached: false, saved, owner: None, opened: None };
        self.put_tree(tree, Durability::Hard).await?;
        info!(tenant = %key.tenant, workload = %key.workload, from = %from.tenant, snapshot = forked.from, "state forked");
        Ok(restored_answer(key, Some(from.tenant.clone()), &forked))
    }

    /// Notes what is known of a tree, in memory even when the journal cannot: a claim
    /// of this server must not go by what is not so any more.
    pub(super) async fn put_tree(&self, tree: TreeRow, durability: Durability) -> Result<(), Error> {
        self.trees.insert(tree.key.clone(), tree.clone());
        self.commit(vec![Op::PutTree(tree)], durability).await
    }

    async fn erase(&self, tenant: &TenantId) -> Result<ErasedAnswer, Error> {
        // From here on no claim of the tenant begins; the guards wait for what has begun.
        let is_repeated = !self.erasing.insert(tenant.clone());
        let mut keys = self.keys_of(tenant);
        keys.extend(
            self.parts
                .scripts
                .load()
                .iter()
                .map(|workload| Key::new(tenant.clone(), workload.spec.id.clone())),
        );
        let entries: BTreeMap<Key, Arc<Entry>> =
            keys.into_iter().map(|key| (key.clone(), self.entry(&key))).collect();
        let outcome = self.erase_entries(tenant, &entries, is_repeated).await;
        for (key, entry) in entries {
            self.tidy(&key, entry);
        }
        outcome
    }

    async fn erase_entries(
        &self,
        tenant: &TenantId,
        entries: &BTreeMap<Key, Arc<Entry>>,
        is_repeated: bool,
    ) -> Result<ErasedAnswer, Error> {
        let mut guards = Vec::new();
        let mut refused = None;
        for (key, entry) in entries {
            match self.lock(entry).await {
                Ok(guard) => guards.push(guard),
                Err(error) => refused = refused.or(Some(error)),
            }
            refused = refused.or(self.must_be_at_rest(key, entry).err());
        }
        if refused.is_none() {
            refused = self.ownership.term().await.err();
        }
        let workloads: BTreeSet<WorkloadId> = entries.keys().map(|key| key.workload.clone()).collect();
        let any = || Key::new(tenant.clone(), WorkloadId::new("any").expect("letters are an id"));
        if refused.is_none() && !is_repeated {
            let checked = self.history.check_erasable(tenant, &workloads).await;
            refused = checked.err().map(|error| self.history_error(&any(), &error));
        }
        let begun = match refused {
            Some(error) => Err(error),
            None => self.commit(vec![Op::BeginErasure(tenant.clone())], Durability::Hard).await,
        };
        if let Err(error) = begun {
            if !is_repeated {
                self.erasing.remove(tenant);
            }
            return Err(error);
        }
        crash_point!(self.parts.crash, "erase.begun");
        let known: Vec<Key> = entries.keys().cloned().collect();
        let set_aside = self.parts.files.remove_set_aside(tenant, &known).await;
        let set_aside = set_aside.map_err(|error| self.state_error(&any(), &error))?;
        for key in entries.keys() {
            self.parts.files.discard(key).await.map_err(|error| self.state_error(key, &error))?;
        }
        crash_point!(self.parts.crash, "erase.local");
        let epoch = |key: &Key| self.trees.get(key).map_or(Epoch(0), |tree| tree.epoch);
        let nonce = random_hex(&*self.parts.clock, 16);
        let erased = self.history.erase(tenant, &workloads, epoch, &nonce).await;
        let Erased { workloads, objects, proof } =
            erased.map_err(|error| self.history_error(&any(), &error))?;
        crash_point!(self.parts.crash, "erase.store");
        self.commit(vec![Op::EndErasure(tenant.clone())], Durability::Hard).await?;
        self.trees.retain(|key, _| key.tenant != *tenant);
        entries.keys().for_each(|key| self.cache.forget(key));
        self.tenants.remove(tenant);
        self.with_secrets.remove(tenant);
        self.erasing.remove(tenant);
        info!(%tenant, objects, ?proof, "tenant erased");
        drop(guards);
        Ok(ErasedAnswer { tenant: tenant.clone(), workloads, objects, set_aside, proof })
    }

    /// Returns the keys of a tenant that this node knows of.
    fn keys_of(&self, tenant: &TenantId) -> BTreeSet<Key> {
        let trees = self.trees.iter().map(|tree| tree.key().clone());
        let entries = self.entries.iter().map(|entry| entry.key().clone());
        trees.chain(entries).filter(|key| key.tenant == *tenant).collect()
    }

    async fn collect(&self, request: &CollectRequest) -> CollectedAnswer {
        let mut answer = CollectedAnswer::default();
        let is_asked = |key: &Key| {
            request.tenant.as_ref().is_none_or(|tenant| key.tenant == *tenant)
                && request.workload.as_ref().is_none_or(|workload| key.workload == *workload)
        };
        let saved = self.trees.iter().filter(|tree| tree.saved.is_some()).map(|tree| tree.key().clone());
        let keys: Vec<Key> = saved.filter(is_asked).collect();
        for key in keys {
            if self.parts.tasks.draining().is_cancelled() {
                break;
            }
            let entry = self.entry(&key);
            let outcome = match entry.guard.try_lock() {
                Ok(_guard) if self.must_be_at_rest(&key, &entry).is_ok() => {
                    Some(self.history.collect(&key, self.keep(&key)).await)
                }
                _ => None,
            };
            self.tidy(&key, entry);
            match outcome {
                None => answer.busy += 1,
                Some(Ok(Collected { records, objects, bytes })) => {
                    answer.keys += 1;
                    answer.records += records;
                    answer.objects += objects;
                    answer.bytes += bytes;
                }
                Some(Err(error)) => {
                    answer.failed += 1;
                    warn!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "old state is not collected");
                }
            }
        }
        match self.history.abort_uploads().await {
            Ok(uploads) => answer.uploads = uploads,
            Err(error) => warn!(error = &error as &dyn std::error::Error, "old uploads are not given up"),
        }
        answer
    }

    /// Returns what of a key is kept. Of a workload that is gone, everything: nobody
    /// says how much may go.
    fn keep(&self, key: &Key) -> Keep {
        let set = self.parts.scripts.load();
        let workload = set.get(&key.workload);
        workload.map_or(Keep { last: u32::MAX, days: 0 }, |workload| Keep {
            last: workload.spec.persist.keep_last,
            days: workload.spec.persist.keep_days,
        })
    }

    fn history_error(&self, key: &Key, error: &history::Error) -> Error {
        let of = || (key.tenant.clone(), key.workload.clone());
        match error {
            history::Error::State(error) => self.state_error(key, error),
            history::Error::Store(source) => {
                let source = source.clone();
                self.state_error(key, &crate::state::Error::Store { key: key.clone(), source })
            }
            history::Error::Unknown { .. } | history::Error::Mirrored { .. } => {
                Error::UnknownSnapshot { problem: error.to_string() }
            }
            history::Error::Exists { .. } => {
                let (tenant, workload) = of();
                Error::StateExists { tenant, workload }
            }
            history::Error::ClaimedElsewhere { key, server } => {
                let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
                Error::ClaimedElsewhere { tenant, workload, server: server.clone() }
            }
            history::Error::NotEmpty { .. } => {
                error!(tenant = %key.tenant, error = error as &dyn std::error::Error, "erasure finds new objects");
                Error::StoreUnavailable { reason: answer::chain(error), retry_after_ms: RETRY_AFTER_MS }
            }
        }
    }
}

fn restored_answer(key: &Key, from: Option<TenantId>, done: &history::Committed) -> RestoredAnswer {
    RestoredAnswer {
        tenant: key.tenant.clone(),
        workload: key.workload.clone(),
        snapshot: done.snapshot.number,
        from,
        restored_from: done.from,
        files: done.snapshot.files,
        bytes: done.snapshot.bytes,
    }
}
