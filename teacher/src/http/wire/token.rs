//! Parses tokens with their log-probabilities from JSON directly into records.
//!
//! Responses with log-probabilities are megabytes, nearly all of them tokens. Strings without escapes are borrowed, and
//! only what the records keep is copied.

use std::borrow::Cow;
use std::fmt;

use potstill_datasets::{SampledToken, Spelling, TopToken};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Beginning of each error message that is about log-probabilities and not about JSON.
pub(super) const ABOUT_LOGPROBS: &str = "log-probabilities: ";

/// Upper bound of the size of a vocabulary.
const MAX_VOCABULARY: i64 = 1 << 24;

/// Largest log-probability above 0 that is accepted as a rounding error of 0, nats.
const ROUNDING_TOLERANCE: f32 = 1e-4;

/// A JSON string, borrowed if it has no escapes.
#[derive(Debug, Default)]
pub(super) struct JsonStr<'a>(pub(super) Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for JsonStr<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct JsonStrVisitor;
        impl<'de> Visitor<'de> for JsonStrVisitor {
            type Value = JsonStr<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<JsonStr<'de>, E> {
                Ok(JsonStr(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<JsonStr<'de>, E> {
                Ok(JsonStr(Cow::Owned(text.to_owned())))
            }
            fn visit_string<E>(self, text: String) -> Result<JsonStr<'de>, E> {
                Ok(JsonStr(Cow::Owned(text)))
            }
        }
        deserializer.deserialize_str(JsonStrVisitor)
    }
}

/// A log-probability; NaN if the field is null, a string or missing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Logprob(pub(super) f32);

impl Default for Logprob {
    fn default() -> Logprob {
        Logprob(f32::NAN)
    }
}

impl Logprob {
    /// The log-probability if it is finite and at most 0.
    fn checked(self) -> Option<f32> {
        (self.0.is_finite() && self.0 <= ROUNDING_TOLERANCE).then_some(self.0.min(0.0))
    }
}

impl<'de> Deserialize<'de> for Logprob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LogprobVisitor;
        impl Visitor<'_> for LogprobVisitor {
            type Value = Logprob;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a log-probability")
            }
            fn visit_f64<E>(self, value: f64) -> Result<Logprob, E> {
                #[expect(clippy::cast_possible_truncation, reason = "stored as f32")]
                Ok(Logprob(value as f32))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Logprob, E> {
                #[expect(clippy::cast_precision_loss, reason = "stored as f32")]
                Ok(Logprob(value as f32))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Logprob, E> {
                #[expect(clippy::cast_precision_loss, reason = "stored as f32")]
                Ok(Logprob(value as f32))
            }
            fn visit_str<E>(self, _: &str) -> Result<Logprob, E> {
                Ok(Logprob::default())
            }
            fn visit_unit<E>(self) -> Result<Logprob, E> {
                Ok(Logprob::default())
            }
        }
        deserializer.deserialize_any(LogprobVisitor)
    }
}

/// A token id.
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenId(pub(super) u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let id = i64::deserialize(deserializer)?;
        checked_id(id).map(TokenId).ok_or_else(|| no_such_id(id))
    }
}

fn checked_id(id: i64) -> Option<u32> {
    u32::try_from(id).ok().filter(|_| id < MAX_VOCABULARY)
}

fn no_such_id<E: serde::de::Error>(id: impl fmt::Display) -> E {
    E::custom(format!("{ABOUT_LOGPROBS}token id {id} does not exist"))
}

/// An entry of `top_logprobs`.
#[derive(Debug)]
pub(super) struct TopEntry(pub(super) TopToken);

/// An entry of `logprobs.content`.
#[derive(Debug)]
pub(super) struct SampledEntry(pub(super) SampledToken);

#[derive(Deserialize)]
struct RawTop<'a> {
    #[serde(borrow)]
    token: JsonStr<'a>,
    #[serde(default)]
    logprob: Logprob,
    bytes: Option<Spelling>,
    id: Option<TokenId>,
}

#[derive(Deserialize)]
struct RawSampled<'a> {
    #[serde(borrow)]
    token: JsonStr<'a>,
    #[serde(default)]
    logprob: Logprob,
    bytes: Option<Spelling>,
    id: Option<TokenId>,
    top_logprobs: Option<Vec<TopEntry>>,
}

impl<'de> Deserialize<'de> for TopEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawTop::deserialize(deserializer)?;
        token(&raw.token.0, raw.logprob, raw.bytes, raw.id)
            .map(TopEntry)
            .map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for SampledEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawSampled::deserialize(deserializer)?;
        let TopToken { id, bytes, logprob } =
            token(&raw.token.0, raw.logprob, raw.bytes, raw.id).map_err(D::Error::custom)?;
        let top = raw.top_logprobs.unwrap_or_default();
        Ok(SampledEntry(SampledToken {
            bytes,
            id,
            logprob,
            top: top.into_iter().map(|top| top.0).collect(),
        }))
    }
}

/// Makes a token from the fields that servers give. The text may be `token_id:123`, as vLLM writes on request; its bytes
/// are then those of the real text for a sampled token, and those of `token_id:123` for an alternative.
pub(super) fn token(
    text: &str,
    logprob: Logprob,
    bytes: Option<Spelling>,
    id: Option<TokenId>,
) -> Result<TopToken, String> {
    let Some(logprob) = logprob.checked() else {
        return Err(format!(
            "{ABOUT_LOGPROBS}token {text:?} has the value {}, which is no log-probability",
            logprob.0
        ));
    };
    let id = id.map(|id| id.0);
    if let Some(number) = text.strip_prefix("token_id:") {
        let named = number.parse().ok().and_then(checked_id);
        let named = named.ok_or_else(|| format!("{ABOUT_LOGPROBS}{text} does not exist"))?;
        // The bytes are not the real ones either if they contain a replacement character.
        let is_real = |bytes: &Spelling| {
            **bytes != *text.as_bytes() && !String::from_utf8_lossy(bytes).contains('\u{fffd}')
        };
        let bytes = bytes.filter(is_real);
        return Ok(TopToken {
            id: Some(named),
            bytes: bytes.unwrap_or_default(),
            logprob,
        });
    }
    let bytes = match bytes {
        None => unescaped(text).unwrap_or_else(|| text.into()),
        // Fast path for nearly all tokens: the checks below look at every character.
        Some(bytes) if *bytes == *text.as_bytes() => bytes,
        Some(bytes) => {
            // A token that ends within a character has no text of its own: servers omit the part or write a
            // replacement.
            let is_part = text.is_empty()
                || text.contains('\u{fffd}')
                || text.starts_with("bytes:")
                || std::str::from_utf8(&bytes).is_err();
            if !is_part {
                return Err(format!(
                    "{ABOUT_LOGPROBS}the bytes of token {text:?} spell another text"
                ));
            }
            bytes
        }
    };
    Ok(TopToken { id, bytes, logprob })
}

/// Parses `bytes:\xe2\x80`, which OpenAI writes for a part of a character.
fn unescaped(text: &str) -> Option<Spelling> {
    let hex = text.strip_prefix("bytes:\\x")?;
    hex.split("\\x")
        .map(|pair| u8::from_str_radix(pair, 16).ok())
        .collect::<Option<Vec<u8>>>()
        .map(Spelling::from)
}

/// The most likely tokens as an object from text to log-probability, as in the completions API.
#[derive(Debug, Default)]
pub(super) struct TopByText(pub(super) Vec<TopToken>);

impl<'de> Deserialize<'de> for TopByText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TopByTextVisitor;
        impl<'de> Visitor<'de> for TopByTextVisitor {
            type Value = TopByText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tokens to log-probabilities")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TopByText, A::Error> {
                let mut top = Vec::with_capacity(8);
                while let Some((text, logprob)) = map.next_entry::<JsonStr<'_>, Logprob>()? {
                    top.push(token(&text.0, logprob, None, None).map_err(A::Error::custom)?);
                }
                Ok(TopByText(top))
            }
        }
        deserializer.deserialize_map(TopByTextVisitor)
    }
}

/// vLLM's distribution of a position of the prompt: an object from id to log-probability, rank and text.
#[derive(Debug)]
pub(super) struct TopById(pub(super) Vec<(u32, f32)>);

impl<'de> Deserialize<'de> for TopById {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            logprob: Logprob,
        }
        struct TopByIdVisitor;
        impl<'de> Visitor<'de> for TopByIdVisitor {
            type Value = TopById;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from token ids to log-probabilities")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TopById, A::Error> {
                let mut top = Vec::with_capacity(32);
                while let Some((text, entry)) = map.next_entry::<JsonStr<'_>, Entry>()? {
                    let id = text.0.parse().ok().and_then(checked_id);
                    let id = id.ok_or_else(|| no_such_id(&text.0))?;
                    top.push((id, pair_logprob(entry.logprob)?));
                }
                Ok(TopById(top))
            }
        }
        deserializer.deserialize_map(TopByIdVisitor)
    }
}

fn pair_logprob<E: serde::de::Error>(logprob: Logprob) -> Result<f32, E> {
    logprob.checked().ok_or_else(|| {
        E::custom(format!(
            "{ABOUT_LOGPROBS}the prompt has the value {}, which is no log-probability",
            logprob.0
        ))
    })
}

/// A token of SGLang's `/generate`: `[log-probability, id, text]`. The log-probability is NaN if the server gives none,
/// as for the first token of a text.
#[derive(Debug)]
pub(super) struct GenerateToken<'a> {
    pub(super) logprob: Logprob,
    pub(super) id: u32,
    pub(super) text: Option<JsonStr<'a>>,
}

impl<'de: 'a, 'a> Deserialize<'de> for GenerateToken<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct GenerateTokenVisitor;
        impl<'de> Visitor<'de> for GenerateTokenVisitor {
            type Value = GenerateToken<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("[log-probability, token id, string or null]")
            }
            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> Result<GenerateToken<'de>, A::Error> {
                let logprob = seq.next_element()?.unwrap_or_default();
                let Some(TokenId(id)) = seq.next_element()? else {
                    return Err(A::Error::invalid_length(1, &self));
                };
                let text = seq.next_element::<Option<JsonStr<'de>>>()?.flatten();
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(GenerateToken { logprob, id, text })
            }
        }
        deserializer.deserialize_seq(GenerateTokenVisitor)
    }
}

impl GenerateToken<'_> {
    /// Token id and log-probability, for a signal.
    pub(super) fn pair(&self) -> Result<(u32, f32), String> {
        pair_logprob::<serde::de::value::Error>(self.logprob)
            .map(|logprob| (self.id, logprob))
            .map_err(|error| error.to_string())
    }

    /// The token, for an answer.
    pub(super) fn token(self) -> Result<TopToken, String> {
        // A text with a replacement character does not tell the bytes; the id does.
        let text = self.text.filter(|text| !text.0.contains('\u{fffd}'));
        let text = text.unwrap_or_default();
        token(
            &text.0,
            self.logprob,
            Some((*text.0).into()),
            Some(TokenId(self.id)),
        )
    }
}
