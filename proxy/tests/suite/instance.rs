//! An instance that owes nothing to the code under test: the test binary run
//! again, a threaded HTTP/1.1 server on the standard library alone.
//!
//! It ends work when its connection closes, and writes the most requests that
//! it ever had in flight to `<directory>/<pid>`.

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Names the directory, and says that this process is to be an instance.
const DIRECTORY: &str = "SUITE_INSTANCE";
/// How often work looks whether its caller is there.
const LOOK: Duration = Duration::from_millis(2);

/// What starts one, and its environment.
pub(crate) fn command() -> [String; 5] {
    let this = std::env::current_exe().unwrap();
    [
        this.to_str().unwrap().to_owned(),
        "instance::instance_of_other_tests".to_owned(),
        "--exact".to_owned(),
        "--ignored".to_owned(),
        "--nocapture".to_owned(),
    ]
}

pub(crate) fn env(directory: &Path) -> (&'static str, String) {
    (DIRECTORY, directory.to_str().unwrap().to_owned())
}

/// The most that each instance had in flight.
pub(crate) fn highest(directory: &Path) -> Vec<usize> {
    let files = fs::read_dir(directory).unwrap();
    files
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_none())
        .map(|path| fs::read_to_string(path).unwrap())
        .map(|text| text.parse().unwrap())
        .collect()
}

struct Books {
    in_flight: AtomicUsize,
    highest: Mutex<usize>,
    file: PathBuf,
}

impl Books {
    fn arrive(&self) {
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        let mut highest = self.highest.lock().unwrap();
        if now > *highest {
            *highest = now;
            // A reader may look at any time, and this process be killed at any time.
            let fresh = self.file.with_extension("new");
            fs::write(&fresh, now.to_string()).unwrap();
            fs::rename(fresh, &self.file).unwrap();
        }
    }

    fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
#[ignore = "it is what other tests run as their instance"]
fn instance_of_other_tests() {
    let Some(directory) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let port: u16 = std::env::var("PORT").unwrap().parse().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let books = Arc::new(Books {
        in_flight: AtomicUsize::new(0),
        highest: Mutex::new(0),
        file: Path::new(&directory).join(std::process::id().to_string()),
    });
    for stream in listener.incoming() {
        let (stream, books) = (stream.unwrap(), books.clone());
        // It ends with its connection, for whatever reason that ends.
        thread::spawn(move || serve(&stream, &books));
    }
}

fn serve(stream: &TcpStream, books: &Books) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut reader = BufReader::new(stream);
    loop {
        stream.set_read_timeout(None).ok()?;
        let head = read_head(&mut reader)?;
        let target = head.split(' ').nth(1)?.to_owned();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        if path == "/health" {
            respond(stream, "ok")?;
            continue;
        }
        books.arrive();
        let worked = work(stream, &mut reader, &head, path, query);
        // Before the last byte: who has the whole answer may call again.
        books.leave();
        match worked? {
            Work::Answer(body) => respond(stream, &body)?,
            Work::LastChunk => (&mut &*stream).write_all(b"0\r\n\r\n").ok()?,
        }
    }
}

enum Work {
    Answer(String),
    /// What is left of an answer in chunks.
    LastChunk,
}

fn work(
    stream: &TcpStream,
    reader: &mut BufReader<&TcpStream>,
    head: &str,
    path: &str,
    query: &str,
) -> Option<Work> {
    let length = field(head, "content-length").and_then(|n| n.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    let gate = parameter(query, "gate").map(PathBuf::from);
    let open = || gate.as_ref().is_none_or(|gate| gate.exists());
    match path {
        // What it was sent.
        "/head" => Some(Work::Answer(head.to_owned())),
        // One event at once and one when the gate opens.
        "/stream" => {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            write!(&mut &*stream, "{head}d\r\ndata: first\n\n\r\n").ok()?;
            while !open() {
                still_there(stream)?;
            }
            write!(&mut &*stream, "c\r\ndata: last\n\n\r\n").ok()?;
            Some(Work::LastChunk)
        }
        // Works for a while, or until the gate opens.
        _ => {
            let ms = parameter(query, "ms").and_then(|ms| ms.parse().ok());
            let end = Instant::now() + Duration::from_millis(ms.unwrap_or(0));
            while !open() || Instant::now() < end {
                still_there(stream)?;
            }
            Some(Work::Answer("done".to_owned()))
        }
    }
}

/// Waits a moment; `None` when the connection closed.
fn still_there(stream: &TcpStream) -> Option<()> {
    stream.set_read_timeout(Some(LOOK)).ok()?;
    match stream.peek(&mut [0]) {
        Ok(0) => None,
        Ok(_) => Some(()),
        Err(error) => {
            matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut).then_some(())
        }
    }
}

fn read_head(reader: &mut impl BufRead) -> Option<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

fn respond(stream: &TcpStream, body: &str) -> Option<()> {
    let length = body.len();
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
    (&mut &*stream).write_all(answer.as_bytes()).ok()
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query
        .split('&')
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}
