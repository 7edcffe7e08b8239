"""A pipeline for one context and many questions: the context is read once, whatever its length."""

from typing import Any

from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .auto import AutoModelForSleepLM
from .session import SleepSession
from .turns import Text

TASK = "sleep-text-generation"
SETTINGS = ("chat", "system", "sleep_passes", "sleep_before_turns", "store")
"""What a call passes on to the `SleepSession` that reads its context."""


class SleepTextGenerationPipeline(Pipeline):
    """Reads a context once, sleeping on the way, and answers questions about it.

    `pipeline("sleep-text-generation", model=…)` makes one, of a model, or of a folder or Hub id of a sleep checkpoint
    or of a base; `model_kwargs={"sleep": SleepConfig(…)}` says how to sleep. Keywords of a call may be given there too,
    for all calls.

    Source: the interface is kvpress's (NVIDIA, Apache 2.0), whose pipeline compresses a context's KV cache.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args: Any, **kw: Any):
        super().__init__(*args, **kw)
        # transformers gives model_kwargs to the tokenizer too, which would write them into its files.
        getattr(self.tokenizer, "init_kwargs", {}).pop("sleep", None)

    def __call__(
        self, context: Text | list[Text], *, question: str | None = None, questions: list[str] | None = None, **kw: Any
    ) -> Any:
        """Read a context and answer.

        Args:
            context: a string, a path, an open file or a tensor of ids. A list, generator or dataset of such is read one
                by one, each asked the same.
            question: one.
            questions: several, answered as a batch, each as if it had been asked alone.
            kw: `chat`, `system`, `sleep_passes`, `sleep_before_turns` and `store` of the `SleepSession` that reads;
                `chat_template_kwargs`, a dictionary for its template; `progress`, whether to show a bar; all else is
                for `generate`.

        Returns:
            `{"answer": str}` for a question, `{"answers": list[str]}` for questions; of several contexts, one each.

        Raises:
            ValueError: neither question nor questions, or both; what cannot be read.
        """
        asked = {"question": question, "questions": questions}
        return super().__call__(context, **{name: value for name, value in asked.items() if value is not None}, **kw)

    def _sanitize_parameters(self, **kw: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, kw, {}

    def preprocess(self, context: Text) -> dict[str, Any]:
        """The context as it is: a session reads it in pieces of a window."""
        return {"context": context}

    def _forward(
        self,
        inputs: dict[str, Any],
        question: str | None = None,
        questions: list[str] | None = None,
        progress: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        **kw: Any,
    ) -> dict[str, Any]:
        if (question is None) == (questions is None):
            given = "neither was" if question is None else "both were"
            raise ValueError(f"pass question=… or questions=[…], one of them: {given} given")
        if isinstance(inputs["context"], list):
            raise ValueError(
                "batch_size must be 1: contexts are read one by one. The questions of a context are a batch anyway"
            )
        settings = {name: kw.pop(name) for name in SETTINGS if name in kw}
        session = SleepSession(self.model, self.tokenizer, **settings, **chat_template_kwargs or {})
        session.read(inputs["context"], progress=progress)
        if question is not None:
            return {"answer": session.ask(question, **kw)}
        return {"answers": session.ask_many(questions or [], **kw)}

    def postprocess(self, answers: dict[str, Any]) -> dict[str, Any]:
        """The answers as they are."""
        return answers


PIPELINE_REGISTRY.register_pipeline(TASK, SleepTextGenerationPipeline, pt_model=AutoModelForSleepLM, type="text")
# By this mark, saving would copy this file beside the weights; the code stays in the package.
del SleepTextGenerationPipeline._registered_impl
