//! The object-store port on each of its adapters: the same suite in memory, in a
//! directory, on an S3 server in this process and on a real one; then what only
//! a server can do wrong.

mod support;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use boilerhouse::{
    clock::{SystemClock, random_hex},
    config::Aws,
    model::Secret,
    retry::Backoff,
    store::{
        Creation, Error, Listed, LocalStore, MAX_OBJECT_BYTES, MemoryStore, S3Store, SharedStore, s3::Limits,
    },
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use support::{
    radosgw::Radosgw,
    s3_server::{BUCKET, Fault, Request, S3Server, SECRET_KEY},
};

/// Nothing here waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(300);

// === the suite ===

/// Runs `check` on every store, each empty; says on which it failed.
async fn on_every_store(check: impl AsyncFn(SharedStore)) {
    let run = async |name: &str, store: SharedStore| {
        println!("on the store {name}");
        tokio::time::timeout(PATIENCE, check(store)).await.expect("the check ends");
    };
    run("memory", Arc::new(MemoryStore::new())).await;

    let dir = tempfile::tempdir().expect("a temporary directory");
    run("local", Arc::new(LocalStore::open(dir.path().join("store")).expect("the directory opens"))).await;

    let server = S3Server::start().await;
    run("s3 in process", connect(&server.aws(), BUCKET, "some/prefix", Limits::default())).await;

    let radosgw = Radosgw::find();
    let prefix = format!("suite-{}", random_hex(&SystemClock, 8));
    let store = connect(&radosgw.aws, &radosgw.bucket, &prefix, Limits::default());
    run("radosgw", Arc::clone(&store)).await;
    empty(&store).await;
}

fn connect(aws: &Aws, bucket: &str, prefix: &str, limits: Limits) -> SharedStore {
    Arc::new(S3Store::connect(bucket, prefix, aws, limits, Arc::new(SystemClock)).expect("usable parts"))
}

async fn empty(store: &SharedStore) {
    loop {
        let listed = store.list("", None, 1000).await.expect("a list");
        if listed.is_empty() {
            return;
        }
        stream::iter(listed)
            .for_each_concurrent(32, async |object| store.delete(&object.key).await.expect("a delete"))
            .await;
    }
}

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// Bytes without a pattern that compression or text handling could keep.
fn noise(length: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

fn keys(listed: &[Listed]) -> Vec<&str> {
    listed.iter().map(|object| object.key.as_str()).collect()
}

#[tokio::test]
async fn objects_are_written_read_replaced_and_removed() {
    on_every_store(async |store| {
        assert_eq!(store.get("t/1/a").await.unwrap(), None);
        store.put("t/1/a", text("one")).await.unwrap();
        assert_eq!(store.get("t/1/a").await.unwrap(), Some(text("one")));
        store.put("t/1/a", text("another")).await.unwrap();
        assert_eq!(store.get("t/1/a").await.unwrap(), Some(text("another")));
        for _ in 0..2 {
            store.delete("t/1/a").await.unwrap();
            assert_eq!(store.get("t/1/a").await.unwrap(), None);
        }
        assert_eq!(store.create("t/1/a", text("again")).await.unwrap(), Creation::Created);
        assert_eq!(store.create("t/1/a", text("late")).await.unwrap(), Creation::Exists);
        assert_eq!(store.get("t/1/a").await.unwrap(), Some(text("again")));
    })
    .await;
}

#[tokio::test]
async fn bodies_come_back_as_they_were() {
    let every_byte = Bytes::from((0..=255).collect::<Vec<u8>>());
    let bodies = [
        ("empty", Bytes::new()),
        ("lines", text("\r\n\n\r \t\0")),
        ("every-byte", every_byte),
        ("offloaded", noise(200_000)),
        ("large", noise(16 << 20)),
    ];
    on_every_store(async |store| {
        for (key, body) in &bodies {
            store.put(key, body.clone()).await.unwrap();
            let created = format!("created/{key}");
            assert_eq!(store.create(&created, body.clone()).await.unwrap(), Creation::Created);
            for key in [*key, created.as_str()] {
                let read = store.get(key).await.unwrap().unwrap_or_else(|| panic!("{key} is absent"));
                assert!(read == body, "{key}: {} bytes came back as {}", body.len(), read.len());
            }
        }
        let listed = store.list("", None, 1000).await.unwrap();
        for (key, body) in &bodies {
            let expected = Listed { key: (*key).to_owned(), bytes: body.len() as u64 };
            assert!(listed.contains(&expected), "{expected:?} is not in {listed:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_key_may_be_an_object_and_a_folder() {
    on_every_store(async |store| {
        for key in ["a", "a/b", "a/b/c"] {
            store.put(key, text(key)).await.unwrap();
        }
        store.delete("a/b").await.unwrap();
        assert_eq!(store.get("a").await.unwrap(), Some(text("a")));
        assert_eq!(store.get("a/b").await.unwrap(), None);
        assert_eq!(store.get("a/b/c").await.unwrap(), Some(text("a/b/c")));
    })
    .await;
}

/// P1 rests on this: of racing creates one wins, and its body is what is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_racing_creates_exactly_one_wins() {
    const TASKS: usize = 32;
    const KEYS: usize = 50;
    on_every_store(async |store| {
        let start = Arc::new(tokio::sync::Barrier::new(TASKS));
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let (store, start) = (Arc::clone(&store), Arc::clone(&start));
                tokio::spawn(async move {
                    let mut won = Vec::new();
                    for key in 0..KEYS {
                        start.wait().await;
                        let body = text(&format!("task {task} key {key}"));
                        if store.create(&format!("race/{key}"), body).await.unwrap() == Creation::Created {
                            won.push(key);
                        }
                    }
                    won
                })
            })
            .collect();
        let mut winners = vec![Vec::new(); KEYS];
        for (task, handle) in tasks.into_iter().enumerate() {
            for key in handle.await.unwrap() {
                winners[key].push(task);
            }
        }
        for (key, winners) in winners.into_iter().enumerate() {
            assert_eq!(winners.len(), 1, "key {key} was won by {winners:?}");
            let expected = text(&format!("task {} key {key}", winners[0]));
            assert_eq!(store.get(&format!("race/{key}")).await.unwrap(), Some(expected));
        }
    })
    .await;
}

#[tokio::test]
async fn lists_are_in_byte_order_below_a_prefix() {
    // Around '/', which sorts between '.' and '0'.
    let all = [
        "a", "a-", "a-b", "a.b", "a/b", "a/b-c", "a/b/c", "a/c", "a0", "a_", "aa/x", "b", "b/1/z", "b/10",
        "b/2",
    ];
    on_every_store(async |store| {
        for key in all.iter().rev() {
            store.put(key, text(key)).await.unwrap();
        }
        let below = |prefix: &str, after: Option<&str>| {
            let wanted = all.iter().filter(|key| key.starts_with(prefix));
            wanted.filter(|key| after.is_none_or(|after| **key > after)).copied().collect::<Vec<_>>()
        };
        for prefix in ["", "a", "a-", "a/", "a/b", "a/b/", "aa", "b/1", "c", "a/b/c/d", "zz/"] {
            let listed = store.list(prefix, None, 1000).await.unwrap();
            assert_eq!(keys(&listed), below(prefix, None), "prefix {prefix:?}");
            for after in all.iter().chain(&["0", "a/", "a/bb", "b/1/", "zz"]) {
                let listed = store.list(prefix, Some(after), 1000).await.unwrap();
                assert_eq!(keys(&listed), below(prefix, Some(after)), "prefix {prefix:?} after {after:?}");
            }
        }
        assert_eq!(keys(&store.list("", Some("a-"), 3).await.unwrap()), ["a-b", "a.b", "a/b"]);
        assert_eq!(store.list("", None, 0).await.unwrap(), []);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_lists_are_read_by_pages() {
    let all: BTreeSet<String> = (0..2_500).map(|n| format!("pages/{}/{n:04}", n % 3)).collect();
    on_every_store(async |store| {
        store.put("outside", Bytes::new()).await.unwrap();
        stream::iter(&all)
            .for_each_concurrent(32, async |key| store.put(key, text("x")).await.unwrap())
            .await;
        for limit in [1000, 333] {
            let (mut read, mut pages) = (Vec::new(), 0);
            loop {
                let after = read.last().map(|object: &Listed| object.key.clone());
                let page = store.list("pages/", after.as_deref(), limit).await.unwrap();
                assert!(page.len() <= limit);
                if page.is_empty() {
                    break;
                }
                pages += 1;
                read.extend(page);
            }
            assert!(keys(&read).into_iter().eq(all.iter()), "by {limit}: {} keys", read.len());
            assert_eq!(pages, all.len().div_ceil(limit), "a page before the last is full");
        }
    })
    .await;
}

#[tokio::test]
async fn keys_outside_the_alphabet_are_refused() {
    on_every_store(async |store| {
        let long = "k".repeat(600);
        for key in ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "A", "a b", "a\nb", "ä", "a%2fb", &long] {
            let outcomes = [
                store.get(key).await.map(|_| ()),
                store.put(key, text("x")).await,
                store.create(key, text("x")).await.map(|_| ()),
                store.delete(key).await,
            ];
            for outcome in outcomes {
                assert!(matches!(outcome, Err(Error::Refused { .. })), "{key:?}: {outcome:?}");
            }
        }
        for (prefix, after, limit) in [("../", None, 1), ("A", None, 1), ("", Some("ä"), 1), ("", None, 1001)]
        {
            let outcome = store.list(prefix, after, limit).await;
            assert!(
                matches!(outcome, Err(Error::Refused { .. })),
                "{prefix:?} {after:?} {limit}: {outcome:?}"
            );
        }
        let huge = Bytes::from(vec![0; MAX_OBJECT_BYTES + 1]);
        assert!(matches!(store.put("huge", huge).await, Err(Error::Refused { .. })));
        assert_eq!(store.list("", None, 1000).await.unwrap(), []);
    })
    .await;
}

#[tokio::test]
async fn a_probe_passes_and_leaves_nothing() {
    on_every_store(async |store| {
        store.probe().await.unwrap();
        assert_eq!(store.list("", None, 1000).await.unwrap(), []);
    })
    .await;
}

#[tokio::test]
async fn prefixes_keep_stores_apart() {
    let server = S3Server::start().await;
    let [short, long] = ["p", "p-2"].map(|prefix| connect(&server.aws(), BUCKET, prefix, Limits::default()));
    short.put("a", text("short")).await.unwrap();
    long.put("a", text("long")).await.unwrap();
    assert_eq!(keys(&short.list("", None, 10).await.unwrap()), ["a"]);
    assert_eq!(long.get("a").await.unwrap(), Some(text("long")));
    assert_eq!(server.objects().into_keys().collect::<Vec<_>>(), ["p-2/a", "p/a"]);
}

// === what a server can do wrong ===

/// Deadlines that a hanging server reaches soon.
fn impatient() -> Limits {
    Limits {
        call_ms: 1_000,
        attempt_ms: 100,
        backoff: Backoff { base_ms: 5, cap_ms: 20 },
        ..Limits::default()
    }
}

/// No deadline that a test could wait for, and short waits between attempts.
fn patient() -> Limits {
    Limits {
        call_ms: 3_600_000,
        attempt_ms: 3_600_000,
        backoff: Backoff { base_ms: 5, cap_ms: 20 },
        ..Limits::default()
    }
}

async fn soon<T>(call: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), call).await.expect("the call ends by itself")
}

/// What each call of the port answers, by its error.
async fn errors_of_every_call(store: &SharedStore) -> Vec<Error> {
    let key = "t/1";
    vec![
        soon(store.get(key)).await.expect_err("a get answered"),
        soon(store.list("t/", None, 10)).await.expect_err("a list answered"),
        soon(store.put(key, text("x"))).await.expect_err("a put answered"),
        soon(store.create(key, text("x"))).await.expect_err("a create answered"),
        soon(store.delete(key)).await.expect_err("a delete answered"),
        soon(store.probe()).await.expect_err("a probe answered"),
    ]
}

#[tokio::test]
async fn a_server_that_is_down_is_unavailable_and_never_empty() {
    let server = S3Server::start().await;
    let before = connect(&server.aws(), BUCKET, "", patient());
    before.put("t/1", text("kept")).await.unwrap();
    server.stop().await;
    let fresh = connect(&server.aws(), BUCKET, "", patient());
    for error in errors_of_every_call(&fresh).await {
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    }
    // One that has connections may not know whether its write arrived.
    for error in errors_of_every_call(&before).await {
        assert!(matches!(error, Error::Unavailable { .. } | Error::Unknown { .. }), "{error:?}");
    }
    server.resume().await;
    assert_eq!(soon(before.get("t/1")).await.unwrap(), Some(text("kept")));
}

#[tokio::test]
async fn a_missing_bucket_is_refused_and_never_empty() {
    let (server, radosgw) = (S3Server::start().await, Radosgw::find());
    for aws in [server.aws(), radosgw.aws] {
        let store = connect(&aws, "no-such-bucket-here", "p", patient());
        for error in errors_of_every_call(&store).await {
            assert!(matches!(error, Error::Refused { .. }), "{error:?}");
            assert!(error.to_string().contains("NoSuchBucket"), "{error}");
        }
    }
}

#[tokio::test]
async fn wrong_credentials_are_refused_with_the_code_and_without_the_secret() {
    let (server, radosgw) = (S3Server::start().await, Radosgw::find());
    for (aws, bucket) in [(server.aws(), BUCKET), (radosgw.aws, radosgw.bucket.as_str())] {
        let wrong = "wrong0secret1wrong2secret3";
        let wrong_secret = Aws { secret_access_key: Some(Secret::new(wrong)), ..aws.clone() };
        let wrong_id = Aws { access_key_id: Some("AKIAUNKNOWN".to_owned()), ..aws.clone() };
        for (aws, codes) in [
            (wrong_secret, ["SignatureDoesNotMatch", "SignatureDoesNotMatch"]),
            (wrong_id, ["NotSignedUp", "InvalidAccessKeyId"]),
        ] {
            for error in errors_of_every_call(&connect(&aws, bucket, "p", patient())).await {
                assert!(matches!(error, Error::Refused { .. }), "{error:?}");
                let text = format!("{error} {error:?}");
                assert!(codes.iter().any(|code| text.contains(code)), "{text}");
                for hidden in [wrong, SECRET_KEY, "Signature=", "AWS4-HMAC"] {
                    assert!(!text.contains(hidden), "{text}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_storm_of_errors_is_retried_to_success() {
    for fault in [Fault::SlowDown, Fault::Conflict, Fault::FailBefore, Fault::FailAfter, Fault::DropBefore] {
        let server = S3Server::start().await;
        let store = connect(&server.aws(), BUCKET, "", patient());
        for request in [Request::Get, Request::Put, Request::List, Request::Delete] {
            server.fail(request, fault, 5);
        }
        soon(store.put("a", text("x"))).await.unwrap();
        assert_eq!(soon(store.get("a")).await.unwrap(), Some(text("x")), "{fault:?}");
        assert_eq!(keys(&soon(store.list("", None, 10)).await.unwrap()), ["a"], "{fault:?}");
        soon(store.delete("a")).await.unwrap();
        assert!(server.objects().is_empty(), "{fault:?}");
        assert_eq!(server.requests(), 24, "{fault:?}: four calls of six attempts");
    }
}

/// P8: whatever becomes of the answers, what the store says is what is there.
#[tokio::test]
async fn a_create_whose_answers_are_lost_is_settled_or_unknown() {
    use Fault::{Conflict, DropAfter, DropBefore, FailAfter, FailBefore, Hang, HangAfter, SlowDown};
    const ALWAYS: u64 = u64::MAX;
    for (fault, times, expected, is_there) in [
        (DropAfter, 1, Some(Creation::Exists), true),
        (FailAfter, 1, Some(Creation::Exists), true),
        (HangAfter, 1, Some(Creation::Exists), true),
        (DropBefore, 1, Some(Creation::Created), true),
        (Hang, 1, Some(Creation::Created), true),
        (Conflict, 3, Some(Creation::Created), true),
        (SlowDown, ALWAYS, None, false),
        (FailBefore, ALWAYS, None, false),
        (DropBefore, ALWAYS, None, false),
        (Hang, ALWAYS, None, false),
    ] {
        let server = S3Server::start().await;
        let store = connect(&server.aws(), BUCKET, "", impatient());
        server.fail(Request::Put, fault, times);
        let outcome = soon(store.create("m/1", text("nonce"))).await;
        match (expected, &outcome) {
            (Some(expected), Ok(creation)) => assert_eq!(*creation, expected, "{fault:?}"),
            (None, Err(Error::Unknown { .. })) => {}
            _ => panic!("{fault:?} {times}: {outcome:?}"),
        }
        let read = store.get("m/1").await.unwrap();
        assert_eq!(read, is_there.then(|| text("nonce")), "{fault:?} {times}");
    }
    // A server that says each time that it did nothing leaves nothing unknown.
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "", impatient());
    server.fail(Request::Put, Conflict, ALWAYS);
    let outcome = soon(store.create("m/1", text("nonce"))).await;
    assert!(matches!(outcome, Err(Error::Unavailable { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_server_that_hangs_is_left_at_the_deadline() {
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "", impatient());
    for request in [Request::Get, Request::Put, Request::List, Request::Delete] {
        server.fail(request, Fault::Hang, u64::MAX);
    }
    let errors = errors_of_every_call(&store).await;
    for error in &errors {
        let is_write = matches!(error, Error::Unknown { operation: "put" | "create" | "delete", .. });
        let is_read = matches!(error, Error::Unavailable { operation: "get" | "list", .. });
        assert!(is_write || is_read, "{error:?}");
    }
    let large = soon(store.put("large", noise(1 << 20))).await;
    assert!(matches!(large, Err(Error::Unknown { .. })), "{large:?}");
    server.heal();
    assert_eq!(soon(store.get("t/1")).await.unwrap(), None);
}

#[tokio::test]
async fn a_body_that_breaks_is_read_again_and_never_short() {
    let server = S3Server::start().await;
    let body = noise(1 << 20);
    let store = connect(&server.aws(), BUCKET, "", impatient());
    store.put("a", body.clone()).await.unwrap();
    server.fail(Request::Get, Fault::BreakBody, 2);
    assert_eq!(soon(store.get("a")).await.unwrap().map(|read| read.len()), Some(body.len()));
    server.fail(Request::Get, Fault::BreakBody, u64::MAX);
    let outcome = soon(store.get("a")).await;
    assert!(matches!(outcome, Err(Error::Unavailable { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_server_that_ignores_conditions_is_found_out() {
    let server = S3Server::start().await;
    server.ignore_conditions(true);
    let store = connect(&server.aws(), BUCKET, "p", patient());
    let error = store.probe().await.unwrap_err();
    assert!(matches!(error, Error::Refused { operation: "probe", .. }), "{error:?}");
    assert!(error.to_string().contains("If-None-Match"), "{error}");
    assert!(server.objects().is_empty());
}

#[tokio::test]
async fn a_server_may_answer_shorter_pages_than_asked() {
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "p", patient());
    let all: Vec<_> = (0..20).map(|n| format!("{n:02}")).collect();
    for key in &all {
        store.put(key, Bytes::new()).await.unwrap();
    }
    server.set_page(7);
    assert_eq!(keys(&store.list("", None, 1000).await.unwrap()), all);
    assert_eq!(keys(&store.list("", Some("03"), 10).await.unwrap()), all[4..14]);
}

#[tokio::test]
async fn calls_share_connections_and_do_not_wait_for_each_other() {
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "p", patient());
    for n in 0..20 {
        store.put(&format!("{n}"), noise(1000)).await.unwrap();
        store.put(&format!("large-{n}"), noise(200_000)).await.unwrap();
        store.get(&format!("{n}")).await.unwrap();
        store.get("absent").await.unwrap();
    }
    assert_eq!(server.connections(), 1, "calls in a row use one connection");

    server.fail(Request::Get, Fault::Hang, 1);
    let seen = server.requests();
    let hanging = tokio::spawn({
        let store = Arc::clone(&store);
        async move { store.get("1").await }
    });
    soon(async {
        while server.requests() == seen {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let read =
        stream::iter(0..20).map(|n| store.get(if n % 2 == 0 { "2" } else { "3" })).buffer_unordered(20);
    let lengths: Vec<_> = soon(read.map(|body| body.unwrap().unwrap().len()).collect::<Vec<_>>()).await;
    assert_eq!(lengths, [1000; 20]);
    assert!(!hanging.is_finished());
    hanging.abort();
}

#[tokio::test]
async fn requests_under_way_are_bounded() {
    let server = S3Server::start().await;
    let limits = Limits { requests: 4, ..patient() };
    let store = connect(&server.aws(), BUCKET, "p", limits);
    store.put("a", noise(1000)).await.unwrap();
    let read = stream::iter(0..100).map(|_| store.get("a")).buffer_unordered(100);
    assert_eq!(soon(read.filter(|body| std::future::ready(body.is_ok())).count()).await, 100);
    assert!(server.connections() <= 4, "{} connections", server.connections());
}

#[tokio::test]
async fn a_session_token_is_sent_and_not_shown() {
    let server = S3Server::start().await;
    let token = "0token1token2token3";
    let aws = Aws { session_token: Some(Secret::new(token)), ..server.aws() };
    let store = connect(&aws, BUCKET, "p", impatient());
    assert_eq!(store.get("a").await.unwrap(), None);
    assert_eq!(server.session_token().as_deref(), Some(token));
    server.fail(Request::Get, Fault::SlowDown, u64::MAX);
    let error = store.get("a").await.unwrap_err();
    assert!(!format!("{error:?}").contains(token), "{error:?}");
}
