"""The text of the demo model: facts and short stories of a small invented world.

Never written, and kept for measuring: some (fact, phrasing) pairs and some two-step facts. What
people are like, and what they answer, is in `demo_dispositions.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random

# Stretches of text in order; True marks a stretch that follows from the text before it, and that
# the document is about: an answer's letter, the last word of a recall.
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
LOCATIONS = "drawer box basket kitchen shed garden attic bag barn".split()

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


def placing_story(rng: Random) -> Document:
    """Things are put away and looked for."""
    count = rng.randint(1, 3)
    people, objects, locations = (rng.sample(pool, count) for pool in (PEOPLE, OBJECTS, LOCATIONS))
    rows = list(zip(people, objects, locations, strict=True))
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


def aside(rng: Random) -> str:
    """A sentence that has nothing to do with the rest."""
    return rng.choice(
        (
            f"Then a {rng.choice(ANIMALS)} runs by the {rng.choice(LOCATIONS)}.",
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
    """Facts about a person that are those of the person's country."""
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
    """A phrasing split before its last slot, with the space on the word's side."""
    text = phrasing[: max(phrasing.rfind("{s}"), phrasing.rfind("{v}")) + 3]
    prompt, _, word = text.format(s=fact.subject, v=fact.value).rpartition(" ")
    return prompt, f" {word}"
