//! The keeper's loop: requests of the daemon, and ends of processes.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use base::file::{self, Durability};
use base::pidfd::{PidFd, ProcessKey};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::SocketFlags;
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::keeper::launch::{self, Failure, Spawned, Waiting};
use crate::keeper::log::JsonLog;
use crate::keeper::protocol::{
    self, Exec, Exit, FailureKind, Held, Launch, MAX_MESSAGE, ProtocolError, Reply, Request,
    StdioRecord, VERSION,
};
use crate::keeper::shared_memory;
use crate::keeper::streams::{Client, Output};

/// How many bytes of replies wait for a daemon that does not read before it is given up.
const MAX_REPLIES: usize = 16 << 20;
/// How often stalled clients are looked for, while there are any.
const STALL_CHECK: Duration = Duration::from_secs(5);

/// What an epoll token stands for. Tokens are never used twice, so a stale event finds nothing.
#[derive(Clone)]
pub(super) enum Watched {
    Listener,
    Daemon,
    End(Rc<str>),
    Output(Rc<str>, usize),
    Input(Rc<str>),
    Client(u64),
}

/// A process the keeper is the parent of.
pub(super) struct Process {
    pub container: Option<String>,
    /// Where `exit.json` goes; inits only.
    pub directory: Option<PathBuf>,
    pub cgroup: String,
    pub key: ProcessKey,
    pub pidfd: PidFd,
    end_token: u64,
    /// Until it is started.
    waiting: Option<Waiting>,
    pub stdio: StdioRecord,
    pub terminal: Option<OwnedFd>,
    /// The terminal's other side, until the process ends: one that closes its terminal may open it again.
    pub terminals_end: Option<OwnedFd>,
    /// Stdout (or the terminal) and stderr.
    pub outputs: [Option<Output>; 2],
    pub input: Option<OwnedFd>,
    pub input_token: u64,
    pub input_armed: bool,
    pub input_queue: VecDeque<u8>,
    /// Close stdin once the queue is written.
    pub input_ends: bool,
    pub log: Option<JsonLog>,
    pub exit: Option<Exit>,
    /// The daemon knows of the exit; it is kept only for what still writes to its pipes.
    forgotten: bool,
}

struct Daemon {
    socket: OwnedFd,
    token: u64,
    greeted: bool,
    replies: VecDeque<Vec<u8>>,
    queued: usize,
}

/// The keeper's whole state.
pub(super) struct Keeper {
    epoll: Rc<OwnedFd>,
    listener: OwnedFd,
    daemon: Option<Daemon>,
    pub processes: HashMap<Rc<str>, Process>,
    pub clients: HashMap<u64, Client>,
    /// Clients of a process, which may not have been made yet.
    pub attached: HashMap<Rc<str>, Vec<u64>>,
    watched: HashMap<u64, Watched>,
    next_token: u64,
    pub buffer: Vec<u8>,
}

impl Keeper {
    pub fn new(listener: OwnedFd) -> io::Result<Keeper> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let mut keeper = Keeper {
            epoll: Rc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?),
            listener,
            daemon: None,
            processes: HashMap::new(),
            clients: HashMap::new(),
            attached: HashMap::new(),
            watched: HashMap::new(),
            next_token: 1,
            buffer: vec![0; MAX_MESSAGE],
        };
        let token = keeper.token(Watched::Listener);
        epoll::add(
            &keeper.epoll,
            &keeper.listener,
            EventData::new_u64(token),
            EventFlags::IN,
        )?;
        Ok(keeper)
    }

    /// Serves until there is no daemon and nothing lives.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        let started = Instant::now();
        let mut checked = Instant::now();
        loop {
            let stalling = self.clients.values().any(|client| !client.queue.is_empty());
            // A daemon that died between starting this and connecting leaves no keeper either.
            let timeout = if self.daemon.is_none() || stalling {
                Some(STALL_CHECK)
            } else {
                None
            };
            let timeout = timeout.map(|t| rustix::event::Timespec {
                tv_sec: t.as_secs() as i64,
                tv_nsec: 0,
            });
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                let (flags, token) = (event.flags, event.data.u64());
                if let Some(watched) = self.watched.get(&token).cloned() {
                    self.dispatch(watched, flags);
                }
            }
            if stalling && checked.elapsed() >= STALL_CHECK {
                checked = Instant::now();
                self.drop_stalled();
            }
            let lives = self
                .processes
                .values()
                .any(|process| process.exit.is_none());
            let early = started.elapsed() < STALL_CHECK && self.next_token == 2;
            if self.daemon.is_none() && !lives && !early {
                // One may be in the queue already.
                self.accept();
                if self.daemon.is_none() {
                    return Ok(());
                }
            }
        }
    }

    fn dispatch(&mut self, watched: Watched, flags: EventFlags) {
        match watched {
            Watched::Listener => self.accept(),
            Watched::Daemon => {
                if flags.contains(EventFlags::OUT) {
                    self.flush_replies();
                }
                if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
                    self.hear();
                }
            }
            Watched::End(id) => self.end(&id),
            Watched::Output(id, index) => drop(self.pump(&id, index)),
            Watched::Input(id) => self.feed(&id),
            Watched::Client(key) => self.client_ready(key, flags),
        }
    }

    // -- watching

    pub(super) fn token(&mut self, watched: Watched) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.watched.insert(token, watched);
        token
    }

    /// Forgets a token whose descriptor has been, or is about to be, closed.
    pub(super) fn release(&mut self, token: u64) {
        self.watched.remove(&token);
    }

    /// Changes what is waited for. `armed` says whether the descriptor is in the epoll set, and is kept true to that.
    pub(super) fn watch(
        epoll: &OwnedFd,
        fd: BorrowedFd<'_>,
        token: u64,
        flags: Option<EventFlags>,
        armed: &mut bool,
    ) {
        let data = EventData::new_u64(token);
        let done = match (flags, *armed) {
            (Some(flags), false) => epoll::add(epoll, fd, data, flags),
            (Some(flags), true) => epoll::modify(epoll, fd, data, flags),
            (None, true) => epoll::delete(epoll, fd),
            (None, false) => Ok(()),
        };
        if done.is_ok() {
            *armed = flags.is_some();
        }
    }

    pub(super) fn epoll(&self) -> Rc<OwnedFd> {
        self.epoll.clone()
    }

    /// A token that is its own client's key.
    pub(super) fn client_token(&mut self) -> u64 {
        let token = self.next_token;
        self.token(Watched::Client(token))
    }

    // -- the daemon

    fn accept(&mut self) {
        while let Ok(socket) =
            rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        {
            // A newer daemon takes the place of one that hangs; daemons lock their state folder against each other.
            self.part();
            let token = self.token(Watched::Daemon);
            if epoll::add(
                &self.epoll,
                &socket,
                EventData::new_u64(token),
                EventFlags::IN,
            )
            .is_ok()
            {
                self.daemon = Some(Daemon {
                    socket,
                    token,
                    greeted: false,
                    replies: VecDeque::new(),
                    queued: 0,
                });
            }
        }
    }

    /// The daemon is gone: what it has not started will never be.
    fn part(&mut self) {
        let Some(daemon) = self.daemon.take() else {
            return;
        };
        self.release(daemon.token);
        let waiting: Vec<Rc<str>> = self
            .processes
            .iter()
            .filter(|(_, p)| p.waiting.is_some())
            .map(|(id, _)| id.clone())
            .collect();
        for id in waiting {
            self.discard(&id);
        }
    }

    fn hear(&mut self) {
        // A few at a time: containers' output has its turn between.
        for _ in 0..16 {
            let Some(daemon) = &self.daemon else { return };
            let mut buffer = std::mem::take(&mut self.buffer);
            let heard = protocol::receive(&daemon.socket, &mut buffer)
                .and_then(|(bytes, fds)| Ok((protocol::decode::<Request>(bytes)?, fds)));
            self.buffer = buffer;
            match heard {
                Ok((request, fds)) => self.serve(request, fds),
                Err(ProtocolError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return;
                }
                Err(ProtocolError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // Not an answer: which request it was cannot be known. The daemon reconnects and asks anew.
                Err(error) => {
                    if !matches!(error, ProtocolError::Closed) {
                        eprintln!("berth keeper: the daemon's connection is given up: {error}");
                    }
                    return self.part();
                }
            }
        }
    }

    pub(super) fn reply(&mut self, reply: &Reply) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        let bytes = match protocol::encode(reply) {
            Ok(bytes) => bytes,
            Err(error) => {
                eprintln!("berth keeper: {error}");
                return;
            }
        };
        daemon.queued += bytes.len();
        daemon.replies.push_back(bytes);
        if daemon.queued > MAX_REPLIES {
            return self.part();
        }
        self.flush_replies();
    }

    fn flush_replies(&mut self) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        let mut flags = EventFlags::IN;
        while let Some(bytes) = daemon.replies.front() {
            match protocol::send(&daemon.socket, bytes, &[]) {
                Ok(()) => {
                    daemon.queued -= bytes.len();
                    daemon.replies.pop_front();
                }
                Err(ProtocolError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    flags |= EventFlags::OUT;
                    break;
                }
                // Noticed as a hang-up by the loop, which is where the connection ends.
                Err(_) => return,
            }
        }
        let _ = epoll::modify(
            &self.epoll,
            &daemon.socket,
            EventData::new_u64(daemon.token),
            flags,
        );
    }

    fn answer(&mut self, serial: u64, result: Result<Reply, Failure>) {
        let reply = result.unwrap_or_else(|failure| {
            let mut message = failure.message;
            let mut end = message.len().min(MAX_MESSAGE / 8);
            while !message.is_char_boundary(end) {
                end -= 1;
            }
            message.truncate(end);
            Reply::Failed {
                serial,
                kind: failure.kind,
                message,
            }
        });
        self.reply(&reply);
    }

    fn serve(&mut self, request: Request, mut fds: Vec<OwnedFd>) {
        match request {
            Request::Hello { version: _ } => self.greet(),
            _ if !self.daemon.as_ref().is_some_and(|daemon| daemon.greeted) => self.part(),
            Request::Create {
                serial,
                id,
                directory,
            } => {
                let result = self.create(&id, directory, fds.pop());
                if result.is_err() {
                    self.close_clients(&Rc::from(id));
                }
                self.answer(
                    serial,
                    result.map(|process| Reply::Spawned { serial, process }),
                );
            }
            Request::Start { serial, id } => {
                let result = self.start(&id);
                if result.is_err() {
                    self.close_clients(&Rc::from(id));
                }
                self.answer(serial, result.map(|()| Reply::Done { serial }));
            }
            Request::Discard { serial, id } => {
                self.discard(&Rc::from(id));
                self.answer(serial, Ok(Reply::Done { serial }));
            }
            Request::Exec {
                serial,
                id,
                container,
                record,
            } => {
                let result = self.exec(&id, container, record);
                if result.is_err() {
                    self.close_clients(&Rc::from(id));
                }
                self.answer(
                    serial,
                    result.map(|process| Reply::Spawned { serial, process }),
                );
            }
            Request::Attach {
                serial,
                id,
                stdin,
                stdout,
                stderr,
                detach_keys,
            } => {
                let result = match fds.pop() {
                    Some(socket) => {
                        self.attach(Rc::from(id), socket, stdin, [stdout, stderr], detach_keys)
                    }
                    None => Err(Failure::invalid("an attach without a socket")),
                };
                let at = base::time::now_rfc3339();
                self.answer(serial, result.map(|()| Reply::Attached { serial, at }));
            }
            Request::Signal { serial, id, signal } => {
                let result = match self.processes.get(id.as_str()) {
                    Some(process) if process.exit.is_none() => process
                        .pidfd
                        .signal(signal)
                        .map_err(|error| Failure::system(format!("signal {signal}"), error)),
                    _ => Err(Failure::not_found(format!("no process of {id} lives"))),
                };
                self.answer(serial, result.map(|()| Reply::Done { serial }));
            }
            Request::Resize {
                serial,
                id,
                rows,
                columns,
            } => {
                let result = match self
                    .processes
                    .get(id.as_str())
                    .and_then(|p| p.terminal.as_ref())
                {
                    Some(terminal) => launch::resize(terminal.as_fd(), rows, columns)
                        .map_err(|error| Failure::system("setting the terminal's size", error)),
                    None => Err(Failure::not_found(format!("{id} has no terminal"))),
                };
                self.answer(serial, result.map(|()| Reply::Done { serial }));
            }
            Request::Forget { id } => self.forget(&Rc::from(id)),
            Request::Quit => {
                if self
                    .processes
                    .values()
                    .all(|process| process.exit.is_some())
                {
                    std::process::exit(0);
                }
            }
        }
    }

    fn greet(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.greeted = true;
        }
        self.reply(&Reply::Hello {
            version: VERSION,
            pid: std::process::id() as i32,
        });
        let held: Vec<Reply> = self
            .processes
            .iter()
            .filter(|(_, process)| !process.forgotten)
            .map(|(id, process)| {
                Reply::Process(Held {
                    id: id.to_string(),
                    container: process.container.clone(),
                    process: process.key,
                    exit: process.exit.clone(),
                })
            })
            .collect();
        for reply in &held {
            self.reply(reply);
        }
        self.reply(&Reply::Ready);
    }

    // -- processes

    fn vacant(&self, id: &str) -> Result<(), Failure> {
        match self.processes.get(id) {
            Some(process) if process.exit.is_none() => {
                Err(Failure::conflict(format!("{id} is running already")))
            }
            _ => Ok(()),
        }
    }

    fn create(
        &mut self,
        id: &str,
        directory: PathBuf,
        net_ns: Option<OwnedFd>,
    ) -> Result<ProcessKey, Failure> {
        self.vacant(id)?;
        let path = directory.join("launch.json");
        let launch: Launch = file::read_json(&path)
            .map_err(|error| Failure::system("reading the launch record", error))?
            .ok_or_else(|| Failure::not_found(format!("{} is missing", path.display())))?;
        let log = JsonLog::open(&launch.log)
            .map_err(|error| Failure::system("opening the log", error))?;
        let (spawned, waiting) = launch::create(id, &directory, &launch, net_ns)?;
        let cgroup = launch.cgroup.clone();
        let key = self.keep(
            id,
            spawned,
            Some(waiting),
            launch.stdio,
            log,
            cgroup,
            Some(directory),
            None,
        )?;
        if let Some(donor) = launch.shared_memory_of
            && let Err(error) = shared_memory::share(donor, key.pid)
        {
            self.discard(&Rc::from(id));
            return Err(Failure::system("sharing /dev/shm", error));
        }
        Ok(key)
    }

    fn exec(
        &mut self,
        id: &str,
        container: String,
        record: PathBuf,
    ) -> Result<ProcessKey, Failure> {
        self.vacant(id)?;
        let exec: Exec = file::read_json(&record)
            .map_err(|error| Failure::system("reading the exec record", error))?
            .ok_or_else(|| Failure::not_found(format!("{} is missing", record.display())))?;
        let Some(init) = self
            .processes
            .get(container.as_str())
            .filter(|init| init.exit.is_none())
        else {
            return Err(Failure::conflict(format!(
                "container {container} is not running"
            )));
        };
        let directory = init.directory.clone().unwrap_or_default();
        let spawned = launch::exec(&container, &directory, init.key, &init.cgroup, &exec)?;
        let cgroup = init.cgroup.clone();
        self.keep(
            id,
            spawned,
            None,
            exec.stdio,
            None,
            cgroup,
            None,
            Some(container),
        )
    }

    #[allow(clippy::too_many_arguments)]
    fn keep(
        &mut self,
        id: &str,
        spawned: Spawned,
        waiting: Option<Waiting>,
        stdio: StdioRecord,
        log: Option<JsonLog>,
        cgroup: String,
        directory: Option<PathBuf>,
        container: Option<String>,
    ) -> Result<ProcessKey, Failure> {
        let id: Rc<str> = Rc::from(id);
        self.drop_process(&id);
        let key = ProcessKey::of(spawned.pid).map_err(|error| {
            Failure::system(format!("looking at process {}", spawned.pid), error)
        })?;
        let pidfd = PidFd::from_owned(spawned.pidfd);
        let end_token = self.token(Watched::End(id.clone()));
        epoll::add(
            &self.epoll,
            &pidfd,
            EventData::new_u64(end_token),
            EventFlags::IN,
        )
        .map_err(|error| Failure::system("watching a process", error.into()))?;
        let mut outputs = [None, None];
        for (index, fd) in spawned.outputs.into_iter().enumerate() {
            let Some(fd) = fd else { continue };
            let token = self.token(Watched::Output(id.clone(), index));
            let mut output = Output {
                fd,
                token,
                armed: false,
            };
            Keeper::watch(
                &self.epoll,
                output.fd.as_fd(),
                token,
                Some(EventFlags::IN),
                &mut output.armed,
            );
            outputs[index] = Some(output);
        }
        let input_token = self.token(Watched::Input(id.clone()));
        self.processes.insert(
            id.clone(),
            Process {
                container,
                directory,
                cgroup,
                key,
                pidfd,
                end_token,
                waiting,
                stdio,
                terminals_end: spawned.terminal.as_ref().and_then(launch::other_side),
                terminal: spawned.terminal,
                outputs,
                input: spawned.input,
                input_token,
                input_armed: false,
                input_queue: VecDeque::new(),
                input_ends: false,
                log,
                exit: None,
                forgotten: false,
            },
        );
        for client in self.attached.get(&id).cloned().unwrap_or_default() {
            if let Some(client) = self.clients.get_mut(&client) {
                client.framed = !self.processes[&id].stdio.terminal;
            }
            self.arm_client(client);
        }
        Ok(key)
    }

    fn start(&mut self, id: &str) -> Result<(), Failure> {
        let Some(process) = self.processes.get_mut(id) else {
            return Err(Failure::not_found(format!("{id} has not been created")));
        };
        let Some(waiting) = process.waiting.take() else {
            return Err(Failure::conflict(format!("{id} has been started already")));
        };
        waiting.start().inspect_err(|_| {
            // Its end is no exit of a container that ran: the daemon hears of the failure instead.
            let _ = self.processes[id].pidfd.signal(libc::SIGKILL);
            self.reap_silently(&Rc::from(id));
        })
    }

    fn discard(&mut self, id: &Rc<str>) {
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        if process.waiting.take().is_none() {
            return;
        }
        let _ = process.pidfd.signal(libc::SIGKILL);
        self.reap_silently(id);
        self.close_clients(id);
    }

    /// Waits for a process that has been killed before it ran, and forgets it.
    fn reap_silently(&mut self, id: &Rc<str>) {
        if let Some(process) = self.processes.get(id) {
            let _ = waitid(WaitId::PidFd(process.pidfd.as_fd()), WaitIdOptions::EXITED);
        }
        self.drop_process(id);
    }

    fn end(&mut self, id: &Rc<str>) {
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        if process.exit.is_some() {
            return;
        }
        let status = match waitid(
            WaitId::PidFd(process.pidfd.as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(Some(status)) => status,
            Ok(None) | Err(rustix::io::Errno::INTR) => return,
            // Not our child after all: that it ended is all that can be known.
            Err(_) => {
                eprintln!(
                    "berth keeper: the status of process {} is lost",
                    process.key.pid
                );
                self.ended(id, 255);
                return;
            }
        };
        let code = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => 255,
        };
        self.ended(id, code);
    }

    fn ended(&mut self, id: &Rc<str>, code: i32) {
        if let Some(process) = self.processes.get_mut(id) {
            process.terminals_end = None;
        }
        self.drain(id);
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        if let Some(log) = &mut process.log {
            log.finish();
        }
        let exit = Exit {
            code,
            oom: process.container.is_none() && launch::oom_killed(&process.cgroup),
            finished: base::time::now_rfc3339(),
            pid: process.key.pid,
        };
        process.exit = Some(exit.clone());
        process.waiting = None;
        if let Some(input) = process.input.take() {
            let _ = epoll::delete(&self.epoll, &input);
        }
        process.input_queue = VecDeque::new();
        let _ = epoll::delete(&self.epoll, &process.pidfd);
        let (end, input) = (process.end_token, process.input_token);
        if let Some(directory) = &process.directory {
            let path = directory.join("exit.json");
            if let Err(error) = file::write_json(&path, &exit, Durability::Process) {
                eprintln!("berth keeper: writing {}: {error}", path.display());
            }
        }
        self.release(end);
        self.release(input);
        self.close_clients(id);
        self.reply(&Reply::Exited {
            id: id.to_string(),
            exit,
        });
    }

    fn forget(&mut self, id: &Rc<str>) {
        match self.processes.get_mut(id) {
            Some(process) if process.exit.is_none() => {}
            // A grandchild may still hold the pipes: it would be killed by SIGPIPE if they were closed.
            Some(process) if process.outputs.iter().any(Option::is_some) => {
                process.forgotten = true
            }
            Some(_) => self.drop_process(id),
            None => self.close_clients(id),
        }
    }

    /// After an output has ended: nothing holds a forgotten process any more.
    pub(super) fn settle(&mut self, id: &Rc<str>) {
        if self
            .processes
            .get(id)
            .is_some_and(|p| p.forgotten && p.outputs.iter().all(Option::is_none))
        {
            self.drop_process(id);
        }
    }

    fn drop_process(&mut self, id: &Rc<str>) {
        if let Some(process) = self.processes.remove(id) {
            self.release(process.end_token);
            self.release(process.input_token);
            for output in process.outputs.into_iter().flatten() {
                self.release(output.token);
            }
        }
    }
}

impl Failure {
    pub fn invalid(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::Invalid,
            message: message.into(),
        }
    }
    pub fn not_found(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::NotFound,
            message: message.into(),
        }
    }
    pub fn conflict(message: impl Into<String>) -> Failure {
        Failure {
            kind: FailureKind::Conflict,
            message: message.into(),
        }
    }
    pub fn system(what: impl Into<String>, error: io::Error) -> Failure {
        let kind = match base::error::kind_of_io(&error) {
            base::Kind::NotFound | base::Kind::Invalid => FailureKind::Internal,
            kind => kind.into(),
        };
        Failure {
            kind,
            message: format!("{}: {error}", what.into()),
        }
    }
}
