//! Which entries of a listing are the same file.

use std::collections::{HashMap, hash_map};

use super::{Kind, Stat};

/// Groups entries by device and inode. What a listing left out is in no group, so
/// that a link of an excluded name is a file of its own.
#[derive(Debug, Default)]
pub struct LinkGroups(HashMap<(u64, u64), usize>);

impl LinkGroups {
    /// Takes an entry by its number; answers the number of the first that was the
    /// same file. Directories have one name only.
    pub fn first_of(&mut self, number: usize, stat: &Stat) -> Option<usize> {
        if stat.kind == Kind::Directory {
            return None;
        }
        match self.0.entry((stat.device, stat.inode)) {
            hash_map::Entry::Occupied(first) => Some(*first.get()),
            hash_map::Entry::Vacant(place) => {
                place.insert(number);
                None
            }
        }
    }
}
