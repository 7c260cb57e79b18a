"""Questions of the experiment docs/experiments/reward_or_teacher.md that were asked nowhere before.

Its test words are no words of `rldecoder.evals.choices`, of any split and task, worked examples
included: no run has been trained on them, judged by them or looked at with them. Wordings and
worked examples are those of training. 240 questions a family: 60 words of each of four kinds for
`kind`, 120 animals and 120 things for `alive`, 120 regular verbs in both times for `tense`.
"""

from __future__ import annotations

from rldecoder.evals.choices import MAX_NEW_TOKENS, ChoiceName, Question, choice_task
from rldecoder.evals.prompts import CHOICES, TaskPrompt

FAMILIES: tuple[ChoiceName, ...] = ("alive", "kind", "tense")

ANIMALS = """
alligator crocodile antelope gazelle buffalo bison bull calf ox pony mare stallion foal mule ram ewe
piglet boar kitten puppy hamster gerbil ferret weasel skunk raccoon opossum armadillo sloth anteater
porcupine chipmunk hare mongoose hyena jackal coyote dingo lynx cougar jaguar bobcat ape chimpanzee
orangutan lemur walrus manatee porpoise narwhal orca tuna cod haddock halibut mackerel sardine
anchovy eel carp pike catfish minnow goldfish stingray squid jellyfish starfish shrimp prawn oyster
clam mussel snail slug worm leech centipede scorpion tick flea louse mosquito gnat dragonfly
grasshopper cricket locust cockroach termite ladybug caterpillar hornet tortoise gecko iguana
chameleon python cobra viper toad newt salamander ostrich emu peacock turkey rooster chick pelican
stork heron flamingo crane gull albatross puffin raven magpie vulture
"""
FOODS = """
bagel muffin toast waffle omelette burger hamburger taco burrito sushi curry gravy ketchup mustard
mayonnaise jam jelly marmalade syrup candy fudge toffee pudding custard pastry doughnut biscuit
cracker pretzel popcorn oatmeal porridge lasagna spaghetti macaroni ravioli dumpling steak ham
meatball peach apricot melon watermelon pineapple strawberry raspberry blueberry blackberry
cranberry grapefruit lime fig raisin almond walnut peanut cashew celery cucumber
"""
TOOLS = """
screw wheelbarrow hacksaw jigsaw chainsaw sledgehammer jackhammer hatchet machete scalpel awl gouge
rasp grinder plumb caliper micrometer trimmer shears pruner hoist winch wedge bucket funnel syringe
pipette welder stencil paintbrush squeegee plunger wringer pestle whisk spatula ladle grater peeler
corkscrew colander knife cleaver razor chopper mattock pitchfork scraper handsaw thermometer
barometer telescope microscope magnet flashlight protractor compass crank stopwatch stethoscope
"""
VEHICLES = """
automobile sedan hatchback convertible pickup coupe roadster racecar hearse camper motorhome caravan
trailer snowplow forklift excavator steamroller tank firetruck motorbike dirtbike tricycle unicycle
tandem rickshaw chariot buggy stagecoach sleigh snowmobile toboggan skateboard monorail subway
streetcar trolleybus minibus metro freighter steamship cruiser destroyer battleship warship frigate
trawler tugboat speedboat rowboat gondola dinghy catamaran schooner galleon lifeboat houseboat
steamboat hovercraft airliner biplane
"""
VERBS = """
add agree allow arrive attack bang beg behave blink boast boil borrow bounce breathe bump burn camp
care cause cheat check chew chop clap claim collect complain confess cough crawl crash decide
decorate deliver deny dive doubt drag dress drop earn enjoy enter escape exercise explain fail
fasten fear fetch fish flap float fold fry gather giggle glue grab greet grin groan guard harvest
heal hug hunt hurry imagine invite iron jog juggle knit land lick limp live lock march marry melt
murmur nod notice obey object offer paddle park pause pedal peel phone polish pray preach predict
print promise protest pump race raise reach refuse relax remember repeat report retire return roar
row ruin scold scrape scratch scream scrub
"""

_DOUBLED = frozenset(
    [
        "beg",
        "chop",
        "clap",
        "drag",
        "drop",
        "flap",
        "grab",
        "grin",
        "hug",
        "jog",
        "knit",
        "nod",
        "scrub",
    ]
)
_WHO = ("She", "He", "They", "We")


def fresh_prompts(family: ChoiceName) -> list[TaskPrompt]:
    """The 240 test questions of a family, always the same ones in the same order.

    A group is a word or a verb; a word has one group in all families that ask it.
    """
    made = {"alive": _alive, "kind": _kind, "tense": _tense}
    questions = made[family]()
    return [
        TaskPrompt(
            family,
            "test",
            i,
            ask(family, text),
            answer,
            "first_word",
            MAX_NEW_TOKENS,
            (answer,),
            word,
        )
        for i, (text, answer, word) in enumerate(questions)
    ]


def ask(family: ChoiceName, text: str) -> str:
    """The prompt of a family's training questions, with another text in the question's place."""
    task = choice_task(family)
    return task.prefix + task.template.format(text)


def _alive() -> list[Question]:
    things = [*TOOLS.split(), *VEHICLES.split()]
    return [Question(word, "alive", word) for word in ANIMALS.split()] + [
        Question(word, "dead", word) for word in things
    ]


def _kind() -> list[Question]:
    kinds = {
        "animal": ANIMALS.split()[:60],
        "food": FOODS.split(),
        "tool": TOOLS.split(),
        "vehicle": VEHICLES.split(),
    }
    return [Question(word, kind, word) for kind, words in kinds.items() for word in words]


def _tense() -> list[Question]:
    who = (f"{_WHO[i % len(_WHO)]} " for i in range(2 * len(VERBS.split())))
    return [
        question
        for verb in VERBS.split()
        for question in (
            Question(f"{next(who)}{past_of(verb)}.", "past", verb),
            Question(f"{next(who)}will {verb}.", "future", verb),
        )
    ]


def past_of(verb: str) -> str:
    """Of a regular verb."""
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + (verb[-1] if verb in _DOUBLED else "") + "ed"


def words_of_training() -> frozenset[str]:
    """Every word that `rldecoder.evals.choices` asks about or shows, of all tasks and splits."""
    return frozenset(
        word.strip(".,:").lower()
        for name in CHOICES
        for task in (choice_task(name),)
        for text in (*(q.text for q in task.questions), *(text for text, _ in task.examples))
        for word in text.split()
    )
