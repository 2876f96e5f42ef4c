//! Finds the known name that a misspelt one was meant to be.

/// The shortest beginning that says what was meant.
const PREFIX: usize = 4;

/// Returns the candidate nearest to `given`, if one is near enough to be meant.
///
/// Near is at most a third of the longer name's characters changed, swapped,
/// added or left out (Damerau–Levenshtein), case and `-`/`_` ignored; or one of
/// the two being the beginning of the other, from four characters on.
pub fn closest<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_ascii_lowercase().replace('-', "_");
    let given = plain(given);
    candidates
        .into_iter()
        .filter_map(|candidate| {
            let plain = plain(candidate);
            let distance = strsim::damerau_levenshtein(&given, &plain);
            let length = plain.chars().count().max(given.chars().count());
            let begins = given.len().min(plain.len()) >= PREFIX
                && (given.starts_with(&plain) || plain.starts_with(&given));
            (begins || distance * 3 <= length).then_some((distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested() {
        let names = ["health_check", "volumes", "pool", "on_claim"];
        for (given, expected) in [
            ("helth_check", Some("health_check")),
            ("health-check", Some("health_check")),
            ("Volumes", Some("volumes")),
            ("poool", Some("pool")),
            ("on_clam", Some("on_claim")),
            ("volumes_and_more", Some("volumes")),
            ("heal", Some("health_check")),
            ("zebra", None),
            ("", None),
        ] {
            assert_eq!(closest(given, names), expected, "{given}");
        }
    }
}
