"""vLLM's own server with the random weights of our law. Run by vLLM's Python: it knows nothing of ours.

python vllm_server.py serve FOLDER --load-format dummy ...

vLLM's dummy weights would send every token to the same experts. The process of its engine imports this file again.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

LAW = importlib.util.spec_from_file_location("dummy", Path(__file__).parents[3] / "model" / "dummy.py")
assert LAW is not None and LAW.loader is not None
sys.modules["dummy"] = dummy = importlib.util.module_from_spec(LAW)
LAW.loader.exec_module(dummy)

from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader  # noqa: E402


def load_weights(loader: Any, model: Any, config: Any) -> None:
    dummy.randomize(model)


DummyModelLoader.load_weights = load_weights

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
