//! Names of adapters. Only text that passes here is ever joined to a path.

/// Bytes of one segment.
const SEGMENT_BYTES_MAX: usize = 128;

/// `seg` or `seg/seg` with `seg` = `[A-Za-z0-9][A-Za-z0-9._-]{0,127}` and no `..`.
pub fn is_valid_name(name: &str) -> bool {
    let mut segments = name.split('/');
    let valid = |segment: Option<&str>| segment.is_some_and(is_valid_segment);
    match (segments.next(), segments.next(), segments.next()) {
        (first, None, None) => valid(first),
        (first, second, None) => valid(first) && valid(second),
        _ => false,
    }
}

/// One segment: safe as the name of a sub-directory.
pub(super) fn is_valid_segment(segment: &str) -> bool {
    let rest = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    segment.len() <= SEGMENT_BYTES_MAX
        && segment.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
        && segment.bytes().all(rest)
        && !segment.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_directory_are_no_names() {
        for good in ["a", "A.b_c-1", "org/model", "0", &"a".repeat(128)] {
            assert!(is_valid_name(good), "{good}");
        }
        let long = "a".repeat(129);
        for bad in [
            "", "/", "a/", "/a", "a/b/c", "..", "a/..", "a..b", ".a", "-a", "a b", "a\0", "a\\b", "é", "a%2e", "a:b",
            "a@b", &long,
        ] {
            assert!(!is_valid_name(bad), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_valid_segment_joined_to_a_directory_is_its_child(segment in "[A-Za-z0-9._/\\\\-]{0,12}") {
            if is_valid_segment(&segment) {
                let path = std::path::Path::new("/adapters").join(&segment);
                proptest::prop_assert_eq!(path.parent(), Some(std::path::Path::new("/adapters")));
                proptest::prop_assert_eq!(path.components().count(), 3);
            }
        }
    }
}
