//! Attention over a paged KV cache: sequences hold their keys and values in pages of a shared pool.
//!
//! A pool is one tensor `[s, c]` of slots, where c = g·e is the number of key heads times their width. A page is
//! `page_size` consecutive slots. A sequence has a list of pages, and the slot of its position p is
//!
//! ```text
//! pages[p / page_size] · page_size + p mod page_size
//! ```
//!
//! so that sequences of any length share one pool, and sequences with equal beginnings share pages. Row i of the queries
//! sees the first `length` positions of its sequence:
//!
//! ```text
//! out_i = Σ_p softmax_p(q_i · k_p / √e) v_p,   p < length
//! ```
//!
//! The result of a row depends on that row and its positions only, bit for bit: not on the other rows, the page size,
//! the choice of pages or the number of threads. Query head j reads key head j / (h / g). Keys and values are read in
//! place, once for all h / g queries that share them.
//!
//! Generation needs no gradient, so these are plain functions: the loops of `flex.rs` on the CPU, and the tensor
//! operations of `reference.rs` on all other devices.

mod flex;
mod reference;

use burn::backend::Flex;
use burn::tensor::Tensor;

use crate::flex::is_on_cpu;

pub use reference::paged_attention_reference;

/// The keys and values that one row of queries sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedRow<'a> {
    /// Pages of the row's sequence, in the order of its positions.
    pub pages: &'a [u32],
    /// Number of positions that the row sees, from the first; at least 1.
    pub length: usize,
}

impl PagedRow<'_> {
    /// Returns the slots of the positions that the row sees.
    fn slots(&self, page_size: usize) -> impl Iterator<Item = usize> {
        let pages = self.pages.iter();
        pages
            .flat_map(move |page| (0..page_size).map(move |at| *page as usize * page_size + at))
            .take(self.length)
    }
}

/// Computes attention of each row of `q_nc` to the positions in `rows`. The result is a constant to autodiff.
///
/// # Shapes
/// - `q_nc`: `[n, h·e]` with `heads` = h, f64, f32, f16 or bf16.
/// - `keys_sc`, `values_sc`: pools `[s, g·e]` of the same type; h is a multiple of g.
/// - `rows`: n entries.
/// - result: `[n, h·e]` of the same type. Sums are in f32, or in f64 for f64.
///
/// # Panics
/// Panics on shapes that do not fit, and on rows that see no position or one outside the pool.
pub fn paged_attention(
    q_nc: Tensor<2>,
    keys_sc: Tensor<2>,
    values_sc: Tensor<2>,
    rows: &[PagedRow<'_>],
    page_size: usize,
    heads: usize,
) -> Tensor<2> {
    check(&q_nc, &keys_sc, &values_sc, rows, page_size, heads);
    let [q_nc, keys_sc, values_sc] = [q_nc, keys_sc, values_sc].map(Tensor::without_autodiff);
    if is_on_cpu(&q_nc) {
        let [q, keys, values] = [q_nc, keys_sc, values_sc].map(flex_tensor);
        let out = flex::attend(&q, &keys, &values, rows, page_size, heads);
        return Tensor::from_primitive::<Flex>(out);
    }
    paged_attention_reference(q_nc, keys_sc, values_sc, rows, page_size, heads)
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

fn check(
    q_nc: &Tensor<2>,
    keys_sc: &Tensor<2>,
    values_sc: &Tensor<2>,
    rows: &[PagedRow<'_>],
    page_size: usize,
    heads: usize,
) {
    let ([n, c], [s, width]) = (q_nc.dims(), keys_sc.dims());
    let e = c / heads.max(1);
    assert!(
        e > 0 && c == heads * e && width > 0 && width % e == 0 && heads.is_multiple_of(width / e),
        "paged_attention: queries [{n}, {c}] of {heads} heads do not fit keys [{s}, {width}]"
    );
    assert_eq!(values_sc.dims(), [s, width], "paged_attention: values");
    assert_eq!(
        rows.len(),
        n,
        "paged_attention: number of rows of the queries and of `rows`"
    );
    for (row, paged) in rows.iter().enumerate() {
        let seen = paged.length.div_ceil(page_size.max(1));
        let inside = paged.pages.iter().take(seen);
        assert!(
            paged.length > 0
                && seen <= paged.pages.len()
                && inside
                    .into_iter()
                    .all(|page| (*page as usize + 1) * page_size <= s),
            "paged_attention: row {row} sees {} positions of {} pages, and the pool has {s} slots",
            paged.length,
            paged.pages.len()
        );
    }
}

fn flex_tensor(tensor: Tensor<2>) -> burn::backend::flex::FlexTensor {
    match tensor.try_into_primitive::<Flex>() {
        Ok(primitive) => primitive,
        Err(error) => unreachable!("all tensors of an op are on one device: {error:?}"),
    }
}
