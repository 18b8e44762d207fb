//! The virtual switch: a learning layer-2 switch with VLANs over vhost-user, tap and packet-socket
//! ports. docs/switch.md tells its users what it does.
//!
//! The way of a frame: [`vhost_queue`] or [`tap_queue`] take a [`burst`], [`forward`] decides, and
//! [`output`] sends; [`worker`] is the loop around it. The rest is control.
//!
//! - [`shared`]: what poll threads and control share; [`table`]: ports as poll threads see them.
//! - [`fdb`], [`vlan`], [`limit`], [`segment`], [`capture`], [`counters`]: one subject each.
//! - [`frame_ring`]: frames between threads.

pub mod burst;
pub mod capture;
pub mod commands;
pub mod config;
pub mod control;
pub mod copy;
pub mod counters;
mod error;
pub mod fdb;
pub mod forward;
pub mod frame_ring;
pub mod header;
pub mod limit;
pub mod output;
pub mod port;
pub mod queue;
pub mod segment;
pub mod shared;
pub mod switch;
pub mod sys;
pub mod table;
pub mod tap_queue;
mod threads;
pub mod vhost_port;
pub mod vhost_queue;
pub mod vlan;
pub mod worker;

pub use config::{Config, PortSpec};
pub use control::Server;
pub use error::{Error, Result};
pub use switch::Switch;
