//! The API over real sockets: who is let in, what is refused and how, how the
//! server ends; and the command line against it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::SocketAddr, os::unix::fs::PermissionsExt, process::Command, sync::Arc, time::Duration};

use boilerhouse::{
    api::{self, ApiState, Auth, RouteScope},
    client::{self, Client},
    model::{Secret, TenantId},
    tenancy::PoolStatus,
};
use reqwest::{Method, Response, header};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

#[path = "http/history.rs"]
mod history;
mod support;

use support::node::{TestNode, World};

const ADMIN: &str = "admin-token-00000001";
const ALICE: &str = "alice-token-00000001";

/// Where no server is: port 1 is reserved, and not for HTTP.
const NOBODY: &str = "http://127.0.0.1:1";

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A server on a free port; ends when dropped.
struct Server {
    address: SocketAddr,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
    http: reqwest::Client,
    /// What carries out the requests.
    of: (TestNode, World),
}

/// The only workload of these tests' node.
const WORKER: &str = r#"//! Stays up.
fn workload() {
    #{ id: "worker", image: "app:1", volumes: #{ state: #{ container_path: "/data", mode: "rw" } } }
}
"#;

/// Knows [`ADMIN`], and [`ALICE`] for tenant `alice`.
fn tokens() -> Auth {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens");
    std::fs::write(&path, format!("root admin {ADMIN}\nalice-app tenant:alice {ALICE}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    Auth::read(&path).unwrap()
}

impl Server {
    async fn start(auth: Auth) -> Self {
        let world = World::new(&[("worker", WORKER)]);
        let node = world.start().await;
        Self::serve(auth, node, world).await
    }

    /// Serves a node that may not have started yet.
    async fn serve(auth: Auth, node: TestNode, world: World) -> Self {
        let (metrics, written) = (Arc::clone(&node.node.metrics), Arc::clone(&node.node.metrics));
        let state = ApiState::new(node.node.tenancy.clone(), auth, metrics, move || written.encode(&[]));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(api::serve(listener, api::router(state), shutdown.clone()));
        let http = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
        Self { address, shutdown, task, http, of: (node, world) }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method.parse::<Method>().unwrap(), self.url(path))
    }

    /// Sends bytes on a connection of its own and returns all that comes back.
    async fn raw(&self, text: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        read_all(&mut stream).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
        self.task.abort();
    }
}

async fn read_all(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    tokio::time::timeout(LIMIT, stream.read_to_end(&mut bytes)).await.expect("the connection ends").unwrap();
    String::from_utf8(bytes).unwrap()
}

/// Asserts a problem's status and code, and returns it.
async fn problem(response: Response, status: u16, code: &str) -> Value {
    assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
    assert!(response.headers().contains_key("x-request-id"));
    let found = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    assert_eq!((found, &body["code"]), (status, &json!(code)), "{body}");
    assert_eq!(body["status"], json!(status), "{body}");
    body
}

#[tokio::test]
async fn every_answer_has_an_id_and_is_not_cached() {
    let server = Server::start(tokens()).await;
    for path in ["/healthz", "/api/v1/healthz"] {
        let response = server.request("GET", path).header("x-request-id", "mine-1").send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(response.headers()["x-request-id"], "mine-1");
        assert_eq!(response.headers()["cache-control"], "no-store");
        assert_eq!(response.json::<Value>().await.unwrap(), json!({"status": "ok"}));
    }
    let made = server.request("GET", "/healthz").header("x-request-id", "not sane").send().await.unwrap();
    let made = made.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert!(made.len() == 16 && made.bytes().all(|b| b.is_ascii_hexdigit()), "{made}");
    let metrics = server.request("GET", "/metrics").bearer_auth(ADMIN).send().await.unwrap();
    let kind = metrics.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    assert!(metrics.text().await.unwrap().ends_with("# EOF\n"));
}

/// Each route × each class of token × own and other tenant, through the real router.
/// Every answer is counted, refused ones too; a label never holds what a client made up.
#[tokio::test]
async fn requests_are_counted_by_route_method_and_status() {
    let server = Server::start(Auth::loopback()).await;
    for (method, path) in [
        ("GET", "/healthz"),
        ("GET", "/api/v1/healthz"),
        ("GET", "/tenants/alice/status"),
        ("GET", "/tenants/bob/status"),
        ("GET", "/tenants/alice/claim"),
        ("GET", "/tenants/-/status"),
        ("GET", "/made-up-7"),
        ("BREW", "/made-up-8"),
    ] {
        server.request(method, path).send().await.unwrap();
    }
    server.request("GET", "/pools").header("host", "evil.example").send().await.unwrap();
    let text = server.request("GET", "/metrics").send().await.unwrap().text().await.unwrap();
    for line in [
        r#"{route="/healthz",method="GET",status="200"} 2"#,
        r#"{route="/tenants/{tenant}/status",method="GET",status="200"} 2"#,
        r#"{route="/tenants/{tenant}/status",method="GET",status="422"} 1"#,
        r#"{route="/tenants/{tenant}/claim",method="GET",status="405"} 1"#,
        r#"{route="/pools",method="GET",status="403"} 1"#,
        r#"{route="unmatched",method="GET",status="404"} 1"#,
        r#"{route="unmatched",method="other",status="404"} 1"#,
    ] {
        let line = format!("boilerhouse_http_requests_total{line}");
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("made-up") && !text.contains("alice"), "{text}");
}

/// While the engine does not answer, nothing is known of what survived: probes and
/// tenants are told so, and a stop is not held up.
#[tokio::test]
async fn readiness_goes_from_starting_to_ready_and_degraded() {
    let world = World::new(&[("worker", WORKER)]);
    world.runtime.set_down(true);
    let node = world.launch();
    let server = Server::serve(tokens(), node, world).await;
    let readyz = async |token: Option<&str>| {
        let request = server.request("GET", "/readyz");
        let request = if let Some(token) = token { request.bearer_auth(token) } else { request };
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let reason = async |part: &str| {
        let (_, body) = readyz(Some(ADMIN)).await;
        body["reasons"].as_array().unwrap().iter().any(|reason| reason.as_str().unwrap().starts_with(part))
    };
    let began = tokio::time::Instant::now();
    while !reason("engine: container engine is unreachable: ").await {
        assert!(began.elapsed() < LIMIT, "the engine's failure is not shown");
        tokio::task::yield_now().await;
    }
    assert_eq!(readyz(None).await, (503, json!({"status": "starting", "reasons": []})));
    assert_eq!(readyz(Some(ALICE)).await.1["reasons"], json!([]));
    for (method, path) in [
        ("GET", "/tenants/alice/status"),
        ("POST", "/tenants/alice/claim"),
        ("POST", "/tenants/alice/release"),
        ("POST", "/tenants/alice/touch"),
        ("POST", "/tenants/alice/sync"),
        ("POST", "/tenants/alice/prefetch"),
    ] {
        let response = server.request(method, path).bearer_auth(ALICE).send().await.unwrap();
        assert_eq!(response.headers()["retry-after"], "1", "{path}");
        assert_eq!(problem(response, 503, "starting").await["retry_after_ms"], 1000);
    }
    let (node, world) = &server.of;
    world.runtime.set_down(false);
    support::node::wait_for("the node serves", || node.node.tenancy.readiness().status != "starting").await;
    node.node.upkeep.look_at_health().await;
    assert_eq!(readyz(Some(ADMIN)).await, (200, json!({"status": "ready", "reasons": []})));
    world.runtime.set_down(true);
    node.node.upkeep.look_at_health().await;
    assert_eq!(readyz(None).await, (200, json!({"status": "degraded", "reasons": []})));
    assert!(reason("engine: ").await);
}

#[tokio::test]
async fn no_route_is_reached_without_the_scope_for_it() {
    let server = Server::start(tokens()).await;
    for route in api::routes() {
        for prefix in ["", api::PREFIX] {
            for tenant in ["alice", "bob"] {
                let path = route.path.replace("{tenant}", tenant).replace("{name}", "key");
                let classes = [
                    ("none", None),
                    ("unknown", Some("guessed-token-0001")),
                    ("alice", Some(ALICE)),
                    ("admin", Some(ADMIN)),
                ];
                for (class, token) in classes {
                    let mut request = server.request(route.method, &format!("{prefix}{path}"));
                    if let Some(token) = token {
                        request = request.bearer_auth(token);
                    }
                    let is_own = class == "alice" && tenant == "alice" && route.scope == RouteScope::Tenant;
                    let response = request.send().await.unwrap();
                    let row = format!("{class}: {} {prefix}{path}", route.method);
                    let status = response.status().as_u16();
                    if is_own || class == "admin" || route.scope == RouteScope::Open {
                        assert!(status != 401 && status != 403, "{row}: {status}");
                    } else if class == "alice" {
                        problem(response, 403, "forbidden").await;
                    } else {
                        let challenge = response.headers()[header::WWW_AUTHENTICATE].to_str().unwrap();
                        assert!(challenge.starts_with("Bearer realm="), "{row}: {challenge}");
                        problem(response, 401, "unauthenticated").await;
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn unknown_routes_and_methods_are_problems() {
    let server = Server::start(Auth::loopback()).await;
    for path in ["/", "/nope", "/tenants", "/tenants/a/claim/", "/api/v2/healthz", "/api/v1"] {
        problem(server.request("GET", path).send().await.unwrap(), 404, "unknown_route").await;
    }
    let rows = [
        ("GET", "/tenants/a/claim", vec!["POST"]),
        ("POST", "/pools", vec!["GET", "HEAD"]),
        ("GET", "/tenants/a", vec!["DELETE", "PUT"]),
        ("POST", "/tenants/a/secrets/k", vec!["DELETE", "PUT"]),
        ("OPTIONS", "/api/v1/pools", vec!["GET", "HEAD"]),
    ];
    for (method, path, expected) in rows {
        let response = server.request(method, path).send().await.unwrap();
        let allow = response.headers()[header::ALLOW].to_str().unwrap().to_owned();
        let mut allowed: Vec<&str> = allow.split(',').map(str::trim).collect();
        allowed.sort_unstable();
        assert_eq!(allowed, expected, "{method} {path}");
        assert!(!response.headers().contains_key("access-control-allow-origin"));
        problem(response, 405, "method_not_allowed").await;
    }
}

#[tokio::test]
async fn bad_input_names_the_field() {
    let server = Server::start(Auth::loopback()).await;
    #[rustfmt::skip]
    let rows = [
        ("POST", "/tenants/..%2Fx/claim", "{}", 422, "invalid_field", Some("tenant")),
        ("POST", "/tenants/-x/claim", "{}", 422, "invalid_field", Some("tenant")),
        ("POST", "/tenants/%FF/claim", "{}", 400, "invalid_path", None),
        ("POST", "/tenants/a/claim", "{", 400, "invalid_json", None),
        ("POST", "/tenants/a/claim", r#"{"wait_ms": "1"}"#, 422, "invalid_field", Some("wait_ms")),
        ("POST", "/tenants/a/claim", r#"{"env": {"A": 1}}"#, 422, "invalid_field", Some("env.A")),
        ("POST", "/tenants/a/claim", r#"{"enviroment": {}}"#, 422, "unknown_field", Some("enviroment")),
        ("POST", "/tenants/a/claim?wait_ms=1", "{}", 422, "unknown_field", Some("wait_ms")),
        ("POST", "/tenants/a/release?workload=x", r#"{"workload": "y"}"#, 422, "invalid_field", Some("workload")),
        ("POST", "/tenants/a/release", r#"{"wait": "long"}"#, 422, "invalid_field", Some("wait")),
        ("POST", "/tenants/a/touch", r#"{"epoch": 1}"#, 422, "unknown_field", Some("epoch")),
        ("POST", "/tenants/a/sync?workload=x&workload=x", "{}", 422, "invalid_field", Some("workload")),
        ("POST", "/tenants/a/prefetch", r#"{"snapshot": 1}"#, 422, "unknown_field", Some("snapshot")),
        ("POST", "/tenants/a/prefetch?workload=x", r#"{"workload": "y"}"#, 422, "invalid_field", Some("workload")),
        ("GET", "/tenants/a/status?workload=..", "", 422, "invalid_field", Some("workload")),
        ("PUT", "/tenants/a", "", 422, "invalid_field", Some("metadata")),
        ("PUT", "/tenants/a", r#"{"metadata": []}"#, 422, "invalid_field", Some("metadata")),
        ("PUT", "/tenants/a/secrets/k", r#"{"value": 12345678}"#, 422, "invalid_field", Some("value")),
        ("GET", "/pools", "{}", 400, "unexpected_body", None),
        ("DELETE", "/tenants/a/secrets/k", "{}", 400, "unexpected_body", None),
    ];
    for (method, path, body, status, code, field) in rows {
        let mut request = server.request(method, path);
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json").body(body);
        }
        let found = problem(request.send().await.unwrap(), status, code).await;
        assert_eq!(found["field"].as_str(), field, "{method} {path} {body}");
        assert!(!found.to_string().contains("12345678"), "a value is not repeated: {found}");
    }
}

#[tokio::test]
async fn only_json_is_taken_and_not_too_much() {
    let server = Server::start(Auth::loopback()).await;
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
        for body in ["{}", ""] {
            let request = server.request("POST", "/tenants/a/release").header(header::CONTENT_TYPE, kind);
            let response = request.body(body).send().await.unwrap();
            problem(response, 415, "unsupported_media_type").await;
        }
    }
    // Well formed but for its size: a body within the limit is refused for its
    // content, with 422.
    let body = |bytes: usize| format!("{{\"nope\": \"{}\"}}", "x".repeat(bytes - 12));
    let rows = [
        ("/tenants/a/release", api::MAX_BODY_BYTES, 422),
        ("/tenants/a/release", api::MAX_BODY_BYTES + 1, 413),
        ("/tenants/a/claim", api::MAX_CLAIM_BYTES, 422),
        ("/tenants/a/claim", api::MAX_CLAIM_BYTES + 1, 413),
    ];
    for (path, bytes, status) in rows {
        assert_eq!(body(bytes).len(), bytes);
        let request = server.request("POST", path).header(header::CONTENT_TYPE, "application/json");
        let response = request.body(body(bytes)).send().await.unwrap();
        assert_eq!(response.status(), status, "{path} {bytes}");
    }
    // Without a length that could be looked at beforehand.
    let chunk = "x".repeat(0x8000);
    let chunked = format!(
        "POST /tenants/a/release HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Transfer-Encoding: chunked\r\n\r\n{}",
        format!("8000\r\n{chunk}\r\n").repeat(3)
    );
    let answer = server.raw(&chunked).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

/// Without tokens, a page that rebinds its name or sends from elsewhere gets nothing.
#[tokio::test]
async fn without_tokens_only_this_machine_is_served() {
    let server = Server::start(Auth::loopback()).await;
    let rows = [
        ("Host: localhost:3000\r\n", "200"),
        ("Host: [::1]\r\n", "200"),
        ("Host: rebound.example\r\n", "403"),
        ("Host: localhost\r\nOrigin: http://evil.example\r\n", "403"),
        ("Host: localhost\r\nOrigin: null\r\n", "403"),
    ];
    for (headers, status) in rows {
        let answer =
            server.raw(&format!("GET /healthz HTTP/1.1\r\n{headers}Connection: close\r\n\r\n")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{headers}: {answer}");
        assert!(!answer.to_ascii_lowercase().contains("access-control"), "{answer}");
    }
    // With tokens, names are the proxy's business; no browser adds a token by itself.
    let server = Server::start(tokens()).await;
    let answer = server.raw("GET /healthz HTTP/1.1\r\nHost: bh.example\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// A tenant's state is brought here by its own token, over HTTP and by the program.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenants_state_is_prefetched() {
    let mut world = World::new(&[("worker", WORKER)]);
    // More than any disk has: the cache gives way at once.
    world.cache.min_free_bytes = 1 << 60;
    let node = world.start().await;
    let server = Server::serve(tokens(), node, world).await;
    let (node, world) = &server.of;
    let post =
        async |path: &str, token: &str| server.request("POST", path).bearer_auth(token).send().await.unwrap();
    let claim = node.claim("alice").await.unwrap();
    node.write(&claim, "file", "content");
    assert_eq!(
        post("/tenants/alice/release", ALICE).await.json::<Value>().await.unwrap()["state"],
        "durable"
    );
    let evict = async || {
        support::node::wait_for("it is at rest", || node.node.tenancy.cache_size().trees == 1).await;
        node.node.tenancy.trim_cache().await;
        assert_eq!(node.node.tenancy.cache_size().trees, 0);
    };
    evict().await;
    let first = post("/tenants/alice/prefetch", ALICE).await;
    assert_eq!(first.status(), 200);
    let first = first.json::<Value>().await.unwrap();
    let fetched = first["fetched_bytes"].as_u64().unwrap();
    let expected = json!({
        "tenant": "alice", "workload": "worker", "cached": true, "snapshot": first["snapshot"],
        "fetched_bytes": fetched, "files": 1, "bytes": 7,
    });
    assert_eq!(first, expected);
    assert!(fetched > 0 && first["snapshot"].is_u64(), "{first}");
    let again = post("/api/v1/tenants/alice/prefetch?workload=worker", ADMIN).await;
    assert_eq!(again.json::<Value>().await.unwrap()["fetched_bytes"], 0);
    let none = post("/tenants/bob/prefetch", ADMIN).await.json::<Value>().await.unwrap();
    assert_eq!((&none["cached"], none.get("snapshot")), (&json!(false), None));
    problem(post("/tenants/bob/prefetch", ALICE).await, 403, "forbidden").await;
    problem(post("/tenants/alice/prefetch?workload=x", ALICE).await, 404, "unknown_workload").await;

    evict().await;
    world.store.set_down(true);
    let refused = post("/tenants/alice/prefetch", ALICE).await;
    assert_eq!(refused.headers()["retry-after"], "1");
    problem(refused, 503, "store_unavailable").await;
    world.store.set_down(false);

    let url = server.url("");
    let alice = [("BOILERHOUSE_URL", &*url), ("BOILERHOUSE_TOKEN", ALICE)];
    let (code, out, err) = program(&["prefetch", "alice"], &alice).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("alice worker fetched, snapshot "), "{out}");
    let (_, out, _) = program(&["prefetch", "alice", "--workload", "worker"], &alice).await;
    assert_eq!(out, "alice worker is on the server already\n");
    let (_, out, _) = program(&["prefetch", "alice", "--json"], &alice).await;
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["cached"], true);
    let admin = [("BOILERHOUSE_URL", &*url), ("BOILERHOUSE_TOKEN", ADMIN)];
    let (_, out, _) = program(&["prefetch", "bob"], &admin).await;
    assert_eq!(out, "bob worker has no state in the store\n");
}

#[tokio::test]
async fn a_request_that_has_begun_is_finished_at_shutdown() {
    let mut server = Server::start(Auth::loopback()).await;
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    let mut begun = TcpStream::connect(server.address).await.unwrap();
    // `Expect` makes the server say that it has begun to read the body.
    let head = "POST /tenants/a/release HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                Content-Length: 8\r\nExpect: 100-continue\r\n\r\n";
    begun.write_all(head.as_bytes()).await.unwrap();
    let mut go_on = [0; 25];
    tokio::time::timeout(LIMIT, begun.read_exact(&mut go_on)).await.unwrap().unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");

    server.shutdown.cancel();
    assert_eq!(read_all(&mut silent).await, "", "a connection without a request is closed");
    tokio::time::timeout(LIMIT, async {
        while TcpStream::connect(server.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("no connection is accepted any more");

    begun.write_all(b"{\"x\": 1}").await.unwrap();
    let answer = read_all(&mut begun).await;
    assert!(answer.starts_with("HTTP/1.1 422") && answer.contains("unknown_field"), "{answer}");
    tokio::time::timeout(LIMIT, &mut server.task).await.expect("the server ends").unwrap();
}

#[tokio::test]
async fn the_client_tells_problems_and_unreachable_servers_apart() {
    let server = Server::start(tokens()).await;
    let alice = TenantId::new("alice").unwrap();
    let client =
        |token: Option<&str>| Client::new(&server.url(api::PREFIX), token.map(Secret::new).as_ref()).unwrap();
    let error = client(None).status(&alice, None).await.unwrap_err();
    let client::Error::Problem(found) = error else { panic!("{error:?}") };
    assert_eq!((found.status, found.code.as_str()), (401, "unauthenticated"));
    assert!(found.request_id.is_some());
    let error = client(Some(ALICE)).put_tenant(&alice, &serde_json::Map::new()).await.unwrap_err();
    assert!(matches!(&error, client::Error::Problem(found) if found.code == "forbidden"), "{error:?}");

    let nobody = Client::new(NOBODY, None).unwrap();
    let error = nobody.pools().await.unwrap_err();
    assert!(matches!(error, client::Error::Unreachable { .. }), "{error:?}");
}

/// Runs the program with nothing but these in its environment.
async fn program(arguments: &[&str], environment: &[(&str, &str)]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_boilerhouse"));
    command.args(arguments).env_clear().envs(environment.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_exit_status_says_what_went_wrong() {
    let server = Server::start(tokens()).await;
    let url = server.url("");
    let alice = [("BOILERHOUSE_URL", &*url), ("BOILERHOUSE_TOKEN", ALICE)];

    let (code, out, _) = program(&["--help"], &[]).await;
    assert!(code == 0 && out.contains("Examples:") && out.contains("BOILERHOUSE_TOKEN"), "{out}");

    let (code, out, err) = program(&["pools"], &alice).await;
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.starts_with("error: ") && err.contains("(forbidden)"), "{err}");

    let (code, _, err) = program(&["pools", "--url", &url], &[]).await;
    assert!(code == 1 && err.contains("help: set BOILERHOUSE_TOKEN"), "{err}");

    let (code, _, err) = program(&["claim", "alice", "--secret", "key=hunter2"], &alice).await;
    assert!(code == 2 && err.contains("NAME=@FILE") && !err.contains("hunter2"), "{err}");

    for arguments in [&["claim"][..], &["claim", "a/b"], &["pools", "--token", "x"], &["pools", "--url", "x"]]
    {
        let (code, _, err) = program(arguments, &alice).await;
        assert_eq!(code, 2, "{arguments:?}: {err}");
    }

    // Not read because it is misspelt, and so not ignored.
    let misspelt = [("BOILERHOUSE_URL", &*url), ("BOILERHOUSE_TOKN", "hunter2")];
    let (code, _, err) = program(&["pools"], &misspelt).await;
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("BOILERHOUSE_TOKN: is no variable") && err.contains("BOILERHOUSE_TOKEN"), "{err}");
    assert!(!err.contains("hunter2"), "{err}");

    for (variable, command) in [("BOILERHOUSE_WORKLOADS_DIR", "check"), ("BOILERHOUSE_SCRIPTS_DIR", "serve")]
    {
        let (code, _, err) = program(&[command], &[(variable, "/no/such/folder")]).await;
        assert_eq!((code, &*err), (1, &*format!("error: {variable}: there is no folder /no/such/folder\n")));
    }

    let (code, _, err) = program(&["pools", "--url", NOBODY], &[]).await;
    assert!(code == 3 && err.contains("cannot be reached") && err.contains("boilerhouse serve"), "{err}");
}

/// Answers one request with a JSON text, whatever it asks.
async fn answer_once(body: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    });
    url
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_are_shown_with_every_count() {
    let (n, reason) = (7, "no such image\u{1b}[2J");
    let pool = PoolStatus {
        workload: "web".into(),
        spec_hash: "h".into(),
        target: n,
        max: n,
        ready: n,
        warming: n,
        creating: n,
        claimed: n,
        releasing: n,
        parked: n,
        stranded: n,
        lost: n,
        retiring: n,
        waiting: n,
        last_error: Some(reason.into()),
        retry_in_ms: None,
    };
    let body = serde_json::to_string(&[&pool]).unwrap();
    let url = answer_once(body.clone()).await;
    let (code, out, err) = program(&["pools"], &[("BOILERHOUSE_URL", &url)]).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out.matches('7').count(), 12, "each count has its column: {out}");
    assert!(out.contains("web: no such image\\u{1b}[2J"), "{out}");

    let url = answer_once(body).await;
    let (code, out, _) = program(&["pools", "--json", "--url", &url], &[]).await;
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, shown), (0, serde_json::to_value([pool]).unwrap()));
}
