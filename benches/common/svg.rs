//! Line plots, written by hand: no more than the report needs.

use std::fmt::Write as _;

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 230.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Told apart by the colour-blind too (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#555555"];

/// What stands along an axis: a name, and the labels of some places. The first and last are its ends. For a scale that
/// is not linear, whoever plots transforms both places and points.
pub struct Axis {
    pub label: String,
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From 0 to at least `max`, in about six steps.
    pub fn linear(label: &str, max: f64) -> Axis {
        let rough = (max / 6.0).max(1e-9);
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&s| s >= rough).unwrap_or(rough);
        let n = (max / step).ceil().max(1.0) as u32;
        // 3 x 0.2 is 0.6000000000000001.
        let digits = (-step.log10().floor()).max(0.0) as usize;
        let ticks = (0..=n).map(|i| f64::from(i) * step).map(|v| (v, format!("{v:.digits$}")));
        Axis { label: label.into(), ticks: ticks.collect() }
    }

    /// Powers of ten of seconds, at their logarithms.
    pub fn log_seconds(label: &str, min: f64, max: f64) -> Axis {
        let (from, to) = (min.log10().floor() as i32, max.log10().ceil() as i32);
        let ticks = (from..=to.max(from + 1)).map(|p| {
            let (n, unit) = match p {
                ..-6 => (p + 9, "ns"),
                -6..-3 => (p + 6, "us"),
                -3..0 => (p + 3, "ms"),
                _ => (p, "s"),
            };
            (f64::from(p), format!("{} {unit}", 10f64.powi(n)))
        });
        Axis { label: label.into(), ticks: ticks.collect() }
    }

    fn place(&self, v: f64) -> f64 {
        let (first, last) = (self.ticks[0].0, self.ticks[self.ticks.len() - 1].0);
        ((v - first) / (last - first)).clamp(0.0, 1.0)
    }
}

/// A plot as SVG. `lines`: names, each with its points from left to right; `steps` holds each value until the next.
pub fn plot(title: &str, x: &Axis, y: &Axis, lines: &[(String, Vec<(f64, f64)>)], steps: bool) -> String {
    let across = |v: f64| LEFT + x.place(v) * (WIDTH - LEFT - RIGHT);
    let down = |v: f64| HEIGHT - BOTTOM - y.place(v) * (HEIGHT - TOP - BOTTOM);
    let (left, right, top, bottom) = (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{left}\" y=\"22\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
        escape(title)
    );
    for (v, label) in &x.ticks {
        let at = across(*v);
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {top}V{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 17.0,
            escape(label)
        );
    }
    for (v, label) in &y.ticks {
        let at = down(*v);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {at:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 6.0,
            at + 4.0,
            escape(label)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (left + right) / 2.0,
        HEIGHT - 10.0,
        escape(&x.label),
        (top + bottom) / 2.0,
        escape(&y.label)
    );
    // The first lies on top.
    for (i, (name, points)) in lines.iter().enumerate().rev() {
        let colour = COLOURS[i % COLOURS.len()];
        let mut path = String::new();
        for (j, &(px, py)) in points.iter().enumerate() {
            let (px, py) = (across(px), down(py));
            let _ = match (j, steps) {
                (0, _) => write!(path, "M{px:.1} {py:.1}"),
                (_, true) => write!(path, "H{px:.1}V{py:.1}"),
                (_, false) => write!(path, "L{px:.1} {py:.1}"),
            };
        }
        let row = top + 10.0 + 20.0 * i as f64;
        let _ = writeln!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <path d=\"M{} {row}h18\" stroke=\"{colour}\" stroke-width=\"3\"/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
            right + 12.0,
            right + 36.0,
            row + 4.0,
            escape(name)
        );
    }
    svg + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
