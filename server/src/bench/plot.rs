//! Tokens a second and time to first token as bars, as SVG that follows the reader's light or dark scheme.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::table::number;

/// One bar.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    /// Workload; bars of the same one, one for each server, stand together.
    pub(super) workload: String,
    /// Place in the list of servers.
    pub(super) server: usize,
    /// Output tokens a second.
    pub(super) output_tokens_per_s: f64,
    /// Median time to first token, ms.
    pub(super) ttft_ms: Option<f64>,
}

const WIDTH: u32 = 1000;
/// Width of the left half, which has the names too.
const LEFT: u32 = 590;
const NAMES: u32 = 190;
const TITLE: u32 = 62;
const BAR: u32 = 20;
/// Longest name of a workload, characters.
const NAME_CHARS: usize = 28;

const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xff);
const INK: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const GRID: RGBColor = RGBColor(0xd8, 0xde, 0xe4);
/// They stand out on light and on dark paper.
const SERVERS: [RGBColor; 6] = [
    RGBColor(0x2f, 0x81, 0xc7),
    RGBColor(0xe0, 0x7b, 0x39),
    RGBColor(0x3f, 0x9d, 0x6b),
    RGBColor(0xa3, 0x65, 0xb8),
    RGBColor(0xc7, 0x9a, 0x1e),
    RGBColor(0x7d, 0x87, 0x94),
];
/// The colours above as attributes, and what they become on a dark screen.
const DARK: &str = "<style>@media (prefers-color-scheme: dark) {rect[fill=\"#FFFFFF\"] {fill: #0d1117} \
    text {fill: #c9d1d9} [stroke=\"#D8DEE4\"] {stroke: #30363d}}</style>";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws `bars` of `servers`, which are in the order of their first workload.
pub(super) fn svg(bars: &[Bar], servers: &[String]) -> anyhow::Result<String> {
    let mut workloads: Vec<&str> = Vec::new();
    for bar in bars {
        if !workloads.contains(&bar.workload.as_str()) {
            workloads.push(&bar.workload);
        }
    }
    let slots = workloads.len() * (servers.len() + 1);
    let height = TITLE + 60 + BAR * u32::try_from(slots)?;
    let mut text = String::new();
    {
        let paper = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        let broken = |error: &dyn std::fmt::Display| anyhow!("cannot draw: {error}");
        paper.fill(&PAPER).map_err(|error| broken(&error))?;
        let (left, right) = paper.split_horizontally(LEFT);
        let rate = |bar: &Bar| Some(bar.output_tokens_per_s);
        let ttft = |bar: &Bar| bar.ttft_ms;
        let layout = Layout { bars, workloads: &workloads, servers: servers.len() };
        layout.panel(&left, "output tokens a second (more is better)", NAMES, rate).map_err(|e| broken(&e))?;
        layout.panel(&right, "time to first token, p50, ms (less is better)", 16, ttft).map_err(|e| broken(&e))?;
        legend(&paper, servers).map_err(|error| broken(&error))?;
        paper.present().map_err(|error| broken(&error))?;
    }
    let head = text.find('>').and_then(|xml| Some(xml + 1 + text.get(xml + 1..)?.find('>').unwrap_or(0)));
    // The first tag is `<svg ..>` itself where there is no XML declaration.
    let at = if text.starts_with("<?xml") { head } else { text.find('>') };
    text.insert_str(at.ok_or_else(|| anyhow!("cannot draw: no SVG"))? + 1, DARK);
    Ok(text)
}

fn colour(server: usize) -> RGBColor {
    SERVERS.get(server % SERVERS.len()).copied().unwrap_or(INK)
}

/// Text without what XML cannot hold.
fn plain(text: &str) -> String {
    let shown: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(NAME_CHARS).collect();
    if text.chars().count() > NAME_CHARS { shown + ".." } else { shown }
}

fn ink(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

fn legend(paper: &Area<'_>, servers: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    if servers.len() < 2 {
        return Ok(());
    }
    let mut x = 20;
    for (index, name) in servers.iter().enumerate() {
        let name = plain(name);
        paper.draw(&Rectangle::new([(x, 12), (x + 12, 24)], colour(index).filled()))?;
        paper.draw(&Text::new(name.clone(), (x + 18, 12), ink(17)))?;
        x += 48 + 8 * i32::try_from(name.chars().count())?;
    }
    Ok(())
}

/// Where each bar stands: workloads from above, with a free slot between them.
struct Layout<'a> {
    bars: &'a [Bar],
    workloads: &'a [&'a str],
    servers: usize,
}

impl Layout<'_> {
    fn slots(&self) -> usize {
        self.workloads.len() * (self.servers + 1)
    }

    /// Slots count from below.
    fn slot(&self, workload: usize, server: usize) -> usize {
        self.slots().saturating_sub(2 + workload * (self.servers + 1) + server)
    }

    /// The name at a slot: at the middle bar of its workload.
    fn name_at(&self, slot: usize) -> String {
        let middle = self.servers.saturating_sub(1) / 2;
        let named = (0..self.workloads.len()).find(|workload| self.slot(*workload, middle) == slot);
        named.and_then(|workload| self.workloads.get(workload)).map(|name| plain(name)).unwrap_or_default()
    }

    fn panel(
        &self,
        area: &Area<'_>,
        title: &str,
        names: u32,
        value: impl Fn(&Bar) -> Option<f64>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let largest = self.bars.iter().filter_map(&value).fold(0.0, f64::max).max(1e-3);
        let area = area.margin(30, 0, 0, 0);
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ink(18))
            .x_label_area_size(28)
            .y_label_area_size(names)
            .margin_right(20)
            // Room for the number behind the longest bar.
            .build_cartesian_2d(0.0..largest * 1.18, (0..self.slots()).into_segmented())?;
        let name = |slot: &SegmentValue<usize>| match slot {
            // Ordinary spaces at an end are not drawn.
            SegmentValue::CenterOf(slot) if names > 20 => format!("{}\u{a0}\u{a0}", self.name_at(*slot)),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .x_labels(5)
            .y_labels(self.slots() + 1)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&name)
            .label_style(ink(15))
            .axis_style(GRID)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .set_tick_mark_size(LabelAreaPosition::Left, 0)
            .draw()?;
        for bar in self.bars {
            let Some(workload) = self.workloads.iter().position(|name| *name == bar.workload) else { continue };
            let Some(length) = value(bar) else { continue };
            let slot = self.slot(workload, bar.server);
            let corners = [(0.0, SegmentValue::Exact(slot)), (length, SegmentValue::Exact(slot + 1))];
            let mut rectangle = Rectangle::new(corners, colour(bar.server).filled());
            rectangle.set_margin(2, 2, 0, 0);
            chart.draw_series(std::iter::once(rectangle))?;
            let at = (length, SegmentValue::CenterOf(slot));
            let label = EmptyElement::at(at) + Text::new(number(length), (5, -6), ink(14));
            chart.draw_series(std::iter::once(label))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(workload: &str, server: usize, output_tokens_per_s: f64) -> Bar {
        Bar { workload: workload.into(), server, output_tokens_per_s, ttft_ms: Some(5.0) }
    }

    #[test]
    fn a_plot_has_a_bar_and_a_number_for_each_figure_in_both_schemes() {
        let bars = [bar("base", 0, 812.5), bar("base", 1, 411.25), bar("a<b>&\"c\"", 0, 7.0)];
        let svg = svg(&bars, &["loramux".into(), "other".into()]).unwrap();
        for text in ["812.5", "411.2", "7.00", "a&lt;b&gt;", "other", "prefers-color-scheme: dark"] {
            assert!(svg.contains(text), "{text}\n{svg}");
        }
        // Two panels, three bars each, and the two of the legend.
        let coloured = |colour: &str| svg.matches(&format!("fill=\"{colour}\"")).count();
        assert_eq!((coloured("#2F81C7"), coloured("#E07B39")), (5, 3));
        assert!(svg.find("<style>").unwrap() > svg.find("<svg").unwrap());
        assert!(svg.find("<style>").unwrap() < svg.find("<rect").unwrap());
    }

    #[test]
    fn workloads_stand_from_above_with_their_servers_together_and_named_in_the_middle() {
        let layout = Layout { bars: &[], workloads: &["x", "y"], servers: 3 };
        let slots = |workload| [0, 1, 2].map(|server| layout.slot(workload, server));
        assert_eq!((layout.slots(), slots(0), slots(1)), (8, [6, 5, 4], [2, 1, 0]));
        let names: Vec<String> = (0..8).map(|slot| layout.name_at(slot)).collect();
        assert_eq!(names, ["", "y", "", "", "", "x", "", ""]);
    }

    #[test]
    fn nothing_and_zero_can_be_drawn() {
        assert!(svg(&[], &[]).unwrap().contains("</svg>"));
        let none = Bar { ttft_ms: None, ..bar("\u{1}", 0, 0.0) };
        assert!(svg(&[none], &["x".into()]).unwrap().contains("0.00"));
    }
}
