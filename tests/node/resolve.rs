//! An operator's decision about state that is in conflict with the store's.

use std::path::{Path, PathBuf};

use boilerhouse::{
    lifecycle::CrashAction,
    model::{ClaimState, TenantId},
    state::fence::Mode,
    store::fault::{Fault, Operation, Rule},
    tenancy::{Error, ReleaseState, ResolveRequest, ResolvedAnswer, RestoreRequest, Side, SnapshotsAnswer},
};

use crate::{
    WORKER, claimed, durable,
    support::{
        node::{TestNode, World, wait_for},
        rivals::{Conflict, claim_at_last, conflict, in_conflict, state_of, take_over},
    },
};

const WORKLOADS: &[(&str, &str)] = &[("worker", WORKER)];
const OURS: ResolveRequest = ResolveRequest { workload: None, keep: Side::Ours, discard: false };
const THEIRS: ResolveRequest = ResolveRequest { workload: None, keep: Side::Theirs, discard: false };

fn tenant() -> TenantId {
    TenantId::new("alice").expect("an id")
}

async fn resolve(node: &TestNode, request: &ResolveRequest) -> Result<ResolvedAnswer, Error> {
    node.node.tenancy.resolve(tenant(), request.clone()).await
}

async fn snapshots(node: &TestNode) -> SnapshotsAnswer {
    node.node.tenancy.snapshots(tenant(), None, None, None).await.unwrap()
}

fn cache(world: &World) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(world.dir.path().join("states/cache")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_ours_is_saved_and_what_the_store_had_stays_in_the_history() {
    for mode in [Mode::Exclusive, Mode::Shared] {
        let Conflict { first, a, second, b } = conflict(mode, WORKLOADS).await;
        assert_eq!(a.claim("alice").await.unwrap_err().code(), "state_conflict", "{mode:?}");
        let before = snapshots(&a).await.snapshots[0].number;
        let answer = resolve(&a, &OURS).await.unwrap();
        assert_eq!((answer.kept, answer.state), (Side::Ours, ReleaseState::Durable), "{answer:?}");
        assert_eq!(answer.replaced, Some(before), "{answer:?}");
        assert_eq!(answer.snapshot, Some(before + 1), "one record, right after the one it replaces");
        assert_eq!(state_of(&a, "alice"), None);
        assert_eq!(resolve(&a, &OURS).await.unwrap_err().code(), "not_in_conflict");
        let claim = claimed(&a, "alice").await;
        assert_eq!(a.read(&claim, "notes").as_deref(), Some("ours"), "{mode:?}");
        durable(&a, "alice").await;
        a.node.tenancy.restore(tenant(), RestoreRequest { workload: None, snapshot: before }).await.unwrap();
        let claim = claimed(&a, "alice").await;
        assert_eq!(a.read(&claim, "notes").as_deref(), Some("theirs"), "{mode:?}: nothing is lost");
        durable(&a, "alice").await;
        a.check_no_leaks(&first).await;
        a.stop().await;
        let b = match b {
            Some(b) => b,
            None => second.start().await,
        };
        let claim = claim_at_last(&b, "alice").await;
        assert_eq!(b.read(&claim, "notes").as_deref(), Some("theirs"), "{mode:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_theirs_stands_and_ours_is_set_aside_or_removed_on_request() {
    for mode in [Mode::Exclusive, Mode::Shared] {
        for discard in [false, true] {
            let Conflict { first, a, second: _second, b: _b } = conflict(mode, WORKLOADS).await;
            let newest = snapshots(&a).await.snapshots[0].number;
            let answer = resolve(&a, &ResolveRequest { discard, ..THEIRS }).await.unwrap();
            assert_eq!((answer.kept, answer.state), (Side::Theirs, ReleaseState::Durable), "{answer:?}");
            assert_eq!((answer.snapshot, answer.discarded), (Some(newest), discard), "{answer:?}");
            assert_eq!(cache(&first), Vec::<PathBuf>::new());
            match (&answer.set_aside, discard) {
                (Some(place), false) => {
                    let kept = std::fs::read_to_string(Path::new(place).join("tree/notes")).unwrap();
                    assert_eq!(kept, "ours", "{place}");
                }
                (None, true) => a.check_no_leaks(&first).await,
                _ => panic!("{answer:?}"),
            }
            assert_eq!(state_of(&a, "alice"), None);
            assert_eq!(resolve(&a, &THEIRS).await.unwrap_err().code(), "not_in_conflict");
            let claim = claimed(&a, "alice").await;
            assert_eq!(a.read(&claim, "notes").as_deref(), Some("theirs"), "{mode:?}");
            durable(&a, "alice").await;
            // After a restart nothing of it comes back.
            a.crash().await;
            let a = first.start().await;
            let claim = claimed(&a, "alice").await;
            assert_eq!(a.read(&claim, "notes").as_deref(), Some("theirs"), "{mode:?}");
        }
    }
}

/// P1: while the other server has the tenant, its state is not replaced under it.
#[tokio::test(flavor = "multi_thread")]
async fn p1_ours_waits_until_the_other_server_has_no_claim_and_theirs_does_not() {
    let Conflict { first: _first, a, second: _second, b } = conflict(Mode::Shared, WORKLOADS).await;
    let b = b.unwrap();
    let claim = claimed(&b, "alice").await;
    b.write(&claim, "notes", "newer");
    let error = resolve(&a, &OURS).await.unwrap_err();
    assert!(matches!(&error, Error::ClaimedElsewhere { server, .. } if server == "second"), "{error:?}");
    assert_eq!(state_of(&a, "alice"), Some(ClaimState::Conflict), "nothing was decided");
    durable(&b, "alice").await;
    let claim = claimed(&b, "alice").await;
    assert_eq!(b.read(&claim, "notes").as_deref(), Some("newer"));
    let answer = resolve(&a, &THEIRS).await.unwrap();
    assert!(answer.set_aside.is_some(), "{answer:?}");
    assert_eq!(a.claim("alice").await.unwrap_err().code(), "claimed_elsewhere");
    durable(&b, "alice").await;
    let claim = claimed(&a, "alice").await;
    assert_eq!(a.read(&claim, "notes").as_deref(), Some("newer"));
}

/// A decision for ours that cannot be carried out yet goes on, and no claim takes its tree.
#[tokio::test(flavor = "multi_thread")]
async fn ours_goes_on_while_the_store_does_not_take_it() {
    let Conflict { first, a, second: _second, b: _b } = conflict(Mode::Shared, WORKLOADS).await;
    first.store.add(Rule::next(Fault::FailBefore).of(Operation::Create).times(3));
    let answer = resolve(&a, &OURS).await.unwrap();
    assert_eq!(answer.state, ReleaseState::Pending, "{answer:?}");
    assert!(answer.reason.is_some(), "{answer:?}");
    let error = a.claim("alice").await.unwrap_err();
    assert!(matches!(error, Error::StateNotSaved { .. }), "{error:?}");
    assert_eq!(resolve(&a, &THEIRS).await.unwrap_err().code(), "not_in_conflict", "it is decided");
    wait_for("it is saved", || state_of(&a, "alice").is_none()).await;
    let claim = claimed(&a, "alice").await;
    assert_eq!(a.read(&claim, "notes").as_deref(), Some("ours"));
}

/// Of what another server writes after the decision, the operator has not decided.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_writes_before_ours_makes_it_a_conflict_again() {
    let Conflict { first, a, second: _second, b } = conflict(Mode::Shared, WORKLOADS).await;
    let b = b.unwrap();
    first.store.add(Rule::next(Fault::FailBefore).of(Operation::Create).times(1_000));
    assert_eq!(resolve(&a, &OURS).await.unwrap().state, ReleaseState::Pending);
    let claim = claimed(&b, "alice").await;
    b.write(&claim, "notes", "newer");
    durable(&b, "alice").await;
    first.store.clear();
    in_conflict(&a, "alice").await;
    let claim = claimed(&b, "alice").await;
    assert_eq!(b.read(&claim, "notes").as_deref(), Some("newer"), "it was not replaced");
    durable(&b, "alice").await;
    let answer = resolve(&a, &OURS).await.unwrap();
    assert_eq!(answer.state, ReleaseState::Durable, "{answer:?}");
    let claim = claimed(&a, "alice").await;
    assert_eq!(a.read(&claim, "notes").as_deref(), Some("ours"));
}

/// P2: where nothing is in conflict, nothing is decided, and what goes on goes on.
#[tokio::test(flavor = "multi_thread")]
async fn only_a_conflict_is_decided() {
    let world = World::new(WORKLOADS);
    let node = world.start().await;
    for request in [OURS, THEIRS] {
        assert_eq!(resolve(&node, &request).await.unwrap_err().code(), "not_in_conflict");
    }
    let claim = claimed(&node, "alice").await;
    node.write(&claim, "notes", "kept");
    for request in [OURS, THEIRS] {
        assert_eq!(resolve(&node, &request).await.unwrap_err().code(), "claimed");
    }
    let error = resolve(&node, &ResolveRequest { discard: true, ..OURS }).await.unwrap_err();
    assert!(matches!(&error, Error::Invalid { field, .. } if field == "discard"), "{error:?}");
    world.store.add(Rule::next(Fault::FailBefore).of(Operation::Create).times(1_000));
    assert_eq!(node.release("alice").await.unwrap().state, ReleaseState::Pending);
    for request in [OURS, THEIRS, ResolveRequest { discard: true, ..THEIRS }] {
        assert_eq!(resolve(&node, &request).await.unwrap_err().code(), "not_in_conflict");
    }
    world.store.set_down(true);
    assert_eq!(resolve(&node, &THEIRS).await.unwrap_err().code(), "store_unavailable");
    world.store.clear();
    world.store.set_down(false);
    wait_for("the save goes on", || state_of(&node, "alice").is_none()).await;
    let claim = claimed(&node, "alice").await;
    assert_eq!(node.read(&claim, "notes").as_deref(), Some("kept"));
}

/// A server that lost the store may give its state up, and not publish it.
#[tokio::test(flavor = "multi_thread")]
async fn p1_a_server_without_the_store_decides_for_theirs_only() {
    let first = World::new(WORKLOADS);
    let second = first.beside("second", WORKLOADS);
    let a = first.start().await;
    let claim = claimed(&a, "alice").await;
    a.write(&claim, "notes", "ours");
    first.store.set_down(true);
    assert_eq!(a.release("alice").await.unwrap().state, ReleaseState::Pending);
    take_over(&second).await;
    let b = second.start().await;
    let claim = claim_at_last(&b, "alice").await;
    b.write(&claim, "notes", "theirs");
    first.store.set_down(false);
    wait_for("the first server knows", || {
        a.node.tenancy.readiness().reasons.join("\n").contains("took the store from this server")
            || a.node.tenancy.readiness().reasons.join("\n").contains("\"second\"")
    })
    .await;
    assert_eq!(resolve(&a, &OURS).await.unwrap_err().code(), "store_owned_elsewhere");
    assert!(
        matches!(state_of(&a, "alice"), Some(ClaimState::Dirty | ClaimState::Conflict)),
        "nothing was decided"
    );
    // The other one's claim has not saved anything: ours would be the only copy.
    let error = resolve(&a, &ResolveRequest { discard: true, ..THEIRS }).await.unwrap_err();
    assert!(matches!(&error, Error::Invalid { field, .. } if field == "discard"), "{error:?}");
    let answer = resolve(&a, &THEIRS).await.unwrap();
    assert_eq!(answer.snapshot, None, "{answer:?}");
    let place = answer.set_aside.expect("it is kept");
    assert_eq!(std::fs::read_to_string(Path::new(&place).join("tree/notes")).unwrap(), "ours");
    assert_eq!(state_of(&a, "alice"), None);
    durable(&b, "alice").await;
    assert_eq!(snapshots(&b).await.snapshots.len(), 1);
}

/// P3: where the store lost the tenant's history, nothing is written as if there never was
/// one; an operator may begin a new one with what this node has.
#[tokio::test(flavor = "multi_thread")]
async fn p3_a_store_that_lost_the_history_gets_no_new_one_unasked() {
    for (keep, found) in [(OURS, Some("last")), (THEIRS, None)] {
        let world = World::new(WORKLOADS);
        let node = world.start().await;
        let claim = claimed(&node, "alice").await;
        node.write(&claim, "notes", "last");
        durable(&node, "alice").await;
        claimed(&node, "alice").await;
        let wiped: Vec<String> =
            world.objects.objects().into_keys().filter(|name| name.starts_with("t/")).collect();
        assert!(wiped.len() > 3, "{wiped:?}");
        for name in &wiped {
            boilerhouse::store::Store::delete(world.objects.as_ref(), name).await.unwrap();
        }
        let error = node.node.tenancy.sync(tenant(), None).await.unwrap_err();
        assert_eq!(error.code(), "state_damaged", "{error:?}");
        let answer = node.release("alice").await.unwrap();
        assert_eq!(answer.state, ReleaseState::Pending, "{answer:?}");
        assert!(answer.reason.as_deref().is_some_and(|reason| reason.contains("no record")), "{answer:?}");
        node.crash().await;
        let node = world.start().await;
        assert_eq!(node.claim("alice").await.unwrap_err().code(), "state_damaged");
        assert!(!world.objects.objects().keys().any(|name| name.starts_with("t/")), "nothing was written");
        let error = resolve(&node, &ResolveRequest { discard: true, ..THEIRS }).await.unwrap_err();
        assert!(matches!(&error, Error::Invalid { field, .. } if field == "discard"), "{error:?}");
        let answer = resolve(&node, &keep).await.unwrap();
        assert_eq!(answer.set_aside.is_some(), keep.keep == Side::Theirs, "{answer:?}");
        assert_eq!(answer.snapshot, found.map(|_| 1), "{answer:?}");
        let claim = claimed(&node, "alice").await;
        assert_eq!(node.read(&claim, "notes").as_deref(), found);
        durable(&node, "alice").await;
    }
}

/// P7: a crash at any point of a decision is finished or undone at the next start.
#[tokio::test(flavor = "multi_thread")]
async fn p7_a_crash_in_a_decision_is_repaired_at_the_next_start() {
    for (point, request, found) in [
        ("resolve.ours", OURS, "ours"),
        ("save.saved", OURS, "ours"),
        ("resolve.theirs", THEIRS, "theirs"),
        ("resolve.theirs", ResolveRequest { discard: true, ..THEIRS }, "theirs"),
        ("resolve.removed", THEIRS, "theirs"),
    ] {
        let Conflict { first, a, second: _second, b: _b } = conflict(Mode::Shared, WORKLOADS).await;
        a.crash.arm(point, 1, CrashAction::Halt);
        tokio::select! {
            biased;
            () = a.crash.crashed() => {}
            answer = resolve(&a, &request) => panic!("{point}: {answer:?}"),
        }
        a.crash().await;
        let a = first.start().await;
        wait_for("the decision is carried out", || state_of(&a, "alice").is_none()).await;
        let claim = claimed(&a, "alice").await;
        assert_eq!(a.read(&claim, "notes").as_deref(), Some(found), "{point}");
        if request.keep == Side::Theirs {
            let aside = first.dir.path().join("states/set_aside");
            let kept: Vec<_> = std::fs::read_dir(aside).unwrap().flatten().collect();
            assert_eq!(kept.len(), 1, "{point}: not removed, and not in the way");
            let notes = std::fs::read_to_string(kept[0].path().join("tree/notes")).unwrap();
            assert_eq!(notes, "ours", "{point}");
        } else {
            durable(&a, "alice").await;
            a.check_no_leaks(&first).await;
        }
    }
}

/// A claim whose files a power loss tore, so that what its program had written is lost:
/// there is nothing to tell what is right. Answers its container's end in a new boot.
async fn torn(world: &mut World) -> TestNode {
    let node = world.start().await;
    let claim = claim_at_last(&node, "alice").await;
    node.write(&claim, "notes", &"whole ".repeat(1_000));
    durable(&node, "alice").await;
    node.stop().await;
    std::fs::remove_dir_all(world.dir.path().join("states")).unwrap();
    let node = world.start().await;
    let claim = claim_at_last(&node, "alice").await;
    let state = node.state(&claim);
    // It is noted when the restored tree is on disk: here it never was.
    let synced = state.parent().unwrap().join("shell/synced");
    wait_for("the tree is synced", || synced.exists()).await;
    std::fs::remove_file(synced).unwrap();
    node.write(&claim, "notes", &format!("{}{}", "\0".repeat(3_000), "changed ".repeat(375)));
    node.crash().await;
    world.runtime.remove_outside(&claim.container.name);
    world.boot_id = "boot-2".to_owned();
    let node = world.start().await;
    in_conflict(&node, "alice").await;
    node
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_a_torn_tree_is_decided_like_one_that_was_overtaken() {
    for (request, found) in [(OURS, "\0"), (THEIRS, "whole ")] {
        let mut world = World::new(WORKLOADS);
        world.store_mode = Mode::Shared;
        let second = world.beside("second", WORKLOADS);
        let node = torn(&mut world).await;
        let status = node.status("alice").await;
        let reason = status.claims[0].last_error.clone().unwrap_or_default();
        assert!(reason.contains("torn by a power loss"), "{reason}");
        let answer = resolve(&node, &request).await.unwrap();
        assert_eq!(answer.state, ReleaseState::Durable, "{answer:?}");
        wait_for("nothing is owed", || state_of(&node, "alice").is_none()).await;
        // Whatever was decided, the claim that was torn is over for everybody.
        let other = second.start().await;
        let claim = claim_at_last(&other, "alice").await;
        let notes = other.read(&claim, "notes").unwrap_or_default();
        assert!(notes.starts_with(found), "{request:?}");
        durable(&other, "alice").await;
        let claim = claim_at_last(&node, "alice").await;
        assert_eq!(node.read(&claim, "notes"), Some(notes), "{request:?}");
    }
}

/// Ours is saved and its server does not hear of it; the other one goes on from it at once.
#[tokio::test(flavor = "multi_thread")]
async fn p8_a_decision_that_was_carried_out_unheard_is_not_a_conflict_again() {
    let Conflict { first, a, second: _second, b } = conflict(Mode::Shared, WORKLOADS).await;
    let b = b.unwrap();
    // Nor does it get to look.
    first.store.add(Rule::next(Fault::CutAfter).of(Operation::Create).with_key("/r/"));
    let answer = resolve(&a, &OURS).await.unwrap();
    assert_eq!(answer.state, ReleaseState::Pending, "{answer:?}");
    let claim = claim_at_last(&b, "alice").await;
    assert_eq!(b.read(&claim, "notes").as_deref(), Some("ours"));
    first.store.set_down(false);
    wait_for("the first server finds its state saved", || state_of(&a, "alice").is_none()).await;
    b.write(&claim, "notes", "later");
    durable(&b, "alice").await;
    let claim = claim_at_last(&a, "alice").await;
    assert_eq!(a.read(&claim, "notes").as_deref(), Some("later"));
}
