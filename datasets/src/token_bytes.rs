//! The bytes of each token id, and the fingerprint that shows whether two tokenizers agree.
//!
//! A vocabulary does not contain bytes but characters of an alphabet. Byte-level BPE (GPT-2 and most later models)
//! writes each byte as a printable character. SentencePiece writes a space as `▁`, and a byte that no piece covers as
//! `<0xNN>`. The decoder in `tokenizer.json` determines the alphabet. Special tokens are plain text in both.

use std::collections::HashMap;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::canonical::hex;

/// Upper limit of ids, far above any vocabulary. A broken file must not cause an allocation for 4 billion ids.
const MAX_IDS: u32 = 1 << 24;

/// The alphabet in which a vocabulary's entries spell bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    /// GPT-2's map from bytes to printable characters.
    ByteLevel,
    /// `▁` for a space, and `<0xNN>` for a byte where `byte_fallback` is set.
    SentencePiece { byte_fallback: bool },
    /// Entries are plain text.
    Verbatim,
}

/// The bytes of all tokens, concatenated in one buffer.
#[derive(Debug)]
pub(crate) struct TokenBytes {
    bytes: Vec<u8>,
    /// Token i is `bytes[ends[i - 1]..ends[i]]`. An id that is not in the vocabulary has no bytes.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// Reads the alphabet from the `decoder` of tokenizer.json and computes the bytes of the vocabulary. `added` has the
    /// text of each added token and whether it is special; it takes precedence over `vocabulary`. The error is a sentence
    /// about the file.
    pub(crate) fn new(
        json: &Value,
        vocabulary: &HashMap<String, u32>,
        added: &HashMap<u32, (String, bool)>,
    ) -> Result<Self, String> {
        let alphabet = alphabet(&json["decoder"])?;
        let byte_of_char = byte_of_char();
        let mut entries: Vec<(u32, Vec<u8>)> =
            vocabulary
                .iter()
                .filter(|(_, id)| !added.contains_key(id))
                .map(|(token, &id)| (id, spell(token, alphabet, &byte_of_char)))
                .chain(added.iter().map(|(&id, (content, special))| {
                    (id, spell_added(content, *special, alphabet))
                }))
                .collect();
        entries.sort_unstable();
        entries.dedup_by_key(|(id, _)| *id);
        if let Some((id, _)) = entries.last().filter(|(id, _)| *id >= MAX_IDS) {
            return Err(format!(
                "token id {id} is too large: Potstill reads vocabularies of up to {MAX_IDS} ids"
            ));
        }
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::new(),
        };
        for (id, bytes) in entries {
            table.ends.resize(id as usize, table.bytes.len());
            table.bytes.extend_from_slice(&bytes);
            table.ends.push(table.bytes.len());
        }
        Ok(table)
    }

    /// Returns the largest id + 1.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns the bytes of a token; none for an id that is not in the vocabulary.
    pub(crate) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 {
            Some(&0)
        } else {
            self.ends.get(id - 1)
        };
        match (start, self.ends.get(id)) {
            (Some(&start), Some(&end)) => self.bytes.get(start..end).unwrap_or_default(),
            _ => &[],
        }
    }

    /// Computes the SHA-256 of everything that determines the mapping between text and ids: (id, bytes) by id, the merges
    /// in order (or the pieces and scores of a Unigram model), and the added tokens by id. Each field is hashed with its
    /// length, so no two vocabularies give the same message.
    pub(crate) fn fingerprint(&self, json: &Value, added: &HashMap<u32, (String, bool)>) -> String {
        let mut hash = FieldHash(Sha256::new());
        for id in 0..self.len() as u32 {
            hash.number(u64::from(id));
            hash.field(self.get(id));
        }
        let merges = json["model"]["merges"].as_array();
        let pieces = json["model"]["vocab"].as_array();
        for rule in merges.or(pieces).into_iter().flatten() {
            // A merge is "a b" in older files and ["a", "b"] in newer ones; a piece is ["a", -1.5].
            let (first, second) = match rule {
                Value::String(pair) => pair.split_once(' ').unwrap_or((pair, "")),
                pair => (
                    pair[0].as_str().unwrap_or_default(),
                    pair[1].as_str().unwrap_or_default(),
                ),
            };
            hash.field(first.as_bytes());
            hash.field(second.as_bytes());
            hash.number(rule[1].as_f64().unwrap_or_default().to_bits());
        }
        let mut added: Vec<_> = added.iter().collect();
        added.sort_unstable();
        hash.number(added.len() as u64);
        for (&id, (content, special)) in added {
            hash.number(u64::from(id));
            hash.field(content.as_bytes());
            hash.number(u64::from(*special));
        }
        hex(&hash.0.finalize())
    }
}

struct FieldHash(Sha256);

impl FieldHash {
    fn number(&mut self, number: u64) {
        self.0.update(number.to_le_bytes());
    }

    fn field(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
    }
}

fn alphabet(decoder: &Value) -> Result<Alphabet, String> {
    let steps: Vec<&Value> = match decoder["decoders"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![decoder],
    };
    let mut byte_fallback = false;
    let mut word_mark = false;
    for step in steps {
        match step["type"].as_str() {
            Some("ByteLevel") => return Ok(Alphabet::ByteLevel),
            Some("ByteFallback") => byte_fallback = true,
            Some("Metaspace") => word_mark = true,
            Some("Replace") if step["pattern"]["String"] == "▁" && step["content"] == " " => {
                word_mark = true
            }
            // These steps join or trim whole texts and do not change the bytes of a token.
            Some("Fuse" | "Strip") | None => {}
            Some(other) => {
                return Err(format!(
                    "the decoder `{other}` is not supported; Potstill reads byte-level BPE and SentencePiece vocabularies"
                ));
            }
        }
    }
    Ok(if word_mark || byte_fallback {
        Alphabet::SentencePiece { byte_fallback }
    } else {
        Alphabet::Verbatim
    })
}

fn spell(token: &str, alphabet: Alphabet, byte_of_char: &HashMap<char, u8>) -> Vec<u8> {
    match alphabet {
        // A token with a character outside the alphabet is plain text, as in the reference decoder.
        Alphabet::ByteLevel => token
            .chars()
            .map(|c| byte_of_char.get(&c).copied())
            .collect::<Option<Vec<u8>>>()
            .unwrap_or_else(|| token.as_bytes().to_vec()),
        Alphabet::SentencePiece { byte_fallback } => match fallback_byte(token) {
            Some(byte) if byte_fallback => vec![byte],
            _ => token.replace('▁', " ").into_bytes(),
        },
        Alphabet::Verbatim => token.as_bytes().to_vec(),
    }
}

/// Returns the bytes of an added token. Gemma lists pieces such as `▁▁`, two spaces, among its added tokens, but they are
/// not special.
fn spell_added(content: &str, special: bool, alphabet: Alphabet) -> Vec<u8> {
    match alphabet {
        Alphabet::SentencePiece { .. } if !special => content.replace('▁', " ").into_bytes(),
        _ => content.as_bytes().to_vec(),
    }
}

/// Returns the byte that a token of the form `<0xNN>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// Returns GPT-2's alphabet: a printable byte is its own character, and the other 68 bytes are U+0100 and up, in order
/// (`bytes_to_unicode` in openai/gpt-2, src/encoder.py).
fn byte_of_char() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=255_u8)
        .filter_map(|byte| {
            let code = match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => u32::from(byte),
                _ => {
                    next += 1;
                    next - 1
                }
            };
            char::from_u32(code).map(|c| (c, byte))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bytes_of(token: &str, decoder: Value) -> Vec<u8> {
        let vocabulary = HashMap::from([(token.to_owned(), 0)]);
        TokenBytes::new(&json!({ "decoder": decoder }), &vocabulary, &HashMap::new())
            .unwrap()
            .get(0)
            .to_vec()
    }

    #[test]
    fn all_bytes_have_a_character() {
        let map = byte_of_char();
        assert_eq!(map.len(), 256);
        assert_eq!(map[&'Ġ'], b' ');
        assert_eq!(map[&'Ċ'], b'\n');
        assert_eq!(map[&'ĉ'], b'\t');
        assert_eq!(map[&'a'], b'a');
        assert_eq!(map[&'Ń'], 0xAD);
    }

    #[test]
    fn each_alphabet_spells_bytes_in_its_own_way() {
        let byte_level = json!({ "type": "ByteLevel" });
        let sentence_piece = json!({ "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" }, { "type": "Strip" } ] });
        assert_eq!(
            bytes_of("Ġðŀĺ", byte_level.clone()),
            [b' ', 0xF0, 0x9E, 0x98]
        );
        assert_eq!(bytes_of("｜x", byte_level), "｜x".as_bytes());
        assert_eq!(bytes_of("▁a▁", sentence_piece.clone()), b" a ");
        assert_eq!(bytes_of("<0xE2>", sentence_piece.clone()), [0xE2]);
        assert_eq!(bytes_of("<0xE2", sentence_piece), b"<0xE2");
        assert_eq!(
            bytes_of("<0xE2>", json!({ "type": "Metaspace" })),
            b"<0xE2>"
        );
        assert_eq!(bytes_of("▁a", Value::Null), "▁a".as_bytes());
    }

    #[test]
    fn added_tokens_are_plain_text_and_missing_ids_have_no_bytes() {
        let vocabulary = HashMap::from([("Ġa".to_owned(), 1), ("<x>".to_owned(), 4)]);
        let added = HashMap::from([(4, ("Ġ\n".to_owned(), true))]);
        let table = TokenBytes::new(
            &json!({ "decoder": { "type": "ByteLevel" } }),
            &vocabulary,
            &added,
        )
        .unwrap();
        assert_eq!(table.len(), 5);
        let tokens: Vec<&[u8]> = (0..6).map(|id| table.get(id)).collect();
        assert_eq!(tokens, [&b""[..], b" a", b"", b"", "Ġ\n".as_bytes(), b""]);
    }

    #[test]
    fn an_added_piece_of_spaces_is_spaces() {
        let added = HashMap::from([(0, ("▁▁".to_owned(), false)), (1, ("<▁>".to_owned(), true))]);
        let metaspace = json!({ "decoder": { "type": "Metaspace" } });
        let table = TokenBytes::new(&metaspace, &HashMap::new(), &added).unwrap();
        assert_eq!([table.get(0), table.get(1)], [&b"  "[..], "<▁>".as_bytes()]);
    }

    #[test]
    fn another_decoder_is_an_error() {
        let json = json!({ "decoder": { "type": "WordPiece" } });
        let reason = TokenBytes::new(&json, &HashMap::new(), &HashMap::new()).unwrap_err();
        assert!(reason.contains("`WordPiece` is not supported"), "{reason}");
    }
}
