//! Two tokenisations of one text: where both cut it, and which of their tokens spell the same bytes.
//!
//! A teacher with another tokenizer predicts other tokens at other places. What the two have in common
//! are the bytes: the places where both cut the text, and the tokens that spell the same.

use std::cmp::Ordering;
use std::collections::{HashMap, hash_map::Entry};
use std::ops::Range;

use crate::Tokenizer;

/// The shortest stretch of a text that both tokenisations cut at both ends: token indices of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The teacher's tokens.
    pub teacher: Range<usize>,
    /// The student's tokens.
    pub student: Range<usize>,
}

impl Span {
    /// Whether it is one token on each side; the two then spell the same bytes.
    #[must_use]
    pub fn is_one_token(&self) -> bool {
        self.teacher.len() == 1 && self.student.len() == 1
    }
}

/// Two tokenisations that should spell the same text and do not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the teacher's and the student's tokens spell different texts from byte {byte} on: {teacher:?} \
     (token {teacher_token}) and {student:?} (token {student_token}); encode the same text with both, \
     without special tokens"
)]
pub struct TextsDiffer {
    /// The first byte that differs, or the length of the shorter text.
    pub byte: usize,
    /// The teacher's token that holds it, from 0; their number if its text ends there.
    pub teacher_token: usize,
    /// The student's token that holds it.
    pub student_token: usize,
    /// How the teacher's text goes on.
    pub teacher: String,
    /// How the student's text goes on.
    pub student: String,
}

/// The minimal spans of a text that both tokenisations cut at both ends, in order; end to end they are
/// all tokens of both. `teacher` and `student` are the bytes of their tokens
/// ([`Tokenizer::token_bytes`]).
///
/// A span has at least one byte, so at least one token on each side. Tokens without bytes belong to the
/// span that follows, at the end of the text to the last; an empty text has no span.
///
/// # Errors
/// [`TextsDiffer`] where the bytes end to end are not the same: the tokenizers normalise differently,
/// one puts a space in front, or special tokens are among them.
pub fn align<T: AsRef<[u8]>, S: AsRef<[u8]>>(
    teacher: &[T],
    student: &[S],
) -> Result<Vec<Span>, TextsDiffer> {
    let (teacher_ends, student_ends) = (ends(teacher), ends(student));
    same_text(teacher, &teacher_ends, student, &student_ends)?;
    let mut spans: Vec<Span> = Vec::new();
    let (mut t, mut s) = (0, 0);
    let (mut first, mut start) = ((0, 0), 0);
    while let (Some(&teacher_end), Some(&student_end)) = (teacher_ends.get(t), student_ends.get(s))
    {
        match teacher_end.cmp(&student_end) {
            Ordering::Less => t += 1,
            Ordering::Greater => s += 1,
            // Neither side has bytes yet.
            Ordering::Equal if teacher_end == start => t += 1,
            Ordering::Equal => {
                (t, s) = (t + 1, s + 1);
                spans.push(Span {
                    teacher: first.0..t,
                    student: first.1..s,
                });
                (first, start) = ((t, s), teacher_end);
            }
        }
    }
    if let Some(last) = spans.last_mut() {
        last.teacher.end = teacher.len();
        last.student.end = student.len();
    }
    Ok(spans)
}

/// Where each token ends, in bytes from the start of the text.
fn ends<B: AsRef<[u8]>>(tokens: &[B]) -> Vec<usize> {
    let end = |end: &mut usize, token: &B| {
        *end += token.as_ref().len();
        Some(*end)
    };
    tokens.iter().scan(0, end).collect()
}

fn same_text<T: AsRef<[u8]>, S: AsRef<[u8]>>(
    teacher: &[T],
    teacher_ends: &[usize],
    student: &[S],
    student_ends: &[usize],
) -> Result<(), TextsDiffer> {
    let length = |ends: &[usize]| ends.last().copied().unwrap_or(0);
    let (teacher_len, student_len) = (length(teacher_ends), length(student_ends));
    let byte = bytes(teacher)
        .zip(bytes(student))
        .position(|(a, b)| a != b)
        .unwrap_or(teacher_len.min(student_len));
    if byte == teacher_len && byte == student_len {
        return Ok(());
    }
    let token = |ends: &[usize]| ends.partition_point(|&end| end <= byte);
    Err(TextsDiffer {
        byte,
        teacher_token: token(teacher_ends),
        student_token: token(student_ends),
        teacher: excerpt(bytes(teacher).skip(byte)),
        student: excerpt(bytes(student).skip(byte)),
    })
}

fn bytes<B: AsRef<[u8]>>(tokens: &[B]) -> impl Iterator<Item = u8> {
    tokens.iter().flat_map(|token| token.as_ref()).copied()
}

/// The first bytes of a text, for a message.
fn excerpt(bytes: impl Iterator<Item = u8>) -> String {
    String::from_utf8_lossy(&bytes.take(24).collect::<Vec<u8>>()).into_owned()
}

/// For each id of the teacher, the student's id that spells the same bytes; `None` where there is none.
///
/// Special tokens go with special tokens alone, since a text that spells `</s>` does not end. Ends of
/// sequence that are spelled differently are not matched: put them in by their roles. Where several ids
/// of the student spell the same (SentencePiece has `A` and `<0x41>`), it is the one that its tokenizer
/// writes. Several ids of the teacher can have the same id of the student.
#[must_use]
pub fn ids_by_bytes(teacher: &Tokenizer, student: &Tokenizer) -> Vec<Option<u32>> {
    let mut by_spelling: HashMap<(Vec<u8>, bool), u32> = HashMap::new();
    for id in 0..student.vocab_size() as u32 {
        let Some(spelling) = spelling(student, id) else {
            continue;
        };
        match by_spelling.entry(spelling) {
            Entry::Vacant(entry) => {
                entry.insert(id);
            }
            Entry::Occupied(mut entry) => {
                if writes(student, &entry.key().0, id) {
                    entry.insert(id);
                }
            }
        }
    }
    (0..teacher.vocab_size() as u32)
        .map(|id| by_spelling.get(&spelling(teacher, id)?).copied())
        .collect()
}

/// A token's bytes and whether it is special; `None` for an id that the vocabulary leaves out.
fn spelling(tokenizer: &Tokenizer, id: u32) -> Option<(Vec<u8>, bool)> {
    let bytes = tokenizer.token_bytes(id);
    let special = tokenizer.added_token(id).is_some()
        && tokenizer
            .decode(&[id], true)
            .is_ok_and(|text| text.is_empty());
    (!bytes.is_empty()).then_some((bytes, special))
}

/// Whether the tokenizer writes these bytes, inside a text, as this one id.
fn writes(tokenizer: &Tokenizer, bytes: &[u8], id: u32) -> bool {
    std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| tokenizer.encode_continuation(text).ok())
        .is_some_and(|ids| ids == [id])
}
