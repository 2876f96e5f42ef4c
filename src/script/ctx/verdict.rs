//! What a hook returns: verdicts, made by methods of `ctx` so that none can be mistyped.

use std::collections::BTreeMap;

use rhai::{Dynamic, Map, NativeCallContext};

use super::{ActionCtx, Ctx, DecideCtx, Primitive, Registry, data, known_keys, text};
use crate::{
    model::spec::environment_problem,
    script::{
        Verdict,
        call::{Failure, Outcome},
    },
};

/// The longest message of a rejection, in characters.
const MAX_MESSAGE: usize = 1000;
/// The longest time that a claimer is sent away for, in seconds.
const MAX_RETRY_S: f64 = 24.0 * 60.0 * 60.0;

/// A verdict as a script holds it.
#[derive(Debug, Clone)]
pub(in crate::script) struct Decision(pub(in crate::script) Verdict);

/// Registers the verdicts.
pub(super) fn register(registry: &mut Registry) {
    registry.module.set_custom_type::<Decision>("Verdict");
    registry.describe(
        Primitive::method("ctx", "accept", &[0, 1], "accept(#{env, metadata}?)", "The claim may go ahead.")
            .decides_only(),
    );
    registry.define("accept", |context: NativeCallContext, ctx: &mut DecideCtx| {
        let verdict = Verdict::Accept { env: BTreeMap::new(), metadata: serde_json::Map::new() };
        allowed(&context, ctx, "accept", verdict)
    });
    registry.define("accept", |context: NativeCallContext, ctx: &mut DecideCtx, with: Map| {
        let verdict = accept(&context, ctx, with)?;
        allowed(&context, ctx, "accept", verdict)
    });
    registry.describe(Primitive::method(
        "ctx",
        "reject",
        &[2],
        "reject(code, message)",
        "The claim is refused; the claimer gets the code and the message.",
    ));
    registry.define(
        "reject",
        |context: NativeCallContext, ctx: &mut DecideCtx, code: Dynamic, message: Dynamic| {
            let verdict = reject(&context, ctx, code, message)?;
            allowed(&context, ctx, "reject", verdict)
        },
    );
    registry.define(
        "reject",
        |context: NativeCallContext, ctx: &mut ActionCtx, code: Dynamic, message: Dynamic| {
            let verdict = reject(&context, ctx, code, message)?;
            allowed(&context, ctx, "reject", verdict)
        },
    );
    registry.describe(
        Primitive::method(
            "ctx",
            "retry_after",
            &[1],
            "retry_after(seconds)",
            "The claim is refused for now; the claimer is told when to come back.",
        )
        .decides_only(),
    );
    registry.define("retry_after", |context: NativeCallContext, ctx: &mut DecideCtx, seconds: Dynamic| {
        let verdict = retry_after(&context, &seconds)?;
        allowed(&context, ctx, "retry_after", verdict)
    });
    registry.describe(
        Primitive::method("ctx", "retire", &[0], "retire()", "The released slot is destroyed.")
            .decides_only(),
    );
    registry.define("retire", |context: NativeCallContext, ctx: &mut DecideCtx| {
        allowed(&context, ctx, "retire", Verdict::Retire)
    });
}

/// Gives the verdict to a hook that may return it.
fn allowed(
    context: &NativeCallContext<'_>,
    ctx: &impl Ctx,
    method: &str,
    verdict: Verdict,
) -> Outcome<Decision> {
    let hook = ctx.call().hook;
    if hook.verdicts().contains(&method) {
        return Ok(Decision(verdict));
    }
    Err(Failure::invalid(not_allowed(hook, method)).throw(context))
}

/// Says that a verdict is not a hook's to give, and which are.
pub(in crate::script) fn not_allowed(hook: crate::script::Hook, method: &str) -> String {
    let may: Vec<_> = hook.verdicts().iter().map(|name| format!("ctx.{name}(…)")).collect();
    let may = if may.is_empty() { "nothing".to_owned() } else { may.join(", ") };
    format!("ctx.{method}(…) is no verdict of {hook}, which may return {may}")
}

fn accept(context: &NativeCallContext<'_>, ctx: &DecideCtx, mut with: Map) -> Outcome<Verdict> {
    known_keys(context, "accept", &with, &["env", "metadata"])?;
    let mut env = BTreeMap::new();
    if let Some(given) = with.remove("env").filter(|given| !given.is_unit()) {
        let Some(given) = given.flatten().try_cast::<Map>() else {
            return Err(Failure::invalid("env must be a map of names to text").throw(context));
        };
        for (name, value) in given {
            let value = text(context, ctx.call(), &format!("env.{name}"), value)?;
            if let Some(problem) = environment_problem(&name) {
                return Err(Failure::invalid(format!("env: {problem}")).throw(context));
            }
            env.insert(name.to_string(), value);
        }
    }
    let metadata = match with.remove("metadata").filter(|given| !given.is_unit()) {
        None => serde_json::Map::new(),
        Some(given) => match data(context, "metadata", given)? {
            serde_json::Value::Object(metadata) => metadata,
            _ => return Err(Failure::invalid("metadata must be a map").throw(context)),
        },
    };
    Ok(Verdict::Accept { env, metadata })
}

fn reject(
    context: &NativeCallContext<'_>,
    ctx: &impl Ctx,
    code: Dynamic,
    message: Dynamic,
) -> Outcome<Verdict> {
    let code = text(context, ctx.call(), "the code", code)?;
    let is_code = (1..=63).contains(&code.len())
        && code.starts_with(|c: char| c.is_ascii_lowercase())
        && code.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !is_code {
        let message = format!("the code {code:?} does not match ^[a-z][a-z0-9_]{{0,62}}$");
        return Err(Failure::invalid(message).throw(context));
    }
    let message = text(context, ctx.call(), "the message", message)?;
    Ok(Verdict::Reject { code, message: message.chars().take(MAX_MESSAGE).collect() })
}

fn retry_after(context: &NativeCallContext<'_>, seconds: &Dynamic) -> Outcome<Verdict> {
    #[expect(clippy::cast_precision_loss, reason = "numbers that large are out of range")]
    let given = seconds.as_float().ok().or_else(|| seconds.as_int().ok().map(|whole| whole as f64));
    match given {
        Some(seconds) if seconds > 0.0 && seconds <= MAX_RETRY_S => {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 0 and a day in milliseconds"
            )]
            let ms = (seconds * 1000.0).ceil() as u64;
            Ok(Verdict::RetryAfter { ms })
        }
        _ => {
            let message = format!("retry_after takes seconds, more than 0 and at most {MAX_RETRY_S}");
            Err(Failure::invalid(message).throw(context))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::script::{Hook, Verdict, testing::Trial};

    #[test]
    fn hooks_decide() {
        let decided = |hook, body: &str| Trial::of(hook).run(body).unwrap();
        let Verdict::Accept { env, metadata } =
            decided(Hook::BeforeClaim, r#"ctx.accept(#{ env: #{ A: "b" }, metadata: #{ n: 1 } })"#)
        else {
            panic!("it accepts");
        };
        assert_eq!(env["A"], "b");
        assert_eq!(json!(metadata), json!({ "n": 1 }));
        assert!(matches!(decided(Hook::BeforeClaim, "return ctx.accept();"), Verdict::Accept { .. }));
        let rejected = Verdict::Reject { code: "no".to_owned(), message: "not you".to_owned() };
        assert_eq!(decided(Hook::BeforeClaim, r#"ctx.reject("no", "not you")"#), rejected);
        assert_eq!(decided(Hook::OnClaim, r#"ctx.reject("no", "not you")"#), rejected);
        assert_eq!(decided(Hook::BeforeClaim, "ctx.retry_after(2)"), Verdict::RetryAfter { ms: 2000 });
        assert_eq!(decided(Hook::BeforeClaim, "ctx.retry_after(0.5)"), Verdict::RetryAfter { ms: 500 });
        assert_eq!(decided(Hook::AfterRelease, "ctx.retire()"), Verdict::Retire);
        for hook in Hook::ALL {
            assert_eq!(decided(hook, "()"), Verdict::Default);
        }
    }

    #[test]
    fn a_wrong_verdict_is_an_error() {
        let rows = [
            (Hook::BeforeClaim, r#"ctx.reject("No!", "m")"#, "^[a-z]"),
            (Hook::BeforeClaim, r#"ctx.reject("no", 1)"#, "must be text, not a whole number"),
            (Hook::BeforeClaim, "ctx.retry_after(0)", "more than 0"),
            (Hook::BeforeClaim, r#"ctx.retry_after("1")"#, "takes seconds"),
            (Hook::BeforeClaim, "ctx.accept(#{ evn: #{} })", "did you mean `env`?"),
            (Hook::BeforeClaim, "ctx.accept(#{ env: #{ A: 1 } })", "env.A must be text"),
            (Hook::BeforeClaim, r#"ctx.accept(#{ env: #{ "A=": "1" } })"#, "no variable name"),
            (Hook::BeforeClaim, "ctx.accept(#{ metadata: #{ f: |x| x } })", "a function (`f`)"),
            (Hook::BeforeClaim, "ctx.accept(#{ metadata: 1 })", "must be a map"),
            (Hook::BeforeClaim, r#""yes""#, "returned text"),
            (Hook::BeforeClaim, "#{ accept: true }", "returned a map"),
            (Hook::BeforeRelease, "true", "returned true or false"),
        ];
        for (hook, body, fragment) in rows {
            let error = Trial::of(hook).run(body).expect_err(body);
            assert!(error.to_string().contains(fragment), "{body}: {error}");
        }
    }

    #[test]
    fn a_verdict_of_another_hook_is_an_error_also_through_a_variable() {
        for (hook, body) in [
            (Hook::BeforeClaim, "let c = ctx; c.retire()"),
            (Hook::AfterRelease, "let c = ctx; c.accept()"),
            (Hook::BeforeRelease, r#"let c = ctx; c.reject("a", "b")"#),
        ] {
            let error = Trial::of(hook).run(body).expect_err(body);
            assert!(error.to_string().contains("is no verdict of"), "{error}");
        }
    }
}
