//! A real server process for tests: its directories, its environment, its log.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// How long a server may take to say where it listens, and to be ready.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Everything a server keeps on disk; survives the server, not the test.
pub struct Home {
    dir: tempfile::TempDir,
    instance: String,
    env: BTreeMap<String, String>,
}

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    /// `http://127.0.0.1:PORT`
    pub url: String,
    log: PathBuf,
    client: reqwest::Client,
}

/// The answer to a request: status and body.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

// === impl Home ===

impl Home {
    /// Makes the directories of an installation named `test-<name>-<random>`, with
    /// these workloads by id.
    pub fn new(name: &str, workloads: &[(&str, &str)]) -> Self {
        let dir =
            tempfile::Builder::new().prefix("boilerhouse-test-").tempdir().expect("a temporary directory");
        let random: String =
            dir.path().to_string_lossy().chars().rev().take(5).collect::<String>().to_lowercase();
        let random: String =
            random.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '0' }).collect();
        for folder in ["workloads", "scripts"] {
            fs::create_dir(dir.path().join(folder)).expect("a fresh directory");
        }
        for (id, script) in workloads {
            fs::write(dir.path().join(format!("workloads/{id}.rhai")), script).expect("a workload file");
        }
        let mut home = Self { instance: format!("test-{name}-{random}"), env: BTreeMap::new(), dir };
        for (variable, folder) in [
            ("STATE_DIR", "states"),
            ("SECRETS_DIR", "secrets"),
            ("SOCKET_DIR", "sockets"),
            ("WORKLOADS_DIR", "workloads"),
            ("SCRIPTS_DIR", "scripts"),
        ] {
            let path = home.path(folder).display().to_string();
            home.env.insert(format!("BOILERHOUSE_{variable}"), path);
        }
        let store = format!("file://{}", home.path("store").display());
        home.set("BOILERHOUSE_STORE", &store);
        home.set("BOILERHOUSE_API_PORT", "0");
        home.set("BOILERHOUSE_POOL_SIZE", "1");
        let instance = home.instance.clone();
        home.set("BOILERHOUSE_INSTANCE", &instance);
        home
    }

    /// Sets a variable of the server's environment.
    pub fn set(&mut self, variable: &str, value: &str) {
        self.env.insert(variable.to_owned(), value.to_owned());
    }

    /// Removes a variable of the server's environment.
    pub fn unset(&mut self, variable: &str) {
        self.env.remove(variable);
    }

    /// Returns a path below the installation's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the installation's identity.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Starts a server and waits until it is ready.
    pub async fn start(&self) -> Server {
        let server = self.launch().await;
        server.ready().await;
        server
    }

    /// Starts a server and waits until it listens.
    pub async fn launch(&self) -> Server {
        let log = self.path("log");
        let file = File::options().create(true).append(true).open(&log).expect("a log file");
        let before = fs::metadata(&log).map_or(0, |meta| meta.len());
        let child = self
            .command("serve")
            .env("RUST_LOG", "boilerhouse=debug,script=debug,info")
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second handle"))
            .stderr(file)
            .spawn()
            .expect("the server's binary is built with the tests");
        let client = reqwest::Client::builder().timeout(Duration::from_secs(120)).build().expect("a client");
        let mut server = Server { child, url: String::new(), log, client };
        let began = Instant::now();
        loop {
            let text =
                String::from_utf8_lossy(&fs::read(&server.log).expect("the log")).chars().collect::<String>();
            let text =
                text.get(usize::try_from(before).expect("a small log")..).unwrap_or_default().to_owned();
            if let Some(address) = listening(&text) {
                server.url = format!("http://{address}");
                return server;
            }
            if let Some(status) = server.child.try_wait().expect("the child's status") {
                panic!("the server ended with {status}:\n{text}");
            }
            assert!(began.elapsed() < START_LIMIT, "the server does not listen:\n{text}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Makes a command of the binary, with this installation's environment and directory.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_boilerhouse"));
        command
            .arg(name)
            .env_clear()
            .env("PATH", std::env::var("PATH").unwrap_or_default())
            .envs(&self.env)
            .current_dir(self.dir.path());
        command
    }

    /// Returns the names of this installation's containers, running or not.
    pub fn containers(&self) -> Vec<String> {
        let filter = format!("label=boilerhouse.instance={}", self.instance);
        docker(&["ps", "--all", "--format", "{{.Names}}", "--filter", &filter])
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Home {
    /// Removes this installation's containers, whatever the test has done.
    fn drop(&mut self) {
        for name in self.containers() {
            let _ = Command::new("docker").args(["rm", "--force", &name]).output();
        }
    }
}

// === impl Server ===

impl Server {
    /// Waits until `/readyz` does not say `starting`.
    pub async fn ready(&self) {
        wait_for("the server is ready", START_LIMIT, async || self.get("/readyz").await.status == 200).await;
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.client.get(format!("{}{path}", self.url))).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(self.client.post(format!("{}{path}", self.url)).json(&body)).await
    }

    pub async fn put(&self, path: &str, body: Value) -> Answer {
        self.send(self.client.put(format!("{}{path}", self.url)).json(&body)).await
    }

    /// Posts and tells a broken connection (the server was killed) from an answer.
    pub async fn try_post(&self, path: &str, body: Value) -> Option<Answer> {
        let response = self.client.post(format!("{}{path}", self.url)).json(&body).send().await.ok()?;
        let status = response.status().as_u16();
        Some(Answer { status, body: response.json().await.ok()? })
    }

    /// Claims and expects success.
    pub async fn claim(&self, tenant: &str, body: Value) -> Value {
        let answer = self.post(&format!("/tenants/{tenant}/claim"), body).await;
        assert_eq!(answer.status, 200, "claim of {tenant}: {answer:?}\n{}", self.log());
        answer.body
    }

    /// Releases and expects this state.
    pub async fn release(&self, tenant: &str, state: &str) -> Value {
        let answer = self.post(&format!("/tenants/{tenant}/release"), serde_json::json!({})).await;
        assert_eq!(answer.status, 200, "release of {tenant}: {answer:?}\n{}", self.log());
        assert_eq!(answer.body["state"], state, "release of {tenant}: {answer:?}\n{}", self.log());
        answer.body
    }

    /// Kills the server with SIGKILL.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks the server to stop and waits for its end.
    pub async fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .expect("our child can be signalled");
        wait_for("the server ends", Duration::from_secs(90), async || {
            self.child.try_wait().expect("the child's status").is_some()
        })
        .await;
    }

    /// Returns whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the child's status").is_some()
    }

    /// Returns the end of the log.
    pub fn log(&self) -> String {
        let text = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = request.send().await.unwrap_or_else(|error| panic!("{error:?}\n{}", self.log()));
        let status = response.status().as_u16();
        let text = response.text().await.expect("a body");
        Answer { status, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a condition; panics with its name when it does not come.
pub async fn wait_for(what: &str, limit: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < limit, "waited {limit:?} in vain until {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// Runs the engine's client and returns what it prints; panics when it fails.
pub fn docker(args: &[&str]) -> String {
    let output = Command::new("docker").args(args).output().expect("docker is installed (see `make setup`)");
    assert!(output.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// Runs a shell script in a container as its own user and returns what it prints.
pub fn sh(container: &str, script: &str) -> String {
    docker(&["exec", container, "/bin/sh", "-ec", script])
}

/// Lists what is below a directory, for comparing: relative paths, sorted.
pub fn below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(next) = left.pop() {
        let Ok(entries) = fs::read_dir(&next) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            found.push(path.strip_prefix(dir).expect("it is below").display().to_string());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Finds the address in the line that says where the server listens.
fn listening(log: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains("\"listening\""))?;
    let event: Value = serde_json::from_str(line).ok()?;
    event["address"].as_str().map(str::to_owned)
}
