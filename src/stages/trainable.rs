//! The rows of a run as they would be trained on, and the one check that `render`, `check` and `collect` share: rows with a
//! wrong loss mask are refused before anything is computed or paid for.

use std::collections::{BTreeMap, HashMap};

use anyhow::bail;
use potstill_datasets::{
    ChatTemplate, Completion, Error, FinishReason, MaskReport, Message, Prompt, Reasoning, Role,
    Tokenizer, check_mask, check_sampled,
};

use super::{Context, checkpoint, import};
use crate::errors;
use crate::run_file::Loaded;

const PLACEHOLDER: &str = "This is an answer.";
const PLACEHOLDER_REASONING: &str = "This is how it was found.";

/// Number of rows that are checked of each form: the order of the roles, with or without tools and reasoning.
const ROWS_PER_FORM: usize = 8;

/// Largest number of rows that are checked.
const ROWS: usize = 256;

/// Largest number of rows that an error names.
const NAMED_ROWS: usize = 5;

/// Tokenizer, template and reasoning markers that turn a prompt and an answer into a row.
pub(crate) struct RowEncoder {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: ChatTemplate,
    pub(crate) reasoning: Option<Reasoning>,
}

/// An answer to show or to check.
pub(crate) struct ShownAnswer {
    /// Origin of the answer, printed in the header of its row.
    pub(crate) origin: &'static str,
    pub(crate) message: Message,
    /// Token ids as they were sampled, which training reads; `None` for text without ids.
    pub(crate) sampled: Option<Vec<u32>>,
    /// Whether the model ended the answer, so that an EOS token must follow it.
    pub(crate) finished: bool,
}

impl ShownAnswer {
    /// Takes a known answer.
    pub(crate) fn known(origin: &'static str, completion: Completion) -> Self {
        let ids: Option<Vec<u32>> = completion.tokens.iter().map(|t| t.id).collect();
        let finished = [FinishReason::Stop, FinishReason::ToolCalls];
        Self {
            origin,
            message: Message {
                reasoning: completion.reasoning,
                tool_calls: completion.tool_calls,
                ..Message::text(Role::Assistant, completion.answer)
            },
            sampled: ids.filter(|ids| !ids.is_empty()),
            finished: finished.contains(&completion.finish_reason),
        }
    }

    /// Takes the reference, or else a placeholder.
    pub(crate) fn expected(prompt: &Prompt, encoder: &RowEncoder) -> Self {
        let (origin, text) = match &prompt.reference {
            Some(reference) => ("the reference answer", reference.as_str()),
            None => ("a placeholder answer", PLACEHOLDER),
        };
        let reasoning = encoder.reasoning.as_ref();
        Self {
            origin,
            message: Message {
                reasoning: reasoning.map(|_| PLACEHOLDER_REASONING.to_owned()),
                ..Message::text(Role::Assistant, text)
            },
            sampled: None,
            finished: true,
        }
    }
}

impl RowEncoder {
    /// Reads the tokenizer and chat template of the teacher, or of the student if the run has no
    /// teacher with a known tokenizer. The model itself may be of any architecture, since no weights
    /// are read.
    ///
    /// # Errors
    /// When a file is absent or cannot be used.
    pub(crate) fn open(run: &Loaded) -> anyhow::Result<Self> {
        let teacher = match run.settings.teacher {
            Some(_) => checkpoint::teacher_tokenizer_folder(run)?,
            None => None,
        };
        let folder = match teacher {
            Some(folder) => folder,
            None => checkpoint::student(run)?,
        };
        Ok(Self {
            tokenizer: Tokenizer::from_dir(&folder)?,
            template: checkpoint::template(run, &folder)?,
            reasoning: run.settings.collect.reasoning.clone(),
        })
    }

    /// Encodes a row and checks its loss mask.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses the row.
    pub(crate) fn masked(
        &self,
        prompt: &Prompt,
        answer: &ShownAnswer,
    ) -> Result<MaskReport, Error> {
        let (tokenizer, template) = (&self.tokenizer, &self.template);
        let (messages, tools) = (&prompt.messages, prompt.tools.as_deref());
        let (message, finished) = (&answer.message, answer.finished);
        let reasoning = self.reasoning.as_ref();
        match &answer.sampled {
            Some(sampled) => check_sampled(
                tokenizer, template, messages, tools, sampled, finished, reasoning,
            ),
            None => check_mask(tokenizer, template, messages, tools, message, reasoning),
        }
    }
}

/// The rows that cannot be trained on.
#[derive(Debug, Default)]
pub(crate) struct Untrainable {
    faults: Vec<String>,
    hints: Vec<String>,
}

impl Untrainable {
    /// Adds a problem of a row, whose last line may be a hint.
    pub(crate) fn add(&mut self, prompt: &Prompt, problem: &str) {
        let fault = errors::take_hints(problem, &mut self.hints);
        self.faults.push(format!("{}: {fault}", prompt.source));
    }

    /// Adds what is wrong with a row.
    pub(crate) fn add_row(&mut self, prompt: &Prompt, row: &Result<MaskReport, Error>) {
        match row {
            Ok(row) => row
                .findings
                .iter()
                .for_each(|f| self.add(prompt, &f.to_string())),
            Err(error) => self.add(prompt, &error.to_string()),
        }
    }

    /// Refuses the run if any row was added.
    ///
    /// # Errors
    /// The first faults with their rows, and how to mend them.
    pub(crate) fn refuse(self, encoder: &RowEncoder) -> anyhow::Result<()> {
        if self.faults.is_empty() {
            return Ok(());
        }
        let more = self.faults.len().saturating_sub(NAMED_ROWS);
        let mut named: Vec<String> = self.faults.into_iter().take(NAMED_ROWS).collect();
        if more > 0 {
            named.push(format!("and {more} more"));
        }
        let what = format!(
            "the loss mask of these rows is wrong with chat template {}:\n{}",
            encoder.template.name(),
            named.join("\n")
        );
        bail!(errors::with_hints(&what, &self.hints))
    }
}

/// Refuses rows that cannot be trained on: some of each form, with the answer of the data, the reference, or a
/// placeholder.
///
/// # Errors
/// When a row cannot be rendered, or its loss mask is wrong.
pub(crate) fn check_rows(
    run: &Loaded,
    prompts: &[Prompt],
    answers: &[Completion],
) -> anyhow::Result<()> {
    let encoder = RowEncoder::open(run)?;
    let mut known: HashMap<&str, &Completion> = HashMap::new();
    for answer in answers {
        known.entry(&answer.prompt_id).or_insert(answer);
    }
    let mut forms: BTreeMap<String, usize> = BTreeMap::new();
    let mut untrainable = Untrainable::default();
    let mut checked = 0;
    for prompt in prompts {
        let answer = known.get(prompt.id.as_str());
        let seen = forms.entry(form(prompt, answer.copied())).or_default();
        *seen += 1;
        if *seen > ROWS_PER_FORM {
            continue;
        }
        let answer = match answer {
            Some(&answer) => ShownAnswer::known("the answer of the data", answer.clone()),
            None => ShownAnswer::expected(prompt, &encoder),
        };
        untrainable.add_row(prompt, &encoder.masked(prompt, &answer));
        checked += 1;
        if checked == ROWS {
            break;
        }
    }
    untrainable.refuse(&encoder)
}

/// Does the same for the published prompts of a run.
///
/// # Errors
/// As for [`check_rows`].
pub(crate) fn check_published(context: &Context) -> anyhow::Result<()> {
    let run = &context.run;
    // `collect` alone needs no student, so the files of a student may not be here yet.
    let teacher = match run.settings.teacher {
        Some(_) => checkpoint::teacher_tokenizer_folder(run)?,
        None => None,
    };
    let folder = teacher.or_else(|| checkpoint::student(run).ok());
    if !folder.is_some_and(|folder| folder.join("tokenizer.json").is_file()) {
        return Ok(());
    }
    let prompts = import::published(&context.dir.path("prompts"))?;
    check_rows(run, &prompts, &[])
}

/// Describes what a template may treat differently: the roles in order, tools, tool calls and reasoning.
fn form(prompt: &Prompt, answer: Option<&Completion>) -> String {
    let mut form = String::new();
    for message in &prompt.messages {
        form.push_str(message.role.name());
        if !message.tool_calls.is_empty() {
            form.push_str(" calls");
        }
        if message.reasoning.is_some() {
            form.push_str(" reasons");
        }
        if message.content.trim().is_empty() {
            form.push_str(" empty");
        }
        form.push(',');
    }
    if prompt.tools.is_some() {
        form.push_str("tools");
    }
    if let Some(answer) = answer {
        let parts = (answer.reasoning.is_some(), !answer.tool_calls.is_empty());
        form.push_str(&format!("{parts:?}"));
    }
    form
}
