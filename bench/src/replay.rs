//! Replays an LLM trace against a running Weir and compares the
//! instance-seconds it used with the least possible.
//!
//! Arrivals are open-loop: a request is sent at its time in the trace (divided
//! by `--speed`), however many are outstanding, and its latency counts from
//! that time, not from when the replayer got round to it.
//!
//! # The least possible instance-seconds
//!
//! What a scheduler that knows the future would use, with the same requests,
//! the same slots, the same cap on instances and the same start time:
//!
//! 1. Every request is served on arrival, as an instance is always there in
//!    time; only when all slots of `maxInstances` instances are busy does it
//!    wait, first come first served. This gives the number of requests in
//!    service at each instant, `c(t)`.
//! 2. At each instant at least `ceil(c(t) / slots)` instances are running.
//! 3. Level *k* is "the *k*-th instance": busy where that number is at least
//!    *k*. Each first use of a level costs one start, as an instance that is
//!    starting is there too. Between two busy intervals of a level an instance
//!    is either kept, which costs the gap, or stopped and started again, which
//!    costs the start time; knowing the gap, the cheaper is taken.
//!
//! Instances of a version are alike and start times are equal, so the choices
//! of the levels are independent, and the sum of the levels' best is the best
//! of all. It is a bound and not a plan: it packs requests in service as if
//! they could move between instances, and has no delay of its own between
//! deciding and starting. No scheduler that lets no request wait can use
//! less; one that lets requests wait might, by serving them closer together,
//! and the ratio is then to be read with the waits: it flatters, and the output
//! says so. What none can go below is all service times divided by the slots,
//! which is shown beside it.
//!
//! # What is promised
//!
//! The replay fails where a request was not answered 200, where there are more
//! than `--min-instances` when the settle time after the last answer is over,
//! and where the ratio is above `--max-ratio`. Whatever fails, the figures are
//! shown and written.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::client::{Client, TargetArgs, Version, deleting, iso, parse_duration, raise_files};
use crate::output;
use crate::tally::Answered;

mod bound;
mod buckets;
mod plot;
mod progress;
mod report;
mod summary;
mod trace;
mod watch;

use bound::{Job, least_instance_seconds};
use progress::Progress;
use summary::{Bounds, Summary, summarize};
use trace::{Pace, Planned};
use watch::{Watched, watch};

#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = summary::JSON_HELP)]
pub struct ReplayArgs {
    /// The trace: a CSV file with the columns TIMESTAMP, ContextTokens and
    /// GeneratedTokens, as Azure's, or a file of JSON lines with timestamp (in
    /// ms), input_length and output_length, as Mooncake's. Its beginning tells
    /// which
    #[arg(value_name = "TRACE")]
    pub trace: PathBuf,
    /// How many times as fast as the trace. Divides arrivals, service times,
    /// start delay and the autoscaler's windows alike
    #[arg(long, default_value_t = 20.0, value_parser = speed)]
    pub speed: f64,
    /// How long an instance takes to start, in the trace's time
    #[arg(long, default_value = "PT10S", value_parser = parse_duration)]
    pub start_delay: Duration,
    #[arg(long, default_value_t = 0)]
    pub min_instances: u32,
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_instances: u32,
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_request_concurrency: u32,
    #[arg(long, default_value_t = 0.7)]
    pub target_utilization: f64,
    /// In the trace's time, as are the three below
    #[arg(long, default_value = "PT60S", value_parser = parse_duration)]
    pub stable_window: Duration,
    #[arg(long, default_value = "PT6S", value_parser = parse_duration)]
    pub panic_window: Duration,
    #[arg(long, default_value = "PT0S", value_parser = parse_duration)]
    pub scale_in_delay: Duration,
    #[arg(long, default_value = "PT60S", value_parser = parse_duration)]
    pub idle_timeout: Duration,
    /// How many requests may wait
    #[arg(long, default_value_t = 100_000)]
    pub queue: u32,
    /// Milliseconds of service for each token of context
    #[arg(long, default_value_t = 0.25)]
    pub prefill_ms: f64,
    /// Milliseconds of service for each generated token
    #[arg(long, default_value_t = 15.0)]
    pub decode_ms: f64,
    /// How long instances may take to go, down to the minimum, after the last
    /// answer [default: three times the stable window, scale-in delay and idle
    /// timeout, and 30 s of the run]. In the run's time
    #[arg(long, value_parser = parse_duration)]
    pub settle: Option<Duration>,
    /// Fail where instance-seconds are above so many times the least without a
    /// wait
    #[arg(long, value_name = "R", value_parser = speed)]
    pub max_ratio: Option<f64>,
    /// Write the figures and all that was seen here; --help says what that is
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw arrivals, instances, queue and waits over time here
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    #[command(flatten)]
    pub target: TargetArgs,
}

fn speed(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(speed) if speed > 0.0 && speed.is_finite() => Ok(speed),
        _ => Err("must be a number above 0".into()),
    }
}

/// What came of one request.
struct Outcome {
    /// After the first request.
    due: Duration,
    answer: Answered,
    /// Latency less service time.
    wait: Duration,
}

pub async fn replay(args: ReplayArgs) -> anyhow::Result<()> {
    let pace = Pace {
        speed: args.speed,
        prefill_ms: args.prefill_ms,
        decode_ms: args.decode_ms,
    };
    let (format, plan) = trace::read(&args.trace, pace)?;
    for path in [&args.json, &args.svg] {
        output::writable(path.as_deref())?;
    }
    // A request that waits holds a connection.
    raise_files()?;
    let client = Client::new(&args.target)?;
    let start = args.start_delay.div_f64(args.speed);
    let name = format!("bench-replay-{}", &uuid::Uuid::new_v4().to_string()[..8]);
    let version = client.create(&name, start).await?;
    let run = run(&args, &client, &version, &plan);
    let (outcomes, watched, settled) =
        deleting(&client, std::slice::from_ref(&version), run).await?;

    let jobs: Vec<Job> = plan
        .iter()
        .map(|p| Job {
            arrival: p.at.as_secs_f64(),
            service: p.service.as_secs_f64(),
        })
        .collect();
    let least = least_instance_seconds(
        &jobs,
        args.max_request_concurrency as usize,
        args.max_instances as usize,
        start.as_secs_f64(),
    );
    let work: f64 = jobs.iter().map(|job| job.service).sum();
    let work = work / f64::from(args.max_request_concurrency);
    let bounds = Bounds { least, work };
    let summary = summarize(&args, format, &outcomes, watched, bounds)?;
    // Before anything is printed, to what may read no more.
    if let Some(path) = &args.json {
        output::write(path, &serde_json::to_string_pretty(&summary)?)?;
    }
    if let Some(path) = &args.svg {
        output::write(path, &plot::draw(&summary))?;
    }
    println!("{}", report::render(&summary));
    let broken = broken(&summary, settled, args.max_ratio);
    if !broken.is_empty() {
        bail!("{}", broken.join("; "));
    }
    Ok(())
}

/// The promises that were not kept.
fn broken(summary: &Summary, settled: anyhow::Result<()>, max_ratio: Option<f64>) -> Vec<String> {
    let mut broken = Vec::new();
    let counted = &summary.counted;
    let failed = counted.failed();
    if failed > 0 {
        let all = counted.requests;
        broken.push(format!("{failed} of {all} requests were not answered 200"));
    }
    if let Err(error) = settled {
        broken.push(format!("not back to the minimum: {error:#}"));
    }
    match (summary.ratio, max_ratio) {
        (Some(ratio), Some(most)) if ratio > most => {
            broken.push(format!("the ratio is {ratio:.3}, above {most}"));
        }
        (None, Some(_)) => broken.push("the ratio is unknown: no instance was seen".into()),
        _ => {}
    }
    broken
}

fn deployment(args: &ReplayArgs) -> serde_json::Value {
    let scaled = |duration: Duration| iso(duration.div_f64(args.speed));
    json!({
        "deploymentSpecifications": [{
            "gpu": "none",
            "instanceType": "none",
            "minInstances": args.min_instances,
            "maxInstances": args.max_instances,
            "maxRequestConcurrency": args.max_request_concurrency,
        }],
        "autoscaling": {
            "policy": "concurrency",
            "targetUtilization": args.target_utilization,
            "stableWindow": scaled(args.stable_window),
            "panicWindow": scaled(args.panic_window),
            "scaleInDelay": scaled(args.scale_in_delay),
            "idleTimeout": scaled(args.idle_timeout),
        },
        "queue": { "maxRequests": args.queue },
    })
}

/// What came of the requests, what was seen, and whether the instances went
/// down to the minimum.
async fn run(
    args: &ReplayArgs,
    client: &Client,
    version: &Version,
    plan: &[Planned],
) -> anyhow::Result<(Vec<Outcome>, Watched, anyhow::Result<()>)> {
    let progress = Progress::new(plan.len())?;
    client.deploy(version, &deployment(args)).await?;
    let start = Instant::now();
    let (stop, stopped) = oneshot::channel();
    let mut watcher = JoinSet::new();
    watcher.spawn(watch(
        client.clone(),
        version.clone(),
        start,
        progress.clone(),
        stopped,
    ));

    let outcomes = send_all(client, &version.function, plan, start, &progress).await;

    // Scaling in takes a stable window, an idle time and a sampling period.
    let windows = args.stable_window + args.scale_in_delay + args.idle_timeout;
    let default = || windows.div_f64(args.speed).mul_f64(3.0) + Duration::from_secs(30);
    let settle = args.settle.unwrap_or_else(default);
    let settled = client
        .until_instances(&version.version, args.min_instances as usize, settle)
        .await;
    let _ = stop.send(());
    let watched = watcher.join_next().await.context("nobody watched")??;
    progress.end();
    Ok((outcomes, watched, settled))
}

async fn send_all(
    client: &Client,
    function: &str,
    plan: &[Planned],
    start: Instant,
    progress: &Progress,
) -> Vec<Outcome> {
    let function: Arc<str> = function.into();
    let mut calls = JoinSet::new();
    for planned in plan {
        tokio::time::sleep_until(start + planned.at).await;
        calls.spawn(send(
            client.clone(),
            Arc::clone(&function),
            planned.clone(),
            start,
            progress.clone(),
        ));
    }
    calls.join_all().await
}

async fn send(
    client: Client,
    function: Arc<str>,
    planned: Planned,
    start: Instant,
    progress: Progress,
) -> Outcome {
    let ms = planned.service.as_secs_f64() * 1e3;
    let path = format!("/infer?ms={ms:.3}&bytes={}", planned.bytes);
    progress.sent();
    let answer = Client::answered(client.invoke(&function, &path)).await;
    progress.answered();
    Outcome {
        due: planned.at,
        answer,
        wait: (start + planned.at)
            .elapsed()
            .saturating_sub(planned.service),
    }
}

#[cfg(test)]
mod tests;
