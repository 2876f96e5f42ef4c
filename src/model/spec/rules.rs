//! What single values of a spec must look like, as pure functions.
//!
//! Each returns the value in its normal form, or a [`Refusal`] in words.

use crate::model::suggest::closest;

/// Why a value is refused, and what is allowed instead.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) problem: String,
    pub(super) allowed: String,
}

type Checked<T> = Result<T, Refusal>;

/// The hooks that scripts may have, by name.
pub const HOOKS: &[&str] = &["before_claim", "on_claim", "before_release", "after_release"];

/// The hooks that are designed and not built yet.
pub const LATER_HOOKS: &[&str] =
    &["choose_slot", "on_warm", "on_active", "on_idle", "on_health", "on_exit", "on_schedule", "scale"];

/// The tmpfs mounts that every container has.
pub(super) const OWN_TMPFS: &[&str] = &["/tmp", "/run"];

/// The prefix of labels that are ours.
pub(super) const OWN_LABELS: &str = "boilerhouse.";

/// Below these, every path belongs to the kernel or the engine.
const KERNEL_PATHS: &[&str] = &["/proc", "/sys", "/dev"];
/// Mounting over one of these hides the image's own.
const IMAGE_PATHS: &[&str] =
    &["/bin", "/boot", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/sbin", "/usr", "/var"];
/// The engine binds these files itself.
const ENGINE_PATHS: &[&str] = &["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// Linux capabilities, from `capabilities(7)`.
const CAPABILITIES: &[&str] = &[
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// Capabilities with which a container can reach its host or its peers.
pub(super) const DANGEROUS_CAPABILITIES: &[&str] = &[
    "BPF",
    "CHECKPOINT_RESTORE",
    "DAC_READ_SEARCH",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "PERFMON",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_MODULE",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_TIME",
];

/// Signals that may ask a program to end, from `signal(7)`.
const SIGNALS: &[&str] = &[
    "SIGABRT",
    "SIGALRM",
    "SIGHUP",
    "SIGINT",
    "SIGIO",
    "SIGKILL",
    "SIGPIPE",
    "SIGPROF",
    "SIGPWR",
    "SIGQUIT",
    "SIGSYS",
    "SIGTERM",
    "SIGTRAP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGUSR1",
    "SIGUSR2",
    "SIGVTALRM",
    "SIGWINCH",
    "SIGXCPU",
    "SIGXFSZ",
];
/// Real-time signals are `SIGRTMIN` and `SIGRTMIN+1` to `SIGRTMIN+30`.
const MAX_RTMIN: u8 = 30;

fn refuse<T>(problem: impl Into<String>, allowed: impl Into<String>) -> Checked<T> {
    Err(Refusal { problem: problem.into(), allowed: allowed.into() })
}

/// Checks text that people see: one line, not empty.
pub(super) fn title(text: String) -> Checked<String> {
    if text.trim().is_empty() || text.chars().count() > 128 || text.chars().any(char::is_control) {
        return refuse("is no title", "1 to 128 characters on one line");
    }
    Ok(text)
}

/// Checks an image reference, as `docker pull` would take it.
///
/// The grammar is that of <https://pkg.go.dev/github.com/distribution/reference>.
pub(super) fn image(text: String) -> Checked<String> {
    const ALLOWED: &str = "[registry/]name[:tag][@sha256:digest]";
    if text.is_empty() {
        return refuse("is empty", ALLOWED);
    }
    if text.len() > 512 {
        return refuse(format!("is {} bytes long", text.len()), "at most 512 bytes");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text.as_str(), None),
    };
    let digest_is_fine = digest.is_none_or(|digest| {
        digest.strip_prefix("sha256:").is_some_and(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })
    });
    if !digest_is_fine {
        return refuse(
            format!("{text:?} has a malformed digest"),
            "@sha256: and 64 lower-case hexadecimal digits",
        );
    }
    // A colon after the last slash begins the tag; one before it, the registry's port.
    let last_slash = rest.rfind('/').map_or(0, |index| index + 1);
    let (name, tag) = match rest[last_slash..].split_once(':') {
        Some((last, tag)) => (&rest[..last_slash + last.len()], Some(tag)),
        None => (rest, None),
    };
    let tag_is_fine = tag.is_none_or(|tag| {
        (1..=128).contains(&tag.len())
            && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && tag.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
    });
    if !tag_is_fine {
        return refuse(format!("{text:?} has a malformed tag"), "letters, digits, _ . -, at most 128");
    }
    let mut parts: Vec<_> = name.split('/').collect();
    let first_is_registry = parts.len() > 1
        && (parts[0].contains(['.', ':']) || parts[0] == "localhost" || parts[0] != parts[0].to_lowercase());
    if first_is_registry {
        let registry = parts.remove(0);
        let (host, port) = registry.split_once(':').unwrap_or((registry, "1"));
        let host_is_fine = !host.is_empty()
            && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'))
            && host.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !host_is_fine || port.parse::<u16>().is_err() {
            return refuse(format!("{text:?} has a malformed registry"), ALLOWED);
        }
    }
    if parts.iter().any(|part| part.chars().any(char::is_uppercase)) {
        return refuse(format!("{text:?} has an upper-case name"), "a lower-case name");
    }
    if !parts.iter().all(|part| is_name_part(part)) {
        return refuse(format!("{text:?} is no image reference"), ALLOWED);
    }
    Ok(text)
}

fn is_name_part(part: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    edge(part.chars().next())
        && edge(part.chars().last())
        && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-'))
}

/// Checks `user[:group]`.
pub(super) fn user(text: String) -> Checked<String> {
    let is_part = |part: &str| {
        (1..=64).contains(&part.len())
            && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
            && (!part.starts_with(|c: char| c.is_ascii_digit())
                || part.parse::<u32>().is_ok_and(|id| id < u32::MAX))
    };
    let fine = match text.split_once(':') {
        Some((user, group)) => is_part(user) && is_part(group),
        None => is_part(&text),
    };
    if fine { Ok(text) } else { refuse(format!("{text:?} is no user"), "user[:group], by name or number") }
}

/// Checks that a path is absolute and normalised.
pub(super) fn absolute(text: String) -> Checked<String> {
    const ALLOWED: &str = "an absolute path without ., .., // or a slash at its end";
    if !text.starts_with('/') {
        return refuse(format!("{text:?} is not absolute"), ALLOWED);
    }
    if text.len() > 1024 || text.chars().any(char::is_control) {
        return refuse("is too long or holds control characters", "at most 1024 printable characters");
    }
    if text != "/" && text[1..].split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return refuse(format!("{text:?} is not normalised"), ALLOWED);
    }
    if text.contains([':', ',']) {
        return refuse(format!("{text:?} holds a character that mounts use"), "a path without `:` and `,`");
    }
    Ok(text)
}

/// Checks a path at which something is mounted.
pub(super) fn mount_point(text: String) -> Checked<String> {
    let path = absolute(text)?;
    if path == "/" {
        return refuse("\"/\" would hide the whole image", "a directory below /");
    }
    if let Some(kernel) = KERNEL_PATHS.iter().find(|kernel| is_within(&path, kernel)) {
        return refuse(format!("{path:?} lies in {kernel}, which is the kernel's"), "another directory");
    }
    if IMAGE_PATHS.contains(&path.as_str()) || ENGINE_PATHS.contains(&path.as_str()) {
        return refuse(format!("{path:?} would hide the image's own"), "another directory, also below it");
    }
    Ok(path)
}

/// Returns whether `path` is `parent` or below it.
pub(super) fn is_within(path: &str, parent: &str) -> bool {
    path.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Checks the name of an environment variable.
pub(super) fn environment_name(name: &str) -> Checked<()> {
    if name.is_empty() || name.contains(['=', '\0']) || name.chars().any(char::is_whitespace) {
        return refuse(format!("{name:?} is no variable name"), "a name without =, spaces and zero bytes");
    }
    Ok(())
}

/// Checks the key of a label.
pub(super) fn label_key(key: &str) -> Checked<()> {
    if key.is_empty()
        || key.len() > 128
        || key.chars().any(|c| c.is_control() || c.is_whitespace() || c == '=')
    {
        return refuse(format!("{key:?} is no label"), "1 to 128 characters without spaces and =");
    }
    if key.to_ascii_lowercase().starts_with(OWN_LABELS) {
        return refuse(
            format!("labels that begin with {OWN_LABELS:?} are the server's"),
            "a label of another prefix",
        );
    }
    Ok(())
}

/// Checks the name of a port.
pub(super) fn port_name(name: &str) -> Checked<()> {
    let fine = (1..=32).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-'));
    if fine { Ok(()) } else { refuse(format!("{name:?} is no port name"), "^[a-z][a-z0-9_-]{0,31}$") }
}

/// Normalises a capability: upper case, without `CAP_`.
pub(super) fn capability(text: &str) -> Checked<String> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if CAPABILITIES.contains(&name) {
        return Ok(name.to_owned());
    }
    if name == "ALL" {
        return refuse("\"ALL\" gives a container the host", "the capabilities it needs, one by one");
    }
    let hint = closest(name, CAPABILITIES.iter().copied())
        .map_or_else(String::new, |near| format!("; did you mean \"{near}\"?"));
    refuse(format!("{text:?} is no capability{hint}"), "a name of capabilities(7)")
}

/// Normalises a signal: upper case, with `SIG`.
pub(super) fn signal(text: &str) -> Checked<String> {
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let real_time = name.strip_prefix("SIGRTMIN").is_some_and(|rest| {
        rest.is_empty()
            || rest
                .strip_prefix('+')
                .and_then(|n| n.parse().ok())
                .is_some_and(|n: u8| (1..=MAX_RTMIN).contains(&n))
    });
    if real_time || SIGNALS.contains(&name.as_str()) {
        return Ok(name);
    }
    if name == "SIGSTOP" || name == "SIGTSTP" || name == "SIGCONT" || name == "SIGCHLD" {
        return refuse(format!("{name} does not end a program"), "a signal that does, e.g. \"SIGTERM\"");
    }
    let hint = closest(&name, SIGNALS.iter().copied())
        .map_or_else(String::new, |near| format!("; did you mean \"{near}\"?"));
    refuse(format!("{text:?} is no signal{hint}"), "a name of signal(7), e.g. \"SIGTERM\"")
}

/// Checks the name of a network. `none` is not for this function.
pub(super) fn network_name(text: &str) -> Checked<String> {
    const ALLOWED: &str = "none, or the name of an existing network of the engine";
    if text == "host" || text.starts_with("container:") || text.starts_with("ns:") {
        return refuse(format!("{text:?} would share another network with the tenant's code"), ALLOWED);
    }
    if text == "isolated" {
        return refuse("\"isolated\" is not supported yet", ALLOWED);
    }
    if text == "default" {
        return refuse("\"default\" does not say which network", ALLOWED);
    }
    let fine = (1..=128).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
    if fine { Ok(text.to_owned()) } else { refuse(format!("{text:?} is no network name"), ALLOWED) }
}

/// Checks a glob of what is not saved.
pub(super) fn exclude(text: &str) -> Checked<()> {
    const ALLOWED: &str = "a glob relative to the state directory, e.g. \"cache/**\"";
    if text.is_empty() || text.len() > 1024 {
        return refuse("is empty or longer than 1024 bytes", ALLOWED);
    }
    if text.starts_with('/') || text.split('/').any(|part| part == ".." || part == ".") {
        return refuse(format!("{text:?} leads outside the state directory"), ALLOWED);
    }
    Ok(())
}

/// Checks that a name is a hook's.
pub(super) fn hook_name(name: &str) -> Checked<()> {
    if HOOKS.contains(&name) {
        return Ok(());
    }
    if LATER_HOOKS.contains(&name) {
        return refuse(format!("the hook `{name}` is not supported yet"), HOOKS.join(", "));
    }
    let hint = closest(name, HOOKS.iter().copied())
        .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
    refuse(format!("`{name}` is no hook{hint}"), HOOKS.join(", "))
}

/// Checks an argument vector: somebody to run, and nothing left of Docker's own forms.
pub(super) fn argv(words: &[String]) -> Checked<()> {
    match words.first().map(String::as_str) {
        None => {
            refuse("is an empty list", "a program and its arguments; leave the field out for the image's own")
        }
        Some("") => refuse("has an empty program", "a program and its arguments"),
        Some("CMD" | "CMD-SHELL" | "NONE") => refuse(
            format!("begins with {:?}, which is a Dockerfile's word", words[0]),
            "the program and its arguments, e.g. [\"sh\", \"-c\", \"…\"]",
        ),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_checked() {
        let digest = format!("alpine@sha256:{}", "a".repeat(64));
        for good in [
            "alpine",
            "alpine:latest",
            "redis:7-alpine",
            "myregistry/my-worker:latest",
            "localhost:5000/a/b:1",
            "ghcr.io/Owner".to_lowercase().as_str(),
            "registry.example.com/team/app_x:v1.2.3",
            &digest,
        ] {
            assert!(image(good.to_owned()).is_ok(), "{good}");
        }
        for bad in [
            "",
            " alpine",
            "Alpine",
            "-alpine",
            "alpine:",
            "alpine:a b",
            "a//b",
            "/a",
            "a/",
            "alpine@sha256:12",
            "ho st/a",
            "host:port/a",
            "a\n",
        ] {
            assert!(image(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn mount_points_are_checked() {
        for good in ["/data", "/var/lib/app", "/etc/app", "/usr/share/nginx/html", "/home/app", "/developer"]
        {
            assert!(mount_point(good.to_owned()).is_ok(), "{good}");
        }
        for bad in [
            "",
            "data",
            "/",
            "/data/",
            "/a//b",
            "/a/../b",
            "/a/./b",
            "/proc",
            "/proc/x",
            "/sys/fs",
            "/dev/shm",
            "/etc",
            "/usr",
            "/etc/hosts",
            "/a:b",
            "/a\n",
        ] {
            assert!(mount_point(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn signals_and_capabilities_have_one_form() {
        assert_eq!(signal("term").unwrap(), "SIGTERM");
        assert_eq!(signal("SIGRTMIN+3").unwrap(), "SIGRTMIN+3");
        for bad in ["", "SIGSTOP", "15", "SIGRTMIN+31", "SIGNOPE"] {
            assert!(signal(bad).is_err(), "{bad}");
        }
        assert_eq!(capability("cap_chown").unwrap(), "CHOWN");
        for bad in ["", "ALL", "CHWON", "CAP_"] {
            assert!(capability(bad).is_err(), "{bad}");
        }
        assert!(capability("CHWON").unwrap_err().problem.contains("CHOWN"));
    }

    #[test]
    fn users_are_checked() {
        for good in ["root", "1000", "1000:1000", "www-data:www-data", "_apt"] {
            assert!(user(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", ":", "a:", ":b", "a b", "a:b:c", "4294967295", "-1", "1x"] {
            assert!(user(bad.to_owned()).is_err(), "{bad:?}");
        }
    }
}
