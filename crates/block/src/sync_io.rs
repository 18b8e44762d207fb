//! Requests carried out by blocking system calls: the whole of the threads engine, and what
//! io_uring leaves over (short transfers, unaligned direct I/O, zeroes that the file system cannot
//! make by itself).
#![allow(unsafe_code)] // preadv2, pwritev2, fallocate, ioctl

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;

use crate::buffer::Aligned;
use crate::{Buffer, Op, SECTOR};

/// Most iovecs that one system call takes (IOV_MAX).
pub(crate) const IOV_MAX: usize = 1024;
/// Bytes that pass through a bounce buffer at a time.
const BOUNCE: usize = 1 << 20;
/// `_IO(0x12, 119)` and `_IO(0x12, 127)` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// What direct I/O must be aligned to, in bytes; powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectAlign {
    pub memory: usize,
    pub offset: usize,
}

/// The file that an engine works on.
#[derive(Debug)]
pub struct Target {
    pub(crate) file: File,
    /// Set when the file was opened with O_DIRECT.
    pub(crate) direct: Option<DirectAlign>,
    pub(crate) block_device: bool,
    /// Flushes are not passed on (cache=unsafe).
    pub(crate) no_flush: bool,
    /// Bytes of a logical block.
    pub(crate) logical: u64,
    /// Serialises writes that have to read the rest of a block first.
    pub(crate) rmw: Mutex<()>,
}

impl Target {
    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Whether this transfer has to go through a bounce buffer.
    pub(crate) fn needs_bounce(&self, offset: u64, buffer: &Buffer) -> bool {
        self.direct.is_some_and(|a| {
            !offset.is_multiple_of(a.offset as u64)
                || !buffer.len().is_multiple_of(a.offset)
                || !buffer.aligned_to(a.memory)
        })
    }

    /// Carries `op` out and returns when it is done.
    pub fn run(&self, op: Op, buffer: &Buffer) -> io::Result<()> {
        match op {
            Op::Read { offset } if self.needs_bounce(offset, buffer) => {
                self.read_bounced(offset, buffer)
            }
            Op::Read { offset } => {
                let n = self.transfer(offset, buffer.iovecs(), Way::Read)?;
                buffer.zero_from(n);
                Ok(())
            }
            Op::Write { offset, durable } => {
                let way = if durable && !self.no_flush { Way::WriteDurable } else { Way::Write };
                if self.needs_bounce(offset, buffer) {
                    return self.write_bounced(offset, buffer, way);
                }
                match self.transfer(offset, buffer.iovecs(), way)? {
                    n if n == buffer.len() => Ok(()),
                    _ => Err(io::ErrorKind::WriteZero.into()),
                }
            }
            Op::Flush if self.no_flush => Ok(()),
            Op::Flush => self.file.sync_data(),
            Op::Discard { offset, len } => self.discard(offset, len),
            Op::WriteZeroes { offset, len, unmap } => self.write_zeroes(offset, len, unmap),
        }
    }

    /// Reads or writes until all is done or the file ends; returns the bytes done.
    fn transfer(&self, offset: u64, iov: &[libc::iovec], way: Way) -> io::Result<usize> {
        let mut left: Vec<libc::iovec> = iov.to_vec();
        let mut rest = left.as_mut_slice();
        let mut done = 0;
        while !rest.is_empty() {
            let at = offset + done as u64;
            let n = match way.call(self.fd(), &rest[..rest.len().min(IOV_MAX)], at) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            done += n;
            rest = advance(rest, n);
        }
        Ok(done)
    }

    fn read_bounced(&self, offset: u64, buffer: &Buffer) -> io::Result<()> {
        let align = self.align();
        let mut done = 0;
        let mut bounce = Aligned::new(BOUNCE, align);
        while done < buffer.len() {
            let at = offset + done as u64;
            let head = (at % align as u64) as usize;
            let want = (buffer.len() - done).min(BOUNCE - head);
            self.read_window(at - head as u64, &mut bounce, (head + want).next_multiple_of(align))?;
            buffer.copy_from(done, &bounce.bytes()[head..head + want]);
            done += want;
        }
        Ok(())
    }

    /// Fills the first `len` bytes of `bounce`; zeroes past the end of the file.
    fn read_window(&self, at: u64, bounce: &mut Aligned, len: usize) -> io::Result<()> {
        let n = self.transfer(at, &[bounce.iovec(len)], Way::Read)?;
        bounce.bytes_mut()[n.min(len)..len].fill(0);
        Ok(())
    }

    fn write_bounced(&self, offset: u64, buffer: &Buffer, way: Way) -> io::Result<()> {
        let align = self.align();
        let ragged = !offset.is_multiple_of(align as u64) || !buffer.len().is_multiple_of(align);
        let _guard = ragged.then(|| self.rmw.lock().unwrap_or_else(|e| e.into_inner()));
        let mut done = 0;
        let mut bounce = Aligned::new(BOUNCE, align);
        while done < buffer.len() {
            let at = offset + done as u64;
            let head = (at % align as u64) as usize;
            let want = (buffer.len() - done).min(BOUNCE - head);
            let window = (head + want).next_multiple_of(align);
            let start = at - head as u64;
            if window != want {
                self.read_window(start, &mut bounce, window)?;
            }
            buffer.copy_to(done, &mut bounce.bytes_mut()[head..head + want]);
            if self.transfer(start, &[bounce.iovec(window)], way)? != window {
                return Err(io::ErrorKind::WriteZero.into());
            }
            done += want;
        }
        Ok(())
    }

    fn align(&self) -> usize {
        self.direct.map_or(SECTOR as usize, |a| a.offset.max(a.memory)).min(BOUNCE)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let done = if self.block_device {
            // Only whole blocks; a discard is a hint, so the ragged ends may stay.
            let start = offset.next_multiple_of(self.logical);
            let end = (offset + len) / self.logical * self.logical;
            if start >= end {
                return Ok(());
            }
            self.range_ioctl(BLKDISCARD, start, end - start)
        } else {
            self.fallocate(PUNCH, offset, len)
        };
        match done {
            Err(e) if unsupported(&e) => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mut result = Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        if unmap {
            result = self.fallocate(PUNCH, offset, len);
        }
        if result.as_ref().is_err_and(unsupported) {
            result = if self.block_device {
                self.range_ioctl(BLKZEROOUT, offset, len)
            } else {
                self.fallocate(libc::FALLOC_FL_ZERO_RANGE, offset, len)
            };
        }
        match result {
            Err(e) if unsupported(&e) => self.write_zero_bytes(offset, len),
            other => other,
        }
    }

    fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = Buffer::zeroes(BOUNCE.min(usize::try_from(len).unwrap_or(BOUNCE)));
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let left = len - done;
            if left >= zeroes.len() as u64 {
                self.run(Op::Write { offset: at, durable: false }, &zeroes)?;
                done += zeroes.len() as u64;
            } else {
                let tail = Buffer::zeroes(left as usize);
                self.run(Op::Write { offset: at, durable: false }, &tail)?;
                done = len;
            }
        }
        Ok(())
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        let range = (libc::off_t::try_from(offset), libc::off_t::try_from(len));
        let (Ok(offset), Ok(len)) = range else {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        };
        loop {
            // SAFETY: only numbers are passed.
            if unsafe { libc::fallocate(self.fd(), mode, offset, len) } == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
    }

    fn range_ioctl(&self, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: both requests read two u64.
        match unsafe { libc::ioctl(self.fd(), request, range.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// fallocate mode of a hole.
pub(crate) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// Whether the host says that it cannot do this at all (as against: it failed).
pub(crate) fn unsupported(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL | libc::ENODEV)
    )
}

#[derive(Clone, Copy)]
enum Way {
    Read,
    Write,
    WriteDurable,
}

impl Way {
    fn call(self, fd: RawFd, iov: &[libc::iovec], offset: u64) -> io::Result<usize> {
        let count = iov.len() as libc::c_int;
        let at = offset as libc::off_t;
        // SAFETY: the iovecs point into memory that the caller's buffer keeps alive.
        let n = unsafe {
            match self {
                Self::Read => libc::preadv(fd, iov.as_ptr(), count, at),
                Self::Write => libc::pwritev(fd, iov.as_ptr(), count, at),
                Self::WriteDurable => libc::pwritev2(fd, iov.as_ptr(), count, at, libc::RWF_DSYNC),
            }
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

/// What is left of `iov` after `n` bytes.
fn advance(mut iov: &mut [libc::iovec], mut n: usize) -> &mut [libc::iovec] {
    while let Some(first) = iov.first_mut() {
        if n < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(n);
            first.iov_len -= n;
            break;
        }
        n -= first.iov_len;
        iov = &mut iov[1..];
    }
    iov
}
