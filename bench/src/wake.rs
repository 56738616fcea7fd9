//! What Weir adds to a cold start.
//!
//! A cold request's way is: it arrives, an instance is started, the instance
//! gets ready by itself, the request is dispatched to it. The time from
//! sending the request to the sample function's having its head
//! (`x-received-at`), less the instance's own start, is what Weir took. All
//! clocks are this machine's. There are two accounts of the own start:
//!
//! - Spawn to first healthy answer (`spawnedAt` to `firstHealthyAt`), as Weir's
//!   promise is worded: at most 20 ms are added. But Weir sets the second time
//!   when it has asked and checked the answer, so what it takes to notice that
//!   the instance is ready counts as the instance's.
//! - Spawn to listening (`spawnedAt` to `x-listening-since`, which the instance
//!   says itself). All that comes after, noticing readiness and dispatching, is
//!   Weir's, as is all before: noticing the demand, deciding, spawning. This is
//!   the strict one; it also charges to Weir the instance's first answer.

use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use serde_json::json;

use crate::client::{Client, TargetArgs, Version, deleting};
use crate::sample;
use crate::times;

#[derive(Debug, clap::Args)]
pub struct WakeArgs {
    /// How many cold starts, one after another
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// How long the instance takes until it listens
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub start_delay_ms: u64,
    #[command(flatten)]
    pub target: TargetArgs,
}

/// One cold start.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Wake {
    /// Arrival to dispatch.
    whole: Duration,
    /// The instance's spawn to its first healthy answer, as Weir has it.
    healthy: Duration,
    /// The instance's spawn to when it listened, as it says itself.
    listening: Duration,
}

impl Wake {
    fn added(&self) -> Duration {
        self.whole.saturating_sub(self.healthy)
    }

    fn added_strictly(&self) -> Duration {
        self.whole.saturating_sub(self.listening)
    }
}

pub async fn wake(args: WakeArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.target)?;
    let start = Duration::from_millis(args.start_delay_ms);
    let name = format!("bench-wake-{}", &uuid::Uuid::new_v4().to_string()[..8]);
    let version = client.create(&name, start).await?;
    let run = run(&args, &client, &version);
    let wakes = deleting(&client, std::slice::from_ref(&version), run).await?;
    println!("{}", render(&wakes)?);
    Ok(())
}

fn deployment() -> serde_json::Value {
    json!({
        "deploymentSpecifications": [{
            "gpu": "none",
            "instanceType": "none",
            "minInstances": 0,
            "maxInstances": 1,
            "maxRequestConcurrency": 1,
        }],
        "autoscaling": {
            "policy": "concurrency",
            "stableWindow": "PT1S",
            "panicWindow": "PT0.5S",
            "scaleInDelay": "PT0S",
            // Long enough to read the instance's times before it is gone.
            "idleTimeout": "PT1S",
        },
    })
}

async fn run(args: &WakeArgs, client: &Client, version: &Version) -> anyhow::Result<Vec<Wake>> {
    client.deploy(version, &deployment()).await?;
    let bar = ProgressBar::new(args.runs.into());
    let mut wakes = Vec::new();
    for run in 1..=args.runs {
        client
            .until_no_instances(&version.version, Duration::from_secs(60))
            .await?;
        let wake = one(client, version)
            .await
            .with_context(|| format!("run {run} of {}", args.runs))?;
        wakes.push(wake);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(wakes)
}

async fn one(client: &Client, version: &Version) -> anyhow::Result<Wake> {
    let request = client.invoke(&version.function, "/infer?ms=0");
    let sent = jiff::Timestamp::now();
    let response = request.send().await?;
    if response.status() != 200 {
        bail!("answered {}: {}", response.status(), response.text().await?);
    }
    let headers = response.headers();
    let received = sample::received_at(headers).context("no x-received-at in the answer")?;
    let listening =
        sample::listening_since(headers).context("no x-listening-since in the answer")?;
    let id = headers
        .get("x-instance")
        .and_then(|id| id.to_str().ok())
        .context("no x-instance in the answer")?
        .to_owned();
    response.bytes().await?;
    let instance = client.instance(&id).await?;
    let spawned = instance.spawned_at.context("no spawnedAt")?;
    let healthy = instance.first_healthy_at.context("no firstHealthyAt")?;
    if spawned < sent {
        bail!("instance {id} was there before the request");
    }
    Ok(Wake {
        whole: between(sent, received)?,
        healthy: between(spawned, healthy)?,
        listening: between(spawned, listening)?,
    })
}

fn between(from: jiff::Timestamp, to: jiff::Timestamp) -> anyhow::Result<Duration> {
    Duration::try_from(to.duration_since(from))
        .ok()
        .with_context(|| format!("{to} is before {from}"))
}

fn render(wakes: &[Wake]) -> anyhow::Result<String> {
    let row = |name, of: fn(&Wake) -> Duration| (name, wakes.iter().map(of).collect());
    let table = times::table(&[
        row("arrival to dispatch", |wake| wake.whole),
        row("own start: spawn to first healthy answer", |wake| {
            wake.healthy
        }),
        row("own start: spawn to listening", |wake| wake.listening),
        row("added, less spawn to first healthy answer", Wake::added),
        row(
            "added, less spawn to listening (strict)",
            Wake::added_strictly,
        ),
    ])?;
    Ok(format!("{} cold starts\n{table}", wakes.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::fake::FakeWeir;

    #[tokio::test]
    async fn each_run_is_a_cold_start_of_its_own() {
        let fake = FakeWeir::start(200).await;
        let args = WakeArgs {
            runs: 2,
            start_delay_ms: 20,
            target: fake.target(),
        };
        let client = Client::new(&args.target).unwrap();
        let version = client.create("wake", Duration::ZERO).await.unwrap();
        let wakes = run(&args, &client, &version).await.unwrap();
        assert_eq!(wakes.len(), 2);
        for wake in wakes {
            assert!(wake.listening >= FakeWeir::OWN_START, "{wake:?}");
            let noticed = wake.healthy - wake.listening;
            assert!(noticed >= FakeWeir::NOTICED, "{wake:?}");
            assert!(wake.added() >= FakeWeir::ADDED, "{wake:?}");
            // What it takes to notice is Weir's.
            assert_eq!(wake.added_strictly(), wake.added() + noticed);
        }
        wake(args).await.unwrap();
        assert_eq!(fake.calls("POST /infer"), 4);
        assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 1);
    }

    #[test]
    fn what_is_not_the_instances_own_is_added() {
        let ms = Duration::from_millis;
        let wakes: Vec<Wake> = (1..=10)
            .map(|i| Wake {
                whole: ms(300 + i),
                healthy: ms(300),
                listening: ms(290),
            })
            .collect();
        let text = render(&wakes).unwrap();
        let numbers = |name: &str| {
            let line = text.lines().find(|line| line.contains(name)).unwrap();
            let numbers = line.split_whitespace().rev().take(3);
            numbers.map(str::to_owned).collect::<Vec<_>>()
        };
        let added = numbers("added, less spawn to first healthy answer");
        assert_eq!(added, ["10.00", "9.00", "5.00"]);
        let strictly = numbers("added, less spawn to listening (strict)");
        assert_eq!(strictly, ["20.00", "19.00", "15.00"]);
    }

    #[test]
    fn times_that_run_backwards_are_an_error() {
        let now = jiff::Timestamp::now();
        let later = now + Duration::from_millis(5);
        assert_eq!(between(now, later).unwrap(), Duration::from_millis(5));
        assert!(between(later, now).is_err());
    }
}
