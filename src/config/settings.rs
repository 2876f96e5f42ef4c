//! The one table of settings: from it values are parsed, printed and documented.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use super::{Aws, Config, Origins, StoreLocation, values};
use crate::model::Secret;

/// What holds when a setting is not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// This value.
    Value(&'static str),
    /// What these words say.
    Words(&'static str),
}

/// How a setting is written in a RON file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A whole number.
    Number,
    /// `true` or `false`.
    Truth,
    /// Text in quotes.
    Text,
    /// Text in quotes that is never shown.
    Secret,
}

/// One setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The variable that gives it.
    pub variable: &'static str,
    /// Other variables that give it when `variable` does not, the first one first.
    pub alternatives: &'static [&'static str],
    /// Its key in the RON file, with a dot where it is nested; empty: only a variable.
    pub key: &'static str,
    /// What holds when it is not given.
    pub default: Fallback,
    /// What it is, for people: one line.
    pub doc: &'static str,
    /// How it is written in a RON file.
    pub kind: Kind,
    /// Reads a value into the draft; else says what is wrong and what is allowed.
    pub(super) apply: fn(&mut Draft, &str) -> Result<(), String>,
    /// Gives the value in force as text, unless there is none.
    pub(super) show: fn(&Config) -> Option<String>,
}

/// A configuration in the making.
pub(super) struct Draft {
    pub(super) config: Config,
    /// `api_host` as given; what it is otherwise depends on the tokens.
    pub(super) api_host: Option<IpAddr>,
}

/// Names the variable that gives the path of the RON file.
pub(super) const CONFIG_VARIABLE: &str = "BOILERHOUSE_CONFIG";

/// Settings that are refused by name: variable, key, why.
pub(super) const UNSUPPORTED: &[(&str, &str, &str)] =
    &[("BOILERHOUSE_GATEWAY_PORT", "gateway_port", "is not supported yet: this version has no gateway")];

/// Returns every setting, in the order in which they are documented and printed.
pub fn settings() -> &'static [Setting] {
    SETTINGS
}

const SETTINGS: &[Setting] = &[
    Setting {
        variable: CONFIG_VARIABLE,
        alternatives: &[],
        key: "",
        default: Fallback::Words("no file"),
        doc: "A RON file with the settings below; the environment wins",
        kind: Kind::Text,
        apply: |_, _| Ok(()),
        show: |_| None,
    },
    Setting {
        variable: "BOILERHOUSE_API_PORT",
        alternatives: &[],
        key: "api_port",
        default: Fallback::Value("3000"),
        doc: "API server port; 0 takes any free one and prints it",
        kind: Kind::Number,
        apply: |draft, text| set(&mut draft.config.api_port, values::port(text)),
        show: |config| Some(config.api_port.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_API_HOST",
        alternatives: &[],
        key: "api_host",
        default: Fallback::Words("`0.0.0.0` with an API tokens file, `127.0.0.1` without"),
        doc: "API server host; other than loopback needs an API tokens file",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.api_host, values::host(text).map(Some)),
        show: |config| Some(config.api_host.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_POOL_SIZE",
        alternatives: &[],
        key: "pool_size",
        default: Fallback::Value("5"),
        doc: "Pre-warmed containers of a workload that has no `pool.min_idle`",
        kind: Kind::Number,
        apply: |draft, text| set(&mut draft.config.pool_size, values::count(text, 0)),
        show: |config| Some(config.pool_size.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_MAX_CONTAINERS",
        alternatives: &[],
        key: "max_containers",
        default: Fallback::Value("50"),
        doc: "Max containers per node",
        kind: Kind::Number,
        apply: |draft, text| set(&mut draft.config.max_containers, values::count(text, 1)),
        show: |config| Some(config.max_containers.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_IDLE_TIMEOUT_MS",
        alternatives: &[],
        key: "idle_timeout_ms",
        default: Fallback::Value("300000"),
        doc: "Milliseconds without activity after which a claim is released, its state saved; 0: never",
        kind: Kind::Number,
        apply: |draft, text| set(&mut draft.config.idle_timeout_ms, values::wait_ms(text)),
        show: |config| Some(config.idle_timeout_ms.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_STATE_DIR",
        alternatives: &[],
        key: "state_dir",
        default: Fallback::Value("/var/lib/boilerhouse/states"),
        doc: "Base dir for tenant state: slots, cache and journal, all on one file system",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.state_dir, values::path(text)),
        show: |config| shown_path(&config.state_dir),
    },
    Setting {
        variable: "BOILERHOUSE_SECRETS_DIR",
        alternatives: &[],
        key: "secrets_dir",
        default: Fallback::Value("/var/lib/boilerhouse/secrets"),
        doc: "Base dir for tenant secrets; should be a tmpfs",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.secrets_dir, values::path(text)),
        show: |config| shown_path(&config.secrets_dir),
    },
    Setting {
        variable: "BOILERHOUSE_SOCKET_DIR",
        alternatives: &[],
        key: "socket_dir",
        default: Fallback::Value("/var/run/boilerhouse"),
        doc: "Base dir for Unix sockets",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.socket_dir, values::path(text)),
        show: |config| shown_path(&config.socket_dir),
    },
    Setting {
        variable: "BOILERHOUSE_DEFAULT_IMAGE",
        alternatives: &[],
        key: "default_image",
        default: Fallback::Value("alpine:latest"),
        doc: "Image of the built-in workload that there is when no workload file is",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.default_image, values::image(text)),
        show: |config| Some(config.default_image.clone()),
    },
    Setting {
        variable: "BOILERHOUSE_STORE",
        alternatives: &[],
        key: "store",
        default: Fallback::Value("file:///var/lib/boilerhouse/store"),
        doc: "Where snapshots live: `s3://bucket/prefix` or `file:///path`, outside the other directories",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.store, values::store(text)),
        show: |config| Some(config.store.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_STORE_SHARED",
        alternatives: &[],
        key: "store_shared",
        default: Fallback::Value("false"),
        doc: "Whether several servers use the store; every claim is then written to it: `true` or `false`",
        kind: Kind::Truth,
        apply: |draft, text| set(&mut draft.config.store_shared, values::truth(text)),
        show: |config| Some(config.store_shared.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_CACHE_MAX_MB",
        alternatives: &[],
        key: "cache_max_mb",
        default: Fallback::Value("0"),
        doc: "MiB that state of tenants who are not claimed may take here; 0: what the disk has room for",
        kind: Kind::Number,
        apply: |draft, text| set(&mut draft.config.cache_max_mb, values::megabytes(text)),
        show: |config| Some(config.cache_max_mb.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_CACHE_MIN_FREE_MB",
        alternatives: &[],
        key: "cache_min_free_mb",
        default: Fallback::Value("1024"),
        doc: "MiB of the disk that such state gives way to; 0: none",
        kind: Kind::Number,
        apply: |draft, text| set(&mut draft.config.cache_min_free_mb, values::megabytes(text)),
        show: |config| Some(config.cache_min_free_mb.to_string()),
    },
    Setting {
        variable: "BOILERHOUSE_WORKLOADS_DIR",
        alternatives: &[],
        key: "workloads_dir",
        default: Fallback::Value("workloads"),
        doc: "Workload scripts, `<id>.rhai`",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.workloads_dir, values::path(text)),
        show: |config| shown_path(&config.workloads_dir),
    },
    Setting {
        variable: "BOILERHOUSE_SCRIPTS_DIR",
        alternatives: &[],
        key: "scripts_dir",
        default: Fallback::Value("scripts"),
        doc: "Modules that workload scripts import",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.scripts_dir, values::path(text)),
        show: |config| shown_path(&config.scripts_dir),
    },
    Setting {
        variable: "BOILERHOUSE_API_TOKENS_FILE",
        alternatives: &[],
        key: "api_tokens_file",
        default: Fallback::Words("no authentication, on loopback only"),
        doc: "Hashed bearer tokens with their scopes",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.api_tokens_file, values::path(text).map(Some)),
        show: |config| config.api_tokens_file.as_deref().and_then(shown_path),
    },
    Setting {
        variable: "BOILERHOUSE_MASTER_KEY_FILE",
        alternatives: &[],
        key: "master_key_file",
        default: Fallback::Words("stored secrets are refused"),
        doc: "Key that stored secrets are sealed with: 32 bytes, raw, hexadecimal or base64; mode 0600",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.master_key_file, values::path(text).map(Some)),
        show: |config| config.master_key_file.as_deref().and_then(shown_path),
    },
    Setting {
        variable: "BOILERHOUSE_STATE_ENCRYPTION",
        alternatives: &[],
        key: "state_encryption",
        default: Fallback::Value("off"),
        doc: "Whether state in the store is sealed with the master key: `off` or `on`",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.state_encryption, values::switch(text)),
        show: |config| Some(if config.state_encryption { "on" } else { "off" }.to_owned()),
    },
    Setting {
        variable: "BOILERHOUSE_INSTANCE",
        alternatives: &[],
        key: "instance",
        default: Fallback::Words("derived from the machine and the state directory"),
        doc: "Identity of this installation, which its containers carry as a label",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.instance, values::instance(text).map(Some)),
        show: |config| config.instance.clone(),
    },
    Setting {
        variable: "DOCKER_HOST",
        alternatives: &[],
        key: "docker_host",
        default: Fallback::Words("the local socket"),
        doc: "Docker engine: `unix:///path` or `tcp://host:port`",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.docker_host, values::docker_host(text).map(Some)),
        show: |config| config.docker_host.clone(),
    },
    Setting {
        variable: "AWS_ACCESS_KEY_ID",
        alternatives: &[],
        key: "aws.access_key_id",
        default: Fallback::Words("none; an `s3://` store needs it, or another source"),
        doc: "Access key of the S3 server",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.access_key_id, values::token(text).map(Some)),
        show: |config| config.aws.access_key_id.clone(),
    },
    Setting {
        variable: "AWS_SECRET_ACCESS_KEY",
        alternatives: &[],
        key: "aws.secret_access_key",
        default: Fallback::Words("none; an `s3://` store needs it, or another source"),
        doc: "Secret of that access key",
        kind: Kind::Secret,
        apply: |draft, text| {
            let secret = values::token(text).map(|text| Some(Secret::new(text)));
            set(&mut draft.config.aws.secret_access_key, secret)
        },
        show: |config| config.aws.secret_access_key.as_ref().map(Secret::to_string),
    },
    Setting {
        variable: "AWS_SESSION_TOKEN",
        alternatives: &[],
        key: "aws.session_token",
        default: Fallback::Words("none"),
        doc: "Session token of temporary credentials",
        kind: Kind::Secret,
        apply: |draft, text| {
            let secret = values::token(text).map(|text| Some(Secret::new(text)));
            set(&mut draft.config.aws.session_token, secret)
        },
        show: |config| config.aws.session_token.as_ref().map(Secret::to_string),
    },
    Setting {
        variable: "AWS_REGION",
        alternatives: &["AWS_DEFAULT_REGION"],
        key: "aws.region",
        default: Fallback::Value("us-east-1"),
        doc: "Region of the S3 server",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.region, values::region(text)),
        show: |config| Some(config.aws.region.clone()),
    },
    Setting {
        variable: "AWS_ENDPOINT_URL_S3",
        alternatives: &["AWS_ENDPOINT_URL"],
        key: "aws.endpoint_url",
        default: Fallback::Words("Amazon's own of the region"),
        doc: "Address of the S3 server, `http(s)://host[:port]`",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.endpoint_url, values::endpoint(text).map(Some)),
        show: |config| config.aws.endpoint_url.clone(),
    },
    Setting {
        variable: "AWS_S3_FORCE_PATH_STYLE",
        alternatives: &[],
        key: "aws.force_path_style",
        default: Fallback::Words("by path with an endpoint of one's own, else by host name"),
        doc: "Whether the bucket is addressed by path: `true` or `false`",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.force_path_style, values::truth(text).map(Some)),
        show: |config| config.aws.force_path_style.map(|force| force.to_string()),
    },
    Setting {
        variable: "AWS_CA_BUNDLE",
        alternatives: &[],
        key: "aws.ca_bundle",
        default: Fallback::Words("the public ones"),
        doc: "Certificate authorities of the S3 server, a PEM file",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.ca_bundle, values::path(text).map(Some)),
        show: |config| config.aws.ca_bundle.as_deref().and_then(shown_path),
    },
    Setting {
        variable: "AWS_PROFILE",
        alternatives: &[],
        key: "aws.profile",
        default: Fallback::Words("`default`"),
        doc: "Section of the file with credentials",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.profile, values::token(text).map(Some)),
        show: |config| config.aws.profile.clone(),
    },
    Setting {
        variable: "AWS_SHARED_CREDENTIALS_FILE",
        alternatives: &[],
        key: "aws.shared_credentials_file",
        default: Fallback::Words("none"),
        doc: "File with the credentials of profiles",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.shared_credentials_file, values::path(text).map(Some)),
        show: |config| config.aws.shared_credentials_file.as_deref().and_then(shown_path),
    },
    Setting {
        variable: "AWS_CONFIG_FILE",
        alternatives: &[],
        key: "aws.config_file",
        default: Fallback::Words("none"),
        doc: "The same, with sections `[profile NAME]`",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.config_file, values::path(text).map(Some)),
        show: |config| config.aws.config_file.as_deref().and_then(shown_path),
    },
    Setting {
        variable: "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        alternatives: &[],
        key: "aws.container_relative_uri",
        default: Fallback::Words("none"),
        doc: "Path of the credentials at the container agent",
        kind: Kind::Text,
        apply: |draft, text| {
            set(&mut draft.config.aws.container_relative_uri, values::agent_path(text).map(Some))
        },
        show: |config| config.aws.container_relative_uri.clone(),
    },
    Setting {
        variable: "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        alternatives: &[],
        key: "aws.container_full_uri",
        default: Fallback::Words("none"),
        doc: "Address of the credentials of a container",
        kind: Kind::Text,
        apply: |draft, text| {
            set(&mut draft.config.aws.container_full_uri, values::container_uri(text).map(Some))
        },
        show: |config| config.aws.container_full_uri.clone(),
    },
    Setting {
        variable: "AWS_CONTAINER_AUTHORIZATION_TOKEN",
        alternatives: &[],
        key: "aws.container_token",
        default: Fallback::Words("none"),
        doc: "Token for that address",
        kind: Kind::Secret,
        apply: |draft, text| {
            let secret = values::token(text).map(|text| Some(Secret::new(text)));
            set(&mut draft.config.aws.container_token, secret)
        },
        show: |config| config.aws.container_token.as_ref().map(Secret::to_string),
    },
    Setting {
        variable: "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        alternatives: &[],
        key: "aws.container_token_file",
        default: Fallback::Words("none"),
        doc: "File with the token for that address",
        kind: Kind::Text,
        apply: |draft, text| set(&mut draft.config.aws.container_token_file, values::path(text).map(Some)),
        show: |config| config.aws.container_token_file.as_deref().and_then(shown_path),
    },
    Setting {
        variable: "AWS_EC2_METADATA_SERVICE_ENDPOINT",
        alternatives: &[],
        key: "aws.metadata_endpoint",
        default: Fallback::Words("none: it is not asked"),
        doc: "Address of the instance's metadata service, `http://169.254.169.254`",
        kind: Kind::Text,
        apply: |draft, text| {
            set(&mut draft.config.aws.metadata_endpoint, values::metadata_endpoint(text).map(Some))
        },
        show: |config| config.aws.metadata_endpoint.clone(),
    },
];

fn set<T>(field: &mut T, value: Result<T, String>) -> Result<(), String> {
    *field = value?;
    Ok(())
}

fn shown_path(path: &Path) -> Option<String> {
    Some(path.display().to_string())
}

// === impl Setting ===

impl Setting {
    /// Returns the variables that give it, the one that wins first.
    pub fn variables(&self) -> impl DoubleEndedIterator<Item = &'static str> {
        std::iter::once(self.variable).chain(self.alternatives.iter().copied())
    }

    /// Tells whether the variable is one of ours and not one shared with other tools.
    pub(super) fn is_ours(&self) -> bool {
        self.variable.starts_with(super::PREFIX)
    }
}

// === impl Fallback ===

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(value) => write!(f, "`{value}`"),
            Self::Words(words) => f.write_str(words),
        }
    }
}

// === impl Draft ===

impl Draft {
    /// Creates a draft in which the defaults are still to be filled.
    pub(super) fn new() -> Self {
        let config = Config {
            api_port: 0,
            api_host: Ipv4Addr::LOCALHOST.into(),
            pool_size: 0,
            max_containers: 0,
            idle_timeout_ms: 0,
            state_dir: PathBuf::new(),
            secrets_dir: PathBuf::new(),
            socket_dir: PathBuf::new(),
            default_image: String::new(),
            store: StoreLocation::Directory(PathBuf::new()),
            store_shared: false,
            cache_max_mb: 0,
            cache_min_free_mb: 0,
            aws: Aws::default(),
            workloads_dir: PathBuf::new(),
            scripts_dir: PathBuf::new(),
            api_tokens_file: None,
            master_key_file: None,
            state_encryption: false,
            instance: None,
            docker_host: None,
            #[cfg(feature = "crash_points")]
            crash_point: None,
            origins: Origins::default(),
        };
        Self { config, api_host: None }
    }
}
