//! The node's cache: what goes for want of room, and what comes before a claim.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use boilerhouse::{
    lifecycle::CrashAction,
    model::{Key, Owner, StateSource, TenantId, WorkloadId},
    runtime::fake::FakeImage,
    state::fence::Mode,
    store::fault::{Fault, Operation, Rule},
    tenancy::{CacheLimits, Error, PrefetchAnswer, ReleaseState},
};

use crate::{
    WORKER, claimed, durable,
    support::node::{APP, IMAGE, TestNode, World, wait_for},
};

const WORKLOADS: &[(&str, &str)] = &[("worker", WORKER)];
const FILE_BYTES: usize = 64 << 10;

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).expect("an id")
}

/// Tenants whose trees are in the cache.
fn cached(world: &World, tenants: &[&str]) -> BTreeSet<String> {
    let folder = world.dir.path().join("states/cache");
    let is_there = |name: &&&str| {
        let key = Key::new(tenant(name), WorkloadId::new("worker").expect("an id"));
        folder.join(key.digest()).exists()
    };
    tenants.iter().filter(is_there).map(|name| (*name).to_owned()).collect()
}

fn set(tenants: &[&str]) -> BTreeSet<String> {
    tenants.iter().map(|name| (*name).to_owned()).collect()
}

async fn prefetch(node: &TestNode, name: &str) -> Result<PrefetchAnswer, Error> {
    node.node.tenancy.prefetch(tenant(name), None).await
}

/// Claims, writes and releases.
async fn live_a_day(node: &TestNode, name: &str, content: &str) {
    let claim = claimed(node, name).await;
    node.write(&claim, "file", content);
    let trees = node.node.tenancy.cache_size().trees;
    durable(node, name).await;
    at_rest(node, trees + 1).await;
}

/// Waits until so many trees are at rest: the task of a save ends a little after its answer.
async fn at_rest(node: &TestNode, trees: u64) {
    wait_for("the trees are at rest", || node.node.tenancy.cache_size().trees == trees).await;
}

/// Ends the node and starts one on an empty disk.
async fn on_a_fresh_disk(world: &World, node: TestNode) -> TestNode {
    node.stop().await;
    std::fs::remove_dir_all(world.dir.path().join("states")).unwrap();
    let node = world.start().await;
    node.settle().await;
    node
}

async fn check_claim(node: &TestNode, name: &str, source: StateSource, content: &str) {
    let claim = claimed(node, name).await;
    assert_eq!(claim.state.source, source, "{name}");
    assert_eq!(node.read(&claim, "file").as_deref(), Some(content), "{name}");
}

// === what goes ===

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_longest_ago_goes_and_comes_back_from_the_store() {
    let mut world = World::new(WORKLOADS);
    // Room for three of them, and down to nine tenths: two stay.
    world.cache.max_bytes = Some(3 * FILE_BYTES as u64 + (FILE_BYTES / 2) as u64);
    let node = world.start().await;
    let all = ["a", "b", "c", "d"];
    for name in all {
        live_a_day(&node, name, &name.repeat(FILE_BYTES)).await;
        node.node.tenancy.trim_cache().await;
    }
    assert_eq!(cached(&world, &all), set(&["b", "c", "d"]));
    let size = node.node.tenancy.cache_size();
    assert!(size.trees == 3 && size.bytes >= 3 * FILE_BYTES as u64, "{size:?}");
    // Used again, the oldest is the youngest.
    check_claim(&node, "b", StateSource::Cache, &"b".repeat(FILE_BYTES)).await;
    durable(&node, "b").await;
    at_rest(&node, 3).await;
    live_a_day(&node, "e", &"e".repeat(FILE_BYTES)).await;
    node.node.tenancy.trim_cache().await;
    assert_eq!(cached(&world, &["a", "b", "c", "d", "e"]), set(&["b", "d", "e"]));
    let text = node.node.metrics.encode(&[]);
    assert!(text.contains("boilerhouse_cache_evictions_total{reason=\"size\"} 2"), "{text}");
    check_claim(&node, "a", StateSource::Store, &"a".repeat(FILE_BYTES)).await;
    node.check_no_leaks(&world).await;
    // A restart knows the order by the snapshots, and its bound may be another.
    durable(&node, "a").await;
    node.stop().await;
    world.cache.max_bytes = Some(2 * FILE_BYTES as u64);
    let node = world.start().await;
    node.node.tenancy.trim_cache().await;
    assert_eq!(cached(&world, &["a", "b", "c", "d", "e"]), set(&["a"]));
}

/// What snapshots leave out is on the disk nevertheless; a hole is not.
#[tokio::test(flavor = "multi_thread")]
async fn trees_count_for_what_they_take_on_the_disk() {
    let script = WORKER.replace("pool:", "persist: #{ exclude: [\"scratch\"] }, pool:");
    let mut world = World::new(&[("worker", &script)]);
    world.cache.max_bytes = Some(1 << 20);
    let node = world.start().await;
    let claim = claimed(&node, "holes").await;
    std::fs::File::create(node.state(&claim).join("sparse")).unwrap().set_len(1 << 40).unwrap();
    durable(&node, "holes").await;
    at_rest(&node, 1).await;
    node.node.tenancy.trim_cache().await;
    assert_eq!(cached(&world, &["holes"]), set(&["holes"]));
    let claim = claimed(&node, "scratch").await;
    node.write(&claim, "scratch", &"x".repeat(2 << 20));
    durable(&node, "scratch").await;
    at_rest(&node, 2).await;
    node.node.tenancy.trim_cache().await;
    assert_eq!(cached(&world, &["holes", "scratch"]), set(&[]), "the older one goes first, and both must");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_relieved_whatever_the_cache_may_take() {
    let mut world = World::new(WORKLOADS);
    // More than any disk has.
    world.cache = CacheLimits { max_bytes: None, min_free_bytes: 1 << 60 };
    let node = world.start().await;
    live_a_day(&node, "a", "kept in the store").await;
    let claim = claimed(&node, "b").await;
    node.write(&claim, "file", "claimed");
    node.node.tenancy.trim_cache().await;
    assert_eq!(cached(&world, &["a"]), set(&[]));
    assert_eq!(node.read(&claim, "file").as_deref(), Some("claimed"));
    let text = node.node.metrics.encode(&[]);
    assert!(text.contains("boilerhouse_cache_evictions_total{reason=\"disk\"} 1"), "{text}");
    check_claim(&node, "a", StateSource::Store, "kept in the store").await;
    node.check_no_leaks(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_what_the_store_may_not_have_is_never_evicted() {
    let mut world = World::new(WORKLOADS);
    world.cache.max_bytes = Some(0);
    let node = world.start().await;
    live_a_day(&node, "clean", "clean").await;
    live_a_day(&node, "pending", "saved").await;
    let claim = claimed(&node, "pending").await;
    node.write(&claim, "file", "unsaved");
    world.store.set_down(true);
    assert_eq!(node.release("pending").await.unwrap().state, ReleaseState::Pending);
    node.node.tenancy.trim_cache().await;
    assert_eq!(cached(&world, &["clean", "pending"]), set(&["clean", "pending"]), "nobody can be asked");
    node.crash().await;
    // A server whose store lost what was there: its own copy is the last.
    world.store.set_down(false);
    let node = world.start().await;
    wait_for("the pending save ends", || {
        futures_util::FutureExt::now_or_never(node.status("pending"))
            .is_some_and(|status| status.claims.is_empty())
    })
    .await;
    at_rest(&node, 2).await;
    let digest = Key::new(tenant("clean"), WorkloadId::new("worker").unwrap()).digest();
    let listed = boilerhouse::store::Store::list(&*world.objects, &format!("t/{digest}/"), None, 1_000).await;
    for object in listed.unwrap() {
        boilerhouse::store::Store::delete(&*world.objects, &object.key).await.unwrap();
    }
    node.node.tenancy.trim_cache().await;
    assert_eq!(cached(&world, &["clean", "pending"]), set(&["clean"]));
    check_claim(&node, "pending", StateSource::Store, "unsaved").await;
    node.check_no_leaks(&world).await;
}

/// Evictions under everything that can happen to a tenant at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn p2_claims_releases_and_prefetches_race_with_evictions() {
    const TENANTS: usize = 4;
    const DAYS: u32 = 15;
    let mut world = World::new(WORKLOADS);
    world.cache = CacheLimits { max_bytes: None, min_free_bytes: 1 << 60 };
    let node = Arc::new(world.start().await);
    let days: Vec<_> = (0..TENANTS)
        .map(|n| {
            let node = Arc::clone(&node);
            tokio::spawn(async move {
                let name = format!("t{n}");
                for day in 0..DAYS {
                    let claim = claimed(&node, &name).await;
                    let found = node.read(&claim, "file").map(|text| text.parse::<u32>().unwrap());
                    assert_eq!(found, day.checked_sub(1), "{name}");
                    node.write(&claim, "file", &day.to_string());
                    if day % 3 == 0 {
                        node.node.tenancy.sync(tenant(&name), None).await.unwrap();
                    }
                    durable(&node, &name).await;
                    let _ = prefetch(&node, &name).await.unwrap();
                }
            })
        })
        .collect();
    let is_over = Arc::new(AtomicBool::new(false));
    let trimming = {
        let (node, is_over) = (Arc::clone(&node), Arc::clone(&is_over));
        tokio::spawn(async move {
            while !is_over.load(Ordering::SeqCst) {
                node.node.tenancy.trim_cache().await;
                tokio::task::yield_now().await;
            }
        })
    };
    for day in days {
        day.await.unwrap();
    }
    is_over.store(true, Ordering::SeqCst);
    trimming.await.unwrap();
    let text = node.node.metrics.encode(&[]);
    assert!(text.contains("boilerhouse_cache_evictions_total{reason=\"disk\"}"), "{text}");
    node.node.tenancy.trim_cache().await;
    node.check_no_leaks(&world).await;
}

// === what comes ===

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetched_tenants_claim_moves_no_bytes() {
    let mut world = World::new(WORKLOADS);
    let node = world.start().await;
    live_a_day(&node, "acme", "content").await;
    let node = on_a_fresh_disk(&world, node).await;
    let answer = prefetch(&node, "acme").await.unwrap();
    assert!(answer.cached && answer.fetched_bytes > 0 && answer.files == 1, "{answer:?}");
    let again = prefetch(&node, "acme").await.unwrap();
    assert_eq!((again.cached, again.fetched_bytes, again.snapshot), (true, 0, answer.snapshot));
    // The first claim of this server reads what the newest snapshot is and writes that it
    // begins; no content.
    for content in ["/p/", "/c/"] {
        world.store.add(Rule::next(Fault::Refuse).of(Operation::Get).with_key(content).times(1_000));
    }
    check_claim(&node, "acme", StateSource::Cache, "content").await;
    world.store.clear();
    // While it is claimed, its state is here.
    let live = prefetch(&node, "acme").await.unwrap();
    assert!(live.cached && live.fetched_bytes == 0, "{live:?}");
    durable(&node, "acme").await;
    node.check_no_leaks(&world).await;

    // Evicted and prefetched again, its claim makes no store call at all.
    node.stop().await;
    world.cache.min_free_bytes = 1 << 60;
    let node = world.start().await;
    node.settle().await;
    live_a_day(&node, "acme", "more").await;
    node.node.tenancy.trim_cache().await;
    assert_eq!(cached(&world, &["acme"]), set(&[]));
    let answer = prefetch(&node, "acme").await.unwrap();
    assert!(answer.fetched_bytes > 0, "{answer:?}");
    node.settle().await;
    let calls = world.store.calls_in("t");
    check_claim(&node, "acme", StateSource::Cache, "more").await;
    assert_eq!(world.store.calls_in("t"), calls);
    let text = node.node.metrics.encode(&[]);
    assert!(text.contains("boilerhouse_prefetches_total{outcome=\"fetched\"} 1"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_comes_meanwhile_takes_what_is_being_fetched() {
    let world = World::new(WORKLOADS);
    let node = world.start().await;
    live_a_day(&node, "acme", "content").await;
    let node = Arc::new(on_a_fresh_disk(&world, node).await);
    // How many calls it takes alone.
    world.store.add(Rule::next(Fault::Delay(Duration::from_millis(700))).of(Operation::Get).with_key("/m/"));
    let calls = world.store.all_calls();
    let fetching = {
        let node = Arc::clone(&node);
        tokio::spawn(async move { prefetch(&node, "acme").await })
    };
    wait_for("it is under way", || world.store.all_calls() >= calls + 3).await;
    let second = prefetch(&node, "acme");
    let claiming = claimed(&node, "acme");
    let (claim, second) = tokio::join!(claiming, second);
    let first = fetching.await.unwrap().unwrap();
    assert!(first.fetched_bytes > 0);
    assert_eq!(second.unwrap().fetched_bytes, 0, "fetched once");
    assert_eq!(claim.state.source, StateSource::Cache);
    assert_eq!(node.read(&claim, "file").as_deref(), Some("content"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_answers_and_fails_as_a_claim_does() {
    let mut world = World::new(WORKLOADS);
    world.cache.max_bytes = Some(FILE_BYTES as u64);
    let node = world.start().await;
    let none = prefetch(&node, "nobody").await.unwrap();
    assert_eq!((none.cached, none.snapshot, none.fetched_bytes), (false, None, 0));
    live_a_day(&node, "large", &"x".repeat(FILE_BYTES)).await;
    live_a_day(&node, "acme", "content").await;
    let claim = claimed(&node, "acme").await;
    node.write(&claim, "file", "newer");
    world.store.set_down(true);
    assert_eq!(node.release("acme").await.unwrap().state, ReleaseState::Pending);
    let pending = prefetch(&node, "acme").await.unwrap();
    assert!(pending.cached && pending.fetched_bytes == 0, "the newest is here, unsaved: {pending:?}");
    let error = prefetch(&node, "stranger").await.unwrap_err();
    assert_eq!(error.code(), "store_unavailable", "{error:?}");
    world.store.set_down(false);
    let unknown = node.node.tenancy.prefetch(tenant("acme"), Some("other".parse().unwrap())).await;
    assert_eq!(unknown.unwrap_err().code(), "unknown_workload");
    claimed(&node, "acme").await;
    durable(&node, "acme").await;
    let node = on_a_fresh_disk(&world, node).await;
    // Larger than the cache: it could not stay.
    let large = prefetch(&node, "large").await.unwrap();
    assert!(!large.cached && large.fetched_bytes == 0 && large.reason.is_some(), "{large:?}");
    assert_eq!(cached(&world, &["large"]), set(&[]));
    check_claim(&node, "large", StateSource::Store, &"x".repeat(FILE_BYTES)).await;
    let stateless = WORKER.replace("state: #{ container_path: \"/data\", mode: \"rw\" },", "");
    let world = World::new(&[("worker", &stateless)]);
    let error = prefetch(&world.start().await, "acme").await.unwrap_err();
    assert_eq!(error.code(), "invalid_field", "{error:?}");
}

/// With several servers, what was fetched here may be old when it is claimed.
#[tokio::test(flavor = "multi_thread")]
async fn p1_what_was_prefetched_is_compared_with_a_shared_store() {
    let mut first = World::new(WORKLOADS);
    first.store_mode = Mode::Shared;
    let second = first.beside("second", WORKLOADS);
    let (a, b) = (first.start().await, second.start().await);
    live_a_day(&a, "acme", "one").await;
    assert!(prefetch(&b, "acme").await.unwrap().fetched_bytes > 0);
    assert_eq!(prefetch(&b, "acme").await.unwrap().fetched_bytes, 0);
    let claim = claimed(&a, "acme").await;
    let error = prefetch(&b, "acme").await.unwrap_err();
    assert!(matches!(&error, Error::ClaimedElsewhere { server, .. } if server == "test"), "{error:?}");
    a.write(&claim, "file", "two");
    durable(&a, "acme").await;
    check_claim(&b, "acme", StateSource::Store, "two").await;
    durable(&b, "acme").await;
    live_a_day(&a, "acme", "three").await;
    assert!(prefetch(&b, "acme").await.unwrap().fetched_bytes > 0, "the older tree is replaced");
    check_claim(&b, "acme", StateSource::Cache, "three").await;
    durable(&b, "acme").await;
    b.check_no_leaks(&second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefetched_files_become_those_of_the_program_that_claims_them() {
    let world = World::new(WORKLOADS);
    let node = world.start().await;
    live_a_day(&node, "acme", "content").await;
    let other = Owner { uid: APP.uid + 1, gid: APP.gid + 1 };
    world.runtime.add_image(IMAGE, FakeImage { run_as: other, ends_after: Some(Duration::ZERO) });
    let node = on_a_fresh_disk(&world, node).await;
    prefetch(&node, "acme").await.unwrap();
    let claim = claimed(&node, "acme").await;
    assert_eq!(claim.state.source, StateSource::Cache);
    let file = std::fs::metadata(node.state(&claim).join("file")).unwrap();
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!((file.uid(), file.gid()), (other.uid, other.gid));
}

#[tokio::test(flavor = "multi_thread")]
async fn prefetches_that_wait_are_bounded() {
    let world = World::new(WORKLOADS);
    let node = Arc::new(world.start().await);
    node.settle().await;
    // Nobody's state is answered for, and a hundred want it.
    world.store.add(Rule::next(Fault::Hang).with_key("t/").times(1_000));
    let all: Vec<_> = (0..100)
        .map(|n| {
            let node = Arc::clone(&node);
            tokio::spawn(async move { prefetch(&node, &format!("t{n}")).await })
        })
        .collect();
    wait_for("those that are too many are refused", || {
        all.iter().filter(|task| task.is_finished()).count() >= 100 - 68
    })
    .await;
    let mut refused = 0;
    for task in all {
        if task.is_finished() {
            let error = task.await.unwrap().unwrap_err();
            assert!(matches!(error.code(), "busy" | "store_unavailable"), "{error:?}");
            refused += usize::from(error.code() == "busy");
        } else {
            task.abort();
        }
    }
    assert_eq!(refused, 100 - 68);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_at_any_call_of_a_prefetch_leaves_nothing_half_done() {
    for fault in [Fault::FailBefore, Fault::FailAfter, Fault::Refuse, Fault::Truncate(7)] {
        let mut met = 0;
        for nth in 1..100 {
            let world = World::new(WORKLOADS);
            let node = world.start().await;
            live_a_day(&node, "acme", "content").await;
            let node = on_a_fresh_disk(&world, node).await;
            let calls = world.store.all_calls();
            world.store.add(Rule::next(fault.clone()).nth(nth));
            let outcome = prefetch(&node, "acme").await;
            let has_fired = world.store.all_calls() - calls >= nth;
            world.store.clear();
            met += u32::from(outcome.is_err());
            if outcome.is_err() {
                assert_eq!(cached(&world, &["acme"]), set(&[]), "{fault:?}, call {nth}");
            }
            let again = prefetch(&node, "acme").await.unwrap();
            assert_eq!(again.fetched_bytes > 0, outcome.is_err(), "{fault:?}, call {nth}");
            check_claim(&node, "acme", StateSource::Cache, "content").await;
            durable(&node, "acme").await;
            node.check_no_leaks(&world).await;
            if !has_fired {
                break;
            }
        }
        assert!(met >= 2, "{fault:?}: record and content at least, and {met} failed");
    }
}

/// P7: killed anywhere, the next start has the tree whole or not at all, and sets nothing aside.
#[tokio::test(flavor = "multi_thread")]
async fn p7_a_crash_in_an_eviction_or_a_prefetch_is_repaired_at_the_next_start() {
    for point in [
        "evict.begun",
        "evict.moved",
        "evict.journaled",
        "prefetch.journaled",
        "prefetch.fetched",
        "prefetch.done",
    ] {
        for next in ["prefetch", "claim"] {
            let mut world = World::new(WORKLOADS);
            if point.starts_with("evict") {
                world.cache.min_free_bytes = 1 << 60;
            }
            let node = world.start().await;
            live_a_day(&node, "acme", "content").await;
            let node = if point.starts_with("evict") { node } else { on_a_fresh_disk(&world, node).await };
            node.crash.arm(point, 1, CrashAction::Halt);
            let work = async {
                if point.starts_with("evict") {
                    node.node.tenancy.trim_cache().await;
                } else {
                    let _ = prefetch(&node, "acme").await;
                }
            };
            tokio::select! {
                biased;
                () = node.crash.crashed() => {}
                () = work => panic!("{point} was never reached"),
            }
            node.crash().await;
            let node = world.start().await;
            if next == "prefetch" {
                let answer = prefetch(&node, "acme").await.unwrap();
                assert!(answer.cached, "{point}: {answer:?}");
            }
            let claim = claimed(&node, "acme").await;
            assert_eq!(node.read(&claim, "file").as_deref(), Some("content"), "{point}, then {next}");
            node.write(&claim, "file", "newer");
            durable(&node, "acme").await;
            node.check_no_leaks(&world).await;
            let node = on_a_fresh_disk(&world, node).await;
            check_claim(&node, "acme", StateSource::Store, "newer").await;
        }
    }
}
