//! What a hook adds to the claim's answer.

use rhai::{Dynamic, NativeCallContext};

use super::{ActionCtx, Ctx, Primitive, Registry, SecretText, data, text};
use crate::{
    model::Secret,
    script::{
        Output,
        call::{Call, Failure, Outcome},
    },
};

/// The largest output, in bytes of JSON.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;

/// Registers outputs.
pub(super) fn register(registry: &mut Registry) {
    registry.describe(
        Primitive::method(
            "ctx",
            "set_output",
            &[2],
            "set_output(key, value)",
            "Adds a value, or a secret, to the claim's answer.",
        )
        .acts_only(),
    );
    registry.define(
        "set_output",
        |context: NativeCallContext, ctx: &mut ActionCtx, key: Dynamic, value: Dynamic| {
            let call = ctx.call();
            let key = text(&context, call, "the key", key)?;
            let is_key = (1..=63).contains(&key.len())
                && key.starts_with(|c: char| c.is_ascii_alphabetic())
                && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
            if !is_key {
                let message = format!("the key {key:?} does not match ^[A-Za-z][A-Za-z0-9._-]{{0,62}}$");
                return Err(Failure::invalid(message).throw(&context));
            }
            let output = output(&context, call, value.flatten())?;
            call.host(&context)?
                .set_output(&key, output)
                .map_err(|error| Failure::from(error).throw(&context))
        },
    );
}

fn output(context: &NativeCallContext<'_>, call: &Call, value: Dynamic) -> Outcome<Output> {
    if let Some(secret) = value.read_lock::<SecretText>() {
        return Ok(Output::Secret(Secret::clone(&secret.secret)));
    }
    let value = data(context, "an output", value)?;
    let json = value.to_string();
    call.unmasked(context, &json)?;
    if json.len() > MAX_OUTPUT_BYTES {
        let message = format!("the output is {} bytes long; at most {MAX_OUTPUT_BYTES} are kept", json.len());
        return Err(Failure { code: "limit", message, exec: None }.throw(context));
    }
    Ok(Output::Plain(value))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::script::{Hook, testing::Trial};

    #[test]
    fn outputs_are_data_or_secrets() {
        let trial = Trial::of(Hook::OnClaim);
        trial
            .run(
                r#"
                ctx.set_output("n", #{ list: [1, 2.5, "x", ()] });
                ctx.set_output("url", "redis://:" + ctx.secrets.get_or_create("k", 16) + "@h");
                "#,
            )
            .unwrap();
        assert_eq!(
            trial.host.outputs(),
            [
                ("n".to_owned(), Output::Plain(json!({ "list": [1, 2.5, "x", null] }))),
                ("url".to_owned(), Output::Secret(Secret::new("redis://:s3cr3t@h"))),
            ]
        );
    }

    #[test]
    fn keys_and_sizes_are_checked() {
        for (body, fragment) in [
            (r#"ctx.set_output("", 1)"#, "does not match"),
            (r#"ctx.set_output("a b", 1)"#, "does not match"),
            (r#"ctx.set_output("f", |x| x)"#, "may not be a function"),
            (r#"let x = "0123456789"; for i in 0..13 { x += x; } ctx.set_output("x", x)"#, "at most 65536"),
        ] {
            let error = Trial::of(Hook::OnClaim).run(body).expect_err(body);
            assert!(error.to_string().contains(fragment), "{body}: {error}");
        }
    }
}
