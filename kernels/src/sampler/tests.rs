use super::*;
use crate::test_support::Random;

fn draw(logits: &[f32], params: &SampleParams, history: &History, position: u64) -> Result<u32, NonFinite> {
    sample(&mut logits.to_vec(), params, history, position, &mut SampleScratch::default())
}

#[test]
fn the_kernel_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(check::check);
}

fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / f64::from(temperature)).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// Draws at `n` positions and compares the counts with `expected` by chi-square; tokens of probability 0 must not come.
#[track_caller]
fn check_distribution(logits: &[f32], params: &SampleParams, expected: &[f64], what: &str) {
    let n = 40_000;
    let mut counts = vec![0u32; logits.len()];
    let mut scratch = SampleScratch::default();
    for position in 0..n {
        let token = sample(&mut logits.to_vec(), params, &History::default(), position, &mut scratch).unwrap();
        counts[token as usize] += 1;
    }
    let (mut chi2, mut freedom, mut rare, mut rare_count) = (0.0, -1.0, 0.0, 0.0);
    for (token, (&count, &p)) in counts.iter().zip(expected).enumerate() {
        assert!(p > 0.0 || count == 0, "{what}: token {token} was filtered and came {count} times");
        let want = p * n as f64;
        if want >= 10.0 {
            chi2 += (f64::from(count) - want).powi(2) / want;
            freedom += 1.0;
        } else {
            (rare, rare_count) = (rare + want, rare_count + f64::from(count));
        }
    }
    if rare >= 10.0 {
        chi2 += (rare_count - rare).powi(2) / rare;
        freedom += 1.0;
    }
    // Five standard deviations of chi-square: fixed seeds, so this holds for ever or never.
    assert!(chi2 < freedom + 5.0 * (2.0f64 * freedom).sqrt() + 5.0, "{what}: chi-square {chi2} at {freedom} degrees");
}

/// The distribution after the filters, by sorting everything.
fn filtered(logits: &[f32], params: &SampleParams) -> Vec<f64> {
    let mut p = softmax(logits, params.temperature);
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let keep = |p: &mut Vec<f64>, kept: &[usize]| {
        let sum: f64 = kept.iter().map(|&i| p[i]).sum();
        *p = (0..p.len()).map(|i| if kept.contains(&i) { p[i] / sum } else { 0.0 }).collect();
    };
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
        keep(&mut p, &order);
    }
    if params.top_p < 1.0 {
        let mut sum = 0.0;
        let last = order.iter().position(|&i| {
            sum += p[i];
            sum >= f64::from(params.top_p)
        });
        order.truncate(last.map_or(order.len(), |last| last + 1));
        keep(&mut p, &order);
    }
    if params.min_p > 0.0 {
        let max = p[order[0]];
        order.retain(|&i| p[i] >= f64::from(params.min_p) * max);
        keep(&mut p, &order);
    }
    p
}

#[test]
fn draws_follow_the_distribution_after_temperature_and_filters() {
    let logits: Vec<f32> = Random::new(1).values(67).iter().map(|v| v * 4.0).collect();
    let base = SampleParams { seed: 11, ..SampleParams::default() };
    let cases = [
        ("plain", base),
        ("hot", SampleParams { temperature: 2.5, ..base }),
        ("cold", SampleParams { temperature: 0.3, ..base }),
        ("top-k", SampleParams { top_k: 5, ..base }),
        ("top-k of all", SampleParams { top_k: 500, ..base }),
        ("top-p", SampleParams { top_p: 0.8, temperature: 1.5, ..base }),
        ("min-p", SampleParams { min_p: 0.2, ..base }),
        ("all filters", SampleParams { top_k: 30, top_p: 0.9, min_p: 0.05, temperature: 1.3, ..base }),
    ];
    for (what, params) in cases {
        check_distribution(&logits, &params, &filtered(&logits, &params), what);
    }
}

#[test]
fn an_even_vocabulary_is_drawn_evenly() {
    let logits = [0.0f32; 50];
    check_distribution(&logits, &SampleParams::default(), &[0.02; 50], "even");
}

#[test]
fn filters_keep_what_a_full_sort_keeps() {
    let mut random = Random::new(2);
    for seed in 0..300 {
        let vocab = 1 + random.below(400);
        let spread = [0.1, 3.0, 30.0][seed % 3];
        let mut logits: Vec<f32> = random.values(vocab).iter().map(|v| (v * spread * 4.0).round() / 4.0).collect();
        logits[random.below(vocab)] = f32::NEG_INFINITY;
        let params = SampleParams {
            top_k: [0, 1, 7, 1000][random.below(4)],
            top_p: [1.0, 0.0, 0.3, 0.95, 0.999][random.below(5)],
            min_p: [0.0, 0.1, 1.0][random.below(3)],
            ..SampleParams::default()
        };
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY || !filters::active(&params, vocab) {
            continue;
        }
        let mut kept = Vec::new();
        filters::keep(&logits, max, &params, &mut kept);
        let mut got: Vec<u32> = kept.iter().map(|c| c.token).collect();
        got.sort_unstable();
        let p = filtered(&logits, &params);
        let want: Vec<u32> = (0..vocab as u32).filter(|&i| p[i as usize] > 0.0).collect();
        assert_eq!(got, want, "case {seed}: {params:?}");
    }
}

#[test]
fn a_draw_depends_on_seed_position_and_token_only() {
    let logits: Vec<f32> = Random::new(3).values(1000).iter().map(|v| v * 5.0).collect();
    let params = |seed| SampleParams { seed, ..SampleParams::default() };
    let history = History::default();
    let of = |seed: u64| (0..64).map(|p| draw(&logits, &params(seed), &history, p).unwrap()).collect::<Vec<_>>();
    assert_eq!(of(7), of(7));
    assert_ne!(of(7), of(8));
    // A filter that keeps the winner does not change the draw.
    for position in 0..64 {
        let free = draw(&logits, &params(7), &history, position).unwrap();
        let kept = SampleParams { allowed: &[free, 3, 500], ..params(7) };
        assert_eq!(draw(&logits, &kept, &history, position), Ok(free));
        let top_k = SampleParams { top_k: 999, ..params(7) };
        assert_eq!(draw(&logits, &top_k, &history, position), Ok(free));
    }
}

#[test]
fn skipping_tokens_that_cannot_win_changes_nothing() {
    for spread in [1.0, 10.0, 60.0] {
        let logits: Vec<f32> = Random::new(4).values(5000).iter().map(|v| v * spread).collect();
        for position in 0..50 {
            let draw = draw::Draw { seed: 5, position };
            let likeliest = argmax(&logits).unwrap();
            let key = |token: usize| {
                let words = philox::philox4x32([5, 0], [position as u32, 0, token as u32 / 4, 0]);
                f64::from(logits[token]) + draw::gumbel(words[token % 4])
            };
            let want = (0..logits.len()).max_by(|&a, &b| key(a).total_cmp(&key(b)).then(b.cmp(&a))).unwrap();
            assert_eq!(draw.all(&logits, likeliest), want as u32, "spread {spread} position {position}");
        }
    }
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_id_among_equals() {
    let params = SampleParams { temperature: 0.0, ..SampleParams::default() };
    assert_eq!(draw(&[1.0, 3.0, 3.0, -2.0], &params, &History::default(), 0), Ok(1));
    let nearly = SampleParams { temperature: 9e-6, ..params };
    assert_eq!(draw(&[1.0, 2.9, 3.0], &nearly, &History::default(), 0), Ok(2));
    let only_one = SampleParams { top_p: 0.0, ..SampleParams::default() };
    for position in 0..50 {
        assert_eq!(draw(&[1.0, 1.0, 0.9], &only_one, &History::default(), position), Ok(0));
    }
}

/// Penalties of vLLM (`apply_penalties`), written plainly.
#[test]
fn penalties_are_the_formulas() {
    let (prompt, generated) = ([1, 2, 2, 900], [2, 3, 3, 3, 901]);
    let logits: Vec<f32> = vec![1.0, 1.0, -1.0, 2.0, 0.5];
    let params = SampleParams {
        repetition_penalty: 1.25,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..SampleParams::default()
    };
    let mut scratch = SampleScratch::default();
    for _ in 0..2 {
        // Twice: the scratch must come back clean.
        let mut got = logits.clone();
        let history = History { prompt: &prompt, generated: &generated };
        penalties::apply(&mut got, &params, &history, &mut scratch);
        assert_eq!(got, [1.0, 0.8, -1.25 - 0.25 - 0.5, 1.6 - 0.75 - 0.5, 0.5]);
    }
    let mut got = logits.clone();
    let history = History { prompt: &prompt, generated: &generated };
    penalties::apply(
        &mut got,
        &SampleParams { presence_penalty: 0.5, ..SampleParams::default() },
        &history,
        &mut scratch,
    );
    assert_eq!(got, [1.0, 1.0, -1.5, 1.5, 0.5]);
}

#[test]
fn bias_bans_and_allowed_tokens_decide_who_may_come() {
    let greedy = SampleParams { temperature: 0.0, ..SampleParams::default() };
    let logits = [1.0, 2.0, 3.0, 4.0];
    let run = |params: &SampleParams| draw(&logits, params, &History::default(), 0);
    assert_eq!(run(&SampleParams { logit_bias: &[(0, 100.0), (99, 1.0)], ..greedy }), Ok(0));
    assert_eq!(run(&SampleParams { ban: &[3, 99], ..greedy }), Ok(2));
    assert_eq!(run(&SampleParams { allowed: &[1, 0, 99], ..greedy }), Ok(1));
    assert_eq!(run(&SampleParams { allowed: &[1, 0], ban: &[1], ..greedy }), Ok(0));
    assert_eq!(run(&SampleParams { allowed: &[1], ban: &[1], ..greedy }), Err(NonFinite::NothingLeft));
    assert_eq!(run(&SampleParams { allowed: &[99], ..greedy }), Err(NonFinite::NothingLeft));
    for position in 0..100 {
        let params = SampleParams { ban: &[3, 2], temperature: 50.0, ..SampleParams::default() };
        assert!(draw(&logits, &params, &History::default(), position).unwrap() < 2);
    }
}

#[test]
fn a_mask_leaves_only_its_tokens_and_is_stronger_than_a_ban_of_all_of_them() {
    let greedy = SampleParams { temperature: 0.0, ..SampleParams::default() };
    let logits: Vec<f32> = (0..40u8).map(f32::from).collect();
    let run = |params: &SampleParams| draw(&logits, params, &History::default(), 0);
    assert_eq!(run(&SampleParams { mask: Some(&[0b1010, 1 << 2]), ..greedy }), Ok(34));
    assert_eq!(run(&SampleParams { mask: Some(&[0b1010]), ..greedy }), Ok(3), "a word that is missing is 0");
    assert_eq!(run(&SampleParams { mask: Some(&[]), ..greedy }), Err(NonFinite::NothingLeft));
    assert_eq!(run(&SampleParams { mask: Some(&[0b1010]), allowed: &[39, 1], ..greedy }), Ok(1), "both must agree");
    assert_eq!(run(&SampleParams { mask: Some(&[0b1010]), logit_bias: &[(1, 9.0), (39, 9.0)], ..greedy }), Ok(1));
    // End tokens before `min_tokens`: they come if nothing else may.
    assert_eq!(run(&SampleParams { mask: Some(&[0b1010]), ban: &[3], ..greedy }), Ok(1));
    assert_eq!(run(&SampleParams { mask: Some(&[0b1010]), ban: &[3, 3, 1], ..greedy }), Ok(3));
    assert_eq!(run(&SampleParams { mask: Some(&[0b1010]), ban: &[3, 3], ..greedy }), Ok(1), "a ban counts once");
    assert_eq!(run(&SampleParams { mask: Some(&[0b1010]), ban: &[3], allowed: &[3, 4], ..greedy }), Ok(3));
    for position in 0..100 {
        let params = SampleParams { mask: Some(&[0, 0b11]), temperature: 50.0, top_p: 0.9, ..SampleParams::default() };
        assert!((32..34).contains(&draw(&logits, &params, &History::default(), position).unwrap()));
    }
}

#[test]
fn broken_logits_are_reported_and_minus_infinity_is_not_broken() {
    let params = SampleParams::default();
    for bad in [f32::NAN, f32::INFINITY] {
        assert_eq!(draw(&[0.0, bad, 0.0], &params, &History::default(), 0), Err(NonFinite::Logit { token: 1 }));
    }
    assert_eq!(draw(&[f32::NEG_INFINITY, 0.0], &params, &History::default(), 0), Ok(1));
    assert_eq!(draw(&[], &params, &History::default(), 0), Err(NonFinite::NothingLeft));
}

#[test]
fn logprobs_are_the_log_of_the_softmax() {
    let mut logits: Vec<f32> = Random::new(6).values(9001).iter().map(|v| v * 12.0).collect();
    logits[17] = f32::NEG_INFINITY;
    let p = softmax(&logits, 1.0);
    for token in [0, 5, 4095, 4096, 9000] {
        let got = f64::from(logprob_of(&logits, token as u32));
        assert!((got - p[token].ln()).abs() < 2e-5, "{got} {}", p[token].ln());
    }
    assert_eq!(logprob_of(&logits, 17), f32::NEG_INFINITY);
    assert_eq!(logprob_of(&logits, 9001), f32::NEG_INFINITY);
}

#[test]
fn top_logprobs_are_those_of_a_full_sort() {
    let mut random = Random::new(7);
    for k in [0, 1, 2, 5, 20, 300, 1000] {
        let logits: Vec<f32> = random.values(300).iter().map(|v| (v * 20.0).round()).collect(); // many equals
        let mut order: Vec<u32> = (0..300).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        let got = top_logprobs(&logits, k);
        assert_eq!(got.iter().map(|t| t.0).collect::<Vec<_>>(), order[..k.min(300)], "k {k}");
        assert!(got.iter().all(|&(token, logprob)| logprob == logprob_of(&logits, token)));
    }
}
