//! What surrounds every request: its id, its span, its deadline, its count, and
//! what happens when answering it panics.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use tracing::Instrument;

use super::{PREFIX, Problem};
use crate::{
    clock::{SharedClock, random_hex},
    telemetry::Metrics,
};

/// How long one request may take at most. Tenancy's own deadlines are far
/// shorter; this one only keeps a mistake of ours from holding a connection.
const REQUEST_DEADLINE: Duration = Duration::from_secs(600);

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the envelope works with.
#[derive(Clone)]
pub(super) struct Surroundings {
    /// Makes request ids.
    pub(super) clock: SharedClock,
    /// Counts requests.
    pub(super) metrics: Arc<Metrics>,
}

/// Gives a request its id and span, answers for it when it panics or takes too
/// long, and logs and counts it once.
pub(super) async fn envelope(
    State(around): State<Surroundings>,
    path: Option<MatchedPath>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = request_id(request.headers().get(&REQUEST_ID)).unwrap_or_else(|| made_id(&*around.clock));
    // For whoever handles the request: one value, no second header beside it.
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let id_text = id.to_str().unwrap_or_default().to_owned();
    let span = tracing::info_span!(
        "request",
        request_id = id_text,
        method = %request.method(),
        route = tracing::field::Empty,
        tenant = tracing::field::Empty,
        caller = tracing::field::Empty,
    );
    let changes = !request.method().is_safe();
    let method = request.method().clone();
    let work = async {
        let started = tokio::time::Instant::now();
        let answer =
            tokio::time::timeout(REQUEST_DEADLINE, AssertUnwindSafe(next.run(request)).catch_unwind());
        let response = match answer.await {
            Ok(Ok(response)) => response,
            Ok(Err(panic)) => {
                tracing::error!(panic = panic_text(&*panic), "answering a request panicked");
                Problem::internal(&id_text).into_response()
            }
            Err(_) => Problem::new(
                StatusCode::GATEWAY_TIMEOUT,
                "deadline_exceeded",
                "the request took too long; its outcome is unknown, ask for the tenant's status",
            )
            .into_response(),
        };
        let status = response.status().as_u16();
        let ms = started.elapsed().as_secs_f64() * 1000.0;
        // 503 is how an exhausted pool answers: not an alarm in itself.
        if status >= 500 && status != 503 {
            tracing::warn!(status, ms, "answered");
        } else if changes {
            tracing::info!(status, ms, "answered");
        } else {
            tracing::debug!(status, ms, "answered");
        }
        response
    };
    let mut response = work.instrument(span).await;
    // The pattern, never the path: a label has a bounded number of values.
    let route = path.as_ref().map(|path| path.as_str().strip_prefix(PREFIX).unwrap_or(path.as_str()));
    around.metrics.http_request(route, method.as_str(), response.status().as_u16());
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    // An answer may hold what a hook chose to show, a secret among it.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Returns the id that a client gave, if it is one that a log line can hold.
fn request_id(given: Option<&HeaderValue>) -> Option<HeaderValue> {
    let given = given?;
    let is_sane = (1..=128).contains(&given.len())
        && given.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"-._:=@/+".contains(b));
    is_sane.then(|| given.clone())
}

fn made_id(clock: &dyn crate::clock::Clock) -> HeaderValue {
    HeaderValue::try_from(random_hex(clock, 8)).expect("hexadecimal digits are header text")
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sane_request_id_is_kept() {
        for (given, is_kept) in [
            ("req-1", true),
            ("Root=1-6789:a/b+c@d", true),
            (&"x".repeat(128) as &str, true),
            (&"x".repeat(129), false),
            ("", false),
            ("a b", false),
            ("a\"b", false),
        ] {
            let value = HeaderValue::from_str(given).unwrap();
            assert_eq!(request_id(Some(&value)).is_some(), is_kept, "{given:?}");
        }
        assert!(request_id(Some(&HeaderValue::from_bytes(b"\xff").unwrap())).is_none());
        assert!(request_id(None).is_none());
    }
}
