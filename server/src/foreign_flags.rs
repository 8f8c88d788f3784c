//! Flags and variables of LoRAX, TGI, vLLM and SGLang that have no flag of ours, so that their command lines start here.
//! Those that only have another name are aliases in `args.rs`.

/// What such a flag comes to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Meaning {
    /// Handled where flags are read.
    Switch,
    /// Taken with a notice that says why nothing changes.
    NoEffect(&'static str),
    /// The same for these values; any other is an error that says why.
    Only(&'static [&'static str], &'static str),
    /// An error that says why.
    Refused(&'static str),
}

/// A flag of another server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flag {
    pub(crate) name: &'static str,
    pub(crate) takes_value: bool,
    pub(crate) meaning: Meaning,
}

const fn switch(name: &'static str, meaning: Meaning) -> Flag {
    Flag { name, takes_value: false, meaning }
}

const fn valued(name: &'static str, meaning: Meaning) -> Flag {
    Flag { name, takes_value: true, meaning }
}

const ONE_DEVICE: Meaning = Meaning::Only(&["1", ""], "one server runs on one device; start one for each");
const NO_SHARDS: Meaning = Meaning::NoEffect("one process computes, and the router finds it by itself");
const NO_KERNEL_CHOICE: Meaning = Meaning::NoEffect("kernels are chosen by the device");
const CONTINUOUS: Meaning = Meaning::NoEffect("a request joins the next step as soon as there is room");
const NO_LORA_SETUP: Meaning = Meaning::NoEffect("every adapter is served as it is; nothing is reserved for them");
const MEMORY: Meaning = Meaning::NoEffect("memory is measured at the start; --arena-bytes sets it");
const LOGS: Meaning = Meaning::NoEffect("--log-level says what is logged");
const NGROK: Meaning = Meaning::Refused("this server opens no tunnels");

/// All of them.
#[rustfmt::skip]
pub(crate) const FLAGS: &[Flag] = &[
    switch("enable-prefix-caching", Meaning::Switch),
    switch("no-enable-prefix-caching", Meaning::Switch),
    valued("sharded", Meaning::Only(&["false", ""], "one server runs on one device; start one for each")),
    valued("num-shard", ONE_DEVICE),
    valued("tensor-parallel-size", ONE_DEVICE),
    valued("pipeline-parallel-size", ONE_DEVICE),
    valued("data-parallel-size", ONE_DEVICE),
    valued("tp-size", ONE_DEVICE),
    valued("shard-uds-path", NO_SHARDS),
    valued("master-addr", NO_SHARDS),
    valued("master-port", NO_SHARDS),
    switch("disable-custom-kernels", NO_KERNEL_CHOICE),
    switch("disable-sgmv", NO_KERNEL_CHOICE),
    switch("compile", NO_KERNEL_CHOICE),
    switch("eager", NO_KERNEL_CHOICE),
    switch("enforce-eager", NO_KERNEL_CHOICE),
    valued("waiting-served-ratio", CONTINUOUS),
    valued("max-waiting-tokens", CONTINUOUS),
    switch("enable-chunked-prefill", CONTINUOUS),
    valued("validation-workers", Meaning::NoEffect("text is processed on as many threads as there are cores")),
    valued("adapter-cycle-time-s", NO_LORA_SETUP),
    valued("adapter-memory-fraction", NO_LORA_SETUP),
    switch("enable-lora", NO_LORA_SETUP),
    valued("lora-dtype", NO_LORA_SETUP),
    switch("fully-sharded-loras", NO_LORA_SETUP),
    valued("max-cpu-loras", Meaning::NoEffect("--host-adapter-memory bounds adapters in host memory by their bytes")),
    valued("lora-extra-vocab-size", NO_LORA_SETUP),
    switch("trust-remote-code", Meaning::NoEffect("no code of a model is ever run")),
    switch("enable-auto-tool-choice", Meaning::NoEffect("tools are always on")),
    valued("memory-fraction", MEMORY),
    valued("cuda-memory-fraction", MEMORY),
    valued("gpu-memory-utilization", MEMORY),
    valued("mem-fraction-static", MEMORY),
    valued("max-batch-total-tokens", MEMORY),
    valued("max-input-length", Meaning::NoEffect("prompt and completion share the context; --max-model-len bounds both")),
    valued("max-input-tokens", Meaning::NoEffect("prompt and completion share the context; --max-model-len bounds both")),
    switch("disable-log-requests", LOGS),
    switch("disable-log-stats", LOGS),
    valued("uvicorn-log-level", LOGS),
    valued("quantize", Meaning::Only(&["none"], "weights are computed with as they are stored; give a quantised GGUF file")),
    valued("quantization", Meaning::Only(&["none", "auto", "gguf"], "weights are computed with as they are stored; give a quantised GGUF file")),
    valued("speculative-tokens", Meaning::Only(&["0"], "this version does not speculate")),
    switch("ngrok", NGROK),
    valued("ngrok-authtoken", NGROK),
    valued("ngrok-edge", NGROK),
    valued("ngrok-domain", NGROK),
    valued("ngrok-username", NGROK),
    valued("ngrok-password", NGROK),
];

/// Variables of other servers, and the ids of our flags that they set. Of two that mean the same the later one wins.
/// `HOSTNAME` is not among them: every container has it.
#[rustfmt::skip]
pub(crate) const VARIABLES: &[(&str, &str)] = &[
    ("HF_MODEL_ID", "model_id"),
    ("MODEL_ID", "model_id"),
    ("REVISION", "revision"),
    ("PORT", "port"),
    ("ADAPTER_ID", "adapter_id"),
    ("ADAPTER_SOURCE", "adapter_source"),
    ("DEFAULT_ADAPTER_SOURCE", "adapter_source"),
    ("MAX_TOTAL_TOKENS", "max_model_len"),
    ("MAX_BATCH_SIZE", "max_num_seqs"),
    ("MAX_BATCH_PREFILL_TOKENS", "max_num_batched_tokens"),
    ("MAX_CONCURRENT_REQUESTS", "max_queued_requests"),
    ("MAX_BEST_OF", "max_n"),
    ("MAX_STOP_SEQUENCES", "max_stop_sequences"),
    ("JSON_OUTPUT", "json_output"),
    ("LOG_LEVEL", "log_level"),
    ("OTLP_ENDPOINT", "otlp_endpoint"),
    ("CORS_ALLOW_ORIGIN", "cors_allow_origin"),
];
