//! SIGTERM: what runs ends well, what waits is told, and nothing is cut short that has time left.

use std::fs;

use reqwest::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{SOON, Server, answered, eventually, rest};

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

/// An answer's head and a body of known length, on a connection that stays.
async fn answer(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.unwrap();
    head + std::str::from_utf8(&body).unwrap()
}

/// The connection to the instance was opened by one core and is used by the other, which has the only caller left.
#[tokio::test]
async fn sigterm_finishes_what_runs_on_another_cores_connection() {
    let mut server = Server::with(&["--cores", "2"]);
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let gate = server.directory().join("gate");
    // Connections go to the cores in turn where they have as much to do.
    let mut callers = [
        TcpStream::connect(server.data).await.unwrap(),
        TcpStream::connect(server.data).await.unwrap(),
    ];
    for caller in &mut callers {
        let head = server.head(&function, "GET /head");
        caller
            .write_all(format!("{head}\r\n").as_bytes())
            .await
            .unwrap();
        assert!(answer(caller).await.starts_with("HTTP/1.1 200 "));
    }
    for (mut caller, leaves) in callers.into_iter().zip([true, false]) {
        if leaves {
            let head = server.head(&function, "GET /head");
            caller
                .write_all(format!("{head}\r\n").as_bytes())
                .await
                .unwrap();
            answer(&mut caller).await;
            continue;
        }
        let head = server.head(&function, &format!("GET /work?gate={}", gate.display()));
        caller
            .write_all(format!("{head}\r\n").as_bytes())
            .await
            .unwrap();
        server.until_busy(&function, 1).await;
        server.signal(Signal::TERM);
        eventually("it takes no more", SOON, async || {
            TcpStream::connect(server.data).await.is_err().then_some(())
        })
        .await;
        fs::write(&gate, "").unwrap();
        let text = rest(&mut caller).await;
        assert!(
            text.starts_with("HTTP/1.1 200 ") && text.ends_with("done"),
            "{text}"
        );
    }
    assert_eq!(server.exit().await.code(), Some(0));
}

#[tokio::test]
async fn who_is_not_served_when_the_grace_is_over_is_told_so() {
    let mut server = Server::with(&["--grace", "PT0.3S"]);
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let never = server.directory().join("never");
    let path = format!("GET /work?gate={}", never.display());
    let mut callers = Vec::new();
    for waiting in 0..4 {
        let head = server.head(&function, &path);
        callers.push(server.send(format!("{head}\r\n").as_bytes()).await);
        server.until_busy(&function, 1).await;
        server.until_queued(&function, waiting).await;
    }
    // One that has said nothing does not hold the stop up.
    let _silent = TcpStream::connect(server.data).await.unwrap();
    server.signal(Signal::TERM);
    for caller in &mut callers {
        let text = rest(caller).await;
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        assert!(text.contains("x-weir-error: draining\r\n"), "{text}");
        assert!(text.contains("nvcf-reqid: "), "{text}");
    }
    assert_eq!(server.exit().await.code(), Some(0));
}

#[tokio::test]
async fn who_had_connected_before_the_stop_is_served() {
    let mut server = Server::start();
    let function = server.sample((1, 1, 8), json!({})).await;
    let mut callers = Vec::new();
    for _ in 0..50 {
        callers.push(TcpStream::connect(server.data).await.unwrap());
    }
    server.signal(Signal::TERM);
    let head = server.head(&function, "GET /infer");
    for caller in &mut callers {
        caller
            .write_all(format!("{head}\r\n").as_bytes())
            .await
            .unwrap();
    }
    for caller in &mut callers {
        let text = rest(caller).await;
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
    }
    assert_eq!(server.exit().await.code(), Some(0));
}
