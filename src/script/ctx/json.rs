//! JSON as text, both ways. (`to_json` of a map is Rhai's own.)

use rhai::{Dynamic, NativeCallContext};

use super::{Primitive, PrimitiveKind, Registry};
use crate::script::{
    call::{Failure, Outcome},
    convert::from_json,
};

/// Registers JSON.
pub(super) fn register(registry: &mut Registry) {
    registry.describe(Primitive {
        kind: PrimitiveKind::Function,
        receiver: "",
        name: "parse_json",
        signature: "parse_json(text) -> value",
        doc: "Reads JSON; null becomes `()`.",
        parameters: &[1],
        gives: None,
        decides: true,
        acts: true,
    });
    registry.define("parse_json", |context: NativeCallContext, text: &str| -> Outcome<Dynamic> {
        let value: serde_json::Value = serde_json::from_str(text)
            .map_err(|error| Failure::invalid(format!("not JSON: {error}")).throw(&context))?;
        Ok(from_json(&value))
    });
}

#[cfg(test)]
mod tests {
    use crate::script::{Hook, testing::Trial};

    #[test]
    fn json_is_read() {
        Trial::of(Hook::BeforeClaim)
            .asserts(r#"let v = parse_json(`{"a":[1,null]}`); check([v.a[0] == 1, v.a[1] == (), v.to_json() == `{"a":[1,null]}`]);"#);
        let error = Trial::of(Hook::BeforeClaim).run(r#"parse_json("{")"#).unwrap_err();
        assert!(error.to_string().contains("not JSON: EOF"), "{error}");
    }
}
