//! The shard died: everything it held is gone, every token is kept, and somebody may be to blame.
//!
//! The sequences of all steps in flight become *suspects*: no result says how far the shard got. Each runs alone, one at a
//! time, until it is past the place where the shard died; all others go on in their own steps, turn by turn. A death in a
//! suspect's own step adds to its strikes, and at `STRIKES_MAX` of all siblings its request fails alone. So one poisoned
//! request costs at most three restarts.

use super::ids::{RequestId, SeqKey};
use super::limits::STRIKES_MAX;
use super::sequence::Suspect;
use super::{InFlight, Member, Scheduler};
use crate::engine::Failure;

impl Scheduler {
    /// The shard died. `weight`: 2 for a crash, an abort or a hang, 1 if it was killed from outside.
    ///
    /// Nothing is on the device or in the host slab any more: contents come back by [`Self::adapter_ready`], and until
    /// then what needs them waits. Events (a request that was given up) are in [`Self::take_events`].
    pub fn shard_lost(&mut self, weight: u32) {
        let flights = std::mem::take(&mut self.in_flight);
        // Named by request: a sequence that ended while a step was in flight leaves its siblings to answer for it.
        let fatal: Vec<_> = flights.iter().flat_map(|flight| self.fatal_members(flight)).collect();
        let leaving: Vec<SeqKey> = self.running.iter().copied().filter(|key| self.seq(*key).leaving).collect();
        self.forget_device();
        for key in leaving {
            self.remove_sequence(key);
        }
        let is_solo = flights.iter().any(|flight| flight.solo.is_some());
        for (id, member) in fatal {
            if is_solo {
                self.blame(id, member, weight);
            } else {
                self.suspect(id, member);
            }
        }
    }

    /// Who was in the step, and for whom adapters were uploaded during it.
    fn fatal_members(&self, flight: &InFlight) -> Vec<(RequestId, Member)> {
        let loading = flight.loading.iter().map(|key| Member { key: *key, start: 0, len: 1, samples: false });
        let members = flight.members.iter().copied().chain(loading);
        members.map(|member| (self.seq(member.key).job.id, member)).collect()
    }

    /// Resets arena and slots. What ran waits in its old place, with all its tokens.
    fn forget_device(&mut self) {
        self.pool.reset();
        self.adapters.reset();
        self.unpin_suspects();
        self.claims.clear();
        self.starving = None;
        self.finishes.clear();
        self.last_was_solo = false;
        for key in std::mem::take(&mut self.running) {
            let seq = self.seq_mut(key);
            seq.lose_shard();
            let (fair, turn, suspect) = (seq.key, seq.turn(key), seq.suspect.is_some());
            if !suspect {
                self.queue.push(fair, turn);
            }
        }
        for content in self.contents_needed() {
            self.content_moved(&content);
        }
    }

    /// A member of a fatal step, and its siblings with it: what they share may be what killed the shard.
    fn suspect(&mut self, id: RequestId, member: Member) {
        let Some(request) = self.requests.get(&id) else { return };
        let until = member.start + member.len;
        for key in request.sequences.iter().flatten().copied().collect::<Vec<_>>() {
            let seq = self.seq_mut(key);
            if let Some(suspect) = &mut seq.suspect {
                suspect.until = suspect.until.max(until);
            } else if !seq.waits_for_leader() {
                seq.suspect = Some(Suspect { until, strikes: 0 });
                let (fair, turn) = (seq.key, seq.turn(key));
                self.queue.remove(fair, &turn);
                self.suspects.push_back(key);
            }
        }
    }

    /// Its leader is a suspect, or left as one: the sibling that need not wait for it any more is one, too.
    pub(super) fn inherit_suspicion(&mut self, key: SeqKey, until: usize) {
        let seq = self.seq_mut(key);
        seq.may_take_turn();
        seq.suspect = Some(Suspect { until, strikes: 0 });
        self.suspects.push_back(key);
    }

    /// It was alone in the step. It goes to the end of the suspects' order, or fails.
    fn blame(&mut self, id: RequestId, member: Member, weight: u32) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.strikes += weight;
        if request.strikes >= STRIKES_MAX {
            self.fail_request(id, Failure::ShardFault);
            return;
        }
        let Some(seq) = self.sequences[member.key.0 as usize].as_mut() else { return };
        let Some(suspect) = &mut seq.suspect else { return };
        suspect.until = suspect.until.max(member.start + member.len);
        suspect.strikes += weight;
        self.suspects.retain(|key| *key != member.key);
        self.suspects.push_back(member.key);
    }

    /// Past the place where the shard died: it runs among the others again.
    pub(super) fn clear_suspect(&mut self, key: SeqKey) {
        let seq = self.seq_mut(key);
        let (id, computed) = (seq.job.id, seq.computed);
        let Some(cleared) = seq.suspect.take_if(|suspect| computed >= suspect.until) else { return };
        self.suspects.retain(|other| *other != key);
        if let Some(request) = self.requests.get_mut(&id) {
            request.strikes -= cleared.strikes;
        }
    }
}
