//! `weir apply`: brings functions to what a file says.
//!
//! What it made it knows again by three tags on the version: whose it is, which
//! entry of the file, and the digest of that entry. So there is no state beside
//! the functions, and an apply that was cut off is taken up by the next.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use anyhow::{Context, anyhow, bail};
use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;
use weir_control::model::IsoDuration;

use self::{
    diff::{Field, Update},
    file::Wanted,
    plan::{Change, Kind, Step, Version},
};
use super::{
    Common, Output,
    api::{Client, Problem, deployment_path, is_not_found, version_path},
    deploy::{changeable, undeploy},
    list, note, print,
    screen::{BAD, FAINT, GOOD, Screen, UNDERWAY},
    text,
    wait::{Awaited, Failed, Failures, NoGpu, Progress, Short, Wait, failures},
};

mod diff;
mod file;
mod places;
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
    /// Show what would change, field by field, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Keep a new version that fails, to look at it; the old one stays as it is then
    #[arg(long)]
    keep_failed: bool,
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
        let looked_at = plan::looked_at(&wanted, &rows, &self.owner);
        let deployments = deployments(&client, looked_at).await?;
        let steps = plan::plan(&wanted, &rows, &deployments, &self.owner, self.prune);
        if self.dry_run {
            return self.preview(&client, &steps).await;
        }
        let progress = Progress::new();
        let worker = Worker {
            client: &client,
            owner: &self.owner,
            progress: &progress,
            active: self.wait.limit(),
            drained: self.drain_timeout.0,
            keep_failed: self.keep_failed,
        };

        let mut counts = Counts::default();
        let mut report = Vec::new();
        // As they are done; the report is in the file's order.
        let mut done = stream::iter(steps.iter().enumerate())
            .map(|(at, step)| {
                let worker = &worker;
                async move { (at, step, worker.take(step).await) }
            })
            .buffer_unordered(AT_A_TIME);
        while let Some((at, step, result)) = done.next().await {
            let outcome = match &result {
                Ok(()) if matches!(step.change, Change::Await(..)) && worker.active.is_none() => {
                    Change::Nothing.as_str()
                }
                Ok(()) => step.change.as_str(),
                Err(_) => "failed",
            };
            report.push((at, json!({"name": step.name, "result": outcome})));
            progress.aside(|| match self.common.output {
                Output::Table => print(&format!("{}: {outcome}", step.name)),
                Output::Json => Ok(()),
            })?;
            match result {
                Ok(()) => counts.count(step.change.kind()),
                Err(error) => {
                    counts.failed += 1;
                    progress.aside(|| note(&format!("{}: {error:#}", step.name)));
                }
            }
        }
        report.sort_by_key(|(at, _)| *at);
        let report: Vec<Value> = report.into_iter().map(|(_, line)| line).collect();
        match self.common.output {
            Output::Json => print(&serde_json::to_string_pretty(
                &json!({"functions": report, "summary": counts.json()}),
            )?)?,
            Output::Table => print(&counts.to_string())?,
        }
        if counts.failed > 0 {
            bail!(
                "{} of {} failed; the others stay as they are now, and the next apply goes on from there",
                counts.failed,
                steps.len()
            );
        }
        Ok(())
    }

    /// Says what would be done, and does nothing.
    async fn preview(&self, client: &Client, steps: &[Step<'_>]) -> anyhow::Result<()> {
        let screen = Screen {
            width: None,
            ..Screen::stdout()
        };
        let mut counts = Counts::default();
        let mut report = Vec::new();
        let mut lines = Vec::new();
        for step in steps {
            let fields = changes(client, step).await?;
            counts.count(step.change.kind());
            report.push(json!({
                "name": step.name,
                "result": step.change.as_str(),
                "changes": fields.iter().map(Field::json).collect::<Vec<_>>(),
                "deletedVersions": step.remove.iter().map(|v| v.id).collect::<Vec<_>>(),
            }));
            lines.push(headline(step, screen));
            lines.extend(fields.iter().map(|field| field.line(screen)));
            lines.extend(step.remove.iter().map(|old| {
                let when = match step.change {
                    Change::Delete => "",
                    _ => ", when that is ACTIVE",
                };
                screen.paint(BAD, &format!("    - version {}{when}", old.id))
            }));
        }
        if self.common.output == Output::Json {
            return print(&serde_json::to_string_pretty(
                &json!({"functions": report, "summary": counts.json()}),
            )?);
        }
        lines.push(format!(
            "dry run, nothing was changed; it would be: {counts}"
        ));
        print(&lines.join("\n"))
    }
}

/// The deployments of these versions, as far as they still have one.
async fn deployments(
    client: &Client,
    versions: Vec<Version>,
) -> anyhow::Result<BTreeMap<Uuid, Value>> {
    stream::iter(versions)
        .map(async |version| {
            let deployment = deployment(client, version).await?;
            anyhow::Ok(deployment.map(|deployment| (version.id, deployment)))
        })
        .buffer_unordered(AT_A_TIME)
        .try_filter_map(async |found| Ok(found))
        .try_collect()
        .await
}

/// A version's deployment, if it has one.
async fn deployment(client: &Client, version: Version) -> anyhow::Result<Option<Value>> {
    let path = deployment_path(version.function, version.id);
    match client.get(&path).await {
        Ok(mut answer) => Ok(Some(answer["deployment"].take())),
        Err(e) if is_not_found(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

fn headline(step: &Step<'_>, screen: Screen) -> String {
    let name = &step.name;
    match (&step.change, step.change.kind()) {
        (Change::Keep, _) => format!("= {name}: not in the file; --prune would delete it"),
        (_, Kind::Created) => screen.paint(GOOD, &format!("+ {name}: a new function")),
        (_, Kind::Deleted) => screen.paint(BAD, &format!("- {name}: not in the file")),
        (Change::Await(_, status), _) => screen.paint(
            UNDERWAY,
            &format!("= {name}: unchanged, and {status}: waited for"),
        ),
        (_, Kind::Unchanged) => screen.paint(FAINT, &format!("= {name}: unchanged")),
        (change, Kind::Updated) => {
            let what = match change {
                Change::CreateVersion(..) => "a new version".into(),
                Change::Deploy(version, _) => format!("version {} deployed", version.id),
                Change::Redeploy(version, _) => {
                    format!("version {} is in ERROR, deployed again", version.id)
                }
                Change::Update(..) => "its deployment".into(),
                _ => "the versions before the one that serves go".to_owned(),
            };
            screen.paint(UNDERWAY, &format!("~ {name}: {what}"))
        }
    }
}

/// What a step changes, field by field.
async fn changes(client: &Client, step: &Step<'_>) -> anyhow::Result<Vec<Field>> {
    Ok(match &step.change {
        Change::CreateFunction(wanted) => {
            // As it is written: what the server adds is no news of the file's.
            let mut written = Value::from(wanted.body.clone());
            written["name"].take();
            if let Some(deployment) = &wanted.deployment {
                written["deployment"] = deployment.clone().into();
            }
            diff::diff(&Value::Null, &written)
        }
        Change::CreateVersion(_, wanted) => {
            let Some(newest) = step.remove.last() else {
                return Ok(Vec::new());
            };
            let function = client
                .get(&version_path(newest.function, newest.id))
                .await?;
            let deployment = deployment(client, *newest).await?;
            diff::diff(
                &diff::as_told(&function["function"], deployment.as_ref()),
                &diff::as_made(&wanted.body, wanted.deployment.as_ref()),
            )
        }
        Change::Update(_, _, update) => update.fields.clone(),
        Change::Deploy(_, wanted) => {
            let deployment = wanted.deployment.clone();
            diff::diff(&Value::Null, &json!({"deployment": deployment}))
        }
        _ => Vec::new(),
    })
}

/// How many functions came to what.
#[derive(Debug, Default)]
struct Counts {
    created: usize,
    updated: usize,
    unchanged: usize,
    deleted: usize,
    failed: usize,
}

impl Counts {
    fn count(&mut self, kind: Kind) {
        *match kind {
            Kind::Created => &mut self.created,
            Kind::Updated => &mut self.updated,
            Kind::Unchanged => &mut self.unchanged,
            Kind::Deleted => &mut self.deleted,
        } += 1;
    }

    fn json(&self) -> Value {
        json!({
            "created": self.created, "updated": self.updated,
            "unchanged": self.unchanged, "deleted": self.deleted, "failed": self.failed,
        })
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} created, {} updated, {} unchanged, {} deleted",
            self.created, self.updated, self.unchanged, self.deleted
        )?;
        match self.failed {
            0 => Ok(()),
            failed => write!(f, ", {failed} failed"),
        }
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
    keep_failed: bool,
}

impl Worker<'_> {
    async fn take(&self, step: &Step<'_>) -> anyhow::Result<()> {
        let name = step.name.as_str();
        let old = &step.remove;
        match &step.change {
            Change::Nothing | Change::Keep | Change::Delete => {}
            Change::CreateFunction(wanted) => {
                let new = self.create("/v2/nvcf/functions", wanted).await?;
                self.deploy(new, wanted, old, true).await?;
            }
            Change::CreateVersion(function, wanted) => {
                let path = format!("/v2/nvcf/functions/{function}/versions");
                let new = self.create(&path, wanted).await?;
                self.deploy(new, wanted, old, true).await?;
            }
            Change::Deploy(version, wanted) => self.deploy(*version, wanted, old, false).await?,
            Change::Redeploy(version, wanted) => {
                undeploy(self.client, version.function, version.id, self.drained).await?;
                self.deploy(*version, wanted, old, false).await?;
            }
            Change::Update(version, wanted, update) => {
                self.update(*version, wanted, update).await?;
            }
            Change::Await(version, _) => {
                self.until_active(*version, name, Failures::new(), NoGpu::Fails)
                    .await?;
            }
            Change::Replace(version, wanted) => {
                let mut freed = Vec::new();
                self.bring_up(*version, wanted, old, &mut freed).await?;
            }
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

    async fn until_active(
        &self,
        version: Version,
        name: &str,
        old: Failures,
        no_gpu: NoGpu,
    ) -> anyhow::Result<()> {
        let Some(limit) = self.active else {
            return Ok(());
        };
        let awaited = Awaited {
            client: self.client,
            name,
            function: version.function,
            version: version.id,
            old,
            no_gpu,
        };
        awaited.active(limit, self.progress).await
    }

    async fn create(&self, path: &str, wanted: &Wanted) -> anyhow::Result<Version> {
        let answer = self.client.post(path, &wanted.body(self.owner)).await;
        let answer = answer.map_err(|error| wanted.placed(error))?;
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

    /// Deploys and returns when it is ACTIVE. Where it fails, things are as they were, but for a
    /// version that was there: that stays.
    async fn deploy(
        &self,
        version: Version,
        wanted: &Wanted,
        old: &[Version],
        made: bool,
    ) -> anyhow::Result<()> {
        let Some(deployment) = &wanted.deployment else {
            return Ok(());
        };
        let path = deployment_path(version.function, version.id);
        let body: Value = deployment.clone().into();
        let mut freed = Vec::new();
        let up = match self.client.post(&path, &body).await {
            Ok(_) => self.bring_up(version, wanted, old, &mut freed).await,
            Err(error) => Err(wanted.placed(error)),
        };
        match up {
            Err(error) if has_failed(&error) && !self.keep_failed => {
                let done = self.back(version, &wanted.name, made, freed).await;
                Err(match done.is_empty() {
                    true => error,
                    false => anyhow!("{error:#}\n{}", done.join("\n")),
                })
            }
            up => up,
        }
    }

    /// Returns when it is ACTIVE. Old versions whose GPUs it needs make room, and are `freed` then.
    async fn bring_up(
        &self,
        version: Version,
        wanted: &Wanted,
        old: &[Version],
        freed: &mut Vec<(Version, Value)>,
    ) -> anyhow::Result<()> {
        let name = &wanted.name;
        let holders = match self.active {
            Some(_) => self.holders(wanted, old).await?,
            None => Vec::new(),
        };
        let no_gpu = match holders.is_empty() {
            true => NoGpu::Fails,
            false => NoGpu::Told,
        };
        let up = self
            .until_active(version, name, Failures::new(), no_gpu)
            .await;
        let Err(error) = up else { return Ok(()) };
        if !error.is::<Short>() {
            return Err(error);
        }
        for (old, deployment) in holders {
            self.say(&format!(
                "{name}: {error}: version {} has one and is undeployed first",
                old.id
            ));
            freed.push((old, deployment));
            if !undeploy(self.client, old.function, old.id, self.drained).await? {
                self.say(&format!(
                    "version {}: its work goes on after {}",
                    old.id,
                    IsoDuration(self.drained)
                ));
            }
        }
        self.until_active(version, name, Failures::new(), NoGpu::Awaited)
            .await
    }

    /// The old versions that have GPUs which the wanted one asks for, with what deploys them again.
    async fn holders(
        &self,
        wanted: &Wanted,
        old: &[Version],
    ) -> anyhow::Result<Vec<(Version, Value)>> {
        let gpus = |deployment: &Value| -> Vec<String> {
            list(deployment, "deploymentSpecifications")
                .iter()
                .map(|spec| text(spec, "gpu").to_lowercase())
                .filter(|gpu| gpu != "none")
                .collect()
        };
        let needed = gpus(&wanted.deployment.clone().into());
        let mut holders = Vec::new();
        for old in old.iter().filter(|old| old.deployed && !needed.is_empty()) {
            let Some(there) = deployment(self.client, *old).await? else {
                continue;
            };
            // A name may be a part of another's: H100 is an NVIDIA H100 80GB HBM3.
            let same = gpus(&there).iter().any(|gpu| {
                let alike = |other: &String| gpu.contains(other) || other.contains(gpu);
                needed.iter().any(alike)
            });
            // A key that may not see them can't tell.
            let holds = match self.client.instances(Some(old.id)).await {
                Ok((_, all)) => all.iter().any(|instance| !instance.gpus.is_empty()),
                Err(_) => true,
            };
            if same && holds {
                holders.push((*old, changeable(&there).into()));
            }
        }
        Ok(holders)
    }

    /// Takes back what was done for a version that failed; says what that is.
    async fn back(
        &self,
        failed: Version,
        name: &str,
        made: bool,
        freed: Vec<(Version, Value)>,
    ) -> Vec<String> {
        let mut done = Vec::new();
        let path = match made {
            true => version_path(failed.function, failed.id),
            false => deployment_path(failed.function, failed.id),
        };
        if made || !freed.is_empty() {
            let (what, keeps) = match made {
                true => ("deleted", "; --keep-failed keeps it"),
                false => ("undeployed", ""),
            };
            done.push(match self.client.delete(&path).await {
                Err(e) if !is_not_found(&e) => {
                    format!("version {} could not be {what}: {e:#}", failed.id)
                }
                _ => format!("version {} is {what} again{keeps}", failed.id),
            });
        }
        for (old, body) in freed {
            let path = deployment_path(old.function, old.id);
            let again = async {
                self.client.post(&path, &body).await?;
                self.until_active(old, name, Failures::new(), NoGpu::Awaited)
                    .await
            };
            done.push(match again.await {
                Ok(()) => format!("version {} is deployed again as it was", old.id),
                Err(e) => format!("version {} is not back: {e:#}", old.id),
            });
        }
        done
    }

    /// Changes a deployment and returns when the version is ACTIVE.
    async fn update(
        &self,
        version: Version,
        wanted: &Wanted,
        update: &Update,
    ) -> anyhow::Result<()> {
        // Only to tell old failures from new ones: a key that may not see them does without.
        let there = self.client.instances(Some(version.id)).await;
        let old = failures(&there.unwrap_or_default().1);
        let path = deployment_path(version.function, version.id);
        let answer = self
            .client
            .send(Method::PUT, &path, Some(&update.body))
            .await;
        let answer = answer.map_err(|error| wanted.placed(error))?;
        let id = text(&answer["deployment"], "deploymentId");
        for spec in &update.unconfigured {
            let path = format!("/v2/nvcf/deployments/{id}/gpu-specifications/{spec}");
            let body = json!({"autoscalingConfigurationPolicy": "PLATFORM_CONFIGURATION"});
            self.client.send(Method::PATCH, &path, Some(&body)).await?;
        }
        self.until_active(version, &wanted.name, old, NoGpu::Fails)
            .await
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

/// Whether it says that the version can't be: it is in ERROR, or its deployment is refused.
fn has_failed(error: &anyhow::Error) -> bool {
    let refused = |problem: &Problem| problem.status == StatusCode::BAD_REQUEST;
    error.is::<Failed>() || error.downcast_ref().is_some_and(refused)
}

#[cfg(test)]
mod tests;
