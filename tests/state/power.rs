//! What a power loss takes from a tree that was not on disk yet never becomes the newest state.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use boilerhouse::{
    model::SlotId,
    state::{Error, FillFrom, SaveTree, SlotFiles},
};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use crate::support::{
    MemoryStore, Node, Strike, fill, key, newest, save, slot, some_tree, tree, without_root_time, write,
};

/// Loses content of a file that was not written back: its times stay.
fn lose(path: &Path, lose: impl FnOnce(&fs::File, u64)) {
    let before = fs::metadata(path).unwrap();
    lose(&fs::OpenOptions::new().write(true).open(path).unwrap(), before.len());
    let time = Timespec { tv_sec: before.mtime(), tv_nsec: before.mtime_nsec() };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::empty()).unwrap();
}

fn zeros(file: &fs::File, bytes: u64) {
    file.write_all_at(&vec![0; bytes as usize], 0).unwrap();
}

fn empty(file: &fs::File, _: u64) {
    file.set_len(0).unwrap();
}

fn cut(file: &fs::File, bytes: u64) {
    file.set_len(bytes / 2).unwrap();
}

/// Waits for the sync in the background, and takes what it notes away: it was not done.
async fn forget_sync(holder: &Path) {
    wait_for(|| fs::remove_file(holder.join("synced")).is_ok(), "a sync is noted").await;
}

async fn wait_for(mut is_so: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A claim of a tree that was restored and is not on disk yet.
async fn restored_and_unsynced() -> (Node, Vec<String>) {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state_path(&one));
    node.release(&one, &key, 1, "n1").await;
    let other = Node::new(&node.store);
    other.restored(&one, &key, 2).await;
    forget_sync(&other.state_path(&one).parent().unwrap().join("shell")).await;
    let files = ["a.txt", "dir/b.txt", "dir/deep/c.bin", "big.bin"];
    (other, files.map(ToOwned::to_owned).to_vec())
}

#[tokio::test]
async fn a_claim_that_lost_power_after_its_fill_is_captured_whole() {
    let (key, one) = (key("t"), slot("one"));
    let damages: [fn(&fs::File, u64); 3] = [zeros, empty, cut];
    for damage in damages {
        for number in 0..4 {
            let (node, files) = restored_and_unsynced().await;
            let root = node.state_path(&one);
            write(&root, "dir/own", b"the program's own");
            let expected = without_root_time(tree(&root));
            lose(&root.join(&files[number]), damage);
            assert!(without_root_time(tree(&root)) != expected);
            let node = node.after_power_loss();
            node.release(&one, &key, 2, "n2").await;
            let found = Node::new(&node.store).restored(&slot("x"), &key, 3).await;
            assert!(without_root_time(found) == expected, "{} was lost", files[number]);
        }
    }
}

#[tokio::test]
async fn a_tree_that_waited_for_its_save_is_put_back_before_a_program_gets_it() {
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    let (node, files) = restored_and_unsynced().await;
    write(&node.state_path(&one), "own", b"the program's own");
    let expected = without_root_time(tree(&node.state_path(&one)));
    node.files.capture(&one, &key).await.unwrap();
    for file in &files {
        lose(&node.cache_path(&key).join("tree").join(file), zeros);
    }
    let node = node.after_power_loss();
    node.prepare(&two).await;
    node.files.fill(&fill(&two, &key, 3, FillFrom::Cache)).await.unwrap();
    assert!(without_root_time(tree(&node.state_path(&two))) == expected);
    // From here on every change is the program's.
    empty(&fs::OpenOptions::new().write(true).open(node.state_path(&two).join("big.bin")).unwrap(), 0);
    let expected = without_root_time(tree(&node.state_path(&two)));
    node.release(&two, &key, 3, "n3").await;
    assert!(without_root_time(Node::new(&node.store).restored(&one, &key, 4).await) == expected);
}

#[tokio::test]
async fn what_cannot_be_told_from_the_program_s_changes_is_kept_and_not_published() {
    let (key, one) = (key("t"), slot("one"));
    let (node, _) = restored_and_unsynced().await;
    let big = node.state_path(&one).join("big.bin");
    let file = fs::OpenOptions::new().write(true).open(&big).unwrap();
    file.write_all_at(b"the program's own", 700_000).unwrap();
    lose(&big, |file, _| file.write_all_at(&[0; 4_096], 4_096).unwrap());
    let torn = without_root_time(tree(&node.state_path(&one)));
    let before = newest(&node, &key).await;
    let node = node.after_power_loss();
    node.files.capture(&one, &key).await.unwrap();
    for _ in 0..2 {
        let error = node.files.save(&save(&key, 2, "n2")).await.unwrap_err();
        assert!(matches!(&error, Error::Torn { reason, .. } if reason.contains("big.bin")), "{error:?}");
    }
    assert_eq!(newest(&node, &key).await, before);
    assert!(without_root_time(tree(&node.cache_path(&key).join("tree"))) == torn, "the tree is kept");
}

/// Without a power loss, and after the sync, zeros are what the program wrote.
#[tokio::test]
async fn zeros_of_the_program_s_own_are_kept() {
    let (key, one) = (key("t"), slot("one"));
    for is_synced in [false, true] {
        let (mut node, _) = restored_and_unsynced().await;
        let root = node.state_path(&one);
        for file in ["a.txt", "big.bin"] {
            lose(&root.join(file), zeros);
        }
        let expected = without_root_time(tree(&root));
        if is_synced {
            let snapshot = newest(&node, &key).await;
            fs::write(root.parent().unwrap().join("shell/synced"), snapshot.manifest).unwrap();
            node = node.after_power_loss();
        }
        node.release(&one, &key, 2, "n2").await;
        let found = Node::new(&node.store).restored(&slot("x"), &key, 3).await;
        assert!(without_root_time(found) == expected, "synced {is_synced}");
    }
}

/// What was saved is on disk a little later. What its program does to it then is its own
/// doing, and so is what a power loss leaves of that.
#[tokio::test]
async fn after_a_save_a_truncation_is_the_program_s_own() {
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    for from_checkpoint in [false, true] {
        let (node, _) = restored_and_unsynced().await;
        write(&node.state_path(&one), "own", b"the program's own");
        let shell = |slot: &SlotId| node.state_path(slot).parent().unwrap().join("shell");
        let at = if from_checkpoint {
            let id = node.files.copy_live(&one, &key).await.unwrap();
            node.files.copy_paused(&id).await.unwrap();
            let mut saving = save(&key, 2, "n2");
            saving.tree = SaveTree::Checkpoint(id.clone());
            node.files.save(&saving).await.unwrap();
            node.files.drop_checkpoint(&id).await.unwrap();
            &one
        } else {
            node.release(&one, &key, 2, "n2").await;
            node.claim(&two, &key, 3, FillFrom::Cache).await.unwrap();
            &two
        };
        let snapshot = newest(&node, &key).await;
        let note = shell(at).join("synced");
        wait_for(|| fs::read(&note).is_ok_and(|text| text == snapshot.manifest.as_bytes()), "it is noted")
            .await;
        let root = node.state_path(at);
        empty(&fs::OpenOptions::new().write(true).open(root.join("big.bin")).unwrap(), 0);
        let expected = without_root_time(tree(&root));
        let node = node.after_power_loss();
        node.release(at, &key, 3, "n3").await;
        let found = Node::new(&node.store).restored(&slot("x"), &key, 4).await;
        assert!(without_root_time(found) == expected, "checkpoint {from_checkpoint}");
    }
}

/// What is known to be on disk is not compared with a store that is away.
#[tokio::test]
async fn a_cached_tree_that_is_on_disk_needs_no_store_after_a_power_loss() {
    let (key, one) = (key("t"), slot("one"));
    let (node, _) = restored_and_unsynced().await;
    write(&node.state_path(&one), "own", b"the program's own");
    let expected = without_root_time(tree(&node.state_path(&one)));
    node.release(&one, &key, 2, "n2").await;
    let note = node.cache_path(&key).join("synced");
    wait_for(|| note.exists(), "it is noted").await;
    let node = node.after_power_loss();
    node.store.strike(1, Strike::Unavailable);
    node.claim(&one, &key, 3, FillFrom::Cache).await.unwrap();
    assert!(without_root_time(tree(&node.state_path(&one))) == expected);
    assert!(!node.store.has_struck(), "the store was asked");
}

/// A power loss may take the content of the note that says whose a slot's tree is.
#[tokio::test]
async fn a_torn_note_of_the_owner_keeps_no_capture_from_its_end() {
    for torn in ["", "\0\0\0\0\0\0\0\0", "{\"tenant\":\"t\",\"wor"] {
        let (key, one) = (key("t"), slot("one"));
        let (node, _) = restored_and_unsynced().await;
        let note = node.state_path(&one).parent().unwrap().join("owner.json");
        write(&node.state_path(&one), "own", b"the program's own");
        let expected = without_root_time(tree(&node.state_path(&one)));
        let before = fs::read(&note).unwrap();
        fs::write(&note, torn).unwrap();
        let node = node.after_power_loss();
        let captured = node.files.capture(&one, &key).await.unwrap();
        assert!(captured.handed_over && captured.is_cached, "{torn:?}: {captured:?}");
        assert_eq!(node.files.capture(&one, &key).await.unwrap(), captured, "{torn:?}: repeated");
        node.files.save(&save(&key, 2, "n2")).await.unwrap();
        node.files.wipe(&one).await.unwrap();
        let found = Node::new(&node.store).restored(&slot("x"), &key, 3).await;
        assert!(without_root_time(found) == expected, "{torn:?}");
        // A whole note of another tenant is believed, and so is none at all.
        node.claim(&one, &key, 3, FillFrom::Cache).await.unwrap();
        fs::write(&note, String::from_utf8(before).unwrap().replace("\"t\"", "\"u\"")).unwrap();
        assert!(matches!(node.files.capture(&one, &key).await, Err(Error::NotEmpty { .. })));
        fs::remove_file(&note).unwrap();
        assert!(matches!(node.files.capture(&one, &key).await, Err(Error::NotEmpty { .. })));
    }
}
