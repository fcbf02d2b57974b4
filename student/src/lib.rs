//! What learns: targets, divergences, the training step, checkpoints
