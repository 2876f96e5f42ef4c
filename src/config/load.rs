//! From environment and file to a configuration, or to all that is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use super::{
    Config, PREFIX, StoreLocation,
    error::{ConfigError, ConfigErrors, unknown},
    file,
    settings::{CONFIG_VARIABLE, Draft, Fallback, Kind, Setting, UNSUPPORTED, settings},
};

/// Variables of ours that the server does not read: those of the client commands.
const CLIENT_VARIABLES: [&str; 2] = ["BOILERHOUSE_URL", "BOILERHOUSE_TOKEN"];

/// Arms a crash point in builds that have them.
const CRASH_POINT_VARIABLE: &str = "BOILERHOUSE_CRASH_POINT";

/// Values are shown in errors up to this many characters.
const SHOWN_CHARS: usize = 80;

struct Loader {
    draft: Draft,
    errors: Vec<ConfigError>,
    /// Keys whose value could not be read: rules about them are not applied.
    failed: BTreeSet<&'static str>,
}

pub(super) fn load(environment: impl Iterator<Item = (OsString, OsString)>) -> Result<Config, ConfigErrors> {
    let mut loader = Loader { draft: Draft::new(), errors: Vec::new(), failed: BTreeSet::new() };
    let variables = loader.variables(environment);
    let entries = match variables.get(CONFIG_VARIABLE) {
        Some(path) => file::read(Path::new(path), &mut loader.errors),
        None => Vec::new(),
    };
    for setting in settings().iter().filter(|setting| !setting.key.is_empty()) {
        if let Fallback::Value(text) = setting.default {
            loader.apply(setting, text, "default");
        }
        if let Some(entry) = entries.iter().find(|entry| entry.key == setting.key) {
            loader.apply(setting, &entry.text, &format!("{}: {}", entry.place, entry.key));
            loader.draft.config.origins.0.insert(setting.key, entry.place.clone());
        }
        // The one that wins is applied last; the others must be sound as well.
        for variable in setting.variables().rev() {
            if let Some(text) = variables.get(variable) {
                loader.apply(setting, text, variable);
                loader.draft.config.origins.0.insert(setting.key, variable.to_owned());
            }
        }
    }
    #[cfg(feature = "crash_points")]
    loader.crash_point(&variables);
    loader.rules();
    if loader.errors.is_empty() { Ok(loader.draft.config) } else { Err(ConfigErrors(loader.errors)) }
}

/// Checks the names of the variables only, for commands that need no configuration.
pub(super) fn check_names(
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<(), ConfigErrors> {
    let mut loader = Loader { draft: Draft::new(), errors: Vec::new(), failed: BTreeSet::new() };
    loader.variables(environment);
    if loader.errors.is_empty() { Ok(()) } else { Err(ConfigErrors(loader.errors)) }
}

// === impl Loader ===

impl Loader {
    fn wrong(&mut self, source: impl Into<String>, problem: impl Into<String>) {
        self.errors.push(ConfigError { source: source.into(), problem: problem.into() });
    }

    /// Picks the variables that settings are made of and reports unknown ones of ours.
    fn variables(
        &mut self,
        environment: impl Iterator<Item = (OsString, OsString)>,
    ) -> BTreeMap<String, String> {
        let mut variables = BTreeMap::new();
        // Sorted, so that errors come in the same order whatever the environment's.
        let environment: BTreeMap<OsString, OsString> = environment.collect();
        for (name, value) in environment {
            let name = name.to_string_lossy().into_owned();
            let known =
                settings().iter().find(|setting| setting.variables().any(|variable| variable == name));
            let wanted = known.is_some() || (cfg!(feature = "crash_points") && name == CRASH_POINT_VARIABLE);
            if !wanted {
                if name.starts_with(PREFIX) && !is_elsewhere(&name) {
                    let problem = not_known(&name);
                    self.wrong(name, problem);
                }
                continue;
            }
            let ours = known.is_none_or(Setting::is_ours);
            match value.into_string() {
                // Tools that share these variables take an empty one as not set.
                Ok(value) if value.is_empty() && !ours => {}
                Ok(value) if value.is_empty() => self.wrong(name, "is empty; unset it for the default"),
                Ok(value) => drop(variables.insert(name, value)),
                Err(_) => self.wrong(name, "is no UTF-8"),
            }
        }
        variables
    }

    fn apply(&mut self, setting: &'static Setting, text: &str, source: &str) {
        let result =
            if text.is_empty() { Err("is empty".to_owned()) } else { (setting.apply)(&mut self.draft, text) };
        if let Err(problem) = result {
            self.failed.insert(setting.key);
            self.wrong(source, format!("{}{problem}", shown(setting, text)));
        }
    }

    #[cfg(feature = "crash_points")]
    fn crash_point(&mut self, variables: &BTreeMap<String, String>) {
        let Some(text) = variables.get(CRASH_POINT_VARIABLE) else { return };
        let (name, nth) = text.split_once(':').unwrap_or((text, "1"));
        match nth.parse() {
            Ok(nth) if nth > 0 && !name.is_empty() => {
                self.draft.config.crash_point = Some((name.to_owned(), nth));
            }
            _ => self.wrong(
                CRASH_POINT_VARIABLE,
                format!("{text:?} is no crash point; allowed: name or name:nth, nth from 1"),
            ),
        }
    }

    /// What settings must be together.
    fn rules(&mut self) {
        self.host_rule();
        self.directories_rule();
        self.credentials_rule();
        self.encryption_rule();
    }

    /// State is never left plain because the key was forgotten.
    fn encryption_rule(&mut self) {
        let has_key = self.draft.config.master_key_file.is_some() || self.failed.contains("master_key_file");
        if self.draft.config.state_encryption && !has_key {
            let source = self.source_of("state_encryption");
            self.wrong(
                source,
                "on needs a master key; set BOILERHOUSE_MASTER_KEY_FILE; allowed without: off".to_owned(),
            );
        }
    }

    /// Without tokens anyone who reaches the port could claim any tenant.
    fn host_rule(&mut self) {
        let tokens = self.draft.config.api_tokens_file.is_some() || self.failed.contains("api_tokens_file");
        self.draft.config.api_host = match self.draft.api_host {
            Some(host) if !tokens && !host.to_canonical().is_loopback() => {
                let source = self.source_of("api_host");
                self.wrong(
                    source,
                    format!(
                        "{host} is reachable from other machines, and without API tokens anyone there could \
                         claim any tenant; set BOILERHOUSE_API_TOKENS_FILE; allowed without: 127.0.0.1, ::1"
                    ),
                );
                host
            }
            Some(host) => host,
            None if tokens => Ipv4Addr::UNSPECIFIED.into(),
            None => Ipv4Addr::LOCALHOST.into(),
        };
    }

    fn directories_rule(&mut self) {
        let config = &self.draft.config;
        let mut directories = vec![
            ("state_dir", resolved(&config.state_dir)),
            ("secrets_dir", resolved(&config.secrets_dir)),
            ("socket_dir", resolved(&config.socket_dir)),
        ];
        if let StoreLocation::Directory(path) = &config.store {
            directories.push(("store", resolved(path)));
        }
        directories.retain(|(key, _)| !self.failed.contains(key));
        for (at, (key, path)) in directories.iter().enumerate() {
            for (other_key, other) in &directories[..at] {
                let nested = path.starts_with(other) || other.starts_with(path);
                let problem = if path == other {
                    format!("is the same directory as {other_key}, {}", path.display())
                } else if *key == "store" && nested {
                    format!(
                        "{} and {other_key} {} lie in one another; snapshots must lie outside what they are \
                         taken of, or both are lost together",
                        path.display(),
                        other.display()
                    )
                } else {
                    continue;
                };
                let source = self.source_of(key);
                self.wrong(source, problem);
            }
        }
    }

    fn credentials_rule(&mut self) {
        let config = &self.draft.config;
        if !matches!(config.store, StoreLocation::S3 { .. }) || self.failed.contains("store") {
            return;
        }
        let id = config.aws.access_key_id.is_some() || self.failed.contains("aws.access_key_id");
        let secret = config.aws.secret_access_key.is_some() || self.failed.contains("aws.secret_access_key");
        let aws = &config.aws;
        let is_elsewhere = aws.shared_credentials_file.is_some()
            || aws.config_file.is_some()
            || aws.container_relative_uri.is_some()
            || aws.container_full_uri.is_some()
            || aws.metadata_endpoint.is_some();
        let missing = match (id, secret) {
            (true, true) => return,
            (false, false) if is_elsewhere => return,
            (true, false) => "AWS_SECRET_ACCESS_KEY is",
            (false, true) => "AWS_ACCESS_KEY_ID is",
            (false, false) => "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are",
        };
        let source = self.source_of("store");
        self.wrong(source, format!("is on an S3 server, and {missing} not set"));
    }

    /// Names where a key's value came from, for an error about it.
    fn source_of(&self, key: &str) -> String {
        match self.draft.config.origins.0.get(key) {
            Some(origin) if origin.contains(':') => format!("{origin}: {key}"),
            Some(variable) => variable.clone(),
            None => settings()
                .iter()
                .find(|setting| setting.key == key)
                .map_or_else(|| key.to_owned(), |setting| format!("{} (default)", setting.variable)),
        }
    }
}

/// Tells whether a variable with our prefix is meant for somebody else: for the
/// client commands, or made by Kubernetes for a service named `boilerhouse`.
fn is_elsewhere(name: &str) -> bool {
    let rest = name.strip_prefix(PREFIX).unwrap_or(name);
    CLIENT_VARIABLES.contains(&name)
        || rest == "SERVICE_HOST"
        || rest == "PORT"
        || rest.starts_with("SERVICE_PORT")
        || rest.starts_with("PORT_")
}

fn not_known(name: &str) -> String {
    if let Some((_, _, why)) = UNSUPPORTED.iter().find(|(variable, _, _)| *variable == name) {
        return (*why).to_owned();
    }
    if name == CRASH_POINT_VARIABLE {
        return "is only for builds with the feature crash_points".to_owned();
    }
    let known = settings().iter().filter(|setting| setting.is_ours()).map(|setting| setting.variable);
    unknown("variable", name, known.chain(CLIENT_VARIABLES))
}

/// Shows a value at the head of an error, unless it is or may hold a secret.
fn shown(setting: &Setting, text: &str) -> String {
    if setting.kind == Kind::Secret || (text.contains('@') && text.contains("://")) {
        return "the value ".to_owned();
    }
    let mut cut: String = text.chars().take(SHOWN_CHARS).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("{cut:?} ")
}

/// Returns the path with the symbolic links of its existing part followed and
/// `..` taken out, so that two names of one directory compare equal.
pub(super) fn resolved(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(mut real) = ancestor.canonicalize() {
            for part in path.strip_prefix(ancestor).unwrap_or(Path::new("")).components() {
                match part {
                    std::path::Component::ParentDir => drop(real.pop()),
                    part => real.push(part),
                }
            }
            return real;
        }
    }
    path.to_owned()
}
