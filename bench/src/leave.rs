//! How soon a place in the queue is free after its caller left.
//!
//! One caller has the only slot, another waits and closes its connection. From
//! then on the queue's depth is asked for without a pause, until it is 0; the
//! time includes the look that saw it.

use std::time::Duration;

use anyhow::Context;
use indicatif::ProgressBar;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::client::{Client, TargetArgs, Version, deleting};
use crate::times;

#[derive(Debug, clap::Args)]
pub struct LeaveArgs {
    /// How many callers of each kind leave, one after another
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    #[command(flatten)]
    pub target: TargetArgs,
}

/// What a caller sends before it leaves, made of its request's head.
type Kind = (&'static str, fn(&str) -> Vec<u8>);

const KINDS: [Kind; 4] = [
    ("small body", |head| {
        format!("{head}content-length: 5\r\n\r\nhello").into_bytes()
    }),
    ("1 MiB body", |head| {
        let mut bytes = format!("{head}content-length: {}\r\n\r\n", 1 << 20).into_bytes();
        bytes.resize(bytes.len() + (1 << 20), b'x');
        bytes
    }),
    ("unfinished chunked body", |head| {
        format!("{head}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n").into_bytes()
    }),
    ("second request behind", |head| {
        let one = format!("{head}content-length: 5\r\n\r\nhello");
        one.repeat(2).into_bytes()
    }),
];

type Rows = Vec<(&'static str, Vec<Duration>)>;

pub async fn leave(args: LeaveArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.target)?;
    let name = format!("bench-leave-{}", &uuid::Uuid::new_v4().to_string()[..8]);
    let version = client.create(&name, Duration::ZERO).await?;
    let run = run(args.runs, &client, &version, &KINDS);
    let rows = deleting(&client, std::slice::from_ref(&version), run).await?;
    println!(
        "a caller's leaving to its place being free, {} runs\n{}",
        args.runs,
        times::table(&rows)?
    );
    Ok(())
}

async fn run(
    runs: u32,
    client: &Client,
    version: &Version,
    kinds: &[Kind],
) -> anyhow::Result<Rows> {
    let deployment = json!({
        "deploymentSpecifications": [{
            "gpu": "none",
            "instanceType": "none",
            "minInstances": 1,
            "maxInstances": 1,
            "maxRequestConcurrency": 1,
        }],
    });
    client.deploy(version, &deployment).await?;
    // It has the slot from its answer's first byte on, for hours.
    let head = client.head(&version.function, "POST /stream?n=1000000&interval_ms=1000")?;
    let mut running = TcpStream::connect(client.authority()?).await?;
    running
        .write_all(format!("{head}content-length: 0\r\n\r\n").as_bytes())
        .await?;
    running.read_u8().await.context("no answer")?;

    let head = client.head(&version.function, "POST /echo")?;
    let bar = ProgressBar::new(u64::from(runs) * kinds.len() as u64);
    let mut rows = Vec::new();
    for (name, bytes) in kinds {
        let bytes = bytes(&head);
        let mut times = Vec::new();
        for _ in 0..runs {
            times.push(one(client, version, &bytes).await.context(*name)?);
            bar.inc(1);
        }
        rows.push((*name, times));
    }
    bar.finish_and_clear();
    drop(running);
    Ok(rows)
}

async fn one(client: &Client, version: &Version, bytes: &[u8]) -> anyhow::Result<Duration> {
    let mut caller = TcpStream::connect(client.authority()?).await?;
    let send = async {
        caller.write_all(bytes).await?;
        std::future::pending::<std::io::Result<()>>().await
    };
    tokio::select! {
        // Weir may read no more meanwhile: the caller stays all the same.
        sent = send => sent.context("could not send the request")?,
        queued = client.until_queued(version, 1) => queued?,
    }
    let left = Instant::now();
    drop(caller);
    client.until_queued(version, 0).await?;
    Ok(left.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::fake::FakeWeir;

    #[tokio::test]
    async fn each_caller_waits_and_leaves() {
        let fake = FakeWeir::start(200).await;
        let client = Client::new(&fake.target()).unwrap();
        let version = client.create("leave", Duration::ZERO).await.unwrap();
        // The fake one does not see who leaves with a second request behind.
        let rows = run(2, &client, &version, &KINDS[..3]).await.unwrap();
        assert_eq!(fake.calls("POST /stream"), 1);
        assert_eq!(rows.len(), 3);
        for (name, times) in rows {
            assert_eq!(times.len(), 2, "{name}");
        }
        assert_eq!(fake.left(), 6);
        assert_eq!(client.queue_depth(&version).await.unwrap(), 0);
    }

    #[test]
    fn bodies_are_what_their_names_say() {
        let sent = KINDS.map(|(_, bytes)| bytes("POST / HTTP/1.1\r\n"));
        assert!(sent[0].ends_with(b"\r\n\r\nhello"));
        assert!(sent[1].len() > 1 << 20);
        assert!(!sent[2].ends_with(b"0\r\n\r\n"));
        assert_eq!(sent[3].len(), 2 * sent[0].len());
    }
}
