//! Causal language models that run in burn: checkpoints in Hugging Face layout, KV cache, sampling
