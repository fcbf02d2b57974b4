//! The distance between a local teacher and the model that training starts from.

use std::path::Path;

use potstill_datasets::{Prompt, Tokenizer};
use potstill_model::{Config, DType, Device};
use potstill_student::StartKl;
use potstill_teacher::TextEncoder;

use crate::run_file::Loaded;
use crate::stages::{checkpoint, start};

/// Largest number of tokens of all prompts together.
const TOKENS: usize = 512;
/// Largest number of tokens of a prompt. The rest of a longer prompt is left out, so that several prompts count.
const PROMPT_TOKENS: usize = 128;

/// Measures the start of training on the first prompts; `None` if the start has random weights, the teacher is not
/// local, or the two have different vocabularies.
///
/// # Errors
/// When a checkpoint cannot be loaded or a prompt cannot be rendered.
pub(super) fn start_kl(
    run: &Loaded,
    prompts: &[Prompt],
    device: &Device,
) -> anyhow::Result<Option<StartKl>> {
    let student = &run.settings.student;
    if run.settings.local().is_none() || student.random.is_some() {
        return Ok(None);
    }
    let folder = checkpoint::teacher(run)?;
    let student_folder = checkpoint::student(run)?;
    if !has_same_vocabulary(&folder, &student_folder)? {
        return Ok(None);
    }
    let texts = texts(run, &folder, prompts)?;
    let teacher = checkpoint::load(&folder, &folder, DType::F32, device)?;
    let start = match student.path {
        // A student that is cut from the teacher shares its tensors.
        None => start::pruned(run, teacher.clone())?,
        Some(_) => start::start_on(run, 0, device)?,
    };
    Ok(potstill_student::start_kl(&teacher, &start, &texts))
}

/// Whether both have the same tokenizer; their embeddings may be padded to different sizes.
fn has_same_vocabulary(teacher: &Path, student: &Path) -> anyhow::Result<bool> {
    let fingerprint =
        |folder: &Path| Tokenizer::from_dir(folder).map(|found| found.fingerprint().to_owned());
    Ok(fingerprint(teacher)? == fingerprint(student)?)
}

/// Token ids of the first prompts, each without its end if it is long.
fn texts(run: &Loaded, folder: &Path, prompts: &[Prompt]) -> anyhow::Result<Vec<Vec<u32>>> {
    let encoder = TextEncoder::new(
        checkpoint::tokenizer(folder)?,
        checkpoint::template(run, folder)?,
        run.settings.collect.reasoning.clone(),
    );
    let context = Config::from_dir(folder)?.max_position_embeddings;
    let mut texts: Vec<Vec<u32>> = Vec::new();
    let mut room = TOKENS;
    for prompt in prompts {
        let mut ids = encoder.prompt_ids(prompt)?.to_vec();
        ids.truncate(PROMPT_TOKENS.min(context).min(room));
        room -= ids.len();
        texts.push(ids);
        if room == 0 {
            break;
        }
    }
    texts.retain(|ids| !ids.is_empty());
    Ok(texts)
}
