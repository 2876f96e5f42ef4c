//! The seccomp profile of every container.
//!
//! An allow-list: what is not named fails with EPERM. It is written for this
//! project, in the spirit of what moby 25 and later has as its default, because
//! the engine's own default depends on its age (20.10 still lets containers open
//! AF_VSOCK sockets to the hypervisor and use io_uring). It is sent inline with
//! each container, so that the engine's host needs no file of ours.
//!
//! Stricter than moby's:
//! - Only the native instruction set. 32-bit calls end the thread: on x86 their
//!   `socketcall` would pass the filter on address families.
//! - Sockets only of the families unix, inet, inet6 and netlink, so neither
//!   AF_VSOCK nor AF_ALG, AF_PACKET or any family to come.
//! - No looking into other processes: `ptrace`, `process_vm_readv`, `kcmp`, `pidfd_getfd`.
//! - A capability in a spec's `cap_add` opens no system call. What needs one of
//!   those below (`mount`, `setns`, `bpf`, `clock_settime`, …) does not run here.

/// The profile, in the JSON form of Docker and OCI.
pub const PROFILE: &str = include_str!("seccomp.json");

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::PROFILE;

    /// Returns the rules that name a call.
    fn rules(name: &str) -> Vec<Value> {
        let profile: Value = serde_json::from_str(PROFILE).unwrap();
        let rules = profile["syscalls"].as_array().unwrap();
        rules
            .iter()
            .filter(|rule| rule["names"].as_array().unwrap().contains(&name.into()))
            .cloned()
            .collect()
    }

    #[test]
    fn what_is_not_named_is_refused() {
        let profile: Value = serde_json::from_str(PROFILE).unwrap();
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(profile["defaultErrnoRet"], 1);
        for architecture in profile["archMap"].as_array().unwrap() {
            assert_eq!(architecture["subArchitectures"], serde_json::json!([]), "only the native set");
        }
    }

    #[test]
    fn dangerous_calls_are_not_named() {
        for name in [
            "mount",
            "umount2",
            "move_mount",
            "open_tree",
            "fsopen",
            "fsmount",
            "mount_setattr",
            "pivot_root",
            "chroot",
            "unshare",
            "setns",
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "kcmp",
            "pidfd_getfd",
            "bpf",
            "perf_event_open",
            "userfaultfd",
            "io_uring_setup",
            "io_uring_enter",
            "io_uring_register",
            "keyctl",
            "add_key",
            "request_key",
            "init_module",
            "finit_module",
            "delete_module",
            "kexec_load",
            "reboot",
            "swapon",
            "settimeofday",
            "clock_settime",
            "open_by_handle_at",
            "name_to_handle_at",
            "fanotify_init",
            "quotactl",
            "syslog",
            "acct",
            "iopl",
            "ioperm",
            "modify_ldt",
            "sethostname",
        ] {
            assert_eq!(rules(name), Vec::<Value>::new(), "{name}");
        }
    }

    #[test]
    fn calls_with_conditions_have_no_rule_without() {
        for name in ["socket", "socketpair", "clone", "personality"] {
            let rules = rules(name);
            assert!(!rules.is_empty(), "{name}");
            for rule in rules {
                assert!(rule["args"].as_array().is_some_and(|args| args.len() == 1), "{name}: {rule}");
            }
        }
        // Every CLONE_NEW* flag that clone (not clone3) can carry.
        let namespaces = 0x0002_0000_u64
            | 0x0200_0000
            | 0x0400_0000
            | 0x0800_0000
            | 0x1000_0000
            | 0x2000_0000
            | 0x4000_0000;
        assert_eq!(rules("clone")[0]["args"][0]["value"], namespaces);
        assert_eq!(rules("clone3")[0]["errnoRet"], 38, "ENOSYS, so that libc falls back to clone");
    }
}
