//! TLS of the two listeners: certificates from files, chosen by the name that
//! the client asks for, and exchanged while connections go on.
//!
//! The files are looked at every second by content, so it does not matter how
//! they are replaced (in place, by a rename, by a link that moves). What can't
//! be used is reported once and the certificates before it stay. A connection
//! keeps what it was opened with; a new one gets what is there.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustls::{
    ServerConfig,
    client::verify_server_name,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::{ClientHello, ParsedCertificate, ResolvesServerCert},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_rustls::TlsAcceptor;

use crate::args::TlsVersion;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where one certificate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// PEM: the certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

/// What the files hold, to see whether that changed.
#[derive(PartialEq, Eq)]
struct Content(Vec<(Vec<u8>, Vec<u8>)>);

impl Content {
    fn read(files: &[Files]) -> anyhow::Result<Self> {
        let read = |path: &Path| {
            fs::read(path).with_context(|| format!("'{}' can't be read", path.display()))
        };
        files
            .iter()
            .map(|pair| Ok((read(&pair.certificate)?, read(&pair.key)?)))
            .collect::<anyhow::Result<_>>()
            .map(Self)
    }
}

/// One certificate with its key, ready to be shown.
#[derive(Debug)]
struct Shown {
    key: Arc<CertifiedKey>,
    /// Seconds since 1970.
    expires: i64,
}

impl Shown {
    fn is_for(&self, name: &ServerName<'_>) -> bool {
        let parsed = self.key.end_entity_cert().map(ParsedCertificate::try_from);
        matches!(parsed, Ok(Ok(certificate)) if verify_server_name(&certificate, name).is_ok())
    }
}

/// The certificates of one listener.
#[derive(Debug)]
pub struct Certificates {
    files: Vec<Files>,
    /// The first is for clients that name no server, or one that none is for. Replaced whole.
    shown: RwLock<Arc<[Shown]>>,
}

impl Certificates {
    /// Fails where one of them can't be used.
    pub fn load(files: Vec<Files>) -> anyhow::Result<Arc<Self>> {
        let content = Content::read(&files)?;
        let shown = RwLock::new(parse(&files, &content)?);
        Ok(Arc::new(Self { files, shown }))
    }

    fn shown(&self) -> Arc<[Shown]> {
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        shown.clone()
    }

    /// When the first of them expires, in seconds since 1970.
    #[must_use]
    pub fn expires(&self) -> i64 {
        let shown = self.shown();
        shown.iter().map(|one| one.expires).min().unwrap_or(0)
    }

    /// Exchanges them when the files change, for ever.
    pub async fn follow(self: Arc<Self>) {
        let mut seen: Option<Content> = None;
        let mut told = String::new();
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let files = self.files.clone();
            let Ok(read) = spawn_blocking(move || Content::read(&files)).await else {
                return;
            };
            let outcome = read.and_then(|content| {
                if seen.as_ref() == Some(&content) {
                    return Ok(false);
                }
                let shown = parse(&self.files, &content);
                // What is wrong is read again only once it changed.
                let first = seen.replace(content).is_none();
                *self.shown.write().unwrap_or_else(PoisonError::into_inner) = shown?;
                Ok(!first)
            });
            match outcome {
                Ok(true) => {
                    told.clear();
                    tracing::info!(certificate = %self.files[0].certificate.display(), "certificates were exchanged");
                }
                Ok(false) => {}
                Err(error) => {
                    let why = format!("{error:#}");
                    if why != told {
                        tracing::warn!(
                            "the new certificates are not used, the old ones stay: {why}"
                        );
                        told = why;
                    }
                }
            }
        }
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let shown = self.shown();
        let name = hello.server_name();
        let name = name.and_then(|name| ServerName::try_from(name).ok());
        let named = name.and_then(|name| shown.iter().find(|one| one.is_for(&name)));
        named.or(shown.first()).map(|one| one.key.clone())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn parse(files: &[Files], content: &Content) -> anyhow::Result<Arc<[Shown]>> {
    files
        .iter()
        .zip(&content.0)
        .map(|(files, (certificate, key))| {
            let (at, key_at) = (files.certificate.display(), files.key.display());
            let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(certificate)
                .collect::<Result<_, _>>()
                .with_context(|| format!("'{at}' is not PEM"))?;
            let Some(first) = chain.first() else {
                bail!("'{at}' holds no certificate (-----BEGIN CERTIFICATE-----)");
            };
            let (_, leaf) = x509_parser::parse_x509_certificate(first)
                .with_context(|| format!("'{at}': its first certificate can't be read"))?;
            let expires = leaf.validity().not_after.timestamp();
            let key = PrivateKeyDer::from_pem_slice(key)
                .with_context(|| format!("'{key_at}' holds no private key in PEM"))?;
            let key = provider()
                .key_provider
                .load_private_key(key)
                .with_context(|| format!("the private key in '{key_at}' can't be used"))?;
            let key = CertifiedKey::new(chain, key);
            ensure!(
                !matches!(
                    key.keys_match(),
                    Err(rustls::Error::InconsistentKeys(
                        rustls::InconsistentKeys::KeyMismatch
                    ))
                ),
                "the private key in '{key_at}' is not that of the certificate in '{at}'"
            );
            Ok(Shown {
                key: Arc::new(key),
                expires,
            })
        })
        .collect()
}

/// How a listener speaks TLS: HTTP/2 and HTTP/1.1 by ALPN, sessions resumed by tickets.
pub fn acceptor(certificates: Arc<Certificates>, least: TlsVersion) -> anyhow::Result<TlsAcceptor> {
    let versions: &[_] = match least {
        TlsVersion::V1_2 => &[&TLS13, &TLS12],
        TlsVersion::V1_3 => &[&TLS13],
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// What every TLS connection begins with; no HTTP head can.
pub const HANDSHAKE: u8 = 22;
