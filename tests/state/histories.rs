//! Rollback, fork, collection, erasure and verification over a store that fails at
//! each call: nothing is lost, and a repetition succeeds.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use boilerhouse::{
    clock::{Clock as _, SystemClock},
    model::{Epoch, Key},
    state::{
        Error as StateError, FillFrom, SaveTree, SlotFiles,
        fence::{Mode, owner},
        history::{
            Entry, EntryKind, Error, Fork, History, Keep, Proof, Rollback,
            verify::{Progress, Report},
        },
    },
};

use crate::{
    changes::let_the_clock_tick,
    places::Place,
    support::{Later, MemoryStore, Node, Strike, key, newest, save, slot, some_tree, write},
};

const STRIKES: [Strike; 3] = [Strike::Unavailable, Strike::UnknownDone, Strike::UnknownNotDone];
const ALL: Keep = Keep { last: 100, days: 0 };

/// Of the server whose saves the nodes make: another one's would begin with an `open`.
fn history(store: &Arc<MemoryStore>) -> History {
    History::new(Arc::<MemoryStore>::clone(store), Arc::new(Later), "node".to_owned())
}

/// Claims, changes the tree, releases.
async fn round(node: &Node, key: &Key, epoch: u64, change: impl FnOnce(&Path)) {
    let slot = slot(&format!("slot-{}-{epoch}", key.tenant));
    let from = match node.files.newest(key).await.unwrap() {
        None => FillFrom::Empty,
        Some(snapshot) if !node.cache_path(key).exists() => FillFrom::Snapshot(snapshot),
        Some(_) => FillFrom::Cache,
    };
    node.claim(&slot, key, epoch, from).await.unwrap();
    change(&node.state_path(&slot));
    node.release(&slot, key, epoch, &format!("n{epoch}")).await;
}

/// A store with three snapshots of tenant `t`, whose file `f` holds the number.
async fn three(store: &Arc<MemoryStore>) -> Node {
    let node = Node::new(store);
    for epoch in 1..=3 {
        round(&node, &key("t"), epoch, |root| {
            if epoch == 1 {
                some_tree(root);
            }
            write(root, "f", format!("{epoch}").as_bytes());
        })
        .await;
    }
    node
}

/// Fills a slot of a fresh node from the newest snapshot, and reads `f`.
async fn read_f(store: &Arc<MemoryStore>, key: &Key) -> String {
    let tree = Node::new(store).restored(&slot("reader"), key, 1_000).await;
    assert_eq!(tree[&b"dir/b.txt"[..]].content, b"beta", "what never changed is there");
    assert_eq!(tree[&b"big.bin"[..]].content.len(), 1_200_000);
    String::from_utf8(tree[&b"f"[..]].content.clone()).unwrap()
}

fn rollback(snapshot: u64, nonce: &str) -> Rollback {
    Rollback { key: key("t"), snapshot, epoch: Epoch(4), nonce: nonce.to_owned() }
}

fn fork(nonce: &str) -> Fork {
    Fork { from: key("t"), to: key("new"), snapshot: Some(2), nonce: nonce.to_owned() }
}

async fn entries(history: &History, key: &Key) -> Vec<Entry> {
    history.list(key, None, 100).await.unwrap().snapshots
}

async fn verified(history: &History) -> Report {
    history.verify_all(&mut |_: Progress| {}).await.unwrap()
}

#[tokio::test]
async fn an_old_tree_becomes_the_newest_and_one_can_go_back_from_it() {
    back_and_forth(&Place::Memory).await;
}

pub(crate) async fn back_and_forth(place: &Place) {
    let store = place.store();
    let node = three(&store).await;
    let history = history(&store);
    let done = history.restore(&rollback(1, "r1")).await.unwrap();
    assert_eq!((done.snapshot.number, done.epoch, done.from), (4, Epoch(4), 1));
    assert_eq!(read_f(&store, &key("t")).await, "1");
    let listed = entries(&history, &key("t")).await;
    let shown: Vec<_> =
        listed.iter().map(|entry| (entry.number, entry.kind, entry.restored_from, entry.current)).collect();
    let saved = |number| (number, EntryKind::Snapshot, None, false);
    assert_eq!(shown, [(4, EntryKind::Restore, Some(1), true), saved(3), saved(2), saved(1)]);
    history.restore(&Rollback { epoch: Epoch(5), ..rollback(3, "r2") }).await.unwrap();
    assert_eq!(read_f(&store, &key("t")).await, "3");
    // A claim of before is fenced.
    let late = node.files.save(&save(&key("t"), 3, "late")).await;
    assert!(matches!(late, Err(StateError::Fenced { newest: Epoch(5), .. })), "{late:?}");
    let pages = history.list(&key("t"), None, 2).await.unwrap();
    assert_eq!((pages.snapshots.len(), pages.next), (2, Some(4)));
    let rest = history.list(&key("t"), pages.next, 100).await.unwrap();
    assert_eq!(rest.snapshots.iter().map(|entry| entry.number).collect::<Vec<_>>(), [3, 2, 1]);
    for asked in [0, 6, u64::MAX] {
        let error = history.restore(&rollback(asked, "r3")).await.unwrap_err();
        assert!(error.to_string().contains("there are 1 to 5"), "{error}");
    }
    let none = history.restore(&Rollback { key: key("nobody"), ..rollback(1, "r") }).await.unwrap_err();
    assert!(none.to_string().contains("there is none"), "{none}");
}

#[tokio::test]
async fn a_rollback_that_fails_at_any_call_is_done_once_when_repeated() {
    for strike in STRIKES {
        let mut struck = 0;
        for nth in 1.. {
            let store = Arc::new(MemoryStore::default());
            three(&store).await;
            store.strike(nth, strike);
            let first = history(&store).restore(&rollback(1, "r1")).await;
            if !store.has_struck() {
                first.unwrap();
                break;
            }
            struck += 1;
            let now = read_f(&store, &key("t")).await;
            assert!(now == "3" || now == "1", "{strike:?} at {nth}: {now}");
            let done = history(&store).restore(&rollback(1, "r1")).await.unwrap();
            assert_eq!(done.snapshot.number, 4, "{strike:?} at {nth}: one nonce, one record");
            assert_eq!(read_f(&store, &key("t")).await, "1", "{strike:?} at {nth}");
        }
        assert!(struck >= 8, "only {struck} calls were struck");
    }
}

/// P1: what another server has claimed is not rolled back, nor erased.
#[tokio::test]
async fn a_key_that_is_held_elsewhere_is_left_alone() {
    let store = Arc::new(MemoryStore::default());
    three(&store).await;
    let (name, body) = store
        .objects
        .lock()
        .unwrap()
        .iter()
        .find(|(name, _)| name.contains("/r/"))
        .map(|(name, body)| (name.clone(), serde_json::from_slice::<serde_json::Value>(body).unwrap()))
        .unwrap();
    let mut held = body;
    held["holder"] = serde_json::json!({ "server": "there", "epoch": 3 });
    store.objects.lock().unwrap().insert(name, serde_json::to_vec(&held).unwrap().into());
    let term = held["term"].as_u64().unwrap_or(0);
    let before = store.objects.lock().unwrap().clone();
    let shared = || history(&store).in_mode(Mode::Shared);
    let restored = shared().restore(&rollback(1, "r1")).await;
    assert!(matches!(restored, Err(Error::ClaimedElsewhere { .. })), "{restored:?}");
    let workloads = BTreeSet::from([key("t").workload]);
    let erased = shared().erase(&key("t").tenant, &workloads, |_| Epoch(9), "e").await;
    assert!(matches!(erased, Err(Error::ClaimedElsewhere { .. })), "{erased:?}");
    assert_eq!(*store.objects.lock().unwrap(), before);

    // Whoever works alone holds the store: what a server of before has left open is void.
    let alone = history(&store).restore(&rollback(1, "r1")).await.unwrap();
    assert_eq!(alone.from, 1);
    // Among several, once the store has passed on from that server.
    *store.objects.lock().unwrap() = before;
    let now_ms = SystemClock.unix_ms();
    let take = async |server: &str| {
        owner::take(&*store, server, Mode::Shared, server, now_ms).await.unwrap();
    };
    take("there").await;
    assert!(term < 1, "the record is older than the first term");
    let restored = shared().restore(&rollback(1, "r2")).await;
    assert!(
        matches!(restored, Err(Error::ClaimedElsewhere { .. })),
        "it holds the store still: {restored:?}"
    );
    owner::release(&*store, "there", Mode::Shared, "there", now_ms).await.unwrap();
    take("node").await;
    assert_eq!(shared().restore(&rollback(1, "r3")).await.unwrap().from, 1);
}

#[tokio::test]
async fn a_fork_that_fails_at_any_call_is_whole_when_repeated() {
    for strike in STRIKES {
        let mut struck = 0;
        for nth in 1.. {
            let store = Arc::new(MemoryStore::default());
            three(&store).await;
            store.strike(nth, strike);
            let first = history(&store).fork(&fork("f1")).await;
            if !store.has_struck() {
                assert_eq!(first.unwrap().from, 2);
                break;
            }
            struck += 1;
            let done = history(&store).fork(&fork("f1")).await.unwrap();
            assert_eq!((done.snapshot.number, done.epoch), (1, Epoch(1)), "{strike:?} at {nth}");
            assert_eq!(read_f(&store, &key("new")).await, "2", "{strike:?} at {nth}");
            assert_eq!(read_f(&store, &key("t")).await, "3", "{strike:?} at {nth}");
            let again = history(&store).fork(&fork("f2")).await;
            assert!(matches!(again, Err(Error::Exists { .. })), "{again:?}");
        }
        assert!(struck >= 12, "only {struck} calls were struck");
    }
}

/// The copy lives on its own: its first saves and the end of its source change nothing.
#[tokio::test]
async fn a_fork_and_its_source_need_nothing_of_each_other() {
    a_fork_lives_alone(&Place::Memory).await;
}

pub(crate) async fn a_fork_lives_alone(place: &Place) {
    let store = place.store();
    let node = three(&store).await;
    let history = history(&store);
    history.fork(&fork("f1")).await.unwrap();
    let erased = history.erase(&key("t").tenant, &BTreeSet::new(), |_| Epoch(3), "e").await.unwrap();
    assert_eq!(erased.workloads, [key("t").workload]);
    assert_eq!(read_f(&store, &key("new")).await, "2");
    for epoch in 2..=4 {
        round(&node, &key("new"), epoch, |root| write(root, "f", format!("new {epoch}").as_bytes())).await;
    }
    history.collect(&key("new"), Keep { last: 1, days: 0 }).await.unwrap();
    assert_eq!(read_f(&store, &key("new")).await, "new 4");
    let report = verified(&history).await;
    assert!(report.is_sound() && report.orphaned.is_empty(), "{report:?}");
}

#[tokio::test]
async fn a_source_that_is_collected_meanwhile_gives_no_half_fork() {
    let store = Arc::new(MemoryStore::default());
    three(&store).await;
    for part in ["/p/", "/c/"] {
        let name = store.names(part).remove(0);
        let body = store.objects.lock().unwrap().remove(&name).unwrap();
        let forked = history(&store).fork(&Fork { snapshot: Some(1), ..fork("f1") }).await;
        assert!(matches!(forked, Err(Error::State(StateError::Damaged { .. }))), "{part}: {forked:?}");
        assert_eq!(Node::new(&store).files.newest(&key("new")).await.unwrap(), None, "{part}");
        store.objects.lock().unwrap().insert(name, body);
    }
    history(&store).fork(&fork("f1")).await.unwrap();
    assert_eq!(read_f(&store, &key("new")).await, "2");
}

#[tokio::test]
async fn a_collection_that_fails_at_any_call_loses_nothing_and_ends_when_repeated() {
    for strike in STRIKES {
        let mut struck = 0;
        for nth in 1.. {
            let store = Arc::new(MemoryStore::default());
            three(&store).await;
            let hash = "0".repeat(64);
            let orphan = format!("t/{}/p/{:016x}-{hash}", key("t").digest(), 1);
            store.objects.lock().unwrap().insert(orphan.clone(), bytes::Bytes::from_static(b"x"));
            store.strike(nth, strike);
            let keep = Keep { last: 1, days: 0 };
            let first = history(&store).collect(&key("t"), keep).await;
            let has_struck = store.has_struck();
            assert_eq!(read_f(&store, &key("t")).await, "3", "{strike:?} at {nth}");
            assert!(verified(&history(&store)).await.is_sound(), "{strike:?} at {nth}");
            history(&store).collect(&key("t"), keep).await.unwrap();
            assert!(!store.names("").contains(&orphan), "{strike:?} at {nth}");
            assert_eq!(store.names("/m/").len(), 1, "{strike:?} at {nth}");
            let listed = entries(&history(&store), &key("t")).await;
            assert_eq!(listed.iter().map(|entry| entry.number).collect::<Vec<_>>(), [3], "1 has no tree");
            let gone = history(&store).restore(&rollback(1, "r")).await.unwrap_err();
            assert!(gone.to_string().contains("there are 3 to 3"), "{gone}");
            if !has_struck {
                let collected = first.unwrap();
                assert_eq!(collected.records, 1);
                assert!(collected.objects >= 3, "{collected:?}");
                break;
            }
            struck += 1;
        }
        assert!(struck >= 10, "only {struck} calls were struck");
    }
}

/// What is restored is kept, wherever it came from.
#[tokio::test]
async fn collection_keeps_the_tree_that_a_rollback_points_at() {
    a_rolled_back_tree_is_kept(&Place::Memory).await;
}

pub(crate) async fn a_rolled_back_tree_is_kept(place: &Place) {
    let store = place.store();
    let node = three(&store).await;
    let history = history(&store);
    history.restore(&rollback(1, "r1")).await.unwrap();
    node.files.discard(&key("t")).await.unwrap();
    history.collect(&key("t"), Keep { last: 1, days: 0 }).await.unwrap();
    assert_eq!(read_f(&store, &key("t")).await, "1");
    round(&node, &key("t"), 5, |root| write(root, "g", b"g")).await;
    history.collect(&key("t"), Keep { last: 1, days: 0 }).await.unwrap();
    assert_eq!(read_f(&store, &key("t")).await, "1");
    assert!(verified(&history).await.is_sound());
}

#[tokio::test]
async fn a_pack_that_is_mostly_dead_is_written_anew() {
    let store = Arc::new(MemoryStore::default());
    let node = Node::new(&store);
    round(&node, &key("t"), 1, |root| {
        write(root, "keep", &[1; 1_000]);
        write(root, "dead", &[2; 10_000]);
    })
    .await;
    round(&node, &key("t"), 2, |root| std::fs::remove_file(root.join("dead")).unwrap()).await;
    assert_eq!(store.names("/p/").len(), 1, "all of the pack was needed when 2 looked");
    round(&node, &key("t"), 3, |_| {}).await;
    history(&store).collect(&key("t"), Keep { last: 1, days: 0 }).await.unwrap();
    let packs = store.names("/p/");
    assert!(packs.len() == 1 && packs[0].contains("/p/0000000000000003-"), "{packs:?}");
    let tree = Node::new(&store).restored(&slot("x"), &key("t"), 4).await;
    assert_eq!(tree[&b"keep"[..]].content, [1; 1_000]);
}

/// A checkpoint has no copy of what did not change, and cannot pack that anew; the one
/// after it has.
#[tokio::test]
async fn a_worn_pack_stops_no_checkpoint_and_is_written_anew_by_the_next() {
    let store = Arc::new(MemoryStore::default());
    let node = Node::new(&store);
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    for name in ["keep-1", "keep-2", "dead"] {
        write(&root, name, &name.as_bytes().repeat(if name == "dead" { 5_000 } else { 100 }));
    }
    let mut packs = Vec::new();
    for round in 0..5 {
        if round == 1 {
            std::fs::remove_file(root.join("dead")).unwrap();
        }
        let_the_clock_tick(node.dir.path());
        let id = node.files.copy_live(&one, &key).await.unwrap();
        node.files.copy_paused(&id).await.unwrap();
        let mut saving = save(&key, 1, &format!("n{round}"));
        saving.tree = SaveTree::Checkpoint(id.clone());
        let saved = node.files.save(&saving).await.unwrap();
        node.files.drop_checkpoint(&id).await.unwrap();
        packs.push((store.names("/p/").len(), saved.sent_bytes > 0));
        let found = Node::new(&store).restored(&slot("x"), &key, 2).await;
        assert!(found == crate::support::tree(&root), "round {round}");
    }
    // All new; without `dead`; the same, carried on; packed anew; nothing to do.
    assert_eq!(packs, [(1, true), (1, true), (1, false), (2, true), (2, false)]);
}

#[tokio::test]
async fn an_erasure_that_fails_at_any_call_is_complete_when_repeated() {
    for strike in STRIKES {
        let mut struck = 0;
        for nth in 1.. {
            let store = Arc::new(MemoryStore::default());
            let node = three(&store).await;
            round(&node, &key("other"), 1, |root| {
                some_tree(root);
                write(root, "f", b"other");
            })
            .await;
            // A server that was cut off goes on with a claim of before.
            let stale = Node::new(&store);
            stale.restored(&slot("stale"), &key("t"), 3).await;
            stale.files.capture(&slot("stale"), &key("t")).await.unwrap();
            let nobody_knows = BTreeSet::new();
            store.strike(nth, strike);
            let first = history(&store).erase(&key("t").tenant, &nobody_knows, |_| Epoch(3), "e").await;
            let has_struck = store.has_struck();
            if !has_struck {
                let erased = first.unwrap();
                assert_eq!((erased.workloads.len(), erased.proof), (1, Proof::EmptyListing));
                assert!(erased.objects >= 8, "{erased:?}");
            } else {
                struck += 1;
                let left = store.names(&key("t").digest());
                if left.len() > 1 && store.names("/r/").iter().any(|name| name.ends_with("fffffffffffffffb"))
                {
                    let late = stale.files.save(&save(&key("t"), 3, "late")).await;
                    assert!(matches!(late, Err(StateError::Fenced { .. })), "{strike:?} at {nth}: {late:?}");
                }
                history(&store).erase(&key("t").tenant, &nobody_knows, |_| Epoch(3), "e").await.unwrap();
            }
            assert_eq!(store.names(&key("t").digest()), Vec::<String>::new(), "{strike:?} at {nth}");
            assert_eq!(store.names("k/").len(), 1, "{strike:?} at {nth}: the other tenant's");
            assert_eq!(node.files.newest(&key("t")).await.unwrap(), None, "{strike:?} at {nth}");
            assert_eq!(read_f(&store, &key("other")).await, "other", "{strike:?} at {nth}");
            if !has_struck {
                break;
            }
        }
        assert!(struck >= 12, "only {struck} calls were struck");
    }
}

#[tokio::test]
async fn verification_finds_what_is_missing_damaged_and_in_no_use() {
    let store = Arc::new(MemoryStore::default());
    let node = three(&store).await;
    round(&node, &key("other"), 1, some_tree).await;
    history(&store).restore(&rollback(1, "r1")).await.unwrap();
    let whole = verified(&history(&store)).await;
    assert_eq!((whole.keys, whole.orphaned.len()), (2, 0), "{whole:?}");
    assert!(whole.is_sound() && whole.files >= 7 && whole.bytes > 100_000, "{whole:?}");
    let objects = store.objects.lock().unwrap().clone();
    for (name, body) in &objects {
        if name.starts_with("k/") {
            continue;
        }
        store.objects.lock().unwrap().insert(name.clone(), [&body[..], b"!"].concat().into());
        let report = verified(&history(&store)).await;
        assert!(!report.is_sound(), "{name} has other bytes");
        store.objects.lock().unwrap().remove(name);
        let report = verified(&history(&store)).await;
        if name.contains("/r/") {
            // A chain without one of its links has lost a snapshot, not an object of one.
            assert!(report.damaged.is_empty(), "{name}: {report:?}");
        } else {
            assert_eq!(report.missing.iter().map(|f| &f.object).collect::<BTreeSet<_>>().len(), 1, "{name}");
            assert!(report.missing.iter().all(|finding| finding.object == *name), "{name}: {report:?}");
        }
        store.objects.lock().unwrap().insert(name.clone(), body.clone());
    }
    let orphan = format!("t/{}/c/{:016x}-{}", key("t").digest(), 1, "1".repeat(64));
    let nobodys = format!("t/{}/p/{:016x}-{}", "0".repeat(32), 1, "1".repeat(64));
    for name in [&orphan, &nobodys] {
        store.objects.lock().unwrap().insert(name.clone(), bytes::Bytes::from_static(b"x"));
    }
    let report = verified(&history(&store)).await;
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(report.orphaned.iter().collect::<BTreeSet<_>>(), BTreeSet::from([&orphan, &nobodys]));
    let one = history(&store).verify(&[key("other")], &mut |_| {}).await.unwrap();
    assert_eq!((one.keys, one.snapshots, one.orphaned.len()), (1, 1, 0));
    assert_eq!(newest(&node, &key("t")).await.number, 4);
    history(&store).collect(&key("t"), ALL).await.unwrap();
    assert_eq!(verified(&history(&store)).await.orphaned, [nobodys]);
}
