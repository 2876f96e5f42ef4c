//! The Docker adapter of the port, over the engine's HTTP API.
//!
//! Nothing of `bollard` leaves this module. Pure translation is in `body` (plan →
//! request), `observed` (answer → ours), `failure` (error → what to do next) and
//! `identity` (passwd and group); the rest speaks to the engine.
//!
//! # Guarantees
//! - Each call has its own deadline, the constants below. A call that *changes*
//!   something and timed out or lost its connection after it may have been sent is
//!   [`Error::Unknown`]; one that only reads is [`Error::Unavailable`].
//! - Nothing is cached but the numbers of an image's user, which cannot change.

mod body;
mod exec;
mod failure;
mod identity;
mod image;
mod observed;
mod processes;

use std::{future::Future, time::Duration};

use async_trait::async_trait;
use bollard::{
    API_DEFAULT_VERSION, Docker,
    models::EventMessage,
    query_parameters::{
        CreateContainerOptionsBuilder, EventsOptionsBuilder, KillContainerOptionsBuilder,
        ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, WaitContainerOptionsBuilder,
    },
};
use futures_util::{StreamExt, stream::BoxStream};
use tokio::{
    sync::OnceCell,
    time::{Instant, sleep, timeout},
};

use self::{
    failure::{Call, Deadline, cause, words},
    identity::Identities,
};
use super::{
    ContainerStatus, Created, EngineInfo, Error, Event, EventKind, ExecOutput, ExecRequest, LABEL_INSTANCE,
    Labels, Observed, Runtime, plan::ContainerPlan,
};
use crate::model::{ContainerId, spec::PullPolicy};

/// Where the engine listens when `DOCKER_HOST` does not say.
pub const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

/// Calls that only look, and those that the engine answers at once.
const QUICK_MS: u64 = 10_000;
/// Making a container: the engine writes its layer to disk.
const CREATE_MS: u64 = 60_000;
/// Starting one: 250–500 ms on an idle machine, many at once wait for each other.
const START_MS: u64 = 60_000;
/// Removing one.
const REMOVE_MS: u64 = 60_000;
/// From SIGKILL to the end of the container.
const KILL_MS: u64 = 30_000;
/// Pulling an image.
const PULL_MS: u64 = 600_000;
/// Between two looks at something that is about to happen.
const POLL_MS: u64 = 50;
/// A stream of events is ended after this, so that a connection that died silently
/// is noticed.
const EVENTS_MS: u64 = 600_000;
/// Bollard's own limit, above every one of ours.
const CLIENT_S: u64 = 24 * 3_600;

/// Speaks to one Docker engine.
#[derive(Debug)]
pub struct DockerRuntime {
    address: Address,
    client: OnceCell<Docker>,
    identities: Identities,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    Unix(String),
    Tcp(String),
}

// === impl DockerRuntime ===

impl DockerRuntime {
    /// Takes the address of an engine, in the form of `DOCKER_HOST`: `unix:///path` or
    /// `tcp://host:port` (plain text: for a proxy beside us); [`DEFAULT_HOST`] when
    /// `None` or empty. The connection is made, and the version of the API agreed, by
    /// the first call, so an engine that is down now is only [`Error::Unavailable`] then.
    ///
    /// # Errors
    /// [`Error::Refused`] for an address of another form.
    pub fn connect(docker_host: Option<&str>) -> Result<Self, Error> {
        let host = docker_host.filter(|host| !host.is_empty()).unwrap_or(DEFAULT_HOST);
        let address = Address::parse(host).ok_or_else(|| Error::Refused {
            operation: "connect",
            target: host.to_owned(),
            reason: "an engine's address is unix:///path or tcp://host:port".into(),
        })?;
        Ok(Self { address, client: OnceCell::new(), identities: Identities::default() })
    }

    async fn client(&self) -> Result<&Docker, Error> {
        let call = Call::reads("connect", "engine");
        let negotiated = async {
            let client = match &self.address {
                Address::Unix(path) => Docker::connect_with_unix(path, CLIENT_S, API_DEFAULT_VERSION),
                Address::Tcp(host) => Docker::connect_with_http(host, CLIENT_S, API_DEFAULT_VERSION),
            };
            bounded(&call, QUICK_MS, async { client?.negotiate_version().await }).await
        };
        self.client.get_or_try_init(|| negotiated).await
    }

    /// Creates the container, or finds the one that an earlier call made.
    async fn create_or_find(&self, plan: &ContainerPlan) -> Result<ContainerId, Error> {
        let call = Call::changes("create", &plan.name);
        let options = CreateContainerOptionsBuilder::default().name(&plan.name).build();
        let request = self.client().await?.create_container(Some(options), body::create(plan));
        match bounded(&call, CREATE_MS, request).await {
            Ok(response) => {
                for warning in response.warnings {
                    tracing::warn!(container = plan.name, warning, "engine warns of a new container");
                }
                Ok(ContainerId(response.id))
            }
            Err(Error::Conflict { operation, target, reason }) if failure::is_missing_image(&reason) => {
                tracing::debug!(operation, target, "image is missing");
                Err(Error::Image { image: plan.image.clone(), reason })
            }
            Err(Error::Conflict { operation, target, reason }) => {
                match self.inspect(&plan.name).await.map_err(|error| unsettled(&call, error))? {
                    Some(found) if found.labels.as_ref() == Some(&plan.labels) => Ok(found.id),
                    _ => Err(Error::Conflict { operation, target, reason }),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Sends a signal; a container that has ended or is gone is success.
    async fn kill(&self, call: &Call<'_>, id: &str, signal: &str) -> Result<(), Error> {
        let options = KillContainerOptionsBuilder::default().signal(signal).build();
        match bounded(call, QUICK_MS, self.client().await?.kill_container(id, Some(options))).await {
            Err(Error::Conflict { .. }) => Ok(()),
            other => other,
        }
    }

    /// Waits until the container does not run; `false` when it still does after `limit`.
    async fn ends_within(&self, call: &Call<'_>, id: &str, limit: Duration) -> Result<bool, Error> {
        let options = WaitContainerOptionsBuilder::default().condition("not-running").build();
        let mut waiting = self.client().await?.wait_container(id, Some(options)).boxed();
        match timeout(limit, waiting.next()).await {
            Err(_) => Ok(false),
            // An exit status other than 0 comes as an error.
            Ok(Some(Ok(_) | Err(bollard::errors::Error::DockerContainerWaitError { .. }))) => Ok(true),
            Ok(Some(Err(error))) => match call.translate(error) {
                Error::Conflict { .. } => Ok(true),
                error => Err(error),
            },
            Ok(None) => Err(call.unknown(words("the engine ended the wait without an answer"))),
        }
    }

    async fn stop_as(
        &self,
        operation: &'static str,
        id: &ContainerId,
        signal: Option<&str>,
        grace: Duration,
    ) -> Result<(), Error> {
        let call = Call::changes(operation, &id.0);
        let Some(found) = self.look(&id.0).await? else { return Ok(()) };
        let observed = observed::from_inspect(&found);
        if observed.status == ContainerStatus::Running && !grace.is_zero() {
            let own = found.config.as_ref().and_then(|config| config.stop_signal.as_deref());
            let signal = signal.or(own).filter(|signal| !signal.is_empty()).unwrap_or("SIGTERM");
            self.kill(&call, &id.0, signal).await?;
            if self.ends_within(&call, &id.0, grace).await? {
                return Ok(());
            }
        } else if !observed.status.is_alive() {
            return Ok(());
        }
        self.kill(&call, &id.0, "SIGKILL").await?;
        if self.ends_within(&call, &id.0, Duration::from_millis(KILL_MS)).await? {
            return Ok(());
        }
        Err(call.unknown(cause(Deadline { after_ms: KILL_MS })))
    }

    /// Returns the engine's own answer about a container.
    async fn look(
        &self,
        id_or_name: &str,
    ) -> Result<Option<bollard::models::ContainerInspectResponse>, Error> {
        let call = Call::reads("inspect", id_or_name);
        if !is_name(id_or_name) {
            return Err(Error::Refused {
                operation: "inspect",
                target: id_or_name.to_owned(),
                reason: "a container's id or name has only letters, digits, '_', '.' and '-'".into(),
            });
        }
        match bounded(&call, QUICK_MS, self.client().await?.inspect_container(id_or_name, None)).await {
            Ok(found) => Ok(Some(found)),
            Err(Error::Conflict { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn status(&self, id: &ContainerId) -> Result<Option<ContainerStatus>, Error> {
        Ok(self.look(&id.0).await?.map(|found| observed::from_inspect(&found).status))
    }

    /// After a refused pause or unpause: success when the container is as was wanted.
    async fn settled(
        &self,
        id: &ContainerId,
        refusal: Error,
        wanted: impl Fn(&ContainerStatus) -> bool,
    ) -> Result<(), Error> {
        match self.status(id).await {
            Ok(Some(status)) if wanted(&status) => Ok(()),
            _ => Err(refusal),
        }
    }
}

#[async_trait]
impl Runtime for DockerRuntime {
    async fn probe(&self) -> Result<EngineInfo, Error> {
        let call = Call::reads("probe", "engine");
        let client = self.client().await?;
        let version = bounded(&call, QUICK_MS, client.version()).await?;
        let info = bounded(&call, QUICK_MS, client.info()).await?;
        Ok(observed::engine(&version, &info))
    }

    async fn ensure_image(&self, image: &str, policy: PullPolicy) -> Result<(), Error> {
        image::ensure(self, image, policy).await
    }

    async fn create(&self, plan: &ContainerPlan) -> Result<Created, Error> {
        let id = self.create_or_find(plan).await?;
        match identity::resolve(self, &id, plan).await {
            Ok(run_as) => Ok(Created { id, run_as }),
            Err(error @ Error::Refused { .. }) => {
                // Nobody knows this container yet, so it is undone here.
                if let Err(error) = self.remove(&id.0).await {
                    tracing::warn!(container = plan.name, %error, "a refused container could not be removed");
                }
                Err(error)
            }
            Err(error) => Err(unsettled(&Call::changes("create", &plan.name), error)),
        }
    }

    async fn start(&self, id: &ContainerId) -> Result<(), Error> {
        let call = Call::changes("start", &id.0);
        bounded(&call, START_MS, self.client().await?.start_container(&id.0, None)).await
    }

    async fn inspect(&self, id_or_name: &str) -> Result<Option<Observed>, Error> {
        Ok(self.look(id_or_name).await?.map(|found| observed::from_inspect(&found)))
    }

    async fn list(&self, instance: &str) -> Result<Vec<Observed>, Error> {
        let call = Call::reads("list", instance);
        let filters = [("label", vec![format!("{LABEL_INSTANCE}={instance}")])].into();
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let found = bounded(&call, QUICK_MS, self.client().await?.list_containers(Some(options))).await?;
        Ok(found.iter().map(observed::from_summary).collect())
    }

    async fn exec(&self, id: &ContainerId, request: ExecRequest) -> Result<ExecOutput, Error> {
        exec::run(self, id, request).await
    }

    async fn signal(&self, id: &ContainerId, signal: &str) -> Result<(), Error> {
        let call = Call::changes("signal", &id.0);
        if self.status(id).await? == Some(ContainerStatus::Paused) {
            return Err(call.conflict("it is paused, and the engine would let it go on"));
        }
        let options = KillContainerOptionsBuilder::default().signal(signal).build();
        bounded(&call, QUICK_MS, self.client().await?.kill_container(&id.0, Some(options))).await
    }

    async fn stop(&self, id: &ContainerId, signal: Option<&str>, grace: Duration) -> Result<(), Error> {
        self.stop_as("stop", id, signal, grace).await
    }

    // Not the engine's own restart: it counts the grace in whole seconds, and of its two
    // halves one could not say which was reached.
    async fn restart(&self, id: &ContainerId, grace: Duration) -> Result<(), Error> {
        self.stop_as("restart", id, None, grace).await?;
        match self.start(id).await {
            // One half is done, so that an engine that went away meanwhile leaves it unknown.
            Err(Error::Unavailable(cause) | Error::Unknown { source: cause, .. }) => {
                Err(Call::changes("restart", &id.0).unknown(cause))
            }
            other => other,
        }
    }

    async fn pause(&self, id: &ContainerId) -> Result<(), Error> {
        let call = Call::changes("pause", &id.0);
        match bounded(&call, QUICK_MS, self.client().await?.pause_container(&id.0)).await {
            Err(refusal @ (Error::Conflict { .. } | Error::Refused { .. })) => {
                self.settled(id, refusal, |status| *status == ContainerStatus::Paused).await
            }
            other => other,
        }
    }

    async fn unpause(&self, id: &ContainerId) -> Result<(), Error> {
        let call = Call::changes("unpause", &id.0);
        match bounded(&call, QUICK_MS, self.client().await?.unpause_container(&id.0)).await {
            Err(refusal @ (Error::Conflict { .. } | Error::Refused { .. })) => {
                self.settled(id, refusal, |status| *status != ContainerStatus::Paused).await
            }
            other => other,
        }
    }

    async fn remove(&self, id_or_name: &str) -> Result<(), Error> {
        let call = Call::changes("remove", id_or_name);
        let until = Instant::now() + Duration::from_millis(REMOVE_MS);
        // With its anonymous volumes: an image may declare some, and they hold what the
        // tenant wrote there.
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let mut refusal = None;
        let mut is_sent = false;
        while Instant::now() < until {
            // Gone is what counts, whoever removed it.
            match self.look(id_or_name).await {
                Ok(None) => return Ok(()),
                Ok(Some(_)) => {}
                Err(error) if is_sent => return Err(unsettled(&call, error)),
                Err(error) => return Err(error),
            }
            is_sent = true;
            let removal = self.client().await?.remove_container(id_or_name, Some(options.clone()));
            match bounded(&call, REMOVE_MS, removal).await {
                // Removed, or another call is removing it: the next look tells.
                Ok(()) => {}
                Err(error @ Error::Conflict { .. }) => {
                    refusal = Some(error);
                    sleep(Duration::from_millis(POLL_MS)).await;
                }
                Err(error) => return Err(error),
            }
        }
        Err(refusal.unwrap_or_else(|| call.unknown(cause(Deadline { after_ms: REMOVE_MS }))))
    }

    async fn events(&self, instance: &str) -> Result<BoxStream<'static, Event>, Error> {
        let call = Call::reads("events", instance);
        let client = self.client().await?;
        // The request is sent by the first poll of the stream, later than this call
        // ends: the engine's own time now makes it begin here.
        let now = bounded(&call, QUICK_MS, client.info()).await?.system_time.unwrap_or_default();
        let since = observed::unix_time(&now)
            .ok_or_else(|| call.refused(&format!("it says that the time is {now:?}")))?;
        let filters = [
            ("type", vec!["container".to_owned()]),
            ("event", vec!["die".to_owned(), "destroy".to_owned()]),
            ("label", vec![format!("{LABEL_INSTANCE}={instance}")]),
        ];
        let options = EventsOptionsBuilder::default().since(&since).filters(&filters.into()).build();
        let stream = client
            .events(Some(options))
            .take_while(|message| {
                let lost = message.as_ref().err().map(ToString::to_string);
                if let Some(error) = &lost {
                    tracing::debug!(error, "stream of container events ended");
                }
                std::future::ready(lost.is_none())
            })
            .filter_map(|message| std::future::ready(message.ok().and_then(event)))
            .take_until(sleep(Duration::from_millis(EVENTS_MS)));
        Ok(stream.boxed())
    }
}

// === impl Address ===

impl Address {
    fn parse(host: &str) -> Option<Self> {
        let address = match host.split_once("://")? {
            ("unix", path) if path.starts_with('/') => Self::Unix(path.to_owned()),
            ("tcp", host) if host.contains(':') && !host.contains('/') => Self::Tcp(host.to_owned()),
            _ => return None,
        };
        Some(address)
    }
}

/// Runs one call of the engine's under a deadline.
async fn bounded<T>(
    call: &Call<'_>,
    deadline_ms: u64,
    request: impl Future<Output = Result<T, bollard::errors::Error>>,
) -> Result<T, Error> {
    match timeout(Duration::from_millis(deadline_ms), request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(call.translate(error)),
        Err(_) => Err(call.lost(cause(Deadline { after_ms: deadline_ms }))),
    }
}

/// An error of a look that was to settle a change leaves the change unknown.
fn unsettled(call: &Call<'_>, error: Error) -> Error {
    match error {
        Error::Unavailable(cause) => call.unknown(cause),
        Error::Refused { .. } | Error::Conflict { .. } => call.unknown(words(&error.to_string())),
        error => error,
    }
}

/// Whether the engine could have a container of this id or name. Checked because it
/// becomes part of a path of the API.
fn is_name(text: &str) -> bool {
    text.len() <= 255
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn event(message: EventMessage) -> Option<Event> {
    let kind = match message.action.as_deref()? {
        "die" => EventKind::Died,
        "destroy" => EventKind::Removed,
        _ => return None,
    };
    let actor = message.actor?;
    let labels = actor.attributes.as_ref().and_then(Labels::from_map);
    Some(Event { id: ContainerId(actor.id?), slot: labels.map(|labels| labels.slot), kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_docker_hosts() {
        for (host, address) in [
            ("unix:///run/d.sock", Some(Address::Unix("/run/d.sock".into()))),
            ("tcp://127.0.0.1:2375", Some(Address::Tcp("127.0.0.1:2375".into()))),
            ("unix://d.sock", None),
            ("tcp://127.0.0.1", None),
            ("ssh://me@host", None),
            ("/run/d.sock", None),
        ] {
            assert_eq!(Address::parse(host), address, "{host}");
        }
        let error = DockerRuntime::connect(Some("ssh://x")).unwrap_err().to_string();
        assert!(error.contains("unix:///path or tcp://host:port"), "{error}");
    }

    #[tokio::test]
    async fn an_engine_that_is_not_there_is_unavailable() {
        let directory = tempfile::tempdir().unwrap();
        let gone = format!("unix://{}/d.sock", directory.path().display());
        // A socket nobody listens on any more, and a port nobody ever did.
        let dead = directory.path().join("dead.sock");
        drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        for host in [gone, format!("unix://{}", dead.display()), format!("tcp://127.0.0.1:{port}")] {
            let docker = DockerRuntime::connect(Some(&host)).unwrap();
            let error = docker.start(&ContainerId("x".into())).await.unwrap_err();
            assert!(matches!(error, Error::Unavailable(_)), "{host}: {error:?}");
        }
    }

    #[test]
    fn names_cannot_leave_their_place_in_a_path() {
        for good in ["a", "boilerhouse-one-s1", "0f.9_b"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "..", "a/b", "a?b", "a#b", "a%2fb", ".a", &"x".repeat(256)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
