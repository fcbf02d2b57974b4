//! The unigram: one distribution over the vocabulary for every position, in closed form. A student that is not closer
//! to the teacher has learned nothing about the context.

use std::ops::ControlFlow;

use potstill_datasets::{Error as DataError, SequenceValues, Signal};
use potstill_kernels::TAIL_FLOOR_NATS;

use crate::error::Error;
use crate::evaluate::SignalKind;
use crate::loss::Tail;
use crate::target::teacher_nll;
use crate::target::{Target, TargetRow};

/// One distribution over the vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct Unigram {
    /// Probability of each token id; they sum to 1.
    p: Vec<f64>,
    /// The most likely token, the lowest id among equals.
    top1: u32,
}

impl Unigram {
    /// Fits the unigram to the loss positions of `row(0..len)`: to distributions, of which it is the mean, with the
    /// tail mass of a position spread evenly over the tokens outside its support; to text, by the frequencies of the
    /// target tokens, with one added to each count (Laplace).
    ///
    /// # Errors
    /// An error of `row`; a signal that breaks its rules; [`Error::Vocabulary`] for an id that is not below `vocab`.
    pub fn fit(
        row: &mut dyn FnMut(usize) -> Result<Signal, DataError>,
        len: usize,
        vocab: usize,
        kind: SignalKind,
    ) -> Result<Self, Error> {
        let mut mass = vec![0.0; vocab];
        // Mass of every token, so that a position's tail need not be added to each token outside its support.
        let mut everywhere = match kind {
            SignalKind::Distributions => 0.0,
            SignalKind::Text => 1.0,
        };
        let mut add = |id: u32, amount: f64| match mass.get_mut(id as usize) {
            Some(mass) => {
                *mass += amount;
                Ok(())
            }
            None => Err(Error::Vocabulary { id, vocab }),
        };
        for index in 0..len {
            let signal = row(index)?;
            if kind == SignalKind::Text {
                for position in signal.loss_positions() {
                    add(signal.token_ids[position], 1.0)?;
                }
                continue;
            }
            let (target, _) = Target::new(&signal, Tail::Bucket, 1.0)?;
            for TargetRow { ids, p, tail, .. } in &target.rows {
                let outside = vocab.saturating_sub(ids.len());
                let each = if outside > 0 {
                    tail / outside as f64
                } else {
                    0.0
                };
                everywhere += each;
                for (&id, &p) in ids.iter().zip(p) {
                    add(id, p - each)?;
                }
            }
        }
        // Rounding can leave a token of every support slightly below 0.
        let p = mass.into_iter().map(|mass| (mass + everywhere).max(0.0));
        Ok(Self::normalized(p.collect()))
    }

    fn normalized(mut p: Vec<f64>) -> Self {
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        let top1 = (0..p.len()).fold(0, |best, id| if p[id] > p[best] { id } else { best });
        Self {
            p,
            top1: top1 as u32,
        }
    }

    /// Probability of each token id.
    #[must_use]
    pub fn probabilities(&self) -> &[f64] {
        &self.p
    }

    /// Measures the unigram on `row(0..len)` as [`evaluate`](crate::evaluate) measures a model. `on_row` is called with the
    /// number of sequences done; when it breaks, the result is `None`.
    ///
    /// # Errors
    /// As [`Self::fit`].
    pub fn evaluate(
        &self,
        row: &mut dyn FnMut(usize) -> Result<Signal, DataError>,
        len: usize,
        kind: SignalKind,
        on_row: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<SequenceValues>>, Error> {
        let mut values = Vec::with_capacity(len);
        for index in 0..len {
            values.push(self.sequence(&row(index)?, kind)?);
            if on_row(index + 1).is_break() && index + 1 < len {
                return Ok(None);
            }
        }
        Ok(Some(values))
    }

    fn sequence(&self, signal: &Signal, kind: SignalKind) -> Result<SequenceValues, Error> {
        let vocab = self.p.len();
        let q = |id: u32| match self.p.get(id as usize) {
            Some(q) => Ok(*q),
            None => Err(Error::Vocabulary { id, vocab }),
        };
        let (target, _) = Target::new(signal, Tail::Bucket, 1.0)?;
        let mut values = SequenceValues {
            prompt_id: signal.prompt_id.clone(),
            sample_index: signal.sample_index,
            tokens: signal.rows.len() as u32,
            kl_nats: 0.0,
            nll_nats: 0.0,
            agree: 0,
            teacher_nll_nats: teacher_nll(signal),
            teacher_entropy_nats: signal.rows.rows().map(|row| f64::from(row.entropy)).sum(),
            confidence: Vec::with_capacity(signal.rows.len()),
            expected: Vec::with_capacity(signal.rows.len()),
        };
        for (position, row) in signal.loss_positions().zip(&target.rows) {
            let mut inside = 0.0;
            for (&id, &p) in row.ids.iter().zip(&row.p) {
                inside += q(id)?;
                values.kl_nats += nats(p, q(id)?);
            }
            values.kl_nats += nats(row.tail, 1.0 - inside);
            let token = signal.token_ids[position];
            values.nll_nats += nats(1.0, q(token)?);
            // The first token of a support is the teacher's most likely one.
            let (Some(&likeliest), Some(&expected)) = (row.ids.first(), row.p.first()) else {
                continue;
            };
            values.agree += u32::from(likeliest == self.top1);
            let (confidence, expected) = match kind {
                SignalKind::Distributions => (q(likeliest)?, expected),
                SignalKind::Text => (q(self.top1)?, f64::from(u8::from(token == self.top1))),
            };
            values.confidence.push(confidence as f32);
            values.expected.push(expected as f32);
        }
        Ok(values)
    }
}

/// Computes p ln(p/q), where q is at least the smallest tail mass of a target.
fn nats(p: f64, q: f64) -> f64 {
    if p > 0.0 {
        p * (p / q.max(TAIL_FLOOR_NATS.exp())).ln()
    } else {
        0.0
    }
}
