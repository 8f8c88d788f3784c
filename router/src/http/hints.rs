//! What a caller may have meant: routes that are nearly ours, and fields that mean a rule, a limit or an adapter elsewhere.

use super::known_fields::Body;

/// Routes that clients are pointed at by a base URL.
const PATHS: [&str; 10] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/responses",
    "/generate",
    "/generate_stream",
    "/metrics",
];
/// Longer paths are no slip of the pen.
const PATH_BYTES_MAX: usize = 64;
const SLIPS_MAX: usize = 2;

/// What to try in place of an unknown path.
pub(super) fn of_path(path: &str) -> String {
    let known = |path: &str| PATHS.into_iter().find(|known| *known == path);
    let path = path.trim_end_matches('/');
    if let Some(known) = known(&format!("/v1{path}")) {
        return format!("; did you mean `{known}`? An OpenAI client's base URL ends with `/v1`");
    }
    if let Some(known) = path.strip_prefix("/v1").and_then(known) {
        return format!("; did you mean `{known}`? The base URL ends with `/v1` once");
    }
    if path.starts_with("/v1/responses/") {
        return "; this server keeps no responses".to_owned();
    }
    let near = |known: &&str| path.len() <= PATH_BYTES_MAX && strsim::levenshtein(known, path) <= SLIPS_MAX;
    match PATHS.into_iter().find(near) {
        Some(known) => format!("; did you mean `{known}`?"),
        None => "; `/docs` shows those there are".to_owned(),
    }
}

const RULES: [&str; 5] = ["regex", "ebnf", "json_schema", "grammar", "choices"];
const ADAPTERS: [&str; 5] = ["adapter", "lora", "lora_name", "lora_path", "adapter_name"];

/// What to send in place of a field that is not read here, if leaving it out would change the answer's meaning.
pub(super) fn of_field(body: Body, name: &str) -> Option<&'static str> {
    let hint = match (body, name) {
        (Body::Native, _) => return of_parameter(name.strip_prefix("parameters.").unwrap_or(name)),
        (Body::Chat, name) if is_other_parameters(name) => "here it is `parameters`",
        (_, name) if ADAPTERS.contains(&name) => "name the adapter in `model` or `adapter_id`",
        (Body::Embeddings, "prompt" | "inputs" | "text") => "here it is `input`",
        (Body::Embeddings, _) => return None,
        (Body::Response, "response_format") => "here it is `text.format`",
        (Body::Response, "max_tokens" | "max_completion_tokens") => "here it is `max_output_tokens`",
        (Body::Response, "messages" | "prompt") => "here it is `input`",
        (Body::Message, "response_format") => "here it is `output_config.format`",
        (Body::Message, "max_completion_tokens" | "max_output_tokens") => "here it is `max_tokens`",
        (_, name) if RULES.contains(&name) => "use `structured_outputs`",
        (_, "max_new_tokens" | "n_predict" | "num_predict" | "max_output_tokens") => "use `max_tokens`",
        (Body::Completion | Body::Chat, "stop_sequences") => "use `stop`",
        (Body::Completion, "messages") => "that is of `/v1/chat/completions`; here it is `prompt`",
        (Body::Chat, "prompt") => "that is of `/v1/completions`; here it is `messages`",
        _ => return None,
    };
    Some(hint)
}

/// True for a function's `parameters` under the name that another API or a slip gives them: a call would have no arguments.
fn is_other_parameters(name: &str) -> bool {
    let member = name.strip_prefix("tools[").and_then(|name| name.split_once("].function."));
    matches!(member, Some((_, "args" | "arguments" | "input_schema" | "inputSchema" | "params" | "schema")))
}

fn of_parameter(name: &str) -> Option<&'static str> {
    match name {
        "max_tokens" | "n_predict" => Some("use `parameters.max_new_tokens`"),
        "stop_sequences" => Some("use `parameters.stop`"),
        name if ADAPTERS.contains(&name) => Some("use `parameters.adapter_id`"),
        name if RULES.contains(&name) => Some("use `parameters.grammar`"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_base_url_are_named() {
        for (path, hint) in [
            ("/chat/completions", "`/v1/chat/completions`? An OpenAI"),
            ("/v1/v1/models", "`/v1/models`? The base"),
            ("/v1/chat/completion", "`/v1/chat/completions`?"),
            ("/v1/responses/resp_1", "keeps no responses"),
            ("/api/chat", "`/docs`"),
        ] {
            assert!(of_path(path).contains(hint), "{path}: {}", of_path(path));
        }
        assert!(of_path(&"x".repeat(1 << 16)).contains("/docs"));
    }

    #[test]
    fn fields_that_would_change_the_meaning_are_named() {
        assert!(of_field(Body::Chat, "regex").is_some() && of_field(Body::Completion, "lora").is_some());
        assert!(of_field(Body::Native, "parameters.adapter").is_some_and(|hint| hint.contains("adapter_id")));
        assert!(of_field(Body::Response, "max_tokens").is_some_and(|hint| hint.contains("max_output_tokens")));
        assert!(of_field(Body::Chat, "tools[3].function.params").is_some_and(|hint| hint.contains("`parameters`")));
        assert_eq!(of_field(Body::Chat, "tools[3].params"), None);
        assert_eq!(of_field(Body::Chat, "tempreature"), None);
        assert_eq!(of_field(Body::Embeddings, "regex"), None);
    }
}
