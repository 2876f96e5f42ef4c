//! Two servers on one store: P1 and P2 across them.

use boilerhouse::{
    clock::{Clock as _, SystemClock},
    lifecycle::CrashAction,
    model::{ClaimState, StateSource},
    state::fence::{
        Mode,
        owner::{self, Tenure},
    },
    store::fault::{Fault, Operation, Rule},
    tenancy::{Error, ReleaseState},
};

use crate::{
    WORKER, claimed, durable,
    support::node::{TestNode, World, wait_for},
};

const WORKLOADS: &[(&str, &str)] = &[("worker", WORKER)];

/// Claims until the server may.
async fn claim_when_held(node: &TestNode) -> boilerhouse::tenancy::ClaimAnswer {
    let began = std::time::Instant::now();
    loop {
        match node.claim("acme").await {
            Ok(claim) => return claim,
            Err(Error::StoreOwnedElsewhere { .. } | Error::Busy { .. } | Error::StoreUnavailable { .. })
                if began.elapsed().as_secs() < 30 =>
            {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            Err(error) => panic!("claim: {error:?}"),
        }
    }
}

/// What `boilerhouse state takeover --yes` does on the store.
async fn take_over(world: &World, server: &str) {
    let objects = world.objects.as_ref();
    let records = owner::read(objects).await.unwrap();
    let owners = match owner::tenure(&records) {
        Tenure::Free => Vec::new(),
        Tenure::Exclusive(owner) => vec![owner],
        Tenure::Shared(all) => all.into_values().collect(),
    };
    let others: Vec<_> = owners.into_iter().filter(|owner| owner.server != server).collect();
    let now_ms = SystemClock.unix_ms();
    owner::take_over(objects, &others, server, world.store_mode, "operator", now_ms).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_a_second_server_is_refused_until_the_first_hands_over() {
    let first = World::new(WORKLOADS);
    let second = first.beside("second", WORKLOADS);
    let a = first.start().await;
    let claim = claimed(&a, "acme").await;
    a.write(&claim, "notes", "kept");
    let b = second.start().await;
    let error = b.claim("acme").await.unwrap_err();
    assert_eq!(error.code(), "store_owned_elsewhere", "{error:?}");
    let reasons = b.node.tenancy.readiness().reasons.join("\n");
    assert!(reasons.contains("\"test\"") && reasons.contains("state takeover"), "{reasons}");
    durable(&a, "acme").await;
    a.stop().await;
    let claim = claim_when_held(&b).await;
    assert_eq!(b.read(&claim, "notes").as_deref(), Some("kept"));
    assert_eq!(claim.state.source, StateSource::Store);
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_a_server_that_stops_with_a_claim_keeps_the_store() {
    let first = World::new(WORKLOADS);
    let second = first.beside("second", WORKLOADS);
    let a = first.start().await;
    claimed(&a, "acme").await;
    a.stop().await;
    let b = second.start().await;
    let error = b.claim("acme").await.unwrap_err();
    assert_eq!(error.code(), "store_owned_elsewhere", "its container still runs: {error:?}");
    let a = first.start().await;
    durable(&a, "acme").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_one_of_several_servers_has_a_claim_and_the_others_name_it() {
    let mut first = World::new(WORKLOADS);
    first.store_mode = Mode::Shared;
    let second = first.beside("second", WORKLOADS);
    let (a, b) = (first.start().await, second.start().await);
    for step in 1..=3 {
        let claim = claimed(&a, "acme").await;
        a.write(&claim, "step", &format!("a{step}"));
        let error = b.claim("acme").await.unwrap_err();
        assert!(matches!(&error, Error::ClaimedElsewhere { server, .. } if server == "test"), "{error:?}");
        durable(&a, "acme").await;
        let claim = claimed(&b, "acme").await;
        assert_eq!(b.read(&claim, "step"), Some(format!("a{step}")), "not from an older cache");
        b.write(&claim, "step", &format!("b{step}"));
        assert_eq!(a.claim("acme").await.unwrap_err().code(), "claimed_elsewhere");
        durable(&b, "acme").await;
        let claim = claimed(&a, "acme").await;
        assert_eq!(a.read(&claim, "step"), Some(format!("b{step}")));
        durable(&a, "acme").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_a_claim_that_fails_or_is_thrown_away_frees_the_tenant_for_other_servers() {
    let refusing = format!("{WORKER}fn on_claim(ctx) {{ ctx.reject(\"no\", \"not now\") }}");
    let mut first = World::new(&[("worker", &refusing)]);
    first.store_mode = Mode::Shared;
    let second = first.beside("second", WORKLOADS);
    let (a, b) = (first.start().await, second.start().await);
    assert!(a.claim("acme").await.is_err());
    wait_for("the end of the claim is written", || {
        futures_util::FutureExt::now_or_never(a.status("acme")).is_some_and(|status| status.claims.is_empty())
    })
    .await;
    claimed(&b, "acme").await;

    let discarding = WORKER.replace("pool:", "persist: #{ on_release: false }, pool:");
    let mut third = first.beside("third", &[("worker", &discarding)]);
    third.store_mode = Mode::Shared;
    let c = third.start().await;
    let request = || boilerhouse::model::TenantId::new("other").unwrap();
    c.node.tenancy.claim(request(), Default::default()).await.unwrap();
    c.crash.arm("close.journaled", 1, CrashAction::Halt);
    tokio::select! {
        () = c.crash.crashed() => {}
        answer = c.node.tenancy.release(request(), Default::default()) => panic!("{answer:?}"),
    }
    c.crash().await;
    assert_eq!(b.claim("other").await.unwrap_err().code(), "claimed_elsewhere");
    let c = third.start().await;
    wait_for("the next start writes the end", || {
        futures_util::FutureExt::now_or_never(c.status("other"))
            .is_some_and(|status| status.claims.is_empty())
    })
    .await;
    claimed(&b, "other").await;
}

/// The partition: the first server cannot reach the store, an operator gives it to the
/// second, and then the first comes back with what it has.
#[tokio::test(flavor = "multi_thread")]
async fn p2_a_server_that_was_cut_off_publishes_nothing_and_keeps_its_tree() {
    for mode in [Mode::Exclusive, Mode::Shared] {
        let mut first = World::new(WORKLOADS);
        first.store_mode = mode;
        let second = first.beside("second", WORKLOADS);
        let a = first.start().await;
        let claim = claimed(&a, "acme").await;
        a.write(&claim, "notes", "one");
        durable(&a, "acme").await;
        let claim = claimed(&a, "acme").await;
        a.write(&claim, "notes", "cut off");
        first.store.set_down(true);
        assert_eq!(a.release("acme").await.unwrap().state, ReleaseState::Pending, "{mode:?}");

        take_over(&second, "second").await;
        let b = second.start().await;
        let claim = claim_when_held(&b).await;
        assert_eq!(b.read(&claim, "notes").as_deref(), Some("one"), "{mode:?}");
        b.write(&claim, "notes", "two");
        first.store.clear();
        first.store.set_down(false);
        wait_for("the first server knows", || {
            let reasons = a.node.tenancy.readiness().reasons.join("\n");
            let status = futures_util::FutureExt::now_or_never(a.status("acme")).expect("it never waits");
            reasons.contains("store owner")
                || status.claims.iter().any(|claim| claim.state == ClaimState::Conflict)
        })
        .await;
        assert!(a.claim("acme").await.is_err(), "{mode:?}");
        durable(&b, "acme").await;
        let claim = claim_when_held(&b).await;
        assert_eq!(
            b.read(&claim, "notes").as_deref(),
            Some("two"),
            "{mode:?}: nothing of the first came between"
        );
        let cache = first.dir.path().join("states/cache");
        assert_eq!(std::fs::read_dir(cache).unwrap().count(), 1, "{mode:?}: the tree is kept");
    }
}

/// A server that learns of the takeover before it tries to save tries nothing, and finds out
/// by looking that it was overtaken.
#[tokio::test(flavor = "multi_thread")]
async fn p2_what_a_server_without_its_store_has_not_saved_becomes_a_conflict() {
    let first = World::new(WORKLOADS);
    let second = first.beside("second", WORKLOADS);
    let a = first.start().await;
    let claim = claimed(&a, "acme").await;
    a.write(&claim, "notes", "cut off");
    first.store.set_down(true);
    assert_eq!(a.release("acme").await.unwrap().state, ReleaseState::Pending);
    a.crash().await;
    first.store.set_down(false);
    take_over(&second, "second").await;
    let b = second.start().await;
    claim_when_held(&b).await;
    let before = first.objects.objects();
    let creates = first.store.calls(Operation::Create);
    let a = first.start().await;
    wait_for("the save is a conflict", || {
        let status = futures_util::FutureExt::now_or_never(a.status("acme")).expect("it never waits");
        status.claims.iter().any(|claim| claim.state == ClaimState::Conflict)
    })
    .await;
    assert_eq!(a.claim("acme").await.unwrap_err().code(), "store_owned_elsewhere");
    assert_eq!(
        (first.store.calls(Operation::Create), first.objects.objects()),
        (creates, before),
        "it only reads"
    );
}

/// A release that comes before the end of a claim that failed has nothing to release.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_never_came_up_is_not_there_to_be_released() {
    let world = World::new(WORKLOADS);
    let node = std::sync::Arc::new(world.start().await);
    // It does not open: while it waits for the store a release queues behind it, and then
    // the store is gone.
    let wait = std::time::Duration::from_secs(2);
    world.store.add(Rule::next(Fault::Delay(wait)).of(Operation::Create).with_key("t/"));
    let creates = world.store.calls(Operation::Create);
    let claim = tokio::spawn({
        let node = std::sync::Arc::clone(&node);
        async move { node.claim("acme").await }
    });
    wait_for("the claim is opened", || world.store.calls(Operation::Create) > creates).await;
    let release = tokio::spawn({
        let node = std::sync::Arc::clone(&node);
        async move { node.release("acme").await }
    });
    wait_for("the release is under way", || node.node.tasks.live().contains(&"release")).await;
    world.store.set_down(true);
    let error = claim.await.unwrap().unwrap_err();
    assert_eq!(error.code(), "store_unavailable", "{error:?}");
    let released = release.await.unwrap().unwrap();
    assert_eq!(released.state, ReleaseState::NotClaimed, "{released:?}");
    world.store.set_down(false);
    durable_after(&node).await;
}

async fn durable_after(node: &TestNode) {
    claim_when_held(node).await;
    durable(node, "acme").await;
}

/// Claims of the time before are not known to other servers: they are let in when the last
/// of them has ended.
#[tokio::test(flavor = "multi_thread")]
async fn p1_a_store_is_shared_only_when_no_claim_is_left_of_which_others_would_not_know() {
    let mut first = World::new(WORKLOADS);
    let a = first.start().await;
    claimed(&a, "acme").await;
    durable(&a, "acme").await;
    // Served from the cache: nothing in the store tells of it.
    let claim = claimed(&a, "acme").await;
    a.write(&claim, "notes", "kept");
    a.crash().await;
    first.store_mode = Mode::Shared;
    let second = first.beside("second", WORKLOADS);
    let (a, b) = (first.start().await, second.start().await);
    assert_eq!(b.claim("acme").await.unwrap_err().code(), "store_owned_elsewhere");
    let reasons = a.node.tenancy.readiness().reasons.join("\n");
    assert!(reasons.contains("store sharing"), "{reasons}");
    // What begins now is known to the store.
    claimed(&a, "other").await;
    // A restart in between changes nothing of it.
    a.crash().await;
    let a = first.start().await;
    assert_eq!(b.claim("acme").await.unwrap_err().code(), "store_owned_elsewhere");
    durable(&a, "acme").await;
    let claim = claim_when_held(&b).await;
    assert_eq!(b.read(&claim, "notes").as_deref(), Some("kept"));
    let error = b.claim("other").await.unwrap_err();
    assert!(matches!(&error, Error::ClaimedElsewhere { server, .. } if server == "test"), "{error:?}");
    let reasons = a.node.tenancy.readiness().reasons.join("\n");
    assert!(!reasons.contains("store sharing"), "{reasons}");
    durable(&a, "other").await;
    // From several servers back to one: not while another uses the store.
    a.stop().await;
    first.store_mode = Mode::Exclusive;
    let a = first.start().await;
    assert_eq!(a.claim("other").await.unwrap_err().code(), "store_owned_elsewhere");
}

/// P5: what this server opened, it claims again without asking.
#[tokio::test(flavor = "multi_thread")]
async fn p5_later_claims_from_the_cache_make_no_store_call_when_the_store_is_one_servers() {
    for (mode, asks) in [(Mode::Exclusive, false), (Mode::Shared, true)] {
        let mut world = World::new(WORKLOADS);
        world.store_mode = mode;
        let node = world.start().await;
        claimed(&node, "acme").await;
        durable(&node, "acme").await;
        // The look at the owner record that follows a save.
        node.settle().await;
        world.store.add(Rule::next(Fault::FailBefore).times(1_000));
        assert_eq!(node.claim("acme").await.is_err(), asks, "{mode:?}");
    }
}

/// Releases so that the save is in the store, and the server cannot hear of it.
async fn release_unheard(world: &World, node: &std::sync::Arc<TestNode>) {
    let wait = std::time::Duration::from_secs(2);
    world.store.add(Rule::next(Fault::Delay(wait)).of(Operation::Create).with_key("/r/"));
    let creates = world.store.calls(Operation::Create);
    let release = tokio::spawn({
        let node = std::sync::Arc::clone(node);
        async move { node.release("acme").await }
    });
    wait_for("the save commits", || world.store.calls(Operation::Create) > creates).await;
    world.store.set_down(true);
    assert_eq!(release.await.unwrap().unwrap().state, ReleaseState::Pending);
}

/// The commit that ends a claim lets other servers in: that it was not heard of is no
/// conflict, however far they have gone on.
#[tokio::test(flavor = "multi_thread")]
async fn p2_a_save_that_was_not_heard_of_counts_when_another_server_went_on_from_it() {
    for (saves, claims_first) in [(0, false), (3, false), (3, true)] {
        let mut first = World::new(WORKLOADS);
        first.store_mode = Mode::Shared;
        let second = first.beside("second", WORKLOADS);
        let (a, b) = (std::sync::Arc::new(first.start().await), second.start().await);
        let claim = claimed(&a, "acme").await;
        a.write(&claim, "notes", "a");
        release_unheard(&first, &a).await;
        let mut claim = claimed(&b, "acme").await;
        assert_eq!(b.read(&claim, "notes").as_deref(), Some("a"), "{saves}");
        for _ in 0..saves {
            b.write(&claim, "notes", "b");
            durable(&b, "acme").await;
            claim = claimed(&b, "acme").await;
        }
        if claims_first {
            durable(&b, "acme").await;
            first.store.set_down(false);
            let claim = claim_when_held(&a).await;
            assert_eq!(a.read(&claim, "notes").as_deref(), Some("b"));
            continue;
        }
        first.store.set_down(false);
        wait_for("the first server hears that it saved", || {
            let status = futures_util::FutureExt::now_or_never(a.status("acme")).expect("it never waits");
            let states: Vec<_> = status.claims.iter().map(|claim| claim.state).collect();
            assert!(!states.contains(&ClaimState::Conflict), "after {saves} saves: {states:?}");
            states.is_empty()
        })
        .await;
        assert_eq!(a.claim("acme").await.unwrap_err().code(), "claimed_elsewhere");
    }
}

/// A claim takes the duty to save that tree with it, and gives it back as it was when another
/// server is faster to open.
#[tokio::test(flavor = "multi_thread")]
async fn p2_a_claim_that_is_overtaken_while_it_opens_leaves_no_conflict() {
    let mut first = World::new(WORKLOADS);
    first.store_mode = Mode::Shared;
    let second = first.beside("second", WORKLOADS);
    let (a, b) = (std::sync::Arc::new(first.start().await), second.start().await);
    let claim = claimed(&a, "acme").await;
    a.write(&claim, "notes", "a");
    release_unheard(&first, &a).await;
    let wait = std::time::Duration::from_secs(3);
    first.store.add(Rule::next(Fault::Delay(wait)).of(Operation::Create).with_key("/r/"));
    let creates = first.store.calls(Operation::Create);
    first.store.set_down(false);
    let overtaken = tokio::spawn({
        let a = std::sync::Arc::clone(&a);
        async move { a.claim("acme").await }
    });
    wait_for("it opens", || first.store.calls(Operation::Create) > creates).await;
    let claim = claimed(&b, "acme").await;
    assert_eq!(b.read(&claim, "notes").as_deref(), Some("a"));
    b.write(&claim, "notes", "b");
    assert_eq!(overtaken.await.unwrap().unwrap_err().code(), "busy");
    wait_for("nothing is left of it", || {
        let status = futures_util::FutureExt::now_or_never(a.status("acme")).expect("it never waits");
        let states: Vec<_> = status.claims.iter().map(|claim| claim.state).collect();
        assert!(!states.contains(&ClaimState::Conflict), "{states:?}");
        states.is_empty()
    })
    .await;
    durable(&b, "acme").await;
    let claim = claim_when_held(&a).await;
    assert_eq!(a.read(&claim, "notes").as_deref(), Some("b"));
}
