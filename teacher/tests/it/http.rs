//! Collecting over HTTP, against a server that fails on purpose: what goes wrong (`faults`), what it may cost
//! (`caps`), who is asked and when not (`endpoints`), and what must not be told (`keys`).

mod caps;
mod endpoints;
mod faults;
mod keys;
#[allow(dead_code)]
mod server;
mod support;
