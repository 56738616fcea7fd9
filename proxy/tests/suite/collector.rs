//! A collector of traces: takes OTLP over HTTP as real ones do, and keeps the
//! spans.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{KeyValue, any_value},
};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use crate::support::{SOON, eventually};

pub(crate) struct Collector {
    url: String,
    kept: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    spans: Vec<Span>,
    /// Of the messages.
    heads: Vec<String>,
    bodies: Vec<u8>,
}

/// A span in words.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) trace: String,
    pub(crate) id: String,
    /// Empty: there is none.
    pub(crate) parent: String,
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    /// Nanoseconds.
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) failed: bool,
    pub(crate) attributes: BTreeMap<String, String>,
    pub(crate) resource: BTreeMap<String, String>,
}

impl Span {
    /// An attribute; empty where there is none.
    pub(crate) fn get(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let (this, listener) = Self::listening("http").await;
        let kept = this.kept.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, kept.clone()));
            }
        });
        this
    }

    /// One that speaks TLS only, as `localhost`.
    pub(crate) async fn over_tls(acceptor: TlsAcceptor) -> Self {
        let (this, listener) = Self::listening("https").await;
        let kept = this.kept.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (accepting, kept) = (acceptor.accept(stream), kept.clone());
                tokio::spawn(async move { serve(accepting.await?, kept).await });
            }
        });
        this
    }

    async fn listening(scheme: &str) -> (Self, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let this = Self {
            url: format!("{scheme}://localhost:{port}"),
            kept: Arc::default(),
        };
        (this, listener)
    }

    pub(crate) fn url(&self) -> String {
        self.url.clone()
    }

    pub(crate) fn spans(&self) -> Vec<Span> {
        self.kept.lock().unwrap().spans.clone()
    }

    /// The heads of all messages.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.kept.lock().unwrap().heads.clone()
    }

    /// Everything that came, as it came.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.kept.lock().unwrap().bodies.clone()
    }

    /// The spans of the invocation that has this ID, once they are here: its own first, then those below it.
    pub(crate) async fn invocation(&self, request: &str) -> (Span, Vec<Span>) {
        eventually("the invocation's spans are here", SOON, async || {
            let spans = self.spans();
            let root = spans
                .iter()
                .find(|span| span.get("weir.request.id") == request)?
                .clone();
            let below = spans.into_iter().filter(|span| span.parent == root.id);
            let below = below.collect();
            Some((root, below))
        })
        .await
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    kept: Arc<Mutex<Kept>>,
) -> std::io::Result<()> {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap();
        let length = head
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .expect("a length");
        let mut body = vec![0; length.1.trim().parse().unwrap()];
        stream.read_exact(&mut body).await?;
        {
            let mut kept = kept.lock().unwrap();
            kept.spans.extend(decoded(&body));
            kept.heads.push(head);
            kept.bodies.extend(body);
        }
        let answer = ExportTraceServiceResponse::default().encode_to_vec();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: {}\r\n\r\n",
            answer.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&answer).await?;
    }
}

fn decoded(body: &[u8]) -> Vec<Span> {
    let message = ExportTraceServiceRequest::decode(body).expect("a message of spans");
    let mut spans = Vec::new();
    for of_resource in message.resource_spans {
        let resource = words(&of_resource.resource.unwrap_or_default().attributes);
        for span in of_resource.scope_spans.into_iter().flat_map(|s| s.spans) {
            spans.push(Span {
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                kind: span.kind().as_str_name(),
                start: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
                failed: span
                    .status
                    .is_some_and(|status| status.code().as_str_name() == "STATUS_CODE_ERROR"),
                attributes: words(&span.attributes),
                resource: resource.clone(),
                name: span.name,
            });
        }
    }
    spans
}

fn words(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    attributes
        .iter()
        .map(|attribute| {
            let value = attribute.value.clone().and_then(|value| value.value);
            let word = match value.expect("a value") {
                any_value::Value::StringValue(word) => word,
                any_value::Value::IntValue(number) => number.to_string(),
                any_value::Value::BoolValue(truth) => truth.to_string(),
                other => panic!("{other:?}"),
            };
            (attribute.key.clone(), word)
        })
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
