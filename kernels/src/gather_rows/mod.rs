//! `out[i] = x[rows[i]]`: the rows whose logits are wanted.

pub(crate) mod check;
pub(crate) mod cuda;

use crate::error::{OpError, at_most, same};
use crate::rows::Rows;

/// Copies rows of `x`; `out` gets `rows.len()` rows.
///
/// # Errors
/// [`OpError::Limit`] if a row is not in `x` or `out` has no room, [`OpError::Shape`] if the widths differ.
pub fn gather_rows(out: &mut Rows, x: &Rows, rows: &[u32]) -> Result<(), OpError> {
    same("gather_rows", "width of out", out.width(), x.width())?;
    for &row in rows {
        at_most("gather_rows", "row + 1", row as usize + 1, x.rows())?;
    }
    out.set_rows(rows.len())?;
    let width = out.width();
    for (i, &row) in rows.iter().enumerate() {
        out.as_f32_mut()[i * width..][..width].copy_from_slice(x.row(row as usize));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_agrees_on_the_emulator() {
        crate::device::testing::on_every_schedule(check::check);
    }

    #[test]
    fn rows_are_copied_in_the_order_asked() {
        let mut x = Rows::zeros(3, 2);
        x.as_f32_mut().copy_from_slice(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let mut out = Rows::zeros(4, 2);
        gather_rows(&mut out, &x, &[2, 0, 2]).unwrap();
        assert_eq!(out.as_f32(), [4.0, 5.0, 0.0, 1.0, 4.0, 5.0]);
        assert!(matches!(gather_rows(&mut out, &x, &[3]), Err(OpError::Limit { .. })));
        assert!(matches!(gather_rows(&mut out, &x, &[0; 5]), Err(OpError::Limit { .. })));
    }
}
