//! `boilerhouse state`: on what is in the store, beside what a tenant's commands do.

use std::io::{self, IsTerminal as _, Write as _};

use clap::{Args, Subcommand};

use super::{
    Failure, causes,
    history::{self, GcArgs, RESOLVE_HELP, ResolveArgs, VERIFY_HELP, VerifyArgs},
    server,
    table::{printable, span},
    transfer::{self, EXPORT_HELP, ExportArgs, IMPORT_HELP, ImportArgs},
};
use crate::{
    app,
    clock::{Clock as _, SystemClock, utc},
    model::Secret,
};

#[derive(Debug, Subcommand)]
pub(super) enum StateCommand {
    /// Read back and hash everything that a tenant's snapshots need, or those of all tenants
    #[command(after_help = VERIFY_HELP)]
    Verify(VerifyArgs),
    /// Remove from the store what no kept snapshot needs
    Gc(GcArgs),
    /// Decide whose state stands when a server's is in conflict with the store's
    #[command(after_help = RESOLVE_HELP)]
    Resolve(ResolveArgs),
    /// Copy a tenant's snapshot out of the store, into a directory or an archive
    #[command(after_help = EXPORT_HELP)]
    Export(ExportArgs),
    /// Make a directory, an archive or a bucket's files a tenant's newest snapshot
    #[command(after_help = IMPORT_HELP)]
    Import(ImportArgs),
    /// Take the store from a server that runs no more
    #[command(after_help = TAKEOVER_HELP)]
    Takeover(TakeoverArgs),
}

const TAKEOVER_HELP: &str = "\
It works on the store itself, with the configuration of the server that is to have it (the same BOILERHOUSE_*
variables). Make sure first that the other server is stopped and its containers are gone: a tenant could else be
served twice. What the other one has not saved stays on its disk, and is in conflict when it comes back.

Examples:
  boilerhouse state takeover          say whose the store is; do it when `yes` is typed on a terminal
  boilerhouse state takeover --yes    do it without asking";

#[derive(Debug, Args)]
pub(super) struct TakeoverArgs {
    /// Of several servers that share the store, the one that runs no more
    #[arg(long, value_name = "SERVER")]
    from: Option<String>,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
}

/// Runs one of the commands and returns what to print.
pub(super) fn run(command: StateCommand, token: Option<&Secret>) -> Result<String, Failure> {
    match command {
        StateCommand::Verify(arguments) => history::verify(&arguments),
        StateCommand::Gc(arguments) => history::gc(arguments, token),
        StateCommand::Resolve(arguments) => history::resolve(arguments, token),
        StateCommand::Export(arguments) => transfer::export(&arguments),
        StateCommand::Import(arguments) => transfer::import(arguments),
        StateCommand::Takeover(arguments) => takeover(&arguments),
    }
}

fn takeover(arguments: &TakeoverArgs) -> Result<String, Failure> {
    let config = server::load()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Process(format!("the runtime cannot start: {error}")))?;
    let plan = app::plan_takeover(&config, arguments.from.as_deref());
    let failed = |error: app::Error| Failure::Process(format!("{error}\n{}", causes(&error)));
    let plan = runtime.block_on(plan).map_err(failed)?;
    let text = explained(&plan, SystemClock.unix_ms());
    if plan.from.is_empty() {
        return Ok(text);
    }
    if arguments.yes {
        runtime.block_on(plan.carry_out()).map_err(failed)?;
        return Ok(text + "Done.\n");
    }
    match consent(&text) {
        Some(true) => {
            runtime.block_on(plan.carry_out()).map_err(failed)?;
            Ok("Done.\n".to_owned())
        }
        Some(false) => Err(Failure::Findings("Nothing was changed.\n".to_owned())),
        None => Err(Failure::Findings(text + "Nothing was changed; say --yes to do it.\n")),
    }
}

/// Says what a takeover would do.
fn explained(plan: &app::Takeover, now_ms: u64) -> String {
    let (store, server) = (printable(&plan.store_name), &plan.server);
    if plan.from.is_empty() {
        return format!(
            "The store {store} is held by no other server; {server:?} takes it when it starts.\n"
        );
    }
    let told = plan.from.iter().map(|owner| {
        let (since, ago) = (utc(owner.created_ms), span(now_ms.saturating_sub(owner.created_ms)));
        let how = if owner.is_shared() { ", which shares it" } else { "" };
        format!(
            "The store {store} is held by {:?}{how}, since {since} ({ago} ago). It passes to {server:?}; {:?} may \
             publish nothing any more.\n",
            owner.server, owner.server
        )
    });
    told.collect()
}

/// Shows `text` and asks for consent, where a person is there to give it.
fn consent(text: &str) -> Option<bool> {
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return None;
    }
    let mut stderr = io::stderr();
    // A terminal that is gone reads as no consent.
    let _ = write!(stderr, "{text}Type yes to do it: ").and_then(|()| stderr.flush());
    let mut line = String::new();
    let _ = io::stdin().read_line(&mut line);
    Some(line.trim() == "yes")
}
