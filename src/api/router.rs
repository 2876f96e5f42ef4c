//! The router, built from the table of routes.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::StatusCode,
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
};
use tokio::sync::Semaphore;

use super::{
    Auth, PREFIX, Problem,
    envelope::{Surroundings, envelope},
    guard::{Gate, guard},
    handlers::handler,
    origin, routes,
};
use crate::{
    clock::{SharedClock, SystemClock},
    telemetry::Metrics,
    tenancy::Tenancy,
};

/// Requests at once; one more is answered 503 `overloaded`. A claim that waits
/// for a slot counts.
const MAX_REQUESTS: usize = 2048;

/// Gives the metrics in the OpenMetrics text format.
pub(super) type MetricsText = Arc<dyn Fn() -> String + Send + Sync>;

/// What the API works with.
#[derive(Clone)]
pub struct ApiState {
    /// Carries out what is asked.
    pub(super) tenancy: Tenancy,
    /// Knows who asks.
    pub(super) auth: Arc<Auth>,
    /// Gives what `/metrics` answers.
    pub(super) metrics: MetricsText,
    /// Gives requests their ids and counts them.
    around: Surroundings,
}

impl ApiState {
    /// Puts together what the API works with. Requests are counted in `metrics`;
    /// `text` gives the text of `/metrics` each time it is called.
    pub fn new(
        tenancy: Tenancy,
        auth: Auth,
        metrics: Arc<Metrics>,
        text: impl Fn() -> String + Send + Sync + 'static,
    ) -> Self {
        let clock: SharedClock = Arc::new(SystemClock);
        let around = Surroundings { clock, metrics };
        Self { tenancy, auth: Arc::new(auth), metrics: Arc::new(text), around }
    }
}

/// Builds the router: every route of [`routes()`] at the root and under [`PREFIX`].
pub fn router(state: ApiState) -> Router {
    let room = Arc::new(Semaphore::new(MAX_REQUESTS));
    let mut router = Router::new();
    for route in routes() {
        for prefix in ["", PREFIX] {
            let gate = Gate { auth: Arc::clone(&state.auth), route, room: Arc::clone(&room) };
            let guarded = handler(route.endpoint).route_layer(from_fn_with_state(gate, guard));
            router = router.route(&format!("{prefix}{}", route.path), guarded);
        }
    }
    let (auth, around) = (Arc::clone(&state.auth), state.around.clone());
    enclose(router.with_state(state), auth, around)
}

/// Adds what holds for every request, whether its route is known or not.
fn enclose(router: Router, auth: Arc<Auth>, around: Surroundings) -> Router {
    router
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(auth, local_only))
        .layer(from_fn_with_state(around, envelope))
}

/// Without tokens, lets only this machine's own requests through.
async fn local_only(State(auth): State<Arc<Auth>>, request: Request, next: Next) -> Response {
    if auth.is_loopback()
        && let Err(problem) = origin::check(request.method(), request.uri(), request.headers())
    {
        return problem.into_response();
    }
    next.run(request).await
}

async fn unknown_route(request: Request) -> Problem {
    let path: String = request.uri().path().chars().take(200).collect();
    Problem::new(
        StatusCode::NOT_FOUND,
        "unknown_route",
        format!("there is no route {} {path}", request.method()),
    )
}

async fn method_not_allowed(request: Request) -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!("{} is not for this path; the Allow header lists what is", request.method()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{body::Body, routing::get};
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;
    use std::{
        io::Write,
        sync::{Mutex, PoisonError},
    };

    /// Collects what is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_panic_is_answered_and_logged_and_the_next_request_is_answered_too() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let routes = Router::new()
            .route(
                "/bad",
                get(|| async {
                    if true {
                        panic!("on purpose")
                    }
                }),
            )
            .route("/good", get(|| async { "fine" }));
        let around = Surroundings { clock: Arc::new(SystemClock), metrics: Arc::default() };
        let service = TowerToHyperService::new(enclose(routes, Arc::new(Auth::loopback()), around));
        let ask = |path: &str| {
            let request = Request::get(path).header("host", "localhost").header("x-request-id", "r-1");
            service.call(request.body(Body::empty()).unwrap())
        };
        let response = ask("/bad").await.unwrap();
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers()["x-request-id"], "r-1");
        let body = axum::body::to_bytes(response.into_body(), 10_000).await.unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            (&problem["code"], &problem["detail"]),
            (&"internal".into(), &"internal error (r-1)".into())
        );
        let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let line = logged.lines().find(|line| line.contains("panicked")).expect("the panic is logged");
        assert!(line.contains("ERROR") && line.contains("r-1") && line.contains("on purpose"), "{line}");
        assert_eq!(ask("/good").await.unwrap().status(), 200);
    }

    #[tokio::test]
    async fn probes_are_answered_when_there_is_no_room() {
        let gated = |path: &'static str| {
            let route = routes().iter().find(|route| route.path == path).unwrap();
            let gate = Gate { auth: Arc::new(Auth::loopback()), route, room: Arc::new(Semaphore::new(0)) };
            get(|| async { "fine" }).route_layer(from_fn_with_state(gate, guard))
        };
        let router = Router::new().route("/pools", gated("/pools")).route("/healthz", gated("/healthz"));
        let service = TowerToHyperService::new(router);
        let ask = |path: &str| service.call(Request::get(path).body(Body::empty()).unwrap());
        let refused = ask("/pools").await.unwrap();
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["retry-after"]),
            (503, &"1".parse().unwrap())
        );
        assert_eq!(ask("/healthz").await.unwrap().status(), 200);
    }
}
