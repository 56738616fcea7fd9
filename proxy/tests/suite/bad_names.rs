//! Things that are not there, not the caller's, or there already: who asks learns which.

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::json;

use crate::support::{Function, SOON, Server, definition, eventually, problem, text};

const ABSENT: &str = "11111111-1111-4111-8111-111111111111";

#[tokio::test]
async fn what_is_not_there_is_404_and_a_bad_uuid_400() {
    let server = Server::start();
    let function = server.function(&["true"], &[]).await;
    let Function { id, version } = &function;
    for path in [
        format!("/v2/nvcf/functions/{ABSENT}/versions"),
        format!("/v2/nvcf/functions/{ABSENT}/versions/{version}"),
        format!("/v2/nvcf/functions/{id}/versions/{ABSENT}"),
        format!("/v2/nvcf/deployments/functions/{id}/versions/{ABSENT}"),
        format!("/v2/nvcf/queues/functions/{ABSENT}"),
        format!("/v2/nvcf/authorizations/functions/{ABSENT}"),
        format!("/v2/weir/decisions?version={ABSENT}"),
    ] {
        let response = server.api(Method::GET, &path).send().await.unwrap();
        problem(response, 404, "unknown-function", &[ABSENT]).await;
        let bad = path.replace(ABSENT, "not-a-uuid");
        let response = server.api(Method::GET, &bad).send().await.unwrap();
        problem(
            response,
            400,
            "bad-request",
            &["'not-a-uuid' is not a UUID, such as"],
        )
        .await;
    }
    for path in [
        format!("/v2/nvcf/deployments/{ABSENT}"),
        format!("/v2/nvcf/queues/{ABSENT}/position"),
        format!("/v2/weir/keys/{ABSENT}"),
        format!("/v2/weir/instances/{ABSENT}"),
        format!("/v2/weir/instances/{ABSENT}/logs"),
        "/v2/nvcf/accounts/nobody".to_owned(),
        "/v2/nvcf/accounts/nobody/functions".to_owned(),
        "/v2/nvcf/nothing".to_owned(),
    ] {
        let response = server.api(Method::GET, &path).send().await.unwrap();
        problem(response, 404, "not-found", &[]).await;
        if path.contains(ABSENT) {
            let bad = path.replace(ABSENT, "not-a-uuid");
            let response = server.api(Method::GET, &bad).send().await.unwrap();
            problem(
                response,
                400,
                "bad-request",
                &["'not-a-uuid' is not a UUID, such as"],
            )
            .await;
        }
    }
    for path in [
        format!("/v2/nvcf/functions/{id}/versions/{ABSENT}"),
        format!("/v2/nvcf/deployments/functions/{ABSENT}/versions/{version}"),
        format!("/v2/weir/keys/{ABSENT}"),
    ] {
        let response = server.api(Method::DELETE, &path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::NOT_FOUND, "{path}");
    }
    let response = server
        .api(Method::PATCH, "/v2/nvcf/functions")
        .send()
        .await
        .unwrap();
    problem(response, 405, "bad-request", &["does not take that method"]).await;
    let query = "/v2/nvcf/functions?visibility=secret";
    let response = server.api(Method::GET, query).send().await.unwrap();
    problem(
        response,
        400,
        "bad-request",
        &["visibility: 'secret' is none of"],
    )
    .await;

    let account = json!({"ncaId": "team-a", "name": "A"});
    server.post("/v2/nvcf/accounts", &account).await;
    for taken in ["team-a", "default"] {
        let again = server.api(Method::POST, "/v2/nvcf/accounts");
        let again = again.json(&json!({"ncaId": taken, "name": "again"}));
        problem(
            again.send().await.unwrap(),
            409,
            "conflict",
            &[taken, "choose another ncaId"],
        )
        .await;
    }
}

/// A request with this `Authorization`.
fn showing(call: RequestBuilder, authorization: Option<&str>) -> RequestBuilder {
    match authorization {
        Some(value) => call.header("authorization", value),
        None => call,
    }
}

#[tokio::test]
async fn a_key_that_is_none_is_401_on_both_listeners() {
    let server = Server::start();
    let function = server.function(&["true"], &[]).await;
    let expires = jiff::Timestamp::now() + std::time::Duration::from_secs(3);
    let asked = json!({"name": "short", "scopes": [], "expiresAt": expires.to_string()});
    let expired = text(&server.post("/v2/weir/keys", &asked).await["secret"]);
    let (id, revoked) = server.new_key(&["invoke_function"]).await;
    let revoke = server.api(Method::DELETE, &format!("/v2/weir/keys/{id}"));
    assert_eq!(
        revoke.send().await.unwrap().status(),
        StatusCode::NO_CONTENT
    );
    let calls = |authorization: Option<&str>| {
        let list = server
            .http
            .get(format!("http://{}/v2/nvcf/functions", server.admin));
        let call = server.http.get(format!("http://{}/", server.data));
        let call = call.header("function-id", &function.id);
        [list, call].map(|call| showing(call, authorization))
    };
    let expired = format!("Bearer {expired}");
    eventually("the key expires", SOON, async || {
        let [list, _] = calls(Some(&expired));
        (list.send().await.unwrap().status() == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    for (authorization, word) in [
        (None, "no key"),
        (Some("nonsense"), "no key"),
        (Some("Bearer"), "no key"),
        (Some("Basic d2VpcjpwYXNz"), "no key"),
        (Some("Bearer weir_nobody"), "known"),
        (Some(&*format!("Bearer {}x", server.key)), "known"),
        (Some(&*format!("Bearer {revoked}")), "revoked"),
        (Some(&*expired), "expired"),
    ] {
        for call in calls(authorization) {
            let response = call.send().await.unwrap();
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            problem(response, 401, "unauthenticated", &[word]).await;
        }
    }
}

#[tokio::test]
async fn a_key_does_what_it_may_and_no_more() {
    let server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let as_key = |method: Method, path: &str, key: &str| {
        let call = server
            .http
            .request(method, format!("http://{}{path}", server.admin));
        call.bearer_auth(key)
    };
    let invoke = |key: &str| {
        let call = server.http.get(format!("http://{}/echo", server.data));
        call.bearer_auth(key).header("function-id", &function.id)
    };
    let versions = format!("/v2/nvcf/functions/{}/versions", function.id);

    // Another account's function is not there, whatever else the key lacks.
    let account = json!({"ncaId": "team-b", "name": "B"});
    server.post("/v2/nvcf/accounts", &account).await;
    for (scopes, functions) in [
        (json!(["list_functions", "invoke_function"]), json!(null)),
        (
            json!(["list_functions", "invoke_function"]),
            json!([ABSENT]),
        ),
        (json!(["list_functions"]), json!(null)),
    ] {
        let asked =
            json!({"name": "b", "account": "team-b", "scopes": scopes, "functions": functions});
        let key = text(&server.post("/v2/weir/keys", &asked).await["secret"]);
        for call in [as_key(Method::GET, &versions, &key), invoke(&key)] {
            problem(call.send().await.unwrap(), 404, "unknown-function", &[]).await;
        }
    }
    // Of the account's own it is told.
    let asked = json!({"name": "c", "scopes": ["list_functions", "invoke_function"], "functions": [ABSENT]});
    let others = text(&server.post("/v2/weir/keys", &asked).await["secret"]);
    for call in [as_key(Method::GET, &versions, &others), invoke(&others)] {
        problem(call.send().await.unwrap(), 403, "forbidden", &["that may"]).await;
    }

    // A scope that is missing is named.
    let (_, key) = server.new_key(&["register_function"]).await;
    problem(
        invoke(&key).send().await.unwrap(),
        403,
        "forbidden",
        &["invoke_function", "Use one"],
    )
    .await;
    let process = definition(&["true"], &[]);
    let endpoint = json!({"name": "a", "inferenceUrl": "/", "endpoints": ["http://10.0.0.5:80"]});
    for (method, path, body, word) in [
        (
            Method::POST,
            "/v2/nvcf/functions",
            process,
            "register_process",
        ),
        (
            Method::POST,
            "/v2/nvcf/functions",
            endpoint,
            "register_endpoints",
        ),
        (Method::GET, &*versions, json!({}), "list_functions"),
        (
            Method::GET,
            &*function.deployment(),
            json!({}),
            "deploy_function",
        ),
        (
            Method::DELETE,
            &*format!("{versions}/{}", function.version),
            json!({}),
            "delete_function",
        ),
        (Method::GET, "/v2/weir/keys", json!({}), "account_setup"),
        (
            Method::GET,
            "/v2/nvcf/accounts/default/functions",
            json!({}),
            "use the path without it",
        ),
    ] {
        let call = as_key(method, path, &key).json(&body);
        problem(
            call.send().await.unwrap(),
            403,
            "forbidden",
            &[word, "use "],
        )
        .await;
    }
    assert_eq!(
        server.get("/v2/nvcf/functions/ids").await["functionIds"],
        json!([function.id])
    );
}
