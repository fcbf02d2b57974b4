//! What else the machine does while something is measured, and what machine it is. Linux tells;
//! elsewhere it is not known.

use std::fs;

/// Over this share of the processors taken by others, a measurement counts as disturbed.
pub(crate) const QUIET: f64 = 0.05;
/// Ticks a second of `/proc`, the same on every Linux.
const TICKS: f64 = 100.0;
/// What runs shorter is counted in too few ticks to tell its share from that of others, seconds.
const SHORTEST: f64 = 1.0;

/// Processor time since the start of the machine, seconds over all cores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Usage {
    busy: f64,
    total: f64,
}

impl Usage {
    pub(crate) fn now() -> Option<Usage> {
        usage(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// The share of the processors that went to others since `self`, `own_s` being our own time.
    /// Time that the host took from a virtual machine counts. `None` if too little went by to tell.
    pub(crate) fn others_until(&self, end: &Usage, own_s: f64) -> Option<f64> {
        let total = end.total - self.total;
        let others = (end.busy - self.busy - own_s) / total;
        (total >= SHORTEST).then_some(others.max(0.0))
    }
}

fn usage(stat: &str) -> Option<Usage> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user.
    let ticks: Vec<f64> = line
        .split_whitespace()
        .take(8)
        .filter_map(|field| field.parse().ok())
        .collect();
    let total: f64 = ticks.iter().sum();
    let idle: f64 = ticks.iter().skip(3).take(2).sum();
    (ticks.len() >= 5).then_some(Usage {
        busy: (total - idle) / TICKS,
        total: total / TICKS,
    })
}

/// Processor time of this process, seconds.
pub(crate) fn own_cpu_s() -> Option<f64> {
    cpu_s(&fs::read_to_string("/proc/self/stat").ok()?)
}

fn cpu_s(stat: &str) -> Option<f64> {
    // The name before it may hold anything, spaces and parentheses too.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: Vec<f64> = ticks.filter_map(|field| field.parse().ok()).collect();
    (ticks.len() == 2).then(|| ticks.iter().sum::<f64>() / TICKS)
}

/// Resident bytes of this process: now, and the most there ever were.
pub(crate) fn own_memory() -> (Option<u64>, Option<u64>) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    (kilobytes(&status, "VmRSS:"), kilobytes(&status, "VmHWM:"))
}

/// Lets the most resident bytes be counted from now on; false where the system does not.
pub(crate) fn forget_peak() -> bool {
    // 5: of proc(5), clear_refs.
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn kilobytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(number * 1024)
}

/// The processes that wanted to run in the last minute, on average.
pub(crate) fn load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// The processor, and what it has for products of half precision.
pub(crate) fn machine(cores: usize) -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        lines.find_map(|(key, value)| (key.trim() == name).then(|| value.trim().to_owned()))
    };
    let flags = field("flags").unwrap_or_default();
    let flags: Vec<&str> = flags.split(' ').collect();
    let known = [
        ("avx2", "AVX2"),
        ("avx512f", "AVX-512"),
        ("avx512_bf16", "AVX-512 BF16"),
        ("amx_bf16", "AMX BF16"),
    ];
    let has: Vec<&str> = known
        .iter()
        .filter(|(flag, _)| flags.contains(flag))
        .map(|(_, name)| *name)
        .collect();
    let name = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let mut said = format!("{name}, {cores} cores");
    if !has.is_empty() {
        said += &format!(", {}", has.join(", "));
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_what_neither_idles_nor_is_ours() {
        let before = usage("cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2").unwrap();
        let after = usage("cpu  300 0 100 880 0 0 0 20 0 0\n").unwrap();
        // Three seconds went by: 2 busy, 0.2 stolen, 0.8 idle; 1.9 of them ours.
        let others = before.others_until(&after, 1.9).unwrap();
        assert!((others - 0.1).abs() < 1e-9, "{others}");
        assert_eq!(before.others_until(&after, 9.0), Some(0.0));
        assert_eq!(before.others_until(&before, 0.0), None);
        assert_eq!(usage("intr 5"), None);
    }

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a) b) R 1 1 1 0 -1 4194304 100 0 0 0 250 50 0 0 20 0";
        assert_eq!(cpu_s(stat), Some(3.0));
        assert_eq!(cpu_s("7 x"), None);
    }

    #[test]
    fn memory_is_in_bytes() {
        let status = "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n";
        assert_eq!(kilobytes(status, "VmHWM:"), Some(2 << 20));
        assert_eq!(kilobytes(status, "VmSwap:"), None);
    }
}
