//! Checks a custom divergence of a dozen lines, then trains a student with it and another one with
//! forward KL, on signals of the quickstart's teacher.
//!
//!     cargo run --release --example custom_loss

// An example program prints its results.
#![allow(clippy::print_stdout)]

use std::ops::ControlFlow;
use std::path::Path;

use potstill::datasets::{Signal, Table};
use potstill::model::{Config, DType, Decoder, Device, Tensor};
use potstill::student::check::{LossCase, check_loss, trainer};
use potstill::student::loss::{CustomDivergence, Divergence};
use potstill::student::{
    Arm, Objective, SignalKind, TrainSettings, TrainingInputs, TrainingPlan, evaluate, train,
};
use potstill::{Context, RunOptions, stages};

/// Computes the triangular discrimination Σ (p − q)² / (p + q) of each row (Le Cam 1986). Its value is close
/// to forward KL near q = p, and at most 2. `log_p_nk` and `log_q_nk` are [n, k+1]: one column for each token
/// of the support and one for the tail. burn's autodiff computes the gradient.
fn triangular(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    let (p_nk, q_nk) = (log_p_nk.exp(), log_q_nk.exp());
    let gap_nk = p_nk.clone() - q_nk.clone();
    // An empty slot has p = q = 0; the bound avoids 0 / 0.
    let mass_nk = (p_nk + q_nk).clamp_min(1e-30);
    (gap_nk.powi_scalar(2) / mass_nk).sum_dim(1).squeeze_dim(1)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let custom = Divergence::Custom(CustomDivergence {
        name: "triangular".to_owned(),
        function: Some(triangular),
    });

    // Check that the trainer's gradient is that of the function.
    let case = LossCase::random(1.0, &Device::flex())?;
    for check in check_loss(&Objective::of(custom.clone()), &case, &trainer)? {
        let verdict = if check.passed() { "ok" } else { "FAILED" };
        println!("{verdict:<8}{:.1e}  {}", check.difference, check.comparison);
    }

    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let out = std::env::temp_dir().join(format!("custom_loss-{}", std::process::id()));
    let mut signals = signals(&here.join("quickstart.toml"), &out.join("run"))?;
    let heldout = signals.split_off(signals.len() * 4 / 5);
    println!(
        "{} answers to train on, {} held out",
        signals.len(),
        heldout.len()
    );
    for divergence in [custom, Divergence::ForwardKl] {
        let name = divergence.name().to_owned();
        let settings = TrainSettings {
            steps: Some(200),
            batch: 16,
            micro_batch: 16,
            objective: Objective::of(divergence),
            chunk_rows: 4096,
            ..TrainSettings::default()
        };
        let start = student(&here.join("quickstart/teacher"))?;
        let before = kl(&start, &heldout)?;
        let mut row = |i: usize| Ok(signals[i].clone());
        let trained = train(
            start,
            TrainingInputs {
                len: signals.len(),
                row: &mut row,
                lengths: None,
                dev: None,
                collective: None,
                on_step: &mut |_| ControlFlow::Continue(()),
            },
            &TrainingPlan {
                arm: Arm::Student,
                settings: &settings,
                schedule: settings.schedule(signals.len(), 3e-3),
            },
            &out.join(&name),
        )?;
        let after = kl(&trained.model(), &heldout)?;
        println!(
            "{name}: held-out KL {before:.3} before, {after:.3} after {} steps",
            trained.step
        );
    }
    std::fs::remove_dir_all(&out)?;
    Ok(())
}

/// Collects signals of the quickstart's teacher on 300 problems.
fn signals(file: &Path, run_dir: &Path) -> Result<Vec<Signal>, Box<dyn std::error::Error>> {
    let options = RunOptions {
        run_dir: Some(run_dir.to_path_buf()),
        limit: Some(300),
        ..RunOptions::default()
    };
    let context = Context::open(file, &options)?;
    stages::import::import(&context)?;
    stages::collect::collect(&context)?;
    let mut table = Table::<Signal>::open(&run_dir.join("signals"))?;
    let rows: Vec<usize> = table.footers().map(|footer| footer.rows).collect();
    let mut signals = Vec::new();
    for (shard, rows) in (0..).zip(rows) {
        for row in 0..rows as u32 {
            signals.push(table.get(shard, row)?);
        }
    }
    signals.retain(|signal| !signal.rows.is_empty());
    Ok(signals)
}

/// Initialises a student with random weights, a fifth of the teacher's size and its vocabulary.
fn student(teacher: &Path) -> Result<Decoder, Box<dyn std::error::Error>> {
    let config = Config::from_dir(teacher)?.with_keys([
        ("hidden_size", 64.into()),
        ("intermediate_size", 128.into()),
        ("num_hidden_layers", 4.into()),
        ("num_attention_heads", 2.into()),
        ("num_key_value_heads", 1.into()),
        ("head_dim", 32.into()),
    ])?;
    Ok(Decoder::init(&config, 17, DType::F32, &Device::flex())?)
}

/// Computes the mean forward KL in nats per token.
fn kl(model: &Decoder, heldout: &[Signal]) -> Result<f64, Box<dyn std::error::Error>> {
    let mut row = |i: usize| Ok(heldout[i].clone());
    let mut progress = |_| ControlFlow::Continue(());
    let kind = SignalKind::Distributions;
    let values = evaluate(model, &mut row, heldout.len(), kind, 4096, &mut progress)?;
    let (mut sum, mut tokens) = (0.0, 0);
    for sequence in values.unwrap_or_default() {
        sum += sequence.kl_nats;
        tokens += sequence.tokens;
    }
    Ok(sum / f64::from(tokens.max(1)))
}
