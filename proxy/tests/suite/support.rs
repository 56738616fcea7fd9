//! Servers of the real binary, each with its own directory and ports, and what
//! tests ask of them.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use rand::{SeedableRng, rngs::StdRng};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::instance;

pub(crate) const WEIR: &str = env!("CARGO_BIN_EXE_weir");
/// For what should take milliseconds, on a machine that has other things to do.
pub(crate) const SOON: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(10);

/// A range of ports that no other test on this machine uses.
struct Ports {
    first: u16,
    /// Locked as long as it is open, whichever process opened it.
    _lock: File,
}

impl Ports {
    const EACH: u16 = 40;
    /// Below those that the system gives away by itself.
    const FIRST: u16 = 12_000;
    const RANGES: u16 = 500;

    fn claim() -> Self {
        let locks = std::env::temp_dir().join("weir-suite-ports");
        fs::create_dir_all(&locks).unwrap();
        let start = std::process::id() % u32::from(Self::RANGES);
        let start = u16::try_from(start).unwrap();
        for i in 0..Self::RANGES {
            let range = (start + i) % Self::RANGES;
            let lock = File::create(locks.join(range.to_string())).unwrap();
            if lock.try_lock().is_ok() {
                return Self {
                    first: Self::FIRST + range * Self::EACH,
                    _lock: lock,
                };
            }
        }
        panic!("all ranges of ports are in use");
    }
}

/// A running `weir serve`; killed when dropped.
pub(crate) struct Server {
    child: Child,
    flags: Vec<String>,
    environment: Vec<(String, String)>,
    ports: Ports,
    directory: TempDir,
    log: Arc<Mutex<String>>,
    pub(crate) data: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) key: String,
    pub(crate) http: reqwest::Client,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    pub(crate) fn with(flags: &[&str]) -> Self {
        Self::made(&std::env::temp_dir(), flags, &[])
    }

    /// With its data directory in this one.
    pub(crate) fn within(parent: &Path, flags: &[&str]) -> Self {
        Self::made(parent, flags, &[])
    }

    pub(crate) fn with_environment(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::made(&std::env::temp_dir(), flags, environment)
    }

    fn made(parent: &Path, flags: &[&str], environment: &[(&str, &str)]) -> Self {
        // Callers by the hundred are as many open files.
        let limit = getrlimit(Resource::Nofile);
        let all = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        _ = setrlimit(Resource::Nofile, all);
        let directory = tempfile::tempdir_in(parent).unwrap();
        let ports = Ports::claim();
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        let environment = environment
            .iter()
            .map(|&(n, v)| (n.to_owned(), v.to_owned()));
        let environment: Vec<(String, String)> = environment.collect();
        let log = Arc::default();
        let told = (&flags[..], &environment[..]);
        let (child, data, admin) = launch(directory.path(), ports.first, told, &log);
        let key = fs::read_to_string(directory.path().join("admin.key")).unwrap();
        Self {
            child,
            flags,
            environment,
            ports,
            log,
            data,
            admin,
            key: key.trim().to_owned(),
            http: reqwest::Client::builder()
                .no_proxy()
                .timeout(SOON * 3)
                .build()
                .unwrap(),
            directory,
        }
    }

    /// `kill -9`, and a start on the same directory.
    pub(crate) fn crash_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        (self.child, self.data, self.admin) = launch(
            self.directory.path(),
            self.ports.first,
            (&self.flags, &self.environment),
            &self.log,
        );
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.child.id(), signal);
    }

    pub(crate) async fn exit(&mut self) -> ExitStatus {
        eventually("weir ends", SOON, async || self.child.try_wait().unwrap()).await
    }

    /// What it said so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What it wrote to standard error.
    pub(crate) fn said(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    // === The API ===

    pub(crate) fn api(&self, method: Method, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("http://{}{path}", self.admin))
            .bearer_auth(&self.key)
    }

    async fn done(&self, request: RequestBuilder) -> Value {
        let response = request.send().await.unwrap();
        let (status, url) = (response.status(), response.url().clone());
        let text = response.text().await.unwrap();
        assert!(status.is_success(), "{url}: {status} {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        self.done(self.api(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Value {
        self.done(self.api(Method::POST, path).json(body)).await
    }

    /// A function whose instances are this process.
    pub(crate) async fn function(&self, command: &[&str], env: &[(&str, &str)]) -> Function {
        let made = self
            .post("/v2/nvcf/functions", &definition(command, env))
            .await;
        Function::of(&made)
    }

    /// One more version of a function.
    pub(crate) async fn version(&self, of: &Function, command: &[&str]) -> Function {
        let path = format!("/v2/nvcf/functions/{}/versions", of.id);
        Function::of(&self.post(&path, &definition(command, &[])).await)
    }

    /// A function whose instances are the test's own ones.
    pub(crate) async fn bookkeeper(&self, directory: &Path) -> Function {
        let (name, value) = instance::env(directory);
        let command = instance::command();
        let command = command.each_ref().map(String::as_str);
        self.function(&command, &[(name, &value)]).await
    }

    /// Such a function with one instance of this capacity.
    pub(crate) async fn books(&self, directory: &Path, capacity: u32) -> Function {
        let function = self.bookkeeper(directory).await;
        self.deploy(&function, (1, 1, capacity), json!({})).await;
        function
    }

    /// A function whose instance is a server that answers like this, whatever it is asked; closing after each.
    pub(crate) async fn says(&self, answer: impl Into<Vec<u8>>) -> Function {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(answering(listener, answer.into()));
        self.endpoint(address, 1).await
    }

    /// A function whose one instance is this server, of this capacity.
    pub(crate) async fn endpoint(&self, address: SocketAddr, capacity: u32) -> Function {
        self.endpoint_with(address, capacity, json!({})).await
    }

    pub(crate) async fn endpoint_with(
        &self,
        address: SocketAddr,
        capacity: u32,
        extra: Value,
    ) -> Function {
        let function = self.of_endpoints(&[address]).await;
        self.deploy(&function, (1, 1, capacity), extra).await;
        function
    }

    /// A function whose instances are these servers.
    pub(crate) async fn of_endpoints(&self, endpoints: &[SocketAddr]) -> Function {
        let mut asked = definition(&[], &[]);
        asked["process"].take();
        let urls = endpoints.iter().map(|address| format!("http://{address}"));
        asked["endpoints"] = urls.collect();
        Function::of(&self.post("/v2/nvcf/functions", &asked).await)
    }

    /// Deploys with (minInstances, maxInstances, maxRequestConcurrency) and other settings.
    pub(crate) async fn deploy(&self, function: &Function, scale: (u32, u32, u32), extra: Value) {
        let mut body = json!({"deploymentSpecifications": [{
            "gpu": "none",
            "instanceType": "none",
            "minInstances": scale.0,
            "maxInstances": scale.1,
            "maxRequestConcurrency": scale.2,
        }]});
        if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
            body.extend(extra);
        }
        self.post(&function.deployment(), &body).await;
        self.until_known(function).await;
        self.ready(function, scale.0 as usize).await;
    }

    /// Waits until the data plane knows of a deployment that the API has answered.
    pub(crate) async fn until_known(&self, function: &Function) {
        eventually("the data plane knows", SOON, async || {
            self.metrics()
                .await
                .contains(&function.version)
                .then_some(())
        })
        .await;
    }

    /// The sample function, deployed.
    pub(crate) async fn sample(&self, scale: (u32, u32, u32), extra: Value) -> Function {
        let function = self.function(&[WEIR, "sample-function"], &[]).await;
        self.deploy(&function, scale, extra).await;
        function
    }

    /// Waits for the version to be ACTIVE with at least so many ready instances.
    pub(crate) async fn ready(&self, function: &Function, count: usize) -> Vec<Value> {
        eventually(
            "instances are ready and the version ACTIVE",
            SOON,
            async || {
                let ready = self.instances(function, "ready").await;
                (ready.len() >= count && self.status(function).await == "ACTIVE").then_some(ready)
            },
        )
        .await
    }

    pub(crate) async fn status(&self, function: &Function) -> String {
        text(&self.get(&function.path()).await["function"]["status"])
    }

    /// A version's instances in a state; all where it is empty.
    pub(crate) async fn instances(&self, function: &Function, state: &str) -> Vec<Value> {
        let answer = self.get("/v2/weir/instances").await;
        let all = answer["instances"].as_array().expect("a list of instances");
        let these = all.iter().filter(|instance| {
            instance["functionVersionId"] == function.version
                && (state.is_empty() || instance["state"] == state)
        });
        these.cloned().collect()
    }

    pub(crate) async fn queue_depth(&self, function: &Function) -> u64 {
        let path = format!("/v2/nvcf/queues/functions/{}", function.id);
        let answer = self.get(&path).await;
        let queues = answer["queues"].as_array().expect("a list of queues");
        queues
            .iter()
            .find(|queue| queue["functionVersionId"] == function.version)
            .and_then(|queue| queue["queueDepth"].as_u64())
            .expect("the version's queue")
    }

    pub(crate) async fn until_queued(&self, function: &Function, depth: u64) {
        eventually(&format!("{depth} wait"), SOON, async || {
            (self.queue_depth(function).await == depth).then_some(())
        })
        .await;
    }

    /// The page that Prometheus would read.
    pub(crate) async fn metrics(&self) -> String {
        let page = self.http.get(format!("http://{}/metrics", self.admin));
        page.send().await.unwrap().text().await.unwrap()
    }

    /// `weir_slots` of a version in a state.
    async fn slots_that_are(&self, function: &Function, state: &str) -> f64 {
        let page = self.metrics().await;
        let state = format!("state=\"{state}\"");
        page.lines()
            .find(|line| {
                line.starts_with("weir_slots{")
                    && line.contains(&function.version)
                    && line.contains(&state)
            })
            .and_then(|line| line.rsplit_once(' ')?.1.parse().ok())
            .expect("a gauge of slots")
    }

    /// The busy slots of a version.
    pub(crate) async fn busy(&self, function: &Function) -> f64 {
        self.slots_that_are(function, "busy").await
    }

    /// The free ones.
    pub(crate) async fn free(&self, function: &Function) -> f64 {
        self.slots_that_are(function, "free").await
    }

    /// `weir_invocations_total` of a version, by code.
    pub(crate) async fn codes(&self, function: &Function) -> Vec<(String, u64)> {
        let page = self.metrics().await;
        page.lines()
            .filter(|line| {
                line.starts_with("weir_invocations_total{") && line.contains(&function.version)
            })
            .map(|line| {
                let code = line.split_once("code=\"").expect("a code").1;
                let (code, rest) = code.split_once('"').expect("its end");
                let count = rest.rsplit_once(' ').expect("a count").1;
                (code.to_owned(), count.parse().unwrap())
            })
            .collect()
    }

    pub(crate) async fn until_busy(&self, function: &Function, slots: u32) {
        eventually(&format!("{slots} slots are busy"), SOON, async || {
            (self.busy(function).await == f64::from(slots)).then_some(())
        })
        .await;
    }

    /// A new key: its identifier and its secret.
    pub(crate) async fn new_key(&self, scopes: &[&str]) -> (String, String) {
        let asked = json!({"name": "of-a-test", "scopes": scopes});
        let made = self.post("/v2/weir/keys", &asked).await;
        (text(&made["key"]["id"]), text(&made["secret"]))
    }

    // === Invocations ===

    /// An invocation by the header.
    pub(crate) fn call(&self, method: Method, function: &Function, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("http://{}{path}", self.data))
            .bearer_auth(&self.key)
            .header("function-id", &function.id)
    }

    /// The head of an HTTP/1.1 invocation, without its end.
    pub(crate) fn head(&self, function: &Function, request_line: &str) -> String {
        format!(
            "{request_line} HTTP/1.1\r\nhost: weir\r\nauthorization: Bearer {}\r\nfunction-id: {}\r\n",
            self.key, function.id
        )
    }

    /// A connection on which these bytes were sent.
    pub(crate) async fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.data).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// A caller whose invocation runs until it leaves, by dropping what this returns.
    pub(crate) async fn occupy(&self, function: &Function) -> TcpStream {
        let head = self.head(function, "GET /infer?ms=600000");
        let caller = self.send(format!("{head}\r\n").as_bytes()).await;
        self.until_busy(function, 1).await;
        caller
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
        if std::thread::panicking()
            && let Ok(log) = self.log.lock()
        {
            eprintln!("--- what weir said ---\n{log}");
        }
    }
}

fn launch(
    directory: &Path,
    first_port: u16,
    (flags, environment): (&[String], &[(String, String)]),
    log: &Arc<Mutex<String>>,
) -> (Child, SocketAddr, SocketAddr) {
    let mut command = Command::new(WEIR);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("WEIR_") || text.starts_with("OTEL_") {
            command.env_remove(name);
        }
    }
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    let last_port = first_port + Ports::EACH - 1;
    let mut child = command
        .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .args(["--instance-user", &user()])
        .env("WEIR_ACCESS_LOG", "off")
        .env("WEIR_LOG", "info,weir_control::controller=debug")
        .arg("--instance-ports")
        .arg(format!("{first_port}-{last_port}"))
        .arg("--data-dir")
        .arg(directory)
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (found, addresses) = mpsc::channel();
    let kept = log.clone();
    // Reads as long as weir speaks: a full pipe would stop it.
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let line = plain(&line);
            if let Some(addresses) = announced(&line) {
                _ = found.send(addresses);
            }
            let mut log = kept.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        }
    });
    match addresses.recv_timeout(SOON) {
        Ok((data, admin)) => (child, data, admin),
        Err(_) => {
            _ = child.kill();
            panic!("weir did not start:\n{}", log.lock().unwrap());
        }
    }
}

/// `serving invocations on http://ADDRESS, the API on http://ADDRESS`, or https
fn announced(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let rest = line.split_once("serving invocations on ")?.1;
    let (data, rest) = rest.split_once(", the API on ")?;
    let admin = rest.split([',', ' ']).next()?;
    let address = |url: &str| url.split_once("://")?.1.parse().ok();
    Some((address(data)?, address(admin)?))
}

/// Without the codes that colour a terminal.
fn plain(line: &str) -> String {
    let mut coded = false;
    line.chars()
        .filter(|&c| match (coded, c) {
            (false, '\u{1b}') => {
                coded = true;
                false
            }
            (false, _) => true,
            (true, _) => {
                coded = !c.is_ascii_alphabetic();
                false
            }
        })
        .collect()
}

fn user() -> String {
    let answer = Command::new("id").arg("-un").output().unwrap();
    String::from_utf8(answer.stdout).unwrap().trim().to_owned()
}

/// Is well, and answers like this whatever else it is asked; closing after each.
pub(crate) async fn answering(listener: TcpListener, answer: Vec<u8>) {
    let answer: Arc<[u8]> = answer.into();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let answer = answer.clone();
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await?);
            }
            if head.starts_with(b"GET /health ") {
                let well = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                return stream.write_all(well).await;
            }
            stream.write_all(&answer).await?;
            stream.shutdown().await
        });
    }
}

pub(crate) fn definition(command: &[&str], env: &[(&str, &str)]) -> Value {
    let env: Vec<Value> = env
        .iter()
        .map(|(key, value)| json!({"key": key, "value": value}))
        .collect();
    json!({
        "name": "of-a-test",
        "inferenceUrl": "/infer",
        "process": {"command": command, "env": env},
        "health": {"protocol": "HTTP", "uri": "/health", "timeout": "PT5S", "expectedStatusCode": 200},
    })
}

/// One version of a function.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) id: String,
    pub(crate) version: String,
}

impl Function {
    pub(crate) fn of(answer: &Value) -> Self {
        Self {
            id: text(&answer["function"]["id"]),
            version: text(&answer["function"]["versionId"]),
        }
    }

    pub(crate) fn path(&self) -> String {
        format!("/v2/nvcf/functions/{}/versions/{}", self.id, self.version)
    }

    /// Path of its deployment.
    pub(crate) fn deployment(&self) -> String {
        format!(
            "/v2/nvcf/deployments/functions/{}/versions/{}",
            self.id, self.version
        )
    }
}

/// Asks again and again until there is an answer.
pub(crate) async fn eventually<T>(
    what: &str,
    within: Duration,
    mut ask: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + within;
    let mut ticks = interval(STEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
    }
}

/// Asserts that Weir itself refused, and why.
pub(crate) fn refused(response: &Response, status: u16, code: &str) {
    let error = header(response, "x-weir-error");
    assert_eq!(
        (response.status().as_u16(), error.as_deref()),
        (status, Some(code))
    );
}

/// Asserts that Weir itself refused by a whole problem document, whose detail has all of these words.
pub(crate) async fn problem(response: Response, status: u16, code: &str, words: &[&str]) {
    let request = header(&response, "nvcf-reqid");
    let error = header(&response, "x-weir-error");
    let kind = header(&response, "content-type");
    let at = format!("{} {}", response.status(), response.url());
    let body = response.text().await.unwrap();
    let document: Value = serde_json::from_str(&body).unwrap_or_default();
    let seen = format!("{at} {error:?}: {body}, for {words:?}");
    assert_eq!(document["status"], status, "{seen}");
    assert!(at.starts_with(&status.to_string()), "{seen}");
    assert_eq!(error.as_deref(), Some(code), "{seen}");
    assert_eq!(kind.as_deref(), Some("application/problem+json"), "{seen}");
    assert_eq!(
        document["type"],
        format!("urn:weir:problem:{code}"),
        "{seen}"
    );
    assert!(
        request.is_some() && document["requestId"].as_str() == request.as_deref(),
        "{seen}"
    );
    let detail = text(&document["detail"]);
    for word in words {
        assert!(detail.contains(word), "{seen}");
    }
}

/// Asserts that the instance answered.
pub(crate) fn answered(response: &Response) {
    assert_eq!(
        (response.status(), header(response, "x-weir-error")),
        (StatusCode::OK, None)
    );
}

pub(crate) fn header(response: &Response, name: &str) -> Option<String> {
    let value = response.headers().get(name)?;
    Some(value.to_str().unwrap().to_owned())
}

/// What a test draws at random. Its seed is printed, and `SUITE_SEED` sets it.
pub(crate) fn random() -> StdRng {
    let seed = match std::env::var("SUITE_SEED") {
        Ok(seed) => seed.parse().expect("a number in SUITE_SEED"),
        Err(_) => rand::random(),
    };
    println!("the seed: SUITE_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Everything that comes on a connection until its end.
pub(crate) async fn rest(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    // A reset after the answer is an end too.
    _ = timeout(SOON * 3, stream.read_to_end(&mut all))
        .await
        .expect("an end of the connection");
    String::from_utf8_lossy(&all).into_owned()
}

pub(crate) fn text(value: &Value) -> String {
    value.as_str().expect("a string").to_owned()
}

pub(crate) fn pid(instance: &Value) -> u32 {
    let pid = instance["pid"].as_u64().expect("an instance's pid");
    u32::try_from(pid).unwrap()
}

pub(crate) fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Processes that have this text in their environment.
pub(crate) fn processes_with(environment: &str) -> Vec<PathBuf> {
    let all = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    all.map(|entry| entry.path())
        .filter(|path| {
            fs::read(path.join("environ")).is_ok_and(|environ| {
                environ
                    .windows(environment.len())
                    .any(|window| window == environment.as_bytes())
            })
        })
        .collect()
}
