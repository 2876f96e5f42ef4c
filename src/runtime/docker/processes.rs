//! Ending a command's processes through the host's process table.

use std::{collections::BTreeSet, fs};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How often the table is read again for processes that were born meanwhile.
const ROUNDS: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    session: i32,
}

/// Kills a command that the engine started as `leader` in `container`, with its
/// descendants and its session (the engine gives each command one of its own), and
/// returns how many processes were killed.
///
/// `leader` is a number in the engine's process namespace. When that is not ours it
/// names nothing, or a process that is not our business: so a process is only killed
/// when its control group carries the container's id. The check is made after a
/// descriptor of the process was opened, so that a number that was given to another
/// process in between kills nobody.
pub(super) fn kill_session(leader: i32, container: &str) -> usize {
    let mut killed = 0;
    // A short id would fit where it does not belong.
    if container.len() < 64 {
        return 0;
    }
    for _ in 0..ROUNDS {
        let found: usize =
            family(&table(), leader).into_iter().map(|pid| usize::from(kill(pid, container))).sum();
        if found == 0 {
            break;
        }
        killed += found;
    }
    killed
}

fn kill(pid: i32, container: &str) -> bool {
    let Some(descriptor) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
    else {
        return false;
    };
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.contains(container) && pidfd_send_signal(descriptor, Signal::KILL).is_ok()
}

/// The leader, its session, and their descendants.
fn family(table: &[Process], leader: i32) -> BTreeSet<i32> {
    let mut family = BTreeSet::from([leader]);
    loop {
        let before = family.len();
        let related = |process: &&Process| process.session == leader || family.contains(&process.parent);
        let found: Vec<i32> = table.iter().filter(related).map(|process| process.pid).collect();
        family.extend(found);
        if family.len() == before {
            return family
                .into_iter()
                .filter(|pid| table.iter().any(|process| process.pid == *pid))
                .collect();
        }
    }
}

fn table() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
        })
        .collect()
}

/// Reads `pid (name) state ppid pgrp session …`, where the name may hold anything;
/// `None` for a process that has ended and only waits to be reaped.
fn parse(pid: i32, stat: &str) -> Option<Process> {
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    Some(Process { pid, parent: fields.get(1)?.parse().ok()?, session: fields.get(3)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_does_not_confuse_the_table() {
        let process = |stat| parse(7, stat);
        assert_eq!(process("7 (sh) S 1 7 7 0"), Some(Process { pid: 7, parent: 1, session: 7 }));
        assert_eq!(process("7 (a) S 9 9 9) R 2 3 4 0"), Some(Process { pid: 7, parent: 2, session: 4 }));
        assert_eq!(process("7 (sh) Z 1 7 7 0"), None);
        assert_eq!(process("7 sh"), None);
    }

    #[test]
    fn a_family_is_the_session_and_every_descendant() {
        let process = |pid, parent, session| Process { pid, parent, session };
        let table = [
            process(1, 0, 1),
            process(10, 1, 10),
            process(11, 10, 10),
            // Left the session, still a descendant; then reparented, still in the session.
            process(12, 11, 12),
            process(13, 1, 10),
            process(20, 1, 20),
        ];
        assert_eq!(family(&table, 10), BTreeSet::from([10, 11, 12, 13]));
        assert_eq!(family(&table, 99), BTreeSet::new(), "a leader that is not in the table");
    }

    #[test]
    fn a_process_of_no_container_is_never_killed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(kill_session(i32::try_from(child.id()).unwrap(), &"a".repeat(64)), 0);
        assert!(child.try_wait().unwrap().is_none(), "it was killed");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
