//! Chat templates of known model families against Jinja in Python: `tests/chat_templates/cases.py` made the expected texts.

use std::path::Path;

use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use super::template::{SpecialTokens, Trust};
use super::{ChatPrompt, ChatTemplate, TemplateError};

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/chat_templates"))
}

/// The format in the place of the date, as `cases.py` does it.
fn without_dates(source: &str) -> String {
    source.replace("strftime_now(", "(")
}

fn tokens() -> SpecialTokens {
    let token = |text: &str| Some(text.to_owned());
    SpecialTokens { bos: token("<s>"), eos: token("</s>"), unk: token("<unk>"), pad: token("<pad>") }
}

fn prompt(chat: &Json, variables: &Map<String, Json>) -> ChatPrompt {
    let mut kwargs = variables.clone();
    let add_generation_prompt = kwargs.remove("add_generation_prompt") == Some(Json::Bool(true));
    ChatPrompt {
        messages: chat.as_array().cloned().unwrap(),
        add_generation_prompt,
        kwargs,
        output_bytes_max: 1 << 20,
        ..ChatPrompt::default()
    }
}

/// A text, and how the list of expected ones shows it.
fn shown(result: Result<String, TemplateError>) -> (String, String) {
    match result {
        Ok(text) => {
            let digest = Sha256::digest(text.as_bytes());
            let short = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            (short, text)
        }
        Err(TemplateError::Raised(message)) => (format!("raised: {message}"), String::new()),
        Err(error) => ("failed".into(), error.to_string()),
    }
}

#[test]
fn templates_of_known_families_render_as_in_python() {
    let cases: Json = serde_json::from_str(&std::fs::read_to_string(folder().join("expected.json")).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for (name, want) in cases["expected"].as_object().unwrap() {
        let [file, chat, variables] = name.split(" / ").collect::<Vec<_>>()[..] else { panic!("{name}") };
        let source = std::fs::read_to_string(folder().join(format!("{file}.jinja"))).unwrap();
        let variables = cases["variables"][variables.parse::<usize>().unwrap()].as_object().unwrap();
        for trust in [Trust::Operator, Trust::Stranger] {
            let template = ChatTemplate::new(&without_dates(&source), tokens(), trust);
            let template = template.unwrap_or_else(|e| panic!("{file}: {e}"));
            let (got, text) = shown(template.render(&prompt(&cases["chats"][chat], variables)));
            // Python's loops fail over `none`; here they do nothing.
            let is_lenient =
                want == "failed" && source.contains("for tool in tools") && variables.get("tools").is_none();
            if got != want.as_str().unwrap() && !is_lenient {
                wrong.push(format!("{name} ({trust:?}): {got}, not {want}: {text:?}"));
            }
        }
    }
    let shown = wrong.iter().map(|line| line.chars().take(400).collect()).collect::<Vec<String>>().join("\n");
    assert!(wrong.is_empty(), "{} cases differ:\n{shown}", wrong.len());
}
