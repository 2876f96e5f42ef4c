//! How far a long command is, on standard error: a bar on a terminal, else lines.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::table::bytes;

/// Lines of progress where there is no terminal: one for so many things.
const LINE_EVERY: u64 = 1_000;

/// Shows how far a command is.
pub(super) struct Meter {
    bar: Option<ProgressBar>,
    /// What is counted, and what is done with it: "objects", "read back".
    words: (&'static str, &'static str),
    lines: u64,
}

// === impl Meter ===

impl Meter {
    pub(super) fn new(things: &'static str, done: &'static str) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style = format!("{{bar:40}} {{pos}}/{{len}} {things}, {{msg}} {{elapsed}}");
            bar.set_style(ProgressStyle::with_template(&style).expect("the template is well formed"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar, words: (things, done), lines: 0 }
    }

    pub(super) fn show(&mut self, done: u64, of: u64, of_bytes: u64) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(of.max(done));
                bar.set_position(done);
                bar.set_message(bytes(of_bytes));
            }
            None if done / LINE_EVERY > self.lines => {
                self.lines = done / LINE_EVERY;
                let (things, what) = self.words;
                eprintln!("{done} {things} {what}, {}", bytes(of_bytes));
            }
            None => {}
        }
    }

    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
