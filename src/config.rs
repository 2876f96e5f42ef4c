//! Configuration: one struct, its defaults in one place.

use std::path::PathBuf;

use crate::model::Secret;

/// Everything the server can be told.
#[derive(Debug, Clone)]
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
    /// `BOILERHOUSE_INSTANCE`; none: derived from the machine and the state directory.
    pub instance: Option<String>,
    /// `DOCKER_HOST`; none: the local socket.
    pub docker_host: Option<String>,
}

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
#[derive(Debug, Clone, Default)]
pub struct Aws {
    /// `AWS_ACCESS_KEY_ID`
    pub access_key_id: Option<String>,
    /// `AWS_SECRET_ACCESS_KEY`
    pub secret_access_key: Option<Secret>,
    /// `AWS_SESSION_TOKEN`
    pub session_token: Option<Secret>,
    /// `AWS_REGION`, else `AWS_DEFAULT_REGION`, else `us-east-1`.
    pub region: String,
    /// `AWS_ENDPOINT_URL`
    pub endpoint_url: Option<String>,
}
