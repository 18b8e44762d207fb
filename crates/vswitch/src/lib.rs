//! The virtual switch: a learning layer-2 switch with VLANs over vhost-user, tap, packet-socket and
//! AF_XDP ports. docs/switch.md tells its users what it does.
//!
//! The way of a frame: [`vhost_queue`], [`tap_queue`] or [`xdp_queue`] take a [`burst`], [`forward`] decides, and
//! [`output`] sends; [`worker`] is the loop around it. The rest is control.
//!
//! - [`shared`]: what poll threads and control share; [`table`]: ports as poll threads see them.
//! - [`fdb`], [`vlan`], [`limit`], [`segment`], [`capture`], [`counters`], [`unfinished`]: one subject each.
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
pub mod interface_port;
pub mod limit;
pub mod output;
pub mod port;
pub mod queue;
pub mod segment;
pub mod shared;
mod socket_listener;
pub mod switch;
pub mod sys;
pub mod table;
pub mod tap_queue;
mod threads;
pub mod unfinished;
pub mod vhost_port;
pub mod vhost_queue;
pub mod vlan;
pub mod worker;
pub mod xdp_queue;

pub use config::{Config, PortSpec};
pub use control::Server;
pub use error::{Error, Result};
pub use switch::Switch;
