"""Loading a model, its tokenizer and a memory, for every command that runs one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import SETTINGS
from .app import one_line, say

if TYPE_CHECKING:
    from ..session import SleepSession
    from ..state import SleepState
    from ..store import SleepStore


def check_folder(model: str) -> None:
    """Raise `ValueError` where a path leads nowhere, which else would be looked for on the Hub."""
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).exists():
        raise ValueError(f"there is no folder {model}")


def quiet() -> None:
    """Let transformers say nothing but errors: what a person has to know, the commands say."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(model: str, given: str | None, revision: str | None) -> Any:
    """The tokenizer of a model.

    Args:
        model: folder or Hub id.
        given: where else it is.
        revision: of `model`.

    Raises:
        ValueError: there is none, with where to get one.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = model if given is None else given
    check_folder(source)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision if given is None else None)
    except (ValueError, OSError, KeyError, ImportError) as error:
        if given is not None:
            raise ValueError(f"{source} holds no tokenizer that loads: {one_line(error)}") from error
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        base = getattr(config, "base_model_name_or_path", None) or "the base's folder or Hub id"
        raise ValueError(f"{model} holds no tokenizer that loads: pass --tokenizer {base}") from error


def load_model(
    model: str, how: dict[str, Any], state: "SleepState | None" = None, needs_tokenizer: bool = True
) -> tuple[Any, Any]:
    """A model that sleeps, and its tokenizer; says so where it was not trained to.

    Args:
        model: folder or Hub id, of a base or of a sleep checkpoint.
        how: what the options of `with_model` gave.
        state: a memory that it is to continue, whose settings and dtype hold where no other was asked for.
        needs_tokenizer: `False`: none is loaded, and `None` stands for it.

    Raises:
        ValueError: what cannot be loaded.
    """
    from .. import bases  # noqa: F401 - registers them with AutoConfig, as hf_sleep/__init__.py does elsewhere
    from ..auto import AutoModelForSleepLM
    from ..hub.card import is_untrained
    from ..state import OPTIONAL_SETTINGS

    quiet()
    check_folder(model)
    tokenizer = load_tokenizer(model, how["tokenizer"], how["revision"]) if needs_tokenizer else None
    settings = {name: how[name] for name in SETTINGS if how[name] is not None}
    dtype = how["dtype"]
    if state is not None:
        settings = OPTIONAL_SETTINGS | state.settings | settings
        dtype = dtype or state.dtype.removeprefix("torch.")
    loading = {} if dtype is None else {"dtype": dtype}
    loaded = AutoModelForSleepLM.from_pretrained(model, sleep=settings, revision=how["revision"], **loading)
    advice, blocks = loaded._advice, loaded.fast_weights
    if is_untrained(blocks.state_dict(prefix="fast_weights.")) or (advice.is_fresh and not blocks):
        advice.may_be_untrained = False  # once is enough
        say(f"Warning: {model} was never trained to sleep: it forgets what leaves its window.")
    return loaded.to(device_for(how["device"])).eval(), tokenizer


def device_for(name: str | None) -> Any:
    """The device of that name; by default the GPU where there is one.

    Raises:
        ValueError: a device that this machine does not have.
    """
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {one_line(error)}") from error
    return device


def load_session(model: str, memory: Path | None, how: dict[str, Any], **settings: Any) -> "SleepSession":
    """A session with a model that is loaded for it, empty or with a memory from a file.

    Args:
        model: folder or Hub id.
        memory: a file, or `None`.
        how: what the options of `with_model` gave.
        settings: as `SleepSession` takes them.

    Raises:
        ValueError: what cannot be loaded, or does not belong together.
    """
    from ..session import SleepSession

    state = None if memory is None else load_state(memory)
    if state is not None and settings.get("system") is not None:
        raise ValueError(f"--system is what a memory begins with, and {memory} has begun: leave it out")
    session = SleepSession(*load_model(model, how, state), **settings)
    return session if state is None else reopened(session, state, str(memory), **settings)


def reopened(session: "SleepSession", state: "SleepState", name: str, **settings: Any) -> "SleepSession":
    """A session with another memory and the same model."""
    return type(session).of_state(state, session.model, session.tokenizer, name=name, **settings)


def load_state(path: Path) -> "SleepState":
    """A memory from a file.

    Raises:
        ValueError: a file that is none.
    """
    from ..state import SleepState

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return SleepState.load(path)


def open_store(url: str) -> "SleepStore":
    """A store of windows, made where there is none."""
    from ..store import SleepStore

    return SleepStore(url)
