"""Write prose in which facts about people stand, and stand once more some sentences later.

python examples/memory/told_twice.py TEXTS FOLDER                    # TEXTS: what texts.py wrote, for the prose
python recipes/remember.py --text FOLDER --recurring-weight 20 --reconstruct 0

`Mrs. Keller collects stamps.` is told, other sentences follow, and it is told again 6 to 27 sentences later: where the
window is shorter than that, the words it ends with can be known from memory alone. People, what is told of them and how
it is put are not those of `examples/remembering.py`, so that what is asked there was not learnt here.
"""

import heapq
import random
import re
import sys
from pathlib import Path

DOCUMENTS, SENTENCES = 400, 400
"""Documents, and sentences of each."""

TITLES = ("Mrs. ", "Miss ", "Captain ", "Uncle ", "Doctor ", "Aunt ", "old ", "young ", "Professor ", "", "", "", "")
NAMES = """
    Abel Ada Albert Alice Amos Anna Anton Arthur Bertha Bess Caleb Carl Cora Daisy Daniel David Dora Edgar Edna
    Edward Eli Ella Emil Emma Enid Ernest Esther Ethel Eva Fanny Flora Floyd Frank Fred George Gilbert Grace Hannah
    Harold Harry Hazel Henry Herman Hilda Homer Ida Iris Isaac Ivy Jack James Jane Jesse Joan Joe John Julia Kate
    Keller Klein Larsen Laura Lena Lewis Lily Lloyd Lola Louis Lucy Luke Mabel Marion Mark Martha Mary May Meyer
    Miles Morris Myra Nancy Nell Nora Norman Olive Otis Otto Owen Paul Pearl Perry Peter Philip Polly Ralph Ray
    Rhoda Robert Roger Roland Roy Ruby Russell Ruth Sadie Samuel Sarah Silas Simon Stella Susan Thomas Toby Tom
    Vincent Viola Wallace Wanda Warren Weber Wilbur Willis Wolf Zeke
"""
LISTS = {
    "sister": "Adele Beryl Blanche Celeste Dinah Elsie Fern Georgia Harriet Imogen Jessie Kitty Lorna Maud Nina Opal",
    "thing": "stamps coins shells buttons maps spoons bottles stones keys dolls feathers masks candles knives "
    "postcards",
    "drink": "tea coffee milk water beer wine cider cocoa lemonade brandy juice rum",
    "country": "Norway Spain Brazil Chile Peru Egypt Kenya India Japan China Cuba Canada Ireland Poland Greece Turkey",
    "subject": "law music history physics botany Latin chemistry geology medicine theology algebra astronomy painting",
    "animal": "spiders snakes bears wolves rats bees bats sharks geese bulls ghosts thunder lions mice crows",
    "month": "January February March April May June July August September October November December",
    "language": "French German Dutch Danish Swedish Russian Arabic Hebrew Greek Turkish Polish Persian Welsh Hindi",
    "lost": "watch wallet umbrella glove scarf ticket purse pipe letter hammer basket comb shoe ladder kettle",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "food": "soup bread cheese fish rice beans honey cake apples plums mushrooms onions eggs ham cabbage",
    "wood": "oak pine ash elm maple cedar walnut birch cherry beech",
    "number": " ".join(map(str, range(11, 100))),
}
FORMS = (
    "{n}'s sister is called {sister}",
    "{n} collects {thing}",
    "{n} never drinks anything but {drink}",
    "{n} once travelled to {country}",
    "{n} has always wanted to study {subject}",
    "{n} is afraid of {animal}",
    "{n} will come back in {month}",
    "At home {n} speaks {language}",
    "{n} lost a {lost}",
    "{n} goes to market every {day}",
    "For breakfast {n} eats {food}",
    "{n}'s table is made of {wood}",
    "{n} lives at number {number}",
    "{n} gave the child some {thing}",
    "What {n} likes best is {food}",
)


def fact(rng: random.Random) -> str:
    name = rng.choice(TITLES) + rng.choice(NAMES.split())
    said = rng.choice(FORMS).format(n=name, **{kind: rng.choice(values.split()) for kind, values in LISTS.items()})
    return f"{said[0].upper()}{said[1:]}."


def sentences(rng: random.Random, prose: list[str]) -> list[str]:
    """A run of a book's sentences, among which facts are told and told again."""
    at, again, told = rng.randrange(len(prose) - SENTENCES), [], []
    for i in range(SENTENCES):
        if again and again[0][0] <= i:
            told.append(heapq.heappop(again)[1])
        elif rng.random() < 0.55:
            told.append(fact(rng))
            heapq.heappush(again, (i + rng.randint(6, 24), told[-1]))
        else:
            told.append(prose[at])
            at += 1
    return told


def main(texts: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = random.Random(0)
    files = sorted(texts.glob("*.txt"))
    for number in range(DOCUMENTS):
        prose: list[str] = []
        while len(prose) <= SENTENCES:
            text = " ".join(rng.choice(files).read_text(encoding="utf-8").split())
            prose = [each for each in re.split(r"(?<=[.!?]) ", text) if 20 < len(each) < 120]
        (folder / f"{number:03}.txt").write_text(" ".join(sentences(rng, prose)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
