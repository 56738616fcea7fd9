//! The life of an instance that is a process: started, watched, restarted,
//! ended.

use std::{
    net::Ipv4Addr, os::unix::process::ExitStatusExt, process::ExitStatus, sync::Arc, time::Duration,
};

use jiff::Timestamp;
use tokio::{
    process::Child,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Assignment, Node, Order, Orders,
    cgroup::Group,
    health::{Check, Probes, Verdict, Watch},
    logs::{LogOwner, Writer},
    procs::{self, Holder},
    record::{Record, Why},
    spawn::{self, Started},
};
use crate::{
    gpu::GpuLease,
    model::{GpuSpecification, InstanceState, ProcessSpec},
};

/// Ready for so long, its earlier failures are forgotten.
const SETTLED: Duration = Duration::from_secs(60);
/// Failed starts in a row that make it an error.
const PATIENCE: u32 = 3;
/// For what an ended process still had in its pipe.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// Between SIGTERM and SIGKILL for a process that fails its health check.
const ILL_GRACE: Duration = Duration::from_secs(2);
/// For SIGKILL to have its effect.
const KILL_BOUND: Duration = Duration::from_secs(5);

/// The pause before the next start: none after the first failure.
pub(super) fn backoff(failures: u32) -> Duration {
    if failures < 2 {
        return Duration::ZERO;
    }
    let doubled = Duration::from_millis(200).saturating_mul(1 << (failures - 2).min(16));
    doubled
        .mul_f64(rand::random_range(0.8..1.2))
        .min(Duration::from_secs(30))
}

/// How one start ended.
enum End {
    Stopped,
    Failed { why: Why, at_once: bool },
}

/// Why a running process is attended to no more.
enum Outcome {
    Stopped,
    Exited(std::io::Result<ExitStatus>),
    Late(String),
    Stranger(u16),
    Ill(String),
}

pub(super) struct Process<'a> {
    pub(super) node: &'a Arc<Node>,
    pub(super) assignment: &'a Assignment,
    pub(super) spec: &'a ProcessSpec,
    pub(super) record: &'a mut Record,
    pub(super) orders: &'a mut Orders,
    pub(super) failures: u32,
}

impl Process<'_> {
    /// Lasts until the instance is stopped, or ends while it drains.
    pub(super) async fn supervise(&mut self) {
        let Some(gpu) = self
            .assignment
            .deployment
            .specifications
            .iter()
            .find(|s| s.id == self.assignment.specification)
            .cloned()
        else {
            self.record.error(format!(
                "the deployment has no GPU specification {}",
                self.assignment.specification
            ));
            self.wait(std::future::pending::<()>()).await;
            return;
        };
        let Some(devices) = self.devices(&gpu).await else {
            return;
        };
        if let Some(devices) = &devices {
            self.record.instance.gpus = devices.gpus().map(|g| g.index).collect();
        }
        let mut writer = self.node.logs.writer(
            self.assignment.instance,
            LogOwner::of(&self.assignment.version),
        );
        let last = writer.last();
        loop {
            last.clear();
            let end = self.one_start(&gpu, devices.as_ref(), &mut writer).await;
            let End::Failed { why, at_once } = end else {
                return;
            };
            let line = last.get();
            tracing::info!(
                instance = %self.assignment.instance,
                why = why.error,
                last_log_line = line,
                "an instance's process failed"
            );
            self.failures += 1;
            self.record.fails(why);
            let instance = &mut self.record.instance;
            instance.restarts = self.failures;
            instance.last_log_line = line;
            instance.address = None;
            instance.pid = None;
            instance.state = match at_once || self.failures >= PATIENCE {
                true => InstanceState::Error,
                false => InstanceState::Starting,
            };
            self.record.tell();
            if self.record.draining || self.wait(sleep(backoff(self.failures))).await.is_none() {
                return;
            }
        }
    }

    /// Waits while no process runs; none: it is to go. With nothing running,
    /// a drain is over as soon as it is asked.
    async fn wait<T>(&mut self, what: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(what);
        loop {
            tokio::select! {
                biased;
                order = self.orders.recv() => match order {
                    None | Some(Order::Stop) => return None,
                    Some(Order::Deployed(now)) => self.record.deployed(now),
                    Some(Order::Drain) => {
                        self.record.drain();
                        return None;
                    }
                    Some(Order::Suspect) => (),
                },
                done = &mut what => return Some(done),
            }
        }
    }

    /// The instance's devices, as soon as there are enough. None: stopped meanwhile.
    async fn devices(&mut self, gpu: &GpuSpecification) -> Option<Option<GpuLease>> {
        let count = gpu.gpus_per_instance();
        if count == 0 {
            return Some(None);
        }
        let node = Arc::clone(self.node);
        loop {
            let mut returned = Box::pin(node.gpus.returned().notified());
            returned.as_mut().enable();
            match node.gpus.lease(&gpu.gpu, count) {
                Ok(lease) => return Some(Some(lease)),
                Err(error) => self
                    .record
                    .error(Why::hidden("no GPU is free for it", error.to_string())),
            }
            self.wait(returned).await?;
        }
    }

    async fn one_start(
        &mut self,
        gpu: &GpuSpecification,
        devices: Option<&GpuLease>,
        writer: &mut Writer,
    ) -> End {
        let at_once = |why: Why| End::Failed { why, at_once: true };
        let started_at = Instant::now();
        let Some(port) = self.node.ports.lease(started_at) else {
            return at_once(Why::hidden(
                "no port is free for it",
                format!(
                    "no free port for an instance on node {}: give --instance-ports more, or wait a minute for those that rest",
                    self.node.name
                ),
            ));
        };
        let started = spawn::start(
            self.node,
            self.assignment,
            Some(gpu),
            self.spec,
            port.port,
            devices,
        );
        let Started {
            mut child,
            pid,
            own,
            group,
            uid,
            output,
        } = match started {
            Ok(started) => started,
            Err(error) => {
                port.unused();
                return at_once(Why::hidden("it could not be started", error.to_string()));
            }
        };
        let version = &self.assignment.version;
        let serving = version.inference_port.unwrap_or(port.port);
        let asked = version.health.port.unwrap_or(serving);
        let instance = &mut self.record.instance;
        instance.pid = u32::try_from(pid).ok();
        instance.address = Some((Ipv4Addr::LOCALHOST, serving).into());
        instance.spawned_at = Some(Timestamp::now());
        instance.first_healthy_at = None;
        instance.state = match self.failures >= PATIENCE {
            true => InstanceState::Error,
            false => InstanceState::Starting,
        };
        self.record.tell();
        let check = Check::new(
            &version.health,
            (Ipv4Addr::LOCALHOST, asked).into(),
            format!("127.0.0.1:{asked}"),
        );
        let owner = Owner {
            ports: [serving, asked],
            group: pid,
            uid,
        };
        let pump = writer.pump(output);
        tokio::pin!(pump);
        let outcome = {
            let attend = self.attend(&mut child, check, owner, started_at);
            tokio::pin!(attend);
            let mut open = true;
            loop {
                tokio::select! {
                    biased;
                    outcome = &mut attend => break (outcome, open),
                    () = &mut pump, if open => open = false,
                }
            }
        };
        let (outcome, mut open) = outcome;
        let was_ready = self.record.instance.state == InstanceState::Ready;
        let (grace, why) = match outcome {
            Outcome::Stopped => {
                self.record.drain();
                (self.node.kill_after, None)
            }
            Outcome::Exited(status) => {
                let why = Why::from(describe(status));
                if was_ready {
                    // At once: proxies must not dial it any more.
                    self.record.instance.state = InstanceState::Starting;
                    self.record.fails(why.clone());
                    self.record.tell();
                }
                (Duration::ZERO, Some((why, false)))
            }
            Outcome::Late(why) => (Duration::ZERO, Some((why.into(), false))),
            Outcome::Stranger(port) => {
                let why = Why::hidden(
                    "its port is held by another process",
                    format!(
                        "port {port} is held by a process that is not this instance's: end that process, or let the instance itself listen on $PORT"
                    ),
                );
                self.record.error(why.clone());
                (Duration::ZERO, Some((why, true)))
            }
            Outcome::Ill(why) => {
                let why = Why::from(why);
                self.record.error(why.clone());
                (ILL_GRACE, Some((why, true)))
            }
        };
        {
            // What it prints while it ends is still taken.
            let finish = finish(self.node, self.assignment, child, pid, group, grace);
            tokio::pin!(finish);
            loop {
                tokio::select! {
                    biased;
                    () = &mut finish => break,
                    () = &mut pump, if open => open = false,
                }
            }
        }
        drop(own);
        if open {
            drop(timeout(LAST_WORDS, pump).await);
        }
        drop(port);
        match why {
            None => End::Stopped,
            Some((why, at_once)) => End::Failed { why, at_once },
        }
    }

    /// Watches a process from its start to its end.
    async fn attend(
        &mut self,
        child: &mut Child,
        check: Check,
        owner: Owner,
        started: Instant,
    ) -> Outcome {
        let mut probes = Probes::new(check.clone(), started);
        let mut asking: Option<JoinHandle<(u16, Holder)>> = None;
        loop {
            let start_timeout = self.record.deployment.start_timeout;
            tokio::select! {
                biased;
                status = child.wait() => return Outcome::Exited(status),
                order = self.orders.recv() => match order {
                    None | Some(Order::Stop) => return Outcome::Stopped,
                    Some(Order::Deployed(now)) => self.record.deployed(now),
                    Some(Order::Drain) => {
                        // Never ready, so nobody waits for it to finish anything.
                        if self.record.instance.first_healthy_at.is_none() {
                            self.record.instance.address = None;
                        }
                        self.record.drain();
                        probes.clear();
                    }
                    Some(Order::Suspect) => (),
                },
                () = sleep_until(started + start_timeout.0), if !self.record.draining => {
                    return Outcome::Late(format!(
                        "did not become ready within {start_timeout}; last probe of {}: {}; it has to listen on $PORT and \
                         pass its health check, or needs a longer startTimeout",
                        probes.check, probes.last
                    ));
                }
                answer = join(&mut asking), if asking.is_some() => {
                    asking = None;
                    match answer {
                        Some((_, Holder::Instance)) => break,
                        Some((port, Holder::Stranger)) => return Outcome::Stranger(port),
                        // It listened no longer when asked: probe again.
                        Some((_, Holder::Nobody)) | None => (),
                    }
                }
                () = probes.passed(), if asking.is_none() && !self.record.draining => {
                    let instance = self.assignment.instance;
                    asking = Some(tokio::task::spawn_blocking(move || owner.ask(instance)));
                }
            }
        }
        self.record.ready();
        let settled = Instant::now() + SETTLED;
        let mut watch = Watch::new(check);
        loop {
            tokio::select! {
                biased;
                status = child.wait() => return Outcome::Exited(status),
                order = self.orders.recv() => match order {
                    None | Some(Order::Stop) => return Outcome::Stopped,
                    Some(Order::Deployed(now)) => self.record.deployed(now),
                    Some(Order::Drain) => self.record.drain(),
                    Some(Order::Suspect) => watch.suspect(),
                },
                () = sleep_until(settled), if self.failures > 0 => {
                    self.failures = 0;
                    self.record.instance.restarts = 0;
                    self.record.tell();
                }
                verdict = watch.verdict() => match verdict {
                    Verdict::Well => self.record.ready(),
                    Verdict::Doubtful(error) => self.record.error(format!("health check failed: {error}")),
                    Verdict::Ill(error) => {
                        let why = format!("health check failed 3 times in a row: {error}");
                        if !self.record.draining {
                            return Outcome::Ill(why);
                        }
                        // Its work may yet finish; whoever drains it decides.
                        self.record.error(why);
                    }
                },
            }
        }
    }
}

async fn join(asking: &mut Option<JoinHandle<(u16, Holder)>>) -> Option<(u16, Holder)> {
    match asking {
        Some(handle) => handle.await.ok(),
        None => std::future::pending().await,
    }
}

/// Whose the ports must be.
#[derive(Clone, Copy)]
struct Owner {
    ports: [u16; 2],
    group: i32,
    uid: u32,
}

impl Owner {
    /// The first port that is not the instance's, or the last with its holder.
    fn ask(self, instance: crate::model::InstanceId) -> (u16, Holder) {
        let [serving, asked] = self.ports;
        let holder = |port| (port, procs::holder(port, self.group, instance, self.uid));
        match holder(serving) {
            (_, Holder::Instance) if asked != serving => holder(asked),
            answer => answer,
        }
    }
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    match status {
        Err(error) => format!("its process cannot be waited for: {error}"),
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exited with status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "ended".to_owned(),
        },
    }
}

/// Ends a process, its group and what has left the group.
async fn finish(
    node: &Node,
    assignment: &Assignment,
    mut child: Child,
    group: i32,
    all: Option<Group>,
    grace: Duration,
) {
    let gone = async |child: &mut Child, bound: Duration| {
        let until = Instant::now() + bound;
        let mut pause = Duration::from_millis(1);
        loop {
            // Reaps it, so that it counts as gone.
            let reaped = !matches!(child.try_wait(), Ok(None));
            if reaped && !procs::group_alive(group) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    };
    let mut over = false;
    if !grace.is_zero() {
        procs::terminate_group(group);
        over = gone(&mut child, grace).await;
    }
    if !over {
        procs::kill_group(group);
        if !gone(&mut child, KILL_BOUND).await {
            tracing::error!(instance = %assignment.instance, group, "processes survive SIGKILL");
        }
    }
    let (agent, instance) = (node.id.clone(), assignment.instance);
    let escaped = tokio::task::spawn_blocking(move || {
        all.map_or(0, |all| all.kill()) + procs::kill_escaped(&agent, instance)
    });
    if let Ok(killed @ 1..) = escaped.await {
        tracing::info!(%instance, killed, "killed processes that had left the instance's group");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_back_off() {
        assert_eq!(backoff(1), Duration::ZERO);
        for (failures, base) in [(2, 0.2), (3, 0.4), (5, 1.6)] {
            let pause = backoff(failures).as_secs_f64();
            assert!(
                (base * 0.8..=base * 1.2).contains(&pause),
                "{failures}: {pause}"
            );
        }
        assert_eq!(backoff(40), Duration::from_secs(30));
    }
}
