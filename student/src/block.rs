//! A micro-batch as the step needs it: padded ids, where loss is carried, and what is aimed at.

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use potstill_datasets::Signal;
use potstill_model::Llama;

use crate::error::Error;
use crate::target::{Target, TargetRow};

/// Sequences padded on the right, with their loss positions as rows in order.
///
/// Padding is known by position, so any id may stand there; right of the text it changes nothing
/// in a causal model.
#[derive(Debug, Clone)]
pub struct Block {
    b: usize,
    t: usize,
    ids: Vec<i32>,
    /// Index into the flattened [b·t] positions of the state that predicts each row.
    predicts_from: Vec<i32>,
    /// The token each row should have predicted.
    realised: Vec<i32>,
    targets: Vec<TargetRow>,
}

impl Block {
    /// From signals and the distributions to aim at, one target a signal with as many rows as the
    /// signal has loss positions.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] for an id that the model has no embedding for.
    pub fn new(signals: &[&Signal], targets: Vec<Target>, model: &Llama) -> Result<Self, Error> {
        let vocab = model.config().vocab_size;
        let b = signals.len();
        let t = signals.iter().map(|s| s.token_ids.len()).max().unwrap_or(0);
        let mut block = Self {
            b,
            t,
            ids: vec![0; b * t],
            predicts_from: Vec::new(),
            realised: Vec::new(),
            targets: targets.into_iter().flat_map(|target| target.rows).collect(),
        };
        let id = |id: u32| match i32::try_from(id) {
            Ok(checked) if (id as usize) < vocab => Ok(checked),
            _ => Err(Error::Vocabulary { id, vocab }),
        };
        for (row, signal) in signals.iter().enumerate() {
            for (position, &token) in signal.token_ids.iter().enumerate() {
                block.ids[row * t + position] = id(token)?;
            }
            for position in signal.loss_positions() {
                block.predicts_from.push((row * t + position - 1) as i32);
                block.realised.push(id(signal.token_ids[position])?);
            }
        }
        for &token in block.targets.iter().flat_map(|row| &row.ids) {
            id(token)?;
        }
        Ok(block)
    }

    /// Rows: positions that carry loss.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.predicts_from.len()
    }

    /// Padded token ids, [b, t].
    #[must_use]
    pub fn ids_bt(&self, device: &Device) -> Tensor<2, Int> {
        ints(self.ids.clone(), [self.b, self.t], device)
    }

    /// The states that predict the rows: [b, t, d] → [n, d].
    #[must_use]
    pub fn select(&self, hidden_btd: Tensor<3>) -> Tensor<2> {
        let [b, t, d] = hidden_btd.dims();
        let index_n = self.predicts_from_n(&hidden_btd.device());
        hidden_btd.reshape([b * t, d]).select(0, index_n)
    }

    /// The transpose of [`Self::select`]: [n, d] → [b, t, d], zero at all other positions.
    pub(crate) fn scatter(&self, rows_nd: Tensor<2>, [b, t, d]: [usize; 3]) -> Tensor<3> {
        let device = rows_nd.device();
        let zeros = Tensor::<2>::zeros([b * t, d], (&device, rows_nd.dtype()));
        let index_n = self.predicts_from_n(&device);
        zeros
            .select_assign(0, index_n, rows_nd, IndexingUpdateOp::Add)
            .reshape([b, t, d])
    }

    fn predicts_from_n(&self, device: &Device) -> Tensor<1, Int> {
        let index = TensorData::new(self.predicts_from.clone(), [self.rows()]);
        Tensor::from_data(index, (device, DType::I32))
    }

    /// The realised tokens of rows `start..end`, [n, 1].
    pub(crate) fn realised_n1(&self, start: usize, end: usize, device: &Device) -> Tensor<2, Int> {
        ints(self.realised[start..end].to_vec(), [end - start, 1], device)
    }

    /// Support [n, k], p and log p [n, k+1] of rows `start..end`; k is the largest support there,
    /// −1 and p = 0 fill the slots of smaller ones.
    pub(crate) fn target(
        &self,
        start: usize,
        end: usize,
        dtype: DType,
        device: &Device,
    ) -> (Tensor<2, Int>, Tensor<2>, Tensor<2>) {
        let rows = &self.targets[start..end];
        let n = rows.len();
        let k = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let mut ids = vec![-1; n * k];
        let mut p = vec![0.0; n * (k + 1)];
        let mut log_p = vec![0.0; n * (k + 1)];
        for (i, row) in rows.iter().enumerate() {
            for (slot, (&id, &mass)) in row.ids.iter().zip(&row.p).enumerate() {
                ids[i * k + slot] = id as i32;
                if mass > 0.0 {
                    p[i * (k + 1) + slot] = mass;
                    log_p[i * (k + 1) + slot] = mass.ln();
                }
            }
            p[i * (k + 1) + k] = row.tail;
            log_p[i * (k + 1) + k] = row.tail.ln();
        }
        let floats =
            |values| Tensor::<2>::from_data(TensorData::new(values, [n, k + 1]), (device, dtype));
        (ints(ids, [n, k], device), floats(p), floats(log_p))
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
