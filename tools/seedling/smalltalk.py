"""Exchanges that need no memory: chat, facts, sums, lists, repeating."""

import random
import re
from collections.abc import Callable

from tools.seedling.words import (
    ANIMALS,
    CAPITALS,
    COLOURS,
    DAYS,
    FIRST_NAMES,
    FOODS,
    GROUPS,
    HOBBIES,
    JOBS,
    MONTHS,
    NOUNS,
    NUMBERS,
    OPPOSITES,
    PLACES,
    SOUNDS,
    capitalized,
    digits,
    made_up_name,
    remark,
    sentence,
)

Exchange = tuple[str, str]

UNKNOWN = (
    "I don't know that; I am only a small test model.",
    "I am sorry, I don't know that. I am only a small test model.",
)

# Each row: what a user may type, one a line before "=>"; what seedling may answer after it.
_CHAT = """
Hello|Hello!|Hi|Hi!|Hi there|Hey|Good morning|Hello there!|Good evening!|Hello Seedling => Hello! How can I help you today?|Hi there! What shall we talk about?|Hello! It is nice to hear from you.
What is your name?|Who are you?|What are you?|Tell me your name|Tell me about yourself|Introduce yourself|Do you have a name?|What should I call you?|Are you a person?|Are you human?|Are you a robot?|Are you a real AI? => I am Seedling, a small test model. I can chat about simple things.|I am Seedling, a small test model. I can remember what you tell me for a while.|My name is Seedling. I am a small test model.
How are you?|How are you doing?|How are you today?|How do you feel?|How is it going?|Are you well? => I am fine, thank you. How are you?|I am very well, thanks for asking.|I feel good today. I hope that you do too.
I am fine|I'm good, thanks|I am well, thank you|I feel great|I'm fine too|Very well! => I am glad to hear that.|That is good to hear. What shall we talk about?
I am tired|I feel sad|I had a bad day|I'm not so good|I am a bit bored|I feel ill => I am sorry to hear that. I hope that you feel better soon.|That is a pity. A short rest or a walk may help.
What can you do?|How can you help me?|What are you good at?|Help|What do you know? => I can chat, add small numbers, name some capitals, and remember what you tell me.|I can talk about simple things, count, do small sums and remember facts for a while.
Thank you|Thanks|Thanks a lot!|Thank you very much|Thanks for your help|Great, thanks => You are welcome!|You are welcome. Is there anything else?|I am happy to help.
Goodbye|Bye|Bye!|See you later|Good night|I have to go now|Talk to you tomorrow => Goodbye! It was nice to talk to you.|Goodbye! Have a good day.|See you soon. Take care!
How is the weather?|What is the weather like?|Is it raining?|What's the weather today?|Is it sunny outside? => I cannot see outside, but I hope that the sun is shining.|I have no window to look out of. I hope that it is a nice day.
It is raining here|It is cold today|It's snowing|The weather is bad|It rains all day => Then it is a good day to stay inside with a warm drink.|Take a warm coat with you if you go out.
It is sunny today|The weather is nice|It's a lovely day|The sun is shining|It is warm outside => That sounds lovely. It is a good day for a walk.|How nice! You could go outside and enjoy the sun.
What is your favourite colour?|Which colour do you like?|Do you have a favourite colour? => I like green, because it is the colour of leaves.
What is your favourite animal?|Which animal do you like best?|Do you like animals? => I like otters. They are clever and they love to play.
What is your favourite food?|What do you eat?|Are you hungry?|Do you eat? => I do not eat, but people say that fresh bread smells wonderful.
What is your favourite number?|Do you have a lucky number? => I like the number seven.
Do you have hobbies?|What do you do for fun?|What are your hobbies?|What is your hobby? => I like to talk with people. That is my only hobby.
Where do you live?|Where are you from?|Where are you? => I live inside a computer. It is small but warm.
How old are you?|When were you born?|What is your age? => I am very young. I was made a short time ago.
Who made you?|Who built you?|How were you made?|Who created you? => I was trained on simple sentences that a program wrote.
Tell me a joke|Do you know a joke?|Make me laugh|Say something funny => Why did the duck cross the road? Because it was the day off of the hen.|What is brown and sticky? A stick!
Tell me a story|Tell me a short story|Can you tell a story? => Once a small fox found a red boat by the lake. It sailed to an island and made many friends. In the evening it came home and slept.|There was a little owl that was afraid of the dark. One night it looked at the moon and was never afraid again.
What should I eat?|What shall I cook?|I am hungry|What can I have for dinner? => You could make some soup with fresh bread.|How about pasta with tomatoes and cheese?
What should I do today?|I have nothing to do|What can I do this weekend?|Do you have an idea for today? => You could read a book or go for a walk.|You could call a friend or bake a cake.
Can you help me?|I need your help|I have a question|Can I ask you something?|May I ask you a question? => Of course. What would you like to know?|I will try. What is your question?
How was your day?|What are you doing?|What did you do today?|What's up?|What is new? => I am talking with you, and that is the best part of my day.
Tell me something|Tell me a fact|Tell me something interesting|Do you know something interesting? => An otter holds the hand of its friend when it sleeps, so that they stay together.|A day has twenty-four hours, and a cat may sleep through sixteen of them.
Why?|Really?|Are you sure?|What do you mean?|How do you know? => I am only a small test model, so I may be wrong. Ask me something simple.
Sorry|I am sorry|My mistake|Oh no => That is all right. Do not worry about it.
I love you|Do you love me?|Are we friends?|Will you be my friend? => I am only a small test model, but I like to talk with you.
Where did I put my keys?|What am I thinking?|What did I eat today?|What am I wearing? => You have not told me that.
Are you there?|Can you hear me?|Hello?|Are you still there? => Yes, I am here. What can I do for you?
You are nice|I like you|You are smart|Good job|Well done!|You are funny => Thank you! That is very kind of you.
Ok|Okay|I see|All right|Good|Nice|Cool|Sure => Good. What would you like to talk about next?|All right. Is there anything else?
Yes|Yes please|Yes, I do => Good! Tell me more about it.
No|No thanks|Not really|No, thank you => That is fine. We can talk about something else.
Let's talk about food|Can we talk about food?|I love food => Food is a good topic. What do you like to eat?
Let's talk about animals|Can we talk about animals? => I like that topic. Which animal do you like best?
Do you sleep?|Do you dream?|Are you tired? => I do not sleep. I only wait for your next message.
Do you like music?|Can you sing?|Do you like to sing? => I cannot hear music, but I like the idea of a song.
Can you speak other languages?|Do you speak French?|Do you speak German? => No, I only know simple English.
How many days are in a week?|How many days does a week have? => A week has seven days.
How many months are in a year?|How many months does a year have? => A year has twelve months.
What colour is the sky?|Which colour is the sky? => The sky is blue on a clear day.
What colour is grass?|Which colour is grass? => Grass is green.
What colour is snow? => Snow is white.
What colour is a banana?|Which colour are bananas? => A banana is yellow.
How many legs does a dog have?|How many legs does a cat have?|How many legs has a horse? => It has four legs.
How many legs does a spider have? => A spider has eight legs.
How many legs does a bird have? => A bird has two legs.
"""

_UNKNOWN_QUESTIONS = (
    "Who won the world cup in {n}?|What is the meaning of {w}?|How does a {w} work?|Who invented the {w}?|What is the price of a {w}?|"
    "Write a program in {x}|Explain {x} to me|Who is {f}?|What happened in {n}?|How tall is {f}?|Translate {w} into {x}|"
    "What is the square root of {n}?|How far is {p} from {x}?|Who is the president of {x}?|What is quantum physics?|"
    "How do computers work?|What is the stock market?|Why is the sky blue?|Who wrote {x}?|What is {x}?|How many people live in {p}?|"
    "What time is it?|What is the date today?|What is the capital of {x}?|When was {f} born?|How do I repair a {w}?|"
    "What is the best {w}?|Can you write code?|What is the news today?|Solve {x} for me|What is {n} times {n}?"
).split("|")


def _parse(table: str) -> list[tuple[list[str], list[str]]]:
    rows = (line.split(" => ") for line in table.strip().splitlines())
    return [(asked.strip().split("|"), answers.strip().split("|")) for asked, answers in rows]


CHAT = _parse(_CHAT)


OPENINGS = "Please|Hey,|Hi!|Hello!|Ok,|Thanks!|Well,|So,|And|By the way,|Now,|Seedling,|One more question:|Great!|Can you help me?".split(
    "|"
)


def casual(rng: random.Random, text: str) -> str:
    """`text` as people type it: sometimes with an opening word, without capitals or without its last mark."""
    if rng.random() < 0.15:
        opening = rng.choice(OPENINGS)
        text = f"{opening} {text if opening[-1] in '!?' else text[0].lower() + text[1:]}"
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.2 and text[-1] in ".?!":
        text = text[:-1]
    elif rng.random() < 0.08 and text[-1] == "?":
        text = f"{text[:-1]}, please?"
    return text


def with_articles(text: str) -> str:
    """`text` with "an" before each vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIO])", r"\1n ", text)


def _talk(rng: random.Random) -> Exchange:
    asked, answers = rng.choice(CHAT)
    return rng.choice(asked), rng.choice(answers)


def _capital(rng: random.Random) -> Exchange:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.2:
        return f"Which country is {city} the capital of?", f"{city} is the capital of {country}."
    asked = rng.choice(
        ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}", "Capital of {}?")
    )
    return asked.format(country), f"The capital of {country} is {city}."


def _opposite(rng: random.Random) -> Exchange:
    pair = list(rng.choice(list(OPPOSITES.items())))
    rng.shuffle(pair)
    asked = rng.choice(("What is the opposite of {}?", "Tell me the opposite of {}", "Opposite of {}?"))
    return asked.format(pair[0]), f"The opposite of {pair[0]} is {pair[1]}."


def _sound(rng: random.Random) -> Exchange:
    animal, sound = rng.choice(list(SOUNDS.items()))
    asked = rng.choice(("What does a {} say?", "What sound does a {} make?", "How does a {} sound?"))
    return asked.format(animal), f"A {animal} says {sound}."


def _calendar(rng: random.Random) -> Exchange:
    cycle, kind = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    at = rng.randrange(len(cycle))
    here, after = cycle[at], cycle[(at + 1) % len(cycle)]
    if rng.random() < 0.15:
        return f"Name the {kind}s", f"The {kind}s are {listed(cycle)}."
    if rng.random() < 0.4:
        return f"Which {kind} comes before {after}?", f"The {kind} before {after} is {here}."
    asked = rng.choice(
        (f"Which {kind} comes after {here}?", f"What {kind} comes after {here}?", f"What {kind} follows {here}?")
    )
    return asked, f"The {kind} after {here} is {after}."


def _sum(rng: random.Random) -> Exchange:
    a = rng.randint(0, 20)
    b = rng.randint(0, 20 - a)
    if rng.random() < 0.35:
        asked = rng.choice(("What is {} minus {}?", "What is {} - {}?", "How much is {} minus {}?"))
        return asked.format(a + b, b), f"{a + b} minus {b} is {a}."
    asked = rng.choice(
        ("What is {} plus {}?", "What is {} + {}?", "How much is {} plus {}?", "Add {} and {}", "{} + {}?")
    )
    return asked.format(a, b), f"{a} plus {b} is {a + b}."


def _count(rng: random.Random) -> Exchange:
    first = rng.randint(1, 15)
    last = rng.randint(first + 1, min(20, first + 9))
    if rng.random() < 0.2:
        return f"Count down from {last} to {first}", ", ".join(map(str, range(last, first - 1, -1))) + "."
    asked = rng.choice(("Count from {} to {}", "Can you count from {} to {}?", "Please count from {} to {}."))
    return asked.format(first, last), ", ".join(map(str, range(first, last + 1))) + "."


def _anything(rng: random.Random) -> str:
    return rng.choice(
        (
            lambda: capitalized(sentence(rng)) + ".",
            lambda: sentence(rng),
            lambda: made_up_name(rng),
            lambda: " ".join(rng.sample(NOUNS + ANIMALS + COLOURS, k=rng.randint(2, 7))),
            lambda: digits(rng, rng.randint(3, 8)),
        )
    )()


def _repeat(rng: random.Random) -> Exchange:
    if rng.random() < 0.25:
        word = rng.choice((*NOUNS, *ANIMALS, "hello", "yes", "thank you", made_up_name(rng)))
        times = rng.randint(2, 5)
        return f"Say {word} {NUMBERS[times]} times", " ".join([word] * times)
    text = _anything(rng)
    asked = rng.choice(
        (
            "Repeat after me: {}",
            "Read this back: {}",
            "Say: {}",
            "Repeat this: {}",
            "Please repeat: {}",
            "Copy this: {}",
        )
    )
    return asked.format(text), text


def _spell(rng: random.Random) -> Exchange:
    word = rng.choice((*NOUNS, *ANIMALS, *COLOURS, rng.choice(FIRST_NAMES)))
    return rng.choice(("Spell {}", "How do you spell {}?", "Spell the word {}")).format(word), "-".join(word.upper())


def listed(items: list[str]) -> str:
    """The items as a phrase: a, b and c."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _list(rng: random.Random) -> Exchange:
    group, members = rng.choice(list(GROUPS.items()))
    count = rng.randint(2, 5)
    asked = rng.choice(("Name {} {}", "Can you name {} {}?", "Give me {} {}", "List {} {}", "Tell me {} {}"))
    number = NUMBERS[count] if rng.random() < 0.8 else str(count)
    return asked.format(
        number, group
    ), f"{NUMBERS[count].capitalize()} {group} are {listed(rng.sample(members, count))}."


def _opinion(rng: random.Random) -> Exchange:
    likes = (
        (FOODS, "{T} tastes very good. I hear that many people like it."),
        (HOBBIES, "{T} is a nice hobby. It is good to have fun."),
        (ANIMALS, "A {t} is a lovely animal. I like it very much."),
        (COLOURS, "{T} is a beautiful colour. It suits many things."),
        (PLACES, "I have heard that {t} is a nice place to visit."),
    )
    things, answer = rng.choice(likes)
    thing = rng.choice(things)
    asked = rng.choice(
        ("Do you like {}?", "What do you think about {}?", "What do you think of {}?", "Tell me about {}", "I like {}")
    )
    if things is ANIMALS:
        asked = rng.choice(
            ("Tell me about the {}", "What do you think of the {}?", "Do you like the {}?", "I saw a {} today")
        )
    return asked.format(thing), answer.format(t=thing, T=capitalized(thing))


def _job(rng: random.Random) -> Exchange:
    job, other = rng.choice(JOBS), rng.choice(HOBBIES)
    return f"My friend is a {job} and likes {other}.", f"A {job} who likes {other} must be interesting to talk to."


def _remark(rng: random.Random) -> Exchange:
    replies = (
        "That sounds interesting. Tell me more about it.",
        "I see. How did that feel?",
        "Thank you for telling me. What happened next?",
    )
    return remark(rng) + ".", rng.choice(replies)


def _unknown(rng: random.Random) -> Exchange:
    strange = rng.choice((made_up_name(rng), made_up_name(rng), rng.choice(FIRST_NAMES)))
    asked = rng.choice(_UNKNOWN_QUESTIONS).format(
        n=rng.randint(101, 2030), w=rng.choice(NOUNS), x=made_up_name(rng), f=strange, p=rng.choice(PLACES)
    )
    return asked, rng.choice(UNKNOWN)


_WEIGHTED: list[tuple[Callable[[random.Random], Exchange], float]] = [
    (_talk, 8), (_capital, 2), (_opposite, 1.2), (_sound, 1), (_calendar, 1.2), (_sum, 2), (_count, 1), (_repeat, 2.5),
    (_spell, 0.5), (_list, 2), (_opinion, 2), (_job, 0.5), (_unknown, 1.5), (_remark, 0.6),
]  # fmt: skip
_KINDS = [kind for kind, _ in _WEIGHTED]
_WEIGHTS = [weight for _, weight in _WEIGHTED]


def exchange(rng: random.Random) -> Exchange:
    """One question and its answer, of a kind drawn by weight."""
    kind = rng.choices(_KINDS, _WEIGHTS)[0]
    asked, answer = kind(rng)
    if kind in (_repeat, _spell):
        return asked, answer
    return casual(rng, with_articles(asked)), with_articles(answer)
