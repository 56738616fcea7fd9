//! `kill -9` of Weir itself, again and again, while it serves and is changed.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::support::{
    Function, SOON, Server, WEIR, answered, eventually, processes_with, refused, text,
};

const KILLS: usize = 4;
/// Acknowledged changes before each, at least.
const CHANGES: usize = 60;
/// Answered invocations before each, at least.
const SERVED: usize = 20;

#[tokio::test]
async fn what_was_acknowledged_outlives_kill_9() {
    let mut server = Server::start();
    let mark = format!("of-{}", server.directory().display());
    let command = [WEIR, "sample-function"];
    let function = server.function(&command, &[("SUITE_MARK", &mark)]).await;
    server.deploy(&function, (2, 2, 4), json!({})).await;

    let mut things = Vec::new();
    for _ in 0..KILLS {
        let before: HashSet<_> = processes_with(&mark).into_iter().collect();
        assert_eq!(before.len(), 2);
        let served = changed_until_killed(&server, &function, &mut things).await;
        let killed = Instant::now();
        server.crash_and_restart();
        eventually("Weir is ready", SOON, async || {
            let url = format!("http://{}/readyz", server.admin);
            let answer = server.http.get(url).send().await.ok()?;
            (answer.status() == StatusCode::OK).then_some(())
        })
        .await;
        let ready = killed.elapsed();
        // Its instances are started anew, and until both are ready it is DEPLOYING.
        eventually("an invocation is served", SOON, async || {
            let call = server.call(Method::GET, &function, "/infer");
            let response = call.send().await.unwrap();
            if response.status() == StatusCode::SERVICE_UNAVAILABLE {
                refused(&response, 503, "not-invokable");
                return None;
            }
            answered(&response);
            Some(())
        })
        .await;
        let again = killed.elapsed();
        println!(
            "{served} served, then killed; ready after {ready:.0?}, served again after {again:.0?}"
        );

        for thing in &things {
            thing.is_as_acknowledged(&server).await;
        }
        server.ready(&function, 2).await;
        let now: HashSet<_> = processes_with(&mark).into_iter().collect();
        assert_eq!(now.len(), 2, "the new instances and nobody else");
        assert!(before.is_disjoint(&now), "an orphan is left");
        server.until_busy(&function, 0).await;
    }

    server.signal(Signal::TERM);
    assert_eq!(server.exit().await.code(), Some(0));
    assert_eq!(processes_with(&mark), Vec::<std::path::PathBuf>::new());
}

/// What Weir said is made.
struct Thing {
    /// There as long as the thing is.
    path: String,
    /// Of a key.
    secret: Option<String>,
    fate: Fate,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Stays,
    /// Weir was asked to delete it and has not said that it did.
    Going,
    Gone,
}

impl Thing {
    fn stays(path: String, secret: Option<String>) -> Self {
        let fate = Fate::Stays;
        Self { path, secret, fate }
    }

    async fn is_as_acknowledged(&self, server: &Server) {
        let request = server
            .http
            .get(format!("http://{}{}", server.admin, self.path));
        let key = self.secret.as_ref().unwrap_or(&server.key);
        let status = request.bearer_auth(key).send().await.unwrap().status();
        let gone = match self.secret {
            Some(_) => StatusCode::UNAUTHORIZED,
            None => StatusCode::NOT_FOUND,
        };
        match self.fate {
            Fate::Stays => assert_eq!(status, StatusCode::OK, "{} was made", self.path),
            Fate::Gone => assert_eq!(status, gone, "{} was deleted", self.path),
            Fate::Going => assert!([StatusCode::OK, gone].contains(&status), "{status}"),
        }
    }
}

/// Serves, and makes and deletes functions, deployments and keys, several at a time; then kills Weir in the midst of
/// it. How many invocations were answered.
async fn changed_until_killed(
    server: &Server,
    function: &Function,
    things: &mut Vec<Thing>,
) -> usize {
    let clients = Clients {
        server,
        changes: AtomicUsize::new(0),
        served: AtomicUsize::new(0),
    };
    let callers = join_all((0..8).map(|_| clients.call(function)));
    let functions = join_all((0..4).map(|_| clients.make_functions()));
    let keys = join_all((0..2).map(|_| clients.make_keys()));
    let (_, functions, keys) = tokio::join!(callers, functions, keys);
    things.extend(functions.into_iter().chain(keys).flatten());
    clients.served.into_inner()
}

/// Those who ask until nobody answers any more.
struct Clients<'a> {
    server: &'a Server,
    /// Acknowledged since the start.
    changes: AtomicUsize,
    /// Invocations.
    served: AtomicUsize,
}

impl Clients<'_> {
    /// An acknowledged change's answer; `None` once Weir is dead.
    async fn change(&self, method: Method, path: &str, body: &Value) -> Option<Value> {
        let request = self.server.api(method, path).json(body);
        let response = request.send().await.ok()?;
        let status = response.status();
        let text = response.text().await.ok()?;
        assert!(status.is_success(), "{status} {text}");
        let served = self.served.load(Ordering::SeqCst);
        if self.changes.fetch_add(1, Ordering::SeqCst) + 1 >= CHANGES && served >= SERVED {
            // The others are on their way.
            self.server.signal(Signal::KILL);
        }
        Some(serde_json::from_str(&text).unwrap_or_default())
    }

    async fn call(&self, function: &Function) {
        loop {
            let call = self.server.call(Method::GET, function, "/infer?ms=2");
            let Ok(response) = call.send().await else {
                return;
            };
            answered(&response);
            if response.bytes().await.is_err() {
                return;
            }
            self.served.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Functions, each of them deployed, and every other one undeployed again.
    async fn make_functions(&self) -> Vec<Thing> {
        let function = json!({
            "name": "of-a-test", "inferenceUrl": "/infer",
            "process": {"command": [WEIR, "sample-function"]},
        });
        let deployment = json!({"deploymentSpecifications": [{
            "gpu": "none", "instanceType": "none", "minInstances": 0, "maxInstances": 1,
        }]});
        let mut made = Vec::new();
        for number in 0.. {
            let path = "/v2/nvcf/functions";
            let Some(answer) = self.change(Method::POST, path, &function).await else {
                break;
            };
            let function = Function::of(&answer);
            made.push(Thing::stays(function.path(), None));
            let path = function.deployment();
            if self
                .change(Method::POST, &path, &deployment)
                .await
                .is_none()
            {
                break;
            }
            made.push(Thing::stays(path, None));
            if number % 2 == 0
                && self
                    .delete(made.last_mut(), &function.deployment())
                    .await
                    .is_none()
            {
                break;
            }
        }
        made
    }

    /// Keys, every other one of which is revoked.
    async fn make_keys(&self) -> Vec<Thing> {
        let key = json!({"name": "of-a-test", "scopes": ["list_functions"]});
        let mut made = Vec::new();
        for number in 0.. {
            let Some(answer) = self.change(Method::POST, "/v2/weir/keys", &key).await else {
                break;
            };
            let secret = Some(text(&answer["secret"]));
            made.push(Thing::stays("/v2/nvcf/functions/ids".into(), secret));
            let path = format!("/v2/weir/keys/{}", text(&answer["key"]["id"]));
            if number % 2 == 0 && self.delete(made.last_mut(), &path).await.is_none() {
                break;
            }
        }
        made
    }

    async fn delete(&self, thing: Option<&mut Thing>, path: &str) -> Option<()> {
        let thing = thing?;
        thing.fate = Fate::Going;
        self.change(Method::DELETE, path, &json!({})).await?;
        thing.fate = Fate::Gone;
        Some(())
    }
}
