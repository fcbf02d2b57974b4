//! Bars with whiskers, and lines, as SVG elements of an HTML page.
//!
//! Plotters draws in placeholder colours, which are then replaced by the page's CSS variables, so that one drawing is
//! valid for light and dark pages. Text uses the font of the page, at the size given here.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::colour::COLOURS;
use super::html::escape;
use crate::error::Error;

/// Width of a drawing in its own units. On the page the drawing is scaled to the available width.
const WIDTH: u32 = 880;
const TEXT: f64 = 29.0;
/// Factor by which Plotters divides a text size in SVG.
const PLOTTERS_TEXT: f64 = 1.24;
/// Dash patterns of lines by colour, for readers who cannot distinguish the colours.
const DASHES: [&str; COLOURS] = ["", "3 9", "", "20 10", "9 7", "24 8 5 8", "14 5", "4 4"];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), Box<dyn std::error::Error>>;

const INK: RGBColor = RGBColor(0, 0, 1);
const SOFT: RGBColor = RGBColor(0, 0, 2);
const GRID: RGBColor = RGBColor(0, 0, 3);
/// Background of the drawing.
const BACKGROUND: RGBColor = RGBColor(0, 0, 4);

/// Placeholder of a model's colour for areas and points.
fn fill(colour: usize) -> RGBColor {
    RGBColor(0, 1, (colour % COLOURS) as u8)
}

/// Placeholder of a model's colour for lines, which also have a dash pattern.
fn stroke(colour: usize) -> RGBColor {
    RGBColor(0, 2, (colour % COLOURS) as u8)
}

/// One bar: a value and its interval.
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) colour: usize,
    pub(super) mean: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    /// Text beside the bar.
    pub(super) label: String,
}

/// One line.
pub(super) struct Line {
    pub(super) colour: usize,
    /// Points (x, y) by ascending x.
    pub(super) points: Vec<(f64, f64)>,
    /// Points of a thin, faint line behind this line, such as the values before averaging.
    pub(super) faint: Vec<(f64, f64)>,
    /// Whether the points are marked.
    pub(super) dots: bool,
}

/// Scale of an axis.
#[derive(Clone, Copy)]
pub(super) enum Scale {
    /// Linear scale.
    Plain,
    /// Linear scale of 0 to 1, with labels from 0 % to 100 %.
    Percent,
    /// Logarithmic scale: the values are logarithms to base 10, the labels are powers of ten.
    Log10,
}

/// The axes of a line plot.
pub(super) struct Axes<'a> {
    pub(super) x: (f64, f64),
    pub(super) x_name: &'a str,
    pub(super) x_scale: Scale,
    pub(super) y: (f64, f64),
    pub(super) y_scale: Scale,
    /// Whether a thin line connects the lower left and the upper right corner.
    pub(super) diagonal: bool,
}

fn tick(scale: Scale, value: f64) -> String {
    match scale {
        Scale::Percent => format!("{:.0} %", 100.0 * value),
        Scale::Log10 => short(10f64.powf(value)),
        Scale::Plain => short(value),
    }
}

/// Formats a number with two significant digits below ten, and without decimals above.
fn short(value: f64) -> String {
    let value = if value.abs() < 1e-9 { 0.0 } else { value };
    let decimals = match value.abs() {
        0.0 | 10.0.. => 0,
        1.0.. => 1,
        0.1.. => 2,
        0.01.. => 3,
        _ => 4,
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

fn text(colour: &'static RGBColor, h: HPos) -> TextStyle<'static> {
    let style = TextStyle::from(("sans-serif", TEXT * PLOTTERS_TEXT).into_font());
    style.color(colour).pos(Pos::new(h, VPos::Center))
}

/// Draws horizontal bars with whiskers over `range`, or dots with whiskers if the scale is logarithmic and has no zero.
/// `label` describes the drawing to readers who cannot see it.
pub(super) fn bars(
    label: &str,
    bars: &[Bar],
    range: (f64, f64),
    scale: Scale,
) -> Result<String, Error> {
    let height = 72 + 62 * bars.len() as u32;
    draw(label, height, &[], |area| {
        draw_bars(area, bars, range, scale)
    })
}

fn draw_bars(area: &Area, bars: &[Bar], (min, max): (f64, f64), scale: Scale) -> DrawResult {
    let widest = |texts: &mut dyn Iterator<Item = usize>| texts.max().unwrap_or(0) as f64;
    let names = widest(&mut bars.iter().map(|bar| bar.name.chars().count())).min(18.0);
    let labels = widest(&mut bars.iter().map(|bar| bar.label.chars().count()));
    let per_letter = TEXT * 0.56;
    let count = bars.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .margin_top(6)
        .margin_right((labels * per_letter) as u32 + 24)
        .x_label_area_size(56)
        .y_label_area_size((names * per_letter) as u32 + 24)
        .build_cartesian_2d(min..max, count..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_labels(5)
        .x_label_formatter(&|x| tick(scale, *x))
        .x_label_style(text(&SOFT, HPos::Center))
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(2))
        .axis_style(SOFT.stroke_width(2))
        .draw()?;
    for (i, bar) in bars.iter().enumerate() {
        let middle = i as f64 + 0.5;
        let mean = bar.mean.clamp(min, max);
        let filled = fill(bar.colour).filled();
        if !matches!(scale, Scale::Log10) {
            let shape = [(min, middle - 0.3), (mean, middle + 0.3)];
            chart.draw_series([Rectangle::new(shape, filled)])?;
        }
        let (low, high) = (bar.low.clamp(min, max), bar.high.clamp(min, max));
        let (upper, lower) = (middle - 0.14, middle + 0.14);
        let whisker = [
            vec![(low, middle), (high, middle)],
            vec![(low, upper), (low, lower)],
            vec![(high, upper), (high, lower)],
        ];
        // An outline in the background colour separates the whisker from the bar.
        for style in [BACKGROUND.stroke_width(9), INK.stroke_width(4)] {
            let strokes = whisker.iter().cloned();
            chart.draw_series(strokes.map(|points| PathElement::new(points, style)))?;
        }
        if matches!(scale, Scale::Log10) {
            chart.draw_series([Circle::new((mean, middle), 9, filled)])?;
        }
        let name: String = bar.name.chars().take(18).collect();
        chart
            .draw_series([EmptyElement::at((min, middle))
                + Text::new(name, (-14, 0), text(&INK, HPos::Right))])?;
        chart.draw_series([EmptyElement::at((max, middle))
            + Text::new(bar.label.clone(), (14, 0), text(&INK, HPos::Left))])?;
    }
    Ok(())
}

/// Draws lines over common axes. `label` describes the drawing to readers who cannot see it.
pub(super) fn lines(label: &str, lines: &[Line], axes: &Axes) -> Result<String, Error> {
    draw(label, 500, lines, |area| draw_lines(area, lines, axes))
}

fn draw_lines(area: &Area, lines: &[Line], axes: &Axes) -> DrawResult {
    let mut chart = ChartBuilder::on(area)
        .margin_top(18)
        .margin_right(62)
        .x_label_area_size(92)
        .y_label_area_size(96)
        .build_cartesian_2d(axes.x.0..axes.x.1, axes.y.0..axes.y.1)?;
    chart
        .configure_mesh()
        .x_labels(6)
        .y_labels(6)
        .x_desc(axes.x_name)
        .x_label_formatter(&|x| tick(axes.x_scale, *x))
        .y_label_formatter(&|y| tick(axes.y_scale, *y))
        .label_style(text(&SOFT, HPos::Center))
        .axis_desc_style(text(&SOFT, HPos::Center))
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(2))
        .axis_style(SOFT.stroke_width(2))
        .draw()?;
    if axes.diagonal {
        let ends = vec![(axes.x.0, axes.y.0), (axes.x.1, axes.y.1)];
        chart.draw_series([PathElement::new(ends, SOFT.stroke_width(2))])?;
    }
    for line in lines.iter().filter(|line| !line.faint.is_empty()) {
        let faint = fill(line.colour).mix(0.3).stroke_width(2);
        chart.draw_series([PathElement::new(line.faint.clone(), faint)])?;
    }
    for line in lines {
        let style = stroke(line.colour).stroke_width(5);
        chart.draw_series([PathElement::new(line.points.clone(), style)])?;
        if line.dots {
            let dot = |point: &(f64, f64)| Circle::new(*point, 8, fill(line.colour).filled());
            chart.draw_series(line.points.iter().map(dot))?;
        }
    }
    Ok(())
}

fn draw(
    label: &str,
    height: u32,
    lines: &[Line],
    draw_area: impl FnOnce(&Area) -> DrawResult,
) -> Result<String, Error> {
    let failed = |reason: String| Error::Plot {
        plot: label.to_owned(),
        reason,
    };
    let finite = |points: &[(f64, f64)]| points.iter().all(|(x, y)| x.is_finite() && y.is_finite());
    if !lines
        .iter()
        .all(|line| finite(&line.points) && finite(&line.faint))
    {
        return Err(failed("a value is not finite".to_owned()));
    }
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw_area(&area).map_err(|e| failed(e.to_string()))?;
        area.present().map_err(|e| failed(e.to_string()))?;
    }
    Ok(themed(&svg, label, height))
}

/// Replaces the placeholder colours by the page's variables, and puts the description into the root element.
fn themed(svg: &str, label: &str, height: u32) -> String {
    // A quoted string is an attribute, since a quotation mark in text is written `&quot;`.
    let quoted = |RGBColor(r, g, b): RGBColor| format!("\"#{r:02X}{g:02X}{b:02X}\"");
    let mut svg = svg.replace(&quoted(INK), "\"var(--ink)\"");
    svg = svg.replace(&quoted(SOFT), "\"var(--soft)\"");
    svg = svg.replace(&quoted(GRID), "\"var(--grid)\"");
    svg = svg.replace(&quoted(BACKGROUND), "\"var(--card)\"");
    for (colour, dashes) in DASHES.iter().enumerate() {
        svg = svg.replace(&quoted(fill(colour)), &format!("\"var(--m{colour})\""));
        let line =
            format!("\"var(--m{colour})\" stroke-linejoin=\"round\" stroke-dasharray=\"{dashes}\"");
        svg = svg.replace(
            &quoted(stroke(colour)),
            &line.replace(" stroke-dasharray=\"\"", ""),
        );
    }
    let body = svg.split_once('>').map_or("", |(_, body)| body);
    format!(
        "<svg role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {height}\">{body}",
        escape(label)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(name: &str, mean: f64) -> Bar {
        Bar {
            name: name.to_owned(),
            colour: 2,
            mean,
            low: mean - 0.1,
            high: mean + 0.1,
            label: "x".to_owned(),
        }
    }

    #[test]
    fn a_drawing_uses_the_colours_and_the_font_of_the_page() {
        let svg = bars(
            "A \"b\"",
            &[bar("<i>", 0.5), bar("sft", 0.2)],
            (0.0, 1.0),
            Scale::Percent,
        );
        let svg = svg.unwrap();
        assert!(svg.starts_with("<svg role=\"img\" aria-label=\"A &quot;b&quot;\" viewBox="));
        assert!(svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("fill=\"var(--m2)\"") && svg.contains("stroke=\"var(--ink)\""));
        assert!(svg.contains("&lt;i&gt;") && !svg.contains("<i>"));
        assert!(
            !svg.contains("\"#"),
            "a colour that is not a variable of the page"
        );
        assert!(svg.contains("100 %"));
    }

    #[test]
    fn lines_differ_in_their_dash_pattern() {
        let line = |colour| Line {
            colour,
            points: vec![(0.0, 0.0), (1.0, 1.0)],
            faint: vec![(0.0, 0.5), (1.0, 0.5)],
            dots: true,
        };
        let axes = Axes {
            x: (0.0, 1.0),
            x_name: "step",
            x_scale: Scale::Plain,
            y: (-2.0, 1.0),
            y_scale: Scale::Log10,
            diagonal: true,
        };
        let svg = lines("l", &[line(2), line(3)], &axes).unwrap();
        assert_eq!(svg.matches("stroke-dasharray=\"20 10\"").count(), 1);
        assert!(!svg.contains("\"#") && svg.contains("<circle"));
        assert!(
            svg.contains("0.01") && svg.contains("10\n"),
            "powers of ten"
        );
        let mut broken = line(1);
        broken.points.push((2.0, f64::NAN));
        assert!(matches!(
            lines("l", &[broken], &axes),
            Err(Error::Plot { .. })
        ));
    }

    #[test]
    fn ticks_are_short() {
        let plain = [0.0, 0.25, 1.5, 12.0, 600.0, 0.0031, -0.5].map(|x| tick(Scale::Plain, x));
        assert_eq!(plain, ["0", "0.25", "1.5", "12", "600", "0.0031", "-0.5"]);
        assert_eq!(tick(Scale::Log10, -1.5), "0.032");
        assert_eq!(tick(Scale::Percent, 0.25), "25 %");
    }
}
