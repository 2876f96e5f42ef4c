//! Large, sparse and too much: what is allowed comes back, and what is not is named and kept.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::Arc,
};

use boilerhouse::state::{Error, FillFrom, SaveTree, SlotFiles};
use rustix::fs::XattrFlags;

use crate::{
    format::Written,
    hostile::make_deep,
    support::{MemoryStore, Node, key, newest, save, slot, tree, write},
};

#[tokio::test]
async fn a_hundred_thousand_files_come_back() {
    let store = Arc::new(MemoryStore::default());
    // In memory: making and removing so many on a disk that others use takes minutes.
    let (node, other) = (Node::in_memory(&store), Node::in_memory(&store));
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    let has_content = |n: u32| n.is_multiple_of(20);
    for dir in 0..100_u32 {
        fs::create_dir(root.join(dir.to_string())).unwrap();
        for n in 0..1_000_u32 {
            let path = format!("{dir}/{n}");
            let content = if has_content(n) { path.as_bytes() } else { b"" };
            fs::write(root.join(&path), content).unwrap();
        }
    }
    let saved = node.release(&one, &key, 1, "n1").await;
    assert_eq!(saved.snapshot.files, 100_000);
    other.claim(&two, &key, 2, FillFrom::Snapshot(saved.snapshot.clone())).await.unwrap();
    let found = tree(&other.state_path(&two));
    assert_eq!(found.len(), 1 + 100 + 100_000);
    for (path, entry) in found.iter().filter(|(path, _)| path.contains(&b'/')) {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap();
        let n: u32 = str::from_utf8(name).unwrap().parse().unwrap();
        assert_eq!(entry.content, if has_content(n) { path.clone() } else { Vec::new() });
    }
    // One change costs one change.
    write(&other.state_path(&two), "50/500", b"another");
    let sent = other.release(&two, &key, 2, "n2").await.sent_bytes;
    assert!(sent < saved.sent_bytes, "{sent} bytes after {}", saved.sent_bytes);
    let packs = store.names("/p/0000000000000002-");
    let bytes: usize = packs.iter().map(|name| store.objects.lock().unwrap()[name].len()).sum();
    assert!(bytes < 1_000, "{bytes} bytes of packs for one small file");
}

/// Reading or writing four tebibytes would take hours.
#[tokio::test]
async fn a_sparse_file_of_four_tebibytes_costs_its_data() {
    const TEBI: u64 = 1 << 40;
    let places = [(0, b"first"), (TEBI + 4_321, b"later"), (4 * TEBI - 5, b"final")];
    let check = |path: &Path| {
        let file = fs::File::open(path).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), 4 * TEBI);
        assert!(meta.blocks() * 512 <= 64 * 1024, "{} blocks", meta.blocks());
        for (at, content) in places {
            let mut found = [0; 5];
            file.read_exact_at(&mut found, at).unwrap();
            assert_eq!(found, *content, "at {at}");
        }
    };
    let store = Arc::new(MemoryStore::default());
    let node = Node::new(&store);
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let path = node.state_path(&one).join("sparse");
    let file = fs::File::create(&path).unwrap();
    file.set_len(4 * TEBI).unwrap();
    for (at, content) in places {
        file.write_all_at(content, at).unwrap();
    }
    drop(file);
    check(&path);
    // A limit counts data.
    let mut saving = save(&key, 1, "n1");
    saving.max_bytes = Some(1024 * 1024);
    let id = node.files.copy_live(&one, &key).await.unwrap();
    node.files.copy_paused(&id).await.unwrap();
    saving.tree = SaveTree::Checkpoint(id.clone());
    let saved = node.files.save(&saving).await.unwrap();
    assert_eq!((saved.snapshot.files, saved.snapshot.bytes), (1, 4 * TEBI));
    assert!(saved.sent_bytes < 10_000, "{} bytes were sent", saved.sent_bytes);
    node.files.drop_checkpoint(&id).await.unwrap();
    let other = Node::new(&store);
    other.claim(&one, &key, 2, FillFrom::Snapshot(saved.snapshot)).await.unwrap();
    check(&other.state_path(&one).join("sparse"));
    let sent = other.release(&one, &key, 2, "n2").await.sent_bytes;
    assert!(sent < 10_000, "{sent} bytes were sent");
}

/// A tree over a limit is kept as it is, nothing of it is published, and once it is
/// within the limit it is saved.
#[tokio::test]
async fn what_breaks_a_limit_is_named_and_kept() {
    type Step = fn(&Path);
    let rows: [(&str, Step, &str, Step); 2] = [
        (
            "a long path",
            |root| make_deep(&root.join("over"), &"d".repeat(255), 130),
            "32768 bytes in one path",
            |root| drop(fs::remove_dir_all(root.join("over"))),
        ),
        (
            "many attributes",
            |root| {
                for n in 0..17_500 {
                    let path = root.join("over").join(n.to_string());
                    fs::write(&path, b"").unwrap();
                    rustix::fs::setxattr(&path, "user.x", &[b'x'; 3_900], XattrFlags::empty()).unwrap();
                }
            },
            "67108864 bytes of extended attributes",
            |root| fs::remove_dir_all(root.join("over")).unwrap(),
        ),
    ];
    for (what, grow, words, shrink) in rows {
        let node = Node::new(&Arc::new(MemoryStore::default()));
        let (key, one) = (key("t"), slot("one"));
        node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
        write(&node.state_path(&one), "kept", b"kept");
        node.release(&one, &key, 1, "n1").await;
        node.claim(&one, &key, 2, FillFrom::Cache).await.unwrap();
        write(&node.state_path(&one), "new", b"new");
        fs::create_dir(node.state_path(&one).join("over")).unwrap();
        grow(&node.state_path(&one));
        node.files.capture(&one, &key).await.unwrap();
        for _ in 0..2 {
            let error = node.files.save(&save(&key, 2, "n2")).await.unwrap_err();
            assert!(
                matches!(&error, Error::Limit { reason, .. } if reason.contains(words)),
                "{what}: {error:?}"
            );
            assert_eq!(newest(&node, &key).await.number, 1, "{what}");
        }
        let cached = node.cache_path(&key).join("tree");
        assert!(cached.join("over").exists() && cached.join("new").exists(), "{what}");
        shrink(&cached);
        // Paths may be too long for the way that others remove them.
        if cached.join("over").exists() {
            node.claim(&one, &key, 3, FillFrom::Cache).await.unwrap();
            let remove = boilerhouse::state::FileAction::Remove("over".into());
            node.files.state_file(&one, crate::support::RUN_AS, remove).await.unwrap();
            node.files.capture(&one, &key).await.unwrap();
        }
        node.files.save(&save(&key, 2, "n2")).await.unwrap();
        let found = Node::new(&node.store).restored(&one, &key, 4).await;
        assert_eq!(
            (&found[&b"new"[..]].content[..], &found[&b"kept"[..]].content[..]),
            (&b"new"[..], &b"kept"[..])
        );
        node.files.discard(&key).await.unwrap();
    }
}

const META: &str = r#"{"mode":420,"uid":1,"gid":2,"modified":[5,0]}"#;

/// Writes a store whose newest manifest has these objects and items.
fn store_of(written: Written, objects: &str, items: &str) -> Written {
    let mut written = written;
    let manifest = written.manifest(&format!(
        r#"{{"version":1,"tenant":"t","workload":"work","epoch":3,"run_as":{{"uid":1,"gid":2}},
        "objects":[{objects}],"root":{META},"items":[{items}]}}"#
    ));
    with_record(written, &manifest)
}

fn with_record(mut written: Written, manifest: &str) -> Written {
    written.record(format!(
        r#"{{"version":1,"number":1,"tenant":"t","workload":"work","epoch":3,"nonce":"n","created_ms":1,
        "kind":"snapshot","tree":{{"snapshot":1,"epoch":3,"nonce":"n","manifest":"{manifest}","created_ms":1,
        "files":1,"bytes":9,"skipped":0}}}}"#
    ));
    written
}

/// One file of nine bytes in a pack; `name` is the pack's.
fn one_file(written: Written, name: &str) -> Written {
    let digest = blake3::hash(b"alphadata");
    let item = format!(
        r#"{{"path":"a","meta":{META},"node":{{"file":{{"bytes":9,"digest":"{digest}","pieces":[[0,0,9]]}}}}}}"#
    );
    store_of(written, &format!(r#"{{"name":"{name}","bytes":9}}"#), &item)
}

/// What others wrote into the store is looked at before it takes room here.
#[tokio::test]
async fn no_object_makes_a_fill_take_more_than_it_may() {
    let bomb = |bytes: usize| zstd::encode_all(&vec![0; bytes][..], 3).unwrap();
    let sparse = |holes: &str, bytes: u64| {
        let digest = blake3::hash(b"");
        let node =
            format!(r#"{{"file":{{"bytes":{bytes},"digest":"{digest}","pieces":[],"holes":[{holes}]}}}}"#);
        store_of(Written::new(false), "", &format!(r#"{{"path":"a","meta":{META},"node":{node}}}"#))
    };
    let item =
        |path: &str, more: &str| format!(r#"{{"path":"{path}","meta":{META}{more},"node":"directory"}}"#);
    let mut rows: Vec<(&str, Written, &str)> = Vec::new();

    let mut written = Written::new(false);
    let pack = written.object("p", &bomb(16 * 1024 * 1024));
    rows.push(("a pack that grows when it is decoded", one_file(written, &pack), "more than 9 bytes"));
    let mut written = Written::new(false);
    let pack = written.object("p", &vec![7; 40 * 1024 * 1024]);
    rows.push(("a pack that is large as stored", one_file(written, &pack), "it may have"));
    let mut written = Written::new(false);
    let manifest = written.object("m", &bomb(513 * 1024 * 1024));
    rows.push(("a manifest that grows", with_record(written, &manifest), "more than 536870912 bytes"));
    let mut written = Written::new(false);
    let pack = written.object("p", b"x");
    let pack = format!(r#"{{"name":"{pack}","bytes":10000000}}"#);
    rows.push(("a large pack", store_of(written, &pack, ""), "at most 9437184 are allowed"));
    let mut written = Written::new(false);
    let chunk = written.object("c", b"x");
    let chunk = format!(r#"{{"name":"{chunk}","bytes":16777217}}"#);
    rows.push(("a large chunk", store_of(written, &chunk, ""), "at most 16777216 are allowed"));
    let most = 16_u64 << 40;
    rows.push((
        "a large file",
        sparse(&format!("[0,{}]", most + 1), most + 1),
        "more than 17592186044416 bytes",
    ));
    let holes: Vec<String> = (0..1_000_001_u64).map(|n| format!("[{},1]", n * 2)).collect();
    rows.push(("many holes", sparse(&holes.join(","), 3_000_000), "more than 1000000 holes"));
    let long = item(&vec!["d".repeat(255); 129].join("/"), "");
    rows.push(("a long path", store_of(Written::new(false), "", &long), "32768 bytes in one path"));
    let deep: Vec<String> = (1..=2_001).map(|depth| item(&vec!["d"; depth].join("/"), "")).collect();
    rows.push(("a deep path", store_of(Written::new(false), "", &deep.join(",")), "2000 names in one path"));
    let value = format!(r#","xattrs":[["user.x","{}"]]"#, "x".repeat(64 * 1024 + 1));
    let value = item("a", &value);
    rows.push(("a long attribute", store_of(Written::new(false), "", &value), "more than 65536 bytes"));
    let many: Vec<String> = (0..1_000_001).map(|n| item(&format!("{n:07}"), "")).collect();
    rows.push((
        "many entries",
        store_of(Written::new(false), "", &many.join(",")),
        "more than 1000000 entries",
    ));

    for (what, written, words) in rows {
        let node = Node::new(&written.store());
        let newest = newest(&node, &key("t")).await;
        *node.store.largest.lock().unwrap() = 0;
        let error = node.claim(&slot("one"), &key("t"), 4, FillFrom::Snapshot(newest)).await.unwrap_err();
        assert!(
            matches!(&error, Error::Damaged { reason, .. } if reason.contains(words)),
            "{what}: {error:?}"
        );
        let largest = *node.store.largest.lock().unwrap();
        assert!(largest < 32 * 1024 * 1024, "{what}: {largest} bytes were read");
        assert_eq!(tree(&node.state_path(&slot("one"))).len(), 1, "{what}: something is in the slot");
        assert!(!node.cache_path(&key("t")).exists(), "{what}: something is in the cache");
    }

    // A record, and the same at every way to it.
    let mut written = Written::new(false);
    written.record(format!("{}{{}}", " ".repeat(100 * 1024 * 1024)));
    let node = Node::new(&written.store());
    let error = node.files.newest(&key("t")).await.unwrap_err();
    assert!(
        matches!(&error, Error::Damaged { reason, .. } if reason.contains("more than 65536")),
        "{error:?}"
    );
    assert!(*node.store.largest.lock().unwrap() < 100_000);
}

/// As large as zstd may make what it cannot compress is still an object.
#[tokio::test]
async fn content_that_grew_when_it_was_stored_is_read() {
    for is_sealed in [false, true] {
        let random: Vec<u8> = (0..30_u32).flat_map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes()).collect();
        let mut written = Written::new(is_sealed);
        let stored = zstd::encode_all(&random[..], 1).unwrap();
        assert!(stored.len() > random.len());
        let pack = written.object("p", &stored);
        let digest = blake3::hash(&random);
        let item = format!(
            r#"{{"path":"a","meta":{META},"node":{{"file":{{"bytes":960,"digest":"{digest}","pieces":[[0,0,960]]}}}}}}"#
        );
        let object = format!(r#"{{"name":"{pack}","bytes":960,"sealed":{is_sealed}}}"#);
        let store = store_of(written, &object, &item).store();
        let node =
            Node::with_encryption(&store, crate::format::encryption(Some(crate::format::MASTER), false));
        assert_eq!(node.restored(&slot("one"), &key("t"), 4).await[&b"a"[..]].content, random);
    }
}

/// Excludes hold for a checkpoint as for a release, and what was excluded is there when
/// it is not any more.
#[tokio::test]
async fn what_is_excluded_may_change_from_save_to_save() {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    for path in ["cache/a", "cache/b/c", "x.tmp", "dir/y.tmp", "dir/kept", "kept"] {
        write(&root, path, path.as_bytes());
    }
    fs::hard_link(root.join("cache/a"), root.join("also-a")).unwrap();
    let all = [
        "also-a",
        "cache",
        "cache/a",
        "cache/b",
        "cache/b/c",
        "dir",
        "dir/kept",
        "dir/y.tmp",
        "kept",
        "x.tmp",
    ];
    let rows: [(&[&str], &[&str]); 5] = [
        (&["cache/**", "**/*.tmp"], &["also-a", "cache", "dir", "dir/kept", "kept"]),
        (&[], &all),
        (&["cache", "*.tmp"], &["also-a", "dir", "dir/kept", "dir/y.tmp", "kept"]),
        (
            &["also-*", "dir/?ept"],
            &["cache", "cache/a", "cache/b", "cache/b/c", "dir", "dir/y.tmp", "kept", "x.tmp"],
        ),
        (&[], &all),
    ];
    for (round, (exclude, expected)) in rows.into_iter().enumerate() {
        let mut saving = save(&key, 1, &format!("n{round}"));
        saving.persist.exclude = exclude.iter().map(|glob| (*glob).to_owned()).collect();
        let is_last = round == rows.len() - 1;
        if is_last {
            node.files.capture(&one, &key).await.unwrap();
        } else {
            let id = node.files.copy_live(&one, &key).await.unwrap();
            node.files.copy_paused(&id).await.unwrap();
            saving.tree = SaveTree::Checkpoint(id);
        }
        node.files.save(&saving).await.unwrap();
        if let SaveTree::Checkpoint(id) = &saving.tree {
            node.files.drop_checkpoint(id).await.unwrap();
        }
        let found = Node::new(&node.store).restored(&slot("x"), &key, 2).await;
        let paths: Vec<_> =
            found.keys().skip(1).map(|path| String::from_utf8(path.clone()).unwrap()).collect();
        assert_eq!(paths, expected, "round {round}");
        for path in expected.iter().filter(|path| found[path.as_bytes()].mode & 0o170_000 == 0o100_000) {
            let content = if *path == "also-a" { "cache/a" } else { path };
            assert_eq!(found[path.as_bytes()].content, content.as_bytes(), "round {round}");
        }
        // Nothing of the program's own goes.
        let live = if is_last { node.cache_path(&key).join("tree") } else { root.clone() };
        assert_eq!(tree(&live).len(), 1 + all.len(), "round {round}");
    }
    let mut saving = save(&key, 1, "bad");
    saving.persist.exclude = vec!["[".into()];
    let error = node.files.save(&saving).await.unwrap_err();
    assert!(matches!(&error, Error::File { path, .. } if path == "["), "{error:?}");
}
