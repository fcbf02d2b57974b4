//! `render`: shows which tokens of a few rows carry loss, and checks that these are the right
//! tokens.
//!
//! A row is shown as it would be trained on. If an answer to the prompt is published, the row has
//! its tokens as they were sampled. Otherwise the chat template encodes the data's own answer, the
//! reference, or a placeholder.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::bail;
use potstill_datasets::{
    ChatTemplate, Completion, Error, FinishReason, Imported, Manifest, MaskReport, MaskedToken,
    Message, Prompt, Reasoning, Role, Tokenizer, check_mask, check_sampled, read_shard, shards,
    visible_line,
};

use crate::errors;
use crate::progress::{Console, colours};
use crate::run_dir::{Verifier, check_owner};
use crate::run_file::Loaded;
use crate::stages::sources::{self, Extent, Needed, Sources};
use crate::stages::{RunOptions, checkpoint, import, run_dir_path};

const PLACEHOLDER: &str = "This is an answer.";
const PLACEHOLDER_REASONING: &str = "This is how it was found.";

/// Tokenizer, template and reasoning markers that turn a prompt and an answer into a row.
struct RowEncoder {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    reasoning: Option<Reasoning>,
}

/// An answer to show.
struct ShownAnswer {
    /// Origin of the answer, printed in the header of its row.
    origin: &'static str,
    message: Message,
    /// Token ids as they were sampled, which training reads; `None` for text without ids.
    sampled: Option<Vec<u32>>,
    /// Whether the model ended the answer, so that an EOS token must follow it.
    finished: bool,
}

/// Prints the first `rows` rows of a run's data and checks their loss masks.
///
/// # Errors
/// When the run file, the data, the tokenizer or the chat template cannot be used. After all rows
/// are printed: when the EOS of a row carries no loss, its reasoning is missing, or its prompt
/// carries loss.
pub fn render(
    file: &Path,
    run_dir: Option<PathBuf>,
    rows: usize,
    console: &Console,
) -> anyhow::Result<()> {
    let mut run = Loaded::read(file)?;
    let options = RunOptions {
        run_dir,
        ..RunOptions::default()
    };
    let dir = run_dir_path(&run, &options);
    check_owner(&dir, &run)?;
    let extent = Extent::WithoutWeights;
    if sources::resolve(&mut run, &dir, console, Needed::Everything, extent)? >= Sources::Incomplete
    {
        bail!(
            "the files named above are not on this machine\nhint: `potstill run {}` fetches them",
            file.display()
        );
    }
    let encoder = row_encoder(&run)?;
    let limit = run.settings.import.limit.map_or(rows, |n| rows.min(n));
    let imported = import::read(&run, Some(limit))?;
    let mut known = known_answers(&dir, &imported)?;
    let colours = colours();
    console.note(match colours {
        true => "tokens in green carry loss, the others do not; the EOS is reversed",
        false => "tokens in ⟦…⟧ carry loss, the others do not; ⏹ is the EOS",
    });
    let arguments = encoder.template.arguments();
    if !arguments.is_empty() {
        console.note(&format!("the chat template gets {}", arguments.to_json()));
    }
    let (mut faults, mut hints) = (Vec::new(), Vec::new());
    for prompt in &imported.prompts {
        let answer = shown_answer(known.remove(&prompt.id), prompt, &encoder);
        let mut add_fault = |fault: String| {
            let fault = errors::take_hints(&fault, &mut hints);
            faults.push(format!("{}: {fault}", prompt.source));
        };
        match masked(&encoder, prompt, &answer) {
            Ok(row) => {
                console.styled(&shown(&encoder, prompt, &answer, &row, colours));
                row.findings.iter().for_each(|f| add_fault(f.to_string()));
            }
            Err(error) => add_fault(error.to_string()),
        }
    }
    if !faults.is_empty() {
        let what = format!(
            "the loss mask of these rows is wrong with chat template {}:\n{}",
            encoder.template.name(),
            faults.join("\n")
        );
        bail!(errors::with_hints(&what, &hints));
    }
    console.note("the loss masks are right: answers carry loss and prompts do not");
    Ok(())
}

/// Reads the tokenizer and chat template of the teacher, or of the student if the run has no
/// teacher with a known tokenizer. The model itself may be of any architecture, since no weights
/// are read.
fn row_encoder(run: &Loaded) -> anyhow::Result<RowEncoder> {
    let teacher = match run.settings.teacher {
        Some(_) => checkpoint::teacher_tokenizer_folder(run)?,
        None => None,
    };
    let folder = match teacher {
        Some(folder) => folder,
        None => checkpoint::student(run)?,
    };
    Ok(RowEncoder {
        tokenizer: Tokenizer::from_dir(&folder)?,
        template: checkpoint::template(run, &folder)?,
        reasoning: run.settings.collect.reasoning.clone(),
    })
}

/// The answers that exist, by prompt id, each with its origin: the first published answer to a
/// prompt, otherwise the first answer in the data.
fn known_answers(
    run_dir: &Path,
    imported: &Imported,
) -> anyhow::Result<HashMap<String, (&'static str, Completion)>> {
    let published = published(run_dir, &imported.prompts)?;
    let mut known: HashMap<_, _> = published
        .into_iter()
        .map(|(id, completion)| (id, ("the published answer", completion)))
        .collect();
    for answer in &imported.answers {
        known
            .entry(answer.prompt_id.clone())
            .or_insert_with(|| ("the answer of the data", answer.clone()));
    }
    Ok(known)
}

/// Reads the first published answer to each of the prompts, by prompt id. The map is empty if
/// nothing is published.
fn published(run_dir: &Path, prompts: &[Prompt]) -> anyhow::Result<HashMap<String, Completion>> {
    let mut found = HashMap::new();
    if Manifest::read(&run_dir.join("completions"))?.is_none() {
        return Ok(found);
    }
    for shard in shards(&Verifier::default().open(run_dir, "completions")?)? {
        for completion in read_shard::<Completion>(&shard)? {
            if found.len() == prompts.len() {
                return Ok(found);
            }
            let completion = completion?;
            let wanted = |p: &Prompt| p.id == completion.prompt_id;
            if prompts.iter().any(wanted) && !found.contains_key(&completion.prompt_id) {
                found.insert(completion.prompt_id.clone(), completion);
            }
        }
    }
    Ok(found)
}

/// Selects the answer to show: a known answer, otherwise the reference, otherwise a placeholder.
fn shown_answer(
    known: Option<(&'static str, Completion)>,
    prompt: &Prompt,
    encoder: &RowEncoder,
) -> ShownAnswer {
    if let Some((origin, completion)) = known {
        let ids: Option<Vec<u32>> = completion.tokens.iter().map(|t| t.id).collect();
        let finished = [FinishReason::Stop, FinishReason::ToolCalls];
        return ShownAnswer {
            origin,
            message: Message {
                reasoning: completion.reasoning,
                tool_calls: completion.tool_calls,
                ..Message::text(Role::Assistant, completion.answer)
            },
            sampled: ids.filter(|ids| !ids.is_empty()),
            finished: finished.contains(&completion.finish_reason),
        };
    }
    let reasoning = encoder.reasoning.as_ref();
    let (origin, text) = match &prompt.reference {
        Some(reference) => ("the reference answer", reference.as_str()),
        None => ("a placeholder answer", PLACEHOLDER),
    };
    ShownAnswer {
        origin,
        message: Message {
            reasoning: reasoning.map(|_| PLACEHOLDER_REASONING.to_owned()),
            ..Message::text(Role::Assistant, text)
        },
        sampled: None,
        finished: true,
    }
}

/// Encodes a row and checks its loss mask.
fn masked(
    encoder: &RowEncoder,
    prompt: &Prompt,
    answer: &ShownAnswer,
) -> Result<MaskReport, Error> {
    let RowEncoder {
        tokenizer,
        template,
        reasoning,
    } = encoder;
    let (messages, tools) = (&prompt.messages, prompt.tools.as_deref());
    let reasoning = reasoning.as_ref();
    match &answer.sampled {
        Some(sampled) => {
            let finished = answer.finished;
            check_sampled(
                tokenizer, template, messages, tools, sampled, finished, reasoning,
            )
        }
        None => check_mask(
            tokenizer,
            template,
            messages,
            tools,
            &answer.message,
            reasoning,
        ),
    }
}

/// Display style of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenStyle {
    Text,
    Special,
    Eos,
}

/// Text and the terminal's codes for its style; no codes for text without a style.
type StyledText = (Option<&'static str>, String);

/// Formats a row: a header line, then its tokens, indented.
fn shown(
    encoder: &RowEncoder,
    prompt: &Prompt,
    answer: &ShownAnswer,
    row: &MaskReport,
    colours: bool,
) -> Vec<StyledText> {
    let with_loss = row.tokens.iter().filter(|token| token.loss).count();
    let cut = match answer.finished {
        true => "",
        false => ", cut off before its end",
    };
    let header = format!(
        "{}, {}{cut}: {} tokens, {with_loss} carry loss\n  ",
        visible_line(&prompt.source),
        answer.origin,
        row.tokens.len()
    );
    let mut out = vec![(None, header)];
    let styled: Vec<(&MaskedToken, TokenStyle)> = row
        .tokens
        .iter()
        .map(|token| (token, token_style(&encoder.tokenizer, token)))
        .collect();
    let mut in_loss = false;
    for run in styled.chunk_by(|a, b| (a.0.loss, a.1) == (b.0.loss, b.1)) {
        let bytes: Vec<u8> = run.iter().flat_map(|(t, _)| t.bytes.clone()).collect();
        let text = String::from_utf8_lossy(&bytes).replace('\n', "\n  ");
        let Some((MaskedToken { loss, .. }, style)) = run.first() else {
            continue;
        };
        if colours {
            out.push((Some(style_codes(*loss, *style)), text));
            continue;
        }
        let mark = match (*loss, *loss == in_loss) {
            (_, true) => "",
            (true, false) => "⟦",
            (false, false) => "⟧",
        };
        in_loss = *loss;
        let end = if *style == TokenStyle::Eos { "⏹" } else { "" };
        out.push((None, format!("{mark}{text}{end}")));
    }
    if in_loss {
        out.push((None, "⟧".to_owned()));
    }
    out
}

/// Selects the style of a token. Only an EOS that carries loss ends the answer; any other EOS
/// ends a turn of the prompt.
fn token_style(tokenizer: &Tokenizer, &MaskedToken { id, loss, .. }: &MaskedToken) -> TokenStyle {
    if loss && tokenizer.eos_ids().contains(&id) {
        return TokenStyle::Eos;
    }
    let text = |skip_special| tokenizer.decode(&[id], skip_special).unwrap_or_default();
    match text(true).is_empty() && !text(false).is_empty() {
        true => TokenStyle::Special,
        false => TokenStyle::Text,
    }
}

/// The terminal's codes for a style.
fn style_codes(loss: bool, style: TokenStyle) -> &'static str {
    match (loss, style) {
        (_, TokenStyle::Eos) => "1;7;32",
        (true, TokenStyle::Special) => "1;35",
        (true, TokenStyle::Text) => "1;32",
        (false, TokenStyle::Special) => "2;35",
        (false, TokenStyle::Text) => "2",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// An encoder whose tokens are bytes, `<s>` and `</s>`, with a template that writes a turn as text
    /// and EOS.
    fn encoder() -> RowEncoder {
        let dir = tempfile::tempdir().unwrap();
        let special = ["<s>", "</s>"];
        let added: Vec<_> = (0..2)
            .map(|id| {
                json!({ "id": id, "content": special[id], "single_word": false, "lstrip": false,
                        "rstrip": false, "normalized": false, "special": true })
            })
            .collect();
        let byte = |b: usize| (format!("<0x{b:02X}>"), json!(2 + b));
        let mut vocabulary: serde_json::Map<_, _> = (0..256).map(byte).collect();
        vocabulary.extend([("<s>".to_owned(), json!(0)), ("</s>".to_owned(), json!(1))]);
        let tokenizer = json!({
            "version": "1.0", "added_tokens": added,
            "decoder": { "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, { "type": "Fuse" }] },
            "model": { "type": "BPE", "unk_token": "<s>", "byte_fallback": true,
                       "vocab": vocabulary, "merges": [] },
        });
        let names = json!({ "bos_token": "<s>", "eos_token": "</s>" });
        let write = |name, json: serde_json::Value| {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        };
        write("tokenizer.json", tokenizer);
        write("tokenizer_config.json", names);
        RowEncoder {
            tokenizer: Tokenizer::from_dir(dir.path()).unwrap(),
            template: ChatTemplate::plain().unwrap(),
            reasoning: None,
        }
    }

    fn prompt() -> Prompt {
        let messages = vec![Message::text(Role::User, "ab")];
        Prompt::new(messages, None, None, "p.jsonl:1".to_owned())
    }

    #[test]
    fn a_finished_answer_without_eos_is_a_fault() {
        let encoder = encoder();
        let found = |text: &str, finished| {
            let answer = ShownAnswer {
                origin: "a test",
                message: Message::text(Role::Assistant, "cd"),
                sampled: Some(encoder.tokenizer.encode(text, false).unwrap()),
                finished,
            };
            let row = masked(&encoder, &prompt(), &answer).unwrap();
            let mask: Vec<bool> = row.tokens.iter().map(|token| token.loss).collect();
            assert_eq!(mask[..5], [false, false, false, true, true]);
            row.findings.len()
        };
        assert_eq!(
            [found("cd</s>", true), found("cd", false), found("cd", true)],
            [0, 0, 1]
        );
    }

    #[test]
    fn rows_are_printed_with_marks_or_colours() {
        let encoder = encoder();
        let (prompt, answer) = (prompt(), shown_answer(None, &prompt(), &encoder));
        let row = masked(&encoder, &prompt, &answer).unwrap();
        let parts = |colours| shown(&encoder, &prompt, &answer, &row, colours);
        let text: String = parts(false).into_iter().map(|(_, text)| text).collect();
        assert_eq!(
            text,
            "p.jsonl:1, a placeholder answer: 22 tokens, 19 carry loss\n  <s>ab⟦This is an answer.</s>⏹⟧"
        );
        let coloured = parts(true);
        let coloured: Vec<_> = (coloured.iter().skip(1))
            .map(|(codes, text)| (codes.unwrap(), text.as_str()))
            .collect();
        assert_eq!(
            coloured,
            [
                ("2;35", "<s>"),
                ("2", "ab"),
                ("1;32", "This is an answer."),
                ("1;7;32", "</s>")
            ]
        );
    }

    #[test]
    fn each_token_style_has_its_own_colours() {
        let styles: std::collections::HashSet<&str> = [
            (true, TokenStyle::Eos),
            (true, TokenStyle::Special),
            (true, TokenStyle::Text),
            (false, TokenStyle::Special),
            (false, TokenStyle::Text),
        ]
        .map(|(loss, style)| style_codes(loss, style))
        .into();
        assert_eq!(styles.len(), 5);
    }
}
