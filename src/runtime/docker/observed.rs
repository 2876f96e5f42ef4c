//! From the engine's answers to ours, as pure functions.

use std::collections::HashMap;

use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum as State, ContainerSummary,
    ContainerSummaryStateEnum as ListedState, EndpointSettings, SystemInfo, SystemVersion,
};

use crate::{
    model::ContainerId,
    runtime::{ContainerStatus, EngineInfo, Labels, Observed},
};

/// The oldest API we speak: the first with private cgroup namespaces (Docker 20.10).
const OLDEST_API: (u32, u32) = (1, 41);

/// Reads the answer to an inspect.
pub(super) fn from_inspect(found: &ContainerInspectResponse) -> Observed {
    let state = found.state.as_ref();
    let status = match state.and_then(|state| state.status) {
        Some(State::CREATED) => ContainerStatus::Created,
        Some(State::RUNNING) => ContainerStatus::Running,
        Some(State::PAUSED) => ContainerStatus::Paused,
        Some(State::EXITED) => ContainerStatus::Exited {
            code: state.and_then(|state| state.exit_code).unwrap_or(-1),
            oom_killed: state.and_then(|state| state.oom_killed).unwrap_or(false),
        },
        _ => ContainerStatus::Dead,
    };
    let mode = found.host_config.as_ref().and_then(|host| host.network_mode.as_deref());
    let networks = found.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    Observed {
        id: ContainerId(found.id.clone().unwrap_or_default()),
        name: found.name.as_deref().map(bare).unwrap_or_default(),
        labels: found.config.as_ref().and_then(|config| config.labels.as_ref()).and_then(Labels::from_map),
        status,
        address: address(mode, networks),
    }
}

/// Reads one row of a list.
pub(super) fn from_summary(found: &ContainerSummary) -> Observed {
    let status = match found.state {
        Some(ListedState::CREATED) => ContainerStatus::Created,
        Some(ListedState::RUNNING) => ContainerStatus::Running,
        Some(ListedState::PAUSED) => ContainerStatus::Paused,
        Some(ListedState::EXITED) => ContainerStatus::Exited {
            code: found.status.as_deref().and_then(exit_code).unwrap_or(-1),
            oom_killed: false,
        },
        _ => ContainerStatus::Dead,
    };
    let mode = found.host_config.as_ref().and_then(|host| host.network_mode.as_deref());
    let networks = found.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    Observed {
        id: ContainerId(found.id.clone().unwrap_or_default()),
        name: found.names.as_ref().and_then(|names| names.first()).map(bare).unwrap_or_default(),
        labels: found.labels.as_ref().and_then(Labels::from_map),
        status,
        address: address(mode, networks),
    }
}

/// Judges the engine.
pub(super) fn engine(version: &SystemVersion, info: &SystemInfo) -> EngineInfo {
    let mut refusals = Vec::new();
    let mut warnings = Vec::new();
    let options = info.security_options.as_deref().unwrap_or_default();
    // Each is a list like `name=seccomp,profile=default`.
    let has = |name: &str| {
        options.iter().any(|o| o.split(',').any(|part| part.strip_prefix("name=") == Some(name)))
    };
    let api = version.api_version.as_deref().unwrap_or_default();
    if api_number(api).is_none_or(|api| api < OLDEST_API) {
        refusals.push(format!("it speaks API {api:?}; 1.41 (Docker 20.10) or newer is needed"));
    }
    if info.os_type.as_deref().is_some_and(|os| os != "linux") {
        refusals.push(format!(
            "it runs {} containers, not Linux ones",
            info.os_type.as_deref().unwrap_or_default()
        ));
    }
    if has("userns") {
        refusals.push("it remaps user namespaces, so that files of a slot would belong to other users inside; remove `userns-remap` from its configuration".into());
    }
    if has("rootless") {
        refusals.push("it runs rootless, so that it cannot bind a slot's directories with their owners; use an engine that runs as root".into());
    }
    if !has("seccomp") {
        refusals.push("it has no seccomp, without which containers could use every system call; its kernel needs CONFIG_SECCOMP_FILTER".into());
    }
    for (has, what) in [
        (info.memory_limit, "memory of containers is not limited"),
        (info.swap_limit, "swap of containers is not limited"),
        (info.pids_limit, "processes of containers are not limited"),
        (info.cpu_cfs_quota, "processor time of containers is not limited"),
    ] {
        if has == Some(false) {
            warnings.push(format!("its kernel lacks a control group: {what}"));
        }
    }
    if info.live_restore_enabled == Some(false) {
        warnings.push("live-restore is off: a restart of the engine ends every container, claimed ones too; set `\"live-restore\": true` in its configuration".into());
    }
    EngineInfo {
        version: format!("docker {}", version.version.as_deref().unwrap_or("?")),
        refusals,
        warnings,
    }
}

/// Turns the engine's RFC 3339 time, as its `info` gives it, into the seconds with nine
/// decimals that its `events` take. Not worth a crate: one format, no calendar.
pub(super) fn unix_time(text: &str) -> Option<String> {
    let field = |range: std::ops::Range<usize>| text.get(range)?.parse::<i64>().ok();
    let separators = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if !separators.iter().all(|(at, byte)| text.as_bytes().get(*at) == Some(byte)) {
        return None;
    }
    let (year, month, day) = (field(0..4)?, field(5..7)?, field(8..10)?);
    let (fraction, zone) = match text.get(19..)?.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?),
        None => ("", text.get(19..)?),
    };
    let offset_s = match (zone.get(..1)?, zone.get(1..)?.split_once(':')) {
        ("Z", None) => 0,
        (sign @ ("+" | "-"), Some((hours, minutes))) => {
            let seconds = hours.parse::<i64>().ok()? * 3_600 + minutes.parse::<i64>().ok()? * 60;
            if sign == "+" { seconds } else { -seconds }
        }
        _ => return None,
    };
    // Days since 1970 of the proleptic Gregorian calendar, with years that begin in March.
    let (years, months) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * years + years / 4 - years / 100 + years / 400 + (153 * months + 2) / 5 + day - 719_469;
    let seconds = days * 86_400 + field(11..13)? * 3_600 + field(14..16)? * 60 + field(17..19)? - offset_s;
    Some(format!("{seconds}.{fraction:0<9.9}"))
}

fn bare(name: impl AsRef<str>) -> String {
    name.as_ref().trim_start_matches('/').to_owned()
}

fn address(mode: Option<&str>, networks: Option<&HashMap<String, EndpointSettings>>) -> Option<String> {
    networks?.get(mode?)?.ip_address.clone().filter(|address| !address.is_empty())
}

/// Reads `Exited (137) 5 minutes ago`.
fn exit_code(status: &str) -> Option<i64> {
    status.strip_prefix("Exited (")?.split_once(')')?.0.parse().ok()
}

fn api_number(version: &str) -> Option<(u32, u32)> {
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_is_read_from_an_inspect() {
        for (state, status) in [
            (json!({"Status": "created"}), ContainerStatus::Created),
            (json!({"Status": "running"}), ContainerStatus::Running),
            (json!({"Status": "paused"}), ContainerStatus::Paused),
            (
                json!({"Status": "exited", "ExitCode": 137, "OOMKilled": true}),
                ContainerStatus::Exited { code: 137, oom_killed: true },
            ),
            (json!({"Status": "removing"}), ContainerStatus::Dead),
            (json!({"Status": "dead"}), ContainerStatus::Dead),
        ] {
            let found = serde_json::from_value(json!({
                "Id": "abc", "Name": "/boilerhouse-one-s1", "State": state,
                "HostConfig": {"NetworkMode": "apps"},
                "NetworkSettings": {"Networks": {"apps": {"IPAddress": "10.1.2.3"}, "b": {"IPAddress": "10.9.9.9"}}},
                "Config": {"Labels": {"boilerhouse.instance": "one"}},
            }))
            .unwrap();
            let observed = from_inspect(&found);
            assert_eq!(observed.status, status);
            assert_eq!((observed.id.0.as_str(), observed.name.as_str()), ("abc", "boilerhouse-one-s1"));
            assert_eq!(observed.address.as_deref(), Some("10.1.2.3"), "on the network of its plan");
            assert_eq!(observed.labels, None, "three labels are missing");
        }
    }

    #[test]
    fn a_container_is_read_from_a_list() {
        let found = serde_json::from_value(json!({
            "Id": "abc", "Names": ["/boilerhouse-one-s1"], "State": "exited", "Status": "Exited (3) 2 hours ago",
            "HostConfig": {"NetworkMode": "none"}, "NetworkSettings": {"Networks": {"none": {"IPAddress": ""}}},
            "Labels": {
                "boilerhouse.instance": "one", "boilerhouse.slot": "s1",
                "boilerhouse.workload": "demo", "boilerhouse.spec_hash": "00",
            },
        }))
        .unwrap();
        let observed = from_summary(&found);
        assert_eq!(observed.status, ContainerStatus::Exited { code: 3, oom_killed: false });
        assert_eq!(observed.labels.unwrap().slot.as_str(), "s1");
        assert_eq!(observed.address, None);
    }

    #[test]
    fn the_engines_time_is_read() {
        for (text, unix) in [
            ("1970-01-01T00:00:00Z", Some("0.000000000")),
            ("2026-11-23T19:29:55.728647766Z", Some("1795462195.728647766")),
            ("2026-11-23T21:29:55.7+02:00", Some("1795462195.700000000")),
            ("2000-02-29T23:59:59-00:30", Some("951870599.000000000")),
            ("2100-03-01T00:00:00Z", Some("4107542400.000000000")),
            ("2026-11-23", None),
            ("2026-11-23T19:29:55", None),
            ("2026-11-23 19:29:55Z", None),
            ("", None),
        ] {
            assert_eq!(unix_time(text).as_deref(), unix, "{text}");
        }
    }

    #[test]
    fn engines_are_judged() {
        let good = json!({
            "OSType": "linux", "SecurityOptions": ["name=seccomp,profile=default"], "LiveRestoreEnabled": true,
            "MemoryLimit": true, "SwapLimit": true, "PidsLimit": true, "CpuCfsQuota": true,
        });
        for (change, api, refusal, warning) in [
            (json!({}), "1.41", None, None),
            (json!({}), "1.9", Some("speaks API"), None),
            (json!({}), "2.0", None, None),
            (json!({}), "", Some("speaks API"), None),
            (json!({"OSType": "windows"}), "1.50", Some("windows"), None),
            (
                json!({"SecurityOptions": ["name=seccomp,profile=default", "name=userns"]}),
                "1.41",
                Some("remaps"),
                None,
            ),
            (
                json!({"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"]}),
                "1.41",
                Some("rootless"),
                None,
            ),
            (json!({"SecurityOptions": []}), "1.41", Some("no seccomp"), None),
            (json!({"LiveRestoreEnabled": false}), "1.41", None, Some("live-restore")),
            (json!({"PidsLimit": false}), "1.41", None, Some("processes")),
        ] {
            let mut info = good.clone();
            info.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let version = serde_json::from_value(json!({"Version": "20.10.24", "ApiVersion": api})).unwrap();
            let engine = engine(&version, &serde_json::from_value(info).unwrap());
            assert_eq!(engine.version, "docker 20.10.24");
            for (found, expected) in [(engine.refusals, refusal), (engine.warnings, warning)] {
                assert_eq!(found.len(), usize::from(expected.is_some()), "{change} {api}: {found:?}");
                assert!(expected.is_none_or(|words| found[0].contains(words)), "{change} {api}: {found:?}");
            }
        }
    }
}
