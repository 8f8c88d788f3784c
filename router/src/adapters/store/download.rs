//! A directory that becomes a content: room reserved first, files written, then renamed into place at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::file_bytes;
use super::error::StoreError;
use super::record::{FileRecord, FilesId, PartialFile, PartialRecord, Record, files_id};
use super::sink::FileSink;
use super::state::{Content, Partial, Room, Trash};
use super::{Held, Shared, Stored, now_ns};
use crate::adapters::fetch::Tenant;
use crate::adapters::types::{FileName, RemoteFile};

/// Rounds of making room before the disk counts as full.
const ROUNDS_MAX: usize = 16;

/// Bytes that a download takes on disk beside its files: rounding to blocks, directories, its record.
const ROUNDING_BYTES: u64 = 64 << 10;

/// A download's directory and its reservation. Dropping it gives back both. Every method may wait for the disk.
pub(crate) struct Download {
    shared: Arc<Shared>,
    identity: Arc<str>,
    tenant: Tenant,
    dir: PathBuf,
    reserved: u64,
    start: [u64; 2],
    /// The directory was renamed or given to somebody else.
    gone: bool,
}

impl Download {
    /// Reserves room for `files` and takes over what an earlier download of the same bytes left.
    ///
    /// # Errors
    /// No room, or the directory could not be made.
    pub(super) fn begin(
        shared: &Arc<Shared>,
        identity: &str,
        tenant: Tenant,
        files: &[RemoteFile; 2],
    ) -> Result<Self, StoreError> {
        let identity: Arc<str> = identity.into();
        let found = shared.state().partials.remove(&identity);
        let payer = found.as_ref().map(|partial| partial.tenant);
        let mut download = match found {
            Some(partial) => Self::take_over(shared, identity, tenant, partial, files),
            None => Self {
                shared: Arc::clone(shared),
                identity,
                tenant,
                dir: shared.scratch(),
                reserved: 0,
                start: [0; 2],
                gone: false,
            },
        };
        let have = download.reserved;
        let total: u64 = files.iter().map(|file| file.bytes).fold(0, u64::saturating_add);
        let made = download.reserve(total.saturating_sub(have)).and_then(|()| download.prepare_dir(files));
        match made {
            Ok(()) => Ok(download),
            Err(error) => {
                if let Some(payer) = payer {
                    download.charge_to(payer); // who may not have it does not pay for what was there
                    download.keep();
                }
                Err(error)
            }
        }
    }

    /// Turns an idle partial into a download; its bytes become the first part of the reservation.
    fn take_over(
        shared: &Arc<Shared>,
        identity: Arc<str>,
        tenant: Tenant,
        partial: Partial,
        files: &[RemoteFile; 2],
    ) -> Self {
        let Partial { dir, bytes, tenant: payer, .. } = partial;
        let known = shared.disk.read(&dir.join(PartialRecord::FILE)).ok();
        let known: Option<PartialRecord> = known.and_then(|text| serde_json::from_slice(&text).ok());
        let start = files.each_ref().map(|file| {
            let same = known.as_ref().is_some_and(|known| known.files.iter().any(|old| old.is_same_as(file)));
            let path = dir.join(file.name.as_str());
            let found = file_bytes(&path).filter(|bytes| same && *bytes <= file.bytes).unwrap_or(0);
            if found == 0 {
                let _ = shared.disk.remove_file(&path); // if it stays, making it anew fails the download
            }
            found
        });
        let reserved = start.iter().sum();
        let mut state = shared.state();
        state.accounts.remove(payer, bytes);
        state.accounts.reserve(tenant.id, reserved);
        drop(state);
        Self { shared: Arc::clone(shared), identity, tenant, dir, reserved, start, gone: false }
    }

    /// Moves the reservation to another account.
    fn charge_to(&mut self, payer: u64) {
        let mut state = self.shared.state();
        state.accounts.release(self.tenant.id, self.reserved);
        state.accounts.reserve(payer, self.reserved);
        drop(state);
        self.tenant = payer.into();
    }

    fn reserve(&mut self, need: u64) -> Result<(), StoreError> {
        for _ in 0..ROUNDS_MAX {
            let room = self.shared.state().plan_room(self.tenant, need)?;
            match room {
                Room::Reserved => {
                    self.reserved += need;
                    return self.ensure_free(need);
                }
                Room::SweepFirst => self.shared.sweep(),
            }
        }
        let reason = "what was evicted could not be removed, or others took its room".into();
        Err(StoreError::Full { need_bytes: need, reason })
    }

    /// The disk may be smaller than the quota: then it is the disk that contents give way for.
    fn ensure_free(&self, need: u64) -> Result<(), StoreError> {
        let tmp = self.shared.layout.tmp();
        let free = || {
            let free = self.shared.disk.free_bytes(&tmp);
            free.map_err(|error| StoreError::from_io(&error, "ask for the free space", &tmp))
        };
        for _ in 0..ROUNDS_MAX {
            let short = need.saturating_add(ROUNDING_BYTES).saturating_sub(free()?);
            if short == 0 {
                return Ok(());
            }
            if !self.shared.state().plan_free(short) {
                break;
            }
            self.shared.sweep();
        }
        let reason = format!("the disk of the data directory has {} bytes free", free()?);
        Err(StoreError::Full { need_bytes: need, reason })
    }

    fn prepare_dir(&self, files: &[RemoteFile; 2]) -> Result<(), StoreError> {
        let disk = &self.shared.disk;
        let note = PartialRecord {
            identity: self.identity.to_string(),
            tenant: self.tenant.id,
            files: files.iter().map(PartialFile::new).collect(),
        };
        let path = self.dir.join(PartialRecord::FILE);
        let made = disk.create_dir(&self.dir).and_then(|_| {
            disk.remove_file(&path)?;
            let text = serde_json::to_vec(&note)?;
            disk.create(&path).and_then(|mut file| disk.write(&mut file, &text))
        });
        made.map_err(|error| StoreError::from_io(&error, "make a download's directory", &path))
    }

    /// Bytes of `name` that are here already.
    pub(crate) fn start(&self, name: FileName) -> u64 {
        let [config, weights] = self.start;
        match name {
            FileName::Config => config,
            FileName::Weights => weights,
        }
    }

    /// Opens `planned` for writing, behind what is here already, which is hashed again.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn open(&self, planned: &RemoteFile) -> Result<FileSink, StoreError> {
        FileSink::open(&self.shared, self.dir.join(planned.name.as_str()), planned, self.start(planned.name))
    }

    /// Makes the files the content of the identity. They were compared with every promise before.
    ///
    /// # Errors
    /// The file system's; then nothing is left of the download.
    pub(crate) fn publish(mut self, files: [FileRecord; 2]) -> Result<Stored, StoreError> {
        let id = files_id(&files);
        let stored = self.place(&id, &files)?;
        let record = Record { identity: self.identity.to_string(), files, tenant: self.tenant.id, content: None };
        let shared = Arc::clone(&self.shared);
        let earlier = shared.state().known.get(&self.identity).map(|known| known.record.clone());
        let record = Record { content: earlier.filter(|old| old.files == files).and_then(|old| old.content), ..record };
        shared.write_record(&record)?;
        let mut state = shared.state();
        let now = state.tick(now_ns());
        state.learn(record, now);
        if let Some(content) = state.contents.get_mut(&id) {
            content.live = true;
            content.last_used = now;
        }
        drop(state);
        Ok(stored)
    }

    /// Renames the directory into its place, unless the same content is there. It is not live before its record is written.
    fn place(&mut self, id: &FilesId, files: &[FileRecord; 2]) -> Result<Stored, StoreError> {
        let shared = Arc::clone(&self.shared);
        let (disk, fan, target) = (&shared.disk, shared.layout.fan(id), shared.layout.content(id));
        let error = |error: &std::io::Error, path: &Path| StoreError::from_io(error, "publish an adapter", path);
        disk.remove_file(&self.dir.join(PartialRecord::FILE)).map_err(|found| error(&found, &self.dir))?;
        disk.sync_dir(&self.dir).map_err(|found| error(&found, &self.dir))?;
        let namespace = shared.namespace();
        if let Some(stored) = shared.hold(id, false) {
            let damaged = shared.state().contents.get(id).is_some_and(|content| content.damaged);
            if damaged {
                self.replace(id, &target).map_err(|found| error(&found, &target))?;
            }
            return Ok(stored); // somebody else's bytes are the same; dropping this download removes ours
        }
        if disk.create_dir(&fan).map_err(|found| error(&found, &fan))? {
            disk.sync_dir(&shared.layout.root).map_err(|found| error(&found, &fan))?;
        }
        if target.exists() {
            shared.discard(&target); // not known, so nobody has it: left by a removal that failed
        }
        disk.rename(&self.dir, &target).map_err(|found| error(&found, &target))?;
        self.gone = true;
        let bytes = files.iter().map(|file| file.bytes).sum();
        let held = Arc::new(Held { shared: Arc::clone(&shared), files_id: *id });
        let content = Content {
            bytes,
            tenant: self.tenant.id,
            live: false,
            damaged: false,
            guard: Arc::downgrade(&held),
            last_used: 0,
        };
        let mut state = shared.state();
        state.accounts.release(self.tenant.id, std::mem::take(&mut self.reserved));
        state.accounts.add(self.tenant.id, bytes);
        state.contents.insert(*id, content);
        drop(state);
        drop(namespace);
        let stored = Stored { dir: target.as_path().into(), files_id: *id, bytes, _held: held };
        disk.sync_dir(&fan).map_err(|found| error(&found, &fan))?; // on an error `held` goes, and with it the directory
        Ok(stored)
    }

    /// Puts the files into the place of damaged ones. Who holds those has these from then on.
    fn replace(&mut self, id: &FilesId, target: &Path) -> std::io::Result<()> {
        let (shared, aside) = (Arc::clone(&self.shared), self.shared.scratch());
        shared.disk.rename(target, &aside)?;
        if let Err(error) = shared.disk.rename(&self.dir, target) {
            let _ = shared.disk.rename(&aside, target); // else they are missing, which is no worse than damaged
            return Err(error);
        }
        self.gone = true;
        let mut state = shared.state();
        state.accounts.release(self.tenant.id, std::mem::take(&mut self.reserved));
        if let Some(content) = state.contents.get_mut(id) {
            content.damaged = false;
            let (bytes, payer) = (content.bytes, std::mem::replace(&mut content.tenant, self.tenant.id));
            state.accounts.add(self.tenant.id, bytes);
            state.trash.insert(aside, Trash { bytes, tenant: payer });
        }
        drop(state);
        target.parent().map_or(Ok(()), |fan| shared.disk.sync_dir(fan))
    }

    /// Stops, and leaves the bytes for a later download of the same identity.
    pub(crate) fn keep(mut self) {
        let bytes: u64 = FileName::ALL.iter().filter_map(|name| file_bytes(&self.dir.join(name.as_str()))).sum();
        if bytes == 0 || bytes > self.reserved {
            return; // nothing to keep; or it grew past what was promised, which no sink does
        }
        self.gone = true;
        let mut state = self.shared.state();
        state.accounts.release(self.tenant.id, std::mem::take(&mut self.reserved));
        state.accounts.add(self.tenant.id, bytes);
        let last_used = state.tick(now_ns());
        let partial = Partial { dir: self.dir.clone(), bytes, tenant: self.tenant.id, last_used };
        state.trash_partial(&self.identity); // there is none: one download runs for an identity
        state.partials.insert(Arc::clone(&self.identity), partial);
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let reserved = std::mem::take(&mut self.reserved);
        state.accounts.release(self.tenant.id, reserved);
        if !self.gone {
            // The reservation's bytes stay counted until the files are unlinked.
            state.accounts.add(self.tenant.id, reserved);
            state.trash.insert(self.dir.clone(), Trash { bytes: reserved, tenant: self.tenant.id });
        }
        drop(state);
        super::in_background(&self.shared, |shared| shared.sweep());
    }
}
