//! Identifiers as people write them: whole, or their first characters.

use std::{fmt, str::FromStr};

use anyhow::bail;
use uuid::Uuid;

/// Characters that a prefix has at least.
const LEAST: usize = 4;

/// A UUID or the beginning of one, in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Id(String);

impl Id {
    /// The identifier itself, where it is whole.
    pub(super) fn whole(&self) -> Option<Uuid> {
        self.0.parse().ok()
    }

    fn begins(&self, id: Uuid) -> bool {
        id.to_string().starts_with(&self.0)
    }

    /// The one of these that is meant; `what` is what they are, in the plural.
    pub(super) fn pick<T>(
        &self,
        all: impl IntoIterator<Item = T>,
        id: impl Fn(&T) -> Uuid,
        what: &str,
    ) -> anyhow::Result<Option<T>> {
        let mut found: Vec<T> = all
            .into_iter()
            .filter(|entry| self.begins(id(entry)))
            .collect();
        if found.len() > 1 {
            let ids: Vec<String> = found.iter().map(|f| format!("\n  {}", id(f))).collect();
            bail!(
                "the IDs of {} {what} begin with '{self}': give more of it, one of{}",
                found.len(),
                ids.concat()
            );
        }
        Ok(found.pop())
    }
}

impl FromStr for Id {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let text = s.to_ascii_lowercase();
        if let Ok(id) = text.parse::<Uuid>() {
            return Ok(Self(id.to_string()));
        }
        let shaped = text.bytes().enumerate().all(|(at, b)| match at {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_hexdigit(),
        });
        if shaped && (LEAST..36).contains(&text.len()) {
            Ok(Self(text))
        } else {
            Err(format!(
                "'{s}' is not an ID such as 3f2a91c0-5f6e-4c1b-9d55-0a1b2c3d4e5f, nor its first {LEAST} characters or more"
            ))
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_stands_for_what_it_begins() {
        let ids = [
            0x3f2a_91c0_u128 << 96,
            (0x3f2a_91c0 << 96) + 1,
            0xab00 << 112,
        ];
        let ids = ids.map(Uuid::from_u128);
        let pick = |text: &str| {
            let id: Id = text.parse().unwrap();
            id.pick(ids, |id| *id, "versions")
        };
        assert_eq!(pick("AB00").unwrap(), Some(ids[2]));
        assert_eq!(pick("ab01").unwrap(), None);
        assert_eq!(pick(&ids[0].to_string()).unwrap(), Some(ids[0]));
        let error = pick("3f2a91c0-0000").unwrap_err().to_string();
        assert!(error.starts_with("the IDs of 2 versions begin with '3f2a91c0-0000'"));
        assert!(error.contains(&ids[1].to_string()), "{error}");
        for wrong in ["", "abc", "hello", "3f2a91c05", "3f2a-91c0"] {
            assert!(wrong.parse::<Id>().is_err(), "{wrong}");
        }
    }
}
