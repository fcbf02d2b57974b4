//! Token ids of a stored answer, for training and scoring.

use crate::encode::{Encoded, encode_conversation, prompt_ids};
use crate::error::Error;
use crate::reasoning::Reasoning;
use crate::records::{Completion, Message, Prompt, Role};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Returns the ids of a prompt and its stored answer, with loss on the answer only.
///
/// If the answer's token ids are stored and `own_ids` says that they belong to this tokenizer, they are used as
/// sampled. Otherwise the text is encoded, with the EOS that ends it.
///
/// # Errors
/// Those of [`prompt_ids`] and [`encode_conversation`].
pub fn encode_answer(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    reasoning: Option<&Reasoning>,
    prompt: &Prompt,
    completion: &Completion,
    own_ids: bool,
) -> Result<Encoded, Error> {
    let tools = prompt.tools.as_deref();
    let sampled: Option<Vec<u32>> = completion.tokens.iter().map(|token| token.id).collect();
    if let Some(sampled) = sampled.filter(|ids| own_ids && !ids.is_empty()) {
        let mut token_ids = prompt_ids(tokenizer, template, &prompt.messages, tools, reasoning)?;
        let prompt_tokens = token_ids.len();
        token_ids.extend(sampled);
        let loss_mask = (0..token_ids.len()).map(|at| at >= prompt_tokens).collect();
        return Ok(Encoded {
            token_ids,
            loss_mask,
        });
    }
    let answer = Message {
        reasoning: completion.reasoning.clone(),
        tool_calls: completion.tool_calls.clone(),
        ..Message::text(Role::Assistant, &completion.answer)
    };
    encode_conversation(
        tokenizer,
        template,
        &prompt.messages,
        tools,
        &answer,
        reasoning,
    )
}
