//! Programs that do their work and end: by their last line, by an error, by a panic.

use crate::corner::Corner;
use crate::program::Program;
use crate::support::{SOON, beside_others, wait_until, within};

#[test]
fn scoped_threads() {
    let _beside = beside_others();
    let corner = Corner::new("threaded_scoped");
    let words = Program::start("scoped_threads", &corner.address()).ends_cleanly();
    assert!(words.contains("1 + 2 + ... + 8000 = 32004000"), "{words}");
    assert_eq!(corner.left(), 0);
}

#[test]
fn a_scoped_thread_that_fails_is_the_end_of_the_program() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_scoped_fails");
    // What it asks of the server now fails for one of the eight.
    let sql = "CREATE FUNCTION generate_series(a bigint, b bigint) RETURNS SETOF bigint LANGUAGE sql AS \
               'SELECT n / (a - 3001) FROM pg_catalog.generate_series(a, b) n'";
    corner.client.batch_execute(sql).unwrap();
    let (status, words) = Program::start("scoped_threads", &corner.address()).end();
    assert!(status.code() == Some(1) && words.contains("division by zero"), "{status}:\n{words}");
    assert_eq!(corner.left(), 0);
}

#[test]
fn a_scoped_thread_that_panics_is_the_end_of_the_program() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_scoped_panics");
    // The sum of nothing is NULL, which the program does not expect.
    let sql = "CREATE FUNCTION generate_series(a bigint, b bigint) RETURNS SETOF bigint LANGUAGE sql AS \
               'SELECT n FROM pg_catalog.generate_series(a, b) n WHERE a <> 3001'";
    corner.client.batch_execute(sql).unwrap();
    let (status, words) = Program::start("scoped_threads", &corner.address()).end();
    assert!(status.code() == Some(101) && words.contains("panicked"), "{status}:\n{words}");
    assert_eq!(corner.left(), 0);
}

#[test]
fn rayon() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_rayon");
    Program::start("rayon_pool", &corner.address()).ends_cleanly();
    // 27 is known for its 111 steps. 97 has the longest walk of those that nobody waited for.
    assert_eq!(corner.ask("SELECT steps FROM walks WHERE start = 27"), 111);
    assert_eq!(corner.ask("SELECT steps FROM walks WHERE start = 97"), 118);
    assert_eq!(corner.ask("SELECT count(*) FROM walks"), 100);
    assert_eq!(corner.left(), 0);
}

/// Of the jobs that nobody waits for two panic and the last are slow. The program waits for them, since its guard does.
#[test]
fn rayon_finishes_what_it_has_begun() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_rayon_finishes");
    slow_down(&mut corner, "walks (start bigint PRIMARY KEY, steps bigint)", "NEW.start > 96");
    spoil(&mut corner, "walks", "steps", "NEW.start IN (60, 95)");
    let words = Program::start("rayon_pool", &corner.address()).ends_cleanly();
    assert_eq!(words.matches("a job has panicked").count(), 2, "{words}");
    assert_eq!(corner.ask("SELECT count(steps) FROM walks"), 98);
    assert_eq!(corner.left(), 0);
}

#[test]
fn threadpool() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_threadpool");
    // The last jobs are slow, and two before them panic. All others are done.
    slow_down(&mut corner, "squares (n bigint PRIMARY KEY, square bigint)", "NEW.n > 96");
    spoil(&mut corner, "squares", "square", "NEW.n IN (90, 95)");
    let words = Program::start("thread_pool", &corner.address()).ends_cleanly();
    assert_eq!(words.matches("panicked").count(), 2, "{words}");
    assert_eq!(corner.ask("SELECT count(*) FROM squares WHERE square = n * n"), 98);
    assert_eq!(corner.left(), 0);
}

/// Makes a table in which these rows take a quarter of a second each.
fn slow_down(corner: &mut Corner, table: &str, rows: &str) {
    let name = table.split(' ').next().unwrap();
    let sql = format!(
        "CREATE TABLE {table}; \
         CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.25); RETURN NEW; END'; \
         CREATE TRIGGER slow BEFORE INSERT ON {name} FOR EACH ROW WHEN ({rows}) EXECUTE FUNCTION slow()"
    );
    corner.client.batch_execute(&sql).unwrap();
}

/// Has the server keep no value for these rows, which the program does not expect.
fn spoil(corner: &mut Corner, table: &str, column: &str, rows: &str) {
    let sql = format!(
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.{column} = NULL; RETURN NEW; END'; \
         CREATE TRIGGER spoil BEFORE INSERT ON {table} FOR EACH ROW WHEN ({rows}) EXECUTE FUNCTION spoil()"
    );
    corner.client.batch_execute(&sql).unwrap();
}

#[test]
fn several_pools() {
    let _beside = beside_others();
    let corner = Corner::new("threaded_several");
    let words = Program::start("several_pools", &corner.address()).ends_cleanly();
    // The reports, and with them the threads, come before the orders.
    let at = |text: &str| words.find(text).unwrap_or_else(|| panic!("no `{text}` in:\n{words}"));
    assert!(at("pool 'reports' closed in") < at("pool 'orders' closed in"));
    assert_eq!(words.matches("nothing is left").count(), 2, "{words}");
    assert_eq!(corner.left(), 0);
}

/// The first report hangs, and the others wait for its connection: the orders are all done meanwhile.
#[test]
fn no_order_waits_for_a_report() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_several_hang");
    let sql = "CREATE TABLE gate (); CREATE FUNCTION pg_sleep(numeric) RETURNS bigint LANGUAGE sql AS \
               'SELECT count(*) FROM gate'";
    corner.client.batch_execute(sql).unwrap();
    let gate = corner.lock("gate");
    let mut program = Program::start("several_pools", &corner.address());
    (0..6).for_each(|_| drop(program.line("clerk-")));
    assert!(wait_until(within(SOON), || corner.waiting("pg_sleep") == 1));
    drop(gate);
    let words = program.ends_cleanly();
    assert!(words.find("report-") > words.rfind("clerk-"), "{words}");
    assert_eq!(corner.left(), 0);
}

#[test]
fn an_error_in_one_of_several_pools_closes_both() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_several_fails");
    let sql = "CREATE FUNCTION pg_sleep(numeric) RETURNS int LANGUAGE sql AS 'SELECT 1 / 0'";
    corner.client.batch_execute(sql).unwrap();
    let (status, words) = Program::start("several_pools", &corner.address()).end();
    assert!(status.code() == Some(1) && words.contains("division by zero"), "{status}:\n{words}");
    assert_eq!(corner.left(), 0);
}

/// And nothing of the address, for it may have a password in it.
#[test]
fn without_a_database_each_says_so_in_one_line() {
    let _beside = beside_others();
    let all = [
        "accept_loop",
        "async_server",
        "job_worker",
        "rayon_pool",
        "reader_writer",
        "scoped_threads",
        "several_pools",
        "supervisor",
        "thread_pool",
    ];
    for name in all {
        let (status, words) = Program::start(name, "host=127.0.0.1 port=1 password=secret nonsense=secret").end();
        assert!(status.code() == Some(1) && words.lines().count() == 1, "{name}: {status}:\n{words}");
        assert!(!words.contains("secret") && !words.contains("nonsense"), "{name}: {words}");
    }
}

/// In less than the half minute that a caller waits by default.
#[test]
fn with_a_database_that_is_down_each_says_so_soon() {
    let _beside = beside_others();
    let all = [
        "accept_loop",
        "async_server",
        "job_worker",
        "quickstart",
        "rayon_pool",
        "reader_writer",
        "scoped_threads",
        "several_pools",
        "supervisor",
        "thread_pool",
    ];
    let programs = all.map(|name| Program::start(name, "host=127.0.0.1 port=1 user=ada dbname=mill"));
    for (name, program) in all.iter().zip(programs) {
        let (status, words) = program.end();
        assert!(status.code() == Some(1) && words.contains("Connection refused"), "{name}: {status}:\n{words}");
    }
}
