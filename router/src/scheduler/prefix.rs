//! Keys of the prefix cache, and which block holds what a key names.
//!
//! A key is a keyed BLAKE3 over (parent key, the block's tokens); the chain's root is over the adapters' contents and
//! scales, the tenant and the caller's salt. Content, never a name: a re-published adapter cannot hit old KV.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::ids::BlockId;
use crate::engine::GenerateRequest;

/// Names the KV of one full block and of everything before it.
pub(super) type PrefixKey = [u8; 32];

/// Key of the empty prefix of a request. Fields are length-prefixed, so no two requests share an encoding by accident.
pub(super) fn root(process_key: &[u8; 32], request: &GenerateRequest) -> PrefixKey {
    let mut hasher = blake3::Hasher::new_keyed(process_key);
    hasher.update(b"loramux prefix root 1");
    hasher.update(&request.tenant.to_le_bytes());
    let salt = request.cache_salt.as_deref();
    hasher.update(&[u8::from(salt.is_some())]);
    let salt = salt.unwrap_or_default().as_bytes();
    hasher.update(&(salt.len() as u64).to_le_bytes());
    hasher.update(salt);
    hasher.update(&(request.adapters.len() as u64).to_le_bytes());
    for used in &request.adapters {
        hasher.update(&used.content.0);
        hasher.update(&used.scale.to_bits().to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Key of the block that follows `parent` and holds `tokens`.
pub(super) fn child(process_key: &[u8; 32], parent: &PrefixKey, tokens: impl Iterator<Item = u32>) -> PrefixKey {
    let mut hasher = blake3::Hasher::new_keyed(process_key);
    hasher.update(parent);
    let mut buffer = [0u8; 256];
    let mut filled = 0;
    for token in tokens {
        buffer[filled..filled + 4].copy_from_slice(&token.to_le_bytes());
        filled += 4;
        if filled == buffer.len() {
            hasher.update(&buffer);
            filled = 0;
        }
    }
    hasher.update(&buffer[..filled]);
    *hasher.finalize().as_bytes()
}

/// A key is the output of a keyed hash, so eight of its bytes are as good a hash as any, and nobody outside can aim at one.
#[derive(Default)]
struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(head) = bytes.first_chunk::<8>() {
            self.0 = u64::from_le_bytes(*head);
        }
    }

    fn write_usize(&mut self, _len: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Which block holds a key's KV. Only looked up, never walked, so the map's order cannot reach a plan.
#[derive(Default)]
pub(super) struct PrefixIndex {
    blocks: HashMap<PrefixKey, BlockId, BuildHasherDefault<FirstBytes>>,
}

impl PrefixIndex {
    pub(super) fn get(&self, key: &PrefixKey) -> Option<BlockId> {
        self.blocks.get(key).copied()
    }

    /// False if another block already holds this key; that one stays.
    pub(super) fn insert(&mut self, key: PrefixKey, block: BlockId) -> bool {
        match self.blocks.entry(key) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(block);
                true
            }
        }
    }

    pub(super) fn remove(&mut self, key: &PrefixKey) {
        self.blocks.remove(key);
    }

    pub(super) fn clear(&mut self) {
        self.blocks.clear();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }
}
