//! What scripts do to a runner, and what they must not be able to do.

use std::time::Instant;

use super::*;
use crate::script::{
    HookErrorKind::{BadReturn, Busy, Cancelled, Deadline, Failed, Panicked, Threw},
    SourceFile, compile,
    testing::{FakeHost, Trial, facts},
};

/// A bomb that has not gone off by then never will; not a figure to reach.
const BOUND: Duration = Duration::from_secs(60);

/// A trial whose hook may take a quarter of a second.
fn short(hook: Hook) -> Trial {
    Trial { spec: format!("timeouts: #{{ {hook}: 250 }}"), ..Trial::of(hook) }
}

/// P6, P9: whatever a script does, its hook ends, and the error says where.
#[test]
fn bombs_end_with_an_error_that_says_where() {
    // Body, kind, fragment, line (bodies begin at line 4).
    let rows: &[(&str, HookErrorKind, &str, usize)] = &[
        ("loop { }", Deadline, "deadline", 4),
        ("\nwhile true { let x = 1; }", Deadline, "deadline", 5),
        ("try { loop { } } catch { }", Deadline, "deadline", 4),
        ("fn_that_recurses(1)", Failed, "32 deep", 4),
        ("let f = |f, n| f.call(f, n + 1); f.call(f, 1)", Failed, "32 deep", 4),
        ("let s = \"x\"; loop { s += s; }", Failed, "too large", 4),
        ("let s = \"x\"; s.pad(1000000000, \"y\");", Failed, "too large", 4),
        ("let a = [1]; loop { a += a; }", Failed, "too large", 4),
        ("let a = []; a.pad(1000000000, 0);", Failed, "too large", 4),
        ("let b = blob(1000000000, 0);", Failed, "too large", 4),
        ("let m = #{}; loop { m = #{ a: m, b: m, c: m }; }", Failed, "too large", 4),
        ("let a = []; loop { let b = [a, a, a]; a = b; }", Failed, "too large", 4),
        // Closures that native functions call: their operations are counted anew each time.
        ("let a = []; a.pad(9000, 0); loop { a.map(|x| x + 1); }", Deadline, "deadline", 4),
        (
            "let a = []; a.pad(9000, 0); let b = a; a.map(|x| { b.map(|y| x + y); 0 });",
            Deadline,
            "deadline",
            4,
        ),
        // `sort` swallows the error of its comparison.
        ("let a = [3, 1, 2]; a.sort(|x, y| { loop { } });", Deadline, "deadline", 0),
        // No place of its own: the hook's.
        ("let a = [1]; a.map(|x| a.len());", Failed, "data race", 3),
        ("let x = 9223372036854775807; x + 1", Failed, "overflow", 4),
        ("let a = [1]; a[7]", Failed, "out of bounds", 4),
        ("1 / 0", Failed, "zero", 4),
        ("throw \"mine\";", Threw, "mine", 4),
        ("throw #{ code: \"a\", message: \"b\" };", Threw, "\"message\": \"b\"", 4),
        ("throw;", Threw, "nothing", 4),
        ("7", BadReturn, "returned a whole number", 3),
        ("|x| x", BadReturn, "returned a function", 3),
        ("ctx", BadReturn, "returned a value of the server's", 3),
        ("ctx.no_such()", Failed, "unknown function `no_such", 4),
        ("ctx.no_such", Failed, "no_such", 4),
        ("ctx.tenant.no_such", Failed, "no_such", 4),
        ("no_such(1)", Failed, "unknown function `no_such", 4),
        ("let n = 0; for i in range(0, 1000000000000) { n += i; }", Deadline, "deadline", 4),
    ];
    for (body, kind, fragment, line) in rows {
        let began = Instant::now();
        let trial = short(Hook::BeforeClaim);
        let body = if body.starts_with("fn_that_recurses") {
            format!("{body}\n}}\nfn fn_that_recurses(n) {{\n\nfn_that_recurses(n + 1)")
        } else {
            (*body).to_owned()
        };
        let error = trial.run(&body).expect_err(&body);
        assert!(began.elapsed() < BOUND, "{body} ended in time");
        assert_eq!(error.kind, *kind, "{body}: {error}");
        assert!(error.diagnostic.message.contains(fragment), "{body}: {error}");
        assert_eq!(error.diagnostic.file, "w.rhai", "{body}: {error}");
        if *line > 0 {
            assert_eq!(error.diagnostic.line, Some(*line), "{body}: {error}");
            assert!(error.diagnostic.column.is_some(), "{body}: {error}");
        }
    }
}

/// A stack that overflows would end the process, and this test with it.
#[test]
fn the_deepest_recursion_of_the_deepest_expressions_fits_the_stack() {
    let body = |open: &str, close: &str, depth: usize| {
        format!("f(1)\n}}\nfn f(n) {{ {}f(n + 1){}", open.repeat(depth), close.repeat(depth))
    };
    let deepest = |open: &str, close: &str| {
        let parses = |depth: &usize| {
            let text = format!("fn g() {{ {} }}", body(open, close, *depth));
            compile::on_big_stack(|| compile::parse(&SourceFile::new("g", text)).is_ok()).unwrap()
        };
        body(open, close, (1..64).rev().find(parses).expect("the flattest parses"))
    };
    let bodies = [
        deepest("[", "]"),
        deepest("(1 + ", ")"),
        deepest("if true { ", " }"),
        deepest("`${", "}`"),
        deepest("[1].map(|x| ", ")"),
        deepest("#{ a: ", " }"),
    ];
    for body in bodies {
        let error = short(Hook::BeforeClaim).run(&body).expect_err(&body);
        assert!(error.diagnostic.message.contains("32 deep"), "{body}: {error}");
    }
}

/// P6, P9: a host call does not outlive its hook, nor does its panic.
#[test]
fn host_calls_end_with_the_hook() {
    // Body, kind, fragment, whether the place is the host call's.
    let rows: &[(&str, HookErrorKind, &str)] = &[
        ("ctx.exec([\"hang\"]);", Deadline, "deadline"),
        ("try { ctx.exec([\"hang\"]); } catch { }", Deadline, "deadline"),
        ("ctx.exec([\"wait\"]);", Deadline, "deadline"),
        ("ctx.exec([\"panic\"]);", Panicked, "panicked"),
        ("try { ctx.exec([\"panic\"]); } catch { }", Panicked, "panicked"),
        ("ctx.set_output(\"panic\", 1);", Panicked, "panicked"),
    ];
    for inline in [false, true] {
        for (body, kind, fragment) in rows {
            let trial = Trial { inline, ..short(Hook::OnClaim) };
            let began = Instant::now();
            let error = trial.run(body).expect_err(body);
            assert!(began.elapsed() < BOUND, "{body} ended in time");
            assert_eq!(error.kind, *kind, "{body}: {error}");
            assert!(error.diagnostic.message.contains(fragment), "{body}: {error}");
        }
        let error = Trial { inline, ..short(Hook::OnClaim) }.run("\n   ctx.exec([\"hang\"]);").unwrap_err();
        assert_eq!(error.diagnostic.place(), "w.rhai:5:8", "{error}");
    }
}

#[test]
fn an_error_in_a_shared_script_points_there_and_shows_the_calls() {
    let lib = "fn outer(ctx) {\n  inner(ctx)\n}\nfn inner(ctx) {\n  throw \"deep\"\n}\n";
    let trial = Trial { lib: Some(lib.to_owned()), ..Trial::of(Hook::OnClaim) };
    let error = trial.run("helper(ctx)\n}\nfn helper(ctx) {\n  lib::outer(ctx)").unwrap_err();
    assert_eq!(error.diagnostic.place(), "lib.rhai:5:3");
    assert_eq!(error.diagnostic.source_line.as_deref(), Some("  throw \"deep\""));
    let stack: Vec<_> = error
        .diagnostic
        .stack
        .iter()
        .map(|frame| format!("{} {}:{}", frame.function, frame.file, frame.line.unwrap_or(0)))
        .collect();
    assert_eq!(stack, ["inner lib.rhai:2", "outer w.rhai:7", "helper w.rhai:4"]);
    let text = error.diagnostic.to_string();
    assert!(text.contains("error: deep\n --> lib.rhai:5:3"), "{text}");
}

#[test]
fn constants_and_imports_reach_hooks() {
    let lib = "const STEP = 5;\nfn add(n) { n + global::STEP }\n";
    let trial = Trial { lib: Some(lib.to_owned()), ..Trial::of(Hook::OnClaim) };
    trial.asserts("check([lib::add(global::BASE) == 7]);\n}\nconst BASE = 2;\nfn unused() {");
}

/// Runs a hook of a workload with a body on a multi-threaded runtime.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn calls_share_nothing_and_run_side_by_side() {
    let trial = Trial::of(Hook::OnClaim);
    let workload =
        trial.workload("ctx.exec([\"echo\", ctx.tenant.id]); ctx.set_output(\"id\", ctx.tenant.id);");
    let runner = Arc::new(Runner::new(RunnerOptions::default()));
    runtime().block_on(async {
        let mut tasks = Vec::new();
        for number in 0..64 {
            let (runner, workload) = (Arc::clone(&runner), Arc::clone(&workload));
            tasks.push(tokio::spawn(async move {
                let host = Arc::new(FakeHost::default());
                let mut facts = facts(Hook::OnClaim);
                facts.tenant.id = format!("t{number}");
                let shared: SharedHost = host.clone();
                let verdict = runner.run(&workload, Hook::OnClaim, facts, Some(shared)).await.unwrap();
                assert_eq!(verdict, Verdict::Default);
                let id = crate::script::Output::Plain(serde_json::json!(format!("t{number}")));
                assert_eq!(host.outputs(), [("id".to_owned(), id)]);
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn a_full_runner_says_busy_and_deciding_hooks_go_past_it() {
    let options = || RunnerOptions { threads: 1, queue: 0, ..RunnerOptions::default() };
    let runner = Arc::new(Runner::new(options()));
    let hanging = Trial::of(Hook::OnClaim);
    let hang = hanging.workload("ctx.exec([\"hang\"]);");
    let waiting = short(Hook::OnClaim).workload("()");
    let deciding = short(Hook::BeforeClaim).workload("ctx.accept()");
    runtime().block_on(async {
        let host: SharedHost = hanging.host.clone();
        let first = tokio::spawn({
            let runner = Arc::clone(&runner);
            async move { runner.run(&hang, Hook::OnClaim, facts(Hook::OnClaim), Some(host)).await }
        });
        let until = Instant::now() + BOUND;
        while hanging.host.calls().is_empty() {
            assert!(Instant::now() < until, "the first hook begins");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let error = runner.run(&waiting, Hook::OnClaim, facts(Hook::OnClaim), None).await.unwrap_err();
        assert_eq!(error.kind, Busy, "{error}");
        let verdict = runner.run(&deciding, Hook::BeforeClaim, facts(Hook::BeforeClaim), None).await;
        assert!(matches!(verdict, Ok(Verdict::Accept { .. })), "{verdict:?}");
        runner.shut_down();
        assert_eq!(first.await.unwrap().unwrap_err().kind, Cancelled);
        let late = runner.run(&waiting, Hook::OnClaim, facts(Hook::OnClaim), None).await.unwrap_err();
        assert_eq!(late.kind, Cancelled, "{late}");
    });
}

#[test]
fn a_hook_whose_caller_goes_away_ends() {
    let trial = Trial::of(Hook::OnClaim);
    let runner = Runner::new(RunnerOptions { threads: 1, queue: 0, ..RunnerOptions::default() });
    runtime().block_on(async {
        for body in ["ctx.exec([\"hang\"]);", "ctx.signal(\"HUP\"); loop { }"] {
            let workload = trial.workload(body);
            let before = trial.host.calls().len();
            let host: SharedHost = trial.host.clone();
            let call = runner.run(&workload, Hook::OnClaim, facts(Hook::OnClaim), Some(host));
            let begun = async {
                while trial.host.calls().len() == before {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::select! {
                result = call => panic!("{result:?}"),
                () = begun => {}
                () = tokio::time::sleep(BOUND) => panic!("it begins"),
            }
        }
        // The only thread is free again, so this hook gets it.
        let workload = trial.workload("()");
        let verdict = runner.run(&workload, Hook::OnClaim, facts(Hook::OnClaim), None).await;
        assert_eq!(verdict.unwrap(), Verdict::Default);
    });
}

#[tokio::test(start_paused = true)]
async fn an_inline_runner_lives_on_virtual_time() {
    let runner = Runner::new(RunnerOptions { inline: true, ..RunnerOptions::default() });
    let trial = Trial::of(Hook::OnClaim);
    let workload = trial.workload("let r = ctx.exec([\"wait\"]); check([r.stdout == \"waited\"]);");
    let began = tokio::time::Instant::now();
    let host: SharedHost = trial.host.clone();
    let verdict = runner.run(&workload, Hook::OnClaim, facts(Hook::OnClaim), Some(host.clone())).await;
    assert_eq!(verdict.unwrap(), Verdict::Default);
    assert_eq!(began.elapsed(), Duration::from_secs(10), "exactly the command's time");

    let workload = trial.workload("ctx.exec([\"hang\"]);");
    let error = runner.run(&workload, Hook::OnClaim, facts(Hook::OnClaim), Some(host)).await.unwrap_err();
    assert_eq!(error.kind, Deadline, "{error}");
    assert_eq!(began.elapsed(), Duration::from_secs(40), "exactly the hook's deadline later");
}

#[test]
fn a_hook_that_is_not_there_is_the_default_and_needs_no_host() {
    let workload = Trial::of(Hook::OnClaim).workload("ctx.state.read(\"x\")");
    let runner = Runner::new(RunnerOptions::default());
    runtime().block_on(async {
        let verdict = runner.run(&workload, Hook::AfterRelease, facts(Hook::AfterRelease), None).await;
        assert_eq!(verdict.unwrap(), Verdict::Default);
        let error = runner.run(&workload, Hook::OnClaim, facts(Hook::OnClaim), None).await.unwrap_err();
        assert!(error.diagnostic.message.contains("unavailable"), "{error}");
    });
}
