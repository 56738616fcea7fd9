//! What ends, is killed or is stopped, and what is left then.

use std::fs;

use reqwest::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::json;

use crate::support::{SOON, Server, answered, eventually, kill, pid, refused};

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
