//! Who asks, and what they may do.
//!
//! A client sends `Authorization: Bearer <token>`. Tokens stand in a file
//! ([`Auth::read`]); the server keeps only their SHA-256 and compares against
//! every one of them in constant time. What a token reaches is decided in one
//! place, [`authorize`], which denies what it does not know.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::{RouteScope, tokens};
use crate::model::TenantId;

pub use super::tokens::{AuthError, AuthErrors};

/// What a token reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Every route.
    Admin,
    /// The routes of these tenants.
    Tenants(BTreeSet<TenantId>),
}

/// The tokens that are known, or none: then only this machine is served.
///
/// # The tokens file
/// One token a line: a name (it appears in logs), a scope, and the token or its
/// hash. Fields are separated by spaces or tabs; `#` begins a comment line.
/// ```text
/// # name      scope                      token, or sha256:<its SHA-256 in hex>
/// platform    admin                      sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
/// acme-app    tenant:acme                4c1f0a9e4b7d...
/// resellers   tenant:acme,tenant:globex  sha256:60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752
/// ```
/// A token has 16 to 512 characters of `A-Z a-z 0-9 - . _ ~ + / =`; make one
/// with `openssl rand -hex 32`, and its hash with `printf %s TOKEN | sha256sum`.
/// The file must not be readable or writable by others (`chmod 640` or less).
/// Scope `admin` reaches every route; `tenant:<id>` that tenant's routes only.
///
/// # Without a tokens file
/// Everyone who reaches the server is an admin; only this
/// machine's own requests are let through.
#[derive(Debug)]
pub struct Auth {
    tokens: Option<Vec<Token>>,
}

/// A known token, as its hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    /// Who holds it; for logs.
    pub(super) name: Arc<str>,
    /// What it reaches.
    pub(super) scope: Arc<Scope>,
    /// The SHA-256 of its text.
    pub(super) digest: [u8; 32],
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    /// The token's name, or `loopback`.
    pub(super) name: Arc<str>,
    /// What it reaches.
    pub(super) scope: Arc<Scope>,
}

/// Says why nobody is known to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unknown {
    /// No `Authorization` header.
    Missing,
    /// One that is malformed, twice there, or holds no known token.
    Invalid,
}

/// Says that a caller may not use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Denied {
    /// Nobody is known to ask.
    Unauthenticated,
    /// The caller's scope does not reach it.
    Forbidden,
}

/// Decides whether a caller of `scope` (none: nobody known) may use a route of
/// `route` scope, with `tenant` in its path.
///
/// # Errors
/// [`Denied`], for whatever is not explicitly allowed.
pub(super) fn authorize(
    scope: Option<&Scope>,
    route: RouteScope,
    tenant: Option<&TenantId>,
) -> Result<(), Denied> {
    match (route, scope, tenant) {
        (RouteScope::Open, _, _) => Ok(()),
        (_, None, _) => Err(Denied::Unauthenticated),
        (RouteScope::Tenant | RouteScope::Admin, Some(Scope::Admin), _) => Ok(()),
        (RouteScope::Tenant, Some(Scope::Tenants(own)), Some(tenant)) if own.contains(tenant) => Ok(()),
        (RouteScope::Tenant | RouteScope::Admin, Some(Scope::Tenants(_)), _) => Err(Denied::Forbidden),
    }
}

// === impl Auth ===

impl Auth {
    /// Knows no tokens: every caller from this machine is an admin.
    pub fn loopback() -> Self {
        Self { tokens: None }
    }

    /// Reads a tokens file; its format is in [`Auth`]'s docs.
    ///
    /// # Errors
    /// Every problem of the file at once, each with its line. No message ever
    /// repeats the text of a line.
    pub fn read(path: &Path) -> Result<Self, AuthErrors> {
        tokens::read(path).map(|tokens| Self { tokens: Some(tokens) })
    }

    /// Returns whether only this machine is served, because there are no tokens.
    pub fn is_loopback(&self) -> bool {
        self.tokens.is_none()
    }

    /// Finds out who asks.
    pub(super) fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, Unknown> {
        let Some(tokens) = &self.tokens else {
            return Ok(Caller { name: "loopback".into(), scope: Arc::new(Scope::Admin) });
        };
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let value = match (values.next(), values.next()) {
            (None, _) => return Err(Unknown::Missing),
            (Some(value), None) => value,
            (Some(_), Some(_)) => return Err(Unknown::Invalid),
        };
        let token = bearer(value.as_bytes()).ok_or(Unknown::Invalid)?;
        let digest = digest(token);
        // Looks at every token, whether one was found or not: the time taken
        // says nothing about how near a guess was.
        let mut found = u64::MAX;
        for (index, token) in (0..).zip(tokens) {
            found = u64::conditional_select(&found, &index, digest.ct_eq(&token.digest));
        }
        let found =
            usize::try_from(found).ok().and_then(|index| tokens.get(index)).ok_or(Unknown::Invalid)?;
        Ok(Caller { name: Arc::clone(&found.name), scope: Arc::clone(&found.scope) })
    }
}

/// Returns the SHA-256 of a token.
pub(super) fn digest(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// Takes the token out of `Bearer <token>`; the scheme in any case (RFC 9110, 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::routes;

    fn scope(tenants: &[&str]) -> Scope {
        Scope::Tenants(tenants.iter().map(|id| TenantId::new(*id).unwrap()).collect())
    }

    /// Each route × each class of token × own and other tenant.
    #[test]
    fn a_token_reaches_its_own_and_nothing_else() {
        let (own, other) = (TenantId::new("own").unwrap(), TenantId::new("other").unwrap());
        let classes =
            [("none", None), ("admin", Some(Scope::Admin)), ("tenant", Some(scope(&["own", "second"])))];
        for route in routes() {
            let tenants: &[Option<&TenantId>] =
                if route.path.contains("{tenant}") { &[Some(&own), Some(&other)] } else { &[None] };
            for (class, scope) in &classes {
                for tenant in tenants {
                    let expected = if matches!(route.path, "/healthz" | "/readyz") {
                        Ok(())
                    } else {
                        match *class {
                            "none" => Err(Denied::Unauthenticated),
                            "admin" => Ok(()),
                            // A tenant's metadata decides its plan: not its own to write, nor are
                            // its end and another's state its own to ask for, nor which of two
                            // states stands.
                            _ if matches!(
                                route.path,
                                "/tenants/{tenant}" | "/tenants/{tenant}/fork" | "/tenants/{tenant}/resolve"
                            ) =>
                            {
                                Err(Denied::Forbidden)
                            }
                            _ if *tenant == Some(&own) => Ok(()),
                            _ => Err(Denied::Forbidden),
                        }
                    };
                    let decision = authorize(scope.as_ref(), route.scope, *tenant);
                    assert_eq!(decision, expected, "{class}: {} {} {tenant:?}", route.method, route.path);
                }
            }
        }
    }

    #[test]
    fn a_tenant_route_without_a_tenant_is_denied() {
        assert_eq!(authorize(Some(&scope(&["own"])), RouteScope::Tenant, None), Err(Denied::Forbidden));
    }

    #[test]
    fn a_caller_is_known_by_the_whole_token_only() {
        let token = |name: &str, text: &str| Token {
            name: name.into(),
            scope: Arc::new(Scope::Admin),
            digest: digest(text.as_bytes()),
        };
        let auth = Auth {
            tokens: Some(vec![token("one", "first-token-000001"), token("two", "second-token-0002")]),
        };
        #[rustfmt::skip]
        let rows: [(&[&str], Result<&str, Unknown>); 13] = [
            (&["Bearer first-token-000001"], Ok("one")),
            (&["bearer second-token-0002"], Ok("two")),
            (&["BEARER  second-token-0002 "], Ok("two")),
            (&[], Err(Unknown::Missing)),
            (&["Bearer first-token-000002"], Err(Unknown::Invalid)),
            (&["Bearer first-token-00000"], Err(Unknown::Invalid)),
            (&["Bearer first-token-0000011"], Err(Unknown::Invalid)),
            (&["Bearer "], Err(Unknown::Invalid)),
            (&["Bearer"], Err(Unknown::Invalid)),
            (&[""], Err(Unknown::Invalid)),
            (&["Basic first-token-000001"], Err(Unknown::Invalid)),
            (&["first-token-000001"], Err(Unknown::Invalid)),
            (&["Bearer first-token-000001", "Bearer first-token-000001"], Err(Unknown::Invalid)),
        ];
        for (values, expected) in rows {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, value.parse().unwrap());
            }
            let found = auth.authenticate(&headers);
            assert_eq!(found.as_ref().map(|caller| &*caller.name).map_err(|e| *e), expected, "{values:?}");
        }
    }

    #[test]
    fn without_tokens_the_caller_is_an_admin_and_a_header_changes_nothing() {
        let mut headers = HeaderMap::new();
        assert_eq!(*Auth::loopback().authenticate(&headers).unwrap().scope, Scope::Admin);
        headers.insert(header::AUTHORIZATION, "Bearer whatever".parse().unwrap());
        assert_eq!(*Auth::loopback().authenticate(&headers).unwrap().scope, Scope::Admin);
    }
}
