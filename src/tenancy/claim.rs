//! A claim, step by step, and the way back from each step.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    ClaimAnswer, ClaimRequest, DEFAULT_WAIT_MS, Error, Inner, MAX_WAIT_MS, RETRY_AFTER_MS, answer,
    host::ClaimHost,
    opening::Opening,
    registry::{Asked, Detail, Entry, Live, SaveOutcome, Unsaved},
    release::Ending,
};
use crate::{
    clock::random_hex,
    crash_point,
    journal::{self, ClaimRow, Durability, Op, SlotRow, TreeRow},
    model::{
        ClaimSource, ClaimState, Epoch, Key, Secret, SlotPhase, SnapshotRef, StateSource, spec::Activation,
    },
    pool::{self, Taken},
    runtime::ExecRequest,
    script::{ClaimFacts, ContainerFacts, Facts, Hook, TenantFacts, Verdict, Workload, WorkloadFacts},
    state::{self, Fill, FillFrom, Filled},
};

/// How long an activation command may run.
const ACTIVATION_LIMIT: Duration = Duration::from_secs(30);
/// What is kept of an activation command's output, for its error.
const ACTIVATION_OUTPUT_BYTES: usize = 2_048;

/// Milliseconds of each step so far.
pub(super) struct Steps {
    began: Instant,
    last: Instant,
    ms: BTreeMap<&'static str, f64>,
}

/// What is known of a key's state before a slot is taken.
pub(super) struct Located {
    pub(super) from: FillFrom,
    pub(super) source: StateSource,
    pub(super) snapshot: Option<SnapshotRef>,
    /// The last epoch before this claim's.
    pub(super) epoch: Epoch,
    pub(super) previous_owner: Option<crate::model::Owner>,
    /// What the store must hear before anything runs; none: it knows enough.
    pub(super) opening: Option<Opening>,
}

/// Checks what can be said of a request before anything is done.
pub(super) fn check(request: &ClaimRequest, workload: &Workload) -> Result<(), Error> {
    let invalid = |field: String, problem: String| Err(Error::Invalid { field, problem });
    if request.env.as_ref().is_some_and(|env| !env.is_empty()) {
        let problem = format!(
            "workload {} has an activation that cannot carry environment; put it into the workload's `environment` or into `secrets`",
            workload.spec.id
        );
        return invalid("env".to_owned(), problem);
    }
    if let Some(wait_ms) = request.wait_ms
        && wait_ms > MAX_WAIT_MS
    {
        return invalid("wait_ms".to_owned(), format!("{wait_ms} is too long; allowed: 0 to {MAX_WAIT_MS}"));
    }
    if let Some(secrets) = request.secrets.as_ref().filter(|secrets| !secrets.is_empty()) {
        if workload.spec.volumes.secrets.is_none() {
            let problem = format!("workload {} has no `volumes.secrets` to put them in", workload.spec.id);
            return invalid("secrets".to_owned(), problem);
        }
        for name in secrets.keys() {
            super::secrets::check_name(name)
                .map_err(|problem| Error::Invalid { field: format!("secrets.{name}"), problem })?;
        }
    }
    Ok(())
}

// === impl Inner ===

impl Inner {
    pub(super) async fn claim(
        self: &Arc<Self>,
        key: &Key,
        workload: &Arc<Workload>,
        request: ClaimRequest,
    ) -> Result<ClaimAnswer, Error> {
        let mut steps = Steps::begin();
        let entry = self.entry(key);
        let outcome = match self.lock(&entry).await {
            Ok(_guard) => self.claim_guarded(key, workload, &request, &entry, &mut steps).await,
            Err(error) => Err(error),
        };
        self.tidy(key, entry);
        let (source, result) = match &outcome {
            Ok(answer) => (answer::source_name(answer.source), "ok"),
            Err(error) => ("none", error.code()),
        };
        self.parts.metrics.claim(key.workload.as_str(), source, result, steps.total());
        outcome
    }

    async fn claim_guarded(
        self: &Arc<Self>,
        key: &Key,
        workload: &Arc<Workload>,
        request: &ClaimRequest,
        entry: &Arc<Entry>,
        steps: &mut Steps,
    ) -> Result<ClaimAnswer, Error> {
        self.not_being_erased(&key.tenant)?;
        let asked = self.asked(request);
        if let Some(live) = entry.live() {
            if live.row().state == ClaimState::Active {
                return self.existing(&live, &asked).await;
            }
            // A claim or release that ended abnormally left it; finish it first.
            self.end(key, entry, &live, Ending::Failed).await;
        }
        steps.mark("queue");
        let metadata = self.metadata(key, request);
        let facts = facts(key, workload, &metadata);
        let accepted = match self.hook(workload, Hook::BeforeClaim, facts.clone(), None).await {
            Ok(verdict) => accept(verdict, metadata)?,
            Err(error) => return Err(self.hook_failed(key, Hook::BeforeClaim, &error)),
        };
        steps.mark("before_claim");
        let term = self.ownership.term().await?;
        let mut located = self.locate(key, workload, entry, term).await?;
        steps.mark("locate");
        let taken = self.take(workload, request.wait_ms.unwrap_or(DEFAULT_WAIT_MS)).await?;
        steps.mark("slot");
        let live = self.bind(key, entry, taken, &mut located, term, (asked, accepted.clone())).await?;
        steps.mark("journal");
        match self.bring_up(key, &live, &located, request, facts_with(facts, &accepted), steps).await {
            Ok(answer) => Ok(answer),
            Err(error) => {
                info!(tenant = %key.tenant, workload = %key.workload, epoch = live.epoch().0, slot = %live.slot, error = &error as &dyn std::error::Error, "claim failed");
                self.undo_later(key, entry, &live);
                Err(error)
            }
        }
    }

    /// Answers a claim that is there already, with no side effect but its idle clock.
    async fn existing(&self, live: &Live, asked: &Asked) -> Result<ClaimAnswer, Error> {
        let before: Detail = serde_json::from_value(live.row().detail).unwrap_or_default();
        let pairs = [
            ("env", &asked.env, &before.asked.env),
            ("secrets", &asked.secrets, &before.asked.secrets),
            ("metadata", &asked.metadata, &before.asked.metadata),
        ];
        for (what, now, then) in pairs {
            if now.is_some() && now != then {
                return Err(Error::ClaimDiffers { what });
            }
        }
        self.note_activity(live, self.now_ms()).await;
        let mut answer = live.answer().unwrap_or_else(|| self.rebuilt_answer(live));
        answer.source = ClaimSource::Existing;
        Ok(answer)
    }

    /// Finds where the state is, asking the store only when this node does not know (P3).
    pub(super) async fn locate(
        &self,
        key: &Key,
        workload: &Workload,
        entry: &Entry,
        term: u64,
    ) -> Result<Located, Error> {
        for unsaved in entry.unsaved() {
            if let SaveOutcome::Conflict(reason) = unsaved.outcome.borrow().clone() {
                let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
                return Err(Error::StateConflict { tenant, workload, reason });
            }
            if unsaved.row().decided_on.is_some() {
                // A claim would take the tree, and with it what was decided about it.
                let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
                let reason = "an operator decided for this server's state".to_owned();
                return Err(Error::StateNotSaved {
                    tenant,
                    workload,
                    reason,
                    retry_after_ms: RETRY_AFTER_MS,
                });
            }
        }
        // What is not here comes from the store, which is then asked what is newest: a
        // rollback that a crash has cut short of its row in the journal is a rollback.
        let known = self
            .trees
            .get(key)
            .map(|tree| tree.clone())
            .filter(|tree| self.is_opened(key, term) && (tree.cached || tree.saved.is_none()));
        let Some(tree) = known else { return self.locate_in_store(key, workload, entry).await };
        let (from, source) = match (tree.cached, &tree.saved) {
            _ if workload.spec.volumes.state.is_none() => (FillFrom::Empty, StateSource::None),
            (true, _) => (FillFrom::Cache, StateSource::Cache),
            (false, _) => (FillFrom::Empty, StateSource::None),
        };
        let has_state = workload.spec.volumes.state.is_some();
        Ok(Located {
            from,
            source,
            snapshot: tree.saved.filter(|_| has_state),
            epoch: tree.epoch,
            previous_owner: tree.owner.filter(|_| has_state),
            opening: None,
        })
    }

    async fn take(&self, workload: &Arc<Workload>, wait_ms: u64) -> Result<Taken, Error> {
        let unknown = || Error::UnknownWorkload { given: workload.spec.id.to_string(), known: Vec::new() };
        let pool = self.parts.pools.get(&workload.spec.id).ok_or_else(unknown)?;
        match pool.take(self.now_ms().saturating_add(wait_ms)).await {
            Ok(taken) => Ok(taken),
            Err(pool::Error::Exhausted { reason, retry_after_ms }) => {
                let workload = workload.spec.id.clone();
                Err(Error::PoolExhausted { workload, reason, retry_after_ms })
            }
            Err(pool::Error::Closed) => Err(Error::ShuttingDown),
        }
    }

    /// Journals the claim. From here on it goes up to ACTIVE or through `end`.
    async fn bind(
        self: &Arc<Self>,
        key: &Key,
        entry: &Arc<Entry>,
        mut taken: Taken,
        located: &mut Located,
        term: u64,
        (asked, metadata): (Asked, serde_json::Map<String, serde_json::Value>),
    ) -> Result<Arc<Live>, Error> {
        crash_point!(self.parts.crash, "claim.taken");
        // The tree goes into the new claim's slot, and the duty to save it with it.
        for before in entry.unsaved() {
            before.cancel.cancel();
            if let SaveOutcome::Conflict(reason) = Self::save_ended(&before).await {
                self.resume_saves(key, entry);
                let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
                return Err(Error::StateConflict { tenant, workload, reason });
            }
        }
        // A save may have ended since the state was located.
        if let Some(tree) = self.trees.get(key).filter(|_| located.from == FillFrom::Cache) {
            located.snapshot.clone_from(&tree.saved);
        }
        let now_ms = self.now_ms();
        let epoch = located.epoch.next();
        let (files, bytes) =
            located.snapshot.as_ref().map_or((0, 0), |snapshot| (snapshot.files, snapshot.bytes));
        let detail = Detail { asked, metadata, files, bytes, ..Detail::default() };
        let row = ClaimRow {
            key: key.clone(),
            epoch,
            state: ClaimState::Claiming,
            slot: Some(taken.slot.clone()),
            revision: taken.workload.revision.clone(),
            run_as: taken.made.run_as,
            source: taken.source,
            state_source: located.source,
            snapshot: located.snapshot.clone(),
            nonce: located.opening.is_some().then(|| random_hex(&*self.parts.clock, 16)),
            failed: false,
            superseded_by: None,
            term: Some(term),
            opened: false,
            close: false,
            decided_on: None,
            detail: serde_json::to_value(detail).expect("a detail has only text keys"),
            created_ms: now_ms,
            active_ms: now_ms,
        };
        let tree = TreeRow {
            key: key.clone(),
            epoch,
            cached: located.from == FillFrom::Cache,
            saved: located.snapshot.clone(),
            owner: located.previous_owner,
            opened: self.trees.get(key).and_then(|tree| tree.opened),
        };
        // Written as claimed before any of the tenant's code can run in it (P4).
        let slot = SlotRow {
            slot: taken.slot.clone(),
            workload: key.workload.clone(),
            spec_hash: taken.workload.spec_hash.clone(),
            revision: taken.workload.revision.clone(),
            phase: SlotPhase::Claimed,
            container: Some(taken.made.container.clone()),
            name: taken.made.name.clone(),
            address: taken.made.address.clone(),
            run_as: Some(taken.made.run_as),
            created_ms: now_ms,
        };
        let mut ops = vec![Op::PutSlot(slot), Op::PutClaim(Box::new(row.clone())), Op::PutTree(tree.clone())];
        if located.epoch > Epoch(0) {
            ops.push(Op::DropClaim(key.clone(), located.epoch));
        }
        let mut superseded = Vec::new();
        for before in entry.unsaved() {
            let row = ClaimRow { superseded_by: Some(epoch), ..before.row() };
            ops.push(Op::PutClaim(Box::new(row.clone())));
            superseded.push((before, row));
        }
        let journaled = self.parts.journal.commit(ops.clone(), Durability::Hard).await;
        if let Err(error) = &journaled
            && !matches!(error, journal::Error::Unknown | journal::Error::Unavailable { .. })
        {
            self.resume_saves(key, entry);
            return Err(self.journal_failed(error));
        }
        crash_point!(self.parts.crash, "claim.claiming");
        taken.keep();
        for (before, row) in superseded {
            before.set_row(row);
        }
        let live = Arc::new(Live::new(
            row,
            Arc::clone(&taken.workload),
            taken.slot.clone(),
            taken.made.clone(),
            now_ms,
        ));
        self.trees.insert(key.clone(), tree);
        self.slot_owners.insert(taken.slot.clone(), key.clone());
        entry.set_live(Some(Arc::clone(&live)));
        if let Some(pool) = self.parts.pools.get(&key.workload) {
            pool.set_tenant(&taken.slot, key.tenant.as_str());
        }
        if let Err(error) = journaled {
            // It may be written, or show after a crash (P8): the claim goes to its end, and
            // that writes what this commit should have.
            live.owe(ops);
            self.undo_later(key, entry, &live);
            return Err(self.journal_failed(&error));
        }
        Ok(live)
    }

    /// Ends a claim that did not come up. That may take long (the engine may be down);
    /// the tenant hears now, and its next request finds the claim and finishes it first.
    fn undo_later(self: &Arc<Self>, key: &Key, entry: &Arc<Entry>, live: &Arc<Live>) {
        let (inner, key, entry, live) = (Arc::clone(self), key.clone(), Arc::clone(entry), Arc::clone(live));
        self.parts.tasks.spawn("undo claim", async move {
            let guard = entry.guard.lock().await;
            if entry.live().is_some_and(|now| Arc::ptr_eq(&now, &live)) {
                inner.end(&key, &entry, &live, Ending::Failed).await;
            }
            drop(guard);
            inner.tidy(&key, entry);
        });
    }

    /// Fills the slot and activates it: everything between CLAIMING and ACTIVE.
    async fn bring_up(
        self: &Arc<Self>,
        key: &Key,
        live: &Arc<Live>,
        located: &Located,
        request: &ClaimRequest,
        mut facts: Facts,
        steps: &mut Steps,
    ) -> Result<ClaimAnswer, Error> {
        let workload = Arc::clone(&live.workload);
        let fill = Fill {
            slot: live.slot.clone(),
            key: key.clone(),
            epoch: live.epoch(),
            from: located.from.clone(),
            run_as: live.made.run_as,
            previous_owner: located.previous_owner,
        };
        let mut fetched_bytes = 0;
        if let Some(opening) = &located.opening {
            fetched_bytes = self.open_claim(key, live, opening, &fill).await?;
            steps.mark("open");
        }
        let mut filled = self.parts.files.fill(&fill).await.map_err(|error| self.state_error(key, &error))?;
        filled.fetched_bytes += fetched_bytes;
        crash_point!(self.parts.crash, "claim.filled");
        steps.mark("fill");
        self.put_claim_secrets(key, live, request.secrets.as_ref()).await?;
        crash_point!(self.parts.crash, "claim.secrets");
        steps.mark("secrets");
        facts.claim = Some(ClaimFacts {
            epoch: live.epoch().0,
            source: answer::source_name(live.row().source).to_owned(),
            state: answer::state_source_name(located.source).to_owned(),
        });
        facts.container = Some(container_facts(live));
        let host = Arc::new(ClaimHost::new(Arc::clone(self), key.clone(), Arc::clone(live)));
        match self.hook(&workload, Hook::OnClaim, facts, Some(host.clone())).await {
            Ok(verdict) => {
                accept(verdict, serde_json::Map::new())?;
            }
            Err(error) => return Err(self.hook_failed(key, Hook::OnClaim, &error)),
        }
        crash_point!(self.parts.crash, "claim.on_claim");
        steps.mark("on_claim");
        self.activate(live).await?;
        crash_point!(self.parts.crash, "claim.activated");
        steps.mark("activate");
        let mut row = live.row();
        row.state =
            row.state.step(ClaimState::Active).map_err(|error| self.internal(&error, "claim step"))?;
        let mut detail: Detail = serde_json::from_value(row.detail).unwrap_or_default();
        (detail.files, detail.bytes) = sizes(&detail, filled);
        let outputs = host.outputs();
        self.keep_outputs(key, &mut detail, &outputs);
        row.detail = serde_json::to_value(&detail).expect("a detail has only text keys");
        let mut ops = vec![Op::PutClaim(Box::new(row.clone()))];
        ops.extend(self.note_opened(key, live).map(Op::PutTree));
        self.commit(ops, Durability::Soft).await?;
        crash_point!(self.parts.crash, "claim.active");
        live.set_row(row);
        steps.mark("commit");
        let mut answer = self.answer(live, &detail, outputs);
        answer.timings_ms = steps.finish();
        for (step, ms) in &answer.timings_ms {
            self.parts.metrics.claim_step(step, Duration::from_secs_f64(ms / 1e3));
        }
        live.set_answer(answer.clone());
        info!(
            tenant = %key.tenant, workload = %key.workload, epoch = live.epoch().0, slot = %live.slot,
            source = answer::source_name(answer.source), total_ms = answer.timings_ms["total"],
            "claimed"
        );
        Ok(answer)
    }

    async fn activate(&self, live: &Live) -> Result<(), Error> {
        match &live.workload.spec.activation {
            Activation::None => Ok(()),
            Activation::Exec(argv) => {
                let request = ExecRequest {
                    argv: argv.clone(),
                    env: Vec::new(),
                    stdin: None,
                    timeout: ACTIVATION_LIMIT,
                    output_cap_bytes: ACTIVATION_OUTPUT_BYTES,
                };
                let output = self.parts.runtime.exec(&live.made.container, request).await;
                let output = output.map_err(|error| self.runtime_error("activation", &error))?;
                if output.status == 0 {
                    return Ok(());
                }
                let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                Err(Error::ActivationFailed { reason: format!("status {}: {text}", output.status) })
            }
            Activation::Restart => {
                let grace = Duration::from_millis(live.workload.spec.stop_grace_ms);
                let restarted = self.parts.runtime.restart(&live.made.container, grace).await;
                restarted.map_err(|error| self.runtime_error("activation", &error))
            }
        }
    }

    /// Finishes a claim whose task panicked.
    pub(super) async fn undo_half_claim(self: &Arc<Self>, key: &Key) {
        let entry = self.entry(key);
        let guard = entry.guard.lock().await;
        if let Some(live) = entry.live().filter(|live| live.row().state == ClaimState::Claiming) {
            self.end(key, &entry, &live, Ending::Failed).await;
        }
        drop(guard);
        self.tidy(key, entry);
    }

    fn metadata(&self, key: &Key, request: &ClaimRequest) -> serde_json::Map<String, serde_json::Value> {
        let mut metadata = self.tenants.get(&key.tenant).map(|own| own.clone()).unwrap_or_default();
        metadata.extend(request.metadata.clone().unwrap_or_default());
        metadata
    }

    /// Digests what a request gives, keyed, so that the journal holds no value of it.
    fn asked(&self, request: &ClaimRequest) -> Asked {
        let digest = |part: &dyn Fn(&mut blake3::Hasher)| {
            let mut hasher = blake3::Hasher::new_keyed(&self.digest_key);
            part(&mut hasher);
            hasher.finalize().to_hex().to_string()
        };
        let add = |hasher: &mut blake3::Hasher, bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        Asked {
            env: request.env.as_ref().map(|env| {
                digest(&|hasher| {
                    for (name, value) in env {
                        add(hasher, name.as_bytes());
                        add(hasher, value.as_bytes());
                    }
                })
            }),
            secrets: request.secrets.as_ref().map(|secrets: &BTreeMap<String, Secret>| {
                digest(&|hasher| {
                    for (name, secret) in secrets {
                        add(hasher, name.as_bytes());
                        add(hasher, secret.expose());
                    }
                })
            }),
            metadata: request.metadata.as_ref().map(|metadata| {
                let json = serde_json::to_vec(metadata).expect("metadata was JSON");
                digest(&|hasher| add(hasher, &json))
            }),
        }
    }

    /// Maps a state error of a claim to its answer, and logs what an operator must see.
    pub(super) fn state_error(&self, key: &Key, error: &state::Error) -> Error {
        let reason = answer::chain(error);
        match error {
            state::Error::Store { .. } => {
                warn!(tenant = %key.tenant, workload = %key.workload, error = error as &dyn std::error::Error, "store does not answer");
                Error::StoreUnavailable { reason, retry_after_ms: RETRY_AFTER_MS }
            }
            state::Error::Fenced { .. } | state::Error::Torn { .. } => {
                Error::StateConflict { tenant: key.tenant.clone(), workload: key.workload.clone(), reason }
            }
            // The tenant's own doing, and the tenant's to mend.
            state::Error::Limit { .. } => {
                warn!(tenant = %key.tenant, workload = %key.workload, error = error as &dyn std::error::Error, "state is over its limit");
                Error::StateOverLimit { reason }
            }
            state::Error::Sealed { .. } => {
                tracing::error!(tenant = %key.tenant, workload = %key.workload, error = error as &dyn std::error::Error, "state cannot be opened");
                Error::StateSealed { reason }
            }
            state::Error::Damaged { .. } => {
                tracing::error!(tenant = %key.tenant, workload = %key.workload, error = error as &dyn std::error::Error, "state cannot be used");
                Error::StateDamaged { reason }
            }
            state::Error::NotEmpty { .. } | state::Error::File { .. } | state::Error::Disk { .. } => {
                self.internal(error, "state could not be moved")
            }
        }
    }

    pub(super) fn runtime_error(&self, what: &'static str, error: &crate::runtime::Error) -> Error {
        self.parts.metrics.engine_error(what);
        warn!(what, error = error as &dyn std::error::Error, "engine call failed");
        Error::Runtime { reason: format!("{what}: {}", answer::chain(error)), retry_after_ms: RETRY_AFTER_MS }
    }

    /// Waits until a save has ended, because its tree is about to move.
    pub(super) async fn save_ended(unsaved: &Unsaved) -> SaveOutcome {
        let mut outcome = unsaved.outcome.subscribe();
        let ended = outcome
            .wait_for(|outcome| !matches!(outcome, SaveOutcome::Saving | SaveOutcome::Retrying(_)))
            .await;
        ended.map_or(SaveOutcome::Ended, |outcome| outcome.clone())
    }
}

fn accept(
    verdict: Verdict,
    mut metadata: serde_json::Map<String, serde_json::Value>,
) -> Result<serde_json::Map<String, serde_json::Value>, Error> {
    match verdict {
        Verdict::Default | Verdict::Retire => Ok(metadata),
        Verdict::Accept { env, metadata: more } => {
            if !env.is_empty() {
                return Err(Error::Invalid {
                    field: "env".to_owned(),
                    problem: "the hook gives environment, and the workload's activation cannot carry it"
                        .to_owned(),
                });
            }
            metadata.extend(more);
            Ok(metadata)
        }
        Verdict::Reject { code, message } => Err(Error::Rejected { code, message }),
        Verdict::RetryAfter { ms } => Err(Error::RetryAfter { ms }),
    }
}

fn facts(key: &Key, workload: &Workload, metadata: &serde_json::Map<String, serde_json::Value>) -> Facts {
    Facts {
        tenant: TenantFacts { id: key.tenant.to_string(), metadata: metadata.clone() },
        workload: WorkloadFacts { id: workload.spec.id.to_string(), name: workload.spec.name.clone() },
        claim: None,
        container: None,
    }
}

fn facts_with(mut facts: Facts, metadata: &serde_json::Map<String, serde_json::Value>) -> Facts {
    facts.tenant.metadata = metadata.clone();
    facts
}

fn container_facts(live: &Live) -> ContainerFacts {
    ContainerFacts {
        id: live.made.container.to_string(),
        name: live.made.name.clone(),
        slot: live.slot.to_string(),
        address: live.made.address.clone(),
    }
}

/// Facts of a claim that has a slot, for the hooks of its release.
pub(super) fn live_facts(key: &Key, live: &Live) -> Facts {
    let row = live.row();
    let detail: Detail = serde_json::from_value(row.detail).unwrap_or_default();
    let mut facts = facts(key, &live.workload, &detail.metadata);
    facts.claim = Some(ClaimFacts {
        epoch: row.epoch.0,
        source: answer::source_name(row.source).to_owned(),
        state: answer::state_source_name(row.state_source).to_owned(),
    });
    facts.container = Some(container_facts(live));
    facts
}

fn sizes(detail: &Detail, filled: Filled) -> (u64, u64) {
    if detail.files == 0 && detail.bytes == 0 {
        (filled.files, filled.bytes)
    } else {
        (detail.files, detail.bytes)
    }
}

// === impl Steps ===

impl Steps {
    fn begin() -> Self {
        let now = Instant::now();
        Self { began: now, last: now, ms: BTreeMap::new() }
    }

    fn mark(&mut self, step: &'static str) {
        let now = Instant::now();
        self.ms.insert(step, answer::ms(now - self.last));
        self.last = now;
    }

    pub(super) fn total(&self) -> Duration {
        self.began.elapsed()
    }

    fn finish(&mut self) -> BTreeMap<&'static str, f64> {
        self.ms.insert("total", answer::ms(self.total()));
        std::mem::take(&mut self.ms)
    }
}
