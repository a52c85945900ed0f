//! Puts the rules back when another program flushes the host's ruleset.
//!
//! `nft flush ruleset` (which restarting Debian's nftables service does) takes every table, ours too, and with it the
//! isolation of networks. The kernel announces it (NFNLGRP_NFTABLES), so no polling is needed.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::{Manager, lock};
use crate::error::{Context, Result};

/// <linux/netfilter/nfnetlink.h>, <linux/netfilter/nf_tables.h>
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_DELTABLE: u16 = 2;

impl Manager {
    /// Watches our table from now on, on a thread that ends with the manager.
    ///
    /// # Errors
    /// Where the kernel's announcements cannot be listened to.
    pub fn guard_rules(self: &Arc<Manager>) -> Result<()> {
        // The thread is started there too, and so stays there.
        self.inside(|| self.guard_here())
    }

    fn guard_here(self: &Arc<Manager>) -> Result<()> {
        let what = || "listening to changes of nftables".to_owned();
        let mut socket = Socket::new(NETLINK_NETFILTER).context(what)?;
        socket.bind_auto().context(what)?;
        socket.add_membership(NFNLGRP_NFTABLES).context(what)?;
        socket.set_non_blocking(true).context(what)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(what)?;
        let stop = Arc::new(stop);
        *lock(&self.guard) = Some(Arc::clone(&stop));
        let manager = Arc::downgrade(self);
        let watch = move || {
            loop {
                let mut fds = [
                    PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
                    PollFd::new(&socket, PollFlags::IN),
                ];
                if poll(&mut fds, None).is_err_and(|error| error != rustix::io::Errno::INTR) {
                    return;
                }
                if !fds[0].revents().is_empty() {
                    return;
                }
                if tables_were_deleted(&socket) && !put_back(&manager) {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("berth-net-guard".into())
            .stack_size(256 * 1024)
            .spawn(watch)
            .context(|| "starting a thread".into())?;
        Ok(())
    }
}

/// Reads all announcements there are.
fn tables_were_deleted(socket: &Socket) -> bool {
    let mut deleted = false;
    loop {
        match socket.recv_from_full() {
            Ok((datagram, _)) => {
                let mut rest = &datagram[..];
                while rest.len() >= 16 {
                    let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                    let kind = u16::from_ne_bytes([rest[4], rest[5]]);
                    deleted |= kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE;
                    if length < 16 || length > rest.len() {
                        break;
                    }
                    rest = &rest[((length + 3) & !3).min(rest.len())..];
                }
            }
            // Some were lost: look.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => deleted = true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return deleted,
        }
    }
}

/// Installs the table if it shall be there and is not. False where the manager is gone.
fn put_back(manager: &Weak<Manager>) -> bool {
    // Whoever flushes usually loads new rules next.
    thread::sleep(Duration::from_millis(50));
    let Some(manager) = manager.upgrade() else {
        return false;
    };
    let mut setup = lock(&manager.setup);
    if setup.table && !manager.firewall.exists() {
        tracing::warn!("another program removed our firewall rules; they are put back");
        if let Err(error) = manager.install_table(&mut setup) {
            tracing::error!(%error, "our firewall rules could not be put back: networks are not isolated");
        }
    }
    true
}
