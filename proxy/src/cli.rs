//! The client: every command of `weir` that talks to a `weir serve`.
//!
//! It speaks the public API only, so what it can do anyone can do.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Map, Value};

mod api;
mod apply;
mod deploy;
mod function;
mod invoke;
mod key;
mod status;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Create, list, show and delete functions
    Function(function::Functions),
    /// Create and delete versions of a function
    Version(function::Versions),
    /// Deploy versions, change and end their deployments
    Deploy(deploy::Deploys),
    /// Bring functions to what a file says; what is so already is left alone
    Apply(apply::Apply),
    /// Call a function
    Invoke(invoke::Invoke),
    /// Create, list and revoke API keys
    Key(key::Keys),
    /// Show every version's state, instances and queue
    Status(status::Status),
    /// Show what an instance wrote
    Logs(status::Logs),
    /// Show the nodes and their GPUs
    Gpu(status::Gpu),
}

/// Runs one command; the caller prints the error, if any, and ends with 1.
pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    let done = match command {
        Command::Function(args) => args.run().await,
        Command::Version(args) => args.run().await,
        Command::Deploy(args) => args.run().await,
        Command::Apply(args) => args.run().await,
        Command::Invoke(args) => return args.run().await,
        Command::Key(args) => args.run().await,
        Command::Status(args) => args.run().await,
        Command::Logs(args) => args.run().await,
        Command::Gpu(args) => args.run().await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Where `weir serve` is, who asks, and how the answer is shown.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Connection")]
struct Common {
    /// Admin address of `weir serve`
    #[arg(
        long,
        env = "WEIR_ADMIN_URL",
        global = true,
        value_name = "URL",
        default_value = "http://127.0.0.1:8081"
    )]
    admin_url: String,
    /// Data-plane address of `weir serve`
    #[arg(
        long,
        env = "WEIR_URL",
        global = true,
        value_name = "URL",
        default_value = "http://127.0.0.1:8080"
    )]
    url: String,
    /// API key [default: WEIR_ADMIN_KEY, else the file admin.key in --data-dir]
    #[arg(
        long,
        env = "WEIR_API_KEY",
        global = true,
        hide_env_values = true,
        value_name = "KEY"
    )]
    key: Option<String>,
    /// The data directory of a `weir serve` on this machine
    #[arg(
        long,
        env = "WEIR_DATA_DIR",
        global = true,
        value_name = "DIR",
        default_value = ".weir"
    )]
    data_dir: PathBuf,
    /// How answers are shown
    #[arg(long, global = true, default_value = "table", value_name = "FORMAT")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Table,
    Json,
}

impl Common {
    /// The key to show, if there is one: with `--auth none` none is needed.
    fn key(&self) -> Option<String> {
        self.key
            .clone()
            .or_else(|| std::env::var("WEIR_ADMIN_KEY").ok())
            .or_else(|| std::fs::read_to_string(self.data_dir.join("admin.key")).ok())
            .map(|key| key.trim().to_owned())
            .filter(|key| !key.is_empty())
    }

    /// Shows the server's answer itself, or the rows made of it.
    fn show(&self, answer: &Value, header: &[&str], rows: Vec<Vec<String>>) -> anyhow::Result<()> {
        match self.output {
            Output::Json => print(&serde_json::to_string_pretty(answer)?),
            Output::Table => print(&table(header, rows)),
        }
    }

    /// Shows the server's answer itself, or a sentence about it.
    fn say(&self, answer: &Value, sentence: &str) -> anyhow::Result<()> {
        match self.output {
            Output::Json => print(&serde_json::to_string_pretty(answer)?),
            Output::Table => print(sentence),
        }
    }
}

fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table.set_header(header.iter().map(|h| h.to_uppercase()).collect::<Vec<_>>());
    table.add_rows(rows);
    // The style pads every cell on both sides.
    table
        .lines()
        .map(|line| line.trim_end().strip_prefix(' ').unwrap_or("").to_owned())
        .collect::<Vec<_>>()
        .join("\n")
}

/// To standard output, where a reader that left (`| head`) is no failure.
fn print(text: &str) -> anyhow::Result<()> {
    write_out(text.as_bytes())?;
    if text.ends_with('\n') {
        return Ok(());
    }
    write_out(b"\n")
}

fn write_out(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("can't write to standard output"),
    }
}

/// One line to standard error: what goes on, for people.
fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A member as text; empty where it is absent.
fn text(value: &Value, member: &str) -> String {
    match &value[member] {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

fn list<'a>(value: &'a Value, member: &str) -> &'a [Value] {
    value[member].as_array().map_or(&[], Vec::as_slice)
}

/// The text of a file, or of standard input for `-`.
fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        return io::read_to_string(io::stdin()).context("can't read standard input");
    }
    std::fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))
}

/// A request body from a file: JSON, or YAML.
fn read_object(file: &Path) -> anyhow::Result<Map<String, Value>> {
    let text = read(file)?;
    // JSON first: its errors are clearer where the file means to be JSON.
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(&text)
            .with_context(|| format!("{} is not a JSON object", file.display()));
    }
    serde_saphyr::from_str(&text)
        .with_context(|| format!("{} is not a YAML mapping", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_starts_at_the_margin_and_has_no_trailing_space() {
        let shown = table(
            &["id", "name"],
            vec![
                vec!["1".into(), "first".into()],
                vec!["22".into(), "b".into()],
            ],
        );
        assert_eq!(shown, "ID  NAME\n1   first\n22  b");
    }

    #[test]
    fn the_key_comes_from_the_flag_else_the_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("admin.key"), "weir_file\n").unwrap();
        let mut common = Common {
            admin_url: String::new(),
            url: String::new(),
            key: Some("weir_flag".into()),
            data_dir: dir.path().into(),
            output: Output::Table,
        };
        assert_eq!(common.key().as_deref(), Some("weir_flag"));
        common.key = None;
        if std::env::var_os("WEIR_ADMIN_KEY").is_none() {
            assert_eq!(common.key().as_deref(), Some("weir_file"));
        }
    }

    #[test]
    fn bodies_are_read_as_json_or_yaml() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("body");
        for text in ["{\"name\": \"a\", \"n\": 1}", "name: a\nn: 1\n"] {
            std::fs::write(&file, text).unwrap();
            let body = read_object(&file).unwrap();
            assert_eq!(body["name"], "a");
            assert_eq!(body["n"], 1);
        }
        std::fs::write(&file, "{nope").unwrap();
        assert!(read_object(&file).is_err());
    }
}
