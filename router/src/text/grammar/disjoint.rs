//! Whether no value can match two schemas at once, as far as that is plain to see.

use serde_json::{Map, Value as Json};

/// References followed, and schemas inside schemas looked at.
const DEPTH_MAX: usize = 8;
/// More pairs than this are not looked at.
const SCHEMAS_MAX: usize = 64;
/// Pairs that are looked at for one whole rule, with those inside them: options inside options multiply.
pub(super) const PAIRS_MAX: u32 = 20_000;

const NULL: u8 = 1;
const BOOLEAN: u8 = 2;
const NUMBER: u8 = 4;
const STRING: u8 = 8;
const ARRAY: u8 = 16;
const OBJECT: u8 = 32;
const ANY: u8 = 63;

/// True if each value matches at most one of `schemas`. False if it may match two, or nobody can tell, or `pairs_left` (see
/// [`PAIRS_MAX`]) came to 0.
pub(super) fn all_disjoint(schemas: &[Json], root: &Json, pairs_left: &mut u32) -> bool {
    let mut search = Search { root, pairs_left };
    schemas.len() <= SCHEMAS_MAX
        && schemas.iter().enumerate().all(|(i, a)| schemas.iter().skip(i + 1).all(|b| search.disjoint(a, b, DEPTH_MAX)))
}

struct Search<'a> {
    root: &'a Json,
    pairs_left: &'a mut u32,
}

impl Search<'_> {
    fn disjoint(&mut self, a: &Json, b: &Json, depth: usize) -> bool {
        match (resolved(a, self.root), resolved(b, self.root)) {
            (Some(a), Some(b)) => self.both_disjoint(a, b, depth),
            _ => false,
        }
    }

    fn both_disjoint(&mut self, a: &Map<String, Json>, b: &Map<String, Json>, depth: usize) -> bool {
        let (Some(depth), Some(left)) = (depth.checked_sub(1), self.pairs_left.checked_sub(1)) else { return false };
        *self.pairs_left = left;
        for (one, other) in [(a, b), (b, a)] {
            for name in ["anyOf", "oneOf"] {
                if let Some(Json::Array(options)) = one.get(name)
                    && options.iter().all(|option| {
                        resolved(option, self.root).is_some_and(|option| self.both_disjoint(option, other, depth))
                    })
                {
                    return true;
                }
            }
        }
        let shared = kinds(a) & kinds(b);
        if shared == 0 {
            return true;
        }
        if let (Some(a), Some(b)) = (literals(a), literals(b)) {
            return self.literals_disjoint(a, b);
        }
        shared == OBJECT && self.objects_disjoint(a, b, depth)
    }

    fn literals_disjoint(&mut self, a: &[Json], b: &[Json]) -> bool {
        let pairs = u32::try_from(a.len().saturating_mul(b.len()) / 16).unwrap_or(u32::MAX); // a comparison is quick
        match self.pairs_left.checked_sub(pairs) {
            Some(left) => *self.pairs_left = left,
            None => return false,
        }
        !a.iter().any(|x| b.iter().any(|y| same(x, y)))
    }

    /// Some property tells the two apart: one requires it, and the other has it with other values or not at all.
    fn objects_disjoint(&mut self, a: &Map<String, Json>, b: &Map<String, Json>, depth: usize) -> bool {
        let mut differ = |one: &Map<String, Json>, other: &Map<String, Json>| {
            let required = one.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str);
            required.into_iter().any(|name| match (property(one, name), property(other, name)) {
                (_, None) => closed(other),
                (Some(x), Some(y)) => self.disjoint(x, y, depth),
                (None, Some(_)) => false,
            })
        };
        differ(a, b) || differ(b, a)
    }
}

fn property<'a>(schema: &'a Map<String, Json>, name: &str) -> Option<&'a Json> {
    schema.get("properties")?.get(name)
}

/// No properties but the named ones.
fn closed(schema: &Map<String, Json>) -> bool {
    schema.get("additionalProperties") == Some(&Json::Bool(false)) && !schema.contains_key("patternProperties")
}

/// The schema itself, or what it refers to. With other members beside a reference it is taken as it is: more is ruled out,
/// never less.
fn resolved<'a>(schema: &'a Json, root: &'a Json) -> Option<&'a Map<String, Json>> {
    let mut schema = schema.as_object()?;
    for _ in 0..DEPTH_MAX {
        let Some(reference) = schema.get("$ref").filter(|_| schema.len() == 1) else { return Some(schema) };
        schema = root.pointer(reference.as_str()?.strip_prefix('#')?)?.as_object()?;
    }
    None
}

/// The types a value may have.
fn kinds(schema: &Map<String, Json>) -> u8 {
    let named = |name: &Json| match name.as_str() {
        Some("null") => NULL,
        Some("boolean") => BOOLEAN,
        Some("number" | "integer") => NUMBER,
        Some("string") => STRING,
        Some("array") => ARRAY,
        Some("object") => OBJECT,
        _ => ANY,
    };
    let by_type = match schema.get("type") {
        None => ANY,
        Some(Json::Array(names)) => names.iter().fold(0, |all, name| all | named(name)),
        Some(name) => named(name),
    };
    let by_value = literals(schema).map_or(ANY, |values| values.iter().fold(0, |all, value| all | kind(value)));
    by_type & by_value
}

fn kind(value: &Json) -> u8 {
    match value {
        Json::Null => NULL,
        Json::Bool(_) => BOOLEAN,
        Json::Number(_) => NUMBER,
        Json::String(_) => STRING,
        Json::Array(_) => ARRAY,
        Json::Object(_) => OBJECT,
    }
}

fn literals(schema: &Map<String, Json>) -> Option<&[Json]> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(std::slice::from_ref(value)),
        (None, Some(Json::Array(values))) => Some(values),
        _ => None,
    }
}

/// Equal in a schema's sense: 1 is 1.0. Containers count as equal, to be on the safe side.
fn same(a: &Json, b: &Json) -> bool {
    match (a, b) {
        (Json::Number(a), Json::Number(b)) => a.as_f64() == b.as_f64(),
        (Json::Array(_), Json::Array(_)) | (Json::Object(_), Json::Object(_)) => true,
        (a, b) => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn schemas_are_apart_by_type_constant_or_a_required_property() {
        let object =
            |kind: &str| json!({"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]});
        let root = json!({"$defs": {"cat": object("cat"), "dog": object("dog")}});
        let refer = |name: &str| json!({"$ref": format!("#/$defs/{name}")});
        let closed = |name: &str| json!({"type": "object", "properties": {name: {"type": "string"}}, "required": [name], "additionalProperties": false});
        let apart = [
            vec![json!({"type": "string"}), json!({"type": ["integer", "null"]})],
            vec![json!({"const": 1}), json!({"const": 2}), json!({"enum": [3, "x"]})],
            vec![refer("cat"), refer("dog")],
            vec![closed("a"), closed("b")],
            vec![json!({"anyOf": [{"type": "string"}, {"const": 4}]}), json!({"enum": [5]})],
        ];
        let not_apart = [
            vec![json!({"type": "number"}), json!({"type": "integer"})],
            vec![json!({"const": 1}), json!({"const": 1.0})],
            vec![refer("cat"), refer("cat")],
            vec![refer("cat"), json!({"type": "object"})],
            // Text matches both: only objects are told apart.
            vec![
                json!({"properties": {"a": {"const": 1}}, "required": ["a"]}),
                json!({"properties": {"a": {"const": 2}}}),
            ],
            vec![json!({"pattern": "a"}), json!({"pattern": "b"})],
            vec![json!(true), json!({"type": "null"})],
            vec![json!({"$ref": "#/$defs/loop"}), json!({"type": "null"})],
            vec![json!({"anyOf": [{"type": "string"}, {"const": 5}]}), json!({"enum": [5]})],
        ];
        for schemas in apart {
            assert!(all_disjoint(&schemas, &root, &mut PAIRS_MAX.clone()), "{schemas:?}");
        }
        for schemas in not_apart {
            assert!(!all_disjoint(&schemas, &root, &mut PAIRS_MAX.clone()), "{schemas:?}");
        }
    }

    #[test]
    fn options_inside_options_are_looked_at_up_to_a_limit() {
        let option = json!({"$ref": "#/$defs/a"});
        let options = |option: &Json, count: usize| json!({"anyOf": vec![option.clone(); count]});
        let root = json!({"$defs": {"a": options(&option, 40)}});
        let schemas = [option, json!({"type": "null"})];
        let mut pairs_left = PAIRS_MAX;
        assert!(!all_disjoint(&schemas, &root, &mut pairs_left));
        assert!(pairs_left > PAIRS_MAX - 100, "one option that is not apart settles it");
        // Each option is apart, 12^5 times.
        let mut deep = json!({"type": "string"});
        for _ in 0..5 {
            deep = options(&deep, 12);
        }
        let schemas = [deep, json!({"type": "null"})];
        assert!(!all_disjoint(&schemas, &root, &mut pairs_left));
        assert_eq!(pairs_left, 0);
        assert!(!all_disjoint(&[json!({"const": 1}), json!({"const": 2})], &root, &mut pairs_left), "nothing is left");
        let numbers = |from: u32| json!({"enum": (from..from + 3000).collect::<Vec<_>>()});
        assert!(!all_disjoint(&[numbers(0), numbers(5000)], &root, &mut PAIRS_MAX.clone()));
    }
}
