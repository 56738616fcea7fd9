//! What passes between caller and instance, and what doesn't.

use reqwest::Method;
use serde_json::json;

use crate::support::{SOON, Server, answered, eventually, refused, rest};

#[tokio::test]
async fn an_answer_without_a_body_is_no_caller_that_left() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let head = server
        .call(Method::HEAD, &function, "/infer?bytes=9")
        .send();
    answered(&head.await.unwrap());
    let empty = server.call(Method::POST, &function, "/echo").send().await;
    answered(&empty.unwrap());
    eventually("both are counted", SOON, async || {
        let codes = server.codes(&function).await;
        let all: u64 = codes.iter().map(|(_, count)| count).sum();
        (all == 2).then(|| assert_eq!(codes, [("200".to_owned(), 2)]))
    })
    .await;
}

#[tokio::test]
async fn a_caller_cannot_speak_as_weir() {
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let request = server
        .head(&function, "GET http://shown.test/head")
        .replace("host: weir", "host: hidden.test");
    let request = format!(
        "{request}nvcf_sub: spoofed\r\nnvcf-ncaid: spoofed\r\nx-forwarded-user: spoofed\r\n\
         x-forwarded-for: spoofed\r\nforwarded: for=spoofed\r\nx-mine: kept\r\nconnection: close\r\n\r\n"
    );
    let mut caller = server.send(request.as_bytes()).await;
    let answer = rest(&mut caller).await.to_ascii_lowercase();
    assert!(answer.starts_with("http/1.1 200 "), "{answer}");
    assert!(!answer.contains("spoofed"), "{answer}");
    assert!(answer.contains("x-mine: kept"), "{answer}");
    // The target's own host is the host.
    assert!(answer.contains("\r\nhost: shown.test\r\n"), "{answer}");
    assert!(!answer.contains("hidden.test"), "{answer}");
}

#[tokio::test]
async fn tunnels_and_stars_are_refused() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    for line in ["CONNECT a.test:443", "GET *"] {
        let head = server.head(&function, line);
        let mut caller = server
            .send(format!("{head}connection: close\r\n\r\n").as_bytes())
            .await;
        let answer = rest(&mut caller).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{line}: {answer}");
    }
}

/// HTTP/1.0 asks for no host, and HTTP/1.1 does.
#[tokio::test]
async fn an_instance_always_gets_a_host() {
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let head = server
        .head(&function, "GET /head")
        .replace("HTTP/1.1", "HTTP/1.0")
        .replace("host: weir\r\n", "");
    let mut caller = server.send(format!("{head}\r\n").as_bytes()).await;
    let answer = rest(&mut caller).await.to_ascii_lowercase();
    assert!(answer.contains("\r\nhost: \r\n"), "{answer}");
}

#[tokio::test]
async fn what_is_no_answer_is_a_lost_instance() {
    let server = Server::start();
    for (what, answer) in [
        ("nothing", ""),
        ("half a head", "HTTP/1.1 200 OK\r\ncontent-le"),
        ("no HTTP", "hello\r\n\r\n"),
        (
            "an upgrade",
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        ),
    ] {
        let function = server.says(answer).await;
        let response = server.call(Method::GET, &function, "/infer").send().await;
        let response = response.unwrap();
        assert_eq!(response.status(), 502, "{what}");
        refused(&response, 502, "instance-lost");
        server.until_busy(&function, 0).await;
    }
}

#[tokio::test]
async fn an_answer_that_is_cut_does_not_look_whole() {
    let server = Server::start();
    for (what, answer) in [
        (
            "a length",
            "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello",
        ),
        (
            "chunks",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        ),
    ] {
        let function = server.says(answer).await;
        let response = server.call(Method::GET, &function, "/infer").send().await;
        let response = response.unwrap();
        assert_eq!(response.status(), 200, "{what}");
        assert!(response.bytes().await.is_err(), "{what}");
        server.until_busy(&function, 0).await;
    }
}

#[tokio::test]
async fn strange_answers_are_passed_on_clean() {
    let server = Server::start();
    for (what, answer, body) in [
        (
            "a length beside chunks",
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            "hello",
        ),
        (
            "hints first, and Weir's own words",
            "HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 200 OK\r\nx-weir-error: internal\r\n\
             nvcf-reqid: mine\r\nnvcf-status: mine\r\ncontent-length: 5\r\n\r\nhello",
            "hello",
        ),
        (
            "a body where none may be",
            "HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello",
            "",
        ),
    ] {
        let function = server.says(answer).await;
        for _ in 0..2 {
            let response = server.call(Method::GET, &function, "/infer").send().await;
            let response = response.unwrap();
            assert!(
                response.status().is_success(),
                "{what}: {}",
                response.status()
            );
            for name in ["x-weir-error", "nvcf-reqid", "nvcf-status"] {
                let value = crate::support::header(&response, name);
                assert!(
                    !value.is_some_and(|v| v == "mine" || v == "internal"),
                    "{what}"
                );
            }
            let length = crate::support::header(&response, "content-length");
            assert!(
                length.is_none_or(|length| length == body.len().to_string()),
                "{what}"
            );
            assert_eq!(response.text().await.unwrap(), body, "{what}");
        }
        server.until_busy(&function, 0).await;
    }
}
