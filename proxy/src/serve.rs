//! `weir serve`: joins the parts into a running process, and stops it in
//! order. The one place where concrete things meet.

use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::ExitCode,
    sync::{Arc, atomic::AtomicUsize},
    thread,
    time::Duration,
};

use anyhow::Context;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use weir_control::{
    agent::{Agent, AgentConfig, LogOwner},
    api, auth,
    controller::{Controller, Decisions, Slots},
    coordination::{Coordination, Load, Member, local::Local, take_part},
    dial::Trust,
    directory::Directory,
    gpu,
    model::{FunctionId, InstanceId, VersionId},
    private,
    scale::Sample,
    store::{Store, embedded::Embedded},
};

use crate::{
    access_log::AccessLog,
    admin::Admin,
    args::{self, Auth, ServeArgs},
    core::{Core, Keys, RetryBudget, Settings, Stopping},
    limit::Limits,
    measured::Measured,
    metrics::{Listener, Metrics, ProcessMetrics},
    observe::{Observed, health_routes, upkeep},
    server::{self, Desk},
    table::Table,
    tls::{self, Certificates, Files},
    trace::Traces,
    upstream::Times,
};

const NODE: &str = "local";

/// Least time for lines and traces to get out at the end.
const FLUSH: Duration = Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT, and then as long as the grace allows.
pub fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let open_files = raise_file_limit();
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run(args, open_files))
}

/// `open_files`: the limit that Weir was started with.
async fn run(args: &ServeArgs, open_files: Option<u64>) -> anyhow::Result<ExitCode> {
    // A file that may not grow is an error of whoever writes it, not the end of the process.
    let _heard = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?;
    private::directory(&args.data_dir).with_context(|| {
        format!(
            "the data directory '{}' can't be used: name another with --data-dir, one that weir's user may write to",
            args.data_dir.display()
        )
    })?;
    // Absolute: instances start elsewhere.
    let data_dir = fs::canonicalize(&args.data_dir)?;
    let data = listen(args.listen)?;
    let admin = listen(args.admin)?;
    let (listen, admin_address) = (data.local_addr()?, admin.local_addr()?);

    let data_certificates = certificates(args.tls.data())?;
    let admin_certificates = certificates(args.tls.admin())?;
    let trust = match &args.tls.instance_ca {
        Some(file) => Trust::adding(file).context("--instance-ca")?,
        None => Trust::default(),
    };

    let metrics = Metrics::new()?;
    let process = Arc::new(metrics.process());
    let store: Arc<dyn Store> = Embedded::open(&data_dir.join("weir.redb"))?;
    let store: Arc<dyn Store> = Arc::new(Measured::new(store, process.clone()));
    let admin_key =
        auth::ensure_admin_key(&*store, &data_dir, std::env::var("WEIR_ADMIN_KEY").ok()).await?;
    let (directory, feed) = Directory::load(&*store).await?;

    let coordination: Arc<dyn Coordination> = Arc::new(Local::default());
    let (signal_sender, signals) = mpsc::unbounded_channel();
    let table = Table::new(metrics.clone(), signal_sender);
    table.follow(&directory);
    let slots = Arc::new(TableSlots(table.clone()));
    let member: Arc<dyn Member> = coordination.join(NODE, slots.clone()).await?.into();

    let gpus = match &args.gpus {
        Some(declared) => gpu::parse_declared(&declared.to_string())?,
        None => gpu::discover(),
    };
    let (report_sender, reports) = mpsc::unbounded_channel();
    let agent = Agent::start(
        AgentConfig {
            node: NODE.into(),
            data_dir: data_dir.clone(),
            ports: args.instance_ports.clone(),
            user: args.instance_user.clone(),
            open_files,
            gpus: gpus.clone(),
            forbidden: vec![listen, admin_address],
            trust: trust.clone(),
            kill_after: AgentConfig::KILL_AFTER,
        },
        report_sender,
    )?;

    let (stop, stopping) = watch::channel(Stopping::No);
    let follower = {
        let (store, directory) = (store.clone(), directory.clone());
        tokio::spawn(async move { directory.follow(&*store, feed).await })
    };
    let instances = {
        let (directory, watch) = (directory.clone(), coordination.watch().await?);
        tokio::spawn(async move { directory.follow_instances(watch).await })
    };
    let decisions = {
        let table = table.clone();
        Arc::new(Decisions::new(move |version, decision| {
            if let Some(deployed) = table.deployed(version) {
                deployed.metrics.decided(decision.reason);
            }
        }))
    };
    let controller = Controller::new(
        store.clone(),
        directory.clone(),
        coordination.clone(),
        slots,
        agent.clone(),
        decisions.clone(),
    );
    let controlling = {
        let member = member.clone();
        tokio::spawn(async move {
            member.lead().await?;
            controller.run().await
        })
    };
    let control = controlling.abort_handle();
    let heard = coordination.signals();
    let taking_part = tokio::spawn(take_part(member, agent.clone(), reports, signals, heard));
    let mut shown = Vec::new();
    for (listener, certificates) in [
        (Listener::Data, &data_certificates),
        (Listener::Admin, &admin_certificates),
    ] {
        if let Some(certificates) = certificates {
            tokio::spawn(certificates.clone().follow());
            shown.push((metrics.certificate_expiry(listener), certificates.clone()));
        }
    }
    let limits = Arc::new(Limits::default());
    let connections = Arc::new(AtomicUsize::new(0));
    let observed = Arc::new(Observed {
        metrics,
        process: process.clone(),
        table: table.clone(),
        directory: directory.clone(),
        connections: connections.clone(),
        certificates: shown,
    });
    let upkeep = tokio::spawn(upkeep(observed.clone(), limits.clone()));

    let open_key = (args.auth == Auth::None).then(|| {
        Arc::new(auth::admin_key(
            auth::ENVIRONMENT_KEY,
            auth::hash(auth::generate().expose()),
        ))
    });
    let context = Arc::new(api::Context {
        store,
        directory: directory.clone(),
        runtime: Arc::new(Facts {
            table: table.clone(),
            agent: agent.clone(),
            decisions,
            gpus,
        }),
        admin: admin_key.key.clone(),
        open: args.auth == Auth::None,
        listeners: vec![listen, admin_address],
        max_functions: args.limits.max_functions.get(),
        instance_ports: args.instance_ports.clone(),
    });
    let router = api::router(context).merge(health_routes(observed, stopping.clone()));
    let least = args.tls.tls_min_version;
    let admin_scheme = scheme(admin_certificates.as_ref());
    let admin_tls = admin_certificates.map(|certificates| tls::acceptor(certificates, least));
    let administration = Admin {
        router,
        tls: admin_tls.transpose()?,
        head_timeout: args.limits.head_timeout.0,
        idle_timeout: args.limits.idle_timeout.0,
        handshakes_failed: process.handshakes_failed(Listener::Admin).clone(),
    };
    let (ended_sender, administration_ended) = oneshot::channel();
    let admin_runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    thread::Builder::new().name("admin".into()).spawn(move || {
        let ended = admin_runtime.block_on(administration.serve(admin));
        // Without a listener Weir is stopping.
        _ = ended_sender.send(ended);
    })?;

    let log = access_log(args, &process)?;
    let traces = match args.traces_endpoint()? {
        Some(url) => Traces::to(&url, args.trace_sample, process.traces_dropped.clone())?,
        None => Traces::off(),
    };
    let allowed = &args.limits;
    let settings = Arc::new(Settings {
        max_head: allowed.max_head,
        max_fields: allowed.max_fields.get(),
        max_uri: allowed.max_uri,
        max_body: allowed.max_body,
        head_timeout: allowed.head_timeout.0,
        idle_timeout: allowed.idle_timeout.0,
        instances: Times {
            connect: allowed.connect_timeout.0,
            idle: allowed.instance_idle_timeout.0,
        },
        request_timeout: allowed.request_timeout.0,
        h2_streams: allowed.h2_streams.get(),
        h2_window: allowed.h2_window,
    });
    let data_scheme = scheme(data_certificates.as_ref());
    let data_tls = data_certificates
        .map(|certificates| tls::acceptor(certificates, least))
        .transpose()?;
    let open_connections = TaskTracker::new();
    let mut desks = Vec::new();
    let mut cores = Vec::new();
    for index in 0..args.cores() {
        let (sender, inbox) = mpsc::unbounded_channel();
        let open = Arc::new(AtomicUsize::new(0));
        desks.push(Desk {
            connections: sender,
            open: open.clone(),
        });
        let core_runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let core = Arc::new(Core {
            index,
            table: table.clone(),
            keys: Keys {
                directory: directory.clone(),
                admin: admin_key.key.clone(),
                open: open_key.clone(),
            },
            limits: limits.clone(),
            budget: RetryBudget::default(),
            log: log.clone(),
            traces: traces.clone(),
            metrics: process.clone(),
            settings: settings.clone(),
            tls: data_tls.clone(),
            trust: trust.clone(),
            open,
            stopping: stopping.clone(),
            over: CancellationToken::new(),
            runtime: core_runtime.handle().clone(),
        });
        let (open, connections) = (open_connections.clone(), connections.clone());
        let thread = thread::Builder::new()
            .name(format!("core-{index}"))
            .spawn(move || core_runtime.block_on(server::serve(core, inbox, open, connections)))?;
        cores.push(thread);
    }
    let accepting = tokio::spawn(server::accept(
        data,
        desks,
        allowed.max_connections(),
        connections,
        stopping.clone(),
    ));
    announce(
        &format!("{data_scheme}://{listen}"),
        &format!("{admin_scheme}://{admin_address}"),
        admin_key.file.as_deref(),
    );

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // A part that ends by itself has failed: better to stop loudly than to serve without it.
    let broken = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = follower => Some(format!("the control state's feed ended: {ended:?}")),
        ended = instances => Some(format!("what the instances do is not heard any more: {ended:?}")),
        ended = taking_part => Some(format!("this process can't tell the others of itself: {ended:?}")),
        ended = controlling => Some(format!("the controller ended: {ended:?}")),
        ended = upkeep => Some(format!("the metrics' task ended: {ended:?}")),
        ended = accepting => Some(format!("the data listener ended: {ended:?}")),
        ended = administration_ended => Some(format!("the admin listener ended: {ended:?}")),
    };
    if let Some(why) = &broken {
        tracing::error!("{why}");
    }

    health_says_stopping(&stop);
    if broken.is_none() {
        sleep(args.drain_delay.0).await;
    }
    stop.send_replace(Stopping::Draining);
    let grace_over = Instant::now() + args.grace.0;
    let (done_sender, mut done) = mpsc::channel::<()>(1);
    let joiner = thread::Builder::new().name("join".into()).spawn(move || {
        for core in cores {
            _ = core.join();
        }
        drop(done_sender);
    })?;
    tokio::select! {
        _ = timeout(args.grace.0, done.recv()) => {}
        _ = interrupt.recv() => {}
    }
    for deployed in table.all_deployed() {
        deployed.queue.close("Weir is stopping".into());
    }
    stop.send_replace(Stopping::Now);
    _ = timeout(Duration::from_secs(2), done.recv()).await;
    drop(joiner);
    // First: it would start anew what the agent stops, and a closing agent answers that it is gone.
    control.abort();
    let left = grace_over.saturating_duration_since(Instant::now());
    _ = tokio::join!(
        timeout(Duration::from_secs(15), agent.shutdown()),
        timeout(FLUSH, log.flush()),
        traces.close(left.clamp(FLUSH, 5 * FLUSH)),
    );
    Ok(if broken.is_some() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Opens it where `--access-log` says.
fn access_log(args: &ServeArgs, metrics: &ProcessMetrics) -> anyhow::Result<AccessLog> {
    let (format, dropped) = (args.access_log_format, metrics.log_dropped.clone());
    let log = match &args.access_log {
        args::AccessLog::Off => AccessLog::off(),
        args::AccessLog::Stdout => AccessLog::to(std::io::stdout(), format, dropped)?,
        args::AccessLog::File(path) => {
            let file = fs::OpenOptions::new().create(true).append(true).open(path);
            let file = file.with_context(|| {
                format!(
                    "the access log '{}' can't be written: give --access-log a file in a directory that is there and that weir's user may write to",
                    path.display()
                )
            })?;
            AccessLog::to(file, format, dropped)?
        }
    };
    Ok(log)
}

/// `/readyz` turns to 503 before anything stops, so that balancers in front look elsewhere.
fn health_says_stopping(stop: &watch::Sender<Stopping>) {
    stop.send_if_modified(|stage| {
        let before = *stage;
        *stage = before.max(Stopping::Announced);
        before != *stage
    });
}

/// A listener whose backlog holds a burst.
fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let open = || -> std::io::Result<TcpListener> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM.cloexec(),
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    };
    open().map_err(|error| {
        use std::io::ErrorKind;
        let advice = match error.kind() {
            ErrorKind::AddrInUse => {
                "is another weir running there? Stop it, or choose another port"
            }
            ErrorKind::AddrNotAvailable => {
                "this machine has no such address: choose one of its own, or 0.0.0.0"
            }
            ErrorKind::PermissionDenied => {
                "ports below 1024 are for root: choose a higher one, or give weir CAP_NET_BIND_SERVICE"
            }
            _ => "choose another address",
        };
        anyhow::Error::new(error).context(format!("can't listen on {address}: {advice}"))
    })
}

/// As many open files as the hard limit allows: a connection is one. Answers what the limit was.
fn raise_file_limit() -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    );
    limit.current
}

/// None where there are no files: no TLS.
fn certificates(files: Vec<Files>) -> anyhow::Result<Option<Arc<Certificates>>> {
    (!files.is_empty())
        .then(|| Certificates::load(files))
        .transpose()
}

fn scheme(certificates: Option<&Arc<Certificates>>) -> &'static str {
    certificates.map_or("http", |_| "https")
}

fn announce(data: &str, admin: &str, key: Option<&Path>) {
    let key = key
        .map(|path| format!(", admin key in {}", path.display()))
        .unwrap_or_default();
    tracing::info!("serving invocations on {data}, the API on {admin}{key}");
    _ = std::io::stderr().flush();
}

/// The queues, as the controller sees them.
struct TableSlots(Arc<Table>);

impl Load for TableSlots {
    fn sample(&self, version: VersionId) -> Option<Sample> {
        let load = self.0.deployed(version)?.queue.load();
        Some(Sample {
            at: load.clock,
            area: load.busy_area,
            arrivals: load.arrivals,
            in_system: u32::try_from(load.queued + load.busy).unwrap_or(u32::MAX),
            queued: u32::try_from(load.queued).unwrap_or(u32::MAX),
        })
    }

    fn versions(&self) -> Vec<VersionId> {
        let deployed = self.0.all_deployed();
        deployed.iter().map(|deployed| deployed.version).collect()
    }
}

impl Slots for TableSlots {
    fn retire_if_idle(&self, version: VersionId, instance: InstanceId) -> bool {
        let deployed = self.0.deployed(version);
        deployed.is_none_or(|deployed| deployed.retire_if_idle(instance))
    }

    fn drain(&self, version: VersionId, instance: InstanceId) {
        if let Some(deployed) = self.0.deployed(version) {
            deployed.queue.drain_instance(instance.0.as_u128());
        }
    }
}

/// What the API asks of the running parts.
struct Facts {
    table: Arc<Table>,
    agent: Agent,
    decisions: Arc<Decisions>,
    gpus: Vec<gpu::Gpu>,
}

impl api::Runtime for Facts {
    fn queue_depth(&self, version: VersionId) -> usize {
        self.table
            .deployed(version)
            .map_or(0, |deployed| deployed.queue.load().queued)
    }
    fn in_flight(&self, version: VersionId) -> usize {
        self.table
            .deployed(version)
            .map_or(0, |deployed| deployed.queue.load().busy)
    }
    fn position(&self, request: Uuid) -> Option<(FunctionId, VersionId, usize)> {
        let (function, version, before) = self.table.position(request)?;
        Some((function, version, before + 1))
    }
    fn logs(&self, instance: InstanceId, tail: usize) -> Option<String> {
        self.agent.logs(instance, tail)
    }
    fn log_owner(&self, instance: InstanceId) -> Option<LogOwner> {
        self.agent.log_owner(instance)
    }
    fn decisions(&self, version: VersionId) -> Vec<serde_json::Value> {
        let decisions = self.decisions.of(version);
        decisions
            .iter()
            .filter_map(|decided| serde_json::to_value(decided).ok())
            .collect()
    }
    fn nodes(&self) -> Vec<serde_json::Value> {
        let gpus: Vec<_> = self
            .gpus
            .iter()
            .map(|gpu| serde_json::json!({ "index": gpu.index, "name": gpu.model, "uuid": gpu.uuid }))
            .collect();
        vec![serde_json::json!({ "name": NODE, "gpus": gpus })]
    }
    fn gpus(&self) -> Vec<(String, u32)> {
        let mut counts: Vec<(String, u32)> = Vec::new();
        for gpu in &self.gpus {
            match counts.iter_mut().find(|(model, _)| *model == gpu.model) {
                Some((_, count)) => *count += 1,
                None => counts.push((gpu.model.clone(), 1)),
            }
        }
        counts
    }
}
