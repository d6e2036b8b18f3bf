//! A corner of the database for one test: a schema, and a name by which the server knows the test's connections.

use crate::support::{Database, SOON, within};
use postgres::Client;

pub(crate) struct Corner {
    /// The name of its schema, and of the connections made with its address.
    pub(crate) name: &'static str,
    pub(crate) database: &'static Database,
    /// Finds the corner's tables by their names.
    pub(crate) client: Client,
}

impl Corner {
    pub(crate) fn new(name: &'static str) -> Corner {
        let database = Database::get();
        let mut client = database.connect();
        let sql = format!(
            "SET lock_timeout = '5s'; DROP SCHEMA IF EXISTS {name} CASCADE; CREATE SCHEMA {name}; \
             SET search_path = {name}"
        );
        client.batch_execute(&sql).expect("a schema");
        Corner { name, database, client }
    }

    /// Where an example finds it. A function of the corner's goes before one of the server's with the same name.
    pub(crate) fn address(&self) -> String {
        let address = self.database.conninfo(self.name);
        match address.contains("://") {
            true => format!("{address}&options=-c%20search_path%3D{},pg_catalog", self.name),
            false => format!("{address} options='-c search_path={},pg_catalog'", self.name),
        }
    }

    /// One number, asked of the corner.
    #[track_caller]
    pub(crate) fn ask(&mut self, sql: &str) -> i64 {
        self.client.query_one(sql, &[]).expect("an answer").get(0)
    }

    /// Makes whoever uses the table wait, until this is dropped.
    pub(crate) fn lock(&self, table: &str) -> Client {
        let mut client = self.database.connect();
        client.batch_execute(&format!("BEGIN; LOCK TABLE {}.{table}", self.name)).expect("the lock");
        client
    }

    /// How many of the program's connections wait for a lock on that table.
    pub(crate) fn waiting(&self, table: &str) -> usize {
        let waits = |b: &&crate::support::Backend| b.state == "active" && b.query.contains(table);
        self.database.backends(self.name).iter().filter(waits).count()
    }

    /// How many the server still has of those that were closed, given the moment it needs to notice.
    pub(crate) fn left(&self) -> i64 {
        self.database.wait_for(self.name, 0, within(SOON))
    }
}

impl Drop for Corner {
    fn drop(&mut self) {
        let _ = self.client.batch_execute(&format!("DROP SCHEMA {} CASCADE", self.name));
    }
}
