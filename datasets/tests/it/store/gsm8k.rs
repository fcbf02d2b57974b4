//! The real data that the examples use.

use std::path::PathBuf;

use potstill_datasets::{Columns, ImportSettings, import};

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
    let columns = Columns {
        question: Some("question".into()),
        answer: Some("answer".into()),
        ..Columns::default()
    };
    let all = import(&ImportSettings::new(&path, columns.clone())).unwrap();
    assert_eq!(all.prompts.len() + all.duplicates, 7_473);
    assert!(all.prompts.iter().all(|prompt| {
        prompt
            .reference
            .as_deref()
            .is_some_and(|text| text.contains("#### "))
    }));
    let some = import(&ImportSettings {
        limit: Some(96),
        ..ImportSettings::new(&path, columns.clone())
    })
    .unwrap();
    assert_eq!(some.prompts, all.prompts[..96]);
}
