//! A Diesel program is moved by its `use` line: here is one, compiled twice.

/// As it was written: what Diesel re-exports is r2d2.
mod before {
    use diesel::r2d2;

    include!("moved/program.rs");
}

/// The same with this pool.
mod after {
    mod r2d2 {
        pub(super) use millpond::{Error as PoolError, Pool, PooledConnection};
    }

    include!("moved/program.rs");
}

#[test]
fn a_program_moves_by_its_use_line() {
    let folder = tempfile::tempdir().unwrap();
    let url = |name| folder.path().join(name).to_str().unwrap().to_owned();
    assert_eq!(before::run(&url("before.db")).unwrap(), (6, 7));
    assert_eq!(after::run(&url("after.db")).unwrap(), (6, 7));
}
