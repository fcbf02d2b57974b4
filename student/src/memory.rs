//! The memory that a training takes, predicted from the configuration of the model and the settings.
//!
//! A training is largest in a step, or where the weights are loaded, or where the model is measured on dev or several
//! replicas bring their states together for a checkpoint, which is itself written tensor by tensor. A step has two
//! moments at which memory can be largest: when the first rows of logits exist, all activations of a
//! micro-batch are kept; and in the backward pass, the activations of a layer go while the gradients of its weights come.
//! Both are computed here, the second one for each layer, and the larger is the peak.

use potstill_datasets::SequenceLength;
use potstill_kernels::BLOCK;
use potstill_model::{ActivationColumns, Config, ParameterName, Role, parameter_shapes};
use serde::Serialize;

use crate::adapter::{AdapterBase, AdapterSettings, AdapterTargets};
use crate::head_loss::Form;
use crate::optimizer::FEW_NUMBERS;
use crate::optimizer_settings::{MomentType, OptimizerKind};
use crate::precision::Precision;
use crate::settings::TrainSettings;
use crate::trainable::fits;

/// Bytes of an f32.
const F32_BYTES: u64 = 4;
/// Batches that are in memory on the host: the one that is computed, and those that are read ahead.
const BATCHES_AHEAD: u64 = 3;

/// The surroundings of a training that its memory depends on, besides its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySurroundings {
    /// Replicas of the model that share the memory: on a CPU all replicas, on a GPU one.
    pub replicas: usize,
    /// Largest number of tokens of a stored distribution.
    pub support: usize,
    /// Whether the memory is the host's, so that copies on the host count.
    pub is_host: bool,
    /// Bytes of the program itself: its code, tokenizer and tables.
    pub program: u64,
}

/// Bytes of each part of a training's memory at the moment of its peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct TrainingMemory {
    /// Weights in the type that the model computes in, frozen ones and adapters included.
    pub weights: u64,
    /// f32 masters of what is trained, if the model computes in another type, and the running mean of `ema`.
    pub masters: u64,
    /// Gradients of what is trained: of the micro-batch, and sums over micro-batches.
    pub gradients: u64,
    /// State of the optimizer.
    pub moments: u64,
    /// Numbers that the forward pass keeps for the backward pass, and those of the layer that is computed.
    pub activations: u64,
    /// Logits of `chunk_rows` rows, and targets and gradients of the loss.
    pub logits: u64,
    /// Batches on the host.
    pub loader: u64,
    /// The program itself.
    pub program: u64,
}

impl TrainingMemory {
    /// Names and bytes of the parts, in the order of display.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, u64); 8] {
        [
            ("weights", self.weights),
            ("masters", self.masters),
            ("gradients", self.gradients),
            ("moments", self.moments),
            ("activations", self.activations),
            ("logits", self.logits),
            ("loader", self.loader),
            ("program", self.program),
        ]
    }

    /// Sum of all parts: the peak.
    #[must_use]
    pub fn peak(&self) -> u64 {
        let parts = self.parts().into_iter();
        parts.fold(0, |sum, (_, bytes)| sum.saturating_add(bytes))
    }

    /// Predicts the peak of a training on sequences of these lengths.
    #[must_use]
    pub fn predict(
        config: &Config,
        settings: &TrainSettings,
        lengths: &[SequenceLength],
        surroundings: &MemorySurroundings,
    ) -> Self {
        let numbers = TrainedNumbers::of(config, settings);
        let shape = StepShape::largest(lengths, settings);
        let fixed = fixed(settings, &numbers, &shape, surroundings);
        let step = Step {
            settings,
            numbers: &numbers,
            shape: &shape,
            columns: &config.activation_columns(),
            d: config.hidden_size as u64,
            v: config.vocab_size as u64,
            support: surroundings.support as u64,
            is_tied: config.tie_word_embeddings,
        };
        let moments = step.moments();
        let largest = moments.into_iter().max_by_key(TrainingMemory::peak);
        let largest = largest.unwrap_or_default();
        // Each replica computes with tensors of its own.
        let replicas = surroundings.replicas.max(1) as u64;
        let step = Self {
            gradients: largest.gradients.saturating_mul(replicas),
            activations: largest.activations.saturating_mul(replicas),
            logits: largest.logits.saturating_mul(replicas),
            ..fixed
        };
        let start = Self {
            weights: numbers.start,
            program: surroundings.program,
            ..Self::default()
        };
        let checkpoint = numbers.checkpoint(settings, surroundings, fixed);
        let moments = [step, start, checkpoint].into_iter();
        moments.max_by_key(TrainingMemory::peak).unwrap_or(step)
    }
}

/// Numbers of parameters by what happens to them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrainedNumbers {
    /// Numbers of the model without adapters.
    pub all: u64,
    /// Numbers that are trained.
    pub trained: u64,
    /// Numbers of the adapters.
    pub adapter: u64,
    /// Bytes of all weights.
    pub weights: u64,
    /// Bytes of all weights while they are loaded: in f32 or in blocks.
    start: u64,
    /// Numbers that are kept in blocks.
    in_blocks: u64,
    /// Bytes of the optimizer's state.
    pub moments: u64,
    /// Trained numbers of each layer.
    layers: Vec<u64>,
    /// Ranks of the adapters of each layer, summed.
    ranks: Vec<u64>,
    /// Trained numbers of the head, or of the embedding if the two are tied.
    head: u64,
    /// Trained numbers of an embedding that is not the head.
    embedding: u64,
}

impl TrainedNumbers {
    /// Counts the parameters of a training of a model of this configuration.
    #[must_use]
    pub fn of(config: &Config, settings: &TrainSettings) -> Self {
        let layers = config.num_hidden_layers();
        let mut numbers = Self {
            layers: vec![0; layers],
            ranks: vec![0; layers],
            ..Self::default()
        };
        for (parameter, shape) in parameter_shapes(config) {
            let layer = layer_of(&parameter.name);
            numbers.add(config, settings, &parameter, &shape, layer);
            if let (Some(adapter), [outputs, inputs]) = (&settings.adapter, shape.as_slice())
                && let Some(rank) = adapter_rank(adapter, &parameter)
            {
                let rank = rank as u64;
                for side in [*inputs as u64, *outputs as u64] {
                    numbers.adapter += rank * side;
                    numbers.train(settings, rank * side, Role::Adapter, layer);
                    numbers.weights += rank * side * element_bytes(settings);
                }
                if let Some(ranks) = layer.and_then(|layer| numbers.ranks.get_mut(layer)) {
                    *ranks += rank;
                }
            }
        }
        numbers
    }

    /// The memory at a checkpoint. To be measured on dev, a model in another type has its frozen weights in f32 once more.
    /// The states of several replicas are copied to rank 0 as bytes, and are read there.
    fn checkpoint(
        &self,
        settings: &TrainSettings,
        surroundings: &MemorySurroundings,
        fixed: TrainingMemory,
    ) -> TrainingMemory {
        let frozen = (self.all + self.adapter).saturating_sub(self.trained + self.in_blocks);
        let masters = match settings.precision {
            Precision::Bf16 if settings.measures_dev() => frozen * F32_BYTES,
            _ => 0,
        };
        let copies = match surroundings.is_host && surroundings.replicas > 1 {
            true => 2,
            false => 0,
        };
        TrainingMemory {
            masters: fixed.masters * (1 + copies) + masters,
            moments: fixed.moments * (1 + copies),
            ..fixed
        }
    }

    fn add(
        &mut self,
        config: &Config,
        settings: &TrainSettings,
        parameter: &ParameterName,
        shape: &[usize],
        layer: Option<usize>,
    ) {
        let count: u64 = shape.iter().map(|side| *side as u64).product();
        self.all += count;
        let (bytes, start) = match base_block(settings, parameter, shape) {
            Some((numbers, bytes)) => (count / numbers * bytes, count / numbers * bytes),
            None if parameter.role == Role::Correction => (count * F32_BYTES, count * F32_BYTES),
            None => (count * element_bytes(settings), count * F32_BYTES),
        };
        if base_block(settings, parameter, shape).is_some() {
            self.in_blocks += count;
        }
        self.weights += bytes;
        self.start += start;
        if settings.adapter.is_some() || !is_trained(settings, parameter) {
            return;
        }
        self.train(settings, count, parameter.role, layer);
        match parameter.role {
            Role::Head => self.head = count,
            Role::Embedding if config.tie_word_embeddings => self.head = count,
            Role::Embedding => self.embedding = count,
            _ => {}
        }
    }

    fn train(&mut self, settings: &TrainSettings, count: u64, role: Role, layer: Option<usize>) {
        self.trained += count;
        self.moments += moment_bytes(settings, count, role);
        if let Some(trained) = layer.and_then(|layer| self.layers.get_mut(layer)) {
            *trained += count;
        }
    }
}

/// Bytes of the optimizer's state of a parameter.
fn moment_bytes(settings: &TrainSettings, count: u64, role: Role) -> u64 {
    let is_matrix = role == Role::Projection;
    if settings.optimizer == OptimizerKind::Muon && is_matrix {
        return count * F32_BYTES;
    }
    2 * match settings.moments {
        MomentType::F32 => count * F32_BYTES,
        MomentType::Bf16 => count * 2,
        MomentType::Int8 if count < FEW_NUMBERS as u64 => count * F32_BYTES,
        MomentType::Int8 => count + count.div_ceil(BLOCK as u64) * F32_BYTES,
    }
}

/// Bytes of a number of the type that the model computes in.
fn element_bytes(settings: &TrainSettings) -> u64 {
    settings.precision.dtype().size() as u64
}

/// Numbers and bytes of a block, if the frozen weights of adapters are kept in blocks and this is one of them.
fn base_block(
    settings: &TrainSettings,
    parameter: &ParameterName,
    shape: &[usize],
) -> Option<(u64, u64)> {
    let base = settings.adapter.as_ref()?.base?;
    let is_linear = can_have_adapter(parameter) && shape.len() == 2;
    is_linear.then_some(match base {
        AdapterBase::Q8_0 => (32, 34),
        AdapterBase::Q4_0 => (32, 18),
        AdapterBase::Q4K => (256, 144),
    })
}

/// Whether a parameter of the model is trained, if there is no adapter.
fn is_trained(settings: &TrainSettings, parameter: &ParameterName) -> bool {
    !matches!(parameter.role, Role::Router | Role::Correction)
        && !(settings.freeze.iter()).any(|pattern| fits(pattern, &parameter.name))
}

/// Whether a weight can have an adapter: it is of a linear layer, and not of an expert.
fn can_have_adapter(parameter: &ParameterName) -> bool {
    parameter.role == Role::Projection && !parameter.name.contains(".experts.")
}

/// Rank of the adapter of a weight; `None` if it has none.
fn adapter_rank(adapter: &AdapterSettings, parameter: &ParameterName) -> Option<usize> {
    let module = parameter.name.strip_suffix(".weight")?;
    let is_named = |name: &str| module == name || module.ends_with(&format!(".{name}"));
    let has_adapter = can_have_adapter(parameter)
        && match &adapter.targets {
            AdapterTargets::All(_) => true,
            AdapterTargets::Named(names) => names.iter().any(|name| is_named(name)),
        };
    let mut patterns = adapter.rank_pattern.iter();
    let of_pattern = patterns.find(|(name, _)| is_named(name));
    has_adapter.then(|| of_pattern.map_or(adapter.rank, |(_, rank)| *rank))
}

/// Returns the number of the layer that a parameter belongs to.
fn layer_of(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("model.layers.")?;
    rest.split_once('.')?.0.parse().ok()
}

/// Shape of the largest micro-batch, and of its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct StepShape {
    /// Positions of the micro-batch, padding included.
    positions: u64,
    /// Loss positions of the micro-batch.
    loss_rows: u64,
    /// Loss positions of a batch.
    batch_loss_rows: u64,
    /// Tokens of a batch.
    batch_tokens: u64,
    /// Number of micro-batches of a batch.
    micro_batches: u64,
}

impl StepShape {
    /// Takes the longest sequences together, since in a random order some micro-batch has the longest, and all rows of a
    /// micro-batch are padded to it.
    fn largest(lengths: &[SequenceLength], settings: &TrainSettings) -> Self {
        // Tokens and loss positions; all positions from the first with loss are taken to have loss.
        let cut = |length: &SequenceLength| {
            let tokens = length.tokens.min(settings.max_length);
            let first = length.first_loss.unwrap_or(tokens);
            (tokens, tokens.saturating_sub(first))
        };
        let is_usable = |length: &&SequenceLength| {
            length.tokens <= settings.max_length
                || settings.overlong == crate::settings::Overlong::Cut
        };
        let mut lengths: Vec<(usize, usize)> = lengths.iter().filter(is_usable).map(cut).collect();
        lengths.sort_by_key(|(tokens, _)| std::cmp::Reverse(*tokens));
        let Some((longest, _)) = lengths.first().copied() else {
            return Self::default();
        };
        let count = lengths.len() as f64;
        let mean = |sum: usize| sum as f64 / count;
        let tokens = mean(lengths.iter().map(|(tokens, _)| tokens).sum());
        let loss = mean(lengths.iter().map(|(_, loss)| loss).sum());
        let batch = settings.batch.max(1);
        let (rows, width) = match settings.packing {
            false => (batch, longest),
            true => {
                let room = settings.max_length.max(longest);
                let in_row = (room as f64 / tokens.max(1.0)).floor().max(1.0);
                let rows = (batch as f64 / in_row).ceil() as usize;
                (rows, room.min((batch as f64 * tokens).ceil() as usize))
            }
        };
        let micro_batch = settings.micro_batch.clamp(1, rows);
        let positions = (micro_batch * width) as u64;
        let loss_rows = match settings.packing {
            false => lengths.iter().take(micro_batch).map(|(_, loss)| loss).sum(),
            true => (positions as f64 * loss / tokens.max(1.0)) as usize,
        };
        Self {
            positions,
            loss_rows: loss_rows as u64,
            batch_loss_rows: (loss * batch as f64) as u64,
            batch_tokens: (tokens * batch as f64) as u64,
            micro_batches: rows.div_ceil(micro_batch) as u64,
        }
    }
}

/// Computes the parts that do not change within a step.
fn fixed(
    settings: &TrainSettings,
    numbers: &TrainedNumbers,
    shape: &StepShape,
    surroundings: &MemorySurroundings,
) -> TrainingMemory {
    let replicas = surroundings.replicas.max(1) as u64;
    let has_masters = settings.precision != Precision::F32;
    let copies = u64::from(has_masters) + u64::from(settings.ema.is_some());
    let support = surroundings.support as u64;
    // A stored distribution, and the target that is made of it, with the headers of their lists.
    let row = support * (4 + 4) + 160 + support * (4 + 8) + 80;
    let batch = shape.batch_loss_rows * row + shape.batch_tokens * 9;
    TrainingMemory {
        weights: numbers.weights * replicas,
        masters: numbers.trained * F32_BYTES * copies,
        moments: numbers.moments,
        loader: batch * BATCHES_AHEAD,
        program: surroundings.program,
        ..TrainingMemory::default()
    }
}

/// The figures from which the moments of a step are computed.
struct Step<'a> {
    settings: &'a TrainSettings,
    numbers: &'a TrainedNumbers,
    shape: &'a StepShape,
    columns: &'a [ActivationColumns],
    d: u64,
    v: u64,
    support: u64,
    is_tied: bool,
}

impl Step<'_> {
    /// The moments at which memory can be largest: the first logits, and the backward pass of each layer.
    fn moments(&self) -> Vec<TrainingMemory> {
        let layers = self.first()..self.columns.len();
        let backward = layers.map(|layer| self.backward(layer));
        [self.logits()].into_iter().chain(backward).collect()
    }

    /// Gradients that exist before the backward pass reaches the last layer: the sums over earlier micro-batches, to which
    /// those of this one are added, or in the first micro-batch the head's alone.
    fn gradient_sums(&self) -> u64 {
        F32_BYTES
            * match self.shape.micro_batches > 1 {
                true => self.numbers.trained,
                false => self.numbers.head,
            }
    }

    /// Bytes that a layer keeps.
    fn kept(&self, layer: usize) -> u64 {
        let columns = &self.columns[layer];
        let ranks = self.numbers.ranks.get(layer).copied().unwrap_or(0);
        let element = element_bytes(self.settings);
        let each = (columns.kept as u64 + ranks) * element + columns.kept_f32 as u64 * F32_BYTES;
        self.shape.positions * each
    }

    /// Bytes that a layer keeps until its backward pass begins: its input alone if the rest is computed again, and nothing
    /// if no gradient has to reach the layer.
    fn kept_until_backward(&self, layer: usize) -> u64 {
        match self.settings.recompute {
            _ if layer < self.first() => 0,
            true => self.shape.positions * self.d * F32_BYTES,
            false => self.kept(layer),
        }
    }

    /// The first layer that a gradient has to reach.
    fn first(&self) -> usize {
        let is_embedding_trained =
            self.numbers.embedding > 0 || (self.is_tied && self.numbers.head > 0);
        let trained = self.numbers.layers.iter().position(|trained| *trained > 0);
        match is_embedding_trained {
            true => 0,
            false => trained.unwrap_or(self.columns.len()),
        }
    }

    fn logits(&self) -> TrainingMemory {
        let StepShape {
            positions,
            loss_rows,
            ..
        } = *self.shape;
        let element = element_bytes(self.settings);
        let kept: u64 = (0..self.columns.len())
            .map(|l| self.kept_until_backward(l))
            .sum();
        let heads = match self.settings.objective.temperature == 1.0 {
            true => 1,
            false => 2,
        };
        let block = match self.settings.form {
            Form::Fused => {
                loss_rows.min(self.settings.chunk_rows as u64) * self.v * element * heads
            }
            // Logits in two types, their gradient, and what autodiff keeps of the softmax.
            Form::Plain => loss_rows * self.v * (element + 4 * F32_BYTES * heads),
        };
        // Support, log-probabilities and statistics of each row.
        let targets = loss_rows * (self.support + 1) * 5 * F32_BYTES;
        // The states that predict loss positions, and their gradients.
        let states = 3 * loss_rows * self.d * element;
        TrainingMemory {
            gradients: self.gradient_sums(),
            // The input and the output of the final norm.
            activations: kept + positions * self.d * (F32_BYTES + element),
            logits: block + targets + states,
            ..TrainingMemory::default()
        }
    }

    fn backward(&self, layer: usize) -> TrainingMemory {
        let element = element_bytes(self.settings);
        let positions = self.shape.positions;
        let earlier: u64 = (0..layer).map(|l| self.kept_until_backward(l)).sum();
        // The residual stream and its gradients are in f32.
        let columns = self.columns[layer].backward as u64 * element + self.d * 3 * F32_BYTES;
        // A layer's gradients are added to the sums once the layer's backward pass is done.
        let own = self.numbers.layers[layer] * element;
        let done: u64 = match self.shape.micro_batches > 1 {
            true => 0,
            false => self.numbers.layers[layer + 1..].iter().sum(),
        };
        TrainingMemory {
            gradients: self.gradient_sums() + done * F32_BYTES + own,
            activations: earlier + self.kept(layer) + positions * columns,
            ..TrainingMemory::default()
        }
    }
}
