//! The commands that ask a server.

use std::{future::Future, io};

use serde_json::Value;

use super::{
    Failure,
    args::{ClaimArgs, ReleaseArgs, SecretsCommand, ServerArgs, TenantArgs},
    assignments, human,
};
use crate::{
    client::{self, Claim, Client, Release},
    clock::{Clock, SystemClock},
    model::{Epoch, Secret},
};

pub(super) fn claim(arguments: ClaimArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let of = arguments.of;
    let claim = Claim {
        workload: of.workload,
        metadata: assignments::metadata(&arguments.metadata)?,
        env: assignments::env(&arguments.env)?,
        secrets: assignments::secrets(&arguments.secret, io::stdin())?,
        wait_ms: arguments.wait_ms,
    };
    let client = client(&of.server, token)?;
    let answer = ask(client.claim(&of.tenant, &claim))?;
    Ok(shown(&of.server, &answer, human::claim))
}

pub(super) fn release(arguments: ReleaseArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let of = arguments.of;
    let release =
        Release { workload: of.workload, epoch: arguments.epoch.map(Epoch), accepted: arguments.accepted };
    let client = client(&of.server, token)?;
    let answer = ask(client.release(&of.tenant, &release))?;
    Ok(shown(&of.server, &answer, human::release))
}

pub(super) fn status(of: TenantArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let client = client(&of.server, token)?;
    let answer = ask(client.status(&of.tenant, of.workload.as_ref()))?;
    Ok(shown(&of.server, &answer, |answer| human::status(answer, SystemClock.unix_ms())))
}

pub(super) fn touch(of: TenantArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let client = client(&of.server, token)?;
    ask(client.touch(&of.tenant, of.workload.as_ref()))?;
    Ok(done(&of.server, &format!("{} touched", of.tenant)))
}

pub(super) fn sync(of: TenantArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let client = client(&of.server, token)?;
    let answer = ask(client.sync(&of.tenant, of.workload.as_ref()))?;
    Ok(shown(&of.server, &answer, human::sync))
}

pub(super) fn prefetch(of: TenantArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let client = client(&of.server, token)?;
    let answer = ask(client.prefetch(&of.tenant, of.workload.as_ref()))?;
    Ok(shown(&of.server, &answer, human::prefetch))
}

pub(super) fn pools(server: ServerArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let answer = ask(client(&server, token)?.pools())?;
    Ok(shown(&server, &answer, human::pools))
}

pub(super) fn slots(server: ServerArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let answer = ask(client(&server, token)?.slots())?;
    Ok(shown(&server, &answer, |answer| human::slots(answer, SystemClock.unix_ms())))
}

pub(super) fn workloads(server: ServerArgs, token: Option<&Secret>) -> Result<String, Failure> {
    let answer = ask(client(&server, token)?.workloads())?;
    Ok(shown(&server, &answer, human::workloads))
}

pub(super) fn secrets(command: SecretsCommand, token: Option<&Secret>) -> Result<String, Failure> {
    match command {
        SecretsCommand::Put { tenant, secret, server } => {
            let (name, content) = assignments::secret_source("the secret", &secret)?;
            let secret = assignments::read_content(&content, io::stdin())?;
            ask(client(&server, token)?.put_secret(&tenant, &name, &secret))?;
            Ok(done(&server, &format!("{name} stored for {tenant}")))
        }
        SecretsCommand::List { tenant, server } => {
            let answer = ask(client(&server, token)?.secret_names(&tenant))?;
            Ok(shown(&server, &answer, human::secret_names))
        }
        SecretsCommand::Delete { tenant, name, server } => {
            ask(client(&server, token)?.delete_secret(&tenant, &name))?;
            Ok(done(&server, &format!("{name} deleted for {tenant}")))
        }
    }
}

pub(super) fn client(server: &ServerArgs, token: Option<&Secret>) -> Result<Client, Failure> {
    Ok(Client::new(&server.url, token)?)
}

/// Waits for an answer on a small runtime of its own.
pub(super) fn ask<T>(call: impl Future<Output = Result<T, client::Error>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Process(format!("the runtime cannot start: {error}")))?;
    Ok(runtime.block_on(call)?)
}

pub(super) fn shown(server: &ServerArgs, answer: &Value, human: impl FnOnce(&Value) -> String) -> String {
    if server.json { format!("{answer:#}\n") } else { human(answer) }
}

/// What is printed where the server answers with nothing.
fn done(server: &ServerArgs, text: &str) -> String {
    if server.json { "{}\n".to_owned() } else { format!("{}\n", super::printable(text)) }
}
