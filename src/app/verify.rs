//! Verification of a store without a server: from the configuration alone, and
//! nothing is written.

use std::sync::Arc;

use super::{Error, open_store};
use crate::{
    clock::{SharedClock, SystemClock},
    config::Config,
    model::{Key, TenantId, WorkloadId},
    seal::MasterKey,
    state::{
        Encryption,
        history::{self, History},
    },
};

pub use crate::state::history::verify::{Finding, Progress, Report};

/// What of a store is verified.
#[derive(Debug, Clone)]
pub enum Scope {
    /// Everything.
    All,
    /// A tenant's state, of one workload or of all that the store knows.
    Tenant(TenantId, Option<WorkloadId>),
}

/// Reads back and hashes what the store of this configuration should hold.
///
/// # Errors
/// [`Error::Store`] and [`Error::History`]: the store does not answer.
pub async fn verify(
    config: &Config,
    scope: &Scope,
    watch: &mut (dyn FnMut(Progress) + Send),
) -> Result<Report, Error> {
    let clock: SharedClock = Arc::new(SystemClock);
    let (store, _) = open_store(config, &clock)?;
    let master = config.master_key_file.as_deref().map(MasterKey::read).transpose();
    let master = master.map_err(Error::MasterKey)?.map(Arc::new);
    let encryption = Encryption::new(master, false, Arc::clone(&clock)).expect("nothing is sealed here");
    let history = History::new(store, clock, String::new()).with_encryption(encryption);
    let report = match scope {
        Scope::All => history.verify_all(watch).await,
        Scope::Tenant(tenant, Some(workload)) => {
            history.verify(&[Key::new(tenant.clone(), workload.clone())], watch).await
        }
        Scope::Tenant(tenant, None) => match history.workloads_of(tenant).await {
            Ok(workloads) => {
                let keys: Vec<Key> =
                    workloads.into_iter().map(|workload| Key::new(tenant.clone(), workload)).collect();
                history.verify(&keys, watch).await
            }
            Err(error) => Err(error),
        },
    };
    report.map_err(|error: history::Error| Error::History(error))
}
