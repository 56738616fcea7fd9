//! What the benchmarks ask of a running Weir: make a function, look at its
//! instances, delete it again.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use reqwest::{Method, RequestBuilder, Response};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::https;
use crate::tally::Answered;

/// A change reaches the proxies' tables a moment after it is acknowledged.
const PROPAGATION: Duration = Duration::from_millis(200);

/// Where Weir is, and the key to it.
#[derive(Clone, Debug, clap::Args)]
pub struct TargetArgs {
    /// Data-plane address of `weir serve`
    #[arg(
        long,
        env = "WEIR_URL",
        value_name = "URL",
        default_value = "http://127.0.0.1:8080"
    )]
    pub url: String,
    /// Admin address of `weir serve`
    #[arg(
        long,
        // What it was called first.
        alias = "admin",
        env = "WEIR_ADMIN_URL",
        value_name = "URL",
        default_value = "http://127.0.0.1:8081"
    )]
    pub admin_url: String,
    /// API key [default: WEIR_ADMIN_KEY, else the file admin.key in --data-dir]
    #[arg(long, env = "WEIR_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub key: Option<String>,
    /// The data directory of a `weir serve` on this machine
    #[arg(
        long,
        env = "WEIR_DATA_DIR",
        value_name = "DIR",
        default_value = ".weir"
    )]
    pub data_dir: PathBuf,
    /// PEM file with certificates of authorities to trust beside the system's, where a URL is https
    #[arg(long, env = "WEIR_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
}

impl TargetArgs {
    /// The key to show, if there is one: with `--auth none` none is needed.
    /// `variable` is what WEIR_ADMIN_KEY says.
    fn key(&self, variable: Option<String>) -> Option<String> {
        let file = || std::fs::read_to_string(self.data_dir.join("admin.key")).ok();
        let key = self.key.clone().or(variable).or_else(file)?;
        let key = key.trim();
        (!key.is_empty()).then(|| key.to_owned())
    }
}

#[derive(Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    url: String,
    admin: String,
    key: Option<String>,
    /// Where a key is looked for last.
    key_file: PathBuf,
}

/// A version of a function that a benchmark made.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Version {
    #[serde(rename = "id")]
    pub(crate) function: String,
    #[serde(rename = "versionId")]
    pub(crate) version: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Instance {
    #[serde(default)]
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) state: String,
    pub(crate) pid: Option<i32>,
    pub(crate) spawned_at: Option<jiff::Timestamp>,
    pub(crate) first_healthy_at: Option<jiff::Timestamp>,
}

impl Client {
    pub(crate) fn new(args: &TargetArgs) -> anyhow::Result<Self> {
        Ok(Self {
            http: https::builder(&[&args.url, &args.admin_url], args.ca_file.as_deref())?
                .no_proxy()
                .build()?,
            url: args.url.trim_end_matches('/').into(),
            admin: args.admin_url.trim_end_matches('/').into(),
            key: args.key(std::env::var("WEIR_ADMIN_KEY").ok()),
            key_file: args.data_dir.join("admin.key"),
        })
    }

    /// A raw request's head on the data plane, up to its own fields.
    pub(crate) fn head(&self, function: &str, request: &str) -> anyhow::Result<String> {
        let mut head = format!("{request} HTTP/1.1\r\nhost: {}\r\n", self.authority()?);
        if let Some(key) = &self.key {
            head.push_str(&format!("authorization: Bearer {key}\r\n"));
        }
        head.push_str(&format!("function-id: {function}\r\n"));
        Ok(head)
    }

    fn with_key(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// `host:port` of the data plane, for raw connections.
    pub(crate) fn authority(&self) -> anyhow::Result<String> {
        let url = reqwest::Url::parse(&self.url)?;
        if url.scheme() == "https" {
            bail!("raw connections are without TLS: give an http:// URL with --url");
        }
        let host = url.host_str().context("--url has no host")?;
        let port = url.port_or_known_default().context("--url has no port")?;
        Ok(format!("{host}:{port}"))
    }

    /// An invocation on the data plane.
    pub(crate) fn invoke(&self, function: &str, path_and_query: &str) -> RequestBuilder {
        let request = self.http.post(format!("{}{path_and_query}", self.url));
        self.with_key(request).header("function-id", function)
    }

    /// Sends an invocation and reads its answer to the end.
    pub(crate) async fn answered(request: RequestBuilder) -> Answered {
        let answer = async {
            let response = request.send().await?;
            let mut status = response.status().as_u16().to_string();
            if let Some(code) = response.headers().get("x-weir-error") {
                status.push(' ');
                status.push_str(&String::from_utf8_lossy(code.as_bytes()));
            }
            response.bytes().await?;
            Ok::<_, reqwest::Error>(status)
        };
        answer.await.map_err(|error| {
            // The innermost says what went wrong, without this request's URL.
            let mut cause: &dyn std::error::Error = &error.without_url();
            while let Some(source) = cause.source() {
                cause = source;
            }
            cause.to_string()
        })
    }

    fn admin(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.admin));
        self.with_key(request).timeout(Duration::from_secs(30))
    }

    /// A function whose instances are the sample function of this executable.
    pub(crate) async fn create(&self, name: &str, start: Duration) -> anyhow::Result<Version> {
        let program = std::env::current_exe().context("could not find this executable")?;
        let delay = start.as_millis().to_string();
        let body = json!({
            "name": name,
            "inferenceUrl": "/infer",
            "healthUri": "/health",
            "process": {
                "command": [program, "sample-function", "--start-delay-ms", delay],
                "env": [],
            },
        });
        #[derive(Deserialize)]
        struct Created {
            function: Version,
        }
        let request = self.admin(Method::POST, "/v2/nvcf/functions").json(&body);
        let response = request
            .send()
            .await
            .context("could not create a function")?;
        if response.status() == 401 && self.key.is_none() {
            bail!(
                "weir wants a key, and there is none in --key, WEIR_API_KEY, WEIR_ADMIN_KEY or {}",
                self.key_file.display()
            );
        }
        let response = check(response)
            .await
            .context("could not create a function")?;
        let created: Created = response.json().await?;
        Ok(created.function)
    }

    /// Returns when the version takes invocations.
    pub(crate) async fn deploy(&self, of: &Version, deployment: &Value) -> anyhow::Result<()> {
        self.begin_deployment(of, deployment).await?;
        self.until_active(of, Duration::from_secs(60)).await?;
        tokio::time::sleep(PROPAGATION).await;
        Ok(())
    }

    /// Returns when the deployment is acknowledged.
    pub(crate) async fn begin_deployment(
        &self,
        of: &Version,
        deployment: &Value,
    ) -> anyhow::Result<()> {
        let path = format!(
            "/v2/nvcf/deployments/functions/{}/versions/{}",
            of.function, of.version
        );
        let request = self.admin(Method::POST, &path).json(deployment);
        check(request.send().await?)
            .await
            .context("could not deploy")?;
        Ok(())
    }

    pub(crate) async fn status(&self, of: &Version) -> anyhow::Result<String> {
        #[derive(Deserialize)]
        struct Answer {
            function: Status,
        }
        #[derive(Deserialize)]
        struct Status {
            status: String,
        }
        let path = format!("/v2/nvcf/functions/{}/versions/{}", of.function, of.version);
        let answer: Answer = read(self.admin(Method::GET, &path)).await?;
        Ok(answer.function.status)
    }

    async fn until_active(&self, of: &Version, at_most: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + at_most;
        loop {
            let status = self.status(of).await?;
            if status == "ACTIVE" {
                return Ok(());
            }
            if status == "ERROR" || Instant::now() >= deadline {
                bail!("the deployed version is {status}, not ACTIVE");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Returns these when so many instances are ready and the version is ACTIVE.
    pub(crate) async fn until_ready(
        &self,
        of: &Version,
        count: usize,
    ) -> anyhow::Result<Vec<Instance>> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut ready = self.instances(&of.version).await?;
            ready.retain(|instance| instance.state == "ready");
            if ready.len() >= count && self.status(of).await? == "ACTIVE" {
                return Ok(ready);
            }
            if Instant::now() >= deadline {
                bail!("only {} of {count} instances are ready", ready.len());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Deletes the version, which ends its deployment.
    pub(crate) async fn delete(&self, of: &Version) -> anyhow::Result<()> {
        let path = format!("/v2/nvcf/functions/{}/versions/{}", of.function, of.version);
        check(self.admin(Method::DELETE, &path).send().await?)
            .await
            .with_context(|| format!("could not delete function {}", of.function))?;
        Ok(())
    }

    /// The version's instances, of whatever state; none where there is no
    /// such list.
    pub(crate) async fn instances(&self, version: &str) -> anyhow::Result<Vec<Instance>> {
        #[derive(Deserialize)]
        struct List {
            #[serde(default)]
            instances: Vec<Instance>,
        }
        let request = self
            .admin(Method::GET, "/v2/weir/instances")
            .query(&[("functionVersionId", version)]);
        let response = request.send().await?;
        if response.status() == 404 {
            return Ok(Vec::new());
        }
        Ok(check(response).await?.json::<List>().await?.instances)
    }

    /// How many invocations of the version wait.
    pub(crate) async fn queue_depth(&self, of: &Version) -> anyhow::Result<u64> {
        #[derive(Deserialize)]
        struct List {
            queues: Vec<Queue>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Queue {
            function_version_id: String,
            queue_depth: u64,
        }
        let path = format!("/v2/nvcf/queues/functions/{}", of.function);
        let list: List = read(self.admin(Method::GET, &path)).await?;
        let queue = list
            .queues
            .into_iter()
            .find(|queue| queue.function_version_id == of.version)
            .with_context(|| format!("{path} has no queue of version {}", of.version))?;
        Ok(queue.queue_depth)
    }

    /// Asks without a pause until so many invocations wait.
    pub(crate) async fn until_queued(&self, of: &Version, wanted: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let depth = self.queue_depth(of).await?;
            if depth == wanted {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("{depth} invocations wait, not {wanted}");
            }
        }
    }

    pub(crate) async fn instance(&self, id: &str) -> anyhow::Result<Instance> {
        let path = format!("/v2/weir/instances/{id}");
        let mut answer: Value = read(self.admin(Method::GET, &path)).await?;
        let inner = answer.get_mut("instance").map(Value::take);
        Ok(serde_json::from_value(inner.unwrap_or(answer))?)
    }

    pub(crate) async fn until_no_instances(
        &self,
        version: &str,
        at_most: Duration,
    ) -> anyhow::Result<()> {
        self.until_instances(version, 0, at_most).await
    }

    /// Returns when there are so many instances or fewer.
    pub(crate) async fn until_instances(
        &self,
        version: &str,
        most: usize,
        at_most: Duration,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + at_most;
        loop {
            let left = self.instances(version).await?.len();
            if left <= most {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("{left} instances are still there after {at_most:?}, not {most}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn is_ready(&self) -> bool {
        let answer = self.admin(Method::GET, "/readyz").send().await;
        answer.is_ok_and(|answer| answer.status() == 200)
    }

    pub(crate) async fn metrics(&self) -> anyhow::Result<String> {
        let response = self.admin(Method::GET, "/metrics").send().await?;
        Ok(check(response).await?.text().await?)
    }
}

async fn read<T: DeserializeOwned>(request: RequestBuilder) -> anyhow::Result<T> {
    Ok(check(request.send().await?).await?.json().await?)
}

async fn check(response: Response) -> anyhow::Result<Response> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let path = response.url().path().to_owned();
    let body = response.text().await.unwrap_or_default();
    bail!("{path} answered {status}: {}", body.trim());
}

/// Returns on Ctrl-C and SIGTERM.
pub(crate) async fn interrupted() {
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => terminate.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminated => {}
    }
}

/// Runs `work` and deletes `versions` whatever came of it, also where it is
/// [`interrupted`].
pub(crate) async fn deleting<T>(
    client: &Client,
    versions: &[Version],
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let done = tokio::select! {
        done = work => done,
        () = interrupted() => Err(anyhow::anyhow!("interrupted")),
    };
    let mut deleted = Ok(());
    for version in versions {
        deleted = deleted.and(client.delete(version).await);
    }
    // What the work failed for matters more.
    let done = done?;
    deleted?;
    Ok(done)
}

/// Raises the limit of open files as far as it goes.
pub(crate) fn raise_files() -> anyhow::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).context("could not raise the limit of open files")?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// ISO 8601, as NVCF writes durations.
pub(crate) fn iso(duration: Duration) -> String {
    format!("PT{}S", duration.as_micros() as f64 / 1e6)
}

/// For flags: `PT10S`, `10s`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    text.parse::<jiff::SignedDuration>()
        .map_err(|error| error.to_string())
        .and_then(|signed| {
            Duration::try_from(signed).map_err(|_| "must not be negative".to_owned())
        })
}

#[cfg(test)]
pub(crate) mod fake;

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::fake::FakeWeir;
    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        target: TargetArgs,
    }

    #[test]
    fn a_target_is_named_as_for_every_other_command() {
        let command = Cli::command();
        let argument = |name: &str| {
            let mut all = command.get_arguments();
            let found = all.find(|argument| argument.get_long() == Some(name));
            found.expect("there is such a flag").clone()
        };
        let flags = [
            ("url", "WEIR_URL"),
            ("admin-url", "WEIR_ADMIN_URL"),
            ("key", "WEIR_API_KEY"),
            ("data-dir", "WEIR_DATA_DIR"),
        ];
        for (flag, variable) in flags {
            assert_eq!(argument(flag).get_env().unwrap(), variable);
        }
        let parsed = Cli::parse_from(["bench", "--admin", "http://a"]);
        assert_eq!(parsed.target.admin_url, "http://a");
        let help = Cli::command().render_long_help().to_string();
        assert!(!help.contains("--admin "), "{help}");
    }

    #[test]
    fn a_key_is_the_flags_the_variables_or_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        let with = |flags: &[&str], variable: Option<&str>| {
            let all = ["bench", "--data-dir", path];
            let target = Cli::parse_from(all.iter().chain(flags)).target;
            target.key(variable.map(String::from))
        };
        let is = |key: &str| Some(key.to_owned());
        // One of the environment would count for a flag.
        if std::env::var_os("WEIR_API_KEY").is_none() {
            assert_eq!(with(&[], None), None);
            std::fs::write(directory.path().join("admin.key"), "file\n").unwrap();
            assert_eq!(with(&[], None), is("file"));
            assert_eq!(with(&[], Some("variable")), is("variable"));
        }
        assert_eq!(with(&["--key", "flag"], Some("variable")), is("flag"));
    }

    #[tokio::test]
    async fn without_a_key_only_a_weir_that_wants_one_is_an_error() {
        let fake = FakeWeir::start(200).await;
        let mut client = Client::new(&fake.target()).unwrap();
        client.key = None;
        let error = client.create("f", Duration::ZERO).await.unwrap_err();
        assert!(error.to_string().contains("WEIR_ADMIN_KEY"), "{error}");
        fake.state().open = true;
        let version = client.create("f", Duration::ZERO).await.unwrap();
        let invoked = client.invoke(&version.function, "/infer");
        assert_eq!(Client::answered(invoked).await, Ok("200".into()));
        let head = client.head("f", "GET /").unwrap();
        assert!(!head.contains("authorization"), "{head}");
        client.delete(&version).await.unwrap();
    }

    #[test]
    fn durations_are_iso_8601() {
        assert_eq!(iso(Duration::from_millis(500)), "PT0.5S");
        assert_eq!(iso(Duration::from_secs(3)), "PT3S");
        assert_eq!(iso(Duration::ZERO), "PT0S");
        assert_eq!(parse_duration("PT5M"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("PT0.25S"), Ok(Duration::from_millis(250)));
        assert!(parse_duration("-PT1S").is_err());
        assert!(parse_duration("soon").is_err());
    }
}
