//! The feature `diesel`, on PostgreSQL (through libpq) and on SQLite: the same tests on each.

use diesel::connection::LoadConnection;
use diesel::dsl::{CountStar, count_star};
use diesel::helper_types::Select;
use diesel::prelude::*;
use diesel::query_dsl::LoadQuery;
use diesel::r2d2::ConnectionManager;
use diesel_migrations::{EmbeddedMigrations, embed_migrations};

mod postgres;
mod sqlite;

pub(crate) const MIGRATIONS: EmbeddedMigrations = embed_migrations!();

diesel::table! {
    wheels (id) {
        id -> Integer,
        name -> Text,
        turns -> Integer,
    }
}

#[derive(AsChangeset, Debug, Identifiable, Insertable, PartialEq, Queryable, Selectable)]
#[diesel(table_name = wheels, treat_none_as_default_value = false)]
pub(crate) struct Wheel {
    pub(crate) id: i32,
    name: String,
    turns: i32,
}

pub(crate) fn wheel(id: i32) -> Wheel {
    Wheel { id, name: format!("wheel {id}"), turns: 0 }
}

/// How many there are. Written for any connection of Diesel's, as a program's own functions may be.
pub(crate) fn count_wheels<C>(connection: &mut C) -> i64
where
    C: LoadConnection,
    for<'q> CountWheels: LoadQuery<'q, C, i64>,
{
    count_query().get_result(connection).unwrap()
}

pub(crate) type CountWheels = Select<wheels::table, CountStar>;

pub(crate) fn count_query() -> CountWheels {
    wheels::table.select(count_star())
}

type Manager<C> = ConnectionManager<C>;
