//! One version's waiting line and its slots: who may send to which instance,
//! and when.
//!
//! This crate does no input or output and knows no runtime. It does not dial,
//! time out or retry; the proxy does that with the [`Slot`] it holds.
//!
//! # Why it can be trusted
//!
//! **One lock.** All of a version's state is behind one `std` mutex, held for
//! a few map operations and never over an `.await`. Every method that changes
//! something goes through one frame: bring the clocks up to date, make the
//! change, *settle*, unlock, and only then wake the tasks and drop what has
//! gone (connections, targets, wakers), since those run foreign code.
//!
//! **Settling** grants until there is no waiter or no free slot. As every
//! change ends with it, *a waiter never stands beside a slot it could have*;
//! and as nothing can be free while someone waits, a newcomer that finds a
//! free slot overtakes nobody.
//!
//! **Capacity is handed over, not announced.** A grant is put into the
//! waiter's own entry under the lock, and its task is woken after it. Nobody
//! races for the slot, so no wake-up is lost to one that did not need it.
//!
//! **Rights are guards.** A [`Slot`] is the only proof of a busy place and
//! gives it back when dropped; there is no other way to lower the count. A
//! [`Waiting`] owns its entry, and dropping it takes the entry out under the
//! lock: still in line, it leaves; already granted, the slot is released
//! there and then. So a grant never meets a waiter that is gone, and 10,000
//! that leave at once are 10,000 separate releases, each a loop: nothing
//! recurses.
//!
//! **A seat outlives its instance.** When an instance is lost its slots stay
//! valid until they are dropped, and its record stays as long. If it comes
//! back meanwhile the work it still has counts against its capacity.
//!
//! **Connections.** An idle connection is kept only by an instance that can
//! be granted, and only while `idle + busy <= capacity`; each busy slot may
//! own one. So an instance never has more connections than capacity (a
//! lowered capacity binds new grants, and drops idle ones at once).
//!
//! # What it costs
//!
//! Joining, leaving and granting are logarithmic in the waiters. Choosing an
//! instance is one pass over those with a free slot, which under load are
//! few. An idle connection is found by a scan of its instance's idle ones.

mod line;
mod pick;
mod queue;
mod seat;
mod slot;
mod sync;

pub use queue::{Ask, Clock, Limits, Load, Phase, Preference, Queue};
pub use seat::{InstanceKey, SeatInfo};
pub use slot::{Entered, Refused, Slot, Waiting};
