//! The plots of the report: which figures are drawn, and over which range.

use std::fmt::Write;

use potstill_datasets::RunModel;

use super::colour;
use super::html::escape;
use super::plots::{Axes, Bar, Line, Scale, bars, lines};
use crate::report::{LossPoint, Report, StudentResult};
use crate::{Error, Figure, Interval, wording};

/// Most points of a drawn line; more are averaged.
const POINTS: usize = 300;
/// A curve that falls by more than this is drawn on a logarithmic axis.
const LOG_FROM: f64 = 12.0;

/// Bars of accuracy, KL, agreement and calibration error.
///
/// # Errors
/// When a plot cannot be drawn.
pub(super) fn figures(out: &mut String, report: &Report) -> Result<(), Error> {
    out.push_str("<div class=\"plots\">\n");
    let students = |of: fn(&StudentResult) -> Option<&Interval>| -> Vec<(RunModel, &Interval)> {
        let students = report.students.iter();
        students
            .filter_map(|student| Some((student.name, of(student)?)))
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
            "Share of held-out prompts with a right answer. More is better.",
            right,
        ),
        (
            Figure::Kl,
            "Distance from the teacher",
            "Held-out KL, nats a token. Less is better.",
            students(|s| s.kl.as_ref()),
        ),
        (
            Figure::Agreement,
            "Agreement with the teacher",
            "Share of tokens where the model's likeliest token is the teacher's. More is better.",
            students(|s| s.agreement.as_ref()),
        ),
        (
            // Written like a share of answers.
            Figure::Accuracy,
            "Calibration error",
            "By how much confidence misses how often the model is right. Less is better.",
            students(|s| Some(&s.calibration.as_ref()?.error)),
        ),
    ];
    for (figure, title, caption, models) in plots {
        bar_plot(out, report, figure, &models, (title, caption))?;
    }
    out.push_str("</div>\n");
    Ok(())
}

fn bar_plot(
    out: &mut String,
    report: &Report,
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
        Figure::Agreement | Figure::Accuracy if highest > 0.5 => ((0.0, 1.0), Scale::Percent),
        Figure::Agreement | Figure::Accuracy => ((0.0, 1.05 * highest), Scale::Percent),
        Figure::Kl | Figure::Nll if lowest > 0.0 && highest / lowest > LOG_FROM => (
            ((0.7 * lowest).log10(), (1.4 * highest).log10()),
            Scale::Log10,
        ),
        Figure::Kl | Figure::Nll => ((0.0, 1.05 * highest), Scale::Plain),
    };
    let place = |value: f64| match scale {
        Scale::Log10 => value.log10(),
        Scale::Plain | Scale::Percent => value,
    };
    let shown: Vec<Bar> = models
        .iter()
        .map(|(model, interval)| Bar {
            name: model.to_string(),
            colour: colour(report, *model),
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
        &format!("{caption} Whiskers are 95 % intervals over prompts.{note}"),
    );
    Ok(())
}

/// Training's forward KL and cross-entropy by step; nothing without curves.
///
/// # Errors
/// When a plot cannot be drawn.
pub(super) fn losses(out: &mut String, report: &Report) -> Result<(), Error> {
    out.push_str("<div class=\"plots\">\n");
    let kl = "Forward KL to the distributions trained on, nats a token; for <code>shuffled</code> those are the shuffled ones, and <code>sft</code> does not minimise it.";
    if report.has_distributions() {
        loss_plot(out, report, ("Forward KL in training", kl), |p| {
            p.forward_kl
        })?;
    }
    let ce = "Cross-entropy of the text's own tokens, nats a token, which is what <code>sft</code> minimises.";
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
    of: fn(&LossPoint) -> f64,
) -> Result<(), Error> {
    let (mut drawn, ends) = curves(report, of);
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
    let caption = format!("{caption} Faint: every step; strong: a running mean.{scale}");
    write_figure(out, title, &svg, &caption);
    Ok(())
}

/// A line for each student that was trained, and in words from where to where it goes.
fn curves(report: &Report, of: fn(&LossPoint) -> f64) -> (Vec<Line>, Vec<String>) {
    let mut drawn = Vec::new();
    let mut ends = Vec::new();
    for curve in &report.losses {
        // Training that broke has losses that no axis holds.
        let finite = curve.points.iter().filter(|p| of(p).is_finite());
        let all: Vec<(f64, f64)> = finite.map(|p| (p.step as f64, of(p))).collect();
        let (Some((_, first)), Some((_, last))) = (all.first(), all.last()) else {
            continue;
        };
        ends.push(format!("{} from {first:.3} to {last:.3}", curve.name));
        let faint = thinned(&all);
        drawn.push(Line {
            colour: colour(report, curve.name),
            points: smoothed(&faint),
            faint,
            dots: false,
        });
    }
    (drawn, ends)
}

/// Means over equal stretches, at most [`POINTS`] of them.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let stretch = points.len().div_ceil(POINTS).max(1);
    points.chunks(stretch).map(mean).collect()
}

/// The mean of a twenty-fifth of the line up to each point.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = (points.len() / 25).max(1);
    let until = |(i, (x, _)): (usize, &(f64, f64))| {
        let from = (i + 1).saturating_sub(window);
        let (_, y) = mean(points.get(from..=i).unwrap_or_default());
        (*x, y)
    };
    points.iter().enumerate().map(until).collect()
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len().max(1) as f64;
    let x: f64 = points.iter().map(|(x, _)| x).sum();
    let y: f64 = points.iter().map(|(_, y)| y).sum();
    (x / count, y / count)
}

/// The reliability diagram; nothing where calibration was not measured.
///
/// # Errors
/// When the plot cannot be drawn.
pub(super) fn calibration(out: &mut String, report: &Report) -> Result<(), Error> {
    let mut drawn = Vec::new();
    let mut described = Vec::new();
    for student in &report.students {
        let Some(calibration) = &student.calibration else {
            continue;
        };
        let error = wording::with_interval(Figure::Accuracy, &calibration.error);
        described.push(format!("{} error {error}", student.name));
        let point = |bin: &crate::ReliabilityBin| (bin.confidence, bin.accuracy);
        drawn.push(Line {
            colour: colour(report, student.name),
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
        x_name: "the model's confidence",
        x_scale: Scale::Percent,
        y: (0.0, 1.0),
        y_scale: Scale::Percent,
        diagonal: true,
    };
    let label = format!("Calibration, right by confidence: {}", described.join("; "));
    let svg = lines(&label, &drawn, &axes)?;
    let caption = "Upwards: the share of tokens where the likeliest token was right. On the thin line confidence is what it says; below it the model is too sure of itself.";
    write_figure(out, "Calibration", &svg, caption);
    Ok(())
}

/// `caption` is HTML.
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
