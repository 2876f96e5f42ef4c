//! Directories made by somebody who means harm (P12).

use std::{
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, fs::symlink, net::UnixListener},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use boilerhouse::{
    disk::{self, Dir, Limits, Missing},
    model::Secret,
    state::{Error, FileAction, FileAnswer, FillFrom, SlotFiles},
};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};

use crate::support::{MemoryStore, Node, RUN_AS, key, mode_and_owner, newest, save, slot, tree, write};

/// Nothing here may take longer; a FIFO that is opened waits for ever.
const LIMIT: Duration = Duration::from_secs(60);

fn make_fifo(path: &Path) {
    rustix::fs::mkfifoat(CWD, path, Mode::from_raw_mode(0o666)).unwrap();
}

/// Makes `depth` nested directories with a file at the bottom, by descriptor.
pub(crate) fn make_deep(root: &Path, name: &str, depth: usize) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = rustix::fs::open(root, flags, Mode::empty()).unwrap();
    for _ in 0..depth {
        rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o755)).unwrap();
        at = rustix::fs::openat(&at, name, flags, Mode::empty()).unwrap();
    }
    let create = OFlags::WRONLY | OFlags::CREATE;
    let file = rustix::fs::openat(&at, "bottom", create, Mode::from_raw_mode(0o644)).unwrap();
    rustix::io::write(file, b"deep").unwrap();
}

fn deepest(root: &Path) -> disk::Entry {
    let root = Dir::open(root).unwrap();
    let entries = disk::list(&root, &Limits::TREE, Missing::Error, |_, _| true).unwrap();
    entries.into_iter().max_by_key(|entry| entry.path.len()).unwrap()
}

#[tokio::test]
async fn a_hostile_tree_is_saved_without_being_followed() {
    let store = Arc::new(MemoryStore::default());
    let (node, other) = (Node::new(&store), Node::new(&store));
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    let victim = node.dir.path().join("victim");
    std::fs::create_dir(&victim).unwrap();
    std::fs::write(victim.join("secret"), b"the host's own secret").unwrap();
    symlink("/etc/shadow", root.join("shadow")).unwrap();
    symlink(&victim, root.join("dirlink")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    for name in [&b"..evil"[..], b"-rf", b"new\nline", b"\xff\xfe", b"back\\slash", b"%00", &[b'n'; 255]] {
        std::fs::write(root.join(OsStr::from_bytes(name)), name).unwrap();
    }
    let expected = tree(&root);
    make_fifo(&root.join("fifo"));
    let _socket = UnixListener::bind(root.join("socket")).unwrap();
    std::fs::create_dir(root.join("sub")).unwrap();
    make_fifo(&root.join("sub/fifo"));

    node.files.capture(&one, &key).await.unwrap();
    let saved = tokio::time::timeout(LIMIT, node.files.save(&save(&key, 1, "n"))).await.unwrap().unwrap();
    assert_eq!(saved.skipped, 3);
    let mut restored = other.restored(&two, &key, 2).await;
    restored.remove(&b"sub"[..]).unwrap();
    let mut expected = expected;
    for tree in [&mut expected, &mut restored] {
        tree.get_mut(&b""[..]).unwrap().modified = (0, 0);
    }
    assert_eq!(restored, expected);
    for body in store.objects.lock().unwrap().values() {
        let body = zstd::stream::decode_all(&body[..]).unwrap_or_else(|_| body.to_vec());
        assert!(!body.windows(21).any(|part| part == b"the host's own secret"));
    }
    assert_eq!(std::fs::read(victim.join("secret")).unwrap(), b"the host's own secret");
}

#[tokio::test]
async fn deep_trees_and_long_paths_come_back() {
    let store = Arc::new(MemoryStore::default());
    let (node, other) = (Node::new(&store), Node::new(&store));
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    // More than three times PATH_MAX, and more than a thousand levels.
    make_deep(&node.state_path(&one), &"d".repeat(255), 60);
    make_deep(&node.state_path(&one), "x", 1_200);
    let expected = deepest(&node.state_path(&one));
    assert_eq!(expected.path.len(), 60 * 256 + 6);
    let id = node.files.copy_live(&one, &key).await.unwrap();
    node.files.copy_paused(&id).await.unwrap();
    node.files.drop_checkpoint(&id).await.unwrap();
    node.release(&one, &key, 1, "n").await;
    let newest = newest(&node, &key).await;
    other.claim(&two, &key, 2, FillFrom::Snapshot(newest)).await.unwrap();
    let found = deepest(&other.state_path(&two));
    assert_eq!((&found.path, found.stat.bytes), (&expected.path, 4));
    other.files.discard_slot_state(&two).await.unwrap();
    other.files.wipe(&two).await.unwrap();
    node.files.discard(&key).await.unwrap();
    assert_eq!(node.staging(), Vec::<String>::new());
}

#[tokio::test]
async fn a_tree_too_deep_to_be_saved_is_named_and_can_be_removed() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    make_deep(&node.state_path(&one), "x", 5_000);
    node.files.last_change_ms(&one).await.unwrap().unwrap();
    node.files.capture(&one, &key).await.unwrap();
    let error = node.files.save(&save(&key, 1, "n")).await.unwrap_err();
    let Error::Limit { reason, .. } = error else { panic!("{error:?}") };
    assert!(reason.contains("2000 names in one path"), "{reason}");
    node.files.discard(&key).await.unwrap();
    assert_eq!(node.staging(), Vec::<String>::new());
    assert!(!node.cache_path(&key).exists());
}

/// A directory and a link to the host change places as fast as they can.
#[test]
fn a_swapped_link_loses() {
    let dir = tempfile::tempdir().unwrap();
    let (root, victim) = (dir.path().join("root"), dir.path().join("victim"));
    for path in [&root.join("d"), &victim] {
        std::fs::create_dir_all(path).unwrap();
    }
    std::fs::write(root.join("d/f"), b"tenant").unwrap();
    std::fs::write(victim.join("f"), b"victim").unwrap();
    symlink(&victim, root.join("swap")).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let swapper = std::thread::spawn({
        let (root, stop) = (root.clone(), Arc::clone(&stop));
        move || {
            while !stop.load(Ordering::Relaxed) {
                let (a, b) = (root.join("d"), root.join("swap"));
                rustix::fs::renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE).unwrap();
            }
        }
    });
    let confined = Dir::open(&root).unwrap();
    let (mut read, mut refused) = (0, 0);
    for _ in 0..20_000 {
        match confined.open_dir(b"d").and_then(|dir| dir.open_file(b"f")) {
            Ok((file, _)) => {
                assert_eq!(std::io::read_to_string(file).unwrap(), "tenant");
                read += 1;
            }
            Err(_) => refused += 1,
        }
    }
    for _ in 0..500 {
        let listed = disk::list(&confined, &Limits::TREE, Missing::Skip, |_, _| true).unwrap();
        assert!(listed.iter().filter(|entry| entry.path.ends_with(b"/f")).all(|entry| entry.stat.bytes == 6));
    }
    stop.store(true, Ordering::Relaxed);
    swapper.join().unwrap();
    assert!(read > 0 && refused > 0, "no race: {read} read, {refused} refused");
}

#[test]
fn a_fifo_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    make_fifo(&dir.path().join("fifo"));
    let (tx, rx) = mpsc::channel();
    let confined = Dir::open(dir.path()).unwrap();
    std::thread::spawn(move || tx.send(confined.open_file(b"fifo").is_err()));
    assert!(rx.recv_timeout(LIMIT).unwrap());
    let confined = Dir::open(Path::new("/dev")).unwrap();
    assert!(confined.open_file(b"null").is_err(), "devices are never opened");
}

#[tokio::test]
async fn scripts_reach_nothing_outside() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    let outside = node.dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("f"), b"host").unwrap();
    symlink(&outside, root.join("link")).unwrap();
    symlink(outside.join("f"), root.join("filelink")).unwrap();
    make_fifo(&root.join("fifo"));
    write(&root, "dir/f", b"hello");
    let act = |action| {
        let (files, one) = (node.files.clone(), one.clone());
        async move { tokio::time::timeout(LIMIT, files.state_file(&one, RUN_AS, action)).await.unwrap() }
    };
    let secret = || Secret::new("new");
    for path in ["../outside/f", "/etc/passwd", "link/f", "dir/../../x", "", "a//b", ".", "a\0b"] {
        let path = path.to_owned();
        for action in [
            FileAction::Read(path.clone(), 100),
            FileAction::Write(path.clone(), secret()),
            FileAction::Remove(path.clone()),
            FileAction::Exists(path.clone()),
        ] {
            let refused = act(action.clone()).await;
            assert!(
                matches!(&refused, Err(Error::File { path: named, .. }) if *named == path),
                "{action:?}: {refused:?}"
            );
        }
    }
    for path in ["filelink", "fifo", "dir", "absent"] {
        let refused = act(FileAction::Read(path.into(), 100)).await;
        assert!(matches!(refused, Err(Error::File { .. })), "{path}: {refused:?}");
    }
    assert!(matches!(act(FileAction::Read("dir/f".into(), 4)).await, Err(Error::File { .. })), "too large");
    assert_eq!(act(FileAction::Read("dir/f".into(), 5)).await.unwrap(), FileAnswer::Bytes(b"hello".to_vec()));

    // Writing replaces links and FIFOs themselves, and makes parents as the program's own.
    for path in ["filelink", "fifo", "new/deep/f"] {
        act(FileAction::Write(path.into(), secret())).await.unwrap();
        assert_eq!(std::fs::read(root.join(path)).unwrap(), b"new");
        assert_eq!(mode_and_owner(&root.join(path)), (0o600, RUN_AS.uid, RUN_AS.gid));
    }
    assert_eq!(mode_and_owner(&root.join("new/deep")), (0o755, RUN_AS.uid, RUN_AS.gid));
    assert!(matches!(act(FileAction::Write("dir".into(), secret())).await, Err(Error::File { .. })));

    assert_eq!(
        act(FileAction::List(String::new())).await.unwrap(),
        FileAnswer::Names(["dir", "fifo", "filelink", "link", "new"].map(Into::into).to_vec())
    );
    assert!(act(FileAction::List("link".into())).await.is_err());
    for (path, is_there) in [("link", true), ("dir/f", true), ("absent/x", false), ("dir/f/x", false)] {
        assert_eq!(
            act(FileAction::Exists(path.into())).await.unwrap(),
            FileAnswer::There(is_there),
            "{path}"
        );
    }
    for path in ["link", "new", "absent", "absent/x"] {
        assert_eq!(act(FileAction::Remove(path.into())).await.unwrap(), FileAnswer::Done);
        assert!(root.join(path).symlink_metadata().is_err(), "{path}");
    }
    assert_eq!(std::fs::read(outside.join("f")).unwrap(), b"host");
    assert_eq!(node.staging(), Vec::<String>::new());
}

#[tokio::test]
async fn a_hostile_comm_directory_is_removed_without_being_followed() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let (comm, outside) = (node.comm_path(&one), node.dir.path().join("outside"));
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("f"), b"host").unwrap();
    symlink(&outside, comm.join("link")).unwrap();
    symlink("/var/run/docker.sock", comm.join("app.sock")).unwrap();
    make_fifo(&comm.join("fifo"));
    let _socket = UnixListener::bind(comm.join("socket")).unwrap();
    make_deep(&comm, &"d".repeat(200), 100);
    // The names that removal itself would choose.
    for n in 0..5 {
        let dir = comm.join(format!(".boilerhouse-removing-{n}"));
        std::fs::create_dir_all(dir.join("a/b/c")).unwrap();
        symlink(&outside, dir.join("a/out")).unwrap();
    }
    node.files.capture(&one, &key).await.unwrap();
    node.files.wipe(&one).await.unwrap();
    assert!(!comm.exists());
    assert_eq!(std::fs::read(outside.join("f")).unwrap(), b"host");
}
