//! Configuration: one struct, its defaults in one place.
//!
//! Settings come from the environment, else from a RON file, else from the
//! defaults; [`settings()`] is the one table from which they are parsed, printed
//! and documented. [`Config::load`] takes the environment as data and reports
//! everything that is wrong at once. `BOILERHOUSE_*` variables that are not known
//! are errors, except those of the client commands and those that Kubernetes
//! makes of a service named `boilerhouse`.

mod error;
mod file;
mod instance;
mod load;
mod print;
mod settings;
#[cfg(test)]
mod tests;
mod values;

use std::{collections::BTreeMap, ffi::OsString, fmt, path::PathBuf};

pub use self::{
    error::{ConfigError, ConfigErrors},
    instance::{instance, machine_id},
    settings::{Fallback, Kind, Setting, settings},
};
use crate::model::Secret;

/// What the names of our own variables begin with.
const PREFIX: &str = "BOILERHOUSE_";

/// Everything the server can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `BOILERHOUSE_API_PORT`
    pub api_port: u16,
    /// `BOILERHOUSE_API_HOST`, resolved: 0.0.0.0 with tokens and 127.0.0.1 without.
    pub api_host: std::net::IpAddr,
    /// `BOILERHOUSE_POOL_SIZE`
    pub pool_size: u32,
    /// `BOILERHOUSE_MAX_CONTAINERS`
    pub max_containers: u32,
    /// `BOILERHOUSE_IDLE_TIMEOUT_MS`; 0: never.
    pub idle_timeout_ms: u64,
    /// `BOILERHOUSE_STATE_DIR`
    pub state_dir: PathBuf,
    /// `BOILERHOUSE_SECRETS_DIR`
    pub secrets_dir: PathBuf,
    /// `BOILERHOUSE_SOCKET_DIR`
    pub socket_dir: PathBuf,
    /// `BOILERHOUSE_DEFAULT_IMAGE`
    pub default_image: String,
    /// `BOILERHOUSE_STORE`
    pub store: StoreLocation,
    /// Whether other servers use the store, too.
    pub store_shared: bool,
    /// MiB that state of tenants who are not claimed may take on this node; 0: any.
    pub cache_max_mb: u64,
    /// MiB that are to stay free on its disk.
    pub cache_min_free_mb: u64,
    /// The standard `AWS_*` variables.
    pub aws: Aws,
    /// `BOILERHOUSE_WORKLOADS_DIR`
    pub workloads_dir: PathBuf,
    /// `BOILERHOUSE_SCRIPTS_DIR`
    pub scripts_dir: PathBuf,
    /// `BOILERHOUSE_API_TOKENS_FILE`
    pub api_tokens_file: Option<PathBuf>,
    /// `BOILERHOUSE_MASTER_KEY_FILE`
    pub master_key_file: Option<PathBuf>,
    /// Whether what goes to the store is sealed: `BOILERHOUSE_STATE_ENCRYPTION`
    pub state_encryption: bool,
    /// `BOILERHOUSE_INSTANCE`; none: derived from the machine and the state directory.
    pub instance: Option<String>,
    /// `DOCKER_HOST`; none: the local socket.
    pub docker_host: Option<String>,
    /// `BOILERHOUSE_CRASH_POINT`: the point, and at which passage (from 1) the server kills itself.
    #[cfg(feature = "crash_points")]
    pub crash_point: Option<(String, u32)>,
    /// Where each setting came from.
    pub origins: Origins,
}

/// Where settings came from, by key; what is not in it is the default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins(pub(crate) BTreeMap<&'static str, String>);

/// Where snapshots live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreLocation {
    /// `file:///path`
    Directory(PathBuf),
    /// `s3://bucket/prefix`
    S3 {
        /// The bucket.
        bucket: String,
        /// Without slashes at its ends; may be empty.
        prefix: String,
    },
}

/// Credentials and place of an S3 server, as the AWS tools name them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Aws {
    /// `AWS_ACCESS_KEY_ID`
    pub access_key_id: Option<String>,
    /// `AWS_SECRET_ACCESS_KEY`
    pub secret_access_key: Option<Secret>,
    /// `AWS_SESSION_TOKEN`
    pub session_token: Option<Secret>,
    /// `AWS_REGION`, else `AWS_DEFAULT_REGION`, else `us-east-1`.
    pub region: String,
    /// `AWS_ENDPOINT_URL_S3`, else `AWS_ENDPOINT_URL`; without a slash at its end.
    pub endpoint_url: Option<String>,
    /// `AWS_S3_FORCE_PATH_STYLE`; none: by path where there is an endpoint or a
    /// dot in the bucket's name.
    pub force_path_style: Option<bool>,
    /// `AWS_CA_BUNDLE`
    pub ca_bundle: Option<PathBuf>,
    /// `AWS_PROFILE`
    pub profile: Option<String>,
    /// `AWS_SHARED_CREDENTIALS_FILE`
    pub shared_credentials_file: Option<PathBuf>,
    /// `AWS_CONFIG_FILE`
    pub config_file: Option<PathBuf>,
    /// `AWS_CONTAINER_CREDENTIALS_RELATIVE_URI`
    pub container_relative_uri: Option<String>,
    /// `AWS_CONTAINER_CREDENTIALS_FULL_URI`
    pub container_full_uri: Option<String>,
    /// `AWS_CONTAINER_AUTHORIZATION_TOKEN`
    pub container_token: Option<Secret>,
    /// `AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE`
    pub container_token_file: Option<PathBuf>,
    /// `AWS_EC2_METADATA_SERVICE_ENDPOINT`; without a slash at its end.
    pub metadata_endpoint: Option<String>,
}

// === impl Config ===

impl Config {
    /// Makes a configuration of an environment (in `main`: `std::env::vars_os()`)
    /// and of the RON file that it may name.
    ///
    /// Paths come out absolute; relative ones count from the working directory.
    /// Nothing but the RON file is opened; directories and key files are looked
    /// at by those who use them.
    ///
    /// # Errors
    /// [`ConfigErrors`] holds everything that is wrong, each with its source.
    pub fn load<N, V>(environment: impl IntoIterator<Item = (N, V)>) -> Result<Self, ConfigErrors>
    where
        N: Into<OsString>,
        V: Into<OsString>,
    {
        load::load(environment.into_iter().map(|(name, value)| (name.into(), value.into())))
    }

    /// Checks the names of an environment's `BOILERHOUSE_*` variables, for the client
    /// commands: what they would not read because it is misspelt must not be ignored.
    ///
    /// # Errors
    /// [`ConfigErrors`] names each unknown variable and the allowed ones.
    pub fn check_names<N, V>(environment: impl IntoIterator<Item = (N, V)>) -> Result<(), ConfigErrors>
    where
        N: Into<OsString>,
        V: Into<OsString>,
    {
        load::check_names(environment.into_iter().map(|(name, value)| (name.into(), value.into())))
    }

    /// Writes what is in force as a RON file that can be loaded again, with a
    /// comment at each setting that says where it came from. Secrets are left
    /// out, with a comment in their place.
    pub fn to_ron(&self) -> String {
        print::to_ron(self)
    }
}

// === impl StoreLocation ===

impl StoreLocation {
    /// Reads a place as `BOILERHOUSE_STORE` names it.
    ///
    /// # Errors
    /// Words that say what is wrong with it, and what is allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        values::store(text)
    }
}

impl fmt::Display for StoreLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "file://{}", path.display()),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

// === impl Origins ===

impl Origins {
    /// Says where the setting with this key came from: a variable, `file:line:column`,
    /// or `default`.
    pub fn of(&self, key: &str) -> &str {
        self.0.get(key).map_or("default", String::as_str)
    }
}
