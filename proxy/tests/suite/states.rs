//! A version's state as its instances come and go.

use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;
use tokio::time::Instant;

use crate::support::{SOON, Server, WEIR, answered, eventually, kill, pid, refused};

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
