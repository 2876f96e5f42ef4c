//! Removal that a hostile tree can neither lead outside nor exhaust.

use rustix::io::Errno;

use super::{Dir, Error, Optional};

const BATCH: usize = 1_024;

/// Removes the entry `name` with everything in it. Absent is success.
///
/// # Errors
/// Whatever the kernel answers; what was removed stays removed, and a repetition goes on.
pub fn remove(dir: &Dir, name: &[u8]) -> Result<(), Error> {
    match dir.remove_file(name) {
        Ok(()) => return Ok(()),
        Err(error) if is_directory(&error) => {}
        Err(error) if error.is_missing() => return Ok(()),
        Err(error) => return Err(error),
    }
    match dir.remove_dir(name) {
        Ok(()) => return Ok(()),
        Err(error) if error.is(Errno::NOTEMPTY) => {}
        Err(error) if error.is_missing() => return Ok(()),
        Err(error) => return Err(error),
    }
    if let Some(inside) = dir.open_dir(name).optional()? {
        empty(&inside)?;
    }
    dir.remove_dir(name).optional().map(drop)
}

/// Removes everything in `dir`, whatever its depth.
///
/// A directory that holds directories gives them to `dir` first, under new
/// names, so no path grows long, nothing recurses, and two descriptors suffice.
///
/// # Errors
/// Whatever the kernel answers; what was removed stays removed, and a repetition goes on.
pub fn empty(dir: &Dir) -> Result<(), Error> {
    let mut next_name = 0_u64;
    loop {
        let names = dir.names(BATCH)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            if is_removed(dir, &name)? {
                continue;
            }
            let Some(inside) = dir.open_dir(&name).optional()? else { continue };
            lift(&inside, dir, &mut next_name)?;
            dir.remove_dir(&name).optional()?;
        }
    }
}

/// Removes what is in `inside`, except that full directories move up to `top`.
fn lift(inside: &Dir, top: &Dir, next_name: &mut u64) -> Result<(), Error> {
    loop {
        let names = inside.names(BATCH)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            if is_removed(inside, &name)? {
                continue;
            }
            loop {
                let new_name = format!(".boilerhouse-removing-{next_name}");
                *next_name += 1;
                match inside.move_to(&name, top, new_name.as_bytes()) {
                    Ok(()) => break,
                    Err(error) if error.is(Errno::EXIST) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

/// Removes `name` unless it is a directory that holds something.
fn is_removed(dir: &Dir, name: &[u8]) -> Result<bool, Error> {
    match dir.remove_file(name) {
        Ok(()) => return Ok(true),
        Err(error) if is_directory(&error) => {}
        Err(error) if error.is_missing() => return Ok(true),
        Err(error) => return Err(error),
    }
    match dir.remove_dir(name) {
        Ok(()) => Ok(true),
        Err(error) if error.is(Errno::NOTEMPTY) => Ok(false),
        Err(error) if error.is_missing() => Ok(true),
        Err(error) => Err(error),
    }
}

fn is_directory(error: &Error) -> bool {
    error.is(Errno::ISDIR) || error.is(Errno::PERM)
}
