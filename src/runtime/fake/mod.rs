//! An engine in memory, for tests and benchmarks; the server never uses it.
//!
//! It keeps the rules of a real one (names, states, conflicts), runs on tokio's time,
//! which a test may pause, counts its calls, and fails where a [`Fault`] was planned.
//! A test keeps it in an `Arc`, so that containers outlive the server under test.
//! The conformance suite in `tests/engine.rs` holds it to what Docker does.

mod containers;
mod faults;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::{sync::broadcast, time::sleep};

pub use self::faults::{Fault, Operation};
use self::{
    containers::Containers,
    faults::{Entry, Faults},
};
use super::{
    ContainerStatus, Created, EngineInfo, Error, Event, ExecOutput, ExecRequest, Observed, Runtime,
    plan::ContainerPlan,
};
use crate::model::{ContainerId, Owner, spec::PullPolicy};

/// The exit status of a program that ended on SIGTERM.
const TERMINATED: i64 = 143;
/// The exit status of a program that was killed.
const KILLED: i64 = 137;

/// Keeps containers in memory.
pub struct FakeRuntime {
    containers: Mutex<Containers>,
    faults: Mutex<Faults>,
    exec: Mutex<Arc<ExecHandler>>,
}

type ExecHandler = dyn Fn(&ContainerId, &ExecRequest) -> FakeExec + Send + Sync;

/// An image of the fake engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FakeImage {
    /// What its program runs as, unless the plan's user is a number or root.
    pub run_as: Owner,
    /// How long its program takes to end when it is asked to; `None`: it never does, and
    /// must be killed.
    pub ends_after: Option<Duration>,
}

/// How a command of the fake engine goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeExec {
    /// What comes out in the end.
    pub output: ExecOutput,
    /// How long it runs before; past the request's deadline it is killed.
    pub takes: Duration,
}

// === impl FakeRuntime: for the test ===

impl FakeRuntime {
    /// Creates an engine without images and containers.
    pub fn new() -> Self {
        let succeed = |_: &ContainerId, _: &ExecRequest| FakeExec::status(0);
        Self { containers: Mutex::default(), faults: Mutex::default(), exec: Mutex::new(Arc::new(succeed)) }
    }

    /// Puts an image into the engine.
    pub fn add_image(&self, name: &str, image: FakeImage) {
        self.containers().images.insert(name.to_owned(), image);
    }

    /// Puts an image where only a pull gets it.
    pub fn publish_image(&self, name: &str, image: FakeImage) {
        self.containers().registry.insert(name.to_owned(), image);
    }

    /// Removes an image from the engine; containers made from it stay.
    pub fn remove_image(&self, name: &str) {
        self.containers().images.remove(name);
    }

    /// Makes a container that is not ours, under a name.
    pub fn add_stranger(&self, name: &str) {
        self.containers().add_stranger(name);
    }

    /// Decides how commands go; without a handler each succeeds at once, silently.
    pub fn on_exec(&self, handler: impl Fn(&ContainerId, &ExecRequest) -> FakeExec + Send + Sync + 'static) {
        *self.exec.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(handler);
    }

    /// Makes each call of an operation take this long.
    pub fn set_latency(&self, operation: Operation, latency: Duration) {
        self.faults().set_latency(operation, latency);
    }

    /// Plans a fault for the `nth` call of an operation, counted from the engine's
    /// beginning; the first is 1.
    pub fn fail_nth(&self, operation: Operation, nth: u64, fault: Fault) {
        self.faults().plan(operation, nth, fault);
    }

    /// Plans a fault for the next call of an operation.
    pub fn fail_next(&self, operation: Operation, fault: Fault) {
        let mut faults = self.faults();
        let next = faults.count(operation) + 1;
        faults.plan(operation, next, fault);
    }

    /// Makes every call of an operation fail until `None` is given.
    pub fn fail_all(&self, operation: Operation, fault: Option<Fault>) {
        self.faults().plan_all(operation, fault);
    }

    /// Takes the engine down or up. While it is down every call is
    /// [`Error::Unavailable`]; going down ends the streams of events and makes calls
    /// under way unknown. Containers live on.
    pub fn set_down(&self, is_down: bool) {
        self.faults().is_down = is_down;
        if is_down {
            self.containers().end_events();
        }
    }

    /// Ends a container from outside, as a crash or the kernel would.
    pub fn kill_outside(&self, id: &ContainerId, code: i64, oom_killed: bool) {
        self.containers().die(id, code, oom_killed);
    }

    /// Removes a container from outside, as somebody at a terminal would.
    pub fn remove_outside(&self, id_or_name: &str) {
        self.containers().remove(id_or_name);
    }

    /// Returns how often each operation was called; those that never were are left out.
    pub fn calls(&self) -> BTreeMap<&'static str, u64> {
        let faults = self.faults();
        let counts = Operation::ALL.iter().map(|operation| (operation.as_str(), faults.count(*operation)));
        counts.filter(|(_, count)| *count > 0).collect()
    }

    /// Returns how many calls there were.
    pub fn total_calls(&self) -> u64 {
        self.calls().values().sum()
    }

    /// Returns every container, by name, those of strangers too; counts as no call.
    pub fn all(&self) -> Vec<Observed> {
        self.containers().list(|_| true)
    }

    /// Returns the most containers there ever were at once.
    pub fn peak(&self) -> usize {
        self.containers().peak()
    }

    /// Returns the plan that a container was made from.
    pub fn plan_of(&self, id_or_name: &str) -> Option<Arc<ContainerPlan>> {
        self.containers().get(id_or_name)?.plan.clone()
    }

    /// Returns the signals that a container was sent, in order.
    pub fn signals_of(&self, id_or_name: &str) -> Vec<String> {
        self.containers().get(id_or_name).map(|container| container.signals.clone()).unwrap_or_default()
    }

    fn containers(&self) -> MutexGuard<'_, Containers> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call and meets its latency and fault.
    async fn enter(&self, operation: Operation, target: &str) -> Result<Entry, Error> {
        let (latency, entry) = self.faults().enter(operation, target)?;
        if !latency.is_zero() {
            sleep(latency).await;
            if self.faults().is_down {
                return Err(operation.lost(target, "the engine went down"));
            }
        }
        if entry == Entry::Hang {
            std::future::pending::<()>().await;
        }
        Ok(entry)
    }

    /// Does a call that takes no time of its own.
    async fn call<T>(
        &self,
        operation: Operation,
        target: &str,
        act: impl FnOnce(&mut Containers) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let entry = self.enter(operation, target).await?;
        let result = act(&mut self.containers());
        entry.answer(operation, target, result)
    }

    async fn end(&self, id: &ContainerId, signal: Option<&str>, grace: Duration) -> Result<(), Error> {
        let ends_after = {
            let mut containers = self.containers();
            let Some(container) = containers.get_mut(&id.0) else { return Ok(()) };
            match container.status {
                ContainerStatus::Running if !grace.is_zero() => {
                    let own = container.plan.as_ref().and_then(|plan| plan.stop_signal.clone());
                    let signal = signal.map(str::to_owned).or(own).unwrap_or_else(|| "SIGTERM".into());
                    container.signals.push(signal);
                    container.image.ends_after
                }
                _ if !container.status.is_alive() => return Ok(()),
                _ => None,
            }
        };
        let is_running = || {
            self.containers().get(&id.0).is_some_and(|container| container.status == ContainerStatus::Running)
        };
        let wait = ends_after.unwrap_or(grace).min(grace);
        if !wait.is_zero() && is_running() {
            sleep(wait).await;
        }
        let code = if ends_after.is_some_and(|after| after <= grace) { TERMINATED } else { KILLED };
        self.containers().die(id, code, false);
        Ok(())
    }
}

impl Default for FakeRuntime {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for FakeRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeRuntime").field("containers", &self.all().len()).finish_non_exhaustive()
    }
}

// === impl FakeRuntime: the port ===

#[async_trait]
impl Runtime for FakeRuntime {
    async fn probe(&self) -> Result<EngineInfo, Error> {
        self.call(Operation::Probe, "engine", |_| {
            Ok(EngineInfo { version: "fake".into(), refusals: Vec::new(), warnings: Vec::new() })
        })
        .await
    }

    async fn ensure_image(&self, image: &str, policy: PullPolicy) -> Result<(), Error> {
        self.call(Operation::EnsureImage, image, |containers| containers.ensure_image(image, policy)).await
    }

    async fn create(&self, plan: &ContainerPlan) -> Result<Created, Error> {
        self.call(Operation::Create, &plan.name, |containers| containers.create(plan)).await
    }

    async fn start(&self, id: &ContainerId) -> Result<(), Error> {
        self.call(Operation::Start, &id.0, |containers| containers.start("start", id)).await
    }

    async fn inspect(&self, id_or_name: &str) -> Result<Option<Observed>, Error> {
        self.call(Operation::Inspect, id_or_name, |containers| Ok(containers.observe(id_or_name))).await
    }

    async fn list(&self, instance: &str) -> Result<Vec<Observed>, Error> {
        self.call(Operation::List, instance, |containers| {
            Ok(containers.list(|labels| labels.is_some_and(|labels| labels.instance == instance)))
        })
        .await
    }

    async fn exec(&self, id: &ContainerId, request: ExecRequest) -> Result<ExecOutput, Error> {
        let entry = self.enter(Operation::Exec, &id.0).await?;
        self.containers().require_running("exec", id)?;
        let handler = Arc::clone(&self.exec.lock().unwrap_or_else(PoisonError::into_inner));
        let FakeExec { mut output, takes } = handler(id, &request);
        let limit = takes.min(request.timeout);
        if !limit.is_zero() {
            sleep(limit).await;
        }
        let result = if takes > request.timeout {
            let after_ms = u64::try_from(request.timeout.as_millis()).unwrap_or(u64::MAX);
            Err(Error::Timeout { target: id.0.clone(), after_ms })
        } else {
            for stream in [&mut output.stdout, &mut output.stderr] {
                output.truncated |= stream.len() > request.output_cap_bytes;
                stream.truncate(request.output_cap_bytes);
            }
            // A command ends with its container.
            if !limit.is_zero() && self.containers().require_running("exec", id).is_err() {
                output.status = KILLED;
            }
            Ok(output)
        };
        entry.answer(Operation::Exec, &id.0, result)
    }

    async fn signal(&self, id: &ContainerId, signal: &str) -> Result<(), Error> {
        self.call(Operation::Signal, &id.0, |containers| containers.signal(id, signal)).await
    }

    async fn stop(&self, id: &ContainerId, signal: Option<&str>, grace: Duration) -> Result<(), Error> {
        let entry = self.enter(Operation::Stop, &id.0).await?;
        let result = self.end(id, signal, grace).await;
        entry.answer(Operation::Stop, &id.0, result)
    }

    async fn restart(&self, id: &ContainerId, grace: Duration) -> Result<(), Error> {
        let entry = self.enter(Operation::Restart, &id.0).await?;
        self.end(id, None, grace).await?;
        let result = self.containers().start("restart", id);
        entry.answer(Operation::Restart, &id.0, result)
    }

    async fn pause(&self, id: &ContainerId) -> Result<(), Error> {
        self.call(Operation::Pause, &id.0, |containers| containers.pause(id)).await
    }

    async fn unpause(&self, id: &ContainerId) -> Result<(), Error> {
        self.call(Operation::Unpause, &id.0, |containers| containers.unpause(id)).await
    }

    async fn remove(&self, id_or_name: &str) -> Result<(), Error> {
        self.call(Operation::Remove, id_or_name, |containers| {
            containers.remove(id_or_name);
            Ok(())
        })
        .await
    }

    async fn events(&self, instance: &str) -> Result<BoxStream<'static, Event>, Error> {
        let receiver =
            self.call(Operation::Events, instance, |containers| Ok(containers.subscribe())).await?;
        let instance = instance.to_owned();
        let events = stream::unfold((receiver, instance), |(mut receiver, instance)| async move {
            loop {
                match receiver.recv().await {
                    Ok((of, event)) if of == instance => return Some((event, (receiver, instance))),
                    Ok(_) => {}
                    // As when a connection ends: the subscriber lists and subscribes again.
                    Err(broadcast::error::RecvError::Lagged(_) | broadcast::error::RecvError::Closed) => {
                        return None;
                    }
                }
            }
        });
        Ok(events.boxed())
    }
}

// === impl FakeImage, FakeExec ===

impl Default for FakeImage {
    /// Root, and ends at once when asked to.
    fn default() -> Self {
        Self { run_as: Owner { uid: 0, gid: 0 }, ends_after: Some(Duration::ZERO) }
    }
}

impl FakeExec {
    /// Ends at once with a status and no output.
    pub fn status(status: i64) -> Self {
        Self::from(ExecOutput { status, stdout: Vec::new(), stderr: Vec::new(), truncated: false })
    }
}

impl From<ExecOutput> for FakeExec {
    fn from(output: ExecOutput) -> Self {
        Self { output, takes: Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::runtime::{plan::plan, samples};

    fn planned(slot: &str) -> ContainerPlan {
        let spec = samples::spec("demo", "demo:1");
        plan(&spec, samples::labels("one", slot, &spec), Vec::new())
    }

    fn engine() -> FakeRuntime {
        let engine = FakeRuntime::new();
        engine.add_image("demo:1", FakeImage::default());
        engine
    }

    fn refusal() -> Error {
        Error::Refused { operation: "start", target: "x".into(), reason: "no space".into() }
    }

    #[tokio::test]
    async fn each_fault_does_what_it_says() {
        let engine = engine();
        let plan = planned("s1");
        engine.fail_nth(Operation::Create, 2, Fault::LoseAnswer);
        engine.fail_nth(Operation::Create, 1, Fault::LoseCall);
        for happened in [false, true] {
            let error = engine.create(&plan).await.unwrap_err();
            assert!(matches!(error, Error::Unknown { operation: "create", .. }), "{error:?}");
            assert_eq!(engine.all().len(), usize::from(happened));
        }
        // The third call finds what the second made.
        let created = engine.create(&plan).await.unwrap();
        assert_eq!(engine.all()[0].id, created.id);

        engine.fail_next(Operation::Start, Fault::Fail(refusal()));
        assert!(matches!(engine.start(&created.id).await, Err(Error::Refused { .. })));
        assert_eq!(engine.all()[0].status, ContainerStatus::Created);
        engine.fail_next(Operation::Start, Fault::Hang);
        assert!(engine.start(&created.id).now_or_never().is_none(), "it hangs");
        engine.start(&created.id).await.unwrap();

        engine.fail_all(Operation::List, Some(Fault::LoseCall));
        for _ in 0..2 {
            let error = engine.list("one").await.unwrap_err();
            assert!(matches!(error, Error::Unavailable(_)), "a lost look is no unknown outcome: {error:?}");
        }
        engine.fail_all(Operation::List, None);
        assert_eq!(engine.list("one").await.unwrap().len(), 1);
        assert_eq!(engine.calls(), BTreeMap::from([("create", 3), ("start", 3), ("list", 3)]));
        assert_eq!(engine.total_calls(), 9);
    }

    #[tokio::test(start_paused = true)]
    async fn latency_is_virtual_time() {
        let engine = engine();
        engine.set_latency(Operation::Create, Duration::from_secs(3600));
        let begun = tokio::time::Instant::now();
        engine.create(&planned("s1")).await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 3600);
        engine.list("one").await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 3600, "other operations have none");
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_is_down_answers_nothing_and_keeps_its_containers() {
        let engine = Arc::new(engine());
        let id = engine.create(&planned("s1")).await.unwrap().id;
        let mut events = engine.events("one").await.unwrap();
        engine.set_latency(Operation::Start, Duration::from_secs(1));
        let start = engine.start(&id);
        tokio::pin!(start);
        assert!(start.as_mut().now_or_never().is_none());
        engine.set_down(true);
        assert!(matches!(start.await, Err(Error::Unknown { .. })), "it was under way");
        assert!(matches!(engine.inspect(&id.0).await, Err(Error::Unavailable(_))));
        assert_eq!(events.next().await, None, "the stream ends");
        engine.set_down(false);
        assert_eq!(engine.inspect(&id.0).await.unwrap().unwrap().status, ContainerStatus::Created);
    }

    #[tokio::test]
    async fn the_peak_counts_containers_that_are_gone() {
        let engine = engine();
        for slot in ["s1", "s2"] {
            engine.create(&planned(slot)).await.unwrap();
        }
        engine.remove("boilerhouse-one-s1").await.unwrap();
        engine.create(&planned("s3")).await.unwrap();
        assert_eq!((engine.peak(), engine.all().len()), (2, 2));
    }
}
