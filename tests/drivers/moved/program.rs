// A program as it is written for Diesel and r2d2: it takes orders, in whichever database.

use diesel::r2d2::{ConnectionManager, TestCustomizer};
use r2d2::{Pool, PoolError, PooledConnection};

use super::super::diesel::{MIGRATIONS, Wheel, count_wheels, wheel, wheels};
use diesel::migration::MigrationConnection;
use diesel::prelude::*;
use diesel_migrations::MigrationHarness;
use std::thread;

type DbPool = Pool<ConnectionManager<SqliteConnection>>;
type DbConnection = PooledConnection<ConnectionManager<SqliteConnection>>;

/// What many programs call their state.
#[derive(Clone)]
struct App {
    pool: DbPool,
}

impl App {
    fn start(url: &str) -> Result<App, Box<dyn std::error::Error + Send + Sync>> {
        let pool = Pool::builder().max_size(1).test_on_check_out(true).build(ConnectionManager::new(url))?;
        migrate(&mut pool.get()?)?;
        Ok(App { pool })
    }

    /// For a test of its own, of which nothing stays.
    fn for_a_test(url: &str) -> Result<App, PoolError> {
        let builder = Pool::builder().max_size(1).connection_customizer(Box::new(TestCustomizer));
        Ok(App { pool: builder.build(ConnectionManager::new(url))? })
    }

    fn connection(&self) -> Result<DbConnection, PoolError> {
        self.pool.get()
    }
}

fn migrate<C>(connection: &mut C) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
where
    C: MigrationConnection + MigrationHarness<<C as diesel::Connection>::Backend>,
{
    connection.run_pending_migrations(MIGRATIONS)?;
    Ok(())
}

/// Takes what the pool gives.
fn order(connection: &mut DbConnection, id: i32) -> QueryResult<Wheel> {
    connection.transaction(|connection| {
        diesel::insert_into(wheels::table).values(wheel(id)).execute(connection)?;
        wheels::table.find(id).select(Wheel::as_select()).first(connection)
    })
}

/// How many orders there are in the end, and how many a test saw.
pub(crate) fn run(url: &str) -> Result<(i64, i64), Box<dyn std::error::Error + Send + Sync>> {
    let app = App::start(url)?;
    thread::scope(|scope| {
        for id in 0..6 {
            let app = app.clone();
            scope.spawn(move || {
                let connection = &mut app.connection().expect("a connection");
                assert_eq!(order(connection, id).expect("an order").id, id);
            });
        }
    });
    let orders = |app: &App| Ok::<_, PoolError>(count_wheels(&mut app.connection()?));
    let before = orders(&app)?;
    drop(app);
    let test = App::for_a_test(url)?;
    order(&mut test.connection()?, 6)?;
    let seen = orders(&test)?;
    drop(test);
    assert_eq!(orders(&App::start(url)?)?, before, "nothing of the test stays");
    Ok((before, seen))
}
