//! A device with two queues, each served by a thread that copies what is readable to what is
//! writable. Its configuration is one byte, which can be written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_RING_RESET, mask,
};
use virtio::{Chain, ConfigEvents, DeviceTraits, Queue, RingPos, RingSetup, VirtioDevice};

#[derive(Default)]
pub struct Echo {
    without: u64,
    value: u8,
    events: Option<Arc<dyn ConfigEvents>>,
    workers: [Option<(JoinHandle<RingPos>, Arc<AtomicBool>)>; 2],
}

impl Echo {
    pub fn without(features: u64) -> Self {
        Self { without: features, ..Self::default() }
    }
}

fn serve(queue: &mut Queue, chain: &mut Chain) -> Result<(), virtio::RingError> {
    let mut buf = [0; 64];
    loop {
        while queue.pop(chain)? {
            let n = chain.read_at(0, &mut buf);
            let n = chain.write_at(0, &buf[..n]);
            queue.push(chain, n as u32);
        }
        queue.flush();
        if !queue.ring.enable_kicks() {
            return Ok(());
        }
    }
}

fn run(mut queue: Queue, stop: &AtomicBool, events: Option<Arc<dyn ConfigEvents>>) -> RingPos {
    let mut chain = Chain::new();
    let mut broken = false;
    let mut first = true;
    while !stop.load(Ordering::SeqCst) {
        // Looks only when it was kicked, so that a lost kick shows.
        let kicked = queue.kick.read().is_ok();
        if !broken
            && (kicked || std::mem::take(&mut first))
            && let Err(e) = serve(&mut queue, &mut chain)
        {
            broken = true;
            if let Some(events) = &events {
                events.needs_reset(&e.to_string());
            }
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    queue.stop()
}

impl VirtioDevice for Echo {
    fn traits(&self) -> DeviceTraits {
        let features = mask(VIRTIO_F_EVENT_IDX)
            | mask(VIRTIO_F_INDIRECT_DESC)
            | mask(VIRTIO_F_RING_PACKED)
            | mask(VIRTIO_F_RING_RESET);
        let queue_sizes = vec![16, 8];
        let features = features & !self.without;
        DeviceTraits { device_type: 4, features, queue_sizes, config_len: 1 }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        if offset == 0 && !data.is_empty() {
            data[0] = self.value;
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        if offset == 0 && data.len() == 1 {
            self.value = data[0];
            if let Some(events) = &self.events {
                events.config_changed();
            }
        }
    }

    fn activate(&mut self, _features: u64, events: Arc<dyn ConfigEvents>) -> Result<(), String> {
        self.events = Some(events);
        Ok(())
    }

    fn start_queue(&mut self, index: usize, ring: RingSetup) -> Result<(), String> {
        assert!(self.workers[index].is_none(), "started twice");
        let queue = Queue::new(ring).map_err(|e| e.to_string())?;
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, events) = (Arc::clone(&stop), self.events.clone());
        let thread = std::thread::spawn(move || run(queue, &flag, events));
        self.workers[index] = Some((thread, stop));
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<RingPos> {
        let (thread, stop) = self.workers[index].take()?;
        stop.store(true, Ordering::SeqCst);
        Some(thread.join().expect("the worker does not panic"))
    }

    fn reset(&mut self) {
        assert!(self.workers.iter().all(Option::is_none), "queues are stopped before a reset");
        (self.value, self.events) = (0, None);
    }

    fn state_kind(&self) -> (&'static str, u16) {
        ("echo", 3)
    }

    fn save(&self) -> state::Result<Vec<u8>> {
        Ok(vec![self.value])
    }

    fn restore(&mut self, kind: &str, version: u16, payload: &[u8]) -> state::Result<()> {
        if (kind, version) != ("echo", 3) {
            return Err(state::Error::invalid("kind", "not an echo"));
        }
        let [value] = payload else { return Err(state::Error::invalid("value", "one byte")) };
        self.value = *value;
        Ok(())
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}
