//! `docs/parquet.md` lists exactly the columns there are, and a run's folders are left for other readers to open.

use std::collections::BTreeMap;
use std::path::Path;

use arrow::datatypes::{DataType, Field};
use potstill_datasets::{
    Completion, Dropped, Failed, FinishReason, Message, Prompt, Record, Role, SampledToken,
    Selected, SequenceValues, Signal, TaskSample, ToolCall, TopToken, Usage, Verdict, shard_name,
    write_shard,
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
    let text = std::fs::read_to_string(path).unwrap();
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
        columns::<Failed>(),
        columns::<SequenceValues>(),
        columns::<Verdict>(),
        columns::<TaskSample>(),
    ]);
    assert_eq!(documented, expected);
}

/// Leaves a run in the target directory (`tmp/parquet`) for `scripts/check_parquet.py`.
#[test]
fn a_run_for_other_readers() {
    let run = Path::new(env!("CARGO_TARGET_TMPDIR")).join("parquet");
    let write_all = || {
        let tool_call = ToolCall {
            id: None,
            name: "f".into(),
            arguments: "{}".into(),
        };
        let mut assistant = Message::text(Role::Assistant, "");
        assistant.tool_calls = vec![tool_call.clone()];
        let messages = vec![
            Message::text(Role::User, "2 + 2?"),
            assistant,
            Message::text(Role::Tool, "4"),
        ];
        let prompts = [Prompt::new(
            messages,
            None,
            Some("4".into()),
            "train.jsonl:1".into(),
        )];
        let top = vec![TopToken {
            id: None,
            bytes: vec![0xf0].into(),
            logprob: -0.5,
        }];
        let completion = |sample_index| Completion {
            prompt_id: prompts[0].id.clone(),
            sample_index,
            reasoning: (sample_index == 0).then(|| "hm".into()),
            answer: "4".into(),
            tool_calls: vec![tool_call.clone()],
            finish_reason: FinishReason::Stop,
            usage: Usage {
                prompt_tokens: 3,
                completion_tokens: 1,
            },
            tokens: vec![SampledToken {
                bytes: "4".into(),
                id: Some(9),
                logprob: -0.25,
                top: top.clone(),
            }],
            provenance: 0,
        };
        let completions: Vec<_> = (0..70).map(completion).collect();
        let mut signals = records::signals(70, 20, 64);
        for row in signals.iter_mut().flat_map(|signal| &mut signal.rows) {
            (row.draw_ids, row.draw_counts) = (vec![1000, 1001], vec![7, 1]);
        }
        let whole = &mut signals[0].rows[0];
        whole.tail_logprob = f32::NEG_INFINITY;
        (whole.draw_ids, whole.draw_counts) = (vec![], vec![]);
        signals[0]
            .rows
            .iter_mut()
            .for_each(|row| row.log_z_at = vec![None]);
        let chosen = Selected {
            shard: 0,
            row: 1,
            prompt_id: prompts[0].id.clone(),
            sample_index: 1,
        };
        let left = Dropped {
            prompt_id: prompts[0].id.clone(),
            sample_index: 2,
            reason: "length".into(),
        };
        let values = SequenceValues {
            prompt_id: prompts[0].id.clone(),
            sample_index: 0,
            tokens: 3,
            kl_nats: 0.5,
            nll_nats: 2.0,
            agree: 2,
            teacher_nll_nats: 1.5,
            bin_tokens: vec![0, 0, 1, 0, 0, 0, 0, 0, 0, 2],
            bin_confidence: vec![0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.9],
            bin_correct: vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
        };
        let verdict = Verdict {
            prompt_id: prompts[0].id.clone(),
            sample_index: 0,
            grader: "number".into(),
            correct: true,
            extracted: Some("4".into()),
        };
        let task_sample = TaskSample {
            prompt_id: prompts[0].id.clone(),
            reasoning: None,
            answer: "5".into(),
            extracted: Some("5".into()),
            correct: false,
            finished: true,
            tokens: 2,
        };
        let (sources, name) = (records::provenances(), shard_name(0));
        write_shard(&folder(&run, "prompts").join(&name), &prompts, &[])?;
        write_shard(
            &folder(&run, "completions").join(&name),
            &completions[..64],
            &sources,
        )?;
        write_shard(
            &folder(&run, "completions").join(shard_name(1)),
            &completions[64..],
            &sources,
        )?;
        write_shard(&folder(&run, "signals").join(&name), &signals, &sources)?;
        write_shard(
            &folder(&run, "train").join(&name),
            std::slice::from_ref(&chosen),
            &[],
        )?;
        write_shard(&folder(&run, "heldout").join(&name), &[chosen], &[])?;
        write_shard(&folder(&run, "dropped").join(&name), &[left], &[])?;
        write_shard(&folder(&run, "verdicts").join(&name), &[verdict], &[])?;
        write_shard(
            &folder(&run, "students/student/eval/gsm8k").join("samples.parquet"),
            &[task_sample],
            &[],
        )?;
        write_shard(
            &folder(&run, "students/student/eval/heldout").join("samples.parquet"),
            &[values],
            &[],
        )
    };
    write_all().unwrap();
}

fn folder(run: &Path, name: &str) -> std::path::PathBuf {
    let path = run.join(name);
    std::fs::create_dir_all(&path).unwrap();
    path
}
