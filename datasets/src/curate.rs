//! Settings of `curate`: the table `[curate]` of the run file, and the split of the prompts that it describes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::range::{Share, ShareOrZero};

/// `[curate]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CurateSettings {
    /// Answers to train on. The answers of dev and test are not filtered.
    pub keep: KeptAnswers,
    /// Treatment of answers that `[grade]` finds wrong.
    pub wrong: WrongAnswers,
    /// Share of prompts for dev, on which settings such as the learning rate are chosen. The prompts are chosen by a hash of seed and prompt.
    #[serde(with = "ShareOrZero")]
    pub dev: f64,
    /// Share of prompts for test, on which the models are compared. Dev and test together are less than 1.
    #[serde(with = "Share")]
    pub test: f64,
}

impl Default for CurateSettings {
    fn default() -> Self {
        CurateSettings {
            keep: KeptAnswers::Finished,
            wrong: WrongAnswers::Drop,
            dev: 0.1,
            test: 0.1,
        }
    }
}

impl CurateSettings {
    /// Returns the split that a prompt belongs to. It depends on nothing but the seed, the prompt's id and the shares,
    /// so a prompt stays in its split when prompts are added.
    ///
    /// Test takes the lower end of the hashes and dev the upper end. Another `dev` therefore does not move a prompt
    /// into test or out of it, and the other way round.
    #[must_use]
    pub fn split(&self, seed: u32, prompt_id: &str) -> Split {
        let position = split_position(seed, prompt_id);
        if position < self.test {
            Split::Test
        } else if position >= 1.0 - self.dev {
            Split::Dev
        } else {
            Split::Train
        }
    }
}

/// Maps a prompt to a number in [0, 1), uniformly over prompts.
fn split_position(seed: u32, prompt_id: &str) -> f64 {
    let digest = Sha256::digest(format!("split {seed} {prompt_id}"));
    let first = digest
        .iter()
        .take(8)
        .fold(0u64, |all, byte| all << 8 | u64::from(*byte));
    (first >> 11) as f64 / (1u64 << 53) as f64
}

/// A part of the prompts, with all of their answers. The parts are disjoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Prompts to train on.
    Train,
    /// Prompts on which settings are chosen.
    Dev,
    /// Prompts on which the models are compared.
    Test,
}

impl Split {
    /// All splits, in the order of their declaration.
    pub const ALL: [Split; 3] = [Split::Train, Split::Dev, Split::Test];

    /// Returns the name of the split, which is also the name of its folder in the run directory.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Dev => "dev",
            Split::Test => "test",
        }
    }

    /// Returns the split with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Split> {
        Split::ALL.into_iter().find(|split| split.name() == name)
    }
}

/// `keep` of `[curate]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KeptAnswers {
    /// Answers that the teacher ended by itself.
    Finished,
    /// All answers, also those that were cut.
    All,
}

/// `wrong` of `[curate]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WrongAnswers {
    /// Wrong answers are not trained on.
    Drop,
    /// Wrong answers are kept.
    Keep,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dev: f64, test: f64) -> CurateSettings {
        CurateSettings {
            dev,
            test,
            ..CurateSettings::default()
        }
    }

    /// Numbers of the prompts in a split, out of 4000.
    fn members(settings: &CurateSettings, seed: u32, split: Split) -> Vec<usize> {
        (0..4000)
            .filter(|i| settings.split(seed, &format!("p{i}")) == split)
            .collect()
    }

    #[test]
    fn splits_have_their_shares_and_depend_on_the_seed() {
        let settings = settings(0.1, 0.2);
        let test = members(&settings, 1, Split::Test);
        assert!((720..880).contains(&test.len()), "{}", test.len());
        let dev = members(&settings, 1, Split::Dev);
        assert!((340..460).contains(&dev.len()), "{}", dev.len());
        assert_ne!(test, members(&settings, 2, Split::Test));
        assert_eq!(test, members(&settings, 1, Split::Test));
    }

    #[test]
    fn another_share_of_dev_leaves_test_as_it_is() {
        let test = |dev| members(&settings(dev, 0.2), 7, Split::Test);
        assert_eq!(test(0.0), test(0.75));
        let dev = |test| members(&settings(0.2, test), 7, Split::Dev);
        assert_eq!(dev(0.01), dev(0.75));
    }

    #[test]
    fn without_dev_the_rest_is_trained_on() {
        let settings = settings(0.0, 0.2);
        assert!(members(&settings, 3, Split::Dev).is_empty());
        let train = members(&settings, 3, Split::Train).len();
        assert_eq!(train + members(&settings, 3, Split::Test).len(), 4000);
    }
}
