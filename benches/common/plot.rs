//! The plots of the report: lines, and dots of two figures.

use plotters::coord::combinators::{BindKeyPoints, WithKeyPoints};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

const SIZE: (u32, u32) = (800, 400);
/// Where the chart ends and the legend begins.
const CHART: u32 = 580;
const FONT: (&str, u32) = ("sans-serif", 13);
/// Told apart by the colour-blind too (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(85, 85, 85),
];

/// What stands along an axis: a name, the values from end to end, and how one of them is written.
pub struct Axis<R> {
    pub name: &'static str,
    pub range: R,
    pub show: fn(&f64) -> String,
}

/// A range of values on a logarithmic scale.
pub type Log = WithKeyPoints<LogCoord<f64>>;

/// From at most `min` to at least `max`, both positive. The labels are at 1, 2 and 5 times each power of ten, or at the
/// powers alone if that were many.
pub fn log(min: f64, max: f64) -> Log {
    const MANY: usize = 10;
    let between = |factors: &'static [i32]| -> Vec<f64> {
        let all = (-12..12).flat_map(|power| factors.iter().map(move |&f| f64::from(f) * 10f64.powi(power)));
        let all: Vec<f64> = all.collect();
        let first = all.iter().rposition(|&v| v <= min).unwrap_or(0);
        let last = all.iter().position(|&v| v >= max).unwrap_or(all.len() - 1);
        all[first..=last.max(first + 1)].to_vec()
    };
    let fine = between(&[1, 2, 5]);
    let ticks = if fine.len() > MANY { between(&[1]) } else { fine };
    (ticks[0]..ticks[ticks.len() - 1]).log_scale().with_key_points(ticks)
}

/// From 1 down to ten to the minus `powers`: the part of a distribution that is greater than a quantile.
pub fn tail(powers: i32) -> Log {
    let ticks: Vec<f64> = (0..=powers).map(|power| 10f64.powi(-power)).collect();
    (1.0..10f64.powi(-powers)).log_scale().with_key_points(ticks)
}

/// A plot of lines as SVG: names, each with its points from left to right. With `steps` each value stays until the next.
pub fn lines<X, Y>(title: &str, x: Axis<X>, y: Axis<Y>, lines: &[(String, Vec<(f64, f64)>)], steps: bool) -> String
where
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    let stepped = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.windows(2).flat_map(|p| [p[0], (p[1].0, p[0].1)]).chain(points.last().copied()).collect()
    };
    let shown = lines.iter().map(|(name, points)| Series {
        name,
        points: if steps { stepped(points) } else { points.clone() },
        is_line: true,
        radius: 0,
    });
    draw(title, x, y, &shown.collect::<Vec<_>>(), &[])
}

/// A point with a name of its own.
pub struct Dot {
    pub at: (f64, f64),
    pub name: String,
    /// Larger than the others.
    pub marked: bool,
}

/// A plot of dots as SVG. The first `joined` of them are joined by a line, in their order.
pub fn dots<X, Y>(title: &str, x: Axis<X>, y: Axis<Y>, dots: &[Dot], joined: usize) -> String
where
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    let shown = dots.iter().map(|dot| Series {
        name: &dot.name,
        points: vec![dot.at],
        is_line: false,
        radius: if dot.marked { 8 } else { 5 },
    });
    let path: Vec<(f64, f64)> = dots[..joined].iter().map(|dot| dot.at).collect();
    draw(title, x, y, &shown.collect::<Vec<_>>(), &path)
}

/// What has one colour and one place in the legend.
struct Series<'a> {
    name: &'a str,
    points: Vec<(f64, f64)>,
    is_line: bool,
    /// Of its dot.
    radius: u32,
}

fn draw<X, Y>(title: &str, x: Axis<X>, y: Axis<Y>, all: &[Series<'_>], path: &[(f64, f64)]) -> String
where
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    const DRAWN: &str = "drawing into a string cannot fail";
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE).expect(DRAWN);
        let (left, right) = root.split_horizontally(CHART);
        let mut chart = ChartBuilder::on(&left)
            .caption(title, ("sans-serif", 16))
            .margin(10)
            .x_label_area_size(45)
            .y_label_area_size(65)
            .build_cartesian_2d(x.range, y.range)
            .expect(DRAWN);
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(x.name).y_desc(y.name).x_label_formatter(&x.show).y_label_formatter(&y.show);
        mesh.label_style(FONT).light_line_style(TRANSPARENT).draw().expect(DRAWN);
        chart.draw_series(LineSeries::new(path.iter().copied(), BLACK.mix(0.3))).expect(DRAWN);

        let coloured = |i: usize| COLOURS[i % COLOURS.len()];
        // The first lies on top, and a large dot hides none.
        let mut order: Vec<_> = all.iter().enumerate().rev().collect();
        order.sort_by_key(|(_, series)| std::cmp::Reverse(series.radius));
        for (i, series) in order {
            let (points, colour) = (series.points.iter().copied(), coloured(i));
            if series.is_line {
                chart.draw_series(LineSeries::new(points, colour.stroke_width(2))).expect(DRAWN);
            } else {
                chart.draw_series(points.map(|at| Circle::new(at, series.radius, colour.filled()))).expect(DRAWN);
            }
            let row = 50 + 20 * i as i32;
            let sample = Rectangle::new([(5, row - 1), (23, row + 2)], coloured(i).filled());
            right.draw(&sample).expect(DRAWN);
            right.draw(&Text::new(series.name.to_owned(), (30, row - 6), FONT)).expect(DRAWN);
        }
        root.present().expect(DRAWN);
    }
    svg
}
