"""Ordinary prose for the demo tasks: short, varied English sentences, many of them with numbers.

A sentence is drawn from templates with a random generator, so the same generator state gives the
same text. Knows nothing about keys, questions, tokenizers or models.
"""

from __future__ import annotations

import random

PLACES = (
    "harbour mill tower garden bridge library bakery station market chapel castle museum stable "
    "school theatre lighthouse brewery orchard cellar workshop barn village palace tavern dock "
    "quarry forge abbey hospital factory greenhouse vineyard monastery observatory warehouse "
    "windmill cottage fortress dairy foundry kitchen attic canal marina pavilion fountain gallery "
    "archive laboratory nursery sawmill smithy courthouse townhall boathouse granary cloister "
    "ferry inn aqueduct gatehouse cemetery playground stadium tannery"
).split()
"""Nouns for places; the multi-key task names its keys after them."""

PEOPLE = (
    "farmer baker sailor teacher doctor painter miller carpenter fisherman gardener shepherd "
    "weaver captain merchant potter librarian blacksmith musician postman traveller guard nurse "
    "student tailor cook innkeeper widow clerk pilot mason"
).split()

THINGS = (
    "boat lamp basket letter blanket wheel clock ladder bottle table rope kettle mirror carpet "
    "candle hammer barrel chair map coat bell book cart drum saddle bucket violin lantern pot "
    "curtain parcel statue stove bench compass"
).split()

ADJECTIVES = (
    "old small quiet heavy bright wooden green narrow broken clean cold distant empty famous "
    "gentle grey hidden large lonely modern muddy pale proud rusty shallow silver simple "
    "steep strange warm yellow blue tired young cheerful patient"
).split()

VERBS = (
    "repaired carried painted found sold borrowed cleaned lost moved bought brought hid kept left "
    "measured noticed opened polished wrapped remembered counted drew mended shared"
).split()

TIMES = (
    "in the morning|after lunch|before sunset|on Monday|on Friday|last winter|every evening|"
    "at noon|during the storm|in early spring|at midnight|on the first day|in summer|a week later|"
    "without a word|for the second time|as usual|in the rain|by chance|with great care|"
    "to everyone's surprise|in the end|once again|before the meeting|when the bells rang"
).split("|")

MONTHS = "January March April May June July August October November December".split()

WEATHER = "rain snow fog wind sunshine thunder hail frost mist drizzle".split()

_TEMPLATES = (
    "The {adj} {person} {verb} the {thing} {time}.",
    "Near the {place} stood a {adj} {thing}.",
    "{Time} the {person} walked to the {place}.",
    "A {person} from the {adj} {place} {verb} a {thing}.",
    "Nobody at the {place} knew why the {thing} was so {adj}.",
    "The {person} and the {person2} met at the {place} {time}.",
    "There was {weather} over the {place} {time}.",
    "{Time} the {thing} was still {adj}, but the {person} did not mind.",
    "The road from the {place} to the {place2} is {adj} and {adj2}.",
    "Behind the {place} the {person} {verb} a {adj} {thing}.",
    "The {person} said that the {thing} was {adj}.",
    "People talk about the {weather} and about the {adj} {place}.",
    "What the {person} liked most was the {adj} {place}.",
    "The {thing} of the {person} is {adj}.",
)

# Numbers of every length, five digits among them, so that digits alone never give a key away.
_NUMBER_TEMPLATES = (
    "In {year} the {person} {verb} {count} of them.",
    "The {place} was built in {year} and is {count} feet high.",
    "Invoice {five} for the {thing} was paid {time}.",
    "The {person} paid {price} coins for the {adj} {thing}.",
    "The ticket number is {five}.",
    "About {thousands} people came to the {place} in {month}.",
    "The number of the {thing} is {five}.",
    "On {month} {day} the {weather} lasted {count} hours.",
    "The {place} is {price} miles from the {place2}.",
    "Parcel {five} was left at the {place} {time}.",
    "There are {count} steps from the {place} to the {place2}.",
    "Please call {phone} and ask for the {person}.",
)

NUMBER_SHARE = 0.3
"""Share of sentences that hold a number."""


def sentence(rng: random.Random) -> str:
    """One sentence of prose, with a number in three of ten."""
    templates = _NUMBER_TEMPLATES if rng.random() < NUMBER_SHARE else _TEMPLATES
    time = rng.choice(TIMES)
    place, place2 = rng.sample(PLACES, 2)
    person, person2 = rng.sample(PEOPLE, 2)
    adj, adj2 = rng.sample(ADJECTIVES, 2)
    return rng.choice(templates).format(
        place=place,
        place2=place2,
        person=person,
        person2=person2,
        thing=rng.choice(THINGS),
        adj=adj,
        adj2=adj2,
        verb=rng.choice(VERBS),
        time=time,
        Time=time[0].upper() + time[1:],
        weather=rng.choice(WEATHER),
        month=rng.choice(MONTHS),
        day=rng.randint(1, 28),
        year=rng.randint(1500, 2020),
        count=rng.randint(2, 99),
        price=rng.randint(100, 9999),
        thousands=rng.randint(1000, 99999),
        five=rng.randint(10000, 99999),
        phone=rng.randint(100000, 999999),
    )
