"""A tiktoken vocabulary, as Kimi-K2 and Moonlight publish theirs, read into a `tokenizers` BPE.

`tiktoken.model` has a line per token: its bytes in base64, and its rank. The rank is the token's id, and also the order
of merging. What the file lacks is in the code that the checkpoint brings (`tokenization_kimi.py`): the pattern that
splits a text into words, and the 258 special tokens behind the ranks. That code is not run; both are repeated here.

tiktoken merges those two neighbours whose bytes together have the lowest rank, the leftmost first. A BPE of the
`tokenizers` library has a list of pairs instead, so each token gets all its splits, in the order of ranks. The tokens
are equal for a vocabulary that was trained, where a token's rank is above those of its parts.
"""

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from model.config import read_text, shown

SPECIAL_TOKENS = 258  # behind the ranks; those without a name are called <|reserved_token_ID|>
MOST_BYTES = 2**23  # of the file; Kimi-K2's has 2.8 million
MOST_TOKEN_BYTES = 1024
MOST_MERGES = 2**21
HAN = r"[\p{Han}]+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"  # one character in front of a word, mostly its space
PATTERN = "|".join(
    (
        HAN,
        f"{BEFORE}{UPPER}*{LOWER}+{CONTRACTION}",
        f"{BEFORE}{UPPER}+{LOWER}*{CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def read_tiktoken(path: Path, named: dict[int, AddedToken], vocab_size: int | None = None) -> Tokenizer:
    """Read a `tiktoken.model`.

    `named`: the special tokens that have a name, by id. `vocab_size`: the model's; reserved tokens beyond it are left
    out. Raises ValueError with the file, the line and the rule.
    """
    ranks = read_ranks(path)
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in find_merges(ranks, path)]
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    end = len(ranks) + SPECIAL_TOKENS
    if foreign := [token for token in named if not len(ranks) <= token < end]:
        raise ValueError(
            f"{path}: added_tokens_decoder has the id {foreign[0]}; behind {len(ranks)} ranks it must be in "
            f"{len(ranks)}..{end - 1}"
        )
    last = max(named, default=0) + 1
    for token in range(len(ranks), max(last, min(end, vocab_size or end))):
        filler = AddedToken(f"<|reserved_token_{token}|>", special=True, normalized=False)
        tokenizer.add_tokens([named.get(token, filler)])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the lines of a `tiktoken.model`: token -> rank. The ranks are 0 to n - 1, and every byte is a token."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path}: it has {size:,} bytes; it must have at most {MOST_BYTES:,}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where, fields = f"{path}: line {number}", line.split()
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        except (ValueError, IndexError, binascii.Error):
            fields = []
        if len(fields) != 2:
            raise ValueError(f"{where} is {shown(line)}; it must be a token in base64 and its rank")
        if not 1 <= len(token) <= MOST_TOKEN_BYTES:
            raise ValueError(f"{where}: its token has {len(token):,} bytes; it must have 1 to {MOST_TOKEN_BYTES:,}")
        if token in ranks:
            raise ValueError(f"{where}: its token has the rank {ranks[token]} already")
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: its {len(ranks)} ranks must be 0 to {len(ranks) - 1}, each once")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path}: byte {lacking[0]:#04x} is no token; every byte must be one")
    return ranks


def find_merges(ranks: dict[bytes, int], path: Path) -> list[tuple[bytes, bytes]]:
    """Return every split of a token into two tokens, in the order of ranks.

    Two different splits of a token can overlap in a text: `ab` `a` `ba` holds `aba` twice. Then the leftmost one must
    win. Its left part is as long as a period of the token, so such splits come first.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [at for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks]
        splits.sort(key=lambda at: (token[at:] != token[:-at], at))
        merges += [(token[:at], token[at:]) for at in splits]
        if len(merges) > MOST_MERGES:
            raise ValueError(f"{path}: its tokens are made of one another in over {MOST_MERGES:,} ways")
    return merges


def byte_letters() -> list[str]:
    """Return the letter by which byte-level vocabularies write each byte (GPT-2's `bytes_to_unicode`).

    Printable bytes are themselves; the others are the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
