//! The requests of a round, made before its clock starts.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::rng::Rng;
use super::target::Target;
use super::workload::Workload;

/// One request, ready to be sent.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) body: Bytes,
    pub(super) prompt_tokens: usize,
    pub(super) output_tokens: usize,
    /// When it arrives, s after the round's start; 0 in a closed loop.
    pub(super) at_s: f64,
}

/// All of a round.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Sent alone before the clock starts, so that what is shared lies in the prefix cache.
    pub(super) prime: Option<Planned>,
    pub(super) requests: Vec<Planned>,
    pub(super) intruder: Option<Planned>,
}

/// What a plan is drawn from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seed {
    pub(super) run: u64,
    /// Place of the workload in the run.
    pub(super) workload: u64,
    /// 0 is the warm-up.
    pub(super) round: u64,
    /// Prompt ids are below it.
    pub(super) vocabulary: u32,
}

/// Draws the requests of one round. Lengths and adapters depend on seed and round alone, so that workloads of the same load
/// get the same lengths; prompts differ between workloads too, so that no prompt is in a prefix cache.
pub(super) fn plan(workload: &Workload, target: &Target, seed: Seed) -> Plan {
    let mut lengths = Rng::new(&[seed.run, seed.round, 1]);
    let mut popularity = Rng::new(&[seed.run, seed.round, 2]);
    let mut arrivals = Rng::new(&[seed.run, seed.round, 3]);
    let mut prompts = Rng::new(&[seed.run, seed.round, 4, seed.workload]);
    let adapters = target.adapters.count();
    let drawn = workload.popularity.draw(workload.requests, adapters, seed.round as usize, &mut popularity);
    let prefix = tokens(&mut prompts, workload.prefix_tokens, seed.vocabulary);
    let mut prompt = |length: usize| {
        let mut prompt = prefix.clone();
        prompt.extend(tokens(&mut prompts, length.saturating_sub(prefix.len()), seed.vocabulary));
        prompt
    };
    let prime = (!prefix.is_empty()).then(|| request(target, None, &prompt(prefix.len() + 1), 1, 0.0));
    let intruder =
        (workload.intruder_tokens > 0).then(|| request(target, None, &prompt(workload.intruder_tokens), 1, 0.0));
    let mut at_s = 0.0;
    let mut one = |adapter: Option<usize>| {
        let prompt_tokens = lengths.between(workload.prompt_tokens.min, workload.prompt_tokens.max);
        let output_tokens = lengths.between(workload.output_tokens.min, workload.output_tokens.max);
        if let Some(rate) = workload.rate_per_s {
            at_s += arrivals.exponential_s(rate);
        }
        request(target, adapter, &prompt(prompt_tokens), output_tokens, at_s)
    };
    Plan { prime, requests: drawn.into_iter().map(&mut one).collect(), intruder }
}

/// One short request for each adapter (and the base), so that loading them is not measured.
pub(super) fn touch(target: &Target, adapter: Option<usize>, seed: Seed) -> Planned {
    let mut rng = Rng::new(&[seed.run, 5, adapter.map_or(0, |index| index as u64 + 1)]);
    request(target, adapter, &tokens(&mut rng, 8, seed.vocabulary), 1, 0.0)
}

/// Random ids; the lowest eighth of a vocabulary, where special tokens often are, is left out.
fn tokens(rng: &mut Rng, count: usize, vocabulary: u32) -> Vec<u32> {
    let (low, high) = (vocabulary as usize / 8, (vocabulary as usize).saturating_sub(1));
    (0..count).map(|_| rng.between(low, high) as u32).collect()
}

fn request(target: &Target, adapter: Option<usize>, prompt: &[u32], output_tokens: usize, at_s: f64) -> Planned {
    let mut body = Map::new();
    let usual = json!({
        "prompt": prompt, "max_tokens": output_tokens, "temperature": 0.0, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true}, "return_token_ids": true,
    });
    target.name_model(adapter, &mut body);
    if let Value::Object(usual) = usual {
        body.extend(usual);
    }
    for (key, value) in &target.extra_body {
        match value {
            Value::Null => body.shift_remove(key),
            value => body.insert(key.clone(), value.clone()),
        };
    }
    let body = Bytes::from(Value::Object(body).to_string());
    Planned { body, prompt_tokens: prompt.len(), output_tokens, at_s }
}

#[cfg(test)]
mod tests {
    use super::super::target::Adapters;
    use super::super::workload::Overrides;
    use super::*;

    fn target() -> Target {
        let names = (0..4).map(|i| format!("a{i}")).collect();
        Target::for_tests(Adapters::Names(names))
    }

    fn seed(workload: u64, round: u64) -> Seed {
        Seed { run: 9, workload, round, vocabulary: 2048 }
    }

    fn bodies(plan: &Plan) -> Vec<Value> {
        plan.requests.iter().map(|planned| serde_json::from_slice(&planned.body).unwrap()).collect()
    }

    #[test]
    fn plans_repeat_and_no_two_rounds_or_workloads_share_a_prompt() {
        let workload = Workload::parse("distinct:prompt=8-64:output=2-9", &Overrides::default()).unwrap();
        let first = bodies(&plan(&workload, &target(), seed(0, 1)));
        assert_eq!(first, bodies(&plan(&workload, &target(), seed(0, 1))));
        for other in [seed(1, 1), seed(0, 2)] {
            let other = bodies(&plan(&workload, &target(), other));
            assert!(first.iter().all(|one| other.iter().all(|two| one["prompt"] != two["prompt"])));
        }
        let lengths = |workload| -> Vec<usize> {
            plan(&Workload::parse(workload, &Overrides::default()).unwrap(), &target(), seed(3, 1))
                .requests
                .iter()
                .map(|planned| planned.prompt_tokens)
                .collect()
        };
        assert_eq!(lengths("base:prompt=8-64"), lengths("zipf:prompt=8-64"));
        assert!(first.iter().all(|body| body["prompt"].as_array().unwrap().iter().all(|id| {
            let id = id.as_u64().unwrap();
            (256..2048).contains(&id)
        })));
        assert_eq!(first[5]["model"], "a1");
    }

    #[test]
    fn prompts_share_exactly_their_prefix() {
        let workload = Workload::parse("shared-prefix:prompt=40:prefix=30", &Overrides::default()).unwrap();
        let plan = plan(&workload, &target(), seed(0, 1));
        let bodies = bodies(&plan);
        let prompt = |i: usize| bodies[i]["prompt"].as_array().unwrap();
        assert_eq!(prompt(0)[..30], prompt(1)[..30]);
        assert_ne!(prompt(0)[30..], prompt(1)[30..]);
        assert_eq!((prompt(0).len(), plan.prime.unwrap().prompt_tokens), (40, 31));
    }

    #[test]
    fn arrivals_of_an_open_loop_come_at_its_rate() {
        let workload = Workload::parse("base:rate=10:requests=2000:prompt=1:output=1", &Overrides::default()).unwrap();
        let plan = plan(&workload, &target(), seed(0, 1));
        let at: Vec<f64> = plan.requests.iter().map(|planned| planned.at_s).collect();
        assert!(at.is_sorted());
        assert!((at[1999] - 200.0).abs() < 15.0, "{}", at[1999]);
    }

    #[test]
    fn fields_of_ones_own_are_merged_and_null_takes_one_away() {
        let mut target = target();
        target.extra_body = serde_json::from_str(r#"{"ignore_eos":null,"min_tokens":3}"#).unwrap();
        let body: Value = serde_json::from_slice(&touch(&target, None, seed(0, 0)).body).unwrap();
        assert_eq!((&body["min_tokens"], body.get("ignore_eos"), &body["model"]), (&json!(3), None, &json!("base")));
    }
}
