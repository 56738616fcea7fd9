//! What the server tells of its versions, put together.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;
use weir_control::model::{Instance, InstanceState};

use super::super::{
    api::{Client, Row},
    list,
};

/// Everything that is shown, as it was at one moment.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) versions: Vec<VersionSeen>,
    pub(super) instances: Vec<Instance>,
    /// The same, as the server told of them.
    told: Vec<Value>,
}

pub(super) struct VersionSeen {
    pub(super) row: Row,
    pub(super) counts: BTreeMap<&'static str, usize>,
    /// Absent where it is not deployed, or the server does not tell.
    pub(super) load: Option<Load>,
    /// Oldest first.
    pub(super) decisions: Vec<Decision>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Load {
    pub(super) busy: u64,
    pub(super) free: u64,
    pub(super) queued: u64,
}

/// One of the autoscaler's, as far as it is shown.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Decision {
    pub(super) at: Timestamp,
    pub(super) desired: u32,
    pub(super) reason: String,
    #[serde(default)]
    stable_average: f64,
    #[serde(default)]
    panic_average: f64,
    #[serde(default)]
    target: f64,
    #[serde(default)]
    queued: u32,
}

impl Decision {
    /// Why, as a clause.
    pub(super) fn why(&self) -> String {
        let Self {
            stable_average,
            panic_average,
            target,
            queued,
            ..
        } = self;
        match self.reason.as_str() {
            "wake" => format!("{queued} waited and no instance was ready"),
            "stable" => format!("load {stable_average:.1} on average, {target:.1} an instance"),
            "panic" => format!("load {panic_average:.1} of late, {target:.1} an instance"),
            "step-up" => "load above NVCF's upper threshold".into(),
            "step-down" => "load below NVCF's lower threshold".into(),
            "steady" => "load between NVCF's thresholds".into(),
            "scale-in-delay" => "more was wanted within scaleInDelay".into(),
            "hold" => "no load, but not yet for idleTimeout".into(),
            "idle" => "no invocation for idleTimeout".into(),
            "min" => "minInstances".into(),
            "max" => "maxInstances, though more were wanted".into(),
            _ => String::new(),
        }
    }
}

/// Decisions asked for at a time.
const AT_A_TIME: usize = 8;

/// Asks for everything, or for one function's part of it.
pub(super) async fn look(client: &Client, function: Option<Uuid>) -> anyhow::Result<Seen> {
    let (rows, instances, loads) = tokio::try_join!(
        async {
            match function {
                Some(id) => client.function(&id.to_string()).await,
                None => client.rows().await,
            }
        },
        client.instances(None),
        async {
            // Without it the rest is worth showing all the same.
            let page = client.bytes(Method::GET, "/metrics", None).await;
            Ok(loads(&String::from_utf8_lossy(&page.unwrap_or_default())))
        },
    )?;
    let deployed = rows.iter().filter(|row| row.deployed());
    let decisions: HashMap<Uuid, Vec<Decision>> = stream::iter(deployed.map(|row| row.version_id))
        .map(|version| async move {
            let path = format!("/v2/weir/decisions?version={version}");
            let answer = client.get(&path).await.unwrap_or_default();
            let all = list(&answer, "decisions").iter();
            (
                version,
                all.filter_map(|d| Decision::deserialize(d).ok()).collect(),
            )
        })
        .buffer_unordered(AT_A_TIME)
        .collect()
        .await;
    Ok(Seen::of(rows, instances, &loads, decisions))
}

impl Seen {
    pub(super) fn of(
        rows: Vec<Row>,
        (told, instances): (Value, Vec<Instance>),
        loads: &HashMap<Uuid, Load>,
        mut decisions: HashMap<Uuid, Vec<Decision>>,
    ) -> Self {
        let mut versions: Vec<VersionSeen> = rows
            .into_iter()
            .map(|row| {
                let mut counts = BTreeMap::new();
                let own = instances
                    .iter()
                    .filter(|i| i.function_version_id.0 == row.version_id);
                for instance in own {
                    *counts.entry(instance.state.as_str()).or_default() += 1;
                }
                VersionSeen {
                    load: loads.get(&row.version_id).copied(),
                    decisions: decisions.remove(&row.version_id).unwrap_or_default(),
                    counts,
                    row,
                }
            })
            .collect();
        // By name, so that a row stays where it is; a function's versions together, oldest first.
        versions.sort_by(|a, b| (&a.row.name, a.row.id).cmp(&(&b.row.name, b.row.id)));
        let shown: BTreeSet<Uuid> = versions.iter().map(|v| v.row.version_id).collect();
        let of_these = |i: &Instance| shown.contains(&i.function_version_id.0);
        let told = told.as_array().into_iter().flatten().zip(&instances);
        Self {
            told: told
                .filter(|(_, i)| of_these(i))
                .map(|(told, _)| told.clone())
                .collect(),
            instances: instances.into_iter().filter(of_these).collect(),
            versions,
        }
    }

    pub(super) fn json(&self) -> Value {
        let versions: Vec<Value> = self
            .versions
            .iter()
            .map(|version| {
                let VersionSeen { row, load, .. } = version;
                json!({
                    "functionId": row.id, "functionVersionId": row.version_id,
                    "name": row.name, "status": row.status,
                    "instances": version.counts,
                    "busySlots": load.map(|l| l.busy),
                    "slots": load.map(|l| l.busy + l.free),
                    "queueDepth": load.map(|l| l.queued),
                    "lastDecision": version.decisions.last().map(|d| json!({
                        "at": d.at, "desired": d.desired, "reason": d.reason, "why": d.why(),
                    })),
                })
            })
            .collect();
        json!({"versions": versions, "instances": self.told})
    }

    /// The instances that failed or failed to start, those in error first; with their function's name.
    pub(super) fn failing(&self) -> Vec<(&str, &Instance)> {
        let mut failing: Vec<(&str, &Instance)> = self
            .versions
            .iter()
            .flat_map(|version| {
                let own = self.instances.iter().filter(|i| {
                    i.function_version_id.0 == version.row.version_id && i.error.is_some()
                });
                own.map(|i| (version.row.name.as_str(), i))
            })
            .collect();
        failing.sort_by_key(|(_, i)| i.state != InstanceState::Error);
        failing
    }
}

/// Slots and queues of all versions, from the page that Prometheus reads: one answer, however many there are.
pub(super) fn loads(page: &str) -> HashMap<Uuid, Load> {
    let mut loads: HashMap<Uuid, Load> = HashMap::new();
    for line in page.lines() {
        let Some((metric, rest)) = line.split_once('{') else {
            continue;
        };
        let Some((labels, value)) = rest.split_once("} ") else {
            continue;
        };
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            Some(rest.split_once('"')?.0)
        };
        let state = label("state");
        let put: fn(&mut Load, u64) = match (metric, state) {
            ("weir_slots", Some("busy")) => |load, n| load.busy = n,
            ("weir_slots", Some("free")) => |load, n| load.free = n,
            ("weir_queue_depth", _) => |load, n| load.queued = n,
            _ => continue,
        };
        let version = label("version").and_then(|id| id.parse().ok());
        if let (Some(version), Ok(value)) = (version, value.trim().parse::<f64>()) {
            // Gauges of things that are counted.
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a count is small and not negative"
            )]
            put(loads.entry(version).or_default(), value as u64);
        }
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_read_from_the_page_of_metrics() {
        let id = Uuid::from_u128(7);
        let page = format!(
            "# TYPE weir_slots gauge\n\
             weir_slots{{function=\"{0}\",version=\"{id}\",state=\"busy\"}} 3\n\
             weir_slots{{function=\"{0}\",version=\"{id}\",state=\"free\"}} 1\n\
             weir_queue_depth{{function=\"{0}\",version=\"{id}\"}} 5\n\
             weir_queue_limit{{function=\"{0}\",version=\"{id}\"}} 1000\n\
             weir_connections 2\n",
            Uuid::from_u128(1)
        );
        let expected = Load {
            busy: 3,
            free: 1,
            queued: 5,
        };
        assert_eq!(loads(&page), HashMap::from([(id, expected)]));
    }

    #[test]
    fn every_reason_says_why() {
        use weir_control::scale::Reason::*;
        for reason in [
            Wake,
            Stable,
            Panic,
            StepUp,
            StepDown,
            Steady,
            ScaleInDelay,
            Hold,
            Idle,
            Min,
            Max,
        ] {
            let decision = json!({"at": "2026-01-01T00:00:00Z", "desired": 1, "reason": reason});
            let decision: Decision = serde_json::from_value(decision).unwrap();
            assert_ne!(decision.why(), "", "{reason}");
        }
    }
}
