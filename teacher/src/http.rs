//! Teachers behind a server: what is asked, what came, and what it cost.
//!
//! Wire formats are private (`wire`). A [`Call`] goes in and lands once, as a [`Reply`] or a typed
//! [`Failure`]; every request on the way is an [`Attempt`], with what it was charged.

mod ask;
mod budget;
mod call;
mod collect;
mod endpoint;
mod key;
mod pace;
mod probe;
mod provider;
mod signal;
mod transport;
mod wire;

pub use budget::{Caps, Spent, forecast};
pub use call::{
    Asking, Attempt, Billed, Call, Charge, Dialect, Failure, Method, OnBreak, OnLength,
    PromptLogprobs, Reason, Reply, Task,
};
pub use collect::{BoxError, Ended, Event, Landed, Progress, Sent, Settings, collect};
pub use endpoint::{Endpoint, Timeouts};
pub use key::Key;
pub use probe::{
    Counted, Kind, Logprobs, Probe, Prompted, Recommended, Scale, Speed, Through, Tokens, probe,
};
pub use provider::{Price, Provider, merge, providers};
pub use signal::{
    Spellings, Window, answer_signal, answer_signal_with, join_windows, prompt_signal, windows,
};
