//! The log: structured events on standard error.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, filter::ParseError, fmt::format::JsonFields};

use super::json::JsonLines;

/// What is logged when `RUST_LOG` is not set.
pub const DEFAULT_FILTER: &str = "warn,boilerhouse=info";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line, with the fields of the event and of its spans.
    Json,
    /// For people, in colour.
    Text,
}

/// Says why logging was not set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter is no filter.
    #[error(
        "{given:?} is no filter; allowed: directives such as info or boilerhouse=debug, divided by commas"
    )]
    Filter {
        /// What was given.
        given: String,
        /// What is wrong with it.
        #[source]
        source: ParseError,
    },
    /// Something in this process logs already.
    #[error("logging is set up already")]
    Already,
}

// === impl LogFormat ===

impl LogFormat {
    /// Returns `Text` where standard error is a terminal and `Json` elsewhere.
    pub fn for_stderr() -> Self {
        if std::io::stderr().is_terminal() { Self::Text } else { Self::Json }
    }
}

/// Sends the events that `filter` (what `RUST_LOG` says) lets pass to standard
/// error; none means [`DEFAULT_FILTER`].
///
/// # Errors
/// [`LoggingError`]: a filter that cannot be read is refused, not ignored.
pub fn init_logging(format: LogFormat, filter: Option<&str>) -> Result<(), LoggingError> {
    let filter = parsed(filter)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let result = match format {
        LogFormat::Json => builder.fmt_fields(JsonFields::new()).event_format(JsonLines).try_init(),
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
    };
    result.map_err(|_| LoggingError::Already)
}

fn parsed(filter: Option<&str>) -> Result<EnvFilter, LoggingError> {
    let text = filter.filter(|text| !text.is_empty()).unwrap_or(DEFAULT_FILTER);
    EnvFilter::builder().parse(text).map_err(|source| LoggingError::Filter { given: text.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_refused_by_name() {
        let error = parsed(Some("boilerhouse=loudly")).unwrap_err().to_string();
        assert!(error.contains("\"boilerhouse=loudly\" is no filter; allowed:"), "{error}");
    }

    #[test]
    fn without_a_filter_the_default_holds() {
        for none in [None, Some("")] {
            let shown = parsed(none).unwrap().to_string();
            assert!(shown.contains("boilerhouse=info") && shown.contains("warn"), "{shown}");
        }
        assert_eq!(parsed(Some("debug")).unwrap().to_string(), "debug");
    }
}
