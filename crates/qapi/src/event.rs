//! [`EventBus`]: events from anywhere in the VMM to every monitor client.
//!
//! Invariants: `emit` never blocks on a client (each sink has a bounded queue of its own), and
//! events reach every client in the order in which they were emitted.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde_json::{Value, json};

/// Events that QEMU sends at most once a second, the latest one winning.
const THROTTLED: [&str; 4] =
    ["BALLOON_CHANGE", "MEMORY_DEVICE_SIZE_CHANGE", "RTC_CHANGE", "WATCHDOG"];
const PERIOD: Duration = Duration::from_secs(1);

/// Who is told of events. Called with the bus locked: must not block or emit.
pub trait EventSink: Send + Sync {
    /// A whole QMP event object.
    fn event(&self, event: &Arc<Value>);
}

/// Hands events to every sink. Cheap to clone; clones are the same bus.
#[derive(Clone, Default)]
pub struct EventBus {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    sinks: Vec<Weak<dyn EventSink>>,
    throttled: HashMap<&'static str, Throttle>,
}

struct Throttle {
    last: Instant,
    /// The event to send when the period is over.
    pending: Option<Arc<Value>>,
}

impl EventBus {
    /// A bus without sinks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a sink; it is forgotten when it is dropped.
    pub fn subscribe(&self, sink: Weak<dyn EventSink>) {
        self.inner.lock().sinks.push(sink);
    }

    /// Sends event `name` to all sinks with the time of now. `data` `None` or `Null` leaves the
    /// member out. RTC_CHANGE, BALLOON_CHANGE, MEMORY_DEVICE_SIZE_CHANGE and WATCHDOG go out at
    /// most once a second each, as QEMU's do.
    pub fn emit(&self, name: &str, data: Option<Value>) {
        let event = Arc::new(event_object(name, data));
        let mut inner = self.inner.lock();
        let Some(key) = THROTTLED.into_iter().find(|t| *t == name) else {
            return inner.send(&event);
        };
        let now = Instant::now();
        match inner.throttled.get_mut(key) {
            Some(throttle) if now.duration_since(throttle.last) < PERIOD => {
                let waiting = throttle.pending.replace(event).is_some();
                let due = throttle.last + PERIOD;
                drop(inner);
                if !waiting {
                    self.flush_at(key, due);
                }
            }
            _ => {
                inner.throttled.insert(key, Throttle { last: now, pending: None });
                inner.send(&event);
            }
        }
    }

    /// Sends the pending event of `key` at `due`, from a thread that lives for that long.
    fn flush_at(&self, key: &'static str, due: Instant) {
        let weak = Arc::downgrade(&self.inner);
        let flush = move || {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let Some(inner) = weak.upgrade() else { return };
            let mut inner = inner.lock();
            if let Some(throttle) = inner.throttled.get_mut(key) {
                throttle.last = Instant::now();
                if let Some(event) = throttle.pending.take() {
                    inner.send(&event);
                }
            }
        };
        if std::thread::Builder::new().name("event-flush".into()).spawn(flush).is_err() {
            // No thread, no delay: better early than never.
            let mut inner = self.inner.lock();
            if let Some(event) = inner.throttled.get_mut(key).and_then(|t| t.pending.take()) {
                inner.send(&event);
            }
        }
    }
}

impl Inner {
    fn send(&mut self, event: &Arc<Value>) {
        self.sinks.retain(|sink| match sink.upgrade() {
            Some(sink) => {
                sink.event(event);
                true
            }
            None => false,
        });
    }
}

fn event_object(name: &str, data: Option<Value>) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut event = json!({
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        "event": name,
    });
    if let Some(data) = data.filter(|d| !d.is_null()) {
        event["data"] = data;
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<Arc<Value>>>);
    impl EventSink for Log {
        fn event(&self, event: &Arc<Value>) {
            self.0.lock().push(event.clone());
        }
    }

    #[test]
    fn an_event_has_a_timestamp_and_data_only_when_given() {
        let bus = EventBus::new();
        let log = Arc::new(Log::default());
        bus.subscribe(Arc::downgrade(&log) as Weak<dyn EventSink>);
        bus.emit("STOP", None);
        bus.emit("RESET", Some(json!({"guest": true})));
        let events = log.0.lock();
        assert_eq!(events[0]["event"], "STOP");
        assert!(events[0].get("data").is_none());
        assert!(events[0]["timestamp"]["seconds"].as_u64().unwrap() > 1_000_000_000);
        assert_eq!(events[1]["data"]["guest"], true);
    }

    #[test]
    fn a_throttled_event_keeps_the_latest() {
        let bus = EventBus::new();
        let log = Arc::new(Log::default());
        bus.subscribe(Arc::downgrade(&log) as Weak<dyn EventSink>);
        for offset in 0..5 {
            bus.emit("RTC_CHANGE", Some(json!({"offset": offset})));
        }
        assert_eq!(log.0.lock().len(), 1);
        std::thread::sleep(PERIOD + Duration::from_millis(500));
        let events = log.0.lock();
        assert_eq!(events.len(), 2);
        assert_eq!(events[1]["data"]["offset"], 4);
    }
}
