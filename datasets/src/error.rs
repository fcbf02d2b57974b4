//! What can go wrong with stored data, tokenizers and chat templates.

use std::path::PathBuf;

/// An error of this crate. Each names the file or template at fault and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    TokenizerRead {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A folder without `tokenizer.json`.
    #[error(
        "{} has no tokenizer.json; Potstill reads fast tokenizers only (transformers writes one with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`)",
        folder.display()
    )]
    TokenizerMissing {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A file of the tokenizer or of the model's configuration that is not JSON.
    #[error("{} is not valid JSON; fetch the file again", path.display())]
    TokenizerJson {
        /// The file.
        path: PathBuf,
        /// Where the JSON breaks.
        #[source]
        source: serde_json::Error,
    },
    /// A file of the tokenizer or of the model's configuration whose content cannot be used.
    #[error("{}: {reason}", path.display())]
    TokenizerContent {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Text that could not be encoded, or ids that could not be decoded.
    #[error("the tokenizer cannot {action}")]
    Tokenize {
        /// "encode the text …" or "decode …".
        action: String,
        /// What the tokenizer said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A chat template that minijinja cannot compile.
    #[error("chat template {template}, line {line}: {reason}")]
    TemplateSyntax {
        /// The template's name or file.
        template: String,
        /// Line in the template, from 1; 0 where it is not known.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A chat template that failed while rendering.
    #[error("chat template {template}, line {line}: cannot render the conversation: {reason}")]
    TemplateRender {
        /// The template's name or file.
        template: String,
        /// Line in the template, from 1; 0 where it is not known.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A chat template that called `raise_exception`.
    #[error("chat template {template} refuses the conversation: {message}")]
    TemplateRaised {
        /// The template's name or file.
        template: String,
        /// The template's own message.
        message: String,
    },
    /// Tools that are not a JSON array.
    #[error("the tools of a prompt have to be a JSON array: {reason}")]
    TemplateTools {
        /// What they are.
        reason: String,
    },
    /// Reasoning, a template that does not take it, and no marks to write it with.
    #[error(
        "chat template {template} has no place for reasoning (it never reads `reasoning_content`); say how to write it with `reasoning = {{ open = \"<think>\", close = \"</think>\" }}`, or use data without reasoning"
    )]
    ReasoningUnplaced {
        /// The template's name or file.
        template: String,
    },
    /// A template that leaves the reasoning of the assistant's turn out.
    #[error(
        "chat template {template} drops the reasoning of the assistant's turn.\n  missing:  {reasoning:?}\n  rendered: {rendered:?}\nhint: use a template that keeps it, or data without reasoning"
    )]
    ReasoningDropped {
        /// The template's name or file.
        template: String,
        /// The reasoning that is missing.
        reasoning: String,
        /// What the template made of the assistant's turn.
        rendered: String,
    },
    /// A template without generation marks where the prompt is not the start of the conversation.
    #[error(
        "chat template {template}: the rendered prompt is not the start of the rendered conversation, so the assistant's tokens are not known; they part at character {position}.\n  prompt:       {prompt:?}\n  conversation: {conversation:?}\nhint: put the assistant's turn between {{% generation %}} and {{% endgeneration %}} in the template"
    )]
    PromptNotPrefix {
        /// The template's name or file.
        template: String,
        /// Where the two part, in characters.
        position: usize,
        /// The prompt's rendering around that place.
        prompt: String,
        /// The conversation's rendering around that place.
        conversation: String,
    },
    /// A template with generation marks that are not around the last assistant turn.
    #[error(
        "chat template {template} has {{% generation %}} marks, but none around the last assistant turn.\n  rendered: {rendered:?}\nhint: put the marks around every assistant turn, or remove them all"
    )]
    GenerationUnmarked {
        /// The template's name or file.
        template: String,
        /// The end of the rendered conversation.
        rendered: String,
    },
    /// An assistant turn that does not end in an EOS token, so that a student would not learn to stop.
    #[error(
        "chat template {template} does not end the assistant's turn with an end-of-sequence token, so a student would never learn to stop.\n  rendered: {rendered:?}\n  end of sequence: {eos}\nhint: add the token to the template, or to eos_token_id in generation_config.json"
    )]
    EndOfTurnMissing {
        /// The template's name or file.
        template: String,
        /// What the template made of the assistant's turn.
        rendered: String,
        /// The EOS tokens of the tokenizer.
        eos: String,
    },
    /// An assistant turn whose text spells an EOS token.
    #[error(
        "the assistant's text contains {token:?}, which ends a sequence: everything behind it would be lost; remove it from the data"
    )]
    EndOfTurnInside {
        /// The token's text.
        token: String,
    },
    /// A prompt without a single token.
    #[error("the prompt is empty after rendering with chat template {template}; a model needs at least one token to go on from")]
    PromptEmpty {
        /// The template's name or file.
        template: String,
    },
    /// An order over nothing.
    #[error("there are no rows to draw from")]
    NoRows,
}
