//! Collections over HTTP against a test server that fails on purpose: faults (`faults`), budgets (`caps`), choice and
//! availability of endpoints (`endpoints`), and secrecy of keys (`keys`).

mod caps;
mod endpoints;
mod faults;
mod keys;
// The example `fault_server` uses parts of the server that the tests do not.
#[allow(dead_code)]
mod server;
mod support;
