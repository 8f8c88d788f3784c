//! What the HTTP side and the engine thread say to each other. Plain data.

use std::sync::Arc;

use loramux_proto::Sampling;
use serde::Serialize;

/// SHA-256 of an adapter's canonical config and files. The key of every cache; a name is never one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentId(pub [u8; 32]);

impl ContentId {
    /// The first 16 hex digits, as shown to people.
    pub fn short(&self) -> String {
        self.0.iter().take(8).map(|b| format!("{b:02x}")).collect()
    }
}

impl std::fmt::Debug for ContentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ContentId({})", self.short())
    }
}

/// One adapter that a request runs under. `scale` multiplies the adapter's own alpha / r.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdapterUse {
    /// Which content.
    pub content: ContentId,
    /// -8..=8.
    pub scale: f32,
}

/// One prompt and what is wanted for it. Everything was range-checked by the HTTP side.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// At least one token, all below the vocabulary size, `prompt + max_tokens <= context`.
    pub prompt: Arc<[u32]>,
    /// How many sequences share the prompt; sequence i draws with `sampling.seed + i`.
    pub n: u32,
    /// Tokens to generate at most; 0 ends after the prompt (scoring).
    pub max_tokens: u32,
    /// Goes to the shard as it is. `sampling.end_tokens` ends a sequence (reason `Stop`) unless `min_tokens` forbids.
    pub sampling: Sampling,
    /// What may be generated; `None` = anything.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// An embedding of the prompt is wanted, made this way; `max_tokens` is 0 and `n` is 1.
    pub pooling: Option<Pooling>,
    /// In the order of the request; empty = the base model.
    pub adapters: Vec<AdapterUse>,
    /// Whose request this is: fairness and prefix sharing stop at this border.
    pub tenant: u64,
    /// Narrows prefix sharing further.
    pub cache_salt: Option<String>,
    /// Smaller first, within the tenant's own queue only.
    pub priority: i32,
    /// Time left, ms; past it the request fails with [`Failure::DeadlineExceeded`].
    pub deadline_ms: Option<u64>,
}

/// What of a prompt's final hidden states, after the last norm, makes its embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over all positions.
    Mean,
    /// The last position's.
    Last,
}

/// A compiled rule for what may be generated. Each sequence of a request gets a state of its own.
pub trait Grammar: std::fmt::Debug + Send + Sync {
    /// The state in front of the first token.
    fn start(&self) -> Box<dyn GrammarState>;
}

/// Where one sequence stands in its grammar. Called on worker threads, one call at a time.
pub trait GrammarState: Send {
    /// Moves over a token that was generated. It was in the last [`Self::next`].
    ///
    /// # Errors
    /// The token cannot come here, or a limit of time or memory was reached.
    fn accept(&mut self, token: u32) -> Result<(), GrammarFailure>;

    /// What may come now.
    ///
    /// # Errors
    /// As [`Self::accept`].
    fn next(&mut self) -> Result<Allowed, GrammarFailure>;
}

/// What may come next in a sequence with a grammar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Token t may come if bit t % 32 of word t / 32 is set; tokens beyond the last word may not. Where the text may end,
    /// the model's end tokens are among them.
    Tokens(Arc<[u32]>),
    /// The text is complete and nothing can follow: the sequence ends (reason `Stop`) without another token.
    End,
}

/// A grammar that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarFailure(pub String);

/// What happens to one request, in order. `index` is the sequence, `0..n`.
#[derive(Clone, Debug)]
pub enum GenerateEvent {
    /// The request holds device memory and its adapters are resident: response headers may go out.
    Admitted {
        /// Prompt tokens whose KV came from the prefix cache.
        cached_tokens: u32,
    },
    /// Logprobs of prompt tokens, `positions[i].position` ascending; may come in several pieces, before any token.
    PromptLogprobs {
        /// As the shard reported them.
        positions: Vec<loramux_proto::PositionLogprobs>,
    },
    /// One generated token (an end token is reported too, just before `Finished`).
    Token {
        /// Which sequence.
        index: u32,
        /// Its id.
        token: u32,
        /// Raw model logprob, if asked for.
        logprob: f32,
        /// Best alternatives, best first, if asked for.
        top: Vec<loramux_proto::TokenLogprob>,
    },
    /// The prompt's embedding, not normalised; comes before `Finished`.
    Embedding {
        /// One for each hidden dimension.
        values: Vec<f32>,
    },
    /// The last event of sequence `index`.
    Finished {
        /// Which sequence.
        index: u32,
        /// Why.
        reason: FinishReason,
    },
    /// The last event of the whole request.
    Failed(Failure),
}

/// Why a sequence ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token (it is the last `Token` event).
    Stop,
    /// `max_tokens` reached.
    Length,
}

/// Why a request failed. The HTTP side turns each into one row of the error table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// 429 `queue_full`.
    #[error("the queue is full: {waiting} requests are waiting; this server allows {limit} (--max-queued-requests)")]
    QueueFull {
        /// Requests that wait now.
        waiting: usize,
        /// The limit.
        limit: usize,
    },
    /// 504 `deadline_exceeded`.
    #[error("the request's deadline passed before it finished")]
    DeadlineExceeded,
    /// 500 `shard_fault`: the request was replayed and the shard died each time.
    #[error("the model process died each time this request ran; it was given up to protect the others")]
    ShardFault,
    /// 500 `adapter_numerics`.
    #[error("the model produced non-finite logits for this request ({0}); its adapter's weights are the likely cause")]
    Numerics(String),
    /// 400 `invalid_schema`: the request's grammar could not go on (a limit of its time or memory).
    #[error("what may follow under this request's grammar could not be computed: {0}")]
    Grammar(String),
    /// 503 `adapter_load_failed`: the content went away (its files changed while the shard restarted).
    #[error("adapter content {0} is no longer available: {1}")]
    AdapterGone(String, String),
    /// 400 `context_length_exceeded`: cannot ever fit the memory of this server.
    #[error("the request needs {needed} KV blocks; this server has {total}")]
    TooLarge {
        /// Blocks for prompt + max_tokens (and pages of its adapters).
        needed: usize,
        /// Blocks of the arena.
        total: usize,
    },
    /// 503 `draining` / `not_ready`.
    #[error("the server is shutting down")]
    Draining,
}
