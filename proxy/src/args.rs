//! The command line of `weir`.
//!
//! A value of `weir serve` comes from its flag, else its environment variable,
//! else the `--config` file, else the built-in default. The file's values are
//! made the flags' defaults, so that clap alone decides which one counts.

use std::{
    ffi::OsString,
    fmt,
    net::SocketAddr,
    num::{NonZeroU32, NonZeroUsize},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::{CommandFactory, FromArgMatches, error::ErrorKind, parser::ValueSource};
use weir_control::model::IsoDuration;

use crate::{access_log, cli, tls::Files, trace};

/// A proxy for serverless GPU functions that speaks NVIDIA Cloud Functions' API
#[derive(Debug, clap::Parser)]
#[command(name = "weir", version)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Serve: the data plane, the lifecycle API and this node's instances
    Serve(ServeArgs),
    #[command(flatten)]
    Client(cli::Command),
    /// A function to try things with: echoes, works, streams, fails as told
    SampleFunction(weir_bench::sample::SampleArgs),
    /// Load a running `weir serve` and measure it
    #[command(subcommand)]
    Bench(weir_bench::Bench),
}

/// What `weir serve` is told.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeArgs {
    /// Address of the data plane: invocations and nothing else
    #[arg(
        long,
        env = "WEIR_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:8080",
        value_parser = address
    )]
    pub listen: SocketAddr,

    /// Address of the lifecycle API, the metrics and the health checks
    #[arg(
        long,
        env = "WEIR_ADMIN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:8081",
        value_parser = address
    )]
    pub admin: SocketAddr,

    /// Directory of the control state, the admin key and the instances' logs
    #[arg(
        long,
        env = "WEIR_DATA_DIR",
        value_name = "DIR",
        default_value = ".weir"
    )]
    pub data_dir: PathBuf,

    /// TOML file with defaults for these flags; its keys are the flags' names without the dashes in front [default: none]
    #[arg(long, env = "WEIR_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Devices of this node by declaration, as NAME:COUNT, a comma list [default: those that are found]
    #[arg(long, env = "WEIR_GPUS", value_name = "NAME:COUNT")]
    pub gpus: Option<DeclaredGpus>,

    /// Ports that instances are told to listen on, first and last
    #[arg(long, env = "WEIR_INSTANCE_PORTS", value_name = "FIRST-LAST",
          default_value = "20000-29999", value_parser = ports)]
    pub instance_ports: RangeInclusive<u16>,

    /// User that instances run as where weir runs as root [default: nobody]
    #[arg(long, env = "WEIR_INSTANCE_USER", value_name = "USER")]
    pub instance_user: Option<String>,

    /// How long to go on accepting after SIGTERM, an ISO 8601 duration
    #[arg(
        long,
        env = "WEIR_DRAIN_DELAY",
        value_name = "DURATION",
        default_value = "PT0S"
    )]
    pub drain_delay: IsoDuration,

    /// How long what waits or runs is served after that, an ISO 8601 duration
    #[arg(
        long,
        env = "WEIR_GRACE",
        value_name = "DURATION",
        default_value = "PT15S"
    )]
    pub grace: IsoDuration,

    /// Who may call: holders of a key, or anyone (only on loopback addresses)
    #[arg(long, env = "WEIR_AUTH", default_value = "keys")]
    pub auth: Auth,

    /// Where a line for each invocation goes: stdout, off, or a file to append to
    #[arg(
        long,
        env = "WEIR_ACCESS_LOG",
        value_name = "stdout|off|FILE",
        default_value = "stdout"
    )]
    pub access_log: AccessLog,

    /// How its lines are written
    #[arg(long, env = "WEIR_ACCESS_LOG_FORMAT", default_value = "json")]
    pub access_log_format: access_log::Format,

    /// Collector of traces: the base of its URL, to which /v1/traces is added; OTLP over HTTP [default: what OTEL_EXPORTER_OTLP_ENDPOINT says, else none]
    #[arg(long, env = "WEIR_OTLP_ENDPOINT", value_name = "URL", value_parser = |s: &str| trace::endpoint(s, false))]
    pub otlp_endpoint: Option<String>,

    /// Part of the invocations to trace, 0 to 1; those whose caller traces or doesn't are as the caller says
    #[arg(long, env = "WEIR_TRACE_SAMPLE", value_name = "RATIO", default_value = "0.01", value_parser = ratio)]
    pub trace_sample: f64,

    /// Cores to serve with, a number of threads [default: all there are]
    #[arg(long, env = "WEIR_CORES", value_name = "N", value_parser = count::<NonZeroUsize>)]
    pub cores: Option<NonZeroUsize>,

    #[command(flatten)]
    pub tls: TlsArgs,

    #[command(flatten)]
    pub limits: LimitArgs,
}

/// Certificates of the listeners, whose files are read again when they change, and of instances.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// PEM file with the data plane's certificate and its chain, a comma list for several names; the first is for
    /// clients that name no other [default: no TLS]
    #[arg(
        long,
        env = "WEIR_TLS_CERT",
        value_name = "FILE",
        value_delimiter = ','
    )]
    pub tls_cert: Vec<PathBuf>,

    /// PEM file with the private key of each --tls-cert, in the same order
    #[arg(long, env = "WEIR_TLS_KEY", value_name = "FILE", value_delimiter = ',')]
    pub tls_key: Vec<PathBuf>,

    /// As --tls-cert, for the admin listener
    #[arg(
        long,
        env = "WEIR_ADMIN_TLS_CERT",
        value_name = "FILE",
        value_delimiter = ','
    )]
    pub admin_tls_cert: Vec<PathBuf>,

    /// As --tls-key, for the admin listener
    #[arg(
        long,
        env = "WEIR_ADMIN_TLS_KEY",
        value_name = "FILE",
        value_delimiter = ','
    )]
    pub admin_tls_key: Vec<PathBuf>,

    /// PEM file with certificates of authorities that instances called by https:// may have theirs from, beside the
    /// system's
    #[arg(long, env = "WEIR_INSTANCE_CA", value_name = "FILE")]
    pub instance_ca: Option<PathBuf>,

    /// Lowest version of TLS that is spoken, on both listeners
    #[arg(long, env = "WEIR_TLS_MIN_VERSION", default_value = "1.2")]
    pub tls_min_version: TlsVersion,
}

impl TlsArgs {
    /// Of the data plane; none means no TLS.
    #[must_use]
    pub fn data(&self) -> Vec<Files> {
        pairs(&self.tls_cert, &self.tls_key)
    }

    /// Of the admin listener.
    #[must_use]
    pub fn admin(&self) -> Vec<Files> {
        pairs(&self.admin_tls_cert, &self.admin_tls_key)
    }
}

fn pairs(certificates: &[PathBuf], keys: &[PathBuf]) -> Vec<Files> {
    let pairs = certificates.iter().cloned().zip(keys.iter().cloned());
    pairs
        .map(|(certificate, key)| Files { certificate, key })
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TlsVersion {
    #[value(name = "1.2")]
    V1_2,
    #[value(name = "1.3")]
    V1_3,
}

/// What callers may use of the data plane. Bytes are a number, or one with KiB, MiB or GiB.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Largest head of a request, in bytes: 8KiB to 16MiB
    #[arg(long, env = "WEIR_MAX_HEAD", value_name = "BYTES",
          default_value = "64KiB", value_parser = |s: &str| bytes_within(s, 8 << 10, 16 << 20))]
    pub max_head: u32,

    /// Header fields of a request, a number
    #[arg(long, env = "WEIR_MAX_FIELDS", value_name = "N",
          default_value = "100", value_parser = count::<NonZeroUsize>)]
    pub max_fields: NonZeroUsize,

    /// Longest path and query of a request, in bytes
    #[arg(long, env = "WEIR_MAX_URI", value_name = "BYTES",
          default_value = "16KiB", value_parser = bytes)]
    pub max_uri: u64,

    /// Largest body of an invocation, in bytes
    #[arg(long, env = "WEIR_MAX_BODY", value_name = "BYTES",
          default_value = "1GiB", value_parser = bytes)]
    pub max_body: u64,

    /// Time for a request's head, an ISO 8601 duration: from the accept, or from the first byte of a later head
    #[arg(long, env = "WEIR_HEAD_TIMEOUT", value_name = "DURATION",
          default_value = "PT10S", value_parser = positive)]
    pub head_timeout: IsoDuration,

    /// How long a connection may idle between requests, an ISO 8601 duration
    #[arg(long, env = "WEIR_IDLE_TIMEOUT", value_name = "DURATION",
          default_value = "PT75S", value_parser = positive)]
    pub idle_timeout: IsoDuration,

    /// Time for a connection to an instance, an ISO 8601 duration
    #[arg(long, env = "WEIR_CONNECT_TIMEOUT", value_name = "DURATION",
          default_value = "PT1S", value_parser = positive)]
    pub connect_timeout: IsoDuration,

    /// How long a connection to an instance may idle and be used again, an ISO 8601 duration; less than what the
    /// instance keeps it for, or a request may meet its closing
    #[arg(long, env = "WEIR_INSTANCE_IDLE_TIMEOUT", value_name = "DURATION",
          default_value = "PT4S", value_parser = positive)]
    pub instance_idle_timeout: IsoDuration,

    /// Time for a request from its slot to its answer's last byte, an ISO 8601 duration
    #[arg(long, env = "WEIR_REQUEST_TIMEOUT", value_name = "DURATION",
          default_value = "PT1H", value_parser = positive)]
    pub request_timeout: IsoDuration,

    /// Streams open at a time on one HTTP/2 connection, a number
    #[arg(long, env = "WEIR_H2_STREAMS", value_name = "N",
          default_value = "100", value_parser = count::<NonZeroU32>)]
    pub h2_streams: NonZeroU32,

    /// What a caller may send ahead on one HTTP/2 stream, in bytes: 1KiB to 1GiB
    #[arg(long, env = "WEIR_H2_WINDOW", value_name = "BYTES",
          default_value = "64KiB", value_parser = |s: &str| bytes_within(s, 1 << 10, 1 << 30))]
    pub h2_window: u32,

    /// Connections of callers at a time, a number [default: 80% of the limit of open files]
    #[arg(long, env = "WEIR_MAX_CONNECTIONS", value_name = "N", value_parser = count::<NonZeroUsize>)]
    pub max_connections: Option<NonZeroUsize>,

    /// Functions that one account may have, a number
    #[arg(
        long,
        env = "WEIR_MAX_FUNCTIONS",
        value_name = "N",
        default_value = "100000",
        value_parser = count::<NonZeroUsize>
    )]
    pub max_functions: NonZeroUsize,
}

impl ServeArgs {
    /// The URL that traces are sent to, by OpenTelemetry's own variables where there is no flag.
    pub fn traces_endpoint(&self) -> anyhow::Result<Option<String>> {
        if self.otlp_endpoint.is_some() {
            return Ok(self.otlp_endpoint.clone());
        }
        for (variable, whole) in [
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", true),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", false),
        ] {
            match std::env::var(variable) {
                Ok(url) if !url.is_empty() => {
                    let checked = trace::endpoint(&url, whole);
                    return checked
                        .map(Some)
                        .map_err(|why| anyhow::anyhow!("{variable}: {why}"));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Threads to serve with.
    #[must_use]
    pub fn cores(&self) -> usize {
        self.cores
            .or_else(|| std::thread::available_parallelism().ok())
            .map_or(1, NonZeroUsize::get)
    }
}

impl LimitArgs {
    /// Callers' connections at a time. Reads the limit of open files: call it
    /// after that was raised.
    #[must_use]
    pub fn max_connections(&self) -> usize {
        self.max_connections.map_or_else(
            || {
                let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
                let files = limit.current.unwrap_or(1 << 20);
                usize::try_from(files / 5 * 4).unwrap_or(usize::MAX).max(1)
            },
            NonZeroUsize::get,
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Auth {
    Keys,
    None,
}

/// Where the access log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLog {
    Stdout,
    Off,
    File(PathBuf),
}

impl FromStr for AccessLog {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "stdout" => Ok(Self::Stdout),
            "off" => Ok(Self::Off),
            "" => Err("must be stdout, off or a file".into()),
            file => Ok(Self::File(file.into())),
        }
    }
}

/// Devices that the operator says are there: name and count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredGpus(pub Vec<(String, u32)>);

impl FromStr for DeclaredGpus {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        s.split(',')
            .map(|entry| {
                let entry = entry.trim();
                let (name, count) = entry.rsplit_once(':').unwrap_or((entry, "1"));
                match count.parse() {
                    Ok(count) if !name.is_empty() => Ok((name.to_owned(), count)),
                    _ => Err(format!(
                        "'{entry}' is not a name and a count such as H100:8"
                    )),
                }
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl fmt::Display for DeclaredGpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, count)) in self.0.iter().enumerate() {
            write!(f, "{}{name}:{count}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

fn address(s: &str) -> Result<SocketAddr, String> {
    s.parse()
        .map_err(|_| "must be an IP address and a port, such as 127.0.0.1:8080".into())
}

fn count<N: FromStr>(s: &str) -> Result<N, String> {
    s.parse()
        .map_err(|_| "must be a whole number of at least 1".into())
}

fn ports(s: &str) -> Result<RangeInclusive<u16>, String> {
    let parsed = s
        .split_once('-')
        .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)));
    match parsed {
        Some((first, last)) if 0 < first && first <= last => Ok(first..=last),
        _ => Err("must be the first and the last port, such as 20000-29999".into()),
    }
}

fn bytes(s: &str) -> Result<u64, String> {
    let digits = s.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match s[digits.len()..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err("must be a number of bytes, such as 1048576, 1MiB or 1GiB".into()),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .ok_or_else(|| "must be a number of bytes, such as 1048576, 1MiB or 1GiB".into())
}

fn bytes_within(s: &str, least: u32, most: u32) -> Result<u32, String> {
    u32::try_from(bytes(s)?)
        .ok()
        .filter(|n| (least..=most).contains(n))
        .ok_or_else(|| format!("must be {least} to {most} bytes"))
}

fn ratio(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("must be a number from 0 to 1".into()),
    }
}

fn positive(s: &str) -> Result<IsoDuration, String> {
    match s.parse::<IsoDuration>() {
        Ok(duration) if duration.0.is_zero() => Err("must be longer than nothing".into()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads the command line; ends the process where it is wrong.
#[must_use]
pub fn parse() -> Args {
    parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// [`parse`] of the given words, the program's name first.
pub fn parse_from(words: impl IntoIterator<Item = OsString>) -> Result<Args, clap::Error> {
    let words: Vec<OsString> = words.into_iter().collect();
    let mut command = Args::command();
    // Nothing is required that a file could give, so what fails here would fail with the file too.
    let mut matches = command.try_get_matches_from_mut(&words)?;
    if let Some(("serve", serve)) = matches.subcommand()
        && let Some(file) = serve.get_one::<PathBuf>("config").cloned()
    {
        let given = match serve.value_source("config") {
            Some(ValueSource::EnvVariable) => "WEIR_CONFIG",
            _ => "--config",
        };
        command = with_defaults(&file).map_err(|why| {
            Args::command().error(
                ErrorKind::ValueValidation,
                format!("{} (from {given}): {why}", file.display()),
            )
        })?;
        matches = command.try_get_matches_from_mut(&words)?;
    }
    let args = Args::from_arg_matches(&matches).map_err(|e| e.format(&mut command))?;
    if let Command::Serve(serve) = &args.command {
        check(serve).map_err(|why| command.error(ErrorKind::ValueValidation, why))?;
    }
    Ok(args)
}

/// What no single flag can tell.
fn check(serve: &ServeArgs) -> Result<(), String> {
    for (flag, address) in [("--listen", serve.listen), ("--admin", serve.admin)] {
        if serve.auth == Auth::None && !address.ip().is_loopback() {
            return Err(format!(
                "--auth none lets anyone in, so it takes loopback addresses only, and {flag} is {address}: give it one such as 127.0.0.1:8080, or leave --auth out"
            ));
        }
    }
    if serve.listen == serve.admin && serve.listen.port() != 0 {
        return Err(format!(
            "--listen and --admin are both {}: give them a port each",
            serve.listen
        ));
    }
    let tls = &serve.tls;
    for (name, certificates, keys) in [
        ("tls", &tls.tls_cert, &tls.tls_key),
        ("admin-tls", &tls.admin_tls_cert, &tls.admin_tls_key),
    ] {
        let (certificates, keys) = (certificates.len(), keys.len());
        if certificates != keys {
            return Err(format!(
                "--{name}-cert and --{name}-key belong together: there are {certificates} certificates and {keys} keys"
            ));
        }
    }
    Ok(())
}

/// The command line with the file's values as the defaults of `serve`'s flags.
fn with_defaults(file: &Path) -> Result<clap::Command, String> {
    let text = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    let values = file_values(&text)?;

    // As flags first: a value that is wrong is told so even where another one counts.
    let mut words = vec!["weir".to_owned(), "serve".to_owned()];
    words.extend(values.iter().map(|(key, value)| format!("--{key}={value}")));
    Args::command()
        .try_get_matches_from(words)
        .map_err(|e| first_line(&e))?;

    Ok(Args::command().mut_subcommand("serve", |mut serve| {
        for (key, value) in values {
            // clap keeps what it is given for as long as the process lives.
            let value: &'static str = value.leak();
            serve = serve.mut_arg(key.replace('-', "_"), |arg| arg.default_value(value));
        }
        serve
    }))
}

fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

/// The file's keys, each one a flag of `serve`, and their values as words.
fn file_values(text: &str) -> Result<Vec<(String, String)>, String> {
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
    let command = Args::command();
    let known: Vec<&str> = command
        .find_subcommand("serve")
        .into_iter()
        .flat_map(clap::Command::get_arguments)
        .filter_map(clap::Arg::get_long)
        .filter(|long| !matches!(*long, "config" | "help" | "version"))
        .collect();
    table
        .into_iter()
        .map(|(key, value)| {
            if !known.contains(&key.as_str()) {
                return Err(format!("unknown key '{key}'; {}", nearest(&key, &known)));
            }
            let value = word(&value).ok_or_else(|| {
                format!("the value of '{key}' must be a string, a number or a list of strings")
            })?;
            Ok((key, value))
        })
        .collect()
}

fn word(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(s) => Some(s.clone()),
        toml::Value::Integer(n) => Some(n.to_string()),
        toml::Value::Float(n) => Some(n.to_string()),
        toml::Value::Array(entries) => {
            let words: Option<Vec<String>> = entries.iter().map(word).collect();
            Some(words?.join(","))
        }
        _ => None,
    }
}

fn nearest(key: &str, known: &[&str]) -> String {
    let key = key.replace('_', "-");
    let mut near: Vec<(usize, &str)> = known
        .iter()
        .map(|name| (distance(&key, name), *name))
        .filter(|(distance, name)| {
            *distance <= 1 + name.len() / 4 || name.starts_with(&key) || key.starts_with(name)
        })
        .collect();
    near.sort_unstable();
    if near.is_empty() {
        format!("there are {}", known.join(", "))
    } else {
        let names: Vec<String> = near.iter().map(|(_, name)| format!("'{name}'")).collect();
        format!("did you mean {}?", names.join(" or "))
    }
}

/// Levenshtein's.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::process::Command as Process;

    use super::*;

    fn serve(words: &[&str]) -> Result<ServeArgs, String> {
        let words = ["weir", "serve"].iter().chain(words).map(OsString::from);
        match parse_from(words).map_err(|e| e.to_string())?.command {
            Command::Serve(serve) => Ok(serve),
            other => panic!("{other:?}"),
        }
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_flag_of_serve_is_a_variable_too() {
        let command = Args::command();
        let serve = command.find_subcommand("serve").unwrap();
        for arg in serve.get_arguments().filter(|a| a.get_id() != "help") {
            let long = arg.get_long().unwrap();
            let variable = format!("WEIR_{}", long.replace('-', "_").to_uppercase());
            assert_eq!(
                arg.get_env().unwrap_or_else(|| panic!("{long}")),
                variable.as_str()
            );
            assert!(arg.get_help().is_some(), "{long}");
        }
    }

    #[test]
    fn built_in_defaults() {
        let args = serve(&[]).unwrap();
        assert_eq!(args.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(args.admin.to_string(), "127.0.0.1:8081");
        assert_eq!(args.instance_ports, 20000..=29999);
        assert_eq!(args.drain_delay, IsoDuration::secs(0));
        assert_eq!(args.grace, IsoDuration::secs(15));
        assert_eq!(args.auth, Auth::Keys);
        assert_eq!(args.access_log, AccessLog::Stdout);
        assert!(args.cores() > 0);
        assert_eq!(args.access_log_format, access_log::Format::Json);
        assert_eq!((args.otlp_endpoint, args.trace_sample), (None, 0.01));
        let limits = args.limits;
        assert_eq!((limits.max_head, limits.max_fields.get()), (64 << 10, 100));
        assert_eq!((limits.max_uri, limits.max_body), (16 << 10, 1 << 30));
        assert_eq!(limits.head_timeout, IsoDuration::secs(10));
        assert_eq!(limits.idle_timeout, IsoDuration::secs(75));
        assert_eq!(limits.connect_timeout, IsoDuration::secs(1));
        assert_eq!(limits.request_timeout, IsoDuration::secs(3600));
        assert_eq!((limits.h2_streams.get(), limits.h2_window), (100, 64 << 10));
        assert_eq!(limits.max_functions.get(), 100_000);
        assert!(limits.max_connections() > 0);
    }

    #[test]
    fn values_are_read() {
        let args = serve(&[
            "--gpus",
            "H100:8,L4:2",
            "--access-log",
            "a.log",
            "--access-log-format",
            "text",
            "--otlp-endpoint",
            "http://collector:4318/",
            "--trace-sample",
            "1",
            "--max-body",
            "2MiB",
            "--instance-ports",
            "3000-3001",
            "--grace",
            "PT1M",
            "--max-connections",
            "7",
        ])
        .unwrap();
        let gpus = args.gpus.as_ref();
        assert_eq!(gpus.unwrap().to_string(), "H100:8,L4:2");
        assert_eq!(args.access_log, AccessLog::File("a.log".into()));
        assert_eq!(args.access_log_format, access_log::Format::Text);
        let traces = args.traces_endpoint().unwrap().unwrap();
        assert_eq!(traces, "http://collector:4318/v1/traces");
        assert!((args.trace_sample - 1.0).abs() < f64::EPSILON);
        assert_eq!(args.limits.max_body, 2 << 20);
        assert_eq!(args.instance_ports, 3000..=3001);
        assert_eq!(args.grace, IsoDuration::secs(60));
        assert_eq!(args.limits.max_connections.unwrap().get(), 7);
    }

    #[test]
    fn wrong_values_are_refused() {
        for (flag, value) in [
            ("--gpus", "H100:many"),
            ("--max-body", "1GB"),
            ("--max-body", "99999999999GiB"),
            ("--instance-ports", "30-20"),
            ("--instance-ports", "0-20"),
            ("--grace", "15s"),
            ("--cores", "0"),
            ("--max-head", "1KiB"),
            ("--max-fields", "0"),
            ("--head-timeout", "PT0S"),
            ("--request-timeout", "1h"),
            ("--h2-window", "2GiB"),
            ("--listen", "nowhere"),
            ("--access-log-format", "xml"),
            ("--otlp-endpoint", "collector:4318"),
            ("--trace-sample", "2"),
            ("--trace-sample", "NaN"),
        ] {
            let error = serve(&[flag, value]).unwrap_err();
            assert!(error.contains(flag), "{flag} {value}: {error}");
        }
    }

    #[test]
    fn no_auth_is_for_loopback_only() {
        assert!(serve(&["--auth", "none"]).is_ok());
        for flag in ["--listen", "--admin"] {
            let error = serve(&["--auth", "none", flag, "0.0.0.0:80"]).unwrap_err();
            assert!(error.contains(flag), "{error}");
        }
    }

    #[test]
    fn certificates_and_keys_come_in_pairs() {
        let args = serve(&["--tls-cert", "a,b", "--tls-key", "c,d"]).unwrap();
        let pair = |certificate: &str, key: &str| Files {
            certificate: certificate.into(),
            key: key.into(),
        };
        assert_eq!(args.tls.data(), [pair("a", "c"), pair("b", "d")]);
        assert_eq!(args.tls.admin(), []);
        let error = serve(&["--admin-tls-cert", "a"]).unwrap_err();
        assert!(error.contains("--admin-tls-key"), "{error}");
        let file = file("tls-cert = ['a', 'b']\ntls-key = 'c'");
        let path = file.path().to_str().unwrap();
        let error = serve(&["--config", path]).unwrap_err();
        assert!(error.contains("2 certificates and 1 keys"), "{error}");
    }

    #[test]
    fn a_file_gives_defaults_and_flags_win() {
        let file = file("listen = '127.0.0.1:1'\ndata-dir = 'd'\ncores = 3\ngpus = ['A:1', 'B:2']");
        let path = file.path().to_str().unwrap();
        let args = serve(&["--config", path, "--data-dir", "flag"]).unwrap();
        assert_eq!(args.listen.port(), 1);
        assert_eq!(args.data_dir, Path::new("flag"));
        assert_eq!(args.cores(), 3);
        assert_eq!(args.gpus.unwrap().to_string(), "A:1,B:2");
        assert_eq!(args.admin.port(), 8081);
    }

    #[test]
    fn unknown_and_wrong_keys_are_named() {
        for (text, parts) in [
            (
                "data_dir = 'x'",
                &["unknown key 'data_dir'", "'data-dir'"][..],
            ),
            ("lisen = 'x'", &["'lisen'", "did you mean 'listen'?"]),
            (
                "zzzzzzzzzz = 1",
                &["'zzzzzzzzzz'", "there are listen, admin"],
            ),
            ("config = 'x'", &["unknown key 'config'"]),
            ("listen = 'x'", &["'x'", "--listen"]),
            ("listen = true", &["'listen' must be a string"]),
            ("trace-sample = 1.5", &["'1.5'", "--trace-sample"]),
            ("listen", &["expected"]),
        ] {
            let file = file(text);
            let path = file.path().to_str().unwrap();
            let error = serve(&["--config", path]).unwrap_err();
            assert!(error.contains(path), "{error}");
            for part in parts {
                assert!(error.contains(part), "{text}: {error}");
            }
        }
        assert!(
            serve(&["--config", "/no/such/file"])
                .unwrap_err()
                .contains("/no/such/file")
        );
    }

    /// Runs in a process of its own, with an environment of its own.
    #[test]
    #[ignore = "started by a_variable_is_over_the_file_and_under_the_flag"]
    fn child() {
        let words: Vec<OsString> = std::env::var("TEST_WORDS")
            .unwrap()
            .split(' ')
            .map(Into::into)
            .collect();
        match parse_from(words).unwrap().command {
            Command::Serve(args) => println!(
                "listen={} admin={} grace={}",
                args.listen, args.admin, args.grace
            ),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_variable_is_over_the_file_and_under_the_flag() {
        let file = file("listen = '127.0.0.1:1'\nadmin = '127.0.0.1:1'\ngrace = 'PT1S'");
        let output = Process::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "args::tests::child",
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("WEIR_CONFIG", file.path())
            .env("WEIR_LISTEN", "127.0.0.1:2")
            .env("WEIR_ADMIN", "127.0.0.1:2")
            .env("TEST_WORDS", "weir serve --listen 127.0.0.1:3")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.contains("listen=127.0.0.1:3 admin=127.0.0.1:2 grace=PT1S"),
            "{text}"
        );
    }
}
