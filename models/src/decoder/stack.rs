//! The one decoder stack, as the order of its ops. What an op does on a device is that device's [`DecoderOps`].

/// A projection that LoRA can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// Queries, keys and values of the normed residual.
    Qkv,
    /// What attention found, back to the residual's width.
    Output,
    /// Gate and up of the normed residual.
    GateUp,
    /// The activated MLP, back to the residual's width.
    Down,
}

impl Site {
    /// In the order of the forward pass.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::Output, Self::GateUp, Self::Down];
}

/// Which norm's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormAt {
    /// Before the attention of a layer.
    Attention(usize),
    /// Before the MLP of a layer.
    Mlp(usize),
    /// Before the head.
    Final,
}

/// The ops of one step on one device. Each reads what the ops before it wrote; where that lies is the device's matter.
pub trait DecoderOps {
    /// What can go wrong.
    type Error;

    /// residual = the tokens' embeddings.
    ///
    /// # Errors
    /// The device's.
    fn embed(&mut self) -> Result<(), Self::Error>;

    /// normed = RMSNorm(residual).
    ///
    /// # Errors
    /// The device's.
    fn norm(&mut self, at: NormAt) -> Result<(), Self::Error>;

    /// residual += projected; normed = RMSNorm(residual).
    ///
    /// # Errors
    /// The device's.
    fn add_norm(&mut self, at: NormAt) -> Result<(), Self::Error>;

    /// The base product of a site, its bias, and each row's LoRA deltas.
    ///
    /// # Errors
    /// The device's.
    fn project(&mut self, layer: usize, site: Site) -> Result<(), Self::Error>;

    /// Rotates q and k; k and v go into the cache.
    ///
    /// # Errors
    /// The device's.
    fn rope_store(&mut self, layer: usize) -> Result<(), Self::Error>;

    /// attended = attention of q over the cache.
    ///
    /// # Errors
    /// The device's.
    fn attention(&mut self, layer: usize) -> Result<(), Self::Error>;

    /// activated = silu(gate) * up.
    ///
    /// # Errors
    /// The device's.
    fn activate(&mut self) -> Result<(), Self::Error>;
}

/// One forward pass; leaves the final normed hidden states in `normed`.
///
/// # Errors
/// The first error of an op.
pub fn run_layers<O: DecoderOps>(ops: &mut O, layers: usize) -> Result<(), O::Error> {
    ops.embed()?;
    ops.norm(if layers == 0 { NormAt::Final } else { NormAt::Attention(0) })?;
    for layer in 0..layers {
        ops.project(layer, Site::Qkv)?;
        ops.rope_store(layer)?;
        ops.attention(layer)?;
        ops.project(layer, Site::Output)?;
        ops.add_norm(NormAt::Mlp(layer))?;
        ops.project(layer, Site::GateUp)?;
        ops.activate()?;
        ops.project(layer, Site::Down)?;
        ops.add_norm(if layer + 1 < layers { NormAt::Attention(layer + 1) } else { NormAt::Final })?;
    }
    Ok(())
}
