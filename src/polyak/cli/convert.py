"""Read the average that another library saved, and write it as plain safetensors.

The command reads the checkpoints of Composer's EMA (any release), timm, Lightning's WeightAveraging and polyak, and
the states of torch's AveragedModel, ema-pytorch, torch-ema and diffusers' EMAModel, alone or in a custom checkpoint.
It detects the format. It does not change the file, and it runs no code from it.
It also finds the average where many training scripts save it; if a file has several, --key and --prefix choose.
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from polyak.cli.command import UsageError
from polyak.cli.output import say, size
from polyak.compat import read, write

NAME = "convert"

_EPILOG = """\
examples:
  polyak convert ep1-ba500-rank0.pt -o averaged.safetensors     (Composer)
  polyak convert unet_ema -o averaged.safetensors               (a diffusers folder)
  polyak convert checkpoint.pt --key ema -o averaged.safetensors
  polyak convert checkpoint.pt --key model --prefix teacher. -o averaged.safetensors
  polyak convert ema.pt --names model.pt -o averaged.safetensors
      (torch-ema and diffusers save lists without names: model.pt is torch.save(model.state_dict(), "model.pt"),
      or a JSON list of [name for name, _ in model.named_parameters()])

to load the output in Python:
  model.load_state_dict(safetensors.torch.load_file("averaged.safetensors"))
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("file", type=Path, metavar="FILE", help="the saved file or folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the safetensors file to write")
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


def run(arguments: Namespace) -> int:
    """Convert the file and print what it contains.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the output is not the name of a new or existing safetensors file in an existing folder.
        PolyakError: If the file cannot be read or converted.
    """
    source, output = arguments.file, arguments.output
    # Path.resolve would raise for links in a circle.
    at, to = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if output.is_dir() or to == at or (source.is_dir() and at in to.parents):
        raise UsageError(f"-o must not be the input or a folder (got {output}); choose another file")
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise UsageError(f"-o must be a .safetensors file in a folder that exists (got {output}); choose another")
    if output.exists() and not output.is_file():
        raise UsageError(f"-o must be a regular or new file (got {output}); choose another")
    if arguments.timm and (arguments.key is not None or arguments.prefix is not None):
        raise UsageError("--timm must not be given with --key or --prefix; leave one out")
    found = read(source, arguments.names, timm=arguments.timm, key=arguments.key, prefix=arguments.prefix)
    write(found, output, source)
    say(f"format   {found.format}")
    for note in found.notes:
        say(f"note     {note}")
    say(f"written  {output}: {len(found.tensors)} tensors, {size(output.stat().st_size)}")
    return 0
