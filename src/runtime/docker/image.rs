//! Having an image.

use std::time::Duration;

use bollard::query_parameters::CreateImageOptionsBuilder;
use futures_util::TryStreamExt;
use tokio::time::timeout;

use super::{DockerRuntime, PULL_MS, QUICK_MS, bounded, failure::Call};
use crate::{model::spec::PullPolicy, runtime::Error};

/// Makes sure that the engine has an image.
pub(super) async fn ensure(docker: &DockerRuntime, image: &str, policy: PullPolicy) -> Result<(), Error> {
    let image_error = |reason: String| Error::Image { image: image.to_owned(), reason };
    if !is_reference(image) {
        return Err(image_error("it is no image reference, [host/]name[:tag][@digest]".into()));
    }
    match policy {
        PullPolicy::Always => pull(docker, image).await,
        PullPolicy::Missing if is_present(docker, image).await? => Ok(()),
        PullPolicy::Missing => pull(docker, image).await,
        PullPolicy::Never if is_present(docker, image).await? => Ok(()),
        PullPolicy::Never => {
            Err(image_error("the engine does not have it, and the pull policy is \"never\"".into()))
        }
    }
}

async fn is_present(docker: &DockerRuntime, image: &str) -> Result<bool, Error> {
    let call = Call::reads("inspect", image);
    match bounded(&call, QUICK_MS, docker.client().await?.inspect_image(image)).await {
        Ok(_) => Ok(true),
        Err(Error::Conflict { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Pulls an image. A pull whose end was not seen has done no harm and can be asked for
/// again, so nothing here is an unknown outcome.
async fn pull(docker: &DockerRuntime, image: &str) -> Result<(), Error> {
    let image_error = |reason: String| Error::Image { image: image.to_owned(), reason };
    let call = Call::reads("pull", image);
    let options = CreateImageOptionsBuilder::default().from_image(&with_tag(image)).build();
    let progress = docker.client().await?.create_image(Some(options), None, None);
    // Progress may stall while a layer is unpacked, so the limit is on the whole.
    match timeout(Duration::from_millis(PULL_MS), progress.try_for_each(|_| async { Ok(()) })).await {
        Err(_) => Err(image_error(format!("the pull did not end within {PULL_MS} ms"))),
        Ok(Ok(())) => Ok(()),
        Ok(Err(bollard::errors::Error::DockerStreamError { error })) => Err(image_error(error)),
        Ok(Err(error)) => Err(match call.translate(error) {
            Error::Conflict { reason, .. } | Error::Refused { reason, .. } => image_error(reason),
            error => error,
        }),
    }
}

/// Adds the tag `latest` where a reference has neither tag nor digest; without one the
/// engine would pull every tag there is.
fn with_tag(image: &str) -> String {
    let name = image.rsplit('/').next().unwrap_or(image);
    if name.contains([':', '@']) { image.to_owned() } else { format!("{image}:latest") }
}

/// Whether a text can be a reference. The engine knows the rest of the grammar; this
/// keeps its place in a path of the API.
fn is_reference(image: &str) -> bool {
    image.len() <= 512
        && image.starts_with(|c: char| c.is_ascii_alphanumeric())
        && image.chars().all(|c| c.is_ascii_alphanumeric() || "._-/:@".contains(c))
        && !image.split('/').any(|part| part.is_empty() || part.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tag_is_pulled() {
        for (image, pulled) in [
            ("redis", "redis:latest"),
            ("redis:7", "redis:7"),
            ("localhost:5000/team/app", "localhost:5000/team/app:latest"),
            ("localhost:5000/team/app:1", "localhost:5000/team/app:1"),
            ("app@sha256:00", "app@sha256:00"),
        ] {
            assert_eq!(with_tag(image), pulled);
        }
    }

    #[test]
    fn a_reference_keeps_its_place() {
        for good in ["redis", "redis:7", "localhost:5000/team/app_x@sha256:00"] {
            assert!(is_reference(good), "{good}");
        }
        for bad in ["", "../x", "a/../b", "a//b", "a?x=1", "a b", "-a", "a#b"] {
            assert!(!is_reference(bad), "{bad}");
        }
    }
}
