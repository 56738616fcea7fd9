//! An agent with real processes.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    time::Instant,
};

use tokio::sync::mpsc::unbounded_channel;

use super::*;
use crate::model::*;

/// Answers `STATUS` to everything; `/die` exits, `/close` stops listening;
/// hangs on its first `HANG` connections.
const SERVER: &str = r#"
import os, socket, sys, time
status, hang, held = os.environ.get("STATUS", "200"), int(os.environ.get("HANG", "0")), []
print("hello", flush=True)
s = socket.socket()
s.bind(("127.0.0.1", int(os.environ["PORT"])))
s.listen(128)
while True:
    c, _ = s.accept()
    if len(held) < hang:
        held.append(c)
        continue
    try:
        head = c.recv(65536).split(b" ")
    except OSError:
        continue
    path = head[1] if len(head) > 1 else b""
    if path == b"/die":
        print("dying", file=sys.stderr, flush=True)
        os._exit(3)
    if path == b"/close":
        s.close()
        c.close()
        time.sleep(1000)
    try:
        c.sendall(b"HTTP/1.1 " + status.encode() + b" X\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
    except OSError:
        pass
    c.close()
"#;

struct Rig {
    agent: Agent,
    reports: UnboundedReceiver<Report>,
    dir: tempfile::TempDir,
}

fn config(dir: &Path) -> AgentConfig {
    // Apart from other tests' ports, whichever process they run in.
    let first = 20_000 + rand::random_range(0..100_u16) * 100;
    AgentConfig {
        node: "n1".into(),
        data_dir: dir.into(),
        ports: first..=first + 99,
        user: None,
        open_files: None,
        gpus: crate::gpu::parse_declared("H100:1").unwrap(),
        forbidden: vec!["0.0.0.0:9".parse().unwrap()],
        trust: crate::dial::Trust::default(),
        kill_after: Duration::from_millis(500),
    }
}

fn rig() -> Rig {
    rig_with(|_| ())
}

fn rig_with(change: impl FnOnce(&mut AgentConfig)) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let (sender, reports) = unbounded_channel();
    let mut config = config(dir.path());
    change(&mut config);
    let agent = Agent::start(config, sender).unwrap();
    Rig {
        agent,
        reports,
        dir,
    }
}

fn assignment(launch: Launch) -> Assignment {
    let now = jiff::Timestamp::UNIX_EPOCH;
    let version = Version {
        function: FunctionId::random(),
        id: VersionId::random(),
        account: AccountId::default_account(),
        name: "echo".into(),
        description: String::new(),
        inference_url: "/".into(),
        inference_port: None,
        health: Health {
            protocol: HealthProtocol::HTTP,
            uri: "/health".into(),
            port: None,
            timeout: IsoDuration::secs(5),
            expected_status_code: 200,
        },
        launch,
        tags: vec![],
        rate_limit: None,
        kept: Default::default(),
        created_at: now,
    };
    let specification = GpuSpecification {
        id: GpuSpecificationId::random(),
        gpu: "none".into(),
        instance_type: "none".into(),
        min_instances: 1,
        max_instances: 1,
        max_request_concurrency: 3,
        kept: Default::default(),
    };
    let deployment = Deployment {
        id: DeploymentId::random(),
        function: version.function,
        version: version.id,
        autoscaling: Default::default(),
        queue: Default::default(),
        routing: Default::default(),
        traffic_weight: None,
        start_timeout: IsoDuration::secs(20),
        drain_timeout: IsoDuration::secs(20),
        cancel_timeout: IsoDuration::secs(5),
        created_at: now,
        updated_at: now,
        undeploying: false,
        specifications: vec![specification.clone()],
    };
    Assignment {
        instance: InstanceId::random(),
        version: Arc::new(version),
        deployment: Arc::new(deployment),
        specification: specification.id,
        endpoint: None,
    }
}

fn process(command: &[&str], env: &[(&str, &str)]) -> Assignment {
    assignment(Launch::Process(ProcessSpec {
        command: command.iter().map(|s| (*s).to_owned()).collect(),
        env: env
            .iter()
            .map(|(key, value)| EnvVar {
                key: (*key).into(),
                value: (*value).into(),
            })
            .collect(),
        working_dir: None,
    }))
}

fn server(env: &[(&str, &str)]) -> Assignment {
    process(&["python3", "-c", SERVER], env)
}

fn endpoint(url: String) -> Assignment {
    let mut assignment = assignment(Launch::Endpoints(vec![url.clone()]));
    assignment.endpoint = Some(url);
    assignment
}

impl Rig {
    async fn next(&mut self) -> Report {
        tokio::time::timeout(Duration::from_secs(30), self.reports.recv())
            .await
            .expect("a report in time")
            .unwrap()
    }

    async fn until(&mut self, wanted: impl Fn(&Instance) -> bool) -> Instance {
        let mut seen = Vec::new();
        loop {
            let next = tokio::time::timeout(Duration::from_secs(30), self.reports.recv()).await;
            match next {
                Ok(Some(Report::Changed(instance))) if wanted(&instance) => return instance,
                Ok(Some(other)) => seen.push(other),
                _ => panic!("no such report among {seen:#?}"),
            }
        }
    }

    async fn ready(&mut self) -> Instance {
        self.until(|i| i.state == InstanceState::Ready).await
    }

    async fn failed(&mut self) -> String {
        let instance = self.until(|i| i.state == InstanceState::Error).await;
        instance.error.unwrap()
    }

    async fn gone(&mut self, id: InstanceId) {
        while self.next().await != Report::Gone(id) {}
    }
}

/// Polls, with a deadline.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(20), "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn call(address: SocketAddr, path: &str) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Running processes with this in their environment or command.
fn marked(file: &str, mark: &str) -> usize {
    let own = std::process::id().to_string();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|e| e.file_name() != *own)
        .filter(|e| {
            let text = fs::read(e.path().join(file)).unwrap_or_default();
            text.windows(mark.len()).any(|w| w == mark.as_bytes())
        })
        .count()
}

/// The same instance, of a deployment with another concurrency and this time to start.
fn changed(assignment: &Assignment, concurrency: u32, start: Duration) -> Assignment {
    let mut changed = assignment.clone();
    let deployment = Arc::make_mut(&mut changed.deployment);
    deployment.specifications[0].max_request_concurrency = concurrency;
    deployment.start_timeout = IsoDuration(start);
    changed
}

#[tokio::test]
async fn a_changed_deployment_reaches_instances_that_run() {
    let mut rig = rig();
    let long = Duration::from_secs(600);
    let a = changed(&server(&[]), 4, long);
    rig.agent.run(a.clone());
    let ready = rig.ready().await;
    assert_eq!(ready.capacity, 4);
    for capacity in [1, 7] {
        rig.agent.run(changed(&a, capacity, long));
        let instance = rig.until(|i| i.capacity == capacity).await;
        let expected = Instance {
            capacity,
            ..ready.clone()
        };
        assert_eq!(instance, expected, "nothing else of it changes");
    }
    // A start under way has the new time too.
    let late = changed(&server(&[("STATUS", "503")]), 1, long);
    rig.agent.run(late.clone());
    rig.until(|i| i.id == late.instance && i.pid.is_some())
        .await;
    rig.agent.run(changed(&late, 1, Duration::from_millis(150)));
    let failed = rig.until(|i| i.restarts == 1).await;
    assert!(failed.error.unwrap().contains("within PT0.15S"));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let silent = changed(&endpoint(url), 1, long);
    rig.agent.run(silent.clone());
    rig.until(|i| i.id == silent.instance && i.address.is_some())
        .await;
    rig.agent.run(changed(&silent, 2, Duration::from_millis(1)));
    let failed = rig
        .until(|i| i.id == silent.instance && i.state == InstanceState::Error)
        .await;
    assert_eq!(failed.capacity, 2);
}

#[tokio::test]
async fn a_process_becomes_ready_and_goes() {
    let mut rig = rig();
    let a = server(&[]);
    rig.agent.run(a.clone());
    rig.agent.run(a.clone());
    let ready = rig.ready().await;
    assert_eq!(
        (ready.id, ready.capacity, ready.restarts),
        (a.instance, 3, 0)
    );
    assert!(ready.pid.is_some() && ready.error.is_none());
    assert!(ready.first_healthy_at.unwrap() > ready.spawned_at.unwrap());
    call(ready.address.unwrap(), "/");
    assert_eq!(rig.agent.logs(a.instance, 10).unwrap(), "hello\n");
    rig.agent.drain(a.instance);
    rig.until(|i| i.state == InstanceState::Draining).await;
    call(ready.address.unwrap(), "/");
    rig.agent.stop(a.instance);
    rig.gone(a.instance).await;
    assert!(!Path::new(&format!("/proc/{}", ready.pid.unwrap())).exists());
    assert_eq!(rig.agent.logs(a.instance, 10).unwrap(), "hello\n");
    // Once more: it is gone still.
    rig.agent.stop(a.instance);
    rig.gone(a.instance).await;
}

#[tokio::test]
async fn the_environment_is_what_is_specified() {
    let mut rig = rig();
    let script = "tr '\\0' '\\n' </proc/self/environ; echo END; id -u; id -G; pwd; cut -d' ' -f5 /proc/$$/stat; echo $$; exec sleep 1000";
    let env = [
        ("A", "b c"),
        ("PORT", "1"),
        ("WEIR_AGENT", "x"),
        ("PORT=1", "x"),
        ("CUDA_VISIBLE_DEVICES", "0,1"),
        ("NVCF_NCA_ID", "other"),
        ("LANG", "de"),
    ];
    let a = process(&["sh", "-c", script], &env);
    rig.agent.run(a.clone());
    let port = rig.until(|i| i.pid.is_some()).await.address.unwrap().port();
    let log = || rig.agent.logs(a.instance, 100).unwrap_or_default();
    eventually("all lines", || {
        log().lines().skip_while(|l| *l != "END").count() == 6
    })
    .await;
    let log = log();
    let (environ, rest) = log.split_once("END\n").unwrap();
    let entries: BTreeSet<(&str, &str)> =
        environ.lines().filter_map(|l| l.split_once('=')).collect();
    // The shell adds PWD for its children, and some shells more.
    let shell = ["PWD", "OLDPWD", "SHLVL", "_"];
    let keys: Vec<&str> = entries
        .iter()
        .map(|(k, _)| *k)
        .filter(|k| !shell.contains(k))
        .collect();
    assert_eq!(
        keys,
        [
            "A",
            "CUDA_VISIBLE_DEVICES",
            "HOME",
            "LANG",
            "NVCF_BACKEND",
            "NVCF_ENV",
            "NVCF_FUNCTION_ID",
            "NVCF_FUNCTION_NAME",
            "NVCF_FUNCTION_VERSION_ID",
            "NVCF_INSTANCETYPE",
            "NVCF_NCA_ID",
            "NVCF_REGION",
            "PATH",
            "PORT",
            "TMPDIR",
            "WEIR_AGENT",
            "WEIR_INSTANCE_ID",
        ]
    );
    for (key, value) in [
        ("A", "b c"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("LANG", "de"),
        ("PORT", &port.to_string()),
        ("NVCF_FUNCTION_ID", &a.version.function.to_string()),
        ("NVCF_NCA_ID", "default"),
        ("WEIR_INSTANCE_ID", &a.instance.to_string()),
    ] {
        assert!(entries.contains(&(key, value)), "{key}: {entries:?}");
    }
    let rest: Vec<&str> = rest.lines().collect();
    if spawn::is_root() {
        let nobody = spawn::user("nobody").unwrap();
        assert_eq!(rest[0], nobody.uid.to_string());
        assert_eq!(rest[1], nobody.gid.to_string());
    } else {
        assert_eq!(
            rest[2],
            rig.dir.path().canonicalize().unwrap().to_str().unwrap()
        );
    }
    assert_eq!(rest[3], rest[4], "a process group of its own");
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn an_instance_has_the_limit_of_files_that_weir_was_started_with() {
    let mut rig = rig_with(|c| c.open_files = Some(77));
    let a = process(
        &["sh", "-c", "ulimit -Sn; ulimit -Hn; exec sleep 1000"],
        &[],
    );
    rig.agent.run(a.clone());
    rig.until(|i| i.pid.is_some()).await;
    let log = || rig.agent.logs(a.instance, 2).unwrap_or_default();
    eventually("both lines", || log().lines().count() == 2).await;
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let hard = hard.map_or_else(|| "unlimited".to_owned(), |n| n.to_string());
    assert_eq!(log(), format!("77\n{hard}\n"));
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn what_the_agent_keeps_is_nobody_elses() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("made");
    let agent = Agent::start(config(&dir), unbounded_channel().0).unwrap();
    let mode = |path: &Path| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode(&dir), 0o700);
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let wanted = [0o600, 0o700][usize::from(path.is_dir())];
        assert_eq!(mode(&path), wanted, "{}", path.display());
        files.insert(path.file_name().unwrap().to_owned());
    }
    assert!(
        files.contains(std::ffi::OsStr::new("agent.lock")),
        "{files:?}"
    );
    assert!(
        files.contains(std::ffi::OsStr::new("agent-id")),
        "{files:?}"
    );
    agent.shutdown().await;
}

#[tokio::test]
async fn a_port_that_never_opens_is_an_error() {
    let mut rig = rig();
    let mut a = process(&["sleep", "1000"], &[]);
    Arc::make_mut(&mut a.deployment).start_timeout = IsoDuration(Duration::from_millis(150));
    rig.agent.run(a.clone());
    let error = rig.failed().await;
    assert!(
        error.starts_with("did not become ready within PT0.15S; last probe of http://127.0.0.1:")
            && error.contains(": connection refused; it has to listen on $PORT"),
        "{error}"
    );
    rig.agent.shutdown().await;
    rig.gone(a.instance).await;
}

#[tokio::test]
async fn health_with_another_status_is_an_error() {
    let mut rig = rig();
    let mut a = server(&[("STATUS", "500")]);
    Arc::make_mut(&mut a.deployment).start_timeout = IsoDuration(Duration::from_millis(1500));
    rig.agent.run(a);
    let error = rig.until(|i| i.restarts == 1).await.error.unwrap();
    assert!(
        error.starts_with("did not become ready within PT1.5S; last probe of http://127.0.0.1:")
            && error.contains(": status 500 and not 200; "),
        "{error}"
    );
    rig.agent.shutdown().await;
}

/// Answers 200 to everything until the process ends or it is told to stop.
fn stand_in() -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    (address, tokio::spawn(stand_in_on(listener)))
}

async fn stand_in_on(listener: TcpListener) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await;
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .await;
    }
}

#[tokio::test]
async fn a_stranger_on_the_port_is_an_error() {
    let mut rig = rig();
    let (address, _stranger) = stand_in();
    let mut a = process(&["sleep", "1000"], &[]);
    Arc::make_mut(&mut a.version).inference_port = Some(address.port());
    rig.agent.run(a);
    let port = address.port();
    let error = format!("port {port} is held by a process that is not this instance's");
    let failed = rig.failed().await;
    assert!(failed.starts_with(&error), "{failed}");
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn a_crash_restarts_with_another_port() {
    let mut rig = rig();
    let a = server(&[]);
    rig.agent.run(a.clone());
    let first = rig.ready().await;
    call(first.address.unwrap(), "/die");
    let down = rig.until(|i| i.state != InstanceState::Ready).await;
    assert_eq!(down.state, InstanceState::Starting);
    let down = rig.until(|i| i.restarts == 1).await;
    assert_eq!(down.error.unwrap(), "exited with status 3");
    assert_eq!(down.last_log_line.unwrap(), "dying");
    let second = rig.ready().await;
    assert_eq!(
        (&second.error, &second.failure, &second.last_log_line),
        (&None, &None, &None)
    );
    assert_ne!(first.pid, second.pid);
    assert_ne!(first.address, second.address);
    assert_eq!((second.id, second.restarts), (a.instance, 1));
    call(second.address.unwrap(), "/die");
    let began = Instant::now();
    rig.until(|i| i.restarts == 2).await;
    rig.until(|i| i.pid.is_some()).await;
    assert!(began.elapsed() >= Duration::from_millis(150));
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn a_crash_loop_becomes_an_error() {
    let mut rig = rig();
    let a = process(&["sh", "-c", "echo secret; echo; exit 7"], &[]);
    rig.agent.run(a);
    let failed = rig.until(|i| i.state == InstanceState::Error).await;
    assert_eq!(failed.restarts, 3);
    assert_eq!(failed.error.unwrap(), "exited with status 7");
    assert_eq!(failed.failure.unwrap(), "exited with status 7");
    assert_eq!(failed.last_log_line.unwrap(), "secret");
    assert_eq!((failed.pid, failed.address), (None, None));
    // It goes on trying, and stays an error meanwhile.
    assert_eq!(
        rig.until(|i| i.pid.is_some()).await.state,
        InstanceState::Error
    );
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error_at_once() {
    let mut rig = rig();
    rig.agent.run(process(&["/no/such/program"], &[]));
    let failed = rig.until(|i| i.state == InstanceState::Error).await;
    assert_eq!(failed.restarts, 1);
    assert_eq!(failed.failure.unwrap(), "it could not be started");
    let error = failed.error.unwrap();
    assert!(
        error.starts_with("cannot start '/no/such/program': No such file"),
        "{error}"
    );
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn a_user_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.user = Some("no-such-user".into());
    let started = Agent::start(config, unbounded_channel().0);
    if spawn::is_root() {
        let error = started.err().unwrap().to_string();
        assert!(
            error.contains("the user 'no-such-user'") && error.contains("does not exist"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn the_whole_group_dies_on_stop() {
    let mut rig = rig();
    let script = format!(
        "sleep 1000 & (trap '' TERM; sleep 1000; sleep 1000) & setsid sleep 1000 & exec python3 -c '{SERVER}'"
    );
    let a = process(&["sh", "-c", &script], &[]);
    rig.agent.run(a.clone());
    rig.ready().await;
    let mark = format!("WEIR_INSTANCE_ID={}", a.instance);
    eventually("all are there", || marked("environ", &mark) >= 5).await;
    rig.agent.stop(a.instance);
    rig.gone(a.instance).await;
    assert_eq!(marked("environ", &mark), 0);
}

/// Processes that run this command.
fn running(command: &str) -> usize {
    marked("cmdline", &command.replace(' ', "\0"))
}

#[tokio::test]
async fn what_leaves_the_group_without_its_environment_dies_too() {
    let mut rig = rig();
    let dir = rig.dir.path().canonicalize().unwrap();
    let id = fs::read_to_string(dir.join("agent-id")).unwrap();
    if cgroup::Groups::open(&id).is_none() {
        eprintln!("skipped: no cgroup v2 that could be divided");
        return;
    }
    // A number of seconds that no other process sleeps for.
    let escaped = format!("sleep 10{}", rand::random_range(100_000..1_000_000));
    let script = format!("(env -i setsid {escaped} &); exec python3 -c '{SERVER}'");
    let a = process(&["sh", "-c", &script], &[]);
    rig.agent.run(a.clone());
    let ready = rig.ready().await;
    eventually("it has escaped", || running(&escaped) == 1).await;
    // With every restart too.
    call(ready.address.unwrap(), "/die");
    rig.until(|i| i.restarts == 1).await;
    rig.ready().await;
    eventually("there is one again", || running(&escaped) == 1).await;
    rig.agent.stop(a.instance);
    rig.gone(a.instance).await;
    assert_eq!(running(&escaped), 0);
    rig.agent.shutdown().await;
}

/// Not a test by itself: the agent that the next test kills.
#[tokio::test]
async fn agent_to_be_killed() {
    let Some(dir) = std::env::var_os("AGENT_TO_BE_KILLED") else {
        return;
    };
    let (sender, reports) = unbounded_channel();
    let mut rig = Rig {
        agent: Agent::start(config(Path::new(&dir)), sender).unwrap(),
        reports,
        dir: tempfile::tempdir().unwrap(),
    };
    // With groups, one has no mark of its instance.
    let node = Path::new(&dir).canonicalize().unwrap();
    let id = fs::read_to_string(node.join("agent-id")).unwrap();
    let clean = cgroup::Groups::open(&id).map_or("", |_| "env -i");
    let escaped = std::env::var("ESCAPED").unwrap();
    let script =
        format!("setsid sleep 1000 & {clean} setsid {escaped} & exec python3 -c '{SERVER}'");
    let a = process(&["sh", "-c", &script], &[]);
    rig.agent.run(a.clone());
    let ready = rig.ready().await;
    eventually("it has escaped", || running(&escaped) == 1).await;
    fs::write(
        Path::new(&dir).join("said.new"),
        format!("{} {}", ready.pid.unwrap(), a.instance),
    )
    .unwrap();
    fs::rename(
        Path::new(&dir).join("said.new"),
        Path::new(&dir).join("said"),
    )
    .unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_killed_agent_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let escaped = format!("sleep 10{}", rand::random_range(100_000..1_000_000));
    let mut agent = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "agent::tests::agent_to_be_killed"])
        .env("AGENT_TO_BE_KILLED", dir.path())
        .env("ESCAPED", &escaped)
        .stdout(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let said = dir.path().join("said");
    eventually("it runs", || said.exists()).await;
    let said = fs::read_to_string(said).unwrap();
    let (pid, instance) = said.split_once(' ').unwrap();
    let mark = format!("WEIR_INSTANCE_ID={instance}");
    assert!(matches!(
        Agent::start(config(dir.path()), unbounded_channel().0),
        Err(AgentError::InUse { .. })
    ));
    // Another agent on the machine leaves them alone.
    let other = rig();
    other.agent.shutdown().await;
    assert!(marked("environ", &mark) >= 2);
    agent.kill().await.unwrap();
    let pid: i32 = pid.parse().unwrap();
    eventually("the child is dead", || !procs::group_alive(pid)).await;
    assert!(
        marked("environ", &mark) >= 1 && running(&escaped) == 1,
        "what left the group survives"
    );
    let (sender, reports) = unbounded_channel();
    let agent = Agent::start(config(dir.path()), sender).unwrap();
    eventually("that is dead too", || {
        marked("environ", &mark) == 0 && running(&escaped) == 0
    })
    .await;
    drop((agent, reports));
}

/// Not a test by itself: what the next test runs as PID 1.
#[tokio::test]
async fn agent_as_pid_1() {
    let Some(dir) = std::env::var_os("AGENT_AS_PID_1") else {
        return;
    };
    assert_eq!(std::process::id(), 1);
    let (sender, reports) = unbounded_channel();
    let mut rig = Rig {
        agent: Agent::start(config(Path::new(&dir)), sender).unwrap(),
        reports,
        dir: tempfile::tempdir().unwrap(),
    };
    let orphans = "for i in 1 2 3 4 5 6; do (setsid sleep 0.01 &); done; exec sleep 1000";
    let a = process(&["sh", "-c", orphans], &[]);
    let b = process(&["sh", "-c", "exit 7"], &[]);
    rig.agent.run(a.clone());
    rig.agent.run(b.clone());
    // The status of its own child is not taken from it.
    rig.until(|i| i.error.as_deref() == Some("exited with status 7"))
        .await;
    eventually("all are reaped", || {
        let of = |file: &str| marked(file, "sleep");
        of("cmdline") == 1 && of("stat") == 1
    })
    .await;
    rig.agent.stop(a.instance);
    rig.gone(a.instance).await;
    rig.agent.shutdown().await;
    fs::write(Path::new(&dir).join("passed"), "").unwrap();
}

#[tokio::test]
async fn as_pid_1_it_reaps_orphans_and_needs_no_process_group() {
    if !spawn::is_root() {
        eprintln!("skipped: a PID namespace takes root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // No `setsid`: its group is outside of the namespace, and so it has none.
    let output = tokio::process::Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "agent::tests::agent_as_pid_1", "--nocapture"])
        .env("AGENT_AS_PID_1", dir.path())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(dir.path().join("passed").exists(), "{said}");
}

#[tokio::test]
async fn a_suspected_process_leaves_ready_and_restarts() {
    let mut rig = rig();
    let a = server(&[]);
    rig.agent.run(a.clone());
    let first = rig.ready().await;
    // A suspicion that is wrong changes nothing.
    rig.agent.suspect(a.instance);
    call(first.address.unwrap(), "/close");
    let began = Instant::now();
    rig.agent.suspect(a.instance);
    // Refused, or reset if the first suspicion's probe was under way.
    let error = rig.failed().await;
    assert!(error.starts_with("health check failed: "), "{error}");
    assert!(began.elapsed() < Duration::from_millis(500));
    let second = rig.ready().await;
    assert_ne!(first.pid, second.pid);
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn a_probe_that_hangs_does_not_delay_the_next() {
    let mut rig = rig();
    let a = server(&[("HANG", "20")]);
    rig.agent.run(a);
    let ready = rig.ready().await;
    let took = ready
        .first_healthy_at
        .unwrap()
        .duration_since(ready.spawned_at.unwrap());
    assert!(took.as_millis() < 3000, "{took:?}");
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn endpoints_are_ready_and_down() {
    let mut rig = rig();
    let (address, server) = stand_in();
    let a = endpoint(format!("http://{address}"));
    rig.agent.run(a.clone());
    let ready = rig.ready().await;
    assert_eq!((ready.address, ready.pid), (Some(address), None));
    server.abort();
    assert!(server.await.is_err());
    rig.agent.suspect(a.instance);
    assert_eq!(
        rig.failed().await,
        "health check failed: connection refused"
    );
    let listener = TcpListener::bind(address).unwrap();
    listener.set_nonblocking(true).unwrap();
    let server = tokio::spawn(stand_in_on(listener));
    rig.ready().await;
    server.abort();
    // Without a suspicion, its health check says so.
    let error = rig.failed().await;
    assert!(error.starts_with("health check failed: "), "{error}");
    let ill = "health check failed 3 times in a row: connection refused";
    rig.until(|i| i.error.as_deref() == Some(ill)).await;
    rig.agent.stop(a.instance);
    rig.gone(a.instance).await;
}

#[tokio::test]
async fn endpoints_that_must_not_be_named_are_refused() {
    let mut rig = rig_with(|c| c.ports = 20_000..=29_999);
    for (url, why) in [
        ("http://169.254.169.254:80", "link-local"),
        ("http://[fe80::1]:80", "link-local"),
        ("http://127.0.0.1:9", "Weir's own listeners"),
        ("http://localhost:20001", "this machine's own instances"),
        ("http://127.0.0.1:20001", "this machine's own instances"),
        // Asked for its health there.
        ("http://127.0.0.1:7", "127.0.0.1:29999 is among the ports"),
        ("https://127.0.0.1:9", "Weir's own listeners"),
        ("ftp://x", "not an endpoint"),
    ] {
        let mut a = endpoint(url.to_owned());
        if url.ends_with(":7") {
            Arc::make_mut(&mut a.version).health.port = Some(29_999);
        }
        rig.agent.run(a.clone());
        let error = rig.failed().await;
        assert!(error.contains(why), "{error}");
        rig.agent.stop(a.instance);
        rig.gone(a.instance).await;
    }
}

#[tokio::test]
async fn devices_are_leased_and_waited_for() {
    let mut rig = rig();
    let with_gpu = || {
        let mut a = server(&[]);
        let deployment = Arc::make_mut(&mut a.deployment);
        deployment.specifications[0].gpu = "H100".into();
        a
    };
    let (a, b) = (with_gpu(), with_gpu());
    rig.agent.run(a.clone());
    assert_eq!(rig.ready().await.gpus, [0]);
    rig.agent.run(b.clone());
    assert_eq!(
        rig.failed().await,
        "no free GPU of type H100 on node n1 (have H100: 0 of 1 free)"
    );
    rig.agent.stop(a.instance);
    let ready = rig.ready().await;
    assert_eq!((ready.id, ready.gpus), (b.instance, vec![0]));
    rig.agent.shutdown().await;
}

#[tokio::test]
async fn a_draining_process_that_ends_is_gone() {
    let mut rig = rig();
    let a = server(&[]);
    rig.agent.run(a.clone());
    let ready = rig.ready().await;
    rig.agent.drain(a.instance);
    rig.until(|i| i.state == InstanceState::Draining).await;
    call(ready.address.unwrap(), "/die");
    rig.gone(a.instance).await;
}
