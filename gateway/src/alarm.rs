//! Wake-ups of a task from any thread.

use std::sync::{Mutex, PoisonError};
use std::task::Waker;

/// Wakes the task that registered last.
#[derive(Default)]
pub struct Alarm {
    waker: Mutex<Option<Waker>>,
}

impl Alarm {
    /// Wakes this task from now on. Called before looking at what a ring announces, so that none is lost.
    pub fn register(&self, waker: &Waker) {
        let mut registered = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *registered {
            Some(old) => old.clone_from(waker),
            None => *registered = Some(waker.clone()),
        }
    }

    /// Wakes it.
    pub fn ring(&self) {
        let registered = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waker) = &*registered {
            waker.wake_by_ref();
        }
    }
}
