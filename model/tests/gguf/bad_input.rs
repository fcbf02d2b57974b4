//! GGUF files that are damaged or that ask for what is not there: each is an error that says what is wrong.

use std::path::PathBuf;

use potstill_model::lay_out_gguf;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Writes small GGUF files by hand, so that the tests do not depend on the writer.
#[derive(Clone)]
struct Builder {
    version: u32,
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: usize,
    alignment: usize,
}

fn text(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

fn typed(code: u32, value: &[u8]) -> Vec<u8> {
    [&code.to_le_bytes(), value].concat()
}

fn count(number: u32) -> Vec<u8> {
    typed(4, &number.to_le_bytes())
}

fn array(code: u32, items: &[Vec<u8>]) -> Vec<u8> {
    let head = [
        code.to_le_bytes().to_vec(),
        (items.len() as u64).to_le_bytes().to_vec(),
    ];
    typed(9, &[head.concat(), items.concat()].concat())
}

impl Builder {
    /// A llama of one layer, width 32 and 4 tokens that can be laid out.
    fn new() -> Self {
        let mut keys = vec![("general.architecture".to_owned(), typed(8, &text("llama")))];
        for (name, number) in [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", 32),
            ("feed_forward_length", 32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            keys.push((format!("llama.{name}"), count(number)));
        }
        let epsilon = typed(6, &1e-5f32.to_le_bytes());
        keys.push(("llama.attention.layer_norm_rms_epsilon".to_owned(), epsilon));
        keys.push(("tokenizer.ggml.model".to_owned(), typed(8, &text("gpt2"))));
        keys.push(("tokenizer.ggml.pre".to_owned(), typed(8, &text("gpt-2"))));
        let tokens = ["a", "b", "ab", "<|end|>"].map(text);
        keys.push(("tokenizer.ggml.tokens".to_owned(), array(8, &tokens)));
        let kinds = [1i32, 1, 1, 3].map(|kind| kind.to_le_bytes().to_vec());
        keys.push(("tokenizer.ggml.token_type".to_owned(), array(5, &kinds)));
        keys.push(("tokenizer.ggml.merges".to_owned(), array(8, &[text("a b")])));
        keys.push(("tokenizer.ggml.eos_token_id".to_owned(), count(3)));
        let tensors = vec![
            ("token_embd.weight".to_owned(), vec![32, 4], 8, 0),
            ("output_norm.weight".to_owned(), vec![32], 0, 160),
        ];
        Self {
            version: 3,
            keys,
            tensors,
            data: 160 + 128,
            alignment: 32,
        }
    }

    fn key(mut self, name: &str, value: Vec<u8>) -> Self {
        self.keys.retain(|(key, _)| key != name);
        self.keys.push((name.to_owned(), value));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.keys.retain(|(key, _)| key != name);
        self
    }

    fn tensor(mut self, name: &str, shape: &[u64], code: u32, offset: u64) -> Self {
        self.tensors.retain(|(own, ..)| own != name);
        self.tensors
            .push((name.to_owned(), shape.to_vec(), code, offset));
        self
    }

    fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(text(key));
            out.extend(value);
        }
        for (name, shape, code, offset) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(code.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(self.alignment) + self.data, 0);
        out
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Writes a file and lays it out; returns the message, or `None` if that worked.
    fn message(&self, bytes: &[u8]) -> Option<String> {
        let file: PathBuf = self.0.path().join("x.gguf");
        std::fs::write(&file, bytes).unwrap();
        let out = self.0.path().join("out");
        let result = lay_out_gguf(&file, &out);
        let _ = std::fs::remove_dir_all(out);
        result.err().map(|error| error.to_string())
    }

    /// Checks that a file is refused with a sentence that names it and holds a part.
    fn refuses(&self, bytes: &[u8], part: &str) {
        let message = self.message(bytes).unwrap_or_default();
        assert!(message.contains(part), "{part:?} is not in {message:?}");
        assert!(
            message.contains("x.gguf`: "),
            "{message:?} does not name the file"
        );
        assert!(message.contains("\nhint: "), "{message:?} has no hint");
    }
}

#[test]
fn a_whole_file_is_laid_out() {
    let folder = Folder::new();
    assert_eq!(folder.message(&Builder::new().bytes()), None);
    let mut second = Builder::new();
    second.version = 2;
    assert_eq!(folder.message(&second.bytes()), None);
    let mut aligned = Builder::new().key("general.alignment", count(64));
    aligned.alignment = 64;
    aligned.tensors[1].3 = 192;
    aligned.data = 192 + 128;
    assert_eq!(folder.message(&aligned.bytes()), None);
}

#[test]
fn a_file_that_was_cut_anywhere_is_refused() {
    let folder = Folder::new();
    let whole = Builder::new().bytes();
    let header = Builder::new().header().len();
    for length in (0..whole.len()).filter(|length| *length < header + 8 || length % 16 == 0) {
        let message = folder.message(&whole[..length]);
        let message = message.unwrap_or_else(|| panic!("{length} of {} bytes", whole.len()));
        assert!(message.contains("x.gguf"), "{message}");
    }
}

#[test]
fn headers_that_are_not_possible_are_refused() {
    let folder = Folder::new();
    let base = Builder::new();
    folder.refuses(b"", "the file is empty");
    folder.refuses(b"{\"a\": 1}", "does not begin with the letters GGUF");
    for version in [0u32, 1, 4, 3 << 24] {
        let mut old = base.clone();
        old.version = version;
        folder.refuses(&old.bytes(), &format!("version {version} of GGUF"));
    }
    for (at, what) in [(8, "tensors"), (16, "keys")] {
        for number in [u64::MAX, 1 << 40] {
            let mut bytes = base.bytes();
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            folder.refuses(&bytes, &format!("{number} {what}"));
        }
    }
    for alignment in [0, 3, 1 << 30] {
        let file = base.clone().key("general.alignment", count(alignment));
        folder.refuses(&file.bytes(), "`general.alignment` is");
    }
    let file = base.clone().key("general.alignment", typed(8, &text("32")));
    folder.refuses(&file.bytes(), "`general.alignment` is 0");
    folder.refuses(
        &base.clone().key("odd", typed(13, &[0])).bytes(),
        "`odd` has type 13",
    );
    folder.refuses(
        &base.clone().key("odd", typed(7, &[2])).bytes(),
        "`odd` is a flag of value 2",
    );
    let utf8 = typed(8, &[&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat());
    folder.refuses(
        &base.clone().key("odd", utf8).bytes(),
        "the key `odd` is not UTF-8",
    );
    let long = typed(8, &u64::MAX.to_le_bytes());
    folder.refuses(
        &base.clone().key("odd", long).bytes(),
        "it ends within the key `odd`",
    );
    let many = typed(
        9,
        &[&4u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat(),
    );
    folder.refuses(
        &base.clone().key("odd", many).bytes(),
        "values in the key `odd`",
    );
    let nested = array(9, &[array(4, &[])]);
    folder.refuses(
        &base.clone().key("odd", nested).bytes(),
        "`odd` is an array of arrays",
    );
    let mut twice = base.clone();
    twice.keys.push(("llama.block_count".to_owned(), count(1)));
    folder.refuses(&twice.bytes(), "the key `llama.block_count` exists twice");
}

#[test]
fn tensors_that_are_not_possible_are_refused() {
    let folder = Folder::new();
    let base = Builder::new();
    let norm = |shape: &[u64], code, offset| {
        base.clone()
            .tensor("output_norm.weight", shape, code, offset)
            .bytes()
    };
    folder.refuses(&norm(&[], 0, 160), "`output_norm.weight` has 0 dimensions");
    folder.refuses(
        &norm(&[1, 1, 1, 1, 1], 0, 160),
        "`output_norm.weight` has 5 dimensions",
    );
    folder.refuses(
        &norm(&[32, 0], 0, 160),
        "`output_norm.weight` has an impossible size",
    );
    folder.refuses(
        &norm(&[1 << 40, 1 << 40], 0, 160),
        "`output_norm.weight` has an impossible size",
    );
    folder.refuses(
        &norm(&[32], 19, 160),
        "`output_norm.weight` is stored in type 19",
    );
    folder.refuses(&norm(&[31], 8, 160), "whole blocks of 32 (Q8_0)");
    folder.refuses(
        &norm(&[32], 0, 161),
        "offset 161, which is not a multiple of 32",
    );
    folder.refuses(&norm(&[32], 0, 1 << 40), "but the file has");
    folder.refuses(&norm(&[32], 0, u64::MAX - 31), "lies outside the file");
    folder.refuses(
        &norm(&[32], 0, 128),
        "`token_embd.weight` and `output_norm.weight` overlap",
    );
    let mut twice = base.clone();
    twice.tensors.push(twice.tensors[1].clone());
    folder.refuses(
        &twice.bytes(),
        "the tensor `output_norm.weight` exists twice",
    );
}

#[test]
fn models_that_are_not_possible_are_refused() {
    let folder = Folder::new();
    let base = Builder::new();
    let key = |name: &str, value| base.clone().key(name, value).bytes();
    folder.refuses(
        &key("general.architecture", typed(8, &text("mamba"))),
        "its architecture is \"mamba\"",
    );
    folder.refuses(
        &key("general.architecture", count(1)),
        "`general.architecture` is not a text",
    );
    folder.refuses(
        &base.clone().without("general.architecture").bytes(),
        "`general.architecture` is absent",
    );
    folder.refuses(
        &key("llama.block_count", count(u32::MAX)),
        "`llama.block_count` is 4294967295",
    );
    folder.refuses(
        &key("llama.attention.head_count", count(0)),
        "`llama.attention.head_count` is 0",
    );
    folder.refuses(&key("llama.attention.key_length", count(5)), "the width 5");
    folder.refuses(&key("llama.expert_count", count(8)), "announces experts");
    folder.refuses(
        &key("llama.rope.scaling.type", typed(8, &text("odd"))),
        "`llama.rope.scaling.type` is \"odd\"",
    );
    folder.refuses(
        &key("tokenizer.ggml.model", typed(8, &text("t5"))),
        "`tokenizer.ggml.model` is Some(\"t5\")",
    );
    folder.refuses(
        &key("tokenizer.ggml.pre", typed(8, &text("odd"))),
        "`tokenizer.ggml.pre` is \"odd\"",
    );
    folder.refuses(
        &key("tokenizer.ggml.eos_token_id", count(4)),
        "`tokenizer.ggml.eos_token_id` is 4",
    );
    folder.refuses(
        &key("tokenizer.ggml.merges", array(8, &[text("ab a")])),
        "merge 0 in the key `tokenizer.ggml.merges`",
    );
    folder.refuses(
        &key("tokenizer.ggml.tokens", array(8, &[text("a")])),
        "has 4 values for 1 tokens",
    );
    folder.refuses(
        &base.clone().without("tokenizer.ggml.tokens").bytes(),
        "so it has no tokenizer",
    );
}

/// A thousand files with changed bytes are read or refused, without a panic and within the memory of a small file.
#[test]
fn files_with_changed_bytes_do_not_panic() {
    let folder = Folder::new();
    let whole = Builder::new().bytes();
    let header = Builder::new().header().len();
    let mut random = ChaCha8Rng::seed_from_u64(19);
    let mut refused = 0;
    for _ in 0..1000 {
        let mut bytes = whole.clone();
        for _ in 0..random.random_range(1..=4) {
            let at = random.random_range(0..header);
            match random.random_range(0..4) {
                0 => bytes[at] ^= 1 << random.random_range(0..8),
                1 => bytes[at] = random.random(),
                2 => bytes[at] = 0xff,
                _ => bytes[at] = 0,
            }
        }
        refused += usize::from(folder.message(&bytes).is_some());
    }
    assert!(refused > 250, "{refused} of 1000 were refused");
}
