//! The models of a run: the teacher, the base, and the variants that are trained from the base.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The loss of a trained model: the student's, or that of one of the controls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// The teacher's distributions, by the loss of the run file.
    Student,
    /// The same tokens by cross-entropy alone, weighted with the sum of the weights of all terms.
    Sft,
    /// The teacher's distributions, each replaced by that of another training position with the same target
    /// token. A student that learns as much from them did not learn from the context of a distribution.
    SameToken,
    /// The same tokens by cross-entropy with label smoothing, whose share gives the smoothed targets the mean
    /// entropy of the teacher's distributions. A student that learns as much from it learned from soft
    /// targets, not from the teacher's.
    Smoothing,
    /// The teacher's distributions, each moved to another loss position; tokens and mask stay. Such a model
    /// learns the mean of the distributions, [`RunModel::Unigram`].
    Shuffled,
}

impl Arm {
    /// All arms, in the order of the report.
    pub const ALL: [Arm; 5] = [
        Arm::Student,
        Arm::Sft,
        Arm::SameToken,
        Arm::Smoothing,
        Arm::Shuffled,
    ];

    /// Name of the arm in folder names and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Arm::Student => "student",
            Arm::Sft => "sft",
            Arm::SameToken => "same_token",
            Arm::Smoothing => "smoothing",
            Arm::Shuffled => "shuffled",
        }
    }

    /// The variant of this arm with the run's own seed.
    #[must_use]
    pub const fn first(self) -> Variant {
        Variant {
            arm: self,
            seed_index: 0,
        }
    }
}

/// A model that a run trains. Displayed, and parsed, as the name of its folder below `students/`:
/// `sft` with the run's own seed, `sft-2` with the next seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Loss that the model is trained with.
    pub arm: Arm,
    /// Offset of the model's seed from the run's own seed.
    pub seed_index: u32,
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.arm.name())?;
        match self.seed_index {
            0 => Ok(()),
            index => write!(f, "-{}", u64::from(index) + 1),
        }
    }
}

impl FromStr for Variant {
    type Err = UnknownModel;

    fn from_str(name: &str) -> Result<Self, UnknownModel> {
        let parsed = || {
            let (arm, seed_index) = match name.split_once('-') {
                Some((arm, number)) => (arm, number.parse::<u32>().ok()?.checked_sub(1)?),
                None => (name, 0),
            };
            let arm = Arm::ALL.into_iter().find(|known| known.name() == arm)?;
            Some(Variant { arm, seed_index })
        };
        // `sft-1` and `sft-02` are no folder names.
        parsed()
            .filter(|variant| variant.to_string() == name)
            .ok_or_else(|| UnknownModel(name.to_owned()))
    }
}

/// A model that a run measures. Displayed, parsed and serialised as the name of its folder below
/// `students/`, which is also its name in reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum RunModel {
    /// The teacher.
    Teacher,
    /// The model that training starts from, named `untrained`.
    Base,
    /// The mean of the teacher's distributions over the training positions, whatever the context; without
    /// distributions the frequencies of the training tokens. It is computed in closed form, not trained.
    Unigram,
    /// A model that was trained.
    Trained(Variant),
}

impl RunModel {
    /// The student with the run's own seed.
    pub const STUDENT: RunModel = RunModel::Trained(Arm::Student.first());
    /// The SFT control with the run's own seed.
    pub const SFT: RunModel = RunModel::Trained(Arm::Sft.first());
    /// The `same_token` control with the run's own seed.
    pub const SAME_TOKEN: RunModel = RunModel::Trained(Arm::SameToken.first());
    /// The smoothing control with the run's own seed.
    pub const SMOOTHING: RunModel = RunModel::Trained(Arm::Smoothing.first());
    /// The shuffled control with the run's own seed.
    pub const SHUFFLED: RunModel = RunModel::Trained(Arm::Shuffled.first());
}

impl From<Variant> for RunModel {
    fn from(variant: Variant) -> RunModel {
        RunModel::Trained(variant)
    }
}

impl fmt::Display for RunModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunModel::Teacher => f.write_str("teacher"),
            RunModel::Base => f.write_str("untrained"),
            RunModel::Unigram => f.write_str("unigram"),
            RunModel::Trained(variant) => variant.fmt(f),
        }
    }
}

impl FromStr for RunModel {
    type Err = UnknownModel;

    fn from_str(name: &str) -> Result<Self, UnknownModel> {
        match name {
            "teacher" => Ok(RunModel::Teacher),
            "untrained" => Ok(RunModel::Base),
            "unigram" => Ok(RunModel::Unigram),
            _ => name.parse().map(RunModel::Trained),
        }
    }
}

impl From<RunModel> for String {
    fn from(model: RunModel) -> String {
        model.to_string()
    }
}

impl TryFrom<String> for RunModel {
    type Error = UnknownModel;

    fn try_from(name: String) -> Result<Self, UnknownModel> {
        name.parse()
    }
}

/// Error for a name that no model of a run has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no model of a run is named {0:?}\n\
     hint: the names are teacher, untrained, unigram, student, sft, same_token, smoothing and shuffled; a trained model of a further seed has its number behind the name, such as sft-2"
)]
pub struct UnknownModel(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_folder_names_and_are_read_back() {
        let second = Variant {
            arm: Arm::Sft,
            seed_index: 1,
        };
        for (model, name) in [
            (RunModel::Teacher, "teacher"),
            (RunModel::Base, "untrained"),
            (RunModel::STUDENT, "student"),
            (RunModel::Unigram, "unigram"),
            (RunModel::SAME_TOKEN, "same_token"),
            (RunModel::SMOOTHING, "smoothing"),
            (RunModel::SHUFFLED, "shuffled"),
            (second.into(), "sft-2"),
        ] {
            assert_eq!(model.to_string(), name);
            assert_eq!(name.parse(), Ok(model));
            assert_eq!(
                serde_json::to_string(&model).unwrap(),
                format!("\"{name}\"")
            );
        }
    }

    #[test]
    fn other_names_are_refused() {
        for name in [
            "", "Student", "sft-", "sft-0", "sft-1", "sft-02", "sft-2-3", "base",
        ] {
            assert_eq!(name.parse::<RunModel>(), Err(UnknownModel(name.to_owned())));
        }
    }
}
