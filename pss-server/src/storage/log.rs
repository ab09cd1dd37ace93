//! The log thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pss_core::disk::Disk;
use pss_core::entry::Entry;
use pss_core::log::Log;
use pss_core::paxos::output::{Persist, WriteId};
use pss_core::storage::Identity;
use pss_core::types::Slot;

use crate::node::ServerError;
use crate::node::inbox::Event;
use crate::storage::Reporter;
use crate::storage::queue::{Queue, Waited};

/// After this time without a write the log is marked as synced up to its end.
const IDLE: Duration = Duration::from_millis(100);
/// How often it is reported how full the disk is.
const REPORT: Duration = Duration::from_secs(1);
/// The same while it is written to and little is left: until the leader knows that nothing is left, it
/// lets writes in, for which the reserve has to suffice.
const REPORT_LOW: Duration = Duration::from_millis(10);
/// What is little: what a fast disk takes in two seconds.
const LOW_BYTES: u64 = 4 << 30;

/// What the log thread does.
pub(crate) enum LogJob {
    /// Make something durable.
    Persist {
        /// Reported when it is.
        write: WriteId,
        /// What.
        what: Persist,
    },
    /// A checkpoint holds everything up to this slot.
    Trim(Slot),
    /// The server stops: write down that the log is whole.
    Finish,
}

/// The thread's state.
pub(super) struct LogThread {
    pub(super) queue: Arc<Queue<LogJob>>,
    pub(super) reporter: Reporter,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) log: Log,
    pub(super) identity: Identity,
    /// The node's chosen slot, kept up to date by it: a hint for the next start.
    pub(super) chosen: Arc<AtomicU64>,
    /// What the log may grow to; so much of the disk's free space is not for chunks.
    pub(super) log_bytes_max: u64,
    /// As it was reported last.
    pub(super) free_bytes: u64,
}

type Append<'a> = (Option<Slot>, &'a [Entry], Slot);

impl LogThread {
    pub(super) fn run(mut self) {
        if let Err(error) = self.work() {
            self.reporter.failed(error);
        }
    }

    fn work(&mut self) -> Result<(), ServerError> {
        let mut jobs = Vec::new();
        let mut unmarked = false;
        self.report()?;
        let mut reported = Instant::now();
        loop {
            let until_report = REPORT.saturating_sub(reported.elapsed());
            let patience = if unmarked {
                until_report.min(IDLE)
            } else {
                until_report
            };
            let mut report_every = REPORT;
            match self.queue.take_all(&mut jobs, Some(patience)) {
                Waited::Closed => return Ok(()),
                Waited::Jobs => {
                    unmarked = true;
                    if self.free_bytes < LOW_BYTES {
                        report_every = REPORT_LOW;
                    }
                    self.perform(&jobs)?;
                    jobs.clear();
                }
                Waited::TimedOut => {
                    if unmarked
                        && patience == IDLE
                        && let Some(chosen) = chosen_when_idle(&self.queue, &self.chosen)
                    {
                        self.mark(chosen)?;
                        unmarked = false;
                    }
                }
            }
            if reported.elapsed() >= report_every {
                self.report()?;
                reported = Instant::now();
            }
        }
    }

    /// Does jobs in order, consecutive appends with as few writes as possible.
    fn perform(&mut self, jobs: &[LogJob]) -> Result<(), ServerError> {
        let mut appends: Vec<Append<'_>> = Vec::new();
        let mut done: Vec<WriteId> = Vec::new();
        for job in jobs {
            if let LogJob::Persist {
                write,
                what:
                    Persist::Append {
                        truncate_after,
                        entries,
                        chosen,
                    },
            } = job
            {
                appends.push((*truncate_after, entries, *chosen));
                done.push(*write);
                continue;
            }
            self.append(&mut appends, &mut done)?;
            match job {
                LogJob::Persist { write, what } => {
                    match what {
                        Persist::Promise(ballot) => self.identity.set_promise(*ballot)?,
                        Persist::Rejoining(life) => self.identity.set_rejoining(*life)?,
                        Persist::Reset { base } => self.log.reset(*base)?,
                        Persist::Append { .. } => unreachable!("appends were taken above"),
                    }
                    self.reporter.inbox.push(Event::Persisted(*write));
                }
                LogJob::Trim(slot) => {
                    self.log.trim(*slot)?;
                    self.report()?;
                }
                // Nothing is pushed or stored after it.
                LogJob::Finish => self.mark(Slot(self.chosen.load(Ordering::Acquire)))?,
            }
        }
        self.append(&mut appends, &mut done)
    }

    fn append(
        &mut self,
        appends: &mut Vec<Append<'_>>,
        done: &mut Vec<WriteId>,
    ) -> Result<(), ServerError> {
        if !appends.is_empty() {
            self.log.append_many(appends.drain(..))?;
            self.reporter
                .inbox
                .push_all(done.drain(..).map(Event::Persisted));
        }
        Ok(())
    }

    fn mark(&mut self, chosen: Slot) -> Result<(), ServerError> {
        self.log.mark_idle(chosen.min(self.log.last().slot))?;
        Ok(())
    }

    fn report(&mut self) -> Result<(), ServerError> {
        let (free_bytes, total_bytes) = self.disk.space().map_err(ServerError::Space)?;
        let growth = self.log_bytes_max.saturating_sub(self.log.bytes());
        self.free_bytes = free_bytes.saturating_sub(growth);
        self.reporter.inbox.push(Event::Space {
            log_bytes: self.log.kept_bytes(),
            free_bytes: self.free_bytes,
            total_bytes,
            log_first: self.log.first_slot(),
        });
        Ok(())
    }
}

/// The node's chosen slot, if every job that was pushed before it was stored has been taken: then it speaks
/// of the entries that are in the log. `None` if jobs wait; one of them may replace some of these entries,
/// and the slot may speak of those that follow.
fn chosen_when_idle<T>(queue: &Queue<T>, chosen: &AtomicU64) -> Option<Slot> {
    let chosen = Slot(chosen.load(Ordering::Acquire));
    queue.is_empty().then_some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_idle_marker_speaks_of_entries_that_are_not_in_the_log_yet() {
        const JOBS: u64 = 300_000;
        let queue = Arc::new(Queue::new());
        let chosen = Arc::new(AtomicU64::new(0));
        let (jobs, stored) = (Arc::clone(&queue), Arc::clone(&chosen));
        let node = std::thread::spawn(move || {
            for job in 1..=JOBS {
                jobs.push(job);
                stored.store(job, Ordering::Release);
            }
        });
        let mut taken = Vec::new();
        let mut done = 0;
        while done < JOBS {
            if queue.take_all(&mut taken, Some(Duration::ZERO)) == Waited::Jobs {
                done = taken.drain(..).next_back().unwrap_or(done);
            }
            if let Some(chosen) = chosen_when_idle(&queue, &chosen) {
                assert!(chosen.0 <= done, "{chosen} is called chosen behind {done}");
            }
        }
        node.join().unwrap();
    }
}
