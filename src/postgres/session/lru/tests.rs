use super::*;

fn lru(capacity: usize) -> Lru<u32> {
    Lru::new(capacity)
}

/// Inserts an entry as `Statements::prepare` does after a miss.
fn miss(lru: &mut Lru<u32>, sql: &str, value: u32) {
    lru.make_room();
    lru.insert(sql, &[], value);
}

#[test]
fn the_least_recently_used_goes_first() {
    let mut lru = lru(3);
    miss(&mut lru, "a", 1);
    miss(&mut lru, "b", 2);
    miss(&mut lru, "c", 3);
    assert_eq!(lru.get("a", &[]), Some(1));
    miss(&mut lru, "d", 4);
    assert_eq!(lru.get("b", &[]), None);
    miss(&mut lru, "e", 5);
    assert_eq!(lru.get("c", &[]), None);
    for (sql, value) in [("a", 1), ("d", 4), ("e", 5)] {
        assert_eq!(lru.get(sql, &[]), Some(value), "{sql}");
    }
}

#[test]
fn a_miss_does_not_count_as_use() {
    let mut lru = lru(2);
    miss(&mut lru, "a", 1);
    miss(&mut lru, "b", 2);
    assert_eq!(lru.get("c", &[]), None);
    miss(&mut lru, "c", 3);
    assert_eq!(lru.get("a", &[]), None);
    assert_eq!(lru.get("b", &[]), Some(2));
}

#[test]
fn a_map_has_as_many_entries_as_its_capacity() {
    for capacity in [1, 2, 7] {
        let mut lru = lru(capacity);
        for i in 0..20 {
            miss(&mut lru, &i.to_string(), i);
            assert_eq!(lru.len(), capacity.min(i as usize + 1));
        }
        assert_eq!(lru.get("19", &[]), Some(19));
    }
    let mut off = lru(0);
    miss(&mut off, "a", 1);
    assert_eq!((off.len(), off.get("a", &[])), (0, None));
}

#[test]
fn room_is_made_before_an_insert() {
    let mut lru = lru(2);
    miss(&mut lru, "a", 1);
    miss(&mut lru, "b", 2);
    lru.make_room();
    assert_eq!(lru.len(), 1);
}

#[test]
fn other_types_are_another_statement_until_it_is_forgotten() {
    let mut lru = lru(4);
    miss(&mut lru, "a", 1);
    lru.insert("a", &[Type::INT8], 2);
    assert_eq!(lru.get("a", &[]), Some(1));
    assert_eq!(lru.get("a", &[Type::INT8]), Some(2));
    assert_eq!(lru.get("a", &[Type::INT4]), None);
    lru.remove("a");
    assert_eq!(lru.len(), 0);
}
