//! `POST /v1/chat/completions`, and what both generation routes do at their ends.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::http::request::Parts;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::message::{MessageRules, ReasoningRules};
use super::messages::messages;
use super::reply::{Kind, Shape, name_the_source};
use super::resolve::Variant;
use super::run::Run;
use super::stream::StreamContext;
use super::submit::{Asker, Wanted, fit_prompt};
use super::tools::Tools;
use super::unsupported;
use super::validate::{Bounds, ContextFields, LOGPROBS_MAX, Params, check_sequences, max_tokens, params, small};
use crate::access::Caller;
use crate::http::App;
use crate::http::auth::{Metered, UpstreamToken};
use crate::http::body::json_object;
use crate::http::envelope::RequestId;
use crate::http::error::{ApiError, Cause, shown};
use crate::http::json::{Fields, type_name};
use crate::http::known_fields;
use crate::http::server::ConnectionAbort;
use crate::observe::RequestRecord;
use crate::text::grammar::{CompileError, GrammarSpec};
use crate::text::{ChatPrompt, PreparedChat, TemplateChoice, Thought};

/// Bytes of `chat_template_kwargs`.
const KWARGS_BYTES_MAX: usize = 16 * 1024;
const DOCUMENTS_MAX: usize = 256;
/// Bytes of rendered prompt per token of context, at most.
const PROMPT_BYTES_PER_TOKEN: usize = 4;
/// A short context still allows templates with a long preamble.
const PROMPT_BYTES_MIN: usize = 64 * 1024;

/// The request beyond what both routes share.
struct ChatRequest {
    params: Params,
    chat: ChatPrompt,
    logprobs: Option<u32>,
    tools: Option<Tools>,
    /// Text in front of the reply.
    echo: Option<String>,
    include_reasoning: bool,
}

/// The handler.
pub(crate) async fn chat_completions(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    app.chat_completion(&parts, &body).await
}

fn validate(fields: &Fields<'_>, bounds: &Bounds) -> Result<ChatRequest, ApiError> {
    unsupported::check_chat(fields)?;
    let mut params = params(fields, bounds)?;
    let completion = max_tokens(fields, "max_completion_tokens", 1)?;
    params.context_fields = ContextFields {
        prompt: "messages",
        max_tokens: if completion.is_some() { "max_completion_tokens" } else { "max_tokens" },
    };
    params.max_tokens = completion.or(max_tokens(fields, "max_tokens", 1)?);
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = small(fields, "top_logprobs", 0, LOGPROBS_MAX)?;
    if !logprobs && top.is_some_and(|top| top > 0) {
        return Err(ApiError::invalid(
            "top_logprobs",
            "absent unless `logprobs` is true",
            &top.unwrap_or(0).to_string(),
        ));
    }
    let tools = Tools::read(fields)?;
    let chat = chat_prompt_with(fields, bounds, tools.as_ref())?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    Ok(ChatRequest {
        logprobs: logprobs.then_some(top.unwrap_or(0)),
        echo: echo.then(|| answer_so_far(&chat)).flatten(),
        include_reasoning: fields.boolean("include_reasoning")?.unwrap_or(true),
        chat,
        tools,
        params,
    })
}

/// Reads what the template needs.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn chat_prompt(fields: &Fields<'_>, bounds: &Bounds) -> Result<ChatPrompt, ApiError> {
    chat_prompt_with(fields, bounds, Tools::read(fields)?.as_ref())
}

fn chat_prompt_with(fields: &Fields<'_>, bounds: &Bounds, tools: Option<&Tools>) -> Result<ChatPrompt, ApiError> {
    let messages = messages(fields)?;
    let add_generation_prompt = fields.boolean("add_generation_prompt")?;
    let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
    if continue_final_message && add_generation_prompt == Some(true) {
        let message = "`continue_final_message` and `add_generation_prompt` exclude each other";
        return Err(ApiError::at(Cause::InvalidValue, "continue_final_message", message));
    }
    fields.object("chat_template_kwargs")?;
    let mut kwargs =
        fields.get("chat_template_kwargs").and_then(|value| value.as_object()).cloned().unwrap_or_default();
    let kwargs_bytes = serde_json::to_string(&kwargs).map_or(0, |text| text.len());
    if kwargs_bytes > KWARGS_BYTES_MAX {
        return Err(ApiError::limit("chat_template_kwargs", kwargs_bytes, "bytes", KWARGS_BYTES_MAX, None));
    }
    reasoning_effort(fields, &mut kwargs)?;
    documents(fields, &mut kwargs)?;
    Ok(ChatPrompt {
        messages,
        tools: tools.map(|tools| tools.shown.clone()).unwrap_or_default(),
        tool_format: None,
        thinks: None,
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        kwargs,
        template: request_template(fields, bounds)?,
        output_bytes_max: prompt_bytes_max(bounds.context_tokens),
    })
}

/// The request's own template, where the operator lets it bring one.
fn request_template(fields: &Fields<'_>, bounds: &Bounds) -> Result<TemplateChoice, ApiError> {
    const NAME: &str = "chat_template";
    match fields.string(NAME)? {
        None => Ok(TemplateChoice::Base),
        Some(source) if bounds.trust_request_chat_template => Ok(TemplateChoice::Source(source.to_owned())),
        Some(_) => {
            let why = "templates are programs; only the model's own is run (--trust-request-chat-template)";
            Err(ApiError::unsupported(NAME, why))
        }
    }
}

/// `reasoning_effort` is a variable of templates; `none` is what they call `enable_thinking: false`.
fn reasoning_effort(fields: &Fields<'_>, kwargs: &mut Map<String, Value>) -> Result<(), ApiError> {
    const NAME: &str = "reasoning_effort";
    const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];
    let Some(effort) = fields.string(NAME)? else { return Ok(()) };
    if !EFFORTS.contains(&effort) {
        return Err(ApiError::invalid(NAME, &format!("one of {}", EFFORTS.join(", ")), effort));
    }
    kwargs.entry(NAME).or_insert_with(|| effort.into());
    if effort == "none" {
        kwargs.entry("enable_thinking").or_insert(Value::Bool(false));
    }
    Ok(())
}

/// `documents` are a variable of templates: objects, mostly with `title` and `text`.
fn documents(fields: &Fields<'_>, kwargs: &mut Map<String, Value>) -> Result<(), ApiError> {
    const NAME: &str = "documents";
    let Some(documents) = fields.array(NAME)? else { return Ok(()) };
    if documents.len() > DOCUMENTS_MAX {
        return Err(ApiError::limit(NAME, documents.len(), "documents", DOCUMENTS_MAX, None));
    }
    if let Some((i, other)) = documents.iter().enumerate().find(|(_, document)| !document.is_object()) {
        return Err(ApiError::invalid(&format!("{NAME}[{i}]"), "an object", type_name(other)));
    }
    kwargs.insert(NAME.into(), Value::Array(documents.clone()));
    Ok(())
}

/// The content of a last message that the assistant wrote.
fn answer_so_far(chat: &ChatPrompt) -> Option<String> {
    let last = chat.messages.last().filter(|message| message.get("role") == Some(&json!("assistant")))?;
    last.get("content")?.as_str().map(str::to_owned)
}

/// Bytes that a rendered prompt may have.
pub(crate) fn prompt_bytes_max(context_tokens: u32) -> usize {
    (context_tokens as usize * PROMPT_BYTES_PER_TOKEN).max(PROMPT_BYTES_MIN)
}

/// A chat that was handed to the engine. Every route that ends in a chat starts here and writes its own reply.
pub(crate) struct ChatStart {
    pub(crate) shape: Shape,
    pub(crate) runs: Vec<Run>,
    pub(crate) params: Params,
    pub(crate) variants: Vec<Variant>,
}

impl App {
    /// Answers a chat.
    ///
    /// # Errors
    /// Whatever stands in its way.
    pub(crate) async fn chat_completion(&self, parts: &Parts, body: &Map<String, Value>) -> Result<Response, ApiError> {
        let ignored = self.ignored_fields(known_fields::Body::Chat, body)?;
        let chat = self.start_chat(parts, body).await?;
        let mut response = self.answer(chat.shape, chat.runs, &chat.params, &chat.variants, parts).await?;
        ignored.name_in(&mut response);
        Ok(response)
    }

    /// Checks a chat and hands it to the engine. `body` has the fields of `/v1/chat/completions`.
    ///
    /// # Errors
    /// Whatever stands in its way.
    pub(crate) async fn start_chat(&self, parts: &Parts, body: &Map<String, Value>) -> Result<ChatStart, ApiError> {
        let bounds = self.bounds()?;
        let asker = self.asker(parts)?;
        let mut asked = validate(&Fields::new(body), &bounds)?;
        asked.params.grammar = self.reply_grammar(body).await?;
        asked.tools.iter().for_each(|tools| self.metrics.tools(tools.choice.name()));
        let variants = self.resolve(&asked.params, &asker).await?;
        check_sequences("n", variants.len() * asked.params.n as usize, &bounds.limits)?;
        self.choose_template(&mut asked.chat, &variants).await?;
        let mut chat = asked.chat;
        (chat.tool_format, chat.thinks) = (self.config.tool_call_parser, self.config.reasoning_parser.thinks());
        let chat = self.text.prepare_chat(chat, asked.params.add_special.unwrap_or(false)).await?;
        let rules = self.message_rules(&chat, asked.tools.as_ref(), asked.include_reasoning, asked.echo);
        asked.params.shown_special =
            self.text.mark_tokens(rules.tools.as_ref().map(|tools| tools.format), rules.reasoning.is_some());
        asked.params.grammar = asked.params.grammar.map(|rule| self.text.after_thought(rule, chat.thought));
        if let Some(tools) = asked.tools.filter(Tools::is_forced) {
            let (functions, calls_max) = tools.callable();
            let grammar = GrammarSpec::Lark(self.text.tool_grammar(&chat, functions, calls_max));
            asked.params.grammar = Some(match self.text.compile_grammar(grammar).await {
                Ok(compiled) => compiled,
                Err(error) => return Err(self.tool_error(&tools, &error).await),
            });
        }
        let prompt = fit_prompt(chat.tokens, asked.params.max_tokens, None, &asked.params, &bounds)?;
        let mut shape = Shape::new(self, Kind::Chat, &asked.params);
        (shape.logprobs, shape.message) = (asked.logprobs, rules);
        let wanted = Wanted {
            sequences: asked.params.n,
            logprobs: asked.logprobs,
            prompt_logprobs: asked.params.prompt_logprobs,
        };
        self.forbid_words(&mut asked.params, &bounds).await?;
        let runs = self.submit(vec![prompt], &variants, &asked.params, wanted, asker)?;
        Ok(ChatStart { shape, runs, params: asked.params, variants })
    }

    /// Why no call of `tools` can be forced. The first tool whose own schema is refused is named: the grammar is the server's
    /// text, and says nothing to the caller.
    async fn tool_error(&self, tools: &Tools, error: &CompileError) -> ApiError {
        /// A tool that is not found by then is not named.
        const SEARCH_TIME_MAX: Duration = Duration::from_secs(2);
        let culprit = async {
            for function in tools.callable().0 {
                let schema = GrammarSpec::JsonSchema(function.closed_parameters());
                if let Err(error @ CompileError::Refused(_)) = self.text.compile_grammar(schema).await {
                    return Some(ApiError::grammar(&tools.param_of(&function.name), &error));
                }
            }
            None
        };
        let search = matches!(error, CompileError::Refused(_));
        let found = if search { tokio::time::timeout(SEARCH_TIME_MAX, culprit).await.ok().flatten() } else { None };
        found.unwrap_or_else(|| ApiError::grammar("tools", error))
    }

    /// One adapter's own template for a chat under it alone. The request's own wins, and where there are several adapters
    /// they share the base model's.
    async fn choose_template(&self, chat: &mut ChatPrompt, variants: &[Variant]) -> Result<(), ApiError> {
        let [Variant { adapters, .. }] = variants else { return Ok(()) };
        let ([adapter], TemplateChoice::Base, true) = (&**adapters, &chat.template, self.config.use_adapter_templates)
        else {
            return Ok(());
        };
        let Some((identity, dir)) = adapter.local_files() else { return Ok(()) };
        let found = self.text.adapter_template(identity, dir.to_owned()).await;
        let found = found.map_err(|error| {
            let message = format!("adapter `{}`: {error} (--adapter-chat-template)", shown(&adapter.name));
            ApiError::at(Cause::AdapterInvalid, "model", message)
        })?;
        if let Some(template) = found {
            chat.template = TemplateChoice::Compiled(template);
        }
        Ok(())
    }

    /// How the reply to a chat is to be read.
    fn message_rules(
        &self,
        chat: &PreparedChat,
        tools: Option<&Tools>,
        shown: bool,
        echo: Option<String>,
    ) -> MessageRules {
        let opened = chat.thought == Thought::Begun;
        MessageRules {
            echo: echo.map(Into::into),
            reasoning: (chat.thought != Thought::Never).then_some(ReasoningRules { opened, shown }),
            tools: tools.map(|tools| tools.rules(chat.format)),
        }
    }

    /// Who asks, and how long they wait: `x-request-timeout`, but never longer than the server's own limit.
    ///
    /// # Errors
    /// 400 for a header that is no positive number.
    pub(crate) fn asker(&self, parts: &Parts) -> Result<Asker, ApiError> {
        const NAME: &str = "x-request-timeout";
        let sent = match parts.headers.get(NAME) {
            None => None,
            Some(value) => {
                let text = value.to_str().unwrap_or("");
                let seconds = text.trim().parse::<f64>().ok().filter(|s| *s > 0.0 && *s <= 1e9);
                let seconds = seconds.ok_or_else(|| ApiError::invalid(NAME, "a positive number of seconds", text))?;
                Some(Duration::from_secs_f64(seconds))
            }
        };
        let deadline = [sent, self.config.request_timeout].into_iter().flatten().min();
        Ok(Asker {
            caller: parts.extensions.get::<Caller>().cloned().unwrap_or_default(),
            metered: parts.extensions.get::<Metered>().cloned(),
            token: parts.extensions.get::<UpstreamToken>().and_then(|token| token.0.clone()),
            deadline_ms: deadline.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX).max(1)),
            record: parts.extensions.get::<Arc<RequestRecord>>().cloned(),
        })
    }

    /// Streams, or waits for the whole; either way the reply names what answered.
    pub(crate) async fn answer(
        &self,
        shape: Shape,
        runs: Vec<Run>,
        params: &Params,
        variants: &[Variant],
        parts: &Parts,
    ) -> Result<Response, ApiError> {
        let mut response = match params.stream {
            None => shape.whole(runs).await?,
            Some(options) => {
                let request_id = parts.extensions.get::<RequestId>().map_or_else(String::new, |id| id.0.clone());
                let abort = parts.extensions.get::<ConnectionAbort>().cloned();
                shape.stream(runs, StreamContext { options, request_id, abort }).await?
            }
        };
        name_the_source(&mut response, self, variants);
        Ok(response)
    }
}
