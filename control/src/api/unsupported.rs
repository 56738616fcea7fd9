//! Paths of NVCF's that this build knows and does not serve: they say so, and what to do instead.
//!
//! They are in no description, since nothing that is sent to them is right.

use axum::{
    Router,
    routing::{get, patch, put},
};
use std::sync::Arc;

use super::{Api, Caller, Problem};

pub(crate) fn routes() -> Router<Arc<Api>> {
    let mut router = Router::new();
    for base in ["/v2/nvcf", "/v2/nvcf/accounts/{ncaId}"] {
        router = router
            .route(
                &format!("{base}/secrets/functions/{{functionId}}/versions/{{functionVersionId}}"),
                put(secrets),
            )
            .route(
                &format!("{base}/secrets/telemetries/{{telemetryId}}"),
                put(secrets),
            );
    }
    router
        .route(
            "/v2/nvcf/accounts/{ncaId}/clients/associate",
            patch(clients),
        )
        .route(
            "/v2/nvcf/accounts/{ncaId}/clients/disassociate",
            patch(clients),
        )
        .route("/v2/nvcf/clients/{clientId}", get(clients))
}

async fn secrets(caller: Caller) -> Problem {
    refused(
        &caller,
        "update_secrets",
        "secrets are not supported yet: give the value in process.env of a new version",
    )
}

async fn clients(caller: Caller) -> Problem {
    refused(
        &caller,
        "account_setup",
        "there are no clients, here it is a key that belongs to an account: POST /v2/weir/keys makes one",
    )
}

fn refused(caller: &Caller, scope: &str, why: &str) -> Problem {
    match caller.needs(scope) {
        Ok(()) => Problem::bad(why),
        Err(lacking) => lacking,
    }
}
