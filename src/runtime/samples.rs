//! A spec and labels for this module's tests.

use std::collections::BTreeMap;

use crate::model::{
    SlotId, WorkloadId, WorkloadSpec,
    spec::{Activation, Layout, Network, Persist, PoolSizes, PullPolicy, Resources, Volumes},
};

use super::Labels;

/// Returns the smallest spec: every default, and a command that is the image's.
pub(super) fn spec(id: &str, image: &str) -> WorkloadSpec {
    WorkloadSpec {
        id: WorkloadId::new(id).unwrap(),
        name: id.to_owned(),
        image: image.to_owned(),
        command: None,
        entrypoint: None,
        user: None,
        working_dir: None,
        volumes: Volumes::default(),
        environment: BTreeMap::new(),
        health_check: None,
        resources: Resources { cpus: 1.0, memory_mb: 512, pids: 256, tmpfs_mb: 64, state_max_mb: None },
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
        pull: PullPolicy::Missing,
        ports: BTreeMap::new(),
        stop_signal: None,
        stop_grace_ms: 10_000,
        activation: Activation::None,
        timeouts: BTreeMap::new(),
        labels: BTreeMap::new(),
    }
}

/// Returns the labels of a slot of that spec.
pub(super) fn labels(instance: &str, slot: &str, spec: &WorkloadSpec) -> Labels {
    Labels {
        instance: instance.to_owned(),
        slot: SlotId::new(slot).unwrap(),
        workload: spec.id.clone(),
        spec_hash: spec.hash(),
    }
}
