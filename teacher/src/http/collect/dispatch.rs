//! The dispatcher of a collection: one thread owns the open calls, sends requests within the limits, and decides what
//! follows from each response.
//!
//! Requests in flight are tasks of the runtime. A call that waits is an entry in a queue.

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

use super::event::{
    CallEvent, CollectProgress, CollectionEnd, CompletedCall, Order, Reservation, SharedState,
};
use super::retry::{NextStep, PendingCall, charge_for, next_step};
use crate::Error;
use crate::http::budget::{self, Budget};
use crate::http::exchange::{RequestOutcome, exchange};
use crate::http::settings::ClientSettings;
use crate::http::throttle::{
    EndpointChoice, RequestEnd, Throttle, choose_endpoint, server_wait_seconds,
};
use crate::http::transport::EndpointClient;
use crate::http::{
    Attempt, Call, CallTask, ChargeBasis, Failure, FailureReason, RequestSettings, Response,
    TokenUsage, wire,
};

/// Longest sleep, so that the progress is recent and caps in time are kept.
const MAX_SLEEP: Duration = Duration::from_millis(100);

/// Calls that may wait for a retry, for each request that may be in flight.
const DELAYED_PER_REQUEST: usize = 8;

/// A request that was sent and has not ended.
struct InFlight {
    call: PendingCall,
    endpoint: usize,
    reserved: TokenUsage,
    sent: Instant,
    sent_unix_ms: u64,
}

/// The end of a request, as its task reports it.
struct EndedRequest {
    request: u64,
    outcome: RequestOutcome,
    seconds: f64,
}

/// A call that waits for its retry. The number keeps the order among equal times.
struct DelayedCall {
    due: Reverse<(Instant, u64)>,
    call: PendingCall,
}

impl PartialEq for DelayedCall {
    fn eq(&self, other: &DelayedCall) -> bool {
        self.due == other.due
    }
}

impl Eq for DelayedCall {}

impl PartialOrd for DelayedCall {
    fn partial_cmp(&self, other: &DelayedCall) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for DelayedCall {
    fn cmp(&self, other: &DelayedCall) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}

/// Why nothing new is sent.
enum HaltReason {
    Stop,
    CapReached(String),
    EndpointsDown(Failure),
    Error(Error),
}

/// Result of trying to send a request for a call.
enum SendResult {
    /// The request is in flight, or the call is completed without one.
    Done,
    /// The request cannot be sent now; it may be possible after this time.
    Held(Box<PendingCall>, Option<Duration>),
}

/// State of a collection.
pub(super) struct Dispatcher<'a> {
    settings: &'a ClientSettings,
    reserve: &'a (dyn Fn(&Reservation) -> std::io::Result<()> + Sync),
    shared: &'a SharedState,
    request_settings: Arc<RequestSettings>,
    clients: Vec<Arc<EndpointClient>>,
    throttles: Vec<Throttle>,
    budget: Budget,
    rng: ChaCha8Rng,
    /// Calls to send next, in order.
    ready: VecDeque<PendingCall>,
    delayed: BinaryHeap<DelayedCall>,
    in_flight: HashMap<u64, InFlight>,
    /// Number of the last request.
    requests: u64,
    events: Vec<CallEvent>,
    progress: CollectProgress,
    has_all_calls: bool,
    halt: Option<HaltReason>,
    ended_out: UnboundedSender<EndedRequest>,
    ended_in: Option<UnboundedReceiver<EndedRequest>>,
}

impl<'a> Dispatcher<'a> {
    pub(super) fn new(
        settings: &'a ClientSettings,
        clients: Vec<Arc<EndpointClient>>,
        reserve: &'a (dyn Fn(&Reservation) -> std::io::Result<()> + Sync),
        shared: &'a SharedState,
    ) -> Dispatcher<'a> {
        let now = Instant::now();
        let (ended_out, ended_in) = unbounded_channel();
        let throttles = settings.endpoints.iter().map(|e| Throttle::new(e, now));
        Dispatcher {
            settings,
            reserve,
            shared,
            request_settings: Arc::new(settings.request.clone()),
            clients,
            throttles: throttles.collect(),
            budget: Budget::new(settings.caps, settings.price, settings.spent, now),
            rng: ChaCha8Rng::seed_from_u64(settings.jitter_seed),
            ready: VecDeque::new(),
            delayed: BinaryHeap::new(),
            in_flight: HashMap::new(),
            requests: settings.spent.requests,
            events: Vec::new(),
            progress: CollectProgress::default(),
            has_all_calls: false,
            halt: None,
            ended_out,
            ended_in: Some(ended_in),
        }
    }

    /// Runs until nothing is left to send and nothing is in flight.
    pub(super) async fn run(
        mut self,
        mut orders: UnboundedReceiver<Order>,
        events: std::sync::mpsc::Sender<Vec<CallEvent>>,
    ) -> Result<CollectionEnd, Error> {
        let (mut new_orders, mut ended) = (Vec::new(), Vec::new());
        let Some(mut ended_in) = self.ended_in.take() else {
            return Ok(CollectionEnd::Finished);
        };
        loop {
            let wait = self.send_all();
            self.publish_progress();
            if !self.events.is_empty() {
                // If nothing receives the events, the caller's own error says why.
                let _ = events.send(std::mem::take(&mut self.events));
            }
            if self.in_flight.is_empty() && (self.halt.is_some() || self.has_no_work_left()) {
                break;
            }
            tokio::select! {
                n = orders.recv_many(&mut new_orders, 64) => {
                    if n == 0 {
                        return Ok(CollectionEnd::Stopped);
                    }
                    for order in new_orders.drain(..) {
                        self.follow(order);
                    }
                }
                _ = ended_in.recv_many(&mut ended, 1024) => {
                    for request in ended.drain(..) {
                        self.end_request(request);
                    }
                }
                () = tokio::time::sleep(wait) => {}
            }
        }
        let has_no_work_left = self.has_no_work_left();
        self.complete_partial_answers();
        self.publish_progress();
        let _ = events.send(std::mem::take(&mut self.events));
        match self.halt {
            None => Ok(CollectionEnd::Finished),
            Some(HaltReason::Stop) if has_no_work_left => Ok(CollectionEnd::Finished),
            Some(HaltReason::Stop) => Ok(CollectionEnd::Stopped),
            Some(HaltReason::CapReached(cap)) => Ok(CollectionEnd::CapReached { cap }),
            Some(HaltReason::EndpointsDown(last)) => Ok(CollectionEnd::EndpointsDown { last }),
            Some(HaltReason::Error(error)) => Err(error),
        }
    }

    fn has_no_work_left(&self) -> bool {
        self.has_all_calls && self.ready.is_empty() && self.delayed.is_empty()
    }

    fn follow(&mut self, order: Order) {
        match order {
            Order::NoMore => self.has_all_calls = true,
            Order::Stop => {
                self.halt.get_or_insert(HaltReason::Stop);
            }
            Order::Calls(calls) => {
                let caps = &self.settings.caps;
                let needs_limit = self.request_settings.max_tokens.is_none()
                    && (caps.usd.is_some() || caps.tokens.is_some());
                let is_answer = |call: &Call| !matches!(call.task, CallTask::Score { .. });
                if needs_limit && calls.iter().any(is_answer) {
                    self.halt.get_or_insert(HaltReason::Error(Error::Collection {
                        why: "the budget has a cap on USD or tokens, and the length of an answer has no limit\nhint: set `max_tokens`".into(),
                    }));
                }
                self.ready.extend(calls.into_iter().map(PendingCall::new));
            }
        }
    }

    /// Sends every request that may be sent now. Returns the time to sleep if nothing else happens.
    fn send_all(&mut self) -> Duration {
        loop {
            let now = Instant::now();
            if self.halt.is_some() {
                return MAX_SLEEP;
            }
            let due = self.delayed.peek().map(|delayed| delayed.due.0.0);
            let next = match due {
                Some(due) if due <= now => self.delayed.pop().map(|delayed| delayed.call),
                _ => self.ready.pop_front(),
            };
            let Some(call) = next else {
                let wait = due.map(|due| due.saturating_duration_since(now));
                return wait.unwrap_or(MAX_SLEEP).min(MAX_SLEEP);
            };
            if let SendResult::Held(call, wait) = self.send(call, now) {
                // The call keeps its turn.
                self.ready.push_front(*call);
                return wait.unwrap_or(MAX_SLEEP).min(MAX_SLEEP);
            }
        }
    }

    /// Sends the next request for a call, if budget and endpoints allow.
    fn send(&mut self, call: PendingCall, now: Instant) -> SendResult {
        let most = budget::most(&self.request_settings, &call.call, call.tokens_so_far());
        if let Some(cap) = self.budget.cap_reached_with(&most, now) {
            // Requests in flight may cost less than their reservations, so the cap is final only without any.
            if self.in_flight.is_empty() {
                self.halt = Some(HaltReason::CapReached(cap));
            }
            return SendResult::Held(Box::new(call), None);
        }
        match choose_endpoint(&mut self.throttles, most.total(), now, call.avoid) {
            EndpointChoice::Use(endpoint) => self.send_to(endpoint, call, most, now),
            EndpointChoice::Wait(wait) => SendResult::Held(Box::new(call), wait),
            EndpointChoice::AllDown => {
                let last = self.throttles.iter().find_map(Throttle::down).cloned();
                let unknown = || Failure::new(FailureReason::Connect, "no endpoint is left");
                self.halt = Some(HaltReason::EndpointsDown(last.unwrap_or_else(unknown)));
                SendResult::Held(Box::new(call), None)
            }
        }
    }

    fn send_to(
        &mut self,
        endpoint: usize,
        mut call: PendingCall,
        most: TokenUsage,
        now: Instant,
    ) -> SendResult {
        let body = match wire::request(&self.request_settings, &call.call, call.so_far()) {
            Ok(body) => body,
            // This server cannot continue the beginning that came before the stream broke: start again.
            Err(_) if call.drop_broken() => {
                return SendResult::Held(Box::new(call), Some(Duration::ZERO));
            }
            Err(failure) => {
                let result = call.take_answer().ok_or(failure);
                self.complete(call, result);
                return SendResult::Done;
            }
        };
        let request = self.requests + 1;
        let reservation = Reservation {
            request,
            prompt_id: call.call.prompt.id.clone(),
            sample_index: call.call.sample_index,
            attempt: call.requests + 1,
            endpoint: self.settings.endpoints[endpoint].name().to_owned(),
            reserved: most,
            reserved_usd: budget::cost(self.settings.price.as_ref(), &most),
            sent_unix_ms: unix_ms(),
        };
        if let Err(source) = (self.reserve)(&reservation) {
            self.halt = Some(HaltReason::Error(Error::Caller {
                what: "cannot write the list of requests, so the request was not sent",
                source: source.into(),
            }));
            return SendResult::Held(Box::new(call), None);
        }
        self.requests = request;
        call.requests += 1;
        self.budget.reserve(&most);
        self.throttles[endpoint].begin(most.total(), now);
        self.spawn(request, endpoint, Arc::clone(&call.call), body);
        self.in_flight.insert(
            request,
            InFlight {
                call,
                endpoint,
                reserved: most,
                sent: now,
                sent_unix_ms: reservation.sent_unix_ms,
            },
        );
        SendResult::Done
    }

    fn spawn(&self, request: u64, endpoint: usize, call: Arc<Call>, body: wire::RequestBody) {
        let client = Arc::clone(&self.clients[endpoint]);
        let settings = Arc::clone(&self.request_settings);
        let ended = self.ended_out.clone();
        tokio::spawn(async move {
            let begun = Instant::now();
            let outcome = AssertUnwindSafe(exchange(client, settings, call, body, request))
                .catch_unwind()
                .await
                .unwrap_or_else(|_| {
                    RequestOutcome::failed(Failure::new(
                        FailureReason::Malformed,
                        "parsing the response panicked, which is a bug in Potstill",
                    ))
                });
            let seconds = begun.elapsed().as_secs_f64();
            // After an error of the caller nothing receives the outcome.
            let _ = ended.send(EndedRequest {
                request,
                outcome,
                seconds,
            });
        });
    }

    /// Charges a request that has ended, reports it, and decides what follows for its call.
    fn end_request(&mut self, ended: EndedRequest) {
        let Some(request) = self.in_flight.remove(&ended.request) else {
            return;
        };
        let now = Instant::now();
        self.update_throttle(&request, &ended.outcome, now);
        let attempt = self.settle(&request, &ended);
        self.events.push(CallEvent::Attempt(attempt));
        let failure = ended.outcome.result.as_ref().err();
        let retry_after = failure.and_then(|failure| failure.retry_after_seconds);
        match next_step(self.settings, request.call, ended.outcome, request.endpoint) {
            NextStep::Complete(completed) => self.complete(completed.0, completed.1),
            NextStep::Continue(call) => self.ready.push_front(*call),
            NextStep::Retry(call) => {
                let longest = self.throttles[request.endpoint].longest_wait();
                let retry_after = retry_after.filter(|seconds| *seconds <= longest.as_secs_f64());
                let due = now + self.backoff(call.failures(), retry_after);
                self.delayed.push(DelayedCall {
                    due: Reverse((due, ended.request)),
                    call: *call,
                });
            }
        }
    }

    fn update_throttle(&mut self, request: &InFlight, outcome: &RequestOutcome, now: Instant) {
        let first = self.settings.first_backoff_seconds.max(0.05);
        let longest = self.settings.max_backoff_seconds;
        let end = RequestEnd {
            result: outcome.result.as_ref().map(|_| ()),
            rates: outcome.rates,
            sent: request.sent,
            now,
        };
        self.throttles[request.endpoint].end(end, self.settings.attempts, |round| {
            Duration::from_secs_f64(doubled(first, longest, round))
        });
    }

    /// Replaces the reservation of a request by its charge, and makes its line of the ledger.
    fn settle(&mut self, request: &InFlight, ended: &EndedRequest) -> Attempt {
        let InFlight { call, reserved, .. } = request;
        let (billed, charge) = charge_for(&ended.outcome, reserved);
        let usd = self.budget.settle(reserved, &billed);
        let failed = ended.outcome.result.as_ref().err().map(|f| f.reason);
        if charge == ChargeBasis::Implausible {
            self.progress.implausible_usages += 1;
        }
        if failed.is_none() {
            self.progress.tokens += billed.completion_tokens;
        }
        Attempt {
            request: ended.request,
            prompt_id: call.call.prompt.id.clone(),
            sample_index: call.call.sample_index,
            attempt: call.requests,
            endpoint: self.settings.endpoints[request.endpoint].name().to_owned(),
            sent_unix_ms: request.sent_unix_ms,
            seconds: ended.seconds,
            status: ended.outcome.status,
            bytes: ended.outcome.bytes,
            failed,
            billed,
            usd,
            charge,
        }
    }

    /// The wait before a retry, drawn uniformly from 0 to a bound that doubles with each failure ("full jitter"). The
    /// time that the server asked for is waited in any case.
    fn backoff(&mut self, failures: u32, retry_after: Option<f64>) -> Duration {
        let first = self.settings.first_backoff_seconds;
        let bound = doubled(first, self.settings.max_backoff_seconds, failures);
        let drawn = self.rng.random::<f64>() * bound;
        match retry_after {
            Some(seconds) => Duration::from_secs_f64(seconds + drawn.min(first)),
            None => Duration::from_secs_f64(drawn),
        }
    }

    fn complete(&mut self, call: PendingCall, result: Result<Response, Failure>) {
        if result.is_ok() {
            self.progress.answered += 1;
        } else {
            self.progress.failed += 1;
        }
        let attempts = call.requests;
        let call = Arc::try_unwrap(call.call).unwrap_or_else(|call| (*call).clone());
        self.events
            .push(CallEvent::Completed(Box::new(CompletedCall {
                call,
                attempts,
                result,
            })));
    }

    /// Completes the calls whose answers were to be continued with what there is, since it is paid for.
    fn complete_partial_answers(&mut self) {
        let delayed = self.delayed.drain().map(|delayed| delayed.call);
        let left: Vec<PendingCall> = self.ready.drain(..).chain(delayed).collect();
        for mut call in left {
            if let Some(response) = call.take_answer() {
                self.complete(call, Ok(response));
            }
        }
    }

    fn publish_progress(&mut self) {
        let now = Instant::now();
        let concurrency: u32 = self.throttles.iter().map(Throttle::limit).sum();
        self.progress.in_flight = self.in_flight.len() as u64;
        self.progress.waiting = (self.ready.len() + self.delayed.len()) as u64;
        self.progress.spent = self.budget.spent(now);
        self.progress.reserved_usd = self.budget.reserved_usd();
        self.progress.concurrency = concurrency;
        self.progress.server_wait_seconds = server_wait_seconds(&self.throttles, now);
        *self.shared.progress() = self.progress;
        let endpoints = self.settings.endpoints.iter();
        let most: usize = endpoints.map(|e| e.in_flight_limit() as usize).sum();
        let delayed = self.delayed.len().min(most * DELAYED_PER_REQUEST);
        let capacity = if self.halt.is_some() {
            0
        } else {
            concurrency as usize * 2 + delayed
        };
        self.shared
            .capacity
            .store(capacity as u64, Ordering::Relaxed);
    }
}

/// `first`, doubled with each round after the first, and at most `longest`.
fn doubled(first: f64, longest: f64, round: u32) -> f64 {
    (first * 2_f64.powi(round.saturating_sub(1).min(60) as i32)).min(longest)
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}
