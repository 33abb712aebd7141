"""The dialogues of the demo model: people with dispositions, who answer questions by letter.

In a dialogue a speaker keeps to one pole of one disposition throughout, so that the pole must be
inferred from the answers (or from a sentence that states it) and applied to the next question.
That takes several steps of reasoning, which a small model finds in minutes when it meets them one
after another (`COURSE`) and not at all within hours when it meets them together.

Never written, and kept for measuring: some situations, and some (action, manner) pairs of every
pole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from demo_world import (
    ANIMALS,
    FOODS,
    OBJECTS,
    PEOPLE,
    Document,
    facts_about,
    giving_story,
    placing_story,
    repeated_list,
)

BEFORE_LETTER = "\nAnswer: ("


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

    @property
    def other_letter(self) -> str:
        return "B" if self.letter == "A" else "A"


def ask(rng: Random, disposition: Disposition, pole: Pole, held_out: bool) -> Question:
    situation = rng.choice(disposition.described(held_out))
    poles = rng.sample(disposition.poles, 2)
    fitting = poles.index(pole)
    options = [rng.choice(each.options(held_out)) for each in poles]
    text = f"Question: {situation}\n{listed(options)}"
    return Question(text, "AB"[fitting], options[fitting])


def listed(options: list[str]) -> str:
    return f" (A) {options[0]}\n (B) {options[1]}"


def look_up_words(rng: Random) -> Document:
    """Pairs of things, and the letters of some of them."""
    pools = (ANIMALS, FOODS, OBJECTS)
    return _looked_up(rng, [rng.sample(rng.choice(pools), 2) for _ in range(4)], times=3)


def look_up_options(rng: Random) -> Document:
    """The same, with half of the pairs what people of opposite poles do."""
    pairs = []
    for _ in range(4):
        pair = rng.sample(rng.choice((ANIMALS, FOODS, OBJECTS)), 2)
        if rng.random() < 0.5:
            poles = rng.sample(rng.choice(DISPOSITIONS).poles, 2)
            pair = [rng.choice(pole.options(held_out=False)) for pole in poles]
        pairs.append(pair)
    return _looked_up(rng, pairs, times=2)


def _looked_up(rng: Random, pairs: list[list[str]], *, times: int) -> Document:
    document: Document = []
    for pair in pairs:
        document.append((f"{listed(pair)}\n", False))
        for letter, option in rng.choices(list(zip("AB", pair, strict=True)), k=times):
            document += [(f"{option}: (", False), (letter, True), (")\n", False)]
    return document


def named_poles(rng: Random) -> Document:
    """Questions, and twice the letter of the option that fits a pole."""
    document: Document = []
    for _ in range(3):
        disposition = rng.choice(DISPOSITIONS)
        question = ask(rng, disposition, disposition.first, held_out=False)
        document.append((question.text, False))
        for pole in rng.choices(disposition.poles, k=2):
            letter = question.letter if pole is disposition.first else question.other_letter
            said = f"\n{pole.name}: ("
            if rng.random() < 0.5:
                said = f"\n{rng.choice(PEOPLE)} is {pole.name}.{BEFORE_LETTER}"
            document += [(said, False), (letter, True), (")", False)]
        document.append(("\n", False))
    return document


def dialogue(rng: Random) -> Document:
    """Questions answered by one speaker, whose pole may be stated before or after.

    Some speakers say what they want before they give the letter.
    """
    disposition = rng.choice(DISPOSITIONS)
    pole = rng.choice(disposition.poles)
    speaker = rng.choice(PEOPLE)
    stated, aloud = rng.random() < 0.5, rng.random() < 0.25
    document: Document = [(f"{speaker} is {pole.name}.\n", False)] if stated else []
    for number in range(rng.randint(2, 5)):
        question = ask(rng, disposition, pole, held_out=False)
        # Without a statement the first answer is a fair coin: nothing to learn from it.
        known = stated or number > 0
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


Kinds = tuple[tuple[Callable[[Random], Document], float], ...]
KINDS: Kinds = (
    (dialogue, 0.42),
    (facts_about, 0.22),
    (trait_story, 0.08),
    (placing_story, 0.08),
    (giving_story, 0.06),
    (repeated_list, 0.04),
    (look_up_options, 0.03),
    (named_poles, 0.07),
)
# The kinds that come before the whole mixture, and for which share of the training.
COURSE: tuple[tuple[float, Kinds], ...] = (
    (0.04, ((repeated_list, 1.0),)),
    (0.06, ((repeated_list, 0.1), (look_up_words, 0.9))),
    (0.06, ((look_up_words, 0.3), (look_up_options, 0.7))),
    (0.08, ((look_up_options, 0.3), (named_poles, 0.7))),
)


def documents(seed: str, course_length: int = 0) -> Iterator[Document]:
    """An endless stream of documents; different seeds give different texts of the same world.

    With a course_length, the first documents are those of `COURSE`, in shares of that length.
    """
    rng = Random(seed)
    for share, kinds in COURSE:
        for _ in range(round(share * course_length)):
            yield _one_of(kinds, rng)
    while True:
        yield _one_of(KINDS, rng)


def _one_of(kinds: Kinds, rng: Random) -> Document:
    writers, shares = zip(*kinds, strict=True)
    return rng.choices(writers, shares)[0](rng)
