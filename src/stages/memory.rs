//! The memory that a run needs at least, compared with the machine's.

use std::fs;

/// Bytes of a parameter while it is trained: weight, gradient and two moments in f32.
pub(crate) const TRAINED_BYTES: u64 = 16;

/// Returns a warning if `parameters` of `bytes_each` need more than the machine's memory. `what` names the model and
/// what is done with it; `hint` says how to need less.
pub(crate) fn warning(
    what: &str,
    parameters: u64,
    bytes_each: u64,
    machine: u64,
    hint: &str,
) -> Option<String> {
    let needed = parameters.saturating_mul(bytes_each);
    (needed > machine).then(|| {
        format!(
            "{what} takes at least {}, and this machine has {} of memory\nhint: {hint}",
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

/// Returns the memory of this machine in bytes, or the limit of the control group that the process runs in, if it is
/// smaller. `None` where the system does not say.
pub(crate) fn machine_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|text| text.trim().parse().ok());
    Some(total(&meminfo)?.min(limit.unwrap_or(u64::MAX)))
}

/// Returns `MemTotal` of `/proc/meminfo` in bytes.
fn total(meminfo: &str) -> Option<u64> {
    let rest = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_read_in_bytes() {
        let text = "MemFree:  7 kB\nMemTotal:       16384 kB\n";
        assert_eq!(total(text), Some(16_777_216));
        assert_eq!(total("MemTotal: much\n"), None);
        assert_eq!(total(""), None);
    }

    #[test]
    fn a_model_larger_than_the_machine_is_warned_of() {
        let of = |parameters| warning("the teacher", parameters, 4, 8_000_000_000, "use bf16");
        assert_eq!(of(2_000_000_000), None);
        assert_eq!(
            of(2_000_000_001).unwrap(),
            "the teacher takes at least 8.0 GB, and this machine has 8.0 GB of memory\nhint: use bf16"
        );
        assert!(of(u64::MAX).unwrap().contains("at least 2e10 GB"));
    }
}
