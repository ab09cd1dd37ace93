//! Stop signals.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

/// Status of a process that a second Ctrl-C ended at once: 128 + SIGINT.
const EXIT_INTERRUPTED: i32 = 130;

/// Calls `stop` at the first SIGTERM or SIGINT, from a thread of its own. A SIGINT after that ends the
/// process at once, whatever its threads do.
///
/// # Errors
/// If the operating system takes no handler or gives no thread.
pub fn on_stop_signal(stop: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let stopping = Arc::new(AtomicBool::new(false));
    // In this order: the first signal finds the flag unset, sets it, and only the next one exits.
    flag::register_conditional_shutdown(SIGINT, EXIT_INTERRUPTED, Arc::clone(&stopping))?;
    flag::register(SIGINT, Arc::clone(&stopping))?;
    flag::register(SIGTERM, stopping)?;
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.forever().next().is_some() {
                stop();
            }
            // The handlers stay: a later SIGTERM changes nothing.
            for _ in signals.forever() {}
        })?;
    Ok(())
}
