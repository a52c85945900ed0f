//! The registers of BAR 0: common configuration (4.1.4.3), interrupt status (4.1.4.5), device configuration (4.1.4.6),
//! notifications (4.1.4.4), and the window on them in configuration space (4.1.4.9).
//!
//! ```text
//!    0 device feature select   4 device features   8 driver feature select  12 driver features
//!   16 configuration vector   18 queues           20 status                 21 generation        22 queue select
//!   24 queue size             26 queue vector     28 queue enable           30 notification offset
//!   32 descriptors            40 available ring   48 used ring
//! ```

use super::{
    BAR_LEN, Common, DEVICE_AT, ISR_AT, NO_VECTOR, NOTIFY_AT, NOTIFY_STEP, QueueSlot,
    STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET, Shared,
};
use crate::bus::{get, put};
use crate::virtio::feature;
use crate::virtio::queue::Queue;

impl Shared {
    fn reset(&self) {
        for slot in &self.slots {
            slot.lock().reset();
        }
        self.backend.reset();
        *self.common() = Common {
            config_vector: NO_VECTOR,
            ..Common::default()
        };
        let mut isr = self.isr();
        *isr = 0;
        self.function.set_pin(false);
    }

    fn set_status(&self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let started = {
            let mut common = self.common();
            let mut status = value | common.status & STATUS_NEEDS_RESET;
            let acceptable = common.driver_features & !self.features == 0
                && common.driver_features & feature::VERSION_1 != 0;
            if status & STATUS_FEATURES_OK != 0 && !acceptable {
                status &= !STATUS_FEATURES_OK;
            }
            // A driver that has agreed on nothing does not start (3.1.1).
            if status & STATUS_FEATURES_OK == 0 {
                status &= !STATUS_DRIVER_OK;
            }
            let started = status & STATUS_DRIVER_OK != 0 && common.status & STATUS_DRIVER_OK == 0;
            common.status = status;
            started.then_some(common.driver_features)
        };
        if let Some(features) = started {
            self.backend.start(features);
            // Buffers may have been offered before.
            self.slots.iter().for_each(QueueSlot::notify);
            if self.backend.tells_config_at_start() {
                self.config_changed();
            }
        }
    }

    fn selected(&self) -> Option<&QueueSlot> {
        let index = self.common().queue_select;
        self.slots.get(usize::from(index))
    }

    fn read_common(&self, offset: u64) -> u64 {
        let queue =
            |field: fn(&Queue) -> u64| self.selected().map_or(0, |slot| field(&slot.lock()));
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        match offset {
            0 => u64::from(self.common().device_feature_select),
            4 => half(self.features, self.common().device_feature_select),
            8 => u64::from(self.common().driver_feature_select),
            12 => {
                let common = self.common();
                half(common.driver_features, common.driver_feature_select)
            }
            16 => u64::from(self.common().config_vector),
            18 => self.slots.len() as u64,
            20 => u64::from(self.common().status),
            21 => u64::from(self.common().generation),
            22 => u64::from(self.common().queue_select),
            24 => queue(|queue| u64::from(queue.size)),
            26 => self
                .selected()
                .map_or(u64::from(NO_VECTOR), |slot| u64::from(slot.lock().vector)),
            28 => queue(|queue| u64::from(queue.enabled)),
            30 => u64::from(self.common().queue_select),
            32 => queue(|queue| queue.descriptors),
            36 => queue(|queue| queue.descriptors >> 32),
            40 => queue(|queue| queue.available),
            44 => queue(|queue| queue.available >> 32),
            48 => queue(|queue| queue.used),
            52 => queue(|queue| queue.used >> 32),
            _ => 0,
        }
    }

    fn valid_vector(&self, vector: u16) -> u16 {
        if self
            .function
            .msix()
            .is_some_and(|msix| vector < msix.vectors())
        {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn write_common(&self, offset: u64, len: usize, value: u64) {
        let low = value as u32;
        match offset {
            0 => self.common().device_feature_select = low,
            8 => self.common().driver_feature_select = low,
            12 => {
                let mut common = self.common();
                if common.status & STATUS_FEATURES_OK == 0 {
                    let features = common.driver_features;
                    match common.driver_feature_select {
                        0 => common.driver_features = features >> 32 << 32 | u64::from(low),
                        1 => common.driver_features = features & 0xffff_ffff | u64::from(low) << 32,
                        _ => {}
                    }
                }
            }
            16 => self.common().config_vector = self.valid_vector(value as u16),
            20 => self.set_status(value as u8),
            22 => self.common().queue_select = value as u16,
            24.. => self.write_queue(offset, len, value),
            _ => {}
        }
    }

    fn write_queue(&self, offset: u64, len: usize, value: u64) {
        let features = self.common().driver_features;
        let Some(slot) = self.selected() else { return };
        let mut queue = slot.lock();
        if offset == 26 {
            queue.vector = self.valid_vector(value as u16);
            return;
        }
        // An enabled queue stays as it is until the reset (4.1.4.3.2).
        if queue.enabled {
            return;
        }
        let half = |old: u64, high: bool| match (high, len) {
            (false, 8) => value,
            (false, _) => old >> 32 << 32 | value & 0xffff_ffff,
            (true, _) => old & 0xffff_ffff | value << 32,
        };
        match offset {
            24 => queue.size = value as u16,
            28 if value & 1 == 1 => {
                queue.event_index = features & feature::EVENT_INDEX != 0;
                queue.indirect = features & feature::INDIRECT != 0;
                if queue.is_sound(&self.dma) {
                    queue.enabled = true;
                } else {
                    drop(queue);
                    self.common().status |= STATUS_NEEDS_RESET;
                    self.complaint
                        .make(&"the guest enabled a queue that is not in its memory");
                }
            }
            32 => queue.descriptors = half(queue.descriptors, false),
            36 => queue.descriptors = half(queue.descriptors, true),
            40 => queue.available = half(queue.available, false),
            44 => queue.available = half(queue.available, true),
            48 => queue.used = half(queue.used, false),
            52 => queue.used = half(queue.used, true),
            _ => {}
        }
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            0..ISR_AT => {
                let value = self.read_common(offset);
                put(data, value);
                if data.len() == 8 && offset >= 32 {
                    put(
                        data,
                        value & 0xffff_ffff | self.read_common(offset + 4) << 32,
                    );
                }
            }
            ISR_AT..DEVICE_AT => {
                data.fill(0);
                if let (ISR_AT, Some(first)) = (offset, data.first_mut()) {
                    let mut isr = self.isr();
                    *first = std::mem::take(&mut *isr);
                    self.function.set_pin(false);
                }
            }
            DEVICE_AT..NOTIFY_AT => self.backend.read_config(offset - DEVICE_AT, data),
            _ => data.fill(0),
        }
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            0..ISR_AT => self.write_common(offset, data.len(), get(data)),
            DEVICE_AT..NOTIFY_AT => self.backend.write_config(offset - DEVICE_AT, data),
            NOTIFY_AT.. => {
                if let Some(slot) = self
                    .slots
                    .get(((offset - NOTIFY_AT) / NOTIFY_STEP) as usize)
                {
                    slot.notify();
                }
            }
            _ => {}
        }
    }

    /// BAR offset and length that the configuration window names, where they are one of ours.
    pub(super) fn window(&self) -> Option<(u64, usize)> {
        let mut bytes = [0; 16];
        self.function
            .config_bytes(self.access_capability, &mut bytes);
        let offset = u64::from(u32::from_le_bytes([
            bytes[8], bytes[9], bytes[10], bytes[11],
        ]));
        let len = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        let fits = bytes[4] == 0 && matches!(len, 1 | 2 | 4) && offset + u64::from(len) <= BAR_LEN;
        fits.then_some((offset, len as usize))
    }
}
