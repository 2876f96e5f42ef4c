//! Puts the parts together and runs them.

use crate::config::Config;

/// Says why the server could not run.
#[derive(Debug, thiserror::Error)]
#[error("the server cannot run")]
pub struct Error;

/// Runs the server until a signal ends it.
///
/// # Errors
/// [`Error`], before the server serves.
pub async fn serve(config: Config) -> Result<(), Error> {
    todo!("{config:?}")
}
