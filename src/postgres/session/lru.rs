//! [`Lru`]: a small map that forgets its least recently used entry.
//!
//! It is made by hand, for two reasons. The crate `lru` needs an owned key of both parts, SQL and types, which would be
//! an allocation for each query. And here room must be made before a statement is prepared, not when it is inserted.

use ::postgres::types::Type;
use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashMap;

#[cfg(test)]
mod tests;

/// A map by SQL and types; the least recently used entry goes first.
pub(super) struct Lru<V> {
    capacity: usize,
    map: HashMap<Key<'static>, Entry<V>>,
    /// The number of uses so far.
    uses: u64,
}

#[derive(PartialEq, Eq, Hash)]
struct Key<'a> {
    sql: Cow<'a, str>,
    types: Cow<'a, [Type]>,
}

struct Entry<V> {
    value: V,
    /// The number of its last use: no two entries have the same.
    used: Cell<u64>,
}

impl<V: Clone> Lru<V> {
    pub(super) fn new(capacity: usize) -> Lru<V> {
        Lru { capacity, map: HashMap::new(), uses: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    fn entry<'a>(&'a self, sql: &'a str, types: &'a [Type]) -> Option<&'a Entry<V>> {
        // As a map whose keys live shorter, it can be asked with a key that is not owned.
        let map: &HashMap<Key<'a>, Entry<V>> = &self.map;
        map.get(&Key { sql: sql.into(), types: types.into() })
    }

    pub(super) fn get(&mut self, sql: &str, types: &[Type]) -> Option<V> {
        self.uses += 1;
        let entry = self.entry(sql, types)?;
        entry.used.set(self.uses);
        Some(entry.value.clone())
    }

    /// Drops the least recently used entry if all places are taken.
    pub(super) fn make_room(&mut self) {
        if self.len() < self.capacity {
            return;
        }
        // To look at all entries costs nothing beside the round trip that follows.
        if let Some(oldest) = self.map.values().map(|entry| entry.used.get()).min() {
            self.map.retain(|_, entry| entry.used.get() != oldest);
        }
    }

    /// Inserts an entry, for which there must be room: see [`make_room`](Lru::make_room).
    pub(super) fn insert(&mut self, sql: &str, types: &[Type], value: V) {
        if self.capacity == 0 {
            return;
        }
        self.uses += 1;
        let key = Key { sql: sql.to_owned().into(), types: types.to_owned().into() };
        self.map.insert(key, Entry { value, used: self.uses.into() });
    }

    /// Removes the entries of this SQL, with whatever types.
    pub(super) fn remove(&mut self, sql: &str) {
        self.map.retain(|key, _| key.sql != sql);
    }

    pub(super) fn clear(&mut self) {
        self.map.clear();
    }
}
