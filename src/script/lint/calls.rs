//! Every call and every use of `ctx`, checked against what there is.

use std::collections::{BTreeMap, BTreeSet};

use rhai::{ASTNode, Expr, FnCallExpr, Position, Stmt};

use super::Role;
use crate::{
    model::suggest::closest,
    script::{
        compile::{Scripts, Unit},
        ctx::{Primitive, PrimitiveKind, not_allowed, primitives},
        diagnostic::{Diagnostic, Place},
        engine, fault,
        hook::{Hook, HookKind},
    },
};

/// The name by which helper functions get the `ctx` of the hook that calls them.
const CTX: &str = "ctx";

/// Where the walk is.
struct Scope<'u> {
    unit: &'u Unit,
    /// The parameter that is a `ctx`.
    ctx: Option<&'u str>,
    /// The hook, when the function is one.
    hook: Option<Hook>,
}

/// What the file knows of names.
struct Names<'u> {
    /// Its functions, with the numbers of parameters they take.
    functions: BTreeMap<&'u str, BTreeSet<usize>>,
    /// Its imports, with the functions of the scripts behind them.
    imports: BTreeMap<&'u str, BTreeMap<&'u str, BTreeSet<usize>>>,
    /// Variables, keys of maps and properties: each may hold a function.
    values: BTreeSet<String>,
}

/// Checks all functions of a script.
pub(super) fn lint(unit: &Unit, role: Role, scripts: &Scripts, errors: &mut Vec<Diagnostic>) {
    let names = names(unit, scripts);
    for function in unit.ast.iter_fn_def() {
        let name = function.name.as_str();
        let hook = Hook::from_name(name).filter(|_| role == Role::Workload && function.params.len() == 1);
        let parameters = function.params.iter().map(|parameter| parameter.as_str());
        let ctx = match hook {
            Some(_) => parameters.clone().next(),
            None => parameters.clone().find(|parameter| *parameter == CTX),
        };
        let scope =
            Scope { unit, ctx: ctx.filter(|ctx| !is_shadowed(unit, name, function.params.len(), ctx)), hook };
        let mut checked = BTreeSet::new();
        unit.walk_function(name, function.params.len(), &mut |nodes: &[ASTNode]| {
            node(&scope, &names, nodes, &mut checked, errors);
            true
        });
    }
    // Initialisers of constants run too.
    let scope = Scope { unit, ctx: None, hook: None };
    let mut checked = BTreeSet::new();
    for statement in unit.ast.statements() {
        statement.walk(&mut Vec::new(), &mut |nodes: &[ASTNode]| {
            node(&scope, &names, nodes, &mut checked, errors);
            true
        });
    }
}

/// Returns whether a function makes a variable of that name.
fn is_shadowed(unit: &Unit, name: &str, parameters: usize, variable: &str) -> bool {
    let mut is_shadowed = false;
    unit.walk_function(name, parameters, &mut |nodes: &[ASTNode]| {
        is_shadowed |= match nodes.last() {
            Some(ASTNode::Stmt(Stmt::Var(var, ..))) => var.0.name == variable,
            Some(ASTNode::Stmt(Stmt::For(x, ..))) => {
                x.0.name == variable || x.1.as_ref().is_some_and(|counter| counter.name == variable)
            }
            _ => false,
        };
        true
    });
    is_shadowed
}

fn names<'u>(unit: &'u Unit, scripts: &'u Scripts) -> Names<'u> {
    fn grouped<'u>(all: impl Iterator<Item = (&'u str, usize)>) -> BTreeMap<&'u str, BTreeSet<usize>> {
        let mut functions: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
        for (name, parameters) in all {
            functions.entry(name).or_default().insert(parameters);
        }
        functions
    }
    let imports = unit.imports.iter().filter_map(|import| {
        let imported = scripts.units.get(&import.path)?;
        Some((import.alias.as_str(), grouped(imported.public_functions())))
    });
    let mut values = BTreeSet::new();
    unit.ast.walk(&mut |nodes: &[ASTNode]| {
        match nodes.last() {
            Some(ASTNode::Stmt(Stmt::Var(var, ..))) => drop(values.insert(var.0.name.to_string())),
            Some(ASTNode::Expr(Expr::Map(map, _))) => {
                values.extend(map.0.iter().map(|(key, _)| key.name.to_string()));
            }
            Some(ASTNode::Expr(Expr::Property(property, _))) => drop(values.insert(property.2.to_string())),
            Some(ASTNode::Expr(Expr::Variable(variable, ..))) => drop(values.insert(variable.1.to_string())),
            _ => {}
        }
        true
    });
    Names { functions: grouped(unit.functions()), imports: imports.collect(), values }
}

/// Checks one node; `checked` holds the places of methods that a chain from `ctx` led to.
fn node(
    scope: &Scope<'_>,
    names: &Names<'_>,
    nodes: &[ASTNode],
    checked: &mut BTreeSet<Place>,
    errors: &mut Vec<Diagnostic>,
) {
    match nodes.last() {
        Some(ASTNode::Stmt(Stmt::Assignment(assignment))) => {
            if let Expr::Dot(chain, ..) | Expr::Index(chain, ..) = &assignment.1.lhs
                && scope.is_ctx(&chain.lhs)
            {
                let help = "ctx is there to read; use ctx.set_output(key, value) to answer the claimer";
                errors.push(
                    scope
                        .at(assignment.1.lhs.start_position(), "assigns to ctx, which has no effect")
                        .help(help),
                );
            }
        }
        Some(ASTNode::Expr(Expr::Dot(chain, ..))) if scope.is_ctx(&chain.lhs) => {
            follow(scope, &chain.rhs, "ctx", checked, errors);
        }
        Some(ASTNode::Expr(Expr::MethodCall(call, position))) => {
            let is_checked = Place::of(*position).is_some_and(|place| checked.contains(&place));
            if !is_checked && !names.has_anywhere(&call.name) {
                let message = format!("unknown method `{}`", call.name);
                errors.push(scope.at(*position, message).maybe_help(names.suggest(&call.name)));
            }
        }
        Some(ASTNode::Expr(Expr::FnCall(call, position)) | ASTNode::Stmt(Stmt::FnCall(call, position))) => {
            function(scope, names, call, *position, errors);
        }
        _ => {}
    }
}

/// Follows a chain from `ctx` as far as what it leads to is known.
fn follow(
    scope: &Scope<'_>,
    rhs: &Expr,
    receiver: &'static str,
    checked: &mut BTreeSet<Place>,
    errors: &mut Vec<Diagnostic>,
) {
    let (link, rest) = match rhs {
        Expr::Dot(chain, ..) => (&chain.lhs, Some(&chain.rhs)),
        Expr::Index(chain, ..) => (&chain.lhs, None),
        last => (last, None),
    };
    match link {
        Expr::Property(property, position) => {
            let Some(found) =
                member(scope, receiver, PrimitiveKind::Property, &property.2, *position, errors)
            else {
                return;
            };
            if let (Some(gives), Some(rest)) = (found.gives, rest) {
                follow(scope, rest, gives, checked, errors);
            }
        }
        Expr::MethodCall(call, position) => {
            checked.extend(Place::of(*position));
            let Some(found) = member(scope, receiver, PrimitiveKind::Method, &call.name, *position, errors)
            else {
                return;
            };
            if !found.parameters.contains(&call.args.len()) {
                let message = format!(
                    "`{receiver}.{}` takes {}, not {}",
                    found.name,
                    count(found.parameters),
                    call.args.len()
                );
                errors.push(scope.at(*position, message).help(format!("{receiver}.{}", found.signature)));
            }
            if let Some(hook) = scope.hook
                && receiver == "ctx"
                && Hook::ALL.iter().any(|hook| hook.verdicts().contains(&found.name))
                && !hook.verdicts().contains(&found.name)
            {
                errors.push(scope.at(*position, not_allowed(hook, found.name)));
            }
        }
        _ => {}
    }
}

/// Finds a property or method, or reports that there is none.
fn member(
    scope: &Scope<'_>,
    receiver: &'static str,
    kind: PrimitiveKind,
    name: &str,
    position: Position,
    errors: &mut Vec<Diagnostic>,
) -> Option<&'static Primitive> {
    let members = || primitives().iter().filter(|primitive| primitive.receiver == receiver);
    if let Some(found) = members().find(|primitive| primitive.name == name) {
        if found.kind != kind {
            let (is, how) = match found.kind {
                PrimitiveKind::Property => ("a property", format!("{receiver}.{name}")),
                _ => ("a method", format!("{receiver}.{}", found.signature)),
            };
            errors.push(scope.at(position, format!("`{receiver}.{name}` is {is}")).help(how));
            return None;
        }
        if let Some(hook) = scope.hook.filter(|hook| !found.is_for(hook.kind())) {
            // A verdict has words of its own.
            if Hook::ALL.iter().any(|hook| hook.verdicts().contains(&name)) {
                errors.push(scope.at(position, not_allowed(hook, found.name)));
            } else {
                let which = match hook.kind() {
                    HookKind::Decides => "decides from data and cannot act",
                    HookKind::Acts => "acts and does not decide",
                };
                errors.push(scope.at(position, format!("{hook} has no `{receiver}.{name}`: it {which}")));
            }
            return None;
        }
        return Some(found);
    }
    let allowed: Vec<_> = members()
        .filter(|primitive| scope.hook.is_none_or(|hook| primitive.is_for(hook.kind())))
        .map(|primitive| primitive.name)
        .collect();
    let help = match closest(name, allowed.iter().copied()) {
        Some(near) => format!("did you mean `{receiver}.{near}`?"),
        None => format!("{receiver} has {}", allowed.join(", ")),
    };
    let what = if kind == PrimitiveKind::Method { "method" } else { "property" };
    errors.push(scope.at(position, format!("unknown {what} `{receiver}.{name}`")).help(help));
    None
}

/// Checks a call that is no method's.
fn function(
    scope: &Scope<'_>,
    names: &Names<'_>,
    call: &FnCallExpr,
    position: Position,
    errors: &mut Vec<Diagnostic>,
) {
    let name = call.name.as_str();
    if call.is_operator_call() || !is_identifier(name) {
        return;
    }
    if call.is_qualified() {
        let alias = call.namespace.root();
        // The engine itself knows which aliases there are; a script that was not
        // found has been reported at its import.
        let Some(functions) = names.imports.get(alias) else { return };
        match functions.get(name) {
            Some(parameters) if parameters.contains(&call.args.len()) => {}
            Some(parameters) => {
                let parameters: Vec<_> = parameters.iter().copied().collect();
                let message =
                    format!("`{alias}::{name}` takes {}, not {}", count(&parameters), call.args.len());
                errors.push(scope.at(position, message));
            }
            None => {
                let help = closest(name, functions.keys().copied()).map_or_else(
                    || format!("it has {}", functions.keys().copied().collect::<Vec<_>>().join(", ")),
                    |near| format!("did you mean `{alias}::{near}`?"),
                );
                errors.push(scope.at(position, format!("unknown function `{alias}::{name}`")).help(help));
            }
        }
        return;
    }
    if let Some(parameters) = names.functions.get(name)
        && !engine::library().names.contains(name)
    {
        if !parameters.contains(&call.args.len()) {
            let parameters: Vec<_> = parameters.iter().copied().collect();
            let message = format!("`{name}` takes {}, not {}", count(&parameters), call.args.len());
            errors.push(scope.at(position, message));
        }
        return;
    }
    if !engine::library().names.contains(name) && !names.values.contains(name) {
        errors.push(scope.at(position, format!("unknown function `{name}`")).maybe_help(names.suggest(name)));
    }
}

/// Puts numbers of parameters into words.
fn count(parameters: &[usize]) -> String {
    match parameters {
        [0] => "no argument".to_owned(),
        [1] => "1 argument".to_owned(),
        [n] => format!("{n} arguments"),
        more => {
            let numbers: Vec<_> = more.iter().map(ToString::to_string).collect();
            format!("{} arguments", numbers.join(" or "))
        }
    }
}

fn is_identifier(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

// === impl Scope ===

impl Scope<'_> {
    fn at(&self, position: Position, message: impl Into<String>) -> Diagnostic {
        Diagnostic::at(&self.unit.file, Place::of(position), message)
    }

    fn is_ctx(&self, expr: &Expr) -> bool {
        matches!(expr, Expr::Variable(variable, ..) if Some(variable.1.as_str()) == self.ctx && variable.2.is_empty())
    }
}

// === impl Names ===

impl Names<'_> {
    /// Returns whether any value could have that method.
    fn has_anywhere(&self, name: &str) -> bool {
        engine::library().names.contains(name)
            || self.functions.contains_key(name)
            || self.values.contains(name)
    }

    fn suggest(&self, name: &str) -> Option<String> {
        match closest(name, self.functions.keys().copied()) {
            Some(near) => Some(format!("did you mean `{near}`?")),
            None => fault::suggest(name),
        }
    }
}
