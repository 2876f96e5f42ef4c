//! What the engine would find only when a hook runs, found when it is loaded.
//!
//! Rhai reports neither unknown functions nor missing imports when it parses.
//! The lint walks the tree: the shape of the file and its hooks here, every call
//! in [`calls`]. It says only what is certain: a value of unknown type may have
//! any method that exists anywhere.

mod calls;

use rhai::{ASTNode, Expr, Stmt};

use super::{
    compile::{Scripts, Unit},
    ctx::{PrimitiveKind, primitives},
    diagnostic::{Diagnostic, Place},
    hook::Hook,
};
use crate::model::{
    spec::{HOOKS, LATER_HOOKS},
    suggest::closest,
};

/// What a script is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A workload: has `workload()` and hooks.
    Workload,
    /// A shared script, imported by others.
    Shared,
}

/// The prefixes that make a function's name a hook's.
const HOOK_PREFIXES: &[&str] = &["on_", "before_", "after_"];

/// Reports everything that is certainly wrong with a script.
pub(super) fn lint(unit: &Unit, role: Role, scripts: &Scripts, errors: &mut Vec<Diagnostic>) {
    top_level(unit, errors);
    if role == Role::Workload {
        hooks(unit, errors);
    }
    shadowing(unit, errors);
    calls::lint(unit, role, scripts, errors);
}

/// A script's function is called before a method of the same name and number of
/// arguments: `fn write(ctx, text)` would be what `ctx.state.write(path, text)` calls.
fn shadowing(unit: &Unit, errors: &mut Vec<Diagnostic>) {
    for (name, parameters) in unit.functions() {
        let method = primitives().iter().find(|primitive| {
            primitive.kind == PrimitiveKind::Method
                && primitive.name == name
                && primitive.parameters.contains(&parameters)
        });
        if let Some(method) = method {
            let message = format!("`{name}` would be called in place of `{}.{name}`", method.receiver);
            let help = "give the function another name";
            errors.push(Diagnostic::at(&unit.file, unit.function_place(name), message).help(help));
        }
    }
}

/// Only `const`, `import` and functions: anything else would run at every hook.
fn top_level(unit: &Unit, errors: &mut Vec<Diagnostic>) {
    for statement in unit.stray_statements() {
        let message = "only const, import and functions are allowed at the top of a file";
        let help = match statement {
            Stmt::Var(..) => "write `const`; a hook sees it as `global::NAME`",
            _ => "move it into a function",
        };
        errors.push(Diagnostic::at(&unit.file, Place::of(statement.position()), message).help(help));
    }
    for statement in unit.ast.statements() {
        let Stmt::Import(import, position) = statement else { continue };
        let at = |message: &str| Diagnostic::at(&unit.file, Place::of(*position), message);
        if !matches!(import.0, Expr::StringConstant(..)) {
            errors.push(
                at("the path of an import must be a plain text").help("e.g. import \"lib/motd\" as motd;"),
            );
        } else if import.1.name.is_empty() {
            errors.push(at("an import needs a name").help("e.g. import \"lib/motd\" as motd;"));
        }
    }
    for (name, parameters) in unit.functions() {
        unit.walk_function(name, parameters, &mut |nodes: &[ASTNode]| {
            if let Some(ASTNode::Stmt(Stmt::Import(_, position))) = nodes.last() {
                let message = "imports stand at the top of a file";
                errors.push(Diagnostic::at(&unit.file, Place::of(*position), message));
            }
            true
        });
    }
}

/// `workload()` is there, and every function that is named like a hook is one.
fn hooks(unit: &Unit, errors: &mut Vec<Diagnostic>) {
    let mut has_workload = false;
    let mut functions: Vec<_> = unit.functions().filter(|(name, _)| !name.starts_with("anon$")).collect();
    functions.sort_unstable();
    for (name, parameters) in functions {
        let at = |message: String| Diagnostic::at(&unit.file, unit.function_place(name), message);
        if name == "workload" {
            has_workload = true;
            if parameters != 0 {
                errors.push(
                    at(format!("`workload` takes no parameters, not {parameters}"))
                        .help("fn workload() { #{ … } }"),
                );
            }
        } else if Hook::from_name(name).is_some() {
            if parameters != 1 {
                let message = format!("`{name}` takes one parameter, not {parameters}");
                errors.push(at(message).help(format!("fn {name}(ctx) {{ … }}")));
            }
        } else if LATER_HOOKS.contains(&name) {
            let help = format!("the hooks are {}", HOOKS.join(", "));
            errors.push(at(format!("the hook `{name}` is not supported yet")).help(help));
        } else if HOOK_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            let all = HOOKS.iter().chain(LATER_HOOKS).copied();
            let help = match closest(name, all) {
                Some(near) => format!("did you mean `{near}`?"),
                None => {
                    format!("the hooks are {}; give a function of your own another name", HOOKS.join(", "))
                }
            };
            errors.push(at(format!("`{name}` is no hook")).help(help));
        }
    }
    if !has_workload {
        let near = closest("workload", unit.functions().map(|(name, _)| name));
        let help = match near {
            Some(near) => format!("did you mean it by `{near}`?"),
            None => "fn workload() { #{ id: \"…\", image: \"…\" } }".to_owned(),
        };
        errors.push(Diagnostic::whole(unit.file.name.clone(), "has no `fn workload()`").help(help));
    }
}
