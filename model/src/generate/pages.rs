//! Allocation of the KV cache's pages to sequences.
//!
//! Layers with the same window form a group, whose layers have their pages at the same places of their pools. A layer
//! without a window needs a page for all positions of a sequence, and the sequence gets them all when it is admitted. In
//! a layer with a window, a sequence gives back each page that has fallen behind the window and takes another in its
//! place, so that it holds few pages however long it becomes. These are promised when it is admitted, and taken one by
//! one. So a running sequence never waits for a page.

/// The pages of the pools of a group of layers.
#[derive(Debug)]
pub(super) struct PagePool {
    /// Free pages; the last one is allocated next.
    free: Vec<u32>,
    /// Number of sequences that use each page.
    users: Vec<usize>,
}

impl PagePool {
    fn new(count: usize) -> Self {
        Self {
            free: (0..count as u32).rev().collect(),
            users: vec![0; count],
        }
    }

    /// Takes a free page; the pool has one, because it was reserved when the sequence was admitted.
    fn take(&mut self) -> u32 {
        let Some(page) = self.free.pop() else {
            unreachable!("a page was reserved when the sequence was admitted");
        };
        self.add_user(page);
        page
    }

    fn add_user(&mut self, page: u32) {
        if let Some(users) = self.users.get_mut(page as usize) {
            *users += 1;
        }
    }

    /// Frees a page unless another sequence uses it.
    fn release(&mut self, page: u32) {
        let Some(users) = self.users.get_mut(page as usize) else {
            return;
        };
        *users = users.saturating_sub(1);
        if *users == 0 {
            self.free.push(page);
        }
    }
}

/// The pages of a sequence in a group of layers.
#[derive(Debug, PartialEq)]
pub(super) struct SequencePages {
    /// Position of the first slot of the first page.
    pub(super) first: usize,
    /// The pages from `first` on, in order.
    pub(super) pages: Vec<u32>,
    /// Number of pages that were promised to the sequence and may be in use by it at the same time.
    promised: usize,
}

/// The layers with the same window, and the allocation of their pages.
#[derive(Debug)]
pub(super) struct LayerGroup {
    /// Number of positions that a row sees; `None` if it sees all positions of the longest sequence.
    window: Option<usize>,
    page_size: usize,
    pool: PagePool,
    /// Number of pages that can be promised.
    unpromised: usize,
}

impl LayerGroup {
    /// Makes a group whose sequences may have these numbers of positions. The pools have about `cache_tokens` positions,
    /// but enough for the longest sequence and no more than for all sequences. Up to `step_rows` positions of prompts
    /// are computed in one step.
    pub(super) fn new(
        window: Option<usize>,
        page_size: usize,
        lengths: impl Iterator<Item = usize> + Clone,
        cache_tokens: usize,
        step_rows: usize,
    ) -> Self {
        let mut group = Self {
            window,
            page_size,
            pool: PagePool::new(0),
            unpromised: 0,
        };
        let held = lengths.clone().map(|length| group.most_pages(length));
        let (largest, all) = (held.clone().max().unwrap_or(0), held.sum());
        group.unpromised = (cache_tokens / page_size).clamp(largest, all);
        // See `most_pages` for the pages that the rows of a step need beyond the promised ones.
        let longest = lengths.max().unwrap_or(0).div_ceil(page_size);
        let beyond = if largest < longest {
            step_rows / page_size
        } else {
            0
        };
        group.pool = PagePool::new(group.unpromised + beyond);
        group
    }

    /// Number of pages of each pool.
    pub(super) fn page_count(&self) -> usize {
        self.pool.users.len()
    }

    /// Number of pages that sequences use.
    #[cfg(test)]
    pub(super) fn used_pages(&self) -> usize {
        self.page_count() - self.pool.free.len()
    }

    /// Returns the largest number of pages of a sequence of `length` positions that are in use at the same time, but for
    /// those that are shared by all sequences of a step.
    ///
    /// A step of n rows of a sequence with a window of w touches w − 1 + n positions, on at most
    /// ⌈(w − 1) / size⌉ + 1 + ⌈(n − 1) / size⌉ pages. One page of the last term is counted here. The others are at most
    /// ⌊n / size⌋, so that all sequences of a step together need at most ⌊N / size⌋ of them, where N is the number of
    /// rows of prompts in a step.
    fn most_pages(&self, length: usize) -> usize {
        let all = length.div_ceil(self.page_size);
        match self.window {
            Some(window) => all.min(window.saturating_sub(1).div_ceil(self.page_size) + 2),
            None => all,
        }
    }

    /// Returns the start of the page of the first position that the row at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        let behind = self
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        behind / self.page_size * self.page_size
    }

    /// Whether a sequence that computes its positions from `shared` on sees no page that another sequence with these
    /// pages has given back already. `shared` is a number of whole pages.
    pub(super) fn keeps(&self, pages: &SequencePages, shared: usize) -> bool {
        pages.first <= self.first_seen(shared)
    }

    /// Whether a sequence of `length` positions can be admitted whose first `shared` positions are on another sequence's
    /// pages.
    pub(super) fn has_room(&self, length: usize, shared: usize) -> bool {
        match self.window {
            Some(_) => self.most_pages(length) <= self.unpromised,
            None => (length - shared).div_ceil(self.page_size) <= self.pool.free.len(),
        }
    }

    /// Admits a sequence for which there is room. A layer without a window shares the first `shared` positions with
    /// `source` at once; a layer with a window does so in [`Self::adopt`].
    pub(super) fn admit(
        &mut self,
        length: usize,
        shared: usize,
        source: Option<&SequencePages>,
    ) -> SequencePages {
        let mut pages = SequencePages {
            first: self.first_seen(shared),
            pages: Vec::new(),
            promised: 0,
        };
        if self.window.is_some() {
            // Shared pages are promised as well: a sequence may need another page while the one that it has given back is
            // still used by the other.
            pages.promised = self.most_pages(length);
            self.unpromised -= pages.promised;
        } else {
            if let Some(source) = source {
                self.adopt(&mut pages, source, shared);
            }
            self.extend(&mut pages, length);
        }
        pages
    }

    /// Shares the pages of `source` up to position `shared` that the sequence sees and does not have yet.
    pub(super) fn adopt(
        &mut self,
        pages: &mut SequencePages,
        source: &SequencePages,
        shared: usize,
    ) {
        let from = (pages.first - source.first) / self.page_size + pages.pages.len();
        let end = (shared - source.first) / self.page_size;
        for page in source.pages.iter().take(end).skip(from) {
            self.pool.add_user(*page);
            pages.pages.push(*page);
        }
    }

    /// Prepares the pages for the rows at positions `from..end`: gives back those that no row sees any more, and takes
    /// those that the rows are written to.
    pub(super) fn advance(&mut self, pages: &mut SequencePages, from: usize, end: usize) {
        let behind = (self.first_seen(from) - pages.first) / self.page_size;
        for page in pages.pages.drain(..behind.min(pages.pages.len())) {
            self.pool.release(page);
        }
        pages.first = self.first_seen(from);
        self.extend(pages, end);
    }

    /// Takes pages until all positions before `end` have one.
    fn extend(&mut self, pages: &mut SequencePages, end: usize) {
        while pages.first + pages.pages.len() * self.page_size < end {
            pages.pages.push(self.pool.take());
        }
    }

    /// Gives back all pages of a sequence.
    pub(super) fn release(&mut self, pages: &SequencePages) {
        for page in pages.pages.iter().rev() {
            self.pool.release(*page);
        }
        self.unpromised += pages.promised;
    }
}
