//! Credentials: where they come from, and when they are asked for again.
//!
//! rust-s3's own sources read the process's environment and ask again only when
//! the old credentials have expired, in the middle of a call; of its crate for
//! credentials, the reading of profile files is used. Endpoints of containers
//! and instances are asked here, some minutes before the end; when they do not
//! answer, what is still valid goes on being used.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use reqwest::{Client, Method, RequestBuilder};
use serde::Deserialize;

use super::answer::{self, Finding};
use crate::{clock::SharedClock, model::Secret};

/// New credentials are asked for so long before the old ones end, in milliseconds.
const AHEAD_MS: u64 = 300_000;

/// After an endpoint failed, it is asked again no sooner, while the old
/// credentials are valid, in milliseconds.
const AGAIN_MS: u64 = 10_000;

/// An endpoint has so long for each answer, in milliseconds.
const ANSWER_MS: u64 = 5_000;

/// No answer of an endpoint is longer, in bytes.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Where credentials come from.
#[derive(Debug)]
pub(super) enum Source {
    /// They were given, and never end.
    Fixed(Keys),
    /// A container's endpoint.
    Container {
        /// Its address.
        url: String,
        /// What it is asked with.
        token: Option<Secret>,
        /// A file with what it is asked with, read each time.
        token_file: Option<PathBuf>,
    },
    /// The metadata service of an EC2 instance, version 2.
    Instance {
        /// Its address, without a slash at its end.
        endpoint: String,
    },
}

/// What requests are signed with.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    pub(super) id: String,
    pub(super) secret: Secret,
    pub(super) token: Option<Secret>,
    /// When they end, in milliseconds since the Unix epoch; none: never.
    pub(super) ends_ms: Option<u64>,
}

/// Knows the credentials of this moment.
pub(super) struct Identity {
    source: Source,
    client: Client,
    clock: SharedClock,
    current: RwLock<Option<Arc<Keys>>>,
    /// Held by the one that asks; when the last one failed.
    asking: tokio::sync::Mutex<Option<u64>>,
}

/// What both kinds of endpoint answer.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    access_key_id: String,
    secret_access_key: String,
    token: String,
    expiration: String,
}

// === impl Identity ===

impl Identity {
    /// Makes no call.
    pub(super) fn new(source: Source, clock: SharedClock) -> Result<Self, String> {
        // An endpoint is next door: never through a proxy, never elsewhere.
        let client = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_millis(ANSWER_MS))
            .build()
            .map_err(|error| format!("the HTTP client cannot be made: {error}"))?;
        let current = match &source {
            Source::Fixed(keys) => Some(Arc::new(keys.clone())),
            Source::Container { .. } | Source::Instance { .. } => None,
        };
        let (current, asking) = (RwLock::new(current), tokio::sync::Mutex::new(None));
        Ok(Self { source, client, clock, current, asking })
    }

    /// Returns credentials that are valid now.
    pub(super) async fn keys(&self) -> Result<Arc<Keys>, Finding> {
        if let Some(keys) = self.current().filter(|keys| self.lasts(keys, AHEAD_MS)) {
            return Ok(keys);
        }
        let mut failed_ms = self.asking.lock().await;
        let held = self.current();
        if let Some(keys) = &held {
            let is_early = failed_ms.is_some_and(|failed| self.clock.unix_ms() < failed + AGAIN_MS);
            if self.lasts(keys, AHEAD_MS) || (is_early && self.lasts(keys, 0)) {
                return Ok(Arc::clone(keys));
            }
        }
        match self.ask().await {
            Ok(keys) => {
                let keys = Arc::new(keys);
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&keys));
                *failed_ms = None;
                Ok(keys)
            }
            Err(reason) => {
                *failed_ms = Some(self.clock.unix_ms());
                if let Some(keys) = held.filter(|keys| self.lasts(keys, 0)) {
                    tracing::warn!(reason, "credentials of the store are not renewed yet");
                    return Ok(keys);
                }
                let reason = format!("no credentials: {reason}");
                Err(Finding::Failed { reason, may_have_happened: false, pressure: None })
            }
        }
    }

    /// Returns the credentials that were used last.
    pub(super) fn current(&self) -> Option<Arc<Keys>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lasts(&self, keys: &Keys, ms: u64) -> bool {
        keys.ends_ms.is_none_or(|ends| self.clock.unix_ms() + ms < ends)
    }

    async fn ask(&self) -> Result<Keys, String> {
        match &self.source {
            Source::Fixed(keys) => Ok(keys.clone()),
            Source::Container { url, token, token_file } => {
                let mut request = self.client.get(url);
                let read;
                let token = match token_file {
                    Some(path) => {
                        let bytes = tokio::fs::read(path).await;
                        let bytes = bytes.map_err(|error| format!("{}: {error}", path.display()))?;
                        read = Secret::new(bytes.trim_ascii());
                        Some(&read)
                    }
                    None => token.as_ref(),
                };
                if let Some(token) = token {
                    request = request.header("authorization", token.expose());
                }
                parse(&fetch("the container's endpoint", request).await?)
            }
            Source::Instance { endpoint } => {
                const WHAT: &str = "the instance's metadata service";
                let token = self.client.request(Method::PUT, format!("{endpoint}/latest/api/token"));
                let token = token.header("x-aws-ec2-metadata-token-ttl-seconds", "21600");
                let token = fetch(WHAT, token.header("content-length", "0")).await?;
                let base = format!("{endpoint}/latest/meta-data/iam/security-credentials/");
                let get = |url: &str| self.client.get(url).header("x-aws-ec2-metadata-token", &token[..]);
                let role = fetch(WHAT, get(&base)).await?;
                let role = String::from_utf8_lossy(role.trim_ascii()).into_owned();
                let is_name = |b: u8| b.is_ascii_alphanumeric() || b"+=,.@_-".contains(&b);
                if role.is_empty() || !role.bytes().all(is_name) {
                    return Err(format!("{WHAT} names no role"));
                }
                parse(&fetch(WHAT, get(&format!("{base}{role}"))).await?)
            }
        }
    }
}

/// Makes one request; an error shows neither what was sent nor what came.
async fn fetch(what: &str, request: RequestBuilder) -> Result<Vec<u8>, String> {
    let failed = |error: reqwest::Error| {
        let cause = if error.is_timeout() { "does not answer in time" } else { "cannot be reached" };
        format!("{what} {cause}")
    };
    let mut response = request.send().await.map_err(failed)?;
    if !response.status().is_success() {
        return Err(format!("{what} answers with status {}", response.status().as_u16()));
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ANSWER_BYTES {
            return Err(format!("{what} answers more than {MAX_ANSWER_BYTES} bytes"));
        }
    }
    Ok(body)
}

fn parse(body: &[u8]) -> Result<Keys, String> {
    // The error of the parser may show what it read.
    let answer: Answer =
        serde_json::from_slice(body).map_err(|_| "the answer holds no credentials".to_owned())?;
    let ends_ms = answer::unix_ms(&answer.expiration).ok_or("the answer does not say when they end")?;
    Ok(Keys {
        id: answer.access_key_id,
        secret: Secret::new(answer.secret_access_key),
        token: Some(Secret::new(answer.token)),
        ends_ms: Some(ends_ms),
    })
}
