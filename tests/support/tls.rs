//! Certificates made for the occasion, and a server that has one.
//!
//! Not part of the rest of the support, for it takes long to build: included by path, beside `support`.

#![allow(dead_code, unreachable_pub, reason = "compiled into each test on its own, none of which uses all of it")]

use super::support::programs::User;
use super::support::{Server, wait_until};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_postgres_rustls::MakeRustlsConnect;

/// A server's certificate for `db.test`, its key, and whoever signed it.
pub(super) struct Identity {
    authority: CertificateDer<'static>,
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Identity {
    fn signed_by(name: &str) -> Identity {
        let authority_key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new([]).unwrap();
        authority.distinguished_name.push(DnType::CommonName, name);
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = authority.self_signed(&authority_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["db.test".into()]).unwrap();
        let certificate = params.signed_by(&key, &authority, &authority_key).unwrap();
        Identity { authority: authority.der().clone(), certificate, key }
    }

    /// The one that all servers here have.
    pub fn get() -> &'static Identity {
        static IDENTITY: LazyLock<Identity> = LazyLock::new(|| Identity::signed_by("a friend"));
        &IDENTITY
    }

    pub fn certificate_pem(&self) -> String {
        self.certificate.pem()
    }

    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// The server's side of a handshake.
    pub fn server(&self) -> rustls::ServerConnection {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.der().clone()], key)
            .unwrap();
        rustls::ServerConnection::new(Arc::new(config)).unwrap()
    }

    fn connector_that_trusts(authority: &CertificateDer<'static>, protocols: &[&str]) -> MakeRustlsConnect {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority.clone()).unwrap();
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        MakeRustlsConnect::new(config)
    }

    /// A connector for clients that trust it.
    pub fn trusting(&self) -> MakeRustlsConnect {
        Identity::connector_that_trusts(&self.authority, &[])
    }

    /// The same, and it says what will be spoken: `sslnegotiation=direct` takes that.
    pub fn trusting_directly(&self) -> MakeRustlsConnect {
        Identity::connector_that_trusts(&self.authority, &["postgresql"])
    }
}

/// A connector that trusts somebody else.
pub fn wary() -> MakeRustlsConnect {
    Identity::connector_that_trusts(&Identity::signed_by("a stranger").authority, &[])
}

/// A server with TLS as `db.test`, where `scrammed` needs a password.
pub fn with_tls() -> &'static Server {
    static SERVER: LazyLock<Server> = LazyLock::new(|| {
        let server = Server::start();
        let write = |name: &str, text: &str| {
            let path = server.socket_dir().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            if let Some(User { uid, gid }) = User::for_server() {
                std::os::unix::fs::chown(&path, Some(uid), Some(gid)).unwrap();
            }
            path.display().to_string()
        };
        let identity = Identity::get();
        let certificate = write("certificate.pem", &identity.certificate_pem());
        let key = write("key.pem", &identity.key_pem());
        write("data/pg_hba.conf", "host all scrammed 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n");
        let mut client = server.connect();
        client.batch_execute("CREATE ROLE scrammed LOGIN PASSWORD 'secret'").unwrap();
        for (name, value) in [("ssl", "on".into()), ("ssl_cert_file", certificate), ("ssl_key_file", key)] {
            client.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'")).unwrap();
        }
        client.batch_execute("SELECT pg_reload_conf()").unwrap();
        let params = format!("host=db.test hostaddr=127.0.0.1 port={} user=postgres sslmode=require", server.port());
        let config: ::postgres::Config = params.parse().unwrap();
        let up = wait_until(Instant::now() + Duration::from_secs(10), || config.connect(identity.trusting()).is_ok());
        assert!(up, "no TLS: {}", server.log());
        server
    });
    &SERVER
}
