//! Instances, collectors and servers that are called over TLS, with an
//! authority of the test's own.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use reqwest::Method;
use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    cli::{Ran, command},
    collector::Collector,
    support::{Function, SOON, Server, WEIR, answered, definition, eventually, header, text},
};

/// An authority whose certificate is in a file.
struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, directory.path().display().to_string());
        let certificate = params.self_signed(&key).unwrap();
        fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self {
            directory,
            issuer: Issuer::new(params, key),
        }
    }

    fn file(&self) -> String {
        self.path("ca.pem").display().to_string()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A certificate for a name or an address, until the end of a year.
    fn certificate(&self, name: &str, until: i32) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(until, 12, 31);
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    fn acceptor(&self, name: &str, until: i32) -> TlsAcceptor {
        let (certificate, key) = self.certificate(name, until);
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// A server over TLS that ends a request when its connection closes.
#[derive(Clone)]
struct Instance {
    address: SocketAddr,
    told: Arc<Told>,
}

#[derive(Default)]
struct Told {
    /// Requests that were not for its health.
    came: AtomicUsize,
    /// Connections that brought one.
    connections: AtomicUsize,
    /// Requests that ended with a close_notify.
    closed: AtomicUsize,
}

impl Instance {
    async fn start(acceptor: TlsAcceptor) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let told = Arc::<Told>::default();
        let this = Self {
            address,
            told: told.clone(),
        };
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, told) = (acceptor.clone(), told.clone());
                tokio::spawn(async move { serve(acceptor, stream, &told).await });
            }
        });
        this
    }

    fn told(of: &AtomicUsize) -> usize {
        of.load(Ordering::SeqCst)
    }
}

async fn serve(acceptor: TlsAcceptor, stream: TcpStream, told: &Told) -> std::io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let mut known = false;
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        if !head.starts_with(b"GET /health ") {
            told.came.fetch_add(1, Ordering::SeqCst);
            if !std::mem::replace(&mut known, true) {
                told.connections.fetch_add(1, Ordering::SeqCst);
            }
        }
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone";
        if head.starts_with(b"GET /work") {
            closed(&mut stream, told).await;
            return stream.shutdown().await;
        } else if head.starts_with(b"GET /pour") {
            let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n";
            stream.write_all(head).await?;
            let (mut reader, mut writer) = tokio::io::split(stream);
            let pour = async {
                while writer.write_all(&[0; 65_536]).await.is_ok() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                () = pour => (),
                () = closed(&mut reader, told) => (),
            }
            return Ok(());
        } else if head.starts_with(b"POST /deaf") {
            std::future::pending::<()>().await;
        }
        stream.write_all(answer).await?;
    }
}

/// Waits until the caller closes its side.
async fn closed(reader: &mut (impl AsyncReadExt + Unpin), told: &Told) {
    if matches!(reader.read(&mut [0; 64]).await, Ok(0)) {
        told.closed.fetch_add(1, Ordering::SeqCst);
    }
}

/// A function whose instance is at this URL, not deployed.
async fn defined(server: &Server, url: &str) -> Function {
    let mut asked = definition(&[], &[]);
    asked["process"].take();
    asked["endpoints"] = json!([url]);
    Function::of(&server.post("/v2/nvcf/functions", &asked).await)
}

async fn deployed(server: &Server, url: &str, extra: Value) -> Function {
    let function = defined(server, url).await;
    server.deploy(&function, (1, 1, 1), extra).await;
    function
}

#[tokio::test]
async fn an_instance_is_called_over_tls_and_its_trace_sent_over_tls() {
    let authority = Authority::new();
    let collector = Collector::over_tls(authority.acceptor("localhost", 2999)).await;
    let server = Server::with_environment(
        &["--instance-ca", &authority.file(), "--trace-sample", "1"],
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url()),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", &authority.file()),
        ],
    );
    for name in ["localhost", "127.0.0.1"] {
        let instance = Instance::start(authority.acceptor(name, 2999)).await;
        let port = instance.address.port();
        let function = deployed(&server, &format!("https://{name}:{port}"), json!({})).await;
        let shown = server.instances(&function, "ready").await;
        assert_eq!(text(&shown[0]["serverName"]), name);
        let mut request = String::new();
        for _ in 0..3 {
            let response = server.call(Method::GET, &function, "/").send().await;
            let response = response.unwrap();
            answered(&response);
            request = header(&response, "nvcf-reqid").unwrap();
            assert_eq!(response.text().await.unwrap(), "done");
        }
        server.until_busy(&function, 0).await;
        assert_eq!(Instance::told(&instance.told.came), 3);
        assert_eq!(Instance::told(&instance.told.connections), 1);
        let (own, below) = collector.invocation(&request).await;
        assert_eq!(own.get("url.scheme"), "http");
        assert_eq!(below.last().unwrap().get("url.scheme"), "https");
    }
}

#[tokio::test]
async fn a_cancel_over_tls_frees_the_slot_once_the_instance_has_closed() {
    let authority = Authority::new();
    let server = Server::with(&["--instance-ca", &authority.file()]);
    let instance = Instance::start(authority.acceptor("localhost", 2999)).await;
    let url = format!("https://localhost:{}", instance.address.port());
    let function = deployed(&server, &url, json!({"cancelTimeout": "PT1H"})).await;
    for (count, path) in [(1, "/work"), (2, "/pour")] {
        let head = server.head(&function, &format!("GET {path}"));
        let caller = server.send(format!("{head}\r\n").as_bytes()).await;
        server.until_busy(&function, 1).await;
        eventually("the instance has it", SOON, async || {
            (Instance::told(&instance.told.came) == count).then_some(())
        })
        .await;
        drop(caller);
        server.until_busy(&function, 0).await;
    }
    // One that went on is told by its connection's end, so it need not hear the close_notify itself.
    assert!(Instance::told(&instance.told.closed) >= 1);
}

#[tokio::test]
async fn an_instance_over_tls_that_neither_reads_nor_closes_is_cut_off() {
    let authority = Authority::new();
    let server = Server::with(&["--instance-ca", &authority.file()]);
    let instance = Instance::start(authority.acceptor("localhost", 2999)).await;
    let url = format!("https://localhost:{}", instance.address.port());
    let function = deployed(&server, &url, json!({"cancelTimeout": "PT0.1S"})).await;
    let head = server.head(&function, "POST /deaf");
    let length = 64 << 20;
    let mut caller = server
        .send(format!("{head}content-length: {length}\r\n\r\n").as_bytes())
        .await;
    // More than the sockets hold; Weir stops to read where the instance does not.
    let body = vec![0; length];
    tokio::select! {
        _ = caller.write_all(&body) => panic!("all of it was read"),
        () = async {
            server.until_busy(&function, 1).await;
            eventually("the instance has it", SOON, async || {
                (Instance::told(&instance.told.came) == 1).then_some(())
            }).await;
        } => (),
    }
    // A FIN would not get past what is unread.
    let socket = socket2::SockRef::from(&caller);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    drop(caller);
    server.until_busy(&function, 0).await;
    let counted = format!("version=\"{}\"}} 1", function.version);
    let page = server.metrics().await;
    let mut lines = page
        .lines()
        .filter(|l| l.starts_with("weir_cancel_timeouts_total"));
    assert!(lines.any(|line| line.ends_with(&counted)), "{page}");
}

#[tokio::test]
async fn what_is_wrong_with_an_instances_certificate_is_told() {
    let (authority, other) = (Authority::new(), Authority::new());
    let server = Server::with(&["--instance-ca", &authority.file()]);
    let plain = Server::start();
    for (server, acceptor, says) in [
        (
            &plain,
            authority.acceptor("localhost", 2999),
            "give --instance-ca",
        ),
        (
            &server,
            other.acceptor("localhost", 2999),
            "give --instance-ca",
        ),
        (
            &server,
            authority.acceptor("other.test", 2999),
            "not for the name localhost",
        ),
        (
            &server,
            authority.acceptor("localhost", 2001),
            "has expired",
        ),
    ] {
        let instance = Instance::start(acceptor).await;
        let url = format!("https://localhost:{}", instance.address.port());
        told(server, &url, says).await;
    }
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = silent.accept().await.unwrap();
            _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        }
    });
    told(&server, &format!("https://{address}"), "does not speak TLS").await;
}

/// Asserts that the instance at this URL is in error, and why.
async fn told(server: &Server, url: &str, says: &str) {
    let function = defined(server, url).await;
    let body = json!({
        "deploymentSpecifications": [{
            "gpu": "none", "instanceType": "none", "minInstances": 1, "maxInstances": 1,
        }],
        "startTimeout": "PT1S",
    });
    server.post(&function.deployment(), &body).await;
    let why = eventually("the instance is in error", SOON, async || {
        let failed = server.instances(&function, "error").await;
        Some(text(&failed.first()?["error"]))
    })
    .await;
    assert!(why.contains(says) && why.contains(url), "{says}: {why}");
}

#[tokio::test]
async fn commands_speak_tls_with_the_authority_they_are_given() {
    let authority = Authority::new();
    let (certificate, key) = authority.certificate("127.0.0.1", 2999);
    let (certificate_file, key_file) = (authority.path("own.pem"), authority.path("own.key"));
    fs::write(&certificate_file, certificate.pem()).unwrap();
    fs::write(&key_file, key.serialize_pem()).unwrap();
    let (c, k) = (
        certificate_file.to_str().unwrap(),
        key_file.to_str().unwrap(),
    );
    let flags = [
        "--tls-cert",
        c,
        "--tls-key",
        k,
        "--admin-tls-cert",
        c,
        "--admin-tls-key",
        k,
    ];
    let server = Server::with(&flags);
    let run = async |words: &[&str]| {
        let mut command = command(words);
        command
            .env("WEIR_ADMIN_URL", format!("https://{}", server.admin))
            .env("WEIR_URL", format!("https://{}", server.data))
            .env("WEIR_DATA_DIR", server.directory());
        Ran::of(command.output().await.unwrap())
    };
    let ca = authority.file();
    let create = [
        "function",
        "create",
        "f",
        "--ca-file",
        &ca,
        "--inference-url",
        "/infer",
    ];
    let sample = ["--", WEIR, "sample-function"];
    let created = run(&[&create[..], &sample].concat()).await;
    assert_eq!(created.code, 0, "{}", created.err);
    let deployed = run(&["deploy", "create", "f", "--ca-file", &ca]).await;
    assert_eq!(deployed.code, 0, "{}", deployed.err);
    let status = run(&["status", "--once", "--ca-file", &ca]).await;
    assert_eq!(status.code, 0, "{}", status.err);
    assert!(status.out.contains("ACTIVE"), "{}", status.out);
    let called = run(&["invoke", "f", "--path", "/infer", "--ca-file", &ca]).await;
    assert_eq!(called.code, 0, "{}", called.err);

    let id = "00000000-0000-4000-8000-000000000000";
    let bench = [
        "bench",
        "load",
        "--rate",
        "1",
        "--duration",
        "PT1S",
        "--url",
        &format!("https://{}", server.data),
        "--admin",
        &format!("https://{}", server.admin),
    ];
    for words in [
        &["status", "--once"][..],
        &["invoke", id, "--version", id],
        &bench,
    ] {
        run(words).await.failed(&["not trusted", "--ca-file"]);
    }
    let nothing = run(&["status", "--once", "--ca-file", k]).await;
    nothing.failed(&["--ca-file", "holds no certificate"]);
    let missing = run(&["status", "--once", "--ca-file", "/no/such"]).await;
    missing.failed(&["--ca-file", "/no/such"]);
}
