"""--model ORG/NAME: a model of the Hugging Face hub, fetched into the cache that all tools of huggingface_hub share.

Only the files that are served are fetched: configuration, tokenizer and chat template, and the shards that hold a
tensor of the model. The library obeys HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, and shows its progress bars.
"""

import re
import threading
import time
from pathlib import Path

from model.checkpoint import INDEX, needed_shards
from model.config import QUANTIZER_FILES, ModelConfig
from parallel.launched import launched_local_rank
from parallel.mesh import Mesh

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
TEXTS = [
    *("config.json", "generation_config.json", *QUANTIZER_FILES),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*tiktoken*", "vocab*", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*"),
]
State = tuple[bool, str | None, str]  # of a fetch: is it done, what went wrong, the folder
POLL_S = 0.5  # how often ranks ask whether the files are there


def find_model(name: str, mesh: Mesh, weights: bool, drafts: bool = False) -> str:
    """Collective. Return the folder of a model: `name`, if it is one, else where the files of this hub id are.

    `weights`: also fetch those. `drafts`: with the multi-token-prediction layer. One rank of each machine fetches while
    the others wait. Raises ValueError on all ranks if a rank cannot.
    """
    match = HUB_ID.fullmatch(name)
    if match is None:
        return name
    local = mesh.ep.exchange(Path(name).exists(), bool)
    if all(local):
        return name
    if any(local):
        raise ValueError(f"--model {name}: it is a folder on some machines only")
    job = Fetch(match["id"], match["revision"], weights, drafts) if launched_local_rank() == 0 else None
    while True:
        mine = job.state() if job is not None else None
        states = mesh.ep.exchange(mine, State | None)  # short, so no collective waits too long
        fetching = [state for state in states if state is not None]
        if problems := [problem for _, problem, _ in fetching if problem is not None]:
            raise ValueError(f"--model {name}: {problems[0]}")
        if all(done for done, *_ in fetching):
            break
        time.sleep(POLL_S)
    *_, (_, _, folder) = (state for state in states[: mesh.rank + 1] if state is not None)  # of this machine's first
    return folder


class Fetch:
    """A download in a thread of its own."""

    def __init__(self, repo: str, revision: str | None, weights: bool, drafts: bool) -> None:
        self.folder, self.problem = "", None
        self._thread = threading.Thread(target=self._run, args=(repo, revision, weights, drafts), daemon=True)
        self._thread.start()

    def state(self) -> State:
        self._thread.join(POLL_S)
        return not self._thread.is_alive(), self.problem, self.folder

    def _run(self, repo: str, revision: str | None, weights: bool, drafts: bool) -> None:
        try:
            self.folder = fetch(repo, revision, weights, drafts)
        except ValueError as error:
            self.problem = str(error)
        except Exception as error:  # else the other ranks would take it for done
            self.problem = f"{type(error).__name__}: {error}"


def fetch(repo: str, revision: str | None, weights: bool, drafts: bool = False) -> str:
    """Bring the files of a hub id into the cache. Return their folder. Raises ValueError, on one line."""
    folder = _download(repo, revision, TEXTS + [INDEX] * weights)
    if weights:
        index = Path(folder, INDEX)
        config = ModelConfig.from_pretrained(folder)
        config = config.drafting() if drafts else config
        shards = needed_shards(index, config) if index.is_file() else ["model.safetensors"]
        commit = Path(folder).name  # the same files, even if the repository changes meanwhile
        folder = _download(repo, commit, shards)
    return folder


def _download(repo: str, revision: str | None, patterns: list[str]) -> str:
    """Bring files into the cache. Return the folder of their snapshot."""
    from huggingface_hub import constants, errors, snapshot_download  # half a second, which a folder need not pay

    hub = constants.ENDPOINT
    try:
        return snapshot_download(repo, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError:
        why = f"{hub}/{repo} is gated: ask for access there, and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = f"there is no such folder, and no such model at {hub}, or HF_TOKEN may not read it"
    except errors.RevisionNotFoundError:
        why = f"{hub}/{repo} has no revision {revision}"
    except errors.LocalEntryNotFoundError as error:
        reason = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"{hub} cannot be reached: {_first_line(error.__cause__)}"
        )
        why = f"there is no such folder, and not all of it is in the cache {constants.HF_HUB_CACHE} ({reason})"
    except Exception as error:  # whatever the network, the disk or the library has to say
        why = f"{hub}: {_first_line(error)}"
    raise ValueError(why)


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
