//! What tests of whole servers on real Docker and a real S3 server share.

use serde_json::Value;

use super::{engine::SOCKET, images, radosgw::Radosgw, server::Home};

/// A workload whose program stays up, with `more` fields.
pub fn workload(id: &str, more: &str) -> String {
    format!(
        r#"//! A program that stays up, with its state in /data.
fn workload() {{
    #{{
        id: "{id}",
        image: "{image}",
        command: ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"],
        pull: "never",
        volumes: #{{
            state: #{{ container_path: "/data", mode: "rw" }},
            secrets: #{{ container_path: "/secrets", mode: "ro" }},
            comm: #{{ container_path: "/comm", mode: "rw" }},
        }},
        resources: #{{ memory_mb: 64, pids: 64, tmpfs_mb: 8 }},
        stop_grace_ms: 3000,
        {more}
    }}
}}
"#,
        image = images::APP
    )
}

/// Points an installation at the real S3 server, below a prefix of its own.
pub fn on_s3(home: &mut Home) {
    let prefix = home.instance().to_owned();
    on_s3_at(home, &prefix);
}

/// Points an installation at the real S3 server, below this prefix.
pub fn on_s3_at(home: &mut Home, prefix: &str) {
    let s3 = Radosgw::find();
    home.set("BOILERHOUSE_STORE", &format!("s3://{}/{prefix}", s3.bucket));
    on_server(home, &s3.aws);
}

/// Gives an installation the place and the credentials of an S3 server.
pub fn on_server(home: &mut Home, aws: &boilerhouse::config::Aws) {
    home.set("AWS_ENDPOINT_URL", aws.endpoint_url.as_deref().expect("a place"));
    home.set("AWS_ACCESS_KEY_ID", aws.access_key_id.as_deref().expect("a key"));
    let secret = aws.secret_access_key.as_ref().expect("a secret key");
    home.set("AWS_SECRET_ACCESS_KEY", std::str::from_utf8(secret.expose()).expect("text"));
    home.set("AWS_REGION", &aws.region);
}

/// Makes sure that the engine has the images that these tests' workloads name.
pub async fn ensure_images() {
    let docker = bollard::Docker::connect_with_unix(SOCKET, 120, bollard::API_DEFAULT_VERSION)
        .expect("the engine's socket (see `make setup`)");
    let docker = docker.negotiate_version().await.expect("the engine answers");
    images::ensure(&docker).await;
}

/// Returns the name of a claim's container.
pub fn container(claim: &Value) -> String {
    claim["container"]["name"].as_str().expect("a claim names its container").to_owned()
}
