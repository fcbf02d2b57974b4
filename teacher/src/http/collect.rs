//! The loop that asks for every call until it has landed: bounded in flight, in cost and in tries.

mod dispatch;
mod judge;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use self::dispatch::Dispatch;
use super::transport::Line;
use super::{
    Asking, Attempt, Billed, Call, Caps, Endpoint, Failure, OnBreak, OnLength, Price, Reply, Spent,
    Timeouts,
};
use crate::Error;

/// Threads that send and receive. Large replies are read by as many others as there are processors.
const WORKERS: usize = 2;

/// Longest wait for something to come before the caller's wishes are asked again.
const TICK: Duration = Duration::from_millis(20);

/// Time between two looks at the progress.
const WATCH: Duration = Duration::from_millis(200);

/// Where more calls than this are open, a group of events is waited for a little.
const MANY: u64 = 64;

/// That little.
const LINGER: Duration = Duration::from_millis(5);

/// Events after which a group is handed over, whatever else has come.
const MOST_EVENTS: usize = 1024;

/// Calls that are taken before what came is looked at again.
const MOST_CALLS: usize = 256;

/// Everything a collection is told before it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What every request has in common.
    pub asking: Asking,
    /// Whom to ask; at least one.
    pub endpoints: Vec<Endpoint>,
    /// How long each part of a request may take.
    pub timeouts: Timeouts,
    /// Requests for one call at most, before its failure lands. Connections that do not come about are not
    /// counted: they say nothing of the call, and put the endpoint down in the end.
    pub attempts: u32,
    /// The first wait before asking again is drawn from 0 to this; it doubles with each attempt.
    pub backoff_first_seconds: f64,
    /// Longest such wait.
    pub backoff_most_seconds: f64,
    /// Largest body of a reply, decoded.
    pub max_body_bytes: u64,
    /// What may be spent.
    pub caps: Caps,
    /// What earlier sessions of this collection spent. Requests are numbered on from its `requests`.
    pub spent: Spent,
    /// What tokens cost.
    pub price: Option<Price>,
    /// What becomes of an answer that was cut at the limit on tokens.
    pub on_length: OnLength,
    /// What becomes of a stream that breaks.
    pub on_break: OnBreak,
    /// Waits are drawn from this.
    pub jitter_seed: u64,
    /// Whether no socket may be opened: every collection is then an error.
    pub offline: bool,
}

/// A request that is about to be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    /// Number of the request, unique in a collection.
    pub request: u64,
    /// The call's number.
    pub call: u64,
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt.
    pub sample_index: u32,
    /// Which attempt at this call, from 1.
    pub attempt: u32,
    /// The endpoint's name.
    pub endpoint: String,
    /// The most it can be billed for.
    pub reserved: Billed,
    /// The most it can cost, USD; 0 without a price.
    pub reserved_usd: f64,
    /// When, milliseconds since 1970.
    pub sent_unix_ms: u64,
}

/// A call that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct Landed {
    /// The call.
    pub call: Call,
    /// How many requests it took.
    pub attempts: u32,
    /// What came of it.
    pub outcome: Result<Reply, Failure>,
}

/// What a collection hands over.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A request is over.
    Attempt(Attempt),
    /// A call is over; its attempts came before.
    Landed(Box<Landed>),
}

/// How far a collection is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Progress {
    /// Calls that landed with an answer, in this session.
    pub landed: u64,
    /// Calls that landed with a failure, in this session.
    pub failed: u64,
    /// Requests under way.
    pub in_flight: u64,
    /// Calls that wait for a place, a rate, or to be asked again.
    pub waiting: u64,
    /// What was spent, earlier sessions included.
    pub spent: Spent,
    /// What is under way can cost so much more, USD.
    pub reserved_usd: f64,
    /// Tokens of answers that came in this session.
    pub tokens: u64,
    /// How many requests the endpoints take at once, as found so far.
    pub concurrency: u32,
}

/// How a collection ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// Every call landed.
    Finished,
    /// It was asked to stop; what was under way landed.
    Stopped,
    /// The next request would pass a cap.
    Capped {
        /// Which, with its value.
        cap: String,
    },
    /// The caller wanted no more.
    Broke {
        /// Why.
        why: String,
    },
    /// No endpoint is left that answers.
    EndpointsDown {
        /// What the last one said.
        last: Failure,
    },
}

/// An error of the caller's own.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Asks for every call that `next` gives, until each has landed.
///
/// `next`, `land`, `watch` and `stop` run on the caller's thread; `next` is called when places are free or about
/// to be, so that calls need not be held in memory. `sent` runs on another thread, before a request's first byte
/// leaves; its error ends the collection. `land` is given groups, and what it was given counts once it returns;
/// after `Break(why)`, and once `stop` is true, nothing new is sent and what is under way still lands. `watch` is
/// called about five times a second.
///
/// # Errors
/// Settings that cannot work, an error of one of the closures, or a runtime that does not start.
pub fn collect(
    settings: &Settings,
    next: &mut dyn FnMut() -> Result<Option<Call>, BoxError>,
    sent: &(dyn Fn(&Sent) -> std::io::Result<()> + Sync),
    land: &mut dyn FnMut(Vec<Event>) -> Result<ControlFlow<String>, BoxError>,
    watch: &mut dyn FnMut(&Progress),
    stop: &dyn Fn() -> bool,
) -> Result<Ended, Error> {
    let lines = checked(settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(thread::available_parallelism().map_or(WORKERS, |n| n.get()))
        .enable_all()
        .build()
        .map_err(|source| Error::Caller {
            what: "the threads that ask could not be started",
            source: source.into(),
        })?;
    let shared = Shared::new(settings);
    let (orders, orders_in) = unbounded_channel();
    let (events_out, events) = std::sync::mpsc::channel();
    let (here, there) = thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let dispatch = Dispatch::new(settings, lines, sent, &shared);
            runtime.block_on(dispatch.run(orders_in, events_out))
        });
        let here = hand_over(&orders, &events, &shared, next, land, watch, stop);
        drop(orders);
        (here, asking.join())
    });
    // Requests that nobody waits for any longer are given up.
    runtime.shutdown_background();
    let broke = here?;
    let ended = there.map_err(|_| Error::Collection {
        why: "the thread that asks ended in a panic, which is a fault of Potstill: what landed is safe, and running again asks for the rest".into(),
    })??;
    Ok(broke.map_or(ended, |why| Ended::Broke { why }))
}

/// What is said across threads when a call, an answer or a wish to stop is to be known on the other side.
enum Order {
    /// Calls to be asked for.
    Calls(Vec<Call>),
    /// There are no more.
    NoMore,
    /// Nothing new is to be sent.
    Stop,
}

/// What one thread tells the other without being asked.
struct Shared {
    /// Calls that may be open: asked for, or waiting close by.
    places: AtomicU64,
    progress: Mutex<Progress>,
}

impl Shared {
    fn new(settings: &Settings) -> Shared {
        let most: u64 = settings
            .endpoints
            .iter()
            .map(|e| u64::from(e.max_in_flight))
            .sum();
        Shared {
            places: AtomicU64::new(most * 2),
            progress: Mutex::new(Progress {
                spent: settings.spent,
                ..Progress::default()
            }),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The caller's side: fills places, hands over what came, looks at the clock. Returns why the caller wanted no more.
fn hand_over(
    orders: &UnboundedSender<Order>,
    events: &Receiver<Vec<Event>>,
    shared: &Shared,
    next: &mut dyn FnMut() -> Result<Option<Call>, BoxError>,
    land: &mut dyn FnMut(Vec<Event>) -> Result<ControlFlow<String>, BoxError>,
    watch: &mut dyn FnMut(&Progress),
    stop: &dyn Fn() -> bool,
) -> Result<Option<String>, Error> {
    let mut open = 0;
    let mut takes_more = true;
    let mut broke = None;
    let mut failed = None;
    let mut watched = Instant::now();
    // When the other side is gone its own result says why.
    let tell = |order| drop(orders.send(order));
    loop {
        if takes_more && stop() {
            takes_more = false;
            tell(Order::Stop);
        }
        if takes_more {
            match fill(open, shared, next) {
                Ok((calls, has_more)) => {
                    open += calls.len() as u64;
                    if !calls.is_empty() {
                        tell(Order::Calls(calls));
                    }
                    if !has_more {
                        tell(Order::NoMore);
                        takes_more = false;
                        // Stopping still matters: what is not sent need not be.
                    }
                }
                Err(source) => {
                    failed = Some(source);
                    takes_more = false;
                    tell(Order::Stop);
                }
            }
        } else if stop() {
            tell(Order::Stop);
        }
        match group(events, open) {
            Ok(Some(group)) => {
                open = open.saturating_sub(landed(&group));
                if let ControlFlow::Break(why) = land(group).map_err(|source| Error::Caller {
                    what: "answers that came could not be kept",
                    source,
                })? {
                    broke.get_or_insert(why);
                    takes_more = false;
                    tell(Order::Stop);
                }
            }
            Ok(None) => {}
            Err(Gone) => break,
        }
        if watched.elapsed() >= WATCH {
            watched = Instant::now();
            let progress = *shared.progress();
            watch(&progress);
        }
    }
    let progress = *shared.progress();
    watch(&progress);
    match failed {
        Some(source) => Err(Error::Caller {
            what: "the next prompt could not be read",
            source,
        }),
        None => Ok(broke),
    }
}

/// Takes as many calls as there are places, and says whether there may be more.
fn fill(
    open: u64,
    shared: &Shared,
    next: &mut dyn FnMut() -> Result<Option<Call>, BoxError>,
) -> Result<(Vec<Call>, bool), BoxError> {
    let places = shared.places.load(Ordering::Relaxed);
    let mut calls = Vec::new();
    while open + (calls.len() as u64) < places && calls.len() < MOST_CALLS {
        match next()? {
            Some(call) => calls.push(call),
            None => return Ok((calls, false)),
        }
    }
    Ok((calls, true))
}

/// The other side has ended.
struct Gone;

/// What came since the last time; waits a little for something to come, and where much is open a little more, so
/// that groups are worth a sync.
fn group(events: &Receiver<Vec<Event>>, open: u64) -> Result<Option<Vec<Event>>, Gone> {
    let mut group = match events.recv_timeout(TICK) {
        Ok(group) => group,
        Err(RecvTimeoutError::Timeout) => return Ok(None),
        Err(RecvTimeoutError::Disconnected) => return Err(Gone),
    };
    if open > MANY {
        thread::sleep(LINGER);
    }
    while group.len() < MOST_EVENTS
        && let Ok(more) = events.try_recv()
    {
        group.extend(more);
    }
    Ok(Some(group))
}

fn landed(group: &[Event]) -> u64 {
    group
        .iter()
        .filter(|e| matches!(e, Event::Landed(_)))
        .count() as u64
}

/// Settings that can work, as connections to their endpoints.
fn checked(settings: &Settings) -> Result<Vec<Arc<Line>>, Error> {
    if settings.offline {
        return Err(Error::Offline);
    }
    let refuse = |why: &str| {
        Err(Error::Collection {
            why: why.to_owned(),
        })
    };
    let Settings { caps, .. } = settings;
    if settings.endpoints.is_empty() {
        return refuse("there is no endpoint: name at least one");
    }
    if settings.attempts == 0 {
        return refuse("`attempts` is 0: nothing would be asked; set it to 1 or more");
    }
    let waits = [
        settings.backoff_first_seconds,
        settings.backoff_most_seconds,
    ];
    if !waits.iter().all(|w| w.is_finite() && *w >= 0.0) {
        return refuse("a wait before asking again is negative or not a number");
    }
    if caps.usd.is_some() && settings.price.is_none() {
        return refuse(
            "there is a cap in USD and no price to reckon with: set `price`, or cap tokens instead",
        );
    }
    settings
        .endpoints
        .iter()
        .map(|e| Line::new(e, settings.timeouts, settings.max_body_bytes).map(Arc::new))
        .collect()
}
