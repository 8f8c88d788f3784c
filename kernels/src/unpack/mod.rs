//! Spreads one packed bundle of a step's lists over the places where kernels read them: `to[i] = bundle[from[i]..][..bytes[i]]`.
//!
//! Only devices need it: on the CPU the lists are read where they were built.

pub(crate) mod check;
pub(crate) mod cuda;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_agrees_on_the_emulator() {
        crate::device::testing::on_every_schedule(check::check);
    }
}
