"""The Hub: pushed to a stand-in over HTTP and loaded from it, model cards, and code that points to this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from families import VOCAB, make_base, make_model, randomize, sleep_config, tokens
from helpers import assert_same_weights, stored
from huggingface_hub import ModelCard
from stand_in_hub import problems
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sleep import AutoModelForSleepLM, SleepForCausalLM
from hf_sleep.engine import Eviction
from hf_sleep.hub import (
    REMOTE_CODE_FILE,
    CardFacts,
    base_licence,
    hub_id,
    is_our_card,
    write_model_card,
)
from hf_sleep.registry import EVICTIONS
from hf_sleep.training import SleepTrainer, SleepTrainingArguments

# huggingface_hub's own upload to git-LFS, the way it takes without hf_xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

L = 6
IDS = tokens(2 * L + 3)[None]
METRIC = {"task": "Rule 110", "difficulty": 4, "N": 2, "accuracy": 0.875, "chance": 0.5, "n": 200}


# A Hub.


@pytest.fixture
def on_hub(hub, tmp_path):
    """A base that somebody else has on the Hub, with its card and tokenizer, and a trained retrofit of it."""
    folder = tmp_path / "base"
    make_base("llama").save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n# Tiny", encoding="utf-8")
    hub.put("org/tiny", folder)
    model = AutoModelForSleepLM.from_pretrained("org/tiny", sleep=sleep_config("llama", window_size=L))
    randomize(model.fast_weights, 1)
    return model


def save_tokenizer(folder: Path) -> None:
    vocabulary = ["<unk>", "A", "text", "of", "any", "length", *(f"word{i}" for i in range(6, VOCAB))]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>").save_pretrained(folder)


def snippet(card: str) -> str:
    """The Python code of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def test_the_stand_in_objects_as_the_hub_would():
    good = {"license": "other", "license_name": "mine", "base_model": "a/b", "base_model_relation": "adapter"}
    assert not problems(good)
    for bad in (
        {"license": "mine"},
        {"license": "other"},
        {"base_model": "/home/me/b"},
        {"base_model_relation": "child"},
        {"model-index": [{"name": "x", "results": [{"task": {"type": "t"}, "dataset": {"type": "d"}, "metrics": []}]}]},
    ):
        assert len(problems(bad)) == 1


# Pushing.


@pytest.mark.parametrize("shards", [None, "30KB"])
def test_a_model_is_pushed_and_loaded(shards, hub, on_hub):
    on_hub.card = CardFacts("Strings of zeros and ones.", [METRIC])
    info = on_hub.push_to_hub("asleep", commit_message="First", **({"max_shard_size": shards} if shards else {}))
    files = hub.files("me/asleep")
    assert info.oid == hub.branches["me/asleep"]["main"]
    assert hub.messages[-1] == "First"
    assert (sum(name.endswith(".safetensors") for name in files) > 2) is (shards is not None)
    assert {"README.md", "config.json", "generation_config.json", REMOTE_CODE_FILE} < files.keys()
    for loader in (AutoModelForSleepLM, SleepForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained("me/asleep")
        assert type(loaded) is SleepForCausalLM
        assert_same_weights(loaded, on_hub)
        assert torch.equal(loaded(IDS).logits, on_hub(IDS).logits)
    data = hub.card("me/asleep").data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/tiny", "finetune", "llama3.2")
    assert data.eval_results[0].metric_value == 0.875


def test_new_weights_alone_are_pushed_and_loaded(hub, on_hub):
    on_hub.push_to_hub("me/blocks", only_sleep=True, max_shard_size="5KB")
    assert sum(map(len, hub.files("me/blocks").values())) < 0.7 * sum(map(len, hub.files("org/tiny").values()))
    loaded = AutoModelForSleepLM.from_pretrained("me/blocks")
    assert_same_weights(loaded, on_hub)
    assert torch.equal(loaded(IDS).logits, on_hub(IDS).logits)
    assert on_hub.config.only_sleep is False
    card = hub.card("me/blocks")
    assert card.data.base_model_relation == "adapter"
    assert "holds the fast-weight blocks alone" in card.text


def test_new_weights_alone_are_not_pushed_with_a_base_that_nobody_else_has(hub, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "base", sleep=sleep_config("llama"))
    with pytest.raises(ValueError, match=r"a folder of this machine: set config\.base_model_name_or_path"):
        model.push_to_hub("me/blocks", only_sleep=True)
    assert not hub.branches


def test_an_earlier_checkpoint_goes_when_another_is_pushed(hub, on_hub):
    """Loaders take `model.safetensors` before shards, and of new weights alone all files."""
    on_hub.push_to_hub("me/asleep")
    randomize(on_hub.fast_weights, 2)
    for arguments in ({"max_shard_size": "30KB"}, {"only_sleep": True}, {}):
        on_hub.push_to_hub("me/asleep", **arguments)
        assert_same_weights(SleepForCausalLM.from_pretrained("me/asleep"), on_hub)


def test_a_branch_or_a_pull_request_is_pushed_to(hub, on_hub):
    on_hub.push_to_hub("me/asleep", revision="second", tags=["mine"])
    assert not hub.files("me/asleep")
    assert "mine" in hub.card("me/asleep", "second").data.tags
    assert "mine" not in on_hub.model_tags
    assert_same_weights(AutoModelForSleepLM.from_pretrained("me/asleep", revision="second"), on_hub)
    info = on_hub.push_to_hub("me/asleep", create_pr=True)
    assert info.pr_url.endswith("/discussions/1")
    assert not hub.files("me/asleep")
    assert "config.json" in hub.files("me/asleep", "refs/pr/1")


def test_saving_can_push(hub, on_hub, tmp_path):
    on_hub.save_pretrained(tmp_path / "asleep", push_to_hub=True, commit_message="Both", only_sleep=True)
    assert hub.messages[-1] == "Both"
    for source in (tmp_path / "asleep", "me/asleep"):
        assert_same_weights(SleepForCausalLM.from_pretrained(source), on_hub)
    local, pushed = (
        (tmp_path / "asleep" / "README.md").read_text(encoding="utf-8"),
        hub.files("me/asleep")["README.md"].decode(),
    )
    assert '"asleep"' in snippet(local)
    assert '"me/asleep"' in snippet(pushed)
    on_hub.save_pretrained(tmp_path / "there", push_to_hub=True, repo_id="org/other")
    assert "config.json" in hub.files("org/other")


def test_what_a_person_wrote_on_the_hub_stays(hub, on_hub):
    on_hub.push_to_hub("me/asleep")
    first = hub.files("me/asleep")["README.md"]
    on_hub.card = CardFacts("Something new.")
    on_hub.push_to_hub("me/asleep")
    second = hub.files("me/asleep")["README.md"]
    assert first != second
    edited = second.replace(b"Something new.", b"Something that I know better.")
    hub.commit("me/asleep", "main", {**hub.files("me/asleep"), "README.md": edited})
    randomize(on_hub.fast_weights, 3)
    on_hub.push_to_hub("me/asleep")
    assert hub.files("me/asleep")["README.md"] == edited
    assert_same_weights(SleepForCausalLM.from_pretrained("me/asleep"), on_hub)


# Trainer.


class WaitForUploads(TrainerCallback):
    """Waits: with `hub_always_push`, steps this short would write the next checkpoint into files being uploaded."""

    def on_save(self, args, state, control, **kwargs):
        self.trainer.push_in_progress.wait_until_done()


@pytest.mark.parametrize("trainer_class", [Trainer, SleepTrainer])
def test_the_trainer_pushes(trainer_class, hub, on_hub, tmp_path):
    arguments = SleepTrainingArguments if trainer_class is SleepTrainer else TrainingArguments
    args = arguments(
        output_dir=tmp_path / "out",
        push_to_hub=True,
        hub_model_id="me/asleep",
        max_steps=2,
        save_steps=1,
        hub_always_push=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    on_hub.card = CardFacts("Strings of zeros and ones.", [METRIC])
    tokenizer = AutoTokenizer.from_pretrained("org/tiny")
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    trainer = trainer_class(model=on_hub, args=args, train_dataset=rows, processing_class=tokenizer)
    uploads = WaitForUploads()
    uploads.trainer = trainer
    trainer.add_callback(uploads)
    trainer.train()
    trainer.push_to_hub()
    assert [message for message in hub.messages if "in progress" in message] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
    ]
    assert hub.messages[-1] == "End of training"
    complete = [REMOTE_CODE_FILE in files for files in hub.commits.values() if "tokenizer_config.json" in files]
    assert complete[1:] == [trainer_class is SleepTrainer] * 2 + [True]
    loaded = AutoModelForSleepLM.from_pretrained("me/asleep")
    assert_same_weights(loaded, on_hub)
    files = hub.files("me/asleep")
    assert {REMOTE_CODE_FILE, "tokenizer.json"} < files.keys()
    assert set(on_hub.model_tags) <= set(hub.card("me/asleep").data.tags)
    assert is_our_card(files["README.md"].decode()) is (trainer_class is SleepTrainer)
    if trainer_class is SleepTrainer:
        assert hub.card("me/asleep").data.eval_results[0].dataset_name == "Rule 110"


# Model cards.


def card_of(folder: Path) -> ModelCard:
    """The card in a folder, with metadata that the Hub would take."""
    card = ModelCard.load(folder / "README.md")
    assert not problems(yaml.safe_load(card.content.split("---")[1]))
    return card


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "jet_nemotron", "ouro"])
def test_a_card_says_what_the_model_is(family, tmp_path):
    model = make_model(family, sleep_config(family, window_size=L, sleep_passes=3))
    model.card = CardFacts("Strings of zeros and ones.", [METRIC, {**METRIC, "N": 1, "accuracy": 0.6}])
    model.save_pretrained(tmp_path / "asleep")
    card = card_of(tmp_path / "asleep")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("hf_sleep", "text-generation")
    assert data["tags"] == model.model_tags
    assert not {"license", "base_model", "base_model_relation"} & data.keys()
    results = data["model-index"][0]["results"]
    assert [result["dataset"]["config"] for result in results] == [
        "difficulty=4, sleep_passes=2",
        "difficulty=4, sleep_passes=1",
    ]
    assert results[1]["metrics"] == [
        {"type": "accuracy", "value": 0.6, "name": "accuracy (chance 0.5)", "args": {"chance": 0.5, "n": 200}}
    ]
    added = sum(p.numel() for p in model.fast_weights.parameters())
    whole = sum(p.numel() for p in model.lm.parameters())
    for line in (
        f"# asleep\n\nA {family} language model that *sleeps*",
        f"| window L (tokens between sleeps) | {L} |",
        "| sleep passes N | 3 |",
        f"| parameters added | {added:,} ({100 * added / whole:.2f} % of the base's {whole:,}) |",
        "\nStrings of zeros and ones.\n",
        "| Rule 110 | 4 | 2 | 0.875 | 0.500 | 200 |\n| Rule 110 | 4 | 1 | 0.600 | 0.500 | 200 |\n",
        "None is stated here: the model was built from scratch",
    ):
        assert line in card.content, line
    assert ("research and evaluation only" in card.text) is (family == "jet_nemotron")
    assert "were never trained" not in card.text
    assert "{" not in card.text


def test_a_card_says_what_is_missing(tmp_path, monkeypatch):
    model = make_model("llama", sleep_config("llama"), trained=False)
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert "**The fast-weight blocks were never trained.**" in text
    assert text.count("recorded by the program that saved the model") == 2
    assert "model-index" not in card_of(tmp_path).content
    assert "model_name" not in card_of(tmp_path).content
    # What counts is what is saved, though the model's own weights may be sharded elsewhere.
    trained = {name: t + 1 for name, t in model.state_dict().items()}
    monkeypatch.setattr(model.lm, "num_parameters", lambda: 0)
    model.save_pretrained(tmp_path, state_dict=trained)
    assert "were never trained" not in card_of(tmp_path).text
    assert "parameters added" not in card_of(tmp_path).text


@pytest.mark.parametrize("usage", ["", "print(model)"])
def test_a_card_s_snippet_imports_what_registers_the_eviction(usage, tmp_path, monkeypatch):
    recent = type("Recent", (Eviction,), {"__module__": "my_package.evictions"})
    monkeypatch.setitem(EVICTIONS._classes, "recent", recent)
    model = make_model("llama", sleep_config("llama", eviction="recent"))
    model.card = CardFacts(usage=usage)
    model.save_pretrained(tmp_path)
    lines = snippet(card_of(tmp_path).content).splitlines()
    assert lines.count("import my_package.evictions  # registers what this model sleeps with") == 1


def test_a_hybrid_without_blocks_has_a_card(tmp_path):
    model = make_model("jet_nemotron", sleep_config("jet_nemotron", block_layers=None, num_blocks=0))
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert "| fast-weight blocks | the base's own recurrent layers |" in text
    assert "| parameters added | 0 (0.00 %" in text
    assert "were never trained" not in text


@pytest.mark.parametrize("pushed", [False, True])
def test_the_snippet_in_a_card_runs(pushed, hub, on_hub, tmp_path, monkeypatch, capsys):
    if pushed:
        on_hub.push_to_hub("me/asleep")
        card = hub.files("me/asleep")["README.md"].decode()
    else:
        on_hub.save_pretrained(tmp_path / "asleep")
        monkeypatch.chdir(tmp_path)
        card = (tmp_path / "asleep" / "README.md").read_text(encoding="utf-8")
    exec(snippet(card), {})
    assert len(capsys.readouterr().out.split()) == 5 + 32


def test_a_model_that_reads_no_text_has_a_snippet_of_its_own(tmp_path, monkeypatch, capsys):
    model = make_model("llama", sleep_config("llama"))
    model.card = CardFacts(usage="import torch\n\nprint(model(torch.tensor([[1, 2, 3]])).logits.shape[1])\n")
    model.save_pretrained(tmp_path / "asleep")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "asleep" / "README.md").read_text(encoding="utf-8")
    assert "tokenizer" not in card
    exec(snippet(card), {})
    assert capsys.readouterr().out == "3\n"


def test_a_card_is_replaced_until_a_person_touches_it(tmp_path):
    model = make_model("llama", sleep_config("llama"))
    readme = tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    model.card = CardFacts("Strings of zeros and ones.")
    model.save_pretrained(tmp_path)
    assert "Strings of zeros and ones." in readme.read_text(encoding="utf-8")
    assert is_our_card(readme.read_text(encoding="utf-8").replace("\n", "\r\n"))
    changed = readme.read_text(encoding="utf-8").replace("Limits", "What it cannot do")
    unmarked = re.sub(r"<!-- hf_sleep.*-->", "", readme.read_text(encoding="utf-8"))
    for theirs in (changed, unmarked, readme.read_text(encoding="utf-8") + "One line more.\n", "# Mine\n", ""):
        readme.write_text(theirs, encoding="utf-8")
        model.save_pretrained(tmp_path)
        assert readme.read_text(encoding="utf-8") == theirs
    readme.write_bytes(b"\xff\xfe# Mine")
    assert not write_model_card(model, tmp_path)
    readme.unlink()
    assert write_model_card(model, tmp_path)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"task": "Rule 110"}, r"CardFacts\.metrics\[1\] has \['task'\]: it must have"),
        (METRIC | {"seed": 1}, r"CardFacts\.metrics\[1\] has .*'seed'"),
        (METRIC | {"chance": 50}, r"CardFacts\.metrics\[1\]\['chance'\]=50: it must be from 0 to 1"),
    ],
)
def test_a_metric_that_says_too_little_is_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        CardFacts(metrics=[METRIC, metric])


def test_metrics_may_be_tensors_or_arrays():
    metric = METRIC | {"accuracy": torch.tensor(0.875), "n": torch.tensor(200)}
    assert CardFacts(metrics=[metric]).metrics == [METRIC]


# Licences.


NVIDIA = {"license": "other", "license_name": "nvidia-jet-nemotron-models"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: https://a.b/c\n---\n", None),
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n", {"license_link": None}),
        ("---\nlicense: unknown\n---\n", {}),
        ("---\ntags: [a]\n---\n", {}),
        ("---\n[not yaml\n---\n", {}),
        ("---\na list\n---\n", {}),
        ("# No metadata", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_one_in_the_bases_folder(card, expected, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    whole = {"license": "other", "license_name": "mine", "license_link": "https://a.b/c"}
    if expected is None or "license_link" in expected:
        expected = {key: value for key, value in (whole | (expected or {})).items() if value}
    assert base_licence(str(tmp_path)) == expected


@pytest.mark.parametrize("only_sleep", [False, True])
def test_a_card_names_what_a_base_in_a_folder_was_made_from(only_sleep, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "unpacked")
    card = "---\nlicense: apache-2.0\nbase_model: org/original\n---\n# Unpacked"
    (tmp_path / "unpacked" / "README.md").write_text(card, encoding="utf-8")
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "unpacked", sleep=sleep_config("llama"))
    model.save_pretrained(tmp_path / "asleep", only_sleep=only_sleep)
    made = card_of(tmp_path / "asleep")
    relation = "adapter" if only_sleep else "finetune"
    assert (made.data.license, made.data.base_model) == ("apache-2.0", "org/original")
    assert made.data.base_model_relation == relation
    assert "made from [org/original](https://huggingface.co/org/original), that *sleeps*" in made.text
    assert "That of the base model: apache-2.0." in made.text


@pytest.mark.parametrize("named", ["[org/a, org/b]", "/home/me/original", "7"])
def test_a_folders_card_that_names_no_one_base_names_none(named, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "unpacked")
    (tmp_path / "unpacked" / "README.md").write_text(f"---\nbase_model: {named}\n---\n", encoding="utf-8")
    AutoModelForSleepLM.from_pretrained(tmp_path / "unpacked").save_pretrained(tmp_path / "asleep")
    assert card_of(tmp_path / "asleep").data.base_model is None


def test_a_licence_is_looked_up_on_the_hub_when_a_model_is_pushed(hub):
    card = b"---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE.md\n---\n"
    hub.commit("org/tiny", "main", {"README.md": card})
    assert base_licence("org/tiny") == {}
    assert base_licence("org/none", download=True) == {}
    licence = base_licence("org/tiny", download=True)
    assert licence["license_link"] == "https://huggingface.co/org/tiny/blob/main/LICENSE.md"
    assert base_licence("org/tiny") == licence


def test_a_few_licences_are_known_without_asking():
    assert base_licence("ByteDance/Ouro-1.4B") == {"license": "apache-2.0"}
    assert base_licence("jet-ai/Jet-Nemotron-2B").items() >= NVIDIA.items()
    assert base_licence("me/Jet-Nemotron-2B") == {}
    assert base_licence(None) == {}
    # Offline, asking changes nothing.
    assert base_licence("jet-ai/Jet-Nemotron-4B", download=True).items() >= NVIDIA.items()


def test_a_retrofit_of_jet_nemotron_is_bound_by_its_licence(tmp_path):
    model = make_model("jet_nemotron", sleep_config("jet_nemotron"))
    model.config.base_model_name_or_path = "jet-ai/Jet-Nemotron-2B"
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.to_dict().items() >= NVIDIA.items()
    assert card.data.license_link.endswith("LICENSE/jet_nemotron_models")
    assert "**research and evaluation only**" in card.text


def test_a_folder_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert hub_id("org/small") == "org/small"
    for source in (None, "gpt2", "org/tiny", "./tiny", "/home/me", "a/b/c", "org/tiny model"):
        assert hub_id(source) is None


def test_a_folder_of_this_machine_is_not_named_in_a_card(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "secret-project")
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "secret-project", sleep=sleep_config("llama"))
    model.save_pretrained(tmp_path / "asleep")
    assert "secret-project" not in card_of(tmp_path / "asleep").content
    assert "licence is not known" in card_of(tmp_path / "asleep").text


def test_a_folder_of_this_machine_is_not_pushed(hub, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "secret-project")
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "secret-project", sleep=sleep_config("llama"))
    model.push_to_hub("me/asleep")
    assert model.config.base_model_name_or_path == str(tmp_path / "secret-project")
    for name, content in hub.files("me/asleep").items():
        assert b"secret-project" not in content, name


# The file that points to this package.

ELSEWHERE = """
import importlib.abc, json, sys
import torch
from transformers import AutoModelForCausalLM

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "hf_sleep":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def attempt(**kwargs):
    try:
        return AutoModelForCausalLM.from_pretrained(source, **kwargs), None
    except Exception as error:
        return None, [type(error).__name__, str(error)]

source, out, ids = sys.argv[1:]
report = {}
sys.meta_path.insert(0, Hide())
report["plain"] = attempt()[1]
report["not installed"] = attempt(trust_remote_code=True)[1]
sys.meta_path.pop(0)
report["not imported"] = attempt()[1]
assert "hf_sleep" not in sys.modules
model, error = attempt(trust_remote_code=True)
report["error"] = error
report["class"] = f"{type(model).__module__}.{type(model).__name__}"
torch.save(model(torch.tensor(json.loads(ids))).logits, out + "/logits.pt")
model.save_pretrained(out + "/again")
with open(out + "/report.json", "w", encoding="utf-8") as file:
    json.dump(report, file)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A checkpoint, read in a process that has not imported hf_sleep: without it, then with it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    make_base("llama").save_pretrained(folder / "base")
    # Whose code the base brings is not the question that was answered with trust_remote_code=True.
    config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "base" / "evil.py").write_text("raise RuntimeError('code of the base was run')", encoding="utf-8")
    model = AutoModelForSleepLM.from_pretrained(folder / "base", sleep=sleep_config("llama", window_size=L))
    randomize(model.fast_weights, 1)
    model.save_pretrained(folder / "asleep", only_sleep=True)
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder / "asleep"), str(folder), json.dumps(IDS.tolist())],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return model, folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_a_checkpoint_loads_where_the_package_is_not_imported(elsewhere):
    model, folder, report = elsewhere
    assert report["error"] is None
    assert report["class"] == "hf_sleep.modeling.causal_lm.SleepForCausalLM"
    assert torch.equal(torch.load(folder / "logits.pt"), model(IDS).logits)


def test_where_the_package_is_not_installed_the_error_says_how(elsewhere):
    kind, message = elsewhere[2]["not installed"]
    assert kind == "ImportError"
    assert "the package hf_sleep, which is not installed here. Install it from a checkout" in message


@pytest.mark.parametrize("where", ["plain", "not imported"])
def test_nothing_loads_the_base_without_its_memory(where, elsewhere):
    """Nor runs a checkpoint's code unasked."""
    kind, message = elsewhere[2][where]
    assert kind == "ValueError"
    assert "trust_remote_code=True" in message


def test_code_of_this_package_is_not_copied_into_checkpoints(elsewhere):
    model, folder, _ = elsewhere
    assert [path.name for path in (folder / "again").glob("*.py")] == [REMOTE_CODE_FILE]
    first, again = (
        json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in ("asleep", "again")
    )
    assert first["auto_map"] == again["auto_map"]
    assert stored(folder / "again").keys() == model.state_dict().keys()
    # Where the package is imported, the file is not even looked at.
    (folder / "again" / REMOTE_CODE_FILE).write_text("raise RuntimeError", encoding="utf-8")
    for trust in (None, True):
        loaded = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=trust)
        assert_same_weights(loaded, model)
