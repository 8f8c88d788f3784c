//! How many patterns a string of a schema may have to match at once. The library builds their intersection, and neither its
//! time nor its memory is bounded while it looks whether anything matches all of them: both double with each pattern.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value as Json};

use super::{GrammarError, limits};

/// Where items of arrays are in [`Counts::inside`]. No property is called that by accident; if one is, it counts too often.
const ITEMS: &str = "\u{0}items";
/// References that lead back into themselves need more than one round until counts are final. Few need a third.
const ROUNDS_MAX: usize = 8;

/// # Errors
/// More than [`limits::PATTERNS_MEET_MAX`] patterns meet in a string of `schema`.
pub(super) fn check(schema: &Json) -> Result<(), GrammarError> {
    let mut counter = Counter { root: schema, known: HashMap::new(), round: 0 };
    while counter.round < ROUNDS_MAX {
        counter.round += 1;
        let before: Vec<usize> = counter.totals();
        if counter.count(schema).most() > limits::PATTERNS_MEET_MAX {
            return Err(GrammarError(format!(
                "more than {} patterns (`pattern`, `format`) meet in one string, by `allOf`, `$ref` or `anyOf` beside others; \
                 write them as one `pattern`",
                limits::PATTERNS_MEET_MAX
            )));
        }
        if counter.totals() == before {
            break;
        }
    }
    Ok(())
}

/// Patterns that meet in one place: an upper bound.
#[derive(Clone, Default)]
struct Counts {
    /// If the value is a string.
    here: usize,
    /// Anywhere inside a property or the items.
    inside: BTreeMap<String, usize>,
    /// Anywhere inside any other property.
    others: usize,
}

impl Counts {
    fn most(&self) -> usize {
        self.inside.values().copied().fold(self.here.max(self.others), usize::max)
    }

    fn within(&self, name: &str) -> usize {
        self.inside.get(name).copied().unwrap_or(if name == ITEMS { 0 } else { self.others })
    }

    /// Of a value for which both hold (`usize::saturating_add`), or one of them (`usize::max`).
    fn join(self, other: &Self, how: fn(usize, usize) -> usize) -> Self {
        let names = self.inside.keys().chain(other.inside.keys());
        let inside = names.map(|name| (name.clone(), how(self.within(name), other.within(name)))).collect();
        Self { here: how(self.here, other.here), inside, others: how(self.others, other.others) }
    }
}

struct Counter<'a> {
    root: &'a Json,
    /// What references lead to, as far as it is known, and the round in which it was counted.
    known: HashMap<&'a str, (usize, Counts)>,
    round: usize,
}

impl<'a> Counter<'a> {
    fn totals(&self) -> Vec<usize> {
        let mut totals: Vec<(&str, usize)> =
            self.known.iter().map(|(name, (_, counts))| (*name, counts.most())).collect();
        totals.sort_unstable();
        totals.into_iter().map(|(_, total)| total).collect()
    }

    fn count(&mut self, schema: &'a Json) -> Counts {
        let Json::Object(members) = schema else { return Counts::default() };
        let both = usize::saturating_add;
        let mut counts = self.own(members);
        if let Some(reference) = members.get("$ref").and_then(Json::as_str) {
            let there = self.referred(reference);
            counts = counts.join(&there, both);
        }
        for all in list(members, "allOf") {
            let one = self.count(all);
            counts = counts.join(&one, both);
        }
        for name in ["anyOf", "oneOf"] {
            let mut options = Counts::default();
            for option in list(members, name) {
                let one = self.count(option);
                options = options.join(&one, usize::max);
            }
            counts = counts.join(&options, both);
        }
        counts
    }

    /// Without the members that add whole schemas to this one.
    fn own(&mut self, members: &'a Map<String, Json>) -> Counts {
        let here = ["pattern", "format"].iter().filter(|name| members.contains_key(**name)).count();
        let by_pattern =
            map(members, "patternProperties").map(|(_, schema)| self.count(schema).most()).max().unwrap_or(0);
        let any = members.get("additionalProperties").map_or(0, |schema| self.count(schema).most());
        let mut inside = BTreeMap::new();
        for (name, schema) in map(members, "properties") {
            inside.insert(name.clone(), self.count(schema).most().saturating_add(by_pattern));
        }
        let single = ["items", "additionalItems"].iter().filter_map(|name| members.get(*name));
        let items = single.chain(list(members, "prefixItems")).chain(list(members, "items"));
        let items = items.map(|schema| self.count(schema).most()).max();
        inside.extend(items.map(|most| (ITEMS.to_owned(), most)));
        Counts { here, inside, others: by_pattern.max(any) }
    }

    fn referred(&mut self, reference: &'a str) -> Counts {
        if let Some((round, known)) = self.known.get(reference)
            && *round == self.round
        {
            return known.clone();
        }
        let target = reference.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer));
        let Some(target) = target else { return Counts::default() };
        // While it is being counted, it counts as in the round before.
        self.known.entry(reference).or_default().0 = self.round;
        let counts = self.count(target);
        self.known.insert(reference, (self.round, counts.clone()));
        counts
    }
}

fn list<'a>(members: &'a Map<String, Json>, name: &str) -> impl Iterator<Item = &'a Json> + use<'a> {
    members.get(name).and_then(Json::as_array).into_iter().flatten()
}

fn map<'a>(members: &'a Map<String, Json>, name: &str) -> impl Iterator<Item = (&'a String, &'a Json)> + use<'a> {
    members.get(name).and_then(Json::as_object).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const MAX: usize = limits::PATTERNS_MEET_MAX;

    fn pattern(i: usize) -> Json {
        json!({"pattern": format!("a{i}")})
    }

    fn patterns(count: usize) -> Vec<Json> {
        (0..count).map(pattern).collect()
    }

    #[test]
    fn patterns_that_meet_are_counted_however_they_meet() {
        let chain = |count: usize| {
            let mut defs = Map::new();
            for i in 0..count {
                defs.insert(
                    format!("d{i}"),
                    json!({"$ref": format!("#/$defs/d{}", i + 1), "pattern": format!("a{i}")}),
                );
            }
            defs.insert(format!("d{count}"), json!({"type": "string"}));
            json!({"$ref": "#/$defs/d0", "$defs": defs})
        };
        let cases: [fn(Vec<Json>) -> Json; 6] = [
            |all| json!({"type": "string", "allOf": all}),
            |all| json!({"items": {"allOf": [{"allOf": all}, {"minLength": 1}]}}),
            |all| json!({"allOf": all.into_iter().map(|p| json!({"properties": {"x": p}})).collect::<Vec<_>>()}),
            |all| json!({"allOf": all.into_iter().map(|p| json!({"additionalProperties": p})).collect::<Vec<_>>()}),
            |all| json!({"allOf": all.into_iter().map(|p| json!({"anyOf": [p, {"type": "null"}]})).collect::<Vec<_>>()}),
            |all| json!({"properties": {"x": {"$ref": "#/$defs/all"}}, "$defs": {"all": {"allOf": all}}}),
        ];
        for make in cases {
            for (count, fits) in [(MAX, true), (MAX + 1, false)] {
                let schema = make(patterns(count));
                assert_eq!(check(&schema).is_ok(), fits, "{schema}");
            }
        }
        assert!(check(&chain(MAX)).is_ok() && check(&chain(MAX + 1)).is_err());
    }

    #[test]
    fn patterns_that_do_not_meet_are_not_added() {
        let apart: Map<String, Json> = (0..100).map(|i| (format!("p{i}"), pattern(i))).collect();
        let all: Vec<Json> = apart.iter().map(|(name, schema)| json!({"properties": {name: schema}})).collect();
        let node = json!({"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"next": {"$ref": "#/$defs/node"}}}]});
        let defs = json!({"node": node, "base": {"properties": {"id": pattern(0)}}});
        for schema in [
            json!({"properties": apart}),
            json!({"anyOf": patterns(100)}),
            json!({"allOf": all}),
            json!({"$ref": "#/$defs/node", "$defs": defs}),
            json!({"$ref": "#"}),
        ] {
            assert!(check(&schema).is_ok(), "{schema}");
        }
    }

    #[test]
    fn what_a_reference_leads_back_to_counts_too() {
        // Counted from `a`, `b` is met while `a` has no count yet.
        let a = json!({"allOf": patterns(MAX), "properties": {"b": {"$ref": "#/$defs/b"}}});
        let b = json!({"properties": {"a": {"$ref": "#/$defs/a"}}});
        let twice = json!({"allOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/b"}]});
        let schema = json!({"properties": {"x": {"$ref": "#/$defs/a"}, "y": twice}, "$defs": {"a": a, "b": b}});
        assert!(check(&schema).is_err());
    }
}
