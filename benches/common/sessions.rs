//! The pools on PostgreSQL, through the synchronous client, all doing the same: a `SELECT 1` that the server has parsed
//! and planned before, in one round trip (Bind, Execute and Sync). What differs is where the statement is kept.
//!
//! * A client per thread and the stock manager: prepared by hand when the connection is opened, and kept beside the
//!   client in a [`Session`]. The stock manager makes bare clients, with no room for it, so [`Sessions`] is a manager
//!   around it, as one writes it for the purpose. Nothing is looked up: it is the least that can be done, and
//!   Millpond's rivals have it.
//! * Millpond's own manager: `query_one_cached`, as its documentation says. The look-up in the cache is on its account.
//!
//! The statements are prepared before anything is measured.
//!
//! bb8 and deadpool are not among them: they pool clients for tasks, whose bytes another task moves, where a blocking
//! client moves them itself. Beside it that would compare drivers. What these two cost as pools, `checkout` and `waits`
//! measure on connections that are nothing.

use super::peers::PerThread;
use super::{Subject, using};
use millpond::Validate;
use millpond::postgres::{Connection, PostgresManager, Reset};
use parking_lot::Mutex;
use postgres::{Client, Config, NoTls, Row, Statement};
use r2d2_postgres::PostgresConnectionManager;

const SELECT_ONE: &str = "SELECT 1";

/// A client with a statement prepared, as a server keeps it that answers the same requests all day.
pub struct Session {
    client: Client,
    select_one: Statement,
}

impl Session {
    fn new(mut client: Client) -> Result<Session, postgres::Error> {
        let select_one = client.prepare(SELECT_ONE)?;
        Ok(Session { client, select_one })
    }

    fn select_one(&mut self) {
        check(self.client.query_one(&self.select_one, &[]));
    }
}

/// The same on a connection that remembers its statements.
fn select_one(connection: &mut Connection) {
    check(connection.query_one_cached(SELECT_ONE, &[]));
}

fn check(row: Result<Row, postgres::Error>) {
    assert_eq!(row.expect("an answer").get::<_, i32>(0), 1);
}

/// The stock manager, with the statement prepared when a connection is opened.
struct Sessions(PostgresConnectionManager<NoTls>);

impl Sessions {
    fn new(config: &Config) -> Sessions {
        Sessions(PostgresConnectionManager::new(config.clone(), NoTls))
    }
}

impl r2d2::ManageConnection for Sessions {
    type Connection = Session;
    type Error = postgres::Error;

    fn connect(&self) -> Result<Session, postgres::Error> {
        Session::new(self.0.connect()?)
    }

    fn is_valid(&self, session: &mut Session) -> Result<(), postgres::Error> {
        self.0.is_valid(&mut session.client)
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        self.0.has_broken(&mut session.client)
    }
}

/// No pool: a client for each of so many threads, more connections than the pools may have.
pub fn bare(config: &Config, threads: usize) -> Box<dyn Subject> {
    let open = |_| Mutex::new(config.connect(NoTls).and_then(Session::new).expect("the server"));
    let clients = PerThread((0..threads).map(open).collect());
    ready(using("a client per thread", clients, Session::select_one), threads)
}

/// Millpond as its README begins: its own manager, everything by default.
pub fn millpond(config: &Config, size: u32) -> Box<dyn Subject> {
    own("millpond", config, size, |manager| manager, true)
}

/// [`millpond`], and what `with` sets otherwise.
pub fn millpond_with(
    name: &str,
    config: &Config,
    size: u32,
    with: impl FnOnce(millpond::Builder<Manager>) -> millpond::Builder<Manager>,
) -> Box<dyn Subject> {
    let builder = with(PostgresManager::new(config.clone(), NoTls).builder().max_size(size));
    ready(using(name, builder.open().expect("a pool"), select_one), size as usize)
}

/// Millpond with its own manager, in the settings on which round trips may depend. What is not observed is asked, on a
/// thread of the pool's, how it comes back, unless there is no reset or nothing that could begin a transaction was run.
pub fn millponds(config: &Config, size: u32) -> Vec<Box<dyn Subject>> {
    let (off, bare) = ("millpond, not observed", "millpond, not observed, no reset");
    vec![
        millpond(config, size),
        own("millpond, untested", config, size, |manager| manager, false),
        own(off, config, size, |manager| manager.observe(false), true),
        own(bare, config, size, |manager| manager.observe(false).reset(Reset::None), true),
    ]
}

type Manager = PostgresManager<NoTls>;

fn own(name: &str, config: &Config, size: u32, with: fn(Manager) -> Manager, test: bool) -> Box<dyn Subject> {
    let builder = with(PostgresManager::new(config.clone(), NoTls)).builder().max_size(size);
    let builder = if test { builder } else { builder.validate(Validate::Never) };
    ready(using(name, builder.open().expect("a pool"), select_one), size as usize)
}

/// Millpond with the stock manager, defaults or never validating.
pub fn stock(config: &Config, size: u32, test: bool) -> Box<dyn Subject> {
    let name = if test { "millpond, stock manager" } else { "millpond, stock manager, untested" };
    let builder = millpond::Pool::builder().max_size(size);
    let builder = if test { builder } else { builder.validate(Validate::Never) };
    ready(using(name, builder.build(Sessions::new(config)).expect("a pool"), Session::select_one), size as usize)
}

/// r2d2 with the stock manager, defaults or without its test.
pub fn r2d2(config: &Config, size: u32, test: bool) -> Box<dyn Subject> {
    let name = if test { "r2d2 defaults" } else { "r2d2 untested" };
    let builder = r2d2::Pool::builder().max_size(size).test_on_check_out(test);
    ready(using(name, builder.build(Sessions::new(config)).expect("a pool"), Session::select_one), size as usize)
}

/// With so many connections, each of which has been used.
fn ready(subject: Box<dyn Subject>, n: usize) -> Box<dyn Subject> {
    subject.fill(n);
    subject
}
