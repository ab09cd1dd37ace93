//! `--watch`: what looks again and again.

use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::Args;

use super::{CellArgs, CliError, Exit, print, print_on, say};

const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Flag of the verbs that show how something is now.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(super) struct WatchArgs {
    /// Look again every second until interrupted
    #[arg(long)]
    pub(super) watch: bool,
}

impl WatchArgs {
    /// Looks once, or every second. While watching, a server that does not answer now may do so at the next look.
    ///
    /// # Errors
    /// Those of `look`.
    pub(super) fn run(
        self,
        args: &CellArgs,
        mut look: impl FnMut() -> Result<String, CliError>,
    ) -> Result<(), CliError> {
        if !self.watch {
            return print(&look()?);
        }
        let terminal = io::stdout().is_terminal() && !args.json;
        loop {
            let text = look();
            if terminal {
                // Home, and clear to the end.
                print("\x1b[H\x1b[2J")?;
            }
            match text {
                Ok(text) if print_on(&text)? => {}
                // Nobody reads it any more.
                Ok(_) => return Ok(()),
                Err(error) if error.exit == Exit::NoQuorum => say(error),
                Err(error) => return Err(error),
            }
            std::thread::sleep(WATCH_EVERY);
        }
    }
}
