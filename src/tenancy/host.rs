//! What a claim's hooks can do: the host port of `script`, for one claim.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use base64::Engine as _;

use super::{Error, Inner, registry::Live, secrets::check_name};
use crate::{
    model::{Key, Secret},
    runtime::{self, ExecRequest},
    script::{ExecCall, ExecResult, Host, HostError, LogLevel, Output},
    state::{self, FileAction, FileAnswer},
};

/// What is kept of a command's output.
const EXEC_OUTPUT_BYTES: usize = 64 << 10;
/// The largest file a script may read or write.
const MAX_FILE_BYTES: usize = 1 << 20;
/// Outputs a claim may have.
const MAX_OUTPUTS: usize = 64;

/// Acts for the hooks of one claim.
pub(super) struct ClaimHost {
    inner: Arc<Inner>,
    key: Key,
    live: Arc<Live>,
    outputs: Mutex<BTreeMap<String, Output>>,
}

// === impl ClaimHost ===

impl ClaimHost {
    pub(super) fn new(inner: Arc<Inner>, key: Key, live: Arc<Live>) -> Self {
        Self { inner, key, live, outputs: Mutex::default() }
    }

    pub(super) fn outputs(&self) -> BTreeMap<String, Output> {
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn file(&self, action: FileAction) -> Result<FileAnswer, HostError> {
        if self.live.workload.spec.volumes.state.is_none() {
            return Err(host_error("invalid", "this workload has no `volumes.state`"));
        }
        let files = &self.inner.parts.files;
        files.state_file(&self.live.slot, self.live.made.run_as, action).await.map_err(|error| match error {
            state::Error::File { .. } => host_error("invalid", error.to_string()),
            other => host_error("unavailable", super::answer::chain(&other)),
        })
    }

    async fn put_file(&self, name: &str, secret: Secret) -> Result<(), HostError> {
        if self.live.workload.spec.volumes.secrets.is_none() {
            return Err(host_error("invalid", "this workload has no `volumes.secrets`"));
        }
        check_name(name).map_err(|problem| host_error("invalid", problem))?;
        let files = BTreeMap::from([(name.to_owned(), secret)]);
        let put = self.inner.parts.files.put_secrets(&self.live.slot, self.live.made.run_as, &files).await;
        put.map_err(|error| host_error("unavailable", super::answer::chain(&error)))
    }
}

#[async_trait]
impl Host for ClaimHost {
    async fn exec(&self, call: ExecCall) -> Result<ExecResult, HostError> {
        let request = ExecRequest {
            argv: call.argv,
            env: call.env.into_iter().collect(),
            stdin: call.stdin,
            timeout: call.timeout,
            output_cap_bytes: EXEC_OUTPUT_BYTES,
        };
        let output = self.inner.parts.runtime.exec(&self.live.made.container, request).await;
        let output = output.map_err(|error| runtime_fault(&error))?;
        Ok(ExecResult {
            status: output.status,
            stdout: output.stdout,
            stderr: output.stderr,
            truncated: output.truncated,
        })
    }

    async fn signal(&self, signal: &str) -> Result<(), HostError> {
        let sent = self.inner.parts.runtime.signal(&self.live.made.container, signal).await;
        sent.map_err(|error| runtime_fault(&error))
    }

    async fn secret_write(&self, name: &str, secret: Secret) -> Result<(), HostError> {
        self.put_file(name, secret).await
    }

    async fn secret_get_or_create(&self, name: &str, bytes: usize) -> Result<Secret, HostError> {
        check_name(name).map_err(|problem| host_error("invalid", problem))?;
        let fault = |error: Error| host_error("unavailable", error.to_string());
        let tenant = &self.key.tenant;
        let secret = match self.inner.stored_secret(tenant, name).map_err(fault)? {
            Some(secret) => secret,
            None => {
                let mut random = vec![0; bytes];
                self.inner.parts.clock.fill_random(&mut random);
                let text = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&random);
                let secret = Secret::new(text.into_bytes());
                self.inner.put_secret(tenant, name, &secret).await.map_err(fault)?;
                secret
            }
        };
        if self.live.workload.spec.volumes.secrets.is_some() {
            self.put_file(name, secret.clone()).await?;
        }
        Ok(secret)
    }

    async fn state_read(&self, path: &str) -> Result<Vec<u8>, HostError> {
        match self.file(FileAction::Read(path.to_owned(), MAX_FILE_BYTES)).await? {
            FileAnswer::Bytes(bytes) => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    async fn state_write(&self, path: &str, content: Secret) -> Result<(), HostError> {
        if content.expose().len() > MAX_FILE_BYTES {
            return Err(host_error("limit", format!("more than {MAX_FILE_BYTES} bytes for {path:?}")));
        }
        self.file(FileAction::Write(path.to_owned(), content)).await.map(|_| ())
    }

    async fn state_list(&self, path: &str) -> Result<Vec<String>, HostError> {
        match self.file(FileAction::List(path.to_owned())).await? {
            FileAnswer::Names(names) => Ok(names),
            other => Err(unexpected(&other)),
        }
    }

    async fn state_exists(&self, path: &str) -> Result<bool, HostError> {
        match self.file(FileAction::Exists(path.to_owned())).await? {
            FileAnswer::There(there) => Ok(there),
            other => Err(unexpected(&other)),
        }
    }

    async fn state_remove(&self, path: &str) -> Result<(), HostError> {
        self.file(FileAction::Remove(path.to_owned())).await.map(|_| ())
    }

    fn set_output(&self, key: &str, value: Output) -> Result<(), HostError> {
        let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        if outputs.len() >= MAX_OUTPUTS && !outputs.contains_key(key) {
            return Err(host_error("limit", format!("more than {MAX_OUTPUTS} outputs")));
        }
        outputs.insert(key.to_owned(), value);
        Ok(())
    }

    fn log(&self, level: LogLevel, message: &str, fields: serde_json::Map<String, serde_json::Value>) {
        let fields = serde_json::Value::Object(fields);
        let (tenant, workload) = (self.key.tenant.as_str(), self.key.workload.as_str());
        let epoch = self.live.epoch().0;
        match level {
            LogLevel::Debug => {
                tracing::debug!(target: "script", tenant, workload, epoch, %fields, "{message}")
            }
            LogLevel::Info => tracing::info!(target: "script", tenant, workload, epoch, %fields, "{message}"),
            LogLevel::Warn => tracing::warn!(target: "script", tenant, workload, epoch, %fields, "{message}"),
            LogLevel::Error => {
                tracing::error!(target: "script", tenant, workload, epoch, %fields, "{message}")
            }
        }
    }

    fn now_ms(&self) -> u64 {
        self.inner.now_ms()
    }
}

fn host_error(code: &'static str, message: impl Into<String>) -> HostError {
    HostError { code, message: message.into() }
}

fn unexpected(answer: &FileAnswer) -> HostError {
    let kind = match answer {
        FileAnswer::Bytes(_) => "bytes",
        FileAnswer::Names(_) => "names",
        FileAnswer::There(_) => "a truth value",
        FileAnswer::Done => "nothing",
    };
    host_error("unavailable", format!("the slot's files answered with {kind}"))
}

fn runtime_fault(error: &runtime::Error) -> HostError {
    let code = match error {
        runtime::Error::Timeout { .. } => "timeout",
        runtime::Error::Unavailable(_) | runtime::Error::Unknown { .. } => "unavailable",
        runtime::Error::Conflict { .. } | runtime::Error::Refused { .. } | runtime::Error::Image { .. } => {
            "exec_failed"
        }
    };
    host_error(code, super::answer::chain(error))
}
