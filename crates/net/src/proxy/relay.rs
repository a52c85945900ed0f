//! Bytes between two connections, moved by the kernel from one to the other (splice(2)) without coming here.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::Shutdown;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What a pipe is asked to hold, bytes.
const MOST: usize = 256 * 1024;

/// Carries both directions until both have ended; the end of one is passed on at once.
///
/// # Errors
/// Where one side breaks off: both are to be dropped.
pub(super) async fn both_ways(one: &TcpStream, other: &TcpStream) -> io::Result<()> {
    tokio::try_join!(one_way(one, other), one_way(other, one)).map(drop)
}

async fn one_way(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    // As long as nothing comes it costs nothing.
    from.readable().await?;
    let (output, input) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let _ = rustix::pipe::fcntl_setpipe_size(&input, MOST);
    loop {
        // The pipe is empty, so it is the connection that has nothing yet.
        let taken = from
            .async_io(Interest::READABLE, || move_some(from, &input, MOST))
            .await?;
        if taken == 0 {
            rustix::net::shutdown(to, Shutdown::Write)?;
            return Ok(());
        }
        let mut left = taken;
        while left > 0 {
            left -= to
                .async_io(Interest::WRITABLE, || give_some(&output, to, left))
                .await?;
        }
    }
}

fn move_some(from: &TcpStream, to: &OwnedFd, most: usize) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    splice(from, None, to, None, most, flags).map_err(Into::into)
}

fn give_some(from: &OwnedFd, to: &TcpStream, most: usize) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    splice(from, None, to, None, most, flags).map_err(Into::into)
}
