//! What happened, in the order it did: Docker's event stream.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::error::{Error, Result};
use crate::filters::Filters;

/// How many past events `since` can reach back to.
const HISTORY: usize = 256;
/// How far a slow listener may fall behind before it misses events.
const BACKLOG: usize = 1024;

/// One event, as `docker events --format json` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The action again, for clients of before API 1.22; containers and images only.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub status: String,
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub id: String,
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub from: String,
    #[serde(rename = "Type")]
    pub kind: String,
    #[serde(rename = "Action")]
    pub action: String,
    #[serde(rename = "Actor")]
    pub actor: Actor,
    pub scope: String,
    /// Seconds since 1970.
    pub time: i64,
    /// Nanoseconds since 1970.
    #[serde(rename = "timeNano")]
    pub time_nano: i64,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Actor {
    #[serde(rename = "ID")]
    pub id: String,
    #[serde(rename = "Attributes")]
    pub attributes: BTreeMap<String, String>,
}

/// The daemon's events: the last few, and those to come.
pub struct Events {
    sender: broadcast::Sender<Event>,
    // Held while sending too, so that a new listener sees each event exactly once.
    history: Mutex<VecDeque<Event>>,
}

impl Default for Events {
    fn default() -> Events {
        Events {
            sender: broadcast::channel(BACKLOG).0,
            history: Mutex::default(),
        }
    }
}

impl Events {
    /// Tells all listeners. `kind` is `container`, `image`, `network`, `volume` or `daemon`.
    pub fn publish(
        &self,
        kind: &str,
        action: &str,
        id: &str,
        attributes: BTreeMap<String, String>,
    ) {
        let now = Timestamp::now();
        let old_style = matches!(kind, "container" | "image");
        let event = Event {
            status: if old_style {
                action.to_owned()
            } else {
                String::new()
            },
            id: if old_style {
                id.to_owned()
            } else {
                String::new()
            },
            from: if kind == "container" {
                attributes.get("image").cloned().unwrap_or_default()
            } else {
                String::new()
            },
            kind: kind.to_owned(),
            action: action.to_owned(),
            actor: Actor {
                id: id.to_owned(),
                attributes,
            },
            scope: "local".into(),
            time: now.as_second(),
            time_nano: i64::try_from(now.as_nanosecond()).unwrap_or(i64::MAX),
        };
        let mut history = self.history.lock().unwrap_or_else(|e| e.into_inner());
        if history.len() == HISTORY {
            history.pop_front();
        }
        history.push_back(event.clone());
        let _ = self.sender.send(event);
    }

    /// Events from `since` (past ones only where it is given) up to `until`; without `until`, for ever.
    ///
    /// # Errors
    /// [`Error::Invalid`] where `since` is after `until`.
    pub fn subscribe(
        &self,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
        filters: Filters,
    ) -> Result<BoxStream<'static, Event>> {
        if let (Some(since), Some(until)) = (since, until)
            && since > until
        {
            return Err(Error::Invalid(
                "`since` time cannot be after `until` time".into(),
            ));
        }
        let (past, receiver) = {
            let history = self.history.lock().unwrap_or_else(|e| e.into_inner());
            let receiver = self.sender.subscribe();
            let past: Vec<Event> = match since {
                Some(since) => {
                    let from = i64::try_from(since.as_nanosecond()).unwrap_or(0);
                    history
                        .iter()
                        .filter(|event| event.time_nano >= from)
                        .cloned()
                        .collect()
                }
                None => Vec::new(),
            };
            (past, receiver)
        };
        let limit = until.map(|until| i64::try_from(until.as_nanosecond()).unwrap_or(i64::MAX));
        let fits = move |event: &Event| {
            limit.is_none_or(|limit| event.time_nano <= limit) && matches(event, &filters)
        };
        let over = async move {
            match until {
                Some(until) => {
                    let left = until.duration_since(Timestamp::now());
                    let left = std::time::Duration::try_from(left).unwrap_or_default();
                    tokio::time::sleep(left).await;
                }
                None => std::future::pending().await,
            }
        };
        let live = futures_util::stream::unfold(
            (receiver, Box::pin(over)),
            |(mut receiver, mut over)| async move {
                loop {
                    // What has happened is told before the end.
                    let next = tokio::select! {
                        biased;
                        next = receiver.recv() => next,
                        () = &mut over => return None,
                    };
                    match next {
                        Ok(event) => return Some((event, (receiver, over))),
                        Err(broadcast::error::RecvError::Lagged(_)) => {}
                        Err(broadcast::error::RecvError::Closed) => return None,
                    }
                }
            },
        );
        let all = futures_util::stream::iter(past).chain(live);
        Ok(all
            .filter(move |event| std::future::ready(fits(event)))
            .boxed())
    }
}

fn matches(event: &Event, filters: &Filters) -> bool {
    let attributes = &event.actor.attributes;
    let object = |kind: &str| {
        filters.any(kind, |wanted| {
            event.kind == kind
                && (event.actor.id == wanted
                    || (wanted.len() >= 12 && event.actor.id.starts_with(wanted))
                    || attributes.get("name").is_some_and(|name| name == wanted))
        })
    };
    filters.exact("type", &event.kind)
        && filters.exact("scope", &event.scope)
        && filters.any("event", |wanted| {
            // `exec_create: sh` and `health_status: healthy` are found by their first word too.
            event.action == wanted || event.action.split(':').next() == Some(wanted)
        })
        && object("container")
        && object("volume")
        && object("network")
        && object("daemon")
        && filters.any("image", |wanted| {
            let image = if event.kind == "image" {
                Some(&event.actor.id)
            } else {
                attributes.get("image")
            };
            image.is_some_and(|image| {
                image == wanted
                    || image
                        .split_once(':')
                        .is_some_and(|(name, _)| name == wanted)
            }) || (event.kind == "image"
                && attributes.get("name").is_some_and(|name| name == wanted))
        })
        && filters.labels("label", attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(name: &str) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("name".into(), name.into()),
            ("image".into(), "busybox:latest".into()),
        ])
    }

    #[tokio::test]
    async fn past_events_come_before_new_ones_and_only_once() {
        let events = Events::default();
        events.publish("container", "create", "c1", attributes("one"));
        let mut filters = Filters::default();
        filters.add("container", "one");
        let until = Timestamp::now() + std::time::Duration::from_millis(100);
        let stream = events
            .subscribe(Some(Timestamp::UNIX_EPOCH), Some(until), filters)
            .unwrap();
        events.publish("container", "start", "c1", attributes("one"));
        events.publish("container", "start", "c2", attributes("two"));
        let actions: Vec<String> = stream.map(|event| event.action).collect().await;
        assert_eq!(actions, ["create", "start"]);
    }

    #[test]
    fn actions_with_a_detail_are_found_by_their_first_word() {
        let events = Events::default();
        events.publish(
            "container",
            "exec_create: sh -c true",
            "c1",
            attributes("one"),
        );
        let event = events.history.lock().unwrap()[0].clone();
        let mut filters = Filters::default();
        filters.add("event", "exec_create");
        filters.add("image", "busybox");
        assert!(matches(&event, &filters));
        assert!(
            serde_json::to_string(&event)
                .unwrap()
                .contains("\"timeNano\"")
        );
    }
}
