//! `/v1/models`.

use serde::Serialize;
use utoipa::ToSchema;

/// The base model's names, and the adapters this key may use.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ModelList {
    object: ListObject,
    data: Vec<Model>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ListObject {
    List,
}

/// A name that requests may send as `model`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Model {
    id: String,
    object: ModelObject,
    /// Unix seconds.
    created: u64,
    owned_by: String,
    /// What the name stands for, without credentials.
    root: String,
    /// An adapter's base model.
    #[schema(nullable = false)]
    parent: Option<String>,
    /// Tokens of prompt and completion together.
    max_model_len: u32,
    /// Always empty.
    permission: Vec<String>,
    #[schema(nullable = false)]
    loramux: Option<AdapterFacts>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ModelObject {
    Model,
}

/// What an adapter is.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AdapterFacts {
    /// The first 16 hex digits of its content's hash.
    #[schema(pattern = "^[0-9a-f]{16}$")]
    content_id: String,
    rank: u32,
}
