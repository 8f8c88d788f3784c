//! Token ids to text, one at a time: only whole Unicode scalars come out, and the pieces add up to the full decode.
//!
//! Byte-level vocabularies (GPT-2 and its heirs) and SentencePiece-style ones (`▁`, `<0xE2>`) are decoded from a table of
//! bytes. Any other decoder runs the tokenizer on a small window.

use std::sync::Arc;

use tokenizers::Tokenizer;

use super::member;

/// Tokens the window decoder may hold before it gives out what it has.
const WINDOW_TOKENS_MAX: usize = 64;

/// The bytes of every token, and the rule that joins them.
pub(crate) struct TokenTable {
    rule: Rule,
    bytes: Vec<u8>,
    /// `ends[id]` is where the bytes of `id` end in `bytes`; they begin where those of `id - 1` end.
    ends: Vec<u32>,
    /// Bytes of the longest token.
    longest: usize,
    special: Vec<bool>,
    known: Vec<bool>,
    tokenizer: Arc<Tokenizer>,
}

/// How tokens become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Concatenate bytes; ill-formed runs become U+FFFD.
    ByteLevel,
    /// Concatenate bytes, then drop up to `strip` spaces in front of the whole text.
    Pieces { strip: usize, byte_fallback: bool },
    /// Concatenate; the spaces of the first token are dropped.
    Metaspace { replacement: char, drop_first: bool },
    /// Ask the tokenizer.
    Window,
}

impl TokenTable {
    /// Reads the decoder's kind out of `tokenizer_json` (already parsed by the tokenizer itself).
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, tokenizer_json: &serde_json::Value) -> Self {
        let rule = rule_of(member(tokenizer_json, "decoder"));
        let vocab = tokenizer.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1).min(vocab.len().saturating_mul(4) + 1024);
        let mut texts: Vec<Option<&str>> = vec![None; size];
        for (text, &id) in &vocab {
            if let Some(slot) = texts.get_mut(id as usize) {
                *slot = Some(text);
            }
        }
        let added = tokenizer.get_added_tokens_decoder();
        let mut table = Self {
            rule,
            bytes: Vec::new(),
            ends: Vec::with_capacity(size),
            longest: 0,
            special: vec![false; size],
            known: texts.iter().map(Option::is_some).collect(),
            tokenizer: Arc::clone(&tokenizer),
        };
        let char_bytes = char_bytes();
        for (id, text) in texts.into_iter().enumerate() {
            let extra = added.get(&(id as u32));
            if let Some(slot) = table.special.get_mut(id) {
                *slot = extra.is_some_and(|token| token.special);
            }
            let text = extra.map_or(text.unwrap_or(""), |token| token.content.as_str());
            let before = table.bytes.len();
            append_token(rule, text, &char_bytes, &mut table.bytes);
            table.longest = table.longest.max(table.bytes.len() - before);
            table.ends.push(table.bytes.len() as u32);
        }
        table
    }

    /// Fewest tokens that `bytes` of text can be, where the rule makes that certain.
    pub(crate) fn tokens_at_least(&self, bytes: usize) -> usize {
        match self.rule {
            Rule::ByteLevel | Rule::Pieces { .. } => bytes / self.longest.max(1),
            Rule::Metaspace { .. } | Rule::Window => 0,
        }
    }

    /// Ids are `0..len_tokens()`.
    pub(crate) fn len_tokens(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of one token; empty for an id outside the vocabulary.
    pub(crate) fn token_bytes(&self, id: u32) -> Vec<u8> {
        if self.rule == Rule::Window {
            return self.tokenizer.decode(&[id], false).unwrap_or_default().into_bytes();
        }
        self.raw(id).to_vec()
    }

    /// The bytes a token adds to a text that has begun.
    pub(crate) fn text_bytes(&self, id: u32) -> Vec<u8> {
        let bytes = self.token_bytes(id);
        match self.rule {
            Rule::Metaspace { replacement, .. } => {
                String::from_utf8_lossy(&bytes).replace(replacement, " ").into_bytes()
            }
            _ => bytes,
        }
    }

    /// True for tokens that `skip_special_tokens` leaves out.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// True if the tokenizer has this id. (A model's vocabulary is often padded beyond it.)
    pub(crate) fn is_known(&self, id: u32) -> bool {
        self.known.get(id as usize).copied().unwrap_or(false)
    }

    fn raw(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = id.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        let end = self.ends.get(id).copied().unwrap_or(start);
        self.bytes.get(start as usize..end as usize).unwrap_or(&[])
    }
}

/// Decodes one sequence.
pub struct Detokenizer {
    table: Arc<TokenTable>,
    skip_special: bool,
    /// Special tokens that are text all the same.
    shown: Arc<[u32]>,
    /// Bytes that are not a whole scalar yet.
    pending: Vec<u8>,
    /// Spaces that may still be dropped from the front of the text.
    strip: usize,
    /// No token was decoded yet.
    first: bool,
    window: Window,
}

/// Tokens whose text may still change. `ids[..shown]` are context, `ids[shown..]` are not given out yet.
#[derive(Default)]
struct Window {
    ids: Vec<u32>,
    shown: usize,
}

impl Detokenizer {
    pub(crate) fn new(table: Arc<TokenTable>, skip_special: bool) -> Self {
        let strip = if let Rule::Pieces { strip, .. } = table.rule { strip } else { 0 };
        Self {
            table,
            skip_special,
            shown: Arc::default(),
            pending: Vec::new(),
            strip,
            first: true,
            window: Window::default(),
        }
    }

    /// Takes `shown` for text although they are special tokens.
    pub(crate) fn showing(self, shown: Arc<[u32]>) -> Self {
        Self { shown, ..self }
    }

    /// Appends what token `id` makes certain to `out`: whole scalars only.
    pub fn push(&mut self, id: u32, out: &mut String) {
        let skipped = self.skip_special && self.table.is_special(id) && !self.shown.contains(&id);
        if skipped || !self.table.is_known(id) {
            return;
        }
        let table = Arc::clone(&self.table);
        match table.rule {
            Rule::Window => return self.push_window(id, out),
            Rule::Metaspace { replacement, drop_first } => {
                let text = String::from_utf8_lossy(table.raw(id));
                let drop = drop_first && self.first;
                out.extend(
                    text.chars()
                        .filter(|&c| !(drop && c == replacement))
                        .map(|c| if c == replacement { ' ' } else { c }),
                );
            }
            Rule::ByteLevel => {
                self.pending.extend_from_slice(table.raw(id));
                give_scalars(&mut self.pending, out);
            }
            Rule::Pieces { .. } => {
                self.pending.extend_from_slice(table.raw(id));
                let from = out.len();
                give_scalars(&mut self.pending, out);
                self.strip_front(from, out);
            }
        }
        self.first = false;
    }

    /// The sequence is over: what is left becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if self.table.rule == Rule::Window {
            let (before, whole) = self.window_texts();
            out.push_str(whole.strip_prefix(before.as_str()).unwrap_or(""));
            self.window = Window::default();
            return;
        }
        let from = out.len();
        if !self.pending.is_empty() {
            out.push_str(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
        }
        self.strip_front(from, out);
    }

    fn strip_front(&mut self, from: usize, out: &mut String) {
        while self.strip > 0 && out.len() > from {
            if out.as_bytes().get(from) == Some(&b' ') {
                out.remove(from);
                self.strip -= 1;
            } else {
                self.strip = 0;
            }
        }
    }

    fn push_window(&mut self, id: u32, out: &mut String) {
        self.window.ids.push(id);
        let (before, whole) = self.window_texts();
        let open = whole.ends_with('\u{FFFD}') && self.window.ids.len() < self.window.shown + WINDOW_TOKENS_MAX;
        if open {
            return;
        }
        if let Some(new) = whole.strip_prefix(before.as_str()) {
            out.push_str(new);
        }
        self.window.ids.drain(..self.window.shown);
        self.window.shown = self.window.ids.len();
    }

    fn window_texts(&self) -> (String, String) {
        let decode = |ids: &[u32]| {
            if ids.is_empty() { String::new() } else { self.table.tokenizer.decode(ids, false).unwrap_or_default() }
        };
        (decode(self.window.ids.get(..self.window.shown).unwrap_or(&[])), decode(&self.window.ids))
    }
}

/// Moves whole scalars from `pending` to `out`; bytes that can never become one turn into U+FFFD, as a lossy decode of
/// the whole would.
fn give_scalars(pending: &mut Vec<u8>, out: &mut String) {
    let mut used = 0;
    loop {
        let rest = pending.get(used..).unwrap_or(&[]);
        match std::str::from_utf8(rest) {
            Ok(text) => {
                out.push_str(text);
                used = pending.len();
                break;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                out.push_str(&String::from_utf8_lossy(rest.get(..valid).unwrap_or(&[])));
                used += valid;
                let Some(bad) = error.error_len() else { break };
                out.push('\u{FFFD}');
                used += bad;
            }
        }
    }
    pending.drain(..used);
}

/// Which rule equals the decoder that `tokenizer.json` asks for.
fn rule_of(decoder: &serde_json::Value) -> Rule {
    match member(decoder, "type").as_str() {
        Some("ByteLevel") => Rule::ByteLevel,
        Some("Metaspace") => metaspace(decoder),
        Some("Sequence") => sequence(member(decoder, "decoders").as_array().map_or(&[], Vec::as_slice)),
        _ => Rule::Window,
    }
}

fn metaspace(decoder: &serde_json::Value) -> Rule {
    let replacement = member(decoder, "replacement").as_str().and_then(|s| s.chars().next()).unwrap_or('▁');
    let scheme = member(decoder, "prepend_scheme").as_str();
    let drop_first = match scheme {
        Some(scheme) => scheme != "never",
        None => member(decoder, "add_prefix_space").as_bool().unwrap_or(true),
    };
    Rule::Metaspace { replacement, drop_first }
}

fn sequence(decoders: &[serde_json::Value]) -> Rule {
    let (mut replaced, mut byte_fallback, mut fused, mut strip) = (false, false, false, 0);
    for decoder in decoders {
        match member(decoder, "type").as_str() {
            Some("ByteLevel") if decoders.len() == 1 => return Rule::ByteLevel,
            Some("Metaspace") if decoders.len() == 1 => return metaspace(decoder),
            Some("Replace")
                if member(member(decoder, "pattern"), "String") == "▁" && member(decoder, "content") == " " =>
            {
                replaced = true
            }
            Some("ByteFallback") => byte_fallback = true,
            Some("Fuse") => fused = true,
            Some("Strip") if fused && member(decoder, "content") == " " && member(decoder, "stop") == 0 => {
                strip = member(decoder, "start").as_u64().unwrap_or(0).min(16) as usize;
            }
            _ => return Rule::Window,
        }
    }
    if replaced { Rule::Pieces { strip, byte_fallback } } else { Rule::Window }
}

fn append_token(rule: Rule, text: &str, char_bytes: &dyn Fn(char) -> Option<u8>, bytes: &mut Vec<u8>) {
    match rule {
        Rule::ByteLevel => match text.chars().map(char_bytes).collect::<Option<Vec<u8>>>() {
            Some(mapped) => bytes.extend(mapped),
            None => bytes.extend_from_slice(text.as_bytes()), // an added token outside the byte alphabet is plain text
        },
        Rule::Pieces { byte_fallback, .. } => match byte_token(text).filter(|_| byte_fallback) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(text.replace('▁', " ").as_bytes()),
        },
        Rule::Metaspace { .. } | Rule::Window => bytes.extend_from_slice(text.as_bytes()),
    }
}

/// `<0xE2>` is the byte E2.
fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up.
fn char_bytes() -> impl Fn(char) -> Option<u8> {
    let plain = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others: Vec<u8> = (0..=255u8).filter(|&b| !plain(b)).collect();
    move |c| match u32::from(c) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(|&b| plain(b)),
        code => others.get(code as usize - 0x100).copied(),
    }
}
