"""Export the average of a record under any profile, at any recorded moment.

The file loads with model.load_state_dict(safetensors.torch.load_file(F)). For a model of transformers or diffusers,
write it as model.safetensors beside a copy of the model's config.json, and load that folder with from_pretrained.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from safetensors import safe_open

from polyak.cli.asking import add_record, clocks, open_record, profile_of, size
from polyak.cli.command import UsageError, say
from polyak.profiles import HalfLife
from polyak.report.words import percent
from polyak.time import Time, Timestamp

NAME = "reconstruct"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

_EPILOG = """\
times are batches (500ba), epochs (1.5ep), samples (sp), tokens (tok), seconds (sec) or a share of the run (0.1dur)

examples:
  polyak reconstruct my-record --half-life 500ba -o averaged.safetensors
  polyak reconstruct my-record --window 10ep --at 3000ba -o lawa.safetensors
  polyak reconstruct my-record --half-life 2ep --unbiased -o my-model/model.safetensors   (config.json lies there)
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: Of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    group = parser.add_mutually_exclusive_group(required=True)
    for name, metavar, what in (
        ("half-life", "TIME", "an exponential moving average that forgets half within TIME"),
        ("window", "TIME", "the plain mean over the last TIME"),
        ("uniform-from", "TIME", "the plain mean over all since TIME after the record's start (SWA)"),
        ("power", "SIGMA", "a power function of relative width SIGMA, as EDM2's 0.1"),
        ("smoothing", "S", "an exponential moving average that keeps S of itself at each recorded update, as 0.999"),
    ):
        group.add_argument(f"--{name}", dest="profile", type=profile_of(name), metavar=metavar, help=what)
    parser.add_argument(
        "--unbiased", action="store_true", help="with --half-life: the first weights count no more than others"
    )
    parser.add_argument("--at", metavar="TIME", help="the moment, where a stretch ends (default: the record's end)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F", help="the safetensors file to write")
    parser.add_argument("--dtype", choices=_DTYPES, help="of what is averaged (default: float32)")


def run(arguments: Namespace) -> int:
    """Export it.

    Args:
        arguments: As parsed.

    Raises:
        UsageError: If the arguments do not go together.
        PolyakError: If the library refuses.
    """
    profile = arguments.profile
    if arguments.unbiased:
        if not isinstance(profile, HalfLife):
            raise UsageError(f"--unbiased goes with --half-life alone (got {profile}); leave it out")
        profile = HalfLife(profile.span, unbiased=True)
    record = open_record(arguments.record)
    output = arguments.output
    if output.is_dir() or record.folder.resolve() in output.resolve().parents:
        raise UsageError(f"-o must be a file outside the record, and no folder (got {output}); choose another")
    record.export(profile, output, arguments.at, dtype=_DTYPES.get(arguments.dtype or ""))
    with safe_open(output, framework="pt") as file:
        metadata, tensors = file.metadata(), len(list(file.keys()))
    moment = json.loads(metadata["polyak.moment"])
    updates = moment.pop("updates")
    readings = clocks(Timestamp.from_state_dict(moment))
    say(f"profile  {profile}")
    clock = [str(Time(round(value, 3), unit)) for unit, value in readings.items()]
    say(f"moment   {', '.join([f'{updates} updates recorded', *clock])}")
    error = percent(float(metadata["polyak.error_estimate"]))
    say(f"error    about {error} of |last weights - average|: an estimate, within a factor of about 2.5, not a bound")
    say(f"written  {output}: {tensors} tensors, {size(output.stat().st_size)}")
    return 0
