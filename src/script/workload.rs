//! One loaded workload: its spec, its compiled script, and the text it came from.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use rhai::AST;
use serde::{Deserialize, Serialize};

use super::{
    compile::{self, Unit},
    diagnostic::Diagnostic,
    engine::Modules,
    fault::Files,
    hook::Hook,
    source::SourceFile,
};
use crate::model::{Revision, SpecHash, WorkloadId, WorkloadSpec};

/// The version of the journaled form.
const FORMAT: u32 = 1;

/// One workload as it was loaded; never changes, so that a claim that holds it
/// keeps the revision it began with.
pub struct Workload {
    /// Its checked spec.
    pub spec: Arc<WorkloadSpec>,
    /// Selects which slots fit.
    pub spec_hash: SpecHash,
    /// Stands for the spec and every script behind it.
    pub revision: Revision,
    compiled: Compiled,
    bundle: Bundle,
}

/// The script, ready to run.
pub(super) struct Compiled {
    /// By hook, what to evaluate.
    pub(super) entries: BTreeMap<Hook, AST>,
    pub(super) modules: Modules,
    /// What errors may point into.
    pub(super) files: Files,
    /// The workload's own script.
    pub(super) unit: Unit,
}

/// The texts that a revision consists of.
#[derive(Clone, Serialize, Deserialize)]
struct Bundle {
    /// The workload's own file.
    workload: SourceFile,
    /// The shared scripts it imports, also through others, by import path.
    scripts: BTreeMap<String, SourceFile>,
}

/// What the journal keeps of a revision.
#[derive(Serialize, Deserialize)]
struct Journaled {
    format: u32,
    revision: Revision,
    spec: WorkloadSpec,
    #[serde(flatten)]
    bundle: Bundle,
}

// === impl Workload ===

impl Workload {
    /// Puts a workload together from parts that have been checked.
    pub(super) fn assemble(
        spec: WorkloadSpec,
        revision: Option<Revision>,
        unit: Unit,
        scripts: BTreeMap<String, SourceFile>,
        modules: Modules,
    ) -> Self {
        let bundle = Bundle { workload: unit.file.clone(), scripts };
        let revision = revision.unwrap_or_else(|| revision_of(&spec, &bundle));
        let has = |hook: &Hook| unit.functions().any(|function| function == (hook.name(), 1));
        let entries: BTreeMap<_, _> =
            Hook::ALL.into_iter().filter(has).map(|hook| (hook, unit.entry(hook.name()))).collect();
        let files = std::iter::once(&bundle.workload)
            .chain(bundle.scripts.values())
            .map(|file| (file.name.clone(), file.clone()))
            .collect();
        let compiled = Compiled { entries, modules, files, unit };
        Self { spec_hash: spec.hash(), spec: Arc::new(spec), revision, compiled, bundle }
    }

    /// Returns its id.
    pub fn id(&self) -> &WorkloadId {
        &self.spec.id
    }

    /// Returns whether its script has a hook.
    pub fn has(&self, hook: Hook) -> bool {
        self.compiled.entries.contains_key(&hook)
    }

    /// Returns the hooks its script has.
    pub fn hooks(&self) -> impl Iterator<Item = Hook> {
        self.compiled.entries.keys().copied()
    }

    /// Returns how long a hook may take.
    pub fn deadline(&self, hook: Hook) -> Duration {
        self.spec
            .timeouts
            .get(hook.name())
            .map_or_else(|| hook.default_deadline(), |ms| Duration::from_millis(*ms))
    }

    pub(super) fn compiled(&self) -> &Compiled {
        &self.compiled
    }

    /// Returns all of it as JSON, for claims that outlive a restart.
    pub fn to_json(&self) -> String {
        let journaled = Journaled {
            format: FORMAT,
            revision: self.revision.clone(),
            spec: WorkloadSpec::clone(&self.spec),
            bundle: self.bundle.clone(),
        };
        serde_json::to_string(&journaled).expect("a spec and texts have only text keys")
    }

    /// Builds the workload that [`Workload::to_json`] wrote. Its spec is taken as it
    /// is, not asked from the script again: the server's defaults may have changed.
    ///
    /// # Errors
    /// Diagnostics when it is not such JSON, or its scripts do not compile any more.
    pub fn from_json(json: &str) -> Result<Arc<Self>, Vec<Diagnostic>> {
        let refuse = |message: String| vec![Diagnostic::whole("journaled revision", message)];
        let journaled: Journaled =
            serde_json::from_str(json).map_err(|error| refuse(format!("cannot be read: {error}")))?;
        if journaled.format != FORMAT {
            return Err(refuse(format!("has format {}; this server reads {FORMAT}", journaled.format)));
        }
        compile::on_big_stack(move || {
            let mut errors = Vec::new();
            let Bundle { workload, scripts: texts } = journaled.bundle;
            let scripts = compile::scripts(&texts, &mut errors);
            let unit = compile::parse(&workload).map_err(|error| vec![*error])?;
            if errors.is_empty() {
                let modules = scripts.modules;
                Ok(Arc::new(Self::assemble(journaled.spec, Some(journaled.revision), unit, texts, modules)))
            } else {
                Err(errors)
            }
        })
        .map_err(refuse)?
    }
}

impl fmt::Debug for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workload")
            .field("id", &self.spec.id)
            .field("spec_hash", &self.spec_hash)
            .field("revision", &self.revision)
            .field("hooks", &self.compiled.entries.keys())
            .finish_non_exhaustive()
    }
}

/// Hashes a spec with its scripts: what they say and how they are imported, not
/// where the files lay.
fn revision_of(spec: &WorkloadSpec, bundle: &Bundle) -> Revision {
    let mut hasher = blake3::Hasher::new();
    let spec = serde_json::to_vec(spec).expect("a spec has only text keys");
    let scripts = bundle.scripts.iter().flat_map(|(path, file)| [path.as_bytes(), file.text.as_bytes()]);
    for part in [spec.as_slice(), bundle.workload.text.as_bytes()].into_iter().chain(scripts) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Revision(hex::encode(&hasher.finalize().as_bytes()[..8]))
}
