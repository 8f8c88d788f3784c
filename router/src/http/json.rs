//! Request bodies: strict JSON, and typed access to its fields with errors that name the field.

use serde_json::{Map, Number, Value};

use super::error::{ApiError, Cause};

/// Arrays and objects inside each other.
const DEPTH_MAX: usize = 128;

/// Parses `body` as one JSON object.
///
/// # Errors
/// `invalid_json`: not UTF-8, not JSON, deeper than 128, a key twice in one object, a number outside f64, or no object.
pub(crate) fn object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match parse(body)? {
        Value::Object(map) => Ok(map),
        other => {
            Err(ApiError::new(Cause::InvalidJson, format!("the body must be a JSON object; got {}", type_name(&other))))
        }
    }
}

/// Parses `body` as one JSON value.
///
/// # Errors
/// As [`object`].
pub(crate) fn parse(body: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(body).map_err(|e| invalid(e.valid_up_to(), "the body is not UTF-8"))?;
    let mut parser = Parser { text, at: 0, depth: 0 };
    let value = parser.value()?;
    parser.skip_space();
    if parser.at < text.len() { Err(parser.fail("nothing may follow the value")) } else { Ok(value) }
}

fn invalid(at: usize, what: &str) -> ApiError {
    ApiError::new(Cause::InvalidJson, format!("invalid JSON at byte {at}: {what}"))
}

/// Recursive descent; strings and numbers are left to serde_json.
struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn fail(&self, what: &str) -> ApiError {
        invalid(self.at, what)
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self) -> Result<Value, ApiError> {
        self.skip_space();
        match self.peek() {
            Some(b'{') => self.nested(Self::members),
            Some(b'[') => self.nested(Self::elements),
            Some(b'"') => Ok(Value::String(self.string()?)),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(_) => self.word(),
            None => Err(self.fail("the body ends too early")),
        }
    }

    fn nested(&mut self, inside: fn(&mut Self) -> Result<Value, ApiError>) -> Result<Value, ApiError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.fail("more than 128 levels deep"));
        }
        self.at += 1;
        let value = inside(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn members(&mut self) -> Result<Value, ApiError> {
        let mut map = Map::new();
        self.skip_space();
        if self.eat(b'}') {
            return Ok(Value::Object(map));
        }
        loop {
            self.skip_space();
            if self.peek() != Some(b'"') {
                return Err(self.fail("a key in double quotes is expected"));
            }
            let key = self.string()?;
            self.skip_space();
            if !self.eat(b':') {
                return Err(self.fail("`:` is expected"));
            }
            let value = self.value()?;
            if map.contains_key(&key) {
                return Err(self.fail(&format!("the key `{}` occurs twice", super::error::cut(&key))));
            }
            map.insert(key, value);
            self.skip_space();
            if self.eat(b'}') {
                return Ok(Value::Object(map));
            }
            if !self.eat(b',') {
                return Err(self.fail("`,` or `}` is expected"));
            }
        }
    }

    fn elements(&mut self) -> Result<Value, ApiError> {
        let mut values = Vec::new();
        self.skip_space();
        if self.eat(b']') {
            return Ok(Value::Array(values));
        }
        loop {
            values.push(self.value()?);
            self.skip_space();
            if self.eat(b']') {
                return Ok(Value::Array(values));
            }
            if !self.eat(b',') {
                return Err(self.fail("`,` or `]` is expected"));
            }
        }
    }

    fn eat(&mut self, byte: u8) -> bool {
        let hit = self.peek() == Some(byte);
        self.at += usize::from(hit);
        hit
    }

    fn string(&mut self) -> Result<String, ApiError> {
        let start = self.at;
        let bytes = self.text.as_bytes();
        let mut end = start + 1;
        loop {
            match bytes.get(end) {
                Some(b'"') => break,
                Some(b'\\') => end += 2,
                Some(_) => end += 1,
                None => return Err(self.fail("a string is not closed")),
            }
        }
        let raw = self.text.get(start..=end).unwrap_or("");
        self.at = end + 1;
        serde_json::from_str(raw)
            .map_err(|_| invalid(start, "a string has a control character, a bad escape or half a surrogate pair"))
    }

    fn number(&mut self) -> Result<Value, ApiError> {
        let start = self.at;
        while matches!(self.peek(), Some(b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')) {
            self.at += 1;
        }
        let raw = self.text.get(start..self.at).unwrap_or("");
        let number: Number =
            serde_json::from_str(raw).map_err(|_| invalid(start, "a number is malformed or out of range"))?;
        Ok(Value::Number(number))
    }

    fn word(&mut self) -> Result<Value, ApiError> {
        let rest = self.text.get(self.at..).unwrap_or("");
        for (word, value) in [("true", Value::Bool(true)), ("false", Value::Bool(false)), ("null", Value::Null)] {
            if rest.starts_with(word) {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err(self.fail("a value is expected"))
    }
}

/// A JSON type as error messages name it.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// One object of a request; `path` is its name in error messages, empty for the body itself.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, path: String::new() }
    }

    pub(crate) fn nested(map: &'a Map<String, Value>, path: String) -> Self {
        Self { map, path }
    }

    /// The name of field `name` in messages.
    pub(crate) fn param(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Refuses every field that is not `known`: an operator's typing error is no setting left out.
    ///
    /// # Errors
    /// 400 that names the first one.
    pub(crate) fn only(&self, known: &[&str]) -> Result<(), ApiError> {
        match self.map.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let param = self.param(&super::error::cut(name));
                let message = format!("`{param}` is no field here; known are {}", known.join(", "));
                Err(ApiError::at(Cause::UnsupportedParameter, &param, message))
            }
        }
    }

    /// The value, unless it is absent or null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, name: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| ApiError::invalid(&self.param(name), wanted, type_name(value)))
    }

    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    pub(crate) fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    pub(crate) fn array(&self, name: &str) -> Result<Option<&'a Vec<Value>>, ApiError> {
        self.typed(name, "an array", Value::as_array)
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        let map = self.typed(name, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields::nested(map, self.param(name))))
    }

    /// An integer for which `accepts` holds; `rule` is the same in words.
    pub(crate) fn integer(
        &self,
        name: &str,
        rule: &str,
        accepts: impl Fn(i64) -> bool,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let param = self.param(name);
        let Value::Number(number) = value else {
            return Err(ApiError::invalid(&param, "an integer", type_name(value)));
        };
        match whole(number) {
            Some(given) if accepts(given) => Ok(Some(given)),
            _ => Err(ApiError::invalid(&param, rule, &number.to_string())),
        }
    }

    /// A finite number for which `accepts` holds.
    pub(crate) fn number(
        &self,
        name: &str,
        rule: &str,
        accepts: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let param = self.param(name);
        let Value::Number(number) = value else { return Err(ApiError::invalid(&param, "a number", type_name(value))) };
        match number.as_f64() {
            Some(given) if given.is_finite() && accepts(given) => Ok(Some(given)),
            _ => Err(ApiError::invalid(&param, rule, &number.to_string())),
        }
    }
}

/// The integer a number is; `16.0` is 16, as JSON writers of dynamic languages mean it.
pub(crate) fn whole(number: &Number) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    number.as_i64().or_else(|| {
        number.as_f64().filter(|f| f.fract() == 0.0 && f.abs() <= EXACT && !number.is_u64()).map(|f| f as i64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_strict_json_is_refused() {
        let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        let cases = [
            "",
            " ",
            "{",
            "}",
            "[1,]",
            "{\"a\":1,}",
            "{a:1}",
            "{'a':1}",
            "nul",
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "-1e999",
            "01",
            "1.",
            ".5",
            "+1",
            "--1",
            "1e",
            "\"",
            "\"\\x\"",
            "\"\\ud800\"",
            "\"\n\"",
            "\u{feff}{}",
            "{} {}",
            "{}x",
            "[1 2]",
            "{\"a\" 1}",
            "{\"a\":1,\"a\":2}",
            "{\"b\":{\"a\":1,\"a\":1}}",
            "{\"a\":1,\"\\u0061\":2}",
            "truefalse",
        ];
        for case in cases.into_iter().map(str::to_owned).chain([deep(129), "[".repeat(200_000)]) {
            let error = parse(case.as_bytes()).expect_err(&case[..case.len().min(40)]);
            assert_eq!(error.cause, Cause::InvalidJson, "{case:.40}");
        }
        assert_eq!(parse(b"\"\xff\"").unwrap_err().cause, Cause::InvalidJson);
        for case in ["[]", "1", "\"a\"", "null"] {
            assert_eq!(object(case.as_bytes()).unwrap_err().cause, Cause::InvalidJson);
        }
    }

    #[test]
    fn what_is_strict_json_reads_as_serde_json_reads_it() {
        let deep = format!("{}{}", "[".repeat(127), "]".repeat(127));
        let cases = [
            "{}",
            " [ ] ",
            "{\"a\":[1,-2.5e3,true,false,null,\"x\\n\\u00e9\\ud83d\\ude00\"]}",
            "0",
            "-0",
            "18446744073709551615",
            "-9223372036854775808",
            "1e308",
            "\"\\\"\\\\\"",
            &deep,
        ];
        for case in cases {
            assert_eq!(parse(case.as_bytes()).unwrap(), serde_json::from_str::<Value>(case).unwrap(), "{case}");
        }
        let edge = format!("{}{}", "[".repeat(128), "]".repeat(128));
        assert!(parse(edge.as_bytes()).is_ok(), "128 levels are accepted");
    }

    proptest::proptest! {
        #[test]
        fn any_text_gives_a_value_or_an_error(text in "[\\[\\]{}\",:0-9eE+.\\\\ truefalsn-]{0,40}") {
            if let Ok(value) = parse(text.as_bytes()) {
                proptest::prop_assert_eq!(Some(value), serde_json::from_str::<Value>(&text).ok());
            }
        }
    }

    #[test]
    fn integers_are_range_checked_without_wrapping() {
        let body = object(br#"{"a":9223372036854775807,"b":-9223372036854775808,"c":9223372036854775808,"d":16.0,"e":1e300,"f":1.5,"g":"1","h":null}"#).unwrap();
        let fields = Fields::new(&body);
        let any = |name: &str| fields.integer(name, "an integer", |_| true);
        assert_eq!(any("a"), Ok(Some(i64::MAX)));
        assert_eq!(any("b"), Ok(Some(i64::MIN)));
        assert_eq!(any("d"), Ok(Some(16)));
        assert_eq!(any("h"), Ok(None));
        for name in ["c", "e", "f", "g"] {
            let error = any(name).unwrap_err();
            assert_eq!((error.cause, error.param.as_deref()), (Cause::InvalidValue, Some(name)));
        }
        assert_eq!(any("g").unwrap_err().message, "`g` must be an integer; got a string");
    }
}
