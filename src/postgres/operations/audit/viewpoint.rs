//! [`Viewpoint`]: from where the server was asked, and the owner of a backend as far as it can be proven from there.
//!
//! Without a proof the owner is [`Owner::Unknown`], with a reason.

use super::backend::{Backend, Owner};
use super::question::{LEAVING, QUESTION, fresh, socket_address};
use crate::ConnectionInfo;
use crate::postgres::error::Error;
use crate::postgres::operations::host::{Holder, Host};
use crate::postgres::session::column;
use ::postgres::Client;
use ::postgres::types::Type;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

/// From where the server was asked, and what this host's kernel says of its connections.
pub(super) struct Viewpoint {
    pub(super) role: String,
    pub(super) database: String,
    /// The near end of the connection that asked, as the server sees it. `None`: a unix socket.
    peer: Option<SocketAddr>,
    /// The server's end of it, as the server sees it.
    server: Option<SocketAddr>,
    /// The pid of the backend that answered, and when the server started it.
    pub(super) backend: i32,
    start: Option<SystemTime>,
    /// Whether there is a pooler between this process and the server.
    pub(super) pooled: bool,
    host: Result<Host, &'static str>,
}

impl Viewpoint {
    /// Asks the server for the backends of a role in a database (`client`'s own, if `None`), and then looks at this
    /// host for their connections. Returns the backends that are `wanted`, and the one that answers, without their
    /// owners.
    pub(super) fn look(
        client: &mut Client,
        pid: Option<i32>,
        whose: Option<(&str, &str)>,
        wanted: impl Fn(&Backend) -> bool,
    ) -> Result<(Viewpoint, Vec<Backend>), Error> {
        fresh(client)?;
        let (role, database) = whose.unzip();
        let answer = client.query_typed(QUESTION, &[(&role, Type::TEXT), (&database, Type::TEXT)])?;
        let first = answer.first().ok_or_else(|| Error::own("the server did not answer the audit", false))?;
        let backend = column(first, 2)?;
        let mut rows = Vec::new();
        for row in &answer {
            if let Some(row) = Backend::read(row)?.filter(|row| row.pid == backend || wanted(row)) {
                rows.push(row);
            }
        }
        let asked = rows.iter().map(|row| row.pid).chain([backend]);
        let viewpoint = Viewpoint {
            role: column(first, 0)?,
            database: column(first, 1)?,
            peer: socket_address(column(first, 3)?, column(first, 4)?),
            server: socket_address(column(first, 5)?, column(first, 6)?),
            backend,
            start: column(first, 7)?,
            pooled: pid.is_some_and(|pid| pid != backend),
            host: Host::look(asked),
        };
        Ok((viewpoint, rows))
    }

    /// The owner of a backend of which the pool has no row; if it is unknown, why.
    pub(super) fn owner(&self, backend: &Backend) -> (Owner, Option<String>) {
        if backend.pid == self.backend {
            return (Owner::Audit, None);
        }
        match self.holder(backend) {
            Ok(Holder::Us) => (Owner::ThisProcess, None),
            Ok(Holder::Others) => (Owner::Other, None),
            Ok(Holder::Nobody) if backend.is_busy() => (Owner::Orphaned, None),
            Ok(Holder::Nobody) => (Owner::Unknown, Some(LEAVING.into())),
            Err(why) => (Owner::Unknown, Some(format!("whose it is cannot be known: {why}"))),
        }
    }

    /// The owner of a backend whose pid the pool has for one of its connections, from this server or from another.
    ///
    /// What the kernel says counts first. If it says nothing, the backend must have begun when the pool opened the
    /// connection: two servers may give the same pid, and two containers the same name.
    pub(super) fn owner_of_pooled(
        &self,
        backend: &Backend,
        own: &ConnectionInfo,
        limit: Duration,
    ) -> (Owner, Option<String>) {
        match self.holder(backend) {
            Ok(Holder::Us) => return (Owner::Pool, None),
            Ok(Holder::Others) => return self.owner(backend),
            // The pool has closed the connection meanwhile.
            Ok(Holder::Nobody) => {}
            Err(_) if self.is_from_elsewhere(backend) => return self.owner(backend),
            Err(_) => {}
        }
        let Some(age) = backend.age else { return self.owner(backend) };
        // Two clocks differ a little, and the more the longer they run: by a second and a thousandth of the age.
        let slack = (age / 1000).saturating_add(Duration::from_secs(1));
        if age <= own.age.saturating_add(slack) && own.age <= age.saturating_add(limit).saturating_add(slack) {
            return (Owner::Pool, None);
        }
        let why = format!("it has the number of the pool's #{}, and is not as old as that: of another server?", own.id);
        (Owner::Unknown, Some(why))
    }

    /// Who holds the client's end of a backend's connection; or why that cannot be known.
    pub(super) fn holder(&self, backend: &Backend) -> Result<Holder, &'static str> {
        if backend.backend_start.is_none() {
            return Err("the server hides it from this role");
        }
        if self.pooled {
            return Err("there is a pooler in between");
        }
        let host = self.host.as_ref().map_err(|why| *why)?;
        let client = backend.client.ok_or("it came through a unix socket")?;
        let peer = self.peer.ok_or("the audit came through a unix socket")?;
        match host.has_server(self.backend, self.start, peer) {
            Ok(()) => host.holder(backend.pid, client),
            Err(_) if self.is_direct() && self.server.is_some_and(|server| host.is_ours(client, server)) => {
                Ok(Holder::Us)
            }
            Err(why) => Err(why),
        }
    }

    /// Whether the server is another host, and sees this process under the address that this process has. Then nothing
    /// translates addresses in between, and the client addresses that the server shows can be compared with this
    /// process's own. Never over loopback, where the far side of a tunnel has the same addresses.
    fn is_direct(&self) -> bool {
        let (Ok(host), Some(peer), Some(server)) = (&self.host, self.peer, self.server) else { return false };
        !self.pooled && !peer.ip().is_loopback() && peer.ip() != server.ip() && host.is_ours(peer, server)
    }

    /// Whether the server is another host, and the backend's client is not this process.
    fn is_from_elsewhere(&self, backend: &Backend) -> bool {
        let (Ok(host), Some(client)) = (&self.host, backend.client) else { return false };
        self.is_direct() && !host.is_from_us(client)
    }
}

#[cfg(test)]
mod tests {
    use super::super::backend::staged::{CLIENT, OLD, START, backend};
    use super::*;
    use crate::ConnectionState;
    use crate::postgres::operations::host::Staged;

    const PEER: &str = "127.0.0.1:1000";
    const SERVER: &str = "127.0.0.1:5432";

    fn viewpoint(peer: Option<&str>, host: Staged) -> Viewpoint {
        Viewpoint {
            role: "app".into(),
            database: "shop".into(),
            peer: peer.map(|p| p.parse().unwrap()),
            server: peer.map(|_| SERVER.parse().unwrap()),
            backend: 99,
            start: Some(START),
            pooled: false,
            host: Ok(host.host()),
        }
    }

    /// The server is on this host, and has a backend with these ends of its connection.
    fn host(servers_end: &str, clients_end: Option<(&str, u64)>) -> Staged {
        let staged = Staged::default().own(&[1, 2]).backend(99, START, &[990]).backend(7, START, &[70]);
        let staged = staged.socket(PEER, SERVER, "01", 1).socket(SERVER, PEER, "01", 990);
        let staged = staged.socket(SERVER, CLIENT, servers_end, 70);
        match clients_end {
            Some((state, inode)) => staged.socket(CLIENT, SERVER, state, inode),
            None => staged,
        }
    }

    fn closed() -> Staged {
        host("08", Some(("05", 0)))
    }

    #[test]
    fn orphaned_takes_the_kernel_s_word_on_both_ends() {
        let judge = |viewpoint: &Viewpoint, backend: &Backend| {
            let (owner, note) = viewpoint.owner(backend);
            (owner, note.unwrap_or_default())
        };
        let busy = || backend(Some(CLIENT), "active");
        let orphaned = (Owner::Orphaned, String::new());
        assert_eq!(judge(&viewpoint(Some(PEER), closed()), &busy()), orphaned);
        assert_eq!(judge(&viewpoint(Some(PEER), host("08", None)), &busy()), orphaned, "closed a minute ago");
        let unnamed = Backend { process: None, ..busy() };
        assert_eq!(judge(&viewpoint(Some(PEER), closed()), &unnamed), orphaned, "a name proves nothing");

        let unknown = |viewpoint: &Viewpoint, backend: &Backend, why: &str| {
            let (owner, note) = judge(viewpoint, backend);
            assert_eq!(owner, Owner::Unknown, "{why}");
            assert!(note.contains(why), "{note}");
        };
        let here = || viewpoint(Some(PEER), closed());
        unknown(&here(), &backend(Some(CLIENT), "idle"), "about to end");
        unknown(&here(), &backend(Some(CLIENT), "idle in transaction"), "about to end");
        unknown(&here(), &backend(Some(CLIENT), "disabled"), "about to end");
        unknown(&here(), &backend(None, "active"), "it came through a unix socket");
        unknown(&here(), &backend(Some("10.0.0.7:2000"), "active"), "not to be seen");
        unknown(&here(), &Backend { backend_start: None, ..busy() }, "hides it");
        unknown(&viewpoint(None, closed()), &busy(), "the audit came through a unix socket");
        unknown(&Viewpoint { pooled: true, ..here() }, &busy(), "a pooler in between");
        unknown(&Viewpoint { host: Err("no /proc"), ..here() }, &busy(), "no /proc");
        unknown(&Viewpoint { start: None, ..here() }, &busy(), "time");
        let relay = closed().socket(SERVER, PEER, "01", 3);
        unknown(&viewpoint(Some(PEER), relay), &busy(), "something stands in between");
        let other = closed().socket(PEER, SERVER, "01", 3);
        unknown(&viewpoint(Some(PEER), other), &busy(), "something stands in between");
        unknown(&viewpoint(Some(PEER), closed().hidden(99, "because")), &busy(), "because");
        unknown(&viewpoint(Some(PEER), closed().hidden(7, "because")), &busy(), "because");
        unknown(&viewpoint(Some(PEER), host("01", None)), &busy(), "not on this host");
    }

    #[test]
    fn whose_it_is_says_who_holds_it() {
        let owner =
            |clients_end, backend: &Backend| viewpoint(Some(PEER), host("01", Some(clients_end))).owner(backend);
        for name in [Some(42), Some(std::process::id()), None] {
            let backend = Backend { process: name, ..backend(Some(CLIENT), "active") };
            assert_eq!(owner(("01", 2), &backend), (Owner::ThisProcess, None));
            assert_eq!(owner(("01", 3), &backend), (Owner::Other, None));
        }
        let asking = Backend { pid: 99, ..backend(Some(PEER), "active") };
        assert_eq!(owner(("01", 2), &asking), (Owner::Audit, None));
    }

    #[test]
    fn a_backend_is_the_pool_s_by_the_kernel_s_word_or_by_its_age() {
        let own = |age: Duration| ConnectionInfo {
            id: 3,
            server_id: Some(7),
            state: ConnectionState::Idle,
            since: Duration::ZERO,
            age,
            uses: 1,
            location: None,
            thread: None,
        };
        let limit = Duration::from_secs(10);
        let secs = Duration::from_secs;
        let busy = backend(Some(CLIENT), "active");
        let owner = |viewpoint: &Viewpoint, age| viewpoint.owner_of_pooled(&busy, &own(age), limit).0;
        // The kernel's word counts before the age.
        let here = |inode| viewpoint(Some(PEER), host("01", Some(("01", inode))));
        assert_eq!(owner(&here(2), OLD * 2), Owner::Pool);
        assert_eq!(owner(&here(3), OLD), Owner::Other);
        // Through a tunnel, say, the kernel says nothing.
        let far = viewpoint(Some(PEER), Staged::default());
        for (age, expected) in [
            (OLD, Owner::Pool),
            (OLD + limit, Owner::Pool),
            (OLD + limit + secs(2), Owner::Unknown),
            (OLD - secs(2), Owner::Unknown),
        ] {
            assert_eq!(owner(&far, age), expected, "{age:?}");
        }
        assert_eq!(
            far.owner_of_pooled(&busy, &own(OLD * 9), Duration::MAX).0,
            Owner::Pool,
            "it may take for ever to open"
        );
        let odd = Backend { age: Some(Duration::MAX), ..busy.clone() };
        assert_eq!(far.owner_of_pooled(&odd, &own(OLD), limit).0, Owner::Unknown);
        let unix = viewpoint(None, Staged::default()).owner_of_pooled(&backend(None, "active"), &own(OLD), limit);
        assert_eq!(unix.0, Owner::Pool);
        let hidden = Backend { backend_start: None, age: None, ..busy.clone() };
        assert_eq!(far.owner_of_pooled(&hidden, &own(OLD), limit).0, Owner::Unknown);
    }

    #[test]
    fn a_server_on_another_host_that_sees_us_as_we_do() {
        let (near, server) = ("10.0.0.1:1000", "10.0.0.2:5432");
        let seen = |client: &str, server: &str| {
            let host = Staged::default().own(&[1, 2]).socket(near, server, "01", 1);
            let host = host.socket("10.0.0.1:2000", server, "01", 2).socket("10.0.0.1:3000", server, "01", 3);
            let viewpoint = Viewpoint { server: Some("10.0.0.2:5432".parse().unwrap()), ..viewpoint(Some(near), host) };
            (
                viewpoint.owner(&backend(Some(client), "active")).0,
                viewpoint.is_from_elsewhere(&backend(Some(client), "active")),
            )
        };
        assert_eq!(seen("10.0.0.1:2000", server), (Owner::ThisProcess, false));
        assert_eq!(seen("10.0.0.1:3000", server), (Owner::Unknown, true));
        assert_eq!(seen("10.0.0.1:2000", "10.0.0.3:5432"), (Owner::Unknown, false), "through something in between");
        let tunnel = Staged::default().own(&[1, 2]).socket(PEER, SERVER, "01", 1).socket(CLIENT, SERVER, "01", 2);
        let beyond = viewpoint(Some(PEER), tunnel);
        assert_eq!(beyond.owner(&backend(Some(CLIENT), "active")).0, Owner::Unknown, "its loopback is not ours");
    }
}
