use super::*;
use crate::quant::pack::PANEL;
use crate::test_support::{Random, bits};
use half::f16;

/// Blocks of random bits with sensible factors.
fn blocks(random: &mut Random, format: QuantFormat, d_out: usize, d_in: usize) -> Vec<u8> {
    let mut data = Vec::new();
    for _ in 0..d_out * (d_in / format.block_len()) {
        let mut block: Vec<u8> = (0..format.block_bytes()).map(|_| random.next() as u8).collect();
        let factors: &[usize] = match format {
            QuantFormat::Q4_0 | QuantFormat::Q5_0 | QuantFormat::Q8_0 => &[0],
            QuantFormat::Q6_K => &[208],
            _ => &[0, 2],
        };
        for at in factors {
            block[*at..at + 2].copy_from_slice(&f16::from_f32(random.value() * 0.1).to_le_bytes());
        }
        data.extend(block);
    }
    data
}

fn weight(random: &mut Random, format: QuantFormat, d_out: usize, d_in: usize) -> QuantWeight {
    let data = blocks(random, format, d_out, d_in);
    QuantWeight::pack(&[QuantPart { data: &data, format, d_out, d_in }]).unwrap()
}

/// Outputs below, at and above a panel; one block, an odd number of them, many.
const SHAPES: [(usize, usize); 5] = [(1, 1), (15, 3), (16, 2), (33, 5), (70, 9)];

#[test]
fn every_instruction_set_and_batch_size_equals_the_definition() {
    let mut random = Random::new(1);
    for format in QuantFormat::ALL {
        for (d_out, blocks) in SHAPES {
            let d_in = blocks * format.block_len();
            let w = weight(&mut random, format, d_out, d_in);
            let bias = random.values(d_out);
            for rows in [1, 2, 3, 4, 7, 8, 13, 16, 21, 35] {
                let x = random.values(rows * d_in);
                for bias in [None, Some(bias.as_slice())] {
                    let mut want = vec![0.0; rows * d_out];
                    cpu::reference(&mut want, &x, &w, bias);
                    for isa in Isa::available() {
                        let mut got = vec![f32::NAN; rows * d_out];
                        cpu::linear(isa, &mut got, &x, &w, bias);
                        assert_eq!(bits(&got), bits(&want), "{isa:?} {format:?} {rows}x{d_in}x{d_out}");
                    }
                }
            }
        }
    }
}

#[test]
fn padding_of_the_last_panel_stays_inside() {
    let w = weight(&mut Random::new(2), QuantFormat::Q8_0, PANEL + 1, 32);
    assert_eq!(w.bytes(), 2 * (8 * 64 + 32));
}
