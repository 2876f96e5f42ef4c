//! Workload scripts from the outside: what is shipped works, what is wrong is
//! named with its place, and a set is loaded whole or not at all.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[path = "scripts/mistakes.rs"]
mod mistakes;

use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use boilerhouse::{
    model::{Secret, WorkloadId, spec::Network},
    script::{
        ClaimFacts, ContainerFacts, Diagnostic, ExecCall, ExecResult, Facts, Hook, Host, HostError,
        LoadOptions, LogLevel, Output, Runner, RunnerOptions, Set, SharedHost, SourceFile, Sources,
        TenantFacts, Verdict, Workload, WorkloadFacts, check,
    },
};
use serde_json::json;

/// Loads one workload `w` and, if given, the shared script `lib/x`.
fn load(text: &str, lib: Option<&str>) -> Result<Set, Vec<Diagnostic>> {
    let sources = Sources {
        workloads: [("w".to_owned(), SourceFile::new("workloads/w.rhai", text))].into(),
        scripts: lib
            .map(|lib| ("lib/x".to_owned(), SourceFile::new("scripts/lib/x.rhai", lib)))
            .into_iter()
            .collect(),
        missing: Vec::new(),
    };
    Set::load(&sources, &LoadOptions::default())
}

/// A workload file with these hooks below a spec that is right.
fn with_hooks(hooks: &str) -> String {
    format!("fn workload() {{ #{{ id: \"w\", image: \"alpine\" }} }}\n{hooks}")
}

/// A workload file with these further fields in its spec, from line 4 on.
fn with_fields(fields: &str) -> String {
    format!("fn workload() {{\n  #{{\n    id: \"w\", image: \"alpine\",\n{fields}\n  }}\n}}\n")
}

#[test]
fn all_errors_of_all_files_are_reported_in_order() {
    let sources = Sources {
        workloads: [
            (
                "a".to_owned(),
                SourceFile::new(
                    "a.rhai",
                    "fn workload() { #{ id: \"a\", image: \"\", bogus: 1 } }\nfn on_clam(c) { }",
                ),
            ),
            ("b".to_owned(), SourceFile::new("b.rhai", "fn workload( {")),
        ]
        .into(),
        scripts: [("x".to_owned(), SourceFile::new("x.rhai", "let y = nothing();"))].into(),
        missing: Vec::new(),
    };
    let errors = Set::load(&sources, &LoadOptions::default()).unwrap_err();
    let places: Vec<_> = errors.iter().map(Diagnostic::place).collect();
    assert_eq!(
        places,
        ["a.rhai:1:29", "a.rhai:1:40", "a.rhai:2:1", "b.rhai:1:14", "x.rhai:1:1", "x.rhai:1:9"]
    );
}

#[test]
fn scripts_that_import_each_other_are_refused() {
    let script = |text: &str| SourceFile::new("s.rhai", text);
    let sources = Sources {
        workloads: [(
            "w".to_owned(),
            SourceFile::new("w.rhai", format!("import \"a\" as a;\n{}", with_hooks(""))),
        )]
        .into(),
        scripts: [
            ("a".to_owned(), script("import \"b\" as b;")),
            ("b".to_owned(), script("import \"c\" as c;")),
            ("c".to_owned(), script("import \"a\" as a;")),
        ]
        .into(),
        missing: Vec::new(),
    };
    let errors = Set::load(&sources, &LoadOptions::default()).unwrap_err();
    assert!(errors.iter().any(|error| error.message.contains("a → b → c → a")), "{errors:?}");
}

#[test]
fn good_scripts_are_not_complained_about() {
    let text = with_hooks(
        r#"
        const LIMITS = #{ small: 1, large: 10 };
        fn before_claim(ctx) {
            let plan = ctx.tenant.metadata["plan"] ?? "free";
            let check = |n| n > global::LIMITS.small;
            if check.call(3) && plan.len() > 0 { return ctx.accept(#{ metadata: #{ plan: plan } }); }
            switch plan {
                "none" => ctx.reject("no_plan", "you have no plan"),
                _ => ctx.retry_after(1.5),
            }
        }
        fn on_claim(ctx) {
            let ops = #{ run: |word| ctx.try_exec(["echo", word]) };
            for word in ["a", "b"] {
                let r = ops.run(word);
                if r.status != 0 { ctx.log.warn("failed", #{ word: word, out: r.stdout.trim() }); }
            }
            try { ctx.state.read("x"); } catch (e) { ctx.log.debug(e.message); }
            let text = ctx.state.list("").filter(|n| n.starts_with("a")).map(|n| n.to_upper());
            ctx.state.write("n", text.to_json_text());
            ctx.log.info(`${ctx.claim?.epoch} ${text.len()} ${parse_json("1")}`);
        }
        fn to_json_text() { #{ list: this }.to_json() }
        fn before_release(c) { c.signal("SIGHUP"); finish(c); }
        fn finish(ctx) { ctx.secrets.write("a", "b"); }
        fn after_release(ctx) { ctx.retire() }
        "#,
    );
    load(&text, None).unwrap_or_else(|errors| panic!("{}", errors[0]));
}

#[test]
fn without_workloads_there_is_the_built_in_one() {
    let options = LoadOptions { default_image: "busybox:1".to_owned(), ..LoadOptions::default() };
    let set = Set::load(&Sources::default(), &options).unwrap();
    let workload = set.only().unwrap();
    assert_eq!(workload.id().as_str(), "default");
    assert_eq!(workload.spec.image, "busybox:1");
    assert_eq!(workload.spec.volumes.state.as_ref().unwrap().container_path, "/data");
    assert_eq!(workload.spec.network, Network::None);
    assert!(set.warnings().is_empty());
    assert!(load(&with_hooks(""), None).unwrap().get(&WorkloadId::new("default").unwrap()).is_none());
}

// === What is shipped ===

fn shipped() -> Set {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = Sources::read(&root.join("workloads"), &root.join("scripts")).unwrap();
    assert!(sources.missing.is_empty());
    let set = Set::load(&sources, &LoadOptions::default()).unwrap_or_else(|errors| {
        panic!("{}", errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    });
    assert!(set.warnings().is_empty(), "{:?}", set.warnings());
    set
}

fn get(set: &Set, id: &str) -> Arc<Workload> {
    Arc::clone(set.get(&WorkloadId::new(id).unwrap()).unwrap_or_else(|| panic!("{id} is shipped")))
}

/// A host whose state directory is a map and whose commands all succeed.
#[derive(Default)]
struct Slot {
    files: std::sync::Mutex<BTreeMap<String, String>>,
    commands: std::sync::Mutex<Vec<Vec<String>>>,
    outputs: std::sync::Mutex<Vec<String>>,
}

#[async_trait]
impl Host for Slot {
    async fn exec(&self, call: ExecCall) -> Result<ExecResult, HostError> {
        self.commands.lock().unwrap().push(call.argv);
        Ok(ExecResult { status: 0, stdout: Vec::new(), stderr: Vec::new(), truncated: false })
    }
    async fn signal(&self, _signal: &str) -> Result<(), HostError> {
        Ok(())
    }
    async fn secret_write(&self, _name: &str, _secret: Secret) -> Result<(), HostError> {
        Ok(())
    }
    async fn secret_get_or_create(&self, _name: &str, _bytes: usize) -> Result<Secret, HostError> {
        Ok(Secret::new("k"))
    }
    async fn state_read(&self, path: &str) -> Result<Vec<u8>, HostError> {
        let missing = || HostError { code: "not_found", message: path.to_owned() };
        self.files.lock().unwrap().get(path).map(|text| text.clone().into_bytes()).ok_or_else(missing)
    }
    async fn state_write(&self, path: &str, content: Secret) -> Result<(), HostError> {
        let text = String::from_utf8_lossy(content.expose()).into_owned();
        self.files.lock().unwrap().insert(path.to_owned(), text);
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
    fn set_output(&self, key: &str, _value: Output) -> Result<(), HostError> {
        self.outputs.lock().unwrap().push(key.to_owned());
        Ok(())
    }
    fn log(&self, _level: LogLevel, _message: &str, _fields: serde_json::Map<String, serde_json::Value>) {}
    fn now_ms(&self) -> u64 {
        0
    }
}

fn facts(metadata: serde_json::Value) -> Facts {
    let serde_json::Value::Object(metadata) = metadata else { panic!("metadata is a map") };
    Facts {
        tenant: TenantFacts { id: "acme".to_owned(), metadata },
        workload: WorkloadFacts::default(),
        claim: Some(ClaimFacts { epoch: 1, source: "warm".to_owned(), state: "none".to_owned() }),
        container: Some(ContainerFacts {
            id: "c".to_owned(),
            name: "n".to_owned(),
            slot: "s".to_owned(),
            address: None,
        }),
    }
}

async fn run(workload: &Arc<Workload>, hook: Hook, metadata: serde_json::Value, slot: &Arc<Slot>) -> Verdict {
    let runner = Runner::new(RunnerOptions::default());
    let host: SharedHost = slot.clone();
    runner
        .run(workload, hook, facts(metadata), Some(host))
        .await
        .unwrap_or_else(|error| panic!("{}", error.diagnostic))
}

#[tokio::test]
async fn shipped_workloads_refuse_suspended_tenants() {
    let set = shipped();
    assert!(set.len() >= 3);
    let slot = Arc::default();
    for id in ["shell-sandbox", "http-worker"] {
        let workload = get(&set, id);
        let verdict = run(&workload, Hook::BeforeClaim, json!({ "plan": "suspended" }), &slot).await;
        let message = "tenant acme is suspended".to_owned();
        assert_eq!(verdict, Verdict::Reject { code: "tenant_suspended".to_owned(), message });
        let verdict = run(&workload, Hook::BeforeClaim, json!({ "maintenance": true }), &slot).await;
        assert_eq!(verdict, Verdict::RetryAfter { ms: 60_000 });
        let verdict = run(&workload, Hook::BeforeClaim, json!({}), &slot).await;
        assert!(matches!(verdict, Verdict::Accept { .. }));
    }
}

#[tokio::test]
async fn shipped_workloads_prepare_a_tenants_state() {
    let set = shipped();
    let slot = Arc::<Slot>::default();
    run(&get(&set, "shell-sandbox"), Hook::OnClaim, json!({ "name": "Ada" }), &slot).await;
    assert!(slot.files.lock().unwrap()["motd"].starts_with("Hello, Ada.\nYour files"));
    assert_eq!(*slot.outputs.lock().unwrap(), ["key_file"]);

    run(&get(&set, "http-worker"), Hook::OnClaim, json!({ "title": "<b>" }), &slot).await;
    let page = slot.files.lock().unwrap()["index.html"].clone();
    assert!(page.contains("&lt;b&gt;") && !page.contains("<b>"), "{page}");
    run(&get(&set, "http-worker"), Hook::OnClaim, json!({ "title": "new" }), &slot).await;
    assert_eq!(slot.files.lock().unwrap()["index.html"], page, "a tenant's page is kept");

    run(&get(&set, "redis"), Hook::BeforeRelease, json!({}), &slot).await;
    assert_eq!(slot.commands.lock().unwrap()[0], ["redis-cli", "-e", "SAVE"]);
}

#[test]
fn the_designs_example_loads() {
    let text = r#"//! My worker: an HTTP service with its data in /data.
fn workload() {
    #{
        id: "w",
        name: "My Worker",
        image: "myregistry/my-worker:latest",
        volumes: #{
            state:   #{ container_path: "/data",    mode: "rw" },
            secrets: #{ container_path: "/secrets", mode: "ro" },
            comm:    #{ container_path: "/comm",    mode: "rw" },
        },
        environment: #{ DATA_DIR: "/data", LOG_LEVEL: "info" },
        health_check: #{ command: ["curl", "-f", "http://localhost:8080/health"], interval_ms: 30000, timeout_ms: 5000, retries: 3 },
        resources: #{ cpus: 1.0, memory_mb: 512, pids: 256, tmpfs_mb: 64 },
        pool: #{ min_idle: 5, max: 50 },
        persist: #{ on_release: true, every_ms: 300000, exclude: ["cache/**"], keep_last: 10 },
    }
}
fn before_claim(ctx) { if ctx.tenant.metadata.plan == "suspended" { return ctx.reject("tenant_suspended", "this tenant is suspended"); } ctx.accept() }
fn on_claim(ctx)     { ctx.secrets.get_or_create("session_key", 32); }
"#;
    let set = load(text, None).unwrap_or_else(|errors| panic!("{}", errors[0]));
    let workload = set.only().unwrap();
    assert_eq!(workload.hooks().collect::<Vec<_>>(), [Hook::BeforeClaim, Hook::OnClaim]);
    assert_eq!(workload.deadline(Hook::OnClaim), Duration::from_secs(30));
}

// === Revisions ===

#[tokio::test]
async fn a_revision_survives_the_journal_with_its_scripts_and_spec() {
    let workload = get(&shipped(), "shell-sandbox");
    let again = Workload::from_json(&workload.to_json()).unwrap();
    assert_eq!(again.spec, workload.spec);
    assert_eq!(again.revision, workload.revision);
    assert_eq!(again.spec_hash, workload.spec_hash);
    let verdict = run(&again, Hook::BeforeClaim, json!({ "plan": "suspended" }), &Arc::default()).await;
    assert!(matches!(verdict, Verdict::Reject { .. }), "{verdict:?}");
    let json: serde_json::Value = serde_json::from_str(&workload.to_json()).unwrap();
    let scripts: Vec<_> = json["scripts"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(scripts, ["lib/motd", "lib/tenants"], "what it imports, and nothing else");
    for broken in ["", "{}", &workload.to_json().replace("\"format\":1", "\"format\":9")] {
        assert!(Workload::from_json(broken).is_err(), "{broken}");
    }
}

#[test]
fn the_revision_changes_with_scripts_and_the_spec_hash_with_what_a_container_is_made_from() {
    let of = |text: &str, lib: &str| {
        let text = format!("import \"lib/x\" as x;\n{text}");
        let set = load(&text, Some(lib)).unwrap_or_else(|errors| panic!("{}", errors[0]));
        let workload = set.only().unwrap();
        (workload.revision.clone(), workload.spec_hash.clone())
    };
    let base = of(&with_hooks(""), "fn a() { 1 }");
    assert_eq!(base, of(&with_hooks(""), "fn a() { 1 }"));
    let other_lib = of(&with_hooks(""), "fn a() { 2 }");
    assert_ne!(base.0, other_lib.0);
    assert_eq!(base.1, other_lib.1, "a script replaces no slot");
    let other_hook = of(&with_hooks("fn on_claim(ctx) { }"), "fn a() { 1 }");
    assert_ne!(base.0, other_hook.0);
    assert_eq!(base.1, other_hook.1);
    let other_pool = of(&with_fields("    pool: #{ max: 3 },"), "fn a() { 1 }");
    assert_eq!(base.1, other_pool.1, "a smaller pool replaces no slot");
    let other_user = of(&with_fields("    user: \"1000\","), "fn a() { 1 }");
    assert_ne!(base.1, other_user.1);
}

// === check ===

#[test]
fn check_reads_directories_and_single_files() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    for directory in ["workloads", "scripts/lib", "drafts"] {
        fs::create_dir_all(path(directory)).unwrap();
    }
    let workload = |id: &str| format!("fn workload() {{ #{{ id: \"{id}\", image: \"alpine\" }} }}\n");
    fs::write(path("workloads/good.rhai"), workload("good")).unwrap();
    fs::write(path("workloads/wrong.rhai"), workload("other")).unwrap();
    fs::write(path("scripts/lib/x.rhai"), "fn f() { 1 }\n").unwrap();
    let draft = format!("import \"lib/x\" as x;\n{}fn on_claim(ctx) {{ x::g(); }}\n", workload("draft"));
    fs::write(path("drafts/draft.rhai"), draft).unwrap();
    fs::write(
        path("drafts/warned.rhai"),
        "fn workload() { #{ id: \"warned\", image: \"a\", network: \"bridge\" } }",
    )
    .unwrap();

    let check = |paths: &[&str]| -> Vec<String> {
        let paths: Vec<_> = paths.iter().map(|name| path(name)).collect();
        check(&paths, &path("workloads"), &path("scripts"), &LoadOptions::default())
            .iter()
            .map(|finding| {
                let file = Path::new(&finding.file).strip_prefix(root.path()).unwrap().display().to_string();
                format!(
                    "{file}: {} {}",
                    if finding.is_error() { "error" } else { "warning" },
                    finding.message
                )
            })
            .collect()
    };
    assert_eq!(check(&[]), ["workloads/wrong.rhai: error id: \"other\" is not the name of the file"]);
    assert!(check(&["workloads/good.rhai"]).is_empty());
    assert!(check(&["scripts/lib/x.rhai"]).is_empty());
    assert!(check(&["scripts"]).is_empty());
    let drafts = check(&["drafts"]);
    assert_eq!(drafts[0], "drafts/draft.rhai: error unknown function `x::g`");
    assert!(drafts[1].starts_with("drafts/warned.rhai: warning network: on \"bridge\""), "{drafts:?}");
    assert!(check(&["nothing.rhai"])[0].contains("cannot be read"));
    assert!(check(&["scripts/lib/none.rhai"])[0].contains("does not exist"));
    fs::write(path("notes.txt"), "").unwrap();
    assert!(check(&["notes.txt"])[0].contains("is no script"));
}

#[test]
fn findings_are_data_for_programs() {
    let errors = load(&with_fields("    pool: #{ mx: 3 },"), None).unwrap_err();
    let json = serde_json::to_value(&errors[0]).unwrap();
    assert_eq!(json["severity"], "error");
    assert_eq!((&json["line"], &json["column"], &json["field"]), (&json!(4), &json!(14), &json!("pool.mx")));
    assert_eq!(json["source_line"], "    pool: #{ mx: 3 },");
}
