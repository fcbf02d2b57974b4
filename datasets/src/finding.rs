//! Problems of a conversation that make it unsuitable for training.

/// A problem with the tokens or the loss mask of a prompt and its answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// The text of the answer contains an EOS token.
    #[error(
        "the answer contains {token:?}, which ends a sequence, so the rest of the answer would be lost\nhint: remove {token:?} from the data"
    )]
    EosInside {
        /// Text of the token.
        token: String,
    },
    /// A message has reasoning, the template does not read it, and the settings name no tags to write it with.
    #[error(
        "there is reasoning, but the template never reads `reasoning_content`\nhint: set `reasoning = {{ open = \"<think>\", close = \"</think>\" }}` to write it in front of the answer, or use data without reasoning"
    )]
    ReasoningUnplaced,
    /// The template drops the reasoning of the answer.
    #[error(
        "the template drops the reasoning of the answer\n  missing:  {reasoning:?}\n  rendered: {rendered:?}\nhint: use a template that keeps the reasoning, or data without reasoning"
    )]
    ReasoningDropped {
        /// The reasoning that is missing.
        reasoning: String,
        /// The rendered answer.
        rendered: String,
    },
    /// The rendered turn lacks a line of the answer.
    #[error(
        "the template drops text of the answer\n  missing:  {missing:?}\n  rendered: {rendered:?}\nhint: use a template that writes `message.content` of the assistant as it is"
    )]
    AnswerDropped {
        /// The first line that is missing.
        missing: String,
        /// The rendered answer.
        rendered: String,
    },
    /// The rendered prompt has no line of the last user message.
    #[error(
        "the template drops the user's message, so the answer would belong to no question\n  missing:  {missing:?}\n  rendered: {rendered:?}\nhint: use a template that writes `message.content` of the user"
    )]
    PromptDropped {
        /// The first line of the message.
        missing: String,
        /// End of the rendered prompt.
        rendered: String,
    },
    /// The template has no generation marks, and the rendered prompt is not the start of the rendered conversation.
    #[error(
        "the rendered prompt is not the start of the rendered conversation, so the tokens of the answer are not known; the two differ from character {position} on\n  prompt:       {prompt:?}\n  conversation: {conversation:?}\nhint: put the assistant's turn between {{% generation %}} and {{% endgeneration %}} in the template"
    )]
    AnswerNotFound {
        /// First character that differs, from 0.
        position: usize,
        /// Excerpt of the rendered prompt around this character.
        prompt: String,
        /// Excerpt of the rendered conversation around this character.
        conversation: String,
    },
    /// The template has generation marks, but none around the answer.
    #[error(
        "the template has {{% generation %}} marks, but none around the answer\n  rendered: {rendered:?}\nhint: put the marks around every assistant turn, or remove all of them"
    )]
    AnswerUnmarked {
        /// End of the rendered conversation.
        rendered: String,
    },
    /// No EOS token that carries loss ends the answer.
    #[error(
        "no EOS token that carries loss ends the answer, so a student would never learn to stop\n  rendered:   {rendered:?}\n  EOS tokens: {eos}\nhint: end the assistant's turn with an EOS token in the template, inside its {{% generation %}} marks or directly after them, or name the token that ends it in eos_token_id of generation_config.json"
    )]
    EosWithoutLoss {
        /// The rendered answer.
        rendered: String,
        /// The tokenizer's EOS tokens.
        eos: String,
    },
    /// A token of the prompt carries loss.
    #[error(
        "token {position} ({text:?}) belongs to the prompt and carries loss\nhint: put the {{% generation %}} marks of the template around assistant turns only"
    )]
    PromptUnderLoss {
        /// Position of the first such token, from 0.
        position: usize,
        /// Text of this token.
        text: String,
    },
    /// No token carries loss.
    #[error(
        "no token carries loss, so a student would learn nothing\nhint: put the text of the assistant between {{% generation %}} and {{% endgeneration %}} in the template, or remove the marks"
    )]
    NothingUnderLoss,
    /// The prompt has no tokens.
    #[error(
        "the rendered prompt is empty, and a model needs at least one token to continue\nhint: begin the template with a token, such as `{{{{ bos_token }}}}`"
    )]
    PromptEmpty,
}
