//! From a spec to a container, as a pure function: the hardening defaults live here.
//!
//! A plan says everything that makes a container, so that an adapter only
//! translates it. What a spec may loosen is read from the spec; what it may not
//! is a constant below.

use std::collections::BTreeMap;

use crate::model::{
    WorkloadSpec,
    spec::{Network, Resources},
};

use super::Labels;

/// The seccomp profile, in the JSON form of Docker and OCI; see [`super::seccomp`].
pub use super::seccomp::PROFILE as SECCOMP_PROFILE;

/// Bytes of `/dev/shm`. It counts as the container's memory.
pub const SHM_BYTES: i64 = 16 * 1024 * 1024;

/// Files a process may have open before it raises its own limit.
///
/// 1,024 is what `select` can bear; programs that can do more raise it themselves.
pub const NOFILE_SOFT: i64 = 1_024;

/// Files a process may have open at most. Redis with its default of 10,000 clients
/// needs 10,032; more than this is a cost to the host's kernel that no limit of
/// memory sees.
pub const NOFILE_HARD: i64 = 16_384;

/// Bytes of the one log file that an engine keeps of the container's output.
pub const LOG_MAX_BYTES: u64 = 1024 * 1024;

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
    /// Bytes of `/dev/shm`.
    pub shm_bytes: i64,
    /// Limits of a process: name as in `ulimit`, soft, hard.
    pub ulimits: Vec<Ulimit>,
    /// Bytes of the one file that the engine keeps of the container's output.
    pub log_max_bytes: u64,
    /// The network.
    pub network: Network,
    /// The signal that asks the program to end.
    pub stop_signal: Option<String>,
}

/// A limit of each process in a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ulimit {
    /// E.g. `nofile`.
    pub name: &'static str,
    /// In force until the process asks for another.
    pub soft: i64,
    /// The most it may ask for.
    pub hard: i64,
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
///
/// `mounts` are the slot's directories as whoever prepared them wants them bound.
pub fn plan(spec: &WorkloadSpec, labels: Labels, mounts: Vec<Mount>) -> ContainerPlan {
    ContainerPlan {
        name: container_name(&labels),
        extra_labels: spec.labels.clone(),
        image: spec.image.clone(),
        command: spec.command.clone(),
        entrypoint: spec.entrypoint.clone(),
        user: spec.user.clone(),
        working_dir: spec.working_dir.clone(),
        env: spec.environment.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        mounts,
        tmpfs: tmpfs(&spec.tmpfs, &spec.resources),
        read_only: spec.read_only,
        cap_add: spec.cap_add.clone(),
        seccomp: SECCOMP_PROFILE,
        nano_cpus: nano_cpus(spec.resources.cpus),
        memory_bytes: mebibytes(spec.resources.memory_mb),
        pids: i64::try_from(spec.resources.pids).unwrap_or(i64::MAX),
        shm_bytes: SHM_BYTES,
        ulimits: vec![
            Ulimit { name: "nofile", soft: NOFILE_SOFT, hard: NOFILE_HARD },
            // A core file would be a tenant's memory on the host's disk.
            Ulimit { name: "core", soft: 0, hard: 0 },
        ],
        log_max_bytes: LOG_MAX_BYTES,
        network: spec.network.clone(),
        stop_signal: spec.stop_signal.clone(),
        labels,
    }
}

/// Returns the name of a slot's container.
pub fn container_name(labels: &Labels) -> String {
    format!("boilerhouse-{}-{}", labels.instance, labels.slot)
}

/// `/tmp`, `/run` and the spec's further paths.
///
/// Where the image has a directory at the path, runc gives the tmpfs that
/// directory's mode instead of ours.
fn tmpfs(further: &[String], resources: &Resources) -> BTreeMap<String, String> {
    let paths = ["/tmp", "/run"].into_iter().chain(further.iter().map(String::as_str));
    paths
        .map(|path| {
            // /run is where programs look for other programs' sockets and pid
            // files: it stays its owner's, as in every distribution.
            let mode = if path == "/run" { "0755" } else { "1777" };
            let size = resources.tmpfs_mb;
            // One inode a 4 KiB page: files without content cost kernel memory too.
            let inodes = size.saturating_mul(256);
            (path.to_owned(), format!("rw,nosuid,nodev,noexec,size={size}m,nr_inodes={inodes},mode={mode}"))
        })
        .collect()
}

fn nano_cpus(cpus: f64) -> i64 {
    // The cast saturates; a spec has checked that the number is finite and positive.
    (cpus * 1e9).round() as i64
}

fn mebibytes(mib: u64) -> i64 {
    i64::try_from(mib.saturating_mul(1024 * 1024)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::samples;

    fn planned(change: impl FnOnce(&mut WorkloadSpec)) -> ContainerPlan {
        let mut spec = samples::spec("demo", "demo:1");
        change(&mut spec);
        plan(&spec, samples::labels("one", "s1", &spec), Vec::new())
    }

    #[test]
    fn a_spec_that_says_nothing_is_hardened() {
        let plan = planned(|_| {});
        assert_eq!(plan.name, "boilerhouse-one-s1");
        assert!(plan.read_only);
        assert_eq!(plan.cap_add, Vec::<String>::new());
        assert_eq!(plan.seccomp, SECCOMP_PROFILE);
        assert_eq!(plan.network, Network::None);
        assert_eq!(plan.shm_bytes, 16 * 1024 * 1024);
        assert_eq!(plan.log_max_bytes, 1024 * 1024);
        assert!(plan.ulimits.contains(&Ulimit { name: "core", soft: 0, hard: 0 }));
        assert!(plan.ulimits.iter().any(|limit| limit.name == "nofile" && limit.hard <= 65_536));
        assert_eq!(plan.tmpfs.keys().collect::<Vec<_>>(), ["/run", "/tmp"]);
        for (path, options) in &plan.tmpfs {
            for option in ["nosuid", "nodev", "noexec", "size=64m", "nr_inodes=16384"] {
                assert!(options.split(',').any(|o| o == option), "{path} has no {option}: {options}");
            }
        }
        assert!(plan.tmpfs["/tmp"].ends_with("mode=1777"));
        assert!(plan.tmpfs["/run"].ends_with("mode=0755"));
    }

    #[test]
    fn resources_become_the_engines_units() {
        for (cpus, nano) in [(1.0, 1_000_000_000), (0.1, 100_000_000), (2.5, 2_500_000_000), (1e-9, 1)] {
            assert_eq!(planned(|spec| spec.resources.cpus = cpus).nano_cpus, nano, "{cpus}");
        }
        for (mib, bytes) in [(512, 536_870_912), (1, 1_048_576), (u64::MAX, i64::MAX)] {
            assert_eq!(planned(|spec| spec.resources.memory_mb = mib).memory_bytes, bytes, "{mib}");
        }
        assert_eq!(planned(|spec| spec.resources.pids = 7).pids, 7);
        assert_eq!(planned(|spec| spec.resources.pids = u64::MAX).pids, i64::MAX);
    }

    #[test]
    fn what_a_spec_asks_for_arrives() {
        let plan = planned(|spec| {
            spec.command = Some(vec!["run".into()]);
            spec.entrypoint = Some(vec!["/init".into()]);
            spec.user = Some("app:staff".into());
            spec.working_dir = Some("/data".into());
            spec.environment = [("B", "2"), ("A", "x=y")].map(|(k, v)| (k.into(), v.into())).into();
            spec.tmpfs = vec!["/var/cache".into()];
            spec.resources.tmpfs_mb = 8;
            spec.read_only = false;
            spec.cap_add = vec!["CHOWN".into()];
            spec.network = Network::Named("apps".into());
            spec.stop_signal = Some("SIGINT".into());
            spec.labels = [("team".to_owned(), "a".to_owned())].into();
        });
        assert_eq!(plan.command.as_deref(), Some(&["run".to_owned()][..]));
        assert_eq!(plan.entrypoint.as_deref(), Some(&["/init".to_owned()][..]));
        assert_eq!(plan.user.as_deref(), Some("app:staff"));
        assert_eq!(plan.working_dir.as_deref(), Some("/data"));
        assert_eq!(plan.env, ["A=x=y", "B=2"]);
        assert!(plan.tmpfs["/var/cache"].contains("size=8m,nr_inodes=2048,mode=1777"));
        assert!(!plan.read_only);
        assert_eq!(plan.cap_add, ["CHOWN"]);
        assert_eq!(plan.network, Network::Named("apps".into()));
        assert_eq!(plan.stop_signal.as_deref(), Some("SIGINT"));
        assert_eq!(plan.extra_labels["team"], "a");
    }
}
