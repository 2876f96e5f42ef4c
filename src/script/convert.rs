//! Values of scripts to JSON and back.

use rhai::{Array, Blob, Dynamic, Map};
use serde_json::{Number, Value};

use super::ctx::SecretText;

/// How deep values may be nested.
const MAX_DEPTH: usize = 32;

/// A part of a value that JSON has no place for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Misfit {
    /// Where it is, e.g. `pool.max`; empty: the value itself.
    pub(super) path: String,
    /// What it is.
    pub(super) what: &'static str,
}

/// Converts a script's value; `()` is null.
///
/// # Errors
/// Every part that is no data: functions, secrets, bytes, numbers without a value.
pub(super) fn to_json(value: Dynamic) -> Result<Value, Vec<Misfit>> {
    let mut misfits = Vec::new();
    let json = convert(value, "", 0, &mut misfits);
    if misfits.is_empty() { Ok(json) } else { Err(misfits) }
}

fn convert(value: Dynamic, path: &str, depth: usize, misfits: &mut Vec<Misfit>) -> Value {
    let value = value.flatten();
    let misfit = |what, misfits: &mut Vec<Misfit>| {
        misfits.push(Misfit { path: path.to_owned(), what });
        Value::Null
    };
    if depth > MAX_DEPTH {
        return misfit("nested too deep", misfits);
    }
    if value.is_unit() {
        return Value::Null;
    }
    if let Ok(flag) = value.as_bool() {
        return Value::Bool(flag);
    }
    if let Ok(number) = value.as_int() {
        return Value::Number(number.into());
    }
    if let Ok(number) = value.as_float() {
        return Number::from_f64(number)
            .map_or_else(|| misfit("a number without a value", misfits), Value::Number);
    }
    if value.is_string() || value.is_char() {
        return Value::String(value.to_string());
    }
    if value.is_fnptr() {
        return misfit("a function", misfits);
    }
    if value.is::<SecretText>() {
        return misfit("a secret", misfits);
    }
    if value.is::<Blob>() {
        return misfit("bytes", misfits);
    }
    if let Some(array) = value.clone().try_cast::<Array>() {
        let items = array.into_iter().enumerate();
        return Value::Array(
            items
                .map(|(index, item)| convert(item, &format!("{path}[{index}]"), depth + 1, misfits))
                .collect(),
        );
    }
    if let Some(map) = value.try_cast::<Map>() {
        let entries = map.into_iter().map(|(key, item)| {
            let below = if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
            (key.to_string(), convert(item, &below, depth + 1, misfits))
        });
        return Value::Object(entries.collect());
    }
    misfit("a value of the server's", misfits)
}

/// Converts JSON to a script's value. A whole number beyond 63 bits becomes a float.
pub(super) fn from_json(value: &Value) -> Dynamic {
    match value {
        Value::Null => Dynamic::UNIT,
        Value::Bool(flag) => (*flag).into(),
        Value::Number(number) => number
            .as_i64()
            .map_or_else(|| Dynamic::from_float(number.as_f64().unwrap_or(f64::MAX)), Dynamic::from_int),
        Value::String(text) => text.clone().into(),
        Value::Array(items) => items.iter().map(from_json).collect::<Array>().into(),
        Value::Object(entries) => from_object(entries).into(),
    }
}

/// Converts a JSON object to a script's map.
pub(super) fn from_object(entries: &serde_json::Map<String, Value>) -> Map {
    entries.iter().map(|(key, value)| (key.as_str().into(), from_json(value))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_survives_the_way_there_and_back() {
        let value = json!({ "a": [1, -2, 1.5, true, null, "x"], "b": { "c": {} }, "d": "ü" });
        assert_eq!(to_json(from_json(&value)).unwrap(), value);
    }

    #[test]
    fn what_is_no_data_is_named_with_its_path() {
        let value: Dynamic =
            rhai::Engine::new().eval(r#"#{ f: |x| x, list: [1, blob(1)], n: 0.0 / 0.0, ok: 1 }"#).unwrap();
        let misfits = to_json(value).unwrap_err();
        let found: Vec<_> = misfits.iter().map(|misfit| (misfit.path.as_str(), misfit.what)).collect();
        assert_eq!(found, [("f", "a function"), ("list[1]", "bytes"), ("n", "a number without a value")]);
    }
}
