//! What ends or is killed, and what is left then.

use reqwest::Method;
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
