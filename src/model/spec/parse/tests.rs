//! Tables of specs and of what is said about them.

use serde_json::{Value, json};

use super::*;
use crate::model::spec::{Kind, fields};

const DEFAULTS: SpecDefaults = SpecDefaults { min_idle: 5, max: 50 };

fn minimal() -> Value {
    json!({ "id": "w", "image": "alpine" })
}

/// Lays the fields of `patch` over a minimal spec.
fn with(patch: &Value) -> Value {
    let mut spec = minimal();
    for (key, value) in patch.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

#[test]
fn a_minimal_spec_has_the_designs_defaults() {
    let spec = parse(&minimal(), &DEFAULTS).unwrap();
    assert_eq!((spec.name.as_str(), spec.image.as_str()), ("w", "alpine"));
    assert_eq!(spec.volumes, Volumes::default());
    assert_eq!(
        spec.resources,
        Resources { cpus: 1.0, memory_mb: 512, pids: 256, tmpfs_mb: 64, state_max_mb: None }
    );
    assert_eq!(spec.pool, PoolSizes { min_idle: 5, max: 50 });
    assert_eq!(
        spec.persist,
        Persist {
            on_release: true,
            every_ms: 0,
            exclude: vec![],
            keep_last: 10,
            keep_days: 0,
            max_pause_ms: 5000,
            layout: Layout::Snapshot,
        }
    );
    assert!(spec.read_only);
    assert_eq!(spec.network, Network::None);
    assert_eq!(spec.pull, PullPolicy::Missing);
    assert_eq!(spec.activation, Activation::None);
    assert_eq!(spec.stop_grace_ms, 10_000);
    assert!(spec.warnings().is_empty());
}

#[test]
fn the_original_readmes_example_is_read_in_both_spellings() {
    let camel = json!({
        "id": "my-worker",
        "name": "My Worker",
        "image": "myregistry/my-worker:latest",
        "volumes": {
            "state": { "containerPath": "/data", "mode": "rw" },
            "secrets": { "containerPath": "/secrets", "mode": "ro" },
            "comm": { "containerPath": "/comm", "mode": "rw" },
        },
        "environment": { "DATA_DIR": "/data", "LOG_LEVEL": "info" },
        "healthCheck": {
            "command": ["curl", "-f", "http://localhost:8080/health"],
            "intervalMs": 30000, "timeoutMs": 5000, "retries": 3,
        },
    });
    let snake: Value = serde_json::from_str(
        &camel
            .to_string()
            .replace("containerPath", "container_path")
            .replace("healthCheck", "health_check")
            .replace("intervalMs", "interval_ms")
            .replace("timeoutMs", "timeout_ms"),
    )
    .unwrap();
    let spec = parse(&camel, &DEFAULTS).unwrap();
    assert_eq!(spec, parse(&snake, &DEFAULTS).unwrap());
    assert_eq!(spec.volumes.state.as_ref().unwrap().container_path, "/data");
    assert_eq!(spec.volumes.secrets.as_ref().unwrap().mode, VolumeMode::Ro);
    assert_eq!(spec.health_check.as_ref().unwrap().timeout_ms, 5000);
    assert_eq!(spec.environment["LOG_LEVEL"], "info");
}

#[test]
fn a_json_round_trip_of_a_spec_is_the_same_spec() {
    let spec = parse(&full(), &DEFAULTS).unwrap();
    let again: WorkloadSpec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
    assert_eq!(spec, again);
    assert_eq!(spec.hash(), again.hash());
}

/// A spec with every field of the table.
fn full() -> Value {
    json!({
        "id": "w", "name": "W", "image": "alpine", "command": ["a"], "entrypoint": ["b"], "user": "1:1",
        "working_dir": "/", "environment": { "A": "b" }, "tmpfs": ["/scratch"], "read_only": false,
        "volumes": {
            "state": { "container_path": "/data", "mode": "rw" },
            "secrets": { "container_path": "/secrets", "mode": "ro" },
            "comm": { "container_path": "/comm", "mode": "rw" },
        },
        "health_check": { "command": ["true"], "interval_ms": 1000, "timeout_ms": 100, "retries": 1 },
        "resources": { "cpus": 2, "memory_mb": 64, "pids": 16, "tmpfs_mb": 8, "state_max_mb": 100 },
        "pool": { "min_idle": 1, "max": 2 },
        "persist": { "on_release": true, "every_ms": 1000, "exclude": ["cache/**"], "keep_last": 1, "keep_days": 30, "max_pause_ms": 10, "layout": "mirror" },
        "cap_add": ["cap_chown", "CHOWN"], "network": "app", "runtime": "runc", "pull": "never",
        "ports": { "http": 80 }, "stop_signal": "quit", "stop_grace_ms": 0,
        "activation": { "exec": ["kick"] }, "claim_waits": "activated", "park_ms": 0, "schedules": {},
        "http_allow": [], "timeouts": { "on_claim": 1000 }, "labels": { "team": "a" },
    })
}

#[test]
fn every_field_of_the_table_is_read() {
    // A field that the reader forgot would be accepted with any value.
    let spec = parse(&full(), &DEFAULTS).unwrap();
    assert_eq!(spec.cap_add, ["CHOWN"]);
    assert_eq!(spec.stop_signal.as_deref(), Some("SIGQUIT"));
    assert!((spec.resources.cpus - 2.0).abs() < f64::EPSILON);
    assert_eq!(spec.activation, Activation::Exec(vec!["kick".to_owned()]));
    for field in fields() {
        let mut value = full();
        let mut at = &mut value;
        for name in field.path.split('.') {
            at = &mut at[name];
        }
        assert!(!at.is_null(), "{} is in the full spec", field.path);
        // A negative number is wrong for every kind of field.
        *at = json!(-1);
        let violations = parse(&value, &DEFAULTS).expect_err(field.path);
        assert!(
            violations.iter().any(|violation| violation.path == field.path),
            "{}: {violations:?}",
            field.path
        );
        let allowed = &violations[0].allowed;
        assert!(!allowed.is_empty(), "{} says what is allowed", field.path);
        if let Kind::Integer { max, .. } = field.kind
            && max > 0
        {
            let mut value = full();
            let mut at = &mut value;
            for name in field.path.split('.') {
                at = &mut at[name];
            }
            *at = json!(max + 1);
            assert!(parse(&value, &DEFAULTS).is_err(), "{} has a top", field.path);
        }
    }
}

#[test]
fn null_is_the_same_as_leaving_a_field_out() {
    let value = with(&json!({ "user": null, "health_check": null, "pool": null, "activation": null }));
    assert_eq!(parse(&value, &DEFAULTS), parse(&minimal(), &DEFAULTS));
}

#[test]
fn one_size_of_the_pool_makes_the_others_default_give_way() {
    let sizes = |pool: Value| parse(&with(&json!({ "pool": pool })), &DEFAULTS).map(|spec| spec.pool);
    assert_eq!(sizes(json!({ "max": 2 })).unwrap(), PoolSizes { min_idle: 2, max: 2 });
    assert_eq!(sizes(json!({ "min_idle": 0 })).unwrap(), PoolSizes { min_idle: 0, max: 50 });
    assert!(sizes(json!({ "min_idle": 51 })).is_err());
}

/// Patches of the minimal spec: path, fragment of the problem, fragment of what is allowed.
#[test]
fn violations_name_path_problem_and_what_is_allowed() {
    let volume = |path: &str| json!({ "volumes": { "state": { "container_path": path } } });
    let rows: Vec<(Value, &str, &str, &str)> = vec![
        (json!({ "id": null }), "id", "required", "text"),
        (json!({ "id": "a/b" }), "id", "\"a/b\" is no id", "^[A-Za-z0-9]"),
        (json!({ "id": 7 }), "id", "expected text, found 7", "\"7\""),
        (json!({ "image": null }), "image", "required", "text"),
        (json!({ "image": "" }), "image", "empty", "name"),
        (json!({ "image": "A B" }), "image", "\"A B\"", "lower-case"),
        (json!({ "name": "" }), "name", "no title", "1 to 128"),
        (json!({ "helth_check": {} }), "helth_check", "did you mean `health_check`?", "health_check"),
        (json!({ "sync": {} }), "sync", "unknown field", "persist"),
        (json!({ "command": "sleep 1" }), "command", "expected a list", "e.g. [\"a\", \"b\"]"),
        (json!({ "command": [] }), "command", "empty list", "leave the field out"),
        (json!({ "command": ["a", 1] }), "command[1]", "expected text, found 1", "\"1\""),
        (json!({ "command": ["a\0b"] }), "command[0]", "zero byte", "without"),
        (json!({ "entrypoint": [""] }), "entrypoint", "empty program", "program"),
        (json!({ "user": "a b" }), "user", "no user", "user[:group]"),
        (json!({ "working_dir": "data" }), "working_dir", "not absolute", "absolute"),
        (json!({ "volumes": [] }), "volumes", "expected a map, found a list", "state, secrets, comm"),
        (json!({ "volumes": { "stat": {} } }), "volumes.stat", "did you mean `state`?", "secrets"),
        (json!({ "volumes": { "state": {} } }), "volumes.state.container_path", "required", "text"),
        (
            json!({ "volumes": { "state": { "container_path": "/a", "containerPath": "/a" } } }),
            "volumes.state.container_path",
            "given twice",
            "one of",
        ),
        (
            json!({ "volumes": { "state": { "container_path": "/a", "mode": "wr" } } }),
            "volumes.state.mode",
            "\"wr\"",
            "\"ro\", \"rw\"",
        ),
        (volume("data"), "volumes.state.container_path", "not absolute", "absolute"),
        (volume("/data/../x"), "volumes.state.container_path", "not normalised", "without"),
        (volume("/"), "volumes.state.container_path", "whole image", "below /"),
        (volume("/proc/1"), "volumes.state.container_path", "the kernel's", "another"),
        (volume("/etc"), "volumes.state.container_path", "hide", "below it"),
        (volume("/run/app"), "volumes.state.container_path", "tmpfs \"/run\"", "none holds another"),
        (
            json!({ "volumes": {
                "state": { "container_path": "/data" }, "secrets": { "container_path": "/data/s" } } }),
            "volumes.secrets.container_path",
            "state \"/data\" lie in one another",
            "none holds",
        ),
        (json!({ "tmpfs": ["/tmp"] }), "tmpfs[0]", "own tmpfs", "none holds"),
        (json!({ "tmpfs": ["/a", "/a/b"] }), "tmpfs[1]", "tmpfs \"/a\"", "none holds"),
        (json!({ "environment": { "A=B": "c" } }), "environment.A=B", "no variable name", "without ="),
        (json!({ "environment": { "A": 1 } }), "environment.A", "expected text, found 1", "\"1\""),
        (json!({ "environment": ["A=1"] }), "environment", "expected a map", "map of names to text"),
        (json!({ "health_check": {} }), "health_check.command", "required", "list of texts"),
        (
            json!({ "health_check": { "command": ["CMD", "true"] } }),
            "health_check.command",
            "Dockerfile",
            "program",
        ),
        (
            json!({ "health_check": { "command": ["true"], "interval": 1 } }),
            "health_check.interval",
            "unknown field",
            "interval_ms",
        ),
        (
            json!({ "healthCheck": { "command": ["true"], "intervalMs": 1 } }),
            "health_check.interval_ms",
            "1 is out of range",
            "from 100",
        ),
        (
            json!({ "health_check": { "command": ["true"], "retries": 1.5 } }),
            "health_check.retries",
            "expected a whole number, found 1.5",
            "from 1 to 100",
        ),
        (json!({ "resources": { "cpus": 0 } }), "resources.cpus", "0 is out of range", "0.01 to 1024"),
        (json!({ "resources": { "cpus": "1" } }), "resources.cpus", "expected a number", "0.01"),
        (json!({ "resources": { "memory_mb": 5 } }), "resources.memory_mb", "out of range", "from 6"),
        (json!({ "resources": { "memory": 5 } }), "resources.memory", "did you mean `memory_mb`?", "pids"),
        (json!({ "resources": { "pids": -1 } }), "resources.pids", "-1 is out of range", "from 2"),
        (
            json!({ "resources": { "state_max_mb": 1 } }),
            "resources.state_max_mb",
            "no volume",
            "volumes.state",
        ),
        (json!({ "pool": { "min_idle": 3, "max": 2 } }), "pool.min_idle", "more than pool.max", "0 to 2"),
        (json!({ "pool": { "max": 0 } }), "pool.max", "out of range", "from 1"),
        (json!({ "persist": { "every_ms": 1000 } }), "persist", "no volume", "volumes.state"),
        (json!({ "read_only": 1 }), "read_only", "expected true or false", "true, false"),
        (json!({ "cap_add": ["ALL"] }), "cap_add[0]", "the host", "one by one"),
        (json!({ "cap_add": ["CHWON"] }), "cap_add[0]", "did you mean \"CHOWN\"?", "capabilities(7)"),
        (json!({ "network": "host" }), "network", "share", "none"),
        (json!({ "network": "container:abc" }), "network", "share", "none"),
        (json!({ "network": "isolated" }), "network", "not supported yet", "none"),
        (json!({ "network": "a b" }), "network", "no network name", "none"),
        (json!({ "runtime": "runsc" }), "runtime", "not supported yet", "runc"),
        (json!({ "runtime": "kata" }), "runtime", "not known", "runc"),
        (json!({ "pull": "sometimes" }), "pull", "\"sometimes\"", "\"always\", \"missing\", \"never\""),
        (json!({ "ports": { "HTTP": 80 } }), "ports.HTTP", "no port name", "^[a-z]"),
        (json!({ "ports": { "http": 0 } }), "ports.http", "out of range", "from 1 to 65535"),
        (json!({ "stop_signal": "SIGSTOP" }), "stop_signal", "does not end", "SIGTERM"),
        (json!({ "stop_signal": "SIGTREM" }), "stop_signal", "did you mean \"SIGTERM\"?", "signal(7)"),
        (json!({ "stop_grace_ms": 600_001 }), "stop_grace_ms", "out of range", "600000"),
        (json!({ "activation": "exec" }), "activation", "what to run", "exec: [argv]"),
        (json!({ "activation": "start" }), "activation", "not supported yet", "\"restart\""),
        (json!({ "activation": "socket" }), "activation", "not supported yet", "\"restart\""),
        (json!({ "activation": "signal" }), "activation", "not supported yet", "\"restart\""),
        (json!({ "activation": { "exce": ["a"] } }), "activation.exce", "did you mean `exec`?", "exec"),
        (json!({ "activation": { "exec": "a" } }), "activation.exec", "expected a list", "list"),
        (json!({ "claim_waits": "healthy" }), "claim_waits", "not supported yet", "activated"),
        (json!({ "park_ms": 1 }), "park_ms", "not supported yet", "0"),
        (json!({ "schedules": { "a": "* * * * * *" } }), "schedules", "not supported yet", "empty"),
        (json!({ "http_allow": ["a"] }), "http_allow", "not supported yet", "empty"),
        (
            json!({ "timeouts": { "on_clam": 10 } }),
            "timeouts.on_clam",
            "did you mean `on_claim`?",
            "before_claim",
        ),
        (json!({ "timeouts": { "on_idle": 10 } }), "timeouts.on_idle", "not supported yet", "before_claim"),
        (json!({ "timeouts": { "on_claim": 9 } }), "timeouts.on_claim", "out of range", "from 10"),
        (
            json!({ "labels": { "Boilerhouse.x": "1" } }),
            "labels.Boilerhouse.x",
            "the server's",
            "another prefix",
        ),
        (json!({ "labels": { "a": true } }), "labels.a", "expected text, found true", "\"true\""),
    ];
    for (patch, path, problem, allowed) in rows {
        let violations = parse(&with(&patch), &DEFAULTS).expect_err(&patch.to_string());
        let found = violations.iter().find(|violation| violation.path == path);
        let found = found.unwrap_or_else(|| panic!("{patch}: no violation of {path} in {violations:?}"));
        assert!(found.problem.contains(problem), "{patch}: {found}");
        assert!(found.allowed.contains(allowed), "{patch}: {found}");
        assert_eq!(violations.len(), 1, "{patch}: {violations:?}");
    }
}

#[test]
fn state_rules_need_a_state_volume_to_be_reached() {
    let state = json!({ "state": { "container_path": "/data" } });
    let rows = [
        (json!({ "every_ms": 999 }), "persist.every_ms", "too often"),
        (json!({ "exclude": ["/abs"] }), "persist.exclude[0]", "outside"),
        (json!({ "exclude": ["a", "../b"] }), "persist.exclude[1]", "outside"),
        (json!({ "keep_last": 0 }), "persist.keep_last", "out of range"),
        (json!({ "keep_days": 3_651 }), "persist.keep_days", "out of range"),
        (json!({ "layout": "rclone" }), "persist.layout", "rclone"),
    ];
    for (persist, path, problem) in rows {
        let violations =
            parse(&with(&json!({ "volumes": state, "persist": persist })), &DEFAULTS).unwrap_err();
        assert_eq!(violations[0].path, path);
        assert!(violations[0].problem.contains(problem), "{violations:?}");
    }
}

#[test]
fn all_violations_are_reported_at_once() {
    let violations = parse(
        &json!({ "image": "", "bogus": 1, "pool": { "max": 0, "mni_idle": 1 }, "network": "host" }),
        &DEFAULTS,
    )
    .unwrap_err();
    let mut paths: Vec<_> = violations.iter().map(|violation| violation.path.as_str()).collect();
    paths.sort_unstable();
    assert_eq!(paths, ["bogus", "id", "image", "network", "pool.max", "pool.mni_idle"]);
    for other in [json!(null), json!([]), json!("x")] {
        assert_eq!(parse(&other, &DEFAULTS).unwrap_err().len(), 1, "{other}");
    }
}

#[test]
fn what_loosens_isolation_is_a_warning() {
    let warned = |patch: Value| {
        let spec = parse(&with(&patch), &DEFAULTS).unwrap();
        spec.warnings().into_iter().map(|warning| warning.path).collect::<Vec<_>>()
    };
    assert_eq!(warned(json!({ "network": "bridge" })), ["network"]);
    assert_eq!(warned(json!({ "ports": { "http": 80 } })), ["ports"]);
    assert_eq!(warned(json!({ "cap_add": ["SYS_ADMIN", "CHOWN"] })), ["cap_add"]);
    assert!(warned(json!({ "network": "app", "ports": { "http": 80 } })).is_empty());
}
