//! The beginning and the silent end of a claim, as the store knows them.

use std::sync::Arc;

use tracing::{info, warn};

use super::{
    Error, Inner, RETRY_AFTER_MS, STORE_WAIT,
    claim::Located,
    registry::{Entry, Live, Unsaved},
};
use crate::{
    crash_point,
    journal::ClaimRow,
    model::{Epoch, Key, StateSource},
    script::Workload,
    state::{
        self, Close, Fill, FillFrom, Head, Open,
        fence::{Admission, Local, Mode, admit},
    },
};

/// What `open` says beside the claim.
#[derive(Debug, Clone)]
pub(super) struct Opening {
    /// The newest record's number when the claim was decided.
    on_top_of: u64,
    /// The attempt that wrote the newest tree then.
    tree: Option<String>,
    /// The attempt to save this node's tree that may end meanwhile.
    saving: Option<String>,
}

// === impl Inner ===

impl Inner {
    /// Returns whether claims of a key are served without asking the store: it was opened
    /// under this term, and nobody else can have it.
    pub(super) fn is_opened(&self, key: &Key, term: u64) -> bool {
        self.ownership.mode == Mode::Exclusive
            && self.trees.get(key).is_some_and(|tree| tree.opened == Some(term))
    }

    /// Asks the store whether a claim may begin, and with which tree (P1, P3).
    pub(super) async fn locate_in_store(
        &self,
        key: &Key,
        workload: &Workload,
        entry: &Entry,
    ) -> Result<Located, Error> {
        let head = self.ask_head(key).await?;
        let known = self.trees.get(key).map(|tree| tree.clone());
        let unsaved = entry.unsaved().into_iter().rev().map(|unsaved| unsaved.row()).find(|row| !row.close);
        let local = match (&unsaved, &known) {
            (Some(row), _) => Local::Unsaved(row.epoch, row.nonce.clone().unwrap_or_default()),
            (None, Some(tree)) if tree.cached => match &tree.saved {
                Some(snapshot) => Local::Saved(snapshot.nonce.clone()),
                None => Local::Unsaved(tree.epoch, String::new()),
            },
            (None, _) => Local::Nothing,
        };
        let is_void = self.is_void(head.as_ref()).await?;
        let last = known.as_ref().map_or(Epoch(0), |tree| tree.epoch);
        let link = head.as_ref().map(|head| &head.link);
        let server = &self.parts.instance;
        let (epoch, from_here) = match admit(link, server, self.ownership.mode, last, &local, is_void) {
            Admission::Admitted { epoch, from_here } => (epoch, from_here),
            Admission::Elsewhere { server, .. } => {
                let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
                return Err(Error::ClaimedElsewhere { tenant, workload, server });
            }
            // It may be saved, and another server have gone on from it, before this one heard.
            Admission::Conflict(_) if unsaved.is_some() && self.finish_owed(key, entry).await => {
                return Box::pin(self.locate_in_store(key, workload, entry)).await;
            }
            Admission::Conflict(newest) => {
                let (tenant, workload) = (key.tenant.clone(), key.workload.clone());
                let reason =
                    format!("this node has a tree that is not saved, and the store is at epoch {newest}");
                return Err(Error::StateConflict { tenant, workload, reason });
            }
        };
        let is_gone = match &known {
            Some(tree) if tree.saved.is_some() => head.as_ref().is_none_or(|head| head.snapshot.is_none()),
            Some(tree) => tree.opened.is_some() && head.is_none(),
            None => false,
        };
        if is_gone {
            let reason = "the store has nothing of the tenant any more, and it had".to_owned();
            return Err(Error::StateDamaged { reason });
        }
        let opening = Opening {
            on_top_of: head.as_ref().map_or(0, |head| head.number),
            tree: head.as_ref().and_then(|head| head.link.tree.clone()),
            saving: unsaved.and_then(|row| row.nonce),
        };
        let located = |from, source, snapshot, previous_owner| Located {
            from,
            source,
            snapshot,
            epoch: Epoch(epoch.0 - 1),
            previous_owner,
            opening: Some(opening),
        };
        if workload.spec.volumes.state.is_none() {
            return Ok(located(FillFrom::Empty, StateSource::None, None, None));
        }
        if let Some(tree) = known.filter(|tree| tree.cached) {
            if from_here {
                return Ok(located(FillFrom::Cache, StateSource::Cache, tree.saved, tree.owner));
            }
            info!(tenant = %key.tenant, workload = %key.workload, "cached tree is not the newest one any more; the store's is taken");
            self.parts.files.discard(key).await.map_err(|error| self.state_error(key, &error))?;
            self.forget_cached(key).await;
        }
        Ok(match head.and_then(|head| head.snapshot) {
            Some(snapshot) => {
                located(FillFrom::Snapshot(snapshot.clone()), StateSource::Store, Some(snapshot), None)
            }
            None => located(FillFrom::Empty, StateSource::None, None, None),
        })
    }

    /// Asks the store for the newest record of a key.
    pub(super) async fn ask_head(&self, key: &Key) -> Result<Option<Head>, Error> {
        let unavailable = |reason| Error::StoreUnavailable { reason, retry_after_ms: RETRY_AFTER_MS };
        let asked = tokio::time::timeout(STORE_WAIT, self.parts.files.head(key)).await;
        asked
            .map_err(|_| unavailable(format!("no answer within {} s", STORE_WAIT.as_secs())))?
            .map_err(|error| self.state_error(key, &error))
    }

    /// Returns whether the claim that a record calls open, if it does, cannot live: alone on
    /// its store, this server is the only one whose claims do.
    pub(super) async fn is_void(&self, head: Option<&Head>) -> Result<bool, Error> {
        let link = head.map(|head| &head.link);
        let Some((server, term)) = link.and_then(|link| Some((&link.holder.as_ref()?.0, link.term))) else {
            return Ok(true);
        };
        if self.ownership.mode == Mode::Exclusive {
            return Ok(true);
        }
        self.ownership.is_void(server, term).await.map_err(|error| {
            let reason = super::answer::chain(&error);
            Error::StoreUnavailable { reason, retry_after_ms: RETRY_AFTER_MS }
        })
    }

    /// Writes that a claim began, while what it needs comes from the store. Nothing of the
    /// claim may run before.
    pub(super) async fn open_claim(
        &self,
        key: &Key,
        live: &Live,
        opening: &Opening,
        fill: &Fill,
    ) -> Result<u64, Error> {
        let mut row = live.row();
        let open = Open {
            key: key.clone(),
            epoch: row.epoch,
            nonce: row.nonce.clone().unwrap_or_default(),
            author: self.ownership.author(row.term),
            on_top_of: opening.on_top_of,
            tree: opening.tree.clone(),
            saving: opening.saving.clone(),
        };
        crash_point!(self.parts.crash, "claim.opening");
        let (opened, fetched) = tokio::join!(
            tokio::time::timeout(STORE_WAIT, self.parts.files.open(&open)),
            self.parts.files.fetch(fill)
        );
        match opened {
            Ok(Ok(())) => {}
            Ok(Err(state::Error::Fenced { .. })) => {
                warn!(tenant = %key.tenant, workload = %key.workload, "another server was faster to claim");
                return Err(Error::Busy { retry_after_ms: RETRY_AFTER_MS });
            }
            Ok(Err(error)) => return Err(self.state_error(key, &error)),
            Err(_) => {
                let reason = format!("no answer within {} s", STORE_WAIT.as_secs());
                return Err(Error::StoreUnavailable { reason, retry_after_ms: RETRY_AFTER_MS });
            }
        }
        row.opened = true;
        live.set_row(row);
        crash_point!(self.parts.crash, "claim.opened");
        fetched.map_err(|error| self.state_error(key, &error))
    }

    /// Returns whether the end of a claim has to be written although nothing is saved: its
    /// `open` is there, or may be, or land late.
    pub(super) fn needs_close(row: &ClaimRow) -> bool {
        row.nonce.is_some() || row.opened
    }

    /// Goes on with the end of a claim that left nothing to save.
    pub(super) async fn close_claim(&self, key: &Key, unsaved: &Unsaved) -> Result<(), state::Error> {
        let row = unsaved.row();
        let close = Close {
            key: key.clone(),
            epoch: row.epoch,
            nonce: row.nonce.unwrap_or_default(),
            author: self.ownership.author(row.term),
            has_chain: row.opened,
        };
        self.parts.files.close(&close).await
    }

    /// Notes that a key was opened under the term of its claim.
    pub(super) fn note_opened(&self, key: &Key, live: &Arc<Live>) -> Option<crate::journal::TreeRow> {
        let row = live.row();
        if !row.opened {
            return None;
        }
        let mut tree = self.trees.get_mut(key)?;
        tree.opened = row.term;
        Some(tree.clone())
    }
}
