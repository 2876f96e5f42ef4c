//! The script's own log lines.

use std::sync::Arc;

use rhai::{Dynamic, ImmutableString, Map, NativeCallContext};

use super::{Primitive, Registry, SecretText, data};
use crate::script::{
    LogLevel,
    call::{Call, Failure, Outcome},
};

/// The longest message, in characters.
const MAX_MESSAGE: usize = 4000;
/// The largest fields of one line, in bytes of JSON.
const MAX_FIELDS_BYTES: usize = 16 * 1024;

/// `ctx.log`
#[derive(Clone)]
struct Log(Arc<Call>);

/// Registers the log.
pub(super) fn register(registry: &mut Registry) {
    registry.module.set_custom_type::<Log>("Log");
    registry.describe(Primitive::property("ctx", "log", "log", "The server's log.").gives("ctx.log"));
    registry.getter_of_ctx("log", |call| Log(Arc::clone(call)));
    let levels: [(&'static str, LogLevel, &'static str, &'static str); 4] = [
        ("debug", LogLevel::Debug, "debug(message, #{…}?)", "Logs why something was done."),
        ("info", LogLevel::Info, "info(message, #{…}?)", "Logs what changed."),
        ("warn", LogLevel::Warn, "warn(message, #{…}?)", "Logs what went wrong and was got over."),
        ("error", LogLevel::Error, "error(message, #{…}?)", "Logs what somebody must look at."),
    ];
    for (name, level, signature, doc) in levels {
        registry.describe(Primitive::method("ctx.log", name, &[1, 2], signature, doc));
        if level == LogLevel::Debug {
            continue;
        }
        registry.define(name, move |context: NativeCallContext, log: &mut Log, message: Dynamic| {
            write(&context, &log.0, level, message, Map::new())
        });
        registry.define(
            name,
            move |context: NativeCallContext, log: &mut Log, message: Dynamic, fields: Map| {
                write(&context, &log.0, level, message, fields)
            },
        );
    }
    // The engine takes the text that any function named `debug` returns and passes it to
    // its own log, which leaves empty lines out; the script gets `()`.
    let nothing = |()| ImmutableString::new();
    registry.define("debug", move |context: NativeCallContext, log: &mut Log, message: Dynamic| {
        write(&context, &log.0, LogLevel::Debug, message, Map::new()).map(nothing)
    });
    registry.define(
        "debug",
        move |context: NativeCallContext, log: &mut Log, message: Dynamic, fields: Map| {
            write(&context, &log.0, LogLevel::Debug, message, fields).map(nothing)
        },
    );
}

fn write(
    context: &NativeCallContext<'_>,
    call: &Call,
    level: LogLevel,
    message: Dynamic,
    fields: Map,
) -> Outcome<()> {
    let message = message.flatten();
    if message.is::<SecretText>() {
        return Err(Failure::invalid("a log message may not be a secret").throw(context));
    }
    let message: String = message.to_string().chars().take(MAX_MESSAGE).collect();
    let serde_json::Value::Object(fields) = data(context, "a log line", fields.into())? else {
        return Err(Failure::invalid("a log line's fields must be a map").throw(context));
    };
    let size = serde_json::to_string(&fields).map_or(0, |json| json.len());
    if size > MAX_FIELDS_BYTES {
        let message =
            format!("a log line's fields are {size} bytes long; at most {MAX_FIELDS_BYTES} are kept");
        return Err(Failure { code: "limit", message, exec: None }.throw(context));
    }
    call.log(level, &message, fields);
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::script::{Hook, LogLevel, Verdict, testing::Trial};

    #[test]
    fn lines_have_a_level_a_message_and_fields() {
        let trial = Trial::of(Hook::OnClaim);
        trial
            .run(
                r#"
                ctx.log.debug("why");
                ctx.log.debug("because", #{ n: 0 });
                ctx.log.info("what", #{ n: 1 });
                ctx.log.warn(7);
                ctx.log.error("now");
                print("printed");
                debug("debugged");
                "#,
            )
            .unwrap();
        let line = |level, message: &str, fields: &str| (level, message.to_owned(), fields.to_owned());
        assert_eq!(
            trial.host.logs(),
            [
                line(LogLevel::Debug, "why", "{}"),
                line(LogLevel::Debug, "because", r#"{"n":0}"#),
                line(LogLevel::Info, "what", r#"{"n":1}"#),
                line(LogLevel::Warn, "7", "{}"),
                line(LogLevel::Error, "now", "{}"),
                line(LogLevel::Info, "printed", "{}"),
                line(LogLevel::Debug, "\"debugged\"", "{}"),
            ]
        );
    }

    #[test]
    fn a_deciding_hook_logs_too_and_logging_is_no_verdict() {
        for level in ["debug", "info", "warn", "error"] {
            let trial = Trial::of(Hook::BeforeClaim);
            assert_eq!(trial.run(&format!("ctx.log.{level}(\"hello\")")).unwrap(), Verdict::Default);
            assert_eq!(trial.host.logs()[0].1, "hello");
        }
    }
}
