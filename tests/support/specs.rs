//! Specs, labels and plans for tests.

use std::{collections::BTreeMap, time::Duration};

use boilerhouse::{
    model::{
        SlotId, WorkloadId, WorkloadSpec,
        spec::{Activation, Layout, Network, Persist, PoolSizes, PullPolicy, Resources, Volumes},
    },
    runtime::{
        ExecRequest, Labels,
        plan::{ContainerPlan, Mount, plan},
    },
};

/// Returns a spec with every default, small limits, and the image's own command.
pub fn spec(id: &str, image: &str) -> WorkloadSpec {
    WorkloadSpec {
        id: WorkloadId::new(id).expect("tests name workloads well"),
        name: id.to_owned(),
        image: image.to_owned(),
        command: None,
        entrypoint: None,
        user: None,
        working_dir: None,
        volumes: Volumes::default(),
        environment: BTreeMap::new(),
        health_check: None,
        resources: Resources { cpus: 1.0, memory_mb: 64, pids: 64, tmpfs_mb: 8, state_max_mb: None },
        pool: PoolSizes { min_idle: 0, max: 1 },
        persist: Persist {
            on_release: true,
            every_ms: 0,
            exclude: Vec::new(),
            keep_last: 1,
            keep_days: 0,
            max_pause_ms: 0,
            layout: Layout::Snapshot,
        },
        tmpfs: Vec::new(),
        read_only: true,
        cap_add: Vec::new(),
        network: Network::None,
        pull: PullPolicy::Never,
        ports: BTreeMap::new(),
        stop_signal: None,
        stop_grace_ms: 10_000,
        activation: Activation::None,
        timeouts: BTreeMap::new(),
        labels: BTreeMap::new(),
    }
}

/// Returns the plan of one slot of a spec.
pub fn plan_of(instance: &str, slot: &str, spec: &WorkloadSpec, mounts: Vec<Mount>) -> ContainerPlan {
    let labels = Labels {
        instance: instance.to_owned(),
        slot: SlotId::new(slot).expect("tests name slots well"),
        workload: spec.id.clone(),
        spec_hash: spec.hash(),
    };
    plan(spec, labels, mounts)
}

/// Returns a request to run a command, for 20 seconds and 64 KiB of output at most.
pub fn command(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
        env: Vec::new(),
        stdin: None,
        timeout: Duration::from_secs(20),
        output_cap_bytes: 64 * 1024,
    }
}
