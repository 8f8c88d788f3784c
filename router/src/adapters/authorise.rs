//! What a reference stands for, asked in somebody's name: the authorisation of dynamic references (rule R5).
//!
//! A yes is kept for 60 s under (keyed hash of the credential, reference), counted from the moment the source was asked;
//! a no for 5 s. A source that does not answer is no yes, whatever lies on this machine's disk.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use secrecy::ExposeSecret;
use tokio::sync::watch;

use super::life::Clock;
use super::types::{AdapterRef, Credential, Resolved, Source, SourceError, SourceKind};

/// How long a yes answers, and how long a branch is not looked up again.
const YES_KEPT: Duration = Duration::from_secs(60);
/// How long a no answers.
const NO_KEPT: Duration = Duration::from_secs(5);
/// How long a source that did not answer is left alone, unless it says itself.
const UNREACHED_KEPT: Duration = Duration::from_secs(1);
/// Answers that are kept.
const ANSWERS_MAX: usize = 16_384;
/// Questions under way to one kind of source.
const QUESTIONS_MAX: usize = 4096;

/// What is said of a source that has not answered yet; the question goes on.
pub(super) const UNANSWERED: &str = "service unavailable: its source has not answered yet; try again";

/// Keyed hash of a credential. The key is this process's own and is never written.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Mac([u8; 32]);

/// Asks the source, once however many want the same answer.
#[derive(Clone)]
pub(super) struct Authoriser {
    shared: Arc<Shared>,
}

struct Shared {
    source: Arc<dyn Source>,
    clock: Arc<dyn Clock>,
    key: [u8; 32],
    answers: Mutex<Answers>,
}

#[derive(Default)]
struct Answers {
    by_question: HashMap<(Mac, AdapterRef), Known>,
    /// By kind: a source that does not answer holds up nobody else's questions.
    asking: HashMap<SourceKind, usize>,
}

type Answer = Result<Arc<Resolved>, SourceError>;

enum Known {
    Asking(watch::Receiver<Option<Answer>>),
    Answer(Answer, Duration),
}

impl Authoriser {
    pub(super) fn new(source: Arc<dyn Source>, clock: Arc<dyn Clock>) -> Self {
        let mut key = [0; 32];
        for half in key.chunks_exact_mut(16) {
            half.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
        }
        Self { shared: Arc::new(Shared { source, clock, key, answers: Mutex::default() }) }
    }

    /// What a credential is kept under.
    pub(super) fn mac(&self, credential: &Credential) -> Mac {
        let mut hasher = blake3::Hasher::new_keyed(&self.shared.key);
        match credential {
            Credential::Anonymous => hasher.update(b"anonymous"),
            Credential::Server => hasher.update(b"server"),
            Credential::Token(token) => hasher.update(b"token:").update(token.expose_secret().as_bytes()),
        };
        Mac(*hasher.finalize().as_bytes())
    }

    /// What `reference` stands for, if `credential` may read it. The question goes on when its caller leaves.
    ///
    /// # Errors
    /// As the source says; [`SourceError::Retryable`] if it has not answered at `until`.
    pub(super) async fn ask(&self, reference: &AdapterRef, credential: &Credential, until: Option<Duration>) -> Answer {
        self.answer(reference, credential, until, false).await
    }

    /// The same, but a yes of a moment ago is asked again: somebody wants the newest.
    ///
    /// # Errors
    /// As the source says.
    pub(super) async fn ask_anew(&self, reference: &AdapterRef, credential: &Credential) -> Answer {
        self.answer(reference, credential, None, true).await
    }

    async fn answer(
        &self,
        reference: &AdapterRef,
        credential: &Credential,
        until: Option<Duration>,
        anew: bool,
    ) -> Answer {
        let mut question = match self.known_or_question(reference, credential, anew) {
            Ok(answer) => return answer,
            Err(question) => question,
        };
        let unanswered = || SourceError::retryable(UNANSWERED);
        let answered = question.wait_for(Option::is_some);
        // A directory answers at once, and what it says is not kept: who does not wait for it never knows.
        let answered = match until.filter(|_| reference.source != SourceKind::Local) {
            None => answered.await,
            Some(until) => {
                let left = until.saturating_sub(self.shared.clock.now());
                tokio::select! {
                    biased;
                    answered = answered => answered,
                    () = self.shared.clock.sleep(left) => return Err(unanswered()),
                }
            }
        };
        answered.map_err(|_| unanswered())?.clone().unwrap_or_else(|| Err(unanswered()))
    }

    fn known_or_question(
        &self,
        reference: &AdapterRef,
        credential: &Credential,
        anew: bool,
    ) -> Result<Answer, watch::Receiver<Option<Answer>>> {
        let now = self.shared.clock.now();
        let question = (self.mac(credential), reference.clone());
        let mut answers = self.answers();
        match answers.by_question.get(&question) {
            Some(Known::Answer(answer, until)) if now < *until && !(anew && answer.is_ok()) => {
                return Ok(answer.clone());
            }
            // `has_changed` is an error when the asker died without a word.
            Some(Known::Asking(asked)) if asked.has_changed().is_ok() => return Err(asked.clone()),
            Some(Known::Asking(_)) => answers.answered(reference.source),
            _ => {}
        }
        if answers.asking.get(&reference.source).is_some_and(|asking| *asking >= QUESTIONS_MAX) {
            return Ok(Err(SourceError::retryable("service unavailable: too many adapters are looked up; try again")));
        }
        answers.make_room(now);
        *answers.asking.entry(reference.source).or_default() += 1;
        let (report, asked) = watch::channel(None);
        answers.by_question.insert(question.clone(), Known::Asking(asked.clone()));
        let (authoriser, credential) = (self.clone(), credential.clone());
        tokio::spawn(async move { authoriser.question(question, credential, report).await });
        Err(asked)
    }

    async fn question(self, of: (Mac, AdapterRef), credential: Credential, report: watch::Sender<Option<Answer>>) {
        let asked_at = self.shared.clock.now();
        let answer = self.shared.source.resolve(&of.1, &credential).await.map(Arc::new);
        let kept = match &answer {
            // A directory is looked at each time: that is cheap, and its files may change at any time.
            Ok(_) if of.1.source == SourceKind::Local => Duration::ZERO,
            Ok(_) => YES_KEPT,
            Err(SourceError::Absent | SourceError::Permanent { .. }) if of.1.source == SourceKind::Local => {
                Duration::ZERO
            }
            Err(SourceError::Absent | SourceError::Permanent { .. }) => NO_KEPT,
            Err(SourceError::Retryable { retry_after, .. }) => retry_after.unwrap_or(UNREACHED_KEPT).min(NO_KEPT),
        };
        {
            let mut answers = self.answers();
            answers.answered(of.1.source);
            answers.by_question.insert(of, Known::Answer(answer.clone(), asked_at + kept));
        }
        report.send_replace(Some(answer));
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.shared.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answers {
    fn answered(&mut self, source: SourceKind) {
        if let Some(asking) = self.asking.get_mut(&source) {
            *asking = asking.saturating_sub(1);
        }
    }

    fn make_room(&mut self, now: Duration) {
        if self.by_question.len() < ANSWERS_MAX {
            return;
        }
        self.by_question.retain(|_, known| match known {
            Known::Asking(_) => true,
            Known::Answer(_, until) => *until > now,
        });
        if self.by_question.len() >= ANSWERS_MAX {
            // All are young: the half that goes is asked again.
            let mut keep = true;
            self.by_question.retain(|_, known| {
                keep = !keep;
                keep || matches!(known, Known::Asking(_))
            });
        }
    }
}
