//! Starts the process of an instance: its user, its environment, its process
//! group, and its death with the agent.
#![allow(
    unsafe_code,
    reason = "what a child does between fork and exec, and the user database"
)]

use std::{
    ffi::{CStr, CString, OsString},
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::Stdio,
};

use rustix::process::{self as rprocess, Signal};
use tokio::{
    net::unix::pipe,
    process::{Child, Command},
};

use super::{Node, cgroup::Group, procs};
use crate::{
    agent::Assignment,
    gpu::GpuLease,
    model::{GpuSpecification, ProcessSpec},
};

/// Who instances run as.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    home: String,
}

/// A started process and what it prints.
pub(super) struct Started {
    pub(super) child: Child,
    /// Also the process group.
    pub(super) pid: i32,
    pub(super) own: procs::OwnChild,
    pub(super) group: Option<Group>,
    pub(super) uid: u32,
    pub(super) output: pipe::Receiver,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum SpawnError {
    #[error(
        "the user '{0}' that instances run as does not exist on this node; name another with --instance-user"
    )]
    NoUser(String),
    #[error("cannot look up the user '{0}': {1}")]
    UserLookup(String, io::Error),
    #[error("the version's process has an empty command")]
    NoCommand,
    #[error("cannot start '{program}'{place}: {source}{}", advice(source))]
    Spawn {
        program: String,
        place: String,
        source: io::Error,
    },
    #[error("cannot take the instance's output: {0}")]
    Output(io::Error),
}

/// What to do about a program that does not start.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "; the version's process.command and workingDir have to be on the node, the command in PATH or by its whole path"
        }
        io::ErrorKind::PermissionDenied => {
            "; let the user that instances run as (--instance-user) reach and execute it"
        }
        _ => "",
    }
}

pub(super) fn is_root() -> bool {
    rprocess::geteuid().is_root()
}

/// Looks a user up as the system does.
pub(super) fn user(name: &str) -> Result<User, SpawnError> {
    let wanted = CString::new(name).map_err(|_| SpawnError::NoUser(name.to_owned()))?;
    let mut buffer = vec![0_u8; 16 << 10];
    let mut entry = std::mem::MaybeUninit::<libc::passwd>::uninit();
    let mut found = std::ptr::null_mut();
    // SAFETY: every pointer is to live memory of the length given.
    let code = unsafe {
        libc::getpwnam_r(
            wanted.as_ptr(),
            entry.as_mut_ptr(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            &raw mut found,
        )
    };
    if found.is_null() {
        return Err(match code {
            0 | libc::ENOENT | libc::ESRCH => SpawnError::NoUser(name.to_owned()),
            code => SpawnError::UserLookup(name.to_owned(), io::Error::from_raw_os_error(code)),
        });
    }
    // SAFETY: `found` is not null, so the call filled the entry in, and its
    // strings are in `buffer`, which is still alive.
    let (entry, home) = unsafe {
        let entry = entry.assume_init();
        (entry, CStr::from_ptr(entry.pw_dir))
    };
    Ok(User {
        uid: entry.pw_uid,
        gid: entry.pw_gid,
        home: home.to_string_lossy().into_owned(),
    })
}

/// Everything that the process finds in its environment, in this order.
fn environment(
    node: &Node,
    assignment: &Assignment,
    gpu: Option<&GpuSpecification>,
    spec: &ProcessSpec,
    port: u16,
    devices: Option<&GpuLease>,
    user: Option<&User>,
) -> Vec<(String, OsString)> {
    let own = |name: &str, default: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .unwrap_or_else(|| default.into())
    };
    let visible: Vec<String> = devices
        .map(|lease| lease.gpus().map(crate::gpu::Gpu::visible).collect())
        .unwrap_or_default();
    let version = &assignment.version;
    let home = match user {
        Some(user) if Path::new(&user.home).is_dir() => user.home.clone().into(),
        Some(_) => "/".into(),
        None => own("HOME", "/"),
    };
    let text = |value: &dyn std::fmt::Display| OsString::from(value.to_string());
    let mut all: Vec<(String, OsString)> = [
        ("PATH", own("PATH", "/usr/local/bin:/usr/bin:/bin")),
        ("HOME", home),
        ("LANG", own("LANG", "C.UTF-8")),
        ("TMPDIR", own("TMPDIR", "/tmp")),
        ("NVCF_BACKEND", text(&node.name)),
        ("NVCF_ENV", "weir".into()),
        ("NVCF_FUNCTION_ID", text(&version.function)),
        ("NVCF_FUNCTION_NAME", text(&version.name)),
        ("NVCF_FUNCTION_VERSION_ID", text(&version.id)),
        (
            "NVCF_INSTANCETYPE",
            gpu.map(|s| s.instance_type.as_str())
                .unwrap_or_default()
                .into(),
        ),
        ("NVCF_NCA_ID", text(&version.account)),
        ("NVCF_REGION", "local".into()),
        ("CUDA_VISIBLE_DEVICES", visible.join(",").into()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    for var in &spec.env {
        // The API refuses these. A key with `=` would set another variable than it seems to.
        if super::reserved(&var.key) || var.key.is_empty() || var.key.contains('=') {
            tracing::warn!(key = var.key, version = %version.id, "a version may not set this variable");
            continue;
        }
        all.push((var.key.clone(), (&var.value).into()));
    }
    all.push(("PORT".to_owned(), text(&port)));
    all.push((procs::INSTANCE.to_owned(), text(&assignment.instance)));
    all.push((procs::AGENT.to_owned(), text(&node.id)));
    all
}

/// Must be called on the agent's thread: the child dies with the thread that
/// forks it.
pub(super) fn start(
    node: &Node,
    assignment: &Assignment,
    gpu: Option<&GpuSpecification>,
    spec: &ProcessSpec,
    port: u16,
    devices: Option<&GpuLease>,
) -> Result<Started, SpawnError> {
    let (program, arguments) = spec.command.split_first().ok_or(SpawnError::NoCommand)?;
    let run_as = match is_root() {
        true => Some(user(&node.user)?),
        false => None,
    };
    let (output, input) = io::pipe().map_err(SpawnError::Output)?;
    let errors = input.try_clone().map_err(SpawnError::Output)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(environment(
            node,
            assignment,
            gpu,
            spec,
            port,
            devices,
            run_as.as_ref(),
        ))
        .stdin(Stdio::null())
        .stdout(input)
        .stderr(errors)
        .process_group(0)
        .kill_on_drop(true);
    if let Some(user) = &run_as {
        // With a user set, the standard library also drops every other group.
        command.uid(user.uid).gid(user.gid);
    }
    let default_dir = match &spec.working_dir {
        Some(dir) => {
            command.current_dir(dir);
            None
        }
        None => CString::new(node.data_dir.as_os_str().as_bytes()).ok(),
    };
    let group = node.groups.as_ref().and_then(|groups| {
        let made = groups.group(assignment.instance);
        made.inspect_err(|error| tracing::warn!(%error, "no control group for an instance"))
            .ok()
    });
    let door = group.as_ref().and_then(|group| group.door().ok());
    let agent = rprocess::getpid();
    // Weir raises its own, and what is started with a high limit may not be made for it: `select` breaks above 1024,
    // and some walk all descriptors there could be.
    let open_files = node.open_files.map(|current| rprocess::Rlimit {
        current: Some(current),
        maximum: rprocess::getrlimit(rprocess::Resource::Nofile).maximum,
    });
    // SAFETY: between fork and exec this only makes system calls; it neither
    // allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            // After the change of user, which would clear it.
            rprocess::set_parent_process_death_signal(Some(Signal::KILL))?;
            // What Weir was started with, by a shell or a supervisor, is not the instance's to have.
            // Kernels before 5.11 lack the flag: then the descriptors stay.
            let _ = libc::syscall(
                libc::SYS_close_range,
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            if let Some(door) = &door {
                // By the rights of who opened it; older kernels refuse, and the agent does it a little later.
                let _ = rustix::io::write(door, b"0");
            }
            if let Some(limit) = open_files {
                rprocess::setrlimit(rprocess::Resource::Nofile, limit)?;
            }
            if rprocess::getppid() != Some(agent) {
                return Err(io::ErrorKind::NotConnected.into());
            }
            if let Some(dir) = &default_dir {
                // The agent's directory may be closed to the instance's user.
                if rprocess::chdir(dir.as_c_str()).is_err() {
                    rprocess::chdir(c"/")?;
                }
            }
            Ok(())
        });
    }
    let child = command.spawn().map_err(|source| SpawnError::Spawn {
        program: program.clone(),
        place: spec
            .working_dir
            .as_ref()
            .map(|dir| format!(" in '{dir}'"))
            .unwrap_or_default(),
        source,
    })?;
    // The command holds the pipe's other end.
    drop(command);
    let pid = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .ok_or_else(|| SpawnError::Output(io::ErrorKind::NotFound.into()))?;
    let own = node.children.own(pid);
    if let Some(group) = &group {
        group.put(pid);
    }
    let output = pipe::Receiver::from_owned_fd(output.into()).map_err(SpawnError::Output)?;
    let uid = run_as.map_or_else(|| rprocess::geteuid().as_raw(), |user| user.uid);
    Ok(Started {
        child,
        pid,
        own,
        group,
        uid,
        output,
    })
}
