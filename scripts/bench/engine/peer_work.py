"""What the engine and its peers do alike. It imports nothing of the project, as peer.py says."""

import argparse


def generated(args: argparse.Namespace, prompt: int, batch: int, drafts: int = 0) -> int:
    """Return how many tokens each request generates, so that all decode together for --output steps.

    The first requests already decode while the last prompts, of `prompt` tokens, are computed. With drafts, all decode
    together for fewer steps, of the same tokens.
    """
    ahead = -(-batch * prompt // args.step_tokens) + 3  # steps
    return args.output + ahead * (1 + drafts)
