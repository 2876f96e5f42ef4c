//! What the `check` command finds.

use std::path::{Path, PathBuf};

use super::{
    diagnostic::Diagnostic,
    set::{LoadOptions, Set},
    source::{EXTENSION, SourceFile, Sources, key_of},
};

/// Checks scripts without a server: all of the two directories when `paths` is
/// empty, else the given files and, of given directories, the scripts in them.
///
/// A path below `scripts` is checked as a shared script, any other as a workload;
/// imports are always resolved in `scripts`. Returns errors and warnings in the
/// order of files and lines; empty means that a server would load it all.
pub fn check(paths: &[PathBuf], workloads: &Path, scripts: &Path, options: &LoadOptions) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    let mut sources = match Sources::read(workloads, scripts) {
        Ok(sources) => sources,
        Err(errors) => return errors,
    };
    if !paths.is_empty() {
        sources.workloads.clear();
        for path in paths {
            if is_below(path, scripts) {
                if !path.exists() {
                    findings.push(Diagnostic::whole(path.display().to_string(), "does not exist"));
                }
            } else if path.is_dir() {
                match Sources::read(path, scripts) {
                    Ok(more) => sources.workloads.extend(more.workloads),
                    Err(errors) => findings.extend(errors),
                }
            } else {
                match one(path) {
                    Ok((stem, file)) => drop(sources.workloads.insert(stem, file)),
                    Err(error) => findings.push(*error),
                }
            }
        }
    }
    let (set, errors) = Set::load_all(&sources, options);
    findings.extend(errors);
    findings.extend(set.warnings().iter().cloned());
    findings.sort_by_key(Diagnostic::order);
    findings.dedup();
    findings
}

/// Reads one workload file.
fn one(path: &Path) -> Result<(String, SourceFile), Box<Diagnostic>> {
    let refuse = |message: String| Box::new(Diagnostic::whole(path.display().to_string(), message));
    if path.extension().is_none_or(|extension| extension != EXTENSION) {
        return Err(refuse(format!("is no script: its name does not end with .{EXTENSION}")));
    }
    let stem = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .ok_or_else(|| refuse("has no UTF-8 name".to_owned()))?;
    Ok((stem.to_owned(), SourceFile::read(path)?))
}

fn is_below(path: &Path, directory: &Path) -> bool {
    match (path.canonicalize(), directory.canonicalize()) {
        (Ok(path), Ok(directory)) => key_of(&path, &directory).is_some(),
        _ => key_of(path, directory).is_some(),
    }
}
