"""What a memory that was taught on plain text still knows: of a text's words, and forty facts, read some windows ago.

.venv/bin/python examples/remembering.py          # part of `make demo`; two minutes on a CPU
.venv/bin/python examples/remembering.py --model runs/remember/model --windows 16

First the loss on this project's documentation, which it did not see, by the way of reading
(docs/evaluation.md#loss-by-position).

Then facts. Each of five texts has eight about people, among sentences of no consequence. The text is read and slept on,
and each fact's beginning is put to the reader, who is to go on: `Mr. Harlow was born in the city of`. It is asked of
the retrofit that was never trained, of the one that was, and of the base with everything in its context. Nothing of the
kind was told of these people in the training text. A guess among a form's words is right in one of 10 to 13.
"""

import argparse
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from hf_sleep import AutoModelForSleepLM, SleepCache, SleepForCausalLM, default_dtype
from hf_sleep.data.haystack import draw_sentence
from hf_sleep.data.words import start_of
from hf_sleep.eval import loss_by_position
from hf_sleep.eval.report import position_table

MEMORY = Path(__file__).parent / "memory" / "smollm2"
TEXTS, FACTS, ROWS = 5, 8, 5
PEOPLE = (
    *("Harlow", "Whitcombe", "Brandt", "Okafor", "Lindqvist", "Moreau", "Castellano", "Fairbanks", "Novak"),
    *("Petrov", "Ashdown", "Grimaldi", "Thornbury", "Delacroix", "Yamada", "Pemberton"),
    *("Osgood", "Ravensworth", "Kowalski", "Bellamy"),
)
FORMS = {
    "Mr. {}'s dog is called": "Biscuit Pepper Ginger Shadow Rocky Daisy Copper Misty Bandit Lucky Sunny Tiger Patch",
    "Mr. {} was born in the city of": "London Paris Rome Berlin Madrid Vienna Lisbon Dublin Oslo Prague Athens Cairo",
    "Mr. {} earned a living as a": "baker tailor doctor lawyer sailor farmer teacher painter soldier butcher singer",
    "Mr. {}'s front door was painted": "red blue green yellow black white brown orange purple pink grey silver",
    "In the evening Mr. {} played the": "piano violin flute guitar drums harp organ trumpet cello banjo",
}


@dataclass(frozen=True)
class Fact:
    """One that is asked for: its beginning, the word it ends with, and how many windows ago it was read."""

    begins: str
    ends: str
    ago: int


def tell(number: int, tokenizer: Any, windows: int, window_size: int) -> tuple[list[int], list[Fact]]:
    """A text of so many full windows, as token ids, and its facts; they stand anywhere but in the last window."""
    rng = random.Random(number)
    total, ids, facts = windows * window_size, [], []
    if windows < 2:
        raise SystemExit(f"--windows {windows}: it must be at least 2, for facts to be a window old")
    starts = sorted(rng.randrange((windows - 1) * window_size - 24) for _ in range(FACTS))
    people = rng.sample(PEOPLE, FACTS)
    while len(ids) < total:
        sentence = draw_sentence(rng)
        if people and len(ids) >= starts[-len(people)]:
            form = rng.choice(list(FORMS))
            begins, ends = form.format(people.pop()), rng.choice(FORMS[form].split())
            facts.append(Fact(begins, ends, windows - len(ids) // window_size))
            sentence = f" {begins} {ends}."
        ids += tokenizer(sentence, add_special_tokens=False)["input_ids"]
    if len(facts) < FACTS or min(fact.ago for fact in facts) < 2:
        raise SystemExit(
            f"--windows {windows} of {window_size} tokens: {FACTS} facts do not fit before the last. Give more"
        )
    return ids[:total], facts


def known(model: SleepForCausalLM, tokenizer: Any, ids: list[int], facts: list[Fact]) -> list[bool]:
    """Whether `model`, which has read `ids` and slept on all of it, goes on with the right word, for each fact."""
    cache = SleepCache()
    model(torch.tensor([ids], device=model.device), cache=cache, logits_to_keep=1)
    if len(ids) >= model.config.sleep.window_size:
        model.sleep(cache)  # the last window too
    cache.batch_repeat_interleave(len(facts))
    how = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
    asked = tokenizer([f"\n{fact.begins}" for fact in facts], **how)
    mask = torch.cat((torch.ones(len(facts), len(ids), dtype=torch.long), asked["attention_mask"]), 1)
    said = model.generate(
        asked["input_ids"].to(model.device),
        attention_mask=mask.to(model.device),
        cache=cache,
        max_new_tokens=4,
        do_sample=False,
    )
    answers = tokenizer.batch_decode(said[:, asked["input_ids"].shape[1] :])
    return [re.match(r"\W*(\w*)", answer)[1] == fact.ends for answer, fact in zip(answers, facts, strict=True)]


def readers(trained: SleepForCausalLM, most: int) -> dict[str, SleepForCausalLM]:
    """Those that are asked, on one base. The last one's window never fills: it is the base with its full cache."""
    sleep = trained.config.sleep
    return {
        "the retrofit, untrained": SleepForCausalLM.from_base(trained.lm, sleep),
        "the retrofit, trained": trained,
        "the base, with everything in its context": SleepForCausalLM.from_base(
            trained.lm, replace(sleep, window_size=most)
        ),
    }


def rows(tokenizer: Any, length: int) -> torch.Tensor:
    """`[R, length]`, rows from all over this project's documentation."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    text, start = "\n\n".join(page.read_text(encoding="utf-8") for page in pages), start_of(tokenizer)
    ids, count = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], length - len(start)
    if len(ids) < ROWS * count:
        raise SystemExit(f"{ROWS} rows of {length} tokens: the documentation has {len(ids)}. Give fewer --windows")
    apart = len(ids) // ROWS
    return torch.tensor([start + ids[i * apart :][:count] for i in range(ROWS)])


def forty(trained: SleepForCausalLM, tokenizer: Any, windows: int) -> Table:
    """How many of the facts each reader knows, of all and by how long ago they were read."""
    size = trained.config.sleep.window_size
    texts = [tell(number, tokenizer, windows, size) for number in range(TEXTS)]
    ago, half = [fact.ago for _, facts in texts for fact in facts], windows // 2
    table = Table(title=f"{TEXTS * FACTS} facts in {TEXTS} texts of {windows} windows of {size} tokens: known")
    for name in ("", "all", f"read up to {half} windows ago", "longer ago"):
        table.add_column(name, justify="right" if name else "left")
    for name, model in readers(trained, (windows + 1) * size).items():
        right = [answer for ids, facts in texts for answer in known(model, tokenizer, ids, facts)]
        late, early = (
            [r for r, n in zip(right, ago, strict=True) if (n <= half) == is_late] for is_late in (True, False)
        )
        table.add_row(name, *(f"{sum(some)} of {len(some)}" for some in (right, late, early)))
    return table


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(MEMORY), help="a folder or Hub id of a sleep checkpoint (default: %(default)s)"
    )
    parser.add_argument("--windows", type=int, default=4, help="of each text (default: %(default)s)")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    base = AutoConfig.from_pretrained(arguments.model).base_model_name_or_path
    if str(base).startswith(".demo") and not Path(base).is_dir():
        raise SystemExit(f"{base} is not there: run `make demo` first, and start this in the repository's folder")
    trained = AutoModelForSleepLM.from_pretrained(arguments.model, dtype=default_dtype())
    tokenizer = AutoTokenizer.from_pretrained(trained.config.base_model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    size = trained.config.sleep.window_size
    console = Console()
    console.print(Markdown(position_table(loss_by_position(trained.eval(), rows(tokenizer, arguments.windows * size)))))
    console.print(forty(trained, tokenizer, arguments.windows))


if __name__ == "__main__":
    main()
