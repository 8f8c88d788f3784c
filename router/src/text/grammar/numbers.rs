//! Numbers of a schema. The library computes with f64 and u32; what these cannot hold is narrowed or refused here.

use serde_json::{Map, Number, Value as Json};

use super::GrammarError;

/// Whole numbers up to here are exact in f64.
const EXACT: u64 = 1 << f64::MANTISSA_DIGITS;
/// A `multipleOf` is an automaton with a state for each remainder, some 1200 bytes each.
const MULTIPLE_MAX: u64 = 2000;

/// Narrows bounds to the next number inside that is exact, refuses constants that are not, and collects `multipleOf`.
///
/// # Errors
/// Names the member.
pub(super) fn check(members: &mut Map<String, Json>, path: &str, multiples: &mut Vec<f64>) -> Result<(), GrammarError> {
    for (name, up) in [("minimum", true), ("exclusiveMinimum", true), ("maximum", false), ("exclusiveMaximum", false)] {
        if let Some(Json::Number(number)) = members.get_mut(name)
            && let Some(inside) = narrowed(number, up)
        {
            *number = inside;
        }
    }
    if let Some(value) = members.get("multipleOf") {
        match value.as_f64().filter(|multiple| *multiple > 0.0) {
            Some(multiple) => multiples.push(multiple),
            None => return Err(GrammarError(format!("`{path}/multipleOf` must be a number above 0"))),
        }
    }
    for name in ["const", "enum"] {
        if let Some(value) = members.get(name)
            && let Some(number) = inexact(value)
        {
            let message = format!("`{path}/{name}`: {number} has more digits than can be held; use a string");
            return Err(GrammarError(message));
        }
    }
    Ok(())
}

/// `multipleOf`s may meet (`allOf`, `$ref`), so all of a schema count together: their least common multiple, in steps of the
/// smallest decimal place among them, is bounded.
///
/// # Errors
/// Says so.
pub(super) fn check_multiples(multiples: &[f64]) -> Result<(), GrammarError> {
    let finest = multiples.iter().copied().fold(1.0, |least: f64, multiple| least.min(unit(multiple)));
    let mut common = 1;
    for multiple in multiples {
        let steps = (multiple / finest).round();
        common = if steps <= MULTIPLE_MAX as f64 { least_common(common, steps.max(1.0) as u64) } else { u64::MAX };
        if common > MULTIPLE_MAX {
            let message = format!(
                "`multipleOf`: the values of one schema must have a common multiple of at most {MULTIPLE_MAX} times their \
                 smallest decimal place"
            );
            return Err(GrammarError(message));
        }
    }
    Ok(())
}

/// The least common multiple of two numbers of at most [`MULTIPLE_MAX`].
fn least_common(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}

/// The decimal place of the last digit: 0.25 -> 0.01.
fn unit(multiple: f64) -> f64 {
    let text = multiple.to_string();
    let places = text.split_once('.').map_or(0, |(_, digits)| digits.len());
    10f64.powi(-(places as i32))
}

/// The closest exact number on the inner side, if the number itself is not exact.
fn narrowed(number: &Number, up: bool) -> Option<Number> {
    let exact = |value: u64| value <= EXACT;
    let (negative, size) = match (number.as_i64(), number.as_u64()) {
        (Some(value), _) => (value < 0, value.unsigned_abs()),
        (None, Some(value)) => (false, value),
        (None, None) => return None,
    };
    if exact(size) {
        return None;
    }
    // Numbers of this size are multiples of 2^k in f64: drop the low bits, and add one step where that led outside.
    let step = 1u64 << (u64::BITS - size.leading_zeros() - f64::MANTISSA_DIGITS);
    let low = size - size % step;
    let grows = up != negative;
    let inside = if grows && low != size { low.checked_add(step)? } else { low };
    let inside = inside.min(1 << 62); // the library's ranges are i64; 2^62 is far inside
    match negative {
        false => Some(Number::from(inside)),
        true => i64::try_from(inside).ok().and_then(i64::checked_neg).map(Number::from),
    }
}

/// A whole number inside `value` that f64 cannot hold.
fn inexact(value: &Json) -> Option<&Number> {
    match value {
        Json::Number(number) => {
            let size = number.as_i64().map(i64::unsigned_abs).or_else(|| number.as_u64())?;
            (size > EXACT).then_some(number)
        }
        Json::Array(values) => values.iter().find_map(inexact),
        Json::Object(map) => map.values().find_map(inexact),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_bound_that_is_not_exact_moves_inward() {
        let moved = |value: Json, up| narrowed(value.as_number().unwrap(), up).map(|n| n.to_string());
        assert_eq!(moved(json!(9_007_199_254_740_992_u64), false), None);
        assert_eq!(moved(json!(9_007_199_254_740_993_u64), false).unwrap(), "9007199254740992");
        assert_eq!(moved(json!(9_007_199_254_740_993_u64), true).unwrap(), "9007199254740994");
        assert_eq!(moved(json!(-9_007_199_254_740_993_i64), true).unwrap(), "-9007199254740992");
        assert_eq!(moved(json!(-9_007_199_254_740_993_i64), false).unwrap(), "-9007199254740994");
        assert_eq!(moved(json!(i64::MAX), false).unwrap(), (1_i64 << 62).to_string());
        assert_eq!(moved(json!(0.5), false), None);
    }

    #[test]
    fn multiples_that_may_meet_must_stay_small() {
        let ok = |multiples: &[f64]| check_multiples(multiples).is_ok();
        assert!(ok(&[]) && ok(&[1.0]) && ok(&[0.01]) && ok(&[1000.0]) && ok(&[2000.0]) && ok(&[12.5]));
        assert!(ok(&[1000.0, 1000.0]) && ok(&[2.0, 3.0, 0.25]) && ok(&[6.0, 4.0]));
        assert!(!ok(&[2001.0]) && !ok(&[65_521.0]) && !ok(&[100_000.0]));
        assert!(!ok(&[991.0, 997.0]) && !ok(&[31.0, 37.0, 41.0]) && !ok(&[1000.0, 0.001]));
    }
}
