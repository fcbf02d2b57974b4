//! The plain-loop form: a task computes the scores of a block of rows of one head in a buffer of its own.

// The heads of a row are adjacent, so the outputs of two tasks are interleaved and are written through pointers.
#![allow(unsafe_code)]

mod block;

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;

use super::{AttentionOps, AttentionOptions};
use crate::flex::{
    matrix, narrowed_matrix, rows_per_task, shape2, vec_written_by, vector, widened_matrix,
};
use crate::gemm::SharedOutput;
use crate::simd::vectorize_closure;
use crate::team::{for_each_chunk, map_tasks, run_tasks};
use block::{AttentionInputs, GradientInputs, RowBlock, document_blocks, document_ranges};

impl AttentionOps for Flex {
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let dtype = q.dtype();
        let [q, k, v] = [q, k, v].map(|tensor| widened_matrix(tensor.to_contiguous()));
        let sinks = sinks.to_contiguous();
        let inputs = AttentionInputs::new([&q, &k, &v, &sinks], &documents, options);
        let [n, columns] = [shape2(&q)[0], options.heads * inputs.value_width];
        let blocks: Vec<RowBlock> = document_ranges(&documents)
            .flat_map(|document| document_blocks(document, options.window))
            .collect();
        let tasks = blocks.len() * options.heads;
        let write = |output: SharedOutput, log_sums: SharedOutput| {
            // The longest blocks come first, so that no long task is left at the end.
            run_tasks(tasks, rayon::current_num_threads(), |task| {
                let block = &blocks[blocks.len() - 1 - task / options.heads];
                inputs.forward(block, task % options.heads, output, log_sums);
            });
        };
        let mut log_sums = Vec::new();
        // SAFETY: every row is in one block, and each block is written for every head.
        let output = unsafe {
            vec_written_by(n * columns, |output| {
                log_sums = vec_written_by(n * options.heads, |log_sums| {
                    write(SharedOutput::new(output), SharedOutput::new(log_sums));
                });
            })
        };
        (
            narrowed_matrix(matrix(output, [n, columns]), dtype),
            matrix(log_sums, [n, options.heads]),
        )
    }

    fn attention_gradient(
        gradient: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        let dtype = q.dtype();
        let [gradient, q, k, v, output] =
            [gradient, q, k, v, output].map(|tensor| widened_matrix(tensor.to_contiguous()));
        let [sinks, log_sums] = [sinks, log_sums].map(|tensor| tensor.to_contiguous());
        let inputs = AttentionInputs::new([&q, &k, &v, &sinks], &documents, options);
        let results = GradientInputs::new([&gradient, &output, &log_sums], &inputs);
        let heads = options.heads;
        let [n, columns] = shape2(&q);
        let value_columns = heads * inputs.value_width;
        // The gradients of keys and values start at 0, and blocks of rows add to them.
        let mut key_gradients = [columns, value_columns].map(|columns| vec![0.0; n * columns]);
        let [dk, dv] = key_gradients
            .each_mut()
            .map(|out| SharedOutput(out.as_mut_ptr()));
        let ranges: Vec<Range<usize>> = document_ranges(&documents).collect();
        // All blocks of a document add to its keys, so each head of a document is one task.
        let tasks = ranges.len() * heads;
        let mut sink_gradients: Vec<f32> = Vec::new();
        let mut write = |dq: SharedOutput| {
            sink_gradients = map_tasks(tasks, |task| {
                let document = ranges[task / heads].clone();
                let blocks = document_blocks(document, options.window);
                let of_block =
                    |block| inputs.backward(&block, task % heads, &results, [dq, dk, dv]);
                blocks.map(of_block).sum::<f32>()
            });
        };
        // SAFETY: every row of every head is in one block, which writes it.
        let dq = unsafe { vec_written_by(n * columns, |dq| write(SharedOutput::new(dq))) };
        let [dk, dv] = key_gradients;
        let of_key_heads = |per_query_head: Vec<f32>, width: usize| {
            let shape = [n, width * options.key_heads];
            let gradient = matrix(sum_over_groups(per_query_head, width, options), shape);
            narrowed_matrix(gradient, dtype)
        };
        (
            narrowed_matrix(matrix(dq, [n, columns]), dtype),
            of_key_heads(dk, inputs.key_width),
            of_key_heads(dv, inputs.value_width),
            vector(sum_over_documents(&sink_gradients, heads), DType::F32),
        )
    }
}

/// Sums the contributions of the query heads that share a key head: `[n, heads · width]` → `[n, key_heads · width]`.
fn sum_over_groups(per_head: Vec<f32>, width: usize, options: AttentionOptions) -> Vec<f32> {
    let group = options.heads / options.key_heads;
    if group == 1 {
        return per_head;
    }
    let mut out = vec![0.0f32; per_head.len() / group];
    for_each_chunk(&mut out, rows_per_task(width) * width, |task, out| {
        let per_head = &per_head[task * rows_per_task(width) * width * group..];
        vectorize_closure(
            #[inline(always)]
            || {
                let key_heads = out.chunks_mut(width.max(1));
                for (out, group) in key_heads.zip(per_head.chunks((group * width).max(1))) {
                    for head in group.chunks(width) {
                        out.iter_mut().zip(head).for_each(|(out, x)| *out += x);
                    }
                }
            },
        );
    });
    out
}

/// Sums over documents: `[documents, heads]` → `[heads]`.
fn sum_over_documents(gradients: &[f32], heads: usize) -> Vec<f32> {
    let mut sums = vec![0.0; heads];
    for document in gradients.chunks(heads) {
        sums.iter_mut().zip(document).for_each(|(sum, x)| *sum += x);
    }
    sums
}
