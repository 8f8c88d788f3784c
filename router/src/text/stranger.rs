//! What a template that is not the operator's may not do: make a large value out of small ones in a single step, where
//! neither the count of instructions nor the look at its assignments sees it.

use std::borrow::Cow;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::{ChatPrompt, python};

/// Bytes of one value.
const VALUE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Instructions of one rendering ..
const FUEL: u64 = 200_000;
/// .. and fewer where each may copy a long text: instructions times bytes.
const FUEL_BYTES: u64 = 1 << 27;
/// Enough for a few messages, however long one is.
const FUEL_MIN: u64 = 3000;

/// Instructions for `chat`: enough for a few hundred around one long text.
pub(super) fn fuel(chat: &ChatPrompt) -> u64 {
    let texts = chat.messages.iter().chain(chat.kwargs.values());
    let longest = texts.map(longest_text).max().unwrap_or(0);
    (FUEL_BYTES / (longest as u64).max(1)).clamp(FUEL_MIN, FUEL)
}

fn longest_text(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(values) => values.iter().map(longest_text).max().unwrap_or(0),
        serde_json::Value::Object(map) => map.values().map(longest_text).max().unwrap_or(0),
        _ => 0,
    }
}

/// Takes from `environment` what fills a width, and bounds what puts texts together.
pub(super) fn restrict(environment: &mut Environment<'static>) {
    for filter in ["format", "indent", "pprint", "chain", "zip"] {
        environment.remove_filter(filter);
    }
    environment
        .add_filter("replace", |text: Cow<'_, str>, from: Cow<'_, str>, to: Cow<'_, str>| replace(&text, &from, &to));
    environment.add_filter("join", |list: Value, separator: Option<Cow<'_, str>>, options: Kwargs| {
        let attribute = options.get::<Option<String>>("attribute")?;
        options.assert_all_used()?;
        join(&list, separator.as_deref().unwrap_or(""), attribute.as_deref())
    });
    environment.set_unknown_method_callback(method);
}

fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let text = value.as_str().filter(|_| value.kind() == ValueKind::String);
    let argument = |i: usize| args.get(i).and_then(Value::as_str).unwrap_or("");
    match (name, text) {
        ("replace", Some(text)) if args.len() == 2 => replace(text, argument(0), argument(1)).map(Value::from),
        ("join", Some(separator)) if args.len() == 1 => {
            args.first().map_or_else(|| Err(too_large()), |list| join(list, separator, None)).map(Value::from)
        }
        ("format" | "replace" | "join", Some(_)) => {
            Err(Error::new(ErrorKind::UnknownMethod, format!("this server does not run `{name}` for this template")))
        }
        _ => python::method(state, value, name, args),
    }
}

fn too_large() -> Error {
    Error::new(ErrorKind::InvalidOperation, "a value is too long")
}

fn replace(text: &str, from: &str, to: &str) -> Result<String, Error> {
    let found = if from.is_empty() { text.len() + 1 } else { text.matches(from).count() };
    if found.saturating_mul(to.len()).saturating_add(text.len()) > VALUE_BYTES_MAX {
        return Err(too_large());
    }
    Ok(text.replace(from, to))
}

fn join(list: &Value, separator: &str, attribute: Option<&str>) -> Result<String, Error> {
    let mut text = String::new();
    for (i, part) in list.try_iter()?.enumerate() {
        let part = attribute.map_or(Ok(part.clone()), |name| part.get_attr(name))?;
        if i > 0 {
            text.push_str(separator);
        }
        match part.as_str() {
            Some(part) => text.push_str(part),
            None if part.len().is_some() => return Err(too_large()), // what it prints is not bounded by its length
            None => text.push_str(&part.to_string()),
        }
        if text.len() > VALUE_BYTES_MAX {
            return Err(too_large());
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;
    use crate::text::ChatTemplate;
    use crate::text::template::{SpecialTokens, Trust};

    fn render(source: &str, content: &str) -> Result<String, crate::text::TemplateError> {
        let chat = ChatPrompt {
            messages: vec![json!({"role": "user", "content": content})],
            kwargs: json!({"n": 2_000_000_000}).as_object().cloned().unwrap(),
            output_bytes_max: 1 << 17,
            ..ChatPrompt::default()
        };
        ChatTemplate::new(source, SpecialTokens::default(), Trust::Stranger)?.render(&chat)
    }

    #[test]
    fn one_step_makes_no_large_value() {
        let long = "a".repeat(60_000);
        let c = "messages[0].content";
        for source in [
            format!("{{% set x = {c} | replace('a', {c}) %}}"),
            format!("{{% set x = {c}.replace('a', {c}) %}}"),
            format!("{{% set x = {c}.replace('', {c}) %}}"),
            format!("{{% set x = {c} | list | join({c}) %}}"),
            format!("{{% set x = {c}.join({c} | list) %}}"),
            format!("{{% set x = ([{c}] * 100000) ~ '' %}}"),
            format!("{{% set x = {c} * 100000 %}}"),
            format!("{{% set x = ([{c}] * 100000) | tojson %}}"),
            "{% set x = '%9999999999d' | format(1) %}".into(),
            "{% set x = '{:>9999999999}'.format(1) %}".into(),
            "{% set x = 'a' | indent(n, true) %}".into(),
            format!(
                "{{% set ns = namespace(s='') %}}{{% for i in range(99999) %}}{{% set ns.s = ns.s ~ {c} %}}{{% endfor %}}"
            ),
            format!("{{% for i in range(99999) %}}{{% set x = {c} | upper %}}{{% endfor %}}"),
            "x".repeat(200_000),
        ] {
            let began = Instant::now();
            let result = render(&source, &long);
            assert!(result.is_err(), "{source:.80} gave {} bytes", result.map_or(0, |text| text.len()));
            assert!(began.elapsed() < Duration::from_secs(20), "{source:.80} took {:?}", began.elapsed());
        }
    }

    #[test]
    fn what_templates_do_with_texts_is_the_same() {
        for (source, want) in [
            ("{{ messages[0].content.replace('b', 'x') }}{{ 'abc' | replace('b', '') }}", "axcac"),
            ("{{ ['a', 1, true] | join('-') }}{{ ', '.join(['a', 'b']) }}{{ ['a'] | join }}", "a-1-Truea, ba"),
            ("{{ messages | join(',', attribute='role') }}", "user"),
        ] {
            assert_eq!(render(source, "abc").as_deref(), Ok(want), "{source}");
        }
    }
}
