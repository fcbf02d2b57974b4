//! The token that begins a sequence (BOS), and prompts that lack it or have it twice.

use crate::tokenizer::Tokenizer;

/// Describes what is wrong with the beginning of a prompt, with a hint on a line of its own; `None` if nothing is.
///
/// A model whose tokenizer puts BOS in front of every text was trained with it: Gemma 3 270M has 3.65 nats per token with
/// it and 4.62 without. Prompts are encoded without the tokenizer's own BOS, so the chat template has to write it.
pub fn bos_problem(tokenizer: &Tokenizer, prompt_ids: &[u32]) -> Option<String> {
    let token = |id: u32| String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned();
    let special = tokenizer.special_tokens().bos.as_deref();
    if let [first, second, ..] = prompt_ids
        && first == second
        && special == Some(token(*first).as_str())
    {
        return Some(format!(
            "a prompt begins with two {:?}, and models are trained with one\nhint: the chat template writes it, so remove it from the data",
            token(*first)
        ));
    }
    let leading = tokenizer.leading_id()?;
    if prompt_ids.first() == Some(&leading) {
        return None;
    }
    let hint = match special {
        Some(_) => {
            "use a chat template that begins with `{{ bos_token }}`; `template = \"plain\"` does"
        }
        None => {
            "name the token as `bos_token` in tokenizer_config.json, and use a chat template that begins with `{{ bos_token }}`"
        }
    };
    Some(format!(
        "a prompt does not begin with {:?}, which the tokenizer puts in front of every text, so the model was trained with it and is much worse without it\nhint: {hint}",
        token(leading)
    ))
}
