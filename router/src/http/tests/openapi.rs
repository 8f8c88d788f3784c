//! The document against the router and the handlers: what it names is there, what it allows is accepted, what it forbids is
//! refused by name.

use std::collections::BTreeSet;

use serde_json::{Map, json};

use super::*;
use crate::http::{Cause, KeySpec};

const ADMIN: &str = "an-admin-key-of-this-test";

/// A server whose main listener has every route.
fn world() -> App {
    let keys = vec![KeySpec::admin(&ADMIN.into())];
    app_with(
        &Script::new(),
        RouterConfig { keys, allow_base_fallback: true, strict_fields: true, ..RouterConfig::default() },
    )
}

async fn get(router: axum::Router, path: &str) -> Response<Body> {
    router.oneshot(authorized("GET", path, Body::empty())).await.unwrap()
}

fn authorized(method: &str, path: &str, body: Body) -> Request<Body> {
    let key = format!("Bearer {ADMIN}");
    Request::builder().method(method).uri(path).header("authorization", key).body(body).unwrap()
}

async fn document(app: &App) -> Value {
    json_of(get(app.router(), "/openapi.json").await).await
}

/// Paths of a router, as its `Debug` shows them: axum has no other way to ask.
fn paths_of(router: &axum::Router) -> BTreeSet<String> {
    let text = format!("{router:?}");
    let paths =
        text.split("): \"").skip(1).filter_map(|rest| rest.split('"').next()).filter(|path| path.starts_with('/'));
    paths.filter(|path| !path.contains("__private")).map(str::to_owned).collect()
}

/// Method and path of every route, by asking each path for a method that it does not have.
async fn routes_of(router: axum::Router) -> BTreeSet<String> {
    let mut routes = BTreeSet::new();
    for path in paths_of(&router) {
        let concrete = path.replace("{*id}", "x").replace("{name}", "x").replace("{file}", "x");
        let response = router.clone().oneshot(authorized("TRACE", &concrete, Body::empty())).await.unwrap();
        assert_eq!(response.status(), 405, "{path}");
        let allowed = response.headers()["allow"].to_str().unwrap().to_owned();
        let methods = allowed.split(',').map(str::trim).filter(|method| *method != "HEAD");
        routes.extend(methods.map(|method| format!("{method} {}", path.replace("{*", "{"))));
    }
    routes
}

fn documented(document: &Value) -> BTreeSet<String> {
    let of_path = |(path, item): (&String, &Value)| {
        let methods = item.as_object().unwrap().keys();
        methods.map(|method| format!("{} {path}", method.to_uppercase())).collect::<Vec<_>>()
    };
    document["paths"].as_object().unwrap().iter().flat_map(of_path).collect()
}

#[tokio::test]
async fn the_document_and_the_router_have_the_same_routes() {
    let app = world();
    let routes = routes_of(app.router()).await;
    assert!(routes.len() > 40, "{routes:?}");
    assert_eq!(documented(&document(&app).await), routes);
    let operators = json_of(get(app.admin_router(), "/openapi.json").await).await;
    assert_eq!(documented(&operators), routes_of(app.admin_router()).await);
}

#[tokio::test]
async fn admin_routes_are_in_the_main_document_where_they_are_served() {
    let open = app(&Script::new());
    let document = json_of(send(&open, Request::get("/openapi.json").body(Body::empty()).unwrap()).await).await;
    assert!(document["paths"].as_object().unwrap().keys().all(|path| !path.starts_with("/admin")));
    assert!(document["paths"]["/v1/completions"]["post"].get("security").is_none(), "no key is needed here");
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
}

#[tokio::test]
async fn the_document_needs_the_key_and_has_a_tag() {
    let keys = vec![KeySpec::plain(&"a-key-of-this-test".into())];
    let app = app_with(&Script::new(), RouterConfig { keys, ..RouterConfig::default() });
    let ask = |key: &str, tag: &str| {
        Request::get("/openapi.json")
            .header("authorization", key)
            .header("if-none-match", tag)
            .body(Body::empty())
            .unwrap()
    };
    assert_eq!(send(&app, ask("", "")).await.status(), 401);
    let response = send(&app, ask("Bearer a-key-of-this-test", "")).await;
    let tag = response.headers()["etag"].to_str().unwrap().to_owned();
    let document = json_of(response).await;
    assert_eq!(document["paths"]["/v1/completions"]["post"]["security"], json!([{"bearer": []}]));
    let again = send(&app, ask("Bearer a-key-of-this-test", &format!("\"other\", {tag}"))).await;
    assert_eq!((again.status().as_u16(), again.headers()["etag"].to_str().unwrap()), (304, tag.as_str()));
    assert_eq!(text_of(again).await, "");
    for path in ["/docs", "/docs/docs.js", "/docs/docs.css"] {
        let page = send(&app, Request::get(path).body(Body::empty()).unwrap()).await;
        assert_eq!(page.status(), 200, "{path} holds nothing secret");
        let policy = page.headers()["content-security-policy"].to_str().unwrap();
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    }
}

#[tokio::test]
async fn every_code_of_an_error_is_documented() {
    let document = document(&world()).await;
    let operations =
        document["paths"].as_object().unwrap().values().flat_map(|item| item.as_object().unwrap().values());
    let responses = operations.flat_map(|operation| operation["responses"].as_object().unwrap().values());
    let codes: BTreeSet<&str> = responses
        .flat_map(|response| response["x-codes"].as_array().into_iter().flatten().filter_map(Value::as_str))
        .collect();
    // A request to a route that is documented gets neither.
    let elsewhere = [Cause::MethodNotAllowed.row().code];
    let all: BTreeSet<&str> =
        Cause::ALL.iter().map(|cause| cause.row().code).filter(|code| !elsewhere.contains(code)).collect();
    assert_eq!(codes, all);
}

/// Schemas of a document.
struct Schemas<'a>(&'a Value);

impl<'a> Schemas<'a> {
    fn resolved(&self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(name) => self.resolved(self.0.pointer(name.strip_prefix('#').unwrap()).unwrap()),
            None => schema,
        }
    }

    /// Name, schema and whether it is required, of every member of an object.
    fn members(&self, schema: &'a Value) -> Vec<(String, &'a Value, bool)> {
        let schema = self.resolved(schema);
        let parts = schema["allOf"].as_array().into_iter().flatten().flat_map(|part| self.members(part));
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let own = schema["properties"].as_object().into_iter().flatten();
        let own = own.map(|(name, schema)| (name.clone(), schema, required.contains(&name.as_str())));
        parts.chain(own).collect()
    }

    /// The ways to write a value besides null, each with one `type`.
    fn forms(&self, schema: &'a Value) -> Vec<Value> {
        let schema = self.resolved(schema);
        for any in ["oneOf", "anyOf"] {
            if let Some(options) = schema[any].as_array() {
                return options.iter().flat_map(|option| self.forms(option)).collect();
            }
        }
        let typed = |kind: &str| {
            let mut form = schema.clone();
            form["type"] = kind.into();
            form
        };
        match &schema["type"] {
            Value::String(kind) if kind == "null" => Vec::new(),
            Value::Array(kinds) => {
                kinds.iter().filter_map(Value::as_str).filter(|kind| *kind != "null").map(typed).collect()
            }
            Value::Null if schema["allOf"].is_array() => vec![typed("object")],
            _ => vec![schema.clone()],
        }
    }

    /// Values at the edges of what a form allows.
    fn allowed(&self, form: &Value) -> Vec<Value> {
        if let Some(values) = form["enum"].as_array() {
            return values.clone();
        }
        if !form["example"].is_null() {
            return vec![form["example"].clone()];
        }
        let bounds =
            || [&form["minimum"], &form["maximum"], &form["default"]].into_iter().filter(|bound| !bound.is_null());
        let length = |name: &str, default: u64| form[name].as_u64().unwrap_or(default) as usize;
        match form["type"].as_str() {
            Some("boolean") => vec![json!(true), json!(false)],
            Some("integer") if bounds().next().is_none() => vec![json!(1)],
            Some("number") if bounds().next().is_none() => vec![json!(0.5)],
            Some("integer" | "number") => bounds().cloned().collect(),
            Some("string") if !form["pattern"].is_null() => vec![json!("x")],
            Some("string") => {
                let most = length("maxLength", 8);
                vec![json!("x".repeat(length("minLength", 1).min(most))), json!("x".repeat(most))]
            }
            Some("array") => {
                let item = self.item(form);
                let lens = [length("minItems", 0), length("maxItems", 2).min(300)];
                lens.iter().map(|&len| Value::Array(vec![item.clone(); len])).collect()
            }
            Some("object") => vec![self.least(form)],
            _ => Vec::new(),
        }
    }

    fn item(&self, form: &Value) -> Value {
        let items = form["items"].clone();
        let resolved = Schemas(self.0).owned_forms(&items);
        resolved.first().and_then(|form| self.allowed(form).into_iter().next()).unwrap_or(Value::Null)
    }

    fn owned_forms(&self, schema: &Value) -> Vec<Value> {
        let target = schema["$ref"].as_str().and_then(|name| self.0.pointer(name.strip_prefix('#').unwrap()));
        match target {
            Some(target) => self.forms(target),
            None => vec![schema.clone()],
        }
    }

    /// An object with what it must have.
    fn least(&self, form: &Value) -> Value {
        let required = form["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let member = |name: &str| {
            let forms = self.owned_forms(&form["properties"][name]);
            let value = forms.first().and_then(|form| self.allowed(form).into_iter().next());
            (name.to_owned(), value.unwrap_or_else(|| json!("x")))
        };
        Value::Object(required.map(member).collect())
    }

    /// Values just outside, and values of other types.
    fn forbidden(&self, forms: &[Value]) -> Vec<Value> {
        if forms.iter().any(|form| form["type"].is_null()) {
            return Vec::new(); // anything goes
        }
        let takes = |kind: &str| forms.iter().any(|form| form["type"] == kind);
        let mut values = Vec::new();
        let others = [
            (json!(true), takes("boolean")),
            (json!(1.5), takes("number")),
            (json!(7), takes("number") || takes("integer")),
            (json!("text"), takes("string")),
            (json!([{}]), takes("array")),
            (json!({"x": 1}), takes("object")),
        ];
        values.extend(others.into_iter().filter(|(_, is_taken)| !is_taken).map(|(value, _)| value));
        let [form] = forms else { return values };
        if form["enum"].is_array() && form["type"] == "string" {
            values.push(json!("none of these"));
        }
        for (name, step) in [("minimum", -1.0), ("maximum", 1.0)] {
            values.extend(form[name].as_f64().map(|bound| json!(bound + step)));
        }
        values.extend(form["exclusiveMinimum"].as_f64().map(|bound| json!(bound)));
        values.extend(form["maxLength"].as_u64().map(|most| json!("x".repeat(most as usize + 1))));
        values.extend(form["minLength"].as_u64().filter(|least| *least > 0).map(|_| json!("")));
        let item = || self.item(form);
        values.extend(form["maxItems"].as_u64().map(|most| Value::Array(vec![item(); most as usize + 1])));
        values.extend(form["minItems"].as_u64().filter(|least| *least > 0).map(|_| json!([])));
        values
    }
}

/// Fields that need others beside them to be accepted.
const COMPANIONS: &[(&str, &str)] = &[
    ("stream_options", r#"{"stream": true}"#),
    ("top_logprobs", r#"{"logprobs": true}"#),
    ("best_of", r#"{"do_sample": true, "temperature": 1}"#),
];
/// Fields whose allowed values depend on more than a schema can say: on adapters that exist, on the prompt, on the template.
const DEPENDENT: &[&str] = &[
    "adapter_id",
    "adapters",
    "compose",
    "merged_adapters",
    "min_tokens",
    "continue_final_message",
    "decoder_input_details",
    "model",
    "lora_path",
    "lora_name",
    "ref",
    "revision",
    "versions",
    "tools", // no two may have one name
    "tool_choice",
    "reasoning",
    "/generate_stream best_of",
    "self_test",
    "disk",
    "chat_template",
];

/// JSON schemas: `true` is one too.
const LENIENT: &[&str] = &["schema", "guided_json"];

/// The field that a refusal names. LoRAX's and SGLang's errors have it in their text alone.
fn is_refused_at(status: StatusCode, reply: &Value, field: &str) -> bool {
    let error = &reply["error"];
    let named = match error["param"].as_str() {
        Some(param) => {
            param == field || param.starts_with(&format!("{field}.")) || param.starts_with(&format!("{field}["))
        }
        None => reply.to_string().contains(&format!("`{field}")) || reply.to_string().contains(&format!("'{field}'")),
    };
    // A long value in itself is no mistake.
    let is_long = error["code"] == Cause::ContextLengthExceeded.row().code;
    matches!(status.as_u16(), 400 | 422) && named && !is_long
}

/// Sends each field's values in a body that is good otherwise. Gives what is not as documented.
async fn check_fields(
    app: &App,
    at: (&str, &str),
    (schemas, schema): (&Schemas<'_>, &Value),
    wrap: impl Fn(&Map<String, Value>) -> Value,
    sent: &mut usize,
) -> Vec<String> {
    let (method, path) = at;
    let mut wrong = Vec::new();
    for (name, schema, _) in schemas.members(schema) {
        let forms = schemas.forms(schema);
        let mut cases: Vec<(Value, bool)> = schemas.forbidden(&forms).into_iter().map(|value| (value, false)).collect();
        let here = format!("{path} {name}");
        if LENIENT.contains(&name.as_str()) {
            cases.retain(|(value, _)| !value.is_boolean());
        }
        if !DEPENDENT.iter().any(|known| *known == name || *known == here) {
            cases.extend(forms.iter().flat_map(|form| schemas.allowed(form)).map(|value| (value, true)));
        }
        for (value, is_allowed) in cases {
            let mut fields = Map::new();
            if is_allowed && let Some((_, with)) = COMPANIONS.iter().find(|(field, _)| *field == name) {
                fields = serde_json::from_str(with).unwrap();
            }
            fields.insert(name.clone(), value.clone());
            let body = wrap(&fields).to_string();
            let response = app.router().oneshot(authorized(method, path, body.into())).await.unwrap();
            let status = response.status();
            let text = text_of(response).await;
            let reply = serde_json::from_str(&text).unwrap_or(Value::Null);
            let shown: String = value.to_string().chars().take(80).collect();
            *sent += 1;
            if is_refused_at(status, &reply, &name) == is_allowed {
                wrong.push(format!("{method} {path}: {name} = {shown}: {status} {text:.300}"));
            }
        }
    }
    wrong
}

#[tokio::test]
async fn what_the_document_allows_is_accepted_and_what_it_forbids_is_refused_by_name() {
    let app = world();
    let document = document(&app).await;
    let schemas = Schemas(&document);
    let (mut sent, mut wrong) = (0, Vec::new());
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let content = &operation["requestBody"]["content"]["application/json"];
            // That one has three kinds of body.
            if content.is_null() || path == "/invocations" {
                continue;
            }
            let schema = content["schema"]["anyOf"].get(0).unwrap_or(&content["schema"]);
            let example = content["example"].as_object().unwrap().clone();
            let wrap = |fields: &Map<String, Value>| {
                let mut body = example.clone();
                body.extend(fields.clone());
                Value::Object(body)
            };
            let concrete = path.replace("{name}", "x");
            let at = (method.to_uppercase(), concrete.as_str());
            wrong.extend(check_fields(&app, (&at.0, at.1), (&schemas, schema), wrap, &mut sent).await);
            let parameters = schemas.members(schema).into_iter().find(|(name, ..)| name == "parameters");
            if let Some((_, parameters, _)) = parameters {
                let inner = parameters["oneOf"].as_array().unwrap().iter().find(|one| one["$ref"].is_string()).unwrap();
                let wrap = |fields: &Map<String, Value>| json!({"inputs": "Hello!\n", "parameters": fields});
                wrong.extend(check_fields(&app, (&at.0, at.1), (&schemas, inner), wrap, &mut sent).await);
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {sent}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(sent > 1000, "{sent}");
}
