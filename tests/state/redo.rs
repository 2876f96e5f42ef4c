//! A crash at any point of a fill or capture is repaired by doing it again (P7).

use std::{
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    sync::Arc,
};

use boilerhouse::{
    model::Owner,
    state::{Error, FillFrom, SlotFiles, host::UNCLAIMED},
};

use crate::support::{
    MemoryStore, Node, RUN_AS, fill, key, mode_and_owner, newest, slot, some_tree, tree, without_root_time,
    write,
};

/// How many top-level entries `some_tree` makes.
const ENTRIES: usize = 5;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Puts a filled slot back to where a fill stood after `moved` renames.
fn undo_fill_after(node: &Node, state: &Path, cache: &Path, moved: usize) {
    std::fs::rename(state.parent().unwrap().join("shell"), cache).unwrap();
    for name in names(state).into_iter().skip(moved) {
        std::fs::rename(state.join(&name), cache.join("tree").join(&name)).unwrap();
    }
    chown(state, Some(UNCLAIMED.uid), Some(UNCLAIMED.gid)).unwrap();
    std::fs::set_permissions(state, PermissionsExt::from_mode(0o755)).unwrap();
    assert!(node.dir.path().exists());
}

async fn with_cached_tree() -> (Node, crate::support::Tree) {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state_path(&one));
    let expected = without_root_time(tree(&node.state_path(&one)));
    assert_eq!(names(&node.state_path(&one)).len(), ENTRIES);
    node.release(&one, &key, 1, "n1").await;
    (node, expected)
}

#[tokio::test]
async fn a_half_fill_is_finished_by_filling_again() {
    for moved in 0..=ENTRIES {
        let (node, expected) = with_cached_tree().await;
        let (key, two) = (key("t"), slot("two"));
        node.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
        undo_fill_after(&node, &node.state_path(&two), &node.cache_path(&key), moved);
        let node = node.restart();
        let filled = node.files.fill(&fill(&two, &key, 2, FillFrom::Cache)).await.unwrap();
        assert_eq!(filled.entries as usize, ENTRIES - moved);
        assert_eq!(without_root_time(tree(&node.state_path(&two))), expected, "crashed after {moved} moves");
        assert!(!node.cache_path(&key).exists());
    }
}

#[tokio::test]
async fn a_half_fill_is_undone_by_a_capture() {
    for moved in 0..=ENTRIES {
        let (node, expected) = with_cached_tree().await;
        let (key, two, three) = (key("t"), slot("two"), slot("three"));
        node.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
        undo_fill_after(&node, &node.state_path(&two), &node.cache_path(&key), moved);
        let node = node.restart();
        node.release(&two, &key, 2, "n2").await;
        let other = Node::new(&node.store);
        assert_eq!(without_root_time(other.restored(&three, &key, 3).await), expected, "{moved} moves");
    }
}

#[tokio::test]
async fn a_half_fill_from_the_store_needs_no_second_download() {
    for moved in 0..=ENTRIES {
        let (node, expected) = with_cached_tree().await;
        let (key, two) = (key("t"), slot("two"));
        node.files.discard(&key).await.unwrap();
        let from = FillFrom::Snapshot(newest(&node, &key).await);
        node.claim(&two, &key, 2, from.clone()).await.unwrap();
        undo_fill_after(&node, &node.state_path(&two), &node.cache_path(&key), moved);
        let node = node.restart();
        let filled = node.files.fill(&fill(&two, &key, 2, from)).await.unwrap();
        assert_eq!(filled.fetched_bytes, 0);
        assert_eq!(without_root_time(tree(&node.state_path(&two))), expected, "crashed after {moved} moves");
    }
}

#[tokio::test]
async fn a_half_capture_is_finished_by_capturing_again() {
    for moved in 0..=ENTRIES {
        let (node, expected) = with_cached_tree().await;
        let (key, two, three) = (key("t"), slot("two"), slot("three"));
        node.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
        let (state, cache) = (node.state_path(&two), node.cache_path(&key));
        // The crash: some entries are in the cache, the slot is not taken back yet.
        std::fs::rename(state.parent().unwrap().join("shell"), &cache).unwrap();
        for name in names(&state).into_iter().take(moved) {
            std::fs::rename(state.join(&name), cache.join("tree").join(&name)).unwrap();
        }
        let node = node.restart();
        node.release(&two, &key, 2, "n2").await;
        node.files.capture(&two, &key).await.unwrap_err();
        node.claim(&three, &key, 3, FillFrom::Cache).await.unwrap();
        assert_eq!(without_root_time(tree(&node.state_path(&three))), expected, "{moved} moves");
    }
}

/// The crash between handing over and keeping the shell, with the next capture.
#[tokio::test]
async fn a_cache_directory_left_behind_by_a_fill_is_used() {
    let (node, expected) = with_cached_tree().await;
    let (key, two) = (key("t"), slot("two"));
    node.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
    let (state, cache) = (node.state_path(&two), node.cache_path(&key));
    std::fs::create_dir_all(cache.join("tree")).unwrap();
    let node = node.restart();
    node.files.fill(&fill(&two, &key, 2, FillFrom::Cache)).await.unwrap();
    assert!(!cache.exists());
    std::fs::create_dir_all(cache.join("tree")).unwrap();
    std::fs::set_permissions(&state, PermissionsExt::from_mode(0o751)).unwrap();
    node.release(&two, &key, 2, "n2").await;
    assert_eq!(without_root_time(tree(&cache.join("tree"))), expected);
}

#[tokio::test]
async fn repeating_what_is_done_changes_nothing() {
    let (node, expected) = with_cached_tree().await;
    let (key, two) = (key("t"), slot("two"));
    node.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
    node.files.fill(&fill(&two, &key, 2, FillFrom::Cache)).await.unwrap();
    assert_eq!(without_root_time(tree(&node.state_path(&two))), expected);
    node.files.capture(&two, &key).await.unwrap();
    node.files.capture(&two, &key).await.unwrap();
    assert_eq!(without_root_time(tree(&node.cache_path(&key).join("tree"))), expected);
    assert_eq!(mode_and_owner(&node.state_path(&two)), (0o755, UNCLAIMED.uid, UNCLAIMED.gid));
}

/// P3: what should be in the cache and is not is an error, never an empty tree.
#[tokio::test]
async fn a_tree_that_is_not_there_is_not_an_empty_tree() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    let error = node.claim(&one, &key, 1, FillFrom::Cache).await.unwrap_err();
    assert!(matches!(error, Error::Disk { .. }), "{error:?}");
    let unclaimed = (0o755, UNCLAIMED.uid, UNCLAIMED.gid);
    assert_eq!(mode_and_owner(&node.state_path(&one)), unclaimed, "nothing was handed over");
    let error = node.files.save(&crate::support::save(&key, 1, "n")).await.unwrap_err();
    assert!(matches!(error, Error::Disk { .. }), "{error:?}");
    assert!(node.store.names("").is_empty());
    assert_eq!(node.files.newest(&key).await.unwrap(), None);
}

/// P4: no tenant's entries are ever taken for another's.
#[tokio::test]
async fn trees_of_two_tenants_never_mix() {
    let (node, _) = with_cached_tree().await;
    let (mine, other, two) = (key("t"), key("other"), slot("two"));
    node.claim(&two, &mine, 2, FillFrom::Cache).await.unwrap();
    let is_not_empty = |error: Error| assert!(matches!(error, Error::NotEmpty { .. }), "{error:?}");
    is_not_empty(node.claim(&two, &other, 1, FillFrom::Empty).await.unwrap_err());
    is_not_empty(node.files.capture(&two, &other).await.unwrap_err());
    is_not_empty(node.files.copy_live(&two, &other).await.unwrap_err());
    // A tree without a note is nobody's.
    let three = slot("three");
    node.prepare(&three).await;
    write(&node.state_path(&three), "stray", b"whose?");
    is_not_empty(node.claim(&three, &other, 1, FillFrom::Empty).await.unwrap_err());
    is_not_empty(node.files.capture(&three, &other).await.unwrap_err());
}

#[tokio::test]
async fn another_user_gets_what_was_the_last_ones() {
    let (node, _) = with_cached_tree().await;
    let (key, two, three) = (key("t"), slot("two"), slot("three"));
    let suid = node.cache_path(&key).join("tree/a.txt");
    std::fs::set_permissions(&suid, PermissionsExt::from_mode(0o4711)).unwrap();
    chown(node.cache_path(&key).join("tree/dir/b.txt"), Some(5), Some(6)).unwrap();
    std::fs::set_permissions(&suid, PermissionsExt::from_mode(0o4711)).unwrap();
    let new = Owner { uid: 500, gid: 600 };
    node.prepare(&two).await;
    let mut filling = fill(&two, &key, 2, FillFrom::Cache);
    filling.run_as = new;
    filling.previous_owner = Some(RUN_AS);
    node.files.fill(&filling).await.unwrap();
    let state = node.state_path(&two);
    assert_eq!(mode_and_owner(&state.join("a.txt")), (0o4711, 500, 600));
    assert_eq!(mode_and_owner(&state.join("dir/b.txt")), (0o644, 5, 6), "another's stays another's");
    assert_eq!(mode_and_owner(&state), (0o751, 500, 600));
    node.files.capture(&two, &key).await.unwrap();
    let mut saving = crate::support::save(&key, 2, "n2");
    saving.run_as = new;
    node.files.save(&saving).await.unwrap();
    // On a node that never saw it, the snapshot itself says who the last one was.
    let other = Node::new(&node.store);
    other.restored(&three, &key, 3).await;
    let state = other.state_path(&three);
    assert_eq!(
        mode_and_owner(&state.join("a.txt")),
        (0o711, RUN_AS.uid, RUN_AS.gid),
        "set-id bits stay behind"
    );
    assert_eq!(mode_and_owner(&state.join("dir/b.txt")), (0o644, 5, 6));
}
