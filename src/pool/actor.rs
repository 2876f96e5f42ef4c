//! The one task that writes a pool's slots: it keeps the ledger, carries out
//! what the ledger plans, and publishes what readers see.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info, warn};

use super::{
    Adopted, Error, Made, Pool, PoolStatus, Pools, SlotStatus, Taken,
    capacity::Place,
    ledger::{Action, Ledger, Take, WaiterId},
    maker,
};
use crate::{
    clock::random_hex,
    crash_point,
    journal::{Durability, Op, SlotRow},
    model::{ClaimSource, SlotId, SlotPhase, SpecHash, spec::PoolSizes},
    script::Workload,
};

/// Commands taken from the queue before the pool plans again.
const BATCH: usize = 64;
/// The longest sleep without a look at the ledger.
const LOOK_MS: u64 = 30_000;

/// How long other pools have to give up a slot before they are asked again.
const SPARE_AGAIN_MS: u64 = 200;

/// A message to a pool's actor.
pub(super) enum Command {
    /// A claim wants a slot.
    Take { deadline_ms: u64, reply: oneshot::Sender<Result<Taken, Error>> },
    /// The container runs.
    Warming(SlotId),
    /// The container is ready.
    Ready(SlotId, Made),
    /// The slot could not be made; whatever there is of it must go.
    Failed(SlotId, String),
    /// A ready slot does not pass its health check any more.
    Unhealthy(SlotId, String),
    /// The container does not run any more.
    Died(SlotId),
    /// A claim moves its slot.
    Step(SlotId, SlotPhase),
    /// A taken slot that was never filled.
    Discard(SlotId),
    /// A claim is done with its slot.
    Retire(SlotId),
    /// Nothing of the slot is left.
    Gone(SlotId),
    /// Another pool needs a place.
    Spare,
}

struct Actor {
    pools: Pools,
    pool: Pool,
    workload: Arc<Workload>,
    ledger: Ledger,
    cells: HashMap<SlotId, Cell>,
    replies: BTreeMap<WaiterId, oneshot::Sender<Result<Taken, Error>>>,
    spares_asked: u32,
    /// When what was asked for counts as not given; none while nothing is asked for.
    spare_again_ms: Option<u64>,
    number: usize,
}

/// What the actor holds of one slot beside the ledger.
struct Cell {
    /// Freed with the cell: the container is gone by then.
    _place: Place,
    workload: Arc<Workload>,
    spec_hash: SpecHash,
    made: Option<Made>,
    created_ms: u64,
}

/// Starts a pool's actor.
pub(super) fn spawn(
    pools: Pools,
    pool: Pool,
    rx: mpsc::Receiver<Command>,
    workload: Arc<Workload>,
    sizes: &PoolSizes,
    adopted: Vec<Adopted>,
) {
    let tasks = pools.parts.tasks.clone();
    let ledger = Ledger::new(workload.spec_hash.clone(), sizes.min_idle, sizes.max);
    let number = Arc::as_ptr(&pool.view) as usize;
    let mut actor = Actor {
        pools,
        pool,
        workload,
        ledger,
        cells: HashMap::new(),
        replies: BTreeMap::new(),
        spares_asked: 0,
        spare_again_ms: None,
        number,
    };
    for slot in adopted {
        actor.adopt(slot);
    }
    actor.publish();
    tasks.spawn("pool", actor.run(rx));
}

// === impl Actor ===

impl Actor {
    async fn run(mut self, mut rx: mpsc::Receiver<Command>) {
        let mut freed = self.pools.parts.capacity.freed();
        let draining = self.pools.parts.tasks.draining();
        loop {
            self.plan(draining.is_cancelled());
            self.publish();
            let now_ms = self.now_ms();
            let wake_at_ms = self.ledger.wake_at_ms(now_ms).into_iter().chain(self.spare_again_ms).min();
            let wake_ms = wake_at_ms.map_or(LOOK_MS, |at| at.saturating_sub(now_ms).clamp(1, LOOK_MS));
            // Biased: commands first, they are what claims wait for.
            tokio::select! {
                biased;
                command = rx.recv() => {
                    let Some(command) = command else { return };
                    self.handle(command);
                    for _ in 1..BATCH {
                        let Ok(command) = rx.try_recv() else { break };
                        self.handle(command);
                    }
                }
                _ = freed.changed() => {}
                () = draining.cancelled(), if !self.replies.is_empty() => {
                    for (waiter, reply) in std::mem::take(&mut self.replies) {
                        self.ledger.leave(waiter);
                        let _ = reply.send(Err(Error::Closed));
                    }
                }
                () = tokio::time::sleep(Duration::from_millis(wake_ms)) => {}
            }
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Take { deadline_ms, reply } => self.take(deadline_ms, reply),
            Command::Warming(slot) => {
                self.step(&slot, SlotPhase::Warming);
            }
            Command::Ready(slot, made) => self.ready(&slot, made),
            Command::Failed(slot, reason) => {
                warn!(slot = %slot, workload = %self.workload.spec.id, reason, "slot could not be made");
                self.ledger.failed(reason, self.now_ms());
                self.retire(&slot);
            }
            Command::Unhealthy(slot, reason) => {
                if self.phase(&slot) == Some(SlotPhase::Ready) {
                    warn!(slot = %slot, workload = %self.workload.spec.id, reason, "ready slot is not healthy");
                    self.retire(&slot);
                }
            }
            Command::Died(slot) => {
                if self.phase(&slot) == Some(SlotPhase::Ready) {
                    warn!(slot = %slot, workload = %self.workload.spec.id, "container of a ready slot died");
                    self.retire(&slot);
                }
            }
            Command::Step(slot, phase) => {
                self.step(&slot, phase);
            }
            Command::Discard(slot) => {
                self.step(&slot, SlotPhase::Releasing);
                self.retire(&slot);
            }
            Command::Retire(slot) => self.retire(&slot),
            Command::Gone(slot) => {
                debug!(slot = %slot, "slot is gone");
                self.ledger.gone(&slot);
                self.cells.remove(&slot);
                self.pool.view.slots.remove(&slot);
            }
            Command::Spare => {
                if let Some(slot) = self.ledger.spare() {
                    info!(slot = %slot, workload = %self.workload.spec.id, "ready slot makes room for a claim of another workload");
                    self.retire(&slot);
                }
            }
        }
    }

    fn take(&mut self, deadline_ms: u64, reply: oneshot::Sender<Result<Taken, Error>>) {
        match self.ledger.take(self.now_ms(), deadline_ms) {
            Take::Slot(slot) => self.give(&slot, ClaimSource::Warm, reply),
            Take::Wait(waiter) => {
                self.replies.insert(waiter, reply);
            }
        }
    }

    /// Answers a claim with a slot that the ledger says is claimed. A claim that has
    /// gone meanwhile drops the slot, which retires it.
    fn give(&mut self, slot: &SlotId, source: ClaimSource, reply: oneshot::Sender<Result<Taken, Error>>) {
        self.show(slot);
        let cell = self.cells.get(slot).expect("every slot of the ledger has a cell");
        let made = cell.made.clone().expect("a ready slot has been made");
        let taken = Taken::new(slot.clone(), made, Arc::clone(&cell.workload), source, self.pool.clone());
        let _ = reply.send(Ok(taken));
    }

    fn plan(&mut self, draining: bool) {
        // A claim whose request is gone does not wait any more.
        let left: Vec<_> =
            self.replies.iter().filter(|(_, reply)| reply.is_closed()).map(|(waiter, _)| *waiter).collect();
        for waiter in left {
            self.replies.remove(&waiter);
            self.ledger.leave(waiter);
        }
        for action in self.ledger.plan(self.now_ms()) {
            match action {
                Action::Give(waiter, slot) => match self.replies.remove(&waiter) {
                    Some(reply) => self.give(&slot, ClaimSource::Cold, reply),
                    None => self.handle(Command::Discard(slot)),
                },
                Action::GiveUp(waiter) => {
                    if let Some(reply) = self.replies.remove(&waiter) {
                        let _ = reply.send(Err(self.exhausted()));
                    }
                }
                Action::Retire(slot) => self.retire(&slot),
                Action::Create { demand } if !draining => self.create(demand),
                Action::Create { .. } => {}
            }
        }
        let unmet = self.ledger.unmet();
        self.pools.parts.capacity.set_unmet(self.number, unmet);
        self.ask_for_spares(unmet);
    }

    /// Asks other pools for the slots that claims here lack. They are asked again while
    /// the claims wait: whoever had nothing to give up may have something later.
    fn ask_for_spares(&mut self, unmet: u32) {
        let capacity = &self.pools.parts.capacity;
        if unmet == 0 || capacity.used() < capacity.max() {
            (self.spares_asked, self.spare_again_ms) = (0, None);
            return;
        }
        let now_ms = self.now_ms();
        if self.spare_again_ms.is_none_or(|at| at <= now_ms) {
            // Slots that are on their way out are places to come.
            self.spares_asked = self.pools.leaving();
            self.spare_again_ms = Some(now_ms + SPARE_AGAIN_MS);
        }
        for _ in self.spares_asked..unmet {
            self.pools.spare(&self.workload.spec.id);
        }
        self.spares_asked = self.spares_asked.max(unmet);
    }

    fn create(&mut self, demand: bool) {
        let Some(place) = self.pools.parts.capacity.reserve(demand) else { return };
        let now_ms = self.now_ms();
        let slot = SlotId::new(random_hex(&*self.pools.parts.clock, 8)).expect("hexadecimal is an id");
        self.ledger.begin(slot.clone(), now_ms);
        let spec_hash = self.workload.spec_hash.clone();
        let workload = Arc::clone(&self.workload);
        self.cells.insert(
            slot.clone(),
            Cell { _place: place, workload, spec_hash, made: None, created_ms: now_ms },
        );
        self.show(&slot);
        let (parts, workload, tx) =
            (self.pools.parts.clone(), Arc::clone(&self.workload), self.pool.tx.clone());
        self.pools.parts.tasks.spawn("make slot", async move {
            let guard = maker::Unfinished::new(slot, tx, parts.tasks.clone());
            match maker::make(&parts, &workload, guard.slot(), guard.tx()).await {
                Ok(made) => guard.ready(made).await,
                Err(reason) => guard.failed(reason).await,
            }
        });
    }

    fn ready(&mut self, slot: &SlotId, made: Made) {
        if !self.step(slot, SlotPhase::Ready) {
            return;
        }
        let Some(cell) = self.cells.get_mut(slot) else { return };
        cell.made = Some(made.clone());
        let row = SlotRow {
            slot: slot.clone(),
            workload: self.workload.spec.id.clone(),
            spec_hash: cell.spec_hash.clone(),
            revision: cell.workload.revision.clone(),
            phase: SlotPhase::Ready,
            container: Some(made.container.clone()),
            name: made.name.clone(),
            address: made.address.clone(),
            run_as: Some(made.run_as),
            created_ms: cell.created_ms,
        };
        let workload = Arc::clone(&cell.workload);
        // Queued here: a claim's row of this slot must come after it.
        let journaled = self.pools.parts.journal.commit(vec![Op::PutSlot(row)], Durability::Soft);
        self.pools.parts.tasks.spawn("journal slot", async move {
            if let Err(error) = journaled.await {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "ready slot is not journaled; a restart will replace it"
                );
            }
        });
        maker::watch(&self.pools.parts, &workload, slot, &made, &self.pool);
        self.show(slot);
    }

    fn retire(&mut self, slot: &SlotId) {
        if !self.step(slot, SlotPhase::Retiring) {
            return;
        }
        let cell = self.cells.get(slot).expect("every slot of the ledger has a cell");
        let name = cell.made.as_ref().map_or_else(
            || maker::container_name(&self.pools.parts.instance, slot),
            |made| made.name.clone(),
        );
        let (parts, slot, tx) = (self.pools.parts.clone(), slot.clone(), self.pool.tx.clone());
        self.pools.parts.tasks.spawn("retire slot", async move {
            maker::unmake(&parts, &slot, &name).await;
            crash_point!(parts.crash, "retire.unmade");
            if let Err(error) = parts.journal.commit(vec![Op::DropSlot(slot.clone())], Durability::Soft).await {
                warn!(slot = %slot, error = &error as &dyn std::error::Error, "retired slot's row stays; adopt drops it");
            }
            let _ = tx.send(Command::Gone(slot)).await;
        });
    }

    fn adopt(&mut self, adopted: Adopted) {
        let now_ms = self.now_ms();
        let Adopted { slot, place, phase, spec_hash, made, workload } = adopted;
        // A slot that must go enters as `releasing`, the phase before.
        let enters = if phase == SlotPhase::Retiring { SlotPhase::Releasing } else { phase };
        self.ledger.adopt(slot.clone(), enters, spec_hash.clone(), now_ms);
        let cell = Cell {
            _place: place,
            workload: Arc::clone(&workload),
            spec_hash,
            made: Some(made.clone()),
            created_ms: now_ms,
        };
        self.cells.insert(slot.clone(), cell);
        self.show(&slot);
        match phase {
            SlotPhase::Ready => maker::watch(&self.pools.parts, &workload, &slot, &made, &self.pool),
            SlotPhase::Retiring => self.retire(&slot),
            _ => {}
        }
    }

    fn step(&mut self, slot: &SlotId, to: SlotPhase) -> bool {
        match self.ledger.step(slot, to, self.now_ms()) {
            Ok(from) => {
                debug!(slot = %slot, workload = %self.workload.spec.id, from = from.as_str(), to = to.as_str(), "slot");
                self.show(slot);
                true
            }
            Err(error) => {
                warn!(slot = %slot, error = &error as &dyn std::error::Error, "slot step refused");
                false
            }
        }
    }

    fn phase(&self, slot: &SlotId) -> Option<SlotPhase> {
        self.ledger.slots().get(slot).map(|slot| slot.phase)
    }

    fn exhausted(&self) -> Error {
        let capacity = &self.pools.parts.capacity;
        let counts = self.ledger.counts();
        let held: u32 = u32::try_from(self.ledger.slots().len()).unwrap_or(u32::MAX);
        let retry_in_ms = self.ledger.retry_at_ms().map(|at| at.saturating_sub(self.now_ms()));
        let reason = if let Some(error) = self.ledger.last_error() {
            format!("slots cannot be made: {error}")
        } else if held >= self.ledger.max() {
            format!("{held} of {} containers of this workload are in use (pool.max)", self.ledger.max())
        } else if capacity.used() >= capacity.max() {
            format!(
                "{} of {} containers are in use (BOILERHOUSE_MAX_CONTAINERS)",
                capacity.used(),
                capacity.max()
            )
        } else {
            format!("{} slots are being made", counts.creating + counts.warming)
        };
        Error::Exhausted { reason, retry_after_ms: retry_in_ms.unwrap_or(1_000).max(100) }
    }

    fn publish(&self) {
        let counts = self.ledger.counts();
        let now_ms = self.now_ms();
        let status = PoolStatus {
            workload: self.workload.spec.id.to_string(),
            spec_hash: self.ledger.spec_hash().to_string(),
            target: self.ledger.target(),
            max: self.ledger.max(),
            ready: counts.ready,
            warming: counts.warming,
            creating: counts.creating,
            claimed: counts.claimed,
            releasing: counts.releasing,
            parked: counts.parked,
            stranded: counts.stranded,
            lost: counts.lost,
            retiring: counts.retiring,
            waiting: self.ledger.waiting(),
            last_error: self.ledger.last_error().map(str::to_owned),
            retry_in_ms: self.ledger.retry_at_ms().map(|at| at.saturating_sub(now_ms)),
        };
        self.pool.view.status.store(Arc::new(status));
    }

    fn show(&self, slot: &SlotId) {
        let (Some(entry), Some(cell)) = (self.ledger.slots().get(slot), self.cells.get(slot)) else { return };
        let tenant = self.pool.view.slots.get(slot).and_then(|status| status.tenant.clone());
        let name = cell.made.as_ref().map_or_else(
            || maker::container_name(&self.pools.parts.instance, slot),
            |made| made.name.clone(),
        );
        let status = SlotStatus {
            slot: slot.to_string(),
            workload: self.workload.spec.id.to_string(),
            phase: entry.phase.as_str(),
            spec_hash: entry.spec_hash.to_string(),
            container: name,
            tenant,
            since_ms: entry.since_ms,
        };
        self.pool.view.slots.insert(slot.clone(), status);
    }

    fn now_ms(&self) -> u64 {
        self.pools.parts.clock.unix_ms()
    }
}
