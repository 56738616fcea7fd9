//! The one binary: reads the command line and runs the command.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

use tracing_subscriber::EnvFilter;
use weir_proxy::{
    args::{self, Command},
    cli, serve,
};

fn main() -> ExitCode {
    let args = args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("WEIR_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(|| Unfailing(std::io::stderr()))
        .log_internal_errors(false)
        .init();
    let outcome = match args.command {
        Command::Serve(args) => serve::serve(&args),
        Command::Client(command) => on_a_runtime(cli::run(command)),
        Command::SampleFunction(args) => on_a_runtime(async {
            weir_bench::sample::serve(args)
                .await
                .map(|()| ExitCode::SUCCESS)
        }),
        Command::Bench(bench) => {
            on_a_runtime(async { weir_bench::run(bench).await.map(|()| ExitCode::SUCCESS) })
        }
    };
    outcome.unwrap_or_else(|error| {
        cli::complain(&error);
        ExitCode::FAILURE
    })
}

/// A log that can't be written, since its reader is gone or its disk is full, is no reason to stop serving.
struct Unfailing<W>(W);

impl<W: Write> Write for Unfailing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        _ = self.0.flush();
        Ok(())
    }
}

fn on_a_runtime(
    command: impl Future<Output = anyhow::Result<ExitCode>>,
) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(command)
}
