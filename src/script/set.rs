//! All workloads at one time, loaded whole or not at all.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rhai::{Dynamic, Scope};

use super::{
    builtin,
    compile::{self, Scripts, Unit},
    convert,
    diagnostic::{Diagnostic, Place},
    fault::{self, Files},
    hook::Hook,
    lint::{self, Role},
    locate,
    source::{SourceFile, Sources},
    workload::Workload,
};
use crate::model::{
    Violation, WorkloadId, WorkloadSpec,
    spec::{self, SpecDefaults},
};

/// What a set takes from the server's configuration.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// What specs leave out.
    pub defaults: SpecDefaults,
    /// `BOILERHOUSE_DEFAULT_IMAGE`: the image of the built-in workload, which is
    /// there when there is no other.
    pub default_image: String,
}

/// All workloads, immutable; reload builds another.
#[derive(Debug, Default)]
pub struct Set {
    workloads: BTreeMap<WorkloadId, Arc<Workload>>,
    warnings: Vec<Diagnostic>,
}

// === impl LoadOptions ===

impl Default for LoadOptions {
    /// The original README's defaults.
    fn default() -> Self {
        Self { defaults: SpecDefaults { min_idle: 5, max: 50 }, default_image: "alpine:latest".to_owned() }
    }
}

// === impl Set ===

impl Set {
    /// Loads every workload and shared script. Without a workload, the set holds
    /// the built-in one, `default`.
    ///
    /// Takes about a millisecond per hundred lines, on a thread of its own that the
    /// caller waits for: call it where blocking is allowed.
    ///
    /// # Errors
    /// Every error of every file, in the order of files and lines; never empty.
    pub fn load(sources: &Sources, options: &LoadOptions) -> Result<Self, Vec<Diagnostic>> {
        let (set, errors) = Self::load_all(sources, options);
        if errors.is_empty() { Ok(set) } else { Err(errors) }
    }

    /// Loads what can be loaded; returns it beside the errors.
    pub(super) fn load_all(sources: &Sources, options: &LoadOptions) -> (Self, Vec<Diagnostic>) {
        let loaded = compile::on_big_stack(|| {
            let mut errors = Vec::new();
            let mut set = Self::default();
            let scripts = compile::scripts(&sources.scripts, &mut errors);
            for unit in scripts.units.values() {
                lint::lint(unit, Role::Shared, &scripts, &mut errors);
            }
            let built_in =
                BTreeMap::from([(builtin::ID.to_owned(), builtin::source(&options.default_image))]);
            let files = if sources.workloads.is_empty() { &built_in } else { &sources.workloads };
            for (stem, file) in files {
                let loader = Loader { scripts: &scripts, sources: &sources.scripts, options };
                if let Some(workload) = loader.load(stem, file, &mut errors, &mut set.warnings) {
                    set.workloads.insert(workload.id().clone(), Arc::new(workload));
                }
            }
            errors.sort_by_key(Diagnostic::order);
            // The lint and the first run can find the same mistake.
            errors.dedup_by(|later, first| {
                later.order() == first.order()
                    && (later.message.ends_with(&first.message) || first.message.ends_with(&later.message))
            });
            (set, errors)
        });
        loaded.unwrap_or_else(|message| (Self::default(), vec![Diagnostic::whole("scripts", message)]))
    }

    /// Loads one workload past the lint, so that tests can run what it refuses.
    #[cfg(test)]
    pub(super) fn load_unlinted(sources: &Sources) -> Arc<Workload> {
        let (stem, file) = sources.workloads.first_key_value().unwrap();
        let mut errors = Vec::new();
        let scripts = compile::scripts(&sources.scripts, &mut errors);
        let unit = compile::parse(file).unwrap_or_else(|error| panic!("{error}"));
        let options = LoadOptions::default();
        let loader = Loader { scripts: &scripts, sources: &sources.scripts, options: &options };
        let value = loader.call(&unit).unwrap_or_else(|error| panic!("{error}"));
        let spec = loader.spec(&unit, stem, value, &mut errors);
        assert!(errors.is_empty(), "{errors:?}");
        Arc::new(Workload::assemble(spec.unwrap(), None, unit, sources.scripts.clone(), scripts.modules))
    }

    /// Returns a workload.
    pub fn get(&self, id: &WorkloadId) -> Option<&Arc<Workload>> {
        self.workloads.get(id)
    }

    /// Returns the only workload there is; `None` when there are more.
    pub fn only(&self) -> Option<&Arc<Workload>> {
        let mut all = self.workloads.values();
        all.next().filter(|_| all.next().is_none())
    }

    /// Returns every workload, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Returns how many workloads there are.
    pub fn len(&self) -> usize {
        self.workloads.len()
    }

    /// Returns whether there is no workload, which a loaded set never is.
    pub fn is_empty(&self) -> bool {
        self.workloads.is_empty()
    }

    /// Returns what is allowed in these workloads and yet worth a second look.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.warnings
    }
}

/// Loads one workload.
struct Loader<'s> {
    scripts: &'s Scripts,
    sources: &'s BTreeMap<String, SourceFile>,
    options: &'s LoadOptions,
}

impl Loader<'_> {
    /// Goes as far as it can, so that all errors are found in one run.
    fn load(
        &self,
        stem: &str,
        file: &SourceFile,
        errors: &mut Vec<Diagnostic>,
        warnings: &mut Vec<Diagnostic>,
    ) -> Option<Workload> {
        let before = errors.len();
        let unit = compile::parse(file).map_err(|error| errors.push(*error)).ok()?;
        lint::lint(&unit, Role::Workload, self.scripts, errors);
        let mut is_whole = true;
        for import in &unit.imports {
            is_whole &= compile::is_known(&unit, import, self.sources, errors)
                && self.scripts.modules.0.contains_key(&import.path);
        }
        let has_workload = unit.functions().any(|function| function == ("workload", 0));
        if !is_whole || !has_workload {
            return None;
        }
        let value = self.call(&unit).map_err(|error| errors.push(*error)).ok()?;
        let spec = self.spec(&unit, stem, value, errors)?;
        if errors.len() > before {
            return None;
        }
        warnings.extend(spec.warnings().into_iter().map(|warning| {
            let message = format!("{}: {}", warning.path, warning.message);
            Diagnostic::at(&unit.file, field_place(&unit, &warning.path), message)
                .field(warning.path)
                .warning()
        }));
        let scripts = compile::reachable(&unit, &self.scripts.units)
            .into_iter()
            .filter_map(|path| self.sources.get(&path).map(|file| (path, file.clone())))
            .collect();
        Some(Workload::assemble(spec, None, unit, scripts, self.scripts.modules.clone()))
    }

    /// Calls `workload()`, without `ctx` and within the loading deadline.
    fn call(&self, unit: &Unit) -> Result<Dynamic, Box<Diagnostic>> {
        let engine = compile::engine(self.scripts.modules.clone());
        engine.eval_ast_with_scope(&mut Scope::new(), &unit.entry("workload")).map_err(|error| {
            let files: Files = self
                .sources
                .values()
                .chain([&unit.file])
                .map(|file| (file.name.clone(), file.clone()))
                .collect();
            let mut diagnostic = fault::explain(&error, &files, &unit.file.name).1;
            diagnostic.message = format!("workload() failed: {}", diagnostic.message);
            Box::new(diagnostic)
        })
    }

    /// Makes the spec of what `workload()` returned.
    fn spec(
        &self,
        unit: &Unit,
        stem: &str,
        value: Dynamic,
        errors: &mut Vec<Diagnostic>,
    ) -> Option<WorkloadSpec> {
        if !value.is_map() {
            let message = format!("workload() must return a map, not {}", value.type_name());
            errors.push(Diagnostic::at(&unit.file, unit.function_place("workload"), message));
            return None;
        }
        let json = convert::to_json(value).map_err(|misfits| {
            errors.extend(misfits.into_iter().map(|misfit| {
                let problem = format!("may not be {}", misfit.what);
                violation(unit, Violation { path: misfit.path, problem, allowed: "data".to_owned() })
            }));
        });
        let spec = spec::parse(&json.ok()?, &self.options.defaults).map_err(|violations| {
            errors.extend(violations.into_iter().map(|found| violation(unit, found)));
        });
        let spec = spec.ok()?;
        let mut violate = |path: String, problem: String, allowed: String| {
            errors.push(violation(unit, Violation { path, problem, allowed }));
        };
        if spec.id.as_str() != stem {
            let problem = format!("\"{}\" is not the name of the file", spec.id);
            violate("id".to_owned(), problem, format!("\"{stem}\", or rename the file to {}.rhai", spec.id));
        }
        let hooks: BTreeSet<_> = unit.functions().map(|(name, _)| name).collect();
        for name in spec.timeouts.keys().filter(|name| !hooks.contains(name.as_str())) {
            let own: Vec<_> =
                Hook::ALL.iter().map(|hook| hook.name()).filter(|name| hooks.contains(name)).collect();
            let allowed = if own.is_empty() { "none: it has no hook".to_owned() } else { own.join(", ") };
            violate(format!("timeouts.{name}"), format!("this workload has no hook `{name}`"), allowed);
        }
        Some(spec)
    }
}

/// Points a violation at its field.
fn violation(unit: &Unit, violation: Violation) -> Diagnostic {
    let Violation { path, problem, allowed } = violation;
    let message = if path.is_empty() { problem } else { format!("{path}: {problem}") };
    let help = (!allowed.is_empty()).then(|| format!("allowed: {allowed}"));
    Diagnostic::at(&unit.file, field_place(unit, &path), message).field(path).maybe_help(help)
}

/// Returns the place of a field's key, else of `fn workload`.
fn field_place(unit: &Unit, path: &str) -> Option<Place> {
    locate::field(unit, path).or_else(|| unit.function_place("workload"))
}
