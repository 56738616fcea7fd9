//! The commands that talk to a server, as people and scripts run them.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcgetattr, tcsetwinsize},
};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::support::{Server, WEIR, text};

/// A command line, and what became of it.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code().expect("an exit code, not a signal"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{}", self.err);
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}", self.out))
    }

    /// Asserts that it failed, saying all of this.
    pub(crate) fn failed(&self, parts: &[&str]) {
        assert_eq!(self.code, 1, "{}{}", self.out, self.err);
        for part in parts {
            assert!(self.err.contains(part), "{part:?} in: {}", self.err);
        }
    }
}

pub(crate) fn command(words: &[&str]) -> Command {
    let mut command = Command::new(WEIR);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WEIR_") {
            command.env_remove(name);
        }
    }
    command.args(words).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs it against the server, with the key that is in its directory.
async fn weir(server: &Server, words: &[&str]) -> Ran {
    let mut command = command(words);
    command
        .env("WEIR_ADMIN_URL", format!("http://{}", server.admin))
        .env("WEIR_URL", format!("http://{}", server.data))
        .env("WEIR_DATA_DIR", server.directory());
    Ran::of(command.output().await.unwrap())
}

/// A file for apply.
fn file(directory: &Path, functions: &Value) -> PathBuf {
    let path = directory.join("functions.json");
    let body = json!({"functions": functions});
    fs::write(&path, serde_json::to_string_pretty(&body).unwrap()).unwrap();
    path
}

/// An entry of such a file whose instances are the sample function.
fn entry(name: &str, more: &[&str], deployment: Value) -> Value {
    let command: Vec<&str> = [WEIR, "sample-function"]
        .iter()
        .chain(more)
        .copied()
        .collect();
    json!({
        "name": name, "inferenceUrl": "/infer", "process": {"command": command},
        "deployment": deployment,
    })
}

/// Functions and versions as the server lists them.
async fn listed(server: &Server) -> Value {
    let mut all = server.get("/v2/nvcf/functions").await["functions"].take();
    for function in all.as_array_mut().unwrap() {
        function["status"].take();
    }
    all
}

#[tokio::test]
async fn every_command_prints_the_servers_answer_as_json() {
    let server = Server::start();
    let run = async |words: &[&str]| {
        let words = [words, &["--output", "json"]].concat();
        weir(&server, &words).await.json()
    };
    // Flags of a command that has a program behind `--` come before it.
    let made = weir(
        &server,
        &[
            "function",
            "create",
            "f",
            "--output",
            "json",
            "--",
            WEIR,
            "sample-function",
        ],
    );
    let made = made.await.json();
    let id = text(&made["function"]["id"]);
    let version = text(&made["function"]["versionId"]);

    let answer = run(&["deploy", "create", "f", "--min", "1"]).await;
    assert_eq!(
        answer["deployment"]["functionStatus"], "ACTIVE",
        "it waited"
    );
    let answer = run(&["deploy", "update", &id[..8], "--max", "3"]).await;
    let spec = &answer["deployment"]["deploymentSpecifications"][0];
    assert_eq!(
        (&spec["minInstances"], &spec["maxInstances"]),
        (&json!(1), &json!(3))
    );
    let answer = run(&["deploy", "get", "f", "--version", &version[..8]]).await;
    assert_eq!(
        answer,
        server
            .get(&format!(
                "/v2/nvcf/deployments/functions/{id}/versions/{version}"
            ))
            .await
    );

    assert_eq!(run(&["function", "list"]).await["functions"][0]["id"], id);
    assert_eq!(
        run(&["function", "get", "f"]).await["functions"][0]["versionId"],
        version
    );
    assert_eq!(run(&["key", "list"]).await["keys"][0]["admin"], true);
    let key = run(&["key", "create", "ci"]).await;
    let key = text(&key["key"]["id"]);
    run(&["key", "revoke", &key[..13]]).await;
    assert!(run(&["gpu"]).await["nodes"].is_array());

    let status = run(&["status"]).await;
    let shown = &status["versions"][0];
    assert_eq!(shown["functionVersionId"], version);
    assert_eq!(
        (&shown["slots"], &shown["busySlots"], &shown["queueDepth"]),
        (&json!(1), &json!(0), &json!(0))
    );
    assert_eq!(shown["instances"], json!({"ready": 1}));
    assert_eq!(shown["lastDecision"]["desired"], 1);
    assert_eq!(
        status["instances"],
        server.get("/v2/weir/instances").await["instances"]
    );
    let gone = run(&["function", "delete", "f"]).await;
    assert_eq!(gone["deleted"][0]["functionVersionId"], version);
}

#[tokio::test]
async fn tables_in_a_pipe_are_whole_and_without_colours() {
    let server = Server::start();
    let name = "a-name-that-goes-on-".repeat(5);
    let made = weir(
        &server,
        &["function", "create", &name, "--", WEIR, "sample-function"],
    )
    .await;
    assert_eq!(made.code, 0, "{}", made.err);
    let list = weir(&server, &["function", "list"]).await.out;
    let head: Vec<&str> = list.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        head,
        ["FUNCTION", "VERSION", "NAME", "STATUS", "RUNS", "CREATED"]
    );
    assert!(list.contains(&name));

    let status = weir(&server, &["status"]).await.out;
    let head: Vec<&str> = status.lines().nth(2).unwrap().split_whitespace().collect();
    assert_eq!(
        head,
        [
            "FUNCTION",
            "VERSION",
            "STATE",
            "INSTANCES",
            "SLOTS",
            "QUEUE",
            "DECISION"
        ]
    );
    assert!(status.contains(&name) && status.contains("INACTIVE"));
    assert!(!format!("{list}{status}").contains('\u{1b}'));
}

#[tokio::test]
async fn a_deployment_that_fails_says_why_with_the_last_lines() {
    let server = Server::start();
    let create = [
        "function",
        "create",
        "broken",
        "--",
        WEIR,
        "sample-function",
        "--fail-start",
    ];
    assert_eq!(weir(&server, &create).await.code, 0);
    let ran = weir(&server, &["deploy", "create", "broken", "--min", "1"]).await;
    ran.failed(&[
        "broken: DEPLOYING, 0 of 1 instance ready",
        "broken is in ERROR: exited with status 1",
        "the last lines of instance ",
        "  | error: --fail-start: not starting, as told",
        "try: `weir logs ",
    ]);
    assert_eq!(ran.out, "");
    let (_, rest) = ran.err.split_once("the last lines of instance ").unwrap();
    let logs = weir(&server, &["logs", &rest[..8], "--tail", "1"]).await;
    assert_eq!(
        logs.out, "error: --fail-start: not starting, as told\n",
        "{}",
        logs.err
    );
    let nobody = weir(&server, &["logs", "00000000"]).await;
    nobody.failed(&[
        "no instance has an ID that begins with 00000000",
        "--instances",
    ]);

    let again = weir(&server, &["deploy", "create", "broken"]).await;
    again.failed(&["deployed already, and ERROR", "`weir deploy update "]);
    let status = weir(&server, &["status", "broken"]).await;
    assert_eq!(status.code, 0);
    for part in [
        "1 ERROR",
        "Instances",
        "Decisions",
        "Recent errors",
        "--fail-start: not starting",
    ] {
        assert!(status.out.contains(part), "{part}: {}", status.out);
    }
}

#[tokio::test]
async fn a_wait_ends_at_its_limit_or_is_not_begun() {
    let server = Server::start();
    // It never becomes ready while this test lasts.
    let create = [
        "function",
        "create",
        "slow",
        "--",
        WEIR,
        "sample-function",
        "--start-delay-ms",
        "3600000",
    ];
    assert_eq!(weir(&server, &create).await.code, 0);
    let ran = weir(
        &server,
        &["deploy", "create", "slow", "--min", "1", "--no-wait"],
    )
    .await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(ran.out.contains("DEPLOYING"), "{}", ran.out);

    let update = [
        "deploy",
        "update",
        "slow",
        "--max",
        "2",
        "--timeout",
        "PT0.2S",
    ];
    weir(&server, &update).await.failed(&[
        "is DEPLOYING after PT0.2S, and not yet ACTIVE: 0 of 1 instance ready",
        "waits for GET /v2/health/ready to answer 200",
        "--timeout waits longer",
    ]);
}

#[tokio::test]
async fn an_apply_is_shown_done_and_counted() {
    let server = Server::start();
    let directory = tempfile::tempdir().unwrap();
    let apply = async |functions: Value, more: &[&str]| {
        let path = file(directory.path(), &functions);
        let words = [&["apply", "-f", path.to_str().unwrap()], more].concat();
        weir(&server, &words).await
    };
    let (a, b) = (
        entry("a", &[], json!({"minInstances": 1})),
        entry("b", &[], json!({})),
    );

    let dry = apply(json!([a, b]), &["--dry-run"]).await;
    assert_eq!(dry.code, 0, "{}", dry.err);
    assert!(dry.out.starts_with("+ a: a new function\n"), "{}", dry.out);
    assert!(
        dry.out
            .contains("    + deployment.deploymentSpecifications[0].minInstances: 1\n")
    );
    assert!(
        dry.out
            .ends_with("it would be: 2 created, 0 updated, 0 unchanged, 0 deleted\n")
    );
    assert_eq!(listed(&server).await, json!([]), "nothing was made");

    let done = apply(json!([a, b]), &[]).await;
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(
        done.out
            .ends_with("\n2 created, 0 updated, 0 unchanged, 0 deleted\n"),
        "{}",
        done.out
    );

    let before = listed(&server).await;
    let changed = entry(
        "a",
        &["--fail-ratio", "0"],
        json!({"minInstances": 1, "queue": {"maxRequests": 7}}),
    );
    let dry = apply(json!([changed]), &["--dry-run", "--prune"]).await;
    for line in [
        "~ a: a new version",
        "    ~ deployment.queue.maxRequests: 1000 -> 7",
        "    ~ process.command: [",
        "- b: not in the file",
        "it would be: 0 created, 1 updated, 0 unchanged, 1 deleted",
    ] {
        assert!(dry.out.contains(line), "{line}: {}", dry.out);
    }
    let fields = dry.out.lines().filter(|line| line.starts_with("    ~"));
    assert_eq!(fields.count(), 2, "and nothing else differs: {}", dry.out);
    let json = apply(json!([changed]), &["--dry-run", "--output", "json"])
        .await
        .json();
    let fields = json["functions"][0]["changes"].as_array().unwrap();
    let queue = json!({"field": "deployment.queue.maxRequests", "before": 1000, "after": 7});
    assert!(fields.contains(&queue), "{json}");
    assert_eq!(listed(&server).await, before, "nothing was changed");

    let done = apply(json!([changed]), &["--prune", "--output", "json"])
        .await
        .json();
    let summary = json!({"created": 0, "updated": 1, "unchanged": 0, "deleted": 1, "failed": 0});
    assert_eq!(done["summary"], summary);
    let done = apply(json!([changed]), &[]).await;
    assert!(
        done.out
            .ends_with("0 created, 0 updated, 1 unchanged, 0 deleted\n"),
        "{}",
        done.out
    );
}

/// Applies this one function and nothing else.
async fn apply_one(server: &Server, entry: &Value, more: &[&str]) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    let mut entry = entry.clone();
    entry["process"]["workingDir"] = json!("/");
    let path = file(directory.path(), &json!([entry]));
    let words = [&["apply", "-f", path.to_str().unwrap()], more].concat();
    weir(server, &words).await
}

/// The versions there are: their IDs and states.
async fn versions(server: &Server) -> Vec<(String, String)> {
    let all = server.get("/v2/nvcf/functions").await;
    let all = all["functions"].as_array().unwrap();
    all.iter()
        .map(|version| (text(&version["versionId"]), text(&version["status"])))
        .collect()
}

/// What `weir deploy get` shows.
async fn deployment(server: &Server, name: &str) -> Value {
    let words = ["deploy", "get", name, "--output", "json"];
    weir(server, &words).await.json()["deployment"].take()
}

#[tokio::test]
async fn a_change_is_applied_where_the_old_version_has_the_only_gpu() {
    let server = Server::with(&["--gpus", "H100:1"]);
    let deployment = |max: u32| json!({"gpu": "H100", "instanceType": "H100_1x", "minInstances": 1, "maxInstances": max});
    let first = entry("one", &[], deployment(1));
    assert_eq!(apply_one(&server, &first, &[]).await.code, 0);
    let before = versions(&server).await;

    let more = entry("one", &[], deployment(2));
    let ran = apply_one(&server, &more, &[]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.out.starts_with("one: deployment changed\n"),
        "{}",
        ran.out
    );
    assert_eq!(versions(&server).await, before, "no new version");
    let now = self::deployment(&server, "one").await;
    assert_eq!(now["deploymentSpecifications"][0]["maxInstances"], 2);

    let changed = entry("one", &["--fail-ratio", "0"], deployment(2));
    let ran = apply_one(&server, &changed, &[]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    for part in [
        "no free GPU of type H100",
        &before[0].0,
        "is undeployed first",
    ] {
        assert!(ran.err.contains(part), "{part:?} in {}", ran.err);
    }
    let after = versions(&server).await;
    assert_eq!(after.len(), 1, "the old one is gone");
    assert_eq!(after[0].1, "ACTIVE");
    assert_ne!(after[0].0, before[0].0);

    // One that fails where it has made the old one go brings it back.
    let broken = entry("one", &["--fail-start"], deployment(2));
    let ran = apply_one(&server, &broken, &[]).await;
    ran.failed(&[
        "is in ERROR: exited with status 1",
        "is deleted again; --keep-failed keeps it",
        &format!("version {} is deployed again as it was", after[0].0),
    ]);
    assert_eq!(versions(&server).await, after);
    let now = self::deployment(&server, "one").await;
    assert_eq!(now["deploymentSpecifications"][0]["maxInstances"], 2);
}

#[tokio::test]
async fn a_version_that_failed_is_not_left_behind() {
    let server = Server::start();
    let good = entry("one", &[], json!({"minInstances": 1}));
    let broken = entry("one", &["--fail-start"], json!({"minInstances": 1}));
    let again = [
        "is deleted again; --keep-failed keeps it",
        "| error: --fail-start",
    ];
    apply_one(&server, &broken, &[]).await.failed(&again);
    assert_eq!(versions(&server).await, [], "nor is its function");

    assert_eq!(apply_one(&server, &good, &[]).await.code, 0);
    let before = versions(&server).await;
    apply_one(&server, &broken, &[]).await.failed(&again);
    assert_eq!(versions(&server).await, before, "and the old one serves");

    let ran = apply_one(&server, &broken, &["--keep-failed"]).await;
    ran.failed(&["is in ERROR"]);
    assert!(!ran.err.contains("deleted"), "{}", ran.err);
    let kept = versions(&server).await;
    assert_eq!(kept.len(), 2);
    assert!(kept.contains(&before[0]), "{kept:?}");

    // What the file says again is there already; the other goes.
    assert_eq!(apply_one(&server, &good, &[]).await.code, 0);
    assert_eq!(versions(&server).await, before);
}

#[tokio::test]
async fn an_apply_undoes_what_was_changed_by_hand() {
    let server = Server::start();
    let said = json!({"maxInstances": 2, "autoscaling": {"idleTimeout": "PT60S"}});
    let one = entry("one", &[], said);
    assert_eq!(apply_one(&server, &one, &[]).await.code, 0);
    let before = (versions(&server).await, deployment(&server, "one").await);

    let update = [
        "deploy",
        "update",
        "one",
        "--queue-max",
        "3",
        "--concurrency",
        "4",
        "--traffic-weight",
        "7",
    ];
    let ran = weir(&server, &update).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    let now = deployment(&server, "one").await;
    assert_eq!(
        (&now["queue"]["maxRequests"], &now["trafficWeight"]),
        (&json!(3), &json!(7))
    );
    let dry = apply_one(&server, &one, &["--dry-run"]).await.out;
    for line in [
        "~ one: its deployment",
        "    ~ deployment.queue.maxRequests: 3 -> 1000",
        "    ~ deployment.deploymentSpecifications[0].maxRequestConcurrency: 4 -> 1",
        "    - deployment.trafficWeight: 7",
    ] {
        assert!(dry.contains(line), "{line}: {dry}");
    }
    let ran = apply_one(&server, &one, &[]).await;
    assert!(
        ran.out.starts_with("one: deployment changed\n"),
        "{}{}",
        ran.out,
        ran.err
    );
    let mut now = deployment(&server, "one").await;
    now["lastUpdatedAt"] = before.1["lastUpdatedAt"].clone();
    assert_eq!((versions(&server).await, now), before);
    let ran = apply_one(&server, &one, &[]).await;
    assert!(ran.out.starts_with("one: unchanged\n"), "{}", ran.out);
}

#[tokio::test]
async fn an_apply_waits_for_what_is_not_active_yet() {
    let server = Server::start();
    // It never becomes ready while this test lasts.
    let slow = entry(
        "slow",
        &["--start-delay-ms", "3600000"],
        json!({"minInstances": 1}),
    );
    let ran = apply_one(&server, &slow, &["--no-wait"]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    let dry = apply_one(&server, &slow, &["--dry-run"]).await.out;
    assert!(
        dry.starts_with("= slow: unchanged, and DEPLOYING: waited for\n"),
        "{dry}"
    );
    let ran = apply_one(&server, &slow, &["--timeout", "PT0.2S"]).await;
    ran.failed(&["is DEPLOYING after PT0.2S, and not yet ACTIVE"]);
    assert_eq!(versions(&server).await.len(), 1, "it may come yet");
}

#[tokio::test]
async fn updates_at_once_are_all_kept() {
    let server = Server::start();
    let create = ["function", "create", "one", "--", WEIR, "sample-function"];
    assert_eq!(weir(&server, &create).await.code, 0);
    let create = [
        "deploy",
        "create",
        "one",
        "--max",
        "9",
        "--traffic-weight",
        "5",
    ];
    assert_eq!(weir(&server, &create).await.code, 0);

    let changes = [
        ["--max", "5"],
        ["--concurrency", "3"],
        ["--queue-max", "7"],
        ["--idle-timeout", "PT9S"],
        ["--busy-timeout", "PT8S"],
        ["--traffic-weight", "none"],
    ];
    let updates = changes.map(|change| {
        let server = &server;
        async move {
            let words = [&["deploy", "update", "one", "--no-wait"], &change[..]].concat();
            weir(server, &words).await
        }
    });
    for ran in futures_util::future::join_all(updates).await {
        assert_eq!(ran.code, 0, "{}", ran.err);
    }
    let now = deployment(&server, "one").await;
    let spec = &now["deploymentSpecifications"][0];
    assert_eq!(
        json!([
            spec["minInstances"],
            spec["maxInstances"],
            spec["maxRequestConcurrency"],
            now["queue"]["maxRequests"],
            now["queue"]["busyTimeout"],
            now["autoscaling"]["idleTimeout"],
            now["trafficWeight"],
        ]),
        json!([0, 5, 3, 7, "PT8S", "PT9S", null])
    );

    let wrong = weir(&server, &["deploy", "update", "one", "--min", "6"]).await;
    wrong.failed(&["minInstances: 6 is more than maxInstances, 5"]);
    let version = &versions(&server).await[0].0;
    let function = text(&now["functionId"]);
    let path = format!("/v2/nvcf/deployments/functions/{function}/versions/{version}");
    let nothing = json!({"deploymentSpecifications": [{}]});
    let answer = server.api(reqwest::Method::PUT, &path).json(&nothing);
    let answer: Value = answer.send().await.unwrap().json().await.unwrap();
    let mut same = answer["deployment"].clone();
    same["lastUpdatedAt"] = now["lastUpdatedAt"].clone();
    assert_eq!(same, now, "what is left out stays");
}

#[tokio::test]
async fn logs_say_where_they_are_a_part() {
    let server = Server::with(&["--gpus", "H100:1"]);
    let script = format!("seq 1500; exec {WEIR} sample-function");
    let create = ["function", "create", "one", "--", "sh", "-c", &script];
    assert_eq!(weir(&server, &create).await.code, 0);
    let create = ["deploy", "create", "one", "--min", "1"];
    assert_eq!(weir(&server, &create).await.code, 0);
    let all = server.get("/v2/weir/instances").await;
    let instance = text(&all["instances"][0]["id"]);
    // It is ready, and what it wrote before may be on its way.
    let whole = loop {
        let whole = weir(&server, &["logs", &instance, "--tail", "2000"]).await;
        if whole.out.contains("\n1500\n") {
            break whole;
        }
    };
    assert_eq!(whole.err, "");
    let part = weir(&server, &["logs", &instance]).await;
    assert_eq!(part.out.lines().count(), 1000);
    assert!(whole.out.ends_with(&part.out), "{}", part.out);
    assert_eq!(
        part.err,
        "these are the last 1000 lines: --tail N shows more of them\n"
    );

    let gpus = weir(&server, &["gpu"]).await.out;
    let rows: Vec<Vec<&str>> = gpus
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(rows[0], ["NODE", "GPU", "NAME"]);
    assert_eq!(rows[1][1..], ["0", "H100"]);
}

#[tokio::test]
async fn a_file_that_is_wrong_is_told_where() {
    let server = Server::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("f.yaml");
    for (text, parts) in [
        ("functions: [", &["f.yaml:1:"][..]),
        (
            "functions:\n- name: a\n  deployment:\n    startTimeout: 5m",
            &[
                "f.yaml:4:19: functions[0].deployment.startTimeout: '5m' is not an ISO 8601 duration: write PT5M",
            ],
        ),
        (
            "functions:\n- name: a\n  deployment: {minInstance: 1}",
            &[
                "f.yaml:3:29: functions[0].deployment.minInstance: ",
                "did you mean minInstances?",
            ],
        ),
        (
            "functions:\n- name: a\n  endpoints: ['http://127.0.0.1:9']\n  tags: mine",
            &["f.yaml:4:9: functions[0].tags: must be a list, not \"mine\""],
        ),
        (
            "functions:\n- name: a\n  process: {command: []}\n  deployment: {}",
            &[
                "f.yaml:3:22: functions[0].process.command: Bad Request (400)",
                "1 of 1 failed",
            ],
        ),
    ] {
        fs::write(&path, text).unwrap();
        let ran = weir(&server, &["apply", "-f", path.to_str().unwrap()]).await;
        ran.failed(parts);
    }
}

#[tokio::test]
async fn errors_say_what_to_do_next() {
    let server = Server::start();
    for name in ["hello", "twin", "twin"] {
        let create = ["function", "create", name, "--", WEIR, "sample-function"];
        assert_eq!(weir(&server, &create).await.code, 0);
    }
    let fails = async |words: &[&str], parts: &[&str]| weir(&server, words).await.failed(parts);
    fails(
        &["deploy", "get", "helo"],
        &["no function is named 'helo'", "did you mean 'hello'?"],
    )
    .await;
    fails(
        &["invoke", "twin"],
        &["2 functions are named 'twin': give an ID", "  INACTIVE"],
    )
    .await;
    fails(
        &["function", "list", "--key", "weir_x"],
        &[
            "(401)",
            "the key came from --key",
            "admin.key in its --data-dir",
        ],
    )
    .await;
    fails(
        &["function", "list", "--data-dir", "/no/such"],
        &["(401)", "no key was found", "/no/such/admin.key"],
    )
    .await;
    let (_, secret) = server.new_key(&["list_functions"]).await;
    fails(
        &["deploy", "create", "hello", "--key", &secret],
        &[
            "(403)",
            "lacks the scope deploy_function",
            "--scope deploy_function`",
        ],
    )
    .await;
    let version = text(
        &weir(&server, &["function", "get", "hello", "--output", "json"])
            .await
            .json()["functions"][0]["versionId"],
    );
    fails(
        &["deploy", "get", &version],
        &["is a version of 'hello', not a function", "--version"],
    )
    .await;
    let nobody = "00000000-0000-4000-8000-000000000000";
    fails(
        &["deploy", "get", nobody],
        &["(404)", "`weir function list` shows"],
    )
    .await;
    fails(
        &["status", "--admin-url", "http://127.0.0.1:1"],
        &[
            "can't connect to the admin address http://127.0.0.1:1",
            "start a server with `weir serve`",
            "--admin-url",
        ],
    )
    .await;

    let wrong = weir(&server, &["deploy", "create", "hello", "--timeout", "90s"]).await;
    assert_eq!(wrong.code, 2, "as clap has it");
    assert!(
        wrong
            .err
            .contains("'90s' is not an ISO 8601 duration: write PT1M30S"),
        "{}",
        wrong.err
    );
}

#[tokio::test]
async fn a_watch_in_a_pipe_prints_until_its_reader_leaves() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let server = Server::start();
    let mut child = command(&["status", "--watch", "PT0.1S", "--output", "json"])
        .env("WEIR_ADMIN_URL", format!("http://{}", server.admin))
        .env("WEIR_DATA_DIR", server.directory())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let line = lines.next_line().await.unwrap().unwrap();
        let document: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(document["versions"], json!([]));
    }
    drop(lines);
    assert!(child.wait().await.unwrap().success());
}

/// A terminal of 80 columns: what a person types into and sees, and the end for a program.
fn terminal() -> (File, File) {
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let name = ptsname(&person, Vec::new()).unwrap();
    let program = OpenOptions::new()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let size = Winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&program, size).unwrap();
    (File::from(person), program)
}

/// Runs it on a terminal, types this as soon as it shows `cue`, and returns everything it wrote.
async fn on_a_terminal(
    server: &Server,
    words: &[&str],
    no_color: bool,
    cue: &str,
    keys: &str,
) -> String {
    let (mut person, program) = terminal();
    let before = format!("{:?}", tcgetattr(&program).unwrap());
    let mut command = command(words);
    command
        .env("WEIR_ADMIN_URL", format!("http://{}", server.admin))
        .env("WEIR_DATA_DIR", server.directory())
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .stdin(program.try_clone().unwrap())
        .stdout(program.try_clone().unwrap())
        .stderr(program.try_clone().unwrap());
    if no_color {
        command.env("NO_COLOR", "1");
    }
    let mut child = command.spawn().unwrap();
    drop(command);
    let (cue, keys) = (cue.to_owned(), keys.to_owned());
    let seen = tokio::task::spawn_blocking(move || {
        let (mut seen, mut typed) = (String::new(), false);
        let mut bytes = [0; 4096];
        // The end is an error: the program's end of the terminal is closed.
        while let Ok(count @ 1..) = person.read(&mut bytes) {
            seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
            if !typed && seen.contains(&cue) {
                person.write_all(keys.as_bytes()).unwrap();
                typed = true;
            }
        }
        assert!(typed, "no {cue:?} in {seen:?}");
        seen
    });
    assert!(child.wait().await.unwrap().success());
    assert_eq!(
        format!("{:?}", tcgetattr(&program).unwrap()),
        before,
        "left as it was"
    );
    drop(program);
    seen.await.unwrap()
}

#[tokio::test]
async fn a_live_status_gives_the_terminal_back() {
    let server = Server::start();
    let create = ["function", "create", "hello", "--", WEIR, "sample-function"];
    assert_eq!(weir(&server, &create).await.code, 0);
    for (keys, no_color) in [("q", false), ("\u{3}", true)] {
        let seen = on_a_terminal(&server, &["status"], no_color, "q quits", keys).await;
        assert!(seen.starts_with("\u{1b}[?1049h\u{1b}[?25l"), "{seen:?}");
        assert!(seen.ends_with("\u{1b}[?25h\u{1b}[?1049l"), "{seen:?}");
        assert!(
            seen.contains("hello") && seen.contains("INACTIVE"),
            "{seen:?}"
        );
        let coloured = seen.contains("\u{1b}[1mFUNCTION\u{1b}[0m");
        assert_eq!(coloured, !no_color, "{seen:?}");
    }
    let list = on_a_terminal(&server, &["function", "list"], true, "hello", "").await;
    let widest = list.lines().map(|line| line.chars().count()).max();
    assert!(widest.unwrap() <= 80 && !list.contains('\u{1b}'), "{list}");
}
