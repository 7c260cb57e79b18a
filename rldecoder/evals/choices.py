"""Tasks with a few possible answers, a word each, that a small model knows better than it says.

In the residual stream of SmolLM2-135M-Instruct the answer to most of these can be read off by a
linear map, and yet the model, shown a few examples, gives one answer to nearly everything: there a
reward can teach a decoder to say what the latents hold. How each measures, and which PPO is run on,
is in docs/experiments/ppo_tasks.md (`python -m benchmarks.task_choice`). All words and sentences
are the project's own.

A question belongs to exactly one split, together with every other one about the same thing (a word,
a verb, a pair of numbers or of words: its group; one word of a pair may be in pairs of other
splits). Worked examples are asked nowhere.
"""

from __future__ import annotations

import hashlib
import random
from functools import cache
from typing import Literal, NamedTuple

Split = Literal["train", "validation", "test"]
ChoiceName = Literal["alive", "kind", "larger", "mood", "opposite", "tense"]

MAX_NEW_TOKENS = 3
"""An answer is a word, and ends at a line break."""


class Question(NamedTuple):
    """What is asked about one thing."""

    text: str
    """Stands in the template's place."""
    answer: str
    group: str
    """The thing: all questions about it have one split."""


class ChoiceTask(NamedTuple):
    """A template, worked examples for it, and questions."""

    opening: str
    """Said once, before the examples."""
    template: str
    """Of a question, `{}` for its text."""
    examples: tuple[tuple[str, str], ...]
    """Text and answer."""
    questions: tuple[Question, ...]

    @property
    def prefix(self) -> str:
        """What all prompts begin with."""
        shown = [f"{self.template.format(text)} {answer}\n\n" for text, answer in self.examples]
        return self.opening + "".join(shown)


_ANIMALS = """
tiger bear wolf fox rabbit mouse rat deer elephant monkey whale dolphin shark salmon eagle owl crow
duck goose swan spider ant bee snake lizard frog turtle camel donkey otter beaver squirrel penguin
seal crab parrot horse pig sheep goat lion cow hen pigeon robin sparrow hawk falcon trout herring
badger hedgehog mole bat moose leopard panther cheetah gorilla baboon giraffe zebra rhino hippo
kangaroo koala panda lobster octopus beetle wasp moth butterfly
"""
_FOODS = """
cheese butter rice pasta soup cake pie pizza apple banana orange grape lemon carrot potato onion
tomato cabbage bean egg honey sugar salt bacon sausage yogurt cereal cookie chocolate pancake
sandwich salad noodle stew pear plum cherry mango garlic lettuce spinach pumpkin
"""
_TOOLS = """
saw drill wrench screwdriver chisel axe shovel rake pliers spade ladder crowbar mallet file hoe
pickaxe sickle clamp vise trowel scissors tweezers ruler anvil lathe broom mop lever pulley sander
stapler scythe spanner nail tongs bellows needle toolbox bolt tape brush sponge
"""
_VEHICLES = """
bus truck train bicycle motorcycle tram boat ship ferry canoe kayak yacht submarine plane helicopter
rocket glider van taxi ambulance tractor scooter wagon cart sled carriage limousine jeep minivan
tanker lorry trolley raft sailboat airplane jet balloon locomotive moped coach barge bulldozer
"""
_GOOD = """
excellent delightful superb brilliant charming fantastic amazing lovely perfect beautiful enjoyable
pleasant great splendid marvellous terrific outstanding impressive magnificent thrilling funny
touching inspiring refreshing clever engaging satisfying comfortable friendly helpful generous
cheerful fabulous remarkable exquisite uplifting gorgeous admirable polished elegant memorable warm
"""
_BAD = """
awful horrible dreadful boring disappointing dull disgusting nasty poor bad lousy unpleasant painful
miserable rude ugly annoying clumsy tedious weak broken dirty bland tasteless uncomfortable useless
shabby sloppy pathetic depressing confusing frustrating irritating stale rotten careless hostile
gloomy overpriced shoddy mediocre appalling
"""
_REVIEWED = ("film", "book", "play", "concert", "show", "trip", "lesson", "speech")
_VERBS = """
play cook clean paint jump dance climb help open close wash call ask answer start finish watch look
listen laugh smile wait stay turn pull push carry count plant pick fill visit travel work rest shout
whisper knock mix pour bake fix cross follow guess hope join kick lift move need order pack point
rush save search share sign skate sneeze stare stop taste thank touch train trust try use wander
warn wave wish worry
"""
_IRREGULAR = {"stop": "stopped", "carry": "carried", "try": "tried", "worry": "worried"}
_WHO = ("She", "He", "They", "We")
_OPPOSITE = """
tall-short fast-slow happy-sad rich-poor light-dark hard-soft wet-dry old-young early-late
full-empty strong-weak loud-quiet clean-dirty thick-thin sharp-blunt open-closed near-far high-low
deep-shallow wide-narrow sweet-sour brave-cowardly cheap-expensive safe-dangerous true-false
right-wrong win-lose buy-sell push-pull up-down in-out love-hate laugh-cry rise-fall give-take
day-night north-south friend-enemy war-peace birth-death always-never front-back inside-outside
top-bottom smooth-rough
"""
_SAME = """
small-little fast-quick happy-glad rich-wealthy smart-clever begin-start end-finish hard-difficult
easy-simple loud-noisy quiet-silent angry-mad scared-afraid tired-sleepy pretty-beautiful sick-ill
strange-odd wet-damp thin-slim big-huge tiny-minute old-ancient new-modern correct-right
gift-present wrong-incorrect street-road house-home shut-close speak-talk shout-yell jump-leap
run-sprint throw-toss cry-weep choose-pick fix-repair help-assist purchase-buy answer-reply
error-mistake rude-impolite center-middle stone-rock
"""


def choice_questions(task: ChoiceName, split: Split, rng: random.Random) -> list[Question]:
    """All prompts of one split, whole, in an order by `rng`."""
    made, prefix = choice_task(task), choice_task(task).prefix
    questions = [question for question in made.questions if _splits(task)[question.group] == split]
    rng.shuffle(questions)
    return [q._replace(text=prefix + made.template.format(q.text)) for q in questions]


@cache
def choice_task(task: ChoiceName) -> ChoiceTask:
    """A task, whole. Its template was not chosen for what a decoder makes of it."""
    examples: tuple[tuple[str, str], ...]
    if task == "alive":
        things = [*_TOOLS.split()[:36], *_VEHICLES.split()[:36]]
        words = _words({"alive": _ANIMALS.split()[:72], "dead": things})
        examples = (("dog", "alive"), ("hammer", "dead"), ("car", "dead"), ("cat", "alive"))
        return ChoiceTask("", "{}:", examples, words)

    if task == "kind":
        kinds = {"animal": _ANIMALS, "food": _FOODS, "tool": _TOOLS, "vehicle": _VEHICLES}
        words = _words({kind: text.split()[:42] for kind, text in kinds.items()})
        examples = (("dog", "animal"), ("hammer", "tool"), ("bread", "food"), ("car", "vehicle"))
        opening = "Is it an animal, a food, a tool or a vehicle?\n\n"
        return ChoiceTask(opening, "Word: {}\nGroup:", examples, words)

    if task == "larger":
        return ChoiceTask("", "Is {} true?", (("34 > 12", "yes"), ("25 > 71", "no")), _pairs())

    if task == "mood":
        examples = (
            ("The film was wonderful.", "positive"),
            ("The hotel was terrible.", "negative"),
        )
        return ChoiceTask("", "Review: {}\nSentiment:", examples, _reviews())

    if task == "opposite":
        pairs = {"opposite": _OPPOSITE.split(), "same": _SAME.split()}
        questions = tuple(q._replace(text=q.text.replace("-", ", ")) for q in _words(pairs))
        return ChoiceTask("", "{}:", (("hot, cold", "opposite"), ("big, large", "same")), questions)

    examples = (("She walked.", "past"), ("They will talk.", "future"))
    return ChoiceTask("", "Sentence: {}\nTime:", examples, _sentences())


def _words(by_answer: dict[str, list[str]]) -> tuple[Question, ...]:
    return tuple(Question(w, answer, w) for answer, words in by_answer.items() for w in words)


def _pairs() -> tuple[Question, ...]:
    """Both orders of 120 pairs of numbers of two digits."""
    rng = random.Random(0)
    found: set[tuple[int, int]] = {(12, 34), (25, 71)}  # the examples
    questions: list[Question] = []
    while len(questions) < 240:
        low, high = sorted(rng.sample(range(10, 100), 2))
        if (low, high) in found:
            continue
        found.add((low, high))
        group = f"{low}-{high}"
        questions.append(Question(f"{high} > {low}", "yes", group))
        questions.append(Question(f"{low} > {high}", "no", group))
    return tuple(questions)


def _reviews() -> tuple[Question, ...]:
    """Two sentences an adjective."""
    rng = random.Random(0)
    return tuple(
        Question(f"The {thing} was {word}.", answer, word)
        for answer, text in (("positive", _GOOD), ("negative", _BAD))
        for word in text.split()
        for thing in rng.sample(_REVIEWED, 2)
    )


def _sentences() -> tuple[Question, ...]:
    """Each verb in both times."""
    rng = random.Random(0)
    questions: list[Question] = []
    for verb in _VERBS.split():
        past = _IRREGULAR.get(verb, verb + ("d" if verb.endswith("e") else "ed"))
        questions.append(Question(f"{rng.choice(_WHO)} {past}.", "past", verb))
        questions.append(Question(f"{rng.choice(_WHO)} will {verb}.", "future", verb))
    return tuple(questions)


@cache
def _splits(task: ChoiceName) -> dict[str, Split]:
    """Split of each group: a third is for test and a ninth for validation, by hash, of the groups
    with the same answers apart, so that no split lacks an answer."""
    answers: dict[str, set[str]] = {}
    for question in choice_task(task).questions:
        answers.setdefault(question.group, set()).add(question.answer)

    alike: dict[tuple[str, ...], list[str]] = {}
    for group, found in answers.items():
        alike.setdefault(tuple(sorted(found)), []).append(group)

    splits: dict[str, Split] = {}
    for groups in alike.values():
        ordered = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())
        test, validation = len(ordered) // 3, len(ordered) // 9
        splits |= dict.fromkeys(ordered, "train")
        splits |= dict.fromkeys(ordered[:test], "test")
        splits |= dict.fromkeys(ordered[test : test + validation], "validation")
    return splits
