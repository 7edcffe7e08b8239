# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-sleep[train]"]
#
# [tool.uv.sources]
# hf-sleep = { path = "..", editable = true }
# ///
"""Paired test of two runs of finetune_gsm.py or finetune_managers.py: same problems, answer by answer.

python recipes/compare_runs.py runs/gsm_n1 runs/gsm_n2
python recipes/compare_runs.py runs/gsm_n2 runs/gsm_n2 --reads last_window all     # was anything remembered?
python recipes/compare_runs.py runs/gsm_n2 runs/gsm_n2 --sleep-passes 1 2          # one model at two N

Prints accuracy of both by difficulty, the answers that only one of them got right, and McNemar's exact p, two-sided,
for each difficulty and for all. The test takes answers for independent. Several questions about one paragraph are not
quite, so with them p is a little too small.
"""

import json
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from typing import Any

from shared.arguments import argument, parse

Outcomes = dict[int, str]
"""By difficulty, a digit for each answer: whether it is right."""


@dataclass
class Arguments:
    run_a: Path = field(init=False)
    run_b: Path = field(init=False)
    when: str = argument("after", "before or after training", choices=("before", "after"))
    reads: list[str] = argument(["all"], "all, last_window or full; two: of A and of B")
    sleep_passes: list[int] | None = argument(None, "N; two: of A and of B; None: each run's own")

    def __post_init__(self) -> None:
        for name in ("reads", "sleep_passes"):
            if len(getattr(self, name) or [0]) > 2:
                raise ValueError(f"--{name.replace('_', '-')}: it takes one value, or two: of A and of B")


def mcnemar(only_a: int, only_b: int) -> float:
    """Probability of discordant counts at least as far apart, were both equally likely: two-sided, exact."""
    total = only_a + only_b
    tail = sum(comb(total, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**total)


def read(run: Path, when: str, reads: str, passes: int | None) -> tuple[str, Outcomes]:
    """What tells the run's problems from others, and the outcomes of one kind of reading, by difficulty."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    if passes is None:
        passes = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]["sleep_passes"]
    outcomes: Outcomes = {}
    for score in results[when]:
        # The controls do not depend on N.
        if score["reads"] == reads and (reads != "all" or score["N"] == passes):
            outcomes[score["difficulty"]] = outcomes.get(score["difficulty"], "") + score["right"]
    if not outcomes:
        known = sorted({(score["reads"], score["N"]) for score in results[when]})
        raise SystemExit(f"{run} has no answers for reads={reads}, N={passes}: it has {known}")
    return results["problems"], outcomes


def discordant(a: str, b: str) -> tuple[int, int]:
    """Answers that only A got right, and only B."""
    pairs = list(zip(a, b, strict=True))
    return pairs.count(("1", "0")), pairs.count(("0", "1"))


def compare(a: Outcomes, b: Outcomes) -> list[dict[str, Any]]:
    """A row for each difficulty, and one for all."""
    rows = []
    for difficulty in (*sorted(a), "all"):
        one, other = (o[difficulty] if difficulty in o else "".join(o[d] for d in sorted(o)) for o in (a, b))
        only_a, only_b = discordant(one, other)
        shares = {"a": one.count("1") / len(one), "b": other.count("1") / len(other)}
        row = {"difficulty": difficulty, "n": len(one), **shares, "only_a": only_a, "only_b": only_b}
        rows.append(row | {"p": mcnemar(only_a, only_b)})
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    positional = {"run_a": {"type": Path, "help": "a run's folder"}, "run_b": {"type": Path, "help": "another, or it"}}
    options = parse(Arguments, __doc__, arguments, positional=positional)
    reads, passes = options.reads * 2, (options.sleep_passes or [None]) * 2
    (asked, a), (other, b) = (
        read(run, options.when, reads[i], passes[i]) for i, run in enumerate((options.run_a, options.run_b))
    )
    if asked != other:
        raise SystemExit(f"{options.run_a} and {options.run_b} were asked other problems: give both the same settings")
    rows = compare(a, b)
    print("| difficulty | n | A | B | only A | only B | p |\n" + "|---" * 7 + "|")
    for row in rows:
        cells = [row["difficulty"], row["n"], f"{row['a']:.3f}", f"{row['b']:.3f}", row["only_a"], row["only_b"]]
        print(f"| {' | '.join(map(str, cells))} | {row['p']:.2g} |")
    return rows


if __name__ == "__main__":
    main()
