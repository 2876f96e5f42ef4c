//! A tree as a tar: written by hand, entry by entry, for data comes in pieces; read by
//! hand, for what describes an entry must not fill memory.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

use crate::{
    disk::{self, Time, is_kept_attribute},
    state::snapshot::{Meta, RawText, TREE_HOLES, Xattr},
};

use super::{Error, FileHead, Sink, refused};

const BLOCK: usize = 512;
/// What describes one entry may have at most: attributes of 64 KiB, and a path.
const DESCRIPTION_BYTES: u64 = 4 * 1024 * 1024;
/// The map of a sparse file may have at most.
const MAP_BYTES: usize = 64 * 1024 * 1024;
/// Data is read in pieces of this size.
const PIECE_BYTES: usize = 1024 * 1024;
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Writes a tar.
pub(super) struct ArchiveSink<W> {
    writer: W,
    name: String,
    /// Bytes behind the data of the open file up to the end of its block.
    padding: usize,
    left: u64,
}

/// The records of one extended header.
#[derive(Default)]
struct Pax(Vec<u8>);

// === impl Pax ===

impl Pax {
    fn put(&mut self, key: &[u8], value: &[u8]) {
        // The length counts its own digits.
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while rest + length.to_string().len() != length {
            length = rest + length.to_string().len();
        }
        self.0.extend_from_slice(format!("{length} ").as_bytes());
        self.0.extend_from_slice(key);
        self.0.push(b'=');
        self.0.extend_from_slice(value);
        self.0.push(b'\n');
    }
}

// === impl ArchiveSink ===

impl<W: Write + Send> ArchiveSink<W> {
    pub(super) fn new(writer: W, name: String) -> Self {
        Self { writer, name, padding: 0, left: 0 }
    }

    /// Returns what it wrote to.
    pub(super) fn into_inner(self) -> W {
        self.writer
    }

    fn failed(&self, error: io::Error) -> Error {
        disk::Error::new("write", self.name.clone(), error).into()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.writer.write_all(bytes).map_err(|error| self.failed(error))
    }

    fn entry(
        &mut self,
        kind: EntryType,
        path: &[u8],
        link: Option<&[u8]>,
        (meta, xattrs): (&Meta, &[Xattr]),
        size: u64,
        mut pax: Pax,
    ) -> Result<(), Error> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        if !place(&mut header.as_old_mut().name, path) {
            pax.put(b"path", path);
        }
        if let Some(link) = link
            && !place(&mut header.as_old_mut().linkname, link)
        {
            pax.put(b"linkpath", link);
        }
        header.set_mode(meta.mode);
        header.set_uid(u64::from(meta.uid));
        header.set_gid(u64::from(meta.gid));
        header.set_size(size);
        let Time { seconds, nanoseconds } = meta.modified;
        header.set_mtime(u64::try_from(seconds).unwrap_or(0));
        if nanoseconds != 0 || seconds < 0 {
            pax.put(b"mtime", shown_time(meta.modified).as_bytes());
        }
        for Xattr(name, value) in xattrs {
            pax.put(&[XATTR, &name.0].concat(), &value.0);
        }
        header.set_cksum();
        if !pax.0.is_empty() {
            let mut of_pax = Header::new_ustar();
            of_pax.set_entry_type(EntryType::XHeader);
            place(&mut of_pax.as_old_mut().name, b"PaxHeaders/entry");
            of_pax.set_mode(0o644);
            of_pax.set_size(pax.0.len() as u64);
            of_pax.set_cksum();
            self.write(of_pax.as_bytes())?;
            self.write(&pax.0)?;
            self.write(&[0; BLOCK][..padding(pax.0.len() as u64)])?;
        }
        self.write(header.as_bytes())
    }
}

impl<W: Write + Send> Sink for ArchiveSink<W> {
    fn root(&mut self, meta: &Meta, xattrs: &[Xattr]) -> Result<(), Error> {
        self.entry(EntryType::Directory, b"./", None, (meta, xattrs), 0, Pax::default())
    }

    fn directory(&mut self, path: &[u8], meta: &Meta, xattrs: &[Xattr]) -> Result<(), Error> {
        let path = [path, b"/"].concat();
        self.entry(EntryType::Directory, &path, None, (meta, xattrs), 0, Pax::default())
    }

    fn symlink(&mut self, path: &[u8], meta: &Meta, target: &[u8]) -> Result<(), Error> {
        self.entry(EntryType::Symlink, path, Some(target), (meta, &[]), 0, Pax::default())
    }

    fn hard_link(&mut self, path: &[u8], meta: &Meta, to: &[u8]) -> Result<(), Error> {
        self.entry(EntryType::Link, path, Some(to), (meta, &[]), 0, Pax::default())
    }

    fn file(&mut self, head: FileHead<'_>) -> Result<(), Error> {
        let FileHead { path, meta, xattrs, bytes, holes } = head;
        let of = (&meta, xattrs);
        if holes.is_empty() {
            self.entry(EntryType::Regular, path, None, of, bytes, Pax::default())?;
            (self.left, self.padding) = (bytes, padding(bytes));
            return Ok(());
        }
        let map = map_of(holes, bytes);
        let data: u64 = map.iter().map(|(_, length)| length).sum();
        let mut text = format!("{}\n", map.len());
        for (offset, length) in &map {
            text += &format!("{offset}\n{length}\n");
        }
        let mut text = text.into_bytes();
        text.resize(text.len() + padding(text.len() as u64), 0);
        let mut pax = Pax::default();
        pax.put(b"GNU.sparse.major", b"1");
        pax.put(b"GNU.sparse.minor", b"0");
        pax.put(b"GNU.sparse.name", path);
        pax.put(b"GNU.sparse.realsize", bytes.to_string().as_bytes());
        let size = text.len() as u64 + data;
        self.entry(EntryType::Regular, b"GNUSparseFile.0/sparse", None, of, size, pax)?;
        self.write(&text)?;
        (self.left, self.padding) = (data, padding(size));
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), Error> {
        let left = self.left.checked_sub(data.len() as u64);
        let too_much = || self.failed(io::Error::other("a file has more data than its size says"));
        self.left = left.ok_or_else(too_much)?;
        self.write(data)
    }

    fn end_file(&mut self) -> Result<(), Error> {
        if self.left > 0 {
            return Err(self.failed(io::Error::other("a file has less data than its size says")));
        }
        let padding = std::mem::take(&mut self.padding);
        self.write(&[0; BLOCK][..padding])
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.write(&[0; 2 * BLOCK])
    }
}

/// Puts bytes into a field of a header; `false` when they do not fit, and it has a part.
fn place(field: &mut [u8], bytes: &[u8]) -> bool {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
    bytes.len() <= field.len()
}

fn padding(bytes: u64) -> usize {
    usize::try_from(bytes.next_multiple_of(BLOCK as u64) - bytes).unwrap_or(0)
}

fn shown_time(Time { seconds, nanoseconds }: Time) -> String {
    if seconds >= 0 || nanoseconds == 0 {
        return format!("{seconds}.{nanoseconds:09}");
    }
    // The nanoseconds count upwards from the second; the text counts from zero.
    let (whole, rest) = (-(seconds + 1), 1_000_000_000 - nanoseconds);
    format!("-{whole}.{rest:09}")
}

fn read_time(text: &str) -> Option<Time> {
    let (is_negative, text) = text.strip_prefix('-').map_or((false, text), |text| (true, text));
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    Some(match (is_negative, nanoseconds) {
        (false, nanoseconds) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds: 0 },
        (true, nanoseconds) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

/// Returns where a file has data, as tar wants it: a last empty piece says where it ends.
fn map_of(holes: &[(u64, u64)], bytes: u64) -> Vec<(u64, u64)> {
    let mut map = Vec::new();
    let mut at = 0;
    for (offset, length) in holes {
        if *offset > at {
            map.push((at, offset - at));
        }
        at = offset + length;
    }
    map.push((at, bytes - at));
    map
}

/// Returns the holes between pieces of data; `None` when they are no map of a file.
fn holes_of(map: &[(u64, u64)], bytes: u64) -> Option<Vec<(u64, u64)>> {
    let mut holes = Vec::new();
    let mut at = 0;
    for (offset, length) in map {
        if *offset < at || offset.checked_add(*length)? > bytes {
            return None;
        }
        if *length > 0 {
            if *offset > at {
                holes.push((at, offset - at));
            }
            at = offset + length;
        }
    }
    if at < bytes {
        holes.push((at, bytes - at));
    }
    Some(holes)
}

/// What was read of an archive.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Unpacked {
    pub(super) entries: u64,
    pub(super) bytes: u64,
    /// Devices, FIFOs and sockets.
    pub(super) skipped: u64,
    /// Attributes that no tree has.
    pub(super) attributes: u64,
}

/// What extended headers say of the next entry.
#[derive(Default)]
struct Described {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    modified: Option<Time>,
    uid: Option<u32>,
    gid: Option<u32>,
    xattrs: Vec<Xattr>,
    is_sparse: bool,
    real_bytes: Option<u64>,
}

struct Reader<'a, R> {
    from: R,
    sink: &'a mut dyn Sink,
    unpacked: Unpacked,
    watch: &'a mut dyn FnMut(Unpacked),
}

/// Reads a tar into a sink.
///
/// # Errors
/// [`Error::Refused`] names the entry that no tree has, and [`Error::Disk`].
pub(super) fn unpack(
    from: impl Read,
    sink: &mut dyn Sink,
    watch: &mut dyn FnMut(Unpacked),
) -> Result<Unpacked, Error> {
    let mut reader = Reader { from, sink, unpacked: Unpacked::default(), watch };
    let mut described = Described::default();
    while let Some(header) = reader.header()? {
        reader.entry(&header, &mut described)?;
    }
    // Whoever writes into a pipe wants its end to be read.
    io::copy(&mut reader.from, &mut io::sink()).map_err(read_failed)?;
    Ok(reader.unpacked)
}

// === impl Reader ===

impl<R: Read> Reader<'_, R> {
    fn header(&mut self) -> Result<Option<Header>, Error> {
        let mut block = [0; BLOCK];
        match self.from.read(&mut block[..1]).map_err(read_failed)? {
            0 if self.unpacked.entries == 0 => return Err(no_archive("it is empty")),
            0 => return Err(no_archive("it ends before its end mark")),
            _ => {}
        }
        self.from.read_exact(&mut block[1..]).map_err(read_failed)?;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(&block);
        let said = header.cksum().ok();
        let mut check = header.clone();
        check.set_cksum();
        if said.is_none() || said != check.cksum().ok() {
            return Err(no_archive("a header has another checksum than it says"));
        }
        Ok(Some(header))
    }

    fn entry(&mut self, header: &Header, described: &mut Described) -> Result<(), Error> {
        let bad = |error: io::Error| no_archive(&error.to_string());
        let size = header.entry_size().map_err(bad)?;
        match header.entry_type() {
            EntryType::XHeader => {
                let body = self.description(size)?;
                return self.pax(&body, described);
            }
            EntryType::XGlobalHeader => return self.description(size).map(drop),
            EntryType::GNULongName => {
                described.path = Some(text(&self.description(size)?));
                return Ok(());
            }
            EntryType::GNULongLink => {
                described.link = Some(text(&self.description(size)?));
                return Ok(());
            }
            _ => {}
        }
        let Described { path, link, size: long, modified, uid, gid, xattrs, is_sparse, real_bytes } =
            std::mem::take(described);
        let size = long.unwrap_or(size);
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let number = |long: Option<u32>, short: io::Result<u64>| match long {
            Some(number) => Ok(number),
            None => short
                .map_err(bad)
                .and_then(|id| u32::try_from(id).map_err(|_| refused(&path, "has no owner"))),
        };
        let modified = match modified {
            Some(modified) => modified,
            None => {
                Time { seconds: i64::try_from(header.mtime().map_err(bad)?).unwrap_or(0), nanoseconds: 0 }
            }
        };
        let meta = Meta {
            mode: header.mode().map_err(bad)? & 0o7777,
            uid: number(uid, header.uid())?,
            gid: number(gid, header.gid())?,
            modified,
        };
        self.unpacked.entries += 1;
        let name = normal(&path)?;
        let kind = header.entry_type();
        let is_dir = kind.is_dir() || (kind == EntryType::Regular && path.ends_with(b"/"));
        if name.is_empty() && !is_dir {
            return Err(refused(&path, "is the root, and no directory"));
        }
        let link = link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let has_data = matches!(kind, EntryType::Regular | EntryType::Continuous) && !is_dir;
        match kind {
            _ if is_dir && name.is_empty() => self.sink.root(&meta, &xattrs)?,
            _ if is_dir => self.sink.directory(&name, &meta, &xattrs)?,
            _ if has_data => {
                self.file(&name, meta, &xattrs, size, is_sparse.then(|| real_bytes.unwrap_or(0)))?;
            }
            EntryType::Symlink => {
                let target = link.filter(|link| !link.is_empty());
                self.sink.symlink(&name, &meta, &target.ok_or_else(|| refused(&path, "leads nowhere"))?)?;
            }
            EntryType::Link => {
                let to = link.unwrap_or_default();
                let to = normal(&to).map_err(|_| {
                    refused(&path, format!("is a link out of the tree, to {}", disk::shown(&to)))
                })?;
                self.sink.hard_link(&name, &meta, &to)?;
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => self.unpacked.skipped += 1,
            EntryType::GNUSparse => {
                let reason = "is a sparse file in GNU's old format; write the archive with --format=posix";
                return Err(refused(&path, reason));
            }
            other => return Err(refused(&path, format!("is of the kind {:?}", other.as_byte() as char))),
        }
        if !has_data {
            self.skip(size + padding(size) as u64)?;
        }
        (self.watch)(self.unpacked);
        Ok(())
    }

    fn file(
        &mut self,
        name: &[u8],
        meta: Meta,
        xattrs: &[Xattr],
        size: u64,
        sparse: Option<u64>,
    ) -> Result<(), Error> {
        let mut left = size;
        let (bytes, holes) = match sparse {
            None => (size, Vec::new()),
            Some(real) => {
                let map = self.map(name, &mut left)?;
                let data: u64 = map.iter().fold(0, |sum: u64, (_, length)| sum.saturating_add(*length));
                let holes = holes_of(&map, real).filter(|_| data == left);
                (real, holes.ok_or_else(|| refused(name, "has a map of no sparse file"))?)
            }
        };
        self.sink.file(FileHead { path: name, meta, xattrs, bytes, holes: &holes })?;
        let mut buffer = vec![0; PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES))];
        while left > 0 {
            let length = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let piece = &mut buffer[..length];
            self.from.read_exact(piece).map_err(read_failed)?;
            self.sink.data(piece)?;
            left -= length as u64;
            self.unpacked.bytes += length as u64;
        }
        self.sink.end_file()?;
        self.skip(padding(size) as u64)
    }

    /// Reads the map that a sparse file begins with.
    fn map(&mut self, name: &[u8], left: &mut u64) -> Result<Vec<(u64, u64)>, Error> {
        let broken = || refused(name, "has a map of no sparse file");
        let (mut numbers, mut current, mut wanted) = (Vec::new(), String::new(), 1);
        let mut read = 0;
        while numbers.len() < wanted {
            let mut block = [0; BLOCK];
            *left = left.checked_sub(BLOCK as u64).ok_or_else(broken)?;
            self.from.read_exact(&mut block).map_err(read_failed)?;
            read += BLOCK;
            for byte in block {
                match byte {
                    b'\n' if numbers.len() < wanted => {
                        let number: u64 = current.parse().map_err(|_| broken())?;
                        current.clear();
                        if numbers.is_empty() {
                            let pieces =
                                usize::try_from(number).ok().filter(|pieces| *pieces <= TREE_HOLES + 1);
                            wanted = pieces.ok_or_else(broken)? * 2 + 1;
                        }
                        numbers.push(number);
                    }
                    digit @ b'0'..=b'9' if numbers.len() < wanted && current.len() < 20 => {
                        current.push(digit as char);
                    }
                    _ if numbers.len() >= wanted => {}
                    _ => return Err(broken()),
                }
            }
            if read > MAP_BYTES {
                return Err(broken());
            }
        }
        Ok(numbers[1..].chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn description(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        if size > DESCRIPTION_BYTES {
            let reason =
                format!("what describes an entry has {size} bytes, at most {DESCRIPTION_BYTES} are allowed");
            return Err(no_archive(&reason));
        }
        let mut body = vec![0; usize::try_from(size).unwrap_or(0)];
        self.from.read_exact(&mut body).map_err(read_failed)?;
        self.skip(padding(size) as u64)?;
        Ok(body)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), Error> {
        let skipped = io::copy(&mut (&mut self.from).take(bytes), &mut io::sink()).map_err(read_failed)?;
        if skipped == bytes { Ok(()) } else { Err(no_archive("it is cut off")) }
    }

    fn pax(&mut self, body: &[u8], described: &mut Described) -> Result<(), Error> {
        let broken = || no_archive("an extended header cannot be read");
        let mut rest = body;
        while !rest.is_empty() {
            let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(broken)?;
            let length = std::str::from_utf8(&rest[..space]).ok().and_then(|text| text.parse::<usize>().ok());
            let length = length.filter(|length| *length > space + 1).ok_or_else(broken)?;
            let (record, behind) = rest.split_at_checked(length).ok_or_else(broken)?;
            rest = behind;
            let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(broken)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(broken)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let number = || std::str::from_utf8(value).ok().and_then(|text| text.parse::<u64>().ok());
            match key {
                b"path" | b"GNU.sparse.name" if key != b"path" || !described.is_sparse => {
                    described.path = Some(value.to_vec());
                }
                b"linkpath" => described.link = Some(value.to_vec()),
                b"size" => described.size = Some(number().ok_or_else(broken)?),
                b"uid" => {
                    described.uid = Some(number().and_then(|id| u32::try_from(id).ok()).ok_or_else(broken)?)
                }
                b"gid" => {
                    described.gid = Some(number().and_then(|id| u32::try_from(id).ok()).ok_or_else(broken)?)
                }
                b"mtime" => {
                    let time = std::str::from_utf8(value).ok().and_then(read_time);
                    described.modified = Some(time.ok_or_else(broken)?);
                }
                b"GNU.sparse.major" if value == b"1" => described.is_sparse = true,
                b"GNU.sparse.realsize" => described.real_bytes = Some(number().ok_or_else(broken)?),
                b"GNU.sparse.map" | b"GNU.sparse.size" | b"GNU.sparse.major" => {
                    return Err(no_archive("a sparse file is in an older format than 1.0"));
                }
                key => match key.strip_prefix(XATTR) {
                    Some(name) if is_kept_attribute(name) => {
                        described.xattrs.push(Xattr(RawText(name.to_vec()), RawText(value.to_vec())));
                    }
                    Some(_) => self.unpacked.attributes += 1,
                    None => {}
                },
            }
        }
        described.xattrs.sort();
        Ok(())
    }
}

/// Returns a path without `./` before and `/` behind it; empty for the root.
fn normal(path: &[u8]) -> Result<Vec<u8>, Error> {
    if path.starts_with(b"/") {
        return Err(refused(path, "is absolute; paths are relative to the state directory"));
    }
    let mut rest = path;
    while let Some(behind) = rest.strip_prefix(b"./") {
        rest = behind;
    }
    while let Some(before) = rest.strip_suffix(b"/") {
        rest = before;
    }
    if rest == b"." {
        rest = b"";
    }
    if !rest.is_empty() {
        disk::relative_path(rest).map_err(|problem| refused(path, problem.to_string()))?;
    }
    Ok(rest.to_vec())
}

fn text(body: &[u8]) -> Vec<u8> {
    let end = body.iter().position(|byte| *byte == 0).unwrap_or(body.len());
    body[..end].to_vec()
}

fn no_archive(reason: &str) -> Error {
    Error::Refused { what: "the archive".to_owned(), reason: reason.to_owned() }
}

fn read_failed(error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return no_archive("it is cut off");
    }
    disk::Error::new("read", "the archive", error).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_and_after_the_epoch_come_back() {
        for (seconds, nanoseconds, text) in [
            (0, 0, "0.000000000"),
            (5, 7, "5.000000007"),
            (-1, 500_000_000, "-0.500000000"),
            (-5, 1, "-4.999999999"),
            (-5, 0, "-5.000000000"),
        ] {
            let time = Time { seconds, nanoseconds };
            assert_eq!(shown_time(time), text);
            assert_eq!(read_time(text), Some(time));
        }
        assert_eq!(read_time("12"), Some(Time { seconds: 12, nanoseconds: 0 }));
        assert_eq!(read_time("12.5"), Some(Time { seconds: 12, nanoseconds: 500_000_000 }));
        assert_eq!(read_time("x"), None);
    }

    #[test]
    fn holes_and_maps_are_each_others_inverse() {
        for (holes, bytes) in [
            (vec![(0, 10)], 10),
            (vec![(0, 10), (15, 5)], 20),
            (vec![(5, 5)], 20),
            (vec![(3, 4), (10, 90)], 100),
        ] {
            assert_eq!(holes_of(&map_of(&holes, bytes), bytes), Some(holes));
        }
        assert_eq!(holes_of(&[(5, 10)], 10), None);
        assert_eq!(holes_of(&[(5, 3), (2, 1)], 10), None);
        assert_eq!(holes_of(&[(u64::MAX, 2)], 10), None);
    }

    #[test]
    fn an_extended_record_counts_its_own_length() {
        for length in [1, 90, 95, 990, 99_990] {
            let mut pax = Pax::default();
            pax.put(b"k", &vec![b'v'; length]);
            let text = String::from_utf8(pax.0.clone()).unwrap();
            let said: usize = text.split(' ').next().unwrap().parse().unwrap();
            assert_eq!(said, pax.0.len());
        }
    }
}
