//! Runs this node's instances: starts processes, asks every instance how it
//! is, restarts what fails, and reports each change at once. What should run
//! is decided elsewhere.
//!
//! The agent has a thread of its own, which lives as long as the agent: a
//! child gets its parent-death signal when the thread that forked it ends.

mod cgroup;
pub(crate) mod endpoint;
mod health;
mod logs;
mod ports;
mod process;
mod procs;
mod record;
mod spawn;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write as _},
    net::SocketAddr,
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        oneshot,
    },
    task::JoinSet,
};

pub use self::logs::LogOwner;
use self::{
    cgroup::Groups, logs::Logs, ports::Ports, process::Process, procs::Children, record::Record,
};
use crate::{
    dial::Trust,
    gpu::{Gpu, GpuPool},
    model::{Deployment, GpuSpecificationId, Instance, InstanceId, Launch, Version},
    private,
};

pub(crate) use endpoint::forbidden;

/// Whether Weir alone sets this variable of an instance's environment.
#[must_use]
pub fn reserved(variable: &str) -> bool {
    matches!(variable, "PORT" | "CUDA_VISIBLE_DEVICES")
        || variable.starts_with("NVCF_")
        || variable.starts_with("WEIR_")
}

/// What an agent needs to know about its node.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    pub node: String,
    pub data_dir: PathBuf,
    /// Given to instances as `PORT`.
    pub ports: RangeInclusive<u16>,
    /// Who instances run as when the agent is root; default `nobody`.
    pub user: Option<String>,
    /// How many files an instance may open at first, where that is not as many as this process may: the limit that
    /// Weir was started with.
    pub open_files: Option<u64>,
    /// Discovered or declared.
    pub gpus: Vec<Gpu>,
    /// Weir's own listeners, which no endpoint may name.
    pub forbidden: Vec<SocketAddr>,
    /// Whose certificates an endpoint may show.
    pub trust: Trust,
    /// From SIGTERM to SIGKILL.
    pub kill_after: Duration,
}

impl AgentConfig {
    pub const KILL_AFTER: Duration = Duration::from_secs(10);
}

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("can't use the data directory '{path}': there has to be room, and weir's user has to be let write there", path = path.display())]
    DataDir { path: PathBuf, source: io::Error },
    #[error("another weir's agent uses the data directory '{path}': stop it, or give this one a directory of its own", path = path.display())]
    InUse { path: PathBuf },
    #[error("--instance-user: {0}")]
    User(String),
    #[error("cannot start the agent's thread: {0}")]
    Thread(io::Error),
}

/// One instance to run.
#[derive(Clone, Debug)]
pub struct Assignment {
    pub instance: InstanceId,
    pub version: Arc<Version>,
    pub deployment: Arc<Deployment>,
    pub specification: GpuSpecificationId,
    /// One of [`Launch::Endpoints`].
    pub endpoint: Option<String>,
}

/// What an agent says about its instances.
#[allow(
    clippy::large_enum_variant,
    reason = "nearly every report is the large one"
)]
#[derive(Clone, PartialEq, Debug)]
pub enum Report {
    Changed(Instance),
    Gone(InstanceId),
}

enum Command {
    Run(Assignment),
    Order(InstanceId, Order),
    Shutdown(oneshot::Sender<()>),
}

/// To one instance.
#[derive(Clone, Debug)]
enum Order {
    /// Its deployment was changed.
    Deployed(Arc<Deployment>),
    Drain,
    Stop,
    Suspect,
}

type Orders = UnboundedReceiver<Order>;

/// What all instances of the node share.
struct Node {
    name: String,
    /// Tells this agent's processes from another's on the same machine.
    id: String,
    data_dir: PathBuf,
    user: String,
    open_files: Option<u64>,
    forbidden: Vec<SocketAddr>,
    trust: Trust,
    kill_after: Duration,
    ports: Ports,
    gpus: GpuPool,
    logs: Logs,
    children: Children,
    /// None where the kernel has none for it: then what leaves an instance's process group is found by its
    /// environment alone.
    groups: Option<Groups>,
    /// Locked while this agent lives.
    _lock: File,
}

/// A handle on a node's agent; when the last one goes, so do its instances.
#[derive(Clone)]
pub struct Agent {
    commands: UnboundedSender<Command>,
    logs: Logs,
    kill_after: Duration,
}

impl Agent {
    pub fn start(
        config: AgentConfig,
        reports: UnboundedSender<Report>,
    ) -> Result<Self, AgentError> {
        let path = config.data_dir.clone();
        let unusable = |source| AgentError::DataDir {
            path: path.clone(),
            source,
        };
        private::directory(&path).map_err(unusable)?;
        let data_dir = path.canonicalize().map_err(unusable)?;
        let lock = private::file(&data_dir.join("agent.lock")).map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => (),
            Err(fs::TryLockError::WouldBlock) => return Err(AgentError::InUse { path }),
            Err(fs::TryLockError::Error(source)) => return Err(unusable(source)),
        }
        if let (Some(user), true) = (&config.user, spawn::is_root()) {
            spawn::user(user).map_err(|error| AgentError::User(error.to_string()))?;
        }
        let id = identity(&data_dir).map_err(unusable)?;
        let node = Node {
            groups: Groups::open(&id),
            id,
            logs: Logs::open(&data_dir).map_err(unusable)?,
            ports: Ports::new(config.ports),
            gpus: GpuPool::new(&config.node, config.gpus),
            name: config.node,
            children: Children::default(),
            data_dir,
            user: config.user.unwrap_or_else(|| "nobody".to_owned()),
            open_files: config.open_files,
            forbidden: config.forbidden,
            trust: config.trust,
            kill_after: config.kill_after,
            _lock: lock,
        };
        if !spawn::is_root() {
            tracing::warn!(
                "the agent is not root: instances run as its own user and are not separated from it"
            );
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(AgentError::Thread)?;
        let (commands, inbox) = mpsc::unbounded_channel();
        let agent = Self {
            commands,
            logs: node.logs.clone(),
            kill_after: node.kill_after,
        };
        std::thread::Builder::new()
            .name("weir-agent".to_owned())
            .spawn(move || {
                let killed = cgroup::kill_orphans(&node.id) + procs::kill_orphans(&node.id);
                if killed > 0 {
                    tracing::warn!(killed, "killed processes that an earlier run left behind");
                }
                let node = Arc::new(node);
                let _within = runtime.enter();
                if procs::adopts_orphans() {
                    drop(runtime.spawn(reap(node.children.clone())));
                }
                runtime.block_on(serve(node, inbox, reports));
            })
            .map_err(AgentError::Thread)?;
        Ok(agent)
    }

    /// Nobody is there to hear it only after a shutdown.
    fn tell(&self, command: Command) {
        drop(self.commands.send(command));
    }

    /// Starts an instance; one that runs already takes up what the deployment says now.
    pub fn run(&self, assignment: Assignment) {
        self.tell(Command::Run(assignment));
    }

    /// Says that it drains; it runs on and is asked for its health.
    pub fn drain(&self, instance: InstanceId) {
        self.tell(Command::Order(instance, Order::Drain));
    }

    /// Ends it. One that is not there is reported as gone.
    pub fn stop(&self, instance: InstanceId) {
        self.tell(Command::Order(instance, Order::Stop));
    }

    /// A proxy could not connect to it.
    pub fn suspect(&self, instance: InstanceId) {
        self.tell(Command::Order(instance, Order::Suspect));
    }

    /// The last `tail` lines it printed; it may be gone for a while.
    #[must_use]
    pub fn logs(&self, instance: InstanceId, tail: usize) -> Option<String> {
        self.logs.read(instance, tail)
    }

    /// Whose those lines are.
    #[must_use]
    pub fn log_owner(&self, instance: InstanceId) -> Option<LogOwner> {
        self.logs.owner(instance)
    }

    /// Stops every instance and takes no new ones.
    pub async fn shutdown(&self) {
        let (done, wait) = oneshot::channel();
        self.tell(Command::Shutdown(done));
        let bound = self.kill_after + Duration::from_secs(10);
        if tokio::time::timeout(bound, wait).await.is_err() {
            tracing::error!("instances are left after the shutdown");
        }
    }
}

/// The name this agent's processes carry, made once for a data directory.
fn identity(data_dir: &std::path::Path) -> io::Result<String> {
    let path = data_dir.join("agent-id");
    match fs::read_to_string(&path) {
        Ok(id) if uuid::Uuid::try_parse(id.trim()).is_ok() => {
            private::file(&path)?;
            Ok(id.trim().to_owned())
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => {
            let id = uuid::Uuid::new_v4().to_string();
            let fresh = data_dir.join("agent-id.new");
            let mut file = private::file(&fresh)?;
            file.set_len(0)?;
            file.write_all(id.as_bytes())?;
            fs::rename(fresh, path)?;
            Ok(id)
        }
    }
}

/// One that has ended meanwhile does not mind.
fn stop(orders: &UnboundedSender<Order>) {
    let _ = orders.send(Order::Stop);
}

/// As PID 1, the usual one of a container, Weir gets what instances leave behind, and nobody else takes its status.
/// On the agent's thread, as the starts are: one that was just made is not taken for an orphan.
async fn reap(children: Children) {
    let ended = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child());
    let mut ended = match ended {
        Ok(ended) => ended,
        Err(error) => {
            tracing::error!(%error, "orphans are not reaped");
            return;
        }
    };
    loop {
        children.reap_orphans();
        if ended.recv().await.is_none() {
            return;
        }
        // Many that end together are one look at /proc.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn serve(
    node: Arc<Node>,
    mut inbox: UnboundedReceiver<Command>,
    reports: UnboundedSender<Report>,
) {
    let mut running = HashMap::<InstanceId, UnboundedSender<Order>>::new();
    let mut tasks = JoinSet::<InstanceId>::new();
    let mut waiting: Vec<oneshot::Sender<()>> = Vec::new();
    let mut closing = false;
    loop {
        if closing && tasks.is_empty() {
            for done in waiting.drain(..) {
                let _ = done.send(());
            }
            if inbox.is_closed() && inbox.is_empty() {
                return;
            }
        }
        tokio::select! {
            biased;
            Some(ended) = tasks.join_next() => {
                // A task that panicked is found by its closed channel.
                let gone: Vec<InstanceId> = match ended {
                    Ok(id) => vec![id],
                    Err(error) => {
                        tracing::error!(%error, "an instance's task failed");
                        running.iter().filter(|(_, o)| o.is_closed()).map(|(id, _)| *id).collect()
                    }
                };
                for id in gone {
                    running.remove(&id);
                    drop(reports.send(Report::Gone(id)));
                }
                let (logs, alive) = (node.logs.clone(), running.keys().copied().collect());
                tokio::task::spawn_blocking(move || logs.prune(&alive));
            }
            command = inbox.recv(), if !(closing && inbox.is_closed() && inbox.is_empty()) => match command {
                Some(Command::Run(assignment)) if closing => {
                    drop(reports.send(Report::Gone(assignment.instance)));
                }
                Some(Command::Run(assignment)) => {
                    let id = assignment.instance;
                    if let Some(orders) = running.get(&id) {
                        // One that has just ended does not mind.
                        drop(orders.send(Order::Deployed(assignment.deployment)));
                        continue;
                    }
                    let (orders, heard) = mpsc::unbounded_channel();
                    running.insert(id, orders);
                    tasks.spawn(supervise(Arc::clone(&node), assignment, heard, reports.clone()));
                }
                Some(Command::Order(id, order)) => {
                    let stop = matches!(order, Order::Stop);
                    let heard = running.get(&id).is_some_and(|orders| orders.send(order).is_ok());
                    if !heard && stop && !running.contains_key(&id) {
                        drop(reports.send(Report::Gone(id)));
                    }
                }
                Some(Command::Shutdown(done)) => {
                    closing = true;
                    waiting.push(done);
                    running.values().for_each(stop);
                }
                None => {
                    closing = true;
                    running.values().for_each(stop);
                }
            },
        }
    }
}

async fn supervise(
    node: Arc<Node>,
    assignment: Assignment,
    mut orders: Orders,
    reports: UnboundedSender<Report>,
) -> InstanceId {
    let mut record = Record::new(&node.name, &assignment, reports);
    match &assignment.version.launch {
        Launch::Process(spec) => {
            Process {
                node: &node,
                assignment: &assignment,
                spec,
                record: &mut record,
                orders: &mut orders,
                failures: 0,
            }
            .supervise()
            .await;
        }
        Launch::Endpoints(_) => {
            endpoint::supervise(&node, &assignment, &mut record, &mut orders).await;
            // It goes because it was asked to: that is no loss.
            record.drain();
        }
    }
    assignment.instance
}
