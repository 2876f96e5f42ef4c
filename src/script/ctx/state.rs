//! Files of the tenant's state directory.

use std::sync::Arc;

use rhai::{Array, Blob, Dynamic, NativeCallContext};

use super::{ActionCtx, Ctx, Primitive, Registry, secrets::content, text};
use crate::script::{
    call::{Call, Failure, Outcome},
    engine::MAX_STRING_BYTES,
};

/// The longest path, in bytes, as Linux has it.
const MAX_PATH_BYTES: usize = 4096;
/// The most bytes that become a blob; a blob is an array to the engine's limits.
const MAX_BLOB_BYTES: usize = 10_000;

/// `ctx.state`
#[derive(Clone)]
struct State(Arc<Call>);

/// Registers the state directory.
pub(super) fn register(registry: &mut Registry) {
    registry.module.set_custom_type::<State>("State");
    registry.describe(
        Primitive::property("ctx", "state", "state", "The tenant's state directory.")
            .gives("ctx.state")
            .acts_only(),
    );
    registry.getter("state", |ctx: &ActionCtx| State(Arc::clone(ctx.call())));
    reading(registry);
    writing(registry);
}

fn describe(
    registry: &mut Registry,
    name: &'static str,
    parameters: &'static [usize],
    signature: &'static str,
    doc: &'static str,
) {
    registry.describe(Primitive::method("ctx.state", name, parameters, signature, doc).acts_only());
}

fn reading(registry: &mut Registry) {
    describe(registry, "read", &[1], "read(path) -> text", "Reads a file of UTF-8 text, up to 1 MiB.");
    registry.define("read", |context: NativeCallContext, state: &mut State, path: Dynamic| {
        let bytes = read(&context, state, path, MAX_STRING_BYTES)?;
        String::from_utf8(bytes)
            .map_err(|_| Failure::invalid("the file is not UTF-8 text; use read_bytes").throw(&context))
    });
    describe(registry, "read_bytes", &[1], "read_bytes(path) -> blob", "Reads a file, up to 10000 bytes.");
    registry.define(
        "read_bytes",
        |context: NativeCallContext, state: &mut State, path: Dynamic| -> Outcome<Blob> {
            read(&context, state, path, MAX_BLOB_BYTES)
        },
    );
    describe(
        registry,
        "list",
        &[1],
        "list(path) -> [name]",
        "Lists a directory; \"\" is the state directory itself.",
    );
    registry.define(
        "list",
        |context: NativeCallContext, state: &mut State, path: Dynamic| -> Outcome<Array> {
            let path = relative(&context, &state.0, path)?;
            let names = state.0.wait(&context, |host| async move { host.state_list(&path).await })?;
            Ok(names.into_iter().map(Dynamic::from).collect::<Array>())
        },
    );
    describe(registry, "exists", &[1], "exists(path) -> bool", "Asks whether something is there.");
    registry.define("exists", |context: NativeCallContext, state: &mut State, path: Dynamic| {
        let path = relative(&context, &state.0, path)?;
        state.0.wait(&context, |host| async move { host.state_exists(&path).await })
    });
}

fn writing(registry: &mut Registry) {
    describe(
        registry,
        "write",
        &[2],
        "write(path, text | bytes | secret)",
        "Writes a file whole, making the directories above it.",
    );
    registry.define(
        "write",
        |context: NativeCallContext, state: &mut State, path: Dynamic, value: Dynamic| {
            let path = relative(&context, &state.0, path)?;
            let content = content(&context, &state.0, "a file", value)?;
            state.0.wait(&context, |host| async move { host.state_write(&path, content).await })
        },
    );
    describe(registry, "remove", &[1], "remove(path)", "Removes a file, or a directory with what is in it.");
    registry.define("remove", |context: NativeCallContext, state: &mut State, path: Dynamic| {
        let path = relative(&context, &state.0, path)?;
        state.0.wait(&context, |host| async move { host.state_remove(&path).await })
    });
}

fn read(context: &NativeCallContext<'_>, state: &State, path: Dynamic, limit: usize) -> Outcome<Vec<u8>> {
    let path = relative(context, &state.0, path)?;
    let bytes = state.0.wait(context, |host| async move { host.state_read(&path).await })?;
    if bytes.len() > limit {
        let message = format!("the file is {} bytes long; at most {limit} are read", bytes.len());
        return Err(Failure { code: "limit", message, exec: None }.throw(context));
    }
    Ok(bytes)
}

/// Takes a path within the state directory. The host confines it as well, by
/// directory handles: this check is for the author's sake.
fn relative(context: &NativeCallContext<'_>, call: &Call, path: Dynamic) -> Outcome<String> {
    let path = text(context, call, "the path", path)?;
    let leads_out = path.starts_with('/') || path.split('/').any(|part| part == "..");
    if leads_out || path.len() > MAX_PATH_BYTES {
        let message = format!("{path:?} is no path within the state directory, e.g. \"conf/app.json\"");
        return Err(Failure::invalid(message).throw(context));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use crate::script::{Hook, testing::Trial};

    #[test]
    fn files_are_written_read_listed_and_removed() {
        let trial = Trial::of(Hook::OnClaim);
        trial.asserts(
            r#"
            ctx.state.write("a/b.txt", "hello");
            ctx.state.write("raw", blob(2, 0xff));
            let r = [
                ctx.state.read("a/b.txt") == "hello",
                ctx.state.read_bytes("raw").len() == 2,
                ctx.state.exists("raw"),
                !ctx.state.exists("none"),
                ctx.state.list("") == ["a/b.txt", "raw"],
            ];
            ctx.state.remove("raw");
            r.push(!ctx.state.exists("raw"));
            check(r);
            "#,
        );
    }

    #[test]
    fn what_is_no_path_or_no_text_is_an_error_that_can_be_caught() {
        for (body, fragment) in [
            (r#"ctx.state.read("/etc/passwd")"#, "no path within"),
            (r#"ctx.state.read("a/../../b")"#, "no path within"),
            (r#"ctx.state.write("a\x00", "")"#, "zero byte"),
            (r#"ctx.state.read("none")"#, "not_found"),
            (r#"ctx.state.write("raw", blob(2, 0xff)); ctx.state.read("raw")"#, "not UTF-8"),
            (r#"ctx.state.read("huge")"#, "at most 1048576"),
            (r#"ctx.state.write("a", 1)"#, "a file must be text, bytes or a secret, not a whole number"),
        ] {
            let error = Trial::of(Hook::OnClaim).run(body).expect_err(body);
            assert!(error.to_string().contains(fragment), "{body}: {error}");
        }
        Trial::of(Hook::OnClaim)
            .asserts(r#"try { ctx.state.read("none") } catch (e) { return check([e.code == "not_found"]); } check([false])"#);
    }
}
