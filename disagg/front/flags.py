"""Flags: what is asked of a job, and where the answers go. For the roles that have a front door."""

from argparse import ArgumentParser, Namespace

LOG_HTTP_S = 10.0


def add_requests(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("requests").add_argument
    add("--prompt", metavar="TEXT", help="one prompt; its continuation is printed while it is generated")
    add("--max-tokens", type=int, default=64, metavar="N", help="tokens to generate for --prompt (64)")
    add("--input", metavar="FILE", help="requests, one JSON object per line (-: from stdin)")
    add("--output", metavar="FILE", help="answers, one JSON object per line, in input order (-: to stdout)")
    add("--http", metavar="HOST:PORT", help="serve OpenAI's API at this address until Ctrl-C")
    add("--api-key-file", metavar="FILE", help="keys that --http accepts, one per line (it needs none)")
    add(
        "--request-timeout",
        metavar="S[,F]",
        help="seconds that a request of --http may take: in all, and to its first token (no limit)",
    )
    add(
        "--existing",
        choices=("refuse", "overwrite", "resume"),
        default="refuse",
        help="if the --output file exists: refuse it, replace it, or append the missing answers (refuse)",
    )
    add(
        "--log-interval",
        type=float,
        metavar="S",
        help=f"seconds between two lines per job on stderr, 0: none ({LOG_HTTP_S:g} with HTTP, else 0)",
    )


def check_requests(args: Namespace, parser: ArgumentParser) -> None:
    if sum(given is not None for given in (args.prompt, args.input, args.http)) != 1:
        raise ValueError(f"--role {args.role} needs exactly one of --prompt, --input and --http")
    if (args.input is None) != (args.output is None):
        raise ValueError("--input and --output go together: requests from one file, answers to another")
    if args.log_interval is None:
        args.log_interval = LOG_HTTP_S if args.http else 0.0
    if not 0 <= args.log_interval < float("inf"):
        raise ValueError(f"--log-interval is {args.log_interval:g}; it must be 0 or a number of seconds above it")
    if args.output == "-" and args.existing != "refuse":
        raise ValueError(f"--existing {args.existing} is for a file; --output - is stdout")
    if args.output is None and args.existing != "refuse":
        raise ValueError(f"--existing {args.existing} is for --output; a --prompt has none")
    if args.prompt is None and args.max_tokens != parser.get_default("max_tokens"):
        has = "a line of --input" if args.http is None else "a request of --http"
        raise ValueError(f"--max-tokens {args.max_tokens} is for --prompt; {has} has its own max_tokens")
    if args.http is None and (name := next((n for n in ("api_key_file", "request_timeout") if vars(args)[n]), None)):
        raise ValueError(f"--{name.replace('_', '-')} is for --http")
