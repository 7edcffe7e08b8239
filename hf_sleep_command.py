"""Front door of the `hf-sleep` command, beside the package and not in it.

To import anything of `hf_sleep` is to run its `__init__`, which registers its models with transformers' auto classes
and so imports torch and transformers: seconds, for a line of help. Here the package stands in `sys.modules` without its
`__init__` having run. Its modules are imported as ever, and those that need torch only by the commands that use them.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    spec = find_spec("hf_sleep")
    assert spec is not None
    sys.modules["hf_sleep"] = module_from_spec(spec)
    from hf_sleep.cli import app

    app()
