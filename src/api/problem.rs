//! Errors as they are answered: RFC 9457 `application/problem+json`.
//!
//! | code | status | when |
//! |---|---|---|
//! | `invalid_json` | 400 | the body is no JSON; `detail` has line and column |
//! | `invalid_path` | 400 | the path is not UTF-8 once decoded |
//! | `unexpected_body` | 400 | a body where none is taken |
//! | `unauthenticated` | 401 | no token, or an unknown one |
//! | `forbidden` | 403 | the token's scope does not reach this |
//! | `host_not_allowed`, `origin_not_allowed` | 403 | without tokens: the request does not come from this machine |
//! | *the script's own* | 403 | a hook rejected the claim |
//! | `unknown_route`, `unknown_workload`, `not_claimed`, `unknown_secret`, `unknown_snapshot` | 404 | there is no such thing |
//! | `method_not_allowed` | 405 | see the `Allow` header |
//! | `body_timeout` | 408 | the body did not arrive in time |
//! | `claim_differs`, `stale_epoch`, `state_conflict`, `not_in_conflict` | 409 | the claim or state is not the one asked for |
//! | `claimed`, `claimed_elsewhere`, `state_not_saved`, `state_exists`, `being_erased` | 409 | it must be over first |
//! | `body_too_large` | 413 | `detail` has the limit |
//! | `unsupported_media_type` | 415 | the body is not `application/json` |
//! | `invalid_field`, `unknown_field`, `workload_required`, `no_master_key` | 422 | `field` is at fault, `allowed` lists what is |
//! | `retry_after` | 429 | a hook asks to wait |
//! | `internal`, `hook_failed`, `state_damaged`, `state_sealed` | 500 | the log has the details under the id in `detail` |
//! | `pool_exhausted`, `store_unavailable`, `runtime_unavailable`, `overloaded`, `shutting_down` | 503 | waiting may help |
//! | `deadline_exceeded` | 504 | the outcome is unknown: ask for the status |

use std::borrow::Cow;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use crate::tenancy;

/// An error as it is answered.
///
/// Serialises as RFC 9457 asks, with `type` always `about:blank`: programs
/// look at `code`, which is stable. Small enough to be returned by value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    status: StatusCode,
    code: Cow<'static, str>,
    detail: Box<str>,
    field: Option<Box<str>>,
    allowed: Vec<String>,
    retry_after_ms: Option<u64>,
    challenge: Option<&'static str>,
}

/// The document that a problem serialises as.
#[derive(Serialize)]
struct Document<'a> {
    r#type: &'static str,
    /// The status' own words.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// Stable, for programs.
    code: &'a str,
    /// For people: what is wrong and what to do.
    detail: &'a str,
    /// The path of the field at fault, as `secrets.api_key`.
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'a str>,
    /// What would have been accepted, where that is a set of names or a pattern.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    allowed: &'a [String],
    /// How long to wait before another attempt, where waiting helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
}

// === impl Problem ===

impl Problem {
    /// Creates a problem of a status and a stable code.
    pub fn new(status: StatusCode, code: impl Into<Cow<'static, str>>, detail: impl Into<Box<str>>) -> Self {
        Self {
            status,
            code: code.into(),
            detail: detail.into(),
            field: None,
            allowed: Vec::new(),
            retry_after_ms: None,
            challenge: None,
        }
    }

    /// Creates the 422 of a field: what is wrong with it.
    pub fn invalid_field(field: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let field = field.into();
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", format!("{field}: {problem}"))
            .field(field)
    }

    /// Creates the 500 whose details are in the log under `id`.
    pub fn internal(id: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", format!("internal error ({id})"))
    }

    /// Names the field at fault.
    #[must_use]
    pub fn field(mut self, field: impl Into<Box<str>>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// Lists what would have been accepted.
    #[must_use]
    pub fn allowed<T: ToString>(mut self, allowed: impl IntoIterator<Item = T>) -> Self {
        self.allowed = allowed.into_iter().map(|name| name.to_string()).collect();
        self
    }

    /// Says when another attempt may succeed.
    #[must_use]
    pub fn retry_after_ms(mut self, ms: u64) -> Self {
        self.retry_after_ms = Some(ms);
        self
    }

    /// Adds the value of `WWW-Authenticate`, with 401.
    #[must_use]
    pub fn challenge(mut self, challenge: &'static str) -> Self {
        self.challenge = Some(challenge);
        self
    }

    /// Returns the HTTP status.
    pub fn status(&self) -> u16 {
        self.status.as_u16()
    }

    /// Returns the stable code.
    pub fn code(&self) -> &str {
        &self.code
    }
}

impl Serialize for Problem {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Document {
            r#type: "about:blank",
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: self.status.as_u16(),
            code: &self.code,
            detail: &self.detail,
            field: self.field.as_deref(),
            allowed: &self.allowed,
            retry_after_ms: self.retry_after_ms,
        }
        .serialize(serializer)
    }
}

impl From<tenancy::Error> for Problem {
    fn from(error: tenancy::Error) -> Self {
        use tenancy::Error as E;
        let detail = error.to_string();
        let of = |status: StatusCode, code: &'static str| Problem::new(status, code, detail.as_str());
        match error {
            E::UnknownWorkload { known, .. } => {
                of(StatusCode::NOT_FOUND, "unknown_workload").field("workload").allowed(known)
            }
            E::WorkloadRequired { known } => {
                of(StatusCode::UNPROCESSABLE_ENTITY, "workload_required").field("workload").allowed(known)
            }
            E::ClaimDiffers { what } => of(StatusCode::CONFLICT, "claim_differs").field(what),
            E::NotClaimed { .. } => of(StatusCode::NOT_FOUND, "not_claimed"),
            E::StaleEpoch { .. } => of(StatusCode::CONFLICT, "stale_epoch").field("epoch"),
            E::StateConflict { .. } => of(StatusCode::CONFLICT, "state_conflict"),
            E::NotInConflict { .. } => of(StatusCode::CONFLICT, "not_in_conflict"),
            E::Claimed { .. } => of(StatusCode::CONFLICT, "claimed"),
            E::ClaimedElsewhere { .. } => of(StatusCode::CONFLICT, "claimed_elsewhere"),
            E::StateNotSaved { retry_after_ms, .. } => {
                of(StatusCode::CONFLICT, "state_not_saved").retry_after_ms(retry_after_ms)
            }
            E::StateExists { .. } => of(StatusCode::CONFLICT, "state_exists"),
            E::UnknownSnapshot { .. } => of(StatusCode::NOT_FOUND, "unknown_snapshot").field("snapshot"),
            E::BeingErased { retry_after_ms, .. } => {
                of(StatusCode::CONFLICT, "being_erased").retry_after_ms(retry_after_ms)
            }
            E::Invalid { field, .. } => of(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field").field(field),
            E::Rejected { code, message } => Problem::new(StatusCode::FORBIDDEN, code, message),
            E::RetryAfter { ms } => of(StatusCode::TOO_MANY_REQUESTS, "retry_after").retry_after_ms(ms),
            E::HookFailed { .. } => of(StatusCode::INTERNAL_SERVER_ERROR, "hook_failed"),
            E::PoolExhausted { retry_after_ms, .. } => {
                of(StatusCode::SERVICE_UNAVAILABLE, "pool_exhausted").retry_after_ms(retry_after_ms)
            }
            E::StoreUnavailable { retry_after_ms, .. } => {
                of(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable").retry_after_ms(retry_after_ms)
            }
            E::StoreOwnedElsewhere { retry_after_ms, .. } => {
                of(StatusCode::SERVICE_UNAVAILABLE, "store_owned_elsewhere").retry_after_ms(retry_after_ms)
            }
            E::StateOverLimit { .. } => of(StatusCode::UNPROCESSABLE_ENTITY, "state_over_limit"),
            E::StateDamaged { .. } => of(StatusCode::INTERNAL_SERVER_ERROR, "state_damaged"),
            E::StateSealed { .. } => of(StatusCode::INTERNAL_SERVER_ERROR, "state_sealed"),
            E::Runtime { retry_after_ms, .. } => {
                of(StatusCode::SERVICE_UNAVAILABLE, "runtime_unavailable").retry_after_ms(retry_after_ms)
            }
            E::ActivationFailed { .. } => of(StatusCode::INTERNAL_SERVER_ERROR, "activation_failed"),
            E::Busy { retry_after_ms } => {
                of(StatusCode::SERVICE_UNAVAILABLE, "busy").retry_after_ms(retry_after_ms)
            }
            E::Starting { retry_after_ms } => {
                of(StatusCode::SERVICE_UNAVAILABLE, "starting").retry_after_ms(retry_after_ms)
            }
            E::NoMasterKey => of(StatusCode::UNPROCESSABLE_ENTITY, "no_master_key"),
            E::UnknownSecret { .. } => of(StatusCode::NOT_FOUND, "unknown_secret").field("name"),
            E::ShuttingDown => of(StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
            E::Internal { .. } => of(StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self).expect("strings and numbers always serialise");
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(ms) = self.retry_after_ms {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
        }
        if let Some(challenge) = self.challenge {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Epoch, TenantId, WorkloadId};

    #[test]
    fn each_error_of_tenancy_has_its_status_and_code() {
        use tenancy::Error as E;
        let tenant = || TenantId::new("acme").unwrap();
        let workload = || WorkloadId::new("web").unwrap();
        let reason = || "because".to_owned();
        let rows = [
            (E::UnknownWorkload { given: "x".into(), known: vec![workload()] }, 404, "unknown_workload"),
            (E::WorkloadRequired { known: vec![workload()] }, 422, "workload_required"),
            (E::ClaimDiffers { what: "env" }, 409, "claim_differs"),
            (E::NotClaimed { tenant: tenant(), workload: workload() }, 404, "not_claimed"),
            (E::StaleEpoch { given: Epoch(1), current: Epoch(2) }, 409, "stale_epoch"),
            (
                E::StateConflict { tenant: tenant(), workload: workload(), reason: reason() },
                409,
                "state_conflict",
            ),
            (E::NotInConflict { tenant: tenant(), workload: workload() }, 409, "not_in_conflict"),
            (E::Claimed { tenant: tenant(), workload: workload() }, 409, "claimed"),
            (
                E::ClaimedElsewhere { tenant: tenant(), workload: workload(), server: "b".into() },
                409,
                "claimed_elsewhere",
            ),
            (
                E::StateNotSaved {
                    tenant: tenant(),
                    workload: workload(),
                    reason: reason(),
                    retry_after_ms: 1,
                },
                409,
                "state_not_saved",
            ),
            (E::StateExists { tenant: tenant(), workload: workload() }, 409, "state_exists"),
            (E::UnknownSnapshot { problem: reason() }, 404, "unknown_snapshot"),
            (E::BeingErased { tenant: tenant(), retry_after_ms: 1 }, 409, "being_erased"),
            (E::Invalid { field: "env.X".into(), problem: reason() }, 422, "invalid_field"),
            (E::Rejected { code: "suspended".into(), message: reason() }, 403, "suspended"),
            (E::RetryAfter { ms: 1 }, 429, "retry_after"),
            (E::HookFailed { hook: "on_claim", id: "h1".into() }, 500, "hook_failed"),
            (
                E::PoolExhausted { workload: workload(), reason: reason(), retry_after_ms: 1 },
                503,
                "pool_exhausted",
            ),
            (E::StoreUnavailable { reason: reason(), retry_after_ms: 1 }, 503, "store_unavailable"),
            (E::StoreOwnedElsewhere { reason: reason(), retry_after_ms: 1 }, 503, "store_owned_elsewhere"),
            (E::StateOverLimit { reason: reason() }, 422, "state_over_limit"),
            (E::StateDamaged { reason: reason() }, 500, "state_damaged"),
            (E::StateSealed { reason: reason() }, 500, "state_sealed"),
            (E::Runtime { reason: reason(), retry_after_ms: 1 }, 503, "runtime_unavailable"),
            (E::ActivationFailed { reason: reason() }, 500, "activation_failed"),
            (E::Busy { retry_after_ms: 1 }, 503, "busy"),
            (E::Starting { retry_after_ms: 1 }, 503, "starting"),
            (E::NoMasterKey, 422, "no_master_key"),
            (E::UnknownSecret { name: "k".into() }, 404, "unknown_secret"),
            (E::ShuttingDown, 503, "shutting_down"),
            (E::Internal { id: "i1".into() }, 500, "internal"),
        ];
        for (error, status, code) in rows {
            let text = format!("{error:?}");
            let problem = Problem::from(error);
            assert_eq!((problem.status(), problem.code()), (status, code), "{text}");
            assert!(!problem.detail.is_empty(), "{text}");
        }
    }

    #[test]
    fn names_that_would_do_are_listed() {
        let known = ["api", "web"].map(|id| WorkloadId::new(id).unwrap()).to_vec();
        let problem = Problem::from(tenancy::Error::WorkloadRequired { known });
        assert_eq!(problem.field.as_deref(), Some("workload"));
        assert_eq!(problem.allowed, ["api", "web"]);
    }

    #[test]
    fn waiting_is_told_in_both_forms_rounded_up() {
        for (ms, seconds) in [(1, "1"), (1000, "1"), (1001, "2"), (0, "0")] {
            let response = Problem::from(tenancy::Error::RetryAfter { ms }).into_response();
            assert_eq!(response.headers()[header::RETRY_AFTER], seconds, "{ms} ms");
        }
    }

    #[test]
    fn the_body_is_a_problem_document() {
        let problem = Problem::invalid_field("wait_ms", "expected u64").allowed(["a number"]);
        assert_eq!(
            serde_json::to_value(&problem).unwrap(),
            serde_json::json!({
                "type": "about:blank", "title": "Unprocessable Entity", "status": 422,
                "code": "invalid_field", "detail": "wait_ms: expected u64",
                "field": "wait_ms", "allowed": ["a number"],
            })
        );
        let response = problem.into_response();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
    }
}
