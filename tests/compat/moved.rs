//! A program written for r2d2 is moved by its `use` line: here is one, compiled twice.

/// As it was written.
mod before {
    include!("moved/program.rs");
}

/// The same with `millpond` where it says `r2d2`.
mod after {
    use millpond as r2d2;

    include!("moved/program.rs");
}

#[test]
fn a_program_moves_by_its_use_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name| folder.path().join(name).to_str().unwrap().to_owned();
    let (turns, checkouts, _) = before::run(&file("before.db")).unwrap();
    assert_eq!((turns, checkouts), (6, 8));
    let (turns, checkouts, connections) = after::run(&file("after.db")).unwrap();
    assert_eq!((turns, checkouts), (6, 8));
    assert!((1..=3).contains(&connections));
    assert!(before::plain().unwrap() && after::plain().unwrap());
}
