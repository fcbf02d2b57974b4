//! Keys of endpoints, and their removal from everything that is written.

use std::fmt;
use std::sync::Arc;

use potstill_datasets::Completion;

use super::redaction::{KeyForms, TextKind};
use super::{Failure, Response};

/// Keys shorter than this are placeholders, such as `EMPTY` for the user's own server. They are sent, but not removed
/// from responses, since they may be ordinary words.
const MIN_SECRET_BYTES: usize = 8;

/// The key of an endpoint. It is only ever sent; `Debug` does not show it.
#[derive(Clone)]
pub struct ApiKey {
    key: String,
    /// The ways to write the key; `None` for a placeholder.
    forms: Option<Arc<KeyForms>>,
}

impl ApiKey {
    /// Takes a key without `Bearer`; white space around the key is dropped.
    #[must_use]
    pub fn new(key: String) -> ApiKey {
        let key = key.trim().to_owned();
        let is_secret = key.len() >= MIN_SECRET_BYTES;
        ApiKey {
            forms: is_secret.then(|| Arc::new(KeyForms::new(&key))),
            key,
        }
    }

    /// Value of the header `Authorization`.
    pub(crate) fn authorization(&self) -> String {
        format!("Bearer {}", self.key)
    }

    /// Replaces the key in a text of a server, and pieces and encodings of the key. Returns whether there were any.
    pub(crate) fn scrub(&self, text: &mut String, kind: TextKind) -> bool {
        let forms = self.forms.as_ref();
        let redacted = forms.and_then(|forms| forms.redacted(text, kind));
        let found = redacted.is_some();
        if let Some(redacted) = redacted {
            *text = redacted;
        }
        found
    }

    /// Removes the key from the message of a failure.
    pub(super) fn scrub_failure(&self, failure: &mut Failure) {
        self.scrub(&mut failure.message, TextKind::Message);
    }

    /// Removes the key from a response. If the key is in the text or its tokens, all tokens are dropped, since their
    /// ids spell the key too.
    pub(super) fn scrub_response(&self, response: &mut Response) {
        let Some(forms) = &self.forms else {
            return;
        };
        let Completion {
            reasoning,
            answer,
            tool_calls,
            tokens,
            ..
        } = &mut response.completion;
        let mut found = self.scrub(answer, TextKind::Answer);
        if let Some(reasoning) = reasoning {
            found |= self.scrub(reasoning, TextKind::Answer);
        }
        for call in tool_calls {
            let texts = [
                Some(&mut call.name),
                Some(&mut call.arguments),
                call.id.as_mut(),
            ];
            for text in texts.into_iter().flatten() {
                found |= self.scrub(text, TextKind::Answer);
            }
        }
        if let Some(name) = &mut response.served_by {
            self.scrub(name, TextKind::Message);
        }
        let has_key = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            forms.redacted(&text, TextKind::Answer).is_some()
        };
        if !found && !tokens.is_empty() {
            let spelled = tokens.iter().flat_map(|t| t.bytes.iter().copied());
            found = has_key(&spelled.collect::<Vec<u8>>());
        }
        let mut others = tokens
            .iter()
            .flat_map(|t| &t.top)
            .map(|other| &*other.bytes);
        if found || others.any(|bytes| bytes.len() >= MIN_SECRET_BYTES && has_key(bytes)) {
            tokens.clear();
        }
    }
}

impl PartialEq for ApiKey {
    fn eq(&self, other: &ApiKey) -> bool {
        self.key == other.key
    }
}

impl Eq for ApiKey {}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey")
    }
}

#[cfg(test)]
mod tests {
    use rand::seq::{IndexedRandom, SliceRandom};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn scrubbed(key: &str, text: &str, kind: TextKind) -> String {
        let mut text = text.to_owned();
        ApiKey::new(key.into()).scrub(&mut text, kind);
        text
    }

    #[test]
    fn a_key_is_removed_whole_and_in_part() {
        const KEY: &str = " sk-0123456789abcdwxyz\n";
        assert_eq!(format!("{:?}", ApiKey::new(KEY.into())), "ApiKey");
        for (text, shown) in [
            ("Bearer sk-0123456789abcdwxyz, wrong", "Bearer ***, wrong"),
            ("wrong key sk-0123", "wrong key ***"),
            ("wrong key sk-0...wxyz!", "wrong key ***...***!"),
            ("the key ****wxyz", "the key *******"),
            (
                "the key that ends with wxyz is wrong",
                "the key that ends with *** is wrong",
            ),
            ("..bcdwxyz", "..***"),
            ("a risk-", "a risk-"),
            ("S K - 0 1 2 3 4 5 6 7", "***"),
            ("(zyxwdcba9876)", "(***)"),
            // base64 -w0 <<< of `user:KEY`
            (
                "Basic dXNlcjpzay0wMTIzNDU2Nzg5YWJjZHd4eXo=",
                "Basic dXNlcjp***o=",
            ),
        ] {
            assert_eq!(scrubbed(KEY, text, TextKind::Message), shown, "{text}");
        }
        // Short pieces stay in an answer, since they may be words.
        let answer = "sk-0123456 and wxyz, but no sk-0123456789abcdwxy";
        let shown = "sk-0123456 and wxyz, but no ***";
        assert_eq!(scrubbed(KEY, answer, TextKind::Answer), shown);
    }

    #[test]
    fn a_placeholder_is_no_secret() {
        assert_eq!(scrubbed("EMPTY", "EMPTY", TextKind::Message), "EMPTY");
    }

    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

    /// Base64 by another way than the code's: value by value in a number of 24 bits.
    fn base64(bytes: &[u8], is_url: bool, is_padded: bool) -> String {
        let mut text = String::new();
        for three in bytes.chunks(3) {
            let value = (0..3).fold(0_u32, |value, i| {
                value << 8 | u32::from(three.get(i).copied().unwrap_or(0))
            });
            for i in 0..4 {
                let digit = DIGITS[(value >> (18 - 6 * i) & 63) as usize] as char;
                match (i <= three.len(), digit) {
                    (false, _) if is_padded => text.push('='),
                    (false, _) => {}
                    (true, '-') if !is_url => text.push('+'),
                    (true, '_') if !is_url => text.push('/'),
                    (true, digit) => text.push(digit),
                }
            }
        }
        text
    }

    /// A way in which a server may write the key.
    fn written(rng: &mut ChaCha8Rng, key: &str) -> String {
        let each = |form: &dyn Fn(char) -> String| key.chars().map(form).collect::<String>();
        let (is_url, is_padded) = (rng.random(), rng.random());
        let salt: u64 = rng.random();
        let mixed = |c: char| match salt >> (u32::from(c) % 64) & 1 {
            0 => c.to_string(),
            _ => format!("%{:02X}", u32::from(c)),
        };
        match rng.random_range(0..16) {
            0 => key.to_owned(),
            1 => key.to_uppercase(),
            2 => key.to_lowercase(),
            3 => key.chars().rev().collect(),
            4 => base64(key.as_bytes(), is_url, is_padded),
            5 => base64(format!("user:{key}").as_bytes(), is_url, is_padded),
            6 => base64(format!("Bearer {key}, etc.").as_bytes(), is_url, is_padded),
            7 => each(&|c| format!("{:02x}", u32::from(c))),
            8 => each(&|c| format!("{:02X}:", u32::from(c))),
            9 => each(&|c| format!("%{:02x}", u32::from(c))),
            10 => each(&mixed),
            11 => each(&|c| format!("\\u{:04x}", u32::from(c))),
            12 => each(&|c| format!("\\x{:02x}", u32::from(c))),
            13 => each(&|c| format!("&#{};", u32::from(c))),
            14 => each(&|c| format!("{c} ")),
            _ => each(&|c| format!("{c}\u{200b}")),
        }
    }

    fn random_key(rng: &mut ChaCha8Rng) -> String {
        let length = rng.random_range(8..80);
        let digits = (0..length).map(|_| *DIGITS.choose(rng).unwrap() as char);
        let key: String = digits.collect();
        let letters = key.bytes().filter(u8::is_ascii_alphanumeric).count();
        if letters < 6 { random_key(rng) } else { key }
    }

    #[test]
    fn no_writing_of_a_key_is_left_in_a_text() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..4_000 {
            let key = random_key(&mut rng);
            let written = written(&mut rng, &key);
            for kind in [TextKind::Message, TextKind::Answer] {
                let text = format!("(the key is: {written}) – no");
                let left = scrubbed(&key, &text, kind);
                assert!(left.starts_with("(the key is: "), "{key}: {text} {left}");
                assert!(left.ends_with(") – no"), "{key}: {text} {left}");
                // Base64 of the text beside the key stays, which is up to 13 characters here.
                let characters: Vec<char> = written.chars().collect();
                let is_left = |piece: &[char]| left.contains(&piece.iter().collect::<String>());
                let size = characters.len().min(14);
                assert!(
                    !characters.windows(size).any(is_left),
                    "{key}: {text} {left}"
                );
            }
        }
    }

    #[test]
    fn pieces_of_a_key_are_removed_from_messages() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for _ in 0..4_000 {
            let key = random_key(&mut rng);
            let any = rng.random_range(8..=key.len());
            let end = rng.random_range(6..=key.len());
            let from = rng.random_range(0..=key.len() - any);
            let is_long = key[from..from + any]
                .bytes()
                .filter(u8::is_ascii_alphanumeric)
                .count()
                >= 8;
            let mut pieces = vec![&key[..end], &key[key.len() - end..]];
            if is_long {
                pieces.push(&key[from..from + any]);
            }
            pieces.shuffle(&mut rng);
            let text = format!("said: {}, {}", pieces[0], pieces[1]);
            let left = scrubbed(&key, &text, TextKind::Message);
            assert!(
                !left.contains(pieces[0]) && !left.contains(pieces[1]),
                "{key}: {text}: {left}"
            );
        }
    }

    #[test]
    fn texts_without_the_key_stay_as_they_are() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let text = "Die Würde des Menschen ist unantastbar. 100 % \\u00e4 &amp; %zz \\ & %";
        for _ in 0..2_000 {
            let key = random_key(&mut rng) + "09";
            assert_eq!(scrubbed(&key, text, TextKind::Answer), text);
            assert_eq!(scrubbed(&key, text, TextKind::Message), text);
        }
    }
}
