//! What a run leaves behind: parts in `target/report`, of which `cargo bench --bench report` makes one page.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// The folder of the report. Cargo's own for temporary files lies beside it.
pub fn folder() -> PathBuf {
    let tmp = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let folder = tmp.parent().expect("the target folder").join("report");
    fs::create_dir_all(&folder).expect("the folder of the report");
    folder
}

/// The command that runs `bench` with the arguments of this process, but for cargo's own.
pub fn command(bench: &str) -> String {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let args = if args.is_empty() { String::new() } else { format!(" -- {}", args.join(" ")) };
    format!("`cargo bench --bench {bench}{args}`")
}

/// What criterion is to measure, for the report: it remembers figures under names, but not in which order they are to be
/// read, nor which of the names are still in use.
#[derive(Default)]
pub struct Agenda(String);

/// Each with the names in it.
pub type Groups = Vec<(String, Vec<String>)>;

impl Agenda {
    pub fn add(&mut self, group: &str, name: &str) {
        let _ = writeln!(self.0, "{group}\t{name}");
    }

    /// Writes it to the folder of the report, below the command. A run of some of it leaves the last one as it is.
    pub fn finish(self, bench: &str) {
        if std::env::args().skip(1).all(|a| a == "--bench" || a == "--quick") {
            fs::write(folder().join(format!("{bench}.agenda")), command(bench) + "\n" + &self.0).expect("an agenda");
        }
    }

    /// The command, and the groups with their names.
    pub fn read(bench: &str) -> Option<(String, Groups)> {
        let text = fs::read_to_string(folder().join(format!("{bench}.agenda"))).ok()?;
        let (command, lines) = text.split_once('\n')?;
        let mut groups = Groups::new();
        for (group, name) in lines.lines().filter_map(|line| line.split_once('\t')) {
            match groups.last_mut().filter(|last| last.0 == group) {
                Some(last) => last.1.push(name.into()),
                None => groups.push((group.into(), vec![name.into()])),
            }
        }
        Some((command.into(), groups))
    }
}

/// A part of the report, written when it is [`finish`](Part::finish)ed, and printed as it grows.
pub struct Part {
    name: &'static str,
    title: String,
    /// By what, and when.
    made: String,
    text: String,
    plots: Vec<String>,
}

impl Part {
    /// `name`: of its file.
    pub fn new(name: &'static str, title: &str) -> Part {
        println!("## {title}\n");
        let made = format!("{}, {}", command(name), utc(SystemTime::now()));
        Part { name, title: title.into(), made, text: String::new(), plots: Vec::new() }
    }

    /// Says otherwise than by this process, now.
    pub fn made(&mut self, made: String) {
        self.made = made;
    }

    /// Adds a line or a paragraph.
    pub fn say(&mut self, text: &str) {
        println!("{text}");
        let _ = writeln!(self.text, "{text}");
    }

    /// Adds a table, aligned so that it can be read where it is printed. Columns of figures have room for any, so that
    /// another run changes no more than the figures.
    pub fn table(&mut self, head: &[&str], rows: &[Vec<String>]) {
        let mut lines: Vec<Vec<String>> = vec![head.iter().map(|s| s.to_string()).collect()];
        lines.extend(rows.iter().cloned());
        const FIGURE: usize = 9;
        let least = |i: usize| if i == 0 { 0 } else { FIGURE };
        let width = |i: usize| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0).max(least(i));
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let mut text = String::new();
        for (n, line) in lines.iter().enumerate() {
            for (i, (cell, width)) in line.iter().zip(&widths).enumerate() {
                // Names to the left, numbers to the right.
                let _ = if i == 0 { write!(text, "| {cell:<width$} ") } else { write!(text, "| {cell:>width$} ") };
            }
            text += "|\n";
            if n == 0 {
                for (i, width) in widths.iter().enumerate() {
                    text +=
                        &if i == 0 { format!("|{:-<1$}", "", width + 2) } else { format!("|{:-<1$}:", "", width + 1) };
                }
                text += "|\n";
            }
        }
        self.say(&text);
    }

    /// Adds a picture.
    pub fn plot(&mut self, name: &str, alt: &str, svg: &str) {
        let file = format!("{}-{name}.svg", self.name);
        let by = format!("<desc>cargo bench --bench {}</desc>\n</svg>", self.name);
        fs::write(folder().join(&file), svg.replace("</svg>", &by)).expect("a plot");
        let _ = writeln!(self.text, "![{alt}]({file})\n");
        self.plots.push(file);
    }

    /// The part as a page of its own: `head` takes the place of the part's command.
    pub fn page(&self, head: &str) -> String {
        format!("# {}\n\n{head}\n{}", self.title, self.text)
    }

    /// Writes it to the folder of the report.
    pub fn finish(self) {
        let path = folder().join(format!("{}.part.md", self.name));
        let text = format!("## {}\n\n{}\n\n{}", self.title, self.made, self.text);
        fs::write(&path, text).expect("a part of the report");
        for file in &self.plots {
            println!("plot: {}", folder().join(file).display());
        }
        println!("written: {}", path.display());
    }
}

/// A date and a time, if the system's `date` can tell.
pub fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let output = Command::new("date").args(["-u", "-d", &format!("@{seconds}"), "+%F %H:%M UTC"]).output();
    output.map_or_else(|_| format!("@{seconds}"), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
}
