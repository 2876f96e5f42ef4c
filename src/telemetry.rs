//! Logging and metrics.

mod logging;
mod metrics;

pub use self::{
    logging::{DEFAULT_FILTER, LogFormat, LoggingError, init_logging},
    metrics::{CONTENT_TYPE, Metrics, PoolSample},
};
