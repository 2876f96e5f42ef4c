//! Taking over what survived a restart.
//!
//! [`decide`] is pure: from the journal's rows and what the engine and the disk
//! show, it says what becomes of every claim, slot, container and directory.
//! Carrying it out repeats no act that has happened and skips none that has not.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use dashmap::{DashMap, DashSet};
use tracing::{error, info, warn};

use super::{
    Inner, Parts, Tenancy, answer,
    cache::Cache,
    ownership::Ownership,
    registry::{Live, SaveOutcome, Unsaved},
    release::Ending,
    sync::{SYNCS_AT_ONCE, unpause},
};
use crate::{
    crash_point,
    journal::{ClaimRow, Durability, Loaded, Op, SlotRow, TreeRow},
    model::{
        ClaimState, ContainerId, Key, Revision, SlotId, SlotPhase, SpecHash, WorkloadId, spec::PoolSizes,
    },
    pool::{Adopted, Made},
    retry::Backoff,
    runtime::{ContainerStatus, Observed},
    script::Workload,
    state::{Survey, history::History},
};

const LOOK: Backoff = Backoff { base_ms: 250, cap_ms: 10_000 };
/// Facts of the journal that this module writes.
const BOOT_ID: &str = "boot_id";
const DIGEST_KEY: &str = "digest_key";
const STORE: &str = "store";

/// What becomes of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Its container runs: it goes on as it was.
    Keep {
        /// A checkpoint was interrupted.
        unpause: bool,
    },
    /// It goes to its end from where it stands.
    End(Ending),
    /// Its state is on this node only: saved.
    Save,
    /// A later claim has its tree.
    Superseded,
    /// An operator decides.
    Conflict,
    /// It is over.
    Over,
}

/// Everything that is decided at start.
#[derive(Debug, Default, PartialEq, Eq)]
struct Decisions {
    claims: Vec<(Key, u64, Fate)>,
    /// Slots that go on, by phase.
    slots: BTreeMap<SlotId, SlotPhase>,
    /// Names of containers that belong to nothing.
    dangling: Vec<String>,
    /// Slot directories that belong to nothing, and whether they hold state.
    strays: Vec<(SlotId, bool)>,
    /// Digests of cached trees that belong to nothing.
    stray_trees: Vec<String>,
    /// Keys whose cached tree may be torn by a power loss, or may be half a prefetch, and
    /// is in the store.
    evict: Vec<Key>,
    /// Keys whose cached tree should be there and is not.
    missing: Vec<Key>,
}

/// The inputs of a decision.
struct Found<'a> {
    slots: &'a [SlotRow],
    claims: &'a [ClaimRow],
    trees: &'a [TreeRow],
    observed: &'a [Observed],
    survey: &'a Survey,
    current: &'a BTreeMap<WorkloadId, SpecHash>,
    power_lost: bool,
}

fn decide(found: &Found<'_>) -> Decisions {
    let mut decisions = Decisions::default();
    let status: BTreeMap<&str, &ContainerStatus> =
        found.observed.iter().map(|observed| (observed.name.as_str(), &observed.status)).collect();
    let rows: BTreeMap<&SlotId, &SlotRow> = found.slots.iter().map(|row| (&row.slot, row)).collect();
    let mut held: BTreeSet<&SlotId> = BTreeSet::new();
    let mut unsettled: BTreeSet<&Key> = BTreeSet::new();
    for claim in found.claims {
        let container =
            claim.slot.as_ref().and_then(|slot| rows.get(slot)).and_then(|row| status.get(row.name.as_str()));
        let fate = match claim.state {
            ClaimState::Active => match container {
                Some(ContainerStatus::Running) => Fate::Keep { unpause: false },
                Some(ContainerStatus::Paused) => Fate::Keep { unpause: true },
                _ => Fate::End(Ending::Lost),
            },
            ClaimState::Claiming => Fate::End(Ending::Failed),
            ClaimState::Releasing if claim.failed => Fate::End(Ending::Failed),
            ClaimState::Releasing => match container {
                Some(ContainerStatus::Running | ContainerStatus::Paused) => Fate::End(Ending::Released),
                _ => Fate::End(Ending::Lost),
            },
            ClaimState::Dirty if claim.superseded_by.is_some() => Fate::Superseded,
            ClaimState::Dirty => Fate::Save,
            ClaimState::Conflict => Fate::Conflict,
            ClaimState::Clean => Fate::Over,
        };
        if fate != Fate::Over {
            unsettled.insert(&claim.key);
        }
        if let (Fate::Keep { .. } | Fate::End(_), Some(slot)) = (fate, claim.slot.as_ref()) {
            held.insert(slot);
        }
        decisions.claims.push((claim.key.clone(), claim.epoch.0, fate));
    }
    for row in found.slots {
        let runs = status.get(row.name.as_str()).is_some_and(|status| **status == ContainerStatus::Running);
        let current = found.current.get(&row.workload) == Some(&row.spec_hash);
        let touched = found.survey.slots.iter().any(|(slot, holds)| *slot == row.slot && *holds);
        let phase = if held.contains(&row.slot) {
            SlotPhase::Claimed
        } else if row.phase == SlotPhase::Ready && runs && current && !touched {
            SlotPhase::Ready
        } else {
            SlotPhase::Retiring
        };
        decisions.slots.insert(row.slot.clone(), phase);
    }
    for observed in found.observed {
        if !found.slots.iter().any(|row| row.name == observed.name) {
            decisions.dangling.push(observed.name.clone());
        }
    }
    for (slot, holds) in &found.survey.slots {
        if !rows.contains_key(slot) {
            decisions.strays.push((slot.clone(), *holds));
        }
    }
    let digests: BTreeMap<String, &TreeRow> =
        found.trees.iter().filter(|tree| tree.cached).map(|tree| (tree.key.digest(), tree)).collect();
    // A claim that was being filled from the store has a tree here that no row calls cached.
    // One that only is to be closed has none: what is here was to be set aside with it.
    let filled = found.claims.iter().filter(|claim| unsettled.contains(&claim.key) && !claim.close);
    let filling: BTreeSet<String> = filled.map(|claim| claim.key.digest()).collect();
    for digest in &found.survey.cached {
        if !digests.contains_key(digest) && !filling.contains(digest) {
            decisions.stray_trees.push(digest.clone());
        }
    }
    for (digest, tree) in digests {
        if unsettled.contains(&tree.key) {
            continue;
        }
        if !found.survey.cached.contains(&digest) {
            decisions.missing.push(tree.key.clone());
        } else if tree.saved.is_some() && (found.power_lost || tree.owner.is_none()) {
            decisions.evict.push(tree.key.clone());
        }
    }
    decisions
}

// === impl Tenancy ===

impl Tenancy {
    /// Creates tenancy from the journal's rows; it serves after [`Tenancy::adopt`].
    pub fn new(parts: Parts, loaded: &Loaded) -> Self {
        let mut digest_key = [0; 32];
        let kept = loaded.facts.get(DIGEST_KEY).and_then(|text| hex::decode(text).ok());
        match kept.as_deref().map(<[u8; 32]>::try_from) {
            Some(Ok(key)) => digest_key = key,
            _ => parts.clock.fill_random(&mut digest_key),
        }
        let inner = Inner {
            entries: DashMap::new(),
            trees: loaded.trees.iter().map(|tree| (tree.key.clone(), tree.clone())).collect(),
            tenants: loaded.tenants.iter().cloned().collect(),
            with_secrets: loaded.with_secrets.iter().cloned().collect::<DashSet<_>>(),
            erasing: loaded.erasures.iter().cloned().collect::<DashSet<_>>(),
            history: History::new(Arc::clone(&parts.store), Arc::clone(&parts.clock), parts.instance.clone())
                .in_mode(parts.mode)
                .with_encryption(parts.encryption.clone()),
            cache: Cache::new(parts.cache),
            slot_owners: DashMap::new(),
            digest_key,
            started: AtomicBool::new(false),
            health: Mutex::default(),
            ownership: Ownership::new(
                Arc::clone(&parts.store),
                parts.instance.clone(),
                parts.mode,
                &loaded.claims,
            ),
            syncs: tokio::sync::Semaphore::new(SYNCS_AT_ONCE),
            parts,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Checks that the journal belongs to this store: a node's knowledge of what is
    /// saved is worth nothing for another one.
    ///
    /// # Errors
    /// The store that the journal belongs to.
    pub fn check_store(loaded: &Loaded, store: &str) -> Result<(), String> {
        match loaded.facts.get(STORE) {
            Some(before) if before != store && !(loaded.trees.is_empty() && loaded.claims.is_empty()) => {
                Err(before.clone())
            }
            _ => Ok(()),
        }
    }

    /// Finishes or undoes everything that was under way, opens the pools, and
    /// then serves. Waits for the engine for as long as it takes; when the node is
    /// told to stop meanwhile, nothing has been touched and the next start adopts.
    pub async fn adopt(&self, loaded: Loaded, boot_id: &str, store: &str) {
        let inner = &self.inner;
        let Some(observed) = self.look().await else { return };
        let mut survey_attempt = 0;
        let survey = loop {
            match inner.parts.files.survey().await {
                Ok(survey) => break survey,
                Err(error) => {
                    self.set_health("disk", Some(answer::chain(&error)));
                    error!(
                        error = &error as &dyn std::error::Error,
                        "directories cannot be read; nothing is adopted yet"
                    );
                    if !self.wait_to_look(survey_attempt).await {
                        return;
                    }
                    survey_attempt += 1;
                }
            }
        };
        self.set_health("disk", None);
        crash_point!(inner.parts.crash, "adopt.looked");
        let set = inner.parts.scripts.load_full();
        let current: BTreeMap<_, _> =
            set.iter().map(|workload| (workload.spec.id.clone(), workload.spec_hash.clone())).collect();
        let power_lost = loaded.facts.get(BOOT_ID).is_some_and(|before| before != boot_id);
        let decisions = decide(&Found {
            slots: &loaded.slots,
            claims: &loaded.claims,
            trees: &loaded.trees,
            observed: &observed,
            survey: &survey,
            current: &current,
            power_lost,
        });
        info!(
            claims = decisions.claims.len(),
            slots = decisions.slots.len(),
            dangling = decisions.dangling.len(),
            power_lost,
            "adopting"
        );
        inner.note_facts(&loaded, store, &set).await;
        if inner.adopt_trees(&decisions).await {
            // Last: a crash before it must not make the next start forget the power loss.
            inner.note(vec![Op::PutFact(BOOT_ID, boot_id.to_owned())]).await;
        }
        inner.remove_strays(&decisions).await;
        crash_point!(inner.parts.crash, "adopt.strays");
        let revisions = inner.revisions(&loaded, &set);
        inner.open_pools(&loaded, &decisions, &revisions, &set);
        inner.adopt_claims(&loaded, &decisions, &revisions).await;
        crash_point!(inner.parts.crash, "adopt.done");
        inner.started.store(true, Ordering::Release);
        info!("serving");
        self.finish_erasures().await;
    }

    /// Lists the engine's containers, or `None` when the node is told to stop first.
    async fn look(&self) -> Option<Vec<Observed>> {
        let mut attempt = 0;
        loop {
            match self.inner.parts.runtime.list(&self.inner.parts.instance).await {
                Ok(observed) => {
                    self.set_health("engine", None);
                    return Some(observed);
                }
                Err(error) => {
                    self.set_health("engine", Some(answer::chain(&error)));
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "engine does not answer; nothing is adopted yet"
                    );
                    if !self.wait_to_look(attempt).await {
                        return None;
                    }
                    attempt += 1;
                }
            }
        }
    }

    /// Waits before the next look; returns whether there is to be one.
    async fn wait_to_look(&self, attempt: u32) -> bool {
        let parts = &self.inner.parts;
        let draining = parts.tasks.draining();
        let wait = tokio::time::sleep(LOOK.wait(attempt, &*parts.clock));
        draining.run_until_cancelled(wait).await.is_some()
    }
}

// === impl Inner ===

impl Inner {
    async fn note_facts(&self, loaded: &Loaded, store: &str, set: &crate::script::Set) {
        let mut ops =
            vec![Op::PutFact(DIGEST_KEY, hex::encode(self.digest_key)), Op::PutFact(STORE, store.to_owned())];
        let mut wanted: BTreeSet<&Revision> = loaded.slots.iter().map(|row| &row.revision).collect();
        wanted.extend(loaded.claims.iter().map(|row| &row.revision));
        for workload in set.iter() {
            ops.push(Op::PutRevision(workload.revision.clone(), workload.to_json()));
            wanted.insert(&workload.revision);
        }
        let unwanted = loaded.revisions.iter().filter(|(revision, _)| !wanted.contains(revision));
        ops.extend(unwanted.map(|(revision, _)| Op::DropRevision(revision.clone())));
        self.note(ops).await;
    }

    /// Journals what claims rely on after the next restart: nothing is served without it.
    async fn note(&self, ops: Vec<Op>) {
        let mut attempt = 0;
        while let Err(error) = self.parts.journal.commit(ops.clone(), Durability::Hard).await {
            error!(error = &error as &dyn std::error::Error, "facts of this start are not journaled yet");
            tokio::time::sleep(LOOK.wait(attempt, &*self.parts.clock)).await;
            attempt += 1;
        }
    }

    /// Makes rows and cached trees meet; returns whether every tree that a power loss
    /// may have torn is gone.
    async fn adopt_trees(&self, decisions: &Decisions) -> bool {
        crash_point!(self.parts.crash, "adopt.trees");
        let mut done = true;
        for key in &decisions.evict {
            // After a power loss a tree that was not synced may be torn, and one without an
            // owner was being prefetched; the store has it whole.
            match self.parts.files.discard(key).await {
                Ok(()) => self.forget_cached(key).await,
                Err(error) => {
                    done = false;
                    error!(tenant = %key.tenant, workload = %key.workload, error = &error as &dyn std::error::Error, "cached tree that may not be whole cannot be removed");
                }
            }
        }
        for key in &decisions.missing {
            if self.trees.get(key).is_some_and(|tree| tree.saved.is_none()) {
                // Forgotten, it would be taken for a tenant that never had any state (P3).
                error!(tenant = %key.tenant, workload = %key.workload, "cached tree is gone from disk, and it was the only copy; its claims fail");
                continue;
            }
            warn!(tenant = %key.tenant, workload = %key.workload, "cached tree is gone from disk; the store has it");
            self.forget_cached(key).await;
        }
        for digest in &decisions.stray_trees {
            match self.parts.files.set_aside_cached(digest, "no row of the journal knows this tree").await {
                Ok(place) => error!(digest, place, "unknown state is set aside"),
                Err(error) => error!(
                    digest,
                    error = &error as &dyn std::error::Error,
                    "unknown state stays in the cache"
                ),
            }
        }
        done
    }

    pub(super) async fn forget_cached(&self, key: &Key) {
        let Some(mut tree) = self.trees.get(key).map(|tree| tree.clone()) else { return };
        tree.cached = false;
        // Not journaled, the next start finds the tree missing once more.
        let _ = self.commit(vec![Op::PutTree(tree.clone())], Durability::Soft).await;
        self.trees.insert(key.clone(), tree);
    }

    async fn remove_strays(self: &Arc<Self>, decisions: &Decisions) {
        for name in &decisions.dangling {
            info!(container = name, "removing a container that no slot knows");
            let mut attempt = 0;
            while let Err(error) = self.parts.runtime.remove(name).await {
                warn!(
                    container = name,
                    error = &error as &dyn std::error::Error,
                    "dangling container is not removed yet"
                );
                if attempt >= 3 {
                    self.remove_later(name);
                    break;
                }
                tokio::time::sleep(LOOK.wait(attempt, &*self.parts.clock)).await;
                attempt += 1;
            }
        }
        for (slot, holds) in &decisions.strays {
            let outcome = if *holds {
                match self.parts.files.set_aside(slot, "no row of the journal knows this slot").await {
                    Ok(place) => {
                        error!(slot = %slot, place, "unknown state is set aside");
                        self.parts.files.wipe(slot).await
                    }
                    Err(error) => Err(error),
                }
            } else {
                self.parts.files.wipe(slot).await
            };
            if let Err(error) = outcome {
                error!(slot = %slot, error = &error as &dyn std::error::Error, "directories of an unknown slot stay");
            }
        }
    }

    /// Goes on with a removal beside everything else; until then the container counts.
    fn remove_later(self: &Arc<Self>, name: &str) {
        let (inner, name, place) = (Arc::clone(self), name.to_owned(), self.parts.pools.place());
        self.parts.tasks.spawn("remove container", async move {
            let mut attempt = 0;
            while let Err(error) = inner.parts.runtime.remove(&name).await {
                warn!(
                    container = name,
                    error = &error as &dyn std::error::Error,
                    "dangling container is not removed yet"
                );
                tokio::time::sleep(LOOK.wait(attempt, &*inner.parts.clock)).await;
                attempt += 1;
            }
            drop(place);
        });
    }

    /// Rebuilds every revision that a slot or claim refers to.
    fn revisions(&self, loaded: &Loaded, set: &crate::script::Set) -> BTreeMap<Revision, Arc<Workload>> {
        let mut revisions: BTreeMap<_, _> =
            set.iter().map(|workload| (workload.revision.clone(), Arc::clone(workload))).collect();
        for (revision, json) in &loaded.revisions {
            if revisions.contains_key(revision) {
                continue;
            }
            match Workload::from_json(json) {
                Ok(workload) => {
                    revisions.insert(revision.clone(), workload);
                }
                Err(errors) => {
                    let errors = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
                    error!(revision = %revision, errors, "a journaled revision cannot be rebuilt");
                }
            }
        }
        revisions
    }

    fn open_pools(
        &self,
        loaded: &Loaded,
        decisions: &Decisions,
        revisions: &BTreeMap<Revision, Arc<Workload>>,
        set: &crate::script::Set,
    ) {
        let mut by_workload: BTreeMap<WorkloadId, Vec<Adopted>> =
            set.iter().map(|workload| (workload.spec.id.clone(), Vec::new())).collect();
        for row in &loaded.slots {
            let workload = revisions.get(&row.revision).cloned().or_else(|| set.get(&row.workload).cloned());
            let Some(workload) = workload else {
                error!(slot = %row.slot, revision = %row.revision, "slot's revision is unknown; its container stays until upkeep removes it");
                continue;
            };
            by_workload.entry(row.workload.clone()).or_default().push(Adopted {
                slot: row.slot.clone(),
                place: self.parts.pools.place(),
                phase: decisions.slots.get(&row.slot).copied().unwrap_or(SlotPhase::Retiring),
                spec_hash: row.spec_hash.clone(),
                made: made(row),
                workload,
            });
        }
        for (id, adopted) in by_workload {
            match set.get(&id) {
                Some(workload) => {
                    self.parts.pools.open(Arc::clone(workload), workload.spec.pool.clone(), adopted)
                }
                // The workload's file is gone: its pool only lives to end what there is.
                None => {
                    if let Some(workload) = adopted.first().map(|slot| Arc::clone(&slot.workload)) {
                        self.parts.pools.open(workload, PoolSizes { min_idle: 0, max: 0 }, adopted);
                    }
                }
            }
        }
    }

    async fn adopt_claims(
        self: &Arc<Self>,
        loaded: &Loaded,
        decisions: &Decisions,
        revisions: &BTreeMap<Revision, Arc<Workload>>,
    ) {
        let fates: BTreeMap<(&Key, u64), Fate> =
            decisions.claims.iter().map(|(key, epoch, fate)| ((key, *epoch), *fate)).collect();
        for row in &loaded.claims {
            let key = &row.key;
            let fate = fates.get(&(key, row.epoch.0)).copied().unwrap_or(Fate::Over);
            if fate == Fate::Over {
                continue;
            }
            let current = self.parts.scripts.load().get(&key.workload).cloned();
            let Some(workload) = revisions.get(&row.revision).cloned().or(current) else {
                error!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, "claim's revision is unknown and its workload is gone; it is left as it is");
                continue;
            };
            let entry = self.entry(key);
            match fate {
                Fate::Keep { unpause: paused } => {
                    let Some(live) = self.adopted_live(loaded, row, &workload) else { continue };
                    entry.set_live(Some(Arc::clone(&live)));
                    if paused {
                        let (inner, live) = (Arc::clone(self), Arc::clone(&live));
                        self.parts.tasks.spawn("unpause", async move {
                            unpause(&inner.parts.runtime, &live.made.container, &*inner.parts.clock).await;
                        });
                    }
                    info!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, "claim adopted");
                }
                Fate::End(ending) => {
                    let Some(live) = self.adopted_live(loaded, row, &workload) else { continue };
                    entry.set_live(Some(Arc::clone(&live)));
                    info!(tenant = %key.tenant, workload = %key.workload, epoch = row.epoch.0, ending = ending.name(), "claim goes to its end");
                    let (inner, key, entry) = (Arc::clone(self), key.clone(), Arc::clone(&entry));
                    // The guard is taken here, so that no request comes before the end has begun.
                    let held = Arc::clone(&entry.guard).lock_owned().await;
                    self.parts.tasks.spawn("end claim", async move {
                        inner.end(&key, &entry, &live, ending).await;
                        drop(held);
                        inner.tidy(&key, entry);
                    });
                }
                Fate::Save => {
                    let unsaved = Arc::new(Unsaved::new(row.clone(), workload, SaveOutcome::Saving));
                    entry.add_unsaved(Arc::clone(&unsaved));
                    self.start_save(key, unsaved);
                }
                Fate::Superseded => {
                    entry.add_unsaved(Arc::new(Unsaved::new(row.clone(), workload, SaveOutcome::Ended)));
                }
                Fate::Conflict => {
                    let reason = "the store has a later epoch".to_owned();
                    let conflict = SaveOutcome::Conflict(reason);
                    entry.add_unsaved(Arc::new(Unsaved::new(row.clone(), workload, conflict)));
                }
                Fate::Over => {}
            }
        }
    }

    fn adopted_live(&self, loaded: &Loaded, row: &ClaimRow, workload: &Arc<Workload>) -> Option<Arc<Live>> {
        let slot = row.slot.clone()?;
        let made = loaded.slots.iter().find(|known| known.slot == slot).map(made)?;
        self.slot_owners.insert(slot.clone(), row.key.clone());
        if let Some(pool) = self.parts.pools.get(&row.key.workload) {
            pool.set_tenant(&slot, row.key.tenant.as_str());
        }
        Some(Arc::new(Live::new(row.clone(), Arc::clone(workload), slot, made, self.now_ms())))
    }
}

fn made(row: &SlotRow) -> Made {
    Made {
        container: row.container.clone().unwrap_or_else(|| ContainerId(row.name.clone())),
        name: row.name.clone(),
        address: row.address.clone(),
        run_as: row.run_as.unwrap_or(crate::model::Owner { uid: 0, gid: 0 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ClaimSource, Epoch, Owner, SnapshotRef, StateSource, TenantId};

    const RUN_AS: Owner = Owner { uid: 1_000, gid: 1_000 };

    fn key() -> Key {
        Key::new(TenantId::new("acme").unwrap(), WorkloadId::new("worker").unwrap())
    }

    fn claim(state: ClaimState) -> ClaimRow {
        ClaimRow {
            key: key(),
            epoch: Epoch(2),
            state,
            slot: Some(SlotId::new("s1").unwrap()),
            revision: Revision("r".to_owned()),
            run_as: RUN_AS,
            source: ClaimSource::Warm,
            state_source: StateSource::Store,
            snapshot: None,
            nonce: None,
            failed: false,
            superseded_by: None,
            term: Some(1),
            opened: true,
            close: false,
            decided_on: None,
            detail: serde_json::Value::Null,
            created_ms: 0,
            active_ms: 0,
        }
    }

    fn tree(cached: bool) -> TreeRow {
        let saved = SnapshotRef {
            number: 1,
            epoch: Epoch(1),
            nonce: "n".to_owned(),
            manifest: "m".to_owned(),
            created_ms: 0,
            files: 1,
            bytes: 1,
        };
        let owner = Some(RUN_AS);
        TreeRow { key: key(), epoch: Epoch(2), cached, saved: Some(saved), owner, opened: Some(1) }
    }

    fn decided(claims: &[ClaimRow], tree: &TreeRow, on_disk: bool, power_lost: bool) -> Decisions {
        let cached = if on_disk { vec![key().digest()] } else { Vec::new() };
        decide(&Found {
            slots: &[],
            claims,
            trees: std::slice::from_ref(tree),
            observed: &[],
            survey: &Survey { slots: Vec::new(), cached },
            current: &BTreeMap::new(),
            power_lost,
        })
    }

    /// A fill from the store has its tree in the cache first. Set aside, the half that
    /// is in the slot could never be taken out of it.
    #[test]
    fn the_tree_of_a_claim_that_is_being_filled_is_no_stray() {
        for state in [ClaimState::Claiming, ClaimState::Releasing] {
            let decisions = decided(&[claim(state)], &tree(false), true, false);
            assert_eq!(decisions.stray_trees, Vec::<String>::new(), "{state:?}");
        }
        assert_eq!(decided(&[], &tree(false), true, false).stray_trees, vec![key().digest()]);
        let closing = ClaimRow { close: true, ..claim(ClaimState::Dirty) };
        assert_eq!(decided(&[closing], &tree(false), true, false).stray_trees, vec![key().digest()]);
    }

    #[test]
    fn only_trees_that_no_claim_needs_are_evicted_or_missed() {
        for state in [ClaimState::Active, ClaimState::Dirty, ClaimState::Conflict] {
            let decisions = decided(&[claim(state)], &tree(true), false, true);
            assert_eq!((decisions.evict, decisions.missing), (Vec::new(), Vec::new()), "{state:?}");
        }
        assert_eq!(decided(&[], &tree(true), true, true).evict, vec![key()]);
        assert_eq!(decided(&[], &tree(true), true, false).evict, Vec::<Key>::new());
        assert_eq!(decided(&[], &tree(true), false, false).missing, vec![key()]);
        // Of a prefetch that did not end, nobody knows what it left.
        let half = TreeRow { owner: None, ..tree(true) };
        assert_eq!(decided(&[], &half, true, false).evict, vec![key()]);
        assert_eq!(decided(&[], &half, false, false).missing, vec![key()]);
        let unsaved = TreeRow { saved: None, ..half };
        assert_eq!(decided(&[], &unsaved, true, true).evict, Vec::<Key>::new(), "the only copy");
    }
}
