//! Export and import: everything comes back through directories, archives and buckets;
//! hostile archives and claimed tenants are refused; the commands and their errors.

use std::{
    io::Write as _,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use boilerhouse::{
    clock::SystemClock,
    model::{Epoch, Key, Owner, spec::Layout},
    seal::MasterKey,
    state::{
        Encryption, FillFrom, Open, SlotFiles,
        fence::Author,
        history::History,
        transfer::{self, Error, Export, Import, Imported, Source},
    },
    store::{FaultStore, LocalStore, S3Store, SharedStore, Store, s3::Limits},
};
use bytes::Bytes;

use crate::{
    nth::AnyNode,
    radosgw::Radosgw,
    s3_server::{BUCKET, S3Server},
    support::{MemoryStore, Node, Tree, key, save, slot, some_tree, tree, without_set_id, write},
};

/// A tree with everything that a transfer must keep.
fn hard_tree(root: &Path) {
    some_tree(root);
    write(root, &format!("{}/{}/long", "l".repeat(255), "m".repeat(255)), b"long");
    std::fs::write(root.join(std::ffi::OsStr::from_bytes(b"not-utf8-\xff")), b"bytes").unwrap();
    write(root, "setuid", b"x");
    std::fs::set_permissions(root.join("setuid"), PermissionsExt::from_mode(0o4755)).unwrap();
    write(root, "unreadable", b"x");
    std::fs::set_permissions(root.join("unreadable"), PermissionsExt::from_mode(0o000)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("out")).unwrap();
    std::os::unix::fs::symlink("x".repeat(300), root.join("far")).unwrap();
    std::fs::hard_link(root.join("a.txt"), root.join("same")).unwrap();
    std::fs::hard_link(root.join("a.txt"), root.join("l".repeat(255)).join("same")).unwrap();
    for (name, at) in [("sparse", 3 << 20), ("all hole", 0)] {
        let file = std::fs::File::create(root.join(name)).unwrap();
        file.set_len(8 << 20).unwrap();
        if at > 0 {
            file.write_all_at(b"data", at).unwrap();
        }
        rustix::fs::fsetxattr(&file, "user.kind", name.as_bytes(), rustix::fs::XattrFlags::empty()).unwrap();
        let old = std::time::UNIX_EPOCH - std::time::Duration::from_nanos(1_500_000_001);
        file.set_modified(old).unwrap();
    }
    let read_only = root.join("empty");
    std::fs::set_permissions(read_only, PermissionsExt::from_mode(0o500)).unwrap();
}

fn blocks(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// A node with the hard tree saved in a layout; answers the tree.
async fn with_tree(store: &Arc<MemoryStore>, encryption: Encryption, layout: Layout) -> Tree {
    let node = Node::with_encryption(store, encryption);
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    hard_tree(&node.state_path(&one));
    let expected = tree(&node.state_path(&one));
    node.files.capture(&one, &key).await.unwrap();
    let mut saving = save(&key, 1, "n1");
    saving.persist.layout = layout;
    node.files.save(&saving).await.unwrap();
    expected
}

fn history(store: &Arc<MemoryStore>, encryption: &Encryption) -> History {
    let store: SharedStore = Arc::<MemoryStore>::clone(store);
    History::new(store, Arc::new(SystemClock), "node".to_owned()).with_encryption(encryption.clone())
}

fn importing(store: &SharedStore, key: &Key, scratch: &Path) -> Import {
    Import {
        store: store.clone(),
        clock: Arc::new(SystemClock),
        encryption: Encryption::off(Arc::new(SystemClock)),
        server: "node".to_owned(),
        key: key.clone(),
        persist: save(key, 1, "n").persist,
        max_bytes: None,
        owner: None,
        replace: false,
        scratch: scratch.to_owned(),
    }
}

async fn import(import: &Import, source: Source) -> Result<Imported, Error> {
    let imported = transfer::import(import, source, &mut |_| {}).await;
    let left = std::fs::read_dir(&import.scratch).unwrap().count();
    assert_eq!(left, 0, "the scratch directory is removed");
    imported
}

fn off() -> Encryption {
    Encryption::off(Arc::new(SystemClock))
}

/// What an import is on another node; set-id bits are gone by then.
async fn restored(store: &Arc<MemoryStore>, key: &Key) -> Tree {
    Node::new(store).restored(&slot("x"), key, 9).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_and_an_archive_have_the_whole_tree_in_every_layout() {
    let sealed = || {
        let master = Some(Arc::new(MasterKey::new(&[1; 32])));
        Encryption::new(master, true, Arc::new(SystemClock)).unwrap()
    };
    for (layout, encryption) in
        [(Layout::Snapshot, off()), (Layout::Snapshot, sealed()), (Layout::Mirror, off())]
    {
        let store = Arc::new(MemoryStore::default());
        let expected = with_tree(&store, encryption.clone(), layout).await;
        let history = history(&store, &encryption);
        let dir = tempfile::tempdir().unwrap();
        let (target, archive) = (dir.path().join("out"), dir.path().join("out.tar.zst"));
        let (key, mut steps) = (key("t"), 0);
        let to = Export::Directory(target.clone());
        let done = transfer::export(&history, &key, None, to, &mut |_| steps += 1).await.unwrap();
        assert_eq!((done.snapshot, done.entries, steps), (1, expected.len() as u64 - 1, expected.len() - 1));
        assert_eq!(tree(&target), without_set_id(expected.clone()), "{layout:?}");
        assert!(blocks(&target.join("sparse")) < 1 << 20, "{layout:?}: holes are kept");
        let to = Export::Archive(archive.clone());
        transfer::export(&history, &key, Some(1), to, &mut |_| {}).await.unwrap();

        // GNU tar reads it as it is.
        let with_tar = dir.path().join("tar");
        std::fs::create_dir(&with_tar).unwrap();
        let plain = zstd::decode_all(std::fs::File::open(&archive).unwrap()).unwrap();
        std::fs::write(dir.path().join("plain.tar"), &plain).unwrap();
        let tar = Command::new("tar")
            .args(["-xpf", "../plain.tar", "--xattrs", "--xattrs-include=*"])
            .current_dir(&with_tar)
            .output()
            .unwrap();
        assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
        assert_eq!(tree(&with_tar), expected, "{layout:?}: GNU tar");
        assert!(blocks(&with_tar.join("sparse")) < 1 << 20, "{layout:?}: GNU tar sees holes");
        // And we read GNU tar's, sparse files and attributes with it.
        let made = Command::new("tar")
            .args(["-cf", "gnu.tar", "--format=posix", "--sparse", "--xattrs", "-C", "tar", "."])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

        let scratch = tempfile::tempdir().unwrap();
        let other = Arc::new(MemoryStore::default());
        let shared: SharedStore = Arc::<MemoryStore>::clone(&other);
        let open = |path: PathBuf| Box::new(std::fs::File::open(path).unwrap());
        for (name, source) in [
            ("dir", Source::Directory(with_tar.clone())),
            ("zst", Source::Archive(open(archive.clone()))),
            ("plain", Source::Archive(Box::new(std::io::Cursor::new(plain.clone())))),
            ("gnu", Source::Archive(open(dir.path().join("gnu.tar")))),
        ] {
            let key = crate::support::key(name);
            let imported = import(&importing(&shared, &key, scratch.path()), source).await.unwrap();
            assert_eq!((imported.skipped, imported.attributes), (0, 0), "{name}");
            let found = restored(&other, &key).await;
            assert_eq!(found, without_set_id(expected.clone()), "{layout:?}: {name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_puts_nothing_where_something_is_or_what_is_damaged() {
    let store = Arc::new(MemoryStore::default());
    with_tree(&store, off(), Layout::Snapshot).await;
    let history = history(&store, &off());
    let (dir, key) = (tempfile::tempdir().unwrap(), key("t"));
    let full = dir.path().join("full");
    write(&full, "mine", b"mine");
    write(dir.path(), "file.tar.zst", b"mine");
    for to in [Export::Directory(full.clone()), Export::Archive(dir.path().join("file.tar.zst"))] {
        let error = transfer::export(&history, &key, None, to, &mut |_| {}).await.unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    }
    let to = Export::Directory(dir.path().join("none"));
    let error = transfer::export(&history, &key, Some(7), to, &mut |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("no snapshot 7"), "{error}");
    *store.garbles.lock().unwrap() = Some("/c/");
    for to in [Export::Directory(dir.path().join("d")), Export::Archive(dir.path().join("a.tar.zst"))] {
        let error = transfer::export(&history, &key, None, to, &mut |_| {}).await.unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
    }
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "nothing was left: {names:?}");
}

/// An import is a record on top: it is refused over state and over claims, and fences.
#[tokio::test(flavor = "multi_thread")]
async fn p1_p2_an_import_asks_before_it_replaces_and_fences_what_is_unsaved() {
    let store = Arc::new(MemoryStore::default());
    let shared: SharedStore = Arc::<MemoryStore>::clone(&store);
    let node = Node::new(&store);
    let (key, dir, scratch) = (key("t"), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(dir.path(), "f", b"imported");
    let source = || Source::Directory(dir.path().to_owned());
    node.claim(&slot("one"), &key, 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&slot("one")), "f", b"first");
    node.release(&slot("one"), &key, 1, "n1").await;

    let mut asked = importing(&shared, &key, scratch.path());
    let error = import(&asked, source()).await.unwrap_err();
    assert!(
        matches!(error, Error::Exists { newest: 1, .. }) && error.to_string().contains("--replace"),
        "{error}"
    );
    asked.replace = true;
    let author = Author { server: "node".to_owned(), term: None };
    let open = |epoch: u64, on_top_of| Open {
        key: key.clone(),
        epoch: Epoch(epoch),
        nonce: format!("open-{epoch}"),
        author: author.clone(),
        on_top_of,
        tree: None,
        saving: None,
    };
    node.files.open(&open(2, 1)).await.unwrap();
    let error = import(&asked, source()).await.unwrap_err();
    assert!(matches!(&error, Error::Claimed { server, epoch: 2, .. } if server == "node"), "{error:?}");
    // The claim ends with a tree that is not saved yet.
    node.claim(&slot("two"), &key, 2, FillFrom::Cache).await.unwrap();
    write(&node.state_path(&slot("two")), "f", b"unsaved");
    node.files.capture(&slot("two"), &key).await.unwrap();
    node.files
        .close(&boilerhouse::state::Close {
            has_chain: true,
            key: key.clone(),
            epoch: Epoch(2),
            nonce: "c".into(),
            author: author.clone(),
        })
        .await
        .unwrap();
    asked.owner = Some(Owner { uid: 5, gid: 6 });
    let imported = import(&asked, source()).await.unwrap();
    assert_eq!(imported.snapshot.number, 5, "an open, a snapshot");
    let error = node.files.save(&save(&key, 2, "n2")).await.unwrap_err();
    assert!(matches!(error, boilerhouse::state::Error::Fenced { .. }), "{error:?}");
    assert_eq!(tree(&node.cache_path(&key).join("tree"))[&b"f"[..]].content, b"unsaved", "it is kept");
    assert_eq!(restored(&store, &key).await[&b"f"[..]].content, b"imported");
    let page = history(&store, &off()).list(&key, None, 10).await.unwrap();
    assert_eq!(
        page.snapshots.iter().map(|it| it.number).collect::<Vec<_>>(),
        [5, 1],
        "what was there is history"
    );
}

/// Path, kind, where a link leads, content.
type TarEntry<'a> = (&'a [u8], tar::EntryType, &'a [u8], &'a [u8]);

/// Builds a tar of these entries, whatever they say.
fn tar_of(entries: &[TarEntry<'_>]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (path, kind, link, content) in entries {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// P12: nothing in an archive leads out of the tree, and what is no tree's is told.
#[tokio::test(flavor = "multi_thread")]
async fn p12_a_hostile_archive_is_refused_and_touches_nothing_outside() {
    use tar::EntryType as Kind;
    const FILE: Kind = Kind::Regular;
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    std::fs::write(&victim, b"untouched").unwrap();
    let to_outside = outside.path().to_str().unwrap().as_bytes().to_vec();
    let to_victim = victim.to_str().unwrap().as_bytes().to_vec();
    let long = vec![b'x'; 5 << 20];
    let none: &[u8] = b"";
    let mut broken = tar_of(&[(b"f", FILE, none, b"x")]);
    broken[0] = b'g';
    let mut cut = tar_of(&[(b"f", FILE, none, &[1; 2_000])]);
    cut.truncate(1_500);
    let mut endless = tar_of(&[(b"f", FILE, none, b"x")]);
    endless.truncate(1_024);
    let rows: Vec<(&str, Vec<u8>, &str)> = vec![
        ("absolute", tar_of(&[(b"/etc/x", FILE, none, b"x")]), "is absolute"),
        ("up", tar_of(&[(b"../x", FILE, none, b"x")]), "`..`"),
        ("up inside", tar_of(&[(b"a/../../x", FILE, none, b"x")]), "`..`"),
        ("twice", tar_of(&[(b"f", FILE, none, b"x"), (b"f", FILE, none, b"y")]), "is there twice"),
        (
            "through a link",
            tar_of(&[(b"d", Kind::Symlink, &to_outside, none), (b"d/victim", FILE, none, b"x")]),
            "no directory",
        ),
        (
            "over a link",
            tar_of(&[(b"d", Kind::Symlink, &to_victim, none), (b"d", FILE, none, b"x")]),
            "twice",
        ),
        (
            "a directory over a link",
            tar_of(&[(b"d", Kind::Symlink, &to_outside, none), (b"d/", Kind::Directory, none, none)]),
            "twice",
        ),
        ("hard link, absolute", tar_of(&[(b"h", Kind::Link, &to_victim, none)]), "out of the tree"),
        ("hard link, up", tar_of(&[(b"h", Kind::Link, b"../victim", none)]), "out of the tree"),
        (
            "hard link through a link",
            tar_of(&[(b"d", Kind::Symlink, &to_outside, none), (b"h", Kind::Link, b"d/victim", none)]),
            "no file before it",
        ),
        (
            "hard link to a directory",
            tar_of(&[(b"d/", Kind::Directory, none, none), (b"h", Kind::Link, b"d", none)]),
            "no file",
        ),
        ("a link to itself", tar_of(&[(b"h", Kind::Link, b"h", none)]), "no file before it"),
        ("old sparse", tar_of(&[(b"s", Kind::GNUSparse, none, none)]), "--format=posix"),
        ("unknown", tar_of(&[(b"s", Kind::new(b'Z'), none, none)]), "kind 'Z'"),
        ("a large description", tar_of(&[(b"x", Kind::XHeader, none, &long)]), "at most"),
        ("a broken description", tar_of(&[(b"x", Kind::XHeader, none, b"99 a=b\n")]), "extended header"),
        (
            "a lying sparse map",
            tar_of(&[
                (b"x", Kind::XHeader, none, b"22 GNU.sparse.major=1\n27 GNU.sparse.realsize=100\n"),
                (b"s", FILE, none, b"1\n90\n20\nxxxxxxxxxxxxxxxxxxxx"),
            ]),
            "sparse",
        ),
        ("a broken header", broken, "checksum"),
        ("cut off", cut, "cut off"),
        ("no end", endless, "end"),
        ("nothing", Vec::new(), "empty"),
        ("no tar", vec![b'x'; 4_096], "checksum"),
    ];
    let store = Arc::new(MemoryStore::default());
    let shared: SharedStore = Arc::<MemoryStore>::clone(&store);
    let (key, scratch) = (key("t"), tempfile::tempdir().unwrap());
    for (name, archive, expected) in rows {
        let from = Source::Archive(Box::new(std::io::Cursor::new(archive)));
        let error = import(&importing(&shared, &key, scratch.path()), from).await.unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(expected), "{name}: {error}");
        assert_eq!(store.names(""), Vec::<String>::new(), "{name}: nothing has happened");
    }
    // Devices are left out and counted; a link that leads out is data.
    let archive = tar_of(&[
        (b"./dev", Kind::Char, none, none),
        (b"./pipe", Kind::Fifo, none, none),
        (b"./out", Kind::Symlink, &to_victim, none),
        (b"./deep/file", FILE, none, b"x"),
    ]);
    let from = Source::Archive(Box::new(std::io::Cursor::new(archive)));
    let imported = import(&importing(&shared, &key, scratch.path()), from).await.unwrap();
    assert_eq!((imported.skipped, imported.snapshot.files), (2, 1));
    let found = restored(&store, &key).await;
    assert_eq!(found[&b"out"[..]].content, to_victim);
    assert_eq!(found.len(), 4, "{found:?}");
    assert_eq!(std::fs::read(&victim).unwrap(), b"untouched");
    assert_eq!(victim.metadata().unwrap().nlink(), 1);
}

/// Plain objects that were put by hand, as rclone leaves a directory.
async fn from_a_bucket(name: &str, connect: impl Fn(&str) -> S3Store) {
    let random = boilerhouse::clock::random_hex(&SystemClock, 8);
    let by_hand = connect(&format!("tree-{random}"));
    let large: Vec<u8> = (0..20_000_000_u32).map(|n| n.to_le_bytes()[usize::from(n % 3 == 0)]).collect();
    for (path, body) in
        [("a.txt", Bytes::from("alpha")), ("dir/b", Bytes::new()), ("dir/large", large.clone().into())]
    {
        let parts = futures_util::stream::iter([Ok(body)]);
        by_hand.put_parts(path, Box::pin(parts)).await.unwrap();
    }
    let store = Arc::new(MemoryStore::default());
    let shared: SharedStore = Arc::<MemoryStore>::clone(&store);
    let (key, scratch) = (key("t"), tempfile::tempdir().unwrap());
    let mut asked = importing(&shared, &key, scratch.path());
    asked.owner = Some(Owner { uid: 1_234, gid: 5_678 });
    let source = Source::Objects(Arc::new(connect(&format!("tree-{random}")).of_others()));
    let imported = import(&asked, source).await.unwrap();
    assert_eq!(imported.snapshot.files, 3, "{name}");
    let found = restored(&store, &key).await;
    assert_eq!(found[&b"a.txt"[..]].content, b"alpha", "{name}");
    assert!(found[&b"dir/large"[..]].content == large, "{name}");
    let (mode, owner) = (found[&b"dir/b"[..]].mode & 0o7777, found[&b"dir/b"[..]].owner);
    // The owner that the files were given is who the program runs as, whoever that is.
    assert_eq!((mode, owner), (0o644, (crate::support::RUN_AS.uid, crate::support::RUN_AS.gid)), "{name}");
    let empty = Source::Objects(Arc::new(connect(&format!("nothing-{random}")).of_others()));
    let error =
        import(&importing(&shared, &crate::support::key("u"), scratch.path()), empty).await.unwrap_err();
    assert!(error.to_string().contains("there is no object"), "{name}: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_objects_of_an_s3_server_in_process_are_imported() {
    let server = S3Server::start().await;
    let aws = server.aws();
    from_a_bucket("s3", |prefix| {
        S3Store::connect(BUCKET, prefix, &aws, Limits::default(), Arc::new(SystemClock)).unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_objects_of_radosgw_are_imported() {
    let s3 = Radosgw::find();
    from_a_bucket("radosgw", |prefix| {
        S3Store::connect(&s3.bucket, prefix, &s3.aws, Limits::default(), Arc::new(SystemClock)).unwrap()
    })
    .await;
}

/// What a foreign tool did to a mirror is refused by a fill, and taken over by an import.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_mirror_is_taken_over() {
    let store = Arc::new(MemoryStore::default());
    let shared: SharedStore = Arc::<MemoryStore>::clone(&store);
    let before = with_tree(&store, off(), Layout::Mirror).await;
    let (key, scratch) = (key("t"), tempfile::tempdir().unwrap());
    let name = |path: &str| format!("t/{}/f/{path}", key.digest());
    {
        let mut objects = store.objects.lock().unwrap();
        objects.insert(name("a.txt"), Bytes::from_static(b"changed by hand"));
        objects.insert(name("new dir/new=25"), Bytes::from_static(b"added"));
        objects.remove(&name("setuid")).unwrap();
    }
    let other = Node::new(&store);
    let newest = crate::support::newest(&other, &key).await;
    other.claim(&slot("x"), &key, 2, FillFrom::Snapshot(newest)).await.unwrap_err();
    let mut asked = importing(&shared, &key, scratch.path());
    asked.replace = true;
    asked.persist.layout = Layout::Mirror;
    import(&asked, Source::Mirror).await.unwrap();
    let found = restored(&store, &key).await;
    assert_eq!(found[&b"a.txt"[..]].content, b"changed by hand");
    assert_eq!(found[&b"same"[..]].content, b"changed by hand", "one file still");
    assert_eq!(found[&b"a.txt"[..]].mode, before[&b"a.txt"[..]].mode);
    assert_eq!(found[&b"new dir/new%"[..]].content, b"added");
    assert!(!found.contains_key(&b"setuid"[..]));
    assert_eq!(found[&b"out"[..]].content, b"/etc/passwd");
    assert_eq!(found[&b"sparse"[..]].attributes, before[&b"sparse"[..]].attributes);
    asked.persist.layout = Layout::Snapshot;
    import(&asked, Source::Directory(scratch.path().to_owned())).await.unwrap();
    let error = import(&asked, Source::Mirror).await.unwrap_err();
    assert!(error.to_string().contains("not in the layout"), "{error}");
}

/// The commands, on a store in a directory.
struct Commands {
    dir: tempfile::TempDir,
}

impl Commands {
    fn command(&self, arguments: &[&str]) -> Command {
        let path = |name: &str| self.dir.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_boilerhouse"));
        command
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var("PATH").unwrap_or_default())
            .env("TMPDIR", path("scratch"))
            .env("BOILERHOUSE_STORE", format!("file://{}", path("store").display()))
            .env("BOILERHOUSE_STATE_DIR", path("state"))
            .env("BOILERHOUSE_WORKLOADS_DIR", path("workloads"))
            .env("BOILERHOUSE_SCRIPTS_DIR", path("scripts"))
            .env("BOILERHOUSE_INSTANCE", "test-transfer")
            .current_dir(self.dir.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str], input: Option<&[u8]>) -> Output {
        let mut child = self.command(arguments).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.unwrap_or_default()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn ok(&self, arguments: &[&str], input: Option<&[u8]>) -> Vec<u8> {
        let output = self.run(arguments, input);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn fails(&self, arguments: &[&str], status: i32, parts: &[&str]) {
        let output = self.run(arguments, None);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {text}");
        for part in parts {
            assert!(text.contains(part), "{arguments:?}: {part:?} is not in {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_carry_state_and_say_what_is_wrong() {
    let commands = Commands { dir: tempfile::tempdir().unwrap() };
    for folder in ["workloads", "scripts", "scratch", "tree"] {
        std::fs::create_dir(commands.dir.path().join(folder)).unwrap();
    }
    let workload = |id: &str, layout: &str| {
        let script = format!(
            "//! A worker.\nfn workload() {{ #{{ id: \"{id}\", image: \"app:1\", volumes: #{{ state: #{{ \
             container_path: \"/data\" }} }}, persist: #{{ layout: \"{layout}\" }} }} }}\n"
        );
        std::fs::write(commands.dir.path().join(format!("workloads/{id}.rhai")), script).unwrap();
    };
    workload("work", "mirror");
    some_tree(&commands.dir.path().join("tree"));
    let expected = tree(&commands.dir.path().join("tree"));
    commands.fails(&["state", "export", "alice", "out"], 1, &["no state of alice"]);
    let told = commands.ok(&["state", "import", "alice", "tree"], None);
    assert!(String::from_utf8_lossy(&told).contains("imported as snapshot 2 of alice: 4 files"), "{told:?}");
    commands.fails(
        &["state", "import", "alice", "tree"],
        1,
        &["has state already (snapshot 2)", "--replace"],
    );
    commands.ok(&["state", "export", "alice", "out"], None);
    assert_eq!(tree(&commands.dir.path().join("out")), expected);
    commands.fails(&["state", "export", "alice", "out"], 1, &["is not empty"]);
    let archive = commands.ok(&["state", "export", "alice", "-"], None);
    commands.ok(&["state", "import", "bob", "--workload", "work", "-"], Some(&archive));
    commands.ok(&["state", "export", "bob", "bob.tar.zst"], None);
    commands.ok(&["state", "import", "--replace", "bob", "bob.tar.zst"], None);
    commands.ok(&["state", "import", "--replace", "--mirror", "bob"], None);
    commands.ok(&["state", "export", "bob", "bob"], None);
    assert_eq!(tree(&commands.dir.path().join("bob")), expected);
    commands.ok(&["state", "verify", "--all"], None);

    commands.fails(&["state", "export", "alice", "x.zip"], 2, &["allowed", ".tar.zst"]);
    commands.fails(&["state", "export", "alice", "--snapshot", "9", "x"], 1, &["no snapshot 9", "2"]);
    commands.fails(&["state", "import", "carol"], 2, &["SOURCE"]);
    commands.fails(&["state", "import", "carol", "nothing"], 1, &["open nothing"]);
    commands.fails(&["state", "import", "carol", "ftp://x/y"], 2, &["allowed", "s3://"]);
    commands.fails(&["state", "import", "carol", "--owner", "root", "tree"], 2, &["UID:GID"]);
    commands.fails(
        &["state", "import", "carol", "--workload", "other", "tree"],
        1,
        &["no workload other", "work"],
    );
    commands.fails(&["state", "import", "carol", "--mirror"], 1, &["layout \"mirror\""]);
    workload("two", "snapshot");
    commands.fails(&["state", "import", "carol", "tree"], 1, &["say --workload, one of two, work"]);

    let key_file = commands.dir.path().join("key");
    std::fs::write(&key_file, "07".repeat(32)).unwrap();
    std::fs::set_permissions(&key_file, PermissionsExt::from_mode(0o600)).unwrap();
    let output = commands
        .command(&["state", "import", "carol", "-w", "work", "tree"])
        .env("BOILERHOUSE_MASTER_KEY_FILE", &key_file)
        .env("BOILERHOUSE_STATE_ENCRYPTION", "on")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("work: persist.layout") && text.contains("STATE_ENCRYPTION"), "{text}");

    // A server holds the store.
    let store = LocalStore::open(commands.dir.path().join("store")).unwrap();
    let (own, mode) = ("test-transfer", boilerhouse::state::fence::Mode::Exclusive);
    boilerhouse::state::fence::owner::take(&store, own, mode, "served", 1).await.unwrap();
    commands.fails(
        &["state", "import", "carol", "-w", "work", "tree"],
        1,
        &["the store is held by \"test-transfer\""],
    );
    commands.ok(&["state", "export", "alice", "beside"], None);
    boilerhouse::state::fence::owner::release(&store, own, mode, "served", 2).await.unwrap();
    commands.ok(&["state", "import", "carol", "-w", "work", "tree"], None);
    assert_eq!(std::fs::read_dir(commands.dir.path().join("scratch")).unwrap().count(), 0);
    // What the commands wrote is what a server fills.
    let node = AnyNode::new(&FaultStore::new(Arc::new(store)));
    assert_eq!(node.restored(&slot("s"), &key("carol"), 9).await.unwrap()[&b"a.txt"[..]].content, b"alpha");
}
