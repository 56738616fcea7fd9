//! What ends, is killed or is stopped, and what is left then.

use std::{
    collections::HashSet,
    fs,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    SOON, Server, WEIR, answered, eventually, kill, pid, processes_with, refused, text,
};

#[tokio::test]
async fn an_instance_killed_with_a_request_is_lost_and_comes_back() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let before = pid(&server.instances(&function, "ready").await[0]);
    let call = server
        .call(Method::GET, &function, "/infer?ms=600000")
        .send();
    let (response, ()) = tokio::join!(call, async {
        server.until_busy(&function, 1).await;
        kill(before, Signal::KILL);
    });
    refused(&response.unwrap(), 502, "instance-lost");
    eventually("another process is ready", SOON, async || {
        let ready = server.instances(&function, "ready").await;
        ready.iter().any(|i| pid(i) != before).then_some(())
    })
    .await;
    let response = server.call(Method::GET, &function, "/infer").send().await;
    answered(&response.unwrap());
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn what_was_acknowledged_outlives_kill_9() {
    let mut server = Server::start();
    let mark = format!("of-{}", server.directory().display());
    let command = [WEIR, "sample-function"];
    let function = server.function(&command, &[("SUITE_MARK", &mark)]).await;
    server.deploy(&function, (2, 2, 1), json!({})).await;
    let before: HashSet<_> = processes_with(&mark).into_iter().collect();
    assert_eq!(before.len(), 2);

    let (functions, keys) = acknowledged_until_killed(&server).await;
    assert!(functions.len() + keys.len() >= 40);
    server.crash_and_restart();

    let all = server.get("/v2/nvcf/functions/ids").await;
    let all: HashSet<String> = all["functionIds"]
        .as_array()
        .unwrap()
        .iter()
        .map(text)
        .collect();
    for id in &functions {
        assert!(
            all.contains(id),
            "function {id} was acknowledged and is gone"
        );
    }
    for (id, secret) in &keys {
        let url = format!("http://{}/v2/nvcf/functions/ids", server.admin);
        let answer = server
            .http
            .get(url)
            .bearer_auth(secret)
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "key {id}");
    }
    server.ready(&function, 2).await;
    let response = server.call(Method::GET, &function, "/infer").send().await;
    answered(&response.unwrap());
    let now: HashSet<_> = processes_with(&mark).into_iter().collect();
    assert_eq!(now.len(), 2, "the new instances and nobody else");
    assert!(before.is_disjoint(&now), "an orphan is left");

    server.signal(Signal::TERM);
    assert_eq!(server.exit().await.code(), Some(0));
    assert_eq!(processes_with(&mark), Vec::<std::path::PathBuf>::new());
}

/// Makes functions and keys, several at a time, and kills Weir in the midst of it: the functions' IDs, and the
/// keys' with their secrets.
async fn acknowledged_until_killed(server: &Server) -> (Vec<String>, Vec<(String, String)>) {
    const AFTER: usize = 60;
    let count = AtomicUsize::new(0);
    let maker = async |path: &str, body: Value| {
        let mut acknowledged = Vec::new();
        loop {
            let Ok(response) = server.api(Method::POST, path).json(&body).send().await else {
                return acknowledged;
            };
            let status = response.status();
            let Ok(text) = response.text().await else {
                return acknowledged;
            };
            assert!(status.is_success(), "{status} {text}");
            acknowledged.push(serde_json::from_str::<Value>(&text).unwrap());
            if count.fetch_add(1, Ordering::SeqCst) + 1 == AFTER {
                // The others are on their way.
                server.signal(Signal::KILL);
            }
        }
    };
    let function = json!({
        "name": "of-a-test", "inferenceUrl": "/infer",
        "process": {"command": [WEIR, "sample-function"]},
    });
    let key = json!({"name": "of-a-test", "scopes": ["list_functions"]});
    let functions = join_all((0..4).map(|_| maker("/v2/nvcf/functions", function.clone())));
    let keys = join_all((0..2).map(|_| maker("/v2/weir/keys", key.clone())));
    let (functions, keys) = tokio::join!(functions, keys);
    let functions = functions.iter().flatten();
    let keys = keys.iter().flatten();
    (
        functions
            .map(|made| text(&made["function"]["id"]))
            .collect(),
        keys.map(|made| (text(&made["key"]["id"]), text(&made["secret"])))
            .collect(),
    )
}

#[tokio::test]
async fn sigterm_finishes_what_runs_and_exits_with_0() {
    let mut server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;

    let gate = server.directory().join("gate");
    let path = format!("/work?gate={}", gate.display());
    let call = server.call(Method::GET, &function, &path).send();
    let ready = async || {
        let url = format!("http://{}/readyz", server.admin);
        server.http.get(url).send().await.unwrap().status()
    };
    let (response, ()) = tokio::join!(call, async {
        server.until_busy(&function, 1).await;
        assert_eq!(ready().await, StatusCode::OK);
        server.signal(Signal::TERM);
        eventually("/readyz says 503", SOON, async || {
            (ready().await == StatusCode::SERVICE_UNAVAILABLE).then_some(())
        })
        .await;
        fs::write(&gate, "").unwrap();
    });
    let response = response.unwrap();
    answered(&response);
    assert_eq!(response.text().await.unwrap(), "done");
    assert_eq!(server.exit().await.code(), Some(0));
}
