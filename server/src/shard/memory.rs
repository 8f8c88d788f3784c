//! How much memory the arena gets, and that what was freed goes back to the system.

/// Bytes the arena gets at most when nothing was asked for. Enough for hundreds of long sequences of a small model, and
/// the memory is reserved, not touched: pages that no step used cost nothing.
const ARENA_BYTES_AUTO_MAX: u64 = 4 << 30;

/// Arena bytes when `--arena-bytes` is not given: half of what is free now, at most [`ARENA_BYTES_AUTO_MAX`], and never
/// more than `useful` (what the largest batch of full contexts could fill).
pub(crate) fn arena_bytes_auto(available: Option<u64>, useful: u64) -> u64 {
    let half = available.map_or(1 << 30, |bytes| bytes / 2);
    half.min(ARENA_BYTES_AUTO_MAX).min(useful)
}

/// Host memory for adapters when `--host-adapter-memory` is not given.
const HOST_ADAPTER_BYTES_AUTO_MAX: u64 = 8 << 30;

/// Host bytes for adapters when nothing was asked for: as many as there are on a large machine, half of what is free now on
/// another, with a line in the log that says so.
pub(crate) fn host_adapter_bytes_auto() -> u64 {
    let bytes = host_adapter_bytes(available_bytes());
    if bytes < HOST_ADAPTER_BYTES_AUTO_MAX {
        let mib = bytes >> 20;
        tracing::info!("adapters get {mib} MiB of host memory, half of what is free; --host-adapter-memory sets it");
    }
    bytes
}

fn host_adapter_bytes(available: Option<u64>) -> u64 {
    available.map_or(HOST_ADAPTER_BYTES_AUTO_MAX, |bytes| (bytes / 2).min(HOST_ADAPTER_BYTES_AUTO_MAX))
}

/// `MemAvailable` of the kernel, bytes, or the control group's limit where that is less.
pub(crate) fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some((kib << 10).min(limit.unwrap_or(u64::MAX)))
}

/// Buffers of at least so many bytes are mapped for themselves. glibc raises this to the largest buffer that was ever
/// freed unless it is told: then those of one large adapter leave holes in its heaps for good.
#[cfg(target_env = "gnu")]
const OWN_MAPPING_BYTES: libc::c_int = 1 << 20;
/// Free bytes at a heap's end that are kept.
#[cfg(target_env = "gnu")]
const HEAP_SLACK_BYTES: libc::c_int = 4 << 20;

/// Makes large buffers go back to the system when they are freed. To be called once, before there are any.
pub(crate) fn map_large_buffers() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets two numbers of the allocator, under its lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, HEAP_SLACK_BYTES);
    }
}

/// Gives back what was freed in small pieces, such as the tensors of an adapter that was read. Takes milliseconds, so it is
/// for a thread that is about to wait.
pub(crate) fn give_back_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: tells the system which pages of the heaps hold nothing; each heap is locked meanwhile.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arena_takes_half_of_what_is_free_and_no_more_than_is_useful() {
        assert_eq!(arena_bytes_auto(Some(2 << 30), u64::MAX), 1 << 30);
        assert_eq!(arena_bytes_auto(Some(64 << 30), u64::MAX), ARENA_BYTES_AUTO_MAX);
        assert_eq!(arena_bytes_auto(Some(64 << 30), 5 << 20), 5 << 20);
        assert_eq!(arena_bytes_auto(None, u64::MAX), 1 << 30);
    }

    #[test]
    fn adapters_get_half_of_what_is_free_and_no_more_than_the_documented_default() {
        assert_eq!(host_adapter_bytes(Some(6 << 30)), 3 << 30);
        assert_eq!(host_adapter_bytes(Some(64 << 30)), HOST_ADAPTER_BYTES_AUTO_MAX);
        assert_eq!(host_adapter_bytes(None), HOST_ADAPTER_BYTES_AUTO_MAX);
    }
}
