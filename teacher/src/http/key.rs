//! Keys of endpoints, and their removal from everything that is written.

use std::fmt;

use potstill_datasets::Completion;

use super::Response;

/// Keys shorter than this are placeholders, such as `EMPTY` for the user's own server. They are sent, but not removed
/// from responses, since they may be ordinary words.
const MIN_SECRET_BYTES: usize = 8;

/// Shortest beginning of a key that is removed from the end of a text, as of a message that was cut inside the key.
const MIN_CUT_KEY_BYTES: usize = 6;

/// The key of an endpoint. It is only ever sent; `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// Takes a key without `Bearer`; white space around the key is dropped.
    #[must_use]
    pub fn new(key: String) -> ApiKey {
        ApiKey(key.trim().to_owned())
    }

    /// Value of the header `Authorization`.
    pub(crate) fn authorization(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Replaces the key in `bytes` by as many `*`, so that JSON stays JSON. Returns whether the key was there.
    pub(super) fn scrub_bytes(&self, bytes: &mut [u8]) -> bool {
        let key = self.0.as_bytes();
        if key.len() < MIN_SECRET_BYTES {
            return false;
        }
        let mut from = 0;
        let mut found = false;
        while let Some(at) = find(&bytes[from..], key) {
            bytes[from + at..from + at + key.len()].fill(b'*');
            from += at + key.len();
            found = true;
        }
        found
    }

    /// Replaces the key in a text, and a beginning of the key at the text's end. Returns whether there was one.
    pub(crate) fn scrub(&self, text: &mut String) -> bool {
        if self.0.len() < MIN_SECRET_BYTES {
            return false;
        }
        let mut found = false;
        if text.contains(&self.0) {
            *text = text.replace(&self.0, &"*".repeat(self.0.len()));
            found = true;
        }
        let piece = (MIN_CUT_KEY_BYTES..self.0.len())
            .rev()
            .find(|&n| self.0.is_char_boundary(n) && text.ends_with(&self.0[..n]));
        if let Some(n) = piece {
            text.truncate(text.len() - n);
            text.push('*');
            found = true;
        }
        found
    }

    /// Removes the key from a response. If the key is in the text or its tokens, all tokens are dropped, since their
    /// ids spell the key too.
    pub(super) fn scrub_response(&self, response: &mut Response) {
        if self.0.len() < MIN_SECRET_BYTES {
            return;
        }
        let Completion {
            reasoning,
            answer,
            tool_calls,
            tokens,
            ..
        } = &mut response.completion;
        let mut found = self.scrub(answer);
        if let Some(reasoning) = reasoning {
            found |= self.scrub(reasoning);
        }
        for call in tool_calls {
            found |= self.scrub(&mut call.name);
            found |= self.scrub(&mut call.arguments);
        }
        if let Some(name) = &mut response.served_by {
            self.scrub(name);
        }
        if !found && !tokens.is_empty() {
            let spelled: Vec<u8> = tokens
                .iter()
                .flat_map(|t| t.bytes.iter().copied())
                .collect();
            found = find(&spelled, self.0.as_bytes()).is_some();
        }
        let in_a_token = |bytes: &[u8]| find(bytes, self.0.as_bytes()).is_some();
        if found
            || tokens
                .iter()
                .any(|t| t.top.iter().any(|o| in_a_token(&o.bytes)))
        {
            tokens.clear();
        }
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey")
    }
}

/// Finds the first occurrence of `what` in `bytes`, which may be megabytes.
fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_removed_whole_and_where_a_message_was_cut() {
        let key = ApiKey::new(" sk-0123456789\n".into());
        assert_eq!(format!("{key:?}"), "ApiKey");
        let scrubbed = |text: &str| {
            let mut text = text.to_owned();
            key.scrub(&mut text);
            text
        };
        assert_eq!(
            scrubbed("Bearer sk-0123456789, wrong"),
            "Bearer *************, wrong"
        );
        assert_eq!(scrubbed("wrong key sk-01234567"), "wrong key *");
        assert_eq!(scrubbed("a risk-"), "a risk-");
        let mut body = b"sk-0123456789 sk-0123456789 sk-0".to_vec();
        assert!(key.scrub_bytes(&mut body));
        assert_eq!(body, b"************* ************* sk-0");
    }

    #[test]
    fn a_placeholder_is_no_secret() {
        let mut text = "EMPTY".to_owned();
        assert!(!ApiKey::new("EMPTY".into()).scrub(&mut text));
        assert_eq!(text, "EMPTY");
    }
}
