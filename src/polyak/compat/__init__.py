"""Averages that other libraries saved. Their files are recognised, read without running code, and kept as safetensors.

``formats`` has what libraries write, and ``shapes`` what training scripts write. ``files.load`` opens a file safely;
``pickles`` reads a pickle as data, without importing or calling anything that it names.
"""

from polyak.compat.files import load
from polyak.compat.formats import READERS, training_weights
from polyak.compat.found import Averaged
from polyak.compat.reading import read
from polyak.compat.writing import write

__all__ = ["READERS", "Averaged", "load", "read", "training_weights", "write"]
