//! `weir status`: what is so now.

use std::collections::{BTreeSet, HashMap};

use anyhow::Context;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::json;
use uuid::Uuid;
use weir_control::model::{Instance, InstanceState};

use super::{
    Common, Output,
    api::{Client, Row, is_not_found},
    list, print,
    screen::Screen,
    table::{Column, id, name, number, plain, state, table},
    text,
};

#[derive(Debug, clap::Args)]
pub struct Status {
    #[command(flatten)]
    common: Common,
    /// Show every instance too
    #[arg(long)]
    instances: bool,
}

const VERSIONS: &[Column] = &[
    name("name"),
    id("function"),
    id("version"),
    state("status"),
    number("ready"),
    number("starting"),
    number("draining"),
    number("error"),
    number("queue"),
];
const INSTANCES: &[Column] = &[
    id("instance"),
    id("version"),
    state("state"),
    plain("node"),
    plain("address"),
    number("pid"),
    number("restarts"),
    plain("error"),
];

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
            VERSIONS,
            rows.iter()
                .map(|row| cells(row, &instances, &depths))
                .collect(),
            Screen::stdout(),
        ))?;
        if self.instances {
            print("")?;
            print(&table(
                INSTANCES,
                instances.iter().map(instance_cells).collect(),
                Screen::stdout(),
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
