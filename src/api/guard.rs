//! What stands before every route: who asks, for whom, and whether there is room.
//!
//! A handler sees only what was admitted here; it gets the tenant from
//! [`Admitted`], never from the path itself.

use std::{collections::BTreeMap, str::FromStr, sync::Arc};

use axum::{
    extract::{
        FromRequest, FromRequestParts, RawPathParams, Request, State, rejection::RawPathParamsRejection,
    },
    http::{HeaderMap, StatusCode, Uri, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tracing::Span;

use super::{
    BodyRule, Problem, Route, RouteScope,
    auth::{Auth, Caller, Denied, Scope, Unknown, authorize},
    body,
};
use crate::model::{TenantId, WorkloadId, id::ID_PATTERN};

/// What one route's guard needs.
#[derive(Clone)]
pub(super) struct Gate {
    pub(super) auth: Arc<Auth>,
    pub(super) route: &'static Route,
    /// Room for requests; probes do not take any, so that they are answered
    /// when everything else is full.
    pub(super) room: Arc<Semaphore>,
}

/// A request that may go on.
#[derive(Debug, Clone)]
pub(super) struct Admitted {
    route: &'static Route,
    tenant: Option<TenantId>,
    name: Option<String>,
    workload: Option<WorkloadId>,
    /// Query parameters that are a handler's own.
    query: BTreeMap<String, String>,
    caller: Option<Caller>,
}

/// Extracts the tenant of the path and the workload of the query.
pub(super) struct Of {
    pub(super) tenant: TenantId,
    /// As the query has it.
    pub(super) workload: Option<WorkloadId>,
}

/// Extracts `{name}` of the path.
pub(super) struct Name(pub(super) String);

/// Extracts the parameters of the query beside `workload`, as text.
pub(super) struct Parameters(BTreeMap<String, String>);

/// Extracts whether the caller is an admin.
pub(super) struct IsAdmin(pub(super) bool);

/// Extracts the body, within the route's limit.
pub(super) struct Json<T>(pub(super) T);

/// Admits a request to its route, or answers why not.
pub(super) async fn guard(
    State(gate): State<Gate>,
    parameters: Result<RawPathParams, RawPathParamsRejection>,
    mut request: Request,
    next: Next,
) -> Response {
    let span = Span::current();
    span.record("route", gate.route.path);
    let parameters = match &parameters {
        Ok(parameters) => parameters.iter().collect(),
        Err(_) => {
            return Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_path",
                "the path is not UTF-8 once decoded",
            )
            .into_response();
        }
    };
    let has_body = !axum::body::HttpBody::is_end_stream(request.body());
    let admitted = match admit(&gate.auth, gate.route, request.headers(), request.uri(), parameters, has_body)
    {
        Ok(admitted) => admitted,
        Err(problem) => return problem.into_response(),
    };
    if let Some(tenant) = &admitted.tenant {
        span.record("tenant", tenant.as_str());
    }
    if let Some(caller) = &admitted.caller {
        span.record("caller", &*caller.name);
    }
    request.extensions_mut().insert(admitted);
    let _room = match gate.route.scope {
        RouteScope::Open => None,
        RouteScope::Tenant | RouteScope::Admin => match gate.room.try_acquire() {
            Ok(room) => Some(room),
            Err(_) => {
                return Problem::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "overloaded",
                    "too many requests at once",
                )
                .retry_after_ms(1000)
                .into_response();
            }
        },
    };
    next.run(request).await
}

/// Decides whether a request may go on. The order is: who asks, for which
/// tenant, may they, is the request well formed. Only the last says anything
/// about the route to a caller who may not use it.
fn admit(
    auth: &Auth,
    route: &'static Route,
    headers: &HeaderMap,
    uri: &Uri,
    parameters: Vec<(&str, &str)>,
    has_body: bool,
) -> Result<Admitted, Problem> {
    let caller = auth.authenticate(headers);
    if let (Err(unknown), RouteScope::Tenant | RouteScope::Admin) = (&caller, route.scope) {
        return Err(unauthenticated(*unknown));
    }
    let caller = caller.ok();
    let mut tenant = None;
    let mut name = None;
    for (parameter, value) in parameters {
        match parameter {
            "tenant" => {
                let id = TenantId::new(value).map_err(|error| {
                    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", error.to_string())
                        .field("tenant")
                        .allowed([ID_PATTERN])
                })?;
                tenant = Some(id);
            }
            _ => name = Some(value.to_owned()),
        }
    }
    let scope = caller.as_ref().map(|caller| &*caller.scope);
    authorize(scope, route.scope, tenant.as_ref()).map_err(|denied| match denied {
        Denied::Unauthenticated => unauthenticated(Unknown::Missing),
        Denied::Forbidden => {
            let reach = match &tenant {
                Some(tenant) if route.scope == RouteScope::Tenant => format!("tenant {tenant}"),
                _ => "this route, which wants scope admin".to_owned(),
            };
            Problem::new(StatusCode::FORBIDDEN, "forbidden", format!("the token does not reach {reach}"))
        }
    })?;
    let mut query = body::query(uri, route.query)?;
    let workload = match query.remove("workload") {
        Some(text) => Some(WorkloadId::new(text).map_err(|error| {
            Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", error.to_string())
                .field("workload")
                .allowed([ID_PATTERN])
        })?),
        None => None,
    };
    if has_body && route.body == BodyRule::None {
        return Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "unexpected_body",
            format!("{} {} takes no body", route.method, route.path),
        ));
    }
    Ok(Admitted { route, tenant, name, workload, query, caller })
}

fn unauthenticated(unknown: Unknown) -> Problem {
    let (detail, challenge) = match unknown {
        Unknown::Missing => {
            ("a token is required: Authorization: Bearer <token>", r#"Bearer realm="boilerhouse""#)
        }
        Unknown::Invalid => {
            ("the token is not known", r#"Bearer realm="boilerhouse", error="invalid_token""#)
        }
    };
    Problem::new(StatusCode::UNAUTHORIZED, "unauthenticated", detail).challenge(challenge)
}

/// A handler that asks for what its route does not have: a mistake of ours.
fn not_there(what: &str) -> Problem {
    tracing::error!(what, "a handler asks for what its route does not have");
    Problem::internal("route")
}

// === impl Of, Name, IsAdmin, Json ===

impl<S: Send + Sync> FromRequestParts<S> for Of {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let admitted = parts.extensions.get::<Admitted>().ok_or_else(|| not_there("guard"))?;
        let tenant = admitted.tenant.clone().ok_or_else(|| not_there("tenant"))?;
        Ok(Self { tenant, workload: admitted.workload.clone() })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let admitted = parts.extensions.get::<Admitted>();
        admitted.and_then(|admitted| admitted.name.clone()).map(Self).ok_or_else(|| not_there("name"))
    }
}

impl Parameters {
    /// Reads one that may be left out; `allowed` says what is expected.
    pub(super) fn parsed<T: FromStr>(&self, name: &str, allowed: &str) -> Result<Option<T>, Problem> {
        let Some(text) = self.0.get(name) else { return Ok(None) };
        let problem =
            || Problem::invalid_field(name, format!("{text:?} is not {allowed}")).allowed([allowed]);
        text.parse().map(Some).map_err(|_| problem())
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Parameters {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let admitted = parts.extensions.get::<Admitted>();
        admitted.map(|admitted| Self(admitted.query.clone())).ok_or_else(|| not_there("query"))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for IsAdmin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let caller = parts.extensions.get::<Admitted>().and_then(|admitted| admitted.caller.as_ref());
        Ok(Self(caller.is_some_and(|caller| *caller.scope == Scope::Admin)))
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let rule = request.extensions().get::<Admitted>().map(|admitted| admitted.route.body);
        let Some(BodyRule::Json { max_bytes }) = rule else { return Err(not_there("body")) };
        let (parts, content) = request.into_parts();
        body::read(&parts.headers, content, max_bytes).await.map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::routes;

    fn route(method: &str, path: &str) -> &'static Route {
        routes().iter().find(|route| (route.method, route.path) == (method, path)).unwrap()
    }

    fn code(route: &'static Route, uri: &str, parameters: Vec<(&str, &str)>, has_body: bool) -> String {
        let uri = uri.parse().unwrap();
        match admit(&Auth::loopback(), route, &HeaderMap::new(), &uri, parameters, has_body) {
            Ok(admitted) => format!("{:?} {:?}", admitted.tenant, admitted.workload),
            Err(problem) => problem.code().to_owned(),
        }
    }

    #[test]
    fn ids_query_and_body_are_checked_before_the_handler() {
        let claim = route("POST", "/tenants/{tenant}/claim");
        let pools = route("GET", "/pools");
        assert_eq!(code(claim, "/x", vec![("tenant", "a/b")], true), "invalid_field");
        assert_eq!(code(claim, "/x", vec![("tenant", "..")], true), "invalid_field");
        assert_eq!(code(claim, "/x?workload=..", vec![("tenant", "a")], true), "invalid_field");
        assert_eq!(code(claim, "/x?wait_ms=1", vec![("tenant", "a")], true), "unknown_field");
        assert_eq!(code(pools, "/pools?workload=a", vec![], false), "unknown_field");
        assert_eq!(code(pools, "/pools", vec![], true), "unexpected_body");
        assert_eq!(code(pools, "/pools", vec![], false), "None None");
        assert_eq!(
            code(claim, "/x?workload=w", vec![("tenant", "a")], true),
            "Some(TenantId(\"a\")) Some(WorkloadId(\"w\"))"
        );
    }
}
