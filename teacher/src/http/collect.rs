//! Completes calls over HTTP within limits on concurrency, spending and attempts.
//!
//! [`collect`] runs the caller's callbacks on the caller's thread; the dispatcher ([`dispatch`]) sends requests on
//! another. They exchange orders and events over channels.

mod dispatch;
mod event;
mod retry;

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use self::dispatch::Dispatcher;
use self::event::{Order, SharedState};
use super::Call;
use super::settings::ClientSettings;
use crate::Error;

pub use self::event::{
    CallEvent, CallbackError, CollectProgress, CollectionEnd, CompletedCall, Reservation,
};

/// Threads that send and receive. Large responses are parsed on a pool with a thread for each processor.
const WORKERS: usize = 2;

/// Longest wait for an event before the caller's wish to stop is checked again.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Time between two calls of `show_progress`.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Number of open calls above which events are gathered for [`GROUP_DELAY`], so that a group is worth a disk sync.
const MANY_OPEN_CALLS: u64 = 64;

/// Time for which events are gathered.
const GROUP_DELAY: Duration = Duration::from_millis(5);

/// Number of events after which a group is handed over without waiting for more.
const MAX_GROUP_EVENTS: usize = 1024;

/// Largest number of calls that are taken from the caller between two looks at the events.
const MAX_NEW_CALLS: usize = 256;

/// Completes every call that `next_call` gives.
///
/// `next_call`, `handle_events`, `show_progress` and `should_stop` run on the caller's thread. `next_call` is called
/// when a call can be sent soon, so that the calls need not be held in memory. `reserve` runs on another thread before
/// a request's first byte is sent; its error ends the collection. `handle_events` is given groups of events, which
/// count as kept once it returns. After it returns `Break(why)`, and once `should_stop` is true, nothing new is sent
/// and the requests in flight are still completed. `show_progress` is called about five times a second.
///
/// # Errors
/// Settings that cannot work, an error of one of the callbacks, or a runtime that does not start.
pub fn collect(
    settings: &ClientSettings,
    next_call: &mut dyn FnMut() -> Result<Option<Call>, CallbackError>,
    reserve: &(dyn Fn(&Reservation) -> std::io::Result<()> + Sync),
    handle_events: &mut dyn FnMut(Vec<CallEvent>) -> Result<ControlFlow<String>, CallbackError>,
    show_progress: &mut dyn FnMut(&CollectProgress),
    should_stop: &dyn Fn() -> bool,
) -> Result<CollectionEnd, Error> {
    let clients = settings.clients()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(thread::available_parallelism().map_or(WORKERS, |n| n.get()))
        .enable_all()
        .build()
        .map_err(|source| Error::Caller {
            what: "the threads that send requests cannot be started",
            source: source.into(),
        })?;
    let shared = SharedState::new(settings);
    let (orders, orders_in) = unbounded_channel();
    let (events_out, events) = std::sync::mpsc::channel();
    let (caller_result, dispatcher_result) = thread::scope(|scope| {
        let dispatcher = scope.spawn(|| {
            let dispatcher = Dispatcher::new(settings, clients, reserve, &shared);
            runtime.block_on(dispatcher.run(orders_in, events_out))
        });
        let caller = CallerSide {
            orders: &orders,
            events: &events,
            shared: &shared,
            open: 0,
            takes_calls: true,
            stopped_by_handler: None,
            read_error: None,
        };
        let result = caller.run(next_call, handle_events, show_progress, should_stop);
        drop(orders);
        (result, dispatcher.join())
    });
    // After an error nothing waits for the requests in flight.
    runtime.shutdown_background();
    let stopped_by_handler = caller_result?;
    let end = dispatcher_result.map_err(|_| Error::Collection {
        why: "the dispatcher's thread panicked, which is a bug in Potstill; completed calls are kept\nhint: run again to complete the rest".into(),
    })??;
    Ok(stopped_by_handler.map_or(end, |why| CollectionEnd::StoppedByCaller { why }))
}

/// State of the loop on the caller's thread.
struct CallerSide<'a> {
    orders: &'a UnboundedSender<Order>,
    events: &'a Receiver<Vec<CallEvent>>,
    shared: &'a SharedState,
    /// Calls that the dispatcher was given and that are not completed.
    open: u64,
    takes_calls: bool,
    /// Reason of the event handler that ended the collection.
    stopped_by_handler: Option<String>,
    /// Error of `next_call`.
    read_error: Option<CallbackError>,
}

impl CallerSide<'_> {
    /// Gives calls to the dispatcher and events to the caller until the dispatcher ends. Returns the event handler's
    /// reason if it ended the collection.
    fn run(
        mut self,
        next_call: &mut dyn FnMut() -> Result<Option<Call>, CallbackError>,
        handle_events: &mut dyn FnMut(Vec<CallEvent>) -> Result<ControlFlow<String>, CallbackError>,
        show_progress: &mut dyn FnMut(&CollectProgress),
        should_stop: &dyn Fn() -> bool,
    ) -> Result<Option<String>, Error> {
        let mut shown = Instant::now();
        loop {
            // Also once all calls are taken: those that are not sent yet need not be.
            if should_stop() {
                self.stop();
            }
            if self.takes_calls {
                self.give_calls(next_call);
            }
            match self.next_group() {
                Ok(Some(group)) => self.hand_over(group, handle_events)?,
                Ok(None) => {}
                Err(DispatcherEnded) => break,
            }
            if shown.elapsed() >= PROGRESS_INTERVAL {
                shown = Instant::now();
                self.show(show_progress);
            }
        }
        self.show(show_progress);
        match self.read_error {
            Some(source) => Err(Error::Caller {
                what: "cannot read the next prompt",
                source,
            }),
            None => Ok(self.stopped_by_handler),
        }
    }

    fn stop(&mut self) {
        self.takes_calls = false;
        self.send(Order::Stop);
    }

    fn send(&self, order: Order) {
        // If the dispatcher has ended, its own result says why.
        drop(self.orders.send(order));
    }

    fn show(&self, show_progress: &mut dyn FnMut(&CollectProgress)) {
        let progress = *self.shared.progress();
        show_progress(&progress);
    }

    /// Takes as many calls from the caller as the dispatcher has capacity for.
    fn give_calls(&mut self, next_call: &mut dyn FnMut() -> Result<Option<Call>, CallbackError>) {
        let capacity = self.shared.capacity.load(Ordering::Relaxed);
        let mut calls = Vec::new();
        let mut has_more = true;
        while has_more && self.open + (calls.len() as u64) < capacity && calls.len() < MAX_NEW_CALLS
        {
            match next_call() {
                Ok(Some(call)) => calls.push(call),
                Ok(None) => has_more = false,
                Err(source) => {
                    self.read_error = Some(source);
                    return self.stop();
                }
            }
        }
        if !calls.is_empty() {
            self.open += calls.len() as u64;
            self.send(Order::Calls(calls));
        }
        if !has_more {
            self.takes_calls = false;
            self.send(Order::NoMore);
        }
    }

    /// Waits for events. With many open calls it waits a little longer, so that a group is worth a disk sync.
    fn next_group(&self) -> Result<Option<Vec<CallEvent>>, DispatcherEnded> {
        let mut group = match self.events.recv_timeout(POLL_INTERVAL) {
            Ok(group) => group,
            Err(RecvTimeoutError::Timeout) => return Ok(None),
            Err(RecvTimeoutError::Disconnected) => return Err(DispatcherEnded),
        };
        if self.open > MANY_OPEN_CALLS {
            thread::sleep(GROUP_DELAY);
        }
        while group.len() < MAX_GROUP_EVENTS
            && let Ok(more) = self.events.try_recv()
        {
            group.extend(more);
        }
        Ok(Some(group))
    }

    fn hand_over(
        &mut self,
        group: Vec<CallEvent>,
        handle_events: &mut dyn FnMut(Vec<CallEvent>) -> Result<ControlFlow<String>, CallbackError>,
    ) -> Result<(), Error> {
        let completed = group
            .iter()
            .filter(|event| matches!(event, CallEvent::Completed(_)));
        self.open = self.open.saturating_sub(completed.count() as u64);
        let flow = handle_events(group).map_err(|source| Error::Caller {
            what: "cannot store the answers that were received",
            source,
        })?;
        if let ControlFlow::Break(why) = flow {
            self.stopped_by_handler.get_or_insert(why);
            self.stop();
        }
        Ok(())
    }
}

/// The dispatcher has closed the channel of events.
struct DispatcherEnded;
