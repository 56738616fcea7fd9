//! The node's devices: which there are, and which instance has them. Devices
//! are found through the driver, loaded at run time, and no context is taken.
#![allow(
    unsafe_code,
    reason = "the driver's presence can only be asked through an unsafe call"
)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result, sys};
use tokio::sync::Notify;

/// One device of the node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gpu {
    /// The driver's ordinal, or the place in the declared list.
    pub index: u32,
    /// `H100` as declared, or the driver's name (`NVIDIA H100 80GB HBM3`).
    pub model: String,
    /// `GPU-<uuid>` of a device that was found; a declared one has none.
    pub uuid: Option<String>,
}

impl Gpu {
    /// Whether this is the model that a deployment names: each of its words is
    /// a word of the device's name, so that `L40` is not an `L40S`.
    #[must_use]
    pub fn is(&self, wanted: &str) -> bool {
        let words = |text: &str| -> Vec<String> {
            text.split(|c: char| !c.is_ascii_alphanumeric())
                .filter(|w| !w.is_empty())
                .map(str::to_ascii_lowercase)
                .collect()
        };
        let (mine, wanted) = (words(&self.model), words(wanted));
        !wanted.is_empty() && wanted.iter().all(|w| mine.contains(w))
    }

    /// The device as `CUDA_VISIBLE_DEVICES` names it. The UUID also holds where
    /// the agent's own view of the devices is renumbered.
    #[must_use]
    pub fn visible(&self) -> String {
        self.uuid.clone().unwrap_or_else(|| self.index.to_string())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    #[error("'{0}' is not a list of devices such as H100:8 or H100:4,L40S:2")]
    Declared(String),
    #[error("no free GPU of type {wanted} on node {node} (have {have})")]
    NoneFree {
        wanted: String,
        node: String,
        have: String,
    },
}

/// The devices the driver knows; none where there is no driver.
#[must_use]
pub fn discover() -> Vec<Gpu> {
    // SAFETY: only tries to load the driver's library and drops it again.
    if !unsafe { sys::is_culib_present() } {
        tracing::info!("no CUDA driver: this node has no GPUs");
        return Vec::new();
    }
    let found = || -> Result<Vec<Gpu>, result::DriverError> {
        result::init()?;
        (0..result::device::get_count()?)
            .map(|ordinal| {
                let device = result::device::get(ordinal)?;
                let bytes = result::device::get_uuid(device)?.bytes;
                #[allow(
                    clippy::unnecessary_cast,
                    reason = "c_char is signed on some targets and not on others"
                )]
                let uuid = uuid::Uuid::from_bytes(bytes.map(|b| b as u8));
                Ok(Gpu {
                    index: ordinal.unsigned_abs(),
                    model: result::device::get_name(device)?,
                    uuid: Some(format!("GPU-{uuid}")),
                })
            })
            .collect()
    };
    found().unwrap_or_else(|error| {
        tracing::warn!(%error, "the CUDA driver is there but gives no devices");
        Vec::new()
    })
}

/// Devices named by hand: `H100:8`, `H100:4,L40S:2`, `H100` (one).
pub fn parse_declared(text: &str) -> Result<Vec<Gpu>, GpuError> {
    let wrong = || GpuError::Declared(text.to_owned());
    let mut gpus = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (model, count) = match part.split_once(':') {
            Some((model, count)) => (model.trim(), count.trim().parse().map_err(|_| wrong())?),
            None => (part, 1_u32),
        };
        if model.is_empty() || count > 1024 {
            return Err(wrong());
        }
        for _ in 0..count {
            gpus.push(Gpu {
                index: u32::try_from(gpus.len()).map_err(|_| wrong())?,
                model: model.to_owned(),
                uuid: None,
            });
        }
    }
    Ok(gpus)
}

/// The node's devices and who has them.
#[derive(Clone)]
pub struct GpuPool(Arc<Pool>);

struct Pool {
    node: String,
    all: Vec<Gpu>,
    /// Places in `all` that no lease has. Taken by `lease`, returned by a lease's drop.
    free: Mutex<Vec<usize>>,
    returned: Notify,
}

impl GpuPool {
    #[must_use]
    pub fn new(node: &str, all: Vec<Gpu>) -> Self {
        let free = Mutex::new((0..all.len()).collect());
        Self(Arc::new(Pool {
            node: node.to_owned(),
            all,
            free,
            returned: Notify::new(),
        }))
    }

    /// `count` devices of one model, or none at all.
    pub fn lease(&self, wanted: &str, count: u32) -> Result<GpuLease, GpuError> {
        let mut free = self.0.free();
        let taken: Vec<usize> = free
            .iter()
            .copied()
            .filter(|&at| self.0.all[at].is(wanted))
            .take(count as usize)
            .collect();
        if taken.len() < count as usize {
            return Err(GpuError::NoneFree {
                wanted: wanted.to_owned(),
                node: self.0.node.clone(),
                have: self.0.have(&free),
            });
        }
        free.retain(|at| !taken.contains(at));
        Ok(GpuLease {
            pool: Arc::clone(&self.0),
            taken,
        })
    }

    /// Woken when devices come back.
    pub(crate) fn returned(&self) -> &Notify {
        &self.0.returned
    }
}

impl Pool {
    fn free(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn have(&self, free: &[usize]) -> String {
        if self.all.is_empty() {
            return "no GPUs".to_owned();
        }
        let mut counts = std::collections::BTreeMap::<&str, (usize, usize)>::new();
        for (at, gpu) in self.all.iter().enumerate() {
            let (idle, total) = counts.entry(&gpu.model).or_default();
            *total += 1;
            *idle += usize::from(free.contains(&at));
        }
        let parts: Vec<String> = counts
            .iter()
            .map(|(model, (idle, total))| format!("{model}: {idle} of {total} free"))
            .collect();
        parts.join(", ")
    }
}

/// Devices that one instance has; dropping it gives them back.
#[must_use]
pub struct GpuLease {
    pool: Arc<Pool>,
    taken: Vec<usize>,
}

impl GpuLease {
    pub fn gpus(&self) -> impl Iterator<Item = &Gpu> {
        self.taken.iter().map(|&at| &self.pool.all[at])
    }
}

impl Drop for GpuLease {
    fn drop(&mut self) {
        let mut free = self.pool.free();
        free.append(&mut self.taken);
        free.sort_unstable();
        drop(free);
        self.pool.returned.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declared_lists_are_read() {
        let gpus = parse_declared("H100:2, L40S").unwrap();
        let models: Vec<_> = gpus.iter().map(|g| (g.index, g.model.as_str())).collect();
        assert_eq!(models, [(0, "H100"), (1, "H100"), (2, "L40S")]);
        assert!(parse_declared("").unwrap().is_empty());
        assert!(parse_declared("H100:x").is_err());
        assert!(parse_declared(":3").is_err());
    }

    #[test]
    fn a_model_is_matched_by_whole_words() {
        let gpu = |model: &str| Gpu {
            index: 0,
            model: model.into(),
            uuid: None,
        };
        assert!(gpu("NVIDIA H100 80GB HBM3").is("h100"));
        assert!(gpu("NVIDIA A100-SXM4-80GB").is("A100_80GB"));
        assert!(!gpu("NVIDIA L40S").is("L40"));
        assert!(!gpu("NVIDIA L40S").is(""));
    }

    #[test]
    fn leases_exclude_each_other_and_come_back() {
        let pool = GpuPool::new("n1", parse_declared("H100:3").unwrap());
        let two = pool.lease("H100", 2).unwrap();
        let seen: Vec<_> = two.gpus().map(|g| g.index).collect();
        assert_eq!(seen, [0, 1]);
        let refused = pool.lease("H100", 2).err().unwrap().to_string();
        assert_eq!(
            refused,
            "no free GPU of type H100 on node n1 (have H100: 1 of 3 free)"
        );
        drop(two);
        assert_eq!(pool.lease("H100", 3).unwrap().gpus().count(), 3);
        assert!(pool.lease("A100", 1).is_err());
    }

    #[test]
    fn discovery_without_a_driver_is_empty() {
        // SAFETY: only tries to load the library.
        if !unsafe { sys::is_culib_present() } {
            assert!(discover().is_empty());
        }
    }
}
