//! What a collector of traces gets, and what instances are told of a trace.

use std::net::SocketAddr;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket},
    sync::watch,
};

use crate::{
    collector::{Collector, Span},
    support::{Function, SOON, Server, answered, eventually, header, refused},
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

fn parent(flags: &str) -> String {
    format!("00-{TRACE}-{CALLER}-{flags}")
}

/// A field of a head that an instance got.
fn told<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (field, value) = line.split_once(':')?;
        field.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let mut found = spans.iter().filter(|span| span.name == name);
    let span = found.next().unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(found.count(), 0, "several {name}");
    span
}

/// Calls `/head` of the test's own instance: the request's ID, and the head that the instance got.
async fn head(server: &Server, function: &Function, fields: &[(&str, &str)]) -> (String, String) {
    let mut call = server.call(Method::POST, function, "/head?secret=1");
    for (name, value) in fields {
        call = call.header(*name, *value);
    }
    let response = call.send().await.unwrap();
    answered(&response);
    let request = header(&response, "nvcf-reqid").unwrap();
    (request, response.text().await.unwrap())
}

#[tokio::test]
async fn a_cold_invocation_is_a_whole_trace_and_part_of_its_callers() {
    let collector = Collector::start().await;
    let server = Server::with_environment(
        &[],
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url()),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=of-a-test"),
            ("OTEL_SERVICE_NAME", "weir-of-a-test"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=tests"),
        ],
    );
    let books = tempfile::tempdir().unwrap();
    let function = server.bookkeeper(books.path()).await;
    server.deploy(&function, (0, 1, 1), json!({})).await;
    let fields = [("traceparent", &parent("01")[..]), ("tracestate", "a=b")];
    let (request, head) = head(&server, &function, &fields).await;

    let (root, below) = collector.invocation(&request).await;
    let all = || std::iter::once(&root).chain(&below);
    assert!(all().all(|span| span.trace == TRACE && !span.failed));
    assert_eq!((&root.name[..], &root.parent[..]), ("POST", CALLER));
    assert_eq!(root.kind, "SPAN_KIND_SERVER");
    for (name, value) in [
        ("http.request.method", "POST"),
        ("http.response.status_code", "200"),
        ("client.address", "127.0.0.1"),
        ("network.protocol.version", "1.1"),
        ("weir.function.id", &function.id),
        ("weir.version.id", &function.version),
        ("weir.error.code", ""),
    ] {
        assert_eq!(root.get(name), value, "{name}");
    }
    assert_eq!(root.resource["service.name"], "weir-of-a-test");
    assert_eq!(root.resource["service.namespace"], "tests");

    assert_eq!(below.len(), 3, "{below:?}");
    let (queue, start) = (named(&below, "queue"), named(&below, "start"));
    let attempt = named(&below, "POST");
    assert_eq!(queue.get("weir.queue.cold"), "true");
    let instance = server.ready(&function, 1).await.remove(0);
    let id = instance["id"].as_str().unwrap();
    assert_eq!(start.get("weir.instance.id"), id);
    assert_eq!(attempt.kind, "SPAN_KIND_CLIENT");
    for (name, value) in [
        ("weir.instance.id", id),
        ("weir.connect.failed", "false"),
        ("http.response.status_code", "200"),
        ("http.request.resend_count", ""),
    ] {
        assert_eq!(attempt.get(name), value, "{name}");
    }
    let address = instance["address"].as_str().unwrap();
    let (host, port) = address.rsplit_once(':').unwrap();
    assert_eq!(attempt.get("server.address"), host);
    assert_eq!(attempt.get("server.port"), port);
    // One after the other, and the start within the wait.
    let order = [
        root.start,
        queue.start,
        start.start,
        start.end,
        queue.end,
        attempt.start,
        attempt.end,
        root.end,
    ];
    assert!(order.is_sorted(), "{order:?}");

    // What the instance heard.
    let heard = format!("00-{TRACE}-{}-01", attempt.id);
    assert_eq!(told(&head, "traceparent"), Some(&heard[..]));
    assert_eq!(told(&head, "tracestate"), Some("a=b"));

    let message = collector.heads().remove(0);
    assert!(message.starts_with("POST /v1/traces HTTP/1.1"), "{message}");
    assert!(message.contains("x-tenant: of-a-test"), "{message}");
}

#[tokio::test]
async fn the_caller_decides_what_is_sampled_and_else_the_ratio() {
    let collector = Collector::start().await;
    let url = collector.url();
    for ratio in ["0", "1"] {
        let server = Server::with(&["--otlp-endpoint", &url, "--trace-sample", ratio]);
        let books = tempfile::tempdir().unwrap();
        let function = server.books(books.path(), 1).await;
        let (unsampled, heard) = head(&server, &function, &[("traceparent", &parent("00"))]).await;
        let heard = told(&heard, "traceparent").unwrap();
        assert!(heard.starts_with(&format!("00-{TRACE}-")) && heard.ends_with("-00"));
        assert!(!heard.contains(CALLER), "{heard}");

        let fields = [("traceparent", "nonsense"), ("tracestate", "a=b")];
        let (new, heard) = head(&server, &function, &fields).await;
        assert_eq!(told(&heard, "tracestate"), None);
        let flags = if ratio == "1" { "-01" } else { "-00" };
        let parent_of_new = told(&heard, "traceparent").unwrap();
        assert!(parent_of_new.ends_with(flags), "{parent_of_new}");

        let (last, _) = head(&server, &function, &[("traceparent", &parent("01"))]).await;
        collector.invocation(&last).await;
        // They come in order, so these would be here too.
        let spans = collector.spans();
        let of = |request: &str| {
            let request = request.to_owned();
            spans
                .iter()
                .find(move |span| span.get("weir.request.id") == request)
        };
        assert!(of(&unsampled).is_none());
        match ratio {
            "1" => {
                let root = of(&new).unwrap();
                assert_eq!(root.parent, "");
                assert!(parent_of_new.contains(&root.trace), "{parent_of_new}");
            }
            _ => assert!(of(&new).is_none()),
        }
    }
}

#[tokio::test]
async fn without_a_collector_trace_contexts_pass() {
    let server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let function = server.books(books.path(), 1).await;
    let fields = [("traceparent", &parent("01")[..]), ("tracestate", "a=b")];
    let (_, heard) = head(&server, &function, &fields).await;
    assert_eq!(told(&heard, "traceparent"), Some(&parent("01")[..]));
    assert_eq!(told(&heard, "tracestate"), Some("a=b"));
    let (_, heard) = head(&server, &function, &[]).await;
    let new = told(&heard, "traceparent").unwrap();
    assert!(new.len() == 55 && new.ends_with("-00"), "{new}");
}

#[tokio::test]
async fn what_went_wrong_is_in_the_trace() {
    let collector = Collector::start().await;
    let server = Server::with(&["--otlp-endpoint", &collector.url(), "--trace-sample", "1"]);
    let trace = async |response: &reqwest::Response| {
        let request = header(response, "nvcf-reqid").unwrap();
        collector.invocation(&request).await
    };

    let function = server
        .says("HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n")
        .await;
    let response = server.call(Method::GET, &function, "/").send().await;
    let (root, below) = trace(&response.unwrap()).await;
    assert!(root.failed && root.get("error.type") == "500");
    assert_eq!(root.get("weir.error.code"), "");
    assert!(below[0].failed && below[0].get("error.type") == "500");

    let function = server
        .says("HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n")
        .await;
    let response = server.call(Method::GET, &function, "/").send().await;
    let (root, below) = trace(&response.unwrap()).await;
    assert!(!root.failed && root.get("error.type").is_empty());
    assert!(below[0].failed && below[0].get("error.type") == "404");

    let function = server
        .says("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello")
        .await;
    let pexec = format!(
        "http://{}/v2/nvcf/pexec/functions/{}",
        server.data, function.id
    );
    let response = server.http.get(pexec).bearer_auth(&server.key).send().await;
    let response = response.unwrap();
    let request = header(&response, "nvcf-reqid").unwrap();
    assert!(response.bytes().await.is_err());
    let (root, below) = collector.invocation(&request).await;
    assert_eq!(root.name, "GET /v2/nvcf/pexec/functions/{functionId}");
    assert_eq!(root.get("http.response.status_code"), "200");
    for span in [&root, &below[0]] {
        assert!(span.failed && span.get("error.type") == "instance-lost");
    }

    let queue = json!({"queue": {"busyTimeout": "PT0.2S"}});
    let function = server.sample((1, 1, 1), queue).await;
    let _running = server.occupy(&function).await;
    let response = server.call(Method::GET, &function, "/infer").send().await;
    let response = response.unwrap();
    refused(&response, 504, "busy-timeout");
    let (root, below) = trace(&response).await;
    assert!(root.failed && root.get("weir.error.code") == "busy-timeout");
    let [queue] = &below[..] else {
        panic!("{below:?}")
    };
    assert!(queue.failed && queue.get("error.type") == "busy-timeout");
    assert_eq!(queue.get("weir.queue.cold"), "false");

    let call = server.http.get(format!("http://{}/infer", server.data));
    let call = call.header("function-id", &function.id).send();
    let response = call.await.unwrap();
    let (root, below) = trace(&response).await;
    assert!(!root.failed && below.is_empty());
    assert_eq!(root.get("http.response.status_code"), "401");
    assert_eq!(root.get("weir.error.code"), "unauthenticated");
}

/// An instance that answers once the gate is open, and says at once that it is well.
async fn gated(gate: watch::Receiver<bool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut gate = gate.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                if !head.starts_with(b"GET /health ") {
                    _ = gate.wait_for(|open| *open).await;
                }
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                stream.write_all(answer).await?;
                stream.shutdown().await
            });
        }
    });
    address
}

#[tokio::test]
async fn each_attempt_is_a_span() {
    let collector = Collector::start().await;
    let server = Server::with(&["--otlp-endpoint", &collector.url(), "--trace-sample", "1"]);
    let (open, gate) = watch::channel(false);
    let well = gated(gate).await;
    // It has the port and does not listen: to connect is refused.
    let deaf = TcpSocket::new_v4().unwrap();
    deaf.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let asked = json!({
        "name": "of-a-test",
        "inferenceUrl": "/infer",
        "endpoints": [format!("http://{}", deaf.local_addr().unwrap()), format!("http://{well}")],
        "health": {"protocol": "HTTP", "uri": "/health", "port": well.port(), "timeout": "PT5S",
                   "expectedStatusCode": 200},
    });
    let function = Function::of(&server.post("/v2/nvcf/functions", &asked).await);
    server.deploy(&function, (2, 2, 1), json!({})).await;

    // One of them can't have the instance that is well.
    let call = || server.call(Method::GET, &function, "/infer").send();
    let both = async { tokio::join!(call(), call()) };
    let opens = async {
        eventually("an attempt failed", SOON, async || {
            let page = server.metrics().await;
            let failed = page
                .lines()
                .find(|line| line.starts_with("weir_connect_failures_total{"))?;
            (!failed.ends_with(" 0")).then_some(())
        })
        .await;
        open.send_replace(true);
    };
    let ((first, second), ()) = tokio::join!(both, opens);
    let mut retried = Vec::new();
    for response in [first.unwrap(), second.unwrap()] {
        answered(&response);
        let request = header(&response, "nvcf-reqid").unwrap();
        let (root, below) = collector.invocation(&request).await;
        assert!(!root.failed);
        let attempts: Vec<Span> = below
            .into_iter()
            .filter(|span| span.kind == "SPAN_KIND_CLIENT")
            .collect();
        if attempts.len() > 1 {
            retried = attempts;
        }
    }
    let [first, .., last] = &retried[..] else {
        panic!("none was sent again")
    };
    assert!(first.failed && first.end <= last.start);
    assert_eq!(first.get("weir.connect.failed"), "true");
    assert_eq!(first.get("error.type"), "instance-refused");
    assert!(!last.failed);
    assert_eq!(last.get("weir.connect.failed"), "false");
    assert_eq!(
        last.get("http.request.resend_count"),
        (retried.len() - 1).to_string()
    );
    assert_ne!(first.get("weir.instance.id"), last.get("weir.instance.id"));
}

#[tokio::test]
async fn a_collector_that_is_away_costs_traces_and_nothing_else() {
    let nobody = TcpSocket::new_v4().unwrap();
    nobody.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    let mut server = Server::with(&["--otlp-endpoint", &url, "--trace-sample", "1"]);
    let function = server.sample((1, 1, 1), json!({})).await;
    // The second is lost after the first, so that there was time for a second warning.
    for lost in 1..=2 {
        let response = server.call(Method::GET, &function, "/infer").send().await;
        answered(&response.unwrap());
        eventually("it is lost and counted", SOON, async || {
            let page = server.metrics().await;
            let counted = format!("weir_traces_dropped_total {lost}");
            page.lines().any(|line| line == counted).then_some(())
        })
        .await;
    }
    let warnings = server.said().matches("traces were lost").count();
    assert_eq!(warnings, 1, "{}", server.said());
    server.signal(Signal::TERM);
    assert!(server.exit().await.success());
}

#[tokio::test]
async fn a_stop_sends_what_is_left() {
    let collector = Collector::start().await;
    let mut server = Server::with(&["--otlp-endpoint", &collector.url(), "--trace-sample", "1"]);
    let function = server.sample((1, 1, 1), json!({})).await;
    let response = server.call(Method::GET, &function, "/infer").send().await;
    let request = header(&response.unwrap(), "nvcf-reqid").unwrap();
    server.signal(Signal::TERM);
    assert!(server.exit().await.success());
    let sent = collector.spans();
    assert!(
        sent.iter()
            .any(|span| span.get("weir.request.id") == request)
    );
}

#[tokio::test]
async fn what_names_no_function_is_not_traced() {
    let collector = Collector::start().await;
    let server = Server::with(&["--otlp-endpoint", &collector.url(), "--trace-sample", "1"]);
    let function = server.sample((1, 1, 1), json!({})).await;
    let health = server.http.get(format!("http://{}/healthz", server.data));
    assert!(health.send().await.unwrap().status().is_success());
    let response = server.call(Method::GET, &function, "/infer").send().await;
    let request = header(&response.unwrap(), "nvcf-reqid").unwrap();
    collector.invocation(&request).await;
    // They come in order, so the other would be here too.
    let spans = collector.spans();
    let roots = spans.iter().filter(|span| span.kind == "SPAN_KIND_SERVER");
    assert_eq!(roots.count(), 1);
}
