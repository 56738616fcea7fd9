//! Load on one function: so many requests a second, whatever comes back, or so
//! many callers who each wait for their answer before they ask again.
//!
//! At a rate, a request's latency counts from the time it was due, not from
//! when the generator got round to it, so that a stall shows in every request
//! that it held up.
//!
//! Latencies and throughput are of answers of 200 alone: what a server refuses
//! it refuses quickly, and a busy one would look fast. Other answers are
//! counted by status, and fail the run.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;
use comfy_table::Table;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::client::{Client, TargetArgs, deleting, parse_duration, raise_files};
use crate::output;
use crate::tally::{Answered, Counted, Quantiles, Tally, times_row};

#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// The function's ID [default: a sample function, made for this and deleted afterwards]
    pub function: Option<String>,
    /// Requests a second, evenly spread, however many are outstanding
    #[arg(long, value_name = "N", value_parser = rate, conflicts_with = "callers")]
    pub rate: Option<f64>,
    /// Callers who each wait for their answer, and then ask again
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub callers: u32,
    #[arg(long, default_value = "PT10S", value_parser = parse_duration)]
    pub duration: Duration,
    /// Path and query that the instance gets
    #[arg(long, value_name = "PATH", default_value = "/infer?ms=0", value_parser = path)]
    pub path: String,
    /// Body of each request
    #[arg(long, short, value_name = "BODY", default_value = "")]
    pub data: String,
    /// Slots of the sample function's one instance
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1000), conflicts_with = "function")]
    pub slots: u32,
    /// Write the figures here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub target: TargetArgs,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.001..=1e6).contains(&rate) => Ok(rate),
        _ => Err("must be a number from 0.001 to 1000000".into()),
    }
}

fn path(text: &str) -> Result<String, String> {
    if text.starts_with('/') {
        Ok(text.into())
    } else {
        Err("must begin with /".into())
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Figures {
    #[serde(flatten)]
    counted: Counted,
    /// Of answers of 200; null where there were none.
    latency_milliseconds: Option<Quantiles>,
    seconds: f64,
    /// Answers of 200 a second.
    throughput: f64,
}

pub async fn load(args: LoadArgs) -> anyhow::Result<()> {
    output::writable(args.json.as_deref())?;
    // A request that waits holds a connection.
    raise_files()?;
    let client = Client::new(&args.target)?;
    let figures = match &args.function {
        Some(function) => run(&args, &client, function).await?,
        None => {
            let name = format!("bench-load-{}", &uuid::Uuid::new_v4().to_string()[..8]);
            let version = client.create(&name, Duration::ZERO).await?;
            let work = async {
                client.deploy(&version, &deployment(args.slots)).await?;
                run(&args, &client, &version.function).await
            };
            deleting(&client, std::slice::from_ref(&version), work).await?
        }
    };
    println!("{}", render(&figures));
    if let Some(path) = &args.json {
        output::write(path, &serde_json::to_string_pretty(&figures)?)?;
    }
    match figures.counted.failed() {
        0 => Ok(()),
        failed => bail!(
            "{failed} of {} requests were not answered 200",
            figures.counted.requests
        ),
    }
}

fn deployment(slots: u32) -> serde_json::Value {
    json!({
        "deploymentSpecifications": [{
            "gpu": "none",
            "instanceType": "none",
            "minInstances": 1,
            "maxInstances": 1,
            "maxRequestConcurrency": slots,
        }],
    })
}

async fn run(args: &LoadArgs, client: &Client, function: &str) -> anyhow::Result<Figures> {
    let call = Arc::new(Call {
        client: client.clone(),
        function: function.into(),
        path: args.path.clone(),
        body: args.data.clone().into(),
    });
    let start = Instant::now();
    let mut tally = Tally::new()?;
    let bar = ProgressBar::no_length();
    match args.rate {
        Some(rate) => at_rate(&call, rate, start, args.duration, &mut tally, &bar).await,
        None => by_callers(&call, args.callers, start + args.duration, &mut tally, &bar).await,
    }
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let counted = tally.count();
    Ok(Figures {
        latency_milliseconds: counted.times,
        seconds,
        throughput: counted.good() as f64 / seconds,
        counted,
    })
}

struct Call {
    client: Client,
    function: String,
    path: String,
    body: Bytes,
}

impl Call {
    /// The answer, and the time since `due`.
    async fn make(&self, due: Instant) -> (Answered, Duration) {
        let request = self.client.invoke(&self.function, &self.path);
        let answer = Client::answered(request.body(self.body.clone())).await;
        (answer, due.elapsed())
    }
}

async fn at_rate(
    call: &Arc<Call>,
    rate: f64,
    start: Instant,
    duration: Duration,
    tally: &mut Tally,
    bar: &ProgressBar,
) {
    let mut calls = JoinSet::new();
    let mut note = |done: Option<Result<(Answered, Duration), _>>| {
        if let Some(Ok((answer, took))) = done {
            tally.add(&answer, took);
            bar.inc(1);
        }
    };
    for number in 0_u32.. {
        let after = Duration::from_secs_f64(f64::from(number) / rate);
        if after >= duration {
            break;
        }
        let due = start + after;
        tokio::time::sleep_until(due).await;
        let call = Arc::clone(call);
        calls.spawn(async move { call.make(due).await });
        while let Some(done) = calls.try_join_next() {
            note(Some(done));
        }
    }
    while let Some(done) = calls.join_next().await {
        note(Some(done));
    }
}

async fn by_callers(
    call: &Arc<Call>,
    callers: u32,
    end: Instant,
    tally: &mut Tally,
    bar: &ProgressBar,
) {
    let mut calls = JoinSet::new();
    let ask = |calls: &mut JoinSet<_>| {
        let call = Arc::clone(call);
        calls.spawn(async move { call.make(Instant::now()).await });
    };
    for _ in 0..callers {
        ask(&mut calls);
    }
    while let Some(done) = calls.join_next().await {
        if let Ok((answer, took)) = done {
            tally.add(&answer, took);
            bar.inc(1);
        }
        if Instant::now() < end {
            ask(&mut calls);
        }
    }
}

fn render(figures: &Figures) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    figures.counted.rows(&mut table);
    times_row(&mut table, "latency of 200s", figures.latency_milliseconds);
    let seconds = figures.seconds;
    table.add_row(["seconds".to_owned(), format!("{seconds:.1}")]);
    let throughput = figures.throughput;
    table.add_row(["200s a second".to_owned(), format!("{throughput:.0}")]);
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::client::fake::FakeWeir;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        load: LoadArgs,
    }

    fn parse(flags: &[&str]) -> Result<LoadArgs, clap::Error> {
        Cli::try_parse_from(["load"].iter().chain(flags)).map(|cli| cli.load)
    }

    async fn against(fake: &FakeWeir, flags: &[&str]) -> anyhow::Result<()> {
        let target = [
            "--url",
            &fake.url,
            "--admin-url",
            &fake.url,
            "--key",
            "secret",
        ];
        load(parse(&[flags, &target].concat()).unwrap()).await
    }

    #[tokio::test]
    async fn at_a_rate_every_request_that_was_due_is_sent() {
        let fake = FakeWeir::start(200).await;
        let directory = tempfile::tempdir().unwrap();
        let json = directory.path().join("figures.json");
        let rate = ["--rate", "50", "--duration", "PT0.5S"];
        let flags = [&rate[..], &["--json", json.to_str().unwrap()]].concat();
        against(&fake, &flags).await.unwrap();
        assert_eq!(fake.calls("POST /infer"), 25);
        assert_eq!(fake.calls("POST /v2/nvcf/functions"), 1);
        assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 1);
        let figures: serde_json::Value =
            serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        assert_eq!(figures["requests"], 25);
        assert_eq!(figures["answered"]["200"], 25);
        assert!(figures["latencyMilliseconds"]["max"].as_f64().unwrap() > 0.0);
    }

    #[tokio::test]
    async fn callers_ask_until_the_time_is_over_and_a_function_is_left_alone() {
        let fake = FakeWeir::start(200).await;
        against(&fake, &["f", "--callers", "3", "--duration", "PT0.2S"])
            .await
            .unwrap();
        assert!(fake.calls("POST /infer") > 3);
        assert_eq!(fake.calls("POST /v2/nvcf/functions"), 0);
        assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 0);
    }

    #[tokio::test]
    async fn refusals_are_counted_and_neither_latency_nor_throughput() {
        let fake = FakeWeir::start(200).await;
        fake.state().refuse_every = Some(2);
        let directory = tempfile::tempdir().unwrap();
        let json = directory.path().join("figures.json");
        let rate = ["f", "--rate", "50", "--duration", "PT0.2S"];
        let flags = [&rate[..], &["--json", json.to_str().unwrap()]].concat();
        let error = against(&fake, &flags).await.unwrap_err();
        assert_eq!(error.to_string(), "5 of 10 requests were not answered 200");
        let figures: serde_json::Value =
            serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        assert_eq!(figures["answered"]["429 queue-full"], 5);
        let seconds = figures["seconds"].as_f64().unwrap();
        let throughput = figures["throughput"].as_f64().unwrap();
        assert_eq!((throughput * seconds).round(), 5.0);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_written_is_told_before_the_run() {
        let fake = FakeWeir::start(200).await;
        let error = against(&fake, &["f", "--json", "/nowhere/figures.json"]).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("/nowhere/figures.json"), "{error}");
        assert_eq!(fake.calls("POST /infer"), 0);
    }

    #[tokio::test]
    async fn what_was_not_answered_200_is_a_failure() {
        let fake = FakeWeir::start(503).await;
        let error = against(&fake, &["f", "--rate", "20", "--duration", "PT0.1S"])
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "2 of 2 requests were not answered 200");
    }

    #[test]
    fn flags_that_contradict_are_refused() {
        assert!(parse(&["--rate", "5", "--callers", "2"]).is_err());
        assert!(parse(&["f", "--slots", "2"]).is_err());
        assert!(parse(&["--rate", "0"]).is_err());
        assert!(parse(&["--path", "infer"]).is_err());
    }
}
