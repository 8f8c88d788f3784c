use super::activations::quantise;
use super::format::SUB;
use super::pack::PANEL;
use super::*;
use crate::test_support::{Random, assert_close, bits};
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
fn the_definition_is_the_formula_of_rounded_activations() {
    let mut random = Random::new(2);
    for format in QuantFormat::ALL {
        let (rows, d_in, d_out) = (3, 2 * format.block_len(), 20);
        let (w, x) = (weight(&mut random, format, d_out, d_in), random.values(rows * d_in));
        let bias = random.values(d_out);
        let mut got = vec![0.0; rows * d_out];
        cpu::reference(&mut got, &x, &w, Some(&bias));
        let rounded: Vec<f64> = x
            .as_chunks::<SUB>()
            .0
            .iter()
            .flat_map(|x| {
                let x = quantise(x);
                x.numbers.map(|number| f64::from(number) * f64::from(x.scale))
            })
            .collect();
        let product = |x: &[f64]| -> Vec<f64> {
            let sum = |o: usize| x.iter().enumerate().map(|(k, x)| x * f64::from(w.element(o, k))).sum::<f64>();
            (0..d_out).map(|o| sum(o) + f64::from(bias[o])).collect()
        };
        let want: Vec<f64> = rounded.chunks(d_in).flat_map(product).collect();
        assert_close(&got, &want, 1e-5, &format!("{format:?}, rounded"));
        // And near the plain product: half a step of 1/127 for each factor, which add up as a root of squares.
        let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let want: Vec<f64> = exact.chunks(d_in).flat_map(product).collect();
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let norm = (0..d_in).map(|k| f64::from(w.element(i % d_out, k)).powi(2)).sum::<f64>().sqrt();
            let error = (f64::from(*got) - want).abs();
            assert!(error < 4.0 * norm / 127.0 / 12f64.sqrt(), "{format:?} [{i}]: {got}, plainly {want}");
        }
    }
}

#[test]
fn numbers_are_the_nearest_with_ties_to_even_and_scales_are_of_the_largest() {
    let mut x = [0.0f32; SUB];
    (x[0], x[1], x[2], x[20]) = (-127.0, 2.5, 3.5, 0.49);
    let rounded = quantise(&x);
    assert_eq!((rounded.numbers[0], rounded.numbers[1], rounded.numbers[2], rounded.numbers[20]), (-127, 2, 4, 0));
    assert_eq!((rounded.scale, rounded.sum), (1.0, -121.0));
    assert_eq!((rounded.off, rounded.off_halves), ([121 * 8, 121 * 16, 121 * 128], [121 * 32, 0]));
    let mut random = Random::new(3);
    for _ in 0..1000 {
        let size = (random.value() * 80.0).exp2();
        let x: [f32; SUB] = std::array::from_fn(|_| random.value() * size);
        let rounded = quantise(&x);
        assert_eq!(rounded.numbers.map(i8::unsigned_abs).into_iter().max(), Some(127));
        for (x, number) in x.iter().zip(rounded.numbers) {
            assert!((f32::from(number) * rounded.scale - x).abs() <= 0.5001 * rounded.scale);
        }
    }
    // What 127 cannot be divided by is as good as nothing.
    for tiny in [0.0, f32::MIN_POSITIVE / 4.0, -1e-38] {
        let rounded = quantise(&[tiny; SUB]);
        assert_eq!((rounded.numbers, rounded.scale), ([0; SUB], 0.0));
    }
}

#[test]
fn what_is_not_finite_shows_in_its_row_only() {
    for (format, bad) in [(QuantFormat::Q8_0, f32::NAN), (QuantFormat::Q4_K, f32::INFINITY)] {
        let (d_in, d_out) = (format.block_len(), 5);
        let w = weight(&mut Random::new(4), format, d_out, d_in);
        let mut x = Random::new(5).values(3 * d_in);
        x[d_in + 7] = bad;
        for isa in Isa::available() {
            let mut y = vec![0.0; 3 * d_out];
            cpu::linear(isa, &mut y, &x, &w, None);
            let nan: Vec<bool> = y.iter().map(|y| y.is_nan()).collect();
            assert_eq!(nan, [[false; 5], [true; 5], [false; 5]].as_flattened(), "{isa:?} {format:?}");
        }
    }
}

#[test]
fn a_row_alone_equals_that_row_in_a_batch() {
    let (d_in, d_out) = (512, 70);
    let mut random = Random::new(6);
    for format in [QuantFormat::Q4_K, QuantFormat::Q6_K, QuantFormat::Q8_0] {
        let w = weight(&mut random, format, d_out, d_in);
        let x = random.rows(70, d_in);
        let alone: Vec<Vec<f32>> = (0..70)
            .map(|row| {
                let (mut one, mut y) = (Rows::zeros(1, d_in), Rows::zeros(1, d_out));
                one.as_f32_mut().copy_from_slice(x.row(row));
                quant_linear(&mut y, &one, &w, None).unwrap();
                y.as_f32().to_vec()
            })
            .collect();
        for rows in 1..=70 {
            let (mut some, mut y) = (Rows::zeros(rows, d_in), Rows::zeros(rows, d_out));
            some.as_f32_mut().copy_from_slice(&x.as_f32()[..rows * d_in]);
            quant_linear(&mut y, &some, &w, None).unwrap();
            for (row, alone) in alone.iter().enumerate().take(rows) {
                assert_eq!(bits(y.row(row)), bits(alone), "{format:?} row {row} of {rows}");
            }
        }
    }
}

#[test]
fn parts_of_several_formats_lie_side_by_side() {
    let (d_in, mut random) = (256, Random::new(7));
    let formats = [(QuantFormat::Q4_K, 40), (QuantFormat::Q4_K, 17), (QuantFormat::Q6_K, 5), (QuantFormat::Q8_0, 33)];
    let data: Vec<Vec<u8>> = formats.iter().map(|&(format, d_out)| blocks(&mut random, format, d_out, d_in)).collect();
    let part = |(data, &(format, d_out)): (&'_ Vec<u8>, &(QuantFormat, usize))| (data.clone(), format, d_out);
    let parts: Vec<_> = data.iter().zip(&formats).map(part).collect();
    let of = |(data, format, d_out): &'_ (Vec<u8>, QuantFormat, usize)| {
        QuantWeight::pack(&[QuantPart { data, format: *format, d_out: *d_out, d_in }]).unwrap()
    };
    let apart: Vec<QuantWeight> = parts.iter().map(of).collect();
    let whole: Vec<QuantPart> =
        parts.iter().map(|(data, format, d_out)| QuantPart { data, format: *format, d_out: *d_out, d_in }).collect();
    let whole = QuantWeight::pack(&whole).unwrap();
    assert_eq!((whole.d_out(), whole.d_in()), (95, d_in));
    assert_eq!(whole.bytes(), apart.iter().map(QuantWeight::bytes).sum::<usize>());
    let (x, bias) = (random.rows(9, d_in), random.values(95));
    let mut y = Rows::zeros(9, 95);
    quant_linear(&mut y, &x, &whole, Some(&bias)).unwrap();
    let mut first = 0;
    for w in &apart {
        let mut part = Rows::zeros(9, w.d_out());
        quant_linear(&mut part, &x, w, Some(&bias[first..first + w.d_out()])).unwrap();
        for row in 0..9 {
            assert_eq!(bits(&y.row(row)[first..first + w.d_out()]), bits(part.row(row)), "row {row} from {first}");
        }
        assert_eq!(whole.element(first + w.d_out() - 1, 200), w.element(w.d_out() - 1, 200));
        first += w.d_out();
    }
}

#[test]
fn the_embedding_and_the_product_are_of_one_matrix() {
    let (vocab, hidden) = (71, 64);
    let matrix = Matrix::Quant(weight(&mut Random::new(8), QuantFormat::Q5_1, vocab, hidden));
    let mut out = Rows::zeros(2, hidden);
    matrix.embedding(&mut out, &[70, 3]).unwrap();
    // A row of the unit matrix picks an element; 1 is a number times a scale without error.
    let (mut x, mut y) = (Rows::zeros(1, hidden), Rows::zeros(1, vocab));
    for k in 0..hidden {
        x.as_f32_mut().fill(0.0);
        x.as_f32_mut()[k] = 127.0;
        matrix.linear(&mut y, &x, None).unwrap();
        for (t, token) in [70, 3].into_iter().enumerate() {
            let (got, want) = (y.as_f32()[token] / 127.0, out.row(t)[k]);
            assert!((got - want).abs() <= 1e-6 * want.abs().max(0.1), "token {token}, k {k}: {got}, {want}");
        }
    }
    assert!(matches!(matrix.embedding(&mut out, &[71]), Err(OpError::Limit { .. })));
}

#[test]
fn shapes_that_disagree_are_refused() {
    let data = vec![0; 144 * 2];
    let part = |format, d_out, d_in| QuantPart { data: &data, format, d_out, d_in };
    let refused = |parts: &[QuantPart]| matches!(QuantWeight::pack(parts), Err(OpError::Shape { .. }));
    assert!(!refused(&[part(QuantFormat::Q4_K, 2, 256)]));
    assert!(refused(&[]) && refused(&[part(QuantFormat::Q4_K, 2, 0)]) && refused(&[part(QuantFormat::Q4_K, 0, 256)]));
    assert!(refused(&[part(QuantFormat::Q4_K, 1, 256)]), "bytes too many");
    assert!(refused(&[part(QuantFormat::Q4_K, 2, 255)]), "no whole blocks");
    assert!(refused(&[part(QuantFormat::Q4_K, usize::MAX, 256)]), "overflow");
    assert!(refused(&[part(QuantFormat::Q4_K, 2, 256), part(QuantFormat::Q4_K, 1, 512)]), "another d_in");
    let w = QuantWeight::pack(&[part(QuantFormat::Q4_K, 2, 256)]).unwrap();
    let (x, mut y) = (Rows::zeros(2, 256), Rows::zeros(2, 2));
    let refused = |outcome: Result<(), OpError>| matches!(outcome, Err(OpError::Shape { .. } | OpError::Limit { .. }));
    assert!(refused(quant_linear(&mut y, &Rows::zeros(2, 32), &w, None)));
    assert!(refused(quant_linear(&mut Rows::zeros(2, 3), &x, &w, None)));
    assert!(refused(quant_linear(&mut Rows::zeros(1, 2), &x, &w, None)));
    assert!(refused(quant_linear(&mut y, &x, &w, Some(&[0.0]))));
    let mut none = Rows::zeros(2, 256);
    none.set_rows(0).unwrap();
    quant_linear(&mut y, &none, &w, None).unwrap();
    assert_eq!(y.rows(), 0);
}

#[test]
fn padding_of_the_last_panel_stays_inside() {
    let w = weight(&mut Random::new(2), QuantFormat::Q8_0, PANEL + 1, 32);
    assert_eq!(w.bytes(), 2 * (8 * 64 + 32));
}
