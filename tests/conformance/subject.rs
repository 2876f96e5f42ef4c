//! What a row runs on: an engine, and how to do to it what the port cannot.

use std::{sync::Arc, time::Duration};

use boilerhouse::{
    model::{ContainerId, WorkloadSpec},
    runtime::{
        ContainerStatus, Error, ExecOutput, ExecRequest, Observed, Runtime,
        docker::DockerRuntime,
        fake::{FakeExec, FakeImage, FakeRuntime, Fault, Operation},
        plan::{ContainerPlan, Mount},
    },
};
use bollard::{
    models::ContainerCreateBody,
    query_parameters::{
        CreateContainerOptionsBuilder, KillContainerOptionsBuilder, RemoveContainerOptionsBuilder,
    },
};

use super::lossy::Lossy;
use crate::support::{
    engine::{TestEngine, eventually},
    images,
    specs::{command, plan_of, spec},
};

/// The fake's image whose program ignores what asks it to end.
const STUBBORN: &str = "boilerhouse-test/stubborn:1";

/// One engine under test, with an installation of its own.
pub struct Subject {
    pub runtime: Arc<dyn Runtime>,
    pub instance: String,
    kind: Kind,
}

enum Kind {
    Fake(Arc<FakeRuntime>),
    Docker { engine: Arc<TestEngine>, proxy: Lossy },
}

/// What a container's program does when it is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Obeys,
    Ignores,
}

impl Subject {
    pub fn fake(instance: String) -> Self {
        let fake = Arc::new(FakeRuntime::new());
        fake.add_image(images::BUSYBOX, FakeImage::default());
        fake.add_image(images::APP, FakeImage { run_as: images::APP_OWNER, ..FakeImage::default() });
        fake.add_image(STUBBORN, FakeImage { ends_after: None, ..FakeImage::default() });
        fake.on_exec(|_, request| run_fake(request));
        Self { runtime: Arc::clone(&fake) as Arc<dyn Runtime>, instance, kind: Kind::Fake(fake) }
    }

    pub fn docker(engine: &Arc<TestEngine>, row: &str) -> Self {
        let host = std::env::var("DOCKER_HOST")
            .unwrap_or_else(|_| format!("unix://{}", crate::support::engine::SOCKET));
        let socket = host.strip_prefix("unix://").expect("this suite puts a proxy before a unix socket");
        let proxy = Lossy::start(socket.into());
        let runtime = DockerRuntime::connect(Some(&proxy.host())).unwrap();
        // Its own, so that rows side by side do not see each other's containers.
        let instance = format!("{}-{row}", engine.instance);
        Self {
            runtime: Arc::new(runtime),
            instance,
            kind: Kind::Docker { engine: Arc::clone(engine), proxy },
        }
    }

    pub fn is_fake(&self) -> bool {
        matches!(self.kind, Kind::Fake(_))
    }

    pub fn spec(&self, program: Program) -> WorkloadSpec {
        let mut spec = spec("demo", images::BUSYBOX);
        match (&self.kind, program) {
            (_, Program::Obeys) => spec.command = Some(["sleep", "1000"].map(str::to_owned).into()),
            (Kind::Docker { .. }, Program::Ignores) => {
                let script = "trap '' TERM; touch /tmp/ready; while :; do sleep 1; done";
                spec.command = Some(["sh", "-c", script].map(str::to_owned).into());
            }
            (Kind::Fake(_), Program::Ignores) => spec.image = STUBBORN.to_owned(),
        }
        spec
    }

    pub fn plan(&self, slot: &str, program: Program) -> ContainerPlan {
        self.plan_for(slot, &self.spec(program), Vec::new())
    }

    pub fn plan_for(&self, slot: &str, spec: &WorkloadSpec, mounts: Vec<Mount>) -> ContainerPlan {
        plan_of(&self.instance, slot, spec, mounts)
    }

    /// Creates and starts a container.
    pub async fn running(&self, slot: &str, program: Program) -> ContainerId {
        let created = self.runtime.create(&self.plan(slot, program)).await.unwrap();
        self.runtime.start(&created.id).await.unwrap();
        if program == Program::Ignores {
            // Until its trap is set it would obey.
            eventually("the program is ready", || async {
                let ready =
                    self.runtime.exec(&created.id, command(&["test", "-e", "/tmp/ready"])).await.unwrap();
                (ready.status == 0).then_some(())
            })
            .await;
        }
        created.id
    }

    pub async fn status(&self, id: &ContainerId) -> Option<ContainerStatus> {
        self.look(&id.0).await.map(|found| found.status)
    }

    pub async fn look(&self, id_or_name: &str) -> Option<Observed> {
        self.runtime.inspect(id_or_name).await.unwrap()
    }

    /// Runs a command that ends, with 64 KiB of output at most.
    pub async fn run(&self, id: &ContainerId, argv: &[&str]) -> ExecOutput {
        self.runtime.exec(id, command(argv)).await.unwrap()
    }

    /// Loses the answer to the next call of an operation.
    pub fn lose_answer(&self, operation: Operation) {
        match &self.kind {
            Kind::Fake(fake) => fake.fail_next(operation, Fault::LoseAnswer),
            Kind::Docker { proxy, .. } => proxy.lose_next(match operation {
                Operation::Create => "POST /containers/create",
                Operation::Start => "/start ",
                Operation::Remove => "DELETE /containers/",
                Operation::List => "GET /containers/json",
                other => panic!("no row loses {other:?}"),
            }),
        }
    }

    /// Makes a container under a name, without our labels.
    pub async fn add_stranger(&self, name: &str) {
        match &self.kind {
            Kind::Fake(fake) => fake.add_stranger(name),
            Kind::Docker { engine, .. } => {
                let options = CreateContainerOptionsBuilder::default().name(name).build();
                let body = ContainerCreateBody { image: Some(images::BUSYBOX.into()), ..Default::default() };
                engine.raw.create_container(Some(options), body).await.unwrap();
            }
        }
    }

    /// Ends a container behind the port's back.
    pub async fn kill_outside(&self, id: &ContainerId) {
        match &self.kind {
            Kind::Fake(fake) => fake.kill_outside(id, 137, false),
            Kind::Docker { engine, .. } => {
                let options = KillContainerOptionsBuilder::default().signal("KILL").build();
                engine.raw.kill_container(&id.0, Some(options)).await.unwrap();
            }
        }
    }

    /// Removes a container behind the port's back.
    pub async fn remove_outside(&self, id_or_name: &str) {
        match &self.kind {
            Kind::Fake(fake) => fake.remove_outside(id_or_name),
            Kind::Docker { engine, .. } => {
                let options = RemoveContainerOptionsBuilder::default().force(true).build();
                engine.raw.remove_container(id_or_name, Some(options)).await.unwrap();
            }
        }
    }

    /// Removes what the row left.
    pub async fn clean(&self) {
        for container in self.runtime.list(&self.instance).await.unwrap() {
            self.runtime.remove(&container.id.0).await.unwrap();
        }
    }
}

/// Whether the outcome is not known.
pub fn is_unknown<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Unknown { .. }))
}

/// Whether the container is not there or not in a state for the call.
pub fn is_conflict<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Conflict { .. }))
}

/// The few commands that the rows run, as busybox runs them.
fn run_fake(request: &ExecRequest) -> FakeExec {
    let argv: Vec<&str> = request.argv.iter().map(String::as_str).collect();
    let output = |status, stdout: Vec<u8>, stderr: &str| ExecOutput {
        status,
        stdout,
        stderr: stderr.as_bytes().to_vec(),
        truncated: false,
    };
    match argv.as_slice() {
        ["cat"] => {
            output(0, request.stdin.as_ref().map(|s| s.expose().to_vec()).unwrap_or_default(), "").into()
        }
        ["sh", "-c", "echo \"$GREETING\""] => {
            let value =
                request.env.iter().find(|(name, _)| name == "GREETING").map_or("", |(_, value)| value);
            output(
                0,
                format!(
                    "{value}
"
                )
                .into(),
                "",
            )
            .into()
        }
        ["sh", "-c", "echo out; echo err >&2; exit 3"] => output(3, b"out\n".to_vec(), "err\n").into(),
        ["head", "-c", bytes, "/dev/zero"] => output(0, vec![0; bytes.parse().unwrap()], "").into(),
        ["sleep", seconds] => FakeExec {
            output: output(0, Vec::new(), ""),
            takes: Duration::from_secs(seconds.parse().unwrap()),
        },
        ["no-such-command"] => output(127, Vec::new(), "not found").into(),
        _ => FakeExec::status(0),
    }
}
