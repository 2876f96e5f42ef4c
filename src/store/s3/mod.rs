//! Amazon S3 and its relatives.
//!
//! rust-s3 names places, keeps credentials, signs requests and knows the
//! documents; the requests go out through `wire`, which says why. Each call
//! has a deadline, within it several attempts with jittered waits between. An
//! attempt has the time that its body's size asks for, and is left early when
//! nothing moves. How many requests are under way follows from how the server
//! answers (`gate`).
//!
//! # Guarantees
//! - A write of which any attempt may have arrived and none was answered is
//!   [`Error::Unknown`], also when a later attempt was refused.
//! - A `create` that was tried twice may meet its own object: it then answers
//!   [`Creation::Exists`], and the caller reads it back.
//! - Bodies are signed (SHA-256), so that a damaged one is refused; a body that
//!   is shorter than announced is an error.
//! - No more than 256 MiB of bodies are under way, those of small objects (at
//!   most 256 KiB each) included, and nothing here copies a body that is sent.
//! - No error text holds a credential or a signature.
//!
//! A `put` or `delete` that was given up may still land after a later write of
//! the same key, as with every S3 client: names that are written once, or by
//! `create`, are safe from it.
//!
//! # Cancel safety
//! A dropped call is a write with an unknown outcome.

mod answer;
mod copies;
mod gate;
mod identity;
mod parts;
mod place;
mod wire;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use reqwest::Method;
use s3::serde_types::ListBucketResult;
use tokio::time::Instant;

use self::{
    answer::{Finding, presentable},
    gate::{Gate, SMALL_BYTES, Sign, Size, Turn, size_of},
    identity::Identity,
    place::Place,
    wire::{Ask, Payload, Wire},
};
use super::{
    Creation, Error, Listed, MAX_LIST_KEYS, MAX_OBJECT_BYTES, Parts, Store, Versioning, key, key::Names,
    probe,
};
use crate::{clock::SharedClock, config::Aws, retry::Backoff};

/// No server is left alone for longer because it asks for it.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Keeps objects in a bucket, under a prefix.
pub struct S3Store {
    wire: Wire,
    gate: Gate,
    bucket: String,
    prefix: String,
    limits: Limits,
    clock: SharedClock,
    names: Names,
    /// What a request without a body carries.
    empty: Payload,
}

/// Bounds of every call.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// No attempt of a call begins later than this, in milliseconds; the last one
    /// may last beyond it, for `attempt_ms` and what its body's size asks for.
    pub call_ms: u64,
    /// The time of the first attempt without its body's, in milliseconds; each
    /// next has twice as much, so that a hanging server is left early and a slow
    /// one is not.
    pub attempt_ms: u64,
    /// A body that moves slower than this is given up, in bytes a second.
    pub floor_bytes: u64,
    /// A body of which nothing moves for so long is given up, in milliseconds.
    pub stall_ms: u64,
    /// So many attempts in a row may find no server before the call gives up
    /// early.
    pub unreachable_attempts: u32,
    /// An object that is larger is copied within the store by parts of this size, in
    /// bytes; S3 copies at most 5 GiB at once.
    pub copy_part_bytes: u64,
    /// The waits between attempts.
    pub backoff: Backoff,
    /// At most so many requests of small bodies are under way at a time, and as
    /// many of large ones, but no more than 32.
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
    turn: Turn,
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
            floor_bytes: 256 << 10,
            stall_ms: 15_000,
            unreachable_attempts: 3,
            copy_part_bytes: 512 << 20,
            backoff: Backoff { base_ms: 100, cap_ms: 5_000 },
            requests: 128,
        }
    }
}

impl Limits {
    /// Returns the time that a body of this size may take.
    fn time_of(&self, bytes: u64) -> Duration {
        Duration::from_millis(bytes.saturating_mul(1000) / self.floor_bytes.max(1))
    }
}

// === impl Tries ===

impl Tries {
    /// Makes the error with which a call ends after these attempts.
    fn end(&self, operation: &'static str, key: &str, finding: &Finding, reason: String) -> Error {
        let is_write = matches!(operation, "put" | "create" | "delete" | "copy" | "put_parts");
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
        let Place { bucket, prefix, source, authorities } = Place::new(bucket, prefix, aws)?;
        let (name, gate) = (bucket.name(), Gate::new(limits.requests));
        let wire = Identity::new(source, Arc::clone(&clock))
            .and_then(|identity| Wire::new(bucket, identity, authorities.as_deref(), &limits))
            .map_err(|fault| Error::refused("connect", &format!("s3://{name}/{prefix}"), fault))?;
        Ok(Self {
            wire,
            gate,
            bucket: name,
            prefix,
            limits,
            clock,
            names: Names::Own,
            empty: Payload::empty(),
        })
    }

    /// Reads, and only reads, what others have written: names are whatever S3 keeps as
    /// it is.
    #[must_use]
    pub fn of_others(self) -> Self {
        Self { names: Names::Foreign, ..self }
    }

    /// Returns how many requests may be under way now, of small bodies and of
    /// large ones: fewer while the server has too much to do.
    pub fn concurrency(&self) -> (usize, usize) {
        self.gate.limits()
    }

    /// Returns the bytes of large bodies that are under way, and the most there
    /// ever were.
    pub fn bytes_under_way(&self) -> (u64, u64) {
        self.gate.bytes()
    }

    fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Describes a request without a body.
    fn ask<'a>(&'a self, method: Method, path: &'a str) -> Ask<'a> {
        Ask { method, path, query: Vec::new(), headers: Vec::new(), payload: &self.empty }
    }

    /// Makes attempts until one is answered for good or the deadline is near.
    async fn call<T, F>(
        &self,
        operation: &'static str,
        key: &str,
        size: Size,
        attempt: impl Fn(Attempt) -> F,
    ) -> Result<Answer<T>, Error>
    where
        F: Future<Output = Result<T, Finding>>,
    {
        let deadline = Instant::now() + Duration::from_millis(self.limits.call_ms);
        let mut tries = Tries::default();
        loop {
            let finding = match tokio::time::timeout_at(deadline, self.gate.enter(size)).await {
                Ok(turn) => {
                    let began = Instant::now();
                    let least = Duration::from_millis(self.limits.attempt_ms);
                    let grown = least.saturating_mul(1 << tries.attempts.min(16));
                    // Also the last one has its time: an attempt that is cut off
                    // at once turns what is known into what is not.
                    let until = deadline.min(began + grown).max(began + least);
                    let outcome = attempt(Attempt { until, turn }).await;
                    self.gate.note(size, began, sign_of(&outcome));
                    match outcome {
                        Ok(answer) => return Ok(Answer::Done(answer)),
                        Err(finding) => finding,
                    }
                }
                Err(_) => Finding::Failed {
                    reason: "no free connection".to_owned(),
                    may_have_happened: false,
                    pressure: None,
                },
            };
            tries.attempts += 1;
            let (reason, asked) = match &finding {
                Finding::Absent => return Ok(Answer::Absent),
                Finding::Precondition => return Ok(Answer::Precondition),
                Finding::Refused(reason) => {
                    let error = tries.end(operation, key, &finding, self.presentable(reason));
                    return Err(error);
                }
                Finding::Unreachable(reason) => {
                    tries.unreachable_in_a_row += 1;
                    (reason, None)
                }
                Finding::Failed { reason, may_have_happened, pressure } => {
                    tries.unreachable_in_a_row = 0;
                    tries.may_have_happened |= may_have_happened;
                    (reason, *pressure)
                }
            };
            let reason = self.presentable(reason);
            let wait = self.limits.backoff.wait(tries.attempts - 1, &*self.clock);
            let wait = wait.max(asked.unwrap_or_default().min(MAX_RETRY_AFTER));
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
        let size = size_of(body.len() as u64);
        let payload = Payload::new(body).await;
        let mut ask = Ask { payload: &payload, ..self.ask(Method::PUT, &path) };
        ask.headers.push(("content-type", "application/octet-stream".to_owned()));
        if is_conditional {
            ask.headers.push(("if-none-match", "*".to_owned()));
        }
        let ask = &ask;
        self.call(operation, key, size, async |attempt: Attempt| {
            let _turn = attempt.turn;
            self.wire.write(ask, &self.limits, attempt.until).await.map(|_| ())
        })
        .await
    }

    /// Reads the body of an object, or of a part of one.
    async fn read(&self, ask: &Ask<'_>, mut attempt: Attempt, is_range: bool) -> Result<Bytes, Finding> {
        let reply = self.wire.send(ask, &self.limits, attempt.until).await?;
        if is_range && reply.status() != 206 {
            return Err(Finding::Refused("the server ignores ranges".to_owned()));
        }
        let bytes = reply.announced.unwrap_or(MAX_OBJECT_BYTES as u64);
        if !is_range && bytes > SMALL_BYTES {
            // How large it is, only its answer says.
            let enlarged =
                tokio::time::timeout_at(attempt.until, self.gate.enlarge(attempt.turn, bytes)).await;
            attempt.turn = match enlarged {
                Ok(Some(turn)) => turn,
                Ok(None) | Err(_) => {
                    return Err(Finding::Failed {
                        reason: "too many large objects are read at a time".to_owned(),
                        may_have_happened: false,
                        pressure: None,
                    });
                }
            };
            attempt.until = attempt.until.max(Instant::now() + Duration::from_millis(self.limits.stall_ms));
        }
        reply.read(MAX_OBJECT_BYTES, &self.limits, attempt.until).await
    }

    /// Lists one page; returns it with the token of the next.
    async fn page(
        &self,
        prefix: &str,
        after: Option<&str>,
        token: Option<String>,
        limit: usize,
    ) -> Result<(Vec<Listed>, Option<String>), Error> {
        let mut ask = self.ask(Method::GET, "");
        ask.query.push(("list-type", "2".to_owned()));
        ask.query.push(("prefix", self.full_key(prefix)));
        ask.query.push(("max-keys", limit.to_string()));
        ask.query.extend(after.map(|after| ("start-after", self.full_key(after))));
        ask.query.extend(token.map(|token| ("continuation-token", token)));
        let ask = &ask;
        let answer = self
            .call("list", prefix, Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                let document = self.wire.ask(ask, &self.limits, attempt.until).await?;
                answer::parse::<ListBucketResult>(&document)
            })
            .await?;
        let Answer::Done(page) = answer else {
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
                let modified_ms = answer::unix_ms(&object.last_modified).unwrap_or(0);
                Some(Listed { key, bytes: object.size, modified_ms })
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::refused("list", prefix, "the server ignores the prefix of a listing"))?;
        Ok((listed, page.next_continuation_token.filter(|_| page.is_truncated)))
    }

    fn presentable(&self, reason: &str) -> String {
        let keys = self.wire.keys();
        let secrets = keys.iter().flat_map(|keys| {
            let id = std::iter::once(keys.id.as_bytes());
            id.chain([&keys.secret].into_iter().chain(&keys.token).map(|secret| secret.expose()))
        });
        presentable(reason, secrets.filter_map(|secret| std::str::from_utf8(secret).ok()))
    }
}

#[async_trait]
impl Store for S3Store {
    async fn probe(&self) -> Result<(), Error> {
        probe::probe_create(self, &*self.clock).await
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        key::check_key_of(self.names, "get", key)?;
        let path = self.full_key(key);
        let ask = &self.ask(Method::GET, &path);
        let answer = self.call("get", key, Size::Unknown, |attempt| self.read(ask, attempt, false)).await?;
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
        key::check_list_of(self.names, prefix, after, limit)?;
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
        let path = self.full_key(key);
        let ask = &self.ask(Method::DELETE, &path);
        let answer = self
            .call("delete", key, Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                self.wire.ask(ask, &self.limits, attempt.until).await
            })
            .await?;
        match answer {
            Answer::Done(_) | Answer::Absent => Ok(()),
            Answer::Precondition => Err(unasked_condition("delete", key)),
        }
    }

    async fn copy(&self, from: &str, to: &str) -> Result<bool, Error> {
        key::check_key("copy", from)?;
        key::check_key("copy", to)?;
        self.copy_object(from, to).await
    }

    async fn get_range(&self, key: &str, offset: u64, bytes: u64) -> Result<Option<Bytes>, Error> {
        key::check_key_of(self.names, "get_range", key)?;
        key::check_range(key, offset, bytes)?;
        let path = self.full_key(key);
        // A range is never empty: of no bytes, one is asked for and dropped.
        let end = offset.saturating_add(bytes.max(1) - 1);
        let mut ask = self.ask(Method::GET, &path);
        ask.headers.push(("range", format!("bytes={offset}-{end}")));
        let ask = &ask;
        let answer = self
            .call("get_range", key, size_of(bytes), async |attempt| {
                self.read(ask, attempt, true).await.or_else(answer::past_the_end)
            })
            .await?;
        match answer {
            Answer::Done(body) if body.len() as u64 > bytes.max(1) => {
                Err(Error::refused("get_range", key, "the server answers more than the range"))
            }
            Answer::Done(body) => Ok(Some(key::cut(&body, 0, bytes))),
            Answer::Absent => Ok(None),
            Answer::Precondition => Err(unasked_condition("get_range", key)),
        }
    }

    async fn put_parts(&self, key: &str, parts: Parts) -> Result<(), Error> {
        key::check_key("put_parts", key)?;
        self.write_parts(key, parts).await
    }

    async fn versioning(&self) -> Result<Versioning, Error> {
        let mut ask = self.ask(Method::GET, "");
        ask.query.push(("versioning", String::new()));
        let ask = &ask;
        let answer = self
            .call("versioning", "", Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                self.wire.ask(ask, &self.limits, attempt.until).await
            })
            .await;
        match answer {
            Ok(Answer::Done(document)) => Ok(answer::versioning(&document)),
            // Many keys may write objects and not ask for this.
            Ok(Answer::Absent | Answer::Precondition) | Err(Error::Refused { .. }) => Ok(Versioning::Unknown),
            Err(error) => Err(error),
        }
    }

    async fn abort_uploads(&self, before_ms: u64) -> Result<u64, Error> {
        self.abort_parts(before_ms).await
    }
}

/// Says what an attempt showed of the server.
fn sign_of<T>(outcome: &Result<T, Finding>) -> Sign {
    match outcome {
        Ok(_) | Err(Finding::Absent | Finding::Precondition) => Sign::Answered,
        Err(Finding::Failed { pressure: Some(_), .. }) => Sign::Overloaded,
        Err(Finding::Failed { .. } | Finding::Refused(_) | Finding::Unreachable(_)) => Sign::None,
    }
}

fn unasked_condition(operation: &'static str, key: &str) -> Error {
    Error::refused(operation, key, "the server answers a condition that was not asked for")
}

#[cfg(test)]
mod tests {
    use super::*;

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
