//! An instance that owes nothing to the code under test: the test binary run
//! again, a threaded HTTP/1.1 server on the standard library alone.
//!
//! It ends work when its connection closes, and keeps a book of its requests in
//! `<directory>/<pid>`. While there is a file `<directory>/ill`, it says that it
//! is not well.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant, SystemTime},
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

/// Its presence makes the instances of a directory fail their health check.
pub(crate) fn ill(directory: &Path) -> PathBuf {
    directory.join("ill")
}

/// A clock that all processes share.
pub(crate) fn now() -> Duration {
    SystemTime::UNIX_EPOCH.elapsed().unwrap()
}

/// What one process wrote down.
pub(crate) struct Book {
    pub(crate) pid: u32,
    /// When it began to listen.
    pub(crate) since: Duration,
    pub(crate) entries: Vec<Entry>,
}

/// A request came or went.
pub(crate) struct Entry {
    pub(crate) at: Duration,
    /// With it, or without it.
    pub(crate) in_flight: usize,
    pub(crate) came: bool,
    /// The parameter `caller` of its query.
    pub(crate) caller: String,
}

impl Book {
    fn read(pid: u32, text: &str) -> Option<Self> {
        // Killed while it wrote, it leaves a line without an end.
        let whole = &text[..=text.rfind('\n')?];
        let mut lines = whole.lines().map(|line| line.split(' '));
        let at = |word: &str| Duration::from_micros(word.parse().unwrap());
        Some(Self {
            pid,
            since: at(lines.next()?.next()?),
            entries: lines
                .map(|mut words| {
                    let mut word = || words.next().unwrap();
                    Entry {
                        at: at(word()),
                        in_flight: word().parse().unwrap(),
                        came: word() == "came",
                        caller: word().to_owned(),
                    }
                })
                .collect(),
        })
    }

    pub(crate) fn highest(&self) -> usize {
        let in_flight = self.entries.iter().map(|entry| entry.in_flight);
        in_flight.max().unwrap_or(0)
    }

    /// The time it spent with each of its requests, until this end.
    pub(crate) fn worked(&self, end: Duration) -> Duration {
        let ends = self.entries.iter().skip(1).map(|entry| entry.at);
        let spans = self.entries.iter().zip(ends.chain([end]));
        spans
            .map(|(entry, end)| {
                end.saturating_sub(entry.at) * u32::try_from(entry.in_flight).unwrap()
            })
            .sum()
    }
}

/// Of all processes that have listened so far.
pub(crate) fn books(directory: &Path) -> Vec<Book> {
    let files = fs::read_dir(directory).unwrap();
    files
        .filter_map(|file| {
            let file = file.unwrap();
            let pid = file.file_name().to_str()?.parse().ok()?;
            Book::read(pid, &fs::read_to_string(file.path()).unwrap())
        })
        .collect()
}

/// The pen of a [`Book`].
struct Bookkeeper {
    page: Mutex<Page>,
    ill: PathBuf,
}

struct Page {
    in_flight: usize,
    file: File,
}

impl Bookkeeper {
    fn new(directory: &Path) -> Self {
        let mut file = File::create(directory.join(std::process::id().to_string())).unwrap();
        writeln!(file, "{}", now().as_micros()).unwrap();
        Self {
            page: Mutex::new(Page { in_flight: 0, file }),
            ill: ill(directory),
        }
    }

    fn came(&self, caller: &str) {
        let mut page = self.page.lock().unwrap();
        page.in_flight += 1;
        page.write("came", caller);
    }

    fn went(&self, caller: &str) {
        let mut page = self.page.lock().unwrap();
        page.in_flight -= 1;
        page.write("went", caller);
    }
}

impl Page {
    /// In one piece: this process may be killed at any time.
    fn write(&mut self, what: &str, caller: &str) {
        let line = format!("{} {} {what} {caller}\n", now().as_micros(), self.in_flight);
        self.file.write_all(line.as_bytes()).unwrap();
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
    let books = Arc::new(Bookkeeper::new(Path::new(&directory)));
    for stream in listener.incoming() {
        let (stream, books) = (stream.unwrap(), books.clone());
        // It ends with its connection, for whatever reason that ends.
        thread::spawn(move || serve(&stream, &books));
    }
}

fn serve(stream: &TcpStream, books: &Bookkeeper) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut reader = BufReader::new(stream);
    loop {
        stream.set_read_timeout(None).ok()?;
        let head = read_head(&mut reader)?;
        let target = head.split(' ').nth(1)?.to_owned();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        if path == "/health" {
            let status = match books.ill.exists() {
                true => "503 Service Unavailable",
                false => "200 OK",
            };
            respond(stream, status, "")?;
            continue;
        }
        let caller = parameter(query, "caller").unwrap_or("unnamed");
        books.came(caller);
        let worked = work(stream, &mut reader, &head, path, query);
        // Before the last byte: who has the whole answer may call again.
        books.went(caller);
        match worked? {
            Work::Answer(body) => respond(stream, "200 OK", &body)?,
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

fn respond(stream: &TcpStream, status: &str, body: &str) -> Option<()> {
    let length = body.len();
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}");
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
