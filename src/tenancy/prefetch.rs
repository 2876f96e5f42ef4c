//! A tenant's newest state brought to this node before its claim.

use std::sync::{Arc, atomic::Ordering};

use serde::Serialize;
use tracing::{error, info};

use super::{Error, Inner, RETRY_AFTER_MS, Tenancy, cache::size_of, claim::Located, registry::Entry};
use crate::{
    crash_point,
    journal::{Durability, Op, TreeRow},
    model::{Key, SnapshotRef, TenantId, WorkloadId},
    script::Workload,
    state::FillFrom,
};

/// The answer to `POST /tenants/{tenant}/prefetch`.
#[derive(Debug, Clone, Serialize)]
pub struct PrefetchAnswer {
    /// Whose state.
    pub tenant: TenantId,
    /// The workload.
    pub workload: WorkloadId,
    /// Whether the newest state is on this node now; not when there is none, or no room.
    pub cached: bool,
    /// The newest snapshot; none: nothing is saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<u64>,
    /// Bytes that came from the store; 0 when the state was here already.
    pub fetched_bytes: u64,
    /// Regular files of the snapshot.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Why it is not here, although there is a snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Lets claims know that what they wait for is their own state on its way.
struct Fetching<'a>(&'a Entry);

// === impl Fetching ===

impl<'a> Fetching<'a> {
    fn begin(entry: &'a Entry) -> Self {
        entry.is_fetching.store(true, Ordering::Release);
        Self(entry)
    }
}

impl Drop for Fetching<'_> {
    fn drop(&mut self) {
        self.0.is_fetching.store(false, Ordering::Release);
    }
}

// === impl Tenancy ===

impl Tenancy {
    /// Brings a tenant's newest state to this node, so that its next claim here moves no
    /// bytes. May be repeated; goes on when the call is dropped. A claim that comes
    /// meanwhile waits for it.
    ///
    /// # Errors
    /// Those of a claim that asks the store; [`Error::Busy`] when too many wait already.
    pub async fn prefetch(
        &self,
        tenant: TenantId,
        workload: Option<WorkloadId>,
    ) -> Result<PrefetchAnswer, Error> {
        self.inner.check_open()?;
        let workload = self.inner.workload(workload.as_ref())?;
        if workload.spec.volumes.state.is_none() {
            let problem = format!("workload {} has no `volumes.state` to fetch", workload.spec.id);
            return Err(Error::Invalid { field: "workload".to_owned(), problem });
        }
        let key = Key::new(tenant, workload.spec.id.clone());
        let inner = Arc::clone(&self.inner);
        let outcome = self.run("prefetch", async move { inner.prefetch(&key, &workload).await }).await;
        let told = match &outcome {
            Ok(answer) if answer.fetched_bytes > 0 => "fetched",
            Ok(answer) if answer.cached => "cached",
            Ok(_) => "none",
            Err(error) => error.code(),
        };
        self.inner.parts.metrics.prefetch(told);
        outcome
    }
}

// === impl Inner ===

impl Inner {
    async fn prefetch(&self, key: &Key, workload: &Workload) -> Result<PrefetchAnswer, Error> {
        let Ok(_place) = self.cache.places.try_acquire() else {
            return Err(Error::Busy { retry_after_ms: RETRY_AFTER_MS });
        };
        // Before the guard: what only waits holds no claim up.
        let _turn = self.cache.turns.acquire().await.expect("the semaphore is never closed");
        let entry = self.entry(key);
        let outcome = match self.lock(&entry).await {
            Ok(_guard) => {
                let _fetching = Fetching::begin(&entry);
                self.prefetch_guarded(key, workload, &entry).await
            }
            Err(error) => Err(error),
        };
        self.tidy(key, entry);
        outcome
    }

    async fn prefetch_guarded(
        &self,
        key: &Key,
        workload: &Workload,
        entry: &Entry,
    ) -> Result<PrefetchAnswer, Error> {
        self.not_being_erased(&key.tenant)?;
        if let Some(live) = entry.live() {
            // It is in its slot, newer than any snapshot.
            return Ok(answer(key, true, live.row().snapshot.as_ref(), 0));
        }
        let term = self.ownership.term().await?;
        let located = self.locate(key, workload, entry, term).await?;
        let snapshot = match &located.from {
            FillFrom::Cache => return Ok(answer(key, true, located.snapshot.as_ref(), 0)),
            FillFrom::Empty => return Ok(answer(key, false, None, 0)),
            FillFrom::Snapshot(snapshot) => snapshot.clone(),
        };
        let needed = size_of(&snapshot);
        if let Some(max) = self.cache.limits.max_bytes.filter(|max| needed > *max) {
            let reason = format!("it takes some {needed} bytes, and the cache has room for {max}");
            return Ok(PrefetchAnswer { reason: Some(reason), ..answer(key, false, Some(&snapshot), 0) });
        }
        let fetched_bytes = self.bring_in(key, &located, &snapshot).await?;
        info!(tenant = %key.tenant, workload = %key.workload, snapshot = snapshot.number, fetched_bytes, "state prefetched");
        Ok(answer(key, true, Some(&snapshot), fetched_bytes))
    }

    /// Fetches a snapshot into the cache, and journals that it is there.
    async fn bring_in(&self, key: &Key, located: &Located, snapshot: &SnapshotRef) -> Result<u64, Error> {
        let row = TreeRow {
            key: key.clone(),
            epoch: located.epoch,
            cached: true,
            saved: Some(snapshot.clone()),
            owner: None,
            opened: self.trees.get(key).and_then(|tree| tree.opened),
        };
        // First, and hard: a tree that no row knows is set aside at the next start. As long
        // as it has no owner, nobody knows whether it came to its end, and that start
        // removes it: the store has it.
        self.commit(vec![Op::PutTree(row.clone())], Durability::Hard).await?;
        crash_point!(self.parts.crash, "prefetch.journaled");
        let draining = self.parts.tasks.draining();
        let fetched = draining.run_until_cancelled(self.parts.files.prefetch(key, snapshot)).await;
        let outcome = match fetched {
            // What comes of it meanwhile is removed by the next start.
            None => return Err(Error::ShuttingDown),
            Some(Ok(fetched)) => {
                crash_point!(self.parts.crash, "prefetch.fetched");
                let row = TreeRow { owner: Some(fetched.owner), ..row.clone() };
                let journaled = self.commit(vec![Op::PutTree(row.clone())], Durability::Soft).await;
                journaled.map(|()| (row, fetched.fetched_bytes))
            }
            Some(Err(error)) => Err(self.state_error(key, &error)),
        };
        match outcome {
            Ok((row, fetched_bytes)) => {
                self.trees.insert(key.clone(), row);
                self.cache.note_use(key, self.now_ms());
                crash_point!(self.parts.crash, "prefetch.done");
                Ok(fetched_bytes)
            }
            Err(failed) => {
                // A tree that its row does not know must not be there, and none is claimed
                // from the cache that is not there.
                match self.parts.files.discard(key).await {
                    Ok(()) => drop(self.put_tree(TreeRow { cached: false, ..row }, Durability::Soft).await),
                    Err(error) => {
                        error!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "what a failed prefetch left is removed at the next start");
                    }
                }
                Err(failed)
            }
        }
    }
}

fn answer(key: &Key, cached: bool, snapshot: Option<&SnapshotRef>, fetched_bytes: u64) -> PrefetchAnswer {
    PrefetchAnswer {
        tenant: key.tenant.clone(),
        workload: key.workload.clone(),
        cached,
        snapshot: snapshot.map(|snapshot| snapshot.number),
        fetched_bytes,
        files: snapshot.map_or(0, |snapshot| snapshot.files),
        bytes: snapshot.map_or(0, |snapshot| snapshot.bytes),
        reason: None,
    }
}
