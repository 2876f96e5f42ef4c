//! The object-store port on each of its adapters: the same suite in memory, in a
//! directory, on an S3 server in this process and on a real one; then what only
//! a server can do wrong.

mod support;
#[path = "stores/transport.rs"]
mod transport;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use boilerhouse::{
    clock::{Clock as _, SystemClock, random_hex},
    config::Aws,
    model::Secret,
    retry::Backoff,
    store::{
        Creation, Error, Listed, LocalStore, MAX_OBJECT_BYTES, MemoryStore, Parts, S3Store, SharedStore,
        Versioning, s3::Limits,
    },
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use support::{
    radosgw::Radosgw,
    s3_server::{BUCKET, DOMAIN, Fault, Request, S3Server, SECRET_KEY},
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
    run("memory", Arc::new(MemoryStore::with_clock(Arc::new(SystemClock)))).await;

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
            let is_there = |object: &Listed| object.key == *key && object.bytes == body.len() as u64;
            assert!(listed.iter().any(is_there), "{key} is not in {listed:?}");
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
        for key in ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a+", "a b", "a\nb", "ä", "a%2fb", &long]
        {
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
        for (prefix, after, limit) in
            [("../", None, 1), ("a b", None, 1), ("", Some("ä"), 1), ("", None, 1001)]
        {
            let outcome = store.list(prefix, after, limit).await;
            assert!(
                matches!(outcome, Err(Error::Refused { .. })),
                "{prefix:?} {after:?} {limit}: {outcome:?}"
            );
        }
        let huge = Bytes::from(vec![0; MAX_OBJECT_BYTES + 1]);
        assert!(matches!(store.put("huge", huge.clone()).await, Err(Error::Refused { .. })));
        assert!(matches!(store.put_parts("huge", parts([huge])).await, Err(Error::Refused { .. })));
        for outcome in [
            store.copy("a", "a b").await.map(|_| ()),
            store.copy("a b", "a").await.map(|_| ()),
            store.get_range("a b", 0, 1).await.map(|_| ()),
            store.get_range("a", 0, MAX_OBJECT_BYTES as u64 + 1).await.map(|_| ()),
            store.get_range("a", u64::MAX, 2).await.map(|_| ()),
            store.put_parts("a b", parts([text("x")])).await,
        ] {
            assert!(matches!(outcome, Err(Error::Refused { .. })), "{outcome:?}");
        }
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
async fn escaped_names_of_files_are_keys_of_their_own() {
    let all = [
        "A",
        "a",
        "READ=20Me.TXT",
        "read=20Me.TXT",
        "x.OBJ",
        "x.OBJ/y",
        "x",
        "x/y",
        ".TMP/a",
        ".TMP",
        "x.OBJ.OBJ/z",
    ];
    on_every_store(async |store| {
        for key in all {
            store.put(key, text(key)).await.unwrap();
        }
        let mut sorted = all;
        sorted.sort_unstable();
        assert_eq!(keys(&store.list("", None, 1000).await.unwrap()), sorted);
        assert_eq!(keys(&store.list("x.OBJ/", None, 1000).await.unwrap()), ["x.OBJ/y"]);
        for key in all {
            assert_eq!(store.get(key).await.unwrap(), Some(text(key)), "{key}");
            store.delete(key).await.unwrap();
            assert_eq!(store.get(key).await.unwrap(), None, "{key}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_listing_says_when_objects_were_written() {
    on_every_store(async |store| {
        // A listing may know whole seconds only, and the server has a clock of its own.
        let before = SystemClock.unix_ms() - 2_000;
        store.put("a", text("x")).await.unwrap();
        let listed = store.list("", None, 10).await.unwrap();
        let now = before..=SystemClock.unix_ms() + 2_000;
        assert!(now.contains(&listed[0].modified_ms), "{listed:?} is not in {now:?}");
    })
    .await;
}

#[tokio::test]
async fn copies_are_made_within_the_store() {
    on_every_store(async |store| {
        let body = noise(100_000);
        store.put("t/1/From=41", body.clone()).await.unwrap();
        store.put("t/2/to", text("before")).await.unwrap();
        assert!(store.copy("t/1/From=41", "t/2/to").await.unwrap());
        assert!(store.copy("t/1/From=41", "t/3/new").await.unwrap());
        store.delete("t/1/From=41").await.unwrap();
        for key in ["t/2/to", "t/3/new"] {
            assert_eq!(store.get(key).await.unwrap().as_ref(), Some(&body), "{key}");
        }
        assert!(!store.copy("absent", "t/2/to").await.unwrap());
        assert_eq!(store.get("t/2/to").await.unwrap(), Some(body), "a copy of nothing changes nothing");
    })
    .await;
}

/// As [`on_every_store`], where only S3 has the limits that a test sets.
async fn on_s3(limits: Limits, check: impl AsyncFn(SharedStore)) {
    let server = S3Server::start().await;
    // More than this, S3 does not copy in one request; here it is less.
    server.set_copy_limit(limits.copy_part_bytes as usize);
    check(connect(&server.aws(), BUCKET, "p", limits)).await;
    assert_eq!(server.uploads(), 0, "every upload came to its end");
    let radosgw = Radosgw::find();
    let prefix = format!("suite-{}", random_hex(&SystemClock, 8));
    let store = connect(&radosgw.aws, &radosgw.bucket, &prefix, limits);
    check(Arc::clone(&store)).await;
    assert_eq!(store.abort_uploads(SystemClock.unix_ms() + 60_000).await.expect("the store answers"), 0);
    empty(&store).await;
}

/// Of S3's own limit of 5 GiB a test has no room; the way past it is the same for any.
#[tokio::test]
async fn what_is_too_large_for_one_copy_is_copied_by_parts() {
    const PART: usize = 5 << 20;
    let limits = Limits { copy_part_bytes: PART as u64, ..Limits::default() };
    on_s3(limits, async |store| {
        for bytes in [PART - 1, PART, PART + 1, 2 * PART, 3 * PART + 17] {
            let body = noise(bytes);
            store.put("t/1/From=41", body.clone()).await.unwrap();
            store.put("t/2/to", text("before")).await.unwrap();
            assert!(store.copy("t/1/From=41", "t/2/to").await.unwrap(), "{bytes}");
            assert!(store.get("t/2/to").await.unwrap() == Some(body), "{bytes}");
        }
        assert!(!store.copy("absent", "t/2/to").await.unwrap());
    })
    .await;
}

#[tokio::test]
async fn a_copy_by_parts_is_of_one_version_and_leaves_nothing_half_done() {
    const PART: usize = 5 << 20;
    let limits = Limits { copy_part_bytes: PART as u64, ..patient() };
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "p", limits);
    store.put("from", noise(4 * PART)).await.unwrap();
    // Every part is tried again; the answer to the completion is lost.
    for fault in [Fault::SlowDown, Fault::FailAfter, Fault::DropAfter] {
        for request in [Request::Head, Request::Begin, Request::CopyPart, Request::Complete] {
            server.fail(request, fault, 2);
        }
        assert!(soon(store.copy("from", "to")).await.unwrap(), "{fault:?}");
        assert!(store.get("to").await.unwrap() == Some(noise(4 * PART)), "{fault:?}");
        store.delete("to").await.unwrap();
        server.heal();
        // An upload whose beginning was not answered is for the sweep.
        store.abort_uploads(SystemClock.unix_ms() + 60_000).await.unwrap();
        assert_eq!(server.uploads(), 0, "{fault:?}");
    }
    // Replaced, or gone, while it is copied.
    for gone in [false, true] {
        store.put("from", noise(4 * PART)).await.unwrap();
        server.fail(Request::CopyPart, Fault::Hang, 1);
        let requests = server.requests();
        let copying = tokio::spawn({
            let store = connect(&server.aws(), BUCKET, "p", Limits { attempt_ms: 500, ..limits });
            async move { store.copy("from", "to").await }
        });
        soon(async {
            while server.requests() < requests + 3 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let other = noise(4 * PART + 1);
        if gone {
            store.delete("from").await.unwrap()
        } else {
            store.put("from", other).await.unwrap()
        }
        let outcome = soon(copying).await.unwrap();
        assert!(matches!(outcome, Ok(false) | Err(Error::Unavailable { .. })), "gone: {gone}: {outcome:?}");
        assert_eq!(store.get("to").await.unwrap(), None, "gone: {gone}");
        assert_eq!(server.uploads(), 0, "gone: {gone}");
    }
}

/// P8: the server knows an upload no more whose completion it carried out; the object says so.
#[tokio::test]
async fn a_completion_whose_answer_is_lost_is_looked_up() {
    let limits = Limits { attempt_ms: 500, floor_bytes: 1 << 30, ..patient() };
    let whole = noise(20 << 20);
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "p", limits);
    for fault in [Fault::FailAfter, Fault::DropAfter, Fault::HangAfter] {
        server.fail(Request::Complete, fault, 1);
        let written = soon(store.put_parts("a", parts([whole.clone()]))).await;
        written.unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert!(server.objects()["p/a"] == whole, "{fault:?}");
    }
    // One that never happens is not taken for one that did, although there is an object.
    server.fail(Request::Complete, Fault::FailBefore, u64::MAX);
    let store = connect(&server.aws(), BUCKET, "p", Limits { call_ms: 15_000, ..patient() });
    let outcome = soon(store.put_parts("a", parts([whole]))).await;
    assert!(matches!(outcome, Err(Error::Unknown { .. })), "{outcome:?}");
}

#[tokio::test]
async fn ranges_are_read_and_end_where_the_object_does() {
    on_every_store(async |store| {
        store.put("a", text("0123456789")).await.unwrap();
        store.put("empty", Bytes::new()).await.unwrap();
        for (offset, bytes, expected) in [
            (0, 10, "0123456789"),
            (0, 3, "012"),
            (3, 4, "3456"),
            (9, 1, "9"),
            (8, 100, "89"),
            (10, 5, ""),
            (1_000_000, 5, ""),
            (4, 0, ""),
            (0, 0, ""),
        ] {
            let read = store.get_range("a", offset, bytes).await.unwrap();
            assert_eq!(read, Some(text(expected)), "{bytes} bytes from {offset}");
        }
        assert_eq!(store.get_range("empty", 0, 10).await.unwrap(), Some(Bytes::new()));
        assert_eq!(store.get_range("empty", 0, 0).await.unwrap(), Some(Bytes::new()));
        for (offset, bytes) in [(0, 1), (0, 0), (5, 5)] {
            assert_eq!(store.get_range("absent", offset, bytes).await.unwrap(), None);
        }
    })
    .await;
}

/// The parts of an object, as its writer gives them.
fn parts(parts: impl IntoIterator<Item = Bytes, IntoIter: Send + 'static>) -> Parts {
    stream::iter(parts.into_iter().map(Ok)).boxed()
}

#[tokio::test]
async fn objects_of_any_size_are_written_by_parts() {
    const MIB: usize = 1 << 20;
    let whole = noise(80 * MIB + 123);
    on_every_store(async |store| {
        let cut = |sizes: &[usize]| {
            let (mut start, mut cut) = (0, Vec::new());
            for size in sizes {
                cut.push(whole.slice(start..start + size));
                start += size;
            }
            (cut, whole.slice(..start))
        };
        for (key, sizes) in [
            ("none", vec![]),
            ("empty-parts", vec![0, 0]),
            ("small", vec![1, 0, 5]),
            ("one-part", vec![16 * MIB]),
            ("just-more", vec![16 * MIB, 1]),
            ("odd", vec![7 * MIB + 1, 30 * MIB, 1, 3 * MIB, 11]),
            ("large", vec![40 * MIB, 40 * MIB, 123]),
        ] {
            let (given, expected) = cut(&sizes);
            store.put_parts(key, parts(given)).await.unwrap();
            let listed = store.list(key, None, 1).await.unwrap();
            assert_eq!((keys(&listed), listed[0].bytes), (vec![key], expected.len() as u64));
            let mut read = 0;
            while read < expected.len() {
                let part = store.get_range(key, read as u64, 32 << 20).await.unwrap().unwrap();
                assert!(
                    !part.is_empty() && part == expected.slice(read..read + part.len()),
                    "{key} at {read}"
                );
                read += part.len();
            }
            store.delete(key).await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_source_that_breaks_writes_nothing_and_leaves_nothing() {
    on_every_store(async |store| {
        store.put("kept", text("before")).await.unwrap();
        for good in [vec![], vec![noise(100)], vec![noise(40 << 20)]] {
            let broken = good.into_iter().map(Ok).chain([Err(std::io::Error::other("the disk is gone"))]);
            let error =
                store.put_parts("kept", stream::iter(broken.collect::<Vec<_>>()).boxed()).await.unwrap_err();
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            assert!(error.to_string().contains("the disk is gone"), "{error}");
        }
        assert_eq!(store.get("kept").await.unwrap(), Some(text("before")));
        assert_eq!(store.abort_uploads(SystemClock.unix_ms() + 60_000).await.unwrap(), 0);
    })
    .await;
}

#[tokio::test]
async fn writes_that_died_are_swept_below_the_own_prefix_only() {
    let server = S3Server::start().await;
    let [ours, other] = ["ours", "others"].map(|prefix| connect(&server.aws(), BUCKET, prefix, patient()));
    server.set_page(2);
    for store in [&ours, &other] {
        for n in 0..5 {
            let forever = stream::once(async { Ok(noise(17 << 20)) }).chain(stream::pending()).boxed();
            let key = format!("half/{n}");
            let begun = server.uploads() + 1;
            let write = store.put_parts(&key, forever);
            tokio::pin!(write);
            soon(async {
                loop {
                    tokio::select! {
                        biased;
                        outcome = &mut write => panic!("an endless write ended: {outcome:?}"),
                        () = tokio::task::yield_now() => if server.uploads() == begun { break },
                    }
                }
            })
            .await;
        }
    }
    assert_eq!(server.uploads(), 10);
    assert_eq!(ours.abort_uploads(1_000).await.unwrap(), 0, "none is that old");
    assert_eq!(ours.abort_uploads(SystemClock.unix_ms() + 1_000).await.unwrap(), 5);
    assert_eq!(server.uploads(), 5, "another store's writes go on");
    assert!(server.objects().is_empty());
}

#[tokio::test]
async fn a_store_says_whether_it_keeps_what_was_removed() {
    on_every_store(async |store| assert_eq!(store.versioning().await.unwrap(), Versioning::Off)).await;
    let server = S3Server::start().await;
    let store = connect(&server.aws(), BUCKET, "p", patient());
    for (status, expected) in [(Some("Enabled"), Versioning::On), (Some("Suspended"), Versioning::Unknown)] {
        server.set_versioning(status);
        assert_eq!(store.versioning().await.unwrap(), expected);
    }
    server.stop().await;
    assert!(matches!(store.versioning().await, Err(Error::Unavailable { .. })));
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
        stall_ms: 300,
        floor_bytes: 16 << 20,
        backoff: Backoff { base_ms: 5, cap_ms: 20 },
        ..Limits::default()
    }
}

/// No deadline that a test could wait for, and short waits between attempts.
fn patient() -> Limits {
    Limits {
        call_ms: 3_600_000,
        attempt_ms: 3_600_000,
        stall_ms: 3_600_000,
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
    assert!(server.signed_headers().contains(&"x-amz-security-token".to_owned()), "it is signed");
    server.fail(Request::Get, Fault::SlowDown, u64::MAX);
    let error = store.get("a").await.unwrap_err();
    assert!(!format!("{error:?}").contains(token), "{error:?}");
}
