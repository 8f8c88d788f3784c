//! Members of a schema that have the wrong type or contradict each other: found here because the library does not say where.

use std::fmt::Display;

use serde_json::{Map, Value as Json};

use super::GrammarError;

const TYPES: [&str; 7] = ["string", "number", "integer", "boolean", "object", "array", "null"];
const COUNTS: [&str; 6] = ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"];
const NUMBERS: [&str; 2] = ["minimum", "maximum"];
/// In the drafts up to 4 they were switches of the other two.
const NUMBERS_OR_SWITCHES: [&str; 2] = ["exclusiveMinimum", "exclusiveMaximum"];

/// # Errors
/// Names the member of the schema at `path` and says what it must be.
pub(super) fn check(members: &Map<String, Json>, path: &str) -> Result<(), GrammarError> {
    let must = |name: &str, what: &dyn Display| Err(GrammarError(format!("`{path}/{name}` must be {what}")));
    check_type(members, path)?;
    let texts = |value: &Json| value.as_array().is_some_and(|names| names.iter().all(Json::is_string));
    if members.get("required").is_some_and(|value| !texts(value)) {
        return must("required", &"a list of property names");
    }
    if members.get("enum").is_some_and(|value| !value.is_array()) {
        return must("enum", &"a list of values");
    }
    for name in ["pattern", "format"] {
        if members.get(name).is_some_and(|value| !value.is_string()) {
            return must(name, &"a string");
        }
    }
    for name in COUNTS {
        if members.get(name).is_some_and(|value| whole(value).is_none()) {
            return must(name, &"a whole number, 0 or more");
        }
    }
    for (names, switches) in [(NUMBERS, false), (NUMBERS_OR_SWITCHES, true)] {
        for name in names {
            if members.get(name).is_some_and(|value| !(value.is_number() || switches && value.is_boolean())) {
                return must(name, &"a number");
            }
        }
    }
    check_order(members, path)
}

/// 3 and 3.0.
fn whole(value: &Json) -> Option<f64> {
    value.as_f64().filter(|number| *number >= 0.0 && number.fract() == 0.0)
}

fn check_type(members: &Map<String, Json>, path: &str) -> Result<(), GrammarError> {
    let unknown = match members.get("type") {
        None => None,
        Some(Json::Array(names)) => names.iter().find(|name| !is_type(name)),
        Some(name) => Some(name).filter(|name| !is_type(name)),
    };
    let Some(unknown) = unknown else { return Ok(()) };
    let shown: String = unknown.to_string().replace('"', "").chars().take(32).collect();
    Err(GrammarError(format!("`{path}/type`: `{shown}` is no type; the types are {}", TYPES.join(", "))))
}

fn is_type(name: &Json) -> bool {
    name.as_str().is_some_and(|name| TYPES.contains(&name))
}

/// Bounds that nothing fits between, where the type is given: without it, values of other types fit.
fn check_order(members: &Map<String, Json>, path: &str) -> Result<(), GrammarError> {
    const BOUNDS: [(&[&str], &str, &str); 4] = [
        (&["string"], "minLength", "maxLength"),
        (&["array"], "minItems", "maxItems"),
        (&["object"], "minProperties", "maxProperties"),
        (&["number", "integer"], "minimum", "maximum"),
    ];
    let given = members.get("type").and_then(Json::as_str).unwrap_or("");
    for (types, low, high) in BOUNDS {
        let bound = |name: &str| members.get(name).and_then(Json::as_f64);
        if let (true, Some(least), Some(most)) = (types.contains(&given), bound(low), bound(high))
            && least > most
        {
            return Err(GrammarError(format!("`{path}/{low}` ({least}) is above `{high}` ({most}); nothing fits")));
        }
    }
    Ok(())
}

/// The member that has `pattern`, as a pointer.
pub(super) fn path_of_pattern(schema: &Json, pattern: &str, path: &str) -> Option<String> {
    match schema {
        Json::Object(members) => members.iter().find_map(|(name, value)| match (name.as_str(), value) {
            ("pattern", Json::String(text)) if text == pattern => Some(format!("{path}/pattern")),
            ("patternProperties", Json::Object(patterns)) if patterns.contains_key(pattern) => {
                Some(format!("{path}/patternProperties"))
            }
            ("enum" | "const" | "default" | "examples", _) => None,
            _ => path_of_pattern(value, pattern, &format!("{path}/{name}")),
        }),
        Json::Array(values) => {
            values.iter().enumerate().find_map(|(i, value)| path_of_pattern(value, pattern, &format!("{path}/{i}")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_member_of_the_wrong_type_is_named_with_its_place() {
        for (schema, part) in [
            (json!({"type": "int"}), "`/a/type`: `int` is no type"),
            (json!({"type": ["string", 5]}), "`/a/type`: `5` is no type"),
            (json!({"required": "a"}), "`/a/required` must be a list of property names"),
            (json!({"required": [1]}), "`/a/required`"),
            (json!({"minLength": "5"}), "`/a/minLength` must be a whole number, 0 or more"),
            (json!({"maxItems": -1}), "`/a/maxItems`"),
            (json!({"minItems": 1.5}), "`/a/minItems`"),
            (json!({"minimum": "1"}), "`/a/minimum` must be a number"),
            (json!({"pattern": 5}), "`/a/pattern` must be a string"),
            (json!({"enum": "a"}), "`/a/enum` must be a list"),
            (json!({"type": "integer", "minimum": 5, "maximum": 1}), "`/a/minimum` (5) is above `maximum` (1)"),
            (json!({"type": "string", "minLength": 5, "maxLength": 1}), "`/a/minLength` (5)"),
        ] {
            let error = check(schema.as_object().unwrap(), "/a").unwrap_err().0;
            assert!(error.contains(part), "{schema}: {error}");
        }
        for schema in [
            json!({"type": ["string", "null"], "minLength": 0, "maxLength": 5.0, "required": [], "enum": []}),
            json!({"minimum": 5, "maximum": 1}),
            json!({"type": "integer", "minimum": 5, "maximum": 5, "exclusiveMinimum": true, "exclusiveMaximum": 9.5}),
        ] {
            assert_eq!(check(schema.as_object().unwrap(), ""), Ok(()), "{schema}");
        }
    }

    #[test]
    fn a_pattern_is_found_where_it_is() {
        let schema = json!({"properties": {"a": {"anyOf": [{"type": "null"}, {"pattern": "x("}]}}, "patternProperties": {"y(": {}}});
        let path = |pattern: &str| path_of_pattern(&schema, pattern, "");
        assert_eq!(path("x(").unwrap(), "/properties/a/anyOf/1/pattern");
        assert_eq!(path("y(").unwrap(), "/patternProperties");
        assert_eq!(path("z("), None);
    }
}
