use std::fmt;
use std::ops::Deref;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// As many bytes as fit beside their number in the room of a `Vec`.
const SHORT: usize = 22;

/// The bytes of a token: a slice that owns them.
///
/// An answer with its alternatives has tens of thousands, nearly all of a few bytes; those up to 22 bytes are held in
/// place. Serialized as a sequence of bytes, as a `Vec<u8>` is.
#[derive(Clone)]
pub struct Spelling(Held);

#[derive(Clone)]
enum Held {
    Short { len: u8, bytes: [u8; SHORT] },
    Long(Box<[u8]>),
}

impl Deref for Spelling {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Held::Short { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Held::Long(bytes) => bytes,
        }
    }
}

impl From<&[u8]> for Spelling {
    fn from(bytes: &[u8]) -> Spelling {
        let mut short = [0; SHORT];
        Spelling(match short.get_mut(..bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                Held::Short {
                    len: bytes.len() as u8,
                    bytes: short,
                }
            }
            None => Held::Long(bytes.into()),
        })
    }
}

impl From<Vec<u8>> for Spelling {
    fn from(bytes: Vec<u8>) -> Spelling {
        match bytes.len() {
            ..=SHORT => bytes.as_slice().into(),
            _ => Spelling(Held::Long(bytes.into())),
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
        struct Reads;
        impl<'de> Visitor<'de> for Reads {
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
                Ok(Spelling(Held::Short {
                    len: len as u8,
                    bytes,
                }))
            }
        }
        deserializer.deserialize_seq(Reads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_any_length_and_as_a_vec_in_json() {
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
