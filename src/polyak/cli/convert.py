"""Read the average that another library saved, and write it as plain safetensors.

The command reads the checkpoints of Composer's EMA (any release), timm, Lightning's WeightAveraging and polyak, and
the states of torch's AveragedModel, ema-pytorch, torch-ema and diffusers' EMAModel, alone or in a custom checkpoint.
It detects the format. It does not change the file, and it runs no code from it.
It also finds the average where many training scripts save it; if a file has several, --key and --prefix choose.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from polyak.cli.command import Answer, UsageError
from polyak.cli.files import add_output, check_output, note_written
from polyak.cli.output import fields, size, terminal_width
from polyak.printable import printable

NAME = "convert"

JSON = {
    "format": "the library that saved the average, and the form",
    "notes": "what there is to know about it, a list of sentences",
    "output": "the file that was written",
    "tensors": "how many tensors it has",
    "size_bytes": "its size",
}

_EPILOG = """\
examples, for Composer, diffusers, and a training script:
  polyak convert ep1-ba500-rank0.pt -o averaged.safetensors
  polyak convert unet_ema -o averaged.safetensors
  polyak convert checkpoint.pt --key ema -o averaged.safetensors
  polyak convert checkpoint.pt --key model --prefix teacher. -o averaged.safetensors
  polyak convert ema.pt --names model.pt -o averaged.safetensors

torch-ema and diffusers save lists without names: --names takes torch.save(model.state_dict(), "model.pt"),
or a JSON list of [name for name, _ in model.named_parameters()].

to load the output in Python, with load_file of safetensors.torch:
  model.load_state_dict(load_file(path))
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("file", type=Path, metavar="FILE", help="the saved file or folder")
    add_output(parser)
    parser.add_argument("--names", type=Path, metavar="MODEL", help="a file with the names, if FILE has none")
    parser.add_argument(
        "--key", metavar="KEY", help="where the average is in FILE, such as ema or optimizer_states.0.ema"
    )
    parser.add_argument("--prefix", metavar="PREFIX", help="the prefix of its tensors' names, such as teacher.")
    parser.add_argument(
        "--timm",
        action="store_true",
        help="FILE is a state dict of timm's ModelEmaV3, which cannot be detected",
    )


def run(arguments: Namespace) -> Answer:
    """Convert the file; return what it contains.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the output is not the name of a safetensors file that can be written.
        PolyakError: If the file cannot be read or converted.
    """
    source, output = arguments.file, arguments.output
    check_output(output, force=arguments.force, source=source)
    if arguments.timm and (arguments.key is not None or arguments.prefix is not None):
        raise UsageError("--timm must not be given with --key or --prefix; leave one out")
    from polyak.compat import read, write

    found = read(source, arguments.names, timm=arguments.timm, key=arguments.key, prefix=arguments.prefix)
    write(found, output, source)
    note_written(output)
    size_bytes = output.stat().st_size
    rows = [
        ("format", found.format),
        *(("note", note) for note in found.notes),
        ("written", f"{output}: {len(found.tensors)} tensors, {size(size_bytes)}"),
    ]
    return Answer(
        fields([(name, printable(str(value))) for name, value in rows], terminal_width()),
        {
            "format": str(found.format),
            "notes": [str(note) for note in found.notes],
            "output": str(output),
            "tensors": len(found.tensors),
            "size_bytes": size_bytes,
        },
    )
