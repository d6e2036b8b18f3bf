//! Certificates made for the occasion.

use std::sync::{Arc, LazyLock};

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
    pub(super) fn get() -> &'static Identity {
        static IDENTITY: LazyLock<Identity> = LazyLock::new(|| Identity::signed_by("a friend"));
        &IDENTITY
    }

    pub(super) fn certificate_pem(&self) -> String {
        self.certificate.pem()
    }

    pub(super) fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// The server's side of a handshake.
    pub(super) fn server(&self) -> rustls::ServerConnection {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.der().clone()], key)
            .unwrap();
        rustls::ServerConnection::new(Arc::new(config)).unwrap()
    }

    fn connector_that_trusts(authority: &CertificateDer<'static>) -> MakeRustlsConnect {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority.clone()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        MakeRustlsConnect::new(config)
    }

    /// A connector for clients that trust it.
    pub(super) fn trusting(&self) -> MakeRustlsConnect {
        Identity::connector_that_trusts(&self.authority)
    }
}

/// A connector that trusts somebody else.
pub(super) fn wary() -> MakeRustlsConnect {
    Identity::connector_that_trusts(&Identity::signed_by("a stranger").authority)
}
