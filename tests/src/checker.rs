//! Linearizability of one register, with operations whose outcome is not known.
//!
//! Linearizability is local (Herlihy and Wing, 1990, theorem 1), so each half of a 4 KiB block is a
//! register and is checked by itself. The check walks through the history's events in order of time and
//! keeps every *configuration* that can explain what was answered so far: the value, which writes under
//! way have taken effect, and which reads under way have been satisfied. A write takes effect as late as
//! it can: when it is answered, or, at the latest possible moment, because a read under way shows its
//! value. A write that is answered may also have been hidden: it took effect right before another one.

use std::collections::{BTreeMap, BTreeSet};

/// A moment of the history.
pub type Time = u64;
/// What a register holds. Every write of data has another value; 0 is written by zeroing.
pub type Value = u64;

/// One operation on a register.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Operation {
    /// When it was begun.
    pub begun: Time,
    /// When it was answered; `None`: never, it may take effect at any time from `begun` on.
    pub answered: Option<Time>,
    /// What it did or saw.
    pub kind: Kind,
}

/// What an operation did or saw.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Wrote this value.
    Write(Value),
    /// Read this value. A read without an answer says nothing and is left out.
    Read(Value),
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Configuration {
    value: Value,
    /// When a write last took effect.
    changed: Time,
    /// Writes under way that have taken effect.
    effective: BTreeSet<usize>,
    /// Reads under way that have seen their value.
    satisfied: BTreeSet<usize>,
}

/// Checks a history of one register that begins with 0.
///
/// # Errors
/// The operation that nothing explains.
pub fn check(operations: &[Operation]) -> Result<(), Operation> {
    let mut events: BTreeMap<(Time, bool, usize), ()> = BTreeMap::new();
    for (index, operation) in operations.iter().enumerate() {
        if operation.answered.is_none() && matches!(operation.kind, Kind::Read(_)) {
            continue;
        }
        events.insert((operation.begun, false, index), ());
        if let Some(answered) = operation.answered {
            // An operation that begins when another is answered counts as overlapping it.
            events.insert((answered.max(operation.begun), true, index), ());
        }
    }
    let start = Configuration {
        value: 0,
        changed: 0,
        effective: BTreeSet::new(),
        satisfied: BTreeSet::new(),
    };
    let mut under_way: BTreeSet<usize> = BTreeSet::new();
    let mut configurations = BTreeSet::from([start]);
    for (time, answered, index) in events.into_keys() {
        let operation = operations[index];
        if answered {
            configurations = answer(operations, &under_way, configurations, index, time);
            under_way.remove(&index);
            if configurations.is_empty() {
                return Err(operation);
            }
        } else {
            under_way.insert(index);
            configurations = configurations
                .into_iter()
                .map(|mut configuration| {
                    if operation.kind == Kind::Read(configuration.value) {
                        configuration.satisfied.insert(index);
                    }
                    configuration
                })
                .collect();
        }
    }
    Ok(())
}

fn answer(
    operations: &[Operation],
    under_way: &BTreeSet<usize>,
    configurations: BTreeSet<Configuration>,
    index: usize,
    time: Time,
) -> BTreeSet<Configuration> {
    let operation = operations[index];
    let mut next = BTreeSet::new();
    for mut configuration in with_awaited(operations, under_way, configurations, time) {
        match operation.kind {
            Kind::Read(_) => {
                if configuration.satisfied.remove(&index) {
                    next.insert(configuration);
                }
            }
            Kind::Write(_) => {
                if configuration.effective.remove(&index) {
                    next.insert(configuration);
                    continue;
                }
                if configuration.changed >= operation.begun && configuration.changed > 0 {
                    // Hidden right before the write that took effect after this one began.
                    next.insert(configuration.clone());
                }
                configuration.take_effect(operations, under_way, index, time);
                configuration.effective.remove(&index);
                next.insert(configuration);
            }
        }
    }
    next
}

/// The configurations, and all that come of them when writes take effect that reads under way show.
fn with_awaited(
    operations: &[Operation],
    under_way: &BTreeSet<usize>,
    configurations: BTreeSet<Configuration>,
    time: Time,
) -> BTreeSet<Configuration> {
    let mut all = BTreeSet::new();
    let mut todo: Vec<Configuration> = configurations.into_iter().collect();
    while let Some(configuration) = todo.pop() {
        if !all.insert(configuration.clone()) {
            continue;
        }
        for write in under_way {
            let Kind::Write(value) = operations[*write].kind else {
                continue;
            };
            let awaited = under_way.iter().any(|read| {
                operations[*read].kind == Kind::Read(value)
                    && !configuration.satisfied.contains(read)
            });
            if awaited && !configuration.effective.contains(write) {
                let mut with = configuration.clone();
                with.take_effect(operations, under_way, *write, time);
                todo.push(with);
            }
        }
    }
    all
}

impl Configuration {
    fn take_effect(
        &mut self,
        operations: &[Operation],
        under_way: &BTreeSet<usize>,
        write: usize,
        time: Time,
    ) {
        let Kind::Write(value) = operations[write].kind else {
            return;
        };
        self.value = value;
        self.changed = time;
        self.effective.insert(write);
        for read in under_way {
            if operations[*read].kind == Kind::Read(value) {
                self.satisfied.insert(*read);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(value: Value, begun: Time, answered: Time) -> Operation {
        Operation {
            begun,
            answered: Some(answered),
            kind: Kind::Write(value),
        }
    }

    fn read(value: Value, begun: Time, answered: Time) -> Operation {
        Operation {
            begun,
            answered: Some(answered),
            kind: Kind::Read(value),
        }
    }

    fn lost(value: Value, begun: Time) -> Operation {
        Operation {
            begun,
            answered: None,
            kind: Kind::Write(value),
        }
    }

    #[test]
    fn sequential_history() {
        assert_eq!(
            check(&[read(0, 1, 2), write(5, 3, 4), read(5, 5, 6)]),
            Ok(())
        );
    }

    #[test]
    fn lost_write_is_found() {
        let stale = read(0, 5, 6);
        assert_eq!(check(&[write(5, 3, 4), stale]), Err(stale));
    }

    #[test]
    fn read_that_goes_back_is_found() {
        let back = read(5, 30, 31);
        let history = [write(5, 1, 2), write(6, 10, 40), read(6, 20, 21), back];
        assert_eq!(check(&history), Err(back));
    }

    #[test]
    fn overlapping_reads_may_differ_in_order() {
        let history = [
            write(5, 1, 2),
            write(6, 10, 40),
            read(5, 20, 21),
            read(6, 22, 23),
        ];
        assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn long_read_may_see_the_value_at_its_beginning() {
        let history = [
            write(5, 1, 2),
            read(5, 3, 50),
            write(6, 10, 20),
            read(6, 21, 22),
        ];
        assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn write_without_answer_may_take_effect_late_or_never() {
        assert_eq!(
            check(&[lost(5, 1), read(0, 10, 11), read(5, 90, 91)]),
            Ok(())
        );
        assert_eq!(check(&[lost(5, 1), read(0, 10, 11)]), Ok(()));
    }

    #[test]
    fn write_without_answer_takes_effect_once() {
        let again = read(5, 30, 31);
        let history = [
            lost(5, 1),
            read(5, 10, 11),
            write(6, 12, 13),
            read(6, 20, 21),
            again,
        ];
        assert_eq!(check(&history), Err(again));
    }

    #[test]
    fn concurrent_writes_may_hide_one_another() {
        let history = [
            write(5, 1, 10),
            write(6, 2, 9),
            read(6, 11, 12),
            read(6, 13, 14),
        ];
        assert_eq!(check(&history), Ok(()));
        let history = [
            write(5, 1, 10),
            write(6, 2, 9),
            read(5, 11, 12),
            read(5, 13, 14),
        ];
        assert_eq!(check(&history), Ok(()));
        let back = read(5, 13, 14);
        assert_eq!(
            check(&[write(5, 1, 10), write(6, 2, 9), read(6, 11, 12), back]),
            Err(back)
        );
    }

    #[test]
    fn read_under_way_may_show_a_value_that_is_gone_already() {
        let history = [
            write(5, 1, 40),
            write(6, 2, 30),
            read(5, 10, 35),
            read(6, 36, 37),
            read(6, 50, 51),
        ];
        assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn zero_can_be_written_again() {
        let history = [
            write(5, 1, 2),
            write(0, 3, 4),
            read(0, 5, 6),
            write(7, 7, 8),
            write(0, 9, 10),
        ];
        assert_eq!(check(&history), Ok(()));
    }
}
