//! What Prometheus reads.

use std::{
    collections::HashMap,
    future::IntoFuture,
    sync::atomic::{AtomicU64, Ordering},
};

use futures_util::{StreamExt, stream};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;
use tokio::time::Instant;
use uuid::Uuid;

use crate::support::{Function, SOON, Server, answered, eventually, header, kill, pid, refused};

/// The value of the one series whose name is this and that has all of these labels.
fn value(page: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let mut found = page.lines().filter(|line| {
        let named = line.strip_prefix(name);
        named.is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    let line = found.next()?;
    assert_eq!(found.next(), None, "two series: {name}{labels:?}");
    line.rsplit_once(' ')?.1.parse().ok()
}

async fn call(server: &Server, function: &Function) {
    let response = server.call(Method::POST, function, "/infer").body("{}");
    let response = response.send().await.unwrap();
    answered(&response);
    response.bytes().await.unwrap();
}

#[tokio::test]
async fn a_cold_invocation_shows_in_every_metric_that_it_concerns() {
    let server = Server::start();
    let function = server
        .sample((0, 1, 3), json!({"queue": {"maxRequests": 7}}))
        .await;
    call(&server, &function).await;
    call(&server, &function).await;
    let nobodys = Function {
        id: Uuid::new_v4().to_string(),
        version: Uuid::new_v4().to_string(),
    };
    let missing = server.call(Method::GET, &nobodys, "/").send();
    let missing = missing.await.unwrap();
    refused(&missing, 404, "unknown-function");

    let page = eventually("both answers are counted", SOON, async || {
        let counted = server.codes(&function).await == [("200".to_owned(), 2)];
        counted.then_some(server.metrics().await)
    })
    .await;
    let (of_function, version) = (function.id.as_str(), function.version.as_str());
    let count = |name: &str, labels: &[&str]| value(&page, name, labels);
    for (name, wanted) in [
        ("weir_invocation_duration_seconds_count", 2.0),
        ("weir_proxy_overhead_seconds_count", 2.0),
        ("weir_queue_wait_seconds_count", 1.0),
        ("weir_cold_start_seconds_count", 1.0),
        ("weir_instance_start_seconds_count", 1.0),
    ] {
        assert_eq!(count(name, &[of_function]), Some(wanted), "{name}");
    }
    for (name, label, wanted) in [
        ("weir_queue_depth", "", 0.0),
        ("weir_queue_limit", "", 7.0),
        ("weir_slots", "state=\"busy\"", 0.0),
        ("weir_slots", "state=\"free\"", 3.0),
        ("weir_instances", "state=\"ready\"", 1.0),
        ("weir_instances", "state=\"error\"", 0.0),
        ("weir_scale_decisions_total", "reason=\"wake\"", 1.0),
        ("weir_instance_restarts_total", "", 0.0),
        ("weir_cancel_timeouts_total", "", 0.0),
        ("weir_connect_failures_total", "", 0.0),
    ] {
        let labels = [of_function, version, label];
        assert_eq!(count(name, &labels), Some(wanted), "{name} {label}");
    }
    assert_eq!(
        count("weir_refusals_total", &["code=\"unknown-function\""]),
        Some(1.0)
    );
    assert_eq!(count("weir_build_info", &[]), Some(1.0));
    for call in ["get", "list", "commit", "watch"] {
        let labels = [format!("call=\"{call}\"")];
        let labels = labels.each_ref().map(String::as_str);
        assert_eq!(count("weir_store_errors_total", &labels), Some(0.0));
    }
    for name in [
        "weir_connections",
        "weir_store_commit_seconds_count",
        "weir_store_feed_lag_seconds_count",
        "process_open_fds",
        "process_resident_memory_bytes",
    ] {
        assert!(count(name, &[]).is_some_and(|value| value >= 1.0), "{name}");
    }
}

#[tokio::test]
async fn a_restart_is_counted() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let instance = server.ready(&function, 1).await.remove(0);
    kill(pid(&instance), Signal::KILL);
    let labels = [function.id.as_str(), &function.version];
    eventually("the restart and two starts are counted", SOON, async || {
        let page = server.metrics().await;
        let restarts = value(&page, "weir_instance_restarts_total", &labels);
        let starts = value(&page, "weir_instance_start_seconds_count", &labels[..1]);
        (restarts == Some(1.0) && starts == Some(2.0)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_is_gone_is_off_the_page() {
    let server = Server::start();
    let function = server.sample((0, 1, 1), json!({})).await;
    call(&server, &function).await;
    let page = server.metrics().await;
    assert!(page.contains("weir_slots{") && page.contains("weir_invocations_total{"));

    let undeployed = server.api(Method::DELETE, &function.deployment());
    assert!(undeployed.send().await.unwrap().status().is_success());
    eventually("gauges of the deployment go", SOON, async || {
        let page = server.metrics().await;
        let counters = page.contains("weir_invocations_total{");
        assert!(counters, "the version is still there");
        (!page.contains("weir_slots{") && !page.contains("weir_instances{")).then_some(())
    })
    .await;

    let path = format!(
        "/v2/nvcf/functions/{}/versions/{}",
        function.id, function.version
    );
    let deleted = server.api(Method::DELETE, &path).send().await.unwrap();
    assert!(deleted.status().is_success());
    eventually("every series of the function goes", SOON, async || {
        (!server.metrics().await.contains(&function.id)).then_some(())
    })
    .await;
}

/// What a page says, parsed once: it may be long.
struct Page {
    bytes: usize,
    series: usize,
    /// Of the functions that are named on it.
    of: HashMap<String, OfFunction>,
    refusals: u64,
}

#[derive(Default)]
struct OfFunction {
    series: usize,
    /// `weir_invocations_total`, of all versions and codes.
    invocations: u64,
    /// `weir_invocation_duration_seconds_count`.
    durations: u64,
}

impl Page {
    fn of(page: &str) -> Self {
        let mut parsed = Self {
            bytes: page.len(),
            series: 0,
            of: HashMap::new(),
            refusals: 0,
        };
        for line in page.lines() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            parsed.series += 1;
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let value = || value.parse::<u64>().expect("a whole number");
            if series.starts_with("weir_refusals_total{") {
                parsed.refusals += value();
            }
            let Some((_, after)) = series.split_once("function=\"") else {
                continue;
            };
            let id = after.split('"').next().expect("a function's ID");
            let function = parsed.of.entry(id.to_owned()).or_default();
            function.series += 1;
            if series.starts_with("weir_invocations_total{") {
                function.invocations += value();
            } else if series.starts_with("weir_invocation_duration_seconds_count{") {
                function.durations += value();
            }
        }
        parsed
    }
}

/// What an HTTP server on the test's side answers to, whoever asks.
async fn endpoint() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answers = axum::Router::new().fallback(async || "ok");
    tokio::spawn(axum::serve(listener, answers).into_future());
    format!("http://{address}")
}

/// A number that an environment variable may set.
fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

/// The full size: `SUITE_FUNCTIONS=1000 SUITE_CALLS=100`.
#[tokio::test]
async fn many_functions_leave_a_page_that_is_true_and_bounded() {
    const AT_ONCE: usize = 16;
    /// Of one function: five histograms of 15 lines, and some 20 counters and gauges.
    const SERIES: usize = 100;
    const BYTES: usize = 150;

    let functions = setting("SUITE_FUNCTIONS", 100);
    let calls = setting("SUITE_CALLS", 20);
    let server = Server::with(&["--auth", "none"]);
    let endpoint = endpoint().await;
    let begun = Instant::now();

    let made: Vec<Function> = stream::iter(0..functions)
        .map(async |number| {
            let asked = json!({
                "name": format!("function-{number}"),
                "inferenceUrl": "/infer",
                "endpoints": [&endpoint],
                "health": {"protocol": "HTTP", "uri": "/health", "timeout": "PT10S", "expectedStatusCode": 200},
            });
            let function = Function::of(&server.post("/v2/nvcf/functions", &asked).await);
            let deployment = json!({"deploymentSpecifications": [{
                "gpu": "none",
                "instanceType": "none",
                "minInstances": 1,
                "maxInstances": 1,
                "maxRequestConcurrency": 8,
            }]});
            server.post(&function.deployment(), &deployment).await;
            eventually("it is deployed", SOON, async || {
                (server.status(&function).await == "ACTIVE").then_some(())
            })
            .await;
            function
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let deployed = begun.elapsed();

    // Every tenth is deleted when half of the calls were made.
    let goes = |number: usize| number.is_multiple_of(10);
    let refusals = AtomicU64::new(0);
    let round = async |half: std::ops::Range<usize>, alive: &dyn Fn(usize) -> bool| {
        let all = half.flat_map(|_| (0..functions).filter(|number| alive(*number)));
        stream::iter(all.collect::<Vec<_>>())
            .for_each_concurrent(AT_ONCE, async |number| {
                let function = &made[number];
                let response = server.call(Method::POST, function, "/infer").body("{}");
                let response = response.send().await.unwrap();
                match header(&response, "x-weir-error") {
                    None => answered(&response),
                    Some(_) => {
                        assert!(goes(number), "refused, but not deleted: {response:?}");
                        refusals.fetch_add(1, Ordering::Relaxed);
                    }
                }
                response.bytes().await.unwrap();
            })
            .await;
    };
    round(0..calls / 2, &|_| true).await;
    let deletions = stream::iter((0..functions).filter(|number| goes(*number)));
    tokio::join!(
        round(calls / 2..calls, &|_| true),
        deletions.for_each(async |number| {
            let path = made[number].path();
            let answer = server.api(Method::DELETE, &path).send().await.unwrap();
            assert!(answer.status().is_success(), "{}", answer.status());
        })
    );
    let called = begun.elapsed() - deployed;

    let page = eventually("the page says what was done", SOON, async || {
        let page = Page::of(&server.metrics().await);
        let wanted = calls as u64;
        let counted =
            made.iter()
                .enumerate()
                .all(|(number, function)| match page.of.get(&function.id) {
                    None => goes(number),
                    Some(of) => !goes(number) && (of.invocations, of.durations) == (wanted, wanted),
                });
        (counted && page.refusals == refusals.load(Ordering::Relaxed)).then_some(page)
    })
    .await;
    assert_eq!(page.of.len(), functions - functions.div_ceil(10));
    for of in page.of.values() {
        assert!(of.series <= SERIES, "{} series of a function", of.series);
    }
    assert!(
        page.series <= page.of.len() * SERIES + 200,
        "{}",
        page.series
    );
    assert!(page.bytes <= page.series * BYTES + 20_000, "{}", page.bytes);

    let asked = Instant::now();
    server.metrics().await;
    println!(
        "{functions} functions in {deployed:.1?}, {} requests in {called:.1?}, {} of them refused: \
         {} series in {} bytes, made and read in {:.1?}",
        functions * calls,
        page.refusals,
        page.series,
        page.bytes,
        asked.elapsed()
    );
}
