use super::*;

/// Who filled the cache before the question.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Filled {
    ByTheSameCaller,
    ByAnotherToken,
    ByAnAdmin,
    WhileItWasPublic,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Token {
    None,
    Wrong,
    Revoked,
    Right,
    /// None, below a place of the operator's.
    Operators,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    source: SourceKind,
    tier: Option<Tier>,
    token: Token,
    is_shared: bool,
    filled: Filled,
    is_old: bool,
    /// The question says `adapter_source` too.
    names_source: bool,
}

const SOURCES: [SourceKind; 4] = [SourceKind::Hub, SourceKind::S3, SourceKind::Gcs, SourceKind::Http];
/// Nowhere, or on disk, in host memory, on the device.
const TIERS: [Option<Tier>; 4] = [None, Some(Tier::Disk), Some(Tier::Host), Some(Tier::Device)];

fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for source in SOURCES {
        for tier in TIERS {
            for token in [Token::None, Token::Wrong, Token::Revoked, Token::Right, Token::Operators] {
                for is_shared in [false, true] {
                    for filled in
                        [Filled::ByTheSameCaller, Filled::ByAnotherToken, Filled::ByAnAdmin, Filled::WhileItWasPublic]
                    {
                        for is_old in [false, true] {
                            for names_source in [false, true] {
                                cells.push(Cell { source, tier, token, is_shared, filled, is_old, names_source });
                            }
                        }
                    }
                }
            }
        }
    }
    cells
}

fn reference_of(source: SourceKind, is_operators: bool) -> (String, &'static str) {
    let place = if is_operators { "loras" } else { "acme" };
    match source {
        SourceKind::S3 => (format!("s3://{place}/secret"), if is_operators { "loras/secret" } else { "acme/secret" }),
        SourceKind::Gcs => (format!("gs://{place}/secret"), if is_operators { "loras/secret" } else { "acme/secret" }),
        SourceKind::Http => (
            format!("https://{place}.example.com/secret"),
            if is_operators { "https://loras.example.com/secret" } else { "https://acme.example.com/secret" },
        ),
        _ => (format!("hf://{place}/secret"), if is_operators { "loras/secret" } else { "acme/secret" }),
    }
}

/// Fills the caches, changes what upstream permits, and asks as the cell says. (what came, was it right to serve it).
async fn run(cell: Cell) -> (Result<ResolvedAdapter, AdapterFailure>, bool, World) {
    let prefixes = ["hf://loras", "s3://loras", "gs://loras", "https://loras.example.com"];
    let settings = AdapterSettings {
        share_hub_token: cell.is_shared,
        source_prefixes: prefixes.map(str::to_owned).to_vec(),
        ..AdapterSettings::default()
    };
    let world = World::with(settings);
    let (name, locator) = reference_of(cell.source, cell.token == Token::Operators);
    let tokens = ["right".to_owned(), "other".to_owned(), "revoked".to_owned()];
    let open = Repo { commit: 1, is_public: true, tokens: tokens.into(), server_may: true };
    let token = match cell.token {
        Token::None | Token::Operators => None,
        Token::Wrong => Some("wrong"),
        Token::Revoked => Some("revoked"),
        Token::Right => Some("right"),
    };
    let closed = Repo { is_public: false, ..open.clone() };
    let is_public_first = cell.filled == Filled::WhileItWasPublic;
    world.upstream.put(locator, if is_public_first { open } else { closed.clone() });
    let mut is_known_to_caller = false;
    if let Some(tier) = cell.tier {
        match (cell.filled, token) {
            (Filled::ByTheSameCaller, Some(token)) => {
                is_known_to_caller = world.resolve_with(&name, token).await.is_ok();
            }
            (Filled::ByTheSameCaller, None) => is_known_to_caller = world.resolve(&name).await.is_ok(),
            (Filled::ByAnotherToken, _) => drop(world.resolve_with(&name, "other").await.unwrap()),
            (Filled::ByAnAdmin, _) => drop(world.load("registered", &name).await.unwrap()),
            // As anybody, who is the caller when that has no token.
            (Filled::WhileItWasPublic, _) => is_known_to_caller = world.resolve(&name).await.is_ok() && token.is_none(),
        }
        world.engine.set_tier(tier);
    }
    let tokens = ["right".to_owned(), "other".to_owned()];
    world.upstream.put(locator, Repo { tokens: tokens.into(), ..closed });
    world.clock.advance(Duration::from_secs(if cell.is_old { 61 } else { 30 }));
    let secret = token.map(|token| SecretString::from(token.to_owned()));
    let source = cell.names_source.then_some(cell.source);
    let ask = Ask { token: secret.as_ref(), source, ..Ask::plain(&name, LONG) };
    let answer = world.registry.resolve(&Caller::default(), &ask).await;
    let server_answers = cell.token == Token::Operators || (cell.is_shared && cell.source == SourceKind::Hub);
    let may = match cell.token {
        Token::Right => true,
        Token::None | Token::Operators => server_answers || (is_known_to_caller && !cell.is_old),
        Token::Revoked => is_known_to_caller && !cell.is_old,
        Token::Wrong => false,
    };
    (answer, may, world)
}

#[tokio::test]
async fn only_the_right_token_is_served_whatever_is_cached() {
    let (mut served, mut refused, started) = (0, 0, std::time::Instant::now());
    for cell in cells() {
        let (answer, may, world) = run(cell).await;
        match (&answer, may) {
            (Ok(adapter), true) => {
                let (_, locator) = reference_of(cell.source, cell.token == Token::Operators);
                let identity = format!("{}:{locator}@1", cell.source.name());
                assert_eq!(adapter.prepared.content, content_of(&identity), "{cell:?}");
                served += 1;
            }
            (Err(failure), false) => {
                assert_eq!(failure.code, "model_not_found", "{cell:?}");
                refused += 1;
            }
            _ => panic!("{cell:?}: {}, but may is {may}", code(&answer)),
        }
        // The server's credential was never used after the caller's own token was there.
        let asked = world.upstream.asked.lock().unwrap();
        let by_server = asked.iter().filter(|(_, who)| who == "server").count();
        let own = matches!(cell.token, Token::Wrong | Token::Revoked | Token::Right);
        let admin = usize::from(cell.filled == Filled::ByAnAdmin && cell.tier.is_some());
        let anybody = usize::from(cell.filled == Filled::WhileItWasPublic && cell.tier.is_some());
        assert!(!own || by_server <= admin + anybody, "{cell:?}");
    }
    assert!(served + refused >= 2_560 && served > 200 && refused > 200, "{served} served, {refused} refused");
    // A second and a half on an idle core; the rest is for a busy one.
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}

/// The same question about what is not there and about what is somebody else's, in every state of the caches.
#[tokio::test]
async fn not_yours_and_not_there_cannot_be_told_apart() {
    let mut checked = 0;
    for source in SOURCES {
        for tier in TIERS {
            for token in [Token::None, Token::Wrong, Token::Revoked] {
                for filled in [Filled::ByAnotherToken, Filled::ByAnAdmin] {
                    for wait in [LONG, Wait::Fail] {
                        let cell =
                            Cell { source, tier, token, is_shared: false, filled, is_old: true, names_source: false };
                        let (_, _, world) = run(cell).await;
                        world.clock.advance(Duration::from_secs(61));
                        let caller = Caller::default();
                        let (theirs, _) = reference_of(source, false);
                        let nothing = theirs.replace("secret", "nothin");
                        let secret = SecretString::from("wrong".to_owned());
                        let token = (token != Token::None).then_some(&secret);
                        let mut seen = Vec::new();
                        for name in [&theirs, &nothing] {
                            let before = (world.upstream.questions(), world.upstream.fetches());
                            let ask = Ask { token, ..Ask::plain(name, wait) };
                            let answer = world.registry.resolve(&caller, &ask).await.unwrap_err();
                            world.settle().await;
                            let after = (world.upstream.questions(), world.upstream.fetches());
                            let is_candidate = world.registry.is_candidate(&caller, name, None);
                            let card = world.registry.card(&caller, name).is_some();
                            let message = answer.message.replace("nothin", "secret");
                            let calls = (after.0 - before.0, after.1 - before.1);
                            seen.push((
                                answer.code,
                                message,
                                answer.retry_after,
                                answer.state,
                                calls,
                                is_candidate,
                                card,
                            ));
                        }
                        assert_eq!(seen[0], seen[1], "{cell:?} {wait:?}");
                        checked += 2;
                    }
                }
            }
        }
    }
    assert!(checked >= 384, "{checked}");
}
