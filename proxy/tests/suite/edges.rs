//! Where a request or an answer ends otherwise than it should.

use std::net::SocketAddr;

use reqwest::Method;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::{SOON, Server, answered, eventually, rest};

async fn head_of(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// An instance that is well, and answers everything else in its own way; connections stay open.
async fn instance(answers: impl Fn(&str) -> String + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let answers = answers.clone();
            tokio::spawn(async move {
                // What is left of a body is no head, and stays where it is.
                while let Ok(head) = head_of(&mut stream).await {
                    let answer = match head.starts_with("GET /health ") {
                        true => "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned(),
                        false => answers(&head),
                    };
                    let close = answer.starts_with("HTTP/1.0");
                    if stream.write_all(answer.as_bytes()).await.is_err() || close {
                        return;
                    }
                    if head.contains("content-length: ") {
                        // It never reads the body.
                        std::future::pending().await
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn what_an_instance_did_not_read_does_not_hold_up_the_next_request() {
    let server = Server::start();
    let address = instance(|head| {
        let (status, body) = match head.starts_with("POST") {
            true => ("413 Content Too Large", "no"),
            false => ("200 OK", "yes"),
        };
        format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    })
    .await;
    let cancel = json!({ "cancelTimeout": "PT0.1S" });
    let function = server.endpoint_with(address, 1, cancel).await;
    let body = vec![b'x'; 20 << 20];
    let large = server
        .call(Method::POST, &function, "/x")
        .body(body)
        .send()
        .await;
    // Its answer, or the end of the connection while it still sends.
    if let Ok(response) = large {
        assert_eq!(response.status(), 413);
    }
    let next = server.call(Method::GET, &function, "/next").send().await;
    let next = next.unwrap();
    answered(&next);
    assert_eq!(next.text().await.unwrap(), "yes");
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn an_instance_of_http_1_0_is_answered_for_in_http_1_1() {
    let server = Server::start();
    let address = instance(|_| "HTTP/1.0 200 OK\r\n\r\nhello".to_owned()).await;
    let function = server.endpoint(address, 1).await;
    let head = server.head(&function, "GET /x");
    let mut caller = server
        .send(format!("{head}connection: close\r\n\r\n").as_bytes())
        .await;
    let text = rest(&mut caller).await.to_ascii_lowercase();
    // With chunks an answer that breaks off does not look whole.
    assert!(text.starts_with("http/1.1 200 ok\r\n"), "{text}");
    assert!(
        text.contains("\r\ntransfer-encoding: chunked\r\n"),
        "{text}"
    );
    assert!(text.ends_with("\r\n0\r\n\r\n"), "{text}");
}

#[tokio::test]
async fn a_malformed_body_is_the_callers_fault_and_no_lost_instance() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let head = server.head(&function, "POST /echo");
    let bytes = format!("{head}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n");
    let mut caller = server.send(bytes.as_bytes()).await;
    let text = rest(&mut caller).await;
    // The sample function may have begun its answer by then.
    if !text.starts_with("HTTP/1.1 200 ") {
        assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
        assert!(text.contains("x-weir-error: bad-request"), "{text}");
    }
    server.until_busy(&function, 0).await;

    // The same while it waits.
    let running = server.occupy(&function).await;
    let mut caller = server.send(bytes.as_bytes()).await;
    let text = rest(&mut caller).await;
    assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
    drop(running);
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn who_leaves_with_half_a_body_is_counted_as_one_who_left() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let running = server.occupy(&function).await;
    let head = server.head(&function, "POST /echo");
    let bytes = format!("{head}content-length: 10\r\n\r\nhello");
    let caller = server.send(bytes.as_bytes()).await;
    server.until_queued(&function, 1).await;
    drop(caller);
    server.until_queued(&function, 0).await;
    eventually("it is counted", SOON, async || {
        let codes = server.codes(&function).await;
        (codes == [("499".to_owned(), 1)]).then_some(())
    })
    .await;
    drop(running);
}

#[tokio::test]
async fn first_bytes_may_come_in_pieces() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    for pieces in [vec!["P", "OST /echo"], vec!["PRI", "NT /echo"]] {
        let mut caller = TcpStream::connect(server.data).await.unwrap();
        caller.set_nodelay(true).unwrap();
        for piece in &pieces {
            caller.write_all(piece.as_bytes()).await.unwrap();
        }
        let rest_of = server.head(&function, "");
        let request = format!("{rest_of}connection: close\r\ncontent-length: 2\r\n\r\nhi");
        caller.write_all(request.as_bytes()).await.unwrap();
        let text = rest(&mut caller).await;
        assert!(
            text.starts_with("HTTP/1.1 200 ") && text.ends_with("hi"),
            "{text}"
        );
    }
}
