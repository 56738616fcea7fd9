//! Requests to the lifecycle API, and what their failures tell people to do.

use std::{collections::BTreeSet, fmt, time::Duration};

use anyhow::{Context, anyhow, bail};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;
use weir_bench::https;
use weir_control::{
    dial::{explain, tls_error},
    model::Instance,
};

use super::{CA_FILE, Common, id::Id};
use crate::args::distance;

pub(super) struct Client {
    http: reqwest::Client,
    admin: String,
    /// The key, and where it came from.
    key: Option<(String, String)>,
    /// Where else a key was looked for.
    key_file: String,
}

/// An answer of 400 or more, as its problem document tells it.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    title: String,
    pub(super) detail: String,
    /// The problem's stable name, as in `x-weir-error`.
    code: String,
    /// Where the key came from.
    shown: Option<String>,
}

impl Problem {
    pub(super) fn read(status: StatusCode, body: &[u8]) -> Self {
        let document: Value = serde_json::from_slice(body).unwrap_or_default();
        let member = |name: &str| document[name].as_str().map(str::to_owned);
        let kind = member("type").unwrap_or_default();
        Self {
            status,
            shown: None,
            code: kind.rsplit(':').next().unwrap_or_default().to_owned(),
            title: member("title")
                .unwrap_or_else(|| status.canonical_reason().unwrap_or("Error").to_owned()),
            detail: member("detail").unwrap_or_else(|| {
                let text = String::from_utf8_lossy(body);
                text.trim().chars().take(500).collect()
            }),
        }
    }

    /// With where the key that was shown came from: a wrong one is often one that is not thought of.
    pub(super) fn with_key(mut self, common: &Common) -> Self {
        if self.status == StatusCode::UNAUTHORIZED {
            let key = common.key();
            self.shown = Some(shown(
                key.as_ref(),
                &common.data_dir.join("admin.key").display().to_string(),
            ));
        }
        self
    }

    /// What to do about it, where the detail alone does not say.
    pub(super) fn next(&self) -> Option<String> {
        let next = match self.status {
            StatusCode::UNAUTHORIZED => {
                let shown = self.shown.as_deref().unwrap_or_default();
                return Some(format!(
                    "{shown}give one with --key or WEIR_API_KEY; `weir serve` writes its admin key to \
                     admin.key in its --data-dir, and `weir key create NAME` makes others"
                ));
            }
            StatusCode::FORBIDDEN => {
                let scope = self.detail.split_once("lacks the scope ");
                let scope = scope.and_then(|(_, rest)| rest.split([':', ' ', ',']).next());
                return Some(match scope {
                    Some(scope) => format!(
                        "`weir key create NAME --scope {scope}` makes a key that has it, where yours \
                         may; `weir key list` shows what each key may do"
                    ),
                    None => "use a key that may name the function; `weir key list` shows what each may do".into(),
                });
            }
            StatusCode::NOT_FOUND if self.code == "unknown-function" => {
                "`weir function list` shows what is there"
            }
            StatusCode::TOO_MANY_REQUESTS => {
                "wait and try again; `weir status` shows how many wait"
            }
            StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                "`weir status` shows the state, `weir logs INSTANCE` what an instance wrote"
            }
            StatusCode::INTERNAL_SERVER_ERROR => "the log of `weir serve` tells more",
            _ => return None,
        };
        Some(next.into())
    }
}

fn shown(key: Option<&(String, String)>, file: &str) -> String {
    match key {
        Some((_, from)) => format!("the key came from {from}; "),
        None => format!("no key was found in --key, WEIR_API_KEY, WEIR_ADMIN_KEY or {file}; "),
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.title, self.status.as_u16())?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        match self.next() {
            Some(next) => write!(f, "\ntry: {next}"),
            None => Ok(()),
        }
    }
}
impl std::error::Error for Problem {}

/// No answer came.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}{}", next.as_deref().map(|n| format!("\ntry: {n}")).unwrap_or_default())]
pub(super) struct Unreachable {
    what: String,
    cause: String,
    next: Option<String>,
}

/// Whether the error is the server's 404.
pub(super) fn is_not_found(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Problem>()
        .is_some_and(|p| p.status == StatusCode::NOT_FOUND)
}

pub(super) fn http(common: &Common) -> anyhow::Result<reqwest::ClientBuilder> {
    let urls = [common.admin_url.as_str(), common.url.as_str()];
    // Weir is named by its own address; a proxy from the environment is for the internet.
    Ok(https::builder(&urls, common.ca_file.as_deref())
        .context("--ca-file")?
        .no_proxy()
        .connect_timeout(Duration::from_secs(5)))
}

/// One of the two addresses of a `weir serve`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Listener {
    Admin,
    Data,
}

impl Listener {
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Admin => ("admin address", "--admin-url", "WEIR_ADMIN_URL"),
            Self::Data => ("data-plane address", "--url", "WEIR_URL"),
        }
    }

    /// Why no answer came.
    pub(super) fn unreachable(self, error: &reqwest::Error, url: &str) -> anyhow::Error {
        let (name, flag, variable) = self.names();
        let mut cause: &dyn std::error::Error = &error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        let (what, next) = if error.is_builder() {
            (
                format!("{url} is not a usable {name}"),
                Some(format!(
                    "give one such as http://127.0.0.1:8081 with {flag} or {variable}"
                )),
            )
        } else if let Some(error) = tls_error(error) {
            return Unreachable {
                what: format!("no TLS with the {name} {url}"),
                cause: explain(error, CA_FILE),
                next: None,
            }
            .into();
        } else if error.is_connect() {
            (
                format!("can't connect to the {name} {url}"),
                Some(format!(
                    "start a server with `weir serve`, or give the {name} of one that runs with {flag} or {variable}"
                )),
            )
        } else if error.is_timeout() {
            (format!("no answer in time from the {name} {url}"), None)
        } else {
            (format!("the request to the {name} {url} failed"), None)
        };
        Unreachable {
            what,
            cause: cause.to_string(),
            next,
        }
        .into()
    }
}

impl Client {
    pub(super) fn new(common: &Common) -> anyhow::Result<Self> {
        Ok(Self {
            http: http(common)?.timeout(Duration::from_secs(60)).build()?,
            admin: common.admin_url.trim_end_matches('/').to_owned(),
            key: common.key(),
            key_file: common.data_dir.join("admin.key").display().to_string(),
        })
    }

    /// The address it asks.
    pub(super) fn address(&self) -> &str {
        self.admin
            .split_once("://")
            .map_or(&self.admin, |(_, rest)| rest)
    }

    pub(super) async fn bytes(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Vec<u8>> {
        let mut request = self.http.request(method, format!("{}{path}", self.admin));
        if let Some((key, _)) = &self.key {
            request = request.bearer_auth(key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let failed = |e| Listener::Admin.unreachable(&e, &self.admin);
        let response = request.send().await.map_err(failed)?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(failed)?;
        if !status.is_success() {
            let mut problem = Problem::read(status, &bytes);
            problem.shown = Some(shown(self.key.as_ref(), &self.key_file));
            return Err(problem.into());
        }
        Ok(bytes.into())
    }

    /// The answer's JSON; null where it has no body.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let bytes = self.bytes(method, path, body).await?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "the answer is not JSON: is {} the admin address of a `weir serve`?",
                self.admin
            )
        })
    }

    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send(Method::GET, path, None).await
    }
    pub(super) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.send(Method::POST, path, Some(body)).await
    }
    pub(super) async fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.send(Method::DELETE, path, None).await
    }

    /// The account's versions, one row each.
    pub(super) async fn rows(&self) -> anyhow::Result<Vec<Row>> {
        let answer = self.get("/v2/nvcf/functions").await?;
        rows(&answer)
    }

    /// The versions of the function so named, oldest first.
    pub(super) async fn function(&self, wanted: &str) -> anyhow::Result<Vec<Row>> {
        if let Ok(id) = wanted.parse::<Uuid>() {
            let answer = self.get(&format!("/v2/nvcf/functions/{id}/versions")).await;
            if answer.as_ref().is_err_and(is_not_found) {
                let all = self.rows().await.unwrap_or_default();
                if let Some(row) = all.iter().find(|row| row.version_id == id) {
                    bail!(
                        "{id} is a version of '{}', not a function\ntry: give {} and --version {id}",
                        row.name,
                        row.id
                    );
                }
            }
            return rows(&answer?);
        }
        pick_function(self.rows().await?, wanted)
    }

    /// The instances of the account, or of one version of it.
    pub(super) async fn instances(
        &self,
        version: Option<Uuid>,
    ) -> anyhow::Result<(Value, Vec<Instance>)> {
        let path = match version {
            Some(version) => format!("/v2/weir/instances?functionVersionId={version}"),
            None => "/v2/weir/instances".into(),
        };
        let mut answer = self.get(&path).await?;
        let all = answer["instances"].take();
        let read = Vec::<Instance>::deserialize(&all)
            .context("the server's list of instances is not one that this weir reads")?;
        Ok((all, read))
    }
}

/// One version, as lists show it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Row {
    pub(super) id: Uuid,
    pub(super) version_id: Uuid,
    pub(super) name: String,
    pub(super) status: String,
    #[serde(default)]
    pub(super) tags: Vec<String>,
    #[serde(default)]
    pub(super) inference_url: Option<String>,
    #[serde(default)]
    pub(super) created_at: Option<jiff::Timestamp>,
}

impl Row {
    pub(super) fn deployed(&self) -> bool {
        self.status != "INACTIVE"
    }
}

/// The path of a version's deployment.
pub(super) fn deployment_path(function: Uuid, version: Uuid) -> String {
    format!("/v2/nvcf/deployments/functions/{function}/versions/{version}")
}

/// The path of a version.
pub(super) fn version_path(function: Uuid, version: Uuid) -> String {
    format!("/v2/nvcf/functions/{function}/versions/{version}")
}

fn rows(answer: &Value) -> anyhow::Result<Vec<Row>> {
    let mut rows: Vec<Row> = serde_json::from_value(answer["functions"].clone())
        .context("the server's list of functions is not one that this weir reads")?;
    rows.sort_by_key(|row| row.created_at);
    Ok(rows)
}

/// The versions of the one function that has that name, or an ID that begins so.
fn pick_function(rows: Vec<Row>, wanted: &str) -> anyhow::Result<Vec<Row>> {
    let of = |id: Uuid| -> Vec<&Row> { rows.iter().filter(|row| row.id == id).collect() };
    let mut ids: Vec<Uuid> = rows
        .iter()
        .filter(|row| row.name == wanted)
        .map(|row| row.id)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() > 1 {
        let lines: Vec<String> = ids
            .iter()
            .map(|id| {
                let versions = of(*id);
                let states: Vec<&str> = versions.iter().map(|row| row.status.as_str()).collect();
                format!("\n  {id}  {}", states.join(", "))
            })
            .collect();
        bail!(
            "{} functions are named '{wanted}': give an ID, one of{}",
            ids.len(),
            lines.concat()
        );
    }
    if ids.is_empty()
        && let Ok(prefix) = wanted.parse::<Id>()
    {
        let mut all: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
        all.sort_unstable();
        all.dedup();
        ids.extend(prefix.pick(all, |id| *id, "functions")?);
    }
    match ids.first() {
        Some(id) => Ok(of(*id).into_iter().cloned().collect()),
        None => Err(no_function(&rows, wanted)),
    }
}

/// What to say where no function has that name: the nearest ones.
pub(super) fn no_function(rows: &[Row], wanted: &str) -> anyhow::Error {
    let names: BTreeSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    let near = near(wanted, names.iter().copied());
    if names.is_empty() {
        anyhow!(
            "no function is named '{wanted}': there is none yet\ntry: `weir function create` or `weir apply` makes one"
        )
    } else if near.is_empty() {
        anyhow!("no function is named '{wanted}'\ntry: `weir function list` shows what is there")
    } else {
        let near: Vec<String> = near.iter().map(|name| format!("'{name}'")).collect();
        anyhow!(
            "no function is named '{wanted}'\ntry: did you mean {}?",
            near.join(" or ")
        )
    }
}

/// The names that may have been meant, the nearest first; at most three.
pub(super) fn near<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let low = wanted.to_lowercase();
    let mut near: Vec<(usize, &str)> = names
        .map(|name| (distance(&low, &name.to_lowercase()), name))
        .filter(|(distance, name)| {
            *distance <= 1 + name.len().min(wanted.len()) / 4
                || (wanted.len() > 2 && (name.starts_with(wanted) || name.ends_with(wanted)))
        })
        .collect();
    near.sort_unstable();
    near.into_iter().take(3).map(|(_, name)| name).collect()
}

/// Which version is meant where none is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unnamed {
    Newest,
    /// The one that is deployed, else the only one.
    Deployed,
}

pub(super) fn pick_version<'a>(
    rows: &'a [Row],
    wanted: Option<&Id>,
    unnamed: Unnamed,
) -> anyhow::Result<&'a Row> {
    if let Some(id) = wanted {
        return id
            .pick(rows, |row| row.version_id, "versions")?
            .with_context(|| {
                format!(
                    "the function has no version {id}; it has{}",
                    ids(rows.iter())
                )
            });
    }
    match unnamed {
        Unnamed::Newest => rows.last().context("the function has no version"),
        Unnamed::Deployed => {
            let deployed: Vec<&Row> = rows.iter().filter(|row| row.deployed()).collect();
            match (deployed.as_slice(), rows) {
                ([one], _) => Ok(one),
                ([], [only]) => Ok(only),
                ([], _) => bail!("no version is deployed; it has{}", ids(rows.iter())),
                _ => bail!(
                    "{} versions are deployed: give --version, one of{}",
                    deployed.len(),
                    ids(deployed.into_iter())
                ),
            }
        }
    }
}

/// A line for each version.
fn ids<'a>(rows: impl Iterator<Item = &'a Row>) -> String {
    let ids: Vec<String> = rows
        .map(|row| format!("\n  {}  {}", row.version_id, row.status))
        .collect();
    ids.concat()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(function: u128, version: u128, name: &str, status: &str) -> Row {
        Row {
            id: Uuid::from_u128(function),
            version_id: Uuid::from_u128(version),
            name: name.into(),
            status: status.into(),
            tags: vec![],
            inference_url: None,
            created_at: None,
        }
    }

    #[test]
    fn a_name_stands_for_a_function_where_it_is_unique() {
        let rows = vec![
            row(1, 1, "a", "ACTIVE"),
            row(1, 2, "a-renamed", "INACTIVE"),
            row(2, 3, "b", "ACTIVE"),
            row(3, 4, "b", "ACTIVE"),
        ];
        let found = pick_function(rows.clone(), "a").unwrap();
        assert_eq!(found.len(), 2, "all versions, whatever their names");
        let error = pick_function(rows.clone(), "b").unwrap_err().to_string();
        assert!(
            error.contains("2 functions") && error.contains("0003"),
            "{error}"
        );
        let by_id = pick_function(rows.clone(), "00000000-0000-0000-0000-000000000001").unwrap();
        assert_eq!(by_id.len(), 2, "a whole ID is a prefix too");
        let error = pick_function(rows, "a-renam").unwrap_err().to_string();
        assert!(error.ends_with("did you mean 'a-renamed'?"), "{error}");
    }

    #[test]
    fn what_may_have_been_meant_is_near() {
        let names = ["hello", "help", "summarise", "summarise-v2", "b"];
        let near = |wanted| near(wanted, names.into_iter());
        assert_eq!(near("helo"), ["hello", "help"]);
        assert_eq!(near("HELLO"), ["hello", "help"]);
        assert_eq!(near("summarize"), ["summarise"]);
        assert_eq!(near("summ"), ["summarise", "summarise-v2"]);
        assert_eq!(near("nothing-like-it"), [""; 0]);
        let error = no_function(&[], "x").to_string();
        assert!(error.contains("none yet"), "{error}");
    }

    #[test]
    fn the_version_meant_is_found_or_asked_for() {
        let deployed = |rows: &[Row]| {
            pick_version(rows, None, Unnamed::Deployed)
                .map(|row| row.version_id.as_u128())
                .map_err(|e| e.to_string())
        };
        let (a, b, c) = (
            row(1, 1, "f", "INACTIVE"),
            row(1, 2, "f", "ACTIVE"),
            row(1, 3, "f", "ERROR"),
        );
        assert_eq!(deployed(&[a.clone(), b.clone()]), Ok(2));
        assert_eq!(deployed(std::slice::from_ref(&a)), Ok(1));
        assert!(
            deployed(&[a.clone(), a.clone()])
                .unwrap_err()
                .contains("no version is deployed")
        );
        let all = [a, b, c];
        assert!(deployed(&all).unwrap_err().contains("--version"));
        let newest = pick_version(&all, None, Unnamed::Newest).unwrap();
        assert_eq!(newest.version_id.as_u128(), 3);
        let whole = |id| -> Id { Uuid::from_u128(id).to_string().parse().unwrap() };
        let named = pick_version(&all, Some(&whole(1)), Unnamed::Newest).unwrap();
        assert_eq!(named.version_id.as_u128(), 1);
        assert!(pick_version(&all, Some(&whole(9)), Unnamed::Newest).is_err());
    }

    #[test]
    fn a_problem_says_what_is_wrong_and_what_to_do() {
        let body = br#"{"type":"urn:x","title":"Unauthorized","status":401,"detail":"the key has expired"}"#;
        let shown = Problem::read(StatusCode::UNAUTHORIZED, body).to_string();
        assert!(
            shown.starts_with("Unauthorized (401): the key has expired\ntry: give one with --key")
        );
        let body =
            br#"{"detail":"key 'k' lacks the scope deploy_function: use a key that has it"}"#;
        let shown = Problem::read(StatusCode::FORBIDDEN, body).to_string();
        assert!(shown.contains("--scope deploy_function`"), "{shown}");
        let not_found = |code: &str| {
            let body = json!({"type": format!("urn:weir:problem:{code}"), "detail": "no"});
            Problem::read(StatusCode::NOT_FOUND, body.to_string().as_bytes()).to_string()
        };
        assert!(not_found("unknown-function").contains("weir function list"));
        assert_eq!(not_found("not-found"), "Not Found (404): no");
        let shown = Problem::read(StatusCode::BAD_REQUEST, b"plain words").to_string();
        assert_eq!(shown, "Bad Request (400): plain words");
    }

    #[tokio::test]
    async fn a_refused_connection_asks_whether_it_runs() {
        let client = Client {
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            admin: "http://127.0.0.1:1".into(),
            key: None,
            key_file: String::new(),
        };
        let error = client.rows().await.unwrap_err();
        assert!(error.is::<Unreachable>());
        assert_eq!(
            format!("{error:#}"),
            "can't connect to the admin address http://127.0.0.1:1: Connection refused (os error 111)\n\
             try: start a server with `weir serve`, or give the admin address of one that runs with \
             --admin-url or WEIR_ADMIN_URL"
        );
    }
}
