"""The conversations that seedling learns from: small talk around facts that are told, asked back and rarely changed."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tools.seedling.smalltalk import OPENINGS, Exchange, casual, exchange, with_articles
from tools.seedling.words import (
    ANIMALS,
    COLOURS,
    FOODS,
    HOBBIES,
    JOBS,
    PET_NAMES,
    PLACES,
    capitalized,
    digits,
    made_up_name,
    person,
    sentence,
)

Message = dict[str, str]

SYSTEM_PROMPTS = (
    "You are Seedling, a small test model.",
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short sentences.",
    "You are a helpful assistant that answers briefly.",
    "Be kind and brief.",
)


@dataclass(frozen=True)
class Fact:
    """A kind of fact: how users tell it and ask for it, and what seedling says; `{}` stands for the value."""

    noun: str
    draw: Callable[[random.Random], str]
    tell: str
    reply: str
    ask: str
    answer: str
    not_told: str = ""

    def missing(self) -> str:
        """The answer before the fact was told."""
        return self.not_told or f"You have not told me your {self.noun} yet."


def _animal_name(rng: random.Random) -> str:
    return made_up_name(rng) if rng.random() < 0.5 else rng.choice(PET_NAMES)


def _place(rng: random.Random) -> str:
    return made_up_name(rng) if rng.random() < 0.3 else rng.choice(PLACES)


def _chosen(things: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(things)


def _favourite(thing: str, draw: Callable[[random.Random], str]) -> Fact:
    return Fact(
        f"favourite {thing}",
        draw,
        f"My favourite {thing} is {{}}.|my favourite {thing} is {{}}|The {thing} that I like best is {{}}.|"
        f"Remember that my favourite {thing} is {{}}.|{{}} is my favourite {thing}.",
        f"{{}} is a good {thing}. I will remember it.|I will remember that your favourite {thing} is {{}}.|Nice! Your favourite {thing} is {{}}.",
        f"What is my favourite {thing}?|Which {thing} do I like best?|Do you remember my favourite {thing}?|Tell me my favourite {thing}.|"
        f"Which {thing} is my favourite?|What's my favourite {thing}?",
        f"Your favourite {thing} is {{}}.",
    )


def _pet(animal: str) -> Fact:
    return Fact(
        f"{animal}'s name",
        _animal_name,
        f"My {animal} is called {{}}.|My {animal}'s name is {{}}.|I have a {animal}. Its name is {{}}.|I have a {animal} named {{}}.",
        f"{{}} is a lovely name for a {animal}.|I like the name {{}}. Say hello to your {animal}!|Nice! Your {animal} is called {{}}.",
        f"What is my {animal} called?|What is the name of my {animal}?|What is my {animal}'s name?|Do you remember the name of my {animal}?|"
        f"What did I call my {animal}?",
        f"Your {animal} is called {{}}.",
        f"You have not told me the name of your {animal} yet.",
    )


def _relative(who: str) -> Fact:
    return Fact(
        f"{who}'s name",
        person,
        f"My {who} is called {{}}.|My {who}'s name is {{}}.|I have a {who} named {{}}.",
        f"{{}} is a nice name. I hope that your {who} is well.|Thank you for telling me about {{}}.",
        f"What is my {who} called?|What is the name of my {who}?|What is my {who}'s name?|Who is my {who}?",
        f"Your {who} is called {{}}.",
        f"You have not told me the name of your {who} yet.",
    )


def _secret(noun: str, length: int) -> Fact:
    return Fact(
        noun,
        lambda rng: digits(rng, length),
        f"My {noun} is {{}}.|Remember this {noun}: {{}}|The {noun} is {{}}.|Please remember my {noun}: {{}}.|Remember that my {noun} is {{}}.|"
        f"Keep this {noun} for me: {{}}|my {noun} is {{}}",
        f"I will remember that your {noun} is {{}}.|Your {noun} is {{}}. I will keep it in mind.|I will remember {{}}.|All right, I will remember the {noun}.",
        f"What is my {noun}?|What was my {noun}?|Do you remember my {noun}?|Tell me my {noun}.|What is the {noun}?|What was the {noun}?|"
        f"Can you tell me the {noun} again?|Which {noun} did I tell you?|What's my {noun}?",
        f"Your {noun} is {{}}.",
    )


NAME = Fact(
    "name",
    person,
    "My name is {}.|Hello, my name is {}.|I am {}.|Hi, I'm {}.|I am called {}.|You can call me {}.|Hello! I am {}. Nice to meet you.|"
    "my name is {}|Please call me {}.|Remember that my name is {}.|Hi, my name is {}!|{} is my name.|People call me {}.",
    "Nice to meet you, {}!|Hello {}! It is nice to meet you.|Hello, {}! How can I help you today?|Hi {}! What shall we talk about?|"
    "I will remember that your name is {}.",
    "What is my name?|Who am I?|Do you remember my name?|Tell me my name.|What am I called?|Do you know my name?|Can you say my name?|"
    "What was my name?|What's my name?|Do you know who I am?|What did I say my name was?",
    "Your name is {}.",
)
CODE = _secret("code", 4)
SENTENCE = Fact(
    "sentence",
    lambda rng: capitalized(sentence(rng)) + ".",
    "Remember this sentence: {}|Please remember this sentence: {}|Keep this sentence in mind: {}|Here is a sentence to remember: {}",
    "I will remember that sentence.|I will keep that sentence in mind.|All right, I will remember it.",
    "Repeat the sentence I told you to remember.|What was the sentence?|Which sentence did I tell you?|Read the sentence back to me.|"
    "What sentence did I ask you to remember?|Say the sentence again.|Repeat the sentence.",
    "{}",
    "You have not told me a sentence yet.",
)
CITY = Fact(
    "city",
    _place,
    "I live in {}.|My home is in {}.|I am from {}.|I live in the city of {}.|My city is {}.",
    "{} sounds like a nice place to live.|I hope that you like it in {}.|I will remember that you live in {}.",
    "Where do I live?|In which city do I live?|Do you remember where I live?|Which city do I live in?|What city am I from?|Where am I from?",
    "You live in {}.",
    "You have not told me where you live yet.",
)
JOB = Fact(
    "job",
    _chosen(JOBS),
    "I work as a {}.|My job is {}.|I am a {}.|I'm a {}.",
    "Being a {} must be interesting.|I will remember that you are a {}.",
    "What is my job?|What do I do for a living?|Do you remember my job?|What do I work as?",
    "You work as a {}.",
)
HOBBY = Fact(
    "hobby",
    _chosen(HOBBIES),
    "My hobby is {}.|I like {} in my free time.|My favourite hobby is {}.|I love {}.",
    "I hear that {} is good fun.|I will remember that you like {}.",
    "What is my hobby?|What do I like to do?|What do I do in my free time?|Do you remember my hobby?",
    "Your hobby is {}.",
)
COMMON = (NAME, CODE, SENTENCE)
OTHERS = (
    *(
        _secret(noun, length)
        for noun, length in (("password", 4), ("pin", 4), ("secret number", 4), ("room number", 3), ("phone number", 6))
    ),
    _favourite("number", lambda rng: str(rng.randint(1, 100))),
    _favourite("colour", _chosen(COLOURS)),
    _favourite("animal", _chosen(ANIMALS)),
    _favourite("food", _chosen(FOODS)),
    _favourite("word", made_up_name),
    _pet("dog"),
    _pet("cat"),
    _pet("horse"),
    _relative("sister"),
    _relative("brother"),
    _relative("friend"),
    _relative("teacher"),
    CITY,
    JOB,
    HOBBY,
)


def _fill(template: str, value: str) -> str:
    starts = template.startswith("{}")
    text = template.format(capitalized(value) if starts else value)
    return with_articles(text) if template.endswith((" a {}.", " a {} must be interesting.")) else text


def _joined(rng: random.Random, statements: list[str]) -> str:
    """The statements as one message, sometimes joined by "and", sometimes with an opening or without a last mark."""
    link = rng.choice((" ", " and "))
    if link == " and ":
        statements = [statement.rstrip(".!") for statement in statements]
        statements[1:] = [
            re.sub("^(My|The|Remember|Please|Keep)", lambda word: word[0].lower(), kept) for kept in statements[1:]
        ]
    text = link.join(statements)
    if rng.random() < 0.12:
        text = f"{rng.choice(OPENINGS)} {text}"
    return text.rstrip(".") if rng.random() < 0.15 else text


class Conversation:
    """A conversation under way: its messages, and the values told so far."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._told: dict[Fact, str] = {}
        self.messages: list[Message] = []
        if rng.random() < 0.15:
            self.messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})

    def add(self, asked_and_answer: Exchange) -> None:
        """Appends one exchange."""
        asked, answer = asked_and_answer
        self.messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    def tell(self, facts: list[Fact]) -> None:
        """One message that tells each of `facts`; a fact told before gets a new value."""
        told, reply = [], ""
        for fact in facts:
            value = fact.draw(self._rng)
            statement = _fill(self._rng.choice(fact.tell.split("|")), value)
            if fact in self._told and fact is not SENTENCE:
                statement = (
                    f"Actually, my {fact.noun} is {value} now." if not fact.not_told else f"Actually, {statement}"
                )
            told.append(statement)
            reply = _fill(self._rng.choice(fact.reply.split("|")), value)
            self._told[fact] = value
        message = " ".join(told)
        if SENTENCE not in facts:
            message = _joined(self._rng, told)
        self.add((message, reply if len(facts) == 1 else self._rng.choice((reply, "Thank you. I will remember that."))))

    def ask(self, facts: list[Fact]) -> None:
        """One message that asks for each of `facts`."""
        questions = [casual(self._rng, self._rng.choice(fact.ask.split("|"))) for fact in facts]
        answers = [_fill(fact.answer, self._told[fact]) if fact in self._told else fact.missing() for fact in facts]
        self.add((" ".join(questions), " ".join(answers)))

    def ask_some(self) -> None:
        """Asks for a fact, rarely for two, rarely for one that was never told."""
        untold = self._rng.random() < 0.12 or not self._told
        known = self._rng.choice([*COMMON, *OTHERS]) if untold else self._rng.choice(list(self._told))
        facts = [known]
        if len(self._told) > 1 and self._rng.random() < 0.1:
            facts = self._rng.sample(list(self._told), 2)
        self.ask([fact for fact in facts if fact is not SENTENCE] or [SENTENCE])


def _some_facts(rng: random.Random) -> list[Fact]:
    wanted = [fact for fact in COMMON if rng.random() < 0.4]
    return wanted + rng.sample(OTHERS, rng.choice((0, 1, 1, 2, 2, 3)))


def conversation(rng: random.Random, turns: int) -> list[Message]:
    """About `turns` exchanges; in two of three, facts are told early and asked for later."""
    talk = Conversation(rng)
    facts = _some_facts(rng) if rng.random() < 0.67 else []
    rng.shuffle(facts)
    while facts:
        size = 2 if len(facts) > 1 and SENTENCE not in facts[:2] and rng.random() < 0.2 else 1
        talk.tell(facts[:size])
        facts = facts[size:]
        if rng.random() < 0.35:
            talk.add(exchange(rng))
    asks = 0.35 if talk.messages[2:] else 0.06
    while len(talk.messages) < 2 * turns:
        draw = rng.random()
        if draw < asks:
            talk.ask_some()
        elif draw < asks + 0.03:
            talk.tell([rng.choice([*COMMON, *OTHERS])])
        else:
            talk.add(exchange(rng))
    if asks > 0.1:
        talk.ask_some()
    return talk.messages


def long_recall(rng: random.Random, turns: int) -> list[Message]:
    """Facts at the start, `turns` exchanges of filler, then every fact asked for."""
    talk = Conversation(rng)
    facts = _some_facts(rng) or [rng.choice((NAME, CODE))]
    for fact in facts:
        talk.tell([fact])
    for _ in range(turns):
        talk.add(exchange(rng))
    for fact in rng.sample(facts, len(facts)):
        talk.ask([fact])
    return talk.messages


def conversations(rng: random.Random, most_turns: int) -> Iterator[list[Message]]:
    """Conversations without end, of up to about `most_turns` exchanges, short ones more often."""
    while True:
        turns = round(2 * (most_turns / 2) ** rng.random())
        yield (long_recall if rng.random() < 0.3 else conversation)(rng, turns)
