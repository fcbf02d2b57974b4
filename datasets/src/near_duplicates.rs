//! Near-duplicates: prompts of dev and test that are nearly in training, which makes a model look better than it is.
//!
//! The similarity of two prompts is the smaller of two Jaccard similarities: that of their sets of word pairs, and that
//! of their numbers. Case, whitespace and punctuation do not count; numbers and the operators of arithmetic do.
//!
//! - Pairs of neighbouring words find a question of at least 17 words in which one word was replaced. In a shorter
//!   question, another word usually makes another question ("What is the capital of France?").
//! - Numbers are compared by themselves, because problems from one template differ in nothing else: with up to eight
//!   numbers, another number makes another question, however long the text around it is.
//!
//! The search is exact. It reads only candidates that share a rare pair (or a rare number), by the prefix filter of
//! Bayardo, Ma and Srikant, "Scaling up all pairs similarity search" (2007), section 3, in its form for Jaccard
//! similarity of Xiao et al., "Efficient similarity joins for near duplicate detection" (2008), section 3.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::curate::Split;
use crate::records::{NearDuplicate, Prompt, Role};

/// Smallest similarity of near-duplicates. A replaced word in a text of n different words gives (n − 1) / (n + 3).
pub const NEAR_DUPLICATE_SIMILARITY: f64 = 0.8;

/// Smallest number of prompts of which the words that all begin with, and all end with, are left out. These are
/// instructions and examples of a template, and say nothing about two prompts.
const MIN_PROMPTS_OF_TEMPLATE: usize = 10;

/// Finds the prompts of dev and test that are near-duplicates of prompts to train on, each with the most similar one.
/// System messages are not compared.
#[must_use]
pub fn near_duplicates(train: &[&Prompt], others: &[(Split, &Prompt)]) -> Vec<NearDuplicate> {
    let train_texts: Vec<String> = train.iter().map(|prompt| text(prompt)).collect();
    let texts: Vec<String> = others.iter().map(|(_, prompt)| text(prompt)).collect();
    let nearest = nearest_texts(&train_texts, &texts);
    let found = others.iter().zip(nearest);
    found
        .filter_map(|((split, prompt), nearest)| {
            let (index, similarity) = nearest?;
            Some(NearDuplicate {
                split: *split,
                prompt_id: prompt.id.clone(),
                train_prompt_id: train[index].id.clone(),
                similarity,
            })
        })
        .collect()
}

/// Joins the messages of a prompt, except for system messages.
fn text(prompt: &Prompt) -> String {
    let messages = prompt.messages.iter();
    let contents = messages
        .filter(|message| message.role != Role::System)
        .map(|message| message.content.as_str());
    contents.collect::<Vec<_>>().join("\n")
}

/// Finds for each text the most similar text of `train` and their similarity, if that is at least
/// [`NEAR_DUPLICATE_SIMILARITY`].
fn nearest_texts(train: &[String], texts: &[String]) -> Vec<Option<(usize, f64)>> {
    let texts_and_train = train.iter().chain(texts);
    let all_words: Vec<_> = texts_and_train.map(|text| normalized_words(text)).collect();
    let (start, end) = template_words(&all_words);
    let own_words = || (all_words.iter()).map(|words| &words[start..words.len() - end]);
    let pairs = rarest_first(own_words().map(word_pairs).collect());
    let numbers = rarest_first(own_words().map(numbers).collect());
    let (train_pairs, pairs) = pairs.split_at(train.len());
    let (train_numbers, numbers) = numbers.split_at(train.len());
    let (pair_index, number_index) = (
        PrefixIndex::new(train_pairs),
        PrefixIndex::new(train_numbers),
    );
    // The number of the last text that a training text was compared with.
    let mut compared = vec![usize::MAX; train.len()];
    let mut nearest = Vec::with_capacity(texts.len());
    for (text, (pairs, numbers)) in pairs.iter().zip(numbers).enumerate() {
        // Either list has every near-duplicate; the shorter one is read.
        let by_pairs = pair_index.candidates(pairs);
        let by_numbers = number_index.candidates(numbers);
        let length = |lists: &[&[u32]]| lists.iter().map(|list| list.len()).sum::<usize>();
        let lists = match !numbers.is_empty() && length(&by_numbers) < length(&by_pairs) {
            true => by_numbers,
            false => by_pairs,
        };
        let mut best: Option<(usize, f64)> = None;
        for candidate in lists.concat() {
            let candidate = candidate as usize;
            if compared[candidate] == text {
                continue;
            }
            compared[candidate] = text;
            let least = best.map_or(NEAR_DUPLICATE_SIMILARITY, |(_, similarity)| similarity);
            let similarity = jaccard(numbers, &train_numbers[candidate], least)
                .and_then(|s| Some(s.min(jaccard(pairs, &train_pairs[candidate], least)?)));
            let is_better = |s: &f64| best.is_none_or(|(_, similarity)| *s > similarity);
            if let Some(similarity) = similarity.filter(is_better) {
                best = Some((candidate, similarity));
            }
        }
        nearest.push(best);
    }
    nearest
}

/// A normalised word, number or operator, as a hash of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct NormalizedWord {
    hash: u64,
    is_number: bool,
}

/// Splits a text into lower-case words, numbers and arithmetic operators. Other punctuation is left out. Each character
/// of a script that is written without spaces is a word.
fn normalized_words(text: &str) -> Vec<NormalizedWord> {
    let characters: Vec<char> = text.chars().flat_map(char::to_lowercase).collect();
    let at = |i: usize| characters.get(i).copied().unwrap_or(' ');
    let mut words = Vec::new();
    let mut i = 0;
    while i < characters.len() {
        let (start, first) = (i, at(i));
        i += 1;
        let is_number = first.is_numeric();
        let mut word = String::from(first);
        if is_number {
            loop {
                let is_separator = matches!(at(i), '.' | ',') && at(i + 1).is_numeric();
                let is_thousands =
                    (1..=3).all(|k| at(i + k).is_numeric()) && !at(i + 4).is_numeric();
                match at(i) {
                    digit if digit.is_numeric() => word.push(digit),
                    '.' if is_separator => word.push('.'),
                    ',' if is_separator && is_thousands => {}
                    _ => break,
                }
                i += 1;
            }
        } else if first.is_alphabetic() {
            while at(i).is_alphabetic() && !is_unspaced(first) && !is_unspaced(at(i)) {
                word.push(at(i));
                i += 1;
            }
        } else if !is_operator(first, start.checked_sub(1).map_or(' ', at), at(i)) {
            continue;
        }
        let hash = hash(&word);
        words.push(NormalizedWord { hash, is_number });
    }
    words
}

/// Returns whether a character belongs to a script that is written without spaces, or whose characters are syllables.
fn is_unspaced(c: char) -> bool {
    matches!(c, '\u{e00}'..='\u{eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}' | '\u{2e80}'..)
}

/// Returns whether a character is an operator of arithmetic. A hyphen, an asterisk or a slash beside a letter or beside
/// another one is punctuation or layout, as in "twenty-five" and "**bold**".
fn is_operator(c: char, before: char, after: char) -> bool {
    let is_layout = |c: char| c.is_alphabetic() || matches!(c, '-' | '*' | '/');
    match c {
        '+' | '=' | '<' | '>' | '^' | '%' | '×' | '÷' | '−' => true,
        '-' | '*' | '/' => !is_layout(before) && !is_layout(after),
        _ => false,
    }
}

fn hash(value: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Counts the words that all texts begin with, and those that all texts end with.
fn template_words(texts: &[Vec<NormalizedWord>]) -> (usize, usize) {
    let Some((first, others)) = texts.split_first() else {
        return (0, 0);
    };
    if texts.len() < MIN_PROMPTS_OF_TEMPLATE {
        return (0, 0);
    }
    let shared = |a: &mut dyn Iterator<Item = (&NormalizedWord, &NormalizedWord)>| {
        a.take_while(|(a, b)| a == b).count()
    };
    let starts = others
        .iter()
        .map(|other| shared(&mut first.iter().zip(other)));
    let start = starts.min().unwrap_or(0);
    let ends = others.iter().map(|other| {
        let (first, other) = (first[start..].iter().rev(), other[start..].iter().rev());
        shared(&mut first.zip(other))
    });
    (start, ends.min().unwrap_or(0))
}

/// Returns the set of pairs of neighbouring words, with a mark before the first word and after the last.
fn word_pairs(words: &[NormalizedWord]) -> Vec<u64> {
    let marked = || words.iter().map(|word| Some(word.hash));
    let before = [None].into_iter().chain(marked());
    let after = marked().chain([None]);
    let mut pairs: Vec<u64> = before.zip(after).map(|pair| hash(&pair)).collect();
    pairs.sort_unstable();
    pairs.dedup();
    pairs
}

/// Returns the numbers of a text; a number that occurs twice counts twice.
fn numbers(words: &[NormalizedWord]) -> Vec<u64> {
    let mut occurrences: HashMap<u64, u32> = HashMap::new();
    let numbers = words.iter().filter(|word| word.is_number);
    let numbers = numbers.map(|word| {
        let occurrence = occurrences.entry(word.hash).or_default();
        *occurrence += 1;
        hash(&(word.hash, *occurrence))
    });
    numbers.collect()
}

/// Replaces the members of sets by their ranks, from the rarest member to the most frequent, and sorts each set.
fn rarest_first(sets: Vec<Vec<u64>>) -> Vec<Vec<u32>> {
    let mut frequencies: HashMap<u64, u32> = HashMap::new();
    for member in sets.iter().flatten() {
        *frequencies.entry(*member).or_default() += 1;
    }
    let mut members: Vec<(u32, u64)> = frequencies.iter().map(|(m, n)| (*n, *m)).collect();
    members.sort_unstable();
    let ranks: HashMap<u64, u32> = members.into_iter().map(|(_, m)| m).zip(0..).collect();
    let ranked = sets.iter().map(|set| {
        let mut ranked: Vec<u32> = set.iter().map(|member| ranks[member]).collect();
        ranked.sort_unstable();
        ranked
    });
    ranked.collect()
}

/// For each member, the sets that have it in their [`prefix`].
struct PrefixIndex {
    sets_by_member: HashMap<u32, Vec<u32>>,
}

impl PrefixIndex {
    fn new(sets: &[Vec<u32>]) -> PrefixIndex {
        let mut sets_by_member: HashMap<u32, Vec<u32>> = HashMap::new();
        for (set, number) in sets.iter().zip(0..) {
            for member in prefix(set) {
                sets_by_member.entry(*member).or_default().push(number);
            }
        }
        PrefixIndex { sets_by_member }
    }

    /// Returns lists that together have every indexed set whose similarity to `set` is large enough.
    fn candidates(&self, set: &[u32]) -> Vec<&[u32]> {
        let lists = prefix(set)
            .iter()
            .filter_map(|member| self.sets_by_member.get(member));
        lists.map(Vec::as_slice).collect()
    }
}

/// Returns the rarest members of a set, so many that two similar sets share one of these. Similar sets share at least
/// 0.8 n of the n members of either, so at most 0.2 n are missing.
fn prefix(set: &[u32]) -> &[u32] {
    let shared = (NEAR_DUPLICATE_SIMILARITY * set.len() as f64 - 1e-6).ceil() as usize;
    let length = (set.len() + 1 - shared).min(set.len());
    &set[..length]
}

/// Computes the Jaccard similarity of two sorted sets, `None` if it is below `least`. Two empty sets are equal.
fn jaccard(a: &[u32], b: &[u32], least: f64) -> Option<f64> {
    if a.is_empty() && b.is_empty() {
        return Some(1.0);
    }
    let (mut i, mut j, mut shared) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        let possible = shared + (a.len() - i).min(b.len() - j);
        if (possible as f64) < least * (a.len() + b.len() - possible) as f64 - 1e-6 {
            return None;
        }
        (i, j, shared) = match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => (i + 1, j, shared),
            std::cmp::Ordering::Greater => (i, j + 1, shared),
            std::cmp::Ordering::Equal => (i + 1, j + 1, shared + 1),
        };
    }
    let similarity = f64::from(shared as u32) / (a.len() + b.len() - shared) as f64;
    (similarity >= least).then_some(similarity)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const EGGS: &str = "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins \
        for her friends every day with four. She sells the remainder at the market for $2 per egg. How much does she make?";

    fn similarity(a: &str, b: &str) -> Option<f64> {
        nearest_texts(&[a.to_owned()], &[b.to_owned()])[0].map(|(_, similarity)| similarity)
    }

    #[test]
    fn another_layout_or_word_is_found_and_another_number_is_not() {
        let shouted = EGGS
            .to_uppercase()
            .replace(' ', "\n  ")
            .replace('.', " ...");
        assert_eq!(similarity(EGGS, &shouted), Some(1.0));
        let replaced = similarity(EGGS, &EGGS.replace("muffins", "cookies")).unwrap();
        assert!((0.8..1.0).contains(&replaced), "{replaced}");
        assert_eq!(similarity(EGGS, &EGGS.replace("16", "17")), None);
        assert_eq!(similarity(EGGS, "How many eggs do 3 ducks lay?"), None);
        assert_eq!(similarity("", "  "), Some(1.0));
        assert_eq!(similarity("", "one"), None);
    }

    #[test]
    fn short_questions_with_another_word_number_or_operator_are_others() {
        for (a, b) in [
            ("What is 23 + 457?", "What is 23 + 458?"),
            ("What is 23 + 457?", "What is 23 - 457?"),
            ("What is 457 - 23?", "What is 23 - 457?"),
            ("What is 23 * 4?", "What is 23 / 4?"),
            ("What is 3.5 + 1?", "What is 35 + 1?"),
            ("the capital of France", "the capital of Spain"),
            ("法国的首都是哪里", "德国的首都是哪里"),
        ] {
            assert_eq!(similarity(a, b), None, "{a} and {b}");
        }
        for (a, b) in [
            ("What is 1,000 + 2?", "what is  1000 + 2"),
            ("twenty-five **apples**", "Twenty five apples"),
            ("法国的首都是哪里？", "法国的首都是哪里"),
        ] {
            assert_eq!(similarity(a, b), Some(1.0), "{a} and {b}");
        }
    }

    /// The problems of the quickstart have the shorter of the two forms.
    #[test]
    fn problems_of_one_template_are_not_near_duplicates() {
        let problem = |i: usize| format!("What is {} + {}?", i % 50 + 10, i / 50 + 10);
        let problems: Vec<String> = (0..2000).map(problem).collect();
        let long = |i: usize| {
            format!(
                "Read with care, and end your answer with the number. {EGGS} Then they lay {i}. Use no tools."
            )
        };
        let long: Vec<String> = (0..200).map(long).collect();
        for all in [problems, long] {
            let (train, test) = all.split_at(all.len() * 9 / 10);
            assert!(nearest_texts(train, test).iter().all(Option::is_none));
            let found = nearest_texts(train, &train[..20]);
            let itself: Vec<_> = (0..20).map(|i| Some((i, 1.0))).collect();
            assert_eq!(found, itself);
        }
    }

    #[test]
    fn the_words_of_a_template_are_not_compared() {
        let examples = "question: how many legs do two cats have? answer: eight. question: which is the red fruit? ";
        let letters = |i: usize| (b'a' + i as u8) as char;
        let prompt = |i| format!("{examples} {0}a {0}b {0}c? answer:", letters(i));
        let prompts: Vec<String> = (0..20).map(prompt).collect();
        let (train, test) = prompts.split_at(15);
        assert!(nearest_texts(train, test).iter().all(Option::is_none));
        let whole = format!("{examples} answer:");
        assert!(similarity(&whole, &format!("{whole} a")).is_some());
    }

    /// The search finds what a comparison of all pairs finds, which is computed from sets of text.
    #[test]
    fn the_search_agrees_with_a_comparison_of_all_pairs() {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let train: Vec<Vec<String>> = (0..400)
            .map(|i| random_words(&mut random, 1 + i % 50))
            .collect();
        let mut test: Vec<Vec<String>> = (0..100)
            .map(|i| random_words(&mut random, 1 + i % 50))
            .collect();
        for (i, words) in train.iter().enumerate() {
            // Copies with up to three words replaced, inserted or swapped.
            let mut copy = words.clone();
            for _ in 0..i % 4 {
                let at = random.random_range(0..copy.len());
                match random.random_range(0..3) {
                    0 => copy[at] = random.random_range(0..60).to_string(),
                    1 => copy.insert(at, "new".to_owned()),
                    _ => copy.swap(0, at),
                }
            }
            test.push(copy);
        }
        let joined = |texts: &[Vec<String>]| texts.iter().map(|t| t.join(" ")).collect::<Vec<_>>();
        let found = nearest_texts(&joined(&train), &joined(&test));
        let train: Vec<PlainSets> = train.iter().map(|words| plain_sets(words)).collect();
        let mut near = 0;
        for (words, found) in test.iter().zip(found) {
            let sets = plain_sets(words);
            let similarities = train.iter().map(|other| plain_similarity(&sets, other));
            let best = similarities.fold(0.0, f64::max);
            let expected = (best >= NEAR_DUPLICATE_SIMILARITY).then_some(best);
            assert_eq!(
                found.map(|(_, similarity)| similarity),
                expected,
                "{words:?}"
            );
            if let Some((index, similarity)) = found {
                assert_eq!(plain_similarity(&sets, &train[index]), similarity);
            }
            near += usize::from(expected.is_some());
        }
        assert!((150..450).contains(&near), "{near} of {}", test.len());
    }

    /// Words of two letters, and numbers.
    fn random_words(random: &mut ChaCha8Rng, count: usize) -> Vec<String> {
        let mut word = || match random.random_range(0..6) {
            0 => random.random_range(0..30).to_string(),
            _ => (0..2).map(|_| random.random_range('a'..='h')).collect(),
        };
        (0..count).map(|_| word()).collect()
    }

    /// Pairs of neighbouring words of a text, and its numbers, each with the count of its occurrences before.
    type PlainSets = (BTreeSet<(String, String)>, BTreeSet<(String, usize)>);

    fn plain_sets(words: &[String]) -> PlainSets {
        let marks = ["<".to_owned(), ">".to_owned()];
        let marked = [&marks[..1], words, &marks[1..]].concat();
        let pairs = marked
            .windows(2)
            .map(|pair| (pair[0].clone(), pair[1].clone()));
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let numbers = words.iter().filter(|word| word.parse::<u32>().is_ok());
        let numbers = numbers.map(|word| {
            let count = seen.entry(word.clone()).or_default();
            *count += 1;
            (word.clone(), *count)
        });
        (pairs.collect(), numbers.collect())
    }

    fn plain_similarity(a: &PlainSets, b: &PlainSets) -> f64 {
        fn jaccard<T: Ord>(a: &BTreeSet<T>, b: &BTreeSet<T>) -> f64 {
            match a.union(b).count() {
                0 => 1.0,
                all => a.intersection(b).count() as f64 / all as f64,
            }
        }
        jaccard(&a.0, &b.0).min(jaccard(&a.1, &b.1))
    }

    /// Planted copies of real questions are found, and real questions of the test set are not copies.
    #[test]
    fn planted_copies_of_real_questions_are_found() {
        let Some(root) = std::env::var_os("POTSTILL_REAL") else {
            eprintln!("skipped: POTSTILL_REAL is not set");
            return;
        };
        let questions = |file: &str| -> Vec<String> {
            let path = std::path::Path::new(&root).join("data/gsm8k").join(file);
            let text = std::fs::read_to_string(path).unwrap();
            let rows = text.lines().map(|line| serde_json::from_str(line).unwrap());
            rows.map(|row: serde_json::Value| row["question"].as_str().unwrap().to_owned())
                .collect()
        };
        let (train, test) = (questions("train.jsonl"), questions("test.jsonl"));
        let found = |texts: &[String]| nearest_texts(&train, texts).iter().flatten().count();
        assert_eq!(found(&test), 0);
        let sample: Vec<&String> = train.iter().step_by(15).collect();
        let spaced = sample.iter().map(|q| q.to_uppercase().replace(' ', " \n"));
        assert_eq!(found(&spaced.collect::<Vec<_>>()), sample.len());
        let replaced = |(i, question): (usize, &&String)| {
            let mut words: Vec<&str> = question.split_whitespace().collect();
            let (count, is_text) = (words.len(), |word: &str| !word.contains(char::is_numeric));
            let at = (0..count)
                .map(|k| (i + k) % count)
                .find(|at| is_text(words[*at]))
                .unwrap();
            words[at] = "zebra";
            words.join(" ")
        };
        let replaced: Vec<String> = sample.iter().enumerate().map(replaced).collect();
        let share = found(&replaced) as f64 / sample.len() as f64;
        assert!(share > 0.98, "{share}");
        let changed = |question: &&String| question.replacen(char::is_numeric, "7654", 1);
        let changed: Vec<String> = sample
            .iter()
            .map(changed)
            .filter(|q| q.contains("7654"))
            .collect();
        let share = found(&changed) as f64 / changed.len() as f64;
        assert!(share < 0.02, "{share}");
    }
}
