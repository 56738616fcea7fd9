//! `weir function` and `weir version`.

use std::path::PathBuf;

use anyhow::bail;
use serde_json::{Map, Value, json};

use super::{
    Common,
    api::{Client, version_path},
    id::Id,
    list, moment, read_object,
    table::{self, Column},
    text,
};

#[derive(Debug, clap::Args)]
pub struct Functions {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: FunctionCommand,
}

#[derive(Debug, clap::Subcommand)]
enum FunctionCommand {
    /// Create a function with its first version
    #[command(after_help = "Example: weir function create hello -- python3 hello.py")]
    Create {
        /// Its name: letters, digits, - and _
        name: String,
        #[command(flatten)]
        spec: FunctionSpec,
    },
    /// List every version of every function
    List,
    /// Show a function's versions whole
    Get {
        /// Its ID, or its name where that is unique
        function: String,
    },
    /// Delete a function with all its versions and their deployments
    Delete {
        /// Its ID, or its name where that is unique
        function: String,
        /// This version only
        #[arg(long, value_name = "ID")]
        version: Option<Id>,
    },
}

#[derive(Debug, clap::Args)]
pub struct Versions {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: VersionCommand,
}

#[derive(Debug, clap::Subcommand)]
enum VersionCommand {
    /// Create a version of a function that is there
    Create {
        /// The function's ID, or its name where that is unique
        function: String,
        #[command(flatten)]
        spec: FunctionSpec,
    },
    /// Delete a version with its deployment
    Delete {
        /// The function's ID, or its name where that is unique
        function: String,
        /// The version's ID, or its beginning
        version: Id,
    },
}

/// What a version is made of.
#[derive(Debug, Default, clap::Args)]
struct FunctionSpec {
    /// The whole body, JSON or YAML (- for standard input); the other flags replace its members
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A server that runs already, http://host:port or https://host:port (may be given again)
    #[arg(long, value_name = "URL", conflicts_with = "command")]
    endpoint: Vec<String>,
    /// Path that is called where the caller names none [default: /]
    #[arg(long, value_name = "PATH")]
    inference_url: Option<String>,
    /// Path of the health check [default: /v2/health/ready]
    #[arg(long, value_name = "PATH")]
    health_uri: Option<String>,
    /// A variable for the process (may be given again)
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Directory that the process starts in
    #[arg(long, value_name = "DIR")]
    working_dir: Option<String>,
    /// A tag (may be given again)
    #[arg(long)]
    tag: Vec<String>,
    #[arg(long)]
    description: Option<String>,
    /// The program to start as an instance and its arguments, after --; it listens on $PORT
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn pair(s: &str) -> Result<(String, String), String> {
    match s.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("must be KEY=VALUE".into()),
    }
}

impl FunctionSpec {
    fn body(&self, name: &str) -> anyhow::Result<Value> {
        let base = match &self.file {
            Some(file) => read_object(file)?,
            None => Map::new(),
        };
        self.over(base, name)
    }

    /// The body with what the flags say put over it.
    fn over(&self, mut body: Map<String, Value>, name: &str) -> anyhow::Result<Value> {
        body.insert("name".into(), name.into());
        if !self.endpoint.is_empty() {
            body.remove("process");
            body.insert("endpoints".into(), json!(self.endpoint));
        }
        if !self.command.is_empty() {
            body.remove("endpoints");
            let process = body.entry("process").or_insert_with(|| json!({}));
            process["command"] = json!(self.command);
        }
        if let Some(dir) = &self.working_dir {
            match body.get_mut("process") {
                Some(process) => process["workingDir"] = json!(dir),
                None => bail!("--working-dir is for a command: give one after --"),
            }
        }
        if !self.env.is_empty() {
            let process = body.get_mut("process");
            let Some(process) = process.filter(|p| p.is_object()) else {
                bail!("--env is for a command: give one after --");
            };
            let mut env = list(process, "env").to_vec();
            env.retain(|entry| !self.env.iter().any(|(key, _)| entry["key"] == **key));
            env.extend(
                self.env
                    .iter()
                    .map(|(key, value)| json!({"key": key, "value": value})),
            );
            process["env"] = env.into();
        }
        if ![
            "process",
            "endpoints",
            "containerImage",
            "models",
            "helmChart",
        ]
        .iter()
        .any(|member| body.contains_key(*member))
        {
            bail!("nothing to run: give a command after --, or --endpoint URL, or --file");
        }
        match &self.inference_url {
            Some(path) => {
                body.insert("inferenceUrl".into(), path.as_str().into());
            }
            None => {
                body.entry("inferenceUrl").or_insert("/".into());
            }
        }
        if let Some(path) = &self.health_uri {
            match body.get_mut("health").filter(|h| h.is_object()) {
                Some(health) => health["uri"] = json!(path),
                None => {
                    body.insert("healthUri".into(), path.as_str().into());
                }
            }
        }
        if let Some(description) = &self.description {
            body.insert("description".into(), description.as_str().into());
        }
        if !self.tag.is_empty() {
            body.insert("tags".into(), json!(self.tag));
        }
        Ok(body.into())
    }
}

const COLUMNS: &[Column] = &[
    table::id("function"),
    table::id("version"),
    table::name("name"),
    table::state("status"),
    table::plain("runs"),
    table::plain("created"),
];

fn row(function: &Value) -> Vec<String> {
    let runs = if let Some(command) = function["process"]["command"].as_array() {
        let words: Vec<&str> = command.iter().filter_map(Value::as_str).collect();
        words.join(" ")
    } else if !list(function, "endpoints").is_empty() {
        let urls: Vec<&str> = list(function, "endpoints")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        urls.join(", ")
    } else {
        text(function, "containerImage")
    };
    vec![
        text(function, "id"),
        text(function, "versionId"),
        text(function, "name"),
        text(function, "status"),
        runs,
        moment(function, "createdAt"),
    ]
}

impl Functions {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let common = self.common;
        let client = Client::new(&common)?;
        match self.command {
            FunctionCommand::Create { name, spec } => {
                let answer = client
                    .post("/v2/nvcf/functions", &spec.body(&name)?)
                    .await?;
                common.show(&answer, COLUMNS, vec![row(&answer["function"])])
            }
            FunctionCommand::List => {
                let answer = client.get("/v2/nvcf/functions").await?;
                let rows = list(&answer, "functions").iter().map(row).collect();
                common.show(&answer, COLUMNS, rows)
            }
            FunctionCommand::Get { function } => {
                let rows = client.function(&function).await?;
                let mut functions = Vec::new();
                for row in &rows {
                    let mut answer = client.get(&version_path(row.id, row.version_id)).await?;
                    functions.push(answer["function"].take());
                }
                common.show_whole(&json!({"functions": functions}), &functions)
            }
            FunctionCommand::Delete { function, version } => {
                let rows = client.function(&function).await?;
                delete(&client, &common, &rows, version.as_ref()).await
            }
        }
    }
}

impl Versions {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let common = self.common;
        let client = Client::new(&common)?;
        match self.command {
            VersionCommand::Create { function, spec } => {
                let rows = client.function(&function).await?;
                let Some(newest) = rows.last() else {
                    bail!("no function {function}");
                };
                let path = format!("/v2/nvcf/functions/{}/versions", newest.id);
                let answer = client.post(&path, &spec.body(&newest.name)?).await?;
                common.show(&answer, COLUMNS, vec![row(&answer["function"])])
            }
            VersionCommand::Delete { function, version } => {
                let rows = client.function(&function).await?;
                delete(&client, &common, &rows, Some(&version)).await
            }
        }
    }
}

async fn delete(
    client: &Client,
    common: &Common,
    rows: &[super::api::Row],
    version: Option<&Id>,
) -> anyhow::Result<()> {
    let gone: Vec<_> = match version {
        Some(_) => vec![super::api::pick_version(
            rows,
            version,
            super::api::Unnamed::Newest,
        )?],
        None => rows.iter().collect(),
    };
    for row in &gone {
        client.delete(&version_path(row.id, row.version_id)).await?;
    }
    let deleted: Vec<Value> = gone
        .iter()
        .map(|row| json!({"functionId": row.id, "functionVersionId": row.version_id}))
        .collect();
    let lines: Vec<String> = gone
        .iter()
        .map(|row| {
            format!(
                "deleted version {} of {} ({})",
                row.version_id, row.name, row.id
            )
        })
        .collect();
    common.say(&json!({"deleted": deleted}), &lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_of_functions() {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let none = FunctionSpec::default;
        let cases = [
            (
                json!({}),
                FunctionSpec {
                    command: words(&["python3", "a.py"]),
                    env: vec![("K".into(), "V=1".into())],
                    tag: words(&["t"]),
                    health_uri: Some("/health".into()),
                    working_dir: Some("/srv".into()),
                    ..none()
                },
                json!({
                    "name": "f", "inferenceUrl": "/", "healthUri": "/health", "tags": ["t"],
                    "process": {"command": ["python3", "a.py"], "workingDir": "/srv",
                                "env": [{"key": "K", "value": "V=1"}]},
                }),
            ),
            (
                json!({}),
                FunctionSpec {
                    endpoint: words(&["http://a:1", "http://b:2"]),
                    inference_url: Some("/infer".into()),
                    ..none()
                },
                json!({"name": "f", "inferenceUrl": "/infer", "endpoints": ["http://a:1", "http://b:2"]}),
            ),
            (
                json!({
                    "name": "other", "inferenceUrl": "/kept", "apiBodyFormat": "CUSTOM",
                    "health": {"uri": "/old", "protocol": "HTTP"},
                    "process": {"command": ["x"], "env": [{"key": "A", "value": "1"}, {"key": "B", "value": "2"}]},
                }),
                FunctionSpec {
                    env: vec![("A".into(), "9".into())],
                    health_uri: Some("/new".into()),
                    description: Some("d".into()),
                    ..none()
                },
                json!({
                    "name": "f", "inferenceUrl": "/kept", "apiBodyFormat": "CUSTOM", "description": "d",
                    "health": {"uri": "/new", "protocol": "HTTP"},
                    "process": {"command": ["x"], "env": [{"key": "B", "value": "2"}, {"key": "A", "value": "9"}]},
                }),
            ),
            (
                json!({"process": {"command": ["x"]}}),
                FunctionSpec {
                    endpoint: words(&["http://a:1"]),
                    ..none()
                },
                json!({"name": "f", "inferenceUrl": "/", "endpoints": ["http://a:1"]}),
            ),
        ];
        for (base, spec, expected) in cases {
            let base = base.as_object().unwrap().clone();
            assert_eq!(spec.over(base, "f").unwrap(), expected);
        }
    }

    #[test]
    fn bodies_that_make_no_sense_are_refused() {
        let env = || vec![("A".to_owned(), "1".to_owned())];
        let none = FunctionSpec::default;
        for (spec, part) in [
            (none(), "nothing to run"),
            (
                FunctionSpec {
                    env: env(),
                    endpoint: vec!["http://a:1".into()],
                    ..none()
                },
                "--env",
            ),
            (
                FunctionSpec {
                    working_dir: Some("/".into()),
                    ..none()
                },
                "--working-dir",
            ),
        ] {
            let error = spec.over(Map::new(), "f").unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
