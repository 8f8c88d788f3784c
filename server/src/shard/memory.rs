//! How much memory the arena gets.

/// Bytes the arena gets at most when nothing was asked for. Enough for hundreds of long sequences of a small model, and
/// the memory is reserved, not touched: pages that no step used cost nothing.
const ARENA_BYTES_AUTO_MAX: u64 = 4 << 30;

/// Arena bytes when `--arena-bytes` is not given: half of what is free now, at most [`ARENA_BYTES_AUTO_MAX`], and never
/// more than `useful` (what the largest batch of full contexts could fill).
pub(crate) fn arena_bytes_auto(available: Option<u64>, useful: u64) -> u64 {
    let half = available.map_or(1 << 30, |bytes| bytes / 2);
    half.min(ARENA_BYTES_AUTO_MAX).min(useful)
}

/// `MemAvailable` of the kernel, bytes, or the control group's limit where that is less.
pub(crate) fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some((kib << 10).min(limit.unwrap_or(u64::MAX)))
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
}
