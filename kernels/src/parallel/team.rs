//! The team's threads and how a region reaches them.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, Thread};

/// How often a thread looks, without letting go of its core, for what it waits for: some microseconds.
const LOOKS: usize = 1 << 8;
/// How often after that it looks again when it has let others have the core, until it sleeps: some tens of microseconds,
/// and while a step runs ([`in_pool`]) about a millisecond.
const YIELDS: usize = 1 << 6;
const YIELDS_IN_STEP: usize = 1 << 11;

/// What the user asked for; 0: as many threads as there are cores.
static WANTED: AtomicUsize = AtomicUsize::new(0);
static TEAM: OnceLock<Team> = OnceLock::new();

/// One value a cache line, so that threads do not take each other's lines.
#[repr(align(128))]
#[derive(Default)]
struct Padded<T>(T);

/// The region: a closure whose type is erased, and how many units it has.
#[derive(Clone, Copy)]
struct Region {
    body: *const (),
    call: unsafe fn(*const (), usize),
    units: usize,
}

/// The gate's lower bits count the threads inside; then comes this bit, then the number of the region.
const OPEN: usize = 1 << 15;
const NUMBER: usize = OPEN << 1;

/// A unit that panicked.
type Panic = Box<dyn Any + Send>;

struct Team {
    /// Held by the one caller that has the team.
    taken: Padded<AtomicBool>,
    /// Number of the region, whether it is open, and how many threads are in it: see [`OPEN`]. A thread that comes late finds
    /// it closed and is not waited for.
    gate: Padded<AtomicUsize>,
    /// Whether a step is under way.
    hot: Padded<AtomicBool>,
    /// Next unit of each thread's range; the caller is the first.
    cursors: Vec<Padded<AtomicUsize>>,
    /// Written by who has `taken` while the gate is closed and nobody inside, read by threads that are.
    region: UnsafeCell<Region>,
    panic: Mutex<Option<Panic>>,
    sleeping: Vec<Padded<AtomicBool>>,
    threads: OnceLock<Vec<Thread>>,
}

// SAFETY: `region` is written only by the caller that holds `taken`, before it opens the gate (release) and after all
// threads left the last region (acquire); its pointer is to a `Sync` closure that outlives the region.
unsafe impl Sync for Team {}
// SAFETY: as above.
unsafe impl Send for Team {}

/// Sets how many threads compute. Only before the first region; afterwards the team is what it is.
///
/// # Errors
/// The number of threads there are, if the team has started with another number.
pub fn set_threads(threads: usize) -> Result<(), usize> {
    WANTED.store(threads.max(1), Ordering::Relaxed);
    TEAM.get()
        .map_or(Ok(()), |team| if team.cursors.len() == threads.max(1) { Ok(()) } else { Err(team.cursors.len()) })
}

/// Threads that compute, the caller among them.
#[must_use]
pub fn threads() -> usize {
    match (TEAM.get(), WANTED.load(Ordering::Relaxed)) {
        (Some(team), _) => team.cursors.len(),
        (None, 0) => thread::available_parallelism().map_or(1, std::num::NonZero::get),
        (None, wanted) => wanted,
    }
}

fn team() -> &'static Team {
    let team = TEAM.get_or_init(|| Team::new(threads()));
    team.threads.get_or_init(|| (1..team.cursors.len()).map_while(|member| start(team, member)).collect());
    team
}

/// A thread that cannot be started is missing: the others take its units.
fn start(team: &'static Team, member: usize) -> Option<Thread> {
    let builder = thread::Builder::new().name(format!("compute-{member}"));
    match builder.spawn(move || team.work(member)) {
        Ok(handle) => Some(handle.thread().clone()),
        Err(_) => None,
    }
}

/// Runs `body` with the team awake between its regions: for a whole forward pass.
pub fn in_pool<R>(body: impl FnOnce() -> R) -> R {
    struct Cool(&'static Team);
    impl Drop for Cool {
        fn drop(&mut self) {
            self.0.hot.0.store(false, Ordering::Relaxed);
        }
    }
    let team = team();
    team.hot.0.store(true, Ordering::Relaxed);
    let _cool = Cool(team);
    body()
}

/// Calls `body` once for each unit. While another caller has the team (or this is inside a region), the caller does it all.
pub(super) fn run<F: Fn(usize) + Sync>(units: usize, body: &F) {
    let team = team();
    let workers = team.threads.get().map_or(0, Vec::len);
    if workers == 0 || team.taken.0.swap(true, Ordering::Acquire) {
        return (0..units).for_each(body);
    }
    /// # Safety
    /// `body` must point to an `F`.
    unsafe fn call<F: Fn(usize)>(body: *const (), unit: usize) {
        // SAFETY: the caller vouches for the type.
        unsafe { (*body.cast::<F>())(unit) }
    }
    let region = Region { body: std::ptr::from_ref(body).cast(), call: call::<F>, units };
    // SAFETY: this caller holds `taken`, and no thread is in a region.
    unsafe { *team.region.get() = region };
    let members = team.cursors.len();
    for (member, cursor) in team.cursors.iter().enumerate() {
        cursor.0.store(units * member / members, Ordering::Relaxed);
    }
    // Closed and empty: a new number, and open.
    team.gate.0.fetch_add(NUMBER | OPEN, Ordering::SeqCst);
    for (thread, sleeping) in team.threads.get().into_iter().flatten().zip(&team.sleeping[1..]) {
        if sleeping.0.load(Ordering::SeqCst) {
            thread.unpark();
        }
    }
    let own = team.units(0, &region);
    // Nobody may enter any more; the closure and what it borrows must live until the last thread has left, whatever happened
    // here.
    team.gate.0.fetch_and(!OPEN, Ordering::AcqRel);
    let mut looks = 0;
    while !team.gate.0.load(Ordering::Acquire).is_multiple_of(OPEN) {
        look_again(&mut looks);
    }
    let theirs = team.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    team.taken.0.store(false, Ordering::Release);
    if let Some(panic) = own.err().or(theirs) {
        resume_unwind(panic);
    }
}

/// A look that found nothing. When programs share the cores, the thread that is waited for may need this one's.
pub(super) fn look_again(looks: &mut usize) {
    *looks += 1;
    if *looks > LOOKS { thread::yield_now() } else { std::hint::spin_loop() }
}

impl Team {
    fn new(members: usize) -> Self {
        fn nothing(_: *const (), _: usize) {}
        Self {
            taken: Padded::default(),
            gate: Padded::default(),
            hot: Padded::default(),
            cursors: (0..members).map(|_| Padded::default()).collect(),
            region: UnsafeCell::new(Region { body: std::ptr::null(), call: nothing, units: 0 }),
            panic: Mutex::new(None),
            sleeping: (0..members).map(|_| Padded::default()).collect(),
            threads: OnceLock::new(),
        }
    }

    /// A thread's life.
    fn work(&self, member: usize) {
        let mut seen = 0;
        loop {
            let gate = self.next_region(member, seen);
            seen = gate / NUMBER;
            // One who was here in the meantime may have changed the count.
            let enter = |gate: usize| (gate / NUMBER == seen && gate & OPEN > 0).then_some(gate + 1);
            if self.gate.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, enter).is_err() {
                continue;
            }
            // SAFETY: this thread is inside: the caller has written the region and waits until nobody is.
            let region = unsafe { *self.region.get() };
            if let Err(panic) = self.units(member, &region) {
                *self.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(panic);
            }
            self.gate.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits until the number of the region is no longer `seen`, and gives the gate.
    fn next_region(&self, member: usize, seen: usize) -> usize {
        let mut looks = 0;
        loop {
            let gate = self.gate.0.load(Ordering::Acquire);
            if gate / NUMBER != seen {
                return gate;
            }
            let yields = if self.hot.0.load(Ordering::Relaxed) { YIELDS_IN_STEP } else { YIELDS };
            if looks < LOOKS + yields {
                look_again(&mut looks);
                continue;
            }
            let sleeping = &self.sleeping[member].0;
            sleeping.store(true, Ordering::SeqCst);
            // Whoever opens the gate after this look sees the flag.
            if self.gate.0.load(Ordering::SeqCst) / NUMBER == seen {
                thread::park();
            }
            sleeping.store(false, Ordering::Relaxed);
            looks = 0;
        }
    }

    /// A member's part of a region: its own range, then what is left of the others'.
    fn units(&self, member: usize, region: &Region) -> Result<(), Panic> {
        let members = self.cursors.len();
        catch_unwind(AssertUnwindSafe(|| {
            for victim in (member..members).chain(0..member) {
                let end = region.units * (victim + 1) / members;
                loop {
                    let unit = self.cursors[victim].0.fetch_add(1, Ordering::Relaxed);
                    if unit >= end {
                        break;
                    }
                    // SAFETY: the closure is of the type that `call` was made for, and alive: its caller waits.
                    unsafe { (region.call)(region.body, unit) };
                }
            }
        }))
    }
}
