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
pub mod copy;
pub mod counters;
pub mod fdb;
pub mod forward;
pub mod frame_ring;
pub mod header;
pub mod limit;
pub mod output;
pub mod queue;
pub mod segment;
pub mod shared;
pub mod table;
pub mod tap_queue;
pub mod vhost_queue;
pub mod vlan;
pub mod worker;
