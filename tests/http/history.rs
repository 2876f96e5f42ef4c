//! The history of a tenant over the API: what there is, back, a copy, a decision, the end.

use boilerhouse::state::fence::Mode;
use reqwest::Response;
use serde_json::{Value, json};

use crate::{
    ADMIN, ALICE, Server, WORKER, problem, program,
    support::{node::TestNode, rivals},
    tokens,
};

impl Server {
    /// Sends a JSON body with a token and returns what is answered.
    async fn send(&self, token: &str, method: &str, path: &str, body: Option<Value>) -> Response {
        let request = self.request(method, path).bearer_auth(token);
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        request.send().await.unwrap()
    }

    async fn good(&self, token: &str, method: &str, path: &str, body: Option<Value>) -> Value {
        let response = self.send(token, method, path, body).await;
        let status = response.status().as_u16();
        let body: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{method} {path}: {body}");
        body
    }

    fn node(&self) -> &TestNode {
        &self.of.0
    }

    /// Saves `1`, `2`, … as the tenant's notes; answers the snapshots' numbers.
    async fn saved(&self, tenant: &str, times: u32) -> Vec<u64> {
        let mut numbers = Vec::new();
        for step in 1..=times {
            let claim = self.node().claim(tenant).await.unwrap();
            self.node().write(&claim, "notes", &step.to_string());
            numbers.push(self.node().release(tenant).await.unwrap().snapshot.expect("it is durable"));
        }
        numbers
    }

    async fn notes(&self, tenant: &str) -> Option<String> {
        let claim = self.node().claim(tenant).await.unwrap();
        let notes = self.node().read(&claim, "notes");
        self.node().release(tenant).await.unwrap();
        notes
    }
}

fn numbers(page: &Value) -> Vec<u64> {
    let snapshots = page["snapshots"].as_array().unwrap();
    snapshots.iter().map(|snapshot| snapshot["number"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn snapshots_are_listed_newest_first_and_page_by_page() {
    let server = Server::start(tokens()).await;
    let none = server.good(ALICE, "GET", "/tenants/alice/snapshots", None).await;
    assert_eq!(none, json!({"tenant": "alice", "workload": "worker", "snapshots": []}));
    let mut saved = server.saved("alice", 3).await;
    saved.reverse();
    let all = server.good(ALICE, "GET", "/api/v1/tenants/alice/snapshots?workload=worker", None).await;
    assert_eq!((numbers(&all), &all["next_before"]), (saved.clone(), &Value::Null), "{all}");
    let newest = &all["snapshots"][0];
    for (field, expected) in [
        ("files", json!(1)),
        ("bytes", json!(1)),
        ("skipped", json!(0)),
        ("failed_claim", json!(false)),
        ("kind", json!("snapshot")),
        ("current", json!(true)),
    ] {
        assert_eq!(newest[field], expected, "{field}: {newest}");
    }
    assert!(newest["created_ms"].as_u64() > Some(0) && newest["epoch"].as_u64() > Some(0), "{newest}");
    assert_eq!(all["snapshots"][1]["current"], json!(false));
    let page = server.good(ALICE, "GET", "/tenants/alice/snapshots?limit=2", None).await;
    assert_eq!(numbers(&page), saved[..2]);
    let before = page["next_before"].as_u64().expect("there is more");
    let path = format!("/tenants/alice/snapshots?limit=2&before={before}");
    let rest = server.good(ALICE, "GET", &path, None).await;
    assert_eq!((numbers(&rest), &rest["next_before"]), (saved[2..].to_vec(), &Value::Null), "{rest}");
    for (query, status, code, field) in [
        ("limit=0", 422, "invalid_field", "limit"),
        ("limit=1001", 422, "invalid_field", "limit"),
        ("limit=few", 422, "invalid_field", "limit"),
        ("before=-1", 422, "invalid_field", "before"),
        ("after=1", 422, "unknown_field", "after"),
        ("workload=other", 404, "unknown_workload", "workload"),
    ] {
        let path = format!("/tenants/alice/snapshots?{query}");
        let found = problem(server.send(ALICE, "GET", &path, None).await, status, code).await;
        assert_eq!(found["field"], json!(field), "{query}");
    }
    server.of.1.store.set_down(true);
    let response = server.send(ALICE, "GET", "/tenants/alice/snapshots", None).await;
    let down = problem(response, 503, "store_unavailable").await;
    assert!(down["retry_after_ms"].is_u64(), "an error is no empty list: {down}");
}

#[tokio::test]
async fn a_tenant_goes_back_and_forth_in_its_own_history() {
    let server = Server::start(tokens()).await;
    let saved = server.saved("alice", 3).await;
    let path = "/tenants/alice/restore";
    let restored = server.good(ALICE, "POST", path, Some(json!({"snapshot": saved[0]}))).await;
    let now = saved[2] + 1;
    let expected = json!({
        "tenant": "alice", "workload": "worker", "snapshot": now, "restored_from": saved[0], "files": 1, "bytes": 1,
    });
    assert_eq!(restored, expected);
    let listed = server.good(ALICE, "GET", "/tenants/alice/snapshots", None).await;
    let newest = &listed["snapshots"][0];
    assert_eq!(
        (&newest["kind"], &newest["restored_from"]),
        (&json!("restore"), &json!(saved[0])),
        "{listed}"
    );
    assert_eq!(server.notes("alice").await.as_deref(), Some("1"));
    server.good(ALICE, "POST", "/api/v1/tenants/alice/restore", Some(json!({"snapshot": saved[2]}))).await;
    assert_eq!(server.notes("alice").await.as_deref(), Some("3"), "nothing was lost");

    for (body, status, code) in [
        (json!({}), 422, "invalid_field"),
        (json!({"snapshot": "newest"}), 422, "invalid_field"),
        (json!({"snapshot": 1, "force": true}), 422, "unknown_field"),
        (json!({"snapshot": 999}), 404, "unknown_snapshot"),
        (json!({"snapshot": 0}), 404, "unknown_snapshot"),
        (json!({"snapshot": 1, "workload": "other"}), 404, "unknown_workload"),
    ] {
        problem(server.send(ALICE, "POST", path, Some(body)).await, status, code).await;
    }
    let to = "/tenants/bob/restore";
    problem(server.send(ALICE, "POST", to, Some(json!({"snapshot": 1}))).await, 403, "forbidden").await;
    problem(server.send(ADMIN, "POST", to, Some(json!({"snapshot": 1}))).await, 404, "unknown_snapshot")
        .await;
    server.node().claim("alice").await.unwrap();
    let body = json!({"snapshot": saved[0]});
    problem(server.send(ALICE, "POST", path, Some(body.clone())).await, 409, "claimed").await;
    server.of.1.store.set_down(true);
    assert_eq!(server.node().release("alice").await.unwrap().state.as_str(), "pending");
    let unsaved = problem(server.send(ALICE, "POST", path, Some(body)).await, 409, "state_not_saved").await;
    assert!(unsaved["retry_after_ms"].is_u64(), "{unsaved}");
}

#[tokio::test]
async fn a_fork_is_made_by_admins_and_only_of_what_is_there() {
    let server = Server::start(tokens()).await;
    let saved = server.saved("alice", 2).await;
    let path = "/tenants/twin/fork";
    let body = json!({"from": "alice", "snapshot": saved[0]});
    for to in [path, "/tenants/alice/fork"] {
        problem(server.send(ALICE, "POST", to, Some(body.clone())).await, 403, "forbidden").await;
    }
    let forked = server.good(ADMIN, "POST", path, Some(body)).await;
    let expected = json!({
        "tenant": "twin", "workload": "worker", "snapshot": 1, "from": "alice", "restored_from": saved[0],
        "files": 1, "bytes": 1,
    });
    assert_eq!(forked, expected);
    assert_eq!(server.notes("twin").await.as_deref(), Some("1"));
    assert_eq!(server.notes("alice").await.as_deref(), Some("2"));
    server.good(ADMIN, "POST", "/tenants/newest/fork", Some(json!({"from": "alice"}))).await;
    assert_eq!(server.notes("newest").await.as_deref(), Some("2"));
    for (to, body, status, code) in [
        ("twin", json!({"from": "alice"}), 409, "state_exists"),
        ("alice", json!({"from": "alice"}), 422, "invalid_field"),
        ("other", json!({}), 422, "invalid_field"),
        ("other", json!({"from": "../x"}), 422, "invalid_field"),
        ("other", json!({"from": "nobody"}), 404, "unknown_snapshot"),
        ("other", json!({"from": "alice", "snapshot": 999}), 404, "unknown_snapshot"),
        ("other", json!({"from": "alice", "to": "x"}), 422, "unknown_field"),
    ] {
        let path = format!("/tenants/{to}/fork");
        problem(server.send(ADMIN, "POST", &path, Some(body)).await, status, code).await;
    }
    server.node().claim("other").await.unwrap();
    let body = Some(json!({"from": "alice"}));
    problem(server.send(ADMIN, "POST", "/tenants/other/fork", body).await, 409, "claimed").await;
}

#[tokio::test]
async fn an_erased_tenant_is_gone_and_proven_so() {
    let server = Server::start(tokens()).await;
    server.saved("alice", 2).await;
    server.saved("bob", 1).await;
    let secret = json!({"value": "hunter2"});
    let path = "/tenants/alice/secrets/key";
    assert_eq!(server.send(ALICE, "PUT", path, Some(secret)).await.status(), 204);
    problem(server.send(ALICE, "DELETE", "/tenants/alice", None).await, 403, "forbidden").await;
    problem(server.send(ADMIN, "DELETE", "/tenants/alice", Some(json!({}))).await, 400, "unexpected_body")
        .await;
    server.node().claim("alice").await.unwrap();
    problem(server.send(ADMIN, "DELETE", "/tenants/alice", None).await, 409, "claimed").await;
    server.node().release("alice").await.unwrap();
    let erased = server.good(ADMIN, "DELETE", "/tenants/alice", None).await;
    assert_eq!(
        (&erased["tenant"], &erased["workloads"], &erased["proof"], &erased["set_aside"]),
        (&json!("alice"), &json!(["worker"]), &json!("empty_listing"), &json!([])),
        "{erased}"
    );
    assert!(erased["objects"].as_u64() > Some(3), "{erased}");
    let listed = server.good(ALICE, "GET", "/tenants/alice/snapshots", None).await;
    assert_eq!(listed["snapshots"], json!([]));
    let names = server.good(ALICE, "GET", "/tenants/alice/secrets", None).await;
    assert_eq!(names, json!({"names": []}));
    let again = server.good(ADMIN, "DELETE", "/api/v1/tenants/alice", None).await;
    assert_eq!((&again["objects"], &again["workloads"]), (&json!(0), &json!([])), "{again}");
    assert_eq!(server.notes("alice").await, None);
    assert_eq!(server.notes("bob").await.as_deref(), Some("1"), "nobody else is");

    // Begun, it goes on: until it is done the tenant has no claim.
    server.of.1.store.set_down(true);
    let response = server.send(ADMIN, "DELETE", "/tenants/bob", None).await;
    problem(response, 503, "store_unavailable").await;
    let response = server.send(ADMIN, "POST", "/tenants/bob/claim", None).await;
    problem(response, 409, "being_erased").await;
    server.of.1.store.set_down(false);
    server.node().node.tenancy.finish_erasures().await;
    assert_eq!(server.notes("bob").await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_is_shown_and_an_operator_decides_it() {
    let rivals::Conflict { first, a, second: _second, b: _b } =
        rivals::conflict(Mode::Shared, &[("worker", WORKER)]).await;
    let server = Server::serve(tokens(), a, first).await;
    let status = server.good(ALICE, "GET", "/tenants/alice/status", None).await;
    let claim = &status["claims"][0];
    assert_eq!(claim["state"], json!("conflict"), "{status}");
    assert!(claim["last_error"].as_str().is_some_and(|reason| reason.contains("fenced")), "{status}");
    for (method, path, body) in [
        ("POST", "/tenants/alice/claim", Some(json!({}))),
        ("POST", "/tenants/alice/release", Some(json!({}))),
        ("POST", "/tenants/alice/restore", Some(json!({"snapshot": 1}))),
        ("DELETE", "/tenants/alice", None),
    ] {
        problem(server.send(ADMIN, method, path, body).await, 409, "state_conflict").await;
    }
    let path = "/tenants/alice/resolve";
    problem(server.send(ALICE, "POST", path, Some(json!({"keep": "ours"}))).await, 403, "forbidden").await;
    for (body, code, field) in [
        (json!({}), "invalid_field", Some("keep")),
        (json!({"keep": "both"}), "invalid_field", Some("keep")),
        (json!({"keep": "ours", "discard": true}), "invalid_field", Some("discard")),
        (json!({"keep": "theirs", "discard": "yes"}), "invalid_field", Some("discard")),
        (json!({"keep": "theirs", "force": true}), "unknown_field", Some("force")),
    ] {
        let found = problem(server.send(ADMIN, "POST", path, Some(body.clone())).await, 422, code).await;
        assert_eq!(found["field"].as_str(), field, "{body}: {found}");
        if body["keep"] == "both" {
            assert_eq!(found["allowed"], json!(["ours", "theirs"]), "{found}");
        }
    }
    let other = server.send(ADMIN, "POST", "/tenants/bob/resolve", Some(json!({"keep": "theirs"}))).await;
    problem(other, 409, "not_in_conflict").await;

    // The command, against this server.
    let url = server.url("");
    let admin = [("BOILERHOUSE_URL", &*url), ("BOILERHOUSE_TOKEN", ADMIN)];
    let (code, _, err) = program(&["claim", "alice"], &admin).await;
    assert!(code == 1 && err.contains("help: `boilerhouse state resolve TENANT"), "{err}");
    for arguments in [
        &["state", "resolve", "alice"][..],
        &["state", "resolve", "alice", "--keep", "mine"],
        &["state", "resolve", "alice", "--keep", "ours", "--discard"],
    ] {
        let (code, _, err) = program(arguments, &admin).await;
        assert_eq!(code, 2, "{arguments:?}: {err}");
    }
    let (code, out, err) = program(&["state", "resolve", "alice", "--keep", "ours", "--json"], &admin).await;
    assert_eq!((code, err.as_str()), (0, ""));
    let answer: Value = serde_json::from_str(&out).unwrap();
    let replaced = answer["replaced"].as_u64().expect("the store had one");
    let expected = json!({
        "tenant": "alice", "workload": "worker", "kept": "ours", "state": "durable", "snapshot": replaced + 1,
        "replaced": replaced,
    });
    assert_eq!(answer, expected);
    let (code, _, err) = program(&["state", "resolve", "alice", "--keep", "theirs"], &admin).await;
    assert!(code == 1 && err.contains("(not_in_conflict)"), "{err}");
    assert_eq!(server.notes("alice").await.as_deref(), Some("ours"));
    server.good(ALICE, "POST", "/tenants/alice/restore", Some(json!({"snapshot": replaced}))).await;
    assert_eq!(server.notes("alice").await.as_deref(), Some("theirs"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_decided_against_is_set_aside_and_named() {
    let rivals::Conflict { first, a, second: _second, b: _b } =
        rivals::conflict(Mode::Exclusive, &[("worker", WORKER)]).await;
    let server = Server::serve(tokens(), a, first).await;
    let path = "/api/v1/tenants/alice/resolve?workload=worker";
    let answer = server.good(ADMIN, "POST", path, Some(json!({"keep": "theirs"}))).await;
    let place = answer["set_aside"].as_str().expect("it is kept").to_owned();
    assert_eq!(std::fs::read_to_string(format!("{place}/tree/notes")).unwrap(), "ours");
    let expected = json!({
        "tenant": "alice", "workload": "worker", "kept": "theirs", "state": "durable",
        "snapshot": answer["snapshot"], "set_aside": place,
    });
    assert!(answer["snapshot"].is_u64() && answer == expected, "{answer}");
    assert_eq!(server.notes("alice").await.as_deref(), Some("theirs"));
    // An erasure finds it.
    let erased = server.good(ADMIN, "DELETE", "/tenants/alice", None).await;
    assert_eq!(erased["set_aside"], json!([place]));
    assert!(!std::path::Path::new(&place).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_the_history_work_against_a_server() {
    let server = Server::start(tokens()).await;
    let saved = server.saved("alice", 2).await;
    let url = server.url("");
    let admin = [("BOILERHOUSE_URL", &*url), ("BOILERHOUSE_TOKEN", ADMIN)];
    let (first, second) = (saved[0].to_string(), saved[1].to_string());
    let run = async |arguments: &[&str], expected: &[&str]| {
        let (code, out, err) = program(arguments, &admin).await;
        assert_eq!((code, err.as_str()), (0, ""), "{arguments:?}");
        for text in expected {
            assert!(out.contains(text), "{arguments:?}: {text:?} is not in\n{out}");
        }
    };
    run(&["snapshots", "alice"], &["SNAPSHOT", &first, &second, "current"]).await;
    run(&["snapshots", "alice", "--limit", "1"], &["more: --before "]).await;
    let begins = format!("alice worker begins with snapshot {first} from now on");
    run(&["restore", "alice", "--snapshot", &first], &[&begins]).await;
    run(&["snapshots", "alice"], &[&format!("current, restored from {first}")]).await;
    run(&["fork", "twin", "--from", "alice"], &["twin worker begins with alice's snapshot"]).await;
    assert_eq!(server.notes("twin").await.as_deref(), Some("1"));
    run(&["state", "gc", "alice"], &["1 states looked at"]).await;
    run(&["erase", "alice"], &["alice erased: ", "of 1 workloads"]).await;
    run(&["snapshots", "alice"], &["alice worker has no snapshot"]).await;
    let (code, _, err) = program(&["restore", "alice", "--snapshot", "1"], &admin).await;
    assert!(code == 1 && err.contains("(unknown_snapshot)") && err.contains("help: "), "{err}");
}
