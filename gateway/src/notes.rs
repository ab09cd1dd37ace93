//! What was done to a gateway while it runs, by whom: noted among the events of the cell (`pss events`).
//!
//! A task of its own does it, in a session of its own for each user, so that the events say who asked, and neither
//! data nor answers wait for a cell that does not answer.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pss_core::client::{Cell, CellConfig, ClientError};
use pss_core::entry::NOTE_BYTES_MAX;
use pss_core::wire::client::ReplyError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

/// Most notes that wait.
const WAITING_MAX: usize = 256;
/// Stands for what a note has no room for.
const CUT: &str = "...";

/// How long things may take.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// The cell is tried for so long: it elects a leader, or comes back after a power cut.
    note: Duration,
    /// An answer to whoever asked waits for its note at most so long.
    answer: Duration,
    /// And so long after one has waited in vain: a script may do a hundred things.
    answer_after_late: Duration,
    /// A session that has noted something is kept for so long, for the next one.
    linger: Duration,
    /// When the gateway stops, what waits has so long.
    close: Duration,
}

const TIMES: Times = Times {
    note: Duration::from_secs(60),
    answer: Duration::from_secs(1),
    answer_after_late: Duration::from_millis(50),
    linger: Duration::from_secs(2),
    close: Duration::from_secs(2),
};

/// Why something may be missing from the events of the cell.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NotNoted {
    /// The cell was not quick enough for the answer.
    #[error("the cell has not answered yet; it is tried for another minute")]
    Late,
    /// Too much waits.
    #[error("too much waits to be noted")]
    Full,
    /// The gateway ends.
    #[error("the gateway stops")]
    Stopping,
    /// The servers do not know the request.
    #[error("the servers are of an older version")]
    OldServers,
    /// The cell cannot, or does not answer.
    #[error(transparent)]
    Cell(ClientError),
}

impl From<ClientError> for NotNoted {
    fn from(error: ClientError) -> NotNoted {
        match error {
            ClientError::Reply(ReplyError::Invalid) => NotNoted::OldServers,
            error => NotNoted::Cell(error),
        }
    }
}

/// Has the cell note what is done to this gateway.
#[derive(Debug)]
pub struct Notes {
    /// None once the gateway stops.
    queue: Mutex<Option<mpsc::Sender<Note>>>,
    task: Mutex<Option<JoinHandle<()>>>,
    closing: watch::Sender<bool>,
    late: Arc<AtomicBool>,
    times: Times,
}

#[derive(Debug)]
struct Note {
    user: String,
    text: String,
    deadline: Instant,
    outcome: oneshot::Sender<Result<(), NotNoted>>,
}

/// A note on its way. It goes on when this is dropped.
#[derive(Debug)]
#[must_use = "whoever asked is told if it cannot be noted"]
pub struct Noting {
    outcome: oneshot::Receiver<Result<(), NotNoted>>,
    late: Arc<AtomicBool>,
    times: Times,
}

impl Notes {
    /// Starts the task on the current tokio runtime. `cell` is as for [`Cell::connect`]; its user and its time for
    /// requests do not count.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(cell: CellConfig) -> Arc<Notes> {
        Notes::with(cell, TIMES)
    }

    fn with(cell: CellConfig, times: Times) -> Arc<Notes> {
        let (sender, queue) = mpsc::channel(WAITING_MAX);
        let (closing, stops) = watch::channel(false);
        let late = Arc::new(AtomicBool::new(false));
        let writer = Writer {
            cell: CellConfig {
                request_timeout: times.note,
                ..cell
            },
            times,
            open: None,
            stopped: Box::pin(stopped(stops, times.close)),
            has_stopped: false,
            late: Arc::clone(&late),
        };
        Arc::new(Notes {
            queue: Mutex::new(Some(sender)),
            task: Mutex::new(Some(tokio::spawn(writer.run(queue)))),
            closing,
            late,
            times,
        })
    }

    /// Notes what `user` did, or tried; an empty user is unknown. It is in this gateway's log whatever comes of it.
    pub fn note(&self, user: &str, text: &str) -> Noting {
        info!(user, "administration: {text}");
        let (outcome, noted) = oneshot::channel();
        let note = Note {
            user: user.to_owned(),
            text: shortened(text),
            deadline: Instant::now() + self.times.note,
            outcome,
        };
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        match &*queue {
            None => note.end(Err(NotNoted::Stopping)),
            Some(queue) => match queue.try_send(note) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(note)) => note.end(Err(NotNoted::Full)),
                Err(mpsc::error::TrySendError::Closed(note)) => note.end(Err(NotNoted::Stopping)),
            },
        }
        Noting {
            outcome: noted,
            late: Arc::clone(&self.late),
            times: self.times,
        }
    }

    /// Takes no more notes, and returns when those that wait are noted, or cannot be: after some seconds at most.
    pub async fn close(&self) {
        let queue = self.queue.lock();
        drop(queue.unwrap_or_else(PoisonError::into_inner).take());
        self.closing.send_replace(true);
        let task = self
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(task) = task {
            // Ending the session has its own limit.
            let _ = task.await;
        }
    }
}

/// Waits until the gateway has been stopping for so long.
async fn stopped(mut stops: watch::Receiver<bool>, within: Duration) {
    // Gone means that nobody can close it any more, nor ask for anything.
    let _ = stops.wait_for(|stops| *stops).await;
    sleep(within).await;
}

impl Noting {
    /// What came of it, as far as an answer waits for it.
    ///
    /// # Errors
    /// [`NotNoted`].
    pub async fn outcome(self) -> Result<(), NotNoted> {
        let patience = match self.late.load(Ordering::Relaxed) {
            false => self.times.answer,
            true => self.times.answer_after_late,
        };
        match timeout(patience, self.outcome).await {
            Ok(outcome) => outcome.unwrap_or(Err(NotNoted::Stopping)),
            Err(_) => {
                self.late.store(true, Ordering::Relaxed);
                Err(NotNoted::Late)
            }
        }
    }
}

impl Note {
    fn end(self, outcome: Result<(), NotNoted>) {
        if let Err(error) = &outcome {
            warn!(
                user = self.user,
                "'{}' may be missing from 'pss events': {error}", self.text
            );
        }
        // Nobody may wait for it.
        let _ = self.outcome.send(outcome);
    }
}

/// The task.
struct Writer {
    cell: CellConfig,
    times: Times,
    /// The session that noted last, and its user.
    open: Option<(String, Arc<Cell>)>,
    stopped: Pin<Box<dyn Future<Output = ()> + Send>>,
    has_stopped: bool,
    late: Arc<AtomicBool>,
}

impl Writer {
    async fn run(mut self, mut queue: mpsc::Receiver<Note>) {
        loop {
            let next = match &self.open {
                None => queue.recv().await,
                Some(_) => match timeout(self.times.linger, queue.recv()).await {
                    Ok(next) => next,
                    Err(_) => {
                        self.close().await;
                        continue;
                    }
                },
            };
            let Some(note) = next else {
                return self.close().await;
            };
            let outcome = self.write(&note).await;
            match &outcome {
                Ok(()) => self.late.store(false, Ordering::Relaxed),
                // Whatever is wrong, the next one does not wait behind it; nor is this one noted much later.
                Err(_) => self.open = None,
            }
            note.end(outcome);
        }
    }

    async fn write(&mut self, note: &Note) -> Result<(), NotNoted> {
        if self.has_stopped {
            return Err(NotNoted::Stopping);
        }
        let cell = self.session(&note.user).await;
        tokio::select! {
            noted = timeout_at(note.deadline, cell.note(&note.text)) => match noted {
                Ok(noted) => Ok(noted?),
                Err(_) => Err(cell.unavailable().into()),
            },
            () = &mut self.stopped => {
                self.has_stopped = true;
                Err(NotNoted::Stopping)
            }
        }
    }

    /// A session of this user.
    async fn session(&mut self, user: &str) -> Arc<Cell> {
        if let Some((theirs, cell)) = &self.open
            && theirs == user
        {
            return Arc::clone(cell);
        }
        self.close().await;
        let cell = Cell::connect(CellConfig {
            client_user: user.to_owned(),
            ..self.cell.clone()
        });
        self.open = Some((user.to_owned(), Arc::clone(&cell)));
        cell
    }

    async fn close(&mut self) {
        if let Some((_, cell)) = self.open.take() {
            cell.close().await;
        }
    }
}

/// What the cell takes of a text, with a sign that more was said.
fn shortened(text: &str) -> String {
    if text.len() <= NOTE_BYTES_MAX {
        return text.to_owned();
    }
    let mut end = NOTE_BYTES_MAX - CUT.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{CUT}", &text[..end])
}

#[cfg(test)]
mod tests {
    use pss_core::types::ServerId;

    use super::*;

    const SHORT: Times = Times {
        note: Duration::from_millis(1500),
        answer: Duration::from_millis(300),
        answer_after_late: Duration::from_millis(20),
        linger: Duration::from_millis(100),
        close: Duration::from_millis(100),
    };

    /// Nobody listens there.
    fn nowhere() -> CellConfig {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        CellConfig::new(vec![(ServerId(0), port.local_addr().unwrap())], "test")
    }

    #[test]
    fn long_texts_end_with_a_sign() {
        assert_eq!(shortened("kick session 1"), "kick session 1");
        let exact = "x".repeat(NOTE_BYTES_MAX);
        assert_eq!(shortened(&exact), exact);
        let long = shortened(&"é".repeat(NOTE_BYTES_MAX));
        assert!(long.len() <= NOTE_BYTES_MAX && long.ends_with("é..."));
    }

    #[tokio::test]
    async fn a_cell_that_is_away_delays_no_answer_for_long() {
        let notes = Notes::with(nowhere(), SHORT);
        let begin = Instant::now();
        let first = notes.note("alice", "one").outcome().await;
        assert!(matches!(first, Err(NotNoted::Late)), "{first:?}");
        assert!(begin.elapsed() >= SHORT.answer);
        // The next ones hardly wait.
        let begin = Instant::now();
        let second = notes.note("bob", "two").outcome().await;
        assert!(matches!(second, Err(NotNoted::Late)), "{second:?}");
        assert!(begin.elapsed() < SHORT.answer);
        // Whoever has the time is told why.
        let third = notes.note("bob", "three").outcome.await;
        let third = third.unwrap();
        assert!(
            matches!(third, Err(NotNoted::Cell(ClientError::Unavailable { .. }))),
            "{third:?}"
        );
    }

    #[tokio::test]
    async fn what_waits_is_bounded() {
        let notes = Notes::with(nowhere(), SHORT);
        // The task has not run yet.
        let waiting: Vec<Noting> = (0..WAITING_MAX).map(|_| notes.note("", "x")).collect();
        let full = notes.note("", "x").outcome().await;
        assert!(matches!(full, Err(NotNoted::Full)), "{full:?}");
        drop(waiting);
    }

    #[tokio::test]
    async fn stopping_does_not_wait_for_a_cell_that_is_away() {
        let times = Times {
            note: Duration::from_secs(600),
            ..SHORT
        };
        let notes = Notes::with(nowhere(), times);
        let waiting = [notes.note("a", "one"), notes.note("b", "two")];
        let begin = Instant::now();
        notes.close().await;
        assert!(begin.elapsed() < Duration::from_secs(10));
        for noting in waiting {
            let outcome = noting.outcome().await;
            assert!(matches!(outcome, Err(NotNoted::Stopping)), "{outcome:?}");
        }
        let late = notes.note("a", "three").outcome().await;
        assert!(matches!(late, Err(NotNoted::Stopping)), "{late:?}");
    }
}
