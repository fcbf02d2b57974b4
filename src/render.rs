//! `render`: which tokens of a few rows carry loss, and whether those are the right ones.
//!
//! A row is shown as it would be trained on: with the published answer where there is one,
//! as it was sampled; else with the data's own answer, the reference or a made-up one behind the
//! chat template.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::bail;
use potstill_datasets::{
    ChatTemplate, Completion, Error, FinishReason, Imported, Manifest, MaskReport, MaskedToken,
    Message, Prompt, Reasoning, Role, Tokenizer, check_mask, check_sampled, read_shard, shards,
};

use crate::progress::{Console, colours};
use crate::run_dir::check_owner;
use crate::run_file::Loaded;
use crate::stages::{RunOptions, checkpoint, import, run_dir_path};

const MADE_UP: &str = "This is an answer.";
const MADE_UP_REASONING: &str = "This is how it was found.";

/// How text becomes tokens in this run.
struct Scene {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    reasoning: Option<Reasoning>,
}

/// An answer to show, and what is known of it.
struct Answer {
    /// Where it comes from, in words.
    from: &'static str,
    message: Message,
    /// The ids as sampled, where there are any: what training reads.
    sampled: Option<Vec<u32>>,
    /// Whether it ends by itself, so that an EOS belongs behind it.
    finished: bool,
}

/// Shows the first `rows` rows of a run's data, and fails when a mask is wrong.
///
/// # Errors
/// What the run file, the data, the teacher's tokenizer or its template get wrong; and,
/// once all rows are shown: a row whose EOS is masked, whose reasoning was stripped, or
/// whose prompt is trained on.
pub fn render(
    file: &Path,
    run_dir: Option<PathBuf>,
    rows: usize,
    console: &Console,
) -> anyhow::Result<()> {
    let run = Loaded::read(file)?;
    let options = RunOptions {
        run_dir,
        ..RunOptions::default()
    };
    let dir = run_dir_path(&run, &options);
    check_owner(&dir, &run)?;
    let teachers = match run.file.teacher {
        Some(_) => checkpoint::teachers_text(&run)?,
        None => None,
    };
    let folder = match teachers {
        Some(folder) => folder,
        None => checkpoint::student(&run)?,
    };
    let scene = Scene {
        // Of any architecture: no model is run.
        tokenizer: Tokenizer::from_dir(&folder)?,
        template: checkpoint::template(&run, &folder)?,
        reasoning: run.file.collect.reasoning.clone(),
    };
    let limit = run.file.import.limit.map_or(rows, |n| rows.min(n));
    let Imported {
        prompts, answers, ..
    } = import::read(&run, Some(limit))?;
    let mut published = published(&dir.join("completions"), &prompts)?;
    let mut given: HashMap<String, Completion> = HashMap::new();
    for answer in answers {
        given.entry(answer.prompt_id.clone()).or_insert(answer);
    }
    let colours = colours();
    console.note(match colours {
        true => "green carries loss, the rest does not; the EOS is reversed",
        false => "⟦…⟧ carries loss, the rest does not; ⏹ is the EOS",
    });
    let mut wrong = Vec::new();
    for prompt in &prompts {
        let known = match published.remove(&prompt.id) {
            Some(completion) => Some(("the published answer", completion)),
            None => given
                .remove(&prompt.id)
                .map(|c| ("the answer of the data", c)),
        };
        let answer = answer(known, prompt, &scene);
        let mut say = |fault: String| wrong.push(format!("{}: {fault}", prompt.source));
        match masked(&scene, prompt, &answer) {
            Ok(row) => {
                console.output(&shown(&scene, prompt, &answer, &row, colours));
                row.findings.iter().for_each(|f| say(f.to_string()));
            }
            Err(error) => say(error.to_string()),
        }
    }
    if !wrong.is_empty() {
        bail!(
            "with chat template {} these rows would not be trained on as they should:\n{}",
            scene.template.name(),
            wrong.join("\n")
        );
    }
    console.note("fine: answers carry loss and prompts do not");
    Ok(())
}

/// The first published answer to each of the prompts, by prompt id; none where nothing is
/// published.
fn published(dir: &Path, prompts: &[Prompt]) -> anyhow::Result<HashMap<String, Completion>> {
    let mut found = HashMap::new();
    if Manifest::read(dir)?.is_none() {
        return Ok(found);
    }
    for shard in shards(dir)? {
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

/// The answer to show: a known one, else the reference, else made up.
fn answer(known: Option<(&'static str, Completion)>, prompt: &Prompt, scene: &Scene) -> Answer {
    if let Some((from, completion)) = known {
        let ids: Option<Vec<u32>> = completion.tokens.iter().map(|t| t.id).collect();
        let finished = [FinishReason::Stop, FinishReason::ToolCalls];
        return Answer {
            from,
            message: Message {
                reasoning: completion.reasoning,
                tool_calls: completion.tool_calls,
                ..Message::text(Role::Assistant, completion.answer)
            },
            sampled: ids.filter(|ids| !ids.is_empty()),
            finished: finished.contains(&completion.finish_reason),
        };
    }
    let reasoning = scene.reasoning.as_ref();
    let (from, text) = match &prompt.reference {
        Some(reference) => ("the reference answer", reference.as_str()),
        None => ("a made-up answer", MADE_UP),
    };
    Answer {
        from,
        message: Message {
            reasoning: reasoning.map(|_| MADE_UP_REASONING.to_owned()),
            ..Message::text(Role::Assistant, text)
        },
        sampled: None,
        finished: true,
    }
}

/// A row in tokens, and what is wrong with its mask.
fn masked(scene: &Scene, prompt: &Prompt, answer: &Answer) -> Result<MaskReport, Error> {
    let Scene {
        tokenizer,
        template,
        reasoning,
    } = scene;
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

/// How a token is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Text,
    Special,
    Eos,
}

/// A row as text: a line about it, then its tokens, indented.
fn shown(
    scene: &Scene,
    prompt: &Prompt,
    answer: &Answer,
    row: &MaskReport,
    colours: bool,
) -> String {
    let carried = row.tokens.iter().filter(|token| token.loss).count();
    let cut = match answer.finished {
        true => "",
        false => ", cut before its end",
    };
    let mut out = format!(
        "{}, {}{cut}: {} tokens, {carried} carry loss\n  ",
        prompt.source,
        answer.from,
        row.tokens.len()
    );
    let looks: Vec<(&MaskedToken, Look)> = row
        .tokens
        .iter()
        .map(|token| (token, look(&scene.tokenizer, token)))
        .collect();
    let mut carried = false;
    for run in looks.chunk_by(|a, b| (a.0.loss, a.1) == (b.0.loss, b.1)) {
        let bytes: Vec<u8> = run.iter().flat_map(|(t, _)| t.bytes.clone()).collect();
        let text = visible(&String::from_utf8_lossy(&bytes));
        let Some((MaskedToken { loss, .. }, look)) = run.first() else {
            continue;
        };
        if colours {
            out += &coloured(&text, *loss, *look);
            continue;
        }
        if *loss != carried {
            out.push(if *loss { '⟦' } else { '⟧' });
            carried = *loss;
        }
        out += &text;
        if *look == Look::Eos {
            out.push('⏹');
        }
    }
    if carried {
        out.push('⟧');
    }
    out
}

/// An EOS that carries loss is the answer's end; others end turns of the prompt.
fn look(tokenizer: &Tokenizer, &MaskedToken { id, loss, .. }: &MaskedToken) -> Look {
    if loss && tokenizer.eos_ids().contains(&id) {
        return Look::Eos;
    }
    let text = |skip_special| tokenizer.decode(&[id], skip_special).unwrap_or_default();
    match text(true).is_empty() && !text(false).is_empty() {
        true => Look::Special,
        false => Look::Text,
    }
}

/// Text that cannot move the terminal's cursor; later lines are indented.
fn visible(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '\n' => out += "\n  ",
            '\t' => out.push('\t'),
            c if c.is_control() => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

fn coloured(text: &str, loss: bool, look: Look) -> String {
    let style = match (loss, look) {
        (_, Look::Eos) => "1;7;32",
        (true, Look::Special) => "1;35",
        (true, Look::Text) => "1;32",
        (false, Look::Special) => "2;35",
        (false, Look::Text) => "2",
    };
    format!("\u{1b}[{style}m{text}\u{1b}[0m")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Bytes, `<s>`, `</s>` and a template that writes a turn as text and EOS.
    fn scene() -> Scene {
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
        Scene {
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
    fn a_sampled_answer_has_to_end() {
        let scene = scene();
        let found = |text: &str, finished| {
            let answer = Answer {
                from: "a test",
                message: Message::text(Role::Assistant, "cd"),
                sampled: Some(scene.tokenizer.encode(text, false).unwrap()),
                finished,
            };
            let row = masked(&scene, &prompt(), &answer).unwrap();
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
    fn rows_are_shown_with_marks_or_colours() {
        let scene = scene();
        let (prompt, answer) = (prompt(), answer(None, &prompt(), &scene));
        let row = masked(&scene, &prompt, &answer).unwrap();
        assert_eq!(
            shown(&scene, &prompt, &answer, &row, false),
            "p.jsonl:1, a made-up answer: 22 tokens, 19 carry loss\n  <s>ab⟦This is an answer.</s>⏹⟧"
        );
        let colours = shown(&scene, &prompt, &answer, &row, true);
        let (_, colours) = colours.split_once("\n  ").unwrap();
        assert_eq!(
            colours,
            "\u{1b}[2;35m<s>\u{1b}[0m\u{1b}[2mab\u{1b}[0m\u{1b}[1;32mThis is an answer.\u{1b}[0m\u{1b}[1;7;32m</s>\u{1b}[0m"
        );
    }

    #[test]
    fn control_characters_are_spelled_out() {
        assert_eq!(visible("a\u{1b}[2Jb\nc\td"), "a\\u{1b}[2Jb\n  c\td");
    }

    #[test]
    fn each_look_has_a_style_of_its_own() {
        let styles: std::collections::HashSet<String> = [
            (true, Look::Eos),
            (true, Look::Special),
            (true, Look::Text),
            (false, Look::Special),
            (false, Look::Text),
        ]
        .map(|(loss, look)| coloured("x", loss, look))
        .into();
        assert_eq!(styles.len(), 5);
    }
}
