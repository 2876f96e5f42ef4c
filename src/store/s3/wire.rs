//! One request on its way and its answer, with the deadlines of both.
//!
//! rust-s3 names the place, knows the credentials and signs; the body goes out
//! through a client of our own. The library hashes each body three times and
//! copies it twice, shows no header of an error, takes no certificate authority
//! and has one deadline for head and body. Here a body is hashed once, before
//! the first attempt, and sent as slices of what the caller gave: no copy, and
//! each slice that leaves is progress that can be watched.
//!
//! A body of which nothing moves for `stall_ms` is given up long before its
//! deadline, which follows from its size.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use hmac::Mac as _;
use reqwest::{Body, Certificate, Client, Method, Url, header::HeaderMap, redirect};
use s3::{Bucket, signing};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{
    Limits,
    answer::{self, Finding},
    identity::{Identity, Keys},
};
use crate::store::MAX_OBJECT_BYTES;

/// A body leaves in slices of so many bytes.
const SLICE_BYTES: usize = 128 << 10;

/// A server that takes no connection for so long is not there, in milliseconds.
const CONNECT_MS: u64 = 5_000;

/// Servers close idle connections after about this time: reusing one later
/// would meet its end, in milliseconds.
const IDLE_MS: u64 = 15_000;

/// An error document or a listing is not longer, in bytes.
const MAX_DOCUMENT_BYTES: usize = 8 << 20;

/// From this size on, a body is hashed on a blocking thread.
const OFFLOAD_BYTES: usize = 128 << 10;

/// Sends signed requests to one bucket.
pub(super) struct Wire {
    client: Client,
    bucket: Bucket,
    identity: Identity,
}

/// A body with the digest that its signature covers.
#[derive(Clone)]
pub(super) struct Payload {
    body: Bytes,
    sha256: String,
}

/// What is asked.
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    /// The whole key; empty for the bucket.
    pub(super) path: &'a str,
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) payload: &'a Payload,
}

/// The beginning of an answer of success, its body still on its way.
pub(super) struct Reply {
    response: reqwest::Response,
    /// The length that the server announced; none: a chunked body, whose end
    /// the HTTP library proves.
    pub(super) announced: Option<u64>,
}

/// How far a body has come.
struct Progress {
    start: Instant,
    last_ms: AtomicU64,
    is_done: AtomicBool,
}

// === impl Payload ===

impl Payload {
    /// Makes the payload of a request without a body.
    pub(super) fn empty() -> Self {
        Self::hash(Bytes::new())
    }

    /// Hashes a body, elsewhere when that takes long.
    pub(super) async fn new(body: Bytes) -> Self {
        if body.len() < OFFLOAD_BYTES {
            return Self::hash(body);
        }
        let held = body.clone();
        match tokio::task::spawn_blocking(move || Self::hash(held)).await {
            Ok(payload) => payload,
            // The runtime is shutting down.
            Err(_) => Self::hash(body),
        }
    }

    /// Returns the length of its body.
    pub(super) fn bytes(&self) -> u64 {
        self.body.len() as u64
    }

    fn hash(body: Bytes) -> Self {
        let sha256 = hex::encode(Sha256::digest(&body));
        Self { body, sha256 }
    }
}

// === impl Progress ===

impl Progress {
    fn new() -> Self {
        Self { start: Instant::now(), last_ms: AtomicU64::new(0), is_done: AtomicBool::new(false) }
    }

    fn note(&self) {
        let elapsed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(elapsed, Ordering::Relaxed);
    }

    /// Waits until nothing has moved for `stall`; for ever once all is gone.
    async fn stalled(&self, stall: Duration) {
        loop {
            let last = self.start + Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
            tokio::time::sleep_until(last + stall).await;
            if self.is_done.load(Ordering::Relaxed) {
                return std::future::pending().await;
            }
            let now = self.start + Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
            if now == last {
                return;
            }
        }
    }
}

// === impl Wire ===

impl Wire {
    /// Makes the client; `authorities` (PEM) replace the built-in ones.
    pub(super) fn new(
        bucket: Bucket,
        identity: Identity,
        authorities: Option<&[u8]>,
        limits: &Limits,
    ) -> Result<Self, String> {
        let mut client = Client::builder()
            .redirect(redirect::Policy::none())
            .connect_timeout(Duration::from_millis(CONNECT_MS.min(limits.attempt_ms)))
            .pool_idle_timeout(Duration::from_millis(IDLE_MS))
            .pool_max_idle_per_host(limits.requests)
            .tcp_nodelay(true)
            .http1_only();
        if let Some(pem) = authorities {
            let found =
                Certificate::from_pem_bundle(pem).map_err(|_| "AWS_CA_BUNDLE holds no certificate in PEM")?;
            if found.is_empty() {
                return Err("AWS_CA_BUNDLE holds no certificate in PEM".to_owned());
            }
            client = client.tls_built_in_root_certs(false);
            for authority in found {
                client = client.add_root_certificate(authority);
            }
        }
        let client = client.build().map_err(|error| format!("the HTTP client cannot be made: {error}"))?;
        Ok(Self { client, bucket, identity })
    }

    /// Returns what no text may show.
    pub(super) fn keys(&self) -> Option<Arc<Keys>> {
        self.identity.current()
    }

    /// Sends a request and returns the beginning of its answer.
    ///
    /// `until` is the end of the attempt for a request without a body; one with
    /// a body has the time beyond it that its size asks for.
    pub(super) async fn send(
        &self,
        ask: &Ask<'_>,
        limits: &Limits,
        until: Instant,
    ) -> Result<Reply, Finding> {
        let keys = tokio::time::timeout_at(until, self.identity.keys()).await;
        let keys = keys.unwrap_or_else(|_| Err(Finding::late("no credentials in time").harmless()))?;
        let (url, headers) = self.sign(ask, &keys).map_err(Finding::Refused)?;
        let until = until + limits.time_of(ask.payload.bytes());
        let progress = Arc::new(Progress::new());
        let request = self.client.request(ask.method.clone(), url).headers(headers);
        let request = match ask.payload.body.is_empty() {
            true => {
                progress.is_done.store(true, Ordering::Relaxed);
                request
            }
            false => request.body(watched(ask.payload.body.clone(), Arc::clone(&progress))),
        };
        let stall = Duration::from_millis(limits.stall_ms);
        let response = tokio::select! {
            biased;
            answer = request.send() => answer.map_err(answer::judge_transport)?,
            () = progress.stalled(stall) => return Err(Finding::late("the server stopped reading the body")),
            () = tokio::time::sleep_until(until) => return Err(Finding::late("no answer in time")),
        };
        let status = response.status();
        let announced = response.headers().get("content-length");
        let announced = announced.and_then(|length| length.to_str().ok()?.parse().ok());
        let retry_after = retry_after(response.headers());
        let reply = Reply { response, announced };
        if status.is_success() {
            return Ok(reply);
        }
        let document = reply.read(MAX_DOCUMENT_BYTES, limits, until).await;
        // Of an answer that broke off, the status is still what the server said.
        let document = document.unwrap_or_default();
        Err(answer::judge_status(status.as_u16(), &String::from_utf8_lossy(&document), retry_after))
    }

    /// Sends a request whose answer is a short document, and returns that.
    pub(super) async fn ask(&self, ask: &Ask<'_>, limits: &Limits, until: Instant) -> Result<Bytes, Finding> {
        let reply = self.send(ask, limits, until).await?;
        reply.read(MAX_DOCUMENT_BYTES, limits, until + limits.time_of(ask.payload.bytes())).await
    }

    /// Sends a write and returns the ETag, quotes included, that acknowledges
    /// it. An answer without one is not an S3 server's.
    pub(super) async fn write(
        &self,
        ask: &Ask<'_>,
        limits: &Limits,
        until: Instant,
    ) -> Result<String, Finding> {
        let reply = self.send(ask, limits, until).await?;
        let etag = reply.header("etag").filter(|etag| !etag.is_empty()).map(str::to_owned);
        // Read to its end, or the connection is of no more use.
        let _ = reply.read(MAX_DOCUMENT_BYTES, limits, until + limits.time_of(ask.payload.bytes())).await;
        etag.ok_or_else(|| Finding::late("the server acknowledged without an ETag"))
    }

    fn sign(&self, ask: &Ask<'_>, keys: &Keys) -> Result<(Url, HeaderMap), String> {
        let fault = |what: &str| format!("the request could not be made: {what}");
        let address = format!("{}/{}", self.bucket.url(), signing::uri_encode(ask.path, false));
        let mut url = Url::parse(&address).map_err(|_| fault("its address"))?;
        for (name, value) in &ask.query {
            url.query_pairs_mut().append_pair(name, value);
        }
        let secret = std::str::from_utf8(keys.secret.expose()).map_err(|_| fault("its credentials"))?;
        let now = OffsetDateTime::now_utc();
        let date = format!(
            "{:04}{:02}{:02}T{:02}{:02}{:02}Z",
            now.year(),
            u8::from(now.month()),
            now.day(),
            now.hour(),
            now.minute(),
            now.second()
        );
        let host = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (Some(host), None) => host.to_owned(),
            (None, _) => return Err(fault("its host")),
        };
        let mut headers = HeaderMap::new();
        let mut insert = |name: &'static str, value: &str| match value.parse() {
            Ok(value) => {
                headers.insert(name, value);
                Ok(())
            }
            Err(_) => Err(fault(name)),
        };
        insert("host", &host)?;
        insert("x-amz-date", &date)?;
        insert("x-amz-content-sha256", &ask.payload.sha256)?;
        if let Some(token) = &keys.token {
            let token = std::str::from_utf8(token.expose()).map_err(|_| fault("its session token"))?;
            insert("x-amz-security-token", token)?;
        }
        for (name, value) in &ask.headers {
            insert(name, value)?;
        }
        let has_body = matches!(ask.method, Method::PUT | Method::POST);
        if has_body {
            insert("content-length", &ask.payload.body.len().to_string())?;
        }
        let region = self.bucket.region();
        let signed = (|| {
            let names = signing::signed_header_string(&headers);
            let request = canonical_request(ask, &url, &headers, &names)?;
            let text = signing::string_to_sign(&now, &region, &request)?;
            let key = signing::signing_key(&now, secret, &region, "s3")?;
            let mut mac = signing::HmacSha256::new_from_slice(&key)?;
            mac.update(text.as_bytes());
            let signature = hex::encode(mac.finalize().into_bytes());
            signing::authorization_header(&keys.id, &now, &region, &names, &signature)
        })();
        let signed: Result<String, s3::error::S3Error> = signed;
        let mut signed = signed
            .ok()
            .and_then(|text| reqwest::header::HeaderValue::try_from(text).ok())
            .ok_or_else(|| fault("its signature"))?;
        signed.set_sensitive(true);
        headers.insert("authorization", signed);
        if let Some(token) = headers.get_mut("x-amz-security-token") {
            token.set_sensitive(true);
        }
        Ok((url, headers))
    }
}

// === impl Reply ===

impl Reply {
    /// Returns the status.
    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// Returns a header that is text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// Reads the whole body, of at most `limit` bytes.
    pub(super) async fn read(
        mut self,
        limit: usize,
        limits: &Limits,
        until: Instant,
    ) -> Result<Bytes, Finding> {
        let announced = self.announced.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        if announced.is_some_and(|bytes| bytes > limit) {
            return Err(Finding::Refused(format!("the answer has more than {limit} bytes")));
        }
        let until = until + limits.time_of(announced.unwrap_or(MAX_OBJECT_BYTES) as u64);
        let mut body = BytesMut::with_capacity(announced.unwrap_or(0));
        loop {
            let stall = Instant::now() + Duration::from_millis(limits.stall_ms);
            let chunk = tokio::time::timeout_at(stall.min(until), self.response.chunk()).await;
            match chunk {
                Ok(Ok(Some(chunk))) => body.extend_from_slice(&chunk),
                Ok(Ok(None)) => break,
                Ok(Err(error)) => return Err(answer::judge_transport(error)),
                Err(_) if stall < until => return Err(Finding::late("the body stopped")),
                Err(_) => return Err(Finding::late("no end of the body in time")),
            }
            if body.len() > limit {
                return Err(Finding::Refused(format!("the answer has more than {limit} bytes")));
            }
        }
        answer::check_length(announced, body.len())?;
        Ok(body.freeze())
    }
}

/// Writes a request as its signature covers it. The library's own sorts headers with
/// their colons, which puts `x-amz-copy-source-range` before `x-amz-copy-source`.
fn canonical_request(
    ask: &Ask<'_>,
    url: &Url,
    headers: &HeaderMap,
    names: &str,
) -> Result<String, s3::error::S3Error> {
    let mut lines = headers
        .iter()
        .map(|(name, value)| Ok((name.as_str(), value.to_str()?.trim())))
        .collect::<Result<Vec<_>, s3::error::S3Error>>()?;
    lines.sort_unstable();
    let lines: String = lines.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    let (path, query) = (signing::canonical_uri_string(url), signing::canonical_query_string(url));
    Ok(format!("{}\n{path}\n{query}\n{lines}\n{names}\n{}", ask.method, ask.payload.sha256))
}

/// Makes a body that notes each slice that leaves.
fn watched(body: Bytes, progress: Arc<Progress>) -> Body {
    Body::wrap_stream(stream::unfold((body, progress), async |(mut rest, progress)| {
        progress.note();
        if rest.is_empty() {
            return None;
        }
        let slice = rest.split_to(rest.len().min(SLICE_BYTES));
        // The end is not asked for: the length says where it is.
        progress.is_done.store(rest.is_empty(), Ordering::Relaxed);
        Some((Ok::<_, std::io::Error>(slice), (rest, progress)))
    }))
}

/// Reads how long the server asks to be left alone.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    answer::retry_after(headers.get("retry-after")?.to_str().ok()?, OffsetDateTime::now_utc())
}
