//! Logging and metrics.

mod json;
mod logging;
mod metrics;

pub use self::{
    logging::{DEFAULT_FILTER, LogFormat, LoggingError, init_logging},
    metrics::{CONTENT_TYPE, Metrics, PoolSample},
};

/// Joins an error with its sources, for texts that people read.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
