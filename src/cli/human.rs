//! Answers of the server as people read them.
//!
//! An answer is read field by field and a missing one is left out: an older
//! client shows what it knows of a newer server's answer.

use serde_json::Value;

use super::table::{bytes, printable, span, table};

/// `boilerhouse claim`
pub(super) fn claim(answer: &Value) -> String {
    let verb = if text(answer, "/source") == "existing" { "already holds" } else { "claimed" };
    let mut out = format!("{} {verb} {}", text(answer, "/tenant"), text(answer, "/workload"));
    out += &format!(" (epoch {}, {}", text(answer, "/epoch"), text(answer, "/source"));
    if let Some(total) = answer.pointer("/timings_ms/total").and_then(Value::as_f64) {
        out += &format!(", {total:.1} ms");
    }
    out += ")\n";
    let mut lines = vec![
        ("container".to_owned(), text(answer, "/container/name")),
        ("slot".to_owned(), text(answer, "/slot")),
    ];
    for (label, pointer) in [("address", "/container/address"), ("comm", "/endpoints/comm")] {
        if answer.pointer(pointer).is_some_and(|value| !value.is_null()) {
            lines.push((label.to_owned(), text(answer, pointer)));
        }
    }
    for (name, value) in entries(answer, "/endpoints/ports") {
        lines.push((format!("port {name}"), shown(value)));
    }
    let state = match text(answer, "/state/source").as_str() {
        "none" => "empty, the tenant has none yet".to_owned(),
        source => format!(
            "from the {source}: {} files, {}{}",
            text(answer, "/state/files"),
            bytes(number(answer, "/state/bytes")),
            answer.pointer("/state/snapshot").map_or(String::new(), |n| format!(", snapshot {}", shown(n))),
        ),
    };
    lines.push(("state".to_owned(), state));
    for (name, value) in entries(answer, "/outputs") {
        lines.push((format!("output {name}"), shown(value)));
    }
    out + labelled(&lines).as_str()
}

/// `boilerhouse release`
pub(super) fn release(answer: &Value) -> String {
    let of = format!("{} {}", text(answer, "/tenant"), text(answer, "/workload"));
    let epoch = match answer.pointer("/epoch") {
        Some(epoch) => format!(" (epoch {})", shown(epoch)),
        None => String::new(),
    };
    match text(answer, "/state").as_str() {
        "durable" => match answer.pointer("/snapshot") {
            Some(snapshot) => format!("{of} released{epoch}, state saved as snapshot {}\n", shown(snapshot)),
            None => format!("{of} released{epoch}, state saved\n"),
        },
        "pending" => {
            let reason = match text(answer, "/reason") {
                reason if reason.is_empty() => String::new(),
                reason => format!("  {}\n", reason),
            };
            format!("{of} released{epoch}, state kept on the server until it is saved\n{reason}")
        }
        "discarded" => format!("{of} released{epoch}, state discarded as the workload says\n"),
        "not_claimed" => format!("{of} is not claimed\n"),
        other => format!("{of} released{epoch}: {}\n", other),
    }
}

/// `boilerhouse sync`
pub(super) fn sync(answer: &Value) -> String {
    format!(
        "{} {} saved as snapshot {} (epoch {}, paused {:.1} ms, {} sent)\n",
        text(answer, "/tenant"),
        text(answer, "/workload"),
        text(answer, "/snapshot"),
        text(answer, "/epoch"),
        answer.pointer("/paused_ms").and_then(Value::as_f64).unwrap_or(0.0),
        bytes(number(answer, "/sent_bytes")),
    )
}

/// `boilerhouse prefetch`
pub(super) fn prefetch(answer: &Value) -> String {
    let of = format!("{} {}", text(answer, "/tenant"), text(answer, "/workload"));
    let is_cached = answer.pointer("/cached") == Some(&true.into());
    match (is_cached, number(answer, "/fetched_bytes")) {
        (true, 0) => format!("{of} is on the server already\n"),
        (true, fetched) => {
            format!("{of} fetched, snapshot {} ({} received)\n", text(answer, "/snapshot"), bytes(fetched))
        }
        (false, _) if answer.pointer("/reason").is_some() => {
            format!("{of} is not fetched: {}\n", text(answer, "/reason"))
        }
        (false, _) => format!("{of} has no state in the store\n"),
    }
}

/// `boilerhouse snapshots`
pub(super) fn snapshots(answer: &Value, now_ms: u64) -> String {
    let of = format!("{} {}", text(answer, "/tenant"), text(answer, "/workload"));
    let rows: Vec<Vec<String>> = list(answer, "/snapshots")
        .iter()
        .map(|snapshot| {
            let mut notes = Vec::new();
            if snapshot.pointer("/current") == Some(&true.into()) {
                notes.push("current".to_owned());
            }
            if let Some(from) = snapshot.pointer("/restored_from") {
                notes.push(format!("restored from {}", shown(from)));
            }
            if snapshot.pointer("/failed_claim") == Some(&true.into()) {
                notes.push("of a failed claim".to_owned());
            }
            if number(snapshot, "/skipped") > 0 {
                notes.push(format!("{} entries left out", text(snapshot, "/skipped")));
            }
            vec![
                text(snapshot, "/number"),
                text(snapshot, "/epoch"),
                text(snapshot, "/files"),
                bytes(number(snapshot, "/bytes")),
                ago(number(snapshot, "/created_ms"), now_ms),
                notes.join(", "),
            ]
        })
        .collect();
    if rows.is_empty() {
        return format!("{of} has no snapshot\n");
    }
    let mut out = table(&["SNAPSHOT", "EPOCH", "FILES", "SIZE", "AGE", "NOTE"], &rows);
    if let Some(before) = answer.pointer("/next_before") {
        out += &format!("more: --before {}\n", shown(before));
    }
    out
}

/// `boilerhouse restore` and `boilerhouse fork`
pub(super) fn restored(answer: &Value) -> String {
    let from = match answer.pointer("/from") {
        Some(tenant) => format!("{}'s snapshot {}", shown(tenant), text(answer, "/restored_from")),
        None => format!("snapshot {}", text(answer, "/restored_from")),
    };
    format!(
        "{} {} begins with {from} from now on, as snapshot {} ({} files, {})\n",
        text(answer, "/tenant"),
        text(answer, "/workload"),
        text(answer, "/snapshot"),
        text(answer, "/files"),
        bytes(number(answer, "/bytes")),
    )
}

/// `boilerhouse state resolve`
pub(super) fn resolved(answer: &Value) -> String {
    let of = format!("{} {}", text(answer, "/tenant"), text(answer, "/workload"));
    let snapshot = answer.pointer("/snapshot").map(shown);
    if text(answer, "/kept") == "theirs" {
        let mut out = match snapshot {
            Some(snapshot) => format!("{of} begins with the store's snapshot {snapshot}\n"),
            None => format!("{of} begins empty: the store has no snapshot\n"),
        };
        if let Some(path) = answer.pointer("/set_aside") {
            out += &format!("  the server's state is set aside in {}\n", shown(path));
        }
        if answer.pointer("/discarded") == Some(&true.into()) {
            out += "  the server's state is removed\n";
        }
        return out;
    }
    let mut out = match snapshot {
        Some(snapshot) => format!("{of} begins with the server's state, saved as snapshot {snapshot}\n"),
        None => format!("{of}: the server's state is kept until it is saved: {}\n", text(answer, "/reason")),
    };
    if let Some(replaced) = answer.pointer("/replaced") {
        let replaced = shown(replaced);
        out +=
            &format!("  snapshot {replaced} was the newest before; `boilerhouse restore` goes back to it\n");
    }
    out
}

/// `boilerhouse erase`
pub(super) fn erased(answer: &Value) -> String {
    let mut out = format!(
        "{} erased: {} objects of {} workloads removed from the store\n",
        text(answer, "/tenant"),
        text(answer, "/objects"),
        list(answer, "/workloads").len(),
    );
    for path in list(answer, "/set_aside") {
        out += &format!("  {} removed\n", shown(path));
    }
    if text(answer, "/proof") != "empty_listing" {
        out += "  the bucket may keep older versions of what was removed: that it is gone cannot be proved here\n";
    }
    out
}

/// `boilerhouse state gc`
pub(super) fn collected(answer: &Value) -> String {
    format!(
        "{} states looked at: {} records and {} objects removed, {}; {} busy, {} failed, {} uploads given up\n",
        text(answer, "/keys"),
        text(answer, "/records"),
        text(answer, "/objects"),
        bytes(number(answer, "/bytes")),
        text(answer, "/busy"),
        text(answer, "/failed"),
        text(answer, "/uploads"),
    )
}

/// `boilerhouse status`
pub(super) fn status(answer: &Value, now_ms: u64) -> String {
    let claims = list(answer, "/claims");
    let mut out = if claims.is_empty() {
        format!("{} has no claim\n", text(answer, "/tenant"))
    } else {
        let rows: Vec<Vec<String>> = claims
            .iter()
            .map(|claim| {
                let note = match (claim.pointer("/superseded_by"), text(claim, "/last_error")) {
                    (Some(epoch), _) => format!("superseded by epoch {}", shown(epoch)),
                    (None, error) if error.is_empty() && claim.pointer("/failed") == Some(&true.into()) => {
                        "the claim failed".to_owned()
                    }
                    (None, error) => error,
                };
                vec![
                    text(claim, "/workload"),
                    text(claim, "/epoch"),
                    text(claim, "/state"),
                    text(claim, "/source"),
                    text(claim, "/slot"),
                    ago(number(claim, "/created_ms"), now_ms),
                    ago(number(claim, "/active_ms"), now_ms),
                    note,
                ]
            })
            .collect();
        table(&["WORKLOAD", "EPOCH", "STATE", "SOURCE", "SLOT", "AGE", "IDLE", "NOTE"], &rows)
    };
    let snapshots = entries(answer, "/snapshots");
    if !snapshots.is_empty() {
        let rows: Vec<Vec<String>> = snapshots
            .iter()
            .map(|(workload, snapshot)| {
                vec![
                    (*workload).to_owned(),
                    text(snapshot, "/number"),
                    text(snapshot, "/epoch"),
                    text(snapshot, "/files"),
                    bytes(number(snapshot, "/bytes")),
                    ago(number(snapshot, "/created_ms"), now_ms),
                ]
            })
            .collect();
        out.push('\n');
        out += &table(&["WORKLOAD", "SNAPSHOT", "EPOCH", "FILES", "SIZE", "AGE"], &rows);
    }
    out
}

/// `boilerhouse pools`
pub(super) fn pools(answer: &Value) -> String {
    const COLUMNS: [&str; 12] = [
        "target",
        "ready",
        "warming",
        "creating",
        "claimed",
        "releasing",
        "parked",
        "stranded",
        "lost",
        "retiring",
        "max",
        "waiting",
    ];
    let pools = list(answer, "");
    if pools.is_empty() {
        return "there are no pools\n".to_owned();
    }
    let header: Vec<String> = ["workload"].iter().chain(&COLUMNS).map(|name| name.to_uppercase()).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let rows: Vec<Vec<String>> = pools
        .iter()
        .map(|pool| {
            let counts = COLUMNS.iter().map(|column| number(pool, &format!("/{column}")).to_string());
            [text(pool, "/workload")].into_iter().chain(counts).collect()
        })
        .collect();
    let mut out = table(&header, &rows);
    for pool in pools {
        let error = text(pool, "/last_error");
        if !error.is_empty() {
            out += &format!("\n{}: {}", text(pool, "/workload"), error);
            if let Some(ms) = pool.pointer("/retry_in_ms").and_then(Value::as_u64) {
                out += &format!(" (next attempt in {})", span(ms));
            }
            out.push('\n');
        }
    }
    out
}

/// `boilerhouse slots`
pub(super) fn slots(answer: &Value, now_ms: u64) -> String {
    let slots = list(answer, "");
    if slots.is_empty() {
        return "there are no slots\n".to_owned();
    }
    let rows: Vec<Vec<String>> = slots
        .iter()
        .map(|slot| {
            vec![
                text(slot, "/slot"),
                text(slot, "/workload"),
                text(slot, "/phase"),
                match text(slot, "/tenant") {
                    tenant if tenant.is_empty() => "-".to_owned(),
                    tenant => tenant,
                },
                text(slot, "/container"),
                ago(number(slot, "/created_ms"), now_ms),
            ]
        })
        .collect();
    table(&["SLOT", "WORKLOAD", "PHASE", "TENANT", "CONTAINER", "AGE"], &rows)
}

/// `boilerhouse workloads`
pub(super) fn workloads(answer: &Value) -> String {
    let workloads = list(answer, "");
    if workloads.is_empty() {
        return "there are no workloads\n".to_owned();
    }
    let short = |hash: String| hash.chars().take(12).collect::<String>();
    let rows: Vec<Vec<String>> = workloads
        .iter()
        .map(|workload| {
            let hooks: Vec<String> = list(workload, "/hooks").iter().map(shown).collect();
            vec![
                text(workload, "/id"),
                text(workload, "/name"),
                text(workload, "/spec/image"),
                short(text(workload, "/revision")),
                if hooks.is_empty() { "-".to_owned() } else { hooks.join(", ") },
            ]
        })
        .collect();
    table(&["ID", "NAME", "IMAGE", "REVISION", "HOOKS"], &rows)
}

/// `boilerhouse secrets list`
pub(super) fn secret_names(answer: &Value) -> String {
    let names = list(answer, "/names");
    if names.is_empty() {
        return "no secrets are stored\n".to_owned();
    }
    names.iter().map(|name| shown(name) + "\n").collect()
}

fn labelled(lines: &[(String, String)]) -> String {
    let lines: Vec<(String, &String)> =
        lines.iter().map(|(label, value)| (printable(label), value)).collect();
    let width = lines.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    lines.iter().map(|(label, value)| format!("  {label:<width$}  {value}\n")).collect()
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).map(shown).unwrap_or_default()
}

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn entries<'a>(value: &'a Value, pointer: &str) -> Vec<(&'a str, &'a Value)> {
    let entries = value.pointer(pointer).and_then(Value::as_object);
    entries.map(|map| map.iter().map(|(key, value)| (key.as_str(), value)).collect()).unwrap_or_default()
}

/// Shows a value, safe for a terminal.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => printable(text),
        other => printable(&other.to_string()),
    }
}

fn ago(ms: u64, now_ms: u64) -> String {
    if ms == 0 { "-".to_owned() } else { span(now_ms.saturating_sub(ms)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_claim_is_told_with_what_one_needs_next() {
        let answer = json!({
            "tenant": "alice", "workload": "web", "epoch": 3, "source": "warm", "slot": "s1",
            "container": {"id": "0123", "name": "bh-web-s1", "address": "172.18.0.5"},
            "endpoints": {"comm": "/run/c", "ports": {"http": "172.18.0.5:80"}},
            "state": {"source": "cache", "snapshot": 7, "bytes": 2048, "files": 2},
            "outputs": {"url": "http://x"}, "timings_ms": {"total": 4.25},
        });
        assert_eq!(
            claim(&answer),
            "alice claimed web (epoch 3, warm, 4.2 ms)\n\
             \x20 container   bh-web-s1\n\
             \x20 slot        s1\n\
             \x20 address     172.18.0.5\n\
             \x20 comm        /run/c\n\
             \x20 port http   172.18.0.5:80\n\
             \x20 state       from the cache: 2 files, 2.0 KiB, snapshot 7\n\
             \x20 output url  http://x\n"
        );
    }

    #[test]
    fn a_decision_says_what_stands_and_where_the_rest_is() {
        let answer = |more: Value| {
            let mut answer = json!({"tenant": "a", "workload": "w"});
            answer.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            answer
        };
        let saved = answer(json!({"kept": "ours", "state": "durable", "snapshot": 9, "replaced": 8}));
        assert_eq!(
            resolved(&saved),
            "a w begins with the server's state, saved as snapshot 9\n\
             \x20 snapshot 8 was the newest before; `boilerhouse restore` goes back to it\n"
        );
        let pending = answer(json!({"kept": "ours", "state": "pending", "reason": "no answer"}));
        assert_eq!(resolved(&pending), "a w: the server's state is kept until it is saved: no answer\n");
        let aside = answer(json!({"kept": "theirs", "snapshot": 8, "set_aside": "/states/set_aside/x.1"}));
        assert_eq!(
            resolved(&aside),
            "a w begins with the store's snapshot 8\n\
             \x20 the server's state is set aside in /states/set_aside/x.1\n"
        );
        let removed = answer(json!({"kept": "theirs", "discarded": true}));
        assert_eq!(
            resolved(&removed),
            "a w begins empty: the store has no snapshot\n  the server's state is removed\n"
        );
    }

    #[test]
    fn a_release_says_what_became_of_the_state() {
        let answer = |state: &str| json!({"tenant": "a", "workload": "w", "epoch": 3, "state": state});
        let durable = json!({"tenant": "a", "workload": "w", "epoch": 3, "state": "durable", "snapshot": 9});
        assert_eq!(release(&durable), "a w released (epoch 3), state saved as snapshot 9\n");
        let mut pending = answer("pending");
        pending["reason"] = "the store\nis away".into();
        assert_eq!(
            release(&pending),
            "a w released (epoch 3), state kept on the server until it is saved\n  the store\\nis away\n"
        );
        let none = json!({"tenant": "a", "workload": "w", "state": "not_claimed"});
        assert_eq!(release(&none), "a w is not claimed\n");
    }

    #[test]
    fn a_status_shows_claims_and_snapshots() {
        let answer = json!({
            "tenant": "a",
            "claims": [
                {"workload": "w", "epoch": 2, "state": "dirty", "source": "warm", "created_ms": 1000,
                 "active_ms": 61_000, "superseded_by": 3},
                {"workload": "w", "epoch": 3, "state": "active", "source": "warm", "slot": "s9",
                 "created_ms": 61_000, "active_ms": 120_000},
            ],
            "snapshots": {"w": {"number": 4, "epoch": 1, "files": 2, "bytes": 10, "created_ms": 1000}},
        });
        assert_eq!(
            status(&answer, 121_000),
            "WORKLOAD  EPOCH  STATE   SOURCE  SLOT  AGE    IDLE   NOTE\n\
             w             2  dirty   warm          2m 0s  1m 0s  superseded by epoch 3\n\
             w             3  active  warm    s9    1m 0s  1s\n\
             \n\
             WORKLOAD  SNAPSHOT  EPOCH  FILES  SIZE  AGE\n\
             w                4      1      2  10 B  2m 0s\n"
        );
        assert_eq!(status(&json!({"tenant": "a", "claims": [], "snapshots": {}}), 0), "a has no claim\n");
    }

    #[test]
    fn a_pool_that_cannot_fill_says_why() {
        let pool =
            json!({"workload": "web", "target": 5, "last_error": "no such image", "retry_in_ms": 5000});
        let out = pools(&json!([pool]));
        assert!(out.starts_with("WORKLOAD  TARGET  READY"), "{out}");
        assert!(out.ends_with("\nweb: no such image (next attempt in 5s)\n"), "{out}");
    }

    #[test]
    fn slots_and_workloads_are_tables() {
        let slots_answer = json!([{"slot": "s1", "workload": "w", "phase": "ready", "spec_hash": "h",
            "container": "bh-1", "created_ms": 1}]);
        assert!(slots(&slots_answer, 1001).contains("s1    w         ready  -       bh-1       1s\n"));
        let answer = json!([{"id": "w", "name": "Web", "revision": "0123456789abcdef", "spec_hash": "h",
            "hooks": ["on_claim"], "spec": {"image": "alpine"}}]);
        assert!(workloads(&answer).contains("w   Web   alpine  0123456789ab  on_claim\n"));
        assert_eq!(workloads(&json!([])), "there are no workloads\n");
    }
}
