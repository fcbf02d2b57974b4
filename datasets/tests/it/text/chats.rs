//! 200 chats with and without reasoning, tools, a generation prompt and arguments of the template, against what
//! transformers renders (`tests/data/templates/chats.py`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use chrono::NaiveDate;
use potstill_datasets::{
    ChatTemplate, Error, Finding, RenderOptions, SpecialTokens, TemplateArguments,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::messages;
use super::reference::real;

/// For each template and each set of arguments, the renderings of each chat without and with generation prompt.
type Golden = BTreeMap<String, BTreeMap<String, Vec<[String; 2]>>>;

fn read(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(name)).unwrap()
}

/// A template that joins tools to text marked `safe`, so that Python escapes them for HTML.
const ESCAPES: &str = "meetkai-functionary-medium-v3.1.jinja";

/// The first 16 digits of the SHA-256 of a rendering, `!` and the message of a refusal, or `?` for another failure.
fn short(template: &ChatTemplate, chat: &Value, add_generation_prompt: bool) -> String {
    let special = SpecialTokens {
        bos: Some("<s>".to_owned()),
        eos: Some("</s>".to_owned()),
        unk: None,
        pad: None,
    };
    let options = RenderOptions {
        add_generation_prompt,
        special: &special,
        reasoning: None,
        now: NaiveDate::from_ymd_opt(2026, 3, 5)
            .unwrap()
            .and_hms_opt(14, 7, 9),
    };
    let tools = chat.get("tools").map(Value::to_string);
    let mut messages = messages(&chat["messages"]);
    let mut rendered = template.render(&messages, tools.as_deref(), options);
    if let Err(Error::Untrainable { finding, .. }) = &rendered {
        // Transformers leaves out reasoning that the template does not read.
        assert_eq!(**finding, Finding::ReasoningUnplaced);
        messages
            .iter_mut()
            .for_each(|message| message.reasoning = None);
        rendered = template.render(&messages, tools.as_deref(), options);
    }
    match rendered {
        Ok(rendered) => {
            let digest = Sha256::digest(rendered.text.as_bytes());
            digest.iter().take(8).fold(String::new(), |mut text, byte| {
                write!(text, "{byte:02x}").unwrap();
                text
            })
        }
        Err(Error::TemplateRaised { message, .. }) => format!("!{message}"),
        Err(Error::TemplateRender { .. }) => "?".to_owned(),
        Err(other) => panic!("{other:?}"),
    }
}

/// Compares the renderings of a folder's templates, and returns the number that are equal.
fn compare(folder: &Path) -> usize {
    let golden: Golden = serde_json::from_str(&read(folder, "chats-golden.json")).unwrap();
    let chats: Value = serde_json::from_str(&read(folder, "chats.json")).unwrap();
    let (mut equal, mut differ) = (0, Vec::new());
    for (name, sets) in golden.iter().filter(|(name, _)| *name != ESCAPES) {
        let template = match ChatTemplate::from_source(name, &read(folder, name)) {
            Ok(template) => template,
            Err(error) => {
                differ.push(error.to_string());
                continue;
            }
        };
        for (set, renderings) in sets {
            let arguments: TemplateArguments =
                serde_json::from_value(chats["arguments"][set].clone()).unwrap();
            let template = template.clone().with_arguments(arguments);
            let all = chats["chats"].as_array().unwrap().iter().zip(renderings);
            let mut apart = Vec::new();
            for (index, (chat, expected)) in all.enumerate() {
                for (prompt, expected) in [false, true].into_iter().zip(expected) {
                    // Python may fail where a loop over `none` has no items here.
                    if expected == "?" {
                        continue;
                    }
                    match short(&template, chat, prompt) == *expected {
                        true => equal += 1,
                        false => apart.push((index, prompt)),
                    }
                }
            }
            if !apart.is_empty() {
                let first: Vec<_> = apart.iter().take(3).collect();
                differ.push(format!(
                    "{name}, arguments {set:?}: {} differ, {first:?}",
                    apart.len()
                ));
            }
        }
    }
    assert!(differ.is_empty(), "{equal} equal\n{}", differ.join("\n"));
    equal
}

#[test]
fn chats_render_as_transformers_renders_them() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/templates/thinking");
    assert_eq!(compare(&folder), 2 * 4 * 200 * 2);
}

#[test]
fn chats_render_as_transformers_renders_them_with_released_templates() {
    let Some(folder) = real("templates") else {
        return;
    };
    println!("{} renderings are equal", compare(&folder));
}
