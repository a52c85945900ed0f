//! What of a device is kept when a machine is saved: one versioned struct each, read back by name and version.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// One device's saved state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// Which device, unique in its machine: `serial0`, `nvme@00:03.0`.
    pub device: String,
    /// Of the struct in `state`.
    pub version: u32,
    pub state: serde_json::Value,
}

/// A saved state does not fit.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("the saved state is of {found}, not of {wanted}")]
    Device { found: String, wanted: String },
    #[error(
        "the state of {device} was saved in version {found}; this program reads version {wanted}"
    )]
    Version {
        device: String,
        found: u32,
        wanted: u32,
    },
    #[error("the saved state of {device} is damaged: {reason}")]
    Damaged { device: String, reason: String },
    #[error("{device} cannot be saved now: {reason}")]
    Busy { device: String, reason: String },
}

/// A device whose state can be taken and given back while no CPU runs and no I/O is in flight.
pub trait Persist: Send + Sync {
    /// The name its state is filed under.
    fn identity(&self) -> String;
    /// Begins no more I/O and returns when none is in flight. For devices with threads of their own.
    fn quiesce(&self) {}
    /// Ends [`Persist::quiesce`].
    fn wake(&self) {}
    /// Ends the device's threads, with everything written out. It is not used again.
    fn close(&self) {}
    fn save(&self) -> Result<Saved, StateError>;
    /// Gives a freshly made device, of the same configuration, a saved state.
    fn restore(&self, saved: &Saved) -> Result<(), StateError>;
}

impl Saved {
    /// Files `state` under `device`.
    pub fn of<T: Serialize>(device: String, version: u32, state: &T) -> Result<Saved, StateError> {
        let state = serde_json::to_value(state).map_err(|error| StateError::Damaged {
            device: device.clone(),
            reason: error.to_string(),
        })?;
        Ok(Saved {
            device,
            version,
            state,
        })
    }

    /// The struct that was filed.
    ///
    /// # Errors
    /// Where it is of another device or version, or does not parse.
    pub fn get<T: DeserializeOwned>(&self, device: &str, version: u32) -> Result<T, StateError> {
        if self.device != device {
            return Err(StateError::Device {
                found: self.device.clone(),
                wanted: device.to_owned(),
            });
        }
        if self.version != version {
            return Err(StateError::Version {
                device: device.to_owned(),
                found: self.version,
                wanted: version,
            });
        }
        T::deserialize(&self.state).map_err(|error| self.damaged(error.to_string()))
    }

    /// The error for content that parses and still cannot be.
    pub fn damaged(&self, reason: impl Into<String>) -> StateError {
        StateError::Damaged {
            device: self.device.clone(),
            reason: reason.into(),
        }
    }
}
