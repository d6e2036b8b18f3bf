//! The pools on PostgreSQL, through the synchronous client.
//!
//! bb8 and deadpool are not among them: they pool clients for tasks, whose queries run elsewhere and otherwise. Beside
//! a blocking client that would compare drivers.

use super::peers::PerThread;
use super::{Hold, Subject, named};
use parking_lot::Mutex;
use postgres::{Client, Config, NoTls, Statement};

/// A client with a statement prepared, as a server keeps it that answers the same requests all day.
pub struct Session {
    pub client: Client,
    select_one: Statement,
}

impl Session {
    pub fn open(config: &Config) -> Result<Session, postgres::Error> {
        let mut client = config.connect(NoTls)?;
        let select_one = client.prepare("SELECT 1")?;
        Ok(Session { client, select_one })
    }

    /// One round trip.
    pub fn select_one(&mut self) {
        let row = self.client.query_one(&self.select_one, &[]).expect("an answer");
        assert_eq!(row.get::<_, i32>(0), 1);
    }
}

/// What a worker does with one.
pub const SELECT_ONE: Hold<Session> = Hold::Use(Session::select_one);

/// As `r2d2_postgres` does it, with the statement prepared when the connection is opened.
pub struct Sessions(pub Config);

impl r2d2::ManageConnection for Sessions {
    type Connection = Session;
    type Error = postgres::Error;

    fn connect(&self) -> Result<Session, postgres::Error> {
        Session::open(&self.0)
    }

    fn is_valid(&self, session: &mut Session) -> Result<(), postgres::Error> {
        session.client.simple_query("").map(drop)
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.client.is_closed()
    }
}

/// No pool: a client for each of so many threads, more connections than the pools may have.
pub fn bare(config: &Config, threads: usize) -> Box<dyn Subject<Session>> {
    let open = |_| Mutex::new(Session::open(config).expect("the server"));
    named("a client per thread", PerThread((0..threads).map(open).collect()))
}

/// Millpond, defaults or never validating.
pub fn millpond(config: &Config, size: u32, test: bool) -> Box<dyn Subject<Session>> {
    let builder = millpond::Pool::builder().max_size(size);
    let (name, builder) = match test {
        true => ("millpond defaults", builder),
        false => ("millpond untested", builder.test_on_check_out(false)),
    };
    let subject = named(name, builder.build(Sessions(config.clone())).expect("a pool"));
    subject.fill(size as usize);
    subject
}

/// r2d2, defaults or without its test.
pub fn r2d2(config: &Config, size: u32, test: bool) -> Box<dyn Subject<Session>> {
    let name = if test { "r2d2 defaults" } else { "r2d2 untested" };
    let builder = r2d2::Pool::builder().max_size(size).test_on_check_out(test);
    let subject = named(name, builder.build(Sessions(config.clone())).expect("a pool"));
    subject.fill(size as usize);
    subject
}
