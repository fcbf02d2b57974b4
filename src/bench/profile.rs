//! Where the time of a step goes: whole steps, and each part of them alone at the model's shapes.

use std::time::Instant;

use anyhow::Context as _;
use potstill_model::{Config, Device, Module, device};
use potstill_student::loss::Tail;
use potstill_student::{AdamW, Arm, Block, Target, clip_global_norm, window_gradient};

use super::child::{open, settings, signal, wait};
use super::ops::ops;
use super::request::{Reply, Request};

/// Steps, of which the fastest counts.
const STEPS: usize = 3;

/// Seconds of a whole step and of its parts.
///
/// # Errors
/// As a step of training.
pub(crate) fn profile(request: &Request) -> anyhow::Result<Reply> {
    let device = device(&request.device)?;
    let config = Config::from_dir(&request.model)?;
    let [step, clip, update, forward] = steps(request, &device)?;
    let n = request.ids.first().map_or(0, Vec::len);
    let ops = ops(&config, n, request.top_k, &device)?;
    let known = clip + update + ops.iter().map(|(_, seconds)| seconds).sum::<f64>();
    let mut parts = vec![("the whole step".to_owned(), step)];
    parts.extend(ops);
    parts.push(("clipping".to_owned(), clip));
    parts.push(("AdamW".to_owned(), update));
    let rest = "the rest: embedding, residual sums, sums of gradients, what the graph costs";
    parts.push((rest.to_owned(), step - known));
    parts.push((
        "(forward pass of the layers, of the above)".to_owned(),
        forward,
    ));
    let seconds = parts.first().map(|(_, seconds)| *seconds);
    Ok(Reply {
        seconds: seconds.into_iter().collect(),
        parts,
        ..Reply::default()
    })
}

/// Whole steps: seconds of all, of clipping, of the optimizer, and of the layers' forward pass; of
/// each the fastest.
fn steps(request: &Request, device: &Device) -> anyhow::Result<[f64; 4]> {
    let (model, _) = open(request)?;
    let (signal, settings) = (signal(request), settings(request));
    let (target, _) = Target::new(&signal, Tail::Bucket, 1.0)?;
    let block = Block::new(&[&signal], vec![target], &model)?;
    let signals = [signal];
    let mut optimizer = AdamW::new(request.weight_decay);
    let mut model = Some(model.train());
    let mut fastest = [f64::INFINITY; 4];
    // One more, which finds no moments and fresh memory.
    for _ in 0..=STEPS {
        let tracked = model.take().context("a step before this one failed")?;
        let mut clock = Clock::start();
        let result = window_gradient(&tracked, &signals, Arm::Student, &settings, 1)?;
        wait(device)?;
        let gradient = clock.lap();
        let (_, scale) = clip_global_norm(&result.gradients, request.clip);
        wait(device)?;
        let clip = clock.lap();
        let moved = optimizer.step(tracked, result.gradients, scale, request.learning_rate);
        wait(device)?;
        let update = clock.lap();
        let hidden = block.hidden(&moved);
        wait(device)?;
        let forward = clock.lap();
        drop(hidden);
        let seconds = [gradient + clip + update, clip, update, forward];
        for (fastest, seconds) in fastest.iter_mut().zip(seconds) {
            *fastest = fastest.min(seconds);
        }
        model = Some(moved);
    }
    Ok(fastest)
}

/// Time between two looks at it.
struct Clock(Instant);

impl Clock {
    fn start() -> Clock {
        Clock(Instant::now())
    }

    fn lap(&mut self) -> f64 {
        let began = std::mem::replace(&mut self.0, Instant::now());
        (self.0 - began).as_secs_f64()
    }
}
