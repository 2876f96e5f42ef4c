//! The commands that run or look at the server's side: `serve`, `check`, `config`.

use super::{Failure, args::CheckArgs};

/// Runs the server until it is told to stop.
pub(super) fn serve() -> Result<(), Failure> {
    todo!("Config::load, then app::serve on a multi-threaded runtime")
}

/// Checks workload files.
pub(super) fn check(arguments: &CheckArgs) -> Result<String, Failure> {
    let _ = (&arguments.files, arguments.json);
    todo!("script::check")
}

/// Prints the configuration in force.
pub(super) fn config() -> Result<String, Failure> {
    todo!("Config::load, then to_ron")
}
