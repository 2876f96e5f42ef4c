//! The commands on the server's side: `serve`, `check`, `config`.

use std::time::Duration;

use super::{Failure, args::CheckArgs, causes};
use crate::{app, config::Config};

/// How long threads that are still busy may hold up the end of the process.
const THREADS_LIMIT: Duration = Duration::from_secs(5);

/// Runs the server until it is told to stop.
pub(super) fn serve() -> Result<(), Failure> {
    let config = load()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Process(format!("the runtime cannot start: {error}")))?;
    let result = runtime.block_on(app::serve(config));
    runtime.shutdown_timeout(THREADS_LIMIT);
    result.map_err(|error| Failure::Process(format!("{error}\n{}", causes(&error))))
}

/// Checks workload files and returns the findings; an error among them is a failure.
pub(super) fn check(arguments: &CheckArgs) -> Result<String, Failure> {
    let _ = (&arguments.files, arguments.json);
    todo!("script::check")
}

/// Prints the configuration in force.
pub(super) fn config() -> Result<String, Failure> {
    let config = load()?;
    todo!("config.to_ron(): {config:?}")
}

/// Reads the configuration from this process's environment and the file it names.
fn load() -> Result<Config, Failure> {
    todo!("Config::load(std::env::vars_os()).map_err(|errors| Failure::Process(errors.to_string()))")
}
