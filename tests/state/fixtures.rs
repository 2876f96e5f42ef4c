//! Stores that earlier builds wrote, kept as files: read by this build, and by a reader
//! that has the documentation of the format and nothing of the code (`reader.py`).
//!
//! A change of the format adds a fixture; none is ever written again. `WRITE_FIXTURE=<name>`
//! writes one that is not there yet.

use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use boilerhouse::{
    clock::SystemClock,
    model::{Epoch, Key},
    seal::MasterKey,
    state::{
        Close, Encryption, FillFrom, Open, SaveTree, SlotFiles,
        fence::Author,
        history::{EntryKind, History, Rollback},
    },
};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};

use crate::{
    format::Written,
    support::{Later, MemoryStore, Node, RUN_AS, Tree, key, save, slot, tree, without_set_id, write},
};

const MASTER: [u8; 32] = [42; 32];

/// What is kept: a name, whether it is sealed, and the kinds of its records.
const FIXTURES: [(&str, bool, &str); 3] = [
    ("v0", false, "snapshot"),
    ("v1", false, "open snapshot snapshot restore open close"),
    ("v1-sealed", true, "open snapshot snapshot restore open close"),
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/state/fixtures").join(name)
}

fn encryption(is_sealed: bool) -> Encryption {
    let master = Arc::new(MasterKey::new(&MASTER));
    Encryption::new(Some(master), is_sealed, Arc::new(SystemClock)).unwrap()
}

/// Shows everything of a tree, one line an entry.
fn shown(tree: &Tree) -> String {
    let line = |(path, entry): (&Vec<u8>, &crate::support::Entry)| {
        let (mode, (uid, gid), (seconds, nanoseconds)) = (entry.mode, entry.owner, entry.modified);
        let digest = blake3::hash(&entry.content).to_hex();
        let mut line = format!(
            "\"{}\" {mode:o} {uid}:{gid} {seconds}.{nanoseconds:09} {} bytes {}",
            path.escape_ascii(),
            entry.content.len(),
            &digest[..32],
        );
        for (name, value) in &entry.attributes {
            line += &format!(" {}=\"{}\"", name.escape_ascii(), value.escape_ascii());
        }
        if let Some(first) = &entry.same_as {
            line += &format!(" same as \"{}\"", first.escape_ascii());
        }
        line + "\n"
    };
    tree.iter().map(line).collect()
}

fn load(dir: &Path, store: &MemoryStore) {
    let mut open = vec![dir.to_owned()];
    while let Some(at) = open.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                store.objects.lock().unwrap().insert(name, fs::read(&path).unwrap().into());
            }
        }
    }
}

#[tokio::test]
async fn stores_of_earlier_builds_are_read_by_this_one_and_by_the_book() {
    if let Ok(name) = std::env::var("WRITE_FIXTURE") {
        write_fixture(&name).await;
    }
    for (name, is_sealed, kinds) in FIXTURES {
        let dir = fixture(name);
        let expected = fs::read_to_string(dir.join("expected.txt")).unwrap();
        let store = Arc::new(MemoryStore::default());
        load(&dir.join("store"), &store);
        let before = store.objects.lock().unwrap().clone();
        let node = Node::with_encryption(&store, encryption(is_sealed));
        let found = node.restored(&slot("one"), &key("t"), 9).await;
        assert_eq!(shown(&found), expected, "{name}");
        assert_eq!(*store.objects.lock().unwrap(), before, "{name}: reading changes nothing");

        let history = History::new(Arc::<MemoryStore>::clone(&store), Arc::new(Later), "node".to_owned())
            .with_encryption(encryption(is_sealed));
        let report = history.verify_all(&mut |_| {}).await.unwrap();
        assert!(report.is_sound() && report.orphaned.is_empty(), "{name}: {report:?}");
        let listed = history.list(&key("t"), None, 100).await.unwrap().snapshots;
        let restores = listed.iter().filter(|entry| entry.kind == EntryKind::Restore).count();
        assert_eq!(restores, usize::from(kinds.contains("restore")), "{name}");

        let into = tempfile::tempdir().unwrap();
        let mut reader = Command::new("python3");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/state/reader.py");
        reader.arg(script).arg(dir.join("store")).args(["t", "work"]).arg(into.path());
        if is_sealed {
            reader.arg(hex::encode(MASTER));
        }
        let output = reader.output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), kinds, "{name}");
        let read = tree(into.path());
        assert_eq!(shown(&read), expected, "{name}, by the book");
        // And as sparse as it was.
        let blocks = |path: PathBuf| std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap());
        if name != "v0" {
            assert!(blocks(node.state_path(&slot("one")).join("sparse")) < 100, "{name}");
            assert!(blocks(into.path().join("sparse")) < 100, "{name}, by the book");
        }
    }
}

// === How they were written ===

async fn write_fixture(name: &str) {
    let dir = fixture(name);
    assert!(!dir.exists(), "{name} is kept as it is");
    let (store, expected) = match FIXTURES.into_iter().find(|row| row.0 == name) {
        Some(("v0", ..)) => version_0(),
        Some((_, is_sealed, _)) => version_1(is_sealed).await,
        None => panic!("no fixture has the name {name}"),
    };
    for (name, body) in store.objects.lock().unwrap().iter() {
        let path = dir.join("store").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, body).unwrap();
    }
    fs::write(dir.join("expected.txt"), shown(&expected)).unwrap();
}

fn set_time(path: &Path, seconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// As the last build before version 1 wrote it.
fn version_0() -> (Arc<MemoryStore>, Tree) {
    let mut written = Written::new(false);
    let random: Vec<u8> = (0..40_u32).flat_map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes()).collect();
    let (first, second) = random.split_at(1_000);
    let pack = written.object("p", &zstd::encode_all(&b"alphabeta"[..], 3).unwrap());
    let (one, two) = (written.object("c", first), written.object("c", second));
    let meta = |mode: u32, seconds: i64| {
        let (uid, gid) = (RUN_AS.uid, RUN_AS.gid);
        format!(r#"{{"mode":{mode},"uid":{uid},"gid":{gid},"modified":[{seconds},5]}}"#)
    };
    let json = format!(
        r#"{{"version":0,"tenant":"t","workload":"work","epoch":3,"run_as":{{"uid":{uid},"gid":{gid}}},
        "objects":[{{"name":"{pack}","bytes":9}},{{"name":"{one}","bytes":1000}},{{"name":"{two}","bytes":280}}],
        "root":{root},"items":[
        {{"path":"a","meta":{file},"node":{{"file":{{"bytes":5,"digest":"{alpha}","pieces":[[0,0,5]]}}}}}},
        {{"path":"d","meta":{dir},"node":"directory"}},
        {{"path":"d/b","meta":{set_id},"node":{{"file":{{"bytes":4,"digest":"{beta}","pieces":[[0,5,4]]}}}}}},
        {{"path":"d/none","meta":{file},"node":{{"file":{{"bytes":0,"digest":"{none}","pieces":[]}}}}}},
        {{"path":"large","meta":{file},"node":{{"file":{{"bytes":1280,"digest":"{all}","pieces":[[1,0,1000],[2,0,280]]}}}}}},
        {{"path":"link","meta":{link},"node":{{"symlink":{{"target":"d/b"}}}}}},
        {{"path":{{"base64":"/w=="}},"meta":{dir},"node":"directory"}}]}}"#,
        uid = RUN_AS.uid,
        gid = RUN_AS.gid,
        root = meta(0o700, 9),
        file = meta(0o644, -5),
        set_id = meta(0o6755, 6),
        dir = meta(0o2750, 8),
        link = meta(0o777, 7),
        alpha = blake3::hash(b"alpha"),
        beta = blake3::hash(b"beta"),
        none = blake3::hash(b""),
        all = blake3::hash(&random),
    );
    let manifest = written.manifest(&json);
    written.record(format!(
        r#"{{"version":0,"number":1,"tenant":"t","workload":"work","epoch":3,"nonce":"n",
        "manifest":"{manifest}","created_ms":1,"files":4,"bytes":1289,"skipped":0,"failed_claim":false}}"#
    ));
    let entry = |mode, seconds, content: &[u8]| crate::support::Entry {
        mode,
        owner: (RUN_AS.uid, RUN_AS.gid),
        modified: (seconds, 5),
        content: content.to_vec(),
        attributes: Default::default(),
        same_as: None,
    };
    let tree = [
        ("", entry(0o40700, 9, b"")),
        ("a", entry(0o100644, -5, b"alpha")),
        ("d", entry(0o42750, 8, b"")),
        ("d/b", entry(0o100755, 6, b"beta")),
        ("d/none", entry(0o100644, -5, b"")),
        ("large", entry(0o100644, -5, &random)),
        ("link", entry(0o120777, 7, b"d/b")),
    ];
    let mut tree: Tree = tree.into_iter().map(|(path, entry)| (path.as_bytes().to_vec(), entry)).collect();
    tree.insert(b"\xff".to_vec(), entry(0o42750, 8, b""));
    (written.store(), tree)
}

/// Makes a tree with something of everything.
fn make_tree(root: &Path) {
    use std::os::unix::ffi::OsStrExt;
    write(root, "a.txt", b"alpha");
    write(root, "dir/deep/b.txt", &b"beta ".repeat(500));
    write(root, "dir/none", b"");
    write(root, "large", &(0..1_060_000_u32).map(|n| (n / 4_096) as u8).collect::<Vec<_>>());
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"raw\xfe")), b"not UTF-8").unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    symlink("dir/deep/../\u{fc}", root.join("link")).unwrap();
    fs::hard_link(root.join("a.txt"), root.join("dir/same")).unwrap();
    fs::hard_link(root.join("link"), root.join("link too")).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"in the middle", 3_000_000).unwrap();
    sparse.set_len(9_000_000).unwrap();
    for (path, name, value) in
        [("a.txt", "user.text", &b"x"[..]), ("a.txt", "user.raw", b"\xff\0"), ("", "user.r", b"root")]
    {
        rustix::fs::setxattr(root.join(path), name, value, XattrFlags::empty()).unwrap();
    }
    for (path, mode) in [("a.txt", 0o4755), ("dir", 0o2750), ("dir/none", 0), ("empty", 0o1777), ("", 0o751)]
    {
        fs::set_permissions(root.join(path), PermissionsExt::from_mode(mode)).unwrap();
    }
    let mut seconds = -1_000_000;
    for path in tree(root).keys().rev() {
        seconds += 100_000_000;
        set_time(&root.join(std::ffi::OsStr::from_bytes(path)), seconds);
    }
}

/// A history with records of every kind, written by the real engine.
async fn version_1(is_sealed: bool) -> (Arc<MemoryStore>, Tree) {
    let store = Arc::new(MemoryStore::default());
    let node = Node::with_encryption(&store, encryption(is_sealed));
    let (key, one) = (key("t"), slot("one"));
    open(&node, &key, 1).await;
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    make_tree(&node.state_path(&one));
    let expected = without_set_id(tree(&node.state_path(&one)));
    node.release(&one, &key, 1, "n1").await;
    open(&node, &key, 2).await;
    node.claim(&one, &key, 2, FillFrom::Cache).await.unwrap();
    write(&node.state_path(&one), "dir/later", b"later");
    let id = node.files.copy_live(&one, &key).await.unwrap();
    node.files.copy_paused(&id).await.unwrap();
    let mut saving = save(&key, 2, "n2");
    (saving.tree, saving.is_last) = (SaveTree::Checkpoint(id), false);
    node.files.save(&saving).await.unwrap();
    let history = History::new(Arc::<MemoryStore>::clone(&store), Arc::new(SystemClock), "node".to_owned())
        .with_encryption(encryption(is_sealed));
    // Records 1 and 3 are claims that begin; 3 said nothing any more when 4 was there, and went.
    let back = Rollback { key: key.clone(), snapshot: 2, epoch: Epoch(3), nonce: "back".to_owned() };
    history.restore(&back).await.unwrap();
    open(&node, &key, 4).await;
    let close = Close {
        key: key.clone(),
        epoch: Epoch(4),
        nonce: "close".to_owned(),
        author: author(),
        has_chain: true,
    };
    node.files.close(&close).await.unwrap();
    (store, expected)
}

fn author() -> Author {
    Author { server: "node".to_owned(), term: Some(1) }
}

async fn open(node: &Node, key: &Key, epoch: u64) {
    let head = node.files.head(key).await.unwrap();
    let open = Open {
        key: key.clone(),
        epoch: Epoch(epoch),
        nonce: format!("open {epoch}"),
        author: author(),
        on_top_of: head.as_ref().map_or(0, |head| head.number),
        tree: head.and_then(|head| head.link.tree),
        saving: None,
    };
    node.files.open(&open).await.unwrap();
}
