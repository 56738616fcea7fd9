//! What the lifecycle API is told that can't be: each a clear answer, and nothing done.

use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{Server, WEIR, answered, definition, problem, text};

const FUNCTIONS: &str = "/v2/nvcf/functions";

/// A function that could be.
fn function() -> Value {
    definition(&["true"], &[])
}

/// It with one member, `a` or `a.b`, set.
fn with(mut whole: Value, member: &str, value: Value) -> Value {
    match member.split_once('.') {
        Some((outer, inner)) => whole[outer][inner] = value,
        None => whole[member] = value,
    }
    whole
}

/// Asserts that the body is refused with 400, and with what words.
async fn refuses(server: &Server, method: Method, path: &str, body: &Value, words: &[&str]) {
    let response = server.api(method, path).json(body).send().await.unwrap();
    problem(response, 400, "bad-request", words).await;
}

/// Asserts that the body is refused with 409: nothing is wrong with any member by itself.
async fn conflicts(server: &Server, method: Method, path: &str, body: &Value, words: &[&str]) {
    let response = server.api(method, path).json(body).send().await.unwrap();
    problem(response, 409, "conflict", words).await;
}

async fn count(server: &Server) -> usize {
    let all = server.get("/v2/nvcf/functions/ids").await;
    all["functionIds"].as_array().unwrap().len()
}

#[tokio::test]
async fn what_is_no_json_is_refused_and_where() {
    let server = Server::start();
    let deep = "[".repeat(100_000);
    let table: &[(&str, &[&str])] = &[
        ("", &["not valid JSON", "line 1"]),
        ("{\"name\":", &["not valid JSON", "column 8"]),
        ("{\"name\": nope}", &["not valid JSON", "column"]),
        ("{} {}", &["not valid JSON", "trailing"]),
        ("{\"name\": 1e999}", &["not valid JSON", "out of range"]),
        (&deep, &["not valid JSON", "recursion limit"]),
        ("null", &["JSON object"]),
        ("[]", &["JSON object"]),
        ("\"name\"", &["JSON object"]),
        ("{\"name\":\"a\",\"name\":\"b\"}", &["'name' comes twice"]),
        ("{\"tags\":[{\"a\":1,\"a\":1}]}", &["'a' comes twice"]),
    ];
    for (body, words) in table {
        let call = server.api(Method::POST, FUNCTIONS);
        let call = call.header("content-type", "application/json");
        let response = call.body(body.to_string()).send().await.unwrap();
        problem(response, 400, "bad-request", words).await;
    }
    let call = server.api(Method::POST, FUNCTIONS);
    let call = call.header("content-type", "application/json");
    let response = call.body(b"{\"name\": \"\xff\"}".to_vec()).send().await;
    problem(response.unwrap(), 400, "bad-request", &["not valid JSON"]).await;
    let form = server.api(Method::POST, FUNCTIONS).body("name=a");
    let form = form.header("content-type", "application/x-www-form-urlencoded");
    problem(
        form.send().await.unwrap(),
        400,
        "bad-request",
        &["x-www-form-urlencoded", "send JSON"],
    )
    .await;
    assert_eq!(count(&server).await, 0);
}

/// Rows of a table: a member, its JSON, and the words of the refusal, between `&`.
fn rows(table: &str) -> impl Iterator<Item = (&str, Value, Vec<&str>)> {
    table
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let mut cells = line.trim().splitn(3, " | ");
            let mut cell = || cells.next().expect("three cells");
            let (member, value) = (cell(), serde_json::from_str(cell()).expect(line));
            (member, value, cell().split(" & ").collect())
        })
}

#[tokio::test]
async fn members_of_a_wrong_type_or_value_are_named() {
    const OF_A_FUNCTION: &str = r#"
        name | null | name: is needed
        name | 5 | name: has to be a string, not 5
        name | {"a": 1} | name: has to be a string, not an object
        name | "no spaces" | name: & letters, digits
        inferenceUrl | ["/a"] | inferenceUrl: has to be a string, not a list
        inferenceUrl | "http://a/b" | inferenceUrl: & not a path such as /v2/infer
        inferencePort | "80" | inferencePort: has to be a whole number from 0 to 65535, not "80"
        inferencePort | -1 | inferencePort: has to be a whole number & -1
        inferencePort | 70000 | inferencePort: has to be a whole number & 70000
        inferencePort | 80.5 | inferencePort: has to be a whole number & 80.5
        inferencePort | 0 | inferencePort: has to be 1 to 65535
        tags | "a" | tags: has to be a list, not "a"
        tags | [null] | tags[0]: has to be a string, not null
        tags | ["a b"] | tags[0]: a tag is 1 to 128 letters
        process | null | process: either process or endpoints is needed
        process | 7 | process: has to be an object, not 7
        process | {} | process.command: is needed
        process.command | "true" | process.command: has to be a list, not "true"
        process.command | [] | process.command: at least the program is needed
        process.env | {"A": "b"} | process.env: has to be a list, not an object
        process.env | [null] | process.env[0]: has to be an object, not null
        process.env | [{"key": "PORT", "value": "1"}] | process.env[0]: PORT is Weir's to set
        endpoints | ["http://10.0.0.5:80"] | can't be given together with endpoints: choose one
        health | [] | health: has to be an object, not a list
        health.timeout | null | health.timeout: is needed
        health.timeout | "10s" | health.timeout: '10s' & write PT10S
        health.timeout | "PT0S" | health.timeout: has to be above 0
        health.timeout | 10 | health.timeout: has to be a string, not 10
        health.expectedStatusCode | 99 | health.expectedStatusCode: has to be 100 to 599
        health.port | 0 | health.port: has to be 1 to 65535
        rateLimit | {"rateLimit": "fast"} | rateLimit.rateLimit: 'fast' is not a rate such as 10-S
        rateLimit | {} | rateLimit: one of rateLimit
    "#;
    const OF_A_KEY: &str = r#"
        scopes | "invoke_function" | scopes: has to be a list
        scopes | ["invoke"] | scopes: there is no scope 'invoke'; those there are: & invoke_function
        functions | ["x"] | functions[0]: is not a UUID
        priority | 10 | priority: has to be 0 (most urgent) to 9
        priority | -1 | priority: has to be a whole number
        expiresAt | "soon" | expiresAt: 'soon' is not a time such as 2027-01-31T12:00:00Z
        expiresAt | 5 | expiresAt: has to be a string
    "#;
    let server = Server::start();
    for (member, value, words) in rows(OF_A_FUNCTION) {
        let body = with(function(), member, value);
        refuses(&server, Method::POST, FUNCTIONS, &body, &words).await;
    }
    let key = json!({"name": "a", "scopes": ["invoke_function"]});
    for (member, value, words) in rows(OF_A_KEY) {
        let body = with(key.clone(), member, value);
        refuses(&server, Method::POST, "/v2/weir/keys", &body, &words).await;
    }
    let account = json!({"ncaId": "a/b", "name": "A"});
    let words = ["ncaId: has to be 1 to 128 letters"];
    refuses(&server, Method::POST, "/v2/nvcf/accounts", &account, &words).await;
    // What is quoted is cut.
    let long = with(function(), "tags", json!("x".repeat(500_000)));
    let response = server.api(Method::POST, FUNCTIONS).json(&long).send().await;
    assert!(response.unwrap().text().await.unwrap().len() < 2000);
    assert_eq!(count(&server).await, 0);
}

/// What this build would not do is refused by its name; what changes nothing is taken.
#[tokio::test]
async fn what_would_be_a_lie_is_refused() {
    const LIES: &str = r#"
        helmChart | "https://charts/a.tgz" | helmChart: & use process or endpoints
        helmChartServiceName | "a" | helmChartServiceName: & leave it out
        containerImage | "a:1" | containerImage: & use process or endpoints
        containerEnvironment | [{"key": "a", "value": "b"}] | containerEnvironment: & use process.env
        secrets | [{"name": "a", "value": "b"}] | secrets: & use process.env
        telemetries | {"logsTelemetryId": "a"} | telemetries: & leave it out
        resources | [{"name": "a", "version": "1", "uri": "u"}] | resources: & leave it out
        models | [{"name": "a", "llmConfig": {"uris": ["/v1"]}}] | models: & leave it out
        llmInvocationConfig | {"priority": {"defaultPriority": 1}} | llmInvocationConfig: & leave it out
        functionType | "LLM" | functionType: & `DEFAULT` or `STREAMING`, not `LLM`
        apiBodyFormat | "PREDICT_V9" | apiBodyFormat: & not `PREDICT_V9`
        health.protocol | "gRPC" | health.protocol: & not `gRPC`
    "#;
    let server = Server::start();
    for (member, value, words) in rows(LIES) {
        let body = with(function(), member, value);
        refuses(&server, Method::POST, FUNCTIONS, &body, &words).await;
    }
    for path in ["telemetries", "registry-credentials", "assets"] {
        let call = server.api(Method::POST, &format!("/v2/nvcf/{path}"));
        let response = call.json(&json!({})).send().await.unwrap();
        problem(response, 404, "not-found", &[path, "nothing was done"]).await;
    }
    assert_eq!(count(&server).await, 0);

    // As in NVCF: unknown members are ignored, and null ones absent.
    let mut harmless = function();
    let more = json!({
        "telemetries": {}, "helmChart": "", "secrets": [], "models": null,
        "unheardOf": {"a": [1]}, "functionType": "streaming",
    });
    if let (Value::Object(harmless), Value::Object(more)) = (&mut harmless, more) {
        harmless.extend(more);
    }
    let made = server.post(FUNCTIONS, &harmless).await;
    assert_eq!(made["function"]["functionType"], "STREAMING");
    assert!(made["function"].get("unheardOf").is_none());
}

#[tokio::test]
async fn deployments_have_to_make_sense() {
    const OF_A_SPECIFICATION: &str = r#"
        minInstances | -1 | minInstances: has to be a whole number & -1
        minInstances | 0.5 | minInstances: has to be a whole number & 0.5
        minInstances | "1" | minInstances: has to be a whole number & "1"
        minInstances | null | minInstances: is needed
        maxInstances | 0 | maxInstances: has to be at least 1
        maxInstances | 4097 | maxInstances: & 4096: ask for fewer
        maxInstances | 4294967295 | maxInstances: & 4096: ask for fewer
        maxInstances | 4294967296 | maxInstances: has to be a whole number & 4294967296
        maxInstances | 99999999999999999999999 | maxInstances: has to be a whole number & 1e+23
        maxRequestConcurrency | 0 | maxRequestConcurrency: has to be 1 to 16384
        maxRequestConcurrency | 16385 | maxRequestConcurrency: has to be 1 to 16384
        gpu | "" | gpu: can't be empty
        gpu | "H100" | instanceType: is needed, such as NCP.GPU.H100_1x
        preferredOrder | 100 | preferredOrder: has to be 1 to 99
        configuration | {"a": 1} | configuration: & leave it out
        helmValidationPolicy | {"name": "a"} | helmValidationPolicy: & leave it out
    "#;
    const OF_A_DEPLOYMENT: &str = r#"
        deploymentSpecifications | null | deploymentSpecifications: is needed
        deploymentSpecifications | [] | deploymentSpecifications: at least one is needed
        deploymentSpecifications | {} | deploymentSpecifications: has to be a list, not an object
        deploymentSpecifications | [5] | deploymentSpecifications[0]: has to be an object, not 5
        startTimeout | "PT0S" | startTimeout: has to be above 0
        startTimeout | "-PT1S" | startTimeout: '-PT1S' is negative
        startTimeout | "PT-1S" | startTimeout: 'PT-1S' is negative
        startTimeout | "P1M" | startTimeout: 'P1M' counts years or months & use days
        startTimeout | "PT99999999999999999999S" | startTimeout: & too long
        startTimeout | "90" | startTimeout: '90' is not an ISO 8601 duration such as PT1M30S
        startTimeout | 90 | startTimeout: has to be a string
        drainTimeout | "" | drainTimeout: & such as PT1M30S
        trafficWeight | -1 | trafficWeight: has to be a whole number
        autoscaling | 5 | autoscaling: has to be an object, not 5
        autoscaling.policy | "magic" | autoscaling.policy: has to be `concurrency` or `nvcf-step`, not `magic`
        autoscaling.targetUtilization | 0 | autoscaling.targetUtilization: has to be above 0 and at most 1
        autoscaling.targetUtilization | "1" | autoscaling.targetUtilization: has to be a number, not "1"
        queue | [] | queue: has to be an object, not a list
        queue.maxRequests | -1 | queue.maxRequests: has to be a whole number
        queue.maxRequests | 18446744073709551616 | queue.maxRequests: has to be a whole number
        routing.policy | 7 | routing.policy: has to be a string, not 7
        routing.sessionHeader | "a b" | routing.sessionHeader: & such as x-session-id
    "#;
    let server = Server::start();
    let function = server.function(&[WEIR, "sample-function"], &[]).await;
    let path = function.deployment();
    let spec = json!({"gpu": "none", "minInstances": 0, "maxInstances": 2});
    for (member, value, words) in rows(OF_A_SPECIFICATION) {
        let body = json!({"deploymentSpecifications": [with(spec.clone(), member, value)]});
        refuses(&server, Method::POST, &path, &body, &words).await;
    }
    let whole = json!({"deploymentSpecifications": [spec]});
    for (member, value, words) in rows(OF_A_DEPLOYMENT) {
        let body = with(whole.clone(), member, value);
        refuses(&server, Method::POST, &path, &body, &words).await;
    }
    const CONTRADICTIONS: &str = r#"
        deploymentSpecifications | [{"gpu": "none", "minInstances": 3, "maxInstances": 2}] | minInstances: 3 is more than maxInstances, 2: lower it
        autoscaling.panicWindow | "PT2M" | autoscaling.panicWindow: can't be longer than stableWindow
        queue.holdBytes | 18446744073709551615 | queue.holdBytes: can't be more than queue.maxBytes
    "#;
    for (member, value, words) in rows(CONTRADICTIONS) {
        let body = with(whole.clone(), member, value);
        conflicts(&server, Method::POST, &path, &body, &words).await;
    }
    let response = server.api(Method::GET, &path).send().await.unwrap();
    problem(response, 404, "not-found", &["is not deployed", "POST"]).await;
}

#[tokio::test]
async fn what_is_deployed_is_not_deployed_again_nor_changed_into_nonsense() {
    let server = Server::start();
    let function = server.function(&[WEIR, "sample-function"], &[]).await;
    let path = function.deployment();
    // The largest that can be said are no trap.
    let years = "PT631107417600S";
    let largest = json!({
        "deploymentSpecifications": [{"gpu": "none", "minInstances": 0, "maxInstances": 1}],
        "autoscaling": {
            "stableWindow": years, "panicWindow": years, "idleTimeout": years,
            "scaleInDelay": years, "targetUtilization": 1e-300,
        },
        "queue": {
            "maxRequests": u64::MAX, "maxBytes": u64::MAX, "holdBytes": u64::MAX,
            "busyTimeout": years, "coldTimeout": years,
        },
        "trafficWeight": u32::MAX,
        "startTimeout": years, "drainTimeout": years, "cancelTimeout": years,
    });
    let deployed = server.post(&path, &largest).await;
    server.until_known(&function).await;
    let call = server.call(Method::POST, &function, "/echo").body("hello");
    let response = call.send().await.unwrap();
    answered(&response);
    assert_eq!(response.text().await.unwrap(), "hello");

    let words = ["is deployed", "PATCH", "undeploy it first"];
    refuses(&server, Method::POST, &path, &largest, &words).await;
    let gpu = json!({"gpu": "H100", "instanceType": "a_1x", "minInstances": 0, "maxInstances": 1});
    let gpu = json!({"deploymentSpecifications": [gpu]});
    conflicts(
        &server,
        Method::PUT,
        &path,
        &gpu,
        &["gpu and instanceType are fixed"],
    )
    .await;
    let deployment = &deployed["deployment"];
    let patch = format!(
        "/v2/nvcf/deployments/{}/gpu-specifications/{}",
        text(&deployment["deploymentId"]),
        text(&deployment["deploymentSpecifications"][0]["gpuSpecificationId"])
    );
    const OF_A_PATCH: &str = r#"
        unheardOf | 1 | one of minInstances, maxInstances
        minInstances | "2" | minInstances: has to be a whole number
        maxInstances | 0 | maxInstances: has to be at least 1
        autoscalingConfigurationPolicy | "MINE" | autoscalingConfigurationPolicy: has to be
    "#;
    for (member, value, words) in rows(OF_A_PATCH) {
        let body = with(json!({}), member, value);
        refuses(&server, Method::PATCH, &patch, &body, &words).await;
    }
    conflicts(
        &server,
        Method::PATCH,
        &patch,
        &json!({"minInstances": 2}),
        &["minInstances: 2 is more than maxInstances, 1"],
    )
    .await;
}

#[tokio::test]
async fn endpoints_name_neither_link_local_addresses_nor_weir_itself() {
    let server = Server::start();
    let (data, admin) = (server.data.port(), server.admin.port());
    let endpoints =
        |endpoint: String| json!({"name": "a", "inferenceUrl": "/", "endpoints": [endpoint]});
    for (host, word) in [
        ("169.254.169.254:80".to_owned(), "link-local"),
        ("169.254.169.254.:80".to_owned(), "link-local"),
        ("[fe80::1]:80".to_owned(), "link-local"),
        ("[::ffff:169.254.1.1]:80".to_owned(), "link-local"),
        ("2852039166:80".to_owned(), "an address such as 10.0.0.5"),
        ("0xa9fea9fe:80".to_owned(), "an address such as 10.0.0.5"),
        ("0.0.0.0:80".to_owned(), "every address"),
        ("[::ffff:0.0.0.0]:80".to_owned(), "every address"),
        (format!("127.0.0.1:{data}"), "Weir's own listener"),
        (format!("127.0.0.1:{admin}"), "Weir's own listener"),
        (format!("localhost:{admin}"), "Weir's own listener"),
        (format!("[::ffff:127.0.0.1]:{admin}"), "Weir's own listener"),
        ("10.0.0.5".to_owned(), "needs a host and a port"),
        ("10.0.0.5:99999".to_owned(), "needs a host and a port"),
        ("a@10.0.0.5:80".to_owned(), "a host and a port only"),
        ("10.0.0.5:80/v1".to_owned(), "a host and a port only"),
    ] {
        let body = endpoints(format!("http://{host}"));
        refuses(
            &server,
            Method::POST,
            FUNCTIONS,
            &body,
            &["endpoints[0]:", &host, word],
        )
        .await;
    }
    for (endpoint, word) in [
        (
            "ftp://10.0.0.5:80".to_owned(),
            "has to start with http:// or https://",
        ),
        ("https://169.254.169.254".to_owned(), "link-local"),
        (format!("https://localhost:{admin}"), "Weir's own listener"),
    ] {
        let body = endpoints(endpoint);
        refuses(&server, Method::POST, FUNCTIONS, &body, &[word]).await;
    }
    let mut check = endpoints("http://127.0.0.1:9".to_owned());
    check["health"] = function()["health"].take();
    check["health"]["port"] = json!(admin);
    refuses(
        &server,
        Method::POST,
        FUNCTIONS,
        &check,
        &["health.port", "Weir's own listener"],
    )
    .await;
    assert_eq!(count(&server).await, 0);

    // Somebody else's port on this machine is no harm.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let there = endpoints(format!("http://{}", listener.local_addr().unwrap()));
    server.post(FUNCTIONS, &there).await;
}
