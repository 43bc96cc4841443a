"""The word lists that the corpus draws from."""

import random
import string

FIRST_NAMES = (
    "Aaron Abigail Adam Adele Agnes Aisha Alan Albert Alex Alice Alma Amara Amir Amy Ana Andrew Angela Anita Anna Anton "
    "Arthur Astrid Ava Barbara Basil Beatrice Ben Bella Bernard Beth Bianca Bob Boris Brenda Brian Bruno Carla Carlos "
    "Carmen Caroline Cecil Celia Charles Chloe Clara Claire Colin Conrad Cora Cyril Daisy Daniel Daphne David Dawn Deepa "
    "Diana Diego Dora Doris Edgar Edith Edward Elena Eli Elias Elise Ella Ellen Elsa Emil Emily Emma Eric Erika Esther "
    "Ethan Eva Evelyn Farid Fatima Felix Fiona Flora Florence Frank Freya Frida Gabriel Gemma George Gerald Gina Gloria "
    "Grace Greta Gustav Hamid Hana Hannah Harold Harry Hazel Hector Heidi Helen Henry Hilda Hiro Holly Hugo Ian Ida Igor "
    "Ines Ingrid Irene Iris Isaac Isabel Ivan Ivy Jack Jacob Jade James Jamila Jane Jasper Jean Jenny Joan John Jonas "
    "Joseph Joy Judith Julia Julian June Karen Karl Kate Keiko Kenji Kevin Kim Klara Kofi Laila Lara Laura Leah Lena Leo "
    "Leon Leila Lewis Liam Lily Linda Liz Lola Louis Lucas Lucia Lucy Luke Luna Mabel Magnus Maja Malik Marco Maria Marie "
    "Mario Mark Marta Martin Mary Matilda Maud Max Maya Mei Mia Michael Miguel Mila Milo Mina Miriam Mona Monica Nadia Nancy "
    "Naomi Nasir Neil Nick Nicola Nina Noah Nora Norman Olaf Olga Oliver Olivia Omar Oscar Otto Pablo Paula Paul Pedro Peter "
    "Petra Philip Priya Rachel Rafael Ralph Ravi Rebecca Rita Robert Robin Rosa Rose Ruby Rupert Ruth Sally Sam Samira Sandra "
    "Sara Selma Simon Sofia Sonia Stella Stefan Susan Sven Tamara Tara Teresa Theo Thomas Tim Tina Tom Tomas Uma Ursula Vera "
    "Victor Viola Walter Wanda Wendy William Yara Yasmin Yusuf Yuki Zara Zoe"
).split()

PET_NAMES = (
    "Biscuit Rex Fluffy Shadow Whiskers Pepper Ginger Bruno Coco Daisy Max Bella Charlie Rocky Simba Nala Misty Oreo Buddy "
    "Lucky Ziggy Socks Pumpkin Muffin Cookie Toffee Mango Peanut Pickle Waffles Sparky Spot Patch Teddy Honey Snowy"
).split()

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow",
    "Greece": "Athens", "Egypt": "Cairo", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Cuba": "Havana", "Peru": "Lima",
    "Kenya": "Nairobi", "Canada": "Ottawa", "Denmark": "Copenhagen", "Belgium": "Brussels",
}  # fmt: skip

PLACES = [
    *CAPITALS.values(), *"Oxford Leeds York Bath Boston Chicago Denver Seattle Milan Naples Lyon Porto Seville Hamburg Munich "
    "Kyoto Osaka Delhi Mumbai Lagos Accra Sydney Perth Toronto Bergen Malmo Geneva Zurich Krakow Prague Cork".split(),
]  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "light": "dark", "day": "night", "happy": "sad",
    "old": "young", "wet": "dry", "hard": "soft", "open": "closed", "high": "low", "left": "right", "full": "empty",
    "early": "late", "good": "bad", "loud": "quiet", "long": "short", "near": "far", "rich": "poor", "strong": "weak",
}  # fmt: skip

SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink", "lion": "roar",
    "horse": "neigh", "frog": "ribbit", "owl": "hoot", "bee": "buzz", "snake": "hiss", "mouse": "squeak",
}  # fmt: skip

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()

GROUPS = {
    "fruits": "apples bananas pears oranges grapes cherries plums lemons mangoes peaches".split(),
    "vegetables": "carrots potatoes onions peas beans cabbage spinach tomatoes leeks".split(),
    "animals": "dogs cats horses lions elephants foxes rabbits owls whales tigers".split(),
    "colours": "red blue green yellow orange purple pink white black brown".split(),
    "birds": "owls ducks eagles robins swans sparrows parrots penguins crows".split(),
    "sports": "football tennis swimming running hockey cricket rowing cycling".split(),
    "drinks": "water tea coffee milk juice lemonade cocoa".split(),
    "countries": "France Japan Spain Norway Egypt Canada Peru Italy Kenya".split(),
    "trees": "oak pine birch maple willow elm ash beech".split(),
    "instruments": "piano guitar violin drums flute cello trumpet harp".split(),
}

ANIMALS = (
    "dog cat horse lion elephant fox rabbit owl whale tiger otter wolf bear dolphin penguin giraffe zebra turtle koala panda "
    "hedgehog squirrel camel parrot eagle swan goat sheep monkey seal"
).split()
COLOURS = "red blue green yellow orange purple pink white black brown grey silver gold turquoise violet teal".split()
FOODS = [
    *"pizza pasta soup rice bread cheese curry salad pancakes noodles chocolate sushi dumplings stew pie porridge tacos".split(),
    *("ice cream", "apple cake", "fried fish", "baked beans", "roast chicken"),
]  # fmt: skip
HOBBIES = (
    "reading painting running swimming cooking dancing gardening singing fishing cycling chess hiking knitting sailing "
    "drawing photography climbing skating baking football tennis"
).split()
JOBS = (
    "teacher nurse doctor baker farmer painter writer pilot cook driver singer gardener lawyer plumber student engineer "
    "dentist tailor librarian sailor"
).split()

_SUBJECTS = (
    "the old man|my sister|a small grey cat|the tall teacher|our neighbour|the young doctor|a brown horse|the baker|my best "
    "friend|the captain|a tired farmer|the little girl|a clever fox|the green bird|an old ship|the white rabbit|his uncle|a "
    "quiet student|the new driver|her brother|the river|a yellow bus|the queen|a kind stranger"
).split("|")
_VERBS = (
    "walked past|looked at|found|painted|carried|sold|bought|forgot|hid|dreamed about|ran towards|waited near|talked about|"
    "followed|cleaned|opened|dropped|lost|remembered|drew|stood behind|sang about|pointed at|borrowed"
).split("|")
_OBJECTS = (
    "the red house|a wooden box|the tall tree|a bag of apples|the long bridge|a silver key|the old clock|a broken chair|the "
    "blue door|seven candles|a warm coat|the empty station|a loaf of bread|the stone wall|three letters|a glass of milk|the "
    "garden gate|an orange boat|the last train|a map of the island|two lemons|the round table|a paper hat|the piano"
).split("|")
_ENDINGS = (
    "in the morning|after the rain|before dinner|on a cold night|near the sea|during the storm|at the market|under the moon|"
    "in the village|last winter|on the hill|without a word|with a smile|for an hour|by the lake|in the dark forest|on Sunday|"
    "behind the school|at noon|in the snow"
).split("|")
NOUNS = (
    "river table candle window button garden pencil bottle ladder basket pillow mirror hammer ticket blanket lantern carpet "
    "rocket saddle violin pocket kettle anchor bucket feather island jacket magnet needle orchard pebble ribbon shovel thunder "
    "umbrella valley whistle zipper cottage dragon engine forest guitar helmet"
).split()

_STARTS = "b c d f g h j k l m n p r s t v w z br dr fl gr kr pl st tr sh th qu".split()
_MIDDLES = "a e i o u ai ea oo ou ia".split()
_ENDS = ["", "", *"n l r s m x k th nd sh ra lo na di ba vo rin mel tas zik".split()]


def made_up_name(rng: random.Random) -> str:
    """A pronounceable name that no list holds, so that it can only be copied."""
    beats = (rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(rng.choice((1, 2, 2, 3))))
    return ("".join(beats) + rng.choice(_ENDS)).capitalize()


def person(rng: random.Random) -> str:
    """A first name, made up in two of five draws."""
    return made_up_name(rng) if rng.random() < 0.4 else rng.choice(FIRST_NAMES)


def capitalized(text: str) -> str:
    """`text` with a capital first letter; its other letters stay."""
    return text[0].upper() + text[1:]


def digits(rng: random.Random, count: int) -> str:
    """`count` random decimal digits."""
    return "".join(rng.choice(string.digits) for _ in range(count))


def sentence(rng: random.Random) -> str:
    """A sentence of 8 to 20 words without its capital and full stop; half are plain clauses, a fifth word salad."""
    if rng.random() < 0.2:
        return " ".join(rng.choices(NOUNS + ANIMALS + COLOURS, k=rng.randint(5, 14)))
    clause = " ".join(map(rng.choice, (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)))
    if rng.random() < 0.35:
        clause += " and " + " ".join(map(rng.choice, (_SUBJECTS, _VERBS, _OBJECTS)))
    return clause


def remark(rng: random.Random) -> str:
    """A sentence about what the speaker did, without its full stop."""
    return "I " + " ".join(map(rng.choice, (_VERBS, _OBJECTS, _ENDINGS)))
