//! The split of text before merging in byte-level tokenizers: `pre_tokenizer` in `tokenizer.json`, and a name in GGUF files
//! for which llama.cpp has the rules. Another name gives other tokens and a worse model without any error, so a splitting
//! that is not in the table is refused.

use serde_json::{Value, json};

const GPT2_CONTRACTIONS_QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";

/// A step of a splitting.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Step<'a> {
    /// Each digit is a part.
    Digits,
    /// Each match of a regular expression is a part.
    Split(&'a str),
    /// The regular expression of GPT-2.
    Gpt2,
}

/// A splitting that llama.cpp knows.
pub(super) struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre`; files are written with the first.
    names: &'static [&'static str],
    steps: &'static [Step<'static>],
    /// Whether a part that is a token is not merged from bytes, `ignore_merges` in `tokenizer.json`.
    pub(super) ignores_merges: bool,
    /// Whether llama.cpp puts BOS in front unless a key says otherwise.
    pub(super) adds_bos: bool,
    /// Whether the tokenizers of this kind normalise text to NFC first.
    pub(super) normalizes: bool,
}

const PLAIN: PreTokenizer = PreTokenizer {
    names: &[],
    steps: &[],
    ignores_merges: false,
    adds_bos: false,
    normalizes: false,
};

/// The splittings by name. Of two rows with the same steps and the same `ignores_merges` the first is written.
const TABLE: [PreTokenizer; 9] = [
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        steps: &[Step::Digits, Step::Gpt2],
        ..PLAIN
    },
    PreTokenizer {
        names: &["gpt-2", "olmo", "phi-2", "mpt", "jais"],
        steps: &[Step::Gpt2],
        ..PLAIN
    },
    PreTokenizer {
        names: &["qwen2", "megrez", "stablelm2"],
        steps: &[Step::Split(GPT2_CONTRACTIONS_QWEN)],
        normalizes: true,
        ..PLAIN
    },
    PreTokenizer {
        names: &["deepseek-r1-qwen"],
        steps: &[Step::Split(GPT2_CONTRACTIONS_QWEN)],
        ..PLAIN
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        steps: &[Step::Split(CL100K)],
        ignores_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    PreTokenizer {
        names: &["dbrx", "smaug-bpe"],
        steps: &[Step::Split(CL100K)],
        ..PLAIN
    },
    PreTokenizer {
        names: &["gpt-4o", "llama4"],
        steps: &[Step::Split(O200K)],
        ..PLAIN
    },
    PreTokenizer {
        names: &["tekken"],
        steps: &[Step::Split(TEKKEN)],
        ignores_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    PreTokenizer {
        names: &["deepseek-v3", "hunyuan-dense"],
        steps: &[
            Step::Split(r"\p{N}{1,3}"),
            Step::Split("[一-龥぀-ゟ゠-ヿ]+"),
            Step::Split(DEEPSEEK_V3),
        ],
        ..PLAIN
    },
];

impl PreTokenizer {
    /// Returns the splitting with a name in GGUF files.
    pub(super) fn by_name(name: &str) -> Option<&'static Self> {
        TABLE.iter().find(|known| known.names.contains(&name))
    }

    /// Returns the splitting of a byte-level `tokenizer.json`, or `None` if llama.cpp is not known to have it.
    pub(super) fn of(tokenizer: &Value) -> Option<&'static Self> {
        let steps = steps(&tokenizer["pre_tokenizer"])?;
        let ignores_merges = tokenizer["model"]["ignore_merges"] == true;
        let normalizes = match &tokenizer["normalizer"] {
            Value::Null => false,
            normalizer if is_nfc(normalizer) => true,
            _ => return None,
        };
        let fits = |known: &&Self| known.steps == steps && known.ignores_merges == ignores_merges;
        let mut found = TABLE.iter().filter(fits);
        let first = found.next()?;
        match first.normalizes == normalizes {
            true => Some(first),
            false => found
                .find(|known| known.normalizes == normalizes)
                .or(Some(first)),
        }
    }

    /// The name that is written to GGUF files.
    pub(super) fn name(&self) -> &'static str {
        self.names.first().copied().unwrap_or_default()
    }

    /// The `pre_tokenizer` of `tokenizer.json`.
    pub(super) fn to_json(&self) -> Value {
        let byte_level = |use_regex: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex,
            })
        };
        let mut out = Vec::new();
        for step in self.steps {
            out.push(match step {
                Step::Digits => json!({ "type": "Digits", "individual_digits": true }),
                Step::Split(regex) => json!({
                    "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false,
                }),
                Step::Gpt2 => byte_level(true),
            });
        }
        if !self.steps.contains(&Step::Gpt2) {
            out.push(byte_level(false));
        }
        json!({ "type": "Sequence", "pretokenizers": out })
    }

    /// The names of all splittings, for messages.
    pub(super) fn names() -> String {
        let names: Vec<&str> = TABLE
            .iter()
            .flat_map(|known| known.names)
            .copied()
            .collect();
        names.join(", ")
    }
}

fn is_nfc(normalizer: &Value) -> bool {
    let only = match normalizer["type"].as_str() {
        Some("Sequence") => match normalizer["normalizers"].as_array().map(Vec::as_slice) {
            Some([only]) => only,
            _ => return false,
        },
        _ => normalizer,
    };
    only["type"] == "NFC"
}

/// Returns the steps of a `pre_tokenizer` that ends in byte level, or `None` for others.
fn steps(pre_tokenizer: &Value) -> Option<Vec<Step<'_>>> {
    let parts = match pre_tokenizer["type"].as_str()? {
        "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.as_slice(),
        _ => std::slice::from_ref(pre_tokenizer),
    };
    let (last, first) = parts.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    let mut steps = Vec::new();
    for part in first {
        steps.push(match part["type"].as_str()? {
            "Digits" if part["individual_digits"] == true => Step::Digits,
            "Split" if part["behavior"] == "Isolated" && part["invert"] != true => {
                Step::Split(part["pattern"]["Regex"].as_str()?)
            }
            _ => return None,
        });
    }
    // An absent key is true.
    if last["use_regex"] != false {
        steps.push(Step::Gpt2);
    }
    Some(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splittings_are_recognised_in_their_own_json() {
        for known in &TABLE {
            let normalizer = match known.normalizes {
                true => json!({ "type": "NFC" }),
                false => Value::Null,
            };
            let tokenizer = json!({
                "normalizer": normalizer,
                "pre_tokenizer": known.to_json(),
                "model": { "ignore_merges": known.ignores_merges },
            });
            let found = PreTokenizer::of(&tokenizer).unwrap();
            assert_eq!(found.name(), known.name());
            assert_eq!(
                PreTokenizer::by_name(known.names[0]).unwrap().name(),
                known.name()
            );
        }
    }

    #[test]
    fn other_splittings_are_not_taken_for_a_known_one() {
        let known = json!({ "type": "ByteLevel", "add_prefix_space": false, "use_regex": true });
        let mut prefixed = known.clone();
        prefixed["add_prefix_space"] = json!(true);
        let split = json!({ "type": "Split", "pattern": { "Regex": "a" }, "behavior": "Isolated" });
        let unknown = json!({ "type": "Sequence", "pretokenizers": [split, known.clone()] });
        for pre_tokenizer in [
            prefixed,
            unknown,
            Value::Null,
            json!({ "type": "Metaspace" }),
        ] {
            let tokenizer = json!({ "pre_tokenizer": pre_tokenizer, "model": {} });
            assert!(PreTokenizer::of(&tokenizer).is_none());
        }
        let lower = json!({ "pre_tokenizer": known, "normalizer": { "type": "Lowercase" } });
        assert!(PreTokenizer::of(&lower).is_none());
    }
}
