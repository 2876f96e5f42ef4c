//! Commands in the container, and signals to it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rhai::{Array, Dynamic, Map, NativeCallContext};

use super::{ActionCtx, Ctx, Primitive, Registry, SecretText, known_keys, secrets::content, text, type_of};
use crate::{
    model::spec::{environment_problem, signal_name},
    script::{
        call::{Call, Failure, Outcome},
        host::{ExecCall, ExecResult},
    },
};

/// The most arguments of one command.
const MAX_ARGUMENTS: usize = 1000;
/// The most text of one command's arguments and variables together, in bytes.
const MAX_ARGUMENT_BYTES: usize = 128 * 1024;

/// Registers commands and signals.
pub(super) fn register(registry: &mut Registry) {
    registry.describe(
        Primitive::method(
            "ctx",
            "exec",
            &[1],
            "exec(argv | #{argv, stdin, env, timeout_ms}) -> #{status, stdout, stderr, truncated}",
            "Runs a command in the container; throws `exec_failed` when its status is not 0.",
        )
        .acts_only(),
    );
    registry.define("exec", |context: NativeCallContext, ctx: &mut ActionCtx, command: Dynamic| {
        let (program, result) = run(&context, ctx.call(), command)?;
        if result.status != 0 {
            // Not what the command wrote: it may hold the tenant's secrets, and this text is logged.
            let message = format!("`{program}` ended with status {}", result.status);
            let exec = Some(Arc::new(result));
            return Err(Failure { code: "exec_failed", message, exec }.throw(&context));
        }
        Ok(to_map(&result))
    });
    registry.describe(
        Primitive::method(
            "ctx",
            "try_exec",
            &[1],
            "try_exec(argv | #{argv, stdin, env, timeout_ms}) -> #{status, stdout, stderr, truncated}",
            "Runs a command in the container, whatever its status.",
        )
        .acts_only(),
    );
    registry.define("try_exec", |context: NativeCallContext, ctx: &mut ActionCtx, command: Dynamic| {
        run(&context, ctx.call(), command).map(|(_, result)| to_map(&result))
    });
    registry.describe(
        Primitive::method(
            "ctx",
            "signal",
            &[1],
            "signal(name)",
            "Sends a signal, e.g. \"SIGHUP\", to the container's first process.",
        )
        .acts_only(),
    );
    registry.define("signal", |context: NativeCallContext, ctx: &mut ActionCtx, name: Dynamic| {
        let name = text(&context, ctx.call(), "the signal", name)?;
        let name = signal_name(&name).map_err(|problem| Failure::invalid(problem).throw(&context))?;
        ctx.call().wait(&context, |host| async move { host.signal(&name).await })
    });
    failures(registry);
}

/// What a caught error of the host's tells.
fn failures(registry: &mut Registry) {
    registry.module.set_custom_type::<Failure>("HostError");
    registry.getter("code", |failure: &Failure| failure.code.to_owned());
    registry.getter("message", |failure: &Failure| failure.message.clone());
    registry.getter("status", |failure: &Failure| {
        failure.exec.as_ref().map_or(Dynamic::UNIT, |exec| exec.status.into())
    });
    registry.getter("stdout", |failure: &Failure| {
        failure.exec.as_ref().map_or(Dynamic::UNIT, |exec| lossy(&exec.stdout).into())
    });
    registry.getter("stderr", |failure: &Failure| {
        failure.exec.as_ref().map_or(Dynamic::UNIT, |exec| lossy(&exec.stderr).into())
    });
    registry.define("to_string", |failure: &mut Failure| format!("{}: {}", failure.code, failure.message));
    registry.define("to_debug", |failure: &mut Failure| format!("{}: {}", failure.code, failure.message));
}

/// Runs a command; returns its program beside what it gave.
fn run(context: &NativeCallContext<'_>, call: &Call, command: Dynamic) -> Outcome<(String, ExecResult)> {
    let command = parse(context, call, command.flatten())?;
    let program = command.argv[0].clone();
    let result = call.wait(context, |host| async move { host.exec(command).await })?;
    Ok((program, result))
}

fn parse(context: &NativeCallContext<'_>, call: &Call, command: Dynamic) -> Outcome<ExecCall> {
    let refuse = |message: String| Failure::invalid(message).throw(context);
    let mut map = match command.clone().try_cast::<Map>() {
        Some(map) => map,
        None if command.is_array() => Map::from([("argv".into(), command)]),
        None => {
            let found = type_of(&command);
            return Err(refuse(format!("a command is a list of texts or a map with `argv`, not {found}")));
        }
    };
    known_keys(context, "a command", &map, &["argv", "stdin", "env", "timeout_ms"])?;
    let mut take = |key: &str| map.remove(key).map(Dynamic::flatten).filter(|value| !value.is_unit());
    let argv = argv(context, call, take("argv"))?;
    let env = match take("env") {
        Some(env) => environment(context, call, env)?,
        None => BTreeMap::new(),
    };
    let size: usize = argv.iter().map(String::len).sum::<usize>()
        + env.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
    if size > MAX_ARGUMENT_BYTES {
        return Err(refuse(format!(
            "the command is {size} bytes long; at most {MAX_ARGUMENT_BYTES} are passed"
        )));
    }
    let stdin = take("stdin").map(|stdin| content(context, call, "stdin", stdin)).transpose()?;
    let remaining = call.guard.remaining();
    let timeout = match take("timeout_ms") {
        None => remaining,
        Some(ms) => match ms.as_int().ok().and_then(|ms| u64::try_from(ms).ok()).filter(|ms| *ms > 0) {
            Some(ms) => Duration::from_millis(ms).min(remaining),
            None => return Err(refuse("timeout_ms must be a whole number above 0".to_owned())),
        },
    };
    Ok(ExecCall { argv, env, stdin, timeout })
}

fn argv(context: &NativeCallContext<'_>, call: &Call, argv: Option<Dynamic>) -> Outcome<Vec<String>> {
    let refuse = |message: &str| Failure::invalid(message).throw(context);
    let Some(words) = argv.and_then(Dynamic::try_cast::<Array>) else {
        return Err(refuse("argv must be a list of texts, e.g. [\"redis-cli\", \"ping\"]"));
    };
    if words.is_empty() || words.len() > MAX_ARGUMENTS {
        return Err(refuse("argv must have 1 to 1000 entries"));
    }
    let mut argv = Vec::with_capacity(words.len());
    for (index, word) in words.into_iter().enumerate() {
        if word.is::<SecretText>() {
            return Err(refuse(
                "a secret may not be an argument: arguments can be read in process lists; \
                 give it on stdin or write it with ctx.secrets.write",
            ));
        }
        argv.push(text(context, call, &format!("argv[{index}]"), word)?);
    }
    if argv[0].is_empty() {
        return Err(refuse("argv[0], the program, is empty"));
    }
    Ok(argv)
}

fn environment(
    context: &NativeCallContext<'_>,
    call: &Call,
    env: Dynamic,
) -> Outcome<BTreeMap<String, String>> {
    let Some(env) = env.try_cast::<Map>() else {
        return Err(Failure::invalid("env must be a map of names to text").throw(context));
    };
    let mut checked = BTreeMap::new();
    for (name, value) in env {
        if value.is::<SecretText>() {
            let message = "a secret may not be in a command's env: the engine shows it; \
                           give it on stdin or write it with ctx.secrets.write";
            return Err(Failure::invalid(message).throw(context));
        }
        if let Some(problem) = environment_problem(&name) {
            return Err(Failure::invalid(format!("env: {problem}")).throw(context));
        }
        checked.insert(name.to_string(), text(context, call, &format!("env.{name}"), value)?);
    }
    Ok(checked)
}

fn to_map(result: &ExecResult) -> Map {
    Map::from([
        ("status".into(), result.status.into()),
        ("stdout".into(), lossy(&result.stdout).into()),
        ("stderr".into(), lossy(&result.stderr).into()),
        ("truncated".into(), result.truncated.into()),
    ])
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use crate::script::{Hook, testing::Trial};

    #[test]
    fn a_command_gets_its_words_and_gives_its_output() {
        let trial = Trial::of(Hook::OnClaim);
        trial.asserts(
            r#"
            let r = ctx.exec(["echo", "hi"]);
            let t = ctx.try_exec(#{ argv: ["false"], stdin: "in", env: #{ A: "b" }, timeout_ms: 50 });
            check([r.status == 0, r.stdout == "hi\n", r.stderr == "", !r.truncated, t.status == 1]);
            "#,
        );
        let calls = trial.host.calls();
        assert_eq!(calls[0], "exec [\"echo\", \"hi\"] {} stdin=None");
        assert_eq!(calls[1], "exec [\"false\"] {\"A\": \"b\"} stdin=Some(\"in\")");
        let timeouts = trial.host.timeouts_ms();
        assert!(timeouts[0] > 1000, "the hook's own deadline: {timeouts:?}");
        assert_eq!(timeouts[1], 50);
    }

    #[test]
    fn a_failed_command_can_be_caught() {
        Trial::of(Hook::OnClaim).asserts(
            r#"
            try { ctx.exec(["false"]); } catch (e) {
                return check([e.code == "exec_failed", e.status == 1, e.stderr == "oops",
                        e.message.contains("`false` ended with status 1")]);
            }
            check([false]);
            "#,
        );
    }

    #[test]
    fn the_output_of_a_failed_command_is_in_no_error_text() {
        let error = Trial::of(Hook::OnClaim).run(r#"ctx.exec(["false"]);"#).unwrap_err();
        assert!(error.to_string().contains("`false` ended with status 1"), "{error}");
        assert!(!format!("{error} {error:?}").contains("oops"), "{error:?}");
    }

    #[test]
    fn a_signal_is_normalised() {
        let trial = Trial::of(Hook::BeforeRelease);
        trial.run(r#"ctx.signal("hup")"#).unwrap();
        assert_eq!(trial.host.calls(), ["signal SIGHUP"]);
    }

    #[test]
    fn wrong_commands_are_refused_before_the_host_is_asked() {
        let rows = [
            (r#"ctx.exec("echo hi")"#, "list of texts or a map with `argv`, not text"),
            ("ctx.exec([])", "1 to 1000"),
            (r#"ctx.exec([""])"#, "is empty"),
            ("ctx.exec([\"sleep\", 1])", "argv[1] must be text, not a whole number"),
            (r#"ctx.exec(["a\x00b"])"#, "zero byte"),
            (r#"ctx.exec(#{ argv: ["a"], stdn: "" })"#, "did you mean `stdin`?"),
            (r#"ctx.exec(#{ argv: ["a"], timeout_ms: 0 })"#, "above 0"),
            (r#"ctx.exec(#{ argv: ["a"], env: #{ "A=": "" } })"#, "no variable name"),
            (r#"ctx.exec(#{ argv: ["a"], stdin: 1 })"#, "stdin must be text, bytes or a secret"),
            (r#"ctx.signal("SIGNOPE")"#, "no signal"),
            (
                r#"let x = "0123456789abcdef"; for i in 0..14 { x += x; } ctx.exec(["a", x])"#,
                "at most 131072",
            ),
        ];
        for (body, fragment) in rows {
            let trial = Trial::of(Hook::OnClaim);
            let error = trial.run(body).expect_err(body);
            assert!(error.to_string().contains(fragment), "{body}: {error}");
            assert!(trial.host.calls().is_empty(), "{body}");
        }
    }
}
