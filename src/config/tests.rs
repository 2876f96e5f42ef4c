//! Good and bad configurations.

use std::{fs, path::Path};

use tempfile::TempDir;

use super::*;

/// Variables and their values.
type Given = &'static [(&'static str, &'static str)];

fn load(environment: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    Config::load(environment.iter().copied())
}

/// Loads a file, with variables beside it. `{dir}` in the file stands for its directory.
fn load_file(source: &str, environment: &[(&str, &str)]) -> (TempDir, Result<Config, ConfigErrors>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bh.ron");
    fs::write(&path, source.replace("{dir}", directory.path().to_str().unwrap())).unwrap();
    let file = [("BOILERHOUSE_CONFIG", path.to_str().unwrap())];
    let result = load(&[file.as_slice(), environment].concat());
    (directory, result)
}

#[test]
fn the_defaults_are_the_original_ones() {
    let config = load(&[]).unwrap();
    assert_eq!(config.api_port, 3000);
    assert_eq!(config.api_host.to_string(), "127.0.0.1");
    assert_eq!((config.pool_size, config.max_containers, config.idle_timeout_ms), (5, 50, 300_000));
    assert_eq!((config.cache_max_mb, config.cache_min_free_mb), (0, 1_024));
    assert_eq!(config.state_dir, Path::new("/var/lib/boilerhouse/states"));
    assert_eq!(config.secrets_dir, Path::new("/var/lib/boilerhouse/secrets"));
    assert_eq!(config.socket_dir, Path::new("/var/run/boilerhouse"));
    assert_eq!(config.default_image, "alpine:latest");
    assert_eq!(config.store, StoreLocation::Directory("/var/lib/boilerhouse/store".into()));
    assert_eq!(config.aws, Aws { region: "us-east-1".into(), ..Aws::default() });
    assert_eq!(config.workloads_dir, std::env::current_dir().unwrap().join("workloads"));
    assert_eq!(config.scripts_dir, std::env::current_dir().unwrap().join("scripts"));
    assert_eq!(config.api_tokens_file, None);
    assert_eq!(config.origins.of("api_port"), "default");
}

/// One row each: what is given, the key to look at, and what it comes out as.
#[test]
fn good_values_are_taken() {
    let s3: Given = &[("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "k")];
    let tokens: Given = &[("BOILERHOUSE_API_TOKENS_FILE", "/t")];
    let rows: &[(Given, Given, &str, &str)] = &[
        (&[("BOILERHOUSE_API_PORT", "0")], &[], "api_port", "0"),
        (&[("BOILERHOUSE_API_PORT", "65535")], &[], "api_port", "65535"),
        (&[("BOILERHOUSE_API_HOST", "127.9.9.9")], &[], "api_host", "127.9.9.9"),
        (&[("BOILERHOUSE_API_HOST", "::1")], &[], "api_host", "::1"),
        (&[("BOILERHOUSE_API_HOST", "::ffff:127.0.0.1")], &[], "api_host", "::ffff:127.0.0.1"),
        (&[("BOILERHOUSE_API_HOST", "0.0.0.0")], tokens, "api_host", "0.0.0.0"),
        (&[("BOILERHOUSE_API_HOST", "10.0.0.1")], tokens, "api_host", "10.0.0.1"),
        (&[], tokens, "api_host", "0.0.0.0"),
        (&[("BOILERHOUSE_POOL_SIZE", "0")], &[], "pool_size", "0"),
        (&[("BOILERHOUSE_IDLE_TIMEOUT_MS", "0")], &[], "idle_timeout_ms", "0"),
        (&[("BOILERHOUSE_CACHE_MAX_MB", "20480")], &[], "cache_max_mb", "20480"),
        (&[("BOILERHOUSE_CACHE_MIN_FREE_MB", "0")], &[], "cache_min_free_mb", "0"),
        (&[("BOILERHOUSE_STATE_DIR", "/x y/ü")], &[], "state_dir", "/x y/ü"),
        (
            &[("BOILERHOUSE_DEFAULT_IMAGE", "r.example:5000/a/b@sha256:0a")],
            &[],
            "default_image",
            "r.example:5000/a/b@sha256:0a",
        ),
        (&[("BOILERHOUSE_STORE", "file:///srv/store")], &[], "store", "file:///srv/store"),
        (&[("BOILERHOUSE_STORE", "s3://bucket")], s3, "store", "s3://bucket"),
        (&[("BOILERHOUSE_STORE", "s3://bucket/a/b=c/")], s3, "store", "s3://bucket/a/b=c"),
        (&[("BOILERHOUSE_INSTANCE", "a")], &[], "instance", "a"),
        (
            &[("DOCKER_HOST", "unix:///run/user/1/docker.sock")],
            &[],
            "docker_host",
            "unix:///run/user/1/docker.sock",
        ),
        (&[("DOCKER_HOST", "tcp://10.0.0.1:2375")], &[], "docker_host", "tcp://10.0.0.1:2375"),
        (&[("AWS_DEFAULT_REGION", "eu-1")], &[], "aws.region", "eu-1"),
        (&[("AWS_DEFAULT_REGION", "eu-1"), ("AWS_REGION", "eu-2")], &[], "aws.region", "eu-2"),
        (&[("AWS_ENDPOINT_URL", "http://s3:9000/")], &[], "aws.endpoint_url", "http://s3:9000"),
        (
            &[("AWS_ENDPOINT_URL", "http://a"), ("AWS_ENDPOINT_URL_S3", "https://[::1]:9")],
            &[],
            "aws.endpoint_url",
            "https://[::1]:9",
        ),
        (&[("AWS_S3_FORCE_PATH_STYLE", "false")], &[], "aws.force_path_style", "false"),
        (&[("AWS_CA_BUNDLE", "/etc/ca.pem")], &[], "aws.ca_bundle", "/etc/ca.pem"),
        (
            &[("BOILERHOUSE_STORE", "s3://bucket"), ("AWS_SHARED_CREDENTIALS_FILE", "/k")],
            &[],
            "aws.shared_credentials_file",
            "/k",
        ),
        (
            &[
                ("BOILERHOUSE_STORE", "s3://bucket"),
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://localhost:1/x"),
            ],
            &[],
            "aws.container_full_uri",
            "http://localhost:1/x",
        ),
        (
            &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254/")],
            &[],
            "aws.metadata_endpoint",
            "http://169.254.169.254",
        ),
        // Shared with other tools, which take empty as not set.
        (&[("AWS_REGION", ""), ("DOCKER_HOST", "")], &[], "aws.region", "us-east-1"),
        // Of the client commands, of Kubernetes, of others.
        (&[("BOILERHOUSE_URL", "x"), ("BOILERHOUSE_TOKEN", "y"), ("BOILER", "z")], &[], "api_port", "3000"),
        (
            &[
                ("BOILERHOUSE_SERVICE_HOST", "10.0.0.1"),
                ("BOILERHOUSE_SERVICE_PORT", "80"),
                ("BOILERHOUSE_SERVICE_PORT_HTTP", "80"),
                ("BOILERHOUSE_PORT", "tcp://10.0.0.1:80"),
                ("BOILERHOUSE_PORT_80_TCP_ADDR", "10.0.0.1"),
            ],
            &[],
            "api_port",
            "3000",
        ),
    ];
    for (given, beside, key, expected) in rows {
        let config = load(&[*given, *beside].concat()).unwrap_or_else(|errors| panic!("{given:?}: {errors}"));
        let setting = settings().iter().find(|setting| setting.key == *key).unwrap();
        assert_eq!((setting.show)(&config).unwrap(), *expected, "{given:?}");
    }
}

/// One row each: what is given, and what the one error must say.
#[test]
fn bad_values_are_refused_with_their_source_and_what_is_allowed() {
    let rows: &[(Given, &[&str])] = &[
        (
            &[("BOILERHOUSE_API_PORT", "65536")],
            &["BOILERHOUSE_API_PORT: \"65536\" is no port; allowed: 0 to 65535"],
        ),
        (&[("BOILERHOUSE_API_PORT", "-1")], &["\"-1\" is no port"]),
        (&[("BOILERHOUSE_API_PORT", "http")], &["\"http\" is no port"]),
        (&[("BOILERHOUSE_API_PORT", " 3000")], &["\" 3000\" is no port"]),
        (&[("BOILERHOUSE_API_PORT", "")], &["BOILERHOUSE_API_PORT: is empty; unset it"]),
        (&[("BOILERHOUSE_API_PORT", "tcp://10.0.0.1:3000")], &["enableServiceLinks: false"]),
        (
            &[("BOILERHOUSE_API_HOST", "localhost")],
            &["\"localhost\" is no IP address; allowed:", "127.0.0.1"],
        ),
        (&[("BOILERHOUSE_API_HOST", "127.0.0.1:80")], &["is no IP address"]),
        (
            &[("BOILERHOUSE_API_HOST", "0.0.0.0")],
            &["BOILERHOUSE_API_HOST: 0.0.0.0 is reachable", "BOILERHOUSE_API_TOKENS_FILE"],
        ),
        (&[("BOILERHOUSE_API_HOST", "::")], &[":: is reachable"]),
        (&[("BOILERHOUSE_API_HOST", "::ffff:10.0.0.1")], &["is reachable"]),
        (&[("BOILERHOUSE_API_HOST", "192.168.1.2")], &["192.168.1.2 is reachable"]),
        (
            &[("BOILERHOUSE_POOL_SIZE", "many")],
            &["BOILERHOUSE_POOL_SIZE: \"many\" is no such number; allowed: 0 to 100000"],
        ),
        (&[("BOILERHOUSE_POOL_SIZE", "100001")], &["allowed: 0 to 100000"]),
        (
            &[("BOILERHOUSE_MAX_CONTAINERS", "0")],
            &["BOILERHOUSE_MAX_CONTAINERS: \"0\"", "allowed: 1 to 100000"],
        ),
        (&[("BOILERHOUSE_MAX_CONTAINERS", "1.5")], &["\"1.5\""]),
        (
            &[("BOILERHOUSE_IDLE_TIMEOUT_MS", "5m")],
            &["\"5m\" is no number of milliseconds; allowed: 0 (never) to"],
        ),
        (&[("BOILERHOUSE_IDLE_TIMEOUT_MS", "99999999999999")], &["allowed: 0 (never) to 31536000000"]),
        (&[("BOILERHOUSE_STATE_DIR", "")], &["BOILERHOUSE_STATE_DIR: is empty"]),
        (&[("BOILERHOUSE_STATE_DIR", "/a\0b")], &["BOILERHOUSE_STATE_DIR: \"/a\\0b\" contains a zero byte"]),
        (
            &[("BOILERHOUSE_SECRETS_DIR", "/var/lib/boilerhouse/states")],
            &["BOILERHOUSE_SECRETS_DIR: is the same directory as state_dir"],
        ),
        (
            &[("BOILERHOUSE_SOCKET_DIR", "/var/lib/boilerhouse/x/../secrets/")],
            &["BOILERHOUSE_SOCKET_DIR: is the same directory as secrets_dir"],
        ),
        (&[("BOILERHOUSE_DEFAULT_IMAGE", "my image")], &["\"my image\" is no image reference; allowed:"]),
        (&[("BOILERHOUSE_DEFAULT_IMAGE", "-rm")], &["is no image reference"]),
        (
            &[("BOILERHOUSE_STORE", "/srv/store")],
            &["is no store; allowed: s3://bucket/prefix or file:///absolute/path"],
        ),
        (&[("BOILERHOUSE_STORE", "gs://bucket/x")], &["is no store"]),
        (&[("BOILERHOUSE_STORE", "file://srv/store")], &["no absolute path after file://"]),
        (&[("BOILERHOUSE_STORE", "file:///srv/a%20b")], &["has one of ? # %"]),
        (&[("BOILERHOUSE_STORE", "file:///")], &["is the root directory"]),
        (
            &[("BOILERHOUSE_STORE", "file:///var/lib/boilerhouse/states/store")],
            &["BOILERHOUSE_STORE: ", "and state_dir /var/lib/boilerhouse/states lie in one another"],
        ),
        (&[("BOILERHOUSE_STORE", "file:///var/lib/boilerhouse/x/../states/store")], &["lie in one another"]),
        (
            &[("BOILERHOUSE_STORE", "file:///var/lib/boilerhouse/secrets")],
            &["is the same directory as secrets_dir"],
        ),
        (
            &[("BOILERHOUSE_STATE_DIR", "/var/lib/boilerhouse/store/states")],
            &["BOILERHOUSE_STORE (default): ", "lie in one another"],
        ),
        (&[("BOILERHOUSE_STORE", "s3://")], &["has no bucket name"]),
        (&[("BOILERHOUSE_STORE", "s3://UPPER/x")], &["has no bucket name", "allowed: 3 to 63"]),
        (&[("BOILERHOUSE_STORE", "s3://bucket/a/../b")], &["has a prefix that is not allowed; allowed:"]),
        (&[("BOILERHOUSE_STORE", "s3://bucket/a//b")], &["has a prefix"]),
        (&[("BOILERHOUSE_STORE", "s3://bucket/a b")], &["has a prefix"]),
        (
            &[("BOILERHOUSE_STORE", "s3://bucket/x")],
            &["AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"],
        ),
        (
            &[("BOILERHOUSE_STORE", "s3://bucket/x"), ("AWS_ACCESS_KEY_ID", "i")],
            &["AWS_SECRET_ACCESS_KEY is not set"],
        ),
        (
            &[("BOILERHOUSE_STORE", "s3://bucket/x"), ("AWS_SECRET_ACCESS_KEY", "k")],
            &["AWS_ACCESS_KEY_ID is not set"],
        ),
        (&[("AWS_S3_FORCE_PATH_STYLE", "yes")], &["is neither; allowed: true or false"]),
        (&[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "v2/x")], &["is no path of an address; allowed:"]),
        (
            &[("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://example.com/x")],
            &["is no such address; allowed:"],
        ),
        (&[("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1.example.com/x")], &["no such address"]),
        (&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", "169.254.169.254")], &["is no address; allowed:"]),
        (
            &[("BOILERHOUSE_INSTANCE", "Blue")],
            &["\"Blue\" is no identity; allowed: 1 to 32 of a-z 0-9 and -"],
        ),
        (&[("BOILERHOUSE_INSTANCE", "-a")], &["is no identity"]),
        (&[("BOILERHOUSE_INSTANCE", "a23456789012345678901234567890123")], &["is no identity"]),
        (
            &[("DOCKER_HOST", "ssh://me@host")],
            &["DOCKER_HOST: ", "is no engine that is supported; allowed: unix:///path"],
        ),
        (&[("DOCKER_HOST", "tcp://host")], &["\"tcp://host\" is no engine"]),
        (&[("DOCKER_HOST", "unix://run/docker.sock")], &["is no engine"]),
        (&[("DOCKER_HOST", "/run/docker.sock")], &["is no engine"]),
        (&[("AWS_REGION", "eu west")], &["AWS_REGION: \"eu west\" is no region"]),
        (
            &[("AWS_REGION", "eu-1"), ("AWS_DEFAULT_REGION", "eu west")],
            &["AWS_DEFAULT_REGION: \"eu west\" is no region"],
        ),
        (
            &[("AWS_ENDPOINT_URL", "s3:9000")],
            &["AWS_ENDPOINT_URL: \"s3:9000\" does not begin with http:// or https://"],
        ),
        (&[("AWS_ENDPOINT_URL_S3", "http://s3:9000/path")], &["is no address of an S3 server; allowed:"]),
        (&[("AWS_ENDPOINT_URL_S3", "http://s3:nine")], &["is no address"]),
        (&[("AWS_ENDPOINT_URL_S3", "http://[::1")], &["is no address"]),
        (&[("AWS_ENDPOINT_URL_S3", "http://")], &["is no address"]),
        (&[("AWS_ACCESS_KEY_ID", "a b")], &["AWS_ACCESS_KEY_ID: \"a b\" has a space"]),
        (&[("BOILERHOUSE_GATEWAY_PORT", "8080")], &["BOILERHOUSE_GATEWAY_PORT: is not supported yet"]),
        (
            &[("BOILERHOUSE_API_PROT", "1")],
            &["did you mean BOILERHOUSE_API_PORT?", "allowed: BOILERHOUSE_CONFIG, "],
        ),
        (&[("BOILERHOUSE_IDLE_TIMEOUT", "1")], &["did you mean BOILERHOUSE_IDLE_TIMEOUT_MS?"]),
        (
            &[("BOILERHOUSE_SOMETHING_ELSE_ENTIRELY", "1")],
            &["is no variable of boilerhouse; allowed: BOILERHOUSE_CONFIG"],
        ),
        (&[("BOILERHOUSE_", "1")], &["BOILERHOUSE_: is no variable"]),
        (&[("BOILERHOUSE_SERVICE_HOSTS", "1")], &["is no variable"]),
        (
            &[("BOILERHOUSE_CONFIG", "/does/not/exist.ron")],
            &["BOILERHOUSE_CONFIG: /does/not/exist.ron: cannot be read"],
        ),
        (&[("BOILERHOUSE_CONFIG", "/dev/zero")], &["it is no regular file"]),
    ];
    assert!(rows.len() >= 40);
    for (given, words) in rows {
        let errors = load(given).map(|_| ()).expect_err(&format!("{given:?} was taken"));
        assert_eq!(errors.0.len(), 1, "{given:?}: {errors}");
        for word in *words {
            assert!(errors.0[0].to_string().contains(word), "{given:?}: {errors}\nlacks: {word}");
        }
    }
}

#[test]
fn bad_files_are_refused_with_line_and_column() {
    let rows: &[(&str, &str)] = &[
        ("", ":1:1: is no RON of the form"),
        ("(api_port: 3000", ":1:"),
        ("(\n  api_port: ,\n)", ":2:13: is no RON"),
        ("(3000)", ":1:2: is no RON"),
        ("{\"api_port\": 1}", "is no RON of the form (api_port: 3000, …)"),
        (
            "(\n  api_port: \"3000\",\n)",
            ":2:13: api_port: expects a whole number without quotes, such as 3000",
        ),
        ("(api_port: 99999)", ":1:12: api_port: \"99999\" is no port; allowed: 0 to 65535"),
        ("(api_port: -1)", ":1:12: api_port: expects a whole number"),
        ("(api_port: 1.0)", "api_port: expects a whole number"),
        ("(state_dir: 7)", ":1:13: state_dir: expects text in quotes"),
        ("(state_dir: \"\")", "state_dir: \"\" is empty"),
        (
            "(\n// ü api_prot\n  api_prot: 3000)",
            ":3:3: api_prot: is no setting of boilerhouse; did you mean api_port?; allowed: api_port, api_host",
        ),
        ("(config: \"x\")", ":1:2: config: is no setting"),
        ("(API_PORT: 1)", ":1:2: API_PORT: is no setting"),
        ("(r#type: 1)", "type: is no setting"),
        ("(gateway_port: 8080)", ":1:2: gateway_port: is not supported yet"),
        ("(api_port: 1, api_port: 2)", ":1:15: api_port: is given twice"),
        (
            "(aws: 5)",
            ":1:7: aws: expects (access_key_id: …, secret_access_key: …, session_token: …, region: …, endpoint_url: …, ",
        ),
        (
            "(aws: (\n  regoin: \"x\"))",
            ":2:3: aws.regoin: is no setting of boilerhouse; did you mean region?; allowed: access_key_id",
        ),
        ("(aws: (region: 1))", ":1:16: aws.region: expects text in quotes"),
        ("(aws: (region: \"a b\"))", ":1:16: aws.region: \"a b\" is no region"),
        ("(api_host: \"0.0.0.0\")", ":1:12: api_host: 0.0.0.0 is reachable"),
        ("(state_dir: \"{dir}/s\", store: \"file://{dir}/s/store\")", "store: "),
    ];
    for (source, words) in rows {
        let (directory, result) = load_file(source, &[]);
        let errors = result.map(|_| ()).expect_err(&format!("{source} was taken"));
        assert_eq!(errors.0.len(), 1, "{source}: {errors}");
        let text = errors.0[0].to_string();
        assert!(text.contains(words), "{source}: {text}\nlacks: {words}");
        assert!(text.contains(&format!("{}/bh.ron:", directory.path().display())), "{text}");
    }
}

#[test]
fn everything_wrong_is_reported_at_once() {
    let file = "(\n  api_port: 70000,\n  pool_sise: 1,\n  max_containers: 0,\n  aws: (region: \"?\"),\n)";
    let given = [
        ("BOILERHOUSE_API_HOST", "everywhere"),
        ("BOILERHOUSE_GATEWAY_PORT", "1"),
        ("BOILERHOUSE_STOER", "x"),
        ("BOILERHOUSE_STORE", "ftp://x"),
    ];
    let (_directory, result) = load_file(file, &given);
    let text = result.unwrap_err().to_string();
    assert!(text.starts_with("the configuration has 8 errors\n  "), "{text}");
    for part in [
        "api_port",
        "pool_sise",
        "max_containers",
        "aws.region",
        "API_HOST",
        "GATEWAY_PORT",
        "STOER",
        "STORE",
    ] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
}

#[test]
fn the_environment_wins_over_the_file_and_the_file_over_the_default() {
    let file = "(\n  // with comments\n  api_port: 3001, pool_size: 7,\n  aws: (region: \"eu-1\", secret_access_key: \"k\"),\n)";
    let (directory, result) = load_file(file, &[("BOILERHOUSE_API_PORT", "3002")]);
    let config = result.unwrap();
    assert_eq!((config.api_port, config.pool_size, config.max_containers), (3002, 7, 50));
    assert_eq!(config.aws.region, "eu-1");
    assert_eq!(config.aws.secret_access_key, Some(Secret::new("k")));
    assert_eq!(config.origins.of("api_port"), "BOILERHOUSE_API_PORT");
    assert_eq!(config.origins.of("pool_size"), format!("{}/bh.ron:3:30", directory.path().display()));
}

/// P11
#[test]
fn no_secret_is_shown() {
    let secret = "hunter2hunter2";
    let given =
        [("AWS_SECRET_ACCESS_KEY", secret), ("AWS_SESSION_TOKEN", secret), ("AWS_ACCESS_KEY_ID", "id")];
    let config = load(&given).unwrap();
    let shown = format!("{config:?}{}", config.to_ron());
    assert!(!shown.contains(secret), "{shown}");
    assert!(shown.contains("// secret_access_key: \"***\", AWS_SECRET_ACCESS_KEY"), "{shown}");

    let bad = format!("{secret} {secret}");
    let url = format!("http://user:{secret}@host");
    for given in [
        [("AWS_SECRET_ACCESS_KEY", bad.as_str())],
        [("AWS_SESSION_TOKEN", bad.as_str())],
        [("AWS_ENDPOINT_URL", url.as_str())],
        [("DOCKER_HOST", url.as_str())],
    ] {
        let error = load(&given).unwrap_err().to_string();
        assert!(!error.contains(secret), "{error}");
    }
    let (_directory, result) =
        load_file(&format!("(aws: (secret_access_key: \"{bad}\", session_token: 5))"), &[]);
    let errors = result.unwrap_err();
    assert!(errors.0.len() == 2 && !errors.to_string().contains(secret), "{errors}");
}

#[test]
fn state_is_sealed_only_with_a_key() {
    let key = ("BOILERHOUSE_MASTER_KEY_FILE", "/etc/key");
    assert!(!load(&[key]).unwrap().state_encryption);
    assert!(load(&[key, ("BOILERHOUSE_STATE_ENCRYPTION", "on")]).unwrap().state_encryption);
    for (given, words) in [("on", "set BOILERHOUSE_MASTER_KEY_FILE"), ("yes", "allowed: off, on")] {
        let error = load(&[("BOILERHOUSE_STATE_ENCRYPTION", given)]).unwrap_err().to_string();
        assert!(error.contains("BOILERHOUSE_STATE_ENCRYPTION") && error.contains(words), "{error}");
    }
}

#[test]
fn what_is_printed_can_be_loaded_again() {
    let given = [
        ("BOILERHOUSE_API_TOKENS_FILE", "/etc/to\"k\\ens"),
        ("BOILERHOUSE_MASTER_KEY_FILE", "/etc/key\n"),
        ("BOILERHOUSE_STATE_ENCRYPTION", "on"),
        ("BOILERHOUSE_STORE", "s3://bucket/prefix"),
        ("BOILERHOUSE_INSTANCE", "blue"),
        ("DOCKER_HOST", "tcp://h:1"),
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "k"),
        ("AWS_ENDPOINT_URL", "http://s3:9000"),
    ];
    for given in [&given[..], &[]] {
        let first = load(given).unwrap();
        let printed = first.to_ron();
        for setting in settings().iter().filter(|setting| !setting.key.is_empty()) {
            let name = setting.key.rsplit('.').next().unwrap();
            assert!(printed.contains(&format!(" {name}: ")), "{name} is missing: {printed}");
        }
        let secret = if given.is_empty() { None } else { Some(("AWS_SECRET_ACCESS_KEY", "k")) };
        let (_directory, again) = load_file(&printed, secret.as_slice());
        let again = again.unwrap_or_else(|errors| panic!("{errors}\n{printed}"));
        assert_eq!(
            Config { origins: Origins::default(), ..first },
            Config { origins: Origins::default(), ..again }
        );
    }
    assert!(load(&[]).unwrap().to_ron().contains("    api_port: 3000, // default\n"));
}

#[test]
fn text_that_is_no_utf_8_is_refused_and_not_a_crash() {
    use std::os::unix::ffi::OsStringExt;
    let odd = || OsString::from_vec(vec![b'x', 0xff]);
    let errors = Config::load([(OsString::from("BOILERHOUSE_STATE_DIR"), odd())]).unwrap_err();
    assert_eq!(errors.to_string(), "the configuration has 1 error\n  BOILERHOUSE_STATE_DIR: is no UTF-8");
    Config::load([(OsString::from("THEIRS"), odd()), (odd(), odd())]).unwrap();
}

#[test]
fn crash_points_are_for_builds_that_have_them() {
    let arm = |text: &str| load(&[("BOILERHOUSE_CRASH_POINT", text)]);
    #[cfg(feature = "crash_points")]
    {
        assert_eq!(arm("claim.filled").unwrap().crash_point, Some(("claim.filled".into(), 1)));
        assert_eq!(arm("claim.filled:3").unwrap().crash_point, Some(("claim.filled".into(), 3)));
        for bad in ["", ":1", "x:", "x:0", "x:y", "x:1:2"] {
            assert!(arm(bad).unwrap_err().to_string().contains("BOILERHOUSE_CRASH_POINT"), "{bad}");
        }
    }
    #[cfg(not(feature = "crash_points"))]
    assert!(arm("x").unwrap_err().to_string().contains("only for builds with the feature crash_points"));
}

/// The table is what the README's is checked against: it must be sound itself.
#[test]
fn the_table_has_each_setting_once_and_says_what_it_is() {
    let mut seen = std::collections::BTreeSet::new();
    for setting in settings() {
        for variable in setting.variables() {
            assert!(seen.insert(variable), "{variable} is there twice");
        }
        assert!(setting.key.is_empty() || seen.insert(setting.key), "{} is there twice", setting.key);
        assert!(!setting.doc.is_empty() && !setting.doc.contains('\n') && !setting.doc.ends_with('.'));
        assert!(
            setting.variable.starts_with(PREFIX)
                || setting.variable.ends_with("DOCKER_HOST")
                || setting.variable.starts_with("AWS_")
        );
    }
}
