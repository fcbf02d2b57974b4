//! Each operation of a step alone, at the model's shapes: seconds of a call, forward and backward, times
//! the number of its calls in a step.

use std::time::Instant;

use potstill::kernels::{
    AttentionOptions, GateActivation, LogQSum, LogitTransform, attention, gated, linear, rms_norm,
    rotary, row_gradient, row_stats,
};
use potstill::model::{Config, DType, Device, Int, Tensor, TensorData};

use super::inputs::{CHUNK_ROWS, wait};

/// Number of measured calls. The fastest counts, since a disturbed call says nothing about the operation.
const CALLS: usize = 3;

/// Seconds of an operation.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    forward: f64,
    backward: f64,
}

impl Cost {
    fn times(self, calls: usize) -> Cost {
        Cost {
            forward: self.forward * calls as f64,
            backward: self.backward * calls as f64,
        }
    }

    fn plus(self, other: Cost) -> Cost {
        Cost {
            forward: self.forward + other.forward,
            backward: self.backward + other.backward,
        }
    }

    fn both(self) -> f64 {
        self.forward + self.backward
    }
}

/// Measures the operations of a step on one text of `n` tokens, in f32; all positions but the first carry
/// loss. Gives the name and the seconds of each.
///
/// # Errors
/// When the device does not finish its work.
pub(crate) fn operations(
    config: &Config,
    n: usize,
    top_k: usize,
    device: &Device,
) -> anyhow::Result<Vec<(String, f64)>> {
    let shapes = ModelShapes { config, n, device };
    let mut parts: Vec<(&str, f64)> = Vec::new();
    let [forward, input, weight] = shapes.layers()?;
    parts.push(("linear layers, forward", forward));
    parts.push(("linear layers, gradient of the input", input));
    parts.push(("linear layers, gradient of the weight", weight));
    parts.push(("attention", shapes.attention()?.both()));
    parts.push(("norms", shapes.norms()?.both()));
    parts.push(("rotary positions", shapes.rotary()?.both()));
    parts.push(("gated activations", shapes.gated()?.both()));
    let rows = n.saturating_sub(1);
    let (mut head, mut statistics) = ([0.0; 3], 0.0);
    for start in (0..rows).step_by(CHUNK_ROWS) {
        let chunk = CHUNK_ROWS.min(rows - start);
        let shape = [config.vocab_size, config.hidden_size];
        for (sum, seconds) in head.iter_mut().zip(shapes.products(chunk, shape)?) {
            *sum += seconds;
        }
        statistics += shapes.statistics(chunk, top_k)?.both();
    }
    let [forward, input, weight] = head;
    parts.push(("head, forward", forward));
    parts.push(("head, gradient of the states", input));
    parts.push(("head, gradient of the weight", weight));
    parts.push(("loss rows", statistics));
    let named = parts
        .into_iter()
        .map(|(name, seconds)| (name.to_owned(), seconds));
    Ok(named.collect())
}

struct ModelShapes<'a> {
    config: &'a Config,
    n: usize,
    device: &'a Device,
}

impl ModelShapes<'_> {
    /// Returns a size of the configuration, 0 if it is absent.
    fn size(&self, key: &str) -> usize {
        let size = self.config.keys().get(key).and_then(|size| size.as_u64());
        size.unwrap_or(0) as usize
    }

    fn head_dim(&self) -> usize {
        match self.size("head_dim") {
            0 => self.config.hidden_size / self.size("num_attention_heads").max(1),
            width => width,
        }
    }

    /// All linear layers except the head: forward, gradient of the input, gradient of the weight.
    fn layers(&self) -> anyhow::Result<[f64; 3]> {
        let c = self.config;
        let (d, wide) = (c.hidden_size, self.size("intermediate_size"));
        let queries = self.size("num_attention_heads") * self.head_dim();
        let keys = self.size("num_key_value_heads") * self.head_dim();
        let shapes = [
            ([queries, d], 1),
            ([keys, d], 2),
            ([d, queries], 1),
            ([wide, d], 2),
            ([d, wide], 1),
        ];
        let mut all = [0.0; 3];
        for (shape, calls) in shapes {
            let calls = (calls * self.config.num_hidden_layers()) as f64;
            for (sum, seconds) in all.iter_mut().zip(self.products(self.n, shape)?) {
                *sum += seconds * calls;
            }
        }
        Ok(all)
    }

    /// The three products of one linear layer on `n` rows.
    fn products(&self, n: usize, [out, width]: [usize; 2]) -> anyhow::Result<[f64; 3]> {
        let shapes = [[n, width], [out, width]];
        let product = |[x, weight]: [Tensor<2>; 2]| linear(x, weight);
        let input = self.cost(shapes, [true, false], product)?;
        let weight = self.cost(shapes, [false, true], product)?;
        let forward = input.forward.min(weight.forward);
        Ok([forward, input.backward, weight.backward])
    }

    fn attention(&self) -> anyhow::Result<Cost> {
        let keys = [self.n, self.size("num_key_value_heads") * self.head_dim()];
        let shapes = [
            [self.n, self.size("num_attention_heads") * self.head_dim()],
            keys,
            keys,
        ];
        let options = AttentionOptions {
            heads: self.size("num_attention_heads"),
            key_heads: self.size("num_key_value_heads"),
            scale: (self.head_dim() as f64).sqrt().recip(),
            softcap: None,
            window: None,
        };
        let mix = |[q, k, v]: [Tensor<2>; 3]| attention(q, k, v, None, &[self.n], &options);
        Ok(self
            .cost(shapes, [true; 3], mix)?
            .times(self.config.num_hidden_layers()))
    }

    fn norms(&self) -> anyhow::Result<Cost> {
        let norm = |[x, gain]: [Tensor<2>; 2]| rms_norm(x, gain.squeeze_dim(0), 1e-6, 0.0);
        let shapes = [
            [self.n, self.config.hidden_size],
            [1, self.config.hidden_size],
        ];
        let calls = 2 * self.config.num_hidden_layers() + 1;
        Ok(self.cost(shapes, [true; 2], norm)?.times(calls))
    }

    fn rotary(&self) -> anyhow::Result<Cost> {
        let angles = [self.n, self.head_dim() / 2];
        let turn = |[x, cos, sin]: [Tensor<2>; 3]| rotary(x, cos, sin, self.head_dim());
        let of = |heads: usize| {
            let shapes = [[self.n, heads * self.head_dim()], angles, angles];
            self.cost(shapes, [true, false, false], turn)
        };
        let layer =
            of(self.size("num_attention_heads"))?.plus(of(self.size("num_key_value_heads"))?);
        Ok(layer.times(self.config.num_hidden_layers()))
    }

    fn gated(&self) -> anyhow::Result<Cost> {
        let activation = |[gate, up]: [Tensor<2>; 2]| gated(gate, up, GateActivation::Silu);
        let shape = [self.n, self.size("intermediate_size")];
        let layer = self.cost([shape, shape], [true; 2], activation)?;
        Ok(layer.times(self.config.num_hidden_layers()))
    }

    /// The statistics of a chunk's logits on the teacher's support.
    fn statistics(&self, rows: usize, top_k: usize) -> anyhow::Result<Cost> {
        let v = self.config.vocab_size;
        let ids = (0..rows * top_k).map(|slot| (slot * 97 % v.max(1)) as i32);
        let data = TensorData::new(ids.collect::<Vec<i32>>(), [rows, top_k]);
        let support_nk = Tensor::<2, Int>::from_data(data, self.device);
        let head = LogitTransform::default();
        let mut least = Cost {
            forward: f64::INFINITY,
            backward: f64::INFINITY,
        };
        for _ in 0..=CALLS {
            let logits_nv = self.numbers([rows, v]);
            wait(self.device)?;
            let began = Instant::now();
            let stats = row_stats(
                logits_nv.clone(),
                support_nk.clone(),
                &head,
                LogQSum::Omitted,
            );
            wait(self.device)?;
            least.forward = least.forward.min(began.elapsed().as_secs_f64());
            let gradient = stats.all();
            let began = Instant::now();
            let gradient_nv = row_gradient(logits_nv, support_nk.clone(), &stats, gradient, &head);
            wait(self.device)?;
            least.backward = least.backward.min(began.elapsed().as_secs_f64());
            drop(gradient_nv);
        }
        Ok(least)
    }

    /// One call on inputs of these shapes; those that are `tracked` get a gradient.
    fn cost<const N: usize>(
        &self,
        shapes: [[usize; 2]; N],
        tracked: [bool; N],
        op: impl Fn([Tensor<2>; N]) -> Tensor<2>,
    ) -> anyhow::Result<Cost> {
        let inputs = shapes.map(|shape| self.numbers(shape));
        let mut least = Cost {
            forward: f64::INFINITY,
            backward: f64::INFINITY,
        };
        // The first call is slower: its memory is new, and the threads sleep.
        for _ in 0..=CALLS {
            let mut leaves = inputs.clone().map(Tensor::from_inner);
            for (leaf, tracked) in leaves.iter_mut().zip(tracked) {
                if tracked {
                    *leaf = leaf.clone().require_grad();
                }
            }
            wait(self.device)?;
            let began = Instant::now();
            let result = op(leaves);
            wait(self.device)?;
            let forward = began.elapsed().as_secs_f64();
            let began = Instant::now();
            let gradients = result.sum().backward();
            wait(self.device)?;
            let backward = began.elapsed().as_secs_f64();
            drop(gradients);
            least.forward = least.forward.min(forward);
            least.backward = least.backward.min(backward);
        }
        Ok(least)
    }

    /// Numbers between −0.5 and 0.5.
    fn numbers(&self, [rows, columns]: [usize; 2]) -> Tensor<2> {
        let value = |index: usize| (index * 31 % 1009) as f32 / 1009.0 - 0.5;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        let data = TensorData::new(values, [rows, columns]);
        Tensor::from_data(data, (self.device, DType::F32))
    }
}
