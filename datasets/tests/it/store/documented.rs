//! `docs/parquet.md` lists exactly the columns there are, and a run's folders are left for other readers to open.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, slice};

use arrow_schema::{DataType, Field};
use potstill_datasets::{
    Completion, Dropped, Failed, FinishReason, Manifest, Message, NearDuplicate, OwnText, Prompt,
    Record, Role, SCHEMA_VERSION, SampledToken, Selected, SequenceValues, Signal, Split,
    TaskSample, ToolCall, TopToken, Usage, Verdict, shard_name, write_shard,
};

use super::records;

fn notation(field: &Field) -> String {
    let name = match field.data_type() {
        DataType::Utf8 => "string".into(),
        DataType::Binary => "binary".into(),
        DataType::Boolean => "bool".into(),
        DataType::UInt32 => "uint32".into(),
        DataType::Float32 => "float32".into(),
        DataType::Float64 => "float64".into(),
        DataType::List(element) => format!("list<{}>", notation(element)),
        DataType::Struct(fields) => {
            let fields: Vec<String> = fields
                .iter()
                .map(|field| format!("{}: {}", field.name(), notation(field)))
                .collect();
            format!("struct<{}>", fields.join(", "))
        }
        other => panic!("docs/parquet.md has no notation for {other}"),
    };
    format!("{name}{}", if field.is_nullable() { "?" } else { "" })
}

fn columns<R: Record>() -> (&'static str, Vec<(String, String)>) {
    let schema = R::schema();
    (
        R::TABLE,
        schema
            .fields()
            .iter()
            .map(|field| (field.name().clone(), notation(field)))
            .collect(),
    )
}

#[test]
fn the_documented_columns_are_those_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/parquet.md");
    let mut documented: BTreeMap<&str, Vec<(String, String)>> = BTreeMap::new();
    let text = fs::read_to_string(path).unwrap();
    let mut table = "";
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            table = heading;
        } else if let Some(row) = line.strip_prefix("| `") {
            let mut cells = row.split('`').step_by(2);
            let cell = (
                cells.next().unwrap().to_owned(),
                cells.next().unwrap().to_owned(),
            );
            documented.entry(table).or_default().push(cell);
        }
    }
    let expected = BTreeMap::from([
        columns::<Prompt>(),
        columns::<Completion>(),
        columns::<Signal>(),
        columns::<Selected>(),
        columns::<Dropped>(),
        columns::<NearDuplicate>(),
        columns::<Failed>(),
        columns::<SequenceValues>(),
        columns::<Verdict>(),
        columns::<TaskSample>(),
        columns::<OwnText>(),
    ]);
    assert_eq!(documented, expected);
}

/// Leaves a run in the target directory (`tmp/parquet`) for `scripts/check_parquet.py`.
#[test]
fn a_run_for_other_readers() {
    let run = Path::new(env!("CARGO_TARGET_TMPDIR")).join("parquet");
    if run.exists() {
        fs::remove_dir_all(&run).unwrap();
    }
    let sources = records::provenances();
    let prompts = [prompt()];
    let id = prompts[0].id.clone();
    let completions: Vec<_> = (0..70).map(|index| completion(&id, index)).collect();
    let mut signals = records::signals(70, 20, 64);
    for (index, signal) in signals.iter_mut().enumerate() {
        signal.rows.change_rows(|position, row| {
            (row.draw_ids, row.draw_counts) = (vec![1000, 1001], vec![7, 1]);
            if index == 0 {
                row.log_z_at = vec![None];
            }
            if (index, position) == (0, 0) {
                row.tail_logprob = f32::NEG_INFINITY;
                (row.draw_ids, row.draw_counts) = (vec![], vec![]);
            }
        });
    }
    let chosen = Selected {
        shard: 0,
        row: 1,
        prompt_id: id.clone(),
        sample_index: 1,
    };
    let near_duplicate = NearDuplicate {
        split: Split::Test,
        prompt_id: id.clone(),
        train_prompt_id: id.clone(),
        similarity: 0.875,
    };
    let failed = Failed {
        prompt_id: id.clone(),
        sample_index: 70,
        reason: "idle_timeout".into(),
        message: "no byte came for 60 s".into(),
    };
    let verdict = Verdict {
        prompt_id: id.clone(),
        sample_index: 0,
        grader: "number".into(),
        correct: true,
        extracted: Some("4".into()),
    };
    let task_sample = TaskSample {
        prompt_id: id.clone(),
        reasoning: None,
        answer: "5".into(),
        extracted: Some("5".into()),
        correct: false,
        finished: true,
        tokens: 2,
    };
    let own_text = OwnText {
        prompt_id: id.clone(),
        sample_index: 0,
        tokens: 2,
        reverse_kl_nats: 0.25,
    };
    let shard = |table: &str, index: usize| table_folder(&run, table).join(shard_name(index));
    let samples = |eval: &str| {
        let table = format!("students/student/eval/{eval}");
        table_folder(&run, &table).join("samples.parquet")
    };
    write_shard(&shard("prompts", 0), &prompts, &[]).unwrap();
    write_shard(&shard("completions", 0), &completions[..64], &sources).unwrap();
    write_shard(&shard("completions", 1), &completions[64..], &sources).unwrap();
    write_shard(&shard("signals", 0), &signals, &sources).unwrap();
    // A shard without rows, in front of one with a row.
    write_shard::<Failed>(&shard("failures", 0), &[], &[]).unwrap();
    write_shard(&shard("failures", 1), &[failed], &[]).unwrap();
    write_shard(&shard("verdicts", 0), &[verdict], &[]).unwrap();
    write_shard(&shard("train", 0), slice::from_ref(&chosen), &[]).unwrap();
    write_shard(&shard("dev", 0), slice::from_ref(&chosen), &[]).unwrap();
    write_shard(&shard("test", 0), &[chosen], &[]).unwrap();
    write_shard(&shard("near_duplicates", 0), &[near_duplicate], &[]).unwrap();
    // A table without rows.
    write_shard::<Dropped>(&shard("dropped", 0), &[], &[]).unwrap();
    write_shard(&samples("gsm8k"), &[task_sample], &[]).unwrap();
    write_shard(&samples("own_text"), &[own_text], &[]).unwrap();
    write_shard(&samples("test"), &[sequence_values(&id)], &[]).unwrap();
}

fn prompt() -> Prompt {
    let mut assistant = Message::text(Role::Assistant, "");
    assistant.tool_calls = vec![tool_call()];
    let messages = vec![
        Message::text(Role::User, "2 + 2?"),
        assistant,
        Message::text(Role::Tool, "4"),
    ];
    Prompt::new(messages, None, Some("4".into()), "train.jsonl:1".into())
}

fn tool_call() -> ToolCall {
    ToolCall {
        id: None,
        name: "f".into(),
        arguments: "{}".into(),
    }
}

fn completion(prompt_id: &str, sample_index: u32) -> Completion {
    Completion {
        prompt_id: prompt_id.to_owned(),
        sample_index,
        reasoning: (sample_index == 0).then(|| "hm".into()),
        answer: "4".into(),
        tool_calls: vec![tool_call()],
        finish_reason: FinishReason::Stop,
        usage: Usage {
            prompt_tokens: 3,
            completion_tokens: 1,
        },
        tokens: vec![SampledToken {
            bytes: "4".into(),
            id: Some(9),
            logprob: -0.25,
            top: vec![TopToken {
                id: None,
                bytes: vec![0xf0].into(),
                logprob: -0.5,
            }],
        }],
        provenance: 0,
    }
}

fn sequence_values(prompt_id: &str) -> SequenceValues {
    SequenceValues {
        prompt_id: prompt_id.to_owned(),
        sample_index: 0,
        tokens: 3,
        kl_nats: 0.5,
        nll_nats: 2.0,
        agree: 2,
        teacher_nll_nats: 1.5,
        teacher_entropy_nats: 1.25,
        confidence: vec![0.25, 0.9, 1.0],
        expected: vec![0.5, 0.875, 1.0],
    }
}

/// Creates the folder of a table and a manifest for it, as a stage does.
fn table_folder(run: &Path, table: &str) -> PathBuf {
    let folder = run.join(table);
    fs::create_dir_all(&folder).unwrap();
    let manifest = Manifest {
        stage: table.into(),
        schema: SCHEMA_VERSION,
        key: String::new(),
        settings: serde_json::Value::Null,
        inputs: BTreeMap::new(),
        files: BTreeMap::new(),
        counts: BTreeMap::new(),
        measures: BTreeMap::new(),
    };
    manifest.write(&folder).unwrap();
    folder
}
