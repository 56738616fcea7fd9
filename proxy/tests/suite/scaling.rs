//! How many instances there are, as seen from outside.

use rustix::process::Signal;
use serde_json::json;

use crate::{
    instance,
    support::{SOON, Server, eventually, kill, pid, processes_with},
};

#[tokio::test]
async fn nothing_starts_anew_while_weir_stops() {
    let mut server = Server::start();
    let books = tempfile::tempdir().unwrap();
    let (name, value) = instance::env(books.path());
    let program = instance::command();
    let mut command = vec!["sh", "-c", "trap '' TERM; exec \"$@\"", "sh"];
    command.extend(program.iter().map(String::as_str));
    let stubborn = server.function(&command, &[(name, &value)]).await;
    server.deploy(&stubborn, (1, 1, 1), json!({})).await;
    let docile = server.sample((1, 1, 1), json!({})).await;
    let left = pid(&server.instances(&stubborn, "ready").await[0]);
    let id = server.instances(&docile, "ready").await[0]["id"].clone();

    server.signal(Signal::TERM);
    let mark = format!("WEIR_INSTANCE_ID={}", id.as_str().unwrap());
    eventually("the one that hears SIGTERM ends", SOON, async || {
        processes_with(&mark).is_empty().then_some(())
    })
    .await;
    kill(left, Signal::KILL);
    assert_eq!(server.exit().await.code(), Some(0));
    let starts = server.log().matches("an instance is to start").count();
    assert_eq!(starts, 2, "those that were there before");
}
