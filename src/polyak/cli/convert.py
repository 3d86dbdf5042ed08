"""Read the average that another library saved, and write it as plain safetensors.

It knows the checkpoints of Composer's EMA (any release), timm, Lightning's WeightAveraging and polyak itself, and
the states of torch's AveragedModel, ema-pytorch, torch-ema and diffusers' EMAModel, alone or in a checkpoint of your
own. Which it is, is found out. The file is not changed, and no code that it may hold is run.
It also knows where many training scripts keep an average; of several in one file, --key and --prefix choose.
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from polyak.cli.asking import size
from polyak.cli.command import UsageError, say
from polyak.compat import read, write

NAME = "convert"

_EPILOG = """\
examples:
  polyak convert ep1-ba500-rank0.pt -o averaged.safetensors     (Composer)
  polyak convert unet_ema -o averaged.safetensors               (a folder of diffusers)
  polyak convert checkpoint.pt --key ema -o averaged.safetensors
  polyak convert checkpoint.pt --key model --prefix teacher. -o averaged.safetensors
  polyak convert ema.pt --names model.pt -o averaged.safetensors
      (torch-ema and diffusers save lists without names: model.pt is torch.save(model.state_dict(), "model.pt"),
      or a JSON list of [name for name, _ in model.named_parameters()])

in Python, what is written loads by
  model.load_state_dict(safetensors.torch.load_file("averaged.safetensors"))
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: Of this command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("file", type=Path, metavar="FILE", help="what was saved: a file, or a folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the safetensors file to write")
    parser.add_argument("--names", type=Path, metavar="MODEL", help="where the names are, for a file without them")
    parser.add_argument("--key", metavar="KEY", help="where the average is in FILE, as ema or optimizer_states.0.ema")
    parser.add_argument("--prefix", metavar="PREFIX", help="how the names of its tensors begin, as teacher.")
    parser.add_argument(
        "--timm",
        action="store_true",
        help="FILE is a state dict of timm's ModelEmaV3: it looks like any under DDP",
    )


def run(arguments: Namespace) -> int:
    """Convert it.

    Args:
        arguments: As parsed.

    Raises:
        UsageError: If the output would be the file itself, a folder, in none, or by name no safetensors file.
        PolyakError: If the library refuses.
    """
    source, output = arguments.file, arguments.output
    # Not by Path.resolve, which raises where links lead in a circle.
    at, to = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if output.is_dir() or to == at or (source.is_dir() and at in to.parents):
        raise UsageError(f"-o must be another file than what is read, and no folder (got {output}); choose another")
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise UsageError(f"-o must be a .safetensors file in a folder that exists (got {output}); choose another")
    if output.exists() and not output.is_file():
        raise UsageError(f"-o must be a file or not be there (got {output}); choose another")
    if arguments.timm and (arguments.key is not None or arguments.prefix is not None):
        raise UsageError("--timm must not be given with --key or --prefix; leave one out")
    found = read(source, arguments.names, timm=arguments.timm, key=arguments.key, prefix=arguments.prefix)
    write(found, output, source)
    say(f"format   {found.format}")
    for note in found.notes:
        say(f"note     {note}")
    say(f"written  {output}: {len(found.tensors)} tensors, {size(output.stat().st_size)}")
    return 0
