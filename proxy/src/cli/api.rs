//! Requests to the lifecycle API, and what their failures tell people to do.

use std::{fmt, time::Duration};

use anyhow::{Context, bail};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use super::Common;

pub(super) struct Client {
    http: reqwest::Client,
    admin: String,
    key: Option<String>,
}

/// An answer of 400 or more, as its problem document tells it.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    title: String,
    detail: String,
    /// The problem's stable name, as in `x-weir-error`.
    code: String,
}

impl Problem {
    pub(super) fn read(status: StatusCode, body: &[u8]) -> Self {
        let document: Value = serde_json::from_slice(body).unwrap_or_default();
        let member = |name: &str| document[name].as_str().map(str::to_owned);
        let kind = member("type").unwrap_or_default();
        Self {
            status,
            code: kind.rsplit(':').next().unwrap_or_default().to_owned(),
            title: member("title")
                .unwrap_or_else(|| status.canonical_reason().unwrap_or("Error").to_owned()),
            detail: member("detail").unwrap_or_else(|| {
                let text = String::from_utf8_lossy(body);
                text.trim().chars().take(500).collect()
            }),
        }
    }

    /// What to do about it, where the detail alone does not say.
    pub(super) fn next(&self) -> Option<&'static str> {
        Some(match self.status {
            StatusCode::UNAUTHORIZED => {
                "give a key with --key or WEIR_API_KEY, or --data-dir so that its admin.key can be read"
            }
            StatusCode::FORBIDDEN => {
                "use a key that has the scope and may name the function; `weir key list` shows what each may do"
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
        })
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

/// Whether the error is the server's 404.
pub(super) fn is_not_found(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Problem>()
        .is_some_and(|p| p.status == StatusCode::NOT_FOUND)
}

pub(super) fn http() -> anyhow::Result<reqwest::ClientBuilder> {
    // Weir is named by its own address; a proxy from the environment is for the internet.
    Ok(reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(5)))
}

/// Why no answer came.
pub(super) fn unreachable(error: reqwest::Error, what: &str, url: &str) -> anyhow::Error {
    let message = if error.is_connect() {
        format!("can't connect: is `weir serve` running? {what} {url}")
    } else if error.is_timeout() {
        format!("no answer in time from {what} {url}")
    } else {
        format!("the request failed; {what} {url}")
    };
    anyhow::Error::new(error.without_url()).context(message)
}

impl Client {
    pub(super) fn new(common: &Common) -> anyhow::Result<Self> {
        Ok(Self {
            http: http()?.timeout(Duration::from_secs(60)).build()?,
            admin: common.admin_url.trim_end_matches('/').to_owned(),
            key: common.key(),
        })
    }

    pub(super) async fn bytes(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Vec<u8>> {
        let mut request = self.http.request(method, format!("{}{path}", self.admin));
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let failed = |e| {
            unreachable(
                e,
                "admin address (--admin-url, WEIR_ADMIN_URL):",
                &self.admin,
            )
        };
        let response = request.send().await.map_err(failed)?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(failed)?;
        if !status.is_success() {
            return Err(Problem::read(status, &bytes).into());
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
            let answer = self
                .get(&format!("/v2/nvcf/functions/{id}/versions"))
                .await?;
            return rows(&answer);
        }
        pick_function(self.rows().await?, wanted)
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

/// The versions of the one function that has that name.
fn pick_function(rows: Vec<Row>, name: &str) -> anyhow::Result<Vec<Row>> {
    let mut ids: Vec<Uuid> = rows
        .iter()
        .filter(|row| row.name == name)
        .map(|row| row.id)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    match ids[..] {
        [id] => Ok(rows.into_iter().filter(|row| row.id == id).collect()),
        [] => bail!("no function is named '{name}'; `weir function list` shows what is there"),
        _ => bail!(
            "{} functions are named '{name}': give an ID, one of {}",
            ids.len(),
            ids.iter()
                .map(Uuid::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}

/// Which version is meant where none is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unnamed {
    Newest,
    /// The one that is deployed, else the only one.
    Deployed,
}

pub(super) fn pick_version(
    rows: &[Row],
    wanted: Option<Uuid>,
    unnamed: Unnamed,
) -> anyhow::Result<&Row> {
    if let Some(id) = wanted {
        return rows
            .iter()
            .find(|row| row.version_id == id)
            .with_context(|| {
                format!(
                    "the function has no version {id}; it has {}",
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
                ([], _) => bail!("no version is deployed; it has {}", ids(rows.iter())),
                _ => bail!(
                    "{} versions are deployed: give --version, one of {}",
                    deployed.len(),
                    ids(deployed.into_iter())
                ),
            }
        }
    }
}

fn ids<'a>(rows: impl Iterator<Item = &'a Row>) -> String {
    let ids: Vec<String> = rows.map(|row| row.version_id.to_string()).collect();
    ids.join(", ")
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
        assert!(pick_function(rows, "c").is_err());
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
        let named = pick_version(&all, Some(Uuid::from_u128(1)), Unnamed::Newest).unwrap();
        assert_eq!(named.version_id.as_u128(), 1);
        assert!(pick_version(&all, Some(Uuid::from_u128(9)), Unnamed::Newest).is_err());
    }

    #[test]
    fn a_problem_says_what_is_wrong_and_what_to_do() {
        let body = br#"{"type":"urn:x","title":"Unauthorized","status":401,"detail":"the key has expired"}"#;
        let shown = Problem::read(StatusCode::UNAUTHORIZED, body).to_string();
        assert!(shown.starts_with("Unauthorized (401): the key has expired\ntry: give a key"));
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
            http: http().unwrap().build().unwrap(),
            admin: "http://127.0.0.1:1".into(),
            key: None,
        };
        let error = client.rows().await.unwrap_err().to_string();
        assert!(error.contains("is `weir serve` running?"), "{error}");
        assert!(
            error.contains("admin address") && error.contains("127.0.0.1:1"),
            "{error}"
        );
    }
}
