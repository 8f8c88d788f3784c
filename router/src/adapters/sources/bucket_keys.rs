//! A caller's own credentials for an object store, as JSON in the token.

use std::sync::Arc;

use object_store::StaticCredentialProvider;
use object_store::aws::AmazonS3Builder;
use object_store::gcp::{GcpCredential, GoogleCloudStorageBuilder};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer};

use crate::adapters::types::SourceError;

/// `{"aws_access_key_id": .., "aws_secret_access_key": .., "aws_session_token"?: .., "aws_region"?: ..}`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct S3Key {
    aws_access_key_id: String,
    #[serde(deserialize_with = "secret")]
    aws_secret_access_key: SecretString,
    #[serde(default, deserialize_with = "maybe_secret")]
    aws_session_token: Option<SecretString>,
    aws_region: Option<String>,
}

/// A service account, or a bearer token that was made from one.
pub(super) enum GcsKey {
    Account(SecretString),
    Bearer(SecretString),
}

/// What counts of a service account's JSON. Other members (where to ask, whether to sign) are the operator's to decide.
#[derive(Deserialize)]
struct Account {
    #[serde(deserialize_with = "secret")]
    private_key: SecretString,
    private_key_id: String,
    client_email: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wrapped {
    #[serde(deserialize_with = "secret")]
    gcp_service_account_json: SecretString,
}

impl S3Key {
    pub(super) fn parse(token: &SecretString) -> Result<Self, SourceError> {
        let refused = || {
            forbidden(
                "for s3 the token is JSON: {\"aws_access_key_id\": .., \"aws_secret_access_key\": .., \
                 \"aws_session_token\"?: .., \"aws_region\"?: ..}",
            )
        };
        let key: Self = serde_json::from_str(token.expose_secret()).map_err(|_| refused())?;
        // The region becomes a part of a host's name.
        let is_region = |region: &String| {
            (1..=32).contains(&region.len())
                && region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        let is_plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        let is_valid = key.aws_region.as_ref().is_none_or(is_region)
            && is_plain(&key.aws_access_key_id)
            && is_plain(key.aws_secret_access_key.expose_secret())
            && key.aws_session_token.as_ref().is_none_or(|token| is_plain(token.expose_secret()));
        if is_valid { Ok(key) } else { Err(refused()) }
    }

    pub(super) fn apply(self, mut builder: AmazonS3Builder) -> AmazonS3Builder {
        builder = builder
            .with_access_key_id(self.aws_access_key_id)
            .with_secret_access_key(self.aws_secret_access_key.expose_secret());
        if let Some(token) = self.aws_session_token {
            builder = builder.with_token(token.expose_secret());
        }
        match self.aws_region {
            Some(region) => builder.with_region(region),
            None => builder,
        }
    }
}

impl GcsKey {
    pub(super) fn parse(token: &SecretString) -> Result<Self, SourceError> {
        let text = token.expose_secret();
        if !text.trim_start().starts_with('{') {
            let is_bearer = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._~+/=-".contains(&b));
            // A hub token that was meant for another source stays here.
            return if is_bearer && !text.is_empty() && !text.starts_with("hf_") {
                Ok(Self::Bearer(token.clone()))
            } else {
                Err(refused_gcs())
            };
        }
        let inner = serde_json::from_str::<Wrapped>(text).ok().map(|wrapped| wrapped.gcp_service_account_json);
        let json = inner.as_ref().map_or(text, |inner| inner.expose_secret());
        let account: Account = serde_json::from_str(json).map_err(|_| refused_gcs())?;
        let only = serde_json::json!({
            "private_key": account.private_key.expose_secret(),
            "private_key_id": account.private_key_id,
            "client_email": account.client_email,
        });
        Ok(Self::Account(only.to_string().into()))
    }

    pub(super) fn apply(self, builder: GoogleCloudStorageBuilder) -> GoogleCloudStorageBuilder {
        match self {
            Self::Account(json) => builder.with_service_account_key(json.expose_secret()),
            Self::Bearer(token) => {
                let credential = GcpCredential { bearer: token.expose_secret().to_owned() };
                builder.with_credentials(Arc::new(StaticCredentialProvider::new(credential)))
            }
        }
    }

    /// `gcs_base_url` of the operator's own service account.
    pub(super) fn endpoint_in(json: &str) -> Result<Option<String>, &'static str> {
        #[derive(Deserialize)]
        struct Endpoint {
            gcs_base_url: Option<String>,
        }
        let found: Endpoint = serde_json::from_str(json).map_err(|_| "this is no JSON of a service account")?;
        Ok(found.gcs_base_url)
    }
}

fn secret<'de, D: Deserializer<'de>>(from: D) -> Result<SecretString, D::Error> {
    String::deserialize(from).map(SecretString::from)
}

fn maybe_secret<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SecretString>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.map(SecretString::from))
}

fn refused_gcs() -> SourceError {
    forbidden(
        "for gcs the token is a service account's JSON, {\"gcp_service_account_json\": \"..\"} or an access token",
    )
}

fn forbidden(message: &str) -> SourceError {
    SourceError::permanent("source_forbidden", message)
}

/// Standard base64 of exactly `N` bytes.
pub(super) fn from_base64<const N: usize>(text: &str) -> Option<[u8; N]> {
    let (mut bytes, mut len, mut bits, mut bits_len) = ([0; N], 0, 0_u32, 0);
    for digit in text.trim().trim_end_matches('=').bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xffff;
        bits_len += 6;
        if bits_len >= 8 {
            bits_len -= 8;
            *bytes.get_mut(len)? = u8::try_from(bits >> bits_len & 0xff).ok()?;
            len += 1;
        }
    }
    (len == N).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_checksums() {
        assert_eq!(from_base64::<4>("AAAAAA=="), Some([0; 4]));
        assert_eq!(from_base64::<4>("yZRlqg=="), Some([0xc9, 0x94, 0x65, 0xaa]));
        assert_eq!(from_base64::<3>("TWFu"), Some(*b"Man"));
        for text in ["", "AAAA", "AAAAAAAA", "AAAAAA-3", "AAA AA=="] {
            assert_eq!(from_base64::<4>(text), None, "{text}");
        }
        let sum = from_base64::<32>("47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=").unwrap();
        assert_eq!(sum[..4], [0xe3, 0xb0, 0xc4, 0x42]);
    }

    #[test]
    fn only_keys_are_keys_and_a_region_is_no_host() {
        let parse = |text: &str| S3Key::parse(&text.to_owned().into()).map(|_| ());
        assert_eq!(parse(r#"{"aws_access_key_id":"a","aws_secret_access_key":"b","aws_region":"eu-west-1"}"#), Ok(()));
        for text in [
            "hf_abc",
            "{}",
            "null",
            r#"{"aws_access_key_id":"a"}"#,
            r#"{"aws_access_key_id":"a","aws_secret_access_key":""}"#,
            r#"{"aws_access_key_id":"a","aws_secret_access_key":"b","endpoint":"http://169.254.169.254"}"#,
            r#"{"aws_access_key_id":"a","aws_secret_access_key":"b","aws_region":"x.evil.com/"}"#,
            r#"{"aws_access_key_id":"a\r\nX: y","aws_secret_access_key":"b"}"#,
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                matches!(&error, SourceError::Permanent { code: "source_forbidden", message, .. } if !message.contains("evil")),
                "{text}"
            );
        }
    }

    #[test]
    fn a_service_account_keeps_nothing_but_its_key() {
        let json = r#"{"type":"service_account","private_key":"k","private_key_id":"i","client_email":"e","gcs_base_url":"http://169.254.169.254","disable_oauth":true,"token_uri":"http://evil"}"#;
        let wrapped = serde_json::json!({ "gcp_service_account_json": json }).to_string();
        for text in [json.to_owned(), wrapped] {
            let Ok(GcsKey::Account(kept)) = GcsKey::parse(&text.into()) else { panic!("no account") };
            let kept: serde_json::Value = serde_json::from_str(kept.expose_secret()).unwrap();
            assert_eq!(kept, serde_json::json!({"private_key": "k", "private_key_id": "i", "client_email": "e"}));
        }
        assert!(matches!(GcsKey::parse(&"ya29.token".to_owned().into()), Ok(GcsKey::Bearer(_))));
        for text in ["hf_token", "", "a b", "{}", r#"{"private_key":"k"}"#] {
            assert!(GcsKey::parse(&text.to_owned().into()).is_err(), "{text}");
        }
    }
}
