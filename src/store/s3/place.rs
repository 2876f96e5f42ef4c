//! From configuration to the library's bucket, refusing what it would bend.

use std::path::Path;

use s3::{Bucket, Region, creds::Credentials};

use super::identity::{Keys, Source};
use crate::{
    config::Aws,
    model::Secret,
    store::{Error, MAX_KEY_BYTES},
};

/// S3 allows this many bytes in a key, our prefix included.
const MAX_FULL_KEY_BYTES: usize = 1024;

/// A bucket and the prefix under which all our keys are.
pub(super) struct Place {
    pub(super) bucket: Bucket,
    /// Empty, or ending with `/`.
    pub(super) prefix: String,
    pub(super) source: Source,
    /// The certificate authorities to trust, in PEM; none: the built-in ones.
    pub(super) authorities: Option<Vec<u8>>,
}

// === impl Place ===

impl Place {
    /// Checks the parts and puts them together; makes no call.
    pub(super) fn new(bucket: &str, prefix: &str, aws: &Aws) -> Result<Self, Error> {
        let refuse =
            |reason: String| Err(Error::refused("connect", &format!("s3://{bucket}/{prefix}"), reason));
        if let Some(fault) = fault_of_bucket(bucket).or_else(|| fault_of_prefix(prefix)) {
            return refuse(fault);
        }
        let parts = region(aws).and_then(|region| Ok((region, source(aws)?, authorities(aws)?)));
        let (region, source, authorities) = match parts {
            Ok(parts) => parts,
            Err(fault) => return refuse(fault),
        };
        // A dot in a bucket's name fits no wildcard certificate.
        let by_default = aws.endpoint_url.is_some() || bucket.contains('.');
        let is_path_style = aws.force_path_style.unwrap_or(by_default);
        // Signing is given its credentials with each request.
        let made = Credentials::anonymous().map_err(|error| error.to_string());
        let made = made.and_then(|none| Bucket::new(bucket, region, none).map_err(|error| error.to_string()));
        let mut library = match made {
            Ok(library) => *library,
            Err(fault) => return refuse(format!("the HTTP client cannot be made: {fault}")),
        };
        if is_path_style {
            library.set_path_style();
        }
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(Self { bucket: library, prefix, source, authorities })
    }
}

/// Chooses the server: the endpoint, else Amazon's own for the region, also for
/// regions that are younger than the library's table.
fn region(aws: &Aws) -> Result<Region, String> {
    let region = aws.region.clone();
    let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    if region.is_empty() || region.len() > 64 || !region.bytes().all(is_name) {
        return Err(format!(
            "AWS_REGION {region:?} is not a region; allowed are letters, digits, '-' and '_'"
        ));
    }
    let endpoint = match &aws.endpoint_url {
        Some(url) => endpoint(url)?,
        None if region.starts_with("cn-") => format!("https://s3.{region}.amazonaws.com.cn"),
        None => format!("https://s3.{region}.amazonaws.com"),
    };
    Ok(Region::Custom { region, endpoint })
}

/// Chooses where credentials come from: the first that is set of a key, a
/// profile, a container's endpoint and an instance's.
fn source(aws: &Aws) -> Result<Source, String> {
    // The address of Amazon's container agents.
    const AGENT: &str = "http://169.254.170.2";
    if aws.access_key_id.is_some() || aws.secret_access_key.is_some() {
        return given(aws).map(Source::Fixed);
    }
    let profile = aws.profile.as_deref().unwrap_or("default");
    if let Some(file) = &aws.shared_credentials_file {
        return from_profile("AWS_SHARED_CREDENTIALS_FILE", file, profile).map(Source::Fixed);
    }
    if let Some(file) = &aws.config_file {
        let section = if profile == "default" { profile.to_owned() } else { format!("profile {profile}") };
        return from_profile("AWS_CONFIG_FILE", file, &section).map(Source::Fixed);
    }
    let relative = aws.container_relative_uri.as_ref().map(|path| format!("{AGENT}{path}"));
    if let Some(url) = relative.or(aws.container_full_uri.clone()) {
        let token_file = aws.container_token_file.clone();
        return Ok(Source::Container { url, token: aws.container_token.clone(), token_file });
    }
    if let Some(endpoint) = &aws.metadata_endpoint {
        return Ok(Source::Instance { endpoint: endpoint.clone() });
    }
    given(aws).map(Source::Fixed)
}

fn given(aws: &Aws) -> Result<Keys, String> {
    // A character that a header cannot hold would fail later, in an error that
    // may show it.
    let visible = |name: &str, bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok("") => Err(format!("{name} is empty")),
        Ok(text) if text.bytes().all(|b| b.is_ascii_graphic()) => Ok(()),
        _ => Err(format!("{name} holds characters other than visible ASCII")),
    };
    let id = aws.access_key_id.clone().ok_or("AWS_ACCESS_KEY_ID is not set")?;
    visible("AWS_ACCESS_KEY_ID", id.as_bytes())?;
    let secret = aws.secret_access_key.clone().ok_or("AWS_SECRET_ACCESS_KEY is not set")?;
    visible("AWS_SECRET_ACCESS_KEY", secret.expose())?;
    let token = aws.session_token.clone();
    token.as_ref().map_or(Ok(()), |token| visible("AWS_SESSION_TOKEN", token.expose()))?;
    Ok(Keys { id, secret, token, ends_ms: None })
}

/// Reads a section of a file; an error shows none of its lines.
fn from_profile(name: &str, file: &Path, section: &str) -> Result<Keys, String> {
    let found = Credentials::from_credentials_file(file, Some(section)).ok();
    let found = found.and_then(|found| {
        let token = found.session_token.or(found.security_token);
        Some((found.access_key?, found.secret_key?, token))
    });
    let (id, secret, token) = found.ok_or_else(|| {
        format!(
            "{name}: {} cannot be read, or has no section [{section}] with aws_access_key_id and \
             aws_secret_access_key",
            file.display()
        )
    })?;
    Ok(Keys { id, secret: Secret::new(secret), token: token.map(Secret::new), ends_ms: None })
}

fn authorities(aws: &Aws) -> Result<Option<Vec<u8>>, String> {
    let Some(path) = &aws.ca_bundle else { return Ok(None) };
    let read = std::fs::read(path);
    read.map(Some).map_err(|error| format!("AWS_CA_BUNDLE: {} cannot be read: {error}", path.display()))
}

fn endpoint(url: &str) -> Result<String, String> {
    const ALLOWED: &str = "allowed is http://HOST[:PORT] or https://HOST[:PORT], with or without a path";
    let Some(rest) = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")) else {
        return Err(format!("AWS_ENDPOINT_URL does not begin with http:// or https://; {ALLOWED}"));
    };
    // Not shown: a password may stand before the '@'.
    let is_plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'@' | b'?' | b'#' | b'\\');
    let host = rest.split('/').next().unwrap_or_default();
    if host.is_empty() || !rest.bytes().all(is_plain) {
        return Err(format!("AWS_ENDPOINT_URL has no host, or has a user, a query or a fragment; {ALLOWED}"));
    }
    Ok(url.trim_end_matches('/').to_owned())
}

fn fault_of_bucket(bucket: &str) -> Option<String> {
    let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let is_bucket = (3..=63).contains(&bucket.len()) && bucket.bytes().all(is_name) && !bucket.contains("..");
    let is_bucket = is_bucket && bucket.starts_with(|c: char| c.is_ascii_alphanumeric());
    (!is_bucket).then(|| {
        "the bucket's name is not 3 to 63 letters, digits, '-', '_' or '.' that begin with a letter or digit"
            .to_owned()
    })
}

fn fault_of_prefix(prefix: &str) -> Option<String> {
    if prefix.is_empty() {
        return None;
    }
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'=' | b'/');
    let is_prefix = prefix.len() < MAX_FULL_KEY_BYTES - MAX_KEY_BYTES
        && prefix.bytes().all(is_plain)
        && prefix.split('/').all(|segment| !matches!(segment, "" | "." | ".."));
    (!is_prefix).then(|| {
        format!(
            "the prefix is not made of letters, digits, '-', '_', '=' and '.' with single '/' between, without '.' and \
             '..' as segments, in less than {} bytes",
            MAX_FULL_KEY_BYTES - MAX_KEY_BYTES
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aws() -> Aws {
        Aws {
            access_key_id: Some("AKIAEXAMPLE".to_owned()),
            secret_access_key: Some(Secret::new("hunter2")),
            region: "eu-central-1".to_owned(),
            ..Aws::default()
        }
    }

    #[tokio::test]
    async fn the_address_follows_from_region_and_endpoint() {
        let at = |endpoint: Option<&str>, region: &str| Aws {
            endpoint_url: endpoint.map(str::to_owned),
            region: region.to_owned(),
            ..aws()
        };
        for (aws, bucket, url) in [
            (at(None, "eu-central-1"), "data", "https://data.s3.eu-central-1.amazonaws.com"),
            (at(None, "cn-north-1"), "data", "https://data.s3.cn-north-1.amazonaws.com.cn"),
            (at(None, "eu-west-9"), "my.data", "https://s3.eu-west-9.amazonaws.com/my.data"),
            (at(Some("http://127.0.0.1:9000/"), "us-east-1"), "data", "http://127.0.0.1:9000/data"),
            (at(Some("https://h.example/s3"), "auto"), "data", "https://h.example/s3/data"),
        ] {
            assert_eq!(Place::new(bucket, "", &aws).unwrap().bucket.url(), url);
        }
        let style = |force: bool, endpoint: Option<&str>| {
            let aws = Aws { force_path_style: Some(force), ..at(endpoint, "eu-1") };
            Place::new("data", "", &aws).unwrap().bucket.url()
        };
        assert_eq!(style(true, None), "https://s3.eu-1.amazonaws.com/data");
        assert_eq!(style(false, Some("https://h.example:9")), "https://data.h.example:9");
        assert_eq!(Place::new("data", "a/b", &aws()).unwrap().prefix, "a/b/");
    }

    #[test]
    fn what_the_library_would_bend_is_refused_without_showing_secrets() {
        let mut rows = Vec::new();
        for bucket in ["", "ab", "a/b/c", "a..b", "-abc", "a b c", "a?bc"] {
            rows.push((bucket, "", aws(), "bucket"));
        }
        for prefix in ["/", "a/", "/a", "a//b", "a/../b", "a b", "a%2e", "ä"] {
            rows.push(("data", prefix, aws(), "prefix"));
        }
        for endpoint in
            ["ftp://h", "h:9000", "http://", "http://u:hunter2@h", "http://h?x=hunter2", "http://h#x"]
        {
            rows.push((
                "data",
                "",
                Aws { endpoint_url: Some(endpoint.to_owned()), ..aws() },
                "AWS_ENDPOINT_URL",
            ));
        }
        rows.push(("data", "", Aws { region: "a/b".to_owned(), ..aws() }, "AWS_REGION"));
        rows.push(("data", "", Aws { region: String::new(), ..aws() }, "AWS_REGION"));
        rows.push(("data", "", Aws { access_key_id: None, ..aws() }, "AWS_ACCESS_KEY_ID"));
        rows.push(("data", "", Aws { secret_access_key: None, ..aws() }, "AWS_SECRET_ACCESS_KEY"));
        let broken = Some(Secret::new("hunter2\n"));
        rows.push(("data", "", Aws { secret_access_key: broken.clone(), ..aws() }, "AWS_SECRET_ACCESS_KEY"));
        rows.push(("data", "", Aws { session_token: broken, ..aws() }, "AWS_SESSION_TOKEN"));
        for (bucket, prefix, aws, named) in rows {
            let Err(error) = Place::new(bucket, prefix, &aws) else {
                panic!("s3://{bucket}/{prefix} with {aws:?} was taken")
            };
            assert!(matches!(error, Error::Refused { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(named) && !text.contains("hunter2"), "{text}");
        }
    }
}
