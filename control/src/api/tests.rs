//! The API over a real store and directory, by requests.

use std::collections::HashSet;

use axum::{Router, body::Body};
use http::{HeaderMap, Method, Request, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::{
    auth::hash,
    model::*,
    store::{Cursor, Position, Record, StoreError, Watch, embedded::Embedded},
};

#[derive(Default)]
struct Still {
    log_owners: Mutex<HashMap<InstanceId, LogOwner>>,
}
impl Runtime for Still {
    fn queue_depth(&self, _: VersionId) -> usize {
        3
    }
    fn in_flight(&self, _: VersionId) -> usize {
        0
    }
    fn position(&self, _: Uuid) -> Option<(FunctionId, VersionId, usize)> {
        None
    }
    fn logs(&self, _: InstanceId, tail: usize) -> Option<String> {
        Some(format!("{tail} lines\n"))
    }
    fn log_owner(&self, instance: InstanceId) -> Option<LogOwner> {
        self.log_owners.lock().unwrap().get(&instance).cloned()
    }
    fn decisions(&self, _: VersionId) -> Vec<Value> {
        vec![]
    }
    fn nodes(&self) -> Vec<Value> {
        vec![json!({"name": "local"})]
    }
    fn gpus(&self) -> Vec<(String, u32)> {
        vec![("H100".into(), 8)]
    }
}

struct Weir {
    router: Router,
    context: Arc<Context>,
    still: Arc<Still>,
    _dir: tempfile::TempDir,
}

const ADMIN: &str = "the admin's secret";

async fn weir() -> Weir {
    weir_with(1000).await
}

async fn weir_with(max_functions: usize) -> Weir {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Embedded::open(&dir.path().join("state")).unwrap();
    let (directory, feed) = Directory::load(&*store).await.unwrap();
    let (follower, source) = (directory.clone(), store.clone());
    tokio::spawn(async move { follower.follow(&*source, feed).await });
    let still = Arc::new(Still::default());
    let context = Arc::new(Context {
        listeners: vec![],
        store,
        directory,
        runtime: still.clone(),
        admin: Some(Arc::new(auth::admin_key(
            auth::ENVIRONMENT_KEY,
            hash(ADMIN),
        ))),
        open: false,
        max_functions,
        instance_ports: 20_000..=29_999,
    });
    Weir {
        router: router(context.clone()),
        context,
        still,
        _dir: dir,
    }
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
}

impl Answer {
    #[track_caller]
    fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.body
    }
    /// A problem document with this status whose detail says this.
    #[track_caller]
    fn problem(self, status: u16, code: &str, says: &str) {
        assert_eq!(self.status, status, "{}", self.body);
        assert_eq!(self.headers["content-type"], "application/problem+json");
        assert_eq!(self.headers["x-weir-error"], code);
        assert_eq!(self.body["status"], status);
        assert_eq!(
            self.headers["nvcf-reqid"],
            *self.body["requestId"].as_str().unwrap()
        );
        for member in ["type", "title", "instance"] {
            assert!(self.body[member].is_string(), "{}", self.body);
        }
        let detail = self.body["detail"].as_str().unwrap();
        assert!(detail.contains(says), "'{detail}' does not say '{says}'");
    }
}

impl Weir {
    async fn raw(
        &self,
        key: &str,
        method: &str,
        path: &str,
        kind: &str,
        body: impl Into<Body>,
    ) -> Answer {
        let request = Request::builder()
            .method(Method::from_bytes(method.as_bytes()).unwrap())
            .uri(path)
            .header("authorization", format!("bearer {key}"))
            .header("content-type", kind)
            .body(body.into())
            .unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        assert!(parts.headers.contains_key("nvcf-reqid"));
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: serde_json::from_slice(&bytes)
                .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into())),
        }
    }
    async fn call(&self, key: &str, method: &str, path: &str, body: Value) -> Answer {
        self.raw(key, method, path, "application/json", body.to_string())
            .await
    }
    async fn get(&self, path: &str) -> Answer {
        self.call(ADMIN, "GET", path, json!({})).await
    }
    async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(ADMIN, "POST", path, body).await
    }
    /// A function's `<functionId>/versions/<versionId>`.
    async fn function(&self) -> (String, String) {
        let made = self.post("/v2/nvcf/functions", echo()).await.ok();
        let id = |m: &str| made["function"][m].as_str().unwrap().to_owned();
        (id("id"), id("versionId"))
    }
    async fn key(&self, body: Value) -> String {
        let made = self.post("/v2/weir/keys", body).await.ok();
        made["secret"].as_str().unwrap().to_owned()
    }
}

fn echo() -> Value {
    json!({"name": "echo", "inferenceUrl": "infer", "process": {"command": ["weir"]}, "unknown": 1})
}
fn with(mut base: Value, member: &str, value: Value) -> Value {
    base[member] = value;
    base
}
fn spec(member: &str, value: Value) -> Value {
    let base = json!({"gpu": "none", "minInstances": 0, "maxInstances": 2});
    json!({"deploymentSpecifications": [with(base, member, value)]})
}

#[tokio::test]
async fn a_function_lives_and_goes() {
    let weir = weir().await;
    let (f, v) = weir.function().await;
    let version = format!("/v2/nvcf/functions/{f}/versions/{v}");
    let deployments = format!("/v2/nvcf/deployments/functions/{f}/versions/{v}");
    let got = weir.get(&version).await.ok();
    let function = &got["function"];
    assert_eq!(function["status"], "INACTIVE");
    assert_eq!(function["inferenceUrl"], "/infer");
    assert_eq!(function["description"], "echo");
    assert_eq!(
        function["health"],
        json!({"protocol": "HTTP", "uri": "/v2/health/ready", "timeout": "PT10S", "expectedStatusCode": 200})
    );
    assert_eq!(function["functionType"], "DEFAULT");
    assert!(function.get("inferencePort").is_none(), "null is left out");
    weir.get(&deployments)
        .await
        .problem(404, "not-found", "not deployed");
    let queue = format!("/v2/nvcf/queues/functions/{f}");
    weir.get(&queue)
        .await
        .problem(404, "not-found", "deploy a version");

    let body = spec(
        "autoscalingConfiguration",
        json!({"scaleUpDetails": {"factor": 2, "threshold": 70}}),
    );
    let deployed = weir.post(&deployments, body.clone()).await.ok();
    let d = &deployed["deployment"];
    assert_eq!(d["functionStatus"], "ACTIVE", "minInstances 0");
    let one = &d["deploymentSpecifications"][0];
    assert_eq!(one["maxRequestConcurrency"], 1);
    assert_eq!(
        one["autoscalingConfiguration"]["scaleUpDetails"]["factor"],
        2
    );
    weir.post(&deployments, body.clone())
        .await
        .problem(400, "bad-request", "is deployed");
    let by_id = format!(
        "/v2/nvcf/deployments/{}",
        d["deploymentId"].as_str().unwrap()
    );
    assert_eq!(weir.get(&by_id).await.ok(), deployed);
    assert_eq!(weir.get(&queue).await.ok()["queues"][0]["queueDepth"], 3);

    let specification = format!(
        "{by_id}/gpu-specifications/{}",
        one["gpuSpecificationId"].as_str().unwrap()
    );
    weir.call(ADMIN, "PATCH", &specification, json!({}))
        .await
        .problem(400, "bad-request", "is needed");
    weir.call(ADMIN, "PATCH", &specification, json!({"minInstances": 9}))
        .await
        .problem(409, "conflict", "more than maxInstances");
    let patch =
        json!({"minInstances": 1, "autoscalingConfigurationPolicy": "platform_configuration"});
    let patched = weir.call(ADMIN, "PATCH", &specification, patch).await.ok();
    assert_eq!(patched["gpuSpecification"]["minInstances"], 1);
    assert!(
        patched["gpuSpecification"]
            .get("autoscalingConfiguration")
            .is_none()
    );
    let step = |details: Value| {
        let body = spec("autoscalingConfiguration", details);
        with(body, "autoscaling", json!({"policy": "nvcf-step"}))
    };
    for (details, why) in [
        (
            json!({"scaleUpDetails": {"factor": 2, "threshold": 20}}),
            "can't be above",
        ),
        (
            json!({"scaleUpDetails": {"factor": 2, "threshold": 70, "metric": "latency"}}),
            "utilization",
        ),
    ] {
        weir.call(ADMIN, "PUT", &deployments, step(details))
            .await
            .problem(409, "conflict", why);
    }
    let put = with(
        spec("maxRequestConcurrency", json!(7)),
        "queue",
        json!({"maxRequests": 5}),
    );
    let put = weir.call(ADMIN, "PUT", &deployments, put).await.ok();
    assert_eq!(
        put["deployment"]["deploymentSpecifications"][0]["maxRequestConcurrency"],
        7
    );
    assert_eq!(put["deployment"]["queue"]["maxRequests"], 5);

    let gone = weir
        .call(
            ADMIN,
            "DELETE",
            &format!("{deployments}?graceful=true"),
            json!({}),
        )
        .await
        .ok();
    assert_eq!(gone["function"]["status"], "INACTIVE");
    for path in [&queue, &format!("{queue}/versions/{v}")] {
        let draining = weir.get(path).await.ok();
        assert_eq!(draining["queues"][0]["functionStatus"], "INACTIVE");
        assert_eq!(draining["queues"][0]["queueDepth"], 3, "it still drains");
    }
    weir.post(&deployments, body.clone())
        .await
        .problem(400, "bad-request", "being undeployed");
    weir.call(ADMIN, "DELETE", &deployments, json!({}))
        .await
        .ok();
    weir.call(ADMIN, "DELETE", &deployments, json!({}))
        .await
        .problem(404, "not-found", "not deployed");
    weir.get(&queue)
        .await
        .problem(404, "not-found", "deploy a version");

    weir.post(&deployments, body).await.ok();
    let limit = format!("/v2/nvcf/ratelimit/functions/{f}/versions/{v}");
    let limited = weir
        .call(
            ADMIN,
            "PUT",
            &limit,
            json!({"rateLimit": "10-S", "syncCheck": true}),
        )
        .await;
    assert_eq!(limited.status, 204);
    for path in [
        &version,
        &format!("/v2/nvcf/metadata/functions/{f}/versions/{v}"),
    ] {
        let updated = weir
            .call(ADMIN, "PUT", path, json!({"tags": ["a:b"]}))
            .await
            .ok();
        assert_eq!(updated["function"]["tags"], json!(["a:b"]));
        assert_eq!(
            updated["function"]["rateLimit"],
            json!({"rateLimit": "10-S", "syncCheck": true})
        );
    }
    assert_eq!(
        weir.call(ADMIN, "DELETE", &limit, json!({})).await.status,
        204
    );

    assert_eq!(
        weir.call(ADMIN, "DELETE", &version, json!({})).await.status,
        204
    );
    weir.get(&version)
        .await
        .problem(404, "unknown-function", "there is no function");
    let f: FunctionId = f.parse().unwrap();
    let (left, _) = weir.context.store.list(Partition::of(f), "").await.unwrap();
    assert!(
        left.is_empty(),
        "the deployment went with its version: {left:?}"
    );
}

#[tokio::test]
async fn a_wrong_function_is_refused_with_the_reason() {
    let weir = weir().await;
    let long = "x".repeat(257);
    let health =
        json!({"protocol": "http", "uri": "/h", "timeout": "PT1S", "expectedStatusCode": 200});
    let cases = [
        ("name", json!("-x"), "name:"),
        ("name", json!(""), "name:"),
        ("name", json!(5), "name: has to be a string, not 5"),
        (
            "inferencePort",
            json!("x"),
            "inferencePort: has to be a whole number from 0 to 65535, not \"x\"",
        ),
        ("inferencePort", json!(70000), "inferencePort:"),
        ("description", json!(long), "256"),
        ("tags", json!(["a b"]), "tags[0]"),
        ("containerImage", json!("img"), "use process or endpoints"),
        ("helmChart", json!("chart"), "helmChart"),
        ("models", json!([{"name": "m"}]), "models"),
        ("secrets", json!([{"name": "m"}]), "secrets"),
        ("telemetries", json!({"a": 1}), "telemetries"),
        ("functionType", json!("LLM"), "functionType"),
        ("endpoints", json!(["http://a:1"]), "together"),
        (
            "health",
            with(health.clone(), "protocol", json!("gRPC")),
            "health.protocol",
        ),
        (
            "health",
            with(health.clone(), "timeout", json!("10")),
            "health.timeout",
        ),
        (
            "health",
            with(health.clone(), "timeout", json!("PT0S")),
            "health.timeout: has to be above 0",
        ),
        ("health", json!({"uri": "/h"}), "health.protocol: is needed"),
        (
            "rateLimit",
            json!({"rateLimit": "10-S,5-S"}),
            "rateLimit.rateLimit",
        ),
        ("rateLimit", json!({"syncCheck": true}), "is needed"),
        ("rateLimit", json!({"rateLimit": "01-S"}), "is not a rate"),
        (
            "rateLimit",
            json!({"rateLimit": "1-S, 5-M"}),
            "is not a rate",
        ),
        ("tags", json!(vec!["a"; 65]), "at most 64"),
        ("healthUri", json!("http://a/b"), "healthUri"),
        ("inferenceUrl", json!("/a b"), "inferenceUrl"),
        ("inferenceUrl", json!("/a#b"), "inferenceUrl"),
        ("inferenceUrl", json!("/grpc"), "gRPC function"),
        ("inferenceUrl", json!("grpc"), "gRPC function"),
        ("apiBodyFormat", json!("V3"), "apiBodyFormat"),
        ("process", json!({"command": []}), "process.command"),
        (
            "process",
            json!({"command": ["a"], "workingDir": "/a\0b"}),
            "process.workingDir",
        ),
        (
            "process",
            json!({"command": ["a"], "env": [{"key": "A", "value": ""}, {"key": "PORT", "value": "1"}]}),
            "process.env[1]: PORT is Weir's to set",
        ),
        (
            "process",
            json!({"command": ["a"], "env": [{"key": "WEIR_INSTANCE_ID", "value": "1"}]}),
            "process.env[0]: WEIR_INSTANCE_ID is Weir's to set",
        ),
        (
            "process",
            json!({"command": ["a"], "env": [{"key": "CUDA_VISIBLE_DEVICES", "value": "0,1"}]}),
            "process.env[0]: CUDA_VISIBLE_DEVICES is Weir's to set",
        ),
        (
            "process",
            json!({"command": ["a"], "env": [{"key": "NVCF_NCA_ID", "value": "other"}]}),
            "process.env[0]: NVCF_NCA_ID is Weir's to set",
        ),
        (
            "process",
            json!({"command": ["a", 5]}),
            "process.command[1]",
        ),
    ];
    for (member, value, says) in cases {
        weir.post("/v2/nvcf/functions", with(echo(), member, value))
            .await
            .problem(400, "bad-request", says);
    }
    let endpoints = |all: Value| json!({"name": "e", "inferenceUrl": "/", "endpoints": all});
    for (all, says) in [
        (json!([]), "at least one"),
        (json!(["ftp://a:1"]), "https://"),
        (json!(["https://169.254.169.254"]), "link-local"),
        (json!(["http://169.254.169.254:80"]), "link-local"),
        (json!(["http://[fe80::1]:80"]), "link-local"),
        (json!(["http://[::ffff:169.254.1.1]:80"]), "link-local"),
        (json!(["http://a"]), "port"),
        (json!(["http://[ffaaec062e]:80"]), "IPv6"),
        (json!(["http://a:1", "http://A:1/"]), "twice"),
        (json!(["https://a", "https://a:443/"]), "twice"),
        (json!(["http://u@a:1"]), "host and a port only"),
    ] {
        weir.post("/v2/nvcf/functions", endpoints(all))
            .await
            .problem(400, "bad-request", says);
    }
    let by_health = |port: u16| {
        with(
            endpoints(json!(["http://[::1]:80"])),
            "health",
            with(health.clone(), "port", json!(port)),
        )
    };
    let served = |port: u16| {
        with(
            endpoints(json!(["http://localhost:80"])),
            "inferencePort",
            json!(port),
        )
    };
    for (body, says) in [
        (
            endpoints(json!(["http://127.0.0.1:20000"])),
            "its port is among",
        ),
        (
            endpoints(json!(["http://LOCALHOST:29999"])),
            "--instance-ports",
        ),
        (by_health(20_000), "health.port is among"),
        (served(20_000), "inferencePort is among"),
    ] {
        weir.post("/v2/nvcf/functions", body)
            .await
            .problem(400, "bad-request", says);
    }
    for body in [
        endpoints(json!(["http://192.0.2.1:20000", "http://127.0.0.1:19999"])),
        by_health(30_000),
    ] {
        weir.post("/v2/nvcf/functions", body).await.ok();
    }
    weir.post(
        "/v2/nvcf/functions",
        json!({"name": "a", "inferenceUrl": "/"}),
    )
    .await
    .problem(400, "bad-request", "either process or endpoints");
    weir.post(
        "/v2/nvcf/functions",
        with(
            with(echo(), "health", health),
            "functionType",
            json!("streaming"),
        ),
    )
    .await
    .ok();
}

#[tokio::test]
async fn a_long_health_timeout_is_taken() {
    let weir = weir().await;
    for timeout in ["PT1M", "PT1M1S", "PT2H"] {
        let health =
            json!({"protocol": "HTTP", "uri": "/", "timeout": timeout, "expectedStatusCode": 200});
        let body = with(echo(), "health", health);
        let made = weir.post("/v2/nvcf/functions", body).await.ok();
        assert_eq!(made["function"]["health"]["timeout"], timeout);
    }
}

#[tokio::test]
async fn a_body_format_is_echoed() {
    let weir = weir().await;
    for (given, echoed) in [
        ("PREDICT_V2", "PREDICT_V2"),
        ("predict_v2", "PREDICT_V2"),
        ("custom", "CUSTOM"),
    ] {
        let body = with(echo(), "apiBodyFormat", json!(given));
        let made = weir.post("/v2/nvcf/functions", body).await.ok();
        assert_eq!(made["function"]["apiBodyFormat"], echoed);
    }
    // Only the very path means gRPC.
    let body = with(echo(), "inferenceUrl", json!("/grpc/infer"));
    weir.post("/v2/nvcf/functions", body).await.ok();
}

#[tokio::test]
async fn a_wrong_deployment_is_refused_with_the_reason() {
    let weir = weir().await;
    let (f, v) = weir.function().await;
    let path = format!("/v2/nvcf/deployments/functions/{f}/versions/{v}");
    for (body, says) in [
        (
            spec("minInstances", json!(-1)),
            "deploymentSpecifications[0].minInstances",
        ),
        (spec("maxInstances", json!(0)), "at least 1"),
        (spec("maxInstances", json!(4097)), "may have 4096"),
        (spec("maxInstances", json!(u32::MAX)), "may have 4096"),
        (
            with(
                with(spec("gpu", json!("H100")), "none", json!(1)),
                "deploymentSpecifications",
                json!([{"gpu": "H100", "instanceType": "H100_0x", "minInstances": 0, "maxInstances": 1}]),
            ),
            "'H100_0x' has no GPU",
        ),
        (spec("maxRequestConcurrency", json!(16385)), "16384"),
        (spec("maxRequestConcurrency", json!(0)), "16384"),
        (spec("gpu", json!("H100")), "instanceType"),
        (spec("configuration", json!({"a": 1})), "Helm"),
        (
            with(
                spec("regions", json!([])),
                "autoscaling",
                json!({"targetUtilization": 0}),
            ),
            "targetUtilization",
        ),
        (
            with(
                spec("regions", json!([])),
                "autoscaling",
                json!({"policy": "best"}),
            ),
            "autoscaling.policy",
        ),
        (
            with(spec("regions", json!([])), "startTimeout", json!("PT0S")),
            "startTimeout",
        ),
        (
            with(spec("regions", json!([])), "startTimeout", json!("-PT1S")),
            "startTimeout",
        ),
        (json!({"deploymentSpecifications": []}), "at least one"),
    ] {
        weir.post(&path, body)
            .await
            .problem(400, "bad-request", says);
    }
    // Nothing is wrong with any of them by itself.
    for (member, value, says) in [
        (
            "deploymentSpecifications",
            json!([{"gpu": "none", "minInstances": 3, "maxInstances": 2}]),
            "deploymentSpecifications[0].minInstances: 3 is more than maxInstances, 2",
        ),
        (
            "deploymentSpecifications",
            json!([
                {"gpu": "none", "minInstances": 0, "maxInstances": 4096},
                {"gpu": "none", "minInstances": 0, "maxInstances": 1}
            ]),
            "maxInstances: 4097 in all",
        ),
        ("queue", json!({"maxBytes": 1}), "queue.holdBytes"),
        (
            "autoscaling",
            json!({"panicWindow": "PT2M"}),
            "autoscaling.panicWindow",
        ),
    ] {
        weir.post(&path, with(spec("regions", json!([])), member, value))
            .await
            .problem(409, "conflict", says);
    }
    let fixed = weir
        .post(
            "/v2/nvcf/functions",
            with(echo(), "inferencePort", json!(8000)),
        )
        .await
        .ok();
    let endpoints = json!({"name": "e", "inferenceUrl": "/", "endpoints": ["http://10.0.0.1:80"]});
    let servers = weir.post("/v2/nvcf/functions", endpoints).await.ok();
    for (made, says) in [(fixed, "inferencePort"), (servers, "1 endpoints")] {
        let id = |m: &str| made["function"][m].as_str().unwrap().to_owned();
        let path = format!(
            "/v2/nvcf/deployments/functions/{}/versions/{}",
            id("id"),
            id("versionId")
        );
        weir.post(&path, spec("regions", json!([])))
            .await
            .problem(409, "conflict", says);
        weir.post(&path, spec("maxInstances", json!(1))).await.ok();
    }
}

#[tokio::test]
async fn requests_are_read_strictly() {
    let weir = weir().await;
    let functions = "/v2/nvcf/functions";
    let raw = |kind: &'static str, body: String| weir.raw(ADMIN, "POST", functions, kind, body);
    raw(
        "application/json",
        r#"{"name":"a","x":{"y":1,"y":2}}"#.into(),
    )
    .await
    .problem(400, "bad-request", "'y' comes twice");
    raw("application/json", "{".into())
        .await
        .problem(400, "bad-request", "not valid JSON");
    raw("application/json", "[]".into())
        .await
        .problem(400, "bad-request", "JSON object");
    // A whole number, however it is written.
    let port = |text: &str| {
        echo()
            .to_string()
            .replacen('{', &format!(r#"{{"inferencePort":{text},"#), 1)
    };
    for text in ["8e3", "8000.0"] {
        let made = raw("application/json", port(text)).await.ok();
        assert_eq!(made["function"]["inferencePort"], 8000);
    }
    raw("application/json", port("8000.5"))
        .await
        .problem(400, "bad-request", "inferencePort");
    raw("text/plain", echo().to_string())
        .await
        .problem(400, "bad-request", "application/json");
    raw("application/json", "x".repeat((1 << 20) + 1))
        .await
        .problem(413, "body-too-large", "1 MiB");
    weir.get("/v2/nvcf/functions/x/versions")
        .await
        .problem(400, "bad-request", "functionId: 'x'");
    weir.get("/v2/nvcf/functions?visibility=none")
        .await
        .problem(400, "bad-request", "visibility");
    weir.get("/v2/nvcf/nothing")
        .await
        .problem(404, "not-found", "/openapi.json");
    let wrong = weir.call(ADMIN, "PATCH", functions, json!({})).await;
    assert!(wrong.headers.contains_key("allow"));
    wrong.problem(405, "bad-request", "method");
}

#[tokio::test]
async fn keys_open_what_their_scopes_say() {
    let weir = weir().await;
    let list = "/v2/nvcf/functions";
    weir.call("weir_no", "GET", list, json!({}))
        .await
        .problem(401, "unauthenticated", "not known");
    let nobody = Request::get(list).body(Body::empty()).unwrap();
    let nobody = weir.router.clone().oneshot(nobody).await.unwrap();
    assert_eq!(nobody.status(), 401);
    assert_eq!(nobody.headers()["www-authenticate"], "Bearer");

    let keys = "/v2/weir/keys";
    weir.post(keys, json!({"name": "k", "scopes": ["all"]}))
        .await
        .problem(400, "bad-request", "register_process");
    weir.post(keys, json!({"name": "k", "scopes": [], "priority": 10}))
        .await
        .problem(400, "bad-request", "priority");
    let past = json!({"name": "k", "scopes": [], "expiresAt": "2000-01-01T00:00:00Z"});
    weir.post(keys, past)
        .await
        .problem(409, "conflict", "in the past");
    let scopes = json!([
        "account_setup",
        "register_function",
        "list_functions",
        "register_endpoints"
    ]);
    let made = weir
        .post(keys, json!({"name": "k", "scopes": scopes}))
        .await
        .ok();
    let secret = made["secret"].as_str().unwrap();
    assert_eq!(secret.len(), 48);
    assert!(!weir.get(keys).await.ok().to_string().contains(secret));
    weir.call(secret, "POST", list, echo())
        .await
        .problem(403, "forbidden", "register_process");
    let (f, v) = weir.function().await;
    weir.call(
        secret,
        "DELETE",
        &format!("{list}/{f}/versions/{v}"),
        json!({}),
    )
    .await
    .problem(403, "forbidden", "delete_function");
    let seen = weir
        .call(
            secret,
            "GET",
            &format!("{list}/{f}/versions/{v}"),
            json!({}),
        )
        .await
        .ok();
    assert!(
        seen["function"].get("process").is_none(),
        "details have a scope of their own"
    );
    weir.call(
        secret,
        "POST",
        keys,
        json!({"name": "k", "scopes": ["invoke_function"]}),
    )
    .await
    .problem(403, "forbidden", "invoke_function");
    weir.call(
        secret,
        "GET",
        "/v2/nvcf/accounts/default/functions",
        json!({}),
    )
    .await
    .problem(403, "forbidden", "admin");
    let limited =
        json!({"name": "l", "scopes": ["list_functions"], "functions": [FunctionId::random()]});
    let limited = weir.key(limited).await;
    weir.call(&limited, "GET", &format!("{list}/{f}/versions"), json!({}))
        .await
        .problem(403, "forbidden", "may not name");
    assert_eq!(
        weir.call(&limited, "GET", list, json!({})).await.ok()["functions"],
        json!([])
    );

    let id = format!("{keys}/{}", made["key"]["id"].as_str().unwrap());
    assert_eq!(weir.get(&id).await.ok()["key"]["name"], "k");
    assert_eq!(weir.call(ADMIN, "DELETE", &id, json!({})).await.status, 204);
    weir.call(secret, "GET", list, json!({}))
        .await
        .problem(401, "unauthenticated", "revoked");
}

#[tokio::test]
async fn an_expired_key_is_nobody() {
    let weir = weir().await;
    let secret = weir
        .key(json!({"name": "k", "scopes": [], "expiresAt": "2999-01-01T00:00:00Z"}))
        .await;
    let header = http::HeaderValue::from_str(&format!("BEARER {secret}")).unwrap();
    let at = |when: &str| {
        auth::authenticate(
            &weir.context.directory,
            None,
            Some(&header),
            when.parse().unwrap(),
        )
    };
    assert!(at("2998-01-01T00:00:00Z").is_ok());
    assert_eq!(
        at("2999-01-01T00:00:00Z").unwrap_err(),
        auth::Denied::Expired
    );
}

#[tokio::test]
async fn accounts_see_their_own_and_what_is_shared() {
    let weir = weir().await;
    for name in ["a", "b"] {
        weir.post("/v2/nvcf/accounts", json!({"ncaId": name, "name": name}))
            .await
            .ok();
    }
    weir.post("/v2/nvcf/accounts", json!({"ncaId": "a", "name": "x"}))
        .await
        .problem(409, "conflict", "there already");
    weir.post("/v2/nvcf/accounts", json!({"ncaId": "a/b", "name": "x"}))
        .await
        .problem(400, "bad-request", "ncaId");
    let a = weir
        .key(json!({"name": "a", "account": "a", "scopes": SCOPES}))
        .await;
    let b = weir
        .key(json!({"name": "b", "account": "b", "scopes": SCOPES}))
        .await;
    let made = weir
        .call(&a, "POST", "/v2/nvcf/functions", echo())
        .await
        .ok();
    assert_eq!(made["function"]["ncaId"], "a");
    let (f, v) = (
        made["function"]["id"].as_str().unwrap(),
        made["function"]["versionId"].as_str().unwrap(),
    );
    let path = format!("/v2/nvcf/functions/{f}/versions/{v}");
    let shares = format!("/v2/nvcf/authorizations/functions/{f}");
    weir.call(&b, "GET", &path, json!({}))
        .await
        .problem(404, "unknown-function", "no function");
    weir.call(&b, "DELETE", &path, json!({}))
        .await
        .problem(404, "unknown-function", "no function");
    weir.call(
        &a,
        "POST",
        &shares,
        json!({"authorizedParties": [{"ncaId": "b"}, {"ncaId": "*"}]}),
    )
    .await
    .problem(400, "bad-request", "alone");
    let shared = weir
        .call(
            &a,
            "POST",
            &shares,
            json!({"authorizedParties": [{"ncaId": "b"}, {"ncaId": "b", "clientId": "c"}]}),
        )
        .await
        .ok();
    assert_eq!(
        shared["function"]["authorizedParties"],
        json!([{"ncaId": "b"}])
    );
    let seen = weir.call(&b, "GET", &path, json!({})).await.ok();
    assert_eq!(seen["function"]["ownedByDifferentAccount"], true);
    assert!(seen["function"].get("process").is_none());
    weir.call(&b, "DELETE", &path, json!({}))
        .await
        .problem(403, "forbidden", "another account");
    let ids = |query: &'static str| {
        let path = format!("/v2/nvcf/functions/ids{query}");
        let (weir, b) = (&weir, &b);
        async move { weir.call(b, "GET", &path, json!({})).await.ok()["functionIds"].clone() }
    };
    assert_eq!(ids("").await, json!([f]));
    assert_eq!(
        ids("?visibility=private&visibility=public").await,
        json!([])
    );
    assert_eq!(ids("?visibility=AUTHORIZED").await, json!([f]));
    let one = |id: &str| json!({"authorizedParty": {"ncaId": id}});
    weir.call(&a, "PATCH", &format!("{shares}/add"), one("c"))
        .await
        .ok();
    let left = weir
        .call(&a, "PATCH", &format!("{shares}/remove"), one("b"))
        .await
        .ok();
    assert_eq!(
        left["function"]["authorizedParties"],
        json!([{"ncaId": "c"}])
    );
    weir.call(&a, "PATCH", &format!("{shares}/remove"), one("b"))
        .await
        .problem(409, "conflict", "'b' is not among those");
    let of_version = format!("{shares}/versions/{v}");
    weir.call(
        &a,
        "POST",
        &of_version,
        json!({"authorizedParties": [{"ncaId": "*"}]}),
    )
    .await
    .ok();
    weir.call(&a, "PATCH", &format!("{shares}/add"), one("*"))
        .await
        .problem(409, "conflict", "alone");
    weir.call(ADMIN, "DELETE", "/v2/nvcf/accounts/default", json!({}))
        .await
        .problem(409, "conflict", "always there");
    assert_eq!(ids("?visibility=public").await, json!([f]));
    weir.call(&a, "DELETE", &of_version, json!({})).await.ok();
    assert_eq!(ids("").await, json!([]));

    let twin = format!("/v2/nvcf/accounts/a/functions/{f}/versions/{v}");
    assert_eq!(weir.get(&twin).await.ok()["function"]["versionId"], v);
    weir.get(&twin.replace("/a/", "/b/"))
        .await
        .problem(404, "unknown-function", "no function");
    weir.get(&twin.replace("/a/", "/z/"))
        .await
        .problem(404, "not-found", "no account");
    let made = weir
        .post("/v2/nvcf/accounts/b/functions", echo())
        .await
        .ok();
    assert_eq!(made["function"]["ncaId"], "b");
    assert_eq!(
        weir.get("/v2/nvcf/accounts/b/deployments").await.ok()["deployments"],
        json!([])
    );
    weir.call(ADMIN, "DELETE", "/v2/nvcf/accounts/b", json!({}))
        .await
        .problem(409, "conflict", "1 functions");
    weir.call(&b, "GET", "/v2/nvcf/accounts/a", json!({}))
        .await
        .problem(404, "not-found", "no account");
}

#[tokio::test]
async fn a_limit_on_functions_holds_for_many_at_once() {
    let weir = weir_with(5).await;
    let many = (0..12).map(|_| weir.post("/v2/nvcf/functions", echo()));
    let answers = futures_util::future::join_all(many).await;
    let made = answers.iter().filter(|a| a.status == 200).count();
    assert_eq!(made, 5);
    weir.post("/v2/nvcf/functions", echo())
        .await
        .problem(400, "bad-request", "5");
    let one = weir.context.directory.views()[0].versions[0]
        .version
        .clone();
    let path = format!("/v2/nvcf/functions/{}/versions", one.function);
    weir.post(&path, echo()).await.ok();
    weir.call(
        ADMIN,
        "DELETE",
        &format!("/v2/nvcf/functions/{}/versions/{}", one.function, one.id),
        json!({}),
    )
    .await;
}

#[tokio::test]
async fn deploying_and_deleting_at_once_leaves_no_orphan() {
    let weir = weir().await;
    for _ in 0..20 {
        let (f, v) = weir.function().await;
        let (version, deployment) = (
            format!("/v2/nvcf/functions/{f}/versions/{v}"),
            format!("/v2/nvcf/deployments/functions/{f}/versions/{v}"),
        );
        let shares = format!("/v2/nvcf/authorizations/functions/{f}/versions/{v}");
        let all = json!({"authorizedParties": [{"ncaId": "*"}]});
        let (deployed, shared, deleted) = tokio::join!(
            weir.post(&deployment, spec("regions", json!([]))),
            weir.post(&shares, all),
            weir.call(ADMIN, "DELETE", &version, json!({})),
        );
        assert_eq!(deleted.status, 204);
        assert!(
            [200, 404].contains(&deployed.status.as_u16()),
            "{}",
            deployed.body
        );
        assert!(
            [200, 404].contains(&shared.status.as_u16()),
            "{}",
            shared.body
        );
        let f: FunctionId = f.parse().unwrap();
        let (left, _) = weir
            .context
            .store
            .list(Partition::of(f), &f.to_string())
            .await
            .unwrap();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[tokio::test]
async fn what_runs_is_shown() {
    let weir = weir().await;
    let (f, v) = weir.function().await;
    let path = format!("/v2/nvcf/deployments/functions/{f}/versions/{v}");
    weir.post(&path, spec("minInstances", json!(1))).await.ok();
    let view = weir.context.directory.view(f.parse().unwrap()).unwrap();
    let deployment = view.versions[0].deployment.clone().unwrap();
    let id = InstanceId::random();
    weir.context.directory.put_instance(Instance {
        id,
        function_id: deployment.function,
        function_version_id: deployment.version,
        deployment_id: deployment.id,
        gpu_specification_id: deployment.specifications[0].id,
        node: "local".into(),
        state: InstanceState::Ready,
        address: None,
        server_name: None,
        capacity: 1,
        pid: None,
        created_at: Timestamp::now(),
        spawned_at: None,
        first_healthy_at: None,
        restarts: 0,
        error: None,
        failure: None,
        last_log_line: None,
        gpus: vec![],
    });
    let got = weir
        .get(&format!("/v2/nvcf/functions/{f}/versions/{v}"))
        .await
        .ok();
    assert_eq!(got["function"]["status"], "ACTIVE");
    assert_eq!(
        got["function"]["activeInstances"][0]["instanceStatus"],
        "ACTIVE"
    );
    let instances = "/v2/weir/instances";
    assert_eq!(
        weir.get(&format!("{instances}?functionVersionId={v}"))
            .await
            .ok()["instances"][0]["id"],
        id.to_string()
    );
    let logs = weir.get(&format!("{instances}/{id}/logs?tail=7")).await;
    assert_eq!(logs.headers["content-type"], "text/plain; charset=utf-8");
    assert_eq!(logs.ok(), "7 lines\n");
    weir.get(&format!("{instances}/{}", InstanceId::random()))
        .await
        .problem(404, "not-found", "no instance");
    weir.get(&format!("/v2/weir/decisions?version={v}"))
        .await
        .ok();
    weir.get("/v2/weir/nodes").await.ok();
    let groups = weir.get("/v2/nvcf/clusterGroups").await.ok();
    assert_eq!(
        groups["clusterGroups"][0]["gpus"][0]["instanceTypes"]
            .as_array()
            .unwrap()
            .len(),
        4
    );
    assert_eq!(
        weir.get("/v2/nvcf/supportedGpus").await.ok()[0]["gpu"],
        "H100"
    );
    weir.get(&format!("/v2/nvcf/queues/{}/position", Uuid::new_v4()))
        .await
        .problem(404, "not-found", "no queue");
}

#[tokio::test]
async fn the_logs_of_an_instance_that_is_gone_are_its_accounts() {
    let weir = weir().await;
    let account = async |name: &str| {
        let made = json!({"ncaId": name, "name": name});
        weir.post("/v2/nvcf/accounts", made).await.ok();
        let scopes = json!(["list_functions_details"]);
        weir.key(json!({"name": name, "account": name, "scopes": scopes}))
            .await
    };
    let (a, b) = (account("a").await, account("b").await);
    let function = FunctionId::random();
    let gone = |since: Timestamp| {
        let (id, account) = (InstanceId::random(), AccountId("a".into()));
        let version = VersionId::random();
        weir.still.log_owners.lock().unwrap().insert(
            id,
            LogOwner {
                account,
                function,
                version,
                since,
            },
        );
        format!("/v2/weir/instances/{id}/logs")
    };
    let logs = gone(Timestamp::now());
    for key in [&a, ADMIN] {
        let read = weir.call(key, "GET", &logs, json!({})).await.ok();
        assert_eq!(read, "1000 lines\n");
    }
    let limited = json!({"name": "l", "account": "a", "scopes": ["list_functions_details"], "functions": [FunctionId::random()]});
    let limited = weir.key(limited).await;
    // Of one that had the account's name before.
    let older = gone(Timestamp::UNIX_EPOCH);
    for (key, path) in [(&b, &logs), (&limited, &logs), (&a, &older)] {
        weir.call(key, "GET", path, json!({}))
            .await
            .problem(404, "not-found", "no instance");
    }
}

#[tokio::test]
async fn the_description_is_whole() {
    let weir = weir().await;
    let text = weir.get("/openapi.json").await.ok();
    _ = serde_json::from_value::<OpenApi>(text.clone()).unwrap();
    let mut names = HashSet::new();
    let mut count = 0;
    for (path, item) in text["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            count += 1;
            let name = operation["operationId"].as_str().unwrap();
            assert!(
                names.insert(name.to_owned()),
                "{method} {path}: {name} is there twice"
            );
            let given: Vec<&str> = operation["parameters"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|p| p["in"] == "path")
                .filter_map(|p| p["name"].as_str())
                .collect();
            for part in path.split('/').filter_map(|p| p.strip_prefix('{')) {
                let part = part.trim_end_matches('}');
                assert!(given.contains(&part), "{method} {path} lacks {part}");
            }
            // The route is there: what it answers is not the fallback's.
            let call = path.replace("{", "").replace("}", "");
            let answer = weir
                .call("none", &method.to_uppercase(), &call, json!({}))
                .await;
            assert_eq!(answer.status, 401, "{method} {path}");
        }
    }
    assert_eq!(count, 2 * 32 + 1 + 5 + 9, "each route is described");
    for (path, item) in text["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let at = format!("{method} {path}");
            let says = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
            assert!(says(&operation["summary"]), "{at}");
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                assert!(says(&parameter["description"]), "{at}: {parameter}");
            }
            let statuses: Vec<&String> =
                operation["responses"].as_object().unwrap().keys().collect();
            for (status, answer) in operation["responses"].as_object().unwrap() {
                let described = says(&answer["description"]) || answer.get("$ref").is_some();
                assert!(described, "{at}: {status}");
            }
            let expected = |status: &str| statuses.iter().any(|s| *s == status);
            assert!(expected("401") && expected("403"), "{at}: {statuses:?}");
            assert_eq!(expected("503"), expected("500"), "{at}");
            let body = operation.get("requestBody").is_some();
            assert_eq!(body, expected("413"), "{at}");
            assert!(!body || expected("400"), "{at}");
            assert!(method == "get" || expected("503"), "{at}");
        }
    }
    for (name, schema) in text["components"]["schemas"].as_object().unwrap() {
        for (member, property) in schema["properties"].as_object().into_iter().flatten() {
            let says = property["description"].as_str().unwrap_or_default();
            assert!(!says.is_empty(), "{name}.{member}");
        }
    }
    let all = text.to_string();
    for reference in all.split("\"#/components/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(
            text["components"].pointer(&format!("/{name}")).is_some(),
            "{name} is not described"
        );
    }
}

#[tokio::test]
async fn what_is_made_is_linked_to_what_can_be_done_with_it() {
    let weir = weir().await;
    let text = weir.get("/openapi.json").await.ok();
    let mut names: HashMap<&str, HashSet<&str>> = HashMap::new();
    for (path, item) in text["paths"].as_object().unwrap() {
        for operation in item.as_object().unwrap().values() {
            let parts = path.split('/').filter_map(|part| part.strip_prefix('{'));
            names.insert(
                operation["operationId"].as_str().unwrap(),
                parts.map(|part| part.trim_end_matches('}')).collect(),
            );
        }
    }
    let mut count = 0;
    for item in text["paths"].as_object().unwrap().values() {
        let links = item["post"]["responses"]["200"]["links"].as_object();
        for link in links.into_iter().flatten().map(|(_, link)| link) {
            count += 1;
            let given = link["parameters"].as_object().unwrap();
            let given: HashSet<&str> = given.keys().map(String::as_str).collect();
            assert_eq!(given, names[link["operationId"].as_str().unwrap()]);
        }
    }
    assert!(count > 100, "{count}");
    for (path, who) in [("", ""), ("/accounts/{ncaId}", "admin_")] {
        for made in ["/functions", "/functions/{functionId}/versions"] {
            let post = &text["paths"][format!("/v2/nvcf{path}{made}")]["post"];
            let links = &post["responses"]["200"]["links"];
            for target in ["functions_read", "functions_update", "deployments_create"] {
                let given = &links[format!("{who}{target}")]["parameters"];
                assert_eq!(given["functionId"], "$response.body#/function/id");
                let version = &given["functionVersionId"];
                assert_eq!(version, "$response.body#/function/versionId");
            }
        }
    }
}

#[tokio::test]
async fn the_admin_key_survives_a_crash_between_file_and_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(&dir.path().join("state")).unwrap();
    let made = auth::ensure_admin_key(&*store, dir.path(), None)
        .await
        .unwrap();
    let file = made.file.unwrap();
    let secret = std::fs::read_to_string(&file).unwrap();
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let (directory, _feed) = Directory::load(&*store).await.unwrap();
    assert!(directory.key_by_hash(&hash(secret.trim())).unwrap().admin);
    // The store never got the hash: the next start stores that of the same secret.
    let empty = Embedded::open(&dir.path().join("other")).unwrap();
    let again = auth::ensure_admin_key(&*empty, dir.path(), None)
        .await
        .unwrap();
    assert_eq!(again.file.as_deref(), Some(&*file));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), secret);
    let (directory, _feed) = Directory::load(&*empty).await.unwrap();
    assert!(directory.key_by_hash(&hash(secret.trim())).unwrap().admin);
    // A key of the environment wins, and nothing is written.
    let third = tempfile::tempdir().unwrap();
    let from_env = auth::ensure_admin_key(&*empty, third.path(), Some("mine".into()))
        .await
        .unwrap();
    assert_eq!(from_env.key.unwrap().hash, hash("mine"));
    assert!(!third.path().join("admin.key").exists());
    assert!(!format!("{:?} {}", auth::generate(), auth::generate()).contains("weir_A"));
}

/// A store whose commits fail, after they were carried out or before.
struct Lossy {
    store: Arc<dyn Store>,
    carries_out: bool,
    error: fn(String) -> StoreError,
}

#[async_trait::async_trait]
impl Store for Lossy {
    async fn get(&self, partition: Partition, key: &str) -> Result<Option<Record>, StoreError> {
        self.store.get(partition, key).await
    }
    async fn list(
        &self,
        partition: Partition,
        prefix: &str,
    ) -> Result<(Vec<Record>, Position), StoreError> {
        self.store.list(partition, prefix).await
    }
    async fn commit(&self, partition: Partition, changes: Vec<Change>) -> Result<u64, StoreError> {
        if self.carries_out {
            self.store.commit(partition, changes).await?;
        }
        Err((self.error)("the connection was cut".into()))
    }
    async fn watch(&self, cursor: Cursor) -> Result<Box<dyn Watch>, StoreError> {
        self.store.watch(cursor).await
    }
}

#[tokio::test]
async fn says_what_is_not_known_of_a_change() {
    let weir = weir().await;
    let over = |carries_out, error| Weir {
        router: router(Arc::new(Context {
            store: Arc::new(Lossy {
                store: weir.context.store.clone(),
                carries_out,
                error,
            }),
            directory: weir.context.directory.clone(),
            runtime: weir.still.clone(),
            admin: weir.context.admin.clone(),
            open: false,
            max_functions: 1000,
            listeners: vec![],
            instance_ports: 20000..=29999,
        })),
        context: weir.context.clone(),
        still: weir.still.clone(),
        _dir: tempfile::tempdir().unwrap(),
    };
    for carries_out in [false, true] {
        let cut = over(carries_out, StoreError::Unknown);
        let refused = over(false, StoreError::Unavailable);
        let (f, v) = weir.function().await;
        let changes = [
            ("POST", "/v2/nvcf/functions".into(), echo()),
            (
                "POST",
                "/v2/nvcf/accounts".into(),
                json!({"ncaId": format!("new-{carries_out}"), "name": "new"}),
            ),
            (
                "POST",
                "/v2/weir/keys".into(),
                json!({"name": "k", "scopes": ["invoke_function"]}),
            ),
            (
                "POST",
                format!("/v2/nvcf/authorizations/functions/{f}/versions/{v}"),
                json!({"authorizedParties": [{"ncaId": "*"}]}),
            ),
            (
                "POST",
                format!("/v2/nvcf/deployments/functions/{f}/versions/{v}"),
                spec("regions", json!([])),
            ),
            (
                "DELETE",
                format!("/v2/nvcf/functions/{f}/versions/{v}"),
                json!({}),
            ),
        ];
        for (method, path, body) in changes {
            refused
                .call(ADMIN, method, &path, body.clone())
                .await
                .problem(503, "store-unavailable", "nothing was changed");
            let answer = cut.call(ADMIN, method, &path, body).await;
            let detail = answer.body["detail"].to_string();
            assert!(!detail.contains("nothing"), "{method} {path}: {detail}");
            answer.problem(
                503,
                "store-unavailable",
                "the change may have been made: read",
            );
        }
        // Reading does tell.
        let left = weir
            .context
            .store
            .list(Partition::of(f.parse().unwrap()), &f);
        assert_eq!(left.await.unwrap().0.is_empty(), carries_out);
    }
}

#[tokio::test]
async fn the_admin_key_is_looked_for_where_its_commit_is_not_known() {
    let error = StoreError::Unknown;
    for carries_out in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Embedded::open(&dir.path().join("state")).unwrap();
        let lossy = Lossy {
            store: store.clone(),
            carries_out,
            error,
        };
        match auth::ensure_admin_key(&lossy, dir.path(), None).await {
            Ok(made) => assert!(carries_out && made.file.is_some()),
            Err(auth::AdminKeyError::Store(StoreError::Unknown(_))) => assert!(!carries_out),
            Err(other) => panic!("{other}"),
        }
        // The next start gets along with either.
        let again = auth::ensure_admin_key(&*store, dir.path(), None).await;
        assert!(again.unwrap().file.is_some());
    }
}

#[tokio::test]
async fn a_revoked_admin_key_stays_revoked() {
    let weir = weir().await;
    let dir = tempfile::tempdir().unwrap();
    let store = &*weir.context.store;
    let start = |variable: Option<String>| auth::ensure_admin_key(store, dir.path(), variable);
    let read = |file: &std::path::Path| std::fs::read_to_string(file).unwrap().trim().to_owned();
    let file = start(None).await.unwrap().file.unwrap();
    let first = read(&file);
    let path = format!("/v2/weir/keys/{}", auth::ADMIN_KEY);
    // The feed brings the key to the directory.
    while weir.context.directory.key(auth::ADMIN_KEY).is_none() {
        tokio::task::yield_now().await;
    }
    weir.call(&first, "DELETE", &path, json!({})).await.problem(
        409,
        "conflict",
        "can't revoke itself",
    );
    weir.call(
        ADMIN,
        "DELETE",
        &format!("/v2/weir/keys/{}", auth::ENVIRONMENT_KEY),
        json!({}),
    )
    .await
    .problem(409, "conflict", "WEIR_ADMIN_KEY");
    let revoked = weir.call(ADMIN, "DELETE", &path, json!({})).await;
    assert_eq!(revoked.status, 204);
    weir.call(&first, "GET", "/v2/weir/keys", json!({}))
        .await
        .problem(401, "unauthenticated", "revoked");

    // Neither the file nor the variable brings it back.
    for variable in [None, Some(first.clone())] {
        let none = start(variable).await.unwrap();
        assert!(none.key.is_none() && none.file.is_none());
    }
    let stored = record::key(auth::ADMIN_KEY);
    let stored = store.get(Partition::Keys, &stored).await.unwrap();
    assert!(stored.is_none());
    // Another variable does for a new one, and so does the file's removal; that of the old file's is still none.
    assert!(start(Some("another".into())).await.unwrap().key.is_some());
    std::fs::remove_file(&file).unwrap();
    let second = start(None).await.unwrap().file.unwrap();
    assert_ne!(read(&second), first);
    std::fs::write(&second, &first).unwrap();
    assert!(start(None).await.unwrap().file.is_none());
    let (directory, _feed) = Directory::load(store).await.unwrap();
    assert!(directory.key_by_hash(&hash(&first)).is_none());
    assert_eq!(directory.keys().iter().filter(|key| key.admin).count(), 1);
}

#[tokio::test]
async fn a_traffic_weight_can_be_taken_back() {
    let weir = weir().await;
    let (f, v) = weir.function().await;
    let path = format!("/v2/nvcf/deployments/functions/{f}/versions/{v}");
    let body = || spec("regions", json!([]));
    let weighed = |weight: Value| with(body(), "trafficWeight", weight);
    let weight = |answer: Value| answer["deployment"].get("trafficWeight").cloned();
    weir.post(&path, weighed(json!("x")))
        .await
        .problem(400, "bad-request", "trafficWeight");
    let made = weir.post(&path, weighed(json!(10))).await.ok();
    assert_eq!(weight(made), Some(json!(10)));
    for (body, left) in [
        (body(), Some(json!(10))),
        (weighed(json!(7)), Some(json!(7))),
        (weighed(Value::Null), None),
        (body(), None),
    ] {
        let put = weir.call(ADMIN, "PUT", &path, body).await.ok();
        assert_eq!(weight(put), left);
        let read = weir.get(&path).await.ok();
        assert_eq!(weight(read), left);
    }
    // Elsewhere `null` is nothing, as ever.
    let put = with(
        with(body(), "startTimeout", Value::Null),
        "queue",
        json!({"maxRequests": null}),
    );
    let put = weir.call(ADMIN, "PUT", &path, put).await.ok();
    assert_eq!(put["deployment"]["startTimeout"], "PT10M");
}

#[tokio::test]
async fn a_deleted_accounts_name_is_not_given_again() {
    let weir = weir().await;
    let accounts = "/v2/nvcf/accounts";
    let b = || json!({"ncaId": "b", "name": "b"});
    weir.post(accounts, b()).await.ok();
    let (f, _) = weir.function().await;
    let shares = format!("/v2/nvcf/authorizations/functions/{f}");
    let parties = json!({"authorizedParties": [{"ncaId": "b"}]});
    weir.post(&shares, parties).await.ok();
    let path = format!("{accounts}/b");
    let gone = weir.call(ADMIN, "DELETE", &path, json!({})).await;
    assert_eq!(gone.status, 204);
    weir.get(&path)
        .await
        .problem(404, "not-found", "no account");
    weir.call(ADMIN, "DELETE", &path, json!({}))
        .await
        .problem(404, "not-found", "no account");
    // Another tenant of that name would get what was the first one's: what was shared with it, its rates.
    weir.post(accounts, b())
        .await
        .problem(409, "conflict", "choose another ncaId");
    weir.post(
        "/v2/weir/keys",
        json!({"name": "k", "account": "b", "scopes": []}),
    )
    .await
    .problem(404, "not-found", "no account");
    let (directory, _feed) = Directory::load(&*weir.context.store).await.unwrap();
    assert!(directory.accounts().is_empty(), "after a start too");
    let listed = weir.get(accounts).await.ok();
    assert_eq!(listed["accounts"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_key_of_some_functions_stays_within_them() {
    let weir = weir().await;
    let ((mine, _), (other, v)) = (weir.function().await, weir.function().await);
    let made = |functions: Value| json!({"name": "k", "scopes": SCOPES, "functions": functions});
    let limited = weir.key(made(json!([mine]))).await;
    let call = |method: &'static str, path: String, body: Value| {
        let (weir, limited) = (&weir, &limited);
        async move { weir.call(limited, method, &path, body).await }
    };
    let keys = "/v2/weir/keys";
    for functions in [Value::Null, json!([other]), json!([mine, other])] {
        let key = weir.post(keys, made(functions)).await.ok();
        let path = format!("{keys}/{}", key["key"]["id"].as_str().unwrap());
        for method in ["GET", "DELETE"] {
            call(method, path.clone(), json!({})).await.problem(
                403,
                "forbidden",
                "certain functions only",
            );
        }
        assert_eq!(weir.get(&path).await.status, 200, "it is still there");
    }
    let listed = call("GET", keys.into(), json!({})).await.ok();
    assert_eq!(listed["keys"].as_array().unwrap().len(), 1, "itself alone");
    for functions in [Value::Null, json!([other])] {
        call("POST", keys.into(), made(functions))
            .await
            .problem(403, "forbidden", "functions");
    }
    let own = call("POST", keys.into(), made(json!([mine]))).await.ok();
    let own = format!("{keys}/{}", own["key"]["id"].as_str().unwrap());
    assert_eq!(call("DELETE", own, json!({})).await.status, 204);

    let accounts = "/v2/nvcf/accounts";
    for (method, path, body) in [
        ("POST", accounts.into(), json!({"ncaId": "z", "name": "z"})),
        ("DELETE", format!("{accounts}/default"), json!({})),
        ("PATCH", format!("{accounts}/default"), json!({"name": "z"})),
        ("POST", "/v2/nvcf/functions".into(), echo()),
        (
            "POST",
            format!("/v2/nvcf/functions/{other}/versions"),
            echo(),
        ),
        (
            "POST",
            format!("/v2/nvcf/authorizations/functions/{other}"),
            json!({"authorizedParties": [{"ncaId": "*"}]}),
        ),
        (
            "GET",
            format!("/v2/nvcf/queues/functions/{other}"),
            json!({}),
        ),
        (
            "DELETE",
            format!("/v2/nvcf/functions/{other}/versions/{v}"),
            json!({}),
        ),
    ] {
        let answer = call(method, path.clone(), body).await;
        assert_eq!(answer.status, 403, "{method} {path}: {}", answer.body);
    }
    let listed = call("GET", "/v2/nvcf/functions/ids".into(), json!({}));
    assert_eq!(listed.await.ok()["functionIds"], json!([mine]));
    call("GET", format!("/v2/weir/decisions?version={v}"), json!({}))
        .await
        .problem(404, "unknown-function", "no version");
}

#[tokio::test]
async fn an_account_gets_another_name() {
    let weir = weir().await;
    let accounts = "/v2/nvcf/accounts";
    let made = weir
        .post(accounts, json!({"ncaId": "a", "name": "old"}))
        .await
        .ok();
    let own = weir
        .key(json!({"name": "k", "account": "a", "scopes": SCOPES}))
        .await;
    let rename = |key: String, id: &'static str, name: &'static str| {
        let (weir, path) = (&weir, format!("{accounts}/{id}"));
        async move { weir.call(&key, "PATCH", &path, json!({"name": name})).await }
    };
    for (key, id) in [(ADMIN, "a"), (ADMIN, "default"), (&own, "a")] {
        let name = if key == ADMIN { "new" } else { "own" };
        let renamed = rename(key.to_owned(), id, name).await.ok();
        assert_eq!(renamed["account"]["name"], name);
        let read = weir.get(&format!("{accounts}/{id}")).await.ok();
        assert_eq!(read, renamed);
        let at = |answer: &Value| answer["account"].get("createdAt").cloned();
        let expected = at(&made).filter(|_| id == "a");
        assert_eq!(at(&renamed), expected, "the default one was not made");
    }
    rename(ADMIN.into(), "b", "new")
        .await
        .problem(404, "not-found", "no account");
    rename(own, "default", "new")
        .await
        .problem(404, "not-found", "no account");
    rename(ADMIN.into(), "a", "")
        .await
        .problem(400, "bad-request", "name");
}

#[tokio::test]
async fn says_what_of_nvcf_it_does_not_serve() {
    let weir = weir().await;
    let id = Uuid::new_v4();
    let none = weir.key(json!({"name": "k", "scopes": []})).await;
    for (method, path, says) in [
        (
            "PUT",
            format!("secrets/functions/{id}/versions/{id}"),
            "not supported yet",
        ),
        (
            "PUT",
            format!("accounts/default/secrets/functions/{id}/versions/{id}"),
            "not supported yet",
        ),
        (
            "PUT",
            format!("secrets/telemetries/{id}"),
            "not supported yet",
        ),
        (
            "PATCH",
            "accounts/default/clients/associate".into(),
            "/v2/weir/keys",
        ),
        (
            "PATCH",
            "accounts/default/clients/disassociate".into(),
            "/v2/weir/keys",
        ),
        ("GET", "clients/someone".into(), "/v2/weir/keys"),
    ] {
        let path = format!("/v2/nvcf/{path}");
        weir.call(ADMIN, method, &path, json!({}))
            .await
            .problem(400, "bad-request", says);
        let refused = weir.call(&none, method, &path, json!({})).await;
        assert_eq!(refused.status, 403, "{method} {path}");
        let nobody = weir.call("no", method, &path, json!({})).await;
        assert_eq!(nobody.status, 401, "{method} {path}");
        let wrong = weir.call(ADMIN, "POST", &path, json!({})).await;
        wrong.problem(405, "bad-request", "method");
    }
}
