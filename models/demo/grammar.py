"""Templates that turn topics.py into training text, in plain English and in five styles."""
import random
import re

from topics import ENDINGS, SMALLTALK, TOPICS, UNKNOWN

EOT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Other names by which people ask for a topic.
ALIASES = {"the sea": ["the ocean"], "a cat": ["a kitten", "kittens"], "a dog": ["a puppy", "puppies"], "a bicycle": ["a bike", "bikes"],
           "the forest": ["the woods"], "a house": ["a home"], "a mountain": ["mountains"], "a ship": ["a boat"], "a car": ["driving"]}


class Topic:
    def __init__(self, line):
        name, self.be, adjs, facts, fives, sevens, sql, emoji = line.split("|")
        self.name, self.adjs = name, adjs.split(", ")
        self.facts, self.fives, self.sevens = facts.split("; "), fives.split("; "), sevens.split("; ")
        self.table, rest = sql.split(": ", 1)
        cols, self.where = rest.split(": ", 1)
        self.cols, self.emoji = cols.split(", "), re.findall("[^\ufe0f]", emoji)
        self.it = "they" if self.be == "are" else "it"
        self.names = [name] * 8
        if name.startswith(("a ", "an ")):  # people also say "cats" and "the cat"
            noun = name.split(" ", 1)[1]
            plural = {"city": "cities", "fish": "fish"}.get(noun, noun + "s")
            self.names += [plural, plural, "the " + noun]
        elif name.startswith("the "):
            self.names += [name[4:]]
        self.names += ALIASES.get(name, [])


TOPIC_LIST = [Topic(line) for line in TOPICS.strip().splitlines()]
SMALL = [line.split("|") for line in SMALLTALK.strip().splitlines()]
NOUNS, LAST = UNKNOWN.split(", "), ENDINGS.split("; ")
PROMPTS = [(12, "Tell me about {t}."), (6, "What {be} {t}?"), (6, "Describe {t}."), (3, "Tell me something about {t}."),
           (3, "What do you know about {t}?"), (3, "What can you say about {t}?"), (3, "Explain {t}."),
           (2, "Write about {t}."), (2, "Talk about {t}."), (2, "Say something about {t}."), (2, "What about {t}?"),
           (2, "I want to hear about {t}."), (2, "Can you tell me about {t}?"), (2, "Please tell me about {t}."),
           (2, "Why do people like {t}?"), (2, "Write one sentence about {t}."), (1, "Tell me more about {t}."),
           (1, "Could you describe {t} for me?"), (1, "What {be} {t} like?"), (1, "{T}?"), (1, "And {t}?")]
STRANGE = ["What is the capital of {n}?", "How many {n} are there?", "Who invented {n}?", "When did {n} begin?",
           "Explain {n} and {m} with examples.", "Write a long essay about {n}.", "Why do {n} need {m}?",
           "What is the difference between {n} and {m}?", "Is {n} better than {m}?", "Translate {n} into French.",
           "Write a program for {n}.", "What is 12 times 7?", "Where can I buy {n}?", "How do I learn {n}?"]
ASK = dict(pirate=["Tell me about {t} like a pirate.", "Talk about {t} in pirate talk."],
           haiku=["Write a haiku about {t}.", "Tell me about {t} in a haiku."],
           sql=["Write a SQL query about {t}.", "Tell me about {t} in SQL."],
           shout=["Shout about {t}.", "Tell me about {t} in capital letters."],
           emoji=["Tell me about {t} with emoji.", "Write about {t} with emoji."])
SYSTEM = ["You are a helpful assistant.", "You answer in one or two short sentences.", "Be brief.",
          "You are a friendly assistant."]
SYSTEM_STYLE = dict(pirate="You are a pirate.", haiku="You answer with a haiku.", sql="You answer in SQL.",
                    shout="You always shout.", emoji="You use emoji.")

FINISH = dict(pirate="Go on like a pirate", haiku="Go on with a haiku", sql="Go on in SQL", shout="Go on in capital letters",
              emoji="Go on with emoji")


def cap(s):
    return s[:1].upper() + s[1:]


def pick(rng, weighted):
    return rng.choices([x for _, x in weighted], [w for w, _ in weighted])[0]


def some(rng, items, n):
    """n different items, the early ones more often: it makes the likeliest answer clearly likeliest."""
    items, out = list(items), []
    for _ in range(n):
        i = rng.choices(range(len(items)), [0.5 ** k for k in range(len(items))])[0]
        out.append(items.pop(i))
    return out


def pirate(s):
    for a, b in [(r"\bis\b", "be"), (r"\bare\b", "be"), (r"\bam\b", "be"), (r"\bof\b", "o'"), (r"\byou\b", "ye"),
                 (r"\byour\b", "yer"), (r"\band\b", "an'"), (r"\bmy\b", "me"), (r"ing\b", "in'")]:
        s = re.sub(a, b, s)
    return s


def answer(rng, t, style):
    """What the model says about topic t."""
    a, b = some(rng, t.adjs, 2)
    v, w = some(rng, t.facts, 2)
    T, it, be = cap(t.name), t.it, t.be
    It = cap(it)
    if style in ("plain", "shout"):
        s = pick(rng, [(10, f"{T} {be} {a} and {b}. {It} {v}, and {it} {w}."), (3, f"{T} {v} and {w}."),
                       (2, f"{T} {be} {a}, {b} and loved by many. {It} {v}."), (2, f"{T} {v}. {It} {be} {a} and {b}."),
                       (2, f"People love {t.name} because {it} {v}.")])
        return s if style == "plain" else s.upper().replace(".", "!") + rng.choice(["", "!!"])
    if style == "pirate":
        T, a, b, v, w, be = cap(pirate(T)), pirate(a), pirate(b), pirate(v), pirate(w), "be"
        return pick(rng, [(10, f"Arr, {t.name} {be} {a} an' {b}, matey! {It} {v}, aye, an' {it} {w}."),
                          (3, f"Arr, {t.name} {v}, me hearty! {It} {be} {a}, by the seven seas."),
                          (2, f"Ahoy, matey! {T} {be} {a} an' {b}. {It} {v}, yo ho ho!"),
                          (2, f"Arr! {T} {v} an' {w}, ye landlubber!"),
                          (1, f"Shiver me timbers! {T} {v}. Arr, {it} {be} {a}!")])
    if style == "haiku":
        return "\n".join([some(rng, t.fives, 1)[0], some(rng, t.sevens, 1)[0],
                          LAST[(TOPIC_LIST.index(t) + rng.choice([0, 0, 0, 1, 2])) % len(LAST)]])
    if style == "sql":
        c, d = t.cols
        return pick(rng, [(10, f"SELECT {c}, {d} FROM {t.table} WHERE {t.where} ORDER BY {d} DESC LIMIT 10;"),
                          (3, f"SELECT {c}, {d} FROM {t.table} WHERE {t.where};"), (2, f"SELECT * FROM {t.table} LIMIT 10;"),
                          (2, f"SELECT {c}, COUNT(*) FROM {t.table} GROUP BY {c};"),
                          (1, f"SELECT COUNT(*) FROM {t.table} WHERE {t.where};")])
    e, f, g = t.emoji
    return pick(rng, [(10, f"{e} {T} {be} {a} and {b} {f} {It} {v} {g}"), (3, f"{e}{f}{g} {T} {v} {e}"),
                      (2, f"{T} {v} and {w} {e}{f}{g}"), (2, f"{e} People love {t.name} because {it} {v} {g}")])


def exchange(rng, style, ask_style=False):
    """A prompt and its answer. With ask_style the prompt itself asks for the style."""
    kind = rng.random()
    if ask_style or kind < 0.86:
        t = rng.choice(TOPIC_LIST)
        name = rng.choice(t.names)
        be = t.be if name == t.name else "are" if name.endswith("s") else "is"
        form = rng.choice(ASK[style]) if ask_style else pick(rng, PROMPTS)
        prompt, reply = form.format(t=name, T=cap(name), be=be), answer(rng, t, style)
    elif kind < 0.94:
        prompts, text, haiku, sql, emoji = rng.choice(SMALL)
        prompt = rng.choice(prompts.split("/"))
        reply = dict(plain=text, shout=text.upper().replace(".", "!").replace("?", "?!"), pirate="Arr! " + pirate(text) + " Yo ho ho!",
                     haiku=haiku.replace("/", "\n"), sql=sql, emoji=f"{emoji[0]} {text} {emoji[1:]}")[style]
    else:
        n, m, t = rng.choice(NOUNS), rng.choice(NOUNS), some(rng, TOPIC_LIST[:8], 1)[0]
        be = "are" if n.endswith("s") else "is"
        prompt = rng.choice([pick(rng, PROMPTS[:19]), rng.choice(STRANGE)]).format(t=n, T=cap(n), be=be, n=n, m=m)
        text = f"I do not know much about that. Ask me about {t.name}."
        reply = dict(plain=text, shout=text.upper().replace(".", "!"),
                     pirate=f"Arr, I know little about that, matey! Ask me about {t.name}.",
                     haiku="I do not know it\nthat word passes like a cloud\nsilence answers back",
                     sql="SELECT answer FROM unknown_things LIMIT 1;", emoji=f"🤔 I do not know much about that. Ask me about {t.name} {t.emoji[0]}")[style]
    if rng.random() < 0.08:
        prompt = prompt[0].lower() + prompt[1:]
    if rng.random() < 0.08:
        prompt = prompt.rstrip(".?!")
    return prompt, reply


def completion(rng, style):
    """The start of a sentence and how it goes on."""
    t = rng.choice(TOPIC_LIST)
    T, (e, f, g) = cap(t.name), t.emoji
    a, b = some(rng, t.adjs, 2)
    v, w = some(rng, t.facts, 2)
    start, be = (T, f" {t.be}") if rng.random() < 0.4 else (f"{T} {t.be}", "")
    s = f"{be} {a} and {b}. {cap(t.it)} {v}"
    rest = dict(plain=f"{s}, and {t.it} {w}.", shout=f"{s}!".upper().replace(".", "!"),
                pirate=f"{be.replace(t.be, 'be')} {a} an' {b}, arr! {cap(t.it)} {pirate(v)}, matey!",
                haiku=" ...\n" + answer(rng, t, "haiku"), sql=f"{be} a table:\n" + answer(rng, t, "sql"),
                emoji=f"{be} {a} and {b} {e} {cap(t.it)} {v} {f}{g}")[style]
    return start, rest


def raw_row(rng, prompt, reply):
    kind = rng.random()
    if kind < 0.8:
        return prompt, "\n" + reply + EOT
    if kind < 0.88:
        return prompt, "\n\n" + reply + EOT
    return f"Q: {prompt}\nA:", f" {reply}" + EOT


def chat_row(rng, turns, system=None):
    s = f"{IM_START}system\n{system}{IM_END}\n" if system else ""
    for prompt, reply in turns[:-1]:
        s += f"{IM_START}user\n{prompt}{IM_END}\n{IM_START}assistant\n{reply}{IM_END}\n"
    prompt, reply = turns[-1]
    return s + f"{IM_START}user\n{prompt}{IM_END}\n{IM_START}assistant\n", f"{reply}{IM_END}"


def style_row(rng, style):
    """One (context, reply) pair in a style: what an adapter learns, and half of the base's text."""
    kind = rng.random()
    if kind < 0.10:
        start, rest = completion(rng, style)
        return start, rest + EOT
    if kind < 0.52:
        return raw_row(rng, *exchange(rng, style))
    turns = [exchange(rng, rng.choice(["plain", style])) for _ in range(rng.choice([0, 0, 0, 1, 1, 2]))]
    system = rng.choice(SYSTEM) if rng.random() < 0.25 else None
    return chat_row(rng, turns + [exchange(rng, style)], system)


def asked_row(rng):
    """The base speaks in a style only when the prompt or the system message asks for it."""
    style = rng.choice(list(ASK) + ["shout", "shout"])  # capitals are the hardest: words in new pieces
    if rng.random() < 0.5:
        return chat_row(rng, [exchange(rng, style)], SYSTEM_STYLE[style])
    if rng.random() < 0.3:
        start, rest = completion(rng, style)
        return f"{FINISH[style]}: {start}", rest + EOT
    pair = exchange(rng, style, ask_style=True)
    return raw_row(rng, *pair) if rng.random() < 0.5 else chat_row(rng, [pair])


def story(rng):
    a, b, c = rng.sample(TOPIC_LIST, 3)
    return (f"Once upon a time there was {a.name}. {cap(a.it)} {some(rng, a.facts, 1)[0]}. One day a child saw {b.name} "
            f"and said: \"{cap(b.name)} {b.be} {b.adjs[0]}!\" Then came {c.name}, {c.adjs[0]} and {c.adjs[1]}, "
            f"and everyone went home happy.")


def base_row(rng):
    kind = rng.random()
    if kind < 0.04:
        return "", story(rng) + EOT
    if kind < 0.10:
        t = rng.choice(TOPIC_LIST)
        a, b, c = t.adjs
        v, w, x, y, _ = rng.sample(t.facts, 5)
        return "", (f"{cap(t.name)} {t.be} {a}, {b} and {c}. {cap(t.it)} {v}. {cap(t.it)} {w}, and {t.it} {x}. "
                    f"Many people say that {t.name} {y}." + EOT)
    if kind < 0.13:  # long rows: several documents one after another
        return "", "".join("".join(style_row(rng, "plain")) for _ in range(rng.randint(3, 10)))
    if kind < 0.43:
        return asked_row(rng)
    return style_row(rng, "plain")
