//! What the README says, against what the code does: drift fails.
//!
//! A table of the README that the code knows too stands below a line
//! `<!-- table: name -->`, an example answer below `<!-- example: name -->`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use boilerhouse::{
    api::{RouteScope, routes},
    config::{Fallback, settings},
    model::{
        ClaimSource, ClaimState, Epoch, Revision, SlotId, SnapshotRef, StateSource, TenantId, WorkloadId,
        spec::{SpecDefaults, fields},
    },
    script::{Hook, LoadOptions, Set, SourceFile, Sources},
    tenancy::{
        ClaimAnswer, ClaimStatus, ContainerAnswer, Endpoints, PrefetchAnswer, ReleaseAnswer, ReleaseState,
        StateAnswer, TenantStatus,
    },
};

// === Reading ===

fn file(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the rows of the table below `<!-- table: name -->`, without its
/// head; cells are trimmed, and lose the backticks around them.
fn table(text: &str, name: &str) -> Vec<Vec<String>> {
    let mark = format!("<!-- table: {name} -->");
    let lines = text.lines().skip_while(|line| *line != mark).skip(1);
    let rows: Vec<Vec<String>> = lines
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(cell).collect())
        .collect();
    assert!(rows.len() > 2, "the README has no table {mark}");
    rows[2..].to_vec()
}

fn cell(text: &str) -> String {
    let text = text.trim();
    let inner = text.strip_prefix('`').and_then(|text| text.strip_suffix('`'));
    inner.filter(|inner| !inner.contains('`')).unwrap_or(text).to_owned()
}

/// Returns the JSON below `<!-- example: name -->`.
fn example(text: &str, name: &str) -> serde_json::Value {
    let mark = format!("<!-- example: {name} -->\n```json\n");
    let (_, rest) = text.split_once(&mark).unwrap_or_else(|| panic!("the README has no {mark}"));
    let (json, _) = rest.split_once("\n```").expect("a block of code ends");
    serde_json::from_str(json).unwrap_or_else(|error| panic!("example {name}: {error}"))
}

// === Comparing ===

/// Compares two tables by their first column: each row on both sides, in the
/// same order, with the same cells as far as the code has them.
fn table_findings(name: &str, readme: &[Vec<String>], code: &[Vec<String>]) -> Vec<String> {
    let keys = |rows: &[Vec<String>]| rows.iter().map(|row| row[0].clone()).collect::<Vec<_>>();
    let (said, known) = (keys(readme), keys(code));
    let mut findings = Vec::new();
    for key in &said {
        if !known.contains(key) {
            findings.push(format!("table {name}: the README has {key}, the code does not"));
        } else if said.iter().filter(|other| *other == key).count() > 1 {
            findings.push(format!("table {name}: the README has {key} twice"));
        }
    }
    for (key, row) in known.iter().zip(code) {
        let Some(at) = said.iter().position(|other| other == key) else {
            findings.push(format!("table {name}: the code has {key}, the README does not"));
            continue;
        };
        for (column, (there, here)) in readme[at].iter().zip(row).enumerate().skip(1) {
            if there != here {
                findings.push(format!(
                    "table {name}, {key}, column {}: the README says {there:?}, the code {here:?}",
                    column + 1
                ));
            }
        }
    }
    if findings.is_empty() && said != known {
        findings.push(format!("table {name}: the README's order is {said:?}, the code's {known:?}"));
    }
    findings
}

/// Compares the names in an example with those in a real answer, at every depth.
fn example_findings(name: &str, said: &serde_json::Value, real: &serde_json::Value) -> Vec<String> {
    let (mut in_readme, mut in_code) = (BTreeSet::new(), BTreeSet::new());
    collect_names(said, "", &mut in_readme);
    collect_names(real, "", &mut in_code);
    let mut findings = Vec::new();
    for field in in_readme.difference(&in_code) {
        findings.push(format!("example {name}: the README has {field}, the answer does not"));
    }
    for field in in_code.difference(&in_readme) {
        findings.push(format!("example {name}: the answer has {field}, the README does not"));
    }
    findings
}

fn collect_names(value: &serde_json::Value, path: &str, names: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                let path = format!("{path}.{name}");
                collect_names(value, &path, names);
                names.insert(path);
            }
        }
        serde_json::Value::Array(items) => {
            items.iter().for_each(|item| collect_names(item, &format!("{path}[]"), names));
        }
        _ => {}
    }
}

#[track_caller]
fn report(findings: Vec<String>) {
    assert!(findings.is_empty(), "{} findings:\n{}\n", findings.len(), findings.join("\n"));
}

// === The answers ===

#[test]
fn example_answers_have_the_fields_of_real_ones() {
    let readme = file("README.md");
    let tenant = || TenantId::new("alice").unwrap();
    let workload = || WorkloadId::new("notes").unwrap();
    let slot = || SlotId::new("notes-5f1c2a9e").unwrap();
    let claim = ClaimAnswer {
        tenant: tenant(),
        workload: workload(),
        epoch: Epoch(7),
        source: ClaimSource::Warm,
        slot: slot(),
        revision: Revision(String::new()),
        container: ContainerAnswer { id: String::new(), name: String::new(), address: None },
        endpoints: Endpoints { comm: None, ports: BTreeMap::new() },
        state: StateAnswer { source: StateSource::Cache, snapshot: Some(6), bytes: 9, files: 1 },
        outputs: BTreeMap::new(),
        timings_ms: BTreeMap::from([("fill", 0.4), ("total", 2.1)]),
    };
    let release = ReleaseAnswer {
        tenant: tenant(),
        workload: workload(),
        state: ReleaseState::Durable,
        epoch: Some(Epoch(7)),
        snapshot: Some(7),
        reason: None,
    };
    let snapshot = SnapshotRef {
        number: 6,
        epoch: Epoch(6),
        nonce: String::new(),
        manifest: String::new(),
        created_ms: 1,
        files: 1,
        bytes: 9,
    };
    let status = TenantStatus {
        tenant: tenant(),
        claims: vec![ClaimStatus {
            workload: workload(),
            epoch: Epoch(7),
            state: ClaimState::Active,
            slot: Some(slot()),
            source: ClaimSource::Warm,
            created_ms: 1,
            active_ms: 1,
            failed: false,
            superseded_by: None,
            last_error: None,
        }],
        snapshots: BTreeMap::from([(workload(), snapshot)]),
    };
    let prefetch = PrefetchAnswer {
        tenant: tenant(),
        workload: workload(),
        cached: true,
        snapshot: Some(7),
        fetched_bytes: 412,
        files: 1,
        bytes: 9,
        reason: None,
    };
    let answers = [
        ("prefetch", serde_json::to_value(prefetch).unwrap()),
        ("claim", serde_json::to_value(claim).unwrap()),
        ("release", serde_json::to_value(release).unwrap()),
        ("status", serde_json::to_value(status).unwrap()),
    ];
    report(
        answers
            .iter()
            .flat_map(|(name, real)| example_findings(name, &example(&readme, name), real))
            .collect(),
    );
}

#[test]
fn release_states_are_explained() {
    let readme = file("README.md");
    for state in
        [ReleaseState::Durable, ReleaseState::Pending, ReleaseState::Discarded, ReleaseState::NotClaimed]
    {
        let name = serde_json::to_value(state).unwrap();
        let row = format!("| `{}` | ", name.as_str().unwrap());
        assert!(readme.contains(&row), "the README does not explain {name}");
    }
}

// === The tables ===

#[test]
fn every_route_is_in_the_readme() {
    let code: Vec<Vec<String>> = routes()
        .iter()
        .map(|route| {
            let who = match route.scope {
                RouteScope::Open => "anyone",
                RouteScope::Tenant => "tenant",
                RouteScope::Admin => "admin",
            };
            vec![format!("{} {}", route.method, route.path), who.to_owned(), route.doc.to_owned()]
        })
        .collect();
    report(table_findings("routes", &table(&file("README.md"), "routes"), &code));
}

// === The commands, the links, the deployment ===

#[test]
fn every_make_target_is_in_the_readme_and_phony() {
    let makefile = file("Makefile");
    let targets: Vec<&str> = makefile
        .lines()
        .filter(|line| line.contains(": ## "))
        .filter_map(|line| line.split_once(':').map(|(name, _)| name))
        .collect();
    let phony = makefile.lines().find_map(|line| line.strip_prefix(".PHONY: ")).unwrap_or_default();
    assert_eq!(phony.split(' ').collect::<Vec<_>>(), targets, "the Makefile's .PHONY line");
    let code: Vec<Vec<String>> = targets.iter().map(|name| vec![format!("make {name}")]).collect();
    report(table_findings("make", &table(&file("README.md"), "make"), &code));
}

#[test]
fn links_and_files_of_the_readme_exist() {
    let readme = file("README.md");
    let anchors: BTreeSet<String> = readme
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| line.trim_matches(['#', ' ']).to_lowercase().replace(' ', "-").replace([':', '`'], ""))
        .collect();
    let mut findings = Vec::new();
    for link in readme.split("](#").skip(1).filter_map(|rest| rest.split_once(')')) {
        if !anchors.contains(link.0) {
            findings.push(format!("README.md: no heading for the link #{}", link.0));
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in ["LICENSE", "Dockerfile", "compose.yaml", "src/lib.rs", "tests/tidy.rs", "workloads/"] {
        let is_named = readme.contains(&format!("`{name}`"));
        if !is_named || !root.join(name).exists() {
            findings.push(format!("README.md: {name} is not named, or not there"));
        }
    }
    report(findings);
}

#[test]
fn the_deployment_uses_documented_settings_and_capabilities() {
    let (compose, dockerfile) = (file("compose.yaml"), file("Dockerfile"));
    let documented: BTreeSet<String> =
        table(&file("README.md"), "configuration").into_iter().map(|row| row[0].clone()).collect();
    let mut findings = Vec::new();
    for line in compose.lines() {
        let setting = line.trim_start_matches([' ', '#']).split(':').next().unwrap_or_default();
        let is_setting = setting.starts_with("BOILERHOUSE_") || setting.starts_with("AWS_");
        let is_alternative =
            || settings().iter().any(|known| known.variables().any(|variable| variable == setting));
        if is_setting && !documented.contains(setting) && !is_alternative() {
            findings.push(format!("compose.yaml: {setting} is not in the README's table"));
        }
    }
    let given = compose.lines().find_map(|line| line.trim().strip_prefix("cap_add: [")?.strip_suffix(']'));
    let given: BTreeSet<&str> = given.unwrap_or_default().split(", ").collect();
    let explained: BTreeSet<&str> = dockerfile
        .lines()
        .filter_map(|line| line.strip_prefix("#   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|word| word.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        .collect();
    if given != explained {
        findings.push(format!("compose.yaml gives {given:?}, Dockerfile explains {explained:?}"));
    }
    report(findings);
}

// === The tables that code has ===

#[test]
fn every_setting_is_in_the_readme_with_its_default() {
    let code: Vec<Vec<String>> = settings()
        .iter()
        .map(|setting| {
            let default = match setting.default {
                Fallback::Value(value) => vec![value.to_owned()],
                // Words are the README's own business.
                Fallback::Words(_) => Vec::new(),
            };
            [vec![setting.variable.to_owned()], default].concat()
        })
        .collect();
    report(table_findings("configuration", &table(&file("README.md"), "configuration"), &code));
}

#[test]
fn every_hook_is_in_the_readme() {
    let code: Vec<Vec<String>> =
        Hook::ALL.into_iter().map(|hook| vec![format!("{}(ctx)", hook.name())]).collect();
    report(table_findings("hooks", &table(&file("README.md"), "hooks"), &code));
}

#[test]
fn every_field_of_a_spec_is_in_the_readme_as_the_code_has_it() {
    let code: Vec<Vec<String>> = fields()
        .iter()
        .map(|field| {
            [field.path, &field.kind.to_string(), field.default, field.doc].map(str::to_owned).to_vec()
        })
        .collect();
    let readme = file("README.md");
    let findings = table_findings("fields", &table(&readme, "fields"), &code);
    let rows: Vec<String> = code
        .iter()
        .map(|row| {
            let ticked = |cell: &str| if cell.is_empty() { String::new() } else { format!("`{cell}`") };
            format!("| {} | {} | {} | {} |", ticked(&row[0]), row[1], ticked(&row[2]), row[3])
        })
        .collect();
    assert!(findings.is_empty(), "{}\nthe table should be:\n{}\n", findings.join("\n"), rows.join("\n"));
}

#[test]
fn the_readmes_workload_passes_the_check() {
    let readme = file("README.md");
    let (_, rest) = readme.split_once("<<'RHAI'\n").expect("the README writes a workload");
    let (script, _) = rest.split_once("\nRHAI\n").expect("its end is marked");
    let mut sources = Sources::default();
    sources.workloads.insert("notes".to_owned(), SourceFile::new("workloads/notes.rhai", script));
    let options = LoadOptions {
        defaults: SpecDefaults { min_idle: 5, max: 50 },
        default_image: "alpine:latest".to_owned(),
    };
    let set = Set::load(&sources, &options).unwrap_or_else(|errors| panic!("{errors:#?}"));
    assert!(set.only().is_some_and(|workload| workload.has(Hook::BeforeClaim)));
}

// === The comparisons can fail ===

#[test]
fn a_table_that_drifted_is_found() {
    let text = "<!-- table: t -->\n| A | B | C |\n|---|---|---|\n| `x` | `1` | one `2` |\n| y | | |\n\nend";
    let said = table(text, "t");
    assert_eq!(said, [["x", "1", "one `2`"], ["y", "", ""]]);
    let rows = |rows: &[&[&str]]| -> Vec<Vec<String>> {
        rows.iter().map(|row| row.iter().map(|cell| (*cell).to_owned()).collect()).collect()
    };
    assert_eq!(table_findings("t", &said, &rows(&[&["x", "1"], &["y"]])), [""; 0]);
    for (code, expected) in [
        (rows(&[&["x", "2"], &["y"]]), "table t, x, column 2: the README says \"1\", the code \"2\""),
        (rows(&[&["x"]]), "table t: the README has y, the code does not"),
        (rows(&[&["x"], &["y"], &["z"]]), "table t: the code has z, the README does not"),
        (rows(&[&["y"], &["x"]]), "table t: the README's order is [\"x\", \"y\"], the code's [\"y\", \"x\"]"),
    ] {
        assert_eq!(table_findings("t", &said, &code), [expected]);
    }
    assert_eq!(table_findings("t", &rows(&[&["x"], &["x"]]), &rows(&[&["x"]])).len(), 2);
}

#[test]
fn an_example_that_drifted_is_found() {
    let text = "<!-- example: e -->\n```json\n{\"a\": [{\"b\": 1}]}\n```\n";
    let said = example(text, "e");
    assert_eq!(example_findings("e", &said, &serde_json::json!({"a": [{"b": 2}]})), [""; 0]);
    assert_eq!(
        example_findings("e", &said, &serde_json::json!({"a": [{"c": 2}]})),
        [
            "example e: the README has .a[].b, the answer does not",
            "example e: the answer has .a[].c, the README does not"
        ]
    );
}
