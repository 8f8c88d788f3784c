"""JSON schemas of many kinds, and schemas, expressions and grammars that mean harm. Names are for messages of tests."""

import itertools


def obj(properties, required=None, **more):
    """A closed object with all properties required, unless said otherwise."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False} | more


def strings():
    yield "string", {"type": "string", "maxLength": 40}
    for low, high in [(0, 0), (0, 5), (3, 3), (1, 12), (8, 20)]:
        yield f"string_{low}_{high}", {"type": "string", "minLength": low, "maxLength": high}
    patterns = {
        "hex": "^[0-9a-f]{6}$", "word": r"^\w{2,8}$", "phone": r"^\+[1-9]\d{6,11}$", "semver": r"^\d{1,2}\.\d{1,2}\.\d{1,2}$",
        "alternatives": "^(red|green|blue)$", "unanchored": "ab+c", "prefix": "^id-", "suffix": "-end$", "space": r"^\S+\s\S+$",
        "class": "^[^aeiou]{3}$", "optional": "^colou?r$", "unicode": "^[äöü]{2}$", "quote": "^\"x\"$", "backslash": r"^C:\\[a-z]{3}$",
        "slash": "^/[a-z]{2}/[a-z]{2}$", "nested": "^(a(b(c)?)?)?d$", "dots": "^...$", "lazy": "^a+?b{2}$",
    }
    for name, pattern in patterns.items():
        yield f"pattern_{name}", {"type": "string", "pattern": pattern, "maxLength": 40}
    yield "pattern_and_length", {"type": "string", "pattern": "^[a-z]+$", "minLength": 4, "maxLength": 9}
    for name in ["date-time", "date", "time", "duration", "ipv4", "ipv6", "uuid"]:
        yield f"format_{name}", {"type": "string", "format": name}
    yield "format_email", {"type": "string", "format": "email", "maxLength": 24}
    yield "format_hostname", {"type": "string", "format": "hostname", "maxLength": 20}
    yield "format_uri", {"type": "string", "format": "uri", "maxLength": 30}


def numbers():
    yield "integer", {"type": "integer", "minimum": -10**9, "maximum": 10**9}
    yield "number", {"type": "number", "minimum": -1000, "maximum": 1000}
    bounds = [(0, 9), (1, 1), (-5, 5), (10, 99), (-100, -7), (0, 100000), (7, 1234), (-1, 0), (999, 1001)]
    for low, high in bounds:
        yield f"integer_{low}_{high}", {"type": "integer", "minimum": low, "maximum": high}
    for low, high in [(0, 1), (-1.5, 2.25), (0.001, 0.01), (100, 1000), (-0.5, -0.25)]:
        yield f"number_{low}_{high}", {"type": "number", "minimum": low, "maximum": high}
    yield "integer_exclusive", {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}
    yield "number_exclusive", {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10}
    yield "integer_draft4", {"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 9}
    for step in [2, 3, 5, 7, 10, 25, 100]:
        yield f"multiple_{step}", {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 10000}
    yield "multiple_half", {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 100}
    yield "int64", {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1, "format": "int64"}


def enums():
    yield "enum_strings", {"enum": ["north", "south", "east", "west"]}
    yield "enum_mixed", {"enum": ["a", 1, 2.5, None, True, [1, 2], {"k": "v"}]}
    yield "enum_one", {"enum": ["only"]}
    yield "enum_prefixes", {"enum": ["a", "ab", "abc", "abcd"]}
    yield "enum_unicode", {"enum": ["grün", "日本", "😀", "\"quoted\"", "line\nbreak", "back\\slash", "tab\t"]}
    yield "enum_many", {"enum": [f"item-{i:03}" for i in range(300)]}
    for value in ["x", 3, -2.5, None, True, False, [], {}, ["a", {"b": None}], {"a": [1, {"c": "d"}]}, ""]:
        yield f"const_{value!r}", {"const": value}
    yield "boolean", {"type": "boolean"}
    yield "null", {"type": "null"}


def arrays():
    short = {"type": "integer", "minimum": 0, "maximum": 99}
    for low, high in [(0, 0), (0, 1), (1, 1), (2, 5), (5, 5), (0, 12)]:
        yield f"array_{low}_{high}", {"type": "array", "items": short, "minItems": low, "maxItems": high}
    word = {"type": "string", "pattern": "^[a-z]{1,6}$"}
    yield "array_strings", {"type": "array", "items": word, "maxItems": 6}
    yield "array_enum", {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 8}
    yield "array_objects", {"type": "array", "items": obj({"id": short, "tag": word}), "maxItems": 3}
    yield "array_arrays", {"type": "array", "items": {"type": "array", "items": short, "maxItems": 3}, "minItems": 2, "maxItems": 3}
    yield "matrix", {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "array", "items": short, "minItems": 2, "maxItems": 2}}
    yield "tuple", {"type": "array", "prefixItems": [word, short, {"type": "boolean"}], "items": False, "minItems": 3}
    yield "tuple_open", {"type": "array", "prefixItems": [word, short], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5}
    yield "tuple_partial", {"type": "array", "prefixItems": [word, short, short], "items": False, "minItems": 1}
    yield "tuple_draft7", {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [word, short],
                           "additionalItems": False, "minItems": 2}
    yield "array_any_of", {"type": "array", "items": {"anyOf": [short, word, {"type": "null"}]}, "minItems": 3, "maxItems": 5}
    yield "array_const", {"type": "array", "items": {"const": "go"}, "minItems": 3, "maxItems": 3}
    yield "unique_off", {"type": "array", "items": short, "uniqueItems": False, "maxItems": 3}


def objects():
    word = {"type": "string", "pattern": "^[a-z]{1,8}$"}
    small = {"type": "integer", "minimum": 0, "maximum": 150}
    yield "empty_object", obj({})
    for count in [1, 2, 5, 12, 30]:
        yield f"object_{count}", obj({f"field{i}": small for i in range(count)})
    yield "optional_one", obj({"a": word, "b": small}, ["a"])
    yield "optional_all", obj({"a": word, "b": small, "c": {"type": "boolean"}}, [])
    yield "optional_middle", obj({"a": small, "b": small, "c": small, "d": small}, ["b", "d"])
    yield "order", obj({"zebra": small, "apple": small, "Mango": small, "_x": small})
    yield "odd_names", obj({"a b": small, "with\"quote": small, "ünï": small, "": small, "$ref": small, "type": small, "a/b~c": small})
    yield "person", obj({"name": word, "age": small, "email": {"type": "string", "format": "email", "maxLength": 20},
                         "tags": {"type": "array", "items": word, "maxItems": 3}})
    for depth in [2, 4, 8, 16]:
        nested = obj({"leaf": small})
        for _ in range(depth):
            nested = obj({"in": nested})
        yield f"nested_{depth}", nested
    yield "map", {"type": "object", "patternProperties": {"^[a-z]{2}$": small}, "additionalProperties": False, "maxProperties": 4}
    yield "map_schema", {"type": "object", "additionalProperties": small, "maxProperties": 3}
    yield "map_and_named", {"type": "object", "properties": {"id": word}, "required": ["id"], "additionalProperties": small, "maxProperties": 3}
    yield "min_properties", {"type": "object", "additionalProperties": small, "minProperties": 1, "maxProperties": 2}
    yield "required_only", {"type": "object", "required": ["a"], "additionalProperties": small, "maxProperties": 1}
    yield "at_least_one", obj({"a": small, "b": small}, [], minProperties=1)
    yield "at_most_one", obj({"a": small, "b": small}, [], maxProperties=1)
    yield "titles", obj({"a": {"title": "A", "description": "the first", "default": 5, "examples": [1], "deprecated": True, **small}},
                        title="T", description="d", **{"$comment": "c"})


def unions():
    word = {"type": "string", "pattern": "^[a-z]{1,5}$"}
    small = {"type": "integer", "minimum": -9, "maximum": 9}
    for first, second in itertools.combinations(["null", "boolean", "integer", "string"], 2):
        limits = {"minimum": 0, "maximum": 9, "maxLength": 6}
        yield f"types_{first}_{second}", {"type": [first, second], **limits}
    yield "nullable_object", {"anyOf": [obj({"a": small}), {"type": "null"}]}
    yield "any_of", {"anyOf": [word, small, {"type": "boolean"}]}
    yield "any_of_objects", {"anyOf": [obj({"a": small}), obj({"b": word}), obj({"a": word, "b": small})]}
    yield "any_of_beside", {"type": "object", "properties": {"k": small}, "required": ["k"], "additionalProperties": False,
                            "anyOf": [{"properties": {"k": {"minimum": 5}}}, {"properties": {"k": {"maximum": -5}}}]}
    yield "one_of_types", {"oneOf": [word, small, {"type": "null"}]}
    yield "one_of_constants", {"oneOf": [{"const": 1}, {"const": "1"}, {"const": [1]}]}
    tagged = [obj({"kind": {"const": kind}, "value": value}) for kind, value in [("n", small), ("w", word), ("b", {"type": "boolean"})]]
    yield "one_of_tagged", {"oneOf": tagged}
    yield "one_of_tagged_refs", {"oneOf": [{"$ref": f"#/$defs/d{i}"} for i in range(3)], "$defs": {f"d{i}": s for i, s in enumerate(tagged)}}
    yield "discriminator", {"$defs": {"Cat": obj({"type": {"const": "cat"}, "lives": small}), "Dog": obj({"type": {"const": "dog"}, "name": word})},
                            "type": "object", "additionalProperties": False, "required": ["pet"], "properties": {"pet": {
                                "discriminator": {"propertyName": "type", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
                                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}}}
    yield "one_of_and_any_of", {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "anyOf": [{"type": "integer"}, {"type": "string"}],
                                "$defs": {"a": small, "b": word}}
    yield "all_of", {"allOf": [{"type": "integer"}, {"minimum": 10}, {"maximum": 20}]}
    yield "all_of_objects", {"allOf": [{"type": "object", "properties": {"a": small}, "required": ["a"]},
                                       {"properties": {"b": word}, "required": ["b"], "maxProperties": 2}]}
    yield "all_of_strings", {"type": "string", "allOf": [{"pattern": "^[a-f]+$"}, {"minLength": 2}, {"maxLength": 4}]}
    yield "all_of_multiples", {"type": "integer", "minimum": 1, "maximum": 9999, "allOf": [{"multipleOf": 4}, {"multipleOf": 6}]}
    yield "enum_typed", {"type": "string", "enum": ["a", "b", "c"]}
    yield "nested_unions", {"anyOf": [{"anyOf": [small, {"type": "null"}]}, {"type": "array", "items": {"anyOf": [word, small]}, "maxItems": 3}]}


def references():
    word = {"type": "string", "pattern": "^[a-z]{1,5}$"}
    small = {"type": "integer", "minimum": 0, "maximum": 9}
    yield "ref", {"$ref": "#/$defs/n", "$defs": {"n": small}}
    yield "ref_definitions", {"type": "array", "items": {"$ref": "#/definitions/w"}, "maxItems": 4, "definitions": {"w": word}}
    yield "ref_chain", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": small}}
    yield "ref_beside", obj({"n": {"$ref": "#/$defs/n", "maximum": 5, "description": "d"}}, **{"$defs": {"n": small}})
    yield "ref_odd_name", {"$ref": "#/$defs/a~1b", "$defs": {"a/b": small}}
    yield "ref_to_property", obj({"a": small, "b": {"$ref": "#/properties/a"}})
    yield "linked_list", {"$ref": "#/$defs/node", "$defs": {"node": obj({"v": small, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})}}
    yield "tree", {"$ref": "#/$defs/t", "$defs": {"t": obj({"v": small, "kids": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1}})}}
    yield "tree_root", obj({"v": small, "kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}})
    yield "expression", {"$ref": "#/$defs/e", "$defs": {"e": {"anyOf": [small, small, small, obj({"op": {"enum": ["+", "-"]}, "l": {"$ref": "#/$defs/e"}, "r": {"$ref": "#/$defs/e"}})]}}}
    yield "mutual", {"$ref": "#/$defs/a", "$defs": {"a": obj({"b": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}}),
                                                    "b": obj({"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}})}}
    for count in [3, 10, 40]:
        defs = {f"d{i}": {"type": "integer", "minimum": i, "maximum": i + 3} for i in range(count)}
        yield f"many_refs_{count}", obj({f"p{i}": {"$ref": f"#/$defs/d{i}"} for i in range(count)}, **{"$defs": defs})


def applications():
    """What people ask for."""
    word = {"type": "string", "pattern": "^[A-Za-z ]{1,16}$"}
    money = {"type": "number", "minimum": 0, "maximum": 9999}
    yield "invoice", obj({"number": {"type": "string", "pattern": "^INV-[0-9]{4}$"}, "date": {"type": "string", "format": "date"},
                          "lines": {"type": "array", "minItems": 1, "maxItems": 2, "items": obj({"item": word, "quantity": {"type": "integer", "minimum": 1, "maximum": 99}, "price": money})},
                          "paid": {"type": "boolean"}})
    yield "sentiment", obj({"label": {"enum": ["positive", "neutral", "negative"]}, "confidence": {"type": "number", "minimum": 0, "maximum": 1}})
    yield "entities", obj({"entities": {"type": "array", "maxItems": 3, "items": obj({"text": word, "type": {"enum": ["PER", "LOC", "ORG"]}})}})
    yield "weather_call", obj({"name": {"const": "get_weather"}, "arguments": obj({"city": word, "unit": {"enum": ["C", "F"]}})})
    yield "sql_filter", obj({"column": {"enum": ["id", "name", "created"]}, "op": {"enum": ["=", "<", ">", "like"]}, "value": {"type": ["string", "integer"], "maxLength": 9, "minimum": 0, "maximum": 99}})
    yield "geo_point", obj({"type": {"const": "Point"}, "coordinates": {"type": "array", "prefixItems": [{"type": "number", "minimum": -180, "maximum": 180}, {"type": "number", "minimum": -90, "maximum": 90}], "items": False, "minItems": 2}})
    yield "steps", obj({"steps": {"type": "array", "minItems": 1, "maxItems": 2, "items": obj({"explanation": word, "output": word})}, "final_answer": word})
    yield "calendar", obj({"title": word, "start": {"type": "string", "format": "date-time"}, "attendees": {"type": "array", "items": {"type": "string", "format": "email", "maxLength": 16}, "maxItems": 2}})
    yield "config", obj({"debug": {"type": "boolean"}, "level": {"type": "integer", "minimum": 0, "maximum": 5}, "hosts": {"type": "array", "items": {"type": "string", "format": "ipv4"}, "maxItems": 2}}, ["level"])
    for count in [2, 6, 20]:
        yield f"classes_{count}", obj({"class": {"enum": [f"class_{i}" for i in range(count)]}, "score": {"type": "integer", "minimum": 0, "maximum": 100}})


def pairs():
    """Every kind of leaf under every kind of parent."""
    leaves = {
        "bool": {"type": "boolean"}, "int": {"type": "integer", "minimum": 0, "maximum": 20}, "text": {"type": "string", "maxLength": 6},
        "enum": {"enum": ["u", "v"]}, "null": {"type": ["null", "boolean"]}, "ref": {"$ref": "#/$defs/r"}, "uuid": {"type": "string", "format": "uuid"},
    }
    parents = {
        "required": lambda leaf: obj({"x": leaf, "y": leaf}), "optional": lambda leaf: obj({"x": leaf, "y": leaf}, []),
        "array": lambda leaf: {"type": "array", "items": leaf, "minItems": 1, "maxItems": 3}, "deep": lambda leaf: obj({"a": obj({"b": {"type": "array", "items": leaf, "maxItems": 2}})}),
        "union": lambda leaf: {"anyOf": [leaf, {"type": "array", "items": leaf, "minItems": 1, "maxItems": 2}]},
        "map": lambda leaf: {"type": "object", "additionalProperties": leaf, "maxProperties": 2},
    }
    for (parent, make), (name, leaf) in itertools.product(parents.items(), leaves.items()):
        yield f"{parent}_{name}", make(leaf) | ({"$defs": {"r": {"enum": ["r1", "r2"]}}} if name == "ref" else {})


FAMILIES = [strings, numbers, enums, arrays, objects, unions, references, applications, pairs]
SCHEMAS = {f"{family.__name__}:{name}": schema for family in FAMILIES for name, schema in family()}


def nested(keyword, depth, leaf):
    value = leaf
    for _ in range(depth):
        value = {keyword: value} if keyword != "anyOf" else {"anyOf": [value, {"type": "null"}]}
    return value


LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Each is small; all at once they are a product.
SPREAD = [f".*{letter}.{{{i + 5}}}.*" for i, letter in enumerate(LETTERS)]


def hostile_schemas():
    yield "one_of_options_inside_options", {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 40}}}
    deep = {"type": "string"}
    for _ in range(4):
        deep = {"anyOf": [deep] * 8}
    yield "one_of_options_apart", {"oneOf": [deep, {"type": "null"}]}
    yield "one_of_enums", {"oneOf": [{"enum": list(range(i * 400, i * 400 + 400))} for i in range(10)]}
    yield "patterns_meet", {"type": "string", "allOf": [{"pattern": pattern} for pattern in SPREAD]}
    yield "patterns_meet_8", {"type": "string", "allOf": [{"pattern": pattern} for pattern in SPREAD[:8]]}
    yield "patterns_meet_by_refs", {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", "pattern": p} for i, p in enumerate(SPREAD)}
                                    | {"d26": {"type": "string"}}}
    yield "patterns_meet_in_property", {"allOf": [{"type": "object", "required": ["x"], "properties": {"x": {"type": "string", "pattern": p}}} for p in SPREAD]}
    yield "patterns_meet_in_options", {"type": "string", "allOf": [{"anyOf": [{"pattern": f"a{i}_{j}.*"} for j in range(40)]} for i in range(4)]}
    yield "ref_to_itself", {"$ref": "#"}
    yield "ref_loop", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    yield "ref_loop_all_of", {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}}
    yield "ref_never_ends", {"$ref": "#/$defs/a", "$defs": {"a": obj({"a": {"$ref": "#/$defs/a"}})}}
    yield "ref_chain", {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1500)} | {"d1500": {"type": "null"}}}
    yield "ref_chain_items", {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1200)} | {"d1200": {"type": "null"}}}
    yield "ref_chain_all_of", {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}], "minimum": i} for i in range(900)} | {"d900": {"type": "integer"}}}
    yield "ref_doubling", {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": {"type": "integer"}}}
    yield "ref_doubling_properties", {"$ref": "#/$defs/d0", "$defs": {f"d{i}": obj({"a": {"$ref": f"#/$defs/d{i + 1}"}, "b": {"$ref": f"#/$defs/d{i + 1}"}}) for i in range(40)} | {"d40": {"type": "integer"}}}
    yield "too_many_refs", {"anyOf": [{"$ref": "#/$defs/a"}] * 3000, "$defs": {"a": {"type": "null"}}}
    yield "remote_ref", {"$ref": "https://example.com/schema.json"}
    yield "file_ref", {"$ref": "file:///etc/passwd"}
    yield "missing_ref", {"$ref": "#/$defs/none"}
    for keyword in ["not", "items", "additionalProperties", "anyOf"]:
        yield f"deep_{keyword}", nested(keyword, 60, {"type": "integer"})
    yield "deep_properties", nested("items", 110, {"type": "integer"})
    yield "all_of_product", {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}, {"multipleOf": i}]} for i in range(1, 40)], "type": "integer"}
    yield "all_of_strings", {"allOf": [{"anyOf": [{"pattern": f"a{i}"}, {"pattern": f"b{i}"}]} for i in range(30)], "type": "string"}
    yield "any_of_wide_twice", {"allOf": [{"anyOf": [{"const": i} for i in range(1000)]}, {"anyOf": [{"const": i} for i in range(1000)]}]}
    yield "enum_huge", {"enum": [f"{i:05}-{'x' * (i % 7)}" for i in range(5000)]}
    yield "enum_numbers", {"enum": list(range(9000))}
    yield "enum_long", {"enum": ["y" * 30000, "y" * 29999 + "z"]}
    yield "enum_product", {"allOf": [{"enum": [f"{i}" for i in range(2000)]}, {"enum": [f"{i}" for i in range(2000)]}]}
    yield "const_against_large", {"allOf": [{"anyOf": [{"type": "null"}] * 2500}, obj({f"p{i}": {"type": "integer"} for i in range(700)})]}
    yield "properties_many", obj({f"p{i}": {"type": "string"} for i in range(1200)}, [])
    yield "properties_many_closed", obj({f"p{i}": {"enum": [i]} for i in range(1200)})
    yield "pattern_properties_many", {"type": "object", "patternProperties": {f"^a{'b' * i}$": {"type": "integer"} for i in range(120)}, "additionalProperties": False}
    yield "pattern_properties_overlap", {"type": "object", "patternProperties": {"a": {}, "b": {}}}
    yield "items_huge", {"type": "array", "items": {"type": "integer"}, "minItems": 10**6, "maxItems": 10**9}
    yield "items_nested_huge", {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000, "items": {"type": "null"}}}}
    yield "length_huge", {"type": "string", "minLength": 10**9, "maxLength": 10**9 + 1}
    yield "length_wide", {"type": "string", "minLength": 5000, "maxLength": 100000, "pattern": "^(ab?c?)*$"}
    yield "length_many", obj({f"p{i}": {"type": "string", "minLength": i * 100, "maxLength": i * 1000} for i in range(300)})
    yield "bounds_odd", {"type": "number", "minimum": 1e-300, "maximum": 1e300}
    yield "bounds_tiny", {"type": "number", "minimum": 5e-324, "maximum": 1e-323}
    yield "multiple_zero", {"type": "integer", "multipleOf": 0}
    yield "multiple_tiny", {"type": "number", "multipleOf": 1e-15}
    yield "multiple_huge", {"type": "integer", "multipleOf": 4294967291}
    yield "multiple_prime", {"type": "integer", "multipleOf": 65521}
    yield "multiples_two_primes", {"type": "integer", "allOf": [{"multipleOf": 991}, {"multipleOf": 997}]}
    yield "multiples_three_primes", {"type": "integer", "allOf": [{"multipleOf": n} for n in [31, 37, 41]]}
    yield "multiples_many", {"type": "integer", "allOf": [{"multipleOf": n} for n in [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37]]}
    yield "min_properties_huge", {"type": "object", "minProperties": 10**12}
    yield "pattern_exponential", {"type": "string", "pattern": "(a|b)*a(a|b){40}$"}
    yield "pattern_intersection", {"type": "string", "pattern": "^(a|b)*a(a|b){20}$", "minLength": 100, "maxLength": 3000}
    yield "pattern_lookahead", {"type": "string", "pattern": "^(?=.*[A-Z])(?=.*[0-9]).{8,}$"}
    yield "pattern_backreference", {"type": "string", "pattern": r"^(a+)\1$"}
    yield "pattern_empty_set", {"type": "string", "pattern": "^a$", "minLength": 5}
    yield "pattern_unicode", {"type": "string", "pattern": r"^(\p{L}\p{N}){1,500}\p{Han}+$"}
    yield "patterns_many", obj({f"p{i}": {"type": "string", "pattern": f"^([a-z]{{{i}}}|[0-9]{{1,{i + 50}}})+x$"} for i in range(1, 200)})
    yield "false", obj({"a": False})
    yield "unsatisfiable", {"type": "integer", "minimum": 5, "maximum": 4}
    yield "guidance", {"type": "object", "x-guidance": {"lenient": True, "whitespace_flexible": True}, "not": {}}
    yield "wrong_types", {"type": 5, "properties": [], "required": "a", "enum": {}}
    yield "one_of_wide", {"oneOf": [obj({f"k{i}": {"type": "integer"}}, []) for i in range(900)]}


def hostile_regexes():
    yield "exponential", "(a|b)*a(a|b){40}"
    yield "exponential_long", "(.*a.{200}b)*"
    yield "counted", "a{1000}{1000}"
    yield "counted_deep", "((((((a{30}){30}){30}){30}){30}){30})"
    yield "counted_class", r"(\w{1,500}\s){1,500}"
    yield "counted_unicode", r"(\p{L}{1,200}\p{N}){1,200}"
    yield "open_many", "(" * 5000 + "a" + ")" * 5000
    yield "alternatives", "|".join(f"w{i}" for i in range(2200))
    yield "alternatives_any", "|".join(f".*{i}.*" for i in range(1200))
    yield "optional_many", "a?" * 3000 + "a" * 3000
    yield "stars", "(" * 60 + "a" + "*)" * 60
    yield "lookahead", "(?=a)b"
    yield "backreference", r"(a)\1"
    yield "broken", "[a-"
    yield "anchors", "a^b$c"
    yield "nothing", "[^\\x00-\\U0010FFFF]"
    yield "flags", "(?i)" + "straße" * 500
    yield "and_classes", "[a-z&&[^aeiou]]{5000}"
    yield "dots", ".{0,16000}x"
    yield "word_boundary", r"\bword\b"


def hostile_grammars():
    yield "and_many", "start: T\nT: " + " & ".join(f"/{p}/" for p in SPREAD)
    yield "and_8", "start: T\nT: " + " & ".join(f"/{p}/" for p in SPREAD[:8])
    yield "and_by_names", "start: T0\n" + "".join(f"T{i}: /{p}/ & T{i + 1}\n" for i, p in enumerate(SPREAD)) + "T26: /.*/"
    yield "or_of_nots", "start: T\nT: ~(" + " | ".join(f"~/{p}/" for p in SPREAD) + ")"
    yield "left_recursion", "start: start \"a\" | \"a\""
    yield "ambiguous", "start: e\ne: e e | \"a\" | \"\""
    yield "ambiguous_deep", "start: s s s s s s\ns: s s s | s s | \"a\" | \"\""
    yield "unproductive", "start: a\na: \"x\" a"
    yield "undefined", "start: missing"
    yield "parentheses", "start: " + "(" * 5000 + "\"a\"" + ")" * 5000
    yield "optional_chain", "start: " + "\"a\"? " * 4000
    yield "repeat_repeat", "start: (((\"a\"{100}){100}){100}){100}"
    yield "rules_many", "start: " + " | ".join(f"r{i}" for i in range(2500)) + "\n" + "\n".join(f"r{i}: \"{i}\"" for i in range(2500))
    yield "terminals_many", "start: " + " | ".join(f"T{i}" for i in range(1200)) + "\n" + "\n".join(f"T{i}: /[a-z]*{i}/" for i in range(1200))
    yield "terminal_and_not", "start: X\nX: /(a|b)*a(a|b){25}/ & ~/(b|a)*b(a|b){24}/"
    yield "no_start", "a: \"b\""
    yield "broken", "start: \"a"
    yield "nested_lark", "start: " + "%lark { start: " * 50 + "\"a\"" + " }" * 50
    yield "import", "%import common.WORD\nstart: WORD"
    yield "gbnf_loop", "root ::= root"
    yield "gbnf_wide", "root ::= " + " | ".join(f"\"{'ab' * (i % 40)}{i}\"" for i in range(1500))
    yield "gbnf_repeat", "root ::= ((\"a\"{100}){100}){100}"
    yield "json_inside", "start: %json " + "{\"not\": {}}"
    yield "binary", "start: \"\\u0000\" /[\\x00-\\xff]*/"


HOSTILE = (
    [(f"json:{name}", "json", schema) for name, schema in hostile_schemas()]
    + [(f"regex:{name}", "regex", text) for name, text in hostile_regexes()]
    + [(f"grammar:{name}", "grammar", text) for name, text in hostile_grammars()]
)
