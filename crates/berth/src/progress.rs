//! Progress of long work: bars on a terminal, plain lines elsewhere, always on standard error.

use std::collections::HashMap;
use std::io::{self, IsTerminal};

use hyper::Response;
use hyper::body::Incoming;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::client::each_json;
use crate::failure::Failure;

/// Shows the docker-style progress messages of one operation.
pub struct Progress {
    quiet: bool,
    bars: Option<MultiProgress>,
    by_id: HashMap<String, ProgressBar>,
    last: HashMap<String, String>,
}

impl Progress {
    pub fn new(quiet: bool) -> Progress {
        let bars = (!quiet && io::stderr().is_terminal()).then(MultiProgress::new);
        Progress {
            quiet,
            bars,
            by_id: HashMap::new(),
            last: HashMap::new(),
        }
    }

    /// Follows a stream of progress messages to its end. `aux` messages are collected.
    ///
    /// # Errors
    /// The `error` message of the stream, if it has one.
    pub async fn follow(mut self, response: Response<Incoming>) -> Result<Vec<Value>, Failure> {
        let mut aux = Vec::new();
        let result = each_json(response, |message| {
            if let Some(error) = message["errorDetail"]["message"]
                .as_str()
                .or(message["error"].as_str())
            {
                let status = message["errorDetail"]["status"].as_u64();
                let status = status.and_then(|status| u16::try_from(status).ok());
                let mut failure =
                    Failure::new(crate::client::kind_of(None, status.unwrap_or(500)), error);
                failure.fix = message["fix"].as_str().map(str::to_owned);
                if let Some(code) = message["errorDetail"]["code"]
                    .as_u64()
                    .filter(|c| *c > 0 && *c < 126)
                {
                    failure.code = code as u8;
                }
                return Err(failure);
            }
            if !message["aux"].is_null() {
                aux.push(message["aux"].clone());
            }
            self.show(&message);
            Ok(())
        })
        .await;
        for bar in self.by_id.values() {
            bar.finish();
        }
        result.map(|()| aux)
    }

    fn show(&mut self, message: &Value) {
        if self.quiet {
            return;
        }
        if let Some(text) = message["stream"].as_str() {
            eprint!("{text}");
            return;
        }
        let Some(status) = message["status"].as_str() else {
            return;
        };
        let id = message["id"].as_str().unwrap_or_default();
        let current = message["progressDetail"]["current"].as_u64().unwrap_or(0);
        let total = message["progressDetail"]["total"].as_u64().unwrap_or(0);
        match &self.bars {
            Some(bars) if !id.is_empty() => {
                let style = if total > 0 {
                    "{prefix:.bold}: {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}"
                } else {
                    "{prefix:.bold}: {msg}"
                };
                let style = ProgressStyle::with_template(style)
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> ");
                // A bar is styled before it joins the others: each change draws it.
                let bar = self.by_id.entry(id.to_owned()).or_insert_with(|| {
                    let bar = ProgressBar::hidden()
                        .with_style(style.clone())
                        .with_prefix(id.to_owned())
                        .with_message(status.to_owned());
                    bars.add(bar)
                });
                bar.set_style(style);
                bar.set_length(total);
                bar.set_position(current);
                bar.set_message(status.to_owned());
            }
            Some(bars) => {
                let _ = bars.println(status);
            }
            None => {
                // Without a terminal a bar's every step would be a line: a change of status is enough.
                if self.last.get(id).map(String::as_str) != Some(status) {
                    self.last.insert(id.to_owned(), status.to_owned());
                    if id.is_empty() {
                        eprintln!("{status}")
                    } else {
                        eprintln!("{id}: {status}")
                    }
                }
            }
        }
    }
}
