//! A host that remembers what it was asked, and hooks written in a line, for tests.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::json;

use super::*;
use crate::model::Secret;

/// Remembers calls; its secrets are all `s3cr3t`.
#[derive(Default)]
pub(super) struct FakeHost {
    calls: Mutex<Vec<String>>,
    timeouts_ms: Mutex<Vec<u64>>,
    logs: Mutex<Vec<(LogLevel, String, String)>>,
    outputs: Mutex<Vec<(String, Output)>>,
    files: Mutex<BTreeMap<String, Vec<u8>>>,
}

/// One workload with one hook, ready to be run.
pub(super) struct Trial {
    pub(super) hook: Hook,
    /// Lines of the spec's map beside id and image.
    pub(super) spec: String,
    /// Text of the shared script `lib`.
    pub(super) lib: Option<String>,
    pub(super) host: Arc<FakeHost>,
    pub(super) inline: bool,
}

// === impl FakeHost ===

impl FakeHost {
    fn called(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    pub(super) fn timeouts_ms(&self) -> Vec<u64> {
        self.timeouts_ms.lock().unwrap().clone()
    }

    pub(super) fn logs(&self) -> Vec<(LogLevel, String, String)> {
        self.logs.lock().unwrap().clone()
    }

    pub(super) fn outputs(&self) -> Vec<(String, Output)> {
        self.outputs.lock().unwrap().clone()
    }
}

#[async_trait]
impl Host for FakeHost {
    /// `false` fails, `hang` hangs, `wait` takes ten seconds, `panic` panics.
    async fn exec(&self, call: ExecCall) -> Result<ExecResult, HostError> {
        let stdin = call.stdin.map(|stdin| String::from_utf8_lossy(stdin.expose()).into_owned());
        self.called(format!("exec {:?} {:?} stdin={stdin:?}", call.argv, call.env));
        self.timeouts_ms.lock().unwrap().push(u64::try_from(call.timeout.as_millis()).unwrap());
        let result = |status, stdout: &str, stderr: &str| ExecResult {
            status,
            stdout: stdout.into(),
            stderr: stderr.into(),
            truncated: false,
        };
        match call.argv[0].as_str() {
            "false" => Ok(result(1, "", "oops")),
            "hang" => std::future::pending().await,
            "wait" => {
                tokio::time::sleep(Duration::from_secs(10)).await;
                Ok(result(0, "waited", ""))
            }
            "panic" => panic!("on purpose"),
            _ => Ok(result(0, &format!("{}\n", call.argv[1..].join(" ")), "")),
        }
    }

    async fn signal(&self, signal: &str) -> Result<(), HostError> {
        self.called(format!("signal {signal}"));
        Ok(())
    }

    async fn secret_write(&self, name: &str, secret: Secret) -> Result<(), HostError> {
        self.called(format!("secret_write {name} {}", String::from_utf8_lossy(secret.expose())));
        Ok(())
    }

    async fn secret_get_or_create(&self, name: &str, bytes: usize) -> Result<Secret, HostError> {
        self.called(format!("get_or_create {name} {bytes}"));
        Ok(Secret::new("s3cr3t"))
    }

    async fn state_read(&self, path: &str) -> Result<Vec<u8>, HostError> {
        if path == "huge" {
            return Ok(vec![b'x'; 2 * 1024 * 1024]);
        }
        let missing = || HostError { code: "not_found", message: format!("no {path}") };
        self.files.lock().unwrap().get(path).cloned().ok_or_else(missing)
    }

    async fn state_write(&self, path: &str, content: Secret) -> Result<(), HostError> {
        self.files.lock().unwrap().insert(path.to_owned(), content.expose().to_vec());
        Ok(())
    }

    async fn state_list(&self, _path: &str) -> Result<Vec<String>, HostError> {
        Ok(self.files.lock().unwrap().keys().cloned().collect())
    }

    async fn state_exists(&self, path: &str) -> Result<bool, HostError> {
        Ok(self.files.lock().unwrap().contains_key(path))
    }

    async fn state_remove(&self, path: &str) -> Result<(), HostError> {
        self.files.lock().unwrap().remove(path);
        Ok(())
    }

    fn set_output(&self, key: &str, value: Output) -> Result<(), HostError> {
        assert_ne!(key, "panic", "on purpose");
        self.outputs.lock().unwrap().push((key.to_owned(), value));
        Ok(())
    }

    fn log(&self, level: LogLevel, message: &str, fields: serde_json::Map<String, serde_json::Value>) {
        let fields = serde_json::Value::Object(fields).to_string();
        self.logs.lock().unwrap().push((level, message.to_owned(), fields));
    }

    fn now_ms(&self) -> u64 {
        1234
    }
}

/// Facts of a claim of tenant `acme`; without a slot before there is one.
pub(super) fn facts(hook: Hook) -> Facts {
    let metadata = json!({ "plan": "pro", "limits": { "seats": 3 } });
    let has_slot = hook != Hook::BeforeClaim;
    Facts {
        tenant: TenantFacts { id: "acme".to_owned(), metadata: metadata.as_object().unwrap().clone() },
        workload: WorkloadFacts { id: "w".to_owned(), name: "W".to_owned() },
        claim: has_slot.then(|| ClaimFacts {
            epoch: 7,
            source: "warm".to_owned(),
            state: "cache".to_owned(),
        }),
        container: has_slot.then(|| ContainerFacts {
            id: "c1".to_owned(),
            name: "boilerhouse-x-s1".to_owned(),
            slot: "s1".to_owned(),
            address: None,
        }),
    }
}

// === impl Trial ===

impl Trial {
    pub(super) fn of(hook: Hook) -> Self {
        Self { hook, spec: String::new(), lib: None, host: Arc::default(), inline: false }
    }

    /// Loads the workload with `body` in its hook, past the lint: what the lint
    /// finds must be found when it runs, too.
    pub(super) fn workload(&self, body: &str) -> Arc<Workload> {
        let import = if self.lib.is_some() { "import \"lib\" as lib;" } else { "" };
        let text = format!(
            "{import}\nfn workload() {{ #{{ id: \"w\", image: \"alpine\", {} }} }}\nfn {}(ctx) {{\n{body}\n}}\n\
             fn check(list) {{ for (ok, i) in list {{ if ok != true {{ throw `check ${{i}} failed`; }} }} }}\n",
            self.spec, self.hook
        );
        let sources = Sources {
            workloads: [("w".to_owned(), SourceFile::new("w.rhai", text))].into(),
            scripts: self
                .lib
                .iter()
                .map(|lib| ("lib".to_owned(), SourceFile::new("lib.rhai", lib.as_str())))
                .collect(),
            missing: Vec::new(),
        };
        set::Set::load_unlinted(&sources)
    }

    /// Runs `body` as the hook.
    pub(super) fn run(&self, body: &str) -> Result<Verdict, HookError> {
        let workload = self.workload(body);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let runner = Runner::new(RunnerOptions { inline: self.inline, ..RunnerOptions::default() });
        let host: SharedHost = self.host.clone();
        runtime.block_on(runner.run(&workload, self.hook, facts(self.hook), Some(host)))
    }

    /// Runs a body that calls `check` with a list of what must be true.
    pub(super) fn asserts(&self, body: &str) {
        assert!(body.contains("check("), "{body} checks something");
        match self.run(body) {
            Ok(verdict) => assert_eq!(verdict, Verdict::Default, "{body}"),
            Err(error) => panic!("{}", error.diagnostic),
        }
    }
}
