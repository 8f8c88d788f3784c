//! JSON schemas as the library may have them: what it would ignore or get wrong is refused by name.

use serde_json::{Map, Value as Json, json};

use super::{GrammarError, JsonSpace, disjoint, keywords, limits, meets, numbers, regex};

/// Schemas in a member: one, a list of them, or a map of them.
const ONE: [&str; 3] = ["additionalProperties", "items", "additionalItems"];
const LISTS: [&str; 5] = ["prefixItems", "anyOf", "oneOf", "allOf", "items"];
const MAPS: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];

/// Members without a say in what is valid. (Of `$schema`: what all drafts have is read by the latest one's rules, which are
/// the strictest.)
const ANNOTATIONS: [&str; 16] = [
    "x-guidance",
    "$schema",
    "$comment",
    "$vocabulary",
    "$recursiveAnchor",
    "$dynamicAnchor",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentSchema",
    "contentMediaType",
];

/// Members that rule what is valid and that cannot be held, each with what to do instead.
const REFUSED: [(&str, &str); 12] = [
    ("not", "name what is allowed instead, with `enum`, `const` or `pattern`"),
    ("if", "use `anyOf` with one schema for each case"),
    ("contains", "describe every item with `items` or `prefixItems`"),
    ("propertyNames", "use `patternProperties` with `additionalProperties: false`"),
    ("dependentRequired", "use `anyOf` with one schema for each case"),
    ("dependentSchemas", "use `anyOf` with one schema for each case"),
    ("dependencies", "use `anyOf` with one schema for each case"),
    ("unevaluatedProperties", "use `additionalProperties`"),
    ("unevaluatedItems", "use `items`"),
    ("$dynamicRef", "use `$ref`"),
    ("$recursiveRef", "use `$ref`"),
    ("uniqueItems", "leave it out and check the reply, or list the items with `prefixItems`"),
];

/// Members that mean nothing without the one they belong to.
const IDLE: [(&str, &str); 4] =
    [("then", "if"), ("else", "if"), ("minContains", "contains"), ("maxContains", "contains")];

/// `format`s that are held.
const FORMATS: [&str; 10] =
    ["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];
/// Those of RFC 3339 that are held by patterns of our own: the library's have a year 0, a February of 29 days in every year
/// and a second 60, which many readers refuse.
const DATE: &str = "(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])\
                    |(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))\
                    |(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)";
const TIME: &str =
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";
/// `format`s that say how a value is shown or stored, not which it is.
const DISPLAY_FORMATS: [&str; 1] = ["password"];

/// A checked copy of `schema` with the settings of the library inside.
///
/// # Errors
/// Names the member at fault.
pub(super) fn prepare(schema: &Json, space: &JsonSpace) -> Result<Json, GrammarError> {
    let mut copy = match schema {
        Json::Bool(true) => json!({}),
        Json::Object(_) => schema.clone(),
        _ => return Err(GrammarError("a schema must be an object".into())),
    };
    let mut walk = Walk { root: schema, schemas: 0, refs: 0, pairs_left: disjoint::PAIRS_MAX, multiples: Vec::new() };
    walk.visit(&mut copy, "")?;
    numbers::check_multiples(&walk.multiples)?;
    meets::check(&copy)?;
    if let Json::Object(members) = &mut copy {
        members.insert("x-guidance".into(), settings(space)?);
    }
    Ok(copy)
}

/// Every `%json { .. }` of a Lark grammar, checked as [`prepare`] does.
///
/// # Errors
/// As [`prepare`], or the JSON is malformed.
pub(super) fn prepare_in_lark(text: &str) -> Result<String, GrammarError> {
    const MARK: &str = "%json";
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut operators = 0;
    while let Some(at) = find(rest, |text| text.starts_with(MARK.as_bytes())) {
        let (front, back) = rest.split_at(at + MARK.len());
        operators += set_operators(front);
        out.push_str(front);
        let mut values = serde_json::Deserializer::from_str(back).into_iter::<Json>();
        let schema = values.next().and_then(Result::ok);
        let schema = schema.ok_or_else(|| GrammarError("`%json` must be followed by a JSON schema".into()))?;
        let used = values.byte_offset();
        out.push(' ');
        out.push_str(&prepare(&schema, &JsonSpace::Fixed)?.to_string());
        rest = back.get(used..).unwrap_or("");
    }
    out.push_str(rest);
    if operators + set_operators(rest) > limits::PATTERNS_MEET_MAX {
        let limit = limits::PATTERNS_MEET_MAX;
        return Err(GrammarError(format!(
            "the grammar has more than {limit} `&` and `~` (and, not); write them as one regular expression"
        )));
    }
    Ok(out)
}

/// How many `&` and `~` a Lark text has. (`~` in front of a number repeats.)
fn set_operators(mut text: &str) -> usize {
    let is_operator = |text: &[u8]| match text {
        [b'&', ..] => true,
        [b'~', rest @ ..] => !rest.trim_ascii_start().first().is_some_and(|c| matches!(c, b'0'..=b'9' | b'-' | b'+')),
        _ => false,
    };
    let mut count = 0;
    while let Some(at) = find(text, is_operator) {
        count += 1;
        text = text.get(at + 1..).unwrap_or("");
    }
    count
}

/// The next place, neither in a string nor in a regular expression nor in a comment, where the text is what is looked for.
fn find(text: &str, is_it: impl Fn(&[u8]) -> bool) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let rest = bytes.get(at..)?;
        match rest.first()? {
            b'"' => at += quoted(rest, b'"'),
            b'#' => at += line(rest),
            b'/' if rest.get(1) == Some(&b'/') => at += line(rest),
            b'/' => at += quoted(rest, b'/'),
            // A special token by its name, which may have any of these.
            b'<' => at += rest.iter().position(|byte| matches!(byte, b'>' | b'\n')).map_or(1, |end| end + 1),
            _ if is_it(rest) => return Some(at),
            _ => at += 1,
        }
    }
    None
}

/// Bytes of a text in `quote`s, both included.
fn quoted(bytes: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while let Some(&byte) = bytes.get(at) {
        at += 1 + usize::from(byte == b'\\');
        if byte == quote {
            break;
        }
    }
    at
}

fn line(bytes: &[u8]) -> usize {
    bytes.iter().position(|&byte| byte == b'\n').unwrap_or(bytes.len())
}

/// Without `\u` escapes a string has one spelling, so a key cannot come again in another.
fn settings(space: &JsonSpace) -> Result<Json, GrammarError> {
    const ESCAPES: &str = "nrbtf\\\"";
    let (item, key, free, pattern) = match space {
        JsonSpace::Fixed => (", ", ": ", false, None),
        JsonSpace::Free => (",", ":", true, None),
        JsonSpace::Pattern(pattern) => (",", ":", false, Some(regex::white_space(pattern)?)),
    };
    Ok(json!({
        "item_separator": item, "key_separator": key, "whitespace_flexible": free, "whitespace_pattern": pattern,
        "json_allowed_escapes": ESCAPES,
    }))
}

struct Walk<'a> {
    /// The schema as it came: what references point into.
    root: &'a Json,
    schemas: usize,
    refs: usize,
    /// What may still be spent on telling the schemas of `oneOf`s apart.
    pairs_left: u32,
    multiples: Vec<f64>,
}

impl Walk<'_> {
    /// Checks one schema and those inside it. `path` is a JSON pointer.
    fn visit(&mut self, schema: &mut Json, path: &str) -> Result<(), GrammarError> {
        self.schemas += 1;
        if self.schemas > limits::SCHEMA_NODES_MAX {
            return Err(GrammarError(format!("the schema has more than {} parts", limits::SCHEMA_NODES_MAX)));
        }
        let members = match schema {
            Json::Bool(_) => return Ok(()),
            Json::Object(members) => members,
            _ => return Err(GrammarError(format!("`{}` must be a schema (an object or a boolean)", shown(path)))),
        };
        clean(members);
        keywords::check(members, path)?;
        refuse(members, path)?;
        self.count_ref(members, path)?;
        check_format(members, path)?;
        numbers::check(members, path, &mut self.multiples)?;
        check_min_properties(members, path)?;
        self.settle_one_of(members);
        for (name, value) in members.iter_mut() {
            let path = format!("{path}/{name}");
            let is = |names: &[&str]| names.contains(&name.as_str());
            match value {
                Json::Object(map) if is(&MAPS) => {
                    map.iter_mut().try_for_each(|(key, schema)| self.visit(schema, &format!("{path}/{key}")))?;
                }
                Json::Array(list) if is(&LISTS) => {
                    list.iter_mut().enumerate().try_for_each(|(i, s)| self.visit(s, &format!("{path}/{i}")))?;
                }
                schema if is(&ONE) => self.visit(schema, &path)?,
                _ if is(&LISTS) => return Err(GrammarError(format!("`{path}` must be a list of schemas"))),
                _ if is(&MAPS) => return Err(GrammarError(format!("`{path}` must be an object of schemas"))),
                _ => {}
            }
        }
        Ok(())
    }

    fn count_ref(&mut self, members: &Map<String, Json>, path: &str) -> Result<(), GrammarError> {
        let Some(reference) = members.get("$ref") else { return Ok(()) };
        self.refs += 1;
        if self.refs > limits::SCHEMA_REFS_MAX {
            return Err(GrammarError(format!("the schema has more than {} `$ref`s", limits::SCHEMA_REFS_MAX)));
        }
        match reference.as_str() {
            Some(_) => Ok(()),
            None => Err(GrammarError(format!("`{path}/$ref` must be a string"))),
        }
    }

    /// `oneOf` whose schemas exclude each other is `anyOf`, which the library has. It finds that out by itself, but not
    /// through references.
    fn settle_one_of(&mut self, members: &mut Map<String, Json>) {
        let Some(Json::Array(schemas)) = members.get("oneOf") else { return };
        if !disjoint::all_disjoint(schemas, self.root, &mut self.pairs_left) {
            return;
        }
        let Some(schemas) = members.shift_remove("oneOf") else { return };
        if members.contains_key("anyOf") {
            add_schema(members, json!({"anyOf": schemas}));
        } else {
            members.insert("anyOf".into(), schemas);
        }
    }
}

/// Must hold too.
fn add_schema(members: &mut Map<String, Json>, schema: Json) {
    if let Json::Array(all) = members.entry("allOf").or_insert_with(|| json!([])) {
        all.push(schema);
    }
}

fn shown(path: &str) -> &str {
    if path.is_empty() { "/" } else { path }
}

/// Takes out what has no say.
fn clean(members: &mut Map<String, Json>) {
    ANNOTATIONS.iter().for_each(|name| {
        members.shift_remove(*name);
    });
    for (name, of) in IDLE {
        if !members.contains_key(of) {
            members.shift_remove(name);
        }
    }
    let off = |name: &str, value: bool| members.get(name) == Some(&Json::Bool(value));
    let idle = [
        ("uniqueItems", off("uniqueItems", false)),
        ("unevaluatedProperties", off("unevaluatedProperties", true)),
        ("unevaluatedItems", off("unevaluatedItems", true)),
        // Of two forms of arrays the library would take the old one, and forget the new one.
        ("additionalItems", !matches!(members.get("items"), Some(Json::Array(_)))),
    ];
    idle.iter().filter(|(_, idle)| *idle).for_each(|(name, _)| {
        members.shift_remove(*name);
    });
}

fn refuse(members: &Map<String, Json>, path: &str) -> Result<(), GrammarError> {
    if let Some((name, instead)) = REFUSED.iter().find(|(name, _)| members.contains_key(*name)) {
        return Err(GrammarError(format!("`{path}/{name}` is not supported: {instead}")));
    }
    if members.contains_key("prefixItems") && matches!(members.get("items"), Some(Json::Array(_))) {
        return Err(GrammarError(format!("`{path}/items` must be a schema where there is `prefixItems`")));
    }
    let count = |name: &str| members.get(name).and_then(Json::as_object).map_or(0, Map::len);
    for (name, limit) in [("properties", limits::PROPERTIES_MAX), ("patternProperties", limits::PATTERN_PROPERTIES_MAX)]
    {
        if count(name) > limit {
            return Err(GrammarError(format!(
                "`{path}/{name}` has {} entries; up to {limit} can be held",
                count(name)
            )));
        }
    }
    if members.get("enum").and_then(Json::as_array).is_some_and(Vec::is_empty) {
        return Err(GrammarError(format!("`{path}/enum` must have at least one value")));
    }
    Ok(())
}

/// A format that is no format of text has no say; any other is held or refused.
fn check_format(members: &mut Map<String, Json>, path: &str) -> Result<(), GrammarError> {
    let Some(format) = members.get("format") else { return Ok(()) };
    let Some(format) = format.as_str() else {
        return Err(GrammarError(format!("`{path}/format` must be a string")));
    };
    let text = match members.get("type") {
        None => true,
        Some(Json::Array(types)) => types.iter().any(|t| t == "string"),
        Some(kind) => kind == "string",
    };
    if !text || DISPLAY_FORMATS.contains(&format) {
        members.shift_remove("format");
        return Ok(());
    }
    let pattern = match format {
        "date" => Some(format!("^{DATE}$")),
        "time" => Some(format!("^{TIME}$")),
        "date-time" => Some(format!("^{DATE}T{TIME}$")),
        _ => None,
    };
    if let Some(pattern) = pattern {
        members.shift_remove("format");
        add_schema(members, json!({"pattern": pattern}));
        return Ok(());
    }
    if FORMATS.contains(&format) {
        return Ok(());
    }
    let message =
        format!("`{path}/format`: `{format}` is not supported; use `pattern`, or one of {}", FORMATS.join(", "));
    Err(GrammarError(message))
}

/// A key may come twice, and then counts once: with two or more free keys a count cannot be held.
fn check_min_properties(members: &Map<String, Json>, path: &str) -> Result<(), GrammarError> {
    let least = members.get("minProperties").and_then(Json::as_u64).unwrap_or(0);
    let required = members.get("required").and_then(Json::as_array).map_or(0, Vec::len) as u64;
    if least > required + 1 {
        let message = format!("`{path}/minProperties` must be at most one more than the properties in `required`");
        return Err(GrammarError(message));
    }
    Ok(())
}
