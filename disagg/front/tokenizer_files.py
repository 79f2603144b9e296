"""What a model folder says of its text: tokenizer, added tokens, BOS, chat templates.

The folder is not trusted. A tokenizer that makes much of little, and ids that the model does not have, are refused.
"""

import json
import math
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from disagg.front.library_errors import refusing
from disagg.front.tiktoken_file import read_tiktoken
from model.config import parse_json, read_json, read_text, shown

PREFIXED = ("continuing_subword_prefix", "merges")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
TEMPLATES = ("default", "tool_use")  # the others have no use here
MOST_EXPANSION = 64  # characters that a normalizer or a decoder may make from one
MOST_ADDED = 64  # tokens that a post-processor may add to a text
MOST_TOKEN_BYTES = 2**16
MOST_ID = 2**31 - 1


def read_settings(folder: Path) -> dict:
    """Read tokenizer_config.json, and the older special_tokens_map.json as transformers does.

    The older file overrides special tokens, unless there is an added_tokens_decoder.
    """
    path, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_json(path) if path.is_file() else {}
    if "added_tokens_decoder" not in settings and older.is_file():
        settings |= {name: token for name, token in read_json(older).items() if name.endswith("_token")}
    return settings


def read_added_tokens(folder: Path, settings: dict) -> dict[int, AddedToken]:
    """Return the tokens of `added_tokens_decoder`, by id in rising order. Raises ValueError for a bad one."""
    field, raw = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder", settings.get("added_tokens_decoder")
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ValueError(f"{field} is {shown(raw)}; it must be an object")
    tokens = {}
    for key, token in raw.items():
        if not (key.isascii() and key.isdigit() and len(key) <= len(str(MOST_ID)) and int(key) <= MOST_ID):
            raise ValueError(f"{field} has the id {shown(key)}; it must be an integer in 0..{MOST_ID}")
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content:
            raise ValueError(f"{field}: {key} is {shown(token)}; its content must be a non-empty string")
        flags = {name: token[name] for name in FLAGS if name in token}
        if any(type(flag) is not bool for flag in flags.values()):
            raise ValueError(f"{field}: {key} is {shown(token)}; {', '.join(FLAGS)} must be true or false")
        tokens[int(key)] = AddedToken(content, **flags)
    if len({token.content for token in tokens.values()}) < len(raw):
        raise ValueError(f"{field} has one token or one id twice")
    return dict(sorted(tokens.items()))


def read_tokenizer(folder: Path, added: dict[int, AddedToken], vocab_size: int | None) -> tuple[Tokenizer | None, bool]:
    """Read tokenizer.json, or else tiktoken.model. Returns None if there is neither.

    Also returns whether the checkpoint's own code sorts the keys of `tools`: that of a tiktoken.model does.
    """
    if (path := folder / "tokenizer.json").is_file():
        tokenizer = _read_json_tokenizer(path, added)
    elif (path := folder / "tiktoken.model").is_file():
        tokenizer = read_tiktoken(path, added, vocab_size)
    else:
        return None, False
    with refusing(str(path)):
        _check_bounds(tokenizer)
    _check_ids(path, tokenizer, added, vocab_size)
    return tokenizer, path.name == "tiktoken.model"


def _read_json_tokenizer(path: Path, added: dict[int, AddedToken]) -> Tokenizer:
    """Read a tokenizer.json, and add the tokens that only `added` has."""
    text = read_text(path)
    raw = parse_json(path, text)
    _check_merges(path, raw)
    with refusing(str(path)):
        tokenizer = Tokenizer.from_str(text)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = {id: token for id, token in added.items() if token.content not in known}
    for id, token in missing.items():
        here = tokenizer.id_to_token(id), tokenizer.token_to_id(token.content)
        if here not in ((None, None), (token.content, id)):
            raise _disagreement(path, tokenizer, id, token)
    if missing:
        with refusing(str(path)):
            tokenizer = _with_tokens(tokenizer, missing, raw)
    tokenizer.no_padding()
    tokenizer.no_truncation()  # prompts that are too long are refused, not cut
    return tokenizer


def _check_merges(path: Path, raw: dict) -> None:
    """Raise ValueError if a merge's second part lacks the prefix that all such parts must have.

    The library would cut the part off by the prefix's length, and may end the process.
    """
    model = raw.get("model")
    prefix, merges = (model.get(key) for key in PREFIXED) if isinstance(model, dict) else (None, None)
    if not (prefix and isinstance(prefix, str) and isinstance(merges, list)):
        return  # the library refuses what is of another type
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(parts, list) and len(parts) == 2 and not str(parts[1]).startswith(prefix):
            rule = f"its second part must begin with continuing_subword_prefix, {shown(prefix)}"
            raise ValueError(f"{path}: model has the merge {shown(merge)}; {rule}")


def _with_tokens(tokenizer: Tokenizer, missing: dict[int, AddedToken], raw: dict) -> Tokenizer:
    """Add tokens under their ids. `raw`: the tokenizer.json.

    The library ignores the ids of added tokens, and numbers them onwards. Only those in the vocabulary keep theirs.
    """
    words = tokenizer.get_added_tokens_decoder() | missing
    if isinstance(vocab := raw["model"]["vocab"], dict):
        vocab |= {token.content: id for id, token in words.items()}
    raw["added_tokens"] = [
        {"id": id, "content": token.content} | {name: getattr(token, name) for name in FLAGS}
        for id, token in sorted(words.items())
    ]
    before, tokenizer = tokenizer.get_vocab(), Tokenizer.from_str(json.dumps(raw))
    if moved := before.items() - tokenizer.get_vocab().items():
        raise ValueError(f"added_tokens_decoder cannot be added to this kind of tokenizer; it moves {min(moved)[0]!r}")
    return tokenizer


def _disagreement(path: Path, tokenizer: Tokenizer, id: int, token: AddedToken) -> ValueError:
    return ValueError(
        f"{path}: token {shown(token.content)} is {tokenizer.token_to_id(token.content)} and {id} is "
        f"{shown(tokenizer.id_to_token(id))}; added_tokens_decoder of tokenizer_config.json has it as {id}"
    )


def _check_ids(path: Path, tokenizer: Tokenizer, added: dict[int, AddedToken], vocab_size: int | None) -> None:
    """Raise ValueError if two files disagree about an id, or the model has no such id."""
    for id, token in added.items():
        if tokenizer.token_to_id(token.content) != id or tokenizer.id_to_token(id) != token.content:
            raise _disagreement(path, tokenizer, id, token)
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if vocab_size is not None and last >= vocab_size:
        raise ValueError(f"{path}: token {shown(token)} has the id {last}; the model's vocab_size is {vocab_size}")


def longest_token(tokenizer: Tokenizer) -> int:
    """Return the bytes of the longest token, or more: some vocabularies spell a byte with two."""
    return max((len(token.encode()) for token in tokenizer.get_vocab()), default=0)


def _check_bounds(tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer can turn a short text into a very long one."""
    for what, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        if part is not None and (most := _expansion(json.loads(part.__getstate__()))) > MOST_EXPANSION:
            raise ValueError(f"its {what} can make {most:,} characters of one; at most {MOST_EXPANSION} are taken")
    if (added := tokenizer.num_special_tokens_to_add(False)) > MOST_ADDED:
        raise ValueError(f"its post_processor adds {added:,} tokens to a text; at most {MOST_ADDED} are taken")
    if (longest := longest_token(tokenizer)) > MOST_TOKEN_BYTES:
        raise ValueError(f"its longest token has {longest:,} bytes; at most {MOST_TOKEN_BYTES:,} are taken")


def _expansion(part: dict) -> int:
    """Return the most characters that a part of a tokenizer makes from one. Unicode normalization is not counted."""
    match part:
        case {"normalizers": parts} | {"decoders": parts}:
            return math.prod(map(_expansion, parts))
        case {"type": "Prepend", "prepend": text} | {"type": "Replace", "pattern": {"Regex": _}, "content": text}:
            return 1 + len(text)  # a regex may match the empty string before every character
        case {"type": "Replace", "content": text}:
            return max(1, len(text))
    return 1


def missing_bos(folder: Path, settings: dict, tokenizer: Tokenizer) -> int | None:
    """Return the token that `add_bos_token` asks for, if the tokenizer does not add it by itself.

    The files of DeepSeek-V2 to R1 ask for it, and have no post-processor that adds it. transformers 4 added it.
    """
    path, wanted = folder / "tokenizer_config.json", settings.get("add_bos_token")
    if not isinstance(wanted, bool | None):
        raise ValueError(f"{path}: add_bos_token is {shown(wanted)}; it must be true or false")
    if not wanted:
        return None
    word = _content(settings.get("bos_token"))
    bos = None if word is None else tokenizer.token_to_id(word)
    if bos is None:
        raise ValueError(f"{path}: add_bos_token is true; then bos_token ({shown(word)}) must be one of its tokens")
    with refusing(str(path)):
        return None if tokenizer.encode("a").ids[:1] == [bos] else bos


def read_templates(folder: Path, settings: dict) -> tuple[Path, dict[str, str], dict[str, str]]:
    """Return the chat templates by name, the file that they are in, and the special tokens by name.

    As in transformers, templates in files of their own replace those of tokenizer_config.json. Raises ValueError.
    """
    path, source = folder / "tokenizer_config.json", settings.get("chat_template")
    words = dict(settings)
    for more in ("extra_special_tokens", "model_specific_special_tokens"):
        words = words | (settings[more] if isinstance(settings.get(more), dict) else {})
    words = {name: word for name, token in words.items() if name.endswith("_token") and (word := _content(token))}
    default, others = folder / "chat_template.jinja", folder / "additional_chat_templates"
    files = {"default": default} | {file.stem: file for file in others.glob("*.jinja")}
    if files := {name: file for name, file in files.items() if file.is_file()}:
        used = {name: file for name, file in files.items() if name in TEMPLATES}
        return default, {name: read_text(file) for name, file in used.items()}, words
    if isinstance(source, list):
        items = [item if isinstance(item, dict) else {} for item in source]
        named = [(item.get("name"), item.get("template")) for item in items]
    else:
        named = list(source.items()) if isinstance(source, dict) else [("default", "" if source is None else source)]
    templates = {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}
    if len(templates) != len(named):
        raise ValueError(
            f"{path}: chat_template is {shown(source)}; it must be a text, or a list of objects with name and template"
        )
    return path, {name: text for name, text in templates.items() if name in TEMPLATES}, words


def _content(token: object) -> str | None:
    """Return a special token's text. None if there is no such token: the template would write "None"."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
