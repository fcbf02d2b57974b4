//! Formats of numbers and verdicts in the report, the same in Markdown and in HTML.

use crate::comparison::Verdict;
use crate::interval::Interval;
use crate::metric::Figure;

/// Formats a figure: `0.5104`, or `61.0 %`.
pub(crate) fn value(figure: Figure, value: f64) -> String {
    match figure {
        Figure::Kl | Figure::Nll | Figure::OwnTextKl => format!("{value:.4}"),
        Figure::Agreement | Figure::Accuracy | Figure::Calibration => {
            format!("{:.1} %", 100.0 * value)
        }
    }
}

/// Formats a difference: `-0.3063`, or `+3.0 points`.
pub(crate) fn signed(figure: Figure, value: f64) -> String {
    match figure {
        Figure::Kl | Figure::Nll | Figure::OwnTextKl => format!("{value:+.4}"),
        Figure::Agreement | Figure::Accuracy | Figure::Calibration => {
            format!("{:+.1} points", 100.0 * value)
        }
    }
}

/// Formats the size of a difference: `0.0123 nats per token`, or `3.0 points`.
pub(crate) fn magnitude(figure: Figure, value: f64) -> String {
    let signed = signed(figure, value.abs());
    format!("{}{}", signed.trim_start_matches('+'), unit(figure))
}

/// Formats the size of a difference for a table: `0.0123`, or `3.0 points`.
pub(crate) fn detectable(figure: Figure, value: f64) -> String {
    signed(figure, value.abs()).replace('+', "")
}

/// Formats a p-value with two digits: `p = 0.031`, or `p < 0.0001`.
pub(crate) fn p_value(p: f64) -> String {
    match p {
        p if p < 1e-4 => "p < 0.0001".to_owned(),
        p if p < 1e-3 => format!("p = {p:.5}"),
        p if p < 1e-2 => format!("p = {p:.4}"),
        p if p < 0.1 => format!("p = {p:.3}"),
        p => format!("p = {p:.2}"),
    }
}

/// Formats the interval of a difference for a sentence: `-0.3182 to -0.2820`, or `+1.0 to +11.0 points`.
pub(crate) fn from_to(figure: Figure, Interval { low, high, .. }: &Interval) -> String {
    match figure {
        Figure::Kl | Figure::Nll | Figure::OwnTextKl => format!("{low:+.4} to {high:+.4}"),
        Figure::Agreement | Figure::Accuracy | Figure::Calibration => {
            format!("{:+.1} to {:+.1} points", 100.0 * low, 100.0 * high)
        }
    }
}

/// Unit after a figure: ` nats per token`, or nothing.
pub(crate) fn unit(figure: Figure) -> &'static str {
    match figure {
        Figure::Kl | Figure::Nll | Figure::OwnTextKl => " nats per token",
        Figure::Agreement | Figure::Accuracy | Figure::Calibration => "",
    }
}

/// Formats a figure with its interval: `0.5104 [0.5058, 0.5144]`.
pub(crate) fn with_interval(figure: Figure, interval: &Interval) -> String {
    let (mean, range) = (value(figure, interval.mean), range(figure, interval));
    format!("{mean} {range}")
}

/// Formats an interval: `[0.5058, 0.5144]`, or `[28.6, 36.6]` of percentages.
pub(crate) fn range(figure: Figure, Interval { low, high, .. }: &Interval) -> String {
    match figure {
        Figure::Kl | Figure::Nll | Figure::OwnTextKl => format!("[{low:.4}, {high:.4}]"),
        Figure::Agreement | Figure::Accuracy | Figure::Calibration => {
            format!("[{:.1}, {:.1}]", 100.0 * low, 100.0 * high)
        }
    }
}

/// Formats a difference with its interval: `+3.0 points [-1.0, +7.0]`.
pub(crate) fn difference(figure: Figure, interval: &Interval) -> String {
    let mean = signed(figure, interval.mean);
    format!("{mean} {}", signed_range(figure, interval))
}

/// Formats the interval of a difference: `[-0.0328, -0.0309]`, or `[-1.0, +7.0]` of percentages.
pub(crate) fn signed_range(figure: Figure, Interval { low, high, .. }: &Interval) -> String {
    match figure {
        Figure::Kl | Figure::Nll | Figure::OwnTextKl => format!("[{low:+.4}, {high:+.4}]"),
        Figure::Agreement | Figure::Accuracy | Figure::Calibration => {
            format!("[{:+.1}, {:+.1}]", 100.0 * low, 100.0 * high)
        }
    }
}

/// Formats a p-value for a table: `0.031`, or `< 0.0001`.
pub(crate) fn p_number(p: f64) -> String {
    let text = p_value(p);
    text.trim_start_matches("p ")
        .trim_start_matches("= ")
        .to_owned()
}

/// Formats a learning rate as short as possible: `0.0015`, `3e-6`.
pub(crate) fn rate(rate: f64) -> String {
    match rate {
        0.0001.. => format!("{rate}"),
        _ => format!("{rate:e}"),
    }
}

/// Text of a verdict in a table.
pub(crate) fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "better",
        Verdict::Worse => "worse",
        Verdict::NoDifference => "no difference shown",
    }
}

/// Text of a grader's verdict: `right`, `wrong` or `not graded`.
pub(crate) fn graded(correct: Option<bool>) -> &'static str {
    match correct {
        Some(true) => "right",
        Some(false) => "wrong",
        None => "not graded",
    }
}

/// Formats a count: `1,234,567`.
pub(crate) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Formats a size: `940 B`, `12.3 kB`, `4.1 MB`; a kB is 1,000 bytes.
pub(crate) fn bytes(bytes: u64) -> String {
    let mut size = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if size < 999.95 {
            return match unit {
                "B" => format!("{bytes} B"),
                _ => format!("{size:.1} {unit}"),
            };
        }
        size /= 1000.0;
    }
    format!("{size:.1} TB")
}

/// Formats a duration: `12.3 s`, `4 min 05 s`, `2 h 03 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 if seconds < 59.95 => format!("{seconds:.1} s"),
        0..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_values_and_differences() {
        assert_eq!(
            [1.0, 0.25, 0.0314, 0.0012, 0.00012, 0.0].map(p_number),
            ["1.00", "0.25", "0.031", "0.0012", "0.00012", "< 0.0001"]
        );
        assert_eq!(p_value(0.012), "p = 0.012");
        assert_eq!(magnitude(Figure::Kl, -0.00312), "0.0031 nats per token");
        assert_eq!(magnitude(Figure::Accuracy, -0.03), "3.0 points");
        assert_eq!([0.003, 1e-5, 0.0015].map(rate), ["0.003", "1e-5", "0.0015"]);
    }

    #[test]
    fn counts_bytes_and_durations() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(count),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [0, 999, 4096, 999_950, 4_100_000, 5_000_000_000_000].map(bytes),
            ["0 B", "999 B", "4.1 kB", "1.0 MB", "4.1 MB", "5.0 TB"]
        );
        assert_eq!(
            [0.0, 12.34, 59.97, 245.0, 3599.7, 7380.0].map(duration),
            [
                "0.0 s",
                "12.3 s",
                "1 min 00 s",
                "4 min 05 s",
                "1 h 00 min",
                "2 h 03 min"
            ]
        );
    }
}
