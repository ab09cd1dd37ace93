//! The task set of a logical unit: which task may run when (SAM-5 §8).

use std::collections::{BTreeSet, VecDeque};

use super::actions::TaskAttribute;

/// Tasks of one logical unit, by number; a higher number came later.
#[derive(Debug, Default)]
pub(super) struct TaskSet {
    all: BTreeSet<u64>,
    ordered: BTreeSet<u64>,
    /// Those that may not run yet, in the order in which they came.
    waiting: VecDeque<(u64, TaskAttribute)>,
}

impl TaskSet {
    /// How many tasks there are.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// A task came. Returns whether it may run; else [`TaskSet::remove`] will say when.
    pub(super) fn insert(&mut self, task: u64, attribute: TaskAttribute) -> bool {
        self.all.insert(task);
        if attribute == TaskAttribute::Ordered {
            self.ordered.insert(task);
        }
        let runs = self.may_run(task, attribute);
        if !runs {
            self.waiting.push_back((task, attribute));
        }
        runs
    }

    /// Whether a task may run: HEAD OF QUEUE always, ORDERED after all older tasks, SIMPLE after all older
    /// ORDERED tasks.
    fn may_run(&self, task: u64, attribute: TaskAttribute) -> bool {
        match attribute {
            TaskAttribute::HeadOfQueue => true,
            TaskAttribute::Ordered => self.all.first().is_none_or(|first| *first == task),
            TaskAttribute::Untagged | TaskAttribute::Simple | TaskAttribute::Aca => {
                self.ordered.first().is_none_or(|first| *first > task)
            }
        }
    }

    /// A task has ended. Returns those that may run now.
    pub(super) fn remove(&mut self, task: u64) -> Vec<u64> {
        self.all.remove(&task);
        self.ordered.remove(&task);
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let mut ready = Vec::new();
        for (waiting, attribute) in std::mem::take(&mut self.waiting) {
            if waiting == task {
                continue;
            }
            if self.may_run(waiting, attribute) {
                ready.push(waiting);
            } else {
                self.waiting.push_back((waiting, attribute));
            }
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use TaskAttribute::*;

    // SAM-5 §8.6.
    #[test]
    fn ordered_waits_for_all_before_it() {
        let mut set = TaskSet::default();
        assert!(set.insert(1, Simple));
        assert!(set.insert(2, Simple));
        assert!(!set.insert(3, Ordered));
        assert!(set.remove(2).is_empty());
        assert_eq!(set.remove(1), [3]);
    }

    #[test]
    fn simple_waits_for_ordered_before_it_only() {
        let mut set = TaskSet::default();
        assert!(set.insert(1, Ordered));
        assert!(!set.insert(2, Simple));
        assert!(!set.insert(3, Untagged));
        assert!(!set.insert(4, Ordered));
        assert!(!set.insert(5, Simple));
        assert_eq!(set.remove(1), [2, 3]);
        assert!(set.remove(2).is_empty());
        assert_eq!(set.remove(3), [4]);
        assert_eq!(set.remove(4), [5]);
    }

    #[test]
    fn head_of_queue_never_waits() {
        let mut set = TaskSet::default();
        assert!(set.insert(1, Ordered));
        assert!(set.insert(2, HeadOfQueue));
    }

    #[test]
    fn aborted_tasks_do_not_hold_others_up() {
        let mut set = TaskSet::default();
        assert!(set.insert(1, Simple));
        assert!(!set.insert(2, Ordered));
        assert!(!set.insert(3, Simple));
        assert_eq!(set.remove(2), [3]);
        assert!(set.remove(1).is_empty());
        assert_eq!(set.len(), 1);
    }
}
