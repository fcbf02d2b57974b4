//! The other side of a collection: one thread owns what is open, sends what may be sent, and judges what comes.
//!
//! Requests run as tasks beside it; a call that waits is an entry in a queue and no task.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::FutureExt;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::judge::{Fate, Open, charged, judge};
use super::{Ended, Event, Landed, Order, Progress, Sent, Settings, Shared};
use crate::Error;
use crate::http::ask::{Over, ask};
use crate::http::budget::{self, Budget};
use crate::http::pace::{Pace, Pick, pick, wait_told};
use crate::http::transport::Line;
use crate::http::{Asking, Attempt, Billed, Call, Failure, Reason, Reply, Task, wire};

/// Longest sleep, so that the progress is fresh and caps in time are kept.
const TICK: Duration = Duration::from_millis(100);

/// Calls that may wait to be asked again, for each request that may be in flight.
const WAITING: usize = 8;

/// A request under way.
struct Flying {
    open: Open,
    endpoint: usize,
    most: Billed,
    sent: Instant,
    sent_unix_ms: u64,
}

/// A request that is over.
struct Done {
    request: u64,
    over: Over,
    seconds: f64,
}

/// A call that waits to be asked again. The number keeps the order among equals.
struct Later {
    at: Reverse<(Instant, u64)>,
    open: Open,
}

impl PartialEq for Later {
    fn eq(&self, other: &Later) -> bool {
        self.at == other.at
    }
}

impl Eq for Later {}

impl PartialOrd for Later {
    fn partial_cmp(&self, other: &Later) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Later {
    fn cmp(&self, other: &Later) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// Why nothing new is sent.
enum Halt {
    Stop,
    Capped(String),
    Down(Failure),
    Error(Error),
}

/// What came of trying to send a call.
enum Step {
    /// It is under way, or has landed.
    Gone,
    /// It cannot be sent now; perhaps after so long.
    Held(Box<Open>, Option<Duration>),
}

/// All state of a collection.
pub(super) struct Dispatch<'a> {
    settings: &'a Settings,
    note: &'a (dyn Fn(&Sent) -> std::io::Result<()> + Sync),
    shared: &'a Shared,
    asking: Arc<Asking>,
    lines: Vec<Arc<Line>>,
    paces: Vec<Pace>,
    budget: Budget,
    rng: ChaCha8Rng,
    fresh: VecDeque<Open>,
    later: BinaryHeap<Later>,
    flying: HashMap<u64, Flying>,
    requests: u64,
    events: Vec<Event>,
    progress: Progress,
    is_all: bool,
    halt: Option<Halt>,
    done: UnboundedSender<Done>,
    dones: Option<UnboundedReceiver<Done>>,
}

impl<'a> Dispatch<'a> {
    pub(super) fn new(
        settings: &'a Settings,
        lines: Vec<Arc<Line>>,
        note: &'a (dyn Fn(&Sent) -> std::io::Result<()> + Sync),
        shared: &'a Shared,
    ) -> Dispatch<'a> {
        let now = Instant::now();
        let (done, dones) = unbounded_channel();
        Dispatch {
            settings,
            note,
            shared,
            asking: Arc::new(settings.asking.clone()),
            lines,
            paces: settings
                .endpoints
                .iter()
                .map(|e| Pace::new(e, now))
                .collect(),
            budget: Budget::new(settings.caps, settings.price, settings.spent, now),
            rng: ChaCha8Rng::seed_from_u64(settings.jitter_seed),
            fresh: VecDeque::new(),
            later: BinaryHeap::new(),
            flying: HashMap::new(),
            requests: settings.spent.requests,
            events: Vec::new(),
            progress: Progress::default(),
            is_all: false,
            halt: None,
            done,
            dones: Some(dones),
        }
    }

    /// Runs until nothing is left to send and nothing is under way.
    pub(super) async fn run(
        mut self,
        mut orders: UnboundedReceiver<Order>,
        events: std::sync::mpsc::Sender<Vec<Event>>,
    ) -> Result<Ended, Error> {
        let (mut told, mut got) = (Vec::new(), Vec::new());
        let Some(mut dones) = self.dones.take() else {
            return Ok(Ended::Finished);
        };
        loop {
            let wait = self.send_all();
            self.publish();
            if !self.events.is_empty() {
                // The caller's own error says why nobody listens.
                let _ = events.send(std::mem::take(&mut self.events));
            }
            let is_empty = self.fresh.is_empty() && self.later.is_empty();
            if self.flying.is_empty() && (self.halt.is_some() || (self.is_all && is_empty)) {
                break;
            }
            tokio::select! {
                n = orders.recv_many(&mut told, 64) => {
                    if n == 0 {
                        return Ok(Ended::Stopped);
                    }
                    for order in told.drain(..) {
                        self.follow(order);
                    }
                }
                _ = dones.recv_many(&mut got, 1024) => {
                    for done in got.drain(..) {
                        self.over(done);
                    }
                }
                () = tokio::time::sleep(wait) => {}
            }
        }
        let is_empty = self.fresh.is_empty() && self.later.is_empty();
        self.land_partial();
        self.publish();
        let _ = events.send(std::mem::take(&mut self.events));
        match self.halt {
            None => Ok(Ended::Finished),
            Some(Halt::Stop) if self.is_all && is_empty => Ok(Ended::Finished),
            Some(Halt::Stop) => Ok(Ended::Stopped),
            Some(Halt::Capped(cap)) => Ok(Ended::Capped { cap }),
            Some(Halt::Down(last)) => Ok(Ended::EndpointsDown { last }),
            Some(Halt::Error(error)) => Err(error),
        }
    }

    fn follow(&mut self, order: Order) {
        match order {
            Order::NoMore => self.is_all = true,
            Order::Stop => {
                self.halt.get_or_insert(Halt::Stop);
            }
            Order::Calls(calls) => {
                let needs_limit = self.asking.max_tokens.is_none()
                    && (self.settings.caps.usd.is_some() || self.settings.caps.tokens.is_some());
                if needs_limit && calls.iter().any(|c| !matches!(c.task, Task::Score { .. })) {
                    self.halt.get_or_insert(Halt::Error(Error::Collection {
                        why: "there is a cap on USD or tokens, and answers may be of any length: set `max_tokens`".into(),
                    }));
                }
                self.fresh.extend(calls.into_iter().map(Open::new));
            }
        }
    }

    /// Sends what may be sent now. Returns how long to sleep if nothing happens.
    fn send_all(&mut self) -> Duration {
        loop {
            let now = Instant::now();
            if self.halt.is_some() {
                return TICK;
            }
            let is_due = self.later.peek().is_some_and(|l| l.at.0.0 <= now);
            let next = if is_due {
                self.later.pop().map(|l| l.open)
            } else {
                self.fresh.pop_front()
            };
            let Some(open) = next else {
                let due = self
                    .later
                    .peek()
                    .map(|l| l.at.0.0.saturating_duration_since(now));
                return due.unwrap_or(TICK).min(TICK);
            };
            if let Step::Held(open, wait) = self.send(open, now) {
                // In front, since it is its turn.
                self.fresh.push_front(*open);
                return wait.unwrap_or(TICK).min(TICK);
            }
        }
    }

    fn send(&mut self, open: Open, now: Instant) -> Step {
        let most = budget::most(&self.asking, &open.call, open.tokens_so_far());
        if let Some(cap) = self.budget.refuses(&most, now) {
            // What is under way may cost less than it could.
            if self.flying.is_empty() {
                self.halt = Some(Halt::Capped(cap));
            }
            return Step::Held(Box::new(open), None);
        }
        let tokens = most.prompt_tokens + most.completion_tokens;
        match pick(&mut self.paces, tokens, now, open.avoid) {
            Pick::Go(endpoint) => self.launch(open, most, endpoint, now),
            Pick::Wait(wait) => Step::Held(Box::new(open), wait),
            Pick::Down => {
                let last = self.paces.iter().find_map(Pace::down).cloned();
                let none = || Failure::new(Reason::Connect, "no endpoint is left");
                self.halt = Some(Halt::Down(last.unwrap_or_else(none)));
                Step::Held(Box::new(open), None)
            }
        }
    }

    fn launch(&mut self, mut open: Open, most: Billed, endpoint: usize, now: Instant) -> Step {
        let body = match wire::request(&self.asking, &open.call, open.so_far()) {
            Ok(body) => body,
            // What broke cannot be gone on from with this server: it is asked for anew.
            Err(_) if open.drop_broken() => {
                return Step::Held(Box::new(open), Some(Duration::ZERO));
            }
            Err(failure) => {
                let outcome = open.keep().ok_or(failure);
                self.land(open, outcome);
                return Step::Gone;
            }
        };
        let request = self.requests + 1;
        let sent = Sent {
            request,
            call: open.call.number,
            prompt_id: open.call.prompt.id.clone(),
            sample_index: open.call.sample_index,
            attempt: open.requests + 1,
            endpoint: self.settings.endpoints[endpoint].name.clone(),
            reserved: most,
            reserved_usd: budget::cost(self.settings.price.as_ref(), &most),
            sent_unix_ms: unix_ms(),
        };
        if let Err(source) = (self.note)(&sent) {
            self.halt = Some(Halt::Error(Error::Caller {
                what: "a request could not be noted, and was not sent",
                source: source.into(),
            }));
            return Step::Held(Box::new(open), None);
        }
        self.requests = request;
        open.requests += 1;
        self.budget.reserve(&most);
        self.paces[endpoint].begin(most.prompt_tokens + most.completion_tokens);
        self.spawn(request, endpoint, Arc::clone(&open.call), body);
        self.flying.insert(
            request,
            Flying {
                open,
                endpoint,
                most,
                sent: now,
                sent_unix_ms: sent.sent_unix_ms,
            },
        );
        Step::Gone
    }

    fn spawn(&self, request: u64, endpoint: usize, call: Arc<Call>, body: wire::Body) {
        let line = Arc::clone(&self.lines[endpoint]);
        let asking = Arc::clone(&self.asking);
        let done = self.done.clone();
        tokio::spawn(async move {
            let begun = Instant::now();
            let over = AssertUnwindSafe(ask(line, asking, call, body, request))
                .catch_unwind()
                .await
                .unwrap_or_else(|_| {
                    Over::failed(Failure::new(
                        Reason::Malformed,
                        "reading the reply ended in a panic, which is a fault of Potstill",
                    ))
                });
            let seconds = begun.elapsed().as_secs_f64();
            // Nobody listens once the collection is given up.
            let _ = done.send(Done {
                request,
                over,
                seconds,
            });
        });
    }

    fn over(&mut self, done: Done) {
        let Some(flying) = self.flying.remove(&done.request) else {
            return;
        };
        let Flying {
            open,
            endpoint,
            most,
            ..
        } = flying;
        let now = Instant::now();
        let (billed, charge) = charged(&done.over, &most);
        let usd = self.budget.settle(&most, &billed);
        let failed = done.over.outcome.as_ref().err().map(|f| f.reason);
        let (first, longest) = (
            self.settings.backoff_first_seconds.max(0.05),
            self.settings.backoff_most_seconds,
        );
        self.paces[endpoint].end(
            done.over.outcome.as_ref().map(|_| ()),
            flying.sent,
            now,
            self.settings.attempts,
            |round| Duration::from_secs_f64(doubled(first, longest, round)),
        );
        if failed.is_none() {
            self.progress.tokens += billed.completion_tokens;
        }
        self.events.push(Event::Attempt(Attempt {
            request: done.request,
            prompt_id: open.call.prompt.id.clone(),
            sample_index: open.call.sample_index,
            attempt: open.requests,
            endpoint: self.settings.endpoints[endpoint].name.clone(),
            sent_unix_ms: flying.sent_unix_ms,
            seconds: done.seconds,
            status: done.over.status,
            bytes: done.over.bytes,
            failed,
            billed,
            usd,
            charge,
        }));
        let told = done
            .over
            .outcome
            .as_ref()
            .err()
            .and_then(|f| f.retry_after_seconds);
        match judge(self.settings, open, done.over, endpoint) {
            Fate::Land(landing) => self.land(landing.0, landing.1),
            Fate::GoOn(open) => self.fresh.push_front(*open),
            Fate::Again(open) => {
                let at = now + self.wait(open.failures(), told);
                self.later.push(Later {
                    at: Reverse((at, done.request)),
                    open: *open,
                });
            }
        }
    }

    /// A wait before asking again, drawn from 0 to a limit that doubles: full jitter. Never before the server
    /// wants to be asked.
    fn wait(&mut self, failures: u32, told: Option<f64>) -> Duration {
        let first = self.settings.backoff_first_seconds;
        let limit = doubled(first, self.settings.backoff_most_seconds, failures);
        let drawn = self.rng.random::<f64>() * limit;
        match told {
            Some(told) => wait_told(told) + Duration::from_secs_f64(drawn.min(first)),
            None => Duration::from_secs_f64(drawn),
        }
    }

    fn land(&mut self, open: Open, outcome: Result<Reply, Failure>) {
        if outcome.is_ok() {
            self.progress.landed += 1;
        } else {
            self.progress.failed += 1;
        }
        let attempts = open.requests;
        let call = Arc::try_unwrap(open.call).unwrap_or_else(|call| (*call).clone());
        self.events.push(Event::Landed(Box::new(Landed {
            call,
            attempts,
            outcome,
        })));
    }

    /// Answers that were to be made longer are paid for, and land as long as they are.
    fn land_partial(&mut self) {
        let left: Vec<Open> = self
            .fresh
            .drain(..)
            .chain(self.later.drain().map(|l| l.open))
            .collect();
        for mut open in left {
            if let Some(reply) = open.keep() {
                self.land(open, Ok(reply));
            }
        }
    }

    fn publish(&mut self) {
        let now = Instant::now();
        let window: u32 = self.paces.iter().map(Pace::window).sum();
        self.progress.in_flight = self.flying.len() as u64;
        self.progress.waiting = (self.fresh.len() + self.later.len()) as u64;
        self.progress.spent = self.budget.spent(now);
        self.progress.reserved_usd = self.budget.reserved_usd();
        self.progress.concurrency = window;
        *self.shared.progress() = self.progress;
        let most: usize = self
            .settings
            .endpoints
            .iter()
            .map(|e| e.max_in_flight as usize)
            .sum();
        let waiting = self.later.len().min(most * WAITING);
        let places = if self.halt.is_some() {
            0
        } else {
            window as usize * 2 + waiting
        };
        self.shared.places.store(places as u64, Ordering::Relaxed);
    }
}

/// `first` doubled with each round after the first, and at most `longest`.
fn doubled(first: f64, longest: f64, round: u32) -> f64 {
    (first * 2_f64.powi(round.saturating_sub(1).min(60) as i32)).min(longest)
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}
