//! The real S3 server: found through `TEST_S3_ENV`, else started by
//! `tools/radosgw.sh` in `target/radosgw`, where it stays for the next run and
//! stops itself when no test has asked for it for half an hour.

#![allow(dead_code, reason = "each test binary uses its own part of the support modules")]

use std::{collections::HashMap, path::PathBuf, process::Command};

use boilerhouse::{config::Aws, model::Secret};

/// Where the server is.
pub(crate) struct Radosgw {
    /// Credentials and place, as the configuration has them.
    pub(crate) aws: Aws,
    /// A bucket that is there.
    pub(crate) bucket: String,
}

impl Radosgw {
    /// Finds or starts the server.
    ///
    /// # Panics
    /// With the script's words, which say what to install, when it cannot be started.
    pub(crate) fn find() -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let env = std::env::var_os("TEST_S3_ENV").map(PathBuf::from).unwrap_or_else(|| {
            let dir = root.join("target/radosgw");
            let script = root.join("tools/radosgw.sh");
            let output = Command::new(&script).arg("start").arg(&dir).output().expect("bash runs the script");
            let words = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "the S3 server for tests did not start: {words}");
            dir.join("env")
        });
        let text = std::fs::read_to_string(&env)
            .unwrap_or_else(|error| panic!("{} (from TEST_S3_ENV): {error}", env.display()));
        let values: HashMap<_, _> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let value = |name: &str| match values.get(name) {
            Some(value) => (*value).to_owned(),
            None => panic!("{} has no {name}", env.display()),
        };
        Self {
            aws: Aws {
                access_key_id: Some(value("AWS_ACCESS_KEY_ID")),
                secret_access_key: Some(Secret::new(value("AWS_SECRET_ACCESS_KEY"))),
                region: value("AWS_REGION"),
                endpoint_url: Some(value("AWS_ENDPOINT_URL")),
                ..Aws::default()
            },
            bucket: value("TEST_S3_BUCKET"),
        }
    }
}
