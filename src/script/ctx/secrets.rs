//! Secrets: opaque values, and the tenant's secrets directory.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use rhai::{Blob, Dynamic, ImmutableString, NativeCallContext};

use super::{ActionCtx, Ctx, Primitive, Registry, text, type_of};
use crate::{
    model::Secret,
    script::{
        call::{Call, Failure, Outcome},
        engine::MAX_STRING_BYTES,
    },
};

/// The sizes of a made secret, in random bytes.
const SECRET_BYTES: std::ops::RangeInclusive<i64> = 16..=1024;

/// A secret as a script holds it: it prints as `***`, and text joined to it is
/// secret too.
#[derive(Clone)]
pub(in crate::script) struct SecretText {
    pub(in crate::script) secret: Arc<Secret>,
    /// Set when it is turned into text.
    masked: Arc<AtomicBool>,
}

/// `ctx.secrets`
#[derive(Clone)]
struct Secrets(Arc<Call>);

/// Registers secrets.
pub(super) fn register(registry: &mut Registry) {
    values(registry);
    registry.module.set_custom_type::<Secrets>("Secrets");
    registry.describe(
        Primitive::property("ctx", "secrets", "secrets", "The tenant's secrets.")
            .gives("ctx.secrets")
            .acts_only(),
    );
    registry.getter("secrets", |ctx: &ActionCtx| Secrets(Arc::clone(ctx.call())));
    registry.describe(
        Primitive::method(
            "ctx.secrets",
            "write",
            &[2],
            "write(name, text | bytes | secret)",
            "Writes a file into the secrets directory.",
        )
        .acts_only(),
    );
    registry.define(
        "write",
        |context: NativeCallContext, secrets: &mut Secrets, name: Dynamic, value: Dynamic| {
            let name = file_name(&context, &secrets.0, name)?;
            let secret = content(&context, &secrets.0, "a secret", value)?;
            secrets.0.wait(&context, |host| async move { host.secret_write(&name, secret).await })
        },
    );
    registry.describe(
        Primitive::method(
            "ctx.secrets",
            "get_or_create",
            &[2],
            "get_or_create(name, bytes) -> secret",
            "Returns the tenant's stored secret, made of so many random bytes when there is none, and writes its file.",
        )
        .acts_only(),
    );
    registry.define(
        "get_or_create",
        |context: NativeCallContext, secrets: &mut Secrets, name: Dynamic, bytes: Dynamic| {
            let name = file_name(&context, &secrets.0, name)?;
            let bytes = bytes.as_int().ok().filter(|bytes| SECRET_BYTES.contains(bytes));
            let Some(bytes) = bytes.and_then(|bytes| usize::try_from(bytes).ok()) else {
                return Err(Failure::invalid("a made secret has 16 to 1024 bytes").throw(&context));
            };
            let secret = secrets
                .0
                .wait(&context, |host| async move { host.secret_get_or_create(&name, bytes).await })?;
            Ok(SecretText { secret: Arc::new(secret), masked: Arc::clone(&secrets.0.masked) })
        },
    );
}

/// What can be done with a secret as such: print it as `***`, and join it.
fn values(registry: &mut Registry) {
    registry.module.set_custom_type::<SecretText>("Secret");
    for name in ["to_string", "to_debug"] {
        registry.define(name, |secret: &mut SecretText| {
            secret.masked.store(true, Ordering::Relaxed);
            "***".to_owned()
        });
    }
    registry.define("+", |context: NativeCallContext, secret: SecretText, text: ImmutableString| {
        secret.joined(&context, secret.secret.expose(), text.as_bytes())
    });
    registry.define("+", |context: NativeCallContext, text: ImmutableString, secret: SecretText| {
        secret.joined(&context, text.as_bytes(), secret.secret.expose())
    });
    registry.define("+", |context: NativeCallContext, left: SecretText, right: SecretText| {
        left.joined(&context, left.secret.expose(), right.secret.expose())
    });
    registry.define(
        "+=",
        |context: NativeCallContext, secret: &mut SecretText, text: ImmutableString| -> Outcome<()> {
            *secret = secret.joined(&context, secret.secret.expose(), text.as_bytes())?;
            Ok(())
        },
    );
    registry.define(
        "+=",
        |context: NativeCallContext, _: &mut ImmutableString, _: SecretText| -> Outcome<()> {
            let message = "a secret cannot be added to text in place; write `text = text + secret`";
            Err(Failure::invalid(message).throw(&context))
        },
    );
}

// === impl SecretText ===

impl SecretText {
    fn joined(&self, context: &NativeCallContext<'_>, left: &[u8], right: &[u8]) -> Outcome<Self> {
        if left.len() + right.len() > MAX_STRING_BYTES {
            return Err(Failure::invalid("the secret is too long").throw(context));
        }
        let secret = Arc::new(Secret::new([left, right].concat()));
        Ok(Self { secret, masked: Arc::clone(&self.masked) })
    }
}

impl std::fmt::Debug for SecretText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Takes what is written somewhere: text, bytes or a secret.
///
/// # Errors
/// `invalid`, naming `what`, for anything else and for text with a replaced secret.
pub(super) fn content(
    context: &NativeCallContext<'_>,
    call: &Call,
    what: &str,
    value: Dynamic,
) -> Outcome<Secret> {
    let value = value.flatten();
    if let Some(secret) = value.read_lock::<SecretText>() {
        return Ok(Secret::clone(&secret.secret));
    }
    if let Some(bytes) = value.read_lock::<Blob>() {
        return Ok(Secret::new(bytes.clone()));
    }
    let found = type_of(&value);
    match value.into_string() {
        Ok(text) => {
            call.unmasked(context, &text)?;
            Ok(Secret::new(text))
        }
        Err(_) => {
            let message = format!("{what} must be text, bytes or a secret, not {found}");
            Err(Failure::invalid(message).throw(context))
        }
    }
}

/// Takes the name of a secret's file.
fn file_name(context: &NativeCallContext<'_>, call: &Call, name: Dynamic) -> Outcome<String> {
    let name = text(context, call, "the name", name)?;
    let is_plain = (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if is_plain {
        return Ok(name);
    }
    let message = format!("{name:?} is no secret's name; it must match {}", crate::model::id::ID_PATTERN);
    Err(Failure::invalid(message).throw(context))
}

#[cfg(test)]
mod tests {
    use crate::script::{Hook, testing::Trial};

    #[test]
    fn a_secret_is_made_joined_and_written_without_being_shown() {
        let trial = Trial::of(Hook::OnClaim);
        trial.asserts(
            r#"
            let key = ctx.secrets.get_or_create("key", 32);
            let line = "requirepass " + key + "\n";
            line += "end";
            ctx.secrets.write("conf", line);
            ctx.exec(#{ argv: ["cat"], stdin: "[" + (key + key) + "]" });
            check([type_of(key) == "Secret", type_of(line) == "Secret", `${key}` == "***", key.to_string() == "***"]);
            "#,
        );
        let calls = trial.host.calls();
        assert_eq!(calls[0], "get_or_create key 32");
        assert_eq!(calls[1], "secret_write conf requirepass s3cr3t\nend");
        assert_eq!(calls[2], "exec [\"cat\"] {} stdin=Some(\"[s3cr3ts3cr3t]\")");
    }

    /// P11
    #[test]
    fn a_secret_cannot_get_where_it_could_be_read() {
        let rows = [
            (r#"ctx.exec(["a", key])"#, "may not be an argument"),
            (r#"ctx.try_exec(#{ argv: ["a"], env: #{ K: key } })"#, "may not be in a command's env"),
            (r#"ctx.log.info(key)"#, "may not be a secret"),
            (r#"ctx.log.info("x", #{ k: key })"#, "may not hold a secret (`k`)"),
            (r#"ctx.set_output("k", [key])"#, "may not hold a secret (`[0]`)"),
            (r#"ctx.reject("no", key)"#, "may not be a secret"),
            // Not silently a password of three asterisks:
            (r#"ctx.exec(["a", `pass=${key}`])"#, "reads `***`"),
            (r#"ctx.exec(#{ argv: ["a"], stdin: `pass ${key}` })"#, "reads `***`"),
            (r#"ctx.state.write("f", key.to_string())"#, "reads `***`"),
            (r#"ctx.set_output("url", `redis://:${key}@h`)"#, "reads `***`"),
            (r#"let t = "x"; t += key;"#, "in place"),
        ];
        for (body, fragment) in rows {
            let trial = Trial::of(Hook::OnClaim);
            let error = trial
                .run(&format!("let key = ctx.secrets.get_or_create(\"key\", 32);\n{body}"))
                .expect_err(body);
            assert!(error.to_string().contains(fragment), "{body}: {error}");
            assert!(!format!("{error} {error:?}").contains("s3cr3t"), "{body}: {error:?}");
            assert_eq!(trial.host.calls(), ["get_or_create key 32"], "{body}");
        }
    }

    #[test]
    fn a_thrown_or_printed_secret_is_masked() {
        let trial = Trial::of(Hook::OnClaim);
        let error = trial
            .run(r#"let k = ctx.secrets.get_or_create("key", 32); print(k); debug([k]); throw #{ code: "x", key: k };"#)
            .unwrap_err();
        let logs = trial.host.logs();
        assert!(!format!("{error} {error:?} {logs:?}").contains("s3cr3t"), "{error:?} {logs:?}");
    }

    #[test]
    fn names_and_sizes_are_checked() {
        for (body, fragment) in [
            (r#"ctx.secrets.write("../x", "v")"#, "no secret's name"),
            (r#"ctx.secrets.write("", "v")"#, "no secret's name"),
            (r#"ctx.secrets.write("a", 1)"#, "text, bytes or a secret"),
            (r#"ctx.secrets.get_or_create("a", 8)"#, "16 to 1024"),
        ] {
            let error = Trial::of(Hook::OnClaim).run(body).expect_err(body);
            assert!(error.to_string().contains(fragment), "{body}: {error}");
        }
    }
}
