//! What processes cost: processor time and memory, from `/proc`. Where there is none, nothing is known.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// User and system time of this process, s.
pub(super) fn own_cpu_s() -> f64 {
    // SAFETY: `rusage` is plain numbers, for which zero bytes are valid; the call fills in this one.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// A process and all that it started, as one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tree {
    pub(super) root_pid: u32,
}

impl Tree {
    /// Processor time of those that live, s. `None` if the root is gone.
    pub(super) fn cpu_s(self) -> Option<f64> {
        // SAFETY: the call reads a constant of the system.
        let ticks_per_s = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        let ticks: u64 = self.each(cpu_ticks)?;
        Some(ticks as f64 / ticks_per_s.max(1) as f64)
    }

    /// Resident memory of all, bytes; what they share counts in each. `None` if the root is gone.
    pub(super) fn rss_bytes(self) -> Option<u64> {
        self.each(rss_bytes)
    }

    fn each(self, read: fn(&Path) -> Option<u64>) -> Option<u64> {
        let of = |pid: &u32| read(Path::new(&format!("/proc/{pid}")));
        of(&self.root_pid)?;
        Some(self.pids().iter().filter_map(of).sum())
    }

    fn pids(self) -> BTreeSet<u32> {
        let (mut found, mut waiting) = (BTreeSet::new(), vec![self.root_pid]);
        while let Some(pid) = waiting.pop() {
            if !found.insert(pid) {
                continue;
            }
            // Each thread has the list of those that it started.
            let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for thread in threads {
                let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
                waiting.extend(children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
            }
        }
        found
    }
}

fn cpu_ticks(process: &Path) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // The name is in parentheses and may hold anything; user and system time are the 12th and 13th field behind it.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_ascii_whitespace().skip(11).map_while(|field| field.parse::<u64>().ok());
    Some(times.next()? + times.next()?)
}

fn rss_bytes(process: &Path) -> Option<u64> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_ascii_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_tree_has_the_memory_and_the_time_of_its_children() {
        let tree = Tree { root_pid: std::process::id() };
        let alone = tree.rss_bytes().unwrap();
        // `read` waits for its input, so the child lives until it is dropped.
        let mut child = Command::new("sh").args(["-c", "read x"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        assert!(tree.pids().contains(&child.id()));
        assert!(alone > 1 << 20 && tree.rss_bytes().unwrap() > 0);
        let before = (own_cpu_s(), tree.cpu_s().unwrap());
        let mut sum = 0u64;
        while own_cpu_s() - before.0 < 0.05 {
            sum = sum.wrapping_mul(31).wrapping_add(1);
        }
        assert!(tree.cpu_s().unwrap() >= before.1, "{sum}");
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(Tree { root_pid: child.id() }.rss_bytes(), None);
    }
}
