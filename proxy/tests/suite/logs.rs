//! The access log, and what no log and no trace may show.

use std::fs;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    collector::Collector,
    support::{Server, answered, header, rest},
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// Two invocations, one of them refused, and then the log's lines.
async fn lines(format: &[&str]) -> (Vec<String>, Vec<String>) {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access.log");
    let mut flags = vec!["--access-log", log.to_str().unwrap()];
    flags.extend(format);
    let mut server = Server::with(&flags);
    let function = server.sample((0, 1, 1), json!({})).await;
    let call = |key: &str| {
        let call = server.http.post(format!("http://{}/echo", server.data));
        let call = call.header("function-id", &function.id).bearer_auth(key);
        let call = call.header("traceparent", format!("00-{TRACE}-b7ad6b7169203331-00"));
        call.body("hello").send()
    };
    let first = call(&server.key).await.unwrap();
    answered(&first);
    let second = call("wrong").await.unwrap();
    let ids = [&first, &second].map(|response| header(response, "nvcf-reqid").unwrap());
    assert_eq!(first.text().await.unwrap(), "hello");
    server.signal(Signal::TERM);
    assert!(server.exit().await.success());
    let text = fs::read_to_string(&log).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    // By the order of the calls: the first may have ended after the second.
    lines.sort_by_key(|line| !line.contains(&ids[0]));
    assert_eq!(lines.len(), 2, "{text}");
    (lines, ids.to_vec())
}

#[tokio::test]
async fn a_line_of_json_has_stable_names() {
    let (lines, ids) = lines(&[]).await;
    let parsed: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let keys =
        |line: &Value| -> Vec<String> { line.as_object().unwrap().keys().cloned().collect() };
    let mut all = [
        "time",
        "status",
        "method",
        "durationMs",
        "function",
        "version",
        "waitMs",
        "instanceMs",
        "bytes",
        "attempts",
        "peer",
        "requestId",
        "traceId",
    ];
    all.sort_unstable();
    let mut have = keys(&parsed[0]);
    have.sort_unstable();
    assert_eq!(have, all);
    let line = &parsed[0];
    for (name, value) in [
        ("status", json!(200)),
        ("method", json!("POST")),
        ("bytes", json!(5)),
        ("attempts", json!(1)),
        ("peer", json!("127.0.0.1")),
        ("requestId", json!(ids[0])),
        ("traceId", json!(TRACE)),
    ] {
        assert_eq!(line[name], value, "{name}");
    }
    assert!(line["durationMs"].as_f64() >= line["waitMs"].as_f64());
    assert_eq!(parsed[1]["status"], 401);
    assert_eq!(parsed[1]["error"], "unauthenticated");
    assert_eq!(parsed[1].get("waitMs"), None);
}

#[tokio::test]
async fn a_line_of_text_has_every_field_in_order() {
    let (lines, ids) = lines(&["--access-log-format", "text"]).await;
    for (line, id) in lines.iter().zip(&ids) {
        let names: Vec<&str> = line
            .split(' ')
            .map(|field| field.split_once('=').unwrap().0)
            .collect();
        assert_eq!(
            names,
            [
                "time",
                "status",
                "method",
                "durationMs",
                "function",
                "version",
                "error",
                "waitMs",
                "instanceMs",
                "bytes",
                "attempts",
                "peer",
                "requestId",
                "traceId",
            ]
        );
        assert!(line.contains(&format!("requestId={id} traceId={TRACE}")));
    }
    assert!(lines[0].contains(" status=200 method=POST ") && lines[0].contains(" error=- "));
    assert!(lines[1].contains(" error=unauthenticated waitMs=- instanceMs=- "));
}

#[tokio::test]
async fn no_secret_is_in_a_log_or_a_trace() {
    const SECRET: &str = "s3cr3t0f4t35t";
    let collector = Collector::start().await;
    for format in ["json", "text"] {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("access.log");
        let mut server = Server::with_environment(
            &[
                "--access-log",
                log.to_str().unwrap(),
                "--access-log-format",
                format,
                "--trace-sample",
                "1",
            ],
            &[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url()),
                (
                    "OTEL_EXPORTER_OTLP_HEADERS",
                    &format!("authorization={SECRET}"),
                ),
            ],
        );
        let function = server.sample((1, 1, 1), json!({})).await;
        let (id, key) = (&function.id, &server.key);
        let trace = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let everywhere = format!(
            "cookie: a={SECRET}\r\nbaggage: a={SECRET}\r\ntracestate: a={SECRET}\r\n{trace}\r\n\
             user-agent: {SECRET}\r\nreferer: http://{SECRET}.test/{SECRET}\r\nx-api-key: {SECRET}\r\n\
             x-forwarded-for: {SECRET}\r\nproxy-authorization: Basic {SECRET}\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{SECRET}",
            SECRET.len()
        );
        let target = format!("/echo/{SECRET}?key={SECRET}");
        let pexec = format!("/v2/nvcf/pexec/functions/{SECRET}?key={SECRET}");
        let good = format!("authorization: Bearer {key}\r\nfunction-id: {id}\r\n");
        let bad = format!("authorization: Bearer {SECRET}\r\nfunction-id: {id}\r\n");
        for head in [
            format!("POST {target} HTTP/1.1\r\nhost: {SECRET}.test\r\n{good}"),
            format!("POST {target} HTTP/1.1\r\nhost: {SECRET}.test\r\n{bad}"),
            format!(
                "POST {target} HTTP/1.1\r\nhost: {id}.{SECRET}.test\r\nauthorization: {key}\r\n"
            ),
            format!(
                "POST http://{SECRET}:{SECRET}@{SECRET}.test{target} HTTP/1.1\r\nhost: a\r\n{good}"
            ),
            format!("POST {target} HTTP/1.1\r\nhost: {SECRET}@a\r\n{good}"),
            format!("POST {pexec} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"),
            format!("POST {target} HTTP/1.1\r\nhost: a\r\nfunction-id: {SECRET}\r\n"),
            format!("POST {target} HTTP/1.1\r\nhost: a\r\ntraceparent: {SECRET}\r\n{good}"),
            format!("POST {target} HTTP/1.1\r\nhost: a\r\nx-weir-timeout: {SECRET}\r\n{good}"),
            format!("{SECRET} {target} HTTP/1.1\r\nhost: a\r\n{good}"),
            format!("POST {target} HTTP/1.1\r\nhost: a\r\nhost: {SECRET}\r\n{good}"),
            format!("POST {target} HTTP/1.1\r\n{SECRET}\r\n{good}"),
        ] {
            let mut caller = server.send(format!("{head}{everywhere}").as_bytes()).await;
            let answer = rest(&mut caller).await;
            assert!(answer.starts_with("HTTP/1.1 "), "{head}: {answer}");
        }
        server.signal(Signal::TERM);
        assert!(server.exit().await.success());
        let written = fs::read_to_string(&log).unwrap();
        // hyper itself answers what is no HTTP.
        assert_eq!(written.lines().count(), 11, "{written}");
        let traced = String::from_utf8_lossy(&collector.bytes()).into_owned();
        assert!(traced.contains("weir.function.id"));
        for secret in [SECRET, &server.key] {
            assert!(!written.contains(secret), "{written}");
            assert!(!traced.contains(secret));
            assert!(!server.said().contains(secret), "{}", server.said());
        }
        // What it is for it got there.
        let heads = collector.heads();
        assert!(heads.iter().all(|head| head.contains(SECRET)));
    }
}
