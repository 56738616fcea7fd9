//! What callers may use, and for how long.

use std::fs;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};

use crate::support::{SOON, Server, WEIR, answered, eventually, refused, rest};

/// Two requests on one connection, the second's head never whole.
#[tokio::test]
async fn a_later_head_that_never_ends_ends_the_connection() {
    let server = Server::with(&["--head-timeout", "PT0.5S", "--idle-timeout", "PT1H"]);
    let mut caller = server
        .send(b"GET /healthz HTTP/1.1\r\nhost: weir\r\n\r\n")
        .await;
    let mut answer = String::new();
    while !answer.ends_with("ok\n") {
        let byte = timeout(SOON, caller.read_u8()).await.unwrap().unwrap();
        answer.push(char::from(byte));
    }
    let start = Instant::now();
    caller
        .write_all(b"GET /healthz HTTP/1.1\r\nho")
        .await
        .unwrap();
    assert_eq!(rest(&mut caller).await, "");
    let took = start.elapsed();
    assert!(took.as_millis() >= 500 && took < SOON, "{took:?}");
}

/// It never has a whole head, and answers every PING.
#[tokio::test]
async fn an_http_2_connection_without_a_request_is_closed() {
    let server = Server::with(&["--head-timeout", "PT0.5S", "--idle-timeout", "PT1H"]);
    let settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let start = Instant::now();
    let mut caller = server.send(settings).await;
    rest(&mut caller).await;
    let took = start.elapsed();
    assert!(took.as_millis() >= 500 && took < SOON, "{took:?}");
}

#[tokio::test]
async fn a_connection_that_idles_is_closed() {
    let server = Server::with(&["--idle-timeout", "PT0.5S"]);
    let mut caller = server
        .send(b"GET /healthz HTTP/1.1\r\nhost: weir\r\n\r\n")
        .await;
    assert!(rest(&mut caller).await.ends_with("ok\n"));
}

#[tokio::test]
async fn an_answer_that_takes_too_long_is_broken_off_and_its_slot_is_free() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let log = log.path();
    let flags = [
        "--request-timeout",
        "PT0.5S",
        "--access-log",
        log.to_str().unwrap(),
    ];
    let server = Server::with(&flags);
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let never = format!(
        "/stream?gate={}",
        server.directory().join("never").display()
    );
    let call = server.call(Method::GET, &function, &never).send();
    let response = call.await.unwrap();
    answered(&response);
    assert!(response.text().await.is_err(), "it looks whole");
    server.until_busy(&function, 0).await;
    eventually("a line says why", SOON, async || {
        let lines = fs::read_to_string(log).unwrap();
        lines
            .contains(r#""error":"instance-timeout""#)
            .then_some(())
    })
    .await;

    // Until its head it is an answer.
    let never = format!("/work?gate={}", server.directory().join("never").display());
    let response = server.call(Method::GET, &function, &never).send().await;
    refused(&response.unwrap(), 504, "instance-timeout");
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn a_caller_that_does_not_read_keeps_its_slot_no_longer_than_the_limit() {
    let server = Server::with(&["--request-timeout", "PT0.5S"]);
    let function = server.sample((1, 1, 1), json!({})).await;
    // More than all buffers on the way hold.
    let head = server.head(&function, "GET /infer?bytes=200000000");
    let caller = server.send(format!("{head}\r\n").as_bytes()).await;
    caller.readable().await.unwrap();
    server.until_busy(&function, 0).await;
    drop(caller);
}

#[tokio::test]
async fn heads_have_a_largest_size() {
    let flags = [
        "--max-head",
        "8KiB",
        "--max-fields",
        "20",
        "--max-uri",
        "1KiB",
    ];
    let server = Server::with(&flags);
    let function = server.sample((1, 1, 1), json!({})).await;
    let call = |path: &str| server.call(Method::GET, &function, path);
    answered(&call("/infer").send().await.unwrap());
    let long = call("/infer").header("x-long", "x".repeat(8 << 10));
    assert_eq!(long.send().await.unwrap().status(), 431);
    let many = (0..20).fold(call("/infer"), |call, i| call.header(format!("x-{i}"), "1"));
    assert_eq!(many.send().await.unwrap().status(), 431);
    let long = call(&format!("/infer?{}", "x".repeat(1 << 10)));
    refused(&long.send().await.unwrap(), 400, "bad-request");
}

#[tokio::test]
async fn an_account_has_a_largest_number_of_functions() {
    let server = Server::with(&["--max-functions", "1"]);
    server.function(&[WEIR, "sample-function"], &[]).await;
    let body = json!({
        "name": "of-a-test", "inferenceUrl": "/infer",
        "process": {"command": [WEIR, "sample-function"]},
    });
    let second = server.api(Method::POST, "/v2/nvcf/functions").json(&body);
    let second = second.send().await.unwrap();
    assert_eq!(second.status(), StatusCode::BAD_REQUEST);
    let problem: Value = second.json().await.unwrap();
    assert!(problem.to_string().contains('1'), "{problem}");
}

#[tokio::test]
async fn the_admin_listener_has_the_time_limits_too() {
    let server = Server::with(&["--head-timeout", "PT0.5S"]);
    let mut slow = TcpStream::connect(server.admin).await.unwrap();
    slow.write_all(b"GET /readyz HTTP/1.1\r\nho").await.unwrap();
    assert_eq!(rest(&mut slow).await, "");
    let mut unreadable = TcpStream::connect(server.admin).await.unwrap();
    unreadable.write_all(b"nonsense\r\n\r\n").await.unwrap();
    let text = rest(&mut unreadable).await;
    assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
    assert!(text.contains("nvcf-reqid: "), "{text}");
}
