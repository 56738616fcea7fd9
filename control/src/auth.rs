//! Keys: their secrets, who a caller is, and the admin key of the first start.
//!
//! A secret is never stored; what is stored and compared is its SHA-256.

use std::{
    fmt, fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::HeaderValue;
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::{
    directory::{Directory, decode, encode, record},
    model::{AccountId, Key, KeyId, SCOPES},
    private,
    store::{Change, Expect, Partition, Store, StoreError},
};

/// The record of the admin key: there is one, so that one process wins the right to make it.
pub const ADMIN_KEY: KeyId = KeyId(Uuid::from_u128(1));
/// The key of `WEIR_ADMIN_KEY`, which is in no store.
pub const ENVIRONMENT_KEY: KeyId = KeyId(Uuid::from_u128(2));

/// What a caller shows. Neither `Debug` nor `Display` tells it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}
impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("weir_…")
    }
}

/// A new secret: `weir_` and 43 base64url characters, 256 random bits.
#[must_use]
pub fn generate() -> Secret {
    let bytes: [u8; 32] = rand::random();
    Secret(format!("weir_{}", URL_SAFE_NO_PAD.encode(bytes)))
}

/// SHA-256, hexadecimal.
#[must_use]
pub fn hash(secret: &str) -> String {
    use fmt::Write as _;
    Sha256::digest(secret.as_bytes())
        .iter()
        .fold(String::with_capacity(64), |mut hex, byte| {
            _ = write!(hex, "{byte:02x}");
            hex
        })
}

/// Why a caller is nobody.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Denied {
    #[error("no key was given: send 'Authorization: Bearer <key>'")]
    Missing,
    #[error("the key is not known here, or was revoked: check it, or ask for a new one")]
    Unknown,
    #[error("the key has expired: ask for a new one")]
    Expired,
}

/// Whose key the `Authorization` header shows. `admin` is the one of `WEIR_ADMIN_KEY`, where there is one.
pub fn authenticate(
    directory: &Directory,
    admin: Option<&Arc<Key>>,
    header: Option<&HeaderValue>,
    now: Timestamp,
) -> Result<Arc<Key>, Denied> {
    let header = header.ok_or(Denied::Missing)?;
    let (scheme, secret) = header
        .to_str()
        .ok()
        .and_then(|text| text.trim().split_once(' '))
        .ok_or(Denied::Missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Denied::Missing);
    }
    // Digests are compared, so the time it takes tells nothing of the secret.
    let hash = hash(secret.trim());
    let key = match admin {
        Some(admin) if admin.hash == hash => admin.clone(),
        _ => directory.key_by_hash(&hash).ok_or(Denied::Unknown)?,
    };
    if key.expires_at.is_some_and(|at| at <= now) {
        return Err(Denied::Expired);
    }
    Ok(key)
}

/// Whether the key has the scope; the admin key has all.
#[must_use]
pub fn allows(key: &Key, scope: &str) -> bool {
    key.admin || key.scopes.iter().any(|s| s == scope)
}

/// A key with every scope, for every account.
#[must_use]
pub fn admin_key(id: KeyId, hash: String) -> Key {
    Key {
        id,
        name: "admin".into(),
        account: AccountId::default_account(),
        scopes: SCOPES.iter().map(|s| (*s).to_owned()).collect(),
        functions: None,
        priority: 5,
        expires_at: None,
        created_at: Timestamp::now(),
        hash,
        admin: true,
    }
}

/// Where the admin key is.
#[derive(Clone, Debug, Default)]
pub struct AdminKey {
    /// The one of `WEIR_ADMIN_KEY`: in memory only, for [`authenticate`].
    pub key: Option<Arc<Key>>,
    /// The file with its secret; none where the environment gave it or another process made it.
    pub file: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum AdminKeyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the admin key can't be kept in '{}': let weir's user read and write that file, or set WEIR_ADMIN_KEY", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("'{}' does not hold a key: remove it, and the next start makes one", .0.display())]
    NotAKey(PathBuf),
}

/// Sees to it that there is an admin key: the one of the environment (then nothing is written),
/// else the one of `<data_dir>/admin.key`, which is made at the first start.
///
/// One that was revoked is none: the log says how to get another, and all else goes on without.
pub async fn ensure_admin_key(
    store: &dyn Store,
    data_dir: &Path,
    env: Option<String>,
) -> Result<AdminKey, AdminKeyError> {
    if let Some(secret) = env.as_deref().map(str::trim).filter(|s| !s.is_empty()) {
        let hash = hash(secret);
        if revoked(store, &hash).await? {
            tracing::error!(
                "there is no admin key: the one of WEIR_ADMIN_KEY was revoked; set another, or unset it to use the one of '{}'",
                data_dir.join("admin.key").display()
            );
            return Ok(AdminKey::default());
        }
        return Ok(AdminKey {
            key: Some(Arc::new(admin_key(ENVIRONMENT_KEY, hash))),
            file: None,
        });
    }
    let path = data_dir.join("admin.key");
    let stored = stored_admin_key(store).await?;
    let mut secret = read_secret(&path)?;
    if let (Some(secret), None) = (&secret, &stored)
        && revoked(store, &hash(secret.expose())).await?
    {
        tracing::error!(
            "there is no admin key: the one of '{}' was revoked; remove that file and start again, which makes a new one, or set WEIR_ADMIN_KEY",
            path.display()
        );
        return Ok(AdminKey::default());
    }
    if secret.is_none() && stored.is_none() {
        // The file first: a crash after it leaves a secret that the next start stores.
        secret = Some(write_secret(&path, &generate())?);
    }
    let file = |hash: &str, secret: &Option<Secret>| {
        secret
            .as_ref()
            .filter(|secret| self::hash(secret.expose()) == hash)
            .map(|_| path.clone())
    };
    if let Some(stored) = stored {
        return Ok(AdminKey {
            key: None,
            file: file(&stored.hash, &secret),
        });
    }
    let hash = secret
        .as_ref()
        .map(|s| hash(s.expose()))
        .unwrap_or_default();
    let change = Change {
        key: record::key(ADMIN_KEY),
        expect: Expect::Absent,
        value: Some(encode(&admin_key(ADMIN_KEY, hash.clone()))),
    };
    let winner = match store.commit(Partition::Keys, vec![change]).await {
        Ok(_) => hash,
        Err(error @ (StoreError::Conflict { .. } | StoreError::Unknown(_))) => {
            match (stored_admin_key(store).await?, error) {
                (Some(stored), _) => stored.hash,
                (None, StoreError::Conflict { .. }) => hash,
                (None, error) => return Err(error.into()),
            }
        }
        Err(error) => return Err(error.into()),
    };
    Ok(AdminKey {
        key: None,
        file: file(&winner, &secret),
    })
}

/// What makes a revocation of the admin key last: neither its file nor the variable brings it back.
#[must_use]
pub fn revocation(key: &Key) -> Change {
    Change {
        key: record::revoked(&key.hash),
        expect: Expect::Anything,
        value: Some(encode(&Timestamp::now())),
    }
}

async fn revoked(store: &dyn Store, hash: &str) -> Result<bool, StoreError> {
    let found = store.get(Partition::Keys, &record::revoked(hash)).await?;
    Ok(found.is_some())
}

async fn stored_admin_key(store: &dyn Store) -> Result<Option<Key>, StoreError> {
    let name = record::key(ADMIN_KEY);
    match store.get(Partition::Keys, &name).await? {
        Some(found) => decode(&name, &found.value).map(Some),
        None => Ok(None),
    }
}

fn read_secret(path: &Path) -> Result<Option<Secret>, AdminKeyError> {
    match fs::read_to_string(path) {
        Ok(text) if text.trim().len() == 48 && text.starts_with("weir_") => {
            Ok(Some(Secret(text.trim().to_owned())))
        }
        Ok(_) => Err(AdminKeyError::NotAKey(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(AdminKeyError::File {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Whole, synced, and never over one that is there already; answers what the file holds then.
fn write_secret(path: &Path, secret: &Secret) -> Result<Secret, AdminKeyError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let temporary = directory.join(format!(".admin.key.{}", Uuid::new_v4()));
    let written = (|| {
        private::directory(directory)?;
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        writeln!(file, "{}", secret.expose())?;
        file.sync_all()?;
        let renamed = rustix::fs::renameat_with(
            rustix::fs::CWD,
            &temporary,
            rustix::fs::CWD,
            path,
            rustix::fs::RenameFlags::NOREPLACE,
        );
        match renamed {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => fs::remove_file(&temporary)?,
            Err(error) => return Err(error.into()),
        }
        fs::File::open(directory)?.sync_all()
    })();
    if let Err(source) = written {
        _ = fs::remove_file(&temporary);
        return Err(AdminKeyError::File {
            path: path.to_owned(),
            source,
        });
    }
    read_secret(path)?.ok_or_else(|| AdminKeyError::NotAKey(path.to_owned()))
}
