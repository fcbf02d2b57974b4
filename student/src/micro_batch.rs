//! A micro-batch: packed rows of token ids, the loss positions in them, and the targets at these positions.

use std::ops::Range;

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use potstill_datasets::Signal;
use potstill_kernels::{EMPTY_NATS, RowStats};
use potstill_model::{Decoder, document_lengths};

use crate::error::Error;
use crate::target::{Target, TargetRow};

/// The targets of some loss positions, as tensors.
#[derive(Debug, Clone)]
pub(crate) struct TargetTensors {
    /// Support token ids, [n, k], or [n, k+1] if `has_target_slot`: a row whose support lacks the target
    /// token then has it in the last slot.
    pub(crate) support_nk: Tensor<2, Int>,
    /// Teacher's log p on the first k slots, and of the tail in the last column: [n, k+1].
    pub(crate) log_p_nk: Tensor<2>,
    /// Slot of the target token in the support, [n, 1].
    pub(crate) target_slot_n1: Tensor<2, Int>,
    /// Entropy of the teacher's whole distribution, nats.
    pub(crate) entropy_n: Tensor<1>,
    /// Whether the support has an additional slot for target tokens.
    pub(crate) has_target_slot: bool,
}

impl TargetTensors {
    /// Returns the targets of a range of rows.
    pub(crate) fn slice(&self, rows: Range<usize>) -> Self {
        Self {
            support_nk: self.support_nk.clone().slice(rows.clone()),
            log_p_nk: self.log_p_nk.clone().slice(rows.clone()),
            target_slot_n1: self.target_slot_n1.clone().slice(rows.clone()),
            entropy_n: self.entropy_n.clone().slice(rows),
            has_target_slot: self.has_target_slot,
        }
    }

    /// Returns log q of the target tokens, [n, 1], from statistics over the support.
    pub(crate) fn log_q_target_n1(&self, stats: &RowStats) -> Tensor<2> {
        stats.log_q_nk().gather(1, self.target_slot_n1.clone())
    }

    /// Returns log q on the buckets of `log_p_nk`. A target token in the additional slot counts as part of
    /// the tail.
    pub(crate) fn log_q_nk(&self, stats: &RowStats) -> Tensor<2> {
        let log_q_nk = stats.log_q_nk();
        if !self.has_target_slot {
            return log_q_nk;
        }
        let k = log_q_nk.dims()[1] - 2;
        let tails = log_q_nk.clone().narrow(1, k, 2);
        let largest_n1 = tails.clone().detach().max_dim(1);
        let tail_n1 = (tails - largest_n1.clone()).exp().sum_dim(1).log() + largest_n1;
        Tensor::cat(vec![log_q_nk.narrow(1, 0, k), tail_n1], 1)
    }
}

/// Sequences in b packed rows of t tokens, padded on the right. The loss positions of all packed rows, in
/// order, are the n rows of the loss.
///
/// Padding is known by position, so its token id is arbitrary; to the right of the text, padding changes
/// nothing in a causal model. Sequences that share a packed row do not attend to each other.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    b: usize,
    t: usize,
    /// Lengths of each packed row's sequences, in tokens.
    lengths: Vec<Vec<usize>>,
    ids: Vec<i32>,
    /// Index into the flattened [b·t] positions of the state that predicts each loss position.
    predicts_from: Vec<i32>,
    /// Target token of each loss position.
    target_tokens: Vec<i32>,
    targets: Vec<TargetRow>,
}

impl MicroBatch {
    /// Creates a micro-batch with one sequence in each row. `targets` has one entry for each signal, with as
    /// many rows as the signal has loss positions. `vocab` is the number of the model's [tokens](Decoder::token_count).
    ///
    /// # Errors
    /// [`Error::Vocabulary`] for an id that is not below `vocab`.
    pub fn new(signals: &[&Signal], targets: Vec<Target>, vocab: usize) -> Result<Self, Error> {
        let sequences = signals.iter().copied().zip(targets);
        Self::packed(sequences.map(|sequence| vec![sequence]).collect(), vocab)
    }

    /// Creates a micro-batch from packed rows of sequences, each a signal with its target. Loss positions
    /// keep the order of the packed rows.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn packed(packed_rows: Vec<Vec<(&Signal, Target)>>, vocab: usize) -> Result<Self, Error> {
        let id = |id: u32| match i32::try_from(id) {
            Ok(checked) if (id as usize) < vocab => Ok(checked),
            _ => Err(Error::Vocabulary { id, vocab }),
        };
        let length = |(signal, _): &(&Signal, Target)| signal.token_ids.len();
        let lengths: Vec<Vec<usize>> = packed_rows
            .iter()
            .map(|sequences| sequences.iter().map(length).collect())
            .collect();
        let t = lengths.iter().map(|row| row.iter().sum()).max();
        let (b, t) = (packed_rows.len(), t.unwrap_or(0));
        let mut micro_batch = Self {
            b,
            t,
            lengths,
            ids: Vec::with_capacity(b * t),
            predicts_from: Vec::new(),
            target_tokens: Vec::new(),
            targets: Vec::new(),
        };
        for (row, sequences) in packed_rows.into_iter().enumerate() {
            for (signal, target) in sequences {
                let start = micro_batch.ids.len();
                for &token in &signal.token_ids {
                    micro_batch.ids.push(id(token)?);
                }
                for position in signal.loss_positions() {
                    // A sequence's first token carries no loss, so this index stays within the sequence.
                    micro_batch
                        .predicts_from
                        .push((start + position - 1) as i32);
                    let target_token = id(signal.token_ids[position])?;
                    micro_batch.target_tokens.push(target_token);
                }
                micro_batch.targets.extend(target.rows);
            }
            micro_batch.ids.resize((row + 1) * t, 0);
        }
        for &token in micro_batch.targets.iter().flat_map(|row| &row.ids) {
            id(token)?;
        }
        Ok(micro_batch)
    }

    /// Computes the hidden states of all positions, `[n, d]` with n = b · t.
    #[must_use]
    pub fn hidden(&self, model: &Decoder) -> Tensor<2> {
        model.hidden_from(
            model.embedded(self.ids_bt(&model.device())),
            &self.documents(),
        )
    }

    /// Lengths of the sequences and of the padding, in order; their sum is b · t.
    #[must_use]
    pub fn documents(&self) -> Vec<usize> {
        document_lengths(self.b, self.t, &self.lengths)
    }

    /// Number of loss positions.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.predicts_from.len()
    }

    /// Padded token ids, flattened.
    pub(crate) fn ids(&self) -> Vec<usize> {
        self.ids.iter().map(|id| *id as usize).collect()
    }

    /// Padded token ids, [b, t].
    #[must_use]
    pub fn ids_bt(&self, device: &Device) -> Tensor<2, Int> {
        ints(self.ids.clone(), [self.b, self.t], device)
    }

    /// Selects the states that predict the loss positions: `[b · t, d]` → `[rows, d]`.
    #[must_use]
    pub fn select(&self, hidden_nd: Tensor<2>) -> Tensor<2> {
        let index = self.predicts_from_n(&hidden_nd.device());
        hidden_nd.select(0, index)
    }

    /// Computes the transpose of [`Self::select`]: `[rows, d]` → `[b · t, d]`, zero at all other positions.
    pub(crate) fn scatter(&self, rows_nd: Tensor<2>, shape: [usize; 2]) -> Tensor<2> {
        let device = rows_nd.device();
        let zeros = Tensor::<2>::zeros(shape, (&device, rows_nd.dtype()));
        let index = self.predicts_from_n(&device);
        zeros.select_assign(0, index, rows_nd, IndexingUpdateOp::Add)
    }

    fn predicts_from_n(&self, device: &Device) -> Tensor<1, Int> {
        let index = TensorData::new(self.predicts_from.clone(), [self.rows()]);
        Tensor::from_data(index, (device, DType::I32))
    }

    /// Target tokens of a range of loss positions.
    pub(crate) fn target_tokens(&self, rows: Range<usize>) -> &[i32] {
        &self.target_tokens[rows]
    }

    /// Targets of a range of loss positions as tensors. k is the size of the largest support in the range;
    /// smaller supports leave slots empty.
    pub(crate) fn targets(
        &self,
        rows: Range<usize>,
        dtype: DType,
        device: &Device,
    ) -> TargetTensors {
        let target_tokens = &self.target_tokens[rows.clone()];
        let rows = &self.targets[rows];
        let n = rows.len();
        let k = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let slot = |row: &TargetRow, token: i32| row.ids.iter().position(|id| *id as i32 == token);
        let slots: Vec<Option<usize>> = rows
            .iter()
            .zip(target_tokens)
            .map(|(row, token)| slot(row, *token))
            .collect();
        // Supports hold the target token, except those that were moved from another position.
        let has_target_slot = k == 0 || slots.iter().any(Option::is_none);
        let width = k + usize::from(has_target_slot);
        let mut ids = vec![-1; n * width];
        let mut log_p = vec![EMPTY_NATS; n * (k + 1)];
        let log = |mass: f64| mass.ln().max(EMPTY_NATS);
        for (i, row) in rows.iter().enumerate() {
            for (slot, (&id, &mass)) in row.ids.iter().zip(&row.p).enumerate() {
                ids[i * width + slot] = id as i32;
                log_p[i * (k + 1) + slot] = log(mass);
            }
            log_p[i * (k + 1) + k] = log(row.tail);
            if slots[i].is_none() {
                ids[i * width + k] = target_tokens[i];
            }
        }
        let target_slots = slots.iter().map(|slot| slot.unwrap_or(k) as i32);
        let entropy: Vec<f64> = rows.iter().map(|row| row.entropy).collect();
        let at = (device, dtype);
        TargetTensors {
            support_nk: ints(ids, [n, width], device),
            log_p_nk: Tensor::from_data(TensorData::new(log_p, [n, k + 1]), at),
            target_slot_n1: ints(target_slots.collect(), [n, 1], device),
            entropy_n: Tensor::from_data(TensorData::new(entropy, [n]), at),
            has_target_slot,
        }
    }

    /// The teacher's most likely token at each of a range of loss positions.
    pub(crate) fn teacher_top1(&self, rows: Range<usize>) -> impl Iterator<Item = u32> {
        self.targets[rows].iter().map(|row| {
            let best =
                row.p.iter().zip(&row.ids).fold(
                    (-1.0, 0),
                    |best, (&p, &id)| {
                        if p > best.0 { (p, id) } else { best }
                    },
                );
            best.1
        })
    }
}

fn ints(values: Vec<i32>, shape: [usize; 2], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::I32))
}
