//! Mounting and unmounting.
//!
//! Order at mount: superblock (see `super_source`), gate, journal replay (see `replay`), superblock
//! and gate again (a replay may change both), groups, journal, and when writing is allowed the
//! mark that the image is in use, then the orphans. A mount that is refused has written nothing,
//! but where the device itself fails. Order at unmount: data, inodes,
//! journal, superblock; the mark goes last, when everything else is on the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uext_blockdev::{BlockDevice, mutant};
use uext_jbd2::{Journal, JournalConfig};
use uext_ondisk::InodeNumber;
use uext_ondisk::superblock::{State, Superblock};
use uext_pagecache::{BufferCache, CacheConfig, PageCache};
use uext_sync::Mutex;
use uext_vfs::{Errno, RemountFlags, Timestamp};

use crate::error::{Error, Result};
use crate::errors::earlier_errors;
use crate::fs::Ext4;
use crate::gate::{self, MountError};
use crate::groups::Groups;
use crate::inode::Inode;
use crate::inode_cache::InodeCache;
use crate::journal_data;
use crate::journal_inode::journal_map;
use crate::journal_place::JournalPlace;
use crate::last_search::LastSearches;
use crate::listings::Listings;
use crate::loaded_maps::LoadedMaps;
use crate::memory_plan::MemoryPlan;
use crate::options::{Atime, MountOptions};
use crate::orphan::OrphanList;
use crate::quiet::QuietDevice;
use crate::readdir::Ties;
use crate::replay;
use crate::super_source;
use crate::system_zone::SystemZone;
use crate::xattr_share::XattrShare;

type Device = Arc<dyn BlockDevice>;

impl Ext4 {
    /// Mounts the filesystem on a device. `name` is what messages call it.
    ///
    /// # Errors
    /// A refusal, or what is broken, in one line.
    pub fn mount(
        dev: Device,
        name: &str,
        options: &MountOptions,
    ) -> std::result::Result<Arc<Self>, MountError> {
        if options.norecovery && !options.read_only {
            return Err(MountError::Options("norecovery needs a read-only mount: add `-o ro`"));
        }
        let mut options = options.clone();
        options.read_only |= dev.limits().read_only && !options.rw_explicit;
        if dev.limits().read_only && !options.read_only {
            return Err(MountError::ReadOnlyOnly("the device cannot be written".into()));
        }
        let found = super_source::find(dev.as_ref(), &options)?;
        let verdict = gate::check(&found.sb, &options)?;
        let (dev, journal) = replay::recover(dev, name, &found, &options, verdict.read_only)?;
        let sb = super_source::read_primary(dev.as_ref())?;
        let verdict = gate::check(&sb, &options)?;
        if let Some(errors) = earlier_errors(&sb) {
            log::warn!("{name}: {errors}");
        }
        if let Some(reason) = &verdict.reason {
            log::warn!("{name}: mounted read-only: {reason}");
        }
        let watched = !sb.features().has_journal() && !verdict.read_only;
        let quiet = watched.then(|| QuietDevice::new(dev.clone()));
        let dev = quiet.clone().map_or(dev, |quiet| quiet as Device);
        let fs = Self::prepare(dev, journal, name, sb, options, verdict.read_only)?;
        if !fs.is_read_only() {
            fs.mark_mounted()?;
            // As with the kernel, what cannot be cleaned is noted and stops no mount.
            if let Err(error) = fs.clean_orphans() {
                fs.report(None, &error);
            }
        }
        if let Some(quiet) = quiet {
            fs.watch_quiet(quiet);
        }
        Ok(fs)
    }

    /// Everything a mount does that may end in a refusal, but for the replay; nothing is written.
    pub(crate) fn prepare(
        dev: Device,
        external: Option<JournalPlace>,
        name: &str,
        sb: Superblock,
        options: MountOptions,
        read_only: bool,
    ) -> std::result::Result<Arc<Self>, MountError> {
        journal_data::check_mode(&options, &sb, read_only)?;
        let fs = Self::assemble(dev, external, name, sb, options, read_only)?;
        let root = fs.iget(InodeNumber::ROOT)?;
        if !root.is_dir() {
            let corrupt = uext_ondisk::Corrupt::value("root inode", "is not a directory");
            return Err(Error::from(corrupt).into());
        }
        fs.inodes.count_lookup(&root);
        if !read_only {
            fs.open_orphan_file()?;
        }
        Ok(fs)
    }

    fn assemble(
        dev: Device,
        external: Option<JournalPlace>,
        name: &str,
        sb: Superblock,
        options: MountOptions,
        read_only: bool,
    ) -> Result<Arc<Self>> {
        let mut config = CacheConfig { background: options.background, ..CacheConfig::default() };
        let plan = MemoryPlan::of(options.cache_bytes.unwrap_or(config.limit_bytes));
        config.limit_bytes = plan.page_bytes;
        let cache = PageCache::new(config);
        let buffers = BufferCache::new(&cache, dev.clone(), sb.block_size());
        let maps = LoadedMaps::new(plan.bitmap_bytes / sb.block_size() as usize);
        let groups = Groups::load(&sb, &buffers, maps)?;
        let descs = sb.groups().map(|g| groups.checked(&sb, g));
        let system_zone = SystemZone::new(&sb, descs, !read_only)?;
        let mut overhead = sb.first_data_block().0 + system_zone.blocks();
        if let Some(ino) = sb.journal_inum() {
            let map = journal_map(dev.as_ref(), &sb, ino)?;
            overhead += u64::from(map.block_count());
        }
        let journal = if sb.features().has_journal() && !read_only {
            let (device, map) = match external {
                Some(JournalPlace { external: Some(device), map }) => (device, map),
                _ => {
                    let ino = sb.journal_inum().unwrap_or(InodeNumber::JOURNAL);
                    (dev.clone(), journal_map(dev.as_ref(), &sb, ino)?)
                }
            };
            let config = JournalConfig {
                commit_interval: options.commit_interval,
                barrier: options.barrier,
                csum_v3: sb.features().metadata_csum(),
                wide: sb.features().bit64(),
                cached_blocks: plan.journal_blocks(sb.block_size()),
                background: options.background,
                commit_each_handle: options.commit_each_handle,
            };
            Journal::open(device, map, *sb.uuid().as_bytes(), buffers.clone(), config)?
        } else {
            Journal::none(buffers.clone())
        };
        let data_mode = journal_data::data_mode(&options, &sb);
        let super_buf = buffers.bread(sb.super_block().0)?;
        let space = Self::initial_space(&groups);
        let atime = Atime::new(options.atime, options.nodiratime);
        let batches = crate::batch::Batch::pool(sb.block_size());
        let fs = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            name: name.to_owned(),
            data_mode,
            options,
            live_super: Mutex::new(sb.clone()),
            sb,
            super_buf,
            cache,
            buffers,
            journal,
            groups,
            system_zone,
            overhead,
            space,
            allocations: crate::alloc_fault::AllocationFault::default(),
            batches,
            inodes: InodeCache::new(plan.inodes),
            orphans: Mutex::new(OrphanList::default()),
            ties: Ties::default(),
            listings: Listings::default(),
            last_searches: LastSearches::default(),
            xattr_share: XattrShare::default(),
            rename: Mutex::new(()),
            read_only: AtomicBool::new(read_only),
            atime,
            quiet: Mutex::new(None),
            mounted_writable: !read_only,
            shut_down: AtomicBool::new(false),
            had_error: AtomicBool::new(false),
            errors_pending: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            on_read_only: Mutex::new(None),
            replaced: Mutex::default(),
            pace: crate::past_cache::Pace::default(),
        });
        let weak = Arc::downgrade(&fs);
        fs.journal.on_commit(Box::new(move |tid| {
            if let Some(fs) = weak.upgrade() {
                fs.release_freed(tid);
            }
        }));
        let weak = Arc::downgrade(&fs);
        fs.journal.on_abort(Box::new(move |why| {
            if let Some(fs) = weak.upgrade() {
                fs.journal_aborted(why);
            }
        }));
        let weak = Arc::downgrade(&fs);
        fs.journal.before_commit(Box::new(move || {
            if let Some(fs) = weak.upgrade() {
                fs.store_errors();
                fs.flush_replaced(None);
            }
        }));
        Ok(fs)
    }

    /// Writes into the superblock that the image is in use: with a journal that it needs
    /// recovery, without one that it is not clean.
    fn mark_mounted(&self) -> Result<()> {
        self.write_super(|sb| {
            if self.journal.has_journal() {
                sb.set_needs_recovery(!mutant!("needs-recovery-not-set"));
                if self.uses_orphan_file() {
                    sb.set_orphan_present(true);
                }
            } else if !mutant!("dirty-flag-not-set") {
                let state = sb.state() - State::VALID;
                sb.set_state(state);
            }
            sb.set_mount_time(u64::try_from(Timestamp::now().sec).unwrap_or(0));
            sb.set_mount_count(sb.mount_count().saturating_add(1));
        })
    }

    /// Writes all data, inodes and metadata; everything before is durable when it returns.
    pub(crate) fn sync_all(&self) -> Result<()> {
        self.stopped()?;
        if self.is_read_only() || self.is_shut_down() {
            return Ok(());
        }
        self.store_errors();
        let inodes = self.inodes.to_sync();
        let mut first_error = self.write_small_files(&inodes).err();
        for inode in inodes {
            self.wait_for_deletion(&inode);
            let written = self.flush_data(&inode).and_then(|()| self.write_lazy(&inode));
            if let Err(error) = written {
                self.report(Some(inode.ino), &error);
                first_error.get_or_insert(error);
            }
        }
        if self.journal.has_journal() {
            self.journal.commit_all()?;
        } else {
            self.buffers.write_dirty()?;
        }
        self.barrier()?;
        first_error.map_or(Ok(()), Err)
    }

    /// Waits for a deletion that has begun: a file goes after its unlink has returned, when the
    /// kernel forgets it, and who syncs takes it to be gone.
    fn wait_for_deletion(&self, inode: &Inode) {
        if inode.core.lock().nlink == 0 && self.inodes.lookups(inode.ino) == 0 {
            drop(inode.rwsem.read());
        }
    }

    /// Makes a live mount read-only, with a clean image, or writable again, and sets when access
    /// times are kept. The front end lets nothing through that would write while it is read-only.
    ///
    /// # Errors
    /// `EROFS` when it cannot be written: it was mounted read-only, or an error made it so.
    pub(crate) fn remount(&self, flags: RemountFlags) -> Result<()> {
        self.check_alive()?;
        let read_only = flags.contains(RemountFlags::READ_ONLY);
        if read_only != self.is_read_only() {
            self.set_read_only(read_only)?;
        }
        self.atime.change(flags);
        Ok(())
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        if !read_only {
            if !self.mounted_writable || self.had_error() || self.journal.aborted().is_some() {
                return Err(Errno::EROFS.into());
            }
            self.mark_mounted()?;
            self.read_only.store(false, Ordering::Relaxed);
            log::info!("{}: remounted read-write", self.name);
            return Ok(());
        }
        self.sync_all()?;
        self.read_only.store(true, Ordering::Relaxed);
        self.journal.checkpoint_all()?;
        self.buffers.write_dirty()?;
        self.buffers.flush_device()?;
        let mut counted = Ok(());
        let orphans = self.is_orphan_present();
        self.write_super(|sb| {
            counted = self.sum_counts(sb);
            sb.set_needs_recovery(false);
            sb.set_orphan_present(orphans);
            if !self.had_error() && !self.sb.state().contains(State::ERROR) {
                let state = sb.state() | (self.sb.state() & State::VALID);
                sb.set_state(state);
            }
        })?;
        log::info!("{}: remounted read-only", self.name);
        counted
    }

    /// Deletes what is open without a name: nobody can use it after the unmount.
    fn delete_unlinked(&self) {
        for inode in self.orphan_inodes().into_iter().chain(self.inodes.all()) {
            if inode.core.lock().nlink > 0 {
                continue;
            }
            // The kernel's last forgets may come after its goodbye, or never.
            self.inodes.forget_all(inode.ino);
            // Waits for whoever deletes it already.
            if let Err(error) = self.delete_inode(&inode) {
                self.report(Some(inode.ino), &error);
            }
        }
    }

    /// Unmounts: everything to the disk, the journal empty, the superblock clean.
    pub(crate) fn unmount_all(&self) -> Result<()> {
        // Also where there is nothing to sync any more: nobody writes after an unmount.
        self.inodes.all().iter().for_each(|inode| self.wait_for_large_write(inode));
        if self.is_shut_down() {
            // The image stays as the shutdown left it: the next mount replays the journal.
            let _ = self.journal.close();
            return Ok(());
        }
        if self.is_read_only() && self.journal.aborted().is_none() && !self.had_error() {
            // Mounted again for writing, this one stays for as long as the other.
            self.cache.drop_clean();
            return Ok(());
        }
        let watch = self.quiet.lock().take();
        drop(watch);
        self.delete_unlinked();
        let synced = self.sync_all();
        self.journal.close()?;
        self.buffers.write_dirty()?;
        self.buffers.flush_device()?;
        let clean = synced.is_ok();
        let mut counted = Ok(());
        let orphans = self.is_orphan_present();
        self.write_super(|sb| {
            counted = self.sum_counts(sb);
            if clean {
                sb.set_needs_recovery(false);
                sb.set_orphan_present(orphans);
                if !self.had_error() && !self.sb.state().contains(State::ERROR) {
                    // Without a journal an image that was not clean at mount (`force`) stays so.
                    let was_valid = self.sb.state() & State::VALID;
                    let state = sb.state() | was_valid;
                    sb.set_state(state);
                }
            }
        })?;
        counted.and(synced)
    }

    pub(crate) fn had_error(&self) -> bool {
        self.had_error.load(Ordering::Relaxed)
    }
}
