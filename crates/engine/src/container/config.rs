//! What runs in a container: Docker's `Config`.

use std::collections::BTreeMap;

use crate::wire::{KeySet, Words, wire};

wire! {
    /// The part of a container's definition that does not depend on the host.
    pub struct ContainerConfig {
        pub hostname: String,
        pub domainname: String,
        pub user: String,
        pub attach_stdin: bool,
        pub attach_stdout: bool,
        pub attach_stderr: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub exposed_ports: Option<KeySet>,
        pub tty: bool,
        pub open_stdin: bool,
        pub stdin_once: bool,
        /// `NAME=value`; a bare `NAME` in a create request removes the image's variable.
        pub env: Vec<String>,
        pub cmd: Option<Words>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub healthcheck: Option<HealthConfig>,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub args_escaped: bool,
        pub image: String,
        pub volumes: Option<KeySet>,
        pub working_dir: String,
        pub entrypoint: Option<Words>,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub network_disabled: bool,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub mac_address: String,
        pub on_build: Option<Vec<String>>,
        pub labels: BTreeMap<String, String>,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub stop_signal: String,
        /// Seconds; negative waits without end.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub stop_timeout: Option<i64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub shell: Option<Words>,
    }

    /// How to find out whether a container is well. Durations are nanoseconds; 0 is the default.
    pub struct HealthConfig {
        /// `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", script]`; empty inherits the image's.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub test: Vec<String>,
        #[serde(skip_serializing_if = "is_zero")]
        pub interval: i64,
        #[serde(skip_serializing_if = "is_zero")]
        pub timeout: i64,
        #[serde(skip_serializing_if = "is_zero")]
        pub start_period: i64,
        #[serde(skip_serializing_if = "is_zero")]
        pub start_interval: i64,
        #[serde(skip_serializing_if = "is_zero")]
        pub retries: i64,
    }
}

pub(crate) fn is_zero(number: &i64) -> bool {
    *number == 0
}
