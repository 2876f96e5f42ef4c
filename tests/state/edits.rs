//! Any sequence of edits and saves gives each snapshot back.

use std::{
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
};

use boilerhouse::{
    clock::SystemClock,
    model::Epoch,
    state::{
        FillFrom, SaveTree, SlotFiles,
        history::{History, Rollback},
    },
};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use rustix::fs::{CWD, RenameFlags, XattrFlags};

use crate::{
    places::Place,
    support::{MemoryStore, Node, Tree, key, save, slot, tree, without_set_id},
};

/// What a program does to its tree; an edit that cannot be done is left out.
#[derive(Debug, Clone)]
enum Edit {
    /// A new file of so many bytes, or an old one with other content.
    Create(Name, usize, u8),
    /// Bytes in the middle, in place.
    Write(Name, u64, Vec<u8>),
    Append(Name, usize),
    Truncate(Name, u64),
    /// Leaves out so much, then writes a little.
    Hole(Name, u64),
    Punch(Name, u64),
    Rename(Name, Name),
    Swap(Name, Name),
    Chmod(Name, u32),
    Xattr(Name, u8, Vec<u8>),
    RemoveXattr(Name, u8),
    HardLink(Name, Name),
    Symlink(Name, u8),
    Remove(Name),
    Mkdir(Name),
    Time(Name, i64),
}

/// One of few paths, so that edits meet.
type Name = (u8, u8);

/// How a tree gets into the store.
#[derive(Debug, Clone, Copy)]
enum Capture {
    /// The claim ends, and another begins from the cache.
    Release,
    /// As before, and the server starts anew.
    ReleaseAndRestart,
    /// The claim goes on.
    Checkpoint,
    /// The claim ends, and the next one begins on another node.
    Elsewhere,
}

fn name() -> impl Strategy<Value = Name> {
    (0..4_u8, 0..4_u8)
}

fn edit() -> impl Strategy<Value = Edit> {
    let sizes = prop_oneof![
        6 => 0..5_000_usize,
        2 => 30_000..200_000_usize,
        1 => 1_048_570..1_048_580_usize,
        1 => Just(2_500_000_usize),
    ];
    let bytes = prop::collection::vec(any::<u8>(), 1..50);
    prop_oneof![
        4 => (name(), sizes, any::<u8>()).prop_map(|(at, bytes, seed)| Edit::Create(at, bytes, seed)),
        4 => (name(), 0..2_000_000_u64, bytes.clone()).prop_map(|(at, to, bytes)| Edit::Write(at, to, bytes)),
        2 => (name(), 1..3_000_usize).prop_map(|(at, bytes)| Edit::Append(at, bytes)),
        2 => (name(), 0..1_200_000_u64).prop_map(|(at, bytes)| Edit::Truncate(at, bytes)),
        2 => (name(), 1..3_000_000_u64).prop_map(|(at, bytes)| Edit::Hole(at, bytes)),
        1 => (name(), 0..1_000_000_u64).prop_map(|(at, from)| Edit::Punch(at, from)),
        3 => (name(), name()).prop_map(|(from, to)| Edit::Rename(from, to)),
        1 => (name(), name()).prop_map(|(one, two)| Edit::Swap(one, two)),
        2 => (name(), 0..0o10000_u32).prop_map(|(at, mode)| Edit::Chmod(at, mode)),
        2 => (name(), 0..3_u8, bytes).prop_map(|(at, which, value)| Edit::Xattr(at, which, value)),
        1 => (name(), 0..3_u8).prop_map(|(at, which)| Edit::RemoveXattr(at, which)),
        3 => (name(), name()).prop_map(|(from, to)| Edit::HardLink(from, to)),
        2 => (name(), any::<u8>()).prop_map(|(at, to)| Edit::Symlink(at, to)),
        2 => name().prop_map(Edit::Remove),
        2 => name().prop_map(Edit::Mkdir),
        1 => (name(), -1_000_000..4_000_000_000_i64).prop_map(|(at, seconds)| Edit::Time(at, seconds)),
    ]
}

fn rounds() -> impl Strategy<Value = Vec<(Vec<Edit>, Capture)>> {
    let captures = prop::sample::select(vec![
        Capture::Release,
        Capture::Release,
        Capture::ReleaseAndRestart,
        Capture::Checkpoint,
        Capture::Checkpoint,
        Capture::Elsewhere,
    ]);
    prop::collection::vec((prop::collection::vec(edit(), 0..12), captures), 2..6)
}

/// A path: at the top, or in one of three directories.
fn path(root: &Path, (dir, name): Name) -> PathBuf {
    match dir {
        0 => root.join(format!("n{name}")),
        1 => root.join("n0").join(format!("m{name}")),
        2 => root.join("d/e").join(format!("n{name}")),
        _ => root.join("d").join(format!("n{name}")),
    }
}

fn content(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|n| (n / 1_000) as u8 ^ seed).collect()
}

/// Makes one edit, as far as it can be made; links are never followed.
fn make(root: &Path, edit: &Edit) -> std::io::Result<()> {
    let at = |name: &Name| {
        let path = path(root, *name);
        let parents = path.ancestors().skip(1).take_while(|parent| *parent != root);
        let is_led_away = parents.into_iter().any(Path::is_symlink);
        if is_led_away { Err(std::io::Error::other("through a link")) } else { Ok(path) }
    };
    let file = |name: &Name| {
        let path = at(name)?;
        if !path.symlink_metadata()?.is_file() {
            return Err(std::io::Error::other("no file"));
        }
        std::fs::OpenOptions::new().read(true).write(true).open(path)
    };
    let no_link = |name: &Name| {
        let path = at(name)?;
        if path.is_symlink() { Err(std::io::Error::other("a link")) } else { Ok(path) }
    };
    match edit {
        Edit::Create(name, bytes, seed) => std::fs::write(no_link(name)?, content(*bytes, *seed)),
        Edit::Write(name, to, bytes) => {
            let file = file(name)?;
            let to = to % file.metadata()?.len().max(1);
            file.write_all_at(bytes, to)
        }
        Edit::Append(name, bytes) => {
            let file = file(name)?;
            file.write_all_at(&content(*bytes, 7), file.metadata()?.len())
        }
        Edit::Truncate(name, bytes) => file(name)?.set_len(*bytes),
        Edit::Hole(name, bytes) => {
            let file = file(name)?;
            file.write_all_at(b"behind a hole", file.metadata()?.len() + bytes)
        }
        Edit::Punch(name, from) => {
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(file(name)?, flags, *from, 300_000)?)
        }
        Edit::Rename(from, to) => std::fs::rename(at(from)?, at(to)?),
        Edit::Swap(one, two) => {
            Ok(rustix::fs::renameat_with(CWD, at(one)?, CWD, at(two)?, RenameFlags::EXCHANGE)?)
        }
        Edit::Chmod(name, mode) => std::fs::set_permissions(no_link(name)?, PermissionsExt::from_mode(*mode)),
        Edit::Xattr(name, which, value) => {
            let attribute = format!("user.{which}");
            Ok(rustix::fs::setxattr(no_link(name)?, attribute.as_str(), value, XattrFlags::empty())?)
        }
        Edit::RemoveXattr(name, which) => {
            Ok(rustix::fs::removexattr(no_link(name)?, format!("user.{which}").as_str())?)
        }
        Edit::HardLink(from, to) => std::fs::hard_link(at(from)?, at(to)?),
        Edit::Symlink(name, to) => symlink(format!("../somewhere/{to}"), at(name)?),
        Edit::Remove(name) => {
            let path = at(name)?;
            if path.symlink_metadata()?.is_dir() {
                std::fs::remove_dir_all(path)
            } else {
                std::fs::remove_file(path)
            }
        }
        Edit::Mkdir(name) => std::fs::create_dir(at(name)?),
        Edit::Time(name, seconds) => {
            let time = rustix::fs::Timespec { tv_sec: *seconds, tv_nsec: 77 };
            let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
            Ok(rustix::fs::utimensat(CWD, at(name)?, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?)
        }
    }
}

async fn check(store: &Arc<MemoryStore>, rounds: &[(Vec<Edit>, Capture)]) {
    let key = key("t");
    let mut node = Node::new(store);
    let mut at = slot("slot-1");
    let mut epoch = 1;
    let mut kept: Vec<(u64, Tree)> = Vec::new();
    node.claim(&at, &key, epoch, FillFrom::Empty).await.unwrap();
    std::fs::create_dir_all(node.state_path(&at).join("d/e")).unwrap();
    for (number, (edits, capture)) in rounds.iter().enumerate() {
        let root = node.state_path(&at);
        for edit in edits {
            // What cannot be done, no program does.
            drop(make(&root, edit));
        }
        let mut saving = save(&key, epoch, &format!("round {number}"));
        saving.persist.keep_last = 100;
        let expected = tree(&root);
        let saved = if let Capture::Checkpoint = capture {
            let id = node.files.copy_live(&at, &key).await.unwrap();
            node.files.copy_paused(&id).await.unwrap();
            saving.tree = SaveTree::Checkpoint(id.clone());
            let saved = node.files.save(&saving).await.unwrap();
            node.files.drop_checkpoint(&id).await.unwrap();
            saved
        } else {
            node.files.capture(&at, &key).await.unwrap();
            let saved = node.files.save(&saving).await.unwrap();
            node.files.wipe(&at).await.unwrap();
            epoch += 1;
            at = slot(&format!("slot-{epoch}"));
            let from = match capture {
                Capture::Release | Capture::Checkpoint => FillFrom::Cache,
                Capture::ReleaseAndRestart => {
                    node = node.restart();
                    FillFrom::Cache
                }
                Capture::Elsewhere => {
                    node = Node::new(store);
                    FillFrom::Snapshot(saved.snapshot.clone())
                }
            };
            node.claim(&at, &key, epoch, from).await.unwrap();
            let now = tree(&node.state_path(&at));
            match capture {
                // What the store gives back has no set-id bits, from here on.
                Capture::Elsewhere => assert_eq!(now, without_set_id(expected.clone()), "round {number}"),
                _ => assert_eq!(now, expected, "round {number}"),
            }
            saved
        };
        kept.push((saved.snapshot.number, without_set_id(expected)));
    }
    // Every snapshot, by way of a rollback: the newest first, for that is no change.
    let history = History::new(Arc::<MemoryStore>::clone(store), Arc::new(SystemClock), "node".to_owned());
    for (number, (snapshot, expected)) in kept.iter().rev().enumerate() {
        let nonce = format!("back to {snapshot}");
        let rollback = Rollback { key: key.clone(), snapshot: *snapshot, epoch: Epoch(epoch + 1), nonce };
        history.restore(&rollback).await.unwrap();
        let found = Node::new(store).restored(&at, &key, epoch + 10 + number as u64).await;
        assert_eq!(found, *expected, "snapshot {snapshot}");
    }
    let report = history.verify_all(&mut |_| {}).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_sequence_of_edits_and_saves_gives_each_snapshot_back(rounds in rounds()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(check(&Arc::default(), &rounds));
    }
}

/// Some histories, the same at each run.
pub(crate) async fn some_histories_come_back(place: &Place) {
    let mut runner = TestRunner::deterministic();
    for _ in 0..4 {
        let rounds = rounds().new_tree(&mut runner).unwrap().current();
        check(&place.store(), &rounds).await;
    }
}
