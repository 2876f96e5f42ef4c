//! Copying one file's content, shared where the file system can, sparse where it is.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
};

use rustix::{fs::SeekFrom, io::Errno};

const CALL_BYTES: u64 = 64 * 1024 * 1024;

/// Copies the content of `from` into the empty file `to`: as a clone, else within
/// the kernel, else by hand. Holes stay holes. `keep_going` is asked between
/// steps of at most 64 MiB.
///
/// # Errors
/// Whatever the kernel answers; `Interrupted` when `keep_going` says no.
pub fn copy_contents(from: &File, to: &File, keep_going: impl Fn() -> bool) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let bytes = from.metadata()?.len();
    rustix::fs::ftruncate(to, bytes)?;
    let mut at = 0;
    while at < bytes {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(data)).unwrap_or(bytes).clamp(data, bytes);
        if data >= end {
            break;
        }
        copy_range(from, to, data, end, &keep_going)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64, keep_going: &dyn Fn() -> bool) -> io::Result<()> {
    let mut at = start;
    while at < end {
        if !keep_going() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let length = (end - at).min(CALL_BYTES);
        let (mut read_at, mut write_at) = (at, at);
        let call_bytes = usize::try_from(length).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), call_bytes) {
            // The file became shorter under us; the caller looks at it again.
            Ok(0) => return Ok(()),
            Ok(copied) => at += copied as u64,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::NOSYS | Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM) => {
                let (mut reader, mut writer) = (from, to);
                reader.seek(io::SeekFrom::Start(at))?;
                writer.seek(io::SeekFrom::Start(at))?;
                let copied = copy_by_hand(&mut reader.take(length), &mut writer)?;
                if copied == 0 {
                    return Ok(());
                }
                at += copied;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<u64> {
    let mut buffer = vec![0; 256 * 1024];
    let mut copied = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(length) => {
                to.write_all(&buffer[..length])?;
                copied += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
