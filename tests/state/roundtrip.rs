//! Whatever a tenant leaves comes back byte for byte, mode for mode.

use std::{
    collections::HashSet,
    ffi::OsStr,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use boilerhouse::{
    model::Owner,
    state::{FillFrom, SlotFiles},
};
use proptest::{
    prelude::*,
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};

use crate::{
    places::Place,
    support::{MemoryStore, Node, RUN_AS, fill, key, slot, tree, without_set_id},
};

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    File(usize, u8),
    /// Runs of data, as how much is left out before each and how long it is.
    Sparse(Vec<(u64, usize)>, u64),
    Symlink(Vec<u8>),
    /// Of one of the files before it.
    HardLink(prop::sample::Index),
}

#[derive(Debug, Clone)]
struct Made {
    path: Vec<Vec<u8>>,
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    modified: (i64, u32),
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An access list that gives user 4711 the right to read (version 2; tag, permissions, id).
const ACCESS_LIST: &[u8] = &[
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0x67, 0x12, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255,
    16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
];

fn attribute() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let user = prop::collection::vec(1..=255_u8, 1..20).prop_map(|name| [b"user.".to_vec(), name].concat());
    let value = prop::collection::vec(any::<u8>(), 0..60);
    prop_oneof![
        4 => (user, value),
        1 => Just((b"system.posix_acl_access".to_vec(), ACCESS_LIST.to_vec())),
    ]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let special = prop::sample::select(vec![
        b"..evil".to_vec(),
        b"-rf".to_vec(),
        b"new\nline".to_vec(),
        b"back\\slash".to_vec(),
        b"\xff\xfe".to_vec(),
        b"\x1b[31m".to_vec(),
        b"%00".to_vec(),
        vec![b'n'; 255],
        "ünï".as_bytes().to_vec(),
    ]);
    let any = prop::collection::vec(any::<u8>(), 1..12)
        .prop_filter("names have no slash and no zero", |name| {
            !name.contains(&b'/') && !name.contains(&0) && name != b"." && name != b".."
        });
    prop_oneof![2 => "[a-c]{1,2}".prop_map(String::into_bytes), 1 => special, 1 => any]
}

fn made() -> impl Strategy<Value = Made> {
    let sizes = prop_oneof![
        4 => 0..3_usize,
        8 => 1..20_000_usize,
        1 => Just(1024 * 1024 - 1),
        1 => Just(1024 * 1024),
        1 => Just(3 * 1024 * 1024 + 17),
        1 => Just(17 * 1024 * 1024),
    ];
    let targets = prop::sample::select(vec![
        b"/etc/shadow".to_vec(),
        b"nowhere".to_vec(),
        b"../../..".to_vec(),
        b"a".to_vec(),
        b"\xff".to_vec(),
    ]);
    let kind = prop_oneof![
        3 => Just(Kind::Directory),
        6 => (sizes, any::<u8>()).prop_map(|(bytes, seed)| Kind::File(bytes, seed)),
        2 => (prop::collection::vec((0..300_000_u64, 1..200_000_usize), 0..4), 0..1_u64 << 42)
            .prop_map(|(runs, behind)| Kind::Sparse(runs, behind)),
        2 => targets.prop_map(Kind::Symlink),
        2 => any::<prop::sample::Index>().prop_map(Kind::HardLink),
    ];
    let owner = prop::sample::select(vec![(RUN_AS.uid, RUN_AS.gid), (0, 0), (77, 88)]);
    let modified = (-2_000_000_000..4_000_000_000_i64, 0..1_000_000_000_u32);
    let attributes = prop::collection::vec(attribute(), 0..3);
    (prop::collection::vec(name(), 1..4), kind, 0..0o10000_u32, owner, modified, attributes).prop_map(
        |(path, kind, mode, owner, modified, attributes)| Made {
            path,
            kind,
            mode,
            owner,
            modified,
            attributes,
        },
    )
}

fn full_path(root: &Path, path: &[Vec<u8>]) -> PathBuf {
    path.iter().fold(root.to_owned(), |at, name| at.join(OsStr::from_bytes(name)))
}

fn set_time(path: &Path, (seconds, nanoseconds): (i64, u32)) {
    let time = Timespec { tv_sec: seconds, tv_nsec: i64::from(nanoseconds) };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Makes what can be made; later entries that would need a file to be a directory are left out.
fn build(root: &Path, all: &[Made]) {
    let mut done: Vec<&Made> = Vec::new();
    let mut paths = HashSet::new();
    for made in all {
        let full = full_path(root, &made.path);
        if std::fs::create_dir_all(full.parent().unwrap()).is_err() || full.symlink_metadata().is_ok() {
            continue;
        }
        // `create_dir_all` follows links; what lies behind one is not ours.
        let parents = (1..made.path.len()).map(|depth| full_path(root, &made.path[..depth]));
        if parents.into_iter().any(|parent| parent.is_symlink()) {
            continue;
        }
        match &made.kind {
            Kind::Directory => std::fs::create_dir(&full).unwrap(),
            Kind::File(bytes, seed) => {
                let content: Vec<u8> = (0..*bytes).map(|n| (n / 4_096) as u8 ^ seed).collect();
                std::fs::write(&full, content).unwrap();
            }
            Kind::Sparse(runs, behind) => {
                let file = std::fs::File::create(&full).unwrap();
                let mut at = 0;
                for (before, bytes) in runs {
                    at += before;
                    file.write_all_at(&vec![at as u8 | 1; *bytes], at).unwrap();
                    at += *bytes as u64;
                }
                // The test reads what it compares, so not every file is as large as it may be.
                file.set_len(at + (behind & 0xf_ffff)).unwrap();
            }
            Kind::Symlink(target) => symlink(OsStr::from_bytes(target), &full).unwrap(),
            Kind::HardLink(of) => {
                let others: Vec<&&Made> =
                    done.iter().filter(|made| !matches!(made.kind, Kind::Directory)).collect();
                if others.is_empty() {
                    continue;
                }
                let other = full_path(root, &of.get(&others).path);
                std::fs::hard_link(other, &full).unwrap();
            }
        }
        paths.insert(full);
        done.push(made);
    }
    // Children first: making them changes their parents' times.
    done.sort_by_key(|made| std::cmp::Reverse(made.path.len()));
    for made in done {
        let full = full_path(root, &made.path);
        std::os::unix::fs::lchown(&full, Some(made.owner.0), Some(made.owner.1)).unwrap();
        if !full.is_symlink() {
            std::fs::set_permissions(&full, PermissionsExt::from_mode(made.mode)).unwrap();
            for (name, value) in &made.attributes {
                rustix::fs::setxattr(&full, name.as_slice(), value, XattrFlags::empty()).unwrap();
            }
        }
        set_time(&full, made.modified);
    }
}

/// Some trees, the same at each run.
pub(crate) async fn some_trees_come_back(place: &Place) {
    let mut runner = TestRunner::deterministic();
    let trees = prop::collection::vec(made(), 10..25);
    for _ in 0..4 {
        let all = trees.new_tree(&mut runner).unwrap().current();
        check(&place.store(), &all, 0o751, (1_000_000_000, 5)).await;
    }
}

async fn check(store: &Arc<MemoryStore>, all: &[Made], root_mode: u32, root_time: (i64, u32)) {
    let (first, second) = (Node::new(store), Node::new(store));
    let (key, one, two, three) = (key("t"), slot("one"), slot("two"), slot("three"));
    first.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = first.state_path(&one);
    build(&root, all);
    std::fs::set_permissions(&root, PermissionsExt::from_mode(root_mode)).unwrap();
    set_time(&root, root_time);
    let expected = tree(&root);
    first.release(&one, &key, 1, "nonce-1").await;

    first.claim(&two, &key, 2, FillFrom::Cache).await.unwrap();
    assert_eq!(tree(&first.state_path(&two)), expected, "through the cache");
    first.release(&two, &key, 2, "nonce-2").await;
    first.files.discard(&key).await.unwrap();
    let expected = without_set_id(expected);

    assert_eq!(second.restored(&three, &key, 3).await, expected, "through the store");
    // What was restored is saved again as the same.
    second.release(&three, &key, 3, "nonce-3").await;
    assert_eq!(first.restored(&slot("four"), &key, 4).await, expected, "through the store, twice");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_tree_comes_back_equal(
        all in prop::collection::vec(made(), 0..25),
        root_mode in 0..0o10000_u32,
        root_time in (0..4_000_000_000_i64, 0..1_000_000_000_u32),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(check(&Arc::default(), &all, root_mode, root_time));
    }
}

#[tokio::test]
async fn many_entries_and_many_packs_come_back() {
    let store = Arc::new(MemoryStore::default());
    let (first, second) = (Node::new(&store), Node::new(&store));
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    first.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = first.state_path(&one);
    for n in 0..3_000_u32 {
        // Incompressible enough, and more than one pack.
        let content: Vec<u8> =
            (0..200_u32).flat_map(|_| *blake3::hash(&n.to_le_bytes()).as_bytes()).collect();
        std::fs::write(root.join(format!("f{n}")), content).unwrap();
    }
    let expected = tree(&root);
    let saved = first.release(&one, &key, 1, "n").await;
    assert_eq!((saved.snapshot.files, saved.snapshot.bytes), (3_000, 3_000 * 200 * 32));
    assert!(store.names("/p/").len() > 1, "{:?}", store.names("/p/"));
    assert_eq!(second.restored(&two, &key, 2).await, expected);
}

/// Who is named in an access list changes when the program's user does, as owners do.
#[tokio::test]
async fn access_lists_name_the_new_user() {
    const OTHER: Owner = Owner { uid: 20_001, gid: 20_002 };
    const NAMES: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];
    // Owner, the program's user, group, the program's group, mask, others.
    let list = |of: Owner| {
        let entry = |tag: u8, permissions: u8, id: u32| {
            [vec![tag, 0, permissions, 0], id.to_le_bytes().to_vec()].concat()
        };
        let none = u32::MAX;
        let named = [entry(2, 4, 4_711), entry(2, 6, of.uid)].concat();
        let groups = [entry(4, 0, none), entry(8, 4, of.gid)].concat();
        let rest = [entry(16, 7, none), entry(32, 0, none)].concat();
        [vec![2, 0, 0, 0], entry(1, 6, none), named, groups, rest].concat()
    };
    let store = Arc::new(MemoryStore::default());
    let (node, other) = (Node::new(&store), Node::new(&store));
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let root = node.state_path(&one);
    std::fs::create_dir(root.join("dir")).unwrap();
    for (file, owner) in [("own", (RUN_AS.uid, RUN_AS.gid)), ("dir/root's", (0, 0)), ("dir", (0, 0))] {
        if file != "dir" {
            std::fs::write(root.join(file), b"x").unwrap();
        }
        std::os::unix::fs::chown(root.join(file), Some(owner.0), Some(owner.1)).unwrap();
    }
    let of_dir = |path: &Path| path.is_dir();
    for path in ["", "own", "dir", "dir/root's"].map(|path| root.join(path)) {
        for name in &NAMES[..1 + usize::from(of_dir(&path))] {
            rustix::fs::setxattr(&path, *name, &list(RUN_AS), XattrFlags::empty()).unwrap();
        }
    }
    let before = tree(&root);
    node.release(&one, &key, 1, "n1").await;
    let newest = node.files.newest(&key).await.unwrap().unwrap();
    for (node, from) in [(&node, FillFrom::Cache), (&other, FillFrom::Snapshot(newest))] {
        node.prepare(&two).await;
        let mut filling = fill(&two, &key, 2, from.clone());
        (filling.run_as, filling.previous_owner) = (OTHER, Some(RUN_AS));
        node.files.fill(&filling).await.unwrap();
        let found = tree(&node.state_path(&two));
        assert_eq!(found.len(), before.len());
        for (path, entry) in &found {
            let named = path.escape_ascii();
            let lists: Vec<_> = entry.attributes.values().collect();
            assert_eq!(lists.len(), before[path].attributes.len(), "{named}, {from:?}");
            assert!(lists.iter().all(|found| **found == list(OTHER)), "{named}, {from:?}: {lists:?}");
            assert_eq!(entry.mode, before[path].mode, "{named}, {from:?}");
        }
        assert_eq!(found[&b"own"[..]].owner, (OTHER.uid, OTHER.gid));
        assert_eq!(found[&b"dir/root's"[..]].owner, (0, 0));
    }
}
