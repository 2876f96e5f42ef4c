//! What is counted and measured, in Prometheus' form.
//!
//! Labels never hold a tenant, a slot or anything else without a bound: every
//! combination of labels lives as long as the process. An observation is a hash
//! look-up under a shared lock, well under a microsecond.

use std::{
    borrow::Cow,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::Registry,
};

/// The media type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels<const N: usize> = [(&'static str, Cow<'static, str>); N];
type Counters<const N: usize> = Family<Labels<N>, Counter>;
type Gauges<const N: usize> = Family<Labels<N>, Gauge>;
type Histograms<const N: usize> = Family<Labels<N>, Histogram, fn() -> Histogram>;

/// Everything that is counted and measured. Shared behind an `Arc`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    claims: Counters<3>,
    claim_seconds: Histograms<2>,
    claim_step_seconds: Histograms<1>,
    releases: Counters<2>,
    saves: Counters<1>,
    save_seconds: Histogram,
    slots: Gauges<2>,
    pool_target: Gauges<1>,
    engine_errors: Counters<1>,
    cache_trees: Gauge,
    cache_bytes: Gauge,
    cache_evictions: Counters<1>,
    prefetches: Counters<1>,
    hook_seconds: Histograms<1>,
    hook_failures: Counters<1>,
    http_requests: Counters<3>,
    /// Held while the gauges are set and read: two scrapes at once would see
    /// each other's half-set ones.
    scrape: Mutex<()>,
}

/// One pool as it stands when metrics are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSample {
    /// Its workload.
    pub workload: String,
    /// Ready slots wanted.
    pub target: u32,
    /// Slots by the name of their phase.
    pub slots: Vec<(&'static str, u32)>,
}

// === impl Metrics ===

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Creates them all at zero.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("boilerhouse"),
            claims: Family::default(),
            claim_seconds: Family::new_with_constructor(quick),
            claim_step_seconds: Family::new_with_constructor(quick),
            releases: Family::default(),
            saves: Family::default(),
            save_seconds: slow(),
            slots: Family::default(),
            pool_target: Family::default(),
            engine_errors: Family::default(),
            cache_trees: Gauge::default(),
            cache_bytes: Gauge::default(),
            cache_evictions: Family::default(),
            prefetches: Family::default(),
            hook_seconds: Family::new_with_constructor(quick),
            hook_failures: Family::default(),
            http_requests: Family::default(),
            scrape: Mutex::new(()),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("claims", "Claims answered", self.claims.clone());
        registry.register("claim_seconds", "Time of claims that succeeded", self.claim_seconds.clone());
        registry.register(
            "claim_step_seconds",
            "Time of each step of a claim",
            self.claim_step_seconds.clone(),
        );
        registry.register("releases", "Releases carried out", self.releases.clone());
        registry.register("saves", "Attempts to save a state directory", self.saves.clone());
        registry.register("save_seconds", "Time of attempts to save", self.save_seconds.clone());
        registry.register("slots", "Slots by phase", self.slots.clone());
        registry.register("pool_target", "Ready slots wanted", self.pool_target.clone());
        registry.register(
            "engine_errors",
            "Failed calls to the container engine",
            self.engine_errors.clone(),
        );
        registry.register("cache_trees", "Tenants' trees at rest on this node", self.cache_trees.clone());
        registry.register("cache_bytes", "What they take, about", self.cache_bytes.clone());
        registry.register(
            "cache_evictions",
            "Trees taken out of the cache for want of room",
            self.cache_evictions.clone(),
        );
        registry.register("prefetches", "Prefetches answered", self.prefetches.clone());
        registry.register("hook_seconds", "Time of hooks", self.hook_seconds.clone());
        registry.register(
            "hook_failures",
            "Hooks that failed or passed their deadline",
            self.hook_failures.clone(),
        );
        registry.register("http_requests", "HTTP requests answered", self.http_requests.clone());
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The running build", build);
    }

    /// Counts a claim's answer, and its time when `outcome` is `ok`.
    ///
    /// `source` is where the slot came from (`none` if the claim did not get that
    /// far), `outcome` is `ok` or the error's code.
    pub fn claim(&self, workload: &str, source: &'static str, outcome: &'static str, elapsed: Duration) {
        let labels = [("workload", owned(workload)), ("source", source.into()), ("outcome", outcome.into())];
        self.claims.get_or_create(&labels).inc();
        if outcome == "ok" {
            let [workload, source, _] = labels;
            self.claim_seconds.get_or_create(&[workload, source]).observe(elapsed.as_secs_f64());
        }
    }

    /// Measures a step of a claim.
    pub fn claim_step(&self, step: &'static str, elapsed: Duration) {
        self.claim_step_seconds.get_or_create(&[("step", step.into())]).observe(elapsed.as_secs_f64());
    }

    /// Counts a release; `outcome` is its answer's state or the error's code.
    pub fn release(&self, workload: &str, outcome: &'static str) {
        let labels = [("workload", owned(workload)), ("outcome", outcome.into())];
        self.releases.get_or_create(&labels).inc();
    }

    /// Counts and measures an attempt to save; `outcome` is `ok` or what failed.
    pub fn save(&self, outcome: &'static str, elapsed: Duration) {
        self.saves.get_or_create(&[("outcome", outcome.into())]).inc();
        self.save_seconds.observe(elapsed.as_secs_f64());
    }

    /// Counts a failed call to the container engine.
    pub fn engine_error(&self, operation: &'static str) {
        self.engine_errors.get_or_create(&[("operation", operation.into())]).inc();
    }

    /// Sets what the node's cache holds.
    pub fn set_cache(&self, trees: u64, bytes: u64) {
        self.cache_trees.set(i64::try_from(trees).unwrap_or(i64::MAX));
        self.cache_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Counts a tree that was taken out of the cache; `reason` is the bound that was passed.
    pub fn cache_eviction(&self, reason: &'static str) {
        self.cache_evictions.get_or_create(&[("reason", reason.into())]).inc();
    }

    /// Counts a prefetch; `outcome` is what it did or the error's code.
    pub fn prefetch(&self, outcome: &'static str) {
        self.prefetches.get_or_create(&[("outcome", outcome.into())]).inc();
    }

    /// Measures a hook, and counts it when it failed or passed its deadline.
    pub fn hook(&self, hook: &'static str, elapsed: Duration, failed: bool) {
        let labels = [("hook", hook.into())];
        self.hook_seconds.get_or_create(&labels).observe(elapsed.as_secs_f64());
        if failed {
            self.hook_failures.get_or_create(&labels).inc();
        }
    }

    /// Counts an HTTP request. `route` is the matched route's pattern, never the
    /// path; none: no route matched. A method out of the ordinary counts as `other`.
    pub fn http_request(&self, route: Option<&str>, method: &str, status: u16) {
        let labels = [
            ("route", route.map_or("unmatched".into(), owned)),
            ("method", ordinary(method).into()),
            ("status", status.to_string().into()),
        ];
        self.http_requests.get_or_create(&labels).inc();
    }

    /// Writes everything as OpenMetrics text, the pools as they are given.
    pub fn encode(&self, pools: &[PoolSample]) -> String {
        let _scrape = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        // A workload that is gone must not go on being reported.
        self.slots.clear();
        self.pool_target.clear();
        for pool in pools {
            let workload = ("workload", owned(&pool.workload));
            self.pool_target.get_or_create(std::array::from_ref(&workload)).set(pool.target.into());
            for (phase, count) in &pool.slots {
                let labels = [workload.clone(), ("phase", (*phase).into())];
                self.slots.get_or_create(&labels).set((*count).into());
            }
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }
}

fn owned(text: &str) -> Cow<'static, str> {
    Cow::Owned(text.to_owned())
}

/// A client may send any word as its method; labels are for the known ones.
fn ordinary(method: &str) -> &'static str {
    ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]
        .into_iter()
        .find(|known| *known == method)
        .unwrap_or("other")
}

/// Buckets for what takes microseconds to seconds: 50 µs to 26 s, doubling.
fn quick() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 20))
}

/// Buckets for what takes milliseconds to minutes: 5 ms to 164 s, doubling.
fn slow() -> Histogram {
    Histogram::new(exponential_buckets(0.005, 2.0, 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_there_under_its_name_and_labels() {
        let metrics = Metrics::new();
        let ms = Duration::from_millis(3);
        metrics.claim("w", "warm", "ok", ms);
        metrics.claim("w", "none", "pool_exhausted", ms);
        metrics.claim_step("fill", ms);
        metrics.release("w", "durable");
        metrics.save("ok", ms);
        metrics.engine_error("create");
        metrics.set_cache(2, 8_192);
        metrics.cache_eviction("size");
        metrics.prefetch("fetched");
        metrics.hook("on_claim", ms, true);
        metrics.hook("on_claim", ms, false);
        metrics.http_request(Some("/tenants/{tenant}/claim"), "POST", 200);
        metrics.http_request(None, "BREW", 404);
        let pool = PoolSample { workload: "w".into(), target: 5, slots: vec![("ready", 4), ("creating", 1)] };
        let text = metrics.encode(&[pool]);
        for line in [
            "boilerhouse_claims_total{workload=\"w\",source=\"warm\",outcome=\"ok\"} 1",
            "boilerhouse_claims_total{workload=\"w\",source=\"none\",outcome=\"pool_exhausted\"} 1",
            "boilerhouse_claim_seconds_count{workload=\"w\",source=\"warm\"} 1",
            "boilerhouse_claim_step_seconds_count{step=\"fill\"} 1",
            "boilerhouse_releases_total{workload=\"w\",outcome=\"durable\"} 1",
            "boilerhouse_saves_total{outcome=\"ok\"} 1",
            "boilerhouse_save_seconds_count 1",
            "boilerhouse_slots{workload=\"w\",phase=\"ready\"} 4",
            "boilerhouse_slots{workload=\"w\",phase=\"creating\"} 1",
            "boilerhouse_pool_target{workload=\"w\"} 5",
            "boilerhouse_engine_errors_total{operation=\"create\"} 1",
            "boilerhouse_cache_trees 2",
            "boilerhouse_cache_bytes 8192",
            "boilerhouse_cache_evictions_total{reason=\"size\"} 1",
            "boilerhouse_prefetches_total{outcome=\"fetched\"} 1",
            "boilerhouse_hook_seconds_count{hook=\"on_claim\"} 2",
            "boilerhouse_hook_failures_total{hook=\"on_claim\"} 1",
            "boilerhouse_http_requests_total{route=\"/tenants/{tenant}/claim\",method=\"POST\",status=\"200\"} 1",
            "boilerhouse_http_requests_total{route=\"unmatched\",method=\"other\",status=\"404\"} 1",
            concat!("boilerhouse_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("claim_seconds_count{workload=\"w\",source=\"none\"}"), "a failure was timed");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_time_falls_into_its_bucket() {
        let metrics = Metrics::new();
        metrics.claim("w", "warm", "ok", Duration::from_millis(3));
        let text = metrics.encode(&[]);
        let bucket = |le: &str| {
            let head =
                format!("boilerhouse_claim_seconds_bucket{{le=\"{le}\",workload=\"w\",source=\"warm\"}} ");
            text.lines().find_map(|line| line.strip_prefix(head.as_str())).map(str::to_owned)
        };
        assert_eq!(
            (bucket("0.0016"), bucket("0.0032"), bucket("+Inf")),
            (Some("0".into()), Some("1".into()), Some("1".into())),
            "{text}"
        );
    }

    #[test]
    fn a_pool_that_is_gone_is_not_reported() {
        let metrics = Metrics::new();
        let pool = PoolSample { workload: "old".into(), target: 1, slots: vec![("ready", 1)] };
        assert!(metrics.encode(&[pool]).contains("workload=\"old\""));
        assert!(!metrics.encode(&[]).contains("workload=\"old\""));
    }

    #[test]
    fn a_hostile_label_stays_inside_its_quotes() {
        let metrics = Metrics::new();
        metrics.http_request(Some("a\"} 1\nevil 2"), "GET", 200);
        assert!(!metrics.encode(&[]).lines().any(|line| line.starts_with("evil")));
    }
}
