//! The timeline picture: for every migration the bytes that were left to send, the rate at which
//! the guest dirtied pages, its rounds, and its pause.

use std::fmt::Write;

use crate::migration::Report;

const WIDTH: f64 = 960.0;
const ROW: f64 = 170.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 78.0;
const TOP: f64 = 64.0;
const PLOT: f64 = 104.0;

const STYLE: &str = "text{font:12px sans-serif;fill:#333}.t{font-weight:bold}.s{fill:#777;font-size:11px}\
.b{fill:#9ecae1;fill-opacity:.6;stroke:#3182bd}.r{fill:none;stroke:#e6550d;stroke-width:1.5}\
.p{fill:#d62728;fill-opacity:.75}.g{stroke:#ccc}.d{stroke:#888;stroke-dasharray:3 3}";

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

struct Scale {
    ms: f64,
    bytes: f64,
    rate: f64,
}

impl Scale {
    fn of(report: &Report) -> Self {
        let most = |f: &dyn Fn(&crate::migration::Sample) -> f64| {
            report.samples.iter().map(f).fold(0.0, f64::max)
        };
        let end = most(&|s| s.ms)
            .max(report.stopped_at_ms + report.blackout_ms.max(report.stop_to_resume_ms));
        Self {
            ms: end.max(1.0) * 1.02,
            bytes: most(&|s| s.remaining as f64).max(most(&|s| s.transferred as f64)).max(1.0),
            rate: most(&|s| s.dirty_pages_rate as f64).max(1.0) * 1.2,
        }
    }

    fn x(&self, ms: f64) -> f64 {
        LEFT + (ms / self.ms).clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }
}

/// Lines that mark where rounds began. Their lengths are told; their sum is set to end at the stop.
fn rounds(out: &mut String, report: &Report, scale: &Scale, top: f64) {
    let mut at = 0.0;
    let mut labelled = f64::MIN;
    for round in &report.rounds {
        let x = scale.x(at);
        let _ = writeln!(
            out,
            "<line class=\"d\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{:.1}\"/>",
            top + PLOT
        );
        if x - labelled > 120.0 && x < WIDTH - RIGHT - 120.0 {
            let _ = writeln!(
                out,
                "<text class=\"s\" x=\"{:.1}\" y=\"{:.1}\">round {}: {:.1} MiB</text>",
                x + 3.0,
                top + PLOT - 5.0,
                round.round,
                mib(round.bytes as f64)
            );
            labelled = x;
        }
        at += round.ms;
    }
}

fn axes(out: &mut String, scale: &Scale, top: f64) {
    let bottom = top + PLOT;
    let right = WIDTH - RIGHT;
    for (share, y) in [(0.0, bottom), (0.5, top + PLOT / 2.0), (1.0, top)] {
        let _ = writeln!(
            out,
            "<line class=\"g\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
        );
        let _ = writeln!(
            out,
            "<text class=\"s\" text-anchor=\"end\" x=\"{}\" y=\"{:.1}\">{:.0} MiB</text>\
             <text class=\"s\" x=\"{}\" y=\"{:.1}\">{:.0} p/s</text>",
            LEFT - 5.0,
            y + 4.0,
            mib(scale.bytes * share),
            right + 5.0,
            y + 4.0,
            scale.rate * share
        );
    }
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 3e4]
        .into_iter()
        .find(|s| scale.ms / s <= 10.0)
        .unwrap_or(6e4);
    let mut ms = 0.0;
    while ms <= scale.ms {
        let _ = writeln!(
            out,
            "<text class=\"s\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{ms:.0} ms</text>",
            scale.x(ms),
            bottom + 14.0
        );
        ms += step;
    }
}

fn row(out: &mut String, index: usize, report: &Report) {
    let scale = Scale::of(report);
    let top = TOP + ROW * index as f64 + 24.0;
    let bottom = top + PLOT;
    let _ = writeln!(
        out,
        "<text class=\"t\" x=\"{LEFT}\" y=\"{:.1}\">Migration {}: {:.0} ms in all, downtime {:.1} ms, blackout {:.1} ms</text>",
        top - 8.0,
        index + 1,
        report.total_ms,
        report.downtime_ms,
        report.blackout_ms
    );
    axes(out, &scale, top);
    let y = |bytes: f64| bottom - bytes / scale.bytes * PLOT;
    let mut area = format!("{:.1},{bottom:.1}", scale.x(0.0));
    let mut sent = String::new();
    let mut rate = String::new();
    for s in &report.samples {
        let x = scale.x(s.ms);
        let _ = write!(area, " {x:.1},{:.1}", y(s.remaining as f64));
        let _ = write!(sent, " {x:.1},{:.1}", y(s.transferred as f64));
        let _ =
            write!(rate, " {x:.1},{:.1}", bottom - s.dirty_pages_rate as f64 / scale.rate * PLOT);
    }
    let end = report.samples.last().map_or(0.0, |s| s.ms);
    let _ =
        writeln!(out, "<polygon class=\"b\" points=\"{area} {:.1},{bottom:.1}\"/>", scale.x(end));
    let _ = writeln!(
        out,
        "<polyline class=\"r\" style=\"stroke:#31a354\" points=\"{}\"/>",
        sent.trim()
    );
    let _ = writeln!(out, "<polyline class=\"r\" points=\"{}\"/>", rate.trim());
    let (from, to) = (report.stopped_at_ms, report.stopped_at_ms + report.stop_to_resume_ms);
    let _ = writeln!(
        out,
        "<rect class=\"p\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{PLOT}\"/>",
        scale.x(from),
        (scale.x(to) - scale.x(from)).max(1.5)
    );
    rounds(out, report, &scale, top);
}

/// Draws the picture.
pub fn timeline(title: &str, migrations: &[Report]) -> String {
    let height = TOP + ROW * migrations.len() as f64 + 10.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\">\n\
         <style>{STYLE}</style>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text class=\"t\" style=\"font-size:16px\" x=\"{LEFT}\" y=\"24\">{}</text>\n",
        escape(title)
    );
    let keys = [
        ("#9ecae1", "left to send"),
        ("#31a354", "sent"),
        ("#e6550d", "pages dirtied a second (right axis)"),
        ("#d62728", "pause: source stopped to destination running"),
    ];
    let mut x = LEFT;
    for (colour, text) in keys {
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"48\">{text}</text>",
            x + 17.0
        );
        x += 40.0 + text.len() as f64 * 6.4;
    }
    for (i, report) in migrations.iter().enumerate() {
        row(&mut out, i, report);
    }
    out.push_str("</svg>\n");
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
