//! Command lines, files and directories that `weir` can't work with.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Stdio};

use rustix::process::geteuid;
use tokio::{net::TcpListener, process::Command, time::timeout};

use crate::support::{SOON, Server, WEIR};

/// The environment's own settings are not the test's.
fn weir(words: &[&str]) -> Command {
    let mut command = Command::new(WEIR);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WEIR_") {
            command.env_remove(name);
        }
    }
    command.args(words).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Asserts that it ends with this status, and says all of these words.
pub(crate) async fn ends(mut command: Command, status: i32, words: &[&str]) {
    let ended = timeout(SOON, command.output()).await;
    let ended = ended
        .unwrap_or_else(|_| panic!("{command:?} goes on"))
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    let seen = format!("{command:?}: {:?} {said}, for {words:?}", ended.status);
    assert_eq!(ended.status.code(), Some(status), "{seen}");
    for word in words {
        assert!(said.contains(word), "{seen}");
    }
}

/// Rows of a table: what is given, and the words of the refusal, between `&`.
fn rows(table: &str) -> impl Iterator<Item = (&str, Vec<&str>)> {
    table
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let (given, words) = line.trim().split_once(" | ").expect(line);
            (given, words.split(" & ").collect())
        })
}

#[tokio::test]
async fn wrong_command_lines_end_with_2_and_a_hint() {
    const LINES: &str = "
        frobnicate | 'frobnicate' & Usage: weir & --help
        serv | 'serv' & 'serve'
        function mak | 'mak' & Usage: weir function
        serve --frob | '--frob' & --help
        serve --listen nonsense | 'nonsense' & --listen & such as 127.0.0.1:8080
        serve --listen localhost:1 | --listen & IP address and a port
        serve --listen 127.0.0.1:65536 | --listen & IP address and a port
        serve --admin 127.0.0.1 | --admin & IP address and a port
        serve --listen 127.0.0.1:1 --admin 127.0.0.1:1 | are both 127.0.0.1:1 & a port each
        serve --auth none --listen 0.0.0.0:1 | loopback & --listen is 0.0.0.0:1 & leave --auth out
        serve --auth none --admin [::]:1 | loopback & --admin is [::]:1
        serve --auth maybe | 'maybe' & keys, none
        serve --grace 15s | --grace & '15s' & write PT15S
        serve --grace=-PT1S | --grace & is negative
        serve --drain-delay P1M | --drain-delay & years or months & use days
        serve --head-timeout PT0S | --head-timeout & longer than nothing
        serve --cores 0 | --cores & whole number of at least 1
        serve --max-fields=-1 | --max-fields & whole number of at least 1
        serve --max-functions many | --max-functions & whole number of at least 1
        serve --max-body 1GB | --max-body & such as 1048576, 1MiB or 1GiB
        serve --max-body 99999999999GiB | --max-body & such as 1048576, 1MiB or 1GiB
        serve --max-head 1GiB | --max-head & must be 8192 to 16777216 bytes
        serve --instance-ports 30-20 | --instance-ports & such as 20000-29999
        serve --gpus H100:many | --gpus & such as H100:8
        serve --config /no/such/file | /no/such/file & --config
        key create a --scope magic | 'magic' & invoke_function
    ";
    const FILES: &str = "
        lisen = 'x' | unknown key 'lisen' & did you mean 'listen'?
        grace = '5s' | --grace & '5s' & write PT5S
        cores = 1.5 | must be a whole number
        cores = -1 | --cores & whole number of at least 1
        [serve] | unknown key 'serve' & there are listen
        listen | line 1
    ";
    for (line, words) in rows(LINES) {
        let line: Vec<&str> = line.split(' ').collect();
        ends(weir(&line), 2, &words).await;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    for (text, mut words) in rows(FILES) {
        fs::write(path, text).unwrap();
        words.push(path);
        ends(weir(&["serve", "--config", path]), 2, &words).await;
    }
    let mut variable = weir(&["serve"]);
    variable.env("WEIR_GRACE", "5s");
    ends(variable, 2, &["--grace", "'5s'"]).await;
}

#[tokio::test]
async fn clients_say_why_they_fail() {
    let server = Server::start();
    let admin = format!("http://{}", server.admin);
    let at = |words: &[&str], key: &str| {
        let mut command = weir(words);
        command
            .env("WEIR_ADMIN_URL", &admin)
            .env("WEIR_API_KEY", key);
        command.env("WEIR_URL", format!("http://{}", server.data));
        command
    };
    let absent = "11111111-1111-4111-8111-111111111111";
    let key = server.key.as_str();
    ends(
        at(&["function", "list"], "weir_nobody"),
        1,
        &["401", "not known here", "--key"],
    )
    .await;
    ends(
        at(&["function", "get", absent], key),
        1,
        &["404", absent, "weir function list"],
    )
    .await;
    ends(
        at(&["invoke", "nobody"], key),
        1,
        &["'nobody'", "`weir apply`"],
    )
    .await;
    ends(at(&["logs", absent], key), 1, &["404", absent]).await;
    ends(
        at(&["apply", "-f", "/no/such/file"], key),
        1,
        &["can't read /no/such/file"],
    )
    .await;
    // Nobody is there.
    let nobody = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let url = format!("http://{nobody}");
    ends(
        weir(&["function", "list", "--admin-url", &url]),
        1,
        &["start a server with `weir serve`", &url],
    )
    .await;
}

pub(crate) fn serve(directory: &Path, words: &[&str]) -> Command {
    let mut command = weir(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--access-log",
        "off",
        "--data-dir",
    ]);
    command.arg(directory).args(words);
    command
}

#[tokio::test]
async fn addresses_and_directories_that_are_taken_or_closed_are_named() {
    let server = Server::start();
    let directory = tempfile::tempdir().unwrap();
    let fresh = directory.path().join("fresh");
    let taken = server.admin.to_string();
    let words = [
        taken.as_str(),
        "another weir running there",
        "choose another port",
    ];
    let listen = |flag: &str, address: &str| {
        let mut command = weir(&["serve", "--data-dir"]);
        let other = if flag == "--listen" {
            "--admin"
        } else {
            "--listen"
        };
        command
            .arg(&fresh)
            .args([flag, address, other, "127.0.0.1:0"]);
        command
    };
    ends(listen("--listen", &taken), 1, &words).await;
    ends(listen("--admin", &taken), 1, &words).await;
    // An address for documentation, which no machine has.
    ends(
        listen("--listen", "192.0.2.1:9"),
        1,
        &["192.0.2.1:9", "no such address"],
    )
    .await;

    let used = server.directory().to_str().unwrap();
    ends(
        serve(server.directory(), &[]),
        1,
        &[used, "another weir uses", "directory of its own"],
    )
    .await;

    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let below = file.join("below");
    for path in [file.as_path(), &below, Path::new("/proc/weir")] {
        ends(
            serve(path, &[]),
            1,
            &[path.to_str().unwrap(), "can't be used", "--data-dir"],
        )
        .await;
    }
    fs::create_dir_all(&fresh).unwrap();
    for (name, text, words) in [
        (
            "weir.redb",
            "no database",
            &["not a file of weir's", "backup"][..],
        ),
        ("admin.key", "no key", &["does not hold a key", "remove it"]),
    ] {
        fs::write(fresh.join(name), text).unwrap();
        let path = fresh.join(name);
        let words: Vec<&str> = [path.to_str().unwrap()]
            .into_iter()
            .chain(words.iter().copied())
            .collect();
        ends(serve(&fresh, &[]), 1, &words).await;
        fs::remove_file(path).unwrap();
    }
    let log = file.join("log");
    ends(
        serve(&fresh, &["--access-log", log.to_str().unwrap()]),
        2,
        &[],
    )
    .await;
    if geteuid().is_root() {
        ends(
            serve(&fresh, &["--instance-user", "no-such-user"]),
            1,
            &["--instance-user", "'no-such-user'", "does not exist"],
        )
        .await;
    }
}

#[tokio::test]
async fn a_directory_that_may_not_be_used_is_named() {
    const NOBODY: u32 = 65534;
    let mut probe = weir(&["--version"]);
    let root = geteuid().is_root();
    if root {
        probe.uid(NOBODY).gid(NOBODY);
    }
    if !probe
        .output()
        .await
        .is_ok_and(|output| output.status.success())
    {
        println!("skipped: another user can't start {WEIR}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (mode, word) in [(0o000, "directory"), (0o555, "who may write to it")] {
        let closed = directory.path().join(format!("{mode:o}"));
        fs::create_dir(&closed).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(mode)).unwrap();
        let mut command = serve(&closed, &[]);
        if root {
            command.uid(NOBODY).gid(NOBODY);
        }
        ends(
            command,
            1,
            &[closed.to_str().unwrap(), word, "Permission denied"],
        )
        .await;
    }
}
