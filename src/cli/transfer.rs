//! `boilerhouse state export` and `import`.

use std::{io, path::PathBuf};

use clap::Args;

use super::{Failure, causes, meter::Meter, server, table::bytes};
use crate::{
    app::{self, Export, ImportFrom, Importing},
    config::StoreLocation,
    model::{Owner, TenantId, WorkloadId},
};

pub(super) const EXPORT_HELP: &str = "\
Reads the store of the server's configuration (BOILERHOUSE_STORE, AWS_*) and writes nothing there; a server may go
on working meanwhile. Every byte is compared with the snapshot's digests. TARGET is a directory that is not there or
empty, a file that is not there and ends with .tar.zst, or - for a .tar.zst on standard output. Owners are kept in
archives, and in directories when run as root; in directories files lose their set-id bits.

Examples:
  boilerhouse state export alice ./alice
  boilerhouse state export alice --workload web --snapshot 12 alice.tar.zst
  boilerhouse state export alice - | tar --zstd -t";

pub(super) const IMPORT_HELP: &str = "\
Makes a new snapshot on the store of the server's configuration, as the workload's `persist` says. The server must
have been stopped in order, unless the store is shared; the tenant must not be claimed. Runs as root, for owners are
kept. SOURCE is a directory, a .tar.zst or .tar, - for one on standard input, or s3://BUCKET/PREFIX on the configured
endpoint, with one plain object a file, as rclone leaves them (their files get mode 0644 and --owner). With --mirror
the tenant's own plain objects are taken over as they are now.

Examples:
  boilerhouse state import alice ./alice
  boilerhouse state import alice --replace alice.tar.zst
  boilerhouse state import alice --workload web --owner 1000:1000 s3://backups/rclone/alice
  boilerhouse state import alice --mirror --replace";

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Whose
    #[arg(value_name = "TENANT")]
    tenant: TenantId,
    /// Which workload; not needed where the tenant has state of only one
    #[arg(long, short, value_name = "WORKLOAD")]
    workload: Option<WorkloadId>,
    /// Which snapshot; the newest when left out
    #[arg(long, value_name = "N")]
    snapshot: Option<u64>,
    /// A directory, a file that ends with .tar.zst, or -
    #[arg(value_name = "TARGET")]
    target: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// Whose
    #[arg(value_name = "TENANT")]
    tenant: TenantId,
    /// Which workload; not needed where there is only one
    #[arg(long, short, value_name = "WORKLOAD")]
    workload: Option<WorkloadId>,
    /// Import although there is state; what is there becomes history
    #[arg(long)]
    replace: bool,
    /// Whose the files are where the source does not say, and who the program runs as
    #[arg(long, value_name = "UID:GID", value_parser = owner)]
    owner: Option<Owner>,
    /// Where the tree is put together; needs room for all of it
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Take over the tenant's own plain objects of the layout `mirror`
    #[arg(long, conflicts_with = "source")]
    mirror: bool,
    /// A directory, an archive, - or s3://BUCKET/PREFIX
    #[arg(value_name = "SOURCE", required_unless_present = "mirror")]
    source: Option<PathBuf>,
}

pub(super) fn export(arguments: &ExportArgs) -> Result<String, Failure> {
    let ExportArgs { tenant, workload, snapshot, target } = arguments;
    let config = server::load()?;
    let is_stream = target.as_os_str() == "-";
    let to = match target.to_str() {
        Some("-") => Export::Stream(Box::new(io::stdout())),
        Some(name) if name.ends_with(".tar.zst") => Export::Archive(target.clone()),
        Some(name) if [".tar", ".tgz", ".tar.gz", ".zip"].iter().any(|end| name.ends_with(end)) => {
            let problem =
                format!("{name} is no target; allowed: a directory, a name that ends with .tar.zst, or -");
            return Err(Failure::Usage(problem));
        }
        _ => Export::Directory(target.clone()),
    };
    let mut meter = Meter::new("entries", "carried");
    let runtime = runtime()?;
    let exported =
        runtime.block_on(app::export(&config, tenant, workload.as_ref(), *snapshot, to, &mut |it| {
            meter.show(it.entries, it.of, it.bytes);
        }));
    meter.end();
    let exported = exported.map_err(failed)?;
    let app::Exported { snapshot, entries, files, bytes: of_files } = exported;
    let text = format!(
        "snapshot {snapshot} of {tenant} exported: {entries} entries, {files} files, {}\n",
        bytes(of_files)
    );
    if is_stream {
        eprint!("{text}");
        return Ok(String::new());
    }
    Ok(text)
}

pub(super) fn import(arguments: ImportArgs) -> Result<String, Failure> {
    let ImportArgs { tenant, workload, replace, owner, scratch, mirror, source } = arguments;
    let config = server::load()?;
    let from = match source {
        None => ImportFrom::Mirror,
        Some(_) if mirror => ImportFrom::Mirror,
        Some(path) if path.as_os_str() == "-" => ImportFrom::Stdin,
        Some(path) => match path.to_str().filter(|text| text.contains("://")) {
            None => ImportFrom::Path(path),
            Some(text) => match StoreLocation::parse(text) {
                Ok(StoreLocation::S3 { bucket, prefix }) => ImportFrom::Bucket { bucket, prefix },
                Ok(StoreLocation::Directory(path)) => ImportFrom::Path(path),
                Err(problem) => return Err(Failure::Usage(format!("SOURCE {problem}"))),
            },
        },
    };
    let scratch = scratch.unwrap_or_else(std::env::temp_dir);
    let importing = Importing { tenant: tenant.clone(), workload, from, owner, replace, scratch };
    let mut meter = Meter::new("entries", "carried");
    let imported = runtime()?.block_on(app::import(&config, importing, &mut |it| {
        meter.show(it.entries, it.of, it.bytes);
    }));
    meter.end();
    let app::Imported { snapshot, skipped, attributes } = imported.map_err(failed)?;
    let mut text = format!(
        "imported as snapshot {} of {tenant}: {} files, {}\n",
        snapshot.number,
        snapshot.files,
        bytes(snapshot.bytes)
    );
    if skipped > 0 {
        text += &format!("left out: {skipped} sockets, FIFOs and devices\n");
    }
    if attributes > 0 {
        text += &format!("left out: {attributes} extended attributes that are the host's\n");
    }
    Ok(text)
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    // Threads of its own for the store: the tree is written on this one.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().build();
    runtime.map_err(|error| Failure::Process(format!("the runtime cannot start: {error}")))
}

fn failed(error: app::Error) -> Failure {
    match error {
        app::Error::Scripts(findings) => Failure::Scripts(findings),
        error => Failure::Process(format!("{error}\n{}", causes(&error))),
    }
}

fn owner(text: &str) -> Result<Owner, String> {
    let parts = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    let (uid, gid) = parts.ok_or("allowed: two numbers, UID:GID")?;
    Ok(Owner { uid, gid })
}
