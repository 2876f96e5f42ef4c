//! The layout `mirror`: plain objects that come back as the whole tree, on every store;
//! saves that end anywhere, foreign changes, deletions, history, another layout.

use std::{
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::Path,
    sync::Arc,
};

use boilerhouse::{
    clock::SystemClock,
    model::{Epoch, Key, spec::Layout},
    seal::MasterKey,
    state::{
        Encryption, Error, FillFrom, Save, SlotFiles,
        history::{self, Fork, History, Keep, Rollback},
    },
    store::{FaultStore, LocalStore, S3Store, SharedStore, Store, fault::Rule, s3::Limits},
};
use bytes::Bytes;

use crate::{
    nth::{AnyNode, faults},
    radosgw::Radosgw,
    s3_server::{BUCKET, S3Server},
    support::{
        MemoryStore, Node, RUN_AS, Tree, key, newest, save, slot, some_tree, tree, without_root_time, write,
    },
};

fn mirrored(key: &Key, epoch: u64, nonce: &str) -> Save {
    let mut saving = save(key, epoch, nonce);
    saving.persist.layout = Layout::Mirror;
    saving
}

/// Names that a store, a library or a listing could alter.
fn odd_names(root: &Path) {
    for name in [
        "with space",
        " at both ends ",
        "100%",
        "a=b",
        "=20",
        "q?x#y&z",
        "plus+semi;",
        "<xml>",
        "\u{e4}\u{65e5}",
        "tab\tnew\nline",
        "back\\slash",
        "....",
        "\u{a0}\u{2028}",
        "quote\"'`",
    ] {
        write(root, name, name.as_bytes());
    }
    let bytes = std::ffi::OsStr::from_bytes(b"not-utf8-\xff\xfe");
    std::fs::write(root.join(bytes), b"bytes").unwrap();
    write(root, &format!("{}/{}", "l".repeat(255), "m".repeat(255)), b"long");
    write(root, &vec!["deep".repeat(40); 8].join("/"), b"deep");
    write(root, "empty file", b"");
    std::fs::hard_link(root.join("with space"), root.join("zz same")).unwrap();
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(9 << 20).unwrap();
    sparse.write_all_at(b"in the middle", 5 << 20).unwrap();
    rustix::fs::fsetxattr(&sparse, "user.of", b"sparse", rustix::fs::XattrFlags::empty()).unwrap();
}

fn fault_store(store: SharedStore) -> Arc<FaultStore> {
    FaultStore::new(store)
}

async fn capture(node: &AnyNode, slot_name: &str, key: &Key) -> Tree {
    let slot = slot(slot_name);
    let expected = without_root_time(tree(&node.state(&slot)));
    node.files.capture(&slot, key).await.unwrap();
    node.files.wipe(&slot).await.unwrap();
    expected
}

/// Everything comes back on another server, through names that look like the files'.
async fn roundtrip(name: &str, store: SharedStore) {
    let store = fault_store(store);
    let node = AnyNode::new(&store);
    let key = key(&format!("mirror-{name}"));
    node.claim(&slot("one"), &key, 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state(&slot("one")));
    odd_names(&node.state(&slot("one")));
    let expected = capture(&node, "one", &key).await;
    node.files.save(&mirrored(&key, 1, "n1")).await.unwrap();
    let plain = format!("t/{}/f/", key.digest());
    for (path, content) in [("a.txt", "alpha"), ("with space", "with space"), ("100=25", "100%")] {
        let body = store.get(&format!("{plain}{path}")).await.unwrap();
        assert_eq!(body, Some(Bytes::from(content)), "{name}: {path}");
    }
    let other = AnyNode::new(&store);
    let restored = other.restored(&slot("two"), &key, 2).await.unwrap();
    assert_eq!(restored, expected, "{name}");

    // A change, a deletion, a file where a directory was.
    let state = other.state(&slot("two"));
    write(&state, "a.txt", b"ALPHA");
    std::fs::remove_dir_all(state.join("dir")).unwrap();
    write(&state, "dir", b"a file now");
    std::fs::remove_file(state.join("100%")).unwrap();
    let expected = capture(&other, "two", &key).await;
    let saved = other.files.save(&mirrored(&key, 2, "n2")).await.unwrap();
    // Where a file system's times say nothing everything is read, and still only changes are sent.
    assert!(saved.sent_bytes < 20_000, "{name}: {} bytes were sent", saved.sent_bytes);
    assert_eq!(store.get(&format!("{plain}100=25")).await.unwrap(), None, "{name}: deletions are mirrored");
    assert_eq!(store.get(&format!("{plain}dir/b.txt")).await.unwrap(), None, "{name}");
    assert_eq!(store.list(&format!("t/{}/o/", key.digest()), None, 1).await.unwrap(), [], "{name}");
    let third = AnyNode::new(&store);
    assert_eq!(third.restored(&slot("three"), &key, 3).await.unwrap(), expected, "{name}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_comes_back_from_a_local_store() {
    let dir = tempfile::tempdir().unwrap();
    roundtrip("local", Arc::new(LocalStore::open(dir.path().join("store")).unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_comes_back_from_an_s3_server_in_process() {
    let server = S3Server::start().await;
    let store =
        S3Store::connect(BUCKET, "m", &server.aws(), Limits::default(), Arc::new(SystemClock)).unwrap();
    roundtrip("s3", Arc::new(store)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_comes_back_from_radosgw() {
    let s3 = Radosgw::find();
    let prefix = format!("mirror-{}", boilerhouse::clock::random_hex(&SystemClock, 8));
    let clock = Arc::new(SystemClock);
    let store = S3Store::connect(&s3.bucket, &prefix, &s3.aws, Limits::default(), clock).unwrap();
    roundtrip("radosgw", Arc::new(store)).await;
}

/// A save that ends at any call, whatever became of that call, leaves the whole old tree
/// for another server or the whole new one; the repetition completes the new one.
#[tokio::test(flavor = "multi_thread")]
async fn p2_p3_a_save_that_ends_anywhere_leaves_no_mixture() {
    let store = fault_store(Arc::new(boilerhouse::store::MemoryStore::new()));
    for (kind, fault) in faults().into_iter().enumerate() {
        let mut struck = 0;
        for nth in 1.. {
            let when = format!("{fault:?}, call {nth}");
            let key = key(&format!("t{kind}-{nth}"));
            let node = AnyNode::new(&store);
            node.claim(&slot("one"), &key, 1, FillFrom::Empty).await.unwrap();
            let root = node.state(&slot("one"));
            some_tree(&root);
            write(&root, "same", b"same");
            write(&root, "gone", b"gone");
            let old = capture(&node, "one", &key).await;
            node.files.save(&mirrored(&key, 1, "n1")).await.unwrap();
            node.claim(&slot("two"), &key, 2, FillFrom::Cache).await.unwrap();
            let root = node.state(&slot("two"));
            write(&root, "a.txt", b"OTHER");
            write(&root, "big.bin", &vec![9; 1_500_000]);
            write(&root, "new", b"new");
            std::fs::remove_file(root.join("gone")).unwrap();
            let new = capture(&node, "two", &key).await;

            let before = store.all_calls();
            store.add(Rule::next(fault.clone()).nth(nth));
            let first = node.files.save(&mirrored(&key, 2, "n2")).await;
            store.clear();
            let is_struck = store.all_calls() - before >= nth;
            let other = AnyNode::new(&store);
            let found = other.restored(&slot("other"), &key, 2).await;
            let found = found.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            assert!(found == old || found == new, "{when}: a mixture");
            if first.is_ok() {
                assert_eq!(found, new, "{when}: acknowledged, and not there");
            }
            if nth % 2 == 0 {
                store.land().await.unwrap();
            }
            let again = node.files.save(&mirrored(&key, 2, "n2")).await;
            again.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            store.land().await.unwrap();
            let third = AnyNode::new(&store);
            assert_eq!(third.restored(&slot("third"), &key, 3).await.unwrap(), new, "{when}");
            // The next save of any tree cleans up whatever was left.
            write(&third.state(&slot("third")), "last", b"last");
            let last = capture(&third, "third", &key).await;
            third.files.save(&mirrored(&key, 3, "n3")).await.unwrap();
            let fourth = AnyNode::new(&store);
            assert_eq!(fourth.restored(&slot("fourth"), &key, 4).await.unwrap(), last, "{when}");
            let report = history(&store).verify(std::slice::from_ref(&key), &mut |_| {}).await.unwrap();
            assert!(report.is_sound(), "{when}: {report:?}");
            assert_eq!(report.orphaned, Vec::<String>::new(), "{when}");
            assert_eq!(store.list(&format!("t/{}/o/", key.digest()), None, 1).await.unwrap(), [], "{when}");
            struck += u64::from(is_struck);
            if !is_struck {
                first.unwrap_or_else(|error| panic!("{when}, not struck: {error:?}"));
                break;
            }
        }
        assert!(struck >= 15, "{fault:?}: only {struck} calls");
    }
}

fn history(store: &Arc<FaultStore>) -> History {
    let store: SharedStore = Arc::<FaultStore>::clone(store);
    History::new(store, Arc::new(SystemClock), "node".to_owned())
}

/// A server dies between its objects and its record, another one goes on with the old
/// tree, and what the dead one had overwritten is written again.
#[tokio::test]
async fn what_a_dead_save_has_overwritten_is_whole_for_the_next_server() {
    let store = Arc::new(MemoryStore::default());
    let (dead, next) = (Node::new(&store), Node::new(&store));
    let key = key("t");
    dead.claim(&slot("one"), &key, 1, FillFrom::Empty).await.unwrap();
    write(&dead.state_path(&slot("one")), "f", b"first");
    write(&dead.state_path(&slot("one")), "g", b"kept");
    dead.files.capture(&slot("one"), &key).await.unwrap();
    dead.files.save(&mirrored(&key, 1, "n1")).await.unwrap();
    dead.files.wipe(&slot("one")).await.unwrap();
    let committed = store.objects.lock().unwrap().clone();
    dead.claim(&slot("two"), &key, 2, FillFrom::Cache).await.unwrap();
    write(&dead.state_path(&slot("two")), "f", b"other");
    dead.files.capture(&slot("two"), &key).await.unwrap();
    dead.files.save(&mirrored(&key, 2, "n2")).await.unwrap();
    // What the store had just before the record: objects overwritten, the old one aside.
    let plain = format!("t/{}/f/f", key.digest());
    let aside = format!("t/{}/o/{:016x}-{}", key.digest(), 2, "0".repeat(64));
    {
        let mut objects = store.objects.lock().unwrap();
        let overwritten = objects[&plain].clone();
        *objects = committed;
        let old = objects.insert(plain.clone(), overwritten).unwrap();
        objects.insert(aside.clone(), old);
    }
    let found = next.restored(&slot("three"), &key, 3).await;
    assert_eq!(found[&b"f"[..]].content, b"first");
    // It saves without touching f: the object is written again all the same.
    write(&next.state_path(&slot("three")), "h", b"third");
    next.files.capture(&slot("three"), &key).await.unwrap();
    next.files.save(&mirrored(&key, 3, "n3")).await.unwrap();
    assert_eq!(store.objects.lock().unwrap()[&plain], &b"first"[..]);
    assert_eq!(store.names("/o/"), Vec::<String>::new());
    // Without what was copied aside, the mixture is refused and the object named.
    store.objects.lock().unwrap().insert(plain.clone(), Bytes::from_static(b"fIrst"));
    let error =
        Node::new(&store).claim(&slot("s"), &key, 4, FillFrom::Snapshot(newest(&next, &key).await)).await;
    let Err(Error::Damaged { reason, .. }) = error else { panic!("{error:?}") };
    assert!(reason.contains(&plain) && reason.contains("state import --mirror"), "{reason}");
}

/// Foreign tools: a changed, a removed and an added object.
#[tokio::test]
async fn what_others_change_in_the_bucket_is_refused_by_name_and_found_by_verify() {
    for change in ["changed", "longer", "shorter", "removed"] {
        let store = Arc::new(MemoryStore::default());
        let node = Node::new(&store);
        let key = key("t");
        node.claim(&slot("one"), &key, 1, FillFrom::Empty).await.unwrap();
        some_tree(&node.state_path(&slot("one")));
        node.files.capture(&slot("one"), &key).await.unwrap();
        node.files.save(&mirrored(&key, 1, "n1")).await.unwrap();
        let name = format!("t/{}/f/big.bin", key.digest());
        let stray = format!("t/{}/f/stray", key.digest());
        {
            let mut objects = store.objects.lock().unwrap();
            let mut body = objects[&name].to_vec();
            match change {
                "changed" => body[1_000_000] ^= 1,
                "longer" => body.push(0),
                _ => _ = body.pop(),
            }
            if change == "removed" {
                objects.remove(&name);
            } else {
                objects.insert(name.clone(), body.into());
            }
            objects.insert(stray.clone(), Bytes::from_static(b"stray"));
        }
        let other = Node::new(&store);
        let from = FillFrom::Snapshot(newest(&other, &key).await);
        let error = other.claim(&slot("two"), &key, 2, from).await.unwrap_err();
        let Error::Damaged { reason, .. } = &error else { panic!("{change}: {error:?}") };
        assert!(reason.contains(&name), "{change}: {reason}");
        assert_eq!(tree(&other.state_path(&slot("two"))).len(), 1, "{change}: nothing is in the slot");
        let history = History::new(store.clone(), Arc::new(SystemClock), "node".to_owned());
        let report = history.verify(std::slice::from_ref(&key), &mut |_| {}).await.unwrap();
        let found = if change == "removed" { &report.missing } else { &report.damaged };
        assert_eq!(
            found.iter().map(|it| it.object.as_str()).collect::<Vec<_>>(),
            [name.as_str()],
            "{change}"
        );
        assert_eq!(report.orphaned, std::slice::from_ref(&stray), "{change}");
        let fork =
            Fork { from: key.clone(), to: crate::support::key("u"), snapshot: None, nonce: "f".into() };
        let forked = history.fork(&fork).await;
        assert_eq!(forked.is_err(), change != "changed", "{change}: a fork looks at sizes only: {forked:?}");
    }
}

/// Only the newest of several mirrors can be restored, and the error says so.
#[tokio::test]
async fn history_forks_and_erasure_know_mirrors() {
    let store = Arc::new(MemoryStore::default());
    let node = Node::new(&store);
    let key = key("t");
    let mut trees = Vec::new();
    for epoch in 1..=3 {
        let slot = slot(&format!("slot-{epoch}"));
        let from = if epoch == 1 { FillFrom::Empty } else { FillFrom::Cache };
        node.claim(&slot, &key, epoch, from).await.unwrap();
        write(&node.state_path(&slot), "f", &[epoch as u8]);
        write(&node.state_path(&slot), &format!("only-{epoch}"), b"x");
        trees.push(without_root_time(tree(&node.state_path(&slot))));
        node.files.capture(&slot, &key).await.unwrap();
        node.files.save(&mirrored(&key, epoch, &format!("n{epoch}"))).await.unwrap();
        node.files.wipe(&slot).await.unwrap();
    }
    let history = History::new(store.clone(), Arc::new(SystemClock), "node".to_owned());
    assert_eq!(history.list(&key, None, 10).await.unwrap().snapshots.len(), 3);
    let back = |snapshot| Rollback { key: key.clone(), snapshot, epoch: Epoch(9), nonce: "back".into() };
    let error = history.restore(&back(2)).await.unwrap_err();
    assert!(matches!(&error, history::Error::Mirrored { asked: 2, newest: Some(3), .. }), "{error:?}");
    assert!(error.to_string().contains("the newest is 3"), "{error}");
    let to = crate::support::key("u");
    let fork = Fork { from: key.clone(), to: to.clone(), snapshot: None, nonce: "fork".into() };
    history.fork(&fork).await.unwrap();
    assert_eq!(without_root_time(Node::new(&store).restored(&slot("x"), &to, 5).await), trees[2]);
    history.restore(&back(3)).await.unwrap();
    assert_eq!(without_root_time(Node::new(&store).restored(&slot("y"), &key, 10).await), trees[2]);
    assert!(history.verify_all(&mut |_| {}).await.unwrap().is_sound());
    let erased = history.erase(&key.tenant, &Default::default(), |_| Epoch(20), "erase").await.unwrap();
    assert!(erased.objects >= 4);
    assert_eq!(store.names(&format!("t/{}/", key.digest())), Vec::<String>::new());
    assert_eq!(
        without_root_time(Node::new(&store).restored(&slot("z"), &to, 6).await),
        trees[2],
        "the fork stays"
    );
}

/// To the mirror and back: each save is whole in its layout, and the plain objects go
/// when no record needs them.
#[tokio::test]
async fn another_layout_begins_with_the_next_save() {
    let store = Arc::new(MemoryStore::default());
    let node = Node::new(&store);
    let key = key("t");
    let history = History::new(store.clone(), Arc::new(SystemClock), "node".to_owned());
    let layouts = [Layout::Snapshot, Layout::Mirror, Layout::Mirror, Layout::Snapshot, Layout::Mirror];
    for (epoch, layout) in (1..).zip(layouts) {
        let slot = slot(&format!("slot-{epoch}"));
        let from = if epoch == 1 { FillFrom::Empty } else { FillFrom::Cache };
        node.claim(&slot, &key, epoch, from).await.unwrap();
        if epoch == 1 {
            some_tree(&node.state_path(&slot));
        }
        write(&node.state_path(&slot), "f", &[epoch as u8]);
        let expected = without_root_time(tree(&node.state_path(&slot)));
        node.files.capture(&slot, &key).await.unwrap();
        let mut saving = save(&key, epoch, &format!("n{epoch}"));
        saving.persist.layout = layout;
        node.files.save(&saving).await.unwrap();
        node.files.wipe(&slot).await.unwrap();
        let other = Node::new(&store);
        assert_eq!(without_root_time(other.restored(&slot, &key, epoch + 1).await), expected, "{epoch}");
        history.collect(&key, Keep { last: 10, days: 0 }).await.unwrap();
        let plain = store.names("/f/").len();
        assert_eq!(plain, if layout == Layout::Mirror { 5 } else { 0 }, "{epoch}: {layout:?}");
    }
    // The snapshots of the other layout are whole for ever.
    let back = Rollback { key: key.clone(), snapshot: 1, epoch: Epoch(20), nonce: "back".into() };
    history.restore(&back).await.unwrap();
    assert_eq!(Node::new(&store).restored(&slot("b"), &key, 21).await[&b"f"[..]].content, [1]);
}

/// What is not filled and captured is not saved, and nothing is deleted for it (P3).
#[tokio::test]
async fn no_tree_deletes_nothing_and_an_unchanged_one_sends_nothing() {
    let store = Arc::new(MemoryStore::default());
    let node = Node::new(&store);
    let key = key("t");
    node.claim(&slot("one"), &key, 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state_path(&slot("one")));
    node.files.capture(&slot("one"), &key).await.unwrap();
    node.files.save(&mirrored(&key, 1, "n1")).await.unwrap();
    let again = node.files.save(&mirrored(&key, 1, "n2")).await.unwrap();
    assert_eq!(again.sent_bytes, 0);
    let before = store.names("/f/");
    let empty = Node::new(&store);
    let error = empty.files.save(&mirrored(&key, 2, "n3")).await.unwrap_err();
    assert!(matches!(error, Error::Disk { .. }), "{error:?}");
    assert_eq!(store.names("/f/"), before);
}

/// Sealed state and plain objects exclude each other: refused, and the tree kept.
#[tokio::test]
async fn a_mirror_is_not_sealed_and_says_so() {
    let master = Some(Arc::new(MasterKey::new(&[1; 32])));
    let encryption = Encryption::new(master, true, Arc::new(SystemClock)).unwrap();
    let store = Arc::new(MemoryStore::default());
    let node = Node::with_encryption(&store, encryption);
    let key = key("t");
    node.claim(&slot("one"), &key, 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&slot("one")), "f", b"secret");
    node.files.capture(&slot("one"), &key).await.unwrap();
    let error = node.files.save(&mirrored(&key, 1, "n1")).await.unwrap_err();
    assert!(
        matches!(&error, Error::Limit { reason, .. } if reason.contains("STATE_ENCRYPTION")),
        "{error:?}"
    );
    assert_eq!(store.names(""), Vec::<String>::new());
    node.files.save(&save(&key, 1, "n2")).await.unwrap();
    assert_eq!(tree(&node.cache_path(&key).join("tree"))[&b"f"[..]].owner, (RUN_AS.uid, RUN_AS.gid));
}
