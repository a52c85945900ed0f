//! The runtime's side of the conversation with init (see [`crate::channel`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::Spec;

use crate::channel::{Channel, Message};
use crate::error::{Context, Error, Result};
use crate::hook::{self, HookState};

/// What the runtime needs to answer init.
#[derive(Default)]
pub(super) struct Talk<'a> {
    pub pid: i32,
    pub pidfd: Option<BorrowedFd<'a>>,
    pub launch: Option<(&'a Spec, &'a str, &'a Path)>,
    pub listener: Option<(&'a Path, &'a str)>,
}

/// Where init is when [`follow`] returns.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reached {
    Gate,
    Program,
}

/// Follows init until it waits at its gate or executes the program.
pub(super) fn follow(
    channel: &Channel,
    talk: &Talk<'_>,
    terminal: &mut Option<OwnedFd>,
) -> Result<Reached> {
    let mut executing = false;
    loop {
        let Some(Message { tag, body, mut fds }) = channel.receive()? else {
            if executing {
                return Ok(Reached::Program);
            }
            return Err(Error::Init {
                message:
                    "the container's first process ended during its set-up (killed? out of memory?)"
                        .into(),
                kind: base::Kind::Internal,
                errno: 0,
                status: 1,
            });
        };
        match tag {
            b'T' => *terminal = fds.pop(),
            b'H' => {
                if let Some((spec, id, bundle)) = talk.launch {
                    let state = HookState::new(spec, id, bundle, "creating", Some(talk.pid));
                    if let Some(hooks) = spec.hooks() {
                        #[allow(deprecated)]
                        hook::run_all("prestart", hooks.prestart().as_deref(), &state)?;
                        hook::run_all("createRuntime", hooks.create_runtime().as_deref(), &state)?;
                    }
                }
                channel.send(b'h', &talk.pid.to_le_bytes(), &[])?;
            }
            b'R' => return Ok(Reached::Gate),
            b'X' => executing = true,
            b'N' => {
                hand_over_listener(talk, &body)?;
                channel.send(b'n', &[], &[])?;
            }
            b'E' => return Err(crate::channel::decode_error(&body)),
            other => {
                return Err(Error::invalid(format!(
                    "init sent an unknown message {:?}",
                    other as char
                )));
            }
        }
    }
}

/// Fetches the seccomp listener out of init and passes it to the agent at `listenerPath`, with the state the
/// specification defines ("The Container Process State").
fn hand_over_listener(talk: &Talk<'_>, body: &[u8]) -> Result<()> {
    let (Some(pidfd), Some((path, metadata)), Ok(number)) =
        (talk.pidfd, talk.listener, <[u8; 4]>::try_from(body))
    else {
        return Err(Error::invalid(
            "init announced a seccomp listener that nobody asked for",
        ));
    };
    let fd = rustix::process::pidfd_getfd(
        pidfd,
        i32::from_le_bytes(number),
        rustix::process::PidfdGetfdFlags::empty(),
    )
    .during(|| "fetch the seccomp listener".into())?;
    let state = talk
        .launch
        .map(|(spec, id, bundle)| HookState::new(spec, id, bundle, "creating", Some(talk.pid)));
    let text = serde_json::json!({
        "ociVersion": crate::OCI_VERSION,
        "fds": ["seccompFd"],
        "pid": talk.pid,
        "metadata": metadata,
        "state": state,
    });
    use std::mem::MaybeUninit;
    let socket = std::os::unix::net::UnixStream::connect(path)
        .during(|| format!("connect to the seccomp agent at {}", path.display()))?;
    let bytes = text.to_string();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(
        &socket,
        &[std::io::IoSlice::new(bytes.as_bytes())],
        &mut ancillary,
        rustix::net::SendFlags::NOSIGNAL,
    )
    .during(|| format!("hand the seccomp listener to {}", path.display()))
    .map(drop)
}

/// Starts a container that waits at a listener (see [`Gate::Listener`]).
pub(crate) fn start_at(
    socket: OwnedFd,
    state: &crate::state::Record,
    spec: &Spec,
    pidfd: BorrowedFd<'_>,
) -> Result<()> {
    let channel = Channel::from_owned(socket);
    channel.send(b's', &[], &[])?;
    let seccomp = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref());
    let listener = seccomp.and_then(|profile| {
        Some((
            profile.listener_path().as_deref()?,
            profile.listener_metadata().as_deref().unwrap_or_default(),
        ))
    });
    let talk = Talk {
        pid: state.pid,
        pidfd: Some(pidfd),
        launch: Some((spec, &state.id, &state.bundle)),
        listener,
    };
    follow(&channel, &talk, &mut None).map(drop)
}
