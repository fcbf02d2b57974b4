//! The Hub's client against a Hub on loopback that fails on purpose.

mod cache;
mod faults;
mod refusals;
pub(crate) mod server;
mod support;
