//! What ends or is killed, and what is left then.

use std::{fs, net::TcpListener};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Function, SOON, Server, WEIR, answered, eventually, kill, pid, refused};

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

/// Its disk is full, or its reader went.
#[tokio::test]
async fn a_log_that_cannot_be_written_stops_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let free = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let (listen, admin) = (free(), free());
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut weir = tokio::process::Command::new(WEIR)
        .args(["serve", "--auth", "none", "--access-log", "off"])
        .args(["--listen", &listen, "--admin", &admin, "--data-dir"])
        .arg(directory.path())
        .stderr(full)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = async |method: Method, path: &str, body: &Value| {
        let request = http.request(method, format!("http://{admin}{path}"));
        let answer = request.json(body).send().await.ok()?;
        let answer = answer.error_for_status().ok()?;
        Some(answer.json::<Value>().await.unwrap_or_default())
    };
    let nothing = json!({});
    eventually("it is ready", SOON, async || {
        ask(Method::GET, "/readyz", &nothing).await
    })
    .await;
    let function = json!({
        "name": "ends", "inferenceUrl": "/", "process": {"command": ["false"]},
    });
    let made = ask(Method::POST, "/v2/nvcf/functions", &function).await;
    let function = Function::of(&made.unwrap());
    let deployment = json!({"deploymentSpecifications": [{
        "gpu": "none", "instanceType": "none", "minInstances": 1, "maxInstances": 1,
    }]});
    let deployed = ask(Method::POST, &function.deployment(), &deployment).await;
    assert!(deployed.is_some());
    // Each end of its instance is logged.
    eventually("it is in ERROR", SOON, async || {
        let answer = ask(Method::GET, &function.path(), &nothing).await?;
        (answer["function"]["status"] == "ERROR").then_some(())
    })
    .await;
    assert_eq!(weir.try_wait().unwrap(), None);
    assert!(ask(Method::GET, "/readyz", &nothing).await.is_some());
}
