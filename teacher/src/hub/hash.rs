//! Hashes by which the Hub names contents: SHA-256 for large files, and git's blob hash for small ones.

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Hash of a file's content, which is also the name of its blob in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlobHash {
    /// SHA-256 of the content, as hexadecimal digits.
    Sha256(String),
    /// SHA-1 of `blob SIZE`, a zero byte and the content, as hexadecimal digits.
    GitSha1(String),
}

/// A hash that is being computed.
pub(super) enum BlobHasher {
    Sha256(Sha256),
    GitSha1(Sha1),
}

impl BlobHash {
    /// Reads a hash from an ETag or a file name; `None` for another text.
    pub(super) fn read(text: &str) -> Option<BlobHash> {
        let digits = text.strip_prefix("W/").unwrap_or(text).trim_matches('"');
        let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        match digits.len() {
            _ if !digits.chars().all(is_hex) => None,
            64 => Some(BlobHash::Sha256(digits.to_owned())),
            40 => Some(BlobHash::GitSha1(digits.to_owned())),
            _ => None,
        }
    }

    /// The hexadecimal digits.
    pub(super) fn digits(&self) -> &str {
        match self {
            BlobHash::Sha256(digits) | BlobHash::GitSha1(digits) => digits,
        }
    }

    /// Starts to hash a content of `size` bytes in the way of this hash.
    pub(super) fn hasher(&self, size: u64) -> BlobHasher {
        match self {
            BlobHash::Sha256(_) => BlobHasher::Sha256(Sha256::new()),
            BlobHash::GitSha1(_) => {
                BlobHasher::GitSha1(Sha1::new_with_prefix(format!("blob {size}\0")))
            }
        }
    }
}

impl BlobHasher {
    /// Takes the next bytes of the content.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            BlobHasher::Sha256(hash) => hash.update(bytes),
            BlobHasher::GitSha1(hash) => hash.update(bytes),
        }
    }

    /// The hash of the bytes so far, as hexadecimal digits.
    pub(super) fn digits(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            BlobHasher::Sha256(hash) => hex(&hash.finalize()),
            BlobHasher::GitSha1(hash) => hex(&hash.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values are those of `sha256sum` and of `git hash-object`.
    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        let digits = |hash: &str| {
            let mut hasher = BlobHash::read(hash).unwrap().hasher(6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            hasher.digits()
        };
        assert_eq!(
            digits(&"0".repeat(40)),
            "ce013625030ba8dba906f756967f9e9ca394464a"
        );
        assert_eq!(
            digits(&"0".repeat(64)),
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
        );
    }

    #[test]
    fn only_hashes_are_read() {
        let sha1 = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(
            BlobHash::read(&format!("W/\"{sha1}\"")),
            Some(BlobHash::GitSha1(sha1.to_owned()))
        );
        let with_path = format!("../{}", &sha1[3..]);
        for other in [
            "",
            "x",
            "d41d8cd98f00b204e9800998ecf8427e",
            &with_path,
            &sha1.to_uppercase(),
        ] {
            assert_eq!(BlobHash::read(other), None, "{other}");
        }
    }
}
