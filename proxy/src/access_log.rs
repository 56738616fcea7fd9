//! The access log: one line for each request, as JSON or as text.
//!
//! Requests hand plain values to a thread of its own, which writes. Nothing
//! in a line was chosen by the caller but its method (if it is a known one)
//! and its trace's ID, so that a path, a query, a host or a field with a
//! secret in it can't get there, and nothing needs to be escaped.

use std::{
    fmt::{self, Display},
    io::Write,
    net::IpAddr,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use jiff::Timestamp;
use metrics::Counter;
use tokio::{sync::oneshot, task::spawn_blocking};
use uuid::Uuid;
use weir_control::model::{FunctionId, VersionId};

use crate::trace::TraceId;

/// Lines that wait to be written; more are dropped and counted.
const WAITING: usize = 16 << 10;
/// After a first line it waits so long for more: one write for many, and no thread to wake for each.
const GATHER: Duration = Duration::from_millis(20);
/// Bytes of one write, more or less.
const WRITE: usize = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One object per line; what is not known is left out
    Json,
    /// NAME=VALUE, always all of them and in the same order; what is not known is '-'
    Text,
}

/// One line. The names and their order are in [`Line::write`], and stable.
#[derive(Debug)]
pub struct Line {
    /// The request's end.
    pub time: Timestamp,
    pub status: u16,
    pub method: &'static str,
    /// From the head's arrival to the answer's last byte.
    pub duration: Duration,
    pub function: Option<FunctionId>,
    pub version: Option<VersionId>,
    /// The code in `x-weir-error`, or why an answer broke off.
    pub error: Option<&'static str>,
    /// From arrival to the slot, where there was a wait.
    pub wait: Option<Duration>,
    /// The time that the instance had it.
    pub instance: Option<Duration>,
    /// Of the answer's body.
    pub bytes: u64,
    /// Instances that were tried.
    pub attempts: u32,
    pub peer: IpAddr,
    pub request_id: Uuid,
    pub trace_id: TraceId,
}

impl Line {
    fn write(&self, format: Format, out: &mut Vec<u8>) {
        let mut line = Fields { format, out };
        line.begin();
        line.text("time", Some(format_args!("{:.6}", self.time)));
        line.number("status", Some(self.status));
        line.text("method", Some(self.method));
        line.number("durationMs", Some(Millis(self.duration)));
        line.text("function", self.function);
        line.text("version", self.version);
        line.text("error", self.error);
        line.number("waitMs", self.wait.map(Millis));
        line.number("instanceMs", self.instance.map(Millis));
        line.number("bytes", Some(self.bytes));
        line.number("attempts", Some(self.attempts));
        line.text("peer", Some(self.peer));
        line.text("requestId", Some(self.request_id));
        line.text("traceId", Some(self.trace_id));
        line.end();
    }
}

/// Milliseconds, to the microsecond.
struct Millis(Duration);

impl Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        write!(f, "{}.{:03}", micros / 1000, micros % 1000)
    }
}

/// Writes a line's fields. Values have neither quotes nor backslashes nor spaces nor control characters.
struct Fields<'a> {
    format: Format,
    out: &'a mut Vec<u8>,
}

impl Fields<'_> {
    fn begin(&mut self) {
        if self.format == Format::Json {
            self.out.push(b'{');
        }
    }

    fn text(&mut self, name: &str, value: Option<impl Display>) {
        self.field(name, "\"", value);
    }

    fn number(&mut self, name: &str, value: Option<impl Display>) {
        self.field(name, "", value);
    }

    fn field(&mut self, name: &str, quote: &str, value: Option<impl Display>) {
        // Writing to memory does not fail.
        _ = match (self.format, value) {
            (Format::Json, Some(value)) => {
                write!(self.out, "\"{name}\":{quote}{value}{quote},")
            }
            (Format::Json, None) => Ok(()),
            (Format::Text, Some(value)) => write!(self.out, "{name}={value} "),
            (Format::Text, None) => write!(self.out, "{name}=- "),
        };
    }

    fn end(&mut self) {
        // In place of the last separator.
        self.out.pop();
        if self.format == Format::Json {
            self.out.push(b'}');
        }
        self.out.push(b'\n');
    }
}

enum Message {
    Line(Line),
    /// Answered once everything before it is written.
    Flush(oneshot::Sender<()>),
}

/// Where lines go.
#[derive(Clone)]
pub struct AccessLog(Option<Open>);

#[derive(Clone)]
struct Open {
    messages: SyncSender<Message>,
    dropped: Counter,
}

impl AccessLog {
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    pub fn to(
        out: impl Write + Send + 'static,
        format: Format,
        dropped: Counter,
    ) -> std::io::Result<Self> {
        let (messages, inbox) = sync_channel(WAITING);
        let lost = dropped.clone();
        thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write(out, format, &inbox, &lost))?;
        Ok(Self(Some(Open { messages, dropped })))
    }

    /// `line` is made only where there is a log.
    pub fn write(&self, line: impl FnOnce() -> Line) {
        if let Some(open) = &self.0
            // A full channel drops the line: the log may not slow a request down.
            && open.messages.try_send(Message::Line(line())).is_err()
        {
            open.dropped.increment(1);
        }
    }

    /// Returns when every line so far is written.
    pub async fn flush(&self) {
        if let Some(open) = &self.0 {
            let (done, written) = oneshot::channel();
            let messages = open.messages.clone();
            // The channel may be full.
            spawn_blocking(move || drop(messages.send(Message::Flush(done))));
            _ = written.await;
        }
    }
}

fn write(mut out: impl Write, format: Format, inbox: &Receiver<Message>, lost: &Counter) {
    let mut buffer = Vec::new();
    while let Ok(first) = inbox.recv() {
        if matches!(first, Message::Line(_)) {
            thread::sleep(GATHER);
        }
        let mut lines = 0;
        let mut flushed = Vec::new();
        for message in std::iter::once(first).chain(inbox.try_iter()) {
            match message {
                Message::Line(line) => {
                    line.write(format, &mut buffer);
                    lines += 1;
                }
                Message::Flush(done) => flushed.push(done),
            }
            if buffer.len() >= WRITE {
                put(&mut out, &mut buffer, &mut lines, lost);
            }
        }
        put(&mut out, &mut buffer, &mut lines, lost);
        for done in flushed {
            _ = done.send(());
        }
    }
}

fn put(out: &mut impl Write, buffer: &mut Vec<u8>, lines: &mut u64, lost: &Counter) {
    if out.write_all(buffer).and_then(|()| out.flush()).is_err() {
        lost.increment(*lines);
    }
    buffer.clear();
    *lines = 0;
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn line() -> Line {
        Line {
            time: "2026-11-25T12:00:00.123456789Z".parse().unwrap(),
            status: 200,
            method: "POST",
            duration: Duration::from_micros(1_012_034),
            function: Some("11111111-1111-4111-8111-111111111111".parse().unwrap()),
            version: None,
            error: None,
            wait: Some(Duration::from_millis(1000)),
            instance: None,
            bytes: 7,
            attempts: 1,
            peer: "::1".parse().unwrap(),
            request_id: Uuid::nil(),
            trace_id: TraceId(0xabc),
        }
    }

    fn written(line: &Line, format: Format) -> String {
        let mut out = Vec::new();
        line.write(format, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_line_of_json() {
        assert_eq!(
            written(&line(), Format::Json),
            "{\"time\":\"2026-11-25T12:00:00.123456Z\",\"status\":200,\"method\":\"POST\",\
             \"durationMs\":1012.034,\"function\":\"11111111-1111-4111-8111-111111111111\",\
             \"waitMs\":1000.000,\"bytes\":7,\"attempts\":1,\"peer\":\"::1\",\
             \"requestId\":\"00000000-0000-0000-0000-000000000000\",\
             \"traceId\":\"00000000000000000000000000000abc\"}\n"
        );
    }

    #[test]
    fn a_line_of_text_has_all_fields() {
        assert_eq!(
            written(&line(), Format::Text),
            "time=2026-11-25T12:00:00.123456Z status=200 method=POST durationMs=1012.034 \
             function=11111111-1111-4111-8111-111111111111 version=- error=- waitMs=1000.000 \
             instanceMs=- bytes=7 attempts=1 peer=::1 \
             requestId=00000000-0000-0000-0000-000000000000 \
             traceId=00000000000000000000000000000abc\n"
        );
    }

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn what_was_handed_over_is_written_once_it_is_flushed() {
        let memory = Memory::default();
        let log = AccessLog::to(memory.clone(), Format::Json, Counter::noop()).unwrap();
        for _ in 0..1000 {
            log.write(line);
        }
        log.flush().await;
        let written = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        assert_eq!(written.lines().count(), 1000);
        for line in written.lines() {
            serde_json::from_str::<serde_json::Value>(line).unwrap();
        }
    }
}
