//! The rows that the next step computes: one token of every running answer, and a part of the admitted prompts.
//!
//! Prompts are admitted and computed in order. A prompt that begins as a running one shares the whole pages of the
//! beginning with it, except the page of its last token, because the first answer token is drawn from that position's
//! logits. It shares them only if they are there in all layers: an answer may have given back the pages of its prompt that
//! lie behind a window. And both must have the same rotary frequencies, which may depend on the length that a sequence may
//! reach. When a sequence reads a shared page, the earlier sequence that writes the page has written it in
//! the same step or before.

use super::pages::{LayerGroup, SequencePages};
use super::{BatchLimits, GeneratedAnswer, Sampling, StopConditions, StopReason};

/// One token that a step computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepRow {
    pub(super) id: u32,
    pub(super) position: usize,
    /// Index of the token's sequence among the running sequences.
    pub(super) sequence: usize,
}

/// A prompt with its answer so far.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Index of the prompt.
    pub(super) prompt: usize,
    /// Token ids of the prompt and of the answer so far.
    pub(super) ids: Vec<u32>,
    /// The pages in each group of layers.
    pub(super) pages: Vec<SequencePages>,
    /// Number of tokens of the prompt and of its longest answer.
    pub(super) longest: usize,
    prompt_tokens: usize,
    /// Number of positions that the cache holds after the current step.
    cached: usize,
    /// The prompt whose sequence has yet to write the first `cached` positions, which the sequence shares with it.
    source: Option<usize>,
    logprobs: Vec<f32>,
    /// The last bytes of the answer, in which a stop string may have begun.
    tail: Vec<u8>,
    stop_reason: Option<StopReason>,
}

impl Sequence {
    /// Number of tokens of the answer.
    pub(super) fn drawn(&self) -> usize {
        self.ids.len() - self.prompt_tokens
    }

    /// Whether the current step computes the sequence's last token, so that the next token is drawn.
    pub(super) fn is_drawing(&self) -> bool {
        self.cached == self.ids.len()
    }

    /// Returns the number of positions, in whole pages, that a prompt can share with this sequence.
    fn shared_with(&self, prompt: &[u32], page_size: usize, groups: &[LayerGroup]) -> usize {
        let own = self.ids[..self.prompt_tokens].chunks_exact(page_size);
        let shareable = prompt.len().saturating_sub(1) / page_size;
        let equal = prompt.chunks_exact(page_size).take(shareable).zip(own);
        let shared = equal.take_while(|(a, b)| a == b).count() * page_size;
        let mut groups = groups.iter().zip(&self.pages);
        match groups.all(|(group, pages)| group.keeps(pages, shared)) {
            true => shared,
            false => 0,
        }
    }

    /// Shares the pages of the first `cached` positions once an earlier sequence has written all of them.
    fn adopt_pages(&mut self, earlier: &[Self], groups: &mut [LayerGroup]) {
        let source = earlier
            .iter()
            .find(|earlier| Some(earlier.prompt) == self.source);
        let Some(source) = source.filter(|source| source.cached >= self.cached) else {
            return;
        };
        for ((group, pages), source) in groups.iter_mut().zip(&mut self.pages).zip(&source.pages) {
            group.adopt(pages, source, self.cached);
        }
        self.source = None;
    }

    /// Appends a token to the answer, and sets the stop reason if the answer ends with it.
    pub(super) fn push(
        &mut self,
        (id, logprob): (u32, f32),
        stop: &StopConditions<'_>,
        sampling: &Sampling,
    ) {
        self.ids.push(id);
        self.logprobs.push(logprob);
        self.stop_reason = if stop.ids.contains(&id) {
            Some(StopReason::StopToken)
        } else if stop.is_string_completed_by(id, &mut self.tail) {
            Some(StopReason::StopString)
        } else if self.drawn() >= sampling.max_new_tokens {
            Some(StopReason::Length)
        } else {
            None
        };
    }
}

/// Properties of a model's layers that the schedule depends on.
#[derive(Debug, Default)]
pub(super) struct LayerNeeds {
    /// The window of each layer; `None` for a layer that sees all positions.
    pub(super) windows: Vec<Option<usize>>,
    /// Lengths above which a sequence has other rotary frequencies.
    pub(super) length_limits: Vec<usize>,
}

/// The running sequences, the waiting prompts and the pages.
#[derive(Debug)]
pub(super) struct Schedule<'a> {
    prompts: &'a [Vec<u32>],
    /// Index of the first waiting prompt.
    next: usize,
    pub(super) running: Vec<Sequence>,
    /// The groups of layers with different windows.
    pub(super) groups: Vec<LayerGroup>,
    /// Index of the group of each layer.
    pub(super) layer_groups: Vec<usize>,
    length_limits: Vec<usize>,
    max_new_tokens: usize,
    limits: &'a BatchLimits,
}

impl<'a> Schedule<'a> {
    /// Makes a schedule that runs no sequence yet.
    pub(super) fn new(
        prompts: &'a [Vec<u32>],
        max_new_tokens: usize,
        layers: &LayerNeeds,
        limits: &'a BatchLimits,
    ) -> Self {
        // The last token of an answer needs no position in the cache.
        let lengths = prompts.iter().map(|ids| ids.len() + max_new_tokens - 1);
        let longest = lengths.clone().max().unwrap_or(0);
        let mut windows = Vec::new();
        let mut layer_groups = Vec::new();
        for window in &layers.windows {
            let window = window.filter(|window| *window < longest);
            let group = windows.iter().position(|other| *other == window);
            layer_groups.push(group.unwrap_or(windows.len()));
            if group.is_none() {
                windows.push(window);
            }
        }
        let group = |window| {
            LayerGroup::new(
                window,
                limits.page_size,
                lengths.clone(),
                limits.cache_tokens,
                limits.prefill_rows,
            )
        };
        Self {
            prompts,
            next: 0,
            running: Vec::new(),
            groups: windows.into_iter().map(group).collect(),
            layer_groups,
            length_limits: layers.length_limits.clone(),
            max_new_tokens,
            limits,
        }
    }

    /// Admits prompts in order, while there is room for all positions that the next one may need.
    fn admit(&mut self) {
        while self.running.len() < self.limits.sequences {
            let Some(prompt) = self.prompts.get(self.next) else {
                return;
            };
            let longest = prompt.len() + self.max_new_tokens;
            let (shared, source) = self.longest_shared(prompt, longest);
            let source = source.and_then(|source| self.running.get(source));
            let length = longest - 1;
            if !(self.groups.iter()).all(|group| group.has_room(length, shared)) {
                return;
            }
            let groups = self.groups.iter_mut().enumerate();
            let pages = groups.map(|(index, group)| {
                let source = source.and_then(|source| source.pages.get(index));
                group.admit(length, shared, source)
            });
            let mut sequence = Sequence {
                prompt: self.next,
                ids: prompt.clone(),
                pages: pages.collect(),
                longest,
                prompt_tokens: prompt.len(),
                cached: shared,
                source: source.map(|source| source.prompt),
                logprobs: Vec::new(),
                tail: Vec::new(),
                stop_reason: None,
            };
            sequence.adopt_pages(&self.running, &mut self.groups);
            self.running.push(sequence);
            self.next += 1;
        }
    }

    /// Returns the largest number of positions that a prompt can share with a running sequence, and the sequence's index.
    fn longest_shared(&self, prompt: &[u32], longest: usize) -> (usize, Option<usize>) {
        let mut best = (0, None);
        for (index, sequence) in self.running.iter().enumerate() {
            let mut limits = self.length_limits.iter();
            if limits.any(|limit| (longest > *limit) != (sequence.longest > *limit)) {
                continue;
            }
            let shared = sequence.shared_with(prompt, self.limits.page_size, &self.groups);
            if shared > best.0 {
                best = (shared, Some(index));
            }
        }
        best
    }

    /// Returns the rows of the next step; none if all answers have ended.
    pub(super) fn rows(&mut self) -> Vec<StepRow> {
        self.admit();
        let mut rows = Vec::new();
        let mut prefill_left = self.limits.prefill_rows;
        for index in 0..self.running.len() {
            let (earlier, later) = self.running.split_at_mut(index);
            let Some(sequence) = later.first_mut() else {
                break;
            };
            sequence.adopt_pages(earlier, &mut self.groups);
            let mut taken = sequence.ids.len() - sequence.cached;
            if sequence.drawn() == 0 {
                taken = taken.min(prefill_left);
                prefill_left -= taken;
            }
            // A sequence whose pages are not written yet comes after the one that writes them, which takes all rows.
            if taken == 0 || sequence.source.is_some() {
                continue;
            }
            let (from, end) = (sequence.cached, sequence.cached + taken);
            for (group, pages) in self.groups.iter_mut().zip(&mut sequence.pages) {
                group.advance(pages, from, end);
            }
            let ids = sequence.ids.iter().enumerate().take(end).skip(from);
            rows.extend(ids.map(|(position, id)| StepRow {
                id: *id,
                position,
                sequence: index,
            }));
            sequence.cached = end;
        }
        rows
    }

    /// Removes the sequences that have ended, and moves their answers to `answers`.
    pub(super) fn remove_ended(&mut self, answers: &mut [GeneratedAnswer]) {
        let groups = &mut self.groups;
        self.running.retain_mut(|sequence| {
            let Some(stop_reason) = sequence.stop_reason else {
                return true;
            };
            for (group, pages) in groups.iter_mut().zip(&sequence.pages) {
                group.release(pages);
            }
            if let Some(answer) = answers.get_mut(sequence.prompt) {
                *answer = GeneratedAnswer {
                    ids: sequence.ids.split_off(sequence.prompt_tokens),
                    logprobs: std::mem::take(&mut sequence.logprobs),
                    stop_reason,
                };
            }
            false
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Runs a schedule with a cache that holds, in each slot, the text up to the position that was written there.
    struct Simulation<'a> {
        schedule: Schedule<'a>,
        windows: Vec<Option<usize>>,
        page_size: usize,
        /// The slots of each group of layers.
        slots: Vec<HashMap<usize, Vec<u32>>>,
        answers: Vec<GeneratedAnswer>,
        max_new_tokens: usize,
        /// Number of rows of prompts that were computed.
        prompt_rows: usize,
        /// Largest number of pages of each group in use at the end of a step.
        most_pages: Vec<usize>,
    }

    impl<'a> Simulation<'a> {
        fn new(
            prompts: &'a [Vec<u32>],
            max_new_tokens: usize,
            needs: &LayerNeeds,
            limits: &'a BatchLimits,
        ) -> Self {
            let schedule = Schedule::new(prompts, max_new_tokens, needs, limits);
            let groups = schedule.groups.len();
            let mut windows = vec![None; groups];
            for (window, group) in needs.windows.iter().zip(&schedule.layer_groups) {
                windows[*group] = *window;
            }
            let unset = GeneratedAnswer {
                ids: Vec::new(),
                logprobs: Vec::new(),
                stop_reason: StopReason::Length,
            };
            Self {
                schedule,
                windows,
                page_size: limits.page_size,
                slots: vec![HashMap::new(); groups],
                answers: vec![unset; prompts.len()],
                max_new_tokens,
                prompt_rows: 0,
                most_pages: vec![0; groups],
            }
        }

        fn slot(&self, group: usize, row: &StepRow, position: usize) -> usize {
            let pages = &self.schedule.running[row.sequence].pages[group];
            let index = position - pages.first;
            pages.pages[index / self.page_size] as usize * self.page_size + index % self.page_size
        }

        /// Runs all prompts and checks that every row finds the texts of the positions that it sees. `next` returns the
        /// next token of a sequence; 0 ends an answer.
        fn run(mut self, next: impl Fn(&Sequence) -> u32) -> Self {
            let sampling = Sampling {
                max_new_tokens: self.max_new_tokens,
                ..Sampling::default()
            };
            loop {
                let rows = self.schedule.rows();
                if rows.is_empty() {
                    return self;
                }
                for group in 0..self.slots.len() {
                    self.compute(group, &rows);
                }
                let running = self.schedule.running.iter_mut();
                for sequence in running.filter(|sequence| sequence.is_drawing()) {
                    let id = next(sequence);
                    sequence.push((id, 0.0), &StopConditions::at(&[0]), &sampling);
                }
                self.schedule.remove_ended(&mut self.answers);
            }
        }

        fn compute(&mut self, group: usize, rows: &[StepRow]) {
            for row in rows {
                let slot = self.slot(group, row, row.position);
                let sequence = &self.schedule.running[row.sequence];
                let text = sequence.ids[..=row.position].to_vec();
                assert_eq!(text.last(), Some(&row.id));
                self.slots[group].insert(slot, text);
                self.prompt_rows += usize::from(group == 0 && sequence.drawn() == 0);
            }
            for row in rows {
                let window = self.windows[group].unwrap_or(usize::MAX);
                let ids = &self.schedule.running[row.sequence].ids;
                for position in (row.position + 1).saturating_sub(window)..=row.position {
                    let slot = self.slot(group, row, position);
                    assert_eq!(self.slots[group].get(&slot).unwrap(), &ids[..=position]);
                }
            }
            let used = self.schedule.groups[group].used_pages();
            self.most_pages[group] = self.most_pages[group].max(used);
        }
    }

    /// A token that follows from a sequence's text and prompt, and is 0 now and then.
    fn some_token(sequence: &Sequence) -> u32 {
        let mix = |sum: u32, id: &u32| sum.wrapping_mul(31).wrapping_add(*id);
        let mixed = sequence.ids.iter().fold(sequence.prompt as u32 + 7, mix);
        mixed.wrapping_mul(0x85EB_CA6B) >> 27
    }

    fn limits(
        cache_tokens: usize,
        sequences: usize,
        prefill_rows: usize,
        page_size: usize,
    ) -> BatchLimits {
        BatchLimits {
            cache_tokens,
            sequences,
            prefill_rows,
            page_size,
        }
    }

    fn text(seed: u32, length: u32) -> Vec<u32> {
        (0..length)
            .map(|t| (seed * 7919 + t * t * 31 + t * 17 + 5) % 97)
            .collect()
    }

    /// Prompts with equal beginnings of many lengths, and equal prompts.
    fn prompts() -> Vec<Vec<u32>> {
        let mut prompts: Vec<Vec<u32>> = (0..6).map(|i| text(i, 1 + i * 9)).collect();
        for length in [40, 40, 41, 17, 40, 33] {
            prompts.push(text(3, length));
        }
        for seed in 10..14 {
            prompts.push([text(3, 24), text(seed, 6)].concat());
        }
        prompts.extend([text(20, 64), text(20, 64), text(20, 65), text(20, 64)]);
        prompts
    }

    fn needs(windows: &[Option<usize>]) -> LayerNeeds {
        LayerNeeds {
            windows: windows.to_vec(),
            length_limits: Vec::new(),
        }
    }

    #[test]
    fn every_row_sees_the_text_before_it() {
        let prompts = prompts();
        let windows: [&[Option<usize>]; 6] = [
            &[None],
            &[Some(1)],
            &[Some(8), None, Some(8)],
            &[Some(5), Some(16)],
            &[None, Some(30), Some(3)],
            &[Some(1000), None],
        ];
        for windows in windows {
            let mut expected: Option<Vec<GeneratedAnswer>> = None;
            for page_size in [1, 3, 4, 16, 100] {
                for (cache_tokens, sequences, prefill_rows) in [
                    (1 << 15, 64, 512),
                    (0, 64, 512),
                    (0, 3, 1),
                    (300, 7, 20),
                    (150, 64, 33),
                ] {
                    let limits = limits(cache_tokens, sequences, prefill_rows, page_size);
                    let simulation = Simulation::new(&prompts, 30, &needs(windows), &limits);
                    let Simulation {
                        schedule, answers, ..
                    } = simulation.run(some_token);
                    let mut groups = schedule.groups.iter();
                    assert!(
                        groups.all(|group| group.used_pages() == 0),
                        "{windows:?} {limits:?}"
                    );
                    assert!(answers.iter().all(|answer| !answer.ids.is_empty()));
                    let expected = expected.get_or_insert_with(|| answers.clone());
                    assert_eq!(expected, &answers, "{windows:?} {limits:?}");
                }
            }
        }
    }

    #[test]
    fn a_layer_with_a_window_holds_few_pages_of_a_long_answer() {
        let prompts = vec![text(1, 200), text(2, 5), text(3, 90)];
        let limits = limits(1 << 15, 64, 32, 4);
        let needs = needs(&[None, Some(16)]);
        // No answer ends early.
        let simulation = Simulation::new(&prompts, 400, &needs, &limits).run(|_| 1);
        assert!(
            simulation
                .answers
                .iter()
                .all(|answer| answer.ids.len() == 400)
        );
        // 16 positions are on at most five pages, and a step computes at most eight pages of prompts.
        let [all, few] = simulation.most_pages[..] else {
            panic!("there are two groups");
        };
        let needed: usize = [200 + 399, 5 + 399, 90 + 399]
            .map(|n: usize| n.div_ceil(4))
            .iter()
            .sum();
        assert!(all > needed * 9 / 10 && all <= needed, "{all} {needed}");
        assert!(few <= 3 * 5 + 8 + 3, "{few}");
        let pools = simulation.schedule.groups[1].page_count();
        assert_eq!(pools, 3 * (4 + 2) + 8);
    }

    /// Returns the number of rows of prompts that were computed.
    fn prompt_rows(prompts: &[Vec<u32>], needs: &LayerNeeds, limits: &BatchLimits) -> usize {
        let simulation = Simulation::new(prompts, 20, needs, limits);
        simulation.run(some_token).prompt_rows
    }

    #[test]
    fn samples_of_one_prompt_share_its_whole_pages() {
        let samples = vec![text(5, 70); 8];
        for windows in [&[None] as &[_], &[Some(12), None], &[Some(12)], &[Some(50)]] {
            for prefill_rows in [512, 24, 10] {
                let limits = limits(1 << 15, 64, prefill_rows, 4);
                // The page of the last two tokens is computed for each sample.
                let rows = prompt_rows(&samples, &needs(windows), &limits);
                assert_eq!(rows, 70 + 7 * 2, "{windows:?} {prefill_rows}");
            }
        }
        // A part of the beginning is shared, too, even if it lies behind the window when the first prompt is complete.
        let alike: Vec<_> = (0..5)
            .map(|i| [text(5, 40), text(50 + i, 60)].concat())
            .collect();
        for windows in [&[None] as &[_], &[Some(12), None]] {
            let rows = prompt_rows(&alike, &needs(windows), &limits(1 << 15, 64, 25, 4));
            assert_eq!(rows, 100 + 4 * 60, "{windows:?}");
        }
        // One sequence at a time shares nothing.
        let rows = prompt_rows(&samples, &needs(&[Some(12), None]), &limits(0, 1, 512, 4));
        assert_eq!(rows, 8 * 70);
    }

    #[test]
    fn sequences_with_different_rotary_frequencies_share_nothing() {
        let prompts = [text(5, 40), text(5, 41), text(5, 42), text(5, 43)];
        let mut needs = needs(&[None]);
        let limits = limits(1 << 15, 64, 512, 4);
        assert_eq!(prompt_rows(&prompts, &needs, &limits), 40 + 1 + 2 + 3);
        // With 20 new tokens, the last two become longer than 61.
        needs.length_limits = vec![61];
        assert_eq!(prompt_rows(&prompts, &needs, &limits), 40 + 1 + 42 + 3);
    }

    #[test]
    fn a_prompt_of_whole_pages_computes_its_last_page() {
        let prompts = [vec![1, 2, 3, 4], vec![1, 2, 3, 4], vec![1, 2, 3, 4, 5]];
        let limits = limits(1 << 15, 64, 512, 4);
        assert_eq!(prompt_rows(&prompts, &needs(&[None]), &limits), 4 + 4 + 1);
    }
}
