//! Checkpoints are the tree as it was under pause, whatever happened before and after.

use std::{
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    sync::Arc,
};

use boilerhouse::state::{CheckpointId, Error, FillFrom, SaveTree, SlotFiles};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use crate::{
    places::Place,
    support::{MemoryStore, Node, key, save, slot, some_tree, tree, write},
};

async fn claimed() -> Node {
    claimed_on(&Arc::default()).await
}

async fn claimed_on(store: &Arc<MemoryStore>) -> Node {
    let node = Node::new(store);
    node.claim(&slot("one"), &key("t"), 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state_path(&slot("one")));
    node
}

async fn saved_tree(node: &Node, id: &CheckpointId) -> crate::support::Tree {
    let mut saving = save(&key("t"), 1, &id.0);
    saving.tree = SaveTree::Checkpoint(id.clone());
    node.files.save(&saving).await.unwrap();
    Node::new(&node.store).restored(&slot("x"), &key("t"), 2).await
}

fn set_back(path: &Path, seconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[tokio::test]
async fn a_checkpoint_is_the_tree_under_pause() {
    it_is_the_tree_under_pause(&Place::Memory).await;
}

pub(crate) async fn it_is_the_tree_under_pause(place: &Place) {
    let node = claimed_on(&place.store()).await;
    let root = node.state_path(&slot("one"));
    write(&root, "same-size", b"before");
    set_back(&root.join("same-size"), 1_000);
    for name in ["gone", "gone-dir/x", "file-to-dir", "dir-to-file/x", "to-link"] {
        write(&root, name, b"x");
    }
    symlink("a.txt", root.join("relinked")).unwrap();
    let id = node.files.copy_live(&slot("one"), &key("t")).await.unwrap();

    // The program goes on.
    write(&root, "same-size", b"after!");
    set_back(&root.join("same-size"), 1_000);
    write(&root, "new/deep/file", b"new");
    std::fs::remove_file(root.join("gone")).unwrap();
    std::fs::remove_dir_all(root.join("gone-dir")).unwrap();
    std::fs::remove_file(root.join("file-to-dir")).unwrap();
    write(&root, "file-to-dir/inside", b"now a directory");
    std::fs::remove_dir_all(root.join("dir-to-file")).unwrap();
    write(&root, "dir-to-file", b"now a file");
    std::fs::remove_file(root.join("to-link")).unwrap();
    symlink("/etc/shadow", root.join("to-link")).unwrap();
    std::fs::remove_file(root.join("relinked")).unwrap();
    symlink("elsewhere", root.join("relinked")).unwrap();
    std::fs::set_permissions(root.join("dir/b.txt"), PermissionsExt::from_mode(0o400)).unwrap();
    std::fs::set_permissions(root.join("empty"), PermissionsExt::from_mode(0o711)).unwrap();
    std::fs::rename(root.join("dir/deep"), root.join("deep-moved")).unwrap();

    // Now it is paused.
    node.files.copy_paused(&id).await.unwrap();
    let expected = tree(&root);

    // And goes on again; nothing of this belongs to the checkpoint.
    write(&root, "same-size", b"later!");
    std::fs::remove_file(root.join("a.txt")).unwrap();
    assert_eq!(saved_tree(&node, &id).await, expected);
    node.files.drop_checkpoint(&id).await.unwrap();
    node.files.drop_checkpoint(&id).await.unwrap();
    assert_eq!(node.staging(), Vec::<String>::new());
}

#[tokio::test]
async fn only_a_frozen_copy_of_this_key_is_saved() {
    let node = claimed().await;
    let id = node.files.copy_live(&slot("one"), &key("t")).await.unwrap();
    let mut saving = save(&key("t"), 1, "n");
    saving.tree = SaveTree::Checkpoint(id.clone());
    let error = node.files.save(&saving).await.unwrap_err();
    assert!(matches!(error, Error::Disk { .. }), "not frozen: {error:?}");
    node.files.copy_paused(&id).await.unwrap();
    let mut others = save(&key("other"), 1, "n");
    others.tree = SaveTree::Checkpoint(id.clone());
    let error = node.files.save(&others).await.unwrap_err();
    assert!(matches!(error, Error::Disk { .. }), "another's: {error:?}");
    assert!(node.store.names("").is_empty());
    node.files.save(&saving).await.unwrap();
    // After a restart the copies of before are gone, and so are their names.
    let node = node.restart();
    assert!(node.files.copy_paused(&id).await.is_err());
    node.files.survey().await.unwrap();
    assert_eq!(node.staging(), Vec::<String>::new());
}

#[tokio::test]
async fn a_copy_that_is_given_up_leaves_nothing() {
    let node = claimed().await;
    let root = node.state_path(&slot("one"));
    for n in 0..500 {
        write(&root, &format!("many/{n}"), &[1; 2_000]);
    }
    let (one, key) = (slot("one"), key("t"));
    {
        let mut copy = Box::pin(node.files.copy_live(&one, &key));
        for _ in 0..3 {
            tokio::select! { biased; _ = &mut copy => break, () = tokio::task::yield_now() => {} }
        }
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !node.staging().is_empty() {
        assert!(std::time::Instant::now() < deadline, "{:?}", node.staging());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    // A freeze that is given up spoils the checkpoint.
    let id = node.files.copy_live(&one, &key).await.unwrap();
    // So much to copy that it is not done at the first poll.
    for n in 0..500 {
        write(&root, &format!("many/{n}"), &[2; 2_000]);
    }
    {
        let mut freeze = Box::pin(node.files.copy_paused(&id));
        tokio::select! { biased; _ = &mut freeze => panic!("it cannot be done at the first poll"), () = tokio::task::yield_now() => {} }
    }
    node.files.drop_checkpoint(&id).await.unwrap();
    assert_eq!(node.staging(), Vec::<String>::new());
}

/// Names of one file stay so, whichever of them changed and when.
#[tokio::test]
async fn hard_links_are_one_file_in_a_checkpoint() {
    names_are_one_file(&Place::Memory).await;
}

pub(crate) async fn names_are_one_file(place: &Place) {
    let node = claimed_on(&place.store()).await;
    let root = node.state_path(&slot("one"));
    let link = |from: &str, to: &str| std::fs::hard_link(root.join(from), root.join(to)).unwrap();
    let append = |name: &str| {
        let mut file = std::fs::OpenOptions::new().append(true).open(root.join(name)).unwrap();
        std::io::Write::write_all(&mut file, b" and more").unwrap();
    };
    link("a.txt", "dir/a2.txt");
    link("a.txt", "dir/deep/a3.txt");
    link("dir/b.txt", "b2.txt");
    std::fs::hard_link(root.join("link"), root.join("link2")).unwrap();
    for round in 0..4 {
        match round {
            // Through another name than the first.
            1 => append("dir/deep/a3.txt"),
            // The first name goes, and the second becomes another file.
            2 => {
                std::fs::remove_file(root.join("a.txt")).unwrap();
                std::fs::remove_file(root.join("b2.txt")).unwrap();
                write(&root, "b2.txt", b"on its own");
            }
            _ => {}
        }
        let id = node.files.copy_live(&slot("one"), &key("t")).await.unwrap();
        // Between the passes, too.
        match round {
            1 => append("b2.txt"),
            2 => link("dir/b.txt", "0"),
            3 => append("0"),
            _ => {}
        }
        node.files.copy_paused(&id).await.unwrap();
        let expected = tree(&root);
        assert!(expected.values().filter(|entry| entry.same_as.is_some()).count() >= 3);
        assert_eq!(saved_tree(&node, &id).await, expected, "round {round}");
        node.files.drop_checkpoint(&id).await.unwrap();
    }
}

/// While the program writes, removes and renames, the first pass neither fails
/// nor waits, and the second makes it right.
#[tokio::test]
async fn a_busy_program_does_not_disturb() {
    let node = claimed().await;
    let root = node.state_path(&slot("one"));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let program = std::thread::spawn({
        let (root, stop) = (root.clone(), Arc::clone(&stop));
        move || {
            let mut n = 0_u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                n += 1;
                let dir = root.join(format!("busy-{}", n % 7));
                let _ = std::fs::create_dir(&dir);
                let _ = std::fs::write(dir.join("f"), n.to_le_bytes());
                let _ = std::fs::rename(&dir, root.join(format!("moved-{}", n % 5)));
                let _ = std::fs::remove_dir_all(root.join(format!("moved-{}", n % 5)));
                let _ = symlink("/etc", root.join(format!("moved-{}", n % 3)));
                let _ = std::fs::remove_file(root.join(format!("moved-{}", n % 3)));
            }
        }
    });
    for _ in 0..10 {
        let id = node.files.copy_live(&slot("one"), &key("t")).await.unwrap();
        node.files.drop_checkpoint(&id).await.unwrap();
    }
    let id = node.files.copy_live(&slot("one"), &key("t")).await.unwrap();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    program.join().unwrap();
    node.files.copy_paused(&id).await.unwrap();
    assert_eq!(saved_tree(&node, &id).await, tree(&root));
}
