use std::path::Path;

use clap::Parser;

use super::*;
use crate::client::fake::FakeWeir;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    replay: ReplayArgs,
}

/// The name says nothing of the format.
fn args(fake: &FakeWeir, directory: &Path, trace: &str) -> ReplayArgs {
    let file = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    std::fs::write(file("trace.txt"), trace).unwrap();
    let (trace, json, svg) = (file("trace.txt"), file("summary.json"), file("plot.svg"));
    let flags = ["replay", &trace, "--speed", "20", "--json", &json, "--svg"];
    let target = [
        &svg,
        "--url",
        &fake.url,
        "--admin-url",
        &fake.url,
        "--key",
        "secret",
    ];
    let flags = flags.into_iter().chain(target);
    Cli::try_parse_from(flags).unwrap().replay
}

fn written(directory: &Path) -> serde_json::Value {
    let summary = std::fs::read(directory.join("summary.json")).unwrap();
    serde_json::from_slice(&summary).unwrap()
}

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2023-11-16 18:15:46.6805900,400,40\n\
    2023-11-16 18:15:50.6805900,0,10\n\
    2023-11-16 18:15:48.6805900,100,0\n";

const MOONCAKE: &str = r#"{"timestamp": 0, "input_length": 400, "output_length": 40, "hash_ids": [0]}
{"timestamp": 2000, "input_length": 100, "output_length": 0, "hash_ids": [0, 1]}
"#;

#[tokio::test]
async fn a_replay_asks_for_what_it_needs_and_cleans_up() {
    let fake = FakeWeir::start(200).await;
    let directory = tempfile::tempdir().unwrap();
    replay(args(&fake, directory.path(), AZURE)).await.unwrap();

    let created = fake.body_of("POST /v2/nvcf/functions");
    assert_eq!(created["process"]["command"][1], "sample-function");
    assert_eq!(created["process"]["command"][3], "500");
    let deployed = fake.body_of("POST /v2/nvcf/deployments/functions/f/versions/v");
    assert_eq!(deployed["deploymentSpecifications"][0]["maxInstances"], 8);
    assert_eq!(deployed["autoscaling"]["stableWindow"], "PT3S");
    assert_eq!(deployed["autoscaling"]["panicWindow"], "PT0.3S");
    assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 1);
    assert_eq!(fake.calls("POST /infer"), 3);

    let summary = written(directory.path());
    assert_eq!(summary["answered"]["200"], 3);
    assert_eq!(summary["instancesStarted"], 1);
    assert_eq!(summary["coldStarts"], 1);
    assert!(summary["instanceSeconds"].as_f64().unwrap() > 0.0);
    assert!(summary["leastInstanceSeconds"].as_f64().unwrap() > 0.5);
    assert_eq!(summary["samplesMissed"], 0);
    let looks = summary["instances"].as_array().unwrap().len();
    assert_eq!(summary["queue"].as_array().unwrap().len(), looks);
    let buckets = summary["buckets"].as_array().unwrap();
    let arrivals = buckets.iter().filter_map(|b| b["arrivals"].as_u64());
    assert_eq!(arrivals.sum::<u64>(), 3);

    let plot = std::fs::read_to_string(directory.path().join("plot.svg")).unwrap();
    let plot = roxmltree::Document::parse(&plot).unwrap();
    assert!(plot.root_element().has_tag_name("svg"));
}

#[tokio::test]
async fn a_trace_of_the_other_format_is_replayed_too() {
    let fake = FakeWeir::start(200).await;
    let directory = tempfile::tempdir().unwrap();
    replay(args(&fake, directory.path(), MOONCAKE))
        .await
        .unwrap();
    assert_eq!(fake.calls("POST /infer"), 2);
    assert_eq!(written(directory.path())["format"], "mooncake");
}

#[tokio::test]
async fn what_is_no_trace_is_refused_before_anything_is_made() {
    let fake = FakeWeir::start(200).await;
    let directory = tempfile::tempdir().unwrap();
    let bad = format!("{MOONCAKE}{{}}\n");
    let error = replay(args(&fake, directory.path(), &bad))
        .await
        .unwrap_err();
    let error = format!("{error:#}");
    assert!(
        error.contains("trace.txt: line 3, column 2: missing"),
        "{error}"
    );
    assert_eq!(fake.calls("POST /v2/nvcf/functions"), 0);
}

#[tokio::test]
async fn a_replay_with_failed_requests_fails_and_cleans_up() {
    let fake = FakeWeir::start(503).await;
    let directory = tempfile::tempdir().unwrap();
    let error = replay(args(&fake, directory.path(), AZURE))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("3 of 3"), "{error}");
    assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 1);
    let summary = written(directory.path());
    assert_eq!(summary["answered"]["503 no-capacity"], 3);
}

#[tokio::test]
async fn a_replay_whose_instances_stay_fails() {
    let fake = FakeWeir::start(200).await;
    fake.state().stays = true;
    let directory = tempfile::tempdir().unwrap();
    let mut args = args(&fake, directory.path(), AZURE);
    args.settle = Some(Duration::ZERO);
    let error = replay(args.clone()).await.unwrap_err().to_string();
    assert!(
        error.contains("not back to the minimum: 1 instances"),
        "{error}"
    );
    assert_eq!(written(directory.path())["answered"]["200"], 3);
    assert_eq!(fake.calls("DELETE /v2/nvcf/functions/f/versions/v"), 1);

    args.min_instances = 1;
    replay(args).await.unwrap();
}

#[tokio::test]
async fn a_replay_above_its_ratio_fails() {
    let fake = FakeWeir::start(200).await;
    let directory = tempfile::tempdir().unwrap();
    let mut args = args(&fake, directory.path(), AZURE);
    args.max_ratio = Some(0.001);
    let error = replay(args.clone()).await.unwrap_err().to_string();
    assert!(error.contains("above 0.001"), "{error}");
    assert!(written(directory.path())["ratio"].as_f64().unwrap() > 0.001);
    args.max_ratio = Some(1000.0);
    replay(args).await.unwrap();
}

#[tokio::test]
async fn a_file_that_cannot_be_written_is_told_before_anything_is_made() {
    let fake = FakeWeir::start(200).await;
    let directory = tempfile::tempdir().unwrap();
    let mut args = args(&fake, directory.path(), AZURE);
    args.svg = Some("/nowhere/plot.svg".into());
    let error = format!("{:#}", replay(args).await.unwrap_err());
    assert!(error.contains("/nowhere/plot.svg"), "{error}");
    assert_eq!(fake.calls("POST /v2/nvcf/functions"), 0);
}

#[tokio::test]
async fn a_wrong_key_is_told_as_such() {
    let fake = FakeWeir::start(200).await;
    let directory = tempfile::tempdir().unwrap();
    let mut args = args(&fake, directory.path(), AZURE);
    args.target.key = Some("wrong".into());
    let error = replay(args).await.unwrap_err();
    assert!(format!("{error:#}").contains("401"), "{error:#}");
}

#[test]
fn a_speed_is_a_number_above_0() {
    assert!(speed("0").is_err() && speed("-1").is_err() && speed("inf").is_err());
    assert_eq!(speed("0.5"), Ok(0.5));
}
