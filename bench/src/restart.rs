//! How soon a Weir that was killed serves again.
//!
//! It starts a `weir serve` of its own (this executable) on free ports with a
//! directory of its own, makes functions with deployments, and lets callers
//! call one of them. Each run kills Weir with SIGKILL, starts it on the same
//! directory, and asks without a pause until `/readyz` is 200 and an
//! invocation is served; times count from the new process's spawn. The
//! instance that serves is started anew, so its start is part of the second.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use indicatif::ProgressBar;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::client::{Client, TargetArgs, interrupted};
use crate::times;

/// Where ports are looked for: below those of the tests, of other Weirs'
/// instances and of the system.
const PORTS: std::ops::Range<u16> = 10_000..12_000;
/// One for each listener, and the instances'.
const PORTS_TAKEN: u16 = 32;
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);
const BOUND: Duration = Duration::from_secs(60);
/// Functions that are made at a time.
const MAKERS: usize = 16;

#[derive(Debug, clap::Args)]
pub struct RestartArgs {
    /// How many times Weir is killed
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Functions with deployments that Weir has
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub functions: u32,
    /// Callers who call one more function all the time
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub callers: u32,
}

#[derive(Debug)]
struct Restarts {
    ready: Vec<Duration>,
    served: Vec<Duration>,
}

pub async fn restart(args: RestartArgs) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("could not find this executable")?;
    let mut command = Command::new(program);
    command.arg("serve");
    let server = Server::new(command)?;
    let Restarts { ready, served } = measure(&args, server, interrupted()).await?;
    let rows = [
        ("spawn to /readyz 200", ready),
        ("spawn to the first invocation served", served),
    ];
    println!(
        "{} restarts with {} functions and {} callers\n{}",
        args.runs,
        args.functions,
        args.callers,
        times::table(&rows)?
    );
    Ok(())
}

/// Ends the server whatever came of it, also where it is interrupted.
async fn measure(
    args: &RestartArgs,
    mut server: Server,
    interrupted: impl Future<Output = ()>,
) -> anyhow::Result<Restarts> {
    let done = tokio::select! {
        // First, so that it hears of an interruption before anything runs.
        biased;
        () = interrupted => Err(anyhow!("interrupted")),
        done = run(args, &mut server) => done.with_context(|| server.last_words()),
    };
    let stopped = server.stop().await;
    let done = done?;
    stopped?;
    Ok(done)
}

async fn run(args: &RestartArgs, server: &mut Server) -> anyhow::Result<Restarts> {
    let spawned = server.spawn()?;
    let client = server.client.clone();
    until(spawned, "Weir is ready", async || client.is_ready().await).await?;

    let bar = ProgressBar::new(args.functions.into()).with_message("making functions");
    let idle = deployment(0);
    stream::iter(0..args.functions)
        .map(|number| {
            let (client, idle) = (&client, &idle);
            async move {
                let name = format!("bench-restart-{number}");
                let version = client.create(&name, Duration::ZERO).await?;
                client.begin_deployment(&version, idle).await
            }
        })
        .buffer_unordered(MAKERS)
        .try_for_each(async |()| {
            bar.inc(1);
            Ok(())
        })
        .await?;
    bar.finish_and_clear();
    let called = client.create("bench-restart", Duration::ZERO).await?;
    client.deploy(&called, &deployment(1)).await?;

    let call = async |client: &Client, function: &str| {
        Client::answered(client.invoke(function, "/infer?ms=2")).await == Ok("200".into())
    };
    let mut callers = JoinSet::new();
    for _ in 0..args.callers {
        let (client, function) = (client.clone(), called.function.clone());
        callers.spawn(async move {
            loop {
                if !call(&client, &function).await {
                    tokio::time::sleep(5 * PAUSE).await;
                }
            }
        });
    }

    let bar = ProgressBar::new(args.runs.into()).with_message("restarting");
    let mut restarts = Restarts {
        ready: Vec::new(),
        served: Vec::new(),
    };
    for _ in 0..args.runs {
        until(Instant::now(), "an invocation is served", async || {
            call(&client, &called.function).await
        })
        .await?;
        let spawned = server.crash_and_restart()?;
        let (ready, served) = tokio::try_join!(
            until(spawned, "Weir is ready", async || client.is_ready().await),
            until(spawned, "an invocation is served", async || {
                call(&client, &called.function).await
            }),
        )?;
        restarts.ready.push(ready);
        restarts.served.push(served);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(restarts)
}

fn deployment(instances: u32) -> Value {
    json!({
        "deploymentSpecifications": [{
            "gpu": "none",
            "instanceType": "none",
            "minInstances": instances,
            "maxInstances": 1,
            "maxRequestConcurrency": 64,
        }],
    })
}

/// How long after `since` it was so.
async fn until(
    since: Instant,
    what: &str,
    mut is_so: impl AsyncFnMut() -> bool,
) -> anyhow::Result<Duration> {
    let so = async {
        while !is_so().await {
            tokio::time::sleep(PAUSE).await;
        }
        since.elapsed()
    };
    tokio::time::timeout(BOUND, so)
        .await
        .map_err(|_| anyhow!("not in {BOUND:?}: {what}"))
}

/// A `weir serve` of its own, that leaves nothing behind.
struct Server {
    command: Command,
    child: Option<Child>,
    client: Client,
    directory: TempDir,
}

impl Server {
    /// Starts nothing yet. `command` takes its settings from the environment.
    fn new(mut command: Command) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir().context("could not make a directory")?;
        let first = free_ports()?;
        let [data, admin] = [first, first + 1].map(|port| format!("127.0.0.1:{port}"));
        let key = uuid::Uuid::new_v4().to_string();
        let log = std::fs::File::create(log(directory.path()))?;
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("WEIR_") || name.starts_with("OTEL_") {
                command.env_remove(&*name);
            }
        }
        let last = first + PORTS_TAKEN - 1;
        command
            .env("WEIR_LISTEN", &data)
            .env("WEIR_ADMIN", &admin)
            .env("WEIR_INSTANCE_PORTS", format!("{}-{last}", first + 2))
            .env("WEIR_DATA_DIR", directory.path().join("data"))
            .env("WEIR_ADMIN_KEY", &key)
            .env("WEIR_ACCESS_LOG", "off")
            .env("WEIR_GRACE", "PT1S")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // A Ctrl-C of the terminal is for us alone.
            .process_group(0);
        let client = Client::new(&TargetArgs {
            url: format!("http://{data}"),
            admin_url: format!("http://{admin}"),
            key: Some(key),
            data_dir: directory.path().join("data"),
            ca_file: None,
        })?;
        Ok(Self {
            command,
            child: None,
            client,
            directory,
        })
    }

    /// When it was.
    fn spawn(&mut self) -> anyhow::Result<Instant> {
        let spawned = Instant::now();
        let child = self.command.spawn().context("could not start Weir")?;
        self.child = Some(child);
        Ok(spawned)
    }

    /// Nothing can come between: the new one ends what the old one left.
    fn crash_and_restart(&mut self) -> anyhow::Result<Instant> {
        self.kill();
        self.spawn()
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself, which what follows tells.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        // One that has just started is let come up, so that it ends the
        // instances of the one before.
        let client = self.client.clone();
        let begun = Instant::now();
        while !client.is_ready().await && begun.elapsed() < BOUND / 4 {
            if child.try_wait()?.is_some() {
                bail!("Weir ended by itself");
            }
            tokio::time::sleep(PAUSE).await;
        }
        let pid = Pid::from_child(&child);
        self.child = Some(child);
        kill_process(pid, Signal::TERM).context("could not stop Weir")?;
        let begun = Instant::now();
        while begun.elapsed() < BOUND {
            if let Some(child) = &mut self.child
                && child.try_wait()?.is_some()
            {
                self.child = None;
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.kill();
        bail!("Weir had to be killed: it did not end in {BOUND:?}");
    }

    fn last_words(&self) -> String {
        let log = std::fs::read_to_string(log(self.directory.path())).unwrap_or_default();
        match log.lines().next_back() {
            Some(line) => format!("its last line was: {line}"),
            None => "it wrote nothing".into(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn log(directory: &Path) -> std::path::PathBuf {
    directory.join("weir.log")
}

/// The first of so many in a row that nobody uses.
fn free_ports() -> anyhow::Result<u16> {
    for _ in 0..100 {
        let first = rand::random_range(PORTS.start..PORTS.end - PORTS_TAKEN);
        let mut all = first..first + PORTS_TAKEN;
        if all.all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return Ok(first);
        }
    }
    bail!("found no {PORTS_TAKEN} free ports in a row in {PORTS:?}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::fake::FakeWeir;

    /// Not a test: the `weir serve` of the others.
    #[tokio::test]
    #[ignore = "run as a child by other tests"]
    async fn child() {
        let [data, admin] = ["WEIR_LISTEN", "WEIR_ADMIN"].map(|name| std::env::var(name).unwrap());
        let fake = FakeWeir::on(&[&data, &admin], 200).await;
        fake.state().open = true;
        std::future::pending().await
    }

    fn fake() -> Server {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "restart::tests::child", "--ignored"]);
        Server::new(command).unwrap()
    }

    fn address(server: &Server) -> String {
        server.client.authority().unwrap()
    }

    const ARGS: RestartArgs = RestartArgs {
        runs: 2,
        functions: 3,
        callers: 2,
    };

    #[tokio::test]
    async fn each_run_is_a_kill_and_nothing_is_left() {
        let server = fake();
        let (address, directory) = (address(&server), server.directory.path().to_owned());
        let restarts = measure(&ARGS, server, std::future::pending())
            .await
            .unwrap();
        assert_eq!((restarts.ready.len(), restarts.served.len()), (2, 2));
        assert!(std::net::TcpStream::connect(&address).is_err());
        assert!(!directory.exists());
    }

    #[tokio::test]
    async fn an_interrupted_run_leaves_nothing_either() {
        let server = fake();
        let (address, directory) = (address(&server), server.directory.path().to_owned());
        let client = server.client.clone();
        let endless = RestartArgs {
            runs: u32::MAX,
            ..ARGS
        };
        let interrupted = async {
            while !client.is_ready().await {
                tokio::task::yield_now().await;
            }
        };
        let done = measure(&endless, server, interrupted).await;
        assert_eq!(format!("{:#}", done.unwrap_err()), "interrupted");
        assert!(std::net::TcpStream::connect(&address).is_err());
        assert!(!directory.exists());
    }

    #[tokio::test]
    async fn what_does_not_start_is_told_with_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such thing >&2"]);
        let mut server = Server::new(command).unwrap();
        server.spawn().unwrap();
        server.child.as_mut().unwrap().wait().unwrap();
        assert_eq!(server.last_words(), "its last line was: no such thing");
        let error = server.stop().await.unwrap_err().to_string();
        assert_eq!(error, "Weir ended by itself");
    }
}
