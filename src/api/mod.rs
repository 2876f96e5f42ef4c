//! The REST API: routes, who may use them, and how errors are answered.
//!
//! Every route stands in one table ([`routes()`]) at the root and again under
//! `/api/v1`. A request passes, from the outside in: `envelope` (id, span,
//! deadline, panics) → `origin` (without tokens: this machine only) → `guard`
//! (who asks, may they, is there room, query) → its handler (body, tenancy).
//!
//! `/healthz` and `/readyz` are open, since what probes them seldom has a
//! token; `/readyz` shows its reasons to admins only. `/metrics` wants an
//! admin's token: it names workloads and their load.

mod auth;
mod body;
mod envelope;
mod guard;
mod handlers;
mod origin;
mod problem;
mod router;
mod routes;
mod server;
mod tokens;

pub use auth::{Auth, AuthError, AuthErrors, Scope};
pub use problem::Problem;
pub use router::{ApiState, router};
pub use routes::{BodyRule, MAX_BODY_BYTES, MAX_CLAIM_BYTES, PREFIX, Route, RouteScope, routes};
pub use server::serve;
