"""The progress bar, with real tokens per second."""

from typing import Any

from transformers import ProgressCallback


class TokensPerSecond(ProgressCallback):
    """The progress bar, with real tokens per second beside the steps, as they are logged."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "train_tokens_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['train_tokens_per_second']:,.0f} tokens/s", refresh=False)
