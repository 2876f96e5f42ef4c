//! The containers and images of the fake engine: the rules, without time and faults.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use tokio::sync::broadcast;

use super::{FakeImage, KILLED, TERMINATED};
use crate::{
    model::{
        ContainerId, Owner,
        spec::{Network, PullPolicy},
    },
    runtime::{ContainerStatus, Created, Error, Event, EventKind, Labels, Observed, plan::ContainerPlan},
};

/// How many events a slow subscriber may be behind before its stream ends.
const EVENTS: usize = 4_096;

/// Signals that the engine knows, without `SIG`.
const SIGNALS: [&str; 16] = [
    "HUP", "INT", "QUIT", "ABRT", "KILL", "USR1", "USR2", "PIPE", "ALRM", "TERM", "CHLD", "CONT", "STOP",
    "TSTP", "WINCH", "PWR",
];

/// One container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) status: ContainerStatus,
    pub(super) image: FakeImage,
    /// `None` for a stranger's.
    pub(super) plan: Option<Arc<ContainerPlan>>,
    pub(super) signals: Vec<String>,
    name: String,
    number: u64,
}

/// Everything the engine has.
#[derive(Debug, Default)]
pub(super) struct Containers {
    pub(super) images: BTreeMap<String, FakeImage>,
    pub(super) registry: BTreeMap<String, FakeImage>,
    by_id: HashMap<ContainerId, Container>,
    by_name: HashMap<String, ContainerId>,
    events: Option<broadcast::Sender<(String, Event)>>,
    created: u64,
    peak: usize,
}

// === impl Containers ===

impl Containers {
    pub(super) fn peak(&self) -> usize {
        self.peak
    }

    pub(super) fn get(&self, id_or_name: &str) -> Option<&Container> {
        self.by_id.get(&self.id(id_or_name)?)
    }

    pub(super) fn get_mut(&mut self, id_or_name: &str) -> Option<&mut Container> {
        self.by_id.get_mut(&self.id(id_or_name)?)
    }

    fn id(&self, id_or_name: &str) -> Option<ContainerId> {
        if let Some(id) = self.by_name.get(id_or_name) {
            return Some(id.clone());
        }
        let id = ContainerId(id_or_name.to_owned());
        self.by_id.contains_key(&id).then_some(id)
    }

    pub(super) fn ensure_image(&mut self, image: &str, policy: PullPolicy) -> Result<(), Error> {
        let refuse = |reason: &str| Err(Error::Image { image: image.to_owned(), reason: reason.to_owned() });
        match policy {
            PullPolicy::Missing | PullPolicy::Never if self.images.contains_key(image) => Ok(()),
            PullPolicy::Never => refuse("the engine does not have it, and the pull policy is \"never\""),
            PullPolicy::Missing | PullPolicy::Always => match self.registry.get(image).copied() {
                Some(pulled) => {
                    self.images.insert(image.to_owned(), pulled);
                    Ok(())
                }
                None => refuse("no registry has it"),
            },
        }
    }

    pub(super) fn create(&mut self, plan: &ContainerPlan) -> Result<Created, Error> {
        let Some(image) = self.images.get(&plan.image).copied() else {
            return Err(Error::Image { image: plan.image.clone(), reason: "no such image".into() });
        };
        let run_as = run_as(plan, image);
        if let Some(id) = self.by_name.get(&plan.name) {
            let holder = self.by_id.get(id).and_then(|container| container.plan.as_ref());
            if holder.is_some_and(|holder| holder.labels == plan.labels) {
                return Ok(Created { id: id.clone(), run_as });
            }
            return Err(conflict("create", &plan.name, "the name is taken"));
        }
        let id = self.insert(&plan.name, image, Some(Arc::new(plan.clone())));
        Ok(Created { id, run_as })
    }

    pub(super) fn add_stranger(&mut self, name: &str) {
        self.insert(name, FakeImage::default(), None);
    }

    fn insert(&mut self, name: &str, image: FakeImage, plan: Option<Arc<ContainerPlan>>) -> ContainerId {
        self.created += 1;
        let id = ContainerId(format!("{:064x}", self.created));
        let container = Container {
            status: ContainerStatus::Created,
            image,
            plan,
            signals: Vec::new(),
            name: name.to_owned(),
            number: self.created,
        };
        self.by_name.insert(name.to_owned(), id.clone());
        self.by_id.insert(id.clone(), container);
        self.peak = self.peak.max(self.by_id.len());
        id
    }

    pub(super) fn start(&mut self, operation: &'static str, id: &ContainerId) -> Result<(), Error> {
        let container = self.present(operation, id)?;
        match container.status {
            ContainerStatus::Running => Ok(()),
            ContainerStatus::Created | ContainerStatus::Exited { .. } => {
                container.status = ContainerStatus::Running;
                Ok(())
            }
            ContainerStatus::Paused => Err(conflict(operation, &id.0, "it is paused")),
            ContainerStatus::Dead => Err(conflict(operation, &id.0, "it is dead")),
        }
    }

    pub(super) fn signal(&mut self, id: &ContainerId, signal: &str) -> Result<(), Error> {
        let name = signal.strip_prefix("SIG").unwrap_or(signal);
        let container = self.present("signal", id)?;
        match container.status {
            ContainerStatus::Running => {}
            ContainerStatus::Paused => return Err(conflict("signal", &id.0, "it is paused")),
            _ => return Err(conflict("signal", &id.0, "it is not running")),
        }
        if !SIGNALS.contains(&name) {
            let (target, reason) = (id.0.clone(), format!("invalid signal: {signal}"));
            return Err(Error::Refused { operation: "signal", target, reason });
        }
        container.signals.push(signal.to_owned());
        match name {
            "KILL" => self.die(id, KILLED, false),
            "TERM" if container.image.ends_after.is_some() => self.die(id, TERMINATED, false),
            _ => {}
        }
        Ok(())
    }

    pub(super) fn pause(&mut self, id: &ContainerId) -> Result<(), Error> {
        let container = self.present("pause", id)?;
        if !container.status.is_alive() {
            return Err(conflict("pause", &id.0, "it is not running"));
        }
        container.status = ContainerStatus::Paused;
        Ok(())
    }

    pub(super) fn unpause(&mut self, id: &ContainerId) -> Result<(), Error> {
        let container = self.present("unpause", id)?;
        if container.status == ContainerStatus::Paused {
            container.status = ContainerStatus::Running;
        }
        Ok(())
    }

    /// Ends a container; one that does not live is left as it is.
    pub(super) fn die(&mut self, id: &ContainerId, code: i64, oom_killed: bool) {
        let Some(container) = self.by_id.get_mut(id) else { return };
        if container.status.is_alive() {
            container.status = ContainerStatus::Exited { code, oom_killed };
            self.emit(id, EventKind::Died);
        }
    }

    pub(super) fn remove(&mut self, id_or_name: &str) {
        let Some(id) = self.id(id_or_name) else { return };
        self.die(&id, KILLED, false);
        self.emit(&id, EventKind::Removed);
        if let Some(container) = self.by_id.remove(&id) {
            self.by_name.remove(&container.name);
        }
    }

    pub(super) fn require_running(&mut self, operation: &'static str, id: &ContainerId) -> Result<(), Error> {
        match self.present(operation, id)?.status {
            ContainerStatus::Running => Ok(()),
            ContainerStatus::Paused => Err(conflict(operation, &id.0, "it is paused")),
            _ => Err(conflict(operation, &id.0, "it is not running")),
        }
    }

    fn present(&mut self, operation: &'static str, id: &ContainerId) -> Result<&mut Container, Error> {
        self.by_id.get_mut(id).ok_or_else(|| conflict(operation, &id.0, "no such container"))
    }

    pub(super) fn observe(&self, id_or_name: &str) -> Option<Observed> {
        let id = self.id(id_or_name)?;
        let container = self.by_id.get(&id)?;
        Some(container.observed(id))
    }

    /// Returns the containers whose labels are wanted, by name.
    pub(super) fn list(&self, wanted: impl Fn(Option<&Labels>) -> bool) -> Vec<Observed> {
        let mut found: Vec<Observed> = self
            .by_id
            .iter()
            .filter(|(_, container)| wanted(container.plan.as_ref().map(|plan| &plan.labels)))
            .map(|(id, container)| container.observed(id.clone()))
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    pub(super) fn subscribe(&mut self) -> broadcast::Receiver<(String, Event)> {
        self.events.get_or_insert_with(|| broadcast::channel(EVENTS).0).subscribe()
    }

    /// Ends every stream of events.
    pub(super) fn end_events(&mut self) {
        self.events = None;
    }

    fn emit(&self, id: &ContainerId, kind: EventKind) {
        let Some(events) = &self.events else { return };
        let plan = self.by_id.get(id).and_then(|container| container.plan.as_ref());
        if let Some(plan) = plan {
            let event = Event { id: id.clone(), slot: Some(plan.labels.slot.clone()), kind };
            // Nobody listening is no error.
            let _ = events.send((plan.labels.instance.clone(), event));
        }
    }
}

// === impl Container ===

impl Container {
    fn observed(&self, id: ContainerId) -> Observed {
        let network = self.plan.as_ref().map(|plan| &plan.network);
        let has_address = matches!(network, Some(Network::Named(_))) && self.status.is_alive();
        let number = self.number;
        Observed {
            id,
            name: self.name.clone(),
            labels: self.plan.as_ref().map(|plan| plan.labels.clone()),
            status: self.status.clone(),
            address: has_address
                .then(|| format!("10.{}.{}.{}", number >> 16 & 255, number >> 8 & 255, number & 255)),
        }
    }
}

/// The plan's user where it is given in numbers, root by its name, and the image's owner
/// for none and every other name.
fn run_as(plan: &ContainerPlan, image: FakeImage) -> Owner {
    let user = plan.user.as_deref().unwrap_or_default();
    let (user, group) = user.split_once(':').unwrap_or((user, "0"));
    match (user, user.parse(), group.parse()) {
        (_, Ok(uid), Ok(gid)) => Owner { uid, gid },
        ("root", ..) => Owner { uid: 0, gid: 0 },
        _ => image.run_as,
    }
}

fn conflict(operation: &'static str, target: &str, reason: &str) -> Error {
    Error::Conflict { operation, target: target.to_owned(), reason: reason.to_owned() }
}
