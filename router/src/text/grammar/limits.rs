//! What one rule may cost. The library counts its own work against these, so a hostile rule ends by itself; the clock only
//! decides how long the caller waits for that.

use std::time::Duration;

use llguidance::api::ParserLimits;

use super::GrammarError;

/// From the start of the work to an answer; and for a thread to be free before that.
pub(super) const COMPILE_TIME_MAX: Duration = Duration::from_secs(1);
/// Threads that went on beyond [`COMPILE_TIME_MAX`] and whose place others have.
pub(super) const LATE_THREADS_MAX: usize = 4;
/// The library recurses over schemas and references; what it does not touch of this costs nothing.
pub(super) const STACK_BYTES: usize = 256 << 20;
/// Objects of a schema that are schemas themselves.
pub(super) const SCHEMA_NODES_MAX: usize = 16_384;
/// Properties of one object.
pub(super) const PROPERTIES_MAX: usize = 1500;
/// `patternProperties` of one object: each pair is compared.
pub(super) const PATTERN_PROPERTIES_MAX: usize = 48;
/// Patterns that one string may have to match at once; and `&` and `~` of a Lark grammar.
pub(super) const PATTERNS_MEET_MAX: usize = 8;
/// Tokens that a rule is tried with before it is accepted.
pub(super) const TRIED_TOKENS: usize = 4;
/// `$ref`s of a schema. The library follows chains of them by recursion, about 20 KiB of stack each.
pub(super) const SCHEMA_REFS_MAX: usize = 2048;
/// Bytes of compiled rules that are kept for the next request.
pub(super) const KEPT_BYTES_MAX: usize = 64 << 20;
/// What a small compiled rule takes, and what each byte of its text adds: measured, rounded up.
pub(super) const COMPILED_BYTES: usize = 128 << 10;
/// See [`COMPILED_BYTES`].
pub(super) const COMPILED_BYTES_PER_BYTE: usize = 64;
/// Compiled rules (and refusals) that are kept.
pub(super) const KEPT_MAX: usize = 128;
/// Bytes of the library's message that an error repeats.
pub(super) const MESSAGE_BYTES_MAX: usize = 400;

/// The library's own limits. Speeds are its authors' figures for one core.
pub(super) fn parser_limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 8000,        // an object with 2000 optional properties
        initial_lexer_fuel: 1_000_000, // 20 ms
        step_lexer_fuel: 200_000,      // 14 ms a token
        step_max_items: 50_000,        // 2.5 ms a token
        max_lexer_states: 20_000,      // 1 to 2 KiB each
        max_grammar_size: 40_000,
        precompute_large_lexemes: false,
        verbose_errors: false, // they would repeat the whole rule
    }
}

pub(super) fn too_slow() -> GrammarError {
    GrammarError(
        "this takes more than one second to compile; use fewer alternatives, references and repetitions".into(),
    )
}
