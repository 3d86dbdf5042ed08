"""Export the average of a record under any profile, at any recorded moment.

Give one of the profiles: --half-life, --window, --uniform-from, --power, --smoothing, --cooldown or --profile. Load the
file with load_file of safetensors.torch, for model.load_state_dict. For a model of transformers or diffusers, write it
as model.safetensors next to a copy of the model's config.json, and load the folder with from_pretrained.
"""

import json
from argparse import ArgumentParser, Namespace

from polyak.cli.asking import add_profiles, add_record, open_record
from polyak.cli.command import Answer, UsageError, one_of
from polyak.cli.files import add_output, check_output
from polyak.cli.output import clocks, fields, size, terminal_width
from polyak.printable import printable
from polyak.profiles import NamedProfile, named
from polyak.time import Time, Timestamp

NAME = "reconstruct"

JSON = {
    "record": "the folder of the record",
    "profile": "the profile, as options of this command; null for one without options",
    "moment": "the end of the average in updates and in each unit of the run",
    "error_estimate": "the estimated error, relative to |last weights - average|",
    "output": "the file that was written",
    "tensors": "how many tensors it has",
    "size_bytes": "its size",
}

_DTYPES = ("float32", "float16", "bfloat16", "float64")

_EPILOG = """\
times are batches (500ba), epochs (1.5ep), samples (sp), tokens (tok), seconds (sec) or a fraction of the run (0.1dur)

examples:
  polyak reconstruct my-record --half-life 500ba -o averaged.safetensors
  polyak reconstruct my-record --window 10ep --at 3000ba -o lawa.safetensors
  polyak reconstruct my-record --half-life 2ep --unbiased -o model.safetensors
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    group = parser.add_mutually_exclusive_group(required=True)
    add_profiles(group)
    parser.add_argument(
        "--unbiased", action="store_true", help="with --half-life: the first weights count no more than others"
    )
    parser.add_argument(
        "--at", metavar="TIME", help="the moment, at the end of a segment (default: the end of the record)"
    )
    add_output(parser)
    parser.add_argument(
        "--dtype",
        type=one_of(_DTYPES),
        metavar="DTYPE",
        help=f"the dtype of the averaged tensors: {', '.join(_DTYPES)} (default: float32)",
    )


def run(arguments: Namespace) -> Answer:
    """Export the average; return what it is.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the arguments exclude each other, or the output cannot be written.
        PolyakError: If the record does not give the average.
    """
    profile, output = _profile(arguments), arguments.output
    record = open_record(arguments.record, arguments)
    # Next to the checkpoints of a pattern, an average is not one of them.
    check_output(output, force=arguments.force, source=record.folder if arguments.record.is_dir() else arguments.record)
    import torch
    from safetensors import safe_open

    from polyak.report.words import percent

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    record.export(profile, output, arguments.at, dtype=dtype, overwrite=True)  # it was asked before
    with safe_open(output, framework="pt") as file:
        metadata, tensors = file.metadata(), len(list(file.keys()))
    moment = json.loads(metadata["polyak.moment"])
    updates, error = moment.pop("updates"), float(metadata["polyak.error_estimate"])
    readings = clocks(Timestamp.from_state_dict(moment))
    clock = [str(Time(round(value, 3), unit)) for unit, value in readings.items()]
    size_bytes = output.stat().st_size
    rows = [
        ("profile", named(profile).describe()),
        ("moment", ", ".join([f"{updates} updates recorded", *clock])),
        (
            "error",
            f"about {percent(error)} of |last weights - average|: an estimate within a factor of about 2.5, no bound",
        ),
        ("written", f"{output}: {tensors} tensors, {size(size_bytes)}"),
    ]
    return Answer(
        fields([(name, printable(value)) for name, value in rows], terminal_width()),
        {
            "record": str(record.folder),
            "profile": named(profile).options,
            "moment": {"updates": updates} | {unit.value: value for unit, value in readings.items()},
            "error_estimate": error,
            "output": str(output),
            "tensors": tensors,
            "size_bytes": size_bytes,
        },
    )


def _profile(arguments: Namespace) -> NamedProfile:
    given: NamedProfile = arguments.profile
    if not arguments.unbiased:
        return given
    debiased = given.debiased()
    if debiased is None:
        raise UsageError(
            f"--unbiased needs a profile with an unbiased variant, --half-life (got {given.describe()}); leave it out"
        )
    return debiased
