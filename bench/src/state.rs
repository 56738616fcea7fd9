//! How soon a version's state follows the end of an instance.
//!
//! One of two instances is killed, which is to make the version DEGRADING; its
//! state is asked for without a pause, until it is no longer ACTIVE. The time
//! includes the look that saw it. Each run has a function of its own, since an
//! instance that is killed again and again is started ever later.

use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::time::Instant;

use crate::client::{Client, TargetArgs, Version, deleting};
use crate::times;

/// Of an instance: long enough for the state to be seen.
const START: Duration = Duration::from_secs(1);
const BOUND: Duration = Duration::from_secs(20);

#[derive(Debug, clap::Args)]
pub struct StateArgs {
    /// How many instances are killed, one after another
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    #[command(flatten)]
    pub target: TargetArgs,
}

pub async fn state(args: StateArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.target)?;
    let bar = ProgressBar::new(args.runs.into());
    let mut times = Vec::new();
    for _ in 0..args.runs {
        let name = format!("bench-state-{}", &uuid::Uuid::new_v4().to_string()[..8]);
        let version = client.create(&name, START).await?;
        let one = one(&client, &version);
        times.push(deleting(&client, std::slice::from_ref(&version), one).await?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let rows = [("an instance's kill -9 to DEGRADING", times)];
    println!("{} runs\n{}", args.runs, times::table(&rows)?);
    Ok(())
}

async fn one(client: &Client, version: &Version) -> anyhow::Result<Duration> {
    let deployment = json!({
        "deploymentSpecifications": [{
            "gpu": "none",
            "instanceType": "none",
            "minInstances": 2,
            "maxInstances": 2,
            "maxRequestConcurrency": 1,
        }],
    });
    client.deploy(version, &deployment).await?;
    let instances = client.until_ready(version, 2).await?;
    let pid = instances[0].pid.context("the instance has no pid")?;
    let pid = Pid::from_raw(pid).context("the instance's pid is none")?;
    let killed = Instant::now();
    kill_process(pid, Signal::KILL).context("could not kill the instance")?;
    loop {
        let status = client.status(version).await?;
        match status.as_str() {
            "ACTIVE" if killed.elapsed() > BOUND => {
                bail!("the version is still ACTIVE {BOUND:?} after the kill")
            }
            "ACTIVE" => {}
            "DEGRADING" => return Ok(killed.elapsed()),
            other => bail!("the version is {other}, not DEGRADING"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::fake::FakeWeir;

    #[tokio::test]
    async fn an_instance_is_killed_and_the_state_seen() {
        let fake = FakeWeir::start(200).await;
        let mut victim = tokio::process::Command::new("sleep")
            .arg("1000")
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        fake.state().pid = victim.id();
        let args = StateArgs {
            runs: 1,
            target: fake.target(),
        };
        state(args).await.unwrap();
        assert!(!victim.wait().await.unwrap().success());
        assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 1);
    }
}
