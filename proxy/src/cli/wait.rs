//! Waiting for a version to be ACTIVE, and telling meanwhile what is waited for:
//! lines that change on a terminal, elsewhere one line for each change.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::bail;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use jiff::Timestamp;
use reqwest::Method;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use weir_control::model::{Instance, InstanceState, IsoDuration};

use super::{
    ago,
    api::{Client, Row, deployment_path, version_path},
    list, note,
    screen::{Screen, style_of},
    table::one_line,
    text,
};

#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    /// Return at once instead of when the version is ACTIVE
    #[arg(long)]
    no_wait: bool,
    /// Longest wait for that, an ISO 8601 duration
    #[arg(
        long,
        alias = "wait-timeout",
        value_name = "DURATION",
        default_value = "PT10M"
    )]
    timeout: IsoDuration,
}

impl Wait {
    /// How long to wait; none: not at all.
    pub(super) fn limit(&self) -> Option<Duration> {
        (!self.no_wait).then_some(self.timeout.0)
    }

    #[cfg(test)]
    pub(super) fn at_most(limit: Duration) -> Self {
        Self {
            no_wait: false,
            timeout: IsoDuration(limit),
        }
    }
}

/// Lines of its log that are shown when an instance has failed.
const LAST_LINES: usize = 10;
/// A failure from before a change counts after so long: it may be gone with it.
const OLD_FAILURE: Duration = Duration::from_secs(15);

/// Where it is told, one for a command.
pub(super) struct Progress {
    bars: MultiProgress,
    screen: Screen,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            bars: MultiProgress::new(),
            screen: Screen::stderr(),
        }
    }

    /// Prints what stays, out of the way of the lines that change.
    pub(super) fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bars.suspend(print)
    }

    fn live(&self) -> bool {
        !self.bars.is_hidden()
    }
}

/// The failed instances of before a change, which say nothing about what comes after it.
pub(super) type Failures = BTreeSet<(Uuid, u32)>;

pub(super) fn failures(instances: &[Instance]) -> Failures {
    instances
        .iter()
        .filter(|i| i.state == InstanceState::Error)
        .map(|i| (i.id.0, i.restarts))
        .collect()
}

/// What an instance that finds no free GPU is, to whom waits for its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoGpu {
    /// A failure as any other.
    Fails,
    /// [`Short`], at once: the caller knows who has the GPU.
    Told,
    /// Nothing: one is about to be free, and the instance takes it.
    Awaited,
}

/// The version's instances find no free GPU.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Short(String);

/// The version is in ERROR.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Failed(String);

/// The agent's words for it.
fn finds_no_gpu(instance: &Instance) -> bool {
    let error = instance.error.as_deref().unwrap_or_default();
    instance.state == InstanceState::Error && error.starts_with("no free GPU")
}

/// A version that is waited for.
pub(super) struct Awaited<'a> {
    pub(super) client: &'a Client,
    pub(super) name: &'a str,
    pub(super) function: Uuid,
    pub(super) version: Uuid,
    pub(super) old: Failures,
    pub(super) no_gpu: NoGpu,
}

impl<'a> Awaited<'a> {
    pub(super) fn of(client: &'a Client, row: &'a Row) -> Self {
        Self {
            client,
            name: &row.name,
            function: row.id,
            version: row.version_id,
            old: Failures::new(),
            no_gpu: NoGpu::Fails,
        }
    }

    /// Returns when the version is ACTIVE; says why where it does not become so.
    pub(super) async fn active(&self, limit: Duration, progress: &Progress) -> anyhow::Result<()> {
        let since = Instant::now();
        let mut pause = Duration::from_millis(50);
        let mut deployed = false;
        let mut view = View::new(progress, self.name);
        loop {
            let answer = self
                .client
                .get(&version_path(self.function, self.version))
                .await?;
            let status = text(&answer["function"], "status");
            let instances = self.instances().await;
            if status == "ACTIVE" {
                view.end(&instances);
                return Ok(());
            }
            if view.wanted.is_none() {
                view.check = check(&answer["function"]["health"]);
                view.wanted = Some(self.wanted().await);
            }
            view.show(&status, &instances);
            if status == "INACTIVE" && deployed {
                bail!(
                    "version {} of {} is no longer deployed: somebody ended its deployment meanwhile",
                    self.version,
                    self.name
                );
            }
            deployed |= status != "INACTIVE";
            let short = instances.iter().find(|i| finds_no_gpu(i));
            if let (NoGpu::Told, Some(short)) = (self.no_gpu, short) {
                let why = short.error.clone().unwrap_or_default();
                return Err(Short(why).into());
            }
            let awaits = self.no_gpu == NoGpu::Awaited;
            let news = instances
                .iter()
                .filter(|i| i.state == InstanceState::Error && !(awaits && finds_no_gpu(i)))
                .any(|i| !self.old.contains(&(i.id.0, i.restarts)));
            let stale = !awaits && since.elapsed() > OLD_FAILURE;
            if status == "ERROR" && (news || stale) {
                return Err(Failed(self.failed(&instances).await).into());
            }
            if since.elapsed() >= limit {
                let told: Vec<String> = instances
                    .iter()
                    .map(|i| format!("\n  {}", view.line(i, Some(Timestamp::now()))))
                    .collect();
                bail!(
                    "version {} of {} is {status} after {}, and not yet ACTIVE: {}{}\n\
                     try: it goes on by itself; `weir status {}` shows how, --timeout waits longer",
                    self.version,
                    self.name,
                    IsoDuration(limit),
                    view.ready(&instances),
                    told.concat(),
                    self.function
                );
            }
            sleep(pause.min(limit.saturating_sub(since.elapsed()))).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Empty where the key may not see them: the state is then all there is to tell.
    async fn instances(&self) -> Vec<Instance> {
        let answer = self.client.instances(Some(self.version)).await;
        let (_, mut instances) = answer.unwrap_or_default();
        instances.retain(|i| i.state != InstanceState::Draining);
        instances
    }

    async fn wanted(&self) -> u64 {
        let path = deployment_path(self.function, self.version);
        let answer = self.client.get(&path).await.unwrap_or_default();
        list(&answer["deployment"], "deploymentSpecifications")
            .iter()
            .filter_map(|spec| spec["minInstances"].as_u64())
            .sum()
    }

    /// Why, and the last words of one that failed.
    async fn failed(&self, instances: &[Instance]) -> String {
        let mut said = format!("version {} of {} is in ERROR", self.version, self.name);
        let failed: Vec<&Instance> = instances
            .iter()
            .filter(|i| i.state == InstanceState::Error)
            .collect();
        let mut reasons: Vec<&str> = failed.iter().filter_map(|i| i.error.as_deref()).collect();
        reasons.sort_unstable();
        reasons.dedup();
        if !reasons.is_empty() {
            said = format!("{said}: {}", reasons.join("; "));
        }
        let Some(one) = failed.first() else {
            return format!(
                "{said}\ntry: `weir status {}` shows its instances",
                self.function
            );
        };
        let path = format!("/v2/weir/instances/{}/logs?tail={LAST_LINES}", one.id);
        let log = self.client.bytes(Method::GET, &path, None).await;
        let log = log.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let log = log.unwrap_or_default();
        if log.trim().is_empty() {
            return format!(
                "{said}\ntry: `weir status {}` shows its instances",
                self.function
            );
        }
        let lines: Vec<String> = log
            .lines()
            .map(|line| format!("\n  | {}", one_line(line)))
            .collect();
        format!(
            "{said}\nthe last lines of instance {}:{}\ntry: `weir logs {}` shows more of them",
            one.id,
            lines.concat(),
            one.id
        )
    }
}

/// What is known of a version that comes up, as it was last told.
struct View<'a> {
    progress: &'a Progress,
    name: &'a str,
    /// Of all specifications together; none: not asked yet.
    wanted: Option<u64>,
    check: String,
    head: Option<ProgressBar>,
    bars: BTreeMap<Uuid, ProgressBar>,
    told: BTreeMap<Uuid, String>,
    told_status: String,
}

impl<'a> View<'a> {
    fn new(progress: &'a Progress, name: &'a str) -> Self {
        Self {
            progress,
            name,
            wanted: None,
            check: String::new(),
            head: None,
            bars: BTreeMap::new(),
            told: BTreeMap::new(),
            told_status: String::new(),
        }
    }

    fn show(&mut self, status: &str, instances: &[Instance]) {
        if self.progress.live() {
            self.redraw(status, instances);
            return;
        }
        for line in self.news(status, instances) {
            note(&line);
        }
    }

    /// A line for each thing that is not as it was told.
    fn news(&mut self, status: &str, instances: &[Instance]) -> Vec<String> {
        let mut news = Vec::new();
        for instance in instances {
            let line = self.line(instance, None);
            if self.told.get(&instance.id.0) != Some(&line) {
                news.push(format!("{}: {line}", self.name));
                self.told.insert(instance.id.0, line);
            }
        }
        self.told.retain(|id, _| {
            let there = instances.iter().any(|i| i.id.0 == *id);
            if !there {
                news.push(format!("{}: instance {} is gone", self.name, short(*id)));
            }
            there
        });
        if status != self.told_status {
            self.told_status = status.to_owned();
            let line = format!("{}: {status}, {}", self.name, self.ready(instances));
            // A beginning before what comes of it, an end after what led to it.
            let at = match status {
                "ACTIVE" | "ERROR" => news.len(),
                _ => 0,
            };
            news.insert(at, line);
        }
        news
    }

    fn redraw(&mut self, status: &str, instances: &[Instance]) {
        let line = format!(
            "{}: {}, {}",
            self.name,
            self.progress.screen.paint(style_of(status), status),
            self.ready(instances)
        );
        self.head
            .get_or_insert_with(|| {
                let bar = self.progress.bars.add(ProgressBar::new_spinner());
                bar.set_style(style("{spinner} {wide_msg} {elapsed}"));
                bar.enable_steady_tick(Duration::from_millis(100));
                bar
            })
            .set_message(line);
        let now = Timestamp::now();
        for instance in instances {
            let line = self.line(instance, Some(now));
            let state = instance.state.as_str();
            let painted = self.progress.screen.paint(style_of(state), state);
            let line = line.replacen(state, &painted, 1);
            let last = self.bars.values().next_back().or(self.head.as_ref());
            if let Some(bar) = self.bars.get(&instance.id.0) {
                bar.set_message(line);
            } else if let Some(last) = last {
                let bar = self
                    .progress
                    .bars
                    .insert_after(last, ProgressBar::new_spinner());
                bar.set_style(style("    {wide_msg}"));
                bar.set_message(line);
                self.bars.insert(instance.id.0, bar);
            }
        }
        self.bars.retain(|id, bar| {
            let there = instances.iter().any(|i| i.id.0 == *id);
            if !there {
                bar.finish_and_clear();
            }
            there
        });
    }

    fn end(&mut self, instances: &[Instance]) {
        self.clear();
        let asked = self.wanted.is_some();
        if asked && !self.progress.live() {
            for line in self.news("ACTIVE", instances) {
                note(&line);
            }
        } else if asked {
            let active = self.progress.screen.paint(style_of("ACTIVE"), "ACTIVE");
            let line = format!("{}: {active}, {}", self.name, self.ready(instances));
            self.progress.aside(|| note(&line));
        }
    }

    fn clear(&mut self) {
        for bar in self.bars.values().chain(&self.head) {
            bar.finish_and_clear();
        }
    }

    fn ready(&self, instances: &[Instance]) -> String {
        let ready = instances.iter().filter(|i| i.state == InstanceState::Ready);
        let (ready, wanted) = (ready.count() as u64, self.wanted.unwrap_or(0));
        match wanted.max(ready) {
            1 => format!("{ready} of 1 instance ready"),
            all => format!("{ready} of {all} instances ready"),
        }
    }

    /// One instance's; with how long it takes where that is asked for.
    fn line(&self, instance: &Instance, now: Option<Timestamp>) -> String {
        let id = short(instance.id.0);
        let error = instance.error.as_deref().map(one_line);
        let doing = match (instance.state, instance.spawned_at) {
            (InstanceState::Ready, spawned) => {
                let took = spawned.zip(instance.first_healthy_at);
                return match took {
                    Some((from, to)) => {
                        let took = to.duration_since(from).as_millis();
                        format!(
                            "instance {id} ready after {}.{} s",
                            took / 1000,
                            took % 1000 / 100
                        )
                    }
                    None => format!("instance {id} ready"),
                };
            }
            (InstanceState::Draining, _) => return format!("instance {id} draining"),
            (InstanceState::Error, _) => {
                let why = error.unwrap_or_else(|| "it does not say why".into());
                let tries = match instance.restarts {
                    0 => String::new(),
                    1 => " after 1 failed start".into(),
                    n => format!(" after {n} failed starts"),
                };
                return format!("instance {id} error{tries}: {why}");
            }
            (InstanceState::Starting, _) if instance.pid.is_none() && instance.restarts > 0 => {
                "starting again soon".to_owned()
            }
            (InstanceState::Starting, since) => {
                let since = since.unwrap_or(instance.created_at);
                let so_long = match now {
                    Some(now) => format!(" for {}", ago(now, since)),
                    None => String::new(),
                };
                let on = match instance.address {
                    Some(address) => format!(" on {address}"),
                    None => String::new(),
                };
                format!("starting{so_long}, waits for {}{on}", self.check)
            }
        };
        match (instance.restarts, error) {
            (0, None) => format!("instance {id} {doing}"),
            (0, Some(error)) => format!("instance {id} {doing}; last error: {error}"),
            (n, error) => format!(
                "instance {id} {doing}; restarts: {n}, last error: {}",
                error.unwrap_or_else(|| "none told".into())
            ),
        }
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn check(health: &Value) -> String {
    let uri = health["uri"].as_str().unwrap_or("/");
    let expected = health["expectedStatusCode"].as_u64().unwrap_or(200);
    format!("GET {uri} to answer {expected}")
}

/// The beginning of an identifier, long enough for people.
fn short(id: Uuid) -> String {
    id.to_string().chars().take(8).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn instance(number: u128, more: Value) -> Instance {
        let mut all = json!({
            "id": Uuid::from_u128(number << 96), "functionId": Uuid::from_u128(1),
            "functionVersionId": Uuid::from_u128(2), "deploymentId": Uuid::nil(),
            "gpuSpecificationId": Uuid::nil(), "node": "n", "state": "starting",
            "capacity": 1, "createdAt": "2026-01-01T00:00:00Z", "restarts": 0,
        });
        all.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn each_change_is_told_once() {
        let progress = Progress {
            bars: MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden()),
            screen: Screen::PLAIN,
        };
        let mut view = View::new(&progress, "hello");
        view.wanted = Some(2);
        view.check = check(&json!({"uri": "/health", "expectedStatusCode": 200}));
        let spawned =
            json!({"pid": 7, "address": "127.0.0.1:20000", "spawnedAt": "2026-01-01T00:00:01Z"});
        let starting = instance(1, spawned.clone());
        let late = view.line(&starting, Some("2026-01-01T00:01:06Z".parse().unwrap()));
        assert_eq!(
            late,
            "instance 00000001 starting for 1m05s, waits for GET /health to answer 200 on 127.0.0.1:20000"
        );
        let all = [
            starting,
            instance(2, json!({"restarts": 1, "error": "exited with 1"})),
        ];
        assert_eq!(
            view.news("DEPLOYING", &all),
            [
                "hello: DEPLOYING, 0 of 2 instances ready",
                "hello: instance 00000001 starting, waits for GET /health to answer 200 on 127.0.0.1:20000",
                "hello: instance 00000002 starting again soon; restarts: 1, last error: exited with 1",
            ]
        );
        assert!(view.news("DEPLOYING", &all).is_empty());
        let mut ready = spawned;
        ready["state"] = json!("ready");
        ready["firstHealthyAt"] = json!("2026-01-01T00:00:03.25Z");
        let all = [
            instance(1, ready),
            instance(
                2,
                json!({"state": "error", "restarts": 3, "error": "exited\nwith 1"}),
            ),
        ];
        assert_eq!(
            view.news("DEPLOYING", &all),
            [
                "hello: instance 00000001 ready after 2.2 s",
                "hello: instance 00000002 error after 3 failed starts: exited with 1",
            ]
        );
        assert_eq!(
            view.news("ACTIVE", &all[..1]),
            [
                "hello: instance 00000002 is gone",
                "hello: ACTIVE, 1 of 2 instances ready",
            ]
        );
    }

    #[test]
    fn a_failure_of_before_is_told_from_a_new_one() {
        let failed = |restarts| instance(1, json!({"state": "error", "restarts": restarts}));
        let old = failures(&[failed(3), instance(2, json!({}))]);
        assert_eq!(old.len(), 1);
        assert!(failures(&[failed(3)]).is_subset(&old));
        assert!(!failures(&[failed(4)]).is_subset(&old));
    }
}
