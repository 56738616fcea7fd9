//! Functions and their versions.

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use axum::{Json, extract::State};
use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    At, Caller, Problem,
    json::{Body, Names, Pairs},
    no_version, retried,
};
use crate::{
    agent::{endpoint::is_an_instances, forbidden, reserved},
    directory::{FunctionView, VersionView, encode, record},
    model::{
        Deployment, FunctionId, FunctionState, Health, HealthProtocol, Instance, InstanceState,
        IsoDuration, Launch, ProcessSpec, RateLimit, Version, VersionId, any_case,
    },
    store::{Change, Expect, Partition},
};

#[derive(Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum FunctionType {
    #[default]
    Default,
    Streaming,
}

#[derive(Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum ApiBodyFormat {
    #[default]
    Custom,
    #[serde(rename = "PREDICT_V2")]
    PredictV2,
}

/// A health check. With `process` or `endpoints`, `port` may be left out: the instance's own.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HealthRequest {
    /// Only `HTTP`.
    #[serde(deserialize_with = "any_case")]
    protocol: HealthProtocol,
    /// Path, with or without its leading `/`.
    #[schema(
        min_length = 1,
        max_length = 8192,
        pattern = "^(/[A-Za-z0-9._~!$&'()*+,;=@%:/-]*|[A-Za-z0-9._~!$&'()*+,;=@%-]+(/[A-Za-z0-9._~!$&'()*+,;=@%:/-]*)?)?(\\?[A-Za-z0-9._~!$&'()*+,;=@%:/?-]*)?$"
    )]
    uri: String,
    /// 1 to 65535; default: the instance's own port.
    #[schema(minimum = 1, maximum = 65535)]
    port: Option<u16>,
    /// Longest wait for an answer; above 0, and more than PT1M counts as PT1M.
    timeout: IsoDuration,
    /// Status that means healthy, 100 to 599.
    #[schema(minimum = 100, maximum = 599)]
    expected_status_code: u16,
}

/// Rates are `<n>-<S|M|H|D>`, a comma list, each unit once. At least one of the three is needed.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RateLimitBody {
    /// Rate of every account, counted for each calling account. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limit: Option<String>,
    /// Accounts without a limit, at most 32; only beside `rateLimit`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 32)]
    exempted_nca_ids: Vec<String>,
    /// Rates of single accounts, at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    per_nca_id_rate: BTreeMap<String, String>,
    /// Rate of every key, counted for each key. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    per_user_rate: Option<String>,
    /// Kept and echoed: limits are always checked before the invocation goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    sync_check: Option<bool>,
}

/// A new function, or a new version of one.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "name": "echo",
    "inferenceUrl": "/infer",
    "process": {"command": ["weir", "sample-function"]},
    "health": {"protocol": "HTTP", "uri": "/health", "timeout": "PT10S", "expectedStatusCode": 200}
}))]
pub(crate) struct CreateFunctionRequest {
    /// 1 to 128 letters, digits, `-`, `_`; starts with a letter or digit. Need not be unique.
    #[schema(
        pattern = "^[A-Za-z0-9][A-Za-z0-9_-]*$",
        min_length = 1,
        max_length = 128
    )]
    name: String,
    /// Path called for pexec; the leading `/` is added where it is missing. `/grpc`, NVCF's name for a gRPC function,
    /// is refused: these aren't supported yet.
    #[schema(
        min_length = 1,
        max_length = 8192,
        pattern = "^(/[A-Za-z0-9._~!$&'()*+,;=@%:/-]*|[A-Za-z0-9._~!$&'()*+,;=@%-]+(/[A-Za-z0-9._~!$&'()*+,;=@%:/-]*)?)?(\\?[A-Za-z0-9._~!$&'()*+,;=@%:/?-]*)?$"
    )]
    inference_url: String,
    /// Port of an instance, 1 to 65535. Default: its own (`PORT`).
    #[schema(minimum = 1, maximum = 65535)]
    inference_port: Option<u16>,
    /// Older name of `health.uri`. Default: `/v2/health/ready`.
    #[schema(
        min_length = 1,
        max_length = 8192,
        pattern = "^(/[A-Za-z0-9._~!$&'()*+,;=@%:/-]*|[A-Za-z0-9._~!$&'()*+,;=@%-]+(/[A-Za-z0-9._~!$&'()*+,;=@%:/-]*)?)?(\\?[A-Za-z0-9._~!$&'()*+,;=@%:/?-]*)?$"
    )]
    health_uri: Option<String>,
    /// Default: HTTP, `healthUri`, the instance's port, PT10S, 200.
    health: Option<HealthRequest>,
    /// The process that is an instance; needs the scope `register_process`. Either this or `endpoints`.
    process: Option<ProcessSpec>,
    /// Running servers, `http://host:port` or `https://host[:443]`, each one an instance; needs the scope `register_endpoints`.
    endpoints: Option<Vec<String>>,
    /// At most 64, each 1 to 128 of letters, digits, `-_:=`. Default: none.
    #[serde(default)]
    tags: Vec<String>,
    /// At most 256 characters. Default: the name.
    #[schema(max_length = 256)]
    description: Option<String>,
    /// Default: none.
    rate_limit: Option<RateLimitBody>,
    /// Echoed: bodies are passed on as they are. Default: `CUSTOM`.
    #[serde(default, deserialize_with = "any_case")]
    api_body_format: ApiBodyFormat,
    /// `DEFAULT` or `STREAMING`, echoed. Default: `DEFAULT`.
    #[serde(default, deserialize_with = "any_case")]
    function_type: FunctionType,
    #[schema(ignore)]
    container_image: Option<Value>,
    #[schema(ignore)]
    container_args: Option<Value>,
    #[schema(ignore)]
    container_environment: Option<Value>,
    #[schema(ignore)]
    helm_chart: Option<Value>,
    #[schema(ignore)]
    helm_chart_service_name: Option<Value>,
    #[schema(ignore)]
    models: Option<Value>,
    #[schema(ignore)]
    resources: Option<Value>,
    #[schema(ignore)]
    secrets: Option<Value>,
    #[schema(ignore)]
    telemetries: Option<Value>,
    #[schema(ignore)]
    llm_invocation_config: Option<Value>,
}

/// What may change of a version; what is left out stays. At least one.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({"tags": ["team:a"]}))]
pub(crate) struct UpdateFunctionRequest {
    /// Replaces all tags.
    tags: Option<Vec<String>>,
    /// Replaces the whole rate limit.
    rate_limit: Option<RateLimitBody>,
    #[schema(ignore)]
    model_updates: Option<Value>,
    #[schema(ignore)]
    llm_invocation_config: Option<Value>,
}

/// One version of a function.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FunctionDto {
    /// The function.
    id: FunctionId,
    /// The account that owns it.
    nca_id: String,
    /// This version of it.
    version_id: VersionId,
    /// As it was made.
    name: String,
    /// Computed from the deployment and its instances.
    status: FunctionState,
    /// Path called for pexec.
    inference_url: String,
    /// `true` where it is shared by another account; absent otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    owned_by_different_account: Option<bool>,
    /// Port of an instance; absent: its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    inference_port: Option<u16>,
    /// The process that is an instance; only with the scope list_functions_details, and not of another account.
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<ProcessSpec>,
    /// The servers that are the instances; only with the scope list_functions_details, and not of another account.
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoints: Option<Vec<String>>,
    /// As it was made.
    #[schema(value_type = ApiBodyFormat)]
    api_body_format: Value,
    /// The same as `health.uri`.
    health_uri: String,
    /// When the version was made.
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// Only where one version is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    active_instances: Option<Vec<ActiveInstance>>,
    /// Absent where there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tags: Vec<String>,
    /// At most 256 characters.
    description: String,
    /// How its instances are asked for their health.
    health: Health,
    /// As it was made.
    #[schema(value_type = FunctionType)]
    function_type: Value,
    /// Absent where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limit: Option<RateLimitBody>,
}

/// An instance, by NVCF's names.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct ActiveInstance {
    /// The instance.
    instance_id: String,
    /// Its function.
    function_id: FunctionId,
    /// Its version.
    function_version_id: VersionId,
    /// Of its specification.
    instance_type: String,
    /// STARTING, ACTIVE, TERMINATED (draining) or ERRORED.
    instance_status: &'static str,
    /// Its GPU specification: what asked for it.
    icms_request_id: String,
    /// The account that owns the function.
    nca_id: String,
    /// Of its specification.
    gpu: String,
    /// Always `default`.
    backend: &'static str,
    /// Its node.
    location: String,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    instance_created_at: Timestamp,
    /// When it was first healthy, else when it was started, else when it was asked for.
    #[schema(value_type = String, format = DateTime)]
    instance_updated_at: Timestamp,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct FunctionReply {
    /// The version.
    pub(crate) function: FunctionDto,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct FunctionsReply {
    /// One entry for each version.
    functions: Vec<FunctionDto>,
}
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FunctionIdsReply {
    /// Each once.
    function_ids: Vec<FunctionId>,
}

impl FunctionDto {
    /// As `caller` may see it: a stranger doesn't learn how it is run.
    pub(crate) fn of(caller: &Caller, view: &VersionView, instances: bool) -> Self {
        let version = &*view.version;
        let own = caller.any || version.account == caller.account;
        let details = own && caller.has("list_functions_details");
        let (process, endpoints) = match &version.launch {
            _ if !details => (None, None),
            Launch::Process(process) => (Some(process.clone()), None),
            Launch::Endpoints(all) => (None, Some(all.clone())),
        };
        let kept = |name: &str, default: &str| {
            version
                .kept
                .get(name)
                .cloned()
                .unwrap_or_else(|| default.into())
        };
        Self {
            id: version.function,
            nca_id: version.account.to_string(),
            version_id: version.id,
            name: version.name.clone(),
            status: view.state,
            inference_url: version.inference_url.clone(),
            owned_by_different_account: (!own).then_some(true),
            inference_port: version.inference_port,
            process,
            endpoints,
            api_body_format: kept("apiBodyFormat", "CUSTOM"),
            health_uri: version.health.uri.clone(),
            created_at: version.created_at,
            active_instances: (instances && details).then(|| {
                view.instances
                    .iter()
                    .map(|i| ActiveInstance::of(i, view))
                    .collect()
            }),
            tags: version.tags.clone(),
            description: version.description.clone(),
            health: version.health.clone(),
            function_type: kept("functionType", "DEFAULT"),
            rate_limit: version.rate_limit.as_ref().map(|limit| RateLimitBody {
                rate_limit: limit.rate_limit.clone(),
                exempted_nca_ids: limit.exempted_nca_ids.clone(),
                per_nca_id_rate: limit.per_nca_id_rate.clone(),
                per_user_rate: limit.per_user_rate.clone(),
                sync_check: version.kept.get("syncCheck").and_then(Value::as_bool),
            }),
        }
    }
}

impl ActiveInstance {
    fn of(instance: &Instance, view: &VersionView) -> Self {
        let spec = view.deployment.as_ref().and_then(|deployment| {
            let specs = &deployment.specifications;
            specs.iter().find(|s| s.id == instance.gpu_specification_id)
        });
        Self {
            instance_id: instance.id.to_string(),
            function_id: instance.function_id,
            function_version_id: instance.function_version_id,
            instance_type: spec.map_or_else(String::new, |s| s.instance_type.clone()),
            instance_status: match instance.state {
                InstanceState::Starting => "STARTING",
                InstanceState::Ready => "ACTIVE",
                InstanceState::Draining => "TERMINATED",
                InstanceState::Error => "ERRORED",
            },
            icms_request_id: instance.gpu_specification_id.to_string(),
            nca_id: view.version.account.to_string(),
            gpu: spec.map_or_else(String::new, |s| s.gpu.clone()),
            backend: "default",
            location: instance.node.clone(),
            instance_created_at: instance.created_at,
            instance_updated_at: instance
                .first_healthy_at
                .or(instance.spawned_at)
                .unwrap_or(instance.created_at),
        }
    }
}

// === Rules ===

fn check(fine: bool, detail: impl Into<String>) -> Result<(), Problem> {
    if fine {
        Ok(())
    } else {
        Err(Problem::bad(detail))
    }
}

fn valid_name(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

fn checked_tags(tags: Vec<String>) -> Result<Vec<String>, Problem> {
    check(tags.len() <= 64, "tags: at most 64 are taken")?;
    let mut seen = HashSet::new();
    let tags: Vec<String> = tags
        .into_iter()
        .filter(|t| seen.insert(t.clone()))
        .collect();
    for (at, tag) in tags.iter().enumerate() {
        let fine = (1..=128).contains(&tag.len())
            && tag
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_:=".contains(c));
        check(
            fine,
            format!("tags[{at}]: a tag is 1 to 128 letters, digits or any of -_:="),
        )?;
    }
    Ok(tags)
}

fn path(member: &str, given: &str) -> Result<String, Problem> {
    let (before, query) = given.split_once('?').unwrap_or((given, ""));
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._~!$&'()*+,;=@%-:/".contains(c);
    // A colon in its first part makes it a URL with a scheme.
    let first = before.split('/').next().unwrap_or_default();
    let fine = (1..=8192).contains(&given.len())
        && before.chars().all(allowed)
        && query.chars().all(|c| allowed(c) || c == '?')
        && !first.contains(':');
    check(
        fine,
        format!(
            "{member}: '{}' is not a path such as /v2/infer, of at most 8192 characters",
            given.chars().take(256).collect::<String>()
        ),
    )?;
    Ok(format!("/{}", given.strip_prefix('/').unwrap_or(given)))
}

fn valid_rate(rate: &str) -> bool {
    let mut units = HashSet::new();
    rate.split(',').all(|part| {
        part.split_once('-').is_some_and(|(n, unit)| {
            (1..=9).contains(&n.len())
                && !n.starts_with('0')
                && n.bytes().all(|b| b.is_ascii_digit())
                && matches!(unit, "S" | "M" | "H" | "D")
                && units.insert(unit.to_owned())
        })
    })
}

fn checked_rate_limit(limit: &RateLimitBody) -> Result<RateLimit, Problem> {
    let rates = [
        ("rateLimit.rateLimit", &limit.rate_limit),
        ("rateLimit.perUserRate", &limit.per_user_rate),
    ]
    .into_iter()
    .filter_map(|(name, rate)| Some((name.to_owned(), rate.as_ref()?)))
    .chain(
        limit
            .per_nca_id_rate
            .iter()
            .map(|(account, rate)| (format!("rateLimit.perNcaIdRate.{account}"), rate)),
    );
    let mut any = false;
    for (name, rate) in rates {
        any = true;
        check(
            valid_rate(rate),
            format!(
                "{name}: '{rate}' is not a rate such as 10-S or 10-S,500-M (units S, M, H, D, each once)"
            ),
        )?;
    }
    check(
        any,
        "rateLimit: one of rateLimit, perNcaIdRate, perUserRate is needed",
    )?;
    let exempted = &limit.exempted_nca_ids;
    check(
        exempted.len() <= 32 && limit.per_nca_id_rate.len() <= 32,
        "rateLimit: exemptedNcaIds and perNcaIdRate take at most 32 accounts",
    )?;
    check(
        exempted.is_empty() || limit.rate_limit.is_some(),
        "rateLimit.exemptedNcaIds: means nothing without rateLimit.rateLimit",
    )?;
    for account in exempted {
        if limit.per_nca_id_rate.contains_key(account) {
            return Err(Problem::conflict(format!(
                "rateLimit: account '{account}' can't be exempted and have a rate"
            )));
        }
    }
    Ok(RateLimit {
        rate_limit: limit.rate_limit.clone(),
        exempted_nca_ids: exempted.clone(),
        per_nca_id_rate: limit.per_nca_id_rate.clone(),
        per_user_rate: limit.per_user_rate.clone(),
    })
}

/// `ports`: those beside its own that an endpoint is asked on, and their members' names.
fn checked_endpoints(
    api: &super::Api,
    endpoints: Vec<String>,
    ports: [(&str, Option<u16>); 2],
) -> Result<Vec<String>, Problem> {
    check(!endpoints.is_empty(), "endpoints: at least one is needed")?;
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for (at, endpoint) in endpoints.iter().enumerate() {
        let wrong = |why: &str| Problem::bad(format!("endpoints[{at}]: '{endpoint}' {why}"));
        let uri: http::Uri = endpoint
            .parse()
            .map_err(|_| wrong("is not a URL such as http://10.0.0.5:8000"))?;
        let scheme = uri.scheme_str().unwrap_or_default();
        let usual = match scheme {
            "http" => None,
            "https" => Some(443),
            _ => {
                return Err(wrong(
                    "has to start with http:// or https://: nothing else is spoken to instances",
                ));
            }
        };
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || endpoint.contains(['@', '#'])
        {
            return Err(wrong(
                "may hold a host and a port only, such as http://10.0.0.5:8000",
            ));
        }
        // What follows the host is a port, or it is nothing.
        let bare = uri.authority().map(http::uri::Authority::as_str) == uri.host();
        let port = uri.port_u16().or(usual.filter(|_| bare));
        let (Some(host), Some(port)) = (uri.host(), port.filter(|p| *p > 0)) else {
            return Err(wrong(
                "needs a host and a port, such as http://10.0.0.5:8000",
            ));
        };
        let host = host.to_ascii_lowercase();
        let asked = [port, ports[1].1.unwrap_or(port)];
        if let Some(why) = forbidden(&host, &asked, &api.listeners) {
            return Err(wrong(why));
        }
        // Of other names the agent finds out, each time that it resolves them.
        let ip = match host.trim_matches(['[', ']']) {
            "localhost" => Some(IpAddr::from(Ipv4Addr::LOCALHOST)),
            literal if host.starts_with('[') && literal.parse::<Ipv6Addr>().is_err() => {
                return Err(wrong("has no IPv6 address in its brackets"));
            }
            literal => literal.parse::<IpAddr>().ok().map(|ip| ip.to_canonical()),
        };
        let own = [("its port", Some(port))];
        for (name, port) in own.iter().chain(&ports) {
            let theirs = ip
                .zip(*port)
                .is_some_and(|address| is_an_instances(address.into(), &api.instance_ports));
            if theirs {
                return Err(wrong(&format!(
                    "is this machine, and {name} is among those of its own instances ({}-{}, --instance-ports): take another port",
                    api.instance_ports.start(),
                    api.instance_ports.end()
                )));
            }
        }
        let clean = format!("{scheme}://{host}:{port}");
        if !seen.insert(clean.clone()) {
            return Err(wrong("is there twice: each one is an instance of its own"));
        }
        all.push(clean);
    }
    Ok(all)
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(all) => all.is_empty(),
        Value::Object(all) => all.is_empty(),
        _ => false,
    }
}

impl CreateFunctionRequest {
    fn checked(
        self,
        api: &super::Api,
        caller: &Caller,
        function: FunctionId,
        account: crate::model::AccountId,
    ) -> Result<Version, Problem> {
        let containers = "containers aren't supported by this build: use process or endpoints";
        let refused = [
            ("containerImage", &self.container_image, containers),
            ("containerArgs", &self.container_args, containers),
            (
                "containerEnvironment",
                &self.container_environment,
                "it is a container's: use process.env",
            ),
            (
                "helmChart",
                &self.helm_chart,
                "Helm charts aren't supported: use process or endpoints",
            ),
            (
                "helmChartServiceName",
                &self.helm_chart_service_name,
                "Helm charts aren't supported: leave it out",
            ),
            (
                "models",
                &self.models,
                "models aren't fetched by this build: leave it out",
            ),
            (
                "resources",
                &self.resources,
                "resources aren't fetched by this build: leave it out",
            ),
            (
                "secrets",
                &self.secrets,
                "secrets aren't kept by this build: use process.env, or leave it out",
            ),
            (
                "telemetries",
                &self.telemetries,
                "telemetries aren't sent by this build: leave it out",
            ),
            (
                "llmInvocationConfig",
                &self.llm_invocation_config,
                "LLM functions aren't supported: leave it out",
            ),
        ];
        for (name, value, why) in refused {
            check(value.as_ref().is_none_or(empty), format!("{name}: {why}"))?;
        }
        check(
            valid_name(&self.name),
            "name: has to be 1 to 128 letters, digits, - or _, and start with a letter or digit",
        )?;
        let inference_url = path("inferenceUrl", &self.inference_url)?;
        check(
            inference_url != "/grpc",
            "inferenceUrl: /grpc means a gRPC function, which isn't supported yet: name an HTTP path such as /v2/infer",
        )?;
        check(
            self.inference_port != Some(0),
            "inferencePort: has to be 1 to 65535",
        )?;
        let description = self.description.unwrap_or_else(|| self.name.clone());
        check(
            description.chars().count() <= 256,
            "description: at most 256 characters are taken",
        )?;
        let launch = match (self.process, self.endpoints) {
            (Some(process), None) => {
                caller.needs("register_process")?;
                check(
                    process
                        .command
                        .first()
                        .is_some_and(|program| !program.is_empty()),
                    "process.command: at least the program is needed",
                )?;
                check(
                    !process.command.iter().any(|part| part.contains('\0')),
                    "process.command: a NUL character can't be passed on",
                )?;
                check(
                    !process
                        .working_dir
                        .as_ref()
                        .is_some_and(|dir| dir.contains('\0')),
                    "process.workingDir: a NUL character can't be passed on",
                )?;
                for (at, variable) in process.env.iter().enumerate() {
                    check(
                        !reserved(&variable.key),
                        format!(
                            "process.env[{at}]: {} is Weir's to set: choose another name than PORT, CUDA_VISIBLE_DEVICES, NVCF_… and WEIR_…",
                            variable.key
                        ),
                    )?;
                    check(
                        !variable.key.is_empty()
                            && !variable.key.contains(['=', '\0'])
                            && !variable.value.contains('\0'),
                        format!(
                            "process.env[{at}]: the key can't be empty or hold '=', nor any part a NUL"
                        ),
                    )?;
                }
                Launch::Process(process)
            }
            (None, Some(endpoints)) => {
                caller.needs("register_endpoints")?;
                let health = self.health.as_ref().and_then(|health| health.port);
                let ports = [
                    ("inferencePort", self.inference_port),
                    ("health.port", health),
                ];
                Launch::Endpoints(checked_endpoints(api, endpoints, ports)?)
            }
            (None, None) => {
                return Err(Problem::bad(
                    "process: either process or endpoints is needed, to say what an instance is",
                ));
            }
            (Some(_), Some(_)) => {
                return Err(Problem::bad(
                    "process: can't be given together with endpoints: choose one",
                ));
            }
        };
        let health_uri = self.health_uri.as_deref().unwrap_or("/v2/health/ready");
        let health_uri = path("healthUri", health_uri)?;
        let health = match self.health {
            Some(health) => {
                check(health.port != Some(0), "health.port: has to be 1 to 65535")?;
                check(
                    !health.timeout.0.is_zero(),
                    "health.timeout: has to be above 0",
                )?;
                check(
                    (100..=599).contains(&health.expected_status_code),
                    "health.expectedStatusCode: has to be 100 to 599",
                )?;
                Health {
                    protocol: health.protocol,
                    uri: path("health.uri", &health.uri)?,
                    port: health.port,
                    timeout: health.timeout,
                    expected_status_code: health.expected_status_code,
                }
            }
            None => Health {
                protocol: HealthProtocol::HTTP,
                uri: health_uri,
                port: None,
                timeout: IsoDuration::secs(10),
                expected_status_code: 200,
            },
        };
        let mut kept = serde_json::Map::new();
        kept.insert(
            "apiBodyFormat".into(),
            serde_json::json!(self.api_body_format),
        );
        kept.insert("functionType".into(), serde_json::json!(self.function_type));
        let rate_limit = self.rate_limit.as_ref();
        if let Some(sync) = rate_limit.and_then(|limit| limit.sync_check) {
            kept.insert("syncCheck".into(), sync.into());
        }
        Ok(Version {
            function,
            id: VersionId::random(),
            account,
            name: self.name,
            description,
            inference_url,
            inference_port: self.inference_port,
            health,
            launch,
            tags: checked_tags(self.tags)?,
            rate_limit: rate_limit.map(checked_rate_limit).transpose()?,
            kept,
            created_at: Timestamp::now(),
        })
    }
}

/// A version that was written just now, as it shows; without waiting for the directory for ever.
fn fresh(api: &super::Api, version: Version) -> VersionView {
    let shown = api.shown(version.function, version.id);
    shown.unwrap_or_else(|| VersionView {
        version: version.into(),
        deployment: None,
        instances: vec![],
        state: FunctionState::Inactive,
        shared_with: [].into(),
    })
}

async fn insert(api: &super::Api, version: Version) -> Result<VersionView, Problem> {
    let change = Change {
        key: record::version(version.function, version.id),
        expect: Expect::Absent,
        value: Some(encode(&version)),
    };
    api.commit(Partition::of(version.function), vec![change])
        .await?;
    Ok(fresh(api, version))
}

// === Handlers ===

/// Makes a function and its first version, INACTIVE. Scope: register_function.
#[utoipa::path(post, path = "/functions", request_body = CreateFunctionRequest, responses((status = 200, body = FunctionReply)))]
pub(crate) async fn create(
    State(api): At,
    caller: Caller,
    Body(request): Body<CreateFunctionRequest>,
) -> Result<Json<FunctionReply>, Problem> {
    caller.needs("register_function")?;
    caller.unlimited("make a function")?;
    let version = request.checked(&api, &caller, FunctionId::random(), caller.account.clone())?;
    let _place = api.place(&caller.account)?;
    let view = insert(&api, version).await?;
    Ok(Json(FunctionReply {
        function: FunctionDto::of(&caller, &view, false),
    }))
}

/// Makes a version of a function, INACTIVE. Scope: register_function.
#[utoipa::path(post, path = "/functions/{functionId}/versions", params(("functionId" = FunctionId, Path)), request_body = CreateFunctionRequest, responses((status = 200, body = FunctionReply)))]
pub(crate) async fn create_version(
    State(api): At,
    caller: Caller,
    names: Names,
    Body(request): Body<CreateFunctionRequest>,
) -> Result<Json<FunctionReply>, Problem> {
    caller.needs("register_function")?;
    let function = caller.own(&api, names.function()?)?;
    let version = request.checked(&api, &caller, function.id, function.account.clone())?;
    let view = insert(&api, version).await?;
    Ok(Json(FunctionReply {
        function: FunctionDto::of(&caller, &view, false),
    }))
}

/// The versions that the query's `visibility` asks for: public, private, then authorized.
fn asked(api: &super::Api, caller: &Caller, query: &Pairs) -> Result<Vec<VersionView>, Problem> {
    caller.needs_one(&["list_functions", "list_functions_details"])?;
    let mut wanted = HashSet::new();
    for value in query.all("visibility").flat_map(|v| v.split(',')) {
        let value = value.trim().to_ascii_lowercase();
        if !["authorized", "private", "public"].contains(&value.as_str()) {
            return Err(Problem::bad(format!(
                "visibility: '{value}' is none of authorized, private, public"
            )));
        }
        wanted.insert(value);
    }
    let mut found: Vec<(u8, VersionView)> = Vec::new();
    let views = api.directory.views();
    for view in views.iter().filter(|view| caller.names(view.id)) {
        for version in &view.versions {
            let public = version.shared_with.iter().any(|a| a == "*");
            let (order, kind) = if view.account == caller.account {
                (1, "private")
            } else if public {
                (0, "public")
            } else if caller.shared(version) {
                (2, "authorized")
            } else {
                continue;
            };
            let own_public = public && order == 1 && wanted.contains("public");
            if wanted.is_empty() || wanted.contains(kind) || own_public {
                found.push((order, version.clone()));
            }
        }
    }
    found.sort_by_key(|(order, v)| (*order, v.version.created_at, v.version.id));
    Ok(found.into_iter().map(|(_, version)| version).collect())
}

/// The functions of the account and those shared with it, one entry for each version. Scope: list_functions or list_functions_details.
#[utoipa::path(get, path = "/functions", params(("visibility" = Option<String>, Query, description = "authorized, private, public; may repeat; default all")), responses((status = 200, body = FunctionsReply)))]
pub(crate) async fn list(
    State(api): At,
    caller: Caller,
    query: Pairs,
) -> Result<Json<FunctionsReply>, Problem> {
    let functions = asked(&api, &caller, &query)?
        .iter()
        .map(|view| FunctionDto::of(&caller, view, false))
        .collect();
    Ok(Json(FunctionsReply { functions }))
}

/// The IDs of the functions of the account and those shared with it. Scope: list_functions or list_functions_details.
#[utoipa::path(get, path = "/functions/ids", params(("visibility" = Option<String>, Query, description = "authorized, private, public; may repeat; default all")), responses((status = 200, body = FunctionIdsReply)))]
pub(crate) async fn ids(
    State(api): At,
    caller: Caller,
    query: Pairs,
) -> Result<Json<FunctionIdsReply>, Problem> {
    let mut seen = HashSet::new();
    let function_ids = asked(&api, &caller, &query)?
        .iter()
        .map(|view| view.version.function)
        .filter(|id| seen.insert(*id))
        .collect();
    Ok(Json(FunctionIdsReply { function_ids }))
}

fn readable<'a>(
    caller: &'a Caller,
    view: &'a FunctionView,
) -> impl Iterator<Item = &'a VersionView> {
    let all = view.versions.iter();
    all.filter(|version| caller.owns(view) || caller.shared(version))
}

/// The versions of a function, oldest first. Scope: list_functions or list_functions_details.
#[utoipa::path(get, path = "/functions/{functionId}/versions", params(("functionId" = FunctionId, Path)), responses((status = 200, body = FunctionsReply)))]
pub(crate) async fn versions(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<FunctionsReply>, Problem> {
    caller.needs_one(&["list_functions", "list_functions_details"])?;
    let view = caller.visible(&api, names.function()?)?;
    let functions = readable(&caller, &view)
        .map(|version| FunctionDto::of(&caller, version, false))
        .collect();
    Ok(Json(FunctionsReply { functions }))
}

/// One version, with its instances. Scope: list_functions or list_functions_details.
#[utoipa::path(get, path = "/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), responses((status = 200, body = FunctionReply)))]
pub(crate) async fn read(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<FunctionReply>, Problem> {
    caller.needs_one(&["list_functions", "list_functions_details"])?;
    let (function, version) = names.version()?;
    let view = caller.visible(&api, function)?;
    let found = readable(&caller, &view).find(|v| v.version.id == version);
    let found = found.ok_or_else(|| no_version(function, version))?;
    Ok(Json(FunctionReply {
        function: FunctionDto::of(&caller, found, true),
    }))
}

/// Deletes a version, deployed or not. Scope: delete_function.
#[utoipa::path(delete, path = "/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), responses((status = 204)))]
pub(crate) async fn delete(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<StatusCode, Problem> {
    caller.needs("delete_function")?;
    let (function, version) = names.version()?;
    caller.own_version(&api, function, version)?;
    retried!(delete_once(&api, function, version).await)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn delete_once(
    api: &super::Api,
    function: FunctionId,
    version: VersionId,
) -> Result<(), Problem> {
    let stored = api.stored(function, version).await?;
    let all = format!("{function}/version/");
    let (versions, _) = api.store.list(stored.partition, &all).await?;
    let gone = |key| Change {
        key,
        expect: Expect::Anything,
        value: None,
    };
    let mut changes = vec![
        Change {
            value: None,
            ..stored.version_change(&stored.version)
        },
        gone(record::deployment(function, version)),
        gone(record::sharing(function, Some(version))),
    ];
    if versions.len() == 1 {
        changes.push(gone(record::sharing(function, None)));
    }
    api.commit(stored.partition, changes).await
}

/// Reads a version, changes it, writes it back if nobody else did.
async fn change_version(
    api: &super::Api,
    (function, version): (FunctionId, VersionId),
    change: impl Fn(&mut Version),
) -> Result<VersionView, Problem> {
    let changed = retried!(
        async {
            let stored = api.stored(function, version).await?;
            let mut changed = stored.version.clone();
            change(&mut changed);
            api.commit(stored.partition, vec![stored.version_change(&changed)])
                .await?;
            Ok::<_, Problem>(changed)
        }
        .await
    )?;
    Ok(fresh(api, changed))
}

fn set_limit(version: &mut Version, limit: RateLimit, sync: Option<bool>) {
    version.rate_limit = Some(limit);
    match sync {
        Some(sync) => version.kept.insert("syncCheck".into(), sync.into()),
        None => version.kept.remove("syncCheck"),
    };
}

/// Changes a version's tags or rate limit. Scope: update_function.
#[utoipa::path(put, path = "/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), request_body = UpdateFunctionRequest, responses((status = 200, body = FunctionReply)))]
pub(crate) async fn update(
    State(api): At,
    caller: Caller,
    names: Names,
    Body(request): Body<UpdateFunctionRequest>,
) -> Result<Json<FunctionReply>, Problem> {
    caller.needs("update_function")?;
    let (function, version) = names.version()?;
    caller.own_version(&api, function, version)?;
    for (name, value) in [
        ("modelUpdates", &request.model_updates),
        ("llmInvocationConfig", &request.llm_invocation_config),
    ] {
        check(
            value.as_ref().is_none_or(empty),
            format!("{name}: LLM functions aren't supported: leave it out"),
        )?;
    }
    let sync = request.rate_limit.as_ref().and_then(|l| l.sync_check);
    let limit = request.rate_limit.as_ref().map(checked_rate_limit);
    let limit = limit.transpose()?;
    let tags = request.tags.map(checked_tags).transpose()?;
    check(
        limit.is_some() || tags.is_some(),
        "tags or rateLimit is needed: all else of a version is fixed, make a new version to change it",
    )?;
    let view = change_version(&api, (function, version), |version| {
        if let Some(tags) = &tags {
            version.tags.clone_from(tags);
        }
        if let Some(limit) = &limit {
            set_limit(version, limit.clone(), sync);
        }
    })
    .await?;
    Ok(Json(FunctionReply {
        function: FunctionDto::of(&caller, &view, false),
    }))
}

/// Older path of the same change. Scope: update_function.
#[utoipa::path(put, path = "/metadata/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), request_body = UpdateFunctionRequest, responses((status = 200, body = FunctionReply)))]
pub(crate) async fn update_metadata(
    api: At,
    caller: Caller,
    names: Names,
    body: Body<UpdateFunctionRequest>,
) -> Result<Json<FunctionReply>, Problem> {
    update(api, caller, names, body).await
}

/// Replaces a version's rate limit. Scope: update_function.
#[utoipa::path(put, path = "/ratelimit/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), request_body = RateLimitBody, responses((status = 204)))]
pub(crate) async fn set_rate_limit(
    State(api): At,
    caller: Caller,
    names: Names,
    Body(request): Body<RateLimitBody>,
) -> Result<StatusCode, Problem> {
    caller.needs("update_function")?;
    let (function, version) = names.version()?;
    caller.own_version(&api, function, version)?;
    let limit = checked_rate_limit(&request)?;
    change_version(&api, (function, version), |version| {
        set_limit(version, limit.clone(), request.sync_check);
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a version's rate limit. Scope: update_function.
#[utoipa::path(delete, path = "/ratelimit/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), responses((status = 204)))]
pub(crate) async fn remove_rate_limit(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<StatusCode, Problem> {
    caller.needs("update_function")?;
    let (function, version) = names.version()?;
    caller.own_version(&api, function, version)?;
    change_version(&api, (function, version), |version| {
        version.rate_limit = None;
        version.kept.remove("syncCheck");
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Whether a version is deployed, and not going.
pub(crate) fn busy(deployment: Option<&Deployment>) -> bool {
    deployment.is_some_and(|d| !d.undeploying)
}
