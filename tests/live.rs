//! The main job on real Docker and a real S3 server: the promises as a user meets them.

mod support;

use std::{collections::BTreeSet, fs, time::Duration};

use serde_json::json;
use support::{
    images,
    live::{container, ensure_images, on_s3, workload},
    radosgw::Radosgw,
    s3_server::{BUCKET, S3Server},
    server::{Home, Server, below, docker, sh, wait_for},
};

const SOON: Duration = Duration::from_secs(60);

/// Describes a tree as a container sees it: type, mode, owner, size, time, digest, name.
fn tree(container: &str) -> String {
    sh(
        container,
        r#"cd /data; find . | sort | while IFS= read -r f; do
            if [ -L "$f" ]; then echo "l $(readlink "$f") $f";
            elif [ -d "$f" ]; then echo "d $(stat -c '%a %u:%g %Y' "$f") $f";
            else echo "f $(stat -c '%a %u:%g %s %Y' "$f") $(md5sum < "$f") $f"; fi; done"#,
    )
}

fn make_tree(container: &str) {
    sh(
        container,
        r#"cd /data; mkdir -p a/b/c empty; echo hello > a/hello; echo secret > a/b/private; chmod 600 a/b/private;
           printf '#!/bin/sh\n' > a/run; chmod 755 a/run; ln -s ../hello a/b/link; ln -s /etc/shadow a/absolute;
           dd if=/dev/urandom of=big bs=1024 count=3000 2>/dev/null; : > zero; chmod 700 empty;
           touch -d '2001-02-03 04:05:06' a/hello a/run; touch -d '2010-01-01 00:00:00' empty a/b/c; touch -d '2011-01-01' a/b a"#,
    );
}

/// Checks that nothing is left that has no owner, once things have settled: P7.
async fn nothing_leaks(home: &Home, server: &Server) {
    wait_for("every container is a slot's, every directory too", SOON, async || {
        let slots = server.get("/slots").await.body;
        let slots = slots.as_array().expect("a list");
        if slots.iter().any(|slot| !matches!(slot["phase"].as_str(), Some("ready" | "claimed"))) {
            return false;
        }
        let names: BTreeSet<String> =
            slots.iter().map(|slot| slot["container"].as_str().expect("a name").to_owned()).collect();
        let ids: BTreeSet<String> =
            slots.iter().map(|slot| slot["slot"].as_str().expect("an id").to_owned()).collect();
        let folders = |name: &str| -> BTreeSet<String> {
            let Ok(entries) = fs::read_dir(home.path(name)) else { return BTreeSet::new() };
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        let containers: BTreeSet<String> = home.containers().into_iter().collect();
        let known =
            |found: BTreeSet<String>| found.iter().all(|name| ids.contains(name) || name.starts_with('.'));
        containers == names
            && folders("states/slots") == ids
            && known(folders("secrets"))
            && known(folders("sockets"))
            && folders("states/staging").is_empty()
            && folders("states/set_aside").is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_tree_comes_back_on_another_server_from_s3_alone() {
    ensure_images().await;
    let mut home = Home::new("story", &[("worker", &workload("worker", ""))]);
    on_s3(&mut home);
    let server = home.start().await;
    let claim = server.claim("acme", json!({})).await;
    assert_eq!(claim["state"]["source"], "none");
    assert_eq!(claim["epoch"], 1);
    make_tree(&container(&claim));
    let before = tree(&container(&claim));
    let again = server.claim("acme", json!({})).await;
    assert_eq!(again["source"], "existing");
    assert_eq!(container(&again), container(&claim));
    let released = server.release("acme", "durable").await;
    assert_eq!(released["epoch"], 1);
    wait_for("the released container is gone", SOON, async || {
        !home.containers().contains(&container(&claim))
    })
    .await;
    // On this node the tree comes from the cache.
    let here = server.claim("acme", json!({})).await;
    assert_eq!((&here["state"]["source"], &here["epoch"]), (&json!("cache"), &json!(2)));
    assert_eq!(tree(&container(&here)), before);
    server.release("acme", "durable").await;
    server.stop().await;
    // A server that knows nothing but the store.
    fs::remove_dir_all(home.path("states")).expect("the state directory can be removed");
    let server = home.start().await;
    let there = server.claim("acme", json!({})).await;
    assert_eq!(there["state"]["source"], "store");
    assert_eq!(tree(&container(&there)), before);
    assert_eq!(there["epoch"], 3, "epochs go on from what the store knows");
    nothing_leaks(&home, &server).await;
}

/// The node's cache gives way, by itself, and what is prefetched into it is claimed without
/// a read of the store.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefetched_tenant_is_claimed_without_reading_the_store() {
    ensure_images().await;
    let s3 = S3Server::start().await;
    let mut home = Home::new("prefetch", &[("worker", &workload("worker", ""))]);
    let aws = s3.aws();
    home.set("BOILERHOUSE_STORE", &format!("s3://{BUCKET}/live"));
    home.set("AWS_ENDPOINT_URL", aws.endpoint_url.as_deref().expect("a place"));
    home.set("AWS_ACCESS_KEY_ID", aws.access_key_id.as_deref().expect("a key"));
    let secret = aws.secret_access_key.expect("a secret key");
    home.set("AWS_SECRET_ACCESS_KEY", std::str::from_utf8(secret.expose()).expect("text"));
    home.set("BOILERHOUSE_CACHE_MAX_MB", "5");
    let server = home.start().await;
    // Content, not the records that say what is newest.
    let contents = || s3.reads().iter().filter(|key| key.contains("/p/") || key.contains("/c/")).count();
    let claim = server.claim("acme", json!({})).await;
    make_tree(&container(&claim));
    let before = tree(&container(&claim));
    server.release("acme", "durable").await;
    let cached = || fs::read_dir(home.path("states/cache")).expect("the cache").count();
    assert_eq!(cached(), 1);
    // Each has some 3 MiB: for both of them there is no room.
    let claim = server.claim("other", json!({})).await;
    make_tree(&container(&claim));
    server.release("other", "durable").await;
    wait_for("the older tree has gone", SOON, async || cached() == 1).await;
    wait_for("it is counted", SOON, async || {
        let metrics = server.get("/metrics").await.body;
        let metrics = metrics.as_str().expect("text");
        metrics.contains("boilerhouse_cache_evictions_total{reason=\"size\"} 1")
            && metrics.contains("boilerhouse_cache_trees 1")
    })
    .await;

    let answer = server.post("/tenants/acme/prefetch", json!({})).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.body["fetched_bytes"].as_u64().is_some_and(|bytes| bytes > 3_000_000), "{answer:?}");
    assert!(contents() > 0);
    let reads = || s3.reads().iter().filter(|read| read.starts_with("live/t/")).count();
    let again = server.post("/tenants/acme/prefetch", json!({})).await;
    assert_eq!((&again.body["cached"], &again.body["fetched_bytes"]), (&json!(true), &json!(0)), "{again:?}");
    let before_claim = reads();
    let claim = server.claim("acme", json!({})).await;
    assert_eq!(claim["state"]["source"], "cache");
    assert_eq!(reads(), before_claim, "nothing of any tenant is read");
    assert_eq!(tree(&container(&claim)), before);
    server.release("acme", "durable").await;
    server.stop().await;

    // A server that knows nothing but the store.
    fs::remove_dir_all(home.path("states")).expect("the state directory can be removed");
    let server = home.start().await;
    let answer = server.post("/tenants/acme/prefetch", json!({ "workload": "worker" })).await;
    assert_eq!(answer.body["cached"], true, "{answer:?}");
    let before_claim = contents();
    let claim = server.claim("acme", json!({})).await;
    assert_eq!(claim["state"]["source"], "cache");
    assert_eq!(contents(), before_claim, "no content is read for the claim");
    assert_eq!(tree(&container(&claim)), before);
    nothing_leaks(&home, &server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_two_hundred_concurrent_claims_of_one_tenant_give_one_container() {
    ensure_images().await;
    let home = Home::new("one", &[("worker", &workload("worker", "pool: #{ min_idle: 2, max: 8 },"))]);
    let server = home.start().await;
    let server = &server;
    let claims =
        futures_util::future::join_all((0..200).map(|_| server.claim("acme", json!({ "wait_ms": 60000 }))))
            .await;
    let containers: BTreeSet<String> = claims.iter().map(container).collect();
    assert_eq!(containers.len(), 1, "{containers:?}");
    assert_eq!(claims.iter().filter(|claim| claim["source"] != "existing").count(), 1);
    let status = server.get("/tenants/acme/status").await.body;
    assert_eq!(status["claims"].as_array().map(Vec::len), Some(1), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_tenants_on_twenty_places_give_twenty_claims_and_thirty_refusals() {
    ensure_images().await;
    let mut home = Home::new("cap", &[("worker", &workload("worker", ""))]);
    home.set("BOILERHOUSE_MAX_CONTAINERS", "20");
    home.set("BOILERHOUSE_POOL_SIZE", "3");
    let server = home.start().await;
    let seen = std::sync::atomic::AtomicUsize::new(0);
    let done = std::sync::atomic::AtomicBool::new(false);
    let watch = async {
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            seen.fetch_max(home.containers().len(), std::sync::atomic::Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let claims = async {
        let all = futures_util::future::join_all((0..50).map(|n| {
            let server = &server;
            async move { server.post(&format!("/tenants/t{n}/claim"), json!({ "wait_ms": 45000 })).await }
        }))
        .await;
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        all
    };
    let (answers, ()) = tokio::join!(claims, watch);
    let claimed: Vec<_> = answers.iter().filter(|answer| answer.status == 200).collect();
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 503).collect();
    assert_eq!((claimed.len(), refused.len()), (20, 30), "{answers:?}\n{}", server.log());
    for answer in refused {
        assert_eq!(answer.body["code"], "pool_exhausted", "{answer:?}");
        assert!(answer.body["retry_after_ms"].as_u64().is_some_and(|ms| ms > 0), "{answer:?}");
    }
    let containers: BTreeSet<_> = claimed.iter().map(|answer| container(&answer.body)).collect();
    assert_eq!(containers.len(), 20);
    assert!(seen.into_inner() <= 20, "never more than twenty containers");
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_p3_with_the_store_down_nothing_is_lost_and_nobody_starts_empty() {
    ensure_images().await;
    let mut home = Home::new("down", &[("worker", &workload("worker", ""))]);
    on_s3(&mut home);
    let real = home.start().await;
    // A tenant whose state is in the store only.
    let claim = real.claim("far", json!({})).await;
    sh(&container(&claim), "echo kept > /data/file");
    real.release("far", "durable").await;
    real.stop().await;
    fs::remove_dir_all(home.path("states")).expect("the state directory can be removed");
    // The way to the store goes through a gate that the test can shut.
    let gate = support::gate::Gate::open(&Radosgw::find().aws.endpoint_url.expect("a place")).await;
    home.set("AWS_ENDPOINT_URL", &gate.endpoint());
    let server = home.start().await;
    let near = server.claim("near", json!({})).await;
    sh(&container(&near), "echo precious > /data/file");
    gate.shut();
    let answer = server.post("/tenants/far/claim", json!({ "wait_ms": 1000 })).await;
    assert_eq!((answer.status, &answer.body["code"]), (503, &json!("store_unavailable")), "{answer:?}");
    let pending = server.release("near", "pending").await;
    assert!(pending["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{pending}");
    let status = server.get("/tenants/near/status").await.body;
    assert_eq!(status["claims"][0]["state"], "dirty", "{status}");
    // A server that is killed meanwhile goes on with the save.
    server.kill();
    let server = home.start().await;
    gate.reopen();
    wait_for("the pending state is saved", SOON, async || {
        let status = server.get("/tenants/near/status").await.body;
        status["claims"].as_array().is_some_and(Vec::is_empty) && status["snapshots"]["worker"].is_object()
    })
    .await;
    let far = server.claim("far", json!({})).await;
    assert_eq!(sh(&container(&far), "cat /data/file"), "kept");
    server.stop().await;
    fs::remove_dir_all(home.path("states")).expect("the state directory can be removed");
    let server = home.start().await;
    let near = server.claim("near", json!({})).await;
    assert_eq!(near["state"]["source"], "store");
    assert_eq!(sh(&container(&near), "cat /data/file"), "precious");
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_kill_9_amid_claims_and_releases_leaves_nothing_without_an_owner() {
    ensure_images().await;
    let mut home = Home::new("kill", &[("worker", &workload("worker", "pool: #{ min_idle: 2, max: 8 },"))]);
    on_s3(&mut home);
    home.set("BOILERHOUSE_MAX_CONTAINERS", "8");
    let tenants = ["a", "b", "c", "d"];
    // What each tenant was last told is durable.
    let mut durable = std::collections::BTreeMap::new();
    for round in 0..6_u32 {
        let server = home.start().await;
        let work = async {
            let each = tenants.map(|tenant| {
                let server = &server;
                async move {
                    let mut last = None;
                    for step in 0..4 {
                        let claim = server.try_post(&format!("/tenants/{tenant}/claim"), json!({})).await?;
                        if claim.status != 200 {
                            continue;
                        }
                        let value = format!("{round}.{step}");
                        let name = container(&claim.body);
                        let script = format!("echo {value} > /data/value");
                        let written = std::process::Command::new("docker")
                            .args(["exec", &name, "/bin/sh", "-c", &script])
                            .output()
                            .is_ok_and(|output| output.status.success());
                        let released =
                            server.try_post(&format!("/tenants/{tenant}/release"), json!({})).await?;
                        if written && released.status == 200 && released.body["state"] == "durable" {
                            last = Some(value);
                        }
                    }
                    last
                }
            });
            futures_util::future::join_all(each).await
        };
        // The moment of the kill differs from round to round.
        let kill = tokio::time::sleep(Duration::from_millis(400 + u64::from(round) * 700));
        tokio::select! {
            values = work => {
                for (tenant, value) in tenants.iter().zip(values) {
                    if let Some(value) = value { durable.insert(*tenant, value); }
                }
            }
            () = kill => {}
        }
        server.kill();
        let server = home.start().await;
        for tenant in tenants {
            let claim = server.claim(tenant, json!({ "wait_ms": 60000 })).await;
            let value = sh(&container(&claim), "cat /data/value 2>/dev/null || true");
            if let Some(least) = durable.get(tenant) {
                assert!(!value.is_empty(), "{tenant} had {least}, and is empty now\n{}", server.log());
                assert!(
                    order(&value) >= order(least),
                    "{tenant} had {least}, and has {value} now\n{}",
                    server.log()
                );
            }
            server.release(tenant, "durable").await;
            if !value.is_empty() {
                durable.insert(tenant, value);
            }
        }
        nothing_leaks(&home, &server).await;
        server.kill();
    }
    assert!(!durable.is_empty(), "the rounds were too short to make anything durable");
}

fn order(value: &str) -> (u32, u32) {
    let (round, step) = value.split_once('.').expect("a value is round.step");
    (round.parse().expect("a round"), step.parse().expect("a step"))
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_survive_a_restart_untouched_and_strangers_are_left_alone() {
    ensure_images().await;
    let home = Home::new("adopt", &[("worker", &workload("worker", ""))]);
    let stranger = Home::new("stranger", &[]);
    let label = format!("boilerhouse.instance={}", stranger.instance());
    let foreign = format!("boilerhouse-{}-x", stranger.instance());
    docker(&["run", "--detach", "--name", &foreign, "--label", &label, images::APP, "/bin/sleep", "1000"]);
    let dangling = format!("boilerhouse-{}-dangling", home.instance());
    let server = home.start().await;
    let claim = server.claim("acme", json!({ "secrets": { "token": "hunter2" } })).await;
    sh(&container(&claim), "echo here > /data/file; echo $$ > /tmp/pid");
    let started = docker(&["inspect", "--format", "{{.State.StartedAt}}", &container(&claim)]);
    server.kill();
    let ours = format!("boilerhouse.instance={}", home.instance());
    docker(&["run", "--detach", "--name", &dangling, "--label", &ours, images::APP, "/bin/sleep", "1000"]);
    let server = home.start().await;
    let again = server.claim("acme", json!({})).await;
    assert_eq!((&again["source"], &again["epoch"]), (&json!("existing"), &claim["epoch"]));
    assert_eq!(container(&again), container(&claim));
    assert_eq!(started, docker(&["inspect", "--format", "{{.State.StartedAt}}", &container(&claim)]));
    assert_eq!(sh(&container(&claim), "cat /data/file /secrets/token"), "here\nhunter2");
    wait_for("the dangling container is gone", SOON, async || !home.containers().contains(&dangling)).await;
    assert_eq!(stranger.containers(), vec![foreign]);
    let differs = server.post("/tenants/acme/claim", json!({ "secrets": { "token": "other" } })).await;
    assert_eq!((differs.status, &differs.body["code"]), (409, &json!("claim_differs")), "{differs:?}");
    server.release("acme", "durable").await;
    nothing_leaks(&home, &server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p11_secrets_are_in_the_container_and_nowhere_else() {
    ensure_images().await;
    let mut home = Home::new("secrets", &[("worker", &workload("worker", ""))]);
    let key = home.path("master.key");
    fs::write(&key, "11".repeat(32)).expect("a key file");
    std::process::Command::new("chmod").arg("600").arg(&key).status().expect("chmod");
    home.set("BOILERHOUSE_MASTER_KEY_FILE", &key.display().to_string());
    let server = home.start().await;
    let put = server.put("/tenants/acme/secrets/stored", json!({ "value": "stored-VALUE-1" })).await;
    assert!(put.status < 300, "{put:?}");
    let names = server.get("/tenants/acme/secrets").await;
    assert!(
        names.body.to_string().contains("stored") && !names.body.to_string().contains("VALUE"),
        "{names:?}"
    );
    let claim = server.claim("acme", json!({ "secrets": { "given": "given-VALUE-2" } })).await;
    let name = container(&claim);
    assert_eq!(sh(&name, "cat /secrets/stored /secrets/given"), "stored-VALUE-1given-VALUE-2");
    assert_eq!(sh(&name, "stat -c '%a %u' /secrets/given"), "400 1000");
    let writes = std::process::Command::new("docker")
        .args(["exec", &name, "/bin/sh", "-c", "echo x > /secrets/x"])
        .output()
        .expect("docker runs");
    assert!(!writes.status.success(), "secrets are read-only inside");
    let inspected = docker(&["inspect", &name]);
    assert!(!inspected.contains("VALUE"));
    assert!(!claim.to_string().contains("VALUE"));
    server.release("acme", "durable").await;
    wait_for("the slot is gone", SOON, async || !home.containers().contains(&name)).await;
    wait_for("the secrets are gone", SOON, async || {
        below(&home.path("secrets")).iter().all(|path| !path.ends_with("given") && !path.ends_with("stored"))
    })
    .await;
    server.stop().await;
    for folder in ["states", "store"] {
        for path in below(&home.path(folder)) {
            let bytes = fs::read(home.path(folder).join(&path)).unwrap_or_default();
            let found = bytes.windows(5).any(|window| window == b"VALUE");
            assert!(!found, "a secret is in {folder}/{path}");
        }
    }
    let log = fs::read_to_string(home.path("log")).expect("the log");
    assert!(!log.contains("VALUE"), "a secret is in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_activation_sync_and_idleness_on_a_real_container() {
    ensure_images().await;
    let hooks = r#"
fn before_claim(ctx) {
    if ctx.tenant.metadata.plan == "suspended" { return ctx.reject("tenant_suspended", "this tenant is suspended"); }
    ctx.accept()
}
fn on_claim(ctx) {
    ctx.state.write("hello", `hello ${ctx.tenant.id}`);
    let out = ctx.exec(["cat", "/data/hello"]);
    ctx.set_output("greeting", out.stdout);
}
fn before_release(ctx) { ctx.exec(["sh", "-c", "echo bye > /data/bye"]); }
"#;
    let script = workload(
        "worker",
        r#"activation: #{ exec: ["sh", "-c", "echo active > /data/activated"] }, persist: #{ every_ms: 1500 },"#,
    ) + hooks;
    let mut home = Home::new("hooks", &[("worker", &script)]);
    home.set("BOILERHOUSE_IDLE_TIMEOUT_MS", "6000");
    let server = home.start().await;
    let put = server.put("/tenants/bad", json!({ "metadata": { "plan": "suspended" } })).await;
    assert!(put.status < 300, "{put:?}");
    let rejected = server.post("/tenants/bad/claim", json!({})).await;
    assert_eq!((rejected.status, &rejected.body["code"]), (403, &json!("tenant_suspended")), "{rejected:?}");
    let claim = server.claim("acme", json!({ "metadata": { "plan": "pro" } })).await;
    assert_eq!(claim["outputs"]["greeting"], "hello acme", "{claim}");
    let name = container(&claim);
    assert_eq!(sh(&name, "cat /data/activated"), "active");
    sh(&name, "echo one > /data/work");
    let synced = server.post("/tenants/acme/sync", json!({})).await;
    assert_eq!(synced.status, 200, "{synced:?}\n{}", server.log());
    assert!(synced.body["snapshot"].as_u64().is_some_and(|number| number >= 1), "{synced:?}");
    let first = synced.body["snapshot"].as_u64();
    wait_for("a periodic sync has saved", SOON, async || {
        let status = server.get("/tenants/acme/status").await.body;
        status["snapshots"]["worker"]["number"].as_u64() > first
    })
    .await;
    assert_eq!(docker(&["inspect", "--format", "{{.State.Paused}}", &name]), "false");
    wait_for("the idle claim is released and saved", SOON, async || {
        let status = server.get("/tenants/acme/status").await.body;
        status["claims"].as_array().is_some_and(Vec::is_empty)
    })
    .await;
    let back = server.claim("acme", json!({})).await;
    assert_eq!(sh(&container(&back), "cat /data/work /data/bye"), "one\nbye");
    nothing_leaks(&home, &server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_container_is_noticed_and_its_state_saved() {
    ensure_images().await;
    let home = Home::new("lost", &[("worker", &workload("worker", ""))]);
    let server = home.start().await;
    let claim = server.claim("acme", json!({})).await;
    sh(&container(&claim), "echo last > /data/words");
    docker(&["kill", &container(&claim)]);
    wait_for("the lost claim is over", SOON, async || {
        let status = server.get("/tenants/acme/status").await.body;
        status["claims"].as_array().is_some_and(Vec::is_empty)
    })
    .await;
    let back = server.claim("acme", json!({})).await;
    assert_ne!(container(&back), container(&claim));
    assert_eq!(sh(&container(&back), "cat /data/words"), "last");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_image_is_visible_and_other_pools_go_on() {
    ensure_images().await;
    let bad = workload("bad", "").replace(images::APP, "boilerhouse-test/absent:1");
    let home = Home::new("bad", &[("bad", &bad), ("good", &workload("good", ""))]);
    let server = home.start().await;
    server.claim("acme", json!({ "workload": "good", "wait_ms": 60000 })).await;
    wait_for("the reason is in /pools", SOON, async || {
        let pools = server.get("/pools").await.body;
        pools[0]["last_error"].as_str().is_some_and(|reason| reason.contains("boilerhouse-test/absent:1"))
    })
    .await;
    let refused = server.post("/tenants/acme/claim", json!({ "workload": "bad", "wait_ms": 500 })).await;
    assert_eq!((refused.status, &refused.body["code"]), (503, &json!("pool_exhausted")), "{refused:?}");
    assert!(refused.body.to_string().contains("boilerhouse-test/absent:1"), "{refused:?}");
    let which = server.post("/tenants/acme/claim", json!({})).await;
    assert_eq!((which.status, &which.body["code"]), (422, &json!("workload_required")), "{which:?}");
}
