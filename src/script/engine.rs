//! The script engine: its limits, and the library that all engines share.
//!
//! An engine is made anew for each call (a few microseconds) because the deadline
//! and the target of `print` belong to an engine, not to a call. What costs
//! (the library's modules) is shared.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock},
    time::Duration,
};

use rhai::{
    Dynamic, Engine, EvalAltResult, Module, ModuleResolver, OptimizationLevel, Position, Shared,
    packages::{
        ArithmeticPackage, BasicArrayPackage, BasicBlobPackage, BasicFnPackage, BasicIteratorPackage,
        BasicMapPackage, BasicMathPackage, BasicStringPackage, BitFieldPackage, LogicPackage,
        MoreStringPackage, Package,
    },
};

use super::{ctx, guard::Guard};

/// Function calls inside each other. Low, since a stack that overflows ends the process.
pub(super) const MAX_CALL_LEVELS: usize = 32;
/// Expressions inside each other, at the top level and in functions.
const MAX_EXPR_DEPTHS: (usize, usize) = (64, 64);
/// Operations as the engine counts them; [`Guard`] counts all of them.
const MAX_OPERATIONS: u64 = 50_000_000;
/// The longest text, in bytes.
pub(super) const MAX_STRING_BYTES: usize = 1024 * 1024;
/// Entries of an array or bytes of a blob.
const MAX_ARRAY: usize = 10_000;
/// Entries of a map.
const MAX_MAP: usize = 10_000;
/// Variables at one time.
const MAX_VARIABLES: usize = 512;
/// Functions in one file.
const MAX_FUNCTIONS: usize = 512;
/// Modules that one call imports.
const MAX_MODULES: usize = 64;
/// The stack of every thread on which scripts are parsed or run. Recursion to the
/// limits above needs between 8 and 16 MiB of it in an unoptimised build (a test
/// goes there); what is not used is address space only.
pub(super) const STACK_BYTES: usize = 32 * 1024 * 1024;
/// How long a file may take to come up: its constants, and `workload()`.
pub(super) const LOAD_DEADLINE: Duration = Duration::from_secs(1);

rhai::def_package! {
    /// Rhai's standard library without what a hook must not have: the core
    /// functions (`sleep`, `exit`, tags) and the clock.
    StandardPackage(module) :
        ArithmeticPackage,
        BasicStringPackage,
        BasicIteratorPackage,
        BasicFnPackage,
        BitFieldPackage,
        LogicPackage,
        BasicMathPackage,
        BasicArrayPackage,
        BasicBlobPackage,
        BasicMapPackage,
        MoreStringPackage
    {}
}

/// What every engine shares.
pub(super) struct Library {
    standard: Shared<Module>,
    host: Shared<Module>,
    /// The methods and properties of `ctx`, for the lint and the reference.
    pub(super) primitives: Vec<ctx::Primitive>,
    /// The names of all native functions.
    pub(super) names: BTreeSet<String>,
}

static LIBRARY: LazyLock<Library> = LazyLock::new(|| {
    let standard = StandardPackage::new().as_shared_module();
    let registry = ctx::register();
    let mut names: BTreeSet<String> = names_of(&standard).chain(names_of(&registry.module)).collect();
    names.extend(KEYWORD_FUNCTIONS.iter().map(|name| (*name).to_owned()));
    Library { standard, host: registry.module.into(), primitives: registry.primitives, names }
});

/// Functions that are words of the language.
const KEYWORD_FUNCTIONS: &[&str] =
    &["print", "debug", "type_of", "call", "curry", "Fn", "is_def_var", "is_def_fn", "is_shared"];

/// Gives modules by the path that scripts import; knows no files.
#[derive(Clone, Default)]
pub(super) struct Modules(pub(super) Arc<BTreeMap<String, Shared<Module>>>);

/// Returns what every engine shares.
pub(super) fn library() -> &'static Library {
    &LIBRARY
}

/// Makes an engine with every limit set, for compiling and for running.
pub(super) fn new(guard: &Arc<Guard>, modules: Modules) -> Engine {
    let mut engine = Engine::new_raw();
    // The lint and the places of a spec's fields need the tree as it was written.
    engine.set_optimization_level(OptimizationLevel::None);
    engine.set_strict_variables(true);
    engine.set_max_call_levels(MAX_CALL_LEVELS);
    engine.set_max_expr_depths(MAX_EXPR_DEPTHS.0, MAX_EXPR_DEPTHS.1);
    engine.set_max_operations(MAX_OPERATIONS);
    engine.set_max_string_size(MAX_STRING_BYTES);
    engine.set_max_array_size(MAX_ARRAY);
    engine.set_max_map_size(MAX_MAP);
    engine.set_max_variables(MAX_VARIABLES);
    engine.set_max_functions(MAX_FUNCTIONS);
    engine.set_max_modules(MAX_MODULES);
    engine.disable_symbol("eval");
    engine.set_module_resolver(modules);
    engine.register_global_module(LIBRARY.standard.clone());
    engine.register_global_module(LIBRARY.host.clone());
    // An engine without these writes to standard output.
    engine.on_print(|_| {});
    engine.on_debug(|_, _, _| {});
    let guard = Arc::clone(guard);
    engine.on_progress(move |_| guard.tick().map(Dynamic::from));
    engine
}

/// Returns the names of a module's functions.
fn names_of(module: &Module) -> impl Iterator<Item = String> + '_ {
    module
        .gen_fn_signatures_with_mapper(Into::into)
        .filter_map(|signature| signature.split_once('(').map(|(name, _)| name.to_owned()))
}

// === impl Modules ===

impl ModuleResolver for Modules {
    fn resolve(
        &self,
        _engine: &Engine,
        _source: Option<&str>,
        path: &str,
        position: Position,
    ) -> Result<Shared<Module>, Box<EvalAltResult>> {
        self.0
            .get(path)
            .cloned()
            .ok_or_else(|| EvalAltResult::ErrorModuleNotFound(path.to_owned(), position).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_has_what_hooks_need_and_not_what_they_must_not() {
        for name in ["push", "split", "keys", "contains", "min", "parse_json", "exec", "reject", "print"] {
            assert!(library().names.contains(name), "{name} is there");
        }
        for name in ["sleep", "timestamp", "exit", "eval"] {
            assert!(!library().names.contains(name), "{name} is not there");
        }
    }
}
