//! From text to trees, and from imports to modules. Nothing here reads a file.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rhai::{
    AST, ASTFlags, ASTNode, Engine, Expr, FnAccess, Module, ParseErrorType, Position, Scope, Shared, Stmt,
    StmtBlock, Token,
};
use tokio_util::sync::CancellationToken;

use super::{
    diagnostic::{Diagnostic, Place},
    engine::{self, LOAD_DEADLINE, Modules, STACK_BYTES},
    fault::{self, Files},
    guard::Guard,
    source::SourceFile,
};
use crate::model::suggest::closest;

/// The variable by which an entry gets its argument.
pub(super) const ARGUMENT: &str = "argument_of_the_entry";

/// One parsed script.
pub(super) struct Unit {
    pub(super) file: SourceFile,
    pub(super) ast: AST,
    pub(super) imports: Vec<Import>,
}

/// One `import` at the top of a script.
pub(super) struct Import {
    /// What is imported, e.g. `lib/motd`.
    pub(super) path: String,
    /// Its name in the script.
    pub(super) alias: String,
    pub(super) place: Option<Place>,
}

/// The shared scripts, parsed and made into modules.
#[derive(Default)]
pub(super) struct Scripts {
    pub(super) units: BTreeMap<String, Unit>,
    pub(super) modules: Modules,
}

/// Runs work on a thread whose stack holds any script that the limits let through.
///
/// # Errors
/// Words that say why there is no result: no thread could be had, or it panicked.
pub(super) fn on_big_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("script-load".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| format!("no thread to load scripts on: {error}"))?
            .join()
            .map_err(|_| "the loader of scripts panicked".to_owned())
    })
}

/// Makes an engine for loading.
pub(super) fn engine(modules: Modules) -> Engine {
    engine::new(&Arc::new(Guard::new(LOAD_DEADLINE, CancellationToken::new())), modules)
}

/// Lets `debug`, a word of the language, be the name of a method: `ctx.log.debug(…)`.
#[expect(deprecated, reason = "rhai's mark for an API that may change; a test from Rhai holds it")]
fn allow_debug_method(engine: &mut Engine) {
    let after_dot = AtomicBool::new(false);
    engine.on_parse_token(move |token, _, _| {
        let is_dot = matches!(token, Token::Period | Token::Elvis);
        match token {
            Token::Reserved(word) if after_dot.swap(is_dot, Ordering::Relaxed) && *word == "debug" => {
                Token::Identifier(word)
            }
            token => {
                after_dot.store(is_dot, Ordering::Relaxed);
                token
            }
        }
    });
}

/// Parses one script.
///
/// # Errors
/// The first thing that is not Rhai.
pub(super) fn parse(file: &SourceFile) -> Result<Unit, Box<Diagnostic>> {
    let mut engine = engine(Modules::default());
    allow_debug_method(&mut engine);
    let mut ast = engine.compile(&file.text).map_err(|error| {
        let help = match error.err_type() {
            ParseErrorType::Reserved(word) if word == "sync" => {
                Some("`sync` is a word of the language; the field is `persist`".to_owned())
            }
            ParseErrorType::Reserved(word) if word == "eval" => Some("there is no eval".to_owned()),
            ParseErrorType::Reserved(word) => {
                Some(format!("`{word}` is a word of the language; as a key of a map write \"{word}\""))
            }
            _ => None,
        };
        let message = fault::lower(&error.err_type().to_string());
        Box::new(Diagnostic::at(file, Place::of(error.position()), message).maybe_help(help))
    })?;
    ast.set_source(file.name.as_str());
    let imports = ast.statements().iter().filter_map(import).collect();
    Ok(Unit { file: file.clone(), ast, imports })
}

fn import(statement: &Stmt) -> Option<Import> {
    let Stmt::Import(import, position) = statement else { return None };
    let (Expr::StringConstant(path, path_position), alias) = (&import.0, &import.1) else { return None };
    let place = Place::of(*path_position).or_else(|| Place::of(*position));
    Some(Import { path: path.to_string(), alias: alias.name.to_string(), place })
}

/// Parses every shared script and makes the modules, imported ones first.
pub(super) fn scripts(sources: &BTreeMap<String, SourceFile>, errors: &mut Vec<Diagnostic>) -> Scripts {
    let mut scripts = Scripts::default();
    for (path, file) in sources {
        match parse(file) {
            Ok(unit) => drop(scripts.units.insert(path.clone(), unit)),
            Err(error) => errors.push(*error),
        }
    }
    let files: Files = sources.values().map(|file| (file.name.clone(), file.clone())).collect();
    let mut modules = BTreeMap::new();
    for path in scripts.units.keys() {
        load(path, &scripts.units, sources, &files, &mut modules, &mut Vec::new(), errors);
    }
    let loaded = modules.into_iter().filter_map(|(path, module)| Some((path, module?))).collect();
    scripts.modules = Modules(Arc::new(loaded));
    scripts
}

/// Makes the module of `path` after those it imports; `above` are the scripts
/// that are being loaded now. A module that cannot be made is remembered as `None`.
fn load(
    path: &str,
    units: &BTreeMap<String, Unit>,
    sources: &BTreeMap<String, SourceFile>,
    files: &Files,
    modules: &mut BTreeMap<String, Option<Shared<Module>>>,
    above: &mut Vec<String>,
    errors: &mut Vec<Diagnostic>,
) {
    let Some(unit) = units.get(path).filter(|_| !modules.contains_key(path)) else { return };
    above.push(path.to_owned());
    let mut is_whole = true;
    for import in &unit.imports {
        if let Some(start) = above.iter().position(|other| *other == import.path) {
            let cycle = [&above[start..], std::slice::from_ref(&import.path)].concat().join(" → ");
            errors.push(Diagnostic::at(
                &unit.file,
                import.place,
                format!("scripts import each other: {cycle}"),
            ));
            is_whole = false;
            continue;
        }
        is_whole &= is_known(unit, import, sources, errors);
        load(&import.path, units, sources, files, modules, above, errors);
        is_whole &= modules.get(&import.path).is_some_and(Option::is_some);
    }
    above.pop();
    let module = is_whole.then(|| {
        let ready =
            modules.iter().filter_map(|(path, module)| Some((path.clone(), module.clone()?))).collect();
        Module::eval_ast_as_new(Scope::new(), &unit.ast, &engine(Modules(Arc::new(ready))))
    });
    let module = match module {
        Some(Ok(module)) => Some(module.into()),
        Some(Err(error)) => {
            errors.push(fault::explain(&error, files, &unit.file.name).1);
            None
        }
        None => None,
    };
    modules.insert(path.to_owned(), module);
}

/// Reports an import of a script that is not there.
pub(super) fn is_known(
    unit: &Unit,
    import: &Import,
    sources: &BTreeMap<String, SourceFile>,
    errors: &mut Vec<Diagnostic>,
) -> bool {
    if sources.contains_key(&import.path) {
        return true;
    }
    let plain = import.path.trim_start_matches("./").trim_start_matches("scripts/").trim_end_matches(".rhai");
    let help = if sources.contains_key(plain) {
        Some(format!("paths are below the scripts folder and have no extension: \"{plain}\""))
    } else if let Some(near) = closest(&import.path, sources.keys().map(String::as_str)) {
        Some(format!("did you mean \"{near}\"?"))
    } else if sources.is_empty() {
        Some("the scripts folder has no scripts".to_owned())
    } else {
        Some(format!("there are {}", sources.keys().cloned().collect::<Vec<_>>().join(", ")))
    };
    let message = format!("there is no script \"{}\"", import.path);
    errors.push(Diagnostic::at(&unit.file, import.place, message).maybe_help(help));
    false
}

/// Returns the paths of all scripts that `unit` imports, also through others.
pub(super) fn reachable(unit: &Unit, units: &BTreeMap<String, Unit>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open: Vec<&Unit> = vec![unit];
    while let Some(unit) = open.pop() {
        for import in &unit.imports {
            if found.insert(import.path.clone()) {
                open.extend(units.get(&import.path));
            }
        }
    }
    found
}

// === impl Unit ===

impl Unit {
    /// Returns where a function begins: at its `fn`.
    ///
    /// The tree knows only where its body begins; the `fn` is the last one before
    /// it that is followed by the function's name.
    pub(super) fn function_place(&self, name: &str) -> Option<Place> {
        let function = self.ast.iter_fn_def().find(|function| function.name.as_str() == name)?;
        let body = Place::of(function.body.start_position())?;
        let mut candidates = Vec::new();
        for (index, line) in self.file.text.lines().enumerate().take(body.line) {
            let end = if index + 1 == body.line {
                line.char_indices().nth(body.column.saturating_sub(1)).map_or(line.len(), |(at, _)| at)
            } else {
                line.len()
            };
            let line = &line[..end];
            for (at, _) in line.match_indices("fn") {
                let after = line[at + 2..].trim_start();
                if line[at + 2..].len() > after.len()
                    && after
                        .strip_prefix(name)
                        .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
                {
                    candidates.push(Place { line: index + 1, column: line[..at].chars().count() + 1 });
                }
            }
        }
        candidates.pop().or(Some(body))
    }

    /// Walks the body of one function.
    pub(super) fn walk_function(
        &self,
        name: &str,
        parameters: usize,
        on_node: &mut dyn FnMut(&[ASTNode]) -> bool,
    ) {
        // (`clone_functions_only_filtered` of rhai 1.27 does not filter.)
        let mut only = self.ast.clone_functions_only();
        only.retain_functions(|_, _, other, count| other == name && count == parameters);
        only.walk(on_node);
    }

    /// Returns a tree that, evaluated, does what a call of the function would do, with
    /// the variable [`ARGUMENT`] of the scope as its only argument if it takes one.
    ///
    /// A call would lose places: the engine gives errors that end a script (a deadline,
    /// a value too large) the place of the call on their way out of a function, and the
    /// outermost call has none. Here the function's body is the outermost code.
    pub(super) fn entry(&self, name: &str) -> AST {
        let function = self.ast.iter_fn_def().find(|function| function.name.as_str() == name);
        let parameter = function.and_then(|function| function.params.first());
        let mut body = Vec::new();
        self.walk_function(name, usize::from(parameter.is_some()), &mut |nodes: &[ASTNode]| {
            if let [ASTNode::Stmt(statement)] = nodes {
                body.push(Stmt::clone(statement));
            }
            true
        });
        let mut statements = self.ast.statements().to_vec();
        if let Some(parameter) = parameter {
            // By a parser that lets it name what is not there yet.
            let argument = Engine::new_raw().compile(format!("let {parameter} = {ARGUMENT};"));
            statements.extend(argument.iter().flat_map(|argument| argument.statements().iter().cloned()));
        }
        // A block, so that a `const` in it is no global one.
        let block = StmtBlock::new(body, Position::NONE, Position::NONE);
        statements.push(Stmt::Block(Box::new(block)));
        AST::new_with_source(statements, self.ast.shared_lib().clone(), self.file.name.as_str())
    }

    /// Returns the names and numbers of parameters of its functions.
    pub(super) fn functions(&self) -> impl Iterator<Item = (&str, usize)> {
        self.ast.iter_fn_def().map(|function| (function.name.as_str(), function.params.len()))
    }

    /// Returns the same of those that other scripts can call.
    pub(super) fn public_functions(&self) -> impl Iterator<Item = (&str, usize)> {
        self.ast
            .iter_fn_def()
            .filter(|function| function.access == FnAccess::Public)
            .map(|function| (function.name.as_str(), function.params.len()))
    }

    /// Returns its top-level statements that are neither `const` nor `import`.
    pub(super) fn stray_statements(&self) -> impl Iterator<Item = &Stmt> {
        self.ast.statements().iter().filter(|statement| match statement {
            Stmt::Noop(_) | Stmt::Import(..) => false,
            Stmt::Var(_, flags, _) => !flags.contains(ASTFlags::CONSTANT),
            _ => true,
        })
    }
}
