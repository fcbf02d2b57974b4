//! The memory that a run needs, compared with the machine's.

use std::fs;

use anyhow::bail;
use potstill_datasets::SequenceLength;
use potstill_model::{Config, Device};
use potstill_student::{MemoryAdvice, MemorySurroundings, TrainingMemory, memory_advice};

use crate::ranks;
use crate::run_file::Loaded;

/// Bytes of the program itself where nothing is loaded yet: its code, the tokenizer, prompts, and the stacks of threads.
const PROGRAM_BYTES: u64 = 120_000_000;

/// Name of the count of the ledger that has the peak of a training's memory.
pub(crate) const PEAK_COUNT: &str = "bytes of memory at the peak";

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
    let needed = parameters.saturating_mul(bytes_each);
    let machine = of_device(device)?.unwrap_or(u64::MAX);
    match problem(what, needed, machine, hint) {
        Some(problem) => bail!(problem),
        None => Ok(()),
    }
}

/// Returns the memory in bytes that a device has to give: the machine's for a CPU. `None` where it is not known, as for a
/// GPU.
pub(crate) fn of_device(device: &Device) -> anyhow::Result<Option<u64>> {
    let is_cpu = *device == potstill_model::device("cpu")?;
    Ok(machine_bytes().filter(|_| is_cpu))
}

/// The memory of the run's training, and what to change if it does not fit.
#[derive(Debug, Clone)]
pub(crate) struct TrainingFit {
    pub(crate) memory: TrainingMemory,
    /// Memory that there is, bytes; `None` where it is not known.
    pub(crate) limit: Option<u64>,
    /// Changes with which the training fits, those of least harm first; empty if it fits.
    pub(crate) advice: Vec<MemoryAdvice>,
}

impl TrainingFit {
    /// Predicts the memory of training a student with this configuration on sequences of these lengths. Without lengths, only what does not
    /// depend on them is counted.
    pub(crate) fn of(
        run: &Loaded,
        config: &Config,
        device: &Device,
        lengths: &[SequenceLength],
        limit: Option<u64>,
    ) -> anyhow::Result<TrainingFit> {
        let settings = &run.settings.train;
        let surroundings = surroundings(run, config, device)?;
        let memory = TrainingMemory::predict(config, settings, lengths, &surroundings);
        let advice = match limit {
            Some(limit) => memory_advice(config, settings, lengths, &surroundings, limit),
            None => Vec::new(),
        };
        Ok(TrainingFit {
            memory,
            limit,
            advice,
        })
    }

    pub(crate) fn fits(&self) -> bool {
        self.limit.is_none_or(|limit| self.memory.peak() <= limit)
    }

    /// Describes what to change so that the training fits; `None` if it fits.
    pub(crate) fn problem(&self) -> Option<String> {
        let limit = self.limit.filter(|_| !self.fits())?;
        problem(
            "training the student",
            self.memory.peak(),
            limit,
            &self.hint(),
        )
    }

    /// Says what to lower and by how much, as a sentence.
    fn hint(&self) -> String {
        let changes = self.advice.iter().map(|advice| {
            let peak = gigabytes(advice.memory.peak());
            format!("`{}` ({peak}: {})", advice.change, advice.effect)
        });
        let changes: Vec<String> = changes.collect();
        let fits =
            |advice: &MemoryAdvice| self.limit.is_none_or(|limit| advice.memory.peak() <= limit);
        let smaller =
            "choose a smaller student: `layers`, `intermediate_size` or `random` in [student]";
        match self.advice.last() {
            None => smaller.to_owned(),
            Some(last) if fits(last) => format!("set in [train] {}", changes.join(", then ")),
            Some(last)
                if self
                    .limit
                    .is_some_and(|limit| last.memory.peak() / 4 > limit) =>
            {
                smaller.to_owned()
            }
            Some(_) => format!("set in [train] {}, and {smaller}", changes.join(", then ")),
        }
    }
}

/// Facts that the memory of a training depends on besides its settings.
pub(crate) fn surroundings(
    run: &Loaded,
    config: &Config,
    device: &Device,
) -> anyhow::Result<MemorySurroundings> {
    let is_cpu = *device == potstill_model::device("cpu")?;
    let settings = &run.settings;
    let signals = settings.signals().map(|(signals, _)| signals);
    let support = signals.map_or(1, |signals| signals.top_k + signals.tail_draws as usize);
    Ok(MemorySurroundings {
        replicas: match is_cpu {
            true => ranks::replicas_in_memory(settings.train.replicas),
            false => 1,
        },
        support: support.min(config.vocab_size),
        is_host: is_cpu,
        program: if is_cpu { PROGRAM_BYTES } else { 0 },
    })
}

fn problem(what: &str, needed: u64, machine: u64, hint: &str) -> Option<String> {
    (needed > machine).then(|| {
        format!(
            "{what} takes at least {}, and this machine has {} of memory to give\nhint: {hint}",
            gigabytes(needed),
            gigabytes(machine)
        )
    })
}

/// A number of bytes for people, such as `2.9 GB`; a GB is 10⁹ bytes.
pub(crate) fn gigabytes(bytes: u64) -> String {
    let gigabytes = bytes as f64 / 1e9;
    match gigabytes {
        few if few < 0.0995 => format!("{:.0} MB", bytes as f64 / 1e6),
        few if few < 10.0 => format!("{few:.2} GB"),
        many if many < 1e6 => format!("{many:.1} GB"),
        many => format!("{many:.0e} GB"),
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
    Some(kibibytes(&meminfo, "MemAvailable:")?.min(limits.min().unwrap_or(u64::MAX)))
}

/// Largest resident memory of this process since [`reset_peak`], bytes. `None` where the system does not tell, and for a
/// GPU.
pub(crate) fn peak_bytes(device: &Device) -> anyhow::Result<Option<u64>> {
    let is_cpu = *device == potstill_model::device("cpu")?;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    Ok(kibibytes(&status, "VmHWM:").filter(|_| is_cpu))
}

/// Begins a new measurement of [`peak_bytes`], where the system supports that.
pub(crate) fn reset_peak() {
    crate::kernels::trim_heap();
    // proc(5), clear_refs: 5 resets the peak resident set size. Without it, the peak is that of the whole process.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Returns a line of a file below /proc, which is in KiB, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_available_memory_is_read_in_bytes() {
        let available = |text| kibibytes(text, "MemAvailable:");
        let text = "MemFree:  7 kB\nMemAvailable:   16384 kB\n";
        assert_eq!(available(text), Some(16_777_216));
        assert_eq!(available("MemAvailable: much\n"), None);
        assert_eq!(available(""), None);
    }

    #[test]
    fn a_model_larger_than_the_machine_is_refused() {
        let of = |needed| problem("the teacher", needed, 8_000_000_000, "use bf16");
        assert_eq!(of(8_000_000_000), None);
        assert_eq!(
            of(8_010_000_001).unwrap(),
            "the teacher takes at least 8.01 GB, and this machine has 8.00 GB of memory to give\nhint: use bf16"
        );
        assert!(of(u64::MAX).unwrap().contains("at least 2e10 GB"));
    }

    #[test]
    fn sizes_have_three_digits() {
        let sizes = [0, 5_400_000, 99_900_000, 1_234_000_000, 23_450_000_000].map(gigabytes);
        assert_eq!(sizes, ["0 MB", "5 MB", "0.10 GB", "1.23 GB", "23.4 GB"]);
    }
}
