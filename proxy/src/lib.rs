//! The data plane of Weir, and the parts of its one binary.
//!
//! A request's way, module by module: [`server`] accepts it, [`target`] says
//! which function it is for, [`invoke`] is its whole life, [`table`] has what
//! is known of the function, [`upstream`] brings it to an instance, [`body`]
//! streams, [`account`] writes down how it ended, to [`metrics`], [`access_log`] and [`trace`], [`activity`] times
//! connections, [`tls`] has their certificates. [`refusal`] is every answer of Weir's own.
//!
//! [`admin`] is the other listener. [`args`] is what the command line says, [`serve`] joins the parts into a
//! running process, [`cli`] is every other command.

pub mod access_log;
pub mod account;
pub mod activity;
pub mod admin;
pub mod args;
pub mod body;
pub mod cli;
pub mod clock;
pub mod core;
pub mod headers;
pub mod invoke;
pub mod limit;
pub mod measured;
pub mod metrics;
pub mod observe;
pub mod refusal;
pub mod serve;
pub mod server;
pub mod socket;
pub mod table;
pub mod target;
pub mod tls;
pub mod trace;
pub mod upstream;
