//! Networks without rights: the daemon of an ordinary user has them in a network namespace of its own, whose way out is a
//! process that makes the outside's connections with sockets of the host.
//!
//! ```text
//!  the host's namespace                    │ the networks' namespace          │ a container's
//!                                          │                                  │
//!  daemon ── requests ──▶ berth gateway    │ bridges, rules, names, leases    │
//!                          │  user::UserNet◀─ wire ══ uplink ◀─ masquerade ◀──┼─ connections out
//!  a published port ──────▶│  proxy ───────┼▶ a socket in here ───────────────┼▶ its port
//! ```
//!
//! `uplink` and `wire` are a veth pair; `wire` is alone in a third namespace, where a packet socket (packet(7)) reads and
//! writes its frames. So no `/dev/net/tun` is needed. The process holds the namespace, and outlives the daemon as long as
//! a container or machine has an interface in it. Should it die itself, the daemon starts another for the same namespace.

mod client;
mod protocol;
mod server;
mod world;

pub use client::Gateway;
pub(crate) use client::Published;
pub use server::main;
