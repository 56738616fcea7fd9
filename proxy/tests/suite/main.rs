//! The whole of Weir, from outside: the real binary is started, told over its
//! API what to run, and called as its callers call it.
//!
//! [`support`] starts servers and speaks to them, [`instance`] is an instance
//! that keeps its own books, [`collector`] takes traces; every other module holds promises.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_calls;
mod bad_disks;
mod bad_input;
mod bad_instances;
mod bad_names;
mod bad_starts;
mod calls;
mod cli;
mod collector;
mod crashes;
mod edges;
mod instance;
mod leaving;
mod limits;
mod logs;
mod metrics;
mod passing;
mod restart;
mod scaling;
mod states;
mod stopping;
mod storm;
mod support;
mod tls;
mod tls_instances;
mod traces;
mod waiting;
