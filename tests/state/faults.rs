//! The store fails at every single call of a save and of a fill: an error each
//! time, nothing lost, and the repetition succeeds (P2, P3, P8).

use std::sync::Arc;

use boilerhouse::{
    state::{Error, FillFrom, SlotFiles, host::UNCLAIMED},
    store,
};

use crate::support::{
    MemoryStore, Node, Strike, fill, key, mode_and_owner, newest, save, slot, some_tree, tree,
    without_root_time, write,
};

const STRIKES: [Strike; 3] = [Strike::Unavailable, Strike::UnknownDone, Strike::UnknownNotDone];

/// A node with one snapshot of an older tree in the store, and a newer tree in the cache.
async fn with_unsaved_tree() -> (Node, crate::support::Tree) {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&one), "old", b"old");
    node.release(&one, &key, 1, "n1").await;
    node.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
    some_tree(&node.state_path(&two));
    let expected = without_root_time(tree(&node.state_path(&two)));
    node.files.capture(&two, &key).await.unwrap();
    (node, expected)
}

#[tokio::test]
async fn a_store_that_fails_at_any_call_of_a_save_loses_nothing() {
    for strike in STRIKES {
        let mut struck = 0;
        for nth in 1.. {
            let (node, expected) = with_unsaved_tree().await;
            let key = key("t");
            let mut saving = save(&key, 2, "n2");
            saving.persist.keep_last = 1;
            node.store.strike(nth, strike);
            let first = node.files.save(&saving).await;
            if !node.store.has_struck() {
                first.unwrap();
                break;
            }
            struck += 1;
            if let Err(error) = &first {
                assert!(matches!(error, Error::Store { .. }), "{strike:?} at {nth}: {error:?}");
            }
            assert_eq!(without_root_time(tree(&node.cache_path(&key).join("tree"))), expected);
            let second = node.files.save(&saving).await.unwrap();
            if let Ok(first) = first {
                assert_eq!(first.snapshot, second.snapshot, "{strike:?} at {nth}: one nonce, one record");
            }
            assert_eq!(second.snapshot.number, 2, "{strike:?} at {nth}: committed once");
            let other = Node::new(&node.store);
            let restored = other.restored(&slot("three"), &key, 3).await;
            assert_eq!(without_root_time(restored), expected, "{strike:?} at {nth}");
        }
        assert!(struck >= 10, "only {struck} calls were struck");
    }
}

#[tokio::test]
async fn a_store_that_fails_at_any_call_of_a_fill_gives_no_tenant_an_empty_tree() {
    let (node, expected) = with_unsaved_tree().await;
    let key = key("t");
    node.files.save(&save(&key, 2, "n2")).await.unwrap();
    let from = FillFrom::Snapshot(newest(&node, &key).await);
    let mut struck = 0;
    for nth in 1.. {
        let other = Node::new(&node.store);
        let three = slot("three");
        other.prepare(&three).await;
        node.store.strike(nth, Strike::Unavailable);
        let filled = other.files.fill(&fill(&three, &key, 3, from.clone())).await;
        if !node.store.has_struck() {
            filled.unwrap();
            break;
        }
        struck += 1;
        assert!(matches!(filled, Err(Error::Store { .. })), "call {nth}: {filled:?}");
        let unclaimed = (0o755, UNCLAIMED.uid, UNCLAIMED.gid);
        assert_eq!(mode_and_owner(&other.state_path(&three)), unclaimed, "call {nth}");
        other.files.fill(&fill(&three, &key, 3, from.clone())).await.unwrap();
        assert_eq!(without_root_time(tree(&other.state_path(&three))), expected, "call {nth}");
    }
    assert!(struck >= 3, "only {struck} calls were struck");
}

#[tokio::test]
async fn a_store_that_fails_never_proves_absence() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let key = key("t");
    for nth in 1..=2 {
        node.store.strike(nth, Strike::Unavailable);
        let newest = node.files.newest(&key).await;
        assert!(matches!(newest, Err(Error::Store { .. })), "call {nth}: {newest:?}");
        assert!(node.store.has_struck());
    }
    assert_eq!(node.files.newest(&key).await.unwrap(), None);
}

/// A listing that leaves records out proves nothing: record 1 is asked for, too.
#[tokio::test]
async fn a_listing_that_misses_records_is_found_out() {
    let (node, _) = with_unsaved_tree().await;
    let key = key("t");
    let records = node.store.names("/r/");
    let body = node.store.objects.lock().unwrap().remove(&records[0]).unwrap();
    assert_eq!(node.files.newest(&key).await.unwrap(), None, "now there is none");
    node.store.objects.lock().unwrap().insert(records[0].clone(), body);
    *node.store.hides.lock().unwrap() = Some("/r/");
    let newest = node.files.newest(&key).await;
    assert!(matches!(newest, Err(Error::Damaged { .. })), "{newest:?}");
}

#[tokio::test]
async fn damage_of_any_object_fails_the_fill() {
    let (node, expected) = with_unsaved_tree().await;
    let key = key("t");
    node.files.save(&save(&key, 2, "n2")).await.unwrap();
    let from = FillFrom::Snapshot(newest(&node, &key).await);
    for part in ["/m/", "/p/", "/c/"] {
        assert!(!node.store.names(part).is_empty(), "{part}");
        let other = Node::new(&node.store);
        let three = slot("three");
        *node.store.garbles.lock().unwrap() = Some(part);
        let filled = other.claim(&three, &key, 3, from.clone()).await;
        *node.store.garbles.lock().unwrap() = None;
        assert!(matches!(filled, Err(Error::Damaged { .. })), "{part}: {filled:?}");
        other.files.fill(&fill(&three, &key, 3, from.clone())).await.unwrap();
        assert_eq!(without_root_time(tree(&other.state_path(&three))), expected);
    }
    for name in node.store.names("/p/") {
        let other = Node::new(&node.store);
        let body = node.store.objects.lock().unwrap().remove(&name).unwrap();
        let filled = other.claim(&slot("three"), &key, 3, from.clone()).await;
        node.store.objects.lock().unwrap().insert(name.clone(), body);
        // Of the older snapshot's packs the new one may need none.
        if let Err(error) = filled {
            assert!(matches!(error, Error::Damaged { .. }), "{name}: {error:?}");
        }
    }
}

/// P2: what does not read back is not saved, whatever the store said.
#[tokio::test]
async fn a_store_that_lies_is_found_out() {
    for part in ["/r/", "/m/"] {
        let (node, expected) = with_unsaved_tree().await;
        let key = key("t");
        *node.store.forgets.lock().unwrap() = Some(part);
        let saved = node.files.save(&save(&key, 2, "n2")).await;
        assert!(matches!(saved, Err(Error::Damaged { .. } | Error::Store { .. })), "{part}: {saved:?}");
        *node.store.forgets.lock().unwrap() = None;
        assert_eq!(without_root_time(tree(&node.cache_path(&key).join("tree"))), expected);
    }
    let (node, _) = with_unsaved_tree().await;
    *node.store.garbles.lock().unwrap() = Some("/m/");
    let saved = node.files.save(&save(&key("t"), 2, "n2")).await;
    assert!(matches!(saved, Err(Error::Damaged { .. })), "{saved:?}");
}

#[tokio::test]
async fn a_save_that_is_dropped_can_be_repeated() {
    let (node, expected) = with_unsaved_tree().await;
    let key = key("t");
    let saving = save(&key, 2, "n2");
    for polls in 0..40 {
        let mut save = Box::pin(node.files.save(&saving));
        for _ in 0..polls {
            tokio::select! { biased; _ = &mut save => break, () = tokio::task::yield_now() => {} }
        }
    }
    let saved = node.files.save(&saving).await.unwrap();
    assert_eq!(saved.snapshot.number, 2);
    let other = Node::new(&node.store);
    assert_eq!(without_root_time(other.restored(&slot("three"), &key, 3).await), expected);
}

#[tokio::test]
async fn unavailability_is_named() {
    let (node, _) = with_unsaved_tree().await;
    node.store.strike(1, Strike::Unavailable);
    let error = node.files.save(&save(&key("t"), 2, "n2")).await.unwrap_err();
    let Error::Store { key: of, source } = error else { panic!("{error:?}") };
    assert_eq!(of, key("t"));
    assert!(matches!(source, store::Error::Unavailable { .. }), "{source:?}");
}
