//! One fault at each call of a tenant's day, and a second crash in the repair of
//! the first.

use std::{sync::Arc, time::Duration};

use boilerhouse::{
    lifecycle::CrashAction,
    model::{ClaimState, TenantId},
    runtime::{
        self, Runtime as _,
        fake::{Fault, Operation},
    },
    store::fault::{self, Rule},
    tenancy::{ClaimAnswer, Error, ReleaseState},
};

use crate::{
    WORKER,
    support::node::{TestNode, World, wait_for},
    world_with,
};

const TENANT: &str = "acme";
/// Days under way together: most of a day is waiting.
const AT_ONCE: usize = 8;
/// More calls than a day has.
const MOST_CALLS: u64 = 400;

fn tenant() -> TenantId {
    TenantId::new(TENANT).expect("an id")
}

/// Checks that at most one slot is the tenant's.
fn check_one(node: &TestNode) -> Result<(), String> {
    let slots = node.node.tenancy.slots();
    let held = slots.iter().filter(|slot| slot.phase == "claimed" && slot.tenant.as_deref() == Some(TENANT));
    match held.count() {
        0 | 1 => Ok(()),
        more => Err(format!("{more} slots are the tenant's: {slots:?}")),
    }
}

/// Claims until it works; every error on the way must be one that asks for patience.
async fn claim_at_last(node: &TestNode) -> Result<ClaimAnswer, String> {
    let began = std::time::Instant::now();
    loop {
        check_one(node)?;
        let error = match node.claim(TENANT).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let patience = matches!(
            error,
            Error::Runtime { .. }
                | Error::StoreUnavailable { .. }
                | Error::PoolExhausted { .. }
                | Error::Busy { .. }
                | Error::Starting { .. }
        );
        if !patience || began.elapsed() > Duration::from_secs(40) {
            return Err(format!("claim: {error:?}"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Releases until the state is durable.
async fn release_at_last(node: &TestNode) -> Result<(), String> {
    release_until(node, ReleaseState::Durable).await
}

async fn release_until(node: &TestNode, end: ReleaseState) -> Result<(), String> {
    let began = std::time::Instant::now();
    loop {
        check_one(node)?;
        let answer = node.release(TENANT).await.map_err(|error| format!("release: {error:?}"))?;
        match answer.state {
            // A save that ended meanwhile leaves nothing to release.
            ReleaseState::NotClaimed => return Ok(()),
            state if state == end => return Ok(()),
            ReleaseState::Pending if began.elapsed() < Duration::from_secs(40) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            other => return Err(format!("release: {other:?}: {:?}", answer.reason)),
        }
    }
}

/// Claim, write, sync, release, three times, the last from the store alone.
async fn day(world: &World, node: TestNode) -> Result<TestNode, String> {
    let mut node = node;
    for step in 1..=3_u32 {
        let claim = claim_at_last(&node).await?;
        let found = node.read(&claim, "step").map_or(0, |text| text.parse().unwrap_or(0));
        if found != step - 1 {
            return Err(format!("step {} was durable, {found} is there", step - 1));
        }
        node.write(&claim, "step", &step.to_string());
        let _ = node.node.tenancy.sync(tenant(), None).await;
        let observed = world.runtime.inspect(&claim.container.name).await;
        if observed.is_ok_and(|now| now.is_none_or(|now| now.status != runtime::ContainerStatus::Running)) {
            return Err("the claimed container does not run after a sync".to_owned());
        }
        release_at_last(&node).await?;
        if step == 2 {
            node.check_no_leaks(world).await;
            node.stop().await;
            std::fs::remove_dir_all(world.dir.path().join("states")).map_err(|error| error.to_string())?;
            node = world.start().await;
        }
    }
    Ok(node)
}

/// What must be true when nothing fails any more.
async fn check_end(world: &World, node: TestNode, written: u32, end: ReleaseState) -> Result<(), String> {
    world.store.clear();
    let landed = world.store.land().await.map_err(|error| format!("held writes: {error}"))?;
    node.check_no_leaks(world).await;
    node.stop().await;
    std::fs::remove_dir_all(world.dir.path().join("states")).map_err(|error| error.to_string())?;
    let node = world.start().await;
    let claim = claim_at_last(&node).await?;
    let found = node.read(&claim, "step");
    if found.as_deref() != Some(written.to_string().as_str()) {
        return Err(format!("step {written} was durable, the store has {found:?} ({landed} late writes)"));
    }
    release_until(&node, end).await?;
    node.check_no_leaks(world).await;
    node.stop().await;
    Ok(())
}

/// Runs `case` for 1, 2, … until it answers that its fault did not fire any more.
async fn until_none_fires<F, Fut>(what: String, case: F) -> u64
where
    F: Fn(u64) -> Fut,
    Fut: Future<Output = Result<bool, String>>,
{
    for nth in 1..MOST_CALLS {
        match case(nth).await {
            Ok(true) => {}
            Ok(false) => return nth - 1,
            Err(why) => panic!("{what}, call {nth}: {why}"),
        }
    }
    panic!("{what}: still met after {MOST_CALLS} calls");
}

async fn in_parallel<T: Send + 'static>(work: Vec<impl Future<Output = T> + Send + 'static>) -> Vec<T> {
    let places = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let tasks: Vec<_> = work
        .into_iter()
        .map(|work| {
            let places = Arc::clone(&places);
            tokio::spawn(async move {
                let _place = places.acquire_owned().await.expect("it is never closed");
                work.await
            })
        })
        .collect();
    let mut done = Vec::new();
    for task in tasks {
        done.push(task.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
    }
    done
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_at_any_call_of_the_engine_loses_and_leaks_nothing() {
    let refused = |operation: Operation| {
        Fault::Fail(runtime::Error::Conflict {
            operation: operation.as_str(),
            target: "anything".to_owned(),
            reason: "injected".to_owned(),
        })
    };
    let down = || {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        Fault::Fail(runtime::Error::Unavailable(Arc::new(refused)))
    };
    let mut work = Vec::new();
    for operation in [
        Operation::EnsureImage,
        Operation::Create,
        Operation::Start,
        Operation::Inspect,
        Operation::List,
        Operation::Stop,
        Operation::Pause,
        Operation::Unpause,
        Operation::Remove,
    ] {
        for fault in [refused(operation), down(), Fault::LoseAnswer, Fault::LoseCall] {
            work.push(async move {
                let name = operation.as_str();
                let met = until_none_fires(format!("{name}, {fault:?}"), |nth| {
                    let fault = fault.clone();
                    async move {
                        let world = World::new(&[("worker", WORKER)]);
                        world.runtime.fail_nth(operation, nth, fault);
                        let node = world.start().await;
                        let node = day(&world, node).await?;
                        let fired = world.runtime.calls().get(name).copied().unwrap_or(0) >= nth;
                        check_end(&world, node, 3, ReleaseState::Durable).await?;
                        Ok(fired)
                    }
                })
                .await;
                (name, met)
            });
        }
    }
    for (name, met) in in_parallel(work).await {
        assert!(met >= 1, "{name} is never called in a day");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_at_any_call_of_the_store_loses_and_leaks_nothing() {
    let mut work = Vec::new();
    for fault in [
        fault::Fault::FailBefore,
        fault::Fault::Refuse,
        fault::Fault::FailAfter,
        fault::Fault::Lose,
        fault::Fault::Hold,
    ] {
        work.push(async move {
            until_none_fires(format!("{fault:?}"), |nth| {
                let fault = fault.clone();
                async move {
                    let world = World::new(&[("worker", WORKER)]);
                    world.store.add(Rule::next(fault).nth(nth));
                    let node = world.start().await;
                    let node = day(&world, node).await?;
                    let fired = world.store.all_calls() >= nth;
                    check_end(&world, node, 3, ReleaseState::Durable).await?;
                    Ok(fired)
                }
            })
            .await
        });
    }
    for met in in_parallel(work).await {
        assert!(met >= 20, "a day makes more calls than {met}");
    }
}

/// The node is killed in the middle of a tenant's day and again in the repair.
#[tokio::test(flavor = "multi_thread")]
async fn p7_a_second_crash_in_the_repair_of_the_first_is_repaired_too() {
    let first = [
        "refill.created",
        "claim.taken",
        "claim.claiming",
        "claim.opening",
        "claim.opened",
        "claim.filled",
        "claim.secrets",
        "claim.activated",
        "claim.active",
        "release.releasing",
        "release.stopped",
        "release.moved",
        "release.captured",
        "save.saved",
        "close.journaled",
        "close.closed",
        "retire.removed",
        "retire.unmade",
        "sync.paused",
        "sync.saved",
    ];
    let second = [
        "adopt.looked",
        "adopt.trees",
        "adopt.strays",
        "adopt.done",
        "release.releasing",
        "release.stopped",
        "release.moved",
        "release.captured",
        "save.saved",
        "retire.removed",
        "retire.unmade",
        "refill.started",
    ];
    let every_pair = std::env::var_os("CAMPAIGN_SECONDS").is_some();
    let mut work = Vec::new();
    for (number, first) in first.into_iter().enumerate() {
        for (other, second) in second.into_iter().enumerate() {
            // The short form takes every third pair, so that each point is met as often.
            if every_pair || (number + other) % 3 == 0 {
                // From this node's cache, and from the store alone.
                for from_store in [false, true] {
                    work.push(async move {
                        let outcome = crash_twice(first, second, from_store).await;
                        (first, second, from_store, outcome)
                    });
                }
            }
        }
    }
    let mut twice = 0;
    for (first, second, from_store, outcome) in in_parallel(work).await {
        let crashes = outcome
            .unwrap_or_else(|why| panic!("{first}, then {second}, from the store: {from_store}: {why}"));
        twice += usize::from(crashes == 2);
    }
    assert!(twice > 40, "only {twice} pairs crashed twice");
}

/// Waits until everything that adopt began has come to its end.
async fn repaired(node: &TestNode) {
    wait_for("the node serves", || node.node.tenancy.readiness().status != "starting").await;
    while node.status(TENANT).await.claims.iter().any(|claim| claim.state != ClaimState::Active) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.settle().await;
}

/// Answers how often the node crashed.
async fn crash_twice(first: &str, second: &str, from_store: bool) -> Result<u32, String> {
    let world = world_with(first);
    let end = if first.starts_with("close.") { ReleaseState::Discarded } else { ReleaseState::Durable };
    let node = world.start().await;
    let claim = claim_at_last(&node).await?;
    node.write(&claim, "step", "1");
    node.node.tenancy.sync(tenant(), None).await.map_err(|error| format!("sync: {error:?}"))?;
    release_until(&node, end).await?;
    node.stop().await;
    if from_store {
        std::fs::remove_dir_all(world.dir.path().join("states")).map_err(|error| error.to_string())?;
    }
    let mut written = 1;
    let node = world.launch();
    node.crash.arm(first, 1, CrashAction::Halt);
    let work = async {
        let Ok(claim) = claim_at_last(&node).await else { return };
        node.write(&claim, "step", "2");
        written = 2;
        let _ = node.node.tenancy.sync(tenant(), None).await;
        let _ = release_until(&node, end).await;
        // Retirement and refill go on behind the answer.
        node.settle().await;
    };
    let mut crashes = 0;
    tokio::select! {
        biased;
        () = node.crash.crashed() => crashes += 1,
        () = work => {}
    }
    node.crash().await;
    let node = world.launch();
    node.crash.arm(second, 1, CrashAction::Halt);
    tokio::select! {
        biased;
        () = node.crash.crashed() => crashes += 1,
        () = repaired(&node) => {}
    }
    node.crash().await;
    let node = world.start().await;
    let claim = claim_at_last(&node).await?;
    let found = node.read(&claim, "step");
    if found.as_deref() != Some(written.to_string().as_str()) {
        return Err(format!("step {written} was written, {found:?} is there"));
    }
    release_until(&node, end).await?;
    check_end(&world, node, written, end).await?;
    Ok(crashes)
}
