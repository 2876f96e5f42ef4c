//! What a request brings: its body and its query, checked.
//!
//! A body is one JSON object; an empty one stands for `{}`. An error names the
//! field, the place and what is allowed, and never repeats a value: it may be
//! a secret (P11).

use std::{collections::BTreeMap, time::Duration};

use axum::{
    body::{Body, HttpBody},
    extract::Query,
    http::{HeaderMap, StatusCode, Uri, header},
};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use super::Problem;

/// How long a client may take to send a body.
const BODY_DEADLINE: Duration = Duration::from_secs(30);

/// Reads a body of at most `max_bytes` and parses it.
///
/// # Errors
/// `unsupported_media_type`, `body_too_large`, `body_timeout`, and those of [`parse`].
pub(super) async fn read<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    max_bytes: usize,
) -> Result<T, Problem> {
    check_type(headers, body.is_end_stream())?;
    let too_large = || {
        Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            format!("the body may have {max_bytes} bytes at most"),
        )
    };
    if body.size_hint().lower() > max_bytes as u64 {
        return Err(too_large());
    }
    let collect = async {
        let mut bytes = Vec::new();
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|_| {
                Problem::new(StatusCode::BAD_REQUEST, "invalid_json", "the body ended before its end")
            })?;
            if bytes.len() + chunk.len() > max_bytes {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(zeroize::Zeroizing::new(bytes))
    };
    let bytes = tokio::time::timeout(BODY_DEADLINE, collect).await.map_err(|_| {
        Problem::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_timeout",
            format!("the body did not arrive within {} s", BODY_DEADLINE.as_secs()),
        )
    })??;
    parse(&bytes)
}

/// Checks the content type. One that is there must be JSON's even when the body
/// is empty: a form without fields is something a web page can send.
fn check_type(headers: &HeaderMap, is_empty: bool) -> Result<(), Problem> {
    let mut types = headers.get_all(header::CONTENT_TYPE).iter();
    let is_good = match (types.next(), types.next()) {
        (None, _) => is_empty,
        (Some(value), None) => value
            .to_str()
            .ok()
            .and_then(|value| value.split(';').next())
            .is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json")),
        (Some(_), Some(_)) => false,
    };
    if is_good {
        return Ok(());
    }
    Err(Problem::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        "a body is sent with Content-Type: application/json",
    )
    .field("Content-Type")
    .allowed(["application/json"]))
}

/// Parses a body.
///
/// # Errors
/// `invalid_json` with line and column; `unknown_field` with the known ones;
/// `invalid_field` with the field's path.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let text: &[u8] = if bytes.trim_ascii().is_empty() { b"{}" } else { bytes };
    // A derived struct would take an array too, field by field.
    let first = text.trim_ascii_start().first();
    if matches!(first, Some(b'[' | b'"' | b'0'..=b'9' | b'-' | b't' | b'f' | b'n')) {
        return Err(Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid_field",
            "the body must be a JSON object",
        ));
    }
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| json_problem(error.path(), error.inner()))?;
    json.end().map_err(|error| syntax_problem(&error))?;
    Ok(value)
}

fn syntax_problem(error: &serde_json::Error) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is no JSON: {error}"))
}

fn json_problem(path: &serde_path_to_error::Path, error: &serde_json::Error) -> Problem {
    if !error.is_data() {
        return syntax_problem(error);
    }
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = error.to_string();
    let message = message.strip_suffix(&place).unwrap_or(&message);
    let explained = explain(message);
    let mut field = path.to_string();
    if let Some(missing) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        field = if field == "." { missing.to_owned() } else { format!("{field}.{missing}") };
    }
    let code = if message.starts_with("unknown field ") { "unknown_field" } else { "invalid_field" };
    let detail = if field == "." {
        format!("the body: {explained} (line {}, column {})", error.line(), error.column())
    } else {
        format!("{field}: {explained} (line {}, column {})", error.line(), error.column())
    };
    let mut problem =
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, code, detail).allowed(names_after_expected(message));
    if field != "." {
        problem = problem.field(field);
    }
    problem
}

/// Turns serde's `invalid type: string "x", expected u64` into
/// `expected u64, got a string`: the value itself is left out.
fn explain(message: &str) -> String {
    let wrong = ["invalid type: ", "invalid value: ", "invalid length: "]
        .iter()
        .find_map(|prefix| message.strip_prefix(prefix));
    let Some((got, expected)) = wrong.and_then(|rest| rest.rsplit_once(", expected ")) else {
        return message.to_owned();
    };
    let kind = got.split(['`', '"', '\'']).next().unwrap_or_default().trim();
    match kind {
        "" => format!("expected {expected}"),
        "map" => format!("expected {expected}, got an object"),
        "sequence" => format!("expected {expected}, got an array"),
        "null" => format!("expected {expected}, got null"),
        "integer" => format!("expected {expected}, got an integer"),
        kind => format!("expected {expected}, got a {kind}"),
    }
}

/// Returns the names that serde lists in backticks after `expected`.
fn names_after_expected(message: &str) -> Vec<&str> {
    if !message.starts_with("unknown ") {
        return Vec::new();
    }
    let Some((_, expected)) = message.split_once(", expected ") else { return Vec::new() };
    expected.split('`').skip(1).step_by(2).collect()
}

/// Reads the query, of which only the `known` parameters may be there, each once.
///
/// # Errors
/// `unknown_field` that lists the known ones; `invalid_field`.
pub(super) fn query(uri: &Uri, known: &'static [&'static str]) -> Result<BTreeMap<String, String>, Problem> {
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
        .map_err(|error| Problem::invalid_field("query", error.body_text()))?;
    let mut parameters = BTreeMap::new();
    for (name, value) in pairs {
        if !known.contains(&name.as_str()) {
            let allowed = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "unknown_field",
                format!("there is no query parameter {name:?} here; there are: {allowed}"),
            )
            .field(name)
            .allowed(known));
        }
        if parameters.contains_key(&name) {
            return Err(Problem::invalid_field(name, "is given twice in the query"));
        }
        parameters.insert(name, value);
    }
    Ok(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenancy::{ClaimRequest, ReleaseRequest, ReleaseWait};

    #[test]
    fn an_empty_body_stands_for_an_empty_object() {
        for text in ["", "  \n", "{}", " { } "] {
            assert!(parse::<ClaimRequest>(text.as_bytes()).unwrap().workload.is_none(), "{text:?}");
        }
        let request: ReleaseRequest = parse(br#"{"wait": "accepted", "epoch": 3}"#).unwrap();
        assert_eq!((request.wait, request.epoch.unwrap().0), (ReleaseWait::Accepted, 3));
    }

    #[test]
    fn an_error_names_field_place_and_what_is_allowed() {
        #[rustfmt::skip]
        let rows = [
            ("{", 400, "invalid_json", None, "line 1 column 1"),
            ("{\n  nope}", 400, "invalid_json", None, "line 2 column 3"),
            (r#"{"wait_ms": 1} x"#, 400, "invalid_json", None, "trailing characters at line 1 column 16"),
            (r#"{"wait_ms": "5"}"#, 422, "invalid_field", Some("wait_ms"), "wait_ms: expected u64, got a string (line 1, column 15)"),
            (r#"{"wait_ms": -5}"#, 422, "invalid_field", Some("wait_ms"), "expected u64, got an integer"),
            (r#"{"wait_ms": [1]}"#, 422, "invalid_field", Some("wait_ms"), "expected u64, got an array"),
            (r#"{"env": {"A": {}}}"#, 422, "invalid_field", Some("env.A"), "expected a string, got an object"),
            (r#"{"workload": "a/b"}"#, 422, "invalid_field", Some("workload"), "workload \"a/b\" does not match"),
            (r#"{"workloads": "a"}"#, 422, "unknown_field", Some("workloads"), "`wait_ms`"),
            (r#"{"env": {}, "env": {}}"#, 422, "invalid_field", None, "duplicate field `env`"),
            ("[]", 422, "invalid_field", None, "must be a JSON object"),
            ("null", 422, "invalid_field", None, "must be a JSON object"),
            ("\"a\"", 422, "invalid_field", None, "must be a JSON object"),
        ];
        for (text, status, code, field, detail) in rows {
            let problem = parse::<ClaimRequest>(text.as_bytes()).unwrap_err();
            let json = serde_json::to_value(&problem).unwrap();
            assert_eq!((problem.status(), problem.code()), (status, code), "{text}");
            assert_eq!(json["field"].as_str(), field, "{text}");
            assert!(json["detail"].as_str().unwrap().contains(detail), "{text}: {json}");
        }
    }

    #[test]
    fn known_names_are_listed() {
        let allowed = |problem: Problem| serde_json::to_value(&problem).unwrap()["allowed"].clone();
        let unknown = parse::<ReleaseRequest>(br#"{"force": true}"#).unwrap_err();
        assert_eq!(allowed(unknown), serde_json::json!(["workload", "epoch", "wait"]));
        let variant = parse::<ReleaseRequest>(br#"{"wait": "never"}"#).unwrap_err();
        assert_eq!(allowed(variant), serde_json::json!(["durable", "accepted"]));
    }

    /// P11: a value of a wrong type may be a secret.
    #[test]
    fn a_value_is_not_repeated() {
        for text in [
            r#"{"secrets": "hunter2"}"#,
            r#"{"secrets": {"k": 2718281828}}"#,
            r#"{"env": {"A": 2718281828}}"#,
        ] {
            let problem = parse::<ClaimRequest>(text.as_bytes()).unwrap_err();
            let json = serde_json::to_string(&problem).unwrap();
            assert!(!json.contains("hunter2") && !json.contains("2718281828"), "{json}");
        }
        assert_eq!(
            explain("invalid type: string \"a, expected b\", expected u64"),
            "expected u64, got a string"
        );
    }

    #[test]
    fn the_content_type_is_json_or_the_body_empty() {
        #[rustfmt::skip]
        let rows: [(&[&str], bool, bool); 9] = [
            (&[], true, true),
            (&[], false, false),
            (&["application/json"], false, true),
            (&["Application/JSON; charset=utf-8"], false, true),
            (&["application/json"], true, true),
            (&["text/plain"], false, false),
            (&["application/x-www-form-urlencoded"], true, false),
            (&["application/jsonp"], false, false),
            (&["application/json", "text/plain"], false, false),
        ];
        for (types, is_empty, is_good) in rows {
            let mut headers = HeaderMap::new();
            for value in types {
                headers.append(header::CONTENT_TYPE, value.parse().unwrap());
            }
            assert_eq!(check_type(&headers, is_empty).is_ok(), is_good, "{types:?} {is_empty}");
        }
    }

    #[test]
    fn only_known_query_parameters_are_taken_each_once() {
        let rows = [
            ("/x", Ok(None)),
            ("/x?", Ok(None)),
            ("/x?workload=web", Ok(Some("web"))),
            ("/x?workload=we%62", Ok(Some("web"))),
            ("/x?workload=a&workload=a", Err("invalid_field")),
            ("/x?worklod=a", Err("unknown_field")),
        ];
        for (uri, expected) in rows {
            let found = query(&uri.parse().unwrap(), &["workload"]);
            let found = found.as_ref().map(|q| q.get("workload").map(String::as_str)).map_err(Problem::code);
            assert_eq!(found, expected, "{uri}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_is_not_waited_for() {
        let endless = Body::from_stream(futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>());
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, "application/json".parse().unwrap())]);
        let problem = read::<ClaimRequest>(&headers, endless, 100).await.unwrap_err();
        assert_eq!((problem.status(), problem.code()), (408, "body_timeout"));
    }
}
