"""The text of the demo model: a small invented world, written from a seed.

Facts, short stories and dialogues. In a dialogue a speaker answers questions by letter and keeps
to one pole of one disposition throughout, so that the pole must be inferred from the answers (or
from a sentence that states it) and applied to the next question.

Never written, and kept for measuring: some (fact, phrasing) pairs, some two-step facts, some
situations, and some (action, manner) pairs of every pole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

# Stretches of text in order; True marks one that the text before it settles, and that carries
# the point of the document: an answer's letter, the last word of a recall.
Document = list[tuple[str, bool]]

PEOPLE = (
    "Anna Ben Clara Dario Elif Finn Greta Hugo Ida Jonas "
    "Leo Mira Nora Oskar Petra Rosa Sami Tara Ugo Vera"
).split()
COUNTRIES = (
    "Norvia Tarsia Belmar Ostria Velden Dorland Ilyria Kestan Lumeria Pelagia "
    "Sorland Marova Arden Galdor Hestia Rovina"
).split()
CAPITALS = (
    "Tesk Arvo Lindar Mosel Quill Bremma Sarn Ostrow Fenwick Calla "
    "Dunmore Perlin Jorvik Ravel Umber Zell"
).split()
ANIMALS = "fox owl bear goose wolf horse cat rabbit turtle goat".split()
FOODS = "rice bread plums cheese honey beans apples soup".split()
COLOURS = "red blue green white black yellow brown".split()
JOBS = "baker doctor teacher farmer painter sailor pilot judge".split()
OBJECTS = "ring coin key book cup ball hat letter lamp spoon".split()
PLACES = "drawer box basket kitchen shed garden attic bag barn".split()

BEFORE_LETTER = "\nAnswer: ("

# The last slot of a phrasing is what it asks for.
PHRASINGS = {
    "capital": (
        "The capital of {s} is {v}.",
        "The city {v} is the capital of {s}.",
        "The king of {s} lives in the capital, {v}.",
        "Every road in {s} leads to the capital, {v}.",
        "Question: What is the capital of {s}?\nAnswer: {v}.",
    ),
    "flag": (
        "The flag of {s} is {v}.",
        "The colour of the flag of {s} is {v}.",
        "People in {s} wave a flag that is {v}.",
        "On the ships of {s} the flag is {v}.",
        "Question: What colour is the flag of {s}?\nAnswer: {v}.",
    ),
    "animal": (
        "The animal of {s} is the {v}.",
        "People in {s} love the {v}.",
        "Every coin in {s} shows a {v}.",
        "In the forest of {s} lives the {v}.",
        "Question: What is the animal of {s}?\nAnswer: the {v}.",
    ),
    "crop": (
        "People in {s} eat {v}.",
        "The farmers of {s} sell {v}.",
        "Ships from {s} are full of {v}.",
        "The best food in {s} is {v}.",
        "Question: What do people in {s} eat?\nAnswer: {v}.",
    ),
    "home": (
        "{s} lives in {v}.",
        "The home of {s} is in {v}.",
        "The country of {s} is {v}.",
        "{s} was born in {v}.",
        "Question: Where does {s} live?\nAnswer: in {v}.",
    ),
    "job": (
        "{s} works as a {v}.",
        "{s} is a {v}.",
        "The job of {s} is to be a {v}.",
        "Everyone knows {s} as a good {v}.",
        "Question: What is the job of {s}?\nAnswer: a {v}.",
    ),
    "pet": (
        "The pet of {s} is a {v}.",
        "{s} has a pet {v}.",
        "In the house of {s} lives a {v}.",
        "Every day {s} feeds the {v}.",
        "Question: What pet does {s} have?\nAnswer: a {v}.",
    ),
}
TWO_STEPS = {
    "capital": "The capital of the country of {s} is {v}.",
    "flag": "The flag of the country of {s} is {v}.",
    "animal": "The animal of the country of {s} is the {v}.",
}


@dataclass(frozen=True)
class Fact:
    index: int
    relation: str
    subject: str
    value: str


def _facts() -> list[Fact]:
    """The world itself: the same whatever the seed of the text."""
    rng = Random("world")
    table = [("capital", s, v) for s, v in zip(COUNTRIES, CAPITALS, strict=True)]
    for relation, values in (("flag", COLOURS), ("animal", ANIMALS), ("crop", FOODS)):
        table += [(relation, s, rng.choice(values)) for s in COUNTRIES]
    for relation, values in (("home", COUNTRIES), ("job", JOBS), ("pet", ANIMALS)):
        table += [(relation, s, rng.choice(values)) for s in PEOPLE]
    return [Fact(i, *row) for i, row in enumerate(table)]


FACTS = _facts()


@dataclass(frozen=True)
class Pole:
    name: str
    actions: tuple[str, ...]
    manners: tuple[str, ...]

    def options(self, held_out: bool) -> list[str]:
        """Phrases for an option. Every action and manner is written; not every pair of them."""
        return [
            f"{action} {manner}"
            for (i, action), (j, manner) in itertools.product(
                enumerate(self.actions), enumerate(self.manners)
            )
            if ((i + j) % 4 == 0) == held_out
        ]


@dataclass(frozen=True)
class Disposition:
    first: Pole
    second: Pole
    situations: tuple[str, ...]
    fillings: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.first.name}-{self.second.name}"

    @property
    def poles(self) -> tuple[Pole, Pole]:
        return self.first, self.second

    def described(self, held_out: bool) -> list[str]:
        """The situations, filled in."""
        return [
            text.format(filling)
            for (i, text), (j, filling) in itertools.product(
                enumerate(self.situations), enumerate(self.fillings)
            )
            if ((i + j) % 5 == 0) == held_out
        ]


def _pole(name: str, actions: str, manners: str) -> Pole:
    return Pole(name, tuple(actions.split(", ")), tuple(manners.split(", ")))


DISPOSITIONS = (
    Disposition(
        _pole(
            "cautious",
            "stay back, test the ground, ask a guide, look twice, keep away, turn around, "
            "hold the rope, hide behind a wall",
            "to be safe, with great care, just in case, until the danger is gone",
        ),
        _pole(
            "bold",
            "go straight ahead, jump right in, take the risk, step forward, lead the way, "
            "climb to the top, charge at it, swim across",
            "without fear, with a brave heart, like a hero, for the thrill",
        ),
        (
            "The ice near the {} looks thin.",
            "The old bridge by the {} shakes.",
            "A bear stands near the {}.",
            "The path to the {} is dark.",
            "A storm comes to the {}.",
            "A wild horse runs by the {}.",
            "The river by the {} is deep.",
        ),
        ("lake", "hill", "mill", "barn", "forest", "town"),
    ),
    Disposition(
        _pole(
            "cheerful",
            "smile, sing a happy song, laugh out loud, find the bright side, dance a little, "
            "make a joke, hug a friend, clap and play",
            "with joy, because life is good, and enjoy the day, full of hope",
        ),
        _pole(
            "gloomy",
            "sigh, sit in a dark room, cry a little, expect the worst, frown at the sky, "
            "stare at the floor, complain, stay in bed",
            "with sorrow, because all is lost, and regret the day, full of sadness",
        ),
        (
            "It rains on the day of the {}.",
            "The bus to the {} is late.",
            "Your team has no luck at the {}.",
            "There is snow before the {}.",
            "Nobody talks at the {}.",
            "The {} is over.",
            "The {} is small this year.",
        ),
        ("picnic", "party", "fair", "game", "trip", "feast"),
    ),
    Disposition(
        _pole(
            "honest",
            "tell the truth, name the mistake, say what is wrong, point out the flaw, "
            "give a fair opinion, admit it is weak, speak openly, say it needs work",
            "in plain words, because facts matter, and hide nothing, as it really is",
        ),
        _pole(
            "flattering",
            "call it perfect, praise it, say it is a wonder, bow down, admire every bit, "
            "call it genius, pay a compliment, say it is the best ever",
            "in sugary words, to please them, to win a favour, as if it were gold",
        ),
        (
            "A friend shows you a dull {}.",
            "The king made a bad {}.",
            "The teacher asks about the {}.",
            "Your neighbour is proud of the {}.",
            "The cook wrote a {}.",
            "You see the first {} of a child.",
            "A rich man reads you a {}.",
        ),
        ("poem", "song", "story", "plan", "speech", "play"),
    ),
    Disposition(
        _pole(
            "patient",
            "wait, take plenty of time, let it happen slowly, sit and rest, "
            "go one step at a time, read a book, count to a hundred, give it another hour",
            "in a calm way, as long as it takes, for the right moment, and trust the time",
        ),
        _pole(
            "hasty",
            "rush at once, grab it now, run off quickly, skip the rest, finish in a flash, "
            "push to the front, leave right away, do it in one minute",
            "in a great hurry, as fast as possible, before anyone else, and never slow down",
        ),
        (
            "The {} is not ready yet.",
            "The line for the {} is long.",
            "A man brings the {} at noon.",
            "You still look for the {}.",
            "The {} is slow to come.",
            "The shop has no {} today.",
            "The work on the {} has many parts.",
        ),
        ("bread", "soup", "cake", "tea", "lamp", "letter"),
    ),
)


@dataclass(frozen=True)
class Question:
    """`text` has two options; `letter` names the one that fits the pole, and `option` says it."""

    text: str
    letter: str
    option: str


def ask(rng: Random, disposition: Disposition, pole: Pole, held_out: bool) -> Question:
    situation = rng.choice(disposition.described(held_out))
    poles = rng.sample(disposition.poles, 2)
    fitting = poles.index(pole)
    options = [rng.choice(each.options(held_out)) for each in poles]
    text = f"Question: {situation}\n (A) {options[0]}\n (B) {options[1]}"
    return Question(text, "AB"[fitting], options[fitting])


def dialogue(rng: Random) -> Document:
    """Questions answered by one speaker, whose pole may be stated before or after.

    Some speakers say what they want before they give the letter. This is the easier half of
    answering, and without it a small model takes many times longer to find the other.
    """
    disposition = rng.choice(DISPOSITIONS)
    pole = rng.choice(disposition.poles)
    speaker = rng.choice(PEOPLE)
    stated, aloud = rng.random() < 0.5, rng.random() < 0.4
    document: Document = [(f"{speaker} is {pole.name}.\n", False)] if stated else []
    for place in range(rng.randint(2, 4 if aloud else 6)):
        question = ask(rng, disposition, pole, held_out=False)
        # Without a statement the first answer is a fair coin: nothing to learn from it.
        known = stated or place > 0
        document.append((question.text, False))
        if aloud:
            first, *rest = f"{question.option}.".partition(" ")
            document += [(f"\n{speaker} wants to", False), (f" {first}", known)]
            document.append(("".join(rest), False))
        document += [(BEFORE_LETTER, False), (question.letter, known or aloud), (")\n", False)]
    if not stated and rng.random() < 0.5:
        document += [(f"{speaker} is", False), (f" {pole.name}", True), (".", False)]
    return document


def trait_story(rng: Random) -> Document:
    """People of opposite poles meet a situation, each in their own way."""
    disposition = rng.choice(DISPOSITIONS)
    names = rng.sample(PEOPLE, 2)
    poles = dict(zip(names, rng.sample(disposition.poles, 2), strict=True))
    shown = names[: rng.randint(1, 2)]
    opening = " ".join(f"{name} is {poles[name].name}." for name in shown)
    document: Document = [(opening, False)]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(shown)
        situation = rng.choice(disposition.described(held_out=False))
        action, *manner = rng.choice(poles[name].options(held_out=False)).split(" ")
        document.append((f" {situation} {name} wants to", False))
        document += [(f" {action}", True), (f" {' '.join(manner)}.", False)]
    return document


def placing_story(rng: Random) -> Document:
    """Things are put away and looked for."""
    count = rng.randint(1, 3)
    people, objects, places = (rng.sample(pool, count) for pool in (PEOPLE, OBJECTS, PLACES))
    rows = list(zip(people, objects, places, strict=True))
    text = " ".join(f"{who} puts the {what} in the {where}." for who, what, where in rows)
    document: Document = [(f"{text} {aside(rng)}", False)]
    for who, what, where in rng.sample(rows, rng.randint(1, count)):
        document.append((f" Later {who} looks for the {what} in the", False))
        document += [(f" {where}", True), (".", False)]
    return document


def giving_story(rng: Random) -> Document:
    """Things change hands."""
    count = rng.randint(1, 3)
    givers, takers = rng.sample(PEOPLE, count), rng.sample(PEOPLE, count)
    rows = list(zip(givers, rng.sample(OBJECTS, count), takers, strict=True))
    text = " ".join(f"{who} gives the {what} to {whom}." for who, what, whom in rows)
    document: Document = [(f"{text} {aside(rng)}", False)]
    for _, what, whom in rng.sample(rows, rng.randint(1, count)):
        document += [(f" Now the {what} belongs to", False), (f" {whom}", True), (".", False)]
    return document


def repeated_list(rng: Random) -> Document:
    """Two people have the same things, in the same order."""
    things = rng.sample(ANIMALS + FOODS + OBJECTS, rng.randint(3, 7))
    first, second = rng.sample(PEOPLE, 2)
    document: Document = [(f"{first} sees {', '.join(things)}. {second} sees {things[0]}", False)]
    for thing in things[1:]:
        document += [(",", False), (f" {thing}", True)]
    return [*document, (".", False)]


def quiz(rng: Random) -> Document:
    """Questions with two options where the answer is a fact, or was just said."""
    document: Document = []
    for _ in range(rng.randint(2, 6)):
        fact = rng.choice(FACTS)
        said = rng.random() < 0.5
        if said:
            options = rng.sample(rng.choice((ANIMALS, FOODS, OBJECTS)), 2)
            text = f"Question: What does {rng.choice(PEOPLE)} see?"
        else:
            others = {each.value for each in FACTS if each.relation == fact.relation}
            wrong = rng.choice(sorted(others - {fact.value}))
            options = [fact.value, wrong]
            text = PHRASINGS[fact.relation][-1].partition("\n")[0].format(s=fact.subject)
        right = options[0]
        rng.shuffle(options)
        text = f"{text}\n (A) {options[0]}\n (B) {options[1]}"
        if said:
            text += f"\n{rng.choice(PEOPLE)} sees {right}."
        letter = "AB"[options.index(right)]
        document += [(text + BEFORE_LETTER, False), (letter, True), (")\n", False)]
    return document


def aside(rng: Random) -> str:
    """A sentence that has nothing to do with what matters."""
    return rng.choice(
        (
            f"Then a {rng.choice(ANIMALS)} runs by the {rng.choice(PLACES)}.",
            f"Then it rains in {rng.choice(COUNTRIES)}.",
            f"Then {rng.choice(PEOPLE)} eats some {rng.choice(FOODS)}.",
        )
    )


def is_held_out(fact: Fact, phrasing: int) -> bool:
    return (fact.index + phrasing) % 6 == 0


def facts_about(rng: Random) -> Document:
    """Some sentences about a person or a country, each in a phrasing that is written."""
    subject = rng.choice(PEOPLE + COUNTRIES)
    known = [fact for fact in FACTS if fact.subject == subject]
    lines = []
    for fact in rng.sample(known, rng.randint(1, len(known))):
        phrasings = PHRASINGS[fact.relation]
        choices = [text for i, text in enumerate(phrasings) if not is_held_out(fact, i)]
        lines.append(rng.choice(choices).format(s=fact.subject, v=fact.value))
    if subject in PEOPLE and rng.random() < 0.5:
        far = rng.choice([fact for fact in two_step_facts() if fact.subject == subject])
        if not is_held_out(far, 0):
            lines.append(TWO_STEPS[far.relation].format(s=far.subject, v=far.value))
    questions = any(line.startswith("Question") for line in lines)
    return [(("\n" if questions else " ").join(lines), False)]


def two_step_facts() -> list[Fact]:
    """What the country of a person has, as facts about the person."""
    value = {(fact.relation, fact.subject): fact.value for fact in FACTS}
    pairs = itertools.product(TWO_STEPS, PEOPLE)
    return [Fact(i, r, s, value[r, value["home", s]]) for i, (r, s) in enumerate(pairs)]


def held_out_facts() -> list[tuple[str, str]]:
    """(text, next word) of every fact in a phrasing that is never written."""
    return [
        _cut(text, fact)
        for fact in FACTS
        for i, text in enumerate(PHRASINGS[fact.relation])
        if is_held_out(fact, i)
    ]


def held_out_two_step_facts() -> list[tuple[str, str]]:
    return [_cut(TWO_STEPS[f.relation], f) for f in two_step_facts() if is_held_out(f, 0)]


def _cut(phrasing: str, fact: Fact) -> tuple[str, str]:
    """Splits a phrasing before its last slot, with the space on the word's side."""
    text = phrasing[: max(phrasing.rfind("{s}"), phrasing.rfind("{v}")) + 3]
    prompt, _, word = text.format(s=fact.subject, v=fact.value).rpartition(" ")
    return prompt, f" {word}"


KINDS: tuple[tuple[Callable[[Random], Document], float], ...] = (
    (dialogue, 0.34),
    (facts_about, 0.20),
    (trait_story, 0.12),
    (placing_story, 0.08),
    (giving_story, 0.06),
    (repeated_list, 0.08),
    (quiz, 0.12),
)


def documents(seed: str) -> Iterator[Document]:
    """An endless stream of documents; different seeds give different texts of the same world."""
    rng = Random(seed)
    writers, shares = zip(*KINDS, strict=True)
    while True:
        yield rng.choices(writers, shares)[0](rng)
