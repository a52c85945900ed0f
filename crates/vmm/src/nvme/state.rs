//! The controller's registers and queues: everything that is saved, and how completions reach the guest.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::command::{CQE_LEN, Command, Completion, SQE_LEN, Status};
use super::log::Log;
use crate::memory::Dma;

/// Entries of the largest queue.
pub const QUEUE_LIMIT: u32 = 1024;

pub const CC_ENABLE: u32 = 1;
pub const CC_SHUTDOWN: u32 = 3 << 14;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubmissionQueue {
    pub base: u64,
    pub size: u32,
    pub head: u32,
    pub tail: u32,
    pub completion: u16,
    /// It stands in the list of queues to serve.
    pub listed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletionQueue {
    pub base: u64,
    pub size: u32,
    pub head: u32,
    pub tail: u32,
    pub phase: bool,
    pub vector: u16,
    pub interrupts: bool,
    /// Completions that found the queue full.
    pub waiting: VecDeque<Completion>,
}

/// What a guest does wrong outside of commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestError {
    NoSuchDoorbell = 0,
    DoorbellValue = 1,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct State {
    pub configuration: u32,
    pub ready: bool,
    /// The guest gave us queues outside its memory: only a reset helps (CSTS.CFS).
    pub fatal: bool,
    /// CSTS.SHST.
    pub shutdown: u8,
    pub admin_sizes: u32,
    pub admin_submission: u64,
    pub admin_completion: u64,
    pub submissions: Vec<Option<SubmissionQueue>>,
    pub completions: Vec<Option<CompletionQueue>>,
    /// Asynchronous event requests that wait for an event.
    pub event_requests: Vec<u16>,
    pub features: BTreeMap<u8, u32>,
    pub log: Log,
    /// Submission queues with commands to fetch.
    pub list: VecDeque<u16>,
}

impl State {
    pub fn new(io_queues: u16) -> State {
        let count = usize::from(io_queues) + 1;
        State {
            submissions: vec![None; count],
            completions: vec![None; count],
            ..State::default()
        }
    }

    /// What a disabled controller keeps: the admin queue registers alone.
    pub fn clear_queues(&mut self) {
        self.ready = false;
        self.fatal = false;
        self.shutdown = 0;
        self.submissions.fill(None);
        self.completions.fill(None);
        self.event_requests.clear();
        self.features.clear();
        self.list.clear();
    }

    /// CC.EN became one: makes the admin queues, or fails for good.
    pub fn enable(&mut self) {
        let submission_size = (self.admin_sizes & 0xfff) + 1;
        let completion_size = (self.admin_sizes >> 16 & 0xfff) + 1;
        // Page size 4 KiB, NVM command set, round robin.
        let supported = self.configuration & (0xf << 7 | 7 << 4 | 7 << 11) == 0;
        if !supported
            || submission_size < 2
            || completion_size < 2
            || self.admin_submission & 0xfff != 0
            || self.admin_completion & 0xfff != 0
        {
            self.fatal = true;
            return;
        }
        self.submissions[0] = Some(SubmissionQueue::new(
            self.admin_submission,
            submission_size,
            0,
        ));
        self.completions[0] = Some(CompletionQueue::new(
            self.admin_completion,
            completion_size,
            0,
            true,
        ));
        self.ready = true;
    }

    pub fn submission(&mut self, queue: u16) -> Option<&mut SubmissionQueue> {
        self.submissions.get_mut(usize::from(queue))?.as_mut()
    }

    pub fn completion(&mut self, queue: u16) -> Option<&mut CompletionQueue> {
        self.completions.get_mut(usize::from(queue))?.as_mut()
    }

    /// Lists a queue for service where it has commands and room for their completions; true where it was added.
    pub fn serve(&mut self, queue: u16) -> bool {
        let Some(submission) = self.submission(queue) else {
            return false;
        };
        if submission.listed || submission.head == submission.tail {
            return false;
        }
        let completion = submission.completion;
        if self
            .completion(completion)
            .is_none_or(|completion| !completion.waiting.is_empty())
        {
            return false;
        }
        if let Some(submission) = self.submission(queue) {
            submission.listed = true;
        }
        self.list.push_back(queue);
        true
    }

    /// Takes the next command of a listed queue: queue, command and the new head.
    pub fn fetch(&mut self, dma: &Dma) -> Option<(u16, Command)> {
        while let Some(queue) = self.list.pop_front() {
            let Some(submission) = self.submission(queue) else {
                continue;
            };
            submission.listed = false;
            if submission.head == submission.tail {
                continue;
            }
            let mut bytes = [0; SQE_LEN as usize];
            let at = submission
                .base
                .wrapping_add(u64::from(submission.head) * SQE_LEN);
            if dma.read(at, &mut bytes).is_err() {
                self.fatal = true;
                self.list.clear();
                return None;
            }
            submission.head = (submission.head + 1) % submission.size;
            return Some((queue, Command::parse(&bytes)));
        }
        None
    }

    /// Puts a completion into its queue; the vector to notify. A queue that is gone takes none.
    pub fn complete(&mut self, dma: &Dma, mut completion: Completion) -> Option<u16> {
        let submission = self.submission(completion.queue)?;
        completion.head = submission.head as u16;
        let target = submission.completion;
        let queue = self.completion(target)?;
        queue.waiting.push_back(completion);
        self.deliver(dma, target)
    }

    /// Tells the guest of an error of its own that belongs to no command (5.2.1, figure 49), where it asked to be told;
    /// the vector to notify.
    pub fn report(&mut self, dma: &Dma, error: GuestError) -> Option<u16> {
        const ERROR_LOG: u32 = 1;
        let command = self.event_requests.pop()?;
        self.complete(
            dma,
            Completion {
                result: (error as u32) << 8 | ERROR_LOG << 16,
                queue: 0,
                head: 0,
                command,
                status: Status::SUCCESS,
            },
        )
    }

    /// Tells the guest that namespaces changed (figure 147: notice, namespace attribute changed), where it wants to know and
    /// has asked to be told; the vector to notify.
    pub fn tell_of_changes(&mut self, dma: &Dma) -> Option<u16> {
        const NOTICE: u32 = 2;
        const NAMESPACE_CHANGED: u32 = 0;
        let wants = self.features.get(&super::admin::FEATURE_EVENTS);
        let wants = wants.is_some_and(|wish| wish & super::identify::NAMESPACE_EVENTS != 0);
        if !wants || self.event_requests.is_empty() || !self.log.tell_of_changes() {
            return None;
        }
        let command = self.event_requests.pop()?;
        self.complete(
            dma,
            Completion {
                result: NOTICE | NAMESPACE_CHANGED << 8 | super::log::CHANGED_NAMESPACES << 16,
                queue: 0,
                head: 0,
                command,
                status: Status::SUCCESS,
            },
        )
    }

    /// Moves waiting completions into the queue as far as it has room; the vector to notify.
    pub fn deliver(&mut self, dma: &Dma, queue: u16) -> Option<u16> {
        let completion = self.completion(queue)?;
        let mut any = false;
        while (completion.tail + 1) % completion.size != completion.head {
            let Some(next) = completion.waiting.pop_front() else {
                break;
            };
            let at = completion
                .base
                .wrapping_add(u64::from(completion.tail) * CQE_LEN);
            let bytes = next.bytes(completion.phase);
            // The guest looks at the phase bit: it is written last.
            if dma.write(at, &bytes[..12]).is_err() || dma.store_u32(at + 12, &bytes[12..]).is_err()
            {
                self.fatal = true;
                return None;
            }
            completion.tail += 1;
            if completion.tail == completion.size {
                completion.tail = 0;
                completion.phase = !completion.phase;
            }
            any = true;
        }
        (any && completion.interrupts).then_some(completion.vector)
    }

    /// A saved state is used only where every index in it is within bounds.
    pub fn is_sound(&self, queues: usize) -> bool {
        let size = |size: u32| (2..=4096).contains(&size);
        self.submissions.len() == queues
            && self.completions.len() == queues
            && self.log.is_sound()
            && self.event_requests.len() <= usize::from(super::identify::EVENT_REQUESTS) + 1
            && self
                .submissions
                .iter()
                .flatten()
                .all(|queue| size(queue.size) && queue.head < queue.size && queue.tail < queue.size)
            && self
                .completions
                .iter()
                .flatten()
                .all(|queue| size(queue.size) && queue.head < queue.size && queue.tail < queue.size)
    }
}

impl SubmissionQueue {
    pub fn new(base: u64, size: u32, completion: u16) -> SubmissionQueue {
        SubmissionQueue {
            base,
            size,
            head: 0,
            tail: 0,
            completion,
            listed: false,
        }
    }
}

impl CompletionQueue {
    pub fn new(base: u64, size: u32, vector: u16, interrupts: bool) -> CompletionQueue {
        CompletionQueue {
            base,
            size,
            head: 0,
            tail: 0,
            phase: true,
            vector,
            interrupts,
            waiting: VecDeque::new(),
        }
    }
}
