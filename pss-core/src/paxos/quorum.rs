//! Majorities of the core servers that are listed in the configuration, running or not.

use crate::types::ServerId;

/// Servers of a majority of `listed` core servers.
pub fn majority(listed: usize) -> usize {
    listed / 2 + 1
}

/// The greatest value that a majority of the `listed` servers has reached, given the values of some
/// of them. `None` if they are no majority.
pub fn reached_by_majority<T: Ord + Copy>(
    listed: usize,
    values: impl Iterator<Item = T>,
) -> Option<T> {
    let mut values: Vec<T> = values.collect();
    values.sort_unstable_by(|a, b| b.cmp(a));
    values.get(majority(listed) - 1).copied()
}

/// Which servers a cell lists.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Membership {
    /// Core servers, in order.
    pub core: Vec<ServerId>,
    /// Learners, in order.
    pub learners: Vec<ServerId>,
}

impl Membership {
    /// Sorts listed ids into core servers and learners.
    pub fn new(listed: impl IntoIterator<Item = ServerId>) -> Membership {
        let mut listed: Vec<ServerId> = listed.into_iter().collect();
        listed.sort_unstable();
        listed.dedup();
        let (core, learners) = listed.into_iter().partition(|server| server.is_core());
        Membership { core, learners }
    }

    /// Whether it is one of them.
    pub fn has(&self, server: ServerId) -> bool {
        self.core.contains(&server) || self.learners.contains(&server)
    }

    /// Servers of a majority.
    pub fn majority(&self) -> usize {
        majority(self.core.len())
    }

    /// All listed servers but `me`.
    pub fn others(&self, me: ServerId) -> impl Iterator<Item = ServerId> + '_ {
        self.core
            .iter()
            .chain(&self.learners)
            .copied()
            .filter(move |server| *server != me)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn majorities() {
        assert_eq!([1, 2, 3, 4, 5].map(majority), [1, 2, 2, 3, 3]);
    }

    #[test]
    fn value_of_a_majority() {
        assert_eq!(reached_by_majority(3, [5, 9, 1].into_iter()), Some(5));
        assert_eq!(reached_by_majority(3, [5].into_iter()), None);
        assert_eq!(reached_by_majority(5, [5, 9, 1].into_iter()), Some(1));
        assert_eq!(reached_by_majority(4, [7, 7, 3, 3].into_iter()), Some(3));
    }

    #[test]
    fn learners_are_no_core_servers() {
        let members = Membership::new([5, 0, 2, 1, 7].map(ServerId));
        assert_eq!(members.core, [0, 1, 2].map(ServerId));
        assert_eq!(members.learners, [5, 7].map(ServerId));
    }
}
