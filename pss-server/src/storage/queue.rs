//! Jobs for threads that wait.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A queue that threads wait at.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    ready: Condvar,
}

struct State<T> {
    jobs: VecDeque<T>,
    closed: bool,
    /// Threads that wait; without one, the system call that wakes can be saved.
    waiting: usize,
}

/// What came of waiting.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Waited {
    /// There are jobs.
    Jobs,
    /// The time is over.
    TimedOut,
    /// There are no jobs and will be none.
    Closed,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Queue<T> {
        let state = State {
            jobs: VecDeque::new(),
            closed: false,
            waiting: 0,
        };
        Queue {
            state: Mutex::new(state),
            ready: Condvar::new(),
        }
    }

    pub(super) fn push(&self, job: T) {
        self.push_all([job]);
    }

    pub(super) fn push_all(&self, jobs: impl IntoIterator<Item = T>) {
        let mut state = self.lock();
        state.jobs.extend(jobs);
        let wake = state.waiting > 0;
        drop(state);
        if wake {
            self.ready.notify_one();
        }
    }

    /// No jobs will follow; those that wait are still done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_all();
    }

    /// No jobs will follow, and those that wait are forgotten.
    pub(super) fn abandon(&self) {
        self.lock().jobs.clear();
        self.close();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().jobs.is_empty()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Moves all jobs to `into`, after waiting for some.
    pub(super) fn take_all(&self, into: &mut Vec<T>, patience: Option<Duration>) -> Waited {
        let (mut state, waited) = self.wait(patience);
        into.extend(state.jobs.drain(..));
        waited
    }

    /// The next job, after waiting for it.
    ///
    /// # Errors
    /// [`Waited::TimedOut`] or [`Waited::Closed`].
    pub(super) fn take(&self, patience: Option<Duration>) -> Result<T, Waited> {
        let (mut state, waited) = self.wait(patience);
        state.jobs.pop_front().ok_or(waited)
    }

    fn wait(&self, patience: Option<Duration>) -> (MutexGuard<'_, State<T>>, Waited) {
        let until = patience.map(|patience| Instant::now() + patience);
        let mut state = self.lock();
        loop {
            if !state.jobs.is_empty() {
                return (state, Waited::Jobs);
            }
            if state.closed {
                return (state, Waited::Closed);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return (state, Waited::TimedOut);
            }
            state.waiting += 1;
            state = match left {
                Some(left) => {
                    let waited = self.ready.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .ready
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
            state.waiting -= 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn jobs_come_in_order_and_all_at_once() {
        let queue = Queue::new();
        let mut jobs = Vec::new();
        let no_time = Some(Duration::ZERO);
        assert_eq!(queue.take_all(&mut jobs, no_time), Waited::TimedOut);
        queue.push(1);
        queue.push_all([2, 3]);
        assert_eq!(queue.take(None), Ok(1));
        assert_eq!(queue.take_all(&mut jobs, None), Waited::Jobs);
        assert_eq!(jobs, [2, 3]);
    }

    #[test]
    fn a_closed_queue_is_emptied_first() {
        let queue = Queue::new();
        queue.push(1);
        queue.close();
        assert_eq!(queue.take(None), Ok(1));
        assert_eq!(queue.take(None), Err(Waited::Closed));
        queue.push(2);
        queue.abandon();
        assert_eq!(queue.take(None), Err(Waited::Closed));
    }

    #[test]
    fn who_waits_is_woken() {
        let queue = Arc::new(Queue::new());
        let other = Arc::clone(&queue);
        let waiting = std::thread::spawn(move || (other.take(None), other.take(None)));
        queue.push(7);
        while queue.lock().waiting == 0 {
            std::thread::yield_now();
        }
        queue.close();
        assert_eq!(waiting.join().unwrap(), (Ok(7), Err(Waited::Closed)));
    }
}
