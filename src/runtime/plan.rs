//! From a spec to a container, as a pure function: the hardening defaults live here.

use std::collections::BTreeMap;

use crate::model::{WorkloadSpec, spec::Network};

use super::Labels;

/// Everything an engine needs to create a container.
///
/// Built by [`plan`] only, so that the hardening of DESIGN section 11 is in one place.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerPlan {
    /// `boilerhouse-<instance>-<slot>`; the key by which an unknown outcome is looked up.
    pub name: String,
    /// Our labels.
    pub labels: Labels,
    /// The spec's labels.
    pub extra_labels: BTreeMap<String, String>,
    /// The image reference.
    pub image: String,
    /// Replaces the image's.
    pub command: Option<Vec<String>>,
    /// Replaces the image's.
    pub entrypoint: Option<Vec<String>>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Working directory.
    pub working_dir: Option<String>,
    /// `NAME=value`, sorted.
    pub env: Vec<String>,
    /// Bind mounts, from the slot's prepared directories.
    pub mounts: Vec<Mount>,
    /// Path → mount options.
    pub tmpfs: BTreeMap<String, String>,
    /// Read-only root.
    pub read_only: bool,
    /// Capabilities given back after all are dropped.
    pub cap_add: Vec<String>,
    /// The seccomp profile, as JSON text.
    pub seccomp: &'static str,
    /// Billionths of a processor.
    pub nano_cpus: i64,
    /// Memory, equal to memory + swap.
    pub memory_bytes: i64,
    /// Processes and threads.
    pub pids: i64,
    /// The network.
    pub network: Network,
    /// The signal that asks the program to end.
    pub stop_signal: Option<String>,
}

/// One directory of the slot bound into the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// What the engine binds: for Docker an absolute host path.
    pub source: String,
    /// Where in the container.
    pub target: String,
    /// Whether the container may write.
    pub read_only: bool,
}

/// Plans the container of one slot.
pub fn plan(spec: &WorkloadSpec, labels: Labels, mounts: Vec<Mount>) -> ContainerPlan {
    let _ = (spec, labels, mounts);
    todo!("written by the runtime slice")
}
