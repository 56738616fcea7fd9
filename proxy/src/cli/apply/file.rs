//! The file that `weir apply` reads: `functions`, each one NVCF's create
//! request with its `deployment` in it.

use std::{
    collections::BTreeSet,
    fmt::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::super::{deploy::with_defaults, list};

pub(super) const OWNER: &str = "weir:owner=";
pub(super) const NAME: &str = "weir:name=";
pub(super) const DIGEST: &str = "weir:digest=";

/// NVCF's limit of a tag, less what stands before the name.
const LONGEST_NAME: usize = 128 - NAME.len();

/// Stands for the path of the weir that applies.
const BINARY: &str = "${WEIR_BIN}";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    functions: Vec<Map<String, Value>>,
}

/// One entry of the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    pub(super) name: String,
    /// The create request, without apply's own tags.
    body: Map<String, Value>,
    /// Absent: the version is made and not deployed.
    pub(super) deployment: Option<Map<String, Value>>,
    /// Of both, hexadecimal.
    pub(super) digest: String,
}

impl Wanted {
    fn new(mut entry: Map<String, Value>, dir: &Path, binary: &str) -> anyhow::Result<Self> {
        let name = entry
            .get("name")
            .and_then(Value::as_str)
            .context("a function has no name")?
            .to_owned();
        ensure!(
            name.len() <= LONGEST_NAME && is_word(&name),
            "'{name}': a name is at most {LONGEST_NAME} letters, digits, - and _"
        );
        let deployment = match entry.remove("deployment") {
            None | Some(Value::Null) => None,
            Some(Value::Object(deployment)) => Some(with_defaults(deployment)),
            Some(_) => bail!("{name}: deployment must be a mapping"),
        };
        entry.entry("inferenceUrl").or_insert("/".into());
        if let Some(process) = entry.get_mut("process") {
            ensure!(process.is_object(), "{name}: process must be a mapping");
            substitute(process, binary);
            let working_dir = match process["workingDir"].as_str() {
                Some(given) => dir.join(given),
                None => dir.to_owned(),
            };
            process["workingDir"] = json!(tidy(&working_dir));
        }
        let mut canonical = String::new();
        write_canonical(&json!([entry, deployment]), &mut canonical);
        let mut digest = String::new();
        for byte in Sha256::digest(&canonical) {
            write!(digest, "{byte:02x}").context("a string takes what is written")?;
        }
        Ok(Self {
            name,
            body: entry,
            deployment,
            digest,
        })
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
    parse(&text, &dir, binary).with_context(|| format!("{}", file.display()))
}

pub(super) fn parse(text: &str, dir: &Path, binary: &str) -> anyhow::Result<Vec<Wanted>> {
    let document: Document = serde_saphyr::from_str(text).map_err(|e| anyhow::anyhow!("{e}"))?;
    let mut names = BTreeSet::new();
    document
        .functions
        .into_iter()
        .map(|entry| {
            let wanted = Wanted::new(entry, dir, binary)?;
            ensure!(
                names.insert(wanted.name.clone()),
                "two functions are named '{}'",
                wanted.name
            );
            Ok(wanted)
        })
        .collect()
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
        parse(text, Path::new("/dir/."), "/bin/weir")
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
        for other in [
            "{name: a, endpoints: [y], description: d}",
            "{name: a, endpoints: [x], description: d, deployment: {}}",
            "{name: a, endpoints: [x, y], description: d}",
        ] {
            assert_ne!(a.digest, one(other).digest, "{other}");
        }
        assert_eq!(a.digest.len(), 64);
    }

    #[test]
    fn files_that_make_no_sense_are_refused() {
        for (text, part) in [
            ("functions: [{endpoints: [x]}]", "no name"),
            ("functions: [{name: 'a b'}]", "'a b'"),
            ("functions: [{name: a}, {name: a}]", "two functions"),
            ("functions: [{name: a, deployment: 1}]", "deployment"),
            ("functions: [{name: a, process: 1}]", "process"),
            ("function: []", "function"),
            ("functions: [", ""),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(parsed(&format!("functions: [{{name: {}}}]", "a".repeat(119))).is_err());
        assert!(owner("a.b").is_err() && owner("").is_err() && owner("ci-1").is_ok());
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
