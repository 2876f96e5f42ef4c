//! Makes slots, watches the ready ones, and takes them apart.

use std::time::Duration;

use tokio::sync::mpsc;
use tracing::{error, warn};

use super::{Pool, PoolParts, actor::Command};
use crate::{
    clock::random_below,
    crash_point,
    lifecycle::Tasks,
    model::{ContainerId, Owner, SlotId, SlotPhase, spec::HealthCheck},
    retry::Backoff,
    runtime::{self, ContainerStatus, Created, ExecRequest, Labels, plan::ContainerPlan},
    script::Workload,
    state,
    telemetry::chain,
};

/// The first wait between two probes of a warming slot.
const FIRST_PROBE_WAIT_MS: u64 = 50;
/// A warming slot has at least this long to become healthy.
const WARMING_LIMIT_MS: u64 = 60_000;
/// Attempts to settle an engine call whose outcome is not known.
const SETTLE_ATTEMPTS: u32 = 4;
/// Output of a health check that is kept for its error.
const PROBE_OUTPUT_BYTES: usize = 512;
const SETTLE: Backoff = Backoff { base_ms: 200, cap_ms: 5_000 };
const RETIRE: Backoff = Backoff { base_ms: 200, cap_ms: 30_000 };

/// The container of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The engine's id.
    pub container: ContainerId,
    /// Its name.
    pub name: String,
    /// Its address on its network, if it has one.
    pub address: Option<String>,
    /// Who its program runs as.
    pub run_as: Owner,
}

/// Reports a slot as failed unless it was reported otherwise: a maker that
/// panics or is cut off leaves nothing behind.
pub(super) struct Unfinished {
    slot: SlotId,
    tx: mpsc::Sender<Command>,
    tasks: Tasks,
    done: bool,
}

/// Returns the container's name of a slot.
pub(super) fn container_name(instance: &str, slot: &SlotId) -> String {
    format!("boilerhouse-{instance}-{slot}")
}

/// Makes a slot up to ready. The reason of a failure is for people.
pub(super) async fn make(
    parts: &PoolParts,
    workload: &Workload,
    slot: &SlotId,
    tx: &mpsc::Sender<Command>,
) -> Result<Made, String> {
    let spec = &workload.spec;
    let mounts = parts.files.prepare(slot, &spec.volumes).await.map_err(|error| chain(&error))?;
    crash_point!(parts.crash, "refill.prepared");
    parts.runtime.ensure_image(&spec.image, spec.pull).await.map_err(|error| chain(&error))?;
    let labels = Labels {
        instance: parts.instance.clone(),
        slot: slot.clone(),
        workload: spec.id.clone(),
        spec_hash: workload.spec_hash.clone(),
    };
    let plan = runtime::plan::plan(spec, labels, mounts);
    let created = create(parts, &plan).await?;
    crash_point!(parts.crash, "refill.created");
    settle(parts, || parts.runtime.start(&created.id)).await?;
    crash_point!(parts.crash, "refill.started");
    let _ = tx.send(Command::Warming(slot.clone())).await;
    let observed = settle(parts, || parts.runtime.inspect(&created.id.0)).await?;
    let Some(observed) = observed else { return Err("the container vanished after its start".to_owned()) };
    if let Some(ended) = why_not_running(&observed.status) {
        return Err(ended);
    }
    if let Some(check) = &spec.health_check {
        become_healthy(parts, &created.id, check).await?;
    }
    crash_point!(parts.crash, "refill.healthy");
    Ok(Made { container: created.id, name: plan.name, address: observed.address, run_as: created.run_as })
}

/// Takes a slot apart, for as long as it takes: the container first, then its directories.
pub(super) async fn unmake(parts: &PoolParts, slot: &SlotId, name: &str) {
    let mut attempt = 0;
    while let Err(error) = parts.runtime.remove(name).await {
        warn!(slot = %slot, error = &error as &dyn std::error::Error, "container is not removed yet");
        tokio::time::sleep(RETIRE.wait(attempt, &*parts.clock)).await;
        attempt += 1;
    }
    crash_point!(parts.crash, "retire.removed");
    attempt = 0;
    loop {
        match parts.files.wipe(slot).await {
            Ok(()) => return,
            Err(state::Error::NotEmpty { .. }) => {
                // Whoever retires a slot has taken its state out; what is here was not expected.
                match parts.files.set_aside(slot, "found in a slot that was being retired").await {
                    Ok(place) => error!(slot = %slot, place, "unexpected state is set aside"),
                    Err(error) => {
                        warn!(slot = %slot, error = &error as &dyn std::error::Error, "unexpected state stays in its slot")
                    }
                }
            }
            Err(error) => {
                warn!(slot = %slot, error = &error as &dyn std::error::Error, "slot directories are not removed yet");
            }
        }
        tokio::time::sleep(RETIRE.wait(attempt, &*parts.clock)).await;
        attempt += 1;
    }
}

/// Probes a ready slot at its interval until it is taken or fails too often.
pub(super) fn watch(parts: &PoolParts, workload: &Workload, slot: &SlotId, made: &Made, pool: &Pool) {
    let Some(check) = workload.spec.health_check.clone() else { return };
    let (parts, slot, made, pool) = (parts.clone(), slot.clone(), made.clone(), pool.clone());
    parts.tasks.clone().spawn("watch slot", async move {
        let draining = parts.tasks.draining();
        let mut misses = 0;
        loop {
            let jitter_ms = random_below(&*parts.clock, check.interval_ms / 8 + 1);
            tokio::select! {
                biased;
                () = draining.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(check.interval_ms + jitter_ms)) => {}
            }
            let ready =
                pool.view.slots.get(&slot).is_some_and(|slot| slot.phase == SlotPhase::Ready.as_str());
            if !ready {
                return;
            }
            match probe(&parts, &made.container, &check).await {
                Ok(()) => misses = 0,
                Err(reason) => {
                    misses += 1;
                    if misses >= check.retries {
                        pool.tell(Command::Unhealthy(slot, reason)).await;
                        return;
                    }
                }
            }
        }
    });
}

async fn create(parts: &PoolParts, plan: &ContainerPlan) -> Result<Created, String> {
    // The name makes a repetition safe: it finds what an earlier call has made.
    settle(parts, || parts.runtime.create(plan)).await
}

/// Repeats an idempotent engine call while its outcome is not known (P8).
async fn settle<T, F, Fut>(parts: &PoolParts, mut call: F) -> Result<T, String>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, runtime::Error>>,
{
    let mut attempt = 0;
    loop {
        match call().await {
            Err(runtime::Error::Unknown { .. }) if attempt + 1 < SETTLE_ATTEMPTS => {
                tokio::time::sleep(SETTLE.wait(attempt, &*parts.clock)).await;
                attempt += 1;
            }
            outcome => return outcome.map_err(|error| chain(&error)),
        }
    }
}

async fn become_healthy(parts: &PoolParts, id: &ContainerId, check: &HealthCheck) -> Result<(), String> {
    let limit_ms = WARMING_LIMIT_MS.max(u64::from(check.retries) * (check.interval_ms + check.timeout_ms));
    let limit = tokio::time::Instant::now() + Duration::from_millis(limit_ms);
    let mut wait_ms = FIRST_PROBE_WAIT_MS;
    loop {
        let Err(reason) = probe(parts, id, check).await else { return Ok(()) };
        if let Ok(Some(observed)) = parts.runtime.inspect(&id.0).await
            && let Some(ended) = why_not_running(&observed.status)
        {
            return Err(ended);
        }
        let next = tokio::time::Instant::now() + Duration::from_millis(wait_ms);
        if next > limit {
            return Err(format!("not healthy within {limit_ms} ms: {reason}"));
        }
        tokio::time::sleep_until(next).await;
        wait_ms = (wait_ms * 2).min(check.interval_ms.max(FIRST_PROBE_WAIT_MS));
    }
}

async fn probe(parts: &PoolParts, id: &ContainerId, check: &HealthCheck) -> Result<(), String> {
    let request = ExecRequest {
        argv: check.command.clone(),
        env: Vec::new(),
        stdin: None,
        timeout: Duration::from_millis(check.timeout_ms),
        output_cap_bytes: PROBE_OUTPUT_BYTES,
    };
    match parts.runtime.exec(id, request).await {
        Ok(output) if output.status == 0 => Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(if output.stderr.is_empty() {
                &output.stdout
            } else {
                &output.stderr
            })
            .trim()
            .to_owned();
            Err(format!("health check ended with status {}: {text}", output.status))
        }
        Err(error) => Err(chain(&error)),
    }
}

fn why_not_running(status: &ContainerStatus) -> Option<String> {
    match status {
        ContainerStatus::Running | ContainerStatus::Paused => None,
        ContainerStatus::Created => Some("the container did not start".to_owned()),
        ContainerStatus::Exited { code, oom_killed: true } => {
            Some(format!("the program ended with status {code}, killed for memory (resources.memory_mb)"))
        }
        ContainerStatus::Exited { code, .. } => Some(format!("the program ended with status {code}")),
        ContainerStatus::Dead => Some("the container is dead".to_owned()),
    }
}

// === impl Unfinished ===

impl Unfinished {
    pub(super) fn new(slot: SlotId, tx: mpsc::Sender<Command>, tasks: Tasks) -> Self {
        Self { slot, tx, tasks, done: false }
    }

    pub(super) fn slot(&self) -> &SlotId {
        &self.slot
    }

    pub(super) fn tx(&self) -> &mpsc::Sender<Command> {
        &self.tx
    }

    pub(super) async fn ready(mut self, made: Made) {
        self.done = true;
        let _ = self.tx.send(Command::Ready(self.slot.clone(), made)).await;
    }

    pub(super) async fn failed(mut self, reason: String) {
        self.done = true;
        let _ = self.tx.send(Command::Failed(self.slot.clone(), reason)).await;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let (slot, tx) = (self.slot.clone(), self.tx.clone());
        self.tasks.spawn("report slot", async move {
            let _ = tx.send(Command::Failed(slot, "the maker of this slot panicked".to_owned())).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_running_container_is_fit() {
        assert_eq!(why_not_running(&ContainerStatus::Running), None);
        let oom = why_not_running(&ContainerStatus::Exited { code: 137, oom_killed: true }).unwrap();
        assert!(oom.contains("137") && oom.contains("memory_mb"), "{oom}");
        assert!(why_not_running(&ContainerStatus::Created).is_some());
    }
}
