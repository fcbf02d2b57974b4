//! Renderings against `tests/data/templates/golden.json`, which transformers made (`make.py` beside it).

use std::fs;
use std::path::PathBuf;

use chrono::NaiveDate;
use potstill_datasets::{
    ChatTemplate, Error, Message, Reasoning, RenderOptions, Rendered, Role, SpecialTokens,
};
use serde_json::Value;

use super::messages;

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/templates")
        .join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(data(name)).unwrap()).unwrap()
}

fn special() -> SpecialTokens {
    SpecialTokens {
        bos: Some("<s>".to_owned()),
        eos: Some("</s>".to_owned()),
        unk: None,
        pad: None,
    }
}

fn render(source: &str, case: &Value, add_generation_prompt: bool) -> Result<Rendered, Error> {
    let tools = case.get("tools").map(Value::to_string);
    // Templates that do not know reasoning leave it out in transformers.
    let mut messages = messages(&case["messages"]);
    if !source.contains("reasoning_content") {
        messages
            .iter_mut()
            .for_each(|message| message.reasoning = None);
    }
    ChatTemplate::from_source("test", source)?.render(
        &messages,
        tools.as_deref(),
        RenderOptions {
            add_generation_prompt,
            special: &special(),
            reasoning: None,
            now: NaiveDate::from_ymd_opt(2026, 3, 5)
                .unwrap()
                .and_hms_opt(14, 7, 9),
        },
    )
}

fn render_simple(source: &str) -> Result<Rendered, Error> {
    let case = serde_json::json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    render(source, &case, false)
}

#[test]
fn renders_as_transformers_does() {
    let cases = json("cases.json");
    let golden = json("golden.json");
    let golden = golden.as_array().unwrap();
    assert!(golden.len() >= 150);
    for entry in golden {
        let (template, case) = (
            entry["template"].as_str().unwrap(),
            entry["case"].as_str().unwrap(),
        );
        let source = fs::read_to_string(data(template)).unwrap();
        let rendered = render(
            &source,
            &cases[case],
            entry["add_generation_prompt"].as_bool().unwrap(),
        );
        let what = format!(
            "{template}, case {case:?}, prompt {}",
            entry["add_generation_prompt"]
        );
        match (rendered, entry["text"].as_str()) {
            (Ok(rendered), Some(text)) => {
                for (ours, theirs) in rendered.text.lines().zip(text.lines()) {
                    assert_eq!(ours, theirs, "{what}");
                }
                assert_eq!(rendered.text, text, "{what}");
                let spans: Vec<[usize; 2]> = rendered
                    .generation
                    .iter()
                    .map(|span| [span.start, span.end])
                    .collect();
                assert_eq!(serde_json::json!(spans), entry["generation"], "{what}");
            }
            (Err(Error::TemplateRaised { message, .. }), None) => {
                assert_eq!(entry["raised"].as_str(), Some(message.as_str()), "{what}");
            }
            (Err(Error::TemplateRender { .. }), None) => assert_eq!(entry["fails"], true, "{what}"),
            (ours, theirs) => panic!("{what}: {ours:?} for {theirs:?}"),
        }
    }
}

#[test]
fn what_cannot_be_rendered_is_an_error() {
    for source in [
        "{{ nothing.x }}",
        "{{ nothing['x'] }}",
        "{{ messages[9].content }}",
        "{{ 'a' + none }}",
        "{{ 'a' + nothing }}",
        "{{ 'a' + 1 }}",
        "{{ nothing() }}",
        "{{ 'a' | no_filter }}",
        "{{ nothing | tojson }}",
        "{{ 'a'.no_method() }}",
        "{{ 1 | tojson(width=2) }}",
        "{{ strftime_now('%Q') }}",
    ] {
        let error = render_simple(source).unwrap_err();
        assert!(
            matches!(&error, Error::TemplateRender { template, line: 1, .. } if template == "test"),
            "{source}: {error:?}"
        );
    }
}

#[test]
fn errors_say_what_is_wrong() {
    let raised =
        render_simple("\n{% for m in messages %}{{ raise_exception('No ' + m.role) }}{% endfor %}")
            .unwrap_err();
    insta::assert_snapshot!(raised, @"chat template test refuses the conversation: No user");
    let raised_inside =
        render_simple("{% generation %}{{ raise_exception('inside') }}{% endgeneration %}")
            .unwrap_err();
    insta::assert_snapshot!(raised_inside, @"chat template test refuses the conversation: inside");
    insta::assert_snapshot!(render_simple("\n\n{{ a.b.c }}").unwrap_err(), @"chat template test, line 3: cannot render the conversation: undefined value");
    insta::assert_snapshot!(render_simple("{% for %}").unwrap_err(), @"chat template test, line 1: syntax error: unexpected end of block, expected in");
    insta::assert_snapshot!(render_simple("{% generation %}").unwrap_err(), @"chat template test, line 1: syntax error: unexpected end of input, expected end of block");
    let template = ChatTemplate::from_source("test", "x").unwrap();
    let options = RenderOptions {
        add_generation_prompt: false,
        special: &special(),
        reasoning: None,
        now: None,
    };
    insta::assert_snapshot!(template.render(&[], Some("{}"), options).unwrap_err(), @"the tools of a prompt must be a JSON array: they are {}");
    insta::assert_snapshot!(template.render(&[], Some("[1"), options).unwrap_err(), @"the tools of a prompt must be a JSON array: EOF while parsing a list at line 1 column 2");
}

#[test]
fn reasoning_goes_where_the_template_or_the_marks_put_it() {
    let mut answer = Message::text(Role::Assistant, "4");
    answer.reasoning = Some("2 + 2".to_owned());
    let marks = Reasoning {
        open: "<think>".to_owned(),
        close: "</think>".to_owned(),
    };
    let special = special();
    let options = |reasoning| RenderOptions {
        add_generation_prompt: false,
        special: &special,
        reasoning,
        now: None,
    };
    let messages = [answer];

    let plain = ChatTemplate::plain().unwrap();
    assert_eq!(
        plain
            .render(&messages, None, options(Some(&marks)))
            .unwrap()
            .text,
        "<s><think>2 + 2</think>4</s>"
    );
    insta::assert_snapshot!(plain.render(&messages, None, options(None)).unwrap_err(), @r#"
chat template plain: there is reasoning, but the template never reads `reasoning_content`
hint: set `reasoning = { open = "<think>", close = "</think>" }` to write it in front of the answer, or use data without reasoning
"#);

    let reads = ChatTemplate::from_source(
        "reads",
        "{{ messages[0].reasoning_content }}|{{ messages[0].content }}",
    )
    .unwrap();
    assert_eq!(
        reads
            .render(&messages, None, options(Some(&marks)))
            .unwrap()
            .text,
        "2 + 2|4"
    );
    let gpt_oss = ChatTemplate::from_source(
        "gpt-oss",
        "{{ messages[0].thinking }}|{{ messages[0].content }}",
    )
    .unwrap();
    assert_eq!(
        gpt_oss.render(&messages, None, options(None)).unwrap().text,
        "2 + 2|4"
    );
}

#[test]
fn generation_marks_survive_private_use_characters_in_the_data() {
    let source =
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
    let text = "a\u{F0000}\u{F0001}b";
    let case = serde_json::json!({ "messages": [{ "role": "user", "content": text }] });
    let rendered = render(source, &case, false).unwrap();
    assert_eq!(rendered.text, text);
    assert!(rendered.generation.iter().eq([&(0..text.len())]));
}

#[test]
fn line_ends_of_the_source_do_not_matter() {
    let source = "{% if true %}\nA\n{% endif %}\n'{{ 'x\ny' }}'\n";
    let unix = render_simple(source).unwrap();
    assert_eq!(unix.text, "A\n'x\ny'");
    assert_eq!(render_simple(&source.replace('\n', "\r\n")).unwrap(), unix);
}

#[test]
fn folder_says_which_template() {
    let dir = tempfile::tempdir().unwrap();
    let from_dir = || ChatTemplate::from_dir(dir.path());
    let hash_of = |source| {
        ChatTemplate::from_source("", source)
            .unwrap()
            .hash()
            .to_owned()
    };
    assert!(from_dir().unwrap().is_none());
    let config = dir.path().join("tokenizer_config.json");
    fs::write(&config, r#"{ "bos_token": null }"#).unwrap();
    assert!(from_dir().unwrap().is_none());
    fs::write(&config, r#"{ "chat_template": "text" }"#).unwrap();
    assert_eq!(from_dir().unwrap().unwrap().hash(), hash_of("text"));
    fs::write(&config, r#"{ "chat_template": [{ "name": "rag", "template": "r" }, { "name": "default", "template": "d" }] }"#).unwrap();
    assert_eq!(from_dir().unwrap().unwrap().hash(), hash_of("d"));
    fs::write(
        &config,
        r#"{ "chat_template": [{ "name": "rag", "template": "r" }] }"#,
    )
    .unwrap();
    let error = from_dir().unwrap_err().to_string();
    assert!(
        error.contains("tokenizer_config.json") && error.contains(r#"["rag"]"#),
        "{error}"
    );
    fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(from_dir().unwrap().unwrap().hash(), hash_of("file"));
    fs::write(dir.path().join("chat_template.jinja"), "\n{% if").unwrap();
    let error = from_dir().unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja, line 2"), "{error}");
}
