//! How many instances there are, as seen from outside.

use std::net::SocketAddr;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpSocket},
    task::JoinHandle,
};

use crate::{
    instance,
    support::{
        Function, SOON, Server, WEIR, answered, answering, eventually, header, kill, pid,
        processes_with, text,
    },
};

/// Changes the one specification of a deployment.
async fn patch(server: &Server, function: &Function, change: Value) {
    let deployed = server.get(&function.deployment()).await;
    let deployment = &deployed["deployment"];
    let path = format!(
        "/v2/nvcf/deployments/{}/gpu-specifications/{}",
        text(&deployment["deploymentId"]),
        text(&deployment["deploymentSpecifications"][0]["gpuSpecificationId"])
    );
    let request = server.api(Method::PATCH, &path).json(&change);
    assert!(request.send().await.unwrap().status().is_success());
}

#[tokio::test]
async fn a_changed_concurrency_binds_the_next_calls_of_instances_that_run() {
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let gate = server.directory().join("gate");
    let path = format!("/work?gate={}", gate.display());
    let call = async || {
        let call = server.call(Method::GET, &function, &path).send();
        answered(&call.await.unwrap());
    };
    let change = async |concurrency: u32| {
        let body = json!({"deploymentSpecifications": [{
            "gpu": "none", "minInstances": 1, "maxInstances": 1, "maxRequestConcurrency": concurrency,
        }]});
        let request = server.api(Method::PUT, &function.deployment()).json(&body);
        assert!(request.send().await.unwrap().status().is_success());
        let slots = f64::from(concurrency);
        eventually("the instance has so many slots", SOON, async || {
            (server.free(&function).await == slots).then_some(())
        })
        .await;
    };
    change(3).await;
    tokio::join!(call(), call(), call(), call(), async {
        server.until_busy(&function, 3).await;
        server.until_queued(&function, 1).await;
        eventually("the instance has all three", SOON, async || {
            let books = instance::books(books.path());
            (books[0].highest() == 3).then_some(())
        })
        .await;
        std::fs::write(&gate, "").unwrap();
    });
    server.until_busy(&function, 0).await;
    std::fs::remove_file(&gate).unwrap();
    change(1).await;
    tokio::join!(call(), call(), async {
        server.until_queued(&function, 1).await;
        server.until_busy(&function, 1).await;
        std::fs::write(&gate, "").unwrap();
    });
    let all = instance::books(books.path());
    assert_eq!(all.len(), 1, "the same process");
    assert_eq!(all[0].highest(), 3);
}

#[tokio::test]
async fn what_is_above_a_lowered_maximum_ends_its_work_and_gets_no_more() {
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.bookkeeper(books.path()).await;
    server.deploy(&function, (2, 2, 1), json!({})).await;
    let gate = |n: usize| server.directory().join(n.to_string());
    let call = async |n: usize| {
        let path = format!("/work?gate={}", gate(n).display());
        let call = server.call(Method::GET, &function, &path).send();
        let response = call.await.unwrap();
        answered(&response);
        assert_eq!(response.text().await.unwrap(), "done");
    };
    // Saturated until the end: two run, and others wait.
    tokio::join!(call(0), call(1), call(2), call(3), async {
        server.until_busy(&function, 2).await;
        server.until_queued(&function, 2).await;
        patch(
            &server,
            &function,
            json!({"minInstances": 0, "maxInstances": 1}),
        )
        .await;
        let leaving = eventually("one drains", SOON, async || {
            server.instances(&function, "draining").await.pop()
        })
        .await;
        for n in 0..4 {
            std::fs::write(gate(n), "").unwrap();
        }
        eventually("one is left", SOON, async || {
            let all = server.instances(&function, "").await;
            (all.len() == 1 && all[0]["id"] != leaving["id"]).then_some(())
        })
        .await;
        let pid = pid(&leaving);
        let all = instance::books(books.path());
        let book = all.iter().find(|book| book.pid == pid).unwrap();
        let came = book.entries.iter().filter(|entry| entry.came).count();
        assert_eq!(came, 1, "what it had, and no more");
    });
}

#[tokio::test]
async fn nothing_starts_anew_while_weir_stops() {
    let mut server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let (name, value) = instance::env(books.path());
    let program = instance::command();
    let mut command = vec!["sh", "-c", "trap '' TERM; exec \"$@\"", "sh"];
    command.extend(program.iter().map(String::as_str));
    let stubborn = server.function(&command, &[(name, &value)]).await;
    server.deploy(&stubborn, (1, 1, 1), json!({})).await;
    let docile = server.sample((1, 1, 1), json!({})).await;
    let left = pid(&server.instances(&stubborn, "ready").await[0]);
    let id = server.instances(&docile, "ready").await[0]["id"].clone();

    server.signal(Signal::TERM);
    let mark = format!("WEIR_INSTANCE_ID={}", id.as_str().unwrap());
    eventually("the one that hears SIGTERM ends", SOON, async || {
        processes_with(&mark).is_empty().then_some(())
    })
    .await;
    kill(left, Signal::KILL);
    assert_eq!(server.exit().await.code(), Some(0));
    let starts = server.log().matches("an instance is to start").count();
    assert_eq!(starts, 2, "those that were there before");
}

#[tokio::test]
async fn a_sleeping_version_takes_calls_while_a_raised_minimum_starts() {
    let server = Server::start();
    // It is there as soon as the test says so.
    let gate = server.directory().join("gate");
    let wait = format!(
        "until [ -e {} ]; do sleep 0.01; done; exec {WEIR} sample-function",
        gate.display()
    );
    let function = server.function(&["sh", "-c", &wait], &[]).await;
    server.deploy(&function, (0, 1, 1), json!({})).await;
    patch(&server, &function, json!({"minInstances": 1})).await;
    assert_eq!(server.status(&function).await, "DEGRADING");
    let call = server.call(Method::GET, &function, "/infer").send();
    let (response, ()) = tokio::join!(call, async {
        server.until_queued(&function, 1).await;
        std::fs::write(&gate, "").unwrap();
    });
    answered(&response.unwrap());
    server.ready(&function, 1).await;
}

/// A server that is well, until the task is aborted.
async fn good() -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    (address, tokio::spawn(answering(listener, answer.to_vec())))
}

/// An address that refuses connections for as long as the socket is kept.
fn dead() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_is_passed_over() {
    let server = Server::start();
    let (good, _serving) = good().await;
    let (dead, _refusing) = dead();
    // Beside it, and instead of it; on demand, and for a minimum.
    for scale in [(0, 2, 1), (0, 1, 1), (1, 2, 1), (1, 1, 1)] {
        let function = server.of_endpoints(&[dead, good]).await;
        server.deploy(&function, scale, json!({})).await;
        let call = server.call(Method::GET, &function, "/");
        answered(&call.send().await.unwrap());
        eventually("the one that is good is left", SOON, async || {
            let all = server.instances(&function, "").await;
            (all.len() == 1 && all[0]["address"] == good.to_string()).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn another_endpoint_takes_over_from_one_that_stops() {
    let server = Server::start();
    let (first, serving) = good().await;
    let (second, _serving) = good().await;
    let function = server.of_endpoints(&[first, second]).await;
    server.deploy(&function, (1, 2, 1), json!({})).await;
    let before = server.instances(&function, "ready").await;
    assert_eq!(before[0]["address"], first.to_string());
    serving.abort();
    eventually("the other one is ready", SOON, async || {
        let ready = server.instances(&function, "ready").await;
        let mut ready = ready.iter();
        let other = ready.any(|i| i["address"] == second.to_string());
        (other && server.status(&function).await == "ACTIVE").then_some(())
    })
    .await;
    let call = server.call(Method::GET, &function, "/");
    answered(&call.send().await.unwrap());
}

#[tokio::test]
async fn a_specification_without_its_gpu_leaves_the_work_to_the_next() {
    let server = Server::with(&["--gpus", "none:0"]);
    let function = server.function(&[WEIR, "sample-function"], &[]).await;
    let specifications = json!([
        {"gpu": "H100", "instanceType": "H100_1x", "minInstances": 0, "maxInstances": 1},
        {"gpu": "none", "minInstances": 0, "maxInstances": 1},
    ]);
    let extra = json!({"deploymentSpecifications": specifications});
    server.deploy(&function, (0, 1, 1), extra).await;
    let call = async || {
        let call = server.call(Method::GET, &function, "/infer").send();
        let response = call.await.unwrap();
        answered(&response);
        header(&response, "x-instance").unwrap()
    };
    let working = call().await;
    eventually("what can't start is gone", SOON, async || {
        let all = server.instances(&function, "").await;
        (all.len() == 1 && all[0]["id"] == working).then_some(())
    })
    .await;
    assert_eq!(call().await, working);
}
