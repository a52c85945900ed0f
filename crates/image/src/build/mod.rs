//! Builds from a Dockerfile.

use crate::config::RunConfig;
use crate::{Error, Result};

/// Applies Dockerfile instructions to a configuration, as `commit --change` and `import --change` do.
///
/// # Errors
/// [`Error::Dockerfile`] for what is no instruction, or not one that only changes the configuration.
pub fn apply_changes(_run: &mut RunConfig, changes: &[String]) -> Result<()> {
    match changes.first() {
        None => Ok(()),
        Some(change) => Err(Error::Unsupported(format!(
            "changes such as {change:?} are not applied yet"
        ))),
    }
}
