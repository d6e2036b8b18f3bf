//! Plots of lines and of dots, written by hand: no more than the report needs.

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
        let ticks = (from..=to.max(from + 1)).map(|p| (f64::from(p), seconds(1, p)));
        Axis { label: label.into(), ticks: ticks.collect() }
    }

    /// From at most `min` to at least `max`, both positive, at their logarithms: 1, 2 and 5 times each power of ten, or
    /// the powers alone if that were many. `show` makes a label of the factor and the power.
    pub fn log(label: &str, min: f64, max: f64, show: fn(u32, i32) -> String) -> Axis {
        const MANY: usize = 9;
        let place = |m: u32, p: i32| f64::from(p) + f64::from(m).log10();
        let (min, max) = (min.log10(), max.log10());
        let powers = min.floor() as i32..=max.floor() as i32 + 1;
        let spread = |steps: &[u32]| {
            let all: Vec<_> = powers.clone().flat_map(|p| steps.iter().map(move |&m| (m, p))).collect();
            let first = all.iter().rposition(|&(m, p)| place(m, p) <= min).unwrap_or(0);
            let last = all.iter().position(|&(m, p)| place(m, p) >= max).unwrap_or(all.len() - 1);
            all[first..=last.max(first + 1).min(all.len() - 1)].to_vec()
        };
        let fine = spread(&[1, 2, 5]);
        let chosen = if fine.len() > MANY { spread(&[1]) } else { fine };
        Axis { label: label.into(), ticks: chosen.into_iter().map(|(m, p)| (place(m, p), show(m, p))).collect() }
    }

    fn place(&self, v: f64) -> f64 {
        let (first, last) = (self.ticks[0].0, self.ticks[self.ticks.len() - 1].0);
        ((v - first) / (last - first)).clamp(0.0, 1.0)
    }
}

/// `m` times ten to the `p` seconds, for an axis.
pub fn seconds(m: u32, p: i32) -> String {
    let (n, unit) = match p {
        ..-6 => (p + 9, "ns"),
        -6..-3 => (p + 6, "us"),
        -3..0 => (p + 3, "ms"),
        _ => (p, "s"),
    };
    format!("{} {unit}", f64::from(m) * 10f64.powi(n))
}

/// `m` times ten to the `p`, for an axis.
pub fn number(m: u32, p: i32) -> String {
    format!("{:.*}", (-p).max(0) as usize, f64::from(m) * 10f64.powi(p))
}

/// A plot as SVG. `lines`: names, each with its points from left to right; `steps` holds each value until the next.
pub fn plot(title: &str, x: &Axis, y: &Axis, lines: &[(String, Vec<(f64, f64)>)], steps: bool) -> String {
    let mut svg = frame(title, x, y);
    // The first lies on top.
    for (i, (name, points)) in lines.iter().enumerate().rev() {
        let colour = COLOURS[i % COLOURS.len()];
        let mut path = String::new();
        for (j, &(px, py)) in points.iter().enumerate() {
            let (px, py) = (across(x, px), down(y, py));
            let _ = match (j, steps) {
                (0, _) => write!(path, "M{px:.1} {py:.1}"),
                (_, true) => write!(path, "H{px:.1}V{py:.1}"),
                (_, false) => write!(path, "L{px:.1} {py:.1}"),
            };
        }
        let (right, row) = (WIDTH - RIGHT, TOP + 10.0 + 20.0 * i as f64);
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

/// A point with a name of its own.
pub struct Dot {
    pub at: (f64, f64),
    pub name: String,
    /// Larger than the others.
    pub marked: bool,
}

/// A plot of dots as SVG, with a letter for each. Those of a line are joined in their order, wherever that leads.
pub fn dots(title: &str, x: &Axis, y: &Axis, lines: &[Vec<Dot>]) -> String {
    let mut svg = frame(title, x, y);
    let place = |dot: &Dot| (across(x, dot.at.0), down(y, dot.at.1));
    let colour = |i: usize| COLOURS[i % COLOURS.len()];
    for (i, line) in lines.iter().enumerate() {
        let points: Vec<String> = line.iter().map(place).map(|(px, py)| format!("{px:.1} {py:.1}")).collect();
        let (path, colour) = (points.join("L"), colour(i));
        let _ = writeln!(svg, "<path d=\"M{path}\" fill=\"none\" stroke=\"{colour}\" stroke-opacity=\"0.4\"/>");
    }
    let all: Vec<(usize, &Dot)> =
        lines.iter().enumerate().flat_map(|(i, line)| line.iter().map(move |d| (i, d))).collect();
    // The large ones at the bottom, so that they hide nobody.
    for marked in [true, false] {
        for &(i, dot) in all.iter().filter(|(_, dot)| dot.marked == marked) {
            let ((px, py), r, colour) = (place(dot), if marked { 7 } else { 4 }, colour(i));
            let _ = writeln!(svg, "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"{r}\" fill=\"{colour}\"/>");
        }
    }
    // A letter goes beside its dot, or where there is room, with a line to it.
    let mut taken: Vec<(f64, f64)> = all.iter().map(|(_, dot)| place(dot)).collect();
    for (n, &(i, dot)) in all.iter().enumerate() {
        let ((px, py), colour, letter) = (place(dot), colour(i), char::from(b'a' + n as u8));
        let mut around = (0..96).map(|k| {
            let (sin, cos) = (f64::from(k % 16) / 16.0 * std::f64::consts::TAU).sin_cos();
            let r = f64::from(12 + k / 16 * 8);
            (r * cos, r * sin)
        });
        let is_free = |(dx, dy): &(f64, f64)| {
            let (lx, ly) = (px + dx, py + dy);
            let is_inside = lx > LEFT + 5.0 && lx < WIDTH - RIGHT - 5.0 && ly > TOP + 6.0 && ly < HEIGHT - BOTTOM - 6.0;
            is_inside && !taken.iter().any(|(ox, oy)| (ox - lx).abs() < 9.0 && (oy - ly).abs() < 11.0)
        };
        let (dx, dy) = around.find(is_free).unwrap_or((12.0, 0.0));
        let (lx, ly) = (px + dx, py + dy);
        taken.push((lx, ly));
        if dx.hypot(dy) > 13.0 {
            let _ =
                writeln!(svg, "<path d=\"M{px:.1} {py:.1}L{lx:.1} {ly:.1}\" stroke=\"#999\" stroke-width=\"0.7\"/>");
        }
        let row = TOP + 12.0 + 19.0 * n as f64;
        let _ = writeln!(
            svg,
            "<g fill=\"{colour}\" font-weight=\"bold\" text-anchor=\"middle\" stroke=\"#fff\" stroke-width=\"3\" \
             paint-order=\"stroke\"><text x=\"{lx:.1}\" y=\"{:.1}\">{letter}</text>\
             <text x=\"{}\" y=\"{row}\">{letter}</text></g>\
             <text x=\"{}\" y=\"{row}\">{}</text>",
            ly + 4.0,
            WIDTH - RIGHT + 18.0,
            WIDTH - RIGHT + 30.0,
            escape(&dot.name)
        );
    }
    svg + "</svg>\n"
}

fn across(x: &Axis, v: f64) -> f64 {
    LEFT + x.place(v) * (WIDTH - LEFT - RIGHT)
}

fn down(y: &Axis, v: f64) -> f64 {
    HEIGHT - BOTTOM - y.place(v) * (HEIGHT - TOP - BOTTOM)
}

/// The beginning of a plot: its title and axes.
fn frame(title: &str, x: &Axis, y: &Axis) -> String {
    let (left, right, top, bottom) = (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{left}\" y=\"22\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
        escape(title)
    );
    for (v, label) in &x.ticks {
        let at = across(x, *v);
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {top}V{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 17.0,
            escape(label)
        );
    }
    for (v, label) in &y.ticks {
        let at = down(y, *v);
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
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
