//! The shard as a child process of the same binary: `loramux shard`. The two ends of one Unix socket pair; the child's is
//! its standard input, so nothing has to be named, cleaned up or guarded on disk, and the child sees the end of the file
//! when the parent dies, however it dies.

use std::io::{self, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use loramux_proto::{FromShard, ToShard, frame};
use loramux_router::engine::{Reports, Shard, ShardExit, ShardGone, ShardLauncher};

use super::{Reply, ShardOptions, dispatch, message, serve, set_kernels};

/// Starts children.
pub(crate) struct ProcessLauncher {
    /// This binary.
    pub(crate) program: PathBuf,
    pub(crate) options: ShardOptions,
    /// A child that does not take a message for this long is stopped or stuck. Without it, a step larger than the socket's
    /// buffer would hold up the engine, and with it the watchdog.
    pub(crate) write_timeout: Duration,
}

/// Variables of the server that the shard has no business with: it reads files of strangers.
const SECRETS: [&str; 15] = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_API_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "PREDIBASE_API_TOKEN",
    "LORAMUX_ADAPTER_HTTP_HEADER",
    "LORAMUX_ADMIN_KEY",
    "LORAMUX_API_KEY",
    "VLLM_API_KEY",
];

impl ShardLauncher for ProcessLauncher {
    fn launch(&mut self, reports: Reports) -> Result<Box<dyn Shard>, String> {
        let options = serde_json::to_string(&self.options).map_err(|e| e.to_string())?;
        let (ours, theirs) = UnixStream::pair().map_err(|e| format!("cannot make a socket pair: {e}"))?;
        let mut command = Command::new(&self.program);
        SECRETS.iter().for_each(|name| {
            command.env_remove(name);
        });
        let child = command
            .args(["shard", "--options", &options])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .process_group(0) // Ctrl-C in a terminal is for the server, which ends its child when it has drained
            .spawn()
            .map_err(|e| format!("cannot start `{} shard`: {e}", self.program.display()))?;
        tracing::debug!(pid = child.id(), "shard started");
        ours.set_write_timeout(Some(self.write_timeout)).map_err(|e| e.to_string())?;
        let reader = ours.try_clone().map_err(|e| e.to_string())?;
        let child = Arc::new(Mutex::new(child));
        let watched = Arc::clone(&child);
        let read = move || {
            read_reports(reader, &reports);
            reports.gone(exit_of(&watched));
        };
        std::thread::Builder::new().name("shard-reports".into()).spawn(read).map_err(|e| e.to_string())?;
        Ok(Box::new(ChildShard { socket: ours, scratch: Vec::new(), child }))
    }
}

struct ChildShard {
    socket: UnixStream,
    scratch: Vec<u8>,
    child: Arc<Mutex<Child>>,
}

impl Shard for ChildShard {
    fn send(&mut self, message: ToShard) -> Result<(), ShardGone> {
        frame::write(&mut self.socket, &mut self.scratch, &message).map_err(|error| {
            // Half a frame may be out: nothing more can be said to it. Its end is reported by the reader.
            tracing::debug!(%error, "the shard does not take messages");
            self.kill();
            ShardGone
        })
    }

    fn kill(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // An error means that it has ended already; waiting leaves no zombie.
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for ChildShard {
    fn drop(&mut self) {
        self.kill();
    }
}

fn read_reports(socket: UnixStream, reports: &Reports) {
    let (mut socket, mut scratch) = (BufReader::new(socket), Vec::new());
    loop {
        match frame::read::<FromShard>(&mut socket, &mut scratch) {
            Ok(Some(message)) => reports.message(message),
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "the shard's socket failed");
                return;
            }
        }
    }
}

/// The socket closes when the child ends, a moment before its status can be read.
fn exit_of(child: &Mutex<Child>) -> ShardExit {
    const PATIENCE: Duration = Duration::from_secs(2);
    let since = Instant::now();
    loop {
        let status = child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
        match status {
            Ok(Some(status)) => return describe(status),
            Ok(None) if since.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(1)),
            Ok(None) => {
                let reason = "it closed its socket and did not exit".into();
                return ShardExit { reason, killed_from_outside: false };
            }
            Err(e) => return ShardExit { reason: e.to_string(), killed_from_outside: false },
        }
    }
}

fn describe(status: ExitStatus) -> ShardExit {
    let signal = status.signal();
    let reason = match signal {
        Some(signal) => format!("killed by signal {signal}"),
        None => format!("exited with {}", status.code().unwrap_or_default()),
    };
    ShardExit { reason, killed_from_outside: signal == Some(libc::SIGKILL) }
}

/// Ends the process from any of its threads. Without exit handlers: the driver's would run under a thread that is in it.
fn end_now() -> ! {
    // SAFETY: ends the process; nothing of it is left to be in a wrong state.
    unsafe { libc::_exit(0) }
}

/// The child's main: standard input is the socket.
pub(crate) fn child_main(options: &ShardOptions) -> io::Result<()> {
    // A service manager may signal the whole group or control group. The server drains first; this process ends when its
    // socket closes.
    // SAFETY: `signal` with SIG_IGN installs no handler, so nothing runs in signal context.
    unsafe {
        libc::signal(libc::SIGTERM, libc::SIG_IGN);
        libc::signal(libc::SIGINT, libc::SIG_IGN);
    }
    set_kernels(options);
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let writer = Mutex::new((socket.try_clone()?, Vec::new()));
    let reply: Reply = Arc::new(move |body| {
        let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, scratch) = &mut *writer;
        // The parent is gone: nobody is left to work for.
        if frame::write(socket, scratch, &message(body)).is_err() {
            end_now();
        }
    });
    let (to_executor, inbox) = mpsc::channel();
    let for_reader = Arc::clone(&reply);
    std::thread::Builder::new().name("shard-inbox".into()).spawn(move || {
        let (mut socket, mut scratch) = (BufReader::new(socket), Vec::new());
        while let Ok(Some(received)) = frame::read::<ToShard>(&mut socket, &mut scratch) {
            if !dispatch(received, &to_executor, &for_reader) {
                return;
            }
        }
        // The parent closed the socket or broke the protocol. A step may be running: do not wait for it.
        end_now();
    })?;
    serve(options, &inbox, &reply);
    Ok(())
}
