//! The port through which acting hooks reach the world, and its values.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;

use crate::model::Secret;

/// What acting hooks can do; implemented for one claim.
///
/// Every method is called from a hook's own thread and raced against the hook's
/// deadline; an implementation must be cancel-safe.
#[async_trait]
pub trait Host: Send + Sync + 'static {
    /// Runs a command in the container.
    async fn exec(&self, call: ExecCall) -> Result<ExecResult, HostError>;

    /// Sends a signal to the container's first process.
    async fn signal(&self, signal: &str) -> Result<(), HostError>;

    /// Writes a secret file into the slot.
    async fn secret_write(&self, name: &str, secret: Secret) -> Result<(), HostError>;

    /// Returns the tenant's stored secret, making one of `bytes` random bytes
    /// (as URL-safe base64) when there is none, and writes it into the slot.
    async fn secret_get_or_create(&self, name: &str, bytes: usize) -> Result<Secret, HostError>;

    /// Reads a file of the state directory.
    async fn state_read(&self, path: &str) -> Result<Vec<u8>, HostError>;

    /// Writes a file of the state directory.
    async fn state_write(&self, path: &str, content: Secret) -> Result<(), HostError>;

    /// Lists a directory of the state directory.
    async fn state_list(&self, path: &str) -> Result<Vec<String>, HostError>;

    /// Asks whether something is in the state directory.
    async fn state_exists(&self, path: &str) -> Result<bool, HostError>;

    /// Removes something from the state directory.
    async fn state_remove(&self, path: &str) -> Result<(), HostError>;

    /// Adds to the claim's answer.
    fn set_output(&self, key: &str, value: Output) -> Result<(), HostError>;

    /// Logs on behalf of the script.
    fn log(&self, level: LogLevel, message: &str, fields: serde_json::Map<String, serde_json::Value>);

    /// Milliseconds since the Unix epoch.
    fn now_ms(&self) -> u64;
}

/// A command that a script runs.
#[derive(Debug, Clone)]
pub struct ExecCall {
    /// The argument vector.
    pub argv: Vec<String>,
    /// Environment beside the container's own.
    pub env: BTreeMap<String, String>,
    /// Standard input.
    pub stdin: Option<Secret>,
    /// How long it may run; the hook's own deadline holds as well.
    pub timeout: Duration,
}

/// What a command of a script gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    /// Its exit status.
    pub status: i64,
    /// Its output, up to 64 KiB.
    pub stdout: Vec<u8>,
    /// Its error output, up to 64 KiB.
    pub stderr: Vec<u8>,
    /// Whether either was cut.
    pub truncated: bool,
}

/// A value that a script adds to the claim's answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Ordinary data.
    Plain(serde_json::Value),
    /// A secret; shown in the claim's answer only.
    Secret(Secret),
}

/// The level of a script's log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Why.
    Debug,
    /// State changed.
    Info,
    /// Degraded.
    Warn,
    /// A human must act.
    Error,
}

/// A host call that did not succeed; a script can catch it (`e.code`, `e.message`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct HostError {
    /// Stable: `exec_failed`, `timeout`, `unavailable`, `invalid`, `not_found`, `limit`.
    pub code: &'static str,
    /// For people; without secrets.
    pub message: String,
}

/// Shares a host.
pub type SharedHost = Arc<dyn Host>;
