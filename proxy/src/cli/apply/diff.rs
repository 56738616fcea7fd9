//! What would change of a version, field by field: pure functions.
//!
//! Both sides are brought to one shape first: what the server adds by itself is
//! added to what the file says, so that only what people wrote is told.

use serde_json::{Map, Value, json};
use weir_control::model::{Autoscaling, IsoDuration, QueueSettings, Routing};

use super::{
    super::{
        list, members,
        screen::{BAD, GOOD, Screen, UNDERWAY},
        table::one_line,
    },
    file::{DIGEST, NAME, OWNER},
};

/// A field and its values; at least one is there.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Field {
    pub(super) path: String,
    pub(super) before: Option<Value>,
    pub(super) after: Option<Value>,
}

impl Field {
    pub(super) fn json(&self) -> Value {
        let mut shown = json!({"field": self.path});
        for (name, value) in [("before", &self.before), ("after", &self.after)] {
            if let Some(value) = value {
                shown[name] = value.clone();
            }
        }
        shown
    }

    pub(super) fn line(&self, screen: Screen) -> String {
        let Self {
            path,
            before,
            after,
        } = self;
        match (before, after) {
            (Some(before), Some(after)) => screen.paint(
                UNDERWAY,
                &format!("    ~ {path}: {} -> {}", shown(before), shown(after)),
            ),
            (Some(before), None) => screen.paint(BAD, &format!("    - {path}: {}", shown(before))),
            (None, after) => {
                let after = after.as_ref().map(shown).unwrap_or_default();
                screen.paint(GOOD, &format!("    + {path}: {after}"))
            }
        }
    }
}

fn shown(value: &Value) -> String {
    one_line(&value.to_string())
}

/// The fields that differ, in the order of the new side; then those that go.
pub(super) fn diff(before: &Value, after: &Value) -> Vec<Field> {
    let (mut old, mut new) = (Vec::new(), Vec::new());
    members(before, "", &mut old);
    members(after, "", &mut new);
    let empty = |value: &Value| value.is_null() || *value == json!({}) || *value == json!([]);
    old.retain(|(_, value)| !empty(value));
    new.retain(|(_, value)| !empty(value));
    let find = |all: &[(String, &Value)], path: &str| {
        let found = all.iter().find(|(p, _)| p == path);
        found.map(|(_, value)| (*value).clone())
    };
    let mut fields: Vec<Field> = new
        .iter()
        .map(|(path, value)| Field {
            path: path.clone(),
            before: find(&old, path),
            after: Some((*value).clone()),
        })
        .filter(|field| field.before != field.after)
        .collect();
    let gone = old.iter().filter(|(path, _)| find(&new, path).is_none());
    fields.extend(gone.map(|(path, value)| Field {
        path: path.clone(),
        before: Some((*value).clone()),
        after: None,
    }));
    fields
}

/// A version and its deployment as the server tells of them, less what it made.
pub(super) fn as_told(function: &Value, deployment: Option<&Value>) -> Value {
    let mut body = function.as_object().cloned().unwrap_or_default();
    for made in [
        "id",
        "ncaId",
        "versionId",
        "status",
        "ownedByDifferentAccount",
        "createdAt",
        "activeInstances",
        "healthUri",
    ] {
        body.remove(made);
    }
    if let Some(deployment) = deployment {
        let mut deployment = super::super::deploy::changeable(deployment);
        for spec in specifications(&mut deployment) {
            spec.remove("gpuSpecificationId");
        }
        body.insert("deployment".into(), deployment.into());
    }
    tidied(body)
}

/// What the server would tell of it, were it made.
pub(super) fn as_made(body: &Map<String, Value>, deployment: Option<&Map<String, Value>>) -> Value {
    let mut body = body.clone();
    let uri = body.remove("healthUri");
    let slashed = |value: &mut Value| {
        if let Value::String(path) = value
            && !path.starts_with('/')
        {
            path.insert(0, '/');
        }
    };
    let mut health = json!({
        "protocol": "HTTP", "uri": uri.unwrap_or_else(|| "/v2/health/ready".into()),
        "timeout": "PT10S", "expectedStatusCode": 200,
    });
    over(&mut health, body.remove("health"));
    slashed(&mut health["uri"]);
    body.insert("health".into(), health);
    if let Some(url) = body.get_mut("inferenceUrl") {
        slashed(url);
    }
    let name = body.get("name").cloned().unwrap_or_default();
    for (member, default) in [
        ("description", name),
        ("apiBodyFormat", "CUSTOM".into()),
        ("functionType", "DEFAULT".into()),
    ] {
        body.entry(member).or_insert(default);
    }
    if let Some(deployment) = deployment {
        let mut all = json!({
            "autoscaling": Autoscaling::default(),
            "queue": QueueSettings::default(),
            "routing": Routing::default(),
            "startTimeout": IsoDuration::secs(600),
            "drainTimeout": IsoDuration::secs(300),
            "cancelTimeout": IsoDuration::secs(5),
        });
        over(&mut all, Some(deployment.clone().into()));
        body.insert("deployment".into(), all);
    }
    tidied(body)
}

/// Puts what is given over what is there, members of objects one by one.
fn over(there: &mut Value, given: Option<Value>) {
    match (there, given) {
        (Value::Object(there), Some(Value::Object(given))) => {
            for (name, value) in given {
                over(there.entry(name).or_insert(Value::Null), Some(value));
            }
        }
        (there, Some(given)) => *there = given,
        (_, None) => {}
    }
}

fn specifications(
    deployment: &mut Map<String, Value>,
) -> impl Iterator<Item = &mut Map<String, Value>> {
    let all = deployment.get_mut("deploymentSpecifications");
    let all = all.and_then(Value::as_array_mut).into_iter().flatten();
    all.filter_map(Value::as_object_mut)
}

/// Without apply's own tags, variables by their names, durations in one way of writing.
fn tidied(mut body: Map<String, Value>) -> Value {
    if let Some(Value::Array(tags)) = body.get_mut("tags") {
        let own = |tag: &Value| {
            let tag = tag.as_str().unwrap_or_default();
            [OWNER, NAME, DIGEST].iter().any(|own| tag.starts_with(own))
        };
        tags.retain(|tag| !own(tag));
    }
    if let Some(process) = body.get_mut("process") {
        let env: Map<String, Value> = list(process, "env")
            .iter()
            .filter_map(|entry| Some((entry["key"].as_str()?.to_owned(), entry["value"].clone())))
            .collect();
        if let Value::Object(process) = process {
            process.insert("env".into(), env.into());
        }
    }
    let mut body = Value::from(body);
    same_durations(&mut body, "");
    body
}

fn same_durations(value: &mut Value, name: &str) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                same_durations(value, name);
            }
        }
        Value::Array(entries) => entries.iter_mut().for_each(|v| same_durations(v, "")),
        Value::String(text) if is_duration(name) => {
            if let Ok(duration) = text.parse::<IsoDuration>() {
                *text = duration.to_string();
            }
        }
        _ => {}
    }
}

/// Whether a member of this name is a duration.
pub(super) fn is_duration(name: &str) -> bool {
    name == "timeout"
        || ["Timeout", "Window", "Delay"]
            .iter()
            .any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(text: &str) -> Value {
        let text = format!("functions: [{text}]");
        let dir = std::path::Path::new("/srv");
        let all = super::super::file::parse(&text, "f.yaml", dir, "weir").unwrap();
        as_made(&all[0].body, all[0].deployment.as_ref())
    }

    /// As the server answers for `{name: a, process: {command: [x], env: ...}, deployment: {minInstances: 1}}`.
    fn told() -> Value {
        as_told(
            &json!({
                "id": "i", "ncaId": "default", "versionId": "v", "name": "a", "status": "ACTIVE",
                "inferenceUrl": "/", "healthUri": "/v2/health/ready", "createdAt": "t",
                "process": {"command": ["x"], "workingDir": "/srv",
                            "env": [{"key": "A", "value": "1"}, {"key": "B", "value": "2"}]},
                "apiBodyFormat": "CUSTOM", "functionType": "DEFAULT", "description": "a",
                "tags": ["mine", "weir:owner=me", "weir:name=a", "weir:digest=0"],
                "health": {"protocol": "HTTP", "uri": "/v2/health/ready", "timeout": "PT10S",
                           "expectedStatusCode": 200},
            }),
            Some(&json!({
                "deploymentId": "d", "functionStatus": "ACTIVE",
                "deploymentSpecifications": [{
                    "gpuSpecificationId": "g", "gpu": "none", "instanceType": "none",
                    "minInstances": 1, "maxInstances": 1, "maxRequestConcurrency": 1,
                }],
                "autoscaling": Autoscaling::default(), "queue": QueueSettings::default(),
                "routing": Routing::default(),
                "startTimeout": "PT10M", "drainTimeout": "PT5M", "cancelTimeout": "PT5S",
            })),
        )
    }

    #[test]
    fn what_is_so_already_is_no_difference() {
        let same = wanted(
            "{name: a, tags: [mine], process: {command: [x], env: [{key: B, value: '2'}, {key: A, value: '1'}]}, \
             deployment: {minInstances: 1, startTimeout: PT600S}}",
        );
        assert_eq!(diff(&told(), &same), []);
    }

    #[test]
    fn what_differs_is_told_field_by_field() {
        let other = wanted(
            "{name: a, process: {command: [x, --y], env: [{key: A, value: '9'}, {key: C, value: '3'}]}, \
             deployment: {minInstances: 1, maxInstances: 3, autoscaling: {idleTimeout: PT1M}, trafficWeight: 5}}",
        );
        let lines: Vec<String> = diff(&told(), &other)
            .iter()
            .map(|field| field.line(Screen::PLAIN))
            .collect();
        let expected = [
            "    + deployment.trafficWeight: 5",
            "    + process.env.C: \"3\"",
            "    - process.env.B: \"2\"",
            "    - tags: [\"mine\"]",
            "    ~ deployment.autoscaling.idleTimeout: \"PT5M\" -> \"PT1M\"",
            "    ~ deployment.deploymentSpecifications[0].maxInstances: 1 -> 3",
            "    ~ process.command: [\"x\"] -> [\"x\",\"--y\"]",
            "    ~ process.env.A: \"1\" -> \"9\"",
        ];
        let mut lines = lines;
        lines.sort_unstable();
        assert_eq!(lines, expected);
    }

    #[test]
    fn colours_tell_what_comes_and_goes() {
        let field = |before: Option<i32>, after: Option<i32>| Field {
            path: "p".into(),
            before: before.map(Value::from),
            after: after.map(Value::from),
        };
        let screen = Screen {
            width: None,
            colour: true,
        };
        assert_eq!(
            field(None, Some(1)).line(screen),
            "\u{1b}[32m    + p: 1\u{1b}[0m"
        );
        assert_eq!(
            field(Some(1), None).line(screen),
            "\u{1b}[31m    - p: 1\u{1b}[0m"
        );
        assert_eq!(
            field(Some(1), Some(2)).line(screen),
            "\u{1b}[33m    ~ p: 1 -> 2\u{1b}[0m"
        );
    }
}
