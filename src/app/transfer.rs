//! Export and import of a tenant's state, on the store itself.
//!
//! An export only reads, also beside a server. An import writes: it holds the store as
//! the configured server would, so that no server works on it meanwhile; where the store
//! is shared, the chain of records alone keeps them apart, as it does for servers.

use std::{fs::File, path::PathBuf, sync::Arc};

use super::{Error, load_workloads, open_store};
use crate::{
    clock::{Clock as _, SharedClock, SystemClock, random_hex},
    config::{self, Config, StoreLocation},
    disk,
    model::{Key, Owner, TenantId, WorkloadId},
    seal::MasterKey,
    state::{
        Encryption,
        fence::{
            Mode,
            owner::{self, Tenure},
        },
        history::History,
        transfer::{self, Export, Exported, Import, Imported, Source, Watch},
    },
    store::{
        SharedStore,
        s3::{Limits, S3Store},
    },
};

pub use crate::state::transfer::Progress as TransferProgress;

/// Begins the nonce under which an import holds the store.
const HOLD: &str = "import-";

/// Where an import takes a tree from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportFrom {
    /// A directory, or a tar in a file.
    Path(PathBuf),
    /// A tar from standard input.
    Stdin,
    /// Plain objects in a bucket of the configured endpoint.
    Bucket {
        /// The bucket.
        bucket: String,
        /// Without slashes at its ends.
        prefix: String,
    },
    /// The tenant's own plain objects.
    Mirror,
}

/// What is imported, and how.
#[derive(Debug, Clone)]
pub struct Importing {
    /// Whose state.
    pub tenant: TenantId,
    /// Of which workload; the only one there is when left out.
    pub workload: Option<WorkloadId>,
    /// Where from.
    pub from: ImportFrom,
    /// Whose the files are, where the source does not say.
    pub owner: Option<Owner>,
    /// Whether there may be state already.
    pub replace: bool,
    /// Where the tree is put together.
    pub scratch: PathBuf,
}

/// Exports a tenant's snapshot; the newest when none is named.
///
/// # Errors
/// [`Error::Transfer`], [`Error::Unclear`], and those of the configuration.
pub async fn export(
    config: &Config,
    tenant: &TenantId,
    workload: Option<&WorkloadId>,
    snapshot: Option<u64>,
    to: Export,
    watch: &mut Watch<'_>,
) -> Result<Exported, Error> {
    let clock: SharedClock = Arc::new(SystemClock);
    let (store, _) = open_store(config, &clock)?;
    let encryption = encryption(config, &clock, false)?;
    let history = History::new(store, clock, String::new()).with_encryption(encryption);
    let workload = match workload {
        Some(workload) => workload.clone(),
        None => {
            let known = history.workloads_of(tenant).await.map_err(Error::History)?;
            match known.as_slice() {
                [only] => only.clone(),
                [] => return Err(Error::Unclear(format!("the store has no state of {tenant}"))),
                several => {
                    let named: Vec<String> = several.iter().map(ToString::to_string).collect();
                    let named = named.join(", ");
                    return Err(Error::Unclear(format!(
                        "{tenant} has state of several workloads: say --workload, one of {named}"
                    )));
                }
            }
        }
    };
    let key = Key::new(tenant.clone(), workload);
    transfer::export(&history, &key, snapshot, to, watch).await.map_err(carried)
}

/// Imports a tree as a new snapshot of a tenant.
///
/// # Errors
/// [`Error::Owner`] while a server holds the store; [`Error::Transfer`],
/// [`Error::Unclear`], and those of the configuration and the workloads.
pub async fn import(config: &Config, importing: Importing, watch: &mut Watch<'_>) -> Result<Imported, Error> {
    let clock: SharedClock = Arc::new(SystemClock);
    let set = load_workloads(config)?;
    let workload = match &importing.workload {
        Some(id) => set.get(id),
        None => set.only(),
    };
    let Some(workload) = workload else {
        let known: Vec<String> = set.iter().map(|workload| workload.spec.id.to_string()).collect();
        let asked = importing.workload.map_or_else(
            || "there is more than one workload: say --workload".to_owned(),
            |id| format!("there is no workload {id}"),
        );
        return Err(Error::Unclear(format!("{asked}, one of {}", known.join(", "))));
    };
    let (store, _) = open_store(config, &clock)?;
    let source = source(config, importing.from, &clock)?;
    let server = config::instance(config, &config::machine_id());
    let import = Import {
        store: Arc::clone(&store),
        encryption: encryption(config, &clock, config.state_encryption)?,
        clock,
        server: server.clone(),
        key: Key::new(importing.tenant, workload.spec.id.clone()),
        persist: workload.spec.persist.clone(),
        max_bytes: workload.spec.resources.state_max_mb.map(|mb| mb * 1024 * 1024),
        owner: importing.owner,
        replace: importing.replace,
        scratch: importing.scratch,
    };
    let held = hold(&store, config, &server).await?;
    let imported = transfer::import(&import, source, watch).await;
    if let Some((mode, nonce)) = held {
        let now_ms = SystemClock.unix_ms();
        owner::release(&*store, &server, mode, &nonce, now_ms).await.map_err(Error::Owner)?;
    }
    imported.map_err(carried)
}

/// Takes the store for this import; `None`: it is shared, and this server has its place.
async fn hold(store: &SharedStore, config: &Config, server: &str) -> Result<Option<(Mode, String)>, Error> {
    let mode = if config.store_shared { Mode::Shared } else { Mode::Exclusive };
    let records = owner::read(&**store).await.map_err(Error::Owner)?;
    match owner::tenure(&records) {
        Tenure::Shared(all) if mode == Mode::Shared && all.contains_key(server) => return Ok(None),
        // Our own server would be taken for us: it must have ended in order.
        Tenure::Exclusive(owner) if owner.server == server && !owner.nonce.starts_with(HOLD) => {
            return Err(Error::Owner(owner::Error::Elsewhere(vec![owner])));
        }
        Tenure::Shared(all) if mode == Mode::Exclusive && !all.is_empty() => {
            return Err(Error::Owner(owner::Error::Elsewhere(all.into_values().collect())));
        }
        _ => {}
    }
    let nonce = format!("{HOLD}{}", random_hex(&SystemClock, 16));
    owner::take(&**store, server, mode, &nonce, SystemClock.unix_ms()).await.map_err(Error::Owner)?;
    Ok(Some((mode, nonce)))
}

fn source(config: &Config, from: ImportFrom, clock: &SharedClock) -> Result<Source, Error> {
    match from {
        ImportFrom::Path(path) if path.is_dir() => Ok(Source::Directory(path)),
        ImportFrom::Path(path) => {
            let opened = File::open(&path);
            let failed = |error| disk::Error::new("open", path.display().to_string(), error);
            Ok(Source::Archive(Box::new(opened.map_err(|error| carried(failed(error).into()))?)))
        }
        ImportFrom::Stdin => Ok(Source::Archive(Box::new(std::io::stdin()))),
        ImportFrom::Mirror => Ok(Source::Mirror),
        ImportFrom::Bucket { bucket, prefix } => {
            if config.store == (StoreLocation::S3 { bucket: bucket.clone(), prefix: prefix.clone() }) {
                return Err(Error::Unclear(format!(
                    "s3://{bucket}/{prefix} is the store itself, and no tree of files; --mirror imports a tenant's plain \
                     objects"
                )));
            }
            let store = S3Store::connect(&bucket, &prefix, &config.aws, Limits::default(), Arc::clone(clock));
            Ok(Source::Objects(Arc::new(store.map_err(Error::Store)?.of_others())))
        }
    }
}

fn encryption(config: &Config, clock: &SharedClock, seals: bool) -> Result<Encryption, Error> {
    let master = config.master_key_file.as_deref().map(MasterKey::read).transpose();
    let master = master.map_err(Error::MasterKey)?.map(Arc::new);
    Ok(Encryption::new(master, seals, Arc::clone(clock))
        .expect("the configuration was refused without a key"))
}

fn carried(error: transfer::Error) -> Error {
    Error::Transfer(Box::new(error))
}
