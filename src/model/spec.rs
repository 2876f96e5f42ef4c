//! The workload spec as typed, checked values.
//!
//! `parse` (see [`fn@parse`]) reads a spec from JSON-like data and reports every
//! violation at once, each with the path of its field.

mod fields;
mod parse;
mod reader;
mod rules;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub(crate) use self::reader::camel;
pub use self::{
    fields::{FieldDoc, Kind, fields},
    parse::parse,
    rules::{HOOKS, LATER_HOOKS},
};
use super::id::{SpecHash, WorkloadId};

/// What a kind of container is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// Its id; equals the name of its file.
    pub id: WorkloadId,
    /// For people; the id when left out.
    pub name: String,
    /// The image reference.
    pub image: String,
    /// Replaces the image's command.
    pub command: Option<Vec<String>>,
    /// Replaces the image's entry point.
    pub entrypoint: Option<Vec<String>>,
    /// `user[:group]`, by name or number; the image's own when left out.
    pub user: Option<String>,
    /// The working directory in the container.
    pub working_dir: Option<String>,
    /// The directories a slot owns, by what they are for.
    pub volumes: Volumes,
    /// Environment of the container from its creation.
    pub environment: BTreeMap<String, String>,
    /// How readiness is tested; none: ready when started.
    pub health_check: Option<HealthCheck>,
    /// Limits.
    pub resources: Resources,
    /// Sizes of the pool.
    pub pool: PoolSizes,
    /// When and how state is saved.
    pub persist: Persist,
    /// Paths of further tmpfs mounts, beside `/tmp` and `/run`.
    pub tmpfs: Vec<String>,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// Capabilities given back, without `CAP_`, upper case.
    pub cap_add: Vec<String>,
    /// The network the container is on.
    pub network: Network,
    /// When the image is pulled.
    pub pull: PullPolicy,
    /// Named ports of the container.
    pub ports: BTreeMap<String, u16>,
    /// The signal that asks the program to end, e.g. `SIGTERM`; the image's own when left out.
    pub stop_signal: Option<String>,
    /// How long it may take to end before it is killed, in milliseconds.
    pub stop_grace_ms: u64,
    /// How the program learns that it is claimed.
    pub activation: Activation,
    /// Deadlines of hooks by the hook's name, in milliseconds.
    pub timeouts: BTreeMap<String, u64>,
    /// Labels put on the container, beside our own.
    pub labels: BTreeMap<String, String>,
}

/// The directories of a slot that are bound into the container.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Volumes {
    /// The tenant's state: filled at claim, captured at release.
    pub state: Option<Volume>,
    /// The tenant's secrets, one file each.
    pub secrets: Option<Volume>,
    /// For sockets between the host and the program.
    pub comm: Option<Volume>,
}

/// One directory of a slot in the container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    /// Absolute, normalised, disjoint from the other volumes' and tmpfs paths.
    pub container_path: String,
    /// Whether the container may write to it.
    pub mode: VolumeMode,
}

/// Whether a volume may be written to from inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeMode {
    /// Read-only.
    Ro,
    /// Read and write.
    Rw,
}

/// A command run in the container; exit status 0 means healthy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// The argument vector.
    pub command: Vec<String>,
    /// Between two probes once ready, in milliseconds.
    pub interval_ms: u64,
    /// Of one probe, in milliseconds.
    pub timeout_ms: u64,
    /// Consecutive failures that make a ready slot unhealthy.
    pub retries: u32,
}

/// Limits of one container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// Processors, as a fraction.
    pub cpus: f64,
    /// Memory and swap together, in MiB.
    pub memory_mb: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Size of each tmpfs, in MiB.
    pub tmpfs_mb: u64,
    /// The most the state directory may hold when it is saved, in MiB.
    pub state_max_mb: Option<u64>,
}

/// Sizes of one pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSizes {
    /// Slots kept ready.
    pub min_idle: u32,
    /// Containers of this workload at most, in whatever phase.
    pub max: u32,
}

/// When and how state is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Persist {
    /// Whether the state is saved at release; if not, it is thrown away with the slot.
    pub on_release: bool,
    /// Between two saves while claimed, in milliseconds; 0: none.
    pub every_ms: u64,
    /// Globs, relative to the state directory, of what is not saved.
    pub exclude: Vec<String>,
    /// Snapshots kept.
    pub keep_last: u32,
    /// Days for which every snapshot is kept; 0: only `keep_last` counts.
    #[serde(default)]
    pub keep_days: u32,
    /// The longest pause of the container during a save, in milliseconds.
    pub max_pause_ms: u64,
    /// How state lies in the store.
    #[serde(default)]
    pub layout: Layout,
}

/// How state lies in the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Files together in packs, or in chunks; every kept snapshot is whole.
    #[default]
    Snapshot,
    /// One plain object a file, under its own name; only the newest snapshot is whole.
    Mirror,
}

/// The network a container is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Loopback only.
    None,
    /// An existing network of the engine, by name.
    Named(String),
}

/// When the image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullPolicy {
    /// Before each create.
    Always,
    /// When the engine does not have it.
    Missing,
    /// Never; an absent image is an error.
    Never,
}

/// How the program learns that it is claimed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Files simply appear.
    None,
    /// A command is run in the container, as the container's user.
    Exec(Vec<String>),
    /// The container is restarted.
    Restart,
}

/// What a spec takes from the server's configuration where it says nothing.
#[derive(Debug, Clone)]
pub struct SpecDefaults {
    /// `BOILERHOUSE_POOL_SIZE`.
    pub min_idle: u32,
    /// `BOILERHOUSE_MAX_CONTAINERS`.
    pub max: u32,
}

/// One rule that a spec breaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// The field, e.g. `volumes.state.container_path` or `command[1]`.
    pub path: String,
    /// What is wrong with it, in words that name the value.
    pub problem: String,
    /// What is allowed.
    pub allowed: String,
}

/// Says why a text cannot be the name of an environment variable; `None` when it can.
pub fn environment_problem(name: &str) -> Option<String> {
    rules::environment_name(name).err().map(|refusal| refusal.problem)
}

/// Returns a signal's name in its one form, e.g. `SIGTERM` for `term`.
///
/// # Errors
/// Words that say what is wrong with it.
pub fn signal_name(text: &str) -> Result<String, String> {
    rules::signal(text).map_err(|refusal| format!("{} (allowed: {})", refusal.problem, refusal.allowed))
}

/// Something in a valid spec that an operator should know of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// The field.
    pub path: String,
    /// What follows from its value.
    pub message: String,
}

// === impl WorkloadSpec ===

impl WorkloadSpec {
    /// Returns what is allowed and yet worth a second look.
    pub fn warnings(&self) -> Vec<Warning> {
        let mut warnings = Vec::new();
        let mut warn =
            |path: &str, message: String| warnings.push(Warning { path: path.to_owned(), message });
        match &self.network {
            Network::Named(name) if name == "bridge" => warn(
                "network",
                "on \"bridge\" tenants' containers can reach each other and the host's services".to_owned(),
            ),
            Network::None if !self.ports.is_empty() => {
                warn(
                    "ports",
                    "with network \"none\" nothing outside the container reaches its ports".to_owned(),
                );
            }
            Network::None | Network::Named(_) => {}
        }
        for name in &self.cap_add {
            if rules::DANGEROUS_CAPABILITIES.contains(&name.as_str()) {
                warn("cap_add", format!("with {name} tenants' code may leave its container"));
            }
        }
        warnings
    }

    /// Returns the hash that selects which slots fit: over every field that a
    /// container is made from, and none that it is not (a larger pool or
    /// another deadline replaces no slot).
    pub fn hash(&self) -> SpecHash {
        let mut made_from = self.clone();
        made_from.name = String::new();
        made_from.pool = PoolSizes { min_idle: 0, max: 0 };
        made_from.persist = Persist {
            on_release: true,
            every_ms: 0,
            exclude: Vec::new(),
            keep_last: 1,
            keep_days: 0,
            max_pause_ms: 0,
            layout: Layout::Snapshot,
        };
        made_from.timeouts = BTreeMap::new();
        made_from.stop_grace_ms = 0;
        made_from.resources.state_max_mb = None;
        let json = serde_json::to_vec(&made_from).expect("a spec has only text keys");
        SpecHash(hex::encode(&blake3::hash(&json).as_bytes()[..8]))
    }
}

// === impl Violation ===

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.problem)?;
        if !self.allowed.is_empty() {
            write!(f, " (allowed: {})", self.allowed)?;
        }
        Ok(())
    }
}
