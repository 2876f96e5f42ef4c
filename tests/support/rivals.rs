//! Two servers that disagree about a tenant's state.

use std::time::{Duration, Instant};

use boilerhouse::{
    clock::{Clock as _, SystemClock},
    model::ClaimState,
    state::fence::{
        Mode,
        owner::{self, OwnerRecord, Tenure},
    },
    tenancy::{ClaimAnswer, ReleaseState},
};
use futures_util::FutureExt as _;

use super::node::{TestNode, World, wait_for};

/// What a conflict is made of.
pub struct Conflict {
    pub first: World,
    /// Has `ours` as the notes of tenant `alice`, and cannot save it.
    pub a: TestNode,
    pub second: World,
    /// Saved `theirs`; runs where the store is shared.
    pub b: Option<TestNode>,
}

async fn owners(world: &World) -> Vec<OwnerRecord> {
    let records = owner::read(world.objects.as_ref()).await.expect("a store in memory answers");
    match owner::tenure(&records) {
        Tenure::Free => Vec::new(),
        Tenure::Exclusive(owner) => vec![owner],
        Tenure::Shared(all) => all.into_values().collect(),
    }
}

/// What `boilerhouse state takeover --yes` does on the store. A server that runs keeps what
/// it has.
pub async fn take_over(world: &World) {
    let (own, others): (Vec<_>, Vec<_>) =
        owners(world).await.into_iter().partition(|owner| owner.server == world.instance);
    let nonce = own.first().map_or("operator", |own| &own.nonce);
    let (objects, now_ms) = (world.objects.as_ref(), SystemClock.unix_ms());
    let taken = owner::take_over(objects, &others, &world.instance, world.store_mode, nonce, now_ms).await;
    taken.expect("a store in memory takes it");
}

/// Claims until the server may.
pub async fn claim_at_last(node: &TestNode, tenant: &str) -> ClaimAnswer {
    let began = Instant::now();
    loop {
        match node.claim(tenant).await {
            Ok(claim) => return claim,
            Err(error) => assert!(began.elapsed().as_secs() < 30, "claim: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Returns where the tenant's first claim stands.
pub fn state_of(node: &TestNode, tenant: &str) -> Option<ClaimState> {
    let status = node.status(tenant).now_or_never().expect("it never waits");
    status.claims.first().map(|claim| claim.state)
}

/// Waits until the server knows that the tenant's state is in conflict.
pub async fn in_conflict(node: &TestNode, tenant: &str) {
    wait_for("the conflict is found", || state_of(node, tenant) == Some(ClaimState::Conflict)).await;
}

async fn release(node: &TestNode, tenant: &str, expected: ReleaseState) {
    let answer = node.release(tenant).await.unwrap_or_else(|error| panic!("release: {error:?}"));
    assert_eq!(answer.state, expected, "{answer:?}");
}

/// Has a first server save `one`, be cut off with `ours`, and a second take the store and
/// save `theirs`; the first is back and holds the store, too.
pub async fn conflict(mode: Mode, workloads: &[(&str, &str)]) -> Conflict {
    const TENANT: &str = "alice";
    let mut first = World::new(workloads);
    first.store_mode = mode;
    let second = first.beside("second", workloads);
    let a = first.start().await;
    let claim = claim_at_last(&a, TENANT).await;
    a.write(&claim, "notes", "one");
    release(&a, TENANT, ReleaseState::Durable).await;
    let claim = claim_at_last(&a, TENANT).await;
    a.write(&claim, "notes", "ours");
    first.store.set_down(true);
    release(&a, TENANT, ReleaseState::Pending).await;
    take_over(&second).await;
    let b = second.start().await;
    let claim = claim_at_last(&b, TENANT).await;
    assert_eq!(b.read(&claim, "notes").as_deref(), Some("one"));
    b.write(&claim, "notes", "theirs");
    release(&b, TENANT, ReleaseState::Durable).await;
    let b = match mode {
        Mode::Exclusive => {
            b.stop().await;
            None
        }
        Mode::Shared => Some(b),
    };
    first.store.set_down(false);
    in_conflict(&a, TENANT).await;
    let began = Instant::now();
    let holds = async || owners(&first).await.iter().any(|owner| owner.server == first.instance);
    while !holds().await || a.node.tenancy.readiness().status != "ready" {
        assert!(began.elapsed().as_secs() < 30, "the first server does not take the store again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Conflict { first, a, second, b }
}
