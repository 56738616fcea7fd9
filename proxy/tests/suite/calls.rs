//! How an invocation finds its function, and what comes back.

use std::{collections::HashSet, fs, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use reqwest::Method;
use serde_json::json;
use tokio::net::TcpStream;

use crate::support::{SOON, Server, WEIR, answered, eventually, header, refused, text};

const ABSENT: &str = "00000000-0000-4000-8000-000000000001";

#[tokio::test]
async fn a_cold_invocation_wakes_an_instance_which_goes_when_idle() {
    let server = Server::start();
    let idle = json!({"autoscaling": {"idleTimeout": "PT0.5S"}});
    let function = server.sample((0, 1, 1), idle).await;
    for _ in 0..2 {
        assert!(server.instances(&function, "").await.is_empty());
        let call = server.call(Method::POST, &function, "/echo").body("hello");
        let response = call.send().await.unwrap();
        answered(&response);
        assert_eq!(response.text().await.unwrap(), "hello");
        eventually("no instance is left", SOON, async || {
            server
                .instances(&function, "")
                .await
                .is_empty()
                .then_some(())
        })
        .await;
        assert_eq!(server.status(&function).await, "ACTIVE");
    }
}

#[tokio::test]
async fn a_function_is_found_by_header_host_and_path() {
    let server = Server::start();
    let function = server.sample((1, 1, 4), json!({})).await;
    let other = server.version(&function, &[WEIR, "sample-function"]).await;
    server.deploy(&other, (1, 1, 4), json!({})).await;
    let ours = text(&server.instances(&function, "ready").await[0]["id"]);
    let theirs = text(&server.instances(&other, "ready").await[0]["id"]);

    let url = |path: &str| format!("http://{}{path}", server.data);
    let plain = |path: &str| server.http.get(url(path)).bearer_auth(&server.key);
    let pexec = format!("/v2/nvcf/pexec/functions/{}", function.id);
    let host = format!("{}.functions.test", function.id);
    let id = &function.id;
    let by_function = [
        plain("/infer?bytes=20").header("function-id", id),
        plain("/infer?bytes=20").header("host", &host),
        plain(&format!("{pexec}?bytes=20")),
    ];
    let mut seen = HashSet::new();
    for call in by_function {
        let response = call.send().await.unwrap();
        answered(&response);
        let request = header(&response, "nvcf-reqid").expect("a request ID");
        assert!(uuid::Uuid::try_parse(&request).is_ok());
        assert!(seen.insert(request), "a request ID came twice");
        assert_eq!(
            header(&response, "nvcf-status").as_deref(),
            Some("fulfilled")
        );
        assert_eq!(response.text().await.unwrap().len(), 20);
    }
    for (version, instance) in [(&function.version, &ours), (&other.version, &theirs)] {
        let by_version = [
            plain("/infer?bytes=20")
                .header("function-id", id)
                .header("function-version-id", version),
            plain("/infer?bytes=20").header("host", format!("{version}.{host}")),
            plain(&format!("{pexec}/versions/{version}?bytes=20")),
        ];
        for call in by_version {
            let response = call.send().await.unwrap();
            answered(&response);
            assert_eq!(header(&response, "x-instance").as_ref(), Some(instance));
        }
    }

    // An instance's own error is passed on, and told as one.
    let call = server.call(Method::GET, &function, "/nothing-there");
    let response = call.send().await.unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(header(&response, "x-weir-error"), None);
    assert_eq!(header(&response, "nvcf-status").as_deref(), Some("errored"));
}

#[tokio::test]
async fn the_credential_stays_with_weir() {
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let call = server
        .call(Method::GET, &function, "/head")
        .header("x-mine", "kept");
    let response = call.send().await.unwrap();
    answered(&response);
    let request = header(&response, "nvcf-reqid").expect("a request ID");
    let head = response.text().await.unwrap().to_ascii_lowercase();
    assert!(
        !head.contains("authorization") && !head.contains("bearer"),
        "{head}"
    );
    assert!(!head.contains(&server.key.to_ascii_lowercase()));
    assert!(head.contains("x-mine: kept"), "{head}");
    assert!(head.contains(&format!("nvcf-reqid: {request}")), "{head}");
}

#[tokio::test]
async fn what_may_not_be_called_is_refused_and_why() {
    let server = Server::with(&["--max-body", "1KiB"]);
    let function = server.sample((1, 1, 1), json!({})).await;
    let inactive = server.function(&[WEIR, "sample-function"], &[]).await;

    let url = format!("http://{}/echo", server.data);
    let unknown = server.http.get(&url).bearer_auth(&server.key);
    let unknown = unknown.header("function-id", ABSENT).send().await.unwrap();
    refused(&unknown, 404, "unknown-function");
    assert!(header(&unknown, "nvcf-reqid").is_some());
    assert_eq!(header(&unknown, "nvcf-status").as_deref(), Some("errored"));
    let call = server.call(Method::GET, &inactive, "/echo");
    refused(&call.send().await.unwrap(), 404, "unknown-function");

    let keyless = server.http.get(&url).header("function-id", &function.id);
    refused(&keyless.send().await.unwrap(), 401, "unauthenticated");
    let call = |key: &str| {
        let call = server.http.get(&url).bearer_auth(key);
        call.header("function-id", &function.id).send()
    };
    let wrong = call("weir_wrong").await.unwrap();
    refused(&wrong, 401, "unauthenticated");
    let (_, lister) = server.new_key(&["list_functions"]).await;
    refused(&call(&lister).await.unwrap(), 403, "forbidden");
    let (id, invoker) = server.new_key(&["invoke_function"]).await;
    answered(&call(&invoker).await.unwrap());
    let revoked = server.api(Method::DELETE, &format!("/v2/weir/keys/{id}"));
    assert!(revoked.send().await.unwrap().status().is_success());
    refused(&call(&invoker).await.unwrap(), 401, "unauthenticated");

    let large = server.call(Method::POST, &function, "/echo");
    let large = large.body(vec![b'x'; 1025]).send().await.unwrap();
    refused(&large, 413, "body-too-large");
    let largest = server.call(Method::POST, &function, "/echo");
    answered(&largest.body(vec![b'x'; 1024]).send().await.unwrap());
    // Without a length it shows on the way.
    let mut chunks = server.head(&function, "POST /infer");
    chunks.push_str("connection: close\r\ntransfer-encoding: chunked\r\n\r\n");
    for _ in 0..5 {
        chunks.push_str(&format!("100\r\n{}\r\n", "x".repeat(256)));
    }
    chunks.push_str("0\r\n\r\n");
    let mut caller = server.send(chunks.as_bytes()).await;
    let answer = crate::support::rest(&mut caller).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");

    let bad = server.http.get(&url).bearer_auth(&server.key);
    let bad = bad
        .header("function-id", "not-a-uuid")
        .send()
        .await
        .unwrap();
    refused(&bad, 400, "bad-request");
    let path = format!("http://{}/v2/nvcf/pexec/functions/not-a-uuid", server.data);
    let bad = server.http.post(path).bearer_auth(&server.key).send();
    refused(&bad.await.unwrap(), 400, "bad-request");

    // Undeployed, it is INACTIVE again.
    let undeploy = server.api(Method::DELETE, &function.deployment());
    assert!(undeploy.send().await.unwrap().status().is_success());
    eventually("the proxy knows that it is INACTIVE", SOON, async || {
        let call = server.call(Method::GET, &function, "/echo");
        (call.send().await.unwrap().status() == 404).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_event_arrives_before_the_next_is_made() {
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;

    let gate = server.directory().join("gate");
    let path = format!("/stream?gate={}", gate.display());
    let mut response = server
        .call(Method::GET, &function, &path)
        .send()
        .await
        .unwrap();
    answered(&response);
    let mut seen = String::new();
    while !seen.ends_with("\n\n") {
        let chunk = response.chunk().await.unwrap().expect("the first event");
        seen.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    assert_eq!(seen, "data: first\n\n");
    fs::write(gate, "").unwrap();
    assert_eq!(response.text().await.unwrap(), "data: last\n\n");
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn http_2_with_prior_knowledge_is_served() {
    let server = Server::start();
    let function = server.sample((1, 1, 2), json!({})).await;
    let stream = TcpStream::connect(server.data).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let calls = (0..10).map(|i| {
        let mut sender = sender.clone();
        let request = http::Request::post(format!("http://{}/echo", server.data))
            .header("authorization", format!("Bearer {}", server.key))
            .header("function-id", &function.id)
            .body(Full::new(Bytes::from(format!("call {i}"))))
            .unwrap();
        async move {
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.status(), 200);
            assert_eq!(response.version(), http::Version::HTTP_2);
            assert_eq!(response.headers()["nvcf-status"], "fulfilled");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, format!("call {i}"));
        }
    });
    tokio::time::timeout(SOON, join_all(calls))
        .await
        .expect("ten answers");
}

#[tokio::test]
async fn a_session_stays_on_its_instance() {
    let server = Server::start();
    let sticky = json!({
        "routing": {"policy": "consistent-hash"},
        "autoscaling": {"idleTimeout": "PT5M"},
    });
    let function = server.sample((3, 3, 4), sticky).await;
    let mut instances = HashSet::new();
    for session in 0..24 {
        let mut its = HashSet::new();
        for _ in 0..4 {
            let call = server.call(Method::GET, &function, "/infer");
            let call = call.header("x-session-id", format!("session-{session}"));
            let response = call.timeout(Duration::from_secs(10)).send().await.unwrap();
            answered(&response);
            its.insert(header(&response, "x-instance").unwrap());
        }
        assert_eq!(its.len(), 1, "session {session} was on {its:?}");
        instances.extend(its);
    }
    assert_eq!(instances.len(), 3, "24 sessions use every instance");
}
