//! Which pages of the cache are free, who holds the others, and which prompts can share them.

use std::collections::HashMap;

/// A full page of a prompt: the page before it, and its tokens. Equal keys have equal positions before
/// them, all the way to the start, and so the same keys and values.
type Beginning = (Option<u32>, Vec<u32>);

/// The pages of one pool.
#[derive(Debug)]
pub(super) struct Pages {
    page_size: usize,
    /// Free pages; the last one is given out next.
    free: Vec<u32>,
    /// How many sequences hold each page.
    holders: Vec<usize>,
    /// Pages that hold nothing but a prompt's tokens, while somebody holds them.
    prompts: HashMap<Beginning, u32>,
    /// The key in `prompts` of each page that is there.
    beginnings: HashMap<u32, Beginning>,
}

/// What a sequence was given.
#[derive(Debug, PartialEq)]
pub(super) struct Given {
    /// Pages of all its positions, in their order.
    pub(super) pages: Vec<u32>,
    /// So many positions of the prompt are in pages that another sequence fills.
    pub(super) shared: usize,
}

impl Pages {
    pub(super) fn new(count: usize, page_size: usize) -> Self {
        Self {
            page_size,
            free: (0..count as u32).rev().collect(),
            holders: vec![0; count],
            prompts: HashMap::new(),
            beginnings: HashMap::new(),
        }
    }

    /// Pages for `positions` positions that start with `prompt`, or `None` until others are given back.
    ///
    /// Whole pages of the prompt are shared with sequences that begin alike, but never the page of its
    /// last token, which is what the first answer token is drawn after. Who shares a page must not
    /// read it before the one that was first given it has written it.
    pub(super) fn take(&mut self, prompt: &[u32], positions: usize) -> Option<Given> {
        let mut pages = Vec::with_capacity(positions.div_ceil(self.page_size));
        let sharable = prompt.len().saturating_sub(1) / self.page_size;
        for tokens in prompt.chunks(self.page_size).take(sharable) {
            let beginning = (pages.last().copied(), tokens.to_vec());
            let Some(page) = self.prompts.get(&beginning) else {
                break;
            };
            pages.push(*page);
        }
        let shared = pages.len();
        let fresh = positions.div_ceil(self.page_size) - shared;
        let first = self.free.len().checked_sub(fresh)?;
        pages.extend(self.free.drain(first..).rev());
        for page in &pages {
            if let Some(holders) = self.holders.get_mut(*page as usize) {
                *holders += 1;
            }
        }
        let full = prompt.chunks_exact(self.page_size).enumerate();
        for (index, tokens) in full.skip(shared) {
            let before = index.checked_sub(1).and_then(|before| pages.get(before));
            let (beginning, Some(page)) = ((before.copied(), tokens.to_vec()), pages.get(index))
            else {
                break;
            };
            // The page of an equal prompt's last token may be there already; one of them is enough.
            if self.prompts.contains_key(&beginning) {
                break;
            }
            self.beginnings.insert(*page, beginning.clone());
            self.prompts.insert(beginning, *page);
        }
        Some(Given {
            pages,
            shared: shared * self.page_size,
        })
    }

    /// Gives pages back: who shares them keeps them.
    pub(super) fn give_back(&mut self, pages: &[u32]) {
        for page in pages.iter().rev() {
            let Some(holders) = self.holders.get_mut(*page as usize) else {
                continue;
            };
            *holders = holders.saturating_sub(1);
            if *holders == 0 {
                if let Some(beginning) = self.beginnings.remove(page) {
                    self.prompts.remove(&beginning);
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
    fn equal_beginnings_share_whole_pages_and_give_them_back_together() {
        let mut pages = Pages::new(10, 4);
        let prompt: Vec<u32> = (0..10).collect();
        let first = pages.take(&prompt, 14).unwrap();
        assert_eq!((first.pages.len(), first.shared), (4, 0));
        let second = pages.take(&prompt, 14).unwrap();
        assert_eq!(second.shared, 8);
        assert_eq!(second.pages[..2], first.pages[..2]);
        assert!(
            second.pages[2..]
                .iter()
                .all(|page| !first.pages.contains(page))
        );
        // Another token in the second page: only the first is shared.
        let mut other = prompt.clone();
        other[5] = 99;
        let third = pages.take(&other, 12).unwrap();
        assert_eq!((third.shared, third.pages[0]), (4, first.pages[0]));
        assert_eq!(pages.free.len(), 2);
        assert_eq!(pages.take(&[7; 3], 12), None);
        assert_eq!(pages.free.len(), 2);
        pages.give_back(&first.pages);
        assert_eq!(pages.free.len(), 4);
        pages.give_back(&second.pages);
        pages.give_back(&third.pages);
        assert_eq!(pages.free.len(), 10);
        assert!(pages.prompts.is_empty() && pages.beginnings.is_empty());
        assert_eq!(pages.take(&prompt, 14).unwrap().shared, 0);
    }

    #[test]
    fn the_page_of_the_last_token_is_not_shared_with_an_equal_prompt() {
        let mut pages = Pages::new(8, 4);
        let first = pages.take(&[1, 2, 3, 4], 5).unwrap();
        let same = pages.take(&[1, 2, 3, 4], 5).unwrap();
        assert_eq!((first.shared, same.shared), (0, 0));
        assert_eq!(pages.take(&[1, 2, 3, 4, 5], 6).unwrap().shared, 4);
        pages.give_back(&same.pages);
        assert_eq!(pages.take(&[1, 2, 3, 4, 6], 6).unwrap().shared, 4);
        pages.give_back(&first.pages);
    }
}
