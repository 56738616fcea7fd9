//! What should exist and what does: the records people ask for (intent), the
//! facts that nodes and proxies publish, and the loops that bring the second
//! towards the first.
//!
//! - [`model`]: the vocabulary, shared with the data plane.
//! - [`store`]: intent, durable.
//! - [`coordination`]: facts, as long as those who tell them live.
//! - [`directory`]: intent and facts joined into one immutable view per function.
//! - [`dial`]: connections to instances, plain or over TLS.
//! - [`state`]: the six function states, computed.
//! - [`scale`]: how many instances a version gets, as a pure function.
//! - [`controller`]: carries those decisions out.
//! - [`agent`]: starts, watches and stops the instances of a node; [`gpu`]: its devices.
//! - [`api`]: the lifecycle API.
//! - [`auth`]: keys, how they are made and recognised.
//! - [`private`]: files that are nobody else's.

pub mod agent;
pub mod api;
pub mod auth;
pub mod controller;
pub mod coordination;
pub mod dial;
pub mod directory;
pub mod gpu;
pub mod model;
pub mod private;
pub mod scale;
pub mod state;
pub mod store;
