//! Apply against a small lifecycle API over a real socket.

use std::sync::{Arc, Mutex};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, Uri},
    response::{IntoResponse, Response},
};

use weir_control::model::{Autoscaling, QueueSettings, Routing};

use super::*;

/// What the server was asked to change, and its versions.
#[derive(Default)]
struct Server {
    changes: Vec<String>,
    versions: Vec<Value>,
}

async fn answer(
    State(server): State<Arc<Mutex<Server>>>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> Response {
    let mut server = server.lock().unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let parts: Vec<&str> = uri.path().split('/').skip(3).collect();
    if method != Method::GET {
        server.changes.push(format!("{method} {}", parts[0]));
    }
    let find = |server: &Server, id: &str| {
        server
            .versions
            .iter()
            .position(|version| version["versionId"] == id)
    };
    let json = |value: Value| axum::Json(value).into_response();
    match (method.as_str(), &parts[..]) {
        ("GET", ["functions"]) => json(json!({"functions": server.versions})),
        ("POST", ["functions"] | ["functions", _, "versions"]) => {
            let mut version = body;
            version["versionId"] = json!(Uuid::new_v4());
            version["id"] = match parts.get(1) {
                Some(id) => json!(id),
                None => json!(Uuid::new_v4()),
            };
            version["status"] = json!("INACTIVE");
            version["createdAt"] = json!(jiff::Timestamp::now());
            server.versions.push(version.clone());
            json(json!({"function": version}))
        }
        (verb, ["functions", _, "versions", id]) => match (verb, find(&server, id)) {
            (_, None) => StatusCode::NOT_FOUND.into_response(),
            ("DELETE", Some(at)) => {
                server.versions.remove(at);
                StatusCode::NO_CONTENT.into_response()
            }
            (_, Some(at)) => json(json!({"function": server.versions[at]})),
        },
        (verb, ["deployments", "functions", _, "versions", id]) => {
            let Some(at) = find(&server, id) else {
                return StatusCode::NOT_FOUND.into_response();
            };
            let version = &mut server.versions[at];
            match verb {
                "POST" => {
                    version["status"] = json!("ACTIVE");
                    version["deployment"] = body;
                }
                "PUT" => version["deployment"] = body,
                "DELETE" => version["status"] = json!("INACTIVE"),
                _ if version["status"] == "INACTIVE" => {
                    return StatusCode::NOT_FOUND.into_response();
                }
                _ => {}
            }
            let mut deployment = json!({
                "autoscaling": Autoscaling::default(), "queue": QueueSettings::default(),
                "routing": Routing::default(),
                "startTimeout": "PT10M", "drainTimeout": "PT5M", "cancelTimeout": "PT5S",
            });
            let all = deployment.as_object_mut().unwrap();
            all.extend(
                version["deployment"]
                    .as_object()
                    .cloned()
                    .unwrap_or_default(),
            );
            json(json!({"deployment": deployment}))
        }
        _ => StatusCode::IM_A_TEAPOT.into_response(),
    }
}

#[tokio::test]
async fn a_file_is_applied_changed_and_pruned() {
    let server = Arc::new(Mutex::new(Server::default()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer).with_state(server.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("functions.yaml");
    let apply = async |text: &str, prune: bool| {
        std::fs::write(&file, text).unwrap();
        server.lock().unwrap().changes.clear();
        let apply = Apply {
            common: Common {
                admin_url: url.clone(),
                url: String::new(),
                key: Some("weir_k".into()),
                data_dir: dir.path().into(),
                ca_file: None,
                output: Output::Table,
            },
            file: file.clone(),
            owner: "me".into(),
            prune,
            dry_run: false,
            keep_failed: false,
            wait: Wait::at_most(Duration::from_secs(5)),
            drain_timeout: IsoDuration::secs(5),
        };
        apply.run().await.unwrap();
        let server = server.lock().unwrap();
        (server.changes.join(", "), server.versions.clone())
    };

    let first = "functions: [{name: a, endpoints: [x], deployment: {}}]";
    let (changes, versions) = apply(first, true).await;
    assert_eq!(changes, "POST functions, POST deployments");
    let before = versions[0].clone();
    assert_eq!(before["status"], "ACTIVE");

    let (changes, _) = apply(first, true).await;
    assert_eq!(changes, "", "the second time nothing changes");

    let more = "functions: [{name: a, endpoints: [x], deployment: {maxInstances: 2}}]";
    let (changes, versions) = apply(more, true).await;
    assert_eq!(changes, "PUT deployments", "no new version");
    assert_eq!(versions[0]["versionId"], before["versionId"]);
    let (changes, _) = apply(more, true).await;
    assert_eq!(changes, "");

    let changed = "functions: [{name: a, endpoints: [z], deployment: {}}]";
    let (changes, versions) = apply(changed, true).await;
    assert_eq!(
        changes,
        "POST functions, POST deployments, DELETE deployments, DELETE functions"
    );
    assert_eq!(versions.len(), 1);
    assert_eq!(versions[0]["id"], before["id"], "the function stays");
    assert_ne!(versions[0]["versionId"], before["versionId"]);

    let (changes, _) = apply("functions: []", false).await;
    assert_eq!(changes, "");
    let (changes, versions) = apply("functions: []", true).await;
    assert_eq!(changes, "DELETE deployments, DELETE functions");
    assert!(versions.is_empty());
}
