//! A device that uses whatever it finds in its rings.

use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, mask,
};
use virtio::{Chain, InflightQueue, Queue, RingPos, RingSetup};

use crate::backend::Backend;
use crate::protocol;

/// Copies what a chain has to read into what it has to write. It breaks off at the first mistake
/// of the driver, and checks that its connection keeps the order of calls.
#[derive(Default)]
pub struct Echo {
    queues: [Option<(Queue, bool)>; 4],
    failed: [bool; 4],
}

impl Echo {
    /// The features that it has.
    pub fn features_in_use(&self) -> u64 {
        mask(VIRTIO_F_EVENT_IDX)
            | mask(VIRTIO_F_INDIRECT_DESC)
            | mask(VIRTIO_F_VERSION_1)
            | mask(VIRTIO_F_RING_PACKED)
    }

    /// Serves a bounded number of chains.
    pub fn step(&mut self) {
        for (slot, failed) in self.queues.iter_mut().zip(&mut self.failed) {
            let Some((queue, enabled)) = slot else { continue };
            let mut chain = Chain::new();
            for _ in 0..64 {
                if !*enabled || *failed {
                    break;
                }
                match queue.pop(&mut chain) {
                    Ok(true) => {
                        let mut bytes = [0; 256];
                        let n = chain.read_at(0, &mut bytes);
                        let written = chain.write_at(0, &bytes[..n]);
                        queue.push(&chain, written as u32);
                    }
                    Ok(false) => break,
                    Err(_) => *failed = true,
                }
            }
            queue.flush();
        }
    }

    /// Whether it has no ring.
    pub fn is_idle(&self) -> bool {
        self.queues.iter().all(Option::is_none)
    }
}

impl Backend for Echo {
    fn features(&self) -> u64 {
        self.features_in_use()
    }

    fn protocol_features(&self) -> u64 {
        protocol::POSSIBLE
    }

    fn max_queues(&self) -> usize {
        self.queues.len()
    }

    fn activate(&mut self, _features: u64) -> Result<(), String> {
        assert!(self.is_idle(), "features changed under a ring");
        Ok(())
    }

    fn start_queue(
        &mut self,
        index: usize,
        ring: RingSetup,
        inflight: Option<InflightQueue>,
    ) -> Result<(), String> {
        assert!(self.queues[index].is_none(), "a ring was started twice");
        let mut queue = Queue::new(ring).map_err(|e| e.to_string())?;
        if let Some(inflight) = inflight {
            queue.ring.track(inflight);
        }
        self.queues[index] = Some((queue, false));
        self.failed[index] = false;
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<RingPos> {
        self.queues[index].take().map(|(queue, _)| queue.stop())
    }

    fn set_enabled(&mut self, index: usize, enabled: bool) {
        self.queues[index].as_mut().expect("only started rings").1 = enabled;
    }

    fn get_config(&self, offset: u32, data: &mut [u8]) -> Option<()> {
        data.fill(offset as u8);
        Some(())
    }

    fn reset(&mut self) {
        assert!(self.is_idle(), "reset with rings");
    }
}
