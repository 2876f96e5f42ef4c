//! What a road can do to requests, how much is under way, and who signs.

use boilerhouse::store::Store as _;

use super::*;
use crate::support::road::{Road, Way};

/// A server, and a store that reaches it by a road; deadlines as the row says.
async fn by_road(limits: Limits) -> (S3Server, Road, SharedStore) {
    let server = S3Server::start().await;
    let (road, store) = road_to(&server, limits).await;
    (server, road, store)
}

async fn road_to(server: &S3Server, limits: Limits) -> (Road, SharedStore) {
    let road = Road::to(server.aws().endpoint_url.as_deref().expect("an endpoint")).await;
    let aws = Aws { endpoint_url: Some(road.endpoint()), ..server.aws() };
    let store = connect(&aws, BUCKET, "p", limits);
    (road, store)
}

#[tokio::test]
async fn a_body_that_stalls_is_left_long_before_its_deadline() {
    // Without the watch over progress, these calls last an hour.
    let (server, road, store) = by_road(Limits { stall_ms: 200, ..patient() }).await;
    let body = noise(16 << 20);
    road.spoil([Way::StallUp(1 << 20), Way::StallUp(300_000)]);
    soon(store.put("a", body.clone())).await.unwrap();
    assert!(server.objects()["p/a"] == body);
    let (road, store) = road_to(&server, Limits { stall_ms: 200, ..patient() }).await;
    road.spoil([Way::StallDown(1 << 20), Way::StallDown(100_000)]);
    assert!(soon(store.get("a")).await.unwrap() == Some(body));
}

#[tokio::test]
async fn a_slow_body_that_moves_is_not_left() {
    let limits =
        Limits { attempt_ms: 1_500, call_ms: 1_500, stall_ms: 10_000, floor_bytes: 1 << 10, ..patient() };
    let (server, road, store) = by_road(limits).await;
    let body = noise(3 << 20);
    road.spoil([Way::Slow(16 << 10)]);
    soon(store.put("a", body.clone())).await.unwrap();
    assert!(soon(store.get("a")).await.unwrap() == Some(body));
    assert_eq!(server.requests(), 2, "one attempt each");
}

#[tokio::test]
async fn a_server_that_takes_connections_and_never_answers_is_left() {
    let (server, road, store) = by_road(impatient()).await;
    road.spoil([Way::Silent, Way::Silent]);
    soon(store.put("a", text("x"))).await.unwrap();
    let (road, store) = road_to(&server, impatient()).await;
    road.spoil([Way::Silent; 100]);
    assert!(matches!(soon(store.get("a")).await, Err(Error::Unavailable { .. })));
    assert!(matches!(soon(store.put("a", text("x"))).await, Err(Error::Unknown { .. })));
}

/// P3: whatever is left of an answer, it is the object, an error, and never less.
#[tokio::test]
async fn an_answer_that_is_cut_anywhere_is_asked_for_again() {
    let body = noise(300_000);
    for cut in [0, 1, 12, 40, 100, 200, 300, 500, 1_000, 65_536, 150_000, 299_999, 300_050] {
        let (server, road, store) = by_road(patient()).await;
        let direct = connect(&server.aws(), BUCKET, "p", patient());
        direct.put("a", body.clone()).await.unwrap();
        road.spoil([Way::CutDown(cut)]);
        assert!(soon(store.get("a")).await.unwrap().as_ref() == Some(&body), "cut at {cut}");
        let (_server, road, store) = by_road(patient()).await;
        road.spoil([Way::CutDown(cut)]);
        assert_eq!(soon(store.list("", None, 10)).await.unwrap(), [], "cut at {cut}");
        let (server, road, store) = by_road(patient()).await;
        road.spoil([Way::CutDown(cut)]);
        let outcome = soon(store.create("a", body.clone())).await;
        assert!(outcome.is_ok() && server.objects()["p/a"] == body, "cut at {cut}: {outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_objects_pass_while_large_ones_hang() {
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "p", patient());
    store.put("record", text("x")).await.unwrap();
    server.fail(Request::Put, Fault::Hang, 8);
    let body = noise(1 << 20);
    let large: Vec<_> = (0..40)
        .map(|n| {
            let (store, body) = (Arc::clone(&store), body.clone());
            tokio::spawn(async move { store.put(&format!("large/{n}"), body).await })
        })
        .collect();
    let before = server.requests();
    soon(async {
        while server.requests() < before + 8 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for _ in 0..50 {
        assert_eq!(soon(store.get("record")).await.unwrap(), Some(text("x")));
        soon(store.list("", None, 10)).await.unwrap();
        soon(store.create("record", text("y"))).await.unwrap();
    }
    assert!(large.iter().all(|task| !task.is_finished()), "the window is full");
    large.into_iter().for_each(|task| task.abort());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_under_way_are_bounded_whatever_the_state_holds() {
    const OBJECT: usize = 16 << 20;
    const OBJECTS: usize = 16;
    let server = S3Server::start().await;
    let store = S3Store::connect(BUCKET, "p", &server.aws(), patient(), Arc::new(SystemClock)).unwrap();
    let body = noise(OBJECT);
    // More than the budget, of which the server keeps little: few names.
    stream::iter(0..OBJECTS)
        .for_each_concurrent(None, async |n| {
            store.put(&format!("{}", n % 3), body.clone()).await.unwrap();
        })
        .await;
    let read =
        stream::iter(0..OBJECTS).map(|n| store.get_range(if n % 2 == 0 { "0" } else { "1" }, 0, 16 << 20));
    let lengths = read.buffer_unordered(OBJECTS).map(|read| read.unwrap().unwrap().len());
    assert_eq!(lengths.fold(0, async |sum, length| sum + length).await, OBJECT * OBJECTS);
    let (now, peak) = store.bytes_under_way();
    assert_eq!(now, 0);
    assert!(peak > 0 && peak <= 160 << 20, "{peak} bytes at a time");
}

#[tokio::test]
async fn a_server_with_too_much_to_do_gets_fewer_requests_at_a_time() {
    let server = S3Server::start().await;
    let store = S3Store::connect(BUCKET, "p", &server.aws(), patient(), Arc::new(SystemClock)).unwrap();
    store.put("a", text("x")).await.unwrap();
    let (before, _) = store.concurrency();
    server.fail(Request::Get, Fault::SlowDown, 40);
    let read = stream::iter(0..32).map(|_| store.get("a")).buffer_unordered(32);
    assert_eq!(soon(read.filter(|body| std::future::ready(body.is_ok())).count()).await, 32);
    let (after, _) = store.concurrency();
    assert!(after < before, "{before} became {after}");
}

/// A server that says when to come again is not asked before; one that asks for more than
/// the call has is not waited for.
#[tokio::test]
async fn retry_after_is_honoured() {
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "p", patient());
    store.put("a", text("x")).await.unwrap();
    server.fail(Request::Get, Fault::SlowDownFor(2), 1);
    let (began, requests) = (std::time::Instant::now(), server.requests());
    assert_eq!(soon(store.get("a")).await.unwrap(), Some(text("x")));
    assert!(began.elapsed() >= Duration::from_secs(2), "asked again after {:?}", began.elapsed());
    assert_eq!(server.requests(), requests + 2);

    let store = connect(&server.aws(), BUCKET, "p", Limits { call_ms: 20_000, ..patient() });
    server.fail(Request::Get, Fault::SlowDownFor(3_600), 1);
    let requests = server.requests();
    let error = soon(store.get("a")).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert_eq!(server.requests(), requests + 1, "there is no time for another attempt");
}

// === where the bucket is, and who the server is ===

/// In a process of its own, whose proxy the server is: no name server is needed.
#[tokio::test]
async fn a_bucket_may_be_in_the_host_name() {
    const IS_CHILD: &str = "TEST_BUCKET_IN_HOST";
    const ITSELF: &str = "transport::a_bucket_may_be_in_the_host_name";
    let server = S3Server::start().await;
    if std::env::var_os(IS_CHILD).is_some() {
        let endpoint_url = Some(format!("http://{DOMAIN}"));
        let aws = Aws { endpoint_url, force_path_style: Some(false), ..server.aws() };
        let store = connect(&aws, BUCKET, "some/prefix", patient());
        store.put("t/From=41", text("x")).await.unwrap();
        assert_eq!(store.create("t/1", text("y")).await.unwrap(), Creation::Created);
        assert!(store.copy("t/From=41", "t/to").await.unwrap());
        assert_eq!(store.get("t/to").await.unwrap(), Some(text("x")));
        assert_eq!(store.get("absent").await.unwrap(), None);
        assert_eq!(keys(&store.list("t/", None, 10).await.unwrap()), ["t/1", "t/From=41", "t/to"]);
        store.put_parts("t/parts", parts([noise(17 << 20)])).await.unwrap();
        assert_eq!(store.versioning().await.unwrap(), Versioning::Off);
        store.delete("t/1").await.unwrap();
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", ITSELF]).env(IS_CHILD, "1").env("no_proxy", "");
    child.env("http_proxy", server.aws().endpoint_url.expect("an endpoint"));
    let output = tokio::task::spawn_blocking(move || child.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let there = server.objects().into_keys().collect::<Vec<_>>();
    assert_eq!(there, ["some/prefix/t/From=41", "some/prefix/t/parts", "some/prefix/t/to"]);
}

#[tokio::test]
async fn a_server_is_trusted_by_the_authority_that_was_given_and_by_no_other() {
    let (server, authority) = S3Server::start_tls().await;
    let (_, stranger) = S3Server::start_tls().await;
    let trusting = |pem: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), pem).unwrap();
        let aws = Aws { ca_bundle: Some(file.path().to_owned()), ..server.aws() };
        // Read once, when the store is made.
        connect(&aws, BUCKET, "p", patient())
    };
    for pem in [authority.clone(), format!("{stranger}{authority}")] {
        let store = trusting(&pem);
        store.put("a", noise(1 << 20)).await.unwrap();
        store.put_parts("parts", parts([noise(17 << 20)])).await.unwrap();
        assert!(soon(store.get("a")).await.unwrap() == Some(noise(1 << 20)));
        assert_eq!(keys(&store.list("", None, 10).await.unwrap()), ["a", "parts"]);
    }
    let requests = server.requests();
    for store in [trusting(&stranger), connect(&server.aws(), BUCKET, "p", patient())] {
        let error = soon(store.get("a")).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        assert!(error.to_string().contains("certificate"), "{error}");
    }
    assert_eq!(server.requests(), requests, "nothing is sent to a stranger");
}

// === who signs ===

#[tokio::test]
async fn credentials_come_from_a_profile() {
    let server = S3Server::start().await;
    let given = server.aws();
    let (id, secret) = (given.access_key_id.clone().unwrap(), SECRET_KEY);
    let lines = format!("aws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!(
        "[default]\naws_access_key_id=no\naws_secret_access_key=no\n[mine]\n{lines}[profile other]\n{lines}"
    );
    std::fs::write(file.path(), text).unwrap();
    let bare = Aws { access_key_id: None, secret_access_key: None, ..given };
    let credentials = Some(file.path().to_owned());
    let mine = Aws {
        profile: Some("mine".to_owned()),
        shared_credentials_file: credentials.clone(),
        ..bare.clone()
    };
    let other = Aws { profile: Some("other".to_owned()), config_file: credentials.clone(), ..bare.clone() };
    for aws in [&mine, &other] {
        let store = connect(aws, BUCKET, "p", impatient());
        store.put("a", Bytes::from_static(b"x")).await.unwrap();
        store.delete("a").await.unwrap();
    }
    let absent = Aws { profile: Some("absent".to_owned()), ..mine };
    let Err(error) = S3Store::connect(BUCKET, "p", &absent, impatient(), Arc::new(SystemClock)) else {
        panic!("a profile that is not there was taken")
    };
    let text = error.to_string();
    assert!(text.contains("AWS_SHARED_CREDENTIALS_FILE") && text.contains("[absent]"), "{text}");
    assert!(!text.contains(SECRET_KEY), "{text}");
}

/// A deadline that only an endpoint without an answer reaches.
fn unhurried() -> Limits {
    Limits { call_ms: 5_000, attempt_ms: 5_000, ..impatient() }
}

/// An endpoint that hands out credentials, for paths that a test names.
struct Endpoint {
    address: std::net::SocketAddr,
    asked: Arc<std::sync::Mutex<Vec<String>>>,
    answer: Arc<std::sync::Mutex<Option<String>>>,
}

impl Endpoint {
    async fn start() -> Self {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port on loopback");
        let address = listener.local_addr().expect("a bound listener has an address");
        let (asked, answer) = (Arc::default(), Arc::<std::sync::Mutex<Option<String>>>::default());
        let (seen, given) = (Arc::<std::sync::Mutex<Vec<String>>>::clone(&asked), Arc::clone(&answer));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { break };
                    head.push(byte);
                }
                let head = String::from_utf8_lossy(&head).into_owned();
                let body = match head.split(' ').nth(1) {
                    Some("/latest/api/token") => Some("0session0".to_owned()),
                    Some("/latest/meta-data/iam/security-credentials/") => Some("role\n".to_owned()),
                    _ => given.lock().expect("no test panics with it").clone(),
                };
                seen.lock().expect("no test panics with it").push(head);
                let (status, body) = body.map_or(("500 no", String::new()), |body| ("200 OK", body));
                let answer = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self { address, asked, answer }
    }

    /// Sets what is handed out; `ends` is when it ends.
    fn hand_out(&self, aws: &Aws, token: &str, ends: &str) {
        let id = aws.access_key_id.as_deref().expect("the server has keys");
        let text = format!(
            "{{\"AccessKeyId\":\"{id}\",\"SecretAccessKey\":\"{SECRET_KEY}\",\"Token\":\"{token}\",\
             \"Expiration\":\"{ends}\",\"Code\":\"Success\"}}"
        );
        *self.answer.lock().expect("no test panics with it") = Some(text);
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("no test panics with it").clone()
    }
}

#[tokio::test]
async fn credentials_of_a_container_are_renewed_before_they_end() {
    let (server, endpoint) = (S3Server::start().await, Endpoint::start().await);
    let aws = Aws {
        access_key_id: None,
        secret_access_key: None,
        container_full_uri: Some(format!("http://{}/credentials", endpoint.address)),
        container_token: Some(Secret::new("0container0")),
        ..server.aws()
    };
    let store = connect(&aws, BUCKET, "p", unhurried());
    // None yet: no answer is taken for absence, and none holds what was asked.
    let error = store.get("a").await.unwrap_err();
    assert!(
        matches!(error, Error::Unavailable { .. }) && error.to_string().contains("credentials"),
        "{error:?}"
    );
    assert!(!format!("{error:?}").contains("0container0"), "{error:?}");

    // Of the past: asked for again with each call.
    endpoint.hand_out(&server.aws(), "first", "2001-01-01T00:00:00Z");
    let before = endpoint.asked().len();
    assert_eq!(store.get("a").await.unwrap(), None);
    assert_eq!(store.get("a").await.unwrap(), None);
    assert_eq!(endpoint.asked().len(), before + 2);
    assert_eq!(server.session_token().as_deref(), Some("first"));

    endpoint.hand_out(&server.aws(), "second", "2999-01-01T00:00:00Z");
    for _ in 0..3 {
        assert_eq!(store.get("a").await.unwrap(), None);
    }
    assert_eq!(server.session_token().as_deref(), Some("second"));
    assert_eq!(endpoint.asked().len(), before + 3, "asked once while they are valid");
    let heads = endpoint.asked();
    assert!(heads.iter().all(|head| head.contains("authorization: 0container0")), "{heads:?}");
}

#[tokio::test]
async fn credentials_of_an_instance_are_asked_for_with_a_session() {
    let (server, endpoint) = (S3Server::start().await, Endpoint::start().await);
    let aws = Aws {
        access_key_id: None,
        secret_access_key: None,
        metadata_endpoint: Some(format!("http://{}", endpoint.address)),
        ..server.aws()
    };
    endpoint.hand_out(&server.aws(), "token", "2999-01-01T00:00:00Z");
    let store = connect(&aws, BUCKET, "p", unhurried());
    store.put("a", text("x")).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), Some(text("x")));
    let heads = endpoint.asked();
    assert_eq!(heads.len(), 3, "{heads:?}");
    assert!(heads[0].starts_with("PUT /latest/api/token ") && heads[0].contains("ttl-seconds: "));
    assert!(heads[1..].iter().all(|head| head.contains("x-aws-ec2-metadata-token: 0session0")), "{heads:?}");
    assert!(heads[2].starts_with("GET /latest/meta-data/iam/security-credentials/role "), "{heads:?}");
}

#[tokio::test]
async fn authorities_that_cannot_be_used_are_named() {
    let server = S3Server::start().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [file.path().to_owned(), file.path().join("absent")] {
        let aws = Aws { ca_bundle: Some(path), ..server.aws() };
        let Err(error) = S3Store::connect(BUCKET, "p", &aws, impatient(), Arc::new(SystemClock)) else {
            panic!("authorities that are none were taken")
        };
        assert!(matches!(error, Error::Refused { .. }), "{error:?}");
        assert!(error.to_string().contains("AWS_CA_BUNDLE"), "{error}");
    }
}
