//! A server of the run's own: started, waited for, ended by its process id.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

use super::drive::Stop;
use super::process::Tree;
use super::record::covered;

const POLL: Duration = Duration::from_millis(2);
/// A model of many gigabytes on a slow disk.
const READY_TIMEOUT: Duration = Duration::from_secs(1800);
/// From being asked to end to being made to.
const END_TIMEOUT: Duration = Duration::from_secs(15);
/// Lines of its log that an error shows.
const LOG_LINES: usize = 12;

/// It lives as long as this does.
pub(super) struct OwnServer {
    child: Child,
    log: PathBuf,
    pub(super) url: String,
    /// What was started, secrets covered.
    pub(super) command: Vec<String>,
    pub(super) start_to_ready_s: f64,
}

impl OwnServer {
    /// Starts `loramux serve` with `typed` and waits until it is healthy. Its log goes to a file in `dir`.
    pub(super) async fn start(
        typed: &[String],
        dir: &Path,
        http: &reqwest::Client,
        stop: &mut Stop,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut args: Vec<&str> = vec!["serve", "--log-format", "json"];
        for [flag, value] in [["--port", "0"], ["--host", "127.0.0.1"], ["--admin-listen", "off"]] {
            if !has_flag(typed, flag) {
                args.extend([flag, value]);
            }
        }
        args.extend(typed.iter().map(String::as_str));
        let log = dir.join("server.log");
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(&program);
        command.args(&args).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        // Ctrl-C in a terminal is for the benchmark, which ends its server when it has told what it knows.
        command.process_group(0);
        end_with_parent(&mut command);
        let began = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let shown = program.to_string_lossy();
        let command = covered(std::iter::once(&*shown).chain(args));
        let mut server = Self { child, log, url: String::new(), command, start_to_ready_s: 0.0 };
        tokio::select! {
            ready = server.ready(http) => ready?,
            () = stop.wait() => bail!("interrupted before the server was ready"),
        }
        server.start_to_ready_s = began.elapsed().as_secs_f64();
        Ok(server)
    }

    async fn ready(&mut self, http: &reqwest::Client) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            if let Some(why) = self.ended() {
                return Err(why);
            }
            if self.url.is_empty()
                && let Some(address) = address(&fs::read_to_string(&self.log).unwrap_or_default())
            {
                self.url = format!("http://{address}");
            }
            if !self.url.is_empty()
                && let Ok(answer) = http.get(format!("{}/health", self.url)).send().await
                && answer.status().is_success()
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the server was not ready within {} s\n{}", READY_TIMEOUT.as_secs(), self.log_end());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Why it is gone, if it is.
    pub(super) fn ended(&mut self) -> Option<anyhow::Error> {
        let status = self.child.try_wait().ok()??;
        Some(anyhow!("the server ended ({status}); the end of its log:\n{}", self.log_end()))
    }

    pub(super) fn processes(&self) -> Tree {
        Tree { root_pid: self.child.id() }
    }

    fn log_end(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let shown = lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default();
        shown.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let Ok(pid) = libc::pid_t::try_from(self.child.id()) else { return };
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // SAFETY: the child has not been waited for, so the id is still its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let deadline = Instant::now() + END_TIMEOUT;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        // Errors mean that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A benchmark that is killed leaves no server behind.
fn end_with_parent(command: &mut Command) {
    #[cfg(target_os = "linux")]
    // SAFETY: between fork and exec, `prctl` with these arguments sets a flag of the new process; it allocates nothing.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
    #[cfg(not(target_os = "linux"))]
    let _ = command;
}

pub(super) fn has_flag(typed: &[String], flag: &str) -> bool {
    typed.iter().any(|text| text.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('=')))
}

/// Where a server listens, by the JSON lines of its log.
fn address(log: &str) -> Option<String> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut ready = lines.filter(|event| event["message"] == "ready");
    ready.next().and_then(|event| event["address"].as_str().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_that_of_the_ready_line() {
        let log = "x\n{\"message\":\"loading\"}\n{\"message\":\"ready\",\"address\":\"127.0.0.1:7\"}\n{\"mess";
        assert_eq!(address(log).as_deref(), Some("127.0.0.1:7"));
        assert_eq!(address("{\"message\":\"loading\"}\n"), None);
    }

    #[test]
    fn flags_are_found_with_either_form_of_their_value() {
        let typed = |text: &str| has_flag(&[text.to_owned()], "--port");
        assert!(typed("--port") && typed("--port=1"));
        assert!(!typed("--ports") && !typed("port"));
    }
}
