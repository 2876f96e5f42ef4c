//! The one table of a spec's fields: names, kinds, ranges, defaults, meaning.
//!
//! [`fn@super::parse`] reads its ranges and defaults from here and the reference
//! is written from here, so that they cannot drift apart.

use std::fmt;

/// One field of a spec.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FieldDoc {
    /// Where it is, e.g. `health_check.interval_ms`.
    pub path: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// As JSON; `required`; a variable's name; or empty, when leaving it out
    /// means what `doc` says.
    pub default: &'static str,
    /// What it is for.
    pub doc: &'static str,
}

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Text.
    Text,
    /// `true` or `false`.
    Flag,
    /// A whole number in a range.
    Integer {
        /// The least allowed.
        min: u64,
        /// The most allowed.
        max: u64,
    },
    /// A number in a range.
    Number {
        /// The least allowed.
        min: f64,
        /// The most allowed.
        max: f64,
    },
    /// One of these texts.
    Choice(&'static [&'static str]),
    /// A list of texts.
    Texts,
    /// A map with keys of the author's choice to what is named here.
    Map(&'static str),
    /// A map whose fields are listed in this table.
    Section,
}

const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// 16 TiB, in MiB.
const MAX_MB: u64 = 16 * 1024 * 1024;

const fn field(path: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> FieldDoc {
    FieldDoc { path, kind, default, doc }
}

const fn integer(
    path: &'static str,
    min: u64,
    max: u64,
    default: &'static str,
    doc: &'static str,
) -> FieldDoc {
    FieldDoc { path, kind: Kind::Integer { min, max }, default, doc }
}

/// Every field, in the order in which the reference shows them; a section
/// stands before its fields.
const FIELDS: &[FieldDoc] = &[
    field("id", Kind::Text, "required", "The workload's id; equals the name of its file."),
    field("name", Kind::Text, "", "A name for people; left out, the id."),
    field("image", Kind::Text, "required", "The image reference."),
    field("command", Kind::Texts, "", "Replaces the image's command."),
    field("entrypoint", Kind::Texts, "", "Replaces the image's entry point."),
    field("user", Kind::Text, "", "`user[:group]` by name or number; left out, the image's own."),
    field("working_dir", Kind::Text, "", "The working directory; left out, the image's own."),
    field("volumes", Kind::Section, "{}", "The slot's directories that are bound into the container."),
    field("volumes.state", Kind::Section, "", "The tenant's state: filled at claim, saved at release."),
    field("volumes.state.container_path", Kind::Text, "required", "Absolute path in the container."),
    field("volumes.state.mode", Kind::Choice(&["ro", "rw"]), "\"rw\"", "Whether the container may write."),
    field("volumes.secrets", Kind::Section, "", "The tenant's secrets, one file each."),
    field("volumes.secrets.container_path", Kind::Text, "required", "Absolute path in the container."),
    field("volumes.secrets.mode", Kind::Choice(&["ro", "rw"]), "\"ro\"", "Whether the container may write."),
    field("volumes.comm", Kind::Section, "", "For sockets between the host and the program."),
    field("volumes.comm.container_path", Kind::Text, "required", "Absolute path in the container."),
    field("volumes.comm.mode", Kind::Choice(&["ro", "rw"]), "\"rw\"", "Whether the container may write."),
    field("environment", Kind::Map("text"), "{}", "Environment of the container from its creation."),
    field("health_check", Kind::Section, "", "How readiness is tested; left out: ready when started."),
    field("health_check.command", Kind::Texts, "required", "Run in the container; status 0 is healthy."),
    integer("health_check.interval_ms", 100, DAY_MS, "30000", "Between two probes once ready."),
    integer("health_check.timeout_ms", 10, 600_000, "5000", "Of one probe."),
    integer("health_check.retries", 1, 100, "3", "Failures in a row that make a ready slot unhealthy."),
    field("resources", Kind::Section, "{}", "Limits of one container."),
    field("resources.cpus", Kind::Number { min: 0.01, max: 1024.0 }, "1.0", "Processors."),
    integer("resources.memory_mb", 6, MAX_MB, "512", "Memory and swap together, in MiB."),
    integer("resources.pids", 2, 4_194_304, "256", "Processes and threads."),
    integer("resources.tmpfs_mb", 1, MAX_MB, "64", "Size of each tmpfs, in MiB."),
    integer("resources.state_max_mb", 1, MAX_MB, "", "The most that is saved of the state, in MiB."),
    field("pool", Kind::Section, "{}", "Sizes of the warm pool."),
    integer("pool.min_idle", 0, 10_000, "BOILERHOUSE_POOL_SIZE", "Slots kept ready."),
    integer("pool.max", 1, 10_000, "BOILERHOUSE_MAX_CONTAINERS", "Containers of this workload at most."),
    field("persist", Kind::Section, "{}", "When and how state is saved."),
    field("persist.on_release", Kind::Flag, "true", "Save at release; else it goes with the slot."),
    integer("persist.every_ms", 0, 7 * DAY_MS, "0", "Between two saves while claimed, from 1000; 0: none."),
    field("persist.exclude", Kind::Texts, "[]", "Globs, relative to the state, of what is not saved."),
    integer("persist.keep_last", 1, 10_000, "10", "Snapshots kept."),
    integer(
        "persist.keep_days",
        0,
        3_650,
        "0",
        "Days for which every snapshot is kept; 0: `keep_last` decides.",
    ),
    integer("persist.max_pause_ms", 10, 600_000, "5000", "The longest pause of the container in a save."),
    field(
        "persist.layout",
        Kind::Choice(&["snapshot", "mirror"]),
        "\"snapshot\"",
        "`mirror`: one plain object a file in the store, and only the newest snapshot can be restored.",
    ),
    field("tmpfs", Kind::Texts, "[]", "Paths of further tmpfs mounts, beside /tmp and /run."),
    field("read_only", Kind::Flag, "true", "Whether the root file system is read-only."),
    field("cap_add", Kind::Texts, "[]", "Capabilities given back."),
    field("network", Kind::Text, "\"none\"", "`none`, or an existing network of the engine by name."),
    field("runtime", Kind::Choice(&["runc"]), "\"runc\"", "The engine's runtime."),
    field("pull", Kind::Choice(&["always", "missing", "never"]), "\"missing\"", "When the image is pulled."),
    field("ports", Kind::Map("port number"), "{}", "Named ports of the container."),
    field("stop_signal", Kind::Text, "", "Asks the program to end; left out, the image's own."),
    integer("stop_grace_ms", 0, 600_000, "10000", "How long it may take to end before it is killed."),
    field(
        "activation",
        Kind::Section,
        "\"none\"",
        "How the program learns that it is claimed: \"none\", \"restart\" or #{ exec: [argv] }.",
    ),
    field("activation.exec", Kind::Texts, "", "Run in the container, as its user, at activation."),
    field("claim_waits", Kind::Choice(&["activated"]), "\"activated\"", "What a claim's answer waits for."),
    integer("park_ms", 0, 0, "0", "How long a released slot is kept for its tenant."),
    field("schedules", Kind::Map("cron expression"), "{}", "Names and times of `on_schedule`."),
    field("http_allow", Kind::Texts, "[]", "Hosts that `ctx.http` may reach."),
    field(
        "timeouts",
        Kind::Map("milliseconds, 10 to 600000"),
        "{}",
        "Deadlines of hooks by the hook's name.",
    ),
    field("labels", Kind::Map("text"), "{}", "Labels put on the container."),
];

/// Returns every field of a spec.
pub fn fields() -> &'static [FieldDoc] {
    FIELDS
}

/// Returns the names of the fields directly below `parent` (empty: the spec itself).
pub(super) fn children(parent: &str) -> impl Iterator<Item = &'static str> + '_ {
    FIELDS.iter().filter_map(move |field| {
        let (above, name) = field.path.rsplit_once('.').unwrap_or(("", field.path));
        (above == parent).then_some(name)
    })
}

/// Returns the entry of `path`.
pub(super) fn lookup(path: &str) -> &'static FieldDoc {
    FIELDS
        .iter()
        .find(|field| field.path == path)
        .expect("the reader asks only for fields of the table, which its tests read in full")
}

// === impl Kind ===

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => f.write_str("text"),
            Self::Flag => f.write_str("true or false"),
            Self::Integer { min, max } if min == max => write!(f, "{min}"),
            Self::Integer { min, max } => write!(f, "a whole number from {min} to {max}"),
            Self::Number { min, max } => write!(f, "a number from {min} to {max}"),
            Self::Choice(choices) => {
                for (index, choice) in choices.iter().enumerate() {
                    let separator = if index == 0 { "" } else { ", " };
                    write!(f, "{separator}\"{choice}\"")?;
                }
                Ok(())
            }
            Self::Texts => f.write_str("a list of texts"),
            Self::Map(of) => write!(f, "a map of names to {of}"),
            Self::Section => f.write_str("a map"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_a_tree_with_defaults_that_parse() {
        for (index, field) in FIELDS.iter().enumerate() {
            assert!(!FIELDS[..index].iter().any(|other| other.path == field.path), "{} twice", field.path);
            if let Some((parent, _)) = field.path.rsplit_once('.') {
                assert!(matches!(lookup(parent).kind, Kind::Section), "{parent} is a section");
            }
            let special = field.default.is_empty()
                || field.default == "required"
                || field.default.starts_with("BOILER");
            if !special {
                serde_json::from_str::<serde_json::Value>(field.default)
                    .unwrap_or_else(|error| panic!("default of {}: {error}", field.path));
            }
            assert!(field.doc.ends_with('.'), "doc of {}", field.path);
        }
    }
}
