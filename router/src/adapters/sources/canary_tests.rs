//! Secrets in every place that a source takes one, and everything that is logged, printed or returned meanwhile.

use std::fmt::{self, Write};
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span;
use tracing::subscriber::Subscriber;

use super::testing::*;
use super::*;
use crate::adapters::FileName;

const CANARY: &str = "CANARY";

/// Keeps every event and span of every crate, down to the last level.
#[derive(Clone, Default)]
struct Everything(Arc<Mutex<String>>);

struct Line<'a>(&'a mut String);

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = write!(self.0, " {field}={value:?}");
    }
}

impl Subscriber for Everything {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, span: &span::Attributes<'_>) -> span::Id {
        span.record(&mut Line(&mut self.0.lock().unwrap()));
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, values: &span::Record<'_>) {
        values.record(&mut Line(&mut self.0.lock().unwrap()));
    }
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = self.0.lock().unwrap();
        let _ = write!(text, "\n{}", event.metadata().target());
        event.record(&mut Line(&mut text));
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn settings(url: &str) -> SourceSettings {
    let secret = |what: &str| format!("{CANARY}-{what}").into();
    let mut settings = quick();
    settings.hub.endpoint = url.to_owned();
    settings.hub.token = Some(secret("hub"));
    settings.s3.endpoint = Some(url.to_owned());
    settings.s3.credentials =
        S3Credentials::Static { key_id: "id".into(), secret: secret("s3"), session_token: Some(secret("session")) };
    settings.gcs.endpoint = Some(url.to_owned());
    let account =
        serde_json::json!({"private_key": format!("{CANARY}-key"), "private_key_id": "i", "client_email": "e"});
    settings.gcs.credentials = GcsCredentials::ServiceAccount(account.to_string().into());
    settings.http.hosts = vec![url.to_owned()];
    settings.http.headers = vec![HttpHeader { host: url.to_owned(), name: "x-key".into(), value: secret("header") }];
    settings.networks = vec!["127.0.0.0/8".parse().unwrap()];
    settings
}

#[tokio::test]
async fn no_secret_is_logged_printed_or_returned() {
    let log = Everything::default();
    let _logging = tracing::subscriber::set_default(log.clone());
    let mut returned = String::new();
    let redirected = |code: u16| status(code, &[("location", &format!("http://127.0.0.1:1/{CANARY}?x={CANARY}"))]);
    for code in [200, 302, 401, 404, 500] {
        let server = Server::start(move |parts| match code {
            200 => file(
                parts,
                b"{}",
                &[
                    ("etag", "\"9e26dfeeb6e641a33dae4961196235bdb965b21b\""),
                    ("last-modified", "Fri, 21 Nov 2025 00:00:00 GMT"),
                    ("x-repo-commit", "0123456789abcdef0123456789abcdef01234567"),
                ],
            ),
            code => redirected(code),
        })
        .await;
        let settings = settings(&server.url());
        let _ = write!(returned, "{settings:?}");
        let sources = Sources::new(settings).unwrap();
        let tokens = [
            format!("{CANARY}-token"),
            format!(r#"{{"aws_access_key_id":"id","aws_secret_access_key":"{CANARY}-secret"}}"#),
            format!(r#"{{"private_key":"{CANARY}-key","private_key_id":"i","client_email":"e"}}"#),
            format!("{CANARY}\r\ninjected: header"),
        ];
        let credentials = [Credential::Server].into_iter().chain(tokens.iter().map(|text| token(text)));
        for credential in credentials {
            let _ = write!(returned, "{credential:?}");
            for text in ["acme/a", "s3://bucket/a", "gs://bucket/a", &format!("{}/a", server.url())] {
                let resolved = resolve(&sources, text, &credential).await;
                let _ = write!(returned, "{resolved:?}");
                if let Ok(resolved) = resolved {
                    let read = read(&sources, &resolved, FileName::Config, 0, &credential).await;
                    let _ = write!(returned, "{read:?}");
                }
            }
        }
        assert!(server.was_told(CANARY), "the test's secrets were used");
    }
    let logged = log.0.lock().unwrap();
    assert!(
        logged.contains("hyper") || logged.contains("object_store") || logged.contains("reqwest"),
        "nothing was logged"
    );
    let at = |text: &str| text.find(CANARY).map(|at| text[at.saturating_sub(300)..text.len().min(at + 60)].to_owned());
    assert_eq!(at(&returned), None);
    assert_eq!(at(&logged), None);
}
