//! Clients that call by https as well.

use std::path::Path;

use anyhow::Context;
use reqwest::{Certificate, ClientBuilder};

/// For these URLs. Where one of them is https, servers may have certificates of the system's authorities and of those
/// in this PEM file.
pub fn builder(urls: &[&str], ca_file: Option<&Path>) -> anyhow::Result<ClientBuilder> {
    let added = match ca_file {
        Some(file) => authorities(file)
            .with_context(|| format!("the CA file '{}' can't be used", file.display()))?,
        None => Vec::new(),
    };
    let secure = |url: &&str| {
        url.get(..6)
            .is_some_and(|s| s.eq_ignore_ascii_case("https:"))
    };
    let builder = ClientBuilder::new();
    Ok(match urls.iter().any(secure) {
        true => builder.tls_certs_merge(added),
        // The system's are not read in vain; there may be none.
        false => builder.tls_certs_only(added),
    })
}

fn authorities(file: &Path) -> anyhow::Result<Vec<Certificate>> {
    let found = Certificate::from_pem_bundle(&std::fs::read(file)?)?;
    anyhow::ensure!(
        !found.is_empty(),
        "it holds no certificate in PEM (-----BEGIN CERTIFICATE-----)"
    );
    Ok(found)
}
