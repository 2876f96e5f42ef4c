//! Values from text: each says what is allowed when the text is not.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use super::StoreLocation;

/// More containers or pool slots than any node can have.
const COUNT_MAX: u32 = 100_000;

/// One year.
const WAIT_MAX_MS: u64 = 31_536_000_000;

/// A key in the store must not grow beyond S3's 1,024 bytes.
const PREFIX_MAX_BYTES: usize = 256;

pub(super) fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| {
        let link = if text.starts_with("tcp://") {
            " (Kubernetes injects such values for a service named boilerhouse-api: set enableServiceLinks: false)"
        } else {
            ""
        };
        format!("is no port{link}; allowed: 0 to 65535")
    })
}

pub(super) fn host(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| {
        "is no IP address; allowed: an address without port, such as 127.0.0.1, 0.0.0.0 or ::1".to_owned()
    })
}

pub(super) fn count(text: &str, least: u32) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| (least..=COUNT_MAX).contains(number));
    number.ok_or_else(|| format!("is no such number; allowed: {least} to {COUNT_MAX}"))
}

/// 16 EiB are more than a file system has.
const MEGABYTES_MAX: u64 = 1 << 44;

pub(super) fn wait_ms(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| *number <= WAIT_MAX_MS);
    number
        .ok_or_else(|| format!("is no number of milliseconds; allowed: 0 (never) to {WAIT_MAX_MS} (a year)"))
}

/// Reads a size.
pub(super) fn megabytes(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| *number <= MEGABYTES_MAX);
    number.ok_or_else(|| format!("is no number of MiB; allowed: 0 (no bound) to {MEGABYTES_MAX}"))
}

/// Reads a yes or no.
pub(super) fn truth(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "is neither; allowed: true or false".to_owned())
}

/// Reads a path at the container agent's address.
pub(super) fn agent_path(text: &str) -> Result<String, String> {
    let is_plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'#' | b'@' | b'\\');
    if text.starts_with('/') && !text.starts_with("//") && text.bytes().all(is_plain) {
        return Ok(text.to_owned());
    }
    Err("is no path of an address; allowed: text that begins with one /".to_owned())
}

/// Reads the address of a container's credentials: what is asked with a token
/// leaves this host only encrypted.
pub(super) fn container_uri(text: &str) -> Result<String, String> {
    const HOSTS: [&str; 6] =
        ["127.0.0.1", "localhost", "[::1]", "169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"];
    let is_plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'#' | b'@' | b'\\');
    let host = |rest: &str| rest.split(['/', '?']).next().unwrap_or_default().to_owned();
    let is_near = |rest: &str| {
        let host = host(rest);
        HOSTS
            .iter()
            .any(|near| host.strip_prefix(near).is_some_and(|port| port.is_empty() || port.starts_with(':')))
    };
    let is_good = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
        (Some(rest), _) => is_near(rest),
        (_, Some(rest)) => !host(rest).is_empty(),
        _ => false,
    };
    if is_good && text.bytes().all(is_plain) {
        return Ok(text.to_owned());
    }
    Err(format!("is no such address; allowed: https://HOST/PATH, and http:// at {}", HOSTS.join(", ")))
}

/// Reads the address of an instance's metadata service.
pub(super) fn metadata_endpoint(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("http://").unwrap_or_default().trim_end_matches('/');
    if !rest.is_empty() && is_authority(rest) {
        return Ok(format!("http://{rest}"));
    }
    Err("is no address; allowed: http://HOST[:PORT], mostly http://169.254.169.254".to_owned())
}

/// Reads a path; a relative one counts from where the server starts.
pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    if text.contains('\0') {
        return Err("contains a zero byte; allowed: a path".to_owned());
    }
    std::path::absolute(text).map_err(|error| format!("cannot be made absolute ({error}); allowed: a path"))
}

pub(super) fn image(text: &str) -> Result<String, String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts && text.len() <= 512 && text.chars().all(fine) {
        Ok(text.to_owned())
    } else {
        Err("is no image reference; allowed: such as alpine:latest or registry.example:5000/name@sha256:…"
            .to_owned())
    }
}

pub(super) fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{text:?} is no switch; allowed: off, on")),
    }
}

pub(super) fn store(text: &str) -> Result<StoreLocation, String> {
    const ALLOWED: &str = "allowed: s3://bucket/prefix or file:///absolute/path";
    if let Some(path) = text.strip_prefix("file://") {
        if !path.starts_with('/') {
            return Err(format!("has no absolute path after file://; {ALLOWED}"));
        }
        if path.contains(['?', '#', '%', '\0']) {
            return Err(format!("has one of ? # % in its path, which is taken as it is; {ALLOWED}"));
        }
        if Path::new(path).parent().is_none() {
            return Err(format!("is the root directory; {ALLOWED}"));
        }
        return Ok(StoreLocation::Directory(self::path(path)?));
    }
    let Some(rest) = text.strip_prefix("s3://") else {
        return Err(format!("is no store; {ALLOWED}"));
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if !is_bucket(bucket) {
        return Err(
            "has no bucket name after s3://; allowed: 3 to 63 of a-z 0-9 . and -, a letter or digit at both ends"
                .to_owned(),
        );
    }
    let prefix = prefix.trim_matches('/');
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-=+@".contains(c);
    let segment = |part: &str| !part.is_empty() && part != "." && part != ".." && part.chars().all(fine);
    if !prefix.is_empty() && (prefix.len() > PREFIX_MAX_BYTES || !prefix.split('/').all(segment)) {
        return Err(format!(
            "has a prefix that is not allowed; allowed: up to {PREFIX_MAX_BYTES} of A-Z a-z 0-9 . _ - = + @ \
             in parts divided by /, none of them . or .."
        ));
    }
    Ok(StoreLocation::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

fn is_bucket(name: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    (3..=63).contains(&name.len())
        && edge(name.chars().next())
        && edge(name.chars().last())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-".contains(c))
}

pub(super) fn instance(text: &str) -> Result<String, String> {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edges = !text.starts_with('-') && !text.ends_with('-');
    if (1..=32).contains(&text.len()) && edges && text.chars().all(fine) {
        Ok(text.to_owned())
    } else {
        Err("is no identity; allowed: 1 to 32 of a-z 0-9 and -, no - at its ends".to_owned())
    }
}

pub(super) fn docker_host(text: &str) -> Result<String, String> {
    let fine = if let Some(path) = text.strip_prefix("unix://") {
        path.starts_with('/') && path.len() > 1
    } else if let Some(authority) = text.strip_prefix("tcp://").or_else(|| text.strip_prefix("http://")) {
        authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
            && is_authority(authority)
    } else {
        false
    };
    if fine {
        Ok(text.to_owned())
    } else {
        Err("is no engine that is supported; allowed: unix:///path/to/docker.sock or tcp://host:port (without \
             TLS), not ssh:// or https://"
            .to_owned())
    }
}

pub(super) fn token(text: &str) -> Result<String, String> {
    if text.len() <= 16_384 && text.chars().all(|c| c.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("has a space, a line break or another character that credentials do not have".to_owned())
    }
}

pub(super) fn region(text: &str) -> Result<String, String> {
    if text.len() <= 64 && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
        Ok(text.to_owned())
    } else {
        Err("is no region; allowed: such as us-east-1".to_owned())
    }
}

pub(super) fn endpoint(text: &str) -> Result<String, String> {
    const ALLOWED: &str = "allowed: http(s)://host[:port], without path, user or password";
    let authority = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let Some(authority) = authority.map(|rest| rest.strip_suffix('/').unwrap_or(rest)) else {
        return Err(format!("does not begin with http:// or https://; {ALLOWED}"));
    };
    if is_authority(authority) {
        Ok(text.strip_suffix('/').unwrap_or(text).to_owned())
    } else {
        Err(format!("is no address of an S3 server; {ALLOWED}"))
    }
}

/// Checks `host`, `host:port`, `[v6]` or `[v6]:port`.
fn is_authority(text: &str) -> bool {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((host, after)) = rest.split_once(']') else { return false };
        if host.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match after.strip_prefix(':') {
            None if after.is_empty() => return true,
            None => return false,
            Some(port) => ("v6", Some(port)),
        }
    } else {
        text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)))
    };
    let named = !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    named && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}
