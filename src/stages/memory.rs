//! The memory that a run needs at least, compared with the machine's.

use std::fs;

use anyhow::bail;
use potstill_model::Device;

/// Bytes of a parameter while it is trained: weight, gradient and two moments in f32.
pub(crate) const TRAINED_BYTES: u64 = 16;

/// Refuses a model that needs more than the machine's memory, before anything is allocated for it. `what` names the model
/// and what is done with it; `hint` says how to need less. The memory of a GPU is not known.
///
/// # Errors
/// When `parameters` of `bytes_each` do not fit.
pub(crate) fn require(
    what: &str,
    parameters: u64,
    bytes_each: u64,
    device: &Device,
    hint: &str,
) -> anyhow::Result<()> {
    let is_cpu = *device == potstill_model::device("cpu")?;
    let machine = machine_bytes().filter(|_| is_cpu).unwrap_or(u64::MAX);
    match problem(what, parameters, bytes_each, machine, hint) {
        Some(problem) => bail!(problem),
        None => Ok(()),
    }
}

fn problem(
    what: &str,
    parameters: u64,
    bytes_each: u64,
    machine: u64,
    hint: &str,
) -> Option<String> {
    let needed = parameters.saturating_mul(bytes_each);
    (needed > machine).then(|| {
        format!(
            "{what} takes at least {}, and this machine has {} of memory to give\nhint: {hint}",
            gigabytes(needed),
            gigabytes(machine)
        )
    })
}

fn gigabytes(bytes: u64) -> String {
    let gigabytes = bytes as f64 / 1e9;
    match gigabytes < 1e6 {
        true => format!("{gigabytes:.1} GB"),
        false => format!("{gigabytes:.0e} GB"),
    }
}

/// Returns the memory in bytes that this machine has to give: what is free or can be freed, or the limit of the control
/// group that the process runs in, if it is smaller. `None` where the system does not say.
fn machine_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let limits = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    let limits = limits
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    Some(available(&meminfo)?.min(limits.min().unwrap_or(u64::MAX)))
}

/// Returns `MemAvailable` of `/proc/meminfo` in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let rest = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_available_memory_is_read_in_bytes() {
        let text = "MemFree:  7 kB\nMemAvailable:   16384 kB\n";
        assert_eq!(available(text), Some(16_777_216));
        assert_eq!(available("MemAvailable: much\n"), None);
        assert_eq!(available(""), None);
    }

    #[test]
    fn a_model_larger_than_the_machine_is_refused() {
        let of = |parameters| problem("the teacher", parameters, 4, 8_000_000_000, "use bf16");
        assert_eq!(of(2_000_000_000), None);
        assert_eq!(
            of(2_000_000_001).unwrap(),
            "the teacher takes at least 8.0 GB, and this machine has 8.0 GB of memory to give\nhint: use bf16"
        );
        assert!(of(u64::MAX).unwrap().contains("at least 2e10 GB"));
    }
}
