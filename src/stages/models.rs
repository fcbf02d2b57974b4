//! Keys, folders and weights of the models of a run, for the stages after training.

use anyhow::bail;
use potstill_datasets::{RunModel, Variant};
use potstill_model::{ADAPTER_CONFIG_FILE, DType, Decoder, load_adapter};

use super::{Context, checkpoint, start};

/// Returns the key that identifies a model's weights, for the key of a stage that reads them. The unigram follows from
/// the answers in `train/`.
pub(super) fn model_key(context: &Context, model: RunModel) -> anyhow::Result<String> {
    let run = &context.run;
    match model {
        RunModel::Teacher => checkpoint::content_hash(&checkpoint::teacher(run)?),
        RunModel::Base => start::start_key(run, 0),
        RunModel::Unigram => Ok(context.dir.require("train", "curate", run)?.content_hash()),
        RunModel::Trained(variant) => Ok(context
            .dir
            .require(&export_home(variant), "export", run)?
            .content_hash()),
    }
}

/// Loads a model as it is measured: the teacher in the type that its table names, the others in f32.
pub(super) fn load(context: &Context, model: RunModel) -> anyhow::Result<Decoder> {
    let run = &context.run;
    let (folder, dtype) = match model {
        RunModel::Teacher => (
            checkpoint::teacher(run)?,
            checkpoint::dtype(checkpoint::teacher_table(run)?.dtype),
        ),
        RunModel::Base => return start::start(context, 0),
        RunModel::Unigram => {
            bail!("the unigram is a single distribution and has no weights to load")
        }
        RunModel::Trained(variant) => {
            let folder = context.dir.verified(&export_home(variant))?;
            if folder.join(ADAPTER_CONFIG_FILE).is_file() {
                let base = start::without_adapter(run, 0, &context.device)?;
                return Ok(load_adapter(base, &folder)?);
            }
            (folder, DType::F32)
        }
    };
    checkpoint::load(&folder, &folder, dtype, &context.device)
}

/// Folder of an exported student, below the run directory.
pub(super) fn export_home(variant: Variant) -> String {
    format!("students/{variant}/export")
}

/// Folder of a model's values on test answers, below the run directory.
pub(super) fn test_home(model: RunModel) -> String {
    format!("students/{model}/eval/test")
}

/// Folder of a model's graded answers, below the run directory.
pub(super) fn answers_home(model: RunModel) -> String {
    format!("students/{model}/eval/answers")
}

/// Folder of a model's divergence on its own text, below the run directory.
pub(super) fn own_text_home(model: RunModel) -> String {
    format!("students/{model}/eval/own_text")
}

/// File of a model's figures as JSON. It is beside the folder of the table, so that other tools can read that folder.
pub(super) fn results_file(home: &str) -> String {
    format!("{home}_results.json")
}
