//! The workloads that are shipped in `workloads/`, each run by a real server on a real
//! engine as it stands there; only the image is a local one with the same content.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use support::{
    debian,
    engine::with_engine,
    images,
    server::{Home, Server, sh, wait_for},
};

const SOON: Duration = Duration::from_secs(60);

/// Each shipped workload, its public image, and what stands for that here.
const SHIPPED: [(&str, &str, &str); 3] = [
    ("http-worker", "python:3.12-alpine", debian::PYTHON),
    ("redis", "redis:7-alpine", debian::REDIS),
    ("shell-sandbox", "alpine:3.20", images::BUSYBOX),
];

fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Makes an installation with one shipped workload, and the shipped scripts.
fn home(id: &str) -> Home {
    let (_, public, local) = SHIPPED.into_iter().find(|row| row.0 == id).expect("it is shipped");
    let path = package().join(format!("workloads/{id}.rhai"));
    let shipped = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let image = format!("image: \"{public}\"");
    assert_eq!(shipped.matches(&image).count(), 1, "{id}.rhai has one {image}");
    let home = Home::new(id, &[(id, &shipped.replace(&image, &format!("image: \"{local}\"")))]);
    let scripts = home.path("scripts/lib");
    fs::create_dir(&scripts).expect("a fresh directory");
    for entry in fs::read_dir(package().join("scripts/lib")).expect("the shipped scripts").flatten() {
        fs::copy(entry.path(), scripts.join(entry.file_name())).expect("a script can be copied");
    }
    home
}

fn container(claim: &Value) -> String {
    claim["container"]["name"].as_str().expect("a claim names its container").to_owned()
}

/// Returns everything that a container's program has printed.
fn printed(container: &str) -> String {
    let output = Command::new("docker").args(["logs", container]).output().expect("docker runs");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// Claims on a container that was ready before.
async fn warm_claim(server: &Server, tenant: &str, body: Value) -> Value {
    wait_for("a container is ready", SOON, async || {
        let pool = &server.get("/pools").await.body[0];
        assert_eq!(pool["last_error"], Value::Null, "no container could be made");
        pool["ready"].as_u64() >= Some(1)
    })
    .await;
    let claim = server.claim(tenant, body).await;
    assert_eq!(claim["source"], "warm", "{claim}");
    claim
}

/// Checks that the server and the scripts have not complained.
fn nothing_went_wrong(home: &Home) {
    let log = fs::read_to_string(home.path("log")).expect("the log");
    let complaints: Vec<_> = log.lines().filter(|line| line.contains("\"ERROR\"")).collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

/// Waits for the end of containers, from before they can have ended.
struct Endings {
    client: Child,
    ended: mpsc::Receiver<String>,
}

impl Endings {
    fn of(container: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs();
        let mut client = Command::new("docker")
            .args(["events", "--since", &now.to_string(), "--filter", "event=die"])
            .args(["--filter", &format!("container={container}")])
            .args(["--format", "{{.Actor.Attributes.exitCode}}"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("docker runs");
        let lines = BufReader::new(client.stdout.take().expect("it is piped")).lines();
        let (tx, ended) = mpsc::channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| tx.send(line)));
        Self { client, ended }
    }

    /// Returns the status that the container ended with.
    fn status(&self) -> String {
        self.ended.recv_timeout(SOON).expect("the container ends")
    }
}

impl Drop for Endings {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

#[test]
fn every_shipped_workload_is_tested_here() {
    let listed = fs::read_dir(package().join("workloads")).expect("the shipped workloads").flatten();
    let found: BTreeSet<_> = listed.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(found, SHIPPED.map(|(id, _, _)| format!("{id}.rhai")).into());
}

#[test]
fn check_finds_nothing_in_the_shipped_files() {
    let all = SHIPPED.map(|(id, _, _)| format!("workloads/{id}.rhai"));
    for files in [&all[..0], &all[..]] {
        let output = Command::new(env!("CARGO_BIN_EXE_boilerhouse"))
            .arg("check")
            .args(files)
            .current_dir(package())
            .env_clear()
            .output()
            .expect("the binary is built with the tests");
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{files:?}: {said}");
        assert_eq!(said, "no errors\n", "{files:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_finds_its_data_in_another_container() {
    with_engine(|engine| async move {
        debian::ensure_redis(&engine.raw).await;
        let home = home("redis");
        let server = home.start().await;
        let redis = |claim: &Value, command: &str| sh(&container(claim), &format!("redis-cli -e {command}"));
        let calls = |claim: &Value| -> BTreeMap<String, u64> {
            let stats = redis(claim, "INFO commandstats");
            let counted = stats.lines().filter_map(|line| {
                let (name, rest) = line.trim_end().strip_prefix("cmdstat_")?.split_once(":calls=")?;
                Some((name.to_owned(), rest.split(',').next()?.parse().ok()?))
            });
            counted.collect()
        };

        let first = warm_claim(&server, "acme", json!({})).await;
        // Nobody here pings or configures: those are the health check and the activation.
        let counted = calls(&first);
        assert!(counted.get("ping").is_some_and(|calls| *calls >= 1), "{counted:?}");
        assert_eq!(counted.get("config|set"), Some(&1), "{counted:?}");
        assert_eq!(counted.get("debug"), None, "there was nothing to load: {counted:?}");
        assert_eq!(redis(&first, "CONFIG GET save"), "save\n60 1");
        assert_eq!(redis(&first, "DBSIZE"), "0");
        assert_eq!(redis(&first, "SET greeting hello"), "OK");
        // Ending, it saves nothing now: what is there again was saved by the hook.
        assert_eq!(redis(&first, "CONFIG SET save ''"), "OK");
        server.release("acme", "durable").await;

        let second = warm_claim(&server, "acme", json!({})).await;
        assert_ne!(container(&second), container(&first));
        assert_eq!(redis(&second, "GET greeting"), "hello", "{}", server.log());
        let counted = calls(&second);
        assert_eq!(counted.get("debug"), Some(&1), "the activation loaded it: {counted:?}");
        assert_eq!(counted.get("config|set"), Some(&1), "{counted:?}");

        let other = warm_claim(&server, "other", json!({})).await;
        assert_eq!(redis(&other, "DBSIZE"), "0");
        assert_eq!(redis(&other, "EXISTS greeting"), "0");

        // What was overwritten stays so, and so does what was deleted.
        redis(&second, "SET greeting goodbye");
        server.release("acme", "durable").await;
        let third = warm_claim(&server, "acme", json!({})).await;
        assert_eq!(redis(&third, "GET greeting"), "goodbye");
        redis(&third, "DEL greeting");
        server.release("acme", "durable").await;
        let fourth = warm_claim(&server, "acme", json!({})).await;
        assert_eq!(redis(&fourth, "DBSIZE"), "0");
        nothing_went_wrong(&home);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_worker_serves_the_pages_of_its_tenant() {
    with_engine(|engine| async move {
        debian::ensure_python(&engine.raw).await;
        let home = home("http-worker");
        let server = home.start().await;
        let fetch = |claim: &Value| sh(&container(claim), "wget -q -O - http://127.0.0.1:8080/");

        let title = json!({ "metadata": { "title": "Fish & <b>chips</b>" } });
        let first = warm_claim(&server, "acme", title).await;
        let escaped = "Fish &amp; &lt;b&gt;chips&lt;/b&gt;";
        let page = format!("<!doctype html><title>{escaped}</title><h1>{escaped}</h1>");
        assert_eq!(fetch(&first), page);
        assert_eq!(sh(&container(&first), "id -u"), "65534");
        sh(&container(&first), "echo changed > /data/index.html");
        server.release("acme", "durable").await;

        let second = warm_claim(&server, "acme", json!({})).await;
        assert_ne!(container(&second), container(&first));
        // Nobody else has asked yet: it is the health check that was answered.
        let requests = printed(&container(&second));
        assert!(requests.lines().any(|line| line.contains("\"GET / HTTP/1.1\" 200")), "{requests}");
        assert_eq!(fetch(&second), "changed");

        let untitled = warm_claim(&server, "other", json!({})).await;
        assert_eq!(fetch(&untitled), "<!doctype html><title>other</title><h1>other</h1>");

        let suspended = json!({ "metadata": { "plan": "suspended" } });
        let refused = server.post("/tenants/bad/claim", suspended).await;
        assert_eq!((refused.status, &refused.body["code"]), (403, &json!("tenant_suspended")), "{refused:?}");
        let maintained = json!({ "metadata": { "maintenance": true } });
        let later = server.post("/tenants/bad/claim", maintained).await;
        assert_eq!((later.status, &later.body["retry_after_ms"]), (429, &json!(60_000)), "{later:?}");
        nothing_went_wrong(&home);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shell_sandbox_keeps_its_key_and_its_files() {
    with_engine(|_| async move {
        let mut home = home("shell-sandbox");
        let key: PathBuf = home.path("master.key");
        fs::write(&key, "42".repeat(32)).expect("a key file");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("it is ours");
        home.set("BOILERHOUSE_MASTER_KEY_FILE", &key.display().to_string());
        let server = home.start().await;

        let first = warm_claim(&server, "acme", json!({ "metadata": { "name": "Ada" } })).await;
        assert_eq!(first["outputs"]["key_file"], "/secrets/session_key", "{first}");
        let motd = "Hello, Ada.\nYour files are in /data and are kept. Your key is in /secrets/session_key.";
        assert_eq!(sh(&container(&first), "cat /data/motd"), motd);
        assert_eq!(sh(&container(&first), "cd ~; pwd; id -u; id -g"), "/data\n1000\n1000");
        let secret = sh(&container(&first), "cat /secrets/session_key");
        assert!(secret.len() >= 32, "{} characters", secret.len());
        sh(&container(&first), "echo 'echo hi' > ~/run; chmod 700 ~/run");

        // It answers the signal by itself: a kill would have ended it with 137.
        let endings = Endings::of(&container(&first));
        server.release("acme", "durable").await;
        assert_eq!(endings.status(), "0", "{}", server.log());

        let second = warm_claim(&server, "acme", json!({})).await;
        assert_ne!(container(&second), container(&first));
        assert_eq!(sh(&container(&second), "cat /secrets/session_key"), secret);
        assert_eq!(sh(&container(&second), "stat -c %a ~/run; sh ~/run"), "700\nhi");

        let other = warm_claim(&server, "other", json!({})).await;
        assert_ne!(sh(&container(&other), "cat /secrets/session_key"), secret);
        assert_eq!(sh(&container(&other), "ls -A ~"), "motd");

        let suspended = json!({ "metadata": { "plan": "suspended" } });
        let refused = server.post("/tenants/bad/claim", suspended).await;
        assert_eq!((refused.status, &refused.body["code"]), (403, &json!("tenant_suspended")), "{refused:?}");
        nothing_went_wrong(&home);
    })
    .await;
}

/// Redis with an append-only file, which it reads when it starts: so it starts when the
/// claim says so.
const APPENDING: &str = r#"//! Redis that writes every command down before it answers.
fn workload() {
    #{
        id: "appending",
        image: "IMAGE",
        command: ["sh", "-c", "until [ -e /tmp/claimed ]; do sleep 0.02; done; exec redis-server --dir /data --save '' \
            --appendonly yes --appendfsync always --auto-aof-rewrite-min-size 64kb --auto-aof-rewrite-percentage 30"],
        user: "redis",
        volumes: #{ state: #{ container_path: "/data", mode: "rw" } },
        activation: #{ exec: ["touch", "/tmp/claimed"] },
        resources: #{ cpus: 0.5, memory_mb: 256, pids: 64 },
        pool: #{ min_idle: 1, max: 4 },
        persist: #{ every_ms: 0 },
    }
}
"#;

/// Sends Redis one write after the other, and counts what it acknowledges.
struct Writer {
    client: Child,
    acknowledged: Arc<AtomicU64>,
}

impl Writer {
    /// Writes the keys after number `from`.
    fn of(container: &str, from: u64) -> Self {
        let script = format!(
            "i={from}; v=$(head -c 2000 /dev/zero | tr '\\0' x); \
             while :; do i=$((i+1)); echo \"SET key:$i $i$v\"; done | redis-cli"
        );
        let mut client = Command::new("docker")
            .args(["exec", container, "/bin/sh", "-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("docker runs");
        let lines = BufReader::new(client.stdout.take().expect("it is piped")).lines();
        let acknowledged = Arc::new(AtomicU64::new(from));
        let counter = Arc::clone(&acknowledged);
        std::thread::spawn(move || {
            for _ in lines.map_while(Result::ok).take_while(|line| line == "OK") {
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { client, acknowledged }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits until so many more are.
    async fn more(&self, more: u64) -> u64 {
        let least = self.acknowledged() + more;
        wait_for("Redis has acknowledged more", SOON, async || self.acknowledged() >= least).await;
        self.acknowledged()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_acknowledged_before_a_checkpoint_survives_the_loss_of_the_node() {
    with_engine(|engine| async move {
        debian::ensure_redis(&engine.raw).await;
        let home = Home::new("appending", &[("appending", &APPENDING.replace("IMAGE", debian::REDIS))]);
        let mut least = 0;
        for round in 0..3 {
            let server = home.start().await;
            let claim = warm_claim(&server, "acme", json!({})).await;
            assert_eq!(claim["state"]["source"], if round == 0 { "none" } else { "store" });
            let name = container(&claim);
            let redis = |command: &str| sh(&name, &format!("redis-cli -e {command}"));
            wait_for("Redis answers", SOON, async || {
                let script = ["exec", &name, "redis-cli", "-e", "ping"];
                Command::new("docker").args(script).output().is_ok_and(|output| output.status.success())
            })
            .await;
            // What was acknowledged when the last checkpoint began, and no hole in it.
            let size: u64 = redis("DBSIZE").parse().expect("a number");
            assert!(size >= least, "round {round}: {size} keys, {least} were acknowledged\n{}", server.log());
            let missing = "for n = 1, ARGV[1] do local v = redis.call('GET', 'key:' .. n) \
                           if not v or string.len(v) ~= 2000 + string.len(n) then return n end end return 0";
            if size > 0 {
                assert_eq!(redis(&format!("EVAL \"{missing}\" 0 {size}")), "0", "round {round}");
            }
            let writer = Writer::of(&name, size);
            for _ in 0..3 {
                least = writer.more(50).await;
                let synced = server.post("/tenants/acme/sync", json!({})).await;
                assert_eq!(synced.status, 200, "{synced:?}\n{}", server.log());
            }
            writer.more(50).await;
            nothing_went_wrong(&home);
            // Server, container and disk are lost at once.
            server.kill();
            for name in home.containers() {
                support::server::docker(&["rm", "--force", &name]);
            }
            drop(writer);
            fs::remove_dir_all(home.path("states")).expect("the state directory can be removed");
        }
    })
    .await;
}
