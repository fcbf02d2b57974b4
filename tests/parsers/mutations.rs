//! Changes to inputs: each is a function of a random generator, so a run can be repeated.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// Numbers that replace a number in a text.
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "1e999",
    "-0.0",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e-400",
    "999999999",
    "NaN",
];

/// Texts that mean something in one of the formats.
const WORDS: [&str; 40] = [
    "null",
    "true",
    "[]",
    "{}",
    "[[[[[[[[",
    "{\"a\":",
    "\"\"",
    "\"",
    ",",
    ":",
    "]",
    "}",
    "\n",
    "\r\n",
    "\0",
    "\u{feff}",
    "\u{202e}",
    "\\u0000",
    "\\ud800",
    "\u{1b}[31m",
    ";",
    "\t",
    "data: ",
    "data: [DONE]\n\n",
    "event: error\n",
    "{{ x }}",
    "{% for i in range(99999999) %}x{% endfor %}",
    "{% if %}",
    "{% endfor %}",
    "{{ messages }}",
    "{% generation %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "| length",
    "[a]\n",
    "a = 1\n",
    "\"usage\":",
    "\"choices\":[]",
    "\"logprobs\":null",
    "\"finish_reason\":\"stop\"",
    "../../",
];

/// Returns the input with one to four changes. `others` are seeds of the same target, which parts may come from.
pub(crate) fn mutated(rng: &mut ChaCha8Rng, input: &[u8], others: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        change(rng, &mut bytes, others);
    }
    bytes.truncate(1 << 20);
    bytes
}

fn change(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
    let at = rng.random_range(0..=bytes.len());
    let part = |rng: &mut ChaCha8Rng, length: usize| {
        let from = rng.random_range(0..=length);
        let most = (length - from).min(64);
        from..from + rng.random_range(0..=most)
    };
    match rng.random_range(0..10) {
        0 | 1 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
        2 if at < bytes.len() => bytes[at] = rng.random(),
        3 => bytes.truncate(at),
        4 => {
            let removed = part(rng, bytes.len());
            bytes.drain(removed);
        }
        5 => {
            let range = part(rng, bytes.len());
            let copy = bytes[range].repeat(rng.random_range(1..=8));
            insert(bytes, at, &copy);
        }
        6 => {
            let words: &[&str] = if rng.random() { &WORDS } else { &NUMBERS };
            let word = words.choose(rng).copied().unwrap_or_default();
            insert(bytes, at, word.as_bytes());
        }
        7 => replace_number(rng, bytes),
        8 if bytes.len() >= 8 => {
            let at = rng.random_range(0..=bytes.len() - 8);
            let width = [1, 2, 4, 8][rng.random_range(0..4)];
            let number = [0, 1, u64::MAX, 1 << 31, u64::MAX >> 1, 1 << 40][rng.random_range(0..6)];
            bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        _ => {
            if let Some(other) = others.choose(rng) {
                let range = part(rng, other.len());
                insert(bytes, at, &other[range]);
            }
        }
    }
}

fn insert(bytes: &mut Vec<u8>, at: usize, new: &[u8]) {
    bytes.splice(at..at, new.iter().copied());
}

/// Replaces a run of digits by an extreme number.
fn replace_number(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>) {
    let starts: Vec<usize> = (0..bytes.len())
        .filter(|&at| bytes[at].is_ascii_digit() && (at == 0 || !bytes[at - 1].is_ascii_digit()))
        .collect();
    let (Some(&start), Some(number)) = (starts.choose(rng), NUMBERS.choose(rng)) else {
        return;
    };
    let digits = bytes[start..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit());
    let end = start + digits.count();
    bytes.splice(start..end, number.bytes());
}
