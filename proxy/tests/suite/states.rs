//! A version's state as its instances come and go.

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::support::{SOON, Server, WEIR, answered, eventually, kill, pid, refused, text};

#[tokio::test]
async fn callers_are_told_the_kind_of_a_failure_and_not_what_the_instance_printed() {
    let server = Server::start();
    let command = ["sh", "-c", "echo postgres://admin:hunter2@db; exit 1"];
    let function = server.function(&command, &[]).await;
    // Nothing is waited for: it never is ready.
    let one = json!({"gpu": "none", "minInstances": 0, "maxInstances": 1});
    server
        .post(
            &function.deployment(),
            &json!({"deploymentSpecifications": [one]}),
        )
        .await;
    // The first one waits for the start, the second finds the function in ERROR.
    for code in ["no-capacity", "not-invokable"] {
        let response = server.call(Method::GET, &function, "/").send().await;
        let response = response.unwrap();
        refused(&response, 503, code);
        let detail = text(&response.json::<Value>().await.unwrap()["detail"]);
        assert!(
            detail.contains("its instance failed: exited with status 1")
                && !detail.contains("hunter2"),
            "{detail}"
        );
    }
    let instance = eventually("the failed instance", SOON, async || {
        server.instances(&function, "error").await.pop()
    })
    .await;
    assert_eq!(
        instance["lastLogLine"], "postgres://admin:hunter2@db",
        "{instance}"
    );
}

#[tokio::test]
async fn the_state_follows_what_becomes_of_the_instances() {
    let server = Server::start();
    // Slow enough to start that each state is there to be seen.
    let command = [WEIR, "sample-function", "--start-delay-ms", "1000"];
    let function = server.function(&command, &[]).await;
    assert_eq!(server.status(&function).await, "INACTIVE");
    let call = async || {
        let call = server.call(Method::GET, &function, "/infer");
        call.send().await.unwrap()
    };
    refused(&call().await, 404, "unknown-function");

    let ready = server.deploy(&function, (2, 2, 1), json!({}));
    let (deploying, ()) = tokio::join!(
        eventually("it is DEPLOYING", SOON, async || {
            (server.status(&function).await == "DEPLOYING").then_some(call().await)
        }),
        ready
    );
    refused(&deploying, 503, "not-invokable");
    assert!(deploying.headers().contains_key("retry-after"));
    answered(&call().await);

    let becomes = async |state: &str| {
        let since = Instant::now();
        eventually(state, SOON, async || {
            (server.status(&function).await == state).then_some(())
        })
        .await;
        println!("{state} after {:.1?}", since.elapsed());
    };
    let instances = server.instances(&function, "ready").await;
    kill(pid(&instances[0]), Signal::KILL);
    becomes("DEGRADING").await;
    answered(&call().await);
    kill(pid(&instances[1]), Signal::KILL);
    becomes("DEGRADED").await;
    refused(&call().await, 503, "not-invokable");
    becomes("ACTIVE").await;
    answered(&call().await);

    let answer = server.api(Method::DELETE, &function.deployment()).send();
    assert!(answer.await.unwrap().status().is_success());
    assert_eq!(server.status(&function).await, "INACTIVE");
    refused(&call().await, 404, "unknown-function");
}
