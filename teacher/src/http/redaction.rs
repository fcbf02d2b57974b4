//! Finds a key in a text of a server, however the server writes it: as it is, in part, reversed, in other case, with
//! other characters in between, escaped, percent-encoded, in hexadecimal, or in Base64 of any text around it.
//!
//! Texts and keys are compared by their letters and digits alone, in lower case, and in pieces of eight.

use std::collections::HashMap;
use std::ops::Range;

/// The text that replaces a key.
const REPLACEMENT: &str = "***";

/// Length of the pieces by which a key is found.
const GRAM: usize = 8;

/// Shortest beginning or end of a key that is removed from a message wherever it stands.
const MIN_END: usize = 6;

/// Shortest end of a key that is removed from a message where it stands alone, as in `…wxyz`.
const MIN_MASKED: usize = 4;

/// Characters that stand for the hidden part of a key.
const MASKS: [char; 6] = ['*', '.', '…', '•', '#', '_'];

/// The kind of a text, which decides how small a piece of a key is removed from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TextKind {
    /// A message of a server. Any piece of a key is removed, and it is no harm if an ordinary word goes with it.
    Message,
    /// An answer, which is data that a student is trained on. Whole keys and long pieces are removed, since no answer
    /// should teach them; a short piece may be an ordinary word.
    Answer,
}

/// One way to write a key: letters and digits in lower case.
struct KeyForm {
    letters: Vec<u8>,
    /// Shortest piece that is removed from a message.
    piece: usize,
}

impl KeyForm {
    fn shortest(&self, kind: TextKind) -> usize {
        match kind {
            TextKind::Message => self.piece.min(self.letters.len()),
            TextKind::Answer => (2 * self.piece).min(self.letters.len()),
        }
    }
}

/// The ways to write one key.
pub(super) struct KeyForms {
    key: Vec<char>,
    forms: Vec<KeyForm>,
    /// Places of each piece of eight: form and offset.
    grams: HashMap<[u8; GRAM], Vec<(usize, usize)>>,
}

impl KeyForms {
    pub(super) fn new(key: &str) -> KeyForms {
        let bytes = key.as_bytes();
        let reversed: Vec<u8> = bytes.iter().rev().copied().collect();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut texts = vec![
            (bytes.to_vec(), GRAM),
            (reversed, GRAM),
            (hex.into_bytes(), 2 * GRAM),
        ];
        // Eight bytes are eleven characters of Base64.
        texts.extend((0..3).map(|before| (inner_base64(bytes, before), GRAM + 3)));
        let forms: Vec<KeyForm> = texts
            .into_iter()
            .map(|(text, piece)| KeyForm {
                letters: (text.iter().filter(|byte| byte.is_ascii_alphanumeric()))
                    .map(u8::to_ascii_lowercase)
                    .collect(),
                piece,
            })
            .collect();
        let mut grams: HashMap<[u8; GRAM], Vec<(usize, usize)>> = HashMap::new();
        for (number, form) in forms.iter().enumerate() {
            for (offset, gram) in form.letters.windows(GRAM).enumerate() {
                let gram = gram.try_into().unwrap_or_default();
                grams.entry(gram).or_default().push((number, offset));
            }
        }
        KeyForms {
            key: key.chars().map(|c| c.to_ascii_lowercase()).collect(),
            forms,
            grams,
        }
    }

    /// The text without the key; `None` if the key is not in it.
    pub(super) fn redacted(&self, text: &str, kind: TextKind) -> Option<String> {
        let mut found = self.pieces(&letters(text, false), kind);
        if text.contains(['%', '\\', '&']) {
            found.extend(self.pieces(&letters(text, true), kind));
        }
        found.extend(self.whole(text));
        if kind == TextKind::Message {
            found.extend(self.ends(text));
        }
        if found.is_empty() {
            return None;
        }
        found.sort_by_key(|range| range.start);
        let mut shown = String::with_capacity(text.len());
        let mut from = 0;
        for range in found {
            if range.start >= from {
                shown.push_str(&text[from..range.start]);
                shown.push_str(REPLACEMENT);
            }
            from = from.max(range.end);
        }
        shown.push_str(&text[from..]);
        Some(shown)
    }

    /// Ranges of the text in which pieces of the key's forms stand.
    fn pieces(&self, letters: &[Letter], kind: TextKind) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        // Forms that are too short for a piece of eight are found as a whole.
        let is_short = |form: &&KeyForm| (MIN_END..GRAM).contains(&form.letters.len());
        for form in self.forms.iter().filter(is_short) {
            for place in letters.windows(form.letters.len()) {
                if place.iter().map(|letter| &letter.byte).eq(&form.letters) {
                    found.push(place[0].start..place[place.len() - 1].end);
                }
            }
        }
        let mut at = 0;
        while let Some(gram) = letters.get(at..at + GRAM) {
            let gram: [u8; GRAM] = std::array::from_fn(|i| gram[i].byte);
            let places = self.grams.get(&gram).into_iter().flatten();
            let longest = places.filter_map(|&(form, offset)| {
                let form = &self.forms[form];
                let (text, key) = (&letters[at..], &form.letters[offset..]);
                let equal = text.iter().zip(key).take_while(|(a, b)| a.byte == **b);
                let length = equal.count();
                (length >= form.shortest(kind)).then_some(length)
            });
            match longest.max() {
                Some(length) => {
                    found.push(letters[at].start..letters[at + length - 1].end);
                    at += length;
                }
                None => at += 1,
            }
        }
        found
    }

    /// Ranges in which the key stands as it is, which counts for keys of few letters and digits.
    fn whole(&self, text: &str) -> Vec<Range<usize>> {
        let text: Vec<(usize, char)> = lower(text);
        let is_at = |window: &[(usize, char)]| window.iter().map(|(_, c)| c).eq(&self.key);
        let windows = text.windows(self.key.len().max(1));
        windows.filter(|w| is_at(w)).filter_map(range_of).collect()
    }

    /// Ranges in which the beginning or the end of the key stands.
    fn ends(&self, text: &str) -> Vec<Range<usize>> {
        let text = lower(text);
        let mut found = Vec::new();
        let is_word = |at: usize| text.get(at).is_some_and(|(_, c)| c.is_alphanumeric());
        let is_mask = |at: usize| text.get(at).is_some_and(|(_, c)| MASKS.contains(c));
        for at in 0..text.len() {
            let rest = text[at..].iter().map(|(_, c)| c);
            let length = rest.zip(&self.key).take_while(|(a, b)| a == b).count();
            if length >= MIN_END || (length >= MIN_MASKED && is_mask(at + length)) {
                found.extend(range_of(&text[at..at + length]));
            }
            let before = text[..=at].iter().rev().map(|(_, c)| c);
            let key = self.key.iter().rev();
            let length = before.zip(key).take_while(|(a, b)| a == b).count();
            let from = at + 1 - length;
            let is_alone = !is_word(at + 1) && (from == 0 || !is_word(from - 1));
            if length >= MIN_END || (length >= MIN_MASKED && is_alone) {
                found.extend(range_of(&text[from..=at]));
            }
        }
        found
    }
}

fn lower(text: &str) -> Vec<(usize, char)> {
    let characters = text.char_indices();
    characters
        .map(|(at, c)| (at, c.to_ascii_lowercase()))
        .collect()
}

fn range_of(characters: &[(usize, char)]) -> Option<Range<usize>> {
    let (start, _) = characters.first()?;
    let (last, character) = characters.last()?;
    Some(*start..last + character.len_utf8())
}

/// A letter or digit of a text, in lower case, with the range that stands for it.
struct Letter {
    byte: u8,
    start: usize,
    end: usize,
}

/// The ASCII letters and digits of a text; with `unescape` those that escapes stand for, too.
fn letters(text: &str, unescape: bool) -> Vec<Letter> {
    let bytes = text.as_bytes();
    let mut letters = Vec::with_capacity(bytes.len());
    let mut start = 0;
    while let Some(&byte) = bytes.get(start) {
        let escaped = if unescape {
            unescaped(&bytes[start..])
        } else {
            None
        };
        let (byte, length) = escaped.unwrap_or((byte, 1));
        if byte.is_ascii_alphanumeric() {
            letters.push(Letter {
                byte: byte.to_ascii_lowercase(),
                start,
                end: start + length,
            });
        }
        start += length;
    }
    letters
}

/// The character that an escape at the beginning of a text stands for, and the length of the escape: `%73`, `\x73`,
/// `\u0073`, `\u{73}`, `&#115;` or `&#x73;`.
fn unescaped(text: &[u8]) -> Option<(u8, usize)> {
    let number = |prefix: &str, digits: usize, radix: u32| {
        let digits = text
            .strip_prefix(prefix.as_bytes())?
            .get(..digits)
            .and_then(|digits| std::str::from_utf8(digits).ok())?;
        let value = u8::from_str_radix(digits, radix).ok()?;
        Some((value, prefix.len() + digits.len()))
    };
    let closed = |prefix: &str, close: u8, radix: u32| {
        let rest = text.strip_prefix(prefix.as_bytes())?;
        let digits = rest.iter().take(8).position(|&byte| byte == close)?;
        let (value, length) = number(prefix, digits, radix)?;
        Some((value, length + 1))
    };
    match text.first()? {
        b'%' => number("%", 2, 16),
        b'\\' => number("\\x", 2, 16)
            .or_else(|| number("\\u00", 2, 16))
            .or_else(|| closed("\\u{", b'}', 16)),
        b'&' => closed("&#x", b';', 16).or_else(|| closed("&#", b';', 10)),
        _ => None,
    }
}

/// The characters that Base64 of any text has for `bytes`, if the number of bytes before them is `before` modulo 3. Those
/// that depend on the bytes around are left out.
fn inner_base64(bytes: &[u8], before: usize) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = std::iter::repeat_n(&0, before)
        .chain(bytes)
        .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1))
        .collect();
    let digits = bits.chunks_exact(6);
    let digits = digits.map(|six| six.iter().fold(0, |value, bit| value << 1 | bit));
    let digits = digits.map(|value: u8| DIGITS[usize::from(value)]);
    digits.skip((before * 8).div_ceil(6)).collect()
}
