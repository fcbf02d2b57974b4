//! Tokens with their log-probabilities, from JSON straight into the records.
//!
//! Responses with log-probabilities are megabytes, nearly all of it this. Texts are borrowed where they have no
//! escapes, and only what the records keep is copied.

use std::borrow::Cow;
use std::fmt;

use potstill_datasets::{SampledToken, Spelling, TopToken};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Begins the message of each error that is about log-probabilities and not about JSON.
pub(super) const ABOUT_LOGPROBS: &str = "log-probabilities: ";

/// No vocabulary is larger.
const MOST_IDS: i64 = 1 << 24;

/// Rounding may lift the logarithm of a probability of 1 so far over 0, nats.
const OVER_ZERO: f32 = 1e-4;

/// Text that is borrowed where it can be.
#[derive(Debug, Default)]
pub(super) struct Text<'a>(pub(super) Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reads;
        impl<'de> Visitor<'de> for Reads {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
            fn visit_string<E>(self, text: String) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text)))
            }
        }
        deserializer.deserialize_str(Reads)
    }
}

/// A log-probability: NaN where it is null, text or nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nats(pub(super) f32);

impl Default for Nats {
    fn default() -> Nats {
        Nats(f32::NAN)
    }
}

impl Nats {
    /// At most 0, and finite.
    fn checked(self) -> Option<f32> {
        (self.0.is_finite() && self.0 <= OVER_ZERO).then_some(self.0.min(0.0))
    }
}

impl<'de> Deserialize<'de> for Nats {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reads;
        impl Visitor<'_> for Reads {
            type Value = Nats;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a log-probability")
            }
            fn visit_f64<E>(self, value: f64) -> Result<Nats, E> {
                #[expect(clippy::cast_possible_truncation, reason = "stored as f32")]
                Ok(Nats(value as f32))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Nats, E> {
                #[expect(clippy::cast_precision_loss, reason = "stored as f32")]
                Ok(Nats(value as f32))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Nats, E> {
                #[expect(clippy::cast_precision_loss, reason = "stored as f32")]
                Ok(Nats(value as f32))
            }
            fn visit_str<E>(self, _: &str) -> Result<Nats, E> {
                Ok(Nats::default())
            }
            fn visit_unit<E>(self) -> Result<Nats, E> {
                Ok(Nats::default())
            }
        }
        deserializer.deserialize_any(Reads)
    }
}

/// A token's id.
#[derive(Debug, Clone, Copy)]
pub(super) struct Id(pub(super) u32);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let id = i64::deserialize(deserializer)?;
        checked_id(id).map(Id).ok_or_else(|| no_such_id(id))
    }
}

fn checked_id(id: i64) -> Option<u32> {
    u32::try_from(id).ok().filter(|_| id < MOST_IDS)
}

fn no_such_id<E: serde::de::Error>(id: impl fmt::Display) -> E {
    E::custom(format!("{ABOUT_LOGPROBS}there is no token {id}"))
}

/// An entry of `top_logprobs`.
#[derive(Debug)]
pub(super) struct Top(pub(super) TopToken);

/// An entry of `logprobs.content`.
#[derive(Debug)]
pub(super) struct Sampled(pub(super) SampledToken);

#[derive(Deserialize)]
struct RawTop<'a> {
    #[serde(borrow)]
    token: Text<'a>,
    #[serde(default)]
    logprob: Nats,
    bytes: Option<Spelling>,
    id: Option<Id>,
}

#[derive(Deserialize)]
struct RawSampled<'a> {
    #[serde(borrow)]
    token: Text<'a>,
    #[serde(default)]
    logprob: Nats,
    bytes: Option<Spelling>,
    id: Option<Id>,
    top_logprobs: Option<Vec<Top>>,
}

impl<'de> Deserialize<'de> for Top {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawTop::deserialize(deserializer)?;
        token(&raw.token.0, raw.logprob, raw.bytes, raw.id)
            .map(Top)
            .map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Sampled {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawSampled::deserialize(deserializer)?;
        let TopToken { id, bytes, logprob } =
            token(&raw.token.0, raw.logprob, raw.bytes, raw.id).map_err(D::Error::custom)?;
        let top = raw.top_logprobs.unwrap_or_default();
        Ok(Sampled(SampledToken {
            bytes,
            id,
            logprob,
            top: top.into_iter().map(|top| top.0).collect(),
        }))
    }
}

/// A token from what servers say of it. Its text may be `token_id:123`, as vLLM writes it on request; the bytes beside
/// it are then those of its real text for a sampled token, and of `token_id:123` for another.
pub(super) fn token(
    text: &str,
    logprob: Nats,
    bytes: Option<Spelling>,
    id: Option<Id>,
) -> Result<TopToken, String> {
    let Some(logprob) = logprob.checked() else {
        return Err(format!(
            "{ABOUT_LOGPROBS}token {text:?} has {}, which is none",
            logprob.0
        ));
    };
    let id = id.map(|id| id.0);
    if let Some(number) = text.strip_prefix("token_id:") {
        let named = number.parse().ok().and_then(checked_id);
        let named = named.ok_or_else(|| format!("{ABOUT_LOGPROBS}there is no {text}"))?;
        // Nor are they real where the text has a stand-in for a part of a character.
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
        // Nearly all are, and what is below looks at every character.
        Some(bytes) if *bytes == *text.as_bytes() => bytes,
        Some(bytes) => {
            // A token that ends within a character has no text of its own: servers leave the part out, or write
            // something that stands for it.
            let is_part = text.is_empty()
                || text.contains('\u{fffd}')
                || text.starts_with("bytes:")
                || std::str::from_utf8(&bytes).is_err();
            if !is_part {
                return Err(format!(
                    "{ABOUT_LOGPROBS}token {text:?} has the bytes of another text"
                ));
            }
            bytes
        }
    };
    Ok(TopToken { id, bytes, logprob })
}

/// OpenAI's `bytes:\xe2\x80` for a part of a character.
fn unescaped(text: &str) -> Option<Spelling> {
    let hex = text.strip_prefix("bytes:\\x")?;
    hex.split("\\x")
        .map(|pair| u8::from_str_radix(pair, 16).ok())
        .collect::<Option<Vec<u8>>>()
        .map(Spelling::from)
}

/// The likeliest tokens as an object from text to log-probability, of the completions protocol.
#[derive(Debug, Default)]
pub(super) struct TopByText(pub(super) Vec<TopToken>);

impl<'de> Deserialize<'de> for TopByText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reads;
        impl<'de> Visitor<'de> for Reads {
            type Value = TopByText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tokens to log-probabilities")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TopByText, A::Error> {
                let mut top = Vec::with_capacity(8);
                while let Some((text, logprob)) = map.next_entry::<Text<'_>, Nats>()? {
                    top.push(token(&text.0, logprob, None, None).map_err(A::Error::custom)?);
                }
                Ok(TopByText(top))
            }
        }
        deserializer.deserialize_map(Reads)
    }
}

/// vLLM's distribution over a position of the prompt: an object from id to log-probability, rank and text.
#[derive(Debug)]
pub(super) struct ById(pub(super) Vec<(u32, f32)>);

impl<'de> Deserialize<'de> for ById {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            logprob: Nats,
        }
        struct Reads;
        impl<'de> Visitor<'de> for Reads {
            type Value = ById;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from token ids to log-probabilities")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ById, A::Error> {
                let mut top = Vec::with_capacity(32);
                while let Some((text, entry)) = map.next_entry::<Text<'_>, Entry>()? {
                    let id = text.0.parse().ok().and_then(checked_id);
                    let id = id.ok_or_else(|| no_such_id(&text.0))?;
                    top.push((id, pair_logprob(entry.logprob)?));
                }
                Ok(ById(top))
            }
        }
        deserializer.deserialize_map(Reads)
    }
}

fn pair_logprob<E: serde::de::Error>(logprob: Nats) -> Result<f32, E> {
    logprob.checked().ok_or_else(|| {
        E::custom(format!(
            "{ABOUT_LOGPROBS}{} in the prompt's is none",
            logprob.0
        ))
    })
}

/// SGLang's `[log-probability, id, text]`. The log-probability is NaN where the server has none, as for the first
/// token of a text.
#[derive(Debug)]
pub(super) struct Triple<'a> {
    pub(super) logprob: Nats,
    pub(super) id: u32,
    pub(super) text: Option<Text<'a>>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Triple<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reads;
        impl<'de> Visitor<'de> for Reads {
            type Value = Triple<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("[log-probability, token id, text or null]")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Triple<'de>, A::Error> {
                let logprob = seq.next_element()?.unwrap_or_default();
                let Some(Id(id)) = seq.next_element()? else {
                    return Err(A::Error::invalid_length(1, &self));
                };
                let text = seq.next_element::<Option<Text<'de>>>()?.flatten();
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Triple { logprob, id, text })
            }
        }
        deserializer.deserialize_seq(Reads)
    }
}

impl Triple<'_> {
    /// For a signal.
    pub(super) fn pair(&self) -> Result<(u32, f32), String> {
        pair_logprob::<serde::de::value::Error>(self.logprob)
            .map(|logprob| (self.id, logprob))
            .map_err(|error| error.to_string())
    }

    /// For an answer.
    pub(super) fn token(self) -> Result<TopToken, String> {
        // A text that is no whole character says nothing of the bytes; the id does.
        let text = self.text.filter(|text| !text.0.contains('\u{fffd}'));
        let text = text.unwrap_or_default();
        token(
            &text.0,
            self.logprob,
            Some((*text.0).into()),
            Some(Id(self.id)),
        )
    }
}
