//! Processes that `mpirun` started together.

use crate::run_file::ConfigError;

/// Variables in which launchers give each process their number: Open MPI's, and that of MPICH and Intel MPI.
const SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// Refuses to run as one of several processes, which would all write the same run directory.
///
/// # Errors
/// [`ConfigError`] if a launcher of MPI started more than one process.
pub(crate) fn refuse_several() -> Result<(), ConfigError> {
    let variable = |name: &str| std::env::var(name).ok();
    match processes(variable) {
        0 | 1 => Ok(()),
        several => Err(ConfigError::plain(format!(
            "`mpirun` started {several} processes, which cannot train together in this build: the stages do not use its feature `mpi` yet\nhint: start `potstill` without `mpirun`, and set `replicas = {several}` in [train] to train with threads"
        ))),
    }
}

/// Number of processes that a launcher started, by the environment.
fn processes(variable: impl Fn(&str) -> Option<String>) -> usize {
    let sizes = SIZES.iter().filter_map(|name| variable(name)?.parse().ok());
    sizes.max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_processes_is_that_of_the_launcher() {
        let of = |set: &'static str, value: &'static str| {
            processes(move |name| (name == set).then(|| value.to_owned()))
        };
        assert_eq!(of("OMPI_COMM_WORLD_SIZE", "4"), 4);
        assert_eq!(of("PMI_SIZE", "2"), 2);
        assert_eq!(of("PMI_SIZE", "many"), 1);
        assert_eq!(of("OTHER", "4"), 1);
    }
}
