//! As much of Weir as the benchmarks talk to: one version, one instance that
//! starts on demand and goes when it was idle for a moment.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::*;

pub(crate) struct FakeWeir {
    pub(crate) url: String,
    state: Arc<Mutex<State>>,
}

/// What it did, and how it is to behave.
#[derive(Default)]
pub(crate) struct State {
    /// `METHOD path` and body of each call.
    calls: Vec<(String, Value)>,
    instance: Option<Started>,
    /// Invocations that have no instance yet.
    waiting: u64,
    /// Those that left while they waited.
    left: u64,
    /// The only instance there is; ready and ACTIVE while it lives.
    pub(crate) pid: Option<u32>,
    /// What invocations are answered with.
    status: u16,
    /// Nobody needs a key.
    pub(crate) open: bool,
    /// The instance does not go.
    pub(crate) stays: bool,
    /// Each such invocation finds the queue full.
    pub(crate) refuse_every: Option<usize>,
}

#[derive(Clone)]
struct Started {
    spawned: jiff::Timestamp,
    listening: jiff::Timestamp,
    healthy: jiff::Timestamp,
    used: Instant,
}

impl State {
    /// Whether the process of `pid` has ended, waited for or not.
    fn killed(&self) -> bool {
        self.pid.is_some_and(|pid| {
            let process = procfs::process::Process::new(pid as i32);
            let stat = process.and_then(|process| process.stat());
            stat.is_ok_and(|stat| stat.state == 'Z')
        })
    }

    fn instances(&self) -> Vec<Value> {
        match self.pid {
            Some(pid) => ["one", "two"]
                .map(|id| json!({ "id": id, "state": "ready", "pid": pid }))
                .into(),
            None => self.instance().into_iter().collect(),
        }
    }

    fn instance(&self) -> Option<Value> {
        let started = self.instance.as_ref()?;
        (self.stays || started.used.elapsed() < FakeWeir::IDLE).then(|| {
            json!({
                "id": "i",
                "state": "ready",
                "spawnedAt": format!("{:.6}", started.spawned),
                "firstHealthyAt": format!("{:.6}", started.healthy),
            })
        })
    }
}

impl FakeWeir {
    pub(crate) const OWN_START: Duration = Duration::from_millis(20);
    /// How long it takes to notice that the instance listens.
    pub(crate) const NOTICED: Duration = Duration::from_millis(5);
    pub(crate) const ADDED: Duration = Duration::from_millis(5);
    const IDLE: Duration = Duration::from_millis(500);

    pub(crate) async fn start(status: u16) -> Self {
        Self::on(&["127.0.0.1:0"], status).await
    }

    /// On all of these addresses; its URL is the first.
    pub(crate) async fn on(addresses: &[&str], status: u16) -> Self {
        let state = Arc::new(Mutex::new(State {
            status,
            ..State::default()
        }));
        let mut urls = Vec::new();
        for address in addresses {
            let listener = TcpListener::bind(address).await.unwrap();
            urls.push(format!("http://{}", listener.local_addr().unwrap()));
            tokio::spawn(serve(listener, Arc::clone(&state)));
        }
        Self {
            url: urls.swap_remove(0),
            state,
        }
    }

    pub(crate) fn target(&self) -> TargetArgs {
        TargetArgs {
            url: self.url.clone(),
            admin_url: self.url.clone(),
            key: Some("secret".into()),
            data_dir: ".".into(),
            ca_file: None,
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn calls(&self, call: &str) -> usize {
        let state = self.state.lock().unwrap();
        state.calls.iter().filter(|(name, _)| name == call).count()
    }

    pub(crate) fn left(&self) -> u64 {
        self.state.lock().unwrap().left
    }

    pub(crate) fn body_of(&self, call: &str) -> Value {
        let state = self.state.lock().unwrap();
        let found = state.calls.iter().find(|(name, _)| name == call);
        found.expect("it was called").1.clone()
    }
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        let service = service_fn(move |request| {
            let state = Arc::clone(&state);
            async move { Ok::<_, Infallible>(answer(state, request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection);
    }
}

/// An invocation that never gets an instance.
struct Waiting(Arc<Mutex<State>>);

impl Waiting {
    fn new(state: &Arc<Mutex<State>>) -> Self {
        state.lock().unwrap().waiting += 1;
        Self(Arc::clone(state))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.0.lock().unwrap();
        state.waiting -= 1;
        state.left += 1;
    }
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let call = format!("{} {}", head.method, head.uri.path());
    let _waiting = (call == "POST /echo").then(|| Waiting::new(&state));
    // To who left amid its body it does not matter what is answered.
    let body = match body.collect().await {
        Ok(body) => serde_json::from_slice(&body.to_bytes()).unwrap_or_default(),
        Err(_) => return Response::default(),
    };
    state.lock().unwrap().calls.push((call.clone(), body));
    let json = |status: u16, body: Value| {
        Response::builder()
            .status(status)
            .body(Full::from(body.to_string()))
            .unwrap()
    };
    let open = state.lock().unwrap().open;
    let key = head.headers.get("authorization");
    if !open && key.is_none_or(|key| key != "Bearer secret") {
        return json(401, json!({ "title": "unauthenticated" }));
    }
    match call.as_str() {
        "POST /v2/nvcf/functions" => {
            json(200, json!({ "function": { "id": "f", "versionId": "v" } }))
        }
        "POST /v2/nvcf/deployments/functions/f/versions/v" => {
            json(200, json!({ "deployment": {} }))
        }
        "GET /v2/nvcf/functions/f/versions/v" => {
            let killed = state.lock().unwrap().killed();
            let status = if killed { "DEGRADING" } else { "ACTIVE" };
            json(200, json!({ "function": { "status": status } }))
        }
        "DELETE /v2/nvcf/functions/f/versions/v" => json(204, Value::Null),
        "GET /v2/nvcf/queues/functions/f" => {
            let depth = state.lock().unwrap().waiting;
            let queue = json!({ "functionVersionId": "v", "queueDepth": depth });
            json(200, json!({ "functionId": "f", "queues": [queue] }))
        }
        "GET /v2/weir/instances" => {
            let instances = state.lock().unwrap().instances();
            json(200, json!({ "instances": instances }))
        }
        "GET /v2/weir/instances/i" => {
            let instance = state.lock().unwrap().instance();
            json(200, json!({ "instance": instance }))
        }
        "GET /readyz" => Response::default(),
        "GET /metrics" => {
            let state = state.lock().unwrap();
            let queued = state.calls.iter().filter(|(name, _)| name == "POST /echo");
            let line = format!("weir_queue_depth{{version=\"v\"}} {}\n", queued.count());
            Response::new(Full::from(line))
        }
        "POST /stream" => Response::default(),
        // The invocation of a version that never gets ready.
        "POST /echo" => std::future::pending().await,
        "POST /infer" | "GET /infer" => invoke(&state).await,
        _ => json(404, json!({})),
    }
}

async fn invoke(state: &Mutex<State>) -> Response<Full<Bytes>> {
    let refused = {
        let state = state.lock().unwrap();
        let invoked = state.calls.iter().filter(|(name, _)| name == "POST /infer");
        let number = invoked.count();
        let every = state.refuse_every;
        every.is_some_and(|every| number.is_multiple_of(every))
    };
    if refused {
        return Response::builder()
            .status(429)
            .header("x-weir-error", "queue-full")
            .body(Full::default())
            .unwrap();
    }
    if state.lock().unwrap().instance().is_none() {
        let spawned = jiff::Timestamp::now();
        state.lock().unwrap().waiting += 1;
        tokio::time::sleep(FakeWeir::OWN_START).await;
        let listening = jiff::Timestamp::now();
        tokio::time::sleep(FakeWeir::NOTICED).await;
        let healthy = jiff::Timestamp::now();
        tokio::time::sleep(FakeWeir::ADDED).await;
        let mut state = state.lock().unwrap();
        state.waiting -= 1;
        state.instance = Some(Started {
            spawned,
            listening,
            healthy,
            used: Instant::now(),
        });
    }
    let mut state = state.lock().unwrap();
    if let Some(started) = &mut state.instance {
        started.used = Instant::now();
    }
    let mut response = Response::builder()
        .status(state.status)
        .header("x-instance", "i")
        .header("x-received-at", format!("{:.6}", jiff::Timestamp::now()));
    if let Some(started) = &state.instance {
        response = response.header("x-listening-since", format!("{:.6}", started.listening));
    }
    if state.status != 200 {
        response = response.header("x-weir-error", "no-capacity");
    }
    response.body(Full::default()).unwrap()
}
