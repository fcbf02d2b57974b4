//! The tasks of a parallel loop, shared by threads that stay awake from one loop to the next.
//!
//! A step of training or generation has hundreds of parallel loops that take less than a millisecond each. Rayon's
//! threads fall asleep some microseconds after a loop, and waking one takes longer than many of these loops, on
//! virtual machines above all. So the threads of the pool become *helpers*: from the first loop on, they watch for
//! the next one, and return to rayon when there has been none for [`MAX_IDLE`]. Meanwhile they also take rayon's
//! own jobs.
//!
//! The thread that reaches a loop opens it, takes tasks as the helpers do, and waits until the last one is done.
//! Each thread begins with a part of its own, in order, so that it reads neighbouring memory, and then takes what is
//! left of the other parts. Which thread takes a task is left to chance, so the result of a task must not depend on
//! the thread.

// The tasks are a closure on the stack of the thread that opened the loop.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rayon::Yield;
use rayon::prelude::*;

/// Time without work after which a helper returns to rayon, which lets the thread sleep.
const MAX_IDLE: Duration = Duration::from_millis(2);
/// Looks for work between two checks of the clock.
const LOOKS_PER_CHECK: u32 = 64;

/// Runs tasks on the pool's threads if `threads` is above 1, and one after another otherwise.
pub(crate) fn run_tasks(tasks: usize, threads: usize, run: impl Fn(usize) + Send + Sync) {
    if threads < 2 || tasks < 2 || IS_IN_TASK.get() {
        (0..tasks).for_each(run);
    } else if !Team::current().is_some_and(|team| team.run(tasks, &run)) {
        (0..tasks).into_par_iter().with_max_len(1).for_each(run);
    }
}

/// Runs tasks as [`run_tasks`] does, on all threads of the pool, and returns their results in order.
pub(crate) fn map_tasks<T: Send>(tasks: usize, run: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
    let mut results: Vec<Option<T>> = (0..tasks).map(|_| None).collect();
    for_each_chunk(&mut results, 1, |task, result| result[0] = Some(run(task)));
    results.into_iter().flatten().collect()
}

/// Runs tasks as [`map_tasks`] does. Tasks that run at the same time get different buffers, which are used again.
pub(crate) fn map_tasks_with<B: Send, T: Send>(
    tasks: usize,
    new_buffers: impl Fn() -> B + Send + Sync,
    run: impl Fn(&mut B, usize) -> T + Send + Sync,
) -> Vec<T> {
    let unused = Mutex::new(Vec::new());
    map_tasks(tasks, |task| {
        let taken = unused.lock().ok().and_then(|mut unused| unused.pop());
        let mut buffers = taken.unwrap_or_else(&new_buffers);
        let result = run(&mut buffers, task);
        if let Ok(mut unused) = unused.lock() {
            unused.push(buffers);
        }
        result
    })
}

/// Calls `run` with the index of each chunk of `len` elements and the chunk, on all threads of the pool.
pub(crate) fn for_each_chunk<T: Send>(
    out: &mut [T],
    len: usize,
    run: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    let chunks = DisjointChunks::new(out, len);
    run_tasks(chunks.count(), rayon::current_num_threads(), |task| {
        // SAFETY: each task runs once.
        run(task, unsafe { chunks.get(task) });
    });
}

/// The chunks of a slice, which the tasks of a loop write, each its own.
pub(crate) struct DisjointChunks<'a, T> {
    start: *mut T,
    total: usize,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

impl<'a, T> DisjointChunks<'a, T> {
    /// Divides `slice` into chunks of `len` elements; the last one may be shorter.
    pub(crate) fn new(slice: &'a mut [T], len: usize) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            total: slice.len(),
            len: len.max(1),
            slice: PhantomData,
        }
    }

    /// Number of chunks.
    pub(crate) fn count(&self) -> usize {
        self.total.div_ceil(self.len)
    }

    /// Returns a chunk.
    ///
    /// # Safety
    /// No two chunks that are used at the same time may have the same index.
    // The threads share `self` and write to different chunks, which the caller promises.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn get(&self, index: usize) -> &mut [T] {
        let first = index * self.len;
        let len = self.len.min(self.total.saturating_sub(first));
        assert!(len > 0, "chunk {index} of {}", self.count());
        // SAFETY: the chunk is within the slice, which is borrowed exclusively, and the caller guarantees that nothing else
        // uses the chunk.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

// SAFETY: each chunk is used by one task at a time, and its elements may be sent to the task's thread.
unsafe impl<T: Send> Sync for DisjointChunks<'_, T> {}

thread_local! {
    static TEAM: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
    /// Whether the thread runs a task. A loop within a task is not divided.
    static IS_IN_TASK: Cell<bool> = const { Cell::new(false) };
    static IS_HELPER: Cell<bool> = const { Cell::new(false) };
}

/// Tasks of a loop. Each part has cache lines of its own.
#[derive(Default)]
#[repr(align(128))]
struct TeamPart {
    next_task: AtomicUsize,
    end: AtomicUsize,
}

/// The threads of a pool that share loops. One loop is open at a time.
#[derive(Default)]
struct Team {
    /// Whether a thread has opened a loop that is not finished.
    is_taken: AtomicBool,
    /// Whether helpers were called and none has returned to rayon since.
    has_helpers: AtomicBool,
    is_open: AtomicBool,
    /// Number of loops so far.
    loops: AtomicUsize,
    /// The tasks that each thread of the pool begins with.
    parts: Vec<TeamPart>,
    /// Number of helpers that may read `work`.
    inside: AtomicUsize,
    work: UnsafeCell<Option<*const (dyn Fn(usize) + Sync)>>,
    /// The panic of a helper's task, if one panicked.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `work` is written only by the thread that has set `is_taken`, while the loop is closed and no helper is
// inside, and read by helpers that are inside. It refers to a closure that is `Sync` and outlives the loop.
unsafe impl Sync for Team {}
// SAFETY: as above; everything else is `Send`.
unsafe impl Send for Team {}

impl Team {
    /// The team of the pool that this thread belongs to; `None` outside of a pool.
    fn current() -> Option<Arc<Self>> {
        rayon::current_thread_index()?;
        TEAM.with_borrow_mut(|team| Some(Arc::clone(team.get_or_insert_with(Self::of_pool))))
    }

    fn of_pool() -> Arc<Self> {
        let threads = 0..rayon::current_num_threads();
        Arc::new(Self {
            parts: threads.map(|_| TeamPart::default()).collect(),
            ..Self::default()
        })
    }

    /// Runs a loop, or returns `false` if another one is open.
    fn run(self: &Arc<Self>, tasks: usize, work: &(dyn Fn(usize) + Sync)) -> bool {
        if self.is_taken.swap(true, Ordering::Acquire) {
            return false;
        }
        if !self.has_helpers.swap(true, Ordering::AcqRel) {
            self.call_helpers();
        }
        let open = OpenLoop::new(self, tasks, work);
        self.take_tasks(work);
        drop(open);
        true
    }

    /// Asks the pool's other threads to help.
    fn call_helpers(self: &Arc<Self>) {
        let (team, caller) = (Arc::clone(self), rayon::current_thread_index());
        rayon::spawn_broadcast(move |context| {
            if Some(context.index()) != caller && !IS_HELPER.replace(true) {
                TEAM.with_borrow_mut(|own| _ = own.get_or_insert_with(|| Arc::clone(&team)));
                team.help();
                IS_HELPER.set(false);
            }
        });
    }

    /// Takes part in loops until there has been none for a while.
    fn help(&self) {
        let (mut last_work, mut looks, mut last_loop) = (Instant::now(), 0u32, 0);
        loop {
            if self.is_open.load(Ordering::Acquire) {
                // A loop that this thread has left has no tasks any more.
                let current = self.loops.load(Ordering::Relaxed);
                if current != last_loop {
                    self.enter();
                    (last_work, looks, last_loop) = (Instant::now(), 0, current);
                }
            }
            looks += 1;
            std::hint::spin_loop();
            if looks.is_multiple_of(LOOKS_PER_CHECK) {
                match rayon::yield_now() {
                    Some(Yield::Executed) => last_work = Instant::now(),
                    // Other programs' threads get the processor if they wait for it.
                    _ => std::thread::yield_now(),
                }
                if last_work.elapsed() > MAX_IDLE {
                    break;
                }
            }
        }
        self.has_helpers.store(false, Ordering::Release);
    }

    /// Takes tasks of the loop, unless it was closed meanwhile.
    fn enter(&self) {
        // The owner closes the loop before it looks at `inside`, in one order that all threads see. So either the helper
        // sees that the loop is closed, or the owner sees the helper.
        self.inside.fetch_add(1, Ordering::SeqCst);
        if self.is_open.load(Ordering::SeqCst) {
            // SAFETY: the owner wrote the work before it opened the loop, and waits until no helper is inside.
            let work = unsafe { (*self.work.get()).map(|work| &*work) };
            if let Some(work) = work
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_tasks(work)))
                && let Ok(mut first) = self.panic.lock()
            {
                first.get_or_insert(panic);
            }
        }
        self.inside.fetch_sub(1, Ordering::Release);
    }

    /// Runs tasks until none is left.
    fn take_tasks(&self, work: &(dyn Fn(usize) + Sync)) {
        struct InTask;
        impl Drop for InTask {
            fn drop(&mut self) {
                IS_IN_TASK.set(false);
            }
        }
        IS_IN_TASK.set(true);
        let _in_task = InTask;
        let own = rayon::current_thread_index().unwrap_or(0) % self.parts.len().max(1);
        let (before, from_own) = self.parts.split_at(own);
        for part in from_own.iter().chain(before) {
            let end = part.end.load(Ordering::Relaxed);
            loop {
                let task = part.next_task.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                work(task);
            }
        }
    }
}

/// A loop that its thread has opened. Dropping it closes the loop and waits for the helpers.
struct OpenLoop<'a>(&'a Team);

impl<'a> OpenLoop<'a> {
    fn new(team: &'a Team, tasks: usize, work: &(dyn Fn(usize) + Sync)) -> Self {
        let work: *const (dyn Fn(usize) + Sync + '_) = work;
        // SAFETY: only the lifetime differs. The closure is used by helpers inside the loop alone, and `drop` waits for
        // them.
        let work: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(work) };
        // SAFETY: this thread owns the team, the loop is closed, and no helper is inside.
        unsafe { *team.work.get() = Some(work) };
        let parts = team.parts.len();
        for (index, part) in team.parts.iter().enumerate() {
            part.next_task
                .store(tasks * index / parts, Ordering::Relaxed);
            part.end
                .store(tasks * (index + 1) / parts, Ordering::Relaxed);
        }
        team.loops.fetch_add(1, Ordering::Relaxed);
        team.is_open.store(true, Ordering::Release);
        Self(team)
    }
}

impl Drop for OpenLoop<'_> {
    fn drop(&mut self) {
        let team = self.0;
        // After a panic of this thread, helpers begin no further task.
        if std::thread::panicking() {
            for part in &team.parts {
                part.next_task.store(usize::MAX / 2, Ordering::Relaxed);
            }
        }
        team.is_open.store(false, Ordering::SeqCst);
        let mut looks = 0u32;
        while team.inside.load(Ordering::SeqCst) > 0 {
            looks += 1;
            std::hint::spin_loop();
            if looks.is_multiple_of(LOOKS_PER_CHECK) {
                std::thread::yield_now();
            }
        }
        let panic = team.panic.lock().ok().and_then(|mut panic| panic.take());
        team.is_taken.store(false, Ordering::Release);
        if let Some(panic) = panic
            && !std::thread::panicking()
        {
            resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(work)
    }

    #[test]
    fn every_task_of_many_loops_runs_once() {
        for threads in [1, 2, 4] {
            in_pool(threads, || {
                for tasks in (0..400).chain([10_000]) {
                    let squares = map_tasks(tasks, |task| task * task);
                    assert!(squares.into_iter().eq((0..tasks).map(|task| task * task)));
                }
            });
        }
    }

    #[test]
    fn helpers_that_fell_asleep_are_called_again() {
        in_pool(3, || {
            for _ in 0..5 {
                let seen = Mutex::new(std::collections::BTreeSet::new());
                run_tasks(60, 3, |_| {
                    std::thread::sleep(Duration::from_millis(1));
                    seen.lock().unwrap().insert(rayon::current_thread_index());
                });
                assert!(seen.into_inner().unwrap().len() > 1);
                std::thread::sleep(MAX_IDLE * 3);
            }
        });
    }

    #[test]
    fn loops_within_tasks_and_loops_of_other_threads_are_complete() {
        let sum = |n: usize| map_tasks(n, |task| task).into_iter().sum::<usize>();
        in_pool(4, || {
            let sums = map_tasks(50, sum);
            assert!(
                sums.into_iter()
                    .eq((0..50).map(|n: usize| n * n.saturating_sub(1) / 2))
            );
            let sums: Vec<usize> = (0..500).into_par_iter().with_max_len(1).map(sum).collect();
            assert!(
                sums.into_iter()
                    .eq((0..500).map(|n: usize| n * n.saturating_sub(1) / 2))
            );
        });
    }

    #[test]
    fn a_panic_of_any_task_reaches_the_caller() {
        in_pool(4, || {
            for panicking in 0..200 {
                let run = || {
                    run_tasks(200, 4, |task| assert!(task != panicking, "task {task}"));
                };
                assert!(catch_unwind(run).is_err());
                assert_eq!(map_tasks(3, |task| task), [0, 1, 2]);
            }
        });
    }

    #[test]
    fn chunks_have_their_length_and_index() {
        in_pool(2, || {
            let mut numbers = vec![0; 1003];
            for_each_chunk(&mut numbers, 100, |index, chunk| {
                assert_eq!(chunk.len(), if index == 10 { 3 } else { 100 });
                chunk.fill(index);
            });
            assert!((0..1003).all(|at| numbers[at] == at / 100));
            for_each_chunk(&mut [0u8; 0], 5, |_, _| unreachable!());
        });
    }
}
