use clap::Parser;

use super::*;
use crate::client::fake::FakeWeir;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    replay: ReplayArgs,
}

fn args(fake: &FakeWeir, directory: &Path) -> ReplayArgs {
    let trace = directory.join("trace.csv");
    std::fs::write(&trace, TRACE).unwrap();
    let json = directory.join("summary.json");
    let flags = ["replay", trace.to_str().unwrap(), "--speed", "20", "--json"];
    let flags = flags.into_iter().chain([json.to_str().unwrap()]);
    let target = ["--url", &fake.url, "--admin", &fake.url, "--key", "secret"];
    Cli::try_parse_from(flags.chain(target)).unwrap().replay
}

#[tokio::test]
async fn a_replay_asks_for_what_it_needs_and_cleans_up() {
    let fake = FakeWeir::start(200).await;
    let directory = tempfile::tempdir().unwrap();
    replay(args(&fake, directory.path())).await.unwrap();

    let created = fake.body_of("POST /v2/nvcf/functions");
    assert_eq!(created["process"]["command"][1], "sample-function");
    assert_eq!(created["process"]["command"][3], "500");
    let deployed = fake.body_of("POST /v2/nvcf/deployments/functions/f/versions/v");
    assert_eq!(deployed["deploymentSpecifications"][0]["maxInstances"], 8);
    assert_eq!(deployed["autoscaling"]["stableWindow"], "PT3S");
    assert_eq!(deployed["autoscaling"]["panicWindow"], "PT0.3S");
    assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 1);
    assert_eq!(fake.calls("POST /infer"), 3);

    let summary = std::fs::read(directory.path().join("summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_slice(&summary).unwrap();
    assert_eq!(summary["answered"]["200"], 3);
    assert_eq!(summary["instancesStarted"], 1);
    assert_eq!(summary["coldStarts"], 1);
    assert!(summary["instanceSeconds"].as_f64().unwrap() > 0.0);
    assert!(summary["leastInstanceSeconds"].as_f64().unwrap() > 0.5);
}

#[tokio::test]
async fn a_replay_with_failed_requests_fails_and_cleans_up() {
    let fake = FakeWeir::start(503).await;
    let directory = tempfile::tempdir().unwrap();
    let error = replay(args(&fake, directory.path())).await.unwrap_err();
    assert!(error.to_string().contains("3 of 3"), "{error}");
    assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 1);
    let summary = std::fs::read(directory.path().join("summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_slice(&summary).unwrap();
    assert_eq!(summary["answered"]["503 no-capacity"], 3);
}

#[tokio::test]
async fn a_wrong_key_is_told_as_such() {
    let fake = FakeWeir::start(200).await;
    let directory = tempfile::tempdir().unwrap();
    let mut args = args(&fake, directory.path());
    args.target.key = Some("wrong".into());
    let error = replay(args).await.unwrap_err();
    assert!(format!("{error:#}").contains("401"), "{error:#}");
}

const TRACE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2023-11-16 18:15:46.6805900,400,40\n\
    2023-11-16 18:15:50.6805900,0,10\n\
    2023-11-16 18:15:48.6805900,100,0\n";

#[test]
fn a_trace_becomes_a_plan_at_speed() {
    let plan = plan(TRACE.as_bytes(), 2.0, 0.25, 15.0).unwrap();
    let planned = |at, service, bytes| Planned {
        at: Duration::from_millis(at),
        service: Duration::from_micros(service),
        bytes,
    };
    assert_eq!(
        plan,
        [
            planned(0, 350_000, 160),
            planned(1000, 12_500, 0),
            planned(2000, 75_000, 40)
        ]
    );
}

#[test]
fn a_trace_that_is_none_is_refused() {
    assert!(plan("TIMESTAMP,ContextTokens\n".as_bytes(), 1.0, 1.0, 1.0).is_err());
    assert!(plan("A,B\n1,2\n".as_bytes(), 1.0, 1.0, 1.0).is_err());
    assert!(speed("0").is_err() && speed("-1").is_err() && speed("inf").is_err());
}

fn count(at: f64, starting: usize, ready: usize, draining: usize) -> Count {
    Count {
        at,
        starting,
        ready,
        draining,
        error: 1,
    }
}

#[test]
fn instance_seconds_integrate_what_runs() {
    let counts = [
        count(0.0, 0, 0, 0),
        count(1.0, 1, 0, 0),
        count(3.0, 1, 1, 1),
        count(3.5, 0, 0, 0),
        count(4.0, 0, 1, 0),
        count(5.0, 0, 0, 0),
    ];
    assert_eq!(instance_seconds(&counts), 2.0 + 1.5 + 1.0);
    assert_eq!(cold_starts(&counts), 2);
    assert_eq!(instance_seconds(&[]), 0.0);
}
