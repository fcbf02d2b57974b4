//! Chat templates, rendered as transformers renders them.
//!
//! The reference is `transformers.utils.chat_template_utils` (5.24): Jinja with `trim_blocks`, `lstrip_blocks` and loop
//! controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape for HTML, Python's string methods, and
//! `{% generation %}` marks. `tests/it/text/template.rs` compares renderings with those of transformers. Three differences
//! remain: `~` prints `none`, `true` and `false` in lower case, a loop over `none` has no items, where Python fails, and
//! text that is joined to text marked `safe` is not escaped.

mod arguments;
mod bounded;
mod expression;
mod generation;
mod lexer;
mod python;
mod rewrite;
mod work;

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::path::Path;

use chrono::NaiveDateTime;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value, context};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use self::arguments::TemplateArguments;
use self::generation::GenerationMarks;
use self::rewrite::Fault;
use self::work::{LimitPassed, WorkAccount};
use crate::canonical::sha256_hex;
use crate::error::Error;
use crate::finding::Finding;
use crate::limits;
use crate::model_files::{read_json, read_optional};
use crate::range::FilePath;
use crate::reasoning::Reasoning;
use crate::records::Message;
use crate::tokenizer::SpecialTokens;

const PLAIN: &str = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}";

/// The hint of the error for a template that passes a limit.
const TEMPLATE_HINT: &str = "use a template without it; docs/limits.md lists the limits";

/// Longest tag in bytes of which minijinja is asked what is wrong with it.
const LONGEST_FAULTY_TAG: usize = 2000;

/// Longest message in characters of a template's `raise_exception`.
const RAISED_MESSAGE: usize = 4000;

/// Variables by which templates switch or grade the model's reasoning, in the order in which they are looked for.
const THINKING_SWITCHES: [&str; 3] = ["enable_thinking", "thinking", "reasoning_effort"];

/// A compiled chat template with its arguments.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    name: String,
    environment: Environment<'static>,
    hash: String,
    generation: bool,
    reasoning: bool,
    /// Variables that the template reads and does not set before.
    variables: BTreeSet<String>,
    arguments: TemplateArguments,
}

/// A setting that names a chat template: `"plain"`, or the path of a `.jinja` file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "FilePath", inline)]
pub enum TemplateSource {
    /// Messages one after the other, with nothing between them: [`ChatTemplate::plain`].
    Plain,
    /// A file with a Jinja template.
    File(FilePath),
}

impl TryFrom<String> for TemplateSource {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        match text.as_str() {
            "plain" => Ok(TemplateSource::Plain),
            _ => FilePath::try_from(text).map(TemplateSource::File),
        }
    }
}

impl From<TemplateSource> for String {
    fn from(source: TemplateSource) -> String {
        match source {
            TemplateSource::Plain => "plain".to_owned(),
            TemplateSource::File(path) => path.into(),
        }
    }
}

/// Inputs of a rendering besides the conversation.
#[derive(Debug, Clone, Copy)]
pub struct RenderOptions<'a> {
    /// Whether to end with the text that opens an assistant turn.
    pub add_generation_prompt: bool,
    /// Values of `bos_token`, `eos_token`, `unk_token` and `pad_token` in the template.
    pub special: &'a SpecialTokens,
    /// Tags to write reasoning with in front of an answer if the template does not read it itself.
    pub reasoning: Option<&'a Reasoning>,
    /// Time that `strftime_now` formats; `None` for the current time.
    pub now: Option<NaiveDateTime>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The rendered text.
    pub text: String,
    /// Byte ranges of `text` between `{% generation %}` and `{% endgeneration %}`, in order.
    pub generation: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Reads the template of a model's folder: `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`,
    /// which is a text or a list of named templates with one called "default"; `None` if there is neither.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Invalid`] for a list without "default" or a template that does not compile.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join("chat_template.jinja");
        if let Some(source) = read_optional(&path)? {
            return Self::from_source(&path.display().to_string(), &source).map(Some);
        }
        let Some((path, json)) = read_json(dir, "tokenizer_config.json")? else {
            return Ok(None);
        };
        let source = match &json["chat_template"] {
            serde_json::Value::Null => return Ok(None),
            serde_json::Value::String(source) => source.as_str(),
            named => {
                let list = named.as_array().into_iter().flatten();
                let default = list.clone().find(|entry| entry["name"] == "default");
                match default.and_then(|entry| entry["template"].as_str()) {
                    Some(source) => source,
                    None => {
                        let names: Vec<&str> =
                            list.filter_map(|entry| entry["name"].as_str()).collect();
                        return Err(Error::invalid(
                            format!(
                                "{}: `chat_template` has no template named \"default\" (it has {names:?})",
                                path.display()
                            ),
                            "save the one to use as chat_template.jinja in the same folder",
                        ));
                    }
                }
            }
        };
        Self::from_source(&path.display().to_string(), source).map(Some)
    }

    /// Compiles a template. Errors refer to it by `name`, which is usually its file.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the template does not compile.
    pub fn from_source(name: &str, source: &str) -> Result<Self, Error> {
        if source.len() > limits::TEMPLATE_BYTES {
            let problem = format!(
                "chat template {name} has {} bytes, and the limit is {}",
                source.len(),
                limits::TEMPLATE_BYTES
            );
            return Err(Error::invalid(problem, TEMPLATE_HINT));
        }
        // Jinja2 reads CRLF and CR as a line feed.
        let (marked, generation) =
            generation::rewrite(&source.replace("\r\n", "\n").replace('\r', "\n"));
        let rewritten =
            rewrite::rewrite(&marked).map_err(|fault| refused(name, &marked, &fault))?;
        let mut environment = environment();
        environment
            .add_template_owned(name.to_owned(), rewritten)
            .map_err(|error| {
                let line = error.line().unwrap_or_default();
                let problem = format!("chat template {name}, line {line}: {}", reason(&error));
                Error::invalid(problem, "")
            })?;
        let variables = environment
            .get_template(name)
            .map(|template| template.undeclared_variables(false))
            .unwrap_or_else(|_| HashSet::new())
            .into_iter()
            .collect();
        let hash = sha256_hex(source.as_bytes());
        // Transformers passes reasoning to templates under both of these names.
        let reads = [
            "reasoning_content",
            ".thinking",
            "'thinking'",
            "\"thinking\"",
        ];
        let reasoning = reads.iter().any(|name| source.contains(name));
        Ok(Self {
            name: name.to_owned(),
            environment,
            hash,
            generation,
            reasoning,
            variables,
            arguments: TemplateArguments::default(),
        })
    }

    /// Returns the template with these arguments in place of its own.
    #[must_use]
    pub fn with_arguments(mut self, arguments: TemplateArguments) -> Self {
        self.arguments = arguments;
        self
    }

    /// Returns the template for base models, which know no turns: BOS, then the contents of all messages without
    /// separators, with EOS after each content of the assistant.
    ///
    /// # Errors
    /// As [`from_source`](Self::from_source); the template is correct, so there is none.
    pub fn plain() -> Result<Self, Error> {
        Self::from_source("plain", PLAIN)
    }

    /// Returns the template's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the SHA-256, in hexadecimal, of the source and the arguments; without arguments that of the source.
    pub fn hash(&self) -> String {
        match self.arguments.is_empty() {
            true => self.hash.clone(),
            false => sha256_hex(format!("{} {}", self.hash, self.arguments.to_json()).as_bytes()),
        }
    }

    /// Returns the arguments that all renderings get.
    pub fn arguments(&self) -> &TemplateArguments {
        &self.arguments
    }

    /// Returns whether the template reads a variable of this name, so that an argument can change the rendering.
    pub fn reads(&self, variable: &str) -> bool {
        self.variables.contains(variable)
    }

    /// Returns the variable by which the template switches or grades the model's reasoning; `None` if it has none that is
    /// known here.
    pub fn thinking_switch(&self) -> Option<&'static str> {
        THINKING_SWITCHES
            .into_iter()
            .find(|variable| self.reads(variable))
    }

    /// Returns whether the template has `{% generation %}` marks.
    pub fn marks_generation(&self) -> bool {
        self.generation
    }

    /// Renders a conversation. `tools` is the text of a JSON array.
    ///
    /// Messages have OpenAI's form: `role`, `content`; `reasoning_content` and `thinking` if there is reasoning;
    /// `tool_calls` as `{id, type, function: {name, arguments}}` with the arguments as an object if they are one;
    /// `tool_call_id`. Tools and arguments keep the order of their keys. If the template does not read reasoning, it is
    /// put in front of the content between the tags of `options.reasoning`.
    ///
    /// # Errors
    /// [`Error::TemplateRaised`], [`Error::TemplateRender`], [`Error::Invalid`] for tools that are not a JSON array, and
    /// [`Error::Untrainable`] for reasoning if the template does not read it and `options.reasoning` is `None`.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&str>,
        options: RenderOptions<'_>,
    ) -> Result<Rendered, Error> {
        let tools = tools.map(parse_tools).transpose()?;
        let messages: Vec<serde_json::Value> = messages
            .iter()
            .map(|message| self.message(message, options.reasoning))
            .collect::<Result<_, _>>()?;
        let inputs = json!([messages, tools, self.arguments.to_json()]).to_string();
        let marks = GenerationMarks::unused_in(&[&inputs]);
        let now = options
            .now
            .unwrap_or_else(|| chrono::Local::now().naive_local());
        let mut variables = vec![
            ("messages", Value::from_serialize(&messages)),
            ("tools", Value::from_serialize(&tools)),
            ("documents", Value::from(())),
            (
                "add_generation_prompt",
                Value::from(options.add_generation_prompt),
            ),
            (
                "strftime_now",
                Value::from_function(move |format: &str| strftime(now, format)),
            ),
            (generation::OPEN, Value::from(marks.open.to_string())),
            (generation::CLOSE, Value::from(marks.close.to_string())),
        ];
        let arguments = self.arguments.iter();
        variables.extend(arguments.map(|(name, value)| (name, Value::from_serialize(value))));
        let SpecialTokens { bos, eos, unk, pad } = options.special;
        for (name, token) in [
            ("bos_token", bos),
            ("eos_token", eos),
            ("unk_token", unk),
            ("pad_token", pad),
        ] {
            if let Some(token) = token {
                variables.push((name, Value::from(token.as_str())));
            }
        }
        let variables: Value = variables.into_iter().collect();
        let _account = WorkAccount::open(
            limits::TEMPLATE_WORK.saturating_add((inputs.len() as u64).saturating_mul(64)),
        );
        let rendered = self
            .environment
            .get_template(&self.name)
            .and_then(|template| template.render(context! { ..variables }))
            .map_err(|error| self.failure(&error))?;
        let (text, generation) = marks.take(&rendered);
        Ok(Rendered { text, generation })
    }

    fn message(
        &self,
        message: &Message,
        marks: Option<&Reasoning>,
    ) -> Result<serde_json::Value, Error> {
        let mut json = serde_json::Map::new();
        let mut content = message.content.clone();
        let reasoning = message
            .reasoning
            .as_deref()
            .filter(|reasoning| !reasoning.is_empty());
        match (reasoning, marks) {
            (None, _) => {}
            (Some(reasoning), _) if self.reasoning => {
                json.insert("thinking".to_owned(), reasoning.into());
                json.insert("reasoning_content".to_owned(), reasoning.into());
            }
            (Some(reasoning), Some(marks)) => {
                content = format!("{}{reasoning}{}{content}", marks.open, marks.close);
            }
            (Some(_), None) => {
                return Err(self.untrainable(Finding::ReasoningUnplaced));
            }
        }
        json.insert("role".to_owned(), message.role.name().into());
        json.insert("content".to_owned(), content.into());
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter().map(|call| {
                let arguments = serde_json::from_str(&call.arguments)
                    .ok()
                    .filter(serde_json::Value::is_object)
                    .unwrap_or_else(|| call.arguments.clone().into());
                let function = json!({ "name": call.name, "arguments": arguments });
                match &call.id {
                    Some(id) => json!({ "id": id, "type": "function", "function": function }),
                    None => json!({ "type": "function", "function": function }),
                }
            });
            json.insert("tool_calls".to_owned(), calls.collect());
        }
        if let Some(id) = &message.tool_call_id {
            json.insert("tool_call_id".to_owned(), id.as_str().into());
        }
        Ok(json.into())
    }

    /// Returns the error for a conversation that cannot be trained on with this template.
    pub(crate) fn untrainable(&self, finding: Finding) -> Error {
        Error::Untrainable {
            template: self.name.clone(),
            finding: Box::new(finding),
        }
    }

    fn limit_passed(&self, error: &minijinja::Error, limit: &str) -> Error {
        Error::TemplateRender {
            template: self.name.clone(),
            line: error.line().unwrap_or_default(),
            reason: format!("{limit}\nhint: {TEMPLATE_HINT}"),
        }
    }

    fn failure(&self, error: &minijinja::Error) -> Error {
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(cause) = source {
            if let Some(RaisedMessage(message)) = cause.downcast_ref() {
                return Error::TemplateRaised {
                    template: self.name.clone(),
                    message: message.clone(),
                };
            }
            if let Some(LimitPassed(limit)) = cause.downcast_ref() {
                return self.limit_passed(error, limit);
            }
            source = cause.source();
        }
        if error.kind() == ErrorKind::OutOfFuel {
            let limit = format!(
                "it runs more than {} instructions for one conversation",
                limits::TEMPLATE_INSTRUCTIONS
            );
            return self.limit_passed(error, &limit);
        }
        Error::TemplateRender {
            template: self.name.clone(),
            line: error.line().unwrap_or_default(),
            reason: reason(error),
        }
    }
}

/// Returns the error for a template that could not be rewritten.
fn refused(name: &str, source: &str, fault: &Fault) -> Error {
    let line = |at: usize| source.get(..at).unwrap_or(source).matches('\n').count() + 1;
    let at = line(fault.start);
    if let Some(limit) = &fault.limit {
        return Error::invalid(
            format!("chat template {name}, line {at}: {limit}"),
            TEMPLATE_HINT,
        );
    }
    // minijinja says what is wrong with the tag. It is not shown a long tag, which it might read in full.
    let tag = source.get(fault.start..fault.end).unwrap_or_default();
    let read = source.get(..fault.end).unwrap_or(source);
    if tag.len() < LONGEST_FAULTY_TAG
        && let Err(error) = Environment::new().add_template_owned(name.to_owned(), read.to_owned())
    {
        let line = error.line().unwrap_or_default();
        return Error::invalid(
            format!("chat template {name}, line {line}: {}", reason(&error)),
            "",
        );
    }
    let problem = format!("chat template {name}, line {at}: the tag cannot be read");
    Error::invalid(problem, "write it as Jinja's documentation does")
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(limits::TEMPLATE_INSTRUCTIONS));
    environment.set_recursion_limit(limits::TEMPLATE_RECURSION);
    environment.set_formatter(|out, _, value| match value.as_str() {
        Some(text) => {
            work::charge(text.len())?;
            out.write_str(text).map_err(minijinja::Error::from)
        }
        None => out
            .write_str(&python::str(value)?)
            .map_err(minijinja::Error::from),
    });
    environment.set_unknown_method_callback(python::method);
    bounded::register(&mut environment);
    environment.add_function(
        "raise_exception",
        |message: &Value| -> Result<Value, minijinja::Error> {
            let message: String = python::str(message)?.chars().take(RAISED_MESSAGE).collect();
            Err(
                minijinja::Error::new(ErrorKind::InvalidOperation, message.clone())
                    .with_source(RaisedMessage(message)),
            )
        },
    );
    environment
}

/// The message that a template passed to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct RaisedMessage(String);

fn strftime(now: NaiveDateTime, format: &str) -> Result<String, minijinja::Error> {
    // The longest form of a directive is a date with its time.
    work::charge(format.len().saturating_mul(64))?;
    let mut text = String::new();
    std::fmt::Write::write_fmt(&mut text, format_args!("{}", now.format(format))).map_err(
        |_| {
            minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now: {format:?} is not a time format"),
            )
        },
    )?;
    Ok(text)
}

fn parse_tools(text: &str) -> Result<serde_json::Value, Error> {
    let why = match serde_json::from_str::<serde_json::Value>(text) {
        Ok(tools) if tools.is_array() => return Ok(tools),
        Ok(other) => format!("they are {other}"),
        Err(error) => error.to_string(),
    };
    let problem = format!("the tools of a prompt must be a JSON array: {why}");
    Err(Error::invalid(problem, ""))
}

fn reason(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
