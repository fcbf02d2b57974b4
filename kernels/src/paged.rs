//! Attention over a paged KV cache: sequences hold their keys and values in pages of a shared pool.
//!
//! A pool is one tensor `[s, c]` of slots, where c is the number of key heads times the width of each. A page is
//! `page_size` consecutive slots. A sequence has a list of pages, the first of which begins at position `first`. The slot
//! of position p is
//!
//! ```text
//! pages[(p − first) / page_size] · page_size + (p − first) mod page_size
//! ```
//!
//! so that sequences of any length share one pool, sequences with equal beginnings share pages, and a sequence may drop
//! pages that lie behind its window. A row of queries at position `length` − 1 sees the positions before `length`, and
//! with a window of w the last w of them only. With the logit b of its head's sink:
//!
//! ```text
//! s_p = c tanh(q·k_p · scale / c)               max(0, length − w) ≤ p < length      (without softcap: q·k_p · scale)
//! out = Σ_p exp(s_p) v_p / (Σ_p exp(s_p) + exp(b))                                   (without sinks: no exp(b))
//! ```
//!
//! The result of a row depends on that row and the positions that it sees only, bit for bit: not on the other rows, the
//! page size, the choice of pages or the number of threads. Query head j reads key head j / (h / g). Keys and values are
//! read in place, once for all h / g queries that share them.
//!
//! Values may be narrower than keys, and may be columns of the keys' own pool: latent attention (DeepSeek-AI 2024,
//! DeepSeek-V2, section 2.1) has one key head, whose first columns are its values.
//!
//! Generation needs no gradient, so these are plain functions: the loops of `flex.rs` on the CPU, and the tensor
//! operations of `reference.rs` on all other devices.

mod flex;
mod reference;

use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::Tensor;

use crate::attention::AttentionOptions;
use crate::flex::is_on_cpu;

pub use reference::paged_attention_reference;

/// Options of [`paged_attention`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedOptions {
    /// Heads, scale, softcap and window. The window counts positions.
    pub attention: AttentionOptions,
    /// Number of slots of a page; at least 1.
    pub page_size: usize,
    /// Width of a value head: the values of a key head are the first columns of its share of the values' pool.
    pub value_width: usize,
}

/// The keys and values that one row of queries sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedRow<'a> {
    /// Pages of the row's sequence, in the order of its positions.
    pub pages: &'a [u32],
    /// Position of the first slot of the first page; not behind the first position that the row sees.
    pub first: usize,
    /// Number of positions up to the row's own, which is the last that the row sees; at least 1.
    pub length: usize,
}

impl PagedRow<'_> {
    /// Returns the positions that the row sees.
    fn seen(&self, window: Option<usize>) -> Range<usize> {
        let behind = window.map_or(0, |window| self.length.saturating_sub(window));
        behind..self.length
    }

    /// Returns the slot of a position that is on the row's pages.
    fn slot(&self, position: usize, page_size: usize) -> usize {
        let index = position - self.first;
        self.pages[index / page_size] as usize * page_size + index % page_size
    }
}

/// Computes attention of each row of `q_nc` to the positions in `rows`. The result is a constant to autodiff.
///
/// # Shapes
/// With h query heads, g key heads, the key width e and the value width u:
/// - `q_nc`: `[n, h·e]`, f64, f32, f16 or bf16.
/// - `keys_sc`: a pool `[s, g·e]` of the same type; h is a multiple of g.
/// - `values_sc`: a pool `[s, g·stride]` of the same type with stride ≥ u; may be the pool of the keys.
/// - `sinks_h`: a logit `[h]` of the same type for each query head, which takes its share of the softmax and adds
///   nothing to the output; `None` for none.
/// - `rows`: n entries.
/// - result: `[n, h·u]` of the same type. Sums are in f32, or in f64 for f64.
///
/// # Panics
/// Panics on shapes that do not fit, and on rows that see no position or one outside their pages or the pool.
#[must_use]
pub fn paged_attention(
    q_nc: Tensor<2>,
    keys_sc: Tensor<2>,
    values_sc: Tensor<2>,
    sinks_h: Option<Tensor<1>>,
    rows: &[PagedRow<'_>],
    options: &PagedOptions,
) -> Tensor<2> {
    check_shapes(&q_nc, &keys_sc, &values_sc, sinks_h.as_ref(), options);
    check_rows(rows, q_nc.dims()[0], keys_sc.dims()[0], options);
    let [q_nc, keys_sc, values_sc] = [q_nc, keys_sc, values_sc].map(Tensor::without_autodiff);
    let sinks_h = sinks_h.map(Tensor::without_autodiff);
    if is_on_cpu(&q_nc) {
        let [q, keys, values] = [q_nc, keys_sc, values_sc].map(flex_tensor);
        let sinks = sinks_h.map(flex_tensor);
        let out = flex::attend(&q, &keys, &values, sinks.as_ref(), rows, options);
        return Tensor::from_primitive::<Flex>(out);
    }
    paged_attention_reference(q_nc, keys_sc, values_sc, sinks_h, rows, options)
}

/// Writes row i of `rows_nc` to slot `slots[i]` of the pool, in place if the pool's storage is not shared.
///
/// # Shapes
/// - `pool_sc`: `[s, c]`.
/// - `rows_nc`: `[n, c]` of the same type.
/// - `slots`: n slots, all different.
///
/// # Panics
/// Panics on shapes that do not fit, and on slots outside the pool.
pub fn write_slots(pool_sc: Tensor<2>, rows_nc: Tensor<2>, slots: &[usize]) -> Tensor<2> {
    let ([s, c], [n, columns]) = (pool_sc.dims(), rows_nc.dims());
    assert!(
        columns == c && n == slots.len() && slots.iter().all(|slot| *slot < s),
        "write_slots: {n} rows of {columns} columns do not fit {} slots of a pool [{s}, {c}]",
        slots.len(),
    );
    let [pool_sc, rows_nc] = [pool_sc, rows_nc].map(Tensor::without_autodiff);
    if is_on_cpu(&pool_sc) {
        let pool = flex::write_slots(flex_tensor(pool_sc), &flex_tensor(rows_nc), slots);
        return Tensor::from_primitive::<Flex>(pool);
    }
    reference::write_slots(pool_sc, rows_nc, slots)
}

fn check_shapes(
    q_nc: &Tensor<2>,
    keys_sc: &Tensor<2>,
    values_sc: &Tensor<2>,
    sinks_h: Option<&Tensor<1>>,
    options: &PagedOptions,
) {
    let ([n, c], [s, width]) = (q_nc.dims(), keys_sc.dims());
    let AttentionOptions {
        heads, key_heads, ..
    } = options.attention;
    let e = c / heads.max(1);
    assert!(
        key_heads > 0
            && heads.is_multiple_of(key_heads)
            && e > 0
            && c == heads * e
            && width == key_heads * e,
        "paged_attention: queries [{n}, {c}] of {heads} heads do not fit keys [{s}, {width}] of {key_heads} heads"
    );
    let [value_slots, value_columns] = values_sc.dims();
    assert!(
        value_slots == s
            && value_columns.is_multiple_of(key_heads)
            && (1..=value_columns / key_heads).contains(&options.value_width),
        "paged_attention: values [{value_slots}, {value_columns}] of {key_heads} heads of width {} do not fit keys \
         [{s}, {width}]",
        options.value_width
    );
    assert!(
        sinks_h.is_none_or(|sinks| sinks.dims() == [heads]),
        "paged_attention: the sinks are not one for each of {heads} heads"
    );
    assert!(
        options.page_size > 0 && options.attention.window != Some(0),
        "paged_attention: the page size and the window must be at least 1"
    );
}

fn check_rows(rows: &[PagedRow<'_>], n: usize, s: usize, options: &PagedOptions) {
    assert_eq!(
        rows.len(),
        n,
        "paged_attention: number of rows of the queries and of `rows`"
    );
    for (row, paged) in rows.iter().enumerate() {
        let seen = paged.seen(options.attention.window);
        let pages = seen.end.saturating_sub(paged.first);
        let pages = paged.pages.get(..pages.div_ceil(options.page_size));
        assert!(
            !seen.is_empty()
                && paged.first <= seen.start
                && pages.is_some_and(|pages| pages
                    .iter()
                    .all(|page| (*page as usize + 1) * options.page_size <= s)),
            "paged_attention: row {row} sees positions {seen:?} of {} pages from position {}, and the pool has {s} slots",
            paged.pages.len(),
            paged.first
        );
    }
}

fn flex_tensor<const D: usize>(tensor: Tensor<D>) -> burn::backend::flex::FlexTensor {
    match tensor.try_into_primitive::<Flex>() {
        Ok(primitive) => primitive,
        Err(error) => unreachable!("all tensors of an op are on one device: {error:?}"),
    }
}
