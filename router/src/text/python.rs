//! Methods of Python's `str` that chat templates use and minijinja's own set lacks.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Runs `value.method(args)`.
///
/// # Errors
/// [`ErrorKind::UnknownMethod`], or what the method finds wrong with its arguments.
pub(super) fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str().filter(|_| value.kind() == ValueKind::String) else {
        return pycompat::unknown_method_callback(state, value, method, args);
    };
    let first = args.first().and_then(Value::as_str);
    match (method, first) {
        ("removeprefix", Some(prefix)) => Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text))),
        ("removesuffix", Some(suffix)) => Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text))),
        ("partition", Some(separator)) if !separator.is_empty() => {
            let (before, after) = text.split_once(separator).unwrap_or((text, ""));
            let found = if before.len() < text.len() { separator } else { "" };
            Ok([before, found, after].into_iter().map(Value::from).collect())
        }
        ("rpartition", Some(separator)) if !separator.is_empty() => {
            let parts =
                text.rsplit_once(separator).map_or(["", "", text], |(before, after)| [before, separator, after]);
            Ok(parts.into_iter().map(Value::from).collect())
        }
        ("rsplit", Some(separator)) if !separator.is_empty() => rsplit(text, separator, args.get(1)),
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// At most `limit` cuts, from the right.
fn rsplit(text: &str, separator: &str, limit: Option<&Value>) -> Result<Value, Error> {
    let cuts = match limit {
        None => usize::MAX,
        Some(value) => {
            let cuts = value
                .as_i64()
                .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "rsplit takes an integer limit"))?;
            usize::try_from(cuts).unwrap_or(usize::MAX)
        }
    };
    let mut parts: Vec<&str> = text.rsplitn(cuts.saturating_add(1), separator).collect();
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}
