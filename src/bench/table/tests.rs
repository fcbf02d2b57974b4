use super::*;

fn measured(threads: usize, seconds: &[f64], check: &[f64]) -> Measured {
    Measured {
        threads,
        seconds: seconds.to_vec(),
        check: check.to_vec(),
        others: vec![0.01; seconds.len()],
        before_bytes: Some(700_000_000),
        peak_bytes: Some(2_000_000_000),
        engine: "potstill".to_owned(),
        ..Measured::default()
    }
}

fn row(potstill: Cell, torch: Option<Cell>) -> Row {
    Row {
        part: "step",
        what: "512 tokens, and so on".to_owned(),
        work: Work::Step,
        dtype: Float::F32,
        tokens: 512,
        potstill,
        torch,
    }
}

fn table(rows: Vec<Row>) -> Table {
    Table {
        head: vec!["Potstill".to_owned(), "a machine".to_owned()],
        rows,
        ..Table::default()
    }
}

#[test]
fn a_table_reads_well() {
    let ours = measured(2, &[2.0, 4.0], &[9.31545, 9.1]);
    let mut theirs = measured(1, &[4.0, 5.0], &[9.31546, 9.1, 8.9]);
    theirs.others = vec![0.2];
    let mut both = table(vec![
        row(Ok(ours.clone()), Some(Ok(theirs))),
        Row {
            dtype: Float::Bf16,
            ..row(Err("no bf16 | here".to_owned()), Some(Ok(ours.clone())))
        },
    ]);
    both.notes.push("A note.".to_owned());
    both.profile = Some(Ok(Measured {
        parts: vec![
            ("the whole step".to_owned(), 2.0),
            ("attention".to_owned(), 0.5),
        ],
        ..ours.clone()
    }));
    let grown = |tokens, peak_bytes| Growth {
        tokens,
        potstill: Ok(Measured {
            peak_bytes: Some(peak_bytes),
            ..ours.clone()
        }),
    };
    both.growth = vec![
        grown(512, 1_000_000_000),
        grown(1024, 1_512_000_000),
        grown(2048, 2_536_000_000),
    ];
    insta::assert_snapshot!(both.markdown());
}

#[test]
fn without_a_peer_there_is_no_ratio_and_nothing_to_agree_on() {
    let alone = table(vec![row(Ok(measured(2, &[2.0], &[9.3])), None)]);
    let text = alone.markdown();
    assert!(
        text.contains("| step | f32 | 256 (256), 2 threads | not measured |  |  |"),
        "{text}"
    );
    assert_eq!(alone.disagreements(), Vec::<String>::new());
    assert!(!text.contains("not quiet"), "{text}");
}

#[test]
fn a_difference_is_told() {
    let pair = |ours: &[f64], theirs: &[f64]| {
        let rows = vec![row(
            Ok(measured(1, &[1.0], ours)),
            Some(Ok(measured(1, &[1.0], theirs))),
        )];
        table(rows).disagreements()
    };
    assert_eq!(pair(&[9.3], &[9.3009]), Vec::<String>::new());
    let said = pair(&[9.3, 9.2], &[9.3, 9.22]);
    assert_eq!(said, ["step f32: 9.30000, 9.20000 and 9.30000, 9.22000"]);
    assert_eq!(pair(&[f64::NAN, 9.2], &[9.3, 9.2]).len(), 1);
    assert_eq!(pair(&[], &[]).len(), 1);
}

#[test]
fn answers_agree_by_their_tokens() {
    let of = |ours: &[f64], theirs: &[f64]| agree(Work::Decode, Float::F32, ours, theirs);
    assert_eq!(
        of(&[1.0, 2.0], &[1.0, 2.0]),
        Ok("100.0 % of the tokens".to_owned())
    );
    assert!(of(&[1.0, 2.0, 3.0], &[1.0, 5.0, 6.0]).is_err());
    assert!(of(&[1.0, 2.0], &[1.0]).is_err());
}

#[test]
fn json_has_rates_ratios_and_failures() {
    let ours = measured(2, &[2.0, 4.0], &[9.3]);
    let rows = vec![row(Ok(ours), Some(Err("no torch".to_owned())))];
    let value: Value = serde_json::from_str(&table(rows).json()).unwrap();
    let row = &value["rows"][0];
    assert_eq!(row["potstill"]["tokens_per_second"], 256.0);
    assert_eq!(row["torch"]["failed"], "no torch");
    assert_eq!((&row["ratio"], &row["same"]), (&Value::Null, &Value::Null));
    assert_eq!(value["disturbed"], 0);
}
