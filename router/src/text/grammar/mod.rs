//! What a reply must look like: a JSON schema, a regular expression, a list of choices or a grammar, as sets of tokens that
//! may come next.

use serde_json::Value as Json;

/// A rule for a whole reply, as a request states it.
#[derive(Clone, Debug, PartialEq)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this schema.
    JsonSchema(Json),
    /// Text that matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's notation (llguidance's dialect, with `%json`).
    Lark(String),
    /// A grammar in llama.cpp's notation.
    Gbnf(String),
}

/// Why a rule is refused (400 `invalid_schema`).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

impl super::TextModel {
    /// Makes a rule ready for use.
    ///
    /// # Errors
    /// Always: rules are not compiled yet.
    pub async fn compile_grammar(
        &self,
        _spec: GrammarSpec,
    ) -> Result<std::sync::Arc<dyn crate::engine::Grammar>, GrammarError> {
        Err(GrammarError("rules are not compiled yet".into()))
    }
}
