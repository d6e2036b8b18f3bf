//! A server that wants a password of one role, `picky`, and of no other.

use super::{Server, wait_until};
use postgres::{Config, NoTls};
use std::fs;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The server. The password is "right" unless it was [set](set_password).
pub fn picky() -> &'static Server {
    static PICKY: OnceLock<Server> = OnceLock::new();
    PICKY.get_or_init(|| {
        let server = Server::with(&[("log_connections", "on")]);
        let hba = server.socket_dir().join("data/pg_hba.conf");
        let trusting = fs::read_to_string(&hba).unwrap();
        fs::write(&hba, format!("host all picky 127.0.0.1/32 password\n{trusting}")).unwrap();
        set_password(&server, "right");
        server.connect().batch_execute("SELECT pg_reload_conf()").unwrap();
        let wrong = with_password(&server, "picky-start", "wrong");
        assert!(
            wait_until(Instant::now() + Duration::from_secs(20), || wrong.connect(NoTls).is_err()),
            "the server does not ask for passwords"
        );
        server
    })
}

/// Sets the password that the server wants.
pub fn set_password(server: &Server, password: &str) {
    let role = "SELECT FROM pg_roles WHERE rolname = 'picky'";
    let mut client = server.connect();
    if client.query_opt(role, &[]).unwrap().is_none() {
        client.batch_execute("CREATE ROLE picky LOGIN").unwrap();
    }
    client.batch_execute(&format!("ALTER ROLE picky PASSWORD '{password}'")).unwrap();
}

/// How `picky` would log in with this password.
pub fn with_password(server: &Server, app: &str, password: &str) -> Config {
    let mut config = server.config(app);
    config.user("picky").password(password);
    config
}

/// How often the server has sent somebody away for a wrong password.
pub fn refused_logins(server: &Server) -> usize {
    server.log().matches("FATAL:  password authentication failed").count()
}
