//! Processes that `mpirun` started to train together. The first one, rank 0, runs the command; the others wait for its
//! orders.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Context as _;
use potstill_student::{Collective as _, MpiProcesses, MpiRank};
use serde::{Deserialize, Serialize};

use crate::run_file::{ConfigError, Loaded};

/// Variables in which launchers tell each process how many there are: Open MPI's, and that of MPICH and Intel MPI.
const SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];
/// Variables with the number of this process, from 0.
const RANKS: [&str; 2] = ["OMPI_COMM_WORLD_RANK", "PMI_RANK"];
/// Variables with the number of processes on this machine.
const LOCAL_SIZES: [&str; 2] = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"];
/// Time that another rank leaves to rank 0 to report the same error, which all ranks find in the same data.
const GRACE: Duration = Duration::from_secs(1);

/// A message of rank 0 to the other ranks: the work that is next.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Make the steps of a training.
    Train(TrainingOrder),
    /// Exit: the command has ended.
    Exit,
}

/// The training whose steps begin. The rest is in the run directory and on the command line, which all ranks share.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TrainingOrder {
    /// Text of the run file, which may have changed on the disk since rank 0 read it.
    pub(crate) run_file: String,
    pub(crate) stage: String,
    /// Folder of the training, below the run directory.
    pub(crate) home: String,
    /// Name of the arm and seed.
    pub(crate) variant: String,
    /// Bits of the largest learning rate. JSON may change the last digit of a number.
    pub(crate) learning_rate: u64,
}

impl Order {
    /// Sends the order to all other ranks.
    pub(crate) fn send(&self, rank: MpiRank) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec(self)?;
        (1..rank.size()).for_each(|other| rank.send(other, &bytes));
        Ok(())
    }

    /// Waits for the next order of rank 0.
    pub(crate) fn receive(rank: MpiRank) -> anyhow::Result<Order> {
        serde_json::from_slice(&rank.receive(0)).context("an order of process 0 cannot be read")
    }
}

/// Joins the processes that `mpirun` started; `None` if it started no others.
///
/// # Errors
/// [`ConfigError`] if there are several and this build cannot join them.
pub(crate) fn join() -> Result<Option<MpiProcesses>, ConfigError> {
    let several = processes(variable);
    if several <= 1 {
        return Ok(None);
    }
    let cannot = |why: String| {
        ConfigError::plain(format!(
            "`mpirun` started {several} processes, and they cannot work together: {why}"
        ))
    };
    let joined = MpiProcesses::join().map_err(|error| cannot(error.to_string()))?;
    let found = joined.rank().size();
    if found != several {
        return Err(cannot(format!(
            "this process finds {found} of them\nhint: start them with the `mpirun` of the MPI that `potstill` was built with"
        )));
    }
    Ok(Some(joined))
}

/// Ends this process's part. After an error, which has the exit code, all processes end at once; otherwise rank 0 tells the
/// others to exit.
pub(crate) fn leave(processes: MpiProcesses, failed: Option<u8>) {
    if let Some(exit_code) = failed {
        processes.abort(exit_code);
    }
    let rank = processes.rank();
    if rank.rank() == 0 && Order::Exit.send(rank).is_err() {
        processes.abort(1);
    }
}

/// Lets rank 0 report an error first that all ranks find. It ends this process as well.
pub(crate) fn wait_for_same_error() {
    sleep(GRACE);
}

/// Checks that there is a process for each replica.
///
/// # Errors
/// [`ConfigError`] at `replicas` if `mpirun` started another number of processes.
pub(crate) fn check_replicas(run: &Loaded) -> Result<(), ConfigError> {
    check_number(run, processes(variable))
}

fn check_number(run: &Loaded, processes: usize) -> Result<(), ConfigError> {
    let replicas = run.settings.train.replicas;
    if processes <= 1 || replicas == processes {
        return Ok(());
    }
    let start = match replicas {
        0 | 1 => "start `potstill` without `mpirun`".to_owned(),
        several => format!("start {several} processes, or one for {several} threads"),
    };
    let what = format!(
        "`mpirun` started {processes} processes, and `replicas` is {replicas}\nhint: set `replicas = {processes}` in [train], or {start}"
    );
    Err(run.problem(&["train", "replicas"], what))
}

/// The number of a training's replicas that this process has to find memory for. Rank 0 counts all processes of its machine,
/// before the others begin.
pub(crate) fn replicas_in_memory(replicas: usize) -> usize {
    in_memory(replicas, variable)
}

fn in_memory(replicas: usize, variable: impl Fn(&str) -> Option<String>) -> usize {
    match (processes(&variable), number(&RANKS, &variable)) {
        (0 | 1, _) => replicas,
        (_, Some(rank)) if rank > 0 => 1,
        (several, _) => number(&LOCAL_SIZES, &variable).unwrap_or(several),
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Number of processes that a launcher started, by the environment.
fn processes(variable: impl Fn(&str) -> Option<String>) -> usize {
    number(&SIZES, variable).unwrap_or(1)
}

/// The largest number that one of the variables has.
fn number(names: &[&str], variable: impl Fn(&str) -> Option<String>) -> Option<usize> {
    let numbers = names.iter().filter_map(|name| variable(name)?.parse().ok());
    numbers.max()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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

    #[test]
    fn each_process_finds_memory_for_its_part() {
        let of = |rank: &'static str, local: &'static str| {
            in_memory(8, move |name| match name {
                "OMPI_COMM_WORLD_SIZE" => Some("8".to_owned()),
                "OMPI_COMM_WORLD_RANK" => Some(rank.to_owned()),
                "OMPI_COMM_WORLD_LOCAL_SIZE" => Some(local.to_owned()),
                _ => None,
            })
        };
        assert_eq!([of("0", "4"), of("3", "4"), of("0", "")], [4, 1, 8]);
        assert_eq!(in_memory(3, |_| None), 3);
    }

    #[test]
    fn another_number_of_processes_than_replicas_is_refused_at_the_key() {
        let refused = |replicas: &str, processes| {
            let text = format!(
                "[run]\nname = \"a\"\n[import]\npath = \"a.jsonl\"\ncolumns = {{ question = \"q\" }}\n[teacher]\npath = \"t\"\n[collect]\nsignals = {{ top_k = 8 }}\n[student]\nlayers = {{ every = 2 }}\n[train]\nsteps = 1\n{replicas}"
            );
            let path = Path::new("a.toml");
            let run = Loaded::of_text(path, text).unwrap();
            check_number(&run, processes)
                .err()
                .map(|error| error.to_string())
        };
        assert_eq!(refused("replicas = 4", 1), None);
        assert_eq!(refused("replicas = 4", 4), None);
        let four = refused("replicas = 4", 2).unwrap();
        assert!(four.starts_with("a.toml:14:"), "{four}");
        assert!(four.contains("hint: set `replicas = 2` in [train], or start 4 processes"));
        let one = refused("", 2).unwrap();
        assert!(
            one.contains("hint: set `replicas = 2` in [train], or start `potstill` without"),
            "{one}"
        );
    }

    #[test]
    fn an_order_reaches_the_others_as_it_was() {
        let order = Order::Train(TrainingOrder {
            run_file: "[run]\nname = \"ä\"\n".to_owned(),
            stage: "train student".to_owned(),
            home: "students/student".to_owned(),
            variant: "student-2".to_owned(),
            learning_rate: 3e-3_f64.to_bits(),
        });
        let bytes = serde_json::to_vec(&order).unwrap();
        assert_eq!(serde_json::from_slice::<Order>(&bytes).unwrap(), order);
    }
}
