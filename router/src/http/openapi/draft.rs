//! A document in the making: operations one by one, and the schemas they mention.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa::openapi::extensions::ExtensionsBuilder;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{HttpMethod, Operation, OperationBuilder, ParameterBuilder, ParameterIn, PathsBuilder};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, Object, ObjectBuilder, Type};
use utoipa::openapi::{
    Components, Content, ContentBuilder, Info, OpenApi, PathItem, Ref, RefOr, Required, Response, ResponseBuilder,
    Schema, SecurityRequirement, Tag, security,
};

use super::Facts;
use super::schemas::anthropic::AnthropicError;
use super::schemas::generation::ErrorReply;
use super::schemas::lorax::LoraxError;
use super::schemas::runtime::SglangError;
use crate::http::error::Cause;
use crate::http::lorax::error::lorax_status;

/// The name of the security scheme.
const BEARER: &str = "bearer";

/// Who may call a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Everybody.
    Open,
    /// An API key, where there are keys.
    Keyed,
    /// An API key, or the admin's where there is one.
    Runtime,
    /// The admin key, where there is one.
    Admin,
    /// The scrapers' key, where there is one.
    Metrics,
}

/// How a route spells its errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Envelope,
    Lorax,
    Anthropic,
    Vllm,
    Sglang,
    /// By the body of the request.
    LoraxOrEnvelope,
}

/// Any request may get these.
const ANY: &[Cause] = &[Cause::InvalidValue, Cause::HeadersTooLarge, Cause::InternalError];
/// Any request to a route that needs a key.
const KEYED: &[Cause] = &[Cause::InvalidApiKey, Cause::RouteForbidden, Cause::RateLimited];
/// Any request with a body.
const BODY: &[Cause] = &[
    Cause::InvalidJson,
    Cause::MissingField,
    Cause::UnsupportedParameter,
    Cause::BodyTimeout,
    Cause::BodyTooLarge,
    Cause::UnsupportedMediaType,
];

/// The document so far.
pub(super) struct Draft<'a> {
    pub(super) facts: &'a Facts,
    paths: Vec<(String, HttpMethod, Operation)>,
    schemas: BTreeMap<String, RefOr<Schema>>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(facts: &'a Facts) -> Self {
        Self { facts, paths: Vec::new(), schemas: BTreeMap::new() }
    }

    /// Begins an operation; [`Op::done`] adds it.
    pub(super) fn op(&mut self, method: HttpMethod, path: &'static str, id: &str) -> Op<'_, 'a> {
        Op {
            draft: self,
            method,
            path,
            builder: OperationBuilder::new().operation_id(Some(id)),
            access: Access::Keyed,
            shape: Shape::Envelope,
            causes: ANY.to_vec(),
            replies: BTreeMap::new(),
        }
    }

    /// A reference to the schema of `T`, which joins the components with all that it mentions.
    fn reference<T: ToSchema>(&mut self) -> Ref {
        let mut mentioned = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut mentioned);
        self.schemas.extend(mentioned);
        Ref::from_schema_name(T::name())
    }

    /// The whole, as JSON.
    pub(super) fn finish(self, info: Info, tags: Vec<Tag>) -> Value {
        let mut paths = PathsBuilder::new();
        for (path, method, operation) in self.paths {
            paths = paths.path(path, PathItem::new(method, operation));
        }
        let mut components = Components::new();
        components.schemas.extend(self.schemas);
        let bearer = security::Http::new(security::HttpAuthScheme::Bearer);
        components.add_security_scheme(BEARER, security::SecurityScheme::Http(bearer));
        let mut document = OpenApi::new(info, paths.build());
        document.components = Some(components);
        document.tags = Some(tags);
        serde_json::to_value(document).unwrap_or_default() // strings and numbers: this cannot fail
    }
}

/// One operation in the making.
pub(super) struct Op<'d, 'a> {
    draft: &'d mut Draft<'a>,
    method: HttpMethod,
    path: &'static str,
    builder: OperationBuilder,
    access: Access,
    shape: Shape,
    causes: Vec<Cause>,
    /// By status.
    replies: BTreeMap<u16, Response>,
}

impl Op<'_, '_> {
    pub(super) fn tag(mut self, tag: &str) -> Self {
        self.builder = self.builder.tag(tag);
        self
    }

    pub(super) fn says(mut self, summary: &str, description: &str) -> Self {
        let description = Some(description).filter(|text| !text.is_empty());
        self.builder = self.builder.summary(Some(summary)).description(description);
        self
    }

    pub(super) fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    pub(super) fn shape(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    /// A parameter in the path: any text.
    pub(super) fn in_path(mut self, name: &str, description: &str) -> Self {
        let schema = Object::with_type(Type::String);
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path).required(Required::True);
        self.builder = self.builder.parameter(parameter.description(Some(description)).schema(Some(schema)));
        self
    }

    /// An optional parameter of the query.
    pub(super) fn in_query(mut self, name: &str, schema: Object, description: &str) -> Self {
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Query).required(Required::False);
        self.builder = self.builder.parameter(parameter.description(Some(description)).schema(Some(schema)));
        self
    }

    /// An optional header.
    pub(super) fn in_header(mut self, name: &str, schema: Object, description: &str) -> Self {
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Header).required(Required::False);
        self.builder = self.builder.parameter(parameter.description(Some(description)).schema(Some(schema)));
        self
    }

    /// The request's body.
    pub(super) fn body<T: ToSchema>(self, example: Value) -> Self {
        let schema = self.draft.reference::<T>();
        self.body_of(schema, example)
    }

    fn body_of(mut self, schema: impl Into<RefOr<Schema>>, example: Value) -> Self {
        let content = ContentBuilder::new().schema(Some(schema)).example(Some(example)).build();
        let body = RequestBodyBuilder::new().required(Some(Required::True)).content("application/json", content);
        self.builder = self.builder.request_body(Some(body.build()));
        self.causes.extend(BODY);
        self
    }

    /// One of three bodies.
    pub(super) fn body_any<A: ToSchema, B: ToSchema, C: ToSchema>(self, example: Value) -> Self {
        let any = [self.draft.reference::<A>(), self.draft.reference::<B>(), self.draft.reference::<C>()];
        let any = any.into_iter().fold(AnyOfBuilder::new(), |any, one| any.item(one));
        self.body_of(Schema::AnyOf(any.build()), example)
    }

    /// A JSON reply.
    pub(super) fn reply<T: ToSchema>(self, status: u16, description: &str) -> Self {
        let schema = self.draft.reference::<T>();
        self.with(status, description, "application/json", Content::new(Some(schema)))
    }

    /// A JSON reply that is one of several.
    pub(super) fn reply_any(self, status: u16, description: &str, schemas: impl FnOnce(&mut Names<'_, '_>)) -> Self {
        let mut names = Names { draft: &mut *self.draft, any: AnyOfBuilder::new() };
        schemas(&mut names);
        let any = Schema::AnyOf(names.any.build());
        self.with(status, description, "application/json", Content::new(Some(any)))
    }

    /// Server-sent events that are one of several.
    pub(super) fn events_any(
        mut self,
        status: u16,
        description: &str,
        schemas: impl FnOnce(&mut Names<'_, '_>),
    ) -> Self {
        let error = self.error_schema();
        let mut names = Names { draft: &mut *self.draft, any: AnyOfBuilder::new() };
        schemas(&mut names);
        let any = names.any.item(error).build();
        self.with(status, description, "text/event-stream", event_content(json!(any)))
    }

    /// A JSON object of any kind.
    pub(super) fn object(self, status: u16, description: &str) -> Self {
        self.with(status, description, "application/json", Content::new(Some(Object::with_type(Type::Object))))
    }

    /// A reply of text.
    pub(super) fn text(self, status: u16, media_type: &str, description: &str) -> Self {
        let schema = Object::with_type(Type::String);
        self.with(status, description, media_type, Content::new(Some(schema)))
    }

    /// Server-sent events; the data of each is a `T`, or the error that ends the stream. Comes after [`Self::shape`].
    pub(super) fn events<T: ToSchema>(self, status: u16, description: &str) -> Self {
        self.events_any(status, description, |any| any.one::<T>())
    }

    /// A reply without a body.
    pub(super) fn empty(mut self, status: u16, description: &str) -> Self {
        let reply = self.replies.remove(&status).unwrap_or_else(|| plain(description));
        self.replies.insert(status, reply);
        self
    }

    fn with(mut self, status: u16, description: &str, media_type: &str, content: Content) -> Self {
        let mut reply = self.replies.remove(&status).unwrap_or_else(|| plain(description));
        reply.content.insert(media_type.to_owned(), RefOr::T(content));
        self.replies.insert(status, reply);
        self
    }

    /// A header of the reply.
    pub(super) fn header(mut self, status: u16, name: &str, description: &str) -> Self {
        let header = HeaderBuilder::new().schema(Some(Object::with_type(Type::String))).description(Some(description));
        if let Some(reply) = self.replies.get_mut(&status) {
            reply.headers.insert(name.to_owned(), RefOr::T(header.build()));
        }
        self
    }

    /// What stands in the way, besides what any request may get.
    pub(super) fn refuses(mut self, causes: &[Cause]) -> Self {
        self.causes.extend(causes);
        self
    }

    /// Adds the operation to the document.
    pub(super) fn done(mut self) {
        let facts = self.draft.facts;
        let needs_key = match self.access {
            Access::Open => false,
            Access::Keyed => facts.has_keys,
            Access::Runtime => facts.has_keys || facts.has_admin,
            Access::Admin => facts.has_admin,
            Access::Metrics => facts.has_metrics_key && !facts.is_admin_listener,
        };
        if self.access != Access::Open {
            self.causes.extend(KEYED);
        }
        if needs_key {
            self.builder = self.builder.security(SecurityRequirement::new(BEARER, Vec::<String>::new()));
        }
        let errors = self.errors();
        self.replies.extend(errors);
        for (status, mut reply) in std::mem::take(&mut self.replies) {
            let id = HeaderBuilder::new().schema(Some(Object::with_type(Type::String)));
            let id = id.description(Some("The request's id: the client's own, or a new one."));
            reply.headers.insert("x-request-id".into(), RefOr::T(id.build()));
            self.builder = self.builder.response(status.to_string(), reply);
        }
        self.draft.paths.push((self.path.to_owned(), self.method, self.builder.build()));
    }

    /// What an error looks like here.
    fn error_schema(&mut self) -> RefOr<Schema> {
        match self.shape {
            Shape::Envelope | Shape::Vllm => self.draft.reference::<ErrorReply>().into(),
            Shape::Lorax => self.draft.reference::<LoraxError>().into(),
            Shape::Anthropic => self.draft.reference::<AnthropicError>().into(),
            Shape::Sglang => {
                let any = [self.draft.reference::<SglangError>(), self.draft.reference::<ErrorReply>()];
                any.into_iter().fold(AnyOfBuilder::new(), |any, one| any.item(one)).into()
            }
            Shape::LoraxOrEnvelope => {
                let any = [self.draft.reference::<LoraxError>(), self.draft.reference::<ErrorReply>()];
                any.into_iter().fold(AnyOfBuilder::new(), |any, one| any.item(one)).into()
            }
        }
    }

    /// A response for each status that the causes have here.
    fn errors(&mut self) -> BTreeMap<u16, Response> {
        let mut codes: BTreeMap<u16, BTreeSet<&str>> = BTreeMap::new();
        for cause in &self.causes {
            for status in statuses(self.shape, *cause) {
                codes.entry(status).or_default().insert(cause.row().code);
            }
        }
        let schema = self.error_schema();
        codes.into_iter().map(|(status, codes)| (status, error_response(status, &codes, schema.clone()))).collect()
    }
}

/// Schemas of which a reply is one.
pub(super) struct Names<'d, 'a> {
    draft: &'d mut Draft<'a>,
    any: AnyOfBuilder,
}

impl Names<'_, '_> {
    pub(super) fn one<T: ToSchema>(&mut self) {
        let schema = self.draft.reference::<T>();
        self.any = std::mem::take(&mut self.any).item(schema);
    }

    pub(super) fn list<T: ToSchema>(&mut self) {
        let schema = self.draft.reference::<T>();
        let list = ArrayBuilder::new().items(schema).build();
        self.any = std::mem::take(&mut self.any).item(Schema::Array(list));
    }
}

/// One event as OpenAPI 3.2 sees it: an object with its fields, whose `data` is JSON as text.
fn event_content(data: Value) -> Content {
    let extensions = ExtensionsBuilder::new().add("x-contentSchema", data).build();
    let text = ObjectBuilder::new().schema_type(Type::String).content_media_type("application/json");
    let event = ObjectBuilder::new()
        .property("event", Object::with_type(Type::String))
        .property("data", text.extensions(Some(extensions)))
        .required("data");
    Content::new(Some(event.build()))
}

fn plain(description: &str) -> Response {
    ResponseBuilder::new().description(description).build()
}

fn error_response(status: u16, codes: &BTreeSet<&str>, schema: RefOr<Schema>) -> Response {
    let names: Vec<String> = codes.iter().map(|code| format!("`{code}`")).collect();
    let codes: Vec<&str> = codes.iter().copied().collect();
    let extensions = ExtensionsBuilder::new().add("x-codes", json!(codes)).build();
    let mut response = ResponseBuilder::new()
        .description(names.join(", "))
        .content("application/json", Content::new(Some(schema)))
        .extensions(Some(extensions));
    if matches!(status, 429 | 503) {
        let header = HeaderBuilder::new().schema(Some(Object::with_type(Type::String)));
        response = response.header("retry-after", header.description(Some("Whole seconds.")).build());
    }
    response.build()
}

/// The statuses that a cause has in a shape.
fn statuses(shape: Shape, cause: Cause) -> Vec<u16> {
    let own = cause.row().status.as_u16();
    let mut all = match shape {
        Shape::Envelope | Shape::Anthropic => vec![own],
        Shape::Lorax => vec![lorax_status(cause)],
        Shape::LoraxOrEnvelope => vec![own, lorax_status(cause)],
        // Their clients know 400 for whatever is wrong with an adapter.
        Shape::Vllm if matches!(own, 409 | 422) => vec![400],
        Shape::Vllm => vec![own],
        // The layers in front of the handler have their own statuses.
        Shape::Sglang if ANY.contains(&cause) || KEYED.contains(&cause) => vec![own, 400],
        Shape::Sglang if cause == Cause::RuntimeAdaptersDisabled => vec![own],
        Shape::Sglang => vec![400],
    };
    all.dedup();
    all
}
