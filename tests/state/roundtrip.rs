//! Whatever a tenant leaves comes back byte for byte, mode for mode.

use std::{
    collections::HashSet,
    ffi::OsStr,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use boilerhouse::state::{FillFrom, SlotFiles};
use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use crate::support::{MemoryStore, Node, RUN_AS, key, slot, tree};

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    File(usize, u8),
    Symlink(Vec<u8>),
}

#[derive(Debug, Clone)]
struct Made {
    path: Vec<Vec<u8>>,
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    modified: (i64, u32),
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
        2 => targets.prop_map(Kind::Symlink),
    ];
    let owner = prop::sample::select(vec![(RUN_AS.uid, RUN_AS.gid), (0, 0), (77, 88)]);
    let modified = (-2_000_000_000..4_000_000_000_i64, 0..1_000_000_000_u32);
    (prop::collection::vec(name(), 1..4), kind, 0..0o10000_u32, owner, modified)
        .prop_map(|(path, kind, mode, owner, modified)| Made { path, kind, mode, owner, modified })
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
            Kind::Symlink(target) => symlink(OsStr::from_bytes(target), &full).unwrap(),
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
        }
        set_time(&full, made.modified);
    }
}

async fn check(all: &[Made], root_mode: u32, root_time: (i64, u32)) {
    let store = Arc::new(MemoryStore::default());
    let (first, second) = (Node::new(&store), Node::new(&store));
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
        runtime.block_on(check(&all, root_mode, root_time));
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
