//! Invariants of the whole scheduler, recounted from scratch.

use std::collections::{BTreeMap, BTreeSet};

use loramux_proto::Step;

use super::super::Scheduler;
use super::super::ids::{BlockId, RequestId, SeqKey};
use super::super::pages::Role;
use super::super::sequence::{Ahead, Job, Sequence};
use crate::engine::ContentId;

impl Scheduler {
    /// Panics unless every page, block, pin, user and place is where exactly one owner says it is.
    pub(super) fn audit(&self) {
        self.pool.audit();
        self.adapters.audit();
        self.queue.audit(|pair| self.adapters.residency(pair.iter().map(|(content, _)| content)));
        self.audit_blocks();
        self.audit_slots();
        self.audit_places();
    }

    /// (run, request) of the steps in flight.
    pub(super) fn members_by_run(&self) -> impl Iterator<Item = (u64, RequestId)> {
        let members = self.in_flight.iter().flat_map(|flight| &flight.members);
        members.filter_map(|m| Some((self.seq(m.key).holding()?.seq.0, self.seq(m.key).job.id)))
    }

    pub(super) fn job_of_run(&self, run: u64) -> &Job {
        let runs = |seq: &&Sequence| seq.holding().is_some_and(|holding| holding.seq.0 == run);
        &self.live().map(|(_, seq)| seq).find(runs).expect("the run is known").job
    }

    /// Whose death a death of the shard would be now.
    pub(super) fn solo_request(&self) -> Option<RequestId> {
        let solo = self.in_flight.iter().find_map(|flight| flight.solo)?;
        Some(self.seq(solo).job.id)
    }

    /// Blocks that nobody references and the prefix index does not name.
    pub(super) fn unowned_blocks(&self) -> impl Iterator<Item = u32> {
        let adapters = |b: &u32| self.pool.role(b / self.limits.blocks_per_page) != Role::Adapter;
        (0..self.limits.blocks_total() as u32).filter(adapters).filter(|b| self.pool.is_unowned(*b))
    }

    pub(super) fn unowned_pages(&self) -> impl Iterator<Item = u32> {
        (0..self.limits.pages_total).filter(|page| self.pool.role(*page) == Role::Free)
    }

    /// (slot, generation) that holds a content, and whether its upload is done.
    pub(super) fn place_of(&self, content: &ContentId) -> Option<((u32, u64), bool)> {
        let (_, at, _, _, resident) = self.adapters.held().find(|(held, ..)| *held == Some(*content))?;
        Some(((at.slot, at.generation), resident))
    }

    pub(super) fn pinned_pages(&self) -> u32 {
        self.adapters.kept_pages()
    }

    /// Everything a person needs to see why nothing moves.
    pub(super) fn describe(&self) -> String {
        let seqs = self.live().map(|(key, s)| {
            let residency = self.adapters.residency(&s.job.contents);
            let (id, n) = (s.job.id, s.job.request.n);
            format!(
                "{key:?} of {id:?} n {n} {}+{} of {}, {:?}, {:?}, {residency:?}, {} contents",
                s.computed,
                s.len_tokens(),
                s.job.positions_max(),
                s.stage,
                s.suspect,
                s.job.contents.len()
            )
        });
        format!(
            "{:?}\n{:?}\nrunning {:?} suspects {:?} claims {:?} starving {:?} plan {} obtainable {}\n{}",
            self.limits,
            self.stats(),
            self.running,
            self.suspects,
            self.claims,
            self.starving,
            self.plans,
            self.blocks_obtainable(),
            seqs.collect::<Vec<_>>().join("\n")
        )
    }

    fn live(&self) -> impl Iterator<Item = (SeqKey, &Sequence)> {
        let entries = self.sequences.iter().enumerate();
        entries.filter_map(|(at, seq)| Some((SeqKey(at as u32), seq.as_ref()?)))
    }

    fn audit_blocks(&self) {
        let mut refs = vec![0u32; self.limits.blocks_total() as usize];
        for holding in self.live().filter_map(|(_, seq)| seq.holding()) {
            for block in &holding.blocks {
                refs[block.0 as usize] += 1;
            }
        }
        for block in self.in_flight.iter().flat_map(|flight| &flight.copy_sources) {
            refs[block.0 as usize] += 1;
        }
        for (block, refs) in refs.into_iter().enumerate() {
            assert_eq!(refs, self.pool.refs(block as u32), "references of block {block}");
        }
    }

    fn audit_slots(&self) {
        let mut pages = BTreeSet::new();
        let mut pins: BTreeMap<(u32, u64), u32> = BTreeMap::new();
        let mut users: BTreeMap<ContentId, u32> = BTreeMap::new();
        let held: BTreeMap<_, _> =
            self.adapters.held().map(|(c, at, _, _, up)| ((at.slot, at.generation), (c, up))).collect();
        for (_, seq) in self.live() {
            for content in &seq.job.contents {
                *users.entry(*content).or_default() += 1;
            }
            let Some(holding) = seq.holding() else { continue };
            for (pin, content) in holding.pins().iter().zip(&seq.job.contents) {
                *pins.entry((pin.slot, pin.generation)).or_default() += 1;
                assert_eq!(held.get(&(pin.slot, pin.generation)), Some(&(Some(*content), true)), "a pinned adapter");
            }
        }
        for (_, at, held_pages, pinned, _) in self.adapters.held() {
            assert_eq!(pins.get(&(at.slot, at.generation)).copied().unwrap_or(0), pinned, "pins of slot {at:?}");
            for page in held_pages {
                assert_eq!(self.pool.role(*page), Role::Adapter);
                assert!(pages.insert(*page), "page {page} belongs to two adapters");
            }
        }
        assert_eq!(pages.len() as u32, self.pool.pages_adapters());
        let mut claims: BTreeMap<ContentId, u32> = BTreeMap::new();
        for content in self.claims.iter().flat_map(|key| &self.seq(*key).job.contents) {
            *claims.entry(*content).or_default() += 1;
        }
        self.adapters.audit_claims(&claims);
        for (content, count) in self.adapters.users() {
            assert_eq!(users.get(content).copied().unwrap_or(0), count, "users of {content:?}");
        }
    }

    fn audit_places(&self) {
        let queued: BTreeSet<SeqKey> = self.queue.all().map(|(_, key)| key).collect();
        assert!(self.running.len() <= self.limits.seats());
        for (key, seq) in self.live() {
            let places = [
                self.running.contains(&key),
                queued.contains(&key),
                seq.waits_for_leader(),
                seq.suspect.is_some() && !seq.is_running(),
            ];
            assert_eq!(places.iter().filter(|p| **p).count(), 1, "sequence {key:?} is in {places:?}");
            assert_eq!(seq.is_running(), places[0]);
            assert_eq!(seq.suspect.is_some(), self.suspects.contains(&key));
            let flights = self.in_flight.iter().flat_map(|flight| &flight.members);
            let ahead = flights.filter(|member| member.key == key).fold(Ahead::default(), |sum, member| Ahead {
                steps: sum.steps + 1,
                positions: sum.positions + member.len,
                tokens: sum.tokens + usize::from(member.samples),
            });
            assert_eq!(ahead, seq.ahead);
            assert!(!seq.is_in_flight() || seq.is_running());
            assert!(!seq.leaving || seq.is_in_flight());
            let listed = self.requests.get(&seq.job.id).is_some_and(|r| r.sequences.contains(&Some(key)));
            assert_eq!(listed, !seq.leaving, "a sequence is listed until it leaves");
        }
        for request in self.requests.values() {
            assert!(request.sequences.iter().flatten().count() > 0, "a request without sequences is forgotten");
            let mut siblings = request.sequences.iter().flatten().map(|key| self.seq(*key));
            assert!(siblings.any(|seq| !seq.waits_for_leader()), "somebody leads");
        }
        assert_eq!(self.queued_requests, self.requests.values().filter(|r| !r.admitted).count());
        for claim in &self.claims {
            assert!(!self.seq(*claim).is_running() && !self.seq(*claim).waits_for_leader());
        }
    }

    /// Panics unless the step keeps what the shard relies on.
    pub(super) fn audit_step(&self, step: &Step) {
        let positions: u32 = step.chunks.iter().map(|chunk| chunk.len).sum();
        assert!(positions <= self.limits.step_tokens, "budget");
        assert!(step.chunks.len() <= self.limits.running_max as usize);
        let mut seen = BTreeSet::new();
        let mut segments = BTreeSet::new();
        let mut last = None;
        for chunk in &step.chunks {
            assert!(seen.insert(chunk.seq), "two chunks of one sequence");
            let set: Vec<_> = chunk.adapters.iter().map(|a| (a.slot, a.generation, a.scale.to_bits())).collect();
            if last.as_ref() != Some(&set) {
                assert!(segments.insert(set.clone()), "two segments of one adapter set");
                last = Some(set);
            }
            for block in &chunk.blocks {
                assert_eq!(self.pool.role(block / self.limits.blocks_per_page), Role::Kv);
            }
        }
        let flight = self.in_flight.back().expect("a planned step is in flight");
        assert!(flight.solo.is_none() || self.in_flight.len() == 1, "a suspect has the shard for itself");
        for member in &flight.members {
            let suspect = self.seq(member.key).suspect.is_some();
            assert_eq!(suspect, flight.solo == Some(member.key), "a suspect runs alone");
            assert!(!suspect || flight.members.len() == 1, "a suspect runs alone");
        }
    }

    /// Panics unless everything that a step in flight may touch still belongs to whom it belonged to when it was planned.
    pub(super) fn audit_flight(&self, step: &Step) {
        let kept = |block: u32| self.in_flight.iter().any(|f| f.copy_sources.contains(&BlockId(block)));
        let holdings = || self.live().filter_map(|(_, seq)| Some((seq, seq.holding()?)));
        for chunk in &step.chunks {
            let (seq, holding) =
                holdings().find(|(_, h)| h.seq.0 == chunk.seq).expect("it runs until no step names it");
            let writes = chunk.start / self.limits.block_tokens..;
            assert!(chunk.start as usize >= seq.computed, "a computed position is computed again");
            for (at, block) in chunk.blocks.iter().enumerate() {
                let owned = holding.blocks.get(at) == Some(&BlockId(*block));
                assert!(owned || kept(*block), "block {block} of {chunk:?} was given back");
                assert!(!writes.contains(&(at as u32)) || !self.pool.is_published(*block), "{block} is still written");
            }
            assert_eq!(chunk.adapters, holding.adapters, "adapters of a step in flight");
        }
        for copy in &step.copies {
            assert!(kept(copy.src), "the source of {copy:?} was given back");
            assert!(
                holdings().any(|(_, h)| h.blocks.contains(&BlockId(copy.dst))),
                "the target of {copy:?} was given back"
            );
        }
        for upload in &step.uploads {
            assert!(self.adapters.held().any(|(_, at, pages, _, _)| at.slot == upload.slot
                && at.generation == upload.generation
                && pages == upload.pages));
        }
        for run in &step.finishes {
            assert!(!holdings().any(|(_, holding)| holding.seq.0 == *run), "{run} was told to be forgotten and runs");
        }
    }
}
