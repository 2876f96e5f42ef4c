//! What the journal promises, tried on real files.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use futures_util::future::join_all;
use serde_json::json;
use tempfile::TempDir;

use super::*;

const MODES: [Mode; 2] = [Mode::Threaded, Mode::Inline];

fn directory() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.db");
    (directory, path)
}

fn open(path: &Path) -> (Journal, Loaded) {
    Journal::open(path, Mode::Threaded).unwrap()
}

fn key(tenant: &str) -> Key {
    Key::new(TenantId::new(tenant).unwrap(), WorkloadId::new("w").unwrap())
}

fn claim(tenant: &str, epoch: u64, state: ClaimState) -> ClaimRow {
    ClaimRow {
        key: key(tenant),
        epoch: Epoch(epoch),
        state,
        slot: None,
        revision: Revision("r".into()),
        run_as: Owner { uid: 1000, gid: 1000 },
        source: ClaimSource::Warm,
        state_source: StateSource::Cache,
        snapshot: None,
        nonce: None,
        failed: false,
        superseded_by: None,
        term: Some(3),
        opened: true,
        close: false,
        decided_on: None,
        detail: json!({ "n": epoch }),
        created_ms: 1,
        active_ms: 2,
    }
}

fn put(row: ClaimRow) -> Op {
    Op::PutClaim(Box::new(row))
}

fn slot(name: &str) -> SlotRow {
    SlotRow {
        slot: SlotId::new(name).unwrap(),
        workload: WorkloadId::new("w").unwrap(),
        spec_hash: SpecHash("h".into()),
        revision: Revision("r".into()),
        phase: SlotPhase::Ready,
        container: Some(ContainerId("c".into())),
        name: "bh-w".into(),
        address: None,
        run_as: None,
        created_ms: 3,
    }
}

fn tree(tenant: &str, epoch: u64) -> TreeRow {
    let saved = SnapshotRef {
        number: 4,
        epoch: Epoch(epoch),
        nonce: "n".into(),
        manifest: "m".into(),
        created_ms: 5,
        files: 6,
        bytes: 7,
    };
    TreeRow {
        key: key(tenant),
        epoch: Epoch(epoch),
        cached: true,
        saved: Some(saved),
        owner: Some(Owner { uid: 1, gid: 2 }),
        opened: Some(3),
    }
}

fn fact(value: &str) -> Vec<Op> {
    vec![Op::PutFact("last", value.to_owned())]
}

/// Copies the files as a kill -9 at this moment would leave them.
fn crash_copy(path: &Path) -> (TempDir, PathBuf) {
    let (copy, to) = directory();
    for suffix in ["", "-wal"] {
        let with = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        if with(path).exists() {
            fs::copy(with(path), with(&to)).unwrap();
        }
    }
    (copy, to)
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_crash_in_both_modes() {
    for mode in MODES {
        let (_directory, path) = directory();
        let (journal, loaded) = Journal::open(&path, mode).unwrap();
        assert!(loaded.slots.is_empty() && loaded.claims.is_empty() && loaded.facts.is_empty());
        let tenant = TenantId::new("t").unwrap();
        let metadata = json!({ "plan": "pro" }).as_object().unwrap().clone();
        let gone = slot("gone");
        let all = vec![
            Op::PutSlot(slot("s1")),
            Op::PutSlot(gone.clone()),
            put(claim("t", 1, ClaimState::Claiming)),
            Op::PutTree(tree("t", 1)),
            Op::PutTenant(tenant.clone(), metadata.clone()),
            Op::PutSecret(tenant.clone(), "b".into(), vec![0, 1, 255]),
            Op::PutSecret(tenant.clone(), "a".into(), vec![7]),
            Op::PutRevision(Revision("r".into()), "{}".into()),
            Op::PutRevision(Revision("old".into()), "{}".into()),
            Op::PutFact("boot_id", "x".into()),
        ];
        journal.commit(all, Durability::Hard).await.unwrap();
        let mut ready = slot("s1");
        ready.phase = SlotPhase::Claimed;
        let then = vec![
            Op::PutSlot(ready.clone()),
            Op::DropSlot(gone.slot),
            put(claim("t", 1, ClaimState::Active)),
            Op::DropRevision(Revision("old".into())),
            put(claim("u", 3, ClaimState::Claiming)),
            Op::DropClaim(key("u"), Epoch(3)),
        ];
        journal.commit(then, Durability::Soft).await.unwrap();

        let (_copy, copied) = crash_copy(&path);
        let (after, loaded) = open(&copied);
        assert_eq!(loaded.slots, vec![ready]);
        assert_eq!(loaded.claims, vec![claim("t", 1, ClaimState::Active)]);
        assert_eq!(loaded.trees, vec![tree("t", 1)]);
        assert_eq!(loaded.tenants, vec![(tenant.clone(), metadata)]);
        assert_eq!(loaded.with_secrets, vec![tenant.clone()]);
        assert_eq!(loaded.revisions, vec![(Revision("r".into()), "{}".to_owned())]);
        assert_eq!(loaded.facts["boot_id"], "x");
        let secrets = after.secrets(&tenant).unwrap();
        assert_eq!(secrets, vec![("a".into(), vec![7]), ("b".into(), vec![0, 1, 255])]);
        after.commit(vec![Op::DropSecret(tenant.clone(), "a".into())], Durability::Soft).await.unwrap();
        assert_eq!(after.secrets(&tenant).unwrap().len(), 1);
    }
}

/// P1, at the last line of defence.
#[tokio::test]
async fn two_live_claims_of_a_key_cannot_be_stored() {
    use ClaimState::{Active, Claiming, Clean, Conflict, Dirty, Releasing};
    for live in [Claiming, Active, Releasing] {
        for second in [Claiming, Active, Releasing] {
            let (_directory, path) = directory();
            let (journal, _) = open(&path);
            journal.commit(vec![put(claim("t", 1, live))], Durability::Soft).await.unwrap();
            let refused = journal.commit(vec![put(claim("t", 2, second))], Durability::Soft).await;
            assert_eq!(refused, Err(Error::AlreadyLive { key: key("t") }), "{live:?}, then {second:?}");
            let fine = vec![put(claim("other", 2, second)), put(claim("t", 1, live))];
            journal.commit(fine, Durability::Soft).await.unwrap();
        }
    }
    for over in [Dirty, Clean, Conflict] {
        let (_directory, path) = directory();
        let (journal, _) = open(&path);
        let both = vec![put(claim("t", 1, over)), put(claim("t", 2, Active))];
        journal.commit(both, Durability::Soft).await.unwrap();
    }
}

#[tokio::test]
async fn operations_of_one_call_are_committed_together_or_not_at_all() {
    for mode in MODES {
        let (_directory, path) = directory();
        let (journal, _) = Journal::open(&path, mode).unwrap();
        journal.commit(vec![put(claim("t", 1, ClaimState::Active))], Durability::Hard).await.unwrap();
        let half =
            vec![Op::PutSlot(slot("s1")), put(claim("t", 2, ClaimState::Claiming)), fact("x").remove(0)];
        assert!(matches!(journal.commit(half, Durability::Hard).await, Err(Error::AlreadyLive { .. })));
        let later = vec![Op::PutTree(tree("t", 5)), fact("later").remove(0)];
        journal.commit(later, Durability::Soft).await.unwrap();
        let back = vec![fact("never").remove(0), Op::PutTree(tree("t", 4))];
        assert!(matches!(journal.commit(back, Durability::Soft).await, Err(Error::Refused { .. })));
        drop(journal);
        let (_, loaded) = open(&path);
        assert!(loaded.slots.is_empty(), "{:?}", loaded.slots);
        assert_eq!(loaded.facts["last"], "later");
        assert_eq!(loaded.trees[0].epoch, Epoch(5), "an epoch went back");
    }
}

/// What was written must be readable at the next start, or there is none.
#[tokio::test]
async fn a_row_nested_too_deep_to_be_read_again_is_refused() {
    let (_directory, path) = directory();
    let (journal, _) = open(&path);
    let nested = |levels: usize| {
        let detail = (0..levels).fold(json!(1), |inner, _| json!([inner]));
        put(ClaimRow { detail, ..claim(&format!("t{levels}"), 1, ClaimState::Active) })
    };
    journal.commit(vec![nested(119)], Durability::Soft).await.unwrap();
    let refused = journal.commit(vec![nested(120)], Durability::Soft).await;
    let Err(Error::Refused { what, reason }) = refused else { panic!("{refused:?}") };
    assert_eq!((what.as_str(), reason.as_str()), ("a claim", "it is nested deeper than 120 levels"));
    drop(journal);
    assert_eq!(open(&path).1.claims.len(), 1);
}

/// A forgotten tree must not take the key's number with it (P1).
#[tokio::test]
async fn dropping_a_tree_keeps_its_epoch() {
    let (_directory, path) = directory();
    let (journal, _) = open(&path);
    let ops = vec![Op::PutTree(tree("t", 9)), Op::DropTree(key("t")), Op::DropTree(key("unknown"))];
    journal.commit(ops, Durability::Soft).await.unwrap();
    drop(journal);
    let forgotten = TreeRow { cached: false, saved: None, owner: None, ..tree("t", 9) };
    assert_eq!(open(&path).1.trees, vec![forgotten]);
}

#[tokio::test]
async fn commits_are_carried_out_in_the_order_of_the_calls() {
    for mode in MODES {
        let (_directory, path) = directory();
        let (journal, _) = Journal::open(&path, mode).unwrap();
        let mut waiting: Vec<_> =
            (0..500).map(|n| journal.commit(fact(&n.to_string()), Durability::Soft)).collect();
        // Polled from the last: the order is that of the calls.
        waiting.reverse();
        assert!(join_all(waiting).await.into_iter().all(|result| result.is_ok()));
        drop(journal);
        assert_eq!(open(&path).1.facts["last"], "499");
    }
}

/// Keeps the writer busy until what is returned is dropped.
fn hold(journal: &Journal) -> mpsc::Sender<()> {
    let (release, until) = mpsc::channel();
    let writes = vec![encode::Write::Hold(Mutex::new(until))];
    journal.enqueue(Group { writes, durability: Durability::Soft });
    release
}

#[tokio::test]
async fn a_thousand_commits_at_once_share_transactions_and_one_bad_one_fails_alone() {
    let (_directory, path) = directory();
    let (journal, _) = open(&path);
    journal.commit(vec![put(claim("t0", 1, ClaimState::Active))], Durability::Hard).await.unwrap();
    let log = PathBuf::from(format!("{}-wal", path.display()));
    let before = fs::metadata(&log).unwrap().len();
    let held = hold(&journal);
    let waiting: Vec<_> = (0..1_000)
        .map(|n| {
            let durability = if n % 2 == 0 { Durability::Hard } else { Durability::Soft };
            // Call 900 claims what call 0's tenant holds already.
            let tenant = if n == 900 { "t0".to_owned() } else { format!("u{n}") };
            journal.commit(vec![put(claim(&tenant, 2, ClaimState::Claiming))], durability)
        })
        .collect();
    drop(held);
    let results = join_all(waiting).await;
    for (n, result) in results.iter().enumerate() {
        assert_eq!(result.is_err(), n == 900, "call {n}: {result:?}");
    }
    // A transaction writes each page it touches once; alone, every commit would
    // write two or more to the log. The one batch with the bad commit does.
    let pages = (fs::metadata(&log).unwrap().len() - before) / 4_096;
    assert!(pages < 1_500, "{pages} pages for 1,000 commits: not in groups");
    drop(journal);
    assert_eq!(open(&path).1.claims.len(), 1_000);
}

#[tokio::test]
async fn a_queue_that_is_full_refuses_and_keeps_what_it_took() {
    let (_directory, path) = directory();
    let (journal, _) = open(&path);
    let held = hold(&journal);
    let mut waiting = Vec::new();
    // The writer may have taken up to one batch out of the queue before it was held.
    let refused = loop {
        let commit = journal.commit(fact(&waiting.len().to_string()), Durability::Soft);
        let mut commit = Box::pin(commit);
        match futures_util::poll!(&mut commit) {
            std::task::Poll::Pending => waiting.push(commit),
            std::task::Poll::Ready(result) => break result,
        }
        assert!(waiting.len() <= QUEUE_COMMITS + 256, "the queue has no bound");
    };
    assert_eq!(refused, Err(Error::Overloaded));
    let taken = waiting.len();
    assert!(taken >= QUEUE_COMMITS);
    drop(held);
    assert!(join_all(waiting).await.into_iter().all(|result| result.is_ok()));
    assert_eq!(open_copy(&path).facts["last"], (taken - 1).to_string());
}

#[tokio::test]
async fn a_dropped_commit_is_committed() {
    for mode in MODES {
        let (_directory, path) = directory();
        let (journal, _) = Journal::open(&path, mode).unwrap();
        drop(journal.commit(fact("dropped"), Durability::Hard));
        journal.flush().await.unwrap();
        drop(journal.commit(vec![Op::PutSlot(slot("s1"))], Durability::Soft));
        drop(journal);
        let (_, loaded) = open(&path);
        assert_eq!(loaded.facts["last"], "dropped");
        assert_eq!(loaded.slots.len(), 1, "the last handle went before the writer was done");
    }
}

#[tokio::test]
async fn claims_that_are_over_do_not_pile_up_and_unsaved_ones_stay() {
    use ClaimState::{Active, Clean, Conflict, Dirty};
    let (_directory, path) = directory();
    let (journal, _) = open(&path);
    let superseded = |epoch, by| ClaimRow { superseded_by: Some(Epoch(by)), ..claim("t", epoch, Dirty) };
    let epochs = |path: &Path| {
        let loaded = open(path).1;
        loaded.claims.iter().map(|row| row.epoch.0).collect::<Vec<_>>()
    };
    let ops = vec![
        put(claim("t", 1, Clean)),
        put(claim("t", 2, Conflict)),
        put(claim("t", 3, Clean)),
        put(superseded(4, 5)),
        put(superseded(5, 6)),
        put(claim("t", 6, Active)),
        // Not of this key: must not be touched by what settles it.
        put(ClaimRow { key: key("u"), ..superseded(1, 2) }),
    ];
    journal.commit(ops, Durability::Soft).await.unwrap();
    let (_copy, copied) = crash_copy(&path);
    assert_eq!(epochs(&copied), [2, 3, 4, 5, 6, 1], "nothing is settled before 6 is clean");

    // Superseded by a claim that is still to be saved: stays.
    let ops = vec![put(claim("t", 6, Clean)), put(superseded(7, 9)), put(claim("t", 8, Clean))];
    journal.commit(ops, Durability::Soft).await.unwrap();
    drop(journal);
    assert_eq!(epochs(&path), [2, 7, 8, 1]);
    let rows: i64 = rusqlite::Connection::open(&path)
        .unwrap()
        .query_row("SELECT count(*) FROM claims", [], |row| row.get(0))
        .unwrap();
    assert_eq!(rows, 4, "settled rows are gone from the file, too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_read_beside_the_writer() {
    let (_directory, path) = directory();
    let (journal, _) = open(&path);
    let tenant = TenantId::new("t").unwrap();
    let readers: Vec<_> = (0..8)
        .map(|reader| {
            let (journal, tenant) = (journal.clone(), tenant.clone());
            tokio::spawn(async move {
                for n in 0..50_u8 {
                    let name = format!("{reader}-{n}");
                    let op = Op::PutSecret(tenant.clone(), name.clone(), vec![n]);
                    journal.commit(vec![op], Durability::Soft).await.unwrap();
                    let read = journal.secrets(&tenant).unwrap();
                    assert!(read.contains(&(name, vec![n])), "an acknowledged secret was not read");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    assert_eq!(journal.secrets(&tenant).unwrap().len(), 400);
    assert_eq!(journal.secrets(&TenantId::new("none").unwrap()).unwrap(), vec![]);
}

#[tokio::test]
async fn a_panicking_writer_answers_unknown_and_works_again() {
    let (_directory, path) = directory();
    let (journal, _) = open(&path);
    journal.commit(fact("before"), Durability::Soft).await.unwrap();
    let group = Group { writes: vec![encode::Write::Panic], durability: Durability::Soft };
    let Answer::Coming(receiver) = journal.enqueue(group) else { panic!("not queued") };
    assert_eq!(receiver.await.unwrap(), Err(Error::Unknown));
    assert_eq!(open_copy(&path).facts["last"], "before");
    journal.commit(fact("after"), Durability::Soft).await.unwrap();
    assert_eq!(open_copy(&path).facts["last"], "after");
}

fn open_copy(path: &Path) -> Loaded {
    let (_copy, copied) = crash_copy(path);
    open(&copied).1
}

/// A small file system of its own; unmounted when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs"])
            .arg(directory.path())
            .status()
            .expect("the command mount runs");
        assert!(mounted.success(), "this test mounts a small tmpfs: run it as root with CAP_SYS_ADMIN");
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_acknowledges_nothing_and_the_journal_goes_on_when_there_is_room() {
    for mode in MODES {
        let disk = SmallDisk::new();
        let path = disk.0.path().join("journal.db");
        let (journal, _) = Journal::open(&path, mode).unwrap();
        journal.commit(fact("before"), Durability::Hard).await.unwrap();

        let ballast = disk.0.path().join("ballast");
        let filled = fs::write(&ballast, vec![1; 4 << 20]).unwrap_err();
        assert_eq!(filled.kind(), std::io::ErrorKind::StorageFull);
        let waiting: Vec<_> = (0..20)
            .map(|n| {
                let row = ClaimRow {
                    detail: json!("x".repeat(9_000)),
                    ..claim(&format!("t{n}"), 1, ClaimState::Active)
                };
                journal.commit(vec![put(row)], Durability::Hard)
            })
            .collect();
        let acknowledged = join_all(waiting).await.iter().filter(|result| result.is_ok()).count();
        assert!(acknowledged < 20, "a full disk took everything");
        let refused = journal.commit(vec![put(claim("late", 1, ClaimState::Active))], Durability::Soft).await;
        let Err(Error::Unavailable { path: named, reason }) = refused else { panic!("{refused:?}") };
        assert!(named == path && reason.contains("full"), "{reason}");

        fs::remove_file(&ballast).unwrap();
        let after = vec![put(claim("after", 1, ClaimState::Active))];
        let mut result = journal.commit(after, Durability::Hard).await;
        for _ in 0..50 {
            if result.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            result = journal.commit(vec![put(claim("after", 1, ClaimState::Active))], Durability::Hard).await;
        }
        result.unwrap();
        drop(journal);
        let (_journal, loaded) = Journal::open(&path, mode).unwrap();
        assert_eq!(loaded.facts["last"], "before");
        assert_eq!(loaded.claims.len(), acknowledged + 1, "{mode:?}");
    }
}

/// P8, P9: no answer is not a refusal. The clock is paused, so the deadline comes at once.
#[tokio::test(start_paused = true)]
async fn a_commit_that_is_not_answered_in_time_is_unknown_and_may_be_given_again() {
    let (_directory, path) = directory();
    let (journal, _) = open(&path);
    let held = hold(&journal);
    let ops = || vec![put(claim("t", 1, ClaimState::Claiming))];
    assert_eq!(journal.commit(ops(), Durability::Hard).await, Err(Error::Unknown));
    drop(held);
    tokio::time::resume();
    journal.commit(ops(), Durability::Hard).await.unwrap();
    drop(journal);
    assert_eq!(open(&path).1.claims.len(), 1);
}

#[tokio::test]
async fn a_failing_writer_refuses_until_its_file_can_be_opened_again() {
    let (directory, path) = directory();
    let (journal, _) = open(&path);
    journal.commit(fact("before"), Durability::Hard).await.unwrap();
    // The writer loses its connection, and finds nothing where the file was.
    let group = Group { writes: vec![encode::Write::Panic], durability: Durability::Soft };
    let away = directory.path().join("away");
    fs::rename(&path, &away).unwrap();
    let Answer::Coming(receiver) = journal.enqueue(group) else { panic!("not queued") };
    assert_eq!(receiver.await.unwrap(), Err(Error::Unknown));
    for _ in 0..3 {
        let refused = journal.commit(fact("lost"), Durability::Hard).await;
        assert!(matches!(refused, Err(Error::Unavailable { .. })), "{refused:?}");
    }
    assert!(!path.exists(), "a new, empty journal was made in place of the one that vanished");
    fs::rename(&away, &path).unwrap();
    let mut result = Err(Error::Unknown);
    for _ in 0..100 {
        result = journal.commit(fact("after"), Durability::Hard).await;
        if result.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    result.unwrap();
    assert_eq!(open_copy(&path).facts["last"], "after");
}

#[test]
fn a_second_server_is_kept_away_and_the_first_one_leaves_no_lock() {
    let (_directory, path) = directory();
    let (first, _) = Journal::open(&path, Mode::Threaded).unwrap();
    let second = Journal::open(&path, Mode::Inline).unwrap_err();
    assert_eq!(second, Error::InUse { path: path.clone() });
    drop(first);
    open(&path);
}

#[tokio::test]
async fn the_files_are_private() {
    let (directory, path) = directory();
    fs::write(&path, "").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let (journal, _) = open(&path);
    journal.commit(fact("x"), Durability::Hard).await.unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", entry.file_name());
        seen += 1;
    }
    assert!(seen >= 4, "journal, log, shared memory, lock");
}

/// Each way in which the file may be unusable, and that it is left as it was.
#[tokio::test]
async fn a_file_that_is_no_sound_journal_is_refused_in_words_and_left_alone() {
    type Harm = fn(&Path);
    let damage: [(&str, Harm, &str); 6] = [
        ("no database", |path| fs::write(path, vec![b'x'; 8_192]).unwrap(), "is damaged"),
        ("a page destroyed", tear, "is damaged"),
        (
            "a bad row",
            |path| sql(path, "UPDATE claims SET row = '{}'"),
            "table claims, row t/w epoch 1: missing field",
        ),
        (
            "a bad id",
            |path| sql(path, "INSERT INTO tenants VALUES ('../x', '{}')"),
            "table tenants, row ../x",
        ),
        (
            "a newer version",
            |path| sql(path, "PRAGMA user_version = 99"),
            "has version 99, and this build knows up to",
        ),
        ("not ours", |path| sql(path, "PRAGMA application_id = 7"), "not one of boilerhouse's"),
    ];
    for (what, harm, words) in damage {
        let (_directory, path) = directory();
        let (journal, _) = open(&path);
        let ops = (0..200).map(|n| put(claim(&format!("t{n}"), 1, ClaimState::Active)));
        journal.commit(ops.collect(), Durability::Hard).await.unwrap();
        journal.commit(vec![put(claim("t", 1, ClaimState::Active))], Durability::Hard).await.unwrap();
        drop(journal);
        // The writer is done when the lock is free.
        drop(open(&path));
        drop(database::Database::open(&path).unwrap());
        harm(&path);
        let before = fs::read(&path).unwrap();
        let error = Journal::open(&path, Mode::Threaded).unwrap_err().to_string();
        assert!(error.contains(words), "{what}: {error}");
        assert!(error.contains(path.to_str().unwrap()), "{what}: {error}");
        assert_eq!(fs::read(&path).unwrap(), before, "{what}: the file was changed");
    }
}

fn tear(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let pages = bytes.len() / 4_096;
    for page in pages / 2..pages {
        bytes[page * 4_096..(page + 1) * 4_096].fill(0xa5);
    }
    fs::write(path, bytes).unwrap();
}

fn sql(path: &Path, text: &str) {
    rusqlite::Connection::open(path).unwrap().execute_batch(text).unwrap();
}

/// SQLite would take the journal for a new one, and delete the log with the rows.
#[tokio::test]
async fn a_log_without_its_database_is_not_deleted() {
    for harm in [|path: &Path| fs::remove_file(path).unwrap(), |path: &Path| fs::write(path, "").unwrap()] {
        let (_directory, path) = directory();
        let (journal, _) = open(&path);
        journal.commit(fact("x"), Durability::Hard).await.unwrap();
        let (_copy, copied) = crash_copy(&path);
        harm(&copied);
        let error = Journal::open(&copied, Mode::Threaded).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(fs::metadata(format!("{}-wal", copied.display())).unwrap().len() > 0);
    }
}

/// Rows written by the first version must be readable by every later one.
#[test]
fn rows_of_version_1_are_read() {
    let (_directory, path) = directory();
    drop(open(&path));
    drop(database::Database::open(&path).unwrap());
    sql(
        &path,
        r#"
        INSERT INTO slots VALUES ('s', 'w', 'ready', '{"slot":"s","workload":"w","spec_hash":"h","revision":"r",
            "phase":"ready","container":"c","name":"n","address":null,"run_as":{"uid":1,"gid":2},"created_ms":3}');
        INSERT INTO claims VALUES ('t', 'w', 1, 'active', NULL, '{"key":{"tenant":"t","workload":"w"},"epoch":1,
            "state":"active","slot":"s","revision":"r","run_as":{"uid":1,"gid":2},"source":"warm",
            "state_source":"store","snapshot":null,"nonce":null,"failed":false,"superseded_by":null,
            "detail":{"any":1},"created_ms":1,"active_ms":2}');
        INSERT INTO trees VALUES ('t', 'w', 1, '{"key":{"tenant":"t","workload":"w"},"epoch":1,"cached":true,
            "saved":{"number":1,"epoch":1,"nonce":"n","manifest":"m","created_ms":1,"files":2,"bytes":3},
            "owner":{"uid":1,"gid":2}}');
        INSERT INTO tenants VALUES ('t', '{"plan":"pro"}');
        INSERT INTO secrets VALUES ('t', 'n', x'00ff');
        INSERT INTO revisions VALUES ('r', '{}');
        INSERT INTO facts VALUES ('boot_id', 'x');
        -- Back to version 1: what came later adds a table, and fields to rows.
        DROP TABLE erasures;
        PRAGMA user_version = 1;
        "#,
    );
    let (journal, loaded) = open(&path);
    assert_eq!((loaded.slots.len(), loaded.claims.len(), loaded.trees.len()), (1, 1, 1));
    assert_eq!((loaded.tenants.len(), loaded.revisions.len(), loaded.facts.len()), (1, 1, 1));
    assert_eq!(loaded.claims[0].state_source, StateSource::Store);
    assert_eq!(journal.secrets(&loaded.with_secrets[0]).unwrap(), vec![("n".into(), vec![0, 255])]);
}
