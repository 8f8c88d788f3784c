//! `GET /info`.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::http::App;
use crate::http::error::ApiError;

/// LoRAX's members. What LoRAX calls a ratio or a number of waiting tokens is 0: a request that fits joins the next step.
pub(in crate::http) async fn info(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let bounds = app.bounds()?;
    let status = app.engine.status();
    let (shard, limits, config) = (&status.shard, &bounds.limits, &app.config);
    let model_id = if config.model_root.is_empty() { app.base_name() } else { &config.model_root };
    let context = bounds.context_tokens;
    Ok(Json(json!({
        "model_id": model_id,
        "model_sha": null,
        "model_dtype": shard.dtype,
        "model_device_type": app.device_type(),
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": config.limits.requests_max,
        "max_best_of": limits.n_max,
        "max_stop_sequences": limits.native_stops_max,
        "max_input_length": context.saturating_sub(1),
        "max_input_tokens": context.saturating_sub(1),
        "max_total_tokens": context,
        "waiting_served_ratio": 0.0,
        "max_batch_total_tokens": status.blocks_total as u64 * u64::from(shard.block_tokens),
        "max_waiting_tokens": 0,
        "validation_workers": std::thread::available_parallelism().map_or(2, |n| n.get()).max(2),
        "eager_prefill": null,
        "version": env!("CARGO_PKG_VERSION"),
        "sha": null,
        "docker_label": null,
        "request_logger_url": null,
    })))
}

impl App {
    /// `cpu` or `cuda`.
    pub(super) fn device_type(&self) -> &'static str {
        if self.engine.status().shard.device.starts_with("cpu") { "cpu" } else { "cuda" }
    }
}
