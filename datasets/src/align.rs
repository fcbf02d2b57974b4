//! Comparison of two tokenizers by bytes.
//!
//! A teacher with another tokenizer predicts other tokens at other positions. The two tokenisations of a text share
//! the bytes at which both cut it, and the tokens that spell the same bytes.

use std::cmp::Ordering;
use std::collections::{HashMap, hash_map::Entry};
use std::ops::Range;

use crate::tokenizer::Tokenizer;

/// A shortest part of a text that both tokenisations cut at both ends, as token indices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The teacher's tokens.
    pub teacher: Range<usize>,
    /// The student's tokens.
    pub student: Range<usize>,
}

impl Span {
    /// Returns whether the span is one token on each side. The two tokens then spell the same bytes.
    #[must_use]
    pub fn is_one_token(&self) -> bool {
        self.teacher.len() == 1 && self.student.len() == 1
    }
}

/// The error for two tokenisations that do not spell the same text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the teacher's and the student's tokens spell different texts from byte {byte} on: {teacher:?} \
     (token {teacher_token}) and {student:?} (token {student_token})\n\
     hint: encode the same text with both tokenizers, without special tokens"
)]
pub struct TextsDiffer {
    /// The first byte that differs, or the length of the shorter text.
    pub byte: usize,
    /// The teacher's token that contains the byte, from 0; the number of tokens if the teacher's text ends there.
    pub teacher_token: usize,
    /// The student's token that contains the byte, from 0.
    pub student_token: usize,
    /// Teacher's text from this byte on.
    pub teacher: String,
    /// Student's text from this byte on.
    pub student: String,
}

/// Splits a text into the shortest spans that both tokenisations cut at both ends. `teacher` and `student` are the
/// bytes of their tokens ([`Tokenizer::token_bytes`]). The spans are in order and cover all tokens of both.
///
/// A span has at least one byte, so it has at least one token on each side. A token without bytes belongs to the
/// following span, or to the last span at the end of the text. An empty text has no spans.
///
/// # Errors
/// [`TextsDiffer`] if the tokens do not spell the same bytes, because the tokenizers normalise differently, because one
/// of them puts a space in front, or because of special tokens.
pub fn align<T: AsRef<[u8]>, S: AsRef<[u8]>>(
    teacher: &[T],
    student: &[S],
) -> Result<Vec<Span>, TextsDiffer> {
    let (teacher_ends, student_ends) = (token_ends(teacher), token_ends(student));
    check_same_text(teacher, &teacher_ends, student, &student_ends)?;
    let mut spans: Vec<Span> = Vec::new();
    let (mut t, mut s) = (0, 0);
    let (mut first, mut start) = ((0, 0), 0);
    while let (Some(&teacher_end), Some(&student_end)) = (teacher_ends.get(t), student_ends.get(s))
    {
        match teacher_end.cmp(&student_end) {
            Ordering::Less => t += 1,
            Ordering::Greater => s += 1,
            // The span has no bytes on either side so far.
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

/// Computes the end of each token, in bytes from the start of the text.
fn token_ends<B: AsRef<[u8]>>(tokens: &[B]) -> Vec<usize> {
    let end = |end: &mut usize, token: &B| {
        *end += token.as_ref().len();
        Some(*end)
    };
    tokens.iter().scan(0, end).collect()
}

fn check_same_text<T: AsRef<[u8]>, S: AsRef<[u8]>>(
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

/// Returns the first bytes of a text for a message.
fn excerpt(bytes: impl Iterator<Item = u8>) -> String {
    String::from_utf8_lossy(&bytes.take(24).collect::<Vec<u8>>()).into_owned()
}

/// Maps each id of the teacher to the student's id that spells the same bytes, or to `None`.
///
/// A special token matches special tokens only, because a text that spells `</s>` does not end. EOS tokens with
/// different spellings are not matched; the caller has to add them by their role. If several ids of the student have
/// the same spelling (SentencePiece has `A` and `<0x41>`), the one that the student's tokenizer produces is chosen.
/// Several ids of the teacher may map to one id of the student.
#[must_use]
pub fn ids_by_bytes(teacher: &Tokenizer, student: &Tokenizer) -> Vec<Option<u32>> {
    let mut by_spelling: HashMap<(Vec<u8>, bool), u32> = HashMap::new();
    for id in 0..student.vocab_size() as u32 {
        let Some(spelling) = spelling_of(student, id) else {
            continue;
        };
        match by_spelling.entry(spelling) {
            Entry::Vacant(entry) => {
                entry.insert(id);
            }
            Entry::Occupied(mut entry) => {
                if encodes_as(student, &entry.key().0, id) {
                    entry.insert(id);
                }
            }
        }
    }
    (0..teacher.vocab_size() as u32)
        .map(|id| by_spelling.get(&spelling_of(teacher, id)?).copied())
        .collect()
}

/// Returns a token's bytes and whether it is special; `None` for an id that is not in the vocabulary.
fn spelling_of(tokenizer: &Tokenizer, id: u32) -> Option<(Vec<u8>, bool)> {
    let bytes = tokenizer.token_bytes(id);
    let special = tokenizer.added_token(id).is_some()
        && tokenizer
            .decode(&[id], true)
            .is_ok_and(|text| text.is_empty());
    (!bytes.is_empty()).then_some((bytes, special))
}

/// Returns whether the tokenizer encodes these bytes inside a text as this id alone.
fn encodes_as(tokenizer: &Tokenizer, bytes: &[u8], id: u32) -> bool {
    std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| tokenizer.encode_continuation(text).ok())
        .is_some_and(|ids| ids == [id])
}
