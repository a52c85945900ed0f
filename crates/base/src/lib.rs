//! The ground every room stands on: ids, classified errors, units, crash-safe files, paths, process handles.

pub mod companion;
pub mod error;
pub mod file;
pub mod host;
pub mod id;
pub mod overlay;
pub mod paths;
pub mod pidfd;
pub mod privileges;
pub mod time;
pub mod units;
pub mod userns;

pub use error::{Classified, Kind};
pub use id::Id;
