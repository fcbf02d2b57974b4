//! A micro-batch as the step needs it: rows of ids, where loss is carried, and what is aimed at.

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use potstill_datasets::Signal;
use potstill_model::{Llama, documents};

use crate::error::Error;
use crate::target::{Target, TargetRow};

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
        documents(self.b, self.t, &self.lengths)
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

    /// The realised tokens of rows `start..end`, [n, 1].
    pub(crate) fn realised_n1(&self, start: usize, end: usize, device: &Device) -> Tensor<2, Int> {
        let realised = self.realised(start, end).to_vec();
        ints(realised, [end - start, 1], device)
    }

    /// The realised tokens of rows `start..end`.
    pub(crate) fn realised(&self, start: usize, end: usize) -> &[i32] {
        &self.realised[start..end]
    }

    /// Support [n, k] and log p [n, k+1] of rows `start..end`; k is the largest support there, −1 and
    /// a log p of −10⁴ fill the slots of smaller ones.
    pub(crate) fn target(
        &self,
        start: usize,
        end: usize,
        dtype: DType,
        device: &Device,
    ) -> (Tensor<2, Int>, Tensor<2>) {
        let rows = &self.targets[start..end];
        let n = rows.len();
        let k = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let mut ids = vec![-1; n * k];
        let mut log_p = vec![-1.0e4; n * (k + 1)];
        for (i, row) in rows.iter().enumerate() {
            for (slot, (&id, &mass)) in row.ids.iter().zip(&row.p).enumerate() {
                ids[i * k + slot] = id as i32;
                if mass > 0.0 {
                    log_p[i * (k + 1) + slot] = mass.ln();
                }
            }
            log_p[i * (k + 1) + k] = row.tail.ln();
        }
        let floats =
            |values| Tensor::<2>::from_data(TensorData::new(values, [n, k + 1]), (device, dtype));
        (ints(ids, [n, k], device), floats(log_p))
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
