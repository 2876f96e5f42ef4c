//! Amazon S3 and its relatives, through rust-s3.
//!
//! The library neither retries plain writes nor bounds its waits as we need, so
//! both happen here: each call has a deadline, within it several attempts with
//! jittered waits between, each longer than the one before. Its own retry,
//! a setting of the whole process, is switched off.
//!
//! # Guarantees
//! - A write of which any attempt may have arrived and none was answered is
//!   [`Error::Unknown`], also when a later attempt was refused.
//! - A `create` that was tried twice may meet its own object: it then answers
//!   [`Creation::Exists`], and the caller reads it back.
//! - Bodies are signed (SHA-256) and carry an MD5, so that a damaged one is
//!   refused; a body that is shorter than announced is an error.
//! - No error text holds a credential or a signature.
//!
//! A `put` or `delete` that was given up may still land after a later write of
//! the same key, as with every S3 client: names that are written once, or by
//! `create`, are safe from it.
//!
//! # Cancel safety
//! A dropped call is a write with an unknown outcome.

mod answer;
mod place;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use s3::Bucket;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use self::{
    answer::{Finding, check_length, judge, presentable},
    place::Place,
};
use super::{Creation, Error, Listed, MAX_LIST_KEYS, Store, key, probe};
use crate::{clock::SharedClock, config::Aws, model::Secret, retry::Backoff};

/// From this size on, a body is hashed and sent on a blocking thread: the
/// library hashes it three times (SHA-256 twice, MD5 once) and copies it as
/// often, milliseconds for each MiB that claims would wait for.
const OFFLOAD_BYTES: usize = 128 << 10;

/// Keeps objects in a bucket, under a prefix.
pub struct S3Store {
    bucket: Arc<Bucket>,
    prefix: String,
    secrets: Vec<Secret>,
    limits: Limits,
    clock: SharedClock,
    permits: Arc<Semaphore>,
}

/// Bounds of every call.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The deadline of a call, its waits and attempts included, in milliseconds.
    pub call_ms: u64,
    /// The deadline of the first attempt, in milliseconds; each next has twice
    /// the time, so that a hanging server is left early and a slow one is not.
    pub attempt_ms: u64,
    /// So many attempts in a row may find no server before the call gives up
    /// early.
    pub unreachable_attempts: u32,
    /// The waits between attempts.
    pub backoff: Backoff,
    /// So many requests are under way at a time; more wait for their turn.
    pub requests: usize,
}

/// How a call ended that the server answered.
enum Answer<T> {
    Done(T),
    Absent,
    Precondition,
}

/// What an attempt gets.
struct Attempt {
    until: Instant,
    permit: OwnedSemaphorePermit,
}

/// What the attempts of one call have shown so far.
#[derive(Default)]
struct Tries {
    attempts: u32,
    unreachable_in_a_row: u32,
    may_have_happened: bool,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self {
            call_ms: 60_000,
            attempt_ms: 10_000,
            unreachable_attempts: 3,
            backoff: Backoff { base_ms: 100, cap_ms: 5_000 },
            requests: 128,
        }
    }
}

// === impl Tries ===

impl Tries {
    /// Makes the error with which a call ends after these attempts.
    fn end(&self, operation: &'static str, key: &str, finding: &Finding, reason: String) -> Error {
        let is_write = matches!(operation, "put" | "create" | "delete");
        match finding {
            _ if is_write && self.may_have_happened => Error::unknown(operation, key, reason),
            Finding::Refused(_) | Finding::Absent | Finding::Precondition => {
                Error::refused(operation, key, reason)
            }
            Finding::Unreachable(_) | Finding::Failed { .. } => Error::unavailable(operation, key, reason),
        }
    }
}

// === impl S3Store ===

impl S3Store {
    /// Makes a store of `bucket` and `prefix` (without slashes at its ends; may
    /// be empty), with connections that all calls share. Makes no call: whether
    /// the server is there is for [`Store::probe`] to say.
    ///
    /// With an endpoint the bucket is addressed by path, else by host name.
    ///
    /// # Errors
    /// [`Error::Refused`] that names the part of the configuration that is
    /// missing or cannot be used.
    pub fn connect(
        bucket: &str,
        prefix: &str,
        aws: &Aws,
        limits: Limits,
        clock: SharedClock,
    ) -> Result<Self, Error> {
        s3::set_retries(0);
        let Place { bucket, prefix, secrets } = Place::new(bucket, prefix, aws)?;
        let permits = Arc::new(Semaphore::new(limits.requests.clamp(1, Semaphore::MAX_PERMITS)));
        Ok(Self { bucket: Arc::new(bucket), prefix, secrets, limits, clock, permits })
    }

    fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Makes attempts until one is answered for good or the deadline is near.
    async fn call<T, F>(
        &self,
        operation: &'static str,
        key: &str,
        attempt: impl Fn(Attempt) -> F,
    ) -> Result<Answer<T>, Error>
    where
        F: Future<Output = Result<T, Finding>>,
    {
        let deadline = Instant::now() + Duration::from_millis(self.limits.call_ms);
        let mut tries = Tries::default();
        loop {
            let turn = tokio::time::timeout_at(deadline, Arc::clone(&self.permits).acquire_owned()).await;
            let finding = match turn {
                Ok(permit) => {
                    let permit = permit.expect("the semaphore is never closed");
                    let attempt_ms = self.limits.attempt_ms.saturating_mul(1 << tries.attempts.min(16));
                    let until = deadline.min(Instant::now() + Duration::from_millis(attempt_ms));
                    match attempt(Attempt { until, permit }).await {
                        Ok(answer) => return Ok(Answer::Done(answer)),
                        Err(finding) => finding,
                    }
                }
                Err(_) => {
                    Finding::Failed { reason: "no free connection".to_owned(), may_have_happened: false }
                }
            };
            tries.attempts += 1;
            let reason = match &finding {
                Finding::Absent => return Ok(Answer::Absent),
                Finding::Precondition => return Ok(Answer::Precondition),
                Finding::Refused(reason) => {
                    let error = tries.end(operation, key, &finding, self.presentable(reason));
                    return Err(error);
                }
                Finding::Unreachable(reason) => {
                    tries.unreachable_in_a_row += 1;
                    reason
                }
                Finding::Failed { reason, may_have_happened } => {
                    tries.unreachable_in_a_row = 0;
                    tries.may_have_happened |= may_have_happened;
                    reason
                }
            };
            let reason = self.presentable(reason);
            let wait = self.limits.backoff.wait(tries.attempts - 1, &*self.clock);
            let is_last = tries.unreachable_in_a_row >= self.limits.unreachable_attempts
                || Instant::now() + wait >= deadline;
            if is_last {
                let reason = format!("{reason} (after {} attempts)", tries.attempts);
                return Err(tries.end(operation, key, &finding, reason));
            }
            tracing::debug!(operation, key, attempts = tries.attempts, reason, "store call is tried again");
            tokio::time::sleep(wait).await;
        }
    }

    async fn write(
        &self,
        operation: &'static str,
        key: &str,
        body: Bytes,
        is_conditional: bool,
    ) -> Result<Answer<()>, Error> {
        key::check_key(operation, key)?;
        key::check_body(operation, key, body.len())?;
        let path = self.full_key(key);
        self.call(operation, key, |attempt| {
            let (bucket, path, body) = (Arc::clone(&self.bucket), path.clone(), body.clone());
            async move {
                let until = attempt.until;
                let is_large = body.len() >= OFFLOAD_BYTES;
                let sent = async move {
                    let _permit = attempt.permit;
                    within(until, send(&bucket, &path, &body, is_conditional)).await
                };
                if !is_large {
                    return sent.await;
                }
                let runtime = tokio::runtime::Handle::current();
                let task = tokio::task::spawn_blocking(move || runtime.block_on(sent));
                let interrupted = |_| Finding::Failed {
                    reason: "the attempt was interrupted".to_owned(),
                    may_have_happened: true,
                };
                within(until, async { task.await.map_err(interrupted)? }).await
            }
        })
        .await
    }

    /// Lists one page; returns it with the token of the next.
    async fn page(
        &self,
        prefix: &str,
        after: Option<&str>,
        token: Option<String>,
        limit: usize,
    ) -> Result<(Vec<Listed>, Option<String>), Error> {
        let full_prefix = self.full_key(prefix);
        let start = after.map(|after| self.full_key(after));
        let answer = self
            .call("list", prefix, |attempt| {
                let (prefix, start, token) = (full_prefix.clone(), start.clone(), token.clone());
                async move {
                    let _permit = attempt.permit;
                    within(attempt.until, async {
                        self.bucket.list_page(prefix, None, token, start, Some(limit)).await.map_err(judge)
                    })
                    .await
                }
            })
            .await?;
        let Answer::Done((page, _)) = answer else {
            return Err(Error::refused(
                "list",
                prefix,
                "the server answers a listing as if it were one object",
            ));
        };
        let listed = page
            .contents
            .into_iter()
            .map(|object| {
                // Of other keys we were told nothing we could use.
                let key = object.key.strip_prefix(&self.prefix)?.to_owned();
                Some(Listed { key, bytes: object.size })
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::refused("list", prefix, "the server ignores the prefix of a listing"))?;
        Ok((listed, page.next_continuation_token.filter(|_| page.is_truncated)))
    }

    fn presentable(&self, reason: &str) -> String {
        presentable(
            reason,
            self.secrets.iter().filter_map(|secret| std::str::from_utf8(secret.expose()).ok()),
        )
    }
}

#[async_trait]
impl Store for S3Store {
    async fn probe(&self) -> Result<(), Error> {
        probe::probe_create(self, &*self.clock).await
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        key::check_key("get", key)?;
        let path = &self.full_key(key);
        let answer = self
            .call("get", key, |attempt| async move {
                let _permit = attempt.permit;
                within(attempt.until, async {
                    let response = self.bucket.get_object(path).await.map_err(judge)?;
                    let announced = response.headers().remove("content-length");
                    check_length(announced.as_deref(), response.bytes().len())?;
                    Ok(response.into_bytes())
                })
                .await
            })
            .await?;
        match answer {
            Answer::Done(body) => Ok(Some(body)),
            Answer::Absent => Ok(None),
            Answer::Precondition => Err(unasked_condition("get", key)),
        }
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<(), Error> {
        match self.write("put", key, body, false).await? {
            Answer::Done(()) => Ok(()),
            Answer::Absent | Answer::Precondition => Err(unasked_condition("put", key)),
        }
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Creation, Error> {
        match self.write("create", key, body, true).await? {
            Answer::Done(()) => Ok(Creation::Created),
            Answer::Precondition => Ok(Creation::Exists),
            Answer::Absent => Err(unasked_condition("create", key)),
        }
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, Error> {
        key::check_list(prefix, after, limit)?;
        let mut listed: Vec<Listed> = Vec::new();
        let mut token = None;
        // A page may be short, even empty, and not the last.
        for _ in 0..MAX_LIST_KEYS {
            let wanted = limit - listed.len();
            if wanted == 0 {
                return Ok(listed);
            }
            let (page, next) = self.page(prefix, after, token, wanted).await?;
            for object in page {
                let before = listed.last().map(|object| object.key.as_str()).or(after);
                if before.is_some_and(|before| before >= object.key.as_str())
                    || !object.key.starts_with(prefix)
                {
                    let reason = format!("the server's listing is out of order at {:?}", object.key);
                    return Err(Error::refused("list", prefix, self.presentable(&reason)));
                }
                listed.push(object);
            }
            listed.truncate(limit);
            match next {
                Some(next) => token = Some(next),
                None => return Ok(listed),
            }
        }
        Err(Error::unavailable("list", prefix, "the server's listing does not end"))
    }

    async fn delete(&self, key: &str) -> Result<(), Error> {
        key::check_key("delete", key)?;
        let path = &self.full_key(key);
        let answer = self
            .call("delete", key, |attempt| async move {
                let _permit = attempt.permit;
                within(attempt.until, async {
                    self.bucket.delete_object(path).await.map(|_| ()).map_err(judge)
                })
                .await
            })
            .await?;
        match answer {
            Answer::Done(()) | Answer::Absent => Ok(()),
            Answer::Precondition => Err(unasked_condition("delete", key)),
        }
    }
}

/// Sends one body. An answer without an ETag is not an S3 server's: a redirect
/// that was followed with another method looks like success otherwise.
async fn send(bucket: &Bucket, path: &str, body: &[u8], is_conditional: bool) -> Result<(), Finding> {
    let mut request = bucket.put_object_builder(path, body);
    if is_conditional {
        request = request.with_header("if-none-match", "*").map_err(judge)?;
    }
    let response = request.execute().await.map_err(judge)?;
    if response.bytes().is_empty() {
        let reason = "the server acknowledged without an ETag".to_owned();
        return Err(Finding::Failed { reason, may_have_happened: true });
    }
    Ok(())
}

/// Gives up on an attempt at `until`.
async fn within<T>(until: Instant, attempt: impl Future<Output = Result<T, Finding>>) -> Result<T, Finding> {
    tokio::time::timeout_at(until, attempt).await.unwrap_or_else(|_| {
        Err(Finding::Failed { reason: "no answer in time".to_owned(), may_have_happened: true })
    })
}

fn unasked_condition(operation: &'static str, key: &str) -> Error {
    Error::refused(operation, key, "the server answers a condition that was not asked for")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    #[test]
    fn the_retries_of_the_library_are_off() {
        let aws = Aws {
            access_key_id: Some("AKIAEXAMPLE".to_owned()),
            secret_access_key: Some(Secret::new("hunter2")),
            region: "us-east-1".to_owned(),
            ..Aws::default()
        };
        S3Store::connect("data", "", &aws, Limits::default(), Arc::new(SystemClock)).unwrap();
        assert_eq!(s3::get_retries(), 0);
    }

    #[test]
    fn a_write_that_may_have_happened_is_unknown_whatever_came_last() {
        let refused = Finding::Refused("no".to_owned());
        let unreachable = Finding::Unreachable("gone".to_owned());
        let (clean, dirty) = (Tries::default(), Tries { may_have_happened: true, ..Tries::default() });
        let end = |tries: &Tries, operation, finding| tries.end(operation, "k", finding, String::new());
        for operation in ["put", "create", "delete"] {
            assert!(matches!(end(&clean, operation, &refused), Error::Refused { .. }));
            assert!(matches!(end(&clean, operation, &unreachable), Error::Unavailable { .. }));
            assert!(matches!(end(&dirty, operation, &refused), Error::Unknown { .. }));
            assert!(matches!(end(&dirty, operation, &unreachable), Error::Unknown { .. }));
        }
        for operation in ["get", "list"] {
            assert!(matches!(end(&dirty, operation, &refused), Error::Refused { .. }));
            assert!(matches!(end(&dirty, operation, &unreachable), Error::Unavailable { .. }));
        }
    }
}
