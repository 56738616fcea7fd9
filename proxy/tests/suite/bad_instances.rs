//! Instances that do not come up, or are not what they say: each says why where one looks.

use std::{
    fs,
    sync::{Arc, Mutex},
};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::{
    instance,
    support::{Function, SOON, Server, WEIR, answered, definition, eventually, problem, text},
};

impl Server {
    /// Deploys without waiting for anything.
    async fn ask_for(&self, function: &Function, min: u32, start_timeout: &str) {
        let spec = json!({"gpu": "none", "minInstances": min, "maxInstances": 1});
        let body = json!({"deploymentSpecifications": [spec], "startTimeout": start_timeout});
        self.post(&function.deployment(), &body).await;
        self.until_known(function).await;
    }

    /// Waits until the version is in ERROR, for good and for this reason.
    async fn fails(&self, function: &Function, words: &[&str]) {
        eventually(&format!("it fails, with {words:?}"), SOON, async || {
            let errors = self.instances(function, "error").await;
            let failed = errors.first()?;
            let why = failed["error"].as_str()?;
            let log = failed["lastLogLine"].as_str().unwrap_or_default();
            let said = words
                .iter()
                .all(|word| why.contains(word) || log.contains(word));
            // Before the third time in a row it may yet come up.
            (said && failed["restarts"].as_u64()? >= 3).then_some(())
        })
        .await;
    }

    /// Operators learn what [`Self::fails`] saw. Callers may be of another account: they learn what kind of failure it
    /// is.
    async fn says_why(&self, function: &Function, words: &[&str]) {
        let response = self.call(Method::GET, function, "/echo").send().await;
        let kind = ["is ERROR", "its instance failed: "];
        problem(response.unwrap(), 503, "not-invokable", &kind).await;
        let deployment = self.get(&function.deployment()).await;
        assert_eq!(deployment["deployment"]["functionStatus"], "ERROR");
        let health = text(&deployment["deployment"]["healthInfo"][0]["error"]);
        assert!(health.contains(words[0]), "{health}");
    }

    async fn defined(&self, definition: &Value) -> Function {
        Function::of(&self.post("/v2/nvcf/functions", definition).await)
    }
}

#[tokio::test]
async fn a_command_that_does_not_start_is_an_error() {
    let server = Server::start();
    let plain = server.directory().join("plain-file");
    fs::write(&plain, "not a program").unwrap();
    let plain = plain.to_str().unwrap();
    let mut nowhere = definition(&["true"], &[]);
    nowhere["process"]["workingDir"] = json!("/no/such/directory");
    for (asked, words) in [
        (
            definition(&["/no/such/program"], &[]),
            &["'/no/such/program'", "No such file", "process.command"][..],
        ),
        (
            definition(&["no-such-program-in-path"], &[]),
            &["'no-such-program-in-path'", "in PATH"],
        ),
        (
            definition(&[plain], &[]),
            &[plain, "Permission denied", "--instance-user"],
        ),
        (
            nowhere,
            &[
                "'true' in '/no/such/directory'",
                "No such file",
                "workingDir",
            ],
        ),
        (
            definition(&["sh", "-c", "echo no model >&2; exit 3"], &[]),
            &["exited with status 3", "no model"],
        ),
    ] {
        let warm = server.defined(&asked).await;
        server.ask_for(&warm, 1, "PT1M").await;
        server.fails(&warm, words).await;
        server.says_why(&warm, words).await;
        // Asleep it is found out by the first call, which does not wait for nothing.
        let cold = server.defined(&asked).await;
        server.ask_for(&cold, 0, "PT1M").await;
        let response = server.call(Method::GET, &cold, "/echo").send().await;
        let kind = ["its instance failed: "];
        problem(response.unwrap(), 503, "no-capacity", &kind).await;
    }
}

#[tokio::test]
async fn an_instance_that_never_is_well_is_an_error() {
    let server = Server::start();
    let silent = server.function(&["sleep", "600"], &[]).await;
    let ill = server
        .function(&[WEIR, "sample-function", "--fail-health"], &[])
        .await;
    let mut wrong = definition(&[WEIR, "sample-function"], &[]);
    wrong["health"]["uri"] = json!("/no-such-path");
    let wrong = server.defined(&wrong).await;
    for function in [&silent, &ill, &wrong] {
        server.ask_for(function, 1, "PT1S").await;
    }
    for (function, words) in [
        (
            &silent,
            &["within PT1S", "/health: connection refused", "$PORT"][..],
        ),
        (&ill, &["within PT1S", "/health: status 500 and not 200"]),
        (
            &wrong,
            &["within PT1S", "/no-such-path: status 404 and not 200"],
        ),
    ] {
        server.fails(function, words).await;
        server.says_why(function, words).await;
    }
}

/// Says 200 to whoever asks, and keeps what it was asked.
fn liar(listener: TcpListener) -> Arc<Mutex<String>> {
    let asked = Arc::<Mutex<String>>::default();
    let kept = asked.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 4096];
            let read = stream.read(&mut head).await.unwrap_or(0);
            let head = String::from_utf8_lossy(&head[..read]).into_owned();
            kept.lock().unwrap().push_str(&head);
            let well = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            _ = stream.write_all(well).await;
        }
    });
    asked
}

#[tokio::test]
async fn what_another_process_says_of_an_instance_is_not_believed() {
    let server = Server::start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    liar(listener);
    let held = format!("port {port} is held by a process that is not this instance's");
    let words = [held.as_str(), "end that process"];

    // The health check is asked of another port than the instance's.
    let mut asked = definition(&[WEIR, "sample-function"], &[]);
    asked["health"]["port"] = json!(port);
    let elsewhere = server.defined(&asked).await;
    // The version's own port is somebody's already.
    let mut asked = definition(&["sleep", "600"], &[]);
    asked["inferencePort"] = json!(port);
    let taken = server.defined(&asked).await;
    for function in [elsewhere, taken] {
        server.ask_for(&function, 1, "PT1M").await;
        server.fails(&function, &words).await;
        server.says_why(&function, &words).await;
    }
}

/// It never listens the first time, and waits for a word the next.
#[tokio::test]
async fn a_stranger_on_the_port_that_an_instance_was_given_gets_nothing() {
    let server = Server::start();
    let (given, go) = (
        server.directory().join("given"),
        server.directory().join("go"),
    );
    let script = format!(
        "[ -e {given} ] || {{ echo $PORT > {given}.new; mv {given}.new {given}; exec sleep 600; }}
        until [ -e {go} ]; do sleep 0.01; done; exec {WEIR} sample-function",
        given = given.display(),
        go = go.display(),
    );
    let function = server.function(&["sh", "-c", &script], &[]).await;
    server.ask_for(&function, 1, "PT1M").await;
    let port: u16 = eventually("it says which port it got", SOON, async || {
        fs::read_to_string(&given).ok()?.trim().parse().ok()
    })
    .await;
    let asked = liar(TcpListener::bind(("127.0.0.1", port)).await.unwrap());
    let held = format!("port {port} is held by a process that is not this instance's");
    eventually("the stranger is found out", SOON, async || {
        let all = server.instances(&function, "").await;
        all.first()?["error"]
            .as_str()?
            .contains(&held)
            .then_some(())
    })
    .await;
    // On another port all is well.
    fs::write(go, "").unwrap();
    server.ready(&function, 1).await;
    let response = server.call(Method::GET, &function, "/infer").send().await;
    answered(&response.unwrap());
    let asked = asked.lock().unwrap();
    assert!(
        asked.contains("GET /health") && !asked.contains("/infer"),
        "{asked}"
    );
}

/// Well for one answer, and gone.
const ONCE: &str = "
import http.server, os
class Once(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header('content-length', '0'); self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(os.environ['PORT'])), Once).handle_request()
print('that was all')
";

#[tokio::test]
async fn an_instance_that_is_well_and_then_dies_is_restarted_and_at_last_an_error() {
    let server = Server::start();
    let once = server.function(&["python3", "-c", ONCE], &[]).await;
    server.ask_for(&once, 1, "PT1M").await;
    server
        .fails(&once, &["exited with status 0", "that was all"])
        .await;

    // By the first request that it gets: the caller learns it, and the next one is served by the next process.
    let dies = server
        .function(&[WEIR, "sample-function", "--fail-after", "1"], &[])
        .await;
    server.deploy(&dies, (1, 1, 1), json!({})).await;
    let response = server.call(Method::GET, &dies, "/infer").send().await;
    problem(
        response.unwrap(),
        502,
        "instance-lost",
        &["may have had an effect", "only if that is safe"],
    )
    .await;
}

#[tokio::test]
async fn an_instance_that_turns_ill_is_taken_out_until_it_is_well() {
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let ill = instance::ill(books.path());
    fs::write(&ill, "").unwrap();
    eventually("it is taken out, and why", SOON, async || {
        let all = server.instances(&function, "").await;
        let why = all.first()?["error"].as_str()?;
        (why.contains("3 times in a row") && why.contains("503 and not 200")).then_some(())
    })
    .await;
    fs::remove_file(&ill).unwrap();
    server.ready(&function, 1).await;
    let response = server.call(Method::GET, &function, "/work").send().await;
    answered(&response.unwrap());
}
