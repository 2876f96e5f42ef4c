//! Reads a spec and collects every violation.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    Activation, HealthCheck, Layout, Network, Persist, PoolSizes, PullPolicy, Resources, SpecDefaults,
    Violation, Volume, VolumeMode, Volumes, WorkloadSpec,
    reader::{Section, Sink, shown},
    rules::{self, Refusal},
};
use crate::model::{WorkloadId, id::ID_PATTERN};

/// What activation may be now, in the words of a refusal.
const ACTIVATIONS: &str = "\"none\", \"restart\", #{ exec: [argv] }";
/// The shortest time between two saves, in milliseconds.
const MIN_EVERY_MS: u64 = 1000;
/// The range of a hook's deadline, in milliseconds.
const TIMEOUT_MS: (u64, u64) = (10, 600_000);

/// Parses a spec from a JSON object in the shape of DESIGN's example.
///
/// Names are read in snake_case and in the original README's camelCase; `null`
/// is the same as leaving a field out.
///
/// # Errors
/// Every violation: a map's unknown keys first, then its fields in the order of
/// [`fn@super::fields`]. Never an empty list.
pub fn parse(value: &Value, defaults: &SpecDefaults) -> Result<WorkloadSpec, Vec<Violation>> {
    let sink = Sink::default();
    let spec = Section::open("", value, &sink).and_then(|root| read(&root, &sink, defaults));
    match spec {
        Some(spec) if sink.is_empty() => Ok(spec),
        _ => Err(sink.into_inner()),
    }
}

/// Reads all fields, whatever is wrong with some; `None` only without an id or image.
fn read(root: &Section<'_>, sink: &Sink, defaults: &SpecDefaults) -> Option<WorkloadSpec> {
    let id = id(root, sink);
    let name = checked(sink, "name", root.text("name"), rules::title);
    let image = checked(sink, "image", root.required_text("image"), rules::image);
    let command = argv(root, sink, "command", "command");
    let entrypoint = argv(root, sink, "entrypoint", "entrypoint");
    let user = checked(sink, "user", root.text("user"), rules::user);
    let working_dir = checked(sink, "working_dir", root.text("working_dir"), rules::absolute);
    let volumes = volumes(root, sink);
    let environment = environment(root, sink);
    let health_check = health_check(root, sink);
    let resources = resources(root, &volumes);
    let pool = pool(root, defaults);
    let persist = persist(root, sink, &volumes);
    let tmpfs = tmpfs(root, sink, &volumes);
    let read_only = root.flag("read_only");
    let cap_add = cap_add(root, sink);
    let network = network(root, sink);
    let pull = match root.choice("pull") {
        "always" => PullPolicy::Always,
        "never" => PullPolicy::Never,
        _ => PullPolicy::Missing,
    };
    let ports = root.entries("ports", |path, key, value| {
        note(sink, path, rules::port_name(key))?;
        u16::try_from(sink.integer(path, value, 1, u64::from(u16::MAX))?).ok()
    });
    let stop_signal = checked(sink, "stop_signal", root.text("stop_signal"), |text| rules::signal(&text));
    let stop_grace_ms = root.integer("stop_grace_ms");
    let activation = activation(root, sink);
    not_yet(root);
    let timeouts = root.entries("timeouts", |path, key, value| {
        note(sink, path, rules::hook_name(key))?;
        sink.integer(path, value, TIMEOUT_MS.0, TIMEOUT_MS.1)
    });
    let labels = root.entries("labels", |path, key, value| {
        note(sink, path, rules::label_key(key))?;
        sink.text(path, value)
    });
    let id = id?;
    Some(WorkloadSpec {
        name: name.unwrap_or_else(|| id.to_string()),
        id,
        image: image?,
        command,
        entrypoint,
        user,
        working_dir,
        volumes,
        environment,
        health_check,
        resources,
        pool,
        persist,
        tmpfs,
        read_only,
        cap_add,
        network,
        pull,
        ports,
        stop_signal,
        stop_grace_ms,
        activation,
        timeouts,
        labels,
    })
}

/// Puts a value through a rule.
fn checked<T, U>(
    sink: &Sink,
    path: &str,
    value: Option<T>,
    rule: impl FnOnce(T) -> Result<U, Refusal>,
) -> Option<U> {
    note(sink, path, rule(value?))
}

/// Reports a refusal.
fn note<T>(sink: &Sink, path: &str, result: Result<T, Refusal>) -> Option<T> {
    result.map_err(|refusal| sink.add(path, refusal.problem, refusal.allowed)).ok()
}

fn id(root: &Section<'_>, sink: &Sink) -> Option<WorkloadId> {
    checked(sink, "id", root.required_text("id"), |text| {
        WorkloadId::new(text.clone()).map_err(|_| Refusal {
            problem: format!("{} is no id", shown(&Value::String(text))),
            allowed: ID_PATTERN.to_owned(),
        })
    })
}

fn argv(section: &Section<'_>, sink: &Sink, name: &str, path: &str) -> Option<Vec<String>> {
    checked(sink, path, section.texts(name), |words| rules::argv(&words).map(|()| words))
}

fn volumes(root: &Section<'_>, sink: &Sink) -> Volumes {
    let section = root.section("volumes");
    let one = |name: &str| -> Option<Volume> {
        let volume = section.optional(name)?;
        let path = format!("volumes.{name}.container_path");
        let container_path = checked(sink, &path, volume.required_text("container_path"), rules::mount_point);
        let mode = if volume.choice("mode") == "ro" { VolumeMode::Ro } else { VolumeMode::Rw };
        Some(Volume { container_path: container_path?, mode })
    };
    let volumes = Volumes { state: one("state"), secrets: one("secrets"), comm: one("comm") };
    let mut taken: Vec<(&str, &str)> = rules::OWN_TMPFS.iter().map(|path| ("the tmpfs", *path)).collect();
    for (name, volume) in named(&volumes) {
        if let Some((who, other)) = overlap(&taken, &volume.container_path) {
            sink.add(
                format!("volumes.{name}.container_path"),
                format!("{:?} and {who} {other:?} lie in one another", volume.container_path),
                "paths of which none holds another",
            );
        }
        taken.push((name, &volume.container_path));
    }
    volumes
}

/// Returns the volumes that are there, with their names.
fn named(volumes: &Volumes) -> impl Iterator<Item = (&'static str, &Volume)> {
    [("state", &volumes.state), ("secrets", &volumes.secrets), ("comm", &volumes.comm)]
        .into_iter()
        .filter_map(|(name, volume)| volume.as_ref().map(|volume| (name, volume)))
}

fn overlap<'t>(taken: &[(&'t str, &'t str)], path: &str) -> Option<(&'t str, &'t str)> {
    taken.iter().copied().find(|(_, other)| rules::is_within(path, other) || rules::is_within(other, path))
}

fn environment(root: &Section<'_>, sink: &Sink) -> BTreeMap<String, String> {
    root.entries("environment", |path, key, value| {
        note(sink, path, rules::environment_name(key))?;
        sink.text(path, value)
    })
}

fn health_check(root: &Section<'_>, sink: &Sink) -> Option<HealthCheck> {
    let section = root.optional("health_check")?;
    if section.value("command").is_none() {
        section.missing("command");
    }
    let command = argv(&section, sink, "command", "health_check.command");
    let (interval_ms, timeout_ms) = (section.integer("interval_ms"), section.integer("timeout_ms"));
    let retries = u32::try_from(section.integer("retries")).unwrap_or(u32::MAX);
    Some(HealthCheck { command: command?, interval_ms, timeout_ms, retries })
}

fn resources(root: &Section<'_>, volumes: &Volumes) -> Resources {
    let section = root.section("resources");
    let state_max_mb = section.given_integer("state_max_mb");
    if state_max_mb.is_some() && volumes.state.is_none() {
        section.violate("state_max_mb", "there is no volume `state` to limit", "with volumes.state only");
    }
    Resources {
        cpus: section.number("cpus"),
        memory_mb: section.integer("memory_mb"),
        pids: section.integer("pids"),
        tmpfs_mb: section.integer("tmpfs_mb"),
        state_max_mb,
    }
}

/// Where only one of the two sizes is given, the other's default gives way to it.
fn pool(root: &Section<'_>, defaults: &SpecDefaults) -> PoolSizes {
    let section = root.section("pool");
    let size =
        |name: &str| section.given_integer(name).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
    let (min_idle, max) = (size("min_idle"), size("max"));
    let max = max.unwrap_or(defaults.max);
    if let Some(given) = min_idle
        && given > max
    {
        section.violate(
            "min_idle",
            format!("{given} is more than pool.max, which is {max}"),
            format!("0 to {max}"),
        );
    }
    PoolSizes { min_idle: min_idle.unwrap_or(defaults.min_idle.min(max)), max }
}

fn persist(root: &Section<'_>, sink: &Sink, volumes: &Volumes) -> Persist {
    if root.value("persist").is_some_and(|value| value.as_object().is_some_and(|map| !map.is_empty()))
        && volumes.state.is_none()
    {
        root.violate("persist", "there is no volume `state` to save", "with volumes.state only");
    }
    let section = root.section("persist");
    let every_ms = section.integer("every_ms");
    if (1..MIN_EVERY_MS).contains(&every_ms) {
        section.violate(
            "every_ms",
            format!("{every_ms} is too often"),
            format!("0 (none), or from {MIN_EVERY_MS}"),
        );
    }
    let exclude = section.texts("exclude").unwrap_or_default();
    for (index, glob) in exclude.iter().enumerate() {
        note(sink, &format!("persist.exclude[{index}]"), rules::exclude(glob));
    }
    Persist {
        on_release: section.flag("on_release"),
        every_ms,
        exclude,
        keep_last: u32::try_from(section.integer("keep_last")).unwrap_or(u32::MAX),
        keep_days: u32::try_from(section.integer("keep_days")).unwrap_or(u32::MAX),
        max_pause_ms: section.integer("max_pause_ms"),
        layout: match section.choice("layout") {
            "mirror" => Layout::Mirror,
            _ => Layout::Snapshot,
        },
    }
}

fn tmpfs(root: &Section<'_>, sink: &Sink, volumes: &Volumes) -> Vec<String> {
    let paths = root.texts("tmpfs").unwrap_or_default();
    let mut taken: Vec<(&str, &str)> =
        rules::OWN_TMPFS.iter().map(|path| ("the container's own tmpfs", *path)).collect();
    taken.extend(named(volumes).map(|(_, volume)| ("the volume", volume.container_path.as_str())));
    for (index, path) in paths.iter().enumerate() {
        let at = format!("tmpfs[{index}]");
        note(sink, &at, rules::mount_point(path.clone()));
        if let Some((who, other)) = overlap(&taken, path) {
            let problem = format!("{path:?} and {who} {other:?} lie in one another");
            sink.add(at, problem, "paths of which none holds another");
        }
        taken.push(("the tmpfs", path));
    }
    paths
}

fn cap_add(root: &Section<'_>, sink: &Sink) -> Vec<String> {
    let given = root.texts("cap_add").unwrap_or_default();
    let mut names: Vec<String> = given
        .iter()
        .enumerate()
        .filter_map(|(index, text)| note(sink, &format!("cap_add[{index}]"), rules::capability(text)))
        .collect();
    names.sort();
    names.dedup();
    names
}

fn network(root: &Section<'_>, sink: &Sink) -> Network {
    match root.text("network").as_deref() {
        None | Some("none") => Network::None,
        Some(name) => note(sink, "network", rules::network_name(name)).map_or(Network::None, Network::Named),
    }
}

fn activation(root: &Section<'_>, sink: &Sink) -> Activation {
    match root.value("activation") {
        None => Activation::None,
        Some(Value::String(text)) => match text.as_str() {
            "none" => Activation::None,
            "restart" => Activation::Restart,
            "exec" => {
                root.violate("activation", "\"exec\" does not say what to run", ACTIVATIONS);
                Activation::None
            }
            "signal" | "socket" | "start" => {
                root.violate("activation", format!("{text:?} is not supported yet"), ACTIVATIONS);
                Activation::None
            }
            _ => {
                root.violate("activation", format!("{text:?} is not known here"), ACTIVATIONS);
                Activation::None
            }
        },
        Some(Value::Object(map)) => {
            let Some(section) = root.optional("activation") else { return Activation::None };
            // A misspelt key has been reported; a second violation would only repeat it.
            if section.value("exec").is_none() && map.keys().all(|key| key == "exec") {
                root.violate("activation", "does not say what to run", ACTIVATIONS);
            }
            argv(&section, sink, "exec", "activation.exec").map_or(Activation::None, Activation::Exec)
        }
        Some(other) => {
            root.violate(
                "activation",
                format!("expected text or a map, found {}", shown(other)),
                ACTIVATIONS,
            );
            Activation::None
        }
    }
}

/// Refuses values that are designed and not built yet, in words that say so.
fn not_yet(root: &Section<'_>) {
    match root.value("runtime").and_then(Value::as_str) {
        Some("runsc") => root.violate("runtime", "\"runsc\" is not supported yet", "\"runc\""),
        _ => {
            root.choice("runtime");
        }
    }
    match root.value("claim_waits").and_then(Value::as_str) {
        Some("healthy") => root.violate(
            "claim_waits",
            "\"healthy\" is not supported yet: slots are healthy before they are claimed",
            "\"activated\"",
        ),
        _ => {
            root.choice("claim_waits");
        }
    }
    if root.value("park_ms").and_then(Value::as_u64).is_some_and(|ms| ms > 0) {
        root.violate("park_ms", "parking is not supported yet", "0");
    } else {
        root.integer("park_ms");
    }
    if !root.entries("schedules", |_, _, _| Some(())).is_empty() {
        root.violate("schedules", "schedules are not supported yet", "an empty map");
    }
    if root.texts("http_allow").is_some_and(|hosts| !hosts.is_empty()) {
        root.violate("http_allow", "`ctx.http` is not supported yet", "an empty list");
    }
}

#[cfg(test)]
mod tests;
