"""The router's text side: a tokenizer.json and a chat template out of a Hugging Face folder."""

from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from disagg.request import PromptEncoder
from model.config import read_json


def load_tokenizer(folder: str | Path) -> PromptEncoder:
    """ValueError if the folder has no readable tokenizer.json; a missing chat template only rules out `messages`."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"--model {folder}: it has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{path}: {error}") from None
    return PromptEncoder(tokenizer, _chat_template(Path(folder)))


def _chat_template(folder: Path):
    path, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(path) if path.is_file() else {}
    source = alone.read_text() if alone.is_file() else settings.get("chat_template")
    if not source:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    for name in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:  # else the template would write "None"
            environment.globals[name] = token
    try:
        return environment.from_string(source)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{folder}: its chat template cannot be read ({error})") from None


def _raise(message: str) -> None:
    raise TemplateError(message)


class TextStream:
    """One request's text as its tokens come, cut at its stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self.token_ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> bool:
        """Add a token; True if a stop string is complete. The text then ends just before it."""
        self.token_ids.append(token)
        piece = self._stream.step(self._tokenizer, token)
        if not piece:
            return False
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self.text) - longest)
        self.text += piece
        ends = [at for at in (self.text.find(stop, start) for stop in self._stop) if at >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        return bool(ends)

    def close(self) -> None:
        """No more tokens: also show an unfinished character, as U+FFFD."""
        self.text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
