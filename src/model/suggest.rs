//! Finds the known name that a misspelt one was meant to be.

/// Returns the candidate nearest to `given`, if one is near enough to be meant.
///
/// Near is at most a third of the longer name's characters changed, swapped,
/// added or left out (Damerau–Levenshtein), case and `-`/`_` ignored.
pub fn closest<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_ascii_lowercase().replace('-', "_");
    let given = plain(given);
    candidates
        .into_iter()
        .map(|candidate| {
            let plain = plain(candidate);
            (strsim::damerau_levenshtein(&given, &plain), plain.chars().count(), candidate)
        })
        .filter(|(distance, length, _)| distance * 3 <= (*length).max(given.chars().count()))
        .min_by_key(|(distance, ..)| *distance)
        .map(|(.., candidate)| candidate)
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
            ("zebra", None),
            ("", None),
        ] {
            assert_eq!(closest(given, names), expected, "{given}");
        }
    }
}
