//! A store that can't be written: changes stop and are not half made, and all else goes on.

use std::{fs, path::PathBuf, process::Command};

use reqwest::{Method, StatusCode};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use crate::{
    bad_starts::{ends, serve},
    support::{Function, SOON, Server, answered, definition, eventually, problem, text},
};

/// A file system of its own, small; gone when dropped.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount(size: &str) -> Option<Self> {
        let disk = Self(tempfile::tempdir().unwrap());
        let options = format!("size={size},mode=0755");
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(disk.0.path());
        mount.output().ok()?.status.success().then_some(disk)
    }

    fn ballast(&self) -> PathBuf {
        self.0.path().join("ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

/// Makes functions until the store takes no more: those that were acknowledged.
async fn fill(server: &Server, words: &[&str]) -> Vec<String> {
    let tags: Vec<String> = (0..64).map(|i| format!("{i:x>128}")).collect();
    let mut large = definition(&["true"], &[]);
    large["tags"] = json!(tags);
    let mut acknowledged = Vec::new();
    loop {
        let call = server.api(Method::POST, "/v2/nvcf/functions").json(&large);
        let response = call.send().await.unwrap();
        if response.status() != StatusCode::OK {
            problem(response, 503, "store-unavailable", words).await;
            return acknowledged;
        }
        let made: Value = response.json().await.unwrap();
        acknowledged.push(text(&made["function"]["id"]));
        assert!(acknowledged.len() < 20_000, "it is never full");
    }
}

async fn serves(server: &Server, function: &Function) {
    let response = server.call(Method::GET, function, "/infer").send().await;
    answered(&response.unwrap());
}

async fn has(server: &Server, acknowledged: &[String]) {
    let all = server.get("/v2/nvcf/functions/ids").await.to_string();
    let lost: Vec<&String> = acknowledged
        .iter()
        .filter(|id| !all.contains(*id))
        .collect();
    assert!(lost.is_empty(), "acknowledged and gone: {lost:?}");
}

/// Changes go through again.
async fn accepts(server: &Server) {
    eventually("changes are taken again", SOON, async || {
        let call = server.api(Method::POST, "/v2/nvcf/functions");
        let call = call.json(&definition(&["true"], &[])).send();
        (call.await.unwrap().status() == StatusCode::OK).then_some(())
    })
    .await;
    server.new_key(&[]).await;
}

#[tokio::test]
async fn a_full_disk_stops_changes_and_nothing_else() {
    let Some(disk) = Disk::mount("8m") else {
        println!("skipped: no file system may be mounted here");
        return;
    };
    fs::write(disk.ballast(), vec![0; 4 << 20]).unwrap();
    let mut server = Server::within(disk.0.path(), &[]);
    let function = server.sample((1, 1, 1), json!({})).await;
    let full = ["disk", "weir.redb is full", "free some space"];
    let acknowledged = fill(&server, &full).await;
    assert!(!acknowledged.is_empty());
    for _ in 0..3 {
        fill(&server, &full).await;
        serves(&server, &function).await;
        has(&server, &acknowledged).await;
    }
    server.crash_and_restart();
    has(&server, &acknowledged).await;
    server.ready(&function, 1).await;
    serves(&server, &function).await;
    fill(&server, &full).await;

    fs::remove_file(disk.ballast()).unwrap();
    accepts(&server).await;
    server.crash_and_restart();
    has(&server, &acknowledged).await;
    drop(server);
}

#[tokio::test]
async fn a_file_that_may_not_grow_stops_changes_and_nothing_else() {
    let mut server = Server::start();
    let function = server.sample((1, 1, 1), json!({})).await;
    let pid = Pid::from_raw(i32::try_from(server.process()).unwrap());
    let largest = |bytes: Option<u64>| {
        let limit = Rlimit {
            current: bytes,
            maximum: None,
        };
        prlimit(pid, Resource::Fsize, limit).is_ok()
    };
    if !largest(Some(1 << 20)) {
        println!("skipped: the limit of file sizes may not be set");
        return;
    }
    let full = ["may not grow further", "ulimit -f"];
    let acknowledged = fill(&server, &full).await;
    serves(&server, &function).await;
    has(&server, &acknowledged).await;
    assert!(largest(None));
    accepts(&server).await;
    server.crash_and_restart();
    has(&server, &acknowledged).await;
    server.ready(&function, 1).await;
}

#[tokio::test]
async fn a_start_on_a_full_disk_says_so() {
    let Some(disk) = Disk::mount("64k") else {
        println!("skipped: no file system may be mounted here");
        return;
    };
    // It is cut short where the disk ends.
    _ = fs::write(disk.ballast(), [0; 64 << 10]);
    let directory = disk.0.path().join("data");
    ends(
        serve(&directory, &[]),
        1,
        &["weir.redb", "is full", "free some space"],
    )
    .await;
}
