//! Loading adapters as vLLM's and SGLang's clients do.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

/// Names an adapter.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LoadLoraRequest {
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})?$")]
    lora_name: String,
    /// A reference or an absolute path.
    #[schema(min_length = 1)]
    lora_path: String,
    /// Give a name that is taken new content.
    #[schema(default = false)]
    load_inplace: Option<bool>,
    pinned: Option<bool>,
}

/// Takes a name away.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct UnloadLoraRequest {
    #[schema(min_length = 1)]
    lora_name: String,
}

/// What the caller has loaded, after the change.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct SglangLoaded {
    success: bool,
    /// Name to reference.
    loaded_adapters: BTreeMap<String, String>,
}

/// SGLang's form of an error.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct SglangError {
    success: bool,
    error_message: String,
}
