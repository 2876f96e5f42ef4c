//! The arguments of the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::{
    history::{EraseArgs, ForkArgs, RestoreArgs, SnapshotsArgs},
    state::StateCommand,
};
use crate::model::{TenantId, WorkloadId};

const EXAMPLES: &str = "\
Examples:
  boilerhouse check workloads/*.rhai           look for mistakes before serving
  boilerhouse serve                            run the server (BOILERHOUSE_* configure it)
  boilerhouse claim alice                      a container for alice, with her state in it
  boilerhouse claim alice --workload web --env LOG=debug --secret api_key=@key.txt
  boilerhouse status alice
  boilerhouse release alice                    save her state and give the container back

Client commands ask the server at BOILERHOUSE_URL with the token in BOILERHOUSE_TOKEN
(never an argument: other users of the machine can see those).

Exit status: 0 done, 1 the request failed, 2 the command line is wrong, 3 no server reached.";

/// Pools of pre-warmed, hardened containers, claimed for a tenant in milliseconds.
#[derive(Debug, Parser)]
#[command(name = "boilerhouse", version, about, after_help = EXAMPLES, propagate_version = true)]
#[command(arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the server, configured by BOILERHOUSE_* variables and the file in BOILERHOUSE_CONFIG
    #[command(after_help = SERVE_HELP)]
    Serve,
    /// Check workload files without running anything
    Check(CheckArgs),
    /// Print the configuration in force as RON, secrets redacted
    Config,
    /// Claim a container for a tenant, with its state and secrets in it
    #[command(after_help = CLAIM_EXAMPLES)]
    Claim(ClaimArgs),
    /// End a tenant's claim and save its state
    Release(ReleaseArgs),
    /// Show a tenant's claims and newest snapshots
    Status(TenantArgs),
    /// Reset the idle clock of a tenant's claim
    Touch(TenantArgs),
    /// Save the state of a tenant's claim now, while it goes on
    Sync(TenantArgs),
    /// Bring a tenant's newest state to the server before its claim
    Prefetch(TenantArgs),
    /// List a tenant's snapshots, newest first
    Snapshots(SnapshotsArgs),
    /// Make an old snapshot of a tenant the newest state again
    Restore(RestoreArgs),
    /// Give a tenant without state a copy of another's snapshot
    Fork(ForkArgs),
    /// Erase a tenant everywhere
    Erase(EraseArgs),
    /// Verify and clean up what is in the store
    #[command(subcommand)]
    State(StateCommand),
    /// List the pools with their slots by phase
    Pools(ServerArgs),
    /// List every slot
    Slots(ServerArgs),
    /// List the workloads
    Workloads(ServerArgs),
    /// Store, list and delete a tenant's secrets
    #[command(subcommand)]
    Secrets(SecretsCommand),
}

const SERVE_HELP: &str = "\
Without a tokens file (BOILERHOUSE_API_TOKENS_FILE) it listens on 127.0.0.1 and serves this machine only.
`boilerhouse config` prints every setting in force and where it came from. The first SIGTERM or SIGINT
lets what runs finish, the second stops at once; nothing is lost either way.

Examples:
  BOILERHOUSE_WORKLOADS_DIR=./workloads boilerhouse serve
  BOILERHOUSE_API_TOKENS_FILE=/etc/boilerhouse/tokens BOILERHOUSE_STORE=s3://states/prod boilerhouse serve";

const CLAIM_EXAMPLES: &str = "\
Examples:
  boilerhouse claim alice
  boilerhouse claim alice --workload web --wait-ms 10000
  boilerhouse claim alice --metadata plan=pro --metadata '{\"seats\": 3}'
  boilerhouse claim alice --secret api_key=@key.txt      from a file
  pass show key | boilerhouse claim alice --secret api_key=-    from standard input
  boilerhouse claim alice --json | jq -r .container.name";

/// Which server, and how its answer is shown.
#[derive(Debug, Args)]
pub(super) struct ServerArgs {
    /// The server's address
    #[arg(
        long,
        env = "BOILERHOUSE_URL",
        hide_env_values = true,
        default_value = "http://127.0.0.1:3000",
        value_name = "URL"
    )]
    pub(super) url: String,
    /// Print the server's answer as JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The files; all of BOILERHOUSE_WORKLOADS_DIR when left out
    #[arg(value_name = "FILES")]
    pub(super) files: Vec<PathBuf>,
    /// Print the findings as JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct TenantArgs {
    /// Whose
    #[arg(value_name = "TENANT")]
    pub(super) tenant: TenantId,
    /// Which workload; not needed where there is only one
    #[arg(long, short, value_name = "WORKLOAD")]
    pub(super) workload: Option<WorkloadId>,
    #[command(flatten)]
    pub(super) server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct ClaimArgs {
    #[command(flatten)]
    pub(super) of: TenantArgs,
    /// Metadata for the workload's hooks, laid over the tenant's own; repeatable
    #[arg(long, value_name = "KEY=VALUE|JSON")]
    pub(super) metadata: Vec<String>,
    /// Environment for the program; repeatable
    #[arg(long, value_name = "NAME=VALUE")]
    pub(super) env: Vec<String>,
    /// A secret file, its content byte for byte from a file or standard input; repeatable
    #[arg(long, value_name = "NAME=@FILE|NAME=-")]
    pub(super) secret: Vec<String>,
    /// How long to wait for a free slot, in milliseconds
    #[arg(long, value_name = "N")]
    pub(super) wait_ms: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct ReleaseArgs {
    #[command(flatten)]
    pub(super) of: TenantArgs,
    /// Release only the claim of this epoch
    #[arg(long, value_name = "N")]
    pub(super) epoch: Option<u64>,
    /// Do not wait until the state is saved
    #[arg(long)]
    pub(super) accepted: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum SecretsCommand {
    /// Store a secret, encrypted, for every later claim
    Put {
        /// Whose
        #[arg(value_name = "TENANT")]
        tenant: TenantId,
        /// Its name, and where its content comes from: a file, or - for standard input
        #[arg(value_name = "NAME=@FILE|NAME=-")]
        secret: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// List the names of the stored secrets
    List {
        /// Whose
        #[arg(value_name = "TENANT")]
        tenant: TenantId,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Delete a stored secret
    Delete {
        /// Whose
        #[arg(value_name = "TENANT")]
        tenant: TenantId,
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_well_formed() {
        Cli::command().debug_assert();
    }

    /// P10 and P11: nothing is ignored, and no option takes a token.
    #[test]
    fn what_is_unknown_is_refused() {
        for line in [
            "boilerhouse serve --url http://x",
            "boilerhouse claim alice --token x",
            "boilerhouse claim a/b",
            "boilerhouse claim",
            "boilerhouse claim alice --wait-ms -1",
            "boilerhouse claim alice --wait-ms soon",
            "boilerhouse release alice --epoch x",
            "boilerhouse pools alice",
            "boilerhouse secrets",
            "boilerhouse prefetch",
            "boilerhouse prefetch alice --snapshot 1",
            "boilerhouse restore alice",
            "boilerhouse fork alice",
            "boilerhouse erase",
            "boilerhouse state verify",
            "boilerhouse state verify --all alice",
            "boilerhouse state verify --all --workload web",
            "boilerhouse state resolve alice",
            "boilerhouse state resolve alice --keep mine",
            "boilerhouse state resolve --keep ours",
            "boilerhouse state export alice",
            "boilerhouse state import alice",
            "boilerhouse state import alice --mirror ./alice",
            "boilerhouse state import alice --owner root ./alice",
            "boilerhouse frobnicate",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn the_commands_of_the_examples_parse() {
        let lines = EXAMPLES.lines().chain(CLAIM_EXAMPLES.lines());
        let mut parsed = 0;
        for line in lines.filter_map(|line| line.find("boilerhouse ").map(|at| &line[at..])) {
            let command = line.split("  ").next().unwrap().split(" | ").next().unwrap().replace('\'', "");
            let words = command.replace("{\"seats\": 3}", "{\"seats\":3}");
            let cli = Cli::try_parse_from(words.split_whitespace());
            assert!(cli.is_ok(), "{words}: {}", cli.unwrap_err());
            parsed += 1;
        }
        assert_eq!(parsed, 12, "every example is tried");
    }
}
