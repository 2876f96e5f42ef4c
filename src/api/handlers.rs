//! What answers each route: a call to tenancy, and its answer as JSON.
//!
//! A claim or release runs in tenancy's own tracked task; a client that hangs
//! up drops only the wait for it.

use std::collections::BTreeMap;

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, delete, get, post, put},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    ApiState, Problem,
    guard::{IsAdmin, Json, Name, Of, Parameters},
    routes::Endpoint,
};
use crate::{
    model::{Secret, WorkloadId},
    tenancy::{
        self, ClaimRequest, CollectRequest, ForkRequest, ReleaseRequest, ResolveRequest, RestoreRequest,
        TenantStatus, WorkloadStatus,
    },
};

/// The body of `touch`, `sync` and `prefetch`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkloadBody {
    #[serde(default)]
    workload: Option<WorkloadId>,
}

/// The body of `PUT /tenants/{tenant}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TenantBody {
    metadata: Map<String, Value>,
}

/// The body of `PUT /tenants/{tenant}/secrets/{name}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretBody {
    value: Secret,
}

#[derive(Serialize)]
struct SecretNames {
    names: Vec<String>,
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
}

/// Returns what answers an endpoint.
pub(super) fn handler(endpoint: Endpoint) -> MethodRouter<ApiState> {
    match endpoint {
        Endpoint::Claim => post(claim),
        Endpoint::Release => post(release),
        Endpoint::Touch => post(touch),
        Endpoint::Sync => post(sync),
        Endpoint::Prefetch => post(prefetch),
        Endpoint::Snapshots => get(snapshots),
        Endpoint::Restore => post(restore),
        Endpoint::Resolve => post(resolve),
        Endpoint::Fork => post(fork),
        Endpoint::Erase => delete(erase),
        Endpoint::Collect => post(collect),
        Endpoint::Status => get(status),
        Endpoint::PutTenant => put(put_tenant),
        Endpoint::PutSecret => put(put_secret),
        Endpoint::SecretNames => get(secret_names),
        Endpoint::DeleteSecret => delete(delete_secret),
        Endpoint::Workloads => get(workloads),
        Endpoint::Pools => get(pools),
        Endpoint::Slots => get(slots),
        Endpoint::Healthz => get(healthz),
        Endpoint::Readyz => get(readyz),
        Endpoint::Metrics => get(metrics),
    }
}

async fn claim(
    State(api): State<ApiState>,
    of: Of,
    Json(mut request): Json<ClaimRequest>,
) -> Result<Response, Problem> {
    request.workload = one_workload(of.workload, request.workload)?;
    Ok(json(api.tenancy.claim(of.tenant, request).await?))
}

async fn release(
    State(api): State<ApiState>,
    of: Of,
    Json(mut request): Json<ReleaseRequest>,
) -> Result<Response, Problem> {
    request.workload = one_workload(of.workload, request.workload)?;
    Ok(json(api.tenancy.release(of.tenant, request).await?))
}

async fn touch(
    State(api): State<ApiState>,
    of: Of,
    Json(body): Json<WorkloadBody>,
) -> Result<StatusCode, Problem> {
    api.tenancy.touch(of.tenant, one_workload(of.workload, body.workload)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn sync(
    State(api): State<ApiState>,
    of: Of,
    Json(body): Json<WorkloadBody>,
) -> Result<Response, Problem> {
    Ok(json(api.tenancy.sync(of.tenant, one_workload(of.workload, body.workload)?).await?))
}

async fn prefetch(
    State(api): State<ApiState>,
    of: Of,
    Json(body): Json<WorkloadBody>,
) -> Result<Response, Problem> {
    Ok(json(api.tenancy.prefetch(of.tenant, one_workload(of.workload, body.workload)?).await?))
}

async fn snapshots(State(api): State<ApiState>, of: Of, query: Parameters) -> Result<Response, Problem> {
    let before = query.parsed("before", "the number of a snapshot")?;
    let limit = query.parsed("limit", "a whole number")?;
    Ok(json(api.tenancy.snapshots(of.tenant, of.workload, before, limit).await?))
}

async fn restore(
    State(api): State<ApiState>,
    of: Of,
    Json(mut request): Json<RestoreRequest>,
) -> Result<Response, Problem> {
    request.workload = one_workload(of.workload, request.workload)?;
    Ok(json(api.tenancy.restore(of.tenant, request).await?))
}

async fn resolve(
    State(api): State<ApiState>,
    of: Of,
    Json(mut request): Json<ResolveRequest>,
) -> Result<Response, Problem> {
    request.workload = one_workload(of.workload, request.workload)?;
    Ok(json(api.tenancy.resolve(of.tenant, request).await?))
}

async fn fork(
    State(api): State<ApiState>,
    of: Of,
    Json(mut request): Json<ForkRequest>,
) -> Result<Response, Problem> {
    request.workload = one_workload(of.workload, request.workload)?;
    Ok(json(api.tenancy.fork(of.tenant, request).await?))
}

async fn erase(State(api): State<ApiState>, of: Of) -> Result<Response, Problem> {
    Ok(json(api.tenancy.erase(of.tenant).await?))
}

async fn collect(
    State(api): State<ApiState>,
    Json(request): Json<CollectRequest>,
) -> Result<Response, Problem> {
    Ok(json(api.tenancy.collect(request).await?))
}

async fn status(State(api): State<ApiState>, of: Of) -> Result<Response, Problem> {
    let status = api.tenancy.status(of.tenant).await?;
    Ok(json(match of.workload {
        None => status,
        Some(workload) => only(status, workload, || api.tenancy.workloads())?,
    }))
}

async fn put_tenant(
    State(api): State<ApiState>,
    of: Of,
    Json(body): Json<TenantBody>,
) -> Result<StatusCode, Problem> {
    api.tenancy.put_tenant(of.tenant, body.metadata).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn put_secret(
    State(api): State<ApiState>,
    of: Of,
    Name(name): Name,
    Json(body): Json<SecretBody>,
) -> Result<StatusCode, Problem> {
    api.tenancy.put_secret(of.tenant, &name, body.value).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn secret_names(State(api): State<ApiState>, of: Of) -> Result<Response, Problem> {
    Ok(json(SecretNames { names: api.tenancy.secret_names(of.tenant).await? }))
}

async fn delete_secret(State(api): State<ApiState>, of: Of, Name(name): Name) -> Result<StatusCode, Problem> {
    api.tenancy.delete_secret(of.tenant, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn workloads(State(api): State<ApiState>) -> Response {
    json(api.tenancy.workloads())
}

async fn pools(State(api): State<ApiState>) -> Response {
    json(api.tenancy.pools())
}

async fn slots(State(api): State<ApiState>) -> Response {
    json(api.tenancy.slots())
}

async fn healthz() -> Response {
    json(Health { status: "ok" })
}

/// The reasons name what the server depends on, so only admins see them.
async fn readyz(State(api): State<ApiState>, IsAdmin(is_admin): IsAdmin) -> Response {
    let mut readiness = api.tenancy.readiness();
    if !is_admin {
        readiness.reasons.clear();
    }
    let status = match readiness.status {
        "ready" | "degraded" => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, axum::Json(readiness)).into_response()
}

async fn metrics(State(api): State<ApiState>) -> Response {
    const OPENMETRICS: HeaderValue =
        HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    ([(header::CONTENT_TYPE, OPENMETRICS)], (api.metrics)()).into_response()
}

fn json(value: impl Serialize) -> Response {
    axum::Json(value).into_response()
}

/// Takes the workload from the query or the body.
fn one_workload(query: Option<WorkloadId>, body: Option<WorkloadId>) -> Result<Option<WorkloadId>, Problem> {
    match (query, body) {
        (Some(query), Some(body)) if query != body => Err(Problem::invalid_field(
            "workload",
            format!("the query says {query} and the body {body}; give it once"),
        )),
        (query, body) => Ok(query.or(body)),
    }
}

/// Keeps one workload's part of a status. A workload that is gone may still
/// have state; one that neither is there nor has anything is a mistake.
fn only(
    mut status: TenantStatus,
    workload: WorkloadId,
    known: impl FnOnce() -> Vec<WorkloadStatus>,
) -> Result<TenantStatus, tenancy::Error> {
    status.claims.retain(|claim| claim.workload == workload);
    status.snapshots =
        status.snapshots.remove_entry(&workload).into_iter().collect::<BTreeMap<WorkloadId, _>>();
    if status.claims.is_empty() && status.snapshots.is_empty() {
        let known: Vec<WorkloadId> = known().into_iter().map(|workload| workload.id).collect();
        if !known.contains(&workload) {
            return Err(tenancy::Error::UnknownWorkload { given: workload.to_string(), known });
        }
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{ClaimSource, ClaimState, Epoch, Revision, TenantId},
        tenancy::ClaimStatus,
    };

    fn id(text: &str) -> WorkloadId {
        WorkloadId::new(text).unwrap()
    }

    #[test]
    fn the_workload_is_taken_from_query_or_body() {
        let rows = [
            (None, None, Ok(None)),
            (Some("a"), None, Ok(Some("a"))),
            (None, Some("a"), Ok(Some("a"))),
            (Some("a"), Some("a"), Ok(Some("a"))),
            (Some("a"), Some("b"), Err(422)),
        ];
        for (query, body, expected) in rows {
            let found = one_workload(query.map(id), body.map(id)).map_err(|problem| problem.status());
            assert_eq!(found, expected.map(|w: Option<&str>| w.map(id)), "{query:?} {body:?}");
        }
    }

    #[test]
    fn a_status_is_narrowed_to_a_workload() {
        let claim = |workload: &str| ClaimStatus {
            workload: id(workload),
            epoch: Epoch(1),
            state: ClaimState::Active,
            slot: None,
            source: ClaimSource::Warm,
            created_ms: 0,
            active_ms: 0,
            failed: false,
            superseded_by: None,
            last_error: None,
        };
        let status = || TenantStatus {
            tenant: TenantId::new("acme").unwrap(),
            claims: vec![claim("web"), claim("gone")],
            snapshots: BTreeMap::new(),
        };
        let known = || {
            ["web", "idle"].map(|name| WorkloadStatus {
                id: id(name),
                name: name.into(),
                revision: Revision("r".into()),
                spec_hash: "h".into(),
                hooks: Vec::new(),
                spec: Value::Null,
            })
        };
        for (workload, claims) in [("web", Some(1)), ("gone", Some(1)), ("idle", Some(0)), ("tpyo", None)] {
            let found = only(status(), id(workload), || known().to_vec()).ok();
            assert_eq!(found.map(|status| status.claims.len()), claims, "{workload}");
        }
    }
}
