//! A picture of a run: how much was answered over time, and which faults there were.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use plotters::prelude::*;

/// Colours of the bands, in turn.
const COLOURS: [RGBColor; 6] = [
    RGBColor(214, 39, 40),
    RGBColor(255, 127, 14),
    RGBColor(148, 103, 189),
    RGBColor(44, 160, 44),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
];
/// Labels stand in so many lines, so that neighbours do not cover each other.
const LABEL_LINES: usize = 12;
const LINE_PIXELS: u32 = 13;
const LETTER_PIXELS: i32 = 6;
const WIDTH_MIN_PIXELS: u32 = 1200;
const WIDTH_MAX_PIXELS: u32 = 40_000;
const PLOT_PIXELS: u32 = 420;
/// So wide is a second, if the picture does not become too wide.
const SECOND_PIXELS: f64 = 14.0;

/// What happened in a run, in times since its start.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    title: String,
    samples: Vec<(Duration, u64)>,
    faults: Vec<(Range<Duration>, String)>,
}

impl Timeline {
    /// An empty one.
    pub fn new(title: &str) -> Timeline {
        Timeline {
            title: title.to_owned(),
            ..Timeline::default()
        }
    }

    /// How many operations have been answered until `at`, since the start.
    pub fn answered(&mut self, at: Duration, count: u64) {
        self.samples.push((at, count));
    }

    /// A fault began and ended.
    pub fn fault(&mut self, during: Range<Duration>, label: &str) {
        self.faults.push((during, label.to_owned()));
    }

    /// Answered operations per second, at the middle of each interval between two samples.
    fn rates(&self) -> Vec<(f64, f64)> {
        let pairs = self.samples.windows(2);
        let rate = |pair: &[(Duration, u64)]| {
            let [(from, before), (to, after)] = pair else {
                return None;
            };
            let seconds = (*to - *from).as_secs_f64();
            let answered = after.saturating_sub(*before) as f64;
            let middle = from.as_secs_f64() + seconds / 2.0;
            (seconds > 0.0).then(|| (middle, answered / seconds))
        };
        pairs.filter_map(rate).collect()
    }

    /// Writes it as an SVG file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = self.svg().context("the timeline cannot be drawn")?;
        std::fs::write(path, text).with_context(|| path.display().to_string())
    }

    fn svg(&self) -> anyhow::Result<String> {
        let ends = self.faults.iter().map(|(during, _)| during.end);
        let ends = ends.chain(self.samples.iter().map(|(at, _)| *at));
        let end = ends.max().unwrap_or_default().as_secs_f64().max(1.0);
        let rates = self.rates();
        let top = rates.iter().map(|(_, rate)| *rate).fold(1.0, f64::max) * 1.05;
        let width = ((end * SECOND_PIXELS) as u32).clamp(WIDTH_MIN_PIXELS, WIDTH_MAX_PIXELS);
        let labels = LINE_PIXELS * LABEL_LINES as u32;
        let mut text = String::new();
        {
            let root = SVGBackend::with_string(&mut text, (width, PLOT_PIXELS + labels));
            let root = root.into_drawing_area();
            root.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&root)
                .caption(&self.title, ("sans-serif", 16))
                .margin(8)
                .margin_top(8 + labels)
                .x_label_area_size(36)
                .y_label_area_size(64)
                .build_cartesian_2d(0.0..end, 0.0..top)?;
            for (index, (during, _)) in self.faults.iter().enumerate() {
                let corners = [
                    (during.start.as_secs_f64(), 0.0),
                    (during.end.as_secs_f64(), top),
                ];
                let style = COLOURS[index % COLOURS.len()].mix(0.18).filled();
                chart.draw_series([Rectangle::new(corners, style)])?;
            }
            chart
                .configure_mesh()
                .disable_x_mesh()
                .light_line_style(TRANSPARENT)
                .x_labels((width / 100) as usize)
                .x_label_formatter(&|at| format!("{at:.0}"))
                .y_label_formatter(&|rate| format!("{rate:.0}"))
                .x_desc("seconds since the start")
                .y_desc("answered operations per second")
                .draw()?;
            chart.draw_series(LineSeries::new(rates, RGBColor(31, 119, 180)))?;
            for (index, (during, label)) in self.faults.iter().enumerate() {
                let (x, _) = chart.backend_coord(&(during.start.as_secs_f64(), top));
                let y = 8 + LINE_PIXELS as i32 * (index % LABEL_LINES) as i32;
                let colour = COLOURS[index % COLOURS.len()];
                let style = ("sans-serif", 11).into_font().color(&colour);
                // Not over the edge.
                let length = label.len() as i32 * LETTER_PIXELS;
                let x = x.min(width as i32 - length).max(0);
                root.draw(&Text::new(label.clone(), (x, y), style))?;
            }
            root.present()?;
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn rates_are_differences_of_counts() {
        let mut timeline = Timeline::new("t");
        for (at, count) in [(0, 0), (2, 100), (2, 100), (3, 100), (4, 150)] {
            timeline.answered(s(at), count);
        }
        let rates = timeline.rates();
        assert_eq!(rates, [(1.0, 50.0), (2.5, 0.0), (3.5, 50.0)]);
    }

    #[test]
    fn a_picture_shows_faults_by_name() {
        let mut timeline = Timeline::new("five servers");
        for at in 0..20 {
            timeline.answered(s(at), at * 300);
        }
        timeline.fault(s(3)..s(7), "server 2 <killed> & wiped");
        timeline.fault(s(9)..s(40), "half of all cut off");
        let svg = timeline.svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for part in [
            "five servers",
            "server 2 &lt;killed&gt; &amp; wiped",
            "half of all cut off",
            "<polyline",
            "answered operations per second",
        ] {
            assert!(svg.contains(part), "{part} in {svg}");
        }
        // Nothing happened.
        assert!(Timeline::new("").svg().is_ok());
    }
}
