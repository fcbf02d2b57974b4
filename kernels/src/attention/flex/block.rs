//! Both passes over a block of rows of one head: its scores are computed in a buffer of the thread.

// The heads of a row are adjacent, so the outputs of two tasks are interleaved and are written through pointers.
#![allow(unsafe_code)]

use std::ops::Range;

use burn::backend::flex::FlexTensor;

use super::super::AttentionOptions;
use crate::exp::exp_bounded;
use crate::flex::{elements, shape2};
use crate::gemm::{Matrix, ScratchBuffer, SharedOutput, Threads, gemm, gemm_at};
use crate::simd::vectorize_closure;

/// Rows whose scores a thread holds at once.
const BLOCK: usize = 128;

/// A block of rows of a document, and the rows whose keys they see.
pub(super) struct RowBlock {
    rows: Range<usize>,
    keys: Range<usize>,
}

/// The rows of each document.
pub(super) fn document_ranges(documents: &[usize]) -> impl Iterator<Item = Range<usize>> {
    documents.iter().scan(0, |end, length| {
        *end += length;
        Some(*end - length..*end)
    })
}

pub(super) fn document_blocks(
    document: Range<usize>,
    window: Option<usize>,
) -> impl Iterator<Item = RowBlock> {
    document.clone().step_by(BLOCK).map(move |first| {
        let rows = first..document.end.min(first + BLOCK);
        let first_key = (first + 1).saturating_sub(window.unwrap_or(usize::MAX));
        RowBlock {
            keys: first_key.max(document.start)..rows.end,
            rows,
        }
    })
}

/// The inputs of both passes.
pub(super) struct AttentionInputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    sinks: &'a [f32],
    /// Width of a head of queries and keys.
    pub(super) key_width: usize,
    /// Width of a head of values.
    pub(super) value_width: usize,
    options: AttentionOptions,
}

/// Further inputs of the gradient: ∂L/∂o, and the results of the forward pass.
pub(super) struct GradientInputs<'a> {
    gradient: &'a [f32],
    output: &'a [f32],
    log_sums: &'a [f32],
}

impl<'a> GradientInputs<'a> {
    /// Asserts the shapes as [`AttentionInputs::new`] does.
    pub(super) fn new(
        [gradient, output, log_sums]: [&'a FlexTensor; 3],
        inputs: &AttentionInputs<'_>,
    ) -> Self {
        let heads = inputs.options.heads;
        let n = inputs.q.len() / (heads * inputs.key_width).max(1);
        for result in [gradient, output] {
            assert_eq!(
                shape2(result),
                [n, heads * inputs.value_width],
                "attention: the output and its gradient"
            );
        }
        assert_eq!(shape2(log_sums), [n, heads], "attention: the log-sums");
        Self {
            gradient: elements(gradient),
            output: elements(output),
            log_sums: elements(log_sums),
        }
    }
}

impl<'a> AttentionInputs<'a> {
    /// Asserts the shapes, which the code that writes through pointers relies on and the public trait does not check.
    pub(super) fn new(
        [q, k, v, sinks]: [&'a FlexTensor; 4],
        documents: &[usize],
        options: AttentionOptions,
    ) -> Self {
        let ([n, columns], [_, value_columns]) = (shape2(q), shape2(v));
        let key_width = columns / options.heads;
        let value_width = value_columns / options.key_heads;
        assert_eq!(documents.iter().sum::<usize>(), n, "attention: documents");
        assert_eq!(
            options.heads * key_width,
            columns,
            "attention: columns of the queries"
        );
        assert_eq!(
            [shape2(k), shape2(v)],
            [key_width, value_width].map(|width| [n, options.key_heads * width]),
            "attention: keys and values"
        );
        let sinks = elements(sinks);
        assert_eq!(sinks.len(), options.heads, "attention: sinks");
        Self {
            q: elements(q),
            k: elements(k),
            v: elements(v),
            sinks,
            key_width,
            value_width,
            options,
        }
    }

    /// Returns the columns of a query head in rows of the queries.
    fn queries(&self, rows: &Range<usize>, head: usize) -> Matrix<'a> {
        head_columns(self.q, rows, head, self.options.heads, self.key_width)
    }

    /// Returns the columns that a query head reads in rows of the keys.
    fn keys(&self, rows: &Range<usize>, head: usize) -> Matrix<'a> {
        let AttentionOptions {
            heads, key_heads, ..
        } = self.options;
        head_columns(
            self.k,
            rows,
            head / (heads / key_heads),
            key_heads,
            self.key_width,
        )
    }

    /// Returns the columns that a query head reads in rows of the values.
    fn values(&self, rows: &Range<usize>, head: usize) -> Matrix<'a> {
        let AttentionOptions {
            heads, key_heads, ..
        } = self.options;
        head_columns(
            self.v,
            rows,
            head / (heads / key_heads),
            key_heads,
            self.value_width,
        )
    }

    /// Writes q·k of a block, `[rows, keys]`, to `scores`.
    fn products(&self, scores: &mut [f32], block: &RowBlock, head: usize) {
        gemm(
            scores,
            block.keys.len(),
            self.queries(&block.rows, head),
            self.keys(&block.keys, head).transposed(),
            false,
            Threads::One,
        );
    }

    /// Returns the indices into `block.keys` of the keys that a row sees.
    fn seen_keys(&self, block: &RowBlock, row: usize) -> Range<usize> {
        let from = match self.options.window {
            Some(window) => (row + 1).saturating_sub(window).max(block.keys.start),
            None => block.keys.start,
        };
        from - block.keys.start..row + 1 - block.keys.start
    }

    /// Writes the output and log Z of a block of rows of a head.
    pub(super) fn forward(
        &self,
        block: &RowBlock,
        head: usize,
        output: SharedOutput,
        log_sums: SharedOutput,
    ) {
        let (heads, width) = (self.options.heads, self.value_width);
        let mut scores = ScratchBuffer::new(block.rows.len() * block.keys.len());
        self.products(&mut scores, block, head);
        let mut sums = vec![0.0f32; block.rows.len()];
        let rows = scores.chunks_mut(block.keys.len()).zip(block.rows.clone());
        for ((scores, row), sum) in rows.zip(&mut sums) {
            let seen = self.seen_keys(block, row);
            let (max, total) = vectorize_closure(
                #[inline(always)]
                || self.weights(scores, seen.clone(), self.sinks[head]),
            );
            *sum = total;
            // SAFETY: no other task writes this row and head.
            unsafe { *log_sums.at(row * heads + head) = max + total.ln() };
        }
        let stride = heads * width;
        let block_output = output.at(block.rows.start * stride + head * width);
        let weights = Matrix::new(&scores, block.rows.len(), block.keys.len());
        let values = self.values(&block.keys, head);
        // SAFETY: the head's columns of these rows are within the output, and no other task writes them.
        unsafe {
            gemm_at(block_output, stride, weights, values, false, Threads::One);
            for (row, sum) in sums.iter().enumerate() {
                let row = std::slice::from_raw_parts_mut(block_output.add(row * stride), width);
                vectorize_closure(
                    #[inline(always)]
                    || row.iter_mut().for_each(|x| *x /= sum),
                );
            }
        }
    }

    /// Replaces q·k of a row by exp(s − max) for the keys that the row sees and by 0 for the others; returns the maximum
    /// of the scores and the sink, and the sum with the sink's part.
    #[inline(always)]
    fn weights(&self, scores: &mut [f32], seen: Range<usize>, sink: f32) -> (f32, f32) {
        let (before, rest) = scores.split_at_mut(seen.start);
        let (scores, after) = rest.split_at_mut(seen.len());
        before.fill(0.0);
        after.fill(0.0);
        let scale = self.options.scale as f32;
        match self.options.softcap {
            None => scores.iter_mut().for_each(|s| *s *= scale),
            Some(c) => {
                let c = c as f32;
                scores
                    .iter_mut()
                    .for_each(|s| *s = c * (*s * scale / c).tanh());
            }
        }
        let mut largest = [f32::NEG_INFINITY; LANES];
        for scores in scores.chunks(LANES) {
            for (largest, s) in largest.iter_mut().zip(scores) {
                *largest = if *s > *largest { *s } else { *largest };
            }
        }
        let max = largest.into_iter().fold(sink, f32::max);
        let mut sums = [0.0f32; LANES];
        for scores in scores.chunks_mut(LANES) {
            for (sum, s) in sums.iter_mut().zip(scores) {
                *s = exp_bounded(*s - max);
                *sum += *s;
            }
        }
        (max, sums.iter().sum::<f32>() + exp_bounded(sink - max))
    }

    /// Writes ∂L/∂q of a block of rows, adds to ∂L/∂k and ∂L/∂v, and returns the block's part of ∂L/∂sink.
    pub(super) fn backward(
        &self,
        block: &RowBlock,
        head: usize,
        results: &GradientInputs<'_>,
        out: [SharedOutput; 3],
    ) -> f32 {
        let (heads, width) = (self.options.heads, self.value_width);
        let gradient = head_columns(results.gradient, &block.rows, head, heads, width);
        let key_count = block.keys.len();
        let mut weights = ScratchBuffer::new(block.rows.len() * key_count);
        let mut slopes = ScratchBuffer::new(block.rows.len() * key_count);
        self.products(&mut weights, block, head);
        let values = self.values(&block.keys, head).transposed();
        gemm(
            &mut slopes,
            key_count,
            gradient,
            values,
            false,
            Threads::One,
        );
        let mut sink_gradient = 0.0;
        let rows = weights
            .chunks_mut(key_count)
            .zip(slopes.chunks_mut(key_count));
        for ((weights, slopes), row) in rows.zip(block.rows.clone()) {
            let columns = (row * heads + head) * width..(row * heads + head + 1) * width;
            let output = &results.output[columns.clone()];
            let gradient_row = &results.gradient[columns];
            let log_sum = results.log_sums[row * heads + head];
            let seen = self.seen_keys(block, row);
            let output_dot_gradient = vectorize_closure(
                #[inline(always)]
                || {
                    let dot = lane_dot(output, gradient_row);
                    self.score_gradient(weights, slopes, seen.clone(), log_sum, dot);
                    dot
                },
            );
            sink_gradient -= exp_bounded(self.sinks[head] - log_sum) * output_dot_gradient;
        }
        let weights = Matrix::new(&weights, block.rows.len(), key_count).transposed();
        let slopes = Matrix::new(&slopes, block.rows.len(), key_count);
        let [dq, dk, dv] = out;
        let keys = self.keys(&block.keys, head);
        let queries = self.queries(&block.rows, head);
        let at = |out: SharedOutput, row: usize, width: usize| out.at((row * heads + head) * width);
        let [stride, value_stride] = [self.key_width, width].map(|width| heads * width);
        let dq = at(dq, block.rows.start, self.key_width);
        let dk = at(dk, block.keys.start, self.key_width);
        let dv = at(dv, block.keys.start, width);
        let one = Threads::One;
        // SAFETY: no other task accesses the head's columns of this document.
        unsafe {
            gemm_at(dq, stride, slopes, keys, false, one);
            gemm_at(dk, stride, slopes.transposed(), queries, true, one);
            gemm_at(dv, value_stride, weights, gradient, true, one);
        }
        sink_gradient
    }

    /// Replaces q·k of a row by p, and ∂L/∂o·v by ∂L/∂(q·k).
    #[inline(always)]
    fn score_gradient(
        &self,
        weights: &mut [f32],
        slopes: &mut [f32],
        seen: Range<usize>,
        log_sum: f32,
        output_dot_gradient: f32,
    ) {
        for part in [0..seen.start, seen.end..weights.len()] {
            weights[part.clone()].fill(0.0);
            slopes[part].fill(0.0);
        }
        let scale = self.options.scale as f32;
        let pairs = weights[seen.clone()].iter_mut().zip(&mut slopes[seen]);
        match self.options.softcap {
            None => {
                for (weight, slope) in pairs {
                    *weight = exp_bounded(*weight * scale - log_sum);
                    *slope = *weight * (*slope - output_dot_gradient) * scale;
                }
            }
            Some(c) => {
                let c = c as f32;
                for (weight, slope) in pairs {
                    let t = (*weight * scale / c).tanh();
                    *weight = exp_bounded(c * t - log_sum);
                    *slope = *weight * (*slope - output_dot_gradient) * scale * (1.0 - t * t);
                }
            }
        }
    }
}

/// Independent partial sums and maxima: a sum in order could not be vectorised.
const LANES: usize = 16;

/// Computes a dot product in independent partial sums.
#[inline(always)]
fn lane_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = a.mul_add(*b, *sum);
        }
    }
    sums.iter().sum()
}

/// Returns the columns of a head in rows of a matrix `[n, heads · width]`.
fn head_columns<'a>(
    values: &'a [f32],
    rows: &Range<usize>,
    head: usize,
    heads: usize,
    width: usize,
) -> Matrix<'a> {
    let from = &values[(rows.start * heads + head) * width..];
    Matrix::strided(from, rows.len(), width, heads * width)
}
