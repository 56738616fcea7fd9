//! The vocabulary of the control state: identifiers, the records that people
//! make through the API, and the facts that agents publish about instances.
//!
//! Records are immutable values; a change replaces one whole in the store.

use std::{fmt, net::SocketAddr, str::FromStr, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use utoipa::ToSchema;
use uuid::Uuid;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new random one.
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.parse().map(Self)
            }
        }
    )*};
}

ids! {
    /// A function; it has one or more versions.
    FunctionId;
    /// A version of a function; immutable apart from its metadata.
    VersionId;
    /// A deployment of one version.
    DeploymentId;
    /// One entry of a deployment's `deploymentSpecifications`.
    GpuSpecificationId;
    /// One running copy of a version.
    InstanceId;
    /// An API key (its identifier, not its secret).
    KeyId;
}

/// The tenant (NVCF: NCA id): 1–128 characters of `[A-Za-z0-9._:-]`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct AccountId(pub std::sync::Arc<str>);

impl AccountId {
    /// The account that is there from the start.
    #[must_use]
    pub fn default_account() -> Self {
        Self("default".into())
    }
}
impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A duration written as ISO 8601 (`PT1M30S`), as NVCF writes them. A day has 24 hours; months and years are refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ToSchema)]
#[schema(value_type = String, example = "PT1M30S")]
pub struct IsoDuration(pub Duration);

impl IsoDuration {
    #[must_use]
    pub const fn secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }
}

impl FromStr for IsoDuration {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || match s.parse::<jiff::SignedDuration>() {
            // `90s` or `1h 30m`: what it would be is known.
            Ok(meant) if meant.is_positive() => {
                format!("'{s}' is not an ISO 8601 duration: write {meant}")
            }
            _ => format!("'{s}' is not an ISO 8601 duration such as PT1M30S, or is too long"),
        };
        if s.starts_with('-') || s.starts_with("P") && s.contains('-') {
            return Err(format!(
                "'{s}' is negative: a duration has to be nothing or more, such as PT1M30S"
            ));
        }
        if !s.starts_with(['P', 'p']) {
            return Err(wrong());
        }
        let span: jiff::Span = s.parse().map_err(|_| wrong())?;
        let signed = span
            .to_duration(jiff::SpanRelativeTo::days_are_24_hours())
            .map_err(|_| {
                format!(
                    "'{s}' counts years or months, which have no one length: use days, hours, minutes and seconds"
                )
            })?;
        Duration::try_from(signed).map(Self).map_err(|_| wrong())
    }
}
impl fmt::Display for IsoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::SignedDuration::try_from(self.0) {
            Ok(signed) => signed.fmt(f),
            Err(_) => write!(f, "PT{}S", self.0.as_secs()),
        }
    }
}
impl Serialize for IsoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
impl<'de> Deserialize<'de> for IsoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// An enum whose names are taken in any case, as NVCF takes them.
pub(crate) fn any_case<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: de::DeserializeOwned,
{
    use serde::de::{IntoDeserializer, value::StrDeserializer};
    let given = String::deserialize(deserializer)?;
    let read = |text: &str| -> Result<T, D::Error> {
        let text: StrDeserializer<'_, D::Error> = text.into_deserializer();
        T::deserialize(text)
    };
    read(&given)
        .or_else(|_| read(&given.to_ascii_lowercase()))
        .or_else(|_| read(&given.to_ascii_uppercase()))
        .or_else(|_| read(&given))
}

// === What people ask for ===

/// A process that the agent starts as an instance.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProcessSpec {
    /// The program and its arguments; no shell is involved.
    #[schema(min_items = 1)]
    pub command: Vec<String>,
    /// Its environment, besides what Weir sets. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,
    /// Where it starts; default: the agent's data directory, or `/` where the instance's user may not enter that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct EnvVar {
    /// Not empty, without `=` and NUL; neither `PORT` nor `WEIR_…`.
    #[schema(pattern = "^[^=\\x00]+$")]
    pub key: String,
    /// Without NUL.
    #[schema(pattern = "^[^\\x00]*$")]
    pub value: String,
}

/// How an instance comes to be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Launch {
    /// Started by an agent.
    Process(ProcessSpec),
    /// Servers that run already: `http://host:port` or `https://host:port`, each one an instance.
    Endpoints(Vec<String>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub enum HealthProtocol {
    #[serde(alias = "http", alias = "Http")]
    HTTP,
}

/// How an instance's health is asked. `port` absent means the instance's own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Always `HTTP`.
    pub protocol: HealthProtocol,
    /// Path that is asked.
    pub uri: String,
    /// Absent: the instance's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Longest wait for an answer; more than PT1M counts as PT1M.
    pub timeout: IsoDuration,
    /// Status that means healthy.
    pub expected_status_code: u16,
}

impl Health {
    /// More counts as so much. One that hangs is given up after three of them, all but at the same time.
    pub const MAX_TIMEOUT: IsoDuration = IsoDuration::secs(60);
}

/// A rate limit: `<n>-<S|M|H|D>`, a comma list, each unit once.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exempted_nca_ids: Vec<String>,
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub per_nca_id_rate: std::collections::BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_user_rate: Option<String>,
}

/// A version of a function, as stored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    pub function: FunctionId,
    pub id: VersionId,
    pub account: AccountId,
    pub name: String,
    pub description: String,
    /// Path called for pexec, with its leading `/`.
    pub inference_url: String,
    pub inference_port: Option<u16>,
    pub health: Health,
    pub launch: Launch,
    pub tags: Vec<String>,
    pub rate_limit: Option<RateLimit>,
    /// Harmless NVCF fields, kept and echoed: member name to value.
    #[serde(default)]
    pub kept: serde_json::Map<String, serde_json::Value>,
    pub created_at: Timestamp,
}

/// Who else may call: function-level where `version` is absent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sharing {
    pub function: FunctionId,
    pub version: Option<VersionId>,
    /// Account IDs, or `*` alone.
    pub accounts: Vec<String>,
}

/// One entry of `deploymentSpecifications`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GpuSpecification {
    pub id: GpuSpecificationId,
    pub gpu: String,
    pub instance_type: String,
    pub min_instances: u32,
    pub max_instances: u32,
    pub max_request_concurrency: u32,
    /// Harmless NVCF fields, kept and echoed.
    #[serde(default)]
    pub kept: serde_json::Map<String, serde_json::Value>,
}

impl GpuSpecification {
    /// Its `autoscalingConfiguration`, where it was given one.
    #[must_use]
    pub fn autoscaling_configuration(&self) -> Option<AutoscalingConfiguration> {
        let kept = self.kept.get("autoscalingConfiguration")?;
        AutoscalingConfiguration::deserialize(kept).ok()
    }

    /// Devices for each instance: the `_<n>x` at the end of `instanceType`, else 1; none for `gpu: "none"`.
    #[must_use]
    pub fn gpus_per_instance(&self) -> u32 {
        if self.gpu.eq_ignore_ascii_case("none") {
            return 0;
        }
        self.instance_type
            .rsplit_once('_')
            .and_then(|(_, n)| n.strip_suffix('x')?.parse().ok())
            .unwrap_or(1)
    }
}

/// NVCF's `autoscalingConfiguration`, as the policy `nvcf-step` reads it.
#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AutoscalingConfiguration {
    pub scale_up_details: Option<StepDetails>,
    pub scale_down_details: Option<StepDetails>,
}

/// One direction of it.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct StepDetails {
    #[serde(default)]
    pub metric: Option<String>,
    pub factor: f64,
    /// In percent of the instances' slots.
    pub threshold: u64,
    #[serde(default)]
    pub stickiness: Option<StickinessDetails>,
}

/// The threshold was passed for so much of the last `size`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub struct StickinessDetails {
    pub size: IsoDuration,
    pub threshold: IsoDuration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AutoscalingPolicy {
    Concurrency,
    NvcfStep,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Autoscaling {
    /// What decides: `concurrency` looks at the requests in flight, `nvcf-step` does as NVCF does. Default:
    /// `concurrency`.
    #[serde(deserialize_with = "any_case")]
    pub policy: AutoscalingPolicy,
    /// Share of an instance's slots to aim at, above 0 and at most 1. Default: 0.7.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub target_utilization: f64,
    /// Load is averaged over so long; above 0. Default: PT1M.
    pub stable_window: IsoDuration,
    /// A burst is looked for in so long; above 0, at most stableWindow. Default: PT6S.
    pub panic_window: IsoDuration,
    /// An instance goes when it was too many for so long. Default: PT0S.
    pub scale_in_delay: IsoDuration,
    /// Without any invocation for so long, the instances above minInstances go; above 0. Default: PT5M.
    pub idle_timeout: IsoDuration,
}
impl Default for Autoscaling {
    fn default() -> Self {
        Self {
            policy: AutoscalingPolicy::Concurrency,
            target_utilization: 0.7,
            stable_window: IsoDuration::secs(60),
            panic_window: IsoDuration::secs(6),
            scale_in_delay: IsoDuration::secs(0),
            idle_timeout: IsoDuration::secs(300),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct QueueSettings {
    /// Invocations that may wait. Default: 1000.
    pub max_requests: u64,
    /// Bytes of bodies that may wait in memory. Default: 268435456 (256 MiB).
    pub max_bytes: u64,
    /// Bytes of one body that are read while it waits, at most maxBytes. Default: 65536 (64 KiB).
    pub hold_bytes: u64,
    /// Longest wait while an instance is ready; above 0. Default: PT1M.
    pub busy_timeout: IsoDuration,
    /// Longest wait while none is; above 0. Default: PT10M.
    pub cold_timeout: IsoDuration,
}
impl Default for QueueSettings {
    fn default() -> Self {
        Self {
            max_requests: 1000,
            max_bytes: 256 << 20,
            hold_bytes: 64 << 10,
            busy_timeout: IsoDuration::secs(60),
            cold_timeout: IsoDuration::secs(600),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RoutingPolicy {
    LeastLoaded,
    /// By the header named by `sessionHeader`, with bounded load.
    ConsistentHash,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Routing {
    /// `least-loaded`: the instance with the lowest share of its slots busy; `consistent-hash`: the one that the
    /// header chooses, unless it has too much to do. Default: `least-loaded`.
    #[serde(deserialize_with = "any_case")]
    pub policy: RoutingPolicy,
    /// The name of the header that `consistent-hash` looks at. Default: `x-session-id`.
    #[schema(pattern = "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$", max_length = 128)]
    pub session_header: String,
}
impl Default for Routing {
    fn default() -> Self {
        Self {
            policy: RoutingPolicy::LeastLoaded,
            session_header: "x-session-id".into(),
        }
    }
}

/// The deployment of one version, as stored.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Deployment {
    pub id: DeploymentId,
    pub function: FunctionId,
    pub version: VersionId,
    pub specifications: Vec<GpuSpecification>,
    pub autoscaling: Autoscaling,
    pub queue: QueueSettings,
    pub routing: Routing,
    pub traffic_weight: Option<u32>,
    pub start_timeout: IsoDuration,
    pub drain_timeout: IsoDuration,
    pub cancel_timeout: IsoDuration,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// Set by a graceful undeploy: no new work; gone when nothing waits or runs.
    #[serde(default)]
    pub undeploying: bool,
}

impl Deployment {
    #[must_use]
    pub fn min_instances(&self) -> u32 {
        self.specifications
            .iter()
            .map(|s| s.min_instances)
            .fold(0, u32::saturating_add)
    }
    #[must_use]
    pub fn max_instances(&self) -> u32 {
        self.specifications
            .iter()
            .map(|s| s.max_instances)
            .fold(0, u32::saturating_add)
    }
    /// A version scales as one: what one specification says holds for all of them.
    #[must_use]
    pub fn autoscaling_configuration(&self) -> AutoscalingConfiguration {
        let mut specifications = self.specifications.iter();
        specifications
            .find_map(GpuSpecification::autoscaling_configuration)
            .unwrap_or_default()
    }
}

/// NVCF's scopes and Weir's two.
pub const SCOPES: &[&str] = &[
    "register_function",
    "update_function",
    "delete_function",
    "deploy_function",
    "list_functions",
    "list_functions_details",
    "invoke_function",
    "queue_details",
    "authorize_clients",
    "update_secrets",
    "manage_telemetries",
    "manage_registry_credentials",
    "account_setup",
    "list_cluster_groups",
    "register_process",
    "register_endpoints",
];

/// An API key; the secret itself is never stored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Key {
    pub id: KeyId,
    pub name: String,
    pub account: AccountId,
    pub scopes: Vec<String>,
    /// Functions it may name; absent: all of the account.
    pub functions: Option<Vec<FunctionId>>,
    /// 0 (most urgent) to 9.
    pub priority: u8,
    pub expires_at: Option<Timestamp>,
    pub created_at: Timestamp,
    /// SHA-256 of the secret, hexadecimal.
    pub hash: String,
    /// The admin key has every scope, for every account.
    #[serde(default)]
    pub admin: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Account {
    pub id: AccountId,
    pub name: String,
    pub created_at: Timestamp,
    /// The record stays: what still names the account must not come to mean another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted_at: Option<Timestamp>,
}

/// The six states of a version.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum FunctionState {
    Inactive,
    Deploying,
    Active,
    Degrading,
    Degraded,
    Error,
}

impl FunctionState {
    /// Whether invocations are taken.
    #[must_use]
    pub fn invokable(self) -> bool {
        matches!(self, Self::Active | Self::Degrading)
    }
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inactive => "INACTIVE",
            Self::Deploying => "DEPLOYING",
            Self::Active => "ACTIVE",
            Self::Degrading => "DEGRADING",
            Self::Degraded => "DEGRADED",
            Self::Error => "ERROR",
        }
    }
}

// === What is so now ===

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum InstanceState {
    Starting,
    Ready,
    /// Takes no new work; goes when idle.
    Draining,
    /// Failed; waits for its next start, or for its deployment to go.
    Error,
}

impl InstanceState {
    pub const ALL: [Self; 4] = [Self::Starting, Self::Ready, Self::Draining, Self::Error];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Error => "error",
        }
    }
}

/// One instance, as its agent last saw it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// Its ID.
    pub id: InstanceId,
    /// Its function.
    pub function_id: FunctionId,
    /// Its version.
    pub function_version_id: VersionId,
    /// Its deployment.
    pub deployment_id: DeploymentId,
    /// The specification that asked for it.
    pub gpu_specification_id: GpuSpecificationId,
    /// The machine it is on.
    pub node: String,
    /// As its agent last saw it.
    pub state: InstanceState,
    /// Where it takes requests; dialled only while `ready` or `draining`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub address: Option<SocketAddr>,
    /// Present where it is called over TLS: the name, or IP address, that its certificate has to be for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// Slots: its maxRequestConcurrency.
    pub capacity: u32,
    /// Its process; absent for an endpoint, and without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// When it was asked for.
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    /// When its process was last started.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub spawned_at: Option<Timestamp>,
    /// When it was first healthy since that start.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub first_healthy_at: Option<Timestamp>,
    /// Starts that failed or ended, since it was last ready for a while.
    pub restarts: u32,
    /// Why it is in `error`, or why its last start failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What kind of failure that is: all that callers of other accounts are told of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// The last that it printed before it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_log_line: Option<String>,
    /// Devices it was given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<u32>,
}

impl Instance {
    /// Its error and what it wrote last, for those who may read its log.
    #[must_use]
    pub fn error_and_log(&self) -> Option<String> {
        let error = self.error.as_ref()?;
        Some(match &self.last_log_line {
            Some(line) => format!("{error}; last log line: {line}"),
            None => error.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_duration_says_what_would_be_right() {
        let error = |text: &str| text.parse::<IsoDuration>().unwrap_err();
        for (text, right) in [
            ("90s", "PT1M30S"),
            ("1h 30m", "PT1H30M"),
            ("500ms", "PT0.5S"),
        ] {
            assert!(
                error(text).ends_with(&format!("duration: write {right}")),
                "{}",
                error(text)
            );
        }
        for text in ["", "15", "soon", "-5s", "-PT5S", "PT"] {
            assert!(error(text).contains("such as PT1M30S"), "{}", error(text));
        }
    }
}
