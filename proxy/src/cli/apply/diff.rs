//! What would change of a version, field by field: pure functions.
//!
//! Both sides are brought to one shape first: what the server adds by itself is
//! added to what the file says, so that only what people wrote is told.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use weir_control::model::{Autoscaling, IsoDuration, QueueSettings, Routing};

use super::{
    super::{
        list, members,
        screen::{BAD, GOOD, Screen, UNDERWAY},
        table::one_line,
    },
    file::{DIGEST, NAME, OWNER, of_a_deployment, of_a_specification},
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
        body.insert("deployment".into(), whole(deployment));
    }
    tidied(body)
}

/// A deployment with the server's defaults, and without what the server takes no notice of.
fn whole(deployment: &Map<String, Value>) -> Value {
    let mut all = json!({
        "autoscaling": Autoscaling::default(),
        "queue": QueueSettings::default(),
        "routing": Routing::default(),
        "startTimeout": IsoDuration::secs(600),
        "drainTimeout": IsoDuration::secs(300),
        "cancelTimeout": IsoDuration::secs(5),
    });
    over(&mut all, Some(deployment.clone().into()));
    as_read::<Autoscaling>(&mut all["autoscaling"]);
    as_read::<QueueSettings>(&mut all["queue"]);
    as_read::<Routing>(&mut all["routing"]);
    if let Value::Object(all) = &mut all {
        all.retain(|name, _| of_a_deployment(name));
        for spec in specifications(all) {
            spec.retain(|name, _| of_a_specification(name));
        }
    }
    all
}

/// As the server writes it once it has read it; what it would refuse stays as it is.
fn as_read<T: Serialize + DeserializeOwned>(value: &mut Value) {
    let read = serde_json::from_value::<T>(value.clone());
    if let Some(read) = read.ok().and_then(|read| serde_json::to_value(read).ok()) {
        *value = read;
    }
}

/// What brings a deployment that is there to what the file says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Update {
    pub(super) fields: Vec<Field>,
    /// The body of a PUT.
    pub(super) body: Value,
    /// The specifications whose `autoscalingConfiguration` goes: a PUT keeps it.
    pub(super) unconfigured: Vec<String>,
}

/// How a deployment that is there differs from the file's.
#[derive(Debug, PartialEq)]
pub(super) enum Difference {
    None,
    Update(Update),
    /// In what is fixed for as long as a version is deployed.
    Fixed,
}

/// `there` is as the server tells of it.
pub(super) fn difference(there: &Value, wanted: &Map<String, Value>) -> Difference {
    let mut told = super::super::deploy::changeable(there);
    let mut body = whole(wanted);
    let Value::Object(made) = &mut body else {
        return Difference::None;
    };
    let named: Vec<_> = specifications(made).map(|spec| spec.clone()).collect();
    let mut ids = Vec::new();
    let mut unconfigured = Vec::new();
    for (at, spec) in specifications(&mut told).enumerate() {
        let id = spec.remove("gpuSpecificationId").unwrap_or_default();
        let fixed = ["gpu", "instanceType"];
        let Some(named) = named.get(at).filter(|named| {
            fixed
                .iter()
                .all(|member| named.get(*member) == spec.get(*member))
        }) else {
            return Difference::Fixed;
        };
        let configured = |spec: &Map<String, Value>| spec.contains_key("autoscalingConfiguration");
        if configured(spec) && !configured(named) {
            unconfigured.push(id.as_str().unwrap_or_default().to_owned());
        }
        // The others that the file leaves out have no effect, and can't be taken back.
        spec.retain(|name, _| name == "autoscalingConfiguration" || named.contains_key(name));
        ids.push(id);
    }
    if ids.len() != named.len() {
        return Difference::Fixed;
    }
    let side = |deployment: Value| {
        let mut side = Map::new();
        side.insert("deployment".into(), deployment);
        tidied(side)
    };
    let fields = diff(&side(told.into()), &side(made.clone().into()));
    if fields.is_empty() {
        return Difference::None;
    }
    made.entry("trafficWeight").or_insert(Value::Null);
    for (spec, id) in specifications(made).zip(ids) {
        spec.insert("gpuSpecificationId".into(), id);
    }
    Difference::Update(Update {
        fields,
        body,
        unconfigured,
    })
}

/// Puts what is given over what is there, members of objects one by one.
fn over(there: &mut Value, given: Option<Value>) {
    match (there, given) {
        (Value::Object(there), Some(Value::Object(given))) => {
            for (name, value) in given {
                over(there.entry(name).or_insert(Value::Null), Some(value));
            }
        }
        (_, None | Some(Value::Null)) => {}
        (there, Some(given)) => *there = given,
    }
}

fn specifications(
    deployment: &mut Map<String, Value>,
) -> impl Iterator<Item = &mut Map<String, Value>> {
    let all = deployment.get_mut("deploymentSpecifications");
    let all = all.and_then(Value::as_array_mut).into_iter().flatten();
    all.filter_map(Value::as_object_mut)
}

/// Without apply's own tags, variables by their names, durations and numbers in one way of writing.
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
    same_writing(&mut body, "");
    body
}

fn same_writing(value: &mut Value, name: &str) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                same_writing(value, name);
            }
        }
        Value::Array(entries) => entries.iter_mut().for_each(|v| same_writing(v, "")),
        Value::String(text) if is_duration(name) => {
            if let Ok(duration) = text.parse::<IsoDuration>() {
                *text = duration.to_string();
            }
        }
        Value::Number(number) => {
            // As the server has it, 2.0 is 2.
            let whole = number
                .as_f64()
                .filter(|n| n.fract() == 0.0 && n.abs() < 1e15);
            if let Some(whole) = whole {
                *value = (whole as i64).into();
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
    fn a_deployment_is_compared_as_it_is() {
        let wanted = |text: &str| {
            let text = format!("functions: [{{name: a, endpoints: [x], deployment: {text}}}]");
            let dir = std::path::Path::new("/srv");
            let all = super::super::file::parse(&text, "f.yaml", dir, "weir").unwrap();
            all[0].deployment.clone().unwrap()
        };
        let there = json!({
            "deploymentId": "d", "functionStatus": "ACTIVE", "trafficWeight": 3,
            "deploymentSpecifications": [{
                "gpuSpecificationId": "g", "gpu": "H100", "instanceType": "H100_1x",
                "minInstances": 1, "maxInstances": 2, "maxRequestConcurrency": 1,
                "regions": ["r"], "autoscalingConfiguration": {"scaleUpDetails": {"factor": 2, "threshold": 1}},
            }],
            "autoscaling": {"policy": "nvcf-step", "targetUtilization": 1.0, "stableWindow": "PT1M",
                            "panicWindow": "PT6S", "scaleInDelay": "PT0S", "idleTimeout": "PT5M"},
            "queue": QueueSettings::default(), "routing": Routing::default(),
            "startTimeout": "PT10M", "drainTimeout": "PT5M", "cancelTimeout": "PT5S",
        });
        let same = "{gpu: H100, instanceType: H100_1x, minInstances: 1, maxInstances: 2, trafficWeight: 3, \
                     deploymentSpecifications: [{autoscalingConfiguration: {scaleUpDetails: {factor: 2.0, threshold: 1}}}], \
                     autoscaling: {policy: NVCF-STEP, targetUtilization: 1, stableWindow: PT60S}, \
                     startTimeout: PT600S, unheardOf: 1, queue: null}";
        assert_eq!(difference(&there, &wanted(same)), Difference::None);

        let plain = "{gpu: H100, instanceType: H100_1x, minInstances: 1, maxInstances: 3}";
        let Difference::Update(update) = difference(&there, &wanted(plain)) else {
            panic!("it can be changed");
        };
        let mut paths: Vec<&str> = update.fields.iter().map(|f| f.path.as_str()).collect();
        paths.sort_unstable();
        let spec = "deployment.deploymentSpecifications[0]";
        assert_eq!(
            paths,
            [
                "deployment.autoscaling.policy",
                "deployment.autoscaling.targetUtilization",
                &format!("{spec}.autoscalingConfiguration.scaleUpDetails.factor"),
                &format!("{spec}.autoscalingConfiguration.scaleUpDetails.threshold"),
                &format!("{spec}.maxInstances"),
                "deployment.trafficWeight",
            ]
        );
        assert_eq!(update.body["trafficWeight"], Value::Null);
        assert_eq!(update.body["queue"], json!(QueueSettings::default()));
        assert_eq!(
            update.body["deploymentSpecifications"][0]["gpuSpecificationId"],
            "g"
        );
        assert_eq!(update.unconfigured, ["g"]);

        for fixed in [
            "{gpu: H100, instanceType: H100_2x}",
            "{}",
            "{gpu: H100, instanceType: H100_1x, deploymentSpecifications: [{}, {}]}",
        ] {
            assert_eq!(
                difference(&there, &wanted(fixed)),
                Difference::Fixed,
                "{fixed}"
            );
        }
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
