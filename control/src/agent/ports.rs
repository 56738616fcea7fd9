//! The ports that instances get: each to one at a time, and not again for a
//! while, so that an old routing table never sends one account's request to
//! another account's instance.

use std::{
    collections::{HashMap, HashSet},
    io::ErrorKind,
    net::{Ipv4Addr, Ipv6Addr, TcpListener},
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

const QUARANTINE: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub(super) struct Ports(Arc<Mutex<State>>);

struct State {
    range: RangeInclusive<u16>,
    /// Where the search goes on, so that a port rests as long as possible.
    next: u16,
    held: HashSet<u16>,
    /// When a port may be given again.
    resting: HashMap<u16, Instant>,
}

impl Ports {
    pub(super) fn new(range: RangeInclusive<u16>) -> Self {
        Self(Arc::new(Mutex::new(State {
            next: *range.start(),
            range,
            held: HashSet::new(),
            resting: HashMap::new(),
        })))
    }

    pub(super) fn range(&self) -> RangeInclusive<u16> {
        self.state().range.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A port that nothing listens on; none when the range is used up.
    pub(super) fn lease(&self, now: Instant) -> Option<PortLease> {
        let mut state = self.state();
        state.resting.retain(|_, until| *until > now);
        let (first, last) = (*state.range.start(), *state.range.end());
        for _ in first..=last {
            let port = state.next;
            state.next = if port >= last { first } else { port + 1 };
            let busy = state.held.contains(&port) || state.resting.contains_key(&port);
            if !busy && is_free(port) {
                state.held.insert(port);
                return Some(PortLease {
                    ports: self.clone(),
                    port,
                    rests: true,
                });
            }
        }
        None
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        && !TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .is_err_and(|e| e.kind() == ErrorKind::AddrInUse)
}

#[must_use]
pub(super) struct PortLease {
    ports: Ports,
    pub(super) port: u16,
    rests: bool,
}

impl PortLease {
    /// Gives it back at once: no instance had it, so nobody was told of it.
    pub(super) fn unused(mut self) {
        self.rests = false;
    }
}

impl Drop for PortLease {
    fn drop(&mut self) {
        let mut state = self.ports.state();
        state.held.remove(&self.port);
        if self.rests {
            state.resting.insert(self.port, Instant::now() + QUARANTINE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_rests_before_it_is_given_again() {
        let ports = Ports::new(19310..=19312);
        let now = Instant::now();
        let a = ports.lease(now).unwrap();
        let port = a.port;
        drop(a);
        let b = ports.lease(now).unwrap();
        let c = ports.lease(now).unwrap();
        assert!(b.port != port && c.port != port && b.port != c.port);
        assert!(ports.lease(now).is_none());
        let later = now + QUARANTINE + Duration::from_secs(1);
        assert_eq!(ports.lease(later).unwrap().port, port);
    }

    #[test]
    fn an_unused_port_need_not_rest() {
        let ports = Ports::new(19313..=19313);
        let now = Instant::now();
        ports.lease(now).unwrap().unused();
        assert!(ports.lease(now).is_some());
    }

    #[test]
    fn a_taken_port_is_skipped() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(Ports::new(port..=port).lease(Instant::now()).is_none());
    }
}
