//! What a queued invocation and an idle connection cost Weir in memory.
//!
//! The queued ones stay while the idle connections open, so that neither lives
//! in memory that the other gave back. Their instance listens only after an
//! hour: it never gets ready.

use std::time::Duration;

use anyhow::{Context, bail};
use comfy_table::Table;
use indicatif::ProgressBar;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::client::{Client, TargetArgs, Version, deleting, raise_files};

/// Of a queued invocation.
const BODY: usize = 1024;
const NEVER: Duration = Duration::from_secs(3600);
/// Besides the connections: the runtime's, the HTTP client's, the terminal.
const OTHER_FILES: u64 = 64;

#[derive(Debug, clap::Args)]
pub struct MemoryArgs {
    /// Invocations that wait, with bodies of 1 KiB
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub queued: u32,
    /// Keep-alive connections that did one request each
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub idle: u32,
    /// The weir process, or `auto`: the only `weir serve` there is
    #[arg(long, default_value = "auto")]
    pub pid: String,
    #[command(flatten)]
    pub target: TargetArgs,
}

#[derive(Debug)]
struct Phase {
    name: &'static str,
    count: u32,
    /// KiB.
    before: u64,
    with: u64,
}

pub async fn memory(args: MemoryArgs) -> anyhow::Result<()> {
    let wanted = u64::from(args.queued) + u64::from(args.idle) + OTHER_FILES;
    let files = raise_files()?;
    if files < wanted {
        bail!("may open {files} files, needs {wanted}: raise the hard limit (ulimit -Hn)");
    }
    let pid = match args.pid.as_str() {
        "auto" => find_weir()?,
        pid => pid.parse().context("--pid is no process ID")?,
    };
    rss(pid)?;
    let client = Client::new(&args.target)?;
    let phases = measure(&args, &client, pid).await?;
    println!("{}", render(pid, &phases));
    Ok(())
}

async fn measure(args: &MemoryArgs, client: &Client, pid: i32) -> anyhow::Result<Vec<Phase>> {
    let cold = client.create("bench-memory-cold", NEVER).await?;
    let warm = match client.create("bench-memory-warm", Duration::ZERO).await {
        Ok(warm) => warm,
        Err(error) => {
            client.delete(&cold).await?;
            return Err(error);
        }
    };
    let versions = [cold, warm];
    let [cold, warm] = &versions;
    deleting(client, &versions, phases(args, client, pid, cold, warm)).await
}

async fn phases(
    args: &MemoryArgs,
    client: &Client,
    pid: i32,
    cold: &Version,
    warm: &Version,
) -> anyhow::Result<Vec<Phase>> {
    client.deploy(cold, &deployment(args.queued)).await?;
    client.deploy(warm, &deployment(100)).await?;
    let mut phases = Vec::new();

    let before = settled(pid).await?;
    let queued = queue(client, cold, args.queued).await?;
    let with = settled(pid).await?;
    still_open(&queued, "queued invocations")?;
    phases.push(Phase {
        name: "queued invocation (1 KiB body)",
        count: args.queued,
        before,
        with,
    });

    // What the first one starts is not to be counted.
    let first = idle(client, warm, 1).await?;
    let before = settled(pid).await?;
    let idle = idle(client, warm, args.idle).await?;
    let with = settled(pid).await?;
    still_open(&idle, "idle connections")?;
    still_open(&queued, "queued invocations")?;
    phases.push(Phase {
        name: "idle connection",
        count: args.idle,
        before,
        with,
    });
    drop((queued, first, idle));
    Ok(phases)
}

fn deployment(queue: u32) -> serde_json::Value {
    json!({
        "deploymentSpecifications": [{
            "gpu": "none",
            "instanceType": "none",
            "minInstances": 0,
            "maxInstances": 1,
            "maxRequestConcurrency": 4,
        }],
        "autoscaling": { "policy": "concurrency", "idleTimeout": "PT1H" },
        "queue": {
            "maxRequests": u64::from(queue) + 1,
            // Bodies, heads and room.
            // Never below the default of `holdBytes`.
            "maxBytes": ((u64::from(queue) + 1) * 16 * BODY as u64).max(1 << 20),
            "busyTimeout": "PT1H",
            "coldTimeout": "PT1H",
        },
        "startTimeout": "PT2H",
    })
}

/// Sends so many invocations, each on a connection of its own, and waits until
/// they are in the queue.
async fn queue(client: &Client, of: &Version, count: u32) -> anyhow::Result<Vec<TcpStream>> {
    let authority = client.authority()?;
    let head = client.head(&of.function, "POST /echo")?;
    let mut request = format!("{head}content-length: {BODY}\r\n\r\n").into_bytes();
    request.extend([b'x'; BODY]);
    let bar = ProgressBar::new(count.into()).with_message("queueing");
    let mut streams = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let mut stream = TcpStream::connect(&authority).await?;
        stream.write_all(&request).await?;
        streams.push(stream);
        bar.inc(1);
    }
    bar.finish_and_clear();

    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // Without such a metric, what follows waits for memory to settle.
        let Some(depth) = queue_depth(&client.metrics().await?, &of.version) else {
            break;
        };
        if depth >= f64::from(count) {
            break;
        }
        still_open(&streams, "queued invocations")?;
        if Instant::now() > deadline {
            bail!("only {depth} of {count} invocations are in the queue");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(streams)
}

fn queue_depth(metrics: &str, version: &str) -> Option<f64> {
    let label = format!("version=\"{version}\"");
    metrics
        .lines()
        .find(|line| line.starts_with("weir_queue_depth{") && line.contains(&label))?
        .rsplit(' ')
        .next()?
        .parse()
        .ok()
}

/// Opens so many connections and does one request on each.
async fn idle(client: &Client, of: &Version, count: u32) -> anyhow::Result<Vec<TcpStream>> {
    let authority = client.authority()?;
    let head = client.head(&of.function, "GET /infer?ms=0&bytes=2")?;
    let request = format!("{head}content-length: 0\r\n\r\n");
    let bar = ProgressBar::new(count.into()).with_message("connecting");
    let mut streams = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let mut stream = TcpStream::connect(&authority).await?;
        stream.write_all(request.as_bytes()).await?;
        read_answer(&mut stream).await?;
        streams.push(stream);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(streams)
}

/// Reads one whole answer, which must be a 200.
async fn read_answer(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut answer = Vec::new();
    while !is_whole(&answer) {
        if stream.read_buf(&mut answer).await? == 0 {
            bail!("the connection closed inside an answer");
        }
    }
    if !answer.starts_with(b"HTTP/1.1 200 ") {
        bail!("answered {}", String::from_utf8_lossy(&answer));
    }
    Ok(())
}

fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else {
        return false;
    };
    let body = &answer[end + 4..];
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    match length {
        Some(length) => body.len() >= length,
        None if head.contains("transfer-encoding: chunked") => body.ends_with(b"0\r\n\r\n"),
        None => true,
    }
}

/// Neither closed nor answered.
fn still_open(streams: &[TcpStream], what: &str) -> anyhow::Result<()> {
    let mut byte = [0; 512];
    for (place, stream) in streams.iter().enumerate() {
        match stream.try_read(&mut byte) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Ok(n) if n > 0 => {
                let answer = String::from_utf8_lossy(&byte[..n]);
                bail!(
                    "one of the {what} was answered (number {place}): {}",
                    answer.lines().next().unwrap_or_default()
                );
            }
            _ => bail!("one of the {what} was closed (number {place})"),
        }
    }
    Ok(())
}

fn find_weir() -> anyhow::Result<i32> {
    let found: Vec<i32> = procfs::process::all_processes()?
        .flatten()
        .filter(|process| {
            process
                .cmdline()
                .is_ok_and(|command| is_weir_serve(&command))
        })
        .map(|process| process.pid)
        .collect();
    match found[..] {
        [pid] => Ok(pid),
        [] => bail!("found no `weir serve`: give --pid"),
        _ => bail!("found more than one `weir serve` ({found:?}): give --pid"),
    }
}

fn is_weir_serve(command: &[String]) -> bool {
    command
        .first()
        .is_some_and(|program| program.rsplit('/').next() == Some("weir"))
        && command.iter().skip(1).any(|argument| argument == "serve")
}

/// KiB in memory.
fn rss(pid: i32) -> anyhow::Result<u64> {
    // Exact, but only for the same user; `status` counts in batches.
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
    let (text, field) = match read("smaps_rollup") {
        Ok(text) => (text, "Rss:"),
        Err(_) => (
            read("status").with_context(|| format!("no process {pid}"))?,
            "VmRSS:",
        ),
    };
    field_kib(&text, field).with_context(|| format!("process {pid} has no {field}"))
}

fn field_kib(text: &str, field: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(field))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// KiB in memory once that has not moved by 1% for a second, or after 20 s.
async fn settled(pid: i32) -> anyhow::Result<u64> {
    let mut last = rss(pid)?;
    let mut calm = 0;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = rss(pid)?;
        if now.abs_diff(last) * 100 <= last {
            calm += 1;
        } else {
            last = now;
            calm = 0;
        }
        if calm == 5 {
            return Ok(now);
        }
    }
    rss(pid)
}

fn render(pid: i32, phases: &[Phase]) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["each", "count", "before", "with", "KiB each"]);
    for phase in phases {
        let grown = phase.with as f64 - phase.before as f64;
        let each = match phase.count {
            0 => "-".to_owned(),
            count => format!("{:.2}", grown / f64::from(count)),
        };
        table.add_row([
            phase.name.to_owned(),
            phase.count.to_string(),
            format!("{} KiB", phase.before),
            format!("{} KiB", phase.with),
            each,
        ]);
    }
    format!("resident memory of process {pid}\n{}", table.trim_fmt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::fake::FakeWeir;

    #[tokio::test]
    async fn both_kinds_are_opened_measured_and_let_go() {
        let fake = FakeWeir::start(200).await;
        let args = MemoryArgs {
            queued: 20,
            idle: 20,
            pid: std::process::id().to_string(),
            target: fake.target(),
        };
        memory(args).await.unwrap();
        assert_eq!(fake.calls("POST /echo"), 20);
        assert_eq!(fake.calls("GET /infer"), 21);
        assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 2);
    }

    #[test]
    fn whole_answers_are_known_by_length_or_last_chunk() {
        assert!(!is_whole(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n1"));
        assert!(is_whole(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n12"));
        let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n";
        assert!(!is_whole(chunked));
        assert!(is_whole(&[&chunked[..], b"0\r\n\r\n"].concat()));
        assert!(!is_whole(b"HTTP/1.1 200 OK\r\n"));
    }

    #[test]
    fn the_queue_depth_is_the_versions_own() {
        let metrics = "# TYPE weir_queue_depth gauge\n\
             weir_queue_depth{function=\"f\",version=\"a\"} 3\n\
             weir_queue_depth{function=\"f\",version=\"b\"} 12\n";
        assert_eq!(queue_depth(metrics, "b"), Some(12.0));
        assert_eq!(queue_depth(metrics, "c"), None);
    }

    #[test]
    fn only_weir_serve_is_weir_serve() {
        let command = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
        assert!(is_weir_serve(&command(
            "/usr/bin/weir serve --listen 1.2.3.4:80"
        )));
        assert!(!is_weir_serve(&command("/usr/bin/weir sample-function")));
        assert!(!is_weir_serve(&command("vim serve")));
        assert!(!is_weir_serve(&[]));
    }

    #[test]
    fn this_process_takes_memory() {
        assert!(rss(std::process::id() as i32).unwrap() > 100);
        assert!(rss(0).is_err());
        assert_eq!(field_kib("A: 1\nRss:      42 kB\n", "Rss:"), Some(42));
        assert!(raise_files().unwrap() > 0);
    }

    #[tokio::test]
    async fn a_closed_or_answered_stream_is_not_waiting() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (mut theirs, _) = listener.accept().await.unwrap();
        let streams = [ours];
        still_open(&streams, "it").unwrap();
        theirs.write_all(b"HTTP/1.1 429 x\r\n\r\n").await.unwrap();
        streams[0].readable().await.unwrap();
        assert!(still_open(&streams, "it").is_err());
        drop(theirs);
        streams[0].readable().await.unwrap();
        assert!(still_open(&streams, "it").is_err());
    }
}
