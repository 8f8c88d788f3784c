//! Query parameters of the admin API: an unknown one is refused by name.

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use crate::http::error::{ApiError, Cause, cut};

/// As [`Query`], for types that deny unknown fields.
#[derive(Debug)]
pub(super) struct Asked<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Query::try_from_uri(&parts.uri).map(|Query(asked)| Self(asked)).map_err(|error| {
            let mut cause: &dyn std::error::Error = &error;
            while let Some(inner) = cause.source() {
                cause = inner;
            }
            let why = cause.to_string();
            let name = why.split_once("unknown field `").and_then(|(_, rest)| rest.split('`').next());
            let message = format!("the query: {}", why.chars().take(400).collect::<String>());
            match name {
                Some(name) => ApiError::at(Cause::UnsupportedParameter, &cut(name), message),
                None => ApiError::new(Cause::InvalidValue, message),
            }
        })
    }
}
