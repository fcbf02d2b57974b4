//! Allocation of the KV cache's pages to sequences, and sharing of pages between prompts with equal beginnings.

use std::collections::HashMap;

/// Identifies a full page of a prompt by the page before it and the tokens in it. Pages with equal keys have equal tokens
/// from the start of the prompt, and so equal keys and values.
type PrefixKey = (Option<u32>, Vec<u32>);

/// The pages of one pool.
#[derive(Debug)]
pub(super) struct PagePool {
    page_size: usize,
    /// Free pages; the last one is allocated next.
    free: Vec<u32>,
    /// Number of sequences that use each page.
    users: Vec<usize>,
    /// The pages in use that hold prompt tokens only and can be shared.
    sharable: HashMap<PrefixKey, u32>,
    /// The key in `sharable` of each page that is in it.
    keys: HashMap<u32, PrefixKey>,
}

/// The pages of a sequence.
#[derive(Debug, PartialEq)]
pub(super) struct PageAllocation {
    /// Pages of all positions of the sequence, in order.
    pub(super) pages: Vec<u32>,
    /// Number of positions of the prompt that are in shared pages, whose keys and values another sequence writes.
    pub(super) shared: usize,
}

impl PagePool {
    pub(super) fn new(count: usize, page_size: usize) -> Self {
        Self {
            page_size,
            free: (0..count as u32).rev().collect(),
            users: vec![0; count],
            sharable: HashMap::new(),
            keys: HashMap::new(),
        }
    }

    /// Allocates pages for `positions` positions that start with `prompt`; `None` if too few pages are free.
    ///
    /// Whole pages of the prompt are shared with sequences that begin with the same tokens, except the page of its last
    /// token, because the first answer token is drawn from that position's logits. A sequence must not read a shared page
    /// before the sequence that allocated it first has written it.
    pub(super) fn allocate(&mut self, prompt: &[u32], positions: usize) -> Option<PageAllocation> {
        let mut pages = Vec::with_capacity(positions.div_ceil(self.page_size));
        let max_shared = prompt.len().saturating_sub(1) / self.page_size;
        for tokens in prompt.chunks(self.page_size).take(max_shared) {
            let key = (pages.last().copied(), tokens.to_vec());
            let Some(page) = self.sharable.get(&key) else {
                break;
            };
            pages.push(*page);
        }
        let shared = pages.len();
        let fresh = positions.div_ceil(self.page_size) - shared;
        let first = self.free.len().checked_sub(fresh)?;
        pages.extend(self.free.drain(first..).rev());
        for page in &pages {
            if let Some(users) = self.users.get_mut(*page as usize) {
                *users += 1;
            }
        }
        let full = prompt.chunks_exact(self.page_size).enumerate();
        for (index, tokens) in full.skip(shared) {
            let before = index.checked_sub(1).and_then(|before| pages.get(before));
            let (key, Some(page)) = ((before.copied(), tokens.to_vec()), pages.get(index)) else {
                break;
            };
            // The page of an equal prompt's last token may be sharable already; one page per key is enough.
            if self.sharable.contains_key(&key) {
                break;
            }
            self.keys.insert(*page, key.clone());
            self.sharable.insert(key, *page);
        }
        Some(PageAllocation {
            pages,
            shared: shared * self.page_size,
        })
    }

    /// Frees the pages of a sequence that no other sequence uses.
    pub(super) fn release(&mut self, pages: &[u32]) {
        for page in pages.iter().rev() {
            let Some(users) = self.users.get_mut(*page as usize) else {
                continue;
            };
            *users = users.saturating_sub(1);
            if *users == 0 {
                if let Some(key) = self.keys.remove(page) {
                    self.sharable.remove(&key);
                }
                self.free.push(*page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_with_equal_beginnings_share_whole_pages_until_the_last_one_ends() {
        let mut pages = PagePool::new(10, 4);
        let prompt: Vec<u32> = (0..10).collect();
        let first = pages.allocate(&prompt, 14).unwrap();
        assert_eq!((first.pages.len(), first.shared), (4, 0));
        let second = pages.allocate(&prompt, 14).unwrap();
        assert_eq!(second.shared, 8);
        assert_eq!(second.pages[..2], first.pages[..2]);
        assert!(
            second.pages[2..]
                .iter()
                .all(|page| !first.pages.contains(page))
        );
        // A prompt with another token in its second page shares the first page only.
        let mut other = prompt.clone();
        other[5] = 99;
        let third = pages.allocate(&other, 12).unwrap();
        assert_eq!((third.shared, third.pages[0]), (4, first.pages[0]));
        assert_eq!(pages.free.len(), 2);
        assert_eq!(pages.allocate(&[7; 3], 12), None);
        assert_eq!(pages.free.len(), 2);
        pages.release(&first.pages);
        assert_eq!(pages.free.len(), 4);
        pages.release(&second.pages);
        pages.release(&third.pages);
        assert_eq!(pages.free.len(), 10);
        assert!(pages.sharable.is_empty() && pages.keys.is_empty());
        assert_eq!(pages.allocate(&prompt, 14).unwrap().shared, 0);
    }

    #[test]
    fn the_page_of_the_last_token_is_not_shared_with_an_equal_prompt() {
        let mut pages = PagePool::new(8, 4);
        let first = pages.allocate(&[1, 2, 3, 4], 5).unwrap();
        let same = pages.allocate(&[1, 2, 3, 4], 5).unwrap();
        assert_eq!((first.shared, same.shared), (0, 0));
        assert_eq!(pages.allocate(&[1, 2, 3, 4, 5], 6).unwrap().shared, 4);
        pages.release(&same.pages);
        assert_eq!(pages.allocate(&[1, 2, 3, 4, 6], 6).unwrap().shared, 4);
        pages.release(&first.pages);
    }
}
