//! The command line: `serve`, `check`, `config`, and the commands that ask a
//! server.
//!
//! People read the answers by default; `--json` prints the server's own. An
//! error goes to standard error, with its code and what to do. Exit status: 0
//! done, 1 the request failed, 2 the command line is wrong, 3 no server
//! reached.

mod args;
mod assignments;
mod history;
mod human;
mod meter;
mod remote;
mod server;
mod state;
mod table;
mod transfer;

use std::{
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;

use crate::{client, config::Config, model::Secret};
pub use args::Cli;
use args::Command;
use table::printable;

/// Says why a command was not carried out.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// Something that was to be read could not be.
    #[error("{what}: {problem}")]
    Input {
        /// The file, or standard input.
        what: String,
        /// Why.
        problem: String,
    },
    /// The server did not do it.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The process could not do its part.
    #[error("{0}")]
    Process(String),
    /// What was asked for is bad news; the text is complete as it is.
    #[error("{0}")]
    Findings(String),
    /// Scripts that are needed have errors; the text is complete as it is.
    #[error("{0}")]
    Scripts(String),
}

/// Runs the command line of this process and returns its exit status.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, with status 0 and to stdout.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let token = std::env::var_os("BOILERHOUSE_TOKEN").filter(|token| !token.is_empty());
    let token = token.map(|token| Secret::new(token.into_encoded_bytes()));
    match run(cli, token.as_ref()) {
        Ok(text) => {
            // A reader that went away (`| head`) is no failure.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        // What was asked for, although it is not good news.
        Err(Failure::Findings(text)) => {
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::FAILURE
        }
        Err(failure) => {
            let _ = io::stderr().write_all(explained(&failure).as_bytes());
            ExitCode::from(status(&failure))
        }
    }
}

/// Runs one command and returns what to print.
fn run(cli: Cli, token: Option<&Secret>) -> Result<String, Failure> {
    // Those of the server's side check the values as well.
    if !matches!(cli.command, Command::Serve | Command::Check(_) | Command::Config | Command::State(_)) {
        Config::check_names(std::env::vars_os()).map_err(|errors| Failure::Process(errors.to_string()))?;
    }
    match cli.command {
        Command::Serve => server::serve().map(|()| String::new()),
        Command::Check(arguments) => server::check(&arguments),
        Command::Config => server::config(),
        Command::Claim(arguments) => remote::claim(arguments, token),
        Command::Release(arguments) => remote::release(arguments, token),
        Command::Status(arguments) => remote::status(arguments, token),
        Command::Touch(arguments) => remote::touch(arguments, token),
        Command::Sync(arguments) => remote::sync(arguments, token),
        Command::Prefetch(arguments) => remote::prefetch(arguments, token),
        Command::Snapshots(arguments) => history::snapshots(arguments, token),
        Command::Restore(arguments) => history::restore(arguments, token),
        Command::Fork(arguments) => history::fork(arguments, token),
        Command::Erase(arguments) => history::erase(arguments, token),
        Command::State(command) => state::run(command, token),
        Command::Pools(arguments) => remote::pools(arguments, token),
        Command::Slots(arguments) => remote::slots(arguments, token),
        Command::Workloads(arguments) => remote::workloads(arguments, token),
        Command::Secrets(command) => remote::secrets(command, token),
    }
}

fn status(failure: &Failure) -> u8 {
    match failure {
        Failure::Usage(_) => 2,
        Failure::Client(client::Error::Address { .. } | client::Error::Token) => 2,
        Failure::Client(client::Error::Unreachable { .. }) => 3,
        Failure::Input { .. } | Failure::Client(_) | Failure::Process(_) => 1,
        Failure::Findings(_) | Failure::Scripts(_) => 1,
    }
}

/// Returns the text of a failure: what happened, why, and what to do.
fn explained(failure: &Failure) -> String {
    let mut text = format!("error: {}\n", printable(&failure.to_string()));
    match failure {
        Failure::Client(client::Error::Problem(problem)) => text = problem_text(problem),
        Failure::Client(error @ client::Error::Unreachable { .. }) => {
            text += &causes(error);
            text += "help: is it running? `boilerhouse serve` starts it; BOILERHOUSE_URL or --url says where it is\n";
        }
        Failure::Client(error @ client::Error::NoAnswer { .. }) => {
            text += &causes(error);
            text += "help: `boilerhouse status TENANT` shows what became of it\n";
        }
        Failure::Client(error) => text += &causes(error),
        Failure::Usage(_) => text += "\nFor more information, try '--help'.\n",
        Failure::Input { .. } => {}
        Failure::Findings(findings) | Failure::Scripts(findings) => {
            text = format!("{}\n", findings.trim_end())
        }
        // Many problems at once stand on a line each, causes indented beneath.
        Failure::Process(problem) => {
            let line = |line: &str| match line.starts_with(' ') {
                true => format!("{}\n", printable(line)),
                false => format!("error: {}\n", printable(line)),
            };
            text = problem.lines().map(line).collect();
        }
    }
    text
}

fn problem_text(problem: &client::Problem) -> String {
    let mut text = format!("error: {} ({})\n", printable(&problem.detail), printable(&problem.code));
    if !problem.allowed.is_empty() {
        text += &format!("help: allowed: {}\n", printable(&problem.allowed.join(", ")));
    }
    if let Some(ms) = problem.retry_after_ms {
        text += &format!("help: try again in {} s\n", ms.div_ceil(1000));
    }
    let help = match (problem.status, problem.code.as_str()) {
        (401, _) => Some("set BOILERHOUSE_TOKEN to a token of the server's tokens file"),
        (_, "workload_required" | "unknown_workload") => Some("choose one with --workload"),
        (_, "claimed") => Some("`boilerhouse release TENANT` ends the claim and saves its state"),
        (_, "state_conflict") => {
            Some("`boilerhouse state resolve TENANT --keep ours|theirs` decides whose state stands")
        }
        (_, "unknown_snapshot") => Some("`boilerhouse snapshots TENANT` lists what there is"),
        (_, "claim_differs") => Some("release the claim first, or claim without what differs"),
        _ => None,
    };
    if let Some(help) = help {
        text += &format!("help: {help}\n");
    }
    if let (500.., Some(id)) = (problem.status, &problem.request_id) {
        text += &format!("the server's log has it under request_id {}\n", printable(id));
    }
    text
}

/// Returns the causes of an error, one a line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!("  because: {}\n", printable(&cause.to_string()));
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_told_with_code_and_help() {
        let problem = client::Problem {
            status: 422,
            code: "workload_required".into(),
            detail: "workload is required, there is more than one".into(),
            field: Some("workload".into()),
            allowed: vec!["api".into(), "web\u{1b}[2J".into()],
            retry_after_ms: Some(1500),
            request_id: Some("r1".into()),
        };
        let failure = Failure::Client(client::Error::Problem(Box::new(problem)));
        assert_eq!(
            explained(&failure),
            "error: workload is required, there is more than one (workload_required)\n\
             help: allowed: api, web\\u{1b}[2J\n\
             help: try again in 2 s\n\
             help: choose one with --workload\n"
        );
        assert_eq!(status(&failure), 1);
    }

    #[test]
    fn each_failure_has_its_exit_status() {
        assert_eq!(status(&Failure::Usage(String::new())), 2);
        let address = client::Error::Address { given: "x".into(), problem: "is no URL".into() };
        assert_eq!(status(&Failure::Client(address)), 2);
        assert_eq!(status(&Failure::Process(String::new())), 1);
        let text = explained(&Failure::Process("tokens:1: bad\ntokens:2: bad\n  because: x\n".into()));
        assert_eq!(text, "error: tokens:1: bad\nerror: tokens:2: bad\n  because: x\n");
    }
}
