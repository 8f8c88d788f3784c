//! Chat templates: Jinja as Hugging Face runs it, with bounds on time, instructions and output.

use std::borrow::Cow;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior, escape_formatter};
use serde::Serialize;
use serde_json::Value as Json;

use super::tools::ToolFormat;
use super::{THINK_START, growth, member, python, stranger};

/// Instructions one rendering may execute: about 4096 messages of a long template.
const FUEL: u64 = 2_000_000;
/// Bytes of template source.
const SOURCE_BYTES_MAX: usize = 256 * 1024;
/// Bytes of one printed value.
const VALUE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long one rendering may take.
pub(crate) const RENDER_TIME_MAX: Duration = Duration::from_millis(250);

/// Why a chat could not be turned into a prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template called `raise_exception`.
    #[error("the chat template refused these messages: {0}")]
    Raised(String),
    /// It is not a template that runs here.
    #[error("the chat template failed: {0}")]
    Failed(String),
    /// Time, instructions or output.
    #[error("the chat template took more than this server allows ({0})")]
    Limit(&'static str),
    /// `continue_final_message` cannot be done.
    #[error("`continue_final_message` needs a template that shows the last message's content unchanged")]
    NotContinuable,
}

/// Names of special tokens, as templates know them.
#[derive(Clone, Debug, Default)]
pub(crate) struct SpecialTokens {
    pub(crate) bos: Option<String>,
    pub(crate) eos: Option<String>,
    pub(crate) unk: Option<String>,
    pub(crate) pad: Option<String>,
}

/// Whose program a template is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// The base model's, or the operator's own.
    Operator,
    /// A request's or an adapter's.
    Stranger,
}

/// Which template a chat is rendered with.
#[derive(Clone, Debug, Default)]
pub enum TemplateChoice {
    /// The base model's.
    #[default]
    Base,
    /// This one, compiled for this chat alone.
    Source(String),
    /// This one.
    Compiled(SharedTemplate),
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: SpecialTokens,
    knows_developer: bool,
    knows_tools: bool,
    knows_calls: bool,
    tool_format: ToolFormat,
    thinks: bool,
    trust: Trust,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("trust", &self.trust).finish_non_exhaustive()
    }
}

/// One chat to render.
#[derive(Clone, Debug, Default)]
pub struct ChatPrompt {
    /// Messages as JSON objects with `role` and `content`.
    pub messages: Vec<Json>,
    /// Functions that the model may call, as JSON objects with `type` and `function`.
    pub tools: Vec<Json>,
    /// How it writes calls; `None`: as its template says.
    pub tool_format: Option<ToolFormat>,
    /// Whether it thinks before it answers; `None`: as its template says.
    pub thinks: Option<bool>,
    /// Ask for the assistant's turn.
    pub add_generation_prompt: bool,
    /// End the prompt inside the last message.
    pub continue_final_message: bool,
    /// Extra variables. They cannot replace the ones above.
    pub kwargs: serde_json::Map<String, Json>,
    /// What turns it into text.
    pub template: TemplateChoice,
    /// Output longer than this is refused.
    pub output_bytes_max: usize,
}

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// [`TemplateError::Failed`] if it is no Jinja, too long, or can grow a value without bound.
    pub(crate) fn new(source: &str, tokens: SpecialTokens, trust: Trust) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(TemplateError::Failed(format!(
                "{} bytes; at most {SOURCE_BYTES_MAX} are accepted",
                source.len()
            )));
        }
        let source = without_generation_tags(source);
        growth::check(&source, trust).map_err(TemplateError::Failed)?;
        let knows_developer = source.contains("developer");
        let (knows_tools, knows_calls) = (source.contains("tools"), source.contains("tool"));
        let (tool_format, thinks) = (ToolFormat::of_template(&source), source.contains(THINK_START));
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(failed)?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(64);
        environment.set_unknown_method_callback(python::method);
        environment.set_formatter(python_formatter);
        if trust == Trust::Stranger {
            stranger::restrict(&mut environment);
        }
        environment.add_test("iterable", is_iterable);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
        });
        environment.add_function("strftime_now", |format: &str| super::strftime::now(format));
        environment.add_template_owned("chat", source).map_err(failed)?;
        Ok(Self { environment, tokens, knows_developer, knows_tools, knows_calls, tool_format, thinks, trust })
    }

    /// Renders `chat`. May take a quarter of a second: call it on a thread that may block.
    ///
    /// # Errors
    /// See [`TemplateError`]; all are the request's fault (400).
    pub fn render(&self, chat: &ChatPrompt) -> Result<String, TemplateError> {
        if self.trust == Trust::Stranger && bytes_of(chat) > chat.output_bytes_max {
            return Err(TemplateError::Limit("input")); // each of its instructions may copy all of it
        }
        let mut environment = Cow::Borrowed(&self.environment);
        if self.trust == Trust::Stranger {
            environment.to_mut().set_fuel(Some(stranger::fuel(chat)));
        }
        let template = environment.get_template("chat").map_err(failed)?;
        let mut sink = Sink {
            text: Vec::new(),
            bytes_max: chat.output_bytes_max,
            deadline: Instant::now() + RENDER_TIME_MAX,
            hit: None,
        };
        let result = template.render_captured_to(self.variables(chat), &mut sink);
        if let Some(limit) = sink.hit {
            return Err(TemplateError::Limit(limit));
        }
        result.map_err(failed)?;
        let text = String::from_utf8_lossy(&sink.text).into_owned();
        if chat.continue_final_message { cut_after_last_message(text, chat) } else { Ok(text) }
    }

    /// It shows calls and their results itself.
    pub(crate) fn knows_calls(&self) -> bool {
        self.knows_calls
    }

    /// It shows tools itself.
    pub(crate) fn knows_tools(&self) -> bool {
        self.knows_tools
    }

    /// How calls are written, by its own words.
    pub(crate) fn tool_format(&self) -> ToolFormat {
        self.tool_format
    }

    /// It speaks of thoughts.
    pub(crate) fn thinks(&self) -> bool {
        self.thinks
    }

    fn variables(&self, chat: &ChatPrompt) -> Value {
        let mut variables = chat.kwargs.clone();
        let messages = chat.messages.iter().map(|message| self.with_known_role(message)).collect();
        variables.insert("messages".into(), Json::Array(messages));
        variables.insert("add_generation_prompt".into(), Json::Bool(chat.add_generation_prompt));
        for name in ["tools", "documents"] {
            variables.entry(name).or_insert(Json::Null);
        }
        let tokens = &self.tokens;
        for (name, token) in [
            ("bos_token", &tokens.bos),
            ("eos_token", &tokens.eos),
            ("unk_token", &tokens.unk),
            ("pad_token", &tokens.pad),
        ] {
            variables.insert(name.into(), Json::String(token.clone().unwrap_or_default()));
        }
        Value::from(Serde(&variables))
    }

    /// Most templates know no `developer`; for them it is the system role under its newer name.
    fn with_known_role(&self, message: &Json) -> Json {
        let mut message = message.clone();
        if !self.knows_developer
            && let Some(role) = message.get_mut("role").filter(|role| *role == "developer")
        {
            *role = Json::String("system".into());
        }
        message
    }
}

/// Marks the message of `raise_exception` inside minijinja's error.
const RAISED: &str = "\u{1}raised:";

fn failed(error: Error) -> TemplateError {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(current) = cause {
        if let Some(jinja) = current.downcast_ref::<Error>() {
            if jinja.kind() == ErrorKind::OutOfFuel {
                return TemplateError::Limit("instructions");
            }
            if let Some(message) = jinja.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
                return TemplateError::Raised(message.to_owned());
            }
        }
        cause = current.source();
    }
    TemplateError::Failed(error.to_string())
}

/// Where the output goes: stops at a byte count and at a deadline.
struct Sink {
    text: Vec<u8>,
    bytes_max: usize,
    deadline: Instant,
    hit: Option<&'static str>,
}

impl Write for Sink {
    fn write(&mut self, piece: &[u8]) -> std::io::Result<usize> {
        if self.text.len() + piece.len() > self.bytes_max {
            self.hit = Some("output");
        } else if Instant::now() > self.deadline {
            self.hit = Some("time");
        }
        if let Some(limit) = self.hit {
            return Err(std::io::Error::other(limit));
        }
        self.text.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Prints the three constants as Python does. Also sees what `{% set %}` blocks capture, which the sink does not.
fn python_formatter(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if value.as_str().is_some_and(|text| text.len() > VALUE_BYTES_MAX) {
        return Err(Error::new(ErrorKind::InvalidOperation, "a value is too long"));
    }
    let text = match value.kind() {
        minijinja::value::ValueKind::None => "None",
        minijinja::value::ValueKind::Bool if value.is_true() => "True",
        minijinja::value::ValueKind::Bool => "False",
        _ => return escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(Error::from)
}

/// As in Python: nothing (`none`) cannot be walked over, a name that nobody set can.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && (value.is_undefined() || value.try_iter().is_ok())
}

/// Counts bytes down, and stops at none: a list that holds another one many times is small only until it is written.
struct Bounded(usize);

impl Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> std::io::Result<usize> {
        self.0 = self.0.checked_sub(piece.len()).ok_or_else(|| std::io::Error::other("a value is too long"))?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `json.dumps(value, ensure_ascii=False)` with Python's spacing.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get::<Option<usize>>("indent")?;
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let bad = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}"));
    serde_json::to_writer(Bounded(VALUE_BYTES_MAX), value).map_err(bad)?;
    let mut json = serde_json::to_value(value).map_err(bad)?;
    if sort {
        json.sort_all_objects();
    }
    let [mut comma, mut colon] = [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()];
    if let Some([first, second]) = separators.as_deref() {
        (comma, colon) = (first.clone(), second.clone());
    }
    let mut bytes = Vec::new();
    let style = PythonStyle { comma, colon, indent: indent.map(|n| n.min(16)), depth: 0, filled: false };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, style)).map_err(bad)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(Value::from_safe_string(if ascii { escape_non_ascii(&text) } else { text }))
}

fn escape_non_ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

struct PythonStyle {
    comma: String,
    colon: String,
    indent: Option<usize>,
    depth: usize,
    filled: bool,
}

impl PythonStyle {
    fn line<W: ?Sized + Write>(&self, out: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(out, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }
    fn open<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth += 1;
        self.filled = false;
        out.write_all(bracket)
    }
    fn close<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(out)?;
        }
        self.filled = true;
        out.write_all(bracket)
    }
    fn separate<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            out.write_all(self.comma.as_bytes())?;
        }
        self.line(out)
    }
}

impl serde_json::ser::Formatter for PythonStyle {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b"[")
    }
    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b"]")
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        self.separate(out, first)
    }
    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.filled = true;
        Ok(())
    }
    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b"{")
    }
    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b"}")
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        self.separate(out, first)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(self.colon.as_bytes())
    }
    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.filled = true;
        Ok(())
    }
}

/// `{% generation %}` marks the assistant's tokens for training; it prints nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (text, tag) = rest.split_at(at);
        let Some(bytes) = tag.find("%}").map(|end| end + 2) else { break };
        let (tag, after) = tag.split_at(bytes);
        let name = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        out.push_str(text);
        match name {
            // An empty `if` trims the blank space around it just as the tag would.
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// The prompt up to the end of the last message's content, so that the model goes on with it.
fn cut_after_last_message(mut text: String, chat: &ChatPrompt) -> Result<String, TemplateError> {
    let content = chat.messages.last().and_then(|message| member(message, "content").as_str()).unwrap_or("");
    let Some(at) = text.rfind(content.trim()) else { return Err(TemplateError::NotContinuable) };
    let kept = content.trim_start();
    let whole = text.get(at..).is_some_and(|rest| rest.starts_with(kept));
    text.truncate(at + if whole { kept.len() } else { content.trim().len() });
    Ok(text)
}

/// Bytes that a template may read.
fn bytes_of(chat: &ChatPrompt) -> usize {
    let messages = chat.messages.iter().map(|message| message.to_string().len()).sum::<usize>();
    messages + chat.kwargs.values().map(|value| value.to_string().len()).sum::<usize>()
}

/// A template shared by requests.
pub type SharedTemplate = Arc<ChatTemplate>;
