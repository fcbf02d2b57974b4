use crate::settings::TrainSettings;

/// Computes the learning rate of a step, counted from 1: linear warm-up to `learning_rate`, then half a cosine
/// down to `min_learning_rate` at the last step (Loshchilov and Hutter 2017, without restarts).
#[must_use]
pub fn learning_rate(settings: &TrainSettings, step: u64) -> f64 {
    let (peak, low) = (settings.learning_rate, settings.min_learning_rate);
    if step <= settings.warmup {
        return peak * step as f64 / settings.warmup as f64;
    }
    let length = settings.steps.saturating_sub(settings.warmup).max(1);
    let progress = ((step - settings.warmup) as f64 / length as f64).min(1.0);
    low + (peak - low) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_to_the_peak_and_falls_to_the_floor() {
        let mut settings = TrainSettings {
            steps: 110,
            warmup: 10,
            learning_rate: 2.0,
            min_learning_rate: 0.5,
            ..TrainSettings::default()
        };
        assert_eq!(learning_rate(&settings, 1), 0.2);
        assert_eq!(learning_rate(&settings, 10), 2.0);
        assert!((learning_rate(&settings, 60) - 1.25).abs() < 1e-12);
        assert!((learning_rate(&settings, 110) - 0.5).abs() < 1e-12);
        settings.warmup = 0;
        assert!(learning_rate(&settings, 1) < 2.0);
    }
}
