//! Admin commands (NVMe Base 1.4, section 5). Errors of the controller itself are told by event requests (5.2).

use super::Shared;
use super::command::admin::*;
use super::command::{Answer, BROADCAST, Command, Status};
use super::identify;
use super::prp::{self, PAGE};
use super::state::{CompletionQueue, QUEUE_LIMIT, State, SubmissionQueue};

const FEATURE_WRITE_CACHE: u8 = 0x06;
const FEATURE_QUEUES: u8 = 0x07;
/// Asynchronous event configuration.
pub(super) const FEATURE_EVENTS: u8 = 0x0b;
/// Features that are only remembered: arbitration, power, temperature, error recovery, coalescing, vectors,
/// atomicity, events.
const FEATURES_KEPT: [u8; 8] = [0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0a, 0x0b];

/// Runs one; `None` for an event request, which is answered when there is an event.
pub(super) fn run(shared: &Shared, command: &Command) -> Option<Answer> {
    let answer = match command.opcode {
        DELETE_SUBMISSION => delete_submission(&mut shared.lock().state, command),
        CREATE_SUBMISSION => create_submission(&mut shared.lock().state, command),
        DELETE_COMPLETION => delete_completion(&mut shared.lock().state, command),
        CREATE_COMPLETION => create_completion(&mut shared.lock().state, command, shared.vectors()),
        GET_LOG => get_log(shared, command),
        IDENTIFY => identify(shared, command),
        // Nothing is aborted: bit 0 of the result says so.
        ABORT => Answer::result(1),
        SET_FEATURES => set_feature(shared, command),
        GET_FEATURES => get_feature(shared, command),
        FORMAT => format(shared, command),
        EVENT_REQUEST => {
            let vector = {
                let state = &mut shared.lock().state;
                if state.event_requests.len() > usize::from(identify::EVENT_REQUESTS) {
                    return Some(Status::TOO_MANY_EVENT_REQUESTS.into());
                }
                state.event_requests.push(command.id);
                state.tell_of_changes(&shared.dma)
            };
            // It has no answer of its own.
            shared.notify(vector);
            return None;
        }
        _ => Status::INVALID_OPCODE.into(),
    };
    Some(answer)
}

/// Queue number and size of a create command, where both are possible.
fn new_queue(command: &Command, count: usize) -> Result<(u16, u32), Status> {
    let number = command.words[0] as u16;
    let size = (command.words[0] >> 16) + 1;
    if number == 0 || usize::from(number) >= count {
        return Err(Status::INVALID_QUEUE_ID);
    }
    if !(2..=QUEUE_LIMIT).contains(&size) {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    // Physically contiguous is all we offer (CAP.CQR).
    if command.words[1] & 1 == 0 {
        return Err(Status::INVALID_FIELD);
    }
    if !command.prp1.is_multiple_of(PAGE) {
        return Err(Status::INVALID_PRP);
    }
    Ok((number, size))
}

fn create_completion(state: &mut State, command: &Command, vectors: u16) -> Answer {
    let (number, size) = match new_queue(command, state.completions.len()) {
        Ok(queue) => queue,
        Err(status) => return status.into(),
    };
    if state.configuration >> 20 & 0xf != 4 {
        return Status::INVALID_FIELD.into();
    }
    let vector = (command.words[1] >> 16) as u16;
    if vector >= vectors {
        return Status::INVALID_VECTOR.into();
    }
    let slot = &mut state.completions[usize::from(number)];
    if slot.is_some() {
        return Status::INVALID_QUEUE_ID.into();
    }
    *slot = Some(CompletionQueue::new(
        command.prp1,
        size,
        vector,
        command.words[1] & 2 != 0,
    ));
    Answer::SUCCESS
}

fn create_submission(state: &mut State, command: &Command) -> Answer {
    let (number, size) = match new_queue(command, state.submissions.len()) {
        Ok(queue) => queue,
        Err(status) => return status.into(),
    };
    if state.configuration >> 16 & 0xf != 6 {
        return Status::INVALID_FIELD.into();
    }
    let completion = (command.words[1] >> 16) as u16;
    if completion == 0 || state.completion(completion).is_none() {
        return Status::INVALID_COMPLETION_QUEUE.into();
    }
    let slot = &mut state.submissions[usize::from(number)];
    if slot.is_some() {
        return Status::INVALID_QUEUE_ID.into();
    }
    *slot = Some(SubmissionQueue::new(command.prp1, size, completion));
    Answer::SUCCESS
}

fn delete_submission(state: &mut State, command: &Command) -> Answer {
    let number = command.words[0] as u16;
    match state.submissions.get_mut(usize::from(number)) {
        Some(slot) if number != 0 && slot.is_some() => {
            *slot = None;
            Answer::SUCCESS
        }
        _ => Status::INVALID_QUEUE_ID.into(),
    }
}

fn delete_completion(state: &mut State, command: &Command) -> Answer {
    let number = command.words[0] as u16;
    if number == 0 || state.completion(number).is_none() {
        return Status::INVALID_QUEUE_ID.into();
    }
    if state
        .submissions
        .iter()
        .flatten()
        .any(|queue| queue.completion == number)
    {
        return Status::INVALID_DELETION.into();
    }
    state.completions[usize::from(number)] = None;
    Answer::SUCCESS
}

fn give(shared: &Shared, command: &Command, data: &[u8]) -> Answer {
    let given = prp::pieces(&shared.dma, command, data.len() as u64)
        .and_then(|pieces| prp::scatter(&shared.dma, &pieces, data));
    given.err().unwrap_or(Status::SUCCESS).into()
}

fn identify(shared: &Shared, command: &Command) -> Answer {
    let count = shared.disks.len() as u32;
    let number = command.namespace;
    let disk = number
        .checked_sub(1)
        .and_then(|index| shared.disks.get(index as usize));
    let data = match (command.words[0] & 0xff, disk) {
        (0, Some(disk)) => identify::namespace(&**disk, shared.identity, number),
        // What all namespaces share: nothing of a size.
        (0, None) if number == BROADCAST => vec![0; identify::LEN],
        (1, _) => identify::controller(shared.identity, count),
        (2, _) if number >= BROADCAST - 1 => return Status::INVALID_NAMESPACE.into(),
        (2, _) => identify::active(count, number),
        (3, Some(_)) => identify::descriptors(shared.identity, number),
        (0 | 3, None) if number == 0 || number > count => return Status::INVALID_NAMESPACE.into(),
        _ => return Status::INVALID_FIELD.into(),
    };
    give(shared, command, &data)
}

fn get_log(shared: &Shared, command: &Command) -> Answer {
    let dwords =
        u64::from(command.words[0] >> 16) + (u64::from(command.words[1] & 0xffff) << 16) + 1;
    let len = dwords * 4;
    let offset = u64::from(command.words[2]) | u64::from(command.words[3]) << 32;
    if len > super::MAX_TRANSFER {
        return Status::INVALID_FIELD.into();
    }
    let number = command.words[0] & 0xff;
    let Some(page) = shared.lock().state.log.page(number) else {
        return Status::INVALID_LOG.into();
    };
    // Bit 15 keeps the event (5.14, figure 203).
    if number == super::log::CHANGED_NAMESPACES && command.words[0] & 1 << 15 == 0 {
        shared.lock().state.log.clear_changes();
    }
    if offset > page.len() as u64 || offset % 4 != 0 {
        return Status::INVALID_FIELD.into();
    }
    let mut data = page[offset as usize..].to_vec();
    data.resize(len as usize, 0);
    give(shared, command, &data)
}

/// Format NVM (5.23): everything reads as zeros afterwards, whether or not the guest asks for an erase. There is one
/// format of blocks, and no key to throw away.
fn format(shared: &Shared, command: &Command) -> Answer {
    let word = command.words[0];
    let (format, erase) = (word & 0x1ff, word >> 9 & 7);
    if format != 0 || erase > 1 {
        return Status::INVALID_FORMAT.into();
    }
    let chosen = match command.namespace {
        BROADCAST => &shared.disks[..],
        number => match (number as usize)
            .checked_sub(1)
            .and_then(|index| shared.disks.get(index..=index))
        {
            Some(one) => one,
            None => return Status::INVALID_NAMESPACE.into(),
        },
    };
    if chosen.iter().any(|disk| disk.read_only()) {
        return Status::WRITE_PROTECTED.into();
    }
    for disk in chosen {
        let result = disk.write_zeroes(0, disk.len()).and_then(|()| disk.flush());
        if let Err(error) = result {
            return shared.failed(&error, Status::WRITE_FAULT).into();
        }
    }
    Answer::SUCCESS
}

fn set_feature(shared: &Shared, command: &Command) -> Answer {
    let feature = command.words[0] as u8;
    // Saving across resets is not offered.
    if command.words[0] >> 31 != 0 {
        return Status::NOT_SAVEABLE.into();
    }
    match feature {
        FEATURE_QUEUES
            if command.words[1] & 0xffff != 0xffff && command.words[1] >> 16 != 0xffff =>
        {
            Answer::result(shared.queue_counts())
        }
        FEATURE_WRITE_CACHE => {
            // It stays on: the host's page cache is in front of the disk.
            Answer::SUCCESS
        }
        feature if FEATURES_KEPT.contains(&feature) => {
            shared
                .lock()
                .state
                .features
                .insert(feature, command.words[1]);
            Answer::SUCCESS
        }
        _ => Status::INVALID_FIELD.into(),
    }
}

fn get_feature(shared: &Shared, command: &Command) -> Answer {
    let select = command.words[0] >> 8 & 7;
    match command.words[0] as u8 {
        FEATURE_QUEUES => Answer::result(shared.queue_counts()),
        FEATURE_WRITE_CACHE => Answer::result(1),
        feature if FEATURES_KEPT.contains(&feature) => match select {
            // It can be changed; it is neither saved nor of a namespace.
            3 => Answer::result(0b100),
            0 => Answer::result(
                shared
                    .lock()
                    .state
                    .features
                    .get(&feature)
                    .copied()
                    .unwrap_or(0),
            ),
            _ => Answer::result(0),
        },
        _ => Status::INVALID_FIELD.into(),
    }
}
