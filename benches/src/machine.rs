//! The machine and its load: processor model, processor time, resident memory. All of it is read from
//! Linux's `/proc`; on other systems it is unknown.

use std::fs;

/// Share of the processors used by other processes above which a measurement counts as disturbed.
pub(crate) const DISTURBED_SHARE: f64 = 0.05;
/// Ticks per second in `/proc`, the same on every Linux.
const TICKS: f64 = 100.0;
/// Shortest time over which ticks are precise enough to give other processes' share, in seconds of
/// processor time over all cores.
const SHORTEST: f64 = 1.0;

/// Processor time since the machine started, in seconds over all cores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ProcessorTime {
    busy: f64,
    total: f64,
}

impl ProcessorTime {
    pub(crate) fn now() -> Option<ProcessorTime> {
        processor_time(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// Computes the share of the processors that other processes used since `self`, where `own_s` is the
    /// time of the measured process. Time that the host took from a virtual machine counts as other
    /// processes'. `None` if the interval is too short.
    pub(crate) fn others_until(&self, end: &ProcessorTime, own_s: f64) -> Option<f64> {
        let total = end.total - self.total;
        let others = (end.busy - self.busy - own_s) / total;
        (total >= SHORTEST).then_some(others.max(0.0))
    }
}

fn processor_time(stat: &str) -> Option<ProcessorTime> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    // The fields are user, nice, system, idle, iowait, irq, softirq, steal; user includes guests.
    let ticks: Vec<f64> = line
        .split_whitespace()
        .take(8)
        .filter_map(|field| field.parse().ok())
        .collect();
    let total: f64 = ticks.iter().sum();
    let idle: f64 = ticks.iter().skip(3).take(2).sum();
    (ticks.len() >= 5).then_some(ProcessorTime {
        busy: (total - idle) / TICKS,
        total: total / TICKS,
    })
}

/// Processor time of this process, seconds.
pub(crate) fn own_processor_seconds() -> Option<f64> {
    processor_seconds(&fs::read_to_string("/proc/self/stat").ok()?)
}

fn processor_seconds(stat: &str) -> Option<f64> {
    // The process name in parentheses may itself contain spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: Vec<f64> = ticks.filter_map(|field| field.parse().ok()).collect();
    (ticks.len() == 2).then(|| ticks.iter().sum::<f64>() / TICKS)
}

/// Resident bytes of this process: now, and their peak.
pub(crate) fn resident_bytes() -> (Option<u64>, Option<u64>) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    (
        status_bytes(&status, "VmRSS:"),
        status_bytes(&status, "VmHWM:"),
    )
}

/// Resets the peak of the resident bytes; false where the system does not support that.
pub(crate) fn reset_peak() -> bool {
    // proc(5), clear_refs: 5 resets the peak resident set size.
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn status_bytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Load average of the last minute.
pub(crate) fn load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Describes the processor: model, number of cores, and the instructions that matter to products.
pub(crate) fn describe(cores: usize) -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        lines.find_map(|(key, value)| (key.trim() == name).then(|| value.trim().to_owned()))
    };
    let flags = field("flags").unwrap_or_default();
    let flags: Vec<&str> = flags.split(' ').collect();
    let instructions = [
        ("avx2", "AVX2"),
        ("avx512f", "AVX-512"),
        ("avx512_bf16", "AVX-512 BF16"),
        ("amx_bf16", "AMX BF16"),
    ];
    let name = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let mut description = vec![name, format!("{cores} cores")];
    for (flag, name) in instructions {
        if flags.contains(&flag) {
            description.push(name.to_owned());
        }
    }
    description.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_processes_have_the_time_that_is_neither_idle_nor_own() {
        let before = processor_time("cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2").unwrap();
        let after = processor_time("cpu  300 0 100 880 0 0 0 20 0 0\n").unwrap();
        // Three seconds passed: 2 busy, 0.2 stolen, 0.8 idle; 1.9 of them are the process's own.
        let others = before.others_until(&after, 1.9).unwrap();
        assert!((others - 0.1).abs() < 1e-9, "{others}");
        assert_eq!(before.others_until(&after, 9.0), Some(0.0));
        assert_eq!(before.others_until(&before, 0.0), None);
        assert_eq!(processor_time("intr 5"), None);
    }

    #[test]
    fn processor_time_is_found_behind_any_process_name() {
        let stat = "7 (a) b) R 1 1 1 0 -1 4194304 100 0 0 0 250 50 0 0 20 0";
        assert_eq!(processor_seconds(stat), Some(3.0));
        assert_eq!(processor_seconds("7 x"), None);
    }

    #[test]
    fn memory_is_in_bytes() {
        let status = "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n";
        assert_eq!(status_bytes(status, "VmHWM:"), Some(2 << 20));
        assert_eq!(status_bytes(status, "VmSwap:"), None);
    }
}
