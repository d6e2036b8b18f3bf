//! The stock manager, with an exact account of its connections on this side of the network.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millpond::ManageConnection;
use parking_lot::Mutex;
use postgres::{Client, Error};

use super::{Manager, manager, pid};

/// Opens stock connections, and counts them from before the attempt until after the drop.
pub struct Counting {
    manager: Manager,
    pub account: Arc<Account>,
}

/// What a [`Counting`] has counted.
#[derive(Default)]
pub struct Account {
    book: Mutex<Book>,
    /// How long it takes to close a connection.
    pub close_time: Mutex<Duration>,
}

#[derive(Default)]
struct Book {
    /// Being opened, open or being closed.
    now: usize,
    most: usize,
    opened: usize,
    open: Vec<i32>,
    closed: HashMap<i32, Instant>,
}

/// A connection that is counted until it is dropped.
pub struct Counted {
    pub client: Option<Client>,
    pub pid: i32,
    account: Arc<Account>,
}

impl Counting {
    pub fn new(app: &str) -> Counting {
        Counting { manager: manager(app), account: Arc::default() }
    }
}

impl Account {
    pub fn now(&self) -> usize {
        self.book.lock().now
    }

    /// The most there ever were at the same time.
    pub fn most(&self) -> usize {
        self.book.lock().most
    }

    pub fn opened(&self) -> usize {
        self.book.lock().opened
    }

    /// The backends of the open connections, the oldest first.
    pub fn open(&self) -> Vec<i32> {
        self.book.lock().open.clone()
    }

    /// When this backend's connection was closed, if it was.
    pub fn closed(&self, pid: i32) -> Option<Instant> {
        self.book.lock().closed.get(&pid).copied()
    }
}

impl Counted {
    pub fn client(&mut self) -> &mut Client {
        self.client.as_mut().expect("a client until it is dropped")
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // Slots are counted until the drop has ended: nothing may be let in before that.
        self.account.book.lock().open.retain(|&pid| pid != self.pid);
        std::thread::sleep(*self.account.close_time.lock());
        drop(self.client.take());
        let mut book = self.account.book.lock();
        book.now -= 1;
        book.closed.insert(self.pid, Instant::now());
    }
}

impl ManageConnection for Counting {
    type Connection = Counted;
    type Error = Error;

    fn connect(&self) -> Result<Counted, Error> {
        {
            let mut book = self.account.book.lock();
            book.now += 1;
            book.most = book.most.max(book.now);
        }
        let client = self.manager.connect().inspect_err(|_| self.account.book.lock().now -= 1)?;
        let mut conn = Counted { client: Some(client), pid: 0, account: Arc::clone(&self.account) };
        conn.pid = pid(conn.client());
        let mut book = self.account.book.lock();
        book.opened += 1;
        book.open.push(conn.pid);
        // The system may give a number again.
        book.closed.remove(&conn.pid);
        drop(book);
        Ok(conn)
    }

    fn is_valid(&self, conn: &mut Counted) -> Result<(), Error> {
        self.manager.is_valid(conn.client())
    }

    fn has_broken(&self, conn: &mut Counted) -> bool {
        self.manager.has_broken(conn.client())
    }
}
