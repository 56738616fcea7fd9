//! The client: every command of `weir` that talks to a `weir serve`.
//!
//! It speaks the public API only, so what it can do anyone can do.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::CommandFactory;
use jiff::Timestamp;
use serde_json::{Map, Value};
use weir_control::dial::{explain, tls_error};

use self::{
    screen::Screen,
    table::{Column, plain, table},
};

mod api;
mod apply;
mod deploy;
mod function;
mod id;
mod invoke;
mod key;
mod node;
mod screen;
mod status;
mod table;
mod wait;

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
    /// Show every version's state, instances, slots and queue, and what was decided why
    Status(status::Status),
    /// Show what an instance wrote
    Logs(node::Logs),
    /// Show the nodes and their GPUs
    Gpu(node::Gpu),
    /// Print what makes a shell complete weir's command line
    #[command(after_help = "Examples:\n  \
        weir completions bash > ~/.local/share/bash-completion/completions/weir\n  \
        weir completions zsh > \"${fpath[1]}/_weir\"\n  \
        weir completions fish > ~/.config/fish/completions/weir.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// What the shell reads.
fn completions(shell: Shell) -> Vec<u8> {
    let mut command = crate::args::Args::command();
    let mut script = Vec::new();
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    clap_complete::generate(shell, &mut command, "weir", &mut script);
    script
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
        Command::Completions { shell } => write_out(&completions(shell)),
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
    /// PEM file with certificates of authorities to trust beside the system's, where an address is https
    #[arg(long, env = "WEIR_CA_FILE", global = true, value_name = "FILE")]
    ca_file: Option<PathBuf>,
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
    /// The key to show, if there is one, and where it came from: with `--auth none` none is needed.
    fn key(&self) -> Option<(String, String)> {
        let file = self.data_dir.join("admin.key");
        let given = self.key.clone().map(|key| {
            let variable = std::env::var("WEIR_API_KEY").is_ok_and(|v| v == key);
            let from = if variable { "WEIR_API_KEY" } else { "--key" };
            (key, from.to_owned())
        });
        given
            .or_else(|| {
                Some((
                    std::env::var("WEIR_ADMIN_KEY").ok()?,
                    "WEIR_ADMIN_KEY".into(),
                ))
            })
            .or_else(|| {
                let key = std::fs::read_to_string(&file).ok()?;
                Some((key, file.display().to_string()))
            })
            .map(|(key, from)| (key.trim().to_owned(), from))
            .filter(|(key, _)| !key.is_empty())
    }

    /// Shows the server's answer itself, or the rows made of it.
    fn show(
        &self,
        answer: &Value,
        columns: &[Column],
        rows: Vec<Vec<String>>,
    ) -> anyhow::Result<()> {
        match self.output {
            Output::Json => print(&serde_json::to_string_pretty(answer)?),
            Output::Table => print(&table(columns, rows, Screen::stdout())),
        }
    }

    /// Shows the server's answer itself, or every member of these parts of it.
    fn show_whole<'a>(
        &self,
        answer: &Value,
        parts: impl IntoIterator<Item = &'a Value>,
    ) -> anyhow::Result<()> {
        if self.output == Output::Json {
            return print(&serde_json::to_string_pretty(answer)?);
        }
        let screen = Screen {
            width: None,
            ..Screen::stdout()
        };
        let tables: Vec<String> = parts
            .into_iter()
            .map(|part| {
                let mut rows = Vec::new();
                members(part, "", &mut rows);
                let rows = rows.into_iter().map(|(path, value)| {
                    let value = match value {
                        Value::String(text) => text.clone(),
                        other => other.to_string(),
                    };
                    vec![path, value]
                });
                table(&[plain("field"), plain("value")], rows.collect(), screen)
            })
            .collect();
        print(&tables.join("\n\n"))
    }

    /// Shows the server's answer itself, or a sentence about it.
    fn say(&self, answer: &Value, sentence: &str) -> anyhow::Result<()> {
        match self.output {
            Output::Json => print(&serde_json::to_string_pretty(answer)?),
            Output::Table => print(sentence),
        }
    }
}

/// Every value in this one that has no others in it, with its path; a list of plain values is one.
fn members<'a>(value: &'a Value, path: &str, found: &mut Vec<(String, &'a Value)>) {
    match value {
        Value::Object(members) if !members.is_empty() => {
            for (name, value) in members {
                let dot = if path.is_empty() { "" } else { "." };
                self::members(value, &format!("{path}{dot}{name}"), found);
            }
        }
        Value::Array(entries) if entries.iter().any(|e| e.is_object() || e.is_array()) => {
            for (at, value) in entries.iter().enumerate() {
                self::members(value, &format!("{path}[{at}]"), found);
            }
        }
        plain => found.push((path.to_owned(), plain)),
    }
}

/// To standard output, where a reader that left (`| head`) is no failure.
fn print(text: &str) -> anyhow::Result<()> {
    show_line(text).map(drop)
}

/// [`print`]; whether somebody still reads.
fn show_line(text: &str) -> anyhow::Result<bool> {
    let end = if text.ends_with('\n') { "" } else { "\n" };
    write_whole(format!("{text}{end}").as_bytes())
}

fn write_out(bytes: &[u8]) -> anyhow::Result<()> {
    write_whole(bytes).map(drop)
}

fn write_whole(bytes: &[u8]) -> anyhow::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        done => done
            .map(|()| true)
            .context("can't write to standard output"),
    }
}

/// What went wrong, to standard error; whether anybody reads that or not.
pub fn complain(error: &anyhow::Error) {
    let screen = Screen::stderr();
    let next = match tls_error(error.as_ref()) {
        Some(error) => format!("\ntry: {}", explain(error, CA_FILE)),
        None => String::new(),
    };
    note(&format!(
        "{} {error:#}{next}",
        screen.paint(screen::BAD, "error:")
    ));
}

const CA_FILE: &str = "--ca-file (or WEIR_CA_FILE)";

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

/// A member that is a moment, to the second.
fn moment(value: &Value, member: &str) -> String {
    let text = text(value, member);
    match text.parse::<Timestamp>() {
        Ok(at) => seconds(at).to_string(),
        Err(_) => text,
    }
}

/// How long ago, in one unit or two.
fn ago(now: Timestamp, then: Timestamp) -> String {
    let seconds = now.duration_since(then).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

fn seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
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
    fn every_member_has_its_path() {
        let value = serde_json::json!({
            "a": {"b": 1, "c": ["x", "y"]}, "d": [{"e": null}, {"e": true}], "f": {},
        });
        let mut found = Vec::new();
        members(&value, "", &mut found);
        let shown: Vec<String> = found.iter().map(|(p, v)| format!("{p}={v}")).collect();
        assert_eq!(
            shown,
            [
                "a.b=1",
                "a.c=[\"x\",\"y\"]",
                "d[0].e=null",
                "d[1].e=true",
                "f={}"
            ]
        );
    }

    #[test]
    fn spans_are_short() {
        let then = Timestamp::UNIX_EPOCH;
        let ago = |seconds| ago(Timestamp::from_second(seconds).unwrap(), then);
        assert_eq!(
            [0, 59, 61, 3600, 90_000].map(ago),
            ["0s", "59s", "1m01s", "1h00m", "1d01h"]
        );
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
            ca_file: None,
            output: Output::Table,
        };
        let key = || common.key().unwrap();
        assert_eq!(key(), ("weir_flag".into(), "--key".into()));
        common.key = None;
        if std::env::var_os("WEIR_ADMIN_KEY").is_none() {
            let (key, from) = common.key().unwrap();
            assert_eq!(key, "weir_file");
            assert!(from.ends_with("admin.key"), "{from}");
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

    #[test]
    fn every_shell_gets_every_command() {
        for (shell, part) in [
            (Shell::Bash, "complete -F _weir"),
            (Shell::Zsh, "#compdef weir"),
            (Shell::Fish, "complete -c weir"),
        ] {
            let script = String::from_utf8(completions(shell)).unwrap();
            for part in [part, "status", "no-wait", "dry-run"] {
                assert!(script.contains(part), "{shell:?}: {part}");
            }
        }
    }
}
