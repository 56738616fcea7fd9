//! `weir status`: every version's state, instances, slots, queue, what was last
//! decided and why, and what goes wrong. [`seen`] asks the server, [`frame`]
//! lays it out, [`terminal`] keeps it on the screen.

use std::{pin::Pin, time::Duration};

use anyhow::Context;
use jiff::Timestamp;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};
use uuid::Uuid;
use weir_control::model::IsoDuration;

use self::{
    frame::Frame,
    seen::{Seen, look},
    terminal::{Key, Terminal},
};
use super::{
    Common, Output,
    api::Client,
    screen::{Screen, size},
    show_line,
};

mod frame;
mod seen;
mod terminal;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "On a terminal it refreshes itself; q or Ctrl-C ends it, the arrows scroll.\n\
                  SLOTS are busy/all; DECISION is how many instances are wanted, why, and since when."
)]
pub struct Status {
    #[command(flatten)]
    common: Common,
    /// This function only, with its instances and decisions: its ID, or its name where that is unique
    function: Option<String>,
    /// Show every instance too
    #[arg(long)]
    instances: bool,
    /// Go on, at this interval, an ISO 8601 duration [default: on a terminal PT2S, else once]
    #[arg(long, value_name = "INTERVAL", num_args = 0..=1, default_missing_value = "PT2S",
          value_parser = interval)]
    watch: Option<IsoDuration>,
    /// Once, also on a terminal
    #[arg(long, conflicts_with = "watch")]
    once: bool,
}

const INTERVAL: Duration = Duration::from_secs(2);
const SHORTEST: Duration = Duration::from_millis(100);

fn interval(s: &str) -> Result<IsoDuration, String> {
    match s.parse::<IsoDuration>() {
        Ok(duration) if duration.0 < SHORTEST => Err("must be PT0.1S at least".into()),
        Ok(duration) => Ok(duration),
        Err(why) => Err(format!("{why}; a function is named before --watch")),
    }
}

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let client = Client::new(&self.common)?;
        let function = match &self.function {
            Some(wanted) => Some(
                client
                    .function(wanted)
                    .await?
                    .first()
                    .context("the function has no version")?
                    .id,
            ),
            None => None,
        };
        let live = !self.once && self.common.output == Output::Table && size().is_some();
        if live {
            let every = self.watch.map_or(INTERVAL, |w| w.0);
            return self.live(&client, function, every).await;
        }
        let mut next = Instant::now();
        let mut first = true;
        loop {
            let seen = look(&client, function).await?;
            let shown = match (self.common.output, self.watch) {
                (Output::Json, None) => serde_json::to_string_pretty(&seen.json())?,
                // A document a line, for what reads a stream of them.
                (Output::Json, Some(_)) => seen.json().to_string(),
                (Output::Table, _) => {
                    let frame = self.frame(&client, &seen, None, Screen::stdout());
                    let gap = if first { "" } else { "\n" };
                    format!("{gap}{}", frame.whole())
                }
            };
            let read = show_line(&shown)?;
            first = false;
            let Some(every) = self.watch else {
                return Ok(());
            };
            if !read {
                return Ok(());
            }
            next = (next + every.0).max(Instant::now());
            sleep_until(next).await;
        }
    }

    fn frame(&self, client: &Client, seen: &Seen, trouble: Option<&str>, screen: Screen) -> Frame {
        Frame::of(
            seen,
            &frame::Wish {
                address: client.address(),
                instances: self.instances || self.function.is_some(),
                decisions: self.function.is_some(),
                trouble,
                now: Timestamp::now(),
                screen,
            },
        )
    }

    /// Until somebody ends it.
    async fn live(
        &self,
        client: &Client,
        function: Option<Uuid>,
        every: Duration,
    ) -> anyhow::Result<()> {
        // What is wrong from the start is told on the terminal as it is.
        let mut seen = look(client, function).await?;
        let mut trouble: Option<String> = None;
        let mut resized = signal(SignalKind::window_change())?;
        let mut ended = [
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ];
        let mut terminal = Terminal::take()?;
        let mut from = 0;
        let mut next = Instant::now() + every;
        let mut asking: Option<Pin<Box<dyn Future<Output = anyhow::Result<Seen>> + '_>>> = None;
        loop {
            let (columns, lines) = size().unwrap_or((80, 24));
            let screen = Screen {
                width: Some(columns),
                ..Screen::stdout()
            };
            let frame = self.frame(client, &seen, trouble.as_deref(), screen);
            from = from.min(frame.furthest(lines));
            if !terminal.show(&frame.part(lines, from)) {
                return Ok(());
            }
            let [interrupt, terminate, hangup] = &mut ended;
            tokio::select! {
                key = terminal.key() => match key {
                    Key::Quit => return Ok(()),
                    Key::Up(by) => from = from.saturating_sub(by),
                    Key::Down(by) => from += by,
                    Key::Other => {}
                },
                _ = resized.recv() => {}
                _ = interrupt.recv() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
                _ = hangup.recv() => return Ok(()),
                () = sleep_until(next), if asking.is_none() => {
                    asking = Some(Box::pin(look(client, function)));
                }
                answer = answered(&mut asking), if asking.is_some() => {
                    asking = None;
                    next = Instant::now() + every;
                    match answer {
                        Ok(news) => {
                            seen = news;
                            trouble = None;
                        }
                        // It may be back soon: the last answer stays, marked as old.
                        Err(error) => trouble = Some(error.to_string()),
                    }
                }
            }
        }
    }
}

async fn answered<T>(asking: &mut Option<Pin<Box<dyn Future<Output = T> + '_>>>) -> T {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}
