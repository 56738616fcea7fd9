//! What callers of the data plane send that can't be served: each a clear answer with its request ID.

use reqwest::{Method, RequestBuilder};
use rustix::process::Signal;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::support::{Server, answered, header, problem, refused, rest};

const ABSENT: &str = "11111111-1111-4111-8111-111111111111";

#[tokio::test]
async fn what_names_no_one_function_is_refused() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let (id, version) = (function.id.as_str(), function.version.as_str());
    let pexec = "/v2/nvcf/pexec/functions";
    let call = |path: &str, headers: &[(&str, &str)]| -> RequestBuilder {
        let call = server.http.post(format!("http://{}{path}", server.data));
        let call = call.bearer_auth(&server.key);
        headers
            .iter()
            .fold(call, |call, (name, value)| call.header(*name, *value))
    };
    let host = |label: &str| format!("{label}.weir.example");
    for (path, headers, words) in [
        (
            "/echo",
            &[("function-id", "abc")][..],
            &["function-id", "'abc'", "no UUID", "Copy it from"][..],
        ),
        ("/echo", &[("function-id", "")], &["function-id", "no UUID"]),
        (
            "/echo",
            &[("function-id", &id[..35])],
            &["function-id", "no UUID"],
        ),
        (
            "/echo",
            &[("function-id", id), ("function-id", id)],
            &["function-id is there twice", "once"],
        ),
        (
            "/echo",
            &[("function-id", id), ("function-version-id", "x")],
            &["function-version-id", "no UUID"],
        ),
        (
            "/echo",
            &[("function-version-id", version)],
            &["needs function-id beside it"],
        ),
        (
            "/echo",
            &[("function-id", id), ("host", &host(ABSENT))],
            &["different functions", "Name one"],
        ),
        (
            &format!("{pexec}/{ABSENT}"),
            &[("function-id", id)],
            &["different functions", "Name one"],
        ),
        (
            &format!("{pexec}/{ABSENT}"),
            &[("host", &host(id))],
            &["different functions", "Name one"],
        ),
        (
            &format!("{pexec}/{id}/versions/{ABSENT}"),
            &[("function-id", id), ("function-version-id", version)],
            &["different"],
        ),
        (
            &format!("{pexec}/abc"),
            &[],
            &["'abc'", "function ID", "UUID"],
        ),
        (&format!("{pexec}/"), &[], &["function ID", "UUID"]),
        (
            &format!("{pexec}/{id}/versions/abc"),
            &[],
            &["'abc'", "version ID", "UUID"],
        ),
        (
            &format!("{pexec}/{id}/version/{version}"),
            &[],
            &["The path must be", "/versions/ID"],
        ),
        (
            "/echo",
            &[("function-id", id), ("x-weir-timeout", "soon")],
            &["x-weir-timeout must be whole seconds"],
        ),
        (
            "/echo",
            &[("function-id", id), ("x-weir-timeout", "-1")],
            &["x-weir-timeout must be whole seconds"],
        ),
        (
            "/echo",
            &[
                ("function-id", id),
                ("x-weir-timeout", "99999999999999999999"),
            ],
            &["1 to 86400"],
        ),
        (
            &format!("{pexec}/{id}"),
            &[("nvcf-poll-seconds", "3601")],
            &["nvcf-poll-seconds", "1 to 3600"],
        ),
    ] {
        let response = call(path, headers).send().await.unwrap();
        problem(response, 400, "bad-request", words).await;
    }
    let named: &[(&str, &str)] = &[("function-id", ABSENT)];
    let versioned: &[(&str, &str)] = &[("function-id", id), ("function-version-id", ABSENT)];
    let path = format!("{pexec}/{ABSENT}");
    for (path, headers, words) in [
        ("/echo", named, &["no such function", "Check the ID"]),
        ("/echo", versioned, &["no such function", "Check the ID"]),
        (&path, &[], &["no such function", "Check the ID"]),
        ("/echo", &[], &["names no function", "function-id"]),
        (pexec, &[], &["names no function", "function-id"]),
    ] {
        let response = call(path, headers).send().await.unwrap();
        problem(response, 404, "unknown-function", words).await;
    }
    // Two that agree are one.
    let both = call("/echo", &[("function-id", id), ("host", &host(id))]);
    answered(&both.send().await.unwrap());
}

#[tokio::test]
async fn a_body_over_the_limit_is_413_and_the_next_call_is_served() {
    let server = Server::with(&["--max-body", "1KiB"]);
    let function = server.sample((1, 1, 1), json!({})).await;
    let head = server.head(&function, "POST /echo");
    let chunk = format!("100\r\n{}\r\n", "x".repeat(256));
    for (framing, body) in [
        ("content-length: 1025".to_owned(), "x".repeat(1025)),
        (
            "content-length: 1000000000000000000".to_owned(),
            String::new(),
        ),
        (
            "transfer-encoding: chunked".to_owned(),
            format!("{}0\r\n\r\n", chunk.repeat(5)),
        ),
    ] {
        let sent = format!("{head}connection: close\r\n{framing}\r\n\r\n{body}");
        let mut caller = TcpStream::connect(server.data).await.unwrap();
        // It may answer before all of it was sent.
        _ = caller.write_all(sent.as_bytes()).await;
        let answer = rest(&mut caller).await;
        for part in [
            "HTTP/1.1 413 ",
            "nvcf-reqid: ",
            "nvcf-status: errored",
            "x-weir-error: body-too-large",
            "larger than 1024 bytes. Send a smaller one",
        ] {
            assert!(answer.contains(part), "{framing}: {answer}");
        }
    }
    server.until_busy(&function, 0).await;
    let fits = server
        .call(Method::POST, &function, "/echo")
        .body(vec![b'x'; 1024]);
    answered(&fits.send().await.unwrap());
}

#[tokio::test]
async fn a_body_over_the_limit_of_the_api_is_413() {
    let server = Server::start();
    let over = format!("{{\"name\": \"{}\"}}", "x".repeat(1 << 20));
    let head = format!(
        "POST /v2/nvcf/functions HTTP/1.1\r\nhost: weir\r\nauthorization: Bearer {}\r\nconnection: close\r\n",
        server.key
    );
    for (framing, body) in [
        (format!("content-length: {}", over.len()), over.clone()),
        (
            "transfer-encoding: chunked".to_owned(),
            format!("{:x}\r\n{over}\r\n0\r\n\r\n", over.len()),
        ),
    ] {
        let mut caller = TcpStream::connect(server.admin).await.unwrap();
        let sent = format!("{head}{framing}\r\n\r\n{body}");
        // It may answer before all of it was sent.
        _ = caller.write_all(sent.as_bytes()).await;
        let answer = rest(&mut caller).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert!(
            answer.contains("urn:weir:problem:body-too-large") && answer.contains("1 MiB"),
            "{answer}"
        );
    }
}

/// What is no HTTP never reaches a function, and is answered all the same.
#[tokio::test]
async fn what_is_no_http_is_answered_and_the_connection_closed() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let whole = server.head(&function, "POST /echo");
    for (sent, status) in [
        ("garbage\r\n\r\n".to_owned(), 400),
        ("GET /echo HTTP/1.1\r\nno field\r\n\r\n".to_owned(), 400),
        ("GET /echo HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET /echo HTTP/3.0\r\nhost: a\r\n\r\n".to_owned(), 400),
        (format!("{whole}content-length: -1\r\n\r\n"), 400),
        (
            format!("{whole}content-length: 1\r\ncontent-length: 2\r\n\r\n"),
            400,
        ),
        (
            format!(
                "{whole}content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
            ),
            0,
        ),
        (
            format!("{whole}x-long: {}\r\n\r\n", "x".repeat(70 << 10)),
            431,
        ),
    ] {
        let sent = sent.replacen("\r\n", "\r\nconnection: close\r\n", 1);
        let mut caller = TcpStream::connect(server.data).await.unwrap();
        _ = caller.write_all(sent.as_bytes()).await;
        let answer = rest(&mut caller).await;
        if status > 0 {
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{sent}: {answer}"
            );
        }
        assert!(answer.contains("nvcf-reqid: "), "{sent}: {answer}");
    }
    server.until_busy(&function, 0).await;
    // On a connection that served before, too.
    let mut caller = server
        .send(b"GET /healthz HTTP/1.1\r\nhost: weir\r\n\r\ngarbage\r\n\r\n")
        .await;
    let answers = rest(&mut caller).await;
    assert!(
        answers.starts_with("HTTP/1.1 200 ") && answers.contains("HTTP/1.1 400 "),
        "{answers}"
    );
    assert_eq!(answers.matches("nvcf-reqid: ").count(), 2, "{answers}");
    // Chunks that are none break the request off that has them.
    let broken = format!("{whole}connection: close\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n");
    let mut caller = server.send(broken.as_bytes()).await;
    let answer = rest(&mut caller).await;
    assert!(answer.contains("nvcf-reqid: "), "{answer}");
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn without_auth_none_needs_a_key() {
    let server = Server::with(&["--auth", "none"]);
    let function = server.sample((1, 1, 1), json!({})).await;
    for key in [None, Some("weir_nobody")] {
        let call = server.http.get(format!("http://{}/echo", server.data));
        let call = call.header("function-id", &function.id);
        let list = server
            .http
            .get(format!("http://{}/v2/nvcf/functions", server.admin));
        let [call, list] = [call, list].map(|request| match key {
            Some(key) => request.bearer_auth(key),
            None => request,
        });
        answered(&call.send().await.unwrap());
        assert!(list.send().await.unwrap().status().is_success());
    }
    // It is the keys that are not needed; what is asked for is read as ever.
    let call = server.http.get(format!("http://{}/echo", server.data));
    let response = call.header("function-id", "abc").send().await.unwrap();
    problem(response, 400, "bad-request", &["no UUID"]).await;
}

#[tokio::test]
async fn what_waits_when_the_grace_is_over_is_told_that_weir_stops() {
    let mut server = Server::with(&["--grace", "PT0.3S"]);
    let function = server.sample((1, 1, 1), json!({})).await;
    let runs = server.occupy(&function).await;
    let waits = server.call(Method::GET, &function, "/infer").send();
    let (response, ()) = tokio::join!(waits, async {
        server.until_queued(&function, 1).await;
        server.signal(Signal::TERM);
    });
    let response = response.unwrap();
    refused(&response, 503, "draining");
    assert!(header(&response, "retry-after").is_some());
    problem(response, 503, "draining", &["stopping", "Try again"]).await;
    assert_eq!(server.exit().await.code(), Some(0));
    drop(runs);
}
