"""`auto-round eval MODEL`: perplexity, distance from the original, benchmark tasks."""

from __future__ import annotations

from auto_round.cli.parser import Parser, UsageError, add_debug, add_tasks, add_trust, comma_list, whole_number

ABOUT = """Evaluate a model folder: auto-round eval MODEL --against ORIGINAL

Prints the perplexity on held-out text and, beside the original, the mean KL divergence per token and how often both
predict the same token."""


def make_parser() -> Parser:
    parser = Parser("eval", ABOUT, "model")
    parser.add_argument(
        "--model", "--model_name", "--model_name_or_path", dest="model_option", metavar="MODEL", help="same as MODEL"
    )
    parser.add_argument("--against", metavar="ORIGINAL", help="folder of the original model")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: the held-out text of the package)")
    parser.add_argument("--windows", type=whole_number, metavar="N", default=120, help="windows of text (120)")
    parser.add_argument(
        "--seqlen", "--seq_len", type=whole_number, metavar="N", default=512, help="tokens per window (512)"
    )
    parser.add_argument("--batch_size", "--bs", type=whole_number, metavar="N", default=4, help="windows at once (4)")
    parser.add_argument(
        "--device_map", "--device", "--devices", metavar="DEVICE", default="0", help="cpu, cuda, 0, auto (0)"
    )
    add_tasks(parser)
    add_trust(parser)
    add_debug(parser)
    return parser


def run(arguments: list[str]) -> int:
    parser = make_parser()
    options = parser.parse([argument for argument in arguments if argument != "--eval"])
    model = options.model_option or options.model
    if model is None or (options.model and options.model_option):
        raise UsageError("give one model folder, as in `auto-round eval MODEL --against ORIGINAL`")
    if options.windows < 1 or options.seqlen < 2 or options.batch_size < 1:
        raise UsageError("--windows and --batch_size must be at least 1 and --seqlen at least 2")

    from auto_round.cli.summary import print_pairs, silence_loading
    from auto_round.eval.divergence import compare
    from auto_round.utils.device import pick_device

    silence_loading()
    result = compare(
        model,
        against=options.against,
        text=options.text,
        windows=options.windows,
        seqlen=options.seqlen,
        device=str(pick_device(options.device_map)),
        trust_remote_code=options.trust_remote_code,
        tasks=comma_list(options.tasks) or None,
        batch_size=options.eval_bs or options.batch_size,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
    )
    print_pairs("Evaluation", result.rows())
    return 0
