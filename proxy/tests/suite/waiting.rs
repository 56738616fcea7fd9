//! How long an invocation waits, and how many may.

use reqwest::Method;
use serde_json::json;
use tokio::time::Instant;

use crate::support::{Function, SOON, Server, WEIR, header, refused};

#[tokio::test]
async fn a_full_queue_refuses_and_says_when_to_come_again() {
    let server = Server::start();
    let queue = json!({"queue": {"maxRequests": 2}});
    let function = server.sample((1, 1, 1), queue).await;
    let _running = server.occupy(&function).await;
    let waits = format!("{}\r\n", server.head(&function, "GET /infer"));
    let _first = server.send(waits.as_bytes()).await;
    let _second = server.send(waits.as_bytes()).await;
    server.until_queued(&function, 2).await;
    let response = server
        .call(Method::GET, &function, "/infer")
        .send()
        .await
        .unwrap();
    refused(&response, 429, "queue-full");
    let again: u64 = header(&response, "retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&again), "{again}");
    // They were not disturbed.
    assert_eq!(server.queue_depth(&function).await, 2);
}

/// An invocation waits in vain, for this long.
async fn waits_in_vain(server: &Server, function: &Function, code: &str, millis: u128) {
    let start = Instant::now();
    let response = server
        .call(Method::GET, function, "/infer")
        .send()
        .await
        .unwrap();
    refused(&response, 504, code);
    let waited = start.elapsed();
    assert!(waited.as_millis() >= millis && waited < SOON, "{waited:?}");
    assert_eq!(server.queue_depth(function).await, 0);
}

#[tokio::test]
async fn a_wait_for_a_busy_instance_ends_at_the_busy_timeout() {
    let server = Server::start();
    let queue = json!({"queue": {"busyTimeout": "PT0.4S"}});
    let function = server.sample((1, 1, 1), queue).await;
    let _running = server.occupy(&function).await;
    waits_in_vain(&server, &function, "busy-timeout", 400).await;
}

#[tokio::test]
async fn a_wait_for_a_start_ends_at_the_cold_timeout() {
    let server = Server::start();
    let never = [WEIR, "sample-function", "--start-delay-ms", "3600000"];
    let function = server.function(&never, &[]).await;
    let queue = json!({"queue": {"coldTimeout": "PT0.6S"}});
    server.deploy(&function, (0, 1, 1), queue).await;
    waits_in_vain(&server, &function, "start-timeout", 600).await;
}
