//! How far a command is that takes a while, for a person who waits at a terminal.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A progress bar for what takes less would only flicker.
const SHOWN_AFTER: Duration = Duration::from_secs(1);

/// A progress bar on stderr: after a second, and only if that is a terminal. It goes away when this is dropped.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    /// Of so many bytes; `what` is such as `exporting`.
    pub fn new(what: &'static str, bytes: u64) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::hidden());
        let template = "{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        Progress {
            bar,
            started: Instant::now(),
        }
    }

    /// So many more bytes are done.
    pub fn advance(&self, bytes: u64) {
        self.show();
        self.bar.inc(bytes);
    }

    /// So many bytes are done, which may be less than before if it had to begin again.
    pub fn reach(&self, bytes: u64) {
        self.show();
        self.bar.set_position(bytes);
    }

    fn show(&self) {
        if self.bar.is_hidden()
            && self.started.elapsed() > SHOWN_AFTER
            && io::stderr().is_terminal()
        {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
