//! The terminal while `weir status` has it: a screen of its own, keys one by one.
//! It is given back as it was when the guard is dropped.

use std::io::{self, IsTerminal, Read, Write, stdin, stdout};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// The other screen, no cursor, no wrapping of what is too long.
const TAKE: &[u8] = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J";
const GIVE_BACK: &[u8] = b"\x1b[?7h\x1b[?25h\x1b[?1049l";

pub(super) struct Terminal {
    /// How it was; none: nobody types, as standard input is no terminal.
    before: Option<Termios>,
    keys: UnboundedReceiver<Key>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Quit,
    /// So many lines.
    Up(usize),
    Down(usize),
    Other,
}

const PAGE: usize = 10;
const ALL: usize = usize::MAX / 2;

impl Key {
    fn of(bytes: &[u8]) -> Self {
        match bytes {
            b"q" | b"Q" | [3 | 4] => Self::Quit,
            b"k" | b"\x1b[A" | b"\x1bOA" => Self::Up(1),
            b"j" | b"\x1b[B" | b"\x1bOB" => Self::Down(1),
            b"b" | b"\x1b[5~" => Self::Up(PAGE),
            b" " | b"\x1b[6~" => Self::Down(PAGE),
            b"g" | b"\x1b[H" => Self::Up(ALL),
            b"G" | b"\x1b[F" => Self::Down(ALL),
            _ => Self::Other,
        }
    }
}

impl Terminal {
    pub(super) fn take() -> io::Result<Self> {
        let (send, keys) = unbounded_channel();
        let mut before = None;
        if stdin().is_terminal() {
            let was = tcgetattr(stdin())?;
            let mut own = was.clone();
            // Ctrl-C is a key too, so that no signal ends it half way.
            own.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
            tcsetattr(stdin(), OptionalActions::Now, &own)?;
            before = Some(was);
            // Reads block: it waits for keys for as long as the process lives.
            std::thread::spawn(move || {
                let mut bytes = [0; 16];
                while let Ok(count @ 1..) = stdin().read(&mut bytes) {
                    if send.send(Key::of(&bytes[..count])).is_err() {
                        break;
                    }
                }
            });
        }
        let terminal = Self { before, keys };
        write(TAKE)?;
        Ok(terminal)
    }

    /// The next key; never, where nobody types.
    pub(super) async fn key(&mut self) -> Key {
        match self.keys.recv().await {
            Some(key) => key,
            None => std::future::pending().await,
        }
    }

    /// Puts these lines on the screen, over what was there; false: it is gone.
    pub(super) fn show(&mut self, lines: &[String]) -> bool {
        let mut frame = String::from("\x1b[H");
        for (number, line) in lines.iter().enumerate() {
            if number > 0 {
                frame.push_str("\r\n");
            }
            // Erased before it is written: behind a full line the cursor is still on its last column.
            frame.push_str("\x1b[K");
            frame.push_str(line);
        }
        write(frame.as_bytes()).is_ok()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        _ = write(GIVE_BACK);
        if let Some(before) = &self.before {
            _ = tcsetattr(stdin(), OptionalActions::Now, before);
        }
    }
}

fn write(bytes: &[u8]) -> io::Result<()> {
    let mut out = stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_known_by_their_bytes() {
        for (bytes, key) in [
            (&b"q"[..], Key::Quit),
            (b"\x03", Key::Quit),
            (b"\x1b[A", Key::Up(1)),
            (b"j", Key::Down(1)),
            (b"\x1b[6~", Key::Down(PAGE)),
            (b"x", Key::Other),
            (b"\x1b", Key::Other),
        ] {
            assert_eq!(Key::of(bytes), key);
        }
    }
}
