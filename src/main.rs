//! The `boilerhouse` program; everything is in [`boilerhouse::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    boilerhouse::cli::main()
}
