//! What the macros can't say of the API: the errors of each operation, rules that name several members, and what
//! holds of bodies and replies alike.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use utoipa::openapi::OpenApi;

use crate::model::SCOPES;

/// Above 0. More of ISO 8601 is taken; this is what everybody understands.
const DURATION: &str = r"^P([1-9][0-9]{0,5}D(T[1-9][0-9]{0,5}H)?|T([1-9][0-9]{0,7}H([1-9][0-9]{0,5}M)?((0\.[0-9]{0,8}[1-9]|[1-9][0-9]{0,5}(\.[0-9]{1,9})?)S)?|[1-9][0-9]{0,5}M((0\.[0-9]{0,8}[1-9]|[1-9][0-9]{0,5}(\.[0-9]{1,9})?)S)?|(0\.[0-9]{0,8}[1-9]|[1-9][0-9]{0,8}(\.[0-9]{1,9})?)S))$";
const TAG: &str = "^[A-Za-z0-9_:=-]+$";
/// Capitals, a slash at the end and short forms of IPv6 addresses are taken too.
const ENDPOINT: &str = r"^http://([a-z0-9.-]+|\[(::1|([0-9a-f]{1,4}:){7}[0-9a-f]{1,4})\]):([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$";

/// The document that `/openapi.json` answers.
pub(crate) fn finished(description: &OpenApi) -> Value {
    let mut all = serde_json::to_value(description).expect("a description serialises");
    operations(&mut all["paths"]);
    let schemas = &mut all["components"]["schemas"];
    rules(schemas);
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
        "Something of the request is wrong, or the state is not one for it; `detail` says what.",
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
        "It is there already, is over, or is still in use; or others changed it again and again meanwhile.",
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
                // A function or version is made under a new random ID, and meets nobody.
                "409" => {
                    changes
                        && !(method == "post"
                            && ["/functions", "/versions"]
                                .iter()
                                .any(|end| path.ends_with(end)))
                }
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
    endpoints["items"]["pattern"] = ENDPOINT.into();
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
    schemas["EnvVar"]["properties"]["key"]["not"] = json!({"pattern": "^(PORT$|WEIR_)"});

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
            "size": {"$ref": "#/components/schemas/IsoDuration", "description": "At most PT1H."},
            "threshold": {"$ref": "#/components/schemas/IsoDuration", "description": "Less than `size`."}
        }
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
    parties["uniqueItems"] = true.into();
    parties["if"] = json!({"minItems": 2});
    parties["then"] = json!({"items": {"properties": {"ncaId": {"not": {"const": "*"}}}}});
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
