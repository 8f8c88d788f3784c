//! hyper answers a head that it cannot read by itself, with a status and nothing else. Such an answer gets the body that
//! every other error has, on its way into the socket.

use axum::http::StatusCode;

use super::error::{ApiError, Cause};

/// Longer than any answer of this kind.
const HEAD_BYTES_MAX: usize = 256;

/// The whole answer in the place of `bytes`, if these are hyper's own refusal of a head; ours carry an id.
pub(super) fn with_body(bytes: &[u8]) -> Option<Vec<u8>> {
    let head = std::str::from_utf8(bytes).ok().filter(|head| head.len() <= HEAD_BYTES_MAX)?;
    let rest = head.strip_prefix("HTTP/1.1 4")?;
    let is_bare = head.ends_with("\r\n\r\n")
        && head.matches("\r\n\r\n").count() == 1
        && head.contains("\r\ncontent-length: 0\r\n")
        && !head.contains("\r\nx-request-id:");
    if !is_bare {
        return None;
    }
    let status: u16 = format!("4{}", rest.get(..2)?).parse().ok()?;
    let error = match status {
        400 => ApiError::new(Cause::InvalidValue, "the request's head is not HTTP"),
        414 => ApiError::new(Cause::HeadersTooLarge, "the request's path is too long"),
        431 => ApiError::new(Cause::HeadersTooLarge, "the request's headers are larger or more than this server reads"),
        _ => return None,
    };
    let id = uuid::Uuid::new_v4().simple().to_string();
    let body = error.envelope(&id);
    let status = error.status();
    let reason = StatusCode::canonical_reason(&status).unwrap_or("");
    let (code, len) = (status.as_u16(), body.len());
    let answer = format!(
        "HTTP/1.1 {code} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\nx-request-id: {id}\r\n\
         content-length: {len}\r\n\r\n{body}"
    );
    Some(answer.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_that_are_nothing_but_a_refusal_get_a_body() {
        let bare = "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        let answer = String::from_utf8(with_body(bare.as_bytes()).unwrap()).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 431 ") && head.contains(&format!("content-length: {}", body.len())),
            "{head}"
        );
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["error"]["code"], "headers_too_large");
        for other in [
            bare.replace("431", "200"),
            bare.replace("431", "499"),
            bare.replace("content-length: 0", "content-length: 5"),
            bare.replace("connection: close", "x-request-id: a"),
            format!("{bare}{bare}"),
            format!("{bare}x"),
            "HTTP/1.1 4".into(),
            format!("HTTP/1.1 431 {}", "x".repeat(300)),
        ] {
            assert!(with_body(other.as_bytes()).is_none(), "{other}");
        }
    }
}
