//! Spans of a record, by OpenTelemetry's semantic conventions for HTTP where
//! there are some.
//!
//! What those ask for and isn't here (`url.path`, `url.full`, `url.query`,
//! `user_agent.original`, a server's `server.address`) is what a caller chose
//! freely and may have put a secret into.

use std::{borrow::Cow, time::SystemTime};

use opentelemetry::{
    InstrumentationScope, KeyValue, Value,
    trace::{SpanContext, SpanKind, Status, TraceFlags, TraceState},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::{Attempt, Phase, Queue, Record, SpanId, Start};
use crate::target::PathRule;

/// The span of the request itself, and one below it for each of its phases.
pub(super) fn spans(record: &Record, scope: &InstrumentationScope, out: &mut Vec<SpanData>) {
    let maker = Maker { record, scope };
    out.push(maker.request());
    let mut attempts = 0;
    for phase in &record.phases {
        out.push(match phase {
            Phase::Queue(queue) => maker.queue(queue),
            Phase::Start(start) => maker.start(start),
            Phase::Attempt(attempt) => {
                attempts += 1;
                maker.attempt(attempt, attempts - 1)
            }
        });
    }
}

struct Maker<'a> {
    record: &'a Record,
    scope: &'a InstrumentationScope,
}

fn pair(key: &'static str, value: impl Into<Value>) -> KeyValue {
    KeyValue::new(key, value)
}

impl Maker<'_> {
    fn request(&self) -> SpanData {
        let record = self.record;
        let route = match (record.path, record.version_named) {
            (Some(PathRule::InferenceUrl), false) => Some("/v2/nvcf/pexec/functions/{functionId}"),
            (Some(PathRule::InferenceUrl), true) => {
                Some("/v2/nvcf/pexec/functions/{functionId}/versions/{versionId}")
            }
            _ => None,
        };
        let name = match route {
            Some(route) => format!("{} {route}", self.method()).into(),
            None => self.method().into(),
        };
        // A caller's mistake is no error of the server; an answer that broke off is one.
        let failed = record.status >= 500 || (record.error.is_some() && record.status < 400);
        let mut attributes = vec![
            pair("http.request.method", record.method),
            pair("http.response.status_code", i64::from(record.status)),
            pair("url.scheme", record.scheme),
            pair("network.protocol.name", "http"),
            pair("network.protocol.version", protocol(record.protocol)),
            pair("client.address", record.peer.to_string()),
            pair("network.peer.address", record.peer.to_string()),
            pair(
                "http.response.body.size",
                i64::try_from(record.sent).unwrap_or(i64::MAX),
            ),
            pair("weir.request.id", record.request_id.to_string()),
        ];
        attributes.extend(route.map(|route| pair("http.route", route)));
        let function = record.function.map(|id| id.to_string());
        attributes.extend(function.map(|id| pair("weir.function.id", id)));
        let version = record.version.map(|id| id.to_string());
        attributes.extend(version.map(|id| pair("weir.version.id", id)));
        attributes.extend(record.error.map(|code| pair("weir.error.code", code)));
        if failed {
            attributes.push(pair("error.type", error_type(record.error, record.status)));
        }
        let mut span = self.span(
            record.span,
            name,
            SpanKind::Server,
            (record.arrived.1, record.wall(record.ended)),
        );
        span.parent_span_id = id(record.context.parent.unwrap_or(SpanId(0)));
        span.parent_span_is_remote = record.context.parent.is_some();
        span.attributes = attributes;
        span.status = status(failed);
        span
    }

    fn queue(&self, queue: &Queue) -> SpanData {
        let to = queue.to.unwrap_or(self.record.ended);
        let mut span = self.span(
            SpanId::random(),
            "queue".into(),
            SpanKind::Internal,
            (self.record.wall(queue.from), self.record.wall(to)),
        );
        span.attributes = vec![pair("weir.queue.cold", queue.cold)];
        if queue.to.is_none()
            && let Some(error) = self.record.error
        {
            span.attributes.push(pair("error.type", error));
            span.status = status(true);
        }
        span
    }

    fn start(&self, start: &Start) -> SpanData {
        let mut span = self.span(
            SpanId::random(),
            "start".into(),
            SpanKind::Internal,
            (start.from, start.to),
        );
        span.attributes = vec![pair("weir.instance.id", start.instance.to_string())];
        span
    }

    fn attempt(&self, attempt: &Attempt, before: i64) -> SpanData {
        let record = self.record;
        // Why it has no whole answer, and the answer's own status otherwise. Nothing is wrong if the caller left.
        let cut = match attempt.refused {
            true => Some("instance-refused"),
            // Only the last attempt was not refused, so the error is its own.
            false => record.error,
        };
        let failed = attempt
            .status
            .filter(|status| *status >= 400)
            .map(|status| status.to_string().into());
        let error = cut.map(Cow::Borrowed).or(failed);
        let mut attributes = vec![
            pair("http.request.method", record.method),
            pair("server.address", attempt.address.ip().to_string()),
            pair("server.port", i64::from(attempt.address.port())),
            pair("network.peer.address", attempt.address.ip().to_string()),
            pair("network.peer.port", i64::from(attempt.address.port())),
            pair("network.protocol.name", "http"),
            pair("network.protocol.version", "1.1"),
            pair("url.scheme", if attempt.secure { "https" } else { "http" }),
            pair("weir.instance.id", attempt.instance.to_string()),
            pair("weir.connect.failed", attempt.refused),
        ];
        let answered = attempt.status.map(i64::from);
        attributes.extend(answered.map(|code| pair("http.response.status_code", code)));
        if before > 0 {
            attributes.push(pair("http.request.resend_count", before));
        }
        let to = attempt.to.unwrap_or(record.ended);
        let mut span = self.span(
            attempt.span,
            self.method().into(),
            SpanKind::Client,
            (record.wall(attempt.from), record.wall(to)),
        );
        span.status = status(error.is_some());
        attributes.extend(error.map(|error| pair("error.type", error)));
        span.attributes = attributes;
        span
    }

    /// As names of spans have it.
    fn method(&self) -> &'static str {
        match self.record.method {
            "_OTHER" => "HTTP",
            known => known,
        }
    }

    /// One below the request's.
    fn span(
        &self,
        span: SpanId,
        name: Cow<'static, str>,
        kind: SpanKind,
        (start, end): (SystemTime, SystemTime),
    ) -> SpanData {
        let trace = self.record.context.trace.0.to_be_bytes();
        SpanData {
            span_context: SpanContext::new(
                opentelemetry::TraceId::from_bytes(trace),
                id(span),
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: id(self.record.span),
            parent_span_is_remote: false,
            span_kind: kind,
            name,
            start_time: start,
            end_time: end,
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        }
    }
}

fn id(span: SpanId) -> opentelemetry::SpanId {
    opentelemetry::SpanId::from_bytes(span.0.to_be_bytes())
}

fn status(failed: bool) -> Status {
    match failed {
        true => Status::error(""),
        false => Status::Unset,
    }
}

fn error_type(error: Option<&'static str>, status: u16) -> Cow<'static, str> {
    match error {
        Some(code) => code.into(),
        None => status.to_string().into(),
    }
}

fn protocol(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_09 | http::Version::HTTP_10 => "1.0",
        http::Version::HTTP_2 => "2",
        http::Version::HTTP_3 => "3",
        _ => "1.1",
    }
}
