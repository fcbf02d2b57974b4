//! Byte-aligned spans of two tokenisations, and tokens that spell the same.

use std::collections::BTreeSet;
use std::fs;

use potstill_datasets::{Span, Tokenizer, align, ids_by_bytes};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use serde_json::json;

use crate::text::reference::real;
use crate::text::small::{byte_level, byte_level_json, folder, sentence_piece};
use crate::text::tokenizer::TEXTS;

fn spans(teacher: &[&str], student: &[&str]) -> Vec<[usize; 4]> {
    let numbers = |span: Span| {
        [
            span.teacher.start,
            span.teacher.end,
            span.student.start,
            span.student.end,
        ]
    };
    let spans = align(teacher, student).unwrap();
    spans.into_iter().map(numbers).collect()
}

#[test]
fn spans_end_where_both_texts_are_cut() {
    assert_eq!(
        spans(&["the", " c", "at", " sat"], &["th", "e", " cat", " sat"]),
        [[0, 1, 0, 2], [1, 3, 2, 3], [3, 4, 3, 4]]
    );
    assert_eq!(spans(&["abc"], &["a", "b", "c"]), [[0, 1, 0, 3]]);
    assert_eq!(spans(&["ab", "c"], &["a", "bc"]), [[0, 2, 0, 2]]);
    assert_eq!(spans(&["a"], &["a"]), [[0, 1, 0, 1]]);
    assert_eq!(spans(&[], &[]), [[0; 4]; 0]);
}

#[test]
fn tokens_without_bytes_belong_to_the_next_span() {
    assert_eq!(
        spans(&["", "a", "", "b", ""], &["", "", "a", "b"]),
        [[0, 2, 0, 3], [2, 5, 3, 4]]
    );
    assert_eq!(spans(&["", ""], &[""]), [[0; 4]; 0]);
}

#[test]
fn texts_that_differ_are_shown() {
    let message =
        |teacher: &[&str], student: &[&str]| align(teacher, student).unwrap_err().to_string();
    insta::assert_snapshot!(message(&["a", "bcd"], &["ab", "xd"]), @r#"
the teacher's and the student's tokens spell different texts from byte 2 on: "cd" (token 1) and "xd" (token 1)
hint: encode the same text with both tokenizers, without special tokens
"#);
    insta::assert_snapshot!(message(&["a", "b", "</s>"], &["ab"]), @r#"
the teacher's and the student's tokens spell different texts from byte 2 on: "</s>" (token 2) and "" (token 1)
hint: encode the same text with both tokenizers, without special tokens
"#);
    let error = align(&["é"], &[b"\xc3".as_slice(), b"\xaa"]).unwrap_err();
    assert_eq!(
        (error.byte, error.teacher_token, error.student_token),
        (1, 0, 1)
    );
}

fn cut<'a>(text: &'a [u8], cuts: &BTreeSet<usize>) -> Vec<&'a [u8]> {
    let inside = cuts
        .iter()
        .copied()
        .filter(|&cut| cut > 0 && cut < text.len());
    let edges: Vec<usize> = std::iter::once(0)
        .chain(inside)
        .chain(std::iter::once(text.len()))
        .collect();
    edges
        .windows(2)
        .map(|edge| &text[edge[0]..edge[1]])
        .collect()
}

proptest! {
    /// The spans' ends are the cuts that the two have in common, and nothing is left out.
    #[test]
    fn spans_are_minimal_and_whole(
        text in vec(any::<u8>(), 1..40),
        teacher_cuts in btree_set(1usize..40, 0..20),
        student_cuts in btree_set(1usize..40, 0..20),
    ) {
        let (teacher, student) = (cut(&text, &teacher_cuts), cut(&text, &student_cuts));
        let spans = align(&teacher, &student).unwrap();
        let mut end = 0;
        let mut ends = Vec::new();
        let (mut t, mut s) = (0, 0);
        for span in &spans {
            prop_assert_eq!((span.teacher.start, span.student.start), (t, s));
            (t, s) = (span.teacher.end, span.student.end);
            let bytes = teacher[span.teacher.clone()].concat();
            prop_assert_eq!(&bytes, &student[span.student.clone()].concat());
            end += bytes.len();
            ends.push(end);
        }
        prop_assert_eq!((t, s), (teacher.len(), student.len()));
        let common: Vec<usize> = teacher_cuts
            .intersection(&student_cuts)
            .copied()
            .filter(|&cut| cut < text.len())
            .chain(std::iter::once(text.len()))
            .collect();
        prop_assert_eq!(ends, common);
    }

    #[test]
    fn a_changed_byte_is_found(
        text in vec(any::<u8>(), 1..40),
        cuts in btree_set(1usize..40, 0..20),
        other_cuts in btree_set(1usize..40, 0..20),
        at in any::<prop::sample::Index>(),
    ) {
        let at = at.index(text.len());
        let mut changed = text.clone();
        changed[at] ^= 1;
        let (teacher, student) = (cut(&text, &cuts), cut(&changed, &other_cuts));
        let error = align(&teacher, &student).unwrap_err();
        prop_assert_eq!(error.byte, at);
        let holds = |tokens: &[&[u8]], token: usize| {
            let before: usize = tokens[..token].iter().map(|token| token.len()).sum();
            (before..before + tokens[token].len()).contains(&at)
        };
        prop_assert!(holds(&teacher, error.teacher_token) && holds(&student, error.student_token));
    }
}

/// Byte-level BPE has letters by their place in GPT-2's alphabet: `a` is 64. SentencePiece has `a` at
/// 260 and as the byte 0x61 at 3 + 0x61.
#[test]
fn ids_of_the_same_bytes() {
    let (bpe, pieces) = (byte_level(), sentence_piece());
    let to_pieces = ids_by_bytes(&bpe, &pieces);
    assert_eq!(to_pieces.len(), bpe.vocab_size());
    let piece = |text: &str| pieces.encode(text, false).unwrap();
    // The letter, not the byte that spells it too.
    assert_eq!(to_pieces[64], Some(260));
    assert_eq!(piece("ca").last(), Some(&260));
    assert_eq!(to_pieces[67], Some(3 + u32::from(b'd')));
    // "\n\n" has no piece; <s> and </s> have one, <|im_end|> has none.
    assert_eq!(to_pieces[256], None);
    assert_eq!(to_pieces[259..263], [Some(1), Some(2), None, None]);

    let to_bpe = ids_by_bytes(&pieces, &bpe);
    assert_eq!((to_bpe[260], to_bpe[3 + 0x61]), (Some(64), Some(64)));
    // `<unk>` is special there; "ab" and " a" are in one vocabulary alone.
    assert_eq!((to_bpe[0], to_bpe[263], to_bpe[264]), (None, None, None));

    // A vocabulary in which `<s>` is a text like others.
    let mut json = byte_level_json();
    json["added_tokens"][0]["special"] = json!(false);
    let plain = Tokenizer::from_dir(folder(&json, "</s>").path()).unwrap();
    assert_eq!(ids_by_bytes(&bpe, &plain)[259..261], [None, Some(260)]);

    let same = ids_by_bytes(&bpe, &bpe);
    assert!(
        same.iter()
            .enumerate()
            .all(|(id, &other)| other == Some(id as u32))
    );
}

#[test]
fn real_tokenizers_meet_in_the_same_bytes() {
    let (Some(teacher), Some(student), Some(questions)) = (
        real("models/Qwen2.5-Coder-0.5B-Instruct"),
        real("models/SmolLM2-135M-Instruct"),
        real("data/gsm8k/train.jsonl"),
    ) else {
        return;
    };
    let teacher = Tokenizer::from_dir(&teacher).unwrap();
    let student = Tokenizer::from_dir(&student).unwrap();
    let student_id = ids_by_bytes(&teacher, &student);
    let questions = fs::read_to_string(questions).unwrap();
    let (mut one, mut all) = (0, 0);
    for text in TEXTS.into_iter().chain(questions.lines().take(200)) {
        let [teacher_ids, student_ids] =
            [&teacher, &student].map(|t| t.encode(text, false).unwrap());
        let spelled = |tokenizer: &Tokenizer, ids: &[u32]| -> Vec<Vec<u8>> {
            ids.iter().map(|&id| tokenizer.token_bytes(id)).collect()
        };
        let teacher_bytes = spelled(&teacher, &teacher_ids);
        let student_bytes = spelled(&student, &student_ids);
        for span in align(&teacher_bytes, &student_bytes).unwrap() {
            assert_eq!(
                teacher_bytes[span.teacher.clone()].concat(),
                student_bytes[span.student.clone()].concat()
            );
            all += 1;
            if span.is_one_token() {
                one += 1;
                let id = teacher_ids[span.teacher.start] as usize;
                assert_eq!(student_id[id], Some(student_ids[span.student.start]));
            }
        }
    }
    let shared = student_id.iter().flatten().collect::<BTreeSet<_>>().len();
    eprintln!("{one} of {all} spans are one token; {shared} tokens are shared");
    assert!(one > all / 2 && one < all && shared > 10_000);
}
