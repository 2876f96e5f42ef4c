//! The real engine, for tests: an installation's name of one's own, and no leftovers.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use boilerhouse::runtime::{LABEL_INSTANCE, docker::DockerRuntime};
use bollard::{
    Docker,
    query_parameters::{ListContainersOptionsBuilder, RemoveContainerOptionsBuilder},
};
use futures_util::FutureExt;

use super::images;

/// Where the engine listens when `DOCKER_HOST` does not say.
pub const SOCKET: &str = "/var/run/docker.sock";

/// Every installation of a test is named with this; see [`instance`].
const PREFIX: &str = "test-";
/// A test's containers older than this were left by a crash.
const LEFT_AFTER_S: u64 = 3_600;

/// One test's use of the engine.
#[derive(Clone)]
pub struct TestEngine {
    /// The adapter under test.
    pub runtime: Arc<DockerRuntime>,
    /// The engine's API, for what the port cannot do.
    pub raw: Docker,
    /// The installation's name, of this test only; a test that needs more takes
    /// `<instance>-<anything>`.
    pub instance: String,
}

/// Runs a test with the engine and the images [`images::BUSYBOX`] and [`images::APP`], and
/// removes what it leaves, also when it panics.
pub async fn with_engine<F: Future>(test: impl FnOnce(TestEngine) -> F) -> F::Output {
    let host = std::env::var("DOCKER_HOST").ok();
    let runtime = DockerRuntime::connect(host.as_deref()).expect("DOCKER_HOST is an engine's address");
    let raw = Docker::connect_with_host(host.as_deref().unwrap_or(&format!("unix://{SOCKET}")))
        .unwrap_or_else(|error| {
            panic!("these tests need a Docker engine (DOCKER_HOST or {SOCKET}): {error}")
        });
    images::ensure(&raw).await;
    let engine = TestEngine { runtime: Arc::new(runtime), raw, instance: instance() };
    engine.remove_all(is_left_over).await;
    let outcome = AssertUnwindSafe(test(engine.clone())).catch_unwind().await;
    let own = |of: &str| {
        of.strip_prefix(&engine.instance).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    engine.remove_all(own).await;
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Returns an installation's name that nobody else has: `test-<seconds>-<process>-<number>`.
pub fn instance() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}{}-{}-{}", now_s(), std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Waits until `holds` gives a value, at most 20 seconds.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut holds: impl FnMut() -> F) -> T {
    let wait = async {
        loop {
            if let Some(value) = holds().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("never: {what}"))
}

impl TestEngine {
    /// Removes the containers of the installations that are meant.
    async fn remove_all(&self, is_meant: impl Fn(&str) -> bool) {
        let filters = [("label", vec![LABEL_INSTANCE.to_owned()])].into();
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let found = self.raw.list_containers(Some(options)).await.expect("the engine lists containers");
        for container in found {
            let labels = container.labels.unwrap_or_default();
            let (Some(of), Some(id)) = (labels.get(LABEL_INSTANCE), container.id) else { continue };
            if is_meant(of) {
                let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
                // Another test may be doing the same.
                let _ = self.raw.remove_container(&id, Some(options)).await;
            }
        }
    }
}

fn is_left_over(instance: &str) -> bool {
    let began = instance.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u64>().ok());
    began.is_some_and(|began| began + LEFT_AFTER_S < now_s())
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
