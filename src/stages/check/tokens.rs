//! Compares the tokens of teacher and student: EOS, chat template, reasoning switch, and vocabulary.

use std::path::Path;

use potstill_datasets::{ChatTemplate, Prompt, Tokenizer, bos_problem, prompt_ids};
use potstill_model::Config;
use potstill_teacher::http::Api;

use crate::run_file::Loaded;
use crate::stages::checkpoint;

/// Number of prompts on which the chat templates of teacher and student are compared.
const COMPARED_PROMPTS: usize = 20;

/// A tokenizer and a chat template, with the folder that they come from.
struct TextFiles<'a> {
    folder: &'a Path,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl TextFiles<'_> {
    /// Token ids of a prompt; `None` if it cannot be rendered, which is reported where it is used.
    fn ids(&self, run: &Loaded, prompt: &Prompt) -> Option<Vec<u32>> {
        let ids = prompt_ids(
            &self.tokenizer,
            &self.template,
            &prompt.messages,
            prompt.tools.as_deref(),
            run.settings.collect.reasoning.as_ref(),
        );
        ids.ok()
    }
}

/// Lines about the tokens of the models, and what is likely to be a mistake.
#[derive(Default)]
pub(super) struct TokenReport {
    /// Lines for the plan.
    pub(super) lines: Vec<String>,
    /// Warnings, each with a hint on a line of its own.
    pub(super) warnings: Vec<String>,
}

/// Describes the tokens of the student and, if its folder is known, of the teacher.
///
/// # Errors
/// When a tokenizer, a configuration or a template cannot be read.
pub(super) fn tokens(
    run: &Loaded,
    teacher: Option<&Path>,
    prompts: &[Prompt],
) -> anyhow::Result<TokenReport> {
    let mut report = TokenReport::default();
    let folder = checkpoint::student(run)?;
    let student = TextFiles {
        tokenizer: checkpoint::tokenizer(&folder)?,
        template: checkpoint::student_template(run, &folder)?,
        folder: &folder,
    };
    let teacher = match teacher {
        Some(folder) => Some(TextFiles {
            // The tokenizer of a served model may be without the model's configuration.
            tokenizer: match run.settings.local() {
                Some(_) => checkpoint::tokenizer(folder)?,
                None => Tokenizer::from_dir(folder)?,
            },
            template: checkpoint::template(run, folder)?,
            folder,
        }),
        None => None,
    };
    report.rows("student", &student)?;
    match &teacher {
        Some(teacher) => {
            if run.settings.local().is_some() && teacher.folder != student.folder {
                report.rows("teacher", teacher)?;
            }
            report.arguments("teacher", &teacher.template);
            report.switch(&teacher.template);
            report.compare(run, teacher, &student, prompts);
        }
        None => report.arguments("student", &student.template),
    }
    if let (Some(files), Some(served)) = (&teacher, run.settings.served())
        && served.method == Api::Completions
    {
        report.beginning("teacher", run, files, prompts);
    }
    // A student that learns from distributions has the prompts of its teacher.
    if !run.settings.has_signals() {
        report.beginning("student", run, &student, prompts);
    }
    Ok(report)
}

impl TokenReport {
    /// States the numbers of tokens and rows if they differ.
    fn rows(&mut self, name: &str, files: &TextFiles<'_>) -> anyhow::Result<()> {
        let rows = Config::from_dir(files.folder)?.vocab_size;
        let tokens = files.tokenizer.vocab_size();
        if tokens < rows {
            self.lines.push(format!(
                "tokens    the {name} has {tokens} tokens and {rows} rows in its embedding; the {} rows of padding are never sampled, stored or learned",
                rows - tokens
            ));
        }
        let without = files.tokenizer.tokens_without_row();
        if let Some(first) = without.first() {
            self.lines.push(format!(
                "tokens    the {name}'s embedding of {rows} rows has none for {first:?}{}; a text that contains such a token is refused",
                match without.len() {
                    1 => String::new(),
                    n => format!(" and {} other added tokens", n - 1),
                }
            ));
        }
        Ok(())
    }

    /// Warns of arguments that the template does not read.
    fn arguments(&mut self, table: &str, template: &ChatTemplate) {
        for (name, _) in template.arguments().iter() {
            if !template.reads(name) {
                let hint = match template.thinking_switch() {
                    Some(switch) => format!("did you mean `{switch}`? The template reads it"),
                    None => format!("leave `{name}` out, or name another `template`"),
                };
                self.warnings.push(format!(
                    "the chat template {} does not read `{name}`, so `template_arguments` of [{table}] changes nothing\nhint: {hint}",
                    template.name()
                ));
            }
        }
    }

    /// States that the teacher's reasoning can be switched, if the run file does not decide it.
    fn switch(&mut self, template: &ChatTemplate) {
        let Some(switch) = template.thinking_switch() else {
            return;
        };
        let given = template
            .arguments()
            .iter()
            .find(|(name, _)| *name == switch);
        self.lines.push(match given {
            Some((_, value)) => format!(
                "thinking  `{switch}` is {value}; programs that run the student must set it too"
            ),
            None => format!(
                "thinking  the teacher's template reads `{switch}`, which is not set, so its own default decides whether answers begin with reasoning; `template_arguments` of [teacher] sets it"
            ),
        });
    }

    /// Warns of differences that make a student worse than its training.
    fn compare(
        &mut self,
        run: &Loaded,
        teacher: &TextFiles<'_>,
        student: &TextFiles<'_>,
        prompts: &[Prompt],
    ) {
        if teacher.folder == student.folder {
            return;
        }
        let same_tokens = teacher.tokenizer.fingerprint() == student.tokenizer.fingerprint();
        if same_tokens {
            self.ends(teacher, student);
        }
        let (at_teacher, at_student) = (
            teacher.template.thinking_switch(),
            student.template.thinking_switch(),
        );
        if run.settings.has_signals() {
            let shown = prompts.iter().take(COMPARED_PROMPTS);
            let mut differing =
                shown.filter(|prompt| teacher.ids(run, prompt) != student.ids(run, prompt));
            if let Some(prompt) = differing.next() {
                self.warnings.push(format!(
                    "the student learns prompts as the teacher's chat template writes them, and answers with the template in {}, which writes the prompt of {} in another way\nhint: set `template` of [teacher] to the file that both should use, or copy the teacher's chat template from {} into the student's folder",
                    student.folder.display(),
                    prompt.source,
                    teacher.folder.display()
                ));
            }
        } else if let Some(switch) = at_teacher
            && at_student.is_none()
            && !teacher.template.arguments().is_empty()
        {
            self.warnings.push(format!(
                "the teacher's chat template reads `{switch}` and the student's does not, so the student cannot be switched in this way\nhint: write the student's template so that it reads `{switch}`, or accept that the student always answers as the teacher does in this run"
            ));
        }
    }

    /// Warns if the student's files do not name each EOS token that ends the teacher's answers.
    fn ends(&mut self, teacher: &TextFiles<'_>, student: &TextFiles<'_>) {
        let known = student.tokenizer.eos_ids();
        let unknown: Vec<u32> = teacher.tokenizer.eos_ids().to_vec();
        let unknown: Vec<u32> = unknown
            .into_iter()
            .filter(|id| !known.contains(id))
            .collect();
        if unknown.is_empty() {
            return;
        }
        self.warnings.push(format!(
            "the teacher ends answers with {}, and the student's files do not name {}: a program that runs the student would not stop there\n  teacher: {}\n  student: {}\nhint: add {} to `eos_token_id` in {}",
            shown(&teacher.tokenizer, teacher.tokenizer.eos_ids()),
            shown(&teacher.tokenizer, &unknown),
            sources(&teacher.tokenizer),
            sources(&student.tokenizer),
            unknown.iter().map(u32::to_string).collect::<Vec<_>>().join(", "),
            student.folder.join("generation_config.json").display()
        ));
    }

    /// Warns if a model's prompts do not begin as its tokenizer has them begin.
    fn beginning(&mut self, name: &str, run: &Loaded, files: &TextFiles<'_>, prompts: &[Prompt]) {
        let Some(prompt) = prompts.first() else {
            return;
        };
        let ids = files.ids(run, prompt);
        if let Some(problem) = ids.and_then(|ids| bos_problem(&files.tokenizer, &ids)) {
            self.warnings.push(format!("{name}: {problem}"));
        }
    }
}

/// Lists tokens with their ids.
fn shown(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let tokens: Vec<String> = ids
        .iter()
        .map(|&id| {
            let bytes = tokenizer.token_bytes(id);
            format!("{id} {:?}", String::from_utf8_lossy(&bytes))
        })
        .collect();
    tokens.join(", ")
}

/// Says which file names which EOS tokens.
fn sources(tokenizer: &Tokenizer) -> String {
    let files: Vec<String> = tokenizer
        .eos_sources()
        .iter()
        .map(|source| format!("{} in {}", shown(tokenizer, &source.ids), source.file))
        .collect();
    match files.is_empty() {
        true => "no file names an EOS token".to_owned(),
        false => files.join("; "),
    }
}
