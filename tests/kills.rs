//! kill -9 at random moments, on a real S3 server.
//!
//! A process of its own runs a whole node: the real journal, real directories,
//! the real S3 adapter; only its container engine is in memory, so that its
//! containers are gone after each kill, as after a power cut. In each round it is
//! killed once while it fills a slot and once while it captures and saves one, at
//! a moment that the seed decides, and started again each time. What the store
//! has then, restored by a stranger, must be what was acknowledged last.
//!
//! `KILLS_ROUNDS` (20) and `KILLS_SEED` (random, printed) choose the rounds.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::MetadataExt as _,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use boilerhouse::{
    clock::{SystemClock, random_hex},
    model::{
        ClaimState, Epoch, Key, SlotId, TenantId, WorkloadId,
        spec::{Volume, VolumeMode, Volumes},
    },
    state::{
        Fill, FillFrom, SlotFiles as _,
        host::{HostDirs, HostFiles},
    },
    store::{FaultStore, S3Store, SharedStore, s3::Limits},
    tenancy::ReleaseState,
};
use support::{
    node::{APP, TestNode, World},
    radosgw::Radosgw,
};

const TENANT: &str = "alice";
const WORKLOAD: &str = "worker";
const SCRIPT: &str = r#"//! A program with a state.
fn workload() {
    #{
        id: "worker",
        image: "app:1",
        volumes: #{ state: #{ container_path: "/data", mode: "rw" } },
        pool: #{ min_idle: 1, max: 4 },
    }
}
"#;
/// Until the node under test has answered what nobody cuts short.
const ANSWER: Duration = Duration::from_secs(60);

/// Where the node under test is told to be, when this process is it.
const DIR: &str = "KILLS_NODE_DIR";
const PREFIX: &str = "KILLS_NODE_PREFIX";

// === The node under test ===

fn store(prefix: &str) -> SharedStore {
    let s3 = Radosgw::find();
    let clock = Arc::new(SystemClock);
    Arc::new(S3Store::connect(&s3.bucket, prefix, &s3.aws, Limits::default(), clock).unwrap())
}

/// Waits until no claim is on its way anywhere; answers whether one is active.
async fn settled(node: &TestNode) -> bool {
    let begun = Instant::now();
    loop {
        let claims = node.status(TENANT).await.claims;
        assert!(begun.elapsed() < ANSWER, "the claims do not settle: {claims:?}");
        match &claims[..] {
            [] => return false,
            [claim] if claim.state == ClaimState::Active => return true,
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// Runs a node and does as the lines of its control socket say.
async fn obey(dir: &Path, prefix: &str) {
    let mut world = World::new(&[(WORKLOAD, SCRIPT)]);
    world.store = FaultStore::new(store(prefix));
    let node = world.launch_in(dir);
    let begun = Instant::now();
    while node.node.tenancy.readiness().status == "starting" {
        assert!(begun.elapsed() < ANSWER, "the node does not start: {:?}", node.node.tenancy.readiness());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut socket = UnixStream::connect(dir.join("control.sock")).unwrap();
    let commands = BufReader::new(socket.try_clone().unwrap());
    let mut say = |line: &str| socket.write_all(format!("{line}\n").as_bytes()).unwrap();
    say("ready");
    for command in commands.lines() {
        match command.unwrap().as_str() {
            "settle" => say(if settled(&node).await { "active" } else { "none" }),
            "claim" => {
                let answer = node.claim(TENANT).await.unwrap();
                say(node.state(&answer).to_str().unwrap());
            }
            "release" => {
                let answer = node.release(TENANT).await.unwrap();
                assert_eq!(answer.state, ReleaseState::Durable, "{answer:?}");
                say("durable");
            }
            other => panic!("unknown command {other:?}; allowed are settle, claim, release"),
        }
    }
    node.stop().await;
}

// === What the test sees of it ===

struct Process {
    child: Child,
    socket: BufReader<UnixStream>,
}

enum Answer {
    Line(String),
    /// The time was over before an answer came.
    None,
}

impl Process {
    /// Starts the node of `dir`, and waits until it serves.
    async fn start(dir: &Path, prefix: &str) -> Self {
        for (folder, file, text) in [("workloads", "worker.rhai", SCRIPT), ("scripts", ".keep", "")] {
            std::fs::create_dir_all(dir.join(folder)).unwrap();
            std::fs::write(dir.join(folder).join(file), text).unwrap();
        }
        let control = dir.join("control.sock");
        let _ = std::fs::remove_file(&control);
        let listener = UnixListener::bind(&control).unwrap();
        listener.set_nonblocking(true).unwrap();
        let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_node_obeys_its_control_socket", "--nocapture"])
            .env(DIR, dir)
            .env(PREFIX, prefix)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let begun = Instant::now();
        let socket = loop {
            match listener.accept() {
                Ok((socket, _)) => break socket,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
            }
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none() && begun.elapsed() < ANSWER, "{ended:?}; {}", log_of(dir));
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        socket.set_nonblocking(false).unwrap();
        let mut process = Self { child, socket: BufReader::new(socket) };
        process.expect("ready", dir);
        process
    }

    fn tell(&mut self, command: &str) {
        self.socket.get_mut().write_all(format!("{command}\n").as_bytes()).unwrap();
    }

    fn answer(&mut self, within: Duration) -> Answer {
        let within = within.max(Duration::from_micros(1));
        self.socket.get_mut().set_read_timeout(Some(within)).unwrap();
        let mut line = String::new();
        match self.socket.read_line(&mut line) {
            Ok(0) => panic!("the node ended by itself"),
            Ok(_) => Answer::Line(line.trim_end().to_owned()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Answer::None,
            Err(error) => panic!("the control socket: {error}"),
        }
    }

    /// Asks and waits as long as it takes; answers how long that was, too.
    fn ask(&mut self, command: &str, dir: &Path) -> (String, Duration) {
        let begun = Instant::now();
        self.tell(command);
        match self.answer(ANSWER) {
            Answer::Line(line) => (line, begun.elapsed()),
            Answer::None => panic!("{command} is not answered: {}", log_of(dir)),
        }
    }

    fn expect(&mut self, expected: &str, dir: &Path) {
        match self.answer(ANSWER) {
            Answer::Line(line) => assert_eq!(line, expected),
            Answer::None => panic!("no {expected}: {}", log_of(dir)),
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it in order: the control socket closes.
    fn stop(mut self, dir: &Path) {
        drop(self.socket);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {}", log_of(dir));
    }
}

fn log_of(dir: &Path) -> String {
    let text = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
    let tail = text.len().saturating_sub(4_000);
    text[text.ceil_char_boundary(tail)..].to_owned()
}

// === Trees ===

/// Mode, owner, time and content of each entry by its path; the root's own time is
/// no part of what a kill in the middle of a move must keep.
type Tree = BTreeMap<PathBuf, (u32, u32, u32, i64, i64, String)>;

fn tree(root: &Path) -> Tree {
    let (mut found, mut open) = (Tree::new(), vec![PathBuf::new()]);
    while let Some(path) = open.pop() {
        let full = root.join(&path);
        let meta = full.symlink_metadata().unwrap();
        let content = if meta.is_dir() {
            open.extend(std::fs::read_dir(&full).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
            String::new()
        } else if meta.is_symlink() {
            full.read_link().unwrap().display().to_string()
        } else {
            blake3::hash(&std::fs::read(&full).unwrap()).to_hex().to_string()
        };
        let is_root = path.as_os_str().as_bytes().is_empty();
        let (seconds, nanoseconds) = if is_root { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) };
        found.insert(path, (meta.mode(), meta.uid(), meta.gid(), seconds, nanoseconds, content));
    }
    found
}

/// By how much the span from which a kill's moment is drawn grows past what was seen: kills come
/// in every part of a move, its end included.
const LONGER: f64 = 1.25;

/// Draws numbers: splitmix64 of the seed.
struct Seed(u64);

impl Seed {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A moment within `whole`.
    fn moment(&mut self, whole: Duration) -> Duration {
        whole.mul_f64(self.below(1_000) as f64 / 1_000.0)
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

/// Does what a tenant's program would: makes, changes, moves and removes.
fn work(root: &Path, seed: &mut Seed) {
    let own = |path: &Path| std::os::unix::fs::lchown(path, Some(APP.uid), Some(APP.gid)).unwrap();
    for _ in 0..1 + seed.below(60) {
        let folder = root.join(format!("d{}", seed.below(6)));
        let path = folder.join(format!("f{}", seed.below(40)));
        match seed.below(10) {
            0 => drop(std::fs::remove_file(&path)),
            1 => drop(std::fs::remove_dir_all(&folder)),
            2 => drop(std::fs::rename(&path, folder.join(format!("moved{}", seed.below(9))))),
            kind => {
                std::fs::create_dir_all(&folder).unwrap();
                own(&folder);
                let _ = std::fs::remove_file(&path);
                if kind == 3 {
                    std::os::unix::fs::symlink(format!("f{}", seed.below(40)), &path).unwrap();
                } else {
                    let most = if kind == 4 { 3 << 20 } else { 20_000 };
                    let bytes = seed.below(most);
                    std::fs::write(&path, seed.bytes(bytes)).unwrap();
                }
                own(&path);
            }
        }
    }
}

/// What a stranger restores from the store.
async fn in_store(prefix: &str) -> Option<Tree> {
    let dir = tempfile::tempdir().unwrap();
    let dirs = HostDirs {
        state_dir: dir.path().join("state"),
        secrets_dir: dir.path().join("secrets"),
        socket_dir: dir.path().join("sockets"),
    };
    let files = HostFiles::open(dirs, store(prefix), Arc::new(SystemClock)).unwrap();
    let key = Key::new(TenantId::new(TENANT).unwrap(), WorkloadId::new(WORKLOAD).unwrap());
    let newest = files.newest(&key).await.unwrap()?;
    let slot = SlotId::new("stranger").unwrap();
    let volume = Some(Volume { container_path: "/data".into(), mode: VolumeMode::Rw });
    let volumes = Volumes { state: volume, secrets: None, comm: None };
    files.prepare(&slot, &volumes).await.unwrap();
    let (from, epoch) = (FillFrom::Snapshot(newest), Epoch(1 << 40));
    let fill = Fill { slot, key, epoch, from, run_as: APP, previous_owner: None };
    files.fill(&fill).await.unwrap();
    Some(tree(&dir.path().join("state/slots/stranger/state")))
}

fn same(found: Option<&Tree>, expected: Option<&Tree>, when: &str) {
    let none = Tree::new();
    let (mut found, expected) = (found.unwrap_or(&none), expected.unwrap_or(&none));
    // A first claim whose container a kill took may have been saved as it was: empty.
    if expected.is_empty() && found.keys().all(|path| path.as_os_str().is_empty()) {
        found = expected;
    }
    let paths: std::collections::BTreeSet<_> = found.keys().chain(expected.keys()).collect();
    let differ: Vec<_> = paths.into_iter().filter(|path| found.get(*path) != expected.get(*path)).collect();
    let shown: Vec<_> =
        differ.iter().take(5).map(|path| (path, found.get(*path), expected.get(*path))).collect();
    assert!(differ.is_empty(), "{when}: {} of {} entries differ: {shown:#?}", differ.len(), expected.len());
}

/// Reads a number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text:?}: a whole number is allowed")))
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_p7_kill_9_in_fills_and_captures_loses_nothing_acknowledged() {
    let rounds = number("KILLS_ROUNDS").unwrap_or(20);
    let first = number("KILLS_SEED")
        .unwrap_or_else(|| u64::from_str_radix(&random_hex(&SystemClock, 7), 16).unwrap());
    println!("KILLS_SEED={first}");
    let mut seed = Seed(first);
    let prefix = format!("kills-{first:x}-{}", std::process::id());
    let homes = tempfile::tempdir().unwrap();
    let home = |machine: u64| {
        let dir = homes.path().join(format!("machine{machine}"));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    };
    let (mut machine, mut acknowledged) = (0, None::<Tree>);
    let (mut a_fill, mut a_capture) = (Duration::from_millis(30), Duration::from_millis(300));
    let (mut cut_fills, mut cut_captures) = (0, 0);
    let mut dir = home(machine);
    let mut node = Process::start(&dir, &prefix).await;
    for round in 1..=rounds {
        let when = |what: &str| format!("KILLS_SEED={first}, round {round} of {rounds}, {what}");
        // A fill, from the cache or, on a machine that is new, from the store.
        if seed.below(2) == 0 {
            node.stop(&dir);
            machine += 1;
            dir = home(machine);
            node = Process::start(&dir, &prefix).await;
        }
        node.tell("claim");
        if matches!(node.answer(seed.moment(a_fill)), Answer::None) {
            cut_fills += 1;
            a_fill = a_fill.mul_f64(LONGER);
        }
        node.kill();
        node = Process::start(&dir, &prefix).await;
        node.ask("settle", &dir);
        same(in_store(&prefix).await.as_ref(), acknowledged.as_ref(), &when("after a kill in a fill"));
        let (state, elapsed) = node.ask("claim", &dir);
        a_fill = a_fill.min(elapsed.mul_f64(LONGER));
        let state = PathBuf::from(state);
        if let Some(acknowledged) = &acknowledged {
            same(Some(&tree(&state)), Some(acknowledged), &when("in the slot"));
        }
        // A capture and a save.
        work(&state, &mut seed);
        let written = tree(&state);
        node.tell("release");
        let begun = Instant::now();
        match node.answer(seed.moment(a_capture)) {
            Answer::Line(line) => {
                assert_eq!(line, "durable");
                a_capture = begun.elapsed().mul_f64(LONGER);
            }
            Answer::None => {
                cut_captures += 1;
                a_capture = a_capture.mul_f64(LONGER);
            }
        }
        node.kill();
        node = Process::start(&dir, &prefix).await;
        // Killed before the release was journaled, the claim may go on without its container.
        if node.ask("settle", &dir).0 == "active" {
            node.tell("release");
            node.expect("durable", &dir);
        }
        same(in_store(&prefix).await.as_ref(), Some(&written), &when("after a kill in a capture"));
        acknowledged = Some(written);
    }
    node.stop(&dir);
    println!("{cut_fills} fills and {cut_captures} captures of {rounds} each were cut short");
    assert!(cut_fills + cut_captures > 0, "no kill ever came in time");
}

/// The node that is killed, in a process of its own; run like any other test it is
/// a round without a kill.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_obeys_its_control_socket() {
    if let (Some(dir), Ok(prefix)) = (std::env::var_os(DIR), std::env::var(PREFIX)) {
        return obey(Path::new(&dir), &prefix).await;
    }
    let home = tempfile::tempdir().unwrap();
    let prefix = format!("kills-{}", random_hex(&SystemClock, 8));
    let mut node = Process::start(home.path(), &prefix).await;
    let state = PathBuf::from(node.ask("claim", home.path()).0);
    work(&state, &mut Seed(1));
    let written = tree(&state);
    assert_eq!(node.ask("release", home.path()).0, "durable");
    node.stop(home.path());
    same(in_store(&prefix).await.as_ref(), Some(&written), "after a release in order");
}
