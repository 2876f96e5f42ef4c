//! A client of the REST API, for the command line and for tests.
//!
//! Answers come as [`Value`], in the shapes of [`crate::tenancy`]'s wire types.
//! Every call has a deadline. Redirects are not followed, and a server on this
//! machine is asked directly whatever proxy the environment names: the token
//! goes to the server that was given and to no one else.

use std::{collections::BTreeMap, fmt, time::Duration};

use reqwest::{
    Method, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::{
    model::{Epoch, Secret, TenantId, WorkloadId},
    tenancy::Side,
};

/// How long reaching the server may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How long an ordinary answer may take.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// How long a claim or a save may take beyond what the caller asked to wait;
/// state of any size may have to be moved.
const WORK_DEADLINE: Duration = Duration::from_secs(600);

/// Bytes of an answer at most.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// Asks one server.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    authorization: Option<HeaderValue>,
}

/// What a claim asks for; what is left out is not sent.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Claim {
    /// Which workload; the only one there is when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<WorkloadId>,
    /// Laid over the tenant's own metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    /// Environment for the program.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Secret files, by name; must be UTF-8, since JSON carries them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", serialize_with = "expose")]
    pub secrets: BTreeMap<String, Secret>,
    /// How long to wait for a slot, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
}

/// What a release asks for.
#[derive(Debug, Clone, Default)]
pub struct Release {
    /// Which workload; the only one there is when left out.
    pub workload: Option<WorkloadId>,
    /// Only this claim.
    pub epoch: Option<Epoch>,
    /// Whether to wait only until the release is journaled.
    pub accepted: bool,
}

/// A problem as the server answered it (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Problem {
    /// The HTTP status.
    pub status: u16,
    /// Stable, for programs.
    pub code: String,
    /// For people.
    pub detail: String,
    /// The field at fault.
    #[serde(default)]
    pub field: Option<String>,
    /// What would have been accepted.
    #[serde(default)]
    pub allowed: Vec<String>,
    /// How long to wait before another attempt.
    #[serde(default)]
    pub retry_after_ms: Option<u64>,
    /// The request's id in the server's log; from the header.
    #[serde(skip)]
    pub request_id: Option<String>,
}

/// Says why a call gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server's address cannot be used.
    #[error("the server's address {given:?} {problem}")]
    Address {
        /// The address, without credentials it may hold.
        given: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The token is none.
    #[error("the token holds characters that no token has")]
    Token,
    /// The client could not be set up.
    #[error("the HTTP client cannot be set up")]
    Setup(#[source] reqwest::Error),
    /// The server could not be reached; nothing was asked.
    #[error("the server at {url} cannot be reached")]
    Unreachable {
        /// Its address.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The request went out, and no whole answer came: what became of it is unknown.
    #[error("the server at {url} did not answer; the outcome is unknown")]
    NoAnswer {
        /// Its address.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The server answered with a problem.
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
    /// Something answered that is not a Boilerhouse server, or too much.
    #[error("the server at {url} answered {status} with what is no answer of a Boilerhouse server")]
    Unexpected {
        /// Its address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
}

// === impl Client ===

impl Client {
    /// Creates a client of the server at `url`, as `http://127.0.0.1:3000`; a
    /// path is kept as a prefix.
    ///
    /// # Errors
    /// [`Error::Address`], [`Error::Token`], [`Error::Setup`].
    pub fn new(url: &str, token: Option<&Secret>) -> Result<Self, Error> {
        let address = |problem: String| Error::Address { given: without_credentials(url), problem };
        let base = Url::parse(url).map_err(|error| address(format!("is no URL: {error}")))?;
        if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
            return Err(address("must begin with http:// or https:// and name a host".to_owned()));
        }
        if !base.username().is_empty() || base.password().is_some() {
            return Err(address("must not hold credentials; a token goes into BOILERHOUSE_TOKEN".to_owned()));
        }
        if base.query().is_some() || base.fragment().is_some() {
            return Err(address("must not have a query or a fragment".to_owned()));
        }
        let authorization = match token {
            None => None,
            Some(token) => {
                let text = [b"Bearer ", token.expose()].concat();
                let mut value = HeaderValue::from_bytes(&text).map_err(|_| Error::Token)?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let mut http = reqwest::Client::builder()
            .connect_timeout(CONNECT_DEADLINE)
            .redirect(reqwest::redirect::Policy::none());
        if is_loopback(&base) {
            http = http.no_proxy();
        }
        Ok(Self { http: http.build().map_err(Error::Setup)?, base, authorization })
    }

    /// Claims a container for a tenant.
    ///
    /// # Errors
    /// Those of every call: [`Error::Problem`] when the server refused,
    /// [`Error::Unreachable`], [`Error::NoAnswer`], [`Error::Unexpected`].
    pub async fn claim(&self, tenant: &TenantId, claim: &Claim) -> Result<Value, Error> {
        let deadline = WORK_DEADLINE.saturating_add(Duration::from_millis(claim.wait_ms.unwrap_or(0)));
        let body = serde_json::to_value(claim).expect("strings and numbers always serialise");
        self.call(Method::POST, &["tenants", tenant.as_str(), "claim"], &[], Some(body), deadline).await
    }

    /// Ends a tenant's claim.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn release(&self, tenant: &TenantId, release: &Release) -> Result<Value, Error> {
        let mut body = workload_body(release.workload.as_ref());
        if let Some(epoch) = release.epoch {
            body.insert("epoch".to_owned(), epoch.0.into());
        }
        let wait = if release.accepted { "accepted" } else { "durable" };
        body.insert("wait".to_owned(), wait.into());
        self.work(tenant, "release", body).await
    }

    /// Resets the idle clock of a tenant's claim.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn touch(&self, tenant: &TenantId, workload: Option<&WorkloadId>) -> Result<(), Error> {
        self.work(tenant, "touch", workload_body(workload)).await.map(drop)
    }

    /// Saves the state of a tenant's claim now.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn sync(&self, tenant: &TenantId, workload: Option<&WorkloadId>) -> Result<Value, Error> {
        self.work(tenant, "sync", workload_body(workload)).await
    }

    /// Brings a tenant's newest state to the server's node before its claim.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn prefetch(&self, tenant: &TenantId, workload: Option<&WorkloadId>) -> Result<Value, Error> {
        self.work(tenant, "prefetch", workload_body(workload)).await
    }

    /// Lists a tenant's snapshots, newest first.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn snapshots(
        &self,
        tenant: &TenantId,
        workload: Option<&WorkloadId>,
        before: Option<u64>,
        limit: Option<u64>,
    ) -> Result<Value, Error> {
        let numbers = [("before", before), ("limit", limit)]
            .map(|(name, number)| (name, number.map(|number| number.to_string())));
        let mut query: Vec<(&str, &str)> =
            workload.map(|workload| ("workload", workload.as_str())).into_iter().collect();
        query.extend(numbers.iter().filter_map(|(name, number)| Some((*name, number.as_deref()?))));
        let path = ["tenants", tenant.as_str(), "snapshots"];
        self.call(Method::GET, &path, &query, None, ANSWER_DEADLINE).await
    }

    /// Makes an old snapshot of a tenant the newest state again.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn restore(
        &self,
        tenant: &TenantId,
        workload: Option<&WorkloadId>,
        snapshot: u64,
    ) -> Result<Value, Error> {
        let mut body = workload_body(workload);
        body.insert("snapshot".to_owned(), snapshot.into());
        self.work(tenant, "restore", body).await
    }

    /// Decides whose state stands when a server's is in conflict with the store's.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn resolve(
        &self,
        tenant: &TenantId,
        workload: Option<&WorkloadId>,
        keep: Side,
        discard: bool,
    ) -> Result<Value, Error> {
        let mut body = workload_body(workload);
        body.insert("keep".to_owned(), json!(keep));
        body.insert("discard".to_owned(), discard.into());
        self.work(tenant, "resolve", body).await
    }

    /// Gives a tenant without state a copy of another's snapshot.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn fork(
        &self,
        tenant: &TenantId,
        from: &TenantId,
        workload: Option<&WorkloadId>,
        snapshot: Option<u64>,
    ) -> Result<Value, Error> {
        let mut body = workload_body(workload);
        body.insert("from".to_owned(), from.as_str().into());
        if let Some(snapshot) = snapshot {
            body.insert("snapshot".to_owned(), snapshot.into());
        }
        self.work(tenant, "fork", body).await
    }

    /// Erases a tenant everywhere.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn erase(&self, tenant: &TenantId) -> Result<Value, Error> {
        self.call(Method::DELETE, &["tenants", tenant.as_str()], &[], None, WORK_DEADLINE).await
    }

    /// Removes from the store what no kept snapshot needs, of all tenants or of one.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn collect(
        &self,
        tenant: Option<&TenantId>,
        workload: Option<&WorkloadId>,
    ) -> Result<Value, Error> {
        let mut body = workload_body(workload);
        if let Some(tenant) = tenant {
            body.insert("tenant".to_owned(), tenant.as_str().into());
        }
        self.call(Method::POST, &["state", "gc"], &[], Some(Value::Object(body)), WORK_DEADLINE).await
    }

    /// Shows a tenant's claims and snapshots.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn status(&self, tenant: &TenantId, workload: Option<&WorkloadId>) -> Result<Value, Error> {
        let query: Vec<(&str, &str)> =
            workload.map(|workload| ("workload", workload.as_str())).into_iter().collect();
        let path = ["tenants", tenant.as_str(), "status"];
        self.call(Method::GET, &path, &query, None, ANSWER_DEADLINE).await
    }

    /// Replaces a tenant's metadata.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn put_tenant(&self, tenant: &TenantId, metadata: &Map<String, Value>) -> Result<(), Error> {
        let body = json!({ "metadata": metadata });
        let path = ["tenants", tenant.as_str()];
        self.call(Method::PUT, &path, &[], Some(body), ANSWER_DEADLINE).await.map(drop)
    }

    /// Stores a secret of a tenant; it must be UTF-8.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn put_secret(&self, tenant: &TenantId, name: &str, secret: &Secret) -> Result<(), Error> {
        let body = json!({ "value": String::from_utf8_lossy(secret.expose()) });
        let path = ["tenants", tenant.as_str(), "secrets", name];
        self.call(Method::PUT, &path, &[], Some(body), ANSWER_DEADLINE).await.map(drop)
    }

    /// Lists the names of a tenant's stored secrets: `{"names": [...]}`.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn secret_names(&self, tenant: &TenantId) -> Result<Value, Error> {
        self.get(&["tenants", tenant.as_str(), "secrets"]).await
    }

    /// Deletes a stored secret of a tenant.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn delete_secret(&self, tenant: &TenantId, name: &str) -> Result<(), Error> {
        let path = ["tenants", tenant.as_str(), "secrets", name];
        self.call(Method::DELETE, &path, &[], None, ANSWER_DEADLINE).await.map(drop)
    }

    /// Lists the workloads.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn workloads(&self) -> Result<Value, Error> {
        self.get(&["workloads"]).await
    }

    /// Lists the pools.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn pools(&self) -> Result<Value, Error> {
        self.get(&["pools"]).await
    }

    /// Lists the slots.
    ///
    /// # Errors
    /// See [`Client::claim`].
    pub async fn slots(&self) -> Result<Value, Error> {
        self.get(&["slots"]).await
    }

    async fn get(&self, path: &[&str]) -> Result<Value, Error> {
        self.call(Method::GET, path, &[], None, ANSWER_DEADLINE).await
    }

    async fn work(&self, tenant: &TenantId, verb: &str, body: Map<String, Value>) -> Result<Value, Error> {
        let path = ["tenants", tenant.as_str(), verb];
        self.call(Method::POST, &path, &[], Some(Value::Object(body)), WORK_DEADLINE).await
    }

    /// Makes one call; an answer without a body is `null`.
    async fn call(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<Value>,
        deadline: Duration,
    ) -> Result<Value, Error> {
        let url = self.url(path);
        let mut request = self.http.request(method, url).query(query).timeout(deadline);
        if let Some(value) = &self.authorization {
            request = request.header(AUTHORIZATION, value);
        }
        if let Some(body) = &body {
            request = request.json(body);
        }
        let server = || self.base.to_string();
        let mut response = request.send().await.map_err(|source| {
            if source.is_connect() {
                Error::Unreachable { url: server(), source }
            } else {
                Error::NoAnswer { url: server(), source }
            }
        })?;
        let status = response.status();
        let is_problem = response
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"application/problem+json"));
        let request_id =
            response.headers().get("x-request-id").and_then(|value| value.to_str().ok()).map(str::to_owned);
        let unexpected = || Error::Unexpected { url: server(), status: status.as_u16() };
        let mut bytes = Vec::new();
        while let Some(chunk) =
            response.chunk().await.map_err(|source| Error::NoAnswer { url: server(), source })?
        {
            if bytes.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(unexpected());
            }
            bytes.extend_from_slice(&chunk);
        }
        if is_problem {
            let mut problem: Problem = serde_json::from_slice(&bytes).map_err(|_| unexpected())?;
            problem.request_id = request_id;
            return Err(Error::Problem(Box::new(problem)));
        }
        match status {
            StatusCode::NO_CONTENT => Ok(Value::Null),
            StatusCode::OK => serde_json::from_slice(&bytes).map_err(|_| unexpected()),
            _ => Err(unexpected()),
        }
    }

    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        url.path_segments_mut().expect("http and https addresses have paths").pop_if_empty().extend(path);
        url
    }
}

fn workload_body(workload: Option<&WorkloadId>) -> Map<String, Value> {
    workload.map(|workload| ("workload".to_owned(), workload.as_str().into())).into_iter().collect()
}

fn expose<S: Serializer>(secrets: &BTreeMap<String, Secret>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer
        .collect_map(secrets.iter().map(|(name, secret)| (name, String::from_utf8_lossy(secret.expose()))))
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Cuts what stands before an `@`, which may be a password.
fn without_credentials(url: &str) -> String {
    let shown = match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}://***{}", &url[..scheme], &url[at..]),
        (None, Some(at)) => format!("***{}", &url[at..]),
        _ => url.to_owned(),
    };
    shown.chars().take(200).collect()
}

// === impl Problem ===

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.code, self.status, self.detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_addresses_are_taken() {
        for good in ["http://127.0.0.1:3000", "https://bh.example/pool/", "http://[::1]:1"] {
            assert!(Client::new(good, None).is_ok(), "{good}");
        }
        for bad in ["", "localhost:3000", "ftp://x", "http://", "http://x?y=1", "http://x#y", "unix:/x"] {
            assert!(matches!(Client::new(bad, None), Err(Error::Address { .. })), "{bad:?}");
        }
        for text in ["http://me:hunter2@x", "me:hunter2@x", "http://me:hunter2@x?a@b"] {
            let error = Client::new(text, None).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_token_is_text_and_does_not_print() {
        assert!(matches!(Client::new("http://x", Some(&Secret::new("a\nb"))), Err(Error::Token)));
        let client = Client::new("http://x", Some(&Secret::new("hunter2"))).unwrap();
        assert!(!format!("{client:?}").contains("hunter2"));
    }

    #[test]
    fn paths_are_laid_under_the_address_and_encoded() {
        for (base, expected) in [
            ("http://x", "http://x/tenants/a/secrets/..%2Fk%20y"),
            ("http://x/pre", "http://x/pre/tenants/a/secrets/..%2Fk%20y"),
            ("http://x/pre/", "http://x/pre/tenants/a/secrets/..%2Fk%20y"),
        ] {
            let client = Client::new(base, None).unwrap();
            assert_eq!(client.url(&["tenants", "a", "secrets", "../k y"]).as_str(), expected);
        }
    }

    #[test]
    fn a_claim_sends_what_was_given() {
        assert_eq!(serde_json::to_value(Claim::default()).unwrap(), json!({}));
        let claim = Claim {
            secrets: [("k".to_owned(), Secret::new("v"))].into(),
            wait_ms: Some(5),
            ..Claim::default()
        };
        assert_eq!(serde_json::to_value(claim).unwrap(), json!({"secrets": {"k": "v"}, "wait_ms": 5}));
    }
}
