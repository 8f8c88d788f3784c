//! What an adapter changes at the embedding. Its input is a token, so both products with it are reads:
//!
//! - [`lora_embed_shrink`]: `v[t, r] = a[r, tokens[t]]`, the first half of a LoRA pair; `lora_expand` at the embedding's site
//!   is the second.
//! - [`lora_embed_rows`]: `y[t] += c * rows[tokens[t]]`, what is added to the embedding's own weight, `c` the request's factor.
//!
//! A lies as `[tokens][16]` in tiles, so that a token's ranks are one read; `y: [rows, hidden]` f32; `tokens[t]` is row t's.

mod cpu;
#[cfg(test)]
mod tests;

use crate::arena::Arena;
use crate::error::{OpError, at_most, same};
use crate::lora::{AdapterTable, LoraScratch, LoraSite, WorkList};
use crate::lora_shrink::check_work;
use crate::rows::Rows;
use crate::simd::Isa;

/// Fills `v` for the embedding's site, whose inputs are the vocabulary.
///
/// # Errors
/// [`OpError::Shape`] if an adapter disagrees with the site, [`OpError::Limit`] if an item's rows or a token are not there,
/// [`OpError::Stale`] if a slot has changed since the list was built.
pub fn lora_embed_shrink(
    v: &mut LoraScratch,
    arena: &Arena,
    table: &AdapterTable,
    site: &LoraSite,
    tokens: &[u32],
    work: &WorkList,
) -> Result<(), OpError> {
    let op = "lora_embed_shrink";
    same(op, "matrices of the site", site.slices.len(), 1)?;
    check_work(op, tokens.len(), table, 0, site, work)?;
    check_tokens(op, tokens, site.d_in)?;
    cpu::shrink(v.prepare(work.planes, 1), arena, table, tokens, work);
    Ok(())
}

/// Adds each row's own row of what its adapters add to the embedding.
///
/// # Errors
/// [`OpError::Shape`] if an adapter's width is not that of `y`, [`OpError::Limit`] if an item's rows or a token are not
/// there, [`OpError::Stale`] if a slot has changed since the list was built.
pub fn lora_embed_rows(
    y: &mut Rows,
    arena: &Arena,
    table: &AdapterTable,
    tokens: &[u32],
    work: &WorkList,
) -> Result<(), OpError> {
    let op = "lora_embed_rows";
    same(op, "rows of y", y.rows(), tokens.len())?;
    for item in &work.items {
        at_most(op, "last row of an item", item.first_row as usize + item.rows as usize, tokens.len())?;
        let (vocab, width) = table.embed_extents(item)?;
        if vocab > 0 {
            same(op, "width of an adapter", width, y.width())?;
            check_tokens(op, &tokens[item.first_row as usize..][..item.rows as usize], vocab)?;
        }
    }
    Isa::best().run(cpu::AddRows { y, arena, table, tokens, work });
    Ok(())
}

fn check_tokens(op: &'static str, tokens: &[u32], vocab: usize) -> Result<(), OpError> {
    tokens.iter().try_for_each(|&token| at_most(op, "token id + 1", token as usize + 1, vocab))
}
