"""The demo corpus has small stories from a grammar, so that everything can be tried in minutes without a download.

Story i is a pure function of (seed, i). A story picks a hero, a friend, a place, weather, a thing and a plot. Each plot
is a list of sentences in several wordings, which are filled with what was picked. Names, things and pronouns are picked
once and used throughout, so a model that learns the corpus must learn to refer back, which is what attention is for.
The wordings vary independently, so a model cannot just remember stories.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.sources.source import ReadCounts, Segment, Source, numbered
from bitnet_lit.errors import UserError

VALIDATION_SHARE = 0.02
VOCAB_SIZE = 1024  # the few hundred words fit as one token each, so that a story fits a short context

GIRLS = ["Anna", "Lily", "Mia", "Zoe", "Ella", "Rosa", "Nina", "Ivy", "Clara", "Emma"]
BOYS = ["Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Oscar", "Jack", "Noah", "Tim"]
ANIMALS = ["cat", "dog", "rabbit", "fox", "bear", "duck", "mouse", "owl", "frog", "pony"]
PLACES = ["the park", "the garden", "the forest", "the beach", "the farm", "the lake", "the meadow", "the old barn"]
WEATHER = ["sunny", "rainy", "windy", "cold", "warm", "cloudy"]
THINGS = ["ball", "kite", "hat", "drum", "boat", "book", "lamp", "bell", "doll", "cup", "key", "shell"]
COLORS = ["red", "blue", "green", "yellow", "orange", "white", "purple", "brown"]
SIZES = ["big", "small", "little", "tiny", "huge"]
FOODS = ["an apple", "a cake", "some bread", "a pear", "some soup", "a cookie", "some berries", "an orange"]
FEELINGS = ["happy", "glad", "proud", "excited", "cheerful"]
FEARS = ["the dark", "the thunder", "the deep water", "the tall ladder", "the loud storm"]


@dataclass(frozen=True)
class Cast:
    """A Cast holds the names and things that a story is filled with. The pronouns are the hero's."""

    hero: str
    he: str
    him: str
    his: str
    friend: str
    animal: str
    animal_name: str
    place: str
    weather: str
    thing: str
    color: str
    size: str
    food: str
    feeling: str
    fear: str
    family: str


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _cast(rng: random.Random) -> Cast:
    is_girl = rng.random() < 0.5
    hero = rng.choice(GIRLS if is_girl else BOYS)
    others = [name for name in GIRLS + BOYS if name != hero]
    friend, animal_name = rng.sample(others, 2)
    he, him, his = ("she", "her", "her") if is_girl else ("he", "him", "his")
    return Cast(
        hero=hero,
        he=he,
        him=him,
        his=his,
        friend=friend,
        animal=rng.choice(ANIMALS),
        animal_name=animal_name,
        place=rng.choice(PLACES),
        weather=rng.choice(WEATHER),
        thing=rng.choice(THINGS),
        color=rng.choice(COLORS),
        size=rng.choice(SIZES),
        food=rng.choice(FOODS),
        feeling=rng.choice(FEELINGS),
        fear=rng.choice(FEARS),
        family=rng.choice(["mother", "father", "grandmother", "grandfather"]),
    )


OPENINGS = [
    ["Once upon a time, there was a {kid} named {hero}.", "Once upon a time, a {kid} named {hero} lived near {place}."],
    ["One {weather} day, {hero} went to {place}.", "It was a {weather} day, and {hero} wanted to go to {place}."],
]

PLOTS = [
    # Lost and found.
    [
        [
            "{He} had {a_size} {color} {thing} and loved it very much.",
            "{His} {family} had given {him} {a_color} {thing}.",
        ],
        ["But then the {thing} was gone!", "Suddenly {he} could not find the {thing}.", "But the {thing} was lost."],
        ["{hero} looked under a tree and behind a wall.", "{He} looked here and there, but it was not there."],
        ["{hero} was sad and began to cry.", '"Where is my {thing}?" {he} cried.'],
        ['{friend} came and asked, "What is wrong?"', "Then {friend} came by and saw {him}."],
        ['"I will help you," said {friend}.', '"Let us look together," {friend} said.'],
        [
            "They looked and looked, and there was the {thing}, in the grass.",
            "At last {friend} found the {color} {thing}.",
        ],
        ["{hero} was so {feeling} that {he} gave {friend} a big hug.", '"Thank you, {friend}!" said {hero}.'],
    ],
    # A new friend.
    [
        ["There {he} saw {a_size} {animal}.", "On the way {he} met {a_size} {animal}."],
        ["The {animal} was alone and looked sad.", "The {animal} sat alone and did not play."],
        ['"What is your name?" asked {hero}.', '"Hello, who are you?" {hero} asked.'],
        ['"I am {animal_name}," said the {animal}.', '"My name is {animal_name}," the {animal} said.'],
        ['"I have no one to play with," said {animal_name}.', '"Nobody wants to play with me," said {animal_name}.'],
        ['"Then play with me!" said {hero}.', '"I will be your friend," {hero} said.'],
        [
            "They played with {hero}'s {color} {thing} all day.",
            "{hero} and {animal_name} ran and jumped until the sun went down.",
        ],
        ["From that day on, {hero} and {animal_name} were best friends.", "Now the {animal} was not alone any more."],
    ],
    # A shared meal.
    [
        ["{He} had {food} in {his} bag.", "{His} {family} gave {him} {food} for the way."],
        ["{hero} sat down to eat.", "Soon {he} was hungry and sat down under a tree."],
        ["Then {a_size} {animal} came and looked at {him}.", "Just then {a_color} {animal} came out of the grass."],
        ['"I am so hungry," said the {animal}.', '"Please, may I have a bite?" asked the {animal}.'],
        ["{hero} thought about it.", "{hero} did not know what to do."],
        ['"We can share," {he} said with a smile.', '"Here, half of it is for you," said {hero}.'],
        ["They ate together, and it tasted very good.", "The {animal} ate it all up and was happy."],
        ["{hero} learned that sharing makes food taste better.", "{hero} felt {feeling}, because sharing is kind."],
    ],
    # A fear overcome.
    [
        ["{hero} was brave, but {he} was afraid of {fear}.", "There was one thing {he} did not like: {fear}."],
        ["{friend} was there too and called for help.", 'Then {he} heard {friend} call, "Help me!"'],
        [
            "{friend}'s {color} {thing} was stuck, and {friend} could not get it.",
            "{friend} had lost {a_color} {thing} and was too small to get it.",
        ],
        ["{hero} thought of {fear} and began to shake.", "{hero} wanted to run away from {fear}."],
        ["But {he} took a deep breath and went on.", '"I can do it," {he} said, and {he} did not stop.'],
        [
            "Step by step {hero} came closer, and then {he} had the {thing}.",
            "{hero} was quick, and soon the {thing} was in {his} hand.",
        ],
        ['"You are so brave!" said {friend}.', '"Thank you," {friend} said. "You were not afraid!"'],
        [
            "{hero} was {feeling}. {He} was not afraid of {fear} any more.",
            "Now {hero} knew that being brave means to try.",
        ],
    ],
    # Building together.
    [
        ["{He} wanted to make {a_size} {thing}.", '"I want to make {a_color} {thing}," {he} said.'],
        ["{friend} wanted to help {him}.", "{friend} came along and asked to help."],
        ["First they made it too {wrong}.", "But the first {thing} was too {wrong}."],
        ['"It is not good," said {hero} and was sad.', "{hero} wanted to stop and go home."],
        ['"Do not give up," said {friend}. "Let us try again."', '"We can try again," {friend} said.'],
        [
            "They worked all day, and {his} {family} brought them {food}.",
            "They tried again and again until the sun went down.",
        ],
        ["At last the {color} {thing} was done.", "Then the {thing} was ready, and it was {color} and pretty."],
        ["{hero} and {friend} were very {feeling}.", '"We did it!" they both said.'],
    ],
    # Telling the truth.
    [
        [
            "{His} {family} had {a_color} {thing} at home.",
            "At home there was {a_color} {thing} that {his} {family} loved.",
        ],
        ["{hero} played with it, and it fell down and broke.", "One time {he} ran too fast and broke the {thing}."],
        ["{hero} was scared. {He} hid the {thing} under the bed.", '"Oh no!" said {hero}, and {he} hid the {thing}.'],
        ['Soon {his} {family} asked, "Where is my {thing}?"', "Then {his} {family} came and looked for the {thing}."],
        ["{hero} did not say a word at first.", "{hero} looked at the floor."],
        ['"I broke it," {he} said. "I am sorry."', "Then {he} told the truth and said sorry."],
        ["{His} {family} was not angry.", '"Thank you for telling me the truth," said {his} {family}.'],
        [
            "Together they fixed the {thing}, and it was as good as new.",
            "{hero} was {feeling} that {he} had told the truth.",
        ],
    ],
]

ENDINGS = [
    "Then they went home and ate {food}.",
    "When the sun went down, {hero} went home and slept well.",
    "It was the best day ever.",
    "And they all lived happily.",
    "{hero} told {his} {family} all about it.",
    "The end.",
]


def demo_story(seed: int, index: int) -> str:
    """Return story `index` of the corpus `seed`: 60 to 150 words of ASCII."""
    rng = random.Random(f"{seed}/{index}")  # a string seeds the same generator on every platform
    cast = _cast(rng)
    plot = rng.choice(PLOTS)
    words = {
        **cast.__dict__,
        "He": cast.he.capitalize(),
        "His": cast.his.capitalize(),
        "kid": "girl" if cast.he == "she" else "boy",
        "a_size": _article(cast.size),
        "a_color": _article(cast.color),
        "wrong": rng.choice(["big", "small", "weak"]),
    }
    parts = [*OPENINGS, *plot, [rng.choice(ENDINGS)]]
    sentences = [rng.choice(wordings).format(**words) for wordings in parts]
    # Two or three paragraphs, as in TinyStories.
    cuts = {2, rng.randrange(4, 8)}
    text = "".join(("\n" if i in cuts else " ") + sentence for i, sentence in enumerate(sentences))
    return text.strip()


def demo_stories(count: int, seed: int = 0) -> Iterator[str]:
    """Yield the first `count` stories of the corpus `seed`."""
    return (demo_story(seed, index) for index in range(count))


@dataclass(frozen=True)
class DemoSegment(Segment):
    """Gives the stories [start, stop) of the corpus `seed`."""

    start: int
    stop: int
    seed: int

    @property
    def size(self) -> int:
        """The number of stories."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"demo story {self.start}"

    def fingerprint(self) -> str:
        """Return the seed and the range."""
        return f"demo/{self.seed}/{self.start}-{self.stop}"

    def stories(self, counts: ReadCounts) -> Iterator[str]:
        """Yield the stories."""
        for index in range(self.start, self.stop):
            story = demo_story(self.seed, index)
            counts.documents += 1
            counts.bytes_in += len(story)
            yield story


def demo_source(config: PrepareConfig) -> Source:
    """Make the corpus of `seed=` with `num_stories=` stories; the first fiftieth is for validation.

    Raises:
        UserError: there are too few stories.
    """
    if config.num_stories < 2:
        raise UserError(f"num_stories={config.num_stories}: at least 2, one for validation and one for training")
    validation = max(1, int(config.num_stories * VALIDATION_SHARE))
    ranges = [(0, validation), (validation, config.num_stories)]
    shards = numbered([[DemoSegment(start, stop, config.seed)] for start, stop in ranges])
    return Source(f"demo/{config.seed}/{config.num_stories}", shards, vocab_size=VOCAB_SIZE)
