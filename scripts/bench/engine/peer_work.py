"""What the engine and its peers do alike. It imports nothing of the project, as peer.py says."""

import argparse


def generated(args: argparse.Namespace, prompt: int, batch: int) -> int:
    """Return how many tokens each request generates, so that all decode together for --output steps.

    The first requests already decode while the last prompts, of `prompt` tokens, are computed.
    """
    return args.output + -(-batch * prompt // args.step_tokens) + 3
