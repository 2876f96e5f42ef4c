//! The house's rules that no compiler checks: layers, homes of foreign crates,
//! left-overs, sizes, licences, and what must never be in a tracked file.
//!
//! Each rule is a function from text to findings, tried here on samples that
//! break it; a finding says where it is and what to do.

#[path = "tidy/licences.rs"]
mod licences;
#[path = "tidy/source.rs"]
mod source;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use source::Source;

/// Modules that anyone may import.
const LEAVES: &[&str] = &["clock", "config", "lifecycle", "retry", "seal", "telemetry"];

/// Every module in the order of `lib.rs`, with what it may import beside the
/// leaves. A new edge is a change of the design: it comes here in the same
/// commit, with its reason in the commit's message.
///
/// `model` is pure and stands below everything; what a leaf needs is said too.
const LAYERS: &[(&str, &[&str])] = &[
    ("clock", &[]),
    ("config", &["model"]),
    ("lifecycle", &[]),
    ("retry", &["clock"]),
    ("seal", &["clock", "model"]),
    ("telemetry", &["model"]),
    ("model", &[]),
    ("disk", &["model"]),
    ("journal", &["model"]),
    ("runtime", &["model"]),
    ("store", &["model"]),
    ("script", &["model"]),
    // `runtime` for the mounts that a prepared slot asks for.
    ("state", &["model", "disk", "runtime", "store"]),
    // `script` for the specs and revisions of the loaded workloads.
    ("pool", &["model", "journal", "runtime", "script", "state"]),
    // `store` to tell a store that is down from one that refuses.
    ("tenancy", &["model", "journal", "runtime", "store", "script", "state", "pool"]),
    // `tenancy` for the wire types it speaks.
    ("client", &["model", "tenancy"]),
    ("api", &["model", "tenancy"]),
    // `runtime` for its events; `pool` and `store` to ask for work and health.
    ("upkeep", &["model", "runtime", "store", "pool", "tenancy"]),
    (
        "app",
        &[
            "model", "disk", "journal", "runtime", "store", "script", "state", "pool", "tenancy", "api",
            "upkeep",
        ],
    ),
    ("cli", &["model", "script", "tenancy", "app", "client"]),
];

/// Macros live at the root of the crate whatever module writes them.
const ROOT_MACROS: &[(&str, &str)] = &[("crash_point", "lifecycle")];

/// Foreign crates, and the one place that may name each; `reqwest` has two, for
/// the commands' calls of our own server and for the store's of its own.
const HOMES: &[(&str, &str)] = &[
    ("axum", "src/api"),
    ("bollard", "src/runtime/docker"),
    ("chacha20poly1305", "src/seal"),
    ("clap", "src/cli"),
    ("indicatif", "src/cli"),
    ("prometheus_client", "src/telemetry"),
    ("quick_xml", "src/store/s3"),
    ("reqwest", "src/client"),
    ("reqwest", "src/store/s3"),
    ("rhai", "src/script"),
    ("rusqlite", "src/journal"),
    ("s3", "src/store/s3"),
    ("tokio_cron_scheduler", "src/upkeep"),
    ("tower_http", "src/api"),
];

/// Lines of one file of `src`, at most; STYLE.md begins to ask at 500.
const MAX_LINES: usize = 700;

// === Layers ===

fn layer_findings(path: &Path, source: &Source) -> Vec<String> {
    let module = source::module_of(path);
    let Some(own) = module.first() else {
        return Vec::new(); // lib.rs and main.rs only wire
    };
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| name == own) else {
        return vec![format!(
            "{}: module `{own}` is not in LAYERS of tests/tidy.rs; add it where it stands in lib.rs",
            path.display()
        )];
    };
    let is_leaf = LEAVES.contains(&own.as_str());
    let mut findings = BTreeSet::new();
    for named in &source.paths {
        let [root, target, ..] = named.segments.as_slice() else { continue };
        if root != "crate" {
            continue;
        }
        let target = ROOT_MACROS.iter().find(|(name, _)| name == target).map_or(target.as_str(), |m| m.1);
        let fits = target == own
            || target == "*"
            || allowed.contains(&target)
            || (!is_leaf && LEAVES.contains(&target));
        if !fits {
            findings.insert(format!(
                "{}:{}: `{own}` may not import `{target}` (allowed: {}). Declare a trait here and implement \
                 it there, or change LAYERS in tests/tidy.rs in the same commit and say why",
                path.display(),
                named.line,
                if is_leaf { allowed.join(", ") } else { format!("{}, the leaves", allowed.join(", ")) },
            ));
        }
    }
    findings.into_iter().collect()
}

/// The table itself: in the order of `lib.rs`, with edges that point down only.
fn table_findings(lib: &Source) -> Vec<String> {
    let mut findings = Vec::new();
    let place = |name: &str| LAYERS.iter().position(|(layer, _)| *layer == name);
    let mut last = None;
    for (name, _) in &lib.modules {
        match place(name) {
            None => findings.push(format!("src/lib.rs: module `{name}` is not in LAYERS of tests/tidy.rs")),
            Some(at) if last.is_some_and(|last| at < last) => {
                findings.push(format!("src/lib.rs: module `{name}` stands lower in LAYERS of tests/tidy.rs"));
            }
            at => last = at,
        }
    }
    for (at, (name, allowed)) in LAYERS.iter().enumerate() {
        for target in *allowed {
            if *target != "model" && place(target).is_none_or(|target| target >= at) {
                findings.push(format!("LAYERS: `{name}` may not import `{target}`, which is not below it"));
            }
        }
    }
    findings
}

#[test]
fn modules_import_only_from_layers_below() {
    let mut findings = table_findings(&source::read(Path::new("src/lib.rs"), &file("src/lib.rs")));
    for (path, source) in sources() {
        findings.extend(layer_findings(&path, &source));
    }
    report(findings);
}

#[test]
fn an_upward_import_is_found_however_it_is_written() {
    let path = Path::new("src/state/host.rs");
    for bad in [
        "use crate::tenancy::Error;",
        "use crate::{model::Key, pool};",
        "use super::super::api;",
        "fn f() -> crate::pool::Pool { todo() }",
        "mod inner { use super::super::super::journal::Op; }",
        "type T = Vec<crate::app::App>;",
        "use crate::{self as root, upkeep::{Job, *}};",
    ] {
        assert_eq!(layer_findings(path, &source::read(path, bad)).len(), 1, "{bad}");
    }
    for good in [
        "// use crate::tenancy;\n/* crate::pool::x */",
        r##"const S: &str = r#"crate::pool::x " "#; const Q: char = '"';"##,
        "use crate::{model::Key, store, clock::Clock}; use super::Fill; use self::tenancy::x;",
        "mod tests { use super::super::Fill; use super::*; }",
        "fn f<'a>(x: &'a str) -> impl Sized + use<'a> { crate::crash_point!(x, \"a\") }",
    ] {
        assert_eq!(layer_findings(path, &source::read(path, good)), [""; 0], "{good}");
    }
    let leaf = Path::new("src/clock.rs");
    assert_eq!(layer_findings(leaf, &source::read(leaf, "use super::config::Config;")).len(), 1);
    let stranger = Path::new("src/helpers.rs");
    assert_eq!(layer_findings(stranger, &source::read(stranger, "")).len(), 1);
    assert_eq!(
        table_findings(&source::read(Path::new("src/lib.rs"), "mod pool; mod model; mod x;")).len(),
        2
    );
}

// === Homes of foreign crates ===

fn home_findings(path: &Path, source: &Source) -> Vec<String> {
    let mut findings = BTreeSet::new();
    for named in source.paths.iter().filter(|named| !named.in_test) {
        let mut homes = HOMES.iter().filter(|(name, _)| named.segments.first().is_some_and(|s| s == name));
        let Some((name, home)) = homes.next() else { continue };
        let is_in = |home: &str| path.with_extension("") == Path::new(home) || path.starts_with(home);
        // A module of ours may have the crate's name (`store::s3`).
        let is_ours = source.modules.iter().any(|(module, _)| module == name)
            || source.imported.iter().any(|n| n == name);
        let at_home = is_in(home) || homes.any(|(_, other)| is_in(other));
        if !is_ours && !at_home {
            findings.insert(format!(
                "{}:{}: crate `{name}` is named outside its home {home}; wrap what is needed there",
                path.display(),
                named.line
            ));
        }
    }
    findings.into_iter().collect()
}

#[test]
fn foreign_crates_stay_at_home() {
    report(sources().iter().flat_map(|(path, source)| home_findings(path, source)).collect());
}

#[test]
fn a_foreign_crate_abroad_is_found() {
    let check = |path: &str, text: &str| home_findings(Path::new(path), &source::read(Path::new(path), text));
    for (path, text) in [
        ("src/pool/actor.rs", "use bollard::Docker;"),
        ("src/runtime/mod.rs", "fn f(d: ::bollard::Docker) {}"),
        ("src/cli.rs", "#[derive(Debug, rusqlite::Thing)] struct A;"),
        ("src/store/local.rs", "use s3::Bucket;"),
        ("src/store/s3_names.rs", "use {s3::Bucket, std::fmt};"),
    ] {
        assert_eq!(check(path, text).len(), 1, "{path}: {text}");
    }
    for (path, text) in [
        ("src/runtime/docker/mod.rs", "use bollard::Docker;"),
        ("src/runtime/docker.rs", "use bollard::Docker;"),
        ("src/store/mod.rs", "mod s3; pub use self::s3::S3Store; fn f() { s3::open() }"),
        ("src/app.rs", "use crate::store::s3; fn f() { s3::open() }"),
        ("src/pool/mod.rs", "#[cfg(test)] mod tests { use axum::Router; }"),
        ("src/pool/mod.rs", "// bollard::Docker\nconst A: &str = \"rhai::Engine\";"),
    ] {
        assert_eq!(check(path, text), [""; 0], "{path}: {text}");
    }
}

// === Left-overs, unwraps, sleeps ===

fn code_findings(path: &Path, source: &Source, whole_file_is_test: bool) -> Vec<String> {
    let mut findings = Vec::new();
    let mut found = |line: usize, what: &str| findings.push(format!("{}:{line}: {what}", path.display()));
    let text = |i: usize| source.tokens.get(i).map_or("", |token| token.text.as_str());
    for (i, token) in source.tokens.iter().enumerate() {
        let in_test = whole_file_is_test || token.in_test;
        match token.text.as_str() {
            "todo" | "unimplemented" | "dbg" if text(i + 1) == "!" => {
                found(token.line, "a left-over macro; write what belongs there, or take it out");
            }
            "unwrap" if !in_test && i > 0 && text(i - 1) == "." && text(i + 1) == "(" => {
                found(
                    token.line,
                    "unwrap outside tests; return an error, or `expect` with why it cannot happen",
                );
            }
            "ignore" if i > 0 && text(i - 1) == "[" && i > 1 && text(i - 2) == "#" => {
                found(token.line, "an ignored test; make it pass, or take it out");
            }
            "sleep" if in_test && i > 1 && text(i - 1) == "::" && text(i - 2) == "thread" => {
                found(token.line, "a test that sleeps its thread; wait for the condition, with a timeout");
            }
            _ => {}
        }
    }
    findings
}

/// Words that mean unfinished work, spelt here so that this file has none of them.
const UNFINISHED: &[&str] = &[concat!("FIX", "ME"), concat!("XX", "X"), concat!("TO", "DO")];

fn unfinished_findings(path: &Path, text: &str) -> Vec<String> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut findings = Vec::new();
    for (line, content) in (1..).zip(text.lines()) {
        for word in content.split(|c| !is_word(c)).filter(|word| UNFINISHED.contains(word)) {
            findings.push(format!("{}:{line}: {word}; do it now, or open an issue", path.display()));
        }
    }
    findings
}

#[test]
fn nothing_is_left_over() {
    let mut findings = Vec::new();
    let sources = sources();
    let test_files = test_only_modules(&sources);
    for (path, source) in &sources {
        let module = source::module_of(path);
        let is_test = test_files.iter().any(|test| module.starts_with(test));
        findings.extend(code_findings(path, source, is_test));
    }
    for path in tracked().iter().filter(|path| path.starts_with("tests") && has_extension(path, "rs")) {
        findings.extend(code_findings(path, &source::read(path, &text(path)), true));
    }
    for path in tracked() {
        if ["src", "tests", "workloads", "scripts", "tools"].iter().any(|folder| path.starts_with(folder)) {
            findings.extend(unfinished_findings(&path, &text(&path)));
        }
    }
    report(findings);
}

/// Modules declared by `#[cfg(test)] mod name;`, whose files are tests as a whole.
fn test_only_modules(sources: &BTreeMap<PathBuf, Source>) -> Vec<Vec<String>> {
    let mut modules = Vec::new();
    for (path, source) in sources {
        for (name, _) in source.modules.iter().filter(|(_, in_test)| *in_test) {
            let mut module = source::module_of(path);
            module.push(name.clone());
            modules.push(module);
        }
    }
    modules
}

#[test]
fn a_left_over_is_found() {
    let path = Path::new("src/pool/mod.rs");
    let check = |text: &str, test| code_findings(path, &source::read(path, text), test).len();
    let left_over = concat!("fn f() { to", "do!() }");
    assert_eq!(check(left_over, false), 1);
    assert_eq!(check("fn f() { x.unwrap() }", false), 1);
    assert_eq!(check("#[cfg(not(test))] fn f() { x.unwrap() }", false), 1);
    assert_eq!(check("#[cfg(test)] use a::{b}; fn f() { x.unwrap() }", false), 1);
    assert_eq!(check("fn f() { x.unwrap() }", true), 0);
    assert_eq!(check("#[cfg(test)]\n#[path = \"x\"] mod tests { fn f() { x.unwrap() } }", false), 0);
    assert_eq!(check("#[cfg(all(test, unix))] fn f(a: [u8; 2]) { x.unwrap() }", false), 0);
    assert_eq!(check("fn f() { x.unwrap_or(1); /* y.unwrap() */ let s = \".unwrap()\"; }", false), 0);
    assert_eq!(check("#[test] #[ignore = \"slow\"] fn f() {}", true), 1);
    assert_eq!(check("fn f() { std::thread::sleep(d) }", true), 1);
    assert_eq!(check("fn f() { std::thread::sleep(d) }", false), 0);
    assert_eq!(unfinished_findings(path, &format!("// {}: later", UNFINISHED[0])).len(), 1);
    assert_eq!(unfinished_findings(path, "// fixed by MEXX"), [""; 0]);
    let parent = BTreeMap::from([(path.to_owned(), source::read(path, "#[cfg(test)] mod rows; mod b;"))]);
    assert_eq!(test_only_modules(&parent), [["pool", "rows"]]);
}

// === Size ===

#[test]
fn no_file_of_the_source_is_too_long() {
    let mut findings = Vec::new();
    for path in sources().keys() {
        let lines = text(path).lines().count();
        if lines > MAX_LINES {
            findings.push(format!(
                "{}: {lines} lines, at most {MAX_LINES}; split it by responsibility, each part named by a noun",
                path.display()
            ));
        }
    }
    report(findings);
}

// === Licences ===

#[test]
fn licences_of_dependencies_are_on_the_list() {
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--locked", "--format-version", "1", "--filter-platform", &host])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs, it runs this test");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("cargo lists packages");
    assert!(packages.len() > 50, "only {} packages: is the filter right?", packages.len());
    let mut findings = Vec::new();
    for package in packages {
        if let Some(refusal) = licences::refusal(package["license"].as_str()) {
            findings.push(format!(
                "crate {} {} {refusal}; use another crate, or put the licence on the list in \
                 tests/tidy/licences.rs and say why",
                package["name"], package["version"]
            ));
        }
    }
    report(findings);
}

#[test]
fn a_licence_that_is_not_on_the_list_is_found() {
    for good in
        ["MIT", "MIT/Apache-2.0", "GPL-3.0 OR (MIT AND ISC)", "Apache-2.0 WITH LLVM-exception OR GPL-2.0"]
    {
        assert_eq!(licences::refusal(Some(good)), None, "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND SSPL-1.0", "", "MIT OR", "(MIT", "MIT MIT"] {
        assert!(licences::refusal(Some(bad)).is_some(), "{bad}");
    }
    assert!(licences::refusal(None).is_some());
}

// === What no tracked file may hold ===

fn leak_findings(path: &Path, text: &str, checkout: &str) -> Vec<String> {
    let mut findings = Vec::new();
    // A checkout directly below the root (`/src`) has a name that files may well use.
    let checkout_counts = checkout.matches('/').count() > 1;
    let homes = [concat!("/ho", "me/"), concat!("/Us", "ers/")];
    for (line, content) in (1..).zip(text.lines()) {
        let mut found = |what: &str| findings.push(format!("{}:{line}: {what}", path.display()));
        if checkout_counts && content.contains(checkout) {
            found("the path of this checkout; make it relative");
        }
        // `/home/app` alone is a path that images have.
        let somebodys = |home: &&str| content.split(*home).skip(1).any(is_somebody);
        if homes.iter().any(somebodys) {
            found("a path of somebody's home directory; make it relative, or use a neutral one");
        }
        for word in content.split(|c: char| c.is_whitespace() || "\"'`<>(),;".contains(c)) {
            if looks_like_mail(word) {
                found("an e-mail address; use one at example.com, or none");
            }
            if looks_like_key(word) {
                found(
                    "a text that looks like a credential; make it up visibly (EXAMPLE), or read it at run time",
                );
            }
        }
        if content.contains(concat!("PRIVATE", " KEY-----")) {
            found("a private key; make one at run time");
        }
    }
    findings
}

/// Whether what follows `/home/` is a name and something below it.
fn is_somebody(rest: &str) -> bool {
    let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || "._-".contains(*c)).collect();
    !name.is_empty() && rest[name.len()..].starts_with('/')
}

fn looks_like_mail(word: &str) -> bool {
    let Some((user, host)) = word.split_once('@') else { return false };
    let host = host.trim_end_matches(['.', ':', '/']);
    let host = host.split(['/', ':']).next().unwrap_or_default();
    let Some((name, top)) = host.rsplit_once('.') else { return false };
    let is_host = name.chars().all(|c| c.is_ascii_alphanumeric() || ".-".contains(c)) && !name.is_empty();
    let is_top = top.len() > 1 && top.chars().all(|c| c.is_ascii_alphabetic());
    let is_user = user.chars().next_back().is_some_and(|c| c.is_ascii_alphanumeric());
    let is_reserved = top == "example" || top == "test" || name == "example" || name.ends_with(".example");
    is_user && is_host && is_top && !is_reserved
}

fn looks_like_key(word: &str) -> bool {
    // The access key ids of AWS, and the token prefixes of GitHub and Slack.
    let access_key = ["AKIA", "ASIA"].iter().any(|prefix| {
        word.match_indices(prefix).any(|(at, _)| {
            let key: String = word[at..].chars().take_while(char::is_ascii_alphanumeric).collect();
            key.len() == 20 && key.chars().all(|c| !c.is_ascii_lowercase()) && !key.ends_with("EXAMPLE")
        })
    });
    let token = ["ghp_", "gho_", "ghs_", "github_pat_", "xoxb-", "xoxp-"]
        .iter()
        .any(|prefix| word.split_once(prefix).is_some_and(|(_, rest)| rest.len() >= 20));
    access_key || token
}

#[test]
fn no_tracked_file_holds_a_path_of_a_machine_or_a_secret() {
    let checkout = env!("CARGO_MANIFEST_DIR");
    report(tracked().iter().flat_map(|path| leak_findings(path, &text(path), checkout)).collect());
}

#[test]
fn a_path_of_a_machine_and_a_secret_are_found() {
    let check = |text: &str| leak_findings(Path::new("a"), text, "/build/box/tree").len();
    let at = '@';
    for bad in [
        "cd /build/box/tree/src",
        concat!("/ho", "me/ann/x"),
        &format!("ann{at}corp.com"),
        &format!("<ann.b{at}mail.corp.org>,"),
        &format!("AKIA{}", "A1B2C3D4E5F6G7H8"),
        &format!("key=ghp_{}", "a".repeat(36)),
        concat!("-----BEGIN RSA PRIVATE", " KEY-----"),
    ] {
        assert_eq!(check(bad), 1, "{bad}");
    }
    for good in [
        &format!("ann{at}example.com"),
        &format!("user{at}host"),
        &format!("image{at}sha256:abc"),
        &format!("rustix{at}1.1"),
        "AKIAIOSFODNN7EXAMPLE",
        "/build/box",
        concat!("mount /ho", "me/app, here"),
    ] {
        assert_eq!(check(good), 0, "{good}");
    }
    assert_eq!(leak_findings(Path::new("a"), "mount /src", "/src"), [""; 0]);
}

// === Workloads and the changelog ===

fn header_findings(path: &Path, text: &str) -> Vec<String> {
    let first = text.lines().next().unwrap_or_default();
    if first.strip_prefix("//!").is_some_and(|rest| rest.trim().len() > 10) {
        return Vec::new();
    }
    vec![format!("{}:1: begin with a `//!` comment that says what it is for", path.display())]
}

fn changelog_findings(text: &str) -> Vec<String> {
    match text.lines().find(|line| line.starts_with("## ")) {
        Some(line) if line.trim_start_matches("## ").trim_matches(['[', ']']) == "Unreleased" => Vec::new(),
        Some(line) => vec![format!("CHANGELOG.md: the first section is {line:?}; it is `## Unreleased`")],
        None => vec!["CHANGELOG.md: there is no section; begin with `## Unreleased`".to_owned()],
    }
}

#[test]
fn workloads_and_the_changelog_begin_as_they_should() {
    let mut findings = changelog_findings(&file("CHANGELOG.md"));
    for path in tracked() {
        let is_script = path.starts_with("workloads") || path.starts_with("scripts");
        if is_script && has_extension(&path, "rhai") {
            findings.extend(header_findings(&path, &text(&path)));
        }
    }
    report(findings);
}

#[test]
fn a_bad_beginning_is_found() {
    let path = Path::new("workloads/a.rhai");
    assert_eq!(header_findings(path, "fn workload() {}").len(), 1);
    assert_eq!(header_findings(path, "//!\nfn workload() {}").len(), 1);
    assert_eq!(header_findings(path, "//! A worker with its data in /data."), [""; 0]);
    assert_eq!(changelog_findings("# C\n\n## 1.0.0\n\n## Unreleased\n").len(), 1);
    assert_eq!(changelog_findings("# C\n").len(), 1);
    assert_eq!(changelog_findings("# C\n\n## [Unreleased]\n"), [""; 0]);
}

// === Reading the tree ===

/// Lists tracked files; in a tree without git, every file outside `target`.
fn tracked() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output();
    let paths: Vec<PathBuf> = match listed {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .split_terminator('\0')
            .map(PathBuf::from)
            // Deleted, and not committed yet.
            .filter(|path| root.join(path).is_file())
            .collect(),
        _ => {
            let mut found = Vec::new();
            walk(root, root, &mut found);
            found
        }
    };
    assert!(paths.len() > 20, "only {} files in {}: is this the package?", paths.len(), root.display());
    paths
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("the tree can be read").flatten() {
        let path = entry.path();
        let inside = path.strip_prefix(root).expect("it was found below the root").to_owned();
        if inside == Path::new("target") || inside == Path::new(".git") {
            continue;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(root, &path, found),
            Ok(kind) if kind.is_file() => found.push(inside),
            _ => {}
        }
    }
}

fn sources() -> BTreeMap<PathBuf, Source> {
    let is_source = |path: &PathBuf| path.starts_with("src") && has_extension(path, "rs");
    let mut sources = BTreeMap::new();
    for path in tracked().into_iter().filter(is_source) {
        let source = source::read(&path, &text(&path));
        sources.insert(path, source);
    }
    sources
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

fn file(path: &str) -> String {
    text(Path::new(path))
}

/// Reads a file of the package; bytes that are not UTF-8 are replaced.
fn text(path: &Path) -> String {
    let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path));
    let bytes = bytes.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[track_caller]
fn report(findings: Vec<String>) {
    assert!(findings.is_empty(), "{} findings:\n{}\n", findings.len(), findings.join("\n"));
}
