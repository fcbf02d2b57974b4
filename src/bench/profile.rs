//! Where the time of a step goes: whole steps, and each part of them alone at the model's shapes.

use std::time::Instant;

use anyhow::Context as _;
use potstill_model::{Module, device};
use potstill_student::{
    AdamW, Block, Method, Target, Weights, clip_global_norm, hidden_gradient, window_gradient,
};

use super::child::{CHUNK_ROWS, open, settings, signal, wait};
use super::request::{Reply, Request};

/// Steps, of which the fastest counts.
const STEPS: usize = 3;

/// Seconds of a whole step and of its parts.
///
/// # Errors
/// As a step of training.
pub(crate) fn profile(request: &Request) -> anyhow::Result<Reply> {
    let phases = phases(request)?;
    let parts = phases;
    let seconds = parts.first().map(|(_, seconds)| *seconds);
    Ok(Reply {
        seconds: seconds.into_iter().collect(),
        parts,
        ..Reply::default()
    })
}

/// Whole steps by their phases, the fastest of each phase.
fn phases(request: &Request) -> anyhow::Result<Vec<(String, f64)>> {
    let device = device(&request.device)?;
    let (model, _) = open(request)?;
    let (signals, settings) = ([signal(request)], settings(request));
    let (target, _) = Target::tail_bucket(&signals[0])?;
    let block = Block::new(&[&signals[0]], vec![target], &model)?;
    let weights = Weights {
        forward_kl: 1.0 / block.rows().max(1) as f64,
        cross_entropy: 0.0,
    };
    let mut optimizer = AdamW::new(request.weight_decay);
    let mut model = Some(model.train());
    let mut fastest = [f64::INFINITY; 6];
    for _ in 0..=STEPS {
        let tracked = model.take().context("a step before this one failed")?;
        let mut clock = Clock::start();
        let result = window_gradient(&tracked, &signals, Method::Distill, &settings, 1)?;
        wait(&device)?;
        let gradient = clock.lap();
        let (_, scale) = clip_global_norm(&result.gradients, request.clip);
        wait(&device)?;
        let clip = clock.lap();
        let moved = optimizer.step(tracked, result.gradients, scale, request.learning_rate);
        wait(&device)?;
        let update = clock.lap();
        let hidden_nd = block.hidden(&moved);
        wait(&device)?;
        let forward = clock.lap();
        let left = hidden_gradient(&hidden_nd, &moved.head(), &block, weights, CHUNK_ROWS);
        drop(left);
        wait(&device)?;
        let loss = clock.lap();
        let whole = gradient + clip + update;
        let backward = gradient - forward - loss;
        let seconds = [whole, forward, loss, backward, clip, update];
        for (fastest, seconds) in fastest.iter_mut().zip(seconds) {
            *fastest = fastest.min(seconds);
        }
        drop(hidden_nd);
        model = Some(moved);
    }
    let names = [
        "the whole step",
        "layers, forward",
        "head and loss, both ways",
        "layers, backward",
        "clipping",
        "AdamW",
    ];
    Ok(names.map(str::to_owned).into_iter().zip(fastest).collect())
}

/// Time between two looks at it.
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock(Instant::now())
    }

    pub(crate) fn lap(&mut self) -> f64 {
        let began = std::mem::replace(&mut self.0, Instant::now());
        (self.0 - began).as_secs_f64()
    }
}
