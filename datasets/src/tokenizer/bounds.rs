//! Limits of what `tokenizer.json` may describe, checked before the library reads it.
//!
//! A few lines of JSON can describe a normaliser that makes gigabytes of a short text. Each step of the normaliser, the
//! pre-tokenizer and the decoder multiplies the length of a text by a factor that is known from its settings, so a bound of
//! the whole is known without a text.

use serde_json::Value;

use crate::limits::{
    TOKENIZER_CONTENT_BYTES, TOKENIZER_GROWTH, TOKENIZER_IDS, TOKENIZER_PATTERN_BYTES,
    TOKENIZER_STEPS,
};

/// The growth of a text in the steps that were walked through so far.
struct Growth {
    factor: u64,
    steps: usize,
}

/// Checks a file, and returns how many bytes one byte of a text may become.
///
/// # Errors
/// The limit that the file passes.
pub(super) fn check(json: &Value) -> Result<u64, String> {
    check_ids(json)?;
    let growth = |part: &str| -> Result<u64, String> {
        let mut growth = Growth {
            factor: 1,
            steps: 0,
        };
        growth.add(part, json.get(part).unwrap_or(&Value::Null))?;
        Ok(growth.factor)
    };
    growth("post_processor")?;
    growth("decoder")?;
    Ok(growth("normalizer")? * growth("pre_tokenizer")?)
}

impl Growth {
    /// Adds a step with all steps within it.
    fn add(&mut self, part: &str, step: &Value) -> Result<(), String> {
        if step.is_null() {
            return Ok(());
        }
        self.steps += 1;
        if self.steps > TOKENIZER_STEPS {
            return Err(format!(
                "its `{part}` has more than {TOKENIZER_STEPS} steps"
            ));
        }
        let kind = step["type"].as_str().unwrap_or_default();
        let factor = match kind {
            "Replace" => replace_growth(part, step)?,
            "Prepend" => content(part, &step["prepend"])?.len() as u64 + 1,
            "Metaspace" => content(part, &step["replacement"])?.len() as u64,
            "ByteLevel" => 2,
            _ => 1,
        };
        if kind == "FixedLength" && step["length"].as_u64() == Some(0) {
            return Err(format!("`length` of FixedLength in its `{part}` is 0"));
        }
        if let Some(pattern) = step["pattern"]["Regex"].as_str() {
            check_pattern(part, pattern)?;
        }
        self.factor = self.factor.saturating_mul(factor.max(1));
        if self.factor > TOKENIZER_GROWTH {
            return Err(format!(
                "its `{part}` can make a text more than {TOKENIZER_GROWTH} times as long"
            ));
        }
        let lists = [
            "normalizers",
            "pretokenizers",
            "processors",
            "decoders",
            "single",
            "pair",
        ];
        for list in lists {
            for inner in step[list].as_array().into_iter().flatten() {
                self.add(part, inner)?;
            }
        }
        Ok(())
    }
}

/// Returns the growth of a replacement: for each byte that it replaces, or for each place between bytes if its pattern may
/// match nothing.
fn replace_growth(part: &str, step: &Value) -> Result<u64, String> {
    let new = content(part, &step["content"])?.len() as u64;
    Ok(match step["pattern"]["String"].as_str() {
        Some(old) if !old.is_empty() => new.div_ceil(old.len() as u64),
        _ => new.saturating_add(1),
    })
}

fn content<'a>(part: &str, value: &'a Value) -> Result<&'a str, String> {
    let content = value.as_str().unwrap_or_default();
    match content.len() <= TOKENIZER_CONTENT_BYTES {
        true => Ok(content),
        false => Err(format!(
            "its `{part}` inserts a text of {} bytes, and the limit is {TOKENIZER_CONTENT_BYTES}",
            content.len()
        )),
    }
}

/// Refuses ids beyond any vocabulary, since tables have a place for each id, and long added tokens.
fn check_ids(json: &Value) -> Result<(), String> {
    let vocabulary = &json["model"]["vocab"];
    let listed = vocabulary.as_array().map_or(0, Vec::len) as u64;
    let named = vocabulary
        .as_object()
        .into_iter()
        .flat_map(|map| map.values());
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let ids = named.chain(added.clone().map(|token| &token["id"]));
    let largest = ids.filter_map(Value::as_u64).max().unwrap_or_default();
    if largest.max(listed) >= TOKENIZER_IDS {
        return Err(format!(
            "it has the id {}, and ids must be below {TOKENIZER_IDS}",
            largest.max(listed)
        ));
    }
    for token in added {
        content("added_tokens", &token["content"])?;
    }
    Ok(())
}

/// Refuses long patterns, and repetitions within a repetition, such as `(a+)+`, which can take exponential time.
fn check_pattern(part: &str, pattern: &str) -> Result<(), String> {
    if pattern.len() > TOKENIZER_PATTERN_BYTES {
        return Err(format!(
            "a pattern of its `{part}` has {} bytes, and the limit is {TOKENIZER_PATTERN_BYTES}",
            pattern.len()
        ));
    }
    let nested = || {
        Err(format!(
            "the pattern {pattern:?} of its `{part}` repeats what is repeated already, which can take for ever"
        ))
    };
    // Whether each open group has an unbounded repetition.
    let mut groups = vec![false];
    let mut closed = false;
    let mut in_class = 0_usize;
    let mut rest = pattern.chars().peekable();
    while let Some(c) = rest.next() {
        let unbounded = match c {
            '\\' => {
                rest.next();
                false
            }
            '[' => {
                in_class += 1;
                // A bracket that comes first in a class stands for itself.
                if rest.peek() == Some(&'^') {
                    rest.next();
                }
                if rest.peek() == Some(&']') {
                    rest.next();
                }
                false
            }
            ']' if in_class > 0 => {
                in_class -= 1;
                false
            }
            _ if in_class > 0 => false,
            '(' => {
                groups.push(false);
                if groups.len() > TOKENIZER_STEPS {
                    return nested();
                }
                closed = false;
                continue;
            }
            ')' => {
                closed = groups.pop().unwrap_or_default();
                match groups.last_mut() {
                    Some(outer) => *outer |= closed,
                    None => groups.push(closed),
                }
                continue;
            }
            '*' | '+' => true,
            '{' => {
                let counts: String = rest.clone().take_while(|&c| c != '}').collect();
                let (_, most) = counts.split_once(',').unwrap_or(("", &counts));
                most.trim()
                    .parse::<u32>()
                    .map_or(most.trim().is_empty(), |most| most > 1000)
            }
            _ => false,
        };
        if unbounded {
            // A `+` after another repetition makes that one possessive.
            if closed {
                return nested();
            }
            if let Some(group) = groups.last_mut() {
                *group = true;
            }
        }
        closed = false;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn normalizer(steps: Value) -> Result<u64, String> {
        check(&json!({ "normalizer": { "type": "Sequence", "normalizers": steps } }))
    }

    #[test]
    fn honest_files_pass() {
        let space = json!([
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ]);
        assert_eq!(normalizer(space), Ok(12));
        for pattern in [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+|[]+a]*",
            r"(ab|c)+",
        ] {
            assert_eq!(check_pattern("pre_tokenizer", pattern), Ok(()), "{pattern}");
        }
    }

    #[test]
    fn bombs_are_refused() {
        let grow = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aaaa" });
        let long =
            json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "a".repeat(500) });
        let prepend = json!({ "type": "Prepend", "prepend": "aaaaaaaaaaaaaaaa" });
        for steps in [
            json!(vec![grow; 20]),
            json!([long]),
            json!(vec![prepend; 3]),
        ] {
            let error = normalizer(steps).unwrap_err();
            assert!(error.contains("times as long"), "{error}");
        }
        let lower = json!({ "type": "Lowercase" });
        let error = normalizer(json!(vec![lower; 1000])).unwrap_err();
        assert!(error.contains("more than 64 steps"), "{error}");
        let byte_level = json!({ "type": "ByteLevel" });
        let json = json!({ "pre_tokenizer": { "type": "Sequence", "pretokenizers": vec![byte_level; 30] } });
        assert!(check(&json).unwrap_err().contains("`pre_tokenizer`"));
        for pattern in ["(a+)+$", "(?:(a*)b?)*c", "(a{2,})+", "((x+)y)*"] {
            let error = check_pattern("normalizer", pattern).unwrap_err();
            assert!(error.contains("repeated already"), "{pattern}");
        }
        let far = json!({ "model": { "vocab": { "a": 4_294_967_295_u32 } } });
        assert!(check(&far).unwrap_err().contains("ids must be below"));
        let zero = json!({ "pre_tokenizer": { "type": "FixedLength", "length": 0 } });
        assert!(check(&zero).unwrap_err().contains("is 0"));
    }
}
