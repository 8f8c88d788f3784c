//! Sends the requests of a round: a closed loop of workers, or arrivals in time.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::{JoinSet, LocalSet};

use super::client::{Client, Failure};
use super::figures::Outcomes;
use super::plan::{Plan, Planned};
use super::workload::Workload;

/// Part of the streams' tokens that must have come before the long prompt is sent.
const INTRUDER_AFTER: f64 = 0.25;

/// Ctrl-C or SIGTERM: what was measured so far is told.
pub(super) struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    /// From now on these signals do not end the process.
    pub(super) fn listen() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    pub(super) async fn wait(&mut self) {
        tokio::select! { _ = self.interrupt.recv() => {}, _ = self.terminate.recv() => {} }
    }
}

/// Sends all of `plan`. Gives the outcomes and whether it came to its end.
pub(super) async fn round(client: &Client, workload: &Workload, plan: Plan, stop: &mut Stop) -> (Outcomes, bool) {
    let outcomes = Rc::new(RefCell::new(Outcomes::default()));
    let is_complete = LocalSet::new()
        .run_until(async {
            tokio::select! {
                () = send_all(client, workload, plan, &outcomes) => true,
                () = stop.wait() => false,
            }
        })
        .await;
    (outcomes.take(), is_complete)
}

async fn send_all(client: &Client, workload: &Workload, plan: Plan, outcomes: &Rc<RefCell<Outcomes>>) {
    if let Some(prime) = &plan.prime
        && let Err(failure) = client.complete(prime, Instant::now(), || ()).await
    {
        outcomes.borrow_mut().failures.push(failure);
        return;
    }
    let began = Instant::now();
    let streams = Rc::new(Streams::new(&plan));
    let intruder = plan.intruder.map(|planned| {
        let (client, streams, outcomes) = (client.clone(), Rc::clone(&streams), Rc::clone(outcomes));
        tokio::task::spawn_local(async move {
            streams.under_way.notified().await;
            let ended = client.complete(&planned, began, || ()).await;
            let mut outcomes = outcomes.borrow_mut();
            match ended {
                Ok(answered) => outcomes.intruder = Some(answered),
                Err(failure) => outcomes.failures.push(failure),
            }
        })
    });
    let mut workers = JoinSet::new();
    let one = move |planned: Planned, client: Client, streams: Rc<Streams>, outcomes: Rc<RefCell<Outcomes>>| async move {
        match client.complete(&planned, began, || streams.count()).await {
            Ok(answered) => outcomes.borrow_mut().answered.push(answered),
            Err(failure) => outcomes.borrow_mut().failures.push(failure),
        }
    };
    if workload.rate_per_s.is_some() {
        for planned in plan.requests {
            let (client, streams, outcomes) = (client.clone(), Rc::clone(&streams), Rc::clone(outcomes));
            workers.spawn_local(async move {
                tokio::time::sleep_until((began + Duration::from_secs_f64(planned.at_s)).into()).await;
                one(planned, client, streams, outcomes).await;
            });
        }
    } else {
        let workers_count = workload.concurrency.min(plan.requests.len());
        let waiting = Rc::new(RefCell::new(plan.requests.into_iter()));
        for _ in 0..workers_count {
            let (client, streams, outcomes) = (client.clone(), Rc::clone(&streams), Rc::clone(outcomes));
            let waiting = Rc::clone(&waiting);
            workers.spawn_local(async move {
                loop {
                    let next = waiting.borrow_mut().next();
                    let Some(planned) = next else { return };
                    one(planned, client.clone(), Rc::clone(&streams), Rc::clone(&outcomes)).await;
                }
            });
        }
    }
    while workers.join_next().await.is_some() {}
    if let Some(intruder) = intruder {
        if streams.is_under_way() {
            // Dropping the handle would leave it running; its only outcome is in `outcomes`.
            let _ = intruder.await;
        } else {
            intruder.abort();
            let message = "the streams ended before the long prompt could be sent".to_owned();
            outcomes.borrow_mut().failures.push(Failure { kind: "intruder".into(), message });
        }
    }
}

/// How far the streams are that a long prompt waits for.
struct Streams {
    tokens: Cell<usize>,
    enough: usize,
    under_way: Notify,
}

impl Streams {
    fn new(plan: &Plan) -> Self {
        let tokens: usize = plan.requests.iter().map(|planned| planned.output_tokens).sum();
        let enough = ((tokens as f64 * INTRUDER_AFTER) as usize).max(1);
        Self { tokens: Cell::new(0), enough, under_way: Notify::new() }
    }

    fn count(&self) {
        self.tokens.set(self.tokens.get() + 1);
        if self.tokens.get() == self.enough {
            self.under_way.notify_one();
        }
    }

    fn is_under_way(&self) -> bool {
        self.tokens.get() >= self.enough
    }
}
