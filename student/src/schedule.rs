use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `schedule` of `[train]`: the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum ScheduleShape {
    /// Half a cosine down to `min_learning_rate` at the last step (Loshchilov and Hutter 2017).
    #[default]
    #[serde(rename = "cosine")]
    Cosine,
    /// A line down to `min_learning_rate` at the last step.
    #[serde(rename = "linear")]
    Linear,
    /// `learning_rate` until the last step.
    #[serde(rename = "constant")]
    Constant,
    /// `learning_rate`, and over the last steps, which `decay` counts, a line down to `min_learning_rate` (warm-up-stable-decay;
    /// Hu et al. 2024).
    #[serde(rename = "wsd")]
    WarmupStableDecay,
}

/// The learning rate of each step of a training, resolved from the settings of `[train]` once the number of
/// training sequences is known.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Schedule {
    /// Number of optimizer steps.
    pub steps: u64,
    /// Steps over which the learning rate rises linearly from 0; at most `steps`.
    pub warmup_steps: u64,
    /// Largest learning rate, which is reached after warm-up.
    pub learning_rate: f64,
    /// Learning rate at the last step.
    pub min_learning_rate: f64,
    /// Course of the learning rate after warm-up.
    pub shape: ScheduleShape,
    /// Last steps over which the learning rate of [`ScheduleShape::WarmupStableDecay`] falls; they begin after warm-up. 0 for
    /// the other shapes.
    pub decay_steps: u64,
}

impl Schedule {
    /// Computes the learning rate of a step, counted from 1: linear warm-up to `learning_rate`, then the course of `shape`.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        let (peak, low) = (self.learning_rate, self.min_learning_rate);
        if step <= self.warmup_steps {
            return peak * step as f64 / self.warmup_steps as f64;
        }
        let length = self.steps.saturating_sub(self.warmup_steps).max(1);
        // Share of the last `steps` that is over.
        let over = |steps: u64| {
            let begin = self.steps.saturating_sub(steps);
            (step.saturating_sub(begin) as f64 / steps.max(1) as f64).min(1.0)
        };
        let fallen = match self.shape {
            ScheduleShape::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * over(length)).cos()),
            ScheduleShape::Linear => over(length),
            ScheduleShape::Constant => 0.0,
            ScheduleShape::WarmupStableDecay => over(self.decay_steps.min(length)),
        };
        peak + (low - peak) * fallen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_to_the_peak_and_falls_to_the_floor() {
        let mut schedule = Schedule {
            steps: 110,
            warmup_steps: 10,
            learning_rate: 2.0,
            min_learning_rate: 0.5,
            shape: ScheduleShape::Cosine,
            decay_steps: 20,
        };
        assert_eq!(schedule.at(1), 0.2);
        assert_eq!(schedule.at(10), 2.0);
        assert!((schedule.at(60) - 1.25).abs() < 1e-12);
        assert!((schedule.at(110) - 0.5).abs() < 1e-12);
        schedule.shape = ScheduleShape::Linear;
        assert_eq!(
            [10, 35, 60, 110].map(|step| schedule.at(step)),
            [2.0, 1.625, 1.25, 0.5]
        );
        schedule.shape = ScheduleShape::Constant;
        assert_eq!([5, 10, 110].map(|step| schedule.at(step)), [1.0, 2.0, 2.0]);
        schedule.shape = ScheduleShape::WarmupStableDecay;
        assert_eq!(
            [10, 90, 100, 110].map(|step| schedule.at(step)),
            [2.0, 2.0, 1.25, 0.5]
        );
        // The fall begins after warm-up at the earliest.
        schedule.decay_steps = 1000;
        assert_eq!(
            [10, 35, 110].map(|step| schedule.at(step)),
            [2.0, 1.625, 0.5]
        );
        schedule.shape = ScheduleShape::Cosine;
        schedule.warmup_steps = 0;
        assert!(schedule.at(1) < 2.0);
    }
}
