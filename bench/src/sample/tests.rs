use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    sample: SampleArgs,
}

struct Running {
    url: String,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<anyhow::Result<()>>,
}

async fn start(flags: &[&str]) -> Running {
    let args = Cli::try_parse_from(["sample"].iter().chain(flags))
        .unwrap()
        .sample;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(async move {
        let stopped = async {
            let _ = stopped.await;
        };
        serve_on(listener, jiff::Timestamp::now(), args, "i-1", stopped).await
    });
    Running {
        url: format!("http://{address}"),
        address,
        stop: Some(stop),
        task,
    }
}

impl Running {
    async fn get(&self, path: &str) -> reqwest::Response {
        reqwest::get(format!("{}{path}", self.url)).await.unwrap()
    }

    async fn stats(&self) -> (u64, u64, u64) {
        let stats: serde_json::Value = self.get("/stats").await.json().await.unwrap();
        let of = |name: &str| stats[name].as_u64().unwrap();
        (of("served"), of("cancelled"), of("maxConcurrency"))
    }

    /// Polls: when hyper sees a closed connection is not ours to say.
    async fn until_stats(&self, wanted: (u64, u64, u64)) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let stats = self.stats().await;
            if stats == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{stats:?}, not {wanted:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn header<'a>(response: &'a reqwest::Response, name: &str) -> &'a str {
    response.headers()[name].to_str().unwrap()
}

#[tokio::test]
async fn answers_say_who_and_how_busy() {
    let sample = start(&[]).await;
    for path in ["/health", "/v2/health/ready", "/infer", "/stream?n=1"] {
        let response = sample.get(path).await;
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(header(&response, "x-instance"), "i-1");
        assert_eq!(
            header(&response, "x-pid"),
            std::process::id().to_string().as_str()
        );
        let concurrency = if path.contains("health") { "0" } else { "1" };
        assert_eq!(header(&response, "x-concurrency"), concurrency, "{path}");
        let received = received_at(response.headers()).unwrap();
        let age = jiff::Timestamp::now().duration_since(received);
        assert!(age.as_secs() < 10 && !age.is_negative());
        let since = listening_since(response.headers()).unwrap();
        assert!(since <= received, "{since} {received}");
        let stats: serde_json::Value = sample.get("/stats").await.json().await.unwrap();
        assert_eq!(
            stats["listeningSince"],
            header(&response, "x-listening-since")
        );
        response.bytes().await.unwrap();
    }
    assert_eq!(sample.get("/nothing").await.status(), 404);
    assert_eq!(sample.get("/infer?ms=x").await.status(), 400);
    assert_eq!(sample.get("/infer?ms=-1").await.status(), 400);
    assert_eq!(sample.get("/stream?n=x").await.status(), 400);
}

#[tokio::test]
async fn infer_takes_its_time_and_answers_so_much_json() {
    let sample = start(&[]).await;
    for bytes in [1, 2, 5, 13, 14, 5000] {
        let begun = Instant::now();
        let url = format!("{}/infer?ms=20.5&bytes={bytes}", sample.url);
        let response = reqwest::Client::new()
            .post(url)
            .body("in")
            .send()
            .await
            .unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(20));
        let body = response.bytes().await.unwrap();
        assert_eq!(body.len(), bytes);
        serde_json::from_slice::<serde_json::Value>(&body).unwrap();
    }
}

#[tokio::test]
async fn echo_streams_bodies_of_known_and_unknown_length_back() {
    let sample = start(&[]).await;
    let client = reqwest::Client::new();
    let big = vec![7u8; 1 << 20];
    let known = client
        .put(format!("{}/echo", sample.url))
        .header("content-type", "application/x-thing")
        .body(big.clone());
    let response = known.send().await.unwrap();
    assert_eq!(header(&response, "content-type"), "application/x-thing");
    assert_eq!(header(&response, "content-length"), "1048576");
    assert_eq!(response.bytes().await.unwrap(), big);

    let chunks = stream::iter((0..16).map(|_| Ok::<_, std::io::Error>(vec![7u8; 1 << 16])));
    let response = client
        .post(format!("{}/echo", sample.url))
        .body(reqwest::Body::wrap_stream(chunks))
        .send()
        .await
        .unwrap();
    assert_eq!(response.bytes().await.unwrap(), big);
    assert!(sample.get("/echo").await.bytes().await.unwrap().is_empty());
    sample.until_stats((3, 0, 1)).await;
}

#[tokio::test]
async fn stream_sends_events() {
    let sample = start(&[]).await;
    let response = sample.get("/stream?n=3&interval_ms=5").await;
    assert_eq!(header(&response, "content-type"), "text/event-stream");
    let text = response.text().await.unwrap();
    assert_eq!(
        text,
        "id: 0\ndata: {\"i\":0}\n\nid: 1\ndata: {\"i\":1}\n\nid: 2\ndata: {\"i\":2}\n\n"
    );
}

const PATHS: [&str; 3] = ["/infer", "/echo", "/stream?n=2&interval_ms=0"];

#[tokio::test]
async fn one_caller_is_never_counted_twice() {
    let sample = start(&[]).await;
    let client = reqwest::Client::new();
    for i in 0..300 {
        let request = client.post(format!("{}{}", sample.url, PATHS[i % 3]));
        let response = request.body("a body").send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(header(&response, "x-concurrency"), "1", "{}", PATHS[i % 3]);
        response.bytes().await.unwrap();
    }
    assert_eq!(sample.stats().await, (300, 0, 1));
}

#[tokio::test]
async fn over_http2_neither_and_a_reset_stream_is_cancelled() {
    let sample = start(&[]).await;
    let stream = TcpStream::connect(sample.address).await.unwrap();
    let (mut h2, connection) = hyper::client::conn::http2::handshake::<_, _, Full<Bytes>>(
        TokioExecutor::new(),
        TokioIo::new(stream),
    )
    .await
    .unwrap();
    tokio::spawn(connection);
    let post = |path: &str| {
        Request::post(format!("{}{path}", sample.url))
            .body(Full::from("a body"))
            .unwrap()
    };
    for i in 0..300 {
        let response = h2.send_request(post(PATHS[i % 3])).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-concurrency"], "1", "{}", PATHS[i % 3]);
        response.into_body().collect().await.unwrap();
    }
    assert_eq!(sample.stats().await, (300, 0, 1));

    // Dropping what is unfinished resets the stream; the connection lives.
    let call = h2.send_request(post("/infer?ms=60000"));
    assert!(
        tokio::time::timeout(Duration::from_millis(50), call)
            .await
            .is_err()
    );
    let call = h2.send_request(post("/stream?n=1000&interval_ms=20"));
    drop(call.await.unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    while sample.stats().await.1 < 2 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(sample.stats().await.0, 300);
}

#[tokio::test]
async fn requests_at_once_are_counted_together() {
    let sample = start(&[]).await;
    let calls = (0..5).map(|_| sample.get("/infer?ms=1000"));
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers.iter().any(|a| header(a, "x-concurrency") == "5"));
    drop(answers);
    sample.until_stats((5, 0, 5)).await;
}

#[tokio::test]
async fn a_closed_connection_is_no_longer_counted() {
    let sample = start(&[]).await;
    for path in ["/infer?ms=60000", "/stream?n=1000&interval_ms=20"] {
        let mut socket = TcpStream::connect(sample.address).await.unwrap();
        let request = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi");
        socket.write_all(request.as_bytes()).await.unwrap();
        if path.starts_with("/stream") {
            socket.read_u8().await.unwrap();
        } else {
            // In flight: the next one to arrive is the second.
            while header(&sample.get("/health").await, "x-concurrency") != "1" {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
    sample.until_stats((0, 2, 1)).await;
    let health = sample.get("/health").await;
    assert_eq!(header(&health, "x-concurrency"), "0");
}

#[tokio::test]
async fn failures_are_played() {
    let sample = start(&["--fail-health", "--fail-ratio", "1"]).await;
    assert_eq!(sample.get("/health").await.status(), 500);
    assert_eq!(sample.get("/infer").await.status(), 500);
    assert_eq!(sample.get("/stats").await.status(), 200);
    assert!(Cli::try_parse_from(["sample", "--fail-ratio", "2"]).is_err());

    let args = Cli::try_parse_from(["sample", "--fail-start"]).unwrap();
    assert!(serve(args.sample).await.is_err());
}

#[tokio::test]
async fn stopping_lets_what_is_in_flight_end() {
    let mut sample = start(&[]).await;
    let call = tokio::spawn(reqwest::get(format!("{}/infer?ms=1000", sample.url)));
    while header(&sample.get("/health").await, "x-concurrency") != "1" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    sample.stop.take().unwrap().send(()).unwrap();
    assert_eq!(call.await.unwrap().unwrap().status(), 200);
    sample.task.await.unwrap().unwrap();
    assert!(TcpStream::connect(sample.address).await.is_err());
}

/// Not a test: what `signals_and_aborts` runs as a process of its own.
#[tokio::test]
#[ignore = "run as a child by another test"]
async fn child() {
    let flags = std::env::var("SAMPLE_FLAGS").unwrap();
    let args = Cli::try_parse_from(["sample"].into_iter().chain(flags.split(' '))).unwrap();
    serve(args.sample).await.unwrap();
}

async fn spawn_child(flags: &str) -> (tokio::process::Child, u16, Instant) {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let begun = Instant::now();
    let child = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sample::tests::child", "--ignored"])
        .env("SAMPLE_FLAGS", format!("--port {port} {flags}"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (child, port, begun)
}

#[tokio::test]
async fn signals_and_aborts_end_the_process() {
    use std::os::unix::process::ExitStatusExt;

    let (mut child, port, begun) = spawn_child("--start-delay-ms 200 --fail-after 2").await;
    assert!(begun.elapsed() >= Duration::from_millis(200));
    let url = format!("http://127.0.0.1:{port}/infer");
    assert_eq!(reqwest::get(&url).await.unwrap().status(), 200);
    assert!(reqwest::get(&url).await.is_err());
    assert_eq!(child.wait().await.unwrap().signal(), Some(6));

    let (mut child, port, _) = spawn_child("--start-delay-ms 0").await;
    let url = format!("http://127.0.0.1:{port}/infer?ms=1000");
    let call = tokio::spawn(reqwest::get(url));
    let health = format!("http://127.0.0.1:{port}/health");
    while header(&reqwest::get(&health).await.unwrap(), "x-concurrency") != "1" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(call.await.unwrap().unwrap().status(), 200);
    assert!(child.wait().await.unwrap().success());
}
