//! The real data that the examples use.

use std::path::PathBuf;

use potstill_datasets::{Columns, import};

#[test]
fn gsm8k_imports_whole_and_in_part() {
    let Some(real) = std::env::var_os("POTSTILL_REAL") else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return;
    };
    let path = PathBuf::from(real).join("data/gsm8k/train.jsonl");
    if !path.exists() {
        eprintln!("skipped: POTSTILL_REAL has no data/gsm8k/train.jsonl");
        return;
    }
    let columns = Columns::QuestionAnswer {
        question: "question".into(),
        answer: Some("answer".into()),
        given: false,
    };
    let all = import(&path, &columns, None, None, None).unwrap();
    assert_eq!(all.prompts.len() + all.duplicates, 7_473);
    assert!(all.prompts.iter().all(|prompt| {
        prompt
            .reference
            .as_deref()
            .is_some_and(|text| text.contains("#### "))
    }));
    let some = import(&path, &columns, None, None, Some(96)).unwrap();
    assert_eq!(some.prompts, all.prompts[..96]);
}
