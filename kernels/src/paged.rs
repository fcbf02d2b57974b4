//! Attention over keys and values that sequences hold in pages of a shared pool.
//!
//! A pool is one tensor `[s, c]` of slots, c = g·e (heads times their width). A page is `page_size`
//! slots behind one another; a sequence has a list of pages, and its position p lies in slot
//!
//! ```text
//! pages[p / page_size] · page_size + p mod page_size
//! ```
//!
//! so that sequences of any length share one pool, and equal beginnings share pages. Each row of
//! queries i sees the first `length` positions of its sequence:
//!
//! ```text
//! out_i = Σ_p softmax_p(q_i · k_p / √e) v_p,   p < length
//! ```
//!
//! What a row gives depends on that row and its positions alone, bit for bit: not on the other rows,
//! on the page size, on which pages it has, or on the number of threads. Query head j reads key head
//! j / (h / g); keys and values are read where they lie, once for all h / g queries that share them.
//!
//! These run under generation and have no gradient, so they are plain functions: the loops of
//! `flex.rs` on the CPU, and the tensor operations of `reference.rs` on every other device.

mod flex;
mod reference;

use burn::backend::{DispatchDevice, Flex};
use burn::tensor::Tensor;

pub use reference::paged_attention_reference;

/// Where one row of queries finds its keys and values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedRow<'a> {
    /// Pages of the row's sequence, in the order of its positions.
    pub pages: &'a [u32],
    /// How many positions the row sees, from the first; at least 1.
    pub length: usize,
}

impl PagedRow<'_> {
    /// The slot of each position that is seen.
    fn slots(&self, page_size: usize) -> impl Iterator<Item = usize> {
        let pages = self.pages.iter();
        pages
            .flat_map(move |page| (0..page_size).map(move |at| *page as usize * page_size + at))
            .take(self.length)
    }
}

/// Attention of each row of `q_nc` to the positions that `rows` names; a constant to autodiff.
///
/// # Shapes
/// - `q_nc`: `[n, h·e]` with `heads` = h, f64, f32, f16 or bf16.
/// - `keys_sc`, `values_sc`: pools `[s, g·e]` in the same type; h is a multiple of g.
/// - `rows`: n of them.
/// - result: `[n, h·e]` in that type. Sums are in f32 at least.
///
/// # Panics
/// On shapes that do not fit, and on rows that name no position or one outside of the pool.
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
    if on_flex(&q_nc) {
        let [q, keys, values] = [q_nc, keys_sc, values_sc].map(flex_tensor);
        let out = flex::attend(&q, &keys, &values, rows, page_size, heads);
        return Tensor::from_primitive::<Flex>(out);
    }
    paged_attention_reference(q_nc, keys_sc, values_sc, rows, page_size, heads)
}

/// The pool with row i of `rows_nc` in slot `slots[i]`; in place where nothing else holds the pool.
///
/// `pool_sc`: `[s, c]`, `rows_nc`: `[n, c]` in the same type, `slots`: n of them, each at most once.
///
/// # Panics
/// On shapes that do not fit, and on slots outside of the pool.
pub fn write_slots(pool_sc: Tensor<2>, rows_nc: Tensor<2>, slots: &[usize]) -> Tensor<2> {
    let ([s, c], [n, columns]) = (pool_sc.dims(), rows_nc.dims());
    assert!(
        columns == c && n == slots.len() && slots.iter().all(|slot| *slot < s),
        "write_slots: {n} rows of {columns} into {} slots of a pool [{s}, {c}]",
        slots.len(),
    );
    let [pool_sc, rows_nc] = [pool_sc, rows_nc].map(Tensor::without_autodiff);
    if on_flex(&pool_sc) {
        let pool = flex::write(flex_tensor(pool_sc), &flex_tensor(rows_nc), slots);
        return Tensor::from_primitive::<Flex>(pool);
    }
    reference::write(pool_sc, rows_nc, slots)
}

fn check(
    q_nc: &Tensor<2>,
    keys_sc: &Tensor<2>,
    values_sc: &Tensor<2>,
    rows: &[PagedRow<'_>],
    page_size: usize,
    heads: usize,
) {
    let ([n, c], [s, wide]) = (q_nc.dims(), keys_sc.dims());
    let e = c / heads.max(1);
    assert!(
        e > 0 && c == heads * e && wide > 0 && wide % e == 0 && heads.is_multiple_of(wide / e),
        "paged_attention: queries [{n}, {c}] of {heads} heads do not fit keys [{s}, {wide}]"
    );
    assert_eq!(values_sc.dims(), [s, wide], "paged_attention: values");
    assert_eq!(
        rows.len(),
        n,
        "paged_attention: rows of queries and of pages"
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
            "paged_attention: row {row} sees {} positions of {} pages, the pool has {s} slots",
            paged.length,
            paged.pages.len()
        );
    }
}

fn on_flex(tensor: &Tensor<2>) -> bool {
    matches!(tensor.device().as_dispatch(), DispatchDevice::Flex(_))
}

fn flex_tensor(tensor: Tensor<2>) -> burn::backend::flex::FlexTensor {
    match tensor.try_into_primitive::<Flex>() {
        Ok(primitive) => primitive,
        Err(error) => unreachable!("all tensors of an op are on one device: {error:?}"),
    }
}
