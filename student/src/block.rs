//! A micro-batch as the step needs it: rows of ids, where loss is carried, and what is aimed at.

use std::ops::Range;

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use potstill_datasets::Signal;
use potstill_kernels::{EMPTY_NATS, RowStats};
use potstill_model::{Llama, document_lengths};

use crate::error::Error;
use crate::target::{Target, TargetRow};

/// What rows aim at, as tensors.
#[derive(Debug, Clone)]
pub(crate) struct Targets {
    /// Ids, [n, k], or [n, k+1] with the realised token in the last slot where a row's k do not hold it.
    pub(crate) support_nk: Tensor<2, Int>,
    /// log p on the first k of them, and of the tail: [n, k+1].
    pub(crate) log_p_nk: Tensor<2>,
    /// The support's slot of the realised token, [n, 1].
    pub(crate) realised_n1: Tensor<2, Int>,
    /// Entropy of the teacher's whole distribution, nats.
    pub(crate) entropy_n: Tensor<1>,
    /// Whether the support has the slot for realised tokens.
    pub(crate) extra: bool,
}

impl Targets {
    /// Those of some of the rows.
    pub(crate) fn slice(&self, rows: Range<usize>) -> Self {
        Self {
            support_nk: self.support_nk.clone().slice(rows.clone()),
            log_p_nk: self.log_p_nk.clone().slice(rows.clone()),
            realised_n1: self.realised_n1.clone().slice(rows.clone()),
            entropy_n: self.entropy_n.clone().slice(rows),
            extra: self.extra,
        }
    }

    /// log q of the realised tokens, [n, 1], from statistics over the support.
    pub(crate) fn log_q_realised_n1(&self, stats: &RowStats) -> Tensor<2> {
        stats.log_q_nk().gather(1, self.realised_n1.clone())
    }

    /// log q on the buckets of `log_p_nk`: a realised token outside of them is part of the tail.
    pub(crate) fn log_q_nk(&self, stats: &RowStats) -> Tensor<2> {
        let log_q_nk = stats.log_q_nk();
        if !self.extra {
            return log_q_nk;
        }
        let k = log_q_nk.dims()[1] - 2;
        let tails = log_q_nk.clone().narrow(1, k, 2);
        let largest_n1 = tails.clone().detach().max_dim(1);
        let tail_n1 = (tails - largest_n1.clone()).exp().sum_dim(1).log() + largest_n1;
        Tensor::cat(vec![log_q_nk.narrow(1, 0, k), tail_n1], 1)
    }
}

/// Sequences, one or several behind one another in each of b lines of t tokens, padded on the right;
/// their loss positions are the rows, in order.
///
/// Padding is known by position, so any id may stand there; right of the text it changes nothing
/// in a causal model. Sequences of a line do not see one another.
#[derive(Debug, Clone)]
pub struct Block {
    b: usize,
    t: usize,
    /// Lengths of each line's sequences, in tokens.
    lengths: Vec<Vec<usize>>,
    ids: Vec<i32>,
    /// Index into the flattened [b·t] positions of the state that predicts each row.
    predicts_from: Vec<i32>,
    /// The token each row should have predicted.
    realised: Vec<i32>,
    targets: Vec<TargetRow>,
}

impl Block {
    /// One sequence a line: from signals and the distributions to aim at, one target a signal with as
    /// many rows as the signal has loss positions.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] for an id that the model has no embedding for.
    pub fn new(signals: &[&Signal], targets: Vec<Target>, model: &Llama) -> Result<Self, Error> {
        let sequences = signals.iter().copied().zip(targets);
        Self::packed(sequences.map(|sequence| vec![sequence]).collect(), model)
    }

    /// From lines of sequences, each a signal and its target. Rows come in the order of the lines.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn packed(lines: Vec<Vec<(&Signal, Target)>>, model: &Llama) -> Result<Self, Error> {
        let vocab = model.config().vocab_size;
        let id = |id: u32| match i32::try_from(id) {
            Ok(checked) if (id as usize) < vocab => Ok(checked),
            _ => Err(Error::Vocabulary { id, vocab }),
        };
        let length = |(signal, _): &(&Signal, Target)| signal.token_ids.len();
        let lengths: Vec<Vec<usize>> = lines
            .iter()
            .map(|line| line.iter().map(length).collect())
            .collect();
        let t = lengths.iter().map(|line| line.iter().sum()).max();
        let (b, t) = (lines.len(), t.unwrap_or(0));
        let mut block = Self {
            b,
            t,
            lengths,
            ids: Vec::with_capacity(b * t),
            predicts_from: Vec::new(),
            realised: Vec::new(),
            targets: Vec::new(),
        };
        for (row, line) in lines.into_iter().enumerate() {
            for (signal, target) in line {
                let start = block.ids.len();
                for &token in &signal.token_ids {
                    block.ids.push(id(token)?);
                }
                for position in signal.loss_positions() {
                    // A sequence's first token carries no loss, so this stays within the sequence.
                    block.predicts_from.push((start + position - 1) as i32);
                    block.realised.push(id(signal.token_ids[position])?);
                }
                block.targets.extend(target.rows);
            }
            block.ids.resize((row + 1) * t, 0);
        }
        for &token in block.targets.iter().flat_map(|row| &row.ids) {
            id(token)?;
        }
        Ok(block)
    }

    /// Hidden states of all positions, `[n, d]` with n = b · t.
    #[must_use]
    pub fn hidden(&self, model: &Llama) -> Tensor<2> {
        model.hidden_from(
            model.embedded(self.ids_bt(&model.device())),
            &self.documents(),
        )
    }

    /// Lengths of what lies behind one another in the block, padding counted; together b · t.
    #[must_use]
    pub fn documents(&self) -> Vec<usize> {
        document_lengths(self.b, self.t, &self.lengths)
    }

    /// Rows: positions that carry loss.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.predicts_from.len()
    }

    /// Padded token ids, row by row.
    pub(crate) fn ids(&self) -> Vec<usize> {
        self.ids.iter().map(|id| *id as usize).collect()
    }

    /// Padded token ids, [b, t].
    #[must_use]
    pub fn ids_bt(&self, device: &Device) -> Tensor<2, Int> {
        ints(self.ids.clone(), [self.b, self.t], device)
    }

    /// The states that predict the rows: `[b · t, d]` → `[rows, d]`.
    #[must_use]
    pub fn select(&self, hidden_nd: Tensor<2>) -> Tensor<2> {
        let index = self.predicts_from_n(&hidden_nd.device());
        hidden_nd.select(0, index)
    }

    /// The transpose of [`Self::select`]: `[rows, d]` → `[b · t, d]`, zero at all other positions.
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

    /// The realised tokens of rows `start..end`.
    pub(crate) fn realised(&self, start: usize, end: usize) -> &[i32] {
        &self.realised[start..end]
    }

    /// What rows `start..end` aim at. k is the largest support there; slots of smaller ones are empty.
    pub(crate) fn targets(
        &self,
        start: usize,
        end: usize,
        dtype: DType,
        device: &Device,
    ) -> Targets {
        let rows = &self.targets[start..end];
        let realised = &self.realised[start..end];
        let n = rows.len();
        let k = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let slot = |row: &TargetRow, token: i32| row.ids.iter().position(|id| *id as i32 == token);
        let slots: Vec<Option<usize>> = rows
            .iter()
            .zip(realised)
            .map(|(r, t)| slot(r, *t))
            .collect();
        // Supports hold the realised token, except those that were moved from another position.
        let extra = usize::from(k == 0 || slots.iter().any(Option::is_none));
        let width = k + extra;
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
                ids[i * width + k] = realised[i];
            }
        }
        let realised = slots.iter().map(|slot| slot.unwrap_or(k) as i32);
        let entropy: Vec<f64> = rows.iter().map(|row| row.entropy).collect();
        let at = (device, dtype);
        Targets {
            support_nk: ints(ids, [n, width], device),
            log_p_nk: Tensor::from_data(TensorData::new(log_p, [n, k + 1]), at),
            realised_n1: ints(realised.collect(), [n, 1], device),
            entropy_n: Tensor::from_data(TensorData::new(entropy, [n]), at),
            extra: extra == 1,
        }
    }

    /// The likeliest token of each target row of `start..end`.
    pub(crate) fn likeliest(&self, start: usize, end: usize) -> impl Iterator<Item = u32> {
        self.targets[start..end].iter().map(|row| {
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
