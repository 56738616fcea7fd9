//! The access log.

use std::fs;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Server, answered, header};

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
            ]
        );
        assert!(line.contains(&format!("requestId={id}")));
    }
    assert!(lines[0].contains(" status=200 method=POST ") && lines[0].contains(" error=- "));
    assert!(lines[1].contains(" error=unauthenticated waitMs=- instanceMs=- "));
}
