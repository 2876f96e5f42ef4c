//! Finds where in a script a field of its spec was written.

use rhai::{ASTNode, Expr};

use super::{compile::Unit, diagnostic::Place};
use crate::model::spec::camel;

/// Returns the place of the key of a field, e.g. `pool.max` or `command[1]`, in the
/// map literals of `workload()`; of the nearest key above it when it was not
/// written there; `None` when not even its first part was.
pub(super) fn field(unit: &Unit, path: &str) -> Option<Place> {
    let steps = steps(path);
    let mut best: Option<(usize, Place)> = None;
    unit.walk_function("workload", 0, &mut |nodes: &[ASTNode]| {
        let Some((ASTNode::Expr(expr @ Expr::Map(..)), above)) = nodes.split_last() else { return true };
        // A literal within another is somebody's field already.
        if above.iter().any(|node| matches!(node, ASTNode::Expr(Expr::Map(..)))) {
            return true;
        }
        if let Some((depth, place)) = descend(expr, &steps)
            && best.is_none_or(|(deepest, _)| depth > deepest)
        {
            best = Some((depth, place));
        }
        true
    });
    best.map(|(_, place)| place)
}

/// Follows the steps through literals; returns how many were found, and where the last is.
fn descend(expr: &Expr, steps: &[Step]) -> Option<(usize, Place)> {
    let mut at = expr;
    let mut found = None;
    for (depth, step) in steps.iter().enumerate() {
        let (next, place) = match (step, at) {
            (Step::Key(key), Expr::Map(map, _)) => {
                let entry = map
                    .0
                    .iter()
                    .find(|(name, _)| name.name.as_str() == key.as_str() || name.name.as_str() == camel(key));
                match entry {
                    Some((name, value)) => (value, Place::of(name.pos)),
                    None => break,
                }
            }
            (Step::Index(index), Expr::Array(items, _)) => match items.get(*index) {
                Some(item) => (item, Place::of(item.start_position())),
                None => break,
            },
            _ => break,
        };
        let Some(place) = place else { break };
        found = Some((depth + 1, place));
        at = next;
    }
    found
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(usize),
}

/// Splits a path. A free key may hold dots: then the last steps are not found,
/// and the field above it is shown.
fn steps(path: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for part in path.split('.') {
        let mut rest = part;
        let mut indices = Vec::new();
        while let Some((before, index)) = rest.strip_suffix(']').and_then(|rest| rest.rsplit_once('[')) {
            let Ok(index) = index.parse() else { break };
            indices.push(Step::Index(index));
            rest = before;
        }
        steps.push(Step::Key(rest.to_owned()));
        steps.extend(indices.into_iter().rev());
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::script::{compile, source::SourceFile};

    #[test]
    fn fields_are_found_where_they_were_written() {
        let text = "fn base() { #{ image: 1 } }\nfn workload() {\n  let extra = #{ pool: #{ max: 1 } };\n  #{ id: \"a\", volumes: #{ state: #{ containerPath: \"/d\" } },\n     command: [\"a\", \"b\"], labels: #{ image: 1 } } + extra\n}\n";
        let unit = compile::parse(&SourceFile::new("a", text)).unwrap();
        let place = |path: &str| field(&unit, path).map(|place| (place.line, place.column));
        assert_eq!(place("id"), Some((4, 6)));
        assert_eq!(place("volumes.state.container_path"), Some((4, 37)));
        assert_eq!(place("volumes.state.mode"), Some((4, 27)), "the map that lacks it");
        assert_eq!(place("command[1]"), Some((5, 21)));
        assert_eq!(place("pool.max"), Some((3, 27)), "in a map that is merged in");
        assert_eq!(place("image"), None, "not another map's key, nor another function's");
    }

    #[test]
    fn paths_are_split() {
        let key = |text: &str| Step::Key(text.to_owned());
        assert_eq!(steps("a.b[2][3]"), [key("a"), key("b"), Step::Index(2), Step::Index(3)]);
        assert_eq!(steps("a[x]"), [key("a[x]")]);
    }
}
