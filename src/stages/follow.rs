//! The other processes that `mpirun` started: each makes the steps of a training when rank 0 does. They write nothing and
//! print errors alone.

use std::path::Path;

use anyhow::bail;
use potstill_student::{Error as TrainingError, MpiRank};

use super::sources::{self, Extent, Needed, Sources};
use super::training::Training;
use super::{Context, RunOptions, device, run_dir_path};
use crate::progress::Console;
use crate::ranks::Order;
use crate::run_dir::{Access, RunDir};
use crate::run_file::Loaded;

/// Carries out the orders of rank 0 until it ends. `file` and `options` are those of its command line.
///
/// # Errors
/// Those of a training that rank 0 does not have as well.
pub(crate) fn follow(
    rank: MpiRank,
    file: &Path,
    options: &RunOptions,
    console: &Console,
) -> anyhow::Result<()> {
    crate::interrupt::watch(console, "")?;
    let mut context = None;
    while let Order::Train(order) = Order::receive(rank)? {
        // Published files are compared with their manifests once in a context.
        let context = match &mut context {
            Some(context) => context,
            none => none.insert(open(rank, file, &order.run_file, options, console)?),
        };
        match Training::ordered(context, &order)?.steps(context) {
            Ok(_) => {}
            Err(error) => match error.downcast_ref() {
                // All ranks come to this error at the same step. `tune` goes on to the next rate.
                Some(TrainingError::NotFinite { .. } | TrainingError::GradientJump { .. }) => {}
                _ => return Err(error),
            },
        }
    }
    Ok(())
}

/// Opens the run to read it. Rank 0 has fetched what it needs.
fn open(
    rank: MpiRank,
    file: &Path,
    text: &str,
    options: &RunOptions,
    console: &Console,
) -> anyhow::Result<Context> {
    let mut run = Loaded::of_text(file, text.to_owned())?;
    let device = device(&options.device, &run)?;
    let folder = run_dir_path(&run, options);
    let found = sources::resolve(
        &mut run,
        &folder,
        console,
        Needed::Everything,
        Extent::Nothing,
    )?;
    if found != Sources::Complete {
        bail!(
            "the models that process 0 has fetched are not on this machine\nhint: let all machines share the cache of the Hugging Face Hub (`HF_HOME`)"
        );
    }
    let dir = RunDir::open(&folder, &run, Access::Look)?;
    Ok(Context {
        run,
        dir,
        console: console.clone(),
        device,
        limit: options.limit,
        dry_run: false,
        retry_failures: false,
        ranks: Some(rank),
    })
}
