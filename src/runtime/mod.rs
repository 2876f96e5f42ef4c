//! The container-engine port.
//!
//! What is above asks in the words of this module and never sees an engine's
//! own types. The port fits Pods as well as Docker containers: it takes a
//! [`plan::ContainerPlan`] whose mounts were prepared by whoever carries state into
//! slots, and knows nothing of host directories itself.
//!
//! # Guarantees
//! - Every call ends within its deadline.
//! - *Already gone* is success where the caller wanted it gone.
//! - An outcome that is not known is [`Error::Unknown`], never a failure: the
//!   caller looks it up with [`Runtime::inspect`] or [`Runtime::list`] before it decides.

pub mod docker;
pub mod fake;
pub mod plan;
pub mod seccomp;

#[cfg(test)]
mod samples;

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use crate::model::{ContainerId, Owner, Secret, SlotId, SpecHash, WorkloadId, spec::PullPolicy};
use plan::ContainerPlan;

/// Shares an engine between components.
pub type SharedRuntime = Arc<dyn Runtime>;

/// Makes, watches and destroys containers.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Answers what the engine is and whether it can serve us.
    async fn probe(&self) -> Result<EngineInfo, Error>;

    /// Makes sure that the engine has `image`, as the policy says.
    async fn ensure_image(&self, image: &str, policy: PullPolicy) -> Result<(), Error>;

    /// Creates a container; it does not run yet. Its name is the plan's: a name that is
    /// taken by a container with the same labels is that container (an earlier call's
    /// outcome that was not known), any other holder is [`Error::Conflict`].
    async fn create(&self, plan: &ContainerPlan) -> Result<Created, Error>;

    /// Starts a created container. One that runs already is success.
    async fn start(&self, id: &ContainerId) -> Result<(), Error>;

    /// Looks a container up by id or name; `None` when the engine has none such.
    async fn inspect(&self, id_or_name: &str) -> Result<Option<Observed>, Error>;

    /// Lists this installation's containers, running or not. Of one that ended, whether
    /// it was killed for memory is only said by [`Runtime::inspect`].
    async fn list(&self, instance: &str) -> Result<Vec<Observed>, Error>;

    /// Runs a command in a running container and waits for its end, at most
    /// `request.timeout`; past it the command is killed and the error is
    /// [`Error::Timeout`]. A command that cannot be run at all (not found, not executable)
    /// ends with status 126 or 127, as in a shell.
    ///
    /// *Cancel safety*: the command goes on when the call is dropped. Whoever has a
    /// deadline gives it as `request.timeout`.
    async fn exec(&self, id: &ContainerId, request: ExecRequest) -> Result<ExecOutput, Error>;

    /// Sends a signal, e.g. `SIGHUP`, to the container's first process. A paused container
    /// is a conflict: engines let one go on to deliver a signal.
    async fn signal(&self, id: &ContainerId, signal: &str) -> Result<(), Error>;

    /// Ends the container: `signal` (the image's own when `None`), `grace`, then
    /// SIGKILL; returns when it does not run any more. Gone is success. A paused
    /// container is killed at once.
    async fn stop(&self, id: &ContainerId, signal: Option<&str>, grace: Duration) -> Result<(), Error>;

    /// Stops (as [`Runtime::stop`] with the container's own signal) and starts the
    /// container, with the same environment. The events show its death.
    async fn restart(&self, id: &ContainerId, grace: Duration) -> Result<(), Error>;

    /// Freezes every process of the container. Paused already is success.
    async fn pause(&self, id: &ContainerId) -> Result<(), Error>;

    /// Lets a paused container go on. Not paused is success.
    async fn unpause(&self, id: &ContainerId) -> Result<(), Error>;

    /// Kills and removes a container; returns when the engine says it is gone.
    /// Gone already is success.
    async fn remove(&self, id_or_name: &str) -> Result<(), Error>;

    /// Streams deaths of this installation's containers, asked for or not, from the
    /// moment of the call. The stream ends when the connection does, and of itself now
    /// and then; the caller subscribes again and *then* lists, so that nothing falls
    /// between.
    async fn events(&self, instance: &str) -> Result<BoxStream<'static, Event>, Error>;
}

/// Describes the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineInfo {
    /// E.g. `docker 20.10.24`.
    pub version: String,
    /// Reasons why this engine cannot be used (user-namespace remapping, rootless).
    pub refusals: Vec<String>,
    /// What works but should be better, for the log.
    pub warnings: Vec<String>,
}

/// The result of [`Runtime::create`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// The new container.
    pub id: ContainerId,
    /// The numbers its program runs as, resolved from the image's own passwd and group.
    pub run_as: Owner,
}

/// What the engine says of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// Its id.
    pub id: ContainerId,
    /// Its name, without a leading slash.
    pub name: String,
    /// Our labels on it; `None` when one is missing or malformed.
    pub labels: Option<Labels>,
    /// What it is doing.
    pub status: ContainerStatus,
    /// Its address on the network of its plan, if it has one. [`Runtime::list`] may leave it out.
    pub address: Option<String>,
}

/// What a container is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerStatus {
    /// Created, never started.
    Created,
    /// Runs.
    Running,
    /// Runs, frozen.
    Paused,
    /// Ended.
    Exited {
        /// Of its first process.
        code: i64,
        /// Whether the kernel killed it for memory.
        oom_killed: bool,
    },
    /// Being removed, dead, or something else that will not run again.
    Dead,
}

/// The labels by which an installation knows its containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// `boilerhouse.instance`
    pub instance: String,
    /// `boilerhouse.slot`
    pub slot: SlotId,
    /// `boilerhouse.workload`
    pub workload: WorkloadId,
    /// `boilerhouse.spec_hash`
    pub spec_hash: SpecHash,
}

/// A command to run in a container.
#[derive(Debug, Clone)]
pub struct ExecRequest {
    /// The argument vector; the first is looked up in the container's `PATH`.
    pub argv: Vec<String>,
    /// Environment beside the container's own.
    pub env: Vec<(String, String)>,
    /// What the command reads from its standard input; a secret because it may carry one.
    pub stdin: Option<Secret>,
    /// How long it may run.
    pub timeout: Duration,
    /// How many bytes of each of stdout and stderr are kept.
    pub output_cap_bytes: usize,
}

/// The result of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its exit status.
    pub status: i64,
    /// What it wrote, up to the cap.
    pub stdout: Vec<u8>,
    /// What it wrote, up to the cap.
    pub stderr: Vec<u8>,
    /// Whether either was cut.
    pub truncated: bool,
}

/// Something that happened to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The container.
    pub id: ContainerId,
    /// Its slot, when its labels say.
    pub slot: Option<SlotId>,
    /// What happened.
    pub kind: EventKind,
}

/// What happened to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// Its first process ended.
    Died,
    /// It was removed.
    Removed,
}

/// Says what to do about a call that did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The engine cannot be reached: try again later.
    #[error("container engine is unreachable")]
    Unavailable(#[source] Cause),
    /// The call may or may not have happened: look it up.
    #[error("outcome of {operation} on {target} is unknown")]
    Unknown {
        /// The call.
        operation: &'static str,
        /// The container, image or name concerned.
        target: String,
        /// Why.
        #[source]
        source: Cause,
    },
    /// A command ran past its deadline and was killed.
    #[error("command in {target} did not end within {after_ms} ms")]
    Timeout {
        /// The container.
        target: String,
        /// The deadline.
        after_ms: u64,
    },
    /// The image is not there and may not or cannot be pulled.
    #[error("image {image:?} cannot be had: {reason}")]
    Image {
        /// The image.
        image: String,
        /// Why.
        reason: String,
    },
    /// The container is not there, or not in a state for this call.
    #[error("{operation} on {target} is not possible: {reason}")]
    Conflict {
        /// The call.
        operation: &'static str,
        /// The container.
        target: String,
        /// The engine's words.
        reason: String,
    },
    /// The engine refuses the call for good: the spec or the engine must change.
    #[error("engine refuses {operation} of {target}: {reason}")]
    Refused {
        /// The call.
        operation: &'static str,
        /// The container or plan concerned.
        target: String,
        /// The engine's words.
        reason: String,
    },
}

/// The cause of an error, shareable.
pub type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// The label that names the installation.
pub const LABEL_INSTANCE: &str = "boilerhouse.instance";
/// The label that names the slot.
pub const LABEL_SLOT: &str = "boilerhouse.slot";
/// The label that names the workload.
pub const LABEL_WORKLOAD: &str = "boilerhouse.workload";
/// The label that carries the spec's hash.
pub const LABEL_SPEC_HASH: &str = "boilerhouse.spec_hash";

// === impl ContainerStatus ===

impl ContainerStatus {
    /// Returns whether its processes exist, frozen or not.
    pub fn is_alive(&self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

// === impl Labels ===

impl Labels {
    /// Returns the labels as an engine keeps them.
    pub fn to_pairs(&self) -> [(&'static str, &str); 4] {
        [
            (LABEL_INSTANCE, &self.instance),
            (LABEL_SLOT, self.slot.as_str()),
            (LABEL_WORKLOAD, self.workload.as_str()),
            (LABEL_SPEC_HASH, &self.spec_hash.0),
        ]
    }

    /// Reads our labels among others; `None` when one is missing or malformed.
    pub fn from_map(map: &HashMap<String, String>) -> Option<Self> {
        Some(Self {
            instance: map.get(LABEL_INSTANCE)?.clone(),
            slot: SlotId::new(map.get(LABEL_SLOT)?.clone()).ok()?,
            workload: WorkloadId::new(map.get(LABEL_WORKLOAD)?.clone()).ok()?,
            spec_hash: SpecHash(map.get(LABEL_SPEC_HASH)?.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_come_back_as_they_went() {
        let labels = samples::labels("one", "s1", &samples::spec("demo", "demo:1"));
        let mut map: HashMap<String, String> =
            labels.to_pairs().map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        map.insert("other".into(), "x".into());
        assert_eq!(Labels::from_map(&map), Some(labels));
        map.insert(LABEL_SLOT.into(), "../etc".into());
        assert_eq!(Labels::from_map(&map), None, "a slot that is no id");
        map.remove(LABEL_SLOT);
        assert_eq!(Labels::from_map(&map), None);
    }
}
