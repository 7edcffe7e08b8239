"""The server on Ray Serve: replicas of one model share a store, and any of them continues any memory.

pip install "ray[serve]"
python examples/ray_serve.py [MODEL] [STORE]    # a folder or Hub id; a folder or URL that all replicas reach
"""

import sys

from ray import serve
from transformers import AutoTokenizer

from hf_sleep import AutoModelForSleepLM
from hf_sleep.serve.app import create_app
from hf_sleep.serve.settings import ServeSettings

NAME = "asleep"


def build(model: str, store: str):
    """The application of one replica, made where the replica runs."""

    def make():
        loaded = AutoModelForSleepLM.from_pretrained(model)
        return create_app(loaded, AutoTokenizer.from_pretrained(model), ServeSettings(NAME, store=store))

    return make


def deploy(model: str, store: str, replicas: int = 2, port: int = 8000, cpus: float = 1.0) -> None:
    """Start replicas behind one address."""
    served = serve.ingress(build(model, store))()
    deployment = serve.deployment(served, num_replicas=replicas, ray_actor_options={"num_cpus": cpus})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(deployment.bind(), name="hf_sleep")


if __name__ == "__main__":
    where = (*sys.argv[1:], *(".demo/SmolLM2-135M-Instruct", "memories")[len(sys.argv) - 1 :])
    deploy(*where)
    input("Serving at http://127.0.0.1:8000. Enter ends it. ")
    serve.shutdown()
