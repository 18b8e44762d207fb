//! Puts a machine together and runs it: memory map, ACPI, boot, vCPU threads, life cycle,
//! monitors' commands, and the machine's side of a migration.
//!
//! The way from a description to a guest: [`run`] opens character devices, [`assemble`] builds
//! everything ([`memory`], [`legacy`], [`disks`], [`nics`], [`cpus`]), [`power_on`] writes what
//! [`boot`] and [`acpi`] make into memory, [`machine`] starts [`vcpus`]. While it runs, vCPUs reach
//! devices through [`io`], devices reach the guest through [`interrupts`], monitors come in through
//! [`commands`] and [`migration`], migrations through [`endpoint`], and [`driver`] acts on what the
//! guest asks for.

mod acpi;
mod assemble;
mod boot;
mod boot_file;
mod commands;
mod cpus;
mod disks;
mod driver;
mod elf;
mod endpoint;
mod features;
#[cfg(test)]
mod hammer;
mod interrupts;
mod io;
mod layout;
mod legacy;
mod machine;
mod memory;
mod migration;
mod nics;
mod pci_info;
mod power_on;
mod run;
mod runstate;
mod signals;
pub mod tell;
mod vcpus;

pub use run::{prepare_process, run};
