"""Export the average of a record under any profile, at any recorded moment.

Load the file with model.load_state_dict(safetensors.torch.load_file(F)). For a model of transformers or diffusers,
write it as model.safetensors next to a copy of the model's config.json, and load the folder with from_pretrained.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from safetensors import safe_open

from polyak.cli.asking import add_record, open_record, profile_of
from polyak.cli.command import UsageError
from polyak.cli.output import clocks, say, size
from polyak.profiles import NamedProfile, options
from polyak.report.words import percent
from polyak.time import Time, Timestamp

NAME = "reconstruct"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

_EPILOG = """\
times are batches (500ba), epochs (1.5ep), samples (sp), tokens (tok), seconds (sec) or a fraction of the run (0.1dur)

examples:
  polyak reconstruct my-record --half-life 500ba -o averaged.safetensors
  polyak reconstruct my-record --window 10ep --at 3000ba -o lawa.safetensors
  polyak reconstruct my-record --half-life 2ep --unbiased -o my-model/model.safetensors   (with config.json)
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    group = parser.add_mutually_exclusive_group(required=True)
    for form in options():
        group.add_argument(
            f"--{form.name}", dest="profile", type=profile_of(form.name), metavar=form.metavar, help=form.help
        )
    parser.add_argument(
        "--unbiased", action="store_true", help="with --half-life: the first weights count no more than others"
    )
    parser.add_argument(
        "--at", metavar="TIME", help="the moment, at the end of a segment (default: the end of the record)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F", help="the safetensors file to write")
    parser.add_argument("--dtype", choices=_DTYPES, help="the dtype of the averaged tensors (default: float32)")


def run(arguments: Namespace) -> int:
    """Export the average and print what it is.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the arguments exclude each other.
        PolyakError: If the record does not give the average, or the file cannot be written.
    """
    profile = _profile(arguments)
    record = open_record(arguments.record)
    output = arguments.output
    if output.is_dir() or record.folder.resolve() in output.resolve().parents:
        raise UsageError(f"-o must be a file outside the record, not a folder (got {output}); choose another")
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


def _profile(arguments: Namespace) -> NamedProfile:
    given: NamedProfile = arguments.profile
    if not arguments.unbiased:
        return given
    debiased = given.debiased()
    if debiased is None:
        raise UsageError(
            f"--unbiased needs a profile with an unbiased variant, --half-life (got {given}); leave it out"
        )
    return debiased
