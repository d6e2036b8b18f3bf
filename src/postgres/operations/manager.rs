//! [`PostgresManager`]: opens, checks, cleans and closes PostgreSQL connections.

use super::budget::{self, Budget};
use super::guards::ServerGuards;
use super::names::application_name;
use crate::leaf::text::{CAUSE, Short, brief};
use crate::ledger::Reach;
use crate::postgres::error::{Error, parse_error, was_not_connected};
use crate::postgres::session::{
    CANCEL_LIMIT, Canceller, Connection, DEFAULT_CAPACITY, Opened, Reset, SendCancel, cancel_within, send_within,
};
use crate::postgres::wire::{ConnectError, Connector, Loopback, Observer, Status, Watch};
use crate::{Cause, Manage, Opening, Returned, Start};
use ::postgres::config::{Host, TargetSessionAttrs};
use ::postgres::error::DbError;
use ::postgres::{Client, Config, NoTls};
use r2d2_postgres::PostgresConnectionManager;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A pool of PostgreSQL connections.
pub type Pool<T = NoTls> = crate::Pool<PostgresManager<T>>;

/// How long a caller waits for a request to cancel, unless the configuration has a `connect_timeout`.
const CALLERS_CANCEL_LIMIT: Duration = Duration::from_secs(10);
/// TCP keepalives: how long a connection may be silent before the system asks whether the other side lives; the pause
/// between two questions; and how many unanswered questions end the connection. A dead network shows after 90 s.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(10), 3);
/// How long sent data may stay unacknowledged: as long as the keepalives above take, 60 s + 3 x 10 s.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(90);
/// The default of `keepalives_idle` in the `postgres` crate, which does not say whether it was set.
const KEEPALIVE_IDLE_UNSET: Duration = Duration::from_secs(2 * 60 * 60);

/// Gets the password for the next login.
type PasswordSource = Arc<dyn Fn() -> Result<Vec<u8>, Error> + Send + Sync>;

/// Manages PostgreSQL connections. `T` is the TLS connector: [`NoTls`], or that of
/// `tokio-postgres-rustls` (0.14 or later), `postgres-openssl` or `postgres-native-tls`.
///
/// A new connection has answered a question before a caller gets it, since a pooler that is paused or full accepts
/// every login.
///
/// It sets what the configuration leaves open: `application_name` (the pool's name and the process id),
/// `connect_timeout` (the pool's `open_timeout`, divided among the hosts), TCP keepalives (after 60 s, every 10 s, 3
/// times) and `tcp_user_timeout` (90 s).
///
/// It is not itself an [`r2d2::ManageConnection`] (a type cannot be both); [`into_r2d2`](PostgresManager::into_r2d2)
/// makes one of it.
#[derive(Clone)]
pub struct PostgresManager<T> {
    config: Config,
    password: Option<PasswordSource>,
    tls: T,
    observe: bool,
    loopback: Arc<Loopback>,
    reset: Reset,
    statement_cache: usize,
    processes: Option<u32>,
    budget: Budget,
    guards: ServerGuards,
    test_transaction: bool,
}

impl<T: Connector> PostgresManager<T> {
    /// Manages connections with this configuration and TLS connector. (Build the connector once and clone it: some load
    /// the system's certificates each time.)
    ///
    /// Notices are the configuration's: unless it has a `notice_callback`, `postgres` logs them at info, as they come.
    pub fn new(config: Config, tls: T) -> Self {
        PostgresManager {
            config,
            password: None,
            tls,
            observe: true,
            loopback: Arc::default(),
            reset: Reset::default(),
            statement_cache: DEFAULT_CAPACITY,
            processes: None,
            budget: Budget::default(),
            guards: ServerGuards::default(),
            test_transaction: false,
        }
    }

    /// [`new`](PostgresManager::new) with a connection string. The server's notices are logged as `postgres` does it,
    /// at info with its target, but escaped and shortened.
    ///
    /// # Errors
    ///
    /// If the string is not one. The error says which part is wrong, and never its text: it may be the password.
    pub fn parse(params: &str, tls: T) -> Result<Self, Error> {
        let mut config: Config = params.parse().map_err(|e| parse_error(params, &e))?;
        // The `@` shows that a part of the password was taken for a host. It would be looked up by name, and stand in
        // the logs of the resolver.
        if config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if name.contains('@'))) {
            let text = "invalid connection string: an `@` in a host's name (in a user name or password write %40)";
            return Err(Error::own(text, true));
        }
        config.notice_callback(log_notice);
        Ok(Self::new(config, tls))
    }

    /// Asks for the password before each login, in the place of the configuration's: for one that is rotated, or that is a
    /// token with an end.
    ///
    /// ```no_run
    /// use millpond::postgres::PostgresManager;
    /// use postgres::NoTls;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let secret = || std::fs::read_to_string("/run/secrets/db").map(|text| text.trim_end().to_owned());
    /// let pool = PostgresManager::parse("host=db user=app", NoTls)?.password_with(secret).builder().open()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// * It is called on a thread of the pool, once for each attempt to connect, by several threads at once. The time that it
    ///   takes is part of [`open_timeout`](crate::Builder::open_timeout); but only it can end itself. One that asks over the
    ///   network should have a limit of its own, and remember what it was told.
    /// * What is connected stays connected when the password changes, since PostgreSQL asks for it at the login only. So change
    ///   it here and at the server in any order: only who logs in between is refused (28P01). As with any refusal, callers
    ///   are told so at once if no connection is left, and otherwise wait for one that is returned. The pool tries again
    ///   after 5 s to 30 s, or at once when [`recycle`](crate::Pool::recycle) is called, which replaces the connections as
    ///   well.
    ///
    /// # Errors
    ///
    /// If it returns an error, the attempt to connect fails, and is repeated as any other: "cannot get a password: ..." The
    /// text is shown and logged, so it should not have a secret in it.
    #[must_use]
    pub fn password_with<P, E>(mut self, source: impl Fn() -> Result<P, E> + Send + Sync + 'static) -> Self
    where
        P: AsRef<[u8]>,
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        self.password = Some(Arc::new(move || match source() {
            Ok(password) => Ok(password.as_ref().to_vec()),
            Err(error) => Err(Error::no_password(&*error.into())),
        }));
        self
    }

    /// Whether to [observe](crate::postgres#the-observer) the connections. Default `true`.
    #[must_use]
    pub fn observe(mut self, observe: bool) -> Self {
        self.observe = observe;
        self
    }

    /// What is done to a connection that is returned. Default [`Reset::Rollback`].
    #[must_use]
    pub fn reset(mut self, reset: Reset) -> Self {
        self.reset = reset;
        self
    }

    /// How many [prepared statements](crate::postgres#statements) each connection remembers. Default 256. The least
    /// recently used statement is closed for a new one. The server keeps each of them in memory, on every connection.
    ///
    /// 0 switches the cache off. That is the setting for a transaction pooler: see [the
    /// module](crate::postgres#transaction-poolers).
    #[must_use]
    pub fn statement_cache(mut self, statements: usize) -> Self {
        self.statement_cache = statements;
        self
    }

    /// How many processes with a pool like this one the server has to serve at the same time, this one included, and
    /// both the old and the new ones while a deployment lasts. `build` then asks the server what it allows the role and
    /// database (`max_connections` less the reserves, and the `CONNECTION LIMIT`s of both), compares `processes` x
    /// `max_size` with it, and warns or [refuses](PostgresManager::budget): "8 processes x 17 = 136, but the server
    /// allows app 97 (max_connections 100 less 3 reserved)". See [`budget`](crate::postgres::budget()) and [how to
    /// choose the numbers](crate::postgres::choosing_the_numbers).
    ///
    /// Default `None`: nothing is compared. Zero is refused by `build`. Nothing is compared by `build_unchecked`, nor
    /// by [`Pool::resize`](crate::Pool::resize). Behind a pooler, which an [observed](crate::postgres#the-observer)
    /// connection can tell, the server's numbers are logged and nothing is refused: it is the pooler that opens
    /// connections there.
    #[must_use]
    pub fn processes(mut self, processes: impl Into<Option<u32>>) -> Self {
        self.processes = processes.into();
        self
    }

    /// What `build` does if [`processes`](PostgresManager::processes) together may open more connections than the
    /// server allows. Default [`Budget::Warn`].
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// What the server is to do if this client dies or vanishes, set on every connection. Default: no guard. Not for a
    /// pooler in transaction mode. See [`ServerGuards`].
    ///
    /// `build` and `get` fail if the server does not know one of the guards, and say which. `build` also fails if a
    /// guard would end connections that the pool means to keep.
    #[must_use]
    pub fn server_guards(mut self, guards: ServerGuards) -> Self {
        self.guards = guards;
        self
    }

    /// For tests: nothing that is done through the pool is committed. Default `false`. Diesel has the same for one
    /// connection (`begin_test_transaction`).
    ///
    /// Each connection begins one transaction when it is opened. All that its callers do happens inside it, from checkout
    /// to checkout, and is rolled back when the connection is closed. So the next caller of the connection finds the
    /// rows of the one before, and nobody else ever sees them. See [the guide](crate::guide::rolled_back_tests).
    ///
    /// ```no_run
    /// use millpond::postgres::PostgresManager;
    /// use postgres::NoTls;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let manager = PostgresManager::parse("host=127.0.0.1 user=app dbname=app_test", NoTls)?.test_transaction(true);
    /// // One connection, for as long as the test lasts: all of the test sees the same rows.
    /// let pool = manager.builder().max_size(1).max_idle(None).max_lifetime(None).open()?;
    ///
    /// pool.get()?.execute("INSERT INTO users (name) VALUES ('ada')", &[])?;
    ///
    /// let mut client = pool.get()?;
    /// let mut tx = client.transaction()?; // a savepoint
    /// tx.execute("UPDATE users SET name = 'grace'", &[])?;
    /// tx.commit()?; // releases it
    ///
    /// let row = client.query_one("SELECT count(*) FROM users WHERE name = 'grace'", &[])?;
    /// assert_eq!(row.get::<_, i64>(0), 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// * [`begin`](Connection::begin) and [`transaction`](Connection::transaction) make a savepoint, `commit` releases
    ///   it, and `rollback` or a drop goes back to it. What the pool itself does not see is refused: a `COMMIT` in SQL,
    ///   or by `transaction()` of the bare `postgres::Client`, fails with SQLSTATE 2D000 ("test_transaction: nothing is
    ///   committed"), and ends the test transaction, as it does with a `ROLLBACK` in SQL.
    /// * **An error** of a statement outside of a `begin()` fails the transaction, as always in PostgreSQL, and what
    ///   follows in the same checkout fails with 25P02. When the connection is returned, all of this checkout is rolled
    ///   back, with a warning. What earlier checkouts did stays.
    /// * **After its end** the session is read-only (25006). When it is returned, the connection is closed, with a
    ///   warning, and the next caller gets a new one, without the rows.
    /// * **A pool of one** shows all callers the same rows; they wait for each other. In **a pool of many** each
    ///   connection has a transaction of its own: they do not see each other's rows, and wait for each other's locks.
    /// * Whatever closes a connection takes its rows away: `max_idle`, `max_lifetime`, `recycle`, a cancelled query, a
    ///   panic, and the server's `idle_in_transaction_session_timeout`.
    ///
    /// Not covered are: sequences, which go on counting; what the server does elsewhere (`dblink`, `COPY ... TO
    /// PROGRAM`); whatever makes the session writable again once the test transaction was ended in SQL (`BEGIN READ
    /// WRITE`, `AND CHAIN`, `SET default_transaction_read_only = off`, `RESET ALL`, `DISCARD ALL`); and a `COMMIT` in SQL
    /// after a drop of the guard, which is a trigger in `pg_temp` (`DROP FUNCTION ... CASCADE`, `DROP EXTENSION plpgsql
    /// CASCADE`, code that drops all functions or triggers that it finds). The guide says what else is different.
    ///
    /// **Do not use this behind a pooler in transaction mode.** The test transaction itself keeps its server; but once it
    /// was ended in SQL, the next statement may go to a server where it is committed.
    ///
    /// # Errors
    ///
    /// `build` and `get` fail for good with another [`reset`](PostgresManager::reset) than [`Reset::Rollback`], and if
    /// the role may not make a temporary table, or the database has no PL/pgSQL.
    #[must_use]
    pub fn test_transaction(mut self, on: bool) -> Self {
        self.test_transaction = on;
        self
    }

    /// A builder of a pool with this manager, to be [`open`](crate::Builder::open)ed.
    pub fn builder(self) -> crate::Builder<Self> {
        crate::Builder::new().manager(self)
    }

    /// The same configuration as a manager for r2d2, without anything that this manager does beyond that one:
    /// [`password_with`](PostgresManager::password_with), too.
    pub fn into_r2d2(self) -> PostgresConnectionManager<T> {
        PostgresConnectionManager::new(self.config, self.tls)
    }

    /// [`Canceller::cancel`], which needs no manager.
    ///
    /// # Errors
    ///
    /// As [`Canceller::cancel`].
    pub fn cancel(&self, canceller: &Canceller) -> Result<(), Error> {
        canceller.cancel()
    }

    fn observer(&self, config: &Config) -> Option<Observer<T>> {
        if self.observe { Observer::new(config, self.tls.clone(), &self.loopback) } else { None }
    }

    /// The user's configuration. It must never be shown as a whole.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// How many hosts it names.
    pub(super) fn hosts(&self) -> usize {
        self.config.get_hosts().len().max(self.config.get_hostaddrs().len())
    }

    /// The name under which the server knows this process's connections of the pool.
    pub(super) fn application_name(&self, pool: &str) -> String {
        match self.config.get_application_name() {
            Some(name) => name.to_string(),
            None => application_name(pool, std::process::id()),
        }
    }

    fn guard(&self, connection: &mut Connection) -> Result<(), Error> {
        match self.guards.sql() {
            Some(sql) => connection
                .expecting_little()
                .batch_execute(&sql)
                .map_err(|e| Error::doing(format!("cannot set the server guards ({sql})"), e)),
            None => Ok(()),
        }
    }

    fn begin_test_transaction(&self, connection: &mut Connection) -> Result<(), Error> {
        match (self.test_transaction, self.reset) {
            (false, _) => Ok(()),
            (true, Reset::Rollback) => connection.begin_test_transaction(),
            (true, reset) => {
                let text = format!("test_transaction needs Reset::Rollback, and reset is Reset::{reset:?}");
                Err(Error::own(text, true))
            }
        }
    }

    /// The user's configuration, with the pool's values for what it leaves open.
    fn complete(&self, pool: &str, limit: Duration) -> Config {
        let mut config = self.config.clone();
        config.application_name(&self.application_name(pool));
        if config.get_connect_timeout().is_none() {
            // Each address gets an equal part of the limit, so that the last one has its turn.
            let hosts = self.hosts().max(1);
            config.connect_timeout(limit / u32::try_from(hosts).unwrap_or(u32::MAX));
        }
        let (idle, interval, retries) = KEEPALIVE;
        if config.get_keepalives() {
            if config.get_keepalives_idle() == KEEPALIVE_IDLE_UNSET {
                config.keepalives_idle(idle);
            }
            if config.get_keepalives_interval().is_none() {
                config.keepalives_interval(interval);
            }
            if config.get_keepalives_retries().is_none() {
                config.keepalives_retries(retries);
            }
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        config
    }

    fn connect(&self, opening: &Opening) -> Result<Opened, Error> {
        let mut config = self.complete(opening.pool(), opening.limit());
        if let Some(password) = &self.password {
            let begun = Instant::now();
            config.password(password()?);
            if opening.is_aborted() {
                return Err(Error::timeout(format!("the password came only after {}", Short(begun.elapsed()))));
            }
        }
        if let Some(observer) = self.observer(&config) {
            if let Some(opened) = self.connect_observed(observer, opening)? {
                return Ok(opened);
            }
        }
        self.connect_unobserved(&config, opening)
    }

    /// How long a caller waits for a request to cancel.
    fn cancel_limit(&self) -> Duration {
        self.config.get_connect_timeout().copied().unwrap_or(CALLERS_CANCEL_LIMIT)
    }

    fn connect_unobserved(&self, config: &Config, opening: &Opening) -> Result<Opened, Error> {
        let begun = Instant::now();
        let client = config.connect(self.tls.clone())?;
        let took = begun.elapsed();
        let (token, tls) = (client.cancel_token(), self.tls.clone());
        let cancel: SendCancel = Arc::new(move |limit| {
            let (token, tls) = (token.clone(), tls.clone());
            send_within(limit, move || Ok(token.cancel_query(tls)?), || {})
        });
        let send = Arc::clone(&cancel);
        opening.on_cancel(move || {
            let _ = send(CANCEL_LIMIT);
        });
        Ok(Opened { client, watch: None, cancel, cancel_limit: self.cancel_limit(), took })
    }

    /// `None`: the connection cannot be observed.
    fn connect_observed(&self, observer: Observer<T>, opening: &Opening) -> Result<Option<Opened>, Error> {
        let begun = Instant::now();
        let watch = Watch::new();
        let switch = Arc::clone(&watch);
        opening.on_abort(move || switch.abort());
        // A pooler accepts every login. Only an answer shows that there is a server behind it.
        let greet = |mut client: Client| {
            watch.expect_little();
            client.is_valid(opening.limit()).map(|()| client).map_err(ConnectError::from)
        };
        let client = match observer.connect(&watch).and_then(greet) {
            Ok(client) => client,
            Err(_) if watch.is_aborted() => {
                // The error says why the attempt was aborted, not merely that it was.
                let text = format!("no answer to an attempt to connect for {}", Short(begun.elapsed()));
                return Err(Error::timeout(text));
            }
            Err(ConnectError::NoLoopback) => return Ok(None),
            // Of several hosts it is the last one's, to which there may have been no way, while an earlier one said no. (The
            // addresses of one name lead to one server, mostly: what it said at one of them is worth more.)
            Err(ConnectError::Postgres(error)) if self.hosts() > 1 && was_not_connected(&error) => {
                return Err(error.into());
            }
            Err(ConnectError::Postgres(error)) => return Err(Error::of(error, &watch)),
            Err(error @ ConnectError::NoWay(..)) => return Err(error.into()),
        };
        if watch.status() != Status::Idle {
            // Aborted, so that the drop of the client does not wait for an answer.
            watch.abort();
            let status = "what is asked first was answered with a transaction status with which no session begins";
            return Err(Error::own(status, false));
        }
        let took = begun.elapsed();
        let token = client.cancel_token();
        let seen = Arc::clone(&watch);
        let cancel: SendCancel = Arc::new(move |limit| {
            let (observer, token, seen, abort) = (observer.clone(), token.clone(), Arc::clone(&seen), Watch::new());
            let switch = Arc::clone(&abort);
            send_within(limit, move || Ok(observer.cancel(&token, &seen, &abort)?), || switch.abort())
        });
        let (send, seen) = (Arc::clone(&cancel), Arc::clone(&watch));
        opening.on_cancel(move || cancel_within(CANCEL_LIMIT, &send, &seen));
        Ok(Some(Opened { client, watch: Some(watch), cancel, cancel_limit: self.cancel_limit(), took }))
    }
}

/// Logs a notice as `postgres` does it, but escaped and shortened, since any SQL can raise a notice. The record is the
/// client's and not the pool's. So it is written on the thread that uses the client, as `postgres` does it: no thread
/// of the pool waits for that, and the configuration that has this callback may serve several pools, or none.
fn log_notice(notice: DbError) {
    let text = brief(format_args!("{}: {}", notice.severity(), notice.message()), CAUSE);
    log::info!(target: "postgres::config", "{text}");
}

impl<T: Connector> Manage for PostgresManager<T> {
    type Connection = Connection;
    type Error = Error;

    fn open(&self, opening: &Opening) -> Result<Connection, Error> {
        let mut connection = Connection::new(self.connect(opening)?, self.statement_cache)?;
        match self.guard(&mut connection).and_then(|()| self.begin_test_transaction(&mut connection)) {
            Ok(()) => Ok(connection),
            Err(e) => {
                connection.close(opening.limit());
                Err(e)
            }
        }
    }

    fn validate(&self, connection: &mut Connection, limit: Duration) -> Result<(), Error> {
        connection.ping(limit)
    }

    /// `Client::is_valid` ends in time, whether the connection is observed or not. (A server that never stops sending can
    /// keep it beyond that: `postgres` looks at the time when nothing has come. If the connection is observed, there is an
    /// end to what it may send.)
    fn keeps_limits(&self) -> bool {
        true
    }

    fn peek(&self, connection: &mut Connection) -> Option<Result<(), Error>> {
        connection.peek()
    }

    fn returned(&self, connection: &mut Connection) -> Returned {
        // A refused write says something about the node only if a node that takes writes was asked for.
        let writes = self.config.get_target_session_attrs() == TargetSessionAttrs::ReadWrite;
        connection.state(self.reset, writes)
    }

    fn reset(&self, connection: &mut Connection, limit: Duration) -> Result<(), Error> {
        if self.test_transaction {
            return connection.renew(limit);
        }
        connection.clean(self.reset, limit)?;
        // The guards were discarded with the rest of the session's settings.
        if self.reset == Reset::DiscardAll { self.guard(connection) } else { Ok(()) }
    }

    /// `DISCARD ALL` discards a customizer's settings together with a caller's.
    fn undoes_on_acquire(&self) -> bool {
        self.reset == Reset::DiscardAll
    }

    fn remark(&self, connection: &mut Connection) -> Option<String> {
        connection.take_remark()
    }

    fn close(&self, connection: Connection, limit: Duration) {
        connection.close(limit);
    }

    fn started(&self, connection: &mut Connection, start: &Start<'_>) -> Result<(), Cause> {
        self.guards.check(start.settings())?;
        if self.test_transaction {
            start.warn("test_transaction is on: nothing is committed that is done through this pool");
        }
        let pid = connection.backend_pid();
        match self.processes {
            Some(processes) => budget::compare(connection, pid, processes, self.budget, start),
            None => Ok(()),
        }
    }

    fn server_id(&self, connection: &Connection) -> Option<u64> {
        // PgBouncer's may be negative.
        u64::try_from(connection.backend_pid()?).ok()
    }

    fn explain(&self, error: &Error) -> Cause {
        let cause = Cause::of(error.clone()).of_type(error.error_type());
        if error.is_permanent() {
            return cause.permanent();
        }
        // Of several hosts the error is the last one's, and another may have been logged in to.
        let nobody = self.hosts() == 1 && error.says_that_nobody_listens();
        cause.reaching(if nobody { Reach::Nobody } else { Reach::Server })
    }
}

/// Shows neither the password nor the configuration as a whole. If a password in a URL is not escaped, its parts behind
/// an `@`, `/` or `,` are taken for hosts or for a database. So all text before an `@` is left out.
impl<T> fmt::Debug for PostgresManager<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let behind_at = |text: &str| text.rsplit_once('@').map(|(_, rest)| format!("…@{rest}"));
        let dbname = self.config.get_dbname().map(|name| behind_at(name).unwrap_or_else(|| name.to_owned()));
        let mut hosts: Vec<Box<dyn fmt::Debug + '_>> = Vec::new();
        for host in self.config.get_hosts() {
            match host {
                Host::Tcp(name) if name.contains('@') => hosts = vec![Box::new(behind_at(name).unwrap_or_default())],
                host => hosts.push(Box::new(host)),
            }
        }
        if self.config.get_dbname().is_some_and(|name| name.contains('@')) {
            hosts = vec![Box::new("…")];
        }
        f.debug_struct("PostgresManager")
            .field("hosts", &hosts)
            .field("user", &self.config.get_user())
            .field("dbname", &dbname)
            .field("observe", &self.observe)
            .field("reset", &self.reset)
            .field("statement_cache", &self.statement_cache)
            .field("processes", &self.processes)
            .field("budget", &self.budget)
            .field("guards", &self.guards)
            .field("test_transaction", &self.test_transaction)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::postgres::NoTls;

    fn manager(params: &str) -> PostgresManager<NoTls> {
        PostgresManager::parse(params, NoTls).unwrap()
    }

    #[test]
    fn what_is_left_open_is_set_and_nothing_else() {
        let set = manager("host=h").complete("orders", Duration::from_secs(10));
        assert_eq!(set.get_application_name(), Some(&*format!("orders [{}]", std::process::id())));
        assert_eq!(set.get_connect_timeout(), Some(&Duration::from_secs(10)));
        assert_eq!(set.get_keepalives_idle(), Duration::from_secs(60));
        assert_eq!(set.get_tcp_user_timeout(), Some(&Duration::from_secs(90)));
        let kept = manager("host=a,b application_name=mine connect_timeout=3 keepalives_idle=7 tcp_user_timeout=8")
            .complete("orders", Duration::from_secs(10));
        assert_eq!(kept.get_application_name(), Some("mine"));
        assert_eq!(kept.get_connect_timeout(), Some(&Duration::from_secs(3)));
        assert_eq!(kept.get_keepalives_idle(), Duration::from_secs(7));
        assert_eq!(kept.get_tcp_user_timeout(), Some(&Duration::from_secs(8)));
        let two = manager("host=a,b").complete("orders", Duration::from_secs(10));
        assert_eq!(two.get_connect_timeout(), Some(&Duration::from_secs(5)));
    }

    #[test]
    fn where_nobody_listens() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let reach = |params: String| {
            let manager = manager(&params);
            let error = manager.config.connect(NoTls).map(drop).unwrap_err();
            manager.explain(&error.into()).open_error().reach
        };
        assert_eq!(reach(format!("host=127.0.0.1 port={port} user=u")), Reach::Nobody);
        assert_eq!(reach("host=/no/such/folder user=u".into()), Reach::Nobody);
        // The first of them may have been logged in to.
        assert_eq!(reach(format!("host=127.0.0.1,127.0.0.1 port={port} user=u")), Reach::Server);

        let unix = |kind: std::io::ErrorKind| {
            let error = ConnectError::NoWay(Some("/tmp/.s.PGSQL.5432".into()), kind.into());
            manager("host=/tmp user=u").explain(&error.into()).open_error().reach
        };
        assert_eq!(unix(std::io::ErrorKind::NotFound), Reach::Nobody);
        assert_eq!(unix(std::io::ErrorKind::ConnectionRefused), Reach::Nobody);
        assert_eq!(unix(std::io::ErrorKind::WouldBlock), Reach::Server, "too many are on their way to it");
    }

    #[test]
    fn debug_keeps_the_password() {
        let text = format!("{:?}", manager("host=h user=u password=hunter2"));
        assert!(!text.contains("hunter2") && text.contains("\"u\""), "{text}");
        // A password that is not escaped ends at its first `@` or `/`. Its rest is taken for a host or a database.
        for (params, shown) in [
            ("postgres://u:p@hunter2@h/db", "[\"…@h\"]"),
            ("postgres://u:p@hun,hunter2@a,b/db", "[\"…@a\", Tcp(\"b\")]"),
            ("postgres://u:p@hun/hunter2@h/db", "\"…@h/db\""),
        ] {
            let text = format!("{:?}", PostgresManager::new(params.parse().unwrap(), NoTls));
            assert!(!text.contains("hun") && text.contains(shown), "{text}");
        }
        let text = format!("{:?}", manager("host=a,b dbname=c user=d@e"));
        assert!(text.contains("[Tcp(\"a\"), Tcp(\"b\")]") && text.contains("\"c\"") && text.contains("d@e"), "{text}");
    }

    #[test]
    fn an_unescaped_password_is_not_taken_for_a_host() {
        let parse = |params: &str| PostgresManager::parse(params, NoTls).map(drop).map_err(|e| e.to_string());
        let error = parse("postgres://u:p@hunter2@h/db").unwrap_err();
        assert!(error.contains("%40") && !error.contains("hunter2"), "{error}");
        assert_eq!(parse("postgres://u%40e:p%40hunter2@h/d%40b"), Ok(()));
        assert_eq!(parse("host=h user=u@e password=p@hunter2 dbname=d@b"), Ok(()));
    }
}
