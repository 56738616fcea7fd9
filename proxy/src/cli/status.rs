//! `weir status`, `weir logs` and `weir gpu`: what is so now.

use std::collections::{BTreeSet, HashMap};

use anyhow::Context;
use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;
use weir_control::model::{Instance, InstanceState};

use super::{
    Common, Output,
    api::{Client, Row, is_not_found},
    list, print, table, text,
};

#[derive(Debug, clap::Args)]
pub struct Status {
    #[command(flatten)]
    common: Common,
    /// Show every instance too
    #[arg(long)]
    instances: bool,
}

#[derive(Debug, clap::Args)]
pub struct Logs {
    #[command(flatten)]
    common: Common,
    /// The instance's ID; `weir status --instances` shows them
    instance: Uuid,
    /// The last lines only
    #[arg(long, value_name = "N")]
    tail: Option<usize>,
}

#[derive(Debug, clap::Args)]
pub struct Gpu {
    #[command(flatten)]
    common: Common,
}

/// Queues asked about at a time.
const AT_A_TIME: usize = 8;

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let client = Client::new(&self.common)?;
        let rows = client.rows().await?;
        let answer = client.get("/v2/weir/instances").await?;
        let instances: Vec<Instance> = serde_json::from_value(answer["instances"].clone())
            .context("the server's list of instances is not one that this weir reads")?;
        let deployed: BTreeSet<Uuid> = rows
            .iter()
            .filter(|row| row.deployed())
            .map(|row| row.id)
            .collect();
        let depths: Vec<HashMap<Uuid, u64>> = stream::iter(deployed)
            .map(|function| depths(&client, function))
            .buffer_unordered(AT_A_TIME)
            .try_collect()
            .await?;
        let depths: HashMap<Uuid, u64> = depths.into_iter().flatten().collect();

        if self.common.output == Output::Json {
            return print(&serde_json::to_string_pretty(&json!({
                "versions": rows.iter().map(|row| json!({
                    "functionId": row.id, "functionVersionId": row.version_id,
                    "name": row.name, "status": row.status,
                    "queueDepth": depths.get(&row.version_id),
                })).collect::<Vec<_>>(),
                "instances": answer["instances"],
            }))?);
        }
        print(&table(
            &[
                "name", "function", "version", "status", "ready", "starting", "draining", "error",
                "queue",
            ],
            rows.iter()
                .map(|row| cells(row, &instances, &depths))
                .collect(),
        ))?;
        if self.instances {
            print("")?;
            print(&table(
                &[
                    "instance", "version", "state", "node", "address", "pid", "restarts", "error",
                ],
                instances.iter().map(instance_cells).collect(),
            ))?;
        }
        Ok(())
    }
}

async fn depths(client: &Client, function: Uuid) -> anyhow::Result<HashMap<Uuid, u64>> {
    let path = format!("/v2/nvcf/queues/functions/{function}");
    match client.get(&path).await {
        Ok(answer) => Ok(list(&answer, "queues")
            .iter()
            .filter_map(|queue| {
                let version = queue["functionVersionId"].as_str()?.parse().ok()?;
                Some((version, queue["queueDepth"].as_u64()?))
            })
            .collect()),
        // NVCF answers so where no version has a queue.
        Err(e) if is_not_found(&e) => Ok(HashMap::new()),
        Err(e) => Err(e),
    }
}

fn cells(row: &Row, instances: &[Instance], depths: &HashMap<Uuid, u64>) -> Vec<String> {
    let count = |state: InstanceState| {
        instances
            .iter()
            .filter(|i| i.function_version_id.0 == row.version_id && i.state == state)
            .count()
            .to_string()
    };
    vec![
        row.name.clone(),
        row.id.to_string(),
        row.version_id.to_string(),
        row.status.clone(),
        count(InstanceState::Ready),
        count(InstanceState::Starting),
        count(InstanceState::Draining),
        count(InstanceState::Error),
        depths
            .get(&row.version_id)
            .map_or_else(|| "-".into(), u64::to_string),
    ]
}

fn instance_cells(instance: &Instance) -> Vec<String> {
    let shown = serde_json::to_value(instance).unwrap_or_default();
    let mut cells: Vec<String> = [
        "id",
        "functionVersionId",
        "state",
        "node",
        "address",
        "pid",
        "restarts",
    ]
    .iter()
    .map(|member| text(&shown, member))
    .collect();
    let error = instance.error.as_deref().unwrap_or_default();
    cells.push(error.lines().next().unwrap_or_default().to_owned());
    cells
}

impl Logs {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let client = Client::new(&self.common)?;
        let mut path = format!("/v2/weir/instances/{}/logs", self.instance);
        if let Some(tail) = self.tail {
            path += &format!("?tail={tail}");
        }
        let bytes = client.bytes(Method::GET, &path, None).await?;
        super::write_out(last_lines(&bytes, self.tail))
    }
}

/// The last lines, whole ones; all of them where no number is given.
fn last_lines(bytes: &[u8], count: Option<usize>) -> &[u8] {
    let Some(count) = count else { return bytes };
    let end = bytes.len() - usize::from(bytes.ends_with(b"\n"));
    let mut ends = bytes[..end]
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .map(|(at, _)| at + 1);
    match count {
        0 => &[],
        _ => &bytes[ends.nth(count - 1).unwrap_or(0)..],
    }
}

impl Gpu {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let client = Client::new(&self.common)?;
        let answer = client.get("/v2/weir/nodes").await?;
        let rows = list(&answer, "nodes").iter().flat_map(node_rows).collect();
        self.common.show(
            &answer,
            &["node", "gpu", "name", "memory", "driver", "instance"],
            rows,
        )
    }
}

/// A row for each GPU of a node; one that says there is none for the others.
fn node_rows(node: &Value) -> Vec<Vec<String>> {
    let first = |value: &Value, members: &[&str]| {
        members
            .iter()
            .map(|member| text(value, member))
            .find(|text| !text.is_empty())
            .unwrap_or_default()
    };
    let name = first(node, &["name", "node", "id"]);
    let driver = first(node, &["driverVersion", "driver"]);
    let gpus = list(node, "gpus");
    if gpus.is_empty() {
        let why = first(node, &["gpuError", "detail"]);
        let why = if why.is_empty() { "none".into() } else { why };
        return vec![vec![name, "-".into(), why, "".into(), driver, "".into()]];
    }
    gpus.iter()
        .enumerate()
        .map(|(index, gpu)| {
            let number = first(gpu, &["index", "id"]);
            vec![
                name.clone(),
                if number.is_empty() {
                    index.to_string()
                } else {
                    number
                },
                match gpu {
                    Value::String(name) => name.clone(),
                    gpu => first(gpu, &["name", "gpu"]),
                },
                first(gpu, &["memoryBytes", "memory", "memoryTotal"]),
                driver.clone(),
                first(gpu, &["instanceId", "instance", "usedBy"]),
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_whole() {
        let cases: [(&[u8], Option<usize>, &[u8]); 7] = [
            (b"a\nb\nc\n", None, b"a\nb\nc\n"),
            (b"a\nb\nc\n", Some(2), b"b\nc\n"),
            (b"a\nb\nc", Some(1), b"c"),
            (b"a\nb\nc\n", Some(9), b"a\nb\nc\n"),
            (b"a\n", Some(0), b""),
            (b"", Some(3), b""),
            (b"\n\n\n", Some(2), b"\n\n"),
        ];
        for (bytes, count, expected) in cases {
            assert_eq!(last_lines(bytes, count), expected, "{bytes:?} {count:?}");
        }
    }

    #[test]
    fn a_version_counts_its_own_instances() {
        let version = Uuid::from_u128(2);
        let instance = |version: Uuid, state: &str| -> Instance {
            serde_json::from_value(json!({
                "id": Uuid::from_u128(9), "functionId": Uuid::from_u128(1),
                "functionVersionId": version, "deploymentId": Uuid::nil(),
                "gpuSpecificationId": Uuid::nil(), "node": "n", "state": state,
                "capacity": 1, "createdAt": "2026-01-01T00:00:00Z", "restarts": 0,
            }))
            .unwrap()
        };
        let row: Row = serde_json::from_value(json!({
            "id": Uuid::from_u128(1), "versionId": version, "name": "f", "status": "ACTIVE",
        }))
        .unwrap();
        let instances = [
            instance(version, "ready"),
            instance(version, "ready"),
            instance(version, "error"),
            instance(Uuid::from_u128(3), "ready"),
        ];
        let shown = cells(&row, &instances, &HashMap::from([(version, 4)]));
        assert_eq!(shown[3..], ["ACTIVE", "2", "0", "0", "1", "4"]);
        assert_eq!(cells(&row, &[], &HashMap::new())[8], "-");
    }

    #[test]
    fn a_node_without_gpus_is_shown_too() {
        let node = json!({"name": "n", "gpus": [{"index": 0, "name": "H100"}, {"index": 1, "name": "H100"}]});
        assert_eq!(node_rows(&node).len(), 2);
        assert_eq!(node_rows(&node)[1][..3], ["n", "1", "H100"]);
        assert_eq!(node_rows(&json!({"name": "n"}))[0][..3], ["n", "-", "none"]);
    }
}
