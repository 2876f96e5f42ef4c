//! The commands on the server's side: `serve`, `check`, `config`.

use std::time::Duration;

use super::{Failure, args::CheckArgs, causes};
use crate::{
    app,
    config::Config,
    script::{self, Diagnostic},
    telemetry::{self, LogFormat},
};

/// How long threads that are still busy may hold up the end of the process.
const THREADS_LIMIT: Duration = Duration::from_secs(5);

/// Runs the server until it is told to stop.
pub(super) fn serve() -> Result<(), Failure> {
    let filter = std::env::var("RUST_LOG").ok();
    telemetry::init_logging(LogFormat::for_stderr(), filter.as_deref())
        .map_err(|error| Failure::Process(format!("RUST_LOG: {error}\n{}", causes(&error))))?;
    let config = load()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Process(format!("the runtime cannot start: {error}")))?;
    let result = runtime.block_on(app::serve(config));
    runtime.shutdown_timeout(THREADS_LIMIT);
    result.map_err(|error| match error {
        app::Error::Scripts(findings) => Failure::Scripts(findings),
        error => Failure::Process(format!("{error}\n{}", causes(&error))),
    })
}

/// Checks workload files and returns the findings; an error among them is a failure.
pub(super) fn check(arguments: &CheckArgs) -> Result<String, Failure> {
    let config = load()?;
    app::check_folders(&config).map_err(|error| Failure::Process(error.to_string()))?;
    let options = app::load_options(&config);
    let findings = script::check(&arguments.files, &config.workloads_dir, &config.scripts_dir, &options);
    let text = if arguments.json {
        let json = serde_json::to_string_pretty(&findings).expect("a finding has only text and numbers");
        format!("{json}\n")
    } else if findings.is_empty() {
        "no errors\n".to_owned()
    } else {
        findings.iter().map(|finding| format!("{finding}\n")).collect()
    };
    if findings.iter().any(Diagnostic::is_error) { Err(Failure::Findings(text)) } else { Ok(text) }
}

/// Prints the configuration in force.
pub(super) fn config() -> Result<String, Failure> {
    Ok(load()?.to_ron())
}

/// Reads the configuration from this process's environment and the file it names.
pub(super) fn load() -> Result<Config, Failure> {
    Config::load(std::env::vars_os()).map_err(|errors| Failure::Process(errors.to_string()))
}
