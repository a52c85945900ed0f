//! Processes started in a running container: `docker exec`.

use crate::wire::{Words, wire};

wire! {
    /// The body of `POST /containers/X/exec`.
    pub struct ExecConfig {
        pub user: String,
        pub privileged: bool,
        pub tty: bool,
        pub console_size: Option<[u16; 2]>,
        pub attach_stdin: bool,
        pub attach_stdout: bool,
        pub attach_stderr: bool,
        pub detach: bool,
        pub detach_keys: String,
        pub env: Vec<String>,
        pub working_dir: String,
        pub cmd: Words,
    }

    /// The body of `POST /exec/X/start`.
    pub struct ExecStart {
        pub detach: bool,
        pub tty: bool,
        pub console_size: Option<[u16; 2]>,
    }

    /// The answer of `GET /exec/X/json`.
    pub struct ExecInspect {
        #[serde(rename = "ID")]
        pub id: String,
        pub running: bool,
        pub exit_code: Option<i32>,
        pub process_config: ExecProcess,
        pub open_stdin: bool,
        pub open_stderr: bool,
        pub open_stdout: bool,
        pub can_remove: bool,
        #[serde(rename = "ContainerID")]
        pub container_id: String,
        pub detach_keys: String,
        pub pid: i32,
    }

    /// What an exec runs.
    pub struct ExecProcess {
        pub tty: bool,
        pub entrypoint: String,
        pub arguments: Vec<String>,
        pub privileged: bool,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub user: String,
    }
}
