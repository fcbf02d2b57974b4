//! The test server as a program. It prints its port, and serves until it is killed.
//!
//! `cargo run --release -p potstill-teacher --no-default-features --example fault_server -- --faulty 0.3`

// The program prints its port and its usage.
#![allow(clippy::print_stdout, clippy::print_stderr)]

// The tests use parts of the server that this program does not.
#[path = "../tests/it/http/server.rs"]
#[allow(dead_code)]
mod server;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use server::{FAULTS, Fault, Plan, Server};

const USAGE: &str = "fault_server [--seed N] [--faulty SHARE] [--faults status-500,reset,...] [--latency-ms N] [--latency-spread X] [--hang-ms N] [--answer-tokens N] [--token-bytes N] [--same] [--no-usage] [--echo] [--redirect STATUS URL] [--threads N]\nThe server listens on a free port of 127.0.0.1, prints the port on one line, and gives its counts at /__counts.";

fn main() -> ExitCode {
    let (plan, threads) = match parse(std::env::args().skip(1)) {
        Ok(parsed) => parsed,
        Err(why) => {
            eprintln!("{why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match serve(plan, threads) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fault_server: {e}");
            ExitCode::FAILURE
        }
    }
}

fn serve(plan: Plan, threads: usize) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let server = Server::start(plan).await?;
        println!("{}", server.address.port());
        std::io::stdout().flush()?;
        std::future::pending::<()>().await;
        Ok(())
    })
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<(Plan, usize), String> {
    let mut plan = Plan::default();
    let mut threads = 2;
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or(format!("{flag} needs a value"));
        match flag.as_str() {
            "--seed" => plan.seed = number(&value()?)?,
            "--faulty" => plan.faulty = number(&value()?)?,
            "--faults" => {
                let names = value()?;
                plan.faults = names.split(',').map(fault).collect::<Result<_, _>>()?;
            }
            "--latency-ms" => plan.latency = Duration::from_millis(number(&value()?)?),
            "--latency-spread" => plan.latency_spread = number(&value()?)?,
            "--hang-ms" => plan.hang = Duration::from_millis(number(&value()?)?),
            "--answer-tokens" => plan.answer_tokens = number(&value()?)?,
            "--token-bytes" => plan.token_bytes = number(&value()?)?,
            "--no-usage" => plan.usage = false,
            "--same" => plan.same = true,
            "--echo" => plan.echo = true,
            "--redirect" => {
                let status = number(&value()?)?;
                plan.redirect = Some((status, value()?));
            }
            "--threads" => threads = number(&value()?)?,
            _ => return Err(format!("unknown flag `{flag}`")),
        }
    }
    Ok((plan, threads))
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not a number"))
}

/// A fault by its name in lower case with dashes, such as `hang-before-headers` or `status-503`.
fn fault(name: &str) -> Result<Fault, String> {
    if let Some(status) = name.strip_prefix("status-") {
        return Ok(Fault::Status(number(status)?));
    }
    if let Some(seconds) = name.strip_prefix("retry-after-") {
        return Ok(Fault::RetryAfter(number(seconds)?));
    }
    let plain = name.replace('-', "");
    FAULTS
        .iter()
        .copied()
        .find(|f| format!("{f:?}").eq_ignore_ascii_case(&plain))
        .ok_or_else(|| format!("unknown fault `{name}`"))
}
