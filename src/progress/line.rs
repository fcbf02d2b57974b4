//! The progress line of a stage on a terminal.

/// Number of cells of the bar.
const BAR: usize = 10;
/// Longest name of a stage that is shown whole, in characters.
const LONGEST_NAME: usize = 24;

/// Formats progress in one line, with the important parts first, because a narrow terminal cuts the line at its right
/// edge: the stage, the share that is done (0 to 1), the count of parts, the time left, a bar, and further facts.
pub(super) fn terminal_line(
    stage: &str,
    share: Option<f64>,
    parts: &str,
    left: Option<String>,
    facts: &[String],
) -> String {
    let mut line = match stage.chars().count() > LONGEST_NAME {
        true => stage.chars().take(LONGEST_NAME - 1).chain(['…']).collect(),
        false => format!("{stage:>10}"),
    };
    let share = share.map(|share| share.clamp(0.0, 1.0));
    if let Some(share) = share {
        line += &format!(" {:>3} %", (share * 100.0) as u32);
    }
    line += &format!(" {parts}");
    if let Some(left) = left {
        line += &format!(", {left}");
    }
    if let Some(share) = share {
        let full = (share * BAR as f64) as usize;
        line += &format!(" {}{}", "█".repeat(full), "░".repeat(BAR - full));
    }
    if !facts.is_empty() {
        line += &format!(" {}", facts.join(", "));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::terminal_line;

    #[test]
    fn the_important_parts_come_first() {
        let facts = ["51 tokens/s", "loss 2.3012"].map(str::to_owned);
        let left = Some("3.0 s left".to_owned());
        assert_eq!(
            terminal_line("collect", Some(0.301), "12/40 answers", left, &facts),
            "   collect  30 % 12/40 answers, 3.0 s left ███░░░░░░░ 51 tokens/s, loss 2.3012"
        );
        assert_eq!(
            terminal_line("fetch", None, "0 B/0 B", None, &[]),
            "     fetch 0 B/0 B"
        );
        let long = "train a-student-with-a-long-name";
        assert_eq!(
            terminal_line(long, Some(1.5), "9/6 steps", None, &[]),
            "train a-student-with-a-… 100 % 9/6 steps ██████████"
        );
    }
}
