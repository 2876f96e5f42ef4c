//! The pure core of a pool: which slots there are, who waits, what to do next.
//!
//! [`Ledger::plan`] derives every action from the state it finds, never from
//! the event that led there: a lost event costs time, not slots.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::model::{SlotId, SlotPhase, SpecHash, slot::IllegalStep};

/// Slots created at once when nothing else is going on.
const REFILL_WIDTH: u32 = 2;
/// Slots created at once when the pool is nearly empty or claims wait.
const REFILL_WIDTH_URGENT: u32 = 4;
/// Claims count as arriving for this long after one.
const CLAIM_LULL_MS: u64 = 500;
/// First and longest wait after slots failed to become ready.
const BACKOFF_BASE_MS: u64 = 500;
const BACKOFF_CAP_MS: u64 = 60_000;

/// What one pool has and wants.
#[derive(Debug)]
pub struct Ledger {
    spec_hash: SpecHash,
    target: u32,
    max: u32,
    slots: BTreeMap<SlotId, Slot>,
    // Kept beside `slots` so that a claim costs the same in a pool of a thousand.
    counts: Counts,
    ready: BTreeSet<(u64, SlotId)>,
    stale: BTreeSet<SlotId>,
    waiting: VecDeque<Waiting>,
    next_waiter: u64,
    last_take_ms: Option<u64>,
    failures: u32,
    retry_at_ms: Option<u64>,
    last_error: Option<String>,
}

/// One slot of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Where it stands.
    pub phase: SlotPhase,
    /// The spec it is made from.
    pub spec_hash: SpecHash,
    /// When it entered its phase, milliseconds since the epoch.
    pub since_ms: u64,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    deadline_ms: u64,
}

/// The number of a claim that waits.
pub type WaiterId = u64;

/// The answer to a claim that wants a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Take {
    /// This one; it is `claimed` now.
    Slot(SlotId),
    /// None is ready; the claim waits under this number.
    Wait(WaiterId),
}

/// Something the pool's actor should do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Reserve capacity and create a slot. `demand`: for a claim that waits.
    Create {
        /// Whether a claim waits for it.
        demand: bool,
    },
    /// Destroy this slot, which no tenant has touched.
    Retire(SlotId),
    /// Hand this slot, `claimed` now, to this waiter.
    Give(WaiterId, SlotId),
    /// Tell this waiter that its time is up.
    GiveUp(WaiterId),
}

/// Counts of slots by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// `creating`
    pub creating: u32,
    /// `warming`
    pub warming: u32,
    /// `ready`
    pub ready: u32,
    /// `claimed`
    pub claimed: u32,
    /// `releasing`
    pub releasing: u32,
    /// `parked`
    pub parked: u32,
    /// `stranded`
    pub stranded: u32,
    /// `lost`
    pub lost: u32,
    /// `retiring`
    pub retiring: u32,
}

// === impl Ledger ===

impl Ledger {
    /// Creates the ledger of an empty pool.
    pub fn new(spec_hash: SpecHash, target: u32, max: u32) -> Self {
        Self {
            spec_hash,
            target,
            max,
            slots: BTreeMap::new(),
            counts: Counts::default(),
            ready: BTreeSet::new(),
            stale: BTreeSet::new(),
            waiting: VecDeque::new(),
            next_waiter: 1,
            last_take_ms: None,
            failures: 0,
            retry_at_ms: None,
            last_error: None,
        }
    }

    /// Enters a slot that is about to be created; it counts from now on.
    pub fn begin(&mut self, slot: SlotId, now_ms: u64) {
        let spec_hash = self.spec_hash.clone();
        self.enter(slot, Slot { phase: SlotPhase::Creating, spec_hash, since_ms: now_ms });
    }

    /// Enters a slot that survived a restart.
    pub fn adopt(&mut self, slot: SlotId, phase: SlotPhase, spec_hash: SpecHash, now_ms: u64) {
        self.enter(slot, Slot { phase, spec_hash, since_ms: now_ms });
    }

    /// Moves a slot to another phase.
    ///
    /// # Errors
    /// [`IllegalStep`] names both phases; an unknown slot counts as `retiring`.
    pub fn step(&mut self, slot: &SlotId, to: SlotPhase, now_ms: u64) -> Result<SlotPhase, IllegalStep> {
        let Some(entry) = self.slots.get(slot) else {
            return Err(IllegalStep { from: SlotPhase::Retiring, to });
        };
        let from = entry.phase;
        from.step(to)?;
        let mut entry = self.leave_ledger(slot).expect("it was there just now");
        entry.phase = to;
        entry.since_ms = now_ms;
        self.enter(slot.clone(), entry);
        if to == SlotPhase::Ready {
            self.failures = 0;
            self.retry_at_ms = None;
            self.last_error = None;
        }
        Ok(from)
    }

    /// Forgets a slot that the engine says is gone.
    pub fn gone(&mut self, slot: &SlotId) {
        self.leave_ledger(slot);
    }

    /// Notes that a slot could not be made; the next attempt waits longer each time.
    pub fn failed(&mut self, reason: String, now_ms: u64) {
        let wait_ms = BACKOFF_BASE_MS.saturating_mul(1 << self.failures.min(16)).min(BACKOFF_CAP_MS);
        self.failures += 1;
        self.retry_at_ms = Some(now_ms + wait_ms);
        self.last_error = Some(reason);
    }

    /// Takes a ready slot for a claim, the oldest first, or queues the claim.
    pub fn take(&mut self, now_ms: u64, deadline_ms: u64) -> Take {
        self.last_take_ms = Some(now_ms);
        if self.waiting.is_empty()
            && let Some(slot) = self.oldest_ready()
        {
            self.claim(&slot, now_ms);
            return Take::Slot(slot);
        }
        let id = self.next_waiter;
        self.next_waiter += 1;
        self.waiting.push_back(Waiting { id, deadline_ms });
        Take::Wait(id)
    }

    /// Forgets a claim that does not wait any more.
    pub fn leave(&mut self, waiter: WaiterId) {
        self.waiting.retain(|waiting| waiting.id != waiter);
    }

    /// Says what to do now. `Give` has been carried out in the ledger already;
    /// `Create` and `Retire` take effect with [`Ledger::begin`] and [`Ledger::step`].
    pub fn plan(&mut self, now_ms: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        while let Some(slot) = self.oldest_ready() {
            let Some(waiter) = self.waiting.pop_front() else { break };
            self.claim(&slot, now_ms);
            actions.push(Action::Give(waiter.id, slot));
        }
        self.waiting.retain(|waiting| {
            let late = waiting.deadline_ms <= now_ms;
            if late {
                actions.push(Action::GiveUp(waiting.id));
            }
            !late
        });
        actions.extend(self.stale.iter().cloned().map(Action::Retire));
        self.plan_creates(now_ms, &mut actions);
        actions
    }

    /// Picks a ready slot to give up for another pool's waiting claim.
    pub fn spare(&self) -> Option<SlotId> {
        if self.waiting.is_empty() { self.oldest_ready() } else { None }
    }

    /// Says when [`Ledger::plan`] may have something new to say without an event.
    pub fn wake_at_ms(&self, now_ms: u64) -> Option<u64> {
        let deadline = self.waiting.iter().map(|waiting| waiting.deadline_ms).min();
        let lull = self.last_take_ms.map(|last| last + CLAIM_LULL_MS);
        [deadline, self.retry_at_ms, lull].into_iter().flatten().filter(|at| *at > now_ms).min()
    }

    /// Returns how many claims wait beyond the slots that are under way for them.
    pub fn unmet(&self) -> u32 {
        let counts = self.counts();
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX).saturating_sub(counts.creating + counts.warming)
    }

    /// Returns how many claims wait.
    pub fn waiting(&self) -> u32 {
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX)
    }

    /// Counts slots by phase.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Returns the slots.
    pub fn slots(&self) -> &BTreeMap<SlotId, Slot> {
        &self.slots
    }

    /// Returns the spec hash that new slots are made from.
    pub fn spec_hash(&self) -> &SpecHash {
        &self.spec_hash
    }

    /// Returns the number of ready slots wanted.
    pub fn target(&self) -> u32 {
        self.target
    }

    /// Returns the most containers this pool may have.
    pub fn max(&self) -> u32 {
        self.max
    }

    /// Returns why the last slot could not be made, until one can.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// Returns when the next attempt begins after a failure.
    pub fn retry_at_ms(&self) -> Option<u64> {
        self.retry_at_ms
    }

    fn plan_creates(&self, now_ms: u64, actions: &mut Vec<Action>) {
        if self.retry_at_ms.is_some_and(|at| now_ms < at) {
            return;
        }
        let counts = self.counts();
        let under_way = counts.creating + counts.warming;
        let waiting = self.waiting();
        let wanted = (self.target + waiting).saturating_sub(counts.ready + under_way);
        let room = self.max.saturating_sub(u32::try_from(self.slots.len()).unwrap_or(u32::MAX));
        // After a failure one slot tries the way for the others.
        let width = if self.failures > 0 { 1 } else { self.width(now_ms, counts.ready, waiting) };
        let creates = wanted.min(room).min(width.saturating_sub(under_way));
        for nth in 0..creates {
            actions.push(Action::Create { demand: under_way + nth < waiting });
        }
    }

    // Creating a container takes a core for most of its time, so refill yields to claims.
    fn width(&self, now_ms: u64, ready: u32, waiting: u32) -> u32 {
        let claims_arrive = self.last_take_ms.is_some_and(|last| now_ms.saturating_sub(last) < CLAIM_LULL_MS);
        if waiting > 0 || ready * 4 < self.target {
            REFILL_WIDTH_URGENT
        } else if claims_arrive {
            1
        } else {
            REFILL_WIDTH
        }
    }

    fn oldest_ready(&self) -> Option<SlotId> {
        self.ready.first().map(|(_, id)| id.clone())
    }

    fn enter(&mut self, id: SlotId, slot: Slot) {
        *self.counts.of(slot.phase) += 1;
        if slot.phase == SlotPhase::Ready {
            if slot.spec_hash == self.spec_hash {
                self.ready.insert((slot.since_ms, id.clone()));
            } else {
                self.stale.insert(id.clone());
            }
        }
        if let Some(before) = self.slots.insert(id, slot) {
            *self.counts.of(before.phase) -= 1;
        }
    }

    fn leave_ledger(&mut self, id: &SlotId) -> Option<Slot> {
        let slot = self.slots.remove(id)?;
        *self.counts.of(slot.phase) -= 1;
        if slot.phase == SlotPhase::Ready {
            self.ready.remove(&(slot.since_ms, id.clone()));
            self.stale.remove(id);
        }
        Some(slot)
    }

    fn claim(&mut self, slot: &SlotId, now_ms: u64) {
        self.step(slot, SlotPhase::Claimed, now_ms).expect("a ready slot may be claimed");
    }
}

// === impl Counts ===

impl Counts {
    fn of(&mut self, phase: SlotPhase) -> &mut u32 {
        match phase {
            SlotPhase::Creating => &mut self.creating,
            SlotPhase::Warming => &mut self.warming,
            SlotPhase::Ready => &mut self.ready,
            SlotPhase::Claimed => &mut self.claimed,
            SlotPhase::Releasing => &mut self.releasing,
            SlotPhase::Parked => &mut self.parked,
            SlotPhase::Stranded => &mut self.stranded,
            SlotPhase::Lost => &mut self.lost,
            SlotPhase::Retiring => &mut self.retiring,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> SlotId {
        SlotId::new(format!("s{n}")).unwrap()
    }

    fn hash(text: &str) -> SpecHash {
        SpecHash(text.to_owned())
    }

    fn with_ready(target: u32, max: u32, ready: u32) -> Ledger {
        let mut ledger = Ledger::new(hash("now"), target, max);
        for n in 0..ready {
            ledger.adopt(id(n), SlotPhase::Ready, hash("now"), u64::from(n));
        }
        ledger
    }

    fn creates(actions: &[Action]) -> usize {
        actions.iter().filter(|action| matches!(action, Action::Create { .. })).count()
    }

    #[test]
    fn an_empty_pool_refills_to_its_target_counting_what_is_under_way() {
        let mut ledger = Ledger::new(hash("now"), 3, 10);
        let mut made = 0;
        for _ in 0..20 {
            for action in ledger.plan(0) {
                assert_eq!(action, Action::Create { demand: false });
                ledger.begin(id(made), 0);
                made += 1;
            }
        }
        assert_eq!(made, 3);
    }

    #[test]
    fn the_pools_maximum_holds_in_every_phase() {
        for phase in [SlotPhase::Claimed, SlotPhase::Retiring, SlotPhase::Stranded, SlotPhase::Lost] {
            let mut ledger = Ledger::new(hash("now"), 5, 2);
            ledger.adopt(id(0), phase, hash("now"), 0);
            ledger.adopt(id(1), phase, hash("now"), 0);
            ledger.take(0, 100);
            assert_eq!(creates(&ledger.plan(0)), 0, "{phase:?} counts against the maximum");
        }
    }

    #[test]
    fn refill_yields_while_claims_arrive_and_hurries_when_nearly_empty() {
        let mut ledger = with_ready(10, 50, 8);
        assert_eq!(creates(&ledger.plan(0)), 2);
        ledger.take(0, 100);
        assert_eq!(creates(&ledger.plan(10)), 1, "a claim came just now");
        assert_eq!(creates(&ledger.plan(10 + CLAIM_LULL_MS)), 2);
        let mut low = with_ready(10, 50, 2);
        low.take(0, 100);
        assert_eq!(creates(&low.plan(1)), 4);
    }

    #[test]
    fn claims_are_served_in_the_order_they_came() {
        let mut ledger = with_ready(0, 10, 1);
        assert_eq!(ledger.take(1, 100), Take::Slot(id(0)));
        let Take::Wait(first) = ledger.take(2, 100) else { panic!("nothing is ready") };
        let Take::Wait(second) = ledger.take(3, 50) else { panic!("nothing is ready") };
        ledger.adopt(id(5), SlotPhase::Warming, hash("now"), 4);
        ledger.step(&id(5), SlotPhase::Ready, 5).unwrap();
        assert!(
            matches!(ledger.take(6, 100), Take::Wait(_)),
            "a claim that comes while others wait does not jump the queue"
        );
        let actions = ledger.plan(7);
        assert!(actions.contains(&Action::Give(first, id(5))));
        assert!(ledger.plan(50).contains(&Action::GiveUp(second)));
        assert_eq!(ledger.waiting(), 1);
    }

    #[test]
    fn only_slots_made_from_the_spec_are_given_and_others_are_replaced() {
        let mut ledger = Ledger::new(hash("now"), 1, 10);
        ledger.adopt(id(0), SlotPhase::Ready, hash("before"), 0);
        assert!(matches!(ledger.take(0, 100), Take::Wait(_)));
        let actions = ledger.plan(0);
        assert!(actions.contains(&Action::Retire(id(0))));
        assert!(actions.contains(&Action::Create { demand: true }));
    }

    #[test]
    fn failures_back_off_are_visible_and_heal() {
        let mut ledger = Ledger::new(hash("now"), 4, 10);
        let mut waits = Vec::new();
        for now in [0, 1_000_000, 2_000_000] {
            ledger.failed("no such image".to_owned(), now);
            assert_eq!(creates(&ledger.plan(now)), 0);
            waits.push(ledger.retry_at_ms().unwrap() - now);
        }
        assert_eq!(waits, vec![500, 1_000, 2_000]);
        assert_eq!(ledger.last_error(), Some("no such image"));
        assert_eq!(creates(&ledger.plan(2_002_000)), 1, "one slot tries the way");
        ledger.begin(id(0), 2_002_000);
        ledger.step(&id(0), SlotPhase::Warming, 2_002_001).unwrap();
        ledger.step(&id(0), SlotPhase::Ready, 2_002_002).unwrap();
        assert_eq!((ledger.last_error(), ledger.retry_at_ms()), (None, None));
    }

    #[test]
    fn a_pool_with_waiting_claims_spares_nothing() {
        let mut ledger = with_ready(1, 10, 1);
        assert_eq!(ledger.spare(), Some(id(0)));
        ledger.take(0, 10);
        ledger.take(0, 10);
        ledger.adopt(id(3), SlotPhase::Ready, hash("now"), 0);
        assert_eq!(ledger.spare(), None);
        assert_eq!(ledger.unmet(), 1);
    }
}
