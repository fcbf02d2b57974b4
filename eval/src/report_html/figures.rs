//! The plots of the report: their figures and ranges.

use std::fmt::Write;

use potstill_datasets::RunModel;

use super::colour::colour;
use super::html::escape;
use super::plots::{Axes, Bar, Line, Scale, bars, lines};
use crate::calibration::ReliabilityBin;
use crate::error::Error;
use crate::interval::Interval;
use crate::metric::Figure;
use crate::report::{LossPoint, Report, TuningTable};
use crate::results::StudentResult;
use crate::wording;

/// Largest number of points of a drawn line; longer curves are averaged.
const POINTS: usize = 300;
/// Ratio of largest to smallest value above which an axis is logarithmic.
const LOG_FROM: f64 = 12.0;

/// Draws the bars of accuracy, KL, agreement and calibration.
///
/// # Errors
/// If a plot cannot be drawn.
pub(super) fn figures(out: &mut String, report: &Report) -> Result<(), Error> {
    out.push_str("<div class=\"plots\">\n");
    let students = |figure: fn(&StudentResult) -> Option<&Interval>| -> Vec<(RunModel, &Interval)> {
        let students = report.students.iter();
        students
            .filter_map(|student| Some((student.name, figure(student)?)))
            .collect()
    };
    let teacher = report.teacher.as_ref().and_then(|t| t.accuracy.as_ref());
    let mut right: Vec<(RunModel, &Interval)> = Vec::new();
    right.extend(teacher.map(|accuracy| (RunModel::Teacher, &accuracy.overall)));
    right.extend(students(|s| Some(&s.accuracy.as_ref()?.overall)));
    let plots = [
        (
            Figure::Accuracy,
            "Accuracy",
            "Share of test prompts with a right answer. Higher is better.",
            right,
        ),
        (
            Figure::Kl,
            "Distance to the teacher",
            "KL on the test text, nats per token. Lower is better.",
            students(|s| s.kl.as_ref()),
        ),
        (
            Figure::OwnTextKl,
            "Distance on own text",
            "Reverse KL on text that the model wrote, nats per token. Lower is better.",
            students(|s| s.own_text_kl.as_ref()),
        ),
        (
            Figure::Agreement,
            "Agreement with the teacher",
            "Share of tokens at which the model and the teacher have the same most likely token. Higher is better.",
            students(|s| s.agreement.as_ref()),
        ),
        (
            Figure::Calibration,
            "Distance in probability",
            "Mean of |q − p|: the model's and the teacher's probability of the teacher's most likely token. Lower is better.",
            students(|s| s.calibration.as_ref()?.distance.as_ref()),
        ),
        (
            Figure::Calibration,
            "Calibration error",
            "Mean difference between the model's confidence and its share of right predictions. Lower is better.",
            match report.has_distributions() {
                true => Vec::new(),
                false => students(|s| Some(&s.calibration.as_ref()?.error)),
            },
        ),
    ];
    for (figure, title, caption, models) in plots {
        bar_plot(out, figure, &models, (title, caption))?;
    }
    out.push_str("</div>\n");
    Ok(())
}

fn bar_plot(
    out: &mut String,
    figure: Figure,
    models: &[(RunModel, &Interval)],
    (title, caption): (&str, &str),
) -> Result<(), Error> {
    if models.is_empty() {
        return Ok(());
    }
    let lowest = models.iter().map(|(_, i)| i.low);
    let lowest = lowest.fold(f64::INFINITY, f64::min);
    let highest = models.iter().map(|(_, i)| i.high).fold(1e-6, f64::max);
    let (range, scale) = match figure {
        Figure::Agreement | Figure::Accuracy | Figure::Calibration if highest > 0.5 => {
            ((0.0, 1.0), Scale::Percent)
        }
        Figure::Agreement | Figure::Accuracy | Figure::Calibration => {
            ((0.0, 1.05 * highest), Scale::Percent)
        }
        Figure::Kl | Figure::Nll | Figure::OwnTextKl
            if lowest > 0.0 && highest / lowest > LOG_FROM =>
        {
            (
                ((0.7 * lowest).log10(), (1.4 * highest).log10()),
                Scale::Log10,
            )
        }
        Figure::Kl | Figure::Nll | Figure::OwnTextKl => ((0.0, 1.05 * highest), Scale::Plain),
    };
    let place = |value: f64| match scale {
        Scale::Log10 => value.log10(),
        Scale::Plain | Scale::Percent => value,
    };
    let shown: Vec<Bar> = models
        .iter()
        .map(|(model, interval)| Bar {
            name: model.to_string(),
            colour: colour(*model),
            mean: place(interval.mean),
            low: place(interval.low),
            high: place(interval.high),
            label: wording::value(figure, interval.mean),
        })
        .collect();
    let described: Vec<String> = models
        .iter()
        .map(|(model, interval)| format!("{model} {}", wording::with_interval(figure, interval)))
        .collect();
    let label = format!("{title}, with 95 % intervals: {}", described.join("; "));
    let svg = bars(&label, &shown, range, scale)?;
    let note = match scale {
        Scale::Log10 => " Logarithmic scale.",
        Scale::Plain | Scale::Percent => "",
    };
    write_figure(
        out,
        title,
        &svg,
        &format!(
            "{caption} Whiskers are 95 % intervals over prompts and, from 3 seeds on, over seeds.{note}"
        ),
    );
    Ok(())
}

/// Draws forward KL and cross-entropy of the training by step; writes nothing without curves.
///
/// # Errors
/// If a plot cannot be drawn.
pub(super) fn losses(out: &mut String, report: &Report) -> Result<(), Error> {
    out.push_str("<div class=\"plots\">\n");
    let kl = "Forward KL to the distributions that the model was trained on, nats per token. For <code>same_token</code> and <code>shuffled</code> these are those of other positions; <code>sft</code> and <code>smoothing</code> do not minimise this KL.";
    if report.has_distributions() {
        loss_plot(out, report, ("Forward KL in training", kl), |p| {
            p.forward_kl
        })?;
    }
    let ce =
        "Cross-entropy of the target tokens, nats per token, which <code>sft</code> minimises.";
    loss_plot(out, report, ("Cross-entropy in training", ce), |p| {
        p.cross_entropy
    })?;
    out.push_str("</div>\n");
    Ok(())
}

fn loss_plot(
    out: &mut String,
    report: &Report,
    (title, caption): (&str, &str),
    loss: fn(&LossPoint) -> f64,
) -> Result<(), Error> {
    let (mut drawn, ends) = curves(report, loss);
    if drawn.is_empty() {
        return Ok(());
    }
    let values = || drawn.iter().flat_map(|line| &line.faint).map(|(_, y)| *y);
    let (low, high) = (
        values().fold(f64::INFINITY, f64::min),
        values().fold(f64::NEG_INFINITY, f64::max),
    );
    let last_step = drawn.iter().flat_map(|line| &line.points).map(|(x, _)| *x);
    let last_step = last_step.fold(1.0, f64::max);
    let logarithmic = low > 0.0 && high / low > LOG_FROM;
    if logarithmic {
        for (_, y) in drawn
            .iter_mut()
            .flat_map(|l| l.points.iter_mut().chain(&mut l.faint))
        {
            *y = y.log10();
        }
    }
    let axes = Axes {
        x: (0.0, last_step),
        x_name: "step",
        x_scale: Scale::Plain,
        y: match logarithmic {
            true => (low.log10(), high.log10()),
            false => (low.min(0.0), (1.05 * high).max(1e-6)),
        },
        y_scale: if logarithmic {
            Scale::Log10
        } else {
            Scale::Plain
        },
        diagonal: false,
    };
    let svg = lines(
        &format!("{title} by step: {}", ends.join("; ")),
        &drawn,
        &axes,
    )?;
    let scale = if logarithmic {
        " Logarithmic scale."
    } else {
        ""
    };
    let caption =
        format!("{caption} The faint line has every step, the strong line a running mean.{scale}");
    write_figure(out, title, &svg, &caption);
    Ok(())
}

/// Returns a line for each trained model, and a description of its first and last value.
fn curves(report: &Report, loss: fn(&LossPoint) -> f64) -> (Vec<Line>, Vec<String>) {
    let mut drawn = Vec::new();
    let mut ends = Vec::new();
    for curve in &report.losses {
        // An axis cannot show losses that are not finite.
        let finite = curve.points.iter().filter(|p| loss(p).is_finite());
        let all: Vec<(f64, f64)> = finite.map(|p| (p.step as f64, loss(p))).collect();
        let (Some((_, first)), Some((_, last))) = (all.first(), all.last()) else {
            continue;
        };
        ends.push(format!("{} from {first:.3} to {last:.3}", curve.name));
        let faint = thinned(&all);
        drawn.push(Line {
            colour: colour(curve.name),
            points: smoothed(&faint),
            faint,
            dots: false,
        });
    }
    (drawn, ends)
}

/// Averages the points over at most [`POINTS`] sections of equal length.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let section = points.len().div_ceil(POINTS).max(1);
    points.chunks(section).map(mean).collect()
}

/// Computes a running mean over a twenty-fifth of the line.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let length = (points.len() / 25).max(1);
    let mean_until = |(i, (x, _)): (usize, &(f64, f64))| {
        let from = (i + 1).saturating_sub(length);
        let (_, y) = mean(points.get(from..=i).unwrap_or_default());
        (*x, y)
    };
    points.iter().enumerate().map(mean_until).collect()
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len().max(1) as f64;
    let x: f64 = points.iter().map(|(x, _)| x).sum();
    let y: f64 = points.iter().map(|(_, y)| y).sum();
    (x / count, y / count)
}

/// Draws the reliability diagram; writes nothing if calibration was not measured.
///
/// # Errors
/// If the plot cannot be drawn.
pub(super) fn calibration(out: &mut String, report: &Report) -> Result<(), Error> {
    let mut drawn = Vec::new();
    let mut described = Vec::new();
    for student in &report.students {
        let Some(calibration) = &student.calibration else {
            continue;
        };
        let error = wording::with_interval(Figure::Accuracy, &calibration.error);
        described.push(format!("{} error {error}", student.name));
        let point = |bin: &ReliabilityBin| (bin.confidence, bin.expected);
        drawn.push(Line {
            colour: colour(student.name),
            points: calibration.bins.iter().map(point).collect(),
            faint: Vec::new(),
            dots: true,
        });
    }
    if drawn.is_empty() {
        return Ok(());
    }
    let axes = Axes {
        x: (0.0, 1.0),
        x_name: "the model's probability",
        x_scale: Scale::Percent,
        y: (0.0, 1.0),
        y_scale: Scale::Percent,
        diagonal: true,
    };
    let (vertical, caption) = match report.has_distributions() {
        true => (
            "the teacher's probability",
            "The vertical axis is the teacher's mean probability of its most likely token. On the thin line both probabilities are equal; below it the model is overconfident.",
        ),
        false => (
            "right",
            "The vertical axis is the share of tokens at which the most likely token was right. On the thin line confidence equals that share; below it the model is overconfident.",
        ),
    };
    let label = format!(
        "Calibration, {vertical} by the model's: {}",
        described.join("; ")
    );
    let svg = lines(&label, &drawn, &axes)?;
    write_figure(out, "Calibration", &svg, caption);
    Ok(())
}

/// Draws the dev figure of each arm by learning rate.
///
/// # Errors
/// If the plot cannot be drawn.
pub(super) fn tuning(out: &mut String, report: &Report, tuning: &TuningTable) -> Result<(), Error> {
    let mut drawn = Vec::new();
    let mut described = Vec::new();
    for (arm, trials) in &tuning.rows {
        let model = RunModel::from(arm.first());
        // A training that diverged has no point.
        let trials = trials.iter().flatten();
        let points: Vec<(f64, f64)> = trials
            .filter_map(|trial| Some((trial.learning_rate.log10(), trial.dev?)))
            .collect();
        let values = points
            .iter()
            .map(|(rate, dev)| format!("{dev:.4} at {}", wording::rate(10f64.powf(*rate))));
        described.push(format!("{model} {}", values.collect::<Vec<_>>().join(", ")));
        drawn.push(Line {
            colour: colour(model),
            points,
            faint: Vec::new(),
            dots: true,
        });
    }
    let points = || drawn.iter().flat_map(|line| line.points.iter().copied());
    let (low, high) = range(points().map(|(_, y)| y));
    let (left, right) = range(points().map(|(x, _)| x));
    if low > high {
        return Ok(());
    }
    let margin = 0.1 * (high - low).max(1e-3);
    let axes = Axes {
        x: (left - 0.05, right + 0.05),
        x_name: "learning rate",
        x_scale: Scale::Log10,
        y: (low - margin, high + margin),
        y_scale: Scale::Plain,
        diagonal: false,
    };
    let figure = match report.has_distributions() {
        true => "KL",
        false => "NLL",
    };
    let title = format!("{figure} on the dev prompts");
    let label = format!("{title} by learning rate: {}", described.join("; "));
    let svg = lines(&label, &drawn, &axes)?;
    let caption = "Nats per token; lower is better. A best rate at an end of the list may not be the best one.";
    write_figure(out, &title, &svg, caption);
    Ok(())
}

/// Returns the smallest and the largest value.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}

/// Writes a figure; `caption` is HTML.
fn write_figure(out: &mut String, title: &str, svg: &str, caption: &str) {
    let _ = write!(
        out,
        "<figure class=\"card\"><h3>{}</h3>\n{svg}<figcaption>{caption}</figcaption></figure>\n",
        escape(title)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_are_thinned_and_keep_their_mean() {
        let points: Vec<(f64, f64)> = (0..1000)
            .map(|i| (f64::from(i), f64::from(i % 10)))
            .collect();
        let thin = thinned(&points);
        assert_eq!(thin.len(), 250);
        assert_eq!(thin[0], (1.5, 1.5));
        let few = [(1.0, 2.0), (2.0, 4.0)];
        assert_eq!(thinned(&few), few);
        assert_eq!(smoothed(&few), few, "too short to smooth");
        let smooth = smoothed(&points);
        assert!((smooth[999].1 - 4.5).abs() < 1e-9);
        assert_eq!(smooth[0], points[0]);
        assert!(thinned(&[]).is_empty() && smoothed(&[]).is_empty());
    }
}
