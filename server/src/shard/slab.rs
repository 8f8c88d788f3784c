//! The host slab: adapters read, validated, converted and packed, ready to be copied into arena pages. Shared between the
//! threads that prepare and the one that executes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use loramux_kernels::{AdapterImage, ArenaDtype};
use loramux_models::DecoderSpec;
use loramux_models::adapter::{self, AdapterLimits};
use loramux_proto::{AdapterError, AdapterReport, PrepareAdapter, Prepared, prepared};

/// Page images by content.
pub(crate) struct Slab {
    spec: DecoderSpec,
    dtype: ArenaDtype,
    page_bytes: usize,
    images: RwLock<HashMap<[u8; 32], Arc<AdapterImage>>>,
}

impl Slab {
    pub(crate) fn new(spec: DecoderSpec, dtype: ArenaDtype, page_bytes: usize) -> Self {
        Self { spec, dtype, page_bytes, images: RwLock::default() }
    }

    pub(crate) fn get(&self, content: &[u8]) -> Option<Arc<AdapterImage>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner).get(content).map(Arc::clone)
    }

    pub(crate) fn remove(&self, content: &[u8]) {
        self.images.write().unwrap_or_else(PoisonError::into_inner).remove(content);
    }

    /// Reads one directory and keeps its image. Every failure is an answer, never a panic: the files are a stranger's.
    pub(crate) fn prepare(&self, request: &PrepareAdapter) -> Prepared {
        let outcome = match self.try_prepare(request) {
            Ok(report) => prepared::Outcome::Report(report),
            Err(error) => {
                let (code, message) = (error.code().to_owned(), error.to_string());
                prepared::Outcome::Error(AdapterError { code, message })
            }
        };
        Prepared { request_id: request.request_id, outcome: Some(outcome) }
    }

    fn try_prepare(&self, request: &PrepareAdapter) -> Result<AdapterReport, adapter::AdapterError> {
        let mut limits = AdapterLimits::default();
        if request.rank_max != 0 {
            limits.rank_max = limits.rank_max.min(request.rank_max as usize);
        }
        let read = adapter::read(Path::new(&request.dir), &self.spec, &limits)?;
        let image = match self.get(&read.content_id) {
            Some(image) => image,
            None => Arc::new(read.pack(self.dtype, self.page_bytes)?),
        };
        let report = AdapterReport {
            content_id: read.content_id.to_vec(),
            pages_needed: saturating(image.pages_needed()),
            rank_blocks: saturating(image.rank_blocks()),
            rank_min: saturating(read.rank_min),
            rank_max: saturating(read.rank_max),
            host_bytes: image.bytes() as u64,
            modules: read.module_names.clone(),
            base_model: read.base_model.clone(),
        };
        self.images.write().unwrap_or_else(PoisonError::into_inner).insert(read.content_id, image);
        Ok(report)
    }
}

/// Counts on the wire are u32; one that does not fit is refused by whoever compares it with a limit.
fn saturating(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
