//! Storage of a token's bytes.

use std::fmt;
use std::ops::Deref;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// Largest number of bytes that is stored in place. With the length, they take as much memory as a `Vec`.
const SHORT: usize = 22;

/// The bytes of a token.
///
/// An answer with its top-k tokens has tens of thousands of spellings, nearly all of a few bytes; up to 22 bytes are
/// stored without an allocation. The serialised form is that of a `Vec<u8>`.
#[derive(Clone)]
pub struct Spelling(SpellingBytes);

#[derive(Clone)]
enum SpellingBytes {
    Short { len: u8, bytes: [u8; SHORT] },
    Long(Box<[u8]>),
}

impl Deref for Spelling {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            SpellingBytes::Short { len, bytes } => {
                bytes.get(..usize::from(*len)).unwrap_or_default()
            }
            SpellingBytes::Long(bytes) => bytes,
        }
    }
}

impl From<&[u8]> for Spelling {
    fn from(bytes: &[u8]) -> Spelling {
        let mut short = [0; SHORT];
        Spelling(match short.get_mut(..bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                SpellingBytes::Short {
                    len: bytes.len() as u8,
                    bytes: short,
                }
            }
            None => SpellingBytes::Long(bytes.into()),
        })
    }
}

impl From<Vec<u8>> for Spelling {
    fn from(bytes: Vec<u8>) -> Spelling {
        match bytes.len() {
            ..=SHORT => bytes.as_slice().into(),
            _ => Spelling(SpellingBytes::Long(bytes.into())),
        }
    }
}

impl From<&str> for Spelling {
    fn from(text: &str) -> Spelling {
        text.as_bytes().into()
    }
}

impl Default for Spelling {
    fn default() -> Spelling {
        [].as_slice().into()
    }
}

impl PartialEq for Spelling {
    fn eq(&self, other: &Spelling) -> bool {
        **self == **other
    }
}

impl Eq for Spelling {}

impl fmt::Debug for Spelling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl Serialize for Spelling {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for Spelling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Spelling, D::Error> {
        struct BytesVisitor;
        impl<'de> Visitor<'de> for BytesVisitor {
            type Value = Spelling;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a token's bytes")
            }
            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Spelling, E> {
                Ok(bytes.into())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Spelling, A::Error> {
                let (mut len, mut bytes) = (0, [0; SHORT]);
                while let Some(byte) = seq.next_element()? {
                    let Some(place) = bytes.get_mut(len) else {
                        let mut long = bytes.to_vec();
                        long.push(byte);
                        while let Some(byte) = seq.next_element()? {
                            long.push(byte);
                        }
                        return Ok(long.into());
                    };
                    *place = byte;
                    len += 1;
                }
                Ok(Spelling(SpellingBytes::Short {
                    len: len as u8,
                    bytes,
                }))
            }
        }
        deserializer.deserialize_seq(BytesVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_any_length_have_the_json_form_of_a_vec() {
        assert_eq!(size_of::<Spelling>(), size_of::<Vec<u8>>());
        for len in [0, 1, 21, 22, 23, 24, 300] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 % 256) as u8).collect();
            let spelling = Spelling::from(bytes.clone());
            assert_eq!(*spelling, *bytes, "{len}");
            assert_eq!(spelling, Spelling::from(bytes.as_slice()));
            let json = serde_json::to_string(&bytes).unwrap();
            assert_eq!(serde_json::to_string(&spelling).unwrap(), json);
            assert_eq!(serde_json::from_str::<Spelling>(&json).unwrap(), spelling);
        }
        assert_ne!(Spelling::from("a"), Spelling::from("b"));
        assert!(serde_json::from_str::<Spelling>("[256]").is_err());
    }
}
