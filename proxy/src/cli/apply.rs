//! `weir apply`: brings functions to what a file says.
//!
//! What it made it knows again by three tags on the version: whose it is, which
//! entry of the file, and the digest of that entry. So there is no state beside
//! the functions, and an apply that was cut off is taken up by the next.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use uuid::Uuid;
use weir_control::model::IsoDuration;

use self::{
    file::Wanted,
    plan::{Change, Step, Version},
};
use super::{
    Common, Output,
    api::{Client, deployment_path, is_not_found, version_path},
    deploy::undeploy,
    note, print, text,
    wait::{Awaited, Failures, Progress, Wait},
};

mod file;
mod plan;

#[derive(Debug, clap::Args)]
pub struct Apply {
    #[command(flatten)]
    common: Common,
    /// The functions, YAML or JSON (- for standard input)
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Whose functions these are: others' are never touched
    #[arg(long, default_value = "default", value_parser = file::owner)]
    owner: String,
    /// Delete what an earlier apply of this owner made and the file no longer has
    #[arg(long)]
    prune: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    wait: Wait,
    /// Longest wait for an old version's work to end, an ISO 8601 duration
    #[arg(long, value_name = "DURATION", default_value = "PT5M")]
    drain_timeout: IsoDuration,
}

/// Functions brought up at a time: each waits for its own instances.
const AT_A_TIME: usize = 8;

impl Apply {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let wanted = file::read(&self.file)?;
        let client = Client::new(&self.common)?;
        let rows = client.rows().await?;
        let steps = plan::plan(&wanted, &rows, &self.owner, self.prune);
        let progress = Progress::new();
        let worker = Worker {
            client: &client,
            owner: &self.owner,
            progress: &progress,
            active: self.wait.limit(),
            drained: self.drain_timeout.0,
        };

        let mut failed = 0;
        let mut report = Vec::new();
        let mut done = stream::iter(&steps)
            .map(|step| {
                let worker = &worker;
                async move {
                    let done = if self.dry_run {
                        Ok(())
                    } else {
                        worker.take(step).await
                    };
                    (step, done)
                }
            })
            .buffered(AT_A_TIME);
        while let Some((step, result)) = done.next().await {
            let outcome = match &result {
                Ok(()) => step.change.as_str(),
                Err(_) => "failed",
            };
            report.push(json!({"name": step.name, "result": outcome}));
            progress.aside(|| match self.common.output {
                Output::Table => print(&format!("{}: {outcome}", step.name)),
                Output::Json => Ok(()),
            })?;
            if let Err(error) = result {
                failed += 1;
                progress.aside(|| note(&format!("{}: {error:#}", step.name)));
            }
        }
        if self.common.output == Output::Json {
            print(&serde_json::to_string_pretty(
                &json!({"functions": report}),
            )?)?;
        }
        if failed > 0 {
            bail!(
                "{failed} of {} failed; what is done stays, and the next apply goes on from there",
                steps.len()
            );
        }
        Ok(())
    }
}

/// Takes the steps of a plan, one function's after the other.
struct Worker<'a> {
    client: &'a Client,
    owner: &'a str,
    progress: &'a Progress,
    /// None: what is deployed is not waited for, and what it replaces stays until the next apply.
    active: Option<Duration>,
    drained: Duration,
}

impl Worker<'_> {
    async fn take(&self, step: &Step<'_>) -> anyhow::Result<()> {
        let name = step.name.as_str();
        match &step.change {
            Change::Nothing | Change::Keep => {}
            Change::CreateFunction(wanted) => {
                let new = self.create("/v2/nvcf/functions", wanted).await?;
                self.deploy(new, wanted).await?;
            }
            Change::CreateVersion(function, wanted) => {
                let path = format!("/v2/nvcf/functions/{function}/versions");
                let new = self.create(&path, wanted).await?;
                self.deploy(new, wanted).await?;
            }
            Change::Deploy(version, wanted) => self.deploy(*version, wanted).await?,
            Change::Redeploy(version, wanted) => {
                undeploy(self.client, version.function, version.id, self.drained).await?;
                self.deploy(*version, wanted).await?;
            }
            Change::Await(version) => self.until_active(*version, name).await?,
            Change::Delete => {}
        }
        if self.active.is_none() && step.change != Change::Delete && !step.remove.is_empty() {
            self.say(&format!(
                "{name}: the versions before it serve until the next apply without --no-wait"
            ));
            return Ok(());
        }
        for old in &step.remove {
            self.remove(*old)
                .await
                .with_context(|| format!("can't delete version {} of {}", old.id, old.function))?;
        }
        Ok(())
    }

    fn say(&self, line: &str) {
        self.progress.aside(|| note(line));
    }

    async fn until_active(&self, version: Version, name: &str) -> anyhow::Result<()> {
        let Some(limit) = self.active else {
            return Ok(());
        };
        let awaited = Awaited {
            client: self.client,
            name,
            function: version.function,
            version: version.id,
            old: Failures::new(),
        };
        awaited.active(limit, self.progress).await
    }

    async fn create(&self, path: &str, wanted: &Wanted) -> anyhow::Result<Version> {
        let answer = self.client.post(path, &wanted.body(self.owner)).await;
        let answer = answer?;
        let id = |member: &str| -> anyhow::Result<Uuid> {
            text(&answer["function"], member)
                .parse()
                .with_context(|| format!("the server's answer has no {member}"))
        };
        Ok(Version {
            function: id("id")?,
            id: id("versionId")?,
            deployed: false,
        })
    }

    /// Deploys and returns when it is ACTIVE.
    async fn deploy(&self, version: Version, wanted: &Wanted) -> anyhow::Result<()> {
        let Some(deployment) = &wanted.deployment else {
            return Ok(());
        };
        let path = deployment_path(version.function, version.id);
        let body: Value = deployment.clone().into();
        let answer = self.client.post(&path, &body).await;
        answer?;
        self.until_active(version, &wanted.name).await
    }

    async fn remove(&self, version: Version) -> anyhow::Result<()> {
        if version.deployed
            && !undeploy(self.client, version.function, version.id, self.drained).await?
        {
            self.say(&format!(
                "version {}: its work goes on after {}; deleted with it",
                version.id,
                IsoDuration(self.drained)
            ));
        }
        match self
            .client
            .delete(&version_path(version.function, version.id))
            .await
        {
            Err(e) if !is_not_found(&e) => Err(e),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
