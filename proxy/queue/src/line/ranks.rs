//! A sorted list that can tell how many stand before a key.
//!
//! A B-tree map would have to count one by one, and callers poll for their
//! position. Chunks of a few hundred keys make a rank one binary search and a
//! sum over the chunks before: at 100,000 waiters, under a thousand additions.

const CHUNK: usize = 256;

#[derive(Debug)]
pub(super) struct Ranks<K> {
    /// None is empty; none is longer than `CHUNK`.
    chunks: Vec<Vec<K>>,
}

impl<K> Default for Ranks<K> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<K: Ord> Ranks<K> {
    pub(super) fn insert(&mut self, key: K) {
        if self.chunks.is_empty() {
            self.chunks.push(vec![key]);
            return;
        }
        let at = self.chunk_of(&key).min(self.chunks.len() - 1);
        let chunk = &mut self.chunks[at];
        if let Err(within) = chunk.binary_search(&key) {
            chunk.insert(within, key);
        }
        if chunk.len() > CHUNK {
            let upper = chunk.split_off(CHUNK / 2);
            self.chunks.insert(at + 1, upper);
        }
    }

    pub(super) fn remove(&mut self, key: &K) {
        let at = self.chunk_of(key);
        let Some(chunk) = self.chunks.get_mut(at) else {
            return;
        };
        if let Ok(within) = chunk.binary_search(key) {
            chunk.remove(within);
        }
        if chunk.is_empty() {
            self.chunks.remove(at);
        }
    }

    /// The number of keys below `key`.
    pub(super) fn rank(&self, key: &K) -> usize {
        let at = self.chunk_of(key);
        let before: usize = self.chunks[..at].iter().map(Vec::len).sum();
        let within = self
            .chunks
            .get(at)
            .map_or(0, |chunk| chunk.partition_point(|other| other < key));
        before + within
    }

    /// The first chunk whose last key is not below `key`.
    fn chunk_of(&self, key: &K) -> usize {
        self.chunks
            .partition_point(|chunk| chunk.last().is_some_and(|last| last < key))
    }
}
