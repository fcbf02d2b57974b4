//! Teachers behind a server: requests, responses and what they cost.
//!
//! [`collect`] takes [`Call`]s and completes each of them once, with a [`Response`] or a typed [`Failure`]. Every
//! request on the way is reported as an [`Attempt`] with its charge. The wire formats are private (`wire`).

mod budget;
mod call;
mod collect;
mod endpoint;
mod estimate;
mod exchange;
mod key;
mod probe;
mod provider;
mod request_log;
mod settings;
mod signal;
mod throttle;
mod transport;
mod wire;

pub use budget::{BudgetSettings, Spending, forecast_usd};
pub use call::{
    Api, Attempt, Call, CallTask, ChargeBasis, Dialect, Failure, FailureReason, OnBreak, OnLength,
    PromptLogprobs, RequestSettings, Response, TokenUsage,
};
pub use collect::{
    CallEvent, CallbackError, CollectProgress, CollectionEnd, CompletedCall, Reservation, collect,
};
pub use endpoint::{DEFAULT_CONCURRENCY, Endpoint, Timeouts};
pub(crate) use estimate::UNKNOWN_MARKS;
pub use estimate::{TokenEstimate, prompt_bytes};
pub use exchange::{ReplyBytes, decode_reply};
pub use key::ApiKey;
pub use probe::{
    AnswerLogprobs, AnswerSpeed, LogprobKind, LogprobsMode, Probe, PromptScoring, Recommendation,
    SamplingStage, ScoringApi, TokenFindings, UsageFindings, probe,
};
pub use provider::{Price, Provider, known_providers, merge_providers};
pub use request_log::RequestLog;
pub use settings::ClientSettings;
pub use signal::{
    ScoringWindow, Spellings, answer_signal, join_scoring_windows, prompt_signal, scoring_windows,
};
