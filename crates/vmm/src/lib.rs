//! Puts a machine together and runs it.
pub mod layout; pub mod acpi; pub mod boot;
