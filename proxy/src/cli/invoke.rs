//! `weir invoke`: one request to the data plane.

use std::{io::Read, path::Path, process::ExitCode};

use anyhow::{Context, bail};
use futures_util::StreamExt;
use reqwest::{
    Method,
    header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
};
use uuid::Uuid;

use super::{
    Common,
    api::{self, Client, Listener, Problem, Row, Unnamed},
    id::Id,
    note, write_out,
};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: weir invoke hello --path /hello -d '{\"name\": \"you\"}'")]
pub struct Invoke {
    #[command(flatten)]
    common: Common,
    /// The function's ID, or its name where that is unique
    function: String,
    /// This version [default: one that takes requests]
    #[arg(long, value_name = "ID")]
    version: Option<Id>,
    /// Path and query [default: the version's inferenceUrl]
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// The body: itself, @FILE, or @- for standard input
    #[arg(short, long, value_name = "BODY")]
    data: Option<String>,
    /// Ask for a stream of events, and print it as it comes
    #[arg(long)]
    stream: bool,
    /// A header (may be given again)
    #[arg(short = 'H', long, value_name = "NAME: VALUE", value_parser = header)]
    header: Vec<(HeaderName, HeaderValue)>,
    /// The method [default: POST with a body, else GET]
    #[arg(short = 'X', long, value_name = "METHOD", value_parser = method)]
    method: Option<Method>,
}

fn header(s: &str) -> Result<(HeaderName, HeaderValue), String> {
    let wrong = || "must be a header such as 'x-session-id: 1'".to_owned();
    let (name, value) = s.split_once(':').ok_or_else(wrong)?;
    Ok((
        name.trim().parse().map_err(|_| wrong())?,
        value.trim().parse().map_err(|_| wrong())?,
    ))
}

fn method(s: &str) -> Result<Method, String> {
    Method::from_bytes(s.to_ascii_uppercase().as_bytes()).map_err(|e| e.to_string())
}

fn body(data: &str) -> anyhow::Result<Vec<u8>> {
    match data.strip_prefix('@') {
        None => Ok(data.as_bytes().to_vec()),
        Some("-") => {
            let mut bytes = Vec::new();
            std::io::stdin()
                .read_to_end(&mut bytes)
                .context("can't read standard input")?;
            Ok(bytes)
        }
        Some(file) => std::fs::read(Path::new(file)).with_context(|| format!("can't read {file}")),
    }
}

impl Invoke {
    /// Whom to call, which version where one is named, and by which path.
    async fn target(&self) -> anyhow::Result<(Uuid, Option<Uuid>, String)> {
        let version = self.version.as_ref();
        let whole = version.and_then(Id::whole);
        if let (Ok(id), Some(path)) = (self.function.parse(), &self.path)
            && version.is_some() == whole.is_some()
        {
            // The lifecycle API need not be reachable, nor its scopes be the key's.
            return Ok((id, whole, slashed(path)));
        }
        let client = Client::new(&self.common)?;
        let rows = client
            .function(&self.function)
            .await
            .context("can't look the function up; with its ID and --path that is not needed")?;
        let row = called(&rows, version)?;
        let path = self.path.as_deref().or(row.inference_url.as_deref());
        let version = version.map(|_| row.version_id);
        Ok((row.id, version, slashed(path.unwrap_or("/"))))
    }

    fn headers(
        &self,
        function: Uuid,
        version: Option<Uuid>,
        body: Option<&[u8]>,
    ) -> anyhow::Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        let id = |id: Uuid| HeaderValue::try_from(id.to_string());
        headers.insert("function-id", id(function)?);
        if let Some(version) = version {
            headers.insert("function-version-id", id(version)?);
        }
        if self.stream {
            headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        }
        if let Some(body) = body {
            let json = serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok();
            let kind = if json {
                "application/json"
            } else {
                "application/octet-stream"
            };
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        // The first of a name replaces what is there, so that one may be given again.
        let own: HeaderMap = self
            .header
            .iter()
            .fold(HeaderMap::new(), |mut own, (n, v)| {
                own.append(n, v.clone());
                own
            });
        headers.extend(own);
        Ok(headers)
    }

    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let body = self.data.as_deref().map(body).transpose()?;
        let (function, version, path) = self.target().await?;
        let method = self.method.clone().unwrap_or(match body {
            Some(_) => Method::POST,
            None => Method::GET,
        });
        let base = self.common.url.trim_end_matches('/');
        let mut request = api::http(&self.common)?
            .build()?
            .request(method, format!("{base}{path}"));
        if let Some((key, _)) = self.common.key() {
            request = request.bearer_auth(key);
        }
        request = request.headers(self.headers(function, version, body.as_deref())?);
        if let Some(body) = body {
            request = request.body(body);
        }
        let unreachable = |e: reqwest::Error| Listener::Data.unreachable(&e, base);
        let response = request.send().await.map_err(unreachable)?;

        let status = response.status();
        let field = |name: &str| {
            let value = response.headers().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let (code, request_id) = (field("x-weir-error"), field("nvcf-reqid"));
        if let Some(code) = code {
            let bytes = response.bytes().await.map_err(unreachable)?;
            let request_id = request_id.unwrap_or_default();
            return Err(
                anyhow::Error::new(Problem::read(status, &bytes).with_key(&self.common))
                    .context(format!("{code} (request {request_id})")),
            );
        }

        let mut chunks = response.bytes_stream();
        let mut last = None;
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk
                .map_err(|e| anyhow::Error::new(e.without_url()).context("the answer broke off"))?;
            write_out(&chunk)?;
            last = chunk.last().copied().or(last);
        }
        if last.is_some_and(|byte| byte != b'\n')
            && std::io::IsTerminal::is_terminal(&std::io::stdout())
        {
            write_out(b"\n")?;
        }
        if status.as_u16() >= 400 {
            note(&format!("the instance answered {status}"));
            return Ok(ExitCode::FAILURE);
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The version whose inferenceUrl is called.
fn called<'a>(rows: &'a [Row], wanted: Option<&Id>) -> anyhow::Result<&'a Row> {
    if wanted.is_some() {
        return api::pick_version(rows, wanted, Unnamed::Newest);
    }
    let newest = rows.iter().rev();
    match newest.clone().find(|row| row.deployed()) {
        Some(row) => Ok(row),
        None => match rows.last() {
            Some(row) => bail!(
                "no version of {} is deployed\ntry: `weir deploy create {}`",
                row.name,
                row.id
            ),
            None => bail!("the function has no version"),
        },
    }
}

fn slashed(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        invoke: Invoke,
    }

    #[test]
    fn headers_name_the_function_and_own_ones_win() {
        let id = Uuid::from_u128(7);
        let version = Uuid::from_u128(8);
        let invoke = Line::parse_from([
            "x",
            "f",
            "--version",
            &version.to_string(),
            "-H",
            "Accept: a/b",
            "-H",
            "k: 1",
            "-H",
            "k: 2",
            "--stream",
        ])
        .invoke;
        let headers = invoke
            .headers(id, Some(version), Some(b"{\"a\": 1}"))
            .unwrap();
        assert_eq!(headers["function-id"], id.to_string().as_str());
        assert_eq!(headers["function-version-id"], version.to_string().as_str());
        assert_eq!(headers["accept"], "a/b");
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers.get_all("k").iter().count(), 2);
        let headers = invoke.headers(id, None, Some(b"plain")).unwrap();
        assert_eq!(headers["content-type"], "application/octet-stream");
        assert!(Line::try_parse_from(["x", "f", "-H", "no colon"]).is_err());
    }

    #[test]
    fn bodies_come_from_the_line_or_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "from file").unwrap();
        assert_eq!(body("itself").unwrap(), b"itself");
        let named = format!("@{}", file.path().display());
        assert_eq!(body(&named).unwrap(), b"from file");
        assert!(body("@/no/such").is_err());
    }
}
