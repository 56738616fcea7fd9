//! Connections to instances, plain or over TLS: whose certificates are
//! trusted, and what is wrong where one is not. The health check and the
//! request path both connect here.

use std::{
    error::Error,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use rustls::{
    CertificateError, ClientConfig, InvalidMessage, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("'{path}' can't be read", path = .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("'{path}' holds no certificate in PEM (-----BEGIN CERTIFICATE-----)", path = .0.display())]
    Empty(PathBuf),
    #[error("'{path}' holds a certificate that can't be used", path = .0.display())]
    Unusable(PathBuf, #[source] Box<dyn Error + Send + Sync>),
}

/// Whose certificates an instance may show: the system's authorities, and those of a file.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    added: Arc<[CertificateDer<'static>]>,
    /// Made when it is first needed: most nodes have no such instance.
    config: Arc<OnceLock<Result<Arc<ClientConfig>, rustls::Error>>>,
}

impl Trust {
    /// The system's, and those in this PEM file.
    pub fn adding(file: &Path) -> Result<Self, TrustError> {
        let bytes = fs::read(file).map_err(|e| TrustError::Read(file.into(), e))?;
        let unusable = |e: Box<dyn Error + Send + Sync>| TrustError::Unusable(file.into(), e);
        let added: Arc<[CertificateDer<'static>]> = CertificateDer::pem_slice_iter(&bytes)
            .collect::<Result<_, _>>()
            .map_err(|e| unusable(e.to_string().into()))?;
        if added.is_empty() {
            return Err(TrustError::Empty(file.into()));
        }
        let mut roots = RootCertStore::empty();
        for certificate in added.iter() {
            roots
                .add(certificate.clone())
                .map_err(|e| unusable(e.into()))?;
        }
        Ok(Self {
            added,
            config: Arc::default(),
        })
    }

    fn connector(&self) -> Result<TlsConnector, DialError> {
        match self.config.get_or_init(|| self.make()) {
            Ok(config) => Ok(TlsConnector::from(config.clone())),
            Err(error) => Err(DialError::Tls(explain(error, INSTANCE_CA))),
        }
    }

    /// Sessions are resumed by what it remembers of each name.
    fn make(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::warn!(%error, "some of the system's certificate authorities can't be read");
        }
        roots.add_parsable_certificates(system.certs);
        for certificate in self.added.iter() {
            roots.add(certificate.clone())?;
        }
        let mut config =
            ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

const INSTANCE_CA: &str = "--instance-ca";

/// Why there is no connection; nothing of a request was sent.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error(transparent)]
    Connect(io::Error),
    /// The handshake failed; in words for people.
    #[error("{0}")]
    Tls(String),
}

/// Connects, over TLS where there is a name that the certificate has to be for.
pub async fn connect(
    address: SocketAddr,
    tls: Option<(&Trust, &ServerName<'static>)>,
) -> Result<Link, DialError> {
    let stream = TcpStream::connect(address)
        .await
        .map_err(DialError::Connect)?;
    _ = stream.set_nodelay(true);
    let Some((trust, name)) = tls else {
        return Ok(Link::Plain(stream));
    };
    let handshake = trust.connector()?.connect(name.clone(), stream);
    // Large, and not to be a part of every future that may connect.
    match Box::pin(handshake).await {
        Ok(stream) => Ok(Link::Secure(Box::new(stream))),
        Err(error) => Err(DialError::Tls(match tls_error(&error) {
            Some(error) => explain(error, INSTANCE_CA),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                "it closed the connection amid the TLS handshake".into()
            }
            None => format!("the TLS handshake failed: {error}"),
        })),
    }
}

/// The error of TLS that is behind another.
#[must_use]
pub fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    if let Some(found) = error.downcast_ref() {
        return Some(found);
    }
    // The source of an I/O error is that of the error it was made of.
    let inner = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref);
    match inner {
        Some(inner) => tls_error(inner),
        None => tls_error(error.source()?),
    }
}

/// What is wrong with a server, in words. `flag` takes a file of further authorities.
#[must_use]
pub fn explain(error: &rustls::Error, flag: &str) -> String {
    use CertificateError as Wrong;
    match error {
        rustls::Error::InvalidCertificate(wrong) => match wrong {
            // The second: it names an authority that is known and has another key.
            Wrong::UnknownIssuer | Wrong::BadSignature => format!(
                "its certificate is not trusted: give {flag} a PEM file with its authority's certificate"
            ),
            Wrong::NotValidForNameContext {
                expected,
                presented,
            } => format!(
                "its certificate is not for the name {} but for {}",
                expected.to_str(),
                presented.join(", ")
            ),
            Wrong::Expired | Wrong::ExpiredContext { .. } => "its certificate has expired".into(),
            Wrong::NotValidYet | Wrong::NotValidYetContext { .. } => {
                "its certificate is not valid yet".into()
            }
            other => format!("its certificate is refused: {other}"),
        },
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "it does not speak TLS: is it http:// instead of https://?".into()
        }
        other => format!("the TLS handshake failed: {other}"),
    }
}

/// A connection to an instance.
#[derive(Debug)]
pub enum Link {
    Plain(TcpStream),
    Secure(Box<TlsStream<TcpStream>>),
}

impl Link {
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Secure(stream) => stream.get_ref().0,
        }
    }

    /// Below TLS: what is read here is not decrypted, and lost to whoever reads above.
    pub fn socket_mut(&mut self) -> &mut TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Secure(stream) => stream.get_mut().0,
        }
    }

    /// Whether something that was written is not in the socket yet.
    #[must_use]
    pub fn holds_back(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Secure(stream) => stream.get_ref().1.wants_write(),
        }
    }
}

macro_rules! either {
    ($link:expr, $stream:ident => $call:expr) => {
        match $link.get_mut() {
            Link::Plain(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
            Link::Secure(stream) => {
                let $stream = Pin::new(&mut **stream);
                $call
            }
        }
    };
}

impl AsyncRead for Link {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Link {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(cx, buf))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write_vectored(cx, bufs))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(cx))
    }
}
