//! What scripts can do: `ctx`, its properties and methods, and free functions.
//!
//! Each subject has one file with one `register` function. Deciding hooks get a
//! `DecideCtx`, acting ones an `ActionCtx`; what a hook must not do is not there.

mod data;
mod exec;
mod json;
mod log;
mod output;
mod secrets;
mod state;
mod verdict;

use std::sync::Arc;

use rhai::{Dynamic, FuncRegistration, Module, NativeCallContext, RhaiNativeFunc, Variant};
use serde::Serialize;

pub(super) use self::{
    secrets::SecretText,
    verdict::{Decision, not_allowed},
};
use super::{
    call::{Call, Failure, Outcome},
    hook::HookKind,
};
use crate::model::suggest::closest;

/// One thing that scripts can read or call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Primitive {
    /// Property, method or free function.
    pub kind: PrimitiveKind,
    /// What it belongs to, e.g. `ctx.state`; empty for a free function.
    pub receiver: &'static str,
    /// Its name.
    pub name: &'static str,
    /// How it is written, e.g. `exec(argv) -> #{status, stdout, stderr, truncated}`.
    pub signature: &'static str,
    /// What it does, in a sentence.
    pub doc: &'static str,
    /// How many arguments it takes; more than one number when some may be left out.
    pub parameters: &'static [usize],
    /// For a property that has properties or methods itself: their receiver.
    pub gives: Option<&'static str>,
    /// Whether deciding hooks have it.
    pub decides: bool,
    /// Whether acting hooks have it.
    pub acts: bool,
}

/// What sort of thing a [`Primitive`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PrimitiveKind {
    /// Read without parentheses.
    Property,
    /// Called on its receiver.
    Method,
    /// Called by itself.
    Function,
}

/// The `ctx` of a hook that decides.
#[derive(Clone)]
pub(super) struct DecideCtx(pub(super) Arc<Call>);

/// The `ctx` of a hook that acts.
#[derive(Clone)]
pub(super) struct ActionCtx(pub(super) Arc<Call>);

/// A value that leads to the running call.
pub(super) trait Ctx: Variant + Clone {
    /// Returns the call.
    fn call(&self) -> &Arc<Call>;
}

/// Collects native functions and their descriptions.
pub(super) struct Registry {
    pub(super) module: Module,
    pub(super) primitives: Vec<Primitive>,
}

/// Returns everything that scripts can read or call beside Rhai's own.
pub fn primitives() -> &'static [Primitive] {
    &super::engine::library().primitives
}

/// Registers every subject.
pub(super) fn register() -> Registry {
    let mut registry = Registry { module: Module::new(), primitives: Vec::new() };
    registry.module.set_custom_type::<DecideCtx>("DecideCtx");
    registry.module.set_custom_type::<ActionCtx>("ActionCtx");
    data::register(&mut registry);
    verdict::register(&mut registry);
    exec::register(&mut registry);
    state::register(&mut registry);
    secrets::register(&mut registry);
    output::register(&mut registry);
    log::register(&mut registry);
    json::register(&mut registry);
    registry.module.build_index();
    registry
}

impl Primitive {
    /// Returns whether hooks of a kind have it.
    pub(super) fn is_for(&self, kind: HookKind) -> bool {
        match kind {
            HookKind::Decides => self.decides,
            HookKind::Acts => self.acts,
        }
    }

    /// Describes a property of `receiver` that every hook has.
    const fn property(
        receiver: &'static str,
        name: &'static str,
        signature: &'static str,
        doc: &'static str,
    ) -> Self {
        let kind = PrimitiveKind::Property;
        Self { kind, receiver, name, signature, doc, parameters: &[], gives: None, decides: true, acts: true }
    }

    /// Describes a method of `receiver` that every hook has.
    const fn method(
        receiver: &'static str,
        name: &'static str,
        parameters: &'static [usize],
        signature: &'static str,
        doc: &'static str,
    ) -> Self {
        let kind = PrimitiveKind::Method;
        Self { kind, receiver, name, signature, doc, parameters, gives: None, decides: true, acts: true }
    }

    /// Says what the property gives.
    const fn gives(mut self, receiver: &'static str) -> Self {
        self.gives = Some(receiver);
        self
    }

    /// Keeps it from deciding hooks.
    const fn acts_only(mut self) -> Self {
        self.decides = false;
        self
    }

    /// Keeps it from acting hooks.
    const fn decides_only(mut self) -> Self {
        self.acts = false;
        self
    }
}

// === impl Registry ===

impl Registry {
    /// Describes something; its functions are defined beside.
    fn describe(&mut self, primitive: Primitive) {
        self.primitives.push(primitive);
    }

    /// Defines a function or method.
    fn define<A: 'static, const N: usize, const X: bool, R: Variant + Clone, const F: bool>(
        &mut self,
        name: &str,
        function: impl RhaiNativeFunc<A, N, X, R, F> + Send + Sync + 'static,
    ) {
        FuncRegistration::new(name).in_global_namespace().set_into_module(&mut self.module, function);
    }

    /// Defines a property of one type.
    fn getter<T: Variant + Clone, R: Variant + Clone>(
        &mut self,
        name: &str,
        get: impl Fn(&T) -> R + Send + Sync + 'static,
    ) {
        FuncRegistration::new_getter(name)
            .in_global_namespace()
            .set_into_module(&mut self.module, move |value: &mut T| get(value));
    }

    /// Defines a property of both kinds of `ctx`.
    fn getter_of_ctx<R: Variant + Clone>(&mut self, name: &str, get: fn(&Arc<Call>) -> R) {
        self.getter(name, move |ctx: &DecideCtx| get(ctx.call()));
        self.getter(name, move |ctx: &ActionCtx| get(ctx.call()));
    }
}

impl Ctx for DecideCtx {
    fn call(&self) -> &Arc<Call> {
        &self.0
    }
}

impl Ctx for ActionCtx {
    fn call(&self) -> &Arc<Call> {
        &self.0
    }
}

/// Names a value's type as the scripts' authors know it.
pub(super) fn type_of(value: &Dynamic) -> &'static str {
    if value.is_unit() {
        "()"
    } else if value.is_string() {
        "text"
    } else if value.is_int() {
        "a whole number"
    } else if value.is_float() {
        "a number"
    } else if value.is_bool() {
        "true or false"
    } else if value.is_array() {
        "a list"
    } else if value.is_map() {
        "a map"
    } else if value.is_blob() {
        "bytes"
    } else if value.is_fnptr() {
        "a function"
    } else if value.is::<SecretText>() {
        "a secret"
    } else if value.is::<Decision>() {
        "a verdict"
    } else {
        "a value of the server's"
    }
}

/// Takes text that holds no replaced secret.
///
/// # Errors
/// `invalid`, naming `what`, when it is no such text.
fn text(context: &NativeCallContext<'_>, call: &Call, what: &str, value: Dynamic) -> Outcome<String> {
    let value = value.flatten();
    if value.is::<SecretText>() {
        return Err(Failure::invalid(format!("{what} may not be a secret")).throw(context));
    }
    let found = type_of(&value);
    let Ok(text) = value.into_string() else {
        return Err(Failure::invalid(format!("{what} must be text, not {found}")).throw(context));
    };
    call.unmasked(context, &text)?;
    if text.contains('\0') {
        return Err(Failure::invalid(format!("{what} holds a zero byte")).throw(context));
    }
    Ok(text)
}

/// Refuses keys of a map that are not among `allowed`.
fn known_keys(context: &NativeCallContext<'_>, what: &str, map: &rhai::Map, allowed: &[&str]) -> Outcome<()> {
    if let Some(key) = map.keys().find(|key| !allowed.contains(&key.as_str())) {
        let hint = closest(key, allowed.iter().copied())
            .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        let message = format!("{what} has no `{key}`{hint} (allowed: {})", allowed.join(", "));
        return Err(Failure::invalid(message).throw(context));
    }
    Ok(())
}

/// Takes a JSON value out of a script's.
///
/// # Errors
/// `invalid`, naming `what` and the part that is no data.
fn data(context: &NativeCallContext<'_>, what: &str, value: Dynamic) -> Outcome<serde_json::Value> {
    super::convert::to_json(value).map_err(|misfits| {
        let parts: Vec<_> = misfits
            .iter()
            .map(|misfit| match misfit.path.as_str() {
                "" => format!("may not be {}", misfit.what),
                path => format!("may not hold {} (`{path}`)", misfit.what),
            })
            .collect();
        Failure::invalid(format!("{what} {}", parts.join(", and "))).throw(context)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_primitive_is_described_once_and_in_words() {
        let primitives = primitives();
        for (index, primitive) in primitives.iter().enumerate() {
            let same =
                |other: &&Primitive| other.receiver == primitive.receiver && other.name == primitive.name;
            assert!(!primitives[..index].iter().any(|other| same(&other)), "{primitive:?} twice");
            assert!(primitive.doc.ends_with('.'), "{primitive:?}");
            assert!(primitive.signature.starts_with(primitive.name), "{primitive:?}");
            assert!(primitive.decides || primitive.acts);
        }
    }
}
