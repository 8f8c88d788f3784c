//! Captured decode steps: one graph for each bucket of rows, with and without adapters. How many adapters there are, and
//! which, is data that the kernels read: there is no graph dimension for it. Adapters with gains and shifts (DoRA, biases) have
//! one launch more for each site, which would cost all others time; their steps are launched one by one.

use loramux_kernels::device::{DeviceError, Graph};

use super::bundle::Bundles;
use super::engine::{DECODE_BUCKETS, Engine};
use super::lists::LoraPass;
use super::ops::{Shape, StepOps};

/// The one pass of a captured step: its lists begin at the start, and the counts say how long they are.
const WHOLE: [LoraPass; 1] = [LoraPass { first_tile: 0, tiles: 0, first_item: 0, items: 0 }];

/// Graphs by bucket.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// (bucket, without adapters, with adapters)
    graphs: Vec<(usize, Graph, Graph)>,
}

impl Graphs {
    /// Runs every launch once, then captures each bucket up to `rows_max`.
    pub(super) fn capture(engine: &Engine, bundles: &Bundles, rows_max: usize) -> Result<Self, DeviceError> {
        let mut graphs = Vec::new();
        for bucket in DECODE_BUCKETS.into_iter().filter(|&bucket| bucket <= rows_max) {
            graphs.push((bucket, record(engine, bundles, bucket, &[])?, record(engine, bundles, bucket, &WHOLE)?));
        }
        Ok(Self { graphs })
    }

    /// The graph of a step of `rows` rows, and its bucket.
    pub(super) fn find(&self, rows: usize, adapters: bool) -> Option<(usize, Graph)> {
        let &(bucket, plain, lora) = self.graphs.iter().find(|(bucket, ..)| *bucket >= rows)?;
        Some((bucket, if adapters { lora } else { plain }))
    }

    /// Buckets, and nodes of the largest graph.
    pub(super) fn size(&self, engine: &Engine) -> (usize, usize) {
        let nodes = self.graphs.iter().map(|&(_, _, lora)| engine.device.graph_nodes(lora)).max();
        (self.graphs.len(), nodes.unwrap_or(0))
    }
}

fn record(engine: &Engine, bundles: &Bundles, bucket: usize, passes: &[LoraPass]) -> Result<Graph, DeviceError> {
    let shape = Shape { rows: bucket, bucket, tiles: 0, passes, vectors: false, prefill_tiles: 0 };
    let mut ops = StepOps::new(engine, bundles, shape);
    engine.device.begin_capture(engine.stream)?;
    let launched = ops.forward().and_then(|()| ops.sample(0, bucket, false));
    let graph = engine.device.end_capture(engine.stream);
    launched?; // the cause; what the end of the capture says then is only its consequence
    graph
}
