//! Rollback, fork and erasure on a whole node: across crashes, owners and keys.

use boilerhouse::{
    lifecycle::CrashAction,
    model::{Epoch, StateSource, TenantId},
    state::fence::Mode,
    tenancy::{ErasedAnswer, Error, ForkRequest, RestoreRequest, RestoredAnswer},
};

use crate::{
    WORKER, claimed, durable,
    support::{
        node::{TestNode, World, wait_for},
        rivals::take_over,
    },
};

const WORKLOADS: &[(&str, &str)] = &[("worker", WORKER)];

fn tenant(id: &str) -> TenantId {
    TenantId::new(id).expect("an id")
}

async fn restore(node: &TestNode, snapshot: u64) -> Result<RestoredAnswer, Error> {
    node.node.tenancy.restore(tenant("acme"), RestoreRequest { workload: None, snapshot }).await
}

async fn fork(node: &TestNode, to: &str) -> Result<RestoredAnswer, Error> {
    let request = ForkRequest { from: tenant("acme"), workload: None, snapshot: None };
    node.node.tenancy.fork(tenant(to), request).await
}

async fn erase(node: &TestNode) -> Result<ErasedAnswer, Error> {
    node.node.tenancy.erase(tenant("acme")).await
}

/// Saves `1`, `2`, … as the tenant's notes; answers the snapshots' numbers.
async fn saved(node: &TestNode, of: &str, times: u32) -> Vec<u64> {
    let mut numbers = Vec::new();
    for step in 1..=times {
        let claim = claimed(node, of).await;
        node.write(&claim, "notes", &step.to_string());
        numbers.push(node.release(of).await.unwrap().snapshot.expect("it is durable"));
    }
    numbers
}

async fn notes(node: &TestNode, of: &str) -> Option<String> {
    let claim = claimed(node, of).await;
    let found = node.read(&claim, "notes");
    durable(node, of).await;
    found
}

/// Names of what the store has of tenants; the owner's records are no tenant's.
fn objects(world: &World) -> Vec<String> {
    let objects = world.objects.objects().into_keys();
    objects.filter(|name| name.starts_with("t/") || name.starts_with("k/")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_crash_in_a_rollback_leaves_the_old_state_or_the_new() {
    for (point, found) in [("restore.discarded", "3"), ("restore.committed", "1")] {
        let world = World::new(WORKLOADS);
        let node = world.start().await;
        let numbers = saved(&node, "acme", 3).await;
        node.crash.arm(point, 1, CrashAction::Halt);
        tokio::select! {
            biased;
            () = node.crash.crashed() => {}
            answer = restore(&node, numbers[0]) => panic!("{point}: {answer:?}"),
        }
        node.crash().await;
        let node = world.start().await;
        assert_eq!(notes(&node, "acme").await.as_deref(), Some(found), "{point}");
        restore(&node, numbers[1]).await.unwrap();
        assert_eq!(notes(&node, "acme").await.as_deref(), Some("2"), "{point}");
        node.check_no_leaks(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_fork_that_was_committed_is_there_after_a_crash() {
    let world = World::new(WORKLOADS);
    let node = world.start().await;
    saved(&node, "acme", 2).await;
    node.crash.arm("fork.committed", 1, CrashAction::Halt);
    tokio::select! {
        biased;
        () = node.crash.crashed() => {}
        answer = fork(&node, "twin") => panic!("{answer:?}"),
    }
    node.crash().await;
    let node = world.start().await;
    assert_eq!(fork(&node, "twin").await.unwrap_err().code(), "state_exists");
    assert_eq!(notes(&node, "twin").await.as_deref(), Some("2"));
    assert_eq!(notes(&node, "acme").await.as_deref(), Some("2"), "the source is what it was");
    node.check_no_leaks(&world).await;
}

/// Once an erasure has begun it ends, and no claim comes between.
#[tokio::test(flavor = "multi_thread")]
async fn p7_an_erasure_goes_on_after_a_crash_at_any_point_of_it() {
    for point in ["erase.begun", "erase.local", "erase.store"] {
        let world = World::new(WORKLOADS);
        let node = world.start().await;
        saved(&node, "acme", 2).await;
        let metadata = serde_json::json!({ "plan": "pro" }).as_object().cloned().unwrap();
        node.node.tenancy.put_tenant(tenant("acme"), metadata).await.unwrap();
        node.crash.arm(point, 1, CrashAction::Halt);
        tokio::select! {
            biased;
            () = node.crash.crashed() => {}
            answer = erase(&node) => panic!("{point}: {answer:?}"),
        }
        node.crash().await;
        world.store.set_down(true);
        let node = world.start().await;
        assert_eq!(node.claim("acme").await.unwrap_err().code(), "being_erased", "{point}");
        assert_eq!(fork(&node, "twin").await.unwrap_err().code(), "being_erased", "{point}");
        world.store.set_down(false);
        let began = std::time::Instant::now();
        while node.claim("acme").await.is_err_and(|error| error.code() == "being_erased") {
            assert!(began.elapsed().as_secs() < 30, "{point}: the erasure does not end");
            node.node.tenancy.finish_erasures().await;
        }
        let claim = claimed(&node, "acme").await;
        assert_eq!((claim.state.source, claim.epoch), (StateSource::None, Epoch(1)), "{point}");
        assert_eq!(node.read(&claim, "notes"), None, "{point}");
        durable(&node, "acme").await;
        let erased = erase(&node).await.unwrap();
        assert_eq!(erased.workloads.len(), 1, "{point}: {erased:?}");
        assert_eq!(objects(&world), Vec::<String>::new(), "{point}");
        node.check_no_leaks(&world).await;
    }
}

/// What is sealed stays sealed: rolled back, forked to another tenant's key, and erased.
#[tokio::test(flavor = "multi_thread")]
async fn p11_sealed_state_is_rolled_back_and_forked_under_the_keys_of_its_tenants() {
    let mut world = World::new(WORKLOADS);
    world.sealed = true;
    let node = world.start().await;
    let claim = claimed(&node, "acme").await;
    node.write(&claim, "secret", "as plain as can be, as plain as can be");
    durable(&node, "acme").await;
    let numbers = saved(&node, "acme", 2).await;
    restore(&node, numbers[0]).await.unwrap();
    assert_eq!(notes(&node, "acme").await.as_deref(), Some("1"));
    let forked = fork(&node, "twin").await.unwrap();
    assert_eq!(forked.from, Some(tenant("acme")));
    let plain = b"as plain as can be".as_slice();
    for (name, body) in world.objects.objects() {
        assert!(!body.windows(plain.len()).any(|part| part == plain), "{name} is not sealed");
    }
    // Of its own key alone: the source is gone.
    erase(&node).await.unwrap();
    node.stop().await;
    std::fs::remove_dir_all(world.dir.path().join("states")).unwrap();
    let node = world.start().await;
    let claim = claimed(&node, "twin").await;
    assert_eq!(claim.state.source, StateSource::Store);
    assert_eq!(node.read(&claim, "notes").as_deref(), Some("1"));
    assert_eq!(node.read(&claim, "secret").as_deref(), Some("as plain as can be, as plain as can be"));
}

/// The claim that a former owner left open holds nothing up, before and without a claim of
/// the new one; and the former owner itself changes nothing any more (P1).
#[tokio::test(flavor = "multi_thread")]
async fn a_former_owners_claim_keeps_nobody_from_the_history() {
    for mode in [Mode::Exclusive, Mode::Shared] {
        let mut first = World::new(WORKLOADS);
        first.store_mode = mode;
        let second = first.beside("second", WORKLOADS);
        let a = first.start().await;
        let numbers = saved(&a, "acme", 2).await;
        claimed(&a, "acme").await;
        saved(&a, "other", 1).await;
        // Cut off, and its operator says that it runs no more.
        first.store.set_down(true);
        let b = second.launch();
        if mode == Mode::Shared {
            wait_for("the second server serves", || b.node.tenancy.readiness().status == "ready").await;
            let error = restore(&b, numbers[0]).await.unwrap_err();
            assert!(
                matches!(&error, Error::ClaimedElsewhere { server, .. } if server == "test"),
                "{error:?}"
            );
            let error = erase(&b).await.unwrap_err();
            assert!(
                matches!(&error, Error::ClaimedElsewhere { server, .. } if server == "test"),
                "{error:?}"
            );
            assert_eq!(b.claim("acme").await.unwrap_err().code(), "claimed_elsewhere", "it is not begun");
        }
        take_over(&second).await;
        wait_for("the second server holds the store", || b.node.tenancy.readiness().status == "ready").await;
        let restored = restore(&b, numbers[0]).await.unwrap();
        assert_eq!(restored.restored_from, numbers[0], "{mode:?}");
        assert_eq!(notes(&b, "acme").await.as_deref(), Some("1"), "{mode:?}");
        erase(&b).await.unwrap();
        assert!(!objects(&second).is_empty(), "the other tenant's state stays");

        if mode == Mode::Exclusive {
            first.store.set_down(false);
            let before = second.objects.objects();
            wait_for("the first server knows", || {
                let reasons = a.node.tenancy.readiness().reasons.join("\n");
                reasons.contains("\"second\"") || reasons.contains("took the store")
            })
            .await;
            let request = RestoreRequest { workload: None, snapshot: 1 };
            let refused = a.node.tenancy.restore(tenant("other"), request).await.unwrap_err();
            assert_eq!(refused.code(), "store_owned_elsewhere", "{refused:?}");
            let request = ForkRequest { from: tenant("other"), workload: None, snapshot: None };
            let refused = a.node.tenancy.fork(tenant("twin"), request).await.unwrap_err();
            assert_eq!(refused.code(), "store_owned_elsewhere", "{refused:?}");
            let refused = a.node.tenancy.erase(tenant("other")).await.unwrap_err();
            assert_eq!(refused.code(), "store_owned_elsewhere", "{refused:?}");
            let refused = a.node.tenancy.collect(Default::default()).await.unwrap_err();
            assert_eq!(refused.code(), "store_owned_elsewhere", "{refused:?}");
            assert_eq!(second.objects.objects(), before, "nothing was changed");
        }
    }
}
