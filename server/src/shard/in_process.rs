//! The shard as a thread of the router's process: tests, benchmarks, embedding. A fault of the device or a crash of a
//! kernel takes the router with it; `--shard-mode process` is the one for serving.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use loramux_proto::ToShard;
use loramux_router::engine::{Reports, Shard, ShardExit, ShardGone, ShardLauncher};

use super::{Reply, ShardOptions, dispatch, message, serve, set_kernels};

/// Starts threads.
pub(crate) struct InProcessLauncher {
    pub(crate) options: ShardOptions,
}

impl ShardLauncher for InProcessLauncher {
    fn launch(&mut self, reports: Reports) -> Result<Box<dyn Shard>, String> {
        set_kernels(&self.options);
        let (to_executor, inbox) = mpsc::channel();
        let cut = Arc::new(AtomicBool::new(false));
        let reply: Reply = {
            let (reports, cut) = (reports.clone(), Arc::clone(&cut));
            Arc::new(move |body| {
                if !cut.load(Ordering::Relaxed) {
                    reports.message(message(body));
                }
            })
        };
        let (options, for_thread) = (self.options.clone(), Arc::clone(&reply));
        let run = move || {
            serve(&options, &inbox, &for_thread);
            reports.gone(ShardExit { reason: "the shard's thread ended".into(), killed_from_outside: false });
        };
        std::thread::Builder::new().name("shard".into()).spawn(run).map_err(|e| e.to_string())?;
        Ok(Box::new(ThreadShard { to_executor, reply, cut }))
    }
}

struct ThreadShard {
    to_executor: mpsc::Sender<ToShard>,
    reply: Reply,
    cut: Arc<AtomicBool>,
}

impl Shard for ThreadShard {
    fn send(&mut self, message: ToShard) -> Result<(), ShardGone> {
        if dispatch(message, &self.to_executor, &self.reply) { Ok(()) } else { Err(ShardGone) }
    }

    fn kill(&mut self) {
        self.cut.store(true, Ordering::Relaxed);
    }
}
