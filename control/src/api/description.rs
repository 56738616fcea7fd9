//! What the macros can't say of the API: the errors of each operation, rules that name several members, and what
//! holds of bodies and replies alike.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};
use utoipa::openapi::OpenApi;

use crate::model::SCOPES;

/// Above 0. More of ISO 8601 is taken; this is what everybody understands.
const DURATION: &str = r"^P([1-9][0-9]{0,5}D(T[1-9][0-9]{0,5}H)?|T([1-9][0-9]{0,7}H([1-9][0-9]{0,5}M)?((0\.[0-9]{0,8}[1-9]|[1-9][0-9]{0,5}(\.[0-9]{1,9})?)S)?|[1-9][0-9]{0,5}M((0\.[0-9]{0,8}[1-9]|[1-9][0-9]{0,5}(\.[0-9]{1,9})?)S)?|(0\.[0-9]{0,8}[1-9]|[1-9][0-9]{0,8}(\.[0-9]{1,9})?)S))$";
/// Above 0, at most an hour.
const HOUR: &str =
    r"^PT(1H|[1-9]M|[1-5][0-9]M|60M|[1-9][0-9]{0,2}S|[1-2][0-9]{3}S|3[0-5][0-9]{2}S|3600S)$";
const TAG: &str = "^[A-Za-z0-9_:=-]+$";
/// What its own servers and instances forbid apart. Capitals, a slash at the end, short forms of IPv6 addresses and
/// what else a URL's host may hold are taken too.
fn endpoint() -> String {
    let port =
        "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])";
    // A last label that is a number, such as `1` or `0x1`, makes an IPv4 address of a name.
    let last =
        "(([1-9][0-9]*|0[0-9]+)?[a-z-][a-z0-9-]*|0([a-wyz-][a-z0-9-]*|x[0-9a-f]*[g-z-][a-z0-9-]*))";
    let name = format!(r"([a-z0-9-]+\.)*{last}\.?");
    // Neither of them link-local, nor the unspecified address.
    let octet = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
    let first = "(25[0-5]|2[0-4][0-9]|1[0-57-9][0-9]|16[0-8]|[1-9][0-9]?)";
    let second = "(25[0-35]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
    let v4 = format!(r"({first}\.{octet}|169\.{second})\.{octet}\.{octet}");
    let group = "[0-9a-f]{1,4}";
    let begin = "([1-9a-e][0-9a-f]{0,3}|f([0-9a-f]{0,2}|[0-9a-df][0-9a-f]{2}|e[0-7c-f][0-9a-f]))";
    let v6 = format!(r"\[{begin}(:{group}){{7}}\]");
    let host = format!("({name}|{v4}|{v6})");
    format!("^(http://{host}:{port}|https://{host}(:{port})?)$")
}

/// The document that `/openapi.json` answers.
pub(crate) fn finished(description: &OpenApi) -> Value {
    let mut all = serde_json::to_value(description).expect("a description serialises");
    operations(&mut all["paths"]);
    links(&mut all["paths"]);
    let schemas = &mut all["components"]["schemas"];
    rules(schemas);
    update_of_a_deployment(&mut all);
    let (asked, told) = (
        reached(&all["paths"], schemas_of(&all), "requestBody"),
        reached(&all["paths"], schemas_of(&all), "responses"),
    );
    if let Value::Object(schemas) = &mut all["components"]["schemas"] {
        for (name, schema) in schemas {
            nulls(schema, asked.contains(name), told.contains(name));
        }
    }
    all["components"]["responses"] = responses();
    all["components"]["headers"] = json!({
        "NVCF-REQID": {
            "description": "The ID of this request, a UUID.",
            "schema": {"type": "string", "format": "uuid"}
        },
        "x-weir-error": {
            "description": "What kind of error it is; a code is never renamed.",
            "schema": {"type": "string"}
        }
    });
    all["components"]["securitySchemes"]["key"]["description"] = json!(
        "A key: `weir_` and 43 characters. POST /v2/weir/keys makes one; the first start makes the admin's."
    );
    all
}

const ERRORS: [(&str, &str, &str); 8] = [
    (
        "400",
        "BadRequest",
        "Something of the request is wrong by itself; `detail` says what.",
    ),
    (
        "401",
        "Unauthenticated",
        "No key, or one that is unknown, expired or revoked.",
    ),
    (
        "403",
        "Forbidden",
        "The key lacks the scope, or may not name this.",
    ),
    ("404", "NotFound", "There is no such thing in this account."),
    (
        "409",
        "Conflict",
        "It is there already, is over, or is still in use; what is asked for contradicts itself or what is there; or others changed it again and again meanwhile. `detail` says what.",
    ),
    ("413", "TooLarge", "The body is over 1 MiB (1048576 bytes)."),
    (
        "500",
        "Internal",
        "The stored state is damaged; the log says more.",
    ),
    (
        "503",
        "Unavailable",
        "The store can't be reached or written; `detail` says whether something may have changed.",
    ),
];

fn responses() -> Value {
    let all = ERRORS.iter().map(|(status, name, text)| {
        let mut headers = json!({
            "NVCF-REQID": {"$ref": "#/components/headers/NVCF-REQID"},
            "x-weir-error": {"$ref": "#/components/headers/x-weir-error"}
        });
        if *status == "401" {
            headers["WWW-Authenticate"] =
                json!({"description": "Always `Bearer`.", "schema": {"type": "string"}});
        }
        let answer = json!({
            "description": text,
            "headers": headers,
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        });
        ((*name).to_owned(), answer)
    });
    Value::Object(all.collect())
}

/// The errors that an operation can end with, by what it takes and does.
fn operations(paths: &mut Value) {
    for (path, item) in paths.as_object_mut().into_iter().flatten() {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            let body = operation.get("requestBody").is_some();
            let ids = path
                .split('/')
                .any(|part| part.starts_with('{') && part != "{ncaId}");
            let given = operation["parameters"].as_array();
            let query = given.is_some_and(|all| all.iter().any(|p| p["in"] == "query"));
            let changes = method != "get";
            // An account, in the path or in the body of a new key.
            let account = path.contains("{ncaId}") || path.ends_with("/keys") && changes;
            let stored = changes || path.contains("/authorizations/");
            let default = path.ends_with("/accounts/{ncaId}") && method == "delete";
            let ends = |status: &str| match status {
                "400" => body || ids || query || default,
                "404" => ids || account || path.ends_with("/decisions"),
                "409" => changes,
                "413" => body,
                "500" | "503" => stored,
                _ => true,
            };
            for (status, name, _) in ERRORS.iter().filter(|(status, _, _)| ends(status)) {
                operation["responses"][*status] =
                    json!({"$ref": format!("#/components/responses/{name}")});
            }
            for (status, answer) in operation["responses"].as_object_mut().into_iter().flatten() {
                if !status.starts_with('2') {
                    continue;
                }
                answer["headers"]["NVCF-REQID"] =
                    json!({"$ref": "#/components/headers/NVCF-REQID"});
                if answer["description"]
                    .as_str()
                    .unwrap_or_default()
                    .is_empty()
                {
                    let text = if status == "204" {
                        "Done."
                    } else {
                        "As it is now."
                    };
                    answer["description"] = text.into();
                }
            }
            let parameters = operation.get_mut("parameters");
            for parameter in parameters
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                described(parameter);
            }
        }
    }
}

/// Answers that make something, each with the names of what it made and where they are.
const MADE: [(&str, &[(&str, &str)]); 5] = [
    (
        "/functions",
        &[
            ("functionId", "/function/id"),
            ("functionVersionId", "/function/versionId"),
        ],
    ),
    (
        "/functions/{functionId}/versions",
        &[
            ("functionId", "/function/id"),
            ("functionVersionId", "/function/versionId"),
        ],
    ),
    (
        "/deployments/functions/{functionId}/versions/{functionVersionId}",
        &[
            ("functionId", "/deployment/functionId"),
            ("functionVersionId", "/deployment/functionVersionId"),
            ("deploymentId", "/deployment/deploymentId"),
            (
                "gpuSpecificationId",
                "/deployment/deploymentSpecifications/0/gpuSpecificationId",
            ),
        ],
    ),
    ("/accounts", &[("ncaId", "/account/ncaId")]),
    ("/keys", &[("keyId", "/key/id")]),
];

/// What can be done with what was made: by the names alone, a version's ID looks like its function's.
fn links(paths: &mut Value) {
    const ACCOUNT: &str = "/v2/nvcf/accounts/{ncaId}";
    let mut all: Vec<(String, BTreeSet<String>, String)> = Vec::new();
    for (path, item) in paths.as_object().into_iter().flatten() {
        let names = path.split('/').filter_map(|part| part.strip_prefix('{'));
        let names: BTreeSet<String> = names
            .map(|name| name.trim_end_matches('}').to_owned())
            .collect();
        for (_, operation) in item.as_object().into_iter().flatten() {
            let id = operation["operationId"].as_str().unwrap_or_default();
            all.push((path.clone(), names.clone(), id.to_owned()));
        }
    }
    for (path, item) in paths.as_object_mut().into_iter().flatten() {
        let twin = path.starts_with(&format!("{ACCOUNT}/"));
        let short = path
            .strip_prefix(ACCOUNT)
            .or_else(|| path.strip_prefix("/v2/nvcf"))
            .or_else(|| path.strip_prefix("/v2/weir"))
            .unwrap_or_default();
        let Some((_, made)) = MADE.iter().find(|(made, _)| *made == short) else {
            continue;
        };
        let mut known: BTreeMap<&str, String> = made
            .iter()
            .map(|(name, at)| (*name, format!("$response.body#{at}")))
            .collect();
        if twin {
            known.insert("ncaId", "$request.path.ncaId".to_owned());
        }
        let mut links = Map::new();
        for (target, names, id) in &all {
            let same = short == "/accounts" || twin == target.starts_with(&format!("{ACCOUNT}/"));
            let of_it = names.iter().any(|name| made.iter().any(|(m, _)| m == name));
            if same && of_it && names.iter().all(|name| known.contains_key(name.as_str())) {
                let given: Map<String, Value> = names
                    .iter()
                    .map(|name| (name.clone(), known[name.as_str()].clone().into()))
                    .collect();
                let mut link = json!({"operationId": id, "parameters": given});
                // Otherwise guessed, together with the wrong ID.
                if id.ends_with("functions_update") && known["functionId"].ends_with("/function/id")
                {
                    link["requestBody"] = json!({
                        "rateLimit": "$response.body#/function/rateLimit",
                        "tags": "$response.body#/function/tags"
                    });
                }
                links.insert(id.clone(), link);
            }
        }
        for (status, answer) in item["post"]["responses"]
            .as_object_mut()
            .into_iter()
            .flatten()
        {
            if status.starts_with('2') {
                answer["links"] = links.clone().into();
            }
        }
    }
}

fn described(parameter: &mut Value) {
    let text = match parameter["name"].as_str().unwrap_or_default() {
        "functionId" => "The function.",
        "functionVersionId" if parameter["in"] == "path" => "The version.",
        "version" => "The version.",
        "deploymentId" => "The deployment.",
        "gpuSpecificationId" => "The specification, as the deployment lists it.",
        "instanceId" => "The instance.",
        "keyId" => "The key's ID.",
        "requestId" => "The invocation's NVCF-REQID.",
        "ncaId" => "The account.",
        _ => "",
    };
    if parameter.get("description").is_none() {
        parameter["description"] = text.into();
    }
    match parameter["name"].as_str() {
        Some("visibility") => {
            parameter["schema"] = json!({
                "type": "array",
                "items": {"type": "string", "enum": ["authorized", "private", "public"]}
            });
        }
        Some("graceful") => parameter["schema"] = json!({"type": "boolean", "default": false}),
        Some("tail") => {
            parameter["schema"] =
                json!({"type": "integer", "minimum": 1, "maximum": 100_000, "default": 1000});
        }
        Some("functionVersionId") if parameter["in"] == "query" => {
            parameter["schema"] = json!({"$ref": "#/components/schemas/VersionId"});
        }
        _ => {}
    }
}

/// Rules of several members, and of the items of lists.
fn rules(schemas: &mut Value) {
    schemas["IsoDuration"]["pattern"] = DURATION.into();
    schemas["Autoscaling"]["properties"]["scaleInDelay"] = json!({
        "type": "string",
        "description": schemas["Autoscaling"]["properties"]["scaleInDelay"]["description"],
        "default": "PT0S",
        "pattern": format!("^PT0S$|{DURATION}")
    });
    for (schema, member) in [
        ("CreateFunctionRequest", "tags"),
        ("UpdateFunctionRequest", "tags"),
    ] {
        let tags = &mut schemas[schema]["properties"][member];
        tags["maxItems"] = 64.into();
        tags["items"] = json!({"type": "string", "minLength": 1, "maxLength": 128, "pattern": TAG});
    }
    let scopes = &mut schemas["CreateKeyRequest"]["properties"]["scopes"];
    scopes["items"]["enum"] = SCOPES.into();

    let create = &mut schemas["CreateFunctionRequest"];
    create["properties"]["inferenceUrl"]["not"] = json!({"enum": ["/grpc", "grpc"]});
    let endpoints = &mut create["properties"]["endpoints"];
    endpoints["items"]["pattern"] = endpoint().into();
    endpoints["minItems"] = 1.into();
    endpoints["uniqueItems"] = true.into();
    // Either process or endpoints.
    create["if"] = json!({"required": ["process"], "properties": {"process": {"type": "object"}}});
    create["then"] = json!({"properties": {"endpoints": {"type": "null"}}});
    create["else"] =
        json!({"required": ["endpoints"], "properties": {"endpoints": {"type": "array"}}});
    let command = &mut schemas["ProcessSpec"]["properties"]["command"];
    command["items"]["pattern"] = r"^[^\x00]*$".into();
    command["prefixItems"] = json!([{"type": "string", "minLength": 1, "pattern": r"^[^\x00]*$"}]);
    schemas["ProcessSpec"]["properties"]["workingDir"]["pattern"] = r"^[^\x00]*$".into();
    schemas["EnvVar"]["properties"]["key"]["not"] =
        json!({"pattern": "^((PORT|CUDA_VISIBLE_DEVICES)$|NVCF_|WEIR_)"});

    let limit = &mut schemas["RateLimitBody"];
    limit["properties"]["perNcaIdRate"]["maxProperties"] = 32.into();
    let rate: Value = format!("^{}$", rates(&["S", "M", "H", "D"])).into();
    limit["properties"]["perNcaIdRate"]["additionalProperties"]["pattern"] = rate.clone();
    limit["properties"]["perUserRate"]["pattern"] = rate.clone();
    limit["properties"]["rateLimit"]["pattern"] = rate;
    // One of the three, and rateLimit where somebody is exempted.
    let given = json!({"required": ["rateLimit"], "properties": {"rateLimit": {"type": "string"}}});
    limit["allOf"] = json!([
        {
            "if": {"required": ["perNcaIdRate"], "properties": {"perNcaIdRate": {"type": "object", "minProperties": 1}}},
            "else": {
                "if": {"required": ["perUserRate"], "properties": {"perUserRate": {"type": "string"}}},
                "else": given
            }
        },
        {
            "if": {"required": ["exemptedNcaIds"], "properties": {"exemptedNcaIds": {"type": "array", "minItems": 1}}},
            "then": given
        }
    ]);

    schemas["AutoscalingConfiguration"] = json!({
        "type": "object",
        "description": "NVCF's steps, kept and echoed; they act under the policy `nvcf-step`.",
        "properties": {
            "scaleUpDetails": {"$ref": "#/components/schemas/ScaleUpDetails", "description": "When and how much to scale out."},
            "scaleDownDetails": {"$ref": "#/components/schemas/ScaleDownDetails", "description": "When and how much to scale in."}
        }
    });
    for (name, factor) in [
        ("ScaleUpDetails", json!({"exclusiveMinimum": 1})),
        (
            "ScaleDownDetails",
            json!({"exclusiveMinimum": 0, "exclusiveMaximum": 1}),
        ),
    ] {
        let mut factor = factor;
        factor["type"] = "number".into();
        factor["description"] = "The instances are multiplied by it.".into();
        schemas[name] = json!({
            "type": "object",
            "description": "One direction of NVCF's steps.",
            "required": ["factor", "threshold"],
            "properties": {
                "factor": factor,
                "threshold": {
                    "type": "integer", "minimum": 0, "maximum": u64::MAX,
                    "description": "Utilization, in percent, that is passed."
                },
                "stickiness": {"$ref": "#/components/schemas/Stickiness", "description": "How long it has to be passed. Default: at once."}
            }
        });
    }
    schemas["Stickiness"] = json!({
        "type": "object",
        "description": "For `threshold` of the last `size`.",
        "required": ["size", "threshold"],
        "properties": {
            "size": {"type": "string", "pattern": HOUR, "description": "At most PT1H."},
            "threshold": {"$ref": "#/components/schemas/IsoDuration", "description": "Less than `size`."}
        }
    });
    schemas["UpdateFunctionRequest"]["not"] = nothing(&["tags", "rateLimit"]);
    let patch = &mut schemas["PatchRequest"];
    patch["not"] = nothing(&[
        "minInstances",
        "maxInstances",
        "autoscalingConfiguration",
        "autoscalingConfigurationPolicy",
    ]);
    patch["if"] = json!({
        "required": ["autoscalingConfiguration"],
        "properties": {"autoscalingConfiguration": {"type": "object"}}
    });
    patch["then"] = json!({
        "properties": {"autoscalingConfigurationPolicy": {"not": {"const": "PLATFORM_CONFIGURATION"}}}
    });
    for schema in ["SpecificationRequest", "PatchRequest"] {
        let configuration = &mut schemas[schema]["properties"]["autoscalingConfiguration"];
        *configuration = json!({
            "$ref": "#/components/schemas/AutoscalingConfiguration",
            "description": configuration["description"]
        });
    }
    let specification = &mut schemas["SpecificationRequest"];
    specification["allOf"] = json!([
        {
            "if": {"properties": {"gpu": {"pattern": "^[nN][oO][nN][eE]$"}}},
            "else": {
                "required": ["instanceType"],
                "properties": {"instanceType": {"type": "string", "minLength": 1, "not": {"pattern": "_\\+?0+x$"}}}
            }
        },
        {
            "if": {"required": ["backend"], "properties": {"backend": {"type": "string"}}},
            "then": {"properties": {"clusters": {"maxItems": 0}}}
        }
    ]);
    schemas["DeploymentRequest"]["properties"]["deploymentSpecifications"]["minItems"] = 1.into();
    let parties = &mut schemas["PartiesRequest"]["properties"]["authorizedParties"];
    parties["if"] = json!({"items": {"properties": {"ncaId": {"not": {"const": "*"}}}}});
    parties["else"] = json!({"items": {"properties": {"ncaId": {"const": "*"}}}});
    let dto = &mut schemas["ActiveInstance"]["properties"];
    dto["instanceStatus"]["enum"] = json!(["STARTING", "ACTIVE", "TERMINATED", "ERRORED"]);
    for member in ["instanceId", "icmsRequestId"] {
        dto[member]["format"] = "uuid".into();
    }
    for member in ["createdAt", "spawnedAt", "firstHealthyAt"] {
        schemas["Instance"]["properties"][member]["format"] = "date-time".into();
    }
    schemas["Problem"]["properties"]["requestId"]["format"] = "uuid".into();
}

/// None of the members is there, or each is `null`.
fn nothing(members: &[&str]) -> Value {
    let none = members
        .iter()
        .map(|member| ((*member).to_owned(), json!({"type": "null"})));
    json!({"properties": none.collect::<Map<_, _>>()})
}

/// The body of a deployment's PUT: that of its POST, and nothing of it is needed.
fn update_of_a_deployment(all: &mut Value) {
    let path = "/deployments/functions/{functionId}/versions/{functionVersionId}";
    for (name, item) in all["paths"].as_object_mut().into_iter().flatten() {
        if name.ends_with(path) {
            let content = &mut item["put"]["requestBody"]["content"]["application/json"];
            content["schema"] = json!({"$ref": "#/components/schemas/DeploymentUpdate"});
        }
    }
    let schemas = &mut all["components"]["schemas"];
    let mut specification = schemas["SpecificationRequest"].clone();
    specification["description"] =
        "What changes of one entry of `deploymentSpecifications`; what is left out stays.".into();
    let mut update = schemas["DeploymentRequest"].clone();
    update["description"] =
        "What changes of a deployment. What is left out stays, also inside `autoscaling`, `queue` and `routing`."
            .into();
    update["example"] = json!({"queue": {"maxRequests": 100}});
    let specifications = &mut update["properties"]["deploymentSpecifications"];
    specifications["description"] = "Those to change.".into();
    specifications["minItems"] = 0.into();
    specifications["items"] = json!({"$ref": "#/components/schemas/SpecificationUpdate"});
    for (name, mut schema) in [
        ("SpecificationUpdate", specification),
        ("DeploymentUpdate", update),
    ] {
        if let Value::Object(schema) = &mut schema {
            schema.remove("required");
            schema.remove("allOf");
        }
        schemas[name] = schema;
    }
}

/// A list of rates, each of the units at most once.
fn rates(units: &[&str]) -> String {
    let choices: Vec<String> = units
        .iter()
        .map(|unit| {
            let left: Vec<&str> = units.iter().copied().filter(|u| u != unit).collect();
            if left.is_empty() {
                return (*unit).to_owned();
            }
            format!("{unit}(,{})?", rates(&left))
        })
        .collect();
    format!("[1-9][0-9]{{0,8}}-({})", choices.join("|"))
}

fn schemas_of(all: &Value) -> &Value {
    &all["components"]["schemas"]
}

/// The names of the schemas that bodies of one kind lead to.
fn reached(paths: &Value, schemas: &Value, kind: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let operations = paths
        .as_object()
        .into_iter()
        .flatten()
        .flat_map(|(_, item)| item.as_object().into_iter().flatten());
    for (_, operation) in operations {
        follow(&operation[kind], schemas, &mut found);
    }
    found
}

fn follow(value: &Value, schemas: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                match (name.as_str(), value.as_str()) {
                    ("$ref", Some(to)) => {
                        if let Some(to) = to.strip_prefix("#/components/schemas/")
                            && found.insert(to.to_owned())
                        {
                            follow(&schemas[to], schemas, found);
                        }
                    }
                    _ => follow(value, schemas, found),
                }
            }
        }
        Value::Array(all) => all.iter().for_each(|value| follow(value, schemas, found)),
        _ => {}
    }
}

/// A body's `null` is the same as nothing; a reply has none.
fn nulls(schema: &mut Value, asked: bool, told: bool) {
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else {
        return;
    };
    for (name, property) in properties {
        let needed = required.iter().any(|r| r == name.as_str());
        let Value::Object(members) = property else {
            continue;
        };
        if !asked && told {
            without_null(members);
        } else if asked && !needed {
            with_null(members);
        }
        lift_description(members);
    }
}

fn without_null(members: &mut Map<String, Value>) {
    if let Some(Value::Array(types)) = members.get_mut("type") {
        types.retain(|t| t != "null");
        if let [one] = &types[..] {
            let one = one.clone();
            members.insert("type".into(), one);
        }
    }
    if let Some(Value::Array(choices)) = members.get_mut("oneOf") {
        choices.retain(|c| c["type"] != "null");
        if let [one] = &choices[..] {
            let one = one.clone();
            members.remove("oneOf");
            members.extend(one.as_object().cloned().unwrap_or_default());
        }
    }
}

fn with_null(members: &mut Map<String, Value>) {
    if let Some(to) = members.remove("$ref") {
        members.insert("oneOf".into(), json!([{"$ref": to}, {"type": "null"}]));
        return;
    }
    match members.get_mut("type") {
        Some(Value::Array(types)) if types.iter().any(|t| t == "null") => {}
        Some(Value::String(one)) => {
            let both = json!([one, "null"]);
            members.insert("type".into(), both);
        }
        _ => {}
    }
}

/// Beside `oneOf` it is the member's; inside, generators take it for the other schema's.
fn lift_description(members: &mut Map<String, Value>) {
    let Some(Value::Array(choices)) = members.get_mut("oneOf") else {
        return;
    };
    let found = choices
        .iter_mut()
        .find_map(|choice| choice.as_object_mut()?.remove("description"));
    if let Some(text) = found {
        members.entry("description").or_insert(text);
    }
}
