//! What the property tests reach inside for.

use super::engine::Pending;
use crate::state::{Cpu, Fault};
use crate::stubs::{self, LEFT, TRAPPED};
use crate::translate::Stubs;

impl Cpu {
    /// Stubs, and where raw code appended next will lie.
    pub(crate) fn workbench(&mut self) -> (Stubs, u64) {
        if self.engine().cache.room() < 128 << 10 {
            self.flush_code();
        }
        (self.engine().stubs, self.engine().cache.next())
    }

    /// Frame, code and trap stub, for [`Guard::new`].
    pub(crate) fn place_of_code(&mut self) -> (u64, (u64, u64), u64) {
        let frame = std::ptr::from_mut(self) as u64;
        (
            frame,
            self.engine().cache.range(),
            self.engine().stubs.host_fault,
        )
    }

    /// Runs until rip is `end`, or to a fault, which is not delivered.
    pub(crate) fn run_to(&mut self, end: u64, single: bool) -> Option<Fault> {
        let mut alone = single;
        while self.rip != end {
            let number = match self.block(alone) {
                Ok((number, _)) => number,
                Err(fault) => return Some(fault),
            };
            let direct = self.engine().cache.blocks[number as usize].direct;
            let stubs = self.engine().stubs;
            // SAFETY: the test holds a guard for this frame.
            let left = unsafe { stubs::enter(&stubs, direct) };
            alone = single;
            match left {
                LEFT => match self.engine().pending.take() {
                    Some(Pending::Single) => {
                        alone = true;
                        continue;
                    }
                    Some(Pending::Fault(fault)) => return Some(fault),
                    _ => {}
                },
                TRAPPED => {
                    self.bounce.len = 0;
                    return Some(self.host_trap().unwrap_or_else(|e| {
                        eprintln!("{e}");
                        Fault::plain(18)
                    }));
                }
                descriptor => self.left(descriptor).expect("a known reason"),
            }
            if self.bounce.len != 0 {
                self.write_bounce();
            }
        }
        None
    }
}
