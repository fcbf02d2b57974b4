//! The progress line of a stage on a terminal.

/// Number of cells of the bar.
const BAR: usize = 10;
/// Longest name of a stage that is shown whole, in characters.
const LONGEST_NAME: usize = 24;

/// Formats progress in one line, with the important parts first, because a narrow terminal cuts the line at its right
/// edge: the stage, the share that is done (0 to 1), the bar, the count of parts, and further facts.
pub(super) fn terminal_line(
    stage: &str,
    share: Option<f64>,
    parts: &str,
    facts: &[String],
) -> String {
    let mut line = match stage.chars().count() > LONGEST_NAME {
        true => stage.chars().take(LONGEST_NAME - 1).chain(['…']).collect(),
        false => format!("{stage:>10}"),
    };
    if let Some(share) = share {
        let share = share.clamp(0.0, 1.0);
        let full = (share * BAR as f64) as usize;
        let (full_cells, empty_cells) = ("█".repeat(full), "░".repeat(BAR - full));
        let percent = (share * 100.0) as u32;
        line += &format!(" {percent:>3} % {full_cells}{empty_cells}");
    }
    line += &format!(" {parts}");
    for fact in facts {
        line += &format!(", {fact}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::terminal_line;

    #[test]
    fn the_important_parts_come_first() {
        let facts = ["3.0 s left", "51 tokens/s", "loss 2.3012"].map(str::to_owned);
        assert_eq!(
            terminal_line("collect", Some(0.301), "12/40 answers", &facts),
            "   collect  30 % ███░░░░░░░ 12/40 answers, 3.0 s left, 51 tokens/s, loss 2.3012"
        );
        assert_eq!(
            terminal_line("fetch", None, "0 B/0 B", &[]),
            "     fetch 0 B/0 B"
        );
        let long = "train a-student-with-a-long-name";
        assert_eq!(
            terminal_line(long, Some(1.5), "9/6 steps", &[]),
            "train a-student-with-a-… 100 % ██████████ 9/6 steps"
        );
    }
}
