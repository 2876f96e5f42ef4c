//! P10: tables of what authors get wrong: where the error is, and what is said.

use super::{load, with_fields, with_hooks};

/// One bad script: its text, where the error is, a fragment of message or help.
struct Bad {
    text: String,
    place: &'static str,
    fragment: &'static str,
}

fn bad(text: impl Into<String>, place: &'static str, fragment: &'static str) -> Bad {
    Bad { text: text.into(), place, fragment }
}

fn check_rows(rows: Vec<Bad>, lib: Option<&str>) {
    let mut wrong = Vec::new();
    for Bad { text, place, fragment } in rows {
        let errors = load(&text, lib).err().unwrap_or_default();
        let all: Vec<_> = errors.iter().map(ToString::to_string).collect();
        let is_found = errors.len() == 1
            && errors[0].place() == place
            && (errors[0].message.contains(fragment)
                || errors[0].help.as_ref().is_some_and(|help| help.contains(fragment)));
        if !is_found {
            wrong.push(format!(
                "expected one error, {fragment:?} at {place}, of\n{text}\n{}\n",
                all.join("\n")
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn text_that_is_not_rhai_is_refused() {
    check_rows(
        vec![
            bad("fn workload() { #{ id: \"w\" ", "workloads/w.rhai:1:28", "end this object map"),
            bad(with_hooks("fn on_claim(ctx) { let x = ; }"), "workloads/w.rhai:2:28", "expect"),
            bad(with_hooks("fn on_claim(ctx) { y + 1 }"), "workloads/w.rhai:2:20", "undefined variable: y"),
            bad(with_hooks("fn on_claim(ctx) { CONST_X }"), "workloads/w.rhai:2:20", "undefined variable"),
            bad(with_hooks("fn on_claim(ctx) { eval(\"1\") }"), "workloads/w.rhai:2:20", "eval"),
            bad(with_hooks("fn on_claim(ctx) { x::f(1) }"), "workloads/w.rhai:2:20", "undefined module: x"),
            bad(with_fields("    sync: #{},"), "workloads/w.rhai:4:5", "the field is `persist`"),
            bad(with_fields("    match: 1,"), "workloads/w.rhai:4:5", "write \"match\""),
            bad(with_fields("    name: \"a\", name: \"b\","), "workloads/w.rhai:4:16", "uplicated property"),
            bad(with_hooks("fn f(a) { }\nfn f(b) { }"), "workloads/w.rhai:3:1", "already exists"),
            bad(
                with_hooks(&format!("fn f() {{ {}1{} }}", "(".repeat(200), ")".repeat(200))),
                "workloads/w.rhai:2:40",
                "maximum complexity",
            ),
        ],
        None,
    );
}

#[test]
fn the_shape_of_a_file_is_checked() {
    check_rows(
        vec![
            bad("", "workloads/w.rhai", "has no `fn workload()`"),
            bad("fn wrokload() { #{} }", "workloads/w.rhai", "did you mean it by `wrokload`?"),
            bad("fn workload(x) { #{} }", "workloads/w.rhai:1:1", "takes no parameters, not 1"),
            bad(with_hooks("let x = 1;"), "workloads/w.rhai:2:1", "write `const`"),
            bad(with_hooks("print(1);"), "workloads/w.rhai:2:1", "move it into a function"),
            bad(with_hooks("if true { }"), "workloads/w.rhai:2:1", "only const, import and functions"),
            bad(with_hooks("fn on_clam(ctx) { }"), "workloads/w.rhai:2:1", "did you mean `on_claim`?"),
            bad(with_hooks("fn before_release_it(ctx) { }"), "workloads/w.rhai:2:1", "before_release"),
            bad(with_hooks("\n  fn after_all(ctx) { }"), "workloads/w.rhai:3:3", "`after_all` is no hook"),
            bad(with_hooks("fn on_idle(ctx) { }"), "workloads/w.rhai:2:1", "`on_idle` is not supported yet"),
            bad(with_hooks("fn scale(ctx) { }"), "workloads/w.rhai:2:1", "`scale` is not supported yet"),
            bad(with_hooks("fn choose_slot(ctx, c) { }"), "workloads/w.rhai:2:1", "not supported yet"),
            bad(
                with_hooks("fn write(ctx, text) { ctx.state.write(\"a\", text); }"),
                "workloads/w.rhai:2:1",
                "in place of `ctx.state.write`",
            ),
            bad(with_hooks("fn on_claim() { }"), "workloads/w.rhai:2:1", "takes one parameter, not 0"),
            bad(with_hooks("private fn before_claim(a, b) { }"), "workloads/w.rhai:2:9", "not 2"),
        ],
        None,
    );
}

#[test]
fn imports_are_checked() {
    let lib = "fn double(n) { n * 2 }\nprivate fn hidden() { 1 }\n";
    let import = |line: &str, hooks: &str| format!("{line}\n{}", with_hooks(hooks));
    check_rows(
        vec![
            bad(import("import \"lib/y\" as y;", ""), "workloads/w.rhai:1:8", "did you mean \"lib/x\"?"),
            bad(import("import \"lib/x.rhai\" as x;", ""), "workloads/w.rhai:1:8", "have no extension"),
            bad(import("import \"/etc/passwd\" as x;", ""), "workloads/w.rhai:1:8", "there is no script"),
            bad(import("import \"lib/x\";", ""), "workloads/w.rhai:1:1", "needs a name"),
            bad(import("import \"lib/\" + \"x\" as x;", ""), "workloads/w.rhai:1:1", "plain text"),
            bad(
                with_hooks("fn on_claim(ctx) { import \"lib/x\" as x; }"),
                "workloads/w.rhai:2:20",
                "top of a file",
            ),
            bad(
                import("import \"lib/x\" as x;", "fn on_claim(ctx) { x::duoble(1); }"),
                "workloads/w.rhai:3:23",
                "did you mean `x::double`?",
            ),
            bad(
                import("import \"lib/x\" as x;", "fn on_claim(ctx) { x::double(1, 2); }"),
                "workloads/w.rhai:3:23",
                "takes 1 argument, not 2",
            ),
            bad(
                import("import \"lib/x\" as x;", "fn on_claim(ctx) { x::hidden(); }"),
                "workloads/w.rhai:3:23",
                "unknown function `x::hidden`",
            ),
        ],
        Some(lib),
    );
}

#[test]
fn shared_scripts_are_checked_even_when_nobody_imports_them() {
    let rows = [
        ("fn f( { }", "scripts/lib/x.rhai:1:7", "xpect"),
        ("let x = 1;", "scripts/lib/x.rhai:1:1", "write `const`"),
        ("fn f(ctx) { ctx.exce([\"a\"]); }", "scripts/lib/x.rhai:1:17", "did you mean `ctx.exec`?"),
        ("const X = [1][5];", "scripts/lib/x.rhai:1:15", "out of bounds"),
        ("import \"lib/x\" as me;", "scripts/lib/x.rhai:1:8", "lib/x → lib/x"),
        ("fn f() { nothing() }", "scripts/lib/x.rhai:1:10", "unknown function `nothing`"),
    ];
    for (lib, place, fragment) in rows {
        let errors = load(&with_hooks(""), Some(lib)).unwrap_err();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].to_string().contains(fragment), "{}", errors[0]);
        assert_eq!(errors[0].place(), place, "{}", errors[0]);
    }
    // A helper of a shared script may have any name.
    load(&with_hooks(""), Some("fn on_redis_ready(ctx) { ctx.exec([\"a\"]); }")).unwrap();
}

#[test]
fn what_a_hook_calls_is_checked() {
    let claim = |body: &str| with_hooks(&format!("fn on_claim(ctx) {{ {body} }}"));
    let before = |body: &str| with_hooks(&format!("fn before_claim(ctx) {{ {body} }}"));
    check_rows(
        vec![
            bad(claim("ctx.exce([\"a\"]);"), "workloads/w.rhai:2:24", "did you mean `ctx.exec`?"),
            bad(
                claim("ctx.exec([\"a\"], 1);"),
                "workloads/w.rhai:2:24",
                "`ctx.exec` takes 1 argument, not 2",
            ),
            bad(claim("ctx.exec;"), "workloads/w.rhai:2:24", "`ctx.exec` is a method"),
            bad(claim("ctx.tenant();"), "workloads/w.rhai:2:24", "`ctx.tenant` is a property"),
            bad(claim("ctx.tennant.id;"), "workloads/w.rhai:2:24", "did you mean `ctx.tenant`?"),
            bad(claim("ctx.tenant.plan;"), "workloads/w.rhai:2:31", "ctx.tenant has id, metadata"),
            bad(
                claim("if ctx.claim.epohc == 1 { }"),
                "workloads/w.rhai:2:33",
                "did you mean `ctx.claim.epoch`?",
            ),
            bad(
                claim("ctx.secrets.get(\"a\");"),
                "workloads/w.rhai:2:32",
                "unknown method `ctx.secrets.get`",
            ),
            bad(
                claim("ctx.secrets.get_or_create(\"a\");"),
                "workloads/w.rhai:2:32",
                "takes 2 arguments, not 1",
            ),
            bad(claim("ctx.state.read();"), "workloads/w.rhai:2:30", "takes 1 argument, not 0"),
            bad(claim("ctx.log.warning(\"a\");"), "workloads/w.rhai:2:28", "did you mean `ctx.log.warn`?"),
            bad(
                claim("ctx.log.info(\"a\", #{}, 1);"),
                "workloads/w.rhai:2:28",
                "takes 1 or 2 arguments, not 3",
            ),
            bad(claim("ctx.http.get(\"a\");"), "workloads/w.rhai:2:24", "unknown property `ctx.http`"),
            bad(claim("ctx.tenant.id = \"x\";"), "workloads/w.rhai:2:20", "assigns to ctx"),
            bad(
                claim("ctx.accept()"),
                "workloads/w.rhai:2:24",
                "is no verdict of on_claim, which may return ctx.reject",
            ),
            bad(claim("helper(1);"), "workloads/w.rhai:2:20", "unknown function `helper`"),
            bad(claim("sleep(1);"), "workloads/w.rhai:2:20", "hooks do not wait"),
            bad(claim("let t = timestamp();"), "workloads/w.rhai:2:28", "hooks do not wait"),
            bad(claim("[1].psuh(2);"), "workloads/w.rhai:2:24", "did you mean `push`?"),
            bad(
                claim("let f = |c| c.no_such_method(); f.call(1);"),
                "workloads/w.rhai:2:34",
                "unknown method",
            ),
            bad(
                claim("[1].map(|x| ctx.exce([`${x}`]));"),
                "workloads/w.rhai:2:36",
                "did you mean `ctx.exec`?",
            ),
            bad(claim("print(`${nothing(1)}`);"), "workloads/w.rhai:2:29", "unknown function `nothing`"),
            bad(
                claim("f(1, 2);") + "\nfn f(a) { a }",
                "workloads/w.rhai:2:20",
                "`f` takes 1 argument, not 2",
            ),
            bad(before("ctx.exec([\"a\"]);"), "workloads/w.rhai:2:28", "decides from data and cannot act"),
            bad(before("ctx.state.read(\"a\");"), "workloads/w.rhai:2:28", "before_claim has no `ctx.state`"),
            bad(before("ctx.retire()"), "workloads/w.rhai:2:28", "is no verdict of before_claim"),
            bad(before("ctx.reject(\"code\")"), "workloads/w.rhai:2:28", "takes 2 arguments, not 1"),
            bad(
                with_hooks("fn after_release(ctx) { ctx.park() }"),
                "workloads/w.rhai:2:29",
                "unknown method `ctx.park`",
            ),
            bad(
                with_hooks("fn after_release(ctx) { ctx.accept() }"),
                "workloads/w.rhai:2:29",
                "no verdict of after_release",
            ),
            bad(
                with_hooks("fn before_release(c) { c.reject(\"a\", \"b\") }"),
                "workloads/w.rhai:2:26",
                "may return nothing",
            ),
            bad(
                with_hooks("fn help(ctx) { ctx.exce([]); }"),
                "workloads/w.rhai:2:20",
                "did you mean `ctx.exec`?",
            ),
            bad(with_hooks("const X = nothing();"), "workloads/w.rhai:2:11", "unknown function `nothing`"),
        ],
        None,
    );
}

#[test]
fn a_spec_is_checked_and_its_fields_are_pointed_at() {
    let volumes = "    volumes: #{ state: #{ container_path: \"/data\" } },";
    check_rows(
        vec![
            bad(with_fields("    helth_check: #{},"), "workloads/w.rhai:4:5", "did you mean `health_check`?"),
            bad(with_fields("    bogus: 1,"), "workloads/w.rhai:4:5", "unknown field `bogus`"),
            bad(
                with_fields("    pool: #{ min_idle: 9, max: 3 },"),
                "workloads/w.rhai:4:14",
                "more than pool.max",
            ),
            bad(with_fields("    pool: #{ mx: 3 },"), "workloads/w.rhai:4:14", "did you mean `max`?"),
            bad(with_fields("    poolSize: 3,"), "workloads/w.rhai:4:5", "unknown field `poolSize`"),
            bad(
                with_fields("    command: [\"a\", 1],"),
                "workloads/w.rhai:4:20",
                "command[1]: expected text, found 1",
            ),
            bad(with_fields("    command: \"a b\","), "workloads/w.rhai:4:5", "expected a list"),
            bad(with_fields("    resources: #{ cpus: 0 },"), "workloads/w.rhai:4:19", "0 is out of range"),
            bad(with_fields("    network: \"host\","), "workloads/w.rhai:4:5", "share another network"),
            bad(with_fields("    runtime: \"runsc\","), "workloads/w.rhai:4:5", "not supported yet"),
            bad(with_fields("    activation: \"start\","), "workloads/w.rhai:4:5", "not supported yet"),
            bad(with_fields("    park_ms: 5000,"), "workloads/w.rhai:4:5", "not supported yet"),
            bad(
                with_fields("    schedules: #{ a: \"* * * * * *\" },"),
                "workloads/w.rhai:4:5",
                "not supported yet",
            ),
            bad(with_fields("    http_allow: [\"a.example\"],"), "workloads/w.rhai:4:5", "not supported yet"),
            bad(
                with_fields("    environment: #{ A: 1 },"),
                "workloads/w.rhai:4:21",
                "environment.A: expected text",
            ),
            bad(
                with_fields("    environment: #{ A: |x| x },"),
                "workloads/w.rhai:4:21",
                "may not be a function",
            ),
            bad(
                with_fields("    resources: #{ cpus: 1.0 / 0.0 },"),
                "workloads/w.rhai:4:19",
                "a number without a value",
            ),
            bad(
                with_fields("    volumes: #{ state: #{ containerPath: \"data\" } },"),
                "workloads/w.rhai:4:27",
                "volumes.state.container_path: \"data\" is not absolute",
            ),
            bad(with_fields("    volumes: #{ state: #{ } },"), "workloads/w.rhai:4:17", "is required"),
            bad(
                with_fields(&format!("{volumes}\n    persist: #{{ every_ms: 5 }},")),
                "workloads/w.rhai:5:17",
                "5 is too often",
            ),
            bad(with_fields("    persist: #{ keep_last: 5 },"), "workloads/w.rhai:4:5", "no volume `state`"),
            bad(
                with_fields("    timeouts: #{ on_clam: 100 },"),
                "workloads/w.rhai:4:18",
                "did you mean `on_claim`?",
            ),
            bad(
                with_fields("    timeouts: #{ on_claim: 100 },"),
                "workloads/w.rhai:4:18",
                "has no hook `on_claim`",
            ),
            bad(
                with_fields("    labels: #{ \"boilerhouse.x\": \"1\" },"),
                "workloads/w.rhai:4:5",
                "are the server's",
            ),
            bad(
                "fn workload() { #{ id: \"other\", image: \"a\" } }",
                "workloads/w.rhai:1:20",
                "rename the file to other.rhai",
            ),
            bad("fn workload() { #{ id: \"w\" } }", "workloads/w.rhai:1:1", "image: is required"),
            bad(
                "\n\nfn workload() {\n  base() }\nfn base() { #{ id: \"w\", image: \"\" } }",
                "workloads/w.rhai:3:1",
                "image: is empty",
            ),
            bad("fn workload() { 7 }", "workloads/w.rhai:1:1", "must return a map"),
            bad("fn workload() { throw \"no\"; }", "workloads/w.rhai:1:17", "workload() failed: no"),
            bad(
                "fn workload() { loop { } }",
                "workloads/w.rhai:1:22",
                "workload() failed: the deadline passed",
            ),
            bad("fn workload() { let s = \"x\"; loop { s += s; } }", "workloads/w.rhai:1:39", "too large"),
            bad("fn workload() { f() }\nfn f() { f() }", "workloads/w.rhai:1:17", "32 deep"),
            bad("const A = [1][3];\nfn workload() { #{} }", "workloads/w.rhai:1:15", "out of bounds"),
        ],
        None,
    );
}
