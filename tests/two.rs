//! Two real servers over one prefix of a real S3 server, each behind a gate of its own: P1
//! and P2 when one of them is cut off, killed, or superseded.

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Output, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{
    gate::Gate,
    live::{container, ensure_images, on_s3_at, on_server, workload},
    radosgw::Radosgw,
    s3_server::{BUCKET, S3Server},
    server::{Home, Server, below, docker, sh, wait_for},
};

const SOON: Duration = Duration::from_secs(120);

/// An installation, and its way to the store.
struct Site {
    home: Home,
    gate: Gate,
}

// === impl Site ===

impl Site {
    /// Makes an installation over `prefix` of the S3 server.
    async fn new(name: &str, prefix: &str, is_shared: bool) -> Self {
        let script = workload("worker", "pool: #{ min_idle: 2, max: 12 },");
        let mut home = Home::new(name, &[("worker", &script)]);
        on_s3_at(&mut home, prefix);
        let gate = Gate::open(&Radosgw::find().aws.endpoint_url.expect("a place")).await;
        home.set("AWS_ENDPOINT_URL", &gate.endpoint());
        home.set("BOILERHOUSE_STORE_SHARED", if is_shared { "true" } else { "false" });
        Self { home, gate }
    }

    fn name(&self) -> &str {
        self.home.instance()
    }

    /// Runs `boilerhouse state takeover`, with nobody at a terminal.
    fn take_over(&self, arguments: &[&str]) -> Output {
        let mut command = self.home.command("state");
        command.arg("takeover").args(arguments).stdin(Stdio::null());
        command.output().expect("the binary is built with the tests")
    }

    /// Removes this installation's containers: its machine is gone.
    fn remove_containers(&self) {
        for name in self.home.containers() {
            docker(&["rm", "--force", &name]);
        }
    }

    /// Returns whether a file on this node, below its state directory, has this content.
    fn keeps(&self, content: &str) -> bool {
        let states = self.home.path("states");
        below(&states)
            .iter()
            .any(|path| fs::read(states.join(path)).is_ok_and(|bytes| bytes == content.as_bytes()))
    }
}

/// Makes a prefix that no other test has.
fn prefix(site: &str) -> String {
    let random = tempfile::Builder::new().tempdir().expect("a temporary directory");
    let random = random.path().file_name().expect("a name").to_string_lossy().replace('.', "");
    format!("two-{site}-{}-{random}", std::process::id())
}

/// Claims until the server may.
async fn claim_at_last(server: &Server, tenant: &str) -> Value {
    let began = Instant::now();
    loop {
        let answer = server.post(&format!("/tenants/{tenant}/claim"), json!({ "wait_ms": 60000 })).await;
        if answer.status == 200 {
            return answer.body;
        }
        assert!(began.elapsed() < SOON, "claim of {tenant}: {answer:?}\n{}", server.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Claims and expects a refusal with this code.
async fn refused(server: &Server, tenant: &str, status: u16, code: &str) -> Value {
    let answer = server.post(&format!("/tenants/{tenant}/claim"), json!({})).await;
    assert_eq!((answer.status, &answer.body["code"]), (status, &json!(code)), "{answer:?}\n{}", server.log());
    answer.body
}

/// Returns how a server's claim of a tenant stands; null: there is none.
async fn state_of(server: &Server, tenant: &str) -> Value {
    server.get(&format!("/tenants/{tenant}/status")).await.body["claims"][0]["state"].clone()
}

fn write(claim: &Value, content: &str) {
    sh(&container(claim), &format!("printf %s '{content}' > /data/notes"));
}

fn read(claim: &Value) -> String {
    sh(&container(claim), "cat /data/notes 2>/dev/null || true")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_p2_a_store_passes_from_a_server_that_is_cut_off_and_it_publishes_nothing() {
    ensure_images().await;
    let prefix = prefix("one");
    let (first, second) =
        (Site::new("first", &prefix, false).await, Site::new("second", &prefix, false).await);
    let a = first.home.start().await;
    let claim = claim_at_last(&a, "acme").await;
    write(&claim, "one");
    a.release("acme", "durable").await;
    let claim = claim_at_last(&a, "acme").await;
    write(&claim, "cut off");

    let b = second.home.start().await;
    let problem = refused(&b, "acme", 503, "store_owned_elsewhere").await;
    assert!(problem.to_string().contains(first.name()), "{problem}");
    let reasons = b.get("/readyz").await.body.to_string();
    assert!(reasons.contains(first.name()) && reasons.contains("state takeover"), "{reasons}");

    first.gate.shut();
    a.release("acme", "pending").await;
    let asked = second.take_over(&[]);
    let words = text(&asked);
    assert_eq!(asked.status.code(), Some(1), "{words}");
    for word in [first.name(), second.name(), " UTC (", " ago)", "Nothing was changed"] {
        assert!(words.contains(word), "{word:?} is not in: {words}");
    }
    refused(&b, "acme", 503, "store_owned_elsewhere").await;
    let taken = second.take_over(&["--yes"]);
    assert!(taken.status.success() && text(&taken).contains("Done."), "{}", text(&taken));

    let claim = claim_at_last(&b, "acme").await;
    assert_eq!(read(&claim), "one");
    write(&claim, "two");
    // The old owner comes back to the store with what it has.
    first.gate.reopen();
    wait_for("the old owner finds its save in conflict", SOON, async || {
        state_of(&a, "acme").await == "conflict"
    })
    .await;
    wait_for("it knows that the store is not its own", SOON, async || {
        a.get("/readyz").await.body.to_string().contains("store owner")
    })
    .await;
    refused(&a, "acme", 503, "store_owned_elsewhere").await;
    refused(&a, "new", 503, "store_owned_elsewhere").await;
    assert!(first.keeps("cut off"), "its tree is kept");
    b.release("acme", "durable").await;
    let claim = claim_at_last(&b, "acme").await;
    assert_eq!(read(&claim), "two", "nothing of the old owner came between");

    // The new owner dies with a claim, and what it saved is there for whoever has the store.
    let other = claim_at_last(&b, "other").await;
    write(&other, "saved");
    b.release("other", "durable").await;
    b.kill();
    refused(&a, "other", 503, "store_owned_elsewhere").await;
    let b = second.home.start().await;
    assert_eq!(claim_at_last(&b, "acme").await["source"], "existing", "the same identity goes on");
    b.kill();
    second.remove_containers();
    let taken = first.take_over(&["--yes"]);
    assert!(taken.status.success() && text(&taken).contains(second.name()), "{}", text(&taken));
    let claim = claim_at_last(&a, "other").await;
    assert_eq!(read(&claim), "saved");
    let problem = refused(&a, "acme", 409, "state_conflict").await;
    assert!(problem.to_string().contains("acme"), "{problem}");
    assert!(first.keeps("cut off"), "an operator decides");
    // And a restart forgets neither.
    a.kill();
    let a = first.home.start().await;
    assert_eq!(state_of(&a, "acme").await, "conflict");
    a.release("other", "durable").await;
}

/// Who has which tenant, as the servers' answers say it, and what was written last.
#[derive(Default)]
struct Ledger {
    holders: BTreeMap<String, &'static str>,
    written: BTreeMap<String, String>,
    turns: BTreeMap<&'static str, u32>,
}

/// Claims, reads, writes and releases a tenant on one server, over and over.
async fn play(
    name: &'static str,
    server: &Server,
    tenant: String,
    ledger: &Mutex<Ledger>,
    over: &AtomicBool,
) {
    let mut turn = 0;
    while !over.load(Ordering::Relaxed) {
        let answer = server.post(&format!("/tenants/{tenant}/claim"), json!({ "wait_ms": 20000 })).await;
        if answer.status != 200 {
            let code = answer.body["code"].as_str().unwrap_or_default();
            let passing = ["claimed_elsewhere", "store_unavailable", "busy", "pool_exhausted"];
            assert!(passing.contains(&code), "{name}: {answer:?}\n{}", server.log());
            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        }
        let found = read(&answer.body);
        turn += 1;
        let content = format!("{name} {turn}");
        {
            let mut ledger = ledger.lock().expect("no test panics with it");
            let other = ledger.holders.insert(tenant.clone(), name);
            assert_eq!(other, None, "{tenant} is served by {name}, too");
            let written = ledger.written.insert(tenant.clone(), content.clone()).unwrap_or_default();
            assert_eq!(found, written, "{name} serves {tenant} a state that is not the newest");
            *ledger.turns.entry(name).or_default() += 1;
        }
        write(&answer.body, &content);
        // From now on it may be another's.
        ledger.lock().expect("no test panics with it").holders.remove(&tenant);
        let released =
            server.post(&format!("/tenants/{tenant}/release"), json!({ "wait": "accepted" })).await;
        assert_eq!(released.status, 200, "{name}: {released:?}\n{}", server.log());
        // Another one may be faster now and then.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_p2_of_two_servers_that_share_a_store_one_serves_a_tenant_whatever_is_cut_off() {
    ensure_images().await;
    let prefix = prefix("shared");
    let (first, second) = (Site::new("left", &prefix, true).await, Site::new("right", &prefix, true).await);
    let (a, b) = (first.home.start().await, second.home.start().await);
    let claim = claim_at_last(&a, "acme").await;
    write(&claim, "one");
    let problem = refused(&b, "acme", 409, "claimed_elsewhere").await;
    assert!(problem.to_string().contains(first.name()), "{problem}");
    // A claim outlives its server's process: it is still that server's.
    a.kill();
    refused(&b, "acme", 409, "claimed_elsewhere").await;
    let a = first.home.start().await;
    assert_eq!(claim_at_last(&a, "acme").await["source"], "existing");
    a.release("acme", "durable").await;
    let claim = claim_at_last(&b, "acme").await;
    assert_eq!(read(&claim), "one");
    b.release("acme", "durable").await;

    // Both want the same tenants, while now one and then the other is cut off from the store.
    let (ledger, over) = (Mutex::new(Ledger::default()), AtomicBool::new(false));
    let players = async {
        let tenants = || (0..3).map(|n| format!("t{n}"));
        let left = tenants().map(|tenant| play("left", &a, tenant, &ledger, &over));
        let right = tenants().map(|tenant| play("right", &b, tenant, &ledger, &over));
        tokio::join!(futures_util::future::join_all(left), futures_util::future::join_all(right));
    };
    let cuts = async {
        let turns = |name: &str| ledger.lock().expect("no test panics with it").turns.get(name).copied();
        for round in 0..6_u32 {
            let (cut, other) = if round % 2 == 0 { (&first.gate, "right") } else { (&second.gate, "left") };
            // In the midst of claims and releases, at another moment each time.
            tokio::time::sleep(Duration::from_millis(300 + 370 * u64::from(round))).await;
            cut.shut();
            let before = turns(other);
            let began = Instant::now();
            // Tenants whose end of a claim cannot be written stay with the one that is cut off.
            while turns(other) == before && began.elapsed() < Duration::from_secs(4) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            cut.reopen();
            let before = (turns("left"), turns("right"));
            wait_for("both serve again", SOON, async || {
                turns("left") > before.0 && turns("right") > before.1
            })
            .await;
        }
        over.store(true, Ordering::Relaxed);
    };
    tokio::join!(players, cuts);
    let ledger = ledger.into_inner().expect("no test panics with it");
    for (tenant, written) in &ledger.written {
        wait_for("the last release is in the store", SOON, async || {
            state_of(&a, tenant).await.is_null() && state_of(&b, tenant).await.is_null()
        })
        .await;
        let claim = claim_at_last(&a, tenant).await;
        assert_eq!(&read(&claim), written);
        a.release(tenant, "durable").await;
    }

    // One is cut off with a claim, and an operator says that it is gone.
    let claim = claim_at_last(&a, "acme").await;
    write(&claim, "stale");
    first.gate.shut();
    refused(&b, "acme", 409, "claimed_elsewhere").await;
    let unknown = second.take_over(&["--from", "nobody", "--yes"]);
    assert!(!unknown.status.success() && text(&unknown).contains(first.name()), "{}", text(&unknown));
    let taken = second.take_over(&["--from", first.name(), "--yes"]);
    assert!(taken.status.success(), "{}", text(&taken));
    let claim = claim_at_last(&b, "acme").await;
    assert_eq!(read(&claim), "one");
    write(&claim, "two");
    first.gate.reopen();
    let released = a.post("/tenants/acme/release", json!({})).await;
    if released.status == 409 {
        assert_eq!(released.body["code"], "state_conflict", "{released:?}");
    } else {
        assert_eq!(released.body["state"], "pending", "{released:?}");
    }
    wait_for("its save is in conflict", SOON, async || state_of(&a, "acme").await == "conflict").await;
    assert!(first.keeps("stale"), "its tree is kept");
    b.release("acme", "durable").await;
    let claim = claim_at_last(&b, "acme").await;
    assert_eq!(read(&claim), "two");
    b.release("acme", "durable").await;
}

/// A store that takes a condition and ignores it cannot be shared, and the server says so
/// before it does anything; for one server it is a warning.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_ignores_conditions_is_refused_for_sharing_and_warned_of_otherwise() {
    ensure_images().await;
    let server = S3Server::start().await;
    server.ignore_conditions(true);
    let mut home = Home::new("ignores", &[("worker", &workload("worker", ""))]);
    on_server(&mut home, &server.aws());
    home.set("BOILERHOUSE_STORE", &format!("s3://{BUCKET}/ignores"));
    home.set("BOILERHOUSE_STORE_SHARED", "true");
    let mut refused = home
        .command("serve")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(home.path("refused")).expect("a file"))
        .spawn()
        .expect("the binary is built with the tests");
    let mut status = None;
    wait_for("the server ends", SOON, async || {
        status = refused.try_wait().expect("the child's status");
        status.is_some()
    })
    .await;
    let words = fs::read_to_string(home.path("refused")).expect("what it said");
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{words}");
    for word in ["BOILERHOUSE_STORE_SHARED", "cannot be shared", "If-None-Match"] {
        assert!(words.contains(word), "{word:?} is not in: {words}");
    }
    home.set("BOILERHOUSE_STORE_SHARED", "false");
    let alone = home.start().await;
    let claim = claim_at_last(&alone, "acme").await;
    write(&claim, "kept");
    alone.release("acme", "durable").await;
    wait_for("the log warns", SOON, async || {
        let log = fs::read_to_string(home.path("log")).expect("the log");
        log.lines().any(|line| line.contains("\"WARN\"") && line.contains("store ignores conditions"))
    })
    .await;
    alone.stop().await;
    server.ignore_conditions(false);
    home.set("BOILERHOUSE_STORE_SHARED", "true");
    let shared = home.start().await;
    assert_eq!(read(&claim_at_last(&shared, "acme").await), "kept");
}

/// On a terminal the takeover asks, and only `yes` is consent.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_asks_for_consent_on_a_terminal() {
    let first = Home::new("gone", &[]);
    let mut second = Home::new("asks", &[]);
    let store = first.path("store");
    second.set("BOILERHOUSE_STORE", &format!("file://{}", store.display()));
    hold(&store, first.instance()).await;
    for (typed, is_done) in [("no\n", false), ("\n", false), ("y\n", false), ("yes\n", true)] {
        let words = at_a_terminal(&second, typed);
        assert!(words.contains(first.instance()) && words.contains("Type yes to do it"), "{words}");
        assert_eq!(words.contains("Done."), is_done, "{typed:?}: {words}");
        assert_eq!(words.contains("Nothing was changed."), !is_done, "{typed:?}: {words}");
    }
    let again = second.command("state").args(["takeover", "--yes"]).output().expect("it runs");
    let words = text(&again);
    assert!(again.status.success() && words.contains("held by no other server"), "{words}");
}

/// Takes a store of a directory as a server does.
async fn hold(store: &Path, server: &str) {
    use boilerhouse::{
        clock::{Clock as _, SystemClock},
        state::fence::{Mode, owner},
        store::LocalStore,
    };
    let store = LocalStore::open(store.to_owned()).expect("the store opens");
    let since_ms = SystemClock.unix_ms() - 3_661_000;
    owner::take(&store, server, Mode::Exclusive, "nonce", since_ms).await.expect("it is free");
}

/// Runs `state takeover` on a terminal of its own, where somebody types.
fn at_a_terminal(home: &Home, typed: &str) -> String {
    use std::io::Write as _;

    let takeover = home.command("state");
    let program = takeover.get_program().to_string_lossy().into_owned();
    let mut terminal = std::process::Command::new("script");
    terminal
        .args(["--quiet", "--return", "--command", &format!("{program} state takeover"), "/dev/null"])
        .env_clear()
        .env("SHELL", "/bin/sh")
        .envs(takeover.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut terminal = terminal.spawn().expect("script(1) of util-linux is there");
    let mut keyboard = terminal.stdin.take().expect("it is piped");
    keyboard.write_all(typed.as_bytes()).expect("it is read");
    let output = terminal.wait_with_output().expect("it ends");
    drop(keyboard);
    text(&output)
}
