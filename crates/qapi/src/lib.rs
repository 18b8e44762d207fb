//! QEMU's languages: QMP and HMP servers, events, the command line's option grammar.
//!
//! - [`cmdline`]: QEMU's command line into a [`spec::Machine`].
//! - [`command`]: [`Commands`], what a monitor needs of the machine; implemented by `vmm`.
//! - [`compat`]: the page that says what works.
//! - [`control_socket`]: [`ControlSocket`], QMP for several clients at once.
//! - [`event`]: [`EventBus`], events to every client.
//! - [`hmp`]: commands for people.
//! - [`params`]: migration parameters and capabilities.
//! - [`qmp`]: one client's QMP conversation.
//! - [`schema`]: the table of commands.
//! - [`types`]: results of commands.
//! - [`monitor`]: [`Monitor`], a QMP or HMP server on a chardev.

pub mod cmdline;
pub mod command;
pub mod compat;
pub mod control_socket;
pub mod event;
pub mod hmp;
pub mod monitor;
pub mod params;
pub mod qmp;
pub mod schema;
pub mod types;

pub use command::{ClientFds, Commands, Error, ErrorClass};
pub use control_socket::{ControlServer, ControlSocket};
pub use event::EventBus;
pub use monitor::Monitor;
