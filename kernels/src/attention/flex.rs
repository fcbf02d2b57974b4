//! The plain-loop form: a block of rows of one head at a time, its scores in a buffer of its own.

// Heads lie beside one another in a row, so what two tasks write is interleaved.
#![allow(unsafe_code)]

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use rayon::prelude::*;

use super::{Attention, AttentionOps};
use crate::exp::exp_to_most;
use crate::flex::{matrix, numbers, shape2, written};
use crate::gemm::{Matrix, Scratch, Shared, Threads, gemm, gemm_at};
use crate::simd::vectorize_closure;

/// Rows whose scores exist at once, for each thread.
const BLOCK: usize = 128;

impl AttentionOps for Flex {
    fn attention_rows(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Vec<usize>,
        how: Attention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [q, k, v] = [q, k, v].map(|tensor| tensor.to_contiguous());
        let [n, columns] = shape2(&q);
        let inputs = Inputs::new(&q, &k, &v, &documents, how);
        let blocks: Vec<Block> = blocks(&documents, how.window).collect();
        let tasks = blocks.len() * how.heads;
        let write = |output: Shared, log_sums: Shared| {
            // The longest blocks first, so that none is left for the end.
            (0..tasks).into_par_iter().with_max_len(1).for_each(|task| {
                let block = &blocks[blocks.len() - 1 - task / how.heads];
                inputs.forward(block, task % how.heads, output, log_sums);
            });
        };
        let mut log_sums = Vec::new();
        // SAFETY: blocks hold every row once, and each of them is written for every head.
        let output = unsafe {
            written(n * columns, |output| {
                log_sums = written(n * how.heads, |log_sums| {
                    write(Shared::new(output), Shared::new(log_sums));
                });
            })
        };
        (
            matrix(output, [n, columns]),
            matrix(log_sums, [n, how.heads]),
        )
    }

    fn attention_gradient(
        gradient: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        documents: Vec<usize>,
        how: Attention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [gradient, q, k, v, output] =
            [gradient, q, k, v, output].map(|tensor| tensor.to_contiguous());
        let [n, columns] = shape2(&q);
        let inputs = Inputs::new(&q, &k, &v, &documents, how);
        assert_eq!(shape2(&gradient), [n, columns], "attention: its gradient");
        assert_eq!(shape2(&output), [n, columns], "attention: its output");
        assert_eq!(shape2(&log_sums), [n, how.heads], "attention: its sums");
        let known = Known {
            gradient: numbers(&gradient),
            output: numbers(&output),
            log_sums: numbers(&log_sums),
        };
        // Keys are added to, block by block.
        let mut of_keys = [(); 2].map(|()| vec![0.0; n * columns]);
        let [dk, dv] = of_keys.each_mut().map(|out| Shared(out.as_mut_ptr()));
        let mut start = 0;
        let starts: Vec<Range<usize>> = documents
            .iter()
            .map(|length| {
                start += length;
                start - length..start
            })
            .collect();
        // Keys are written by all blocks of their document, so a document's head is one task.
        let tasks = starts.len() * how.heads;
        let write = |dq: Shared| {
            (0..tasks).into_par_iter().with_max_len(1).for_each(|task| {
                let document = starts[task / how.heads].clone();
                for block in blocks_of(document, how.window) {
                    inputs.backward(&block, task % how.heads, &known, [dq, dk, dv]);
                }
            });
        };
        // SAFETY: every row of every head belongs to one block, which writes it.
        let dq = unsafe { written(n * columns, |dq| write(Shared::new(dq))) };
        let [dk, dv] = of_keys;
        let keys = |per_query_head: Vec<f32>| {
            matrix(
                summed_over_groups(per_query_head, columns, how),
                [n, columns / how.heads * how.key_heads],
            )
        };
        (matrix(dq, [n, columns]), keys(dk), keys(dv))
    }
}

/// Rows of a document whose scores are computed together, and the rows that they see.
struct Block {
    rows: Range<usize>,
    keys: Range<usize>,
}

fn blocks(documents: &[usize], window: Option<usize>) -> impl Iterator<Item = Block> {
    let mut start = 0;
    documents.iter().flat_map(move |length| {
        let document = start..start + length;
        start += length;
        blocks_of(document, window)
    })
}

fn blocks_of(document: Range<usize>, window: Option<usize>) -> impl Iterator<Item = Block> {
    document.clone().step_by(BLOCK).map(move |first| {
        let rows = first..document.end.min(first + BLOCK);
        let sees_from = (first + 1).saturating_sub(window.unwrap_or(usize::MAX));
        Block {
            keys: sees_from.max(document.start)..rows.end,
            rows,
        }
    })
}

/// What both passes read.
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// Width of a head.
    e: usize,
    how: Attention,
}

/// What the gradient reads besides.
struct Known<'a> {
    gradient: &'a [f32],
    output: &'a [f32],
    log_sums: &'a [f32],
}

impl<'a> Inputs<'a> {
    /// Checks what the pointers below rest on: the op is public.
    fn new(
        q: &'a FlexTensor,
        k: &'a FlexTensor,
        v: &'a FlexTensor,
        documents: &[usize],
        how: Attention,
    ) -> Self {
        let [n, columns] = shape2(q);
        let e = columns / how.heads;
        assert_eq!(documents.iter().sum::<usize>(), n, "attention: documents");
        assert_eq!(how.heads * e, columns, "attention: columns of the queries");
        let keys = [n, how.key_heads * e];
        assert_eq!([shape2(k), shape2(v)], [keys; 2], "attention: keys, values");
        Self {
            e,
            q: numbers(q),
            k: numbers(k),
            v: numbers(v),
            how,
        }
    }

    /// A head's part of rows of q, or of what has its shape.
    fn head<'b>(&self, of: &'b [f32], rows: &Range<usize>, head: usize) -> Matrix<'b> {
        let stride = self.how.heads * self.e;
        let from = &of[rows.start * stride + head * self.e..];
        Matrix::strided(from, rows.len(), self.e, stride)
    }

    /// The part of rows of k or v that a query head reads.
    fn key_head<'b>(&self, of: &'b [f32], rows: &Range<usize>, head: usize) -> Matrix<'b> {
        let stride = self.how.key_heads * self.e;
        let key_head = head / (self.how.heads / self.how.key_heads);
        let from = &of[rows.start * stride + key_head * self.e..];
        Matrix::strided(from, rows.len(), self.e, stride)
    }

    /// q·k of a block, `[rows, keys]`, into `scores`.
    fn products(&self, scores: &mut [f32], block: &Block, head: usize) {
        gemm(
            scores,
            block.keys.len(),
            self.head(self.q, &block.rows, head),
            self.key_head(self.k, &block.keys, head).transposed(),
            false,
            Threads::One,
        );
    }

    /// Places of `block.keys` that a row sees.
    fn seen(&self, block: &Block, row: usize) -> Range<usize> {
        let from = match self.how.window {
            Some(window) => (row + 1).saturating_sub(window).max(block.keys.start),
            None => block.keys.start,
        };
        from - block.keys.start..row + 1 - block.keys.start
    }

    fn forward(&self, block: &Block, head: usize, output: Shared, log_sums: Shared) {
        let (heads, e) = (self.how.heads, self.e);
        let mut scores = Scratch::new(block.rows.len() * block.keys.len());
        self.products(&mut scores, block, head);
        let mut sums = vec![0.0f32; block.rows.len()];
        let rows = scores.chunks_mut(block.keys.len()).zip(block.rows.clone());
        for ((scores, row), sum) in rows.zip(&mut sums) {
            let seen = self.seen(block, row);
            let (max, total) = vectorize_closure(
                #[inline(always)]
                || self.weights(scores, seen.clone()),
            );
            *sum = total;
            // SAFETY: this row and head are this task's alone.
            unsafe { *log_sums.at(row * heads + head) = max + total.ln() };
        }
        let stride = heads * e;
        let place = output.at(block.rows.start * stride + head * e);
        let weights = Matrix::new(&scores, block.rows.len(), block.keys.len());
        let values = self.key_head(self.v, &block.keys, head);
        // SAFETY: the head's columns of these rows are this task's alone, and lie within the output.
        unsafe {
            gemm_at(place, stride, weights, values, false, Threads::One);
            for (row, sum) in sums.iter().enumerate() {
                let mixed = std::slice::from_raw_parts_mut(place.add(row * stride), e);
                mixed.iter_mut().for_each(|mixed| *mixed /= sum);
            }
        }
    }

    /// Turns q·k of a row into exp(s − max) where it is seen and 0 elsewhere; the maximum and the sum.
    #[inline(always)]
    fn weights(&self, scores: &mut [f32], seen: Range<usize>) -> (f32, f32) {
        let (before, rest) = scores.split_at_mut(seen.start);
        let (scores, behind) = rest.split_at_mut(seen.len());
        before.fill(0.0);
        behind.fill(0.0);
        let scale = self.how.scale as f32;
        match self.how.softcap {
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
        let max = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let mut sums = [0.0f32; LANES];
        for scores in scores.chunks_mut(LANES) {
            for (sum, s) in sums.iter_mut().zip(scores) {
                *s = exp_to_most(*s - max);
                *sum += *s;
            }
        }
        (max, sums.iter().sum())
    }

    fn backward(&self, block: &Block, head: usize, known: &Known<'_>, out: [Shared; 3]) {
        let (heads, e) = (self.how.heads, self.e);
        let stride = heads * e;
        let gradient = self.head(known.gradient, &block.rows, head);
        let width = block.keys.len();
        let mut weights = Scratch::new(block.rows.len() * width);
        let mut slopes = Scratch::new(block.rows.len() * width);
        self.products(&mut weights, block, head);
        let values = self.key_head(self.v, &block.keys, head).transposed();
        gemm(&mut slopes, width, gradient, values, false, Threads::One);
        let rows = weights.chunks_mut(width).zip(slopes.chunks_mut(width));
        for ((weights, slopes), row) in rows.zip(block.rows.clone()) {
            let place = row * stride + head * e;
            let head_of = |of: &'_ [f32]| of[place..place + e].to_vec();
            let (output, gradient) = (head_of(known.output), head_of(known.gradient));
            let shared: f32 = output.iter().zip(gradient).map(|(o, g)| o * g).sum();
            let log_sum = known.log_sums[row * heads + head];
            let seen = self.seen(block, row);
            vectorize_closure(
                #[inline(always)]
                || self.score_gradient(weights, slopes, seen.clone(), log_sum, shared),
            );
        }
        let weights = Matrix::new(&weights, block.rows.len(), width);
        let slopes = Matrix::new(&slopes, block.rows.len(), width);
        let [dq, dk, dv] = out;
        let (rows, keys) = (block.rows.start, block.keys.start);
        // SAFETY: the head's columns of this document are this task's alone.
        unsafe {
            let key = self.key_head(self.k, &block.keys, head);
            let query = self.head(self.q, &block.rows, head);
            let at = |of: Shared, row: usize| of.at(row * stride + head * e);
            gemm_at(at(dq, rows), stride, slopes, key, false, Threads::One);
            gemm_at(
                at(dk, keys),
                stride,
                slopes.transposed(),
                query,
                true,
                Threads::One,
            );
            gemm_at(
                at(dv, keys),
                stride,
                weights.transposed(),
                gradient,
                true,
                Threads::One,
            );
        }
    }

    /// From q·k and ∂L/∂o·v of a row: p, and ∂L/∂(q·k).
    #[inline(always)]
    fn score_gradient(
        &self,
        weights: &mut [f32],
        slopes: &mut [f32],
        seen: Range<usize>,
        log_sum: f32,
        shared: f32,
    ) {
        for part in [0..seen.start, seen.end..weights.len()] {
            weights[part.clone()].fill(0.0);
            slopes[part].fill(0.0);
        }
        let scale = self.how.scale as f32;
        let pairs = weights[seen.clone()].iter_mut().zip(&mut slopes[seen]);
        match self.how.softcap {
            None => {
                for (weight, slope) in pairs {
                    *weight = exp_to_most(*weight * scale - log_sum);
                    *slope = *weight * (*slope - shared) * scale;
                }
            }
            Some(c) => {
                let c = c as f32;
                for (weight, slope) in pairs {
                    let t = (*weight * scale / c).tanh();
                    *weight = exp_to_most(c * t - log_sum);
                    *slope = *weight * (*slope - shared) * scale * (1.0 - t * t);
                }
            }
        }
    }
}

/// Sums that are kept beside one another: a sum in order could not be vectorised.
const LANES: usize = 16;

/// `[n, heads · e]` → `[n, key_heads · e]`: what the query heads of a key head leave on it.
fn summed_over_groups(per_head: Vec<f32>, columns: usize, how: Attention) -> Vec<f32> {
    let group = how.heads / how.key_heads;
    if group == 1 {
        return per_head;
    }
    let e = columns / how.heads;
    let n = per_head.len() / columns.max(1);
    let mut out = vec![0.0; n * how.key_heads * e];
    let rows = out
        .chunks_mut(how.key_heads * e)
        .zip(per_head.chunks(columns));
    for (out, per_head) in rows {
        for (out, group) in out.chunks_mut(e).zip(per_head.chunks(group * e)) {
            for head in group.chunks(e) {
                out.iter_mut().zip(head).for_each(|(out, x)| *out += x);
            }
        }
    }
    out
}
