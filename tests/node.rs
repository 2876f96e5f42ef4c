//! A whole node over fakes: what the promises say, and what a crash at every
//! named point leaves behind.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "node/cache.rs"]
mod cache;
#[path = "node/campaign.rs"]
mod campaign;
#[path = "node/faults.rs"]
mod faults;
#[path = "node/fence.rs"]
mod fence;
#[path = "node/history.rs"]
mod history;
#[path = "node/resolve.rs"]
mod resolve;

mod support;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use boilerhouse::{
    lifecycle::CrashAction,
    model::{ClaimSource, Secret, StateSource, TenantId},
    runtime::{
        Runtime as _,
        fake::{FakeExec, Fault, Operation},
    },
    state::fence::Mode,
    store::{
        Store as _,
        fault::{self, Rule},
    },
    tenancy::{ClaimRequest, Error, ReleaseState, ReleaseWait},
};
use support::node::{INSTANCE, TestNode, World, wait_for};

const WORKER: &str = r#"//! A worker with all three volumes.
fn workload() {
    #{
        id: "worker",
        image: "app:1",
        volumes: #{
            state: #{ container_path: "/data", mode: "rw" },
            secrets: #{ container_path: "/secrets", mode: "ro" },
            comm: #{ container_path: "/comm", mode: "rw" },
        },
        pool: #{ min_idle: 2, max: 50 },
    }
}
"#;

fn with_hooks(hooks: &str) -> String {
    format!("{WORKER}{hooks}")
}

fn request() -> ClaimRequest {
    ClaimRequest::default()
}

async fn claimed(node: &TestNode, tenant: &str) -> boilerhouse::tenancy::ClaimAnswer {
    node.claim(tenant).await.unwrap_or_else(|error| panic!("claim of {tenant}: {error:?}"))
}

async fn durable(node: &TestNode, tenant: &str) {
    let answer = node.release(tenant).await.unwrap_or_else(|error| panic!("release of {tenant}: {error:?}"));
    assert_eq!(answer.state, ReleaseState::Durable, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_two_hundred_concurrent_claims_of_one_tenant_are_one_claim() {
    let world = World::new(&[("worker", WORKER)]);
    let node = Arc::new(world.start().await);
    node.settle().await;
    let claims = (0..200).map(|_| {
        let node = Arc::clone(&node);
        tokio::spawn(async move { claimed(&node, "acme").await })
    });
    let mut slots = std::collections::BTreeSet::new();
    let mut first = 0;
    for claim in claims.collect::<Vec<_>>() {
        let answer = claim.await.unwrap();
        first += usize::from(answer.source != ClaimSource::Existing);
        slots.insert(answer.slot);
    }
    assert_eq!((slots.len(), first), (1, 1));
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_claim_has_no_side_effects_and_another_request_differs() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let secrets = |value: &str| Some(BTreeMap::from([("token".to_owned(), Secret::new(value))]));
    let first = node.claim_with("acme", ClaimRequest { secrets: secrets("a"), ..request() }).await.unwrap();
    node.write(&first, "mine", "unsaved");
    node.settle().await;
    let engine = world.runtime.total_calls();
    let store = world.store.calls_in("t");
    let again = node.claim_with("acme", ClaimRequest { secrets: secrets("a"), ..request() }).await.unwrap();
    assert_eq!((again.source, again.epoch, &again.slot), (ClaimSource::Existing, first.epoch, &first.slot));
    assert_eq!(node.read(&again, "mine").as_deref(), Some("unsaved"));
    assert_eq!((world.runtime.total_calls(), world.store.calls_in("t")), (engine, store));
    let other = node.claim_with("acme", ClaimRequest { secrets: secrets("b"), ..request() }).await;
    assert!(matches!(other, Err(Error::ClaimDiffers { what: "secrets" })), "{other:?}");
    let metadata = serde_json::json!({ "plan": "pro" }).as_object().cloned();
    let other = node.claim_with("acme", ClaimRequest { metadata, ..request() }).await;
    assert!(matches!(other, Err(Error::ClaimDiffers { what: "metadata" })), "{other:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn p5_a_warm_claim_makes_no_engine_call() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    node.settle().await;
    // Refill must not hide in the count: nothing can be created from here on.
    world.runtime.fail_all(Operation::EnsureImage, Some(Fault::Hang));
    let before = world.runtime.calls();
    let answer = claimed(&node, "acme").await;
    assert_eq!(answer.source, ClaimSource::Warm);
    let mut after = world.runtime.calls();
    // The one call that refill began with, and hangs in.
    after.remove("ensure_image");
    let mut before = before;
    before.remove("ensure_image");
    assert_eq!(before, after);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_claim_here_moves_no_bytes() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    assert_eq!(first.state.source, StateSource::None);
    node.write(&first, "file", "content");
    durable(&node, "acme").await;
    node.settle().await;
    // A look at the owner record follows each save, in its own time.
    let calls = || world.store.all_calls() - world.store.calls_in("owner");
    let before = calls();
    let second = claimed(&node, "acme").await;
    assert_eq!(second.state.source, StateSource::Cache);
    assert_eq!(calls(), before, "no store call");
    assert_eq!(node.read(&second, "file").as_deref(), Some("content"));
    assert_eq!(second.epoch, first.epoch.next());
    assert_ne!(second.slot, first.slot, "P4: a slot serves one tenant once");
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_a_released_slot_is_never_handed_out_again() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let mut seen = std::collections::BTreeSet::new();
    for n in 0..12 {
        let tenant = format!("t{}", n % 3);
        let answer = claimed(&node, &tenant).await;
        assert!(seen.insert(answer.container.id.clone()), "container {} twice", answer.container.id);
        durable(&node, &tenant).await;
    }
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_a_release_that_cannot_save_keeps_the_data_says_so_and_retries() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    node.write(&first, "file", "precious");
    world.store.set_down(true);
    let answer = node.release("acme").await.unwrap();
    assert_eq!(answer.state, ReleaseState::Pending);
    assert!(answer.reason.is_some());
    let status = node.status("acme").await;
    assert_eq!(status.claims[0].state.as_str(), "dirty");
    assert!(status.claims[0].last_error.is_some());
    // A repeated release finds the same save.
    assert_eq!(node.release("acme").await.unwrap().state, ReleaseState::Pending);
    world.store.set_down(false);
    let saved = async || node.status("acme").await.claims.is_empty();
    let began = std::time::Instant::now();
    while !saved().await {
        assert!(began.elapsed() < Duration::from_secs(30), "the pending save does not succeed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.stop().await;
    std::fs::remove_dir_all(world.dir.path().join("states")).unwrap();
    let node = world.start().await;
    let back = claimed(&node, "acme").await;
    assert_eq!(back.state.source, StateSource::Store);
    assert_eq!(node.read(&back, "file").as_deref(), Some("precious"));
    assert_eq!(back.epoch, first.epoch.next());
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_an_error_of_the_store_is_never_taken_for_absence() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    node.write(&first, "file", "content");
    durable(&node, "acme").await;
    node.stop().await;
    std::fs::remove_dir_all(world.dir.path().join("states")).unwrap();
    let node = world.start().await;
    node.settle().await;
    // Each call that a fill makes fails once, in turn; the claim never begins empty.
    let mut failed = 0;
    for nth in 1..200 {
        let calls = world.store.calls_in("t");
        world.store.add(Rule::next(fault::Fault::FailBefore).with_key("t/").nth(nth));
        match node.claim("acme").await {
            Ok(answer) => {
                assert_eq!(node.read(&answer, "file").as_deref(), Some("content"), "call {nth}");
                assert!(world.store.calls_in("t") - calls < nth, "call {nth} failed and the claim went on");
                break;
            }
            Err(Error::StoreUnavailable { retry_after_ms, .. }) => {
                assert!(retry_after_ms > 0);
                failed += 1;
                node.settle().await;
                // Its end is written to the store; that is not the next claim's call.
                wait_for("the claim has ended", || {
                    futures_util::FutureExt::now_or_never(node.status("acme"))
                        .is_some_and(|status| status.claims.is_empty())
                })
                .await;
            }
            Err(error) => panic!("call {nth}: {error:?}"),
        }
    }
    assert!(failed >= 3, "listing, record and manifest at least: {failed}");
    world.store.clear();
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_over_a_pending_save_takes_the_tree_and_the_duty() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    node.write(&first, "file", "one");
    world.store.set_down(true);
    assert_eq!(node.release("acme").await.unwrap().state, ReleaseState::Pending);
    let second = claimed(&node, "acme").await;
    assert_eq!(second.state.source, StateSource::Cache);
    assert_eq!(node.read(&second, "file").as_deref(), Some("one"));
    let status = node.status("acme").await;
    let old = status.claims.iter().find(|claim| claim.epoch == first.epoch).expect("the old claim");
    assert_eq!(old.superseded_by, Some(second.epoch));
    node.write(&second, "more", "two");
    world.store.set_down(false);
    durable(&node, "acme").await;
    assert!(node.status("acme").await.claims.is_empty(), "{:?}", node.status("acme").await);
    node.stop().await;
    std::fs::remove_dir_all(world.dir.path().join("states")).unwrap();
    let node = world.start().await;
    let third = claimed(&node, "acme").await;
    assert_eq!(third.epoch, second.epoch.next());
    assert_eq!(node.read(&third, "file").as_deref(), Some("one"));
    assert_eq!(node.read(&third, "more").as_deref(), Some("two"));
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_tenants_on_twenty_places_give_twenty_claims() {
    let mut world = World::new(&[("worker", WORKER)]);
    world.max_containers = 20;
    let world = world;
    let node = Arc::new(world.start().await);
    let claims: Vec<_> = (0..50)
        .map(|n| {
            let node = Arc::clone(&node);
            tokio::spawn(async move {
                node.claim_with(&format!("t{n}"), ClaimRequest { wait_ms: Some(2_000), ..request() }).await
            })
        })
        .collect();
    let (mut ok, mut refused) = (0, 0);
    for claim in claims {
        match claim.await.unwrap() {
            Ok(_) => ok += 1,
            Err(Error::PoolExhausted { retry_after_ms, reason, .. }) => {
                assert!(retry_after_ms > 0 && reason.contains("20 of 20"), "{reason}");
                refused += 1;
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!((ok, refused), (20, 30));
    assert!(world.runtime.peak() <= 20, "{} containers at once", world.runtime.peak());
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_cap_a_waiting_claim_takes_another_pools_blank_slot() {
    let other = WORKER.replace("\"worker\"", "\"other\"");
    let mut world = World::new(&[("worker", WORKER), ("other", &other)]);
    world.max_containers = 4;
    let world = world;
    let node = world.start().await;
    node.settle().await;
    for n in 0..4 {
        let workload = Some("worker".parse().unwrap());
        let answer = node.claim_with(&format!("t{n}"), ClaimRequest { workload, ..request() }).await;
        assert!(answer.is_ok(), "claim {n}: {answer:?}");
    }
    assert!(world.runtime.peak() <= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_image_backs_off_says_why_and_heals() {
    let world = World::new(&[("worker", WORKER)]);
    world.runtime.remove_image("app:1");
    let node = world.start().await;
    wait_for("the reason shows", || node.node.tenancy.pools()[0].last_error.is_some()).await;
    let refused = node.claim_with("acme", ClaimRequest { wait_ms: Some(50), ..request() }).await;
    let Err(Error::PoolExhausted { reason, .. }) = refused else { panic!("{refused:?}") };
    assert!(reason.contains("app:1"), "{reason}");
    let image = boilerhouse::runtime::fake::FakeImage {
        run_as: support::node::APP,
        ends_after: Some(Duration::ZERO),
    };
    world.runtime.add_image("app:1", image);
    claimed(&node, "acme").await;
    node.settle().await;
    assert_eq!(node.node.tenancy.pools()[0].last_error, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_waits_for_the_health_check() {
    let script = WORKER.replace(
        "pool:",
        "health_check: #{ command: [\"check\"], interval_ms: 1000, timeout_ms: 500, retries: 3 }, pool:",
    );
    let world = World::new(&[("worker", &script)]);
    let sick = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let says = Arc::clone(&sick);
    world
        .runtime
        .on_exec(move |_, _| FakeExec::status(i64::from(says.load(std::sync::atomic::Ordering::SeqCst))));
    let node = world.start().await;
    wait_for("a slot is warming", || node.node.tenancy.pools()[0].warming > 0).await;
    let refused = node.claim_with("acme", ClaimRequest { wait_ms: Some(300), ..request() }).await;
    assert!(matches!(refused, Err(Error::PoolExhausted { .. })), "{refused:?}");
    assert_eq!(node.node.tenancy.pools()[0].ready, 0);
    sick.store(false, std::sync::atomic::Ordering::SeqCst);
    claimed(&node, "acme").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_decide_and_act_and_a_rejection_leaves_no_trace() {
    let world = World::new(&[(
        "worker",
        &with_hooks(
            r#"
fn before_claim(ctx) {
    if ctx.tenant.metadata.plan == "suspended" { return ctx.reject("tenant_suspended", "suspended"); }
    ctx.accept()
}
fn on_claim(ctx) {
    if ctx.tenant.id == "unwanted" { return ctx.reject("unwanted", "not today"); }
    let key = ctx.secrets.get_or_create("session_key", 32);
    ctx.set_output("key", key);
    ctx.state.write("greeting", "hello " + ctx.tenant.id);
}
"#,
        ),
    )]);
    let node = world.start().await;
    let suspended = serde_json::json!({ "plan": "suspended" }).as_object().cloned();
    let refused = node.claim_with("acme", ClaimRequest { metadata: suspended, ..request() }).await;
    assert!(
        matches!(&refused, Err(Error::Rejected { code, .. }) if code == "tenant_suspended"),
        "{refused:?}"
    );
    let refused = node.claim("unwanted").await;
    assert!(matches!(&refused, Err(Error::Rejected { code, .. }) if code == "unwanted"), "{refused:?}");
    wait_for("the refused claim is undone", || !node.phases().contains(&"claimed")).await;
    let first = claimed(&node, "acme").await;
    assert_eq!(node.read(&first, "greeting").as_deref(), Some("hello acme"));
    let json = serde_json::to_value(&first).unwrap();
    let key = json["outputs"]["key"].as_str().unwrap().to_owned();
    assert!(key.len() >= 32, "{json}");
    assert!(!format!("{first:?}").contains(&key), "P11: Debug shows no secret");
    durable(&node, "acme").await;
    let second = serde_json::to_value(claimed(&node, "acme").await).unwrap();
    assert_eq!(second["outputs"]["key"], key.as_str(), "a stored secret stays");
    // The answer of an adopted claim is the same, secret outputs included.
    node.crash().await;
    let node = world.start().await;
    let adopted = serde_json::to_value(claimed(&node, "acme").await).unwrap();
    assert_eq!(adopted["source"], "existing");
    assert_eq!(adopted["outputs"], second["outputs"]);
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_hook_fails_the_claim_with_an_id_and_the_state_survives() {
    let world = World::new(&[(
        "worker",
        &with_hooks("fn on_claim(ctx) { if ctx.claim.epoch == 2 { throw \"boom\"; } }\n"),
    )]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    node.write(&first, "file", "content");
    durable(&node, "acme").await;
    let failed = node.claim("acme").await;
    let Err(Error::HookFailed { hook: "on_claim", id }) = failed else { panic!("{failed:?}") };
    assert!(!id.is_empty());
    let third = claimed(&node, "acme").await;
    assert_eq!(third.epoch.0, 3);
    assert_eq!(node.read(&third, "file").as_deref(), Some("content"));
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_saves_under_a_pause_without_a_store_call() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let claim = claimed(&node, "acme").await;
    node.write(&claim, "file", "one");
    let tenant = TenantId::new("acme").unwrap();
    // The store hangs: a pause that waited for it would never end.
    world.store.add(Rule::next(fault::Fault::Delay(Duration::from_millis(800))));
    let syncing = node.node.tenancy.sync(tenant.clone(), None);
    let paused_while_storing = async {
        let calls = world.store.all_calls();
        let began = std::time::Instant::now();
        while world.store.all_calls() == calls && began.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world.runtime.inspect(&claim.container.id).await.unwrap().unwrap().status
    };
    let (answer, status) = tokio::join!(syncing, paused_while_storing);
    let answer = answer.unwrap();
    assert_eq!(status, boilerhouse::runtime::ContainerStatus::Running, "not paused while the store is asked");
    assert_eq!(world.runtime.calls()["pause"], 1);
    // The node and its disk are gone; the checkpoint is not.
    node.crash().await;
    world.runtime.remove_outside(&claim.container.name);
    std::fs::remove_dir_all(world.dir.path().join("states")).unwrap();
    let node = world.start().await;
    let back = claimed(&node, "acme").await;
    assert_eq!(back.state.snapshot, Some(answer.snapshot));
    assert_eq!(node.read(&back, "file").as_deref(), Some("one"));
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_claims_are_released_and_signs_of_use_count() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let claim = claimed(&node, "acme").await;
    node.write(&claim, "file", "kept");
    node.node.tenancy.release_idle(60_000).await;
    assert_eq!(node.status("acme").await.claims.len(), 1, "used just now");
    tokio::time::sleep(Duration::from_millis(400)).await;
    node.node.tenancy.touch(TenantId::new("acme").unwrap(), None).await.unwrap();
    node.node.tenancy.release_idle(300).await;
    assert_eq!(node.status("acme").await.claims[0].state.as_str(), "active", "touched just now");
    tokio::time::sleep(Duration::from_millis(400)).await;
    node.write(&claim, "file", "changed");
    node.node.tenancy.release_idle(300).await;
    assert_eq!(node.status("acme").await.claims[0].state.as_str(), "active", "its state changed just now");
    tokio::time::sleep(Duration::from_millis(400)).await;
    node.node.tenancy.release_idle(300).await;
    let began = std::time::Instant::now();
    while !node.status("acme").await.claims.is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "the idle claim is not released");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let back = claimed(&node, "acme").await;
    assert_eq!(node.read(&back, "file").as_deref(), Some("changed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_dies_under_a_tenant_loses_no_state() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let claim = claimed(&node, "acme").await;
    node.write(&claim, "file", "last words");
    world.runtime.kill_outside(&boilerhouse::model::ContainerId(claim.container.id.clone()), 137, false);
    node.node.upkeep.reconcile().await;
    let began = std::time::Instant::now();
    while !node.status("acme").await.claims.is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "the lost claim does not end");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let back = claimed(&node, "acme").await;
    assert_ne!(back.slot, claim.slot);
    assert_eq!(node.read(&back, "file").as_deref(), Some("last words"));
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_epochs_claim_is_never_ended() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    durable(&node, "acme").await;
    let second = claimed(&node, "acme").await;
    let tenant = TenantId::new("acme").unwrap();
    let stale = boilerhouse::tenancy::ReleaseRequest { epoch: Some(first.epoch), ..Default::default() };
    let refused = node.node.tenancy.release(tenant.clone(), stale).await;
    assert!(matches!(refused, Err(Error::StaleEpoch { .. })), "{refused:?}");
    assert_eq!(claimed(&node, "acme").await.epoch, second.epoch);
    let accepted = boilerhouse::tenancy::ReleaseRequest { wait: ReleaseWait::Accepted, ..Default::default() };
    let answer = node.node.tenancy.release(tenant, accepted).await.unwrap();
    assert_eq!((answer.state, answer.epoch), (ReleaseState::Pending, Some(second.epoch)));
    assert_eq!(node.release("nobody").await.unwrap().state, ReleaseState::NotClaimed);
}

#[tokio::test(flavor = "multi_thread")]
async fn persist_on_release_false_throws_the_state_away() {
    let script = WORKER.replace("pool:", "persist: #{ on_release: false }, pool:");
    let world = World::new(&[("worker", &script)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    node.write(&first, "file", "scratch");
    assert_eq!(node.release("acme").await.unwrap().state, ReleaseState::Discarded);
    let second = claimed(&node, "acme").await;
    assert_eq!((node.read(&second, "file"), second.epoch), (None, first.epoch.next()));
    node.check_no_leaks(&world).await;
}

/// The layout `mirror` under a whole node: plain objects that a claim comes back from,
/// deletions with the save that has them, and only the newest to go back to.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirrored_tenant_is_claimed_released_and_claimed_again() {
    let script = WORKER.replace("pool:", "persist: #{ layout: \"mirror\" }, pool:");
    let world = World::new(&[("worker", &script)]);
    let node = world.start().await;
    let plain = async || {
        let listed = world.objects.list("t/", None, 1_000).await.unwrap();
        let names =
            listed.into_iter().filter_map(|it| it.key.split_once("/f/").map(|(_, name)| name.to_owned()));
        names.collect::<Vec<_>>()
    };
    let first = claimed(&node, "acme").await;
    node.write(&first, "my file.txt", "one");
    node.write(&first, "gone", "soon");
    durable(&node, "acme").await;
    assert_eq!(plain().await, ["gone", "my file.txt"]);
    let second = claimed(&node, "acme").await;
    assert_eq!(node.read(&second, "my file.txt").as_deref(), Some("one"));
    node.write(&second, "my file.txt", "two");
    std::fs::remove_file(world.dir.path().join(format!("states/slots/{}/state/gone", second.slot))).unwrap();
    durable(&node, "acme").await;
    assert_eq!(plain().await, ["my file.txt"]);
    // Back to the newest discards the node's copy: the next claim comes from the objects.
    let tenant = TenantId::new("acme").unwrap();
    let page = node.node.tenancy.snapshots(tenant.clone(), None, None, None).await.unwrap();
    let numbers: Vec<u64> = page.snapshots.iter().map(|snapshot| snapshot.number).collect();
    let back = |snapshot| boilerhouse::tenancy::RestoreRequest { workload: None, snapshot };
    let error = node.node.tenancy.restore(tenant.clone(), back(numbers[1])).await.unwrap_err();
    assert!(matches!(&error, Error::UnknownSnapshot { problem } if problem.contains("mirror")), "{error:?}");
    node.node.tenancy.restore(tenant, back(numbers[0])).await.unwrap();
    let third = claimed(&node, "acme").await;
    assert_eq!(third.state.source, StateSource::Store);
    assert_eq!(node.read(&third, "my file.txt").as_deref(), Some("two"));
    assert_eq!(node.read(&third, "gone"), None);
    durable(&node, "acme").await;
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_unknown_state_are_left_alone_or_set_aside() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    node.settle().await;
    node.crash().await;
    world.runtime.add_stranger("somebody-elses");
    let stray = world.dir.path().join("states/slots/unknown-1/state");
    std::fs::create_dir_all(&stray).unwrap();
    std::fs::write(stray.join("only-copy"), "keep me").unwrap();
    let node = world.start().await;
    assert!(world.runtime.all().iter().any(|container| container.name == "somebody-elses"));
    let aside = world.dir.path().join("states/set_aside");
    let kept: Vec<_> = std::fs::read_dir(&aside).unwrap().flatten().collect();
    assert_eq!(kept.len(), 1);
    let copy = kept[0].path().join("state/only-copy");
    assert_eq!(std::fs::read_to_string(copy).unwrap(), "keep me");
    node.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_slots_and_claims_survive_a_restart_untouched() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let claim = claimed(&node, "acme").await;
    node.write(&claim, "file", "content");
    node.settle().await;
    let mut before = world.containers();
    node.crash().await;
    let node = world.start().await;
    node.settle().await;
    let mut after = world.containers();
    before.sort_unstable();
    after.sort_unstable();
    assert_eq!(before, after, "nothing was made or removed");
    let again = claimed(&node, "acme").await;
    assert_eq!((again.source, again.slot.clone()), (ClaimSource::Existing, claim.slot.clone()));
    durable(&node, "acme").await;
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_power_loss_clean_trees_come_from_the_store_again() {
    let mut world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    node.write(&first, "file", "content");
    durable(&node, "acme").await;
    node.crash().await;
    // The cached tree was torn: its blocks never reached the disk.
    let cache = world.dir.path().join("states/cache");
    let tree =
        std::fs::read_dir(&cache).unwrap().flatten().next().expect("a cached tree").path().join("tree");
    std::fs::write(tree.join("file"), "").unwrap();
    world.boot_id = "boot-2".to_owned();
    let node = world.start().await;
    let back = claimed(&node, "acme").await;
    assert_eq!(back.state.source, StateSource::Store);
    assert_eq!(node.read(&back, "file").as_deref(), Some("content"));
}

#[tokio::test(flavor = "multi_thread")]
async fn p8_an_unknown_outcome_is_looked_up_before_anything_is_decided() {
    for operation in [
        Operation::Create,
        Operation::Start,
        Operation::Inspect,
        Operation::Stop,
        Operation::Remove,
        Operation::Pause,
        Operation::Unpause,
    ] {
        for fault in [Fault::LoseAnswer, Fault::LoseCall] {
            let world = World::new(&[("worker", WORKER)]);
            world.runtime.fail_next(operation, fault.clone());
            let node = world.start().await;
            let claim = claimed(&node, "acme").await;
            node.write(&claim, "file", "content");
            // A pause that is not known to have happened fails the sync and is undone.
            let _ = node.node.tenancy.sync(TenantId::new("acme").unwrap(), None).await;
            durable(&node, "acme").await;
            let back = claimed(&node, "acme").await;
            assert_eq!(node.read(&back, "file").as_deref(), Some("content"), "{operation:?} {fault:?}");
            node.check_no_leaks(&world).await;
            node.stop().await;
        }
    }
}

/// A release that waits for a claim which then does not come up finds nothing to release,
/// and says so: nothing was discarded.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_of_a_claim_that_never_came_up_says_that_nothing_was_claimed() {
    for persist in ["", "persist: #{ on_release: false }, "] {
        let script = WORKER.replace("pool:", &format!("{persist}pool:"));
        let world = World::new(&[("worker", &script)]);
        let node = world.start().await;
        node.settle().await;
        let slow = Rule::next(fault::Fault::Delay(Duration::from_millis(500)));
        world.store.add(slow.of(fault::Operation::Create));
        let release = async {
            wait_for("the claim has begun", || {
                let status = futures_util::FutureExt::now_or_never(node.status("acme"));
                status.is_some_and(|status| !status.claims.is_empty())
            })
            .await;
            // Its `open` is made, and cannot be read back.
            world.store.set_down(true);
            node.release("acme").await
        };
        let (claim, release) = tokio::join!(node.claim("acme"), release);
        let error = claim.unwrap_err();
        assert_eq!(error.code(), "store_unavailable", "{error:?}");
        let answer = release.unwrap();
        assert_eq!(answer.state, ReleaseState::NotClaimed, "{answer:?}");
        assert_eq!(answer.epoch, None);
        world.store.set_down(false);
        claimed(&node, "acme").await;
        let expected = if persist.is_empty() { ReleaseState::Durable } else { ReleaseState::Discarded };
        assert_eq!(node.release("acme").await.unwrap().state, expected);
    }
}

/// Every named crash point: the node is killed there, in the middle of a tenant's
/// day, and the next node finishes or undoes what it finds.
#[tokio::test(flavor = "multi_thread")]
async fn p7_a_crash_at_any_point_is_repaired_at_the_next_start() {
    let points = [
        "refill.prepared",
        "refill.created",
        "refill.started",
        "refill.healthy",
        "claim.taken",
        "claim.claiming",
        "claim.opening",
        "claim.opened",
        "claim.filled",
        "claim.secrets",
        "claim.on_claim",
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
        "owner.journaled",
        "owner.taken",
        "adopt.looked",
        "adopt.trees",
        "adopt.strays",
        "adopt.done",
    ];
    for (number, point) in points.into_iter().enumerate() {
        for nth in [1, 2] {
            crash_once(point, nth)
                .await
                .unwrap_or_else(|why| panic!("{point} ({number}), passage {nth}: {why}"));
        }
    }
}

/// Makes the world in which a day meets `point`: the end of a claim is written for itself
/// where it saves nothing.
fn world_with(point: &str) -> World {
    if !point.starts_with("close.") {
        return World::new(&[("worker", WORKER)]);
    }
    let discarding = WORKER.replace("pool:", "persist: #{ on_release: false }, pool:");
    let world = World::new(&[("worker", &discarding)]);
    World { store_mode: Mode::Shared, ..world }
}

async fn crash_once(point: &str, nth: u32) -> Result<(), String> {
    let world = world_with(point);
    // What the tenant was last told is durable, and what it wrote last.
    let (mut acknowledged, mut written) = (0, 0);
    let node = world.launch();
    node.crash.arm(point, nth, CrashAction::Halt);
    let day = async {
        wait_for("the node serves", || node.node.tenancy.readiness().status != "starting").await;
        for step in 1..=3 {
            let Ok(claim) = node.claim("acme").await else { return };
            written = step;
            node.write(&claim, "step", &step.to_string());
            if node.node.tenancy.sync(TenantId::new("acme").unwrap(), None).await.is_ok() {
                acknowledged = step;
            }
            if node.release("acme").await.is_ok_and(|answer| answer.state == ReleaseState::Durable) {
                acknowledged = step;
            }
        }
    };
    let crashed = tokio::select! {
        () = node.crash.crashed() => true,
        () = day => false,
    };
    let reached = node.crash.hits().get(point).copied().unwrap_or(0) >= nth;
    if !crashed && !reached && nth == 1 {
        return Err("the point was never reached".to_owned());
    }
    node.crash().await;
    // A paused container must not stay so, whatever was under way.
    let node = world.start().await;
    let claim = node.claim("acme").await.map_err(|error| format!("claim after the restart: {error:?}"))?;
    let found: u32 = node.read(&claim, "step").map_or(0, |text| text.parse().unwrap_or(0));
    if found < acknowledged || found > written {
        return Err(format!("step {acknowledged} was durable, {written} was written, {found} is there"));
    }
    let inspected = world.runtime.inspect(&claim.container.id).await.map_err(|error| error.to_string())?;
    if inspected.is_none_or(|container| container.status != boilerhouse::runtime::ContainerStatus::Running) {
        return Err("the claimed container does not run".to_owned());
    }
    let released = node.release("acme").await.map_err(|error| format!("release: {error:?}"))?;
    let expected = if point.starts_with("close.") { ReleaseState::Discarded } else { ReleaseState::Durable };
    assert_eq!(released.state, expected, "{released:?}");
    node.check_no_leaks(&world).await;
    // And nothing of it depends on this node's disk.
    node.stop().await;
    std::fs::remove_dir_all(world.dir.path().join("states")).map_err(|error| error.to_string())?;
    let node = world.start().await;
    let claim = node.claim("acme").await.map_err(|error| format!("claim from the store: {error:?}"))?;
    let stored: u32 = node.read(&claim, "step").map_or(0, |text| text.parse().unwrap_or(0));
    if stored != found {
        return Err(format!("the store has step {stored}, the node had {found}"));
    }
    assert_eq!(INSTANCE, "test");
    Ok(())
}

/// A node whose engine never answered has nothing under way, so nothing holds its end up.
#[tokio::test]
async fn a_node_that_waits_for_its_engine_stops_when_told() {
    let world = World::new(&[("worker", WORKER)]);
    world.runtime.set_down(true);
    let node = world.launch();
    let looked = || {
        let readiness = node.node.tenancy.readiness();
        readiness.status == "starting" && readiness.reasons.iter().any(|reason| reason.starts_with("engine:"))
    };
    wait_for("the engine's failure is noticed", looked).await;
    tokio::time::timeout(Duration::from_secs(20), node.stop()).await.expect("the node stops");
}

/// What somebody removed from the cache is taken from the store again. What only the
/// cache had is not: it stays unsaved, loudly.
#[tokio::test]
async fn a_cached_tree_that_somebody_removed_comes_from_the_store() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let claim = node.claim("acme").await.unwrap();
    node.write(&claim, "notes", "kept");
    durable(&node, "acme").await;
    let remove_cache = || {
        for tree in std::fs::read_dir(world.dir.path().join("states/cache")).unwrap() {
            std::fs::remove_dir_all(tree.unwrap().path()).unwrap();
        }
    };
    remove_cache();
    let error = node.claim("acme").await.unwrap_err();
    assert_eq!(error.code(), "internal", "{error:?}");
    let claim = node.claim("acme").await.unwrap();
    assert_eq!(node.read(&claim, "notes").as_deref(), Some("kept"));
    assert_eq!(claim.state.source, StateSource::Store);

    node.write(&claim, "notes", "newer");
    world.store.set_down(true);
    assert_eq!(node.release("acme").await.unwrap().state, ReleaseState::Pending);
    remove_cache();
    world.store.set_down(false);
    let error = node.claim("acme").await.unwrap_err();
    assert_eq!(error.code(), "internal", "an older state is not passed off as the last: {error:?}");
    node.claim("acme").await.unwrap_err();
}

/// A tenant whose files outgrow `state_max_mb` is told so, keeps them, and can go on.
#[tokio::test]
async fn state_over_its_limit_is_kept_until_it_shrinks() {
    let small = WORKER.replace("image: \"app:1\",", "image: \"app:1\", resources: #{ state_max_mb: 1 },");
    assert_ne!(small, WORKER);
    let world = World::new(&[("worker", &small)]);
    let node = world.start().await;
    let claim = node.claim("acme").await.unwrap();
    node.write(&claim, "big", &"x".repeat(2 << 20));
    let error = node.node.tenancy.sync(TenantId::new("acme").unwrap(), None).await.unwrap_err();
    assert_eq!(error.code(), "state_over_limit", "{error:?}");
    let answer = node.release("acme").await.unwrap();
    assert_eq!(answer.state, ReleaseState::Pending);
    assert!(answer.reason.as_deref().is_some_and(|reason| reason.contains("1048576")), "{answer:?}");
    let claim = node.claim("acme").await.unwrap();
    assert_eq!(node.read(&claim, "big").map(|text| text.len()), Some(2 << 20));
    node.write(&claim, "big", "small");
    durable(&node, "acme").await;
}

/// A checkpoint has the container paused when the release comes: the hook still runs in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_during_a_sync_runs_its_hook() {
    let script = with_hooks("fn before_release(ctx) { ctx.exec([\"farewell\"]); }");
    let world = World::new(&[("worker", &script)]);
    let heard = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let tell = Arc::clone(&heard);
    world.runtime.on_exec(move |_, _| {
        tell.store(true, std::sync::atomic::Ordering::SeqCst);
        FakeExec::status(0)
    });
    let node = world.start().await;
    let claim = claimed(&node, "acme").await;
    world.runtime.set_latency(Operation::Unpause, Duration::from_millis(300));
    let syncing = node.node.tenancy.sync(TenantId::new("acme").unwrap(), None);
    let releasing = async {
        let paused = || {
            let all = world.runtime.all();
            let found = all.iter().find(|container| container.id.0 == claim.container.id);
            found.is_some_and(|found| found.status == boilerhouse::runtime::ContainerStatus::Paused)
        };
        wait_for("the checkpoint pauses", paused).await;
        durable(&node, "acme").await;
    };
    let _ = tokio::join!(syncing, releasing);
    assert!(heard.load(std::sync::atomic::Ordering::SeqCst), "the hook's command did not run");
}

/// The save of a release must go on when a claim that would have taken its tree is refused.
#[tokio::test(flavor = "multi_thread")]
async fn p2_a_claim_that_cannot_be_journaled_leaves_the_pending_save_going() {
    let world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    node.write(&first, "file", "precious");
    world.store.set_down(true);
    assert_eq!(node.release("acme").await.unwrap().state, ReleaseState::Pending);
    // Deeper than the journal takes.
    let mut deep = serde_json::json!(1);
    for _ in 0..119 {
        deep = serde_json::json!([deep]);
    }
    let metadata = serde_json::json!({ "deep": deep }).as_object().cloned();
    let refused = node.claim_with("acme", ClaimRequest { metadata, ..request() }).await;
    assert!(matches!(refused, Err(Error::Internal { .. })), "{refused:?}");
    world.store.set_down(false);
    wait_until_saved(&node, "acme").await;
    node.check_no_leaks(&world).await;
}

async fn wait_until_saved(node: &TestNode, tenant: &str) {
    let began = std::time::Instant::now();
    while !node.status(tenant).await.claims.is_empty() {
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", node.status(tenant).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_crash_while_adopting_after_a_power_loss_does_not_forget_the_power_loss() {
    let mut world = World::new(&[("worker", WORKER)]);
    let node = world.start().await;
    let first = claimed(&node, "acme").await;
    node.write(&first, "file", "content");
    durable(&node, "acme").await;
    node.crash().await;
    let cache = world.dir.path().join("states/cache");
    let tree = std::fs::read_dir(&cache).unwrap().flatten().next().expect("a cached tree").path();
    std::fs::write(tree.join("tree/file"), "").unwrap();
    world.boot_id = "boot-2".to_owned();
    let node = world.launch();
    node.crash.arm("adopt.trees", 1, CrashAction::Halt);
    node.crash.crashed().await;
    node.crash().await;
    let node = world.start().await;
    let back = claimed(&node, "acme").await;
    assert_eq!(node.read(&back, "file").as_deref(), Some("content"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_claim_takes_a_slot_that_another_pool_has_only_later() {
    let small = WORKER.replace("min_idle: 2", "min_idle: 1");
    let other = small.replace("\"worker\"", "\"other\"").replace(
        "pool:",
        "health_check: #{ command: [\"check\"], interval_ms: 100, timeout_ms: 500, retries: 3 }, pool:",
    );
    let mut world = World::new(&[("worker", &small), ("other", &other)]);
    world.max_containers = 2;
    let world = world;
    let sick = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let says = Arc::clone(&sick);
    world
        .runtime
        .on_exec(move |_, _| FakeExec::status(i64::from(says.load(std::sync::atomic::Ordering::SeqCst))));
    let node = Arc::new(world.start().await);
    let pool = |workload: &str| {
        let pools = node.node.tenancy.pools();
        pools.into_iter().find(|pool| pool.workload == workload).expect("a pool")
    };
    wait_for("one slot is ready and one warming", || pool("worker").ready == 1 && pool("other").warming == 1)
        .await;
    let claim = |tenant: &'static str| {
        let node = Arc::clone(&node);
        let workload = Some("worker".parse().unwrap());
        tokio::spawn(async move { node.claim_with(tenant, ClaimRequest { workload, ..request() }).await })
    };
    claim("first").await.unwrap().unwrap();
    let second = claim("second");
    wait_for("the second claim waits", || pool("worker").waiting == 1).await;
    sick.store(false, std::sync::atomic::Ordering::SeqCst);
    second.await.unwrap().unwrap();
    assert!(world.runtime.peak() <= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_claim_that_panics_after_its_client_left_is_taken_up_by_upkeep() {
    let script = WORKER.replace("pool:", "activation: #{ exec: [\"boom\"] }, pool:");
    let world = World::new(&[("worker", &script)]);
    let node = world.start().await;
    node.settle().await;
    world.runtime.on_exec(|_, _| panic!("on purpose"));
    let gone = tokio::time::timeout(Duration::ZERO, node.claim("acme")).await;
    assert!(gone.is_err(), "the client left before the answer: {gone:?}");
    wait_for("the claim has panicked", || {
        node.phases().contains(&"claimed") && !node.node.tasks.live().contains(&"claim")
    })
    .await;
    world.runtime.on_exec(|_, _| FakeExec::status(0));
    node.node.upkeep.reconcile().await;
    wait_until_saved(&node, "acme").await;
    node.settle().await;
    let phases = node.phases();
    assert!(phases.iter().all(|phase| *phase == "ready"), "{phases:?}");
    node.check_no_leaks(&world).await;
}

/// A release that was accepted stays so, whatever a checkpoint or a sign of use writes beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_sync_or_touch_beside_a_release_does_not_make_the_claim_active_again() {
    let world = World::new(&[("worker", WORKER)]);
    let node = Arc::new(world.start().await);
    let tenant = TenantId::new("acme").unwrap();
    for round in 0..120 {
        claimed(&node, "acme").await;
        let beside = {
            let (node, tenant) = (Arc::clone(&node), tenant.clone());
            tokio::spawn(async move {
                let _ = node.node.tenancy.sync(tenant, None).await;
            })
        };
        // The release meets the checkpoint at another step each time.
        tokio::time::sleep(Duration::from_micros(round % 40 * 100)).await;
        let accepted =
            boilerhouse::tenancy::ReleaseRequest { wait: ReleaseWait::Accepted, ..Default::default() };
        node.node.tenancy.release(tenant.clone(), accepted).await.unwrap();
        let began = std::time::Instant::now();
        loop {
            let claims = node.status("acme").await.claims;
            let Some(claim) = claims.first() else { break };
            assert_ne!(claim.state.as_str(), "active", "round {round}: {claim:?}");
            assert!(began.elapsed() < Duration::from_secs(20), "round {round}: {claim:?}");
            tokio::task::yield_now().await;
        }
        beside.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adopted_containers_count_before_any_pool_refills() {
    // Many pools that have nothing and want something are opened before the one that has all.
    let others: Vec<_> = (0..30).map(|n| format!("other-{n}")).collect();
    let scripts: Vec<_> =
        others.iter().map(|id| WORKER.replace("\"worker\"", &format!("\"{id}\""))).collect();
    let mut workloads: Vec<_> =
        others.iter().map(String::as_str).zip(scripts.iter().map(String::as_str)).collect();
    workloads.push(("worker", WORKER));
    let mut world = World::new(&workloads);
    world.max_containers = 4;
    let world = world;
    let mut node = world.start().await;
    for tenant in ["a", "b", "c", "d"] {
        let workload = Some("worker".parse().unwrap());
        node.claim_with(tenant, ClaimRequest { workload, ..request() }).await.unwrap();
    }
    for _ in 0..20 {
        node.crash().await;
        node = world.start().await;
        wait_for("the pools have planned", || node.node.tenancy.pools().iter().all(|pool| pool.target == 2))
            .await;
    }
    assert!(world.runtime.peak() <= 4, "{} containers at once", world.runtime.peak());
}
