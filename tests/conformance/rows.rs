//! The promises of the port, one row each.

use std::time::Duration;

use boilerhouse::{
    model::{
        Owner, Secret,
        spec::{Network, PullPolicy},
    },
    runtime::{ContainerStatus, Error, Event, EventKind, fake::Operation},
};
use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use tokio::time::timeout;

use super::subject::{Program, Subject, is_conflict, is_unknown};
use crate::support::{engine::eventually, images, specs::command};

/// A name, and what is tried.
pub type Row = (&'static str, fn(Subject) -> BoxFuture<'static, ()>);

/// Makes a row of a function that borrows its subject, and cleans up after it.
macro_rules! rows {
    ($($row:ident),* $(,)?) => {
        &[$((stringify!($row), |subject| async move {
            $row(&subject).await;
            subject.clean().await;
        }.boxed())),*]
    };
}

/// Every promise.
pub const ROWS: &[Row] = rows![
    an_engine_says_what_it_is,
    a_container_is_created_then_started,
    a_container_on_a_network_has_an_address,
    a_command_gives_status_and_both_outputs,
    a_command_gets_environment_and_stdin,
    output_beyond_the_cap_is_cut,
    a_command_past_its_deadline_is_killed,
    a_command_that_does_not_exist_has_status_127,
    a_command_needs_a_running_container,
    a_signal_reaches_the_program,
    a_signal_to_a_paused_container_is_a_conflict,
    stop_lets_an_obedient_program_end,
    stop_kills_what_does_not_end,
    stop_without_grace_kills,
    stop_ends_a_paused_container,
    stop_of_what_does_not_run_is_success,
    restart_starts_again,
    pause_and_unpause_are_idempotent,
    remove_is_idempotent,
    list_shows_this_installation_only,
    a_taken_name_of_ours_is_the_same_container,
    a_taken_name_of_a_strangers_is_a_conflict,
    an_absent_image_is_an_error,
    the_image_says_who_runs,
    deaths_and_removals_are_events,
    events_begin_with_the_call,
    a_container_that_died_stays_dead,
    a_lost_create_is_found_by_name,
    a_lost_start_is_found_running,
    a_lost_remove_is_found_gone,
    a_lost_look_is_unavailable,
    what_is_not_there_is_a_conflict,
];

async fn a_container_is_created_then_started(subject: &Subject) {
    let plan = subject.plan("s1", Program::Obeys);
    assert_eq!(subject.look(&plan.name).await, None);
    let created = subject.runtime.create(&plan).await.unwrap();
    let found = subject.look(&created.id.0).await.unwrap();
    assert_eq!(found.id, created.id);
    assert_eq!(found.name, plan.name);
    assert_eq!(found.labels.as_ref(), Some(&plan.labels));
    assert_eq!(found.status, ContainerStatus::Created);
    assert_eq!(found.address, None, "network none");
    assert_eq!(subject.look(&plan.name).await.as_ref(), Some(&found), "by name, too");
    subject.runtime.start(&created.id).await.unwrap();
    assert_eq!(subject.status(&created.id).await, Some(ContainerStatus::Running));
    subject.runtime.start(&created.id).await.expect("running already is success");
}

async fn an_engine_says_what_it_is(subject: &Subject) {
    let engine = subject.runtime.probe().await.unwrap();
    assert!(engine.version.starts_with(if subject.is_fake() { "fake" } else { "docker " }), "{engine:?}");
    assert_eq!(engine.refusals, Vec::<String>::new(), "this suite needs an engine that can serve");
}

async fn a_container_on_a_network_has_an_address(subject: &Subject) {
    let mut spec = subject.spec(Program::Obeys);
    // The one that every Docker engine has.
    spec.network = Network::Named("bridge".into());
    let created = subject.runtime.create(&subject.plan_for("s1", &spec, Vec::new())).await.unwrap();
    assert_eq!(subject.look(&created.id.0).await.unwrap().address, None, "not before it runs");
    subject.runtime.start(&created.id).await.unwrap();
    let address = subject.look(&created.id.0).await.unwrap().address.expect("an address");
    assert!(address.parse::<std::net::IpAddr>().is_ok(), "{address}");
    spec.network = Network::Named(format!("{}-none", subject.instance));
    if !subject.is_fake() {
        // The engine finds out when it connects the container.
        let created = subject.runtime.create(&subject.plan_for("s2", &spec, Vec::new())).await.unwrap();
        let error = subject.runtime.start(&created.id).await.unwrap_err();
        let named = matches!(&error, Error::Refused { reason, .. } if reason.contains("-none not found"));
        assert!(named, "{error:?}");
    }
}

async fn a_command_gives_status_and_both_outputs(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    let output = subject.run(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"]).await;
    assert_eq!((output.status, output.truncated), (3, false));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
}

async fn a_command_gets_environment_and_stdin(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    let mut request = command(&["sh", "-c", "echo \"$GREETING\""]);
    request.env = vec![("GREETING".into(), "a=b c".into())];
    assert_eq!(subject.runtime.exec(&id, request).await.unwrap().stdout, b"a=b c\n");
    // More than any pipe or socket holds, so that reading and writing must go on together.
    let text: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut request = command(&["cat"]);
    request.stdin = Some(Secret::new(text.clone()));
    request.output_cap_bytes = 2 * text.len();
    let output = subject.runtime.exec(&id, request).await.unwrap();
    assert_eq!((output.status, output.stdout == text), (0, true), "{} bytes came back", output.stdout.len());
    // A command that reads nothing of it ends all the same.
    let mut request = command(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    request.stdin = Some(Secret::new(text));
    assert_eq!(subject.runtime.exec(&id, request).await.unwrap().status, 3);
}

async fn output_beyond_the_cap_is_cut(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    for (bytes, kept, truncated) in [("1000", 1000, false), ("1001", 1000, true), ("3000000", 1000, true)] {
        let mut request = command(&["head", "-c", bytes, "/dev/zero"]);
        request.output_cap_bytes = 1000;
        let output = subject.runtime.exec(&id, request).await.unwrap();
        assert_eq!((output.status, output.stdout.len(), output.truncated), (0, kept, truncated), "{bytes}");
    }
}

async fn a_command_past_its_deadline_is_killed(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    // The second leaves its own child behind, which holds the output open.
    for argv in [
        &["sleep", "4321"][..],
        &["sh", "-c", "sleep 4321 & sleep 4321; true"],
        &["sh", "-c", "sleep 4321 &"],
    ] {
        if subject.is_fake() && argv[0] == "sh" {
            continue;
        }
        let mut request = command(argv);
        request.timeout = Duration::from_millis(700);
        let result = subject.runtime.exec(&id, request).await;
        let ended = matches!(&result, Err(Error::Timeout { target, after_ms: 700 }) if *target == id.0);
        assert!(ended, "{argv:?}: {result:?}");
        // The pattern does not match itself.
        let look = "! grep -l 432[1] /proc/[0-9]*/cmdline";
        let left = subject.run(&id, &["sh", "-c", look]).await;
        assert_eq!(left.status, 0, "{argv:?} left {}", String::from_utf8_lossy(&left.stdout));
    }
    assert_eq!(subject.status(&id).await, Some(ContainerStatus::Running), "the container goes on");
}

async fn a_command_that_does_not_exist_has_status_127(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    let output = subject.run(&id, &["no-such-command"]).await;
    assert_eq!(output.status, 127, "{output:?}");
    assert!(!output.stderr.is_empty(), "it says why");
}

async fn a_command_needs_a_running_container(subject: &Subject) {
    let created = subject.runtime.create(&subject.plan("s1", Program::Obeys)).await.unwrap();
    assert!(is_conflict(&subject.runtime.exec(&created.id, command(&["true"])).await), "created");
    subject.runtime.start(&created.id).await.unwrap();
    subject.runtime.pause(&created.id).await.unwrap();
    assert!(is_conflict(&subject.runtime.exec(&created.id, command(&["true"])).await), "paused");
    subject.runtime.stop(&created.id, None, Duration::ZERO).await.unwrap();
    assert!(is_conflict(&subject.runtime.exec(&created.id, command(&["true"])).await), "exited");
}

async fn a_signal_reaches_the_program(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    let unknown = subject.runtime.signal(&id, "SIGNONSENSE").await;
    assert!(matches!(unknown, Err(Error::Refused { .. })), "{unknown:?}");
    subject.runtime.signal(&id, "SIGTERM").await.unwrap();
    let ended = eventually("the program ends", || async { exit_code(subject.status(&id).await) }).await;
    assert_eq!(ended, 143);
    assert!(is_conflict(&subject.runtime.signal(&id, "SIGTERM").await), "it does not run any more");
}

async fn a_signal_to_a_paused_container_is_a_conflict(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    subject.runtime.pause(&id).await.unwrap();
    assert!(is_conflict(&subject.runtime.signal(&id, "SIGHUP").await));
    assert_eq!(subject.status(&id).await, Some(ContainerStatus::Paused));
}

async fn stop_lets_an_obedient_program_end(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    subject.runtime.stop(&id, Some("SIGTERM"), Duration::from_secs(20)).await.unwrap();
    assert_eq!(exit_code(subject.status(&id).await), Some(143));
}

async fn stop_kills_what_does_not_end(subject: &Subject) {
    let id = subject.running("s1", Program::Ignores).await;
    subject.runtime.stop(&id, None, Duration::from_millis(300)).await.unwrap();
    assert_eq!(exit_code(subject.status(&id).await), Some(137));
}

async fn stop_without_grace_kills(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    subject.runtime.stop(&id, None, Duration::ZERO).await.unwrap();
    assert_eq!(exit_code(subject.status(&id).await), Some(137));
}

async fn stop_ends_a_paused_container(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    subject.runtime.pause(&id).await.unwrap();
    // The grace is longer than this suite's patience: it must not be waited for.
    let stop = subject.runtime.stop(&id, None, Duration::from_secs(3_600));
    timeout(Duration::from_secs(60), stop).await.expect("at once").unwrap();
    assert_eq!(exit_code(subject.status(&id).await), Some(137));
}

async fn stop_of_what_does_not_run_is_success(subject: &Subject) {
    let created = subject.runtime.create(&subject.plan("s1", Program::Obeys)).await.unwrap();
    let grace = Duration::from_secs(1);
    subject.runtime.stop(&created.id, None, grace).await.expect("never started");
    subject.runtime.start(&created.id).await.unwrap();
    subject.kill_outside(&created.id).await;
    eventually("it is dead", || async { exit_code(subject.status(&created.id).await) }).await;
    subject.runtime.stop(&created.id, None, grace).await.expect("exited");
    subject.runtime.remove(&created.id.0).await.unwrap();
    subject.runtime.stop(&created.id, None, grace).await.expect("gone");
}

async fn restart_starts_again(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    subject.run(&id, &["touch", "/tmp/residue"]).await;
    subject.runtime.restart(&id, Duration::from_secs(20)).await.unwrap();
    assert_eq!(subject.status(&id).await, Some(ContainerStatus::Running));
    let residue = subject.run(&id, &["sh", "-c", "test ! -e /tmp/residue"]).await;
    assert_eq!(residue.status, 0, "its tmpfs is a new one");
    subject.runtime.pause(&id).await.unwrap();
    subject.runtime.restart(&id, Duration::from_secs(3_600)).await.unwrap();
    assert_eq!(subject.status(&id).await, Some(ContainerStatus::Running), "a paused one, too");
}

async fn pause_and_unpause_are_idempotent(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    subject.runtime.unpause(&id).await.expect("not paused is success");
    for _ in 0..2 {
        subject.runtime.pause(&id).await.unwrap();
        assert_eq!(subject.status(&id).await, Some(ContainerStatus::Paused));
    }
    assert!(is_conflict(&subject.runtime.start(&id).await), "start does not unpause");
    for _ in 0..2 {
        subject.runtime.unpause(&id).await.unwrap();
        assert_eq!(subject.status(&id).await, Some(ContainerStatus::Running));
    }
    subject.runtime.stop(&id, None, Duration::ZERO).await.unwrap();
    assert!(subject.runtime.pause(&id).await.is_err(), "what does not run cannot be paused");
}

async fn remove_is_idempotent(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    for _ in 0..2 {
        subject.runtime.remove(&id.0).await.unwrap();
        assert_eq!(subject.status(&id).await, None);
    }
    let plan = subject.plan("s2", Program::Obeys);
    subject.runtime.create(&plan).await.unwrap();
    subject.runtime.remove(&plan.name).await.expect("by name, never started");
    assert_eq!(subject.look(&plan.name).await, None);
}

async fn list_shows_this_installation_only(subject: &Subject) {
    let running = subject.running("s1", Program::Obeys).await;
    let paused = subject.running("s2", Program::Obeys).await;
    subject.runtime.pause(&paused).await.unwrap();
    let exited = subject.running("s3", Program::Obeys).await;
    subject.runtime.stop(&exited, None, Duration::ZERO).await.unwrap();
    let created = subject.runtime.create(&subject.plan("s4", Program::Obeys)).await.unwrap().id;
    let mut other = subject.plan("s5", Program::Obeys);
    other.labels.instance.push_str("-other");
    other.name.push_str("-other");
    let other = subject.runtime.create(&other).await.unwrap().id;

    let mut found = subject.runtime.list(&subject.instance).await.unwrap();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    let found: Vec<_> = found
        .into_iter()
        .map(|container| (container.id, container.labels.unwrap().slot, container.status))
        .collect();
    let slot = |name: &str| boilerhouse::model::SlotId::new(name).unwrap();
    let ended = ContainerStatus::Exited { code: 137, oom_killed: false };
    let expected = [
        (running, slot("s1"), ContainerStatus::Running),
        (paused, slot("s2"), ContainerStatus::Paused),
        (exited, slot("s3"), ended),
        (created, slot("s4"), ContainerStatus::Created),
    ];
    assert_eq!(found, expected);
    assert_eq!(subject.runtime.list(&format!("{}-none", subject.instance)).await.unwrap(), []);
    subject.runtime.remove(&other.0).await.unwrap();
}

async fn a_taken_name_of_ours_is_the_same_container(subject: &Subject) {
    let plan = subject.plan("s1", Program::Obeys);
    let first = subject.runtime.create(&plan).await.unwrap();
    assert_eq!(subject.runtime.create(&plan).await.unwrap(), first);
    let mut changed = plan.clone();
    changed.labels.spec_hash.0.push('0');
    assert!(is_conflict(&subject.runtime.create(&changed).await), "made from another spec");
}

async fn a_taken_name_of_a_strangers_is_a_conflict(subject: &Subject) {
    let plan = subject.plan("s1", Program::Obeys);
    subject.add_stranger(&plan.name).await;
    let result = subject.runtime.create(&plan).await;
    let stranger = subject.look(&plan.name).await.expect("the stranger's is untouched");
    // Not labelled, so it is removed here.
    subject.remove_outside(&plan.name).await;
    assert!(is_conflict(&result), "{result:?}");
    assert_eq!(stranger.labels, None);
}

async fn an_absent_image_is_an_error(subject: &Subject) {
    // A registry that refuses connections at once.
    let absent = "127.0.0.1:1/boilerhouse-test/absent:1";
    for policy in [PullPolicy::Never, PullPolicy::Missing, PullPolicy::Always] {
        let error = subject.runtime.ensure_image(absent, policy).await.unwrap_err();
        let Error::Image { image, reason } = &error else { panic!("{policy:?}: {error:?}") };
        assert_eq!(image, absent);
        assert!(reason.len() > 10, "{policy:?} gives a reason: {reason:?}");
    }
    for policy in [PullPolicy::Never, PullPolicy::Missing] {
        subject.runtime.ensure_image(images::BUSYBOX, policy).await.unwrap();
    }
    let mut plan = subject.plan("s1", Program::Obeys);
    plan.image = absent.to_owned();
    let result = subject.runtime.create(&plan).await;
    assert!(matches!(result, Err(Error::Image { .. })), "create does not pull: {result:?}");
    assert_eq!(subject.look(&plan.name).await, None);
}

async fn the_image_says_who_runs(subject: &Subject) {
    let root = Owner { uid: 0, gid: 0 };
    for (slot, image, user, owner) in [
        ("s1", images::BUSYBOX, None, root),
        ("s2", images::APP, None, images::APP_OWNER),
        ("s3", images::APP, Some("root"), root),
        ("s4", images::APP, Some("4242:50"), Owner { uid: 4242, gid: 50 }),
        ("s5", images::APP, Some("4242"), Owner { uid: 4242, gid: 0 }),
    ] {
        let mut spec = subject.spec(Program::Obeys);
        spec.image = image.to_owned();
        spec.user = user.map(str::to_owned);
        let created = subject.runtime.create(&subject.plan_for(slot, &spec, Vec::new())).await.unwrap();
        assert_eq!(created.run_as, owner, "{image} as {user:?}");
    }
    if !subject.is_fake() {
        let mut spec = subject.spec(Program::Obeys);
        spec.user = Some("nobody-here".into());
        let plan = subject.plan_for("s6", &spec, Vec::new());
        let error = subject.runtime.create(&plan).await.unwrap_err();
        let named = matches!(&error, Error::Refused { reason, .. } if reason.contains("\"nobody-here\" is not in the image's /etc/passwd"));
        assert!(named, "{error:?}");
        assert_eq!(subject.look(&plan.name).await, None, "a refused container is not left");
    }
}

async fn deaths_and_removals_are_events(subject: &Subject) {
    let mut events = subject.runtime.events(&subject.instance).await.unwrap();
    let mut others = subject.runtime.events(&format!("{}-other", subject.instance)).await.unwrap();
    let id = subject.running("s1", Program::Obeys).await;
    subject.kill_outside(&id).await;
    subject.runtime.remove(&id.0).await.unwrap();
    for kind in [EventKind::Died, EventKind::Removed] {
        let event = timeout(Duration::from_secs(20), events.next()).await.expect("an event comes");
        let slot = boilerhouse::model::SlotId::new("s1").ok();
        assert_eq!(event, Some(Event { id: id.clone(), slot, kind }));
    }
    assert_eq!(others.next().now_or_never(), None, "another installation hears nothing");
}

async fn events_begin_with_the_call(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    let mut events = subject.runtime.events(&subject.instance).await.unwrap();
    // It dies before anybody looks at the stream.
    subject.runtime.stop(&id, None, Duration::ZERO).await.unwrap();
    let event = timeout(Duration::from_secs(20), events.next()).await.expect("an event comes");
    assert_eq!(event.map(|event| event.kind), Some(EventKind::Died));
}

async fn a_container_that_died_stays_dead(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    let mut events = subject.runtime.events(&subject.instance).await.unwrap();
    subject.kill_outside(&id).await;
    timeout(Duration::from_secs(20), events.next()).await.expect("it dies");
    assert_eq!(exit_code(subject.status(&id).await), Some(137));
    subject.runtime.start(&id).await.expect("it can be started again");
    assert_eq!(subject.status(&id).await, Some(ContainerStatus::Running));
}

async fn a_lost_create_is_found_by_name(subject: &Subject) {
    let plan = subject.plan("s1", Program::Obeys);
    subject.lose_answer(Operation::Create);
    let result = subject.runtime.create(&plan).await;
    assert!(is_unknown(&result), "{result:?}");
    let found = subject.look(&plan.name).await.expect("it happened");
    assert_eq!(found.labels.as_ref(), Some(&plan.labels));
    assert_eq!(subject.runtime.create(&plan).await.unwrap().id, found.id, "asking again gives the same");
}

async fn a_lost_start_is_found_running(subject: &Subject) {
    let created = subject.runtime.create(&subject.plan("s1", Program::Obeys)).await.unwrap();
    subject.lose_answer(Operation::Start);
    let result = subject.runtime.start(&created.id).await;
    assert!(is_unknown(&result), "{result:?}");
    assert_eq!(subject.status(&created.id).await, Some(ContainerStatus::Running));
}

async fn a_lost_remove_is_found_gone(subject: &Subject) {
    let id = subject.running("s1", Program::Obeys).await;
    subject.lose_answer(Operation::Remove);
    let result = subject.runtime.remove(&id.0).await;
    assert!(is_unknown(&result), "{result:?}");
    assert_eq!(subject.status(&id).await, None);
    subject.runtime.remove(&id.0).await.unwrap();
}

async fn a_lost_look_is_unavailable(subject: &Subject) {
    subject.lose_answer(Operation::List);
    let result = subject.runtime.list(&subject.instance).await;
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");
    assert_eq!(subject.runtime.list(&subject.instance).await.unwrap(), []);
}

async fn what_is_not_there_is_a_conflict(subject: &Subject) {
    let gone = boilerhouse::model::ContainerId("f".repeat(64));
    assert!(is_conflict(&subject.runtime.start(&gone).await), "start");
    assert!(is_conflict(&subject.runtime.exec(&gone, command(&["true"])).await), "exec");
    assert!(is_conflict(&subject.runtime.signal(&gone, "SIGHUP").await), "signal");
    assert!(is_conflict(&subject.runtime.pause(&gone).await), "pause");
    assert!(is_conflict(&subject.runtime.unpause(&gone).await), "unpause");
    assert!(is_conflict(&subject.runtime.restart(&gone, Duration::ZERO).await), "restart");
}

fn exit_code(status: Option<ContainerStatus>) -> Option<i64> {
    match status? {
        ContainerStatus::Exited { code, .. } => Some(code),
        _ => None,
    }
}
