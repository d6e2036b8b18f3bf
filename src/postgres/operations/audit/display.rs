//! How an [`Audit`] is shown: a table, and notes on what could not be found out.

use super::backend::{Audit, Backend, Owner};
use crate::leaf::text::{Short, Shown, write_table};
use std::fmt;
use std::time::Duration;

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Audit { pool, role, database, backends, .. } = self;
        let s = if backends.len() == 1 { "" } else { "s" };
        let (pool, role, database) = (Shown(pool), Shown(role), Shown(database));
        write!(f, "audit of pool '{pool}', {role} on database {database}: {} backend{s}", backends.len())?;
        let count = |owner| backends.iter().filter(|b| b.owner == owner).count();
        let counts = [
            (count(Owner::Pool), "of this pool"),
            (count(Owner::ThisProcess), "of this process, but not in the pool"),
            (count(Owner::Other), "of other processes here"),
            (count(Owner::Orphaned), "orphaned"),
            (count(Owner::Unknown), "unknown"),
            (count(Owner::Audit), "to ask"),
        ];
        for (i, (n, what)) in counts.into_iter().filter(|(n, _)| *n > 0).enumerate() {
            write!(f, "{}{n} {what}", if i == 0 { ": " } else { ", " })?;
        }
        writeln!(f)?;
        let head = ["pid", "state", "for", "age", "in tx", "waiting on", "whose"].map(String::from);
        let rows = backends.iter().map(|b| {
            let or = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            let time = |d: Option<Duration>| or(d.map(|d| Short(d).to_string()));
            [
                b.pid.to_string(),
                b.state.clone().unwrap_or_else(|| "(hidden)".into()),
                time(b.since),
                time(b.age),
                time(b.in_transaction_for),
                // An idle backend always waits for its client.
                or(b.waiting_on.clone().filter(|_| !b.is_idle())),
                b.whose(),
            ]
        });
        if !backends.is_empty() {
            write_table(f, std::iter::once(head).chain(rows))?;
        }
        for row in self.missing.iter() {
            writeln!(f, "the server knows nothing of {row}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {}", Shown(note))?;
        }
        Ok(())
    }
}

impl Backend {
    fn whose(&self) -> String {
        let far = self.client.map(|client| client.ip()).filter(|ip| !ip.is_loopback());
        let hint = match (self.process, far) {
            (Some(process), Some(ip)) => format!(" ({process} by its name, at {ip})"),
            (Some(process), None) => format!(" ({process} by its name)"),
            (None, Some(ip)) => format!(" (at {ip})"),
            (None, None) => String::new(),
        };
        match self.owner {
            Owner::Pool => match &self.connection {
                Some(c) => {
                    let thread = c.thread.as_ref().map(|t| format!(" by {t}")).unwrap_or_default();
                    let place = c.location.map(|at| format!(" at {at}")).unwrap_or_default();
                    format!("#{} {}{thread}{place}", c.id, c.state)
                }
                None => "this pool".into(),
            },
            Owner::Audit => "this audit".into(),
            Owner::ThisProcess => "this process, not in the pool".into(),
            Owner::Other => format!("another process here{hint}"),
            Owner::Orphaned => format!("ORPHANED{hint}: its client has closed"),
            Owner::Unknown => format!("unknown{hint}"),
        }
    }
}
