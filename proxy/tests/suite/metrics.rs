//! What Prometheus reads.

use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;
use uuid::Uuid;

use crate::support::{Function, SOON, Server, answered, eventually, kill, pid, refused};

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
