//! The file that `weir apply` reads: `functions`, each one NVCF's create
//! request with its `deployment` in it.

use std::{
    collections::BTreeSet,
    fmt::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{
    super::{
        api::{Problem, near},
        deploy::with_defaults,
        list,
    },
    diff::is_duration,
    places::{self, Places},
};
use weir_control::model::IsoDuration;

pub(super) const OWNER: &str = "weir:owner=";
pub(super) const NAME: &str = "weir:name=";
pub(super) const DIGEST: &str = "weir:digest=";

/// NVCF's limit of a tag, less what stands before the name.
const LONGEST_NAME: usize = 128 - NAME.len();

/// Stands for the path of the weir that applies.
const BINARY: &str = "${WEIR_BIN}";

/// One entry of the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    pub(super) name: String,
    /// The create request, without apply's own tags.
    pub(super) body: Map<String, Value>,
    /// Absent: the version is made and not deployed.
    pub(super) deployment: Option<Map<String, Value>>,
    /// Of the body, hexadecimal: a deployment can be changed, a version can't.
    pub(super) digest: String,
    at: At,
}

/// Where in the file an entry is.
#[derive(Debug, Clone, PartialEq)]
struct At {
    source: String,
    places: std::sync::Arc<Places>,
    /// `functions[0]`.
    path: String,
}

impl At {
    /// What is wrong with a member, and where that is.
    fn wrong(&self, member: &str, why: impl std::fmt::Display) -> anyhow::Error {
        let path = match member {
            "" => self.path.clone(),
            member => format!("{}.{member}", self.path),
        };
        anyhow!("{}{}: {path}: {why}", self.source, self.places.of(&path))
    }
}

/// What a member has to be; `null` is the same as nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Whole,
    Number,
    Texts,
    Mapping,
    Mappings,
}
use Kind::{Mapping, Mappings, Number, Text, Texts, Whole};

impl Kind {
    fn holds(self, value: &Value) -> bool {
        match self {
            Text => value.is_string(),
            // As the server has it, 2.0 is one too.
            Whole => value.is_u64() || value.as_f64().is_some_and(|n| n >= 0.0 && n.fract() == 0.0),
            Number => value.is_number(),
            Texts | Mappings => value.is_array(),
            Mapping => value.is_object(),
        }
    }

    /// What the entries of a list have to be.
    fn entries(self) -> Option<Self> {
        match self {
            Texts => Some(Text),
            Mappings => Some(Mapping),
            _ => None,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Text => "a string",
            Whole => "a whole number",
            Number => "a number",
            Texts | Mappings => "a list",
            Mapping => "a mapping",
        }
    }
}

type Members = &'static [(&'static str, Kind)];

/// The members of each group; one that is nearly so named may be meant by another.
const MEMBERS: [(&str, Members); 7] = [
    (
        "",
        &[
            ("name", Text),
            ("inferenceUrl", Text),
            ("inferencePort", Whole),
            ("healthUri", Text),
            ("health", Mapping),
            ("process", Mapping),
            ("endpoints", Texts),
            ("tags", Texts),
            ("description", Text),
            ("rateLimit", Mapping),
            ("apiBodyFormat", Text),
            ("functionType", Text),
            ("deployment", Mapping),
        ],
    ),
    (
        "process",
        &[("command", Texts), ("env", Mappings), ("workingDir", Text)],
    ),
    (
        "health",
        &[
            ("protocol", Text),
            ("uri", Text),
            ("port", Whole),
            ("timeout", Text),
            ("expectedStatusCode", Whole),
        ],
    ),
    (
        "deployment",
        &[
            ("gpu", Text),
            ("instanceType", Text),
            ("minInstances", Whole),
            ("maxInstances", Whole),
            ("maxRequestConcurrency", Whole),
            ("deploymentSpecifications", Mappings),
            ("autoscaling", Mapping),
            ("queue", Mapping),
            ("routing", Mapping),
            ("trafficWeight", Whole),
            ("startTimeout", Text),
            ("drainTimeout", Text),
            ("cancelTimeout", Text),
        ],
    ),
    (
        "deployment.autoscaling",
        &[
            ("policy", Text),
            ("targetUtilization", Number),
            ("stableWindow", Text),
            ("panicWindow", Text),
            ("scaleInDelay", Text),
            ("idleTimeout", Text),
        ],
    ),
    (
        "deployment.queue",
        &[
            ("maxRequests", Whole),
            ("maxBytes", Whole),
            ("holdBytes", Whole),
            ("busyTimeout", Text),
            ("coldTimeout", Text),
        ],
    ),
    (
        "deployment.routing",
        &[("policy", Text), ("sessionHeader", Text)],
    ),
];

/// Those of an entry of `deploymentSpecifications`.
const SPECIFICATION: Members = &[
    ("gpu", Text),
    ("instanceType", Text),
    ("minInstances", Whole),
    ("maxInstances", Whole),
    ("maxRequestConcurrency", Whole),
    ("autoscalingConfiguration", Mapping),
    ("backend", Text),
    ("clusters", Texts),
    ("regions", Texts),
    ("attributes", Texts),
    ("availabilityZones", Texts),
    ("preferredOrder", Whole),
];

/// Finds slips of the keyboard, wrong kinds of values and wrong durations; all else the server judges.
fn check(entry: &Value, at: &At) -> anyhow::Result<()> {
    for (group, known) in MEMBERS {
        let pointer = format!("/{}", group.replace('.', "/"));
        let value = match group {
            "" => Some(entry),
            _ => entry.pointer(&pointer),
        };
        if let Some(value) = value {
            check_group(value, group, known, at)?;
        }
    }
    let path = "deployment.deploymentSpecifications";
    for (number, spec) in list(&entry["deployment"], "deploymentSpecifications")
        .iter()
        .enumerate()
    {
        check_group(spec, &format!("{path}[{number}]"), SPECIFICATION, at)?;
    }
    Ok(())
}

fn check_group(value: &Value, group: &str, known: Members, at: &At) -> anyhow::Result<()> {
    let Value::Object(given) = value else {
        return Ok(());
    };
    for (member, value) in given {
        let dot = if group.is_empty() { "" } else { "." };
        let path = format!("{group}{dot}{member}");
        let Some((_, kind)) = known.iter().find(|(name, _)| name == member) else {
            if let [meant, ..] = near(member, known.iter().map(|(name, _)| *name))[..] {
                return Err(at.wrong(
                    &path,
                    format!("there is no such member: did you mean {meant}?"),
                ));
            }
            continue;
        };
        if value.is_null() {
            continue;
        }
        if is_duration(member) {
            let why = match value {
                Value::String(text) => text.parse::<IsoDuration>().err(),
                other => Some(format!(
                    "{other} is not an ISO 8601 duration such as PT1M30S"
                )),
            };
            if let Some(why) = why {
                return Err(at.wrong(&path, why));
            }
        }
        let of_kind = |kind: Kind, value: &Value, path: &str| {
            if kind.holds(value) {
                return Ok(());
            }
            let found = match value {
                Value::Array(_) => "a list".into(),
                Value::Object(_) => "a mapping".into(),
                plain => plain.to_string(),
            };
            Err(at.wrong(path, format!("must be {}, not {found}", kind.as_str())))
        };
        of_kind(*kind, value, &path)?;
        if let Some(kind) = kind.entries() {
            for (number, entry) in value.as_array().into_iter().flatten().enumerate() {
                of_kind(kind, entry, &format!("{path}[{number}]"))?;
            }
        }
    }
    Ok(())
}

/// Whether a deployment has a member of this name.
pub(super) fn of_a_deployment(name: &str) -> bool {
    let members = MEMBERS.iter().find(|(group, _)| *group == "deployment");
    members.is_some_and(|(_, known)| known.iter().any(|(known, _)| *known == name))
}

/// Whether an entry of `deploymentSpecifications` has a member of this name.
pub(super) fn of_a_specification(name: &str) -> bool {
    SPECIFICATION.iter().any(|(known, _)| *known == name)
}

impl Wanted {
    fn new(entry: Value, at: At, dir: &Path, binary: &str) -> anyhow::Result<Self> {
        check(&entry, &at)?;
        let Value::Object(mut entry) = entry else {
            return Err(at.wrong("", "must be a mapping"));
        };
        let name = match entry.get("name") {
            Some(Value::String(name)) => name.clone(),
            Some(_) => return Err(at.wrong("name", "must be a string")),
            None => return Err(at.wrong("", "it has no name")),
        };
        if name.len() > LONGEST_NAME || !is_word(&name) {
            let why =
                format!("'{name}': a name is at most {LONGEST_NAME} letters, digits, - and _");
            return Err(at.wrong("name", why));
        }
        let deployment = match entry.remove("deployment") {
            None | Some(Value::Null) => None,
            Some(Value::Object(deployment)) => Some(with_defaults(some(deployment))),
            Some(_) => return Err(at.wrong("deployment", "must be a mapping")),
        };
        entry.entry("inferenceUrl").or_insert("/".into());
        if let Some(process) = entry.get_mut("process").filter(|p| !p.is_null()) {
            if !process.is_object() {
                return Err(at.wrong("process", "must be a mapping"));
            }
            substitute(process, binary);
            let working_dir = match process["workingDir"].as_str() {
                Some(given) => dir.join(given),
                None => dir.to_owned(),
            };
            process["workingDir"] = json!(tidy(&working_dir));
        }
        let mut canonical = String::new();
        write_canonical(&json!(entry), &mut canonical);
        let mut digest = String::new();
        for byte in Sha256::digest(&canonical) {
            write!(digest, "{byte:02x}").context("a string takes what is written")?;
        }
        Ok(Self {
            name,
            body: entry,
            deployment,
            digest,
            at,
        })
    }

    /// The server's error with where in the file it is about.
    pub(super) fn placed(&self, error: anyhow::Error) -> anyhow::Error {
        let Some(problem) = error.downcast_ref::<Problem>() else {
            return error;
        };
        let of_a_member = [
            reqwest::StatusCode::BAD_REQUEST,
            reqwest::StatusCode::CONFLICT,
        ];
        if !of_a_member.contains(&problem.status) {
            return error;
        }
        let named = problem.detail.split(": ").next().unwrap_or_default();
        let short = named.trim_start_matches("deploymentSpecifications[0].");
        let entry = &self.at.path;
        let path = [
            format!("{entry}.{named}"),
            format!("{entry}.deployment.{named}"),
            format!("{entry}.deployment.{short}"),
        ]
        .into_iter()
        .find(|path| self.at.places.knows(path))
        .unwrap_or_else(|| entry.clone());
        let place = format!("{}{}: {path}", self.at.source, self.at.places.of(&path));
        error.context(place)
    }

    /// The create request, with the tags by which the next apply knows it.
    pub(super) fn body(&self, owner: &str) -> Value {
        let mut body = Value::from(self.body.clone());
        let mut tags = list(&body, "tags").to_vec();
        tags.push(format!("{OWNER}{owner}").into());
        tags.push(format!("{NAME}{}", self.name).into());
        tags.push(format!("{DIGEST}{}", self.digest).into());
        body["tags"] = tags.into();
        body
    }
}

/// Checks an owner: it becomes a tag.
pub(super) fn owner(s: &str) -> Result<String, String> {
    if s.len() <= 64 && is_word(s) {
        Ok(s.to_owned())
    } else {
        Err("must be 1 to 64 letters, digits, - and _".into())
    }
}

fn is_word(s: &str) -> bool {
    !s.is_empty()
        && s.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

pub(super) fn read(file: &Path) -> anyhow::Result<Vec<Wanted>> {
    let text = super::super::read(file)?;
    let dir = match file.parent() {
        Some(parent) if file != Path::new("-") => std::path::absolute(parent.join("."))?,
        _ => std::env::current_dir()?,
    };
    let binary = std::env::current_exe().context("can't tell the path of this weir")?;
    let binary = binary
        .to_str()
        .context("the path of this weir is not UTF-8")?;
    let source = match file == Path::new("-") {
        true => "standard input".into(),
        false => file.display().to_string(),
    };
    parse(&text, &source, &dir, binary)
}

pub(super) fn parse(
    text: &str,
    source: &str,
    dir: &Path,
    binary: &str,
) -> anyhow::Result<Vec<Wanted>> {
    let (document, places) =
        places::read(text).map_err(|(place, why)| anyhow!("{source}{place}: {why}"))?;
    let places = std::sync::Arc::new(places);
    let at = |path: String| At {
        source: source.to_owned(),
        places: places.clone(),
        path,
    };
    let Value::Object(mut document) = document else {
        return Err(anyhow!(
            "{source}:1:1: must be a mapping with the member functions, a list"
        ));
    };
    let entries = document.remove("functions");
    if let Some(member) = document.keys().next() {
        return Err(
            at(member.clone()).wrong("", "there is no such member: functions is the only one")
        );
    }
    let Some(Value::Array(entries)) = entries else {
        return Err(at("functions".into()).wrong("", "must be a list of functions"));
    };
    let mut names = BTreeSet::new();
    entries
        .into_iter()
        .enumerate()
        .map(|(number, entry)| {
            let wanted = Wanted::new(entry, at(format!("functions[{number}]")), dir, binary)?;
            if !names.insert(wanted.name.clone()) {
                let why = format!("two functions are named '{}'", wanted.name);
                return Err(wanted.at.wrong("name", why));
            }
            Ok(wanted)
        })
        .collect()
}

/// Without the members that are `null`: they are the same as nothing, and get defaults.
fn some(members: Map<String, Value>) -> Map<String, Value> {
    let given = members.into_iter().filter(|(_, value)| !value.is_null());
    given.collect()
}

fn substitute(value: &mut Value, binary: &str) {
    match value {
        Value::String(s) => *s = s.replace(BINARY, binary),
        Value::Array(entries) => entries.iter_mut().for_each(|v| substitute(v, binary)),
        Value::Object(members) => members.values_mut().for_each(|v| substitute(v, binary)),
        _ => {}
    }
}

/// Without the `.` parts; `..` stays, as it may follow a link.
fn tidy(path: &Path) -> PathBuf {
    path.components().collect()
}

/// JSON with sorted members: the order in the file does not count.
fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_unstable_by_key(|(key, _)| *key);
            out.push('{');
            for (key, value) in members {
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_canonical(value, out);
                out.push(',');
            }
            out.push('}');
        }
        Value::Array(entries) => {
            out.push('[');
            for value in entries {
                write_canonical(value, out);
                out.push(',');
            }
            out.push(']');
        }
        plain => out.push_str(&plain.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "
functions:
  - name: a
    tags: [mine]
    process:
      command: ['${WEIR_BIN}', sample-function]
    deployment: {minInstances: 2}
  - name: b
    inferenceUrl: /infer
    process: {command: [x], workingDir: sub, env: [{key: K, value: '1'}]}
  - name: c
    endpoints: ['http://a:1']
";

    fn parsed(text: &str) -> anyhow::Result<Vec<Wanted>> {
        parse(text, "f.yaml", Path::new("/dir/."), "/bin/weir")
    }

    #[test]
    fn entries_are_resolved() {
        let all = parsed(TEXT).unwrap();
        let body = all[0].body("me");
        assert_eq!(
            body,
            json!({
                "name": "a", "inferenceUrl": "/",
                "process": {"command": ["/bin/weir", "sample-function"], "workingDir": "/dir"},
                "tags": ["mine", "weir:owner=me", "weir:name=a", format!("weir:digest={}", all[0].digest)],
            })
        );
        let tag = |c: char| c.is_ascii_alphanumeric() || "-_:=".contains(c);
        for tag_text in list(&body, "tags") {
            let tag_text = tag_text.as_str().unwrap();
            assert!(
                tag_text.len() <= 128 && tag_text.chars().all(tag),
                "{tag_text}"
            );
        }
        let deployment = all[0].deployment.as_ref().unwrap();
        assert_eq!(deployment["deploymentSpecifications"][0]["maxInstances"], 2);
        assert_eq!(all[1].body["process"]["workingDir"], "/dir/sub");
        assert_eq!(all[1].deployment, None);
        assert!(!all[2].body.contains_key("process"));
    }

    #[test]
    fn the_digest_is_of_what_is_said_not_of_how() {
        let one = |text: &str| parsed(&format!("functions: [{text}]")).unwrap().remove(0);
        let a = one("{name: a, endpoints: [x], description: d}");
        let reordered = one("{description: d, endpoints: [x], name: a}");
        assert_eq!(a.digest, reordered.digest);
        let deployed = one("{name: a, endpoints: [x], description: d, deployment: {}}");
        assert_eq!(a.digest, deployed.digest, "a deployment makes no version");
        for other in [
            "{name: a, endpoints: [z], description: d}",
            "{name: a, endpoints: [x, z], description: d}",
        ] {
            assert_ne!(a.digest, one(other).digest, "{other}");
        }
        assert_eq!(a.digest.len(), 64);
    }

    #[test]
    fn files_that_make_no_sense_are_refused() {
        for (text, expected) in [
            (
                "functions: [{endpoints: [x]}]",
                "f.yaml:1:13: functions[0]: it has no name",
            ),
            (
                "functions:\n- name: 'a b'",
                "f.yaml:2:9: functions[0].name: 'a b': a name is",
            ),
            (
                "functions: [{name: a}, {name: a}]",
                "f.yaml:1:31: functions[1].name: two functions are named 'a'",
            ),
            (
                "functions: [{name: a, deployment: 1}]",
                "f.yaml:1:35: functions[0].deployment: must be a mapping",
            ),
            (
                "functions: [{name: a, process: 1}]",
                "f.yaml:1:32: functions[0].process: must be a mapping",
            ),
            (
                "functions: [{name: 7}]",
                "f.yaml:1:20: functions[0].name: must be a string",
            ),
            (
                "functions: [a]",
                "f.yaml:1:13: functions[0]: must be a mapping",
            ),
            (
                "function: []",
                "f.yaml:1:11: function: there is no such member: functions is",
            ),
            ("functions: {}", "f.yaml:1:12: functions: must be a list"),
            ("[]", "f.yaml:1:1: must be a mapping"),
            ("functions: [", "f.yaml:1:1"),
            (
                "functions:\n- name: a\n  deployment:\n    minInstance: 1",
                "f.yaml:4:18: functions[0].deployment.minInstance: there is no such member: did you mean minInstances?",
            ),
            (
                "functions:\n- name: a\n  deployment:\n    autoscaling: {idleTimeout: 5m}",
                "f.yaml:4:32: functions[0].deployment.autoscaling.idleTimeout: '5m' is not an ISO 8601 duration: write PT5M",
            ),
            (
                "functions:\n- name: a\n  tags: mine",
                "f.yaml:3:9: functions[0].tags: must be a list, not \"mine\"",
            ),
            (
                "functions:\n- {name: a, tags: [mine, 7]}",
                "f.yaml:2:26: functions[0].tags[1]: must be a string, not 7",
            ),
            (
                "functions:\n- name: a\n  process: {command: x}",
                "f.yaml:3:22: functions[0].process.command: must be a list, not \"x\"",
            ),
            (
                "functions:\n- name: a\n  process: {workingDir: [x]}",
                "f.yaml:3:25: functions[0].process.workingDir: must be a string, not a list",
            ),
            (
                "functions:\n- name: a\n  deployment: {minInstances: '1'}",
                "f.yaml:3:30: functions[0].deployment.minInstances: must be a whole number, not \"1\"",
            ),
            (
                "functions:\n- name: a\n  deployment: {queue: 7}",
                "f.yaml:3:23: functions[0].deployment.queue: must be a mapping, not 7",
            ),
            (
                "functions:\n- name: a\n  deployment:\n    deploymentSpecifications: [{maxInstances: -1}]",
                "f.yaml:4:47: functions[0].deployment.deploymentSpecifications[0].maxInstances: must be a whole number, not -1",
            ),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
        assert!(
            parsed("functions: [{name: a, tags: null, process: null, deployment: {queue: null, gpu: null}}]").is_ok(),
            "null is nothing"
        );
        assert!(
            parsed("functions: [{name: a, containerImage: x}]").is_ok(),
            "the server's to judge"
        );
        assert!(parsed(&format!("functions: [{{name: {}}}]", "a".repeat(119))).is_err());
        assert!(owner("a.b").is_err() && owner("").is_err() && owner("ci-1").is_ok());
    }

    #[test]
    fn the_servers_refusals_get_their_place() {
        let text =
            "functions:\n- name: a\n  process: {command: []}\n  deployment:\n    minInstances: 9";
        let wanted = parsed(text).unwrap().remove(0);
        let placed = |detail: &str| {
            let body = json!({"detail": detail}).to_string();
            let problem = Problem::read(reqwest::StatusCode::BAD_REQUEST, body.as_bytes());
            format!("{:#}", wanted.placed(problem.into()))
        };
        for (detail, place) in [
            (
                "process.command: is empty",
                "f.yaml:3:22: functions[0].process.command",
            ),
            (
                "deploymentSpecifications[0].minInstances: no",
                "f.yaml:5:19: functions[0].deployment.minInstances",
            ),
            ("something else", "f.yaml:2:3: functions[0]"),
        ] {
            let shown = placed(detail);
            assert_eq!(shown, format!("{place}: Bad Request (400): {detail}"));
        }
    }

    #[test]
    fn the_example_is_read() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/functions.yaml");
        let all = read(&file).unwrap();
        let names: Vec<&str> = all.iter().map(|w| w.name.as_str()).collect();
        assert_eq!(names, ["sample", "hello"]);
        for wanted in &all {
            let dir = wanted.body["process"]["workingDir"].as_str().unwrap();
            assert!(Path::new(dir).join("hello.py").is_file(), "{dir}");
            assert!(wanted.deployment.is_some());
        }
    }
}
