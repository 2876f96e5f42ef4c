//! Everything at once, at random, under a seed: tenants claim, write, sync and
//! release, containers die, the store and the engine fail, the node is killed.
//!
//! `CAMPAIGN_SECONDS` makes it long, `CAMPAIGN_SEED` repeats one. The seed decides
//! what is done; how tasks interleave is the machine's.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use boilerhouse::{
    model::{ContainerId, TenantId, WorkloadId},
    runtime::{
        Runtime as _,
        fake::{Fault, Operation},
    },
    store::fault::{self, Rule},
    tenancy::{ClaimAnswer, ClaimRequest, Error, ReleaseAnswer, ReleaseRequest, ReleaseState, ReleaseWait},
};

use crate::{
    WORKER,
    support::node::{TestNode, World, wait_for},
};

const TENANTS: usize = 6;
const WORKLOADS: [&str; 2] = ["worker", "other"];
/// Lives of the node in one campaign.
const LIVES: u32 = 5;
/// What one tenant does in one life.
const ACTS: u32 = 14;

/// SplitMix64.
struct Dice(u64);

/// What was written last, and last said to be durable, of each tenant and workload.
#[derive(Default)]
struct Model {
    written: BTreeMap<(usize, usize), u64>,
    durable: BTreeMap<(usize, usize), u64>,
}

struct Player {
    node: Arc<TestNode>,
    world: Arc<World>,
    model: Arc<Mutex<Model>>,
    tenant: usize,
    claims: BTreeMap<usize, ClaimAnswer>,
    dice: Dice,
}

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

fn tenant_id(tenant: usize) -> TenantId {
    TenantId::new(format!("t{tenant}")).expect("an id")
}

fn workload_id(workload: usize) -> Option<WorkloadId> {
    Some(WorkloadId::new(WORKLOADS[workload]).expect("an id"))
}

/// Whether an error only asks to come again.
fn is_passing(error: &Error) -> bool {
    matches!(
        error,
        Error::Runtime { .. }
            | Error::StoreUnavailable { .. }
            | Error::PoolExhausted { .. }
            | Error::Busy { .. }
            | Error::NotClaimed { .. }
            | Error::Starting { .. }
            | Error::ShuttingDown
    )
}

impl Player {
    async fn play(mut self) {
        for _ in 0..ACTS {
            let workload = self.dice.below(2) as usize;
            match self.dice.below(10) {
                0..=3 => self.claim_and_write(workload).await,
                4 => self.claim_and_go_away(workload).await,
                5 => self.sync(workload).await,
                6 | 7 => self.release(workload, ReleaseWait::Durable).await,
                8 => self.release(workload, ReleaseWait::Accepted).await,
                _ => self.kill(workload).await,
            }
        }
    }

    async fn claim_and_write(&mut self, workload: usize) {
        let request =
            ClaimRequest { workload: workload_id(workload), wait_ms: Some(3_000), ..Default::default() };
        match self.node.node.tenancy.claim(tenant_id(self.tenant), request).await {
            // Its container died just now, and nobody knows yet: no program reads or writes.
            Ok(claim) if !self.runs(&claim) => {}
            Ok(claim) => {
                self.node.check_value(&self.model, (self.tenant, workload), &claim);
                self.check_one(workload);
                self.write(workload, &claim);
                self.claims.insert(workload, claim);
            }
            Err(error) => assert!(is_passing(&error), "claim: {error:?}"),
        }
    }

    fn runs(&self, claim: &ClaimAnswer) -> bool {
        let all = self.world.runtime.all();
        all.iter().any(|container| container.id.0 == claim.container.id && container.status.is_alive())
    }

    async fn claim_and_go_away(&mut self, workload: usize) {
        let request =
            ClaimRequest { workload: workload_id(workload), wait_ms: Some(500), ..Default::default() };
        let claim = self.node.node.tenancy.claim(tenant_id(self.tenant), request);
        let patience = Duration::from_micros(self.dice.below(3_000));
        let _ = tokio::time::timeout(patience, claim).await;
    }

    fn write(&mut self, workload: usize, claim: &ClaimAnswer) {
        let key = (self.tenant, workload);
        let mut model = self.model.lock().unwrap();
        let value = model.written.get(&key).copied().unwrap_or(0) + 1;
        self.node.write(claim, "value", &value.to_string());
        model.written.insert(key, value);
    }

    async fn sync(&mut self, workload: usize) {
        let before = self.written(workload);
        match self.node.node.tenancy.sync(tenant_id(self.tenant), workload_id(workload)).await {
            Ok(_) => self.acknowledge(workload, before),
            Err(error) => assert!(is_passing(&error), "sync: {error:?}"),
        }
    }

    async fn release(&mut self, workload: usize, wait: ReleaseWait) {
        let before = self.written(workload);
        self.claims.remove(&workload);
        let request = ReleaseRequest { workload: workload_id(workload), wait, ..Default::default() };
        match self.node.node.tenancy.release(tenant_id(self.tenant), request).await {
            Ok(ReleaseAnswer { state: ReleaseState::Durable, .. }) => self.acknowledge(workload, before),
            Ok(answer) => assert_ne!(answer.state, ReleaseState::Discarded, "{answer:?}"),
            Err(error) => assert!(is_passing(&error), "release: {error:?}"),
        }
    }

    async fn kill(&mut self, workload: usize) {
        let Some(claim) = self.claims.remove(&workload) else { return };
        self.world.runtime.kill_outside(&ContainerId(claim.container.id), 137, false);
        self.node.node.upkeep.reconcile().await;
    }

    fn written(&self, workload: usize) -> u64 {
        self.model.lock().unwrap().written.get(&(self.tenant, workload)).copied().unwrap_or(0)
    }

    fn acknowledge(&self, workload: usize, value: u64) {
        self.model.lock().unwrap().durable.insert((self.tenant, workload), value);
    }

    /// P1: of one tenant and workload there is one slot at most.
    fn check_one(&self, workload: usize) {
        let name = tenant_id(self.tenant).to_string();
        let slots = self.node.node.tenancy.slots();
        let held = slots.iter().filter(|slot| {
            slot.phase == "claimed"
                && slot.workload == WORKLOADS[workload]
                && slot.tenant.as_deref() == Some(name.as_str())
        });
        assert!(held.count() <= 1, "two slots of {name}: {slots:?}");
    }
}

impl TestNode {
    /// Neither a crash of the node nor a death of the container takes what was written.
    fn check_value(&self, model: &Mutex<Model>, key: (usize, usize), claim: &ClaimAnswer) {
        let found = self.read(claim, "value").map_or(0, |text| text.parse::<u64>().expect("a number"));
        let model = model.lock().unwrap();
        let written = model.written.get(&key).copied().unwrap_or(0);
        let durable = model.durable.get(&key).copied().unwrap_or(0);
        assert_eq!(found, written, "{key:?}: epoch {}, {durable} was durable", claim.epoch.0);
    }
}

/// Fails calls of the engine and the store now and then, until it is dropped.
async fn disturb(world: Arc<World>, mut dice: Dice) {
    const OPERATIONS: [Operation; 8] = [
        Operation::Create,
        Operation::Start,
        Operation::Inspect,
        Operation::Stop,
        Operation::Pause,
        Operation::Unpause,
        Operation::Remove,
        Operation::List,
    ];
    loop {
        match dice.below(4) {
            0 => {
                world.store.set_down(true);
                tokio::time::sleep(Duration::from_millis(dice.below(120))).await;
                world.store.set_down(false);
            }
            1 => {
                let faults = [fault::Fault::FailBefore, fault::Fault::FailAfter, fault::Fault::Lose];
                world.store.add(Rule::next(faults[dice.below(3) as usize].clone()));
            }
            2 => {
                let fault = if dice.below(2) == 0 { Fault::LoseAnswer } else { Fault::LoseCall };
                world.runtime.fail_next(OPERATIONS[dice.below(8) as usize], fault);
            }
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(10 + dice.below(50))).await;
    }
}

async fn campaign(seed: u64) {
    let mut dice = Dice(seed);
    let other = WORKER.replace("\"worker\"", "\"other\"");
    let mut world = World::new(&[("worker", WORKER), ("other", &other)]);
    // Fewer than could be claimed: pools take slots from each other.
    world.max_containers = 10;
    let world = Arc::new(world);
    let model = Arc::new(Mutex::new(Model::default()));
    for life in 0..LIVES {
        let node = Arc::new(world.start().await);
        let mut players = tokio::task::JoinSet::new();
        for tenant in 0..TENANTS {
            let player = Player {
                node: Arc::clone(&node),
                world: Arc::clone(&world),
                model: Arc::clone(&model),
                tenant,
                claims: BTreeMap::new(),
                dice: Dice(dice.below(u64::MAX)),
            };
            players.spawn(player.play());
        }
        let disturbance = tokio::spawn(disturb(Arc::clone(&world), Dice(dice.below(u64::MAX))));
        // Some lives end in the middle of it all.
        let patience = Duration::from_millis(if life % 2 == 0 { 30_000 } else { 50 + dice.below(800) });
        let deadline = tokio::time::sleep(patience);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                biased;
                () = &mut deadline => break,
                done = players.join_next() => match done {
                    None => break,
                    Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Some(_) => {}
                },
            }
        }
        disturbance.abort();
        let _ = disturbance.await;
        players.shutdown().await;
        world.store.set_down(false);
        world.store.clear();
        assert!(world.runtime.peak() <= 10, "{} containers at once", world.runtime.peak());
        // What was called on the node may hold it a moment longer.
        wait_for("nothing uses the node", || Arc::strong_count(&node) == 1).await;
        let node = Arc::into_inner(node).expect("it was the last");
        if dice.below(3) == 0 {
            node.stop().await;
        } else {
            node.crash().await;
        }
    }
    settle(&world, &model).await;
}

/// At the end, and from the store alone, everything that was written is there.
async fn settle(world: &World, model: &Mutex<Model>) {
    for from_store in [false, true] {
        if from_store {
            std::fs::remove_dir_all(world.dir.path().join("states")).unwrap();
        }
        let node = world.start().await;
        // There are fewer places than claims.
        for tenant in 0..TENANTS {
            for workload in 0..WORKLOADS.len() {
                let request = ReleaseRequest { workload: workload_id(workload), ..Default::default() };
                node.node.tenancy.release(tenant_id(tenant), request).await.unwrap();
            }
        }
        for tenant in 0..TENANTS {
            for workload in 0..WORKLOADS.len() {
                let request = ClaimRequest { workload: workload_id(workload), ..Default::default() };
                let claim = claim_at_last(&node, tenant, request).await;
                node.check_value(model, (tenant, workload), &claim);
                let request = ReleaseRequest { workload: workload_id(workload), ..Default::default() };
                let answer = node.node.tenancy.release(tenant_id(tenant), request).await.unwrap();
                assert_eq!(answer.state, ReleaseState::Durable, "{answer:?}");
            }
        }
        for container in world.runtime.all() {
            let now = world.runtime.inspect(&container.name).await.unwrap();
            let paused = now.is_some_and(|now| now.status == boilerhouse::runtime::ContainerStatus::Paused);
            assert!(!paused, "{} is still paused", container.name);
        }
        node.check_no_leaks(world).await;
        node.stop().await;
    }
}

async fn claim_at_last(node: &TestNode, tenant: usize, request: ClaimRequest) -> ClaimAnswer {
    let began = Instant::now();
    loop {
        match node.node.tenancy.claim(tenant_id(tenant), request.clone()).await {
            Ok(claim) => return claim,
            Err(error) if is_passing(&error) && began.elapsed() < Duration::from_secs(60) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("t{tenant}: {error:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_random_campaign_keeps_every_promise() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let began = Instant::now();
    let long = Duration::from_secs(number("CAMPAIGN_SECONDS").unwrap_or(0));
    let mut seed = number("CAMPAIGN_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        u64::from(now.subsec_nanos()) | now.as_secs() << 32
    });
    loop {
        eprintln!("CAMPAIGN_SEED={seed}");
        campaign(seed).await;
        if began.elapsed() >= long {
            return;
        }
        seed = seed.wrapping_add(1);
    }
}
