use super::*;
use crate::dtype::{Dtype, HostData};
use crate::simd::LANES;
use crate::test_support::{Random, assert_close, bits};

fn packed(dtype: Dtype, values: &[f32], d_out: usize, d_in: usize) -> PackedWeight {
    PackedWeight::pack(dtype, &[WeightPart { data: HostData::F32(values), d_out, d_in }]).unwrap()
}

/// Shapes that break things: below, at and above a vector, a panel, a pair of panels and a block of k.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (15, 3), (16, 64), (33, 17), (64, 31), (97, 40), (160, 65), (300, 129), (70, 4100)];

const ROWS: [usize; 13] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 33];

/// What this machine has, and AMX, which runs in plain code where it is missing.
fn all() -> Vec<Isa> {
    let mut all = Isa::available();
    if !all.contains(&Isa::Amx) {
        all.push(Isa::Amx);
    }
    all
}

fn rows_of(values: &[f32], width: usize) -> Rows {
    let mut rows = Rows::zeros(values.len() / width, width);
    rows.as_f32_mut().copy_from_slice(values);
    rows
}

/// Writes rows as an op does.
struct Write<'a>(crate::rows::RowsOut, &'a [f32]);

impl crate::simd::Kernel for Write<'_> {
    #[inline(always)]
    fn run<S: crate::simd::Simd>(self, s: S) {
        for (row, values) in self.1.chunks(self.0.width()).enumerate() {
            for (i, values) in values.chunks(LANES).enumerate() {
                // SAFETY: as many values as there are; nobody else has the rows.
                unsafe { self.0.store(s, row, i * LANES, s.load_part(values.as_ptr(), values.len()), values.len()) };
            }
        }
    }
}

#[test]
fn inputs_that_hold_pairs_give_the_same_bits_and_are_for_weights_that_take_them() {
    for (rows, d_out, d_in) in [(1, 40, 33), (3, 17, 64), (40, 64, 100)] {
        let mut random = Random::new(7);
        let (values, x) = (random.values(d_out * d_in), random.values(rows * d_in));
        let (mut want, mut got) = (Rows::zeros(rows, d_out), Rows::zeros(rows, d_out));
        let w = packed(Dtype::Bf16, &values, d_out, d_in);
        linear(&mut want, &rows_of(&x, d_in), &w, None).unwrap();
        let mut pairs = Rows::zeros(rows, d_in);
        pairs.hold_pairs(true);
        Isa::best().run(Write(pairs.out(), &x));
        if w.takes_pairs() {
            linear(&mut got, &pairs, &w, None).unwrap();
            assert_eq!(bits(got.as_f32()), bits(want.as_f32()));
        }
        let single = packed(Dtype::F32, &values, d_out, d_in);
        assert!(matches!(linear(&mut got, &pairs, &single, None), Err(OpError::Shape { .. })));
    }
}

#[test]
fn every_instruction_set_and_batch_size_equals_the_definition() {
    for (seed, (d_out, d_in)) in SHAPES.into_iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (values, bias) = (random.values(d_out * d_in), random.values(d_out));
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let w = packed(dtype, &values, d_out, d_in);
            for rows in ROWS {
                let x = random.values(rows * d_in);
                for bias in [None, Some(bias.as_slice())] {
                    let mut want = vec![0.0; rows * d_out];
                    cpu::reference(&mut want, &x, &w, bias);
                    for isa in Isa::available().into_iter().filter(|isa| dtype == Dtype::F32 || !isa.takes_pairs()) {
                        let mut got = vec![f32::NAN; rows * d_out];
                        cpu::linear(isa, &mut got, &rows_of(&x, d_in), &w, bias);
                        let bias = bias.is_some();
                        assert_eq!(bits(&got), bits(&want), "{isa:?} {dtype:?} {rows}x{d_in}x{d_out} bias {bias}");
                    }
                }
            }
        }
    }
}

#[test]
fn products_of_pairs_equal_the_definition_for_rounded_inputs() {
    for (seed, (d_out, d_in)) in SHAPES.into_iter().enumerate() {
        let mut random = Random::new(100 + seed as u64);
        let (values, bias) = (random.values(d_out * d_in), random.values(d_out));
        let w = packed(Dtype::Bf16, &values, d_out, d_in);
        let x = random.values(ROWS[ROWS.len() - 1] * d_in);
        let rounded: Vec<f32> = x.iter().map(|x| Dtype::Bf16.round(*x)).collect();
        for bias in [None, Some(bias.as_slice())] {
            let mut want = vec![0.0; x.len() / d_in * d_out];
            cpu::reference(&mut want, &rounded, &w, bias);
            let want: Vec<f64> = want.into_iter().map(f64::from).collect();
            for isa in all().into_iter().filter(|isa| isa.takes_pairs()) {
                let mut first: Vec<f32> = Vec::new();
                for rows in ROWS {
                    let mut got = vec![f32::NAN; rows * d_out];
                    cpu::linear(isa, &mut got, &rows_of(&x[..rows * d_in], d_in), &w, bias);
                    // Orders of sums differ between instruction sets, within one they are the same for any number of rows.
                    assert_close(&got, &want[..rows * d_out], 2e-6 * (d_in as f64).sqrt(), "pairs");
                    let known = first.len().min(got.len());
                    assert_eq!(bits(&got[..known]), bits(&first[..known]), "{isa:?} {rows}x{d_in}x{d_out}");
                    if got.len() > first.len() {
                        first = got;
                    }
                }
            }
        }
    }
}

#[test]
fn the_definition_is_the_formula() {
    let (rows, d_in, d_out) = (3, 200, 50);
    let mut random = Random::new(1);
    let (values, x, bias) = (random.values(d_out * d_in), random.values(rows * d_in), random.values(d_out));
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let w = packed(dtype, &values, d_out, d_in);
        let mut got = vec![0.0; rows * d_out];
        cpu::reference(&mut got, &x, &w, Some(&bias));
        let mut want = Vec::new();
        for x in x.chunks(d_in) {
            for (o, w) in values.chunks(d_in).enumerate() {
                let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(dtype.round(w)));
                want.push(terms.sum::<f64>() + f64::from(bias[o]));
            }
        }
        assert_close(&got, &want, 1e-5, "linear");
    }
}

#[test]
fn a_row_alone_equals_that_row_in_a_batch() {
    let (rows, d_in, d_out) = (37, 96, 131);
    let mut random = Random::new(2);
    let w = packed(Dtype::Bf16, &random.values(d_out * d_in), d_out, d_in);
    let x = random.rows(rows, d_in);
    let mut together = Rows::zeros(rows, d_out);
    linear(&mut together, &x, &w, None).unwrap();
    for row in 0..rows {
        let (mut one, mut alone) = (Rows::zeros(1, d_in), Rows::zeros(1, d_out));
        one.as_f32_mut().copy_from_slice(x.row(row));
        linear(&mut alone, &one, &w, None).unwrap();
        assert_eq!(bits(alone.as_f32()), bits(together.row(row)), "row {row}");
    }
}

#[test]
fn parts_of_every_type_are_packed_side_by_side() {
    let d_in = 21;
    let values = Random::new(3).values(100 * d_in);
    let bf16s: Vec<half::bf16> = values[..40 * d_in].iter().map(|v| half::bf16::from_f32(*v)).collect();
    let f16s: Vec<half::f16> = values[40 * d_in..75 * d_in].iter().map(|v| half::f16::from_f32(*v)).collect();
    let parts = [
        WeightPart { data: HostData::Bf16(&bf16s), d_out: 40, d_in },
        WeightPart { data: HostData::F16(&f16s), d_out: 35, d_in },
        WeightPart { data: HostData::F32(&values[75 * d_in..]), d_out: 25, d_in },
    ];
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let w = PackedWeight::pack(dtype, &parts).unwrap();
        assert_eq!(
            (w.d_out(), w.d_in(), w.bytes()),
            (100, d_in, 112 * if dtype == Dtype::F32 { d_in * 4 } else { d_in.next_multiple_of(32) * 2 })
        );
        for (o, k) in (0..100).flat_map(|o| (0..d_in).map(move |k| (o, k))) {
            let stored = match o {
                0..40 => bf16s[o * d_in + k].to_f32(),
                40..75 => f16s[(o - 40) * d_in + k].to_f32(),
                _ => values[o * d_in + k],
            };
            assert_eq!(w.element(o, k), dtype.round(stored), "{dtype:?} [{o}, {k}]");
        }
    }
}

#[test]
fn shapes_that_disagree_are_refused() {
    let values = [0.0; 12];
    let part = |d_out, d_in| WeightPart { data: HostData::F32(&values), d_out, d_in };
    assert!(matches!(PackedWeight::pack(Dtype::F32, &[part(3, 5)]), Err(OpError::Shape { .. })));
    assert!(matches!(PackedWeight::pack(Dtype::F32, &[part(3, 4), part(4, 3)]), Err(OpError::Shape { .. })));
    assert!(matches!(PackedWeight::pack(Dtype::F32, &[]), Err(OpError::Shape { .. })));
    assert!(matches!(PackedWeight::pack(Dtype::F32, &[part(usize::MAX, 12)]), Err(OpError::Shape { .. })));
    let w = packed(Dtype::F32, &values, 3, 4);
    let x = Rows::zeros(2, 4);
    assert!(matches!(linear(&mut Rows::zeros(2, 4), &x, &w, None), Err(OpError::Shape { .. })));
    assert!(matches!(linear(&mut Rows::zeros(2, 3), &Rows::zeros(2, 3), &w, None), Err(OpError::Shape { .. })));
    assert!(matches!(linear(&mut Rows::zeros(2, 3), &x, &w, Some(&[0.0])), Err(OpError::Shape { .. })));
    assert!(matches!(linear(&mut Rows::zeros(1, 3), &x, &w, None), Err(OpError::Limit { .. })));
}

#[test]
fn no_rows_is_no_work() {
    let w = packed(Dtype::F32, &[1.0; 12], 3, 4);
    let (mut x, mut y) = (Rows::zeros(2, 4), Rows::zeros(2, 3));
    x.set_rows(0).unwrap();
    linear(&mut y, &x, &w, None).unwrap();
    assert_eq!(y.rows(), 0);
}
