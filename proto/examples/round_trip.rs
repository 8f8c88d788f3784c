//! What one step costs on the wire: a step of `n` decoding sequences to an echo thread over a Unix socket pair and a
//! result with `n` samples back. Run with `cargo run --release -p loramux-proto --example round_trip`.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use loramux_proto::{AdapterRef, Chunk, FromShard, Sample, Step, StepResult, ToShard, frame, from_shard, to_shard};

const ROUNDS: usize = 5000;

/// `whole`: as in the first chunks of all sequences; otherwise as in those that follow.
fn step(sequences: u64, blocks: u32, whole: bool) -> ToShard {
    let chunk = |seq| Chunk {
        seq,
        start: blocks * 16 - 1,
        len: 1,
        blocks: if whole { (0..blocks).collect() } else { Vec::new() },
        blocks_from: if whole { 0 } else { blocks },
        adapters: if whole { vec![AdapterRef { slot: seq as u32, generation: 1, scale: 1.0 }] } else { Vec::new() },
        sample: true,
        prompt_logprobs: false,
        mask: None,
        pool: false,
    };
    let step = Step { id: 1, chunks: (0..sequences).map(chunk).collect(), ..Step::default() };
    ToShard { body: Some(to_shard::Body::Step(step)) }
}

fn echo(mut socket: UnixStream) {
    let (mut read, mut write) = (Vec::new(), Vec::new());
    while let Ok(Some(ToShard { body: Some(to_shard::Body::Step(step)) })) = frame::read(&mut socket, &mut read) {
        let samples = step.chunks.iter().map(|c| Sample { seq: c.seq, token: 7, ..Sample::default() }).collect();
        let result = StepResult { id: step.id, samples, ..StepResult::default() };
        let message = FromShard { body: Some(from_shard::Body::Step(result)) };
        if frame::write(&mut socket, &mut write, &message).is_err() {
            return;
        }
    }
}

fn main() -> std::io::Result<()> {
    println!("sequences  context  tables  bytes     p50 us  p99 us");
    for (sequences, whole) in [1, 16, 64, 256].into_iter().flat_map(|n| [(n, true), (n, false)]) {
        let context = 512;
        let (mut ours, theirs) = UnixStream::pair()?;
        let thread = std::thread::spawn(move || echo(theirs));
        let message = step(sequences, context / 16, whole);
        let (mut read, mut write) = (Vec::new(), Vec::new());
        let mut times_us = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            let started = Instant::now();
            frame::write(&mut ours, &mut write, &message)?;
            frame::read::<FromShard>(&mut ours, &mut read)?;
            times_us.push(started.elapsed().as_secs_f64() * 1e6);
        }
        times_us.sort_by(f64::total_cmp);
        let (p50, p99) = (times_us[ROUNDS / 2], times_us[ROUNDS * 99 / 100]);
        let tables = if whole { "whole" } else { "new" };
        println!("{sequences:>9}  {context:>7}  {tables:>6}  {:>8}  {p50:>6.1}  {p99:>6.1}", write.len());
        drop(ours);
        let _ = thread.join();
    }
    Ok(())
}
