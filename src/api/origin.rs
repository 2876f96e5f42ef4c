//! The rule of a server without tokens: only this machine's own requests.
//!
//! Listening on loopback does not keep web pages out. A page can make a browser
//! send requests to `127.0.0.1` (cross-site request forgery), and a name that
//! resolves to it lets the page read the answers (DNS rebinding). So the `Host`
//! must be a loopback one, an `Origin` too, and a request that changes
//! something must not be one that a browser sends without asking first (its
//! content type is checked in [`super::body`]; nothing here ever answers a
//! preflight).

use std::net::{Ipv4Addr, Ipv6Addr};

use axum::http::{HeaderMap, Method, StatusCode, Uri, header};

use super::Problem;

/// Checks a request to a server without tokens.
///
/// # Errors
/// `host_not_allowed` or `origin_not_allowed`, both 403.
pub(super) fn check(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().unwrap_or_default(),
        _ => "",
    };
    // A request target in absolute form overrides the header (RFC 9112, 3.2.2).
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    if !is_loopback(host) || !is_loopback(authority) {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "host_not_allowed",
            "this server has no tokens, so it answers only requests whose Host is this machine itself; \
             set BOILERHOUSE_API_TOKENS_FILE to serve others",
        )
        .field("Host")
        .allowed(["localhost", "127.0.0.0/8", "[::1]"]));
    }
    let origin_is_bad =
        headers.get_all(header::ORIGIN).iter().any(|origin| !origin.to_str().is_ok_and(is_loopback_origin));
    let cross_site = headers
        .get_all("sec-fetch-site")
        .iter()
        .any(|site| site.as_bytes().eq_ignore_ascii_case(b"cross-site"));
    if origin_is_bad || (cross_site && !method.is_safe()) {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "origin_not_allowed",
            "this server has no tokens, so it answers no requests of web pages from elsewhere",
        )
        .field("Origin"));
    }
    Ok(())
}

/// Returns whether `host[:port]` means this machine by its very form.
fn is_loopback(authority: &str) -> bool {
    let is_port =
        |text: &str| text.is_empty() || (text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit()));
    if let Some(rest) = authority.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        let port_is_good = port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
        return port_is_good && address.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback());
    }
    let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
    is_port(port)
        && (host.eq_ignore_ascii_case("localhost")
            || host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback()))
}

fn is_loopback_origin(origin: &str) -> bool {
    ["http://", "https://"].iter().any(|scheme| origin.strip_prefix(scheme).is_some_and(is_loopback))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_forms_of_this_machine_are_loopback() {
        for good in [
            "localhost",
            "LOCALHOST:3000",
            "127.0.0.1",
            "127.0.0.1:80",
            "127.9.8.7:65535",
            "[::1]",
            "[::1]:3000",
            "localhost:",
        ] {
            assert!(is_loopback(good), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "localhost.evil.example",
            "evil.localhost",
            "127.0.0.1.evil.example",
            "127.1",
            "0177.0.0.1",
            "2130706433",
            "0.0.0.0",
            "10.0.0.1",
            "[::]",
            "[::2]:80",
            "[::1",
            "::1",
            "[::1]x",
            "[::1]:x",
            "localhost:80x",
            "localhost:80:80",
            "u@localhost",
            "127.0.0.1@evil.example",
            "localhost/",
            "localhost:123456",
            "[127.0.0.1]",
        ] {
            assert!(!is_loopback(bad), "{bad:?}");
        }
    }

    #[test]
    fn requests_from_elsewhere_are_refused() {
        type Row =
            (&'static str, &'static str, &'static [(&'static str, &'static str)], Option<&'static str>);
        #[rustfmt::skip]
        let rows: [Row; 17] = [
            ("GET", "/pools", &[("host", "127.0.0.1:3000")], None),
            ("POST", "/x", &[("host", "localhost")], None),
            ("POST", "/x", &[("host", "localhost"), ("origin", "http://localhost:8080")], None),
            ("POST", "/x", &[("host", "localhost"), ("origin", "https://[::1]")], None),
            ("POST", "/x", &[("host", "localhost"), ("sec-fetch-site", "same-origin")], None),
            ("GET", "/", &[("host", "localhost"), ("sec-fetch-site", "cross-site")], None),
            ("GET", "http://localhost/pools", &[("host", "localhost")], None),
            ("GET", "/pools", &[], Some("host_not_allowed")),
            ("GET", "/pools", &[("host", "")], Some("host_not_allowed")),
            ("GET", "/pools", &[("host", "rebound.example:3000")], Some("host_not_allowed")),
            ("GET", "/pools", &[("host", "localhost"), ("host", "localhost")], Some("host_not_allowed")),
            ("GET", "http://evil.example/pools", &[("host", "localhost")], Some("host_not_allowed")),
            ("GET", "/pools", &[("host", "localhost"), ("origin", "http://evil.example")], Some("origin_not_allowed")),
            ("POST", "/x", &[("host", "localhost"), ("origin", "null")], Some("origin_not_allowed")),
            ("POST", "/x", &[("host", "localhost"), ("origin", "http://localhost/")], Some("origin_not_allowed")),
            ("POST", "/x", &[("host", "localhost"), ("origin", "file://localhost")], Some("origin_not_allowed")),
            ("POST", "/x", &[("host", "localhost"), ("sec-fetch-site", "cross-site")], Some("origin_not_allowed")),
        ];
        for (method, uri, fields, expected) in rows {
            let mut headers = HeaderMap::new();
            for (name, value) in fields {
                let name = axum::http::HeaderName::try_from(*name).unwrap();
                headers.append(name, value.parse().unwrap());
            }
            let result = check(&method.parse().unwrap(), &uri.parse().unwrap(), &headers);
            let code = result.err().map(|problem| problem.code().to_owned());
            assert_eq!(code.as_deref(), expected, "{method} {uri} {fields:?}");
        }
    }
}
