//! Callers that leave before their answer.

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::Instant};

use crate::support::{Function, SOON, Server, answered, eventually, text};

/// One instance with one slot, and a caller that has it.
async fn occupied() -> (Server, Function, TcpStream) {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let running = server.occupy(&function).await;
    (server, function, running)
}

/// A caller left just now, and so many wait without it. How long that took is printed: 200 ms at most, on a machine
/// with nothing else to do.
async fn frees_its_place(server: &Server, function: &Function, others: u64) {
    let left = Instant::now();
    server.until_queued(function, others).await;
    let took = left.elapsed();
    println!("the place was free {took:?} after its caller left");
}

/// Who sent these bytes waits, leaves, and so gives its place up; the one that runs isn't disturbed.
async fn leaves_the_queue(rest: impl FnOnce(String) -> Vec<u8>) {
    let (server, function, running) = occupied().await;
    let bytes = rest(server.head(&function, "POST /echo"));
    let mut caller = TcpStream::connect(server.data).await.unwrap();
    tokio::select! {
        // It ends unless Weir reads no more: either way the caller stays.
        () = async {
            caller.write_all(&bytes).await.unwrap();
            std::future::pending().await
        } => {}
        () = server.until_queued(&function, 1) => {}
    }
    drop(caller);
    frees_its_place(&server, &function, 0).await;
    assert_eq!(server.busy(&function).await, 1.0);
    // The place is good for another.
    let next = server
        .call(Method::POST, &function, "/echo")
        .body("next")
        .send();
    let (response, ()) = tokio::join!(next, async {
        server.until_queued(&function, 1).await;
        drop(running);
    });
    answered(&response.unwrap());
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn leaving_the_queue_with_a_small_body_frees_the_place() {
    leaves_the_queue(|head| format!("{head}content-length: 5\r\n\r\nhello").into_bytes()).await;
}

#[tokio::test]
async fn leaving_the_queue_with_a_mebibyte_frees_the_place() {
    leaves_the_queue(|head| {
        let mut bytes = format!("{head}content-length: {}\r\n\r\n", 1 << 20).into_bytes();
        bytes.resize(bytes.len() + (1 << 20), b'x');
        bytes
    })
    .await;
}

#[tokio::test]
async fn leaving_the_queue_with_an_unfinished_body_frees_the_place() {
    leaves_the_queue(|head| {
        format!("{head}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n").into_bytes()
    })
    .await;
}

#[tokio::test]
async fn leaving_the_queue_with_a_second_request_behind_frees_the_place() {
    leaves_the_queue(|head| {
        let one = format!("{head}content-length: 5\r\n\r\nhello");
        one.repeat(2).into_bytes()
    })
    .await;
}

#[tokio::test]
async fn a_reset_stream_of_http_2_frees_its_own_place_alone() {
    let (server, function, running) = occupied().await;
    let stream = TcpStream::connect(server.data).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let call = || {
        let request = http::Request::post(format!("http://{}/echo", server.data))
            .header("authorization", format!("Bearer {}", server.key))
            .header("function-id", &function.id)
            .body(Full::new(Bytes::from_static(b"hello")))
            .unwrap();
        tokio::spawn(sender.clone().send_request(request))
    };
    let (leaves, stays) = (call(), call());
    server.until_queued(&function, 2).await;
    leaves.abort();
    frees_its_place(&server, &function, 1).await;
    drop(running);
    assert_eq!(stays.await.unwrap().unwrap().status(), 200);
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn leaving_while_running_cancels_the_work() {
    let (server, function, running) = occupied().await;
    let instance = &server.instances(&function, "ready").await[0];
    let stats = format!("http://{}/stats", text(&instance["address"]));
    let stats = async || -> Value {
        let response = server.http.get(&stats).send().await.unwrap();
        response.json().await.unwrap()
    };
    assert_eq!(stats().await["cancelled"], 0);
    drop(running);
    eventually("the instance saw its caller leave", SOON, async || {
        (stats().await["cancelled"] == 1).then_some(())
    })
    .await;
    server.until_busy(&function, 0).await;
    assert_eq!(stats().await["served"], 0);
    let next = server.call(Method::GET, &function, "/infer").send().await;
    answered(&next.unwrap());
    assert_eq!(stats().await["maxConcurrency"], 1);
}
