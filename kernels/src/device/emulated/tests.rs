//! Mistakes of a host that a GPU would answer with a wrong result now and then: each is planted and found.

use std::rc::Rc;

use super::*;
use crate::device::testing::emulator_with;
use crate::device::{DeviceBuffer, HostBuffer, SharedDevice};

const COUNT: usize = 64;
const BYTES: usize = COUNT * 4;

/// A device and two streams.
struct World {
    device: SharedDevice,
    first: Stream,
    second: Stream,
}

fn world(asynchrony: Asynchrony) -> World {
    let device: SharedDevice = Rc::new(emulator_with(Schedule::RoundRobin, false, asynchrony));
    let (first, second) = (device.stream(Priority::High).unwrap(), device.stream(Priority::Low).unwrap());
    World { device, first, second }
}

fn lazy_worlds() -> impl Iterator<Item = World> {
    (0..20).map(|seed| world(Asynchrony::Lazy(seed)))
}

fn every_world() -> impl Iterator<Item = World> {
    lazy_worlds().chain([world(Asynchrony::Eager)])
}

impl World {
    fn device_buffer(&self) -> DeviceBuffer {
        let buffer = DeviceBuffer::new(&self.device, BYTES).unwrap();
        buffer.fill(self.first, 0).unwrap();
        buffer
    }

    fn host_buffer(&self, value: u32) -> HostBuffer<u32> {
        let mut buffer = HostBuffer::new(&self.device, COUNT, HostUse::Upload).unwrap();
        buffer.as_mut_slice().fill(value);
        buffer
    }

    fn upload(&self, stream: Stream, to: &DeviceBuffer, from: &HostBuffer<u32>) -> Result<(), DeviceError> {
        // SAFETY: both have `BYTES`; what a test does wrong in time is checked by the emulator.
        unsafe { self.device.upload(stream, to.address(), from.as_ptr(), BYTES) }
    }

    fn download(&self, stream: Stream, to: &HostBuffer<u32>, from: &DeviceBuffer) -> Result<(), DeviceError> {
        // SAFETY: as above.
        unsafe { self.device.download(stream, to.as_ptr(), from.address(), BYTES) }
    }

    fn copy(&self, stream: Stream, to: &DeviceBuffer, from: &DeviceBuffer) -> Result<(), DeviceError> {
        // SAFETY: as above.
        unsafe { self.device.copy(stream, to.address(), from.address(), BYTES) }
    }

    fn mark(&self, stream: Stream) -> Event {
        let event = self.device.event().unwrap();
        self.device.record(event, stream).unwrap();
        event
    }

    fn finish(&self, stream: Stream) -> Result<(), DeviceError> {
        let event = self.device.event()?;
        self.device.record(event, stream)?;
        self.device.synchronize(event)
    }

    fn value(&self, buffer: &DeviceBuffer) -> u32 {
        buffer.read::<u32>(self.first, 0, COUNT).unwrap()[0]
    }
}

/// How many of the worlds show something.
fn shown(worlds: impl Iterator<Item = World>, test: impl Fn(&World) -> bool) -> usize {
    worlds.filter(|world| test(world)).count()
}

#[test]
fn work_in_order_gives_its_result_under_every_seed() {
    for world in every_world() {
        let (a, b, host) = (world.device_buffer(), world.device_buffer(), world.host_buffer(7));
        let back = world.host_buffer(0);
        world.upload(world.second, &a, &host).unwrap();
        let uploaded = world.mark(world.second);
        world.device.wait(world.first, uploaded).unwrap();
        world.copy(world.first, &b, &a).unwrap();
        world.download(world.first, &back, &b).unwrap();
        let done = world.mark(world.first);
        while !world.device.is_done(done).unwrap() {}
        assert_eq!(back.as_slice(), [7; COUNT]);
        assert!(world.device.is_done(uploaded).unwrap());
        world.finish(world.second).unwrap();
    }
}

#[test]
fn a_result_read_before_it_is_waited_for_is_old() {
    let early = |world: &World| {
        let (a, back) = (world.device_buffer(), world.host_buffer(1));
        world.download(world.first, &back, &a).unwrap();
        let seen = back.as_slice()[0];
        world.finish(world.first).unwrap();
        seen == 1
    };
    assert_eq!(shown(lazy_worlds(), early), 20);
    assert_eq!(shown([world(Asynchrony::Eager)].into_iter(), early), 0);
}

#[test]
fn a_buffer_overwritten_before_its_upload_ran_sends_the_new_bytes() {
    let overwritten = |world: &World| {
        let (a, mut host) = (world.device_buffer(), world.host_buffer(5));
        world.upload(world.first, &a, &host).unwrap();
        host.as_mut_slice().fill(6); // too early
        world.value(&a) == 6
    };
    assert_eq!(shown(lazy_worlds(), overwritten), 20);
}

#[test]
fn a_wait_that_is_missing_between_streams_shows() {
    let missing = |world: &World| {
        let (a, b, host) = (world.device_buffer(), world.device_buffer(), world.host_buffer(3));
        world.upload(world.second, &a, &host).unwrap();
        world.copy(world.first, &b, &a).unwrap(); // without the wait
        let value = world.value(&b);
        world.finish(world.second).unwrap();
        value != 3
    };
    assert!(shown(lazy_worlds(), missing) >= 10);
}

#[test]
fn a_wait_is_for_what_was_recorded_when_it_was_asked_for() {
    for world in lazy_worlds() {
        let (a, b, host) = (world.device_buffer(), world.device_buffer(), world.host_buffer(4));
        world.upload(world.second, &a, &host).unwrap();
        let event = world.mark(world.second);
        world.device.wait(world.first, event).unwrap();
        world.copy(world.first, &b, &a).unwrap();
        // Recorded again behind work that is blocked on the first stream: had the wait been for this one, neither would end.
        let copied = world.mark(world.first);
        world.device.wait(world.second, copied).unwrap();
        world.device.record(event, world.second).unwrap();
        world.device.synchronize(event).unwrap();
        assert_eq!(world.value(&b), 4);
    }
}

#[test]
fn memory_freed_under_queued_work_is_an_error_where_the_host_waits() {
    for world in lazy_worlds() {
        let (a, b) = (world.device_buffer(), world.device_buffer());
        world.copy(world.first, &a, &b).unwrap();
        drop(b);
        let error = world.finish(world.first).unwrap_err().to_string();
        assert!(error.contains("freed"), "{error}");
        assert!(world.device.alloc(16).is_err(), "nothing works after a fault");
    }
    let world = world(Asynchrony::Lazy(1));
    let (a, host) = (world.device_buffer(), world.host_buffer(1));
    world.upload(world.first, &a, &host).unwrap();
    drop(host);
    assert!(world.finish(world.first).unwrap_err().to_string().contains("freed"));
}

#[test]
fn a_fault_is_silent_until_the_host_waits() {
    for world in every_world() {
        let a = world.device_buffer();
        // SAFETY: not safe, and the emulator has to say so: one byte more than the buffer has.
        unsafe { world.device.fill(world.first, a.address(), 1, BYTES + 1).unwrap() };
        world.copy(world.first, &a, &a).unwrap_or_else(|error| panic!("nobody has looked yet: {error}"));
        let error = world.finish(world.first).unwrap_err().to_string();
        assert!(error.contains("a fill takes 257 bytes where 256 are left"), "{error}");
        assert_eq!(world.finish(world.second).unwrap_err().to_string(), error, "and stays");
    }
}

#[test]
fn new_memory_holds_nan_and_the_hosts_zeros() {
    let world = world(Asynchrony::Eager);
    let a = DeviceBuffer::new(&world.device, BYTES).unwrap();
    assert_eq!(world.value(&a), u32::MAX);
    assert_eq!(HostBuffer::<u32>::new(&world.device, COUNT, HostUse::Readback).unwrap().as_slice(), [0; COUNT]);
    let free = world.device.free_bytes().unwrap();
    assert!(matches!(world.device.alloc(free as usize + 512), Err(DeviceError::OutOfMemory { .. })));
    drop(a);
    assert_eq!(world.device.free_bytes().unwrap(), free + BYTES as u64);
}

/// `a` is 1 and becomes 2 and 3 on two streams that start from it; their results are joined in `a`.
fn fork_and_join(world: &World, buffers: &[DeviceBuffer; 3], joins: bool) -> Result<Graph, DeviceError> {
    let [a, b, c] = buffers;
    let device = &world.device;
    let (fork, join) = (device.event()?, device.event()?);
    device.begin_capture(world.first)?;
    let captured = (|| {
        device.record(fork, world.first)?;
        device.wait(world.second, fork)?;
        world.copy(world.second, b, a)?;
        device.record(join, world.second)?;
        world.copy(world.first, c, a)?;
        if joins {
            device.wait(world.first, join)?;
        }
        world.copy(world.first, a, b)
    })();
    let graph = device.end_capture(world.first);
    captured.and(graph)
}

#[test]
fn a_graph_keeps_the_order_of_its_events() {
    for world in every_world() {
        let buffers = [world.device_buffer(), world.device_buffer(), world.device_buffer()];
        let graph = fork_and_join(&world, &buffers, true).unwrap();
        assert_eq!(world.device.graph_nodes(graph), 3);
        assert_eq!(world.value(&buffers[1]), 0, "recorded and not run");
        for value in [9u32, 11] {
            buffers[0].write(world.first, 0, &[value; COUNT]).unwrap();
            buffers[1].fill(world.first, 0).unwrap();
            // SAFETY: the buffers are still there.
            unsafe { world.device.replay(world.first, graph).unwrap() };
            assert_eq!(world.value(&buffers[0]), value, "b was written before it was read");
            assert_eq!((world.value(&buffers[1]), world.value(&buffers[2])), (value, value));
        }
    }
}

#[test]
fn a_capture_without_its_join_is_refused() {
    let world = world(Asynchrony::Lazy(3));
    let buffers = [world.device_buffer(), world.device_buffer(), world.device_buffer()];
    let error = fork_and_join(&world, &buffers, false).unwrap_err().to_string();
    assert!(error.contains("not joined back"), "{error}");
    assert!(fork_and_join(&world, &buffers, true).is_ok(), "the next capture is a new one");
}

#[test]
fn what_a_capture_does_not_allow_loses_it() {
    type Mistake = fn(&World, &DeviceBuffer, Event) -> Result<(), DeviceError>;
    let mistakes: [(&str, Mistake); 6] = [
        ("wait of the host", |world, _, event| world.device.synchronize(event)),
        ("question", |world, _, event| world.device.is_done(event).map(drop)),
        ("allocation", |world, _, _| world.device.alloc(16).map(drop)),
        ("was not joined", |world, a, _| world.copy(world.second, a, a)),
        ("event from outside", |world, _, event| world.device.wait(world.first, event)),
        ("another capture", |world, _, _| world.device.begin_capture(world.second)),
    ];
    for (words, mistake) in mistakes {
        let world = world(Asynchrony::Lazy(5));
        let (a, event) = (world.device_buffer(), world.mark(world.first));
        world.device.begin_capture(world.first).unwrap();
        let error = mistake(&world, &a, event).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
        let error = world.device.end_capture(world.first).unwrap_err().to_string();
        assert!(error.contains("lost") && error.contains(words), "{words}: {error}");
    }
    // Giving memory back has no result: it shows at the end.
    let world = world(Asynchrony::Lazy(5));
    let a = world.device_buffer();
    world.device.begin_capture(world.first).unwrap();
    drop(a);
    assert!(world.device.end_capture(world.first).unwrap_err().to_string().contains("given back"));
}

#[test]
fn an_event_of_a_capture_marks_no_time() {
    let world = world(Asynchrony::Lazy(2));
    let event = world.device.event().unwrap();
    world.device.begin_capture(world.first).unwrap();
    world.device.record(event, world.first).unwrap();
    world.device.end_capture(world.first).unwrap();
    assert!(world.device.synchronize(event).unwrap_err().to_string().contains("in a capture"));
    world.device.record(event, world.first).unwrap();
    world.device.synchronize(event).unwrap();
}

#[test]
fn time_passes_between_timed_events() {
    let world = world(Asynchrony::Lazy(2));
    let (start, end) = (world.device.timed_event().unwrap(), world.device.timed_event().unwrap());
    let a = DeviceBuffer::new(&world.device, 1 << 20).unwrap();
    world.device.record(start, world.first).unwrap();
    // SAFETY: the buffer is as large.
    unsafe { world.device.fill(world.first, a.address(), 1, 1 << 20).unwrap() };
    world.device.record(end, world.first).unwrap();
    assert!(world.device.elapsed_ms(start, end).is_err(), "they have not come");
    world.device.synchronize(end).unwrap();
    assert!(world.device.elapsed_ms(start, end).unwrap() > 0.0);
}
