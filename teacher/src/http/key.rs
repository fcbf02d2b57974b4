//! A secret, and how it is kept out of everything that is written.

use std::fmt;

use potstill_datasets::Completion;

use super::Response;

/// Keys shorter than this are placeholders, such as `EMPTY` for a server of one's own. They are sent, and
/// not looked for in what comes back, since they may be words.
const SHORTEST_SECRET_BYTES: usize = 8;

/// The end of a text is dropped where it is so much of the beginning of a key: a message cut in the middle.
const SHORTEST_PIECE_BYTES: usize = 6;

/// A key for an endpoint. It is only ever sent; `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A key as the server wants it, without `Bearer`; white space around it is dropped.
    #[must_use]
    pub fn new(key: String) -> ApiKey {
        ApiKey(key.trim().to_owned())
    }

    /// The value of the header `Authorization`.
    pub(super) fn authorization(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Replaces the key in bytes by as many `*`, so that JSON stays JSON.
    pub(super) fn scrub_bytes(&self, bytes: &mut [u8]) -> bool {
        let key = self.0.as_bytes();
        if key.len() < SHORTEST_SECRET_BYTES {
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

    /// Replaces the key in a text, and drops a beginning of it from the text's end.
    pub(super) fn scrub(&self, text: &mut String) -> bool {
        if self.0.len() < SHORTEST_SECRET_BYTES {
            return false;
        }
        let mut found = false;
        if text.contains(&self.0) {
            *text = text.replace(&self.0, &"*".repeat(self.0.len()));
            found = true;
        }
        let piece = (SHORTEST_PIECE_BYTES..self.0.len())
            .rev()
            .find(|&n| self.0.is_char_boundary(n) && text.ends_with(&self.0[..n]));
        if let Some(n) = piece {
            text.truncate(text.len() - n);
            text.push('*');
            found = true;
        }
        found
    }

    /// Takes the key out of an answer. Tokens that spell it are dropped with all others, since their ids spell
    /// it too.
    pub(super) fn scrub_response(&self, response: &mut Response) {
        if self.0.len() < SHORTEST_SECRET_BYTES {
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

/// Where `what` begins in `bytes`, megabytes of which are looked through.
fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_taken_out_whole_and_where_a_message_was_cut() {
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
