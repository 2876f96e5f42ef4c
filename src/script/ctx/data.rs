//! What a hook can read: the tenant, the workload, the claim, the container, the time.

use std::sync::Arc;

use rhai::Dynamic;

use super::{ActionCtx, Ctx, DecideCtx, Primitive, Registry};
use crate::script::{ContainerFacts, call::Call, convert::from_object};

/// `ctx.tenant`
#[derive(Clone)]
struct Tenant(Arc<Call>);

/// `ctx.workload`
#[derive(Clone)]
struct Workload(Arc<Call>);

/// `ctx.claim`; made only for a call that has one.
#[derive(Clone)]
struct Claim(Arc<Call>);

/// `ctx.container`; made only for a call that has one.
#[derive(Clone)]
struct Container(Arc<Call>);

/// Registers what can be read.
pub(super) fn register(registry: &mut Registry) {
    registry.module.set_custom_type::<Tenant>("Tenant");
    registry.module.set_custom_type::<Workload>("Workload");
    registry.module.set_custom_type::<Claim>("Claim");
    registry.module.set_custom_type::<Container>("Container");
    of_ctx(registry);
    of_tenant_and_workload(registry);
    of_claim(registry);
    of_container(registry);
}

fn of_ctx(registry: &mut Registry) {
    for (name, doc) in [
        ("tenant", "Whose claim it is."),
        ("workload", "What kind of container it is."),
        ("claim", "The claim; `()` before it has an epoch."),
        ("container", "The container; `()` before there is one."),
    ] {
        let gives = match name {
            "tenant" => "ctx.tenant",
            "workload" => "ctx.workload",
            "claim" => "ctx.claim",
            _ => "ctx.container",
        };
        registry.describe(Primitive::property("ctx", name, name, doc).gives(gives));
    }
    registry.getter_of_ctx("tenant", |call| Tenant(Arc::clone(call)));
    registry.getter_of_ctx("workload", |call| Workload(Arc::clone(call)));
    registry.getter_of_ctx("claim", |call| match call.facts.claim {
        Some(_) => Dynamic::from(Claim(Arc::clone(call))),
        None => Dynamic::UNIT,
    });
    registry.getter_of_ctx("container", |call| match call.facts.container {
        Some(_) => Dynamic::from(Container(Arc::clone(call))),
        None => Dynamic::UNIT,
    });
    registry.describe(Primitive::method(
        "ctx",
        "now",
        &[0],
        "now() -> int",
        "Milliseconds since the Unix epoch.",
    ));
    registry.define("now", |ctx: &mut DecideCtx| now(ctx));
    registry.define("now", |ctx: &mut ActionCtx| now(ctx));
}

fn now(ctx: &impl Ctx) -> i64 {
    i64::try_from(ctx.call().now_ms()).unwrap_or(i64::MAX)
}

fn of_tenant_and_workload(registry: &mut Registry) {
    registry.describe(Primitive::property("ctx.tenant", "id", "id", "The tenant's id."));
    registry.getter("id", |tenant: &Tenant| tenant.0.facts.tenant.id.clone());
    registry.describe(Primitive::property(
        "ctx.tenant",
        "metadata",
        "metadata",
        "The tenant's metadata overlaid by the claim's, as a map; an absent key is `()`.",
    ));
    registry.getter("metadata", |tenant: &Tenant| from_object(&tenant.0.facts.tenant.metadata));
    registry.describe(Primitive::property("ctx.workload", "id", "id", "The workload's id."));
    registry.getter("id", |workload: &Workload| workload.0.facts.workload.id.clone());
    registry.describe(Primitive::property("ctx.workload", "name", "name", "The workload's name for people."));
    registry.getter("name", |workload: &Workload| workload.0.facts.workload.name.clone());
}

fn of_claim(registry: &mut Registry) {
    registry.describe(Primitive::property(
        "ctx.claim",
        "epoch",
        "epoch",
        "The claim's number, rising for ever.",
    ));
    registry.getter("epoch", |claim: &Claim| {
        let epoch = claim.0.facts.claim.as_ref().map_or(0, |claim| claim.epoch);
        i64::try_from(epoch).unwrap_or(i64::MAX)
    });
    registry.describe(Primitive::property(
        "ctx.claim",
        "source",
        "source",
        "Where the slot came from: `warm`, `cold`, ….",
    ));
    registry.getter("source", |claim: &Claim| {
        claim.0.facts.claim.as_ref().map_or_else(String::new, |claim| claim.source.clone())
    });
    registry.describe(Primitive::property(
        "ctx.claim",
        "state",
        "state",
        "Where the state came from: `none`, `cache` or `store`.",
    ));
    registry.getter("state", |claim: &Claim| {
        claim.0.facts.claim.as_ref().map_or_else(String::new, |claim| claim.state.clone())
    });
}

fn of_container(registry: &mut Registry) {
    let mut text = |name, doc, get: fn(&ContainerFacts) -> String| {
        registry.describe(Primitive::property("ctx.container", name, name, doc));
        registry.getter(name, move |container: &Container| {
            container.0.facts.container.as_ref().map_or_else(String::new, get)
        });
    };
    text("id", "The engine's id of the container.", |facts| facts.id.clone());
    text("name", "The container's name.", |facts| facts.name.clone());
    text("slot", "The slot it is the container of.", |facts| facts.slot.clone());
    registry.describe(Primitive::property(
        "ctx.container",
        "address",
        "address",
        "Its address on its network; `()` when it has none.",
    ));
    registry.getter("address", |container: &Container| {
        let facts = container.0.facts.container.as_ref();
        facts.and_then(|facts| facts.address.clone()).map_or(Dynamic::UNIT, Dynamic::from)
    });
}

#[cfg(test)]
mod tests {
    use crate::script::{Hook, testing::Trial};

    #[test]
    fn a_hook_reads_what_it_is_told() {
        Trial::of(Hook::OnClaim).asserts(
            r#"
            check([
                ctx.tenant.id == "acme",
                ctx.tenant.metadata.plan == "pro",
                ctx.tenant.metadata.limits.seats == 3,
                ctx.tenant.metadata.absent == (),
                ctx.workload.id == "w",
                ctx.workload.name == "W",
                ctx.claim.epoch == 7,
                ctx.claim.source == "warm",
                ctx.claim.state == "cache",
                ctx.container.id == "c1",
                ctx.container.name == "boilerhouse-x-s1",
                ctx.container.slot == "s1",
                ctx.container.address == (),
                ctx.now() == 1234,
            ]);
            "#,
        );
    }

    #[test]
    fn before_there_is_a_claim_it_is_unit() {
        Trial::of(Hook::BeforeClaim).asserts("check([ctx.claim == (), ctx.container == (), ctx.now() > 0]);");
    }
}
