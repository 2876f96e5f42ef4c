//! The one table of routes: the router is built from it, and so are the tests
//! of authorisation and of the docs.

/// One route of the API.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// `GET`, `POST`, `PUT` or `DELETE`.
    pub method: &'static str,
    /// The path at the root, with `{tenant}` and `{name}` for its parameters;
    /// the same route is under [`PREFIX`].
    pub path: &'static str,
    /// Who may use it.
    pub scope: RouteScope,
    /// What it takes as a body.
    pub body: BodyRule,
    /// The query parameters it takes.
    pub query: &'static [&'static str],
    /// What it does, in one line.
    pub doc: &'static str,
    /// What answers.
    pub(super) endpoint: Endpoint,
}

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteScope {
    /// Anyone, without a token.
    Open,
    /// The tenant in the path, and admins.
    Tenant,
    /// Admins only.
    Admin,
}

/// What a route takes as a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyRule {
    /// None; a body that is there is refused.
    None,
    /// A JSON object; an empty body stands for `{}`.
    Json {
        /// More is answered 413.
        max_bytes: usize,
    },
}

/// What answers a route; the router matches it to a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Claim,
    Release,
    Touch,
    Sync,
    Prefetch,
    Snapshots,
    Restore,
    Resolve,
    Fork,
    Erase,
    Collect,
    Status,
    PutTenant,
    PutSecret,
    SecretNames,
    DeleteSecret,
    Workloads,
    Pools,
    Slots,
    Healthz,
    Readyz,
    Metrics,
}

/// Under which the same routes are found again.
pub const PREFIX: &str = "/api/v1";

/// Bytes of a claim's body at most; it carries secrets.
pub const MAX_CLAIM_BYTES: usize = 1024 * 1024;

/// Bytes of any other body at most.
pub const MAX_BODY_BYTES: usize = 64 * 1024;

const SMALL: BodyRule = BodyRule::Json { max_bytes: MAX_BODY_BYTES };
const WORKLOAD: &[&str] = &["workload"];

static ROUTES: [Route; 22] = [
    Route {
        method: "POST",
        path: "/tenants/{tenant}/claim",
        scope: RouteScope::Tenant,
        body: BodyRule::Json { max_bytes: MAX_CLAIM_BYTES },
        query: WORKLOAD,
        doc: "Claims a container for the tenant, with its state and secrets in it.",
        endpoint: Endpoint::Claim,
    },
    Route {
        method: "POST",
        path: "/tenants/{tenant}/release",
        scope: RouteScope::Tenant,
        body: SMALL,
        query: WORKLOAD,
        doc: "Ends the tenant's claim and saves its state.",
        endpoint: Endpoint::Release,
    },
    Route {
        method: "GET",
        path: "/tenants/{tenant}/status",
        scope: RouteScope::Tenant,
        body: BodyRule::None,
        query: WORKLOAD,
        doc: "Shows the tenant's claims and newest snapshots.",
        endpoint: Endpoint::Status,
    },
    Route {
        method: "POST",
        path: "/tenants/{tenant}/touch",
        scope: RouteScope::Tenant,
        body: SMALL,
        query: WORKLOAD,
        doc: "Resets the idle clock of the tenant's claim.",
        endpoint: Endpoint::Touch,
    },
    Route {
        method: "POST",
        path: "/tenants/{tenant}/sync",
        scope: RouteScope::Tenant,
        body: SMALL,
        query: WORKLOAD,
        doc: "Saves the state of the tenant's claim now, while it goes on.",
        endpoint: Endpoint::Sync,
    },
    Route {
        method: "POST",
        path: "/tenants/{tenant}/prefetch",
        scope: RouteScope::Tenant,
        body: SMALL,
        query: WORKLOAD,
        doc: "Brings the tenant's newest state to this node before its claim.",
        endpoint: Endpoint::Prefetch,
    },
    Route {
        method: "GET",
        path: "/tenants/{tenant}/snapshots",
        scope: RouteScope::Tenant,
        body: BodyRule::None,
        query: &["workload", "before", "limit"],
        doc: "Lists the tenant's snapshots, newest first.",
        endpoint: Endpoint::Snapshots,
    },
    Route {
        method: "POST",
        path: "/tenants/{tenant}/restore",
        scope: RouteScope::Tenant,
        body: SMALL,
        query: WORKLOAD,
        doc: "Makes an old snapshot the newest state again.",
        endpoint: Endpoint::Restore,
    },
    Route {
        method: "POST",
        path: "/tenants/{tenant}/resolve",
        scope: RouteScope::Admin,
        body: SMALL,
        query: WORKLOAD,
        doc: "Decides whose state stands when this server's is in conflict with the store's.",
        endpoint: Endpoint::Resolve,
    },
    Route {
        method: "POST",
        path: "/tenants/{tenant}/fork",
        scope: RouteScope::Admin,
        body: SMALL,
        query: WORKLOAD,
        doc: "Gives a tenant without state a copy of another's snapshot.",
        endpoint: Endpoint::Fork,
    },
    Route {
        method: "DELETE",
        path: "/tenants/{tenant}",
        scope: RouteScope::Admin,
        body: BodyRule::None,
        query: &[],
        doc: "Erases the tenant everywhere.",
        endpoint: Endpoint::Erase,
    },
    Route {
        method: "PUT",
        path: "/tenants/{tenant}",
        scope: RouteScope::Admin,
        body: SMALL,
        query: &[],
        doc: "Replaces the tenant's metadata.",
        endpoint: Endpoint::PutTenant,
    },
    Route {
        method: "GET",
        path: "/tenants/{tenant}/secrets",
        scope: RouteScope::Tenant,
        body: BodyRule::None,
        query: &[],
        doc: "Lists the names of the tenant's stored secrets.",
        endpoint: Endpoint::SecretNames,
    },
    Route {
        method: "PUT",
        path: "/tenants/{tenant}/secrets/{name}",
        scope: RouteScope::Tenant,
        body: SMALL,
        query: &[],
        doc: "Stores a secret of the tenant, encrypted.",
        endpoint: Endpoint::PutSecret,
    },
    Route {
        method: "DELETE",
        path: "/tenants/{tenant}/secrets/{name}",
        scope: RouteScope::Tenant,
        body: BodyRule::None,
        query: &[],
        doc: "Deletes a stored secret of the tenant.",
        endpoint: Endpoint::DeleteSecret,
    },
    Route {
        method: "GET",
        path: "/workloads",
        scope: RouteScope::Admin,
        body: BodyRule::None,
        query: &[],
        doc: "Lists the workloads with their specs in force.",
        endpoint: Endpoint::Workloads,
    },
    Route {
        method: "GET",
        path: "/pools",
        scope: RouteScope::Admin,
        body: BodyRule::None,
        query: &[],
        doc: "Lists the pools with their slots by phase.",
        endpoint: Endpoint::Pools,
    },
    Route {
        method: "GET",
        path: "/slots",
        scope: RouteScope::Admin,
        body: BodyRule::None,
        query: &[],
        doc: "Lists every slot.",
        endpoint: Endpoint::Slots,
    },
    Route {
        method: "POST",
        path: "/state/gc",
        scope: RouteScope::Admin,
        body: SMALL,
        query: &[],
        doc: "Removes from the store what no kept snapshot needs.",
        endpoint: Endpoint::Collect,
    },
    Route {
        method: "GET",
        path: "/healthz",
        scope: RouteScope::Open,
        body: BodyRule::None,
        query: &[],
        doc: "Answers 200 while the server runs.",
        endpoint: Endpoint::Healthz,
    },
    Route {
        method: "GET",
        path: "/readyz",
        scope: RouteScope::Open,
        body: BodyRule::None,
        query: &[],
        doc: "Answers 200 when claims can be served, 503 while starting; reasons are shown to admins.",
        endpoint: Endpoint::Readyz,
    },
    Route {
        method: "GET",
        path: "/metrics",
        scope: RouteScope::Admin,
        body: BodyRule::None,
        query: &[],
        doc: "Gives the metrics in the OpenMetrics text format.",
        endpoint: Endpoint::Metrics,
    },
];

/// Returns every route, each once (at the root).
pub fn routes() -> &'static [Route] {
    &ROUTES
}
