//! What callers of the port rely on, on real directories and on the fake alike.

use std::{collections::BTreeMap, sync::Arc};

use boilerhouse::{
    clock::SystemClock,
    model::{Epoch, Key, Secret, SlotId},
    state::{
        Base, Error, FileAction, FileAnswer, FillFrom, Save, SaveTree, SlotFiles,
        fake::{FakeFiles, FaultAt},
    },
};

use crate::support::{MemoryStore, Node, RUN_AS, fill, key, save, slot, volumes};

async fn put(files: &dyn SlotFiles, slot: &SlotId, path: &str, content: &str) {
    let action = FileAction::Write(path.into(), Secret::new(content));
    assert_eq!(files.state_file(slot, RUN_AS, action).await.unwrap(), FileAnswer::Done);
}

async fn content(files: &dyn SlotFiles, slot: &SlotId, path: &str) -> Option<String> {
    match files.state_file(slot, RUN_AS, FileAction::Read(path.into(), 1_000)).await {
        Ok(FileAnswer::Bytes(bytes)) => Some(String::from_utf8(bytes).unwrap()),
        Err(Error::File { .. }) => None,
        other => panic!("{other:?}"),
    }
}

async fn claim(
    files: &dyn SlotFiles,
    slot: &SlotId,
    key: &Key,
    epoch: u64,
    from: FillFrom,
) -> Result<u64, Error> {
    files.prepare(slot, &volumes()).await.unwrap();
    Ok(files.fill(&fill(slot, key, epoch, from)).await?.entries)
}

fn decided(key: &Key, epoch: u64, nonce: &str, after: u64) -> Save {
    Save { base: Base::Decided(after), ..save(key, epoch, nonce) }
}

/// `node` and `other` share a store.
async fn check(node: &dyn SlotFiles, other: &dyn SlotFiles) {
    let (mine, one, two, three) = (key("t"), slot("one"), slot("two"), slot("three"));
    assert_eq!(node.newest(&mine).await.unwrap(), None);
    assert!(matches!(claim(node, &one, &mine, 1, FillFrom::Cache).await, Err(Error::Disk { .. })));
    assert_eq!(claim(node, &one, &mine, 1, FillFrom::Empty).await.unwrap(), 0);
    put(node, &one, "dir/f", "1").await;
    put(node, &one, "g", "1").await;
    let names = node.state_file(&one, RUN_AS, FileAction::List(String::new())).await.unwrap();
    assert_eq!(names, FileAnswer::Names(vec!["dir".into(), "g".into()]));
    assert!(node.state_file(&one, RUN_AS, FileAction::Read("../g".into(), 9)).await.is_err());
    let secrets = BTreeMap::from([("a".to_owned(), Secret::new("x"))]);
    node.put_secrets(&one, RUN_AS, &secrets).await.unwrap();
    assert!(matches!(node.wipe(&one).await, Err(Error::NotEmpty { .. })));
    assert!(matches!(claim(node, &one, &key("u"), 1, FillFrom::Empty).await, Err(Error::NotEmpty { .. })));
    assert!(matches!(node.capture(&one, &key("u")).await, Err(Error::NotEmpty { .. })));

    // A checkpoint.
    let id = node.copy_live(&one, &mine).await.unwrap();
    put(node, &one, "g", "2").await;
    let mut checkpoint = save(&mine, 1, "checkpoint");
    checkpoint.tree = SaveTree::Checkpoint(id.clone());
    assert!(node.save(&checkpoint).await.is_err(), "not frozen");
    node.copy_paused(&id).await.unwrap();
    put(node, &one, "g", "3").await;
    assert_eq!(node.save(&checkpoint).await.unwrap().snapshot.number, 1);
    node.drop_checkpoint(&id).await.unwrap();
    node.drop_checkpoint(&id).await.unwrap();

    // A release, repeated.
    for _ in 0..2 {
        node.capture(&one, &mine).await.unwrap();
    }
    node.wipe(&one).await.unwrap();
    node.wipe(&one).await.unwrap();
    assert_eq!(node.survey().await.unwrap().cached, [mine.digest()]);
    let saved = node.save(&save(&mine, 1, "release")).await.unwrap();
    assert_eq!((saved.snapshot.number, saved.snapshot.files), (2, 2));
    assert_eq!(node.save(&save(&mine, 1, "release")).await.unwrap().snapshot, saved.snapshot);
    let mut limited = save(&mine, 1, "limited");
    limited.max_bytes = Some(1);
    assert!(matches!(node.save(&limited).await, Err(Error::Limit { .. })));

    // The next claim is served from the cache, and the cache is empty then.
    assert_eq!(claim(node, &two, &mine, 2, FillFrom::Cache).await.unwrap(), 2);
    assert_eq!(content(node, &two, "g").await.as_deref(), Some("3"));
    assert_eq!(node.survey().await.unwrap().cached, Vec::<String>::new());
    assert!(matches!(claim(node, &three, &mine, 3, FillFrom::Cache).await, Err(Error::Disk { .. })));

    // Another node takes over, and this one is fenced.
    let newest = other.newest(&mine).await.unwrap().unwrap();
    assert_eq!(newest, saved.snapshot);
    claim(other, &one, &mine, 3, FillFrom::Snapshot(newest.clone())).await.unwrap();
    assert_eq!(content(other, &one, "dir/f").await.as_deref(), Some("1"));
    other.capture(&one, &mine).await.unwrap();
    other.save(&save(&mine, 3, "other")).await.unwrap();
    node.capture(&two, &mine).await.unwrap();
    let fenced = node.save(&save(&mine, 2, "stale")).await;
    assert!(matches!(fenced, Err(Error::Fenced { own: Epoch(2), newest: Epoch(3), .. })), "{fenced:?}");

    // An operator decides for its tree: right after the record that was looked at, or not at all.
    let head = node.head(&mine).await.unwrap().unwrap();
    for after in [0, head.number - 1, head.number + 1] {
        let late = decided(&mine, 4, "late", after);
        let fenced = node.save(&late).await;
        assert!(matches!(fenced, Err(Error::Fenced { own: Epoch(4), .. })), "after {after}: {fenced:?}");
    }
    for _ in 0..2 {
        let saved = node.save(&decided(&mine, 4, "decided", head.number)).await.unwrap();
        assert_eq!(saved.snapshot.number, head.number + 1, "once");
    }
    let fenced = node.save(&decided(&mine, 5, "another", head.number)).await;
    assert!(matches!(fenced, Err(Error::Fenced { .. })), "{fenced:?}");

    // Where the store has lost a key's history no new one begins by itself.
    claim(node, &three, &key("lost"), 1, FillFrom::Empty).await.unwrap();
    node.capture(&three, &key("lost")).await.unwrap();
    let lost = Save { base: Base::Chain, ..save(&key("lost"), 1, "lost") };
    assert!(matches!(node.save(&lost).await, Err(Error::Damaged { .. })));
    assert_eq!(node.head(&key("lost")).await.unwrap(), None);
    assert_eq!(node.save(&decided(&key("lost"), 2, "new", 0)).await.unwrap().snapshot.number, 1);
    node.discard(&key("lost")).await.unwrap();
    node.wipe(&three).await.unwrap();

    node.discard(&mine).await.unwrap();
    assert!(node.save(&save(&mine, 4, "nothing")).await.is_err(), "no tree is not an empty tree");

    // What is left behind.
    claim(node, &three, &key("u"), 1, FillFrom::Empty).await.unwrap();
    put(node, &three, "f", "whose").await;
    let aside = node.set_aside(&three, "nobody's").await.unwrap();
    assert_eq!(node.set_aside(&three, "nobody's").await.unwrap(), aside);
    assert!(node.last_change_ms(&slot("none")).await.unwrap().is_none());
    for slot in [&one, &two, &three] {
        node.discard_slot_state(slot).await.unwrap();
        node.wipe(slot).await.unwrap();
        assert_eq!(node.comm_path(slot), None);
    }
    assert_eq!(node.survey().await.unwrap(), boilerhouse::state::Survey::default());
}

#[tokio::test]
async fn real_directories_keep_the_contract() {
    let store = Arc::new(MemoryStore::default());
    check(&Node::new(&store).files, &Node::new(&store).files).await;
}

#[tokio::test]
async fn the_fake_keeps_the_contract() {
    let node = FakeFiles::new(Arc::new(SystemClock));
    check(&node, &node.another_node()).await;
}

#[tokio::test]
async fn the_fakes_faults_strike_once_where_they_should() {
    let files = FakeFiles::new(Arc::new(SystemClock));
    let (mine, one) = (key("t"), slot("one"));
    claim(&files, &one, &mine, 1, FillFrom::Empty).await.unwrap();
    assert!(files.write(&one, "f", b"x"));
    let error = || Error::NotEmpty { slot: slot("struck") };
    files.fail("capture", 2, FaultAt::Before, error());
    files.capture(&one, &mine).await.unwrap();
    assert!(!files.write(&one, "f", b"y"), "it is taken back");
    assert!(files.capture(&one, &mine).await.is_err());
    files.fail("save", 1, FaultAt::After, error());
    assert!(files.save(&save(&mine, 1, "n")).await.is_err());
    assert_eq!(files.snapshots(&mine).len(), 1, "done, but the caller does not know");
    files.set_store_down(true);
    assert!(matches!(files.newest(&mine).await, Err(Error::Store { .. })));
    files.set_store_down(false);
    assert_eq!(files.save(&save(&mine, 1, "n")).await.unwrap().snapshot.number, 1);
    assert_eq!((files.calls("save"), files.calls("capture")), (2, 2));
}
