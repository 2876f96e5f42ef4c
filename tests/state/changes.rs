//! Changes are found by what the disk says of files, and none is missed.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use boilerhouse::{
    model::Owner,
    state::{Error, FillFrom, SaveTree, SlotFiles},
};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use crate::{
    places::Place,
    support::{MemoryStore, Node, RUN_AS, fill, key, newest, save, slot, some_tree, tree, write},
};

/// A change that a program makes.
type Change = fn(&Path);

/// Sets back a file's times of access and modification to what they were.
fn set_back(path: &Path, before: &fs::Metadata) {
    let time = Timespec { tv_sec: before.mtime(), tv_nsec: before.mtime_nsec() };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Waits until the file system's clock is past everything written so far.
pub(crate) fn let_the_clock_tick(dir: &Path) {
    let stamp = |name: &str| {
        fs::write(dir.join(name), "x").unwrap();
        let meta = fs::metadata(dir.join(name)).unwrap();
        fs::remove_file(dir.join(name)).unwrap();
        (meta.ctime(), meta.ctime_nsec())
    };
    let first = stamp(".clock");
    let deadline = Instant::now() + Duration::from_secs(20);
    while stamp(".clock") <= first {
        assert!(Instant::now() < deadline, "the clock stands still");
    }
}

fn store_through_a_map(path: &Path) {
    let program =
        "import mmap,sys\nf=open(sys.argv[1],'r+b')\nm=mmap.mmap(f.fileno(),0)\nx=m[0]\nm[0]=x^255\n";
    assert!(Command::new("python3").args(["-c", program]).arg(path).status().unwrap().success());
}

/// Every way to change a file that leaves as much as it can as it was; for a file
/// at the top, which fill and capture move, and one below.
#[tokio::test]
async fn no_change_hides_behind_a_stat() {
    no_change_hides(&Place::Memory).await;
}

pub(crate) async fn no_change_hides(place: &Place) {
    const CHANGES: [(&str, Change); 12] = [
        ("same size and mtime, at the top", |root| same_size_and_mtime(&root.join("a.txt"))),
        ("same size and mtime, below", |root| same_size_and_mtime(&root.join("dir/b.txt"))),
        ("another file of the same size and mtime", |root| replaced(&root.join("a.txt"))),
        ("another file of the same size and mtime, below", |root| replaced(&root.join("dir/b.txt"))),
        ("through a map", |root| store_through_a_map(&root.join("big.bin"))),
        ("through a map, below", |root| store_through_a_map(&root.join("dir/deep/c.bin"))),
        ("swapped names", |root| {
            fs::rename(root.join("dir/b.txt"), root.join("x")).unwrap();
            fs::rename(root.join("a.txt"), root.join("dir/b.txt")).unwrap();
            fs::rename(root.join("x"), root.join("a.txt")).unwrap();
        }),
        ("a mode, at the top", |root| {
            fs::set_permissions(root.join("a.txt"), std::os::unix::fs::PermissionsExt::from_mode(0o400))
                .unwrap();
        }),
        ("another name of one file", |root| {
            fs::hard_link(root.join("dir/b.txt"), root.join("dir/b2.txt")).unwrap();
            fs::write(root.join("dir/b2.txt"), "BETA").unwrap();
        }),
        ("a time in the future", |root| {
            fs::write(root.join("a.txt"), "ALPHA").unwrap();
            let time = Timespec { tv_sec: 4_000_000_000, tv_nsec: 0 };
            let times = Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(CWD, root.join("a.txt"), &times, AtFlags::empty()).unwrap();
        }),
        ("a file for a directory", |root| {
            fs::remove_dir_all(root.join("dir/deep")).unwrap();
            write(root, "dir/deep", b"a file now");
        }),
        ("another target", |root| {
            fs::remove_file(root.join("link")).unwrap();
            std::os::unix::fs::symlink("dir/c.txt", root.join("link")).unwrap();
        }),
    ];
    for (what, change) in CHANGES {
        let node = Node::new(&place.store());
        let (key, one, two, three) = (key("t"), slot("one"), slot("two"), slot("three"));
        node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
        some_tree(&node.state_path(&one));
        node.release(&one, &key, 1, "n1").await;
        node.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
        change(&node.state_path(&two));
        let expected = tree(&node.state_path(&two));
        node.release(&two, &key, 2, "n2").await;
        let other = Node::new(&node.store);
        assert!(other.restored(&one, &key, 3).await == expected, "{what}: saved at rest");
        // The restored tree has an index of its own, and so has one that was saved twice.
        for (node, epoch) in [(&node, 4), (&other, 5)] {
            let (slot, from) = if epoch == 4 { (&three, FillFrom::Cache) } else { (&one, FillFrom::Empty) };
            if epoch == 4 {
                node.claim(slot, &key, epoch, from).await.unwrap();
            }
            write(&node.state_path(slot), "one-more", what.as_bytes());
            let expected = tree(&node.state_path(slot));
            node.release(slot, &key, epoch, &format!("n{epoch}")).await;
            assert!(Node::new(&node.store).restored(&two, &key, 9).await == expected, "{what}: saved again");
        }
    }
}

fn same_size_and_mtime(path: &Path) {
    let before = fs::metadata(path).unwrap();
    let content: Vec<u8> = fs::read(path).unwrap().iter().map(|byte| !byte).collect();
    fs::write(path, content).unwrap();
    set_back(path, &before);
}

fn replaced(path: &Path) {
    let before = fs::metadata(path).unwrap();
    let content: Vec<u8> = fs::read(path).unwrap().iter().map(|byte| !byte).collect();
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    std::os::unix::fs::chown(&new, Some(RUN_AS.uid), Some(RUN_AS.gid)).unwrap();
    set_back(&new, &before);
    fs::rename(&new, path).unwrap();
}

#[tokio::test]
async fn an_unchanged_tree_needs_no_new_object_but_its_record() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state_path(&one));
    node.release(&one, &key, 1, "n1").await;
    let before = [node.store.names("/p/"), node.store.names("/c/"), node.store.names("/m/")];
    let first = newest(&node, &key).await;
    for epoch in 2..5 {
        node.claim(&one, &key, epoch, FillFrom::Cache).await.unwrap();
        let saved = node.release(&one, &key, epoch, &format!("n{epoch}")).await;
        assert_eq!((saved.sent_bytes, &saved.snapshot.manifest), (0, &first.manifest));
        assert_eq!(
            (saved.snapshot.number, saved.snapshot.files, saved.snapshot.bytes),
            (epoch, first.files, first.bytes)
        );
    }
    assert_eq!([node.store.names("/p/"), node.store.names("/c/"), node.store.names("/m/")], before);
}

/// The index is worth what its digest says: without it, or with another one, the
/// tree is read.
#[tokio::test]
async fn a_damaged_index_only_costs_time() {
    let damages: [fn(&Path); 4] = [
        |index| fs::remove_file(index).unwrap(),
        |index| fs::write(index, "").unwrap(),
        |index| {
            let mut body = fs::read(index).unwrap();
            let middle = body.len() / 2;
            body[middle] ^= 1;
            fs::write(index, body).unwrap();
        },
        |index| {
            let body = fs::read(index).unwrap();
            fs::write(index, &body[..body.len() - 1]).unwrap();
        },
    ];
    for damage in damages {
        let node = Node::new(&Arc::new(MemoryStore::default()));
        let (key, one) = (key("t"), slot("one"));
        node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
        some_tree(&node.state_path(&one));
        node.release(&one, &key, 1, "n1").await;
        damage(&node.cache_path(&key).join("index"));
        same_size_and_mtime(&node.cache_path(&key).join("tree/a.txt"));
        let expected = tree(&node.cache_path(&key).join("tree"));
        node.files.save(&save(&key, 1, "n2")).await.unwrap();
        assert!(Node::new(&node.store).restored(&one, &key, 2).await == expected);
    }
}

/// What a checkpoint has copied so far.
fn copied(node: &Node) -> Vec<String> {
    let staging = node.dir.path().join("state/staging");
    let mut open: Vec<PathBuf> =
        fs::read_dir(staging).unwrap().map(|e| e.unwrap().path().join("tree")).collect();
    let mut files = Vec::new();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let (kind, path) = entry.map(|entry| (entry.file_type().unwrap(), entry.path())).unwrap();
            match (kind.is_dir(), kind.is_file()) {
                (true, _) => open.push(path),
                (_, true) => files.push(path.file_name().unwrap().to_string_lossy().into_owned()),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

#[tokio::test]
async fn a_checkpoint_copies_only_what_changed_since_the_last_snapshot() {
    only_what_changed_is_copied(&Place::Memory).await;
}

pub(crate) async fn only_what_changed_is_copied(place: &Place) {
    let node = Node::new(&place.store());
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    some_tree(&root);
    let all = ["a.txt", "b.txt", "big.bin", "c.bin"];
    let rounds: [(Change, &[&str]); 4] = [
        (|_| {}, &all),
        (|_| {}, &[]),
        (|root| same_size_and_mtime(&root.join("dir/b.txt")), &["b.txt"]),
        (|root| store_through_a_map(&root.join("big.bin")), &["big.bin"]),
    ];
    for (round, (change, expected)) in rounds.into_iter().enumerate() {
        change(&root);
        let_the_clock_tick(node.dir.path());
        let id = node.files.copy_live(&one, &key).await.unwrap();
        node.files.copy_paused(&id).await.unwrap();
        assert_eq!(copied(&node), expected, "round {round}");
        let mut saving = save(&key, 1, &format!("round {round}"));
        saving.tree = SaveTree::Checkpoint(id.clone());
        node.files.save(&saving).await.unwrap();
        node.files.drop_checkpoint(&id).await.unwrap();
        let restored = Node::new(&node.store).restored(&slot("x"), &key, 2).await;
        assert!(restored == tree(&root), "round {round}");
    }
    // Nor does the release read what the last checkpoint had.
    let last = newest(&node, &key).await;
    assert_eq!(node.release(&one, &key, 1, "release").await.snapshot.manifest, last.manifest);
}

/// A page that is dirty when the program goes on takes stores without a new time.
#[tokio::test]
async fn a_store_to_a_page_that_was_dirty_under_pause_is_in_the_next_checkpoint() {
    use std::io::{BufRead, BufReader, Write};
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    write(&root, "mapped", &[0; 8_192]);
    let program = "import mmap,sys\nf=open(sys.argv[1],'r+b')\nm=mmap.mmap(f.fileno(),0)\n\
                   for line in sys.stdin:\n m[0]=int(line)\n print(flush=True)\n";
    let mut child = Command::new("python3")
        .args(["-c", program])
        .arg(root.join("mapped"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    let mut store = |value: u8| {
        writeln!(to, "{value}").unwrap();
        from.read_line(&mut String::new()).unwrap();
    };
    for round in 0..4_u8 {
        store(10 + round);
        let id = node.files.copy_live(&one, &key).await.unwrap();
        // Between the passes: the page is dirty from here on.
        store(20 + round);
        node.files.copy_paused(&id).await.unwrap();
        let mut saving = save(&key, 1, &format!("round {round}"));
        saving.tree = SaveTree::Checkpoint(id.clone());
        node.files.save(&saving).await.unwrap();
        node.files.drop_checkpoint(&id).await.unwrap();
        let restored = Node::new(&node.store).restored(&slot("x"), &key, 2).await;
        assert_eq!(restored[&b"mapped"[..]].content[0], 20 + round);
    }
    drop(to);
    child.wait().unwrap();
}

#[tokio::test]
async fn another_user_s_tree_is_saved_as_it_is() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state_path(&one));
    node.release(&one, &key, 1, "n1").await;
    node.prepare(&two).await;
    let mut filling = fill(&two, &key, 2, FillFrom::Cache);
    filling.run_as = Owner { uid: 500, gid: 600 };
    filling.previous_owner = Some(RUN_AS);
    node.files.fill(&filling).await.unwrap();
    let expected = tree(&node.state_path(&two));
    assert_eq!(expected[&b"dir/b.txt"[..]].owner, (500, 600));
    node.files.capture(&two, &key).await.unwrap();
    let mut saving = save(&key, 2, "n2");
    saving.run_as = filling.run_as;
    node.files.save(&saving).await.unwrap();
    let other = Node::new(&node.store);
    other.prepare(&one).await;
    let mut filling = fill(&one, &key, 3, FillFrom::Snapshot(newest(&other, &key).await));
    filling.run_as = saving.run_as;
    other.files.fill(&filling).await.unwrap();
    assert!(tree(&other.state_path(&one)) == expected);
}

/// A tree at rest does not change; should it all the same, no mixture is saved.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_whenever_it_is_read_is_reported_and_kept() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    some_tree(&node.state_path(&one));
    node.release(&one, &key, 1, "n1").await;
    let before = newest(&node, &key).await;
    // So large that it cannot be read between two changes.
    let path = node.cache_path(&key).join("tree/busy");
    fs::write(&path, vec![1; 40_000_000]).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (path, stop) = (path.clone(), Arc::clone(&stop));
        move || {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            for byte in (0..=255).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                file.write_all_at(&[byte], 0).unwrap();
            }
        }
    });
    let saved = node.files.save(&save(&key, 1, "busy")).await;
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    let Err(Error::Disk { path, source, .. }) = &saved else { panic!("{saved:?}") };
    let is_said = source.to_string().contains("changes while it is read");
    assert!(path.ends_with("busy") && is_said, "{saved:?}");
    assert_eq!(newest(&node, &key).await, before, "nothing was published");
    let expected = tree(&node.cache_path(&key).join("tree"));
    node.files.save(&save(&key, 1, "at rest")).await.unwrap();
    assert!(Node::new(&node.store).restored(&slot("x"), &key, 2).await == expected);
}
