use super::*;

fn measured(seconds: &[f64], products: &[f64], megabytes: u64) -> Measured {
    Measured {
        threads: 2,
        seconds: seconds.to_vec(),
        products: products.to_vec(),
        check: vec![9.4, 0.7],
        above_bytes: Some(megabytes * 1_000_000),
        peak_bytes: Some(2_000_000_000),
        before_bytes: Some(700_000_000),
        ..Measured::default()
    }
}

fn loss(sides: Vec<(How, Cell)>) -> Contest {
    Contest {
        part: "loss",
        what: "so many states, and so on".to_owned(),
        work: Work::Loss,
        dtype: Float::F32,
        tokens: 512,
        shape: LossShape {
            rows: 2000,
            width: 500,
            vocab: 50_000,
            chunk_rows: 250,
        },
        sides,
    }
}

fn all() -> Contest {
    let pass = |name: &str, seconds: f64| (name.to_owned(), seconds);
    let ours = Measured {
        parts: vec![
            pass("statistics", 0.01),
            pass("gradient", 0.02),
            pass("copy", 0.016),
        ],
        ..measured(&[2.5, 3.0], &[2.25, 2.5], 50)
    };
    let eager = Measured {
        note: "gradient by hand".to_owned(),
        parts: vec![pass("copy", 0.01)],
        ..measured(&[5.0], &[3.0], 800)
    };
    let compiled = measured(&[3.0, 4.0], &[2.0, 2.0], 400);
    let liger = measured(&[6.0], &[5.0], 100);
    loss(vec![
        (How::Fused, Ok(ours)),
        (How::Eager, Ok(eager)),
        (How::Compile, Ok(compiled)),
        (How::LigerJsd, Ok(liger)),
        (How::LigerKl, Err("no module | liger".to_owned())),
    ])
}

#[test]
fn the_faster_form_of_pytorch_is_what_counts() {
    let verdict = all().verdict().unwrap();
    let expected = Verdict {
        other: How::Compile,
        whole: [1.2, 3.5 / 2.75],
        outside: [0.25, 0.375 / 1.5],
        memory: Some(0.125),
    };
    assert_eq!(verdict, expected);
    assert_eq!(loss(Vec::new()).verdict(), None);
}

#[test]
fn tables_read_well() {
    let mut step = all();
    (step.part, step.work) = ("step-plain", Work::Step);
    step.sides.truncate(2);
    step.sides[1].0 = How::Plain;
    insta::assert_snapshot!(all().markdown() + &step.markdown());
}

#[test]
fn a_side_that_computed_something_else_is_told() {
    let mut contest = all();
    if let Some((_, Ok(compiled))) = contest.sides.get_mut(2) {
        compiled.check = vec![9.4, 0.8];
    }
    let said = contest.disagreements();
    let expected = "loss f32, PyTorch, compiled: 9.40000, 0.70000 and 9.40000, 0.80000";
    assert_eq!(said, [expected]);
    let value = contest.json();
    assert_eq!(value["sides"][1]["same"], true);
    assert_eq!(value["sides"][2]["same"], false);
    assert_eq!(value["sides"][3]["same"], Value::Null);
    assert_eq!(value["sides"][3]["product_operations"], 4.0e11);
    assert_eq!(value["against"]["memory"], 0.125);
}
