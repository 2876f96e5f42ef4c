//! Warm pools: slots made ahead of the claims that take them.
//!
//! ```text
//! Pools ── one Pool a workload ── actor ── Ledger (pure: what to do)
//!   └ Capacity, shared               └ maker tasks (engine, files, journal)
//! ```
//! A pool's slots are written by its actor alone; everyone else sends it
//! messages or reads the status it publishes.
//!
//! # Invariants
//! - A container counts against the maxima from before the engine is asked for
//!   it until the engine says that it is gone.
//! - A slot is handed out once: after a tenant there is only retirement (P4).
//! - The claim path waits for the actor's answer and for nothing of the engine (P5).

mod actor;
pub mod capacity;
pub mod ledger;
mod maker;

use std::sync::Arc;

use arc_swap::ArcSwap;
use dashmap::DashMap;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

pub use self::maker::Made;
use self::{
    actor::Command,
    capacity::{Capacity, Place},
};
use crate::{
    clock::SharedClock,
    journal::Journal,
    lifecycle::{CrashPoints, Tasks},
    model::{ClaimSource, SlotId, SlotPhase, SpecHash, WorkloadId, spec::PoolSizes},
    runtime::SharedRuntime,
    script::Workload,
    state::SharedFiles,
};

/// Messages that may wait for one pool's actor.
const QUEUE: usize = 1_024;

/// What every pool works with.
#[derive(Clone)]
pub struct PoolParts {
    /// This installation's identity, on every container's label.
    pub instance: String,
    /// Time and randomness.
    pub clock: SharedClock,
    /// The container engine.
    pub runtime: SharedRuntime,
    /// The slots' directories.
    pub files: SharedFiles,
    /// The durable record.
    pub journal: Journal,
    /// Where tasks are spawned.
    pub tasks: Tasks,
    /// Where a test may stop the node.
    pub crash: CrashPoints,
    /// The containers all pools may have.
    pub capacity: Capacity,
}

/// All pools, by workload.
#[derive(Clone)]
pub struct Pools {
    parts: PoolParts,
    pools: Arc<DashMap<WorkloadId, Pool>>,
}

/// The handle of one pool.
#[derive(Clone)]
pub struct Pool {
    tx: mpsc::Sender<Command>,
    view: Arc<View>,
    tasks: Tasks,
}

/// What a pool publishes for readers.
struct View {
    workload: WorkloadId,
    status: ArcSwap<PoolStatus>,
    slots: DashMap<SlotId, SlotStatus>,
}

/// A slot that is a claim's; retired when dropped before [`Taken::keep`].
pub struct Taken {
    /// The slot.
    pub slot: SlotId,
    /// Its container.
    pub made: Made,
    /// What it was made from.
    pub workload: Arc<Workload>,
    /// Warm, or cold when it was waited for.
    pub source: ClaimSource,
    pool: Option<Pool>,
}

/// A slot that survived a restart.
pub struct Adopted {
    /// The slot.
    pub slot: SlotId,
    /// What its container counts as; see [`Pools::place`].
    pub place: Place,
    /// `ready`, `claimed`, `releasing` or `retiring`.
    pub phase: SlotPhase,
    /// The spec it was made from.
    pub spec_hash: SpecHash,
    /// Its container.
    pub made: Made,
    /// What it was made from.
    pub workload: Arc<Workload>,
}

/// Says why a claim got no slot.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// None became ready in time.
    #[error("no slot became ready in time: {reason}")]
    Exhausted {
        /// At capacity, or what keeps slots from being made.
        reason: String,
        /// When a new attempt may fare better, in milliseconds.
        retry_after_ms: u64,
    },
    /// The pool has ended; the server is shutting down.
    #[error("the pool is closed")]
    Closed,
}

/// One pool in `GET /pools`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PoolStatus {
    /// Its workload.
    pub workload: String,
    /// The spec hash that new slots are made from.
    pub spec_hash: String,
    /// Ready slots wanted.
    pub target: u32,
    /// Containers of this workload at most.
    pub max: u32,
    /// Slots that may be claimed now.
    pub ready: u32,
    /// Containers that run and are not ready yet.
    pub warming: u32,
    /// Containers being created.
    pub creating: u32,
    /// Slots that are a tenant's.
    pub claimed: u32,
    /// Slots whose state is being taken out.
    pub releasing: u32,
    /// Slots kept for their tenant.
    pub parked: u32,
    /// Slots whose state could not be taken out yet.
    pub stranded: u32,
    /// Slots whose container died under a tenant.
    pub lost: u32,
    /// Slots being destroyed.
    pub retiring: u32,
    /// Claims that wait for a slot.
    pub waiting: u32,
    /// Why the last slot could not be made; gone once one could.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// When the next attempt begins, in milliseconds from now, after a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_in_ms: Option<u64>,
}

/// One slot in `GET /slots`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlotStatus {
    /// The slot.
    pub slot: String,
    /// Its pool.
    pub workload: String,
    /// Where it stands.
    pub phase: &'static str,
    /// The spec it was made from.
    pub spec_hash: String,
    /// The container's name.
    pub container: String,
    /// Whose it is, while it is somebody's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// When it entered its phase, milliseconds since the epoch.
    pub since_ms: u64,
}

// === impl Pools ===

impl Pools {
    /// Creates the set without pools.
    pub fn new(parts: PoolParts) -> Self {
        Self { parts, pools: Arc::default() }
    }

    /// Counts a container that is there already, above the maximum if need be. All that
    /// survived a restart are counted before the first pool is opened, and refills.
    pub fn place(&self) -> Place {
        self.parts.capacity.adopt()
    }

    /// Opens the pool of a workload, with the slots that survived a restart. Its sizes
    /// are the spec's, or none when the workload is gone and its slots must end.
    pub fn open(&self, workload: Arc<Workload>, sizes: PoolSizes, adopted: Vec<Adopted>) {
        let id = workload.spec.id.clone();
        let (tx, rx) = mpsc::channel(QUEUE);
        let view = Arc::new(View {
            workload: id.clone(),
            status: ArcSwap::from_pointee(PoolStatus { workload: id.to_string(), ..PoolStatus::default() }),
            slots: DashMap::new(),
        });
        let pool = Pool { tx, view, tasks: self.parts.tasks.clone() };
        self.pools.insert(id, pool.clone());
        actor::spawn(self.clone(), pool, rx, workload, &sizes, adopted);
    }

    /// Returns the pool of a workload.
    pub fn get(&self, workload: &WorkloadId) -> Option<Pool> {
        self.pools.get(workload).map(|pool| pool.clone())
    }

    /// Returns the status of every pool, by workload.
    pub fn status(&self) -> Vec<PoolStatus> {
        let mut all: Vec<_> =
            self.pools.iter().map(|pool| PoolStatus::clone(&pool.view.status.load())).collect();
        all.sort_by(|a, b| a.workload.cmp(&b.workload));
        all
    }

    /// Returns every slot, by workload and id.
    pub fn slots(&self) -> Vec<SlotStatus> {
        let mut all: Vec<_> = self
            .pools
            .iter()
            .flat_map(|pool| pool.view.slots.iter().map(|slot| slot.clone()).collect::<Vec<_>>())
            .collect();
        all.sort_by(|a, b| (&a.workload, &a.slot).cmp(&(&b.workload, &b.slot)));
        all
    }

    /// Returns whether some pool has this slot, in whatever phase.
    pub fn has_slot(&self, slot: &SlotId) -> bool {
        self.pools.iter().any(|pool| pool.view.slots.contains_key(slot))
    }

    /// Says that a slot's container does not run any more.
    pub async fn died(&self, slot: &SlotId) {
        let pool = self.pools.iter().find(|pool| pool.view.slots.contains_key(slot)).map(|pool| pool.clone());
        if let Some(pool) = pool {
            pool.tell(Command::Died(slot.clone())).await;
        }
    }

    /// Counts the slots whose places will be free soon.
    fn leaving(&self) -> u32 {
        self.pools
            .iter()
            .map(|pool| pool.view.status.load())
            .map(|status| status.releasing + status.retiring)
            .sum()
    }

    /// Asks the pool with the most ready slots, other than `of`, to give one up.
    fn spare(&self, of: &WorkloadId) {
        let donor = self
            .pools
            .iter()
            .filter(|pool| pool.view.workload != *of)
            .map(|pool| (pool.view.status.load().ready, pool.clone()))
            .filter(|(ready, _)| *ready > 0)
            .max_by_key(|(ready, pool)| (*ready, pool.view.workload.clone()));
        if let Some((_, pool)) = donor {
            let _ = pool.tx.try_send(Command::Spare);
        }
    }
}

// === impl Pool ===

impl Pool {
    /// Takes a slot, waiting until `deadline_ms` (milliseconds since the epoch) at most.
    ///
    /// # Cancel safety
    /// A dropped call takes nothing: a slot given to it is retired.
    ///
    /// # Errors
    /// [`Error::Exhausted`] with the reason; [`Error::Closed`] at shutdown.
    pub async fn take(&self, deadline_ms: u64) -> Result<Taken, Error> {
        let (reply, answer) = oneshot::channel();
        self.tx.send(Command::Take { deadline_ms, reply }).await.map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }

    /// Moves a taken slot to `phase` (`releasing`, `stranded` or `lost`).
    pub async fn step(&self, slot: &SlotId, phase: SlotPhase) {
        self.tell(Command::Step(slot.clone(), phase)).await;
    }

    /// Notes whose a taken slot is, for readers.
    pub fn set_tenant(&self, slot: &SlotId, tenant: &str) {
        if let Some(mut status) = self.view.slots.get_mut(slot) {
            status.tenant = Some(tenant.to_owned());
        }
    }

    /// Destroys a slot: container first, then directories, then its row.
    pub async fn retire(&self, slot: &SlotId) {
        self.tell(Command::Retire(slot.clone())).await;
    }

    /// Returns the pool's status.
    pub fn status(&self) -> Arc<PoolStatus> {
        self.view.status.load_full()
    }

    async fn tell(&self, command: Command) {
        // A closed channel means that the server is going down; adopt cleans up.
        let _ = self.tx.send(command).await;
    }
}

// === impl Taken ===

impl Taken {
    fn new(slot: SlotId, made: Made, workload: Arc<Workload>, source: ClaimSource, pool: Pool) -> Self {
        Self { slot, made, workload, source, pool: Some(pool) }
    }

    /// Leaves the slot to its claim: dropping this does not retire it any more.
    pub fn keep(&mut self) {
        self.pool = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(pool) = self.pool.take() else { return };
        let slot = self.slot.clone();
        if let Err(mpsc::error::TrySendError::Full(command)) = pool.tx.try_send(Command::Discard(slot)) {
            let tx = pool.tx.clone();
            pool.tasks.spawn("discard slot", async move {
                let _ = tx.send(command).await;
            });
        }
    }
}
