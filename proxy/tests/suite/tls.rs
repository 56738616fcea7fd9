//! TLS on both listeners: versions, names, resumption, and certificates that
//! are exchanged while callers call.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use rustls::{
    ClientConfig, HandshakeKind, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName},
    version::{TLS12, TLS13},
};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::support::{Function, SOON, Server, eventually};

/// A certificate for these names, in files.
struct Certificate {
    certificate: PathBuf,
    key: PathBuf,
    der: CertificateDer<'static>,
}

impl Certificate {
    fn write(directory: &Path, file: &str, names: &[&str]) -> Self {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let made: CertifiedKey<KeyPair> = generate_simple_self_signed(names).unwrap();
        let written = Self {
            certificate: directory.join(format!("{file}.pem")),
            key: directory.join(format!("{file}.key")),
            der: made.cert.der().clone(),
        };
        // The key last: until then the two do not belong together, and the old ones stay.
        fs::write(&written.certificate, made.cert.pem()).unwrap();
        fs::write(&written.key, made.signing_key.serialize_pem()).unwrap();
        written
    }
}

struct Secure {
    server: Server,
    function: Function,
    directory: TempDir,
    first: Certificate,
    second: Certificate,
}

/// A data plane with two certificates, and the sample function.
async fn secure() -> Secure {
    let directory = tempfile::tempdir().unwrap();
    let first = Certificate::write(directory.path(), "first", &["first.test", "*.first.test"]);
    let second = Certificate::write(directory.path(), "second", &["second.test"]);
    let list = |of: fn(&Certificate) -> &PathBuf| {
        let paths = [of(&first), of(&second)];
        paths.map(|path| path.display().to_string()).join(",")
    };
    let (certificates, keys) = (list(|c| &c.certificate), list(|c| &c.key));
    let server = Server::with(&["--tls-cert", &certificates, "--tls-key", &keys]);
    let function = server.sample((1, 1, 4), json!({})).await;
    Secure {
        server,
        function,
        directory,
        first,
        second,
    }
}

/// A client that trusts these alone.
fn client(
    trusted: &[&Certificate],
    versions: &[&'static SupportedProtocolVersion],
    protocol: &str,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in trusted {
        roots.add(certificate.der.clone()).unwrap();
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.into()];
    Arc::new(config)
}

async fn connect(
    server: &Server,
    config: &Arc<ClientConfig>,
    name: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(server.data).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(config.clone())
        .connect(name, stream)
        .await
}

/// The whole answer on a connection that Weir then closes.
async fn answer(stream: &mut TlsStream<TcpStream>, server: &Server, function: &Function) -> String {
    let head = server.head(function, "GET /infer");
    let request = format!("{head}connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).await.unwrap();
    all
}

#[tokio::test]
async fn both_versions_and_both_protocols_are_spoken() {
    let Secure {
        server,
        function,
        first,
        ..
    } = secure().await;
    for (version, spoken) in [
        (&TLS12, ProtocolVersion::TLSv1_2),
        (&TLS13, ProtocolVersion::TLSv1_3),
    ] {
        let http1 = client(&[&first], &[version], "http/1.1");
        let mut stream = connect(&server, &http1, "first.test").await.unwrap();
        assert_eq!(stream.get_ref().1.protocol_version(), Some(spoken));
        let text = answer(&mut stream, &server, &function).await;
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");

        let http2 = client(&[&first], &[version], "h2");
        let stream = connect(&server, &http2, "a.first.test").await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .unwrap();
        tokio::spawn(connection);
        let request = http::Request::get("https://first.test/infer")
            .header("authorization", format!("Bearer {}", server.key))
            .header("function-id", &function.id)
            .body(Empty::<Bytes>::new())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(response.headers().contains_key("nvcf-reqid"));
        response.into_body().collect().await.unwrap();
    }
    server.until_busy(&function, 0).await;
}

#[tokio::test]
async fn a_name_chooses_its_certificate_and_another_the_first() {
    let Secure {
        server,
        first,
        second,
        ..
    } = secure().await;
    let both = client(&[&first, &second], &[&TLS13, &TLS12], "http/1.1");
    for (name, certificate) in [
        ("first.test", &first),
        ("x.first.test", &first),
        ("second.test", &second),
    ] {
        let stream = connect(&server, &both, name).await.unwrap();
        let shown = &stream.get_ref().1.peer_certificates().unwrap()[0];
        assert_eq!(shown, &certificate.der, "{name}");
    }
    // The first is shown, and this client sees that it is for others.
    let error = connect(&server, &both, "third.test").await.unwrap_err();
    assert!(error.to_string().contains("first.test"), "{error}");
}

#[tokio::test]
async fn sessions_are_resumed() {
    let Secure {
        server,
        function,
        first,
        ..
    } = secure().await;
    for version in [&TLS12, &TLS13] {
        let config = client(&[&first], &[version], "http/1.1");
        let mut kinds = Vec::new();
        for _ in 0..2 {
            let mut stream = connect(&server, &config, "first.test").await.unwrap();
            answer(&mut stream, &server, &function).await;
            kinds.push(stream.get_ref().1.handshake_kind());
        }
        assert_eq!(kinds[1], Some(HandshakeKind::Resumed), "{kinds:?}");
    }
}

#[tokio::test]
async fn http_without_tls_is_told_so() {
    let Secure {
        server, function, ..
    } = secure().await;
    let refused = server.call(reqwest::Method::GET, &function, "/infer");
    let response = refused.send().await.unwrap();
    crate::support::refused(&response, 400, "bad-request");
    assert!(response.headers().contains_key("nvcf-reqid"));
    assert!(response.text().await.unwrap().contains("https://"));
    // What is neither is a failed handshake.
    let mut stream = TcpStream::connect(server.data).await.unwrap();
    stream
        .write_all(b"\x16\x03\x01\x00\x05hello")
        .await
        .unwrap();
    let mut end = Vec::new();
    _ = stream.read_to_end(&mut end).await;
    eventually("it is counted", SOON, async || {
        let page = server.metrics().await;
        page.contains("weir_tls_handshake_failures_total{listener=\"data\"} 1")
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn leaving_the_queue_over_tls_frees_the_place() {
    let directory = tempfile::tempdir().unwrap();
    let certificate = Certificate::write(directory.path(), "one", &["one.test"]);
    let path = |path: &PathBuf| path.display().to_string();
    let server = Server::with(&[
        "--tls-cert",
        &path(&certificate.certificate),
        "--tls-key",
        &path(&certificate.key),
    ]);
    let function = server.sample((1, 1, 1), json!({})).await;
    let config = client(&[&certificate], &[&TLS13], "http/1.1");
    let call = async |path: &str| {
        let mut stream = connect(&server, &config, "one.test").await.unwrap();
        let head = server.head(&function, path);
        let request = format!("{head}content-length: 5\r\n\r\nhello");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        stream
    };
    let running = call("POST /infer?ms=600000").await;
    server.until_busy(&function, 1).await;
    let waiting = call("POST /echo").await;
    server.until_queued(&function, 1).await;
    drop(waiting);
    server.until_queued(&function, 0).await;
    assert_eq!(server.busy(&function).await, 1.0);
    drop(running);
    server.until_busy(&function, 0).await;
}

/// Calls on new connections until told to stop: how many calls there were, and how many saw the new certificate.
async fn call_on(
    server: &Server,
    function: &Function,
    trusted: [&Certificate; 2],
    stop: &AtomicBool,
    seen: &AtomicUsize,
) -> usize {
    let mut config = client(&trusted, &[&TLS13], "http/1.1");
    // A resumed session shows no certificate.
    Arc::make_mut(&mut config).resumption = Resumption::disabled();
    let mut calls = 0;
    while !stop.load(Ordering::SeqCst) {
        let mut stream = connect(server, &config, "first.test").await.unwrap();
        let text = answer(&mut stream, server, function).await;
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
        let shown = &stream.get_ref().1.peer_certificates().unwrap()[0];
        if shown == &trusted[1].der {
            seen.fetch_add(1, Ordering::SeqCst);
        }
        calls += 1;
    }
    calls
}

#[tokio::test]
async fn certificates_are_exchanged_under_load_and_nobody_notices() {
    let Secure {
        server,
        function,
        directory,
        first,
        ..
    } = secure().await;
    let (stop, seen) = (AtomicBool::new(false), AtomicUsize::new(0));

    // One that is open all the time, on the certificate it was opened with.
    let config = client(&[&first], &[&TLS13], "http/1.1");
    let mut kept = connect(&server, &config, "first.test").await.unwrap();
    let expiry = "weir_tls_certificate_expiry_timestamp_seconds{listener=\"data\"} ";
    assert!(server.metrics().await.contains(expiry));

    // Half a file is no certificate: the old one stays.
    fs::write(&first.certificate, "-----BEGIN CERT").unwrap();
    eventually("it is told", SOON, async || {
        server.said().contains("the old ones stay").then_some(())
    })
    .await;
    connect(&server, &config, "first.test").await.unwrap();

    let next = Certificate::write(directory.path(), "next", &["first.test"]);
    let exchange = async {
        fs::rename(&next.certificate, &first.certificate).unwrap();
        fs::rename(&next.key, &first.key).unwrap();
        eventually("new connections see the new one", SOON, async || {
            (seen.load(Ordering::SeqCst) > 20).then_some(())
        })
        .await;
        stop.store(true, Ordering::SeqCst);
    };
    let calls = (0..8).map(|_| call_on(&server, &function, [&first, &next], &stop, &seen));
    let (calls, ()) = tokio::join!(join_all(calls), exchange);
    println!("{} calls, none failed", calls.iter().sum::<usize>());
    let text = answer(&mut kept, &server, &function).await;
    assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
}

#[tokio::test]
async fn the_admin_listener_speaks_tls_too() {
    let directory = tempfile::tempdir().unwrap();
    let one = Certificate::write(directory.path(), "one", &["one.test"]);
    let path = |path: &PathBuf| path.display().to_string();
    let (certificate, key) = (path(&one.certificate), path(&one.key));
    let flags = ["--admin-tls-cert", &certificate, "--admin-tls-key", &key];
    let server = Server::with(&flags);
    let config = client(&[&one], &[&TLS13, &TLS12], "http/1.1");
    // One that never shakes hands holds nobody up.
    let _silent = TcpStream::connect(server.admin).await.unwrap();
    let stream = TcpStream::connect(server.admin).await.unwrap();
    let name = ServerName::try_from("one.test").unwrap();
    let mut stream = TlsConnector::from(config)
        .connect(name, stream)
        .await
        .unwrap();
    let request = b"GET /readyz HTTP/1.1\r\nhost: one.test\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
}

#[test]
fn files_that_do_not_fit_are_told_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let one = Certificate::write(directory.path(), "one", &["one.test"]);
    let two = Certificate::write(directory.path(), "two", &["two.test"]);
    let nothing = directory.path().join("nothing");
    for (certificate, key, part) in [
        (&one.certificate, &two.key, "is not that of the certificate"),
        (&one.certificate, &nothing, "can't be read"),
        (&one.key, &one.key, "holds no certificate"),
        (&one.certificate, &one.certificate, "holds no private key"),
    ] {
        let output = std::process::Command::new(crate::support::WEIR)
            .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .arg("--data-dir")
            .arg(directory.path().join("data"))
            .arg("--tls-cert")
            .arg(certificate)
            .arg("--tls-key")
            .arg(key)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(part), "{part}: {said}");
    }
}
