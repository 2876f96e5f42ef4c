//! The shipped image: run as `compose.yaml` runs it, it does the main job.

mod support;

use std::{fs, time::Duration};

use serde_json::{Value, json};
use support::{
    engine::with_engine,
    images,
    server::{docker, sh, wait_for},
};

const SOON: Duration = Duration::from_secs(60);

/// A container that is removed when dropped.
struct Container(String);

impl Drop for Container {
    fn drop(&mut self) {
        let _ = std::process::Command::new("docker").args(["rm", "--force", &self.0]).output();
    }
}

fn workload() -> String {
    format!(
        r#"//! Stays up.
fn workload() {{
    #{{
        id: "worker",
        image: "{}",
        command: ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"],
        pull: "never",
        volumes: #{{
            state: #{{ container_path: "/data", mode: "rw" }},
            secrets: #{{ container_path: "/secrets", mode: "ro" }},
        }},
        pool: #{{ min_idle: 1, max: 4 }},
    }}
}}
"#,
        images::APP
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shipped_image_claims_saves_and_claims_again() {
    with_engine(|engine| async move {
        let image = std::env::var("TEST_IMAGE").unwrap_or_else(|_| "boilerhouse:latest".to_owned());
        let there = std::process::Command::new("docker").args(["image", "inspect", &image]).output();
        assert!(
            there.is_ok_and(|output| output.status.success()),
            "the image {image} is not there: `make image` builds it"
        );
        // Host paths are the same inside and outside: the containers are siblings.
        let dir = tempfile::Builder::new().prefix("boilerhouse-image-").tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name).display().to_string();
        for folder in ["states", "secrets", "sockets", "store", "workloads", "scripts"] {
            fs::create_dir(dir.path().join(folder)).expect("a fresh directory");
        }
        fs::write(dir.path().join("workloads/worker.rhai"), workload()).expect("a workload");
        let name = format!("{}-server", engine.instance);
        let server = Container(name.clone());
        let mut args: Vec<String> =
            ["run", "--detach", "--network", "host", "--read-only", "--cap-drop", "ALL"]
                .map(str::to_owned)
                .to_vec();
        for capability in ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID"] {
            args.extend(["--cap-add".to_owned(), capability.to_owned()]);
        }
        args.extend(["--security-opt", "no-new-privileges", "--name", &name].map(str::to_owned));
        args.extend(["--volume", "/var/run/docker.sock:/var/run/docker.sock"].map(str::to_owned));
        args.extend(["--volume".to_owned(), format!("{0}:{0}", dir.path().display())]);
        for (variable, value) in [
            ("API_PORT", "0".to_owned()),
            ("INSTANCE", engine.instance.clone()),
            ("STATE_DIR", path("states")),
            ("SECRETS_DIR", path("secrets")),
            ("SOCKET_DIR", path("sockets")),
            ("STORE", format!("file://{}", path("store"))),
            ("WORKLOADS_DIR", path("workloads")),
            ("SCRIPTS_DIR", path("scripts")),
        ] {
            args.extend(["--env".to_owned(), format!("BOILERHOUSE_{variable}={value}")]);
        }
        args.push(image);
        docker(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let log = || {
            let output =
                std::process::Command::new("docker").args(["logs", &name]).output().expect("docker runs");
            String::from_utf8_lossy(&output.stderr).into_owned()
        };
        let mut url = String::new();
        wait_for("the server in the image listens", SOON, async || {
            let text = log();
            let line = text.lines().find(|line| line.contains("\"listening\""));
            let event: Option<Value> = line.and_then(|line| serde_json::from_str(line).ok());
            let address = event.and_then(|event| Some(event["address"].as_str()?.to_owned()));
            url = address.map(|address| format!("http://{address}")).unwrap_or_default();
            !url.is_empty()
        })
        .await;
        let http = reqwest::Client::builder().no_proxy().timeout(SOON).build().expect("a client");
        let post = async |path: &str, body: Value| -> Value {
            let answer = http.post(format!("{url}{path}")).json(&body).send().await.expect("an answer");
            let status = answer.status();
            let body: Value = answer.json().await.expect("JSON");
            assert!(status.is_success(), "{path}: {status} {body}\n{}", log());
            body
        };
        wait_for("it is ready", SOON, async || {
            let ready = http.get(format!("{url}/readyz")).send().await;
            ready.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        let claim =
            post("/tenants/acme/claim", json!({ "wait_ms": 30_000, "secrets": { "token": "t" } })).await;
        let container = claim["container"]["name"].as_str().expect("a name").to_owned();
        sh(&container, "echo kept > /data/file; chmod 640 /data/file; cat /secrets/token");
        let released = post("/tenants/acme/release", json!({})).await;
        assert_eq!(released["state"], "durable", "{}", log());
        let again = post("/tenants/acme/claim", json!({ "wait_ms": 30_000 })).await;
        let container = again["container"]["name"].as_str().expect("a name").to_owned();
        assert_eq!(sh(&container, "cat /data/file; stat -c '%a %u' /data/file"), "kept\n640 1000");
        // Asked to stop, it ends by itself and in order.
        docker(&["stop", "--time", "60", &name]);
        assert_eq!(docker(&["inspect", "--format", "{{.State.ExitCode}}", &name]), "0", "{}", log());
        drop(server);
    })
    .await;
}
