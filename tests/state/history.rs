//! Records: fences, nonces, reuse, retention, limits, excludes.

use std::sync::Arc;

use boilerhouse::{
    model::Epoch,
    state::{Error, FillFrom, SlotFiles},
};

use crate::support::{MemoryStore, Node, key, newest, save, slot, some_tree, tree, without_root_time, write};

/// Claims, changes the tree, releases.
async fn round(node: &Node, epoch: u64, keep_last: u32, change: impl FnOnce(&std::path::Path)) {
    let (key, slot) = (key("t"), slot(&format!("slot-{epoch}")));
    let from = match node.files.newest(&key).await.unwrap() {
        None => FillFrom::Empty,
        Some(_) => FillFrom::Cache,
    };
    node.claim(&slot, &key, epoch, from).await.unwrap();
    change(&node.state_path(&slot));
    node.files.capture(&slot, &key).await.unwrap();
    let mut saving = save(&key, epoch, &format!("n{epoch}"));
    saving.persist.keep_last = keep_last;
    node.files.save(&saving).await.unwrap();
    node.files.wipe(&slot).await.unwrap();
}

/// P1: a stale epoch can publish nothing, and what it has is kept (P2).
#[tokio::test]
async fn a_stale_epoch_publishes_nothing() {
    let store = Arc::new(MemoryStore::default());
    let (old, new) = (Node::new(&store), Node::new(&store));
    let key = key("t");
    round(&old, 1, 10, |root| write(root, "f", b"1")).await;
    // The old server still has its claim of epoch 2; a new one took over with 3.
    let two = slot("two");
    old.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
    write(&old.state_path(&two), "f", b"stale");
    new.restored(&slot("three"), &key, 3).await;
    write(&new.state_path(&slot("three")), "f", b"3");
    new.release(&slot("three"), &key, 3, "n3").await;
    let before = store.objects.lock().unwrap().clone();
    old.files.capture(&two, &key).await.unwrap();
    let error = old.files.save(&save(&key, 2, "n2")).await.unwrap_err();
    assert!(matches!(&error, Error::Fenced { own: Epoch(2), newest: Epoch(3), .. }), "{error:?}");
    assert_eq!(*store.objects.lock().unwrap(), before, "not a byte was written");
    assert_eq!(tree(&old.cache_path(&key).join("tree"))[&b"f"[..]].content, b"stale", "the tree is kept");
}

/// Both servers read the same newest record; the later epoch wins whoever is first.
#[tokio::test]
async fn racing_epochs_end_with_the_later_one() {
    for _ in 0..20 {
        let store = Arc::new(MemoryStore::default());
        let (old, new) = (Node::new(&store), Node::new(&store));
        let key = key("t");
        for (node, epoch, slot) in [(&old, 1, slot("one")), (&new, 2, slot("two"))] {
            node.claim(&slot, &key, epoch, FillFrom::Empty).await.unwrap();
            write(&node.state_path(&slot), "f", &[epoch as u8]);
            node.files.capture(&slot, &key).await.unwrap();
        }
        let (first, second) = (save(&key, 1, "a"), save(&key, 2, "b"));
        let (first, second) = tokio::join!(old.files.save(&first), new.files.save(&second));
        second.unwrap();
        if let Err(error) = first {
            assert!(matches!(error, Error::Fenced { .. }), "{error:?}");
        }
        assert_eq!(newest(&new, &key).await.epoch, Epoch(2));
    }
}

#[tokio::test]
async fn a_nonce_commits_once() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let key = key("t");
    round(&node, 1, 10, |root| write(root, "f", b"1")).await;
    let before = node.store.objects.lock().unwrap().clone();
    let again = node.files.save(&save(&key, 1, "n1")).await.unwrap();
    assert_eq!(again.snapshot, newest(&node, &key).await);
    assert_eq!(again.sent_bytes, 0);
    assert_eq!(*node.store.objects.lock().unwrap(), before);
    // Another attempt of the same claim is another snapshot.
    let next = node.files.save(&save(&key, 1, "n1b")).await.unwrap();
    assert_eq!(next.snapshot.number, 2);
}

#[tokio::test]
async fn an_unchanged_tree_sends_no_data_and_still_raises_the_epoch() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let key = key("t");
    round(&node, 1, 10, some_tree).await;
    let data = |node: &Node| [node.store.names("/p/"), node.store.names("/c/")].concat();
    let before = data(&node);
    round(&node, 2, 10, |_| {}).await;
    assert_eq!(data(&node), before);
    assert_eq!(newest(&node, &key).await.epoch, Epoch(2));
    // One changed small file is one pack, and the rest is not sent again.
    round(&node, 3, 10, |root| write(root, "a.txt", b"changed")).await;
    assert_eq!(data(&node).len(), before.len() + 1);
    let restored = Node::new(&node.store).restored(&slot("x"), &key, 4).await;
    assert_eq!(restored[&b"a.txt"[..]].content, b"changed");
    assert_eq!(restored[&b"dir/b.txt"[..]].content, b"beta");
    assert_eq!(restored[&b"big.bin"[..]].content.len(), 1_200_000);
}

#[tokio::test]
async fn an_empty_tree_is_a_snapshot() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let key = key("t");
    round(&node, 1, 10, |_| {}).await;
    let snapshot = newest(&node, &key).await;
    assert_eq!((snapshot.files, snapshot.bytes, snapshot.number), (0, 0, 1));
    assert_eq!(Node::new(&node.store).restored(&slot("x"), &key, 2).await.len(), 1, "the root alone");
}

#[tokio::test]
async fn retention_removes_what_nothing_needs_and_nothing_else() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let key = key("t");
    for epoch in 1..=6 {
        // `always` is stored once, in the first epoch, and needed by all.
        round(&node, epoch, 2, |root| {
            if epoch == 1 {
                write(root, "always", b"from the first");
            }
            write(root, "f", format!("content {epoch}").as_bytes());
        })
        .await;
    }
    assert_eq!(node.store.names("/r/").len(), 3, "the last two, and record 1: {:?}", node.store.names("/r/"));
    assert_eq!(node.store.names("/m/").len(), 2);
    let packs = node.store.names("/p/");
    let of_epoch =
        |epoch: u64| packs.iter().filter(|name| name.contains(&format!("/p/{epoch:016x}-"))).count();
    assert_eq!([1, 2, 3, 4, 5, 6].map(of_epoch), [1, 0, 0, 0, 1, 1], "{packs:?}");
    let restored = Node::new(&node.store).restored(&slot("x"), &key, 7).await;
    assert_eq!(restored[&b"always"[..]].content, b"from the first");
    assert_eq!(restored[&b"f"[..]].content, b"content 6");
    // Left-overs of an attempt that never committed go, too; those of a later epoch stay.
    let prefix = format!("t/{}/", key.digest());
    let hash = "0".repeat(64);
    let (old, later) = (format!("{prefix}p/{:016x}-{hash}", 3), format!("{prefix}p/{:016x}-{hash}", 99));
    for name in [&old, &later] {
        node.store.objects.lock().unwrap().insert(name.clone(), bytes::Bytes::from_static(b"x"));
    }
    round(&node, 7, 2, |_| {}).await;
    assert!(!node.store.objects.lock().unwrap().contains_key(&old));
    assert!(node.store.objects.lock().unwrap().contains_key(&later));
}

#[tokio::test]
async fn a_damaged_older_manifest_stops_the_removal_of_objects() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    for epoch in 1..=4 {
        round(&node, epoch, 10, |root| write(root, "f", format!("content {epoch}").as_bytes())).await;
    }
    let older = node.store.names(&format!("/m/{:016x}-", 3)).remove(0);
    node.store.objects.lock().unwrap().insert(older, bytes::Bytes::from_static(b"damaged"));
    let packs = node.store.names("/p/");
    round(&node, 5, 3, |root| write(root, "f", b"content 5")).await;
    let left = node.store.names("/p/");
    assert!(packs.iter().all(|name| left.contains(name)), "{packs:?} became {left:?}");
}

#[tokio::test]
async fn what_is_excluded_is_not_saved() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    for path in ["keep.txt", "cache/x", "cache/deep/y", "a/b.tmp", "top.tmp", "logs/z"] {
        write(&root, path, path.as_bytes());
    }
    node.files.capture(&one, &key).await.unwrap();
    let mut saving = save(&key, 1, "n1");
    saving.persist.exclude = vec!["cache/**".into(), "**/*.tmp".into(), "logs".into()];
    node.files.save(&saving).await.unwrap();
    let restored = Node::new(&node.store).restored(&slot("x"), &key, 2).await;
    let paths: Vec<String> = restored.keys().map(|path| String::from_utf8(path.clone()).unwrap()).collect();
    assert_eq!(paths, ["", "a", "cache", "keep.txt"]);
    saving.persist.exclude = vec!["a[".into()];
    saving.nonce = "n2".into();
    let error = node.files.save(&saving).await.unwrap_err();
    assert!(matches!(&error, Error::File { path, .. } if path == "a["), "{error:?}");
}

#[tokio::test]
async fn a_tree_over_its_limit_is_kept_and_saved_when_it_may() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state_path(&one));
    let expected = without_root_time(tree(&node.state_path(&one)));
    node.files.capture(&one, &key).await.unwrap();
    let mut saving = save(&key, 1, "n1");
    saving.max_bytes = Some(1_200_000);
    let error = node.files.save(&saving).await.unwrap_err();
    let Error::Limit { reason, .. } = &error else { panic!("{error:?}") };
    assert!(reason.contains("1205009") && reason.contains("1200000"), "{reason}");
    assert!(node.store.names("").is_empty());
    saving.max_bytes = Some(1_205_009);
    node.files.save(&saving).await.unwrap();
    let restored = Node::new(&node.store).restored(&slot("x"), &key, 2).await;
    assert_eq!(without_root_time(restored), expected);
}
