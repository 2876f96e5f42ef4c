//! One JSON object a line: the fields of an event, then those of its spans.
//!
//! Made here and not with tracing-subscriber's own JSON form, which writes only
//! the outermost message of an error and leaves its causes out, and shows the
//! spans twice.

use std::fmt;

use serde_json::Value;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormattedFields,
        format::{JsonFields, Writer},
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

use super::chain;

/// Writes events as lines of JSON.
///
/// An error is written with all its causes. A field of the event wins over one of
/// a span with the same name, and an inner span's over an outer one's.
pub(super) struct JsonLines;

/// Collects the fields of an event, in their order.
#[derive(Default)]
struct Fields(Vec<(String, Value)>);

// === impl JsonLines ===

impl<S> FormatEvent<S, JsonFields> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let mut fields = Fields::default();
        fields.add("timestamp", timestamp);
        fields.add("level", metadata.level().as_str());
        event.record(&mut fields);
        fields.add("target", metadata.target());
        let scope = context.event_scope();
        for span in scope.into_iter().flatten() {
            let extensions = span.extensions();
            let Some(text) = extensions.get::<FormattedFields<JsonFields>>() else { continue };
            let Ok(Value::Object(map)) = serde_json::from_str(text) else { continue };
            for (name, value) in map {
                fields.add(&name, value);
            }
        }
        fields.write(&mut writer)
    }
}

// === impl Fields ===

impl Fields {
    /// Adds a field unless one of its name is there.
    fn add(&mut self, name: &str, value: impl Into<Value>) {
        if !self.0.iter().any(|(known, _)| known == name) {
            self.0.push((name.to_owned(), value.into()));
        }
    }

    fn write(&self, writer: &mut Writer<'_>) -> fmt::Result {
        for (index, (name, value)) in self.0.iter().enumerate() {
            let start = if index == 0 { '{' } else { ',' };
            write!(writer, "{start}{}:{value}", Value::from(name.as_str()))?;
        }
        writeln!(writer, "}}")
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.add(field.name(), chain(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field.name(), format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write,
        sync::{Arc, Mutex, PoisonError},
    };

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    /// Collects what is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(work: impl FnOnce()) -> String {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines)
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn an_error_is_logged_with_its_causes_and_spans_once() {
        let line = logged(|| {
            let outer =
                tracing::info_span!("request", tenant = "alice", n = 1, empty = tracing::field::Empty);
            let _outer = outer.enter();
            let inner = tracing::info_span!("claim", n = 2);
            let _inner = inner.enter();
            inner.record("n", 3);
            let error = Outer(std::io::Error::other("in\"ner\n"));
            tracing::warn!(error = &error as &dyn std::error::Error, ms = 1.5, ok = true, "it failed");
        });
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert_eq!(line.matches("alice").count(), 1, "{line}");
        assert!(line.starts_with("{\"timestamp\":\"20"), "{line}");
        let expected = serde_json::json!({
            "timestamp": value["timestamp"], "level": "WARN", "message": "it failed",
            "error": "outer: in\"ner\n", "ms": 1.5, "ok": true,
            "target": module_path!(), "tenant": "alice", "n": 3,
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn a_span_does_not_hide_a_field_of_the_event() {
        let line = logged(|| {
            let span = tracing::info_span!("s", message = "span", tenant = "a");
            let _span = span.enter();
            tracing::info!(tenant = "b", "event");
        });
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&value["message"], &value["tenant"]), (&"event".into(), &"b".into()), "{line}");
    }
}
