//! From a plan to the request that creates the container, as a pure function.

use std::collections::HashMap;

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig, Mount,
    MountType, ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
};

use crate::{
    model::spec::Network,
    runtime::plan::{self, ContainerPlan},
};

/// Builds the request.
///
/// What the plan does not say is the same for every container: no new privileges, a
/// first process that reaps (`init`), namespaces of its own, no restart by the engine
/// (a claim's directories must never be bound into a container that nobody asked for),
/// and no health check of the image's (ours asks when it wants to).
pub(super) fn create(plan: &ContainerPlan) -> ContainerCreateBody {
    ContainerCreateBody {
        image: Some(plan.image.clone()),
        cmd: plan.command.clone(),
        entrypoint: plan.entrypoint.clone(),
        user: plan.user.clone(),
        working_dir: plan.working_dir.clone(),
        env: Some(plan.env.clone()),
        labels: Some(labels(plan)),
        stop_signal: plan.stop_signal.clone(),
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".into()]), ..Default::default() }),
        host_config: Some(host(plan)),
        ..Default::default()
    }
}

fn host(plan: &ContainerPlan) -> HostConfig {
    HostConfig {
        mounts: Some(plan.mounts.iter().map(mount).collect()),
        tmpfs: Some(plan.tmpfs.clone().into_iter().collect()),
        readonly_rootfs: Some(plan.read_only),
        cap_drop: Some(vec!["ALL".into()]),
        cap_add: Some(plan.cap_add.clone()),
        privileged: Some(false),
        security_opt: Some(vec!["no-new-privileges".into(), format!("seccomp={}", plan.seccomp)]),
        nano_cpus: Some(plan.nano_cpus),
        memory: Some(plan.memory_bytes),
        memory_swap: Some(plan.memory_bytes),
        pids_limit: Some(plan.pids),
        shm_size: Some(plan.shm_bytes),
        ulimits: Some(plan.ulimits.iter().map(ulimit).collect()),
        init: Some(true),
        ipc_mode: Some("private".into()),
        cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
        network_mode: Some(network(&plan.network).to_owned()),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".into()),
            config: Some(
                [("max-size", plan.log_max_bytes.to_string()), ("max-file", "1".to_owned())]
                    .map(|(name, value)| (name.to_owned(), value))
                    .into(),
            ),
        }),
        restart_policy: Some(RestartPolicy {
            name: Some(RestartPolicyNameEnum::NO),
            maximum_retry_count: None,
        }),
        auto_remove: Some(false),
        ..Default::default()
    }
}

/// Returns the engine's name of a network.
pub(super) fn network(network: &Network) -> &str {
    match network {
        Network::None => "none",
        Network::Named(name) => name,
    }
}

/// The spec's labels, and ours over them.
fn labels(plan: &ContainerPlan) -> HashMap<String, String> {
    let theirs = plan.extra_labels.clone().into_iter();
    let ours = plan.labels.to_pairs().map(|(name, value)| (name.to_owned(), value.to_owned()));
    theirs.chain(ours).collect()
}

/// A mount, unlike a bind, fails when its source is missing instead of making it.
fn mount(mount: &plan::Mount) -> Mount {
    Mount {
        typ: Some(MountType::BIND),
        source: Some(mount.source.clone()),
        target: Some(mount.target.clone()),
        read_only: Some(mount.read_only),
        ..Default::default()
    }
}

fn ulimit(limit: &plan::Ulimit) -> ResourcesUlimits {
    ResourcesUlimits { name: Some(limit.name.to_owned()), soft: Some(limit.soft), hard: Some(limit.hard) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        model::WorkloadSpec,
        runtime::{LABEL_SLOT, plan::plan, samples},
    };

    /// Returns the request as the engine gets it.
    fn sent(change: impl FnOnce(&mut WorkloadSpec)) -> Value {
        let mut spec = samples::spec("demo", "demo:1");
        change(&mut spec);
        let mounts = vec![plan::Mount {
            source: "/host/s1/secrets".into(),
            target: "/secrets".into(),
            read_only: true,
        }];
        serde_json::to_value(create(&plan(&spec, samples::labels("one", "s1", &spec), mounts))).unwrap()
    }

    #[test]
    fn every_default_of_the_hardening_is_sent() {
        let sent = sent(|_| {});
        let host = &sent["HostConfig"];
        for (field, value) in [
            ("ReadonlyRootfs", json!(true)),
            ("CapDrop", json!(["ALL"])),
            ("CapAdd", json!([])),
            ("Privileged", json!(false)),
            ("PidsLimit", json!(256)),
            ("Memory", json!(536_870_912)),
            ("MemorySwap", json!(536_870_912)),
            ("NanoCpus", json!(1_000_000_000)),
            ("ShmSize", json!(16_777_216)),
            ("Init", json!(true)),
            ("IpcMode", json!("private")),
            ("CgroupnsMode", json!("private")),
            ("NetworkMode", json!("none")),
            ("LogConfig", json!({"Type": "json-file", "Config": {"max-size": "1048576", "max-file": "1"}})),
            ("AutoRemove", json!(false)),
            (
                "Ulimits",
                json!([
                    {"Name": "nofile", "Soft": 1024, "Hard": 16384},
                    {"Name": "core", "Soft": 0, "Hard": 0},
                ]),
            ),
            (
                "Mounts",
                json!([{"Type": "bind", "Source": "/host/s1/secrets", "Target": "/secrets", "ReadOnly": true}]),
            ),
        ] {
            assert_eq!(host[field], value, "{field}");
        }
        assert_eq!(host["RestartPolicy"]["Name"], "no");
        let security = host["SecurityOpt"].as_array().unwrap();
        assert_eq!(security[0], "no-new-privileges");
        let profile = security[1].as_str().unwrap().strip_prefix("seccomp=").unwrap();
        assert!(serde_json::from_str::<Value>(profile).is_ok(), "the profile itself, not a path");
        for absent in ["PidMode", "UTSMode", "UsernsMode", "Devices", "Binds", "PortBindings", "VolumesFrom"]
        {
            assert_eq!(host[absent], Value::Null, "{absent}");
        }
        assert_eq!(sent["Healthcheck"]["Test"], json!(["NONE"]));
    }

    #[test]
    fn a_spec_cannot_take_our_labels() {
        let sent = sent(|spec| {
            spec.labels = [(LABEL_SLOT, "stolen"), ("team", "a")].map(|(k, v)| (k.into(), v.into())).into();
        });
        assert_eq!(sent["Labels"][LABEL_SLOT], "s1");
        assert_eq!(sent["Labels"]["team"], "a");
    }

    #[test]
    fn a_named_network_is_passed_on() {
        let sent = sent(|spec| spec.network = Network::Named("apps".into()));
        assert_eq!(sent["HostConfig"]["NetworkMode"], "apps");
    }
}
