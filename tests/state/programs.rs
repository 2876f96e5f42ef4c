//! A real program writes all the time; a checkpoint of it is what a crash at that
//! moment would have left, with everything that was acknowledged before.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::{net::UnixStream, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use boilerhouse::state::{FillFrom, SaveTree, SlotFiles};

use crate::support::{MemoryStore, Node, key, save, slot};

/// Writes pairs of rows, one transaction each, and says each that is committed.
const WRITER: &str = r"
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute('PRAGMA journal_mode=' + sys.argv[2])
db.execute('PRAGMA synchronous=FULL')
db.execute('CREATE TABLE IF NOT EXISTS one (id INTEGER PRIMARY KEY, content BLOB)')
db.execute('CREATE TABLE IF NOT EXISTS two (id INTEGER PRIMARY KEY, content BLOB)')
number = 0
while True:
    number += 1
    db.execute('BEGIN IMMEDIATE')
    db.execute('INSERT INTO one VALUES (?, randomblob(900))', (number,))
    db.execute('INSERT INTO two SELECT id, content FROM one WHERE id = ?', (number,))
    if number % 7 == 0:
        db.execute('UPDATE one SET content = randomblob(500) WHERE id % 5 = 0')
        db.execute('UPDATE two SET content = (SELECT content FROM one WHERE one.id = two.id)')
    db.execute('COMMIT')
    print(number, flush=True)
";

const LIMIT: Duration = Duration::from_secs(120);

/// Ends the program when the test does.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // A child of its own, too.
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", self.0.id())]).status();
        let _ = self.0.wait();
    }
}

impl Program {
    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, "--", &format!("-{}", self.0.id())]).status().unwrap();
        assert!(sent.success());
    }

    /// Stops the program with its children, and waits until all their threads are.
    async fn stop(&self) {
        self.signal("-STOP");
        wait_until("the program stops", || self.states().iter().all(|state| state == "T")).await;
    }

    /// Reads the state of each thread in the program's process group.
    fn states(&self) -> Vec<String> {
        let group = self.0.id().to_string();
        let stats = |dir: &str| -> Vec<(String, Vec<String>)> {
            let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
            let numbers = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
            let numbers = numbers.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
            numbers
                .filter_map(|number| {
                    let stat = std::fs::read_to_string(format!("{dir}/{number}/stat")).ok()?;
                    // Behind the name: state, parent, group.
                    let rest = stat.rsplit(')').next()?;
                    Some((number, rest.split_whitespace().map(str::to_owned).collect()))
                })
                .collect()
        };
        let own = stats("/proc").into_iter().filter(|(_, rest)| rest.get(2) == Some(&group));
        let threads = own.flat_map(|(number, _)| stats(&format!("/proc/{number}/task")));
        // A child that has ended does nothing any more.
        threads.map(|(_, rest)| rest[0].clone()).filter(|state| state != "Z" && state != "X").collect()
    }
}

async fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Takes a checkpoint while the program stands still; answers what `promised` said then.
async fn checkpoint(node: &Node, program: &Program, nonce: &str, promised: &AtomicU64) -> u64 {
    let (key, one) = (key("t"), slot("one"));
    let id = node.files.copy_live(&one, &key).await.unwrap();
    program.stop().await;
    let promised = promised.load(Ordering::SeqCst);
    node.files.copy_paused(&id).await.unwrap();
    program.signal("-CONT");
    let mut saving = save(&key, 1, nonce);
    saving.tree = SaveTree::Checkpoint(id.clone());
    node.files.save(&saving).await.unwrap();
    node.files.drop_checkpoint(&id).await.unwrap();
    promised
}

fn sqlite(database: &Path, query: &str) -> String {
    let output = Command::new("sqlite3").arg(database).arg(query).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

async fn survives(journal_mode: &str) {
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let database = node.state_path(&one).join("app.db");
    let mut command = Command::new("python3");
    command.args(["-c", WRITER]).arg(&database).arg(journal_mode).stdout(Stdio::piped()).process_group(0);
    let mut program = Program(command.spawn().unwrap());
    let acknowledged = Arc::new(AtomicU64::new(0));
    let lines = BufReader::new(program.0.stdout.take().unwrap()).lines();
    let reader = std::thread::spawn({
        let acknowledged = Arc::clone(&acknowledged);
        move || {
            for line in lines.map_while(Result::ok) {
                acknowledged.store(line.parse().unwrap(), Ordering::SeqCst);
            }
        }
    });
    let mut promised = 0;
    for round in 0..4 {
        wait_until("more is written", || acknowledged.load(Ordering::SeqCst) >= promised + 20).await;
        promised = checkpoint(&node, &program, &format!("round {round}"), &acknowledged).await;
        if round == 3 {
            program.signal("-KILL");
        }
        let other = Node::new(&node.store);
        other.restored(&one, &key, 2).await;
        let restored = other.state_path(&one).join("app.db");
        assert_eq!(sqlite(&restored, "PRAGMA integrity_check"), "ok", "{journal_mode}, round {round}");
        let rows: u64 = sqlite(&restored, "SELECT count(*) FROM one").parse().unwrap();
        assert!(rows >= promised, "{journal_mode}: {rows} rows are there, {promised} were acknowledged");
        let halves = "SELECT count(*) FROM one LEFT JOIN two USING (id) WHERE one.content IS NOT two.content";
        assert_eq!(sqlite(&restored, halves), "0", "{journal_mode}: half a transaction");
        assert_eq!(sqlite(&restored, "SELECT count(*) = max(id) FROM two"), "1");
    }
    drop(program);
    reader.join().unwrap();
}

#[tokio::test]
async fn a_database_with_a_write_ahead_log_survives_checkpoint_kill_and_restore() {
    survives("WAL").await;
}

#[tokio::test]
async fn a_database_with_a_rollback_journal_survives_checkpoint_kill_and_restore() {
    survives("DELETE").await;
}

/// Debian's server, which is one program with its checker.
const REDIS: &str = "/usr/bin/redis-check-rdb";

/// Starts Redis on a directory with an append-only file that is rewritten often.
fn redis(dir: &Path, socket: &Path) -> Program {
    let mut command = Command::new(REDIS);
    command.arg0("redis-server").args(["--port", "0", "--save", "", "--appendonly", "yes"]);
    command.args(["--appendfsync", "always", "--auto-aof-rewrite-min-size", "64kb"]);
    command.args(["--auto-aof-rewrite-percentage", "30", "--daemonize", "no", "--logfile", ""]);
    command.arg("--dir").arg(dir).arg("--unixsocket").arg(socket);
    Program(command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap())
}

struct Client(BufReader<UnixStream>);

impl Client {
    /// Waits until the server has loaded what it has.
    async fn connect(socket: &Path) -> Self {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Ok(stream) = UnixStream::connect(socket) {
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                let mut client = Self(BufReader::new(stream));
                if client.ask("PING", 1).is_some_and(|answer| answer == ["+PONG"]) {
                    return client;
                }
            }
            assert!(Instant::now() < deadline, "Redis does not answer");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sends commands and reads so many lines; `None` when the server has gone away.
    fn ask(&mut self, commands: &str, lines: usize) -> Option<Vec<String>> {
        self.0.get_mut().write_all(format!("{commands}\r\n").as_bytes()).ok()?;
        let mut answer = Vec::new();
        for _ in 0..lines {
            let mut line = String::new();
            if self.0.read_line(&mut line).ok()? == 0 {
                return None;
            }
            answer.push(line.trim_end().to_owned());
        }
        Some(answer)
    }

    fn get(&mut self, key: &str) -> String {
        let answer = self.ask(&format!("GET {key}"), 1).unwrap();
        assert_ne!(answer, ["$-1"], "{key} is not there");
        let mut value = String::new();
        self.0.read_line(&mut value).unwrap();
        value.trim_end().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_only_file_survives_checkpoint_kill_and_restore() {
    assert!(Path::new(REDIS).exists(), "apt-get install redis-tools (or `make setup`)");
    let node = Node::new(&Arc::new(MemoryStore::default()));
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    // A socket in the tree would only be left out.
    let socket = node.dir.path().join("redis");
    let program = redis(&node.state_path(&one), &socket);
    let mut client = Client::connect(&socket).await;
    let acknowledged = Arc::new(AtomicU64::new(0));
    let writer = std::thread::spawn({
        let acknowledged = Arc::clone(&acknowledged);
        move || {
            for n in 1_u64.. {
                let filler = "x".repeat(3_000 + usize::try_from(n % 1_000).unwrap());
                // Two keys of one transaction; one of them is written again and again.
                let commands = format!(
                    "MULTI\r\nSET key:{n} {n}\r\nSET last {n}\r\nSET big:{} {filler}\r\nEXEC",
                    n % 50
                );
                let Some(answer) = client.ask(&commands, 8) else { return };
                assert_eq!(answer[4..], ["*3", "+OK", "+OK", "+OK"]);
                acknowledged.store(n, Ordering::SeqCst);
            }
        }
    });
    let mut promised = 0;
    for round in 0..4 {
        wait_until("more is written", || acknowledged.load(Ordering::SeqCst) >= promised + 300).await;
        promised = checkpoint(&node, &program, &format!("round {round}"), &acknowledged).await;
        if round == 3 {
            program.signal("-KILL");
        }
        let other = Node::new(&node.store);
        other.restored(&one, &key, 2).await;
        let socket = other.dir.path().join("redis");
        let restored = redis(&other.state_path(&one), &socket);
        let mut client = Client::connect(&socket).await;
        let last: u64 = client.get("last").parse().unwrap();
        assert!(last >= promised, "round {round}: {last} is the last, {promised} was acknowledged");
        // What was under way may be there as a whole, and nothing more.
        assert!(last <= promised + 1, "round {round}: {last} of {promised}");
        for n in 1..=last {
            assert_eq!(client.get(&format!("key:{n}")), n.to_string(), "round {round}");
        }
        assert_eq!(client.ask(&format!("EXISTS key:{}", last + 1), 1).unwrap(), [":0"], "round {round}");
        drop(restored);
    }
    drop(program);
    writer.join().unwrap();
}
