//! Horizontal bars as SVG.

use std::fmt::Write;

/// A bar.
pub struct Bar {
    pub label: String,
    pub value: f64,
    /// Single measurements, drawn as dots.
    pub samples: Vec<f64>,
    /// Tern's own bars have another colour.
    pub ours: bool,
}

const WIDTH: f64 = 760.0;
const LEFT: f64 = 210.0;
const RIGHT: f64 = 90.0;
const ROW: f64 = 44.0;
const TOP: f64 = 64.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A round step that divides `most` into 4 to 8 parts.
fn step(most: f64) -> f64 {
    let unit = 10f64.powf((most / 5.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * unit).find(|s| most / s <= 8.0).unwrap_or(most)
}

/// The picture; `unit` stands after every value.
pub fn bars(title: &str, subtitle: &str, unit: &str, bars: &[Bar]) -> String {
    let values = bars.iter().flat_map(|b| b.samples.iter().copied().chain([b.value]));
    let most = values.filter(|v| v.is_finite()).fold(1e-9, f64::max) * 1.05;
    let x = |v: f64| LEFT + v / most * (WIDTH - LEFT - RIGHT);
    let bottom = TOP + ROW * bars.len() as f64;
    let height = bottom + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"17\" font-weight=\"bold\">{}</text>\n\
         <text x=\"16\" y=\"46\" fill=\"#666\">{}</text>\n",
        escape(title),
        escape(subtitle)
    );
    let step = step(most);
    let mut tick = 0.0;
    while tick <= most {
        let at = x(tick);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#666\">{}</text>",
            bottom + 18.0,
            (tick * 1000.0).round() / 1000.0
        );
        tick += step;
    }
    for (i, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * i as f64;
        let middle = y + ROW / 2.0;
        let colour = if bar.ours { "#c2410c" } else { "#64748b" };
        let value = if bar.value.is_finite() { bar.value } else { 0.0 };
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"24\" rx=\"3\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" font-weight=\"bold\">{value:.1} {}</text>",
            LEFT - 10.0,
            middle + 4.5,
            escape(&bar.label),
            middle - 12.0,
            (x(value) - LEFT).max(1.0),
            bar.samples.iter().copied().filter(|s| s.is_finite()).map(x).fold(x(value), f64::max)
                + 10.0,
            middle + 4.5,
            escape(unit)
        );
        for sample in bar.samples.iter().filter(|s| s.is_finite()) {
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"3.2\" fill=\"#fff\" fill-opacity=\"0.9\" \
                 stroke=\"#222\"/>",
                x(*sample)
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_every_bar_with_its_text_escaped() {
        let bar = |label: &str, value| Bar {
            label: label.into(),
            value,
            samples: vec![value, f64::NAN],
            ours: false,
        };
        let svg = bars("a < b", "", "Gbit/s", &[bar("x & y", 3.0), bar("none", f64::NAN)]);
        assert!(svg.contains("a &lt; b") && svg.contains("x &amp; y"));
        assert_eq!(svg.matches("<circle").count(), 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
