//! The commands on stored state: history and rollback through a server, verification
//! on the store itself.

use clap::Args;

use super::{
    Failure,
    args::{ServerArgs, TenantArgs},
    causes, human,
    meter::Meter,
    remote::{ask, client, shown},
    table::bytes,
};
use crate::{
    app::{self, Report, Scope},
    clock::{Clock, SystemClock},
    config::Config,
    model::{Secret, TenantId, WorkloadId},
    tenancy::Side,
};

#[derive(Debug, Args)]
pub(super) struct SnapshotsArgs {
    #[command(flatten)]
    pub(super) of: TenantArgs,
    /// Only snapshots older than this one
    #[arg(long, value_name = "N")]
    pub(super) before: Option<u64>,
    /// How many at most
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    pub(super) of: TenantArgs,
    /// The snapshot, as `snapshots` lists it
    #[arg(long, value_name = "N")]
    pub(super) snapshot: u64,
}

#[derive(Debug, Args)]
pub(super) struct ForkArgs {
    #[command(flatten)]
    pub(super) of: TenantArgs,
    /// The tenant whose state is copied
    #[arg(long, value_name = "TENANT")]
    pub(super) from: TenantId,
    /// Which of its snapshots; the newest when left out
    #[arg(long, value_name = "N")]
    pub(super) snapshot: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct EraseArgs {
    /// Whose
    #[arg(value_name = "TENANT")]
    pub(super) tenant: TenantId,
    #[command(flatten)]
    pub(super) server: ServerArgs,
}

pub(super) const VERIFY_HELP: &str = "\
Reads the store of the server's configuration (BOILERHOUSE_STORE, AWS_*) and writes nothing; a server may go on
working meanwhile. Exit status 1: something is missing or damaged.

Examples:
  boilerhouse state verify alice
  boilerhouse state verify alice --workload web --json
  boilerhouse state verify --all";

#[derive(Debug, Args)]
#[group(id = "whose", required = true, args = ["tenant", "all"])]
pub(super) struct VerifyArgs {
    /// Whose
    #[arg(value_name = "TENANT")]
    pub(super) tenant: Option<TenantId>,
    /// Which workload; all that the tenant has state of when left out
    #[arg(long, short, value_name = "WORKLOAD", requires = "tenant")]
    pub(super) workload: Option<WorkloadId>,
    /// The whole store
    #[arg(long, conflicts_with_all = ["tenant", "workload"])]
    pub(super) all: bool,
    /// Print the findings as JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct GcArgs {
    /// Only this tenant's
    #[arg(value_name = "TENANT")]
    pub(super) tenant: Option<TenantId>,
    /// Only of this workload
    #[arg(long, short, value_name = "WORKLOAD")]
    pub(super) workload: Option<WorkloadId>,
    #[command(flatten)]
    pub(super) server: ServerArgs,
}

pub(super) const RESOLVE_HELP: &str = "\
A server whose tenant was claimed elsewhere meanwhile, or whose state a power loss has torn, keeps it and asks:
`boilerhouse status TENANT` shows `conflict`, and claims are refused until this is decided. `ours` saves it as the
newest snapshot; what the store has stays in the history, and `boilerhouse restore` goes back to it. `theirs` leaves
the store as it is and sets the server's state aside; the answer says where it is.

Examples:
  boilerhouse state resolve alice --keep theirs
  boilerhouse state resolve alice --workload web --keep ours
  boilerhouse state resolve alice --keep theirs --discard    remove it instead of setting it aside";

#[derive(Debug, Args)]
pub(super) struct ResolveArgs {
    #[command(flatten)]
    pub(super) of: TenantArgs,
    /// Whose state stands: `ours` is the server's that is asked, `theirs` the store's
    #[arg(long, value_name = "SIDE", value_parser = parse_side)]
    pub(super) keep: Side,
    /// With `theirs`: remove the server's state instead of setting it aside
    #[arg(long)]
    pub(super) discard: bool,
}

fn parse_side(text: &str) -> Result<Side, String> {
    match text {
        "ours" => Ok(Side::Ours),
        "theirs" => Ok(Side::Theirs),
        _ => Err("allowed: ours, theirs".to_owned()),
    }
}

pub(super) fn resolve(arguments: ResolveArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let ResolveArgs { of, keep, discard } = arguments;
    if discard && keep == Side::Ours {
        return Err(Failure::Usage(
            "--discard removes what is not kept, and goes with --keep theirs".to_owned(),
        ));
    }
    let client = client(&of.server, token)?;
    let answer = ask(client.resolve(&of.tenant, of.workload.as_ref(), keep, discard))?;
    Ok(shown(&of.server, &answer, human::resolved))
}

pub(super) fn snapshots(arguments: SnapshotsArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let SnapshotsArgs { of, before, limit } = arguments;
    let client = client(&of.server, token)?;
    let answer = ask(client.snapshots(&of.tenant, of.workload.as_ref(), before, limit))?;
    Ok(shown(&of.server, &answer, |answer| human::snapshots(answer, SystemClock.unix_ms())))
}

pub(super) fn restore(arguments: RestoreArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let RestoreArgs { of, snapshot } = arguments;
    let client = client(&of.server, token)?;
    let answer = ask(client.restore(&of.tenant, of.workload.as_ref(), snapshot))?;
    Ok(shown(&of.server, &answer, human::restored))
}

pub(super) fn fork(arguments: ForkArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let ForkArgs { of, from, snapshot } = arguments;
    let client = client(&of.server, token)?;
    let answer = ask(client.fork(&of.tenant, &from, of.workload.as_ref(), snapshot))?;
    Ok(shown(&of.server, &answer, human::restored))
}

pub(super) fn erase(arguments: EraseArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let client = client(&arguments.server, token)?;
    let answer = ask(client.erase(&arguments.tenant))?;
    Ok(shown(&arguments.server, &answer, human::erased))
}

pub(super) fn gc(arguments: GcArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let GcArgs { tenant, workload, server } = arguments;
    let client = client(&server, token)?;
    let answer = ask(client.collect(tenant.as_ref(), workload.as_ref()))?;
    Ok(shown(&server, &answer, human::collected))
}

/// Verifies on the store itself; what is found is a failure.
pub(super) fn verify(arguments: &VerifyArgs) -> Result<String, Failure> {
    let config = Config::load(std::env::vars_os());
    let config = config.map_err(|errors| Failure::Process(errors.to_string()))?;
    let scope = match &arguments.tenant {
        Some(tenant) => Scope::Tenant(tenant.clone(), arguments.workload.clone()),
        None => Scope::All,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Process(format!("the runtime cannot start: {error}")))?;
    let mut meter = Meter::new("objects", "read back");
    let report = runtime.block_on(app::verify(&config, &scope, &mut |progress| {
        meter.show(progress.objects, progress.of, progress.bytes);
    }));
    meter.end();
    let report = report.map_err(|error| Failure::Process(format!("{error}\n{}", causes(&error))))?;
    let text = if arguments.json {
        let json = serde_json::to_string_pretty(&report).expect("a report has only text and numbers");
        format!("{json}\n")
    } else {
        told(&report)
    };
    if report.is_sound() { Ok(text) } else { Err(Failure::Findings(text)) }
}

/// Tells a report to people.
fn told(report: &Report) -> String {
    let mut text = String::new();
    for (what, findings) in [("missing", &report.missing), ("damaged", &report.damaged)] {
        for finding in findings {
            text += &format!("{what}: {} ({}): {}\n", finding.object, finding.of, finding.problem);
        }
    }
    for object in &report.orphaned {
        text += &format!("orphaned: {object}\n");
    }
    let Report { keys, snapshots, objects, files, .. } = report;
    text += &format!(
        "{snapshots} snapshots of {keys} states: {objects} objects and {files} files read back, {}: {} missing, {} damaged, {} orphaned\n",
        bytes(report.bytes),
        report.missing.len(),
        report.damaged.len(),
        report.orphaned.len(),
    );
    super::table::printable_lines(&text)
}
