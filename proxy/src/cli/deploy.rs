//! `weir deploy`.

use std::{path::PathBuf, str::FromStr, time::Duration};

use anyhow::bail;
use reqwest::Method;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use weir_control::model::IsoDuration;

use super::{
    Common,
    api::{Client, Row, Unnamed, deployment_path, is_not_found, pick_version},
    id::Id,
    list, read_object,
    table::{self, Column},
    text,
    wait::{Awaited, Failures, Progress, Wait, failures},
};

#[derive(Debug, clap::Args)]
pub struct Deploys {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: DeployCommand,
}

#[derive(Debug, clap::Args)]
struct Target {
    /// The function's ID, or its name where that is unique
    function: String,
    /// The version's ID [default: to create, the newest; else the one that is deployed]
    #[arg(long, value_name = "ID")]
    version: Option<Id>,
}

#[derive(Debug, clap::Subcommand)]
enum DeployCommand {
    /// Deploy a version, and wait until it is ACTIVE
    Create {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        spec: DeploySpec,
        #[command(flatten)]
        wait: Wait,
    },
    /// Show a deployment whole
    Get {
        #[command(flatten)]
        target: Target,
    },
    /// Change a deployment; what is not named stays. Waits until it is ACTIVE
    Update {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        spec: DeploySpec,
        #[command(flatten)]
        wait: Wait,
    },
    /// End a deployment
    Delete {
        #[command(flatten)]
        target: Target,
        /// Let what waits and runs end first
        #[arg(long)]
        graceful: bool,
    },
}

/// What a deployment is made of; each absent one is the server's default, or stays.
#[derive(Debug, Default, clap::Args)]
struct DeploySpec {
    /// The whole body, JSON or YAML (- for standard input); the other flags replace its members
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Instances that are always there [default: 0]
    #[arg(long, value_name = "N")]
    min: Option<u32>,
    /// Instances at most [default: 1, or --min where that is more]
    #[arg(long, value_name = "N")]
    max: Option<u32>,
    /// Requests at a time in one instance [default: 1]
    #[arg(long, value_name = "N")]
    concurrency: Option<u32>,
    /// GPU of an instance, by its name [default: none]
    #[arg(long)]
    gpu: Option<String>,
    /// Instance type; a _<n>x at its end is the number of GPUs [default: none]
    #[arg(long, value_name = "TYPE")]
    instance_type: Option<String>,
    /// Time without a request after which the instances above --min go, ISO 8601
    #[arg(long, value_name = "DURATION")]
    idle_timeout: Option<IsoDuration>,
    /// Share of an instance's slots to aim at, above 0 and at most 1
    #[arg(long, value_name = "SHARE")]
    target_utilization: Option<f64>,
    /// Time that lower demand must last before instances go, ISO 8601
    #[arg(long, value_name = "DURATION")]
    scale_in_delay: Option<IsoDuration>,
    /// Requests that may wait
    #[arg(long, value_name = "N")]
    queue_max: Option<u64>,
    /// Longest wait while an instance is ready, ISO 8601
    #[arg(long, value_name = "DURATION")]
    busy_timeout: Option<IsoDuration>,
    /// Longest wait while none is, ISO 8601
    #[arg(long, value_name = "DURATION")]
    cold_timeout: Option<IsoDuration>,
    /// Longest start of an instance, ISO 8601
    #[arg(long, value_name = "DURATION")]
    start_timeout: Option<IsoDuration>,
    /// Longest time for an instance's requests to end when it goes, ISO 8601
    #[arg(long, value_name = "DURATION")]
    drain_timeout: Option<IsoDuration>,
    /// Share of the function's requests, beside the weights of its other versions; `none` takes it back
    #[arg(long, value_name = "N")]
    traffic_weight: Option<Weight>,
}

/// A share, or none: by ready capacity.
#[derive(Debug, Clone, Copy)]
struct Weight(Option<u32>);

impl FromStr for Weight {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "none" => Ok(Self(None)),
            number => number
                .parse()
                .map(|n| Self(Some(n)))
                .map_err(|_| "must be a whole number, or none".into()),
        }
    }
}

impl DeploySpec {
    fn base(&self) -> anyhow::Result<Map<String, Value>> {
        self.file
            .as_deref()
            .map_or_else(|| Ok(Map::new()), read_object)
    }

    fn create_body(&self) -> anyhow::Result<Value> {
        let body = self.over(self.base()?)?;
        Ok(with_defaults(body).into())
    }

    /// Only what is named: the server keeps the rest, so that nobody else's change is undone.
    fn update_body(&self) -> anyhow::Result<Value> {
        Ok(self.over(folded(self.base()?))?.into())
    }

    /// The body with what the flags say put over it.
    fn over(&self, mut body: Map<String, Value>) -> anyhow::Result<Map<String, Value>> {
        let mut specification = Map::new();
        let mut put = |member: &str, value: Option<Value>| {
            if let Some(value) = value {
                specification.insert(member.into(), value);
            }
        };
        put("gpu", self.gpu.clone().map(Value::from));
        put("instanceType", self.instance_type.clone().map(Value::from));
        put("minInstances", self.min.map(Value::from));
        put("maxInstances", self.max.map(Value::from));
        put("maxRequestConcurrency", self.concurrency.map(Value::from));
        if !specification.is_empty() {
            let specifications = body
                .entry("deploymentSpecifications")
                .or_insert_with(|| json!([{}]));
            match specifications.as_array_mut().map(Vec::as_mut_slice) {
                Some([Value::Object(only)]) => only.extend(specification),
                _ => bail!(
                    "--gpu, --instance-type, --min, --max and --concurrency are for a deployment \
                     with one specification: change the others with --file"
                ),
            }
        }

        let duration = |d: Option<IsoDuration>| d.map(|d| Value::from(d.to_string()));
        for (group, member, value) in [
            ("autoscaling", "idleTimeout", duration(self.idle_timeout)),
            (
                "autoscaling",
                "targetUtilization",
                self.target_utilization.map(Value::from),
            ),
            ("autoscaling", "scaleInDelay", duration(self.scale_in_delay)),
            ("queue", "maxRequests", self.queue_max.map(Value::from)),
            ("queue", "busyTimeout", duration(self.busy_timeout)),
            ("queue", "coldTimeout", duration(self.cold_timeout)),
        ] {
            if let Some(value) = value {
                match body.entry(group).or_insert_with(|| json!({})) {
                    Value::Object(group) => group.insert(member.into(), value),
                    _ => bail!("'{group}' must be an object"),
                };
            }
        }
        for (member, value) in [
            ("startTimeout", duration(self.start_timeout)),
            ("drainTimeout", duration(self.drain_timeout)),
            ("trafficWeight", self.traffic_weight.map(|w| w.0.into())),
        ] {
            if let Some(value) = value {
                body.insert(member.into(), value);
            }
        }
        Ok(body)
    }
}

/// The members of a specification that may stand on the deployment itself where there is one only.
const SHORT: [&str; 5] = [
    "gpu",
    "instanceType",
    "minInstances",
    "maxInstances",
    "maxRequestConcurrency",
];

/// The body with those members where the server has them.
fn folded(mut body: Map<String, Value>) -> Map<String, Value> {
    let mut short = Map::new();
    for member in SHORT {
        if let Some(value) = body.remove(member) {
            short.insert(member.into(), value);
        }
    }
    if short.is_empty() {
        return body;
    }
    let specifications = body
        .entry("deploymentSpecifications")
        .or_insert_with(|| json!([{}]));
    for specification in specifications.as_array_mut().into_iter().flatten() {
        if let Value::Object(specification) = specification {
            for (member, value) in &short {
                specification
                    .entry(member.as_str())
                    .or_insert_with(|| value.clone());
            }
        }
    }
    body
}

/// The body with every required member: no GPU, none to one instance, one request at a time.
pub(super) fn with_defaults(body: Map<String, Value>) -> Map<String, Value> {
    let mut body = folded(body);
    let specifications = body
        .entry("deploymentSpecifications")
        .or_insert_with(|| json!([{}]));
    for specification in specifications.as_array_mut().into_iter().flatten() {
        let Value::Object(specification) = specification else {
            continue;
        };
        let mut default =
            |member: &str, value: Value| specification.entry(member).or_insert(value).clone();
        default("gpu", "none".into());
        default("instanceType", "none".into());
        let min = default("minInstances", 0.into());
        default("maxInstances", min.as_u64().unwrap_or(0).max(1).into());
        default("maxRequestConcurrency", 1.into());
    }
    body
}

/// A deployment as answered, less what the server made.
pub(super) fn changeable(deployment: &Value) -> Map<String, Value> {
    let mut body = deployment.as_object().cloned().unwrap_or_default();
    for made in [
        "functionId",
        "functionVersionId",
        "deploymentId",
        "functionName",
        "ncaId",
        "functionStatus",
        "healthInfo",
        "createdAt",
        "lastUpdatedAt",
    ] {
        body.remove(made);
    }
    body
}

const COLUMNS: &[Column] = &[
    table::name("function"),
    table::id("version"),
    table::state("status"),
    table::plain("gpu"),
    table::plain("instance type"),
    table::number("min"),
    table::number("max"),
    table::number("concurrency"),
];

fn rows(deployment: &Value) -> Vec<Vec<String>> {
    list(deployment, "deploymentSpecifications")
        .iter()
        .map(|spec| {
            vec![
                text(deployment, "functionName"),
                text(deployment, "functionVersionId"),
                text(deployment, "functionStatus"),
                text(spec, "gpu"),
                text(spec, "instanceType"),
                text(spec, "minInstances"),
                text(spec, "maxInstances"),
                text(spec, "maxRequestConcurrency"),
            ]
        })
        .collect()
}

async fn find(client: &Client, target: &Target, unnamed: Unnamed) -> anyhow::Result<Row> {
    let rows = client.function(&target.function).await?;
    pick_version(&rows, target.version.as_ref(), unnamed).cloned()
}

impl Deploys {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let common = self.common;
        let client = Client::new(&common)?;
        match self.command {
            DeployCommand::Create { target, spec, wait } => {
                let body = spec.create_body()?;
                let row = find(&client, &target, Unnamed::Newest).await?;
                if row.deployed() {
                    bail!(
                        "version {} of {} is deployed already, and {}\n\
                         try: `weir deploy update {}` changes its deployment, `weir deploy delete {}` ends it",
                        row.version_id,
                        row.name,
                        row.status,
                        row.id,
                        row.id
                    );
                }
                let path = deployment_path(row.id, row.version_id);
                let answer = client.post(&path, &body).await?;
                settle(&client, &common, &row, answer, &wait, Failures::new()).await
            }
            DeployCommand::Update { target, spec, wait } => {
                let row = find(&client, &target, Unnamed::Deployed).await?;
                let path = deployment_path(row.id, row.version_id);
                let body = spec.update_body()?;
                // Only to tell old failures from new ones: a key that may not see them does without.
                let there = client.instances(Some(row.version_id)).await;
                let old = failures(&there.unwrap_or_default().1);
                let answer = client.send(Method::PUT, &path, Some(&body)).await?;
                settle(&client, &common, &row, answer, &wait, old).await
            }
            DeployCommand::Get { target } => {
                let row = find(&client, &target, Unnamed::Deployed).await?;
                let answer = client.get(&deployment_path(row.id, row.version_id)).await?;
                common.show_whole(&answer, [&answer["deployment"]])
            }
            DeployCommand::Delete { target, graceful } => {
                let row = find(&client, &target, Unnamed::Deployed).await?;
                let path = deployment_path(row.id, row.version_id);
                let answer = client
                    .delete(&format!("{path}?graceful={graceful}"))
                    .await?;
                let how = if graceful {
                    "takes no new work; it goes when what waits and runs has ended"
                } else {
                    "is no longer deployed"
                };
                common.say(
                    &answer,
                    &format!("version {} of {} {how}", row.version_id, row.name),
                )
            }
        }
    }
}

async fn settle(
    client: &Client,
    common: &Common,
    row: &Row,
    mut answer: Value,
    wait: &Wait,
    old: Failures,
) -> anyhow::Result<()> {
    if let Some(limit) = wait.limit() {
        let awaited = Awaited {
            old,
            ..Awaited::of(client, row)
        };
        awaited.active(limit, &Progress::new()).await?;
        answer = client.get(&deployment_path(row.id, row.version_id)).await?;
    }
    common.show(&answer, COLUMNS, rows(&answer["deployment"]))
}

/// Ends a deployment, what waits and runs first; returns when it is gone, or
/// whether it was in time.
pub(super) async fn undeploy(
    client: &Client,
    function: Uuid,
    version: Uuid,
    limit: Duration,
) -> anyhow::Result<bool> {
    let path = deployment_path(function, version);
    let end = Instant::now() + limit;
    let mut answer = client.delete(&format!("{path}?graceful=true")).await;
    if answer.is_err() && client.get(&path).await.as_ref().is_err_and(is_not_found) {
        // Somebody ended it, or it had ended already.
        return Ok(true);
    }
    let mut pause = Duration::from_millis(50);
    loop {
        match answer {
            Err(e) if is_not_found(&e) => return Ok(true),
            Err(e) => return Err(e),
            Ok(_) if Instant::now() >= end => return Ok(false),
            Ok(_) => {}
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
        answer = client.get(&path).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_new_deployment_has_every_required_member() {
        let body = DeploySpec::default().create_body().unwrap();
        assert_eq!(
            body,
            json!({"deploymentSpecifications": [{
                "gpu": "none", "instanceType": "none",
                "minInstances": 0, "maxInstances": 1, "maxRequestConcurrency": 1,
            }]})
        );
    }

    #[test]
    fn flags_become_members() {
        let spec = DeploySpec {
            min: Some(2),
            concurrency: Some(4),
            gpu: Some("H100".into()),
            instance_type: Some("NCP.GPU.H100_1x".into()),
            idle_timeout: Some(IsoDuration::secs(90)),
            target_utilization: Some(0.5),
            busy_timeout: Some(IsoDuration::secs(5)),
            traffic_weight: Some(Weight(Some(10))),
            ..DeploySpec::default()
        };
        assert_eq!(
            spec.create_body().unwrap(),
            json!({
                "deploymentSpecifications": [{
                    "gpu": "H100", "instanceType": "NCP.GPU.H100_1x",
                    "minInstances": 2, "maxInstances": 2, "maxRequestConcurrency": 4,
                }],
                "autoscaling": {"idleTimeout": "PT1M30S", "targetUtilization": 0.5},
                "queue": {"busyTimeout": "PT5S"},
                "trafficWeight": 10,
            })
        );
    }

    #[test]
    fn an_update_names_what_changes_and_nothing_else() {
        let spec = DeploySpec {
            max: Some(3),
            queue_max: Some(8),
            traffic_weight: Some("none".parse().unwrap()),
            ..DeploySpec::default()
        };
        assert_eq!(
            spec.update_body().unwrap(),
            json!({
                "deploymentSpecifications": [{"maxInstances": 3}],
                "queue": {"maxRequests": 8},
                "trafficWeight": null,
            })
        );
        assert_eq!(DeploySpec::default().update_body().unwrap(), json!({}));
        assert!("-1".parse::<Weight>().is_err() && "all".parse::<Weight>().is_err());
    }

    #[test]
    fn several_specifications_are_not_for_flags() {
        let body = object(json!({"deploymentSpecifications": [{}, {}]}));
        let spec = DeploySpec {
            min: Some(1),
            ..DeploySpec::default()
        };
        assert!(spec.over(body.clone()).is_err());
        assert!(DeploySpec::default().over(body).is_ok());
    }

    #[test]
    fn one_specification_may_be_written_short() {
        let body = with_defaults(object(json!({
            "minInstances": 3, "gpu": "L4", "drainTimeout": "PT1S",
        })));
        assert_eq!(
            Value::from(body),
            json!({
                "drainTimeout": "PT1S",
                "deploymentSpecifications": [{
                    "gpu": "L4", "instanceType": "none",
                    "minInstances": 3, "maxInstances": 3, "maxRequestConcurrency": 1,
                }],
            })
        );
    }
}
