//! Deployments: how many instances a version has, of what, and how it scales.

use axum::{Json, extract::State};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    Api, At, Caller, Problem, Stored,
    functions::{FunctionDto, FunctionReply, busy},
    json::{self, Body, Names, Pairs, given, merged},
    retried,
};
use crate::{
    directory::VersionView,
    model::{
        Autoscaling, AutoscalingPolicy, Deployment, DeploymentId, FunctionId, FunctionState,
        GpuSpecification, GpuSpecificationId, InstanceState, IsoDuration, Launch, QueueSettings,
        Routing, Version, VersionId, any_case,
    },
    scale::Steps,
    state::{Past, state_of},
};

/// One entry of `deploymentSpecifications`.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SpecificationRequest {
    /// Which one is meant, where a deployment is updated. Default: the only one.
    gpu_specification_id: Option<GpuSpecificationId>,
    /// The GPU's name, or `none`.
    #[schema(min_length = 1)]
    gpu: String,
    /// Such as `NCP.GPU.H100_1x`; the number at its end is the GPUs of one instance. May be left out with gpu `none`.
    instance_type: Option<String>,
    /// Instances that are always there, at most maxInstances; 0 lets it sleep when nobody calls.
    #[schema(minimum = 0, maximum = 4096)]
    min_instances: u32,
    /// At least 1 and at least minInstances; 4096 at most, over all specifications.
    #[schema(minimum = 1, maximum = 4096)]
    max_instances: u32,
    /// Requests that one instance takes at once, 1 to 16384. Default: 1.
    #[schema(minimum = 1, maximum = 16384)]
    max_request_concurrency: Option<u32>,
    /// NVCF's `{scaleUpDetails, scaleDownDetails}`; kept, and used by the policy `nvcf-step`, for the version as a
    /// whole: several specifications that have one have the same.
    #[schema(value_type = Option<Object>)]
    autoscaling_configuration: Option<Map<String, Value>>,
    /// Kept and echoed; can't be given together with `clusters`.
    backend: Option<String>,
    /// Kept and echoed.
    #[serde(default)]
    clusters: Vec<String>,
    /// Kept and echoed.
    #[serde(default)]
    regions: Vec<String>,
    /// Kept and echoed.
    #[serde(default)]
    attributes: Vec<String>,
    /// Kept and echoed.
    #[serde(default)]
    availability_zones: Vec<String>,
    /// 1 to 99, kept and echoed.
    #[schema(minimum = 1, maximum = 99)]
    preferred_order: Option<u8>,
    #[schema(ignore)]
    configuration: Option<Map<String, Value>>,
    #[schema(ignore)]
    helm_validation_policy: Option<Map<String, Value>>,
}

/// A deployment.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "deploymentSpecifications": [{"gpu": "none", "minInstances": 0, "maxInstances": 2, "maxRequestConcurrency": 4}]
}))]
pub(crate) struct DeploymentRequest {
    /// At least one.
    deployment_specifications: Vec<SpecificationRequest>,
    /// How it scales.
    #[schema(value_type = Option<Autoscaling>)]
    autoscaling: Option<Map<String, Value>>,
    /// What may wait, and how long.
    #[schema(value_type = Option<QueueSettings>)]
    queue: Option<Map<String, Value>>,
    /// Which instance takes an invocation.
    #[schema(value_type = Option<Routing>)]
    routing: Option<Map<String, Value>>,
    /// Share of the function's invocations. Default: by ready capacity; an update takes it back by `null`.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u32>)]
    traffic_weight: Option<Option<u32>>,
    /// Longest start of an instance. Default: PT10M.
    start_timeout: Option<IsoDuration>,
    /// Longest wait for an instance's requests when it goes. Default: PT5M.
    drain_timeout: Option<IsoDuration>,
    /// Longest wait for an instance to end a cancelled request. Default: PT5S.
    cancel_timeout: Option<IsoDuration>,
}

/// At least one member.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({"minInstances": 1, "maxInstances": 4}))]
pub(crate) struct PatchRequest {
    /// At most maxInstances. Default: as it is.
    #[schema(minimum = 0, maximum = 4096)]
    min_instances: Option<u32>,
    /// At least minInstances; 4096 at most, over all specifications. Default: as it is.
    #[schema(minimum = 1, maximum = 4096)]
    max_instances: Option<u32>,
    /// Replaces the whole configuration.
    #[schema(value_type = Option<Object>)]
    autoscaling_configuration: Option<Map<String, Value>>,
    /// `PLATFORM_CONFIGURATION` drops the configuration. Default: `CUSTOM_CONFIGURATION`.
    autoscaling_configuration_policy: Option<ConfigurationPolicy>,
}

#[derive(Clone, Copy, PartialEq, ToSchema)]
pub(crate) enum ConfigurationPolicy {
    #[schema(rename = "CUSTOM_CONFIGURATION")]
    Custom,
    #[schema(rename = "PLATFORM_CONFIGURATION")]
    Platform,
}

impl<'de> Deserialize<'de> for ConfigurationPolicy {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
        enum Names {
            CustomConfiguration,
            PlatformConfiguration,
        }
        Ok(match any_case(deserializer)? {
            Names::CustomConfiguration => Self::Custom,
            Names::PlatformConfiguration => Self::Platform,
        })
    }
}

/// One entry of `deploymentSpecifications`, as it is.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SpecificationDto {
    /// Its ID, for a PATCH.
    gpu_specification_id: GpuSpecificationId,
    /// The GPU's name, or `none`.
    gpu: String,
    /// Such as `NCP.GPU.H100_1x`; `none` without a GPU.
    instance_type: String,
    /// Instances that are always there.
    min_instances: u32,
    /// Instances that there may be.
    max_instances: u32,
    /// Requests that one instance takes at once.
    max_request_concurrency: u32,
    #[serde(flatten)]
    #[schema(value_type = Object)]
    kept: Map<String, Value>,
}

/// Why an instance does not come up.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct HealthInfo {
    /// Its GPU specification.
    icms_request_id: String,
    /// Of its specification.
    gpu: String,
    /// Always `default`.
    backend: &'static str,
    /// Of its specification.
    instance_type: String,
    /// What went wrong.
    error: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeploymentDto {
    /// Its function.
    function_id: FunctionId,
    /// Its version.
    function_version_id: VersionId,
    /// Its own ID.
    deployment_id: DeploymentId,
    /// The version's name.
    function_name: String,
    /// The account that owns the function.
    nca_id: String,
    /// The version's state.
    function_status: FunctionState,
    /// Instances in error, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    health_info: Vec<HealthInfo>,
    /// What was asked for.
    deployment_specifications: Vec<SpecificationDto>,
    /// How it scales.
    autoscaling: Autoscaling,
    /// What may wait, and how long.
    queue: QueueSettings,
    /// Which instance takes an invocation.
    routing: Routing,
    /// Share of the function's invocations; absent: by ready capacity.
    #[serde(skip_serializing_if = "Option::is_none")]
    traffic_weight: Option<u32>,
    /// Longest start of an instance.
    start_timeout: IsoDuration,
    /// Longest wait for an instance's requests when it goes.
    drain_timeout: IsoDuration,
    /// Longest wait for an instance to end a cancelled request.
    cancel_timeout: IsoDuration,
    /// When it was deployed.
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// When it was last changed.
    #[schema(value_type = String, format = DateTime)]
    last_updated_at: Timestamp,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct DeploymentReply {
    /// The deployment.
    deployment: DeploymentDto,
}
#[derive(Serialize, ToSchema)]
pub(crate) struct DeploymentsReply {
    /// Oldest first.
    deployments: Vec<DeploymentDto>,
}
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SpecificationReply {
    /// As it is now.
    gpu_specification: SpecificationDto,
}

impl SpecificationDto {
    fn of(spec: &GpuSpecification) -> Self {
        Self {
            gpu_specification_id: spec.id,
            gpu: spec.gpu.clone(),
            instance_type: spec.instance_type.clone(),
            min_instances: spec.min_instances,
            max_instances: spec.max_instances,
            max_request_concurrency: spec.max_request_concurrency,
            kept: spec.kept.clone(),
        }
    }
}

impl DeploymentDto {
    fn of(view: &VersionView, deployment: &Deployment) -> Self {
        let spec = |id| deployment.specifications.iter().find(|s| s.id == id);
        Self {
            function_id: deployment.function,
            function_version_id: deployment.version,
            deployment_id: deployment.id,
            function_name: view.version.name.clone(),
            nca_id: view.version.account.to_string(),
            function_status: view.state,
            health_info: view
                .instances
                .iter()
                .filter(|i| i.state == InstanceState::Error)
                .filter_map(|i| {
                    let spec = spec(i.gpu_specification_id)?;
                    Some(HealthInfo {
                        icms_request_id: spec.id.to_string(),
                        gpu: spec.gpu.clone(),
                        backend: "default",
                        instance_type: spec.instance_type.clone(),
                        error: i.error.clone().unwrap_or_else(|| "it failed".into()),
                    })
                })
                .collect(),
            deployment_specifications: deployment
                .specifications
                .iter()
                .map(SpecificationDto::of)
                .collect(),
            autoscaling: deployment.autoscaling.clone(),
            queue: deployment.queue.clone(),
            routing: deployment.routing.clone(),
            traffic_weight: deployment.traffic_weight,
            start_timeout: deployment.start_timeout,
            drain_timeout: deployment.drain_timeout,
            cancel_timeout: deployment.cancel_timeout,
            created_at: deployment.created_at,
            last_updated_at: deployment.updated_at,
        }
    }
}

// === Rules ===

/// Instances that one deployment may ask for. Each is a task and a row in every answer about its version.
const MAX_INSTANCES: u32 = 4096;

fn check(fine: bool, detail: impl Into<String>) -> Result<(), Problem> {
    if fine {
        Ok(())
    } else {
        Err(Problem::bad(detail))
    }
}

/// What is wrong with no member by itself, but with how they, the version and what is there go together.
fn fits(fine: bool, detail: impl Into<String>) -> Result<(), Problem> {
    if fine {
        Ok(())
    } else {
        Err(Problem::conflict(detail))
    }
}

fn check_configuration(at: &str, configuration: &Map<String, Value>) -> Result<(), Problem> {
    for (name, up) in [("scaleUpDetails", true), ("scaleDownDetails", false)] {
        let Some(details) = configuration.get(name) else {
            continue;
        };
        let at = format!("{at}.autoscalingConfiguration.{name}");
        let factor = details.get("factor").and_then(Value::as_f64);
        let fine = factor.is_some_and(|f| if up { f > 1.0 } else { f > 0.0 && f < 1.0 });
        let range = if up { "above 1" } else { "above 0 and below 1" };
        check(fine, format!("{at}.factor: has to be a number {range}"))?;
        check(
            details.get("threshold").is_some_and(Value::is_u64),
            format!("{at}.threshold: has to be a whole number of at least 0"),
        )?;
        if let Some(stickiness) = details.get("stickiness") {
            let read = |member: &str| {
                let text = stickiness.get(member).and_then(Value::as_str);
                let parsed = text.and_then(|t| t.parse::<IsoDuration>().ok());
                parsed.ok_or_else(|| {
                    Problem::bad(format!(
                        "{at}.stickiness.{member}: has to be a duration such as PT5M"
                    ))
                })
            };
            let (size, threshold) = (read("size")?, read("threshold")?);
            check(
                size <= IsoDuration::secs(3600),
                format!("{at}.stickiness.size: at most PT1H is taken"),
            )?;
            fits(
                threshold < size,
                format!("{at}.stickiness: threshold has to be below size"),
            )?;
        }
    }
    Ok(())
}

/// What the policy `nvcf-step` can't do, where it would have to.
fn check_steps(deployment: &Deployment) -> Result<(), Problem> {
    let all = deployment.autoscaling_configuration();
    for (at, spec) in deployment.specifications.iter().enumerate() {
        let Some(configuration) = spec.autoscaling_configuration() else {
            continue;
        };
        let at = format!("deploymentSpecifications[{at}].autoscalingConfiguration");
        fits(
            configuration == all,
            format!(
                "{at}: a version scales as one: give it once, or the same to every specification"
            ),
        )?;
        for details in [
            &configuration.scale_up_details,
            &configuration.scale_down_details,
        ] {
            let metric = details
                .as_ref()
                .and_then(|details| details.metric.as_deref());
            fits(
                metric.is_none_or(|metric| metric.eq_ignore_ascii_case("utilization")),
                format!(
                    "{at}: the policy nvcf-step knows the metric 'utilization' alone: leave metric out"
                ),
            )?;
        }
        let steps = Steps::of(&configuration);
        fits(
            steps.down_threshold <= steps.up_threshold,
            format!(
                "{at}: scaleDownDetails.threshold, {} (default 30), can't be above scaleUpDetails.threshold, {} (default 70)",
                steps.down_threshold, steps.up_threshold
            ),
        )?;
    }
    Ok(())
}

impl SpecificationRequest {
    fn checked(self, at: usize) -> Result<GpuSpecification, Problem> {
        let at = format!("deploymentSpecifications[{at}]");
        check(
            !self.gpu.is_empty(),
            format!("{at}.gpu: can't be empty; 'none' means no GPU"),
        )?;
        let none = self.gpu.eq_ignore_ascii_case("none");
        let instance_type = self.instance_type.filter(|t| !t.is_empty());
        let Some(instance_type) = instance_type.or_else(|| none.then(|| "none".to_owned())) else {
            return Err(Problem::bad(format!(
                "{at}.instanceType: is needed, such as NCP.GPU.{}_1x",
                self.gpu
            )));
        };
        for (name, value) in [
            ("configuration", &self.configuration),
            ("helmValidationPolicy", &self.helm_validation_policy),
        ] {
            check(
                value.as_ref().is_none_or(Map::is_empty),
                format!("{at}.{name}: is for Helm charts, which aren't supported: leave it out"),
            )?;
        }
        check(
            self.backend.is_none() || self.clusters.is_empty(),
            format!("{at}: backend and clusters can't be given together"),
        )?;
        check(
            self.preferred_order.is_none_or(|n| (1..=99).contains(&n)),
            format!("{at}.preferredOrder: has to be 1 to 99"),
        )?;
        let mut kept = Map::new();
        if let Some(configuration) = self.autoscaling_configuration {
            check_configuration(&at, &configuration)?;
            kept.insert("autoscalingConfiguration".into(), configuration.into());
        }
        if let Some(backend) = self.backend {
            kept.insert("backend".into(), backend.into());
        }
        if let Some(order) = self.preferred_order {
            kept.insert("preferredOrder".into(), order.into());
        }
        for (name, values) in [
            ("clusters", self.clusters),
            ("regions", self.regions),
            ("attributes", self.attributes),
            ("availabilityZones", self.availability_zones),
        ] {
            if !values.is_empty() {
                kept.insert(name.into(), values.into());
            }
        }
        let spec = GpuSpecification {
            id: GpuSpecificationId::random(),
            gpu: self.gpu,
            instance_type,
            min_instances: self.min_instances,
            max_instances: self.max_instances,
            max_request_concurrency: self.max_request_concurrency.unwrap_or(1),
            kept,
        };
        check(
            none || spec.gpus_per_instance() > 0,
            format!(
                "{at}.instanceType: '{}' has no GPU; gpu 'none' asks for that",
                spec.instance_type
            ),
        )?;
        Ok(spec)
    }
}

/// What must hold of a deployment as a whole, new or changed.
fn check_deployment(deployment: &Deployment, version: &Version) -> Result<(), Problem> {
    check(
        !deployment.specifications.is_empty(),
        "deploymentSpecifications: at least one is needed",
    )?;
    for (at, spec) in deployment.specifications.iter().enumerate() {
        let at = format!("deploymentSpecifications[{at}]");
        check(
            spec.max_instances > 0,
            format!("{at}.maxInstances: has to be at least 1"),
        )?;
        check(
            spec.max_instances <= MAX_INSTANCES,
            format!(
                "{at}.maxInstances: {}, and a deployment may have {MAX_INSTANCES}: ask for fewer, or deploy several versions",
                spec.max_instances
            ),
        )?;
        fits(
            spec.min_instances <= spec.max_instances,
            format!(
                "{at}.minInstances: {} is more than maxInstances, {}: lower it, or raise maxInstances",
                spec.min_instances, spec.max_instances
            ),
        )?;
        check(
            (1..=16384).contains(&spec.max_request_concurrency),
            format!("{at}.maxRequestConcurrency: has to be 1 to 16384"),
        )?;
    }
    fits(
        deployment.max_instances() <= MAX_INSTANCES,
        format!(
            "maxInstances: {} in all, and a deployment may have {MAX_INSTANCES}: ask for fewer, or deploy several versions",
            deployment.max_instances()
        ),
    )?;
    let autoscaling = &deployment.autoscaling;
    check(
        autoscaling.target_utilization > 0.0 && autoscaling.target_utilization <= 1.0,
        "autoscaling.targetUtilization: has to be above 0 and at most 1",
    )?;
    if autoscaling.policy == AutoscalingPolicy::NvcfStep {
        check_steps(deployment)?;
    }
    for (name, duration) in [
        ("autoscaling.stableWindow", autoscaling.stable_window),
        ("autoscaling.panicWindow", autoscaling.panic_window),
        ("autoscaling.idleTimeout", autoscaling.idle_timeout),
        ("queue.busyTimeout", deployment.queue.busy_timeout),
        ("queue.coldTimeout", deployment.queue.cold_timeout),
        ("startTimeout", deployment.start_timeout),
        ("drainTimeout", deployment.drain_timeout),
        ("cancelTimeout", deployment.cancel_timeout),
    ] {
        check(!duration.0.is_zero(), format!("{name}: has to be above 0"))?;
    }
    fits(
        autoscaling.panic_window <= autoscaling.stable_window,
        "autoscaling.panicWindow: can't be longer than stableWindow",
    )?;
    fits(
        deployment.queue.hold_bytes <= deployment.queue.max_bytes,
        "queue.holdBytes: can't be more than queue.maxBytes",
    )?;
    check(
        http::HeaderName::try_from(&deployment.routing.session_header).is_ok(),
        "routing.sessionHeader: is not the name of a header, such as x-session-id",
    )?;
    match &version.launch {
        Launch::Process(_) => fits(
            version.inference_port.is_none() || deployment.max_instances() <= 1,
            "maxInstances: more than one process can't listen on the version's one inferencePort; \
             make a version that leaves inferencePort out and listens on $PORT",
        ),
        Launch::Endpoints(endpoints) => fits(
            deployment.max_instances() as usize <= endpoints.len(),
            format!(
                "maxInstances: the version has {} endpoints, each one an instance; ask for no more",
                endpoints.len()
            ),
        ),
    }
}

impl DeploymentRequest {
    /// Puts what was given in place of what is there.
    fn settings(&self, deployment: &mut Deployment) -> Result<(), Problem> {
        if let Some(given) = &self.autoscaling {
            deployment.autoscaling = merged("autoscaling", &deployment.autoscaling, given)?;
        }
        if let Some(given) = &self.queue {
            deployment.queue = merged("queue", &deployment.queue, given)?;
        }
        if let Some(given) = &self.routing {
            deployment.routing = merged("routing", &deployment.routing, given)?;
        }
        deployment.traffic_weight = self.traffic_weight.unwrap_or(deployment.traffic_weight);
        for (given, place) in [
            (self.start_timeout, &mut deployment.start_timeout),
            (self.drain_timeout, &mut deployment.drain_timeout),
            (self.cancel_timeout, &mut deployment.cancel_timeout),
        ] {
            *place = given.unwrap_or(*place);
        }
        Ok(())
    }
}

/// The version as it shows after `deployment` was written.
fn shown(api: &Api, version: Version, deployment: Option<&Deployment>) -> VersionView {
    let shown = api.shown(version.function, version.id);
    let shown = shown.filter(|v| v.deployment.as_deref() == deployment);
    shown.unwrap_or_else(|| VersionView {
        state: state_of(&version.launch, deployment, &[], Past::New),
        version: version.into(),
        deployment: deployment.cloned().map(Into::into),
        instances: vec![],
        shared_with: [].into(),
    })
}

fn none(version: VersionId) -> Problem {
    Problem::missing(format!(
        "version {version} is not deployed: POST to this path deploys it"
    ))
}

// === Handlers ===

/// Deploys a version that is INACTIVE. Scope: deploy_function.
#[utoipa::path(post, path = "/deployments/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), request_body = DeploymentRequest, responses((status = 200, body = DeploymentReply)))]
pub(crate) async fn create(
    State(api): At,
    caller: Caller,
    names: Names,
    Body(mut request): Body<DeploymentRequest>,
) -> Result<Json<DeploymentReply>, Problem> {
    caller.needs("deploy_function")?;
    let (function, version) = names.version()?;
    caller.own_version(&api, function, version)?;
    let specifications = std::mem::take(&mut request.deployment_specifications)
        .into_iter()
        .enumerate()
        .map(|(at, spec)| spec.checked(at))
        .collect::<Result<_, _>>()?;
    let now = Timestamp::now();
    let mut deployment = Deployment {
        id: DeploymentId::random(),
        function,
        version,
        specifications,
        autoscaling: Autoscaling::default(),
        queue: QueueSettings::default(),
        routing: Routing::default(),
        traffic_weight: None,
        start_timeout: IsoDuration::secs(600),
        drain_timeout: IsoDuration::secs(300),
        cancel_timeout: IsoDuration::secs(5),
        created_at: now,
        updated_at: now,
        undeploying: false,
    };
    request.settings(&mut deployment)?;
    let version = retried!(create_once(&api, &deployment).await)?;
    let view = shown(&api, version, Some(&deployment));
    Ok(Json(DeploymentReply {
        deployment: DeploymentDto::of(&view, &deployment),
    }))
}

async fn create_once(api: &Api, deployment: &Deployment) -> Result<Version, Problem> {
    let stored = api.stored(deployment.function, deployment.version).await?;
    if let Some((there, _)) = &stored.deployment {
        let view = api.shown(deployment.function, deployment.version);
        // NVCF's code.
        return Err(Problem::bad(if there.undeploying {
            "the version is being undeployed: wait until its last requests are done, or DELETE without graceful".to_owned()
        } else if view.is_some_and(|v| v.state == FunctionState::Error) {
            "the version is deployed and in ERROR: undeploy it first".to_owned()
        } else {
            "the version is deployed: change its deployment by PATCH of its gpu-specifications, or undeploy it first".to_owned()
        }));
    }
    check_deployment(deployment, &stored.version)?;
    // Writing the version as it is makes a delete that comes between fail this, or be failed by it.
    let changes = vec![
        stored.version_change(&stored.version),
        stored.deployment_change(Some(deployment)),
    ];
    api.commit(stored.partition, changes).await?;
    Ok(stored.version)
}

/// The deployment of a version. Scope: deploy_function.
#[utoipa::path(get, path = "/deployments/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), responses((status = 200, body = DeploymentReply)))]
pub(crate) async fn read(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<DeploymentReply>, Problem> {
    caller.needs("deploy_function")?;
    let (function, version) = names.version()?;
    let view = caller.own_version(&api, function, version)?;
    let deployment = view.deployment.as_ref().ok_or_else(|| none(version))?;
    Ok(Json(DeploymentReply {
        deployment: DeploymentDto::of(&view, deployment),
    }))
}

fn find(api: &Api, caller: &Caller, id: DeploymentId) -> Result<VersionView, Problem> {
    let views = api.directory.views();
    let found = views
        .iter()
        .filter(|view| caller.owns(view) && caller.names(view.id))
        .flat_map(|view| &view.versions)
        .find(|v| v.deployment.as_ref().is_some_and(|d| d.id == id));
    found.cloned().ok_or_else(|| {
        Problem::missing(format!(
            "there is no deployment {id} in this account: look at the version's deployment"
        ))
    })
}

/// A deployment by its own ID. Scope: deploy_function.
#[utoipa::path(get, path = "/deployments/{deploymentId}", params(("deploymentId" = DeploymentId, Path)), responses((status = 200, body = DeploymentReply)))]
pub(crate) async fn read_by_id(
    State(api): At,
    caller: Caller,
    names: Names,
) -> Result<Json<DeploymentReply>, Problem> {
    caller.needs("deploy_function")?;
    let id = names.id("deploymentId")?;
    let view = find(&api, &caller, id)?;
    let Some(deployment) = &view.deployment else {
        return Err(none(view.version.id));
    };
    Ok(Json(DeploymentReply {
        deployment: DeploymentDto::of(&view, deployment),
    }))
}

/// The deployments of an account. The admin's.
#[utoipa::path(get, path = "/deployments", responses((status = 200, body = DeploymentsReply)))]
pub(crate) async fn list(
    State(api): At,
    caller: Caller,
) -> Result<Json<DeploymentsReply>, Problem> {
    let views = api.directory.views();
    let mut deployments: Vec<DeploymentDto> = views
        .iter()
        .filter(|view| caller.owns(view))
        .flat_map(|view| &view.versions)
        .filter_map(|v| Some(DeploymentDto::of(v, v.deployment.as_ref()?)))
        .collect();
    deployments.sort_by_key(|d| (d.created_at, d.deployment_id));
    Ok(Json(DeploymentsReply { deployments }))
}

/// Reads a deployment, changes it, writes it back if nobody else did.
async fn change(
    api: &Api,
    (function, version): (FunctionId, VersionId),
    change: impl Fn(&mut Deployment) -> Result<(), Problem>,
) -> Result<VersionView, Problem> {
    let (version, deployment) = retried!(
        async {
            let stored: Stored = api.stored(function, version).await?;
            let Some((mut deployment, _)) = stored.deployment.clone() else {
                return Err(none(version));
            };
            if !busy(Some(&deployment)) {
                return Err(Problem::conflict(
                    "the version is being undeployed: deploy it anew when its last requests are done",
                ));
            }
            change(&mut deployment)?;
            deployment.updated_at = Timestamp::now();
            check_deployment(&deployment, &stored.version)?;
            let written = vec![stored.deployment_change(Some(&deployment))];
            api.commit(stored.partition, written).await?;
            Ok((stored.version, deployment))
        }
        .await
    )?;
    Ok(shown(api, version, Some(&deployment)))
}

/// An update as a whole request: what it leaves out of a specification and a deployment has to have is as it is.
fn completed(
    given: &Map<String, Value>,
    deployment: &Deployment,
) -> Result<DeploymentRequest, Problem> {
    let mut whole = given.clone();
    let specs = whole
        .entry("deploymentSpecifications")
        .or_insert_with(|| Value::Array(Vec::new()));
    for given in specs.as_array_mut().into_iter().flatten() {
        let Value::Object(given) = given else {
            continue;
        };
        let id = given.get("gpuSpecificationId").and_then(Value::as_str);
        let id: Option<GpuSpecificationId> = id.and_then(|id| id.parse().ok());
        let specs = &deployment.specifications;
        // One that is not there is refused later, and by a better name than a missing member's.
        let found = specs.iter().find(|s| Some(s.id) == id).or(specs.first());
        let Some(spec) = found else {
            continue;
        };
        for (member, value) in [
            ("gpu", Value::from(spec.gpu.as_str())),
            ("instanceType", spec.instance_type.as_str().into()),
            ("minInstances", spec.min_instances.into()),
            ("maxInstances", spec.max_instances.into()),
        ] {
            given.entry(member).or_insert(value);
        }
    }
    json::read(whole.into())
}

/// Changes what the body has of a deployment and keeps the rest; gpu and instanceType are fixed. Scope: deploy_function.
#[utoipa::path(put, path = "/deployments/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path)), request_body = DeploymentRequest, responses((status = 200, body = DeploymentReply)))]
pub(crate) async fn update(
    State(api): At,
    caller: Caller,
    names: Names,
    Body(given): Body<Map<String, Value>>,
) -> Result<Json<DeploymentReply>, Problem> {
    caller.needs("deploy_function")?;
    let (function, version) = names.version()?;
    caller.own_version(&api, function, version)?;
    let view = change(&api, (function, version), |deployment| {
        let mut request = completed(&given, deployment)?;
        let given: Vec<(Option<GpuSpecificationId>, bool, GpuSpecification)> =
            std::mem::take(&mut request.deployment_specifications)
                .into_iter()
                .enumerate()
                .map(|(at, spec)| {
                    let concurrency = spec.max_request_concurrency.is_some();
                    let id = spec.gpu_specification_id;
                    spec.checked(at).map(|checked| (id, concurrency, checked))
                })
                .collect::<Result<_, _>>()?;
        let alone = given.len() == 1 && deployment.specifications.len() == 1;
        for (at, (id, concurrency, new)) in given.iter().enumerate() {
            let at = format!("deploymentSpecifications[{at}]");
            let found = match id {
                Some(id) => deployment.specifications.iter_mut().find(|s| s.id == *id),
                None if alone => deployment.specifications.first_mut(),
                None => {
                    return Err(Problem::conflict(format!(
                        "{at}.gpuSpecificationId: is needed where there are several specifications"
                    )));
                }
            };
            let Some(spec) = found else {
                return Err(Problem::conflict(format!(
                    "{at}.gpuSpecificationId: the deployment has no such specification"
                )));
            };
            fits(
                spec.gpu == new.gpu && spec.instance_type == new.instance_type,
                format!("{at}: gpu and instanceType are fixed: undeploy, then deploy anew"),
            )?;
            spec.min_instances = new.min_instances;
            spec.max_instances = new.max_instances;
            if *concurrency {
                spec.max_request_concurrency = new.max_request_concurrency;
            }
            for (name, value) in &new.kept {
                spec.kept.insert(name.clone(), value.clone());
            }
        }
        request.settings(deployment)
    })
    .await?;
    let deployment = view.deployment.as_ref().ok_or_else(|| none(version))?;
    Ok(Json(DeploymentReply {
        deployment: DeploymentDto::of(&view, deployment),
    }))
}

/// Changes how many instances there are. Scope: deploy_function.
#[utoipa::path(patch, path = "/deployments/{deploymentId}/gpu-specifications/{gpuSpecificationId}", params(("deploymentId" = DeploymentId, Path), ("gpuSpecificationId" = GpuSpecificationId, Path)), request_body = PatchRequest, responses((status = 200, body = SpecificationReply)))]
pub(crate) async fn patch(
    State(api): At,
    caller: Caller,
    names: Names,
    Body(request): Body<PatchRequest>,
) -> Result<Json<SpecificationReply>, Problem> {
    caller.needs("deploy_function")?;
    let id: DeploymentId = names.id("deploymentId")?;
    let wanted: GpuSpecificationId = names.id("gpuSpecificationId")?;
    let view = find(&api, &caller, id)?;
    let platform = request.autoscaling_configuration_policy == Some(ConfigurationPolicy::Platform);
    check(
        request.min_instances.is_some()
            || request.max_instances.is_some()
            || request.autoscaling_configuration.is_some()
            || request.autoscaling_configuration_policy.is_some(),
        "one of minInstances, maxInstances, autoscalingConfiguration, autoscalingConfigurationPolicy is needed",
    )?;
    check(
        !(platform && request.autoscaling_configuration.is_some()),
        "autoscalingConfiguration: means nothing with PLATFORM_CONFIGURATION",
    )?;
    if let Some(configuration) = &request.autoscaling_configuration {
        check_configuration("gpuSpecification", configuration)?;
    }
    let unknown = || {
        Problem::missing(format!(
            "deployment {id} has no GPU specification {wanted}: GET the deployment to see those it has"
        ))
    };
    let at = (view.version.function, view.version.id);
    let view = change(&api, at, |deployment| {
        let same = deployment.id == id;
        let specs = &mut deployment.specifications;
        let found = specs.iter_mut().find(|s| same && s.id == wanted);
        let spec = found.ok_or_else(unknown)?;
        spec.min_instances = request.min_instances.unwrap_or(spec.min_instances);
        spec.max_instances = request.max_instances.unwrap_or(spec.max_instances);
        let name = "autoscalingConfiguration";
        if platform {
            spec.kept.remove(name);
        } else if let Some(configuration) = &request.autoscaling_configuration {
            spec.kept.insert(name.into(), configuration.clone().into());
        }
        Ok(())
    })
    .await?;
    let specs = view.deployment.iter().flat_map(|d| &d.specifications);
    let spec = specs
        .into_iter()
        .find(|s| s.id == wanted)
        .ok_or_else(unknown)?;
    Ok(Json(SpecificationReply {
        gpu_specification: SpecificationDto::of(spec),
    }))
}

/// Undeploys a version, at once or when its last requests are done. Scope: deploy_function.
#[utoipa::path(delete, path = "/deployments/functions/{functionId}/versions/{functionVersionId}", params(("functionId" = FunctionId, Path), ("functionVersionId" = VersionId, Path), ("graceful" = Option<bool>, Query, description = "Let what waits or runs end first; default false")), responses((status = 200, body = FunctionReply)))]
pub(crate) async fn delete(
    State(api): At,
    caller: Caller,
    names: Names,
    query: Pairs,
) -> Result<Json<FunctionReply>, Problem> {
    caller.needs("deploy_function")?;
    let (function, version) = names.version()?;
    caller.own_version(&api, function, version)?;
    let graceful = query.flag("graceful")?;
    let (version, left) = retried!(delete_once(&api, function, version, graceful).await)?;
    let view = shown(&api, version, left.as_ref());
    Ok(Json(FunctionReply {
        function: FunctionDto::of(&caller, &view, false),
    }))
}

async fn delete_once(
    api: &Api,
    function: FunctionId,
    version: VersionId,
    graceful: bool,
) -> Result<(Version, Option<Deployment>), Problem> {
    let stored = api.stored(function, version).await?;
    let Some((there, _)) = &stored.deployment else {
        return Err(Problem::missing(format!(
            "version {version} is not deployed: there is nothing to undeploy"
        )));
    };
    let left = graceful.then(|| Deployment {
        undeploying: true,
        updated_at: Timestamp::now(),
        ..there.clone()
    });
    let written = vec![stored.deployment_change(left.as_ref())];
    api.commit(stored.partition, written).await?;
    Ok((stored.version, left))
}
